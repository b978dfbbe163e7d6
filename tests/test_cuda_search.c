/* The search's ops on a CUDA device against their references. Without a GPU they are skipped out
 * loud, and only what they refuse is checked. */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "kernels/search_ops.h"
#include "support/cuda_case.h"

static device *cpu;

static double normal(void) { return (uniform() + uniform() + uniform() - 1.5) * 2; }

/* The same values for both devices. */
typedef struct {
    tensor host, dev; /* dev: on the GPU */
    dev_buf buf;
} both;

static both make(dtype dt, int ndim, int64_t a, int64_t b, int64_t c)
{
    both t = {.host = tensor_of(NULL, dt, ndim, (const int64_t[]){a, b, c})};
    t.dev = on_gpu(&t.buf, t.host);
    t.host.data = must(tensor_bytes(&t.host), 1);
    return t;
}

static void put(tensor *t, int64_t i, double v)
{
    if (t->dt == DT_F16)
        ((f16 *)t->data)[i] = f32_to_f16((float)v);
    else if (t->dt == DT_BF16)
        ((bf16 *)t->data)[i] = f32_to_bf16((float)v);
    else if (t->dt == DT_F32)
        ((float *)t->data)[i] = (float)v;
    else if (t->dt == DT_F64)
        ((double *)t->data)[i] = v;
    else
        ((uint8_t *)t->data)[i] = (uint8_t)v;
}

static double get(const tensor *t, int64_t i)
{
    return t->dt == DT_F16    ? f16_to_f32(((f16 *)t->data)[i])
           : t->dt == DT_BF16 ? bf16_to_f32(((bf16 *)t->data)[i])
           : t->dt == DT_F32  ? ((float *)t->data)[i]
           : t->dt == DT_F64  ? ((double *)t->data)[i]
           : t->dt == DT_I32  ? ((int32_t *)t->data)[i]
                              : ((uint8_t *)t->data)[i];
}

static void send(both *t) { OK_(dev_copy(gpu, &t->dev, &t->host, e)); }

static both filled(dtype dt, int64_t m, int64_t k, double scale)
{
    both t = make(dt, 2, m, k, 0);
    for (int64_t i = 0; i < m * k; i++) put(&t.host, i, scale * normal() * (i % 37 ? 1 : 6));
    send(&t);
    return t;
}

static both positive(int64_t k)
{
    both t = make(DT_F32, 1, k, 0, 0);
    for (int64_t i = 0; i < k; i++) put(&t.host, i, exp(normal()));
    send(&t);
    return t;
}

static void drop(both *t)
{
    dev_free(&t->buf);
    mem_free(t->host.data);
}

/* What the GPU has; mem_free(data). */
static tensor fetched(const both *t)
{
    tensor back = t->host;
    back.data = must(tensor_bytes(&back), 1);
    OK_(dev_copy(gpu, &back, &t->dev, e));
    OK_(dev_sync(gpu, e));
    return back;
}

/* Largest and rms difference over the rms of the reference. */
static void same(both *t, double tol, const char *what)
{
    const tensor back = fetched(t);
    double d = 0, w = 0;
    for (int64_t i = 0; i < tensor_count(&back); i++) {
        const double a = get(&back, i), b = get(&t->host, i);
        d += (a - b) * (a - b);
        w += b * b;
    }
    ck_assert_msg(sqrt(d) <= tol * sqrt(w), "%s: relative error %.3g, at most %.3g", what,
                  sqrt(d / w), tol);
    mem_free(back.data);
}

