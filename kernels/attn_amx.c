/* Attention of many rows on AMX tiles (amx.h). A work item is up to 128 query vectors of one
 * sequence and kv head (rows times the heads that share it) against its cached tokens, 64 at a
 * time: S [tokens, vectors] = K q     weights P, softmax running over the chunks     Y [channels,
 * vectors] += V^T P Vectors lie along the lanes, so maxima and sums need no shuffles and P is
 * packed as it comes. Codes of the cache are exact in bf16 and stay codes, as in attn_cpu.c. Lanes
 * never meet: a vector has the same bytes in any tile, as masked tokens add exactly 0 and a fully
 * masked chunk changes nothing. */
#include <math.h>

#include "kernels/amx.h"
#include "kernels/cpu.h"
#include "kernels/kv.h"

#define CHUNK   128 /* tokens: four steps of P V for each pass over the sums */
#define TILE_V  128 /* query vectors of a work item */
#define MAX_D   256 /* larger heads would not fit the worker's scratch; vectors serve them */
#define S_STEPS (CHUNK / AMX_STEP)

typedef struct {
    uint8_t *q;     /* B panel [TILE_V/16][dp/32] */
    uint8_t *k, *v; /* A panels [4][dp/32], [dp/16][2] */
    uint8_t *p;     /* B panel [TILE_V/16][2] */
    float *s, *y;   /* tiles [4][TILE_V/16], [dp/16][TILE_V/16] of f32 [16,16] */
    float *kp, *vp; /* [2, CHUNK] scales, zeros */
    float *max, *sum, *qsum, *keep, *shift; /* [TILE_V] */
    int32_t *first, *last;                  /* [TILE_V] positions that a vector sees */
    float *rows;                            /* [16, dp] query vectors, scaled */
} attn_tile;

typedef struct {
    device *d;
    tensor *y;
    const tensor *q;
    const kv_layer *kv;
    const batch_rows *rows;
    float scale;
    int32_t window;
    int64_t dp, groups, tiles;
    int parts; /* of K and V: codes need one */
} attn_ctx;

static void *take(uint8_t **p, int64_t bytes)
{
    void *out = *p;
    *p += dev_align64((size_t)bytes);
    return out;
}

/* With heads of 256: 2 x 128 KB of queries and sums, 4 x 128 KB of the rest. */
static attn_tile tile_at(void *scratch, int64_t dp)
{
    uint8_t *p = scratch;
    attn_tile t;
    t.q = take(&p, TILE_V * dp * 4);
    t.y = take(&p, TILE_V * dp * 4);
    t.k = take(&p, CHUNK * dp * 4);
    t.v = take(&p, CHUNK * dp * 4);
    t.p = take(&p, TILE_V * CHUNK * 4);
    t.s = take(&p, TILE_V * CHUNK * 4);
    t.rows = take(&p, AMX_TILE * dp * 4);
    t.kp = take(&p, 2 * CHUNK * 4);
    t.vp = take(&p, 2 * CHUNK * 4);
    t.max = take(&p, TILE_V * 4);
    t.sum = take(&p, TILE_V * 4);
    t.qsum = take(&p, TILE_V * 4);
    t.keep = take(&p, TILE_V * 4);
    t.shift = take(&p, TILE_V * 4);
    t.first = take(&p, TILE_V * 4);
    t.last = take(&p, TILE_V * 4);
    return t;
}

/* ---- packing of the cache ---- */

/* Channels [c, c+16) of a token, zero beyond d: values of KV_16, codes of the others. */
static inline vf load16(const uint8_t *row, kv_format f, int64_t c, int64_t d)
{
    const int64_t n = d - c;
    if (n <= 0) return vf_zero();
    if (f == KV_16) {
        const f16 *h = (const f16 *)(const void *)row + c;
        return n >= VL ? vf_f16(h) : vf_f16_n(h, n);
    }
    if (f == KV_8) return n >= VL ? vf_u8(row + c) : vf_u8_n(row + c, n);
    return n >= VL ? vf_u4(row + c / 2) : vf_u4_n(row + c / 2, n);
}

