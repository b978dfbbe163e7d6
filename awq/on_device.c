/* Searching on a device, tile by tile of rows. Sums come back row by row and are added here in
 * order. */
#include "awq/on_device_internal.h"

#include <string.h>

#include "awq/chain_shared.h"
#include "awq/dev_chain.h"
#include "awq/moments.h"
#include "base/mem.h"
#include "runtime/layer_walk.h"

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- memory ---- */

static dev_scratch shape_of(const model_desc *m, int32_t group)
{
    tensor_role roles[PLAN_LINEARS];
    dev_scratch s = {.elems = DEV_TILE_ELEMS, .g = group, .narrowest = INT64_MAX};
    const int n = model_block_linears(m, roles);
    for (int i = 0; i < n; i++) {
        const int64_t rows = model_linear_n(m, roles[i]), k = model_linear_k(m, roles[i]);
        s.widest = most(s.widest, k);
        s.narrowest = least(s.narrowest, k);
        s.rows = most(s.rows, rows);
        s.largest = most(s.largest, rows * k);
        s.groups = most(s.groups, rows * k / group);
    }
    s.elems = most(least(s.elems, s.largest), s.widest);
    return s;
}

static size_t sums_count(const dev_scratch *s)
{
    return (size_t)most(DEV_CANDIDATES * s->rows, s->widest);
}

typedef struct {
    void **out;
    size_t bytes;
} scratch_part;

enum { PARTS = 24 };

/* `lent`: bytes of device memory for the last tiles. */
static int own_tiles(const dev_scratch *s, dev_use_of use, size_t lent)
{
    if (use != DEV_CARRIES) return 3;
    const size_t borrowed = lent / ((size_t)s->elems * sizeof(float));
    return borrowed < DEV_TILES ? DEV_TILES - (int)borrowed : 0;
}

static int parts_of(dev_scratch *s, dev_use_of use, size_t lent, scratch_part p[PARTS])
{
    const size_t f = sizeof(float), elems = (size_t)s->elems, widest = (size_t)s->widest,
                 groups = (size_t)s->groups, tall = (size_t)(s->elems / s->narrowest);
    int n = 0;
    for (int i = 0; i < own_tiles(s, use, lent); i++)
        p[n++] = (scratch_part){(void **)&s->tile[i], elems * f};
    p[n++] = (scratch_part){(void **)&s->col, widest * f};
    p[n++] = (scratch_part){(void **)&s->row, (size_t)s->rows * f};
    if (use == DEV_RANGES)
        p[n++] = (scratch_part){(void **)&s->half, widest * widest * sizeof(bf16)};
    if (use == DEV_CODES) p[n++] = (scratch_part){(void **)&s->factor, widest * widest * f};
    p[n++] = (scratch_part){(void **)&s->square, widest * 128 * f};
    p[n++] = (scratch_part){(void **)&s->sums, sums_count(s) * sizeof(double)};
    p[n++] = (scratch_part){(void **)&s->scale, groups * sizeof(f16)};
    p[n++] = (scratch_part){(void **)&s->zero, groups};
    if (use == DEV_RANGES) return n;
    for (int i = 0; i < DEV_WAYS && use == DEV_CARRIES; i++) {
        p[n++] = (scratch_part){(void **)&s->ways_scale[i], groups * sizeof(f16)};
        p[n++] = (scratch_part){(void **)&s->ways_zero[i], groups};
    }
    p[n++] = (scratch_part){(void **)&s->codes, elems};
    p[n++] = (scratch_part){(void **)&s->packed, (size_t)s->largest / 2};
    p[n++] = (scratch_part){(void **)&s->work, tall * 128 * f};
    p[n++] = (scratch_part){(void **)&s->order, widest * sizeof(int32_t)};
    p[n++] = (scratch_part){(void **)&s->back, widest * sizeof(int32_t)};
    p[n++] = (scratch_part){(void **)&s->identity, widest * sizeof(int32_t)};
    p[n++] = (scratch_part){(void **)&s->failed, sizeof(int32_t)};
    return n;
}

static size_t lay_out(dev_scratch *s, dev_use_of use, size_t lent, uint8_t *base)
{
    scratch_part p[PARTS];
    size_t at = 0;
    const int n = parts_of(s, use, lent, p);
    for (int i = 0; i < n; i++) {
        *p[i].out = base ? base + at : NULL;
        at += (p[i].bytes + 255) & ~(size_t)255;
    }
    return at;
}

size_t dev_scratch_bytes(const model_desc *m, int32_t group, dev_use_of use)
{
    dev_scratch s = shape_of(m, group);
    return lay_out(&s, use, 0, NULL) + sums_count(&s) * sizeof(double);
}

