/* Tiles for products of f32 by way of bf16: each f32 x is hi + lo, both bf16, which keeps it to
 * 2^-17 (a bf16 weight needs no lo). A product is then the tile products a_hi b_lo, a_hi b_hi and,
 * where a has one, a_lo b_hi; a_lo b_lo, at most 2^-16 of the product, is left out. Sums are f32,
 * in the order of k, the same for every element wherever its tile lies. Tile units take subnormals
 * as 0; a value that rounds to infinity in bf16 (above 3.39e38) gives NaN.
 *
 * Panels hold 1 KB tiles: A [tile row][step][part] with 16 rows of 32 inputs, B [tile
 * column][step][part] with 16 columns, inputs in pairs as the unit wants them; C [tile row][tile
 * column] of f32 [16,16]. A step is 32 inputs; what is missing is zero. */
#ifndef TMF_KERNELS_AMX_H
#define TMF_KERNELS_AMX_H

#include "kernels/vec.h"

#define AMX_TILE  16   /* rows and columns of a tile */
#define AMX_STEP  32   /* inputs */
#define AMX_BYTES 1024 /* a tile */
#define AMX_PARTS 2    /* hi, lo */

static inline int64_t amx_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

/* All eight tiles 16 x 64 bytes. Ends with _tile_release, or every task switch saves 8 KB. */
static inline void amx_begin(void)
{
    struct {
        uint8_t palette, start_row, reserved[14];
        uint16_t row_bytes[16];
        uint8_t rows[16];
    } c = {.palette = 1};
    for (int i = 0; i < 8; i++) {
        c.row_bytes[i] = 64;
        c.rows[i] = AMX_TILE;
    }
    _tile_loadconfig(&c);
}

/* 32 floats as bf16 hi and lo, in order. */
static inline void amx_split(vf x0, vf x1, __m512i *hi, __m512i *lo)
{
    const __m512i h = (__m512i)_mm512_cvtne2ps_pbh(x1, x0);
    const vf h0 = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(h)), 16));
    const vf h1 = _mm512_castsi512_ps(
        _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(h, 1)), 16));
    *hi = h;
    *lo = (__m512i)_mm512_cvtne2ps_pbh(vf_sub(x1, h1), vf_sub(x0, h0));
}

/* 32 f16 as bf16 hi and lo, the same bits as amx_split of their values: hi is the value rounded to
 * the nearest with 8 digits, ties to even; what is left is a number of -4..4 in the last place of
 * f16, exact in bf16, and looked up. False, and nothing written, where a value is 0 or subnormal,
 * infinite or not a number. */
static inline bool amx_split_f16(__m512i x, __m512i *hi, __m512i *lo)
{
    /* By the last 5 bits of a number of -4..4: it times 2^-25 as bf16. */
    const int16_t p1 = 102 << 7, p2 = 103 << 7, p3 = p2 + 64, p4 = 104 << 7;
    const int16_t m1 = (int16_t)(p1 | 0x8000), m2 = (int16_t)(p2 | 0x8000),
                  m3 = (int16_t)(p3 | 0x8000), m4 = (int16_t)(p4 | 0x8000);
    const __m512i rest = _mm512_set_epi16(m1, m2, m3, m4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                          0, 0, 0, 0, 0, 0, 0, 0, 0, p4, p3, p2, p1, 0);
    const __m512i sign = _mm512_and_si512(x, _mm512_set1_epi16((int16_t)0x8000));
    const __m512i mag = _mm512_xor_si512(x, sign);
    if (_mm512_cmpge_epu16_mask(_mm512_sub_epi16(mag, _mm512_set1_epi16(0x400)),
                                _mm512_set1_epi16(0x7800)))
        return false;
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(mag, 3), _mm512_set1_epi16(1));
    const __m512i up = _mm512_srli_epi16(
        _mm512_add_epi16(_mm512_add_epi16(mag, odd), _mm512_set1_epi16(3)), 3);
    const __m512i left = _mm512_sub_epi16(mag, _mm512_slli_epi16(up, 3));
    const __m512i place = _mm512_and_si512(_mm512_srli_epi16(mag, 3), _mm512_set1_epi16(0xf80));
    const __m512i small = _mm512_maskz_add_epi16(_mm512_test_epi16_mask(left, left), place,
                                                 _mm512_permutexvar_epi16(left, rest));
    *hi = _mm512_or_si512(sign, _mm512_add_epi16(up, _mm512_set1_epi16(112 << 7)));
    *lo = _mm512_xor_si512(sign, small);
    return true;
}

