/* op_gemm_w4 and w4_upload: every instruction set against sums over the source's own weights, bits
 * equal between instruction sets, batch sizes and thread counts, every layout to the same tiles.
 *
 * Tolerance. A variant rounds each activation to an integer of step s = max|x| of its group / 2039,
 * an error of at most s/2 (1 + 2^-20: the inverse is rounded too), so its part of the sum is at
 * most s/2 * sum|w| over the group. Each group then passes four float operations, and the sum of
 * groups one addition each: (groups + 4) * 2^-24 of sum|x||w|, doubled for the partial sums of (q -
 * z). The reference sums in double: one rounding of w, one of the result. */
#include "kernels/ops.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"
#include "kernels/device_internal.h"
#include "support/suite.h"

/* avxvnni has no name of its own: avx512 without its dot product. */
static const char *const isas[] = {"ref", "avx2", "avxvnni", "avx512", "amx"};
enum { ISAS = 5, GUARD = 16 };
#define GUARD_VALUE 12345.0f

static uint32_t state;
static uint32_t next(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}
static float uniform(void) /* -1..1 */ { return (float)(int)(next() % 20001) * 1e-4f - 1.0f; }

static void *take(size_t bytes)
{
    void *p;
    err e;
    ck_assert_msg(mem_alloc(&p, bytes, 1, "test", &e) == OK, "%s", e.msg);
    return p;
}

static w4_weight make(int64_t k, int64_t n, int32_t group, w4_layout l)
{
    w4_weight w = {.k = k};
    size_t q, s, z;
    err e;
    ck_assert_msg(w4_sizes(&q, &s, &z, k, n, group, l, &e) == OK, "%s", e.msg);
    w.q.data = take(q);
    w.scales.data = take(s);
    w.zeros.data = take(z);
    w4_shape(&w, k, n, group, l);
    return w;
}

static void drop(w4_weight *w)
{
    mem_free(w->q.data);
    mem_free(w->scales.data);
    mem_free(w->zeros.data);
    mem_free(w->bias.data);
}

typedef enum { ANY, LOW, HIGH, NO_SCALE, BIG_SCALE } kind;

static w4_weight random_codes(int64_t k, int64_t n, int32_t group, kind t)
{
    w4_weight w = make(k, n, group, W4_CODES);
    uint8_t *q = w.q.data, *z = w.zeros.data;
    f16 *s = w.scales.data;
    for (int64_t i = 0; i < n * k; i++)
        q[i] = t == LOW ? 0 : t == HIGH ? 15 : (uint8_t)(next() % 16);
    for (int64_t i = 0; i < n * (k / group); i++) {
        z[i] = t == LOW ? 15 : t == HIGH ? 0 : (uint8_t)(next() % 16);
        s[i] = f32_to_f16(t == NO_SCALE    ? 0.0f
                          : t == BIG_SCALE ? 65504.0f
                                           : 0.05f * fabsf(uniform()));
    }
    return w;
}

/* Fractional and negative zeros, as TurboMind's files may hold. */
static w4_weight random_tm(int64_t k, int64_t n, int32_t group)
{
    w4_weight w = make(k, n, group, W4_TM);
    for (int64_t i = 0; i < k * n / 8; i++) ((uint32_t *)w.q.data)[i] = next() << 16 ^ next();
    for (int64_t i = 0; i < k / group * n; i++) {
        ((f16 *)w.scales.data)[i] = f32_to_f16(0.05f * uniform());
        ((f16 *)w.zeros.data)[i] = f32_to_f16(20.0f * uniform());
    }
    return w;
}

static void add_bias(w4_weight *w, dtype dt)
{
    const size_t bytes = (size_t)w->n * dtype_bytes(dt);
    w->bias = tensor_1d(take(bytes), dt, w->n);
    for (int64_t i = 0; i < w->n; i++) {
        if (dt == DT_F32)
            ((float *)w->bias.data)[i] = uniform();
        else
            ((f16 *)w->bias.data)[i] = f32_to_f16(uniform());
    }
}

