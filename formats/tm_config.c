/* config.yaml: reading, printing, and the files it implies. */
#include "formats/tm_config.h"

#include <assert.h>
#include <limits.h>
#include <stdio.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "formats/family.h"
#include "formats/yaml.h"

#define TM_MAX_TP 64

/* ---- reading ---- */

static err_code get_text(const cJSON *o, const char *key, char *out, size_t cap, err *e)
{
    const char *s;
    TRY(json_opt_str(o, key, "", &s, e));
    if (strlen(s) >= cap)
        return err_set(e, E_INPUT, "%s: %zu characters, expected fewer than %zu", key, strlen(s),
                       cap);
    memcpy(out, s, strlen(s) + 1);
    return OK;
}

static err_code get_float(const cJSON *o, const char *key, double def, float *out, err *e)
{
    double v;
    TRY(json_opt_f64(o, key, def, &v, e));
    *out = (float)v;
    return OK;
}

/* Booleans are written as 0 and 1 by some keys, as false and true by others. */
static err_code get_flag(const cJSON *o, const char *key, bool *out, err *e)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, key);
    int32_t i;
    if (v && cJSON_IsBool(v)) return json_opt_bool(o, key, false, out, e);
    TRY(json_opt_i32(o, key, 0, 1, 0, &i, e));
    *out = i != 0;
    return OK;
}

static err_code refuse_nonzero(const cJSON *o, const char *const *keys, err *e)
{
    for (; *keys; keys++) {
        double v;
        const cJSON *x = cJSON_GetObjectItemCaseSensitive(o, *keys);
        if (cJSON_IsFalse(x)) continue;
        if (cJSON_IsTrue(x)) return err_set(e, E_UNSUPPORTED, "%s is true: not handled", *keys);
        TRY(json_opt_f64(o, *keys, 0, &v, e));
        if (v != 0) return err_set(e, E_UNSUPPORTED, "%s is %g: not handled", *keys, v);
    }
    return OK;
}

/* What the family table looks at in a config.json: the architecture and, for families that share
 * one, the vocabulary. */
static cJSON *family_key(const char *arch, int32_t vocab)
{
    cJSON *o = cJSON_CreateObject(), *list = o ? cJSON_AddArrayToObject(o, "architectures") : NULL;
    cJSON *name = list ? cJSON_CreateString(arch) : NULL;
    if (name && cJSON_AddItemToArray(list, name)) {
        if (cJSON_AddNumberToObject(o, "vocab_size", vocab)) return o;
    } else {
        cJSON_Delete(name);
    }
    cJSON_Delete(o);
    return NULL;
}

static err_code read_architecture(tm_config *c, const cJSON *model, err *e)
{
    const family *f;
    const char *arch;

    TRY(json_get_str(model, "model_arch", &arch, e));
    cJSON *key = family_key(arch, c->m.vocab);
    if (!key) return err_set(e, E_NOMEM, "out of memory");
    const err_code rc = family_of_config(&f, key, e);
    cJSON_Delete(key);
    if (rc != OK) return err_wrap(e, "model_arch");
    (void)snprintf(c->m.family, sizeof c->m.family, "%s", f->name);
    return get_text(model, "model_arch", c->m.architecture, sizeof c->m.architecture, e);
}

/* A number in C1, one entry a layer in C2; layers of different width have no place in model_desc.
 */
static err_code read_inter_size(tm_config *c, const cJSON *model, err *e)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(model, "inter_size"), *item;
    if (!cJSON_IsArray(v)) {
        c->epoch = TM_C1;
        return json_get_i32(model, "inter_size", 1, MODEL_MAX_WIDTH, &c->m.ffn, e);
    }
    c->epoch = TM_C2;
    if (cJSON_GetArraySize(v) != c->m.layers)
        return err_set(e, E_INPUT, "inter_size: expected %d entries, got %d", c->m.layers,
                       cJSON_GetArraySize(v));
    cJSON_ArrayForEach(item, v)
    {
        const double d = cJSON_IsNumber(item) ? item->valuedouble : -1;
        if (!(d >= 1 && d <= MODEL_MAX_WIDTH) || d != (double)(int32_t)d)
            return err_set(e, E_INPUT, "inter_size: expected whole numbers 1..%d", MODEL_MAX_WIDTH);
        if (item == v->child) c->m.ffn = (int32_t)d;
        if ((int32_t)d != c->m.ffn)
            return err_set(e, E_UNSUPPORTED,
                           "inter_size: layers of different width (%d and %d) are not handled",
                           c->m.ffn, (int32_t)d);
    }
    return OK;
}

