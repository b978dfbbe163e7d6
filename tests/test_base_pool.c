/* base/pool: every item once, whatever the counts; run under the thread sanitizer too. */
#include "base/pool.h"
#include "support/suite.h"

#include <check.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { MAX_ITEMS = 5000 };

typedef struct {
    int hits
        [MAX_ITEMS]; /* plain: a second writer of an item is a race that the sanitizer reports */
    int64_t value[MAX_ITEMS];
    int threads;
    atomic_int bad_worker;
    atomic_int used[64];
} work;

static void item(void *ctx, int64_t i, int worker)
{
    work *w = ctx;
    if (worker < 0 || worker >= w->threads) atomic_fetch_add(&w->bad_worker, 1);
    atomic_fetch_add_explicit(&w->used[worker & 63], 1, memory_order_relaxed);
    w->hits[i]++;
    w->value[i] = i * i + 1;
}

static pool *open_pool(int threads)
{
    err e;
    pool *p;
    ck_assert_msg(pool_open(&p, threads, &e) == OK, "%s", e.msg);
    return p;
}

START_TEST(pool_every_item_once)
{
    static const int64_t counts[] = {0, 1, 2, 3, 7, 64, 1000, MAX_ITEMS};
    static const int threads[] = {1, 2, 3, 8};
    work *w = calloc(1, sizeof *w);
    for (size_t t = 0; t < sizeof threads / sizeof *threads; t++) {
        pool *p = open_pool(threads[t]);
        ck_assert_int_eq(pool_threads(p), threads[t]);
        w->threads = threads[t];
        for (size_t c = 0; c < sizeof counts / sizeof *counts; c++) {
            memset(w->hits, 0, sizeof w->hits);
            pool_run(p, item, w, counts[c]);
            for (int64_t i = 0; i < MAX_ITEMS; i++) ck_assert_int_eq(w->hits[i], i < counts[c]);
            for (int64_t i = 0; i < counts[c]; i++) ck_assert(w->value[i] == i * i + 1);
        }
        ck_assert_int_eq(atomic_load(&w->bad_worker), 0);
        pool_close(&p);
        ck_assert_ptr_null(p);
    }
    free(w);
}
END_TEST

/* Many short runs back to back, the pattern of decoding; results of one feed the next. */
static void add_one(void *ctx, int64_t i, int worker)
{
    (void)worker;
    ((int *)ctx)[i]++;
}

static void many_runs(int threads, int runs)
{
    int values[16] = {0};
    pool *p = open_pool(threads);
    for (int r = 0; r < runs; r++) {
        pool_run(p, add_one, values, 1 + r % 16);
        if (r % 997 == 0) { /* long enough for the workers to fall asleep */
            const struct timespec nap = {0, 300000};
            (void)nanosleep(&nap, NULL);
        }
    }
    pool_close(&p);
    for (int i = 0; i < 16; i++) {
        int want = 0;
        for (int r = 0; r < runs; r++) want += r % 16 >= i;
        ck_assert_int_eq(values[i], want);
    }
}

START_TEST(pool_many_runs)
{
    many_runs(2, 20000);
    many_runs(4, 5000); /* more threads than some machines have CPUs */
}
END_TEST

static void slow_first(void *ctx, int64_t i, int worker)
{
    (void)worker;
    const struct timespec nap = {0, i == 0 ? 3000000 : 0};
    if (i == 0) (void)nanosleep(&nap, NULL);
    ((int *)ctx)[i] = 1;
}

/* The caller sleeps until a worker's long item is done, and the other way round. */
START_TEST(pool_uneven_items)
{
    pool *p = open_pool(3);
    for (int r = 0; r < 100; r++) {
        int done[5] = {0};
        pool_run(p, slow_first, done, 5);
        for (int i = 0; i < 5; i++) ck_assert_int_eq(done[i], 1);
    }
    pool_close(&p);
}
END_TEST

START_TEST(pool_without_threads)
{
    work *w = calloc(1, sizeof *w);
    w->threads = 1;
    pool_run(NULL, item, w, 10);
    ck_assert_int_eq(atomic_load(&w->used[0]), 10);
    ck_assert_int_eq(pool_threads(NULL), 1);
    pool *none = NULL;
    pool_close(&none);
    free(w);
}
END_TEST

START_TEST(pool_limits)
{
    err e;
    pool *p = NULL;
    ck_assert_int_eq(pool_open(&p, -1, &e), E_USAGE);
    ck_assert_int_eq(pool_open(&p, 1 << 20, &e), E_USAGE);
    ck_assert_ptr_null(p);
    ck_assert_int_ge(pool_cpu_count(), 1);
    p = open_pool(0);
    ck_assert_int_eq(pool_threads(p), pool_cpu_count());
    pool_close(&p);
    for (int i = 0; i < 200; i++) { /* threads that never saw a run still stop */
        p = open_pool(3);
        pool_close(&p);
    }
}
END_TEST

static atomic_int caught_by_caller, caught_elsewhere;
static pthread_t caller;

static void on_signal(int n)
{
    (void)n;
    atomic_fetch_add(pthread_equal(pthread_self(), caller) ? &caught_by_caller : &caught_elsewhere,
                     1);
}

START_TEST(pool_signals)
{
    struct sigaction a = {.sa_handler = on_signal};
    caller = pthread_self();
    (void)sigaction(SIGUSR2, &a, NULL);
    pool *p = open_pool(4);
    for (int i = 0; i < 50; i++) ck_assert_int_eq(kill(getpid(), SIGUSR2), 0);
    pool_close(&p);
    ck_assert_int_gt(atomic_load(&caught_by_caller), 0);
    ck_assert_int_eq(atomic_load(&caught_elsewhere), 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base pool");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, pool_every_item_once);
    tcase_add_test(t, pool_many_runs);
    tcase_add_test(t, pool_uneven_items);
    tcase_add_test(t, pool_without_threads);
    tcase_add_test(t, pool_limits);
    tcase_add_test(t, pool_signals);
    suite_add_tcase(s, t);
    return suite_run(s);
}
