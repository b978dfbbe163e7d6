/* The ops that go over rows once: embed, rmsnorm, add, glu, nll, absstat. Rows are work items; a
 * few short rows run on the calling thread, where waking others would cost more than it saves. */
#include <math.h>

#include "kernels/cpu_ops.h"
#include "kernels/vec.h"

#define INLINE_BYTES (64 << 10) /* about 5 us of work */

typedef struct {
    tensor *y, *y2;
    const tensor *a, *b;
    float eps;
} rows_ctx;

static inline float *row_f32(const tensor *t, int64_t i)
{
    return (float *)t->data + i * t->stride[0];
}

static void run_rows(device *d, pool_fn fn, rows_ctx *c, int64_t rows, int64_t row_bytes)
{
    pool_run(rows * row_bytes <= INLINE_BYTES ? NULL : d->workers, fn, c, rows);
}

/* ---- embed ---- */

static void embed_row(void *ctx, int64_t i, int worker)
{
    const rows_ctx *c = ctx;
    const tensor *t = c->a;
    const int64_t n = t->shape[1], id = ((const int32_t *)c->b->data)[i];
    const char *src = (const char *)t->data + (size_t)(id * t->stride[0]) * dtype_bytes(t->dt);
    float *dst = row_f32(c->y, i);
    int64_t k = 0;
    (void)worker;
    for (; k + VL <= n; k += VL) vf_store(dst + k, vf_any(src, t->dt, k));
    if (k < n) vf_store_n(dst + k, vf_any_n(src, t->dt, k, n - k), n - k);
}

err_code CPU_FN(embed_cpu)(device *d, tensor *y, const tensor *table, const tensor *ids, err *e)
{
    rows_ctx c = {.y = y, .a = table, .b = ids};
    (void)e;
    run_rows(d, embed_row, &c, y->shape[0], 4 * y->shape[1]);
    return OK;
}

/* ---- rmsnorm ---- */

static void rmsnorm_row(void *ctx, int64_t i, int worker)
{
    const rows_ctx *c = ctx;
    const tensor *w = c->b;
    const int64_t n = c->a->shape[1];
    const float *x = row_f32(c->a, i);
    float *y = row_f32(c->y, i);
    vf s0 = vf_zero(), s1 = vf_zero();
    int64_t k = 0;
    (void)worker;
    for (; k + 2 * VL <= n; k += 2 * VL) {
        const vf a = vf_load(x + k), b = vf_load(x + k + VL);
        s0 = vf_fma(a, a, s0);
        s1 = vf_fma(b, b, s1);
    }
    for (; k < n; k += VL) {
        const vf a = vf_load_n(x + k, n - k < VL ? n - k : VL);
        s0 = vf_fma(a, a, s0);
    }
    const double mean = (double)vf_sum(vf_add(s0, s1)) / (double)n;
    const vf inv = vf_set((float)(1.0 / sqrt(mean + c->eps)));
    for (k = 0; k + VL <= n; k += VL)
        vf_store(y + k, vf_mul(vf_mul(vf_load(x + k), inv), vf_any(w->data, w->dt, k)));
    if (k < n) {
        const vf a = vf_mul(vf_load_n(x + k, n - k), inv);
        vf_store_n(y + k, vf_mul(a, vf_any_n(w->data, w->dt, k, n - k)), n - k);
    }
}

err_code CPU_FN(rmsnorm_cpu)(device *d, tensor *y, const tensor *x, const tensor *w, float eps,
                             err *e)
{
    rows_ctx c = {.y = y, .a = x, .b = w, .eps = eps};
    (void)e;
    run_rows(d, rmsnorm_row, &c, x->shape[0], 8 * x->shape[1]);
    return OK;
}

/* ---- add ---- */

static void add_row(void *ctx, int64_t i, int worker)
{
    const rows_ctx *c = ctx;
    const int64_t n = c->y->shape[1];
    const float *x = row_f32(c->a, i);
    float *y = row_f32(c->y, i);
    int64_t k = 0;
    (void)worker;
    for (; k + VL <= n; k += VL) vf_store(y + k, vf_add(vf_load(y + k), vf_load(x + k)));
    for (; k < n; k++) y[k] += x[k];
}

err_code CPU_FN(add_cpu)(device *d, tensor *y, const tensor *x, err *e)
{
    rows_ctx c = {.y = y, .a = x};
    (void)e;
    run_rows(d, add_row, &c, y->shape[0], 12 * y->shape[1]);
    return OK;
}

