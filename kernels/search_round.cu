/* Rounding in an order of the inputs: blocks of 128 columns by our kernels, a warp a row, and the
 * columns behind or around a block by cuBLAS in f32. */
#include "kernels/search_cuda.cuh"

#define WIDTH 128
#define V     (WIDTH / 32)
#define WARPS 8

/* ---- a block of columns ---- */

typedef struct {
    uint8_t *codes; /* [n,k] */
    __half *scale;  /* [n,k/g] */
    const uint8_t *zero;
    const int32_t *order; /* [k] input of each column; NULL: the columns are the inputs */
    const float *square;  /* u or h, [k,k] */
    const float *col;     /* [k] or NULL: 1 */
    float *x;             /* [n,k] weights, or ((w' - w) / col) H */
    float *moves;         /* [n,WIDTH] */
    int64_t n, k;
    int at, width, g, refit;
} block_call;

typedef struct {
    float x[V], scale[V], zero[V], code[V], move[V];
    int64_t input[V]; /* -1: beyond the block */
} block_row;

/* The row of this warp; -1: it has none. */
__device__ __forceinline__ int64_t load_row(const block_call &q, block_row *r)
{
    const int64_t row = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5), groups = q.k / q.g;
    if (row >= q.n) return -1;
#pragma unroll
    for (int b = 0; b < V; b++) {
        const int c = (threadIdx.x & 31) + 32 * b;
        const bool in = c < q.width;
        r->input[b] = !in ? -1 : q.order ? q.order[q.at + c] : q.at + c;
        const int64_t p = in ? row * groups + r->input[b] / q.g : 0;
        r->x[b] = in ? q.x[row * q.k + q.at + c] : 0.f;
        r->scale[b] = in ? __half2float(q.scale[p]) : 1.f;
        r->zero[b] = in ? (float)q.zero[p] : 0.f;
        r->code[b] = in ? (float)q.codes[row * q.k + r->input[b]] : 0.f;
        r->move[b] = 0.f;
    }
    return row;
}

__device__ __forceinline__ void store_row(const block_call &q, int64_t row, const block_row *r)
{
#pragma unroll
    for (int b = 0; b < V; b++) {
        if (r->input[b] >= 0) q.codes[row * q.k + r->input[b]] = (uint8_t)r->code[b];
        q.moves[row * WIDTH + (threadIdx.x & 31) + 32 * b] = r->move[b];
    }
}

/* u with nothing on its diagonal and below: what a column spreads over those behind it. */
__global__ void __launch_bounds__(32 * WARPS) feedback_kernel(block_call q)
{
    extern __shared__ float u[]; /* [WIDTH,WIDTH], then the diagonal */
    float *pivot = u + WIDTH * WIDTH;
    const int lane = threadIdx.x & 31;
    pdl_launch();
    pdl_wait();
    for (int t = threadIdx.x; t < WIDTH * WIDTH; t += 32 * WARPS) {
        const int i = t / WIDTH, j = t % WIDTH;
        const bool in = i < q.width && j < q.width;
        const float v = in ? q.square[(int64_t)(q.at + i) * q.k + q.at + j] : 0.f;
        u[t] = j > i ? v : 0.f;
        if (i == j) pivot[i] = in ? v : 1.f;
    }
    __syncthreads();
    block_row r;
    const int64_t row = load_row(q, &r);
    if (row < 0) return;
#pragma unroll
    for (int b = 0; b < V; b++) {
        const float p = pivot[lane + 32 * b];
        for (int c = 0; c < 32 && b * 32 + c < q.width; c++) {
            const float step = step_of(r.x[b], r.scale[b], r.zero[b]),
                        miss = __fdiv_rn(r.x[b] - step * r.scale[b], p),
                        m = __shfl_sync(~0u, miss, c);
            if (lane == c) {
                r.code[b] = step + r.zero[b];
                r.move[b] = m;
            }
#pragma unroll
            for (int j = b; j < V; j++) r.x[j] -= m * u[(b * 32 + c) * WIDTH + lane + 32 * j];
        }
    }
    store_row(q, row, &r);
}

