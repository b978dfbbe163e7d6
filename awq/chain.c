/* Two streams through one block. */
#include "awq/chain.h"

#include <assert.h>
#include <string.h>

#include "awq/chain_shared.h"
#include "awq/moments.h"
#include "base/mem.h"
#include "formats/calib_file.h"
#include "kernels/search_ops.h"

enum { SLOTS = 7 };

typedef struct {
    float *h, *cross, *resid; /* [k,k], [k,k], [hidden,k] with the widest k */
} moment_room;

struct chain {
    device *d;
    layer_walk *walk;
    const model_desc *m;
    chain_windows windows;
    int64_t widest;
    block variant; /* the bound block with what is rounded; its buffers belong to the walk */
    arena mem;
    tensor_role role[SLOTS];
    float *weights[SLOTS]; /* [n,k] */
    int n_roles;
    moment_room set[2]; /* trained on, held out */
    float *scratch;     /* [longest,k] for what asks for it */
    float *pulled;      /* [n,k] the same */
    float *input;       /* [pass rows, k] 16-bit input */
    float *residual;    /* [pass rows, hidden] 16-bit residual stream */
    const fold *fold;   /* of the block, where the rounded stream has a cache of its own; or NULL */
    float *bias[3];     /* of q, k and v with their factors */
    bool cached;        /* keys and values of the rounded stream go through a coarser cache */
    tensor_role tap;
    int32_t first; /* window of the pass */
};

static int64_t widest_of(const model_desc *m)
{
    tensor_role roles[SLOTS];
    const int n = model_block_linears(m, roles);
    int64_t k = 0;
    for (int i = 0; i < n; i++)
        if (model_linear_k(m, roles[i]) > k) k = model_linear_k(m, roles[i]);
    return k;
}

/* ---- memory ---- */

typedef struct {
    void **out;
    int64_t count; /* floats */
} chain_part;

static int parts_of(chain *c, const model_desc *m, int64_t rows, chain_part *p)
{
    const int64_t k = widest_of(m), longest = k > m->hidden ? k : m->hidden;
    int64_t most = 0;
    int n = 0;
    c->n_roles = model_block_linears(m, c->role);
    for (int i = 0; i < c->n_roles; i++) {
        const int64_t count = model_linear_n(m, c->role[i]) * model_linear_k(m, c->role[i]);
        p[n++] = (chain_part){(void **)&c->weights[i], count};
        most = count > most ? count : most;
    }
    p[n++] = (chain_part){(void **)&c->pulled, most};
    for (int i = 0; i < 2; i++) {
        p[n++] = (chain_part){(void **)&c->set[i].h, k * k};
        p[n++] = (chain_part){(void **)&c->set[i].cross, k * k};
        p[n++] = (chain_part){(void **)&c->set[i].resid, m->hidden * k};
    }
    for (int i = 0; i < 3; i++)
        p[n++] = (chain_part){(void **)&c->bias[i],
                              (int64_t)(m->heads + 2 * m->kv_heads) * m->head_dim};
    p[n++] = (chain_part){(void **)&c->scratch, longest * k};
    p[n++] = (chain_part){(void **)&c->input, rows * k};
    p[n++] = (chain_part){(void **)&c->residual, rows * m->hidden};
    return n;
}

enum { PARTS_MAX = SLOTS + 13 };

size_t chain_bytes(const model_desc *m, int64_t pass_rows)
{
    chain c = {0};
    chain_part p[PARTS_MAX];
    const int n = parts_of(&c, m, pass_rows, p);
    size_t sum = 0;
    for (int i = 0; i < n; i++) sum += arena_need((size_t)p[i].count * sizeof(float));
    return sum;
}

size_t chain_split_bytes(const device *d, const model_desc *m, int64_t rows)
{
    return (size_t)(rows * m->hidden) * dtype_bytes(dev_resid(d));
}

static err_code take_room(chain *c, err *e)
{
    chain_part p[PARTS_MAX];
    const int64_t rows = c->windows.per_pass * c->windows.seqlen;
    const int n = parts_of(c, c->m, rows, p);
    const op_limits lim = {.rows = (int32_t)rows,
                           .k = c->widest > c->windows.seqlen ? c->widest : c->windows.seqlen,
                           .n = c->widest,
                           .heads = 1,
                           .head_dim = c->m->head_dim,
                           .max_kv = 1,
                           .seqs = 1};
    TRY(arena_init(&c->mem, chain_bytes(c->m, rows), "rounded block", e));
    for (int i = 0; i < n; i++)
        TRY(arena_get(&c->mem, p[i].out, (size_t)p[i].count * sizeof(float), e));
    TRY(ops_reserve(c->d, &lim, e));
    return layer_walk_split(c->walk, e);
}

