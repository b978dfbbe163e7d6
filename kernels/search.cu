/* The search's ops on CUDA: rows, second moments, weights. */
#include "kernels/search_cuda.cuh"

#define THREADS 256

/* ---- rows ---- */

__global__ void mix_kernel(void *y, dtype ydt, int64_t ldy, float alpha, const void *a, dtype adt,
                           int64_t lda, float beta, const void *b, dtype bdt, int64_t ldb,
                           int64_t k)
{
    const int64_t row = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < k;
         i += (int64_t)gridDim.x * THREADS) {
        float v = __fmul_rn(alpha, load_any(a, row * lda + i, adt));
        if (b) v = __fadd_rn(v, __fmul_rn(beta, load_any(b, row * ldb + i, bdt)));
        store_any(y, row * ldy + i, ydt, v);
    }
}

/* One block a row, fixed order. */
__global__ void row_dots_kernel(double *out, const void *a, dtype adt, int64_t lda, const void *b,
                                dtype bdt, int64_t ldb, int64_t k)
{
    __shared__ double part[THREADS];
    const int64_t row = blockIdx.x;
    double s = 0;
    pdl_launch();
    pdl_wait();
    for (int64_t j = threadIdx.x; j < k; j += THREADS)
        s += (double)load_any(a, row * lda + j, adt) * (double)load_any(b, row * ldb + j, bdt);
    part[threadIdx.x] = s;
    __syncthreads();
    for (int i = THREADS / 2; i; i >>= 1) {
        if ((int)threadIdx.x < i) part[threadIdx.x] += part[threadIdx.x + i];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[row] = part[0];
}

__global__ void diagonal_kernel(float *out, const float *h, int64_t ld, int64_t k)
{
    const int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (i < k) out[i] = h[i * (ld + 1)];
}

/* ---- weights ---- */

__global__ void scaled_kernel(float *y, int64_t ldy, const void *w, dtype dt, int64_t ldw,
                              const float *col, const float *row, int64_t k)
{
    const int64_t r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < k;
         i += (int64_t)gridDim.x * THREADS) {
        float v = load_any(w, r * ldw + i, dt);
        if (col) v = __fmul_rn(v, col[i]);
        y[r * ldy + i] = row ? __fdiv_rn(v, row[r]) : v;
    }
}

/* A block a group: warp w takes rows w, w + 16, ..; their sums are added in order of the warps. */
#define SUM_WARPS 16
template <int V>
__global__ void __launch_bounds__(32 * SUM_WARPS)
    relative_sum_kernel(double *sum, const void *w, dtype dt, int64_t ld, int64_t n, double eps)
{
    __shared__ double part[SUM_WARPS][32 * V];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t at = (int64_t)blockIdx.x * 32 * V + lane;
    double s[V] = {};
    pdl_launch();
    pdl_wait();
#pragma unroll 4
    for (int64_t r = warp; r < n; r += SUM_WARPS) {
        float v[V], most = 0.f;
        for (int j = 0; j < V; j++) {
            v[j] = fabsf(load_any(w, r * ld + at + 32 * j, dt));
            most = fmaxf(most, v[j]);
        }
        most = warp_max(most);
        const double div = eps > 0 ? most + eps : most > 0.f ? most : 1e-4;
        for (int j = 0; j < V; j++) s[j] += v[j] / div;
    }
    for (int j = 0; j < V; j++) part[warp][lane + 32 * j] = s[j];
    __syncthreads();
    if (warp) return;
    for (int j = 0; j < V; j++) {
        double all = sum[at + 32 * j];
        for (int i = 0; i < SUM_WARPS; i++) all += part[i][lane + 32 * j];
        sum[at + 32 * j] = all;
    }
}

/* A warp a group of a row. */
template <int V>
__global__ void __launch_bounds__(THREADS)
    try_factors_kernel(void *y, dtype ydt, int64_t ldy, const void *w, dtype dt, int64_t ldw,
                       const float *s, int64_t groups)
{
    const int64_t group = (int64_t)blockIdx.x * (THREADS / 32) + (threadIdx.x >> 5),
                  at = group * 32 * V + (threadIdx.x & 31), row = blockIdx.y;
    float v[V], f[V], lo = 0.f, hi = 0.f;
    pdl_launch();
    pdl_wait();
    if (group >= groups) return;
    for (int j = 0; j < V; j++) {
        f[j] = s[at + 32 * j];
        v[j] = __fmul_rn(load_any(w, row * ldw + at + 32 * j, dt), f[j]);
        lo = fminf(lo, v[j]);
        hi = fmaxf(hi, v[j]);
    }
    lo = -warp_max(-lo);
    hi = warp_max(hi);
    const float scale = __half2float(range_scale(lo, hi)), zero = range_zero(lo, scale);
    for (int j = 0; j < V; j++)
        store_any(y, row * ldy + at + 32 * j, ydt,
                  __fdiv_rn(__fsub_rn(__fmul_rn(step_of(v[j], scale, zero), scale), v[j]), f[j]));
}

