/* Sampling: each step alone against a plain calculation, distributions against counts, seeds. */
#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/sampler.h"
#include "support/suite.h"

#define VOCAB 8
static const float base_logits[VOCAB] = {1.0f, 3.0f, 2.0f, -1.0f, 0.5f, 3.0f, -4.0f, 2.5f};

static sampler *open_with(const sample_opts *o)
{
    err e;
    sampler *s;
    ck_assert_int_eq(sampler_open(&s, VOCAB, 64, &e), OK);
    ck_assert_int_eq(sampler_start(s, o, &e), OK);
    return s;
}

static sample_opts warm(double temperature)
{
    sample_opts o = sample_greedy();
    o.temperature = temperature;
    o.seed = 7;
    return o;
}

static int32_t next_of(sampler *s)
{
    float l[VOCAB];
    memcpy(l, base_logits, sizeof l);
    return sampler_next(s, l);
}

/* Draws often and compares frequencies with p: chi-square with at most 7 degrees of freedom stays
 * under 30 (probability of more: 1e-4; the seeds are fixed, so it either always passes or never).
 */
static void check_distribution(const sample_opts *o, const double *p)
{
    enum { DRAWS = 40000 };
    int32_t count[VOCAB] = {0};
    double chi = 0;
    sampler *s = open_with(o);
    for (int i = 0; i < DRAWS; i++) {
        const int32_t id = next_of(s);
        ck_assert(id >= 0 && id < VOCAB);
        count[id]++;
    }
    for (int i = 0; i < VOCAB; i++) {
        const double want = p[i] * DRAWS;
        if (p[i] == 0)
            ck_assert_msg(count[i] == 0, "id %d was drawn %d times", i, count[i]);
        else
            chi += (count[i] - want) * (count[i] - want) / want;
    }
    ck_assert_msg(chi < 30, "chi-square %g", chi);
    sampler_close(&s);
}

static void softmax(double *p, const float *l, double temperature, const bool *keep)
{
    double sum = 0;
    for (int i = 0; i < VOCAB; i++) {
        p[i] = keep[i] ? exp((double)l[i] / temperature) : 0;
        sum += p[i];
    }
    for (int i = 0; i < VOCAB; i++) p[i] /= sum;
}

static const bool keep_all[VOCAB] = {1, 1, 1, 1, 1, 1, 1, 1};

START_TEST(test_greedy)
{
    const sample_opts o = sample_greedy();
    sampler *s = open_with(&o);
    ck_assert_int_eq(next_of(s), 1); /* 1 and 5 tie: the lower */
    ck_assert_int_eq(next_of(s), 1);
    float nan_l[VOCAB], inf_l[VOCAB];
    for (int i = 0; i < VOCAB; i++) nan_l[i] = NAN, inf_l[i] = -INFINITY;
    ck_assert_int_eq(sampler_next(s, nan_l), -1);
    ck_assert_int_eq(sampler_next(s, inf_l), -1);
    nan_l[6] = -100;
    ck_assert_int_eq(sampler_next(s, nan_l), 6);
    inf_l[2] = INFINITY;
    ck_assert_int_eq(sampler_next(s, inf_l), 2);
    sampler_close(&s);
}
END_TEST

START_TEST(test_plain_distribution)
{
    double p[VOCAB];
    const double temperatures[] = {1.0, 0.5, 2.5};
    for (int i = 0; i < 3; i++) {
        const sample_opts o = warm(temperatures[i]);
        softmax(p, base_logits, o.temperature, keep_all);
        check_distribution(&o, p);
    }
}
END_TEST

START_TEST(test_tiny_temperature)
{
    const sample_opts o = warm(1e-30);
    sampler *s = open_with(&o);
    int32_t count[VOCAB] = {0};
    for (int i = 0; i < 1000; i++) count[next_of(s)]++;
    ck_assert_int_eq(count[1] + count[5], 1000); /* only the tied best are left */
    ck_assert_int_gt(count[1], 400);
    ck_assert_int_gt(count[5], 400);
    sampler_close(&s);
}
END_TEST

