/* Folding: which rows and columns of which linear a channel group's factors touch. */
#include "awq/fold.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"

const fold_linear *fold_find(const fold *f, tensor_role r)
{
    for (int i = 0; i < f->n_linears; i++)
        if (f->linear[i].role == r) return &f->linear[i];
    return NULL;
}

/* The vector to multiply into, made of ones when first asked for. */
static err_code need(float **v, int64_t n, err *e)
{
    void *mem;
    if (*v) return OK;
    TRY(mem_alloc(&mem, (size_t)n, sizeof(float), "fold factors", e));
    *v = mem;
    for (int64_t i = 0; i < n; i++) (*v)[i] = 1.f;
    return OK;
}

static fold_linear *find(fold *f, tensor_role r)
{
    return (fold_linear *)(uintptr_t)fold_find(f, r);
}

static err_code scale_cols(fold *f, const model_desc *m, tensor_role r, const float *s, err *e)
{
    fold_linear *l = find(f, r);
    if (!l) return OK; /* a fused projection stands in for q, k and v */
    const int64_t k = model_linear_k(m, r);
    TRY(need(&l->col, k, e));
    for (int64_t i = 0; i < k; i++) l->col[i] *= s[i];
    return OK;
}

void fold_rope_pair(const model_desc *m, int64_t i, int64_t *a, int64_t *b)
{
    const int64_t half = m->rope_dims / 2;
    *a = m->rope_interleaved ? 2 * i : i;
    *b = m->rope_interleaved ? 2 * i + 1 : i + half;
}

int64_t fold_head_row(const model_desc *m, tensor_role part, int32_t h)
{
    const int64_t hd = m->head_dim, share = m->heads / m->kv_heads;
    if (m->qkv == QKV_SPLIT) return h * hd;
    if (m->qkv == QKV_CONCAT) {
        const int64_t before = part == ROLE_Q   ? 0
                               : part == ROLE_K ? m->heads
                                                : m->heads + m->kv_heads;
        return (before + h) * hd;
    }
    if (part == ROLE_Q) return (h / share * (share + 2) + h % share) * hd;
    return (h * (share + 2) + share + (part == ROLE_V)) * hd;
}

int64_t fold_head_col(const model_desc *m, tensor_role part, int32_t h)
{
    const int64_t before = m->qkv != QKV_SPLIT || part == ROLE_Q ? 0
                           : part == ROLE_K                      ? m->heads
                                                                 : m->heads + m->kv_heads;
    return before * m->head_dim + fold_head_row(m, part, h);
}

/* Rows of all heads of q, k or v are divided by s[kv head][dim], or multiplied. */
static err_code scale_heads(fold *f, const model_desc *m, tensor_role part, const float *s,
                            bool divide, err *e)
{
    const tensor_role r = m->qkv == QKV_SPLIT ? part : ROLE_QKV;
    const int32_t heads = part == ROLE_Q ? m->heads : m->kv_heads, share = heads / m->kv_heads;
    fold_linear *l = find(f, r);
    if (!l)
        return err_set(e, E_UNSUPPORTED, "fold of %s: this block has no such linear",
                       role_name(part));
    TRY(need(&l->row, model_linear_n(m, r), e));
    for (int32_t h = 0; h < heads; h++) {
        float *row = l->row + fold_head_row(m, part, h);
        const float *factor = s + (int64_t)(h / share) * m->head_dim;
        for (int32_t i = 0; i < m->head_dim; i++)
            row[i] = divide ? row[i] * factor[i] : row[i] / factor[i]; /* row is a divisor */
    }
    return OK;
}

/* o reads head h's values, which are those of its KV head. */
static err_code scale_o(fold *f, const model_desc *m, const float *s, err *e)
{
    const int32_t share = m->heads / m->kv_heads;
    fold_linear *l = find(f, ROLE_O);
    if (!l) return err_set(e, E_UNSUPPORTED, "fold of v: this block has no o");
    TRY(need(&l->col, (int64_t)m->heads * m->head_dim, e));
    for (int32_t h = 0; h < m->heads; h++)
        for (int32_t i = 0; i < m->head_dim; i++)
            l->col[(int64_t)h * m->head_dim + i] *= s[(int64_t)(h / share) * m->head_dim + i];
    return OK;
}

/* RoPE turns pairs of dims into each other: both must carry the same factor, and no norm may stand
 * between. */
static err_code check_k(const model_desc *m, const float *s, err *e)
{
    const int32_t half = m->rope_dims / 2;
    if (m->qk_norm) return err_set(e, E_UNSUPPORTED, "fold of k: this model has a norm on q and k");
    int64_t a, b;
    for (int32_t h = 0; h < m->kv_heads; h++)
        for (int32_t i = 0; i < half; i++) {
            fold_rope_pair(m, i, &a, &b);
            const float *v = s + (int64_t)h * m->head_dim;
            if (v[a] != v[b])
                return err_set(e, E_INPUT,
                               "fold of k: head %d: dims %d and %d rotate together: expected equal "
                               "factors, found %g and %g",
                               (int)h, (int)a, (int)b, (double)v[a], (double)v[b]);
        }
    return OK;
}

