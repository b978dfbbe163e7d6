/* libtmforge through its public header alone, with the bundled model, whose greedy words are
 * known. */
#include <check.h>
#include <pthread.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "lib/tmforge.h"
#include "support/suite.h"

#define DEMO TMF_SOURCE_DIR "/datasets/demo"
#define SUM  "[{\"role\":\"user\",\"content\":\"What is 17 + 25?\"}]"

static tmf_model *m;

static tmf_model *open_model(int32_t max_batch)
{
    tmf_options o;
    tmf_model *out;
    tmf_error e = {0};
    tmf_options_init(&o, sizeof o);
    o.max_batch = max_batch;
    o.cache_bytes = 64 << 20;
    ck_assert_msg(tmf_open(&out, DEMO, &o, &e) == TMF_OK, "%s", e.message);
    return out;
}

static void setup(void) { m = open_model(4); }
static void teardown(void)
{
    tmf_close(&m);
    ck_assert_ptr_null(m);
}

/* ---- helpers ---- */

static size_t ids_of(const char *messages, int32_t *ids, size_t cap)
{
    size_t n;
    tmf_error e = {0};
    ck_assert_msg(tmf_chat_encode(m, messages, strlen(messages), 0, ids, cap, &n, &e) == TMF_OK,
                  "%s", e.message);
    ck_assert_uint_le(n, cap);
    return n;
}

static tmf_gen_options greedy(int32_t max_new)
{
    tmf_gen_options o;
    tmf_gen_options_init(&o, sizeof o);
    o.temperature = 0;
    o.max_new_tokens = max_new;
    return o;
}

typedef struct {
    char text[8192];
    int32_t ids[2048], n_ids, finish, ends, n_new, n_prompt;
    float logprob;
    tmf_error error;
} whole;

static int gather(void *ud, const tmf_piece *p)
{
    whole *w = (whole *)ud + p->index;
    ck_assert_int_eq(w->ends, 0); /* nothing behind the last piece */
    ck_assert_uint_eq(strlen(p->text), p->n_text);
    ck_assert_uint_lt(strlen(w->text) + p->n_text, sizeof w->text);
    strcat(w->text, p->text);
    for (int32_t i = 0; i < p->n_ids; i++) {
        w->ids[w->n_ids++] = p->ids[i];
        if (p->logprobs) w->logprob += p->logprobs[i];
    }
    w->finish = p->finish;
    w->error = p->error;
    if (p->finish == TMF_RUNNING) return 0;
    w->ends++;
    w->n_new = p->n_new;
    w->n_prompt = p->n_prompt;
    return 0;
}

static whole *ask(const char *messages, const tmf_gen_options *o)
{
    static whole w;
    int32_t ids[1024];
    tmf_error e = {0};
    memset(&w, 0, sizeof w);
    const tmf_prompt p = {ids, ids_of(messages, ids, 1024), o};
    ck_assert_msg(tmf_generate(m, &p, 1, gather, &w, &e) == TMF_OK, "%s", e.message);
    ck_assert_int_eq(w.ends, 1);
    ck_assert_int_eq(w.n_new, w.n_ids);
    return &w;
}

/* ---- opening ---- */

START_TEST(refused)
{
    tmf_options o;
    tmf_model *out = m;
    tmf_error e = {0};
    ck_assert_int_eq(tmf_open(&out, "/nonexistent/model", NULL, &e), e.code);
    ck_assert_int_ne(e.code, TMF_OK);
    ck_assert_ptr_null(out);
    ck_assert_ptr_nonnull(strstr(e.message, "/nonexistent/model"));
    tmf_options_init(&o, sizeof o);
    o.quant_policy = 5;
    ck_assert_int_eq(tmf_open(&out, DEMO, &o, &e), TMF_E_USAGE);
    ck_assert_ptr_nonnull(strstr(e.message, "quant_policy"));
    tmf_options_init(&o, sizeof o);
    o.device = "abacus";
    ck_assert_int_eq(tmf_open(&out, DEMO, &o, &e), TMF_E_USAGE);
    tmf_options_init(&o, sizeof o);
    o.cache_bytes = 1;
    ck_assert_int_eq(tmf_open(&out, DEMO, &o, NULL), TMF_E_LIMIT); /* not even one block */
    tmf_options_init(&o, sizeof o);
    o.chat_template = "no such template";
    ck_assert_int_eq(tmf_open(&out, DEMO, &o, &e), TMF_E_USAGE);
    tmf_close(&out);
    tmf_close(NULL);
}
END_TEST