err_code chain_open(chain **out, device *d, layer_walk *w, const model_desc *m,
                    const tensor *held_out, kv_format cache, err *e)
{
    void *mem;
    if (dev_mem(d) != MEM_HOST)
        return err_set(e, E_UNSUPPORTED, "rounded inputs: expected the CPU device, got %s",
                       dev_name(d));
    TRY(mem_alloc(&mem, 1, sizeof(chain), "rounded block", e));
    chain *c = mem;
    c->d = d;
    c->walk = w;
    c->m = m;
    c->windows = chain_windows_of(w, held_out);
    c->widest = widest_of(m);
    c->cached = cache != KV_16;
    err_code rc = take_room(c, e);
    if (rc == OK && c->cached) rc = layer_walk_cache(w, cache, e);
    if (rc != OK) {
        chain_close(&c);
        return rc;
    }
    layer_walk_use(w, 1);
    *out = c;
    return OK;
}

void chain_close(chain **c)
{
    if (!*c) return;
    arena_free(&(*c)->mem);
    mem_free(*c);
    *c = NULL;
}

bool chain_holds_out(const chain *c) { return c->windows.holds_out; }

/* ---- the rounded block ---- */

err_code chain_layer(chain *c, err *e)
{
    c->fold = NULL;
    return chain_variant(&c->variant, c->walk, c->m, e);
}

/* Biases of q, k and v as the cache will see what they are added to. */
static err_code fold_biases(chain *c, err *e)
{
    static const tensor_role split[] = {ROLE_Q, ROLE_K, ROLE_V};
    block *b = &c->variant;
    for (int i = 0; i < b->n_qkv; i++) {
        const tensor_role r = b->n_qkv == 1 ? ROLE_QKV : split[i];
        const int64_t n = b->qkv[i].bias.shape[0];
        if (!b->qkv[i].bias.data) continue;
        TRY(fold_bias(c->bias[i], &b->qkv[i].bias, fold_find(c->fold, r), b->layer, r, e));
        b->qkv[i].bias = tensor_1d(c->bias[i], DT_F32, n);
    }
    return OK;
}

err_code chain_fold(chain *c, const fold *f, err *e)
{
    if (!c->cached) return OK;
    c->fold = f;
    return fold_biases(c, e);
}

static int slot_of(const chain *c, tensor_role r)
{
    int i = 0;
    while (i < c->n_roles && c->role[i] != r) i++;
    assert(i < c->n_roles);
    return i;
}

tensor chain_room(chain *c, tensor_role r)
{
    return tensor_2d(c->weights[slot_of(c, r)], DT_F32, model_linear_n(c->m, r),
                     model_linear_k(c->m, r));
}

tensor chain_pulled(chain *c, tensor_role r)
{
    return tensor_2d(c->pulled, DT_F32, model_linear_n(c->m, r), model_linear_k(c->m, r));
}

float *chain_scratch(chain *c) { return c->scratch; }

/* What comes out of q, k and v then has the factors that it will have in the cache, and o takes
 * them back. */
static void fold_room(chain *c, tensor_role r)
{
    const fold_linear *f = c->fold ? fold_find(c->fold, r) : NULL;
    const tensor w = chain_room(c, r);
    const bool row = calib_tap_of(r) == ROLE_QKV && f && f->row, col = r == ROLE_O && f && f->col;
    if (!row && !col) return;
    for (int64_t i = 0; i < w.shape[0]; i++) {
        float *x = (float *)w.data + i * w.shape[1];
        for (int64_t k = 0; k < w.shape[1]; k++) x[k] = row ? x[k] / f->row[i] : x[k] * f->col[k];
    }
}

void chain_put(chain *c, tensor_role r)
{
    fold_room(c, r);
    chain_bound(&c->variant, r)->dense = chain_room(c, r);
}

/* ---- moments ---- */

static err_code keep_input(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    chain *c = ctx;
    const size_t row = (size_t)x->shape[1] * sizeof(float);
    (void)layer;
    if (role != c->tap) return OK;
    for (int64_t i = 0; i < x->shape[0]; i++)
        memcpy(c->input + i * x->shape[1], (const float *)x->data + i * x->stride[0], row);
    if (chain_adds(role)) {
        const tensor r = layer_walk_residual(c->walk, x->shape[0]);
        memcpy(c->residual, r.data, tensor_bytes(&r));
    }
    return chain_seen(e);
}

typedef struct {
    float *to;         /* rows close together */
    const float *less; /* rows `stride` apart */
    int64_t k, stride;
} less_job;

static void less_row(void *ctx, int64_t i, int worker)
{
    const less_job *j = ctx;
    (void)worker;
    for (int64_t q = 0; q < j->k; q++) j->to[i * j->k + q] -= j->less[i * j->stride + q];
}

/* to [n,k] += (a - b)^T x over the rows of a window; a is lost. */
static err_code add_cross(chain *c, float *to, float *a, const float *b, int64_t stride, int64_t n,
                          const tensor *x, err *e)
{
    const tensor less = tensor_2d(a, DT_F32, x->shape[0], n);
    tensor y = tensor_2d(to, DT_F32, n, x->shape[1]);
    pool_run(dev_pool(c->d), less_row, &(less_job){a, b, n, stride}, x->shape[0]);
    return op_cross(c->d, &y, &less, x, e);
}