static err_code apply(fold *f, const model_desc *m, tensor_role source, const float *s, err *e)
{
    static const tensor_role attn[] = {ROLE_QKV, ROLE_Q, ROLE_K, ROLE_V},
                             ffn[] = {ROLE_GATE, ROLE_UP};
    switch (source) {
    case ROLE_ATTN_NORM:
        f->norm[0] = s;
        for (int i = 0; i < 4; i++) TRY(scale_cols(f, m, attn[i], s, e));
        return OK;
    case ROLE_FFN_NORM:
        f->norm[1] = s;
        for (int i = 0; i < 2; i++) TRY(scale_cols(f, m, ffn[i], s, e));
        return OK;
    case ROLE_UP: {
        fold_linear *up = find(f, ROLE_UP);
        if (!up) return err_set(e, E_UNSUPPORTED, "fold of up: this block has no up");
        TRY(need(&up->row, m->ffn, e));
        for (int32_t i = 0; i < m->ffn; i++) up->row[i] *= s[i];
        return scale_cols(f, m, ROLE_DOWN, s, e);
    }
    case ROLE_V: TRY(scale_heads(f, m, ROLE_V, s, true, e)); return scale_o(f, m, s, e);
    case ROLE_K:
        TRY(check_k(m, s, e));
        TRY(scale_heads(f, m, ROLE_K, s, true, e));
        return scale_heads(f, m, ROLE_Q, s, false, e);
    default:
        return err_set(e, E_UNSUPPORTED, "fold of %s: not a source of a channel group",
                       role_name(source));
    }
}

err_code fold_init(fold *f, const model_desc *m, const block_plan *p, err *e)
{
    *f = (fold){.n_linears = p->n_linears};
    for (int i = 0; i < p->n_linears; i++) f->linear[i].role = p->linear[i].role;
    for (int i = 0; i < PLAN_FOLDS; i++) {
        if (!p->fold[i].s.data) continue;
        const err_code rc = apply(f, m, p->fold[i].source, p->fold[i].s.data, e);
        if (rc != OK) {
            fold_free(f);
            return rc;
        }
    }
    return OK;
}

void fold_free(fold *f)
{
    for (int i = 0; i < f->n_linears; i++) {
        mem_free(f->linear[i].row);
        mem_free(f->linear[i].col);
    }
    *f = (fold){0};
}

static err_code not_finite(int32_t layer, tensor_role r, const char *what, int64_t row, int64_t col,
                           double v, err *e)
{
    return err_set(e, E_INPUT,
                   "layer %d: %s: %s row %" PRId64 " column %" PRId64
                   ": expected a finite number, found %g",
                   (int)layer, role_name(r), what, row, col, v);
}

err_code fold_rows(tensor *out, const tensor *dense, const fold_linear *l, int64_t from, int64_t n,
                   int32_t layer, tensor_role r, err *e)
{
    const tensor part = tensor_rows(dense, from, n);
    const int64_t k = dense->shape[1];
    const float *row = l ? l->row : NULL, *col = l ? l->col : NULL;
    *out = tensor_2d(out->data, DT_F32, n, k);
    tensor_convert(out, &part);
    for (int64_t i = 0; i < n; i++) {
        float *w = (float *)out->data + i * k;
        const float div = row ? row[from + i] : 1.f;
        float bad = 0.f; /* stays 0 for finite numbers, else NaN */
        if (col)
            for (int64_t j = 0; j < k; j++) w[j] *= col[j];
        if (row)
            for (int64_t j = 0; j < k; j++) w[j] /= div;
        for (int64_t j = 0; j < k; j++) bad += w[j] * 0.f;
        for (int64_t j = 0; j < k && bad != 0.f; j++)
            if (!isfinite(w[j])) return not_finite(layer, r, "weight", from + i, j, w[j], e);
    }
    return OK;
}

err_code fold_bias(float *out, const tensor *bias, const fold_linear *l, int32_t layer,
                   tensor_role r, err *e)
{
    tensor t = tensor_1d(out, DT_F32, bias->shape[0]);
    tensor_convert(&t, bias);
    for (int64_t i = 0; i < bias->shape[0]; i++) {
        if (l && l->row) out[i] /= l->row[i];
        if (!isfinite(out[i])) return not_finite(layer, r, "bias", i, 0, out[i], e);
    }
    return OK;
}

err_code fold_norm(float *out, const tensor *norm, const float *div, int32_t layer, tensor_role r,
                   err *e)
{
    tensor t = tensor_1d(out, DT_F32, norm->shape[0]);
    tensor_convert(&t, norm);
    for (int64_t i = 0; i < norm->shape[0]; i++) {
        if (div) out[i] /= div[i];
        if (!isfinite(out[i])) return not_finite(layer, r, "weight", 0, i, out[i], e);
    }
    return OK;
}