/* A caller that was compiled with a shorter struct: nothing is written behind it, the rest has its
 * default. */
START_TEST(older_structs)
{
    tmf_gen_options o, full;
    tmf_info i;
    memset(&o, 0x5a, sizeof o);
    const size_t short_size = offsetof(tmf_gen_options, top_k);
    tmf_gen_options_init(&o, short_size);
    ck_assert_uint_eq(o.size, short_size);
    ck_assert(o.temperature == 0.8);
    ck_assert_int_eq(o.top_k, 0x5a5a5a5a);
    tmf_gen_options_init(&full, sizeof full);
    ck_assert_int_eq(full.top_k, 50);
    o.temperature = 0;
    o.max_new_tokens = 3; /* top_k and what follows is garbage that must not be read */
    ck_assert_int_eq(ask(SUM, &o)->n_new, 3);
    memset(&i, 0x5a, sizeof i);
    tmf_info_get(m, &i, offsetof(tmf_info, vocab));
    ck_assert_int_eq(i.session_len, 1024);
    ck_assert_int_eq(i.vocab, 0x5a5a5a5a);
    tmf_info_get(m, &i, sizeof i);
    ck_assert_int_eq(i.vocab, 4096);
    ck_assert_int_eq(i.max_batch, 4);
    ck_assert_int_eq(i.kv_bits, 16);
    ck_assert_str_eq(tmf_version(), TMF_VERSION);
}
END_TEST

/* ---- texts ---- */

START_TEST(texts)
{
    static const char text[] = "hello w\xc3\xb6rld";
    int32_t ids[64], again[64];
    char out[64] = "";
    size_t n, k;
    tmf_error e;
    ck_assert_int_eq(tmf_encode(m, text, strlen(text), TMF_ADD_BOS, NULL, 0, &n, &e), TMF_OK);
    ck_assert_uint_gt(n, 2);
    ck_assert_int_eq(tmf_encode(m, text, strlen(text), TMF_ADD_BOS, ids, 64, &k, &e), TMF_OK);
    ck_assert_uint_eq(k, n);
    again[2] = -7;
    ck_assert_int_eq(tmf_encode(m, text, strlen(text), TMF_ADD_BOS, again, 2, &k, &e), TMF_OK);
    ck_assert_uint_eq(k, n);
    ck_assert_mem_eq(ids, again, 2 * sizeof *ids);
    ck_assert_int_eq(again[2], -7);
    ck_assert_int_eq(tmf_decode(m, ids, n, 0, out, sizeof out, &k, &e), TMF_OK);
    ck_assert_str_eq(out, text);
    ck_assert_uint_eq(k, strlen(text));
    ck_assert_int_eq(tmf_decode(m, ids, n, TMF_KEEP_SPECIAL, out, 4, &k, &e), TMF_OK);
    ck_assert_str_eq(out, "<s>");
    ck_assert_uint_eq(k, strlen(text) + 3);
    ids[0] = 1 << 30;
    ck_assert_int_ne(tmf_decode(m, ids, n, 0, out, sizeof out, &k, &e), TMF_OK);
    ck_assert_uint_eq(k, 0);
}
END_TEST

START_TEST(conversations)
{
    static const char parts[] =
        " {\"messages\": [{\"role\":\"user\",\"content\":[{\"type\":\"text\","
        "\"text\":\"What is 17 + 25?\"}]}]}";
    static const char *const wrong[] = {"",
                                        "{",
                                        "[]",
                                        "[1]",
                                        "{\"messages\":1}",
                                        "[{\"role\":\"user\"}]",
                                        "[{\"role\":\"user\",\"content\":1}]",
                                        "[{\"role\":\"user\",\"content\":\"x\"}] x"};
    int32_t a[256], b[256];
    char out[256];
    size_t n;
    tmf_error e;
    const size_t na = ids_of(SUM, a, 256), nb = ids_of(parts, b, 256);
    ck_assert_uint_eq(na, nb);
    ck_assert_mem_eq(a, b, na * sizeof *a);
    ck_assert_int_eq(tmf_chat_render(m, SUM, strlen(SUM), 0, out, sizeof out, &n, &e), TMF_OK);
    ck_assert_ptr_nonnull(strstr(out, "user\nWhat is 17 + 25?"));
    ck_assert_int_eq(n, strlen(out));
    const size_t with = n;
    ck_assert_int_eq(
        tmf_chat_render(m, SUM, strlen(SUM), TMF_NO_GENERATION, out, sizeof out, &n, &e), TMF_OK);
    ck_assert_uint_lt(n, with);
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        ck_assert_msg(tmf_chat_encode(m, wrong[i], strlen(wrong[i]), 0, a, 256, &n, &e) != TMF_OK,
                      "'%s'", wrong[i]);
        ck_assert_uint_gt(strlen(e.message), 0);
    }
}
END_TEST

