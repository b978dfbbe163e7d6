/* Keys and names that the Llama-like families have in common. */
#include "formats/family_common.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

static const family_names llama_names = {
    .model = {[ROLE_EMBED] = "model.embed_tokens",
              [ROLE_FINAL_NORM] = "model.norm",
              [ROLE_HEAD] = "lm_head"},
    .layer = "model.layers.",
    .part = {[ROLE_ATTN_NORM] = "input_layernorm",
             [ROLE_Q] = "self_attn.q_proj",
             [ROLE_K] = "self_attn.k_proj",
             [ROLE_V] = "self_attn.v_proj",
             [ROLE_O] = "self_attn.o_proj",
             [ROLE_FFN_NORM] = "post_attention_layernorm",
             [ROLE_GATE] = "mlp.gate_proj",
             [ROLE_UP] = "mlp.up_proj",
             [ROLE_DOWN] = "mlp.down_proj"},
};

const smooth_group family_llama_smooth[3] = {
    {ROLE_ATTN_NORM, {ROLE_Q, ROLE_K, ROLE_V}, 3},
    {ROLE_FFN_NORM, {ROLE_GATE, ROLE_UP}, 2},
    {ROLE_UP, {ROLE_DOWN}, 1},
};

err_code family_name(const family_names *t, const model_desc *m, tensor_role r, int32_t layer,
                     char *buf, size_t cap, err *e)
{
    const char *name = layer < 0 ? t->model[r] : t->part[r];
    if (!name || layer >= m->layers)
        return err_set(e, E_INPUT, "family '%s' has no tensor '%s' in layer %d", m->family,
                       role_name(r), layer);
    const int n = layer < 0 ? snprintf(buf, cap, "%s", name)
                            : snprintf(buf, cap, "%s%d.%s", t->layer, layer, name);
    if (n < 0 || (size_t)n >= cap)
        return err_set(e, E_LIMIT, "the name of tensor '%s' is too long", role_name(r));
    return OK;
}

err_code family_llama_name(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                           char *buf, size_t cap, err *e)
{
    (void)expert;
    return family_name(&llama_names, m, r, layer, buf, cap, e);
}

/* ---- rope ---- */
static err_code rope_kind_of(rope_kind *out, const cJSON *o, err *e)
{
    static const struct {
        const char *name;
        rope_kind kind;
    } kinds[] = {
        {"default", ROPE_NONE},  {"linear", ROPE_LINEAR}, {"dynamic", ROPE_DYNAMIC},
        {"llama3", ROPE_LLAMA3}, {"yarn", ROPE_YARN},
    };
    const char *type, *old;
    TRY(json_opt_str(o, "type", NULL, &old, e));
    TRY(json_opt_str(o, "rope_type", old ? old : "default", &type, e));
    if (old && strcmp(old, type) != 0)
        return err_set(e, E_INPUT, "rope scaling: type is '%.32s' and rope_type is '%.32s'", old,
                       type);
    for (size_t i = 0; i < sizeof kinds / sizeof kinds[0]; i++) {
        if (strcmp(kinds[i].name, type) == 0) {
            *out = kinds[i].kind;
            return OK;
        }
    }
    return err_set(
        e, E_UNSUPPORTED,
        "rope scaling '%.32s' is not known; known are default, linear, dynamic, llama3, yarn",
        type);
}

static err_code get_float(const cJSON *o, const char *key, float *out, err *e)
{
    double v;
    TRY(json_get_f64(o, key, &v, e));
    *out = (float)v;
    return OK;
}

static err_code opt_float(const cJSON *o, const char *key, double def, float *out, err *e)
{
    double v;
    TRY(json_opt_f64(o, key, def, &v, e));
    *out = (float)v;
    return OK;
}

static double yarn_log(double factor, double m)
{
    return factor <= 1 ? 1.0 : 0.1 * m * log(factor) + 1.0;
}

/* A factor that is absent follows from the two lengths; the attention factor from either. */
static err_code read_yarn(const cJSON *o, const model_desc *m, rope_scaling *s, err *e)
{
    double factor, mscale, mscale_all;
    bool truncate;
    TRY(json_opt_i32(o, "original_max_position_embeddings", 1, MODEL_MAX_TOKENS, m->max_tokens,
                     &s->original_max_positions, e));
    TRY(json_opt_f64(o, "factor", (double)m->max_tokens / s->original_max_positions, &factor, e));
    TRY(json_opt_f64(o, "mscale", 0, &mscale, e));
    TRY(json_opt_f64(o, "mscale_all_dim", 0, &mscale_all, e));
    s->factor = (float)factor;
    const double automatic = mscale != 0 && mscale_all != 0
                                 ? yarn_log(factor, mscale) / yarn_log(factor, mscale_all)
                                 : yarn_log(factor, 1);
    TRY(opt_float(o, "attention_factor", automatic, &s->attention_factor, e));
    TRY(opt_float(o, "beta_fast", 32, &s->beta_fast, e));
    TRY(opt_float(o, "beta_slow", 1, &s->beta_slow, e));
    TRY(json_opt_bool(o, "truncate", true, &truncate, e));
    if (!truncate)
        return err_set(e, E_UNSUPPORTED, "yarn rope scaling with truncate false is not supported");
    return OK;
}

