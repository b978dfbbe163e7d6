/* What the Llama-like families share: the config keys that mean the same in all of them, and names
 * by table. Private to the family_*.c files. */
#ifndef TMF_FORMATS_FAMILY_COMMON_H
#define TMF_FORMATS_FAMILY_COMMON_H

#include "formats/family.h"

extern const family family_internlm2, family_llama, family_mistral, family_qwen2, family_yi;

typedef struct {
    const char *model[ROLE_COUNT]; /* whole name of roles with layer -1 */
    const char *layer;             /* "model.layers." */
    const char *part[ROLE_COUNT];  /* behind "<layer><i>.", NULL: the family has no such tensor */
} family_names;

/* E_INPUT when the family has no such tensor, E_LIMIT when buf is too small. */
err_code family_name(const family_names *t, const model_desc *m, tensor_role r, int32_t layer,
                     char *buf, size_t cap, err *e);
/* Names of Llama and of all that kept them. */
err_code family_llama_name(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                           char *buf, size_t cap, err *e);
/* input norm -> q, k, v; post-attention norm -> gate, up; up -> down. */
extern const smooth_group family_llama_smooth[3];

/* Sizes, norm, rope with scaling, token ids, dtype, tied head; SPLIT projections without biases or
 * window. max_tokens: when the config does not say. Families then set what is their own. */
err_code family_read_common(const cJSON *config, int32_t max_tokens, model_desc *out, err *e);
/* A key whose absence means `absent` while an explicit null means none (0). */
err_code family_read_window(const cJSON *config, int32_t absent, int32_t *out, err *e);
/* `layer_types` of newer configs, which overrides the first sliding layer when there; then window
 * and first layer are 0 when no layer slides. Call after both are set. */
err_code family_read_layer_types(const cJSON *config, model_desc *out, err *e);
/* eos_token_id and its like: an integer, a list or null. Appends ids that are new; first gets the
 * first one or keeps its value. */
err_code family_read_ids(const cJSON *o, const char *key, model_desc *m, int32_t *first, err *e);

#endif