/* ---- answers ---- */

START_TEST(one_answer)
{
    tmf_gen_options o = greedy(64);
    const char *stop = "= 4";
    o.logprobs = 1;
    whole *w = ask(SUM, &o);
    ck_assert_str_eq(w->text, "17 + 25 = 42.");
    ck_assert_int_eq(w->finish, TMF_STOP);
    ck_assert(w->logprob < 0 && w->logprob > -1);
    ck_assert_int_eq(w->n_prompt, (int32_t)ids_of(SUM, w->ids, 2048));
    o.stop_texts = &stop;
    o.n_stop_texts = 1;
    w = ask(SUM, &o);
    ck_assert_str_eq(w->text, "17 + 25 ");
    ck_assert_int_eq(w->finish, TMF_STOP);
    o = greedy(3);
    w = ask(SUM, &o);
    ck_assert_int_eq(w->finish, TMF_LENGTH);
    ck_assert_int_eq(w->n_new, 3);
    o = greedy(40);
    o.ignore_eos = 1;
    w = ask(SUM, &o);
    ck_assert_int_eq(w->n_new, 40);
    o = greedy(64);
    o.stop_ids = &w->ids[4];
    o.n_stop_ids = 1;
    const int32_t fifth = w->ids[4];
    o.stop_ids = &fifth;
    w = ask(SUM, &o);
    ck_assert_int_eq(w->n_new, 4);
    ck_assert_int_eq(w->finish, TMF_STOP);
}
END_TEST

START_TEST(limits)
{
    tmf_gen_options o = greedy(64);
    o.regex = "[a-c]{5}";
    whole *w = ask(SUM, &o);
    ck_assert_uint_eq(strspn(w->text, "abc"), 5);
    ck_assert_uint_eq(strlen(w->text), 5);
    o.regex = "(";
    w = ask(SUM, &o);
    ck_assert_int_eq(w->finish, TMF_FAILED);
    ck_assert_int_ne(w->error.code, TMF_OK);
    o.regex = NULL;
    o.json_schema = "{\"type\":\"array\",\"items\":{\"const\":7},\"minItems\":2,\"maxItems\":2}";
    w = ask(SUM, &o);
    ck_assert_int_eq(w->finish, TMF_STOP);
    ck_assert_uint_eq(strspn(w->text, "[7, \n\t]"), strlen(w->text));
}
END_TEST

START_TEST(refused_options)
{
    static const char *const empty[] = {""};
    int32_t ids[64];
    tmf_error e;
    tmf_batch *b = NULL;
    const size_t n = ids_of(SUM, ids, 64);
    tmf_gen_options o[6];
    for (int i = 0; i < 6; i++) o[i] = greedy(8);
    o[0].top_p = 2;
    o[1].max_new_tokens = -1;
    o[2].n_stop_texts = 1;
    o[2].stop_texts = empty;
    o[3].n_stop_ids = 1000;
    o[4].regex = "a";
    o[4].json_schema = "{}";
    o[5].temperature = -1;
    for (int i = 0; i < 6; i++) {
        const tmf_prompt p = {ids, n, &o[i]};
        ck_assert_int_eq(tmf_batch_open(&b, m, &p, 1, &e), TMF_E_USAGE);
        ck_assert_ptr_null(b);
    }
    const tmf_prompt none = {ids, 0, NULL};
    ck_assert_int_eq(tmf_batch_open(&b, m, &none, 1, &e), TMF_E_USAGE);
}
END_TEST

