/* W4 rows on AMX: 32 rows against 32 outputs, four accumulator tiles. A 32-k chunk is one tile
 * step: the activations' line is [hi 32][lo 32] and the weights are unpacked to [16*q][q] in the
 * same order, so that one product of depth 64 sums (16*hi + lo)*q without another shift. A group's
 * codes are unpacked once for all rows. While the tile unit works on one block, the vector unit
 * turns the integers of the block before into floats: both take about as long. Tiles are loaded by
 * inline assembly: compilers differ in whether their intrinsics order the tile loads behind the
 * stores that made the data. */
#include <assert.h>
#include <immintrin.h>
#include <string.h>

#include "kernels/gemm_w4.h"

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

#define TILE_LOAD(t, p) \
    __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t : : "r"(p), "r"((int64_t)64) : "memory")
#define TILE_STORE(t, p) \
    __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" : : "r"(p), "r"((int64_t)64) : "memory")
#define TILE_ZERO(t) __asm__ volatile("tilezero %%tmm" #t : : : "memory")
/* c += a * b, a signed activations, b unsigned codes */
#define TILE_DOT(c, a, b) \
    __asm__ volatile("tdpbsud %%tmm" #b ", %%tmm" #a ", %%tmm" #c : : : "memory")

enum {
    TILE_BYTES = 1024,
    MAX_CHUNKS = 4, /* of a group */
    N = 2 * W4_TILE_N,
    PASS_ROWS = 256,      /* most rows that share one unpacking */
    PASS_BYTES = 1 << 20, /* of activations: a part of the L2 cache that they stay in */
    PAD_FROM = 9          /* rows from which a padded tile beats the vector kernel */
};

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;
_Static_assert(sizeof(tile_config) == 64, "as the processor reads it");

/* Of one worker. */
typedef struct {
    _Alignas(64) uint8_t b[MAX_CHUNKS][2][TILE_BYTES]; /* one group, unpacked */
    _Alignas(64) int32_t acc[4][TILE_BYTES / 4];
    _Alignas(64) float zs[2][4][W4_TILE_N]; /* groups alternate; zero, zero, scale, scale */
    _Alignas(64) float out[PASS_ROWS][N];
} work;
_Static_assert(sizeof(work) <= DEV_WORKER_BYTES, "fits the worker's scratch");

/* A block whose integers, in work.acc, wait to become floats. They have become so when the next
 * block's are stored there: a second buffer would only push the outputs out of the first cache. */
typedef struct {
    const float *param; /* [tiles of rows][16]{scale, sum} */
    size_t param_step;  /* floats from one tile of rows to the next */
    const float (*zs)[W4_TILE_N];
    float (*out)[N];
    int rows; /* 0, 16 or 32 */
} pending;

static int block_rows(const w4_call *c, int64_t row)
{
    const int64_t left = c->m - row;
    return left >= PAD_FROM ? W4_AMX_ROWS : (int)left;
}

INLINE __m512 load_f16(const uint8_t *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}

static void unpack_params(const w4_tiles *w, const uint8_t *tile, int g, float *zero, float *scale)
{
    __m512 z;
    if (w->zeros_f16) {
        z = load_f16(tile + w->zeros_at + (size_t)g * 32);
    } else {
        const __m128i b = _mm_loadl_epi64(
            (const __m128i *)(const void *)(tile + w->zeros_at + g * 8));
        const __m128i m = _mm_set1_epi8(15);
        const __m128i n = _mm_unpacklo_epi8(_mm_and_si128(b, m),
                                            _mm_and_si128(_mm_srli_epi16(b, 4), m));
        z = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(n));
    }
    _mm512_store_ps(zero, z);
    _mm512_store_ps(scale, load_f16(tile + (size_t)g * 32));
}

/* One chunk of one tile of weights: rows 0..7 are 16*q, rows 8..15 q. */
INLINE void unpack_chunk(uint8_t *b, const uint8_t *codes)
{
    const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xf0);
    UNROLL for (int s = 0; s < 4; s++)
    {
        const __m512i v = _mm512_load_si512(codes + 64 * s);
        uint8_t *p = b + 128 * s;
        _mm512_store_si512(p, _mm512_and_si512(_mm512_slli_epi16(v, 4), high));
        _mm512_store_si512(p + 64, _mm512_and_si512(v, high));
        _mm512_store_si512(p + 512, _mm512_and_si512(v, low));
        _mm512_store_si512(p + 576, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    }
}

