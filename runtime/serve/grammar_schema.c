/* JSON schema to a net. What is generated always validates, but not all that validates is
 * generated: properties come in the schema's order, numbers and white space are bounded, constants
 * have one spelling, and where a schema leaves a type open, only the types it speaks of are used.
  */
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_internal.h"

enum {
    MAX_REFS = 256,
    MAX_COUNT = 100000,
    MAX_NESTED = 200,
    MAX_MEMBERS = 1024,
    MAX_VALUES = 20000,
    MAX_BRANCHES = 256
};

typedef struct {
    grammar_json *j;
    grammar_build *b;
    const cJSON *root;
    struct {
        const cJSON *to;
        int32_t rule;
    } ref[MAX_REFS]; /* rules of what $ref names */
    int n_refs, depth;
    err *e;
} schema;

enum { T_NULL = 1, T_BOOL = 2, T_INT = 4, T_NUM = 8, T_STR = 16, T_ARR = 32, T_OBJ = 64 };
static const struct {
    const char *name;
    int bit;
} types[] = {{"null", T_NULL},  {"boolean", T_BOOL}, {"integer", T_INT}, {"number", T_NUM},
             {"string", T_STR}, {"array", T_ARR},    {"object", T_OBJ}};

/* Keywords, and the type that each speaks of (0: of the schema itself). */
static const struct {
    const char *name;
    int type;
} keywords[] = {{"type", 0},
                {"enum", 0},
                {"const", 0},
                {"anyOf", 0},
                {"oneOf", 0},
                {"allOf", 0},
                {"$ref", 0},
                {"nullable", 0},
                {"properties", T_OBJ},
                {"required", T_OBJ},
                {"additionalProperties", T_OBJ},
                {"items", T_ARR},
                {"prefixItems", T_ARR},
                {"minItems", T_ARR},
                {"maxItems", T_ARR},
                {"minLength", T_STR},
                {"maxLength", T_STR},
                {"pattern", T_STR},
                {"format", T_STR},
                {"minimum", T_NUM},
                {"maximum", T_NUM},
                {"exclusiveMinimum", T_NUM},
                {"exclusiveMaximum", T_NUM}};

static const cJSON *get(const cJSON *s, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(s, key);
}

static err_code not_a(schema *x, const char *key, const char *want)
{
    return err_set(x->e, E_INPUT, "schema: '%.40s': expected %s", key, want);
}

static err_code add(schema *x, int32_t from, const cJSON *s, int32_t to);

/* ---- strings ---- */

#define MONTH_31 "(0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01])"
#define MONTH_30 "(0[469]|11)-(0[1-9]|[12][0-9]|30)"
#define DATE     "[12][0-9]{3}-(" MONTH_31 "|" MONTH_30 "|02-(0[1-9]|1[0-9]|2[0-8]))"
#define TIME                                                                                       \
    "([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\\.[0-9]{1,6})?(Z|[+-]([01][0-9]|2[0-3]):[0-5][0-9]" \
    ")"
#define BYTE4 "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
static const struct {
    const char *name, *pattern;
} formats[] = {
    {"date", "^" DATE "$"},
    {"time", "^" TIME "$"},
    {"date-time", "^" DATE "T" TIME "$"},
    {"uuid", "^[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}$"},
    {"ipv4", "^(" BYTE4 "\\.){3}" BYTE4 "$"},
};

static err_code count(schema *x, const cJSON *s, const char *key, int32_t def, int32_t *out)
{
    const cJSON *v = get(s, key);
    *out = def;
    if (!v) return OK;
    if (!cJSON_IsNumber(v) || v->valuedouble < 0 || v->valuedouble != floor(v->valuedouble))
        return not_a(x, key, "a whole number from 0 on");
    if (v->valuedouble > MAX_COUNT)
        return err_set(x->e, E_LIMIT, "schema: '%s': at most %d", key, MAX_COUNT);
    *out = (int32_t)v->valuedouble;
    return OK;
}

