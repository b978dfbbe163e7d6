/* formats/info: what is said of every kind of path, and that verification finds a changed byte. */
#include "formats/info.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/artifact.h"
#include "formats/convert.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)

static char root[256], dense[300], awq[300], ws[300];

static void make_all(int32_t tp)
{
    const model_desc m = tiny_llama();
    weight_src *src;
    convert *c;
    err e;
    tempdir_make(root, sizeof root);
    (void)snprintf(dense, sizeof dense, "%s/dense", root);
    (void)snprintf(awq, sizeof awq, "%s/awq", root);
    (void)snprintf(ws, sizeof ws, "%s/ws", root);
    tiny_dir_make(dense, &m, 5);
    tiny_awq_make(awq, dense, &m, 5, 128);
    MUST(weights_open(&src, awq, &e));
    MUST(convert_open(&c, src, &(convert_opts){.tp = tp}, NULL, &e));
    MUST(convert_write(c, ws, false, &e));
    convert_close(&c);
    weights_close(&src);
}

static cJSON *read_info(const char *path)
{
    cJSON *o;
    err e;
    MUST(info_read(&o, path, true, NULL, &e));
    return o;
}

/* "bytes.total" */
static const cJSON *at(const cJSON *o, const char *key)
{
    char part[64];
    for (const char *p = key; *p;) {
        const size_t n = strcspn(p, ".");
        (void)snprintf(part, sizeof part, "%.*s", (int)n, p);
        o = cJSON_GetObjectItemCaseSensitive(o, part);
        ck_assert_msg(o != NULL, "no %s", key);
        p += n + (p[n] == '.');
    }
    return o;
}
static double num(const cJSON *o, const char *key) { return at(o, key)->valuedouble; }
static const char *str(const cJSON *o, const char *key) { return at(o, key)->valuestring; }

START_TEST(directories)
{
    make_all(1);
    cJSON *h = read_info(dense), *a = read_info(awq), *w = read_info(ws);
    ck_assert_str_eq(str(h, "kind"), "hf");
    ck_assert_str_eq(str(a, "kind"), "awq");
    ck_assert_str_eq(str(w, "kind"), "workspace");
    /* 2 layers of (q 256x256, k and v 128x256, o 256x256, 3 x 384x256, two norms), embedding and
     * head 50x256 */
    const double attention = 2.0 * (2 * 256 * 256 + 2 * 128 * 256), ffn = 2.0 * 3 * 384 * 256;
    const double params = attention + ffn + 2 * 2 * 256 + 256 + 2 * 50 * 256;
    ck_assert(num(h, "parameters") == params && num(w, "parameters") == params);
    ck_assert(num(h, "bytes.attention") == 2 * attention && num(h, "bytes.ffn") == 2 * ffn);
    ck_assert(num(h, "bytes.total") == 2 * params);
    /* codes, and per group of 128 one scale of 2 bytes and one zero: half a byte packed, 2 bytes as
     * f16 */
    ck_assert(num(a, "bytes.ffn") == ffn / 2 + ffn / 128 * 2.5);
    ck_assert(num(w, "bytes.ffn") == ffn / 2 + ffn / 128 * 4);
    ck_assert(num(w, "bytes.head") == 50 * 256 * 2 && num(w, "model.w4_group") == 128);
    ck_assert(num(h, "model.w4_group") == 0 && num(h, "model.layers") == 2);
    ck_assert(num(w, "model.norm_eps") == 1e-5);
    ck_assert_str_eq(str(h, "model.dtype"), "BF16");
    ck_assert_str_eq(str(w, "workspace.lmdeploy"), "v0.6.4 .. v0.7.3");
    ck_assert_str_eq(str(w, "manifest.parent"), str(a, "digest"));
    ck_assert_str_eq(str(w, "digest"), str(w, "manifest.sha256"));
    ck_assert(cJSON_IsTrue(at(w, "manifest.verified")) && cJSON_IsTrue(at(a, "manifest.verified")));
    ck_assert_ptr_null(cJSON_GetObjectItemCaseSensitive(h, "manifest"));
    ck_assert_ptr_nonnull(at(h, "tokenizer.error")); /* the tiny one has none */
    cJSON_Delete(h);
    cJSON_Delete(a);
    cJSON_Delete(w);
    tempdir_drop(root);
}
END_TEST