/* x [m,k] and y [m,n] with strided rows and guards around; values by `peak`. */
typedef struct {
    int64_t m, k, n, ldx, ldy;
    float *x, *y0, *y; /* y0: what y holds before */
    double *want, *bound;
} problem;

static problem make_problem(int64_t m, int64_t k, int64_t n, float peak)
{
    problem p = {.m = m, .k = k, .n = n, .ldx = k + 8, .ldy = n + GUARD};
    const size_t ny = (size_t)(m * p.ldy + GUARD);
    p.x = take((size_t)((m - 1) * p.ldx + k) * sizeof(float)); /* nothing behind the last row */
    p.y0 = take(ny * sizeof(float));
    p.y = take(ny * sizeof(float));
    p.want = take((size_t)(m * n) * sizeof(double));
    p.bound = take((size_t)(m * n) * sizeof(double));
    for (int64_t i = 0; i < m; i++)
        for (int64_t c = 0; c < k; c++) {
            /* An outlier now and then: the step of its group grows with it. */
            const float v = uniform() * peak;
            p.x[i * p.ldx + c] = next() % 97 == 0 ? v * 50.0f : v;
        }
    for (size_t i = 0; i < ny; i++) p.y0[i] = GUARD_VALUE;
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < n; j++) p.y0[i * p.ldy + GUARD + j] = uniform();
    return p;
}

static void drop_problem(problem *p)
{
    mem_free(p->x);
    mem_free(p->y0);
    mem_free(p->y);
    mem_free(p->want);
    mem_free(p->bound);
}

/* Columns [n0, n0+w->n) of want and bound, from the source. */
static void expect_part(problem *p, const w4_weight *w, int64_t n0, bool add)
{
    float *row = take((size_t)p->k * sizeof *row);
    for (int64_t j = 0; j < w->n; j++) {
        float bias = 0.0f;
        if (w->bias.data)
            bias = w->bias.dt == DT_F32 ? ((float *)w->bias.data)[j]
                                        : f16_to_f32(((f16 *)w->bias.data)[j]);
        w4_dequant_row(row, w, j);
        for (int64_t i = 0; i < p->m; i++) {
            double sum = 0.0, slack = 0.0, size = 0.0;
            for (int64_t g = 0; g < p->k; g += w->group) {
                double top = 0.0, weights = 0.0;
                const float zero = w4_zero(w, j, g / w->group);
                const double scale = fabs((double)f16_to_f32(w4_scale(w, j, g / w->group)));
                for (int64_t c = g; c < g + w->group; c++) {
                    const double x = p->x[i * p->ldx + c];
                    sum += x * row[c];
                    weights += fabs((double)row[c]);
                    size += fabs(x) * scale * (15.0 + fabs((double)zero));
                    top = fmax(top, fabs(x));
                }
                slack += top / 2039.0 * 0.5 * weights;
            }
            const double y0 = add ? (double)p->y0[i * p->ldy + GUARD + n0 + j] : 0.0;
            const double groups = (double)(p->k / w->group);
            p->want[i * p->n + n0 + j] = sum + (double)bias + y0;
            p->bound[i * p->n + n0 + j] = slack * 1.00001 + ((groups + 4.0) * size + fabs(sum) +
                                                             fabs((double)bias) + fabs(y0)) *
                                                                0x1p-23;
        }
    }
    mem_free(row);
}

static device *open_device(const char *isa, int threads, int64_t m, int64_t k, int64_t n)
{
    const bool narrow = strcmp(isa, "avxvnni") == 0;
    const dev_opts o = {.isa = narrow ? "avx512" : isa, .threads = threads};
    const op_limits lim = {.rows = (int32_t)m, .k = k, .n = n};
    device *d;
    err e;
    ck_assert_msg(dev_open(&d, &o, &e) == OK, "%s", e.msg);
    if (narrow) d->cpu_flags &= ~(uint32_t)CPU_AVX512VNNI;
    ck_assert_msg(ops_reserve(d, &lim, &e) == OK, "%s", e.msg);
    return d;
}

