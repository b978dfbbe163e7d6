/* formats/hf_dir, hf_shards: directories as they are found in the wild, and each way in which they
 * can be wrong: files, index, names, shapes, dtypes, biases. */
#include "formats/hf_dir.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/hf_shards.h"
#include "support/hf_case.h"
#include "support/tiny_dir.h"

/* ---- what is right ---- */
START_TEST(hf_real_models)
{
    static const struct {
        const char *path, *family;
        src_kind kind;
        int32_t layers, hidden, stops;
        dtype dt;
    } cases[] = {
        {"/models/demo", "internlm2", SRC_HF, 8, 256, 2, DT_BF16},
        {"/models/base", "internlm2", SRC_HF, 8, 512, 2, DT_BF16},
        {"/models/qwen", "qwen2", SRC_HF, 8, 512, 2, DT_BF16},
        {"/data/models/stories260K/hf", "llama", SRC_HF, 5, 64, 1, DT_F32},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char path[4096];
        weight_src *s;
        tensor v;
        (void)snprintf(path, sizeof path, TMF_SHARED_DIR "%s", cases[i].path);
        if (!file_is_dir(path)) {
            printf("SKIP hf_real_models: %s is not there\n", path);
            continue;
        }
        ck_assert_msg(weights_open(&s, path, &hf_err) == OK, "%s", hf_err.msg);
        const model_desc *m = weights_desc(s);
        ck_assert_int_eq((int)weights_kind(s), (int)cases[i].kind);
        ck_assert_str_eq(m->family, cases[i].family);
        ck_assert_str_eq(weights_path(s), path);
        ck_assert_str_eq(weights_tokenizer_dir(s), path);
        ck_assert_int_eq(m->layers, cases[i].layers);
        ck_assert_int_eq(m->hidden, cases[i].hidden);
        ck_assert_int_eq((int)m->dt, (int)cases[i].dt);
        ck_assert_int_eq(m->w4_group, 0);
        ck_assert(m->n_stop >= cases[i].stops);
        ck_assert_uint_eq(strlen(weights_digest(s)), 64);
        ck_assert(weights_tensor(s, ROLE_HEAD, -1, &v, &hf_err) == OK);
        ck_assert_int_eq(v.shape[0], m->vocab);
        ck_assert_msg(weights_check_finite(s, NULL, &hf_err) == OK, "%s", hf_err.msg);
        weights_close(&s);
    }
}
END_TEST

/* Every view of every layer holds the bytes of the file's tensor of that name. */
static void check_views(weight_src *s, const st_file *f)
{
    const model_desc *m = weights_desc(s);
    tensor_role r[7];
    const int n = model_block_linears(m, r);
    for (int32_t layer = 0; layer < m->layers; layer++) {
        weights_prefetch(s, layer + 1);
        for (int i = 0; i < n; i++) {
            static const char *const names[] = {
                [ROLE_Q] = "self_attn.q_proj", [ROLE_K] = "self_attn.k_proj",
                [ROLE_V] = "self_attn.v_proj", [ROLE_O] = "self_attn.o_proj",
                [ROLE_GATE] = "mlp.gate_proj", [ROLE_UP] = "mlp.up_proj",
                [ROLE_DOWN] = "mlp.down_proj"};
            char name[128];
            linear_view v;
            tensor t;
            (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, names[r[i]]);
            ck_assert(st_find(f, name, &t));
            ck_assert_msg(weights_linear(s, r[i], layer, -1, &v, &hf_err) == OK, "%s", hf_err.msg);
            ck_assert(!v.w4 && st_aligned(&v.dense) && weights_has(s, r[i], layer, -1));
            ck_assert_int_eq(v.dense.shape[0], model_linear_n(m, r[i]));
            ck_assert_int_eq(v.dense.shape[1], model_linear_k(m, r[i]));
            ck_assert_mem_eq(v.dense.data, t.data, tensor_bytes(&t));
        }
        weights_release(s, layer);
    }
    ck_assert(!weights_has(s, ROLE_QKV, 0, -1));
    ck_assert(!weights_has(s, ROLE_Q, m->layers, -1));
    ck_assert(weights_has(s, ROLE_HEAD, -1, -1));
}