START_TEST(split_workspace)
{
    make_all(2);
    cJSON *w = read_info(ws);
    ck_assert_str_eq(str(w, "kind"), "workspace");
    ck_assert(num(w, "workspace.tp") == 2 && num(w, "model.ffn") == 512);
    cJSON_Delete(w);
    tempdir_drop(root);
}
END_TEST

static void flip(const char *path)
{
    FILE *f = fopen(path, "r+b");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(fseek(f, -5, SEEK_END), 0);
    const int c = fgetc(f);
    ck_assert_int_eq(fseek(f, -5, SEEK_END), 0);
    (void)fputc(c ^ 1, f);
    (void)fclose(f);
}

static void assert_found(const char *path, err_code code, const char *text)
{
    cJSON *o;
    err e = {0};
    ck_assert_int_eq(info_read(&o, path, true, NULL, &e), code);
    ck_assert_msg(strstr(e.msg, text) && strstr(e.msg, "expected") && strstr(e.msg, "found"), "%s",
                  e.msg);
    ck_assert_ptr_null(o);
    MUST(info_read(&o, path, false, NULL, &e)); /* unless it is not to look */
    cJSON_Delete(o);
}

START_TEST(changed_byte)
{
    char path[600];
    make_all(1);
    (void)snprintf(path, sizeof path, "%s/triton_models/weights/layers.1.feed_forward.w2.0.qweight",
                   ws);
    flip(path);
    assert_found(ws, E_CHECK, "w2.0.qweight");
    (void)snprintf(path, sizeof path, "%s/model.safetensors", awq);
    flip(path);
    assert_found(awq, E_CHECK, "model.safetensors");
    tempdir_drop(root);
}
END_TEST

START_TEST(artifacts)
{
    static const char *const meta[] = {"layers", "2", "parent.model", "abc", "method", "rtn", NULL};
    static int32_t tokens[6] = {1, 2, 3, 4, 5, 6};
    artifact_part part = {.name = "tokens", .t = tensor_2d(tokens, DT_I32, 2, 3)};
    char path[600];
    cJSON *o;
    err e = {0};
    tempdir_make(root, sizeof root);
    (void)snprintf(path, sizeof path, "%s/calib", root);
    MUST(artifact_write(path, "calib", 1, meta, &part, 1, false, &e));
    o = read_info(path);
    ck_assert_str_eq(str(o, "kind"), "calib");
    ck_assert_str_eq(at(o, "metadata")->child->string, "tool");
    ck_assert(num(o, "samples") == 2 && num(o, "seqlen") == 3 && num(o, "bytes.total") == 24);
    cJSON_Delete(o);
    flip(path);
    assert_found(path, E_INPUT, "tokens");
    (void)snprintf(path, sizeof path, "%s/other", root);
    MUST(artifact_write(path, "song", 1, meta, &part, 1, false, &e));
    ck_assert_int_eq(info_read(&o, path, true, NULL, &e), E_INPUT);
    ck_assert_int_eq(info_read(&o, root, true, NULL, &e), E_INPUT); /* no model in it */
    (void)snprintf(path, sizeof path, "%s/none", root);
    ck_assert_int_eq(info_read(&o, path, true, NULL, &e), E_IO);
    tempdir_drop(root);
}
END_TEST

START_TEST(text)
{
    char *s;
    err e;
    make_all(1);
    cJSON *w = read_info(ws);
    MUST(info_text(&s, w, &e));
    ck_assert_msg(strstr(s, "kind                      workspace\n") != NULL, "%s", s);
    ck_assert_ptr_nonnull(strstr(s, "\nmodel.stop_ids            [2,7]\n"));
    ck_assert_ptr_nonnull(strstr(s, "\nmanifest.verified         true\n"));
    mem_free(s);
    cJSON_Delete(w);
    tempdir_drop(root);
}
END_TEST

int main(void)
{
    (void)setenv("TMPDIR", "/dev/shm",
                 0); /* every file is synced: on a disk that is most of the time */
    Suite *s = suite_create("info");
    TCase *t = tcase_create("info");
    tcase_set_timeout(t, 600);
    tcase_add_test(t, directories);
    tcase_add_test(t, split_workspace);
    tcase_add_test(t, changed_byte);
    tcase_add_test(t, artifacts);
    tcase_add_test(t, text);
    suite_add_tcase(s, t);
    return suite_run(s);
}