static err_code add_string(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    grammar_build *b = x->b;
    const cJSON *pattern = get(s, "pattern"), *format = get(s, "format");
    const char *text = NULL;
    int32_t min, max;
    TRY(count(x, s, "minLength", 0, &min));
    TRY(count(x, s, "maxLength", -1, &max));
    if (pattern && !cJSON_IsString(pattern)) return not_a(x, "pattern", "a string");
    if (format && !cJSON_IsString(format)) return not_a(x, "format", "a string");
    if (pattern) text = pattern->valuestring;
    for (size_t i = 0; format && i < sizeof formats / sizeof *formats; i++)
        if (!strcmp(formats[i].name, format->valuestring)) text = formats[i].pattern;
    if (format && (!text || pattern))
        return err_set(x->e, E_UNSUPPORTED, "schema: 'format': '%.60s'%s", format->valuestring,
                       pattern ? " beside 'pattern'" : "");
    if (!text && !min && max < 0) {
        grammar_call(b, from, grammar_json_rule(x->j, JSON_RULE_STRING), to);
        return b->rc;
    }
    from = grammar_byte_to(b, from, '"');
    const int32_t out = grammar_state(b);
    grammar_bytes(b, out, '"', '"', to);
    if (text) {
        if (min || max >= 0)
            return err_set(x->e, E_UNSUPPORTED, "schema: '%s' beside '%s'",
                           min ? "minLength" : "maxLength", pattern ? "pattern" : "format");
        return grammar_regex_add(b, from, text, REGEX_JSON, out, x->e);
    }
    const int32_t ch = grammar_json_rule(x->j, JSON_RULE_CHAR);
    for (int32_t i = 0; i < min && b->rc == OK; i++) from = grammar_call_to(b, from, ch);
    if (max < 0) grammar_call(b, from, ch, from);
    for (int32_t i = min; i < max && b->rc == OK; i++) {
        grammar_eps(b, from, out);
        from = grammar_call_to(b, from, ch);
    }
    grammar_eps(b, from, out);
    return max >= 0 && max < min ? err_set(x->e, E_INPUT, "schema: maxLength is below minLength")
                                 : b->rc;
}

/* ---- numbers ---- */

/* A whole bound into *v when there is one (*has). */
static err_code bound(schema *x, const cJSON *s, const char *key, bool *has, int64_t *v)
{
    const cJSON *n = get(s, key);
    *has = n != NULL;
    if (!n) return OK;
    if (cJSON_IsBool(n) && !strncmp(key, "ex", 2))
        return err_set(x->e, E_UNSUPPORTED, "schema: '%s' as a boolean", key);
    if (!cJSON_IsNumber(n)) return not_a(x, key, "a number");
    if (n->valuedouble != floor(n->valuedouble) || fabs(n->valuedouble) > 9007199254740992.0)
        return err_set(x->e, E_UNSUPPORTED, "schema: '%s': only whole numbers up to 2^53", key);
    *v = (int64_t)n->valuedouble;
    return OK;
}

static err_code bounds(schema *x, const cJSON *s, number_bounds *r)
{
    bool open;
    int64_t v = 0;
    *r = (number_bounds){0};
    TRY(bound(x, s, "minimum", &r->has_lo, &r->lo));
    TRY(bound(x, s, "exclusiveMinimum", &open, &v));
    if (open && (!r->has_lo || v >= r->lo)) r->has_lo = r->open_lo = true, r->lo = v;
    TRY(bound(x, s, "maximum", &r->has_hi, &r->hi));
    TRY(bound(x, s, "exclusiveMaximum", &open, &v));
    if (open && (!r->has_hi || v <= r->hi)) r->has_hi = r->open_hi = true, r->hi = v;
    return OK;
}

