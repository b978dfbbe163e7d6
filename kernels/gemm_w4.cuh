/* W4A16 products on CUDA straight from our device tiling. Private to kernels/.
 *
 * Tiling. Outputs go in tiles of 16 rows, inputs in units of 128. A unit is 1024 bytes of codes and then
 * the parameters of its groups, so that a tile is one contiguous stream; units lie in order of k.
 * Codes: uint4 [2][32 lanes]. Lane 4*g + t of pair p holds two words for each of the steps s = 2p, 2p + 1 of 32
 * inputs: byte j of word h is code (row g, k = 32*s + 8*t + 4*h + j) in its low nibble and the same of row
 * g + 8 in its high one: the A operand of mma.m16n8k32 after one mask.
 * Parameters: for each group of the unit (128 / group of them) 8 x {half2 (scale, zero) of row g, half2 of
 * row g + 8}. Inputs beyond k and rows beyond n have scale 0. */
#ifndef TMF_KERNELS_GEMM_W4_CUH
#define TMF_KERNELS_GEMM_W4_CUH

#include "kernels/cuda_util.cuh"

#define W4_FEW_MAX 16 /* rows of gemm_w4_few */

typedef struct {
    const uint8_t *data; /* [tiles][units][unit bytes] */
    const __half *bias;  /* [n] or NULL */
    int n, k, group;
    int tiles, units;
} w4_tiles;

typedef struct {
    const __half *x; /* [m,k], row stride ldx; 16-byte aligned rows */
    void *y;         /* f16, or f32 when `wide`: row stride ldy */
    uint8_t *planes; /* w4_planes_bytes */
    float *scales;   /* w4_scales_bytes */
    int m, ldx, ldy;
    bool add, wide;  /* y +=; y is f32 */
} w4_call;

static inline int w4_unit_bytes(int group) { return 1024 + 64 * (128 / group); }
/* Tokens go in tiles of 4; 1, 2 or 4 tiles. */
static inline int w4_token_tiles(int m) { return m <= 4 ? 1 : m <= 8 ? 2 : 4; }
static inline size_t w4_planes_bytes(int units, int m) { return (size_t)units * w4_token_tiles(m) * 1024; }
static inline size_t w4_scales_bytes(int units, int m, int group)
{
    return (size_t)units * w4_token_tiles(m) * 4 * (size_t)(1 + 128 / group) * sizeof(float);
}

/* Activations of up to W4_FEW_MAX rows to fixed point, then the product. */
cudaError_t gemm_w4_planes(const w4_tiles *w, const w4_call *c, cudaStream_t stream, bool pdl);
cudaError_t gemm_w4_few(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t stream, bool pdl);

#endif
