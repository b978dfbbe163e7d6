/* Answers depend on their request alone: not on the batch, on waiting, on preemption, on what is
 * cached; and they are those of the model. "test_engine cuda" runs on that device. */
#include <check.h>
#include <string.h>

#include "runtime/generate.h"
#include "support/engine_case.h"
#include "support/suite.h"

/* All requests alone, then in batches of 4 and 32, with prefixes, and with a cache that is too
 * small for them. */
static void identity(const char *isa, int32_t n)
{
    engine_stats s;
    int64_t preempted = 0;
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
        ck_assert_msg(s.preemptions == 0 || k >= 3, "%s: preempted", runs[k].what);
        preempted += s.preemptions;
        const bool shares = !runs[k].o.no_prefix_cache;
        ck_assert_msg(up_model == CASE_DYNAMIC || (s.cached_tokens > 0) == shares,
                      "%s: %lld cached", runs[k].what, (long long)s.cached_tokens);
        down();
    }
    ck_assert_int_gt(preempted, 0);
}

/* Requests on the best instruction set, and on others which model: sanitizers are slow. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define BEST        10
#define OTHER       REQUESTS
#define OTHER_MODEL CASE_W4
#else
#define BEST        REQUESTS
#define OTHER       8
#define OTHER_MODEL CASE_DEMO
#endif

START_TEST(test_identity) { identity("auto", BEST); }
END_TEST

static void identity_narrow_kv(int32_t n)
{
    up_kv = KV_8;
    identity("auto", n);
    up_kv = KV_4;
    identity("auto", n);
    up_kv = KV_16;
}

START_TEST(test_identity_kv_dense) { identity_narrow_kv(BEST); }
END_TEST

START_TEST(test_identity_models)
{
    up_model = CASE_W4;
    identity("auto", REQUESTS);
    up_model = CASE_DYNAMIC;
    identity("auto", REQUESTS);
    up_model = CASE_DEMO;
}
END_TEST

START_TEST(test_identity_kv)
{
    up_model = CASE_W4;
    identity_narrow_kv(REQUESTS);
    up_model = CASE_DEMO;
}
END_TEST

START_TEST(test_identity_avx512)
{
    up_model = OTHER_MODEL;
    identity("avx512", OTHER);
}
END_TEST

START_TEST(test_identity_avx2)
{
    up_model = OTHER_MODEL;
    identity("avx2", OTHER);
}
END_TEST

/* ---- against other ways through the model ---- */

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
static void as_generate(void)
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

START_TEST(test_as_generate)
{
    as_generate();
    up_model = CASE_DYNAMIC;
    as_generate();
    up_model = CASE_DEMO;
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
    ck_assert_int_eq(cached_of(q, &together[0]), 96); /* whole blocks of 16 or 32 */
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
    ck_assert_int_eq(cached_of(q, &together[0]), 96 - case_block());
    engine_stats_get(eng, &s);
    ck_assert_int_eq(s.cached_tokens, 96 + 128 + 96 - case_block());
    ck_assert_int_eq(s.prompt_tokens, 4 * 100 + 2 * 140 + 96);
    ck_assert_int_eq(s.new_tokens, 7 * 30);
    ck_assert_int_eq(s.kv_blocks_used, 0);
    ck_assert_int_gt(s.kv_blocks_cached * case_block(), 8 * 16);
    down();
}
END_TEST

/* CK_RUN_CASE picks one. */
static void add_case(Suite *s, const char *name, const TTest *test)
{
    TCase *t = tcase_create(name);
    tcase_set_timeout(t, 300);
    tcase_add_test(t, test);
    suite_add_tcase(s, t);
}

static Suite *suite(void)
{
    Suite *s = suite_create("engine");
    add_case(s, "identity", test_identity);
    if (up_device == DEV_CPU) {
        add_case(s, "avx512", test_identity_avx512);
        add_case(s, "avx2", test_identity_avx2);
    } else {
        add_case(s, "kv_dense", test_identity_kv_dense);
    }
    add_case(s, "models", test_identity_models);
    add_case(s, "kv", test_identity_kv);
    add_case(s, "generate", test_as_generate);
    add_case(s, "logprobs", test_logprobs);
    add_case(s, "prefixes", test_prefixes);
    return s;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "cuda") == 0) up_device = DEV_CUDA;
    /* A context outlives no fork. */
    return suite_run_forked(suite(), up_device == DEV_CUDA ? CK_NOFORK : CK_FORK_GETENV);
}
