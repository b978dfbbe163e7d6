/* What the search's ops mean: plain loops, sums in double. */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "kernels/device_internal.h"
#include "kernels/ops.h"
#include "kernels/quant_group.h"
#include "kernels/round_ref.h"
#include "kernels/search_fold_ref.h"

static float get(const tensor *t, int64_t i, int64_t j)
{
    const int64_t at = i * t->stride[0] + j;
    if (t->dt == DT_F16) return f16_to_f32(((const f16 *)t->data)[at]);
    if (t->dt == DT_BF16) return bf16_to_f32(((const bf16 *)t->data)[at]);
    return ((const float *)t->data)[at];
}

static void put(tensor *t, int64_t i, int64_t j, float v)
{
    const int64_t at = i * t->stride[0] + j;
    if (t->dt == DT_F16)
        ((f16 *)t->data)[at] = f32_to_f16(v);
    else if (t->dt == DT_BF16)
        ((bf16 *)t->data)[at] = f32_to_bf16(v);
    else
        ((float *)t->data)[at] = v;
}

static float entry(const tensor *t, int64_t i) { return t ? ((const float *)t->data)[i] : 1.f; }

static err_code zero_ref(device *d, tensor *t, err *e)
{
    (void)d;
    (void)e;
    memset(t->data, 0, tensor_bytes(t));
    return OK;
}

static err_code mix_ref(device *d, tensor *y, float alpha, const tensor *a, float beta,
                        const tensor *b, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++)
        for (int64_t j = 0; j < y->shape[1]; j++)
            put(y, i, j, b ? alpha * get(a, i, j) + beta * get(b, i, j) : alpha * get(a, i, j));
    return OK;
}

static err_code row_dots_ref(device *d, tensor *out, const tensor *a, const tensor *b, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < a->shape[0]; i++) {
        double sum = 0;
        for (int64_t j = 0; j < a->shape[1]; j++) sum += (double)get(a, i, j) * get(b, i, j);
        ((double *)out->data)[i] = sum;
    }
    return OK;
}

static err_code gram_blocks_ref(device *d, tensor *h, const tensor *x, err *e)
{
    const int64_t g = h->shape[1];
    for (int64_t b = 0; b < h->shape[0]; b++) {
        const tensor cols = tensor_cols(x, b * g, g);
        tensor part = tensor_2d((float *)h->data + b * g * g, DT_F32, g, g);
        TRY(op_gram(d, &part, &cols, e));
        TRY(op_gram_finish(d, &part, e));
    }
    return OK;
}

static err_code cross_ref(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++)
        for (int64_t j = 0; j < y->shape[1]; j++) {
            double sum = get(y, i, j);
            for (int64_t r = 0; r < a->shape[0]; r++) sum += (double)get(a, r, i) * get(b, r, j);
            put(y, i, j, (float)sum);
        }
    return OK;
}

static err_code diagonal_ref(device *d, tensor *out, const tensor *h, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < h->shape[0]; i++) ((float *)out->data)[i] = get(h, i, i);
    return OK;
}

static err_code form_ref(device *d, tensor *out, const tensor *x, const tensor *h, tensor *work,
                         err *e)
{
    const int64_t k = x->shape[1];
    if (x->dt == DT_F32) {
        TRY(op_matmul(d, work, x, h, e));
        return op_row_dots(d, out, work, x, e);
    }
    for (int64_t i = 0; i < x->shape[0]; i++)
        for (int64_t j = 0; j < k; j++) {
            double sum = 0;
            for (int64_t t = 0; t < k; t++) sum += (double)get(x, i, t) * get(h, t, j);
            put(work, i, j, (float)sum);
        }
    return op_row_dots(d, out, work, x, e);
}

static err_code scaled_ref(device *d, tensor *y, const tensor *w, const tensor *col,
                           const tensor *row, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < w->shape[0]; i++)
        for (int64_t j = 0; j < w->shape[1]; j++)
            put(y, i, j, get(w, i, j) * entry(col, j) / entry(row, i));
    return OK;
}

