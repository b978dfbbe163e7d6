/* Two schemas at once, where that can be said in one, and schemas that cannot hold at once. */
#include <string.h>

#include "runtime/serve/grammar_internal.h"

static const cJSON *get(const cJSON *s, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(s, key);
}

bool grammar_annotation(const char *key)
{
    static const char *const keys[] = {"$schema",     "$id",           "$comment",    "$defs",
                                       "definitions", "title",         "description", "default",
                                       "examples",    "example",       "deprecated",  "readOnly",
                                       "writeOnly",   "discriminator", "strict"};
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (!strcmp(keys[i], key)) return true;
    return !strncmp(key, "x-", 2);
}

/* ---- types ---- */

static bool type_listed(const cJSON *t, const char *name)
{
    const cJSON *v;
    if (cJSON_IsString(t)) return !strcmp(t->valuestring, name);
    cJSON_ArrayForEach(v, t) if (cJSON_IsString(v) && !strcmp(v->valuestring, name)) return true;
    return false;
}

static const char *const type_names[] = {"null",   "boolean", "integer", "number",
                                         "string", "array",   "object"};

/* Whether values of a named type are allowed: an integer is a number, too. */
static bool type_allows(const cJSON *t, const char *name)
{
    return !t || type_listed(t, name) || (!strcmp(name, "integer") && type_listed(t, "number"));
}

static cJSON *both_types(const cJSON *a, const cJSON *b)
{
    cJSON *out = cJSON_CreateArray();
    for (int i = 0; out && i < 7; i++) {
        const char *n = type_names[i];
        if (!type_allows(a, n) || !type_allows(b, n)) continue;
        if (!strcmp(n, "integer") && type_allows(a, "number") && type_allows(b, "number")) continue;
        cJSON *s = cJSON_CreateString(n);
        if (!s || !cJSON_AddItemToArray(out, s)) {
            cJSON_Delete(s);
            cJSON_Delete(out);
            return NULL;
        }
    }
    return out;
}

/* ---- merging ---- */

/* The stricter of two numbers. */
static bool tighter(const char *key, double a, double b)
{
    return !strncmp(key, "min", 3) || !strcmp(key, "exclusiveMinimum") ? a > b : a < b;
}

static cJSON *both_lists(const cJSON *a, const cJSON *b)
{
    cJSON *out = cJSON_Duplicate(a, true), *copy;
    const cJSON *v, *w;
    cJSON_ArrayForEach(v, b)
    {
        bool there = false;
        cJSON_ArrayForEach(w, a) there |= cJSON_Compare(v, w, true);
        if (!out || there) continue;
        copy = cJSON_Duplicate(v, true);
        if (!copy || !cJSON_AddItemToArray(out, copy)) {
            cJSON_Delete(copy);
            cJSON_Delete(out);
            return NULL;
        }
    }
    return out;
}

static err_code both_properties(cJSON **out, const cJSON *a, const cJSON *b, err *e)
{
    const cJSON *v;
    *out = cJSON_Duplicate(a, true);
    cJSON_ArrayForEach(v, b)
    {
        const cJSON *old = get(a, v->string);
        if (old && cJSON_Compare(old, v, true)) continue;
        cJSON *copy = NULL;
        if (old) {
            const err_code rc = grammar_merge(&copy, old, v, e);
            if (rc != OK) {
                cJSON_Delete(*out);
                *out = NULL;
                return rc;
            }
            cJSON_DeleteItemFromObjectCaseSensitive(*out, v->string);
        } else {
            copy = cJSON_Duplicate(v, true);
        }
        if (!*out || !copy || !cJSON_AddItemToObject(*out, v->string, copy)) {
            cJSON_Delete(copy);
            break;
        }
    }
    return *out ? OK : err_set(e, E_NOMEM, "schema: no memory");
}

/* One keyword that both have. */
static err_code both(cJSON **out, const cJSON *a, const cJSON *b, err *e)
{
    static const char *const limits[] = {"minimum",   "maximum",   "exclusiveMinimum",
                                         "minLength", "maxLength", "exclusiveMaximum",
                                         "minItems",  "maxItems"};
    const char *key = a->string;
    *out = NULL;
    if (cJSON_Compare(a, b, true) || grammar_annotation(key)) {
        *out = cJSON_Duplicate(a, true);
    } else if (!strcmp(key, "properties")) {
        return both_properties(out, a, b, e);
    } else if (!strcmp(key, "required")) {
        *out = both_lists(a, b);
    } else if (!strcmp(key, "type")) {
        *out = both_types(a, b);
        if (*out && !(*out)->child) {
            cJSON_Delete(*out);
            *out = NULL;
            return err_set(e, E_INPUT, "schema: no type is allowed by all of 'allOf'");
        }
    } else {
        for (size_t i = 0; i < sizeof limits / sizeof *limits; i++)
            if (!strcmp(key, limits[i]) && cJSON_IsNumber(a) && cJSON_IsNumber(b))
                *out = cJSON_Duplicate(tighter(key, a->valuedouble, b->valuedouble) ? a : b, true);
        if (!*out)
            return err_set(e, E_UNSUPPORTED, "schema: '%.40s' differs within one 'allOf'", key);
    }
    return *out ? OK : err_set(e, E_NOMEM, "schema: no memory");
}

