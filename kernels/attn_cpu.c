/* Attention over the paged cache in f32. Keys and values of 64 tokens are unpacked once for a tile
 * of up to 32 query vectors (rows of a sequence times the heads that share a kv head). Codes stay
 * codes: with one scale and zero per token, q.k = scale (q.code) + zero sum(q), and p.v = (p
 * scale).code + sum(p zero).
 *
 * Order of sums, the same for any tiling: chunks of 64 positions from 0 on, softmax running over
 * the chunks of a segment of 256; segments join in ascending order. So a row gets the same bytes in
 * prefill, in a batch and alone; segments may be computed by different threads (long contexts, few
 * rows). A masked token adds exactly 0 and a fully masked chunk changes nothing. */
#include <math.h>

#include "kernels/cpu_ops.h"
#include "kernels/kv.h"
#include "kernels/vec.h"

#define CHUNK       64  /* tokens unpacked at a time */
#define SEGMENT     256 /* tokens of one running softmax; a multiple of CHUNK */
#define TILE_V      32  /* query vectors of a work item; a multiple of 4 */
#define ATTN_PAD(d) (((d) + VL - 1) / VL * VL)
#define SPLIT_V \
    256 /* up to this many query slots in all, segments become work items of their own */

typedef struct {
    float *q;                           /* [TILE_V, dp] scaled; unused rows zero */
    float *qsum;                        /* [TILE_V] */
    float *k, *v;                       /* [CHUNK, dp] unpacked; columns beyond head_dim zero */
    float *kp, *vp;                     /* [2, CHUNK] scales, then zeros */
    float *s;                           /* [TILE_V, CHUNK] scores, then weights */
    float *acc, *max, *sum;             /* [TILE_V, dp], [TILE_V]: running over a segment */
    float *acc_all, *max_all, *sum_all; /* the same over the segments so far */
    int32_t *first, *last;              /* [TILE_V] positions that a vector sees */
} attn_tile;

typedef struct {
    device *d;
    tensor *y;
    const tensor *q;
    const kv_layer *kv;
    const batch_rows *rows;
    float scale;
    int32_t window;
    int64_t dp;       /* head_dim up to whole vectors */
    int64_t groups;   /* query heads of a kv head */
    int64_t tiles;    /* work items of a sequence and head, at most */
    int64_t segments; /* partial results of a tile; 0: not split */
    int64_t slots;    /* query vectors of a partial result */
    float *partial;   /* [seqs * kv_heads * tiles, segments, slots, dp + 2] */
} attn_ctx;

static float *take(uint8_t **p, int64_t n)
{
    float *out = (float *)(void *)*p;
    *p += dev_align64((size_t)n * sizeof(float));
    return out;
}

/* At most 5 x 32 + 2 x 64 rows of 1024 floats: 1.2 MB of the worker's 2 MB. */
static attn_tile tile_at(void *scratch, int64_t dp)
{
    uint8_t *p = scratch;
    attn_tile t;
    t.q = take(&p, TILE_V * dp);
    t.acc = take(&p, TILE_V * dp);
    t.acc_all = take(&p, TILE_V * dp);
    t.k = take(&p, CHUNK * dp);
    t.v = take(&p, CHUNK * dp);
    t.s = take(&p, TILE_V * CHUNK);
    t.kp = take(&p, 2 * CHUNK);
    t.vp = take(&p, 2 * CHUNK);
    t.qsum = take(&p, TILE_V);
    t.max = take(&p, TILE_V);
    t.sum = take(&p, TILE_V);
    t.max_all = take(&p, TILE_V);
    t.sum_all = take(&p, TILE_V);
    t.first = (int32_t *)(void *)take(&p, TILE_V);
    t.last = (int32_t *)(void *)take(&p, TILE_V);
    return t;
}

/* ---- unpacking ---- */

