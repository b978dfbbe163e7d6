/* JSON text and parsed JSON to values, as Python's json.loads gives them. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/json_scan.h"
#include "formats/jinja_internal.h"
#include "formats/tokenizer_vocab.h"

typedef struct {
    jinja_arena *a;
    const char *p; /* scanned before: what follows is sound */
    uint8_t mark;
    err *e;
} reader;

static void skip_space(reader *x)
{
    while (*x->p == ' ' || *x->p == '\n' || *x->p == '\t' || *x->p == '\r') x->p++;
}

static err_code string_value(jinja_arena *a, jinja_value **out, const char *s, size_t n,
                             uint8_t mark, err *e)
{
    char *copy;
    uint8_t *marks = NULL;
    TRY(jv_new(a, out, JV_STR, e));
    TRY(jinja_get(a, (void **)&copy, n + 1, e));
    if (n) memcpy(copy, s, n);
    if (mark != JINJA_OWN && n) {
        TRY(jinja_get(a, (void **)&marks, n, e));
        memset(marks, mark, n);
    }
    (*out)->s = (jstr){copy, marks, n};
    return OK;
}

static uint32_t hex4(const char *p)
{
    char s[5] = {p[0], p[1], p[2], p[3], 0};
    return (uint32_t)strtoul(s, NULL, 16);
}

static err_code read_string(reader *x, jinja_value **out)
{
    static const char letters[] = "\"\\/bfnrt", codes[] = "\"\\/\b\f\n\r\t";
    const char *end = ++x->p;
    char *s;
    size_t n = 0;
    while (*end != '"') end += *end == '\\' ? 2 : 1;
    TRY(jinja_get(x->a, (void **)&s, (size_t)(end - x->p) + 1, x->e));
    while (x->p < end) {
        if (*x->p != '\\') {
            s[n++] = *x->p++;
        } else if (x->p[1] != 'u') {
            s[n++] = codes[strchr(letters, x->p[1]) - letters];
            x->p += 2;
        } else {
            uint32_t c = hex4(x->p + 2);
            x->p += 6;
            if (c >= 0xd800 && c < 0xdc00) {
                c = 0x10000 + ((c - 0xd800) << 10) + (hex4(x->p + 2) - 0xdc00);
                x->p += 6;
            }
            n += utf8_put(s + n, c);
        }
    }
    x->p++;
    return string_value(x->a, out, s, n, x->mark, x->e);
}

static err_code read_number(reader *x, jinja_value **out)
{
    const size_t n = strspn(x->p, "+-0123456789.eE");
    char s[JSON_MAX_NUMBER + 1], *end;
    memcpy(s, x->p, n);
    s[n] = '\0';
    x->p += n;
    if (!strpbrk(s, ".eE") && n < 19) {
        TRY(jv_new(x->a, out, JV_INT, x->e));
        (*out)->i = strtoll(s, &end, 10);
        return OK;
    }
    TRY(jv_new(x->a, out, JV_FLOAT, x->e));
    (*out)->d = strtod(s, &end);
    return OK;
}

static err_code read_value(reader *x, jinja_value **out)
{
    jinja_value *key, *v;
    skip_space(x);
    switch (*x->p) {
    case '"': return read_string(x, out);
    case 't':
        x->p += 4;
        *out = &jinja_true;
        return OK;
    case 'f':
        x->p += 5;
        *out = &jinja_false;
        return OK;
    case 'n':
        x->p += 4;
        *out = &jinja_null;
        return OK;
    case '[':
        TRY(jv_new(x->a, out, JV_LIST, x->e));
        for (x->p++, skip_space(x); *x->p != ']'; skip_space(x)) {
            if (*x->p == ',') x->p++;
            TRY(read_value(x, &v));
            TRY(jv_list_add(x->a, *out, v, x->e));
        }
        x->p++;
        return OK;
    case '{':
        TRY(jv_new(x->a, out, JV_MAP, x->e));
        for (x->p++, skip_space(x); *x->p != '}'; skip_space(x)) {
            if (*x->p == ',') x->p++;
            skip_space(x);
            TRY(read_string(x, &key));
            skip_space(x);
            x->p++; /* the colon */
            TRY(read_value(x, &v));
            TRY(jmap_set(x->a, &(*out)->m, key, v, x->e));
        }
        x->p++;
        return OK;
    default: return read_number(x, out);
    }
}

/* The text is bounded by its length: it is copied so that a NUL stands behind it. */
err_code jinja_json(jinja_scope *s, jinja_value **out, const char *text, size_t n, uint8_t mark,
                    err *e)
{
    char *copy;
    TRY(json_scan(text, n, "JSON", e));
    TRY(jinja_get(&s->mem, (void **)&copy, n + 1, e));
    memcpy(copy, text, n);
    reader x = {&s->mem, copy, mark, e};
    return read_value(&x, out);
}

static err_code from_cjson(jinja_arena *a, jinja_value **out, const cJSON *o, uint8_t mark, err *e)
{
    const cJSON *kid;
    jinja_value *key, *v;
    if (cJSON_IsString(o))
        return string_value(a, out, o->valuestring, strlen(o->valuestring), mark, e);
    if (cJSON_IsNumber(o)) {
        const bool whole = o->valuedouble == floor(o->valuedouble) && fabs(o->valuedouble) < 9e15;
        TRY(jv_new(a, out, whole ? JV_INT : JV_FLOAT, e));
        if (whole)
            (*out)->i = (int64_t)o->valuedouble;
        else
            (*out)->d = o->valuedouble;
        return OK;
    }
    if (cJSON_IsArray(o) || cJSON_IsObject(o)) {
        TRY(jv_new(a, out, cJSON_IsArray(o) ? JV_LIST : JV_MAP, e));
        cJSON_ArrayForEach(kid, o)
        {
            TRY(from_cjson(a, &v, kid, mark, e));
            if (cJSON_IsArray(o)) {
                TRY(jv_list_add(a, *out, v, e));
                continue;
            }
            TRY(string_value(a, &key, kid->string, strlen(kid->string), mark, e));
            TRY(jmap_set(a, &(*out)->m, key, v, e));
        }
        return OK;
    }
    *out = cJSON_IsBool(o) ? jv_bool(cJSON_IsTrue(o)) : &jinja_null;
    return OK;
}

err_code jinja_cjson(jinja_scope *s, jinja_value **out, const cJSON *o, uint8_t mark, err *e)
{
    return from_cjson(&s->mem, out, o, mark, e);
}