/* ---- coordinate descent ---- */

__device__ __forceinline__ void move_codes(const block_call &q, const float *h, block_row *r)
{
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int b = 0; b < V; b++) {
        const float bend = h[(lane + 32 * b) * (WIDTH + 1)];
        for (int c = 0; c < 32 && b * 32 + c < q.width; c++) {
            float to = r->code[b];
            if (bend > 0.f)
                to = fminf(fmaxf(to + rintf(__fdiv_rn(-r->x[b], bend * r->scale[b])), 0.f), 15.f);
            const float m = __shfl_sync(~0u, (to - r->code[b]) * r->scale[b], c);
            if (m == 0.f) continue;
            if (lane == c) {
                r->code[b] = to;
                r->move[b] = m;
            }
#pragma unroll
            for (int j = 0; j < V; j++) r->x[j] += m * h[(b * 32 + c) * WIDTH + lane + 32 * j];
        }
    }
}

__device__ __forceinline__ double warp_sum_f64(double v)
{
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

/* The scale of the inputs 32 FROM .. of the block goes to where the loss, all else fixed, is
 * least: along u, the steps of their codes. */
template <int U, int FROM>
__device__ __forceinline__ void refit_group(const block_call &q, int64_t row, const float *h,
                                            block_row *r)
{
    const int lane = threadIdx.x & 31;
    float u[U], y[V] = {};
    double slope = 0, bend = 0;
    if (32 * FROM >= q.width) return;
#pragma unroll
    for (int b = 0; b < U; b++) {
        u[b] = r->code[FROM + b] - r->zero[FROM + b];
        slope += (double)u[b] * r->x[FROM + b];
    }
#pragma unroll
    for (int b = 0; b < U; b++)
#pragma unroll 8
        for (int c = 0; c < 32; c++) {
            const float v = __shfl_sync(~0u, u[b], c);
#pragma unroll
            for (int j = 0; j < V; j++)
                y[j] = fmaf(v, h[((FROM + b) * 32 + c) * WIDTH + lane + 32 * j], y[j]);
        }
#pragma unroll
    for (int b = 0; b < U; b++) bend += (double)u[b] * y[FROM + b];
    slope = warp_sum_f64(slope);
    bend = warp_sum_f64(bend);
    if (!(bend > 0)) return;
    const float now = r->scale[FROM];
    const __half half = __float2half_rn(now - (float)(slope / bend));
    const float next = __half2float(half), move = next - now;
    if (!(next > 0.f && next <= 65504.f) || 2 * move * slope + (double)move * move * bend >= 0)
        return;
    if (lane == 0) q.scale[row * (q.k / q.g) + r->input[FROM] / q.g] = half;
#pragma unroll
    for (int j = 0; j < V; j++) r->x[j] += move * y[j];
#pragma unroll
    for (int b = 0; b < U; b++) r->move[FROM + b] += move * u[b];
}

__device__ __forceinline__ void refit_block(const block_call &q, int64_t row, const float *h,
                                            block_row *r)
{
    if (q.g == 128) {
        refit_group<4, 0>(q, row, h, r);
    } else if (q.g == 64) {
        refit_group<2, 0>(q, row, h, r);
        refit_group<2, 2>(q, row, h, r);
    } else {
        refit_group<1, 0>(q, row, h, r);
        refit_group<1, 1>(q, row, h, r);
        refit_group<1, 2>(q, row, h, r);
        refit_group<1, 3>(q, row, h, r);
    }
}

/* In terms of the scaled inputs: H / (col col^T). */
__global__ void __launch_bounds__(32 * WARPS) sweep_kernel(block_call q)
{
    extern __shared__ float h[]; /* [WIDTH,WIDTH] */
    const int lane = threadIdx.x & 31;
    float col[V];
    pdl_launch();
    pdl_wait();
    for (int t = threadIdx.x; t < WIDTH * WIDTH; t += 32 * WARPS) {
        const int i = t / WIDTH, j = t % WIDTH;
        const bool in = i < q.width && j < q.width;
        float v = in ? q.square[(int64_t)(q.at + i) * q.k + q.at + j] : 0.f;
        if (in && q.col) v = __fdiv_rn(v, __fmul_rn(q.col[q.at + i], q.col[q.at + j]));
        h[t] = v;
    }
#pragma unroll
    for (int b = 0; b < V; b++)
        col[b] = q.col && lane + 32 * b < q.width ? q.col[q.at + lane + 32 * b] : 1.f;
    __syncthreads();
    block_row r;
    const int64_t row = load_row(q, &r);
    if (row < 0) return;
#pragma unroll
    for (int b = 0; b < V; b++) r.x[b] = __fdiv_rn(r.x[b], col[b]);
    move_codes(q, h, &r);
    if (q.refit) refit_block(q, row, h, &r);
#pragma unroll
    for (int b = 0; b < V; b++) r.move[b] = __fdiv_rn(r.move[b], col[b]);
    store_row(q, row, &r);
}

/* ---- columns ---- */

__global__ void by_place_kernel(float *y, int64_t ldy, const float *w, int64_t ldw,
                                const int32_t *order, int64_t k)
{
    const int64_t r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < k;
         j += (int64_t)gridDim.x * blockDim.x)
        y[r * ldy + j] = w[r * ldw + order[j]];
}