static err_code put_identity(dev_scratch *s, err *e)
{
    int32_t *p = (int32_t *)s->host;
    for (int64_t i = 0; i < s->widest; i++) p[i] = (int32_t)i;
    TRY(dev_put(s, s->identity, p, (size_t)s->widest * sizeof *p, e));
    return dev_sync(s->d, e);
}

/* What is free there until the block is rounded, and while it is. */
static void borrow(dev_scratch *s, dev_chain *inputs, const dev_buf *lent)
{
    const int own = own_tiles(s, DEV_CARRIES, lent->bytes);
    s->factor = dev_chain_square(inputs);
    s->half = (bf16 *)s->factor;
    for (int i = own; i < DEV_TILES; i++) s->tile[i] = (float *)lent->data + (i - own) * s->elems;
}

err_code dev_scratch_open(dev_scratch **out, device *d, const model_desc *m, int32_t group,
                          dev_use_of use, dev_chain *inputs, err *e)
{
    void *mem, *host;
    TRY(mem_alloc(&mem, 1, sizeof(dev_scratch), "search", e));
    dev_scratch *s = mem;
    *s = shape_of(m, group);
    s->d = d;
    s->chain = inputs;
    const dev_buf lent = inputs ? dev_chain_pass_room(inputs) : (dev_buf){0};
    err_code rc = mem_alloc(&host, sums_count(s), sizeof(double), "search", e);
    if (rc == OK) {
        s->host = host;
        rc = dev_alloc(&s->buf, d, lay_out(s, use, lent.bytes, NULL), "search tiles", e);
    }
    if (rc == OK) lay_out(s, use, lent.bytes, s->buf.data);
    if (inputs) borrow(s, inputs, &lent);
    if (rc == OK && use != DEV_RANGES) rc = put_identity(s, e);
    if (rc != OK) {
        dev_scratch_close(&s);
        return rc;
    }
    *out = s;
    return OK;
}

void dev_scratch_close(dev_scratch **s)
{
    if (!*s) return;
    dev_free(&(*s)->buf);
    mem_free((*s)->host);
    mem_free(*s);
    *s = NULL;
}

/* ---- parts ---- */

tensor dev_2d(const dev_scratch *s, void *data, dtype dt, int64_t n, int64_t k)
{
    tensor t = tensor_2d(data, dt, n, k);
    t.mem = dev_mem(s->d);
    return t;
}

tensor dev_1d(const dev_scratch *s, void *data, dtype dt, int64_t n)
{
    tensor t = tensor_1d(data, dt, n);
    t.mem = dev_mem(s->d);
    return t;
}

err_code dev_put(const dev_scratch *s, void *to, const void *from, size_t bytes, err *e)
{
    tensor dst = dev_1d(s, to, DT_U8, (int64_t)bytes);
    const tensor src = tensor_1d((void *)(uintptr_t)from, DT_U8, (int64_t)bytes);
    return dev_copy(s->d, &dst, &src, e);
}

err_code dev_get(const dev_scratch *s, void *to, const void *from, size_t bytes, err *e)
{
    tensor dst = tensor_1d(to, DT_U8, (int64_t)bytes);
    const tensor src = dev_1d(s, (void *)(uintptr_t)from, DT_U8, (int64_t)bytes);
    TRY(dev_copy(s->d, &dst, &src, e));
    return dev_sync(s->d, e);
}

err_code dev_weights(const quant_block *b, tensor_role r, tensor *w, err *e)
{
    block bound = *layer_walk_block(b->walk);
    *w = chain_bound(&bound, r)->dense;
    if (w->data) return OK;
    return err_set(e, E_UNSUPPORTED, "layer %d: %s: not bound by itself on %s", (int)b->layer,
                   role_name(r), dev_name(b->d));
}

int64_t dev_step(const dev_scratch *s, int64_t k) { return s->elems / k; }

err_code dev_factors_put(const dev_scratch *s, const fold_linear *f, int64_t n, int64_t k,
                         dev_factors *out, err *e)
{
    *out = (dev_factors){dev_1d(s, NULL, DT_F32, k), dev_1d(s, NULL, DT_F32, n)};
    if (f && f->col) {
        out->col.data = s->col;
        TRY(dev_put(s, s->col, f->col, (size_t)k * sizeof(float), e));
    }
    if (f && f->row) {
        out->row.data = s->row;
        TRY(dev_put(s, s->row, f->row, (size_t)n * sizeof(float), e));
    }
    return OK;
}

