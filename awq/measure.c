/* Tiles and losses. Sums run over rows in order and tiles in order, in double, so that they depend
 * neither on threads nor on anything but the shapes. */
#include "awq/measure.h"

#include <string.h>

#include "awq/moments.h"
#include "awq/on_device.h"
#include "base/half.h"
#include "kernels/quant_group.h"

#define TILE_ELEMS  ((int64_t)1 << 21) /* 8 MB of f32: a few of them stay in the outer caches */
#define MIN_ROWS    64                 /* op_quad runs at half its speed on fewer */
#define MAX_ROWS    8192
#define MIN_GROUP   32
#define BATCH_ELEMS ((int64_t)1 << 24) /* errors of several candidates: H is packed once for them */
#define BATCH_MAX   16                 /* tiles */

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

int64_t tile_rows(const quant_scratch *s, int64_t k) { return least(s->elems / k, s->rows_max); }

quant_scratch quant_scratch_shape(const model_desc *m, bool searches)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(m, roles);
    quant_scratch s = {.searches = searches};
    for (int i = 0; i < n; i++) {
        const int64_t rows = model_linear_n(m, roles[i]), k = model_linear_k(m, roles[i]);
        const int64_t tile = least(rows, least(most(TILE_ELEMS / k, MIN_ROWS), MAX_ROWS));
        s.elems = most(s.elems, tile * k);
        s.rows_max = most(s.rows_max, tile);
        s.widest = most(s.widest, k);
    }
    s.groups = s.elems / MIN_GROUP;
    s.batch = searches ? most(s.elems, least(BATCH_MAX * s.elems, BATCH_ELEMS)) : s.widest;
    s.batch_rows = searches ? MAX_ROWS : s.rows_max;
    return s;
}

/* Every part with its size, in the order of the arena. */
typedef struct {
    void **out;
    size_t bytes;
} scratch_part;

static int parts_of(quant_scratch *s, scratch_part out[8])
{
    const size_t elems = (size_t)s->elems, groups = (size_t)s->groups, widest = (size_t)s->widest;
    const size_t searched = s->searches ? groups : 0;
    int n = 0;
    out[n++] = (scratch_part){(void **)&s->w, elems * sizeof(float)};
    out[n++] = (scratch_part){(void **)&s->x, (size_t)s->batch * sizeof(float)};
    out[n++] = (scratch_part){(void **)&s->m0, searched * sizeof(float)};
    out[n++] = (scratch_part){(void **)&s->limit, searched * sizeof(float)};
    out[n++] = (scratch_part){(void **)&s->best, searched * sizeof(float)};
    out[n++] = (scratch_part){(void **)&s->scale, groups * sizeof(f16)};
    out[n++] = (scratch_part){(void **)&s->zero, groups > widest ? groups : widest};
    out[n++] = (scratch_part){(void **)&s->sum,
                              (searched > widest ? searched : widest) * sizeof(double)};
    return n;
}

size_t quant_scratch_bytes(const quant_scratch *s)
{
    quant_scratch copy = *s;
    scratch_part p[8];
    const int n = parts_of(&copy, p);
    size_t sum = arena_need((size_t)s->batch_rows * sizeof(double));
    for (int i = 0; i < n; i++) sum += arena_need(p[i].bytes);
    return sum;
}

err_code quant_scratch_init(quant_scratch *s, const model_desc *m, bool searches, err *e)
{
    scratch_part p[8];
    *s = quant_scratch_shape(m, searches);
    const int n = parts_of(s, p);
    TRY(arena_init(&s->mem, quant_scratch_bytes(s), "search scratch", e));
    for (int i = 0; i < n; i++) TRY(arena_get(&s->mem, p[i].out, p[i].bytes, e));
    return arena_get(&s->mem, (void **)&s->row, (size_t)s->batch_rows * sizeof(double), e);
}

int64_t quant_batch(const quant_scratch *s, int64_t rows, int64_t k)
{
    return most(1, least(s->batch / (rows * k), s->batch_rows / rows));
}

void quant_scratch_free(quant_scratch *s) { arena_free(&s->mem); }