static err_code add_number(schema *x, int32_t from, const cJSON *s, bool whole, int32_t to)
{
    number_bounds r;
    TRY(bounds(x, s, &r));
    if (!r.has_lo && !r.has_hi) {
        grammar_call(x->b, from,
                     grammar_json_rule(x->j, whole ? JSON_RULE_INTEGER : JSON_RULE_NUMBER), to);
    } else if (whole) {
        const int64_t lo = r.lo + r.open_lo, hi = r.hi - r.open_hi;
        grammar_json_integer(x->b, from, r.has_lo ? &lo : NULL, r.has_hi ? &hi : NULL, to);
    } else {
        const int64_t far = 1000000000; /* beyond, digits behind the point could round onto it */
        if ((r.open_lo && (r.lo > far || r.lo < -far)) ||
            (r.open_hi && (r.hi > far || r.hi < -far)))
            return err_set(x->e, E_UNSUPPORTED, "schema: exclusive bounds of a number beyond 1e9");
        if ((r.has_lo && (r.lo > 100000 * far || r.lo < -100000 * far)) ||
            (r.has_hi && (r.hi > 100000 * far || r.hi < -100000 * far)))
            return err_set(x->e, E_UNSUPPORTED, "schema: bounds of a number beyond 1e14");
        grammar_json_number(x->b, from, &r, to);
    }
    return x->b->rc;
}

/* ---- arrays ---- */

/* From a state where the element i may come (all before it have) to the array's end. */
static err_code add_array(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    grammar_build *b = x->b;
    const cJSON *items = get(s, "items"), *prefix = get(s, "prefixItems");
    const int32_t ws = grammar_json_rule(x->j, JSON_RULE_WS);
    int32_t min, max;
    TRY(count(x, s, "minItems", 0, &min));
    TRY(count(x, s, "maxItems", -1, &max));
    if (prefix && !cJSON_IsArray(prefix)) return not_a(x, "prefixItems", "an array");
    if (items && !cJSON_IsObject(items) && !cJSON_IsBool(items))
        return err_set(x->e, E_UNSUPPORTED,
                       "schema: 'items' must be one schema; several are "
                       "'prefixItems'");
    const cJSON *p = prefix ? prefix->child : NULL;
    const int32_t n_prefix = prefix ? cJSON_GetArraySize(prefix) : 0;
    const int32_t rest = grammar_rule_new(b); /* one element behind the prefix */
    if (b->rc != OK) return b->rc;
    const grammar_rule r = b->rule[rest];
    if (items)
        TRY(add(x, r.start, items, r.end));
    else
        grammar_call(b, r.start, grammar_json_rule(x->j, JSON_RULE_ANY), r.end);
    int32_t before = grammar_call_to(b, grammar_byte_to(b, from, '['), ws);
    const int32_t close = grammar_state(b);
    grammar_bytes(b, close, ']', ']', to);
    if (!min) grammar_eps(b, before, close);
    const int32_t least = min > n_prefix ? min : n_prefix;
    const int32_t last = max < 0 ? least + 1 : max;
    for (int32_t i = 0; i < last && b->rc == OK; i++) {
        const int32_t after = grammar_state(b), next = grammar_state(b);
        if (p)
            TRY(add(x, before, p, after));
        else
            grammar_call(b, before, rest, after);
        p = p ? p->next : NULL;
        if (i + 1 >= min) grammar_call(b, after, ws, close);
        grammar_call(b, grammar_byte_to(b, after, ','), ws, next);
        if (max < 0 && i + 1 == last) grammar_call(b, next, rest, after);
        before = next;
    }
    return b->rc;
}

/* ---- objects ---- */

typedef struct {
    const char *name;
    const cJSON *s; /* NULL: any value */
    bool required;
} member;

static bool listed(const cJSON *array, const char *name)
{
    const cJSON *v;
    cJSON_ArrayForEach(v,
                       array) if (cJSON_IsString(v) && !strcmp(v->valuestring, name)) return true;
    return false;
}

/* Listed properties in order, then required names that are not listed. */
static err_code gather(schema *x, const cJSON *s, member **out, int *n)
{
    const cJSON *props = get(s, "properties"), *need = get(s, "required"), *v;
    const cJSON *more = get(s, "additionalProperties");
    if (props && !cJSON_IsObject(props)) return not_a(x, "properties", "an object");
    if (need && !cJSON_IsArray(need)) return not_a(x, "required", "an array of strings");
    cJSON_ArrayForEach(v, need) if (!cJSON_IsString(v)) return not_a(x, "required",
                                                                     "an array of strings");
    const size_t cap = (size_t)cJSON_GetArraySize(props) + (size_t)cJSON_GetArraySize(need);
    if (cap > MAX_MEMBERS)
        return err_set(x->e, E_LIMIT, "schema: more than %d properties", MAX_MEMBERS);
    TRY(mem_alloc((void **)out, cap + 1, sizeof **out, "schema", x->e));
    cJSON_ArrayForEach(v, props)(*out)[(*n)++] = (member){v->string, v, listed(need, v->string)};
    cJSON_ArrayForEach(v, need)
    {
        bool known = false;
        for (int i = 0; i < *n && !known; i++) known = !strcmp((*out)[i].name, v->valuestring);
        if (known) continue;
        (*out)[(*n)++] = (member){v->valuestring, cJSON_IsObject(more) ? more : NULL, true};
        if (cJSON_IsFalse(more))
            return err_set(x->e, E_INPUT, "schema: '%.60s' is required, but not allowed",
                           v->valuestring);
    }
    return OK;
}

