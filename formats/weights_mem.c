/* Weights held in memory. Every tensor is an owned, contiguous copy. */
#include "formats/weights_mem.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "formats/family.h"

typedef struct {
    bool there;
    linear_view v; /* norms and model-level tensors use v.dense */
} mem_slot;

struct weights_mem {
    model_desc m;
    mem_slot *slot; /* [layers + 1][ROLE_COUNT], first the model level */
};

static mem_slot *slot_of(const weights_mem *w, tensor_role r, int32_t layer)
{
    return &w->slot[(int64_t)(layer + 1) * ROLE_COUNT + r];
}

static bool is_matrix(tensor_role r) { return r == ROLE_EMBED || r == ROLE_HEAD; }

static void slot_free(mem_slot *s)
{
    tensor *const parts[] = {&s->v.dense, &s->v.bias, &s->v.q.q, &s->v.q.scales, &s->v.q.zeros};
    for (int i = 0; i < 5; i++) mem_free(parts[i]->data);
    *s = (mem_slot){0};
}

err_code weights_mem_open(weights_mem **out, const model_desc *m, err *e)
{
    weights_mem *w;
    *out = NULL;
    TRY(model_desc_check(m, e));
    if (!family_by_name(m->family))
        return err_set(e, E_UNSUPPORTED, "family '%.32s' is not known", m->family);
    TRY(mem_alloc((void **)&w, 1, sizeof *w, "weights in memory", e));
    w->m = *m;
    const err_code rc = mem_alloc((void **)&w->slot, (size_t)(m->layers + 1) * ROLE_COUNT,
                                  sizeof *w->slot, "weights in memory", e);
    if (rc != OK) weights_mem_close(&w);
    *out = w;
    return rc;
}

void weights_mem_close(weights_mem **w)
{
    if (!*w) return;
    for (int64_t i = 0; (*w)->slot && i < (int64_t)((*w)->m.layers + 1) * ROLE_COUNT; i++)
        slot_free(&(*w)->slot[i]);
    mem_free((*w)->slot);
    mem_free(*w);
    *w = NULL;
}

/* A contiguous copy; src may be strided. */
static err_code copy_tensor(tensor *dst, const tensor *src, err *e)
{
    void *p;
    *dst = (tensor){0};
    if (!src->data) return OK;
    TRY(mem_alloc(&p, (size_t)tensor_count(src), dtype_bytes(src->dt), "weights in memory", e));
    *dst = tensor_of(p, src->dt, src->ndim, src->shape);
    if (tensor_contiguous(src))
        memcpy(p, src->data, tensor_bytes(src));
    else
        (void)tensor_convert(dst, src);
    return OK;
}

static err_code expect(const tensor *t, tensor_role r, int32_t layer, int ndim,
                       const int64_t *shape, err *e)
{
    char what[64];
    (void)snprintf(what, sizeof what, "layer %d: %s", layer, role_name(r));
    if (t->dt != DT_F16 && t->dt != DT_BF16 && t->dt != DT_F32)
        return err_set(e, E_SHAPE, "%s: expected F16, BF16 or F32, got %s", what,
                       dtype_name(t->dt));
    return tensor_expect(t, what, t->dt, ndim, shape, e);
}

static void tensor_shape(const model_desc *m, tensor_role r, int64_t shape[2])
{
    shape[0] = is_matrix(r)                           ? m->vocab
               : r == ROLE_Q_NORM || r == ROLE_K_NORM ? m->head_dim
                                                      : m->hidden;
    shape[1] = m->hidden;
}

err_code weights_mem_tensor(weights_mem *w, tensor_role r, int32_t layer, const tensor *t, err *e)
{
    int64_t shape[2];
    mem_slot made = {.there = true};
    tensor_shape(&w->m, r, shape);
    TRY(expect(t, r, layer, is_matrix(r) ? 2 : 1, shape, e));
    TRY(copy_tensor(&made.v.dense, t, e));
    slot_free(slot_of(w, r, layer));
    *slot_of(w, r, layer) = made;
    return OK;
}