typedef struct {
    const uint8_t *codes;
    const __half *scale;
    const uint8_t *zero;
    const float *w, *col;
    int64_t ldw, k;
    int g;
} codes_call;

__global__ void code_errors_kernel(float *y, int64_t ldy, codes_call q)
{
    const int64_t r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < q.k;
         j += (int64_t)gridDim.x * blockDim.x) {
        const int64_t p = r * (q.k / q.g) + j / q.g;
        const float is = __fmul_rn((float)q.codes[r * q.k + j] - (float)q.zero[p],
                                   __half2float(q.scale[p])),
                    miss = __fsub_rn(is, q.w[r * q.ldw + j]);
        y[r * ldy + j] = q.col ? __fdiv_rn(miss, q.col[j]) : miss;
    }
}

__global__ void pack_codes_kernel(uint8_t *out, codes_call q)
{
    const int64_t r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t t = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; t < q.k / 2;
         t += (int64_t)gridDim.x * blockDim.x) {
        int both = 0;
        for (int i = 0; i < 2; i++) {
            const int64_t input = 2 * t + i, p = r * (q.k / q.g) + input / q.g;
            int code;
            if (q.w) {
                const float zero = q.zero[p];
                code = (int)(step_of(q.w[r * q.ldw + input], __half2float(q.scale[p]), zero) +
                             zero);
            } else {
                code = q.codes[r * q.k + input];
            }
            both |= code << 4 * i;
        }
        out[r * (q.k / 2) + t] = (uint8_t)both;
    }
}

/* ---- launches ---- */

static dim3 by_rows(int64_t m, int64_t k)
{
    const int64_t x = (k + 255) / 256;
    return dim3((unsigned)(x < 8 ? x : 8), (unsigned)m);
}

static err_code check_rows_fit(const char *op, int64_t m, err *e)
{
    if (m <= 65535) return OK;
    return err_set(e, E_LIMIT, "%s: expected at most 65535 rows, got %lld", op, (long long)m);
}

/* x [n, cols] of k += alpha moves [n, width] times rows [width, cols] of k. */
static err_code spread(device *d, float *x, const float *moves, const float *rows, int64_t n,
                       int64_t k, int64_t cols, int width, float alpha, err *e)
{
    const float one = 1.f;
    return cuda_blas(d, "spread",
                     cublasSgemm(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_N, (int)cols, (int)n,
                                 width, &alpha, rows, (int)k, moves, WIDTH, &one, x, (int)k),
                     e);
}

