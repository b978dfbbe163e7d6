/* Scoring. Sums are doubles in window order, so that neither threads nor batching show in the
 * result. */
#include "runtime/score.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"

/* ---- next token ---- */

static double log_sum_exp(const float *l, int32_t n)
{
    double top = -INFINITY, sum = 0;
    for (int32_t i = 0; i < n; i++) {
        if (l[i] > top) top = l[i];
    }
    for (int32_t i = 0; i < n; i++) sum += exp((double)l[i] - top);
    return top + log(sum);
}

/* Inserts into a list of n sorted by value; equal values stay in the order they came. */
static int32_t insert(id_logprob *list, int32_t n, int32_t cap, id_logprob x)
{
    int32_t at = n;
    while (at > 0 && list[at - 1].logprob < x.logprob) at--;
    if (at == cap) return n;
    const int32_t kept = n < cap ? n : cap - 1;
    memmove(list + at + 1, list + at, (size_t)(kept - at) * sizeof *list);
    list[at] = x;
    return kept + 1;
}

err_code score_next(model *m, const int32_t *ids, int32_t n, int32_t top, id_logprob *out,
                    int32_t *n_out, const job *j, err *e)
{
    const int32_t vocab = model_desc_of(m)->vocab;
    void *p;
    *n_out = 0;
    if (n < 1 || top < 1)
        return err_set(e, E_USAGE, "score: %d ids and a top of %d: expected 1 or more", n, top);
    TRY(mem_alloc(&p, (size_t)vocab, sizeof(float), "logits", e));
    float *logits = p;
    const step_seq s = {.slot = 0, .tokens = ids, .n_tokens = n, .n_out = 1, .logits = logits};
    model_seq_end(m, 0);
    err_code rc = model_step(m, &s, 1, j, e);
    model_seq_end(m, 0);
    const double norm = rc == OK ? log_sum_exp(logits, vocab) : 0;
    if (rc == OK && !isfinite(norm))
        rc = err_set(e, E_INPUT, "score: expected finite logits: weights or activations are not");
    if (rc == OK) {
        for (int32_t i = 0; i < vocab; i++)
            *n_out = insert(out, *n_out, top, (id_logprob){i, (double)logits[i] - norm});
    }
    mem_free(logits);
    return rc;
}

/* ---- perplexity ---- */

int32_t ppl_seqs(int32_t window, int32_t max_rows)
{
    const int32_t n = window > 1 ? max_rows / (window - 1) : 1;
    return n < 1 ? 1 : n;
}

typedef struct {
    step_seq *seqs; /* [batch] */
    float *nll;     /* [batch, window-1] */
    int32_t batch;
} ppl_work;

static void work_free(ppl_work *w)
{
    mem_free(w->seqs);
    mem_free(w->nll);
}

static err_code work_make(ppl_work *w, int32_t batch, int32_t window, err *e)
{
    void *p;
    memset(w, 0, sizeof *w);
    w->batch = batch;
    TRY(mem_alloc(&p, (size_t)batch, sizeof(step_seq), "windows", e));
    w->seqs = p;
    const err_code rc = mem_alloc(&p, (size_t)batch * (size_t)(window - 1), sizeof(float), "losses",
                                  e);
    w->nll = p;
    if (rc != OK) work_free(w);
    return rc;
}

/* Runs windows [first, first+n). The last token of a window is only ever a target. */
static err_code run_windows(model *m, ppl_work *w, const int32_t *ids, int64_t first, int32_t n,
                            int32_t window, const job *j, err *e)
{
    const int32_t losses = window - 1;
    for (int32_t i = 0; i < n; i++) {
        const int32_t *at = ids + (first + i) * window;
        w->seqs[i] = (step_seq){.slot = i,
                                .tokens = at,
                                .n_tokens = losses,
                                .n_out = losses,
                                .nll = w->nll + (size_t)i * (size_t)losses,
                                .targets = at + 1};
        model_seq_end(m, i);
    }
    const err_code rc = model_step(m, w->seqs, n, j, e);
    for (int32_t i = 0; i < n; i++) model_seq_end(m, i);
    return rc;
}

static double window_sum(const float *nll, int32_t n)
{
    double sum = 0;
    for (int32_t i = 0; i < n; i++) sum += nll[i];
    return sum;
}

err_code ppl_windows(int64_t *windows, const model *m, int64_t n, const ppl_opts *o, err *e)
{
    if (o->window < 2)
        return err_set(e, E_USAGE, "window: expected 2 or more tokens, got %d", o->window);
    if (o->window - 1 > model_session_len(m))
        return err_set(e, E_LIMIT, "window: %d tokens do not fit the session of %d", o->window,
                       model_session_len(m));
    *windows = n / o->window;
    if (o->max_windows > 0 && o->max_windows < *windows) *windows = o->max_windows;
    if (*windows < 1)
        return err_set(e, E_INPUT, "text of %" PRId64 " tokens: expected at least one window of %d",
                       n, o->window);
    return OK;
}

err_code ppl_run(ppl_result *r, model *m, const int32_t *ids, int64_t n, const ppl_opts *o,
                 const job *j, err *e)
{
    ppl_work w;
    int64_t windows = 0;
    double sum = 0, squares = 0;
    err_code rc = OK;
    memset(r, 0, sizeof *r);
    TRY(ppl_windows(&windows, m, n, o, e));
    const int32_t slots = model_plan_of(m)->max_seqs, losses = o->window - 1;
    const double begin = clock_s();
    TRY(work_make(&w, slots, o->window, e));
    for (int64_t at = 0; at < windows && rc == OK; at += slots) {
        const int32_t batch = windows - at < slots ? (int32_t)(windows - at) : slots;
        job_step(j, "perplexity", "window", at, windows);
        if ((rc = run_windows(m, &w, ids, at, batch, o->window, j, e)) != OK) break;
        for (int32_t i = 0; i < batch && rc == OK; i++) {
            const double s = window_sum(w.nll + (size_t)i * (size_t)losses, losses),
                         mean = s / losses;
            if (!isfinite(s))
                rc = err_set(e, E_INPUT,
                             "window %" PRId64 ": expected a finite loss, got %s: weights or "
                             "activations are not finite",
                             at + i, isnan(s) ? "nan" : "infinity");
            sum += s;
            squares += mean * mean;
        }
    }
    work_free(&w);
    if (rc != OK) return rc;
    job_step(j, "perplexity", "window", windows, windows);
    r->windows = windows;
    r->tokens = windows * losses;
    r->nll = sum / (double)r->tokens;
    r->ppl = exp(r->nll);
    const double spread = squares / (double)windows - r->nll * r->nll;
    if (windows > 1 && spread > 0) r->nll_error = sqrt(spread / (double)(windows - 1));
    r->seconds = clock_s() - begin;
    return OK;
}
