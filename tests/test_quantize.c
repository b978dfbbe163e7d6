/* kernels/quant_group: the rounding rule against numbers made by NumPy, its edges, threads and
 * refusals. */
#include "kernels/quant_group.h"

#include <math.h>

#include "base/half.h"
#include "tests/support/golden_lines.h"
#include "tests/support/suite.h"

static device *open_device(int threads)
{
    device *d;
    err e;
    ck_assert_msg(dev_open(&d, &(dev_opts){.kind = DEV_CPU, .threads = threads}, &e) == OK, "%s",
                  e.msg);
    return d;
}

typedef struct {
    float *w, *y;
    f16 *scale;
    uint8_t *zero, *codes;
    tensor tw, ty, ts, tz, tc;
} buffers;

static buffers make(int64_t n, int64_t k, int64_t group)
{
    buffers b = {.w = calloc((size_t)(n * k), 4),
                 .y = calloc((size_t)(n * k), 4),
                 .scale = calloc((size_t)(n * k / group), 2),
                 .zero = calloc((size_t)(n * k / group), 1),
                 .codes = calloc((size_t)(n * k), 1)};
    b.tw = tensor_2d(b.w, DT_F32, n, k);
    b.ty = tensor_2d(b.y, DT_F32, n, k);
    b.ts = tensor_2d(b.scale, DT_F16, n, k / group);
    b.tz = tensor_2d(b.zero, DT_U8, n, k / group);
    b.tc = tensor_2d(b.codes, DT_U8, n, k);
    return b;
}

static void drop(buffers *b)
{
    free(b->w);
    free(b->y);
    free(b->scale);
    free(b->zero);
    free(b->codes);
}

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)

static void run_rule(device *d, buffers *b, int32_t group)
{
    err e;
    MUST(op_quant_range(d, &b->ts, &b->tz, &b->tw, NULL, group, &e));
    MUST(op_quant_codes(d, &b->tc, &b->tw, &b->ts, &b->tz, group, &e));
    MUST(op_quant_error(d, &b->ty, &b->tw, &b->ts, &b->tz, NULL, group, &e));
}

static void check_case(device *d, const char *name, const char *at, int32_t group, int64_t n,
                       int64_t k)
{
    const int64_t groups = n * k / group;
    buffers b = make(n, k, group);
    f16 *scale = calloc((size_t)groups, 2);
    uint8_t *zero = calloc((size_t)groups, 1), *codes = calloc((size_t)(n * k), 1);
    golden_hex(at, "w", b.w, 4, n * k);
    golden_hex(at, "scale", scale, 2, groups);
    golden_hex(at, "zero", zero, 1, groups);
    golden_hex(at, "codes", codes, 1, n * k);
    run_rule(d, &b, group);
    for (int64_t i = 0; i < groups; i++) {
        ck_assert_msg(b.scale[i] == scale[i], "%s: scale %d: %x, expected %x", name, (int)i,
                      b.scale[i], scale[i]);
        ck_assert_msg(b.zero[i] == zero[i], "%s: zero %d: %d, expected %d", name, (int)i, b.zero[i],
                      zero[i]);
    }
    for (int64_t i = 0; i < n * k; i++) {
        const float s = f16_to_f32(scale[i / group]),
                    w = ((float)codes[i] - (float)zero[i / group]) * s - b.w[i];
        ck_assert_msg(b.codes[i] == codes[i], "%s: code %d: %d, expected %d", name, (int)i,
                      b.codes[i], codes[i]);
        ck_assert_msg(b.y[i] == w, "%s: error %d: %g, expected %g", name, (int)i, (double)b.y[i],
                      (double)w);
    }
    drop(&b);
    free(scale);
    free(zero);
    free(codes);
}

START_TEST(golden_cases)
{
    device *d = open_device(2);
    golden g = golden_open("quantize.txt");
    int cases = 0;
    for (const char *p = golden_find(g.text, "case"); p; p = golden_find(p, "case"), cases++) {
        char name[32];
        int group;
        long n, k;
        ck_assert_int_eq(sscanf(p, "%31s %d %ld %ld", name, &group, &n, &k), 4);
        check_case(d, name, p, group, n, k);
    }
    ck_assert_int_ge(cases, 16);
    mem_free(g.text);
    dev_close(&d);
}
END_TEST

