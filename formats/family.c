/* The table of families. A new one is a line here and a file family_<name>.c. */
#include "formats/family_common.h"

#include <stdio.h>
#include <string.h>

/* Those with a match come before the one whose architecture they share. */
static const family *const families[] = {&family_internlm2, &family_yi, &family_llama,
                                         &family_mistral, &family_qwen2};
enum { N_FAMILIES = sizeof families / sizeof families[0] };

static bool family_accepts(const family *f, const char *architecture, const cJSON *config)
{
    for (const char *const *a = f->architectures; *a; a++)
        if (strcmp(*a, architecture) == 0) return !f->match || f->match(config);
    return false;
}

/* "InternLM2ForCausalLM, LlamaForCausalLM, ...": each once. */
static void family_list(char *buf, size_t cap)
{
    size_t at = 0;
    buf[0] = 0;
    for (int i = 0; i < N_FAMILIES; i++) {
        const char *a = families[i]->architectures[0];
        if (strstr(buf, a)) continue;
        const int n = snprintf(buf + at, cap - at, "%s%s", at ? ", " : "", a);
        if (n < 0 || (size_t)n >= cap - at) return;
        at += (size_t)n;
    }
}

err_code family_of_config(const family **out, const cJSON *config, err *e)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(config, "architectures");
    const cJSON *first = cJSON_IsArray(list) ? cJSON_GetArrayItem(list, 0) : NULL;
    char known[256];
    *out = NULL;
    if (!cJSON_IsString(first))
        return err_set(e, E_INPUT,
                       "key 'architectures': expected a list that begins with a string");
    for (int i = 0; i < N_FAMILIES && !*out; i++)
        if (family_accepts(families[i], first->valuestring, config)) *out = families[i];
    if (*out) return OK;
    family_list(known, sizeof known);
    return err_set(e, E_UNSUPPORTED, "architecture '%.64s' is not known; known are %s",
                   first->valuestring, known);
}

const family *family_by_name(const char *name)
{
    for (int i = 0; i < N_FAMILIES; i++)
        if (strcmp(families[i]->name, name) == 0) return families[i];
    return NULL;
}

const char *family_chat_template(const model_desc *m)
{
    const family *f = family_by_name(m->family);
    if (!f) return NULL;
    return f->template_for ? f->template_for(m) : f->chat_template;
}

err_code family_tensor_name(const model_desc *m, tensor_role r, int32_t layer, int32_t expert,
                            char *buf, size_t cap, err *e)
{
    const family *f = family_by_name(m->family);
    if (!f) return err_set(e, E_UNSUPPORTED, "family '%.32s' is not known", m->family);
    return f->tensor_name(m, r, layer, expert, buf, cap, e);
}
