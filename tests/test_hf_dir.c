/* formats/hf_dir, hf_shards: directories as they are found in the wild, and each way in which they can be
 * wrong: files, index, names, shapes, dtypes, biases, quantization. */
#include "formats/hf_dir.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "base/half.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/safetensors.h"
#include "support/alloc_fail.h"
#include "support/tempdir.h"
#include "support/tiny_dir.h"

static char dir[64];
static err e;

static void setup(void) { tempdir_make(dir, sizeof dir); }
static void teardown(void) { tempdir_drop(dir); }

static const char *in_dir(const char *name)
{
    static char path[2][512];
    static int turn;
    turn = !turn;
    (void)snprintf(path[turn], sizeof path[turn], "%s/%s", dir, name);
    return path[turn];
}

/* ---- changing a directory ---- */
typedef struct {
    enum { DROP, PUT } op; /* PUT: adds, or replaces one of that name */
    const char *name;
    dtype dt;
    int ndim;
    int64_t shape[2];
    const void *data; /* NULL: zeros */
} change;

static const change *find_change(const change *c, int n, const char *name)
{
    for (int i = 0; i < n; i++)
        if (strcmp(c[i].name, name) == 0) return &c[i];
    return NULL;
}

/* Copies the tensors of `from` into `to` (both in dir): those whose index is `part` modulo `parts`, with changes. */
static void copy_tensors(const char *from, const char *to, int part, int parts, const change *c, int n)
{
    st_file *f;
    st_writer *w;
    char source[512];
    (void)snprintf(source, sizeof source, "%s", in_dir(from));
    ck_assert_msg(st_open(&f, source, &e) == OK, "%s", e.msg);
    ck_assert_msg(st_writer_open(&w, in_dir(to), (const char *const[]){ "format", "pt", NULL }, true, &e) == OK, "%s", e.msg);
    for (int pass = 0; pass < 2; pass++) {
        for (int64_t i = part; i < st_count(f); i += parts) {
            const st_entry t = st_at(f, i);
            if (find_change(c, n, t.name)) continue;
            if (pass) ck_assert_msg(st_writer_data(w, t.name, &t.view, &e) == OK, "%s", e.msg);
            else ck_assert_msg(st_writer_add(w, t.name, t.view.dt, t.view.ndim, t.view.shape, &e) == OK, "%s", e.msg);
        }
        for (int i = 0; i < n && part == 0; i++) {
            if (c[i].op == DROP) continue;
            if (!pass) {
                ck_assert_msg(st_writer_add(w, c[i].name, c[i].dt, c[i].ndim, c[i].shape, &e) == OK, "%s", e.msg);
                continue;
            }
            const tensor v = tensor_of(NULL, c[i].dt, c[i].ndim, c[i].shape);
            void *zeros = calloc(tensor_bytes(&v) + 1, 1);
            const tensor put = tensor_of(c[i].data ? (void *)(uintptr_t)c[i].data : zeros, c[i].dt, c[i].ndim, c[i].shape);
            ck_assert_msg(st_writer_data(w, c[i].name, &put, &e) == OK, "%s", e.msg);
            free(zeros);
        }
    }
    ck_assert_msg(st_writer_commit(&w, &e) == OK, "%s", e.msg);
    st_close(&f);
}

static void rewrite(const change *c, int n) { copy_tensors("model.safetensors", "model.safetensors", 0, 1, c, n); }

static void part_name(char *buf, size_t cap, int part, int parts)
{
    (void)snprintf(buf, cap, "model-%05d-of-%05d.safetensors", part + 1, parts);
}

/* Splits model.safetensors into parts, with an index if asked. */
static void split(int parts, bool index)
{
    cJSON *o = cJSON_CreateObject(), *map = cJSON_AddObjectToObject(o, "weight_map");
    char name[64], *text;
    for (int p = 0; p < parts; p++) {
        st_file *f;
        part_name(name, sizeof name, p, parts);
        copy_tensors("model.safetensors", name, p, parts, NULL, 0);
        ck_assert(st_open(&f, in_dir(name), &e) == OK);
        for (int64_t i = 0; i < st_count(f); i++) (void)cJSON_AddStringToObject(map, st_at(f, i).name, name);
        st_close(&f);
    }
    ck_assert(json_print(&text, o, true, &e) == OK);
    if (index) tiny_file_write(dir, "model.safetensors.index.json", text);
    mem_free(text);
    cJSON_Delete(o);
    ck_assert_int_eq(unlink(in_dir("model.safetensors")), 0);
}