START_TEST(hf_single_and_sharded)
{
    weight_src *s;
    st_file *f;
    char digest[65], *copy;
    size_t n;
    hf_llama();
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert(file_read(&copy, &n, hf_in("model.safetensors"), 1 << 24, &hf_err) == OK);
    ck_assert(st_open_memory(&f, copy, n, "copy", &hf_err) == OK);
    check_views(s, f);
    (void)snprintf(digest, sizeof digest, "%s", weights_digest(s));
    weights_close(&s);
    hf_split(3, true);
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    check_views(s, f);
    ck_assert_str_ne(weights_digest(s), digest);
    weights_close(&s);
    ck_assert_int_eq(unlink(hf_in("model.safetensors.index.json")), 0);
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s",
                  hf_err.msg); /* parts alone will do */
    check_views(s, f);
    weights_close(&s);
    st_close(&f);
    mem_free(copy);
}
END_TEST

static void flip(const char *name, uint64_t at)
{
    uint8_t byte;
    FILE *f = fopen(hf_in(name), "r+b");
    ck_assert_int_eq(fseek(f, (long)at, SEEK_SET), 0);
    ck_assert_uint_eq(fread(&byte, 1, 1, f), 1);
    byte ^= 1;
    ck_assert_int_eq(fseek(f, (long)at, SEEK_SET), 0);
    ck_assert_uint_eq(fwrite(&byte, 1, 1, f), 1);
    ck_assert_int_eq(fclose(f), 0);
}

START_TEST(hf_digest)
{
    char a[65], b[65];
    uint64_t size;
    hf_llama();
    hf_digest_of(a);
    hf_digest_of(b);
    ck_assert_str_eq(a, b);
    ck_assert(file_size(&size, hf_in("model.safetensors"), &hf_err) == OK);
    for (uint64_t i = 1; i < 8; i++) { /* any single weight of a small model */
        const uint64_t at = size - 1 - size / 9 * (i - 1);
        flip("model.safetensors", at);
        hf_digest_of(b);
        ck_assert_msg(strcmp(a, b) != 0, "change at byte %llu not seen", (unsigned long long)at);
        memcpy(a, b, sizeof a);
    }
    hf_edit("config.json", "\"vocab_size\"", " \"vocab_size\"");
    hf_digest_of(b);
    ck_assert_str_ne(a, b);
    /* the directory's name and other files do not count */
    tiny_file_write(hf_case_dir, "notes.txt", "x");
    hf_digest_of(a);
    ck_assert_str_eq(a, b);
}
END_TEST

/* Beyond HF_DIGEST_WHOLE only pieces count, as hf_shards.h says. The bulk is a hole of the file. */
START_TEST(hf_digest_of_a_large_model)
{
    char header[256], a[65], b[65];
    const uint64_t bytes = HF_DIGEST_WHOLE + 12345;
    hf_llama();
    const int n = snprintf(
        header + 8, sizeof header - 8,
        "{\"big\":{\"dtype\":\"U8\",\"shape\":[%llu],\"data_offsets\":[0,%llu]}}",
        (unsigned long long)bytes, (unsigned long long)bytes);
    for (int i = 0; i < 8; i++) header[i] = (char)((uint64_t)n >> (8 * i));
    FILE *f = fopen(hf_in("model-more.safetensors"), "wb");
    ck_assert_uint_eq(fwrite(header, 1, (size_t)n + 8, f), (size_t)n + 8);
    ck_assert_int_eq(fclose(f), 0);
    const uint64_t data = (uint64_t)n + 8;
    ck_assert_int_eq(truncate(hf_in("model-more.safetensors"), (off_t)(data + bytes)), 0);
    hf_digest_of(a);
    const uint64_t third = (bytes - HF_DIGEST_PIECE) / 3;
    const uint64_t seen[] = {0, HF_DIGEST_PIECE - 1, third, 2 * third + 17, bytes - 1};
    for (size_t i = 0; i < sizeof seen / sizeof seen[0]; i++) {
        flip("model-more.safetensors", data + seen[i]);
        hf_digest_of(b);
        ck_assert_msg(strcmp(a, b) != 0, "byte %llu", (unsigned long long)seen[i]);
        memcpy(a, b, sizeof a);
    }
    flip("model-more.safetensors", data + 100000); /* between the pieces */
    hf_digest_of(b);
    ck_assert_str_eq(a, b);
}
END_TEST

