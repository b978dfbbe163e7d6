/* formats/tm_store, tm_config, yaml and manifest: what LMDeploy and we write is read; what is
 * broken is refused with the place, the expected and the found. */
#include "formats/tm_store.h"

#include <check.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/convert.h"
#include "formats/yaml.h"
#include "support/alloc_fail.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)

/* ---- yaml ---- */

static cJSON *parse(const char *text)
{
    cJSON *o;
    err e;
    MUST(yaml_parse(&o, text, strlen(text), "t.yaml", &e));
    return o;
}

static void assert_refused(const char *text, const char *what)
{
    cJSON *o;
    err e = {0};
    ck_assert_msg(yaml_parse(&o, text, strlen(text), "t.yaml", &e) == E_INPUT, "accepted: %s",
                  text);
    ck_assert_msg(strstr(e.msg, what) && strstr(e.msg, "t.yaml"), "%s", e.msg);
    ck_assert_ptr_null(o);
}

START_TEST(yaml_scalars)
{
    static const char text[] =
        "a: 1\nb: -2.5e-05\nc: 1.0e+16\nd: yes\ne: 'yes'\nf: ~\ng: ''\nh: 010\ni: 1e3\n"
        "j: plain text here\nk: \"tab\\t\\u00e9\"\nl: +3\nm: .5\nn: 0x1f\no: Off\np:\n"
        "q: 1_000\nr: 12:30\n";
    static const struct {
        const char *key, *json;
    } want[] = {
        {"a", "1"},
        {"b", "-2.5e-05"},
        {"c", "1e+16"},
        {"d", "true"},
        {"e", "\"yes\""},
        {"f", "null"},
        {"g", "\"\""},
        {"h", "\"010\""},
        {"i", "1000"},
        {"j", "\"plain text here\""},
        {"k", "\"tab\\t\xc3\xa9\""},
        {"l", "3"},
        {"m", "0.5"},
        {"n", "\"0x1f\""},
        {"o", "false"},
        {"p", "null"},
        {"q", "\"1_000\""},
        {"r", "\"12:30\""},
    };
    cJSON *o = parse(text);
    for (size_t i = 0; i < sizeof want / sizeof *want; i++) {
        char *s;
        err e;
        MUST(json_print(&s, cJSON_GetObjectItemCaseSensitive(o, want[i].key), false, &e));
        ck_assert_str_eq(s, want[i].json);
        mem_free(s);
    }
    cJSON_Delete(o);
}
END_TEST

START_TEST(yaml_styles)
{
    static const char block[] = "# comment\na:\n  inter:\n  - 1\n  - 2\n  empty: []\nb: {}\n";
    static const char flow[] = "{a: {inter: [1, 2], empty: []}, b: {}}";
    cJSON *x = parse(block), *y = parse(flow);
    ck_assert(cJSON_Compare(x, y, true));
    cJSON_Delete(x);
    cJSON_Delete(y);
}
END_TEST

START_TEST(yaml_refused)
{
    assert_refused("a: &x 1\nb: 2\n", "anchors");
    assert_refused("a: {b: 1}\nc: *x\n", "");
    assert_refused("a: &x [1]\n", "anchors");
    assert_refused("a: !!python/object:os.system x\n", "tags");
    assert_refused("a: !!str 1\n", "tags");
    assert_refused("a: 1\na: 2\n", "line 2: key 'a' appears twice");
    assert_refused("a: 1\n---\nb: 2\n", "second document");
    assert_refused("? [1, 2]\n: 3\n", "key must be a string");
    assert_refused("<<: {a: 1}\n", "merge");
    assert_refused("a: .inf\n", "not finite");
    assert_refused("a: -.NaN\n", "not finite");
    assert_refused("a: 1e999\n", "too large");
    assert_refused("a: [1, 2\n", "line");
    assert_refused("a: 'x\n", "");
    assert_refused("", "no value");
    assert_refused("[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]", "deep");
    assert_refused("a: \"x\\0y\"\n", "zero byte");
    assert_refused("a: \xff\n", "UTF-8");
}
END_TEST

