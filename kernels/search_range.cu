/* The search for ranges: a block has one group of inputs and its square of H in shared memory, a
 * warp one row at a time with four candidates side by side, which share the reads of H. */
#include "kernels/search_cuda.cuh"

#define WARPS 8
#define ROWS  8 /* of a warp */
#define SIDE  4 /* candidates at once */

typedef struct {
    const float *w;
    int64_t ldw, n;
    const float *col, *h;
    int64_t ldh; /* between rows of H */
    int whole;   /* h [k,k], else squares of ldh behind one another */
    __half *scale;
    int64_t lds;
    uint8_t *zero;
    int64_t ldz;
    int points, ends;
    double shrink;
} range_call;

template <int V> struct range_row {
    float w[V], c[V], lo, hi, most;
    float least, kept_lo, kept_hi;
    __half scale;
    float zero;
};

/* Error of one candidate and what it was made of. */
template <int V>
__device__ __forceinline__ void candidate(const range_row<V> &r, float lo, float hi, __half *scale,
                                          float *zero, float x[V])
{
    *scale = range_scale(lo, hi);
    const float s = __half2float(*scale);
    *zero = range_zero(lo, s);
#pragma unroll
    for (int j = 0; j < V; j++)
        x[j] = __fdiv_rn(__fsub_rn(__fmul_rn(step_of(r.w[j], s, *zero), s), r.w[j]), r.c[j]);
}

/* x H x^T of SIDE candidates. */
template <int V>
__device__ __forceinline__ void forms(const float *h, const float x[SIDE][V], float sum[SIDE])
{
    const int lane = threadIdx.x & 31;
    float y[SIDE][V] = {};
#pragma unroll
    for (int b = 0; b < V; b++)
#pragma unroll 8
        for (int i = 0; i < 32; i++) {
            float row[V];
#pragma unroll
            for (int j = 0; j < V; j++) row[j] = h[(b * 32 + i) * 32 * V + lane + 32 * j];
#pragma unroll
            for (int c = 0; c < SIDE; c++) {
                const float v = __shfl_sync(~0u, x[c][b], i);
#pragma unroll
                for (int j = 0; j < V; j++) y[c][j] = fmaf(v, row[j], y[c][j]);
            }
        }
#pragma unroll
    for (int c = 0; c < SIDE; c++) {
        float s = 0.f;
#pragma unroll
        for (int j = 0; j < V; j++) s = fmaf(x[c][j], y[c][j], s);
        sum[c] = warp_sum(s);
    }
}

/* SIDE points from `first`; pass 0: both ends, 1: the lower one, 2: the upper one. */
template <int V>
__device__ __forceinline__ void try_points(const range_call &q, const float *h, range_row<V> &r,
                                           int pass, int first)
{
    float x[SIDE][V], sum[SIDE], lo[SIDE], hi[SIDE], zero[SIDE];
    __half scale[SIDE];
#pragma unroll
    for (int c = 0; c < SIDE; c++) {
        const int i = first + c < q.points ? first + c : q.points - 1;
        const float part = (float)(1. - q.shrink * i / q.points);
        lo[c] = pass == 2 ? r.kept_lo : part;
        hi[c] = pass == 1 ? r.kept_hi : part;
        const float limit = __fmul_rn(r.most, part);
        candidate(r, q.ends ? __fmul_rn(r.lo, lo[c]) : fmaxf(r.lo, -limit),
                  q.ends ? __fmul_rn(r.hi, hi[c]) : fminf(r.hi, limit), &scale[c], &zero[c], x[c]);
    }
    forms<V>(h, x, sum);
#pragma unroll
    for (int c = 0; c < SIDE; c++) {
        const bool start = pass == 0 && first + c == 0;
        if (first + c >= q.points || !(start || sum[c] < r.least)) continue;
        r.least = sum[c];
        r.scale = scale[c];
        r.zero = zero[c];
        r.kept_lo = lo[c];
        r.kept_hi = hi[c];
    }
}

template <int V> __global__ void __launch_bounds__(32 * WARPS) range_kernel(range_call q)
{
    extern __shared__ float h[]; /* [32 V, 32 V] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = 32 * V;
    const int64_t at = (int64_t)blockIdx.x * g;
    const float *from = q.whole ? q.h + at * (q.ldh + 1)
                                : q.h + at / q.ldh * q.ldh * q.ldh + at % q.ldh * (q.ldh + 1);
    pdl_launch();
    pdl_wait();
    for (int i = threadIdx.x; i < g * g; i += 32 * WARPS) h[i] = from[i / g * q.ldh + i % g];
    __syncthreads();
    for (int i = 0; i < ROWS; i++) {
        const int64_t row = ((int64_t)blockIdx.y * WARPS + warp) * ROWS + i;
        range_row<V> r;
        if (row >= q.n) return;
        r.lo = r.hi = 0.f;
#pragma unroll
        for (int j = 0; j < V; j++) {
            r.w[j] = q.w[row * q.ldw + at + lane + 32 * j];
            r.c[j] = q.col ? q.col[at + lane + 32 * j] : 1.f;
            r.lo = fminf(r.lo, r.w[j]);
            r.hi = fmaxf(r.hi, r.w[j]);
        }
        r.lo = -warp_max(-r.lo);
        r.hi = warp_max(r.hi);
        r.most = fmaxf(r.hi, -r.lo);
        if (!(r.most > 0.f)) r.most = 1.f;
        for (int pass = 0; pass < (q.ends ? 3 : 1); pass++)
            for (int p = 0; p < q.points; p += SIDE) try_points<V>(q, h, r, pass, p);
        if (lane) continue;
        q.scale[row * q.lds + blockIdx.x] = r.scale;
        q.zero[row * q.ldz + blockIdx.x] = (uint8_t)r.zero;
    }
}

template <int V> static err_code launch(device *d, const range_call &q, int64_t k, err *e)
{
    const int smem = (int)sizeof(float) * 32 * V * 32 * V;
    const int64_t rows = WARPS * ROWS;
    CUDA_TRY(
        cudaFuncSetAttribute(range_kernel<V>, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
        e);
    return cuda_launch(d, "range", range_kernel<V>,
                       dim3((unsigned)(k / (32 * V)), (unsigned)((q.n + rows - 1) / rows)),
                       dim3(32 * WARPS), (size_t)smem, e, q);
}

extern "C" err_code search_range_cuda(device *d, tensor *scale, tensor *zero, const tensor *w,
                                      const range_spec *r, err *e)
{
    const range_call q = {(const float *)w->data,
                          w->stride[0],
                          w->shape[0],
                          r->col ? (const float *)r->col->data : NULL,
                          (const float *)r->h->data,
                          r->h->shape[r->h->ndim - 1],
                          r->h->ndim == 2,
                          (__half *)scale->data,
                          scale->stride[0],
                          (uint8_t *)zero->data,
                          zero->stride[0],
                          r->points,
                          r->ends,
                          r->shrink};
    if (r->g == 128) return launch<4>(d, q, w->shape[1], e);
    return r->g == 64 ? launch<2>(d, q, w->shape[1], e) : launch<1>(d, q, w->shape[1], e);
}
