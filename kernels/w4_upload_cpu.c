/* Fuses linears along n into the CPU's tiling (gemm_w4.h). Parts are read in blocks through
 * base/w4's pivot words, so that every on-disk layout works and each cache line of a row-major
 * source is used whole; nothing but the tiles is allocated. */
#include <assert.h>
#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "kernels/gemm_w4.h"

#define W4_BIAS_BYTES ((size_t)W4_TILE_N * sizeof(float)) /* of a tile */

void w4_tiles_layout(w4_tiles *t, int64_t k, int64_t n, int32_t group, bool zeros_f16)
{
    *t = (w4_tiles){.k = k, .n = n, .group = group, .zeros_f16 = zeros_f16};
    t->tiles = (n + W4_TILE_N - 1) / W4_TILE_N;
    t->groups = (int32_t)(k / group);
    t->zeros_at = (size_t)t->groups * W4_TILE_N * sizeof(f16);
    t->codes_at = dev_align64(t->zeros_at + (size_t)t->groups * (zeros_f16 ? 32 : 8));
    t->tile_bytes = t->codes_at + (size_t)k * W4_TILE_N / 2;
}

w4_tiles w4_tiles_of(const w4_weight *w)
{
    w4_tiles t;
    assert(w->layout == W4_DEVICE);
    w4_tiles_layout(&t, w->k, w->n, w->group, w->zeros.dt == DT_F16);
    assert(t.tile_bytes == (size_t)w->q.stride[0]);
    t.base = w->q.data;
    return t;
}

size_t w4_upload_bytes_cpu(int64_t k, int64_t n, int32_t group)
{
    w4_tiles t;
    size_t bytes;
    err e;
    if (k < 1 || n < 1 || group < 1 || k / group > INT32_MAX) return SIZE_MAX;
    /* A bias and fractional zeros are the most that it may be. */
    w4_tiles_layout(&t, k, n, group, true);
    t.tile_bytes += W4_BIAS_BYTES;
    return mem_mul(&bytes, (size_t)t.tiles, t.tile_bytes, "w4 tiles", &e) == OK ? bytes : SIZE_MAX;
}

typedef struct {
    w4_tiles t;
    uint8_t *base;
    float *bias; /* [tiles*16] or NULL */
    const w4_weight *const *parts;
    int n_parts;
    atomic_bool zeros_f16; /* found by the first pass */
} upload;

/* One pool item: up to W4_BLOCK_N columns of one part. */
typedef struct {
    const w4_weight *part;
    int64_t n0, cols; /* in the part */
    int64_t out_n0;   /* in the fused weight */
} upload_block;

static int64_t block_count(const w4_weight *w) { return (w->n + W4_BLOCK_N - 1) / W4_BLOCK_N; }

static upload_block block_of(const upload *u, int64_t item)
{
    int64_t out = 0;
    int p = 0;
    while (item >= block_count(u->parts[p])) {
        item -= block_count(u->parts[p]);
        out += u->parts[p++]->n;
    }
    const w4_weight *w = u->parts[p];
    const int64_t n0 = item * W4_BLOCK_N, left = w->n - n0;
    return (upload_block){w, n0, left < W4_BLOCK_N ? left : W4_BLOCK_N, out + n0};
}

static void scan_zeros(void *ctx, int64_t item, int worker)
{
    upload *u = ctx;
    const upload_block b = block_of(u, item);
    (void)worker;
    for (int64_t g = 0; g < b.part->k / b.part->group; g++)
        for (int64_t n = b.n0; n < b.n0 + b.cols; n++) {
            const float z = w4_zero(b.part, n, g);
            if (z >= 0.0f && z <= 15.0f && z == (float)(int)z) continue;
            atomic_store_explicit(&u->zeros_f16, true, memory_order_relaxed);
            return;
        }
}

