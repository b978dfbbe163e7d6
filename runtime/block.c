/* One transformer block. Two scratch buffers carry everything between the residual adds: `narrow`
 * holds the normed rows and then the attention output, `wide` the q|k|v rows and then gate|up; no
 * two of a pair live at once. */
#include "runtime/block.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"

struct block_scratch {
    int32_t rows;
    int64_t narrow_cols, wide_cols;
    dev_buf narrow, wide; /* act [rows, narrow_cols], act [rows, wide_cols] */
};

static int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

static int64_t q_cols(const model_desc *m) { return (int64_t)m->heads * m->head_dim; }

static int64_t kv_cols(const model_desc *m) { return (int64_t)m->kv_heads * m->head_dim; }

static int64_t narrow_cols(const model_desc *m) { return max64(m->hidden, q_cols(m)); }

static int64_t wide_cols(const model_desc *m)
{
    return max64(q_cols(m) + 2 * kv_cols(m), 2 * (int64_t)m->ffn);
}

op_limits block_limits(const model_desc *m, int32_t rows, int32_t seqs, int32_t max_kv)
{
    return (op_limits){.rows = rows,
                       .k = max64(narrow_cols(m), m->ffn),
                       .n = max64(m->hidden, wide_cols(m)),
                       .heads = m->heads,
                       .head_dim = m->head_dim,
                       .max_kv = max_kv,
                       .seqs = seqs};
}

size_t block_scratch_bytes(const device *d, const model_desc *m, int32_t rows, int32_t seqs,
                           int32_t max_kv)
{
    const op_limits lim = block_limits(m, rows, seqs, max_kv);
    const size_t act = dtype_bytes(dev_act(d));
    return (size_t)rows * (size_t)(narrow_cols(m) + wide_cols(m)) * act +
           ops_reserve_bytes(d, &lim);
}

err_code block_scratch_open(block_scratch **out, device *d, const model_desc *m, int32_t rows,
                            int32_t seqs, int32_t max_kv, err *e)
{
    const op_limits lim = block_limits(m, rows, seqs, max_kv);
    const size_t act = dtype_bytes(dev_act(d));
    size_t bytes;
    void *p;
    err_code rc;
    *out = NULL;
    if (rows < 1 || seqs < 1 || max_kv < 1)
        return err_set(e, E_LIMIT,
                       "block scratch: rows, sequences, tokens: expected 1 or more, got %d, %d, %d",
                       rows, seqs, max_kv);
    TRY(ops_reserve(d, &lim, e));
    TRY(mem_alloc(&p, 1, sizeof(block_scratch), "block scratch", e));
    block_scratch *s = p;
    s->rows = rows;
    s->narrow_cols = narrow_cols(m);
    s->wide_cols = wide_cols(m);
    if ((rc = mem_mul(&bytes, (size_t)rows, (size_t)s->narrow_cols * act, "block scratch", e)) !=
        OK)
        goto done;
    if ((rc = dev_alloc(&s->narrow, d, bytes, "block scratch", e)) != OK) goto done;
    if ((rc = mem_mul(&bytes, (size_t)rows, (size_t)s->wide_cols * act, "block scratch", e)) != OK)
        goto done;
    if ((rc = dev_alloc(&s->wide, d, bytes, "block scratch", e)) != OK) goto done;
    *out = s;
    s = NULL;
done:
    block_scratch_close(&s);
    return rc;
}

void block_scratch_close(block_scratch **s)
{
    if (!s || !*s) return;
    dev_free(&(*s)->narrow);
    dev_free(&(*s)->wide);
    mem_free(*s);
    *s = NULL;
}

/* ---- binding ---- */

/* Copies [n,k] that lies inputs-first into plain rows, in tiles that stay in the cache. */
#define TURN_TILE 64
typedef struct {
    char *dst;
    const char *src;
    int64_t n, k, stride_n, stride_k;
    size_t size; /* 2 or 4 */
} turn_job;

