/* JSON: typed getters over cJSON. cJSON reads only what json_scan.c has accepted, so its leniency
 * is out of reach, and a failure of it can only mean memory. */
#include "base/json.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json_scan.h"
#include "base/mem.h"

#define JSON_I64_MAX ((int64_t)9007199254740991) /* 2^53-1: cJSON keeps numbers as doubles */

err_code json_parse(cJSON **out, const char *text, size_t n, const char *what, err *e)
{
    *out = NULL;
    TRY(json_scan(text, n, what, e));
    *out = cJSON_ParseWithLengthOpts(text, n, NULL, 0);
    if (!*out) return err_set(e, E_NOMEM, "%s: out of memory for %zu bytes of JSON", what, n);
    return OK;
}

err_code json_load(cJSON **out, const char *path, size_t max_bytes, err *e)
{
    char *text;
    size_t n;
    *out = NULL;
    TRY(file_read(&text, &n, path, max_bytes, e));
    const err_code rc = json_parse(out, text, n, path, e);
    mem_free(text);
    return rc;
}

static const char *json_kind(const cJSON *v)
{
    if (cJSON_IsNull(v)) return "null";
    if (cJSON_IsBool(v)) return "a boolean";
    if (cJSON_IsNumber(v)) return "a number";
    if (cJSON_IsString(v)) return "a string";
    if (cJSON_IsArray(v)) return "an array";
    return "an object";
}

/* "key 'rope_scaling.factor'": a cJSON item knows its own name, not its parent's. */
static void json_path(char *buf, size_t cap, const cJSON *o, const char *key)
{
    const bool named = o && o->string && *o->string;
    (void)snprintf(buf, cap, "key '%s%s%s'", named ? o->string : "", named ? "." : "", key);
}

/* *v stays NULL when the key is absent or null and `opt` is set. */
static err_code json_find(const cJSON *o, const char *key, bool opt, const cJSON **v, char *path,
                          size_t cap, err *e)
{
    *v = NULL;
    json_path(path, cap, o, key);
    if (!cJSON_IsObject(o)) return err_set(e, E_INPUT, "%s: its parent is not an object", path);
    const cJSON *found = cJSON_GetObjectItemCaseSensitive(o, key);
    if (opt && (!found || cJSON_IsNull(found))) return OK;
    if (!found) return err_set(e, E_INPUT, "%s is missing", path);
    *v = found;
    return OK;
}

static err_code json_i64(const cJSON *v, const char *path, int64_t lo, int64_t hi, int64_t *out,
                         err *e)
{
    if (!cJSON_IsNumber(v))
        return err_set(e, E_INPUT, "%s: expected an integer, got %s", path, json_kind(v));
    const double d = v->valuedouble;
    if (lo < -JSON_I64_MAX) lo = -JSON_I64_MAX;
    if (hi > JSON_I64_MAX) hi = JSON_I64_MAX;
    if (!(d == floor(d)) || d < (double)lo || d > (double)hi)
        return err_set(e, E_INPUT, "%s: expected an integer in [%lld,%lld], got %.17g", path,
                       (long long)lo, (long long)hi, d);
    *out = (int64_t)d;
    return OK;
}

err_code json_get_i64(const cJSON *o, const char *key, int64_t lo, int64_t hi, int64_t *out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, false, &v, path, sizeof path, e));
    return json_i64(v, path, lo, hi, out, e);
}

err_code json_opt_i64(const cJSON *o, const char *key, int64_t lo, int64_t hi, int64_t def,
                      int64_t *out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, true, &v, path, sizeof path, e));
    if (v) return json_i64(v, path, lo, hi, out, e);
    *out = def;
    return OK;
}

err_code json_get_i32(const cJSON *o, const char *key, int32_t lo, int32_t hi, int32_t *out, err *e)
{
    int64_t v;
    TRY(json_get_i64(o, key, lo, hi, &v, e));
    *out = (int32_t)v;
    return OK;
}

