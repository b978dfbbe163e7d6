/* Answers with text (the bundled model), and every allocation of the runtime failing in turn. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/bench.h"
#include "runtime/generate.h"
#include "runtime/score.h"
#include "runtime/tasks.h"
#include "support/alloc_fail.h"
#include "support/suite.h"
#include "support/tiny_weights.h"

#define DEMO TMF_SOURCE_DIR "/datasets/demo"

static device *dev;
static weight_src *src;
static tokenizer *tok;
static chat *tmpl;
static model *mod;
static generator *gen;

static void must(err_code rc, const err *e) { ck_assert_msg(rc == OK, "%s", e->msg); }

static void setup(void)
{
    err e;
    must(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 2}, &e), &e);
    must(weights_open(&src, DEMO, &e), &e);
    must(tokenizer_open(&tok, DEMO, &e), &e);
    must(chat_open(&tmpl, tok, NULL, "internlm2", NULL, &e), &e);
    must(model_open(&mod, dev, src, &(model_opts){.session_len = 200}, NULL, &e), &e);
    must(gen_open(&gen, mod, tok, &e), &e);
}

static void teardown(void)
{
    gen_close(&gen);
    model_close(&mod);
    chat_close(&tmpl);
    tokenizer_close(&tok);
    weights_close(&src);
    dev_close(&dev);
}

/* ---- text ---- */

typedef struct {
    char text[4096];
    size_t n;
    int calls, flushes;
} heard;

static bool hear(void *ud, int32_t id, const char *text, size_t n)
{
    heard *h = ud;
    memcpy(h->text + h->n, text, n);
    h->n += n;
    h->text[h->n] = 0;
    h->calls++;
    h->flushes += id < 0;
    return true;
}

static gen_result ask(const char *question, const char *const *stops, int n_stops, heard *h)
{
    static const int32_t stop_ids[] = {2, 4094};
    const chat_message m = {"user", question};
    token_list ids = {0};
    gen_result r;
    err e;
    memset(h, 0, sizeof *h);
    model_seq_end(mod, 0);
    must(chat_encode(tmpl, &m, 1, NULL, true, &ids, &e), &e);
    const gen_opts o = {.ids = ids.ids,
                        .n_ids = (int32_t)ids.n,
                        .max_new = 60,
                        .stop_ids = stop_ids,
                        .n_stop_ids = 2,
                        .stop_texts = stops,
                        .n_stop_texts = n_stops,
                        .sample = sample_greedy()};
    must(gen_run(gen, &o, &r, hear, h, NULL, &e), &e);
    token_list_free(&ids);
    return r;
}

START_TEST(test_stop_id_has_no_text)
{
    heard h;
    const gen_result r = ask("What is 17 + 25?", NULL, 0, &h);
    ck_assert_int_eq(r.end, GEN_STOP_ID);
    ck_assert_str_eq(h.text, "17 + 25 = 42.");
    ck_assert_int_eq(h.calls, r.n_new);
    ck_assert_int_eq(h.flushes, 0);
}
END_TEST

START_TEST(test_stop_text_over_tokens)
{
    /* "25 = 42" is several tokens; what looked like its beginning before ("5", "25 ") must not be
     * lost. */
    static const char *const stops[] = {"25 = 42", "never"};
    heard h;
    const gen_result r = ask("What is 17 + 25?", stops, 2, &h);
    ck_assert_int_eq(r.end, GEN_STOP_TEXT);
    ck_assert_str_eq(h.text, "17 + ");
}
END_TEST

START_TEST(test_first_of_two_stop_texts)
{
    static const char *const stops[] = {"= 42", "+"};
    heard h;
    ck_assert_int_eq(ask("What is 17 + 25?", stops, 2, &h).end, GEN_STOP_TEXT);
    ck_assert_str_eq(h.text, "17 ");
}
END_TEST

START_TEST(test_held_text_comes_out)
{
    /* The answer ends with the beginning of a stop text: it was held back and is flushed. */
    static const char *const stops[] = {"42. And more", "17 + 26"};
    heard h;
    ck_assert_int_eq(ask("What is 17 + 25?", stops, 2, &h).end, GEN_STOP_ID);
    ck_assert_str_eq(h.text, "17 + 25 = 42.");
    ck_assert_int_eq(h.flushes, 1);
}
END_TEST

START_TEST(test_bad_stop_texts)
{
    static const char *const empty[] = {""};
    char longest[GEN_MAX_STOP_BYTES + 2];
    const char *const too_long[] = {longest};
    gen_result r;
    err e;
    const int32_t ids[] = {1, 2};
    memset(longest, 'x', sizeof longest - 1);
    longest[sizeof longest - 1] = 0;
    gen_opts o = {
        .ids = ids, .n_ids = 2, .stop_texts = empty, .n_stop_texts = 1, .sample = sample_greedy()};
    ck_assert_int_eq(gen_run(gen, &o, &r, NULL, NULL, NULL, &e), E_USAGE);
    o.stop_texts = too_long;
    ck_assert_int_eq(gen_run(gen, &o, &r, NULL, NULL, NULL, &e), E_USAGE);
    o.n_stop_texts = GEN_MAX_STOP_TEXTS + 1;
    ck_assert_int_eq(gen_run(gen, &o, &r, NULL, NULL, NULL, &e), E_USAGE);
}
END_TEST

