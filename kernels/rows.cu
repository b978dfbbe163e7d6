/* Row-wise ops: embedding, RMSNorm, sums, GLU, losses, channel statistics. */
#include "kernels/device_cuda.cuh"

#include <cuda_bf16.h>

#define THREADS 256

/* Weights come as f16, bf16 or f32, the residual stream as f32, activations as f16. */
__device__ __forceinline__ float load_f(const void *p, int64_t i, dtype dt)
{
    if (dt == DT_F16) return __half2float(((const __half *)p)[i]);
    if (dt == DT_BF16) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    return ((const float *)p)[i];
}
__device__ __forceinline__ void store_f(void *p, int64_t i, dtype dt, float v)
{
    if (dt == DT_F16)
        ((__half *)p)[i] = __float2half_rn(fminf(fmaxf(v, -65504.f), 65504.f));
    else
        ((float *)p)[i] = v;
}

/* Sum over the block, the same for every thread; fixed order. */
__device__ __forceinline__ float block_sum(float v)
{
    __shared__ float part[THREADS / 32];
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
    __syncthreads();
    v = 0.f;
    for (int i = 0; i < THREADS / 32; i++) v += part[i];
    return v;
}

__global__ void embed_kernel(void *y, dtype ydt, int64_t ldy, const void *table, dtype dt, const int32_t *ids,
                             int64_t h)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x, from = (int64_t)ids[row] * h;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x) store_f(y, row * ldy + i, ydt, load_f(table, from + i, dt));
}

__global__ void rmsnorm_kernel(void *y, dtype ydt, int64_t ldy, const void *x, dtype xdt, int64_t ldx, const void *w,
                               dtype wdt, float eps, int64_t k)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x;
    float sum = 0.f;
    for (int64_t i = threadIdx.x; i < k; i += THREADS) {
        const float v = load_f(x, row * ldx + i, xdt);
        sum += v * v;
    }
    const float inv = rsqrtf(block_sum(sum) / (float)k + eps);
    for (int64_t i = threadIdx.x; i < k; i += THREADS)
        store_f(y, row * ldy + i, ydt, load_f(x, row * ldx + i, xdt) * inv * load_f(w, i, wdt));
}

__global__ void add_kernel(void *y, dtype ydt, int64_t ldy, const void *x, dtype xdt, int64_t ldx, int64_t k)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x;
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x)
        store_f(y, row * ldy + i, ydt, load_f(y, row * ldy + i, ydt) + load_f(x, row * ldx + i, xdt));
}

__global__ void glu_kernel(__half *y, int64_t ldy, const __half *gate, int64_t ldg, const __half *up, int64_t ldu,
                           int64_t n)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.y, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float g = __half2float(gate[row * ldg + i]), u = __half2float(up[row * ldu + i]);
    store_f(y, row * ldy + i, DT_F16, g / (1.f + __expf(-g)) * u);
}

__global__ void nll_kernel(float *nll, int32_t *best, const float *logits, int64_t ld, const int32_t *target, int64_t v)
{
    __shared__ float tops[THREADS];
    __shared__ int32_t ids[THREADS];
    pdl_launch();
    pdl_wait();
    const float *row = logits + (int64_t)blockIdx.x * ld;
    float top = -INFINITY;
    int32_t id = 0;
    for (int64_t i = threadIdx.x; i < v; i += THREADS)
        if (row[i] > top) top = row[i], id = (int32_t)i;
    tops[threadIdx.x] = top;
    ids[threadIdx.x] = id;
    __syncthreads();
    for (int s = THREADS / 2; s; s >>= 1) { /* ties to the lowest id */
        if (threadIdx.x < s) {
            const float o = tops[threadIdx.x + s];
            const int32_t oid = ids[threadIdx.x + s];
            if (o > tops[threadIdx.x] || (o == tops[threadIdx.x] && oid < ids[threadIdx.x]))
                tops[threadIdx.x] = o, ids[threadIdx.x] = oid;
        }
        __syncthreads();
    }
    top = tops[0];
    float sum = 0.f;
    for (int64_t i = threadIdx.x; i < v; i += THREADS) sum += expf(row[i] - top);
    sum = block_sum(sum);
    if (threadIdx.x == 0) {
        nll[blockIdx.x] = top + logf(sum) - row[target[blockIdx.x]];
        if (best) best[blockIdx.x] = ids[0];
    }
}

