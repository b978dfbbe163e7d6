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
#define TILE_V      32  /* query vectors of a work item; a multiple of GROUP_V */
#define GROUP_V     4   /* of them share a load of a key or value */
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
    int32_t limit;    /* sequences with more rows are left to another kernel */
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

/* ---- the cache as vectors ---- */

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* What rows of keys or values are: a cache format, or floats that were unpacked from one. */
typedef enum { ROW_F16, ROW_U8, ROW_U4, ROW_F32 } row_kind;

typedef struct {
    const uint8_t *data;
    size_t pitch; /* bytes from a token to the next */
    row_kind kind;
} attn_rows;

/* Channels c.. of a row: values of f16 and f32, codes of the others. `kind` is constant at every
 * call. */
ALWAYS_INLINE vf row_vec(const uint8_t *row, int64_t c, const row_kind kind)
{
    if (kind == ROW_F16) return vf_f16((const f16 *)(const void *)row + c);
    if (kind == ROW_U8) return vf_u8(row + c);
    if (kind == ROW_U4) return vf_u4(row + c / 2);
    return vf_load((const float *)(const void *)row + c);
}

ALWAYS_INLINE vf row_vec_n(const uint8_t *row, int64_t c, const row_kind kind, int64_t n)
{
    if (kind == ROW_F16) return vf_f16_n((const f16 *)(const void *)row + c, n);
    if (kind == ROW_U8) return vf_u8_n(row + c, n);
    return vf_u4_n(row + c / 2, n);
}

static row_kind kind_of(kv_format f) { return f == KV_16 ? ROW_F16 : f == KV_8 ? ROW_U8 : ROW_U4; }

/* n tokens as floats, [n, dp]; dst is zero beyond d already. */
ALWAYS_INLINE void unpack_as(float *dst, int64_t dp, const uint8_t *src, size_t pitch, int32_t n,
                             int64_t d, const row_kind kind)
{
    for (int32_t t = 0; t < n; t++, dst += dp, src += pitch) {
        int64_t c = 0;
        for (; c + VL <= d; c += VL) vf_store(dst + c, row_vec(src, c, kind));
        if (c < d) vf_store_n(dst + c, row_vec_n(src, c, kind, d - c), d - c);
    }
}

static void unpack_tokens(float *dst, int64_t dp, const uint8_t *src, int32_t n, const kv_layer *kv)
{
    const size_t pitch = kv_token_bytes(kv);
    if (kv->format == KV_16)
        unpack_as(dst, dp, src, pitch, n, kv->head_dim, ROW_F16);
    else if (kv->format == KV_8)
        unpack_as(dst, dp, src, pitch, n, kv->head_dim, ROW_U8);
    else
        unpack_as(dst, dp, src, pitch, n, kv->head_dim, ROW_U4);
}

/* n pairs {scale, zero} apart: scales at par, zeros at par + CHUNK. */
static void unpack_params(float *par, const f16 *p, int32_t n)
{
    float pair[2 * CHUNK];
    int32_t i = 0;
    for (; i + VL <= 2 * n; i += VL) vf_store(pair + i, vf_f16(p + i));
    if (i < 2 * n) vf_store(pair + i, vf_f16_n(p + i, 2 * n - i));
    for (i = 0; i < n; i++) {
        par[i] = pair[2 * i];
        par[CHUNK + i] = pair[2 * i + 1];
    }
}

/* Tokens [t0, t0+n) of a head and their scales and zeros (par [2, CHUNK]). Where they lie in one
 * block and are read once (`once`) as whole vectors, they are used where they are, else unpacked to
 * dst. */
static attn_rows load_chunk(const attn_ctx *c, const int32_t *blocks, int32_t t0, int32_t n,
                            int32_t head, int part, bool once, float *dst, float *par)
{
    const kv_layer *kv = c->kv;
    attn_rows r = {(uint8_t *)dst, (size_t)c->dp * sizeof *dst, ROW_F32};
    const bool direct = once && c->dp == kv->head_dim &&
                        t0 % kv->block_tokens + CHUNK <= kv->block_tokens;
    for (int32_t i = n; i < CHUNK; i++) par[i] = par[CHUNK + i] = 0; /* masked, but never NaN */
    for (int32_t i = 0; i < n;) {
        const int32_t at = t0 + i, slot = at % kv->block_tokens;
        const int32_t block = blocks[at / kv->block_tokens];
        const int32_t run = n - i < kv->block_tokens - slot ? n - i : kv->block_tokens - slot;
        const uint8_t *src = kv_data(kv, block, head, part) + (size_t)slot * kv_token_bytes(kv);
        if (direct)
            r = (attn_rows){src, kv_token_bytes(kv), kind_of(kv->format)};
        else
            unpack_tokens(dst + i * c->dp, c->dp, src, run, kv);
        if (kv->format != KV_16)
            unpack_params(par + i, kv_param(kv, block, head, part) + 2 * slot, run);
        i += run;
    }
    return r;
}

