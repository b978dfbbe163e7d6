/* The CPU's own W4 tiling and what its kernels share. Private to kernels/.
 *
 * Weights. A tile is 16 outputs and all of k, contiguous: first the parameters, then the codes.
 *   scales  f16 [k/g][16]
 *   zeros   u8 [k/g][8], two nibbles a byte, the lower output low, when all zeros are integers
 * 0..15; else f16 [k/g][16] (padded to 64 bytes) codes   u8 [k/8][16][4]: byte j of output i has
 * code 8s+j low and code 8s+4+j high, so that one 64-byte load gives two steps of a 4-way byte dot
 * product for 16 outputs. Outputs beyond n have code, scale and zero 0. One copy serves every
 * instruction set and every m.
 *
 * Activations. Each row is cut into the weights' groups; in a group x = scale * X, X an integer in
 * -2039..2039 split as X = 16*hi + lo, hi and lo int8. Sums of X*q over a group are exact in int32
 * and in f32 (2039*15*128 < 2^24), so every variant computes the same value:
 *   y = fma over groups in order: c = fma(fma(-zero, sum(X), sum(X*q)) * scale, w_scale, c)
 *   then c + bias, then y + c when adding.
 * docs/numerics.md gives the measured error. */
#ifndef TMF_KERNELS_GEMM_W4_H
#define TMF_KERNELS_GEMM_W4_H

#include "base/half.h"
#include "kernels/device_internal.h"

enum {
    W4_TILE_N = 16,
    W4_CHUNK_K = 32, /* k of one line of activations and of four lines of codes */
    W4_X_MAX = 2039, /* 127*16 + 7 */

    W4_AMX_ROWS = 16 /* rows of an AMX tile */
};

typedef struct {
    const uint8_t *base; /* [tiles][tile_bytes] */
    int64_t tiles, k, n;
    size_t tile_bytes, zeros_at, codes_at; /* offsets in a tile; scales are at 0 */
    int32_t group, groups;
    bool zeros_f16;
} w4_tiles;

/* Fills all but base. */
void w4_tiles_layout(w4_tiles *t, int64_t k, int64_t n, int32_t group, bool zeros_f16);
w4_tiles w4_tiles_of(const w4_weight *w); /* layout W4_DEVICE */

/* One call of op_gemm_w4. Rows are quantized in blocks: the block that starts at row r has its
 * 64-byte lines at x + r*2*k as [k/32][rows of the block] and its parameters at param + r*2*groups
 * as [groups][rows of the block]{scale, sum of X}. */
typedef struct {
    w4_tiles w;
    int64_t m, m_stored; /* m_stored: rows with scratch, the last block padded with zero rows */
    const float *in;     /* [m,k], rows in_stride apart */
    int64_t in_stride;
    uint8_t *x;
    float *param;
    const float *bias; /* f32 [tiles*16] or NULL */
    float *y;          /* [m,n], rows y_stride apart */
    int64_t y_stride;
    bool add;
    device *d;
} w4_call;

typedef struct {
    /* Rows of the block at `row` as stored; 0 < valid rows <= stored rows. */
    int (*block_rows)(const w4_call *c, int64_t row);
    void (*quantize)(const w4_call *c, int64_t row, int stored);                /* one block */
    void (*compute)(const w4_call *c, int64_t tile, int64_t tiles, int worker); /* all rows */
} w4_kernels;

/* Scale of a group of activations from the bits of its largest magnitude, and what to multiply by.
 * A group below 2^-100 counts as zero (its inverse could overflow); one with a NaN or an infinity
 * has X = 0 and scale NaN, so that the row's outputs are NaN. */
typedef struct {
    float scale, inv;
} w4_x_scale;
static inline w4_x_scale w4_x_scale_of(uint32_t max_bits)
{
    const float top = half_bits_f32(max_bits);
    if (max_bits >= 0x7f800000u) return (w4_x_scale){half_bits_f32(0x7fc00000u), 0.0f};
    if (top < 0x1p-100f) return (w4_x_scale){0.0f, 0.0f};
    return (w4_x_scale){top / (float)W4_X_MAX, (float)W4_X_MAX / top};
}

static inline uint8_t *w4_block_x(const w4_call *c, int64_t row)
{
    return c->x + (size_t)row * 2 * (size_t)c->w.k;
}
static inline float *w4_block_param(const w4_call *c, int64_t row)
{
    return c->param + (size_t)row * 2 * (size_t)c->w.groups;
}

#if defined(__x86_64__)
/* avx512 and avxvnni are gemm_w4_vnni.c at two widths. */
extern const w4_kernels w4_kernels_avx2, w4_kernels_avxvnni, w4_kernels_avx512, w4_kernels_amx;
void w4_quantize_avxvnni(const w4_call *c, int64_t row, int stored);
void w4_rows_avxvnni(const w4_call *c, int64_t tile, int64_t tiles, int64_t row, int rows);
/* The AMX variant uses these for what is left of the rows. */
void w4_quantize_avx512(const w4_call *c, int64_t row, int stored);
void w4_rows_avx512(const w4_call *c, int64_t tile, int64_t tiles, int64_t row, int rows);
#endif

/* The op on quantized activations; t->gemm_w4 of every CPU with AVX2. */
err_code gemm_w4_cpu(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e);
size_t gemm_w4_cpu_scratch(const op_limits *l);
/* Every CPU, the reference included, has this tiling. */
err_code w4_upload_cpu(device *d, dev_buf *buf, w4_weight *out, const w4_weight *const *parts,
                       int n_parts, err *e);
size_t w4_upload_bytes_cpu(int64_t k, int64_t n, int32_t group);

#endif
