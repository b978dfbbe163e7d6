/* What solving and rounding in an order of the inputs mean. */
#include "kernels/round_ref.h"

#include <math.h>
#include <string.h>

#include "base/half.h"

#define SWEEP_WIDTH 128 /* inputs between two products with all of H */

static float *at2(const tensor *t, int64_t i, int64_t j)
{
    return (float *)t->data + i * t->stride[0] + j;
}

static int32_t int_at(const tensor *t, int64_t i) { return ((const int32_t *)t->data)[i]; }

err_code round_reorder_ref(device *d, tensor *y, const tensor *h, const tensor *order,
                           const tensor *col, float add, err *e)
{
    const int64_t k = h->shape[0];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < k; j++) {
            const int32_t a = int_at(order, i), b = int_at(order, j);
            const float *c = col ? col->data : NULL;
            *at2(y, i, j) = *at2(h, a, b) / (c ? c[a] * c[b] : 1.f) + (i == j ? add : 0.f);
        }
    return OK;
}

err_code round_factor_ref(device *d, tensor *a, tensor *failed, err *e)
{
    const int64_t k = a->shape[0];
    (void)d;
    (void)e;
    for (int64_t j = 0; j < k; j++)
        for (int64_t i = j; i < k; i++) {
            double sum = *at2(a, i, j);
            for (int64_t t = 0; t < j; t++) sum -= (double)*at2(a, i, t) * *at2(a, j, t);
            if (i == j && !(sum > 0)) *(int32_t *)failed->data = 1;
            *at2(a, i, j) = (float)(i == j ? sqrt(sum) : sum / *at2(a, j, j));
        }
    return OK;
}

err_code round_invert_ref(device *d, tensor *a, err *e)
{
    const int64_t k = a->shape[0];
    (void)d;
    (void)e;
    for (int64_t j = 0; j < k; j++) {
        *at2(a, j, j) = 1.f / *at2(a, j, j);
        for (int64_t i = j + 1; i < k; i++) {
            double sum = 0;
            for (int64_t t = j; t < i; t++) sum += (double)*at2(a, i, t) * *at2(a, t, j);
            *at2(a, i, j) = (float)(-sum / *at2(a, i, i));
        }
    }
    return OK;
}

err_code round_reverse_ref(device *d, tensor *a, err *e)
{
    float *p = a->data;
    (void)d;
    (void)e;
    for (int64_t i = 0, z = tensor_count(a) - 1; i < z; i++, z--) {
        const float t = p[i];
        p[i] = p[z];
        p[z] = t;
    }
    return OK;
}

err_code round_solve_ref(device *d, tensor *x, const tensor *l, err *e)
{
    const int64_t k = l->shape[0];
    (void)d;
    (void)e;
    for (int64_t r = 0; r < x->shape[0]; r++) {
        float *v = at2(x, r, 0);
        for (int64_t i = 0; i < k; i++) {
            double sum = v[i];
            for (int64_t t = 0; t < i; t++) sum -= (double)*at2(l, i, t) * v[t];
            v[i] = (float)(sum / *at2(l, i, i));
        }
        for (int64_t i = k - 1; i >= 0; i--) {
            double sum = v[i];
            for (int64_t t = i + 1; t < k; t++) sum -= (double)*at2(l, t, i) * v[t];
            v[i] = (float)(sum / *at2(l, i, i));
        }
    }
    return OK;
}

/* ---- rounding ---- */

static float scale_of(const round_state *s, int64_t r, int64_t input)
{
    return f16_to_f32(((const f16 *)s->scale.data)[r * s->scale.shape[1] + input / s->g]);
}

static float zero_of(const round_state *s, int64_t r, int64_t input)
{
    return ((const uint8_t *)s->zero.data)[r * s->zero.shape[1] + input / s->g];
}

static uint8_t *code_at(const round_state *s, int64_t r, int64_t j)
{
    return (uint8_t *)s->codes.data + r * s->codes.shape[1] + j;
}

static float nearest(float w, float scale, float zero)
{
    return fminf(fmaxf(nearbyintf(w / scale) + zero, 0.f), 15.f);
}

err_code round_by_place_ref(device *d, tensor *y, const tensor *w, const tensor *order, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < w->shape[0]; i++)
        for (int64_t j = 0; j < w->shape[1]; j++) *at2(y, i, j) = *at2(w, i, int_at(order, j));
    return OK;
}

err_code round_feedback_ref(device *d, round_state *s, tensor *w, const tensor *u,
                            const tensor *order, err *e)
{
    const int64_t k = w->shape[1];
    (void)d;
    (void)e;
    for (int64_t r = 0; r < w->shape[0]; r++)
        for (int64_t j = 0; j < k; j++) {
            const int32_t input = int_at(order, j);
            const float scale = scale_of(s, r, input), zero = zero_of(s, r, input),
                        code = nearest(*at2(w, r, j), scale, zero),
                        miss = (*at2(w, r, j) - (code - zero) * scale) / *at2(u, j, j);
            *code_at(s, r, input) = (uint8_t)code;
            for (int64_t q = j + 1; q < k; q++) *at2(w, r, q) -= miss * *at2(u, j, q);
        }
    return OK;
}

