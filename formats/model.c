/* What a model is: role names, widths of the linears, and the check that every description passes
 * before anything is sized by it. */
#include "formats/model.h"

#include <assert.h>
#include <math.h>
#include <string.h>

static const char *const role_names[ROLE_COUNT] = {
    [ROLE_EMBED] = "embed",   [ROLE_FINAL_NORM] = "final_norm",
    [ROLE_HEAD] = "head",     [ROLE_ATTN_NORM] = "attn_norm",
    [ROLE_QKV] = "qkv",       [ROLE_Q] = "q",
    [ROLE_K] = "k",           [ROLE_V] = "v",
    [ROLE_O] = "o",           [ROLE_FFN_NORM] = "ffn_norm",
    [ROLE_GATE] = "gate",     [ROLE_UP] = "up",
    [ROLE_DOWN] = "down",     [ROLE_Q_NORM] = "q_norm",
    [ROLE_K_NORM] = "k_norm", [ROLE_ROUTER] = "router",
};

const char *role_name(tensor_role r)
{
    assert((int)r >= 0 && r < ROLE_COUNT);
    return role_names[r];
}

bool role_from_name(tensor_role *out, const char *name)
{
    for (int i = 0; i < ROLE_COUNT; i++) {
        if (strcmp(role_names[i], name) == 0) {
            *out = (tensor_role)i;
            return true;
        }
    }
    return false;
}

static err_code check_range(const char *field, int64_t v, int64_t lo, int64_t hi, err *e)
{
    if (v >= lo && v <= hi) return OK;
    return err_set(e, E_INPUT, "%s is %lld, expected %lld..%lld", field, (long long)v,
                   (long long)lo, (long long)hi);
}

static err_code check_number(const char *field, double v, double lo, double hi, err *e)
{
    if (v >= lo && v <= hi) return OK; /* false for NaN */
    return err_set(e, E_INPUT, "%s is %g, expected a number from %g to %g", field, v, lo, hi);
}

static err_code check_heads(const model_desc *m, err *e)
{
    TRY(check_range("heads", m->heads, 1, MODEL_MAX_HEADS, e));
    TRY(check_range("kv_heads", m->kv_heads, 1, m->heads, e));
    TRY(check_range("head_dim", m->head_dim, 2, MODEL_MAX_HEAD_DIM, e));
    if (m->heads % m->kv_heads)
        return err_set(e, E_INPUT, "heads %d is not a multiple of kv_heads %d", m->heads,
                       m->kv_heads);
    if (m->head_dim % 2)
        return err_set(e, E_INPUT, "head_dim is %d, expected an even number", m->head_dim);
    return check_range("heads * head_dim", (int64_t)m->heads * m->head_dim, 2, MODEL_MAX_WIDTH, e);
}

static err_code check_rope(const model_desc *m, err *e)
{
    const rope_scaling *s = &m->scaling;
    TRY(check_number("rope_theta", m->rope_theta, 1, 1e15, e));
    TRY(check_range("rope_dims", m->rope_dims, 2, m->head_dim, e));
    if (m->rope_dims % 2)
        return err_set(e, E_INPUT, "rope_dims is %d, expected an even number", m->rope_dims);
    if (s->kind == ROPE_NONE) return OK;
    TRY(check_number("rope scaling factor", s->factor, 1e-3, 1e6, e));
    if (s->kind == ROPE_DYNAMIC && m->rope_dims == 2)
        return err_set(e, E_INPUT, "rope_dims is 2, too few for dynamic rope scaling");
    if (s->kind == ROPE_DYNAMIC && s->factor < 1)
        return err_set(e, E_INPUT, "rope scaling factor is %g, expected at least 1 for dynamic",
                       s->factor);
    if (s->kind == ROPE_LLAMA3 || s->kind == ROPE_YARN)
        TRY(check_range("original_max_position_embeddings", s->original_max_positions, 1,
                        MODEL_MAX_TOKENS, e));
    if (s->kind == ROPE_LLAMA3) {
        TRY(check_number("low_freq_factor", s->low_freq_factor, 1e-6, 1e6, e));
        TRY(check_number("high_freq_factor", s->high_freq_factor, 1e-6, 1e6, e));
        if (s->high_freq_factor <= s->low_freq_factor)
            return err_set(e, E_INPUT, "high_freq_factor %g is not above low_freq_factor %g",
                           s->high_freq_factor, s->low_freq_factor);
    }
    if (s->kind == ROPE_YARN) {
        TRY(check_number("beta_fast", s->beta_fast, 1e-6, 1e6, e));
        TRY(check_number("beta_slow", s->beta_slow, 1e-6, 1e6, e));
        if (m->rope_theta <= 1)
            return err_set(e, E_INPUT, "rope_theta is %g, expected above 1 for yarn",
                           m->rope_theta);
        if (!isfinite(s->attention_factor) || s->attention_factor > 1e3)
            return err_set(e, E_INPUT, "attention_factor is %g, expected at most 1000",
                           s->attention_factor);
    }
    return OK;
}

