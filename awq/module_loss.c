/* Module losses: each pass of windows runs once as it is, then once per candidate. */
#include "awq/module_loss.h"

#include <assert.h>
#include <string.h>

#include "awq/on_device_internal.h"
#include "base/mem.h"
#include "kernels/quant_group.h"
#include "runtime/layer_walk.h"

typedef struct {
    const quant_block *b;
    const smooth_group *g;
    bool attn;
    int64_t k, mid; /* inputs of the targets; inputs of the linear that ends the module */
    dev_buf weights_buf, input_buf, base_buf, try_buf, up_buf, out_buf, sums_buf;
    double *sums;      /* host, a row each */
    tensor weights[4]; /* act [n,k]: the targets under the candidate */
    block variant;     /* the bound block with those */
    tensor input;      /* act [rows,k] FFN only: the norm's output */
    tensor base;       /* act [rows,mid] unrounded input of the ending linear */
} module_job;

static tensor matrix(const device *d, void *data, dtype dt, int64_t n, int64_t k)
{
    tensor t = tensor_2d(data, dt, n, k);
    t.mem = dev_mem(d);
    return t;
}

/* ---- capturing ---- */

typedef struct {
    device *d;
    tensor_role role;
    void *data; /* act rows behind one another */
    tensor got;
} capture;

static err_code capture_tap(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    capture *c = ctx;
    (void)layer;
    if (role != c->role) return OK;
    c->got = matrix(c->d, c->data, dev_act(c->d), x->shape[0], x->shape[1]);
    TRY(op_mix(c->d, &c->got, 1.f, x, 0.f, NULL, e));
    return err_set(e, E_CANCELED, "captured"); /* ends the pass: nothing behind is needed */
}

/* ---- the two modules up to the linear that ends them ---- */

static err_code attn_mid(const module_job *j, const block *b, int32_t first, int32_t n, void *to,
                         tensor *mid, err *e)
{
    capture c = {.d = j->b->d, .role = ROLE_O, .data = to};
    TRY(layer_walk_pass(j->b->walk, b, first, n, capture_tap, &c, NULL, e));
    *mid = c.got;
    return OK;
}

static err_code ffn_mid(const module_job *j, const block *b, void *to, tensor *mid, err *e)
{
    const int64_t rows = j->input.shape[0];
    const dtype act = dev_act(j->b->d);
    tensor gate = matrix(j->b->d, to, act, rows, j->mid),
           up = matrix(j->b->d, j->up_buf.data, act, rows, j->mid);
    const bound_linear *l = b->gate_up;
    TRY(op_gemm(j->b->d, &gate, &j->input, &l[0].dense, l[0].bias.data ? &l[0].bias : NULL, false,
                e));
    TRY(op_gemm(j->b->d, &up, &j->input, &l[1].dense, l[1].bias.data ? &l[1].bias : NULL, false,
                e));
    TRY(op_glu(j->b->d, &gate, &gate, &up, e));
    *mid = gate;
    return OK;
}

static err_code run_mid(module_job *j, const block *b, int32_t first, int32_t n, void *to,
                        tensor *mid, err *e)
{
    return j->attn ? attn_mid(j, b, first, n, to, mid, e) : ffn_mid(j, b, to, mid, e);
}

/* ---- candidates ---- */

