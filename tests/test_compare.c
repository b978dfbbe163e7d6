/* runtime/compare.h against a plain forward pass in doubles. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/compare.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)
enum { WINDOW = 200, WINDOWS = 3 }; /* more than one piece a window */

static device *dev;
static int32_t ids[WINDOW * WINDOWS + 7];

static void setup(void)
{
    uint32_t x = 1;
    err e;
    MUST(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 2, .isa = "avx2"}, &e));
    for (size_t i = 0; i < sizeof ids / sizeof *ids; i++)
        ids[i] = (int32_t)((x = x * 1664525u + 1013904223u) >> 16) % 50;
}

static void teardown(void) { dev_close(&dev); }

typedef struct {
    weight_src *src;
    model *m;
} side;

static side open_side(uint64_t seed, int32_t vocab)
{
    const model_opts mo = {.session_len = WINDOW, .kv_mem_bytes = 1 << 22};
    tiny_opts o = {.desc = tiny_desc(), .seed = seed};
    side s = {0};
    err e;
    if (vocab) o.desc.vocab = vocab;
    MUST(tiny_open(&s.src, &o, &e));
    MUST(model_open(&s.m, dev, s.src, &mo, NULL, &e));
    return s;
}

static void close_side(side *s)
{
    model_close(&s->m);
    weights_close(&s->src);
}

static double norm_of(const double *l, int n)
{
    double sum = 0;
    for (int i = 0; i < n; i++) sum += exp(l[i]);
    return log(sum);
}

static int best_of(const double *l, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (l[i] > l[best]) best = i;
    return best;
}

START_TEST(against_plain)
{
    side a = open_side(1, 0), b = open_side(2, 0);
    const int vocab = weights_desc(a.src)->vocab;
    double *x = malloc(sizeof(double) * WINDOW * (size_t)vocab),
           *y = malloc(sizeof(double) * WINDOW * (size_t)vocab), kl = 0, diff[WINDOWS] = {0},
           mean = 0, spread = 0, first = 0;
    int same = 0;
    compare_result r;
    err e;
    const ppl_opts o = {.window = WINDOW};
    MUST(compare_run(&r, a.m, b.m, ids, sizeof ids / sizeof *ids, &o, NULL, &e));
    for (int w = 0; w < WINDOWS; w++) {
        tiny_forward(x, a.src, ids + w * WINDOW, WINDOW, NULL, NULL);
        tiny_forward(y, b.src, ids + w * WINDOW, WINDOW, NULL, NULL);
        for (int t = 0; t + 1 < WINDOW; t++) {
            const double *p = x + t * vocab, *q = y + t * vocab, np = norm_of(p, vocab),
                         nq = norm_of(q, vocab);
            const int32_t next = ids[w * WINDOW + t + 1];
            diff[w] += (np - p[next] - nq + q[next]) / (WINDOW - 1);
            first += np - p[next];
            same += best_of(p, vocab) == best_of(q, vocab);
            for (int v = 0; v < vocab; v++) kl += exp(q[v] - nq) * (q[v] - nq - p[v] + np);
        }
        mean += diff[w] / WINDOWS;
    }
    const int tokens = WINDOWS * (WINDOW - 1);
    for (int w = 0; w < WINDOWS; w++) spread += (diff[w] - mean) * (diff[w] - mean);
    ck_assert(r.model.windows == WINDOWS && r.model.tokens == tokens);
    ck_assert_double_eq_tol(r.model.nll, first / tokens, 1e-3);
    ck_assert_double_eq_tol(r.nll, mean, 1e-3);
    ck_assert_double_eq_tol(r.nll, r.model.nll - r.reference.nll, 1e-9);
    ck_assert_double_eq_tol(r.nll_error, sqrt(spread / WINDOWS / (WINDOWS - 1)), 1e-3);
    ck_assert_double_eq_tol(r.kl, kl / tokens, 2e-3 * kl / tokens);
    ck_assert(r.kl > 0 && r.kl_error > 0);
    ck_assert_double_eq_tol(r.top1, (double)same / tokens, 3. / tokens); /* near ties */
    free(x);
    free(y);
    close_side(&a);
    close_side(&b);
}
END_TEST

START_TEST(with_itself)
{
    side a = open_side(1, 0), b = open_side(1, 0);
    compare_result r;
    ppl_result p;
    err e;
    const ppl_opts o = {.window = WINDOW, .max_windows = 2};
    MUST(compare_run(&r, a.m, b.m, ids, sizeof ids / sizeof *ids, &o, NULL, &e));
    ck_assert(r.nll == 0 && r.nll_error == 0 && r.kl == 0 && r.top1 == 1);
    MUST(ppl_run(&p, a.m, ids, sizeof ids / sizeof *ids, &o, NULL, &e));
    ck_assert(r.model.windows == 2);
    ck_assert_double_eq_tol(r.model.ppl, p.ppl, 1e-4 * p.ppl);
    ck_assert_double_eq_tol(r.model.nll_error, p.nll_error, 1e-4);
    close_side(&a);
    close_side(&b);
}
END_TEST

START_TEST(refusals)
{
    side a = open_side(1, 0), b = open_side(1, 60);
    compare_result r;
    err e;
    ppl_opts o = {.window = WINDOW};
    ck_assert_int_eq(compare_run(&r, a.m, b.m, ids, WINDOW, &o, NULL, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "vocabulary: expected 50 ids, found 60") != NULL, "%s", e.msg);
    ck_assert_int_eq(compare_run(&r, a.m, a.m, ids, WINDOW - 1, &o, NULL, &e), E_INPUT);
    o.window = WINDOW + 2;
    ck_assert_int_eq(compare_run(&r, a.m, a.m, ids, WINDOW + 5, &o, NULL, &e), E_LIMIT);
    close_side(&a);
    close_side(&b);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("compare");
    TCase *t = tcase_create("compare");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, against_plain);
    tcase_add_test(t, with_itself);
    tcase_add_test(t, refusals);
    suite_add_tcase(s, t);
    return suite_run(s);
}
