/* The engine's thread: takes requests in, plans a step, runs it, hands tokens out. */
#include "runtime/serve/engine.h"

#include <assert.h>
#include <math.h>
#include <signal.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "runtime/serve/engine_internal.h"

#define DEFAULT_PREFILL 512
#define DEFAULT_QUEUE   4 /* times max_batch */

/* ---- news for readers ---- */

/* Kept until tell: when a reader hears of an end, the door and the figures know of it, too. */
static void note(engine *g, answer *a, answer_state state)
{
    g->news[g->n_news].a = a;
    g->news[g->n_news++].state = state;
}

static void show(engine *g)
{
    const blocks *b = sched_blocks(g->sched);
    engine_stats *s = &g->stats;
    s->running = sched_running(g->sched);
    s->preemptions = sched_preemptions(g->sched);
    s->kv_blocks_used = blocks_used(b);
    s->kv_blocks_cached = blocks_cached(b);
    (void)pthread_mutex_lock(&g->lock);
    s->accepted = g->shown.accepted;
    s->refused = g->shown.refused;
    g->shown = *s;
    g->n_accepted -= g->n_ended;
    g->n_ended = 0;
    (void)pthread_mutex_unlock(&g->lock);
}

static void tell(engine *g)
{
    show(g);
    for (int32_t i = 0; i < g->n_news; i++) {
        answer *a = g->news[i].a;
        const answer_state state = g->news[i].state;
        answer_publish(a, state);
        if (state >= ANSWER_STOP) answer_release(a);
    }
    g->n_news = 0;
}

/* ---- the end of an answer ---- */

static void finish(engine *g, answer *a, answer_state state, double now)
{
    sched_end(g->sched, &a->q);
    g->live[a->live] = g->live[--g->n_live];
    g->live[a->live]->live = a->live;
    g->n_ended++;
    g->stats.ended[state]++;
    engine_observe(&g->stats.e2e_s, now - a->submitted);
    note(g, a, state);
}

/* What was canceled, or has had its time, goes before the next step. */
static void reap(engine *g, bool closing)
{
    const double now = clock_s();
    for (int32_t i = g->n_live - 1; i >= 0; i--) {
        answer *a = g->live[i];
        if (closing || atomic_load(&a->cancel))
            finish(g, a, ANSWER_CANCELED, now);
        else if (a->deadline > 0 && now >= a->deadline)
            finish(g, a, ANSWER_TIMEOUT, now);
        else if (g->failed.code != OK) {
            a->error = g->failed;
            finish(g, a, ANSWER_FAILED, now);
        }
    }
}

/* ---- a step ---- */

static answer *answer_of(sched_seq *q)
{
    return (answer *)(void *)((char *)q - offsetof(answer, q));
}

/* Rows of a prompt whose probabilities are wanted: losses, and logits where alternatives are. */
static void want_scores(engine *g, const sched_part *p, step_seq *s, int32_t *nll_at,
                        int32_t *rows_at)
{
    s->n_out = p->n_score;
    s->nll = g->score_nll + *nll_at;
    s->targets = p->q->tokens + p->first + p->n - p->n_score + 1;
    *nll_at += p->n_score;
    if (!p->q->score_logits) return;
    s->logits = g->score_logits + (size_t)*rows_at * (size_t)g->vocab;
    *rows_at += p->n_score;
}

/* A slot that is new to a sequence learns of what the sequence has. What fails here (memory) is
 * that answer's alone: it ends with its next token. */
static void begin_part(engine *g, const sched_part *p, double now)
{
    answer *a = answer_of(p->q);
    model_seq_begin(g->m, p->q->slot, p->first, a->n_prompt);
    if (a->began == 0) {
        a->began = now;
        a->n_cached = p->first;
        g->stats.cached_tokens += p->first;
        g->stats.prompt_tokens += a->n_prompt;
        engine_observe(&g->stats.queue_s, now - a->submitted);
    }
    (void)engine_pick_begin(g, a, &a->error);
}