/* The next code point of a UTF-8 text. */
static uint32_t next_code(const char **p)
{
    const uint8_t c = (uint8_t) * (*p)++;
    int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0;
    uint32_t v = more ? c & (0x3fu >> more) : c;
    while (more--) v = v << 6 | ((uint8_t) * (*p)++ & 0x3f);
    return v;
}

enum { MAX_NAMES = 512 };
typedef struct {
    const char *rest[MAX_NAMES];
    int n;
} names_left;
typedef struct {
    uint32_t used[MAX_NAMES]; /* what the names go on with, sorted */
    int n_used;
    code_range r[MAX_NAMES + 1]; /* everything else */
    names_left below;
} name_level;

/* Whether one of the names ends here; what the others go on with. */
static bool next_codes(const names_left *left, name_level *l)
{
    bool ends = false;
    l->n_used = 0;
    for (int i = 0; i < left->n; i++) {
        const char *p = left->rest[i];
        if (!*p) {
            ends = true;
            continue;
        }
        const uint32_t c = next_code(&p);
        int at = 0;
        while (at < l->n_used && l->used[at] < c) at++;
        if (at < l->n_used && l->used[at] == c) continue;
        memmove(l->used + at + 1, l->used + at, (size_t)(l->n_used - at) * sizeof *l->used);
        l->used[at] = c;
        l->n_used++;
    }
    return ends;
}

/* From a state where all of `left` may still come true: to `anything` with a code point that none
 * of them has here, to the closing quote where none ends. Written without escapes. Names are told
 * apart within 64 characters: longer ones that agree so far are not begun. */
static err_code other_name(schema *x, int32_t from, const names_left *left, int32_t anything,
                           int32_t close, int depth)
{
    grammar_build *b = x->b;
    name_level *l;
    int n = 0;
    uint32_t lo = 0;
    TRY(mem_alloc((void **)&l, 1, sizeof *l, "schema", x->e));
    if (!next_codes(left, l)) grammar_bytes(b, from, '"', '"', close);
    for (int i = 0; i < l->n_used; i++) {
        if (l->used[i] > lo) l->r[n++] = (code_range){lo, l->used[i] - 1};
        lo = l->used[i] + 1;
    }
    l->r[n++] = (code_range){lo, 0x10ffff};
    grammar_json_codes(b, from, l->r, n, anything);
    err_code rc = b->rc;
    for (int k = 0; k < l->n_used && rc == OK && depth < 64; k++) {
        l->below.n = 0;
        for (int i = 0; i < left->n; i++) {
            const char *p = left->rest[i];
            if (*p && next_code(&p) == l->used[k]) l->below.rest[l->below.n++] = p;
        }
        const code_range one = {l->used[k], l->used[k]};
        const int32_t to = grammar_state(b);
        grammar_json_codes(b, from, &one, 1, to);
        rc = other_name(x, to, &l->below, anything, close, depth + 1);
    }
    mem_free(l);
    return rc != OK ? rc : b->rc;
}

