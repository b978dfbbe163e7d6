#include "support/tiny_weights.h"

#include <assert.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "formats/weights_mem.h"

model_desc tiny_desc(void)
{
    model_desc m = {.family = "llama",
                    .architecture = "LlamaForCausalLM",
                    .dt = DT_F32,
                    .layers = 2,
                    .hidden = 64,
                    .heads = 4,
                    .kv_heads = 2,
                    .head_dim = 16,
                    .ffn = 96,
                    .vocab = 50,
                    .max_tokens = 256,
                    .norm_eps = 1e-5f,
                    .rope_theta = 10000,
                    .rope_dims = 16,
                    .qkv = QKV_SPLIT,
                    .bos = 1,
                    .eos = 2,
                    .stop = {2},
                    .n_stop = 1};
    return m;
}

err_code tiny_open(weight_src **out, const tiny_opts *o, err *e)
{
    weights_mem *w = NULL;
    err_code rc;
    *out = NULL;
    if ((rc = weights_mem_open(&w, &o->desc, e)) != OK) goto done;
    if ((rc = weights_mem_random(w, o->seed, o->deviation > 0 ? o->deviation : 0.15f, e)) != OK)
        goto done;
    if (o->w4_group && (rc = weights_mem_quantize(w, o->w4_group, e)) != OK) goto done;
    rc = weights_mem_source(out, &w, e);
done:
    weights_mem_close(&w);
    return rc;
}

/* ---- dense linears stored inputs first ---- */

#define TURNED_MAX 64
typedef struct {
    weight_src *base;
    tensor_role role[TURNED_MAX];
    int32_t layer[TURNED_MAX];
    linear_view view[TURNED_MAX];
    int n;
} turned;

static void turned_close(void *self)
{
    turned *t = self;
    for (int i = 0; i < t->n; i++) mem_free(t->view[i].dense.data);
    weights_close(&t->base);
    mem_free(t);
}

static err_code turned_tensor(void *self, tensor_role r, int32_t layer, tensor *view, err *e)
{
    return weights_tensor(((turned *)self)->base, r, layer, view, e);
}

static err_code turned_linear(void *self, tensor_role r, int32_t layer, int32_t expert,
                              linear_view *view, err *e)
{
    turned *t = self;
    void *p;
    for (int i = 0; i < t->n; i++) {
        if (t->role[i] == r && t->layer[i] == layer) {
            *view = t->view[i];
            return OK;
        }
    }
    assert(t->n < TURNED_MAX);
    TRY(weights_linear(t->base, r, layer, expert, view, e));
    const tensor src = view->dense;
    TRY(mem_alloc(&p, (size_t)tensor_count(&src), dtype_bytes(src.dt), "turned", e));
    view->dense.data = p;
    view->dense.stride[0] = 1;
    view->dense.stride[1] = src.shape[0];
    (void)tensor_convert(&view->dense, &src);
    t->role[t->n] = r;
    t->layer[t->n] = layer;
    t->view[t->n++] = *view;
    return OK;
}

static bool turned_has(void *self, tensor_role r, int32_t layer, int32_t expert)
{
    return weights_has(((turned *)self)->base, r, layer, expert);
}

static void turned_advise(void *self, int32_t layer, bool need)
{
    (void)self;
    (void)layer;
    (void)need;
}

err_code tiny_turned(weight_src **out, weight_src **base, err *e)
{
    static const weight_ops ops = {turned_close, turned_tensor, turned_linear, turned_has,
                                   turned_advise};
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(turned), "turned", e));
    turned *t = p;
    t->base = *base;
    const err_code rc = weights_make(out, SRC_MEM, weights_desc(*base), "turned", "", "", &ops, t,
                                     e);
    if (rc == OK)
        *base = NULL;
    else
        mem_free(t);
    return rc;
}

/* ---- the plain forward pass ---- */

typedef struct {
    weight_src *src;
    const model_desc *m;
    const int32_t *ids;
    int32_t n;
    tiny_tap tap;
    void *ctx;
} plain;

static double *grid(int64_t rows, int64_t cols)
{
    double *p = calloc((size_t)(rows * cols), sizeof *p);
    if (!p) abort();
    return p;
}

static void read_vector(double *out, const tensor *t)
{
    float *tmp = malloc((size_t)t->shape[0] * sizeof *tmp);
    if (!tmp) abort();
    tensor f = tensor_1d(tmp, DT_F32, t->shape[0]);
    (void)tensor_convert(&f, t);
    for (int64_t i = 0; i < t->shape[0]; i++) out[i] = (double)tmp[i];
    free(tmp);
}

static float *read_matrix(const tensor *t)
{
    float *tmp = malloc((size_t)tensor_count(t) * sizeof *tmp);
    if (!tmp) abort();
    tensor f = tensor_2d(tmp, DT_F32, t->shape[0], t->shape[1]);
    (void)tensor_convert(&f, t);
    return tmp;
}

