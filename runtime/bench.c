/* Timing of prefill and decode, and of plain reading for the share of the roof. */
#include "runtime/bench.h"

#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"

/* ---- reading ---- */

#define READ_ITEM ((size_t)1 << 20) /* bytes of one pool item */

typedef struct {
    uint64_t *data;
    size_t items;
    uint64_t *sums; /* [items] keeps the reads alive */
} read_job;

static void read_fill(void *ctx, int64_t item, int worker)
{
    const read_job *r = ctx;
    (void)worker;
    memset((char *)r->data + (size_t)item * READ_ITEM, (int)item, READ_ITEM);
}

static void read_item(void *ctx, int64_t item, int worker)
{
    const read_job *r = ctx;
    const uint64_t *p = r->data + (size_t)item * (READ_ITEM / 8);
    uint64_t s[8] = {0};
    (void)worker;
    for (size_t i = 0; i < READ_ITEM / 8; i += 8) {
        for (int k = 0; k < 8; k++) s[k] += p[i + (size_t)k];
    }
    r->sums[item] = s[0] + s[1] + s[2] + s[3] + s[4] + s[5] + s[6] + s[7];
}

err_code bench_read_rate(double *bytes_per_s, device *d, size_t bytes, int passes, const job *j,
                         err *e)
{
    read_job r = {.items = bytes / READ_ITEM ? bytes / READ_ITEM : 1};
    void *data = NULL, *sums = NULL;
    double best = 0;
    err_code rc;
    if (dev_kind_of(d) != DEV_CPU)
        return err_set(e, E_UNSUPPORTED, "memory rate: measured on the CPU only");
    if ((rc = mem_alloc(&data, r.items, READ_ITEM, "memory rate", e)) != OK) goto done;
    if ((rc = mem_alloc(&sums, r.items, sizeof(uint64_t), "memory rate", e)) != OK) goto done;
    r.data = data;
    r.sums = sums;
    pool_run(dev_pool(d), read_fill, &r, (int64_t)r.items);
    for (int i = 0; i < passes; i++) {
        if ((rc = job_check(j, e)) != OK) goto done;
        const double begin = clock_s();
        pool_run(dev_pool(d), read_item, &r, (int64_t)r.items);
        const double rate = (double)(r.items * READ_ITEM) / (clock_s() - begin);
        if (rate > best) best = rate;
    }
    *bytes_per_s = best;
done:
    mem_free(data);
    mem_free(sums);
    return rc;
}

/* ---- prefill and decode ---- */

typedef struct {
    int32_t *prompt; /* [batch, prompt_tokens] */
    int32_t *ids;    /* [batch] */
    float *nll;      /* [batch] of the ids: not a number when no logit is */
    step_seq *seqs;  /* [batch] */
    double prompt_s[BENCH_MAX_ROUNDS], new_s[BENCH_MAX_ROUNDS];
} bench_work;

static void work_free(bench_work **w)
{
    if (!*w) return;
    mem_free((*w)->prompt);
    mem_free((*w)->ids);
    mem_free((*w)->nll);
    mem_free((*w)->seqs);
    mem_free(*w);
    *w = NULL;
}

static err_code work_make(bench_work **out, const model *m, const bench_opts *o, err *e)
{
    const uint64_t vocab = (uint64_t)model_desc_of(m)->vocab;
    uint64_t x = o->seed;
    void *p;
    err_code rc;
    TRY(mem_alloc(&p, 1, sizeof(bench_work), "bench", e));
    bench_work *w = p;
    const size_t n = (size_t)o->batch, all = n * (size_t)o->prompt_tokens;
    if ((rc = mem_alloc(&p, all, sizeof(int32_t), "bench prompt", e)) != OK) goto done;
    w->prompt = p;
    if ((rc = mem_alloc(&p, n, sizeof(int32_t), "bench ids", e)) != OK) goto done;
    w->ids = p;
    if ((rc = mem_alloc(&p, n, sizeof(float), "bench losses", e)) != OK) goto done;
    w->nll = p;
    if ((rc = mem_alloc(&p, n, sizeof(step_seq), "bench sequences", e)) != OK) goto done;
    w->seqs = p;
    for (size_t i = 0; i < all; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u; /* Knuth's MMIX generator */
        w->prompt[i] = (int32_t)((x >> 33) % vocab);
    }
    *out = w;
    w = NULL;
done:
    work_free(&w);
    return rc;
}

/* One step of all sequences; the best ids come back, not the logits. The prompt's losses tell
 * whether there are numbers at all. */
