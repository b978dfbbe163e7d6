/* One row of activations times 16-bit weights on CUDA. Private to kernels/. */
#ifndef TMF_KERNELS_GEMM_ONE_CUH
#define TMF_KERNELS_GEMM_ONE_CUH

#include "kernels/cuda_util.cuh"

/* [n], f16 or, as a model of f32 has it, f32 */
typedef struct {
    const void *data; /* NULL: none */
    bool wide;
} dense_bias;

__device__ __forceinline__ float bias_at(const dense_bias &b, int64_t i)
{
    return b.wide ? ((const float *)b.data)[i] : __half2float(((const __half *)b.data)[i]);
}

typedef struct {
    const __half *w, *x; /* [n,k] contiguous, [k] */
    dense_bias bias;
    void *y; /* [n], f16, or f32 when `wide` */
    int n, k;
    bool add, wide; /* y +=; y is f32 */
} gemm_one_call;

/* k a multiple of 8 that fits shared memory, w and x 16-byte aligned. */
bool gemm_one_takes(const gemm_one_call *c);
cudaError_t gemm_one(const gemm_one_call *c, int sms, bool pdl, cudaStream_t stream);

#endif