/* The rows of a chunk, wherever their blocks lie; NULL beyond n. */
static void chunk_rows(const kv_layer *kv, const int32_t *blocks, int32_t t0, int32_t n,
                       int32_t head, int part, const uint8_t *row[CHUNK], float *par)
{
    for (int32_t i = 0; i < CHUNK; i++) {
        const int32_t block = i < n ? blocks[(t0 + i) / kv->block_tokens] : 0;
        const int32_t slot = (t0 + i) % kv->block_tokens;
        row[i] = NULL;
        par[i] = par[CHUNK + i] = 0; /* masked, but never NaN */
        if (i >= n) continue;
        row[i] = kv_data(kv, block, head, part) + (size_t)slot * kv_token_bytes(kv);
        if (kv->format == KV_16) continue;
        const f16 *p = kv_param(kv, block, head, part) + 2 * slot;
        par[i] = _cvtsh_ss(p[0]);
        par[CHUNK + i] = _cvtsh_ss(p[1]);
    }
}

/* A rows: tokens along the tile's rows, channels along k. */
static void pack_keys(const attn_ctx *c, uint8_t *dst, const uint8_t *const row[CHUNK])
{
    const int64_t steps = c->dp / AMX_STEP, d = c->kv->head_dim;
    for (int32_t i = 0; i < CHUNK; i++) {
        uint8_t *out = dst + (i / AMX_TILE * steps * c->parts) * AMX_BYTES + i % AMX_TILE * 64;
        for (int64_t s = 0; s < steps; s++, out += c->parts * AMX_BYTES) {
            __m512i hi = _mm512_setzero_si512(), lo = hi;
            if (row[i])
                amx_split(load16(row[i], c->kv->format, s * AMX_STEP, d),
                          load16(row[i], c->kv->format, s * AMX_STEP + VL, d), &hi, &lo);
            _mm512_storeu_si512(out, hi);
            if (c->parts == AMX_PARTS) _mm512_storeu_si512(out + AMX_BYTES, lo);
        }
    }
}

/* A rows: channels along the tile's rows, tokens along k, by way of pairs of tokens and a
 * transpose. */
static void pack_values(const attn_ctx *c, uint8_t *dst, const uint8_t *const row[CHUNK])
{
    const int64_t d = c->kv->head_dim;
    const kv_format f = c->kv->format;
    for (int64_t ch = 0; ch < c->dp; ch += AMX_TILE) {
        for (int64_t s = 0; s < S_STEPS; s++, dst += c->parts * AMX_BYTES) {
            __m512i hi[16], lo[16];
            for (int p = 0; p < 16; p++) {
                const uint8_t *a = row[s * AMX_STEP + 2 * p], *b = row[s * AMX_STEP + 2 * p + 1];
                amx_split_pair(a ? load16(a, f, ch, d) : vf_zero(),
                               b ? load16(b, f, ch, d) : vf_zero(), &hi[p], &lo[p]);
            }
            amx_transpose(hi);
            amx_store_rows(dst, hi);
            if (c->parts != AMX_PARTS) continue;
            amx_transpose(lo);
            amx_store_rows(dst + AMX_BYTES, lo);
        }
    }
}

/* ---- softmax: 16 vectors at a time ---- */

/* Scores as they count: scaled back from codes, -infinity where a vector does not see the token.
 * Returns the largest of each lane. */
