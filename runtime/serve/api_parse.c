/* Readers of parameters that have a form of their own. */
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/api_internal.h"

#define MAX_IDS     (1 << 24) /* of one prompt */
#define PARAM_BYTES sizeof(((api_fault *)0)->param)

/* A path into the request, cut where it gets too long. */
__attribute__((format(printf, 2, 3))) static void set_path(char *to, const char *fmt, ...)
{
    va_list args;
    va_start(args, fmt);
    (void)vsnprintf(to, PARAM_BYTES, fmt, args);
    va_end(args);
}

static err_code wrong(api_reading *x, const char *param, const char *expected, const cJSON *v)
{
    return api_fail(x->f, API_INVALID_VALUE, param, "'%s': expected %s, got %s", param, expected,
                    v ? api_json_kind(v) : "nothing");
}

static const cJSON *member(const cJSON *o, const char *key)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, key);
    return v && !cJSON_IsNull(v) ? v : NULL;
}

/* ---- texts in parts ---- */

typedef struct joined {
    struct joined *next;
    char text[];
} joined;

/* [{"type":"text","text":...}, ...] as one text, parts on lines of their own. */
static err_code join_parts(api_reading *x, const char *param, const cJSON *parts, const char **out)
{
    char at[PARAM_BYTES];
    size_t bytes = 1;
    int i = 0;
    void *p;
    for (const cJSON *v = parts->child; v; v = v->next, i++) {
        const cJSON *type = member(v, "type"), *text = member(v, "text");
        set_path(at, "%s[%d].type", param, i);
        if (!cJSON_IsString(type)) return wrong(x, at, "a string", type);
        if (strcmp(type->valuestring, "text") != 0)
            return api_fail(x->f, API_INVALID_VALUE, at,
                            "'%s': expected 'text', got '%.40s': this model reads text only", at,
                            type->valuestring);
        set_path(at, "%s[%d].text", param, i);
        if (!cJSON_IsString(text)) return wrong(x, at, "a string", text);
        bytes += strlen(text->valuestring) + 1;
    }
    TRY(api_alloc(x, &p, 1, sizeof(joined) + bytes));
    joined *j = p;
    j->next = x->r->joined;
    x->r->joined = j;
    char *to = j->text;
    for (const cJSON *v = parts->child; v; v = v->next) {
        const char *text = member(v, "text")->valuestring;
        const size_t n = strlen(text);
        if (to != j->text) *to++ = '\n';
        memcpy(to, text, n);
        to += n;
    }
    *to = 0;
    *out = j->text;
    return OK;
}

/* ---- messages ---- */

static err_code read_call(api_reading *x, const char *param, int i, const cJSON *v)
{
    char at[PARAM_BYTES];
    const cJSON *f = member(v, "function"), *name = member(f, "name"),
                *args = member(f, "arguments");
    set_path(at, "%s.tool_calls[%d].function", param, i);
    if (!cJSON_IsObject(f)) return wrong(x, at, "an object", f);
    set_path(at, "%s.tool_calls[%d].function.name", param, i);
    if (!cJSON_IsString(name)) return wrong(x, at, "a string", name);
    set_path(at, "%s.tool_calls[%d].function.arguments", param, i);
    if (args && !cJSON_IsString(args) && !cJSON_IsObject(args))
        return wrong(x, at, "a string", args);
    return OK;
}

static err_code read_calls(api_reading *x, const char *param, const cJSON *v, chat_message *m)
{
    char at[PARAM_BYTES];
    int i = 0;
    set_path(at, "%s.tool_calls", param);
    if (!cJSON_IsArray(v)) return wrong(x, at, "an array", v);
    for (const cJSON *c = v->child; c; c = c->next) TRY(read_call(x, param, i++, c));
    if (i) m->tool_calls = v;
    return OK;
}

static err_code read_text_of(api_reading *x, const char *param, const char *key, const cJSON *o,
                             const char **out)
{
    char at[PARAM_BYTES];
    const cJSON *v = member(o, key);
    set_path(at, "%s.%s", param, key);
    if (v && !cJSON_IsString(v)) return wrong(x, at, "a string", v);
    *out = v ? v->valuestring : NULL;
    return OK;
}