START_TEST(hf_tied_head)
{
    const model_desc m = tiny_qwen2();
    weight_src *s;
    tensor embed, head;
    linear_view v;
    tiny_dir_make(hf_case_dir, &m, 1);
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert(weights_tensor(s, ROLE_EMBED, -1, &embed, &hf_err) == OK);
    ck_assert(weights_tensor(s, ROLE_HEAD, -1, &head, &hf_err) == OK);
    ck_assert_ptr_eq(embed.data, head.data);
    ck_assert(weights_has(s, ROLE_HEAD, -1, -1));
    ck_assert(weights_linear(s, ROLE_K, 1, -1, &v, &hf_err) == OK);
    ck_assert_int_eq(v.bias.shape[0], model_linear_n(&m, ROLE_K));
    ck_assert(weights_linear(s, ROLE_O, 1, -1, &v, &hf_err) == OK);
    ck_assert_ptr_null(v.bias.data);
    weights_close(&s);
}
END_TEST

/* A header of odd length puts every tensor at an odd address: old writers did that. */
START_TEST(hf_unaligned_file)
{
    char *text, *moved;
    size_t n, head;
    st_file *f;
    weight_src *s;
    hf_llama();
    ck_assert(file_read(&text, &n, hf_in("model.safetensors"), 1 << 24, &hf_err) == OK);
    ck_assert(st_open_memory(&f, text, n, "copy", &hf_err) == OK);
    (void)st_head(f, &head);
    moved = malloc(n + 1);
    memcpy(moved, text, head);
    moved[head] = ' ';
    memcpy(moved + head + 1, text + head, n - head);
    for (int i = 0; i < 8; i++) moved[i] = (char)((head - 8 + 1) >> (8 * i));
    FILE *out = fopen(hf_in("model.safetensors"), "wb");
    ck_assert_uint_eq(fwrite(moved, 1, n + 1, out), n + 1);
    ck_assert_int_eq(fclose(out), 0);
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    check_views(s, f);
    linear_view a, b;
    ck_assert(weights_linear(s, ROLE_Q, 0, -1, &a, &hf_err) == OK);
    ck_assert(weights_linear(s, ROLE_Q, 0, -1, &b, &hf_err) == OK);
    ck_assert_ptr_eq(a.dense.data, b.dense.data); /* one copy */
    weights_close(&s);
    st_close(&f);
    free(moved);
    mem_free(text);
}
END_TEST

START_TEST(hf_stored_dtype_rules)
{
    weight_src *s;
    hf_llama();
    hf_edit("config.json", "bfloat16", "float32"); /* the config is wrong about it */
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert_int_eq((int)weights_desc(s)->dt, DT_BF16);
    weights_close(&s);
    /* one tensor of another float type is fine: views say what they are */
    const hf_change c = {HF_PUT, "model.norm.weight", DT_F32, 1, {256}, NULL};
    hf_rewrite(&c, 1);
    tensor v;
    ck_assert_msg(weights_open(&s, hf_case_dir, &hf_err) == OK, "%s", hf_err.msg);
    ck_assert(weights_tensor(s, ROLE_FINAL_NORM, -1, &v, &hf_err) == OK);
    ck_assert_int_eq((int)v.dt, DT_F32);
    weights_close(&s);
    /* tensors that nobody asks for are left alone */
    const hf_change more = {HF_PUT, "model.layers.0.self_attn.rotary_emb.inv_freq", DT_F32, 1, {32},
                            NULL};
    hf_rewrite(&more, 1);
    hf_opens();
}
END_TEST