START_TEST(rows)
{
    const int64_t m = 37, k = 300;
    both a = filled(DT_F16, m, k, 1), b = filled(DT_F32, m, k, 1), y = filled(DT_F16, m, k, 1),
         z = filled(DT_F32, m, k, 1), out = make(DT_F64, 1, m, 0, 0),
         diag = make(DT_F32, 1, m, 0, 0);
    OK_(op_mix(cpu, &y.host, 1.f, &b.host, -0.5f, &z.host, e));
    OK_(op_mix(gpu, &y.dev, 1.f, &b.dev, -0.5f, &z.dev, e));
    same(&y, 1e-6, "mix to f16");
    OK_(op_mix(cpu, &z.host, 1.f, &z.host, -1.f, &y.host, e));
    OK_(op_mix(gpu, &z.dev, 1.f, &z.dev, -1.f, &y.dev, e));
    same(&z, 1e-6, "mix in place");
    OK_(op_mix(cpu, &z.host, 2.f, &y.host, 0.f, NULL, e));
    OK_(op_mix(gpu, &z.dev, 2.f, &y.dev, 0.f, NULL, e));
    same(&z, 0, "mix of one");
    OK_(op_row_dots(cpu, &out.host, &b.host, &z.host, e));
    OK_(op_row_dots(gpu, &out.dev, &b.dev, &z.dev, e));
    same(&out, 1e-12, "row dots");
    both h = filled(DT_F32, m, m, 1);
    OK_(op_diagonal(cpu, &diag.host, &h.host, e));
    OK_(op_diagonal(gpu, &diag.dev, &h.dev, e));
    same(&diag, 0, "diagonal");
    OK_(op_zero(cpu, &h.host, e));
    OK_(op_zero(gpu, &h.dev, e));
    same(&h, 0, "zero");
    both *all[] = {&a, &b, &y, &z, &out, &diag, &h};
    for (int i = 0; i < 7; i++) drop(all[i]);
}
END_TEST

/* What the references read as f32 the device has as f16: both from the same values. */
static tensor widened(const both *t)
{
    tensor w = t->host;
    w.dt = DT_F32;
    w.data = must((size_t)tensor_count(&w), sizeof(float));
    tensor_convert(&w, &t->host);
    return w;
}

START_TEST(moments)
{
    const int64_t m = 150, k = 384, n = 200;
    both x = filled(DT_F16, m, k, 1), a = filled(DT_F16, m, n, 1), y = filled(DT_F32, n, k, 3),
         h = make(DT_F32, 3, k / 128, 128, 128), full = filled(DT_F32, k, k, 0);
    tensor wx = widened(&x), wa = widened(&a);
    send(&h);
    for (int i = 0; i < 2; i++) {
        OK_(op_gram_blocks(cpu, &h.host, &wx, e));
        OK_(op_gram_blocks(gpu, &h.dev, &x.dev, e));
        OK_(op_gram(cpu, &full.host, &wx, e));
        OK_(op_gram(gpu, &full.dev, &x.dev, e));
    }
    OK_(op_gram_finish(cpu, &full.host, e));
    OK_(op_gram_finish(gpu, &full.dev, e));
    same(&h, 1e-6, "gram_blocks");
    same(&full, 1e-6, "gram");
    OK_(op_cross(cpu, &y.host, &wa, &wx, e));
    OK_(op_cross(gpu, &y.dev, &a.dev, &x.dev, e));
    same(&y, 1e-6, "cross");
    both v = filled(DT_F32, n, k, 0.01), work = filled(DT_F32, n, k, 0),
         out = make(DT_F64, 1, n, 0, 0);
    OK_(op_form(cpu, &out.host, &v.host, &full.host, &work.host, e));
    OK_(op_form(gpu, &out.dev, &v.dev, &full.dev, &work.dev, e));
    same(&out, 3e-3, "form");
    both hv = filled(DT_BF16, n, k, 0), hh = filled(DT_BF16, k, k, 0);
    OK_(op_mix(cpu, &hv.host, 1.f, &v.host, 0.f, NULL, e));
    OK_(op_mix(gpu, &hv.dev, 1.f, &v.dev, 0.f, NULL, e));
    same(&hv, 0, "mix to bf16");
    OK_(op_mix(cpu, &hh.host, 1.f, &full.host, 0.f, NULL, e));
    OK_(dev_copy(gpu, &hh.dev, &hh.host, e));
    OK_(op_form(cpu, &out.host, &hv.host, &hh.host, &work.host, e));
    OK_(op_form(gpu, &out.dev, &hv.dev, &hh.dev, &work.dev, e));
    same(&out, 1e-5, "form in bf16");
    drop(&hv);
    drop(&hh);
    mem_free(wx.data);
    mem_free(wa.data);
    both *all[] = {&x, &a, &y, &h, &full, &v, &work, &out};
    for (int i = 0; i < 8; i++) drop(all[i]);
}
END_TEST

