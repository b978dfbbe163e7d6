/* Dense products: 16-bit weights with f32 sums, one row by a kernel of our own, more through
 * cuBLAS; and the f32 products of the search. */
#include "kernels/device_cuda.cuh"
#include "kernels/gemm_one.cuh"

#define GRAM_PANEL 2048

__global__ void bias_kernel(void *y, bool wide, int64_t ldy, dense_bias bias, int64_t n)
{
    const int64_t row = blockIdx.y, i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (i >= n) return;
    if (wide)
        ((float *)y)[row * ldy + i] += bias_at(bias, i);
    else {
        __half *p = (__half *)y + row * ldy + i;
        *p = __float2half_rn(__half2float(*p) + bias_at(bias, i));
    }
}

__global__ void mirror_kernel(float *h, int64_t k)
{
    const int64_t i = (int64_t)blockIdx.y * blockDim.y + threadIdx.y,
                  j = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    pdl_launch();
    pdl_wait();
    if (i < k && j < i) h[j * k + i] = h[i * k + j];
}

/* out[i] = sum_j x[i][j] * xh[i][j] in f64, one block a row, fixed order. */
__global__ void row_dot_kernel(double *out, const float *x, int64_t ldx, const float *xh, int64_t k)
{
    __shared__ double part[256];
    pdl_launch();
    pdl_wait();
    double s = 0;
    for (int64_t j = threadIdx.x; j < k; j += 256)
        s += (double)x[blockIdx.x * ldx + j] * (double)xh[blockIdx.x * k + j];
    part[threadIdx.x] = s;
    __syncthreads();
    for (int i = 128; i; i >>= 1) {
        if ((int)threadIdx.x < i) part[threadIdx.x] += part[threadIdx.x + i];
        __syncthreads();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = part[0];
}

extern "C" {

err_code gemm_cuda(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                   bool add, err *e)
{
    const float one = 1.f, beta = add ? 1.f : 0.f;
    const int m = (int)x->shape[0], n = (int)w->shape[0], k = (int)w->shape[1];
    if (w->dt != DT_F16) /* dev_upload makes weights f16 */
        return err_set(e, E_UNSUPPORTED, "gemm: w: expected F16 on %s, got %s", d->name,
                       dtype_name(w->dt));
    if (bias && bias->dt == DT_BF16)
        return err_set(e, E_UNSUPPORTED, "gemm: bias: expected F16 or F32 on %s, got BF16",
                       d->name);
    const dense_bias own = {bias ? bias->data : NULL, bias && bias->dt == DT_F32};
    if (d->deterministic) return gemm_fixed_cuda(d, y, x, w, bias, add, e);
    TRY(cuda_pass_flush(d, e));
    gemm_one_call one_row = {};
    one_row.w = (const __half *)w->data, one_row.x = (const __half *)x->data, one_row.y = y->data;
    one_row.bias = own;
    one_row.n = n, one_row.k = k, one_row.add = add, one_row.wide = y->dt == DT_F32;
    if (m == 1 && gemm_one_takes(&one_row))
        return cuda_launched(
            d, "gemm: one row",
            gemm_one(&one_row, cuda_of(d)->sms, cuda_of(d)->sm >= 90, cuda_of(d)->stream), e);
    TRY(cuda_blas(d, "gemm",
                  cublasGemmEx(cuda_blas_of(d), CUBLAS_OP_T, CUBLAS_OP_N, n, m, k, &one, w->data,
                               CUDA_R_16F, k, x->data, CUDA_R_16F, (int)x->stride[0], &beta,
                               y->data, y->dt == DT_F32 ? CUDA_R_32F : CUDA_R_16F,
                               (int)y->stride[0], CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                  e));
    if (!bias) return OK;
    return cuda_launch(d, "gemm: bias", bias_kernel, dim3((unsigned)((n + 255) / 256), (unsigned)m),
                       dim3(256), 0, e, y->data, y->dt == DT_F32, y->stride[0], own, (int64_t)n);
}

/* Columns of h by panels, each from its diagonal down: with panels of a sixth of a wide h that
 * saves two fifths of the work. Row-major h += x^T x is column-major h += X X^T with X = x as
 * [k, m] of leading dimension ldx. */
err_code gram_cuda(device *d, tensor *h, const tensor *x, err *e)
{
    const float one = 1.f;
    const int k = (int)x->shape[1], m = (int)x->shape[0], ld = (int)x->stride[0],
              ldh = (int)h->stride[0];
    TRY(cuda_pass_flush(d, e));
    for (int at = 0; at < k; at += GRAM_PANEL) {
        const int n = k - at < GRAM_PANEL ? k - at : GRAM_PANEL;
        const __half *cols = (const __half *)x->data + at;
        TRY(cuda_blas(d, "gram",
                      cublasGemmEx(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_T, n, k - at, m, &one,
                                   cols, CUDA_R_16F, ld, cols, CUDA_R_16F, ld, &one,
                                   (float *)h->data + (int64_t)at * ldh + at, CUDA_R_32F, ldh,
                                   CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT),
                      e));
    }
    return OK;
}

err_code gram_finish_cuda(device *d, tensor *h, err *e)
{
    const unsigned n = (unsigned)((h->shape[0] + 15) / 16);
    return cuda_launch(d, "gram_finish", mirror_kernel, dim3(n, n), dim3(16, 16), 0, e,
                       (float *)h->data, h->shape[0]);
}

err_code matmul_cuda(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const float one = 1.f, zero = 0.f;
    TRY(cuda_pass_flush(d, e));
    return cuda_blas(d, "matmul",
                     cublasSgemm(cuda_blas_of(d), CUBLAS_OP_N, CUBLAS_OP_N, (int)b->shape[1],
                                 (int)a->shape[0], (int)a->shape[1], &one, (const float *)b->data,
                                 (int)b->stride[0], (const float *)a->data, (int)a->stride[0],
                                 &zero, (float *)y->data, (int)y->stride[0]),
                     e);
}

err_code quad_cuda(device *d, tensor *out, const tensor *x, const tensor *h, err *e)
{
    const int64_t k = x->shape[1], m = x->shape[0];
    int64_t rows = (int64_t)(d->shared_bytes / ((size_t)k * sizeof(float)));
    void *scratch;
    if (rows > m) rows = m;
    if (rows < 1) rows = 1;
    TRY(dev_scratch(d, &scratch, (size_t)rows * (size_t)k * sizeof(float), "quad", e));
    for (int64_t r = 0; r < m; r += rows) {
        const int64_t n = m - r < rows ? m - r : rows;
        const tensor part = tensor_rows(x, r, n);
        tensor xh = tensor_2d(scratch, DT_F32, n, k);
        TRY(matmul_cuda(d, &xh, &part, h, e));
        TRY(cuda_launch(d, "quad", row_dot_kernel, dim3((unsigned)n), dim3(256), 0, e,
                        (double *)out->data + r, (const float *)part.data, part.stride[0],
                        (const float *)scratch, k));
    }
    return OK;
}

} /* extern "C" */
