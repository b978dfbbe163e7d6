/* Checked entry points of the search's ops. */
#include "kernels/search_ops.h"

#include <inttypes.h>

#include "kernels/ops_check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

static err_code check_group(const char *op, int64_t k, int32_t g, err *e)
{
    if (g >= 1 && g <= 128 && k % g == 0 && (g == 128 || g == 64 || g == 32)) return OK;
    return err_set(e, E_SHAPE, "%s: group: expected 32, 64 or 128 that divides %" PRId64 ", got %d",
                   op, k, (int)g);
}

static err_code check_mixed(const device *d, const tensor *t, const char *what,
                            const int64_t *shape, err *e)
{
    return check_tensor(d, t, what, t->dt == DT_F16 || t->dt == DT_BF16 ? t->dt : DT_F32, 2, shape,
                        e);
}

static err_code check_vector(const device *d, const tensor *t, const char *what, int64_t n, err *e)
{
    return t ? check_tensor(d, t, what, DT_F32, 1, &n, e) : OK;
}

err_code op_zero(device *d, tensor *t, err *e)
{
    TRY(check_contiguous(t, "op_zero", e));
    return tensor_count(t) ? d->ops.search->zero(d, t, e) : OK;
}

err_code op_mix(device *d, tensor *y, float alpha, const tensor *a, float beta, const tensor *b,
                err *e)
{
    TRY(check_mixed(d, a, "op_mix: a", SHAPE(-1, -1), e));
    TRY(check_mixed(d, y, "op_mix: y", a->shape, e));
    if (b) TRY(check_mixed(d, b, "op_mix: b", a->shape, e));
    return tensor_count(y) ? d->ops.search->mix(d, y, alpha, a, beta, b, e) : OK;
}

err_code op_row_dots(device *d, tensor *out, const tensor *a, const tensor *b, err *e)
{
    TRY(check_mixed(d, a, "op_row_dots: a", SHAPE(-1, -1), e));
    TRY(check_mixed(d, b, "op_row_dots: b", a->shape, e));
    TRY(check_tensor(d, out, "op_row_dots: out", DT_F64, 1, a->shape, e));
    return tensor_count(out) ? d->ops.search->row_dots(d, out, a, b, e) : OK;
}

err_code op_gram_blocks(device *d, tensor *h, const tensor *x, err *e)
{
    TRY(check_tensor(d, x, "op_gram_blocks: x", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, h, "op_gram_blocks: h", DT_F32, 3, SHAPE(-1, -1, h->shape[1]), e));
    TRY(check_contiguous(h, "op_gram_blocks: h", e));
    if (h->shape[0] * h->shape[1] != x->shape[1])
        return err_set(e, E_SHAPE,
                       "op_gram_blocks: h: expected blocks of %" PRId64 " inputs, got %" PRId64,
                       x->shape[1], h->shape[0] * h->shape[1]);
    return tensor_count(x) ? d->ops.search->gram_blocks(d, h, x, e) : OK;
}

err_code op_cross(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    TRY(check_tensor(d, a, "op_cross: a", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, b, "op_cross: b", d->act, 2, SHAPE(a->shape[0], -1), e));
    TRY(check_tensor(d, y, "op_cross: y", DT_F32, 2, SHAPE(a->shape[1], b->shape[1]), e));
    TRY(check_contiguous(y, "op_cross: y", e));
    if (!tensor_count(a) || !tensor_count(b)) return OK;
    return d->ops.cross ? d->ops.cross(d, y, a, b, e) : d->ops.search->cross(d, y, a, b, e);
}

err_code op_diagonal(device *d, tensor *out, const tensor *h, err *e)
{
    TRY(check_tensor(d, h, "op_diagonal: h", DT_F32, 2, SHAPE(-1, h->shape[0]), e));
    TRY(check_tensor(d, out, "op_diagonal: out", DT_F32, 1, h->shape, e));
    return tensor_count(out) ? d->ops.search->diagonal(d, out, h, e) : OK;
}

err_code op_form(device *d, tensor *out, const tensor *x, const tensor *h, tensor *work, err *e)
{
    const dtype dt = x->dt == DT_BF16 ? DT_BF16 : DT_F32;
    TRY(check_tensor(d, x, "op_form: x", dt, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, h, "op_form: h", dt, 2, SHAPE(x->shape[1], x->shape[1]), e));
    TRY(check_tensor(d, work, "op_form: work", DT_F32, 2, x->shape, e));
    TRY(check_tensor(d, out, "op_form: out", DT_F64, 1, x->shape, e));
    return tensor_count(x) ? d->ops.search->form(d, out, x, h, work, e) : OK;
}

err_code op_scaled(device *d, tensor *y, const tensor *w, const tensor *col, const tensor *row,
                   err *e)
{
    TRY(check_weight(d, w, "op_scaled: w", 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, y, "op_scaled: y", DT_F32, 2, w->shape, e));
    TRY(check_vector(d, col, "op_scaled: col", w->shape[1], e));
    TRY(check_vector(d, row, "op_scaled: row", w->shape[0], e));
    return tensor_count(y) ? d->ops.search->scaled(d, y, w, col, row, e) : OK;
}

