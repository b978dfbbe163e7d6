/* Answers as their readers see them, and the door. Tokens come from one thread and go to one: a
 * counter says how many there are, an eventfd is written only when the reader has caught up. */
#include <errno.h>
#include <inttypes.h>
#include <poll.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "runtime/serve/engine_internal.h"

/* ---- checks of a request ---- */

static err_code in_range(const char *what, int64_t v, int64_t lo, int64_t hi, err *e)
{
    if (v >= lo && v <= hi) return OK;
    return err_set(e, E_USAGE, "%s: expected %" PRId64 " to %" PRId64 ", got %" PRId64, what, lo,
                   hi, v);
}

static err_code check(const engine *g, const engine_request *r, err *e)
{
    const int32_t room = model_session_len(g->m);
    if (r->n_prompt < 1 || r->n_prompt >= room)
        return err_set(e, E_LIMIT, "prompt: expected 1 to %d tokens, got %d", room - 1,
                       r->n_prompt);
    for (int32_t i = 0; i < r->n_prompt; i++)
        TRY(in_range("prompt: id", r->prompt[i], 0, g->vocab - 1, e));
    TRY(in_range("max_new", r->max_new, 0, INT32_MAX, e));
    TRY(in_range("min_new", r->min_new, 0, INT32_MAX, e));
    TRY(in_range("stop ids", r->n_stop_ids, 0, g->vocab, e));
    for (int32_t i = 0; i < r->n_stop_ids; i++)
        TRY(in_range("stop id", r->stop_ids[i], 0, g->vocab - 1, e));
    TRY(in_range("top_logprobs", r->top_logprobs, -1, ENGINE_MAX_TOP, e));
    TRY(in_range("prompt_logprobs", r->prompt_logprobs, -1, ENGINE_MAX_TOP, e));
    TRY(in_range("timeout_ms", r->timeout_ms, 0, INT64_MAX / 2, e));
    TRY(in_range("logit biases", r->sample.n_bias, 0, g->vocab, e));
    return sample_opts_check(&r->sample, g->vocab, e);
}

/* ---- memory of an answer ---- */

typedef struct {
    size_t tokens, blocks, stop_ids, bias, logprob, tops, prompt, all;
} layout;

static size_t put(layout *l, size_t n, size_t size)
{
    const size_t at = (l->all + 15) & ~(size_t)15;
    l->all = at + n * size;
    return at;
}

static layout layout_of(const engine *g, const engine_request *r, int32_t max_new)
{
    const size_t cap = (size_t)r->n_prompt + (size_t)max_new, news = (size_t)max_new;
    const size_t block = (size_t)model_plan_of(g->m)->block_tokens;
    const bool probs = r->top_logprobs >= 0, score = r->prompt_logprobs >= 0;
    layout l = {.all = sizeof(answer)};
    l.tokens = put(&l, cap + 1, sizeof(int32_t));
    l.blocks = put(&l, cap / block + 1, sizeof(int32_t));
    l.stop_ids = put(&l, (size_t)r->n_stop_ids, sizeof(int32_t));
    l.bias = put(&l, (size_t)r->sample.n_bias, sizeof(logit_bias));
    l.logprob = put(&l, probs ? news : 0, sizeof(float));
    l.tops = put(&l, probs ? news * (size_t)r->top_logprobs : 0, sizeof(token_prob));
    l.prompt = put(&l, score ? (size_t)r->n_prompt - 1 : 0, sizeof(answer_token));
    return l;
}