/* Replaces the first occurrence of `old` in a text file. */
static void edit(const char *file, const char *old, const char *new)
{
    char *text, *at, *out;
    size_t n;
    ck_assert_msg(file_read(&text, &n, in_dir(file), 1 << 20, &e) == OK, "%s", e.msg);
    at = strstr(text, old);
    ck_assert_msg(at, "%s: no '%s'", file, old);
    out = malloc(n + strlen(new) + 1);
    (void)sprintf(out, "%.*s%s%s", (int)(at - text), text, new, at + strlen(old));
    tiny_file_write(dir, file, out);
    free(out);
    mem_free(text);
}

static void opens(void)
{
    weight_src *s;
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    weights_close(&s);
}

/* Refused with this code and a message of one line that begins with the path and holds the fragment. */
static void refused(err_code code, const char *fragment)
{
    weight_src *s;
    const err_code rc = weights_open(&s, dir, &e);
    ck_assert_msg(rc == code, "'%s': expected %s, got %s %s", fragment, err_name(code), err_name(rc), rc ? e.msg : "");
    ck_assert_ptr_null(s);
    ck_assert_msg(strstr(e.msg, fragment), "'%s' lacks '%s'", e.msg, fragment);
    ck_assert_msg(strstr(e.msg, dir), "'%s' does not name the directory", e.msg);
    for (const char *p = e.msg; *p; p++) ck_assert_int_ge((unsigned char)*p, 0x20);
}

static void llama(void)
{
    const model_desc m = tiny_llama();
    tiny_dir_make(dir, &m, 1);
}

/* ---- what is right ---- */
START_TEST(hf_real_models)
{
    static const struct { const char *path, *family; src_kind kind; int32_t layers, hidden, stops; dtype dt; } cases[] = {
        { "/models/demo", "internlm2", SRC_HF, 8, 256, 2, DT_BF16 },
        { "/models/base", "internlm2", SRC_HF, 8, 512, 2, DT_BF16 },
        { "/models/qwen", "qwen2", SRC_HF, 8, 512, 2, DT_BF16 },
        { "/data/models/stories260K/hf", "llama", SRC_HF, 5, 64, 1, DT_F32 },
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
        ck_assert_msg(weights_open(&s, path, &e) == OK, "%s", e.msg);
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
        ck_assert(weights_tensor(s, ROLE_HEAD, -1, &v, &e) == OK);
        ck_assert_int_eq(v.shape[0], m->vocab);
        ck_assert_msg(weights_check_finite(s, NULL, &e) == OK, "%s", e.msg);
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
            static const char *const names[] = { [ROLE_Q] = "self_attn.q_proj", [ROLE_K] = "self_attn.k_proj",
                [ROLE_V] = "self_attn.v_proj", [ROLE_O] = "self_attn.o_proj", [ROLE_GATE] = "mlp.gate_proj",
                [ROLE_UP] = "mlp.up_proj", [ROLE_DOWN] = "mlp.down_proj" };
            char name[128];
            linear_view v;
            tensor t;
            (void)snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, names[r[i]]);
            ck_assert(st_find(f, name, &t));
            ck_assert_msg(weights_linear(s, r[i], layer, -1, &v, &e) == OK, "%s", e.msg);
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
    llama();
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    ck_assert(file_read(&copy, &n, in_dir("model.safetensors"), 1 << 24, &e) == OK);
    ck_assert(st_open_memory(&f, copy, n, "copy", &e) == OK);
    check_views(s, f);
    (void)snprintf(digest, sizeof digest, "%s", weights_digest(s));
    weights_close(&s);
    split(3, true);
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    check_views(s, f);
    ck_assert_str_ne(weights_digest(s), digest);
    weights_close(&s);
    ck_assert_int_eq(unlink(in_dir("model.safetensors.index.json")), 0);
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg); /* parts alone will do */
    check_views(s, f);
    weights_close(&s);
    st_close(&f);
    mem_free(copy);
}
END_TEST

static void digest_of(char out[65])
{
    weight_src *s;
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    (void)snprintf(out, 65, "%s", weights_digest(s));
    weights_close(&s);
}

START_TEST(hf_digest)
{
    char a[65], b[65];
    uint8_t byte;
    uint64_t size;
    llama();
    digest_of(a);
    digest_of(b);
    ck_assert_str_eq(a, b);
    ck_assert(file_size(&size, in_dir("model.safetensors"), &e) == OK);
    for (int i = 1; i < 8; i++) { /* any single weight of a small model */
        FILE *f = fopen(in_dir("model.safetensors"), "r+b");
        const long at = (long)(size - 1 - size / 9 * (uint64_t)(i - 1));
        ck_assert_int_eq(fseek(f, at, SEEK_SET), 0);
        ck_assert_uint_eq(fread(&byte, 1, 1, f), 1);
        byte ^= 1;
        ck_assert_int_eq(fseek(f, at, SEEK_SET), 0);
        ck_assert_uint_eq(fwrite(&byte, 1, 1, f), 1);
        ck_assert_int_eq(fclose(f), 0);
        digest_of(b);
        ck_assert_msg(strcmp(a, b) != 0, "change at byte %ld not seen", at);
        memcpy(a, b, sizeof a);
    }
    edit("config.json", "\"vocab_size\"", " \"vocab_size\"");
    digest_of(b);
    ck_assert_str_ne(a, b);
    /* the directory's name and other files do not count */
    tiny_file_write(dir, "notes.txt", "x");
    digest_of(a);
    ck_assert_str_eq(a, b);
}
END_TEST

