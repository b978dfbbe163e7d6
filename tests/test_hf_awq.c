/* formats/hf_dir over AWQ directories: what opens, what each linear is, and what is refused. */
#include "formats/hf_dir.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/half.h"
#include "formats/safetensors.h"
#include "support/alloc_fail.h"
#include "support/hf_case.h"
#include "support/tempdir.h"
#include "support/tiny_dir.h"

/* ---- AWQ ---- */
static void awq(int32_t group)
{
    const model_desc m = tiny_llama();
    char dense[64];
    tempdir_make(dense, sizeof dense);
    tiny_dir_make(dense, &m, 1);
    tiny_awq_make(hf_in("q"), dense, &m, 1, group);
    (void)snprintf(hf_case_dir + strlen(hf_case_dir), sizeof hf_case_dir - strlen(hf_case_dir),
                   "/q");
    tempdir_drop(dense);
}

static void awq_done(void)
{
    *strrchr(hf_case_dir, '/') = 0;
    hf_teardown();
    hf_setup();
}

static float *dequantized(weight_src *s, tensor_role r, int64_t *n)
{
    linear_view v;
    float *out;
    ck_assert_msg(weights_linear(s, r, 1, -1, &v, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert(v.w4);
    ck_assert_int_eq((int)v.q.scales.dt, DT_F16);
    *n = v.q.n * v.q.k;
    out = malloc((size_t)*n * sizeof *out);
    for (int64_t i = 0; i < v.q.n; i++) w4_dequant_row(out + i * v.q.k, &v.q, i);
    return out;
}

START_TEST(awq_opens)
{
    static const int32_t groups[] = {32, 64, 128};
    for (int i = 0; i < 3; i++) {
        weight_src *s;
        linear_view v;
        awq(groups[i]);
        ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
        ck_assert_int_eq((int)weights_kind(s), SRC_AWQ);
        ck_assert_int_eq(weights_desc(s)->w4_group, groups[i]);
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &hf_err) == OK);
        ck_assert(v.w4);
        ck_assert_msg(w4_check(&v.q, "down", &hf_err) == OK, "%s", hf_err.msg);
        ck_assert_int_eq(v.q.group, groups[i]);
        ck_assert_int_eq((int)v.q.layout, W4_AWQ);
        ck_assert_msg(weights_check_finite(s, NULL, &hf_err) == OK, "%s", hf_err.msg);
        weights_close(&s);
        awq_done();
    }
}
END_TEST

#define DOWN "model.layers.1.mlp.down_proj"

/* Scales of another float type give the same weights, as f16. */
START_TEST(awq_scale_types)
{
    weight_src *s;
    st_file *f;
    tensor t;
    int64_t n, m;
    awq(128);
    ck_assert(st_open(&f, hf_in("model.safetensors"), &hf_err) == OK);
    ck_assert(st_get(f, DOWN ".scales", &t, &hf_err) == OK);
    const int64_t count = tensor_count(&t), shape[2] = {t.shape[0], t.shape[1]};
    float *f32 = malloc((size_t)count * 4);
    bf16 *b16 = malloc((size_t)count * 2);
    f16 *h16 = malloc((size_t)count * 2);
    for (int64_t i = 0; i < count; i++) { /* values that all three hold */
        b16[i] = f32_to_bf16(f16_to_f32(((const f16 *)t.data)[i]));
        f32[i] = bf16_to_f32(b16[i]);
        h16[i] = f32_to_f16(f32[i]);
    }
    st_close(&f);
    const hf_change c[3] = {{HF_PUT, DOWN ".scales", DT_F16, 2, {shape[0], shape[1]}, h16},
                            {HF_PUT, DOWN ".scales", DT_F32, 2, {shape[0], shape[1]}, f32},
                            {HF_PUT, DOWN ".scales", DT_BF16, 2, {shape[0], shape[1]}, b16}};
    float *want = NULL;
    for (int i = 0; i < 3; i++) {
        hf_rewrite(&c[i], 1);
        ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
        float *got = dequantized(s, ROLE_DOWN, &n);
        if (i) ck_assert_mem_eq(got, want, (size_t)n * 4);
        m = n;
        linear_view v;
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &hf_err) == OK);
        const void *once = v.q.scales.data;
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &hf_err) == OK);
        ck_assert_ptr_eq(once, v.q.scales.data); /* cast once */
        weights_close(&s);
        if (i)
            free(got);
        else
            want = got;
    }
    ck_assert_int_eq(n, m);
    f32[3] = 70000; /* more than f16 holds */
    hf_rewrite(&c[1], 1);
    ck_assert(weights_open(&s, hf_case_dir, &hf_err) == OK);
    linear_view v;
    ck_assert_int_eq(weights_linear(s, ROLE_DOWN, 1, -1, &v, &hf_err), E_INPUT);
    ck_assert_msg(strstr(hf_err.msg, "'" DOWN ".scales': 1 values of F32 do not fit F16"), "%s",
                  hf_err.msg);
    weights_close(&s);
    free(want);
    free(f32);
    free(b16);
    free(h16);
    awq_done();
}
END_TEST