static block_call block_of(round_state *s, tensor *x, const tensor *square)
{
    const block_call q = {(uint8_t *)s->codes.data,
                          (__half *)s->scale.data,
                          (const uint8_t *)s->zero.data,
                          NULL,
                          (const float *)square->data,
                          NULL,
                          (float *)x->data,
                          (float *)s->work.data,
                          x->shape[0],
                          x->shape[1],
                          0,
                          0,
                          s->g,
                          0};
    return q;
}

static err_code run_block(device *d, const char *op, void (*kernel)(block_call), block_call *q,
                          int64_t at, err *e)
{
    const int smem = (int)sizeof(float) * (WIDTH * WIDTH + WIDTH);
    const int64_t left = q->k - at;
    q->at = (int)at;
    q->width = (int)(left < WIDTH ? left : WIDTH);
    CUDA_TRY(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem), e);
    return cuda_launch(d, op, kernel, dim3((unsigned)((q->n + WARPS - 1) / WARPS)),
                       dim3(32 * WARPS), (size_t)smem, e, *q);
}

static codes_call codes_of(const round_state *s, const tensor *w, const tensor *col)
{
    const codes_call q = {(const uint8_t *)s->codes.data,
                          (const __half *)s->scale.data,
                          (const uint8_t *)s->zero.data,
                          w ? (const float *)w->data : NULL,
                          col ? (const float *)col->data : NULL,
                          w ? w->stride[0] : 0,
                          s->codes.shape[1],
                          s->g};
    return q;
}

extern "C" {

err_code search_by_place_cuda(device *d, tensor *y, const tensor *w, const tensor *order, err *e)
{
    TRY(check_rows_fit("by_place", y->shape[0], e));
    return cuda_launch(d, "by_place", by_place_kernel, by_rows(y->shape[0], y->shape[1]), dim3(256),
                       0, e, (float *)y->data, y->stride[0], (const float *)w->data, w->stride[0],
                       (const int32_t *)order->data, y->shape[1]);
}

err_code search_feedback_cuda(device *d, round_state *s, tensor *w, const tensor *u,
                              const tensor *order, err *e)
{
    const int64_t k = w->shape[1];
    block_call q = block_of(s, w, u);
    q.order = (const int32_t *)order->data;
    for (int64_t at = 0; at < k; at += WIDTH) {
        TRY(run_block(d, "feedback", feedback_kernel, &q, at, e));
        const int64_t next = at + q.width;
        if (next < k)
            TRY(spread(d, q.x + next, q.moves, q.square + at * k + next, q.n, k, k - next, q.width,
                       -1.f, e));
    }
    return OK;
}

err_code search_code_errors_cuda(device *d, tensor *y, const round_state *s, const tensor *w,
                                 const tensor *col, err *e)
{
    TRY(check_rows_fit("code_errors", y->shape[0], e));
    return cuda_launch(d, "code_errors", code_errors_kernel, by_rows(y->shape[0], y->shape[1]),
                       dim3(256), 0, e, (float *)y->data, y->stride[0], codes_of(s, w, col));
}

err_code search_sweep_cuda(device *d, round_state *s, tensor *x, const tensor *h, const tensor *col,
                           bool refit, err *e)
{
    const int64_t k = x->shape[1];
    block_call q = block_of(s, x, h);
    q.col = col ? (const float *)col->data : NULL;
    q.refit = refit;
    for (int64_t at = 0; at < k; at += WIDTH) {
        TRY(run_block(d, "sweep", sweep_kernel, &q, at, e));
        TRY(spread(d, q.x, q.moves, q.square + at * k, q.n, k, k, q.width, 1.f, e));
    }
    return OK;
}

err_code search_pack_codes_cuda(device *d, tensor *out, const round_state *s, const tensor *w,
                                err *e)
{
    TRY(check_rows_fit("pack_codes", out->shape[0], e));
    return cuda_launch(d, "pack_codes", pack_codes_kernel, by_rows(out->shape[0], out->shape[1]),
                       dim3(256), 0, e, (uint8_t *)out->data, codes_of(s, w, NULL));
}

} /* extern "C" */