static void put_params(const upload *u, const upload_block *b)
{
    const w4_tiles *t = &u->t;
    for (int32_t g = 0; g < t->groups; g++)
        for (int64_t i = 0; i < b->cols; i++) {
            const int64_t n = b->out_n0 + i;
            const int lane = (int)(n % W4_TILE_N);
            uint8_t *tile = u->base + (size_t)(n / W4_TILE_N) * t->tile_bytes;
            const float z = w4_zero(b->part, b->n0 + i, g);
            ((f16 *)(void *)tile)[g * W4_TILE_N + lane] = w4_scale(b->part, b->n0 + i, g);
            if (t->zeros_f16)
                ((f16 *)(void *)(tile + t->zeros_at))[g * W4_TILE_N + lane] = f32_to_f16(z);
            else
                tile[t->zeros_at + (size_t)g * 8 + (size_t)(lane / 2)] |=
                    (uint8_t)((int)z << 4 * (lane % 2));
        }
}

static inline uint64_t nibbles_to_bytes(uint32_t w)
{
    uint64_t x = w;
    x = (x | x << 16) & 0x0000ffff0000ffffull;
    x = (x | x << 8) & 0x00ff00ff00ff00ffull;
    return (x | x << 4) & 0x0f0f0f0f0f0f0f0full;
}

/* Eight outputs by eight k: word i*ld is one k, its nibbles the outputs. Writes four bytes an
 * output: the bytes of four sums of two words, interleaved first in pairs and then in pairs of
 * pairs. */
static inline void put_8x8(uint8_t *out, const uint32_t *w, int64_t ld)
{
    const uint64_t m8 = 0x00ff00ff00ff00ffull, m16 = 0x0000ffff0000ffffull;
    uint64_t b[4];
    for (int j = 0; j < 4; j++)
        b[j] = nibbles_to_bytes(w[j * ld]) | nibbles_to_bytes(w[(j + 4) * ld]) << 4;
    const uint64_t even01 = (b[0] & m8) | (b[1] & m8) << 8, odd01 = (b[0] >> 8 & m8) | (b[1] & ~m8);
    const uint64_t even23 = (b[2] & m8) | (b[3] & m8) << 8, odd23 = (b[2] >> 8 & m8) | (b[3] & ~m8);
    const uint64_t n04 = (even01 & m16) | (even23 & m16) << 16;
    const uint64_t n26 = (even01 >> 16 & m16) | (even23 & ~m16);
    const uint64_t n15 = (odd01 & m16) | (odd23 & m16) << 16;
    const uint64_t n37 = (odd01 >> 16 & m16) | (odd23 & ~m16);
    const uint32_t words[8] = {(uint32_t)n04,         (uint32_t)n15,         (uint32_t)n26,
                               (uint32_t)n37,         (uint32_t)(n04 >> 32), (uint32_t)(n15 >> 32),
                               (uint32_t)(n26 >> 32), (uint32_t)(n37 >> 32)};
    memcpy(out, words, sizeof words);
}

/* Two items may share a tile, but not its bytes: eight outputs have their own half of each line. */
static void put_block(void *ctx, int64_t item, int worker)
{
    const upload *u = ctx;
    const w4_tiles *t = &u->t;
    const upload_block b = block_of(u, item);
    uint32_t words[W4_BLOCK_K][W4_BLOCK_N / 8];
    (void)worker;
    put_params(u, &b);
    for (int64_t k0 = 0; k0 < t->k; k0 += W4_BLOCK_K) {
        const int rows = (int)(t->k - k0 < W4_BLOCK_K ? t->k - k0 : W4_BLOCK_K);
        w4_read_block(words, b.part, k0, rows, b.n0, (int)b.cols);
        for (int64_t i = 0; i < b.cols; i += 8) {
            const int64_t n = b.out_n0 + i;
            uint8_t *codes = u->base + (size_t)(n / W4_TILE_N) * t->tile_bytes + t->codes_at +
                             (size_t)(n % W4_TILE_N) * 4;
            for (int k = 0; k < rows; k += 8)
                put_8x8(codes + (size_t)(k0 + k) * 8, &words[k][i / 8], W4_BLOCK_N / 8);
        }
    }
}

