/* The engine on the bundled model: answers that depend on their request alone, and what happens at
 * its limits. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/generate.h"
#include "runtime/serve/engine.h"
#include "support/alloc_count.h"
#include "support/fake_constraint.h"

#define DEMO     TMF_SOURCE_DIR "/datasets/demo"
#define SESSION  512
#define REQUESTS 32
#define MAX_NEW  48

static device *dev;
static weight_src *src;
static model *mdl;
static engine *eng;

/* ---- steps under the tests' control ---- */

static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_moved = PTHREAD_COND_INITIALIZER;
static int gate_left = -1; /* steps that may begin; -1: all */
static int gate_stuck;     /* steps that wait to begin */
static int gate_done;      /* steps that ended */
static bool gate_fault;    /* the next one fails */

err_code __real_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e);
err_code __wrap_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e);
err_code __wrap_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_stuck++;
    (void)pthread_cond_broadcast(&gate_moved);
    while (gate_left == 0) (void)pthread_cond_wait(&gate_moved, &gate_lock);
    if (gate_left > 0) gate_left--;
    gate_stuck--;
    const bool fault = gate_fault;
    (void)pthread_mutex_unlock(&gate_lock);
    const err_code rc = fault ? err_set(e, E_DEVICE, "out of order")
                              : __real_model_step(m, seqs, n, j, e);
    (void)pthread_mutex_lock(&gate_lock);
    gate_done++;
    (void)pthread_cond_broadcast(&gate_moved);
    (void)pthread_mutex_unlock(&gate_lock);
    return rc;
}

static void gate_set(int left)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_left = left;
    (void)pthread_cond_broadcast(&gate_moved);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* Until a step waits to begin: the engine stands still, its plan is made. */