static void lay_out(engine *g, const sched_step *s)
{
    int32_t nll_at = 0, rows_at = 0;
    for (int32_t i = 0; i < s->n; i++) {
        const sched_part *p = &s->part[i];
        g->seqs[i] = (step_seq){
            .slot = p->q->slot, .tokens = p->q->tokens + p->first, .n_tokens = p->n};
        if (p->begins || p->q->moved)
            model_seq_blocks(g->m, p->q->slot, p->q->blocks, p->q->n_blocks);
        p->q->moved = false;
        if (p->n_score) want_scores(g, p, &g->seqs[i], &nll_at, &rows_at);
        if (p->last) engine_want(g, answer_of(p->q), &g->seqs[i]);
    }
}

static void take_scores(engine *g, const sched_part *p, const step_seq *s)
{
    answer *a = answer_of(p->q);
    const int32_t first = p->first + p->n - p->n_score; /* row of the first target's predecessor */
    for (int32_t i = 0; i < p->n_score; i++) {
        answer_token *t = &a->prompt[first + i];
        t->id = s->targets[i];
        t->logprob = -s->nll[i];
        if (!s->logits) continue;
        const float *l = s->logits + (size_t)i * (size_t)g->vocab;
        t->n_top = engine_top(t->top, a->prompt_top, l, g->vocab,
                              (double)s->nll[i] + (double)l[t->id]);
    }
    atomic_store(&a->prompt_ready, first + p->n_score);
}

static void time_token(engine *g, answer *a, double now)
{
    if (a->first == 0) {
        a->first = now;
        engine_observe(&g->stats.prefill_s, now - a->began);
        engine_observe(&g->stats.ttft_s, now - a->submitted);
    } else {
        engine_observe(&g->stats.inter_token_s, now - a->last);
    }
    a->last = now;
}

/* The token that a part gave, and whether it was the last. */
static void take_token(engine *g, answer *a, double now)
{
    int32_t id;
    if (a->error.code != OK || engine_pick(g, a, &id, &a->error) != OK) {
        finish(g, a, ANSWER_FAILED, now);
        return;
    }
    if (id < 0) {
        finish(g, a, ANSWER_STOP, now);
        return;
    }
    const bool complete = engine_picked(g, a, id);
    sched_append(g->sched, &a->q, id);
    a->n_new++;
    g->stats.new_tokens++;
    time_token(g, a, now);
    if (complete || engine_is_stop(a, id))
        finish(g, a, ANSWER_STOP, now);
    else if (a->n_new == a->max_new)
        finish(g, a, ANSWER_LENGTH, now);
    else
        note(g, a, ANSWER_RUNNING);
}

/* The first error of a step is for good: what the cache holds is not known any more. */
static void break_down(engine *g, const err *why)
{
    (void)pthread_mutex_lock(&g->lock);
    g->failed = *why;
    (void)pthread_mutex_unlock(&g->lock);
    job_log(&g->job, LOG_ERROR, "engine: a step failed: %s", why->msg);
}

static void count_step(engine *g, const sched_step *s, double begin, double end)
{
    g->stats.steps++;
    g->stats.busy_s += end - begin;
    engine_observe(&g->stats.batch, s->n);
}

static void run(engine *g, const sched_step *s)
{
    const double begin = clock_s();
    err e;
    for (int32_t i = 0; i < s->n; i++) {
        answer_of(s->part[i].q)->preemptions = s->part[i].q->preemptions;
        if (s->part[i].begins) begin_part(g, &s->part[i], begin);
    }
    lay_out(g, s);
    g->step_began = begin;
    const err_code rc = model_step(g->m, g->seqs, s->n, &g->job, &e);
    g->step_began = 0;
    if (rc != OK) {
        break_down(g, &e);
        return;
    }
    sched_commit(g->sched);
    const double end = clock_s();
    count_step(g, s, begin, end);
    for (int32_t i = 0; i < s->n; i++) {
        if (s->part[i].n_score) take_scores(g, &s->part[i], &g->seqs[i]);
        if (s->part[i].last) take_token(g, answer_of(s->part[i].q), end);
    }
}

/* ---- the thread ---- */