static err_code relative_sum_ref(device *d, tensor *sum, const tensor *w, int32_t g, double eps,
                                 err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < w->shape[0]; i++)
        for (int64_t b = 0; b < w->shape[1]; b += g) {
            float most = 0.f;
            for (int64_t j = b; j < b + g; j++) most = fmaxf(most, fabsf(get(w, i, j)));
            const double div = eps > 0 ? most + eps : most > 0.f ? most : 1e-4;
            for (int64_t j = b; j < b + g; j++)
                ((double *)sum->data)[j] += fabsf(get(w, i, j)) / div;
        }
    return OK;
}

/* One row at a time through the ops of quant_group.h. */
enum { WIDEST = 1 << 17 };

static err_code try_factors_ref(device *d, tensor *y, const tensor *w, const tensor *s, int32_t g,
                                err *e)
{
    float row[WIDEST];
    f16 scale[WIDEST / 32];
    uint8_t zero[WIDEST / 32];
    const int64_t k = w->shape[1];
    if (k > WIDEST) return err_set(e, E_LIMIT, "op_try_factors: more than %d inputs", WIDEST);
    for (int64_t i = 0; i < w->shape[0]; i++) {
        tensor x = tensor_2d(row, DT_F32, 1, k), sc = tensor_2d(scale, DT_F16, 1, k / g),
               z = tensor_2d(zero, DT_U8, 1, k / g);
        for (int64_t j = 0; j < k; j++) row[j] = get(w, i, j) * entry(s, j);
        TRY(op_quant_range(d, &sc, &z, &x, NULL, g, e));
        TRY(op_quant_error(d, &x, &x, &sc, &z, s, g, e));
        for (int64_t j = 0; j < k; j++) put(y, i, j, row[j]);
    }
    return OK;
}

static float rounded_value(const rounded_spec *r, int64_t i, int64_t j, int64_t k)
{
    const float scale = get(r->scale, i, j / r->g),
                zero = ((const uint8_t *)r->zero->data)[i * r->zero->stride[0] + j / r->g];
    float code;
    if (r->codes)
        code = (float)(((const uint8_t *)r->codes->data)[(i * k + j) / 2] >> 4 * (j & 1) & 15);
    else
        code = fminf(fmaxf(nearbyintf(get(r->w, i, j) / scale) + zero, 0.f), 15.f);
    return (code - zero) * scale;
}

static err_code rounded_ref(device *d, tensor *y, const rounded_spec *r, err *e)
{
    const int64_t k = y->shape[1];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++)
        for (int64_t j = 0; j < k; j++)
            put(y, i, j, rounded_value(r, i, j, k) / entry(r->col, j) * entry(r->row, i));
    return OK;
}

/* ---- ranges ---- */

typedef struct {
    const range_spec *r;
    const float *w, *h; /* [g]; [g,g] with rows ld apart */
    int64_t ld, at;     /* first column */
    float lo, hi, most; /* of the weights; lo <= 0 <= hi */
    double least;
    f16 scale;
    uint8_t zero;
    float kept[2];
    bool any;
} group_range;

static const float *block_of(const range_spec *r, int64_t at, int64_t *ld)
{
    const int64_t s = r->h->shape[r->h->ndim - 1], in = at % s;
    *ld = s;
    return (const float *)r->h->data + (r->h->ndim == 2 ? 0 : at / s * s * s) +
           (r->h->ndim == 2 ? at * (s + 1) : in * (s + 1));
}

