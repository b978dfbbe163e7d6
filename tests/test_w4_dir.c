/* formats/w4_dir: what is written reads back as what was given; shards, casts, refusals, manifest.
 */
#include "formats/w4_dir.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/half.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/manifest.h"
#include "formats/safetensors.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"
#include "tests/support/tiny_weights.h"

static char root[256], src_path[300], out_path[300];
static weight_src *dense, *codes; /* the directory, and the same model as 4-bit codes in memory */

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)

static void open_model(model_desc m)
{
    err e;
    tempdir_make(root, sizeof root);
    (void)snprintf(src_path, sizeof src_path, "%s/src", root);
    (void)snprintf(out_path, sizeof out_path, "%s/awq", root);
    tiny_dir_make(src_path, &m, 5);
    MUST(weights_open(&dense, src_path, &e));
    const tiny_opts o = {.desc = m, .seed = 5, .w4_group = 128};
    MUST(tiny_open(&codes, &o, &e));
}

static void close_model(void)
{
    weights_close(&dense);
    weights_close(&codes);
    tempdir_drop(root);
}

/* Feeds everything in; `skip` is left out (ROLE_COUNT: nothing). */
static err_code feed(w4_dir_writer *w, tensor_role skip, err *e)
{
    static const tensor_role model[] = {ROLE_HEAD, ROLE_EMBED, ROLE_FINAL_NORM};
    static const tensor_role norms[] = {ROLE_FFN_NORM, ROLE_ATTN_NORM};
    const model_desc *m = weights_desc(codes);
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    linear_view v;
    tensor t;

    for (int32_t l = m->layers - 1; l >= 0; l--) { /* any order */
        for (int i = 0; i < 2; i++) {
            TRY(weights_tensor(codes, norms[i], l, &t, e));
            TRY(w4_dir_tensor(w, norms[i], l, &t, e));
        }
        for (int i = 0; i < n; i++) {
            if (linears[i] == skip) continue;
            TRY(weights_linear(codes, linears[i], l, -1, &v, e));
            TRY(w4_dir_linear(w, linears[i], l, -1, &v.q, e));
        }
    }
    for (int i = 0; i < 3; i++) {
        if (model[i] == skip || (model[i] == ROLE_HEAD && m->tied_embed)) continue;
        TRY(weights_tensor(codes, model[i], -1, &t, e));
        TRY(w4_dir_tensor(w, model[i], -1, &t, e));
    }
    return OK;
}

static err_code write_all(const w4_dir_opts *o, tensor_role skip, err *e)
{
    w4_dir_writer *w;
    TRY(w4_dir_open(&w, out_path, dense, o, NULL, e));
    const err_code rc = feed(w, skip, e);
    if (rc == OK) return w4_dir_commit(&w, e);
    w4_dir_abort(&w);
    return rc;
}

static void assert_same_linear(weight_src *got, tensor_role r, int32_t layer)
{
    linear_view a, b;
    err e;
    MUST(weights_linear(codes, r, layer, -1, &a, &e));
    MUST(weights_linear(got, r, layer, -1, &b, &e));
    ck_assert(b.w4);
    float *x = malloc((size_t)a.q.k * 4), *y = malloc((size_t)a.q.k * 4);
    for (int64_t n = 0; n < a.q.n; n++) {
        w4_dequant_row(x, &a.q, n);
        w4_dequant_row(y, &b.q, n);
        ck_assert_mem_eq(x, y, (size_t)a.q.k * 4);
    }
    free(x);
    free(y);
    ck_assert_int_eq(a.bias.data != NULL, b.bias.data != NULL);
    for (int64_t i = 0; a.bias.data && i < a.q.n; i++) {
        ck_assert_int_eq(b.bias.dt, DT_F16);
        ck_assert_uint_eq(((uint16_t *)b.bias.data)[i],
                          f32_to_f16(bf16_to_f32(((uint16_t *)a.bias.data)[i])));
    }
}

static void assert_same_tensor(weight_src *got, tensor_role r, int32_t layer)
{
    tensor a, b;
    err e;
    MUST(weights_tensor(codes, r, layer, &a, &e));
    MUST(weights_tensor(got, r, layer, &b, &e));
    ck_assert_int_eq(b.dt, DT_F16);
    for (int64_t i = 0; i < tensor_count(&a); i++)
        ck_assert_uint_eq(((uint16_t *)b.data)[i],
                          f32_to_f16(bf16_to_f32(((uint16_t *)a.data)[i])));
}

