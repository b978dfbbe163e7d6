/* The bytes of a workspace. A linear of a rank is a list of segments: runs of output columns with
 * the place they come from, rotary ones to be interleaved. Rows (inputs) are made in bands, so
 * memory does not grow with the matrix. Two makers read the same segments: one gathers and
 * transposes 16-bit rows, one moves packed words. */
#include <assert.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/cast16.h"
#include "formats/convert_internal.h"

#define TILE 64 /* rows and columns of a transpose: 8 KB of target, 64 source rows */

/* Columns [to, to + count) of the target are rows [from, from + count) of linear `part`; part -1 is
 * padding. rope: inside, position 2j+h comes from h*count/2 + j. */
typedef struct {
    int part;
    int64_t from, to, count;
    bool rope;
} segment;

typedef struct {
    linear_view part[3];
    tensor_role role[3];
    int n_parts;
    segment *seg;
    int n_seg, cap;
    int64_t k, n;   /* of the target file set */
    int64_t k_from; /* first input of the source that this rank has */
    int64_t k_have; /* inputs that the source gives; those up to k are padding */
} plan;

/* ---- segments ---- */

static void add_segment(plan *p, int part, int64_t from, int64_t count, bool rope)
{
    assert(p->n_seg < p->cap);
    p->seg[p->n_seg++] = (segment){part, from, p->n, count, rope};
    p->n += count;
}

/* Source row of head h of q (0), k (1) or v (2), and the part it is in. */
static int64_t head_row(const model_desc *m, int which, int32_t h, int *part)
{
    const int64_t d = m->head_dim, per = m->heads / m->kv_heads;
    *part = 0;
    switch (m->qkv) {
    case QKV_SPLIT: *part = which; return h * d;
    case QKV_CONCAT:
        return (which == 0 ? h : which == 1 ? m->heads + h : m->heads + m->kv_heads + h) * d;
    case QKV_GROUPED: break;
    }
    if (which == 0) return (h / per * (per + 2) + h % per) * d;
    return (h * (per + 2) + per + which - 1) * d;
}

/* Heads of one kind that a rank has. KV heads fewer than ranks are repeated: rank r then has head
 * r * kv_heads / tp of the source. */
static void add_heads(plan *p, const convert *c, int which, int32_t rank)
{
    const int32_t stored = (which == 0 ? c->c.m.heads : c->c.m.kv_heads) / c->c.tp;
    const int32_t repeat = which == 0 ? 1 : c->c.m.kv_heads / c->m.kv_heads;
    for (int32_t i = 0; i < stored; i++) {
        int part;
        const int32_t head = (rank * stored + i) / repeat;
        const int64_t row = head_row(&c->m, which, head, &part);
        add_segment(p, part, row, c->m.head_dim, which != 2 && !c->m.rope_interleaved);
    }
}

/* `have` columns of the source from `from`, then padding up to `want`. */
static void add_columns(plan *p, int64_t from, int64_t have, int64_t want)
{
    if (have < 0) have = 0;
    if (have > want) have = want;
    if (have) add_segment(p, 0, from, have, false);
    if (want > have) add_segment(p, -1, 0, want - have, false);
}

static void plan_columns(plan *p, const convert *c, tensor_role role, int32_t rank)
{
    const int64_t ffn = c->c.m.ffn / c->c.tp;
    switch (role) {
    case ROLE_QKV:
        for (int which = 0; which < 3; which++) add_heads(p, c, which, rank);
        break;
    case ROLE_GATE:
    case ROLE_UP: add_columns(p, rank * ffn, c->m.ffn - rank * ffn, ffn); break;
    default: add_columns(p, 0, c->m.hidden, c->m.hidden); break;
    }
}

