/* W4 rows on AVX2: activations as int16, products and pair sums by vpmaddwd. Same sums and the same
 * order of float operations as gemm_w4_vnni.c, so the same bits. */
#include <assert.h>
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_w4.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { PREFETCH = 4096, ROWS = 4 };

/* ---- activations: a line is 32 int16, each eight k in the order 0 2 1 3 4 6 5 7 ---- */

INLINE uint32_t group_max(const float *x, int group)
{
    const __m256i sign = _mm256_set1_epi32((int)0x80000000u);
    __m256i top = _mm256_setzero_si256();
    for (int k = 0; k < group; k += 8) {
        const __m256i v = _mm256_castps_si256(_mm256_loadu_ps(x + k));
        top = _mm256_max_epu32(top, _mm256_andnot_si256(sign, v));
    }
    __m128i t = _mm_max_epu32(_mm256_castsi256_si128(top), _mm256_extracti128_si256(top, 1));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0x4e));
    t = _mm_max_epu32(t, _mm_shuffle_epi32(t, 0xb1));
    return (uint32_t)_mm_cvtsi128_si32(t);
}

INLINE int32_t sum_lanes(__m256i v)
{
    __m128i t = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
    t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xb1)));
}

static void quantize_group(const float *x, int group, uint8_t *line, int step, float param[2])
{
    const w4_x_scale s = w4_x_scale_of(group_max(x, group));
    const __m256 inv = _mm256_set1_ps(s.inv);
    const __m256i order = _mm256_setr_epi32(0, 2, 1, 3, 4, 6, 5, 7);
    /* With inv 0 a NaN or infinity must not reach the integer: mask it away. */
    const __m256i on = _mm256_set1_epi32(s.inv != 0.0f ? -1 : 0);
    __m256i sum = _mm256_setzero_si256();
    for (int k = 0; k < group; k += W4_CHUNK_K, line += step) {
        UNROLL for (int i = 0; i < 2; i++)
        {
            __m256i q[2];
            UNROLL for (int j = 0; j < 2; j++)
            {
                const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(x + k + 16 * i + 8 * j), inv);
                q[j] = _mm256_and_si256(_mm256_cvtps_epi32(v), on);
                sum = _mm256_add_epi32(sum, q[j]);
                q[j] = _mm256_permutevar8x32_epi32(q[j], order);
            }
            const __m256i p = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
            _mm256_store_si256((__m256i *)(void *)(line + 32 * i), p);
        }
    }
    param[0] = s.scale;
    param[1] = (float)sum_lanes(sum);
}

static int block_rows(const w4_call *c, int64_t row)
{
    return c->m - row < ROWS ? (int)(c->m - row) : ROWS;
}

static void quantize(const w4_call *c, int64_t row, int stored)
{
    const int group = c->w.group, step = stored * 64;
    float *param = w4_block_param(c, row);
    for (int r = 0; r < stored; r++) {
        const float *in = c->in + (row + r) * c->in_stride;
        uint8_t *line = w4_block_x(c, row) + r * 64;
        for (int g = 0; g < c->w.groups; g++) {
            quantize_group(in + (int64_t)g * group, group, line, step,
                           param + ((size_t)g * (size_t)stored + (size_t)r) * 2);
            line += (size_t)(group / W4_CHUNK_K) * (size_t)step;
        }
    }
}

/* ---- tiles: two halves of eight outputs ---- */

INLINE __m256 load_f16(const uint8_t *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}

INLINE __m256 load_zeros(const w4_tiles *w, const uint8_t *tile, int g, int half)
{
    if (w->zeros_f16) return load_f16(tile + w->zeros_at + (size_t)g * 32 + 16 * half);
    int32_t b;
    memcpy(&b, tile + w->zeros_at + g * 8 + 4 * half, 4);
    const __m256i places = _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28);
    const __m256i n = _mm256_srlv_epi32(_mm256_set1_epi32(b), places);
    return _mm256_cvtepi32_ps(_mm256_and_si256(n, _mm256_set1_epi32(15)));
}

/* Even and odd bytes of the low and high nibbles: pairs of k (0,2), (1,3), (4,6), (5,7). */
INLINE __m256i pick(__m256i v, int pair)
{
    const __m256i nibble = _mm256_set1_epi16(15);
    if (pair == 0) return _mm256_and_si256(v, nibble);
    if (pair == 1) return _mm256_and_si256(_mm256_srli_epi16(v, 8), nibble);
    if (pair == 2) return _mm256_and_si256(_mm256_srli_epi16(v, 4), nibble);
    return _mm256_srli_epi16(v, 12);
}