START_TEST(test_top_k)
{
    double p[VOCAB];
    const bool keep3[VOCAB] = {[1] = 1, [5] = 1, [7] = 1};
    sample_opts o = warm(1);
    o.top_k = 3;
    softmax(p, base_logits, 1, keep3);
    check_distribution(&o, p);
    o.top_k = 1;
    const double one[VOCAB] = {[1] = 1};
    check_distribution(&o, one);
    o.top_k = 100; /* more than there are: off */
    softmax(p, base_logits, 1, keep_all);
    check_distribution(&o, p);
}
END_TEST

START_TEST(test_top_p)
{
    /* exp: 2.718 20.09 7.389 .3679 1.649 20.09 .0183 12.18, sum 64.5. Heads: .3114 .6229 .8117
     * .9263 ... */
    double p[VOCAB];
    sample_opts o = warm(1);
    const bool two[VOCAB] = {[1] = 1, [5] = 1}, three[VOCAB] = {[1] = 1, [5] = 1, [7] = 1};
    o.top_p = 0.62;
    softmax(p, base_logits, 1, two);
    check_distribution(&o, p);
    o.top_p = 0.63; /* the one that crosses belongs to it */
    softmax(p, base_logits, 1, three);
    check_distribution(&o, p);
    o.top_p = 1e-6;
    const double one[VOCAB] = {[1] = 1};
    check_distribution(&o, one);
}
END_TEST

START_TEST(test_top_k_then_top_p)
{
    /* Among the best three (20.09 20.09 12.18) the first two hold .767: top-p counts after top-k.
     */
    double p[VOCAB];
    sample_opts o = warm(1);
    const bool two[VOCAB] = {[1] = 1, [5] = 1};
    o.top_k = 3;
    o.top_p = 0.75;
    softmax(p, base_logits, 1, two);
    check_distribution(&o, p);
}
END_TEST

START_TEST(test_min_p)
{
    /* Shares of the largest: 7 .6065, 2 .3679, 0 .1353. */
    double p[VOCAB];
    sample_opts o = warm(1);
    const bool four[VOCAB] = {[1] = 1, [5] = 1, [7] = 1, [2] = 1};
    o.min_p = 0.2;
    softmax(p, base_logits, 1, four);
    check_distribution(&o, p);
    o.top_k = 5;
    check_distribution(&o, p); /* the same with a list cut before */
    o.min_p = 1;
    const bool two[VOCAB] = {[1] = 1, [5] = 1};
    softmax(p, base_logits, 1, two);
    check_distribution(&o, p);
}
END_TEST

START_TEST(test_bias)
{
    const logit_bias bias[] = {{4, 10.0f}, {1, -3.0f}};
    sample_opts o = sample_greedy();
    o.bias = bias;
    o.n_bias = 2;
    sampler *s = open_with(&o);
    ck_assert_int_eq(next_of(s), 4);
    sampler_close(&s);
    o = warm(1);
    const logit_bias ban[] = {{1, -1e4f}, {5, -1e4f}};
    o.bias = ban;
    o.n_bias = 2;
    bool keep[VOCAB];
    double p[VOCAB];
    memcpy(keep, keep_all, sizeof keep);
    keep[1] = keep[5] = false;
    softmax(p, base_logits, 1, keep);
    check_distribution(&o, p);
}
END_TEST

/* What penalties make of the logits, seen through a greedy pick's side effect on its argument. */
static void penalized(sampler *s, float *l)
{
    memcpy(l, base_logits, VOCAB * sizeof *l);
    (void)sampler_next(s, l);
}