START_TEST(yaml_prints)
{
    static const float floats[] = {1e-5f, 1e-6f, 10000.0f, 1e6f,      0.0f,
                                   -1.0f, 32.0f, 1.5e-7f,  500000.0f, 2.5e20f};
    static const char *const text[] = {"1.0e-05", "1.0e-06", "10000.0", "1000000.0", "0.0",
                                       "-1.0",    "32.0",    "1.5e-07", "500000.0",  "2.5e+20"};
    for (size_t i = 0; i < sizeof floats / sizeof *floats; i++) {
        cJSON *f = yaml_float(floats[i]);
        ck_assert_str_eq(f->valuestring, text[i]);
        cJSON_Delete(f);
    }
    cJSON *o = cJSON_CreateObject();
    cJSON *m = cJSON_AddObjectToObject(o, "zeta");
    cJSON *l = cJSON_AddArrayToObject(m, "list");
    (void)cJSON_AddItemToArray(l, cJSON_CreateNumber(3));
    (void)cJSON_AddItemToArray(l, cJSON_CreateNumber(-4));
    (void)cJSON_AddArrayToObject(m, "empty");
    (void)cJSON_AddStringToObject(m, "blank", "");
    (void)cJSON_AddStringToObject(m, "word", "on");
    (void)cJSON_AddStringToObject(m, "quote", "it's: so");
    (void)cJSON_AddStringToObject(m, "line", "a\nb\xc3\xa9");
    (void)cJSON_AddTrueToObject(m, "yes");
    (void)cJSON_AddNullToObject(o, "alpha");
    char *s;
    err e;
    MUST(yaml_print(&s, o, &e));
    ck_assert_str_eq(
        s, "alpha: null\nzeta:\n  blank: ''\n  empty: []\n  line: \"a\\x0Ab\\xE9\"\n  list:\n"
           "  - 3\n  - -4\n  quote: 'it''s: so'\n  word: 'on'\n  'yes': true\n");
    cJSON *back = parse(s);
    ck_assert(cJSON_Compare(o, back, true));
    cJSON_Delete(back);
    cJSON_Delete(o);
    mem_free(s);
}
END_TEST

/* ---- config ---- */

/* The minimal example of the format description, flow style, as a workspace of LMDeploy may hold
 * it. */
static const char example[] = "attention_config: {cache_block_seq_len: 64, "
                              "max_position_embeddings: 4096, rope_theta: 10000.0, "
                              "rotary_embedding: 128}\n"
                              "lora_config: {lora_policy: ''}\n"
                              "model_config:\n"
                              "  {attn_bias: 0, chat_template: llama2, embedding_size: 32000, "
                              "end_id: 2, group_size: 128, head_num: 32, "
                              "hidden_units: 4096,\n"
                              "   inter_size: [11008, 11008], kv_head_num: 32, model_arch: "
                              "LlamaForCausalLM, model_format: awq, "
                              "model_name: m, norm_eps: 1.0e-05,\n"
                              "   num_layer: 2, session_len: 4096, size_per_head: 128, start_id: "
                              "1, tp: 1, vocab_size: 32000, "
                              "weight_type: int4}\n";