static err_code read_weight_type(tm_config *c, const cJSON *model, err *e)
{
    const char *type;
    int32_t group;

    TRY(json_get_str(model, "weight_type", &type, e));
    TRY(json_opt_i32(model, "group_size", 0, 4096, 0, &group, e));
    c->m.dt = DT_F16;
    c->m.w4_group = 0;
    if (strcmp(type, "int4") == 0) {
        if (group != 32 && group != 64 && group != 128)
            return err_set(e, E_INPUT, "group_size: expected 32, 64 or 128, got %d", group);
        c->m.w4_group = group;
    } else if (strcmp(type, "bf16") == 0 || strcmp(type, "bfloat16") == 0) {
        c->m.dt = DT_BF16;
    } else if (strcmp(type, "fp16") != 0 && strcmp(type, "float16") != 0) {
        return err_set(e, E_UNSUPPORTED,
                       "weight_type: expected int4, float16 or bfloat16, got '%.32s'", type);
    }
    return OK;
}

static err_code read_experts(const cJSON *model, err *e)
{
    static const char *const none[] = {"experts_per_token",
                                       "expert_inter_size",
                                       "kv_lora_rank",
                                       "q_lora_rank",
                                       "moe_shared_gate",
                                       "qk_norm",
                                       NULL};
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(model, "expert_num"), *item;
    if (cJSON_IsArray(v)) {
        cJSON_ArrayForEach(
            item, v) if (!cJSON_IsNumber(item) ||
                         item->valuedouble !=
                             0) return err_set(e, E_UNSUPPORTED,
                                               "expert_num: layers with experts are not handled");
    } else if (v && (!cJSON_IsNumber(v) || v->valuedouble != 0)) {
        return err_set(e, E_UNSUPPORTED, "expert_num: experts are not handled");
    }
    return refuse_nonzero(model, none, e);
}

static err_code read_model(tm_config *c, const cJSON *o, err *e)
{
    model_desc *m = &c->m;
    bool attn_bias;

    TRY(json_get_i32(o, "num_layer", 1, MODEL_MAX_LAYERS, &m->layers, e));
    TRY(json_get_i32(o, "hidden_units", 1, MODEL_MAX_WIDTH, &m->hidden, e));
    TRY(json_get_i32(o, "head_num", 1, MODEL_MAX_HEADS, &m->heads, e));
    TRY(json_opt_i32(o, "kv_head_num", 0, MODEL_MAX_HEADS, 0, &m->kv_heads, e));
    if (m->kv_heads == 0) m->kv_heads = m->heads;
    TRY(json_opt_i32(o, "size_per_head", 2, MODEL_MAX_HEAD_DIM, 128, &m->head_dim, e));
    TRY(json_get_i32(o, "vocab_size", 1, MODEL_MAX_VOCAB, &m->vocab, e));
    TRY(json_opt_i32(o, "embedding_size", 0, MODEL_MAX_VOCAB, 0, &c->embedding_size, e));
    if (c->embedding_size == 0) c->embedding_size = m->vocab;
    TRY(get_float(o, "norm_eps", 0, &m->norm_eps, e));
    TRY(json_opt_i32(o, "session_len", 0, MODEL_MAX_TOKENS, 0, &c->session_len, e));
    TRY(json_opt_i32(o, "tp", 1, TM_MAX_TP, 1, &c->tp, e));
    TRY(json_opt_i32(o, "start_id", -1, MODEL_MAX_VOCAB, -1, &c->start_id, e));
    TRY(json_opt_i32(o, "end_id", -1, MODEL_MAX_VOCAB, -1, &c->end_id, e));
    TRY(read_architecture(c, o, e));
    TRY(get_flag(o, "attn_bias", &attn_bias, e));
    m->qkv_bias = m->o_bias = attn_bias;
    TRY(read_inter_size(c, o, e));
    TRY(read_weight_type(c, o, e));
    TRY(read_experts(o, e));
    TRY(get_text(o, "model_name", c->model_name, sizeof c->model_name, e));
    TRY(get_text(o, "chat_template", c->chat_template, sizeof c->chat_template, e));
    return get_text(o, "model_format", c->model_format, sizeof c->model_format, e);
}

