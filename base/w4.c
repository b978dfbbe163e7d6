/* Host conversion between the 4-bit layouts. Every layout is read into and written from one pivot:
 * a tile of sequential words as W4_TM has them (row k, word n/8, nibble n%8). So a new layout is
 * one reader and one writer, and any pair works. Nibbles move by word tricks (interleave, 8x8 byte
 * transpose), never one at a time, except for the 32x32 tiles of W4_TM_A, which nothing hot uses.
 */
#include "base/w4.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"

#define TILE_K     64 /* one cache line of W4_CODES, and whole W4_TM_A tiles */
#define TILE_WORDS 32 /* 256 columns: 128 bytes of a packed row */
#define TILE_N     (TILE_WORDS * 8)
#define MAX_DIM    ((int64_t)1 << 31) /* of k and n: keeps every product below 2^62 */
#define TM_A_BIAS  0x5400u /* bits of f16 64; 64+z is TM_A_BIAS | z << 4 for z in 0..63 */

typedef struct {
    uint32_t w[TILE_K][TILE_WORDS];
} tile;

typedef struct {
    int64_t k0, n0; /* multiples of TILE_K and TILE_N */
    int rows, cols; /* of this tile; cols % 8 == 0 */
} tile_at;

/* ---- words ---- */

/* Nibbles of the low half to the even places, of the high half to the odd ones. */
static inline uint32_t interleave_halves(uint32_t w)
{
    uint32_t lo = w & 0xffffu, hi = w >> 16;
    lo = (lo | lo << 8) & 0x00ff00ffu;
    lo = (lo | lo << 4) & 0x0f0f0f0fu;
    hi = (hi | hi << 8) & 0x00ff00ffu;
    hi = (hi | hi << 4) & 0x0f0f0f0fu;
    return lo | hi << 4;
}

static inline uint32_t split_halves(uint32_t w) /* the inverse */
{
    uint32_t lo = w & 0x0f0f0f0fu, hi = w >> 4 & 0x0f0f0f0fu;
    lo = (lo | lo >> 4) & 0x00ff00ffu;
    lo = (lo | lo >> 8) & 0x0000ffffu;
    hi = (hi | hi >> 4) & 0x00ff00ffu;
    hi = (hi | hi >> 8) & 0x0000ffffu;
    return lo | hi << 16;
}

static inline uint64_t nibbles_to_bytes(uint32_t w)
{
    uint64_t x = w;
    x = (x | x << 16) & 0x0000ffff0000ffffull;
    x = (x | x << 8) & 0x00ff00ff00ff00ffull;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
}

static inline uint32_t bytes_to_nibbles(uint64_t x)
{
    x &= 0x0f0f0f0f0f0f0f0full;
    x = (x | x >> 4) & 0x00ff00ff00ff00ffull;
    x = (x | x >> 8) & 0x0000ffff0000ffffull;
    return (uint32_t)(x | x >> 16);
}

/* Byte j of word i becomes byte i of word j. */
static inline void transpose_8x8(uint64_t r[8])
{
    for (int half = 1; half <= 4; half *= 2) {
        const int bits = 8 * half;
        const uint64_t low = half == 1   ? 0x00ff00ff00ff00ffull
                             : half == 2 ? 0x0000ffff0000ffffull
                                         : 0x00000000ffffffffull;
        for (int i = 0; i < 8; i++) {
            if (i & half) continue;
            const uint64_t a = r[i], b = r[i + half];
            r[i] = (a & low) | (b & low) << bits;
            r[i + half] = (a >> bits & low) | (b & ~low);
        }
    }
}

/* ---- places in a view ---- */

static inline uint32_t *word_row(const tensor *t, int64_t row)
{
    return (uint32_t *)t->data + row * t->stride[0];
}
static inline uint8_t *byte_row(const tensor *t, int64_t row)
{
    return (uint8_t *)t->data + row * t->stride[0];
}
static inline uint16_t *half_row(const tensor *t, int64_t row)
{
    return (uint16_t *)t->data + row * t->stride[0];
}

