/* Module losses: each pass of windows runs once as it is, then once per candidate. */
#include "awq/module_loss.h"

#include <assert.h>
#include <string.h>

#include "kernels/quant_group.h"
#include "runtime/layer_walk.h"

typedef struct {
    const quant_block *b;
    const smooth_group *g;
    bool attn;
    int64_t k, mid; /* inputs of the targets; inputs of the linear that ends the module */
    dev_buf weights_buf, input_buf, base_buf, try_buf, up_buf, out_buf;
    tensor weights[4]; /* f32 [n,k]: the targets under the candidate */
    block variant;     /* the bound block with those */
    tensor input;      /* f32 [rows,k] FFN only: the norm's output */
    tensor base;       /* f32 [rows,mid] unrounded input of the ending linear */
} module_job;

/* ---- capturing ---- */

typedef struct {
    tensor_role role;
    void *data; /* f32 rows behind one another */
    tensor got;
} capture;

static err_code capture_tap(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    capture *c = ctx;
    (void)layer;
    if (role != c->role) return OK;
    c->got = tensor_2d(c->data, DT_F32, x->shape[0], x->shape[1]);
    for (int64_t i = 0; i < x->shape[0]; i++)
        memcpy((float *)c->data + i * x->shape[1], (const float *)x->data + i * x->stride[0],
               (size_t)x->shape[1] * sizeof(float));
    return err_set(e, E_CANCELED, "captured"); /* ends the pass: nothing behind is needed */
}

/* ---- the two modules up to the linear that ends them ---- */

static err_code attn_mid(const module_job *j, const block *b, int32_t first, int32_t n, void *to,
                         tensor *mid, err *e)
{
    capture c = {.role = ROLE_O, .data = to};
    TRY(layer_walk_pass(j->b->walk, b, first, n, capture_tap, &c, NULL, e));
    *mid = c.got;
    return OK;
}

static err_code ffn_mid(const module_job *j, const block *b, void *to, tensor *mid, err *e)
{
    const int64_t rows = j->input.shape[0];
    tensor gate = tensor_2d(to, DT_F32, rows, j->mid),
           up = tensor_2d(j->up_buf.data, DT_F32, rows, j->mid);
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

/* weights = Q(W s) / s for every target. */
static err_code round_targets(module_job *j, const float *s, err *e)
{
    const quant_block *b = j->b;
    const int64_t step = tile_rows(b->scratch, j->k), groups = j->k / b->o->group;
    tensor col = tensor_1d((float *)(uintptr_t)s, DT_F32, j->k);
    for (int t = 0; t < j->g->n_targets; t++) {
        const tensor_role r = j->g->targets[t];
        linear_view v;
        TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
        const int64_t n = v.dense.shape[0];
        fold_linear f = {r, NULL, (float *)(uintptr_t)s};
        for (int64_t at = 0; at < n; at += step) {
            const int64_t rows = n - at < step ? n - at : step;
            tensor w = {.data = b->scratch->w}, out = tensor_rows(&j->weights[t], at, rows);
            tensor scale = tensor_2d(b->scratch->scale, DT_F16, rows, groups);
            tensor zero = tensor_2d(b->scratch->zero, DT_U8, rows, groups);
            TRY(fold_rows(&w, &v.dense, &f, at, rows, b->layer, r, e));
            TRY(op_quant_range(b->d, &scale, &zero, &w, NULL, b->o->group, e));
            TRY(op_quant_error(b->d, &out, &w, &scale, &zero, &col, b->o->group,
                               e)); /* Q(W s)/s - W */
            TRY(fold_rows(&w, &v.dense, NULL, at, rows, b->layer, r, e));
            for (int64_t i = 0; i < rows * j->k; i++)
                ((float *)out.data)[i] += ((float *)w.data)[i];
        }
    }
    return OK;
}

static err_code add_loss(module_job *j, const tensor *mid, double *loss, err *e)
{
    const block *b = layer_walk_block(j->b->walk);
    const bound_linear *last = j->attn ? &b->o : &b->down;
    tensor out = tensor_2d(j->out_buf.data, DT_F32, mid->shape[0], last->n);
    float *x = mid->data;
    const float *base = j->base.data;
    for (int64_t i = 0; i < tensor_count(mid); i++) x[i] -= base[i];
    TRY(op_gemm(j->b->d, &out, mid, &last->dense, NULL, false, e));
    const float *y = out.data;
    double sum = 0;
    for (int64_t i = 0; i < tensor_count(&out); i++) sum += (double)y[i] * y[i];
    *loss += sum;
    return OK;
}

static err_code run_pass(module_job *j, int32_t first, int32_t n, const float *s, int n_cand,
                         double *loss, err *e)
{
    const block *bound = layer_walk_block(j->b->walk);
    tensor mid;
    if (!j->attn) {
        capture c = {.role = ROLE_GATE, .data = j->input_buf.data};
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

size_t module_loss_bytes(const model_desc *m, int64_t pass_rows)
{
    const int64_t mid = most(attn_width(m), m->ffn);
    const int64_t n = most(attn_width(m) + 2 * (int64_t)m->kv_heads * m->head_dim,
                           2 * (int64_t)m->ffn);
    return (size_t)(n * m->hidden + pass_rows * (2 * m->hidden + 3 * mid)) * sizeof(float);
}

static err_code bind_variant(module_job *j, err *e)
{
    const quant_block *b = j->b;
    int64_t rows = 0;
    j->variant = *layer_walk_block(b->walk);
    bound_linear *l = j->attn ? j->variant.qkv : j->variant.gate_up;
    assert((j->attn ? j->variant.n_qkv : j->variant.n_gate_up) ==
           j->g->n_targets); /* dense ones are never fused */
    for (int t = 0; t < j->g->n_targets; t++) rows += l[t].n;
    TRY(dev_alloc(&j->weights_buf, b->d, (size_t)(rows * j->k) * sizeof(float), "candidate weights",
                  e));
    float *at = j->weights_buf.data;
    for (int t = 0; t < j->g->n_targets; t++) {
        l[t].dense = j->weights[t] = tensor_2d(at, DT_F32, l[t].n, j->k);
        at += l[t].n * j->k;
    }
    return OK;
}

static err_code open_job(module_job *j, int64_t rows, err *e)
{
    device *d = j->b->d;
    const size_t mid = (size_t)(rows * j->mid) * sizeof(float);
    if (dev_mem(d) != MEM_HOST)
        return err_set(e, E_UNSUPPORTED, "module loss: expected the CPU device, got %s",
                       dev_name(d));
    TRY(bind_variant(j, e));
    TRY(dev_alloc(&j->base_buf, d, mid, "module loss", e));
    TRY(dev_alloc(&j->try_buf, d, mid, "module loss", e));
    TRY(dev_alloc(&j->out_buf, d, (size_t)(rows * j->b->m->hidden) * sizeof(float), "module loss",
                  e));
    if (j->attn) return OK;
    TRY(dev_alloc(&j->up_buf, d, mid, "module loss", e));
    return dev_alloc(&j->input_buf, d, (size_t)(rows * j->k) * sizeof(float), "module loss", e);
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
    dev_buf *const bufs[] = {&j.weights_buf, &j.input_buf, &j.base_buf,
                             &j.try_buf,     &j.up_buf,    &j.out_buf};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    return rc;
}