static void plan_rows(plan *p, const convert *c, tensor_role role, int32_t rank)
{
    const int64_t source = model_linear_k(&c->m, role == ROLE_QKV ? ROLE_Q : role);
    const int64_t all = role == ROLE_DOWN ? c->c.m.ffn : source;
    const bool split = role == ROLE_O || role == ROLE_DOWN;
    p->k = split ? all / c->c.tp : all;
    p->k_from = split ? rank * p->k : 0;
    p->k_have = source - p->k_from;
    if (p->k_have < 0) p->k_have = 0;
    if (p->k_have > p->k) p->k_have = p->k;
}

static err_code plan_open(plan *p, convert *c, tensor_role role, int32_t layer, int32_t rank,
                          err *e)
{
    const bool split = role == ROLE_QKV && c->m.qkv == QKV_SPLIT;
    void *mem;

    memset(p, 0, sizeof *p);
    p->n_parts = split ? 3 : 1;
    p->cap = c->c.m.heads + 2 * c->c.m.kv_heads + 2;
    for (int i = 0; i < p->n_parts; i++) {
        p->role[i] = split ? (tensor_role)(ROLE_Q + i) : role;
        TRY(weights_linear(c->src, p->role[i], layer, -1, &p->part[i], e));
        if (p->part[i].w4 != (c->c.m.w4_group != 0))
            return err_set(e, E_UNSUPPORTED,
                           "layer %d: %s: expected %s weights as in the other linears, got %s",
                           layer, role_name(p->role[i]), c->c.m.w4_group ? "4-bit" : "16-bit",
                           p->part[i].w4 ? "4-bit" : "16-bit");
        if (!p->part[i].w4 && p->part[i].dense.stride[1] != 1)
            return err_set(e, E_UNSUPPORTED, "layer %d: %s: rows are not contiguous", layer,
                           role_name(p->role[i]));
    }
    TRY(mem_alloc(&mem, (size_t)p->cap, sizeof(segment), "column plan", e));
    p->seg = mem;
    plan_columns(p, c, role, rank);
    plan_rows(p, c, role, rank);
    return OK;
}

static void plan_close(plan *p)
{
    mem_free(p->seg);
    p->seg = NULL;
}

static int64_t band_rows(int64_t row_bytes, int64_t unit, int64_t k)
{
    int64_t rows = (int64_t)CONVERT_BAND_BYTES / row_bytes / unit * unit;
    if (rows < unit) rows = unit;
    return rows < k ? rows : k;
}

/* ---- 16-bit: gather rows, cast, transpose ---- */

typedef struct {
    const void *row; /* k contiguous inputs from k_from, NULL: padding */
    dtype dt;
    int part;
    int64_t first; /* its first element in its part, for messages */
} source_row;

/* Where each column of the target comes from. */
static void list_rows(source_row *rows, const plan *p)
{
    for (int s = 0; s < p->n_seg; s++) {
        const segment *g = &p->seg[s];
        for (int64_t i = 0; i < g->count; i++) {
            source_row *r = &rows[g->to + i];
            memset(r, 0, sizeof *r);
            if (g->part < 0) continue;
            const tensor *t = &p->part[g->part].dense;
            const int64_t within = g->rope ? i % 2 * (g->count / 2) + i / 2 : i;
            const int64_t at = (g->from + within) * t->stride[0] + p->k_from;
            r->part = g->part;
            r->dt = t->dt;
            r->first = at;
            r->row = (const char *)t->data + (size_t)at * dtype_bytes(t->dt);
        }
    }
}

/* Rows [k0, k0 + n_k) of the target for columns [c0, c0 + n_c). */
static err_code transpose_tile(uint16_t *dst, int64_t ld, const source_row *rows, int n_c,
                               int64_t k0, int n_k, cast16 *cast, err *e)
{
    uint16_t tile[TILE][TILE];
    for (int c = 0; c < n_c; c++) {
        if (!rows[c].row) {
            memset(tile[c], 0, sizeof tile[c]);
            continue;
        }
        const char *from = (const char *)rows[c].row + (size_t)k0 * dtype_bytes(rows[c].dt);
        const int64_t first = rows[c].first + k0;
        TRY(cast16_run(&cast[rows[c].part], tile[c], from, rows[c].dt, first, n_k, e));
    }
    for (int k = 0; k < n_k; k++)
        for (int c = 0; c < n_c; c++) dst[k * ld + c] = tile[c][k];
    return OK;
}