/* ---- which path ---- */
START_TEST(hf_wrong_paths)
{
    weight_src *s;
    ck_assert_int_eq(weights_open(&s, "/nonexistent/model", &hf_err), E_IO);
    ck_assert_msg(strstr(hf_err.msg, "'/nonexistent/model'"), "%s", hf_err.msg);
    tiny_file_write(hf_case_dir, "file", "x");
    ck_assert_int_eq(weights_open(&s, hf_in("file"), &hf_err), E_INPUT);
    hf_refused(E_INPUT, "neither config.json");
    tiny_file_write(hf_case_dir, "config.json", "{}");
    hf_refused(E_INPUT, "architectures");
    tiny_file_write(hf_case_dir, "config.json", "{\"architectures\":[\"FalconForCausalLM\"]}");
    hf_refused(E_UNSUPPORTED, "'FalconForCausalLM' is not known; known are");
    tiny_file_write(hf_case_dir, "config.json", "");
    hf_refused(E_INPUT, "config.json");
    ck_assert_int_eq(unlink(hf_in("config.json")), 0);
    ck_assert(dir_make(hf_in("config.json"), &hf_err) == OK);
    hf_refused(E_INPUT, "config.json");
}
END_TEST

START_TEST(hf_bin_shards)
{
    hf_llama();
    ck_assert_int_eq(unlink(hf_in("model.safetensors")), 0);
    hf_refused(E_INPUT, "no safetensors file");
    tiny_file_write(hf_case_dir, "pytorch_model.bin.index.json", "{}");
    hf_refused(E_UNSUPPORTED, "'pytorch_model.bin.index.json'");
    tiny_file_write(hf_case_dir, "model.gguf", "x");
    hf_refused(E_UNSUPPORTED, "model.gguf'");
    tiny_file_write(hf_case_dir, "consolidated.00.pth", "x");
    hf_refused(E_UNSUPPORTED, "consolidated.00.pth'");
    tiny_file_write(hf_case_dir, "pytorch_model-00001-of-00002.bin", "x");
    hf_refused(E_UNSUPPORTED, "pytorch_model-00001-of-00002.bin'");
    tiny_file_write(hf_case_dir, "model.safetensors.index.json",
                    "{\"weight_map\":{\"a\":\"pytorch_model-00001-of-00002.bin\"}}");
    hf_refused(E_UNSUPPORTED, "pytorch_model-00001-of-00002.bin'");
}
END_TEST

/* ---- shards and index ---- */
START_TEST(hf_missing_shard)
{
    hf_llama();
    hf_split(3, true);
    ck_assert_int_eq(unlink(hf_in("model-00002-of-00003.safetensors")), 0);
    hf_refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(unlink(hf_in("model.safetensors.index.json")), 0);
    hf_refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(unlink(hf_in("model-00003-of-00003.safetensors")), 0);
    hf_refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(rename(hf_in("model-00001-of-00003.safetensors"),
                            hf_in("model-00002-of-00003.safetensors")),
                     0);
    hf_refused(E_INPUT, "shard 'model-00001-of-00003.safetensors' is missing");
}
END_TEST

