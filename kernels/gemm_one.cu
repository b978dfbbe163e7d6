/* One row of activations times 16-bit weights: a warp a row of weights, 16 loads of 16 bytes in
 * flight a lane; those of a warp's first row start before the dependency wait, because weights
 * belong to no earlier kernel. */
#include "kernels/gemm_one.cuh"

#define WARPS 8
#define LOADS 16               /* of a lane */
#define BATCH (LOADS * 32 * 8) /* weights of a warp */

__device__ __forceinline__ void load_batch(uint4 v[LOADS], const __half *row, int from, int k,
                                           int lane)
{
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = from + i * 256 + lane * 8;
        v[i] = at < k ? load_once16(row + at) : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ float dot_batch(const uint4 v[LOADS], const __half *x, int from, int k,
                                           int lane)
{
    float sum[2] = {0.f, 0.f};
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int at = from + i * 256 + lane * 8;
        if (at >= k) break;
        const uint4 u = *(const uint4 *)(x + at);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float2 a = __half22float2(((const __half2 *)&v[i])[j]),
                         b = __half22float2(((const __half2 *)&u)[j]);
            sum[0] = fmaf(a.x, b.x, sum[0]);
            sum[1] = fmaf(a.y, b.y, sum[1]);
        }
    }
    return sum[0] + sum[1];
}

__global__ void __launch_bounds__(WARPS * 32, 2) gemm_one_kernel(gemm_one_call c)
{
    extern __shared__ __align__(16) __half x[]; /* [k] */
    const int lane = threadIdx.x & 31, warps = (int)gridDim.x * WARPS;
    int row = (int)blockIdx.x * WARPS + ((int)threadIdx.x >> 5);
    uint4 v[LOADS];
    pdl_launch();
    if (row < c.n) load_batch(v, c.w + (size_t)row * c.k, 0, c.k, lane);
    pdl_wait();
    for (int i = (int)threadIdx.x * 8; i < c.k; i += WARPS * 32 * 8)
        *(uint4 *)(x + i) = *(const uint4 *)(c.x + i);
    __syncthreads();
    for (bool first = true; row < c.n; row += warps, first = false) {
        const __half *w = c.w + (size_t)row * c.k;
        float sum = 0.f;
        for (int from = 0; from < c.k; from += BATCH) {
            if (!first || from) load_batch(v, w, from, c.k, lane);
            sum += dot_batch(v, x, from, c.k, lane);
        }
        for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
        if (lane) continue;
        if (c.bias.data) sum += bias_at(c.bias, row);
        if (c.wide) {
            float *y = (float *)c.y + row;
            *y = c.add ? *y + sum : sum;
        } else {
            __half *y = (__half *)c.y + row;
            *y = __float2half_rn(c.add ? __half2float(*y) + sum : sum);
        }
    }
}

bool gemm_one_takes(const gemm_one_call *c)
{
    return c->k % 8 == 0 && c->k <= 24576 && (uintptr_t)c->w % 16 == 0 && (uintptr_t)c->x % 16 == 0;
}

cudaError_t gemm_one(const gemm_one_call *c, int sms, bool pdl, cudaStream_t stream)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const int blocks = (c->n + WARPS - 1) / WARPS;
    cfg.gridDim = dim3((unsigned)(blocks < 2 * sms ? blocks : 2 * sms));
    cfg.blockDim = dim3(WARPS * 32);
    cfg.dynamicSmemBytes = (size_t)c->k * sizeof(__half);
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, gemm_one_kernel, *c);
}
