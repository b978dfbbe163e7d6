/* One sequence token by token, next-token scores and perplexity, against plain runs of the same
 * model. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/generate.h"
#include "runtime/score.h"
#include "support/alloc_count.h"
#include "support/suite.h"
#include "support/tiny_weights.h"

#define MAX_N 200

static device *dev;
static int32_t ids[MAX_N];

static void setup(void)
{
    err e;
    uint32_t x = 99;
    const dev_opts o = {
        .kind = DEV_CPU, .threads = 2, .isa = "avx512"}; /* exact, see test_runtime.c */
    ck_assert_int_eq(dev_open(&dev, &o, &e), OK);
    for (int i = 0; i < MAX_N; i++) {
        x = x * 1664525u + 1013904223u;
        ids[i] = (int32_t)(x >> 16) % 50;
    }
}

static void teardown(void) { dev_close(&dev); }

static weight_src *tiny(const model_desc *m)
{
    err e;
    weight_src *s;
    const tiny_opts o = {.desc = *m, .seed = 5};
    const err_code rc = tiny_open(&s, &o, &e);
    ck_assert_msg(rc == OK, "%s", e.msg);
    return s;
}

static model *open_model(weight_src *s, const model_opts *o)
{
    err e;
    model *m;
    const err_code rc = model_open(&m, dev, s, o, NULL, &e);
    ck_assert_msg(rc == OK, "%s", e.msg);
    return m;
}

/* ---- answers ---- */

typedef struct {
    int32_t id[MAX_N];
    int n, limit;
    long allocs;
} answer;

static bool on_token(void *ud, int32_t id, const char *text, size_t n)
{
    answer *a = ud;
    (void)text;
    (void)n;
    a->id[a->n++] = id;
    a->allocs = alloc_count();
    return a->n != a->limit;
}

static gen_result answer_of(generator *g, const gen_opts *o, answer *a)
{
    err e;
    gen_result r;
    const err_code rc = gen_run(g, o, &r, on_token, a, NULL, &e);
    ck_assert_msg(rc == OK, "%s", e.msg);
    ck_assert_int_eq(r.n_new, a->n);
    return r;
}

START_TEST(test_generate)
{
    static float all[40 * 50];
    const model_desc m = tiny_desc();
    err e;
    generator *g;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 40});
    answer a = {0}, b = {0};
    ck_assert_int_eq(gen_open(&g, mod, NULL, &e), OK);
    gen_opts o = {.ids = ids, .n_ids = 10, .max_new = 12, .sample = sample_greedy()};
    gen_result r = answer_of(g, &o, &a);
    ck_assert_int_eq(r.end, GEN_LENGTH);
    ck_assert_int_eq(r.n_new, 12);
    ck_assert_int_eq(r.n_prompt, 10);
    ck_assert_int_eq(model_seq_len(mod, 0), 21);

    /* Greedy ids are the best of a plain run over the same sequence. */
    int32_t seq[22];
    memcpy(seq, ids, 10 * sizeof *seq);
    memcpy(seq + 10, a.id, 12 * sizeof *seq);
    model_seq_end(mod, 0);
    const step_seq s = {.tokens = seq, .n_tokens = 22, .n_out = 22, .logits = all};
    ck_assert_int_eq(model_step(mod, &s, 1, NULL, &e), OK);
    for (int i = 0; i < 12; i++) ck_assert_int_eq(a.id[i], sample_argmax(all + (9 + i) * 50, 50));

    /* A stop id ends it and is the last; what the slot holds is not run again. */
    model_truncate(mod, 0, 7);
    o.stop_ids = &a.id[5];
    o.n_stop_ids = 1;
    r = answer_of(g, &o, &b);
    ck_assert_int_eq(r.end, GEN_STOP_ID);
    ck_assert_int_eq(r.n_prompt, 3);
    ck_assert_int_eq(b.id[b.n - 1], a.id[5]);
    ck_assert_mem_eq(a.id, b.id, (size_t)b.n * sizeof(int32_t));

    /* The caller's word, and a full session. */
    model_seq_end(mod, 0);
    b = (answer){.limit = 4};
    o.n_stop_ids = 0;
    r = answer_of(g, &o, &b);
    ck_assert_int_eq(r.end, GEN_CALLER);
    ck_assert_int_eq(r.n_new, 4);
    model_seq_end(mod, 0);
    b = (answer){0};
    o.max_new = 0;
    r = answer_of(g, &o, &b);
    ck_assert_int_eq(r.end, GEN_SESSION);
    ck_assert_int_eq(r.n_new, 31); /* 10 + 30 ran, the 31st came out of the last */
    ck_assert_int_eq(model_seq_len(mod, 0), 40);

    model_seq_end(mod, 0);
    o.n_ids = 41;
    ck_assert_int_eq(gen_run(g, &o, &r, on_token, &b, NULL, &e), E_LIMIT);
    ck_assert_msg(strstr(e.msg, "prompt of 41 tokens does not fit the session of 40"), "%s", e.msg);
    gen_close(&g);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

START_TEST(test_generate_seeded)
{
    const model_desc m = tiny_desc();
    err e;
    generator *g;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 100});
    answer a = {0}, b = {0}, c = {0};
    ck_assert_int_eq(gen_open(&g, mod, NULL, &e), OK);
    gen_opts o = {.ids = ids, .n_ids = 10, .max_new = 40, .sample = sample_greedy()};
    o.sample.temperature = 1;
    o.sample.seed = 11;
    (void)answer_of(g, &o, &a);
    model_seq_end(mod, 0);
    (void)answer_of(g, &o, &b);
    model_seq_end(mod, 0);
    o.sample.seed = 12;
    (void)answer_of(g, &o, &c);
    ck_assert_mem_eq(a.id, b.id, 40 * sizeof(int32_t));
    ck_assert_mem_ne(a.id, c.id, 40 * sizeof(int32_t));
    gen_close(&g);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