static void turn_rows(void *ctx, int64_t item, int worker)
{
    const turn_job *t = ctx;
    const int64_t n0 = item * TURN_TILE, n1 = n0 + TURN_TILE < t->n ? n0 + TURN_TILE : t->n;
    (void)worker;
    for (int64_t k0 = 0; k0 < t->k; k0 += TURN_TILE) {
        const int64_t k1 = k0 + TURN_TILE < t->k ? k0 + TURN_TILE : t->k;
        for (int64_t n = n0; n < n1; n++) {
            for (int64_t k = k0; k < k1; k++)
                memcpy(t->dst + (size_t)(n * t->k + k) * t->size,
                       t->src + (size_t)(n * t->stride_n + k * t->stride_k) * t->size, t->size);
        }
    }
}

/* Containers that store inputs first give a transposed view: it is turned once, on the host. */
static err_code bind_transposed(bound_linear *out, device *d, const tensor *view, err *e)
{
    const int64_t n = view->shape[0], k = view->shape[1];
    const bool host = dev_mem(d) == MEM_HOST;
    size_t bytes;
    void *p = NULL;
    TRY(mem_mul(&bytes, (size_t)n, (size_t)k * dtype_bytes(view->dt), "linear", e));
    if (host)
        TRY(dev_alloc(&out->buf, d, bytes, "linear", e));
    else
        TRY(mem_alloc(&p, bytes, 1, "linear", e));
    tensor t = tensor_2d(host ? out->buf.data : p, view->dt, n, k);
    turn_job j = {t.data,          view->data,           n, k, view->stride[0],
                  view->stride[1], dtype_bytes(view->dt)};
    pool_run(dev_pool(d), turn_rows, &j, (n + TURN_TILE - 1) / TURN_TILE);
    out->dense = t;
    if (host) return OK;
    err_code rc = dev_upload(d, &out->buf, &out->dense, &t, e);
    if (rc == OK) rc = dev_sync(d, e);
    mem_free(p);
    return rc;
}

static err_code bind_dense(bound_linear *out, device *d, const linear_view *v, err *e)
{
    out->n = v->dense.shape[0];
    out->k = v->dense.shape[1];
    if (tensor_contiguous(&v->dense))
        TRY(dev_upload(d, &out->buf, &out->dense, &v->dense, e));
    else
        TRY(bind_transposed(out, d, &v->dense, e));
    if (v->bias.data) TRY(dev_upload(d, &out->bias_buf, &out->bias, &v->bias, e));
    return OK;
}

static err_code bind_w4(bound_linear *out, device *d, const linear_view *views, int n, err *e)
{
    const w4_weight *parts[3];
    for (int i = 0; i < n; i++) parts[i] = &views[i].q;
    TRY(w4_upload(d, &out->buf, &out->w4, parts, n, e));
    out->n = out->w4.n;
    out->k = out->w4.k;
    return OK;
}

/* Linears that share an input become one where the device can tile them together (W4 of equal
 * group), else one each; *n_out says which. */
static err_code bind_shared(bound_linear *out, int *n_out, device *d, weight_src *src,
                            int32_t layer, const tensor_role *roles, int n, err *e)
{
    linear_view v[3];
    bool fuse = true;
    for (int i = 0; i < n; i++) {
        TRY(weights_linear(src, roles[i], layer, -1, &v[i], e));
        fuse = fuse && v[i].w4 && v[i].q.group == v[0].q.group;
    }
    *n_out = fuse ? 1 : n;
    if (fuse) {
        if (bind_w4(&out[0], d, v, n, e) != OK)
            return err_wrap(e, "layer %d: %s", layer, role_name(roles[0]));
        return OK;
    }
    for (int i = 0; i < n; i++) {
        const err_code rc = v[i].w4 ? bind_w4(&out[i], d, &v[i], 1, e)
                                    : bind_dense(&out[i], d, &v[i], e);
        if (rc != OK) return err_wrap(e, "layer %d: %s", layer, role_name(roles[i]));
    }
    return OK;
}

