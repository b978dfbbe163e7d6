/* One row of activations times 16-bit weights on CUDA. Private to kernels/. */
#ifndef TMF_KERNELS_GEMM_ONE_CUH
#define TMF_KERNELS_GEMM_ONE_CUH

#include "kernels/cuda_util.cuh"

typedef struct {
    const __half *w, *x, *bias; /* [n,k] contiguous, [k], [n] or NULL */
    void *y;                    /* [n], f16, or f32 when `wide` */
    int n, k;
    bool add, wide; /* y +=; y is f32 */
} gemm_one_call;

/* k a multiple of 8 that fits shared memory, w and x 16-byte aligned. */
bool gemm_one_takes(const gemm_one_call *c);
cudaError_t gemm_one(const gemm_one_call *c, int sms, bool pdl, cudaStream_t stream);

#endif