static void gate_wait(void)
{
    (void)pthread_mutex_lock(&gate_lock);
    while (!gate_stuck) (void)pthread_cond_wait(&gate_moved, &gate_lock);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* n steps, then again until one waits. */
static void gate_steps(int n)
{
    for (int i = 0; i < n; i++) {
        (void)pthread_mutex_lock(&gate_lock);
        const int done = gate_done;
        gate_left = 1;
        (void)pthread_cond_broadcast(&gate_moved);
        while (gate_done == done) (void)pthread_cond_wait(&gate_moved, &gate_lock);
        (void)pthread_mutex_unlock(&gate_lock);
        if (i + 1 < n) gate_wait();
    }
}

/* ---- model and engine ---- */

static void must(err_code rc, const err *e) { ck_assert_msg(rc == OK, "%s", e->msg); }

/* Model and engine with room for `tokens` in the cache. */
static void up(const char *isa, int32_t batch, int32_t tokens, engine_opts o)
{
    err e;
    model_opts m = {.session_len = SESSION, .max_seqs = batch, .block_tokens = 16};
    const dev_opts d = {.kind = DEV_CPU, .threads = 2, .isa = isa, .deterministic = true};
    must(dev_open(&dev, &d, &e), &e);
    must(weights_open(&src, DEMO, &e), &e);
    const model_desc *desc = weights_desc(src);
    const kv_opts block = {KV_16, desc->layers, desc->kv_heads, desc->head_dim, 16, 1, 1, 1};
    m.kv_mem_bytes = (int64_t)kv_bytes(&block) * (tokens / 16);
    must(model_open(&mdl, dev, src, &m, NULL, &e), &e);
    ck_assert_int_eq(model_session_len(mdl), SESSION);
    must(engine_open(&eng, mdl, &o, NULL, &e), &e);
}

static void down(void)
{
    engine_close(&eng);
    model_close(&mdl);
    weights_close(&src);
    dev_close(&dev);
}

/* ---- requests of all kinds ---- */

typedef struct {
    int32_t ids[SESSION];
    engine_request r;
    constraint *(*limit)(void);
} request;

typedef struct {
    int32_t n;
    answer_state state;
    answer_token token[SESSION];
    answer_token prompt[SESSION];
    int32_t n_prompt;
    answer_figures figures;
} result;

static uint32_t next_random(uint32_t *x) { return (*x = *x * 1664525u + 1013904223u) >> 8; }

static const logit_bias biases[2] = {{17, 3.5f}, {99, -2.0f}};
static const int32_t stops[2] = {2, 7};

/* Request i: lengths, sampling and options vary; every third shares its beginning with others. */
static void request_make(request *q, int32_t i)
{
    uint32_t x = 12345u + (uint32_t)i * 77u, y = 4242;
    const int32_t n = i % 5 == 0 ? 1 + i : 20 + (int32_t)(next_random(&x) % 180);
    for (int32_t k = 0; k < n; k++)
        q->ids[k] = (int32_t)(next_random(i % 3 == 0 && k < 100 ? &y : &x) % 4000) + 3;
    q->limit = NULL;
    q->r = (engine_request){.prompt = q->ids,
                            .n_prompt = n,
                            .max_new = MAX_NEW - i % 7,
                            .sample = sample_greedy(),
                            .top_logprobs = i % 2 ? 2 : -1,
                            .prompt_logprobs = i % 8 == 3   ? 1
                                               : i % 8 == 5 ? 0
                                                            : -1};
    if (i % 4 == 1) {
        q->r.sample.temperature = 0.9;
        q->r.sample.top_p = 0.95;
        q->r.sample.seed = (uint64_t)i * 1000003u;
    }
    if (i % 4 == 2) {
        q->r.sample.temperature = 1.3;
        q->r.sample.top_k = 40;
        q->r.sample.frequency_penalty = 0.5;
        q->r.sample.repetition_penalty = 1.1;
        q->r.sample.seed = 5;
        q->r.sample.bias = biases;
        q->r.sample.n_bias = 2;
    }
    if (i % 6 == 4) {
        q->r.stop_ids = stops;
        q->r.n_stop_ids = 2;
        q->r.min_new = 5;
    }
}

static answer *submit(const request *q)
{
    err e;
    answer *a;
    engine_request r = q->r;
    if (q->limit) r.limit = q->limit();
    must(engine_submit(eng, &r, &a, &e), &e);
    return a;
}

/* Reads to the end and closes. */
static void finish(answer *a, result *r)
{
    const answer_token *prompt;
    memset(r, 0, sizeof *r);
    do {
        ck_assert_int_lt(r->n, SESSION);
        r->n += answer_read(a, r->token + r->n, SESSION - r->n, 60000, &r->state);
    } while (r->state < ANSWER_STOP);
    r->n_prompt = answer_prompt(a, &prompt);
    if (r->n_prompt) memcpy(r->prompt, prompt, (size_t)r->n_prompt * sizeof *prompt);
    answer_figures_get(a, &r->figures);
    answer_close(&a);
}

static bool tokens_equal(const answer_token *a, const answer_token *b, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (a[i].id != b[i].id || a[i].n_top != b[i].n_top ||
            memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)) != 0 ||
            memcmp(a[i].top, b[i].top, (size_t)a[i].n_top * sizeof(token_prob)) != 0)
            return false;
    }
    return true;
}

/* Ids and the bits of every log-probability. */
static void must_equal(const result *a, const result *b, const char *what, int i)
{
    ck_assert_msg(a->state == b->state && a->n == b->n,
                  "%s: request %d: state %d after %d, %d "
                  "after %d",
                  what, i, (int)a->state, a->n, (int)b->state, b->n);
    ck_assert_msg(tokens_equal(a->token, b->token, a->n), "%s: request %d: tokens", what, i);
    ck_assert_msg(a->n_prompt == b->n_prompt && tokens_equal(a->prompt, b->prompt, a->n_prompt),
                  "%s: request %d: prompt", what, i);
}

static request requests[REQUESTS];
static result alone[REQUESTS], together[REQUESTS];

static void run_together(int32_t n)
{
    answer *a[REQUESTS];
    for (int32_t i = 0; i < n; i++) a[i] = submit(&requests[i]);
    for (int32_t i = 0; i < n; i++) finish(a[i], &together[i]);
}

/* All requests alone, then in batches of 4 and 32, with prefixes, and with a cache that is too
 * small for them. */
