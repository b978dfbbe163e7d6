/* Row-wise ops: embedding, RMSNorm, sums, GLU, channel statistics. */
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

__global__ void embed_kernel(void *y, dtype ydt, int64_t ldy, const void *table, dtype dt,
                             const int32_t *ids, int64_t h)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x, from = (int64_t)ids[row] * h;
    for (int64_t i = threadIdx.x; i < h; i += blockDim.x)
        store_f(y, row * ldy + i, ydt, load_f(table, from + i, dt));
}

/* 16-bit tables, four values a load: one that lies on the host is read over the bus, where few long
 * requests matter. */
__global__ void embed_rows_kernel(float *y, int64_t ldy, const uint2 *table, dtype dt,
                                  const int32_t *ids, int64_t h4)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x;
    const uint2 *from = table + (int64_t)ids[row] * h4;
    float4 *to = (float4 *)(y + row * ldy);
    for (int64_t i = threadIdx.x; i < h4; i += THREADS) {
        const uint2 v = from[i];
        to[i] = make_float4(load_f(&v, 0, dt), load_f(&v, 1, dt), load_f(&v, 2, dt),
                            load_f(&v, 3, dt));
    }
}

__global__ void rmsnorm_kernel(void *y, dtype ydt, int64_t ldy, const void *x, dtype xdt,
                               int64_t ldx, const void *w, dtype wdt, float eps, int64_t k)
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

/* The step's norm: f32 in, f16 out, k a multiple of 128 up to 32 * NORM_UNITS * 128. A warp keeps
 * whole units of 128 in registers, so x is read once and the planes of the product behind it cost
 * no kernel. */
#define NORM_UNITS 4
__device__ __forceinline__ void load4(float v[4], const void *p, int64_t i, dtype dt)
{
    if (dt == DT_F32) {
        const float4 f = *(const float4 *)((const float *)p + i);
        v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
        return;
    }
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = load_f(p, i + j, dt);
}

/* f16 values of four channels, in memory and back as what a reader of them gets. */
__device__ __forceinline__ void store4(__half *y, float v[4])
{
    __half2 h[2];
#pragma unroll
    for (int j = 0; j < 4; j++) v[j] = fminf(fmaxf(v[j], -65504.f), 65504.f);
    h[0] = __floats2half2_rn(v[0], v[1]), h[1] = __floats2half2_rn(v[2], v[3]);
    *(uint2 *)y = *(const uint2 *)h;
    const float2 a = __half22float2(h[0]), b = __half22float2(h[1]);
    v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
}

__global__ void __launch_bounds__(1024)
    norm_units_kernel(__half *y, int64_t ldy, const float *x, int64_t ldx, const void *w, dtype wdt,
                      float eps, int k, w4_planes_out o)
{
    __shared__ float part[32 * NORM_UNITS]; /* by unit: the sum does not depend on the warps */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5,
              units = k / 128, row = blockIdx.x;
    float v[NORM_UNITS][4], g[NORM_UNITS][4], sum = 0.f;
    pdl_launch();
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++) /* weights belong to no earlier kernel */
        if (warp + warps * i < units) load4(g[i], w, (warp + warps * i) * 128 + lane * 4, wdt);
    pdl_wait();
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++)
        if (warp + warps * i < units)
            load4(v[i], x + row * ldx, (warp + warps * i) * 128 + lane * 4, DT_F32);
    for (int i = threadIdx.x; i < 32 * NORM_UNITS; i += blockDim.x)
        if (i >= units) part[i] = 0.f;
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++) {
        const int unit = warp + warps * i;
        if (unit >= units) break;
        float s = v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3];
        for (int j = 16; j; j >>= 1) s += __shfl_xor_sync(~0u, s, j);
        if (lane == 0) part[unit] = s;
    }
    __syncthreads();
    for (int i = 0; i < NORM_UNITS; i++) sum += part[lane + 32 * i];
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
    const float inv = rsqrtf(sum / (float)k + eps);
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++) {
        const int unit = warp + warps * i;
        if (unit >= units) break;
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] *= inv * g[i][j];
        store4(y + row * ldy + unit * 128 + lane * 4, v[i]);
        if (o.planes) w4_store_planes(o, unit, row, v[i], lane);
    }
}

