/* formats/weights_check and weights_mem: values that must not be, and sources made in memory. */
#include "formats/weights_mem.h"

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "support/suite.h"
#include "support/tiny_dir.h"

static err e;

/* ---- one tensor ---- */
static void put(void *p, dtype dt, int64_t i, float v)
{
    if (dt == DT_F32)
        ((float *)p)[i] = v;
    else
        ((uint16_t *)p)[i] = dt == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
}

/* Any bad value at any place of blocks and tail is found, and the first of two is named. */
START_TEST(check_finds_every_place)
{
    static const dtype types[] = {DT_F16, DT_BF16, DT_F32};
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    static const char *const said[] = {"got nan", "got infinity", "got -infinity"};
    enum { ROWS = 3, COLS = 4096 + 37 };
    static const int64_t places[] = {0,        1,    4095,          4096,
                                     COLS - 1, COLS, 2 * COLS + 17, ROWS * COLS - 1};
    float *data = calloc(ROWS * COLS, sizeof *data);
    for (int t = 0; t < 3; t++) {
        const tensor v = tensor_2d(data, types[t], ROWS, COLS);
        for (int64_t i = 0; i < ROWS * COLS; i++) put(data, types[t], i, 1.5f);
        ck_assert_msg(weights_check_tensor(&v, "x", NULL, NULL, &e) == OK, "%s", e.msg);
        for (size_t k = 0; k < sizeof places / sizeof places[0]; k++) {
            for (int b = 0; b < 3; b++) {
                char want[128];
                const int64_t at = places[k];
                put(data, types[t], at, bad[b]);
                if (at + 5 < ROWS * COLS) put(data, types[t], at + 5, NAN);
                ck_assert_int_eq(weights_check_tensor(&v, "x", NULL, NULL, &e), E_INPUT);
                (void)snprintf(want, sizeof want,
                               "x: element [%d,%d]: expected a finite number, %s", (int)(at / COLS),
                               (int)(at % COLS), said[b]);
                ck_assert_str_eq(e.msg, want);
                put(data, types[t], at, 1.5f);
                if (at + 5 < ROWS * COLS) put(data, types[t], at + 5, 1.5f);
            }
        }
    }
    free(data);
}
END_TEST

/* Bytes that are NaN as one type and fine as another: the test must look at the exponent of the
 * right one. */
