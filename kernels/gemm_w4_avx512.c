/* W4 rows on AVX-512 VNNI: up to eight rows against two streams of tiles. Codes are unpacked in
 * registers and used for all rows of the block, so that decode and prefill read the same bytes.
 * One byte dot product takes four k of 16 outputs; the activation's four bytes are broadcast. */
#include <assert.h>
#include <immintrin.h>
#include <math.h>
#include <string.h>

#include "kernels/gemm_w4.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

/* Bytes that a stream of tiles is fetched ahead: about 250 ns at the rate of one core. */
enum { PREFETCH = 4096 };

/* ---- activations ---- */

INLINE __m512 load_abs(const float *p) { return _mm512_abs_ps(_mm512_loadu_ps(p)); }

/* Largest magnitude as bits, so that infinities and NaN come out on top. */
INLINE uint32_t group_max(const float *x, int group)
{
    __m512i top = _mm512_setzero_si512();
    for (int k = 0; k < group; k += 16)
        top = _mm512_max_epu32(top, _mm512_castps_si512(load_abs(x + k)));
    return _mm512_reduce_max_epu32(top);
}

/* One group of one row; its lines are `step` bytes apart. */
static void quantize_group(const float *x, int group, uint8_t *line, int step, float param[2])
{
    const w4_x_scale s = w4_x_scale_of(group_max(x, group));
    const __m512 inv = _mm512_set1_ps(s.inv);
    __m512i sum = _mm512_setzero_si512();
    for (int k = 0; k < group; k += W4_CHUNK_K, line += step) {
        UNROLL for (int i = 0; i < 2; i++)
        {
            const __m512 v = _mm512_loadu_ps(x + k + 16 * i);
            /* With inv 0 a NaN or infinity must not reach the integer: mask it away. */
            const __mmask16 on = s.inv != 0.0f ? 0xffff : 0;
            const __m512i q = _mm512_maskz_cvtps_epi32(on, _mm512_mul_ps(v, inv));
            const __m512i hi = _mm512_srai_epi32(_mm512_add_epi32(q, _mm512_set1_epi32(8)), 4);
            const __m512i lo = _mm512_sub_epi32(q, _mm512_slli_epi32(hi, 4));
            _mm_store_si128((__m128i *)(void *)(line + 16 * i), _mm512_cvtepi32_epi8(hi));
            _mm_store_si128((__m128i *)(void *)(line + 32 + 16 * i), _mm512_cvtepi32_epi8(lo));
            sum = _mm512_add_epi32(sum, q);
        }
    }
    param[0] = s.scale;
    param[1] = (float)_mm512_reduce_add_epi32(sum);
}

void w4_quantize_avx512(const w4_call *c, int64_t row, int stored)
{
    const int group = c->w.group, step = stored * 64;
    uint8_t *x = w4_block_x(c, row);
    float *param = w4_block_param(c, row);
    for (int r = 0; r < stored; r++) {
        const bool valid = row + r < c->m;
        const float *in = c->in + (row + r) * c->in_stride;
        for (int g = 0; g < c->w.groups; g++) {
            uint8_t *line = x + (size_t)(g * (group / W4_CHUNK_K)) * (size_t)step + r * 64;
            float *p = param + ((size_t)g * (size_t)stored + (size_t)r) * 2;
            if (valid) {
                quantize_group(in + (int64_t)g * group, group, line, step, p);
                continue;
            }
            for (int i = 0; i < group / W4_CHUNK_K; i++) memset(line + i * step, 0, 64);
            p[0] = p[1] = 0.0f;
        }
    }
}

static int block_rows(const w4_call *c, int64_t row)
{
    return c->m - row < W4_ROWS ? (int)(c->m - row) : W4_ROWS;
}

/* ---- tiles ---- */

INLINE __m512 load_f16(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

INLINE __m512 load_zeros(const w4_tiles *w, const uint8_t *tile, int g)
{
    if (w->zeros_f16) return load_f16(tile + w->zeros_at + (size_t)g * 32);
    const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)(tile + w->zeros_at + g * 8));
    const __m128i m = _mm_set1_epi8(15);
    const __m128i n = _mm_unpacklo_epi8(_mm_and_si128(b, m),
                                        _mm_and_si128(_mm_srli_epi16(b, 4), m));
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(n));
}

INLINE __m512i broadcast4(const uint8_t *p)
{
    int32_t v;
    memcpy(&v, p, 4);
    return _mm512_set1_epi32(v);
}

/* Sums X*q of one group into acc[R*T]. A block of few rows has registers for a sum of each plane; a
 * large one shifts the codes instead, which then serve all its rows. */