static const int32_t group_sizes[] = {32, 64, 128};

/* Largest share of entries that may differ where a value lies on the border of two codes. */
static void same_but(both *t, double share, const char *what)
{
    const tensor back = fetched(t);
    int64_t off = 0;
    for (int64_t i = 0; i < tensor_count(&back); i++)
        off += fabs(get(&back, i) - get(&t->host, i)) > 1e-6 * fabs(get(&t->host, i));
    ck_assert_msg((double)off <= share * (double)tensor_count(&back), "%s: %lld of %lld differ",
                  what, (long long)off, (long long)tensor_count(&back));
    mem_free(back.data);
}

START_TEST(weights)
{
    const int32_t g = group_sizes[_i];
    const int64_t n = 67, k = 5 * 128;
    both w = filled(DT_F16, n, k, 0.05), col = positive(k), row = positive(n),
         y = filled(DT_F32, n, k, 0), sum = make(DT_F64, 1, k, 0, 0),
         scale = make(DT_F16, 2, n, k / g, 0), zero = make(DT_U8, 2, n, k / g, 0),
         codes = make(DT_U8, 2, n, k / 2, 0), half = filled(DT_F16, n, k, 0);
    send(&sum);
    OK_(op_scaled(cpu, &y.host, &w.host, &col.host, &row.host, e));
    OK_(op_scaled(gpu, &y.dev, &w.dev, &col.dev, &row.dev, e));
    same(&y, 0, "scaled");
    for (int i = 0; i < 2; i++) {
        OK_(op_relative_sum(cpu, &sum.host, &w.host, g, 1e-6, e));
        OK_(op_relative_sum(gpu, &sum.dev, &w.dev, g, 1e-6, e));
    }
    same(&sum, 1e-12, "relative sum");
    both err_ = filled(DT_F32, n, k, 0);
    OK_(op_try_factors(cpu, &err_.host, &w.host, &col.host, g, e));
    OK_(op_try_factors(gpu, &err_.dev, &w.dev, &col.dev, g, e));
    same_but(&err_, 0, "try factors");
    for (int64_t i = 0; i < n * k / g; i++) {
        put(&scale.host, i, 0.004 * (1 + uniform()));
        put(&zero.host, i, (double)(int)(uniform() * 16));
    }
    for (int64_t i = 0; i < n * k / 2; i++) put(&codes.host, i, (double)(int)(uniform() * 256));
    send(&scale);
    send(&zero);
    send(&codes);
    for (int i = 0; i < 2; i++) {
        const rounded_spec a = {i ? NULL : &y.host,
                                i ? &codes.host : NULL,
                                &scale.host,
                                &zero.host,
                                &col.host,
                                &row.host,
                                g},
                           b = {i ? NULL : &y.dev,
                                i ? &codes.dev : NULL,
                                &scale.dev,
                                &zero.dev,
                                &col.dev,
                                &row.dev,
                                g};
        OK_(op_rounded(cpu, &err_.host, &a, e));
        OK_(op_rounded(gpu, &err_.dev, &b, e));
        same_but(&err_, 0, "rounded");
        OK_(op_rounded(cpu, &half.host, &a, e));
        OK_(op_rounded(gpu, &half.dev, &b, e));
        same_but(&half, 0, "rounded to f16");
    }
    both *all[] = {&w, &col, &row, &y, &sum, &scale, &zero, &codes, &half, &err_};
    for (int i = 0; i < 10; i++) drop(all[i]);
}
END_TEST