/* One warp 128 outputs of a row. */
__global__ void __launch_bounds__(128)
    glu_units_kernel(__half *y, int64_t ldy, const __half *gate, int64_t ldg, const __half *up,
                     int64_t ldu, int units, w4_planes_out o)
{
    const int lane = threadIdx.x & 31, unit = blockIdx.x * 4 + (threadIdx.x >> 5), row = blockIdx.y;
    pdl_launch();
    pdl_wait();
    if (unit >= units) return;
    const int at = unit * 128 + lane * 4;
    const uint2 graw = *(const uint2 *)(gate + row * ldg + at),
                uraw = *(const uint2 *)(up + row * ldu + at);
    const float2 g0 = __half22float2(*(const __half2 *)&graw.x),
                 g1 = __half22float2(*(const __half2 *)&graw.y);
    const float2 u0 = __half22float2(*(const __half2 *)&uraw.x),
                 u1 = __half22float2(*(const __half2 *)&uraw.y);
    float v[4] = {g0.x / (1.f + __expf(-g0.x)) * u0.x, g0.y / (1.f + __expf(-g0.y)) * u0.y,
                  g1.x / (1.f + __expf(-g1.x)) * u1.x, g1.y / (1.f + __expf(-g1.y)) * u1.y};
    store4(y + row * ldy + at, v);
    if (o.planes) w4_store_planes(o, unit, row, v, lane);
}

/* Many rows: 8 outputs a thread. */
__global__ void __launch_bounds__(256)
    glu_wide_kernel(__half *y, int64_t ldy, const __half *gate, int64_t ldg, const __half *up,
                    int64_t ldu, int n)
{
    const int i = (blockIdx.x * 256 + threadIdx.x) * 8;
    const int64_t row = blockIdx.y;
    pdl_launch();
    pdl_wait();
    if (i >= n) return;
    const uint4 graw = *(const uint4 *)(gate + row * ldg + i),
                uraw = *(const uint4 *)(up + row * ldu + i);
    uint4 out;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const float2 g = __half22float2(((const __half2 *)&graw)[j]),
                     u = __half22float2(((const __half2 *)&uraw)[j]);
        const float a = g.x / (1.f + __expf(-g.x)) * u.x, b = g.y / (1.f + __expf(-g.y)) * u.y;
        ((__half2 *)&out)[j] = __floats2half2_rn(fminf(fmaxf(a, -65504.f), 65504.f),
                                                 fminf(fmaxf(b, -65504.f), 65504.f));
    }
    *(uint4 *)(y + row * ldy + i) = out;
}

__global__ void add_kernel(void *y, dtype ydt, int64_t ldy, const void *x, dtype xdt, int64_t ldx,
                           int64_t k)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.x;
    for (int64_t i = threadIdx.x; i < k; i += blockDim.x)
        store_f(y, row * ldy + i, ydt,
                load_f(y, row * ldy + i, ydt) + load_f(x, row * ldx + i, xdt));
}

__global__ void glu_kernel(__half *y, int64_t ldy, const __half *gate, int64_t ldg,
                           const __half *up, int64_t ldu, int64_t n)
{
    pdl_launch();
    pdl_wait();
    const int64_t row = blockIdx.y, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float g = __half2float(gate[row * ldg + i]), u = __half2float(up[row * ldu + i]);
    store_f(y, row * ldy + i, DT_F16, g / (1.f + __expf(-g)) * u);
}

/* 32 channels a block; warp w takes rows w, w + 32, .., whose sums are added in order of the
 * warps. */