static void assert_same_model(void)
{
    weight_src *got;
    tensor_role linears[7];
    err e;
    MUST(weights_open(&got, out_path, &e));
    ck_assert_int_eq(weights_kind(got), SRC_AWQ);
    ck_assert_int_eq(weights_desc(got)->w4_group, 128);
    const int n = model_block_linears(weights_desc(got), linears);
    for (int32_t l = 0; l < weights_desc(got)->layers; l++) {
        for (int i = 0; i < n; i++) assert_same_linear(got, linears[i], l);
        assert_same_tensor(got, ROLE_ATTN_NORM, l);
    }
    assert_same_tensor(got, ROLE_EMBED, -1);
    assert_same_tensor(got, ROLE_HEAD, -1);
    weights_close(&got);
}

static const char *const meta[] = {"parent", "abc", "options", "method=rtn", NULL};
static const w4_dir_opts plain = {.group = 128, .meta = meta};

static model_desc model_at(int i)
{
    return i == 0 ? tiny_llama() : i == 1 ? tiny_internlm2() : tiny_qwen2();
}

START_TEST(reads_back)
{
    err e;
    open_model(model_at(_i));
    MUST(write_all(&plain, ROLE_COUNT, &e));
    assert_same_model();
    close_model();
}
END_TEST

static bool is_there(const char *name)
{
    char path[600];
    (void)snprintf(path, sizeof path, "%s/%s", out_path, name);
    return file_exists(path);
}

START_TEST(side_files)
{
    char path[600];
    cJSON *c;
    manifest man;
    err e;
    open_model(tiny_llama());
    MUST(write_all(&plain, ROLE_COUNT, &e));
    ck_assert(is_there("generation_config.json") && is_there("tokenizer_config.json"));
    ck_assert(is_there("modeling_x.py") && is_there("model.safetensors"));
    ck_assert(!is_there("notes.txt") && !is_there("model.safetensors.index.json"));

    (void)snprintf(path, sizeof path, "%s/config.json", out_path);
    MUST(json_load(&c, path, 1 << 20, &e));
    const char *s;
    int64_t group;
    const cJSON *q = cJSON_GetObjectItemCaseSensitive(c, "quantization_config");
    MUST(json_get_str(c, "torch_dtype", &s, &e));
    ck_assert_str_eq(s, "float16");
    MUST(json_get_str(q, "quant_method", &s, &e));
    ck_assert_str_eq(s, "awq");
    MUST(json_get_str(q, "version", &s, &e));
    ck_assert_str_eq(s, "gemm");
    MUST(json_get_i64(q, "group_size", 0, 999, &group, &e));
    ck_assert_int_eq(group, 128);
    MUST(json_get_i64(q, "bits", 0, 999, &group, &e));
    ck_assert_int_eq(group, 4);
    ck_assert(cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(q, "zero_point")));
    ck_assert(cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(q, "modules_to_not_convert")));
    cJSON_Delete(c);

    MUST(manifest_read(&man, out_path, &e));
    ck_assert_str_eq(man.kind, MANIFEST_KIND_AWQ);
    ck_assert_str_eq(man.parent, "abc");
    ck_assert_str_eq(man.options, "method=rtn");
    MUST(manifest_verify(&man, out_path, NULL, &e));
    ck_assert_ptr_nonnull(manifest_find(&man, "model.safetensors"));
    manifest_free(&man);

    st_file *st;
    (void)snprintf(path, sizeof path, "%s/model.safetensors", out_path);
    MUST(st_open(&st, path, &e));
    ck_assert_str_eq(st_meta(st, "format"), "pt");
    ck_assert_str_eq(st_meta(st, "parent"), "abc");
    st_close(&st);
    close_model();
}
END_TEST

/* Every name says the same total, which is how many there are. */
static int count_shards(void)
{
    dir_list l;
    err e;
    int n = 0, index, total, last = 0;
    MUST(dir_list_open(&l, out_path, &e));
    for (size_t i = 0; i < l.n; i++) {
        if (sscanf(l.names[i], "model-%5d-of-%5d.safetensors", &index, &total) != 2) continue;
        ck_assert_int_eq(index, ++n);
        ck_assert(last == 0 || total == last);
        last = total;
    }
    dir_list_free(&l);
    ck_assert_int_eq(n, last);
    return n;
}

