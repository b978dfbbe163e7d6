/* The engine on the bundled model: answers that depend on their request alone, and what happens at
 * its limits. --bench measures it instead. */
#include <check.h>
#include <math.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "runtime/clock.h"
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

int main(int argc, char **argv)
{
    (void)argc;
    (void)argv;
    Suite *s = suite_create("engine");
    TCase *t = tcase_create("identity");
    tcase_set_timeout(t, 300);
    tcase_add_test(t, test_identity);
    tcase_add_test(t, test_identity_avx512);
    tcase_add_test(t, test_identity_avx2);
    suite_add_tcase(s, t);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
