/* A letter, then any bytes as a regular expression (r), a JSON schema (s) or tools (t): refused
 * with one line, or a grammar in which random answers never get stuck and, of schemas and tools,
 * are JSON where they should be. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "support/byte_tokenizer.h"
#include "support/grammar_walk.h"

#include "runtime/serve/grammar.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static grammar_set *the_set(const tokenizer **t)
{
    static grammar_set *set;
    static tokenizer *bytes;
    err e;
    if (!set) {
        static char json[16 << 10];
        const size_t n = byte_tokenizer_json(json,
                                             "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}");
        need(tokenizer_open_memory(&bytes, "tokenizer.json", json, n, &e) == OK);
        need(grammar_set_open(&set, bytes, &e) == OK);
    }
    *t = bytes;
    return set;
}

static void walk(const tokenizer *t, grammar *g, bool json, uint64_t seed)
{
    for (int i = 0; i < 3; i++) {
        walk_answer a = walk_random_answer(t, g, 20 + 40 * i, &seed);
        need(json_utf8_valid(a.text, a.n) || !a.done);
        if (a.done && json) {
            cJSON *o = cJSON_Parse(a.text);
            need(o != NULL);
            cJSON_Delete(o);
        }
        free(a.text);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const tokenizer *t;
    grammar_set *set = the_set(&t);
    grammar *g = NULL;
    err e = {OK, ""};
    err_code rc;
    if (n < 1 || n > 4000) return 0;
    char *text = calloc(1, n);
    memcpy(text, data + 1, n - 1);
    if (data[0] == 'r')
        rc = grammar_set_regex(set, &g, text, &e);
    else if (data[0] == 't')
        rc = grammar_set_tool_calls(set, &g, CHAT_TOOLS_LLAMA3, text, n - 1, NULL, false, &e);
    else
        rc = grammar_set_json_schema(set, &g, text, n - 1, &e);
    if (rc == OK) {
        walk(t, g, data[0] != 'r', n * 2654435761u + 1);
        grammar_close(&g);
    } else {
        need(!g && e.code == rc && strlen(e.msg) > 6);
        need(rc == E_INPUT || rc == E_LIMIT || rc == E_UNSUPPORTED || rc == E_NOMEM);
    }
    free(text);
    return 0;
}