/* Bytes do not depend on threads, and rows may be strided. */
START_TEST(threads_and_strides)
{
    enum { N = 67, K = 256, G = 32 };
    device *one = open_device(1), *three = open_device(3);
    buffers a = make(N, K, G), b = make(N, 2 * K, G);
    for (int i = 0; i < N * K; i++)
        a.w[i] = b.w[i / K * 2 * K + i % K] = sinf((float)i * 0.37f) * (1.f + (float)(i % 7));
    run_rule(one, &a, G);
    err e;
    tensor w = tensor_cols(&b.tw, 0, K), s = tensor_cols(&b.ts, 0, K / G),
           z = tensor_cols(&b.tz, 0, K / G), c = tensor_cols(&b.tc, 0, K);
    MUST(op_quant_range(three, &s, &z, &w, NULL, G, &e));
    MUST(op_quant_codes(three, &c, &w, &s, &z, G, &e));
    MUST(op_quant_error(three, &w, &w, &s, &z, NULL, G, &e)); /* in place */
    for (int i = 0; i < N * K; i++) {
        const int at = i / K * 2 * K + i % K, group = i / K * (K / G) + i % K / G;
        ck_assert_uint_eq(b.codes[at], a.codes[i]);
        ck_assert(b.w[at] == a.y[i]);
        ck_assert_uint_eq(b.scale[i / K * 2 * (K / G) + i % K / G], a.scale[group]);
    }
    drop(&a);
    drop(&b);
    dev_close(&one);
    dev_close(&three);
}
END_TEST

/* Without saturation an error is at most half a step; with a limit the range shrinks and far
 * weights saturate. */
START_TEST(half_a_step_and_limits)
{
    enum { K = 64 };
    device *d = open_device(1);
    buffers b = make(1, K, K);
    float limit = 1.f;
    err e;
    for (int i = 0; i < K; i++) b.w[i] = (float)(i - 20) * 0.1f; /* -2 .. 4.3 */
    run_rule(d, &b, K);
    const float step = f16_to_f32(b.scale[0]);
    for (int i = 0; i < K; i++)
        ck_assert(fabsf(b.y[i]) <= step * 0.51f + step * 0.5f * (float)(i == 0 || i == K - 1));
    const tensor lim = tensor_2d(&limit, DT_F32, 1, 1);
    MUST(op_quant_range(d, &b.ts, &b.tz, &b.tw, &lim, K, &e));
    ck_assert(f16_to_f32(b.scale[0]) < step);
    ck_assert(fabsf(f16_to_f32(b.scale[0]) * 15.f - 2.f) < 1e-2f); /* -1 .. 1 */
    MUST(op_quant_codes(d, &b.tc, &b.tw, &b.ts, &b.tz, K, &e));
    ck_assert_uint_eq(b.codes[0], 0);
    ck_assert_uint_eq(b.codes[K - 1], 15);
    drop(&b);
    dev_close(&d);
}
END_TEST

/* Errors are divided by the columns' factors. */
START_TEST(error_over_factors)
{
    enum { K = 32 };
    device *d = open_device(1);
    buffers b = make(2, K, K);
    float col[K], plain[2 * K];
    err e;
    for (int i = 0; i < 2 * K; i++) b.w[i] = cosf((float)i);
    for (int i = 0; i < K; i++) col[i] = 0.5f + (float)i;
    run_rule(d, &b, K);
    memcpy(plain, b.y, sizeof plain);
    const tensor factors = tensor_1d(col, DT_F32, K);
    MUST(op_quant_error(d, &b.ty, &b.tw, &b.ts, &b.tz, &factors, K, &e));
    for (int i = 0; i < 2 * K; i++) ck_assert(b.y[i] == plain[i] / col[i % K]);
    drop(&b);
    dev_close(&d);
}
END_TEST

START_TEST(refusals)
{
    device *d = open_device(1);
    buffers b = make(2, 96, 32);
    err e;
    ck_assert_int_eq(op_quant_range(d, &b.ts, &b.tz, &b.tw, NULL, 64, &e), E_SHAPE);
    ck_assert(strstr(e.msg, "divisor of 96") != NULL);
    ck_assert_int_eq(op_quant_range(d, &b.ts, &b.tz, &b.tw, NULL, 0, &e), E_SHAPE);
    tensor bad = b.tw;
    bad.dt = DT_F16;
    ck_assert_int_eq(op_quant_codes(d, &b.tc, &bad, &b.ts, &b.tz, 32, &e), E_SHAPE);
    const tensor few = tensor_rows(&b.tz, 0, 1);
    ck_assert_int_eq(op_quant_codes(d, &b.tc, &b.tw, &b.ts, &few, 32, &e), E_SHAPE);
    drop(&b);
    dev_close(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("quantize");
    TCase *t = tcase_create("rule");
    tcase_add_test(t, golden_cases);
    tcase_add_test(t, threads_and_strides);
    tcase_add_test(t, half_a_step_and_limits);
    tcase_add_test(t, error_over_factors);
    tcase_add_test(t, refusals);
    suite_add_tcase(s, t);
    return suite_run(s);
}