START_TEST(hf_tied_head)
{
    const model_desc m = tiny_qwen2();
    weight_src *s;
    tensor embed, head;
    linear_view v;
    tiny_dir_make(dir, &m, 1);
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    ck_assert(weights_tensor(s, ROLE_EMBED, -1, &embed, &e) == OK);
    ck_assert(weights_tensor(s, ROLE_HEAD, -1, &head, &e) == OK);
    ck_assert_ptr_eq(embed.data, head.data);
    ck_assert(weights_has(s, ROLE_HEAD, -1, -1));
    ck_assert(weights_linear(s, ROLE_K, 1, -1, &v, &e) == OK);
    ck_assert_int_eq(v.bias.shape[0], model_linear_n(&m, ROLE_K));
    ck_assert(weights_linear(s, ROLE_O, 1, -1, &v, &e) == OK);
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
    llama();
    ck_assert(file_read(&text, &n, in_dir("model.safetensors"), 1 << 24, &e) == OK);
    ck_assert(st_open_memory(&f, text, n, "copy", &e) == OK);
    (void)st_head(f, &head);
    moved = malloc(n + 1);
    memcpy(moved, text, head);
    moved[head] = ' ';
    memcpy(moved + head + 1, text + head, n - head);
    for (int i = 0; i < 8; i++) moved[i] = (char)((head - 8 + 1) >> (8 * i));
    FILE *out = fopen(in_dir("model.safetensors"), "wb");
    ck_assert_uint_eq(fwrite(moved, 1, n + 1, out), n + 1);
    ck_assert_int_eq(fclose(out), 0);
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    check_views(s, f);
    linear_view a, b;
    ck_assert(weights_linear(s, ROLE_Q, 0, -1, &a, &e) == OK);
    ck_assert(weights_linear(s, ROLE_Q, 0, -1, &b, &e) == OK);
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
    llama();
    edit("config.json", "bfloat16", "float32"); /* the config is wrong about it */
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    ck_assert_int_eq((int)weights_desc(s)->dt, DT_BF16);
    weights_close(&s);
    /* one tensor of another float type is fine: views say what they are */
    const change c = { PUT, "model.norm.weight", DT_F32, 1, { 256 }, NULL };
    rewrite(&c, 1);
    tensor v;
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    ck_assert(weights_tensor(s, ROLE_FINAL_NORM, -1, &v, &e) == OK);
    ck_assert_int_eq((int)v.dt, DT_F32);
    weights_close(&s);
    /* tensors that nobody asks for are left alone */
    const change more = { PUT, "model.layers.0.self_attn.rotary_emb.inv_freq", DT_F32, 1, { 32 }, NULL };
    rewrite(&more, 1);
    opens();
}
END_TEST

/* ---- which path ---- */
START_TEST(hf_wrong_paths)
{
    weight_src *s;
    ck_assert_int_eq(weights_open(&s, "/nonexistent/model", &e), E_IO);
    ck_assert_msg(strstr(e.msg, "'/nonexistent/model'"), "%s", e.msg);
    tiny_file_write(dir, "file", "x");
    ck_assert_int_eq(weights_open(&s, in_dir("file"), &e), E_INPUT);
    refused(E_INPUT, "neither config.json");
    tiny_file_write(dir, "config.json", "{}");
    refused(E_INPUT, "architectures");
    tiny_file_write(dir, "config.json", "{\"architectures\":[\"FalconForCausalLM\"]}");
    refused(E_UNSUPPORTED, "'FalconForCausalLM' is not known; known are");
    tiny_file_write(dir, "config.json", "");
    refused(E_INPUT, "config.json");
    ck_assert_int_eq(unlink(in_dir("config.json")), 0);
    ck_assert(dir_make(in_dir("config.json"), &e) == OK);
    refused(E_INPUT, "config.json");
}
END_TEST

