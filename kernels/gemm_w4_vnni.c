/* W4 rows by byte dot products (vpdpbusd), compiled for AVX-512 VNNI and for AVX-VNNI: a few rows
 * against several streams of tiles. Codes are unpacked in registers and serve all rows of the
 * block, so decode and prefill read the same bytes. One product takes four k of a register of
 * outputs, the activation's four bytes are broadcast. */
#include <assert.h>
#include <immintrin.h>
#include <string.h>

#include "kernels/cpu.h"
#include "kernels/gemm_w4.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* ---- one name for both widths ---- */

#if defined(__AVX512VNNI__)
enum { LANES = 16, ROWS = 8, SUMS = 16, TWO_SUMS = 8 }; /* SUMS: registers kept for a block */
typedef __m512i vi;
typedef __m512 vf;
#define VI(op) _mm512_##op
INLINE vi vi_zero(void) { return _mm512_setzero_si512(); }
INLINE vi vi_load(const void *p) { return _mm512_load_si512(p); }
INLINE vi vi_and(vi a, vi b) { return _mm512_and_si512(a, b); }
INLINE vi vi_max(vi a, vi b) { return _mm512_max_epu32(a, b); }
INLINE uint32_t vi_top(vi a) { return _mm512_reduce_max_epu32(a); }
INLINE int32_t vi_sum(vi a) { return _mm512_reduce_add_epi32(a); }
INLINE vi vi_dot(vi c, vi a, vi b) { return _mm512_dpbusd_epi32(c, a, b); }
INLINE vi vi_bits(vf a) { return _mm512_castps_si512(a); }
INLINE void vi_store8(uint8_t *p, vi a)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm512_cvtepi32_epi8(a));
}
INLINE vf vf_f16(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
INLINE vf vf_u4(const uint8_t *p) /* nibbles, low first */
{
    const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)p), m = _mm_set1_epi8(15);
    const __m128i high = _mm_and_si128(_mm_srli_epi16(b, 4), m);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(b, m), high)));
}
#else
enum { LANES = 8, ROWS = 4, SUMS = 8, TWO_SUMS = 4 };
typedef __m256i vi;
typedef __m256 vf;
#define VI(op) _mm256_##op
INLINE vi vi_zero(void) { return _mm256_setzero_si256(); }
INLINE vi vi_load(const void *p) { return _mm256_load_si256(p); }
INLINE vi vi_and(vi a, vi b) { return _mm256_and_si256(a, b); }
INLINE vi vi_max(vi a, vi b) { return _mm256_max_epu32(a, b); }
INLINE uint32_t vi_top(vi a)
{
    __m128i t = _mm_max_epu32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0x4e));
    return (uint32_t)_mm_cvtsi128_si32(_mm_max_epu32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INLINE int32_t vi_sum(vi a)
{
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}
INLINE vi vi_dot(vi c, vi a, vi b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
INLINE vi vi_bits(vf a) { return _mm256_castps_si256(a); }
INLINE void vi_store8(uint8_t *p, vi a)
{
    const __m128i w = _mm_packs_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    _mm_storel_epi64((__m128i *)(void *)p, _mm_packs_epi16(w, w));
}
INLINE vf vf_f16(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
INLINE vf vf_u4(const uint8_t *p)
{
    int32_t b;
    memcpy(&b, p, 4);
    const __m256i at = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i n = _mm256_srlv_epi32(_mm256_set1_epi32(b), at);
    return _mm256_cvtepi32_ps(_mm256_and_si256(n, _mm256_set1_epi32(15)));
}
#endif
enum { PARTS = W4_TILE_N / LANES }; /* registers of one tile */

/* Bytes that a stream of tiles is fetched ahead: about 250 ns at the rate of one core. */
enum { PREFETCH = 4096 };

/* ---- activations ---- */

/* One group of one row; its lines are `step` bytes apart. */
static void quantize_group(const float *x, int group, uint8_t *line, int step, float param[2])
{
    const vi magnitude = VI(set1_epi32)(0x7fffffff);
    vi top = vi_zero(), sum = vi_zero();
    for (int k = 0; k < group; k += LANES) /* as bits: infinities and NaN come out on top */
        top = vi_max(top, vi_and(vi_bits(VI(loadu_ps)(x + k)), magnitude));
    const w4_x_scale s = w4_x_scale_of(vi_top(top));
    const vf inv = VI(set1_ps)(s.inv);
    /* With inv 0 the integer of a NaN or an infinity must not count. */
    const vi on = VI(set1_epi32)(s.inv != 0.0f ? -1 : 0);
    for (int k = 0; k < group; k += W4_CHUNK_K, line += step) {
        UNROLL for (int i = 0; i < W4_CHUNK_K; i += LANES)
        {
            const vi q = vi_and(VI(cvtps_epi32)(VI(mul_ps)(VI(loadu_ps)(x + k + i), inv)), on);
            const vi hi = VI(srai_epi32)(VI(add_epi32)(q, VI(set1_epi32)(8)), 4);
            vi_store8(line + i, hi);
            vi_store8(line + 32 + i, VI(sub_epi32)(q, VI(slli_epi32)(hi, 4)));
            sum = VI(add_epi32)(sum, q);
        }
    }
    param[0] = s.scale;
    param[1] = (float)vi_sum(sum);
}

static void zero_group(int group, uint8_t *line, int step, float param[2])
{
    for (int k = 0; k < group; k += W4_CHUNK_K, line += step) memset(line, 0, 64);
    param[0] = param[1] = 0.0f;
}

void CPU_FN(w4_quantize)(const w4_call *c, int64_t row, int stored)
{
    const int group = c->w.group, step = stored * 64;
    float *param = w4_block_param(c, row);
    for (int r = 0; r < stored; r++) {
        const float *in = c->in + (row + r) * c->in_stride;
        uint8_t *line = w4_block_x(c, row) + r * 64;
        for (int g = 0; g < c->w.groups; g++) {
            float *p = param + ((size_t)g * (size_t)stored + (size_t)r) * 2;
            if (row + r < c->m)
                quantize_group(in + (int64_t)g * group, group, line, step, p);
            else
                zero_group(group, line, step, p);
            line += (size_t)(group / W4_CHUNK_K) * (size_t)step;
        }
    }
}

static int block_rows(const w4_call *c, int64_t row)
{
    return c->m - row < ROWS ? (int)(c->m - row) : ROWS;
}

/* ---- tiles ---- */

INLINE vi broadcast4(const uint8_t *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return VI(set1_epi32)(v);
}

/* Sums X*q of one group: register p of tile t and row r is acc[(r*T + t)*PARTS + p]. A block of few
 * registers keeps a sum of each plane; a large one shifts the codes, which then serve all its rows.
 */
INLINE void group_dot(vi *acc, const uint8_t *const *codes, const uint8_t *x, int chunks,
                      const int R, const int T)
{
    const int V = T * PARTS;
    const bool two_sums = R * V <= TWO_SUMS;
    const vi nibble = VI(set1_epi8)(15);
    vi low[SUMS];
    UNROLL for (int i = 0; i < R * V; i++) acc[i] = low[i] = vi_zero();
    for (int c = 0; c < chunks; c++, x += 64 * R) {
        for (int s = 0; s < 4; s++) {
            vi v[SUMS];
            UNROLL for (int i = 0; i < V; i++)
            {
                const uint8_t *p = codes[i / PARTS] + c * 256 + s * 64 + i % PARTS * LANES * 4;
                v[i] = vi_load(p);
                if (i % PARTS == 0) _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
            }
            UNROLL for (int h = 0; h < 2; h++)
            {
                vi q[SUMS], qh[SUMS];
                UNROLL for (int i = 0; i < V; i++)
                {
                    q[i] = vi_and(h ? VI(srli_epi16)(v[i], 4) : v[i], nibble);
                    qh[i] = two_sums ? q[i] : VI(slli_epi16)(q[i], 4);
                }
                UNROLL for (int r = 0; r < R; r++)
                {
                    const uint8_t *p = x + 64 * r + 8 * s + 4 * h;
                    const vi xh = broadcast4(p), xl = broadcast4(p + 32);
                    UNROLL for (int i = 0; i < V; i++)
                    {
                        vi *a = &acc[r * V + i], *l = two_sums ? &low[r * V + i] : a;
                        *a = vi_dot(*a, qh[i], xh);
                        *l = vi_dot(*l, q[i], xl);
                    }
                }
            }
        }
    }
    if (!two_sums) return;
    UNROLL for (int i = 0; i < R * V; i++)
        acc[i] = VI(add_epi32)(VI(slli_epi32)(acc[i], 4), low[i]);
}

/* Outputs n.. of one row. n and the weight's n are multiples of 8. */
INLINE void put_outputs(const w4_call *c, int64_t n, int64_t row, vf v)
{
    float *y = c->y + row * c->y_stride + n;
    if (n >= c->w.n) return;
#if defined(__AVX512VNNI__)
    const __mmask16 on = c->w.n - n >= LANES ? 0xffff : 0xff;
    if (c->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(on, c->bias + n));
    if (c->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(on, y), v);
    _mm512_mask_storeu_ps(y, on, v);
#else
    if (c->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(c->bias + n));
    if (c->add) v = _mm256_add_ps(_mm256_loadu_ps(y), v);
    _mm256_storeu_ps(y, v);
#endif
}

/* Group g of one register of outputs, all rows: the sum of the zeros off, both scales on. */
INLINE void add_group(vf *out, const vi *acc, const w4_tiles *w, const uint8_t *tile, int g,
                      int part, const float *param, const int R, const int V)
{
    const vf scale = vf_f16(tile + (size_t)g * 32 + part * LANES * 2);
    const vf zero = w->zeros_f16 ? vf_f16(tile + w->zeros_at + (size_t)g * 32 + part * LANES * 2)
                                 : vf_u4(tile + w->zeros_at + (size_t)g * 8 + part * LANES / 2);
    UNROLL for (int r = 0; r < R; r++)
    {
        vf f = VI(cvtepi32_ps)(acc[r * V]);
        f = VI(fnmadd_ps)(zero, VI(set1_ps)(param[2 * r + 1]), f);
        f = VI(mul_ps)(f, VI(set1_ps)(param[2 * r]));
        out[r * V] = VI(fmadd_ps)(f, scale, out[r * V]);
    }
}

/* R rows from `row` against T tiles, `apart` tiles from one to the next. */
INLINE void rows_tiles(const w4_call *c, int64_t tile, int64_t apart, int64_t row, const int R,
                       const int T)
{
    const int V = T * PARTS;
    const w4_tiles *w = &c->w;
    const int chunks = w->group / W4_CHUNK_K;
    const uint8_t *x = w4_block_x(c, row), *base[4], *codes[4];
    const float *param = w4_block_param(c, row);
    vf out[SUMS];
    UNROLL for (int i = 0; i < R * V; i++) out[i] = VI(setzero_ps)();
    UNROLL for (int t = 0; t < T; t++)
    {
        base[t] = w->base + (size_t)(tile + t * apart) * w->tile_bytes;
        codes[t] = base[t] + w->codes_at;
        for (size_t at = 0; at < w->codes_at; at += 64)
            _mm_prefetch((const char *)base[t] + PREFETCH + at, _MM_HINT_T0);
    }
    for (int g = 0; g < w->groups; g++, param += 2 * R) {
        vi acc[SUMS];
        group_dot(acc, codes, x, chunks, R, T);
        x += (size_t)(64 * R * chunks);
        UNROLL for (int i = 0; i < V; i++)
            add_group(out + i, acc + i, w, base[i / PARTS], g, i % PARTS, param, R, V);
        UNROLL for (int t = 0; t < T; t++) codes[t] += 256 * chunks;
    }
    UNROLL for (int i = 0; i < R * V; i++)
    {
        const int64_t t = tile + i % V / PARTS * apart;
        put_outputs(c, t * W4_TILE_N + i % PARTS * LANES, row + i / V, out[i]);
    }
}

/* Several streams of tiles read faster than one: each walks its own part of the range. */
#define ROWS_FN(R, STREAMS)                                                                     \
    static void rows_##R(const w4_call *c, int64_t tile, int64_t tiles, int64_t row)            \
    {                                                                                           \
        const int64_t each = tiles / (STREAMS);                                                 \
        for (int64_t t = 0; t < each; t++) rows_tiles(c, tile + t, each, row, R, STREAMS);      \
        for (int64_t t = (STREAMS)*each; t < tiles; t++) rows_tiles(c, tile + t, 0, row, R, 1); \
    }
#if defined(__AVX512VNNI__)
ROWS_FN(1, 4)
ROWS_FN(2, 4)
ROWS_FN(3, 4)
ROWS_FN(4, 4)
ROWS_FN(5, 2)
ROWS_FN(6, 2)
ROWS_FN(7, 2)
ROWS_FN(8, 2)
#else
ROWS_FN(1, 4)
ROWS_FN(2, 2)
ROWS_FN(3, 1)
ROWS_FN(4, 1)
#endif

void CPU_FN(w4_rows)(const w4_call *c, int64_t tile, int64_t tiles, int64_t row, int rows)
{
    static void (*const fn[ROWS])(const w4_call *, int64_t, int64_t, int64_t) = {
        rows_1,
        rows_2,
        rows_3,
        rows_4,
#if defined(__AVX512VNNI__)
        rows_5,
        rows_6,
        rows_7,
        rows_8
#endif
    };
    assert(rows >= 1 && rows <= ROWS);
    fn[rows - 1](c, tile, tiles, row);
}

static void compute(const w4_call *c, int64_t tile, int64_t tiles, int worker)
{
    (void)worker;
    for (int64_t row = 0; row < c->m; row += block_rows(c, row))
        CPU_FN(w4_rows)(c, tile, tiles, row, block_rows(c, row));
}

const w4_kernels CPU_FN(w4_kernels) = {block_rows, CPU_FN(w4_quantize), compute};