static err_code make_band(uint16_t *band, const plan *p, const source_row *rows, int64_t k0,
                          int64_t n_k, cast16 *cast, err *e)
{
    const int64_t have = p->k_have - k0 < n_k ? p->k_have - k0 : n_k; /* may be below 0 */
    if (have < n_k) {
        const int64_t from = have > 0 ? have : 0;
        memset(band + from * p->n, 0, (size_t)((n_k - from) * p->n) * 2);
    }
    for (int64_t k = 0; k < have; k += TILE)
        for (int64_t c = 0; c < p->n; c += TILE) {
            const int nk = have - k < TILE ? (int)(have - k) : TILE;
            const int nc = p->n - c < TILE ? (int)(p->n - c) : TILE;
            TRY(transpose_tile(band + k * p->n + c, p->n, rows + c, nc, k0 + k, nk, cast, e));
        }
    return OK;
}

static void start_casts(cast16 cast[3], char what[3][64], const convert *c, const plan *p,
                        int32_t layer)
{
    for (int i = 0; i < 3; i++) {
        what[i][0] = 0;
        if (i < p->n_parts)
            (void)snprintf(what[i], 64, "layer %d: %s", layer, role_name(p->role[i]));
        cast[i] = (cast16){.what = what[i], .to = c->c.m.dt, .clamp = c->o.clamp};
    }
}

static err_code write_dense(convert *c, const plan *p, int32_t layer, const convert_sink *sink,
                            err *e)
{
    const int64_t rows_at_once = band_rows(p->n * 2, TILE, p->k);
    void *band = NULL, *rows = NULL;
    cast16 cast[3];
    char what[3][64];
    err_code rc;

    start_casts(cast, what, c, p, layer);
    if ((rc = mem_alloc(&rows, (size_t)p->n, sizeof(source_row), "column list", e)) != OK)
        goto done;
    if ((rc = mem_alloc(&band, (size_t)(rows_at_once * p->n), 2, "band of rows", e)) != OK)
        goto done;
    list_rows(rows, p);
    for (int64_t k = 0; rc == OK && k < p->k; k += rows_at_once) {
        const int64_t n = p->k - k < rows_at_once ? p->k - k : rows_at_once;
        rc = make_band(band, p, rows, k, n, cast, e);
        if (rc == OK) rc = sink->write(sink->ctx, band, (size_t)(n * p->n) * 2, e);
    }
    for (int i = 0; rc == OK && i < p->n_parts; i++) rc = cast16_end(&cast[i], c->j, e);
done:
    mem_free(band);
    mem_free(rows);
    return rc;
}

/* ---- 4 bits: repack a band of every part, then move words ---- */

/* Four nibbles to the even places of a word. */
static inline uint32_t spread(uint32_t x)
{
    x = (x | x << 8) & 0x00ff00ffu;
    return (x | x << 4) & 0x0f0f0f0fu;
}

/* One segment of one row of sequential words. The halves of a rotary head give four columns each to
 * every word. */
static void move_words(uint32_t *dst, const uint32_t *src, const segment *s)
{
    const int64_t words = s->count / 8;
    if (!s->rope) {
        memcpy(dst, src, (size_t)words * sizeof *dst);
        return;
    }
    for (int64_t w = 0; w < words; w++) {
        /* columns 4w..4w+3 of each half: 16 bits that may lie in either half of a word */
        const int64_t a = 4 * w, b = s->count / 2 + 4 * w;
        const uint32_t lo = src[a / 8] >> a % 8 * 4 & 0xffffu,
                       hi = src[b / 8] >> b % 8 * 4 & 0xffffu;
        dst[w] = spread(lo) | spread(hi) << 4;
    }
}