START_TEST(config_example)
{
    tm_config c;
    tm_file *f;
    size_t n;
    uint64_t qkv = 0, scales = 0, w2 = 0, embed = 0;
    err e;
    cJSON *o = parse(example);
    MUST(tm_config_read(&c, o, &e));
    cJSON_Delete(o);
    ck_assert_int_eq(c.epoch, TM_C2);
    ck_assert(c.m.layers == 2 && c.m.hidden == 4096 && c.m.ffn == 11008 && c.m.w4_group == 128);
    ck_assert(c.m.norm_eps == 1e-5f && c.start_id == 1 && c.end_id == 2 && c.session_len == 4096);
    ck_assert_str_eq(c.m.family, "llama");
    MUST(tm_config_files(&f, &n, &c, &e));
    for (size_t i = 0; i < n; i++) {
        if (strcmp(f[i].name, "layers.1.attention.w_qkv.0.qweight") == 0) qkv = f[i].bytes;
        if (strcmp(f[i].name, "layers.1.attention.w_qkv.0.scales") == 0) scales = f[i].bytes;
        if (strcmp(f[i].name, "layers.1.feed_forward.w2.0.qweight") == 0) w2 = f[i].bytes;
        if (strcmp(f[i].name, "tok_embeddings.0.weight") == 0) embed = f[i].bytes;
    }
    /* sizes of Llama-2-7B as published with the format */
    ck_assert_uint_eq(qkv, 25165824);
    ck_assert_uint_eq(scales, 786432);
    ck_assert_uint_eq(w2, 22544384);
    ck_assert_uint_eq(embed, 262144000);
    mem_free(f);
}
END_TEST

START_TEST(config_prints_and_reads)
{
    tm_config c, back;
    char *text;
    err e;
    cJSON *o = parse(example);
    MUST(tm_config_read(&c, o, &e));
    cJSON_Delete(o);
    c.m.scaling = (rope_scaling){.kind = (rope_kind)_i,
                                 .factor = 8,
                                 .low_freq_factor = 1.5f,
                                 .high_freq_factor = 4,
                                 .attention_factor = _i == ROPE_YARN ? 1.1f : -1,
                                 .beta_fast = 30,
                                 .beta_slow = 2,
                                 .original_max_positions = 8192};
    MUST(tm_config_print(&text, &c, &e));
    o = parse(text);
    MUST(tm_config_read(&back, o, &e));
    ck_assert_int_eq(back.m.scaling.kind, _i);
    if (_i != ROPE_NONE) ck_assert(back.m.scaling.factor == 8.0f);
    if (_i == ROPE_LLAMA3)
        ck_assert(back.m.scaling.low_freq_factor == 1.5f &&
                  back.m.scaling.high_freq_factor == 4.0f &&
                  back.m.scaling.original_max_positions == 8192);
    if (_i == ROPE_YARN)
        ck_assert(back.m.scaling.beta_fast == 30.0f && back.m.scaling.beta_slow == 2.0f &&
                  back.m.scaling.attention_factor == 1.1f);
    ck_assert_str_eq(back.chat_template, "llama2");
    ck_assert(back.m.ffn == 11008 && back.m.max_tokens == 4096 && back.m.rope_dims == 128);
    const cJSON *m = cJSON_GetObjectItemCaseSensitive(o, "model_config");
    ck_assert(cJSON_IsArray(cJSON_GetObjectItemCaseSensitive(m, "inter_size")));
    ck_assert(cJSON_IsArray(cJSON_GetObjectItemCaseSensitive(m, "expert_num")));
    cJSON_Delete(o);
    mem_free(text);
}
END_TEST

/* The example with `from` replaced. */
static void edited(char *buf, size_t cap, const char *from, const char *to)
{
    const char *at = strstr(example, from);
    ck_assert_ptr_nonnull(at);
    (void)snprintf(buf, cap, "%.*s%s%s", (int)(at - example), example, to, at + strlen(from));
}

