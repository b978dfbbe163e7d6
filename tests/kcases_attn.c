/* Cases of rope_kv and attn: batches of mixed sequences over a paged cache with shuffled blocks. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "kcheck.h"

#define MAX_SEQS 4

typedef struct {
    int32_t heads, kv_heads, head_dim, block_tokens, window;
    kv_format format;
    int32_t rows[MAX_SEQS],
        len[MAX_SEQS]; /* rows of this step; cached tokens with them; 0 rows ends */
    bool fused;        /* q, k, v as slices of one fused row */
    bool interleaved;
    int32_t rope_dims;
    bool timed;
} attn_shape;

/* A batch, its cache and the memory behind them. */
typedef struct {
    const attn_shape *s;
    int32_t seqs, m, max_kv, blocks, max_blocks;
    int32_t *pos, *start, *len, *table;
    batch_rows rows;
    kv_layer kv;
    kbuf data, param; /* u8 [blocks, bytes], f16 [blocks, ...] */
    kbuf inv_freq;
    kbuf q; /* attn: the query rows */
    rope_spec rope;
} attn_arg;

static int32_t *must_i32(int64_t n)
{
    void *p = NULL;
    err e;
    if (mem_alloc(&p, (size_t)n, sizeof(int32_t), "kcases", &e) != OK) abort();
    return p;
}

static void build_rows(kcheck *c, attn_arg *a)
{
    const attn_shape *s = a->s;
    int32_t next = 0;
    int32_t *order = must_i32(a->blocks);
    for (int32_t i = 0; i < a->blocks; i++) order[i] = i;
    for (int32_t i = a->blocks - 1; i > 0; i--) {
        const int32_t j = (int32_t)(kc_uniform(c) * (i + 1)), t = order[i];
        order[i] = order[j];
        order[j] = t;
    }
    for (int32_t q = 0, row = 0; q < a->seqs; q++) {
        a->len[q] = s->len[q];
        a->start[q + 1] = a->start[q] + s->rows[q];
        for (int32_t i = 0; i < s->rows[q]; i++) a->pos[row++] = s->len[q] - s->rows[q] + i;
        for (int32_t b = 0; b * s->block_tokens < s->len[q]; b++)
            a->table[q * a->max_blocks + b] = order[next++];
    }
    mem_free(order);
}

static void arg_open(kcheck *c, attn_arg *a, const attn_shape *s)
{
    memset(a, 0, sizeof *a);
    a->s = s;
    for (int i = 0; i < MAX_SEQS && s->len[i]; i++) {
        const int32_t b = (s->len[i] + s->block_tokens - 1) / s->block_tokens;
        a->seqs++;
        a->m += s->rows[i];
        a->blocks += b;
        a->max_blocks = b > a->max_blocks ? b : a->max_blocks;
        a->max_kv = s->len[i] > a->max_kv ? s->len[i] : a->max_kv;
        a->rows.max_q = s->rows[i] > a->rows.max_q ? s->rows[i] : a->rows.max_q;
    }
    a->blocks += 2; /* some that nobody owns */
    a->pos = must_i32(a->m);
    a->start = must_i32(a->seqs + 1);
    a->len = must_i32(a->seqs);
    a->table = must_i32((int64_t)a->seqs * a->max_blocks);
    build_rows(c, a);
    a->rows.pos = tensor_1d(a->pos, DT_I32, a->m);
    a->rows.seq_start = tensor_1d(a->start, DT_I32, a->seqs + 1);
    a->rows.kv_len = tensor_1d(a->len, DT_I32, a->seqs);
    a->rows.block_table = tensor_2d(a->table, DT_I32, a->seqs, a->max_blocks);
    a->rows.seqs = a->seqs;
    a->rows.max_kv = a->max_kv;
    const size_t data = kv_layer_data_bytes(s->format, 1, s->block_tokens, s->kv_heads,
                                            s->head_dim);
    a->data = kb_2d(DT_U8, a->blocks, (int64_t)data, 0);
    a->param = kb_2d(DT_F16, a->blocks, 4 * (int64_t)s->block_tokens * s->kv_heads, 0);
    a->kv = (kv_layer){a->data.t.data,  a->param.t.data, s->format,   a->blocks,
                       s->block_tokens, s->kv_heads,     s->head_dim, MEM_HOST};
}