/* ---- tiles of codes ---- */

static void read_codes(tile *p, const w4_weight *w, const tile_at *t)
{
    for (int n = 0; n < t->cols; n += 8) {
        for (int k = 0; k < t->rows; k += 8) {
            const int rows = t->rows - k < 8 ? t->rows - k : 8;
            uint64_t r[8] = {0};
            for (int i = 0; i < 8; i++)
                memcpy(&r[i], byte_row(&w->q, t->n0 + n + i) + t->k0 + k, (size_t)rows);
            transpose_8x8(r);
            for (int i = 0; i < rows; i++) p->w[k + i][n / 8] = bytes_to_nibbles(r[i]);
        }
    }
}

static void write_codes(const w4_weight *w, const tile *p, const tile_at *t)
{
    for (int n = 0; n < t->cols; n += 8) {
        for (int k = 0; k < t->rows; k += 8) {
            const int rows = t->rows - k < 8 ? t->rows - k : 8;
            uint64_t r[8] = {0};
            for (int i = 0; i < rows; i++) r[i] = nibbles_to_bytes(p->w[k + i][n / 8]);
            transpose_8x8(r);
            for (int i = 0; i < 8; i++)
                memcpy(byte_row(&w->q, t->n0 + n + i) + t->k0 + k, &r[i], (size_t)rows);
        }
    }
}

static void read_awq(tile *p, const w4_weight *w, const tile_at *t)
{
    for (int k = 0; k < t->rows; k++) {
        const uint32_t *src = word_row(&w->q, t->k0 + k) + t->n0 / 8;
        for (int i = 0; i < t->cols / 8; i++) p->w[k][i] = interleave_halves(src[i]);
    }
}

static void write_awq(const w4_weight *w, const tile *p, const tile_at *t)
{
    for (int k = 0; k < t->rows; k++) {
        uint32_t *dst = word_row(&w->q, t->k0 + k) + t->n0 / 8;
        for (int i = 0; i < t->cols / 8; i++) dst[i] = split_halves(p->w[k][i]);
    }
}

static void read_gptq(tile *p, const w4_weight *w, const tile_at *t)
{
    for (int k = 0; k < t->rows; k += 8) {
        const uint32_t *src = word_row(&w->q, (t->k0 + k) / 8) + t->n0;
        for (int n = 0; n < t->cols; n += 8) {
            uint64_t r[8];
            for (int i = 0; i < 8; i++) r[i] = nibbles_to_bytes(src[n + i]);
            transpose_8x8(r);
            for (int i = 0; i < 8; i++) p->w[k + i][n / 8] = bytes_to_nibbles(r[i]);
        }
    }
}

static void write_gptq(const w4_weight *w, const tile *p, const tile_at *t)
{
    for (int k = 0; k < t->rows; k += 8) {
        uint32_t *dst = word_row(&w->q, (t->k0 + k) / 8) + t->n0;
        for (int n = 0; n < t->cols; n += 8) {
            uint64_t r[8];
            for (int i = 0; i < 8; i++) r[i] = nibbles_to_bytes(p->w[k + i][n / 8]);
            transpose_8x8(r);
            for (int i = 0; i < 8; i++) dst[n + i] = bytes_to_nibbles(r[i]);
        }
    }
}

static void read_tm(tile *p, const w4_weight *w, const tile_at *t)
{
    for (int k = 0; k < t->rows; k++)
        memcpy(p->w[k], word_row(&w->q, t->k0 + k) + t->n0 / 8, (size_t)t->cols / 2);
}

static void write_tm(const w4_weight *w, const tile *p, const tile_at *t)
{
    for (int k = 0; k < t->rows; k++)
        memcpy(word_row(&w->q, t->k0 + k) + t->n0 / 8, p->w[k], (size_t)t->cols / 2);
}