static const struct {
    const char *from, *to;
    err_code code;
    const char *text;
} bad_configs[] = {
    {"head_num: 32,", "head_num: 0,", E_INPUT, "head_num"},
    {"head_num: 32,", "head_num: 2.5,", E_INPUT, "head_num"},
    {"head_num: 32,", "head_num: many,", E_INPUT, "head_num"},
    {"hidden_units: 4096", "hidden_units: 99999999", E_INPUT, "hidden_units"},
    {"kv_head_num: 32", "kv_head_num: 5", E_INPUT, "kv_heads"},
    {"num_layer: 2", "num_layer: 3", E_INPUT, "inter_size: expected 3 entries, got 2"},
    {"[11008, 11008]", "[11008, 256]", E_UNSUPPORTED, "different width"},
    {"[11008, 11008]", "[11008, x]", E_INPUT, "inter_size"},
    {"[11008, 11008]", "[]", E_INPUT, "inter_size"},
    {"weight_type: int4", "weight_type: int8", E_UNSUPPORTED, "weight_type"},
    {"weight_type: int4", "weight_typ: int4", E_INPUT, "weight_type"},
    {"group_size: 128", "group_size: 100", E_INPUT, "group_size"},
    {"LlamaForCausalLM", "NoSuchModel", E_UNSUPPORTED, "model_arch"},
    {"vocab_size: 32000", "vocab_size: 33000", E_INPUT, "embedding_size"},
    {"norm_eps: 1.0e-05", "norm_eps: 0", E_INPUT, "norm_eps"},
    {"norm_eps: 1.0e-05", "norm_eps: .nan", E_INPUT, "not finite"},
    {"rope_theta: 10000.0", "rope_theta: -1", E_INPUT, "rope_theta"},
    {"rotary_embedding: 128", "rotary_embedding: 128, use_logn_attn: 1", E_UNSUPPORTED, "logn"},
    {"rotary_embedding: 128", "rotary_embedding: 128, rope_scaling_type: zigzag", E_UNSUPPORTED,
     "zigzag"},
    {"lora_policy: ''", "lora_policy: plora", E_UNSUPPORTED, "plora"},
    {"tp: 1", "tp: 0", E_INPUT, "tp"},
    {"tp: 1", "expert_num: [0, 8], tp: 1", E_UNSUPPORTED, "expert"},
    {"tp: 1", "kv_lora_rank: 512, tp: 1", E_UNSUPPORTED, "kv_lora_rank"},
    {"tp: 1", "qk_norm: true, tp: 1", E_UNSUPPORTED, "qk_norm"},
    {"model_config:", "model_conf:", E_INPUT, "model_config"},
    {"attention_config:", "attention:", E_INPUT, "attention_config"},
};

START_TEST(config_refused)
{
    char text[2048];
    tm_config c;
    cJSON *o;
    err e = {0};
    edited(text, sizeof text, bad_configs[_i].from, bad_configs[_i].to);
    err_code rc = yaml_parse(&o, text, strlen(text), "config.yaml", &e);
    if (rc == OK) {
        rc = tm_config_read(&c, o, &e);
        cJSON_Delete(o);
    }
    ck_assert_msg(rc == bad_configs[_i].code, "%s -> %d %s", bad_configs[_i].to, rc, e.msg);
    ck_assert_msg(strstr(e.msg, bad_configs[_i].text) != NULL, "%s", e.msg);
}
END_TEST

/* inter_size as a number: v0.6.0 .. v0.6.3. */
START_TEST(config_c1)
{
    char text[2048];
    tm_config c;
    err e;
    edited(text, sizeof text, "[11008, 11008]", "11008");
    cJSON *o = parse(text);
    MUST(tm_config_read(&c, o, &e));
    ck_assert_int_eq(c.epoch, TM_C1);
    ck_assert_int_eq(c.m.ffn, 11008);
    cJSON_Delete(o);
}
END_TEST

/* ---- a workspace ---- */

static char root[256], dense[300], awq[300], ws[300], weights[400];