static const struct {
    const char *name;
    rope_kind kind;
} scaling_names[] = {
    {"", ROPE_NONE},           {"default", ROPE_NONE},  {"linear", ROPE_LINEAR},
    {"dynamic", ROPE_DYNAMIC}, {"llama3", ROPE_LLAMA3}, {"yarn", ROPE_YARN},
};

const char *tm_config_scaling(rope_kind k)
{
    for (size_t i = 0; i < sizeof scaling_names / sizeof *scaling_names; i++)
        if (scaling_names[i].kind == k) return scaling_names[i].name;
    return "";
}

static err_code read_scaling(rope_scaling *s, const cJSON *o, err *e)
{
    const char *type;
    bool dynamic;
    size_t i = 0;

    TRY(json_opt_str(o, "rope_scaling_type", "", &type, e));
    while (i < sizeof scaling_names / sizeof *scaling_names &&
           strcmp(scaling_names[i].name, type) != 0)
        i++;
    if (i == sizeof scaling_names / sizeof *scaling_names)
        return err_set(e, E_UNSUPPORTED, "rope_scaling_type '%.32s' is not known", type);
    s->kind = scaling_names[i].kind;
    TRY(get_float(o, "rope_scaling_factor", 0, &s->factor, e));
    TRY(get_flag(o, "use_dynamic_ntk", &dynamic, e));
    if (dynamic) s->kind = ROPE_DYNAMIC;
    if (s->kind == ROPE_DYNAMIC && s->factor == 0) s->kind = ROPE_NONE; /* a stored 0 disables it */
    TRY(get_float(o, "low_freq_factor", 1, &s->low_freq_factor, e));
    TRY(get_float(o, "high_freq_factor", 1, &s->high_freq_factor, e));
    TRY(get_float(o, "attention_factor", -1, &s->attention_factor, e));
    TRY(get_float(o, "beta_fast", 32, &s->beta_fast, e));
    TRY(get_float(o, "beta_slow", 1, &s->beta_slow, e));
    return json_opt_i32(o, "original_max_position_embeddings", 0, MODEL_MAX_TOKENS, 0,
                        &s->original_max_positions, e);
}

static err_code read_attention(tm_config *c, const cJSON *o, err *e)
{
    static const char *const none[] = {"use_logn_attn", "softmax_scale", NULL};
    model_desc *m = &c->m;
    TRY(json_opt_i32(o, "rotary_embedding", 2, MODEL_MAX_HEAD_DIM, 128, &m->rope_dims, e));
    TRY(get_float(o, "rope_theta", 10000, &m->rope_theta, e));
    TRY(json_opt_i32(o, "max_position_embeddings", 0, MODEL_MAX_TOKENS, 0, &m->max_tokens, e));
    if (m->max_tokens == 0) m->max_tokens = c->session_len ? c->session_len : 2048;
    TRY(read_scaling(&m->scaling, o, e));
    if (m->scaling.kind == ROPE_YARN && m->scaling.original_max_positions == 0)
        m->scaling.original_max_positions = m->max_tokens;
    return refuse_nonzero(o, none, e);
}

/* `section` may be absent for lora_config only. */
static err_code read_lora(const cJSON *o, err *e)
{
    const char *policy;
    TRY(json_opt_str(o, "lora_policy", "", &policy, e));
    if (*policy) return err_set(e, E_UNSUPPORTED, "lora_policy '%.32s' is not handled", policy);
    return OK;
}