/* Until transformers 4: rope_theta beside rope_scaling; since 5: both within rope_parameters. */
static err_code read_rope(const cJSON *config, model_desc *m, err *e)
{
    const cJSON *o = cJSON_GetObjectItemCaseSensitive(config, "rope_scaling");
    rope_scaling *s = &m->scaling;
    double theta, part;
    if (!o || cJSON_IsNull(o)) o = cJSON_GetObjectItemCaseSensitive(config, "rope_parameters");
    TRY(json_opt_f64(config, "rope_theta", 10000, &theta, e));
    TRY(json_opt_f64(config, "partial_rotary_factor", 1, &part, e));
    if (o && !cJSON_IsNull(o)) {
        if (!cJSON_IsObject(o))
            return err_set(e, E_INPUT, "key '%s': expected an object", o->string);
        for (const cJSON *c = o->child; c; c = c->next)
            if (cJSON_IsObject(c))
                return err_set(e, E_UNSUPPORTED,
                               "key '%s': rope by layer type ('%.32s') is not supported", o->string,
                               c->string);
        TRY(rope_kind_of(&s->kind, o, e));
        TRY(json_opt_f64(o, "rope_theta", theta, &theta, e));
        TRY(json_opt_f64(o, "partial_rotary_factor", part, &part, e));
        if (s->kind == ROPE_LINEAR || s->kind == ROPE_DYNAMIC || s->kind == ROPE_LLAMA3)
            TRY(get_float(o, "factor", &s->factor, e));
        if (s->kind == ROPE_LLAMA3) {
            TRY(get_float(o, "low_freq_factor", &s->low_freq_factor, e));
            TRY(get_float(o, "high_freq_factor", &s->high_freq_factor, e));
            TRY(json_get_i32(o, "original_max_position_embeddings", 1, MODEL_MAX_TOKENS,
                             &s->original_max_positions, e));
        }
        if (s->kind == ROPE_YARN) TRY(read_yarn(o, m, s, e));
    }
    m->rope_theta = (float)theta;
    if (!(part > 0 && part <= 1))
        return err_set(e, E_INPUT,
                       "key 'partial_rotary_factor' is %g, expected above 0 and at most 1", part);
    m->rope_dims = (int32_t)(m->head_dim * part);
    return OK;
}

/* ---- the rest ---- */
static err_code add_stop(model_desc *m, const char *key, const cJSON *v, int32_t *first, err *e)
{
    if (!cJSON_IsNumber(v) || v->valuedouble != floor(v->valuedouble) || v->valuedouble < -1 ||
        v->valuedouble >= MODEL_MAX_VOCAB)
        return err_set(e, E_INPUT, "key '%s': expected token ids below %d", key, MODEL_MAX_VOCAB);
    const int32_t id = (int32_t)v->valuedouble;
    if (id < 0) return OK; /* some write -1 for none */
    if (*first < 0) *first = id;
    for (int i = 0; i < m->n_stop; i++)
        if (m->stop[i] == id) return OK;
    if (m->n_stop == MODEL_MAX_STOP)
        return err_set(e, E_UNSUPPORTED, "key '%s': more than %d stop ids", key, MODEL_MAX_STOP);
    m->stop[m->n_stop++] = id;
    return OK;
}

err_code family_read_ids(const cJSON *o, const char *key, model_desc *m, int32_t *first, err *e)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, key);
    if (!v || cJSON_IsNull(v)) return OK;
    if (!cJSON_IsArray(v)) return add_stop(m, key, v, first, e);
    for (const cJSON *c = v->child; c; c = c->next) TRY(add_stop(m, key, c, first, e));
    return OK;
}

static err_code read_dtype(const cJSON *config, model_desc *m, err *e)
{
    static const struct {
        const char *name;
        dtype dt;
    } names[] = {
        {"float16", DT_F16},
        {"bfloat16", DT_BF16},
        {"float32", DT_F32},
    };
    const char *name;
    TRY(json_opt_str(config, "dtype", "float16", &name, e));
    TRY(json_opt_str(config, "torch_dtype", name, &name, e));
    if (strncmp(name, "torch.", 6) == 0) name += 6;
    for (size_t i = 0; i < 3; i++) {
        if (strcmp(names[i].name, name) == 0) {
            m->dt = names[i].dt;
            return OK;
        }
    }
    return err_set(e, E_UNSUPPORTED,
                   "torch_dtype '%.32s' is not supported; supported are float16, bfloat16, float32",
                   name);
}

static err_code read_max_tokens(const cJSON *config, int32_t def, int32_t *out, err *e)
{
    static const char *const keys[] = {"max_position_embeddings", "max_sequence_length",
                                       "max_seq_len", "seq_length", "n_positions"};
    *out = def;
    for (int i = 4; i >= 0; i--) /* the first key rules */
        TRY(json_opt_i32(config, keys[i], 1, MODEL_MAX_TOKENS, *out, out, e));
    return OK;
}