static void make_workspace(void)
{
    const model_desc m = tiny_llama();
    weight_src *src;
    convert *c;
    err e;
    tempdir_make(root, sizeof root);
    (void)snprintf(dense, sizeof dense, "%s/dense", root);
    (void)snprintf(awq, sizeof awq, "%s/awq", root);
    (void)snprintf(ws, sizeof ws, "%s/ws", root);
    (void)snprintf(weights, sizeof weights, "%s/%s", ws, TM_WEIGHTS_DIR);
    tiny_dir_make(dense, &m, 5);
    tiny_awq_make(awq, dense, &m, 5, 128);
    MUST(weights_open(&src, awq, &e));
    MUST(convert_open(&c, src, &(convert_opts){0}, NULL, &e));
    MUST(convert_write(c, ws, false, &e));
    convert_close(&c);
    weights_close(&src);
}

static void remove_in(const char *dir, const char *name)
{
    char path[600];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_int_eq(unlink(path), 0);
}

static void cut(const char *dir, const char *name, long bytes)
{
    char path[600];
    struct stat st;
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_int_eq(truncate(path, st.st_size + bytes), 0);
}

static void assert_open_fails(err_code code, const char *text)
{
    weight_src *s;
    err e = {0};
    const err_code rc = weights_open(&s, ws, &e);
    ck_assert_msg(rc == code, "%d: %s", rc, e.msg);
    ck_assert_msg(strstr(e.msg, text) != NULL, "%s", e.msg);
    ck_assert_ptr_null(s);
}

static void assert_opens(void)
{
    weight_src *s;
    err e;
    MUST(weights_open(&s, ws, &e));
    weights_close(&s);
}

static void edit_config(const char *from, const char *to)
{
    char path[600], *text, *out;
    size_t n;
    err e;
    (void)snprintf(path, sizeof path, "%s/config.yaml", weights);
    MUST(file_read(&text, &n, path, 1 << 20, &e));
    const char *at = strstr(text, from);
    ck_assert_ptr_nonnull(at);
    out = malloc(n + strlen(to) + 1);
    ck_assert_ptr_nonnull(out);
    (void)sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    tiny_file_write(weights, "config.yaml", out);
    free(out);
    mem_free(text);
}

START_TEST(truncated_files)
{
    static const char *const names[] = {"layers.0.attention.w_qkv.0.qweight",
                                        "layers.1.feed_forward.w3.0.zeros", "norm.weight",
                                        "output.0.weight"};
    make_workspace();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        assert_opens();
        cut(weights, names[i], -2);
        assert_open_fails(E_INPUT, names[i]);
        cut(weights, names[i], 4);
        assert_open_fails(E_INPUT, "found");
        cut(weights, names[i], -2);
    }
    tempdir_drop(root);
}
END_TEST

START_TEST(missing_files)
{
    static const char *const names[] = {"layers.1.attention.wo.0.scales",
                                        "tok_embeddings.0.weight"};
    make_workspace();
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        remove_in(weights, names[i]);
        assert_open_fails(E_INPUT, "found no file");
        tempdir_drop(root);
        make_workspace();
    }
    remove_in(weights, "config.yaml");
    assert_open_fails(E_INPUT, "config.yaml: no such file");
    tiny_file_write(weights, "config.ini", "[llama]\n");
    assert_open_fails(E_UNSUPPORTED, "v0.5.3");
    tempdir_drop(root);
}
END_TEST

static const struct {
    const char *from, *to;
    err_code code;
    const char *text;
} lies[] = {
    {"num_layer: 2", "num_layer: 1", E_INPUT, "inter_size"},
    {"- 384\n  - 384", "- 512\n  - 512", E_INPUT, "expected"},
    {"head_num: 4", "head_num: 8", E_INPUT, "expected"},
    {"weight_type: int4", "weight_type: float16", E_INPUT, "found no file"},
    {"group_size: 128", "group_size: 64", E_INPUT, "expected"},
    {"attn_bias: 0", "attn_bias: 1", E_INPUT, "bias"},
    {"rope_theta: 10000.0", "rope_theta: 20000.0", E_INPUT,
     "rope_theta is 20000 in config.yaml but 10000"},
    {"norm_eps: 1.0e-05", "norm_eps: 1.0e-03", E_INPUT, "norm_eps"},
    {"tp: 1", "tp: 2", E_UNSUPPORTED, "split for tp 2"},
    {"session_len: 256", "session_len: 128", E_CHECK, "delete manifest.json"},
    {"model_name: ", "model_name: *x #", E_INPUT, "line"},
};