err_code tm_config_read(tm_config *out, const cJSON *yaml, err *e)
{
    memset(out, 0, sizeof *out);
    const cJSON *model = cJSON_GetObjectItemCaseSensitive(yaml, "model_config");
    const cJSON *attention = cJSON_GetObjectItemCaseSensitive(yaml, "attention_config");
    const cJSON *lora = cJSON_GetObjectItemCaseSensitive(yaml, "lora_config");

    if (!cJSON_IsObject(model)) return err_set(e, E_INPUT, "model_config: expected a map");
    if (!cJSON_IsObject(attention)) return err_set(e, E_INPUT, "attention_config: expected a map");
    TRY(read_model(out, model, e));
    TRY(read_attention(out, attention, e));
    if (cJSON_IsObject(lora)) TRY(read_lora(lora, e));
    out->m.qkv = QKV_CONCAT;
    out->m.rope_interleaved = true;
    out->m.bos = out->start_id < out->m.vocab ? out->start_id : -1;
    out->m.eos = out->end_id < out->m.vocab ? out->end_id : -1;
    if (out->m.eos >= 0) out->m.stop[out->m.n_stop++] = out->m.eos;
    if (out->embedding_size < out->m.vocab)
        return err_set(e, E_INPUT, "embedding_size: expected at least vocab_size %d, got %d",
                       out->m.vocab, out->embedding_size);
    return model_desc_check(&out->m, e);
}

/* ---- printing ---- */

/* Builds one section; the first failure sticks, so that the list of keys reads as one. */
typedef struct {
    cJSON *o;
    bool ok;
} section;

static void add(section *s, const char *key, cJSON *v)
{
    if (s->ok && v && cJSON_AddItemToObject(s->o, key, v)) return;
    cJSON_Delete(v);
    s->ok = false;
}
static void add_int(section *s, const char *key, int64_t v)
{
    add(s, key, cJSON_CreateNumber((double)v));
}
static void add_float(section *s, const char *key, float v) { add(s, key, yaml_float(v)); }
static void add_text(section *s, const char *key, const char *v)
{
    add(s, key, cJSON_CreateString(v));
}
static void add_bool(section *s, const char *key, bool v) { add(s, key, cJSON_CreateBool(v)); }

static void print_attention(section *s, const tm_config *c)
{
    const model_desc *m = &c->m;
    const rope_scaling *r = &m->scaling;
    const bool llama3 = r->kind == ROPE_LLAMA3, yarn = r->kind == ROPE_YARN;
    add_float(s, "attention_factor", yarn && r->attention_factor > 0 ? r->attention_factor : -1.0f);
    add_float(s, "beta_fast", yarn ? r->beta_fast : 32.0f);
    add_float(s, "beta_slow", yarn ? r->beta_slow : 1.0f);
    add_int(s, "cache_block_seq_len", 64);
    add_float(s, "high_freq_factor", llama3 ? r->high_freq_factor : 1.0f);
    add_float(s, "low_freq_factor", llama3 ? r->low_freq_factor : 1.0f);
    add_int(s, "max_position_embeddings", m->max_tokens);
    add_int(s, "original_max_position_embeddings",
            r->kind == ROPE_NONE ? 0 : r->original_max_positions);
    add_float(s, "rope_scaling_factor", r->kind == ROPE_NONE ? 0.0f : r->factor);
    add_text(s, "rope_scaling_type", tm_config_scaling(r->kind));
    add_float(s, "rope_theta", m->rope_theta);
    add_int(s, "rotary_embedding", m->rope_dims);
    add_float(s, "softmax_scale", 0.0f);
    add_int(s, "use_dynamic_ntk", r->kind == ROPE_DYNAMIC);
    add_int(s, "use_logn_attn", 0);
}

static void print_lora(section *s)
{
    add_int(s, "lora_max_wo_r", 0);
    add_text(s, "lora_policy", "");
    add_int(s, "lora_r", 0);
    add_text(s, "lora_rank_pattern", "");
    add_float(s, "lora_scale", 0.0f);
    add_text(s, "lora_scale_pattern", "");
}

static void print_shape(section *s, const tm_config *c)
{
    const model_desc *m = &c->m;
    cJSON *inter = cJSON_CreateArray();
    for (int32_t i = 0; inter && i < m->layers; i++) {
        cJSON *n = cJSON_CreateNumber(m->ffn);
        if (!n || !cJSON_AddItemToArray(inter, n)) {
            cJSON_Delete(n);
            s->ok = false;
        }
    }
    add_int(s, "attn_bias", m->qkv_bias || m->o_bias);
    add_int(s, "embedding_size", c->embedding_size);
    add_int(s, "group_size", m->w4_group);
    add_int(s, "head_num", m->heads);
    add_int(s, "hidden_units", m->hidden);
    add(s, "inter_size", inter);
    add_int(s, "kv_head_num", m->kv_heads);
    add_float(s, "norm_eps", m->norm_eps);
    add_int(s, "num_layer", m->layers);
    add_int(s, "size_per_head", m->head_dim);
    add_int(s, "tp", c->tp);
    add_int(s, "vocab_size", m->vocab);
    add_text(s, "weight_type", m->w4_group ? "int4" : m->dt == DT_BF16 ? "bfloat16" : "float16");
}