/* 16 x 16 dwords, rows to columns. */
static inline void amx_transpose(__m512i r[16])
{
    __m512i t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) { /* r[4i + c]: column c of each 128-bit lane, rows 4i.. */
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; c++) {
        const __m512i a = _mm512_shuffle_i32x4(r[c], r[4 + c], 0x88);
        const __m512i b = _mm512_shuffle_i32x4(r[c], r[4 + c], 0xdd);
        const __m512i d = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0x88);
        const __m512i f = _mm512_shuffle_i32x4(r[8 + c], r[12 + c], 0xdd);
        t[c] = _mm512_shuffle_i32x4(a, d, 0x88);
        t[4 + c] = _mm512_shuffle_i32x4(b, f, 0x88);
        t[8 + c] = _mm512_shuffle_i32x4(a, d, 0xdd);
        t[12 + c] = _mm512_shuffle_i32x4(b, f, 0xdd);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

static inline void amx_store_rows(uint8_t *tile, const __m512i r[16])
{
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(tile + 64 * i, r[i]);
}

/* ---- packing ---- */

/* Inputs [0, n) of a row as two vectors, n up to 32, the rest zero. */
static inline void amx_load32(const void *row, dtype dt, int64_t n, vf *x0, vf *x1)
{
    if (n >= AMX_STEP) {
        *x0 = vf_any(row, dt, 0);
        *x1 = vf_any(row, dt, VL);
        return;
    }
    *x0 = n >= VL ? vf_any(row, dt, 0) : vf_any_n(row, dt, 0, n);
    *x1 = n > VL ? vf_any_n(row, dt, VL, n - VL) : vf_zero();
}

/* One tile row of an A panel from `rows` <= 16 rows of k inputs: dst [steps][parts]. parts 1: bf16
 * as it is. Tile by tile: along the rows every store would take another line of the panel. */
static inline __attribute__((always_inline)) void amx_pack_a(uint8_t *dst, const void *src,
                                                             int64_t ld, dtype dt, int64_t rows,
                                                             int64_t k, int64_t steps, int parts)
{
    const size_t unit = dt == DT_F32 ? 4 : 2;
    for (int64_t s = 0; s < steps; s++, dst += parts * AMX_BYTES) {
        const char *p = (const char *)src + (size_t)(s * AMX_STEP) * unit;
        const int64_t left = k - s * AMX_STEP;
        const __mmask32 m = left >= AMX_STEP ? ~0u : left > 0 ? (1u << left) - 1 : 0;
        for (int64_t r = 0; r < AMX_TILE; r++) {
            __m512i hi = _mm512_setzero_si512(), lo = hi;
            if (r < rows && parts == 1) {
                hi = _mm512_maskz_loadu_epi16(m, p + (size_t)(r * ld) * unit);
            } else if (r < rows && left > 0 &&
                       !(dt == DT_F16 && left >= AMX_STEP &&
                         amx_split_f16(_mm512_loadu_si512(p + (size_t)(r * ld) * unit), &hi,
                                       &lo))) {
                vf x0, x1;
                amx_load32(p + (size_t)(r * ld) * unit, dt, left, &x0, &x1);
                amx_split(x0, x1, &hi, &lo);
            }
            _mm512_storeu_si512(dst + 64 * r, hi);
            if (parts == AMX_PARTS) _mm512_storeu_si512(dst + AMX_BYTES + 64 * r, lo);
        }
    }
}

/* One tile column of a B panel from rows <= 16 rows of x: dst [steps][2]. */
static inline void amx_pack_b_rows(uint8_t *dst, const float *x, int64_t ld, int64_t rows,
                                   int64_t k, int64_t steps)
{
    for (int64_t s = 0; s < steps; s++, dst += AMX_PARTS * AMX_BYTES) {
        __m512i hi[16], lo[16];
        for (int64_t r = 0; r < AMX_TILE; r++) {
            hi[r] = lo[r] = _mm512_setzero_si512();
            if (r < rows) {
                vf x0, x1;
                amx_load32(x + r * ld + s * AMX_STEP, DT_F32, k - s * AMX_STEP, &x0, &x1);
                amx_split(x0, x1, &hi[r], &lo[r]);
            }
        }
        amx_transpose(hi);
        amx_transpose(lo);
        amx_store_rows(dst, hi);
        amx_store_rows(dst + AMX_BYTES, lo);
    }
}