typedef struct {
    void *y;
    dtype ydt;
    int64_t ldy, k;
    const float *w;
    int64_t ldw;
    const uint8_t *codes;
    const __half *scale;
    int64_t lds;
    const uint8_t *zero;
    int64_t ldz;
    const float *col, *row;
    int g;
} rounded_call;

__global__ void rounded_kernel(rounded_call c)
{
    const int64_t r = blockIdx.y;
    pdl_launch();
    pdl_wait();
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < c.k;
         i += (int64_t)gridDim.x * THREADS) {
        const float scale = __half2float(c.scale[r * c.lds + i / c.g]),
                    zero = c.zero[r * c.ldz + i / c.g];
        const float step = c.codes ? (float)(c.codes[(r * c.k + i) / 2] >> 4 * (i & 1) & 15) - zero
                                   : step_of(c.w[r * c.ldw + i], scale, zero);
        float v = __fmul_rn(step, scale);
        if (c.col) v = __fdiv_rn(v, c.col[i]);
        if (c.row) v = __fmul_rn(v, c.row[r]);
        store_any(c.y, r * c.ldy + i, c.ydt, v);
    }
}

/* ---- launches ---- */

static dim3 by_rows(int64_t m, int64_t k)
{
    const int64_t x = (k + THREADS - 1) / THREADS;
    return dim3((unsigned)(x < 8 ? x : 8), (unsigned)m);
}

static const float *data_of(const tensor *t) { return t ? (const float *)t->data : NULL; }

/* A grid has at most 65535 rows of blocks. */
#define MOST_ROWS 65535
static err_code check_rows_fit(const char *op, int64_t m, err *e)
{
    if (m <= MOST_ROWS) return OK;
    return err_set(e, E_LIMIT, "%s: expected at most %d rows, got %lld", op, MOST_ROWS,
                   (long long)m);
}