/* A name that is none of the members'; from before its first quote to behind its last. */
static err_code add_other_name(schema *x, int32_t from, const member *m, int n, int32_t to)
{
    static const code_range all[] = {{0, 0x10ffff}};
    grammar_build *b = x->b;
    names_left *left;
    if (!n) {
        grammar_call(b, from, grammar_json_rule(x->j, JSON_RULE_STRING), to);
        return b->rc;
    }
    if (n > MAX_NAMES)
        return err_set(x->e, E_LIMIT, "schema: more than %d properties beside others", MAX_NAMES);
    TRY(mem_alloc((void **)&left, 1, sizeof *left, "schema", x->e));
    for (int i = 0; i < n; i++) left->rest[i] = m[i].name;
    left->n = n;
    const int32_t free_state = grammar_state(b);
    grammar_json_codes(b, free_state, all, 1, free_state);
    grammar_bytes(b, free_state, '"', '"', to);
    const err_code rc = other_name(x, grammar_byte_to(b, from, '"'), left, free_state, to, 0);
    mem_free(left);
    return rc;
}

/* One member: its name, the colon, its value. */
static err_code add_member(schema *x, int32_t from, const member *m, int32_t to)
{
    grammar_build *b = x->b;
    cJSON *name = cJSON_CreateString(m->name);
    if (!name) return err_set(x->e, E_NOMEM, "schema: no memory");
    int32_t at = grammar_json_value(b, from, name);
    cJSON_Delete(name);
    at = grammar_call_to(b, grammar_byte_to(b, at, ':'), grammar_json_rule(x->j, JSON_RULE_WS));
    if (m->s) return add(x, at, m->s, to);
    grammar_call(b, at, grammar_json_rule(x->j, JSON_RULE_ANY), to);
    return b->rc;
}

/* Further members behind the listed ones: `none` when nothing stands yet, `some` otherwise. */
static err_code add_others(schema *x, const cJSON *more, const member *m, int n, int32_t none,
                           int32_t some)
{
    grammar_build *b = x->b;
    const int32_t ws = grammar_json_rule(x->j, JSON_RULE_WS);
    const int32_t name = grammar_state(b), colon = grammar_state(b);
    grammar_eps(b, none, name);
    grammar_call(b, grammar_byte_to(b, some, ','), ws, name);
    TRY(add_other_name(x, name, m, n, colon));
    const int32_t at = grammar_call_to(b, grammar_byte_to(b, colon, ':'), ws);
    if (cJSON_IsObject(more)) return add(x, at, more, some);
    grammar_call(b, at, grammar_json_rule(x->j, JSON_RULE_ANY), some);
    return b->rc;
}

/* Two tracks through the members: nothing written yet, something written. */
static err_code add_members(schema *x, int32_t from, const cJSON *s, const member *m, int n,
                            int32_t to)
{
    grammar_build *b = x->b;
    const cJSON *more = get(s, "additionalProperties");
    const int32_t ws = grammar_json_rule(x->j, JSON_RULE_WS);
    int32_t none = grammar_call_to(b, grammar_byte_to(b, from, '{'), ws), some = -1;
    for (int i = 0; i < n && b->rc == OK; i++) {
        const int32_t name = grammar_state(b), after = grammar_state(b);
        if (none >= 0) grammar_eps(b, none, name);
        if (some >= 0) grammar_call(b, grammar_byte_to(b, some, ','), ws, name);
        TRY(add_member(x, name, &m[i], after));
        if (m[i].required) {
            none = -1;
        } else if (some >= 0) {
            grammar_eps(b, some, after);
        }
        some = after;
    }
    if (none < 0) none = grammar_state(b); /* no way leads there */
    if (some < 0) some = grammar_state(b);
    if (cJSON_IsTrue(more) || cJSON_IsObject(more) || (!more && !get(s, "properties")))
        TRY(add_others(x, more, m, n, none, some));
    const int32_t close = grammar_call_to(b, some, ws);
    grammar_eps(b, none, close);
    grammar_bytes(b, close, '}', '}', to);
    return b->rc;
}

static err_code add_object(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    const cJSON *more = get(s, "additionalProperties");
    member *m = NULL;
    int n = 0;
    if (more && !cJSON_IsBool(more) && !cJSON_IsObject(more))
        return not_a(x, "additionalProperties", "a boolean or a schema");
    err_code rc = gather(x, s, &m, &n);
    if (rc == OK) rc = add_members(x, from, s, m, n, to);
    mem_free(m);
    return rc;
}

/* ---- constants and types ---- */

