/* Corrected weights. */
#include "awq/correct.h"

#include <string.h>

#include "awq/cholesky.h"
#include "base/mem.h"

#define ROWS       CORRECT_ROWS
#define AT_ONCE    1024 /* rows that are solved together */
#define MAX_RAISES 6    /* of the ridge, each tenfold */

size_t correct_bytes(int64_t k) { return 3 * ROWS * (size_t)k * sizeof(float); }

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
        bool positive;
        TRY(cholesky_factor(b->d, factor, k, &positive, e));
        if (positive) return OK;
    }
    return err_set(e, E_INPUT,
                   "layer %d: %s: second moments cannot be factored, whatever the ridge",
                   (int)b->layer, role_name(r));
}

/* ---- rows ---- */

typedef struct {
    float *to;
    const float *from;
    float by;
    int64_t k;
} row_job;

static void add_row(void *ctx, int64_t i, int worker)
{
    const row_job *j = ctx;
    (void)worker;
    for (int64_t q = 0; q < j->k; q++) j->to[i * j->k + q] += j->by * j->from[i * j->k + q];
}

/* W cross + o->resid * resid of rows [from, from+n) into y [n,k]; w: the rows in f32. In f32 where
 * it is solved: what the solve makes of errors of 16 bits costs perplexity. */
static err_code pull(const quant_block *b, const chain_moments *m, const correct_opts *o,
                     const tensor *w, int64_t from, bool f32, tensor *y, err *e)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    if (f32)
        TRY(op_product(b->d, y, 1.f, w, &m->cross, false, e));
    else
        TRY(op_matmul(b->d, y, w, &m->cross, e));
    if (!m->resid.data) return OK;
    const float *resid = (const float *)m->resid.data + from * k;
    pool_run(dev_pool(b->d), add_row, &(row_job){y->data, resid, (float)o->resid, k}, n);
    return OK;
}

err_code correct_weights(const quant_block *b, tensor_role r, const chain_moments *m,
                         const float *factor, const correct_opts *o, tensor *out, err *e)
{
    const int64_t k = out->shape[1];
    linear_view v;
    void *mem;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    TRY(mem_alloc(&mem, AT_ONCE * (size_t)k, sizeof(float), "corrected rows", e));
    err_code rc = OK;
    for (int64_t at = 0; at < out->shape[0] && rc == OK; at += AT_ONCE) {
        const int64_t n = out->shape[0] - at < AT_ONCE ? out->shape[0] - at : AT_ONCE;
        tensor w = tensor_rows(out, at, n), y = tensor_2d(mem, DT_F32, n, k);
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = fold_rows(&w, &v.dense, NULL, at, n, b->layer, r, e)) != OK) break;
        if ((rc = pull(b, m, o, &w, at, true, &y, e)) != OK) break;
        if ((rc = cholesky_solve(b->d, factor, k, mem, n, e)) != OK) break;
        pool_run(dev_pool(b->d), add_row, &(row_job){w.data, mem, 1.f, k}, n);
    }
    mem_free(mem);
    return rc;
}

err_code correct_pull(const quant_block *b, tensor_role r, const chain_moments *m,
                      const correct_opts *o, tensor *y, err *e)
{
    linear_view v;
    void *mem;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    const int64_t rows = v.dense.shape[0], k = v.dense.shape[1];
    TRY(mem_alloc(&mem, ROWS * (size_t)k, sizeof(float), "rows to compare", e));
    err_code rc = OK;
    for (int64_t at = 0; at < rows && rc == OK; at += ROWS) {
        const int64_t n = rows - at < ROWS ? rows - at : ROWS;
        tensor w = tensor_2d(mem, DT_F32, n, k), part = tensor_rows(y, at, n);
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = fold_rows(&w, &v.dense, NULL, at, n, b->layer, r, e)) != OK) break;
        rc = pull(b, m, o, &w, at, false, &part, e);
    }
    mem_free(mem);
    return rc;
}

/* Rows of errors and of what they miss, each on its own. */
typedef struct {
    float *x;        /* [n,k] rounded weights, then less w: errors */
    const float *w;  /* [n,k] */
    const float *y;  /* [n,k], NULL: none */
    double *product; /* [n] x.y */
    int64_t k;
} error_job;

static void error_row(void *ctx, int64_t i, int worker)
{
    const error_job *j = ctx;
    float *x = j->x + i * j->k;
    const float *w = j->w + i * j->k;
    double sum = 0;
    (void)worker;
    for (int64_t q = 0; q < j->k; q++) x[q] -= w[q];
    for (int64_t q = 0; j->y && q < j->k; q++) sum += (double)x[q] * j->y[i * j->k + q];
    j->product[i] = sum;
}

err_code correct_loss(const quant_block *b, tensor_role r, const chain_moments *m, const tensor *y,
                      rounded_rows rounded, void *ctx, double *loss, err *e)
{
    linear_view v;
    void *mem;
    double quad[ROWS], product[ROWS];
    *loss = 0;
    TRY(weights_linear(b->src, r, b->layer, -1, &v, e));
    const int64_t rows = v.dense.shape[0], k = v.dense.shape[1];
    TRY(mem_alloc(&mem, 2 * ROWS * (size_t)k, sizeof(float), "rows to compare", e));
    float *at_w = mem, *at_x = at_w + ROWS * k;
    err_code rc = OK;
    for (int64_t at = 0; at < rows && rc == OK; at += ROWS) {
        const int64_t n = rows - at < ROWS ? rows - at : ROWS;
        tensor w = tensor_2d(at_w, DT_F32, n, k), x = tensor_2d(at_x, DT_F32, n, k),
               out = tensor_1d(quad, DT_F64, n);
        error_job j = {at_x, at_w, (const float *)y->data + at * k, product, k};
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = fold_rows(&w, &v.dense, NULL, at, n, b->layer, r, e)) != OK) break;
        if ((rc = rounded(ctx, at, n, &x, e)) != OK) break;
        pool_run(dev_pool(b->d), error_row, &j, n);
        if ((rc = op_quad(b->d, &out, &x, &m->h, e)) != OK) break;
        for (int64_t i = 0; i < n; i++) *loss += quad[i] - 2 * product[i];
    }
    mem_free(mem);
    return rc;
}

err_code correct_distance(const quant_block *b, tensor_role r, const tensor *w, const tensor *h,
                          rounded_rows rounded, void *ctx, double *loss, err *e)
{
    const int64_t rows = w->shape[0], k = w->shape[1];
    double quad[ROWS], none[ROWS];
    void *mem;
    *loss = 0;
    TRY(mem_alloc(&mem, ROWS * (size_t)k, sizeof(float), "rows to compare", e));
    err_code rc = OK;
    for (int64_t at = 0; at < rows && rc == OK; at += ROWS) {
        const int64_t n = rows - at < ROWS ? rows - at : ROWS;
        const float *want = (const float *)w->data + at * k;
        tensor x = tensor_2d(mem, DT_F32, n, k), out = tensor_1d(quad, DT_F64, n);
        if ((rc = rounded(ctx, at, n, &x, e)) != OK) break;
        pool_run(dev_pool(b->d), error_row, &(error_job){mem, want, NULL, none, k}, n);
        if ((rc = op_quad(b->d, &out, &x, h, e)) != OK) break;
        for (int64_t i = 0; i < n; i++) *loss += quad[i];
    }
    mem_free(mem);
    return rc == OK ? OK : err_wrap(e, "%s", role_name(r));
}