static err_code bind_norm(tensor *out, dev_buf *buf, device *d, weight_src *src, tensor_role r,
                          int32_t layer, err *e)
{
    tensor view;
    TRY(weights_tensor(src, r, layer, &view, e));
    return dev_upload(d, buf, out, &view, e);
}

static const tensor_role roles_split[3] = {ROLE_Q, ROLE_K, ROLE_V};
static const tensor_role roles_fused[1] = {ROLE_QKV};
static const tensor_role roles_ffn[2] = {ROLE_GATE, ROLE_UP};
static const tensor_role roles_o[1] = {ROLE_O};
static const tensor_role roles_down[1] = {ROLE_DOWN};

static err_code bind_all(block *b, device *d, weight_src *src, err *e)
{
    const model_desc *m = b->m;
    const bool split = m->qkv == QKV_SPLIT;
    int one;
    TRY(bind_norm(&b->attn_norm, &b->norm_buf[0], d, src, ROLE_ATTN_NORM, b->layer, e));
    TRY(bind_norm(&b->ffn_norm, &b->norm_buf[1], d, src, ROLE_FFN_NORM, b->layer, e));
    if (m->qk_norm) {
        TRY(bind_norm(&b->q_norm, &b->norm_buf[2], d, src, ROLE_Q_NORM, b->layer, e));
        TRY(bind_norm(&b->k_norm, &b->norm_buf[3], d, src, ROLE_K_NORM, b->layer, e));
    }
    TRY(bind_shared(b->qkv, &b->n_qkv, d, src, b->layer, split ? roles_split : roles_fused,
                    split ? 3 : 1, e));
    TRY(bind_shared(&b->o, &one, d, src, b->layer, roles_o, 1, e));
    TRY(bind_shared(b->gate_up, &b->n_gate_up, d, src, b->layer, roles_ffn, 2, e));
    return bind_shared(&b->down, &one, d, src, b->layer, roles_down, 1, e);
}

err_code block_bind(block *b, device *d, weight_src *src, int32_t layer, err *e)
{
    memset(b, 0, sizeof *b);
    b->m = weights_desc(src);
    b->layer = layer;
    if (b->m->experts > 0)
        return err_set(e, E_UNSUPPORTED, "'%s': %d experts: mixtures of experts are not supported",
                       weights_path(src), b->m->experts);
    const err_code rc = bind_all(b, d, src, e);
    if (rc != OK) block_free(b);
    return rc;
}

/* Device memory that binding a linear takes, and what it reads in place. */
static void linear_bytes(const device *d, const linear_view *v, size_t *bound, size_t *mapped)
{
    const bool host = dev_mem(d) == MEM_HOST;
    if (v->w4) {
        *bound += w4_upload_bytes(d, v->q.k, v->q.n, v->q.group);
        return;
    }
    if (host && tensor_contiguous(&v->dense))
        *mapped += tensor_bytes(&v->dense);
    else
        *bound += dev_upload_bytes(d, &v->dense);
    if (v->bias.data) *(host ? mapped : bound) += tensor_bytes(&v->bias);
}

static void layer_bytes(const device *d, const model_desc *m, weight_src *src, size_t *bound,
                        size_t *mapped)
{
    tensor_role roles[7];
    linear_view v;
    err ignore;
    const int n = model_block_linears(m, roles);
    *bound = *mapped = 0;
    for (int i = 0; i < n; i++) {
        /* A missing one is reported, with its name, by block_bind. */
        if (weights_linear(src, roles[i], 0, -1, &v, &ignore) == OK)
            linear_bytes(d, &v, bound, mapped);
    }
}

size_t block_bind_bytes(const device *d, const model_desc *m, weight_src *src)
{
    size_t bound, mapped;
    layer_bytes(d, m, src, &bound, &mapped);
    return bound;
}

