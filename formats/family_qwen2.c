/* Qwen1.5, Qwen2 and Qwen2.5 (dense): Llama's names, biases on q, k and v, the small ones with a
 * tied head. With use_sliding_window the first max_window_layers layers see everything and the
 * later ones slide. */
#include "formats/family_common.h"

static err_code read_window(const cJSON *config, model_desc *m, err *e)
{
    bool use;
    TRY(json_opt_bool(config, "use_sliding_window", false, &use, e));
    TRY(json_opt_i32(config, "max_window_layers", 0, MODEL_MAX_LAYERS, 28, &m->sliding_from, e));
    if (use) TRY(family_read_window(config, 4096, &m->sliding_window, e));
    return family_read_layer_types(config, m, e);
}

static err_code read_config(const cJSON *config, model_desc *out, err *e)
{
    TRY(family_read_common(config, 32768, out, e));
    out->qkv_bias = true;
    return read_window(config, out, e);
}

static const char *const architectures[] = {"Qwen2ForCausalLM", NULL};

const family family_qwen2 = {
    .name = "qwen2",
    .architectures = architectures,
    .read_config = read_config,
    .tensor_name = family_llama_name,
    .smooth = family_llama_smooth,
    .n_smooth = 3,
    .chat_template = "qwen",
};