START_TEST(ranges)
{
    const int32_t g = group_sizes[_i / 4];
    const int64_t n = 131, k = 3 * 128, m = 300;
    both w = filled(DT_F32, n, k, 0.05), col = positive(k), x = filled(DT_F16, m, k, 1),
         scale = make(DT_F16, 2, n, k / g, 0), zero = make(DT_U8, 2, n, k / g, 0),
         h = _i & 1 ? filled(DT_F32, k, k, 0) : make(DT_F32, 3, k / 128, 128, 128);
    tensor wx = widened(&x);
    if (_i & 1) {
        OK_(op_gram(cpu, &h.host, &wx, e));
        OK_(op_gram_finish(cpu, &h.host, e));
    } else {
        OK_(op_gram_blocks(cpu, &h.host, &wx, e));
    }
    send(&h);
    for (int ends = 0; ends < 2; ends++) {
        const range_spec a = {&h.host, _i & 2 ? &col.host : NULL, g, 10 - 2 * ends, 0.5, ends},
                         b = {&h.dev, _i & 2 ? &col.dev : NULL, g, 10 - 2 * ends, 0.5, ends};
        OK_(op_range(cpu, &scale.host, &zero.host, &w.host, &a, e));
        OK_(op_range(gpu, &scale.dev, &zero.dev, &w.dev, &b, e));
        same_but(&scale, 0.01, "range: scale"); /* candidates may be equal to a rounding */
        same_but(&zero, 0.01, "range: zero");
        const range_spec plain_a = {&h.host, NULL, g, 1, 0, false},
                         plain_b = {&h.dev, NULL, g, 1, 0, false};
        OK_(op_range(cpu, &scale.host, &zero.host, &w.host, &plain_a, e));
        OK_(op_range(gpu, &scale.dev, &zero.dev, &w.dev, &plain_b, e));
        same_but(&scale, 0, "plain: scale");
        same_but(&zero, 0, "plain: zero");
    }
    mem_free(wx.data);
    both *all[] = {&w, &col, &x, &scale, &zero, &h};
    for (int i = 0; i < 6; i++) drop(all[i]);
}
END_TEST

/* ---- solving ---- */

/* Fisher and Yates. */
static both permutation(int64_t k)
{
    both t = make(DT_I32, 1, k, 0, 0);
    int32_t *p = t.host.data;
    for (int64_t i = 0; i < k; i++) p[i] = (int32_t)i;
    for (int64_t i = k - 1; i > 0; i--) {
        const int64_t j = (int64_t)(uniform() * (double)(i + 1));
        const int32_t v = p[i];
        p[i] = p[j];
        p[j] = v;
    }
    send(&t);
    return t;
}

/* x^T x of correlated inputs. */
static both gram_of(int64_t k)
{
    const int64_t m = 2 * k;
    both h = filled(DT_F32, k, k, 0), x = filled(DT_F32, m, k, 1);
    float *v = x.host.data;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 1; j < k; j++)
            v[i * k + j] = 0.6f * v[i * k + j - 1] + 0.8f * v[i * k + j];
    OK_(op_gram(cpu, &h.host, &x.host, e));
    OK_(op_gram_finish(cpu, &h.host, e));
    send(&h);
    drop(&x);
    return h;
}

/* What lies above the diagonal is lost: 0 on both sides. */
static void lower_only(both *t)
{
    const int64_t k = t->host.shape[0];
    const tensor back = fetched(t);
    float *v = t->host.data, *got = back.data;
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = i + 1; j < k; j++) v[i * k + j] = got[i * k + j] = 0.f;
    OK_(dev_copy(gpu, &t->dev, &back, e));
    OK_(dev_sync(gpu, e));
    mem_free(back.data);
}