static bool known_role(const char *role)
{
    static const char *const roles[] = {"system", "developer", "user", "assistant", "tool"};
    for (size_t i = 0; i < sizeof roles / sizeof roles[0]; i++)
        if (strcmp(role, roles[i]) == 0) return true;
    return false;
}

static err_code read_message(api_reading *x, const char *param, const cJSON *v, chat_message *m)
{
    char at[PARAM_BYTES];
    if (!cJSON_IsObject(v)) return wrong(x, param, "an object", v);
    const cJSON *role = member(v, "role"), *content = member(v, "content");
    set_path(at, "%s.role", param);
    if (!cJSON_IsString(role)) return wrong(x, at, "a string", role);
    if (!known_role(role->valuestring))
        return api_fail(x->f, API_INVALID_VALUE, at,
                        "'%s': expected system, developer, user, assistant or tool, got '%.40s'",
                        at, role->valuestring);
    m->role = strcmp(role->valuestring, "developer") == 0 ? "system" : role->valuestring;
    if (strcmp(m->role, "assistant") == 0) {
        const cJSON *calls = member(v, "tool_calls");
        if (calls) TRY(read_calls(x, param, calls, m));
        TRY(read_text_of(x, param, "reasoning_content", v, &m->reasoning));
    }
    TRY(read_text_of(x, param, "name", v, &m->name));
    TRY(read_text_of(x, param, "tool_call_id", v, &m->tool_call_id));
    set_path(at, "%s.content", param);
    if (cJSON_IsArray(content)) return join_parts(x, at, content, &m->content);
    if (!content && m->tool_calls) return OK;
    if (!cJSON_IsString(content)) return wrong(x, at, "a string or an array of parts", content);
    m->content = content->valuestring;
    return OK;
}

err_code api_read_messages(api_reading *x, const char *name, const cJSON *v)
{
    char param[PARAM_BYTES];
    void *p;
    /* LMDeploy's servers take a plain string as the user's one message. */
    const int n = cJSON_IsString(v) ? 1 : cJSON_IsArray(v) ? cJSON_GetArraySize(v) : -1;
    if (n < 0) return wrong(x, name, "an array", v);
    if (n < 1 || n > API_MAX_MESSAGES)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected 1 to %d of them, got %d",
                        name, API_MAX_MESSAGES, n);
    TRY(api_alloc(x, &p, (size_t)n, sizeof(chat_message)));
    x->r->messages = p;
    x->r->n_messages = n;
    if (cJSON_IsString(v)) {
        x->r->messages[0] = (chat_message){.role = "user", .content = v->valuestring};
        return OK;
    }
    int i = 0;
    for (const cJSON *m = v->child; m; m = m->next, i++) {
        set_path(param, "%s[%d]", name, i);
        TRY(read_message(x, param, m, &x->r->messages[i]));
    }
    return OK;
}

/* ---- prompts ---- */

static err_code read_ids(api_reading *x, const char *param, const cJSON *v, int32_t *ids, int n)
{
    int i = 0;
    for (const cJSON *id = v->child; id && i < n; id = id->next, i++) {
        const double d = id->valuedouble;
        char at[PARAM_BYTES];
        set_path(at, "%s[%d]", param, i);
        if (!cJSON_IsNumber(id)) return wrong(x, at, "a token id", id);
        if (d != floor(d) || d < 0 || d >= x->l->vocab)
            return api_fail(x->f, API_INVALID_VALUE, at,
                            "'%s': expected an id from 0 to %d, got %.17g", at, x->l->vocab - 1, d);
        ids[i] = (int32_t)d;
    }
    return OK;
}

