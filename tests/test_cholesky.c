/* Factors, inverses and solves of second moments. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/cholesky.h"
#include "support/suite.h"

#define MUST(call) ck_assert_msg((call) == OK, "%s", e.msg)

static double next_value(uint32_t *x)
{
    return ((*x = *x * 1664525u + 1013904223u) >> 8) / 16777216. - 0.5;
}

enum { SIDE = 600, SOLVED = 70 }; /* two blocks and a part of one; rows of an item and a part */

typedef struct {
    float *l, *inverse, *x;
} factored;

static factored factor_with(int threads, const float *a, const float *b)
{
    factored f = {malloc(SIDE * SIDE * 4), malloc(SIDE * SIDE * 4), malloc(SOLVED * SIDE * 4)};
    const dev_opts o = {.kind = DEV_CPU, .threads = threads};
    device *d;
    bool good;
    err e;
    MUST(dev_open(&d, &o, &e));
    memcpy(f.l, a, SIDE * SIDE * 4);
    memcpy(f.x, b, SOLVED * SIDE * 4);
    MUST(cholesky_factor(d, f.l, SIDE, &good, &e));
    ck_assert(good);
    MUST(cholesky_solve(d, f.l, SIDE, f.x, SOLVED, &e));
    memcpy(f.inverse, f.l, SIDE * SIDE * 4);
    MUST(cholesky_invert(d, f.inverse, SIDE, &good, &e));
    ck_assert(good);
    dev_close(&d);
    return f;
}

/* The largest entry of p q less the same entry of want (NULL: the identity); p [n,SIDE] lower where
 * it is square, q's columns are its rows where `turned`. */
static double furthest(const float *p, int64_t n, const float *q, bool turned, const float *want)
{
    double most = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < (n == SIDE ? i + 1 : SIDE); j++) {
            double sum = want ? -want[i * SIDE + j] : i == j ? -1 : 0;
            const int64_t from = n == SIDE && !turned ? j : 0,
                          end = n == SIDE ? (turned ? j : i) + 1 : SIDE;
            for (int64_t t = from; t < end; t++)
                sum += (double)p[i * SIDE + t] * q[turned ? j * SIDE + t : t * SIDE + j];
            most = fmax(most, fabs(sum));
        }
    return most;
}

START_TEST(factors_of_moments)
{
    float *g = malloc(SIDE * SIDE * 4), *a = malloc(SIDE * SIDE * 4),
          *b = malloc(SOLVED * SIDE * 4);
    uint32_t seed = 7;
    for (int64_t i = 0; i < SIDE * SIDE; i++) g[i] = (float)next_value(&seed);
    for (int64_t i = 0; i < SOLVED * SIDE; i++) b[i] = (float)next_value(&seed);
    for (int64_t i = 0; i < SIDE; i++)
        for (int64_t j = 0; j < SIDE; j++) {
            double sum = i == j ? 100 : 0;
            for (int64_t t = 0; t < SIDE; t++) sum += (double)g[i * SIDE + t] * g[j * SIDE + t];
            a[i * SIDE + j] = (float)sum;
        }
    const factored f = factor_with(1, a, b);
    ck_assert_double_lt(furthest(f.l, SIDE, f.l, true, a), 1e-3);
    ck_assert_double_lt(furthest(f.inverse, SIDE, f.l, false, NULL), 1e-4);
    ck_assert_double_lt(furthest(f.x, SOLVED, a, false, b), 1e-4);
    for (int threads = 2; threads < 4; threads++) {
        const factored same = factor_with(threads, a, b);
        ck_assert_mem_eq(same.l, f.l, SIDE * SIDE * 4);
        ck_assert_mem_eq(same.x, f.x, SOLVED * SIDE * 4);
        for (int64_t i = 0; i < SIDE; i++) /* what lies above is lost */
            ck_assert_mem_eq(same.inverse + i * SIDE, f.inverse + i * SIDE, (size_t)(i + 1) * 4);
        free(same.l);
        free(same.inverse);
        free(same.x);
    }
    for (int64_t i = 0; i < SIDE; i++) a[i * SIDE + i] -= 4000; /* not positive any more */
    device *d;
    err e;
    bool good;
    MUST(dev_open(&d, &(dev_opts){.kind = DEV_CPU, .threads = 1}, &e));
    MUST(cholesky_factor(d, a, SIDE, &good, &e));
    ck_assert(!good);
    dev_close(&d);
    free(f.l);
    free(f.inverse);
    free(f.x);
    free(g);
    free(a);
    free(b);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("cholesky");
    TCase *t = tcase_create("cholesky");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, factors_of_moments);
    suite_add_tcase(s, t);
    return suite_run(s);
}