INLINE void group_dot(__m512i *acc, const uint8_t *const *codes, const uint8_t *x, int chunks,
                      const int R, const int T)
{
    const bool two_sums = R * T <= 8;
    const __m512i nibble = _mm512_set1_epi8(15);
    __m512i low[16];
    UNROLL for (int i = 0; i < R * T; i++) acc[i] = low[i] = _mm512_setzero_si512();
    for (int c = 0; c < chunks; c++, x += 64 * R) {
        for (int s = 0; s < 4; s++) {
            __m512i q[2][2];
            UNROLL for (int t = 0; t < T; t++)
            {
                const uint8_t *p = codes[t] + c * 256 + s * 64;
                const __m512i v = _mm512_load_si512(p);
                _mm_prefetch((const char *)p + PREFETCH, _MM_HINT_T0);
                q[t][0] = _mm512_and_si512(v, nibble);
                q[t][1] = _mm512_and_si512(_mm512_srli_epi16(v, 4), nibble);
            }
            UNROLL for (int h = 0; h < 2; h++)
            {
                UNROLL for (int r = 0; r < R; r++)
                {
                    const uint8_t *p = x + 64 * r + 8 * s + 4 * h;
                    const __m512i xh = broadcast4(p), xl = broadcast4(p + 32);
                    UNROLL for (int t = 0; t < T; t++)
                    {
                        const int i = r * T + t;
                        __m512i *lo = two_sums ? &low[i] : &acc[i];
                        const __m512i qh = two_sums ? q[t][h] : _mm512_slli_epi16(q[t][h], 4);
                        acc[i] = _mm512_dpbusd_epi32(acc[i], qh, xh);
                        *lo = _mm512_dpbusd_epi32(*lo, q[t][h], xl);
                    }
                }
            }
        }
    }
    if (!two_sums) return;
    UNROLL for (int i = 0; i < R * T; i++)
        acc[i] = _mm512_add_epi32(_mm512_slli_epi32(acc[i], 4), low[i]);
}

INLINE void put_tile(const w4_call *c, int64_t tile, int64_t row, __m512 v)
{
    const int64_t n = tile * W4_TILE_N;
    const __mmask16 on = c->w.n - n >= W4_TILE_N ? 0xffff : 0xff; /* n is a multiple of 8 */
    float *y = c->y + row * c->y_stride + n;
    if (c->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(on, c->bias + n));
    if (c->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(on, y), v);
    _mm512_mask_storeu_ps(y, on, v);
}

/* R rows from `row` against T tiles, `apart` tiles from one to the next. */
INLINE void rows_tiles(const w4_call *c, int64_t tile, int64_t apart, int64_t row, const int R,
                       const int T)
{
    const w4_tiles *w = &c->w;
    const int chunks = w->group / W4_CHUNK_K;
    const uint8_t *x = w4_block_x(c, row), *base[2], *codes[2];
    const float *param = w4_block_param(c, row);
    __m512 out[16];
    UNROLL for (int i = 0; i < R * T; i++) out[i] = _mm512_setzero_ps();
    UNROLL for (int t = 0; t < T; t++)
    {
        base[t] = w->base + (size_t)(tile + t * apart) * w->tile_bytes;
        codes[t] = base[t] + w->codes_at;
        for (size_t at = 0; at < w->codes_at; at += 64)
            _mm_prefetch((const char *)base[t] + PREFETCH + at, _MM_HINT_T0);
    }
    for (int g = 0; g < w->groups; g++, param += 2 * R) {
        __m512i acc[16];
        group_dot(acc, codes, x, chunks, R, T);
        x += (size_t)(64 * R * chunks);
        UNROLL for (int t = 0; t < T; t++)
        {
            const __m512 z = load_zeros(w, base[t], g), s = load_f16(base[t] + (size_t)g * 32);
            codes[t] += 256 * chunks;
            UNROLL for (int r = 0; r < R; r++)
            {
                const int i = r * T + t;
                __m512 f = _mm512_cvtepi32_ps(acc[i]);
                f = _mm512_fnmadd_ps(z, _mm512_set1_ps(param[2 * r + 1]), f);
                f = _mm512_mul_ps(f, _mm512_set1_ps(param[2 * r]));
                out[i] = _mm512_fmadd_ps(f, s, out[i]);
            }
        }
    }
    UNROLL for (int i = 0; i < R * T; i++) put_tile(c, tile + i % T * apart, row + i / T, out[i]);
}

/* Two streams, each through its half of the tiles, read faster than one. */
#define ROWS_FN(R)                                                                   \
    static void rows_##R(const w4_call *c, int64_t tile, int64_t tiles, int64_t row) \
    {                                                                                \
        const int64_t half = tiles / 2;                                              \
        for (int64_t t = 0; t < half; t++) rows_tiles(c, tile + t, half, row, R, 2); \
        if (tiles % 2) rows_tiles(c, tile + tiles - 1, 0, row, R, 1);                \
    }
ROWS_FN(1)
ROWS_FN(2)
ROWS_FN(3)
ROWS_FN(4)
ROWS_FN(5)
ROWS_FN(6)
ROWS_FN(7)
ROWS_FN(8)

void w4_rows_avx512(const w4_call *c, int64_t tile, int64_t tiles, int64_t row, int rows)
{
    static void (*const fn[])(const w4_call *, int64_t, int64_t, int64_t) = {
        rows_1, rows_2, rows_3, rows_4, rows_5, rows_6, rows_7, rows_8};
    assert(rows >= 1 && rows <= W4_ROWS);
    fn[rows - 1](c, tile, tiles, row);
}

static void compute(const w4_call *c, int64_t tile, int64_t tiles, int worker)
{
    (void)worker;
    for (int64_t row = 0; row < c->m; row += block_rows(c, row))
        w4_rows_avx512(c, tile, tiles, row, block_rows(c, row));
}

const w4_kernels w4_kernels_avx512 = {block_rows, w4_quantize_avx512, compute};