static void print_model(section *s, const tm_config *c)
{
    print_shape(s, c);
    add_text(s, "chat_template", c->chat_template);
    add_int(s, "end_id", c->end_id < 0 ? 0 : c->end_id);
    add_text(s, "model_arch", c->m.architecture);
    add_text(s, "model_format", c->model_format);
    add_text(s, "model_name", c->model_name);
    add_int(s, "session_len", c->session_len);
    add_int(s, "start_id", c->start_id < 0 ? 0 : c->start_id);
    /* experts and MLA: the defaults that the C++ side insists on */
    add_int(s, "expert_inter_size", 0);
    add(s, "expert_num", cJSON_CreateArray());
    add_int(s, "experts_per_token", 0);
    add_int(s, "kv_lora_rank", 0);
    add_int(s, "moe_group_num", 1);
    add_bool(s, "moe_shared_gate", false);
    add_bool(s, "norm_topk_prob", false);
    add_int(s, "q_lora_rank", 0);
    add_bool(s, "qk_norm", false);
    add_int(s, "qk_rope_dim", 0);
    add_float(s, "routed_scale", 1.0f);
    add_int(s, "topk_group", 1);
    add_text(s, "topk_method", "greedy");
    add_int(s, "tune_layer_num", 1);
    add_int(s, "v_head_dim", 0);
}

err_code tm_config_print(char **out, const tm_config *c, err *e)
{
    cJSON *o = cJSON_CreateObject();
    section attention = {o ? cJSON_AddObjectToObject(o, "attention_config") : NULL, true};
    section lora = {o ? cJSON_AddObjectToObject(o, "lora_config") : NULL, true};
    section model = {o ? cJSON_AddObjectToObject(o, "model_config") : NULL, true};
    err_code rc;

    *out = NULL;
    if (attention.o && lora.o && model.o) {
        print_attention(&attention, c);
        print_lora(&lora);
        print_model(&model, c);
    }
    if (model.o && attention.ok && lora.ok && model.ok)
        rc = yaml_print(out, o, e);
    else
        rc = err_set(e, E_NOMEM, "out of memory for config.yaml");
    cJSON_Delete(o);
    return rc;
}

/* ---- the files ---- */

static const char *const part_ext[TM_PART_COUNT] = {
    [TM_WEIGHT] = "weight", [TM_QWEIGHT] = "qweight", [TM_SCALES] = "scales",
    [TM_ZEROS] = "zeros",   [TM_BIAS] = "bias",
};

typedef struct {
    const tm_config *c;
    tm_file *at; /* NULL while counting */
    size_t n;
} file_list;

static void file_add(file_list *l, tensor_role role, tm_part part, int32_t layer, int32_t rank,
                     const char *stem, int64_t rows, int64_t cols)
{
    if (l->at) {
        tm_file *f = &l->at[l->n];
        char prefix[32] = "", r[16] = "";
        if (layer >= 0) (void)snprintf(prefix, sizeof prefix, "layers.%d.", layer);
        if (rank >= 0) (void)snprintf(r, sizeof r, "%d.", rank);
        (void)snprintf(f->name, sizeof f->name, "%s%s.%s%s", prefix, stem, r, part_ext[part]);
        f->role = role;
        f->part = part;
        f->layer = layer;
        f->rank = rank;
        f->dt = part == TM_QWEIGHT                      ? DT_U32
                : part == TM_SCALES || part == TM_ZEROS ? DT_F16
                                                        : l->c->m.dt;
        f->rows = rows;
        f->cols = cols;
        f->bytes = (uint64_t)rows * (uint64_t)cols *
                   dtype_bytes(f->dt); /* model_desc_check bounds both */
    }
    l->n++;
}

