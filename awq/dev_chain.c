/* Two streams through one block on a device. */
#include "awq/dev_chain.h"

#include <assert.h>

#include "awq/chain_shared.h"
#include "awq/moments.h"
#include "base/mem.h"

enum { SLOTS = 7 };

struct dev_chain {
    device *d;
    layer_walk *walk;
    const model_desc *m;
    chain_windows windows;
    int64_t widest;
    block variant; /* the bound block with what is rounded; its buffers belong to the walk */
    tensor_role role[SLOTS];
    f16 *weights[SLOTS]; /* [n,k] */
    int n_roles;
    dev_buf buf;
    float *h;            /* widest^2 trained on */
    bf16 *held;          /* widest^2 held out: it only tells ways apart */
    float *lack[2];      /* widest * hidden: trained on, held out */
    float *square;       /* widest^2 */
    void *input;         /* act [pass rows, widest]: the 16-bit input, then d */
    void *out;           /* act [pass rows, hidden]: what outputs lack */
    float *residual, *y; /* [pass rows, hidden] */
    float *diagonal;     /* [widest]; while o's input is gathered, the factors to take from it */
    float *host;         /* [widest] on the host */
    float *bias;         /* [columns of q, k and v] with their factors */
    bool cached;         /* keys and values of the rounded stream go through a coarser cache */
    const fold *fold;    /* of the block, where they do; or NULL */
    tensor col;          /* of the pass: o's factors, in diagonal; no data: none */
    tensor_role tap;
    bool half;  /* the states are those behind the attention */
    int stream; /* of a replayed pass */
    float share;
    int32_t first; /* window of the pass */
};

/* ---- memory ---- */

typedef struct {
    void **out;
    size_t bytes;
} chain_part;

enum { PARTS = SLOTS + 11 };