static void arg_close(attn_arg *a)
{
    mem_free(a->pos);
    mem_free(a->start);
    mem_free(a->len);
    mem_free(a->table);
    kb_free(&a->data);
    kb_free(&a->param);
    kb_free(&a->inv_freq);
    kb_free(&a->q);
}

static void describe(char *buf, size_t n, const attn_arg *a)
{
    const attn_shape *s = a->s;
    snprintf(buf, n, "kv%d d %d h %d/%d bt %d win %d rows %d..%d len %d",
             s->format ? (int)s->format : 16, s->head_dim, s->heads, s->kv_heads, s->block_tokens,
             s->window, s->rows[0], a->m, a->max_kv);
}

/* Value of a channel as the cache holds it: the format, written down once more. */
static float cached(const attn_arg *a, const kv_layer *kv, int32_t seq, int32_t t, int32_t head,
                    int part, int ch, float *step)
{
    const int32_t block = a->table[seq * a->max_blocks + t / kv->block_tokens],
                  slot = t % kv->block_tokens;
    const size_t token = (((size_t)block * (size_t)kv->kv_heads + (size_t)head) * 2 +
                          (size_t)part) *
                             (size_t)kv->block_tokens +
                         (size_t)slot;
    if (kv->format == KV_16) {
        const float v = f16_to_f32(((f16 *)kv->data)[token * (size_t)kv->head_dim + (size_t)ch]);
        *step = fabsf(v) * 0x1p-10f + 0x1p-24f;
        return v;
    }
    const f16 *p = (f16 *)kv->param + 2 * token;
    const uint8_t *d = (uint8_t *)kv->data + token * (size_t)kv->head_dim * (size_t)kv->format / 8;
    const int code = kv->format == KV_8 ? d[ch] : d[ch / 2] >> (ch & 1 ? 4 : 0) & 15;
    const float scale = f16_to_f32(p[0]), zero = f16_to_f32(p[1]);
    *step = scale + (fabsf(zero) + (float)code * scale) *
                        0x1p-10f; /* scale and zero may be off by one too */
    return (float)code * scale + zero;
}

/* ---- rope_kv ---- */

/* Views of q [m,kvh,g,d], k and v [m,kvh,d] in a row of the fused or the plain layout. */
static void views(const attn_arg *a, const kbuf *b, tensor *q, tensor *k, tensor *v)
{
    const attn_shape *s = a->s;
    const int64_t d = s->head_dim, kvh = s->kv_heads, g = s->heads / s->kv_heads,
                  row = b->t.stride[0];
    const int64_t qh = s->fused ? (g + 2) * d : g * d, kh = s->fused ? (g + 2) * d : d;
    float *base = b->t.data;
    *q = tensor_of(base, DT_F32, 4, (const int64_t[]){a->m, kvh, g, d});
    q->stride[0] = row;
    q->stride[1] = qh;
    *k = tensor_of(base + (s->fused ? g * d : s->heads * d), DT_F32, 3,
                   (const int64_t[]){a->m, kvh, d});
    k->stride[0] = row;
    k->stride[1] = kh;
    *v = *k;
    v->data = (float *)k->data + (s->fused ? d : kvh * d);
}

/* out 0: the rows (k's part zeroed after: its memory may be overwritten); out 1: the cached values.
 */
static err_code run_rope(device *d, void *arg, kbuf *out, err *e)
{
    const attn_arg *a = arg;
    kbuf data = kb_clone(&a->data), param = kb_clone(&a->param);
    kv_layer kv = a->kv;
    tensor q, k, v;
    float step;
    kv.data = data.t.data;
    kv.param = param.t.data;
    views(a, &out[0], &q, &k, &v);
    err_code rc = op_rope_kv(d, &q, &k, &v, &a->rope, &a->rows, &kv, e);
    if (rc == OK && (!kb_guards_ok(&data) || !kb_guards_ok(&param)))
        rc = err_set(e, E_CHECK, "wrote outside of the cache");
    float *val = out[1].t.data;
    for (int32_t s = 0, i = 0; rc == OK && s < a->seqs; s++) {
        for (; i < a->start[s + 1]; i++) {
            for (int32_t h = 0; h < kv.kv_heads; h++) {
                memset((float *)k.data + i * k.stride[0] + h * k.stride[1], 0,
                       (size_t)kv.head_dim * 4);
                for (int j = 0; j < 2 * kv.head_dim; j++)
                    *val++ = cached(a, &kv, s, a->pos[i], h, j / kv.head_dim, j % kv.head_dim,
                                    &step);
            }
        }
    }
    kb_free(&data);
    kb_free(&param);
    return rc;
}