static void copy_request(answer *a, const engine_request *r, const layout *l)
{
    char *base = (char *)a;
    a->q.tokens = (int32_t *)(void *)(base + l->tokens);
    a->q.blocks = (int32_t *)(void *)(base + l->blocks);
    memcpy(a->q.tokens, r->prompt, (size_t)r->n_prompt * sizeof(int32_t));
    if (r->n_stop_ids)
        memcpy(base + l->stop_ids, r->stop_ids, (size_t)r->n_stop_ids * sizeof(int32_t));
    a->stop_ids = (int32_t *)(void *)(base + l->stop_ids);
    if (r->sample.n_bias)
        memcpy(base + l->bias, r->sample.bias, (size_t)r->sample.n_bias * sizeof(logit_bias));
    a->sample = r->sample;
    a->sample.bias = (logit_bias *)(void *)(base + l->bias);
    if (r->top_logprobs >= 0) a->logprob = (float *)(void *)(base + l->logprob);
    if (r->top_logprobs >= 0) a->tops = (token_prob *)(void *)(base + l->tops);
    if (r->prompt_logprobs >= 0) a->prompt = (answer_token *)(void *)(base + l->prompt);
}

static bool needs_sampler(const sample_opts *o)
{
    return o->temperature > 0 || o->n_bias || o->repetition_penalty != 1 ||
           o->presence_penalty != 0 || o->frequency_penalty != 0;
}

static err_code make(answer **out, engine *g, const engine_request *r, err *e)
{
    const int32_t room = model_session_len(g->m) - r->n_prompt;
    const int32_t max_new = r->max_new == 0 || r->max_new > room ? room : r->max_new;
    const layout l = layout_of(g, r, max_new);
    void *p;
    TRY(mem_alloc(&p, 1, l.all, "answer", e));
    answer *a = p;
    copy_request(a, r, &l);
    a->g = g;
    a->n_prompt = r->n_prompt;
    a->max_new = max_new;
    a->min_new = r->min_new;
    a->n_stop_ids = r->n_stop_ids;
    a->sampled = needs_sampler(&r->sample);
    a->top = r->top_logprobs;
    a->prompt_top = r->prompt_logprobs;
    a->q.n_tokens = r->n_prompt;
    a->q.cap = r->n_prompt + max_new;
    a->q.n_score = r->prompt_logprobs >= 0 ? r->n_prompt - 1 : 0;
    a->q.score_logits = r->prompt_logprobs > 0;
    a->q.no_prefix = r->no_prefix || g->no_prefix_cache;
    a->q.root = (blocks_root){r->salt, model_seq_variant(g->m, r->n_prompt)};
    a->submitted = clock_s();
    if (r->timeout_ms) a->deadline = a->submitted + 1e-3 * (double)r->timeout_ms;
    atomic_init(&a->holders, 2);
    atomic_init(&a->ready, (uint64_t)ANSWER_WAITING << 32);
    a->fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (a->fd < 0) {
        const int n = errno;
        mem_free(a);
        return err_sys(e, E_IO, n, "cannot make an event for an answer");
    }
    *out = a;
    return OK;
}

void answer_release(answer *a)
{
    if (atomic_fetch_sub(&a->holders, 1) != 1) return;
    constraint_close(&a->limit);
    (void)close(a->fd);
    mem_free(a);
}

/* ---- the door ---- */

static err_code enter(engine *g, err *e)
{
    err_code rc = OK;
    (void)pthread_mutex_lock(&g->lock);
    if (g->draining)
        rc = err_set(e, E_CANCELED, "the engine takes no more requests");
    else if (g->n_accepted >= g->max_live)
        rc = err_set(e, E_BUSY, "%d requests run and wait already", g->n_accepted);
    else
        g->n_accepted++;
    g->shown.refused += rc == E_BUSY;
    (void)pthread_mutex_unlock(&g->lock);
    return rc;
}

err_code engine_submit(engine *g, const engine_request *r, answer **out, err *e)
{
    answer *a = NULL;
    *out = NULL;
    TRY(enter(g, e));
    err_code rc = check(g, r, e);
    if (rc == OK) rc = make(&a, g, r, e);
    (void)pthread_mutex_lock(&g->lock);
    if (rc == OK && g->draining) rc = err_set(e, E_CANCELED, "the engine takes no more requests");
    if (rc == OK) {
        a->limit = r->limit;
        *g->inbox_end = a;
        g->inbox_end = &a->next;
        g->shown.accepted++;
        (void)pthread_cond_signal(&g->work);
    } else {
        g->n_accepted--;
    }
    (void)pthread_mutex_unlock(&g->lock);
    if (rc == OK) {
        *out = a;
    } else if (a) {
        answer_release(a);
        answer_release(a);
    }
    return rc;
}

