/* One row of activations times 16-bit weights: a warp a row of weights after another, two chunks of
 * CHUNK in flight: while one is multiplied, the other one comes. Those of a warp's first rows start
 * before the dependency wait, because weights belong to no earlier kernel. */
#include "kernels/gemm_one.cuh"

#define WARPS 8
#define LOADS 8                /* of 16 bytes, of a lane */
#define CHUNK (LOADS * 32 * 8) /* weights */

/* A warp's next chunk: of row `row`, from input `from` on. */
typedef struct {
    int row, from;
} chunk_at;

__device__ __forceinline__ void next_chunk(chunk_at *c, int k, int warps)
{
    c->from += CHUNK;
    if (c->from >= k) c->from = 0, c->row += warps;
}

__device__ __forceinline__ void load_chunk(uint4 v[LOADS], const gemm_one_call &c, chunk_at at,
                                           int lane)
{
    const __half *row = c.w + (size_t)at.row * c.k;
    if (at.row >= c.n) return;
#pragma unroll
    for (int i = 0; i < LOADS; i++) {
        const int to = at.from + i * 256 + lane * 8;
        v[i] = to < c.k ? load_once16(row + to) : make_uint4(0, 0, 0, 0);
    }
}

__device__ __forceinline__ void dot_chunk(float sum[2], const uint4 v[LOADS], const __half *x,
                                          int from, int k, int lane)
{
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
}

__device__ __forceinline__ void store_row(const gemm_one_call &c, int row, float sum, int lane)
{
    for (int i = 16; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
    if (lane) return;
    if (c.bias.data) sum += bias_at(c.bias, row);
    if (c.wide) {
        float *y = (float *)c.y + row;
        *y = c.add ? *y + sum : sum;
    } else {
        __half *y = (__half *)c.y + row;
        *y = __float2half_rn(c.add ? __half2float(*y) + sum : sum);
    }
}

__global__ void __launch_bounds__(WARPS * 32, 2) gemm_one_kernel(gemm_one_call c)
{
    extern __shared__ __align__(16) __half x[]; /* [k] */
    const int lane = threadIdx.x & 31, warps = (int)gridDim.x * WARPS;
    chunk_at at = {(int)blockIdx.x * WARPS + ((int)threadIdx.x >> 5), 0}, ahead = at;
    uint4 v[2][LOADS];
    float sum[2] = {0.f, 0.f};
    pdl_launch();
#pragma unroll
    for (int i = 0; i < 2; i++) load_chunk(v[i], c, ahead, lane), next_chunk(&ahead, c.k, warps);
    pdl_wait();
    for (int i = (int)threadIdx.x * 8; i < c.k; i += WARPS * 32 * 8)
        *(uint4 *)(x + i) = *(const uint4 *)(c.x + i);
    __syncthreads();
    while (at.row < c.n) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int row = at.row;
            if (row >= c.n) break;
            dot_chunk(sum, v[i], x, at.from, c.k, lane);
            load_chunk(v[i], c, ahead, lane);
            next_chunk(&ahead, c.k, warps);
            next_chunk(&at, c.k, warps);
            if (at.row == row) continue;
            store_row(c, row, sum[0] + sum[1], lane);
            sum[0] = sum[1] = 0.f;
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
