/* Cholesky factors of second moments, their inverses and solves: recursive halves by cuBLAS in f32
 * down to squares of 128, which one block does in shared memory. A row-major lower triangle is a
 * column-major upper one: L = U^T. */
#include "kernels/search_cuda.cuh"

#define BASE    128
#define PITCH   (BASE + 1)
#define THREADS 512

__global__ void reorder_kernel(float *y, const float *h, const int32_t *order, const float *col,
                               float add, int64_t k)
{
    const int64_t i = blockIdx.y;
    pdl_launch();
    pdl_wait();
    const int32_t a = order[i];
    for (int64_t j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x; j < k;
         j += (int64_t)gridDim.x * blockDim.x) {
        const int32_t b = order[j];
        const float v = h[a * k + b];
        y[i * k + j] = (col ? __fdiv_rn(v, __fmul_rn(col[a], col[b])) : v) + (i == j ? add : 0.f);
    }
}

__global__ void reverse_kernel(float *a, int64_t n)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x, z = n - 1 - i;
    pdl_launch();
    pdl_wait();
    if (i >= z) return;
    const float t = a[i];
    a[i] = a[z];
    a[z] = t;
}

__device__ __forceinline__ void load_square(float *s, const float *a, int64_t ld, int n)
{
    for (int t = threadIdx.x; t < n * n; t += THREADS)
        s[t / n * PITCH + t % n] = a[t / n * ld + t % n];
    __syncthreads();
}

__device__ __forceinline__ void store_lower(float *a, int64_t ld, const float *s, int n)
{
    __syncthreads();
    for (int t = threadIdx.x; t < n * n; t += THREADS)
        if (t % n <= t / n) a[t / n * ld + t % n] = s[t / n * PITCH + t % n];
}

__global__ void __launch_bounds__(THREADS)
    factor_kernel(float *a, int64_t ld, int n, int32_t *failed)
{
    extern __shared__ float s[];
    pdl_launch();
    pdl_wait();
    load_square(s, a, ld, n);
    for (int j = 0; j < n; j++) {
        const float pivot = s[j * PITCH + j];
        const bool good = pivot > 0.f;
        const float root = good ? sqrtf(pivot) : 1.f;
        __syncthreads();
        if (!good && threadIdx.x == 0) *failed = 1;
        for (int i = j + threadIdx.x; i < n; i += THREADS)
            s[i * PITCH + j] = i == j ? root : s[i * PITCH + j] / root;
        __syncthreads();
        const int rest = n - 1 - j; /* columns behind j of the rows behind j */
        for (int t = threadIdx.x; t < rest * rest; t += THREADS) {
            const int i = j + 1 + t / rest, c = j + 1 + t % rest;
            if (c <= i) s[i * PITCH + c] -= s[i * PITCH + j] * s[c * PITCH + j];
        }
        __syncthreads();
    }
    store_lower(a, ld, s, n);
}

/* A thread a column of the inverse, which goes over the diagonal: what lies there nobody reads. */
__global__ void __launch_bounds__(THREADS) invert_kernel(float *a, int64_t ld, int n)
{
    extern __shared__ float s[];
    const int j = threadIdx.x;
    float *inv = s + j * PITCH, first = 0.f;
    pdl_launch();
    pdl_wait();
    load_square(s, a, ld, n);
    if (j < n) {
        first = 1.f / inv[j];
        for (int i = j + 1; i < n; i++) {
            float sum[4] = {s[i * PITCH + j] * first};
            int t = j + 1;
            for (; t + 4 <= i; t += 4)
                for (int q = 0; q < 4; q++) sum[q] += s[i * PITCH + t + q] * inv[t + q];
            for (; t < i; t++) sum[0] += s[i * PITCH + t] * inv[t];
            inv[i] = -((sum[0] + sum[1]) + (sum[2] + sum[3])) / s[i * PITCH + i];
        }
    }
    __syncthreads();
    if (j < n) inv[j] = first;
    __syncthreads();
    for (int t = threadIdx.x; t < n * n; t += THREADS)
        if (t % n <= t / n) a[t / n * ld + t % n] = s[t % n * PITCH + t / n];
}

err_code search_rounds_cuda(device *d, err *e)
{
    const int need = (int)sizeof(float) * BASE * PITCH;
    int at, have;
    CUDA_TRY(cudaGetDevice(&at), e);
    CUDA_TRY(cudaDeviceGetAttribute(&have, cudaDevAttrMaxSharedMemoryPerBlockOptin, at), e);
    if (have >= need) return OK;
    return err_set(e, E_UNSUPPORTED,
                   "%s: error feedback: expected %d bytes of shared memory a block, as from sm_80 "
                   "on, found %d (--method awq or --device cpu do without)",
                   dev_name(d), need, have);
}