static void identity(const char *isa, int32_t n)
{
    engine_stats s;
    for (int32_t i = 0; i < n; i++) request_make(&requests[i], i);
    up(isa, 1, SESSION, (engine_opts){.no_prefix_cache = true});
    for (int32_t i = 0; i < n; i++) finish(submit(&requests[i]), &alone[i]);
    down();
    const struct {
        const char *what;
        int32_t batch, tokens;
        engine_opts o;
    } runs[] = {{"batch of 4", 4, 4 * SESSION, {.max_queue = REQUESTS, .no_prefix_cache = true}},
                {"batch of 32", 32, 32 * SESSION, {.no_prefix_cache = true}},
                {"prefixes", 32, 32 * SESSION, {.prefill_tokens = 50}},
                {"small cache", 32, SESSION + 256, {.no_prefix_cache = true}},
                {"small cache, prefixes", 8, SESSION + 64, {.max_queue = REQUESTS}}};
    for (size_t k = 0; k < sizeof runs / sizeof *runs; k++) {
        up(isa, runs[k].batch, runs[k].tokens, runs[k].o);
        run_together(n);
        for (int32_t i = 0; i < n; i++) must_equal(&alone[i], &together[i], runs[k].what, i);
        engine_stats_get(eng, &s);
        ck_assert_msg((s.preemptions > 0) == (k >= 3), "%s: %lld preemptions", runs[k].what,
                      (long long)s.preemptions);
        ck_assert_msg((s.cached_tokens > 0) == !runs[k].o.no_prefix_cache, "%s: %lld cached",
                      runs[k].what, (long long)s.cached_tokens);
        down();
    }
}

START_TEST(test_identity) { identity("auto", REQUESTS); }
END_TEST

START_TEST(test_identity_avx512) { identity("avx512", 12); }
END_TEST

START_TEST(test_identity_avx2) { identity("avx2", 12); }
END_TEST

/* ---- against other ways through the model ---- */

static void plain_request(request *q, int32_t n, int32_t max_new, uint32_t seed)
{
    memset(q, 0, sizeof *q);
    for (int32_t k = 0; k < n; k++) q->ids[k] = (int32_t)(next_random(&seed) % 4000) + 3;
    q->r = (engine_request){.prompt = q->ids,
                            .n_prompt = n,
                            .max_new = max_new,
                            .sample = sample_greedy(),
                            .top_logprobs = -1,
                            .prompt_logprobs = -1};
}

typedef struct {
    int32_t id[SESSION];
    int32_t n;
} id_list;

static bool collect(void *ud, int32_t id, const char *text, size_t n)
{
    id_list *l = ud;
    (void)text;
    (void)n;
    if (id >= 0) l->id[l->n++] = id;
    return true;
}

/* What generate says with the model alone. */
START_TEST(test_as_generate)
{
    err e;
    up(NULL, 8, 8 * SESSION, (engine_opts){.prefill_tokens = 33});
    for (int32_t i = 0; i < 8; i++) {
        request_make(&requests[i], i);
        requests[i].r.min_new = 0;
    }
    run_together(8);
    engine_close(&eng);
    generator *g;
    must(gen_open(&g, mdl, NULL, &e), &e);
    for (int32_t i = 0; i < 8; i++) {
        const engine_request *r = &requests[i].r;
        const gen_opts o = {.ids = r->prompt,
                            .n_ids = r->n_prompt,
                            .max_new = r->max_new,
                            .stop_ids = r->stop_ids,
                            .n_stop_ids = r->n_stop_ids,
                            .sample = r->sample};
        gen_result ended;
        id_list l = {.n = 0};
        must(gen_run(g, &o, &ended, collect, &l, NULL, &e), &e);
        ck_assert_int_eq(l.n, together[i].n);
        for (int32_t k = 0; k < l.n; k++) ck_assert_int_eq(l.id[k], together[i].token[k].id);
        model_seq_end(mdl, 0);
    }
    gen_close(&g);
    down();
}
END_TEST

static float probe_nll[SESSION], probe_logits[4096 * 8];