err_code linear_weights(const quant_block *b, tensor_role r, tensor *w, err *e)
{
    linear_view v;
    if (b->target && b->target->role == r) {
        *w = b->target->w;
        return OK;
    }
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    *w = v.dense;
    return OK;
}

err_code moment_of(const quant_block *b, tensor_role r, second_moment *h, err *e)
{
    *h = (second_moment){0};
    if (b->target && b->target->role == r) {
        h->full = b->target->h;
        return OK;
    }
    if (b->o->loss == LOSS_WEIGHTS) return OK;
    if (b->o->loss != LOSS_BLOCKS) return moments_get(b->moments, r, &h->full, e);
    const calib_tap *t = calib_find(b->stats, r);
    if (!t)
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)b->layer, role_name(r));
    h->blocks = t->blocks;
    return OK;
}

static err_code add_quad(const quant_block *b, const tensor *x, const tensor *h, double *loss,
                         err *e)
{
    tensor out = tensor_1d(b->scratch->row, DT_F64, x->shape[0]);
    TRY(op_quad(b->d, &out, x, h, e));
    for (int64_t i = 0; i < x->shape[0]; i++) *loss += b->scratch->row[i];
    return OK;
}

err_code moment_loss(const quant_block *b, const tensor *x, const second_moment *h, double *loss,
                     err *e)
{
    *loss = 0;
    if (h->full.data) return add_quad(b, x, &h->full, loss, e);
    if (h->blocks.data) {
        const int64_t g = h->blocks.shape[1];
        for (int64_t i = 0; i < h->blocks.shape[0]; i++) {
            const tensor cols = tensor_cols(x, i * g, g);
            const tensor part = tensor_2d((float *)h->blocks.data + i * g * g, DT_F32, g, g);
            TRY(add_quad(b, &cols, &part, loss, e));
        }
        return OK;
    }
    for (int64_t i = 0; i < x->shape[0]; i++) {
        const float *row = (const float *)x->data + i * x->stride[0];
        double sum = 0;
        for (int64_t j = 0; j < x->shape[1]; j++) sum += (double)row[j] * row[j];
        *loss += sum;
    }
    return OK;
}

/* Rows of a linear with its plan: each step on all of them in the pool. */
typedef struct {
    float *x;       /* [n,k] */
    const float *w; /* [n,k] */
    int64_t k, group, from;
    const plan_linear *l;
    const float *col, *row;
    bool less;
} rows_job;

/* As op_quant_error, for codes that the method fixed; the weights count as 0 unless `less`. */
static void fixed_row(void *ctx, int64_t i, int worker)
{
    const rows_job *j = ctx;
    const int64_t k = j->k, g = j->group, r = j->from + i;
    const f16 *scale = (const f16 *)j->l->scale.data + r * (k / g);
    const uint8_t *zero = (const uint8_t *)j->l->zero.data + r * (k / g);
    const uint8_t *codes = (const uint8_t *)j->l->codes.data + r * k / 2;
    float *x = j->x + i * k;
    (void)worker;
    for (int64_t b = 0; b < k / g; b++) {
        const float s = f16_to_f32(scale[b]);
        for (int64_t q = b * g; q < (b + 1) * g; q++) {
            const int code = codes[q / 2] >> 4 * (q & 1) & 15;
            const float y = (float)(code - zero[b]) * s, miss = j->less ? y - x[q] : y;
            x[q] = j->col ? miss / j->col[q] : miss;
        }
    }
}

static void fixed_error(const quant_block *b, tensor *w, const plan_linear *l, const float *col,
                        int64_t from, bool less)
{
    rows_job j = {.x = w->data,
                  .k = w->shape[1],
                  .group = b->o->group,
                  .from = from,
                  .l = l,
                  .col = col,
                  .less = less};
    pool_run(dev_pool(b->d), fixed_row, &j, w->shape[0]);
}

static void unscale_row(void *ctx, int64_t i, int worker)
{
    const rows_job *j = ctx;
    (void)worker;
    for (int64_t q = 0; q < j->k; q++) j->x[i * j->k + q] *= j->row[j->from + i];
}