START_TEST(hf_extra_shard)
{
    hf_llama();
    hf_split(2, true);
    hf_copy("model-00001-of-00002.safetensors", "model-00001-of-00001.safetensors", 0, 1, NULL, 0);
    hf_refused(E_INPUT, "'model-00001-of-00001.safetensors' is there but");
    ck_assert_int_eq(rename(hf_in("model-00001-of-00001.safetensors"), hf_in("model.safetensors")),
                     0);
    hf_refused(E_INPUT, "'model.safetensors' is there but");
    ck_assert_int_eq(rename(hf_in("model.safetensors"), hf_in("model-00003-of-00003.safetensors")),
                     0);
    hf_refused(E_INPUT, "'model-00003-of-00003.safetensors' is there but");
    ck_assert_int_eq(unlink(hf_in("model.safetensors.index.json")), 0);
    hf_refused(E_INPUT, "is not one of 2 parts");
    ck_assert_int_eq(unlink(hf_in("model-00003-of-00003.safetensors")), 0);
    hf_opens();
    /* another kind of file is nobody's business */
    hf_copy("model-00001-of-00002.safetensors", "adapter.safetensors", 0, 1, NULL, 0);
    hf_opens();
}
END_TEST

START_TEST(hf_tensor_twice)
{
    const hf_change twice = {HF_PUT, "model.norm.weight", DT_BF16, 1, {256}, NULL};
    hf_llama();
    hf_split(3, true);
    for (int p = 0; p < 3; p++) {
        char name[64];
        hf_part_name(name, sizeof name, p, 3);
        hf_copy(name, name, 0, 1, &twice, 1);
    }
    hf_refused(E_INPUT,
               "tensor 'model.norm.weight' is in 'model-00001-of-00003.safetensors' and in");
    ck_assert_int_eq(unlink(hf_in("model.safetensors.index.json")), 0);
    hf_refused(E_INPUT, "tensor 'model.norm.weight' is in");
    hf_teardown();
    hf_setup();
    hf_llama();
    hf_split(2, true);
    hf_edit("model.safetensors.index.json", "\"weight_map\":",
            "\"weight_map\":{\"x\":\"model-00001-of-00002.safetensors\"},\"weight_map\":");
    hf_refused(E_INPUT, "duplicate key");
    hf_teardown();
    hf_setup();
    hf_llama();
    hf_split(2, true);
    hf_edit("model.safetensors.index.json", "\"weight_map\":\t{",
            "\"weight_map\":{\"model.norm.weight\":\"model-00001-of-00002.safetensors\",");
    hf_refused(E_INPUT, "model.norm.weight");
}
END_TEST

START_TEST(hf_index_outside)
{
    static const char *const bad[] = {
        "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", ""};
    char text[256];
    hf_llama();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        (void)snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"%s\"}}", bad[i]);
        tiny_file_write(hf_case_dir, "model.safetensors.index.json", text);
        hf_refused(E_INPUT, "is not a plain name in this directory");
    }
    static const char *const shapes[] = {"{}",
                                         "[]",
                                         "{\"weight_map\":[]}",
                                         "{\"weight_map\":{}}",
                                         "{\"weight_map\":{\"a\":5}}",
                                         "{\"weight_map\":{\"a\":null}}",
                                         "{",
                                         ""};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        tiny_file_write(hf_case_dir, "model.safetensors.index.json", shapes[i]);
        hf_refused(E_INPUT, "model.safetensors.index.json");
    }
}
END_TEST

START_TEST(hf_index_that_lies)
{
    hf_llama();
    tiny_file_write(hf_case_dir, "model.safetensors.index.json",
                    "{\"weight_map\":{\"no.such.tensor\":\"model.safetensors\"}}");
    hf_refused(E_INPUT, "tensor 'no.such.tensor' is missing");
    ck_assert_int_eq(unlink(hf_in("model.safetensors.index.json")), 0);
    hf_split(2, true);
    hf_edit("model.safetensors.index.json", "model-00001-of-00002", "model-00002-of-00002");
    hf_refused(E_INPUT, "says 'model-00002-of-00002.safetensors'");
    hf_edit("model.safetensors.index.json", "model-00002-of-00002", "model-00001-of-00002");
    hf_opens();
    /* a shard that is not what its name says */
    tiny_file_write(hf_case_dir, "model-00002-of-00002.safetensors", "hello");
    hf_refused(E_INPUT,
               "model-00002-of-00002.safetensors: a safetensors file has at least 8 bytes");
    ck_assert_int_eq(truncate(hf_in("model-00001-of-00002.safetensors"), 5000), 0);
    hf_refused(E_INPUT, "beyond the file's");
}
END_TEST