/* One linear of one rank, k inputs and n outputs there. */
static void file_linear(file_list *l, tensor_role role, int32_t layer, int32_t rank,
                        const char *stem, int64_t k, int64_t n)
{
    const int32_t g = l->c->m.w4_group;
    if (g) {
        file_add(l, role, TM_QWEIGHT, layer, rank, stem, k, n / 8);
        file_add(l, role, TM_SCALES, layer, rank, stem, k / g, n);
        file_add(l, role, TM_ZEROS, layer, rank, stem, k / g, n);
    } else {
        file_add(l, role, TM_WEIGHT, layer, rank, stem, k, n);
    }
}

static void file_layer(file_list *l, int32_t layer)
{
    const model_desc *m = &l->c->m;
    const int32_t tp = l->c->tp;
    const int64_t q = (int64_t)m->heads * m->head_dim / tp,
                  kv = (int64_t)m->kv_heads * m->head_dim / tp;

    file_add(l, ROLE_ATTN_NORM, TM_WEIGHT, layer, -1, "attention_norm", 1, m->hidden);
    file_add(l, ROLE_FFN_NORM, TM_WEIGHT, layer, -1, "ffn_norm", 1, m->hidden);
    for (int32_t r = 0; r < tp; r++) {
        file_linear(l, ROLE_QKV, layer, r, "attention.w_qkv", m->hidden, q + 2 * kv);
        if (m->qkv_bias) file_add(l, ROLE_QKV, TM_BIAS, layer, r, "attention.w_qkv", 1, q + 2 * kv);
        file_linear(l, ROLE_O, layer, r, "attention.wo", q, m->hidden);
        if (m->o_bias) file_add(l, ROLE_O, TM_BIAS, layer, r, "attention.wo", 1, m->hidden);
        file_linear(l, ROLE_GATE, layer, r, "feed_forward.w1", m->hidden, m->ffn / tp);
        file_linear(l, ROLE_UP, layer, r, "feed_forward.w3", m->hidden, m->ffn / tp);
        file_linear(l, ROLE_DOWN, layer, r, "feed_forward.w2", m->ffn / tp, m->hidden);
    }
}

static void file_all(file_list *l)
{
    const tm_config *c = l->c;
    const int64_t rows = ((int64_t)c->m.vocab + c->tp - 1) / c->tp; /* of the head, per rank */
    for (int32_t r = 0; r < c->tp; r++)
        file_add(l, ROLE_EMBED, TM_WEIGHT, -1, r, "tok_embeddings", c->embedding_size,
                 c->m.hidden / c->tp);
    file_add(l, ROLE_FINAL_NORM, TM_WEIGHT, -1, -1, "norm", 1, c->m.hidden);
    for (int32_t r = 0; r < c->tp; r++)
        file_add(l, ROLE_HEAD, TM_WEIGHT, -1, r, "output", rows, c->m.hidden);
    for (int32_t i = 0; i < c->m.layers; i++) file_layer(l, i);
}

static err_code divides(const char *what, int64_t value, int64_t unit, err *e)
{
    if (value % unit == 0) return OK;
    return err_set(e, E_INPUT, "%s is %lld, expected a multiple of %lld", what, (long long)value,
                   (long long)unit);
}

err_code tm_config_files(tm_file **out, size_t *n, const tm_config *c, err *e)
{
    const model_desc *m = &c->m;
    file_list l = {c, NULL, 0};
    void *p;

    *out = NULL;
    TRY(divides("head_num", m->heads, c->tp, e));
    TRY(divides("kv_head_num", m->kv_heads, c->tp, e));
    TRY(divides("hidden_units", m->hidden, c->tp, e));
    TRY(divides("inter_size", m->ffn, c->tp, e));
    if (m->w4_group) {
        const int64_t q = (int64_t)m->heads * m->head_dim;
        TRY(divides("hidden_units", m->hidden, m->w4_group, e));
        TRY(divides("inter_size per rank", m->ffn / c->tp, m->w4_group, e));
        TRY(divides("head_num * size_per_head per rank", q / c->tp, m->w4_group, e));
        TRY(divides("size_per_head", m->head_dim, 8, e)); /* whole words per head */
    }
    file_all(&l);
    TRY(mem_alloc(&p, l.n, sizeof(tm_file), "file list", e));
    l.at = p;
    l.n = 0;
    file_all(&l);
    *out = l.at;
    *n = l.n;
    return OK;
}