static err_code copy_linear(mem_slot *made, const linear_view *v, err *e)
{
    made->there = true;
    made->v.w4 = v->w4;
    TRY(copy_tensor(&made->v.bias, &v->bias, e));
    if (!v->w4) return copy_tensor(&made->v.dense, &v->dense, e);
    made->v.q = (w4_weight){.k = v->q.k, .n = v->q.n, .group = v->q.group, .layout = v->q.layout};
    TRY(copy_tensor(&made->v.q.q, &v->q.q, e));
    TRY(copy_tensor(&made->v.q.scales, &v->q.scales, e));
    TRY(copy_tensor(&made->v.q.zeros, &v->q.zeros, e));
    return OK;
}

err_code weights_mem_linear(weights_mem *w, tensor_role r, int32_t layer, const linear_view *v,
                            err *e)
{
    const int64_t shape[2] = {model_linear_n(&w->m, r), model_linear_k(&w->m, r)};
    mem_slot made = {0};
    if (v->w4) {
        TRY(w4_check(&v->q, role_name(r), e));
        if (v->q.n != shape[0] || v->q.k != shape[1])
            return err_set(e, E_SHAPE, "layer %d: %s: expected [%lld,%lld], got [%lld,%lld]", layer,
                           role_name(r), (long long)shape[0], (long long)shape[1],
                           (long long)v->q.n, (long long)v->q.k);
    } else {
        TRY(expect(&v->dense, r, layer, 2, shape, e));
    }
    if (v->bias.data) TRY(expect(&v->bias, r, layer, 1, shape, e));
    const err_code rc = copy_linear(&made, v, e);
    if (rc != OK) {
        slot_free(&made);
        return rc;
    }
    slot_free(slot_of(w, r, layer));
    *slot_of(w, r, layer) = made;
    slot_of(w, r, layer)->v.q.bias = made.v.bias; /* one memory, two views */
    return OK;
}

/* ---- random ---- */
static uint64_t next_u64(uint64_t *s)
{
    uint64_t z = *s += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* Near enough to normal, with variance 1, and the same bits everywhere: four 16-bit draws. */
static float next_normal(uint64_t *s)
{
    const uint64_t u = next_u64(s);
    const uint64_t sum = (u & 0xffff) + (u >> 16 & 0xffff) + (u >> 32 & 0xffff) + (u >> 48);
    return ((float)sum - 131070.0f) * (1.0f / 37837.2f); /* 65536 / sqrt(3) */
}

static err_code random_tensor(tensor *out, dtype dt, int ndim, const int64_t *shape, float mean,
                              float deviation, uint64_t stream, err *e)
{
    void *p;
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) n *= shape[i];
    TRY(mem_alloc(&p, (size_t)n, dtype_bytes(dt), "weights in memory", e));
    *out = tensor_of(p, dt, ndim, shape);
    for (int64_t i = 0; i < n; i++) {
        const float v = mean + deviation * next_normal(&stream);
        if (dt == DT_F32)
            ((float *)p)[i] = v;
        else
            ((uint16_t *)p)[i] = dt == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
    }
    return OK;
}

static uint64_t stream_of(uint64_t seed, tensor_role r, int32_t layer, int part)
{
    uint64_t s = seed * 0x2545f4914f6cdd1du + (uint64_t)(layer + 1) * 64 + (uint64_t)r * 2 +
                 (uint64_t)part;
    return next_u64(&s);
}

static bool has_bias(const model_desc *m, tensor_role r)
{
    if (r == ROLE_O) return m->o_bias;
    return m->qkv_bias && (r == ROLE_QKV || r == ROLE_Q || r == ROLE_K || r == ROLE_V);
}