START_TEST(shards)
{
    w4_dir_opts o = plain;
    err e;
    open_model(tiny_llama());
    o.shard_bytes = 100000;
    MUST(write_all(&o, ROLE_COUNT, &e));
    ck_assert_int_ge(count_shards(), 3);
    ck_assert(is_there("model.safetensors.index.json") && !is_there("model.safetensors"));
    assert_same_model();
    close_model();
}
END_TEST

/* Two runs give the same manifest, hence the same bytes of every file. */
START_TEST(same_bytes)
{
    manifest a, b;
    w4_dir_opts o = plain;
    err e;
    open_model(tiny_qwen2());
    MUST(write_all(&o, ROLE_COUNT, &e));
    MUST(manifest_read(&a, out_path, &e));
    ck_assert_int_eq(write_all(&o, ROLE_COUNT, &e), E_USAGE); /* there already */
    o.force = true;
    MUST(write_all(&o, ROLE_COUNT, &e));
    MUST(manifest_read(&b, out_path, &e));
    ck_assert_str_eq(a.digest.hex, b.digest.hex);
    manifest_free(&a);
    manifest_free(&b);
    close_model();
}
END_TEST

START_TEST(dense_role)
{
    w4_dir_opts o = plain;
    w4_dir_writer *w;
    weight_src *got;
    linear_view v, back;
    uint64_t bytes, fewer;
    int64_t tensors;
    err e;
    open_model(tiny_llama());
    o.dense_roles = 1u << ROLE_DOWN;
    MUST(w4_dir_open(&w, out_path, dense, &o, NULL, &e));
    MUST(feed(w, ROLE_DOWN, &e));
    for (int32_t l = 0; l < 2; l++) {
        MUST(weights_linear(dense, ROLE_DOWN, l, -1, &v, &e));
        MUST(w4_dir_dense(w, ROLE_DOWN, l, -1, &v.dense, NULL, &e));
    }
    MUST(w4_dir_commit(&w, &e));
    MUST(weights_open(&got, out_path, &e));
    MUST(weights_linear(got, ROLE_DOWN, 1, -1, &back, &e));
    ck_assert(!back.w4);
    for (int64_t i = 0; i < tensor_count(&v.dense); i++)
        ck_assert_uint_eq(((uint16_t *)back.dense.data)[i],
                          f32_to_f16(bf16_to_f32(((uint16_t *)v.dense.data)[i])));
    weights_close(&got);
    MUST(w4_dir_bytes(&bytes, &tensors, weights_desc(dense), &o, &e));
    MUST(w4_dir_bytes(&fewer, &tensors, weights_desc(dense), &plain, &e));
    ck_assert_uint_gt(bytes, fewer);
    close_model();
}
END_TEST

START_TEST(incomplete)
{
    err e;
    open_model(tiny_llama());
    ck_assert_int_eq(write_all(&plain, ROLE_UP, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "up_proj.qweight") != NULL, "%s", e.msg);
    ck_assert(!file_exists(out_path));
    ck_assert_int_eq(write_all(&plain, ROLE_EMBED, &e), E_INPUT);
    close_model();
}
END_TEST