static err_code read_one_prompt(api_reading *x, const char *param, const cJSON *v, api_prompt *p)
{
    void *ids;
    if (cJSON_IsString(v)) {
        p->text = v->valuestring;
        return OK;
    }
    if (!cJSON_IsArray(v)) return wrong(x, param, "a string or token ids", v);
    const int n = cJSON_GetArraySize(v);
    if (n < 1 || n > MAX_IDS)
        return api_fail(x->f, API_INVALID_VALUE, param, "'%s': expected 1 to %d ids, got %d", param,
                        MAX_IDS, n);
    TRY(api_alloc(x, &ids, (size_t)n, sizeof(int32_t)));
    p->ids = ids;
    p->n_ids = n;
    return read_ids(x, param, v, p->ids, n);
}

err_code api_read_prompt(api_reading *x, const char *name, const cJSON *v)
{
    char param[PARAM_BYTES];
    void *p;
    const cJSON *first = cJSON_IsArray(v) ? v->child : NULL;
    if (x->r->who == API_INTERACTIVE) return api_read_messages(x, name, v);
    if (x->r->prompts)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': there is another input", name);
    const bool list = first && !cJSON_IsNumber(first);
    const int n = list ? cJSON_GetArraySize(v) : 1;
    if (cJSON_IsArray(v) && !first) return wrong(x, name, "a text or ids, not an empty list", v);
    if (n > API_MAX_PROMPTS)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected at most %d of them, got %d",
                        name, API_MAX_PROMPTS, n);
    TRY(api_alloc(x, &p, (size_t)n, sizeof(api_prompt)));
    x->r->prompts = p;
    x->r->n_prompts = n;
    x->r->prompt_list = list;
    if (!list) return read_one_prompt(x, name, v, x->r->prompts);
    int i = 0;
    for (const cJSON *one = first; one; one = one->next, i++) {
        set_path(param, "%s[%d]", name, i);
        TRY(read_one_prompt(x, param, one, &x->r->prompts[i]));
    }
    return OK;
}

err_code api_read_tokens(api_reading *x, const char *name, const cJSON *v)
{
    if (!cJSON_IsArray(v)) return wrong(x, name, "an array of token ids", v);
    if (x->r->prompts)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': there is another input", name);
    void *p;
    TRY(api_alloc(x, &p, 1, sizeof(api_prompt)));
    x->r->prompts = p;
    x->r->n_prompts = 1;
    return v->child ? read_one_prompt(x, name, v, x->r->prompts) : OK;
}

/* ---- stops, bias, seed ---- */

static err_code add_stop(api_reading *x, const char *param, const cJSON *v, size_t *bytes)
{
    if (!cJSON_IsString(v)) return wrong(x, param, "a string", v);
    const size_t n = strlen(v->valuestring);
    if (n == 0 || n > API_MAX_STOP_BYTES - *bytes)
        return api_fail(x->f, API_INVALID_VALUE, param,
                        "'%s': expected 1 to %zu bytes, got %zu (%d in all stop texts)", param,
                        API_MAX_STOP_BYTES - *bytes, n, API_MAX_STOP_BYTES);
    *bytes += n;
    x->r->stops[x->r->n_stops++] = v->valuestring;
    return OK;
}

err_code api_read_stop(api_reading *x, const char *name, const cJSON *v)
{
    char param[PARAM_BYTES];
    size_t bytes = 0;
    int i = 0;
    if (cJSON_IsString(v)) return add_stop(x, name, v, &bytes);
    if (!cJSON_IsArray(v)) return wrong(x, name, "a string or an array of strings", v);
    if (cJSON_GetArraySize(v) > API_MAX_STOPS)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected at most %d texts, got %d",
                        name, API_MAX_STOPS, cJSON_GetArraySize(v));
    for (const cJSON *s = v->child; s; s = s->next) {
        set_path(param, "%s[%d]", name, i++);
        TRY(add_stop(x, param, s, &bytes));
    }
    return OK;
}

err_code api_read_stop_ids(api_reading *x, const char *name, const cJSON *v)
{
    if (!cJSON_IsArray(v)) return wrong(x, name, "an array of token ids", v);
    const int n = cJSON_GetArraySize(v);
    if (n > API_MAX_STOP_IDS)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected at most %d ids, got %d",
                        name, API_MAX_STOP_IDS, n);
    TRY(read_ids(x, name, v, x->r->stop_ids, n));
    x->r->n_stop_ids = n;
    return OK;
}