/* What errors scale with: the rotated pair's size, and the step of the cache's format. */
static void rope_mags(const attn_arg *a, const kbuf *rows, float *mag_rows, float *mag_kv)
{
    const int64_t width = rows->t.shape[1];
    const int top = a->s->format == KV_4 ? 15 : 255;
    tensor q, k, v;
    views(a, rows, &q, &k, &v);
    for (int64_t i = 0; i < a->m; i++) {
        float big = 0;
        for (int64_t j = 0; j < width; j++) big = fmaxf(big, fabsf(kb_get(rows, i, j)));
        for (int64_t j = 0; j < width; j++) mag_rows[i * width + j] = 2 * big * a->rope.mscale;
        for (int32_t h = 0; h < a->s->kv_heads; h++) {
            for (int part = 0; part < 2; part++) {
                const tensor *t = part ? &v : &k;
                const float *x = (float *)t->data + i * t->stride[0] + h * t->stride[1];
                float max = 0; /* a rotation keeps values under sqrt(2) times the largest */
                for (int32_t j = 0; j < a->s->head_dim; j++) max = fmaxf(max, fabsf(x[j]));
                max *= part ? 1.0f : 1.5f * a->rope.mscale;
                const float step = a->s->format == KV_16 ? 0 : 2 * max / (float)top;
                for (int32_t j = 0; j < a->s->head_dim; j++)
                    *mag_kv++ = step + max * 0x1p-10f + 0x1p-24f;
            }
        }
    }
}

static void rope_case(kcheck *c, const attn_shape *s, double scale)
{
    attn_arg a;
    void *p;
    err e;
    arg_open(c, &a, s);
    const int32_t half = s->rope_dims / 2;
    const int64_t n = half ? half : 1, width = (int64_t)(s->heads + 2 * s->kv_heads) * s->head_dim;
    a.inv_freq = kb_new(DT_F32, 1, &n, 0);
    for (int32_t i = 0; i < half; i++)
        ((float *)a.inv_freq.t.data)[i] = (float)pow(1e4, -2.0 * i / s->rope_dims);
    a.rope = (rope_spec){tensor_1d(a.inv_freq.t.data, DT_F32, half), s->rope_dims, s->interleaved,
                         1.25f};
    kcase k = {.op = "rope_kv", .run = run_rope, .arg = &a, .outs = 2, .tol = {TOL_ROPE, TOL_KV}};
    describe(k.label, sizeof k.label, &a);
    k.out[0] = kb_2d(DT_F32, a.m, width, s->fused ? 0 : 5);
    kc_fill(c, &k.out[0], scale);
    for (int32_t j = 0; j < s->head_dim; j++)
        kb_set(&k.out[0], 0, width - 1 - j, 0.25f); /* a flat head */
    k.out[1] = kb_2d(DT_F32, a.m, 2 * (int64_t)s->kv_heads * s->head_dim, 0);
    const int64_t m0 = tensor_count(&k.out[0].t), m1 = tensor_count(&k.out[1].t);
    if (mem_alloc(&p, (size_t)(m0 + m1), sizeof(float), "kcases", &e) != OK) abort();
    rope_mags(&a, &k.out[0], p, (float *)p + m0);
    k.mag[0] = p;
    k.mag[1] = (float *)p + m0;
    k.bytes = 8.0 * (double)(a.m * width);
    k.flops = s->timed ? 4.0 * (double)(a.m * width) : 0;
    kc_case(c, &k);
    mem_free(p);
    kb_free(&k.out[0]);
    kb_free(&k.out[1]);
    arg_close(&a);
}

/* ---- attn ---- */

static float attn_scale(const attn_arg *a) { return 1.0f / sqrtf((float)a->s->head_dim); }