/* Log-probabilities of prompt and answer against one step over all of them. */
START_TEST(test_logprobs)
{
    err e;
    request *q = &requests[0];
    result *r = &together[0];
    plain_request(q, 70, 20, 9);
    q->r.top_logprobs = 3;
    q->r.prompt_logprobs = 2;
    up(NULL, 2, 2 * SESSION, (engine_opts){.prefill_tokens = 24});
    finish(submit(q), r);
    engine_close(&eng);
    ck_assert_int_eq(r->n, 20);
    ck_assert_int_eq(r->n_prompt, 69);
    for (int32_t i = 0; i < r->n; i++) q->ids[70 + i] = r->token[i].id;
    step_seq s = {
        .tokens = q->ids, .n_tokens = 89, .n_out = 89, .nll = probe_nll, .targets = q->ids + 1};
    must(model_step(mdl, &s, 1, NULL, &e), &e);
    for (int32_t i = 0; i < 89; i++) {
        const answer_token *t = i < 69 ? &r->prompt[i] : &r->token[i - 69];
        ck_assert_int_eq(t->id, q->ids[i + 1]);
        ck_assert_float_eq_tol(t->logprob, -probe_nll[i], 1e-5f);
        ck_assert_int_eq(t->n_top, i < 69 ? 2 : 3);
        ck_assert_float_ge(t->top[0].logprob, t->top[1].logprob);
        if (i >= 69) { /* greedy */
            ck_assert_int_eq(t->top[0].id, t->id);
            ck_assert_float_eq(t->top[0].logprob, t->logprob);
        }
        for (int k = 0; k < t->n_top; k++)
            ck_assert(t->top[k].id != t->id || t->top[k].logprob == t->logprob);
    }
    model_truncate(mdl, 0, 30); /* the alternatives of one row, by hand */
    s = (step_seq){.tokens = q->ids + 30, .n_tokens = 1, .n_out = 1, .logits = probe_logits};
    must(model_step(mdl, &s, 1, NULL, &e), &e);
    int above = 0;
    const token_prob *second = &r->prompt[30].top[1];
    for (int32_t i = 0; i < model_desc_of(mdl)->vocab; i++)
        above += probe_logits[i] > probe_logits[second->id];
    ck_assert_int_eq(above, 1);
    down();
}
END_TEST

/* ---- prefixes ---- */

static int32_t cached_of(const request *q, result *r)
{
    finish(submit(q), r);
    return r->figures.n_cached;
}

START_TEST(test_prefixes)
{
    request *q = &requests[0];
    engine_stats s;
    up(NULL, 4, 4 * SESSION, (engine_opts){0});
    plain_request(q, 100, 30, 3);
    ck_assert_int_eq(cached_of(q, &alone[0]), 0);
    ck_assert_int_eq(cached_of(q, &together[0]), 96); /* whole blocks of 16 */
    must_equal(&alone[0], &together[0], "again", 0);
    q->r.salt = 1;
    ck_assert_int_eq(cached_of(q, &together[0]), 0);
    q->r.salt = 0;
    q->r.no_prefix = true;
    ck_assert_int_eq(cached_of(q, &together[0]), 0);
    q->r.no_prefix = false;
    /* The next turn of a conversation: the answer is there, too, but for its last token. */
    for (int32_t i = 0; i < 30; i++) q->ids[100 + i] = alone[0].token[i].id;
    for (int32_t i = 0; i < 10; i++) q->ids[130 + i] = 50 + i;
    q->r.n_prompt = 140;
    ck_assert_int_eq(cached_of(q, &alone[1]), 128);
    q->r.no_prefix = true;
    ck_assert_int_eq(cached_of(q, &together[1]), 0);
    must_equal(&alone[1], &together[1], "next turn", 1);
    q->r.no_prefix = false;
    q->r.n_prompt = 96; /* exactly whole blocks: one row has to run */
    ck_assert_int_eq(cached_of(q, &together[0]), 80);
    engine_stats_get(eng, &s);
    ck_assert_int_eq(s.cached_tokens, 96 + 128 + 80);
    ck_assert_int_eq(s.prompt_tokens, 4 * 100 + 2 * 140 + 96);
    ck_assert_int_eq(s.new_tokens, 7 * 30);
    ck_assert_int_eq(s.kv_blocks_used, 0);
    ck_assert_int_gt(s.kv_blocks_cached, 8);
    down();
}
END_TEST

/* ---- the door ---- */

#define refused(call, want, text)                                                   \
    do {                                                                            \
        memset(&e, 0, sizeof e);                                                    \
        ck_assert_int_eq(call, want);                                               \
        ck_assert_msg(strstr(e.msg, text) != NULL, "'%s' lacks '%s'", e.msg, text); \
    } while (0)