err_code json_opt_i32(const cJSON *o, const char *key, int32_t lo, int32_t hi, int32_t def,
                      int32_t *out, err *e)
{
    int64_t v;
    TRY(json_opt_i64(o, key, lo, hi, def, &v, e));
    *out = (int32_t)v;
    return OK;
}

static err_code json_f64(const cJSON *v, const char *path, double *out, err *e)
{
    if (!cJSON_IsNumber(v) || !isfinite(v->valuedouble))
        return err_set(e, E_INPUT, "%s: expected a number, got %s", path, json_kind(v));
    *out = v->valuedouble;
    return OK;
}

err_code json_get_f64(const cJSON *o, const char *key, double *out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, false, &v, path, sizeof path, e));
    return json_f64(v, path, out, e);
}

err_code json_opt_f64(const cJSON *o, const char *key, double def, double *out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, true, &v, path, sizeof path, e));
    if (v) return json_f64(v, path, out, e);
    *out = def;
    return OK;
}

err_code json_opt_bool(const cJSON *o, const char *key, bool def, bool *out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, true, &v, path, sizeof path, e));
    if (v && !cJSON_IsBool(v))
        return err_set(e, E_INPUT, "%s: expected a boolean, got %s", path, json_kind(v));
    *out = v ? cJSON_IsTrue(v) : def;
    return OK;
}

static err_code json_str(const cJSON *v, const char *path, const char **out, err *e)
{
    if (!cJSON_IsString(v))
        return err_set(e, E_INPUT, "%s: expected a string, got %s", path, json_kind(v));
    *out = v->valuestring;
    return OK;
}

err_code json_get_str(const cJSON *o, const char *key, const char **out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, false, &v, path, sizeof path, e));
    return json_str(v, path, out, e);
}

err_code json_opt_str(const cJSON *o, const char *key, const char *def, const char **out, err *e)
{
    char path[256];
    const cJSON *v;
    TRY(json_find(o, key, true, &v, path, sizeof path, e));
    if (v) return json_str(v, path, out, e);
    *out = def;
    return OK;
}

/* The shortest text that reads back as the same double; whole numbers without an exponent. */
static void json_number(char *buf, size_t cap, double v)
{
    if (!isfinite(v)) {
        (void)snprintf(buf, cap, "null");
        return;
    }
    if (v == floor(v) && fabs(v) <= (double)JSON_I64_MAX) {
        (void)snprintf(buf, cap, "%s%lld", v == 0 && signbit(v) ? "-" : "", (long long)v);
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {
        (void)snprintf(buf, cap, "%.*g", digits, v);
        if (strtod(buf, NULL) == v) return;
    }
}

/* cJSON prints 15 digits of a number that 15 digits nearly describe: numbers become raw text
 * first. */
static bool json_fix_numbers(cJSON *o)
{
    for (cJSON *v = o; v; v = v->next) {
        if (v->child && !json_fix_numbers(v->child)) return false;
        if (!cJSON_IsNumber(v)) continue;
        char text[40];
        json_number(text, sizeof text, v->valuedouble);
        const size_t n = strlen(text) + 1;
        v->valuestring = cJSON_malloc(n);
        if (!v->valuestring) return false;
        memcpy(v->valuestring, text, n);
        v->type = (v->type & ~0xff) | cJSON_Raw; /* the flags above stay */
    }
    return true;
}

err_code json_print(char **out, const cJSON *o, bool pretty, err *e)
{
    char *text = NULL;
    *out = NULL;
    cJSON *copy = cJSON_Duplicate(o, true);
    if (copy && json_fix_numbers(copy))
        text = pretty ? cJSON_Print(copy) : cJSON_PrintUnformatted(copy);
    const err_code rc = text ? mem_strdup(out, text, e)
                             : err_set(e, E_NOMEM, "JSON text: out of memory");
    cJSON_free(text);
    cJSON_Delete(copy);
    return rc;
}