static float *linear_rows(const linear_view *v, int64_t n, int64_t k)
{
    if (!v->w4) return read_matrix(&v->dense);
    float *w = malloc((size_t)(n * k) * sizeof *w);
    if (!w) abort();
    for (int64_t i = 0; i < n; i++) w4_dequant_row(w + i * k, &v->q, i);
    return w;
}

static void plain_linear(const plain *p, double *y, const double *x, tensor_role r, int32_t layer,
                         int64_t step, int64_t at)
{
    linear_view v;
    err e;
    const int64_t n = model_linear_n(p->m, r), k = model_linear_k(p->m, r);
    if (weights_linear(p->src, r, layer, -1, &v, &e) != OK) abort();
    float *w = linear_rows(&v, n, k);
    double *bias = grid(1, n);
    if (v.bias.data) read_vector(bias, &v.bias);
    for (int32_t i = 0; i < p->n; i++) {
        for (int64_t o = 0; o < n; o++) {
            double s = bias[o];
            for (int64_t c = 0; c < k; c++) s += x[i * k + c] * (double)w[o * k + c];
            y[i * step + at + o] = s;
        }
    }
    free(w);
    free(bias);
}

static void plain_norm(const plain *p, double *y, const double *x, int64_t k, tensor_role r,
                       int32_t layer)
{
    tensor t;
    err e;
    double *w = grid(1, k);
    if (weights_tensor(p->src, r, layer, &t, &e) != OK) abort();
    read_vector(w, &t);
    for (int32_t i = 0; i < p->n; i++) {
        double s = 0;
        for (int64_t c = 0; c < k; c++) s += x[i * k + c] * x[i * k + c];
        s = 1 / sqrt(s / (double)k + (double)p->m->norm_eps);
        for (int64_t c = 0; c < k; c++) y[i * k + c] = x[i * k + c] * s * w[c];
    }
    free(w);
}

static double via_f16(double x) { return (double)f16_to_f32(f32_to_f16((float)x)); }

/* Column of head h of kind 0 q, 1 k, 2 v in the joined rows. */
static int64_t head_at(const model_desc *m, int kind, int32_t h)
{
    const int64_t share = m->heads / m->kv_heads, d = m->head_dim;
    if (m->qkv == QKV_GROUPED) {
        if (kind == 0) return (h / share * (share + 2) + h % share) * d;
        return (h * (share + 2) + share + kind - 1) * d;
    }
    if (kind == 0) return h * d;
    return (m->heads + (kind - 1) * m->kv_heads + h) * d;
}

static void plain_head_norm(const plain *p, double *x, tensor_role r, int32_t layer)
{
    tensor t;
    err e;
    const int32_t d = p->m->head_dim;
    double s = 0, *w = grid(1, d);
    if (weights_tensor(p->src, r, layer, &t, &e) != OK) abort();
    read_vector(w, &t);
    for (int32_t c = 0; c < d; c++) s += x[c] * x[c];
    s = 1 / sqrt(s / d + (double)p->m->norm_eps);
    for (int32_t c = 0; c < d; c++) x[c] *= s * w[c];
    free(w);
}

static void plain_rotate(const plain *p, double *x, int32_t pos)
{
    const int32_t r = p->m->rope_dims, half = r / 2;
    double base = (double)p->m->rope_theta;
    const double factor = (double)p->m->scaling.factor;
    if (p->m->scaling.kind == ROPE_DYNAMIC && p->n > p->m->max_tokens)
        base *= pow(factor * p->n / p->m->max_tokens - (factor - 1), (double)r / (r - 2));
    for (int32_t j = 0; j < half; j++) {
        const double a = pos * pow(base, -2.0 * j / r);
        double *u = x + (p->m->rope_interleaved ? 2 * j : j);
        double *v = x + (p->m->rope_interleaved ? 2 * j + 1 : j + half);
        const double c = *u * cos(a) - *v * sin(a);
        *v = *v * cos(a) + *u * sin(a);
        *u = c;
    }
}

static void plain_heads(const plain *p, double *qkv, int64_t width, int32_t layer)
{
    const model_desc *m = p->m;
    for (int32_t i = 0; i < p->n; i++) {
        double *row = qkv + i * width;
        for (int32_t h = 0; h < m->heads; h++) {
            if (m->qk_norm) plain_head_norm(p, row + head_at(m, 0, h), ROLE_Q_NORM, layer);
            plain_rotate(p, row + head_at(m, 0, h), i);
        }
        for (int32_t h = 0; h < m->kv_heads; h++) {
            double *k = row + head_at(m, 1, h), *v = row + head_at(m, 2, h);
            if (m->qk_norm) plain_head_norm(p, k, ROLE_K_NORM, layer);
            plain_rotate(p, k, i);
            for (int32_t c = 0; c < m->head_dim; c++) k[c] = via_f16(k[c]), v[c] = via_f16(v[c]);
        }
    }
}