START_TEST(test_door)
{
    err e;
    answer *a[7], *none;
    engine_stats s;
    request *q = &requests[0];
    up(NULL, 2, 2 * SESSION, (engine_opts){.max_queue = 5});
    plain_request(q, 10, 4, 3);
    gate_set(0);
    for (int i = 0; i < 7; i++) a[i] = submit(q);
    engine_request r = q->r;
    r.n_prompt = 0; /* the queue is looked at first */
    refused(engine_submit(eng, &r, &none, &e), E_BUSY, "7 requests");
    ck_assert_ptr_null(none);
    gate_set(-1);
    for (int i = 0; i < 7; i++) finish(a[i], &together[i]);
    for (int i = 1; i < 7; i++) must_equal(&together[0], &together[i], "queued", i);
    gate_set(0);
    for (int i = 0; i < 7; i++) a[i] = submit(q);
    refused(engine_submit(eng, &r, &none, &e), E_BUSY, "7 requests");
    gate_set(-1);
    for (int i = 0; i < 7; i++) finish(a[i], &together[i]);
    engine_stats_get(eng, &s);
    ck_assert_int_eq(s.refused, 2);
    ck_assert_int_eq(s.accepted, 14);
    refused(engine_submit(eng, &r, &none, &e), E_LIMIT, "got 0");
    r.n_prompt = SESSION;
    refused(engine_submit(eng, &r, &none, &e), E_LIMIT, "1 to 511 tokens");
    const struct {
        engine_request r;
        const char *text;
    } bad[] = {{{.max_new = -1}, "max_new"},       {{.min_new = -1}, "min_new"},
               {{.top_logprobs = 21}, "-1 to 20"}, {{.prompt_logprobs = -2}, "prompt_logprobs"},
               {{.timeout_ms = -5}, "timeout_ms"}, {{.n_stop_ids = -1}, "stop ids"}};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        r = bad[i].r;
        r.prompt = q->ids;
        r.n_prompt = 3;
        r.sample = sample_greedy();
        r.limit = fake_constraint(3, 10, 3);
        refused(engine_submit(eng, &r, &none, &e), E_USAGE, bad[i].text);
        constraint_close(&r.limit); /* still ours */
    }
    r = q->r;
    q->ids[1] = 4096;
    refused(engine_submit(eng, &r, &none, &e), E_USAGE, "got 4096");
    q->ids[1] = 5;
    r.sample.top_p = 2;
    refused(engine_submit(eng, &r, &none, &e), E_USAGE, "top-p");
    finish(submit(q), &together[0]); /* the failures above hold no places */
    down();
}
END_TEST

START_TEST(test_drain)
{
    err e;
    answer *a[6], *none;
    request *q = &requests[0];
    up(NULL, 2, 2 * SESSION, (engine_opts){0});
    plain_request(q, 10, 20, 3);
    gate_set(0);
    for (int i = 0; i < 6; i++) a[i] = submit(q);
    engine_drain(eng);
    refused(engine_submit(eng, &q->r, &none, &e), E_CANCELED, "no more requests");
    gate_set(-1);
    for (int i = 0; i < 6; i++) {
        finish(a[i], &together[i]);
        ck_assert_int_eq(together[i].state, ANSWER_LENGTH);
        ck_assert_int_eq(together[i].n, 20);
    }
    ck_assert_int_eq(engine_health(eng, &e), OK);
    down();
}
END_TEST

/* Closing an engine that runs cancels; readers may go before or stay until then. */
START_TEST(test_close_running)
{
    answer *a;
    up(NULL, 2, 2 * SESSION, (engine_opts){0});
    plain_request(&requests[0], 10, 0, 3);
    for (int i = 0; i < 5; i++) {
        a = submit(&requests[0]);
        answer_close(&a);
    }
    down();
}
END_TEST

/* ---- the end in every state ---- */

/* The engine stands before a step: the answer ends without another one. */
static void must_end_at_once(answer *a, int32_t n, answer_state want)
{
    static answer_token t[SESSION];
    answer_state state = ANSWER_WAITING;
    int32_t have = 0;
    gate_steps(1);
    do {
        have += answer_read(a, t, SESSION, 60000, &state);
    } while (state < ANSWER_STOP);
    ck_assert_int_eq(state, want);
    ck_assert_int_eq(have, n);
}

static void must_be_empty(void)
{
    engine_stats s;
    do {
        (void)usleep(200);
        engine_stats_get(eng, &s);
    } while (s.running + s.waiting > 0);
    ck_assert_int_eq(s.kv_blocks_used, 0);
}