/* Waits for something to do, takes in what came. False: all is over. */
static bool take_in(engine *g, bool *closing)
{
    (void)pthread_mutex_lock(&g->lock);
    while (!g->inbox && !g->n_live && !g->closing) (void)pthread_cond_wait(&g->work, &g->lock);
    answer *a = g->inbox;
    g->inbox = NULL;
    g->inbox_end = &g->inbox;
    *closing = g->closing;
    (void)pthread_mutex_unlock(&g->lock);
    for (answer *next; a; a = next) {
        next = a->next;
        a->live = g->n_live;
        g->live[g->n_live++] = a;
        sched_submit(g->sched, &a->q);
    }
    return g->n_live > 0;
}

static void *engine_main(void *arg)
{
    engine *g = arg;
    bool closing;
    err e;
    if (dev_use(model_device(g->m), &e) != OK) break_down(g, &e);
    while (take_in(g, &closing)) {
        reap(g, closing);
        if (g->n_news) tell(g);
        const sched_step *s = sched_next(g->sched);
        if (!s->n) continue;
        run(g, s);
        tell(g);
    }
    return NULL;
}

/* ---- open and close ---- */

static err_code opts_check(const engine_opts *o, const model_plan *p, err *e)
{
    const struct {
        const char *name;
        int32_t value, most;
    } f[] = {{"max_batch", o->max_batch, p->max_seqs},
             {"max_queue", o->max_queue, 1 << 20},
             {"prefill_tokens", o->prefill_tokens, 1 << 20}};
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        if (f[i].value < 0 || f[i].value > f[i].most)
            return err_set(e, E_USAGE, "engine: %s: expected 0 to %d, got %d", f[i].name, f[i].most,
                           f[i].value);
    }
    return OK;
}

static err_code get(void **out, int64_t n, size_t size, err *e)
{
    return mem_alloc(out, (size_t)n, size, "engine", e);
}

static err_code open_buffers(engine *g, int32_t prefill, err *e)
{
    const int64_t n = g->max_batch, v = g->vocab;
    g->mask_words = (g->vocab + 31) / 32;
    TRY(get((void **)&g->live, g->max_live, sizeof(answer *), e));
    TRY(get((void **)&g->news, 2 * (int64_t)g->max_live, sizeof *g->news, e));
    TRY(get((void **)&g->seqs, n, sizeof(step_seq), e));
    TRY(get((void **)&g->mask, n * g->mask_words, sizeof(uint32_t), e));
    TRY(get((void **)&g->logits, n * v, sizeof(float), e));
    TRY(get((void **)&g->work_logits, v, sizeof(float), e));
    TRY(get((void **)&g->score_logits, ENGINE_SCORE_ROWS * v, sizeof(float), e));
    TRY(get((void **)&g->best, n, sizeof(int32_t), e));
    TRY(get((void **)&g->nll, n, sizeof(float), e));
    return get((void **)&g->score_nll, prefill, sizeof(float), e);
}

static err_code open_samplers(engine *g, err *e)
{
    TRY(get((void **)&g->samplers, g->max_batch, sizeof(sampler *), e));
    for (int32_t i = 0; i < g->max_batch; i++)
        TRY(sampler_open_beside(&g->samplers[i], i ? g->samplers[0] : NULL, g->vocab,
                                model_session_len(g->m) + 1, e));
    return OK;
}

static err_code open_parts(engine *g, const engine_opts *o, err *e)
{
    const model_plan *p = model_plan_of(g->m);
    const int32_t prefill = o->prefill_tokens ? o->prefill_tokens : DEFAULT_PREFILL;
    const int32_t queue = o->max_queue ? o->max_queue : DEFAULT_QUEUE * g->max_batch;
    const sched_opts s = {.slots = g->max_batch,
                          .prefill_tokens = prefill,
                          .step_rows = p->max_rows,
                          .score_rows = ENGINE_SCORE_ROWS,
                          .blocks = p->kv_blocks,
                          .block_tokens = p->block_tokens,
                          .session_tokens = p->session_len};
    g->max_live = g->max_batch + queue;
    TRY(sched_open(&g->sched, &s, e));
    TRY(open_buffers(g, prefill, e));
    TRY(open_samplers(g, e));
    engine_stats_begin(&g->stats);
    g->stats.max_batch = g->max_batch;
    g->stats.max_queue = queue;
    g->stats.kv_blocks_total = p->kv_blocks;
    g->stats.block_tokens = p->block_tokens;
    g->shown = g->stats;
    return OK;
}