/* ---- allocation failures ---- */

static err_code use_model(weight_src *tiny, err *e)
{
    static const int32_t ids[12] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12};
    static const logit_bias bias[] = {{3, 1}};
    model *m = NULL;
    generator *g = NULL;
    gen_result r;
    id_logprob top[3];
    ppl_result p;
    bench_result b;
    int32_t n;
    gen_opts o = {.ids = ids, .n_ids = 3, .max_new = 3, .sample = sample_greedy()};
    err_code rc = model_open(&m, dev, tiny, &(model_opts){.session_len = 32, .max_seqs = 2}, NULL,
                             e);
    o.sample.bias = bias;
    o.sample.n_bias = 1;
    if (rc == OK) rc = gen_open(&g, m, NULL, e);
    if (rc == OK) rc = gen_run(g, &o, &r, NULL, NULL, NULL, e);
    if (rc == OK) rc = score_next(m, ids, 5, 3, top, &n, NULL, e);
    if (rc == OK) rc = ppl_run(&p, m, ids, 12, &(ppl_opts){4, 0}, NULL, e);
    if (rc == OK)
        rc = bench_run(&b, m,
                       &(bench_opts){.prompt_tokens = 4, .new_tokens = 2, .rounds = 1, .batch = 1},
                       NULL, e);
    gen_close(&g);
    model_close(&m);
    return rc;
}

START_TEST(test_every_allocation_of_a_model)
{
    err e;
    for (int form = 0; form < 3; form++) {
        tiny_opts o = {.desc = tiny_desc(), .seed = 3, .w4_group = form == 1 ? 32 : 0};
        weight_src *tiny, *turned;
        long n = 0;
        err_code rc;
        o.desc.ffn = 128;
        must(tiny_open(&tiny, &o, &e), &e);
        if (form == 2) {
            must(tiny_turned(&turned, &tiny, &e), &e);
            tiny = turned;
            must(use_model(tiny, &e),
                 &e); /* it keeps what it turned; only the runtime's calls count below */
        }
        do {
            alloc_fail_at(++n);
            rc = use_model(tiny, &e);
            ck_assert_msg(rc == (alloc_failed() ? E_NOMEM : OK), "allocation %ld: code %d: %s", n,
                          (int)rc, e.msg);
        } while (alloc_failed());
        alloc_fail_at(0);
        ck_assert_int_gt(n, 30);
        weights_close(&tiny);
    }
}
END_TEST

static err_code use_tasks(const char *path, err *e)
{
    static const int32_t stop_ids[] = {2, 4094};
    tasks *k = NULL;
    tasks_result r;
    const tasks_opts o = {.max_new = 20, .stop_ids = stop_ids, .n_stop_ids = 2};
    err_code rc = tasks_open(&k, path, tok, tmpl, NULL, e);
    if (rc == OK) rc = tasks_run(&r, k, mod, &o, NULL, e);
    if (rc == OK) ck_assert_int_eq(r.right, 2);
    tasks_close(&k);
    return rc;
}

START_TEST(test_every_allocation_of_tasks)
{
    char path[] = "/tmp/tmforge-tasks-XXXXXX";
    err e;
    err_code rc;
    long n = 0;
    const int fd = mkstemp(path);
    FILE *f = fdopen(fd, "w");
    ck_assert_ptr_nonnull(f);
    for (int i = 0; i < 2; i++)
        (void)fputs("{\"kind\":\"arith\",\"messages\":[{\"role\":\"user\",\"content\":\"What is 17 "
                    "+ 25?\"}],"
                    "\"answer\":\"17 + 25 = 42.\"}\n",
                    f);
    ck_assert_int_eq(fclose(f), 0);
    do {
        alloc_fail_at(++n);
        rc = use_tasks(path, &e);
        ck_assert_msg(rc == (alloc_failed() ? E_NOMEM : OK), "allocation %ld: code %d: %s", n,
                      (int)rc, e.msg);
    } while (alloc_failed());
    alloc_fail_at(0);
    (void)remove(path);
    ck_assert_int_gt(n, 5);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("answers");
    TCase *t = tcase_create("answers");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 120);
    tcase_add_test(t, test_stop_id_has_no_text);
    tcase_add_test(t, test_stop_text_over_tokens);
    tcase_add_test(t, test_first_of_two_stop_texts);
    tcase_add_test(t, test_held_text_comes_out);
    tcase_add_test(t, test_bad_stop_texts);
    tcase_add_test(t, test_every_allocation_of_a_model);
    tcase_add_test(t, test_every_allocation_of_tasks);
    suite_add_tcase(s, t);
    return suite_run(s);
}