static err_code try_ends(device *d, group_range *q, float lo, float hi, float share_lo,
                         float share_hi, err *e)
{
    float pair[2] = {lo, hi}, err_row[128];
    f16 scale;
    uint8_t zero;
    const int32_t g = q->r->g;
    const tensor ends = tensor_2d(pair, DT_F32, 1, 2),
                 w = tensor_2d((float *)(uintptr_t)q->w, DT_F32, 1, g);
    tensor sc = tensor_2d(&scale, DT_F16, 1, 1), z = tensor_2d(&zero, DT_U8, 1, 1),
           x = tensor_2d(err_row, DT_F32, 1, g);
    double sum = 0;
    TRY(op_quant_range(d, &sc, &z, &ends, NULL, 2, e));
    TRY(op_quant_error(d, &x, &w, &sc, &z, NULL, g, e));
    for (int32_t i = 0; i < g; i++) err_row[i] /= entry(q->r->col, q->at + i);
    for (int32_t i = 0; i < g; i++) {
        double dot = 0;
        for (int32_t j = 0; j < g; j++) dot += (double)q->h[i * q->ld + j] * err_row[j];
        sum += dot * err_row[i];
    }
    if (q->any && sum >= q->least) return OK;
    *q = (group_range){q->r,  q->w,    q->h, q->ld, q->at, q->lo,
                       q->hi, q->most, sum,  scale, zero,  {share_lo, share_hi},
                       true};
    return OK;
}

static err_code search_group(device *d, group_range *q, err *e)
{
    const range_spec *r = q->r;
    for (int pass = 0; pass < (r->ends ? 3 : 1); pass++)
        for (int i = 0; i < r->points; i++) {
            const float part = (float)(1. - r->shrink * i / r->points);
            if (r->ends) {
                const float a = pass == 2 ? q->kept[0] : part, b = pass == 1 ? q->kept[1] : part;
                TRY(try_ends(d, q, q->lo * a, q->hi * b, a, b, e));
            } else {
                const float limit = q->most * part;
                TRY(try_ends(d, q, fmaxf(q->lo, -limit), fminf(q->hi, limit), part, part, e));
            }
        }
    return OK;
}

static err_code range_ref(device *d, tensor *scale, tensor *zero, const tensor *w,
                          const range_spec *r, err *e)
{
    const int64_t groups = w->shape[1] / r->g;
    for (int64_t i = 0; i < w->shape[0] * groups; i++) {
        const int64_t row = i / groups, at = i % groups * r->g;
        group_range q = {.r = r, .w = (const float *)w->data + row * w->stride[0] + at, .at = at};
        q.h = block_of(r, at, &q.ld);
        for (int32_t j = 0; j < r->g; j++) {
            q.lo = fminf(q.lo, q.w[j]);
            q.hi = fmaxf(q.hi, q.w[j]);
        }
        q.most = fmaxf(q.hi, -q.lo);
        if (!(q.most > 0.f)) q.most = 1.f;
        TRY(search_group(d, &q, e));
        ((f16 *)scale->data)[row * scale->stride[0] + i % groups] = q.scale;
        ((uint8_t *)zero->data)[row * zero->stride[0] + i % groups] = q.zero;
    }
    return OK;
}

const search_ops search_ops_ref = {
    .zero = zero_ref,
    .mix = mix_ref,
    .row_dots = row_dots_ref,
    .gram_blocks = gram_blocks_ref,
    .cross = cross_ref,
    .diagonal = diagonal_ref,
    .form = form_ref,
    .scaled = scaled_ref,
    .relative_sum = relative_sum_ref,
    .try_factors = try_factors_ref,
    .rounded = rounded_ref,
    .range = range_ref,
    .reorder = round_reorder_ref,
    .factor = round_factor_ref,
    .invert = round_invert_ref,
    .reverse = round_reverse_ref,
    .solve = round_solve_ref,
    .by_place = round_by_place_ref,
    .feedback = round_feedback_ref,
    .code_errors = round_code_errors_ref,
    .sweep = round_sweep_ref,
    .pack_codes = round_pack_codes_ref,
    .turn = search_turn_ref,
    .cache_errors = search_cache_errors_ref,
};