err_code api_read_bias(api_reading *x, const char *name, const cJSON *v)
{
    void *p;
    char param[PARAM_BYTES];
    int n = 0;
    if (!cJSON_IsObject(v)) return wrong(x, name, "an object", v);
    if (cJSON_GetArraySize(v) > API_MAX_BIAS)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected at most %d ids, got %d",
                        name, API_MAX_BIAS, cJSON_GetArraySize(v));
    TRY(api_alloc(x, &p, (size_t)cJSON_GetArraySize(v), sizeof(logit_bias)));
    x->r->bias = p;
    for (const cJSON *b = v->child; b; b = b->next) {
        char *end;
        errno = 0;
        const long id = strtol(b->string, &end, 10);
        set_path(param, "%s.%.40s", name, b->string);
        if (end == b->string || *end || errno || id < 0 || id >= x->l->vocab)
            return api_fail(x->f, API_INVALID_VALUE, param,
                            "'%s': expected an id from 0 to %d as the key", param, x->l->vocab - 1);
        if (!cJSON_IsNumber(b) || !(fabs(b->valuedouble) <= 100))
            return api_fail(x->f, API_INVALID_VALUE, param,
                            "'%s': expected a number from -100 to 100", param);
        x->r->bias[n++] = (logit_bias){(int32_t)id, (float)b->valuedouble};
    }
    x->r->sample.bias = x->r->bias;
    x->r->sample.n_bias = n;
    return OK;
}

err_code api_read_logprobs(api_reading *x, const char *name, const cJSON *v)
{
    if (x->r->who == API_CHAT) {
        if (!cJSON_IsBool(v)) return wrong(x, name, "a boolean", v);
        if (cJSON_IsTrue(v)) x->r->top_logprobs = 0;
        return OK;
    }
    if (cJSON_IsFalse(v)) return OK;
    const double d = v->valuedouble;
    if (!cJSON_IsNumber(v) || d != floor(d)) return wrong(x, name, "an integer", v);
    if (d < 0 || d > API_MAX_TOP)
        return api_fail(x->f, API_INVALID_VALUE, name,
                        "'%s': expected an integer from 0 to %d, got %.17g", name, API_MAX_TOP, d);
    x->r->top_logprobs = (int64_t)d;
    return OK;
}

/* The number behind a key of the outermost object, as it was written: cJSON's doubles lose
 * integers above 2^53. NULL when it is not found (a key written with escapes). The text has been
 * checked: it is one object, and strings end. */
static const char *raw_number(const char *s, size_t n, const char *key)
{
    const size_t len = strlen(key);
    int depth = 0;
    for (size_t i = 0; i < n; i++) {
        if (s[i] == '{' || s[i] == '[') depth++;
        if (s[i] == '}' || s[i] == ']') depth--;
        if (s[i] != '"') continue;
        const size_t from = ++i;
        while (i < n && s[i] != '"') i += s[i] == '\\' ? 2 : 1;
        if (depth != 1 || i - from != len || memcmp(s + from, key, len) != 0) continue;
        for (i++; i < n && strchr(" \t\r\n", s[i]); i++) {
        }
        if (i >= n || s[i] != ':') continue; /* a value that looks like the key */
        for (i++; i < n && strchr(" \t\r\n", s[i]); i++) {
        }
        return i < n ? s + i : NULL;
    }
    return NULL;
}