START_TEST(lying_config)
{
    make_workspace();
    edit_config(lies[_i].from, lies[_i].to);
    assert_open_fails(lies[_i].code, lies[_i].text);
    tempdir_drop(root);
}
END_TEST

/* A workspace that LMDeploy made has no manifest, and keeps its tokenizer in one of two places. */
START_TEST(without_manifest)
{
    weight_src *a, *b;
    char dir[4096], path[600];
    err e;
    make_workspace();
    MUST(weights_open(&a, ws, &e));
    remove_in(ws, MANIFEST_NAME);
    edit_config("session_len: 256", "session_len: 128");
    MUST(weights_open(&b, ws, &e));
    ck_assert_str_ne(weights_digest(a), weights_digest(b));
    ck_assert_uint_eq(strlen(weights_digest(b)), 64);
    weights_close(&a);
    weights_close(&b);
    MUST(tm_store_tokenizer_dir(dir, sizeof dir, ws, &e));
    ck_assert_ptr_nonnull(strstr(dir, TM_TOKENIZER_DIR));
    (void)snprintf(path, sizeof path, "%s/%s", ws, TM_TOKENIZER_DIR);
    MUST(dir_remove_tree(path, &e));
    MUST(tm_store_tokenizer_dir(dir, sizeof dir, ws, &e));
    ck_assert_str_eq(dir, ws);
    assert_opens();
    remove_in(ws, "config.json"); /* the yaml alone */
    assert_opens();
    tempdir_drop(root);
}
END_TEST

/* ---- manifest ---- */

static void flip(const char *dir, const char *name, long at)
{
    char path[600];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "r+b");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_eq(fseek(f, at, SEEK_SET), 0);
    const int c = fgetc(f);
    ck_assert_int_eq(fseek(f, at, SEEK_SET), 0);
    (void)fputc(c ^ 4, f);
    ck_assert_int_eq(fclose(f), 0);
}

static void assert_verify(err_code code, const char *text)
{
    manifest m;
    err e = {0};
    err_code rc = manifest_read(&m, ws, &e);
    if (rc == OK) rc = manifest_verify(&m, ws, NULL, &e);
    manifest_free(&m);
    ck_assert_msg(rc == code, "%d: %s", rc, e.msg);
    if (code != OK) ck_assert_msg(strstr(e.msg, text) != NULL, "%s", e.msg);
}

START_TEST(digests)
{
    make_workspace();
    assert_verify(OK, "");
    flip(weights, "layers.0.feed_forward.w1.0.qweight", 100);
    assert_opens(); /* contents are verified on demand */
    assert_verify(E_CHECK, "layers.0.feed_forward.w1.0.qweight: expected xxh3-128");
    flip(weights, "layers.0.feed_forward.w1.0.qweight", 100);
    flip(ws, "generation_config.json", 3);
    assert_verify(E_CHECK, "generation_config.json");
    flip(ws, "generation_config.json", 3);
    cut(ws, "tokenizer_config.json", 1);
    assert_verify(E_CHECK, "expected 20 bytes, found 21");
    remove_in(ws, "tokenizer_config.json");
    assert_verify(E_CHECK, "found no file");
    tempdir_drop(root);
}
END_TEST