static void free_parts(engine *g)
{
    /* The first one owns the scratch of all. */
    for (int32_t i = g->max_batch - 1; g->samplers && i >= 0; i--) sampler_close(&g->samplers[i]);
    void *const p[] = {g->live, g->news,   g->seqs,        g->samplers,
                       g->mask, g->logits, g->work_logits, g->score_logits,
                       g->best, g->nll,    g->score_nll};
    for (size_t i = 0; i < sizeof p / sizeof *p; i++) mem_free(p[i]);
    sched_close(&g->sched);
    (void)pthread_mutex_destroy(&g->lock);
    (void)pthread_cond_destroy(&g->work);
    mem_free(g);
}

/* Signals are for the threads of the program. */
static err_code start_thread(engine *g, err *e)
{
    sigset_t all, old;
    (void)sigfillset(&all);
    (void)pthread_sigmask(SIG_SETMASK, &all, &old);
    const int rc = pthread_create(&g->thread, NULL, engine_main, g);
    (void)pthread_sigmask(SIG_SETMASK, &old, NULL);
    return rc == 0 ? OK : err_sys(e, E_NOMEM, rc, "cannot start the engine's thread");
}

err_code engine_open(engine **out, model *m, const engine_opts *o, const job *j, err *e)
{
    void *p;
    *out = NULL;
    TRY(opts_check(o, model_plan_of(m), e));
    TRY(get(&p, 1, sizeof(engine), e));
    engine *g = p;
    g->m = m;
    if (j) g->job = *j;
    g->job.stop = NULL;
    g->vocab = model_desc_of(m)->vocab;
    g->max_batch = o->max_batch ? o->max_batch : model_plan_of(m)->max_seqs;
    g->no_prefix_cache = o->no_prefix_cache;
    g->inbox_end = &g->inbox;
    (void)pthread_mutex_init(&g->lock, NULL);
    (void)pthread_cond_init(&g->work, NULL);
    err_code rc = open_parts(g, o, e);
    const bool lent = rc == OK && (rc = model_lend(m, e)) == OK;
    if (rc == OK) rc = start_thread(g, e);
    if (rc != OK) {
        if (lent) model_lend_end(m);
        free_parts(g);
        return rc;
    }
    *out = g;
    return OK;
}

void engine_close(engine **gp)
{
    if (!gp || !*gp) return;
    engine *g = *gp;
    (void)pthread_mutex_lock(&g->lock);
    g->draining = g->closing = true;
    (void)pthread_cond_signal(&g->work);
    (void)pthread_mutex_unlock(&g->lock);
    (void)pthread_join(g->thread, NULL);
    model_lend_end(g->m);
    free_parts(g);
    *gp = NULL;
}

void engine_drain(engine *g)
{
    (void)pthread_mutex_lock(&g->lock);
    g->draining = true;
    (void)pthread_mutex_unlock(&g->lock);
}

/* ---- questions ---- */

err_code engine_health(const engine *cg, err *e)
{
    engine *g = (engine *)(uintptr_t)cg; /* the lock is not part of what is const */
    (void)pthread_mutex_lock(&g->lock);
    const err_code rc = g->failed.code;
    if (rc != OK) *e = g->failed;
    (void)pthread_mutex_unlock(&g->lock);
    return rc;
}

void engine_stats_get(const engine *cg, engine_stats *s)
{
    engine *g = (engine *)(uintptr_t)cg;
    (void)pthread_mutex_lock(&g->lock);
    *s = g->shown;
    s->waiting = g->n_accepted - s->running;
    const double began = g->step_began;
    if (began > 0) s->step_s = clock_s() - began;
    (void)pthread_mutex_unlock(&g->lock);
}
