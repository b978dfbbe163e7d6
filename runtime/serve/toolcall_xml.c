#include "runtime/serve/toolcall_xml.h"

#include <string.h>
#include <strings.h>

#include "base/mem.h"

static const cJSON *get(const cJSON *o, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(o, key);
}

static const cJSON *schema_of(const cJSON *tools, const char *tool, const char *key)
{
    const cJSON *t;
    cJSON_ArrayForEach(t, tools)
    {
        const cJSON *f = get(t, "function"), *name = get(f, "name");
        if (cJSON_IsString(name) && strcmp(name->valuestring, tool) == 0)
            return get(get(get(f, "parameters"), "properties"), key);
    }
    return NULL;
}

static bool is_type(const cJSON *schema, const char *type)
{
    const cJSON *t = get(schema, "type"), *one;
    if (cJSON_IsString(t)) return strcmp(t->valuestring, type) == 0;
    cJSON_ArrayForEach(one,
                       t) if (cJSON_IsString(one) && !strcmp(one->valuestring, type)) return true;
    return false;
}

/* Nothing is known: a string, as is what may be one. */
static bool is_text(const cJSON *schema)
{
    return !schema || is_type(schema, "string") ||
           !(get(schema, "type") || get(schema, "anyOf") || get(schema, "oneOf") ||
             get(schema, "$ref"));
}

/* What models write as another language has it. */
static const char *as_json(const cJSON *schema, const char *value)
{
    if (is_type(schema, "boolean") && strcasecmp(value, "true") == 0) return "true";
    if (is_type(schema, "boolean") && strcasecmp(value, "false") == 0) return "false";
    return strcmp(value, "None") == 0 ? "null" : value;
}

static err_code print_string(char **out, const char *s, err *e)
{
    cJSON *o = cJSON_CreateString(s);
    if (!o) return err_set(e, E_NOMEM, "tool call: out of memory");
    const err_code rc = json_print(out, o, false, e);
    cJSON_Delete(o);
    return rc;
}

static err_code print_value(char **out, const cJSON *schema, const char *value, err *e)
{
    cJSON *o = NULL;
    err ignored;
    if (!is_text(schema)) {
        const char *text = as_json(schema, value);
        const bool ok = json_parse(&o, text, strlen(text), "argument", &ignored) == OK;
        cJSON_Delete(o);
        if (ok) return mem_strdup(out, text, e);
    }
    return print_string(out, value, e);
}

err_code toolcall_xml_argument(char **out, const cJSON *tools, const char *tool, const char *key,
                               const char *value, err *e)
{
    char *k = NULL, *v = NULL;
    void *p = NULL;
    err_code rc = print_string(&k, key, e);
    if (rc == OK) rc = print_value(&v, schema_of(tools, tool, key), value, e);
    if (rc == OK) rc = mem_alloc(&p, strlen(k) + strlen(v) + 3, 1, "tool call", e);
    if (rc == OK) {
        char *text = p;
        const size_t n = strlen(k);
        memcpy(text, k, n);
        memcpy(text + n, ": ", 2);
        strcpy(text + n + 2, v);
        *out = text;
    }
    mem_free(k);
    mem_free(v);
    return rc;
}