START_TEST(hf_bin_shards)
{
    llama();
    ck_assert_int_eq(unlink(in_dir("model.safetensors")), 0);
    refused(E_INPUT, "no safetensors file");
    tiny_file_write(dir, "pytorch_model.bin.index.json", "{}");
    refused(E_UNSUPPORTED, "'pytorch_model.bin.index.json'");
    tiny_file_write(dir, "model.gguf", "x");
    refused(E_UNSUPPORTED, "model.gguf'");
    tiny_file_write(dir, "consolidated.00.pth", "x");
    refused(E_UNSUPPORTED, "consolidated.00.pth'");
    tiny_file_write(dir, "pytorch_model-00001-of-00002.bin", "x");
    refused(E_UNSUPPORTED, "pytorch_model-00001-of-00002.bin'");
    tiny_file_write(dir, "model.safetensors.index.json", "{\"weight_map\":{\"a\":\"pytorch_model-00001-of-00002.bin\"}}");
    refused(E_UNSUPPORTED, "pytorch_model-00001-of-00002.bin'");
}
END_TEST

/* ---- shards and index ---- */
START_TEST(hf_missing_shard)
{
    llama();
    split(3, true);
    ck_assert_int_eq(unlink(in_dir("model-00002-of-00003.safetensors")), 0);
    refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(unlink(in_dir("model.safetensors.index.json")), 0);
    refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(unlink(in_dir("model-00003-of-00003.safetensors")), 0);
    refused(E_INPUT, "shard 'model-00002-of-00003.safetensors' is missing");
    ck_assert_int_eq(rename(in_dir("model-00001-of-00003.safetensors"), in_dir("model-00002-of-00003.safetensors")), 0);
    refused(E_INPUT, "shard 'model-00001-of-00003.safetensors' is missing");
}
END_TEST

START_TEST(hf_extra_shard)
{
    llama();
    split(2, true);
    copy_tensors("model-00001-of-00002.safetensors", "model-00001-of-00001.safetensors", 0, 1, NULL, 0);
    refused(E_INPUT, "'model-00001-of-00001.safetensors' is there but");
    ck_assert_int_eq(rename(in_dir("model-00001-of-00001.safetensors"), in_dir("model.safetensors")), 0);
    refused(E_INPUT, "'model.safetensors' is there but");
    ck_assert_int_eq(rename(in_dir("model.safetensors"), in_dir("model-00003-of-00003.safetensors")), 0);
    refused(E_INPUT, "'model-00003-of-00003.safetensors' is there but");
    ck_assert_int_eq(unlink(in_dir("model.safetensors.index.json")), 0);
    refused(E_INPUT, "is not one of 2 parts");
    ck_assert_int_eq(unlink(in_dir("model-00003-of-00003.safetensors")), 0);
    opens();
    /* another kind of file is nobody's business */
    copy_tensors("model-00001-of-00002.safetensors", "adapter.safetensors", 0, 1, NULL, 0);
    opens();
}
END_TEST

START_TEST(hf_tensor_twice)
{
    const change twice = { PUT, "model.norm.weight", DT_BF16, 1, { 256 }, NULL };
    llama();
    split(3, true);
    for (int p = 0; p < 3; p++) {
        char name[64];
        part_name(name, sizeof name, p, 3);
        copy_tensors(name, name, 0, 1, &twice, 1);
    }
    refused(E_INPUT, "tensor 'model.norm.weight' is in 'model-00001-of-00003.safetensors' and in");
    ck_assert_int_eq(unlink(in_dir("model.safetensors.index.json")), 0);
    refused(E_INPUT, "tensor 'model.norm.weight' is in");
    teardown();
    setup();
    llama();
    split(2, true);
    edit("model.safetensors.index.json", "\"weight_map\":", "\"weight_map\":{\"x\":\"model-00001-of-00002.safetensors\"},\"weight_map\":");
    refused(E_INPUT, "duplicate key");
    teardown();
    setup();
    llama();
    split(2, true);
    edit("model.safetensors.index.json", "\"weight_map\":\t{", "\"weight_map\":{\"model.norm.weight\":\"model-00001-of-00002.safetensors\",");
    refused(E_INPUT, "model.norm.weight");
}
END_TEST

START_TEST(hf_index_outside)
{
    static const char *const bad[] = { "../model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", ".", "" };
    char text[256];
    llama();
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        (void)snprintf(text, sizeof text, "{\"weight_map\":{\"a\":\"%s\"}}", bad[i]);
        tiny_file_write(dir, "model.safetensors.index.json", text);
        refused(E_INPUT, "is not a plain name in this directory");
    }
    static const char *const shapes[] = { "{}", "[]", "{\"weight_map\":[]}", "{\"weight_map\":{}}", "{\"weight_map\":{\"a\":5}}",
                                          "{\"weight_map\":{\"a\":null}}", "{", "" };
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        tiny_file_write(dir, "model.safetensors.index.json", shapes[i]);
        refused(E_INPUT, "model.safetensors.index.json");
    }
}
END_TEST