static float entry(const tensor *t, int64_t i) { return t ? ((const float *)t->data)[i] : 1.f; }

err_code round_code_errors_ref(device *d, tensor *y, const round_state *s, const tensor *w,
                               const tensor *col, err *e)
{
    (void)d;
    (void)e;
    for (int64_t r = 0; r < w->shape[0]; r++)
        for (int64_t j = 0; j < w->shape[1]; j++) {
            const float is = ((float)*code_at(s, r, j) - zero_of(s, r, j)) * scale_of(s, r, j);
            *at2(y, r, j) = (is - *at2(w, r, j)) / entry(col, j);
        }
    return OK;
}

/* ---- coordinate descent ---- */

/* One row at a block of inputs. */
typedef struct {
    round_state *s;
    const tensor *h, *col;
    int64_t row, at, width;
    float grad[SWEEP_WIDTH], moved[SWEEP_WIDTH];
} descent;

/* Of the scaled inputs. */
static float bend_of(const descent *c, int64_t i, int64_t j)
{
    return *at2(c->h, c->at + i, c->at + j) / (entry(c->col, c->at + i) * entry(c->col, c->at + j));
}

static void add_moved(descent *c, int64_t i, float move)
{
    c->moved[i] += move;
    for (int64_t j = 0; j < c->width; j++) c->grad[j] += move * bend_of(c, i, j);
}

static void move_codes(descent *c)
{
    for (int64_t i = 0; i < c->width; i++) {
        uint8_t *code = code_at(c->s, c->row, c->at + i);
        const float step = scale_of(c->s, c->row, c->at + i), bend = bend_of(c, i, i);
        if (!(bend > 0.f)) continue;
        const float was = (float)*code,
                    q = fminf(fmaxf(was + nearbyintf(-c->grad[i] / (bend * step)), 0.f), 15.f);
        if (q == was) continue;
        *code = (uint8_t)q;
        add_moved(c, i, (q - was) * step);
    }
}

/* The scale goes to where the loss, with all codes and other scales fixed, is least: along u, the
 * steps of its codes, that is scale - u.grad / u H u. */
static void refit_group(descent *c, int64_t from)
{
    round_state *s = c->s;
    f16 *scale = (f16 *)s->scale.data + c->row * s->scale.shape[1] + (c->at + from) / s->g;
    const float now = f16_to_f32(*scale), zero = zero_of(s, c->row, c->at + from);
    float u[SWEEP_WIDTH];
    double slope = 0, bend = 0;
    for (int64_t i = from; i < from + s->g; i++) {
        u[i] = *code_at(s, c->row, c->at + i) - zero;
        slope += (double)u[i] * c->grad[i];
    }
    for (int64_t i = from; i < from + s->g; i++)
        for (int64_t j = from; j < from + s->g; j++) bend += (double)u[i] * u[j] * bend_of(c, i, j);
    if (!(bend > 0)) return;
    const f16 half = f32_to_f16(now - (float)(slope / bend));
    const float next = f16_to_f32(half), move = next - now;
    if (!(next > 0.f && next <= 65504.f) || 2 * move * slope + (double)move * move * bend >= 0)
        return;
    *scale = half;
    for (int64_t i = from; i < from + s->g; i++) add_moved(c, i, move * u[i]);
}

static void sweep_block(descent *c, float *x, bool refit)
{
    const int64_t k = c->h->shape[0];
    for (int64_t i = 0; i < c->width; i++) {
        c->grad[i] = x[c->at + i] / entry(c->col, c->at + i);
        c->moved[i] = 0.f;
    }
    move_codes(c);
    for (int64_t g = 0; refit && g < c->width; g += c->s->g) refit_group(c, g);
    for (int64_t i = 0; i < c->width; i++)
        for (int64_t j = 0; j < k; j++)
            x[j] += c->moved[i] / entry(c->col, c->at + i) * *at2(c->h, c->at + i, j);
}

err_code round_sweep_ref(device *d, round_state *s, tensor *x, const tensor *h, const tensor *col,
                         bool refit, err *e)
{
    const int64_t k = x->shape[1];
    (void)d;
    (void)e;
    for (int64_t r = 0; r < x->shape[0]; r++)
        for (int64_t at = 0; at < k; at += SWEEP_WIDTH) {
            const int64_t left = k - at;
            descent c = {s, h, col, r, at, left < SWEEP_WIDTH ? left : SWEEP_WIDTH, {0}, {0}};
            sweep_block(&c, at2(x, r, 0), refit);
        }
    return OK;
}

err_code round_pack_codes_ref(device *d, tensor *out, const round_state *s, const tensor *w, err *e)
{
    const int64_t k = 2 * out->shape[1];
    uint8_t *to = out->data;
    (void)d;
    (void)e;
    memset(to, 0, (size_t)tensor_count(out));
    for (int64_t r = 0; r < out->shape[0]; r++)
        for (int64_t i = 0; i < k; i++) {
            const uint8_t code = w ? (uint8_t)nearest(*at2(w, r, i), scale_of(s, r, i),
                                                      zero_of(s, r, i))
                                   : *code_at(s, r, i);
            to[(r * k + i) / 2] |= (uint8_t)(code << 4 * (i & 1));
        }
    return OK;
}