START_TEST(solving)
{
    static const int64_t sizes[] = {32, 100, 128, 160, 384, 650};
    const int64_t k = sizes[_i], n = 45;
    both h = gram_of(k), a = filled(DT_F32, k, k, 0), order = permutation(k), col = positive(k),
         x = filled(DT_F32, n, k, 1), failed = make(DT_I32, 1, 1, 0, 0);
    send(&failed);
    OK_(op_reorder(cpu, &a.host, &h.host, &order.host, &col.host, 2.f, e));
    OK_(op_reorder(gpu, &a.dev, &h.dev, &order.dev, &col.dev, 2.f, e));
    same(&a, 1e-6, "reorder");
    OK_(op_factor(cpu, &a.host, &failed.host, e));
    OK_(op_factor(gpu, &a.dev, &failed.dev, e));
    lower_only(&a);
    same(&a, 1e-5, "factor");
    same(&failed, 0, "failed");
    OK_(op_solve(cpu, &x.host, &a.host, e));
    OK_(op_solve(gpu, &x.dev, &a.dev, e));
    same(&x, 1e-3, "solve");
    OK_(op_invert(cpu, &a.host, e));
    OK_(op_invert(gpu, &a.dev, e));
    lower_only(&a);
    same(&a, 1e-3, "invert");
    OK_(op_reverse(cpu, &a.host, e));
    OK_(op_reverse(gpu, &a.dev, e));
    same(&a, 1e-3, "reverse");
    OK_(op_reorder(cpu, &a.host, &h.host, &order.host, NULL, -1e6f, e)); /* not positive */
    OK_(op_reorder(gpu, &a.dev, &h.dev, &order.dev, NULL, -1e6f, e));
    OK_(op_factor(cpu, &a.host, &failed.host, e));
    OK_(op_factor(gpu, &a.dev, &failed.dev, e));
    ck_assert_int_eq(*(int32_t *)failed.host.data, 1);
    same(&failed, 0, "failed");
    both *all[] = {&h, &a, &order, &col, &x, &failed};
    for (int i = 0; i < 6; i++) drop(all[i]);
}
END_TEST

/* ---- rounding ---- */

static double total(const tensor *v)
{
    double sum = 0;
    for (int64_t i = 0; i < v->shape[0]; i++) sum += ((const double *)v->data)[i];
    return sum;
}

typedef struct {
    both w, h, u, order, col, codes, scale, zero, work, sums, err_, form;
    int64_t n, k;
    int32_t g;
} round_case;

static round_state state_of(const round_case *c, bool dev)
{
    return dev ? (round_state){c->codes.dev, c->scale.dev, c->zero.dev, c->work.dev, c->g}
               : (round_state){c->codes.host, c->scale.host, c->zero.host, c->work.host, c->g};
}

/* The loss of what the device holds, by the reference; or of the reference's own. */
static double loss_of(round_case *c, bool dev)
{
    const round_state s = state_of(c, false);
    if (dev) {
        OK_(dev_copy(gpu, &c->codes.host, &c->codes.dev, e));
        OK_(dev_copy(gpu, &c->scale.host, &c->scale.dev, e));
        OK_(dev_sync(gpu, e));
    }
    OK_(op_code_errors(cpu, &c->err_.host, &s, &c->w.host, &c->col.host, e));
    OK_(op_form(cpu, &c->sums.host, &c->err_.host, &c->h.host, &c->form.host, e));
    return total(&c->sums.host);
}

static round_case make_round(int32_t g)
{
    round_case c = {.n = 70, .k = 5 * 128 - (g < 128 ? 64 : 0), .g = g};
    const int64_t n = c.n, k = c.k;
    c.w = filled(DT_F32, n, k, 0.05);
    c.h = gram_of(k);
    c.u = filled(DT_F32, k, k, 0);
    c.order = permutation(k);
    c.col = positive(k);
    c.codes = make(DT_U8, 2, n, k, 0);
    c.scale = make(DT_F16, 2, n, k / g, 0);
    c.zero = make(DT_U8, 2, n, k / g, 0);
    c.work = filled(DT_F32, n, 128, 0);
    c.sums = make(DT_F64, 1, n, 0, 0);
    c.err_ = filled(DT_F32, n, k, 0);
    c.form = filled(DT_F32, n, k, 0);
    send(&c.codes);
    both failed = make(DT_I32, 1, 1, 0, 0), back = make(DT_I32, 1, k, 0, 0);
    for (int64_t i = 0; i < k; i++)
        ((int32_t *)back.host.data)[i] = ((int32_t *)c.order.host.data)[k - 1 - i];
    OK_(op_reorder(cpu, &c.u.host, &c.h.host, &back.host, &c.col.host, 1.f, e));
    OK_(op_factor(cpu, &c.u.host, &failed.host, e));
    OK_(op_invert(cpu, &c.u.host, e));
    OK_(op_reverse(cpu, &c.u.host, e));
    send(&c.u);
    const range_spec plain = {&c.h.host, NULL, g, 1, 0, false};
    OK_(op_range(cpu, &c.scale.host, &c.zero.host, &c.w.host, &plain, e));
    send(&c.scale);
    send(&c.zero);
    drop(&failed);
    drop(&back);
    return c;
}