static void params_of(const dev_scratch *s, const plan_linear *l, tensor *scale, tensor *zero)
{
    *scale = dev_2d(s, s->scale, DT_F16, l->scale.shape[0], l->scale.shape[1]);
    *zero = dev_2d(s, s->zero, DT_U8, l->zero.shape[0], l->zero.shape[1]);
}

err_code dev_params_put(const dev_scratch *s, const plan_linear *l, tensor *scale, tensor *zero,
                        err *e)
{
    params_of(s, l, scale, zero);
    TRY(dev_copy(s->d, scale, &l->scale, e));
    return dev_copy(s->d, zero, &l->zero, e);
}

err_code dev_params_get(const dev_scratch *s, plan_linear *l, err *e)
{
    tensor scale, zero;
    params_of(s, l, &scale, &zero);
    TRY(dev_copy(s->d, &l->scale, &scale, e));
    TRY(dev_copy(s->d, &l->zero, &zero, e));
    return dev_sync(s->d, e);
}

/* ---- factors ---- */

err_code dev_weight_mean(const quant_block *b, const smooth_group *g, double eps, double *mean,
                         err *e)
{
    dev_scratch *s = b->dev;
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    tensor sum = dev_1d(s, s->sums, DT_F64, k), w;
    int64_t rows = 0;
    TRY(op_zero(b->d, &sum, e));
    for (int t = 0; t < g->n_targets; t++) {
        TRY(dev_weights(b, g->targets[t], &w, e));
        TRY(op_relative_sum(b->d, &sum, &w, b->o->group, eps, e));
        rows += w.shape[0];
    }
    TRY(dev_get(s, mean, s->sums, (size_t)k * sizeof *mean, e));
    for (int64_t i = 0; i < k; i++) mean[i] /= (double)rows;
    return OK;
}

/* Sums of `n` candidates over `rows` rows of the linear at hand, which the device made. */
static err_code add_sums(const dev_scratch *s, int n, int64_t rows, double *loss, err *e)
{
    TRY(dev_get(s, s->host, s->sums, (size_t)(n * rows) * sizeof(double), e));
    for (int c = 0; c < n; c++)
        for (int64_t i = 0; i < rows; i++) loss[c] += s->host[c * rows + i];
    return OK;
}

/* Tiles of all rows of one target under the factors in s->col; errors of h's type. */
static err_code candidate_rows(const quant_block *b, const tensor *w, const tensor *h, int at,
                               err *e)
{
    dev_scratch *s = b->dev;
    const int64_t n = w->shape[0], k = w->shape[1], step = dev_step(s, k);
    const tensor col = dev_1d(s, s->col, DT_F32, k);
    for (int64_t from = 0; from < n; from += step) {
        const int64_t rows = least(step, n - from);
        const tensor part = tensor_rows(w, from, rows);
        tensor x = dev_2d(s, s->tile[0], h->dt, rows, k),
               y = dev_2d(s, s->tile[1], DT_F32, rows, k),
               out = dev_1d(s, s->sums + at * n + from, DT_F64, rows);
        TRY(op_try_factors(b->d, &x, &part, &col, b->o->group, e));
        TRY(op_form(b->d, &out, &x, h, &y, e));
    }
    return OK;
}

err_code dev_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                    double *loss, err *e)
{
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    second_moment h;
    tensor w, half = dev_2d(b->dev, b->dev->half, DT_BF16, k, k);
    memset(loss, 0, (size_t)n * sizeof *loss);
    TRY(moment_of(b, g->targets[0], &h, e));
    TRY(op_mix(b->d, &half, 1.f, &h.full, 0.f, NULL, e));
    for (int t = 0; t < g->n_targets; t++) {
        TRY(dev_weights(b, g->targets[t], &w, e));
        for (int c = 0; c < n; c += DEV_CANDIDATES) {
            const int some = n - c < DEV_CANDIDATES ? n - c : DEV_CANDIDATES;
            for (int i = 0; i < some; i++) {
                TRY(job_check(b->j, e));
                TRY(dev_put(b->dev, b->dev->col, s + (c + i) * k, (size_t)k * sizeof *s, e));
                TRY(candidate_rows(b, &w, &half, i, e));
            }
            TRY(add_sums(b->dev, some, w.shape[0], loss + c, e));
        }
    }
    return OK;
}

/* ---- ranges ---- */