/* weights = Q(W s) / s of a target, tile by tile. */
static err_code round_on_host(module_job *j, int t, const float *s, err *e)
{
    const quant_block *b = j->b;
    const tensor_role r = j->g->targets[t];
    const int64_t step = tile_rows(b->scratch, j->k), groups = j->k / b->o->group,
                  n = j->weights[t].shape[0];
    const fold_linear f = {r, NULL, (float *)(uintptr_t)s};
    tensor col = tensor_1d((float *)(uintptr_t)s, DT_F32, j->k);
    linear_view v;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        tensor w = {.data = b->scratch->w}, out = tensor_rows(&j->weights[t], at, rows);
        tensor scale = tensor_2d(b->scratch->scale, DT_F16, rows, groups);
        tensor zero = tensor_2d(b->scratch->zero, DT_U8, rows, groups);
        TRY(fold_rows(&w, &v.dense, &f, at, rows, b->layer, r, e));
        TRY(op_quant_range(b->d, &scale, &zero, &w, NULL, b->o->group, e));
        TRY(op_quant_error(b->d, &out, &w, &scale, &zero, &col, b->o->group, e)); /* Q(W s)/s - W */
        TRY(fold_rows(&w, &v.dense, NULL, at, rows, b->layer, r, e));
        for (int64_t i = 0; i < rows * j->k; i++) ((float *)out.data)[i] += ((float *)w.data)[i];
    }
    return OK;
}

static err_code round_on_device(module_job *j, int t, const float *s, err *e)
{
    const quant_block *b = j->b;
    const int64_t n = j->weights[t].shape[0], step = dev_step(b->dev, j->k);
    const tensor col = dev_1d(b->dev, b->dev->col, DT_F32, j->k);
    tensor all;
    TRY(dev_put(b->dev, b->dev->col, s, (size_t)j->k * sizeof *s, e));
    TRY(dev_weights(b, j->g->targets[t], &all, e));
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        const tensor w = tensor_rows(&all, at, rows);
        tensor x = dev_2d(b->dev, b->dev->tile[0], DT_F32, rows, j->k),
               out = tensor_rows(&j->weights[t], at, rows);
        TRY(op_try_factors(b->d, &x, &w, &col, b->o->group, e));
        TRY(op_mix(b->d, &out, 1.f, &x, 1.f, &w, e));
    }
    return OK;
}

static err_code round_targets(module_job *j, const float *s, err *e)
{
    for (int t = 0; t < j->g->n_targets; t++)
        TRY((j->b->dev ? round_on_device : round_on_host)(j, t, s, e));
    return OK;
}

static err_code add_loss(module_job *j, tensor *mid, double *loss, err *e)
{
    device *d = j->b->d;
    const block *b = layer_walk_block(j->b->walk);
    const bound_linear *last = j->attn ? &b->o : &b->down;
    const int64_t rows = mid->shape[0];
    tensor out = matrix(d, j->out_buf.data, dev_resid(d), rows, last->n);
    tensor sums = tensor_1d(j->sums_buf.data, DT_F64, rows),
           host = tensor_1d(j->sums, DT_F64, rows);
    sums.mem = dev_mem(d);
    TRY(op_mix(d, mid, 1.f, mid, -1.f, &j->base, e));
    TRY(op_gemm(d, &out, mid, &last->dense, NULL, false, e));
    TRY(op_row_dots(d, &sums, &out, &out, e));
    TRY(dev_copy(d, &host, &sums, e));
    TRY(dev_sync(d, e));
    for (int64_t i = 0; i < rows; i++) *loss += j->sums[i];
    return OK;
}

static err_code run_pass(module_job *j, int32_t first, int32_t n, const float *s, int n_cand,
                         double *loss, err *e)
{
    const block *bound = layer_walk_block(j->b->walk);
    tensor mid;
    if (!j->attn) {
        capture c = {.d = j->b->d, .role = ROLE_GATE, .data = j->input_buf.data};
        TRY(layer_walk_pass(j->b->walk, bound, first, n, capture_tap, &c, NULL, e));
        j->input = c.got;
    }
    TRY(run_mid(j, bound, first, n, j->base_buf.data, &j->base, e));
    for (int i = 0; i < n_cand; i++) {
        TRY(job_check(j->b->j, e));
        TRY(round_targets(j, s + (int64_t)i * j->k, e));
        TRY(run_mid(j, &j->variant, first, n, j->try_buf.data, &mid, e));
        TRY(add_loss(j, &mid, &loss[i], e));
    }
    return OK;
}