static err_code run_attn(device *d, void *arg, kbuf *out, err *e)
{
    const attn_arg *a = arg;
    const attn_shape *s = a->s;
    const op_limits lim = {.rows = a->m,
                           .k = 1,
                           .n = 1,
                           .heads = s->heads,
                           .head_dim = s->head_dim,
                           .max_kv = a->max_kv,
                           .seqs = a->seqs};
    tensor q = tensor_of(a->q.t.data, DT_F32, 4,
                         (const int64_t[]){a->m, s->kv_heads, s->heads / s->kv_heads, s->head_dim});
    q.stride[0] = a->q.t.stride[0];
    TRY(ops_reserve(d, &lim, e));
    return op_attn(d, &out[0].t, &q, &a->kv, &a->rows, attn_scale(a), s->window, e);
}

static void fill_cache(kcheck *c, attn_arg *a)
{
    const attn_shape *s = a->s;
    const int top = s->format == KV_4 ? 15 : 255;
    if (s->format == KV_16) {
        f16 *p = a->data.t.data;
        for (int64_t i = 0; i < tensor_count(&a->data.t) / 2; i++)
            p[i] = f32_to_f16((float)kc_normal(c));
    } else {
        uint8_t *p = a->data.t.data;
        for (int64_t i = 0; i < tensor_count(&a->data.t); i++)
            p[i] = (uint8_t)(kc_uniform(c) * 256);
    }
    f16 *p = a->param.t.data;
    for (int64_t i = 0; i < tensor_count(&a->param.t); i += 2) {
        p[i] = f32_to_f16((float)((2 + kc_uniform(c)) / top));
        p[i + 1] = f32_to_f16((float)(-1 - kc_uniform(c)));
    }
}

/* Errors of a score, some u times the products behind it, reach the weights as they are: they scale
 * with max|v| (1 + scale sum|q||k|). With codes the products are q*code*scale and q*zero. */
static float head_mag(const attn_arg *a, int32_t seq, int64_t row, int32_t head, const float *q)
{
    float most = 0, vmax = 0, step;
    for (int32_t t = 0; t <= a->pos[row]; t++) {
        float sum = 0, zero = 0;
        if (a->s->format != KV_16) {
            const int32_t block = a->table[seq * a->max_blocks + t / a->kv.block_tokens];
            const size_t token = (((size_t)block * (size_t)a->kv.kv_heads + (size_t)head) * 2) *
                                     (size_t)a->kv.block_tokens +
                                 (size_t)(t % a->kv.block_tokens);
            zero = fabsf(f16_to_f32(((f16 *)a->kv.param)[2 * token + 1]));
        }
        for (int32_t ch = 0; ch < a->s->head_dim; ch++) {
            const float k = cached(a, &a->kv, seq, t, head, 0, ch, &step);
            sum += fabsf(q[ch]) * (fabsf(k) + 2 * zero);
            vmax = fmaxf(vmax, fabsf(cached(a, &a->kv, seq, t, head, 1, ch, &step)));
        }
        most = fmaxf(most, sum);
    }
    return vmax * (1 + attn_scale(a) * most);
}

static float *attn_mag(const attn_arg *a)
{
    void *p = NULL;
    err e;
    const attn_shape *s = a->s;
    const int64_t width = (int64_t)s->heads * s->head_dim, g = s->heads / s->kv_heads;
    if (mem_alloc(&p, (size_t)(a->m * width), sizeof(float), "kcases", &e) != OK) abort();
    for (int32_t q = 0; q < a->seqs; q++) {
        for (int64_t i = a->start[q]; i < a->start[q + 1]; i++) {
            for (int64_t h = 0; h < s->heads; h++) {
                float *row = (float *)p + i * width + h * s->head_dim;
                const float *qh = (float *)a->q.t.data + i * a->q.t.stride[0] + h * s->head_dim;
                row[0] = head_mag(a, q, i, (int32_t)(h / g), qh);
                for (int32_t ch = 1; ch < s->head_dim; ch++) row[ch] = row[0];
            }
        }
    }
    return p;
}

/* The last rows of each sequence as a batch of their own: how many of them. With AMX a sequence
 * with more than 4 rows takes another kernel than one with fewer, and 5 rows stand for it. */
static int32_t tail_rows(const char *isa, int32_t rows)
{
    return strcmp(isa, "amx") == 0 && rows > 4 ? 5 : 1;
}

