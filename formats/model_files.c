/* The one list of side files that travel with a model. */
#include "formats/model_files.h"

#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

static const char *const exact[] = {
    "added_tokens.json", "chat_template.jinja", "chat_template.json",      "generation_config.json",
    "merges.txt",        "tokenizer.json",      "special_tokens_map.json", "tokenizer.model",
    "vocab.json",        "vocab.txt",           "tokenizer_config.json",   "USE_POLICY.md",
};
static const char *const prefixes[] = {"LICENSE", "LICENCE", "NOTICE"};
static const char *const suffixes[] = {".tiktoken", ".py"};

#define COUNT(a) (sizeof(a) / sizeof *(a))

static bool goes_along(const char *name)
{
    const size_t n = strlen(name);
    for (size_t i = 0; i < COUNT(exact); i++)
        if (strcmp(name, exact[i]) == 0) return true;
    for (size_t i = 0; i < COUNT(prefixes); i++)
        if (strncmp(name, prefixes[i], strlen(prefixes[i])) == 0) return true;
    for (size_t i = 0; i < COUNT(suffixes); i++) {
        const size_t s = strlen(suffixes[i]);
        if (n > s && strcmp(name + n - s, suffixes[i]) == 0) return true;
    }
    return false;
}

err_code model_files_list(dir_list *out, const char *dir, err *e)
{
    size_t kept = 0;

    TRY(dir_list_open(out, dir, e));
    for (size_t i = 0; i < out->n; i++) {
        if (goes_along(out->names[i]))
            out->names[kept++] = out->names[i];
        else
            mem_free(out->names[i]);
    }
    out->n = kept;
    return OK;
}
