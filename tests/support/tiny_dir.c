#include "tests/support/tiny_dir.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/family.h"
#include "formats/safetensors.h"
#include "formats/w4_dir.h"
#include "tests/support/tiny_weights.h"

model_desc tiny_llama(void)
{
    model_desc m = tiny_desc();
    m.dt = DT_BF16;
    m.hidden = 256;
    m.heads = 4;
    m.kv_heads = 2;
    m.head_dim = m.rope_dims = 64;
    m.ffn = 384;
    return m;
}

model_desc tiny_internlm2(void)
{
    model_desc m = tiny_llama();
    (void)snprintf(m.family, sizeof m.family, "internlm2");
    (void)snprintf(m.architecture, sizeof m.architecture, "InternLM2ForCausalLM");
    m.heads = 2;
    m.kv_heads = 1;
    m.head_dim = m.rope_dims = 128;
    m.qkv = QKV_GROUPED;
    return m;
}

model_desc tiny_qwen2(void)
{
    model_desc m = tiny_llama();
    (void)snprintf(m.family, sizeof m.family, "qwen2");
    (void)snprintf(m.architecture, sizeof m.architecture, "Qwen2ForCausalLM");
    m.qkv_bias = true;
    m.tied_embed = true;
    return m;
}

void tiny_file_write(const char *dir, const char *name, const char *text)
{
    char path[4096];
    (void)snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(text, 1, strlen(text), f), strlen(text));
    ck_assert_int_eq(fclose(f), 0);
}

static void write_configs(const char *dir, const model_desc *m)
{
    char text[2048];
    (void)snprintf(
        text, sizeof text,
        "{\"architectures\": [\"%s\"], \"vocab_size\": %d, \"hidden_size\": %d, "
        "\"intermediate_size\": %d, \"num_hidden_layers\": %d, \"num_attention_heads\": %d, "
        "\"num_key_value_heads\": %d, \"head_dim\": %d, \"hidden_act\": \"silu\", "
        "\"rms_norm_eps\": %g, \"rope_theta\": %g, \"max_position_embeddings\": %d, \"bias\": "
        "false, "
        "\"tie_word_embeddings\": %s, \"torch_dtype\": \"%s\", \"bos_token_id\": %d, "
        "\"eos_token_id\": %d}",
        m->architecture, m->vocab, m->hidden, m->ffn, m->layers, m->heads, m->kv_heads, m->head_dim,
        (double)m->norm_eps, (double)m->rope_theta, m->max_tokens, m->tied_embed ? "true" : "false",
        m->dt == DT_BF16  ? "bfloat16"
        : m->dt == DT_F16 ? "float16"
                          : "float32",
        m->bos, m->eos);
    tiny_file_write(dir, "config.json", text);
    tiny_file_write(dir, "generation_config.json", "{\"eos_token_id\": [2, 7]}");
    tiny_file_write(dir, "tokenizer_config.json", "{\"bos_token\": \"<s>\"}");
    tiny_file_write(dir, "modeling_x.py", "pass\n");
    tiny_file_write(dir, "notes.txt", "stays behind\n");
}

typedef struct {
    char name[8 * 64][256];
    tensor t[8 * 64];
    int n;
} listing;

static err_code list(listing *l, const model_desc *m, tensor_role r, int32_t layer,
                     const char *suffix, const tensor *t, err *e)
{
    char base[200];
    if (!t->data) return OK;
    TRY(family_by_name(m->family)->tensor_name(m, r, layer, -1, base, sizeof base, e));
    (void)snprintf(l->name[l->n], sizeof l->name[0], "%s%s", base, suffix);
    l->t[l->n++] = *t;
    return OK;
}

static err_code list_tensor(listing *l, weight_src *s, tensor_role r, int32_t layer, err *e)
{
    tensor t;
    TRY(weights_tensor(s, r, layer, &t, e));
    return list(l, weights_desc(s), r, layer, ".weight", &t, e);
}