static int type_of(const cJSON *v)
{
    if (cJSON_IsNull(v)) return T_NULL;
    if (cJSON_IsBool(v)) return T_BOOL;
    if (cJSON_IsString(v)) return T_STR;
    if (cJSON_IsArray(v)) return T_ARR;
    if (cJSON_IsObject(v)) return T_OBJ;
    return v->valuedouble == floor(v->valuedouble) ? T_INT | T_NUM : T_NUM;
}

static err_code type_bit(schema *x, const cJSON *v, int *mask)
{
    for (size_t i = 0; cJSON_IsString(v) && i < sizeof types / sizeof *types; i++) {
        if (strcmp(types[i].name, v->valuestring) != 0) continue;
        *mask |= types[i].bit;
        return OK;
    }
    return not_a(x, "type", "the name of a type");
}

/* Types that may be generated; *named: the schema says them. */
static err_code type_mask(schema *x, const cJSON *s, int *mask, bool *named)
{
    const cJSON *t = get(s, "type"), *v;
    *mask = 0;
    *named = t != NULL;
    if (cJSON_IsArray(t)) {
        cJSON_ArrayForEach(v, t) TRY(type_bit(x, v, mask));
    } else if (t) {
        TRY(type_bit(x, t, mask));
    }
    for (size_t i = 0; !t && i < sizeof keywords / sizeof *keywords; i++)
        if (keywords[i].type && get(s, keywords[i].name)) *mask |= keywords[i].type;
    if (*mask && cJSON_IsTrue(get(s, "nullable"))) *mask |= T_NULL;
    return OK;
}

static err_code add_constants(schema *x, int32_t from, const cJSON *s, int mask, bool named,
                              int32_t to)
{
    const cJSON *one = get(s, "const"), *list = get(s, "enum"), *v;
    bool any = false;
    if (list && !cJSON_IsArray(list)) return not_a(x, "enum", "an array");
    for (size_t i = 0; i < sizeof keywords / sizeof *keywords; i++)
        if (keywords[i].type && get(s, keywords[i].name))
            return err_set(x->e, E_UNSUPPORTED, "schema: '%s' beside '%s'", keywords[i].name,
                           one ? "const" : "enum");
    for (v = list ? list->child : one; v; v = list ? v->next : NULL) {
        if (named && !(type_of(v) & mask)) continue;
        if (one && list && !cJSON_Compare(one, v, true)) continue;
        grammar_eps(x->b, grammar_json_value(x->b, from, v), to);
        any = true;
    }
    return any ? x->b->rc
               : err_set(x->e, E_INPUT, "schema: no value of '%s' can be", list ? "enum" : "const");
}

static err_code add_types(schema *x, int32_t from, const cJSON *s, int mask, int32_t to)
{
    grammar_build *b = x->b;
    if (mask & T_NULL) grammar_eps(b, grammar_text(b, from, "null", 4), to);
    if (mask & T_BOOL) {
        grammar_eps(b, grammar_text(b, from, "true", 4), to);
        grammar_eps(b, grammar_text(b, from, "false", 5), to);
    }
    if (mask & (T_INT | T_NUM)) TRY(add_number(x, from, s, !(mask & T_NUM), to));
    if (mask & T_STR) TRY(add_string(x, from, s, to));
    if (mask & T_ARR) TRY(add_array(x, from, s, to));
    if (mask & T_OBJ) TRY(add_object(x, from, s, to));
    return b->rc;
}

/* ---- references and combinations ---- */

/* One part of a JSON pointer, ~0 and ~1 and %XX not taken back but in the plainest way. */
static const cJSON *pointer_step(const cJSON *at, const char *p, size_t n)
{
    char name[256];
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        if (k + 1 >= sizeof name) return NULL;
        if (p[i] == '~' && i + 1 < n && (p[i + 1] == '0' || p[i + 1] == '1'))
            name[k++] = p[++i] == '0' ? '~' : '/';
        else
            name[k++] = p[i];
    }
    name[k] = '\0';
    if (cJSON_IsObject(at)) return get(at, name);
    int index = 0;
    for (size_t i = 0; i < k; i++) {
        if (name[i] < '0' || name[i] > '9' || index > 1 << 20) return NULL;
        index = index * 10 + (name[i] - '0');
    }
    return cJSON_IsArray(at) && k ? cJSON_GetArrayItem(at, index) : NULL;
}