static void run_rows(problem *p, device *d, const w4_weight *w, bool add, int64_t from,
                     int64_t rows)
{
    tensor x = tensor_2d(p->x + from * p->ldx, DT_F32, rows, p->k);
    tensor y = tensor_2d(p->y + from * p->ldy + GUARD, DT_F32, rows, p->n);
    err e;
    x.stride[0] = p->ldx;
    y.stride[0] = p->ldy;
    ck_assert_msg(op_gemm_w4(d, &y, &x, w, add, &e) == OK, "%s", e.msg);
}

static void reset(problem *p)
{
    memcpy(p->y, p->y0, (size_t)(p->m * p->ldy + GUARD) * sizeof(float));
}

static void check_guards(const problem *p, const char *isa)
{
    for (int64_t i = 0; i <= p->m; i++)
        for (int64_t j = 0; j < GUARD; j++)
            ck_assert_msg(p->y[i * p->ldy + j] == GUARD_VALUE, "%s: guard before row %d changed",
                          isa, (int)i);
}

static void check_values(const problem *p, const char *isa)
{
    for (int64_t i = 0; i < p->m; i++)
        for (int64_t j = 0; j < p->n; j++) {
            const double got = p->y[i * p->ldy + GUARD + j], want = p->want[i * p->n + j];
            const double bound = p->bound[i * p->n + j];
            ck_assert_msg(fabs(got - want) <= bound,
                          "%s: m %d k %d n %d: y[%d,%d] = %.9g, expected %.9g +- %.3g", isa,
                          (int)p->m, (int)p->k, (int)p->n, (int)i, (int)j, got, want, bound);
        }
}

/* All instruction sets, 1 and 2 threads, the whole batch and row by row; the quantizing variants
 * have one result. */
static void check_all(problem *p, const w4_weight *const *parts, int n_parts, bool add)
{
    const size_t bytes = (size_t)(p->m * p->ldy + GUARD) * sizeof(float);
    float *first = NULL;
    int64_t n0 = 0;
    for (int i = 0; i < n_parts; i++) {
        expect_part(p, parts[i], n0, add);
        n0 += parts[i]->n;
    }
    ck_assert_int_eq(n0, p->n);
    for (int i = 0; i < ISAS; i++)
        for (int threads = 1; threads <= 2; threads++) {
            device *d = open_device(isas[i], threads, p->m, p->k, p->n);
            dev_buf buf = {0};
            w4_weight w;
            err e;
            ck_assert_msg(w4_upload(d, &buf, &w, parts, n_parts, &e) == OK, "%s", e.msg);
            ck_assert_uint_le(buf.bytes, w4_upload_bytes(d, p->k, p->n, parts[0]->group));
            reset(p);
            run_rows(p, d, &w, add, 0, p->m);
            check_guards(p, isas[i]);
            check_values(p, isas[i]);
            if (i > 0 && !first) {
                first = take(bytes);
                memcpy(first, p->y, bytes);
            }
            if (i > 0)
                ck_assert_msg(!memcmp(first, p->y, bytes), "%s, %d threads: bits", isas[i],
                              threads);
            if (i > 0 && threads == 1 && p->m <= 64) {
                reset(p);
                for (int64_t r = 0; r < p->m; r++) run_rows(p, d, &w, add, r, 1);
                ck_assert_msg(!memcmp(first, p->y, bytes), "%s: rows alone differ", isas[i]);
            }
            dev_free(&buf);
            dev_close(&d);
        }
    mem_free(first);
}

