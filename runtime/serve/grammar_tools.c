/* The grammar of tool calls: each format's frame around name and arguments. */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_internal.h"

typedef struct {
    const char *open, *close; /* around all calls */
    const char *begin,
        *named;          /* before a call's name (JSON string), between it and the arguments */
    const char *end;     /* behind the arguments */
    const char *between; /* of two calls; NULL: there is no way to write two */
    bool bare;           /* the name stands as it is */
} frame;

static const frame frames[] = {
    [CHAT_TOOLS_NONE] = {"", "", "<tool_call>\n{\"name\": ", ", \"arguments\": ", "}\n</tool_call>",
                         "\n"},
    [CHAT_TOOLS_HERMES] = {"", "", "<tool_call>\n{\"name\": ", ", \"arguments\": ",
                           "}\n</tool_call>", "\n"},
    [CHAT_TOOLS_INTERNLM2] = {"", "", "<|action_start|><|plugin|>\n{\"name\": ",
                              ", \"parameters\": ", "}<|action_end|>", "\n"},
    [CHAT_TOOLS_LLAMA3] = {"", "", "{\"name\": ", ", \"parameters\": ", "}", "; "},
    [CHAT_TOOLS_MISTRAL] = {"[TOOL_CALLS] [", "]", "{\"name\": ", ", \"arguments\": ", "}", ", "},
    [CHAT_TOOLS_DEEPSEEK] = {.open = "<｜tool▁calls▁begin｜>",
                             .close = "<｜tool▁calls▁end｜>",
                             .begin = "<｜tool▁call▁begin｜>",
                             .named = "<｜tool▁sep｜>",
                             .end = "<｜tool▁call▁end｜>",
                             .between = "",
                             .bare = true},
};

static const cJSON *get(const cJSON *s, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(s, key);
}

static const cJSON *function_of(const cJSON *tool)
{
    const cJSON *f = get(tool, "function");
    return f ? f : tool; /* some write the function without its frame */
}

static err_code check_tools(const cJSON *tools, const char *only, err *e)
{
    const cJSON *t, *u;
    bool found = !only;
    if (!cJSON_IsArray(tools) || !tools->child)
        return err_set(e, E_INPUT, "tools: expected an array of tools");
    cJSON_ArrayForEach(t, tools)
    {
        const cJSON *name = get(function_of(t), "name"), *p = get(function_of(t), "parameters");
        if (!cJSON_IsString(name) || !name->valuestring[0])
            return err_set(e, E_INPUT, "tools: a function without a name");
        if (p && !cJSON_IsObject(p) && !cJSON_IsNull(p))
            return err_set(e, E_INPUT, "tools: '%.60s': parameters: expected a schema",
                           name->valuestring);
        found = found || !strcmp(only, name->valuestring);
        for (u = t->next; u; u = u->next) {
            const cJSON *other = get(function_of(u), "name");
            if (cJSON_IsString(other) && !strcmp(other->valuestring, name->valuestring))
                return err_set(e, E_INPUT, "tools: two are called '%.60s'", name->valuestring);
        }
    }
    return found ? OK : err_set(e, E_INPUT, "tools: there is none called '%.60s'", only);
}

/* One tool's call, from its name on. */
static err_code add_tool(grammar_json *j, int32_t from, const frame *f, const cJSON *tool,
                         int32_t to, err *e)
{
    grammar_build *b = j->b;
    const cJSON *p = get(function_of(tool), "parameters"), *name = get(function_of(tool), "name");
    int32_t at = f->bare ? grammar_literal(b, from, name->valuestring)
                         : grammar_json_value(b, from, name);
    at = grammar_literal(b, at, f->named);
    const int32_t done = grammar_state(b);
    if (p && p->child && !cJSON_IsNull(p)) {
        /* arguments are an object whatever else the schema would take */
        cJSON *object = cJSON_Duplicate(p, true);
        if (object && !get(object, "type") && !get(object, "$ref") && !get(object, "anyOf") &&
            !get(object, "oneOf") && !get(object, "allOf"))
            (void)cJSON_AddStringToObject(object, "type", "object");
        if (!object) return err_set(e, E_NOMEM, "tools: no memory");
        const err_code rc = grammar_schema_add(j, at, object, object, done, e);
        cJSON_Delete(object);
        if (rc != OK)
            return err_wrap(e, "tools: '%.60s'", get(function_of(tool), "name")->valuestring);
    } else {
        grammar_call(b, at, grammar_json_rule(j, JSON_RULE_OBJECT), done);
    }
    grammar_eps(b, grammar_literal(b, done, f->end), to);
    return b->rc;
}

enum { MOST_CALLS = 8 }; /* in one answer: a model that sees no end is given one */

static err_code add_tools(grammar_json *j, const cJSON *tools, const grammar_source *s, err *e)
{
    grammar_build *b = j->b;
    const frame *f = &frames[s->format];
    const grammar_rule top = b->rule[0];
    const cJSON *t;
    TRY(check_tools(tools, s->only, e));
    const int32_t rule = grammar_rule_new(b); /* a call from its name on */
    TRY(b->rc);
    const grammar_rule call = b->rule[rule];
    cJSON_ArrayForEach(t, tools)
    {
        if (s->only && strcmp(s->only, get(function_of(t), "name")->valuestring) != 0) continue;
        TRY(add_tool(j, call.start, f, t, call.end, e));
    }
    const int32_t close = grammar_state(b);
    int32_t at = grammar_literal(b, top.start, f->open);
    for (int i = 0; i < (s->parallel && !s->only ? MOST_CALLS : 1); i++) {
        if (i) at = grammar_literal(b, at, f->between);
        at = grammar_call_to(b, grammar_literal(b, at, f->begin), rule);
        grammar_eps(b, at, close);
    }
    grammar_eps(b, grammar_literal(b, close, f->close), top.end);
    return b->rc;
}

err_code grammar_tools_add(grammar_json *j, const grammar_source *s, err *e)
{
    cJSON *tools;
    TRY(json_parse(&tools, s->text, s->n, "tools", e));
    j->compact = true; /* as models are taught to write calls */
    const err_code rc = add_tools(j, tools, s, e);
    cJSON_Delete(tools);
    return rc;
}