static void unscale_rows(const quant_block *b, tensor *w, const fold_linear *f, int64_t from)
{
    rows_job j = {.x = w->data, .k = w->shape[1], .from = from, .row = f && f->row ? f->row : NULL};
    if (j.row) pool_run(dev_pool(b->d), unscale_row, &j, w->shape[0]);
}

/* Errors become what was rounded, over the factors. */
static void restore_row(void *ctx, int64_t i, int worker)
{
    const rows_job *j = ctx;
    float *x = j->x + i * j->k;
    const float *w = j->w + i * j->k;
    (void)worker;
    for (int64_t q = 0; q < j->k; q++) {
        const float v = w[q] + x[q];
        x[q] = j->col ? v / j->col[q] : v;
    }
}

/* Error of one tile of rows, in the terms of the unscaled input and output: (w' - w) * row / col.
 */
static err_code tile_error(const quant_block *b, tensor *w, const plan_linear *l,
                           const fold_linear *f, int64_t from, err *e)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    tensor scale = tensor_2d(b->scratch->scale, DT_F16, n, k / b->o->group);
    tensor zero = tensor_2d(b->scratch->zero, DT_U8, n, k / b->o->group);
    tensor col = tensor_1d(f && f->col ? f->col : NULL, DT_F32, k);
    if (l) {
        scale = tensor_rows(&l->scale, from, n);
        zero = tensor_rows(&l->zero, from, n);
    } else {
        TRY(op_quant_range(b->d, &scale, &zero, w, NULL, b->o->group, e));
    }
    if (l && l->codes.data)
        fixed_error(b, w, l, col.data, from, true);
    else
        TRY(op_quant_error(b->d, w, w, &scale, &zero, col.data ? &col : NULL, b->o->group, e));
    unscale_rows(b, w, f, from);
    return OK;
}

err_code plan_rows(const quant_block *b, const tensor *w, const plan_linear *l,
                   const fold_linear *f, int64_t from, tensor *x, err *e)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    const float *col = f ? f->col : NULL;
    float *y = x->data;
    if (l->codes.data) {
        fixed_error(b, x, l, col, from, false);
        unscale_rows(b, x, f, from);
        return OK;
    }
    const tensor scale = tensor_rows(&l->scale, from, n), zero = tensor_rows(&l->zero, from, n);
    const float *was = w->data;
    TRY(op_quant_error(b->d, x, w, &scale, &zero, NULL, b->o->group, e));
    pool_run(dev_pool(b->d), restore_row, &(rows_job){.x = y, .w = was, .k = k, .col = col}, n);
    unscale_rows(b, x, f, from);
    return OK;
}

err_code linear_loss(const quant_block *b, tensor_role r, const fold *f, const plan_linear *l,
                     double *loss, err *e)
{
    const fold_linear *fl = f ? fold_find(f, r) : NULL;
    second_moment h;
    tensor dense;
    TRY(linear_weights(b, r, &dense, e));
    TRY(moment_of(b, r, &h, e));
    const int64_t step = tile_rows(b->scratch, dense.shape[1]), n = dense.shape[0];
    *loss = 0;
    for (int64_t at = 0; at < n; at += step) {
        tensor w = {.data = b->scratch->w};
        double part;
        TRY(job_check(b->j, e));
        TRY(fold_rows(&w, &dense, fl, at, n - at < step ? n - at : step, b->layer, r, e));
        TRY(tile_error(b, &w, l, fl, at, e));
        TRY(moment_loss(b, &w, &h, &part, e));
        *loss += part;
    }
    return OK;
}

err_code block_losses(const quant_block *b, block_plan *p, err *e)
{
    fold f;
    TRY(fold_init(&f, b->m, p, e));
    err_code rc = b->dev ? dev_block_losses(b, &f, p, e) : OK;
    for (int i = 0; i < p->n_linears && rc == OK && !b->dev; i++) {
        plan_linear *l = &p->linear[i];
        rc = linear_loss(b, l->role, NULL, NULL, &l->loss_before, e);
        if (rc == OK) rc = linear_loss(b, l->role, &f, l, &l->loss_after, e);
    }
    fold_free(&f);
    return rc;
}