START_TEST(test_cancel)
{
    answer *a, *b;
    answer_state state;
    answer_token t;
    up(NULL, 1, SESSION, (engine_opts){.prefill_tokens = 16});
    plain_request(&requests[0], 10, 0, 3);
    plain_request(&requests[1], 100, 50, 4);
    gate_set(0);
    a = submit(&requests[0]);
    gate_wait(); /* a's prompt is about to run */
    b = submit(&requests[1]);
    answer_cancel(b); /* waits */
    must_end_at_once(b, 0, ANSWER_CANCELED);
    answer_close(&b);
    gate_wait(); /* a decodes; what the step under way makes is its last */
    ck_assert_int_eq(answer_read(a, &t, 1, 0, &state), 1);
    answer_cancel(a);
    must_end_at_once(a, 1, ANSWER_CANCELED);
    answer_close(&a);
    a = submit(&requests[1]);
    gate_wait();
    gate_steps(2); /* 32 of 100 */
    gate_wait();
    answer_cancel(a); /* in its prompt */
    must_end_at_once(a, 0, ANSWER_CANCELED);
    answer_close(&a);
    a = submit(&requests[1]);
    gate_wait();
    answer_close(&a); /* nobody waits for it any more */
    gate_set(-1);
    must_be_empty();
    down();
}
END_TEST

START_TEST(test_cancel_preempted)
{
    answer *a, *b;
    answer_figures f = {0};
    up(NULL, 2, SESSION, (engine_opts){.no_prefix_cache = true});
    plain_request(&requests[0], 200, 0, 3);
    plain_request(&requests[1], 200, 0, 4);
    gate_set(0);
    a = submit(&requests[0]);
    b = submit(&requests[1]);
    for (int i = 0; f.preemptions == 0; i++) {
        ck_assert_int_lt(i, 100);
        gate_wait();
        gate_steps(1);
        answer_figures_get(b, &f);
        engine_stats s;
        engine_stats_get(eng, &s);
        f.preemptions = (int32_t)s.preemptions;
    }
    gate_wait();
    answer_cancel(b);
    answer_figures_get(b, &f);
    must_end_at_once(b, f.n_new, ANSWER_CANCELED);
    answer_close(&b);
    gate_set(-1);
    finish(a, &together[0]);
    ck_assert_int_eq(together[0].n, SESSION - 200);
    ck_assert_int_eq(together[0].figures.preemptions, 0);
    must_be_empty();
    down();
}
END_TEST

START_TEST(test_timeout)
{
    answer *a, *b;
    up(NULL, 1, SESSION, (engine_opts){0});
    plain_request(&requests[0], 10, 0, 3);
    requests[0].r.timeout_ms = 30;
    gate_set(0);
    a = submit(&requests[0]);
    b = submit(&requests[0]);
    gate_wait();
    (void)usleep(40000);
    must_end_at_once(a, 1, ANSWER_TIMEOUT); /* with what the step under way gave */
    gate_set(-1);
    finish(b, &together[0]);
    ck_assert_int_eq(together[0].state, ANSWER_TIMEOUT);
    ck_assert_int_eq(together[0].n, 0);
    answer_close(&a);
    down();
}
END_TEST

START_TEST(test_fault)
{
    err e;
    answer *a[5];
    up(NULL, 2, 2 * SESSION, (engine_opts){0});
    plain_request(&requests[0], 10, 0, 3);
    gate_set(0);
    for (int i = 0; i < 5; i++) a[i] = submit(&requests[0]);
    gate_wait();
    gate_steps(3);
    gate_wait();
    gate_fault = true;
    gate_set(-1);
    for (int i = 0; i < 5; i++) {
        answer_token t[8];
        answer_state state;
        int32_t n = 0;
        do n += answer_read(a[i], t, 8, 60000, &state);
        while (state < ANSWER_STOP);
        ck_assert_int_eq(state, ANSWER_FAILED);
        ck_assert_int_le(n, i < 2 ? 3 : 0);
        ck_assert_int_ge(n, i == 0 ? 3 : 0);
        refused(answer_error(a[i], &e), E_DEVICE, "out of order");
        answer_close(&a[i]);
    }
    refused(engine_health(eng, &e), E_DEVICE, "out of order");
    finish(submit(&requests[0]), &together[0]);
    ck_assert_int_eq(together[0].state, ANSWER_FAILED);
    must_be_empty();
    down();
}
END_TEST

/* ---- limits on what comes ---- */