static void drop_round(round_case *c)
{
    both *all[] = {&c->w,     &c->h,    &c->u,    &c->order, &c->col,  &c->codes,
                   &c->scale, &c->zero, &c->work, &c->sums,  &c->err_, &c->form};
    for (int i = 0; i < 12; i++) drop(all[i]);
}

/* One code that falls the other way changes all behind it: losses are compared, not codes. */
static void same_loss(round_case *c, const char *what)
{
    const double host = loss_of(c, false);
    tensor codes = c->codes.host, scale = c->scale.host;
    void *a = must(tensor_bytes(&codes), 1), *b = must(tensor_bytes(&scale), 1);
    memcpy(a, codes.data, tensor_bytes(&codes));
    memcpy(b, scale.data, tensor_bytes(&scale));
    const double dev = loss_of(c, true);
    ck_assert_msg(fabs(dev - host) <= 0.01 * host, "%s: loss %.6g, expected %.6g", what, dev, host);
    memcpy(codes.data, a, tensor_bytes(&codes)); /* both go on from the reference's */
    memcpy(scale.data, b, tensor_bytes(&scale));
    send(&c->codes);
    send(&c->scale);
    OK_(dev_sync(gpu, e));
    mem_free(a);
    mem_free(b);
}

START_TEST(rounding)
{
    round_case c = make_round(group_sizes[_i]);
    round_state a = state_of(&c, false), b = state_of(&c, true);
    both x = filled(DT_F32, c.n, c.k, 0), packed = make(DT_U8, 2, c.n, c.k / 2, 0);
    OK_(op_pack_codes(cpu, &packed.host, &a, &c.w.host, e));
    OK_(op_pack_codes(gpu, &packed.dev, &b, &c.w.dev, e));
    same(&packed, 0, "pack rounded codes");
    OK_(op_by_place(cpu, &x.host, &c.w.host, &c.order.host, e));
    OK_(op_by_place(gpu, &x.dev, &c.w.dev, &c.order.dev, e));
    same(&x, 0, "by place");
    OK_(op_feedback(cpu, &a, &x.host, &c.u.host, &c.order.host, e));
    OK_(op_feedback(gpu, &b, &x.dev, &c.u.dev, &c.order.dev, e));
    same_loss(&c, "feedback");
    const double fed = loss_of(&c, false);
    for (int i = 0; i < 3; i++) {
        OK_(op_code_errors(cpu, &c.err_.host, &a, &c.w.host, &c.col.host, e));
        OK_(op_code_errors(gpu, &c.err_.dev, &b, &c.w.dev, &c.col.dev, e));
        same(&c.err_, 1e-6, "code errors");
        OK_(op_matmul(cpu, &x.host, &c.err_.host, &c.h.host, e));
        send(&x);
        OK_(op_sweep(cpu, &a, &x.host, &c.h.host, &c.col.host, i < 2, e));
        OK_(op_sweep(gpu, &b, &x.dev, &c.h.dev, &c.col.dev, i < 2, e));
        same_loss(&c, "sweep");
    }
    ck_assert_msg(loss_of(&c, false) < 0.98 * fed, "sweeps: %g -> %g", fed, loss_of(&c, false));
    OK_(op_pack_codes(cpu, &packed.host, &a, NULL, e));
    OK_(op_pack_codes(gpu, &packed.dev, &b, NULL, e));
    same(&packed, 0, "pack codes");
    drop(&x);
    drop(&packed);
    drop_round(&c);
}
END_TEST