static void move_halves(uint16_t *dst, const uint16_t *src, const segment *s)
{
    if (!s->rope) {
        memcpy(dst, src, (size_t)s->count * sizeof *dst);
        return;
    }
    for (int64_t i = 0; i < s->count / 2; i++) {
        dst[2 * i] = src[i];
        dst[2 * i + 1] = src[s->count / 2 + i];
    }
}

typedef struct {
    w4_weight part[3];        /* W4_TM, a band of rows of each source */
    uint32_t *words;          /* [rows, n/8] */
    uint16_t *scales, *zeros; /* [k/g, n]: whole, they are small */
    int64_t rows;             /* of a band, a multiple of the group */
} w4_room;

static void room_close(w4_room *r)
{
    for (int i = 0; i < 3; i++) {
        mem_free(r->part[i].q.data);
        mem_free(r->part[i].scales.data);
        mem_free(r->part[i].zeros.data);
    }
    mem_free(r->words);
    mem_free(r->scales);
    mem_free(r->zeros);
}

static err_code room_open(w4_room *r, const plan *p, int32_t group, err *e)
{
    void *m;
    memset(r, 0, sizeof *r);
    r->rows = band_rows(p->n / 2, group, p->k);
    for (int i = 0; i < p->n_parts; i++) {
        size_t q, s, z;
        TRY(w4_sizes(&q, &s, &z, r->rows, p->part[i].q.n, group, W4_TM, e));
        TRY(mem_alloc(&r->part[i].q.data, q, 1, "4-bit band", e));
        TRY(mem_alloc(&r->part[i].scales.data, s, 1, "scales", e));
        TRY(mem_alloc(&r->part[i].zeros.data, z, 1, "zeros", e));
    }
    TRY(mem_alloc(&m, (size_t)(r->rows * (p->n / 8)), 4, "4-bit band", e));
    r->words = m;
    TRY(mem_alloc(&m, (size_t)(p->k / group * p->n), 2, "scales", e));
    r->scales = m;
    TRY(mem_alloc(&m, (size_t)(p->k / group * p->n), 2, "zeros", e));
    r->zeros = m;
    return OK;
}

static err_code load_band(w4_room *r, const plan *p, int64_t k0, int64_t n, int32_t layer, err *e)
{
    for (int i = 0; i < p->n_parts; i++) {
        const w4_weight *w = &p->part[i].q;
        const w4_weight band = w4_inputs(w, p->k_from + k0, n);
        w4_shape(&r->part[i], n, w->n, w->group, W4_TM);
        if (w4_repack(&r->part[i], &band, e) != OK)
            return err_wrap(e, "layer %d: %s", layer, role_name(p->role[i]));
    }
    return OK;
}

static void move_band(w4_room *r, const plan *p, int64_t k0, int64_t n, int32_t group)
{
    for (int s = 0; s < p->n_seg; s++) {
        const segment *g = &p->seg[s];
        if (g->part < 0) continue; /* the room is zero-filled */
        const w4_weight *w = &r->part[g->part];
        for (int64_t k = 0; k < n; k++)
            move_words(r->words + k * (p->n / 8) + g->to / 8,
                       (const uint32_t *)w->q.data + k * w->q.stride[0] + g->from / 8, g);
        for (int64_t i = 0; i < n / group; i++) {
            const int64_t row = (k0 / group + i) * p->n + g->to, from = i * w->n + g->from;
            move_halves(r->scales + row, (const uint16_t *)w->scales.data + from, g);
            move_halves(r->zeros + row, (const uint16_t *)w->zeros.data + from, g);
        }
    }
}

static err_code check_scales(const uint16_t *s, int64_t n, int32_t layer, tensor_role role, err *e)
{
    for (int64_t i = 0; i < n; i++)
        if ((s[i] & 0x7c00u) == 0x7c00u)
            return err_set(e, E_INPUT, "layer %d: %s: scale %lld is %s, expected a finite number",
                           layer, role_name(role), (long long)i,
                           s[i] & 0x3ffu ? "NaN" : "infinite");
    return OK;
}