static void rewrite_manifest(const char *from, const char *to)
{
    char path[600], *text, *out;
    size_t n;
    err e;
    (void)snprintf(path, sizeof path, "%s/%s", ws, MANIFEST_NAME);
    MUST(file_read(&text, &n, path, 1 << 24, &e));
    const char *at = strstr(text, from);
    ck_assert_ptr_nonnull(at);
    out = malloc(n + strlen(to) + 1);
    ck_assert_ptr_nonnull(out);
    (void)sprintf(out, "%.*s%s%s", (int)(at - text), text, to, at + strlen(from));
    tiny_file_write(ws, MANIFEST_NAME, out);
    free(out);
    mem_free(text);
}

static const struct {
    const char *from, *to;
    err_code code;
    const char *text;
} forged[] = {
    {"norm.weight", "norn.weight", E_CHECK, "sha256: expected"},
    {"\"version\":", "\"versiom\":", E_INPUT, "version"},
    {"tmforge-manifest", "other-manifest", E_INPUT, "format"},
    {"{", "[", E_INPUT, "manifest.json"},
    {"\"sha256\":", "\"sha257\":", E_INPUT, "sha256"},
    {"turbomind-workspace", "turbomind-workspacf", E_CHECK, "sha256"},
};

START_TEST(forged_manifest)
{
    make_workspace();
    rewrite_manifest(forged[_i].from, forged[_i].to);
    assert_verify(forged[_i].code, forged[_i].text);
    assert_open_fails(forged[_i].code, forged[_i].text);
    tempdir_drop(root);
}
END_TEST

/* Well closed, but wrong in itself. */
static void assert_written_refused(const char *kind, const char *name, err_code code,
                                   const char *text)
{
    manifest m;
    err e = {0};
    hash128 d = hash_xxh128("x", 1);
    MUST(manifest_init(&m, kind, "", "", &e));
    MUST(manifest_add(&m, name, 1, &d, &e));
    MUST(manifest_write(&m, ws, &e));
    manifest_free(&m);
    assert_open_fails(code, text);
}

START_TEST(wrong_manifest)
{
    make_workspace();
    assert_written_refused(MANIFEST_KIND_TM, "../etc/passwd", E_INPUT, "leaves the directory");
    assert_written_refused(MANIFEST_KIND_TM, "/etc/passwd", E_INPUT, "leaves the directory");
    assert_written_refused(MANIFEST_KIND_TM, "a//b", E_INPUT, "leaves the directory");
    assert_written_refused(MANIFEST_KIND_AWQ, "norm.weight", E_INPUT,
                           "expected kind 'turbomind-workspace'");
    assert_written_refused(MANIFEST_KIND_TM, "other", E_CHECK, "is not in the manifest");
    rewrite_manifest("\"version\":\t1", "\"version\":\t2");
    assert_open_fails(E_UNSUPPORTED, "version: expected 1, got 2");
    tempdir_drop(root);
}
END_TEST

/* ---- output that cannot be written ---- */

static err_code convert_to(const char *path, err *e)
{
    weight_src *src;
    convert *c;
    TRY(weights_open(&src, awq, e));
    err_code rc = convert_open(&c, src, &(convert_opts){0}, NULL, e);
    if (rc == OK) rc = convert_write(c, path, false, e);
    convert_close(&c);
    weights_close(&src);
    return rc;
}

START_TEST(unwritable)
{
    char path[600];
    err e = {0};
    make_workspace();
    ck_assert_int_eq(convert_to("/proc/tmforge-ws", &e), E_IO);
    tiny_file_write(root, "file", "x");
    (void)snprintf(path, sizeof path, "%s/file/ws", root);
    ck_assert_int_eq(convert_to(path, &e), E_IO);
    (void)snprintf(path, sizeof path, "%s/none/ws", root);
    ck_assert_int_eq(convert_to(path, &e), E_IO);
    tempdir_drop(root);
}
END_TEST