/* Epoch A (2.4): place of (k, n) inside the 128 words of its 32x32 tile. */
static inline int tm_a_word(int k, int n)
{
    return ((n % 8) * 4 + (k % 8) / 2) * 4 + k / 16 % 2 * 2 + n / 16 % 2;
}
static inline int tm_a_shift(int k, int n) { return 4 * (k % 2 * 4 + k / 8 % 2 * 2 + n / 8 % 2); }

static inline uint32_t *tm_a_tile(const w4_weight *w, int64_t k, int64_t n)
{
    return word_row(&w->q, k / 32) + n / 32 * 128;
}

static void read_tm_a(tile *p, const w4_weight *w, const tile_at *t)
{
    for (int k = 0; k < t->rows; k++) {
        for (int i = 0; i < t->cols / 8; i++) {
            uint32_t word = 0;
            for (int c = 0; c < 8; c++) {
                const int n = 8 * i + c;
                const uint32_t *src = tm_a_tile(w, t->k0 + k, t->n0 + n);
                word |= (src[tm_a_word(k % 32, n % 32)] >> tm_a_shift(k % 32, n % 32) & 15u)
                        << 4 * c;
            }
            p->w[k][i] = word;
        }
    }
}

static void write_tm_a(const w4_weight *w, const tile *p, const tile_at *t)
{
    for (int k = 0; k < t->rows; k += 32)
        for (int n = 0; n < t->cols; n += 32) {
            uint32_t *dst = tm_a_tile(w, t->k0 + k, t->n0 + n);
            memset(dst, 0, 128 * sizeof *dst);
            for (int i = 0; i < 32; i++)
                for (int j = 0; j < 32; j++) {
                    const uint32_t q = p->w[k + i][(n + j) / 8] >> 4 * (j % 8) & 15u;
                    dst[tm_a_word(i, j)] |= q << tm_a_shift(i, j);
                }
        }
}

/* ---- zeros and scales: one column block of one group at a time ---- */

#define ZERO_NOT_INTEGER (-1)

static int zero_of_f16(f16 h, int bias)
{
    const float f = f16_to_f32(h) - (float)bias;
    if (!(f >= 0.0f && f <= 255.0f)) return ZERO_NOT_INTEGER;
    return f == (float)(int)f ? (int)f : ZERO_NOT_INTEGER;
}

