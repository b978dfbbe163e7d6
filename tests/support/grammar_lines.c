/* grammar_lines TOKENIZER_DIR WALKS SEED: reads lines {"schema": ...} or {"regex": "..."} and
 * writes for each a line {"error": code, "message": text} or {"answers": [text, ...],
 * "unfinished": n}. For scripts that compare with other implementations. */
#include <stdio.h>

#include "base/json.h"
#include "base/mem.h"
#include "runtime/serve/grammar.h"
#include "support/grammar_walk.h"

static cJSON *answers_of(const tokenizer *t, grammar *g, int walks, uint64_t *seed)
{
    cJSON *o = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(o, "answers");
    int unfinished = 0, stuck = 0;
    for (int i = 0; i < walks; i++) {
        walk_answer a = walk_random_answer(t, g, 10 + 10 * i, seed);
        if (a.done) cJSON_AddItemToArray(list, cJSON_CreateString(a.text));
        unfinished += !a.done;
        stuck += a.stuck;
        free(a.text);
    }
    cJSON_AddNumberToObject(o, "unfinished", unfinished);
    cJSON_AddNumberToObject(o, "stuck", stuck);
    return o;
}

static cJSON *line_of(const tokenizer *t, grammar_set *set, const cJSON *in, int walks,
                      uint64_t *seed)
{
    const cJSON *regex = cJSON_GetObjectItem(in, "regex");
    char *schema = cJSON_PrintUnformatted(cJSON_GetObjectItem(in, "schema"));
    grammar *g;
    cJSON *out;
    err e;
    const err_code rc = regex ? grammar_set_regex(set, &g, regex->valuestring, &e)
                              : grammar_set_json_schema(set, &g, schema ? schema : "",
                                                        schema ? strlen(schema) : 0, &e);
    if (rc == OK) {
        out = answers_of(t, g, walks, seed);
        grammar_close(&g);
    } else {
        out = cJSON_CreateObject();
        cJSON_AddStringToObject(out, "error", err_name(rc));
        cJSON_AddStringToObject(out, "message", e.msg);
    }
    cJSON_free(schema);
    return out;
}

int main(int argc, char **argv)
{
    static char line[1 << 20];
    tokenizer *t;
    grammar_set *set;
    err e;
    if (argc != 4) return 2;
    uint64_t seed = strtoull(argv[3], NULL, 10) + 88172645463325252u;
    if (tokenizer_open(&t, argv[1], &e) != OK || grammar_set_open(&set, t, &e) != OK) {
        fprintf(stderr, "%s\n", e.msg);
        return 1;
    }
    while (fgets(line, sizeof line, stdin)) {
        cJSON *in = cJSON_Parse(line), *out = line_of(t, set, in, atoi(argv[2]), &seed);
        char *text = cJSON_PrintUnformatted(out);
        puts(text);
        cJSON_free(text);
        cJSON_Delete(in);
        cJSON_Delete(out);
    }
    grammar_set_close(&set);
    tokenizer_close(&t);
    return 0;
}
