/* Error feedback, tile by tile of rows. */
#include "awq/dev_feedback.h"

#include "base/mem.h"

#define MAX_RAISES 6 /* of ridge and damping, each tenfold */

/* Diagonal of h on the host. */
static err_code diagonal_of(const quant_block *b, const tensor *h, float **out, err *e)
{
    dev_scratch *s = b->dev;
    const int64_t k = h->shape[0];
    tensor dev = dev_1d(s, s->sums, DT_F32, k);
    TRY(op_diagonal(b->d, &dev, h, e));
    *out = (float *)s->host;
    return dev_get(s, *out, s->sums, (size_t)k * sizeof(float), e);
}

static double mean_of(const float *v, int64_t k)
{
    double sum = 0;
    for (int64_t i = 0; i < k; i++) sum += v[i];
    return sum > 0 ? sum / (double)k : 1;
}

static tensor factor_of(const dev_scratch *s, int64_t k)
{
    return dev_2d(s, s->factor, DT_F32, k, k);
}

/* The factor of h in an order, `add` on its diagonal; that is raised until there is one. */
static err_code factor_raised(const quant_block *b, tensor_role r, const tensor *h,
                              const int32_t *order, const tensor *col, double add, err *e)
{
    dev_scratch *s = b->dev;
    const int64_t k = h->shape[0];
    tensor a = factor_of(s, k), by = dev_1d(s, (void *)(uintptr_t)order, DT_I32, k),
           flag = dev_1d(s, s->failed, DT_I32, 1);
    int32_t failed = 1;
    for (int i = 0; i < MAX_RAISES && failed; i++, add *= 10) {
        TRY(op_zero(b->d, &flag, e));
        TRY(op_reorder(b->d, &a, h, &by, col, (float)add, e));
        TRY(op_factor(b->d, &a, &flag, e));
        TRY(dev_get(s, &failed, s->failed, sizeof failed, e));
    }
    if (!failed) return OK;
    return err_set(e, E_INPUT, "layer %d: %s: second moments cannot be factored, whatever is added",
                   (int)b->layer, role_name(r));
}

err_code dev_feedback_ridge(const quant_block *b, tensor_role r, const tensor *h, double share,
                            err *e)
{
    float *diagonal;
    TRY(diagonal_of(b, h, &diagonal, e));
    return factor_raised(b, r, h, b->dev->identity, NULL, mean_of(diagonal, h->shape[0]) * share,
                         e);
}

err_code dev_feedback_factor(const quant_block *b, tensor_role r, const tensor *h, const float *col,
                             const dev_factors *v, double damping, err *e)
{
    dev_scratch *s = b->dev;
    const int64_t k = h->shape[0];
    float *diagonal;
    void *mem;
    TRY(diagonal_of(b, h, &diagonal, e));
    TRY(mem_alloc(&mem, (size_t)k, 2 * sizeof(int32_t), "order of inputs", e));
    int32_t *order = mem, *back = order + k;
    err_code rc = feedback_order(order, diagonal, 1, col, k, e);
    for (int64_t i = 0; rc == OK && i < k; i++) {
        const float c = col ? col[i] : 1.f;
        diagonal[i] /= c * c;
        back[k - 1 - i] = order[i];
    }
    const double mean = mean_of(diagonal, k);
    if (rc == OK) rc = dev_put(s, s->order, order, (size_t)k * sizeof *order, e);
    if (rc == OK) rc = dev_put(s, s->back, back, (size_t)k * sizeof *back, e);
    if (rc == OK) rc = dev_sync(b->d, e);
    mem_free(mem);
    if (rc != OK) return rc;
    TRY(factor_raised(b, r, h, s->back, dev_opt(&v->col), mean * damping, e));
    tensor u = factor_of(s, k);
    TRY(op_invert(b->d, &u, e));
    return op_reverse(b->d, &u, e);
}

err_code dev_feedback_rows(const quant_block *b, round_state *st, const tensor *x, tensor *y,
                           tensor *grad, const tensor *h, const dev_factors *v,
                           const feedback_opts *o, err *e)
{
    const dev_scratch *s = b->dev;
    const int64_t k = x->shape[1];
    const tensor u = factor_of(s, k), order = dev_1d(s, s->order, DT_I32, k),
                 *col = dev_opt(&v->col);
    TRY(op_by_place(b->d, y, x, &order, e));
    TRY(op_feedback(b->d, st, y, &u, &order, e));
    if (!o->sweeps) return OK;
    TRY(op_code_errors(b->d, y, st, x, col, e));
    TRY(op_matmul(b->d, grad, y, h, e));
    for (int i = 0; i < o->sweeps; i++) TRY(op_sweep(b->d, st, grad, h, col, o->refit, e));
    return o->refit ? op_sweep(b->d, st, grad, h, col, false, e) : OK; /* the last is for codes */
}

/* ---- a linear by itself ---- */

typedef struct {
    const quant_block *b;
    const feedback_opts *o;
    tensor w, h, scale, zero, packed; /* on the device */
    dev_factors v;
} feeding;

static err_code round_tile(const feeding *q, int64_t at, int64_t rows, err *e)
{
    dev_scratch *s = q->b->dev;
    const int64_t k = q->w.shape[1];
    const tensor part = tensor_rows(&q->w, at, rows);
    tensor x = dev_2d(s, s->tile[0], DT_F32, rows, k), y = dev_2d(s, s->tile[1], DT_F32, rows, k),
           grad = dev_2d(s, s->tile[2], DT_F32, rows, k), row = q->v.row,
           packed = tensor_rows(&q->packed, at, rows);
    round_state st = {dev_2d(s, s->codes, DT_U8, rows, k), tensor_rows(&q->scale, at, rows),
                      tensor_rows(&q->zero, at, rows), dev_2d(s, s->work, DT_F32, rows, 128), s->g};
    if (row.data) row = tensor_rows(&q->v.row, at, rows);
    TRY(job_check(q->b->j, e));
    TRY(op_scaled(q->b->d, &x, &part, dev_opt(&q->v.col), dev_opt(&row), e));
    TRY(dev_feedback_rows(q->b, &st, &x, &y, &grad, &q->h, &q->v, q->o, e));
    return op_pack_codes(q->b->d, &packed, &st, NULL, e);
}

err_code dev_feedback_codes(const quant_block *b, const fold *f, plan_linear *out,
                            const feedback_opts *o, err *e)
{
    dev_scratch *s = b->dev;
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    feeding q = {.b = b, .o = o};
    second_moment h;
    TRY(dev_weights(b, out->role, &q.w, e));
    TRY(moment_of(b, out->role, &h, e));
    const int64_t n = q.w.shape[0], k = q.w.shape[1], step = dev_step(s, k);
    q.h = h.full;
    q.packed = dev_2d(s, s->packed, DT_U8, n, k / 2);
    if (!out->codes.data)
        TRY(arena_get(b->mem, &out->codes.data, (size_t)tensor_count(&out->codes), e));
    TRY(dev_factors_put(s, fl, n, k, &q.v, e));
    TRY(dev_params_put(s, out, &q.scale, &q.zero, e));
    TRY(dev_feedback_factor(b, out->role, &q.h, fl ? fl->col : NULL, &q.v, o->damping, e));
    for (int64_t at = 0; at < n; at += step)
        TRY(round_tile(&q, at, n - at < step ? n - at : step, e));
    TRY(dev_copy(b->d, &out->codes, &q.packed, e));
    return dev_params_get(s, out, e);
}