static void plain_attn(const plain *p, double *y, const double *qkv, int64_t width, int32_t layer)
{
    const model_desc *m = p->m;
    const int32_t share = m->heads / m->kv_heads, d = m->head_dim, window = model_window(m, layer);
    double *w = grid(1, p->n);
    memset(y, 0, (size_t)p->n * (size_t)(m->heads * d) * sizeof *y);
    for (int32_t i = 0; i < p->n; i++) {
        for (int32_t h = 0; h < m->heads; h++) {
            const double *q = qkv + i * width + head_at(m, 0, h);
            double *out = y + ((int64_t)i * m->heads + h) * d, sum = 0;
            const int32_t from = window && i - window + 1 > 0 ? i - window + 1 : 0;
            for (int32_t t = from; t <= i; t++) {
                const double *k = qkv + t * width + head_at(m, 1, h / share);
                double dot = 0;
                for (int32_t c = 0; c < d; c++) dot += q[c] * k[c];
                w[t] = exp(dot / sqrt(d));
                sum += w[t];
            }
            for (int32_t t = from; t <= i; t++) {
                const double *v = qkv + t * width + head_at(m, 2, h / share);
                for (int32_t c = 0; c < d; c++) out[c] += w[t] / sum * v[c];
            }
        }
    }
    free(w);
}

static void tap(const plain *p, tensor_role r, int32_t layer, const double *x)
{
    if (p->tap) p->tap(p->ctx, r, layer, x, p->n, model_linear_k(p->m, r));
}

static void plain_block(const plain *p, double *x, int32_t l)
{
    const model_desc *m = p->m;
    const int64_t h = m->hidden, f = m->ffn, qw = (int64_t)m->heads * m->head_dim;
    const int64_t kw = (int64_t)m->kv_heads * m->head_dim, width = qw + 2 * kw;
    double *y = grid(p->n, h), *qkv = grid(p->n, width), *a = grid(p->n, qw);
    double *gate = grid(p->n, f), *up = grid(p->n, f);
    plain_norm(p, y, x, h, ROLE_ATTN_NORM, l);
    tap(p, ROLE_QKV, l, y);
    if (m->qkv == QKV_SPLIT) {
        plain_linear(p, qkv, y, ROLE_Q, l, width, 0);
        plain_linear(p, qkv, y, ROLE_K, l, width, qw);
        plain_linear(p, qkv, y, ROLE_V, l, width, qw + kw);
    } else {
        plain_linear(p, qkv, y, ROLE_QKV, l, width, 0);
    }
    plain_heads(p, qkv, width, l);
    plain_attn(p, a, qkv, width, l);
    tap(p, ROLE_O, l, a);
    plain_linear(p, y, a, ROLE_O, l, h, 0);
    for (int64_t i = 0; i < p->n * h; i++) x[i] += y[i];
    plain_norm(p, y, x, h, ROLE_FFN_NORM, l);
    tap(p, ROLE_GATE, l, y);
    plain_linear(p, gate, y, ROLE_GATE, l, f, 0);
    plain_linear(p, up, y, ROLE_UP, l, f, 0);
    for (int64_t i = 0; i < p->n * f; i++) gate[i] = gate[i] / (1 + exp(-gate[i])) * up[i];
    tap(p, ROLE_DOWN, l, gate);
    plain_linear(p, y, gate, ROLE_DOWN, l, h, 0);
    for (int64_t i = 0; i < p->n * h; i++) x[i] += y[i];
    free(y), free(qkv), free(a), free(gate), free(up);
}

void tiny_forward(double *logits, weight_src *src, const int32_t *ids, int32_t n, tiny_tap tap_fn,
                  void *ctx)
{
    const plain p = {src, weights_desc(src), ids, n, tap_fn, ctx};
    const int64_t h = p.m->hidden;
    tensor embed, head;
    err e;
    double *x = grid(n, h), *y = grid(n, h);
    if (weights_tensor(src, ROLE_EMBED, -1, &embed, &e) != OK) abort();
    if (weights_tensor(src, ROLE_HEAD, -1, &head, &e) != OK) abort();
    float *table = read_matrix(&embed), *w = read_matrix(&head);
    for (int32_t i = 0; i < n; i++) {
        for (int64_t c = 0; c < h; c++) x[i * h + c] = (double)table[ids[i] * h + c];
    }
    for (int32_t l = 0; l < p.m->layers; l++) plain_block(&p, x, l);
    plain_norm(&p, y, x, h, ROLE_FINAL_NORM, -1);
    for (int32_t i = 0; i < n; i++) {
        for (int32_t o = 0; o < p.m->vocab; o++) {
            double s = 0;
            for (int64_t c = 0; c < h; c++) s += y[i * h + c] * (double)w[o * h + c];
            logits[(int64_t)i * p.m->vocab + o] = s;
        }
    }
    free(x), free(y), free(table), free(w);
}