START_TEST(test_generate_canceled)
{
    const model_desc m = tiny_desc();
    err e;
    gen_result r;
    generator *g;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 100});
    atomic_bool stop = true;
    const job j = {.stop = &stop};
    answer a = {0};
    const gen_opts o = {.ids = ids, .n_ids = 10, .max_new = 40, .sample = sample_greedy()};
    ck_assert_int_eq(gen_open(&g, mod, NULL, &e), OK);
    ck_assert_int_eq(gen_run(g, &o, &r, on_token, &a, &j, &e), OK);
    ck_assert_int_eq(r.end, GEN_CANCELED);
    ck_assert_int_eq(a.n, 0);
    ck_assert_int_eq(model_seq_len(mod, 0), 0);
    gen_close(&g);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

START_TEST(test_token_loop_allocates_nothing)
{
    const model_desc m = tiny_desc();
    err e;
    generator *g;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 100});
    answer a = {0};
    ck_assert_int_eq(gen_open(&g, mod, NULL, &e), OK);
    gen_opts o = {.ids = ids, .n_ids = 10, .max_new = 40, .sample = sample_greedy()};
    o.sample.temperature = 0.9;
    o.sample.top_p = 0.95;
    o.sample.top_k = 40;
    o.sample.repetition_penalty = 1.1;
    const long before = alloc_count();
    (void)answer_of(g, &o, &a);
    ck_assert_int_eq(a.n, 40);
    ck_assert_int_eq(a.allocs, before);
    gen_close(&g);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

/* ---- scores ---- */

START_TEST(test_score)
{
    static double want[12 * 50];
    const model_desc m = tiny_desc();
    err e;
    id_logprob top[60];
    int32_t n;
    double sum = 0, total = 0;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 64});
    ck_assert_int_eq(score_next(mod, ids, 12, 60, top, &n, NULL, &e), OK);
    ck_assert_int_eq(n, 50);
    tiny_forward(want, src, ids, 12, NULL, NULL);
    for (int i = 0; i < 50; i++) sum += exp(want[11 * 50 + i]);
    for (int i = 0; i < 50; i++) {
        ck_assert_double_eq_tol(top[i].logprob, want[11 * 50 + top[i].id] - log(sum), 4e-3);
        if (i) ck_assert_double_ge(top[i - 1].logprob, top[i].logprob);
        total += exp(top[i].logprob);
    }
    ck_assert_double_eq_tol(total, 1, 1e-6);
    id_logprob five[5];
    ck_assert_int_eq(score_next(mod, ids, 12, 5, five, &n, NULL, &e), OK);
    ck_assert_int_eq(n, 5);
    for (int i = 0; i < 5; i++) {
        ck_assert_int_eq(five[i].id, top[i].id);
        ck_assert_double_eq(five[i].logprob, top[i].logprob);
    }
    ck_assert_int_eq(model_seq_len(mod, 0), 0);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

START_TEST(test_perplexity)
{
    static double want[30 * 50];
    const model_desc m = tiny_desc();
    err e;
    ppl_result r, b;
    double sum = 0;
    weight_src *src = tiny(&m);
    model *mod = open_model(src, &(model_opts){.session_len = 30});
    const ppl_opts o = {.window = 30};
    ck_assert_int_eq(ppl_run(&r, mod, ids, 110, &o, NULL, &e), OK);
    ck_assert_int_eq(r.windows, 3); /* 20 left over */
    ck_assert_int_eq(r.tokens, 87);
    for (int w = 0; w < 3; w++) {
        tiny_forward(want, src, ids + 30 * w, 30, NULL, NULL);
        for (int i = 0; i < 29; i++) {
            double z = 0;
            for (int k = 0; k < 50; k++) z += exp(want[i * 50 + k]);
            sum += log(z) - want[i * 50 + ids[30 * w + i + 1]];
        }
    }
    ck_assert_double_eq_tol(r.nll, sum / 87, 1e-5);
    ck_assert_double_eq_tol(r.ppl, exp(sum / 87), 1e-3);
    model_close(&mod);

    /* Two windows a step: the same sum. */
    mod = open_model(src, &(model_opts){.session_len = 30, .max_seqs = 2});
    ck_assert_int_eq(ppl_run(&b, mod, ids, 110, &o, NULL, &e), OK);
    ck_assert_int_eq(b.tokens, 87);
    ck_assert_double_eq(r.nll, b.nll);
    const ppl_opts one = {.window = 30, .max_windows = 1};
    ck_assert_int_eq(ppl_run(&b, mod, ids, 110, &one, NULL, &e), OK);
    ck_assert_int_eq(b.windows, 1);
    ck_assert_int_eq(ppl_run(&b, mod, ids, 29, &o, NULL, &e), E_INPUT);
    const ppl_opts wide = {.window = 40};
    ck_assert_int_eq(ppl_run(&b, mod, ids, 110, &wide, NULL, &e), E_LIMIT);
    model_close(&mod);
    weights_close(&src);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("generate");
    TCase *t = tcase_create("generate");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    tcase_add_test(t, test_generate);
    tcase_add_test(t, test_generate_seeded);
    tcase_add_test(t, test_generate_canceled);
    tcase_add_test(t, test_token_loop_allocates_nothing);
    tcase_add_test(t, test_score);
    tcase_add_test(t, test_perplexity);
    suite_add_tcase(s, t);
    return suite_run(s);
}
