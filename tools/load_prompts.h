/* Request bodies for tm-run bench-serve: prompts of a file, or of a given length. */
#ifndef TMF_TOOLS_LOAD_PROMPTS_H
#define TMF_TOOLS_LOAD_PROMPTS_H

#include "tools/http_client.h"

typedef struct {
    const char *model, *file; /* file NULL: made up */
    int64_t prompt_tokens, new_tokens;
    bool chat;   /* /v1/chat/completions; else /v1/completions */
    bool at_eos; /* an answer may end by itself */
    bool shared; /* every prompt made up is the same one, for the prefix cache */
    double temperature;
    uint64_t seed;
} load_prompts_opts;

typedef struct load_prompts load_prompts;
/* Reads the file: a line is a prompt, or in a file *.jsonl an object with "prompt" (text or ids) or
 * "messages". Without one, words are turned into ids by the server's /tokenize where it has that:
 * lengths are exact then (completions), else a word is taken for a token. h is borrowed for the
 * call. */
err_code load_prompts_open(load_prompts **out, const load_prompts_opts *o, http_client *h,
                           const job *j, err *e);
void load_prompts_close(load_prompts **p);
bool load_prompts_exact(const load_prompts *p); /* made up, of exactly prompt_tokens */
/* Body of the i-th request, which depends on i and the seed alone; *path is where it goes. Free
 * with mem_free. */
err_code load_prompts_body(load_prompts *p, int64_t i, char **body, const char **path, err *e);

/* A small generator (splitmix64), and a number in (0, 1]. */
uint64_t load_random(uint64_t *state);
double load_uniform(uint64_t *state);

#endif