#define MANY 30
/* More prompts than fit at once, each with its own words: as alone; the one that is too long fails
 * by itself. */
START_TEST(many)
{
    static int32_t ids[MANY][64], longest[2000];
    static whole w[MANY + 1];
    char text[128];
    tmf_prompt p[MANY + 1];
    tmf_error e = {0};
    tmf_gen_options o = greedy(24), seeded = greedy(24);
    seeded.temperature = 1;
    seeded.seed = 5;
    memset(w, 0, sizeof w);
    for (int i = 0; i < MANY; i++) {
        (void)snprintf(text, sizeof text, "[{\"role\":\"user\",\"content\":\"What is %d + %d?\"}]",
                       10 + i, 30 + i);
        p[i] = (tmf_prompt){ids[i], ids_of(text, ids[i], 64), i % 2 ? &o : &seeded};
    }
    for (int i = 0; i < 2000; i++) longest[i] = 300;
    p[MANY] = (tmf_prompt){longest, 2000, &o};
    ck_assert_msg(tmf_generate(m, p, MANY + 1, gather, w, &e) == TMF_OK, "%s", e.message);
    ck_assert_int_eq(w[MANY].finish, TMF_FAILED);
    ck_assert_int_ne(w[MANY].error.code, TMF_OK);
    for (int i = 0; i < MANY; i++) {
        static whole alone;
        char decoded[8192];
        size_t n;
        ck_assert_int_eq(w[i].ends, 1);
        if (i % 5) continue;
        memset(&alone, 0, sizeof alone);
        ck_assert_int_eq(tmf_generate(m, &p[i], 1, gather, &alone, &e), TMF_OK);
        ck_assert_str_eq(alone.text, w[i].text);
        ck_assert_mem_eq(alone.ids, w[i].ids, sizeof alone.ids);
        ck_assert_int_eq(
            tmf_decode(m, w[i].ids, (size_t)w[i].n_ids, 0, decoded, sizeof decoded, &n, &e),
            TMF_OK);
        ck_assert_str_eq(decoded, w[i].text);
    }
}
END_TEST

START_TEST(canceled)
{
    int32_t ids[64];
    tmf_error e;
    tmf_batch *b;
    tmf_gen_options o = greedy(900);
    whole w[8];
    memset(w, 0, sizeof w);
    o.ignore_eos = 1;
    const size_t n = ids_of(SUM, ids, 64);
    tmf_prompt p[8];
    for (int i = 0; i < 8; i++) p[i] = (tmf_prompt){ids, n, &o};
    ck_assert_int_eq(tmf_batch_open(&b, m, p, 8, &e), TMF_OK);
    tmf_piece piece = {.size = sizeof piece};
    ck_assert_int_eq(tmf_batch_next(b, 0, &piece, &e), TMF_OK); /* does not wait */
    ck_assert_int_ge(piece.left, 8);
    do {
        ck_assert_int_eq(tmf_batch_next(b, -1, &piece, &e), TMF_OK);
    } while (piece.n_ids == 0);
    tmf_batch_cancel(b, 1);  /* runs */
    tmf_batch_cancel(b, 7);  /* waits */
    tmf_batch_cancel(b, 99); /* is none */
    while (w[1].ends + w[7].ends < 2) {
        ck_assert_int_eq(tmf_batch_next(b, -1, &piece, &e), TMF_OK);
        ck_assert_int_ge(piece.index, 0);
        (void)gather(w, &piece);
        if (w[1].ends && !w[7].ends) tmf_batch_cancel(b, -1); /* so that 7 has its turn */
    }
    ck_assert_int_eq(w[1].finish, TMF_STOPPED);
    ck_assert_int_eq(w[7].finish, TMF_STOPPED);
    ck_assert_int_lt(w[1].n_new, 900);
    ck_assert_int_eq(w[7].n_new, 0);
    tmf_batch_close(&b);
    ck_assert_int_eq(tmf_batch_open(&b, m, p, 8, &e), TMF_OK);
    ck_assert_int_eq(tmf_batch_next(b, -1, &piece, &e), TMF_OK);
    tmf_batch_close(&b); /* while they run */
    ck_assert_ptr_null(b);
    o = greedy(64);
    ck_assert_str_eq(ask(SUM, &o)->text, "17 + 25 = 42.");
    ck_assert_int_eq(tmf_batch_open(&b, m, p, 0, &e), TMF_OK); /* no prompts: over at once */
    ck_assert_int_eq(tmf_batch_next(b, -1, &piece, &e), TMF_OK);
    ck_assert_int_eq(piece.index, -1);
    tmf_batch_close(&b);
}
END_TEST