/* Eights [from, to) of a pending block's rows. */
INLINE void finish_rows(const pending *p, const int32_t *tiles, int from, int to)
{
    for (int u = from; u < to; u++) {
        const __m512 z0 = _mm512_load_ps(p->zs[0]), z1 = _mm512_load_ps(p->zs[1]);
        const __m512 s0 = _mm512_load_ps(p->zs[2]), s1 = _mm512_load_ps(p->zs[3]);
        const int32_t *acc = tiles + u / 2 * 512 + u % 2 * 128;
        const float *param = p->param + (size_t)(u / 2) * p->param_step + u % 2 * 16;
        float *out = p->out[u * 8];
        UNROLL for (int r = 0; r < 8; r++)
        {
            __m512 f0 = _mm512_cvtepi32_ps(_mm512_load_si512(acc + 16 * r));
            __m512 f1 = _mm512_cvtepi32_ps(_mm512_load_si512(acc + 256 + 16 * r));
            const __m512 scale = _mm512_set1_ps(param[2 * r]),
                         sum = _mm512_set1_ps(param[2 * r + 1]);
            f0 = _mm512_mul_ps(_mm512_fnmadd_ps(z0, sum, f0), scale);
            f1 = _mm512_mul_ps(_mm512_fnmadd_ps(z1, sum, f1), scale);
            _mm512_store_ps(out + N * r, _mm512_fmadd_ps(f0, s0, _mm512_load_ps(out + N * r)));
            _mm512_store_ps(out + N * r + 16,
                            _mm512_fmadd_ps(f1, s1, _mm512_load_ps(out + N * r + 16)));
        }
    }
}

/* One group of 32 rows (a0, a1) by 32 outputs into acc, finishing `p` on the way. */
INLINE void dot_32(int32_t *acc, const uint8_t *a0, const uint8_t *a1, uint8_t (*b)[2][TILE_BYTES],
                   int chunks, const pending *p)
{
    const int eights = p->rows / 8;
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
    for (int c = 0; c < chunks; c++) {
        TILE_LOAD(6, b[c][0]);
        TILE_LOAD(4, a0 + c * TILE_BYTES);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(7, b[c][1]);
        TILE_DOT(1, 4, 7);
        TILE_LOAD(5, a1 + c * TILE_BYTES);
        TILE_DOT(2, 5, 6);
        TILE_DOT(3, 5, 7);
        finish_rows(p, acc, c * eights / chunks, (c + 1) * eights / chunks);
    }
    TILE_STORE(0, acc);
    TILE_STORE(1, acc + 256);
    TILE_STORE(2, acc + 512);
    TILE_STORE(3, acc + 768);
}

/* The same for the last 16 rows of an odd count. */
INLINE void dot_16(int32_t *acc, const uint8_t *a, uint8_t (*b)[2][TILE_BYTES], int chunks,
                   const pending *p)
{
    const int eights = p->rows / 8;
    TILE_ZERO(0);
    TILE_ZERO(1);
    for (int c = 0; c < chunks; c++) {
        TILE_LOAD(6, b[c][0]);
        TILE_LOAD(4, a + c * TILE_BYTES);
        TILE_DOT(0, 4, 6);
        TILE_LOAD(7, b[c][1]);
        TILE_DOT(1, 4, 7);
        finish_rows(p, acc, c * eights / chunks, (c + 1) * eights / chunks);
    }
    TILE_STORE(0, acc);
    TILE_STORE(1, acc + 256);
}

/* Unpacks group g of two tiles and asks for the codes of the next. */
static void unpack_group(work *s, const w4_tiles *w, const uint8_t *const tile[2], int g)
{
    const int chunks = w->group / W4_CHUNK_K;
    for (int t = 0; t < 2; t++) {
        const uint8_t *codes = tile[t] + w->codes_at + (size_t)(g * chunks) * 256;
        for (int c = 0; c < chunks; c++) {
            unpack_chunk(s->b[c][t], codes + c * 256);
            for (int i = 0; i < 4; i++)
                _mm_prefetch((const char *)codes + (chunks + c) * 256 + i * 64, _MM_HINT_T0);
        }
        unpack_params(w, tile[t], g, s->zs[g & 1][t], s->zs[g & 1][2 + t]);
    }
}