static int zero_at(const w4_weight *w, int64_t group, int64_t n)
{
    static const int inv[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    switch (w->layout) {
    case W4_CODES: return byte_row(&w->zeros, n)[group];
    case W4_AWQ: return (int)(word_row(&w->zeros, group)[n / 8] >> 4 * inv[n % 8] & 15u);
    case W4_GPTQ: return (int)(word_row(&w->zeros, group)[n / 8] >> 4 * (n % 8) & 15u) + 1;
    case W4_TM: return zero_of_f16(half_row(&w->zeros, group)[n], 0);
    case W4_TM_A: return zero_of_f16((f16)(word_row(&w->scales, group)[n] & 0xffffu), 64);
    case W4_DEVICE: break;
    }
    assert(!"layout has no zeros on the host");
    return 0;
}

/* The zero as a float: W4_TM and W4_TM_A may hold fractions, which only a copy or a dequantizer
 * takes. */
static float zero_value(const w4_weight *w, int64_t group, int64_t n)
{
    if (w->layout == W4_TM) return f16_to_f32(half_row(&w->zeros, group)[n]);
    if (w->layout == W4_TM_A)
        return f16_to_f32((f16)(word_row(&w->scales, group)[n] & 0xffffu)) - 64.0f;
    return (float)zero_at(w, group, n);
}

static f16 scale_at(const w4_weight *w, int64_t group, int64_t n)
{
    if (w->layout == W4_CODES) return half_row(&w->scales, n)[group];
    if (w->layout == W4_TM_A) return (f16)(word_row(&w->scales, group)[n] >> 16);
    return half_row(&w->scales, group)[n];
}

static void zero_range(w4_layout l, int *lo, int *hi)
{
    *lo = l == W4_GPTQ ? 1 : 0;
    *hi = l == W4_AWQ ? 15 : l == W4_GPTQ ? 16 : l == W4_TM_A ? 63 : 255;
}

/* Eight columns from n0 of one group. */
static void put_zeros(const w4_weight *w, int64_t group, int64_t n0, const int z[8])
{
    static const int order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
    uint32_t word = 0;
    switch (w->layout) {
    case W4_CODES:
        for (int i = 0; i < 8; i++) byte_row(&w->zeros, n0 + i)[group] = (uint8_t)z[i];
        break;
    case W4_AWQ:
        for (int p = 0; p < 8; p++) word |= (uint32_t)z[order[p]] << 4 * p;
        word_row(&w->zeros, group)[n0 / 8] = word;
        break;
    case W4_GPTQ:
        for (int p = 0; p < 8; p++) word |= (uint32_t)(z[p] - 1) << 4 * p;
        word_row(&w->zeros, group)[n0 / 8] = word;
        break;
    case W4_TM:
        for (int i = 0; i < 8; i++) half_row(&w->zeros, group)[n0 + i] = f32_to_f16((float)z[i]);
        break;
    case W4_TM_A:
        for (int i = 0; i < 8; i++)
            word_row(&w->scales, group)[n0 + i] = TM_A_BIAS | (uint32_t)z[i] << 4;
        break;
    case W4_DEVICE: assert(!"refused before"); break;
    }
}

static void put_scales(const w4_weight *dst, const w4_weight *src, int64_t group, int64_t n0)
{
    for (int64_t n = n0; n < n0 + 8; n++) {
        const f16 s = scale_at(src, group, n);
        if (dst->layout == W4_CODES)
            half_row(&dst->scales, n)[group] = s;
        else if (dst->layout == W4_TM_A)
            word_row(&dst->scales, group)[n] |= (uint32_t)s << 16; /* put_zeros set the low half */
        else
            half_row(&dst->scales, group)[n] = s;
    }
}

static err_code repack_groups(w4_weight *dst, const w4_weight *src, err *e)
{
    const int64_t groups = src->k / src->group;
    int lo, hi;

    zero_range(dst->layout, &lo, &hi);
    for (int64_t block = 0; block < src->n; block += TILE_N) {
        const int64_t end = block + TILE_N < src->n ? block + TILE_N : src->n;
        for (int64_t g = 0; g < groups; g++)
            for (int64_t n0 = block; n0 < end; n0 += 8) {
                int z[8];
                for (int i = 0; i < 8; i++) {
                    z[i] = zero_at(src, g, n0 + i);
                    if (z[i] < lo || z[i] > hi)
                        return err_set(
                            e, E_UNSUPPORTED,
                            "zero of row %lld group %lld: %s holds integers %d..%d, got %g",
                            (long long)(n0 + i), (long long)g, w4_layout_name(dst->layout), lo, hi,
                            (double)zero_value(src, g, n0 + i));
                }
                put_zeros(dst, g, n0, z);
                put_scales(dst, src, g, n0);
            }
    }
    return OK;
}

/* ---- the layout table ---- */

typedef struct {
    const char *name;
    int64_t k_unit, n_unit; /* k and n must be multiples */
    void (*read)(tile *, const w4_weight *, const tile_at *);
    void (*write)(const w4_weight *, const tile *, const tile_at *);
} layout_row;

static const layout_row layouts[] = {
    [W4_CODES] = {"codes", 1, 1, read_codes, write_codes},
    [W4_AWQ] = {"awq", 1, 8, read_awq, write_awq},
    [W4_GPTQ] = {"gptq", 8, 8, read_gptq, write_gptq},
    [W4_TM] = {"turbomind", 1, 8, read_tm, write_tm},
    [W4_TM_A] = {"turbomind-a", 32, 32, read_tm_a, write_tm_a},
    [W4_DEVICE] = {"device", 1, 1, NULL, NULL},
};

const char *w4_layout_name(w4_layout l)
{
    return (unsigned)l < sizeof layouts / sizeof *layouts ? layouts[l].name : "unknown";
}

static bool on_disk(w4_layout l)
{
    return (unsigned)l < sizeof layouts / sizeof *layouts && layouts[l].read;
}

/* Shapes of the three parts; parts a layout does not have get ndim 0. */
static void part_shapes(int64_t k, int64_t n, int32_t group, w4_layout layout, dtype dt[3],
                        int64_t shape[3][2])
{
    const int64_t groups = k / group;
    const bool codes = layout == W4_CODES, tm_a = layout == W4_TM_A;
    const bool words = layout == W4_AWQ || layout == W4_GPTQ;

    dt[0] = codes ? DT_U8 : words ? DT_I32 : DT_U32;
    dt[1] = tm_a ? DT_U32 : DT_F16;
    dt[2] = codes ? DT_U8 : words ? DT_I32 : tm_a ? DT_NONE : DT_F16;
    shape[0][0] = codes ? n : layout == W4_GPTQ ? k / 8 : tm_a ? k / 32 : k;
    shape[0][1] = codes ? k : layout == W4_GPTQ ? n : tm_a ? n * 4 : n / 8;
    shape[1][0] = shape[2][0] = codes ? n : groups;
    shape[1][1] = codes ? groups : n;
    shape[2][1] = codes ? groups : words ? n / 8 : n;
}

static err_code check_dims(int64_t k, int64_t n, int32_t group, w4_layout layout, err *e)
{
    if (!on_disk(layout))
        return err_set(e, E_UNSUPPORTED, "w4 layout %s is not a host layout",
                       w4_layout_name(layout));
    if (k < 1 || n < 1 || k > MAX_DIM || n > MAX_DIM || group < 1)
        return err_set(
            e, E_SHAPE,
            "w4 weight with k %lld, n %lld, group %d: expected positive sizes up to 2^31",
            (long long)k, (long long)n, group);
    if (k % group)
        return err_set(e, E_SHAPE, "group %d does not divide the %lld inputs", group, (long long)k);
    const layout_row *l = &layouts[layout];
    if (k % l->k_unit)
        return err_set(e, E_SHAPE, "layout %s needs inputs in multiples of %lld, got %lld", l->name,
                       (long long)l->k_unit, (long long)k);
    if (n % l->n_unit)
        return err_set(e, E_SHAPE, "layout %s needs outputs in multiples of %lld, got %lld",
                       l->name, (long long)l->n_unit, (long long)n);
    return OK;
}

static err_code check_part(const tensor *t, const char *what, const char *part, dtype dt,
                           const int64_t shape[2], err *e)
{
    char name[256];
    (void)snprintf(name, sizeof name, "%s: %s", what, part);
    if (dt == DT_NONE) return OK;
    /* containers differ in whether packed words are called signed */
    if ((dt == DT_I32 && t->dt == DT_U32) || (dt == DT_U32 && t->dt == DT_I32)) dt = t->dt;
    TRY(tensor_expect(t, name, dt, 2, shape, e));
    if (!t->data) return err_set(e, E_SHAPE, "%s: expected data, got none", name);
    if (t->mem != MEM_HOST) return err_set(e, E_SHAPE, "%s: expected host memory", name);
    if (t->stride[1] != 1 || t->stride[0] < shape[1])
        return err_set(e, E_SHAPE, "%s: expected contiguous rows, got strides [%lld,%lld]", name,
                       (long long)t->stride[0], (long long)t->stride[1]);
    return OK;
}

err_code w4_check(const w4_weight *w, const char *what, err *e)
{
    dtype dt[3];
    int64_t shape[3][2];

    if (check_dims(w->k, w->n, w->group, w->layout, e) != OK) return err_wrap(e, "%s", what);
    part_shapes(w->k, w->n, w->group, w->layout, dt, shape);
    TRY(check_part(&w->q, what, "qweight", dt[0], shape[0], e));
    TRY(check_part(&w->scales, what, "scales", dt[1], shape[1], e));
    TRY(check_part(&w->zeros, what, "zeros", dt[2], shape[2], e));
    if (w->bias.data && (w->bias.ndim != 1 || w->bias.shape[0] != w->n))
        return err_set(e, E_SHAPE, "%s: bias: expected [%lld], got [%lld]", what, (long long)w->n,
                       (long long)w->bias.shape[0]);
    return OK;
}

err_code w4_sizes(size_t *q, size_t *scales, size_t *zeros, int64_t k, int64_t n, int32_t group,
                  w4_layout layout, err *e)
{
    dtype dt[3];
    int64_t shape[3][2];
    size_t *out[3] = {q, scales, zeros};

    TRY(check_dims(k, n, group, layout, e));
    part_shapes(k, n, group, layout, dt, shape);
    for (int i = 0; i < 3; i++) {
        const size_t item = dt[i] == DT_NONE ? 0 : dtype_bytes(dt[i]);
        TRY(mem_mul(out[i], (size_t)shape[i][0], (size_t)shape[i][1], "w4 weight", e));
        TRY(mem_mul(out[i], *out[i], item, "w4 weight", e));
    }
    return OK;
}

void w4_shape(w4_weight *w, int64_t k, int64_t n, int32_t group, w4_layout layout)
{
    dtype dt[3];
    int64_t shape[3][2];

    assert(group > 0 && k % group == 0);
    part_shapes(k, n, group, layout, dt, shape);
    w->k = k;
    w->n = n;
    w->group = group;
    w->layout = layout;
    w->q = tensor_2d(w->q.data, dt[0], shape[0][0], shape[0][1]);
    w->scales = tensor_2d(w->scales.data, dt[1], shape[1][0], shape[1][1]);
    if (dt[2] == DT_NONE)
        memset(&w->zeros, 0, sizeof w->zeros);
    else
        w->zeros = tensor_2d(w->zeros.data, dt[2], shape[2][0], shape[2][1]);
}

/* Same layout: rows are copied as they are, so fractional zeros of W4_TM survive. */
static void copy_part(const tensor *dst, const tensor *src)
{
    const size_t item = src->data ? dtype_bytes(src->dt) : 0;
    if (!item) return;
    for (int64_t r = 0; r < src->shape[0]; r++)
        memcpy((char *)dst->data + (size_t)(r * dst->stride[0]) * item,
               (const char *)src->data + (size_t)(r * src->stride[0]) * item,
               (size_t)src->shape[1] * item);
}

typedef struct {
    w4_weight *dst;
    const w4_weight *src;
} repack_job;

/* TILE_N outputs. */
static void repack_stripe(void *ctx, int64_t item, int worker)
{
    const repack_job *j = ctx;
    const int64_t n0 = item * TILE_N, cols = j->src->n - n0;
    tile p;
    (void)worker;
    for (int64_t k0 = 0; k0 < j->src->k; k0 += TILE_K) {
        const int64_t rows = j->src->k - k0;
        const tile_at at = {k0, n0, (int)(rows < TILE_K ? rows : TILE_K),
                            (int)(cols < TILE_N ? cols : TILE_N)};
        layouts[j->src->layout].read(&p, j->src, &at);
        layouts[j->dst->layout].write(j->dst, &p, &at);
    }
}

err_code w4_repack(w4_weight *dst, const w4_weight *src, err *e)
{
    return w4_repack_on(dst, src, NULL, e);
}

err_code w4_repack_on(w4_weight *dst, const w4_weight *src, pool *workers, err *e)
{
    TRY(w4_check(src, "repack source", e));
    TRY(w4_check(dst, "repack target", e));
    if (dst->k != src->k || dst->n != src->n || dst->group != src->group)
        return err_set(e, E_SHAPE, "repack: expected k %lld, n %lld, group %d, got %lld, %lld, %d",
                       (long long)src->k, (long long)src->n, src->group, (long long)dst->k,
                       (long long)dst->n, dst->group);
    if (dst->layout == src->layout) {
        copy_part(&dst->q, &src->q);
        copy_part(&dst->scales, &src->scales);
        copy_part(&dst->zeros, &src->zeros);
        return OK;
    }
    TRY(repack_groups(dst, src, e)); /* two different layouts: n % 8 == 0 by check_dims */
    repack_job j = {dst, src};
    const int64_t stripes = (src->n + TILE_N - 1) / TILE_N;
    if (workers)
        pool_run(workers, repack_stripe, &j, stripes);
    else
        for (int64_t i = 0; i < stripes; i++) repack_stripe(&j, i, 0);
    return OK;
}

void w4_read_block(uint32_t out[W4_BLOCK_K][W4_BLOCK_N / 8], const w4_weight *w, int64_t k0,
                   int rows, int64_t n0, int cols)
{
    _Static_assert(W4_BLOCK_K == TILE_K && W4_BLOCK_N == TILE_N, "a block is a pivot tile");
    const tile_at at = {k0, n0, rows, cols};
    layouts[w->layout].read((tile *)(void *)out, w, &at);
}

f16 w4_scale(const w4_weight *w, int64_t n, int64_t group) { return scale_at(w, group, n); }

float w4_zero(const w4_weight *w, int64_t n, int64_t group) { return zero_value(w, group, n); }

w4_weight w4_inputs(const w4_weight *w, int64_t from, int64_t count)
{
    const int64_t g = w->group;
    const int64_t unit = w->layout == W4_GPTQ ? 8 : w->layout == W4_TM_A ? 32 : 1;
    w4_weight v = *w;

    assert(from % g == 0 && count % g == 0 && from % unit == 0 && count % unit == 0);
    v.k = count;
    memset(&v.bias, 0, sizeof v.bias);
    if (w->layout == W4_CODES) {
        v.q = tensor_cols(&w->q, from, count);
        v.scales = tensor_cols(&w->scales, from / g, count / g);
        v.zeros = tensor_cols(&w->zeros, from / g, count / g);
        return v;
    }
    v.q = tensor_rows(&w->q, from / unit, count / unit);
    v.scales = tensor_rows(&w->scales, from / g, count / g);
    if (w->zeros.data) v.zeros = tensor_rows(&w->zeros, from / g, count / g);
    return v;
}

int w4_code(const w4_weight *w, int64_t n, int64_t k)
{
    static const int inv[8] = {0, 4, 1, 5, 2, 6, 3, 7};
    switch (w->layout) {
    case W4_CODES: return byte_row(&w->q, n)[k] & 15;
    case W4_AWQ: return (int)(word_row(&w->q, k)[n / 8] >> 4 * inv[n % 8] & 15u);
    case W4_GPTQ: return (int)(word_row(&w->q, k / 8)[n] >> 4 * (k % 8) & 15u);
    case W4_TM: return (int)(word_row(&w->q, k)[n / 8] >> 4 * (n % 8) & 15u);
    case W4_TM_A: {
        const int i = (int)(k % 32), j = (int)(n % 32);
        return (int)(tm_a_tile(w, k, n)[tm_a_word(i, j)] >> tm_a_shift(i, j) & 15u);
    }
    case W4_DEVICE: break;
    }
    assert(!"layout has no codes on the host");
    return 0;
}

void w4_dequant_row(float *out, const w4_weight *w, int64_t row)
{
    for (int64_t g = 0; g < w->k / w->group; g++) {
        const float scale = f16_to_f32(scale_at(w, g, row)), zero = zero_value(w, g, row);
        for (int64_t k = g * w->group; k < (g + 1) * w->group; k++)
            out[k] = ((float)w4_code(w, row, k) - zero) * scale;
    }
}