typedef struct {
    attn_arg arg;
    int32_t start[MAX_SEQS + 1], pos[5 * MAX_SEQS];
} tail_batch;

static void tail_open(tail_batch *b, const attn_arg *a, const char *isa)
{
    int32_t m = 0;
    b->arg = *a;
    b->arg.rows.max_q = 0;
    b->start[0] = 0;
    for (int32_t s = 0; s < a->seqs; s++) {
        const int32_t rows = tail_rows(isa, a->start[s + 1] - a->start[s]);
        for (int32_t i = 0; i < rows; i++) b->pos[m++] = a->len[s] - rows + i;
        b->start[s + 1] = m;
        if (rows > b->arg.rows.max_q) b->arg.rows.max_q = rows;
    }
    b->arg.m = m;
    b->arg.rows.pos = tensor_1d(b->pos, DT_I32, m);
    b->arg.rows.seq_start = tensor_1d(b->start, DT_I32, a->seqs + 1);
    b->arg.q = kb_2d(DT_F32, m, a->q.t.shape[1], 3);
}

/* Row i of the tail batch is this row of the whole. */
static int64_t whole_row(const tail_batch *b, const attn_arg *a, int32_t s, int32_t i)
{
    return a->start[s + 1] - b->start[s + 1] + i;
}

/* The last rows of each sequence alone must give the bytes they have among the others. */
static void attn_split(kcheck *c, const attn_arg *a, const kbuf *y, const char *label)
{
    const size_t bytes = (size_t)y->t.shape[1] * sizeof(float);
    for (int v = 0; v < c->variants; v++) {
        err e;
        tail_batch b;
        kbuf whole = kb_clone(y);
        tail_open(&b, a, c->variant[v].isa);
        kbuf part = kb_2d(DT_F32, b.arg.m, y->t.shape[1], 0);
        for (int32_t s = 0; s < a->seqs; s++) {
            for (int32_t i = b.start[s]; i < b.start[s + 1]; i++)
                memcpy((float *)b.arg.q.t.data + i * b.arg.q.t.stride[0],
                       (float *)a->q.t.data + whole_row(&b, a, s, i) * a->q.t.stride[0], bytes);
        }
        const bool ok = run_attn(c->variant[v].dev[1], (void *)(uintptr_t)a, &whole, &e) == OK &&
                        run_attn(c->variant[v].dev[1], &b.arg, &part, &e) == OK;
        if (!ok) kc_fail(c, "attn %s: %s", label, e.msg);
        for (int32_t s = 0; ok && s < a->seqs; s++) {
            for (int32_t i = b.start[s]; i < b.start[s + 1]; i++) {
                const float *w = (float *)whole.t.data + whole_row(&b, a, s, i) * whole.t.stride[0];
                if (memcmp(w, (float *)part.t.data + i * part.t.stride[0], bytes) != 0)
                    kc_fail(c, "attn %s [%s]: sequence %d: a row alone differs", label,
                            c->variant[v].isa, s);
            }
        }
        kb_free(&b.arg.q);
        kb_free(&whole);
        kb_free(&part);
    }
}

static void attn_case(kcheck *c, const attn_shape *s, double scale)
{
    attn_arg a;
    arg_open(c, &a, s);
    const int64_t width = (int64_t)s->heads * s->head_dim;
    fill_cache(c, &a);
    a.q = kb_2d(DT_F32, a.m, width, 3);
    kc_fill(c, &a.q, scale);
    kcase k = {.op = "attn", .run = run_attn, .arg = &a, .outs = 1, .tol = {TOL_ATTN}};
    describe(k.label, sizeof k.label, &a);
    k.out[0] = kb_2d(DT_F32, a.m, width, 2);
    float *mag = c->bench ? NULL : attn_mag(&a);
    k.mag[0] = mag;
    if (s->timed) {
        double pairs = 0;
        for (int32_t i = 0; i < a.m; i++) pairs += a.pos[i] + 1;
        k.flops = 4.0 * pairs * (double)width;
        k.bytes = (double)kv_layer_data_bytes(s->format, 1, 1, s->kv_heads, s->head_dim) *
                  (double)(a.m == a.seqs ? pairs : a.max_kv);
        k.cold = s->rows[0] == 1;
    }
    kc_case(c, &k);
    if (!c->bench) attn_split(c, &a, &k.out[0], k.label);
    mem_free(mag);
    kb_free(&k.out[0]);
    arg_close(&a);
}

