/* Scans of weights for NaN, infinity and what f16 does not hold. Whole blocks are tested by adding
 * a constant that carries into the top bit; only a block that fails is looked at value by value. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "formats/family.h"
#include "formats/weights.h"

enum { CHECK_BLOCK = 4096 }; /* values */

typedef struct {
    int64_t bad; /* place of the first NaN or infinity in memory order, -1 none */
    float value;
    int64_t over; /* values that round to infinity in f16 */
    float largest;
} scan_result;

static float load_one(const void *p, dtype dt, int64_t i)
{
    if (dt == DT_F32) return ((const float *)p)[i];
    const uint16_t h = ((const uint16_t *)p)[i];
    return dt == DT_F16 ? f16_to_f32(h) : bf16_to_f32(h);
}

/* f16: exponent all ones. bf16 and f32: at or above the first magnitude that f16 rounds to
 * infinity, which NaN and infinity are too. */
static bool block_odd16(const uint16_t *p, uint16_t mask, uint16_t add)
{
    uint16_t acc = 0;
    for (int i = 0; i < CHECK_BLOCK; i++) acc |= (uint16_t)((p[i] & mask) + add);
    return acc >> 15;
}

static bool block_odd32(const uint32_t *p)
{
    uint32_t acc = 0;
    for (int i = 0; i < CHECK_BLOCK; i++) acc |= (p[i] & 0x7fffffffu) + (0x80000000u - 0x477ff000u);
    return acc >> 31;
}

static bool block_odd(const void *p, dtype dt, int64_t at)
{
    if (dt == DT_F32) return block_odd32((const uint32_t *)p + at);
    if (dt == DT_F16) return block_odd16((const uint16_t *)p + at, 0x7c00, 0x0400);
    return block_odd16((const uint16_t *)p + at, 0x7fff, 0x8000 - 0x4780);
}

static void scan_values(const void *p, dtype dt, int64_t from, int64_t to, scan_result *r)
{
    for (int64_t i = from; i < to; i++) {
        const float v = load_one(p, dt, i), a = fabsf(v);
        if (!isfinite(v)) {
            if (r->bad < 0) {
                r->bad = i;
                r->value = v;
            }
        } else if (a >= 65520.0f) {
            r->over++;
            if (a > r->largest) r->largest = a;
        }
    }
}

static void scan_run(const void *p, dtype dt, int64_t n, scan_result *r)
{
    int64_t at = 0;
    for (; at + CHECK_BLOCK <= n; at += CHECK_BLOCK)
        if (block_odd(p, dt, at)) scan_values(p, dt, at, at + CHECK_BLOCK, r);
    scan_values(p, dt, at, n, r);
}

/* A 1- or 2-d tensor as `lines` runs of `run` values, in whatever order they lie in memory. */
typedef struct {
    int64_t lines, run, step;
    bool columns;
} scan_order;

static scan_order order_of(const tensor *t)
{
    if (tensor_contiguous(t)) return (scan_order){1, tensor_count(t), 0, false};
    if (t->stride[1] == 1) return (scan_order){t->shape[0], t->shape[1], t->stride[0], false};
    if (t->stride[0] == 1) return (scan_order){t->shape[1], t->shape[0], t->stride[1], true};
    return (scan_order){0, 0, 0, false};
}

static err_code bad_value(const tensor *t, const char *name, const scan_order *o, int64_t line,
                          int64_t at, float value, err *e)
{
    const char *what = isnan(value) ? "nan" : value > 0 ? "infinity" : "-infinity";
    const int64_t cols = t->shape[t->ndim - 1];
    if (t->ndim == 1)
        return err_set(e, E_INPUT, "%s: element [%lld]: expected a finite number, got %s", name,
                       (long long)at, what);
    const int64_t row = o->lines == 1 ? at / cols : o->columns ? at : line;
    const int64_t col = o->lines == 1 ? at % cols : o->columns ? line : at;
    return err_set(e, E_INPUT, "%s: element [%lld,%lld]: expected a finite number, got %s", name,
                   (long long)row, (long long)col, what);
}