/* ---- glu ---- */

static inline vf glu(vf g, vf u)
{
    const vf one = vf_set(1.0f);
    return vf_mul(vf_div(g, vf_add(one, vf_exp(vf_sub(vf_zero(), g)))), u);
}

static void glu_row(void *ctx, int64_t i, int worker)
{
    const rows_ctx *c = ctx;
    const int64_t n = c->y->shape[1];
    const float *g = row_f32(c->a, i), *u = row_f32(c->b, i);
    float *y = row_f32(c->y, i);
    int64_t k = 0;
    (void)worker;
    for (; k + VL <= n; k += VL) vf_store(y + k, glu(vf_load(g + k), vf_load(u + k)));
    if (k < n) vf_store_n(y + k, glu(vf_load_n(g + k, n - k), vf_load_n(u + k, n - k)), n - k);
}

err_code CPU_FN(glu_cpu)(device *d, tensor *y, const tensor *gate, const tensor *up, err *e)
{
    rows_ctx c = {.y = y, .a = gate, .b = up};
    (void)e;
    run_rows(d, glu_row, &c, y->shape[0], 24 * y->shape[1]);
    return OK;
}

/* ---- nll ---- */

/* Where the row's maximum is first met. */
static int64_t first_of(const float *x, int64_t n, float top)
{
    int64_t k = 0;
    while (k < n && x[k] != top) k++;
    return k < n ? k : 0; /* all NaN: the reference says 0 */
}

static float row_max(const float *x, int64_t n)
{
    vf top = vf_set(-INFINITY);
    int64_t k = 0;
    for (; k + VL <= n; k += VL) top = vf_max(vf_load(x + k), top); /* a NaN never wins */
    float m = vf_hmax(top);
    for (; k < n; k++) m = x[k] > m ? x[k] : m;
    return m;
}

static void nll_row(void *ctx, int64_t i, int worker)
{
    const rows_ctx *c = ctx;
    const int64_t n = c->a->shape[1];
    const float *x = row_f32(c->a, i);
    const float top = row_max(x, n);
    double sum = 0;
    (void)worker;
    /* Blocks of f32 sums into a double: the error does not grow with the vocabulary. */
    for (int64_t b = 0; b < n; b += 1024) {
        const int64_t end = n - b < 1024 ? n : b + 1024;
        vf s = vf_zero();
        int64_t k = b;
        for (; k + VL <= end; k += VL)
            s = vf_add(s, vf_exp_neg(vf_sub(vf_load(x + k), vf_set(top))));
        float tail = vf_sum(s);
        for (; k < end; k++) tail += expf(x[k] - top);
        sum += tail;
    }
    const int32_t target = ((const int32_t *)c->b->data)[i];
    ((float *)c->y->data)[i] = (float)((double)top + log(sum) - x[target]);
    if (c->y2) ((int32_t *)c->y2->data)[i] = (int32_t)first_of(x, n, top);
}

err_code CPU_FN(nll_cpu)(device *d, tensor *nll, tensor *argmax, const tensor *logits,
                         const tensor *target, err *e)
{
    rows_ctx c = {.y = nll, .y2 = argmax, .a = logits, .b = target};
    (void)e;
    run_rows(d, nll_row, &c, logits->shape[0], 24 * logits->shape[1]);
    return OK;
}

/* ---- absstat ---- */

#define STAT_COLS 128 /* channels of one work item: their sums stay in L1 over all rows */

static void absstat_cols(void *ctx, int64_t item, int worker)
{
    const rows_ctx *c = ctx;
    const int64_t from = item * STAT_COLS, k = c->a->shape[1];
    const int64_t n = k - from < STAT_COLS ? k - from : STAT_COLS;
    float *max = (float *)c->y->data + from;
    double *sum = (double *)c->y2->data + from;
    (void)worker;
    for (int64_t r = 0; r < c->a->shape[0]; r++) {
        const float *x = row_f32(c->a, r) + from;
        for (int64_t j = 0; j < n; j++) {
            const float a = fabsf(x[j]);
            max[j] = a <= max[j] ? max[j] : a; /* a NaN stays visible */
            sum[j] += a;
        }
    }
}

err_code CPU_FN(absstat_cpu)(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e)
{
    rows_ctx c = {.y = absmax, .y2 = abssum, .a = x};
    (void)e;
    pool_run(d->workers, absstat_cols, &c, (x->shape[1] + STAT_COLS - 1) / STAT_COLS);
    return OK;
}