size_t block_mapped_bytes(const device *d, const model_desc *m, weight_src *src)
{
    size_t bound, mapped;
    layer_bytes(d, m, src, &bound, &mapped);
    return mapped;
}

static size_t read_bytes(const bound_linear *l)
{
    if (l->w4.q.data) return l->buf.bytes;
    return tensor_bytes(&l->dense) + (l->bias.data ? tensor_bytes(&l->bias) : 0);
}

size_t block_read_bytes(const block *b)
{
    size_t sum = read_bytes(&b->o) + read_bytes(&b->down);
    for (int i = 0; i < b->n_qkv; i++) sum += read_bytes(&b->qkv[i]);
    for (int i = 0; i < b->n_gate_up; i++) sum += read_bytes(&b->gate_up[i]);
    return sum + tensor_bytes(&b->attn_norm) + tensor_bytes(&b->ffn_norm);
}

static void linear_free(bound_linear *l)
{
    dev_free(&l->buf);
    dev_free(&l->bias_buf);
}

void block_free(block *b)
{
    for (int i = 0; i < 4; i++) dev_free(&b->norm_buf[i]);
    for (int i = 0; i < 3; i++) linear_free(&b->qkv[i]);
    for (int i = 0; i < 2; i++) linear_free(&b->gate_up[i]);
    linear_free(&b->o);
    linear_free(&b->down);
    memset(b, 0, sizeof *b);
}

/* ---- forward ---- */

static err_code linear_run(const bound_linear *l, device *d, tensor *y, const tensor *x, bool add,
                           err *e)
{
    if (l->w4.q.data) return op_gemm_w4(d, y, x, &l->w4, add, e);
    return op_gemm(d, y, x, &l->dense, l->bias.data ? &l->bias : NULL, add, e);
}

/* Runs `n` linears of one input into adjacent columns of `y`. */
static err_code linears_run(const bound_linear *l, int n, device *d, const tensor *y,
                            const tensor *x, err *e)
{
    int64_t at = 0;
    for (int i = 0; i < n; i++) {
        tensor cols = tensor_cols(y, at, l[i].n);
        TRY(linear_run(&l[i], d, &cols, x, false, e));
        at += l[i].n;
    }
    return OK;
}

/* Norm of x into h, `n` linears of it into adjacent columns of y, with `glu` silu of the first half
 * of these times the second; at once where the device can and nobody looks at h. */
static err_code norm_linears(const bound_linear *l, int n, device *d, tensor *y, tensor *h,
                             const tensor *x, const tensor *norm, float eps, bool glu, tap_fn tap,
                             void *tap_ctx, tensor_role role, int32_t layer, err *e)
{
    if (!tap && n == 1 && l->w4.q.data)
        return op_norm_gemm_w4(d, y, h, x, norm, eps, &l->w4, glu, e);
    TRY(op_rmsnorm(d, h, x, norm, eps, e));
    if (tap) TRY(tap(tap_ctx, role, layer, h, e));
    TRY(linears_run(l, n, d, y, h, e));
    if (!glu) return OK;
    tensor gate = tensor_cols(y, 0, y->shape[1] / 2);
    const tensor up = tensor_cols(y, y->shape[1] / 2, y->shape[1] / 2);
    return op_glu(d, &gate, &gate, &up, e);
}

/* [m, c1, c2, D] over rows of `t`, from column `at`; c1 steps by step1 columns, c2 by D. */
static tensor heads_view(const tensor *t, int64_t at, int64_t c1, int64_t step1, int64_t c2,
                         int64_t hd)
{
    const tensor cols = tensor_cols(t, at, t->shape[1] - at);
    return (tensor){.data = cols.data,
                    .dt = t->dt,
                    .mem = t->mem,
                    .ndim = 4,
                    .shape = {t->shape[0], c1, c2, hd},
                    .stride = {t->stride[0], step1, hd, 1}};
}

static tensor drop_dim2(const tensor *t)
{
    tensor r = *t;
    r.ndim = 3;
    r.shape[2] = t->shape[3];
    r.stride[2] = 1;
    return r;
}