static vf finish_scores(const attn_tile *t, float *s, int64_t pitch, int64_t v0, int32_t t0,
                        bool coded)
{
    const vf qsum = vf_load(t->qsum + v0);
    const __m512i first = _mm512_loadu_si512(t->first + v0),
                  last = _mm512_loadu_si512(t->last + v0);
    vf top = vf_set(-INFINITY);
    for (int32_t i = 0; i < CHUNK; i++) {
        float *at = s + i / AMX_TILE * pitch + i % AMX_TILE * 16;
        const __m512i pos = _mm512_set1_epi32(t0 + i);
        const __mmask16 seen = _mm512_cmple_epi32_mask(first, pos) &
                               _mm512_cmple_epi32_mask(pos, last);
        vf x = vf_load(at);
        if (coded) x = vf_fma(x, vf_set(t->kp[i]), vf_mul(qsum, vf_set(t->kp[CHUNK + i])));
        x = _mm512_mask_blend_ps(seen, vf_set(-INFINITY), x);
        top = vf_max(x, top); /* the second operand for a NaN: it shows in the sum instead */
        vf_store(at, x);
    }
    return top;
}

/* Weights of 16 vectors into the P panel; what sums so far are worth and what zeros add go to keep,
 * shift. */
static void weigh(attn_tile *t, const float *s, int64_t pitch, int64_t v0, vf top, bool coded)
{
    const vf old = vf_load(t->max + v0), max = vf_max(old, top);
    const __mmask16 none = _mm512_cmpeq_epi32_mask(_mm512_castps_si512(max),
                                                   _mm512_castps_si512(vf_set(-INFINITY)));
    const vf base = _mm512_mask_blend_ps(none, max,
                                         vf_zero()); /* nothing seen yet: weights are e^-inf */
    const vf keep = vf_exp_neg(vf_sub(old, base));
    vf sum = vf_zero(), shift = vf_zero();
    uint8_t *out = t->p + v0 / AMX_TILE * S_STEPS * AMX_PARTS * AMX_BYTES;
    for (int32_t i = 0; i < CHUNK; i += 2) {
        vf p[2];
        __m512i hi, lo;
        for (int j = 0; j < 2; j++) {
            const int32_t tok = i + j;
            p[j] = vf_exp_neg(
                vf_sub(vf_load(s + tok / AMX_TILE * pitch + tok % AMX_TILE * 16), base));
            sum = vf_add(sum, p[j]);
            if (!coded) continue;
            shift = vf_fma(p[j], vf_set(t->vp[CHUNK + tok]), shift);
            p[j] = vf_mul(p[j], vf_set(t->vp[tok]));
        }
        amx_split_pair(p[0], p[1], &hi, &lo);
        uint8_t *at = out + i / AMX_STEP * AMX_PARTS * AMX_BYTES + i % AMX_STEP / 2 * 64;
        _mm512_storeu_si512(at, hi);
        _mm512_storeu_si512(at + AMX_BYTES, lo);
    }
    vf_store(t->max + v0, max);
    vf_store(t->sum + v0, vf_fma(vf_load(t->sum + v0), keep, sum));
    vf_store(t->keep + v0, keep);
    vf_store(t->shift + v0, shift);
}

static void rescale(attn_tile *t, int64_t columns, int64_t dp)
{
    for (int64_t j = 0; j < columns; j++) {
        const vf keep = vf_load(t->keep + 16 * j), shift = vf_load(t->shift + 16 * j);
        for (int64_t ch = 0; ch < dp; ch++) {
            float *y = t->y + (ch / AMX_TILE * columns + j) * 256 + ch % AMX_TILE * 16;
            vf_store(y, vf_fma(vf_load(y), keep, shift));
        }
    }
}