/* ---- set-up ---- */

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t attn_width(const model_desc *m) { return (int64_t)m->heads * m->head_dim; }

static int64_t target_rows(const model_desc *m, bool attn)
{
    return attn ? attn_width(m) + 2 * (int64_t)m->kv_heads * m->head_dim : 2 * (int64_t)m->ffn;
}

size_t module_loss_bytes(const device *d, const model_desc *m, int64_t pass_rows)
{
    const int64_t mid = most(attn_width(m), m->ffn),
                  n = most(target_rows(m, true), target_rows(m, false));
    const size_t act = dtype_bytes(dev_act(d)), f = sizeof(float);
    return (size_t)(n * m->hidden + pass_rows * (m->hidden + 3 * mid)) * act +
           (size_t)(pass_rows * m->hidden) * f + (size_t)pass_rows * 2 * sizeof(double);
}

static err_code bind_variant(module_job *j, err *e)
{
    const quant_block *b = j->b;
    const dtype act = dev_act(b->d);
    j->variant = *layer_walk_block(b->walk);
    bound_linear *l = j->attn ? j->variant.qkv : j->variant.gate_up;
    assert((j->attn ? j->variant.n_qkv : j->variant.n_gate_up) ==
           j->g->n_targets); /* dense ones are never fused */
    TRY(dev_alloc(&j->weights_buf, b->d,
                  (size_t)(target_rows(b->m, j->attn) * j->k) * dtype_bytes(act),
                  "candidate weights", e));
    uint8_t *at = j->weights_buf.data;
    for (int t = 0; t < j->g->n_targets; t++) {
        l[t].dense = j->weights[t] = matrix(b->d, at, act, l[t].n, j->k);
        at += (size_t)(l[t].n * j->k) * dtype_bytes(act);
    }
    return OK;
}

static err_code open_job(module_job *j, int64_t rows, err *e)
{
    device *d = j->b->d;
    const size_t act = dtype_bytes(dev_act(d)), f = sizeof(float), k = (size_t)j->k,
                 n = (size_t)rows, mid = n * (size_t)j->mid * act;
    const struct {
        dev_buf *buf;
        size_t bytes;
    } room[] = {{&j->base_buf, mid},
                {&j->try_buf, mid},
                {&j->up_buf, j->attn ? 0 : mid},
                {&j->input_buf, j->attn ? 0 : n * k * act},
                {&j->out_buf, n * (size_t)j->b->m->hidden * f},
                {&j->sums_buf, n * sizeof(double)}};
    void *sums;
    TRY(mem_alloc(&sums, n, sizeof(double), "module loss", e));
    j->sums = sums;
    TRY(bind_variant(j, e));
    for (size_t i = 0; i < sizeof room / sizeof *room; i++)
        if (room[i].bytes) TRY(dev_alloc(room[i].buf, d, room[i].bytes, "module loss", e));
    return OK;
}

err_code module_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                       double *loss, err *e)
{
    const bool attn = g->source == ROLE_ATTN_NORM;
    module_job j = {.b = b,
                    .g = g,
                    .attn = attn,
                    .k = b->m->hidden,
                    .mid = attn ? attn_width(b->m) : b->m->ffn};
    const int32_t per_pass = layer_walk_windows_per_pass(b->walk),
                  windows = layer_walk_windows(b->walk);
    const int64_t seqlen = layer_walk_states(b->walk).shape[0] / windows;
    memset(loss, 0, (size_t)n * sizeof *loss);
    err_code rc = open_job(&j, per_pass * seqlen, e);
    for (int32_t at = 0; at < windows && rc == OK; at += per_pass)
        rc = run_pass(&j, at, windows - at < per_pass ? windows - at : per_pass, s, n, loss, e);
    dev_buf *const bufs[] = {&j.weights_buf, &j.input_buf, &j.base_buf, &j.try_buf,
                             &j.up_buf,      &j.out_buf,   &j.sums_buf};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    mem_free(j.sums);
    return rc;
}