START_TEST(hf_index_that_lies)
{
    llama();
    tiny_file_write(dir, "model.safetensors.index.json", "{\"weight_map\":{\"no.such.tensor\":\"model.safetensors\"}}");
    refused(E_INPUT, "tensor 'no.such.tensor' is missing");
    ck_assert_int_eq(unlink(in_dir("model.safetensors.index.json")), 0);
    split(2, true);
    edit("model.safetensors.index.json", "model-00001-of-00002", "model-00002-of-00002");
    refused(E_INPUT, "says 'model-00002-of-00002.safetensors'");
    edit("model.safetensors.index.json", "model-00002-of-00002", "model-00001-of-00002");
    opens();
    /* a shard that is not what its name says */
    tiny_file_write(dir, "model-00002-of-00002.safetensors", "hello");
    refused(E_INPUT, "model-00002-of-00002.safetensors: a safetensors file has at least 8 bytes");
    ck_assert_int_eq(truncate(in_dir("model-00001-of-00002.safetensors"), 5000), 0);
    refused(E_INPUT, "beyond the file's");
}
END_TEST

/* ---- tensors against the config ---- */
static void with_change(const change *c, err_code code, const char *fragment)
{
    llama();
    rewrite(c, 1);
    refused(code, fragment);
    teardown();
    setup();
}

