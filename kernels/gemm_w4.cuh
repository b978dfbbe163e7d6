/* W4A16 products on CUDA straight from our device tiling. Private to kernels/.
 *
 * Tiling. Outputs go in tiles of 16 rows, inputs in chunks of 64. One (tile, chunk) is 512 bytes: 16 for each
 * lane of a warp, in the order in which mma.m16n8k16 (and wgmma m64k16) wants its A operand, so that a load
 * goes straight to the tensor cores. Lane l = 4*g + t. Word s (0..3) of its 16 bytes holds step s; nibble
 * i + 4*j of the word is fragment register i, half j:
 *   row = g + 8*(i & 1),   k = 32*(s / 2) + 8*t + 4*(s & 1) + 2*(i / 2) + j
 * so a lane's activations for half a chunk are the 8 consecutive values from k = 8*t.
 * params[tile][group][8]: {half2 (scale, zero) of row g, half2 of row g + 8}.
 * A fused gate/up weight holds 8 gate rows and the 8 up rows of the same outputs in each tile. */
#ifndef TMF_KERNELS_GEMM_W4_CUH
#define TMF_KERNELS_GEMM_W4_CUH

#include "cuda_util.cuh"

typedef struct {
    const uint4 *q;      /* [tiles][chunks][32] */
    const uint2 *params; /* [tiles][groups][8] */
    const __half *bias;  /* [n] or NULL */
    int n, k, group;     /* n real outputs (of the glu: 2 * outputs) */
    int tiles, chunks;
    bool glu;
} w4_tiles;

typedef struct {
    const __half *x; /* [m,k], row stride ldx */
    void *y;         /* f16, or f32 when `add`: row stride ldy */
    int m, ldx, ldy;
    bool add;        /* y += */
} w4_call;

/* m <= 64. */
cudaError_t gemm_w4_small(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t stream, bool pdl);
/* Any m: weights to f16 [n,k] for a dense product. */
cudaError_t gemm_w4_dequant(const w4_tiles *w, __half *out, cudaStream_t stream);

#endif