static err_code read_sizes(const cJSON *config, model_desc *m, err *e)
{
    TRY(json_get_i32(config, "vocab_size", 1, MODEL_MAX_VOCAB, &m->vocab, e));
    TRY(json_get_i32(config, "hidden_size", 1, MODEL_MAX_WIDTH, &m->hidden, e));
    TRY(json_get_i32(config, "intermediate_size", 1, MODEL_MAX_WIDTH, &m->ffn, e));
    TRY(json_get_i32(config, "num_hidden_layers", 1, MODEL_MAX_LAYERS, &m->layers, e));
    TRY(json_get_i32(config, "num_attention_heads", 1, MODEL_MAX_HEADS, &m->heads, e));
    TRY(json_opt_i32(config, "num_key_value_heads", 1, MODEL_MAX_HEADS, m->heads, &m->kv_heads, e));
    const cJSON *dim = cJSON_GetObjectItemCaseSensitive(config, "head_dim");
    if ((!dim || cJSON_IsNull(dim)) && m->hidden % m->heads)
        return err_set(e, E_INPUT,
                       "key 'hidden_size' is %d, expected a multiple of num_attention_heads %d",
                       m->hidden, m->heads);
    return json_opt_i32(config, "head_dim", 1, MODEL_MAX_HEAD_DIM, m->hidden / m->heads,
                        &m->head_dim, e);
}

err_code family_read_common(const cJSON *config, int32_t max_tokens, model_desc *out, err *e)
{
    model_desc *m = out;
    double eps;
    const char *act;
    *m = (model_desc){.bos = -1, .eos = -1, .qkv = QKV_SPLIT};
    const cJSON *arch = cJSON_GetArrayItem(
        cJSON_GetObjectItemCaseSensitive(config, "architectures"), 0);
    if (cJSON_IsString(arch))
        (void)snprintf(m->architecture, sizeof m->architecture, "%s", arch->valuestring);
    TRY(json_opt_str(config, "hidden_act", "silu", &act, e));
    if (strcmp(act, "silu") != 0)
        return err_set(e, E_UNSUPPORTED, "hidden_act '%.32s' is not supported; supported is silu",
                       act);
    TRY(read_sizes(config, m, e));
    TRY(read_max_tokens(config, max_tokens, &m->max_tokens, e));
    TRY(json_opt_f64(config, "rms_norm_eps", 1e-6, &eps, e));
    m->norm_eps = (float)eps;
    TRY(read_rope(config, m, e));
    TRY(json_opt_bool(config, "tie_word_embeddings", false, &m->tied_embed, e));
    TRY(json_opt_i32(config, "bos_token_id", -1, MODEL_MAX_VOCAB, -1, &m->bos, e));
    TRY(family_read_ids(config, "eos_token_id", m, &m->eos, e));
    return read_dtype(config, m, e);
}

err_code family_read_window(const cJSON *config, int32_t absent, int32_t *out, err *e)
{
    if (!cJSON_GetObjectItemCaseSensitive(config, "sliding_window")) {
        *out = absent;
        return OK;
    }
    return json_opt_i32(config, "sliding_window", 1, MODEL_MAX_TOKENS, 0, out, e);
}

/* Full layers first, then sliding ones: what the description can say. */
static err_code read_layer_list(const cJSON *list, model_desc *m, err *e)
{
    int32_t layer = 0, from = m->layers;
    if (!cJSON_IsArray(list) || cJSON_GetArraySize(list) != m->layers)
        return err_set(e, E_INPUT, "key 'layer_types': expected a list of %d strings", m->layers);
    for (const cJSON *c = list->child; c; c = c->next, layer++) {
        const char *type = cJSON_IsString(c) ? c->valuestring : "";
        const bool sliding = strcmp(type, "sliding_attention") == 0;
        if (!sliding && strcmp(type, "full_attention") != 0)
            return err_set(e, E_UNSUPPORTED,
                           "key 'layer_types': '%.32s' in layer %d is not supported", type, layer);
        if (sliding && from == m->layers) from = layer;
        if (!sliding && from < m->layers)
            return err_set(e, E_UNSUPPORTED,
                           "key 'layer_types': full attention in layer %d behind a sliding one is "
                           "not supported",
                           layer);
    }
    if (from < m->layers && m->sliding_window == 0)
        return err_set(e, E_INPUT,
                       "key 'layer_types': layer %d slides, but there is no sliding_window", from);
    m->sliding_from = from;
    return OK;
}

err_code family_read_layer_types(const cJSON *config, model_desc *out, err *e)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(config, "layer_types");
    if (list && !cJSON_IsNull(list)) TRY(read_layer_list(list, out, e));
    if (out->sliding_from >= out->layers) out->sliding_window = 0;
    if (out->sliding_window == 0) out->sliding_from = 0;
    return OK;
}