#define STAT_WARPS 32
__global__ void __launch_bounds__(32 * STAT_WARPS)
    absstat_kernel(float *top, double *sum, const __half *x, int64_t ld, int64_t m, int64_t k)
{
    __shared__ float tops[STAT_WARPS][32];
    __shared__ double sums[STAT_WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t c = (int64_t)blockIdx.x * 32 + lane;
    float t = 0.f;
    double s = 0;
    pdl_launch();
    pdl_wait();
#pragma unroll 4
    for (int64_t r = warp; r < m && c < k; r += STAT_WARPS) {
        const float a = fabsf(__half2float(x[r * ld + c]));
        t = fmaxf(t, a);
        s += a;
    }
    tops[warp][lane] = t;
    sums[warp][lane] = s;
    __syncthreads();
    if (warp || c >= k) return;
    t = top[c];
    s = sum[c];
    for (int i = 0; i < STAT_WARPS; i++) {
        t = fmaxf(t, tops[i][lane]);
        s += sums[i][lane];
    }
    top[c] = t;
    sum[c] = s;
}

__global__ void bf16_to_f16_kernel(uint16_t *p, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (i < n)
        p[i] = __half_as_ushort(__float2half_rn(__bfloat162float(__ushort_as_bfloat16(p[i]))));
}

extern "C" {

err_code rows_bf16_to_f16_cuda(device *d, tensor *t, err *e)
{
    const int64_t n = tensor_count(t);
    return cuda_launch(d, "bf16_to_f16", bf16_to_f16_kernel,
                       dim3((unsigned)((n + THREADS - 1) / THREADS)), dim3(THREADS), 0, e,
                       (uint16_t *)t->data, n);
}

static bool aligned4(const void *p, int64_t ld, size_t unit)
{
    return (uintptr_t)p % (4 * unit) == 0 && ld % 4 == 0;
}

err_code embed_cuda(device *d, tensor *y, const tensor *table, const tensor *ids, err *e)
{
    const int64_t h = y->shape[1];
    const unsigned rows = (unsigned)y->shape[0];
    const int32_t *id = (const int32_t *)ids->data;
    if (dtype_bytes(table->dt) == 2 && y->dt == DT_F32 && aligned4(table->data, h, 2) &&
        aligned4(y->data, y->stride[0], 4))
        return cuda_launch(d, "embed", embed_rows_kernel, dim3(rows), dim3(THREADS), 0, e,
                           (float *)y->data, y->stride[0], (const uint2 *)table->data, table->dt,
                           id, h / 4);
    return cuda_launch(d, "embed", embed_kernel, dim3(rows), dim3(THREADS), 0, e, y->data, y->dt,
                       y->stride[0], (const void *)table->data, table->dt, id, h);
}

err_code rmsnorm_cuda(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e)
{
    const int64_t k = x->shape[1];
    if (x->dt == DT_F32 && y->dt == DT_F16 && k % 128 == 0 && k <= 32 * NORM_UNITS * 128 &&
        aligned4(x->data, x->stride[0], 4) && aligned4(y->data, y->stride[0], 2)) {
        const w4_planes_out o = cuda_planes_want(d, x->shape[0], k);
        /* Few rows: a unit a warp; many: blocks as small as registers allow. */
        const int64_t m = x->shape[0];
        const int units = (int)(k / 128), spread = m > 64 ? NORM_UNITS : m > 16 ? 2 : 1;
        const int warps = (units + spread - 1) / spread;
        TRY(cuda_launch(d, "rmsnorm", norm_units_kernel, dim3((unsigned)x->shape[0]),
                        dim3(32 * (unsigned)(warps < 32 ? warps : 32)), 0, e, (__half *)y->data,
                        y->stride[0], (const float *)x->data, x->stride[0], (const void *)w->data,
                        w->dt, eps, (int)k, o));
        cuda_planes_made(d, y, &o);
        return OK;
    }
    return cuda_launch(d, "rmsnorm", rmsnorm_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0,
                       e, y->data, y->dt, y->stride[0], (const void *)x->data, x->dt, x->stride[0],
                       (const void *)w->data, w->dt, eps, x->shape[1]);
}

err_code add_cuda(device *d, tensor *y, const tensor *x, err *e)
{
    return cuda_launch(d, "add", add_kernel, dim3((unsigned)x->shape[0]), dim3(THREADS), 0, e,
                       y->data, y->dt, y->stride[0], (const void *)x->data, x->dt, x->stride[0],
                       x->shape[1]);
}

static bool aligned8(const tensor *t)
{
    return (uintptr_t)t->data % 16 == 0 && t->stride[0] % 8 == 0;
}

err_code glu_cuda(device *d, tensor *y, const tensor *gate, const tensor *up, err *e)
{
    if (y->shape[0] > W4_FEW_MAX && y->shape[1] % 8 == 0 && aligned8(y) && aligned8(gate) &&
        aligned8(up))
        return cuda_launch(d, "glu", glu_wide_kernel,
                           dim3((unsigned)((y->shape[1] + 2047) / 2048), (unsigned)y->shape[0]),
                           dim3(256), 0, e, (__half *)y->data, y->stride[0],
                           (const __half *)gate->data, gate->stride[0], (const __half *)up->data,
                           up->stride[0], (int)y->shape[1]);
    if (y->shape[1] % 128 == 0 && aligned4(y->data, y->stride[0], 2) &&
        aligned4(gate->data, gate->stride[0], 2) && aligned4(up->data, up->stride[0], 2)) {
        const int units = (int)(y->shape[1] / 128);
        const w4_planes_out o = cuda_planes_want(d, y->shape[0], y->shape[1]);
        TRY(cuda_launch(d, "glu", glu_units_kernel,
                        dim3((unsigned)(units + 3) / 4, (unsigned)y->shape[0]), dim3(128), 0, e,
                        (__half *)y->data, y->stride[0], (const __half *)gate->data,
                        gate->stride[0], (const __half *)up->data, up->stride[0], units, o));
        cuda_planes_made(d, y, &o);
        return OK;
    }
    const dim3 grid((unsigned)((y->shape[1] + THREADS - 1) / THREADS), (unsigned)y->shape[0]);
    return cuda_launch(d, "glu", glu_kernel, grid, dim3(THREADS), 0, e, (__half *)y->data,
                       y->stride[0], (const __half *)gate->data, gate->stride[0],
                       (const __half *)up->data, up->stride[0], y->shape[1]);
}

err_code absstat_cuda(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e)
{
    return cuda_launch(d, "absstat", absstat_kernel, dim3((unsigned)((x->shape[1] + 31) / 32)),
                       dim3(32 * STAT_WARPS), 0, e, (float *)absmax->data, (double *)abssum->data,
                       (const __half *)x->data, x->stride[0], x->shape[0], x->shape[1]);
}

} /* extern "C" */
