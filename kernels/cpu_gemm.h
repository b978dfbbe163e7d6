/* The f32 product behind gemm, gram, quad and matmul on CPUs without AMX (gemm_cpu.c). */
#ifndef TMF_KERNELS_CPU_GEMM_H
#define TMF_KERNELS_CPU_GEMM_H

#include "kernels/cpu.h"

typedef struct {
    float *y;         /* [m,n] */
    const float *x;   /* [m,k] */
    const void *w;    /* [n,k] f16, bf16 or f32 */
    const void *bias; /* [n] or NULL */
    int64_t m, n, k, ldy, ldx, ldw;
    dtype w_dt, bias_dt;
    bool add;
} gemm_job;

#define GEMM_ROWS          256 /* at most, of x in a block: 512 KB of them gathered, within L2 */
#define GEMM_SCRATCH_BYTES ((size_t)(16 + 2 * GEMM_ROWS) << 10)
/* y[m0..m1)[n0..n1), m1 - m0 <= GEMM_ROWS; scratch of GEMM_SCRATCH_BYTES. */
void CPU_FN(gemm_block)(const gemm_job *j, int64_t n0, int64_t n1, int64_t m0, int64_t m1,
                        void *scratch);

#endif