static err_code list_all(listing *l, weight_src *s, err *e)
{
    const model_desc *m = weights_desc(s);
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    TRY(list_tensor(l, s, ROLE_EMBED, -1, e));
    TRY(list_tensor(l, s, ROLE_FINAL_NORM, -1, e));
    if (!m->tied_embed) TRY(list_tensor(l, s, ROLE_HEAD, -1, e));
    for (int32_t layer = 0; layer < m->layers; layer++) {
        TRY(list_tensor(l, s, ROLE_ATTN_NORM, layer, e));
        TRY(list_tensor(l, s, ROLE_FFN_NORM, layer, e));
        for (int i = 0; i < n; i++) {
            linear_view v;
            TRY(weights_linear(s, linears[i], layer, -1, &v, e));
            TRY(list(l, m, linears[i], layer, ".weight", &v.dense, e));
            TRY(list(l, m, linears[i], layer, ".bias", &v.bias, e));
        }
    }
    return OK;
}

err_code tiny_dir_write(const char *dir, weight_src *src, err *e)
{
    static const char *const meta[] = {"format", "pt", NULL};
    char path[4096];
    listing *l = NULL;
    st_writer *w = NULL;
    err_code rc;

    write_configs(dir, weights_desc(src));
    TRY(path_join(path, sizeof path, dir, "model.safetensors", e));
    TRY(mem_alloc((void **)&l, 1, sizeof *l, "tensor list", e));
    if ((rc = list_all(l, src, e)) != OK) goto done;
    if ((rc = st_writer_open(&w, path, meta, true, e)) != OK) goto done;
    for (int i = 0; rc == OK && i < l->n; i++)
        rc = st_writer_add(w, l->name[i], l->t[i].dt, l->t[i].ndim, l->t[i].shape, e);
    for (int i = 0; rc == OK && i < l->n; i++) rc = st_writer_data(w, l->name[i], &l->t[i], e);
    if (rc == OK) rc = st_writer_commit(&w, e);
done:
    st_writer_abort(&w);
    mem_free(l);
    return rc;
}

void tiny_dir_make(const char *dir, const model_desc *m, uint64_t seed)
{
    weight_src *s;
    err e;
    const tiny_opts o = {.desc = *m, .seed = seed};
    ck_assert_msg(dir_make(dir, &e) == OK, "%s", e.msg);
    ck_assert_msg(tiny_open(&s, &o, &e) == OK, "%s", e.msg);
    ck_assert_msg(tiny_dir_write(dir, s, &e) == OK, "%s", e.msg);
    weights_close(&s);
}

static err_code feed_awq(w4_dir_writer *w, weight_src *codes, err *e)
{
    static const tensor_role roles[] = {ROLE_EMBED, ROLE_FINAL_NORM, ROLE_HEAD, ROLE_ATTN_NORM,
                                        ROLE_FFN_NORM};
    const model_desc *m = weights_desc(codes);
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    for (int32_t l = -1; l < m->layers; l++) {
        for (int i = l < 0 ? 0 : 3; i < (l < 0 ? 3 : 5); i++) {
            tensor t;
            if (roles[i] == ROLE_HEAD && m->tied_embed) continue;
            TRY(weights_tensor(codes, roles[i], l, &t, e));
            TRY(w4_dir_tensor(w, roles[i], l, &t, e));
        }
        for (int i = 0; l >= 0 && i < n; i++) {
            linear_view v;
            TRY(weights_linear(codes, linears[i], l, -1, &v, e));
            TRY(w4_dir_linear(w, linears[i], l, -1, &v.q, e));
        }
    }
    return OK;
}

void tiny_awq_make(const char *out, const char *dense_dir, const model_desc *m, uint64_t seed,
                   int32_t group)
{
    const tiny_opts t = {.desc = *m, .seed = seed, .w4_group = group};
    const w4_dir_opts o = {.group = group};
    weight_src *dense, *codes;
    w4_dir_writer *w;
    err e;
    ck_assert_msg(weights_open(&dense, dense_dir, &e) == OK, "%s", e.msg);
    ck_assert_msg(tiny_open(&codes, &t, &e) == OK, "%s", e.msg);
    ck_assert_msg(w4_dir_open(&w, out, dense, &o, NULL, &e) == OK, "%s", e.msg);
    ck_assert_msg(feed_awq(w, codes, &e) == OK, "%s", e.msg);
    ck_assert_msg(w4_dir_commit(&w, &e) == OK, "%s", e.msg);
    weights_close(&codes);
    weights_close(&dense);
}
