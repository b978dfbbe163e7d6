/* Dense products whose sums do not depend on how many rows there are: for devices opened as
 * deterministic, where cuBLAS, which picks another kernel for another number of rows, is out.
 *
 * Inputs go in chunks of 64. Warp w of eight takes chunks w, w + 8 .. in rising order, each as four
 * mma steps into one f32 sum; the warps' sums are added in their order, then bias, then what y
 * held. Nothing else decides about the bits of an output: neither the tokens beside it nor its
 * place among them. Within a half chunk of 32 inputs lane t of a group holds inputs 8t..8t+7 of
 * weight and activation alike, so that both come in 16-byte loads. */
#include "kernels/device_cuda.cuh"
#include "kernels/gemm_one.cuh"

#define WARPS 8
#define CHUNK 64 /* inputs of a warp's turn */
#define TILES 2  /* tiles of 16 outputs of a block */

typedef struct {
    const __half *x, *w;
    dense_bias bias;
    void *y;
    int64_t ldx, ldy;
    int m, n, k;
    bool add, wide;
} fixed_call;

template <int NT> struct half_chunk {
    uint4 w[TILES][2], x[NT];
};

template <int NT>
__device__ __forceinline__ void load_half(half_chunk<NT> *f, const fixed_call &c, int row0,
                                          int tok0, int at, int lane)
{
    const int g = lane >> 2, k = at + 8 * (lane & 3);
    const uint4 none = make_uint4(0, 0, 0, 0);
#pragma unroll
    for (int i = 0; i < TILES * 2; i++) {
        const int row = min(row0 + 8 * i + g, c.n - 1);
        f->w[i / 2][i % 2] = k < c.k ? load_once16(c.w + (size_t)row * c.k + k) : none;
    }
#pragma unroll
    for (int b = 0; b < NT; b++) {
        const int tok = min(tok0 + 8 * b + g, c.m - 1);
        f->x[b] = k < c.k ? *(const uint4 *)(c.x + (size_t)tok * c.ldx + k) : none;
    }
}

template <int NT>
__device__ __forceinline__ void mul_half(float (*acc)[NT][4], const half_chunk<NT> &f)
{
#pragma unroll
    for (int r = 0; r < TILES; r++) {
        const uint32_t a[2][4] = {{f.w[r][0].x, f.w[r][1].x, f.w[r][0].y, f.w[r][1].y},
                                  {f.w[r][0].z, f.w[r][1].z, f.w[r][0].w, f.w[r][1].w}};
#pragma unroll
        for (int b = 0; b < NT; b++) {
            mma_16816(acc[r][b], a[0], f.x[b].x, f.x[b].y);
            mma_16816(acc[r][b], a[1], f.x[b].z, f.x[b].w);
        }
    }
}

__device__ __forceinline__ void store_fixed(const fixed_call &c, int row, int tok, float v)
{
    if (row >= c.n || tok >= c.m) return;
    const size_t at = (size_t)tok * c.ldy + row;
    if (c.bias.data) v += bias_at(c.bias, row);
    if (c.wide) {
        ((float *)c.y)[at] = c.add ? ((float *)c.y)[at] + v : v;
    } else {
        if (c.add) v += __half2float(((__half *)c.y)[at]);
        ((__half *)c.y)[at] = __float2half_rn(v);
    }
}

/* NT tiles of 8 tokens; DEPTH half chunks on their way. */
template <int NT, int DEPTH>
__global__ void __launch_bounds__(WARPS * 32) gemm_fixed_kernel(fixed_call c)
{
    constexpr int COLS = NT * 8;
    __shared__ float sums[WARPS][16][COLS + 1];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int row0 = blockIdx.x * TILES * 16, tok0 = blockIdx.y * COLS;
    const auto at = [&](int j) { return (warp + WARPS * (j >> 1)) * CHUNK + (j & 1) * 32; };
    half_chunk<NT> f[DEPTH];
    float acc[TILES][NT][4] = {};
    pdl_launch();
    pdl_wait();
#pragma unroll
    for (int i = 0; i < DEPTH; i++)
        if (at(i) < c.k) load_half<NT>(&f[i], c, row0, tok0, at(i), lane);
    for (int j = 0; at(j) < c.k; j += DEPTH) {
#pragma unroll
        for (int i = 0; i < DEPTH; i++) {
            if (at(j + i) >= c.k) break;
            mul_half<NT>(acc, f[i]);
            if (at(j + i + DEPTH) < c.k)
                load_half<NT>(&f[i], c, row0, tok0, at(j + i + DEPTH), lane);
        }
    }
#pragma unroll
    for (int r = 0; r < TILES; r++) {
        __syncthreads();
#pragma unroll
        for (int b = 0; b < NT; b++)
#pragma unroll
            for (int i = 0; i < 4; i++)
                sums[warp][(lane >> 2) + 8 * (i >> 1)][b * 8 + 2 * (lane & 3) + (i & 1)] =
                    acc[r][b][i];
        __syncthreads();
        for (int i = threadIdx.x; i < 16 * COLS; i += WARPS * 32) {
            float v = 0.f;
#pragma unroll
            for (int s = 0; s < WARPS; s++) v += sums[s][i % 16][i / 16];
            store_fixed(c, row0 + r * 16 + i % 16, tok0 + i / 16, v);
        }
    }
}

/* Any size and alignment: one thread an output, inputs in order. */
__global__ void gemm_plain_kernel(fixed_call c)
{
    const int row = (int)(blockIdx.x * blockDim.x + threadIdx.x), tok = (int)blockIdx.y;
    float v = 0.f;
    pdl_launch();
    pdl_wait();
    if (row >= c.n) return;
    for (int k = 0; k < c.k; k++)
        v = fmaf(__half2float(c.w[(size_t)row * c.k + k]),
                 __half2float(c.x[(size_t)tok * c.ldx + k]), v);
    store_fixed(c, row, tok, v);
}

template <int NT, int DEPTH> static err_code run(device *d, const fixed_call &c, err *e)
{
    const dim3 grid((unsigned)((c.n + TILES * 16 - 1) / (TILES * 16)),
                    (unsigned)((c.m + NT * 8 - 1) / (NT * 8)));
    return cuda_launch(d, "gemm: fixed", gemm_fixed_kernel<NT, DEPTH>, grid, dim3(WARPS * 32), 0, e,
                       c);
}

err_code gemm_fixed_cuda(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                         bool add, err *e)
{
    fixed_call c = {};
    c.x = (const __half *)x->data, c.w = (const __half *)w->data, c.y = y->data;
    c.bias.data = bias ? bias->data : NULL, c.bias.wide = bias && bias->dt == DT_F32;
    c.ldx = x->stride[0], c.ldy = y->stride[0];
    c.m = (int)x->shape[0], c.n = (int)w->shape[0], c.k = (int)w->shape[1];
    c.add = add, c.wide = y->dt == DT_F32;
    /* the choice is the weight's and the buffer's, never the number of rows */
    if (c.k % 8 || c.ldx % 8 || ((uintptr_t)c.x | (uintptr_t)c.w) % 16)
        return cuda_launch(d, "gemm: plain", gemm_plain_kernel,
                           dim3((unsigned)((c.n + 127) / 128), (unsigned)c.m), dim3(128), 0, e, c);
    if (c.m <= 8) return run<1, 4>(d, c, e);
    if (c.m <= 16) return run<2, 4>(d, c, e);
    if (c.m <= 32) return run<4, 2>(d, c, e);
    return run<8, 2>(d, c, e);
}