static err_code resolve(schema *x, const cJSON *ref, const cJSON **out)
{
    if (!cJSON_IsString(ref)) return not_a(x, "$ref", "a string");
    const char *p = ref->valuestring;
    *out = x->root;
    if (*p != '#' || (p[1] && p[1] != '/'))
        return err_set(x->e, E_UNSUPPORTED, "schema: '$ref': only within the schema, got '%.60s'",
                       p);
    for (p++; *p == '/' && *out;) {
        const size_t n = strcspn(++p, "/");
        *out = pointer_step(*out, p, n);
        p += n;
    }
    return *out ? OK
                : err_set(x->e, E_INPUT, "schema: '$ref': nothing at '%.60s'", ref->valuestring);
}

/* A rule for what is referred to, made once: so it may refer to itself. */
static err_code add_ref(schema *x, int32_t from, const cJSON *ref, int32_t to)
{
    const cJSON *s;
    TRY(resolve(x, ref, &s));
    for (int i = 0; i < x->n_refs; i++) {
        if (x->ref[i].to != s) continue;
        grammar_call(x->b, from, x->ref[i].rule, to);
        return x->b->rc;
    }
    if (x->n_refs == MAX_REFS)
        return err_set(x->e, E_LIMIT, "schema: more than %d references", MAX_REFS);
    const int32_t rule = grammar_rule_new(x->b);
    TRY(x->b->rc);
    const grammar_rule r = x->b->rule[rule];
    x->ref[x->n_refs].to = s;
    x->ref[x->n_refs++].rule = rule;
    grammar_call(x->b, from, rule, to);
    return add(x, r.start, s, r.end);
}

/* What stands beside `key`; NULL when that is nothing but annotations. */
static err_code beside(schema *x, const cJSON *s, const char *key, cJSON **out)
{
    const cJSON *v;
    bool any = false;
    *out = NULL;
    cJSON_ArrayForEach(v, s) any |= strcmp(v->string, key) != 0 && !grammar_annotation(v->string);
    if (!any) return OK;
    *out = cJSON_Duplicate(s, true);
    if (!*out) return err_set(x->e, E_NOMEM, "schema: no memory");
    cJSON_DeleteItemFromObjectCaseSensitive(*out, key);
    return OK;
}

/* `part` together with what stands beside it. */
static err_code add_with(schema *x, int32_t from, const cJSON *rest, const cJSON *part, int32_t to)
{
    cJSON *both;
    const cJSON *ref = get(part, "$ref");
    if (!rest) return add(x, from, part, to);
    if (ref) TRY(resolve(x, ref, &part));
    TRY(grammar_merge(&both, rest, part, x->e));
    const err_code rc = add(x, from, both, to);
    cJSON_Delete(both);
    return rc;
}

static err_code add_any_of(schema *x, int32_t from, const cJSON *s, const char *key, int32_t to)
{
    const cJSON *list = get(s, key), *v, *w;
    cJSON *rest;
    if (!cJSON_IsArray(list) || !list->child) return not_a(x, key, "an array of schemas");
    if (cJSON_GetArraySize(list) > MAX_BRANCHES)
        return err_set(x->e, E_LIMIT, "schema: '%s': more than %d schemas", key, MAX_BRANCHES);
    if (!strcmp(key, "oneOf")) {
        cJSON_ArrayForEach(v, list) for (w = v->next; w; w = w->next)
        {
            const cJSON *a = v, *b = w;
            if (get(a, "$ref")) TRY(resolve(x, get(a, "$ref"), &a));
            if (get(b, "$ref")) TRY(resolve(x, get(b, "$ref"), &b));
            if (!grammar_disjoint(a, b))
                return err_set(x->e, E_UNSUPPORTED,
                               "schema: 'oneOf' of schemas that may hold at once (use 'anyOf')");
        }
    }
    TRY(beside(x, s, key, &rest));
    err_code rc = OK;
    for (v = list->child; v && rc == OK; v = v->next) rc = add_with(x, from, rest, v, to);
    cJSON_Delete(rest);
    return rc;
}