static void chunk_step(const attn_ctx *c, attn_tile *t, const int32_t *blocks, int32_t head,
                       int64_t columns, int32_t t0, int32_t n)
{
    const uint8_t *row[CHUNK];
    const bool coded = c->kv->format != KV_16;
    const int64_t steps = c->dp / AMX_STEP;
    const amx_job score = {.c = t->s,
                           .a = t->k,
                           .b = t->q,
                           .rows = CHUNK / AMX_TILE,
                           .columns = columns,
                           .steps = steps,
                           .a_pitch = steps * c->parts * AMX_BYTES,
                           .b_pitch = steps * AMX_PARTS * AMX_BYTES,
                           .a_parts = c->parts,
                           .first = true};
    const amx_job mix = {.c = t->y,
                         .a = t->v,
                         .b = t->p,
                         .rows = c->dp / AMX_TILE,
                         .columns = columns,
                         .steps = S_STEPS,
                         .a_pitch = S_STEPS * c->parts * AMX_BYTES,
                         .b_pitch = S_STEPS * AMX_PARTS * AMX_BYTES,
                         .a_parts = c->parts};
    chunk_rows(c->kv, blocks, t0, n, head, KV_K, row, t->kp);
    pack_keys(c, t->k, row);
    amx_block(&score);
    chunk_rows(c->kv, blocks, t0, n, head, KV_V, row, t->vp);
    pack_values(c, t->v, row);
    for (int64_t j = 0; j < columns; j++) {
        float *s = t->s + j * 256;
        const vf top = finish_scores(t, s, columns * 256, 16 * j, t0, coded);
        weigh(t, s, columns * 256, 16 * j, top, coded);
    }
    rescale(t, columns, c->dp);
    amx_block(&mix);
}

/* ---- work items ---- */

typedef struct {
    int32_t seq, head;
    int64_t v0;      /* query vectors v0.. : row v / groups, head v % groups of the sequence */
    int32_t nv;      /* of them */
    int64_t columns; /* tiles of 16, an even number */
    int32_t lo, hi;  /* positions that any of them sees */
} attn_place;

/* Work items run from the last tile to the first: those of prefill grow with the position. */
static bool place_of(const attn_ctx *c, int64_t item, attn_place *p)
{
    const int64_t all = (int64_t)c->kv->kv_heads * c->rows->seqs;
    const int32_t *start = kv_i32(&c->rows->seq_start);
    p->seq = (int32_t)(item % all / c->kv->kv_heads);
    p->head = (int32_t)(item % all % c->kv->kv_heads);
    p->v0 = (c->tiles - 1 - item / all) * TILE_V;
    const int64_t rows = start[p->seq + 1] - start[p->seq], left = rows * c->groups - p->v0;
    if (rows <= AMX_VECTOR_ROWS || left <= 0) return false;
    p->nv = left < TILE_V ? (int32_t)left : TILE_V;
    p->columns = amx_up(p->nv, 2 * AMX_TILE) / AMX_TILE;
    return true;
}

static float *vector_at(const attn_ctx *c, const tensor *t, const attn_place *p, int64_t i)
{
    const int64_t v = p->v0 + i, row = kv_i32(&c->rows->seq_start)[p->seq] + v / c->groups;
    float *base = (float *)t->data + row * t->stride[0];
    if (t->ndim == 2) return base + (p->head * c->groups + v % c->groups) * c->kv->head_dim;
    return base + p->head * t->stride[1] + v % c->groups * t->stride[2];
}