static int64_t qkv_columns(const model_desc *m)
{
    return (int64_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
}

static int parts_of(dev_chain *c, const device *d, const model_desc *m, int64_t rows,
                    chain_part p[PARTS])
{
    const size_t f = sizeof(float), act = dtype_bytes(dev_act(d)), pass = (size_t)rows,
                 hidden = (size_t)m->hidden;
    int n = 0;
    c->n_roles = model_block_linears(m, c->role);
    for (int i = 0; i < c->n_roles; i++)
        if (model_linear_k(m, c->role[i]) > c->widest) c->widest = model_linear_k(m, c->role[i]);
    const size_t k = (size_t)c->widest;
    p[n++] = (chain_part){(void **)&c->h, k * k * f};
    p[n++] = (chain_part){(void **)&c->held, k * k * sizeof(bf16)};
    for (int i = 0; i < 2; i++) p[n++] = (chain_part){(void **)&c->lack[i], k * hidden * f};
    p[n++] = (chain_part){(void **)&c->square, k * k * f};
    p[n++] = (chain_part){&c->input, pass * k * act};
    p[n++] = (chain_part){&c->out, pass * hidden * act};
    p[n++] = (chain_part){(void **)&c->residual, pass * hidden * f};
    p[n++] = (chain_part){(void **)&c->y, pass * hidden * f};
    p[n++] = (chain_part){(void **)&c->diagonal, k * f};
    p[n++] = (chain_part){(void **)&c->bias, (size_t)qkv_columns(m) * f};
    for (int i = 0; i < c->n_roles; i++)
        p[n++] = (chain_part){
            (void **)&c->weights[i],
            (size_t)(model_linear_n(m, c->role[i]) * model_linear_k(m, c->role[i])) * sizeof(f16)};
    return n;
}

static size_t lay_out(dev_chain *c, const device *d, const model_desc *m, int64_t rows,
                      uint8_t *base)
{
    chain_part p[PARTS];
    size_t at = 0;
    const int n = parts_of(c, d, m, rows, p);
    for (int i = 0; i < n; i++) {
        *p[i].out = base ? base + at : NULL;
        at += (p[i].bytes + 255) & ~(size_t)255;
    }
    return at;
}

size_t dev_chain_bytes(const device *d, const model_desc *m, int64_t pass_rows)
{
    dev_chain c = {0};
    return lay_out(&c, d, m, pass_rows, NULL);
}

static err_code take_room(dev_chain *c, err *e)
{
    const int64_t rows = c->windows.per_pass * c->windows.seqlen;
    void *host;
    TRY(dev_alloc(&c->buf, c->d, lay_out(c, c->d, c->m, rows, NULL), "rounded block", e));
    lay_out(c, c->d, c->m, rows, c->buf.data);
    TRY(mem_alloc(&host, (size_t)c->widest, sizeof(float), "rounded block", e));
    c->host = host;
    return layer_walk_split(c->walk, e);
}

err_code dev_chain_open(dev_chain **out, device *d, layer_walk *w, const model_desc *m,
                        const tensor *held_out, kv_format cache, err *e)
{
    void *mem;
    TRY(mem_alloc(&mem, 1, sizeof(dev_chain), "rounded block", e));
    dev_chain *c = mem;
    c->d = d;
    c->walk = w;
    c->m = m;
    c->windows = chain_windows_of(w, held_out);
    c->cached = cache != KV_16;
    err_code rc = take_room(c, e);
    if (rc == OK && c->cached) rc = layer_walk_cache(w, cache, e);
    if (rc != OK) {
        dev_chain_close(&c);
        return rc;
    }
    layer_walk_use(w, 1);
    *out = c;
    return OK;
}

void dev_chain_close(dev_chain **c)
{
    if (!*c) return;
    dev_free(&(*c)->buf);
    mem_free((*c)->host);
    mem_free(*c);
    *c = NULL;
}

dev_buf dev_chain_room(const dev_chain *c)
{
    dev_buf b = c->buf;
    b.bytes = (size_t)((uint8_t *)c->square - (uint8_t *)c->buf.data);
    return b;
}

dev_buf dev_chain_pass_room(const dev_chain *c)
{
    dev_buf b = c->buf;
    b.data = c->input;
    b.bytes = (size_t)((uint8_t *)c->diagonal - (uint8_t *)c->input);
    return b;
}

float *dev_chain_square(dev_chain *c) { return c->square; }

/* ---- the rounded block ---- */

err_code dev_chain_layer(dev_chain *c, err *e)
{
    c->half = false;
    c->fold = NULL;
    return chain_variant(&c->variant, c->walk, c->m, e);
}

void dev_chain_fold(dev_chain *c, const fold *f) { c->fold = c->cached ? f : NULL; }

static tensor on_device(const dev_chain *c, void *data, dtype dt, int64_t n, int64_t k)
{
    tensor t = tensor_2d(data, dt, n, k);
    t.mem = dev_mem(c->d);
    return t;
}

static tensor weights_of(const dev_chain *c, tensor_role r)
{
    int i = 0;
    while (i < c->n_roles && c->role[i] != r) i++;
    assert(i < c->n_roles);
    return on_device(c, c->weights[i], DT_F16, model_linear_n(c->m, r), model_linear_k(c->m, r));
}

/* The bias of q, k or v by the same factors as its rows. */
static err_code fold_bias_by(dev_chain *c, tensor_role r, const tensor *row, err *e)
{
    tensor *bias = &chain_bound(&c->variant, r)->bias;
    const int64_t n = model_linear_n(c->m, r), hd = c->m->head_dim,
                  before = r == ROLE_K   ? c->m->heads * hd
                           : r == ROLE_V ? (c->m->heads + c->m->kv_heads) * hd
                                         : 0;
    if (!bias->data) return OK;
    const tensor from = on_device(c, bias->data, bias->dt, n, 1);
    tensor to = on_device(c, c->bias + before, DT_F32, n, 1);
    TRY(op_scaled(c->d, &to, &from, NULL, row, e));
    *bias = tensor_1d(to.data, DT_F32, n);
    bias->mem = to.mem;
    return OK;
}

/* Behind a cache, what comes out of q, k and v keeps the factors that it will have there, and o
 * takes them back. */
err_code dev_chain_put(dev_chain *c, tensor_role r, const rounded_spec *spec, err *e)
{
    rounded_spec own = *spec;
    tensor w = weights_of(c, r);
    if (c->cached && calib_tap_of(r) == ROLE_QKV && spec->row) {
        own.row = NULL;
        TRY(fold_bias_by(c, r, spec->row, e));
    }
    if (c->cached && r == ROLE_O) own.col = NULL;
    TRY(op_rounded(c->d, &w, &own, e));
    chain_bound(&c->variant, r)->dense = w;
    return OK;
}

/* ---- moments ---- */

/* The attention is done with when gate's input is seen: nobody asks for what entered the block any
 * more, and what is left starts from here. */
static err_code enough(dev_chain *c, int stream, int64_t rows, err *e)
{
    if (c->tap == ROLE_GATE) {
        const tensor x = layer_walk_residual(c->walk, rows);
        TRY(layer_walk_store(c->walk, stream, c->first, &x, e));
    }
    return chain_seen(e);
}

static err_code keep_input(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    dev_chain *c = ctx;
    (void)layer;
    if (role != c->tap) return OK;
    tensor input = on_device(c, c->input, dev_act(c->d), x->shape[0], x->shape[1]),
           kept = on_device(c, c->residual, DT_F32, x->shape[0], c->m->hidden);
    TRY(op_mix(c->d, &input, 1.f, x, 0.f, NULL, e));
    if (chain_adds(role)) {
        const tensor r = layer_walk_residual(c->walk, x->shape[0]);
        TRY(op_mix(c->d, &kept, 1.f, &r, 0.f, NULL, e));
    }
    return enough(c, 0, x->shape[0], e);
}

/* d W^T + share r into c->out. */
static err_code outputs_lack(dev_chain *c, const tensor *lack, tensor *out, err *e)
{
    const int64_t rows = lack->shape[0];
    const block *b = layer_walk_block(c->walk);
    const tensor *w = c->tap == ROLE_O ? &b->o.dense : &b->down.dense;
    const tensor r = layer_walk_residual(c->walk, rows);
    tensor y = on_device(c, c->y, DT_F32, rows, c->m->hidden),
           kept = on_device(c, c->residual, DT_F32, rows, c->m->hidden);
    *out = on_device(c, c->out, dev_act(c->d), rows, c->m->hidden);
    TRY(op_gemm(c->d, &y, lack, w, NULL, false, e));
    TRY(op_mix(c->d, &kept, c->share, &kept, -c->share, &r, e));
    return op_mix(c->d, out, 1.f, &y, 1.f, &kept, e);
}

/* Factors of v in what stream 1 brings to o. */
static err_code put_factors(dev_chain *c, int64_t k, err *e)
{
    const fold_linear *f = c->fold && c->tap == ROLE_O ? fold_find(c->fold, ROLE_O) : NULL;
    c->col = tensor_1d(f && f->col ? c->diagonal : NULL, DT_F32, k);
    c->col.mem = dev_mem(c->d);
    if (!c->col.data) return OK;
    const tensor from = tensor_1d(f->col, DT_F32, k);
    return dev_copy(c->d, &c->col, &from, e);
}

/* Takes them out again, as many columns at a time as y has room for. Nothing behind reads x: the
 * pass ends here. */
static err_code unfold_input(dev_chain *c, const tensor *x, err *e)
{
    const int64_t k = x->shape[1], step = c->m->hidden;
    for (int64_t at = 0; at < k && c->col.data; at += step) {
        const int64_t n = k - at < step ? k - at : step;
        tensor part = tensor_cols(x, at, n), y = on_device(c, c->y, DT_F32, x->shape[0], n),
               col = tensor_1d((float *)c->col.data + at, DT_F32, n);
        col.mem = c->col.mem;
        TRY(op_scaled(c->d, &y, &part, &col, NULL, e));
        TRY(op_mix(c->d, &part, 1.f, &y, 0.f, NULL, e));
    }
    return OK;
}

static err_code compare_input(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    dev_chain *c = ctx;
    const int64_t k = x->shape[1];
    (void)layer;
    if (role != c->tap) return OK;
    tensor lack = on_device(c, c->input, dev_act(c->d), x->shape[0], k), out;
    TRY(unfold_input(c, x, e));
    TRY(op_mix(c->d, &lack, 1.f, &lack, -1.f, x, e));
    if (chain_adds(role)) {
        TRY(outputs_lack(c, &lack, &out, e));
        lack = out;
    }
    for (int32_t i = 0; i < x->shape[0] / c->windows.seqlen; i++) {
        const int set = c->windows.holds_out && c->windows.held_out[c->first + i];
        const tensor rows = tensor_rows(x, i * c->windows.seqlen, c->windows.seqlen),
                     less = tensor_rows(&lack, i * c->windows.seqlen, c->windows.seqlen);
        tensor h = on_device(c, set ? c->square : c->h, DT_F32, k, k),
               to = on_device(c, c->lack[set], DT_F32, lack.shape[1], k);
        TRY(op_gram(c->d, &h, &rows, e));
        TRY(op_cross(c->d, &to, &less, &rows, e));
    }
    return enough(c, 1, x->shape[0], e);
}

static err_code forward(dev_chain *c, const block *b, tensor *x, tap_fn tap, err *e)
{
    return (c->half ? layer_walk_feed_forward : layer_walk_forward)(c->walk, b, x, tap, c, e);
}

static err_code to_tap(dev_chain *c, int stream, const block *b, int32_t n, tap_fn tap, err *e)
{
    err failure = {0};
    tensor x;
    TRY(layer_walk_load(c->walk, stream, c->first, n, &x, e));
    const int32_t next = c->first + n;
    if (stream == 0)
        TRY(layer_walk_prefetch(c->walk, 1, c->first, n, e));
    else
        TRY(layer_walk_prefetch(c->walk, 0, next, chain_windows_at(&c->windows, next), e));
    const err_code rc = forward(c, b, &x, tap, &failure);
    if (rc == E_CANCELED) return OK;
    *e = failure;
    return rc;
}

static err_code finish(dev_chain *c, int set, int64_t k, int64_t n, dev_moments *out, err *e)
{
    tensor dev = tensor_1d(c->diagonal, DT_F32, k), host = tensor_1d(c->host, DT_F32, k);
    dev.mem = dev_mem(c->d);
    out->h = on_device(c, set ? c->square : c->h, DT_F32, k, k);
    out->lack = on_device(c, c->lack[set], DT_F32, n, k);
    TRY(op_gram_finish(c->d, &out->h, e));
    TRY(op_diagonal(c->d, &dev, &out->h, e));
    TRY(dev_copy(c->d, &host, &dev, e));
    TRY(dev_sync(c->d, e));
    return moments_finite(c->host, 1, k, c->variant.layer, c->tap, e);
}

err_code dev_chain_gather(dev_chain *c, tensor_role r, float share, const job *j,
                          dev_moments *train, dev_moments *held, err *e)
{
    const int64_t k = model_linear_k(c->m, r), n = chain_adds(r) ? c->m->hidden : k;
    c->tap = calib_tap_of(r);
    c->share = share;
    for (int i = 0; i < 2; i++) {
        tensor h = on_device(c, i ? c->square : c->h, DT_F32, k, k),
               lack = on_device(c, c->lack[i], DT_F32, n, k);
        TRY(op_zero(c->d, &h, e));
        TRY(op_zero(c->d, &lack, e));
    }
    TRY(put_factors(c, k, e));
    for (c->first = 0; c->first < c->windows.n; c->first += c->windows.per_pass) {
        const int32_t some = chain_windows_at(&c->windows, c->first);
        TRY(job_check(j, e));
        TRY(to_tap(c, 0, layer_walk_block(c->walk), some, keep_input, e));
        TRY(to_tap(c, 1, &c->variant, some, compare_input, e));
    }
    c->half = c->half || c->tap == ROLE_GATE;
    TRY(finish(c, 0, k, n, train, e));
    TRY(finish(c, 1, k, n, held, e));
    tensor half = on_device(c, c->held, DT_BF16, k, k);
    TRY(op_mix(c->d, &half, 1.f, &held->h, 0.f, NULL, e));
    held->h = half;
    return OK;
}

/* ---- the next layer ---- */

static err_code through(dev_chain *c, int stream, const block *b, int32_t n, err *e)
{
    const int32_t next = c->first + n;
    tensor x;
    TRY(layer_walk_load(c->walk, stream, c->first, n, &x, e));
    if (stream == 0)
        TRY(layer_walk_prefetch(c->walk, 1, c->first, n, e));
    else
        TRY(layer_walk_prefetch(c->walk, 0, next, chain_windows_at(&c->windows, next), e));
    TRY(forward(c, b, &x, NULL, e));
    return layer_walk_store(c->walk, stream, c->first, &x, e);
}

err_code dev_chain_advance(dev_chain *c, const walk_progress *p, err *e)
{
    for (c->first = 0; c->first < c->windows.n; c->first += c->windows.per_pass) {
        const int32_t n = chain_windows_at(&c->windows, c->first);
        TRY(job_check(p->j, e));
        TRY(through(c, 0, layer_walk_block(c->walk), n, e));
        TRY(through(c, 1, &c->variant, n, e));
    }
    return layer_walk_settle(c->walk, e);
}

static err_code keep_half(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    dev_chain *c = ctx;
    (void)layer;
    return role == ROLE_GATE ? enough(c, c->stream, x->shape[0], e) : OK;
}

err_code dev_chain_replay(dev_chain *c, const walk_progress *p, err *e)
{
    c->tap = ROLE_GATE;
    for (c->first = 0; c->first < c->windows.n; c->first += c->windows.per_pass) {
        const int32_t n = chain_windows_at(&c->windows, c->first);
        TRY(job_check(p->j, e));
        c->stream = 0;
        TRY(to_tap(c, 0, layer_walk_block(c->walk), n, keep_half, e));
        c->stream = 1;
        TRY(to_tap(c, 1, &c->variant, n, keep_half, e));
    }
    c->half = true;
    return dev_chain_advance(c, p, e);
}
