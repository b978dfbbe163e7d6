/* The engine at its limits: what it refuses, the end of an answer in every state, failing steps,
 * readers, threads. */
#include <check.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "support/alloc_count.h"
#include "support/engine_case.h"
#include "support/fake_constraint.h"
#include "support/suite.h"

/* ---- the door ---- */

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
    engine_stats s;
    up(NULL, 1, SESSION, (engine_opts){0});
    plain_request(&requests[0], 10, 0, 3);
    requests[0].r.timeout_ms = 500; /* enough for both to be in, on a busy machine too */
    gate_set(0);
    a = submit(&requests[0]);
    b = submit(&requests[0]);
    gate_wait();
    (void)usleep(510000);
    engine_stats_get(eng, &s);
    ck_assert_double_ge(s.step_s, 0.51);
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
    for (int i = 0; i < 200 && open_files() != files; i++) /* the engine drops an answer last */
        (void)nanosleep(&(struct timespec){0, 5000000}, NULL);
    ck_assert_int_eq(open_files(), files);
    down();
}
END_TEST
static Suite *suite(void)
{
    Suite *s = suite_create("engine_limits");
    TCase *t = tcase_create("limits");
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

int main(void) { return suite_run(suite()); }