static void check_case(int64_t m, int64_t k, int64_t n, int32_t group, kind t, float peak, bool add)
{
    state = (uint32_t)(m * 1000003 + k * 1009 + n * 31 + group) + t;
    w4_weight w = random_codes(k, n, group, t);
    const w4_weight *part = &w;
    problem p = make_problem(m, k, n, peak);
    check_all(&p, &part, 1, add);
    drop_problem(&p);
    drop(&w);
}

START_TEST(rows_and_columns)
{
    static const int64_t rows[] = {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 48, 64, 65};
    static const int64_t cols[] = {8, 16, 24, 32, 40, 128, 136, 256, 264};
    const int n = (int)(sizeof cols / sizeof *cols);
    for (int i = 0; i < (int)(sizeof rows / sizeof *rows); i++)
        check_case(rows[i], 256, cols[(i * 5 + _i) % n], 128, ANY, 1.0f, i % 2);
}
END_TEST

START_TEST(groups_and_depths)
{
    static const int32_t group[] = {32, 64, 128};
    for (int g = 0; g < 3; g++)
        for (int64_t m = 1; m <= 35; m += 17)
            for (int64_t times = 1; times <= 5; times += 2)
                check_case(m, group[g] * times, 72, group[g], ANY, 1.0f, false);
}
END_TEST

START_TEST(large)
{
    check_case(300, 2048, 96, 128, ANY, 1.0f, true); /* several passes of AMX rows */
    check_case(70, 8192, 40, 64, ANY, 1.0f, false);
    check_case(1, 5632, 2048, 128, ANY, 1.0f, false);
}
END_TEST

START_TEST(extremes)
{
    static const kind t[] = {LOW, HIGH, NO_SCALE, BIG_SCALE};
    static const float peak[] = {0.0f, 1e-38f, 1e-30f, 1e30f};
    for (int i = 0; i < 4; i++)
        for (int64_t m = 1; m <= 17; m += 16) {
            check_case(m, 256, 24, 128, t[i], 1.0f, false);
            check_case(m, 256, 24, 128, ANY, peak[i], true);
        }
}
END_TEST

/* Alternating largest values: the largest integers, the largest sums. */
START_TEST(largest_sums)
{
    for (int64_t m = 1; m <= 33; m += 8) {
        w4_weight w = random_codes(256, 32, 128, HIGH);
        const w4_weight *part = &w;
        problem p = make_problem(m, 256, 32, 1.0f);
        for (int64_t i = 0; i < m; i++)
            for (int64_t c = 0; c < 256; c++)
                p.x[i * p.ldx + c] = i % 3 == 0 ? 2.5f : i % 3 == 1 ? -2.5f : c % 2 ? 2.5f : -2.5f;
        check_all(&p, &part, 1, false);
        drop_problem(&p);
        drop(&w);
    }
}
END_TEST

START_TEST(fractional_zeros)
{
    for (int64_t m = 1; m <= 40; m += 13) {
        state = (uint32_t)m;
        w4_weight w = random_tm(384, 56, 128);
        const w4_weight *part = &w;
        problem p = make_problem(m, 384, 56, 1.0f);
        add_bias(&w, DT_F16);
        check_all(&p, &part, 1, true);
        drop_problem(&p);
        drop(&w);
    }
}
END_TEST

/* Parts of different layouts that do not end on a tile; some with a bias. */
START_TEST(fused_parts)
{
    static const w4_layout layout[] = {W4_AWQ, W4_CODES, W4_TM, W4_GPTQ};
    static const int64_t n[] = {40, 8, 264, 24};
    w4_weight w[4];
    const w4_weight *parts[4];
    for (int i = 0; i < 4; i++) {
        err e;
        w4_weight codes = random_codes(128, n[i], 64, ANY);
        /* GPTQ stores zero - 1 */
        if (layout[i] == W4_GPTQ)
            for (int64_t j = 0; j < n[i] * 2; j++) ((uint8_t *)codes.zeros.data)[j] |= 1;
        w[i] = make(128, n[i], 64, layout[i]);
        ck_assert_msg(w4_repack(&w[i], &codes, &e) == OK, "%s", e.msg);
        if (i % 2) add_bias(&w[i], i == 1 ? DT_F32 : DT_F16);
        parts[i] = &w[i];
        drop(&codes);
    }
    for (int64_t m = 1; m <= 21; m += 10) {
        problem p = make_problem(m, 128, 40 + 8 + 264 + 24, 1.0f);
        check_all(&p, parts, 4, m % 4 == 1);
        drop_problem(&p);
    }
    for (int i = 0; i < 4; i++) drop(&w[i]);
}
END_TEST