/* 16 vectors scaled into t->rows and the B panel; what each of them sees. */
static void load_column(const attn_ctx *c, attn_tile *t, attn_place *p, int64_t column)
{
    const int64_t d = c->kv->head_dim, steps = c->dp / AMX_STEP;
    for (int64_t i = 0; i < AMX_TILE; i++) {
        const int64_t v = column * AMX_TILE + i;
        float *dst = t->rows + i * c->dp;
        memset(dst, 0, (size_t)c->dp * sizeof *dst);
        t->qsum[v] = t->sum[v] = 0;
        t->max[v] = -INFINITY;
        t->first[v] = INT32_MAX; /* beyond nv: sees nothing */
        t->last[v] = 0;
        if (v >= p->nv) continue;
        const float *q = vector_at(c, c->q, p, v);
        const int64_t row = (p->v0 + v) / c->groups;
        const int32_t pos = kv_i32(&c->rows->pos)[kv_i32(&c->rows->seq_start)[p->seq] + row];
        vf sum = vf_zero();
        for (int64_t j = 0; j < d; j += VL) {
            const int64_t n = d - j < VL ? d - j : VL;
            const vf x = vf_mul(vf_load_n(q + j, n), vf_set(c->scale));
            vf_store_n(dst + j, x, n);
            sum = vf_add(sum, x);
        }
        t->qsum[v] = vf_sum(sum);
        t->last[v] = pos;
        t->first[v] = c->window && pos >= c->window ? pos - c->window + 1 : 0;
        p->lo = t->first[v] < p->lo ? t->first[v] : p->lo;
        p->hi = pos + 1 > p->hi ? pos + 1 : p->hi;
    }
    amx_pack_b_rows(t->q + column * steps * AMX_PARTS * AMX_BYTES, t->rows, c->dp, AMX_TILE, c->dp,
                    steps);
}

/* Sums over totals, from [channels, vectors] tiles back to rows. */
static void store_column(const attn_ctx *c, const attn_tile *t, const attn_place *p, int64_t column)
{
    const int64_t d = c->kv->head_dim, left = p->nv - column * AMX_TILE;
    for (int64_t ch = 0; ch < d; ch += AMX_TILE) {
        const float *tile = t->y + (ch / AMX_TILE * p->columns + column) * 256;
        const vf sum = vf_load(t->sum + column * AMX_TILE);
        __m512i r[16];
        for (int i = 0; i < 16; i++)
            r[i] = _mm512_castps_si512(vf_div(vf_load(tile + 16 * i), sum));
        amx_transpose(r);
        for (int64_t i = 0; i < 16 && i < left; i++) {
            float *y = vector_at(c, c->y, p, column * AMX_TILE + i) + ch;
            vf_store_n(y, _mm512_castsi512_ps(r[i]), d - ch < VL ? d - ch : VL);
        }
    }
}

static void attn_item(void *ctx, int64_t item, int worker)
{
    const attn_ctx *c = ctx;
    attn_place p = {.lo = INT32_MAX};
    if (!place_of(c, item, &p)) return;
    attn_tile t = tile_at(dev_worker(c->d, worker), c->dp);
    for (int64_t j = 0; j < p.columns; j++) load_column(c, &t, &p, j);
    memset(t.y, 0, (size_t)(p.columns * AMX_TILE * c->dp) * sizeof *t.y);
    amx_begin();
    for (int32_t t0 = p.lo - p.lo % CHUNK; t0 < p.hi; t0 += CHUNK)
        chunk_step(c, &t, kv_blocks(c->rows, p.seq), p.head, p.columns, t0,
                   p.hi - t0 < CHUNK ? p.hi - t0 : CHUNK);
    _tile_release();
    for (int64_t j = 0; j * AMX_TILE < p.nv; j++) store_column(c, &t, &p, j);
}

err_code attn_amx(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                  float scale, int32_t window, err *e)
{
    if (kv->head_dim > MAX_D || rows->max_q <= AMX_VECTOR_ROWS || d->deterministic)
        return attn_cpu_few_avx512(d, y, q, kv, rows, scale, window, INT32_MAX, e);
    attn_ctx c = {.d = d, .y = y, .q = q, .kv = kv, .rows = rows, .scale = scale, .window = window};
    c.dp = amx_up(kv->head_dim, AMX_STEP);
    c.groups = q->shape[2];
    c.tiles = (rows->max_q * c.groups + TILE_V - 1) / TILE_V;
    c.parts = kv->format == KV_16 ? AMX_PARTS : 1;
    pool_run(d->workers, attn_item, &c, c.tiles * kv->kv_heads * rows->seqs);
    if (rows->seqs == 1) return OK;
    return attn_cpu_few_avx512(d, y, q, kv, rows, scale, window, AMX_VECTOR_ROWS, e);
}