/* Codes of two channels a byte, low nibble first, as bytes. */
static inline void unpack_nibbles(uint8_t *dst, const uint8_t *src, int n_bytes)
{
    const __m128i low = _mm_set1_epi8(15);
    for (int i = 0; i < n_bytes; i += 8) {
        uint64_t w = 0;
        memcpy(&w, src + i, n_bytes - i < 8 ? (size_t)(n_bytes - i) : 8);
        const __m128i b = _mm_cvtsi64_si128((long long)w);
        const __m128i lo = _mm_and_si128(b, low), hi = _mm_and_si128(_mm_srli_epi16(b, 4), low);
        _mm_storeu_si128((__m128i *)(void *)(dst + 2 * i), _mm_unpacklo_epi8(lo, hi));
    }
}

/* One token as floats: values of KV_16, codes of the others. dst is zero beyond head_dim already.
 */
static inline void unpack_token(float *dst, const uint8_t *src, kv_format f, int d)
{
    uint8_t codes[1024 + 16];
    int c = 0;
    if (f == KV_16) {
        const f16 *h = (const f16 *)(const void *)src;
        for (; c + VL <= d; c += VL) vf_store(dst + c, vf_f16(h + c));
        if (c < d) vf_store_n(dst + c, vf_f16_n(h + c, d - c), d - c);
        return;
    }
    if (f == KV_4) {
        unpack_nibbles(codes, src, d / 2);
        src = codes;
    }
    for (; c + VL <= d; c += VL) vf_store(dst + c, vf_u8(src + c));
    if (c < d) vf_store_n(dst + c, vf_u8_n(src + c, d - c), d - c);
}

/* Tokens [t0, t0+n) of a head into dst [n, dp] and their scales and zeros into par [2, CHUNK]. */
static void unpack_chunk(const attn_ctx *c, const int32_t *blocks, int32_t t0, int32_t n,
                         int32_t head, int part, float *dst, float *par)
{
    const kv_layer *kv = c->kv;
    const size_t bytes = kv_token_bytes(kv);
    for (int32_t i = n; i < CHUNK; i++) par[i] = par[CHUNK + i] = 0; /* masked, but never NaN */
    for (int32_t i = 0; i < n;) {
        const int32_t slot = (t0 + i) % kv->block_tokens,
                      block = blocks[(t0 + i) / kv->block_tokens];
        const int32_t run = n - i < kv->block_tokens - slot ? n - i : kv->block_tokens - slot;
        const uint8_t *src = kv_data(kv, block, head, part) + (size_t)slot * bytes;
        for (int32_t j = 0; j < run; j++)
            unpack_token(dst + (i + j) * c->dp, src + (size_t)j * bytes, kv->format, kv->head_dim);
        if (kv->format != KV_16) {
            const f16 *p = kv_param(kv, block, head, part) + 2 * slot;
            for (int32_t j = 0; j < run; j++) {
                par[i + j] = f16_to_f32(p[2 * j]);
                par[CHUNK + i + j] = f16_to_f32(p[2 * j + 1]);
            }
        }
        i += run;
    }
}

/* ---- the two products ---- */

#define DOT_V 4        /* query vectors ... */
#define DOT_T (VL / 4) /* ... by tokens of one tile of dot products */

/* s[i][t] = q_i . k_t for DOT_V vectors and n tokens (k has whole DOT_T groups of rows to read) */
static void dot_rows(float *s, const float *q, const float *k, int64_t dp, int32_t n)
{
    for (int32_t t = 0; t < n; t += DOT_T) {
        vf acc[VL];
        float out[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) acc[i] = vf_zero();
        for (int64_t c = 0; c < dp; c += VL) {
            vf kt[DOT_T];
#pragma GCC unroll 4
            for (int j = 0; j < DOT_T; j++) kt[j] = vf_load(k + (t + j) * dp + c);
#pragma GCC unroll 4
            for (int i = 0; i < DOT_V; i++) {
                const vf qi = vf_load(q + i * dp + c);
#pragma GCC unroll 4
                for (int j = 0; j < DOT_T; j++)
                    acc[i * DOT_T + j] = vf_fma(qi, kt[j], acc[i * DOT_T + j]);
            }
        }
        vf_store(out, vf_sum_each(acc));
        for (int i = 0; i < DOT_V; i++)
            memcpy(s + i * CHUNK + t, out + i * DOT_T, sizeof *s * DOT_T);
    }
}