static err_code write_whole(const convert_sink *sink, const tm_file *f, const void *data, err *e)
{
    TRY(sink->begin(sink->ctx, f, e));
    TRY(sink->write(sink->ctx, data, (size_t)f->bytes, e));
    return sink->end(sink->ctx, e);
}

/* f: qweight, scales and zeros of one linear, in this order. */
static err_code write_w4(w4_room *r, const plan *p, const tm_file *f, int32_t group,
                         const convert_sink *sink, err *e)
{
    const int64_t have = p->k_have / group * group; /* the source's inputs are whole groups */
    int64_t n;
    TRY(sink->begin(sink->ctx, &f[0], e));
    for (int64_t k = 0; k < p->k; k += n) {
        const int64_t end = k < have ? have : p->k; /* the padding starts a band of its own */
        n = end - k < r->rows ? end - k : r->rows;
        if (k < have) {
            TRY(load_band(r, p, k, n, f->layer, e));
            move_band(r, p, k, n, group);
        } else {
            memset(r->words, 0, (size_t)(n * (p->n / 8)) * 4);
        }
        TRY(sink->write(sink->ctx, r->words, (size_t)(n * (p->n / 8)) * 4, e));
    }
    TRY(sink->end(sink->ctx, e));
    TRY(check_scales(r->scales, p->k / group * p->n, f->layer, f->role, e));
    TRY(write_whole(sink, &f[1], r->scales, e));
    return write_whole(sink, &f[2], r->zeros, e);
}

static err_code make_linear(convert *c, const tm_file *f, const convert_sink *sink, err *e)
{
    plan p;
    err_code rc = plan_open(&p, c, f->role, f->layer, f->rank, e);
    if (rc == OK && c->c.m.w4_group) {
        w4_room room;
        rc = room_open(&room, &p, c->c.m.w4_group, e);
        if (rc == OK) rc = write_w4(&room, &p, f, c->c.m.w4_group, sink, e);
        room_close(&room);
    } else if (rc == OK) {
        rc = sink->begin(sink->ctx, f, e);
        if (rc == OK) rc = write_dense(c, &p, f->layer, sink, e);
        if (rc == OK) rc = sink->end(sink->ctx, e);
    }
    plan_close(&p);
    return rc;
}

/* ---- biases ---- */

/* One value a column; a part without bias gives zeros. */
static err_code gather_bias(uint16_t *dst, const convert *c, const plan *p, int32_t layer, err *e)
{
    cast16 cast[3];
    char what[3][64];

    start_casts(cast, what, c, p, layer);
    for (int s = 0; s < p->n_seg; s++) {
        const segment *g = &p->seg[s];
        for (int64_t i = 0; i < g->count; i++) {
            const tensor *b = g->part < 0 ? NULL : &p->part[g->part].bias;
            dst[g->to + i] = 0;
            if (!b || !b->data) continue;
            const int64_t at = g->from + (g->rope ? i % 2 * (g->count / 2) + i / 2 : i);
            const char *from = (const char *)b->data + (size_t)at * dtype_bytes(b->dt);
            TRY(cast16_run(&cast[g->part], &dst[g->to + i], from, b->dt, at, 1, e));
        }
    }
    for (int i = 0; i < p->n_parts; i++) TRY(cast16_end(&cast[i], c->j, e));
    return OK;
}

static err_code make_bias(convert *c, const tm_file *f, const convert_sink *sink, err *e)
{
    plan p;
    void *dst = NULL;
    err_code rc = plan_open(&p, c, f->role, f->layer, f->rank, e);
    if (rc == OK) rc = mem_alloc(&dst, (size_t)p.n, 2, "bias", e);
    if (rc == OK) rc = gather_bias(dst, c, &p, f->layer, e);
    if (rc == OK) rc = write_whole(sink, f, dst, e);
    mem_free(dst);
    plan_close(&p);
    return rc;
}

/* ---- embedding, norms, head ---- */

typedef struct {
    const convert_sink *sink;
} cast_ctx;