extern "C" {

static err_code zero_cuda(device *d, tensor *t, err *e)
{
    TRY(cuda_pass_flush(d, e));
    CUDA_TRY(cudaMemsetAsync(t->data, 0, tensor_bytes(t), cuda_of(d)->stream), e);
    return OK;
}

static err_code mix_cuda(device *d, tensor *y, float alpha, const tensor *a, float beta,
                         const tensor *b, err *e)
{
    TRY(check_rows_fit("mix", y->shape[0], e));
    return cuda_launch(d, "mix", mix_kernel, by_rows(y->shape[0], y->shape[1]), dim3(THREADS), 0, e,
                       y->data, y->dt, y->stride[0], alpha, (const void *)a->data, a->dt,
                       a->stride[0], beta, b ? (const void *)b->data : (const void *)NULL,
                       b ? b->dt : DT_F32, b ? b->stride[0] : (int64_t)0, y->shape[1]);
}

static err_code row_dots_cuda(device *d, tensor *out, const tensor *a, const tensor *b, err *e)
{
    return cuda_launch(d, "row_dots", row_dots_kernel, dim3((unsigned)a->shape[0]), dim3(THREADS),
                       0, e, (double *)out->data, (const void *)a->data, a->dt, a->stride[0],
                       (const void *)b->data, b->dt, b->stride[0], a->shape[1]);
}

static err_code gram_blocks_cuda(device *d, tensor *h, const tensor *x, err *e)
{
    const float one = 1.f;
    const int g = (int)h->shape[1], m = (int)x->shape[0], ld = (int)x->stride[0];
    TRY(cuda_pass_flush(d, e));
    return cuda_blas(d, "gram_blocks",
                     cublasGemmStridedBatchedEx(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_T, g, g, m,
                                                &one, x->data, CUDA_R_16F, ld, g, x->data,
                                                CUDA_R_16F, ld, g, &one, h->data, CUDA_R_32F, g,
                                                (long long)g * g, (int)h->shape[0],
                                                CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                     e);
}

/* Row-major y += a^T b is column-major y += B A^T of b and a as [k,m] and [n,m]. */
static err_code cross_cuda(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const float one = 1.f;
    const int n = (int)a->shape[1], k = (int)b->shape[1], m = (int)a->shape[0];
    TRY(cuda_pass_flush(d, e));
    return cuda_blas(d, "cross",
                     cublasGemmEx(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_T, k, n, m, &one, b->data,
                                  CUDA_R_16F, (int)b->stride[0], a->data, CUDA_R_16F,
                                  (int)a->stride[0], &one, y->data, CUDA_R_32F, k,
                                  CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                     e);
}

static err_code diagonal_cuda(device *d, tensor *out, const tensor *h, err *e)
{
    const int64_t k = h->shape[0];
    return cuda_launch(d, "diagonal", diagonal_kernel,
                       dim3((unsigned)((k + THREADS - 1) / THREADS)), dim3(THREADS), 0, e,
                       (float *)out->data, (const float *)h->data, h->stride[0], k);
}

/* Products on the tensor cores keep 11 bits of f32 x and H: losses are compared at a part in a
 * thousand, and full f32 takes seven times as long. With bf16 they take half as long again; that
 * its 8 bits round each by itself averages out over the sums of a candidate. */
static err_code form_cuda(device *d, tensor *out, const tensor *x, const tensor *h, tensor *work,
                          err *e)
{
    const float one = 1.f, zero = 0.f;
    const int k = (int)x->shape[1], m = (int)x->shape[0];
    const cudaDataType_t type = x->dt == DT_BF16 ? CUDA_R_16BF : CUDA_R_32F;
    TRY(cuda_pass_flush(d, e));
    TRY(cuda_blas(d, "form",
                  cublasGemmEx(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_N, k, m, k, &one, h->data,
                               type, (int)h->stride[0], x->data, type, (int)x->stride[0], &zero,
                               work->data, CUDA_R_32F, (int)work->stride[0],
                               x->dt == DT_BF16 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32F_FAST_TF32,
                               CUBLAS_GEMM_DEFAULT),
                  e));
    return row_dots_cuda(d, out, work, x, e);
}

static err_code scaled_cuda(device *d, tensor *y, const tensor *w, const tensor *col,
                            const tensor *row, err *e)
{
    TRY(check_rows_fit("scaled", y->shape[0], e));
    return cuda_launch(d, "scaled", scaled_kernel, by_rows(y->shape[0], y->shape[1]), dim3(THREADS),
                       0, e, (float *)y->data, y->stride[0], (const void *)w->data, w->dt,
                       w->stride[0], data_of(col), data_of(row), y->shape[1]);
}

static err_code relative_sum_cuda(device *d, tensor *sum, const tensor *w, int32_t g, double eps,
                                  err *e)
{
    void (*const kernel)(double *, const void *, dtype, int64_t, int64_t,
                         double) = g == 128  ? relative_sum_kernel<4>
                                   : g == 64 ? relative_sum_kernel<2>
                                             : relative_sum_kernel<1>;
    return cuda_launch(d, "relative_sum", kernel, dim3((unsigned)(w->shape[1] / g)),
                       dim3(32 * SUM_WARPS), 0, e, (double *)sum->data, (const void *)w->data,
                       w->dt, w->stride[0], w->shape[0], eps);
}

static err_code try_factors_cuda(device *d, tensor *y, const tensor *w, const tensor *s, int32_t g,
                                 err *e)
{
    const int64_t groups = w->shape[1] / g, per = THREADS / 32;
    void (*const kernel)(void *, dtype, int64_t, const void *, dtype, int64_t, const float *,
                         int64_t) = g == 128  ? try_factors_kernel<4>
                                    : g == 64 ? try_factors_kernel<2>
                                              : try_factors_kernel<1>;
    TRY(check_rows_fit("try_factors", w->shape[0], e));
    return cuda_launch(d, "try_factors", kernel,
                       dim3((unsigned)((groups + per - 1) / per), (unsigned)w->shape[0]),
                       dim3(THREADS), 0, e, y->data, y->dt, y->stride[0], (const void *)w->data,
                       w->dt, w->stride[0], (const float *)s->data, groups);
}

static err_code rounded_cuda(device *d, tensor *y, const rounded_spec *r, err *e)
{
    const rounded_call c = {y->data,
                            y->dt,
                            y->stride[0],
                            y->shape[1],
                            data_of(r->w),
                            r->w ? r->w->stride[0] : 0,
                            r->codes ? (const uint8_t *)r->codes->data : NULL,
                            (const __half *)r->scale->data,
                            r->scale->stride[0],
                            (const uint8_t *)r->zero->data,
                            r->zero->stride[0],
                            data_of(r->col),
                            data_of(r->row),
                            r->g};
    TRY(check_rows_fit("rounded", y->shape[0], e));
    return cuda_launch(d, "rounded", rounded_kernel, by_rows(y->shape[0], y->shape[1]),
                       dim3(THREADS), 0, e, c);
}

const search_ops search_ops_cuda = {zero_cuda,
                                    mix_cuda,
                                    row_dots_cuda,
                                    gram_blocks_cuda,
                                    cross_cuda,
                                    diagonal_cuda,
                                    form_cuda,
                                    scaled_cuda,
                                    relative_sum_cuda,
                                    try_factors_cuda,
                                    rounded_cuda,
                                    search_range_cuda,
                                    search_rounds_cuda,
                                    search_reorder_cuda,
                                    search_factor_cuda,
                                    search_invert_cuda,
                                    search_reverse_cuda,
                                    search_solve_cuda,
                                    search_by_place_cuda,
                                    search_feedback_cuda,
                                    search_code_errors_cuda,
                                    search_sweep_cuda,
                                    search_pack_codes_cuda,
                                    search_turn_cuda,
                                    search_cache_errors_cuda};

} /* extern "C" */