START_TEST(awq_mixed_with_dense)
{
    weight_src *s;
    linear_view v;
    const hf_change c[] = {{.op = HF_DROP, .name = DOWN ".qweight"},
                           {.op = HF_DROP, .name = DOWN ".qzeros"},
                           {.op = HF_DROP, .name = DOWN ".scales"},
                           {HF_PUT, DOWN ".weight", DT_F16, 2, {256, 384}, NULL}};
    awq(128);
    hf_rewrite(c, 4);
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &hf_err) == OK);
    ck_assert(!v.w4 && v.dense.dt == DT_F16);
    ck_assert(weights_linear(s, ROLE_DOWN, 0, -1, &v, &hf_err) == OK);
    ck_assert(v.w4);
    weights_close(&s);
    awq_done();
}
END_TEST

static void awq_change(const hf_change *c, int n, err_code code, const char *fragment)
{
    awq(128);
    hf_rewrite(c, n);
    hf_refused(code, fragment);
    awq_done();
}

START_TEST(awq_wrong_tensors)
{
    static const struct {
        hf_change c;
        err_code code;
        const char *fragment;
    } cases[] = {
        {{.op = HF_DROP, .name = DOWN ".qzeros"}, E_INPUT, "'" DOWN ".qzeros' is missing"},
        {{.op = HF_DROP, .name = DOWN ".scales"}, E_INPUT, "'" DOWN ".scales' is missing"},
        {{.op = HF_DROP, .name = DOWN ".qweight"}, E_INPUT, "'" DOWN ".weight' is missing"},
        {{HF_PUT, DOWN ".qweight", DT_I32, 2, {256, 48}, NULL},
         E_SHAPE,
         "expected I32 [384,32], got I32 [256,48]"},
        {{HF_PUT, DOWN ".qweight", DT_I32, 2, {384, 33}, NULL}, E_SHAPE, "got I32 [384,33]"},
        {{HF_PUT, DOWN ".qweight", DT_F16, 2, {384, 32}, NULL},
         E_SHAPE,
         "expected I32 [384,32], got F16"},
        {{HF_PUT, DOWN ".qweight", DT_I16, 2, {64, 384}, NULL}, E_SHAPE, "got I16 [64,384]"},
        {{HF_PUT, DOWN ".qzeros", DT_I32, 2, {4, 32}, NULL},
         E_SHAPE,
         "expected I32 [3,32], got I32 [4,32]"},
        {{HF_PUT, DOWN ".scales", DT_F16, 2, {6, 256}, NULL},
         E_SHAPE,
         "expected F16 [3,256], got F16 [6,256]"},
        {{HF_PUT, DOWN ".scales", DT_I32, 2, {3, 256}, NULL}, E_SHAPE, "got I32"},
        {{HF_PUT, DOWN ".weight", DT_F16, 2, {256, 384}, NULL},
         E_INPUT,
         "as weight and as qweight"},
        {{HF_PUT, DOWN ".g_idx", DT_I32, 1, {384}, NULL}, E_UNSUPPORTED, "GPTQ"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        awq_change(&cases[i].c, 1, cases[i].code, cases[i].fragment);
}
END_TEST

START_TEST(awq_wrong_config)
{
    static const struct {
        const char *old, *new;
        err_code code;
        const char *fragment;
    } cases[] = {
        {"\"quant_method\":\t\"awq\"", "\"quant_method\":\"gptq\"", E_UNSUPPORTED, "'gptq'"},
        {"\"bits\":\t4", "\"bits\":8", E_UNSUPPORTED, "8 bits"},
        {"\"group_size\":\t128", "\"group_size\":256", E_UNSUPPORTED, "group size 256"},
        {"\"group_size\":\t128", "\"group_size\":64", E_SHAPE,
         "qzeros': expected I32 [4,32], got I32 [2,32]"},
        {"\"version\":\t\"gemm\"", "\"version\":\"gemv\"", E_UNSUPPORTED, "'gemv'"},
        {"\"quantization_config\"", "\"other\"", E_INPUT, "no quantization_config"},
        {"\"intermediate_size\":\t384", "\"intermediate_size\":448", E_SHAPE,
         "gate_proj.qweight': expected I32 [256,56]"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        awq(128);
        hf_edit("config.json", cases[i].old, cases[i].new);
        hf_refused(cases[i].code, cases[i].fragment);
        awq_done();
    }
    hf_llama(); /* says awq and is not */
    hf_edit("config.json", "{", "{\"quantization_config\":{\"quant_method\":\"awq\"},");
    hf_refused(E_INPUT, "no linear has a qweight");
}
END_TEST

START_TEST(awq_without_zero_points)
{
    awq(128);
    hf_edit("config.json", "\"zero_point\":\ttrue", "\"zero_point\":false");
    hf_opens(); /* the flag alone changes nothing: the zeros are there */
    const hf_change c = {HF_PUT, "model.layers.0.self_attn.q_proj.qzeros", DT_I32, 2, {2, 32},
                         NULL};
    hf_rewrite(&c, 1);
    hf_refused(E_UNSUPPORTED, "zero_point is false");
    awq_done();
}
END_TEST

/* Our own directories carry a manifest that names their content. */
START_TEST(awq_manifest_names_it)
{
    char a[65], b[65], path[512];
    awq(128);
    hf_digest_of(a);
    (void)snprintf(path, sizeof path, "%s", hf_in("manifest.json"));
    ck_assert_int_eq(unlink(path), 0);
    hf_digest_of(b);
    ck_assert_str_ne(a, b);
    awq_done();
    awq(128);
    hf_digest_of(b);
    ck_assert_str_eq(a, b);
    hf_edit("config.json", "{", "{ "); /* changed since: the manifest no longer speaks for it */
    hf_digest_of(b);
    ck_assert_str_ne(a, b);
    awq_done();
}
END_TEST

/* ---- memory ---- */
START_TEST(hf_out_of_memory)
{
    long k = 0;
    awq(128);
    for (bool again = true; again; k++) {
        weight_src *s;
        linear_view v;
        alloc_fail_at(k + 1);
        err_code rc = weights_open(&s, hf_case_dir, &hf_err);
        if (rc == OK) rc = weights_linear(s, ROLE_Q, 0, -1, &v, &hf_err);
        again = alloc_failed();
        ck_assert_msg(rc == (again ? E_NOMEM : OK) || (again && rc == OK), "%ld: %s", k,
                      err_name(rc));
        weights_close(&s);
    }
    ck_assert_int_gt(k, 15);
    alloc_fail_at(0);
    awq_done();
}
END_TEST

int main(void)
{
    Suite *s = suite_create("hf_awq");
    TCase *t = hf_cases_of("awq", s);
    tcase_add_test(t, awq_opens);
    tcase_add_test(t, awq_scale_types);
    tcase_add_test(t, awq_mixed_with_dense);
    tcase_add_test(t, awq_wrong_tensors);
    tcase_add_test(t, awq_wrong_config);
    tcase_add_test(t, awq_without_zero_points);
    tcase_add_test(t, awq_manifest_names_it);
    tcase_add_test(t, hf_out_of_memory);
    return hf_run(s);
}