static int stop_all(void *ud, const tmf_piece *p)
{
    int *ends = ud;
    *ends += p->finish == TMF_STOPPED;
    return 1;
}

START_TEST(stopped_by_callback)
{
    int32_t ids[64];
    int ends = 0;
    tmf_error e;
    tmf_gen_options o = greedy(900);
    o.ignore_eos = 1;
    const tmf_prompt one = {ids, ids_of(SUM, ids, 64), &o}, p[6] = {one, one, one, one, one, one};
    ck_assert_int_eq(tmf_generate(m, p, 6, stop_all, &ends, &e), TMF_OK);
    ck_assert_int_eq(ends, 6);
}
END_TEST

/* Three threads, each with batches of its own on the one model. */
static void *thread_of(void *ud)
{
    static const int32_t want = TMF_STOP;
    bool *right = ud;
    tmf_gen_options o = greedy(64);
    int32_t ids[64];
    size_t n;
    tmf_error e;
    *right = tmf_chat_encode(m, SUM, strlen(SUM), 0, ids, 64, &n, &e) == TMF_OK;
    for (int round = 0; *right && round < 3; round++) {
        const tmf_prompt one = {ids, n, &o}, p[5] = {one, one, one, one, one};
        whole *w = calloc(5, sizeof *w);
        *right = w && tmf_generate(m, p, 5, gather, w, &e) == TMF_OK;
        for (int i = 0; *right && i < 5; i++)
            *right = strcmp(w[i].text, "17 + 25 = 42.") == 0 && w[i].finish == want;
        free(w);
    }
    return NULL;
}

/* More than the batch holds, and the same for each. */
START_TEST(scores)
{
    static int32_t ids[64];
    const size_t n = ids_of(SUM, ids, 64);
    int32_t bad[] = {5, 1 << 30};
    tmf_prompt p[9];
    double nll[9] = {0};
    tmf_error e = {0};
    for (int i = 0; i < 9; i++) p[i] = (tmf_prompt){.ids = ids, .n_ids = i == 4 ? n / 2 : n};
    ck_assert_msg(tmf_score(m, p, 9, nll, &e) == TMF_OK, "%s", e.message);
    for (int i = 0; i < 9; i++) {
        ck_assert(nll[i] > 0 && nll[i] < 20);
        ck_assert((nll[i] == nll[0]) == (i != 4));
    }
    ck_assert_int_eq(tmf_score(m, p, 0, nll, &e), TMF_OK);
    p[5] = (tmf_prompt){.ids = bad, .n_ids = 2};
    ck_assert_int_eq(tmf_score(m, p, 9, nll, &e), TMF_E_USAGE);
    ck_assert_msg(strncmp(e.message, "prompt 5: ", 10) == 0, "%s", e.message);
    p[5].n_ids = 1;
    ck_assert_int_eq(tmf_score(m, p, 9, nll, NULL), TMF_E_USAGE);
}
END_TEST

START_TEST(threads)
{
    pthread_t t[3];
    bool right[3];
    for (int i = 0; i < 3; i++)
        ck_assert_int_eq(pthread_create(&t[i], NULL, thread_of, &right[i]), 0);
    for (int i = 0; i < 3; i++) ck_assert_int_eq(pthread_join(t[i], NULL), 0);
    for (int i = 0; i < 3; i++) ck_assert(right[i]);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("lib");
    TCase *c = tcase_create("lib");
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_set_timeout(c, 120);
    tcase_add_test(c, refused);
    tcase_add_test(c, older_structs);
    tcase_add_test(c, texts);
    tcase_add_test(c, conversations);
    tcase_add_test(c, one_answer);
    tcase_add_test(c, limits);
    tcase_add_test(c, refused_options);
    tcase_add_test(c, many);
    tcase_add_test(c, canceled);
    tcase_add_test(c, stopped_by_callback);
    tcase_add_test(c, scores);
    tcase_add_test(c, threads);
    suite_add_tcase(s, c);
    return suite_run(s);
}