START_TEST(test_repetition)
{
    float l[VOCAB];
    sample_opts o = sample_greedy();
    o.repetition_penalty = 2;
    sampler *s = open_with(&o);
    sampler_prompt(s, (const int32_t[]){1, 1, 3}, 3);
    sampler_accept(s, 7);
    penalized(s, l);
    ck_assert_float_eq(l[1], 1.5f);  /* positive: divided, once */
    ck_assert_float_eq(l[3], -2.0f); /* negative: multiplied */
    ck_assert_float_eq(l[7], 1.25f);
    ck_assert_float_eq(l[5], 3.0f);
    sampler_close(&s);
}
END_TEST

START_TEST(test_repetition_window)
{
    float l[VOCAB];
    sample_opts o = sample_greedy();
    o.repetition_penalty = 2;
    o.penalty_window = 2;
    sampler *s = open_with(&o);
    sampler_prompt(s, (const int32_t[]){1, 5}, 2);
    sampler_accept(s, 5);
    penalized(s, l);
    ck_assert_float_eq(l[1], 3.0f); /* three back: forgotten */
    ck_assert_float_eq(l[5], 1.5f);
    sampler_accept(s, 2);
    sampler_accept(s, 2);
    penalized(s, l);
    ck_assert_float_eq(l[5], 3.0f);
    ck_assert_float_eq(l[2], 1.0f);
    sampler_close(&s);
}
END_TEST

START_TEST(test_history_ring)
{
    /* Longer than max_tokens (64): the oldest go, counts stay right. */
    float l[VOCAB];
    sample_opts o = sample_greedy();
    o.repetition_penalty = 2;
    sampler *s = open_with(&o);
    sampler_accept(s, 1);
    for (int i = 0; i < 63; i++) sampler_accept(s, 2);
    penalized(s, l);
    ck_assert_float_eq(l[1], 1.5f);
    sampler_accept(s, 2);
    penalized(s, l);
    ck_assert_float_eq(l[1], 3.0f);
    ck_assert_float_eq(l[2], 1.0f);
    sampler_close(&s);
}
END_TEST

START_TEST(test_presence_and_frequency)
{
    float l[VOCAB];
    sample_opts o = sample_greedy();
    o.presence_penalty = 0.5;
    o.frequency_penalty = 0.25;
    sampler *s = open_with(&o);
    sampler_prompt(s, (const int32_t[]){5, 5}, 2); /* a prompt does not count */
    sampler_accept(s, 1);
    sampler_accept(s, 1);
    sampler_accept(s, 7);
    penalized(s, l);
    ck_assert_float_eq(l[1], 2.0f);
    ck_assert_float_eq(l[7], 1.75f);
    ck_assert_float_eq(l[5], 3.0f);
    sampler_close(&s);
}
END_TEST

START_TEST(test_order_of_steps)
{
    /* Bias before the repetition penalty: (-1 + 3) / 2, not -1 * 2 + 3. */
    float l[VOCAB];
    const logit_bias bias[] = {{3, 3.0f}};
    sample_opts o = sample_greedy();
    o.bias = bias;
    o.n_bias = 1;
    o.repetition_penalty = 2;
    o.presence_penalty = 1;
    sampler *s = open_with(&o);
    sampler_accept(s, 3);
    penalized(s, l);
    ck_assert_float_eq(l[3], 0.0f); /* (2 / 2) - 1 */
    sampler_close(&s);
}
END_TEST

START_TEST(test_seeds)
{
    enum { N = 200 };
    int32_t a[N], b[N], c[N];
    err e;
    sample_opts o = warm(1);
    sampler *s = open_with(&o);
    for (int i = 0; i < N; i++) a[i] = next_of(s);
    ck_assert_int_eq(sampler_start(s, &o, &e), OK);
    for (int i = 0; i < N; i++) b[i] = next_of(s);
    o.seed = 8;
    ck_assert_int_eq(sampler_start(s, &o, &e), OK);
    for (int i = 0; i < N; i++) c[i] = next_of(s);
    ck_assert_mem_eq(a, b, sizeof a);
    ck_assert_mem_ne(a, c, sizeof a);
    sampler_close(&s);
}
END_TEST