/* ---- from the engine to the reader ---- */

static void light(answer *a)
{
    const uint64_t one = 1;
    if (!atomic_exchange(&a->lit, true)) (void)!write(a->fd, &one, sizeof one);
}

/* The reader has all that `seen` told of. Whoever publishes from here on finds the light off, or
 * what it published is found here. */
static void unlight(answer *a, uint64_t seen)
{
    uint64_t n;
    if (!atomic_load(&a->lit)) return;
    (void)!read(a->fd, &n, sizeof n);
    atomic_store(&a->lit, false);
    if (atomic_load(&a->ready) != seen) light(a);
}

void answer_publish(answer *a, answer_state state)
{
    atomic_store(&a->ready, (uint64_t)state << 32 | (uint32_t)a->n_new);
    light(a);
}

static void copy_tokens(const answer *a, answer_token *out, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        const int32_t at = a->n_read + i, top = a->top > 0 ? a->top : 0;
        out[i].id = a->q.tokens[a->n_prompt + at];
        out[i].logprob = a->logprob ? a->logprob[at] : 0;
        out[i].n_top = 0;
        for (const token_prob *p = a->tops + (size_t)at * (size_t)top;
             out[i].n_top < top && p->id >= 0; p++)
            out[i].top[out[i].n_top++] = *p;
    }
}

/* False when the time is over. */
static bool wait_light(answer *a, double until, int timeout_ms)
{
    struct pollfd p = {.fd = a->fd, .events = POLLIN};
    int ms = -1;
    if (timeout_ms >= 0) {
        const double left = until - clock_s();
        if (left <= 0) return false;
        ms = (int)(left * 1e3) + 1;
    }
    (void)poll(&p, 1, ms);
    return true;
}

int32_t answer_read(answer *a, answer_token *out, int32_t cap, int timeout_ms, answer_state *state)
{
    const double until = timeout_ms > 0 ? clock_s() + 1e-3 * timeout_ms : 0;
    for (;;) {
        const uint64_t ready = atomic_load(&a->ready);
        const int32_t there = (int32_t)(uint32_t)ready, left = there - a->n_read;
        const answer_state now = (answer_state)(ready >> 32);
        if (left > 0 || now >= ANSWER_STOP) {
            const int32_t n = left < cap ? left : cap;
            copy_tokens(a, out, n);
            a->n_read += n;
            *state = n < left ? ANSWER_RUNNING : now;
            if (n == left && now < ANSWER_STOP) unlight(a, ready);
            return n;
        }
        *state = now;
        unlight(a, ready);
        if (atomic_load(&a->ready) != ready) continue;
        if (timeout_ms == 0 || !wait_light(a, until, timeout_ms)) return 0;
    }
}

int answer_fd(answer *a) { return a->fd; }

int32_t answer_prompt(answer *a, const answer_token **out)
{
    *out = a->prompt;
    return atomic_load(&a->prompt_ready);
}

void answer_figures_get(answer *a, answer_figures *f)
{
    const double began = a->began, first = a->first, last = a->last;
    *f = (answer_figures){.n_prompt = a->n_prompt,
                          .n_cached = a->n_cached,
                          .n_new = (int32_t)(uint32_t)atomic_load(&a->ready),
                          .preemptions = a->preemptions};
    if (began > 0) f->queue_s = began - a->submitted;
    if (first > 0) f->prefill_s = first - began;
    if (last > 0) f->decode_s = last - first;
}

err_code answer_error(answer *a, err *e)
{
    if (atomic_load(&a->ready) >> 32 != ANSWER_FAILED) return OK;
    *e = a->error;
    return e->code;
}

void answer_cancel(answer *a) { atomic_store(&a->cancel, true); }

void answer_close(answer **a)
{
    if (!a || !*a) return;
    answer_cancel(*a);
    answer_release(*a);
    *a = NULL;
}
