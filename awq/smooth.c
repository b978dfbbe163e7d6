/* Channel groups and the loss of candidates for their factors. */
#include "awq/smooth.h"

#include <math.h>
#include <string.h>

#include "awq/on_device.h"
#include "base/half.h"
#include "kernels/quant_group.h"

smooth_groups smooth_groups_of(const quant_block *b, smooth_vo vo)
{
    smooth_groups r = {0};
    for (int i = 0; i < b->fam->n_smooth && r.n < 3; i++) {
        const smooth_group *g = &b->fam->smooth[i];
        r.g[r.n] = (smooth_group){.source = g->source};
        for (int t = 0; t < g->n_targets;
             t++) /* fused and split projections are listed side by side */
            if (weights_has(b->src, g->targets[t], b->layer, -1))
                r.g[r.n].targets[r.g[r.n].n_targets++] = g->targets[t];
        r.n += r.g[r.n].n_targets > 0;
    }
    if (vo == VO_SHARED || (vo == VO_OWN && b->m->heads == b->m->kv_heads))
        r.g[r.n++] = (smooth_group){.source = ROLE_V, .targets = {ROLE_O}, .n_targets = 1};
    return r;
}

/* ---- weight statistics ---- */

typedef struct {
    const float *w; /* [n,k] */
    int64_t n, k;
    int32_t group;
    double eps, *sum;
} mean_job;

/* One group of columns, all rows of the tile. */
static void mean_group(void *ctx, int64_t item, int worker)
{
    const mean_job *j = ctx;
    const int64_t at = item * j->group;
    (void)worker;
    for (int64_t r = 0; r < j->n; r++) {
        const float *w = j->w + r * j->k + at;
        float most = 0.f;
        for (int32_t i = 0; i < j->group; i++) most = fmaxf(most, fabsf(w[i]));
        const double div = j->eps > 0 ? most + j->eps : most > 0.f ? most : 1e-4;
        for (int32_t i = 0; i < j->group; i++) j->sum[at + i] += fabsf(w[i]) / div;
    }
}

err_code smooth_weight_mean(const quant_block *b, const smooth_group *g, double eps, double *mean,
                            err *e)
{
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    int64_t rows = 0;
    if (b->dev) return dev_weight_mean(b, g, eps, mean, e);
    memset(mean, 0, (size_t)k * sizeof *mean);
    for (int t = 0; t < g->n_targets; t++) {
        linear_view v;
        TRY(weights_linear(b->src, g->targets[t], b->layer, -1, &v, e));
        const int64_t n = v.dense.shape[0], step = tile_rows(b->scratch, k);
        for (int64_t at = 0; at < n; at += step) {
            tensor w = {.data = b->scratch->w};
            TRY(fold_rows(&w, &v.dense, NULL, at, n - at < step ? n - at : step, b->layer,
                          g->targets[t], e));
            mean_job j = {w.data, w.shape[0], k, b->o->group, eps, mean};
            pool_run(dev_pool(b->d), mean_group, &j, k / b->o->group);
        }
        rows += n;
    }
    for (int64_t i = 0; i < k; i++) mean[i] /= (double)rows;
    return OK;
}

/* ---- factors ---- */

bool smooth_normalize(float *s, int64_t k, const bool *skip)
{
    float lo = INFINITY, hi = 0.f;
    for (int64_t i = 0; i < k; i++) {
        if (skip && skip[i]) continue;
        lo = fminf(lo, s[i]);
        hi = fmaxf(hi, s[i]);
    }
    const float mid = hi > 0.f ? sqrtf(hi) * sqrtf(lo) : 1.f; /* the product alone may leave f32 */
    for (int64_t i = 0; i < k; i++) {
        s[i] = skip && skip[i] ? 1.f : s[i] / mid;
        if (!(s[i] > 0.f && isfinite(s[i]))) return false;
    }
    return true;
}

static bool is_norm(tensor_role r) { return r == ROLE_ATTN_NORM || r == ROLE_FFN_NORM; }

err_code smooth_dead(const quant_block *b, const smooth_group *g, bool *dead, err *e)
{
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    tensor norm, w = tensor_1d(b->scratch->x, DT_F32, k);
    memset(dead, 0, (size_t)k * sizeof *dead);
    if (!is_norm(g->source)) return OK;
    TRY(weights_tensor(b->src, g->source, b->layer, &norm, e));
    tensor_convert(&w, &norm);
    for (int64_t i = 0; i < k; i++) dead[i] = b->scratch->x[i] == 0.f;
    return OK;
}