/* The draws of seed 7, worked out apart from this code with a generator that passes its authors'
 * vector (11520, 0, 1509978240 from state 1, 2, 3, 4): a recorded seed keeps its meaning. */
START_TEST(test_seed_is_pinned)
{
    const sample_opts o = warm(1);
    sampler *s = open_with(&o);
    int32_t got[12];
    for (int i = 0; i < 12; i++) got[i] = next_of(s);
    const int32_t want[12] = {7, 1, 2, 4, 4, 2, 1, 1, 5, 1, 5, 7};
    ck_assert_mem_eq(got, want, sizeof want);
    sampler_close(&s);
}
END_TEST

START_TEST(test_large_vocabulary)
{
    /* The heap against a plain sort: top-k 50 of 5000 random logits keeps exactly the 50 largest.
     */
    enum { N = 5000 };
    err e;
    sampler *s;
    static float l[N], copy[N];
    uint32_t x = 1;
    for (int i = 0; i < N; i++) {
        x = x * 1664525u + 1013904223u;
        l[i] = (float)(x >> 8) * 0x1p-24f; /* nearly flat */
    }
    sample_opts o = warm(1);
    o.top_k = 50;
    ck_assert_int_eq(sampler_open(&s, N, 8, &e), OK);
    ck_assert_int_eq(sampler_start(s, &o, &e), OK);
    static bool drawn[N];
    for (int i = 0; i < 4000; i++) {
        memcpy(copy, l, sizeof l);
        drawn[sampler_next(s, copy)] = true;
    }
    int n = 0;
    for (int i = 0; i < N; i++) {
        int larger = 0;
        if (!drawn[i]) continue;
        for (int k = 0; k < N; k++) larger += l[k] > l[i];
        ck_assert_int_lt(larger, 50);
        n++;
    }
    ck_assert_int_eq(n, 50);
    sampler_close(&s);
}
END_TEST

START_TEST(test_bad_options)
{
    err e;
    sampler *s;
    ck_assert_int_eq(sampler_open(&s, VOCAB, 8, &e), OK);
    sample_opts o = sample_greedy();
    o.temperature = -0.1;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "temperature: expected 0 to 100, got -0.1"), "%s", e.msg);
    o.temperature = NAN;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    o = sample_greedy();
    o.top_p = 0;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    o = sample_greedy();
    o.min_p = 1.5;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    o = sample_greedy();
    o.repetition_penalty = 0;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    const logit_bias bias[] = {{VOCAB, 1}};
    o = sample_greedy();
    o.bias = bias;
    o.n_bias = 1;
    ck_assert_int_eq(sampler_start(s, &o, &e), E_USAGE);
    sampler_close(&s);
    sampler_close(&s);
}
END_TEST

/* A sequence goes on in another sampler, with scratch that is a third one's. */
START_TEST(test_goes_on_elsewhere)
{
    err e;
    sampler *first, *second, *straight;
    sample_opts o = warm(1.5);
    o.frequency_penalty = 0.7;
    o.repetition_penalty = 1.3;
    int32_t ids[40];
    ck_assert_int_eq(sampler_open(&straight, VOCAB, 64, &e), OK);
    ck_assert_int_eq(sampler_open_beside(&first, straight, VOCAB, 64, &e), OK);
    ck_assert_int_eq(sampler_open_beside(&second, straight, VOCAB, 64, &e), OK);
    ck_assert_int_eq(sampler_start(straight, &o, &e), OK);
    ck_assert_int_eq(sampler_start(first, &o, &e), OK);
    for (int i = 0; i < 40; i++) {
        ids[i] = next_of(straight);
        sampler_accept(straight, ids[i]);
    }
    for (int i = 0; i < 40; i++) {
        sampler *s = i < 17 ? first : second;
        if (i == 17) {
            const sampler_rng r = sampler_rng_get(first);
            ck_assert_int_eq(sampler_start(second, &o, &e), OK);
            for (int k = 0; k < i; k++) sampler_accept(second, ids[k]);
            sampler_rng_set(second, &r);
        }
        ck_assert_int_eq(next_of(s), ids[i]);
        sampler_accept(s, ids[i]);
    }
    sampler_close(&second);
    sampler_close(&first);
    sampler_close(&straight);
}
END_TEST