/* Rows [row, row+rows), whole AMX blocks, by two tiles, all groups: sums in s->out. */
static void pass(const w4_call *c, work *s, const uint8_t *const tile[2], int64_t row, int rows)
{
    const w4_tiles *w = &c->w;
    const int chunks = w->group / W4_CHUNK_K;
    const size_t block_x = (size_t)w->k * 2 * W4_AMX_ROWS;
    const size_t param_step = (size_t)w->groups * 2 * W4_AMX_ROWS;
    pending p = {.rows = 0, .zs = (const float(*)[W4_TILE_N])s->zs[0]};
    memset(s->out, 0, (size_t)rows * sizeof s->out[0]);
    for (int g = 0; g < w->groups; g++) {
        const uint8_t *a = w4_block_x(c, row) + (size_t)(g * chunks) * TILE_BYTES;
        const float *param = w4_block_param(c, row) + g * 2 * W4_AMX_ROWS;
        unpack_group(s, w, tile, g);
        for (int r = 0; r < rows; r += 32) {
            int32_t *acc = s->acc[0];
            const int now = rows - r < 32 ? 16 : 32;
            if (now == 32)
                dot_32(acc, a, a + block_x, s->b, chunks, &p);
            else
                dot_16(acc, a, s->b, chunks, &p);
            p = (pending){param, param_step, (const float(*)[W4_TILE_N])s->zs[g & 1], s->out + r,
                          now};
            a += 2 * block_x;
            param += 2 * param_step;
        }
    }
    finish_rows(&p, s->acc[0], 0, p.rows / 8);
}

static void put_rows(const w4_call *c, const work *s, int64_t tile, int tiles, int64_t row,
                     int rows)
{
    for (int t = 0; t < tiles; t++) {
        const int64_t n = (tile + t) * W4_TILE_N;
        const __mmask16 on = c->w.n - n >= W4_TILE_N ? 0xffff : 0xff; /* n is a multiple of 8 */
        for (int r = 0; r < rows; r++) {
            float *y = c->y + (row + r) * c->y_stride + n;
            __m512 v = _mm512_load_ps(s->out[r] + t * W4_TILE_N);
            if (c->bias) v = _mm512_add_ps(v, _mm512_maskz_loadu_ps(on, c->bias + n));
            if (c->add) v = _mm512_add_ps(_mm512_maskz_loadu_ps(on, y), v);
            _mm512_mask_storeu_ps(y, on, v);
        }
    }
}

/* Rows of one pass: whole AMX blocks, as many as keep the activations in the cache. */
static int pass_rows(const w4_call *c, int64_t row, int64_t end)
{
    int64_t most = PASS_BYTES / (2 * c->w.k) / 32 * 32;
    if (most < 64) most = 64;
    if (most > PASS_ROWS) most = PASS_ROWS;
    return (int)(end - row < most ? end - row : most);
}

static void compute_amx(const w4_call *c, int64_t tile, int64_t tiles, int worker, int64_t end)
{
    tile_config config = {.palette = 1};
    work *s = dev_worker(c->d, worker);
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = 64;
        config.rows[i] = 16;
    }
    __asm__ volatile("ldtilecfg %0" : : "m"(config));
    for (int64_t row = 0; row < end;) {
        const int rows = pass_rows(c, row, end);
        const int64_t valid = c->m - row < rows ? c->m - row : rows;
        for (int64_t t = tile; t < tile + tiles; t += 2) {
            const int pair = tile + tiles - t < 2 ? 1 : 2; /* the last may be computed twice */
            const uint8_t *first = c->w.base + (size_t)t * c->w.tile_bytes;
            const uint8_t *const both[2] = {first, pair == 2 ? first + c->w.tile_bytes : first};
            pass(c, s, both, row, rows);
            put_rows(c, s, t, pair, row, (int)valid);
        }
        row += rows;
    }
    __asm__ volatile("tilerelease");
}

static void compute(const w4_call *c, int64_t tile, int64_t tiles, int worker)
{
    int64_t end = 0; /* of the rows in AMX blocks */
    while (end < c->m && block_rows(c, end) == W4_AMX_ROWS) end += W4_AMX_ROWS;
    if (end) compute_amx(c, tile, tiles, worker, end);
    if (end < c->m) w4_rows_avx512(c, tile, tiles, end, (int)(c->m - end));
}

const w4_kernels w4_kernels_amx = {block_rows, w4_quantize_avx512, compute};