START_TEST(layouts_give_one_tiling)
{
    static const w4_layout layout[] = {W4_CODES, W4_AWQ, W4_GPTQ, W4_TM, W4_TM_A};
    device *d = open_device("auto", 2, 1, 320, 288);
    w4_weight codes = random_codes(320, 288, 32, ANY);
    uint8_t *first = NULL;
    for (int64_t j = 0; j < 288 * 10; j++)
        ((uint8_t *)codes.zeros.data)[j] |= 1; /* GPTQ has no 0 */
    for (int i = 0; i < 5; i++) {
        w4_weight src = make(320, 288, 32, layout[i]), w;
        const w4_weight *part = &src;
        dev_buf buf = {0};
        err e;
        ck_assert_msg(w4_repack(&src, &codes, &e) == OK, "%s", e.msg);
        ck_assert_msg(w4_upload(d, &buf, &w, &part, 1, &e) == OK, "%s", e.msg);
        ck_assert_int_eq(w.layout, W4_DEVICE);
        ck_assert(w.k == 320 && w.n == 288 && w.group == 32 && !w.bias.data);
        if (!first) {
            first = take(buf.bytes);
            memcpy(first, buf.data, buf.bytes);
        }
        ck_assert_msg(!memcmp(first, buf.data, buf.bytes), "layout %s", w4_layout_name(layout[i]));
        dev_free(&buf);
        drop(&src);
    }
    mem_free(first);
    drop(&codes);
    dev_close(&d);
}
END_TEST

/* A NaN or infinity makes its own row not finite and leaves the others as they were. */
START_TEST(not_finite)
{
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    for (int i = 0; i < ISAS; i++)
        for (int64_t m = 1; m <= 35; m += 17)
            for (int b = 0; b < 3; b++) {
                device *d = open_device(isas[i], 1, m, 256, 40);
                w4_weight src = random_codes(256, 40, 128, ANY), w;
                const w4_weight *part = &src;
                problem p = make_problem(m, 256, 40, 1.0f);
                const int64_t row = m / 2, ny = p.m * p.ldy + GUARD;
                float *clean = take((size_t)ny * sizeof *clean);
                dev_buf buf = {0};
                err e;
                ck_assert_msg(w4_upload(d, &buf, &w, &part, 1, &e) == OK, "%s", e.msg);
                reset(&p);
                run_rows(&p, d, &w, false, 0, m);
                memcpy(clean, p.y, (size_t)ny * sizeof *clean);
                p.x[row * p.ldx + 131] = bad[b];
                reset(&p);
                run_rows(&p, d, &w, false, 0, m);
                check_guards(&p, isas[i]);
                for (int64_t r = 0; r < m; r++)
                    for (int64_t j = 0; j < 40; j++) {
                        const int64_t at = r * p.ldy + GUARD + j;
                        if (r != row) ck_assert(p.y[at] == clean[at]);
                        if (r == row && w4_code(&src, j, 131) != (int)w4_zero(&src, j, 1))
                            ck_assert_msg(!isfinite(p.y[at]), "%s: row %d", isas[i], (int)r);
                    }
                dev_free(&buf);
                mem_free(clean);
                drop_problem(&p);
                drop(&src);
                dev_close(&d);
            }
}
END_TEST