err_code api_read_seed(api_reading *x, const char *name, const cJSON *v)
{
    const double d = v->valuedouble;
    if (!cJSON_IsNumber(v) || d != floor(d)) return wrong(x, name, "an integer", v);
    if (d < -0x1p63 || d > 0x1p64)
        return api_fail(x->f, API_INVALID_VALUE, name,
                        "'%s': expected an integer from -2^63 to 2^64-1, got %.17g", name, d);
    const char *raw = raw_number(x->text, x->n, name);
    char digits[72], *end;
    size_t n = 0;
    while (raw && n < sizeof digits - 1 && strchr("-0123456789.eE+", raw[n]) && raw[n]) n++;
    if (raw) memcpy(digits, raw, n);
    digits[n] = 0;
    errno = 0;
    const bool minus = *digits == '-';
    const uint64_t u = minus ? (uint64_t)strtoll(digits, &end, 10) : strtoull(digits, &end, 10);
    if (n && !*end && errno)
        return api_fail(x->f, API_INVALID_VALUE, name,
                        "'%s': expected an integer from -2^63 to 2^64-1, got %s", name, digits);
    if (n && !*end)
        x->r->sample.seed = u;
    else /* written with an exponent: whole, so within what a double holds exactly */
        x->r->sample.seed = d < 0 ? (uint64_t)(int64_t)d : d < 0x1p64 ? (uint64_t)d : UINT64_MAX;
    return OK;
}

err_code api_read_best_of(api_reading *x, const char *name, const cJSON *v)
{
    if (cJSON_IsNumber(v) && v->valuedouble == 1) return OK;
    return api_fail(x->f, API_INVALID_VALUE, name, "'%s': only 1 is supported", name);
}

err_code api_read_stream_options(api_reading *x, const char *name, const cJSON *v)
{
    if (!cJSON_IsObject(v)) return wrong(x, name, "an object", v);
    const cJSON *usage = member(v, "include_usage");
    if (usage && !cJSON_IsBool(usage))
        return wrong(x, "stream_options.include_usage", "a boolean", usage);
    x->r->include_usage = cJSON_IsTrue(usage);
    return OK;
}

err_code api_read_kwargs(api_reading *x, const char *name, const cJSON *v)
{
    char param[PARAM_BYTES];
    const cJSON *o;
    if (!cJSON_IsObject(v)) return wrong(x, name, "an object", v);
    cJSON_ArrayForEach(o, v)
    {
        int i = 0;
        while (chat_kwarg_at(i) && strcmp(chat_kwarg_at(i), o->string) != 0) i++;
        if (chat_kwarg_at(i)) continue;
        set_path(param, "%s.%.60s", name, o->string);
        return api_fail(x->f, API_INVALID_VALUE, param, "'%s': not one of the keys that are taken",
                        param);
    }
    x->r->kwargs = v;
    return OK;
}

/* ---- tools and formats ---- */

static bool tool_name_ok(const char *s)
{
    const size_t n = strlen(s);
    return n > 0 && n <= 64 &&
           s[strspn(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                       "0123456789_-.")] == 0;
}

static err_code read_tool(api_reading *x, int i, const cJSON *v, const cJSON *first)
{
    char at[PARAM_BYTES];
    const cJSON *type = member(v, "type"), *f = member(v, "function");
    set_path(at, "tools[%d].type", i);
    if (!cJSON_IsString(type) || strcmp(type->valuestring, "function") != 0)
        return wrong(x, at, "'function'", type);
    set_path(at, "tools[%d].function", i);
    if (!cJSON_IsObject(f)) return wrong(x, at, "an object", f);
    const cJSON *name = member(f, "name"), *parameters = member(f, "parameters");
    set_path(at, "tools[%d].function.name", i);
    if (!cJSON_IsString(name) || !tool_name_ok(name->valuestring))
        return api_fail(x->f, API_INVALID_VALUE, at,
                        "'%s': expected 1 to 64 letters, digits, '_', '-' or '.'", at);
    for (const cJSON *o = first; o != v; o = o->next) {
        const char *other = member(member(o, "function"), "name")->valuestring;
        if (strcmp(other, name->valuestring) == 0)
            return api_fail(x->f, API_INVALID_VALUE, at, "'%s': another tool has this name", at);
    }
    set_path(at, "tools[%d].function.parameters", i);
    if (parameters && !cJSON_IsObject(parameters)) return wrong(x, at, "an object", parameters);
    return OK;
}

