/* The search's ops on CUDA: folds for a 4-bit cache. */
#include "kernels/search_cuda.cuh"

#define WARPS  8 /* of a block, a row each */
#define LEVELS 15.f

/* Angles as in rope_kv_ref.c: the f32 product, its sine and cosine in double. */
__global__ void fold_turn_kernel(__half *x, int64_t ld, int64_t ld_head, const int32_t *pos,
                                 const float *inv_freq, int half, bool interleaved, float mscale,
                                 int heads)
{
    const int64_t row = blockIdx.x;
    pdl_launch();
    pdl_wait();
    for (int j = (int)threadIdx.x; j < half; j += (int)blockDim.x) {
        double sine, cosine;
        sincos((double)__fmul_rn((float)pos[row], inv_freq[j]), &sine, &cosine);
        const float c = __fmul_rn((float)cosine, mscale), s = __fmul_rn((float)sine, mscale);
        for (int h = 0; h < heads; h++) {
            __half *a = x + row * ld + h * ld_head + (interleaved ? 2 * j : j),
                   *b = interleaved ? a + 1 : a + half;
            const float u = __half2float(*a), v = __half2float(*b);
            *a = __float2half_rn(__fsub_rn(__fmul_rn(u, c), __fmul_rn(v, s)));
            *b = __float2half_rn(__fadd_rn(__fmul_rn(u, s), __fmul_rn(v, c)));
        }
    }
}

/* A warp has one row under one candidate. */
__global__ void __launch_bounds__(32 * WARPS)
    fold_errors_kernel(float *y, const __half *x, int64_t ld, const float *s, int64_t n, int64_t k,
                       int64_t rows)
{
    const int64_t at = (int64_t)blockIdx.x * WARPS + (threadIdx.x >> 5);
    const int lane = threadIdx.x & 31;
    pdl_launch();
    pdl_wait();
    if (at >= rows) return;
    x += at % n * ld;
    s += at / n * k;
    y += at * k;
    float lo = INFINITY, hi = -INFINITY;
    for (int64_t i = lane; i < k; i += 32) {
        const float v = __fdiv_rn(__half2float(x[i]), s[i]);
        lo = fminf(lo, v);
        hi = fmaxf(hi, v);
    }
    lo = -warp_max(-lo);
    hi = warp_max(hi);
    const float zero = __half2float(__float2half_rn(lo)),
                step = __half2float(__float2half_rn(__fdiv_rn(__fsub_rn(hi, lo), LEVELS)));
    for (int64_t i = lane; i < k; i += 32) {
        const float own = __half2float(x[i]), v = __fdiv_rn(own, s[i]);
        const float q = step > 0
                            ? fminf(fmaxf(rintf(__fdiv_rn(__fsub_rn(v, zero), step)), 0.f), LEVELS)
                            : 0.f;
        y[i] = __fsub_rn(__fmul_rn(__fadd_rn(__fmul_rn(q, step), zero), s[i]), own);
    }
}

extern "C" {

err_code search_turn_cuda(device *d, tensor *x, const tensor *pos, const rope_spec *r, err *e)
{
    const int half = r->dims / 2;
    if (half == 0) return OK;
    return cuda_launch(d, "turn", fold_turn_kernel, dim3((unsigned)x->shape[0]),
                       dim3((unsigned)((half + 31) / 32 * 32)), 0, e, (__half *)x->data,
                       x->stride[0], x->stride[1], (const int32_t *)pos->data,
                       (const float *)r->inv_freq.data, half, r->interleaved, r->mscale,
                       (int)x->shape[1]);
}

err_code search_cache_errors_cuda(device *d, tensor *y, const tensor *x, const tensor *s, err *e)
{
    const int64_t rows = y->shape[0];
    return cuda_launch(d, "cache_errors", fold_errors_kernel,
                       dim3((unsigned)((rows + WARPS - 1) / WARPS)), dim3(32 * WARPS), 0, e,
                       (float *)y->data, (const __half *)x->data, x->stride[0],
                       (const float *)s->data, x->shape[0], x->shape[1], rows);
}

} /* extern "C" */