static err_code run_step(model *m, bench_work *w, const bench_opts *o, const int32_t *tokens,
                         int32_t n, bool more, const job *j, err *e)
{
    const bool prompt = tokens == w->prompt;
    for (int32_t i = 0; i < o->batch; i++)
        w->seqs[i] = (step_seq){.slot = i,
                                .tokens = tokens + (size_t)i * (size_t)n,
                                .n_tokens = n,
                                .n_out = 1,
                                .argmax = &w->ids[i],
                                .nll = prompt ? &w->nll[i] : NULL,
                                .targets = w->prompt,
                                .more = more};
    TRY(model_step(m, w->seqs, o->batch, j, e));
    for (int32_t i = 0; prompt && i < o->batch; i++) {
        if (!isfinite(w->nll[i])) return err_set(e, E_DEVICE, "bench: no finite logit");
    }
    return OK;
}

/* One round; the first of new_tokens falls out of the prompt's step, as in chat. */
static err_code run_round(model *m, bench_work *w, const bench_opts *o, double *prompt_s,
                          double *new_s, int32_t *last, const job *j, err *e)
{
    for (int32_t i = 0; i < o->batch; i++) model_seq_end(m, i);
    double begin = clock_s();
    TRY(run_step(m, w, o, w->prompt, o->prompt_tokens, true, j, e));
    *prompt_s = clock_s() - begin;
    begin = clock_s();
    for (int32_t i = 1; i <= o->new_tokens; i++)
        TRY(run_step(m, w, o, w->ids, 1, i < o->new_tokens, j, e));
    *new_s = clock_s() - begin;
    *last = w->ids[0];
    return OK;
}

static void sort(double *x, int32_t n)
{
    for (int32_t i = 1; i < n; i++) {
        for (int32_t k = i; k > 0 && x[k] < x[k - 1]; k--) {
            const double t = x[k];
            x[k] = x[k - 1];
            x[k - 1] = t;
        }
    }
}

static double median(const double *sorted, int32_t n)
{
    return n % 2 ? sorted[n / 2] : (sorted[n / 2 - 1] + sorted[n / 2]) / 2;
}

static err_code check(const model *m, const bench_opts *o, err *e)
{
    const int32_t room = model_session_len(m);
    if (o->prompt_tokens < 1 || o->new_tokens < 1 || o->prompt_tokens > room - o->new_tokens)
        return err_set(e, E_USAGE,
                       "bench: %d + %d tokens: expected 1 or more of each, at most %d together",
                       o->prompt_tokens, o->new_tokens, room);
    if (o->batch < 1 || o->batch > model_plan_of(m)->max_seqs)
        return err_set(e, E_USAGE, "bench: batch: expected 1 to %d, got %d",
                       model_plan_of(m)->max_seqs, o->batch);
    if (o->rounds < 1 || o->rounds > BENCH_MAX_ROUNDS)
        return err_set(e, E_USAGE, "bench: rounds: expected 1 to %d, got %d", BENCH_MAX_ROUNDS,
                       o->rounds);
    return OK;
}

err_code bench_run(bench_result *r, model *m, const bench_opts *o, const job *j, err *e)
{
    bench_work *w = NULL;
    err_code rc = OK;
    memset(r, 0, sizeof *r);
    TRY(check(m, o, e));
    TRY(work_make(&w, m, o, e));
    for (int32_t i = -1; i < o->rounds && rc == OK; i++) {
        const int32_t at = i < 0 ? 0 : i; /* the first round warms up and is overwritten */
        rc = run_round(m, w, o, &w->prompt_s[at], &w->new_s[at], &r->last_id, j, e);
        if (i < 0) r->first_s = w->prompt_s[at];
        job_step(j, "bench", "round", i + 1, o->rounds);
    }
    for (int32_t i = 0; i < o->batch; i++) model_seq_end(m, i);
    if (rc == OK) {
        sort(w->prompt_s, o->rounds);
        sort(w->new_s, o->rounds);
        r->prompt_s = median(w->prompt_s, o->rounds);
        r->new_s = median(w->new_s, o->rounds);
        r->prompt_best_s = w->prompt_s[0];
        r->new_best_s = w->new_s[0];
        r->prompt_tps = (double)o->batch * o->prompt_tokens / r->prompt_s;
        r->new_tps = (double)o->batch * o->new_tokens / r->new_s;
        r->token_bytes = model_token_bytes(m, o->prompt_tokens + o->new_tokens / 2);
    }
    work_free(&w);
    return rc;
}