START_TEST(hf_wrong_shapes)
{
    static const struct { change c; const char *fragment; } cases[] = {
        { { PUT, "model.embed_tokens.weight", DT_BF16, 2, { 51, 256 }, NULL }, "expected BF16 [50,256], got BF16 [51,256]" },
        { { PUT, "lm_head.weight", DT_BF16, 2, { 50, 255 }, NULL }, "expected BF16 [50,256], got BF16 [50,255]" },
        { { PUT, "model.norm.weight", DT_BF16, 1, { 255 }, NULL }, "expected BF16 [256], got BF16 [255]" },
        { { PUT, "model.norm.weight", DT_BF16, 2, { 1, 256 }, NULL }, "expected BF16 [256], got BF16 [1,256]" },
        { { PUT, "model.layers.1.self_attn.k_proj.weight", DT_BF16, 2, { 256, 128 }, NULL }, "expected BF16 [128,256], got BF16 [256,128]" },
        { { PUT, "model.layers.0.mlp.down_proj.weight", DT_BF16, 2, { 256, 0 }, NULL }, "got BF16 [256,0]" },
        { { PUT, "model.layers.0.input_layernorm.weight", DT_BF16, 0, { 0 }, NULL }, "got BF16 []" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char what[256];
        (void)snprintf(what, sizeof what, "model.safetensors: tensor '%s': ", cases[i].c.name);
        with_change(&cases[i].c, E_SHAPE, what);
        ck_assert_msg(strstr(e.msg, cases[i].fragment), "%s", e.msg);
    }
}
END_TEST

START_TEST(hf_wrong_dtypes)
{
    static const change cases[] = {
        { PUT, "model.embed_tokens.weight", DT_I32, 2, { 50, 256 }, NULL },
        { PUT, "model.norm.weight", DT_I8, 1, { 256 }, NULL },
        { PUT, "model.layers.0.self_attn.q_proj.weight", DT_F8_E4M3, 2, { 256, 256 }, NULL },
        { PUT, "model.layers.1.mlp.up_proj.weight", DT_F64, 2, { 384, 256 }, NULL },
        { PUT, "lm_head.weight", DT_U8, 2, { 50, 256 }, NULL },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        with_change(&cases[i], E_SHAPE, "expected F16, BF16 or F32, got");
}
END_TEST

START_TEST(hf_missing_tensors)
{
    static const char *const names[] = { "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight",
                                         "model.layers.1.mlp.gate_proj.weight", "model.layers.0.post_attention_layernorm.weight" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++) {
        const change c = { .op = DROP, .name = names[i] };
        char want[256];
        (void)snprintf(want, sizeof want, "tensor '%s' is missing", names[i]);
        with_change(&c, E_INPUT, want);
    }
}
END_TEST

START_TEST(hf_lying_config)
{
    static const struct { const char *old, *new; err_code code; const char *fragment; } cases[] = {
        { "\"num_hidden_layers\": 2", "\"num_hidden_layers\":3", E_INPUT, "model.layers.2.input_layernorm.weight' is missing" },
        { "\"num_hidden_layers\": 2", "\"num_hidden_layers\":1", E_INPUT, "says 1 layers, the files have more" },
        { "\"vocab_size\": 50", "\"vocab_size\":49", E_SHAPE, "expected BF16 [49,256]" },
        { "\"hidden_size\": 256", "\"hidden_size\":512", E_SHAPE, "expected BF16 [512]" },
        { "\"num_attention_heads\": 4", "\"num_attention_heads\":8", E_SHAPE, "q_proj" },
        { "\"num_key_value_heads\": 2", "\"num_key_value_heads\":4", E_SHAPE, "k_proj" },
        { "\"num_key_value_heads\": 2", "\"num_key_value_heads\":3", E_INPUT, "not a multiple" },
        { "\"intermediate_size\": 384", "\"intermediate_size\":256", E_SHAPE, "expected BF16 [256,256]" },
        { "LlamaForCausalLM", "Qwen2ForCausalLM", E_INPUT, "q_proj.bias' is missing" },
        { "LlamaForCausalLM", "InternLM2ForCausalLM", E_INPUT, "'output.weight' is missing" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        llama();
        edit("config.json", cases[i].old, cases[i].new);
        refused(cases[i].code, cases[i].fragment);
        teardown();
        setup();
    }
}
END_TEST

START_TEST(hf_biases)
{
    static const change llama_bias[] = {
        { PUT, "model.layers.0.self_attn.q_proj.bias", DT_BF16, 1, { 256 }, NULL },
        { PUT, "model.layers.1.self_attn.o_proj.bias", DT_BF16, 1, { 256 }, NULL },
        { PUT, "model.layers.1.mlp.up_proj.bias", DT_BF16, 1, { 384 }, NULL },
    };
    for (int i = 0; i < 3; i++) with_change(&llama_bias[i], E_INPUT, "config.json says there is no bias");
    const model_desc m = tiny_qwen2();
    const change drop = { .op = DROP, .name = "model.layers.1.self_attn.v_proj.bias" };
    tiny_dir_make(dir, &m, 1);
    opens();
    rewrite(&drop, 1);
    refused(E_INPUT, "tensor 'model.layers.1.self_attn.v_proj.bias' is missing");
    const change shape = { PUT, "model.layers.1.self_attn.v_proj.bias", DT_BF16, 1, { 1 }, NULL };
    rewrite(&shape, 1);
    refused(E_SHAPE, "got BF16 [1]");
}
END_TEST

/* ---- AWQ ---- */
static void awq(int32_t group)
{
    const model_desc m = tiny_llama();
    char dense[64];
    tempdir_make(dense, sizeof dense);
    tiny_dir_make(dense, &m, 1);
    tiny_awq_make(in_dir("q"), dense, &m, 1, group);
    (void)snprintf(dir + strlen(dir), sizeof dir - strlen(dir), "/q");
    tempdir_drop(dense);
}

static void awq_done(void)
{
    *strrchr(dir, '/') = 0;
    teardown();
    setup();
}

static float *dequantized(weight_src *s, tensor_role r, int64_t *n)
{
    linear_view v;
    float *out;
    ck_assert_msg(weights_linear(s, r, 1, -1, &v, &e) == OK, "%s", e.msg);
    ck_assert(v.w4);
    ck_assert_int_eq((int)v.q.scales.dt, DT_F16);
    *n = v.q.n * v.q.k;
    out = malloc((size_t)*n * sizeof *out);
    for (int64_t i = 0; i < v.q.n; i++) w4_dequant_row(out + i * v.q.k, &v.q, i);
    return out;
}

START_TEST(awq_opens)
{
    static const int32_t groups[] = { 32, 64, 128 };
    for (int i = 0; i < 3; i++) {
        weight_src *s;
        linear_view v;
        awq(groups[i]);
        ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
        ck_assert_int_eq((int)weights_kind(s), SRC_AWQ);
        ck_assert_int_eq(weights_desc(s)->w4_group, groups[i]);
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &e) == OK);
        ck_assert(v.w4);
        ck_assert_msg(w4_check(&v.q, "down", &e) == OK, "%s", e.msg);
        ck_assert_int_eq(v.q.group, groups[i]);
        ck_assert_int_eq((int)v.q.layout, W4_AWQ);
        ck_assert_msg(weights_check_finite(s, NULL, &e) == OK, "%s", e.msg);
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
    ck_assert(st_open(&f, in_dir("model.safetensors"), &e) == OK);
    ck_assert(st_get(f, DOWN ".scales", &t, &e) == OK);
    const int64_t count = tensor_count(&t), shape[2] = { t.shape[0], t.shape[1] };
    float *f32 = malloc((size_t)count * 4);
    bf16 *b16 = malloc((size_t)count * 2);
    f16 *h16 = malloc((size_t)count * 2);
    for (int64_t i = 0; i < count; i++) { /* values that all three hold */
        b16[i] = f32_to_bf16(f16_to_f32(((const f16 *)t.data)[i]));
        f32[i] = bf16_to_f32(b16[i]);
        h16[i] = f32_to_f16(f32[i]);
    }
    st_close(&f);
    const change c[3] = { { PUT, DOWN ".scales", DT_F16, 2, { shape[0], shape[1] }, h16 },
                          { PUT, DOWN ".scales", DT_F32, 2, { shape[0], shape[1] }, f32 },
                          { PUT, DOWN ".scales", DT_BF16, 2, { shape[0], shape[1] }, b16 } };
    float *want = NULL;
    for (int i = 0; i < 3; i++) {
        rewrite(&c[i], 1);
        ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
        float *got = dequantized(s, ROLE_DOWN, &n);
        if (i) ck_assert_mem_eq(got, want, (size_t)n * 4);
        m = n;
        linear_view v;
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &e) == OK);
        const void *once = v.q.scales.data;
        ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &e) == OK);
        ck_assert_ptr_eq(once, v.q.scales.data); /* cast once */
        weights_close(&s);
        if (i) free(got);
        else want = got;
    }
    ck_assert_int_eq(n, m);
    f32[3] = 70000; /* more than f16 holds */
    rewrite(&c[1], 1);
    ck_assert(weights_open(&s, dir, &e) == OK);
    linear_view v;
    ck_assert_int_eq(weights_linear(s, ROLE_DOWN, 1, -1, &v, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "'" DOWN ".scales': 1 values of F32 do not fit F16"), "%s", e.msg);
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
    const change c[] = { { .op = DROP, .name = DOWN ".qweight" }, { .op = DROP, .name = DOWN ".qzeros" },
                         { .op = DROP, .name = DOWN ".scales" }, { PUT, DOWN ".weight", DT_F16, 2, { 256, 384 }, NULL } };
    awq(128);
    rewrite(c, 4);
    ck_assert_msg(weights_open(&s, dir, &e) == OK, "%s", e.msg);
    ck_assert(weights_linear(s, ROLE_DOWN, 1, -1, &v, &e) == OK);
    ck_assert(!v.w4 && v.dense.dt == DT_F16);
    ck_assert(weights_linear(s, ROLE_DOWN, 0, -1, &v, &e) == OK);
    ck_assert(v.w4);
    weights_close(&s);
    awq_done();
}
END_TEST

