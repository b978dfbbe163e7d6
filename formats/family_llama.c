/* Llama 1, 2, 3, 3.1, 3.2 and what took over their names and config. */
#include "formats/family_common.h"

static err_code read_config(const cJSON *config, model_desc *out, err *e)
{
    bool attention_bias, mlp_bias;
    TRY(family_read_common(config, 2048, out, e));
    TRY(json_opt_bool(config, "attention_bias", false, &attention_bias, e));
    TRY(json_opt_bool(config, "mlp_bias", false, &mlp_bias, e));
    if (mlp_bias)
        return err_set(e, E_UNSUPPORTED,
                       "key 'mlp_bias': biases in the feed-forward part are not supported");
    out->qkv_bias = out->o_bias = attention_bias;
    return family_read_layer_types(config, out, e);
}

/* The 128,256 tokens are those of Llama 3; its 3.1 and later have the rope scaling. */
static const char *template_for(const model_desc *m)
{
    if (m->vocab != 128256) return "llama2";
    return m->scaling.kind == ROPE_LLAMA3 ? "llama3_1" : "llama3";
}

static const char *const architectures[] = {"LlamaForCausalLM", "LLaMAForCausalLM", NULL};

const family family_llama = {
    .name = "llama",
    .architectures = architectures,
    .read_config = read_config,
    .tensor_name = family_llama_name,
    .smooth = family_llama_smooth,
    .n_smooth = 3,
    .chat_template = "llama2",
    .template_for = template_for,
};
