/* Checked entry points of the ops that solve and that round in an order of the inputs. */
#include <inttypes.h>

#include "kernels/ops_check.h"
#include "kernels/search_ops.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static err_code check_square(const device *d, const tensor *t, const char *what, int64_t k, err *e)
{
    TRY(check_tensor(d, t, what, DT_F32, 2, SHAPE(k, t->shape[0]), e));
    return check_contiguous(t, what, e);
}

err_code op_rounds(device *d, err *e)
{
    return d->ops.search->rounds ? d->ops.search->rounds(d, e) : OK;
}

err_code op_reorder(device *d, tensor *y, const tensor *h, const tensor *order, const tensor *col,
                    float add, err *e)
{
    const int64_t k = h->shape[0];
    TRY(check_square(d, h, "op_reorder: h", -1, e));
    TRY(check_square(d, y, "op_reorder: y", k, e));
    TRY(check_tensor(d, order, "op_reorder: order", DT_I32, 1, &k, e));
    if (col) TRY(check_tensor(d, col, "op_reorder: col", DT_F32, 1, &k, e));
    return k ? d->ops.search->reorder(d, y, h, order, col, add, e) : OK;
}

err_code op_factor(device *d, tensor *a, tensor *failed, err *e)
{
    TRY(check_square(d, a, "op_factor: a", -1, e));
    TRY(check_tensor(d, failed, "op_factor: failed", DT_I32, 1, SHAPE(1), e));
    return a->shape[0] ? d->ops.search->factor(d, a, failed, e) : OK;
}

err_code op_invert(device *d, tensor *a, err *e)
{
    TRY(check_square(d, a, "op_invert: a", -1, e));
    return a->shape[0] ? d->ops.search->invert(d, a, e) : OK;
}

err_code op_reverse(device *d, tensor *a, err *e)
{
    TRY(check_square(d, a, "op_reverse: a", -1, e));
    return a->shape[0] ? d->ops.search->reverse(d, a, e) : OK;
}

err_code op_solve(device *d, tensor *x, const tensor *l, err *e)
{
    TRY(check_square(d, l, "op_solve: l", -1, e));
    TRY(check_tensor(d, x, "op_solve: x", DT_F32, 2, SHAPE(-1, l->shape[0]), e));
    TRY(check_contiguous(x, "op_solve: x", e));
    return tensor_count(x) ? d->ops.search->solve(d, x, l, e) : OK;
}

static err_code check_state(const device *d, const round_state *s, int64_t n, int64_t k,
                            const char *op, err *e)
{
    const int32_t g = s->g;
    if (!(g == 32 || g == 64 || g == 128) || k % g)
        return err_set(e, E_SHAPE,
                       "%s: group: expected 32, 64 or 128 that divides %" PRId64 ", got %d", op, k,
                       (int)g);
    TRY(check_tensor(d, &s->scale, op, DT_F16, 2, SHAPE(n, k / g), e));
    TRY(check_tensor(d, &s->zero, op, DT_U8, 2, SHAPE(n, k / g), e));
    TRY(check_tensor(d, &s->codes, op, DT_U8, 2, SHAPE(n, k), e));
    TRY(check_tensor(d, &s->work, op, DT_F32, 2, SHAPE(n, 128), e));
    TRY(check_contiguous(&s->scale, op, e));
    TRY(check_contiguous(&s->zero, op, e));
    return check_contiguous(&s->codes, op, e);
}

err_code op_by_place(device *d, tensor *y, const tensor *w, const tensor *order, err *e)
{
    TRY(check_tensor(d, w, "op_by_place: w", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, y, "op_by_place: y", DT_F32, 2, w->shape, e));
    TRY(check_tensor(d, order, "op_by_place: order", DT_I32, 1, &w->shape[1], e));
    return tensor_count(y) ? d->ops.search->by_place(d, y, w, order, e) : OK;
}

err_code op_feedback(device *d, round_state *s, tensor *w, const tensor *u, const tensor *order,
                     err *e)
{
    TRY(check_tensor(d, w, "op_feedback: w", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_contiguous(w, "op_feedback: w", e));
    TRY(check_state(d, s, w->shape[0], w->shape[1], "op_feedback", e));
    TRY(check_square(d, u, "op_feedback: u", w->shape[1], e));
    TRY(check_tensor(d, order, "op_feedback: order", DT_I32, 1, &w->shape[1], e));
    return tensor_count(w) ? d->ops.search->feedback(d, s, w, u, order, e) : OK;
}

err_code op_code_errors(device *d, tensor *y, const round_state *s, const tensor *w,
                        const tensor *col, err *e)
{
    TRY(check_tensor(d, w, "op_code_errors: w", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, y, "op_code_errors: y", DT_F32, 2, w->shape, e));
    TRY(check_state(d, s, w->shape[0], w->shape[1], "op_code_errors", e));
    if (col) TRY(check_tensor(d, col, "op_code_errors: col", DT_F32, 1, &w->shape[1], e));
    return tensor_count(w) ? d->ops.search->code_errors(d, y, s, w, col, e) : OK;
}

err_code op_sweep(device *d, round_state *s, tensor *x, const tensor *h, const tensor *col,
                  bool refit, err *e)
{
    TRY(check_tensor(d, x, "op_sweep: x", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_contiguous(x, "op_sweep: x", e));
    TRY(check_state(d, s, x->shape[0], x->shape[1], "op_sweep", e));
    TRY(check_square(d, h, "op_sweep: h", x->shape[1], e));
    if (col) TRY(check_tensor(d, col, "op_sweep: col", DT_F32, 1, &x->shape[1], e));
    return tensor_count(x) ? d->ops.search->sweep(d, s, x, h, col, refit, e) : OK;
}

err_code op_pack_codes(device *d, tensor *out, const round_state *s, const tensor *w, err *e)
{
    const int64_t n = out->shape[0], k = 2 * out->shape[1];
    TRY(check_tensor(d, out, "op_pack_codes: out", DT_U8, 2, SHAPE(-1, -1), e));
    TRY(check_contiguous(out, "op_pack_codes: out", e));
    TRY(check_state(d, s, n, k, "op_pack_codes", e));
    if (w) TRY(check_tensor(d, w, "op_pack_codes: w", DT_F32, 2, SHAPE(n, k), e));
    return tensor_count(out) ? d->ops.search->pack_codes(d, out, s, w, e) : OK;
}