/* Names that one side lists and the other, which closes or types the rest, does not. */
static bool closes_out(const cJSON *closed, const cJSON *other)
{
    const cJSON *more = get(closed, "additionalProperties"), *v;
    if (!more || cJSON_IsTrue(more)) return false;
    cJSON_ArrayForEach(
        v, get(other, "properties")) if (!get(get(closed, "properties"), v->string)) return true;
    return false;
}

static err_code refuse_nested(const cJSON *s, err *e)
{
    static const char *const keys[] = {"anyOf", "oneOf", "allOf", "$ref"};
    for (int i = 0; i < 4; i++)
        if (get(s, keys[i]))
            return err_set(e, E_UNSUPPORTED, "schema: '%s' within 'allOf' or beside another",
                           keys[i]);
    return OK;
}

err_code grammar_merge(cJSON **out, const cJSON *a, const cJSON *b, err *e)
{
    const cJSON *v;
    *out = NULL;
    if (cJSON_IsTrue(a) || cJSON_IsTrue(b)) {
        *out = cJSON_Duplicate(cJSON_IsTrue(a) ? b : a, true);
        return *out ? OK : err_set(e, E_NOMEM, "schema: no memory");
    }
    if (!cJSON_IsObject(a) || !cJSON_IsObject(b))
        return err_set(e, E_UNSUPPORTED, "schema: parts of 'allOf' must be objects");
    TRY(refuse_nested(a, e));
    TRY(refuse_nested(b, e));
    if (closes_out(a, b) || closes_out(b, a))
        return err_set(e, E_UNSUPPORTED,
                       "schema: 'additionalProperties' beside properties of another part");
    cJSON *all = cJSON_Duplicate(a, true);
    err_code rc = all ? OK : err_set(e, E_NOMEM, "schema: no memory");
    cJSON_ArrayForEach(v, b)
    {
        const cJSON *old = get(a, v->string);
        cJSON *copy = NULL;
        if (rc != OK) break;
        if (old) {
            rc = both(&copy, old, v, e);
            if (rc == OK) cJSON_DeleteItemFromObjectCaseSensitive(all, v->string);
        } else if (!(copy = cJSON_Duplicate(v, true))) {
            rc = err_set(e, E_NOMEM, "schema: no memory");
        }
        if (rc == OK && !cJSON_AddItemToObject(all, v->string, copy)) {
            cJSON_Delete(copy);
            rc = err_set(e, E_NOMEM, "schema: no memory");
        }
    }
    if (rc != OK) {
        cJSON_Delete(all);
        return rc;
    }
    *out = all;
    return OK;
}

/* ---- schemas that exclude each other ---- */

static bool has_constant(const cJSON *s, const cJSON *v)
{
    const cJSON *one = get(s, "const"), *w;
    if (one && !cJSON_Compare(one, v, true)) return false;
    if (!get(s, "enum")) return true;
    cJSON_ArrayForEach(w, get(s, "enum")) if (cJSON_Compare(w, v, true)) return true;
    return false;
}

static bool has_constants(const cJSON *s) { return get(s, "const") || get(s, "enum"); }

static bool constants_apart(const cJSON *a, const cJSON *b)
{
    const cJSON *v;
    if (!has_constants(a) || !has_constants(b)) return false;
    if (get(a, "const")) return !has_constant(b, get(a, "const"));
    cJSON_ArrayForEach(v, get(a, "enum")) if (has_constant(b, v)) return false;
    return true;
}

static bool is_required(const cJSON *s, const char *name)
{
    const cJSON *v;
    cJSON_ArrayForEach(v, get(s, "required")) if (cJSON_IsString(v) &&
                                                  !strcmp(v->valuestring, name)) return true;
    return false;
}

static bool types_apart(const cJSON *a, const cJSON *b)
{
    const cJSON *t = get(a, "type"), *u = get(b, "type");
    if (!t || !u || cJSON_IsTrue(get(a, "nullable")) || cJSON_IsTrue(get(b, "nullable")))
        return false;
    for (int i = 0; i < 7; i++)
        if (type_allows(t, type_names[i]) && type_allows(u, type_names[i])) return false;
    return true;
}

bool grammar_disjoint(const cJSON *a, const cJSON *b)
{
    const cJSON *v;
    if (types_apart(a, b) || constants_apart(a, b)) return true;
    if (!type_listed(get(a, "type"), "object") || !type_listed(get(b, "type"), "object"))
        return false;
    if (!cJSON_IsString(get(a, "type")) || !cJSON_IsString(get(b, "type"))) return false;
    cJSON_ArrayForEach(v, get(a, "properties"))
    {
        const cJSON *w = get(get(b, "properties"), v->string);
        if (w && is_required(a, v->string) && is_required(b, v->string) &&
            (constants_apart(v, w) || types_apart(v, w)))
            return true;
    }
    return false;
}