INLINE void group_dot(__m256i *acc, const uint8_t *const *codes, const uint8_t *x, int chunks,
                      const int R, const int T)
{
    UNROLL for (int i = 0; i < R * T * 2; i++) acc[i] = _mm256_setzero_si256();
    for (int c = 0; c < chunks; c++, x += 64 * R) {
        for (int s = 0; s < 4; s++) {
            UNROLL for (int t = 0; t < T; t++)
            {
                const uint8_t *p = codes[t] + c * 256 + s * 64;
                const __m256i v0 = _mm256_load_si256((const __m256i *)(const void *)p);
                const __m256i v1 = _mm256_load_si256((const __m256i *)(const void *)(p + 32));
                _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
                UNROLL for (int j = 0; j < 4; j++)
                {
                    const __m256i q0 = pick(v0, j), q1 = pick(v1, j);
                    UNROLL for (int r = 0; r < R; r++)
                    {
                        int32_t pair;
                        memcpy(&pair, x + 64 * r + 16 * s + 4 * j, 4);
                        const __m256i b = _mm256_set1_epi32(pair);
                        __m256i *a = acc + (r * T + t) * 2;
                        a[0] = _mm256_add_epi32(a[0], _mm256_madd_epi16(q0, b));
                        a[1] = _mm256_add_epi32(a[1], _mm256_madd_epi16(q1, b));
                    }
                }
            }
        }
    }
}

INLINE void put_half(const w4_call *c, int64_t n, int64_t row, __m256 v)
{
    if (n >= c->w.n) return; /* n is a multiple of 8: a half is whole or absent */
    float *y = c->y + row * c->y_stride + n;
    if (c->bias) v = _mm256_add_ps(v, _mm256_loadu_ps(c->bias + n));
    if (c->add) v = _mm256_add_ps(_mm256_loadu_ps(y), v);
    _mm256_storeu_ps(y, v);
}

/* The step from a group's integers to the outputs: sum of the zeros off, both scales on. */
INLINE __m256 group_add(__m256 out, __m256i acc, __m256 zero, __m256 scale, const float param[2])
{
    __m256 f = _mm256_cvtepi32_ps(acc);
    f = _mm256_fnmadd_ps(zero, _mm256_set1_ps(param[1]), f);
    f = _mm256_mul_ps(f, _mm256_set1_ps(param[0]));
    return _mm256_fmadd_ps(f, scale, out);
}

INLINE void rows_tiles(const w4_call *c, int64_t tile, int64_t apart, int64_t row, const int R,
                       const int T)
{
    const w4_tiles *w = &c->w;
    const int chunks = w->group / W4_CHUNK_K;
    const uint8_t *x = w4_block_x(c, row), *base[2], *codes[2];
    const float *param = w4_block_param(c, row);
    __m256 out[2 * ROWS];
    UNROLL for (int i = 0; i < R * T * 2; i++) out[i] = _mm256_setzero_ps();
    UNROLL for (int t = 0; t < T; t++)
    {
        base[t] = w->base + (size_t)(tile + t * apart) * w->tile_bytes;
        codes[t] = base[t] + w->codes_at;
        for (size_t at = 0; at < w->codes_at; at += 64)
            _mm_prefetch((const char *)base[t] + PREFETCH + at, _MM_HINT_T0);
    }
    for (int g = 0; g < w->groups; g++, param += 2 * R) {
        __m256i acc[2 * ROWS];
        group_dot(acc, codes, x, chunks, R, T);
        x += (size_t)(64 * R * chunks);
        UNROLL for (int t = 0; t < T; t++)
        {
            codes[t] += 256 * chunks;
            UNROLL for (int h = 0; h < 2; h++)
            {
                const __m256 z = load_zeros(w, base[t], g, h);
                const __m256 s = load_f16(base[t] + (size_t)g * 32 + 16 * h);
                UNROLL for (int r = 0; r < R; r++)
                {
                    const int i = (r * T + t) * 2 + h;
                    out[i] = group_add(out[i], acc[i], z, s, param + 2 * r);
                }
            }
        }
    }
    UNROLL for (int i = 0; i < R * T * 2; i++)
        put_half(c, (tile + i / 2 % T * apart) * W4_TILE_N + i % 2 * 8, row + i / (2 * T), out[i]);
}

static void rows_of(const w4_call *c, int64_t tile, int64_t tiles, int64_t row, int rows)
{
    const int64_t half = tiles / 2;
    if (rows <= 2) { /* bound by memory: two streams */
        for (int64_t t = 0; t < half; t++) {
            if (rows == 1) rows_tiles(c, tile + t, half, row, 1, 2);
            if (rows == 2) rows_tiles(c, tile + t, half, row, 2, 2);
        }
        tile += 2 * half;
        tiles -= 2 * half;
    }
    for (int64_t t = tile; t < tile + tiles; t++) {
        if (rows == 1) rows_tiles(c, t, 0, row, 1, 1);
        if (rows == 2) rows_tiles(c, t, 0, row, 2, 1);
        if (rows == 3) rows_tiles(c, t, 0, row, 3, 1);
        if (rows == 4) rows_tiles(c, t, 0, row, 4, 1);
    }
}

static void compute(const w4_call *c, int64_t tile, int64_t tiles, int worker)
{
    (void)worker;
    for (int64_t row = 0; row < c->m; row += block_rows(c, row))
        rows_of(c, tile, tiles, row, block_rows(c, row));
}

const w4_kernels w4_kernels_avx2 = {block_rows, quantize, compute};
