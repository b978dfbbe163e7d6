/* Yi and Yi-1.5: Llama's block, names and architecture string with a tokenizer and a chat form of
 * its own. Its vocabulary of 64,000 is what tells it apart; the worst that a wrong guess does is
 * another default chat template. */
#include <string.h>

#include "formats/family_common.h"

static bool match(const cJSON *config)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(config, "model_type");
    const cJSON *vocab = cJSON_GetObjectItemCaseSensitive(config, "vocab_size");
    if (cJSON_IsString(type) &&
        (strcmp(type->valuestring, "Yi") == 0 || strcmp(type->valuestring, "yi") == 0))
        return true;
    return cJSON_IsNumber(vocab) && vocab->valuedouble == 64000;
}

static err_code read_config(const cJSON *config, model_desc *out, err *e)
{
    return family_read_common(config, 4096, out, e);
}

static const char *const architectures[] = {"LlamaForCausalLM", NULL};

const family family_yi = {
    .name = "yi",
    .architectures = architectures,
    .match = match,
    .read_config = read_config,
    .tensor_name = family_llama_name,
    .smooth = family_llama_smooth,
    .n_smooth = 3,
    .chat_template = "yi",
};