err_code weights_check_tensor(const tensor *t, const char *name, int64_t *overflows, float *largest,
                              err *e)
{
    scan_result r = {.bad = -1};
    const scan_order o = order_of(t);
    if ((t->dt != DT_F16 && t->dt != DT_BF16 && t->dt != DT_F32) || t->ndim < 1 || t->ndim > 2)
        return err_set(e, E_SHAPE, "%s: expected a vector or matrix of F16, BF16 or F32", name);
    if (o.lines == 0 && tensor_count(t))
        return err_set(e, E_SHAPE, "%s: expected values side by side", name);
    for (int64_t line = 0; line < o.lines && r.bad < 0; line++) {
        const uint8_t *p = (const uint8_t *)t->data + (size_t)(line * o.step) * dtype_bytes(t->dt);
        scan_run(p, t->dt, o.run, &r);
        if (r.bad >= 0) return bad_value(t, name, &o, line, r.bad, r.value, e);
    }
    if (overflows) *overflows = r.over;
    if (largest) *largest = r.largest;
    return OK;
}

/* ---- layers ---- */
typedef struct {
    weight_src *s;
    int32_t layer;
    weights_overflow_fn each;
    void *ud;
} layer_check;

static err_code check_one(const layer_check *c, tensor_role r, const char *suffix, const tensor *t,
                          err *e)
{
    char name[192], full[256];
    int64_t over = 0;
    float largest = 0;
    if (!t->data) return OK;
    TRY(family_tensor_name(weights_desc(c->s), r, c->layer, -1, name, sizeof name, e));
    (void)snprintf(full, sizeof full, "%s%s", name, suffix);
    if (weights_check_tensor(t, full, &over, &largest, e) != OK)
        return err_wrap(e, "%s", weights_path(c->s));
    if (over && c->each) c->each(c->ud, full, over, largest);
    return OK;
}

static err_code check_role(const layer_check *c, tensor_role r, err *e)
{
    tensor view;
    if (!weights_has(c->s, r, c->layer, -1)) return OK;
    TRY(weights_tensor(c->s, r, c->layer, &view, e));
    return check_one(c, r, ".weight", &view, e);
}

static err_code check_linear(const layer_check *c, tensor_role r, err *e)
{
    linear_view v;
    TRY(weights_linear(c->s, r, c->layer, -1, &v, e));
    TRY(check_one(c, r, ".bias", &v.bias, e));
    return v.w4 ? check_one(c, r, ".scales", &v.q.scales, e)
                : check_one(c, r, ".weight", &v.dense, e);
}

err_code weights_check_layer(weight_src *s, int32_t layer, weights_overflow_fn each, void *ud,
                             err *e)
{
    const model_desc *m = weights_desc(s);
    const layer_check c = {s, layer, each, ud};
    tensor_role linears[7];
    if (layer < 0) {
        TRY(check_role(&c, ROLE_EMBED, e));
        TRY(check_role(&c, ROLE_FINAL_NORM, e));
        return m->tied_embed ? OK : check_role(&c, ROLE_HEAD, e);
    }
    TRY(check_role(&c, ROLE_ATTN_NORM, e));
    TRY(check_role(&c, ROLE_FFN_NORM, e));
    if (m->qk_norm) {
        TRY(check_role(&c, ROLE_Q_NORM, e));
        TRY(check_role(&c, ROLE_K_NORM, e));
    }
    const int n = model_block_linears(m, linears);
    for (int i = 0; i < n; i++) TRY(check_linear(&c, linears[i], e));
    return OK;
}

static err_code check_layers(weight_src *s, weights_overflow_fn each, void *ud, const job *j,
                             err *e)
{
    const int32_t layers = weights_desc(s)->layers;
    for (int32_t layer = -1; layer < layers; layer++) {
        TRY(job_check(j, e));
        weights_prefetch(s, layer + 1);
        TRY(weights_check_layer(s, layer, each, ud, e));
        weights_release(s, layer);
        job_step(j, "checking weights", "layer", layer + 1, layers);
    }
    return OK;
}

err_code weights_check_finite(weight_src *s, const job *j, err *e)
{
    return check_layers(s, NULL, NULL, j, e);
}

err_code weights_check_f16(weight_src *s, weights_overflow_fn each, void *ud, err *e)
{
    return check_layers(s, each, ud, NULL, e);
}