/* ---- the two products ---- */

/* s[i][t] = q_i . k_t for nv vectors and n tokens; whole groups of VL / nv rows of k can be read.
 * Each sum is the same whatever nv: VL lanes along the channels, then vf_sum. */
ALWAYS_INLINE void dot_tile(float *s, const float *q, const attn_rows *k, int64_t dp, int32_t n,
                            const int nv, const row_kind kind)
{
    const int nt = VL / nv;
    for (int32_t t = 0; t < n; t += nt) {
        const uint8_t *row = k->data + (size_t)t * k->pitch;
        vf acc[VL];
        float out[VL];
#pragma GCC unroll 16
        for (int i = 0; i < VL; i++) acc[i] = vf_zero();
        for (int64_t c = 0; c < dp; c += VL) {
            vf qi[4];
#pragma GCC unroll 4
            for (int i = 0; i < nv; i++) qi[i] = vf_load(q + i * dp + c);
#pragma GCC unroll 16
            for (int j = 0; j < nt; j++) {
                const vf kt = vf_pin(row_vec(row + (size_t)j * k->pitch, c, kind));
#pragma GCC unroll 4
                for (int i = 0; i < nv; i++) acc[i * nt + j] = vf_fma(qi[i], kt, acc[i * nt + j]);
            }
        }
        vf_store(out, vf_sum_each(acc));
        for (int i = 0; i < nv; i++)
            memcpy(s + i * CHUNK + t, out + i * nt, sizeof *s * (size_t)nt);
    }
}

ALWAYS_INLINE void dot_kind(float *s, const float *q, const attn_rows *k, int64_t dp, int32_t n,
                            int32_t nv, const row_kind kind)
{
    if (nv == 1)
        dot_tile(s, q, k, dp, n, 1, kind);
    else if (nv == 2)
        dot_tile(s, q, k, dp, n, 2, kind);
    else
        dot_tile(s, q, k, dp, n, 4, kind);
}

static void dot_rows(float *s, const float *q, const attn_rows *k, int64_t dp, int32_t n,
                     int32_t nv)
{
    if (k->kind == ROW_F32)
        dot_kind(s, q, k, dp, n, nv, ROW_F32);
    else if (k->kind == ROW_F16)
        dot_kind(s, q, k, dp, n, nv, ROW_F16);
    else if (k->kind == ROW_U8)
        dot_kind(s, q, k, dp, n, nv, ROW_U8);
    else
        dot_kind(s, q, k, dp, n, nv, ROW_U4);
}