/* Two rows of 16 floats, one behind the other in k, as 16 pairs of bf16. */
static inline void amx_split_pair(vf even, vf odd, __m512i *hi, __m512i *lo)
{
    /* cvtne2 gives 16 evens, then 16 odds: this takes one of each in turn. */
    const __m512i turn = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                          8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16,
                                          0);
    amx_split(even, odd, hi, lo);
    *hi = _mm512_permutexvar_epi16(turn, *hi);
    *lo = _mm512_permutexvar_epi16(turn, *lo);
}

/* One step of a B tile from k <= 32 rows of cols <= 16 columns, times `scale`. */
static inline void amx_pack_b_cols(__m512i hi[16], __m512i lo[16], const float *x, int64_t ld,
                                   int64_t cols, int64_t k, float scale)
{
    const vf f = vf_set(scale);
    for (int64_t p = 0; p < 16; p++) {
        const vf even = 2 * p < k ? vf_load_n(x + 2 * p * ld, cols) : vf_zero();
        const vf odd = 2 * p + 1 < k ? vf_load_n(x + (2 * p + 1) * ld, cols) : vf_zero();
        amx_split_pair(vf_mul(even, f), vf_mul(odd, f), &hi[p], &lo[p]);
    }
}

/* ---- products ---- */

/* Not all compilers know that a tile load reads memory: panels must be written before, sums after.
 */
#define AMX_FENCE() __asm__ volatile("" : : : "memory")

typedef struct {
    float *c;              /* [rows][columns] tiles */
    const uint8_t *a, *b;  /* at the first step of this block */
    int64_t rows, columns; /* of tiles; rows a multiple of 4 */
    int64_t steps;
    int64_t a_pitch, b_pitch; /* bytes from one tile row (column) of the panel to the next */
    int a_parts;
    bool first; /* c begins at zero */
} amx_job;

/* C of rows i, i+1 by columns j, j+1: eight tile registers, four of them sums. */
static inline void amx_2x2(const amx_job *w, int64_t i, int64_t j)
{
    float *c0 = w->c + (i * w->columns + j) * 256, *c1 = c0 + w->columns * 256;
    const uint8_t *a0 = w->a + i * w->a_pitch, *a1 = a0 + w->a_pitch;
    const uint8_t *b0 = w->b + j * w->b_pitch, *b1 = b0 + w->b_pitch;
    if (w->first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c0, 64);
        _tile_loadd(1, c0 + 256, 64);
        _tile_loadd(2, c1, 64);
        _tile_loadd(3, c1 + 256, 64);
    }
    for (int64_t s = 0; s < w->steps; s++) {
        _tile_loadd(4, a0, 64);
        _tile_loadd(6, b0 + AMX_BYTES, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + AMX_BYTES, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        _tile_loadd(6, b0, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
        if (w->a_parts == AMX_PARTS) {
            _tile_loadd(4, a0 + AMX_BYTES, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_dpbf16ps(1, 4, 7);
            _tile_loadd(5, a1 + AMX_BYTES, 64);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
        a0 += w->a_parts * AMX_BYTES;
        a1 += w->a_parts * AMX_BYTES;
        b0 += AMX_PARTS * AMX_BYTES;
        b1 += AMX_PARTS * AMX_BYTES;
    }
    _tile_stored(0, c0, 64);
    _tile_stored(1, c0 + 256, 64);
    _tile_stored(2, c1, 64);
    _tile_stored(3, c1 + 256, 64);
}

/* One row tile, its rows `pitch` bytes apart, against the B tiles in 6 (hi) and 7 (lo): the same
 * order of products as amx_2x2. */
#define AMX_ROW(sum, tile, a, pitch)                \
    do {                                            \
        _tile_loadd(tile, a, pitch);                \
        _tile_dpbf16ps(sum, tile, 7);               \
        _tile_dpbf16ps(sum, tile, 6);               \
        if (w->a_parts == AMX_PARTS) {              \
            _tile_loadd(tile, (a) + AMX_BYTES, 64); \
            _tile_dpbf16ps(sum, tile, 6);           \
        }                                           \
    } while (0)

/* C of rows i..i+3 by column j: up to 16 tokens. */
static inline void amx_4x1(const amx_job *w, int64_t i, int64_t j)
{
    float *c = w->c + (i * w->columns + j) * 256;
    const int64_t pitch = w->columns * 256;
    const uint8_t *a = w->a + i * w->a_pitch, *b = w->b + j * w->b_pitch;
    if (w->first) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, c, 64);
        _tile_loadd(1, c + pitch, 64);
        _tile_loadd(2, c + 2 * pitch, 64);
        _tile_loadd(3, c + 3 * pitch, 64);
    }
    for (int64_t s = 0; s < w->steps; s++) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + AMX_BYTES, 64);
        AMX_ROW(0, 4, a, 64);
        AMX_ROW(1, 5, a + w->a_pitch, 64);
        AMX_ROW(2, 4, a + 2 * w->a_pitch, 64);
        AMX_ROW(3, 5, a + 3 * w->a_pitch, 64);
        a += w->a_parts * AMX_BYTES;
        b += AMX_PARTS * AMX_BYTES;
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + pitch, 64);
    _tile_stored(2, c + 2 * pitch, 64);
    _tile_stored(3, c + 3 * pitch, 64);
}