/* One thread a channel, rows in order. */
__global__ void absstat_kernel(float *top, double *sum, const __half *x, int64_t ld, int64_t m, int64_t k)
{
    const int64_t c = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (c >= k) return;
    float t = top[c];
    double s = sum[c];
    for (int64_t r = 0; r < m; r++) {
        const float a = fabsf(__half2float(x[r * ld + c]));
        t = fmaxf(t, a);
        s += a;
    }
    top[c] = t;
    sum[c] = s;
}

__global__ void bf16_to_f16_kernel(uint16_t *p, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (i < n) p[i] = __half_as_ushort(__float2half_rn(__bfloat162float(__ushort_as_bfloat16(p[i]))));
}

extern "C" {

err_code bf16_to_f16_cuda(device *d, tensor *t, err *e)
{
    const int64_t n = tensor_count(t);
    return cuda_launch(d, "bf16_to_f16", bf16_to_f16_kernel, dim3((unsigned)((n + THREADS - 1) / THREADS)),
                       dim3(THREADS), 0, e, (uint16_t *)t->data, n);
}

err_code embed_cuda(device *d, tensor *y, const tensor *table, const tensor *ids, err *e)
{
    return cuda_launch(d, "embed", embed_kernel, dim3((unsigned)y->shape[0]), dim3(THREADS), 0, e, y->data, y->dt,
                       y->stride[0], (const void *)table->data, table->dt, (const int32_t *)ids->data, y->shape[1]);
}

err_code rmsnorm_cuda(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e)
{
    return cuda_launch(d, "rmsnorm", rmsnorm_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0, e, y->data, y->dt,
                       y->stride[0], (const void *)x->data, x->dt, x->stride[0], (const void *)w->data, w->dt, eps,
                       x->shape[1]);
}

err_code add_cuda(device *d, tensor *y, const tensor *x, err *e)
{
    return cuda_launch(d, "add", add_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0, e, y->data, y->dt,
                       y->stride[0], (const void *)x->data, x->dt, x->stride[0], x->shape[1]);
}

err_code glu_cuda(device *d, tensor *y, const tensor *gate, const tensor *up, err *e)
{
    const dim3 grid((unsigned)((y->shape[1] + THREADS - 1) / THREADS), (unsigned)y->shape[0]);
    return cuda_launch(d, "glu", glu_kernel, grid, dim3(THREADS), 0, e, (__half *)y->data, y->stride[0],
                       (const __half *)gate->data, gate->stride[0], (const __half *)up->data, up->stride[0],
                       y->shape[1]);
}

err_code nll_cuda(device *d, tensor *nll, tensor *argmax, const tensor *logits, const tensor *target, err *e)
{
    return cuda_launch(d, "nll", nll_kernel, dim3((unsigned)logits->shape[0]), dim3(THREADS), 0, e,
                       (float *)nll->data, argmax ? (int32_t *)argmax->data : (int32_t *)NULL,
                       (const float *)logits->data, logits->stride[0], (const int32_t *)target->data,
                       logits->shape[1]);
}

err_code absstat_cuda(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e)
{
    return cuda_launch(d, "absstat", absstat_kernel, dim3((unsigned)((x->shape[1] + 31) / 32)), dim3(32), 0, e,
                       (float *)absmax->data, (double *)abssum->data, (const __half *)x->data, x->stride[0],
                       x->shape[0], x->shape[1]);
}

} /* extern "C" */
