/* Corrected weights. */
#include "awq/correct.h"

#include <string.h>

#include "awq/cholesky.h"
#include "awq/lapack.h"
#include "base/mem.h"

#define ROWS       CORRECT_ROWS
#define ITEM       64 /* rows of a pool item */
#define MAX_RAISES 6  /* of the ridge, each tenfold */

/* ---- the factor ---- */

static double mean_diagonal(const tensor *h)
{
    const int64_t k = h->shape[0];
    double sum = 0;
    for (int64_t i = 0; i < k; i++) sum += ((const float *)h->data)[i * k + i];
    return sum > 0 ? sum / (double)k : 1;
}

err_code correct_factor(const quant_block *b, tensor_role r, const chain_moments *m, float *factor,
                        const correct_opts *o, err *e)
{
    const int64_t k = m->h.shape[0];
    const double mean = mean_diagonal(&m->h);
    double ridge = o->ridge;
    for (int i = 0; i < MAX_RAISES; i++, ridge *= 10) {
        memcpy(factor, m->h.data, (size_t)(k * k) * sizeof *factor);
        for (int64_t j = 0; j < k; j++) factor[j * k + j] += (float)(ridge * mean);
        if (cholesky_factor(dev_pool(b->d), factor, k)) return OK;
    }
    return err_set(e, E_INPUT,
                   "layer %d: %s: second moments cannot be factored, whatever the ridge",
                   (int)b->layer, role_name(r));
}

/* ---- rows ---- */

/* W cross + o->resid * resid of rows [from, from+n) into y [n,k]; w: the rows in f32. */
static err_code pull(const quant_block *b, const chain_moments *m, const correct_opts *o,
                     const tensor *w, int64_t from, tensor *y, err *e)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    TRY(op_matmul(b->d, y, w, &m->cross, e));
    if (!m->resid.data) return OK;
    const float *resid = (const float *)m->resid.data + from * k;
    float *to = y->data;
    for (int64_t i = 0; i < n * k; i++) to[i] += (float)o->resid * resid[i];
    return OK;
}

/* Corrected rows: W into w, then each ITEM of them on its own. Products in f32 here: what the solve
 * makes of errors of 16 bits costs perplexity. */
typedef struct {
    const chain_moments *m;
    const float *factor;
    float resid;
    float *w, *y; /* [rows,k] */
    int64_t k, from, rows;
} correct_job;

static void correct_item(void *ctx, int64_t item, int worker)
{
    const correct_job *j = ctx;
    const int64_t at = item * ITEM, left = j->rows - at;
    const int k = (int)j->k, rows = (int)(left < ITEM ? left : ITEM);
    const float one = 1.f, none = 0.f;
    float *w = j->w + at * j->k, *y = j->y + at * j->k;
    (void)worker;
    sgemm_("N", "N", &k, &rows, &k, &one, j->m->cross.data, &k, w, &k, &none, y, &k);
    if (j->m->resid.data) {
        const float *resid = (const float *)j->m->resid.data + (j->from + at) * j->k;
        for (int64_t i = 0; i < rows * j->k; i++) y[i] += j->resid * resid[i];
    }
    cholesky_solve(j->factor, j->k, y, rows);
    for (int64_t i = 0; i < rows * j->k; i++) w[i] += y[i];
}

err_code correct_weights(const quant_block *b, tensor_role r, const chain_moments *m,
                         const float *factor, const correct_opts *o, tensor *out, err *e)
{
    const int64_t k = out->shape[1];
    linear_view v;
    void *mem;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    TRY(mem_alloc(&mem, ROWS * (size_t)k, sizeof(float), "corrected rows", e));
    err_code rc = OK;
    for (int64_t at = 0; at < out->shape[0] && rc == OK; at += ROWS) {
        const int64_t n = out->shape[0] - at < ROWS ? out->shape[0] - at : ROWS;
        tensor w = tensor_rows(out, at, n);
        correct_job j = {m, factor, (float)o->resid, w.data, mem, k, at, n};
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = fold_rows(&w, &v.dense, NULL, at, n, b->layer, r, e)) != OK) break;
        pool_run(dev_pool(b->d), correct_item, &j, (n + ITEM - 1) / ITEM);
    }
    mem_free(mem);
    return rc;
}

static err_code add_loss(const quant_block *b, const chain_moments *m, const tensor *x,
                         const tensor *y, double *loss, err *e)
{
    const int64_t n = x->shape[0], k = x->shape[1];
    double quad[ROWS];
    tensor out = tensor_1d(quad, DT_F64, n);
    TRY(op_quad(b->d, &out, x, &m->h, e));
    for (int64_t i = 0; i < n; i++) {
        const float *a = (const float *)x->data + i * k, *p = (const float *)y->data + i * k;
        double sum = 0;
        for (int64_t j = 0; j < k; j++) sum += (double)a[j] * p[j];
        *loss += quad[i] - 2 * sum;
    }
    return OK;
}

err_code correct_loss(const quant_block *b, tensor_role r, const chain_moments *m,
                      const correct_opts *o, rounded_rows rounded, void *ctx, double *loss, err *e)
{
    linear_view v;
    void *mem;
    *loss = 0;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    const int64_t rows = v.dense.shape[0], k = v.dense.shape[1];
    TRY(mem_alloc(&mem, 3 * ROWS * (size_t)k, sizeof(float), "rows to compare", e));
    float *at_w = mem, *at_y = at_w + ROWS * k, *at_x = at_y + ROWS * k;
    err_code rc = OK;
    for (int64_t at = 0; at < rows && rc == OK; at += ROWS) {
        const int64_t n = rows - at < ROWS ? rows - at : ROWS;
        tensor w = tensor_2d(at_w, DT_F32, n, k), y = tensor_2d(at_y, DT_F32, n, k),
               x = tensor_2d(at_x, DT_F32, n, k);
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = fold_rows(&w, &v.dense, NULL, at, n, b->layer, r, e)) != OK) break;
        if ((rc = pull(b, m, o, &w, at, &y, e)) != OK) break;
        if ((rc = rounded(ctx, at, n, &x, e)) != OK) break;
        for (int64_t i = 0; i < n * k; i++) at_x[i] -= at_w[i];
        rc = add_loss(b, m, &x, &y, loss, e);
    }
    mem_free(mem);
    return rc;
}

err_code correct_distance(const quant_block *b, tensor_role r, const tensor *w, const tensor *h,
                          rounded_rows rounded, void *ctx, double *loss, err *e)
{
    const int64_t rows = w->shape[0], k = w->shape[1];
    double quad[ROWS];
    void *mem;
    *loss = 0;
    TRY(mem_alloc(&mem, ROWS * (size_t)k, sizeof(float), "rows to compare", e));
    err_code rc = OK;
    for (int64_t at = 0; at < rows && rc == OK; at += ROWS) {
        const int64_t n = rows - at < ROWS ? rows - at : ROWS;
        const float *want = (const float *)w->data + at * k;
        tensor x = tensor_2d(mem, DT_F32, n, k), out = tensor_1d(quad, DT_F64, n);
        if ((rc = rounded(ctx, at, n, &x, e)) != OK) break;
        for (int64_t i = 0; i < n * k; i++) ((float *)mem)[i] -= want[i];
        if ((rc = op_quad(b->d, &out, &x, h, e)) != OK) break;
        for (int64_t i = 0; i < n; i++) *loss += quad[i];
    }
    mem_free(mem);
    return rc == OK ? OK : err_wrap(e, "%s", role_name(r));
}