static err_code check_tokens(const model_desc *m, err *e)
{
    TRY(check_range("bos", m->bos, -1, m->vocab - 1, e));
    TRY(check_range("eos", m->eos, -1, m->vocab - 1, e));
    TRY(check_range("number of stop ids", m->n_stop, 0, MODEL_MAX_STOP, e));
    for (int i = 0; i < m->n_stop; i++) TRY(check_range("stop id", m->stop[i], 0, m->vocab - 1, e));
    return OK;
}

err_code model_desc_check(const model_desc *m, err *e)
{
    TRY(check_range("layers", m->layers, 1, MODEL_MAX_LAYERS, e));
    TRY(check_range("hidden", m->hidden, 1, MODEL_MAX_WIDTH, e));
    TRY(check_range("ffn", m->ffn, 1, MODEL_MAX_WIDTH, e));
    TRY(check_range("vocab", m->vocab, 1, MODEL_MAX_VOCAB, e));
    TRY(check_range("max_tokens", m->max_tokens, 1, MODEL_MAX_TOKENS, e));
    TRY(check_heads(m, e));
    TRY(check_number("norm_eps", m->norm_eps, 1e-30, 1, e));
    TRY(check_rope(m, e));
    TRY(check_range("sliding_window", m->sliding_window, 0, MODEL_MAX_TOKENS, e));
    TRY(check_range("sliding_from", m->sliding_from, 0, m->layers, e));
    TRY(check_range("experts", m->experts, 0, MODEL_MAX_EXPERTS, e));
    TRY(check_range("experts_used", m->experts_used, 0, m->experts, e));
    if (m->w4_group && m->w4_group != 32 && m->w4_group != 64 && m->w4_group != 128)
        return err_set(e, E_INPUT, "w4_group is %d, expected 32, 64 or 128", m->w4_group);
    if (m->dt != DT_F16 && m->dt != DT_BF16 && m->dt != DT_F32)
        return err_set(e, E_INPUT, "dtype is %s, expected F16, BF16 or F32", dtype_name(m->dt));
    return check_tokens(m, e);
}

int32_t model_window(const model_desc *m, int32_t layer)
{
    return layer >= m->sliding_from ? m->sliding_window : 0;
}

int64_t model_linear_n(const model_desc *m, tensor_role r)
{
    const int64_t d = m->head_dim;
    switch (r) {
    case ROLE_QKV: return (m->heads + 2 * (int64_t)m->kv_heads) * d;
    case ROLE_Q: return m->heads * d;
    case ROLE_K:
    case ROLE_V: return m->kv_heads * d;
    case ROLE_GATE:
    case ROLE_UP: return m->ffn;
    case ROLE_O:
    case ROLE_DOWN: return m->hidden;
    case ROLE_EMBED:
    case ROLE_HEAD: return m->vocab;
    case ROLE_ROUTER: return m->experts;
    default: assert(!"a linear's role"); return 0;
    }
}

int64_t model_linear_k(const model_desc *m, tensor_role r)
{
    switch (r) {
    case ROLE_O: return (int64_t)m->heads * m->head_dim;
    case ROLE_DOWN: return m->ffn;
    case ROLE_QKV:
    case ROLE_Q:
    case ROLE_K:
    case ROLE_V:
    case ROLE_GATE:
    case ROLE_UP:
    case ROLE_EMBED:
    case ROLE_HEAD:
    case ROLE_ROUTER: return m->hidden;
    default: assert(!"a linear's role"); return 0;
    }
}

int model_block_linears(const model_desc *m, tensor_role out[7])
{
    static const tensor_role split[] = {ROLE_Q, ROLE_K, ROLE_V},
                             rest[] = {ROLE_O, ROLE_GATE, ROLE_UP, ROLE_DOWN};
    int n = 0;
    if (m->qkv == QKV_SPLIT) {
        for (int i = 0; i < 3; i++) out[n++] = split[i];
    } else {
        out[n++] = ROLE_QKV;
    }
    for (int i = 0; i < 4; i++) out[n++] = rest[i];
    return n;
}