static void awq_change(const change *c, int n, err_code code, const char *fragment)
{
    awq(128);
    rewrite(c, n);
    refused(code, fragment);
    awq_done();
}

START_TEST(awq_wrong_tensors)
{
    static const struct { change c; err_code code; const char *fragment; } cases[] = {
        { { .op = DROP, .name = DOWN ".qzeros" }, E_INPUT, "'" DOWN ".qzeros' is missing" },
        { { .op = DROP, .name = DOWN ".scales" }, E_INPUT, "'" DOWN ".scales' is missing" },
        { { .op = DROP, .name = DOWN ".qweight" }, E_INPUT, "'" DOWN ".weight' is missing" },
        { { PUT, DOWN ".qweight", DT_I32, 2, { 256, 48 }, NULL }, E_SHAPE, "expected I32 [384,32], got I32 [256,48]" },
        { { PUT, DOWN ".qweight", DT_I32, 2, { 384, 33 }, NULL }, E_SHAPE, "got I32 [384,33]" },
        { { PUT, DOWN ".qweight", DT_F16, 2, { 384, 32 }, NULL }, E_SHAPE, "expected I32 [384,32], got F16" },
        { { PUT, DOWN ".qweight", DT_I16, 2, { 64, 384 }, NULL }, E_SHAPE, "got I16 [64,384]" },
        { { PUT, DOWN ".qzeros", DT_I32, 2, { 4, 32 }, NULL }, E_SHAPE, "expected I32 [3,32], got I32 [4,32]" },
        { { PUT, DOWN ".scales", DT_F16, 2, { 6, 256 }, NULL }, E_SHAPE, "expected F16 [3,256], got F16 [6,256]" },
        { { PUT, DOWN ".scales", DT_I32, 2, { 3, 256 }, NULL }, E_SHAPE, "got I32" },
        { { PUT, DOWN ".weight", DT_F16, 2, { 256, 384 }, NULL }, E_INPUT, "as weight and as qweight" },
        { { PUT, DOWN ".g_idx", DT_I32, 1, { 384 }, NULL }, E_UNSUPPORTED, "GPTQ" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        awq_change(&cases[i].c, 1, cases[i].code, cases[i].fragment);
}
END_TEST

START_TEST(awq_wrong_config)
{
    static const struct { const char *old, *new; err_code code; const char *fragment; } cases[] = {
        { "\"quant_method\":\t\"awq\"", "\"quant_method\":\"gptq\"", E_UNSUPPORTED, "'gptq'" },
        { "\"bits\":\t4", "\"bits\":8", E_UNSUPPORTED, "8 bits" },
        { "\"group_size\":\t128", "\"group_size\":256", E_UNSUPPORTED, "group size 256" },
        { "\"group_size\":\t128", "\"group_size\":64", E_SHAPE, "qzeros': expected I32 [4,32], got I32 [2,32]" },
        { "\"version\":\t\"gemm\"", "\"version\":\"gemv\"", E_UNSUPPORTED, "'gemv'" },
        { "\"quantization_config\"", "\"other\"", E_INPUT, "no quantization_config" },
        { "\"intermediate_size\":\t384", "\"intermediate_size\":448", E_SHAPE, "gate_proj.qweight': expected I32 [256,56]" },
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        awq(128);
        edit("config.json", cases[i].old, cases[i].new);
        refused(cases[i].code, cases[i].fragment);
        awq_done();
    }
    llama(); /* says awq and is not */
    edit("config.json", "{", "{\"quantization_config\":{\"quant_method\":\"awq\"},");
    refused(E_INPUT, "no linear has a qweight");
}
END_TEST

START_TEST(awq_without_zero_points)
{
    awq(128);
    edit("config.json", "\"zero_point\":\ttrue", "\"zero_point\":false");
    opens(); /* the flag alone changes nothing: the zeros are there */
    const change c = { PUT, "model.layers.0.self_attn.q_proj.qzeros", DT_I32, 2, { 2, 32 }, NULL };
    rewrite(&c, 1);
    refused(E_UNSUPPORTED, "zero_point is false");
    awq_done();
}
END_TEST

/* Our own directories carry a manifest that names their content. */
START_TEST(awq_manifest_names_it)
{
    char a[65], b[65], path[512];
    awq(128);
    digest_of(a);
    (void)snprintf(path, sizeof path, "%s", in_dir("manifest.json"));
    ck_assert_int_eq(unlink(path), 0);
    digest_of(b);
    ck_assert_str_ne(a, b);
    awq_done();
    awq(128);
    digest_of(b);
    ck_assert_str_eq(a, b);
    edit("config.json", "{", "{ "); /* changed since: the manifest no longer speaks for it */
    digest_of(b);
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
        err_code rc = weights_open(&s, dir, &e);
        if (rc == OK) rc = weights_linear(s, ROLE_Q, 0, -1, &v, &e);
        again = alloc_failed();
        ck_assert_msg(rc == (again ? E_NOMEM : OK) || (again && rc == OK), "%ld: %s", k, err_name(rc));
        weights_close(&s);
    }
    ck_assert_int_gt(k, 15);
    alloc_fail_at(0);
    awq_done();
}
END_TEST

static TCase *cases_of(const char *name, Suite *s)
{
    TCase *t = tcase_create(name);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 60);
    suite_add_tcase(s, t);
    return t;
}