static err_code add_all_of(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    const cJSON *list = get(s, "allOf"), *v;
    cJSON *all, *more;
    if (!cJSON_IsArray(list) || !list->child) return not_a(x, "allOf", "an array of schemas");
    TRY(beside(x, s, "allOf", &all));
    if (!all && !list->child->next) return add(x, from, list->child, to);
    if (!all && !(all = cJSON_CreateObject())) return err_set(x->e, E_NOMEM, "schema: no memory");
    err_code rc = OK;
    cJSON_ArrayForEach(v, list)
    {
        const cJSON *part = v, *ref = get(v, "$ref");
        if (ref) rc = resolve(x, ref, &part);
        if (rc == OK) rc = grammar_merge(&more, all, part, x->e);
        if (rc != OK) break;
        cJSON_Delete(all);
        all = more;
    }
    if (rc == OK) rc = add(x, from, all, to);
    cJSON_Delete(all);
    return rc;
}

/* Fails closed: a keyword that is not known is refused by name. */
static err_code check_keys(schema *x, const cJSON *s)
{
    const cJSON *v;
    cJSON_ArrayForEach(v, s)
    {
        bool known = grammar_annotation(v->string);
        for (size_t i = 0; i < sizeof keywords / sizeof *keywords && !known; i++)
            known = !strcmp(keywords[i].name, v->string);
        if (!known && !strcmp(v->string, "uniqueItems") && cJSON_IsFalse(v)) known = true;
        if (!known)
            return err_set(x->e, E_UNSUPPORTED, "schema: the keyword '%.60s' is not supported",
                           v->string);
    }
    return OK;
}

static err_code add_schema(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    int mask;
    bool named;
    if (cJSON_IsTrue(s)) {
        grammar_call(x->b, from, grammar_json_rule(x->j, JSON_RULE_ANY), to);
        return x->b->rc;
    }
    if (cJSON_IsFalse(s)) return OK; /* nothing validates: no way leads on */
    if (!cJSON_IsObject(s)) return err_set(x->e, E_INPUT, "schema: expected an object");
    TRY(check_keys(x, s));
    if (get(s, "allOf")) return add_all_of(x, from, s, to);
    if (get(s, "anyOf")) return add_any_of(x, from, s, "anyOf", to);
    if (get(s, "oneOf")) return add_any_of(x, from, s, "oneOf", to);
    if (get(s, "$ref")) {
        cJSON *rest;
        TRY(beside(x, s, "$ref", &rest));
        const err_code rc = rest ? add_with(x, from, rest, s, to)
                                 : add_ref(x, from, get(s, "$ref"), to);
        cJSON_Delete(rest);
        return rc;
    }
    TRY(type_mask(x, s, &mask, &named));
    if (get(s, "enum") || get(s, "const")) return add_constants(x, from, s, mask, named, to);
    if (mask) return add_types(x, from, s, mask, to);
    grammar_call(x->b, from, grammar_json_rule(x->j, JSON_RULE_ANY), to);
    return x->b->rc;
}

static err_code add(schema *x, int32_t from, const cJSON *s, int32_t to)
{
    if (x->b->rc != OK) return x->b->rc;
    if (++x->depth > MAX_NESTED) return err_set(x->e, E_LIMIT, "schema: nested too deep");
    const err_code rc = add_schema(x, from, s, to);
    x->depth--;
    return rc;
}

static int count_values(const cJSON *v)
{
    int n = 1;
    for (const cJSON *w = v->child; w && n <= MAX_VALUES; w = w->next) n += count_values(w);
    return n;
}

err_code grammar_schema_add(grammar_json *j, int32_t from, const cJSON *s, const cJSON *root,
                            int32_t to, err *e)
{
    schema *x;
    if (count_values(root) > MAX_VALUES)
        return err_set(e, E_LIMIT, "schema: more than %d values", MAX_VALUES);
    TRY(mem_alloc((void **)&x, 1, sizeof *x, "schema", e));
    x->j = j;
    x->b = j->b;
    x->root = root;
    x->e = e;
    const err_code rc = add(x, from, s, to);
    mem_free(x);
    return rc;
}