/* ---- lists ---- */

static const attn_shape mixed[] = {
    /* heads kvh   d  bt win format  rows            len                fused inter dims */
    {1, 1, 2, 4, 0, KV_16, {1}, {1}, false, false, 2, false},
    {2, 1, 8, 7, 0, KV_8, {3, 1}, {3, 9}, true, true, 8, false},
    {4, 4, 10, 16, 3, KV_4, {5, 1, 2}, {20, 1, 40}, false, true, 6, false},
    {3, 1, 16, 16, 0, KV_16, {17, 1, 1, 4}, {17, 64, 65, 130}, true, false, 16, false},
    {8, 2, 64, 64, 0, KV_16, {70, 1, 33}, {70, 300, 160}, true, false, 64, false},
    {8, 2, 64, 64, 0, KV_8, {70, 1, 33}, {70, 300, 160}, false, false, 64, false},
    {8, 2, 64, 64, 0, KV_4, {70, 1, 33}, {70, 300, 160}, false, true, 64, false},
    {4, 1, 80, 64, 0, KV_8, {40, 1}, {104, 257}, false, false, 32, false},
    {2, 2, 96, 32, 50, KV_4, {65, 1}, {128, 256}, true, true, 96, false},
    {2, 1, 128, 64, 0, KV_16, {64, 2}, {64, 515}, true, true, 128, false},
    {4, 2, 128, 64, 100, KV_4, {37, 1, 1, 1}, {300, 129, 128, 127}, false, false, 128, false},
    {16, 1, 128, 64, 0, KV_8, {1, 3, 1}, {270, 40, 1100}, false, false, 128, false},
    {2, 1, 256, 64, 0, KV_4, {9, 1}, {80, 66}, true, false, 256, false},
    {40, 1, 16, 16, 64, KV_16, {7, 1}, {90, 200}, false, false, 0, false},
    {1, 1, 514, 8, 0, KV_16, {3}, {12}, false, false, 512, false},
};

static const attn_shape speed[] = {
    {32, 4, 64, 64, 0, KV_16, {1}, {1024}, false, false, 64, true},
    {32, 4, 64, 64, 0, KV_8, {1}, {1024}, false, false, 64, true},
    {32, 4, 64, 64, 0, KV_4, {1}, {1024}, false, false, 64, true},
    {16, 8, 128, 64, 0, KV_16, {1}, {8192}, false, false, 128, true},
    {16, 8, 128, 64, 0, KV_8, {1}, {8192}, false, false, 128, true},
    {16, 8, 128, 64, 0, KV_4, {1}, {8192}, false, false, 128, true},
    {32, 32, 128, 64, 0, KV_16, {1}, {4096}, false, false, 128, true},
    {32, 32, 128, 64, 0, KV_4, {1}, {4096}, false, false, 128, true},
    {32, 4, 64, 64, 0, KV_16, {512}, {512}, false, false, 64, true},
    {4, 2, 128, 64, 0, KV_16, {1024}, {1024}, true, true, 128, true},
    {4, 2, 128, 64, 0, KV_8, {1024}, {1024}, true, true, 128, true},
    {4, 2, 128, 64, 0, KV_4, {1024}, {1024}, true, true, 128, true},
    {8, 2, 64, 64, 0, KV_16, {1024}, {1024}, false, false, 64, true},
};

void kcases_attn(kcheck *c)
{
    for (size_t i = 0; !c->bench && i < sizeof mixed / sizeof *mixed; i++) {
        const double scale = i % 3 == 2 ? 20 : 1; /* sharp and flat attention */
        if (kc_wants(c, "rope_kv")) rope_case(c, &mixed[i], scale);
        if (kc_wants(c, "attn")) attn_case(c, &mixed[i], scale);
    }
    for (size_t i = 0; c->bench && i < sizeof speed / sizeof *speed; i++) {
        if (kc_wants(c, "rope_kv") && i >= 8) rope_case(c, &speed[i], 1);
        if (kc_wants(c, "attn")) attn_case(c, &speed[i], 1);
    }
}
