#include "support/json_validate.h"

#include <math.h>
#include <string.h>

static const cJSON *get(const cJSON *s, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(s, key);
}

static bool is_type(const cJSON *v, const char *t)
{
    if (!strcmp(t, "null")) return cJSON_IsNull(v);
    if (!strcmp(t, "boolean")) return cJSON_IsBool(v);
    if (!strcmp(t, "string")) return cJSON_IsString(v);
    if (!strcmp(t, "array")) return cJSON_IsArray(v);
    if (!strcmp(t, "object")) return cJSON_IsObject(v);
    if (!strcmp(t, "number")) return cJSON_IsNumber(v);
    return !strcmp(t, "integer") && cJSON_IsNumber(v) && floor(v->valuedouble) == v->valuedouble;
}

static bool type_ok(const cJSON *v, const cJSON *s)
{
    const cJSON *t = get(s, "type"), *one;
    if (!t || (cJSON_IsNull(v) && cJSON_IsTrue(get(s, "nullable")))) return true;
    if (cJSON_IsString(t)) return is_type(v, t->valuestring);
    cJSON_ArrayForEach(one, t) if (is_type(v, one->valuestring)) return true;
    return false;
}

static bool constants_ok(const cJSON *v, const cJSON *s)
{
    const cJSON *w;
    bool any = !get(s, "enum");
    if (get(s, "const") && !cJSON_Compare(v, get(s, "const"), true)) return false;
    cJSON_ArrayForEach(w, get(s, "enum")) any |= cJSON_Compare(v, w, true) != 0;
    return any;
}

static int code_points(const char *s)
{
    int n = 0;
    for (; *s; s++) n += ((unsigned char)*s & 0xc0) != 0x80;
    return n;
}

/* The size that `min` and `max` limit. */
static bool within(double size, const cJSON *min, const cJSON *max)
{
    return (!min || size >= min->valuedouble) && (!max || size <= max->valuedouble);
}

static bool number_ok(const cJSON *v, const cJSON *s)
{
    const double d = v->valuedouble;
    const cJSON *lo = get(s, "exclusiveMinimum"), *hi = get(s, "exclusiveMaximum");
    return within(d, get(s, "minimum"), get(s, "maximum")) && (!lo || d > lo->valuedouble) &&
           (!hi || d < hi->valuedouble);
}

static bool array_ok(const cJSON *v, const cJSON *s, const cJSON *root)
{
    const cJSON *one, *p = get(s, "prefixItems");
    p = p ? p->child : NULL;
    if (!within(cJSON_GetArraySize(v), get(s, "minItems"), get(s, "maxItems"))) return false;
    cJSON_ArrayForEach(one, v)
    {
        const cJSON *t = p ? p : get(s, "items");
        if (t && !json_validates(one, t, root)) return false;
        p = p ? p->next : NULL;
    }
    return true;
}

static bool object_ok(const cJSON *v, const cJSON *s, const cJSON *root)
{
    const cJSON *one, *more = get(s, "additionalProperties");
    cJSON_ArrayForEach(one, get(s, "required")) if (!get(v, one->valuestring)) return false;
    cJSON_ArrayForEach(one, v)
    {
        const cJSON *t = get(get(s, "properties"), one->string);
        if (!t) t = more;
        if (t && !json_validates(one, t, root)) return false;
    }
    return true;
}

static const cJSON *resolve(const char *p, const cJSON *at)
{
    char name[256];
    for (p++; *p == '/' && at;) {
        const size_t n = strcspn(++p, "/");
        memcpy(name, p, n);
        name[n] = '\0';
        at = get(at, name);
        p += n;
    }
    return at;
}

static bool combined_ok(const cJSON *v, const cJSON *s, const cJSON *root)
{
    const cJSON *w;
    int any = 0, one = 0;
    if (get(s, "$ref") && !json_validates(v, resolve(get(s, "$ref")->valuestring, root), root))
        return false;
    cJSON_ArrayForEach(w, get(s, "allOf")) if (!json_validates(v, w, root)) return false;
    cJSON_ArrayForEach(w, get(s, "anyOf")) any += json_validates(v, w, root);
    cJSON_ArrayForEach(w, get(s, "oneOf")) one += json_validates(v, w, root);
    return (!get(s, "anyOf") || any) && (!get(s, "oneOf") || one == 1);
}

bool json_validates(const cJSON *v, const cJSON *s, const cJSON *root)
{
    if (cJSON_IsBool(s)) return cJSON_IsTrue(s);
    if (!cJSON_IsObject(s)) return false;
    if (!type_ok(v, s) || !constants_ok(v, s) || !combined_ok(v, s, root)) return false;
    if (cJSON_IsString(v))
        return within(code_points(v->valuestring), get(s, "minLength"), get(s, "maxLength"));
    if (cJSON_IsNumber(v)) return number_ok(v, s);
    if (cJSON_IsArray(v)) return array_ok(v, s, root);
    return !cJSON_IsObject(v) || object_ok(v, s, root);
}