#define MIX_C (VL / 4) /* vectors of channels of one tile of weighted sums */

/* acc[i][c..] += sum over t of p[i][t] v[t][c..] for DOT_V vectors and `width` <= MIX_C vf of
 * channels */
static inline __attribute__((always_inline)) void
mix_tile(float *acc, const float *p, const float *v, int64_t dp, int32_t n, const int width)
{
    vf a[DOT_V * MIX_C];
#pragma GCC unroll 4
    for (int i = 0; i < DOT_V; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) a[i * MIX_C + j] = vf_load(acc + i * dp + j * VL);
    }
    for (int32_t t = 0; t < n; t++) {
        vf vt[MIX_C];
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) vt[j] = vf_load(v + t * dp + j * VL);
#pragma GCC unroll 4
        for (int i = 0; i < DOT_V; i++) {
            const vf pi = vf_set(p[i * CHUNK + t]);
#pragma GCC unroll 4
            for (int j = 0; j < width; j++) a[i * MIX_C + j] = vf_fma(pi, vt[j], a[i * MIX_C + j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < DOT_V; i++) {
#pragma GCC unroll 4
        for (int j = 0; j < width; j++) vf_store(acc + i * dp + j * VL, a[i * MIX_C + j]);
    }
}

static void mix_rows(float *acc, const float *p, const float *v, int64_t dp, int32_t n)
{
    int64_t c = 0;
    for (; c + MIX_C * VL <= dp; c += MIX_C * VL) mix_tile(acc + c, p, v + c, dp, n, MIX_C);
    for (; c < dp; c += VL) mix_tile(acc + c, p, v + c, dp, n, 1);
}

/* ---- softmax ---- */

/* Scores of one vector in a chunk to weights; updates its running maximum and sum. Returns what the
 * sums so far are worth now. Tokens outside of [first, last] weigh 0. */
static float softmax_row(float *s, int32_t n, int32_t from, int32_t to, float *max, float *sum)
{
    vf top = vf_set(-INFINITY), total = vf_zero();
    if (to > n - 1) to = n - 1;
    if (to < -1) to = -1;
    for (int32_t t = 0; t < from && t < CHUNK; t++) s[t] = -INFINITY;
    for (int32_t t = to + 1; t < CHUNK; t++) s[t] = -INFINITY;
    for (int t = 0; t < CHUNK; t += VL) top = vf_max(vf_load(s + t), top);
    const float m = fmaxf(*max, vf_hmax(top));
    if (m == -INFINITY) { /* nothing visible yet */
        memset(s, 0, CHUNK * sizeof *s);
        return 1;
    }
    for (int t = 0; t < CHUNK; t += VL) {
        const vf p = vf_exp(vf_sub(vf_load(s + t), vf_set(m)));
        total = vf_add(total, p);
        vf_store(s + t, p);
    }
    float keep[VL];
    vf_store(keep, vf_exp(vf_set(*max - m)));
    *max = m;
    *sum = *sum * keep[0] + vf_sum(total);
    return keep[0];
}

/* ---- one chunk for one tile ---- */

static void scale_scores(float *s, const float *par, float qsum)
{
    for (int t = 0; t < CHUNK; t += VL) {
        const vf zero = vf_mul(vf_load(par + CHUNK + t), vf_set(qsum));
        vf_store(s + t, vf_fma(vf_load(s + t), vf_load(par + t), zero));
    }
}

/* Weights times scales; returns the sum of weights times zeros, which every channel gets. */
static float scale_weights(float *s, const float *par)
{
    vf shift = vf_zero();
    for (int t = 0; t < CHUNK; t += VL) {
        const vf p = vf_load(s + t);
        shift = vf_fma(p, vf_load(par + CHUNK + t), shift);
        vf_store(s + t, vf_mul(p, vf_load(par + t)));
    }
    return vf_sum(shift);
}

static void rescale(float *acc, int64_t dp, float keep, float shift)
{
    for (int64_t c = 0; c < dp; c += VL)
        vf_store(acc + c, vf_fma(vf_load(acc + c), vf_set(keep), vf_set(shift)));
}

static void chunk_step(const attn_ctx *c, attn_tile *t, const int32_t *blocks, int32_t head,
                       int32_t nv, int32_t t0, int32_t n)
{
    const bool coded = c->kv->format != KV_16;
    unpack_chunk(c, blocks, t0, n, head, KV_K, t->k, t->kp);
    unpack_chunk(c, blocks, t0, n, head, KV_V, t->v, t->vp);
    for (int32_t i = 0; i < nv; i += DOT_V) {
        float *s = t->s + i * CHUNK, *acc = t->acc + i * c->dp;
        dot_rows(s, t->q + i * c->dp, t->k, c->dp, n);
        for (int32_t j = i; j < i + DOT_V; j++) {
            float *row = t->s + j * CHUNK, shift = 0;
            if (coded) scale_scores(row, t->kp, t->qsum[j]);
            const float keep = softmax_row(row, n, t->first[j] - t0, t->last[j] - t0, t->max + j,
                                           t->sum + j);
            if (coded) shift = scale_weights(row, t->vp);
            rescale(t->acc + j * c->dp, c->dp, keep, shift);
        }
        mix_rows(acc, s, t->v, c->dp, n);
    }
}

/* ---- segments ---- */

static void segment_begin(attn_tile *t, int64_t dp)
{
    memset(t->acc, 0, (size_t)(TILE_V * dp) * sizeof *t->acc);
    for (int i = 0; i < TILE_V; i++) {
        t->max[i] = -INFINITY;
        t->sum[i] = 0;
    }
}

/* Takes a segment's result into the running one. */
static void segment_join(float *acc_all, float *max_all, float *sum_all, const float *acc,
                         float max, float sum, int64_t dp)
{
    float keep[VL], take_in[VL];
    if (max == -INFINITY) return;
    const float m = fmaxf(*max_all, max);
    vf_store(keep, vf_exp(vf_set(*max_all - m)));
    vf_store(take_in, vf_exp(vf_set(max - m)));
    *max_all = m;
    *sum_all = *sum_all * keep[0] + sum * take_in[0];
    for (int64_t c = 0; c < dp; c += VL) {
        const vf old = vf_mul(vf_load(acc_all + c), vf_set(keep[0]));
        vf_store(acc_all + c, vf_fma(vf_load(acc + c), vf_set(take_in[0]), old));
    }
}

static void segment_run(const attn_ctx *c, attn_tile *t, const int32_t *blocks, int32_t head,
                        int32_t nv, int32_t lo, int32_t hi)
{
    segment_begin(t, c->dp);
    for (int32_t t0 = lo - lo % CHUNK; t0 < hi; t0 += CHUNK)
        chunk_step(c, t, blocks, head, nv, t0, hi - t0 < CHUNK ? hi - t0 : CHUNK);
}

/* ---- work items ---- */

/* Query vectors v0.. of sequence s: row v / groups, head v % groups. Returns how many; *lo, *hi:
 * the positions that any of them sees. */
static int32_t load_queries(const attn_ctx *c, attn_tile *t, int32_t s, int32_t head, int64_t v0,
                            int32_t *lo, int32_t *hi)
{
    const int32_t *start = kv_i32(&c->rows->seq_start), *pos = kv_i32(&c->rows->pos);
    const int64_t count = (start[s + 1] - start[s]) * c->groups - v0;
    const int32_t nv = count < TILE_V ? (int32_t)count : TILE_V, d = c->kv->head_dim;
    memset(t->q, 0, (size_t)(TILE_V * c->dp) * sizeof *t->q);
    if (d < c->dp) { /* unpacking leaves the padding alone */
        memset(t->k, 0, (size_t)(CHUNK * c->dp) * sizeof *t->k);
        memset(t->v, 0, (size_t)(CHUNK * c->dp) * sizeof *t->v);
    }
    *lo = INT32_MAX;
    *hi = 0;
    for (int32_t i = 0; i < TILE_V; i++) { /* vectors beyond nv see nothing */
        t->first[i] = INT32_MAX / 2;
        t->last[i] = t->qsum[i] = 0;
    }
    for (int32_t i = 0; i < nv; i++) {
        const int64_t row = start[s] + (v0 + i) / c->groups, g = (v0 + i) % c->groups;
        const float *q = (const float *)c->q->data + row * c->q->stride[0] +
                         head * c->q->stride[1] + g * c->q->stride[2];
        vf sum = vf_zero();
        for (int32_t j = 0; j < d; j += VL) {
            const vf x = vf_mul(vf_load_n(q + j, d - j < VL ? d - j : VL), vf_set(c->scale));
            vf_store(t->q + i * c->dp + j, x);
            sum = vf_add(sum, x);
        }
        t->qsum[i] = vf_sum(sum);
        t->last[i] = pos[row];
        t->first[i] = c->window && pos[row] >= c->window ? pos[row] - c->window + 1 : 0;
        *lo = t->first[i] < *lo ? t->first[i] : *lo;
        *hi = t->last[i] + 1 > *hi ? t->last[i] + 1 : *hi;
    }
    return nv;
}

static void store_rows(const attn_ctx *c, int32_t s, int32_t head, int64_t v0, int32_t nv,
                       const float *acc, const float *sum)
{
    const int32_t *start = kv_i32(&c->rows->seq_start), d = c->kv->head_dim;
    for (int32_t i = 0; i < nv; i++) {
        const int64_t row = start[s] + (v0 + i) / c->groups, g = (v0 + i) % c->groups;
        float *y = (float *)c->y->data + row * c->y->stride[0] + (head * c->groups + g) * d;
        for (int32_t j = 0; j < d; j++) y[j] = acc[i * c->dp + j] / sum[i];
    }
}

/* Work items run from the last tile to the first: those of prefill grow with the position. */
static bool item_place(const attn_ctx *c, int64_t item, int32_t *s, int32_t *head, int64_t *v0)
{
    const int64_t tile = c->tiles - 1 - item / (c->kv->kv_heads * c->rows->seqs);
    const int64_t rest = item % (c->kv->kv_heads * c->rows->seqs);
    const int32_t *start = kv_i32(&c->rows->seq_start);
    *s = (int32_t)(rest / c->kv->kv_heads);
    *head = (int32_t)(rest % c->kv->kv_heads);
    *v0 = tile * TILE_V;
    return *v0 < (start[*s + 1] - start[*s]) * c->groups;
}

static void whole_item(void *ctx, int64_t item, int worker)
{
    const attn_ctx *c = ctx;
    int32_t s, head, lo, hi;
    int64_t v0;
    if (!item_place(c, item, &s, &head, &v0)) return;
    attn_tile t = tile_at(dev_worker(c->d, worker), c->dp);
    const int32_t nv = load_queries(c, &t, s, head, v0, &lo, &hi);
    memset(t.acc_all, 0, (size_t)(TILE_V * c->dp) * sizeof *t.acc_all);
    for (int i = 0; i < TILE_V; i++) {
        t.max_all[i] = -INFINITY;
        t.sum_all[i] = 0;
    }
    for (int32_t b = lo - lo % SEGMENT; b < hi; b += SEGMENT) {
        const int32_t from = b < lo ? lo : b, to = hi < b + SEGMENT ? hi : b + SEGMENT;
        segment_run(c, &t, kv_blocks(c->rows, s), head, nv, from, to);
        for (int32_t i = 0; i < nv; i++)
            segment_join(t.acc_all + i * c->dp, t.max_all + i, t.sum_all + i, t.acc + i * c->dp,
                         t.max[i], t.sum[i], c->dp);
    }
    store_rows(c, s, head, v0, nv, t.acc_all, t.sum_all);
}

/* A partial result: [slots, dp] sums, then [slots] maxima, then [slots] totals. */
static float *partial_at(const attn_ctx *c, int64_t place, int64_t segment)
{
    return c->partial + (place * c->segments + segment) * c->slots * (c->dp + 2);
}

static void segment_item(void *ctx, int64_t item, int worker)
{
    const attn_ctx *c = ctx;
    const int64_t place = item / c->segments, seg = item % c->segments;
    int32_t s, head, lo, hi;
    int64_t v0;
    if (!item_place(c, place, &s, &head, &v0)) return;
    attn_tile t = tile_at(dev_worker(c->d, worker), c->dp);
    const int32_t nv = load_queries(c, &t, s, head, v0, &lo, &hi);
    const int32_t b = (int32_t)seg * SEGMENT;
    if (b + SEGMENT <= lo || b >= hi) return;
    segment_run(c, &t, kv_blocks(c->rows, s), head, nv, b < lo ? lo : b,
                hi < b + SEGMENT ? hi : b + SEGMENT);
    float *out = partial_at(c, place, seg);
    memcpy(out, t.acc, (size_t)(nv * c->dp) * sizeof *out);
    memcpy(out + c->slots * c->dp, t.max, (size_t)nv * sizeof *out);
    memcpy(out + c->slots * (c->dp + 1), t.sum, (size_t)nv * sizeof *out);
}

static void join_item(void *ctx, int64_t place, int worker)
{
    const attn_ctx *c = ctx;
    int32_t s, head, lo, hi;
    int64_t v0;
    if (!item_place(c, place, &s, &head, &v0)) return;
    attn_tile t = tile_at(dev_worker(c->d, worker), c->dp);
    const int32_t nv = load_queries(c, &t, s, head, v0, &lo, &hi);
    memset(t.acc_all, 0, (size_t)(TILE_V * c->dp) * sizeof *t.acc_all);
    for (int32_t i = 0; i < nv; i++) {
        t.max_all[i] = -INFINITY;
        t.sum_all[i] = 0;
        for (int64_t seg = lo / SEGMENT; seg * SEGMENT < hi; seg++) {
            const float *p = partial_at(c, place, seg);
            segment_join(t.acc_all + i * c->dp, t.max_all + i, t.sum_all + i, p + i * c->dp,
                         p[c->slots * c->dp + i], p[c->slots * (c->dp + 1) + i], c->dp);
        }
    }
    store_rows(c, s, head, v0, nv, t.acc_all, t.sum_all);
}

/* ---- entry ---- */

err_code CPU_FN(attn_cpu)(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                          const batch_rows *rows, float scale, int32_t window, err *e)
{
    attn_ctx c = {.d = d, .y = y, .q = q, .kv = kv, .rows = rows, .scale = scale, .window = window};
    const int64_t segments = (rows->max_kv + SEGMENT - 1) / SEGMENT;
    const int64_t vectors = rows->max_q * q->shape[2];
    c.dp = ATTN_PAD(kv->head_dim);
    c.groups = q->shape[2];
    c.tiles = (vectors + TILE_V - 1) / TILE_V;
    c.slots = vectors < TILE_V ? vectors : TILE_V;
    const int64_t places = c.tiles * kv->kv_heads * rows->seqs;
    if (segments == 1 || places * c.slots > SPLIT_V) {
        pool_run(d->workers, whole_item, &c, places);
        return OK;
    }
    void *p;
    const int64_t floats = places * segments * c.slots * (c.dp + 2);
    TRY(dev_scratch(d, &p, (size_t)floats * sizeof(float), "op_attn", e));
    c.segments = segments;
    c.partial = p;
    pool_run(d->workers, segment_item, &c, places * segments);
    pool_run(d->workers, join_item, &c, places);
    return OK;
}

size_t CPU_FN(attn_cpu_scratch)(const op_limits *l)
{
    const size_t segments = ((size_t)l->max_kv + SEGMENT - 1) / SEGMENT;
    return segments > 1 ? SPLIT_V * segments * ((size_t)ATTN_PAD(l->head_dim) + 2) * sizeof(float)
                        : 0;
}