static err_code random_tensor_role(weights_mem *w, tensor_role r, int32_t layer, uint64_t seed,
                                   float deviation, err *e)
{
    mem_slot *s = slot_of(w, r, layer);
    int64_t shape[2];
    if (s->there) return OK;
    tensor_shape(&w->m, r, shape);
    TRY(random_tensor(&s->v.dense, w->m.dt, is_matrix(r) ? 2 : 1, shape, is_matrix(r) ? 0.0f : 1.0f,
                      deviation, stream_of(seed, r, layer, 0), e));
    s->there = true;
    return OK;
}

static err_code random_linear(weights_mem *w, tensor_role r, int32_t layer, uint64_t seed,
                              float deviation, err *e)
{
    mem_slot *s = slot_of(w, r, layer);
    const int64_t shape[2] = {model_linear_n(&w->m, r), model_linear_k(&w->m, r)};
    if (s->there) return OK;
    TRY(random_tensor(&s->v.dense, w->m.dt, 2, shape, 0, deviation, stream_of(seed, r, layer, 0),
                      e));
    s->there = true; /* frees what follows a failure too */
    if (has_bias(&w->m, r))
        TRY(random_tensor(&s->v.bias, w->m.dt, 1, shape, 0, deviation, stream_of(seed, r, layer, 1),
                          e));
    return OK;
}

err_code weights_mem_random(weights_mem *w, uint64_t seed, float deviation, err *e)
{
    const model_desc *m = &w->m;
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    TRY(random_tensor_role(w, ROLE_EMBED, -1, seed, deviation, e));
    TRY(random_tensor_role(w, ROLE_FINAL_NORM, -1, seed, deviation, e));
    if (!m->tied_embed) TRY(random_tensor_role(w, ROLE_HEAD, -1, seed, deviation, e));
    for (int32_t layer = 0; layer < m->layers; layer++) {
        TRY(random_tensor_role(w, ROLE_ATTN_NORM, layer, seed, deviation, e));
        TRY(random_tensor_role(w, ROLE_FFN_NORM, layer, seed, deviation, e));
        if (m->qk_norm) {
            TRY(random_tensor_role(w, ROLE_Q_NORM, layer, seed, deviation, e));
            TRY(random_tensor_role(w, ROLE_K_NORM, layer, seed, deviation, e));
        }
        for (int i = 0; i < n; i++) TRY(random_linear(w, linears[i], layer, seed, deviation, e));
    }
    return OK;
}

/* ---- round to nearest ---- */
static void quantize_group(const float *x, int32_t group, uint8_t *q, f16 *scale, uint8_t *zero)
{
    float lo = x[0], hi = x[0];
    for (int32_t i = 1; i < group; i++) {
        lo = fminf(lo, x[i]);
        hi = fmaxf(hi, x[i]);
    }
    *scale = f32_to_f16(fmaxf(hi - lo, 1e-5f) / 15.0f);
    const float step = f16_to_f32(*scale), z = fminf(fmaxf(-rintf(lo / step), 0.0f), 15.0f);
    *zero = (uint8_t)z;
    for (int32_t i = 0; i < group; i++)
        q[i] = (uint8_t)fminf(fmaxf(rintf(x[i] / step) + z, 0.0f), 15.0f);
}

static err_code quantize_slot(mem_slot *s, int32_t group, err *e)
{
    const int64_t n = s->v.dense.shape[0], k = s->v.dense.shape[1];
    size_t bytes[3];
    float *row = NULL;
    err_code rc;
    w4_weight *q = &s->v.q;
    TRY(w4_sizes(&bytes[0], &bytes[1], &bytes[2], k, n, group, W4_CODES, e));
    w4_shape(q, k, n, group, W4_CODES);
    if ((rc = mem_alloc(&q->q.data, bytes[0], 1, "codes", e)) != OK) return rc;
    if ((rc = mem_alloc(&q->scales.data, bytes[1], 1, "scales", e)) != OK) return rc;
    if ((rc = mem_alloc(&q->zeros.data, bytes[2], 1, "zeros", e)) != OK) return rc;
    if ((rc = mem_alloc((void **)&row, (size_t)k, sizeof *row, "row", e)) != OK) return rc;
    for (int64_t i = 0; i < n; i++) {
        tensor to = tensor_2d(row, DT_F32, 1, k);
        const tensor from = tensor_rows(&s->v.dense, i, 1);
        (void)tensor_convert(&to, &from);
        for (int64_t g = 0; g < k / group; g++)
            quantize_group(row + g * group, group, (uint8_t *)q->q.data + i * k + g * group,
                           (f16 *)q->scales.data + i * (k / group) + g,
                           (uint8_t *)q->zeros.data + i * (k / group) + g);
    }
    mem_free(row);
    mem_free(s->v.dense.data);
    s->v.dense = (tensor){0};
    s->v.w4 = true;
    q->bias = s->v.bias;
    return OK;
}