/* Parts without a bias add 0. */
static void put_bias(const upload *u)
{
    float *out = u->bias;
    for (int i = 0; i < u->n_parts; i++) {
        const w4_weight *w = u->parts[i];
        if (w->bias.data) {
            tensor dst = tensor_1d(out, DT_F32, w->n);
            tensor_convert(&dst, &w->bias);
        }
        out += w->n;
    }
}

/* Sums n and the pool items; tells whether any part has a bias. */
static err_code upload_plan(const upload *u, int64_t *n, int64_t *items, bool *bias, err *e)
{
    const w4_weight *const *parts = u->parts;
    const int32_t group = parts[0]->group;
    *n = *items = 0;
    *bias = false;
    if ((group != 32 && group != 64 && group != 128) || parts[0]->k > INT64_C(1) << 24)
        return err_set(e, E_UNSUPPORTED,
                       "w4_upload: expected groups of 32, 64 or 128 and k up to 2^24, got %d and "
                       "%" PRId64,
                       group, parts[0]->k);
    for (int i = 0; i < u->n_parts; i++) {
        if (parts[i]->n % 8)
            return err_set(e, E_SHAPE,
                           "w4_upload: part %d: expected n in multiples of 8, got %" PRId64, i,
                           parts[i]->n);
        *n += parts[i]->n;
        *items += block_count(parts[i]);
        *bias |= parts[i]->bias.data != NULL;
    }
    return OK;
}

err_code w4_upload_cpu(device *d, dev_buf *buf, w4_weight *out, const w4_weight *const *parts,
                       int n_parts, err *e)
{
    upload u = {.parts = parts, .n_parts = n_parts};
    int64_t n, items;
    size_t bytes;
    bool bias;
    TRY(upload_plan(&u, &n, &items, &bias, e));
    atomic_init(&u.zeros_f16, false);
    pool_run(d->workers, scan_zeros, &u, items);
    w4_tiles_layout(&u.t, parts[0]->k, n, parts[0]->group, atomic_load(&u.zeros_f16));
    TRY(mem_mul(&bytes, (size_t)u.t.tiles, u.t.tile_bytes, "w4 tiles", e));
    const size_t bias_at = bytes, bias_bytes = bias ? (size_t)u.t.tiles * W4_BIAS_BYTES : 0;
    TRY(mem_add(&bytes, bytes, bias_bytes, "w4 tiles", e));
    TRY(dev_alloc(buf, d, bytes, "w4 tiles", e));
    u.base = buf->data;
    pool_run(d->workers, put_block, &u, items);
    *out = (w4_weight){.k = u.t.k, .n = n, .group = u.t.group, .layout = W4_DEVICE};
    out->q = tensor_2d(u.base, DT_U8, u.t.tiles, (int64_t)u.t.tile_bytes);
    out->scales = tensor_2d(u.base, DT_F16, u.t.tiles, (int64_t)u.t.groups * W4_TILE_N);
    out->scales.stride[0] = (int64_t)u.t.tile_bytes / 2;
    out->zeros = tensor_2d(u.base + u.t.zeros_at, u.t.zeros_f16 ? DT_F16 : DT_U8, u.t.tiles,
                           (int64_t)u.t.groups * (u.t.zeros_f16 ? W4_TILE_N : W4_TILE_N / 2));
    out->zeros.stride[0] = (int64_t)u.t.tile_bytes / (u.t.zeros_f16 ? 2 : 1);
    if (bias) {
        u.bias = (float *)(void *)(u.base + bias_at);
        put_bias(&u);
        out->bias = tensor_1d(u.bias, DT_F32, n);
    }
    return OK;
}