START_TEST(refusals)
{
    device *d = open_device("auto", 1, 4, 128, 64);
    w4_weight a = random_codes(128, 16, 64, ANY), b = random_codes(128, 16, 32, ANY);
    w4_weight c = random_codes(128, 16, 16, ANY), odd = random_codes(128, 12, 64, ANY), w;
    const w4_weight *mixed[] = {&a, &b}, *small[] = {&c}, *twelve[] = {&odd}, *good[] = {&a};
    dev_buf buf = {0};
    err e;
    ck_assert_int_eq(w4_upload(d, &buf, &w, mixed, 2, &e), E_SHAPE);
    ck_assert_int_eq(w4_upload(d, &buf, &w, small, 1, &e), E_UNSUPPORTED);
    ck_assert_int_eq(w4_upload(d, &buf, &w, twelve, 1, &e), E_SHAPE);
    ck_assert_ptr_null(buf.data);
    ck_assert_int_eq(w4_upload(d, &buf, &w, good, 1, &e), OK);
    const w4_weight *tiled[] = {&w};
    dev_buf other = {0};
    ck_assert(w4_upload(d, &other, &c, tiled, 1, &e) != OK);
    float x[128] = {0}, y[16];
    tensor tx = tensor_2d(x, DT_F32, 1, 128), ty = tensor_2d(y, DT_F32, 1, 16);
    ck_assert_int_eq(op_gemm_w4(d, &ty, &tx, &a, false, &e), E_UNSUPPORTED);
    ty.shape[1] = 8;
    ck_assert_int_eq(op_gemm_w4(d, &ty, &tx, &w, false, &e), E_SHAPE);
    dev_free(&buf);
    drop(&a);
    drop(&b);
    mem_free(c.q.data);
    mem_free(c.scales.data);
    mem_free(c.zeros.data);
    drop(&odd);
    dev_close(&d);
}
END_TEST

/* More rows than ops_reserve was told of: an error, not an overrun. */
START_TEST(scratch_limit)
{
    device *d = open_device("avx2", 1, 1, 128, 16);
    w4_weight src = random_codes(128, 16, 64, ANY), w;
    const w4_weight *part = &src;
    const op_limits lim = {.rows = 1, .k = 128, .n = 16};
    const int64_t m = (int64_t)ops_reserve_bytes(d, &lim) / 256 + 1; /* 2*k bytes a row and more */
    float *x = take((size_t)m * 128 * sizeof *x), *y = take((size_t)m * 16 * sizeof *y);
    tensor tx = tensor_2d(x, DT_F32, m, 128), ty = tensor_2d(y, DT_F32, m, 16);
    dev_buf buf = {0};
    err e;
    ck_assert_int_eq(w4_upload(d, &buf, &w, &part, 1, &e), OK);
    const err_code rc = op_gemm_w4(d, &ty, &tx, &w, false, &e);
    ck_assert_msg(rc == E_LIMIT || strstr(dev_name(d), "ref"), "expected E_LIMIT, got %s",
                  err_name(rc));
    dev_free(&buf);
    drop(&src);
    mem_free(x);
    mem_free(y);
    dev_close(&d);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("gemm_w4");
    TCase *t = tcase_create("gemm_w4");
    tcase_set_timeout(t, 300);
    tcase_add_loop_test(t, rows_and_columns, 0, 3);
    tcase_add_test(t, groups_and_depths);
    tcase_add_test(t, large);
    tcase_add_test(t, extremes);
    tcase_add_test(t, largest_sums);
    tcase_add_test(t, fractional_zeros);
    tcase_add_test(t, fused_parts);
    tcase_add_test(t, layouts_give_one_tiling);
    tcase_add_test(t, not_finite);
    tcase_add_test(t, refusals);
    tcase_add_test(t, scratch_limit);
    suite_add_tcase(s, t);
    return suite_run(s);
}