static err_code cast_write(void *ctx, int64_t first, const uint16_t *data, int64_t count, err *e)
{
    const cast_ctx *c = ctx;
    (void)first; /* in order */
    return c->sink->write(c->sink->ctx, data, (size_t)count * 2, e);
}

static err_code write_zeros(const convert_sink *sink, uint64_t bytes, err *e)
{
    static const uint8_t zeros[4096];
    for (; bytes; bytes -= bytes < sizeof zeros ? bytes : sizeof zeros)
        TRY(sink->write(sink->ctx, zeros, bytes < sizeof zeros ? (size_t)bytes : sizeof zeros, e));
    return OK;
}

/* The part of the tensor that this rank has: columns of the embedding, rows of the head. */
static void rank_view(tensor *t, const convert *c, const tm_file *f)
{
    if (f->role == ROLE_EMBED) {
        *t = tensor_cols(t, f->rank * f->cols, f->cols);
    } else if (f->role == ROLE_HEAD) {
        const int64_t from = f->rank * f->rows, left = c->m.vocab - from;
        *t = tensor_rows(t, left > 0 ? from : 0, left <= 0 ? 0 : left < f->rows ? left : f->rows);
    }
}

static err_code make_tensor(convert *c, const tm_file *f, const convert_sink *sink, err *e)
{
    cast_ctx ctx = {sink};
    char what[64];
    tensor t;
    void *buf;

    TRY(weights_tensor(c->src, f->role, f->layer, &t, e));
    rank_view(&t, c, f);
    if (f->layer >= 0)
        (void)snprintf(what, sizeof what, "layer %d: %s", f->layer, role_name(f->role));
    else
        (void)snprintf(what, sizeof what, "%s", role_name(f->role));
    cast16 cast = {.what = what, .to = c->c.m.dt, .clamp = c->o.clamp};
    TRY(mem_alloc(&buf, CAST16_BYTES, 1, "cast", e));
    err_code rc = sink->begin(sink->ctx, f, e);
    if (rc == OK) rc = cast16_tensor(&t, &cast, buf, cast_write, &ctx, c->j, e);
    if (rc == OK) rc = write_zeros(sink, f->bytes - (uint64_t)tensor_count(&t) * 2, e);
    if (rc == OK) rc = sink->end(sink->ctx, e);
    mem_free(buf);
    return rc;
}

/* ---- units ---- */

size_t convert_unit(const convert *c, size_t first)
{
    return c->files[first].part == TM_QWEIGHT ? 3 : 1;
}

err_code convert_make(convert *c, size_t first, const convert_sink *sink, err *e)
{
    const tm_file *f = &c->files[first];
    if (f->part == TM_BIAS) return make_bias(c, f, sink, e);
    if (f->role == ROLE_QKV || f->role == ROLE_O || f->role == ROLE_GATE || f->role == ROLE_UP ||
        f->role == ROLE_DOWN)
        return make_linear(c, f, sink, e);
    return make_tensor(c, f, sink, e);
}

/* The largest of all units: bands of target and sources, and what is kept whole. */
size_t convert_make_bytes(const convert *c)
{
    size_t most = CAST16_BYTES;
    for (size_t i = 0; i < c->n; i++) {
        const tm_file *f = &c->files[i];
        size_t bytes = 0;
        if (f->part == TM_QWEIGHT) {
            const int64_t n = f->cols * 8, rows = band_rows(n / 2, c->c.m.w4_group, f->rows);
            const size_t band = (size_t)(rows * n / 2);
            bytes = band * 2 * (size_t)c->c.tp +
                    2 * (size_t)c->files[i + 1].bytes; /* sources are of all ranks */
        } else if (f->part == TM_WEIGHT && f->layer >= 0 && f->rows > 1) {
            bytes = (size_t)(band_rows(f->cols * 2, TILE, f->rows) * f->cols) * 2 +
                    (size_t)f->cols * sizeof(source_row);
        }
        if (bytes > most) most = bytes;
    }
    return most;
}