/* What a device would hold, told of changes alone, is what the sampler counts; its draws are those
 * of the host's generator. */
START_TEST(test_rows)
{
    int32_t there[2 * VOCAB];
    sample_bias bias[SAMPLE_MAX_BIAS];
    sample_row r;
    sample_opts o = warm(1);
    o.repetition_penalty = 1.5;
    o.frequency_penalty = 0.25;
    o.penalty_window = 3;
    sampler *s = open_with(&o), *twin = open_with(&o);
    const int32_t prompt[] = {1, 1, 5};
    sampler_prompt(s, prompt, 3);
    for (int i = 0; i < 40; i++) {
        bool send;
        if (i == 20) { /* a step without the device: two ids at once are not told as changes */
            (void)next_of(s);
            (void)next_of(twin);
            sampler_accept(s, 2);
        }
        sampler_row(s, &r, bias, &send);
        ck_assert_int_eq(send, i == 0 || i == 20);
        ck_assert_int_eq(r.state, 0);
        if (send) memcpy(there, sampler_counts(s), sizeof there);
        if (r.last >= 0) there[r.last]++, there[VOCAB + r.last]++;
        if (r.gone >= 0) there[r.gone]--;
        ck_assert_int_eq(memcmp(there, sampler_counts(s), sizeof there), 0);
        (void)next_of(twin);
        ck_assert(r.u >= 0 && r.u < 1);
        const sampler_rng a = sampler_rng_get(s), b = sampler_rng_get(twin);
        ck_assert_int_eq(memcmp(&a, &b, sizeof a), 0);
        sampler_accept(s, (i * 5 + i / 3) % VOCAB);
    }
    o = warm(0); /* greedy, no penalties: no draw, nothing to send */
    err e;
    ck_assert_int_eq(sampler_start(s, &o, &e), OK);
    const sampler_rng before = sampler_rng_get(s);
    bool send;
    sampler_row(s, &r, bias, &send);
    const sampler_rng after = sampler_rng_get(s);
    ck_assert(!send && r.state == -1 && r.last == -1 && r.wanted);
    ck_assert_int_eq(memcmp(&before, &after, sizeof before), 0);
    sampler_close(&twin);
    sampler_close(&s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sampler");
    TCase *t = tcase_create("sampler");
    tcase_add_test(t, test_greedy);
    tcase_add_test(t, test_plain_distribution);
    tcase_add_test(t, test_tiny_temperature);
    tcase_add_test(t, test_top_k);
    tcase_add_test(t, test_top_p);
    tcase_add_test(t, test_top_k_then_top_p);
    tcase_add_test(t, test_min_p);
    tcase_add_test(t, test_bias);
    tcase_add_test(t, test_repetition);
    tcase_add_test(t, test_repetition_window);
    tcase_add_test(t, test_history_ring);
    tcase_add_test(t, test_presence_and_frequency);
    tcase_add_test(t, test_order_of_steps);
    tcase_add_test(t, test_seeds);
    tcase_add_test(t, test_seed_is_pinned);
    tcase_add_test(t, test_large_vocabulary);
    tcase_add_test(t, test_bad_options);
    tcase_add_test(t, test_goes_on_elsewhere);
    tcase_add_test(t, test_rows);
    suite_add_tcase(s, t);
    return suite_run(s);
}