static err_code print(api_reading *x, const cJSON *v, char **out)
{
    err e;
    return json_print(out, v, false, &e) == OK ? OK : api_fail_err(x->f, &e, NULL);
}

err_code api_read_tools(api_reading *x, const char *name, const cJSON *v)
{
    int i = 0;
    if (!cJSON_IsArray(v)) return wrong(x, name, "an array", v);
    if (cJSON_GetArraySize(v) > API_MAX_TOOLS)
        return api_fail(x->f, API_INVALID_VALUE, name, "'%s': expected at most %d, got %d", name,
                        API_MAX_TOOLS, cJSON_GetArraySize(v));
    for (const cJSON *t = v->child; t; t = t->next) TRY(read_tool(x, i++, t, v->child));
    if (i == 0) return OK;
    x->r->tools = v;
    return print(x, v, &x->r->tools_text);
}

err_code api_read_tool_choice(api_reading *x, const char *name, const cJSON *v)
{
    static const char *const words[] = {"auto", "none", "required"};
    if (cJSON_IsString(v)) {
        for (int i = 0; i < 3; i++) {
            if (strcmp(v->valuestring, words[i]) != 0) continue;
            x->r->choice = (api_choice)i;
            return OK;
        }
        return api_fail(x->f, API_INVALID_VALUE, name,
                        "'%s': expected none, auto, required or a function, got '%.40s'", name,
                        v->valuestring);
    }
    if (!cJSON_IsObject(v)) return wrong(x, name, "a string or an object", v);
    const cJSON *tool = member(member(v, "function"), "name");
    if (!cJSON_IsString(tool)) return wrong(x, "tool_choice.function.name", "a string", tool);
    for (const cJSON *t = x->r->tools ? x->r->tools->child : NULL; t; t = t->next) {
        if (strcmp(member(member(t, "function"), "name")->valuestring, tool->valuestring) != 0)
            continue;
        x->r->choice = API_TOOLS_NAMED;
        x->r->tool_name = tool->valuestring;
        return OK;
    }
    return api_fail(x->f, API_INVALID_VALUE, "tool_choice.function.name",
                    "'tool_choice.function.name': no tool is called '%.64s'", tool->valuestring);
}

static err_code read_schema(api_reading *x, const cJSON *v)
{
    const cJSON *holder = member(v, "json_schema"), *schema = member(holder, "schema");
    if (!cJSON_IsObject(holder))
        return wrong(x, "response_format.json_schema", "an object", holder);
    if (!schema) schema = member(holder, "json_schema"); /* LMDeploy's habit */
    if (!cJSON_IsObject(schema) && !cJSON_IsBool(schema))
        return wrong(x, "response_format.json_schema.schema", "an object", schema);
    x->r->format = API_FORMAT_SCHEMA;
    return print(x, schema, &x->r->schema);
}

err_code api_read_format(api_reading *x, const char *name, const cJSON *v)
{
    if (!cJSON_IsObject(v)) return wrong(x, name, "an object", v);
    const cJSON *type = member(v, "type"), *regex = member(v, "regex");
    if (!cJSON_IsString(type)) return wrong(x, "response_format.type", "a string", type);
    if (strcmp(type->valuestring, "text") == 0) return OK;
    if (strcmp(type->valuestring, "json_schema") == 0) return read_schema(x, v);
    if (strcmp(type->valuestring, "json_object") == 0) {
        x->r->format = API_FORMAT_OBJECT;
        return OK;
    }
    if (strcmp(type->valuestring, "regex") != 0 && strcmp(type->valuestring, "regex_schema") != 0)
        return api_fail(x->f, API_INVALID_VALUE, "response_format.type",
                        "'response_format.type': expected text, json_object, json_schema or "
                        "regex, got '%.40s'",
                        type->valuestring);
    if (!regex) regex = member(v, "regex_schema");
    if (!cJSON_IsString(regex)) return wrong(x, "response_format.regex", "a string", regex);
    x->r->format = API_FORMAT_REGEX;
    x->r->regex = regex->valuestring;
    return OK;
}