int main(void)
{
    if (access("/dev/shm", W_OK) == 0) (void)setenv("TMPDIR", "/dev/shm", 0); /* syncs cost nothing there */
    Suite *s = suite_create("hf_dir");
    TCase *t = cases_of("good", s);
    tcase_add_test(t, hf_real_models);
    tcase_add_test(t, hf_single_and_sharded);
    tcase_add_test(t, hf_digest);
    tcase_add_test(t, hf_tied_head);
    tcase_add_test(t, hf_unaligned_file);
    tcase_add_test(t, hf_stored_dtype_rules);
    t = cases_of("files", s);
    tcase_add_test(t, hf_wrong_paths);
    tcase_add_test(t, hf_bin_shards);
    tcase_add_test(t, hf_missing_shard);
    tcase_add_test(t, hf_extra_shard);
    tcase_add_test(t, hf_tensor_twice);
    tcase_add_test(t, hf_index_outside);
    tcase_add_test(t, hf_index_that_lies);
    t = cases_of("tensors", s);
    tcase_add_test(t, hf_wrong_shapes);
    tcase_add_test(t, hf_wrong_dtypes);
    tcase_add_test(t, hf_missing_tensors);
    tcase_add_test(t, hf_lying_config);
    tcase_add_test(t, hf_biases);
    t = cases_of("awq", s);
    tcase_add_test(t, awq_opens);
    tcase_add_test(t, awq_scale_types);
    tcase_add_test(t, awq_mixed_with_dense);
    tcase_add_test(t, awq_wrong_tensors);
    tcase_add_test(t, awq_wrong_config);
    tcase_add_test(t, awq_without_zero_points);
    tcase_add_test(t, awq_manifest_names_it);
    tcase_add_test(t, hf_out_of_memory);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_NORMAL);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed != 0;
}