START_TEST(disk_full)
{
    char mnt[600], path[700];
    err e = {0};
    make_workspace();
    (void)snprintf(mnt, sizeof mnt, "%s/small", root);
    ck_assert_int_eq(mkdir(mnt, 0755), 0);
    if (mount("tmpfs", mnt, "tmpfs", 0, "size=128k") != 0) {
        printf("SKIP disk full: cannot mount a small file system (%s)\n", strerror(errno));
        tempdir_drop(root);
        return;
    }
    (void)snprintf(path, sizeof path, "%s/ws", mnt);
    const err_code rc = convert_to(path, &e);
    const bool there = file_exists(path);
    dir_list left;
    err e2;
    MUST(dir_list_open(&left, mnt, &e2));
    ck_assert_int_eq(umount(mnt), 0);
    ck_assert_msg(rc == E_IO && strstr(e.msg, "No space left") != NULL, "%d: %s", rc, e.msg);
    ck_assert(!there);
    ck_assert_uint_eq(left.n, 0);
    dir_list_free(&left);
    tempdir_drop(root);
}
END_TEST

/* ---- memory: every allocation fails once ---- */

START_TEST(reading_out_of_memory)
{
    long k = 0;
    make_workspace();
    for (bool again = true; again; k++) {
        weight_src *s;
        linear_view v;
        err e = {0};
        alloc_fail_at(k + 1);
        err_code rc = weights_open(&s, ws, &e);
        if (rc == OK) rc = weights_linear(s, ROLE_QKV, 0, -1, &v, &e);
        again = alloc_failed();
        alloc_fail_at(0);
        ck_assert_msg(rc == (again ? E_NOMEM : OK), "%ld: %s", k, e.msg);
        weights_close(&s);
    }
    ck_assert_int_gt(k, 20);
    tempdir_drop(root);
}
END_TEST

START_TEST(writing_out_of_memory)
{
    char path[600];
    long k = 0;
    make_workspace();
    (void)snprintf(path, sizeof path, "%s/again", root);
    for (bool again = true; again; k++) {
        err e = {0};
        alloc_fail_at(k + 1);
        const err_code rc = convert_to(path, &e);
        again = alloc_failed();
        alloc_fail_at(0);
        /* a source whose manifest cannot be read for lack of memory is named by its content instead
         */
        ck_assert_msg(rc == E_NOMEM || rc == OK, "%ld: %s", k, e.msg);
        ck_assert(again || rc == OK);
        ck_assert_int_eq(file_exists(path), rc == OK);
        ck_assert_int_eq(dir_remove_tree(path, &e), OK);
    }
    ck_assert_int_gt(k, 60);
    tempdir_drop(root);
}
END_TEST

#define COUNT(a) ((int)(sizeof(a) / sizeof *(a)))

int main(void)
{
    (void)setenv("TMPDIR", "/dev/shm",
                 0); /* every file is synced: on a disk that is most of the time */
    Suite *s = suite_create("tm_store");
    TCase *t = tcase_create("tm_store");
    tcase_set_timeout(t, 600);
    tcase_add_test(t, yaml_scalars);
    tcase_add_test(t, yaml_styles);
    tcase_add_test(t, yaml_refused);
    tcase_add_test(t, yaml_prints);
    tcase_add_test(t, config_example);
    tcase_add_loop_test(t, config_prints_and_reads, ROPE_NONE, ROPE_YARN + 1);
    tcase_add_loop_test(t, config_refused, 0, COUNT(bad_configs));
    tcase_add_test(t, config_c1);
    tcase_add_test(t, truncated_files);
    tcase_add_test(t, missing_files);
    tcase_add_loop_test(t, lying_config, 0, COUNT(lies));
    tcase_add_test(t, without_manifest);
    tcase_add_test(t, digests);
    tcase_add_loop_test(t, forged_manifest, 0, COUNT(forged));
    tcase_add_test(t, wrong_manifest);
    tcase_add_test(t, unwritable);
    tcase_add_test(t, disk_full);
    tcase_add_test(t, reading_out_of_memory);
    tcase_add_test(t, writing_out_of_memory);
    suite_add_tcase(s, t);
    return suite_run(s);
}