err_code weights_mem_quantize(weights_mem *w, int32_t group, err *e)
{
    tensor_role linears[7];
    const int n = model_block_linears(&w->m, linears);
    if (group != 32 && group != 64 && group != 128)
        return err_set(e, E_UNSUPPORTED, "group %d, expected 32, 64 or 128", group);
    for (int32_t layer = 0; layer < w->m.layers; layer++)
        for (int i = 0; i < n; i++) {
            mem_slot *s = slot_of(w, linears[i], layer);
            if (s->there && !s->v.w4) TRY(quantize_slot(s, group, e));
        }
    w->m.w4_group = group;
    return OK;
}

/* ---- as a source ---- */
static err_code missing(tensor_role r, int32_t layer, err *e)
{
    return err_set(e, E_INPUT, "weights in memory: layer %d has no '%s'", layer, role_name(r));
}

static err_code mem_tensor(void *self, tensor_role r, int32_t layer, tensor *view, err *e)
{
    const weights_mem *w = self;
    if (r == ROLE_HEAD && w->m.tied_embed) r = ROLE_EMBED;
    const mem_slot *s = slot_of(w, r, layer);
    if (!s->there) return missing(r, layer, e);
    *view = s->v.dense;
    return OK;
}

static err_code mem_linear(void *self, tensor_role r, int32_t layer, int32_t expert,
                           linear_view *view, err *e)
{
    const mem_slot *s = slot_of(self, r, layer);
    (void)expert;
    if (!s->there) return missing(r, layer, e);
    *view = s->v;
    return OK;
}

static bool mem_has(void *self, tensor_role r, int32_t layer, int32_t expert)
{
    const weights_mem *w = self;
    (void)expert;
    if (r == ROLE_HEAD && w->m.tied_embed) r = ROLE_EMBED;
    return slot_of(w, r, layer)->there;
}

static void mem_close(void *self)
{
    weights_mem *w = self;
    weights_mem_close(&w);
}

static err_code check_complete(const weights_mem *w, err *e)
{
    static const tensor_role model[] = {ROLE_EMBED, ROLE_FINAL_NORM, ROLE_HEAD};
    tensor_role linears[9];
    int n = model_block_linears(&w->m, linears);
    linears[n++] = ROLE_ATTN_NORM;
    linears[n++] = ROLE_FFN_NORM;
    for (int i = 0; i < (w->m.tied_embed ? 2 : 3); i++)
        if (!slot_of(w, model[i], -1)->there) return missing(model[i], -1, e);
    for (int32_t layer = 0; layer < w->m.layers; layer++)
        for (int i = 0; i < n; i++)
            if (!slot_of(w, linears[i], layer)->there) return missing(linears[i], layer, e);
    return OK;
}

err_code weights_mem_source(weight_src **out, weights_mem **w, err *e)
{
    static const weight_ops ops = {mem_close, mem_tensor, mem_linear, mem_has, NULL};
    *out = NULL;
    TRY(check_complete(*w, e));
    TRY(weights_make(out, SRC_MEM, &(*w)->m, "memory", "", "", &ops, *w, e));
    *w = NULL;
    return OK;
}