START_TEST(values)
{
    w4_dir_writer *w;
    float norm[256];
    err e = {0};
    tensor t = tensor_1d(norm, DT_F32, 256);
    w4_dir_opts o = plain;
    open_model(tiny_llama());
    for (int i = 0; i < 256; i++) norm[i] = 1;

    norm[3] = 0.0f / 0.0f * 1.0f;
    MUST(w4_dir_open(&w, out_path, dense, &o, NULL, &e));
    ck_assert_int_eq(w4_dir_tensor(w, ROLE_ATTN_NORM, 0, &t, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layers.0.input_layernorm.weight") &&
                      strstr(e.msg, "element 3 is NaN"),
                  "%s", e.msg);
    norm[3] = 1e30f * 1e30f;
    ck_assert_int_eq(w4_dir_tensor(w, ROLE_ATTN_NORM, 1, &t, &e), E_INPUT);
    norm[3] = 70000;
    norm[200] = -80000;
    ck_assert_int_eq(w4_dir_tensor(w, ROLE_FFN_NORM, 0, &t, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "2 values") && strstr(e.msg, "80000"), "%s", e.msg);
    w4_dir_abort(&w);
    ck_assert(!file_exists(out_path));

    o.clamp_f16 = true;
    MUST(w4_dir_open(&w, out_path, dense, &o, NULL, &e));
    MUST(w4_dir_tensor(w, ROLE_FFN_NORM, 0, &t, &e));
    t = tensor_1d(norm, DT_F32, 255);
    ck_assert_int_eq(w4_dir_tensor(w, ROLE_ATTN_NORM, 0, &t, &e), E_SHAPE);
    w4_dir_abort(&w);
    close_model();
}
END_TEST

START_TEST(refused)
{
    w4_dir_writer *w;
    linear_view v;
    w4_dir_opts o = plain;
    err e = {0};
    open_model(tiny_llama());
    o.group = 96; /* divides 384, not 256 */
    ck_assert_int_eq(w4_dir_open(&w, out_path, dense, &o, NULL, &e), E_SHAPE);
    ck_assert_msg(strstr(e.msg, "q_proj") != NULL, "%s", e.msg);
    ck_assert_ptr_null(w);

    MUST(w4_dir_open(&w, out_path, dense, &plain, NULL, &e));
    MUST(weights_linear(codes, ROLE_K, 0, -1, &v, &e));
    ck_assert_int_eq(w4_dir_linear(w, ROLE_Q, 0, -1, &v.q, &e), E_SHAPE);
    MUST(w4_dir_linear(w, ROLE_K, 0, -1, &v.q, &e));
    ck_assert_int_eq(w4_dir_linear(w, ROLE_K, 0, -1, &v.q, &e), E_SHAPE); /* twice */
    ((uint16_t *)v.q.scales.data)[1] = 0x7c00;
    ck_assert_int_eq(w4_dir_linear(w, ROLE_V, 0, -1, &v.q, &e), E_INPUT);
    ((uint8_t *)v.q.zeros.data)[0] = 16;
    ((uint16_t *)v.q.scales.data)[1] = 0x3c00;
    ck_assert_int_eq(w4_dir_linear(w, ROLE_V, 1, -1, &v.q, &e), E_UNSUPPORTED);
    w4_dir_abort(&w);
    close_model();
}
END_TEST

START_TEST(missing_bias)
{
    w4_dir_writer *w;
    linear_view v;
    err e;
    open_model(tiny_qwen2());
    MUST(w4_dir_open(&w, out_path, dense, &plain, NULL, &e));
    MUST(weights_linear(codes, ROLE_Q, 0, -1, &v, &e));
    v.q.bias.data = NULL;
    ck_assert_int_eq(w4_dir_linear(w, ROLE_Q, 0, -1, &v.q, &e), E_SHAPE);
    ck_assert_msg(strstr(e.msg, "q_proj.bias") != NULL, "%s", e.msg);
    w4_dir_abort(&w);
    close_model();
}
END_TEST

START_TEST(unwritable)
{
    err e;
    open_model(tiny_llama());
    /* root writes into any directory but this one */
    if (geteuid() == 0) (void)snprintf(out_path, sizeof out_path, "/proc/tmforge-awq");
    ck_assert_int_eq(chmod(root, 0555), 0);
    ck_assert_int_eq(write_all(&plain, ROLE_COUNT, &e), E_IO);
    ck_assert_int_eq(chmod(root, 0755), 0);
    close_model();
}
END_TEST

int main(void)
{
    (void)setenv("TMPDIR", "/dev/shm",
                 0); /* every file is synced: on a disk that is most of the time */
    Suite *s = suite_create("w4_dir");
    TCase *t = tcase_create("w4_dir");
    tcase_set_timeout(t, 600);
    tcase_add_loop_test(t, reads_back, 0, 3);
    tcase_add_test(t, side_files);
    tcase_add_test(t, shards);
    tcase_add_test(t, same_bytes);
    tcase_add_test(t, dense_role);
    tcase_add_test(t, incomplete);
    tcase_add_test(t, values);
    tcase_add_test(t, refused);
    tcase_add_test(t, missing_bias);
    tcase_add_test(t, unwritable);
    suite_add_tcase(s, t);
    return suite_run(s);
}