err_code smooth_fits(const quant_block *b, const smooth_group *g, const float *s, bool *fits,
                     err *e)
{
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    tensor norm, w = tensor_1d(b->scratch->x, DT_F32, k);
    *fits = true;
    if (!is_norm(g->source))
        return OK; /* the rows of a linear are quantized again, with scales of their own */
    TRY(weights_tensor(b->src, g->source, b->layer, &norm, e));
    tensor_convert(&w, &norm);
    for (int64_t i = 0; i < k; i++) {
        const float was = fabsf(b->scratch->x[i]), is = was / s[i];
        if (is > 65504.f || (was >= 0x1p-14f && is < 0x1p-14f)) *fits = false;
    }
    return OK;
}

/* ---- losses of candidates ---- */

typedef struct {
    const float *w, *s; /* [rows,k], [k] */
    float *out;
    int64_t k;
} scale_job;

static void scale_row(void *ctx, int64_t i, int worker)
{
    const scale_job *j = ctx;
    (void)worker;
    for (int64_t c = 0; c < j->k; c++) j->out[i * j->k + c] = j->w[i * j->k + c] * j->s[c];
}

/* Errors of the rows of w under the factors s into x. */
static err_code candidate_errors(const quant_block *b, const tensor *w, const float *s, float *x,
                                 err *e)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    quant_scratch *q = b->scratch;
    tensor y = tensor_2d(x, DT_F32, n, k), col = tensor_1d((float *)(uintptr_t)s, DT_F32, k);
    tensor scale = tensor_2d(q->scale, DT_F16, n, k / b->o->group),
           zero = tensor_2d(q->zero, DT_U8, n, k / b->o->group);
    pool_run(dev_pool(b->d), scale_row, &(scale_job){w->data, s, x, k}, n);
    TRY(op_quant_range(b->d, &scale, &zero, &y, NULL, b->o->group, e));
    return op_quant_error(b->d, &y, &y, &scale, &zero, &col, b->o->group, e);
}

/* Adds the losses of n candidates over the rows of w to loss: as many at once as there is room for
 * where H is whole, so that it is packed once for all of them. */
static err_code add_losses(const quant_block *b, const tensor *w, const float *s, int n,
                           const second_moment *h, double *loss, err *e)
{
    const int64_t rows = w->shape[0], k = w->shape[1];
    quant_scratch *q = b->scratch;
    const int most = h->full.data ? (int)quant_batch(q, rows, k) : 1;
    for (int at = 0; at < n; at += most) {
        const int count = n - at < most ? n - at : most;
        for (int c = 0; c < count; c++) {
            TRY(job_check(b->j, e));
            TRY(candidate_errors(b, w, s + (at + c) * k, q->x + c * rows * k, e));
        }
        const tensor x = tensor_2d(q->x, DT_F32, count * rows, k);
        tensor out = tensor_1d(q->row, DT_F64, count * rows);
        double part;
        if (!h->full.data) {
            TRY(moment_loss(b, &x, h, &part, e));
            loss[at] += part;
            continue;
        }
        TRY(op_quad(b->d, &out, &x, &h->full, e));
        for (int c = 0; c < count; c++) {
            part = 0;
            for (int64_t i = 0; i < rows; i++) part += q->row[c * rows + i];
            loss[at + c] += part;
        }
    }
    return OK;
}

/* One row of every `each`, the rest of w gone. */
static void thin_out(tensor *w, int64_t each)
{
    const int64_t k = w->shape[1], n = (w->shape[0] + each - 1) / each;
    float *p = w->data;
    for (int64_t i = 1; i < n; i++) memcpy(p + i * k, p + i * each * k, (size_t)k * sizeof *p);
    *w = tensor_2d(p, DT_F32, n, k);
}

err_code smooth_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                       int64_t each, double *loss, err *e)
{
    const int64_t k = model_linear_k(b->m, g->targets[0]), step = tile_rows(b->scratch, k);
    second_moment h;
    if (b->dev) return dev_losses(b, g, s, n, loss, e);
    memset(loss, 0, (size_t)n * sizeof *loss);
    TRY(moment_of(b, g->targets[0], &h, e)); /* targets share their input */
    for (int t = 0; t < g->n_targets; t++) {
        linear_view v;
        TRY(weights_linear(b->src, g->targets[t], b->layer, -1, &v, e));
        const int64_t rows = v.dense.shape[0];
        for (int64_t at = 0; at < rows; at += step) {
            tensor w = {.data = b->scratch->w};
            TRY(fold_rows(&w, &v.dense, NULL, at, rows - at < step ? rows - at : step, b->layer,
                          g->targets[t], e));
            thin_out(&w, each);
            TRY(add_losses(b, &w, s, n, &h, loss, e));
        }
    }
    return OK;
}