/* acc[i][c..] += sum over t of p[i][t] v[t][c..] for nv vectors and `width` vf of channels */
ALWAYS_INLINE void mix_tile(float *acc, const float *p, const attn_rows *v, int64_t c, int64_t dp,
                            int32_t n, const int nv, const int width, const row_kind kind)
{
    vf a[VL];
#pragma GCC unroll 4
    for (int i = 0; i < nv; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < width; j++) a[i * width + j] = vf_load(acc + i * dp + c + j * VL);
    }
    const uint8_t *row = v->data;
    for (int32_t t = 0; t < n; t++, row += v->pitch) {
        vf pi[4];
#pragma GCC unroll 4
        for (int i = 0; i < nv; i++) pi[i] = vf_set(p[i * CHUNK + t]);
#pragma GCC unroll 8
        for (int j = 0; j < width; j++) {
            const vf vt = vf_pin(row_vec(row, c + j * VL, kind));
#pragma GCC unroll 4
            for (int i = 0; i < nv; i++) a[i * width + j] = vf_fma(pi[i], vt, a[i * width + j]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < nv; i++) {
#pragma GCC unroll 8
        for (int j = 0; j < width; j++) vf_store(acc + i * dp + c + j * VL, a[i * width + j]);
    }
}

/* Widths that keep nv * width sums in registers. */
ALWAYS_INLINE void mix_all(float *acc, const float *p, const attn_rows *v, int64_t dp, int32_t n,
                           const int nv, const row_kind kind)
{
    const int most = VL / nv < 8 ? VL / nv : 8;
    int64_t c = 0;
    for (; c + most * VL <= dp; c += most * VL) mix_tile(acc, p, v, c, dp, n, nv, most, kind);
    for (; c + 4 * VL <= dp && most > 4; c += 4 * VL) mix_tile(acc, p, v, c, dp, n, nv, 4, kind);
    for (; c < dp; c += VL) mix_tile(acc, p, v, c, dp, n, nv, 1, kind);
}

ALWAYS_INLINE void mix_kind(float *acc, const float *p, const attn_rows *v, int64_t dp, int32_t n,
                            int32_t nv, const row_kind kind)
{
    if (nv == 1)
        mix_all(acc, p, v, dp, n, 1, kind);
    else if (nv == 2)
        mix_all(acc, p, v, dp, n, 2, kind);
    else
        mix_all(acc, p, v, dp, n, 4, kind);
}

static void mix_rows(float *acc, const float *p, const attn_rows *v, int64_t dp, int32_t n,
                     int32_t nv)
{
    if (v->kind == ROW_F32)
        mix_kind(acc, p, v, dp, n, nv, ROW_F32);
    else if (v->kind == ROW_F16)
        mix_kind(acc, p, v, dp, n, nv, ROW_F16);
    else if (v->kind == ROW_U8)
        mix_kind(acc, p, v, dp, n, nv, ROW_U8);
    else
        mix_kind(acc, p, v, dp, n, nv, ROW_U4);
}

/* ---- softmax ---- */

/* Scores of one vector in a chunk to weights; updates its running maximum and sum. Returns what the
 * sums so far are worth now. Tokens outside of [first, last] weigh 0. */
static float softmax_row(float *s, int32_t from, int32_t to, float *max, float *sum)
{
    vf top = vf_set(-INFINITY), total = vf_zero();
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
        const vf p = vf_exp_neg(vf_sub(vf_load(s + t), vf_set(m)));
        total = vf_add(total, p);
        vf_store(s + t, p);
    }
    float keep[VL];
    vf_store(keep, vf_exp_neg(vf_set(*max - m)));
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
    const bool once = nv <= GROUP_V;
    const attn_rows k = load_chunk(c, blocks, t0, n, head, KV_K, once, t->k, t->kp);
    const attn_rows v = load_chunk(c, blocks, t0, n, head, KV_V, once, t->v, t->vp);
    for (int32_t i = 0; i < nv; i += GROUP_V) {
        float *s = t->s + i * CHUNK, *acc = t->acc + i * c->dp;
        const int32_t group = nv - i < 3 ? nv - i : GROUP_V; /* 1, 2, or 4 with idle ones */
        dot_rows(s, t->q + i * c->dp, &k, c->dp, n, group);
        for (int32_t j = i; j < i + group; j++) {
            float *row = t->s + j * CHUNK, shift = 0;
            if (coded) scale_scores(row, t->kp, t->qsum[j]);
            const float keep = softmax_row(row, t->first[j] - t0,
                                           t->last[j] - t0 < n ? t->last[j] - t0 : n - 1,
                                           t->max + j, t->sum + j);
            if (coded) shift = scale_weights(row, t->vp);
            rescale(t->acc + j * c->dp, c->dp, keep, shift);
        }
        mix_rows(acc, s, &v, c->dp, n, group);
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
    vf_store(keep, vf_exp_neg(vf_set(*max_all - m)));
    vf_store(take_in, vf_exp_neg(vf_set(max - m)));
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
    const int64_t rows = start[*s + 1] - start[*s];
    return rows <= c->limit && *v0 < rows * c->groups;
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

err_code CPU_FN(attn_cpu_few)(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                              const batch_rows *rows, float scale, int32_t window, int32_t limit,
                              err *e)
{
    attn_ctx c = {.d = d,
                  .y = y,
                  .q = q,
                  .kv = kv,
                  .rows = rows,
                  .scale = scale,
                  .window = window,
                  .limit = limit,
                  .dp = ATTN_PAD(kv->head_dim),
                  .groups = q->shape[2]};
    const int64_t segments = (rows->max_kv + SEGMENT - 1) / SEGMENT;
    const int64_t vectors = (rows->max_q < limit ? rows->max_q : limit) * c.groups;
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

err_code CPU_FN(attn_cpu)(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                          const batch_rows *rows, float scale, int32_t window, err *e)
{
    return CPU_FN(attn_cpu_few)(d, y, q, kv, rows, scale, window, INT32_MAX, e);
}

size_t CPU_FN(attn_cpu_scratch)(const op_limits *l)
{
    const size_t segments = ((size_t)l->max_kv + SEGMENT - 1) / SEGMENT;
    return segments > 1 ? SPLIT_V * segments * ((size_t)ATTN_PAD(l->head_dim) + 2) * sizeof(float)
                        : 0;
}