static constraint *ten_of_fifty(void) { return fake_constraint(100, 50, 10); }
static constraint *dead_end(void) { return fake_constraint(100, 0, 10); }

START_TEST(test_constraint)
{
    request *q = &requests[0];
    result *r = &together[0];
    up(NULL, 8, SESSION + 64, (engine_opts){.no_prefix_cache = true});
    for (int k = 0; k < 4; k++) {
        plain_request(q, 20, k == 3 ? 4 : 30, 3);
        q->limit = ten_of_fifty;
        if (k == 1) q->r.sample.temperature = 1;
        if (k == 2) q->r.top_logprobs = 2;
        q->r.stop_ids = stops;
        q->r.n_stop_ids = 2;
        finish(submit(q), r);
        ck_assert_int_eq(r->state, k == 3 ? ANSWER_LENGTH : ANSWER_STOP);
        ck_assert_int_eq(r->n, k == 3 ? 4 : 10);
        for (int32_t i = 0; i < r->n; i++) ck_assert(r->token[i].id >= 100 && r->token[i].id < 150);
    }
    q->limit = dead_end;
    finish(submit(q), r);
    ck_assert_int_eq(r->state, ANSWER_FAILED);
    ck_assert_int_eq(r->n, 0);
    must_be_empty();
    down();
    ck_assert_int_eq(fake_constraints(), 0);
}
END_TEST

START_TEST(test_stops)
{
    request *q = &requests[0];
    result *r = &together[0];
    int32_t stop;
    up(NULL, 2, 2 * SESSION, (engine_opts){0});
    plain_request(q, 20, 30, 3);
    finish(submit(q), &alone[0]);
    ck_assert_int_eq(alone[0].state, ANSWER_LENGTH);
    stop = alone[0].token[6].id;
    int32_t first = 0;
    while (alone[0].token[first].id != stop) first++;
    q->r.stop_ids = &stop;
    q->r.n_stop_ids = 1;
    finish(submit(q), r);
    ck_assert_int_eq(r->state, ANSWER_STOP);
    ck_assert_int_eq(r->n, first + 1);
    ck_assert_int_eq(r->token[first].id, stop);
    q->r.min_new = first + 3;
    finish(submit(q), r);
    ck_assert_int_gt(r->n, first + 2);
    ck_assert_int_ne(r->token[first].id, stop);
    q->r.min_new = 0;
    q->r.n_stop_ids = 0;
    q->r.max_new = 0; /* to the end of the session */
    finish(submit(q), r);
    ck_assert_int_eq(r->n, SESSION - 20);
    ck_assert_int_eq(r->state, ANSWER_LENGTH);
    down();
}
END_TEST

/* ---- the reader's side ---- */

static bool readable(answer *a, int ms)
{
    struct pollfd p = {.fd = answer_fd(a), .events = POLLIN};
    return poll(&p, 1, ms) == 1;
}

START_TEST(test_reader)
{
    answer_token t[8];
    answer_state state;
    up(NULL, 2, 2 * SESSION, (engine_opts){0});
    plain_request(&requests[0], 10, 5, 3);
    gate_set(0);
    answer *a = submit(&requests[0]);
    gate_wait();
    ck_assert(!readable(a, 0));
    ck_assert_int_eq(answer_read(a, t, 8, 0, &state), 0);
    ck_assert_int_eq(state, ANSWER_WAITING);
    ck_assert_int_eq(answer_read(a, t, 8, 10, &state), 0);
    gate_steps(1);
    ck_assert(readable(a, 60000));
    ck_assert_int_eq(answer_read(a, t, 8, -1, &state), 1);
    ck_assert_int_eq(state, ANSWER_RUNNING);
    ck_assert(!readable(a, 0));
    gate_wait();
    gate_steps(3);
    gate_wait();
    ck_assert_int_eq(answer_read(a, t, 2, 0, &state), 2); /* one stays */
    ck_assert(readable(a, 0));
    gate_set(-1);
    while (answer_read(a, t, 1, -1, &state), state < ANSWER_STOP) {
    }
    ck_assert_int_eq(state, ANSWER_LENGTH);
    ck_assert(readable(a, 0)); /* the end stays readable */
    ck_assert_int_eq(answer_read(a, t, 8, -1, &state), 0);
    ck_assert_int_eq(state, ANSWER_LENGTH);
    answer_close(&a);
    answer_close(&a);
    down();
}
END_TEST