typedef struct {
    tensor q, k, v; /* [m, kv_heads, heads/kv_heads, D], [m, kv_heads, D] twice */
} qkv_view;

/* The three forms differ in views alone. */
static qkv_view qkv_split(const model_desc *m, const tensor *qkv)
{
    const int64_t hd = m->head_dim, kvh = m->kv_heads, share = m->heads / m->kv_heads;
    const bool grouped = m->qkv == QKV_GROUPED;
    const int64_t q_step = grouped ? (share + 2) * hd : share * hd, kv_step = grouped ? q_step : hd;
    const int64_t k_at = grouped ? share * hd : kvh * share * hd,
                  v_at = k_at + (grouped ? hd : kvh * hd);
    const tensor k = heads_view(qkv, k_at, kvh, kv_step, 1, hd);
    const tensor v = heads_view(qkv, v_at, kvh, kv_step, 1, hd);
    return (qkv_view){heads_view(qkv, 0, kvh, q_step, share, hd), drop_dim2(&k), drop_dim2(&v)};
}

/* RMSNorm of each head's rows in place (families with a norm on q and k). */
static err_code heads_norm(device *d, const tensor *t, const tensor *w, float eps, err *e)
{
    const size_t size = dtype_bytes(t->dt);
    const int64_t inner = t->ndim == 4 ? t->shape[2] : 1, hd = t->shape[t->ndim - 1];
    for (int64_t i = 0; i < t->shape[1] * inner; i++) {
        const int64_t at = i / inner * t->stride[1] + i % inner * hd;
        tensor head = *t;
        head.data = (char *)t->data + (size_t)at * size;
        head.ndim = 2;
        head.shape[1] = hd;
        head.stride[1] = 1;
        TRY(op_rmsnorm(d, &head, &head, w, eps, e));
    }
    return OK;
}

/* Norm, q, k and v. *v: where they lie. */
static err_code attention_in(const block *b, device *d, block_scratch *s, const tensor *x,
                             tensor *qkv, qkv_view *v, tap_fn tap, void *tap_ctx, err *e)
{
    const model_desc *m = b->m;
    tensor h = tensor_2d(s->narrow.data, dev_act(d), x->shape[0], m->hidden);
    *qkv = tensor_2d(s->wide.data, dev_act(d), x->shape[0], q_cols(m) + 2 * kv_cols(m));
    h.mem = qkv->mem = x->mem;
    TRY(norm_linears(b->qkv, b->n_qkv, d, qkv, &h, x, &b->attn_norm, m->norm_eps, false, tap,
                     tap_ctx, ROLE_QKV, b->layer, e));
    *v = qkv_split(m, qkv);
    if (m->qk_norm) {
        TRY(heads_norm(d, &v->q, &b->q_norm, m->norm_eps, e));
        TRY(heads_norm(d, &v->k, &b->k_norm, m->norm_eps, e));
    }
    return OK;
}

/* Attention of rotated q and the projection behind it, added to x. `a` act [m, heads*D] is its
 * scratch. */
static float attention_scale(const model_desc *m) { return 1.0f / sqrtf((float)m->head_dim); }

static err_code attention(const block *b, device *d, block_scratch *s, const rope_spec *rope,
                          tensor *x, const kv_layer *kv, const batch_rows *rows, tap_fn tap,
                          void *tap_ctx, err *e)
{
    tensor qkv, a = tensor_2d(s->narrow.data, dev_act(d), x->shape[0], q_cols(b->m));
    qkv_view v;
    a.mem = x->mem;
    TRY(attention_in(b, d, s, x, &qkv, &v, tap, tap_ctx, e));
    TRY(op_rope_attn(d, &a, &v.q, &v.k, &v.v, rope, rows, kv, attention_scale(b->m),
                     model_window(b->m, b->layer), e));
    if (tap) TRY(tap(tap_ctx, ROLE_O, b->layer, &a, e));
    return linear_run(&b->o, d, x, &a, true, e);
}