/* The same sums for 64 rows of bf16 that lie `ld` apart in memory and up to 16 tokens, all steps at
 * once: nothing is packed, which is worth it where each weight is used once. Fetching ahead in
 * software loses: 16 to 20 GB/s a core, without it 21. */
static inline void amx_4x1_bf16(float *c, const bf16 *rows, int64_t ld, const uint8_t *b,
                                int64_t steps)
{
    const struct {
        int a_parts;
    } one = {1}, *w = &one;
    const int64_t pitch = ld * 2, tile = AMX_TILE * pitch;
    const char *a = (const char *)rows;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t s = 0; s < steps; s++, a += 64, b += AMX_PARTS * AMX_BYTES) {
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + AMX_BYTES, 64);
        AMX_ROW(0, 4, a, pitch);
        AMX_ROW(1, 5, a + tile, pitch);
        AMX_ROW(2, 4, a + 2 * tile, pitch);
        AMX_ROW(3, 5, a + 3 * tile, pitch);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

/* A tile of weights, 16 rows of f16 `ld` apart, as hi and lo. */
static inline void amx_pack_f16(uint8_t *dst, const f16 *w, int64_t ld)
{
#pragma GCC unroll 4
    for (int64_t r = 0; r < AMX_TILE; r++) {
        __m512i hi, lo;
        if (!amx_split_f16(_mm512_loadu_si512(w + r * ld), &hi, &lo))
            amx_split(vf_f16(w + r * ld), vf_f16(w + r * ld + VL), &hi, &lo);
        _mm512_storeu_si512(dst + 64 * r, hi);
        _mm512_storeu_si512(dst + AMX_BYTES + 64 * r, lo);
    }
}

/* The same for f16: the tiles of the next step are split while those of this one are multiplied. */
static inline void amx_4x1_f16(float *c, const f16 *rows, int64_t ld, const uint8_t *b,
                               int64_t steps, uint8_t *scratch)
{
    const struct {
        int a_parts;
    } one = {AMX_PARTS}, *w = &one;
    const int64_t tile = AMX_TILE * ld;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < 4; i++)
        amx_pack_f16(scratch + i * AMX_PARTS * AMX_BYTES, rows + i * tile, ld);
    for (int64_t s = 0; s < steps; s++, b += AMX_PARTS * AMX_BYTES) {
        uint8_t *now = scratch + (s & 1) * 4 * AMX_PARTS * AMX_BYTES;
        uint8_t *then = scratch + (~s & 1) * 4 * AMX_PARTS * AMX_BYTES;
        const f16 *next = rows + (s + 1 < steps ? (s + 1) * AMX_STEP : 0);
        _tile_loadd(6, b, 64);
        _tile_loadd(7, b + AMX_BYTES, 64);
        AMX_ROW(0, 4, now, 64);
        amx_pack_f16(then, next, ld);
        AMX_ROW(1, 5, now + 2 * AMX_BYTES, 64);
        amx_pack_f16(then + 2 * AMX_BYTES, next + tile, ld);
        AMX_ROW(2, 4, now + 4 * AMX_BYTES, 64);
        amx_pack_f16(then + 4 * AMX_BYTES, next + 2 * tile, ld);
        AMX_ROW(3, 5, now + 6 * AMX_BYTES, 64);
        amx_pack_f16(then + 6 * AMX_BYTES, next + 3 * tile, ld);
        AMX_FENCE();
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + 256, 64);
    _tile_stored(2, c + 512, 64);
    _tile_stored(3, c + 768, 64);
}

static inline void amx_block(const amx_job *w)
{
    int64_t j = 0;
    AMX_FENCE();
    for (; j + 2 <= w->columns; j += 2) {
        for (int64_t i = 0; i < w->rows; i += 2) amx_2x2(w, i, j);
    }
    if (j < w->columns) {
        for (int64_t i = 0; i < w->rows; i += 4) amx_4x1(w, i, j);
    }
    AMX_FENCE();
}

#endif