START_TEST(test_allocations)
{
    answer *a[16];
    up(NULL, 16, 16 * SESSION, (engine_opts){0});
    gate_set(0);
    for (int32_t i = 0; i < 16; i++) {
        request_make(&requests[i], i);
        requests[i].r.max_new = 40;
        requests[i].r.n_stop_ids = 0;
        a[i] = submit(&requests[i]);
    }
    gate_wait();
    for (int i = 0; i < 24; i++) { /* every prompt is through */
        gate_steps(1);
        gate_wait();
    }
    const long before = alloc_count();
    gate_steps(8);
    gate_wait();
    ck_assert_int_eq(alloc_count() - before, 0);
    gate_set(-1);
    for (int32_t i = 0; i < 16; i++) finish(a[i], &together[i]);
    down();
}
END_TEST

/* ---- many threads ---- */

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define ROUNDS 6
#else
#define ROUNDS 30
#endif

static void *visitor(void *arg)
{
    uint32_t x = (uint32_t)(uintptr_t)arg * 7919;
    request *q = calloc(1, sizeof *q);
    for (int i = 0; q && i < ROUNDS; i++) {
        err e;
        answer *a;
        answer_token t[16];
        answer_state state = ANSWER_WAITING;
        engine_stats s;
        request_make(q, (int32_t)(next_random(&x) % REQUESTS));
        q->r.timeout_ms = next_random(&x) % 4 == 0 ? 1 + (int64_t)(next_random(&x) % 20) : 0;
        if (engine_submit(eng, &q->r, &a, &e) != OK) continue; /* busy */
        const uint32_t fate = next_random(&x) % 4;
        const int reads = fate == 0 ? 0 : fate == 1 ? (int)(next_random(&x) % 20) : 1 << 20;
        for (int k = 0; k < reads && state < ANSWER_STOP; k++)
            (void)answer_read(a, t, 1 + (int32_t)(next_random(&x) % 16), 60000, &state);
        if (fate == 2) answer_cancel(a);
        engine_stats_get(eng, &s);
        answer_close(&a);
    }
    free(q);
    return NULL;
}

static int open_files(void)
{
    int n = 0;
    for (int fd = 0; fd < 1024; fd++) n += fcntl(fd, F_GETFD) != -1;
    return n;
}

START_TEST(test_threads)
{
    pthread_t t[8];
    engine_stats s;
    up(NULL, 4, SESSION + 256, (engine_opts){.max_queue = 3});
    const int files = open_files();
    for (uintptr_t i = 0; i < 8; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, visitor, (void *)(i + 1)), 0);
    for (int i = 0; i < 8; i++) (void)pthread_join(t[i], NULL);
    must_be_empty();
    engine_stats_get(eng, &s);
    int64_t ended = 0;
    for (int i = 0; i <= ANSWER_FAILED; i++) ended += s.ended[i];
    ck_assert_int_eq(ended, s.accepted);
    ck_assert_int_eq(s.ended[ANSWER_FAILED], 0);
    ck_assert_int_eq(s.accepted + s.refused, 8 * ROUNDS);
    ck_assert_int_eq(open_files(), files);
    down();
}
END_TEST

static Suite *suite(void)
{
    Suite *s = suite_create("engine");
    TCase *t = tcase_create("identity");
    tcase_set_timeout(t, 300);
    tcase_add_test(t, test_identity);
    tcase_add_test(t, test_identity_avx512);
    tcase_add_test(t, test_identity_avx2);
    tcase_add_test(t, test_as_generate);
    tcase_add_test(t, test_logprobs);
    tcase_add_test(t, test_prefixes);
    suite_add_tcase(s, t);
    t = tcase_create("limits");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, test_door);
    tcase_add_test(t, test_drain);
    tcase_add_test(t, test_close_running);
    tcase_add_test(t, test_cancel);
    tcase_add_test(t, test_cancel_preempted);
    tcase_add_test(t, test_timeout);
    tcase_add_test(t, test_fault);
    tcase_add_test(t, test_constraint);
    tcase_add_test(t, test_stops);
    tcase_add_test(t, test_reader);
    tcase_add_test(t, test_allocations);
    tcase_add_test(t, test_threads);
    suite_add_tcase(s, t);
    return s;
}

int main(void)
{
    SRunner *r = srunner_create(suite());
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