static err_code add_window(chain *c, const tensor *rows, int32_t i, err *e)
{
    const int64_t k = rows->shape[1], at = i * c->windows.seqlen, hidden = c->m->hidden;
    const tensor x = tensor_rows(rows, at, c->windows.seqlen);
    moment_room *s = &c->set[c->windows.holds_out && c->windows.held_out[c->first + i]];
    tensor h = tensor_2d(s->h, DT_F32, k, k);
    TRY(op_gram(c->d, &h, &x, e));
    TRY(add_cross(c, s->cross, c->input + at * k, x.data, x.stride[0], k, &x, e));
    if (!chain_adds(c->tap)) return OK;
    const tensor r = layer_walk_residual(c->walk, rows->shape[0]);
    return add_cross(c, s->resid, c->residual + at * hidden, (const float *)r.data + at * hidden,
                     hidden, hidden, &x, e);
}

/* o's input without the factors of v. Nothing behind reads it: the pass ends here. */
static void unfold_input(const chain *c, const tensor *x)
{
    const fold_linear *f = c->fold && c->tap == ROLE_O ? fold_find(c->fold, ROLE_O) : NULL;
    for (int64_t i = 0; f && f->col && i < x->shape[0]; i++)
        for (int64_t k = 0; k < x->shape[1]; k++)
            ((float *)x->data)[i * x->stride[0] + k] *= f->col[k];
}

static err_code compare_input(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    chain *c = ctx;
    (void)layer;
    if (role != c->tap) return OK;
    unfold_input(c, x);
    for (int32_t i = 0; i < x->shape[0] / c->windows.seqlen; i++) TRY(add_window(c, x, i, e));
    return chain_seen(e);
}

static err_code finish(chain *c, moment_room *s, int64_t k, chain_moments *out, err *e)
{
    out->h = tensor_2d(s->h, DT_F32, k, k);
    out->cross = tensor_2d(s->cross, DT_F32, k, k);
    out->resid = tensor_2d(chain_adds(c->tap) ? s->resid : NULL, DT_F32, c->m->hidden, k);
    TRY(op_gram_finish(c->d, &out->h, e));
    return moments_finite(s->h, k + 1, k, c->variant.layer, c->tap, e);
}

err_code chain_gather(chain *c, tensor_role r, const job *j, chain_moments *train,
                      chain_moments *held, err *e)
{
    const int64_t k = model_linear_k(c->m, r);
    err_code rc = OK;
    c->tap = calib_tap_of(r);
    for (int i = 0; i < 2; i++) {
        memset(c->set[i].h, 0, (size_t)(k * k) * sizeof(float));
        memset(c->set[i].cross, 0, (size_t)(k * k) * sizeof(float));
        memset(c->set[i].resid, 0, (size_t)(c->m->hidden * k) * sizeof(float));
    }
    for (c->first = 0; c->first < c->windows.n && rc == OK; c->first += c->windows.per_pass) {
        const int32_t n = chain_windows_at(&c->windows, c->first);
        if ((rc = job_check(j, e)) != OK) break;
        layer_walk_use(c->walk, 0);
        rc = layer_walk_pass(c->walk, layer_walk_block(c->walk), c->first, n, keep_input, c, NULL,
                             e);
        layer_walk_use(c->walk, 1);
        if (rc == OK)
            rc = layer_walk_pass(c->walk, &c->variant, c->first, n, compare_input, c, NULL, e);
    }
    if (rc == OK) rc = finish(c, &c->set[0], k, train, e);
    if (rc == OK) rc = finish(c, &c->set[1], k, held, e);
    return rc;
}

/* ---- the next layer ---- */

static err_code advance(chain *c, const block *b, int32_t first, int32_t n, err *e)
{
    const tensor states = layer_walk_states(c->walk);
    tensor to = tensor_rows(&states, first * c->windows.seqlen, n * c->windows.seqlen), y;
    TRY(layer_walk_pass(c->walk, b, first, n, NULL, NULL, &y, e));
    TRY(dev_copy(c->d, &to, &y, e));
    return dev_sync(c->d, e);
}

err_code chain_advance(chain *c, const walk_progress *p, err *e)
{
    err_code rc = OK;
    for (int32_t at = 0; at < c->windows.n && rc == OK; at += c->windows.per_pass) {
        const int32_t n = chain_windows_at(&c->windows, at);
        if ((rc = job_check(p->j, e)) != OK) break;
        layer_walk_use(c->walk, 0);
        rc = advance(c, layer_walk_block(c->walk), at, n, e);
        layer_walk_use(c->walk, 1);
        if (rc == OK) rc = advance(c, &c->variant, at, n, e);
    }
    return rc;
}