static err_code feed_forward(const block *b, device *d, block_scratch *s, tensor *x, tap_fn tap,
                             void *tap_ctx, err *e)
{
    const model_desc *m = b->m;
    tensor h = tensor_2d(s->narrow.data, dev_act(d), x->shape[0], m->hidden);
    tensor both = tensor_2d(s->wide.data, dev_act(d), x->shape[0], 2 * (int64_t)m->ffn);
    h.mem = both.mem = x->mem;
    tensor gate = tensor_cols(&both, 0, m->ffn);

    TRY(norm_linears(b->gate_up, b->n_gate_up, d, &both, &h, x, &b->ffn_norm, m->norm_eps, true,
                     tap, tap_ctx, ROLE_GATE, b->layer, e));
    if (tap) TRY(tap(tap_ctx, ROLE_DOWN, b->layer, &gate, e));
    return linear_run(&b->down, d, x, &gate, true, e);
}

err_code block_forward(const block *b, device *d, block_scratch *s, const rope_spec *rope,
                       tensor *x, const kv_layer *kv, const batch_rows *rows, tap_fn tap,
                       void *tap_ctx, err *e)
{
    assert(x->shape[0] <= s->rows && narrow_cols(b->m) <= s->narrow_cols &&
           wide_cols(b->m) <= s->wide_cols);
    err_code rc = attention(b, d, s, rope, x, kv, rows, tap, tap_ctx, e);
    if (rc == OK) rc = feed_forward(b, d, s, x, tap, tap_ctx, e);
    return rc == OK ? OK : err_wrap(e, "layer %d", b->layer);
}

err_code block_feed_forward(const block *b, device *d, block_scratch *s, tensor *x, tap_fn tap,
                            void *tap_ctx, err *e)
{
    assert(x->shape[0] <= s->rows && wide_cols(b->m) <= s->wide_cols);
    const err_code rc = feed_forward(b, d, s, x, tap, tap_ctx, e);
    return rc == OK ? OK : err_wrap(e, "layer %d", b->layer);
}

/* The picked rows of q|k|v lie in `narrow`, which holds rows of at least q's width. */
int32_t block_tail_rows(const model_desc *m, int32_t rows)
{
    return (int32_t)(rows * narrow_cols(m) / (q_cols(m) + 2 * kv_cols(m)));
}

err_code block_forward_tail(const block *b, device *d, block_scratch *s, const rope_spec *rope,
                            const tensor *x, tensor *out, const tensor *picks, const kv_layer *kv,
                            const batch_rows *rows, const batch_rows *picked, err *e)
{
    const model_desc *m = b->m;
    const int64_t n = picks->shape[0];
    tensor all, few = tensor_2d(s->narrow.data, dev_act(d), n, q_cols(m) + 2 * kv_cols(m));
    tensor a = tensor_2d(s->wide.data, dev_act(d), n, q_cols(m));
    qkv_view v;
    few.mem = a.mem = x->mem;
    assert(x->shape[0] <= s->rows && n <= block_tail_rows(m, s->rows));
    err_code rc = attention_in(b, d, s, x, &all, &v, NULL, NULL, e);
    if (rc == OK) rc = op_rope_kv(d, &v.q, &v.k, &v.v, rope, rows, kv, e);
    if (rc == OK && n > 0) {
        rc = op_embed(d, &few, &all, picks, e); /* a gather of rows, as the next */
        if (rc == OK) rc = op_embed(d, out, x, picks, e);
        v = qkv_split(m, &few);
        if (rc == OK)
            rc = op_attn(d, &a, &v.q, kv, picked, attention_scale(m), model_window(m, b->layer), e);
        if (rc == OK) rc = linear_run(&b->o, d, out, &a, true, e);
        if (rc == OK) rc = feed_forward(b, d, s, out, NULL, NULL, e);
    }
    return rc == OK ? OK : err_wrap(e, "layer %d", b->layer);
}