err_code dev_range(const quant_block *b, const fold *f, plan_linear *out, int points, double shrink,
                   err *e)
{
    dev_scratch *s = b->dev;
    const calib_tap *tap = b->stats ? calib_find(b->stats, out->role) : NULL;
    tensor w, scale, zero;
    dev_factors v;
    TRY(dev_weights(b, out->role, &w, e));
    const int64_t n = w.shape[0], k = w.shape[1], step = dev_step(s, k);
    if (!tap)
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)b->layer, role_name(out->role));
    tensor h = tensor_of(s->square, DT_F32, 3, tap->blocks.shape);
    h.mem = dev_mem(b->d);
    TRY(dev_copy(b->d, &h, &tap->blocks, e));
    TRY(dev_factors_put(s, f ? fold_find(f, out->role) : NULL, n, k, &v, e));
    const range_spec spec = {&h, dev_opt(&v.col), b->o->group, points, shrink, false};
    params_of(s, out, &scale, &zero);
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = least(step, n - at);
        const tensor part = tensor_rows(&w, at, rows);
        tensor x = dev_2d(s, s->tile[0], DT_F32, rows, k), sc = tensor_rows(&scale, at, rows),
               z = tensor_rows(&zero, at, rows), row = v.row;
        if (row.data) row = tensor_rows(&v.row, at, rows);
        TRY(job_check(b->j, e));
        TRY(op_scaled(b->d, &x, &part, dev_opt(&v.col), dev_opt(&row), e));
        TRY(op_range(b->d, &sc, &z, &x, &spec, e));
    }
    return dev_params_get(s, out, e);
}

/* ---- losses ---- */

/* Error of rows under the plan into tile 1: tile 0 has the weights with their factors. */
static err_code rounded_error(const quant_block *b, const tensor *w, const rounded_spec *r, err *e)
{
    dev_scratch *s = b->dev;
    const int64_t n = w->shape[0], k = w->shape[1];
    tensor x = dev_2d(s, s->tile[0], DT_F32, n, k), y = dev_2d(s, s->tile[1], DT_F32, n, k);
    rounded_spec spec = *r;
    if (!spec.codes) spec.w = &x;
    TRY(op_scaled(b->d, &x, w, r->col, r->row, e));
    TRY(op_rounded(b->d, &y, &spec, e));
    TRY(op_scaled(b->d, &x, w, NULL, NULL, e));
    return op_mix(b->d, &y, 1.f, &y, -1.f, &x, e);
}

static err_code linear_losses(const quant_block *b, const fold *f, plan_linear *l, err *e)
{
    dev_scratch *s = b->dev;
    second_moment h;
    tensor w, scale, zero;
    dev_factors v;
    TRY(dev_weights(b, l->role, &w, e));
    TRY(moment_of(b, l->role, &h, e));
    const int64_t n = w.shape[0], k = w.shape[1], step = dev_step(s, k);
    double loss[2] = {0};
    for (int64_t i = 0; i < k; i++) ((float *)s->host)[i] = 1.f;
    TRY(dev_put(s, s->col, s->host, (size_t)k * sizeof(float), e));
    TRY(candidate_rows(b, &w, &h.full, 0, e));
    TRY(dev_factors_put(s, f ? fold_find(f, l->role) : NULL, n, k, &v, e));
    TRY(dev_params_put(s, l, &scale, &zero, e));
    tensor packed = dev_2d(s, s->packed, DT_U8, n, k / 2);
    if (l->codes.data) TRY(dev_copy(b->d, &packed, &l->codes, e));
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = least(step, n - at);
        const tensor fixed = l->codes.data ? tensor_rows(&packed, at, rows) : packed;
        const tensor part = tensor_rows(&w, at, rows), sc = tensor_rows(&scale, at, rows),
                     z = tensor_rows(&zero, at, rows);
        tensor row = v.row, x = dev_2d(s, s->tile[1], DT_F32, rows, k),
               y = dev_2d(s, s->tile[2], DT_F32, rows, k),
               out = dev_1d(s, s->sums + n + at, DT_F64, rows);
        if (row.data) row = tensor_rows(&v.row, at, rows);
        const rounded_spec spec = {
            NULL,       l->codes.data ? &fixed : NULL, &sc, &z, dev_opt(&v.col), dev_opt(&row),
            b->o->group};
        TRY(job_check(b->j, e));
        TRY(rounded_error(b, &part, &spec, e));
        TRY(op_form(b->d, &out, &x, &h.full, &y, e));
    }
    TRY(add_sums(s, 2, n, loss, e));
    l->loss_before = loss[0];
    l->loss_after = loss[1];
    return OK;
}

err_code dev_block_losses(const quant_block *b, const fold *f, block_plan *p, err *e)
{
    for (int i = 0; i < p->n_linears; i++) TRY(linear_losses(b, f, &p->linear[i], e));
    return OK;
}
