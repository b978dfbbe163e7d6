/* InternLM2 and 2.5: one fused projection whose rows are grouped by KV head, names of its own. */
#include "formats/family_common.h"

static const family_names names = {
    .model = {[ROLE_EMBED] = "model.tok_embeddings",
              [ROLE_FINAL_NORM] = "model.norm",
              [ROLE_HEAD] = "output"},
    .layer = "model.layers.",
    .part = {[ROLE_ATTN_NORM] = "attention_norm",
             [ROLE_QKV] = "attention.wqkv",
             [ROLE_O] = "attention.wo",
             [ROLE_FFN_NORM] = "ffn_norm",
             [ROLE_GATE] = "feed_forward.w1",
             [ROLE_UP] = "feed_forward.w3",
             [ROLE_DOWN] = "feed_forward.w2"},
};

static const smooth_group smooth[] = {
    {ROLE_ATTN_NORM, {ROLE_QKV}, 1},
    {ROLE_FFN_NORM, {ROLE_GATE, ROLE_UP}, 2},
    {ROLE_UP, {ROLE_DOWN}, 1},
};

static err_code tensor_name(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                            char *buf, size_t cap, err *e)
{
    (void)expert;
    return family_name(&names, m, r, layer, buf, cap, e);
}

static err_code read_config(const cJSON *config, model_desc *out, err *e)
{
    bool bias;
    TRY(family_read_common(config, 2048, out, e));
    TRY(json_opt_bool(config, "bias", false, &bias, e));
    out->qkv = QKV_GROUPED;
    out->qkv_bias = out->o_bias = bias;
    return OK;
}

static const char *const architectures[] = {"InternLM2ForCausalLM", NULL};

const family family_internlm2 = {
    .name = "internlm2",
    .architectures = architectures,
    .read_config = read_config,
    .tensor_name = tensor_name,
    .smooth = smooth,
    .n_smooth = 3,
    .chat_template = "internlm2",
};