static err_code base_factor(device *d, float *a, int64_t ld, int n, int32_t *failed, err *e)
{
    const int smem = (int)sizeof(float) * BASE * PITCH;
    CUDA_TRY(cudaFuncSetAttribute(factor_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
             e);
    return cuda_launch(d, "factor", factor_kernel, dim3(1), dim3(THREADS), (size_t)smem, e, a, ld,
                       n, failed);
}

static err_code base_invert(device *d, float *a, int64_t ld, int n, err *e)
{
    const int smem = (int)sizeof(float) * BASE * PITCH;
    CUDA_TRY(cudaFuncSetAttribute(invert_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, smem),
             e);
    return cuda_launch(d, "invert", invert_kernel, dim3(1), dim3(THREADS), (size_t)smem, e, a, ld,
                       n);
}

/* The larger power-of-two share of n, a multiple of BASE. */
static int split_of(int n)
{
    int half = BASE;
    while (2 * half < n) half *= 2;
    return half;
}

static err_code factor_part(device *d, float *a, int64_t ld, int n, int32_t *failed, err *e)
{
    const float one = 1.f, less = -1.f;
    if (n <= BASE) return base_factor(d, a, ld, n, failed, e);
    const int p = split_of(n), q = n - p, l = (int)ld;
    float *low = a + (int64_t)p * ld, *rest = low + p;
    cublasHandle_t blas = cuda_blas_of(d);
    TRY(factor_part(d, a, ld, p, failed, e));
    TRY(cuda_blas(d, "factor",
                  cublasStrsm(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T,
                              CUBLAS_DIAG_NON_UNIT, p, q, &one, a, l, low, l),
                  e));
    TRY(cuda_blas(
        d, "factor",
        cublasSsyrk(blas, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_T, q, p, &less, low, l, &one, rest, l),
        e));
    return factor_part(d, rest, ld, q, failed, e);
}

/* Of [A 0; C B] the inverse is [A^-1 0; -B^-1 C A^-1 B^-1]. */
static err_code invert_part(device *d, float *a, int64_t ld, int n, err *e)
{
    const float one = 1.f, less = -1.f;
    if (n <= BASE) return base_invert(d, a, ld, n, e);
    const int p = split_of(n), q = n - p, l = (int)ld;
    float *low = a + (int64_t)p * ld, *rest = low + p;
    cublasHandle_t blas = cuda_blas_of(d);
    TRY(invert_part(d, a, ld, p, e));
    TRY(invert_part(d, rest, ld, q, e));
    TRY(cuda_blas(d, "invert",
                  cublasStrmm(blas, CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                              CUBLAS_DIAG_NON_UNIT, p, q, &one, a, l, low, l, low, l),
                  e));
    return cuda_blas(d, "invert",
                     cublasStrmm(blas, CUBLAS_SIDE_RIGHT, CUBLAS_FILL_MODE_UPPER, CUBLAS_OP_N,
                                 CUBLAS_DIAG_NON_UNIT, p, q, &less, rest, l, low, l, low, l),
                     e);
}

extern "C" {

err_code search_reorder_cuda(device *d, tensor *y, const tensor *h, const tensor *order,
                             const tensor *col, float add, err *e)
{
    const int64_t k = h->shape[0];
    if (k > 65535)
        return err_set(e, E_LIMIT, "reorder: expected at most 65535 inputs, got %lld",
                       (long long)k);
    return cuda_launch(d, "reorder", reorder_kernel, dim3(8, (unsigned)k), dim3(256), 0, e,
                       (float *)y->data, (const float *)h->data, (const int32_t *)order->data,
                       col ? (const float *)col->data : (const float *)NULL, add, k);
}

err_code search_factor_cuda(device *d, tensor *a, tensor *failed, err *e)
{
    TRY(cuda_pass_flush(d, e));
    return factor_part(d, (float *)a->data, a->shape[0], (int)a->shape[0], (int32_t *)failed->data,
                       e);
}

err_code search_invert_cuda(device *d, tensor *a, err *e)
{
    TRY(cuda_pass_flush(d, e));
    return invert_part(d, (float *)a->data, a->shape[0], (int)a->shape[0], e);
}

err_code search_reverse_cuda(device *d, tensor *a, err *e)
{
    const int64_t n = tensor_count(a), half = n / 2;
    return cuda_launch(d, "reverse", reverse_kernel, dim3((unsigned)((half + 255) / 256 + !half)),
                       dim3(256), 0, e, (float *)a->data, n);
}

err_code search_solve_cuda(device *d, tensor *x, const tensor *l, err *e)
{
    const float one = 1.f;
    const int n = (int)x->shape[0], k = (int)x->shape[1];
    const cublasOperation_t turn[2] = {CUBLAS_OP_T, CUBLAS_OP_N};
    TRY(cuda_pass_flush(d, e));
    for (int i = 0; i < 2; i++)
        TRY(cuda_blas(d, "solve",
                      cublasStrsm(cuda_blas_of(d), CUBLAS_SIDE_LEFT, CUBLAS_FILL_MODE_UPPER,
                                  turn[i], CUBLAS_DIAG_NON_UNIT, k, n, &one, (const float *)l->data,
                                  k, (float *)x->data, k),
                      e));
    return OK;
}

} /* extern "C" */
