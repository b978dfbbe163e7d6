/* Copies of KV heads, and folds that undo nothing. */
#include "tests/support/outliers.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/fold.h"
#include "formats/weights_mem.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)
#define ONE_IN  16

static uint64_t next(uint64_t *x)
{
    *x = *x * 6364136223846793005u + 1442695040888963407u;
    return *x >> 33;
}

/* ---- one KV head a head ---- */

/* Rows of head `h` of a part of the base's projection, f32 [hd,k] (k 1: of its bias). */
static void take_rows(const model_desc *m, const tensor *from, tensor_role part, int32_t h,
                      float *to)
{
    const int64_t k = from->ndim > 1 ? from->shape[1] : 1, hd = m->head_dim,
                  at = fold_head_row(m, part, h);
    const tensor all = from->ndim > 1 ? *from : tensor_2d(from->data, from->dt, from->shape[0], 1),
                 rows = tensor_rows(&all, at, hd);
    tensor out = tensor_2d(to, DT_F32, hd, k);
    tensor_convert(&out, &rows);
}

static void put_part(weights_mem *w, weight_src *base, tensor_role part, int32_t layer)
{
    const model_desc *m = weights_desc(base);
    const int64_t hd = m->head_dim, n = m->heads * hd, share = m->heads / m->kv_heads;
    linear_view v, out = {0};
    err e;
    MUST(weights_linear(base, m->qkv == QKV_SPLIT ? part : ROLE_QKV, layer, -1, &v, &e));
    const int64_t k = v.dense.shape[1];
    float *rows = malloc((size_t)(n * k) * sizeof *rows), *bias = malloc((size_t)n * sizeof *bias);
    for (int32_t h = 0; h < m->heads; h++) {
        const int32_t own = part == ROLE_Q ? h : (int32_t)(h / share);
        take_rows(m, &v.dense, part, own, rows + h * hd * k);
        if (v.bias.data) take_rows(m, &v.bias, part, own, bias + h * hd);
    }
    out.dense = tensor_2d(rows, DT_F32, n, k);
    if (v.bias.data) out.bias = tensor_1d(bias, DT_F32, n);
    MUST(weights_mem_linear(w, part, layer, &out, &e));
    free(rows);
    free(bias);
}

static void put_tensor(weights_mem *w, weight_src *base, tensor_role r, int32_t layer)
{
    tensor t;
    err e;
    MUST(weights_tensor(base, r, layer, &t, &e));
    MUST(weights_mem_tensor(w, r, layer, &t, &e));
}

static weight_src *multi_head(weight_src *base)
{
    static const tensor_role parts[] = {ROLE_Q, ROLE_K, ROLE_V},
                             rest[] = {ROLE_O, ROLE_GATE, ROLE_UP, ROLE_DOWN};
    model_desc m = *weights_desc(base);
    weights_mem *w = NULL;
    weight_src *out = NULL;
    linear_view v;
    err e;
    m.kv_heads = m.heads;
    m.qkv = QKV_SPLIT;
    m.dt = DT_F32;
    memcpy(m.family, "llama", sizeof "llama");
    memcpy(m.architecture, "LlamaForCausalLM", sizeof "LlamaForCausalLM");
    MUST(weights_mem_open(&w, &m, &e));
    put_tensor(w, base, ROLE_EMBED, -1);
    put_tensor(w, base, ROLE_FINAL_NORM, -1);
    if (!m.tied_embed) put_tensor(w, base, ROLE_HEAD, -1);
    for (int32_t l = 0; l < m.layers; l++) {
        put_tensor(w, base, ROLE_ATTN_NORM, l);
        put_tensor(w, base, ROLE_FFN_NORM, l);
        for (int i = 0; i < 3; i++) put_part(w, base, parts[i], l);
        for (int i = 0; i < 4; i++) {
            MUST(weights_linear(base, rest[i], l, -1, &v, &e));
            MUST(weights_mem_linear(w, rest[i], l, &v, &e));
        }
    }
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

/* ---- outliers ---- */

/* Divisors: 1, and for one channel in ONE_IN 1/16, 1/32 or 1/64. Pairs of k have the same. */
static void draw(const model_desc *m, block_plan *p, uint64_t *x)
{
    for (int i = 0; i < PLAN_FOLDS; i++) {
        tensor *t = &p->fold[i].s;
        float *s = malloc(tensor_bytes(t));
        for (int64_t c = 0; c < tensor_count(t); c++)
            s[c] = next(x) % ONE_IN ? 1.f : exp2f(-4.f - (float)(next(x) % 3));
        for (int64_t h = 0; p->fold[i].source == ROLE_K && h < m->kv_heads; h++)
            for (int64_t k = 0; k < m->rope_dims / 2; k++) {
                int64_t a, b;
                fold_rope_pair(m, k, &a, &b);
                s[h * m->head_dim + b] = s[h * m->head_dim + a];
            }
        t->data = s;
    }
}

static void put_scaled(weights_mem *w, weight_src *src, const block_plan *p, int32_t layer)
{
    const model_desc *m = weights_desc(src);
    fold f;
    err e;
    MUST(fold_init(&f, m, p, &e));
    for (int i = 0; i < 2; i++) {
        const tensor_role r = i ? ROLE_FFN_NORM : ROLE_ATTN_NORM;
        tensor t;
        float *norm = malloc((size_t)m->hidden * sizeof *norm);
        MUST(weights_tensor(src, r, layer, &t, &e));
        MUST(fold_norm(norm, &t, f.norm[i], layer, r, &e));
        t = tensor_1d(norm, DT_F32, m->hidden);
        MUST(weights_mem_tensor(w, r, layer, &t, &e));
        free(norm);
    }
    for (int i = 0; i < p->n_linears; i++) {
        const tensor_role r = p->linear[i].role;
        linear_view v;
        MUST(weights_linear(src, r, layer, -1, &v, &e));
        const int64_t n = v.dense.shape[0];
        tensor rows = {.data = malloc(tensor_bytes(&v.dense) * 2)};
        float *bias = malloc((size_t)n * sizeof *bias);
        MUST(fold_rows(&rows, &v.dense, fold_find(&f, r), 0, n, layer, r, &e));
        if (v.bias.data) MUST(fold_bias(bias, &v.bias, fold_find(&f, r), layer, r, &e));
        v.dense = rows;
        if (v.bias.data) v.bias = tensor_1d(bias, DT_F32, n);
        MUST(weights_mem_linear(w, r, layer, &v, &e));
        free(rows.data);
        free(bias);
    }
    fold_free(&f);
}

weight_src *outlier_model(weight_src *base, bool outliers, uint64_t seed)
{
    weight_src *src = multi_head(base), *out = NULL;
    const model_desc *m = weights_desc(src);
    weights_mem *w = NULL;
    uint64_t x = seed;
    err e;
    if (!outliers) return src;
    MUST(weights_mem_open(&w, m, &e));
    put_tensor(w, src, ROLE_EMBED, -1);
    put_tensor(w, src, ROLE_FINAL_NORM, -1);
    if (!m->tied_embed) put_tensor(w, src, ROLE_HEAD, -1);
    for (int32_t l = 0; l < m->layers; l++) {
        block_plan p = plan_shape(m, 1);
        draw(m, &p, &x);
        put_scaled(w, src, &p, l);
        for (int i = 0; i < PLAN_FOLDS; i++) free(p.fold[i].s.data);
    }
    MUST(weights_mem_source(&out, &w, &e));
    weights_close(&src);
    return out;
}