err_code op_relative_sum(device *d, tensor *sum, const tensor *w, int32_t g, double eps, err *e)
{
    TRY(check_weight(d, w, "op_relative_sum: w", 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, sum, "op_relative_sum: sum", DT_F64, 1, SHAPE(w->shape[1]), e));
    TRY(check_group("op_relative_sum", w->shape[1], g, e));
    return tensor_count(w) ? d->ops.search->relative_sum(d, sum, w, g, eps, e) : OK;
}

err_code op_try_factors(device *d, tensor *y, const tensor *w, const tensor *s, int32_t g, err *e)
{
    TRY(check_weight(d, w, "op_try_factors: w", 2, SHAPE(-1, -1), e));
    TRY(check_mixed(d, y, "op_try_factors: y", w->shape, e));
    TRY(check_vector(d, s, "op_try_factors: s", w->shape[1], e));
    TRY(check_group("op_try_factors", w->shape[1], g, e));
    return tensor_count(w) ? d->ops.search->try_factors(d, y, w, s, g, e) : OK;
}

err_code op_rounded(device *d, tensor *y, const rounded_spec *r, err *e)
{
    const int64_t n = y->shape[0], k = y->shape[1];
    TRY(check_mixed(d, y, "op_rounded: y", SHAPE(-1, -1), e));
    TRY(check_group("op_rounded", k, r->g, e));
    if (r->w) TRY(check_tensor(d, r->w, "op_rounded: w", DT_F32, 2, y->shape, e));
    if (r->codes) {
        TRY(check_tensor(d, r->codes, "op_rounded: codes", DT_U8, 2, SHAPE(n, k / 2), e));
        TRY(check_contiguous(r->codes, "op_rounded: codes", e));
    }
    TRY(check_tensor(d, r->scale, "op_rounded: scale", DT_F16, 2, SHAPE(n, k / r->g), e));
    TRY(check_tensor(d, r->zero, "op_rounded: zero", DT_U8, 2, SHAPE(n, k / r->g), e));
    TRY(check_vector(d, r->col, "op_rounded: col", k, e));
    TRY(check_vector(d, r->row, "op_rounded: row", n, e));
    if (!r->w == !r->codes)
        return err_set(e, E_SHAPE, "op_rounded: expected weights or codes, got %s",
                       r->w ? "both" : "neither");
    return tensor_count(y) ? d->ops.search->rounded(d, y, r, e) : OK;
}

err_code op_range(device *d, tensor *scale, tensor *zero, const tensor *w, const range_spec *r,
                  err *e)
{
    const tensor *h = r->h;
    TRY(check_tensor(d, w, "op_range: w", DT_F32, 2, SHAPE(-1, -1), e));
    const int64_t n = w->shape[0], k = w->shape[1], s = h->shape[h->ndim - 1];
    TRY(check_group("op_range", k, r->g, e));
    TRY(check_tensor(d, scale, "op_range: scale", DT_F16, 2, SHAPE(n, k / r->g), e));
    TRY(check_tensor(d, zero, "op_range: zero", DT_U8, 2, SHAPE(n, k / r->g), e));
    TRY(check_vector(d, r->col, "op_range: col", k, e));
    if (h->ndim == 2)
        TRY(check_tensor(d, h, "op_range: h", DT_F32, 2, SHAPE(k, k), e));
    else
        TRY(check_tensor(d, h, "op_range: h", DT_F32, 3, SHAPE(k / s, s, s), e));
    TRY(check_contiguous(h, "op_range: h", e));
    if (s % r->g)
        return err_set(e, E_UNSUPPORTED, "op_range: group %d does not divide blocks of %" PRId64,
                       (int)r->g, s);
    return tensor_count(w) ? d->ops.search->range(d, scale, zero, w, r, e) : OK;
}

err_code op_turn(device *d, tensor *x, const tensor *pos, const rope_spec *r, err *e)
{
    TRY(check_tensor(d, x, "op_turn: x", d->act, 3, SHAPE(-1, -1, -1), e));
    TRY(check_tensor(d, pos, "op_turn: pos", DT_I32, 1, x->shape, e));
    if (r->dims < 0 || r->dims % 2 || r->dims > x->shape[2])
        return err_set(e, E_SHAPE,
                       "op_turn: rotated dims: expected an even number up to %" PRId64 ", got %d",
                       x->shape[2], (int)r->dims);
    TRY(check_tensor(d, &r->inv_freq, "op_turn: inv_freq", DT_F32, 1, SHAPE(r->dims / 2), e));
    return tensor_count(x) ? d->ops.search->turn(d, x, pos, r, e) : OK;
}

err_code op_cache_errors(device *d, tensor *y, const tensor *x, const tensor *s, err *e)
{
    TRY(check_tensor(d, x, "op_cache_errors: x", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, s, "op_cache_errors: s", DT_F32, 2, SHAPE(-1, x->shape[1]), e));
    TRY(check_tensor(d, y, "op_cache_errors: y", DT_F32, 2,
                     SHAPE(s->shape[0] * x->shape[0], x->shape[1]), e));
    TRY(check_contiguous(s, "op_cache_errors: s", e));
    TRY(check_contiguous(y, "op_cache_errors: y", e));
    return tensor_count(y) ? d->ops.search->cache_errors(d, y, x, s, e) : OK;
}