START_TEST(refusals)
{
    float v[64] = {0};
    tensor x = tensor_2d(v, DT_F32, 2, 16), y = tensor_2d(v, DT_F32, 2, 8),
           s = tensor_1d(v, DT_F32, 16);
    err e;
    ck_assert_int_eq(op_mix(cpu, &y, 1.f, &x, 0.f, NULL, &e), E_SHAPE);
    ck_assert_int_eq(op_try_factors(cpu, &x, &x, &s, 16, &e), E_SHAPE); /* no such group */
    ck_assert_int_eq(op_cross(cpu, &x, &x, &y, &e), E_SHAPE);
}
END_TEST

/* Heads side by side among others, as q, k and v lie. */
START_TEST(folds)
{
    const int64_t m = 70, hd = _i ? 80 : 128, heads = 3, cols = 5 * hd, half = hd / 2 - 8 * _i,
                  c = 4;
    both x = filled(DT_F16, m, cols, 1), freq = positive(half), pos = make(DT_I32, 1, m, 0, 0),
         s = filled(DT_F32, c, hd, 0), y = filled(DT_F32, c * m, hd, 0);
    tensor wide = widened(&x), a = tensor_cols(&wide, hd, heads * hd),
           b = tensor_cols(&x.dev, hd, heads * hd);
    for (int64_t i = 0; i < m; i++) ((int32_t *)pos.host.data)[i] = (int32_t)(uniform() * 4000);
    for (int64_t i = 0; i < c * hd; i++) put(&s.host, i, i < hd ? 1 : exp(normal()));
    send(&pos);
    send(&s);
    const rope_spec ra = {freq.host, (int32_t)(2 * half), _i, 1.1f},
                    rb = {freq.dev, (int32_t)(2 * half), _i, 1.1f};
    a.ndim = b.ndim = 3;
    a.shape[1] = b.shape[1] = heads;
    a.shape[2] = a.stride[1] = b.shape[2] = b.stride[1] = hd;
    a.stride[2] = b.stride[2] = 1;
    OK_(op_turn(cpu, &a, &pos.host, &ra, e));
    OK_(op_turn(gpu, &b, &pos.dev, &rb, e));
    tensor_convert(&x.host, &wide); /* rounded to f16 once, as there */
    same_but(&x, 1e-4, "turn");     /* sines differ in their last bits */
    send(&x);
    tensor_convert(&wide, &x.host);
    const tensor h = tensor_cols(&wide, 2 * hd, hd), g = tensor_cols(&x.dev, 2 * hd, hd);
    OK_(op_cache_errors(cpu, &y.host, &h, &s.host, e));
    OK_(op_cache_errors(gpu, &y.dev, &g, &s.dev, e));
    same_but(&y, 0, "cache errors");
    mem_free(wide.data);
    both *all[] = {&x, &freq, &pos, &s, &y};
    for (int i = 0; i < 5; i++) drop(all[i]);
}
END_TEST

int main(void)
{
    err e;
    Suite *s = suite_create("cuda_search");
    TCase *t = cuda_case(s, "ops", 60);
    if (dev_open(&cpu, &(dev_opts){.kind = DEV_CPU, .threads = 2, .isa = "ref"}, &e) != OK) {
        printf("%s\n", e.msg);
        return 1;
    }
    tcase_add_test(t, refusals);
    if (dev_open(&gpu, &(dev_opts){.kind = DEV_CUDA}, &e) == OK) {
        tcase_add_test(t, rows);
        tcase_add_test(t, moments);
        tcase_add_loop_test(t, weights, 0, 3);
        tcase_add_loop_test(t, ranges, 0, 12);
        tcase_add_loop_test(t, solving, 0, 6);
        tcase_add_loop_test(t, rounding, 0, 3);
        tcase_add_loop_test(t, folds, 0, 2);
    } else {
        printf("SKIP all but refusals: %s\n", e.msg);
    }
    const int rc = cuda_run(s);
    dev_close(&cpu);
    return rc;
}