/* ---- tensors against the config ---- */
static void with_change(const hf_change *c, err_code code, const char *fragment)
{
    hf_llama();
    hf_rewrite(c, 1);
    hf_refused(code, fragment);
    hf_teardown();
    hf_setup();
}

START_TEST(hf_wrong_shapes)
{
    static const struct {
        hf_change c;
        const char *fragment;
    } cases[] = {
        {{HF_PUT, "model.embed_tokens.weight", DT_BF16, 2, {51, 256}, NULL},
         "expected BF16 [50,256], got BF16 [51,256]"},
        {{HF_PUT, "lm_head.weight", DT_BF16, 2, {50, 255}, NULL},
         "expected BF16 [50,256], got BF16 [50,255]"},
        {{HF_PUT, "model.norm.weight", DT_BF16, 1, {255}, NULL},
         "expected BF16 [256], got BF16 [255]"},
        {{HF_PUT, "model.norm.weight", DT_BF16, 2, {1, 256}, NULL},
         "expected BF16 [256], got BF16 [1,256]"},
        {{HF_PUT, "model.layers.1.self_attn.k_proj.weight", DT_BF16, 2, {256, 128}, NULL},
         "expected BF16 [128,256], got BF16 [256,128]"},
        {{HF_PUT, "model.layers.0.mlp.down_proj.weight", DT_BF16, 2, {256, 0}, NULL},
         "got BF16 [256,0]"},
        {{HF_PUT, "model.layers.0.input_layernorm.weight", DT_BF16, 0, {0}, NULL}, "got BF16 []"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char what[256];
        (void)snprintf(what, sizeof what, "model.safetensors: tensor '%s': ", cases[i].c.name);
        with_change(&cases[i].c, E_SHAPE, what);
        ck_assert_msg(strstr(hf_err.msg, cases[i].fragment), "%s", hf_err.msg);
    }
}
END_TEST

START_TEST(hf_wrong_dtypes)
{
    static const hf_change cases[] = {
        {HF_PUT, "model.embed_tokens.weight", DT_I32, 2, {50, 256}, NULL},
        {HF_PUT, "model.norm.weight", DT_I8, 1, {256}, NULL},
        {HF_PUT, "model.layers.0.self_attn.q_proj.weight", DT_F8_E4M3, 2, {256, 256}, NULL},
        {HF_PUT, "model.layers.1.mlp.up_proj.weight", DT_F64, 2, {384, 256}, NULL},
        {HF_PUT, "lm_head.weight", DT_U8, 2, {50, 256}, NULL},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        with_change(&cases[i], E_SHAPE, "expected F16, BF16 or F32, got");
}
END_TEST

START_TEST(hf_missing_tensors)
{
    static const char *const names[] = {"model.embed_tokens.weight", "lm_head.weight",
                                        "model.norm.weight", "model.layers.1.mlp.gate_proj.weight",
                                        "model.layers.0.post_attention_layernorm.weight"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const hf_change c = {.op = HF_DROP, .name = names[i]};
        char want[256];
        (void)snprintf(want, sizeof want, "tensor '%s' is missing", names[i]);
        with_change(&c, E_INPUT, want);
    }
}
END_TEST

START_TEST(hf_lying_config)
{
    static const struct {
        const char *old, *new;
        err_code code;
        const char *fragment;
    } cases[] = {
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\":3", E_INPUT,
         "model.layers.2.input_layernorm.weight' is missing"},
        {"\"num_hidden_layers\": 2", "\"num_hidden_layers\":1", E_INPUT,
         "says 1 layers, the files have more"},
        {"\"vocab_size\": 50", "\"vocab_size\":49", E_SHAPE, "expected BF16 [49,256]"},
        {"\"hidden_size\": 256", "\"hidden_size\":512", E_SHAPE, "expected BF16 [512]"},
        {"\"num_attention_heads\": 4", "\"num_attention_heads\":8", E_SHAPE, "q_proj"},
        {"\"num_key_value_heads\": 2", "\"num_key_value_heads\":4", E_SHAPE, "k_proj"},
        {"\"num_key_value_heads\": 2", "\"num_key_value_heads\":3", E_INPUT, "not a multiple"},
        {"\"intermediate_size\": 384", "\"intermediate_size\":256", E_SHAPE,
         "expected BF16 [256,256]"},
        {"LlamaForCausalLM", "Qwen2ForCausalLM", E_INPUT, "q_proj.bias' is missing"},
        {"LlamaForCausalLM", "InternLM2ForCausalLM", E_INPUT, "'output.weight' is missing"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        hf_llama();
        hf_edit("config.json", cases[i].old, cases[i].new);
        hf_refused(cases[i].code, cases[i].fragment);
        hf_teardown();
        hf_setup();
    }
}
END_TEST

START_TEST(hf_biases)
{
    static const hf_change llama_bias[] = {
        {HF_PUT, "model.layers.0.self_attn.q_proj.bias", DT_BF16, 1, {256}, NULL},
        {HF_PUT, "model.layers.1.self_attn.o_proj.bias", DT_BF16, 1, {256}, NULL},
        {HF_PUT, "model.layers.1.mlp.up_proj.bias", DT_BF16, 1, {384}, NULL},
    };
    for (int i = 0; i < 3; i++)
        with_change(&llama_bias[i], E_INPUT, "config.json says there is no bias");
    const model_desc m = tiny_qwen2();
    const hf_change drop = {.op = HF_DROP, .name = "model.layers.1.self_attn.v_proj.bias"};
    tiny_dir_make(hf_case_dir, &m, 1);
    hf_opens();
    hf_rewrite(&drop, 1);
    hf_refused(E_INPUT, "tensor 'model.layers.1.self_attn.v_proj.bias' is missing");
    const hf_change shape = {HF_PUT, "model.layers.1.self_attn.v_proj.bias", DT_BF16, 1, {1}, NULL};
    hf_rewrite(&shape, 1);
    hf_refused(E_SHAPE, "got BF16 [1]");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("hf_dir");
    TCase *t = hf_cases_of("good", s);
    tcase_add_test(t, hf_real_models);
    tcase_add_test(t, hf_single_and_sharded);
    tcase_add_test(t, hf_digest);
    tcase_add_test(t, hf_digest_of_a_large_model);
    tcase_add_test(t, hf_tied_head);
    tcase_add_test(t, hf_unaligned_file);
    tcase_add_test(t, hf_stored_dtype_rules);
    t = hf_cases_of("files", s);
    tcase_add_test(t, hf_wrong_paths);
    tcase_add_test(t, hf_bin_shards);
    tcase_add_test(t, hf_missing_shard);
    tcase_add_test(t, hf_extra_shard);
    tcase_add_test(t, hf_tensor_twice);
    tcase_add_test(t, hf_index_outside);
    tcase_add_test(t, hf_index_that_lies);
    t = hf_cases_of("tensors", s);
    tcase_add_test(t, hf_wrong_shapes);
    tcase_add_test(t, hf_wrong_dtypes);
    tcase_add_test(t, hf_missing_tensors);
    tcase_add_test(t, hf_lying_config);
    tcase_add_test(t, hf_biases);
    return hf_run(s);
}
