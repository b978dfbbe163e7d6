/* Comparing. A window goes through both models in pieces, so that memory does not grow with it;
 * each row is summed by one thread, rows in order. */
#include "runtime/compare.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"

#define PIECE 128 /* tokens of a step */

enum { MODEL, REFERENCE };

typedef struct {
    double nll[2], kl;
    bool same;
} row_result;

typedef struct {
    model *m[2];
    int32_t vocab;
    float *logits[2];    /* [PIECE,vocab] */
    row_result *row;     /* [PIECE] */
    const int32_t *next; /* [PIECE] targets of the piece */
} comparing;

/* Sums over windows of a mean and of its square. */
typedef struct {
    double sum, squares;
} spread;

static void spread_add(spread *s, double mean)
{
    s->sum += mean;
    s->squares += mean * mean;
}

static double spread_error(const spread *s, int64_t n)
{
    const double mean = s->sum / (double)n, wide = s->squares / (double)n - mean * mean;
    return n > 1 && wide > 0 ? sqrt(wide / (double)(n - 1)) : 0;
}

/* ---- a row ---- */

double compare_log_sum(const float *l, int32_t n, int32_t *best)
{
    double sum = 0;
    *best = 0;
    for (int32_t i = 1; i < n; i++)
        if (l[i] > l[*best]) *best = i;
    for (int32_t i = 0; i < n; i++) sum += exp((double)l[i] - l[*best]);
    return l[*best] + log(sum);
}

double compare_divergence(const float *a, double la, const float *b, double lb, int32_t n)
{
    double kl = 0;
    for (int32_t v = 0; v < n; v++) {
        const double q = b[v] - lb;
        kl += exp(q) * (q - (a[v] - la));
    }
    return kl;
}

static void compare_row(void *ctx, int64_t i, int worker)
{
    const comparing *c = ctx;
    const float *a = c->logits[MODEL] + i * c->vocab, *b = c->logits[REFERENCE] + i * c->vocab;
    int32_t best[2];
    const double la = compare_log_sum(a, c->vocab, &best[MODEL]),
                 lb = compare_log_sum(b, c->vocab, &best[REFERENCE]);
    (void)worker;
    c->row[i] = (row_result){.nll = {la - a[c->next[i]], lb - b[c->next[i]]},
                             .kl = compare_divergence(a, la, b, lb, c->vocab),
                             .same = best[MODEL] == best[REFERENCE]};
}

/* ---- a window ---- */

static err_code step(const comparing *c, int which, const int32_t *at, int32_t n, const job *j,
                     err *e)
{
    const step_seq s = {
        .slot = 0, .tokens = at, .n_tokens = n, .n_out = n, .logits = c->logits[which]};
    return model_step(c->m[which], &s, 1, j, e);
}

typedef struct {
    double nll[2], kl;
    int64_t same;
} window_result;

static err_code run_window(comparing *c, const int32_t *ids, int32_t losses, window_result *w,
                           const job *j, err *e)
{
    *w = (window_result){0};
    for (int i = 0; i < 2; i++) model_seq_end(c->m[i], 0);
    for (int32_t at = 0; at < losses; at += PIECE) {
        const int32_t n = losses - at < PIECE ? losses - at : PIECE;
        for (int i = 0; i < 2; i++) TRY(step(c, i, ids + at, n, j, e));
        c->next = ids + at + 1;
        pool_run(dev_pool(model_device(c->m[0])), compare_row, c, n);
        for (int32_t i = 0; i < n; i++) {
            w->nll[0] += c->row[i].nll[0] / losses;
            w->nll[1] += c->row[i].nll[1] / losses;
            w->kl += c->row[i].kl / losses;
            w->same += c->row[i].same;
        }
    }
    if (isfinite(w->nll[0]) && isfinite(w->nll[1]) && isfinite(w->kl)) return OK;
    return err_set(e, E_INPUT, "%s: expected finite logits: weights or activations are not",
                   isfinite(w->nll[0]) ? "the model compared with" : "the model");
}

/* ---- all ---- */

static err_code room(comparing *c, err *e)
{
    for (int i = 0; i < 2; i++)
        TRY(mem_alloc((void **)&c->logits[i], PIECE * (size_t)c->vocab, sizeof(float), "logits",
                      e));
    return mem_alloc((void **)&c->row, PIECE, sizeof(row_result), "rows", e);
}

static ppl_result side(const spread *s, int64_t windows, int32_t losses)
{
    const double nll = s->sum / (double)windows;
    return (ppl_result){.ppl = exp(nll),
                        .nll = nll,
                        .nll_error = spread_error(s, windows),
                        .tokens = windows * losses,
                        .windows = windows};
}

static err_code run_all(comparing *c, const int32_t *ids, int64_t windows, int32_t window,
                        compare_result *r, const job *j, err *e)
{
    spread nll[2] = {{0}}, diff = {0}, kl = {0};
    int64_t same = 0;
    for (int64_t i = 0; i < windows; i++) {
        window_result w;
        job_step(j, "comparison", "window", i, windows);
        const err_code rc = run_window(c, ids + i * window, window - 1, &w, j, e);
        if (rc != OK) return rc == E_INPUT ? err_wrap(e, "window %" PRId64, i) : rc;
        for (int k = 0; k < 2; k++) spread_add(&nll[k], w.nll[k]);
        spread_add(&diff, w.nll[MODEL] - w.nll[REFERENCE]);
        spread_add(&kl, w.kl);
        same += w.same;
    }
    job_step(j, "comparison", "window", windows, windows);
    r->model = side(&nll[MODEL], windows, window - 1);
    r->reference = side(&nll[REFERENCE], windows, window - 1);
    r->nll = diff.sum / (double)windows;
    r->nll_error = spread_error(&diff, windows);
    r->kl = kl.sum / (double)windows;
    r->kl_error = spread_error(&kl, windows);
    r->top1 = (double)same / (double)r->model.tokens;
    return OK;
}

err_code compare_run(compare_result *r, model *m, model *reference, const int32_t *ids, int64_t n,
                     const ppl_opts *o, const job *j, err *e)
{
    comparing c = {.m = {m, reference}, .vocab = model_desc_of(m)->vocab};
    const int32_t other = model_desc_of(reference)->vocab;
    const double begin = clock_s();
    int64_t windows;
    *r = (compare_result){0};
    if (other != c.vocab)
        return err_set(e, E_INPUT, "comparison: vocabulary: expected %d ids, found %d",
                       (int)c.vocab, (int)other);
    TRY(ppl_windows(&windows, m, n, o, e));
    TRY(ppl_windows(&windows, reference, n, o, e));
    err_code rc = room(&c, e);
    if (rc == OK) rc = run_all(&c, ids, windows, o->window, r, j, e);
    for (int i = 0; i < 2; i++) {
        model_seq_end(c.m[i], 0);
        mem_free(c.logits[i]);
    }
    mem_free(c.row);
    r->seconds = clock_s() - begin;
    return rc;
}