START_TEST(check_knows_the_type)
{
    uint16_t bits[5000];
    tensor v = tensor_1d(bits, DT_BF16, 5000);
    for (int i = 0; i < 5000; i++) bits[i] = 0x7c01; /* NaN in f16, 2.7e36 in bf16 */
    int64_t over;
    float largest;
    ck_assert(weights_check_tensor(&v, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 5000);
    ck_assert_float_eq(largest, bf16_to_f32(0x7c01));
    v.dt = DT_F16;
    ck_assert_int_eq(weights_check_tensor(&v, "x", NULL, NULL, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "x: element [0]: expected a finite number, got nan");
    for (int i = 0; i < 5000; i++) bits[i] = 0x7bff; /* the largest f16 */
    ck_assert(weights_check_tensor(&v, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 0);
}
END_TEST

START_TEST(check_counts_what_f16_drops)
{
    float f32[4200];
    bf16 b16[4200];
    int64_t over;
    float largest;
    for (int i = 0; i < 4200; i++) {
        f32[i] = 65519.9f; /* still rounds to 65504 */
        b16[i] = f32_to_bf16(65280.0f);
    }
    tensor v = tensor_1d(f32, DT_F32, 4200), w = tensor_1d(b16, DT_BF16, 4200);
    ck_assert(weights_check_tensor(&v, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 0);
    ck_assert(weights_check_tensor(&w, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 0);
    f32[7] = 65520.0f;
    f32[4199] = -1e30f;
    ck_assert(weights_check_tensor(&v, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 2);
    ck_assert_float_eq(largest, 1e30f);
    b16[4100] = f32_to_bf16(-65536.0f);
    ck_assert(weights_check_tensor(&w, "x", &over, &largest, &e) == OK);
    ck_assert_int_eq(over, 1);
    ck_assert_float_eq(largest, 65536.0f);
}
END_TEST

START_TEST(check_strided)
{
    float data[12 * 10];
    for (int i = 0; i < 120; i++) data[i] = 1;
    tensor rows = tensor_2d(data, DT_F32, 12, 10), turned = rows;
    turned.shape[0] = 10;
    turned.shape[1] = 12;
    turned.stride[0] = 1;
    turned.stride[1] = 10;
    data[3 * 10 + 7] = NAN; /* row 3, column 7; turned: row 7, column 3 */
    ck_assert_int_eq(weights_check_tensor(&turned, "x", NULL, NULL, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "x: element [7,3]: expected a finite number, got nan");
    const tensor part = tensor_cols(&rows, 5, 4); /* columns 5..8 of each row */
    ck_assert_int_eq(weights_check_tensor(&part, "x", NULL, NULL, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "x: element [3,2]: expected a finite number, got nan");
    const tensor clean = tensor_cols(&rows, 0, 7);
    ck_assert(weights_check_tensor(&clean, "x", NULL, NULL, &e) == OK);
    rows.stride[0] = 20;
    rows.stride[1] = 2;
    rows.shape[0] = 6;
    rows.shape[1] = 5;
    ck_assert_int_eq(weights_check_tensor(&rows, "x", NULL, NULL, &e), E_SHAPE);
    const tensor none = tensor_2d(NULL, DT_F32, 0, 10), ints = tensor_1d(data, DT_I32, 4);
    ck_assert(weights_check_tensor(&none, "x", NULL, NULL, &e) == OK);
    ck_assert_int_eq(weights_check_tensor(&ints, "x", NULL, NULL, &e), E_SHAPE);
}
END_TEST

/* ---- sources ---- */
static weights_mem *fresh(model_desc m)
{
    weights_mem *w;
    ck_assert_msg(weights_mem_open(&w, &m, &e) == OK, "%s", e.msg);
    ck_assert_msg(weights_mem_random(w, 5, 0.02f, &e) == OK, "%s", e.msg);
    return w;
}

static weight_src *as_source(weights_mem **w)
{
    weight_src *s;
    ck_assert_msg(weights_mem_source(&s, w, &e) == OK, "%s", e.msg);
    ck_assert_ptr_null(*w);
    return s;
}

START_TEST(mem_source)
{
    model_desc m = tiny_qwen2();
    weights_mem *w = fresh(m);
    weight_src *s = as_source(&w);
    linear_view v;
    tensor t;
    double sum = 0, square = 0;
    ck_assert_int_eq((int)weights_kind(s), SRC_MEM);
    ck_assert(weights_linear(s, ROLE_GATE, 1, -1, &v, &e) == OK);
    ck_assert_int_eq(v.dense.shape[0], m.ffn);
    ck_assert_ptr_null(v.bias.data);
    const int64_t n = tensor_count(&v.dense);
    for (int64_t i = 0; i < n; i++) {
        const double x = (double)bf16_to_f32(((const bf16 *)v.dense.data)[i]);
        sum += x;
        square += x * x;
    }
    ck_assert_double_lt(fabs(sum / (double)n), 3e-4);
    ck_assert_double_lt(fabs(sqrt(square / (double)n) - 0.02), 3e-4);
    ck_assert(weights_linear(s, ROLE_K, 1, -1, &v, &e) == OK);
    ck_assert_ptr_nonnull(v.bias.data);
    ck_assert(weights_tensor(s, ROLE_HEAD, -1, &t, &e) == OK); /* tied */
    ck_assert_int_eq(t.shape[0], m.vocab);
    ck_assert(weights_has(s, ROLE_HEAD, -1, -1) && !weights_has(s, ROLE_QKV, 0, -1));
    weights_prefetch(s, 0);
    weights_release(s, 0);
    ck_assert(weights_check_finite(s, NULL, &e) == OK);
    weights_close(&s);
}
END_TEST

START_TEST(mem_random_follows_the_seed)
{
    model_desc m = tiny_llama();
    weights_mem *a = fresh(m), *b;
    weight_src *sa, *sb;
    linear_view x, y;
    m.layers = 1; /* another depth, the same first layer */
    b = fresh(m);
    sa = as_source(&a);
    sb = as_source(&b);
    ck_assert(weights_linear(sa, ROLE_UP, 0, -1, &x, &e) == OK);
    ck_assert(weights_linear(sb, ROLE_UP, 0, -1, &y, &e) == OK);
    ck_assert_mem_eq(x.dense.data, y.dense.data, tensor_bytes(&x.dense));
    ck_assert(weights_linear(sa, ROLE_UP, 1, -1, &y, &e) == OK);
    ck_assert_mem_ne(x.dense.data, y.dense.data, tensor_bytes(&x.dense));
    weights_close(&sa);
    weights_close(&sb);
}
END_TEST

START_TEST(mem_refuses)
{
    model_desc m = tiny_llama();
    weights_mem *w;
    weight_src *s;
    float data[256 * 2] = {0};
    const tensor two = tensor_1d(data, DT_F32, 255), ints = tensor_1d(data, DT_I32, 256);
    linear_view v = {.dense = tensor_2d(data, DT_F32, 1, 256)};
    ck_assert(weights_mem_open(&w, &m, &e) == OK);
    ck_assert_int_eq(weights_mem_source(&s, &w, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layer -1 has no 'embed'"), "%s", e.msg);
    ck_assert_ptr_nonnull(w);
    ck_assert_int_eq(weights_mem_tensor(w, ROLE_FINAL_NORM, -1, &two, &e), E_SHAPE);
    ck_assert_int_eq(weights_mem_tensor(w, ROLE_FINAL_NORM, -1, &ints, &e), E_SHAPE);
    ck_assert_int_eq(weights_mem_linear(w, ROLE_O, 0, &v, &e), E_SHAPE);
    ck_assert_int_eq(weights_mem_quantize(w, 48, &e), E_UNSUPPORTED);
    weights_mem_close(&w);
    (void)snprintf(m.family, sizeof m.family, "none");
    ck_assert_int_eq(weights_mem_open(&w, &m, &e), E_UNSUPPORTED);
    m.layers = 0;
    ck_assert_int_eq(weights_mem_open(&w, &m, &e), E_INPUT);
}
END_TEST

static int calls;
static char told[256];

static void on_overflow(void *ud, const char *name, int64_t count, float largest)
{
    calls++;
    (void)snprintf(told, sizeof told, "%s %lld %g %s", name, (long long)count, (double)largest,
                   (const char *)ud);
}

START_TEST(check_sources)
{
    model_desc m = tiny_llama();
    weights_mem *w = fresh(m);
    tensor t;
    uint16_t norm[256];
    for (int i = 0; i < 256; i++) norm[i] = f32_to_bf16(1);
    norm[3] = norm[200] = f32_to_bf16(-1e6f);
    t = tensor_1d(norm, DT_BF16, 256);
    ck_assert(weights_mem_tensor(w, ROLE_FFN_NORM, 1, &t, &e) == OK); /* replaces */
    weight_src *s = as_source(&w);
    char mark[] = "mark";
    calls = 0;
    ck_assert_msg(weights_check_f16(s, on_overflow, mark, &e) == OK, "%s", e.msg);
    ck_assert_int_eq(calls, 1);
    ck_assert_str_eq(told, "model.layers.1.post_attention_layernorm.weight 2 999424 mark");
    ck_assert(weights_check_f16(s, NULL, NULL, &e) == OK);
    ck_assert(weights_check_layer(s, 0, on_overflow, mark, &e) == OK);
    ck_assert_int_eq(calls, 1);
    weights_close(&s);
}
END_TEST

/* A NaN in any kind of tensor is named by its name in the checkpoint. */
START_TEST(check_names_nan)
{
    static const struct {
        tensor_role r;
        int32_t layer;
        bool bias;
        const char *name;
    } cases[] = {
        {ROLE_EMBED, -1, false, "model.embed_tokens.weight: element [3,7]"},
        {ROLE_FINAL_NORM, -1, false, "model.norm.weight: element [7]"},
        {ROLE_ATTN_NORM, 1, false, "model.layers.1.input_layernorm.weight: element [7]"},
        {ROLE_DOWN, 0, false, "model.layers.0.mlp.down_proj.weight: element [3,7]"},
        {ROLE_Q, 1, true, "model.layers.1.self_attn.q_proj.bias: element [7]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        weights_mem *w = fresh(tiny_qwen2());
        weight_src *s = as_source(&w);
        tensor t;
        linear_view v;
        if (cases[i].r == ROLE_DOWN || cases[i].r == ROLE_Q) {
            ck_assert(weights_linear(s, cases[i].r, cases[i].layer, -1, &v, &e) == OK);
            t = cases[i].bias ? v.bias : v.dense;
        } else {
            ck_assert(weights_tensor(s, cases[i].r, cases[i].layer, &t, &e) == OK);
        }
        ((bf16 *)t.data)[t.ndim == 2 ? 3 * t.stride[0] + 7 : 7] = f32_to_bf16(NAN);
        ck_assert_int_eq(weights_check_finite(s, NULL, &e), E_INPUT);
        ck_assert_msg(strstr(e.msg, cases[i].name), "%s", e.msg);
        ck_assert_int_eq(weights_check_layer(s, cases[i].layer, NULL, NULL, &e), E_INPUT);
        weights_close(&s);
    }
}
END_TEST

START_TEST(mem_quantized)
{
    model_desc m = tiny_qwen2();
    weights_mem *w = fresh(m), *dense = fresh(m);
    weight_src *s, *d;
    linear_view q, v;
    ck_assert_msg(weights_mem_quantize(w, 64, &e) == OK, "%s", e.msg);
    s = as_source(&w);
    d = as_source(&dense);
    ck_assert_int_eq(weights_desc(s)->w4_group, 64);
    ck_assert(weights_linear(s, ROLE_Q, 1, -1, &q, &e) == OK);
    ck_assert(weights_linear(d, ROLE_Q, 1, -1, &v, &e) == OK);
    ck_assert(q.w4 && q.q.bias.data && q.q.bias.data == q.bias.data);
    ck_assert_msg(w4_check(&q.q, "q", &e) == OK, "%s", e.msg);
    float row[256];
    for (int64_t i = 0; i < q.q.n;
         i++) { /* within half a step, plus the rounding of the step to f16 */
        w4_dequant_row(row, &q.q, i);
        for (int64_t k = 0; k < q.q.k; k++) {
            const float step = f16_to_f32(
                ((const f16 *)q.q.scales.data)[i * (q.q.k / 64) + k / 64]);
            ck_assert_float_le(
                fabsf(row[k] - bf16_to_f32(((const bf16 *)v.dense.data)[i * 256 + k])),
                0.51f * step + 1e-4f);
        }
    }
    const f16 nan = 0x7e00; /* in a scale */
    ((f16 *)q.q.scales.data)[5] = nan;
    ck_assert_int_eq(weights_check_finite(s, NULL, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "q_proj.scales: element [1,1]"), "%s", e.msg);
    weights_close(&s);
    weights_close(&d);
}
END_TEST

static atomic_bool stop;
static int64_t last_done;
static void on_progress(void *ud, const job_progress *p)
{
    (void)ud;
    last_done = p->done;
}

START_TEST(check_can_be_stopped)
{
    weights_mem *w = fresh(tiny_llama());
    weight_src *s = as_source(&w);
    const job j = {.progress = on_progress, .stop = &stop};
    ck_assert(weights_check_finite(s, &j, &e) == OK);
    ck_assert_int_eq(last_done, 2);
    atomic_store(&stop, true);
    ck_assert_int_eq(weights_check_finite(s, &j, &e), E_CANCELED);
    weights_close(&s);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("weights");
    TCase *t = tcase_create("all");
    tcase_add_test(t, check_finds_every_place);
    tcase_add_test(t, check_knows_the_type);
    tcase_add_test(t, check_counts_what_f16_drops);
    tcase_add_test(t, check_strided);
    tcase_add_test(t, mem_source);
    tcase_add_test(t, mem_random_follows_the_seed);
    tcase_add_test(t, mem_refuses);
    tcase_add_test(t, check_sources);
    tcase_add_test(t, check_names_nan);
    tcase_add_test(t, mem_quantized);
    tcase_add_test(t, check_can_be_stopped);
    suite_add_tcase(s, t);
    return suite_run(s);
}
