/* Mistral 7B and Nemo: Llama's block and names; all layers share one sliding window, 4096 when the
 * config is silent, none when it says null. */
#include "formats/family_common.h"

static err_code read_config(const cJSON *config, model_desc *out, err *e)
{
    TRY(family_read_common(config, 32768, out, e));
    TRY(family_read_window(config, 4096, &out->sliding_window, e));
    return family_read_layer_types(config, out, e);
}

static const char *const architectures[] = {"MistralForCausalLM", NULL};

const family family_mistral = {
    .name = "mistral",
    .architectures = architectures,
    .read_config = read_config,
    .tensor_name = family_llama_name,
    .smooth = family_llama_smooth,
    .n_smooth = 3,
    .chat_template = "mistral",
};
