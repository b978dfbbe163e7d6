/* config.yaml to JSON by libyaml's events. */
#include "formats/yaml.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <yaml.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

typedef struct {
    cJSON *node; /* object or array being filled */
    char *key;   /* of the value to come, objects only; NULL when a key is expected */
} frame;

typedef struct {
    const char *what;
    cJSON *root;
    frame at[YAML_MAX_DEPTH];
    int depth;
    int documents;
} builder;

static err_code fail(const builder *b, const yaml_event_t *ev, const char *text, err *e)
{
    return err_set(e, E_INPUT, "%s: line %zu: %s", b->what, ev->start_mark.line + 1, text);
}

static bool one_of(const char *s, const char *const *words)
{
    for (; *words; words++)
        if (strcmp(s, *words) == 0) return true;
    return false;
}

static const char *const words_null[] = {"", "~", "null", "Null", "NULL", NULL};
static const char *const words_true[] = {"true", "True", "TRUE", "yes", "Yes",
                                         "YES",  "on",   "On",   "ON",  NULL};
static const char *const words_false[] = {"false", "False", "FALSE", "no",  "No",
                                          "NO",    "off",   "Off",   "OFF", NULL};

/* Decimal integers without a leading zero, and floats; not octal, hex, underscores or sexagesimals.
 */
static bool is_number(const char *s)
{
    s += *s == '-' || *s == '+';
    const size_t whole = strspn(s, "0123456789");
    const char *p = s + whole;
    size_t frac = 0;
    if (*p == '.') {
        frac = strspn(p + 1, "0123456789");
        p += 1 + frac;
    } else if (whole > 1 && *s == '0') {
        return false; /* octal for YAML 1.1 */
    }
    if (whole + frac == 0) return false;
    if (*p == 'e' || *p == 'E') {
        p++;
        p += *p == '-' || *p == '+';
        const size_t digits = strspn(p, "0123456789");
        if (!digits) return false;
        p += digits;
    }
    return *p == 0;
}

static bool is_special_float(const char *s)
{
    static const char *const words[] = {".inf", ".Inf", ".INF", ".nan", ".NaN", ".NAN", NULL};
    return one_of(s + (*s == '-' || *s == '+'), words);
}

static err_code make_scalar(cJSON **out, const builder *b, const yaml_event_t *ev, err *e)
{
    const char *s = (const char *)ev->data.scalar.value;
    const bool plain = ev->data.scalar.style == YAML_PLAIN_SCALAR_STYLE;

    if (strlen(s) != ev->data.scalar.length) return fail(b, ev, "a string holds a zero byte", e);
    if (plain && is_special_float(s)) return fail(b, ev, "a number is not finite", e);
    if (plain && one_of(s, words_null)) {
        *out = cJSON_CreateNull();
    } else if (plain && one_of(s, words_true)) {
        *out = cJSON_CreateTrue();
    } else if (plain && one_of(s, words_false)) {
        *out = cJSON_CreateFalse();
    } else if (plain && is_number(s)) {
        const double v = strtod(s, NULL);
        if (!(v > -1e300 && v < 1e300)) return fail(b, ev, "a number is too large", e);
        *out = cJSON_CreateNumber(v);
    } else {
        *out = cJSON_CreateString(s);
    }
    return *out ? OK : err_set(e, E_NOMEM, "%s: out of memory", b->what);
}

/* Hangs a node into the open map or list; owns it, also on failure. */
static err_code attach(builder *b, const yaml_event_t *ev, cJSON *node, err *e)
{
    if (b->depth == 0) {
        if (b->root) {
            cJSON_Delete(node);
            return fail(b, ev, "a second value", e);
        }
        b->root = node;
        return OK;
    }
    frame *f = &b->at[b->depth - 1];
    const bool ok = f->key ? cJSON_AddItemToObject(f->node, f->key, node)
                           : cJSON_AddItemToArray(f->node, node);
    mem_free(f->key);
    f->key = NULL;
    if (ok) return OK;
    cJSON_Delete(node);
    return err_set(e, E_NOMEM, "%s: out of memory", b->what);
}

static bool key_expected(const builder *b)
{
    return b->depth > 0 && cJSON_IsObject(b->at[b->depth - 1].node) && !b->at[b->depth - 1].key;
}

static err_code on_key(builder *b, const yaml_event_t *ev, err *e)
{
    frame *f = &b->at[b->depth - 1];
    const char *s = (const char *)ev->data.scalar.value;
    if (strlen(s) != ev->data.scalar.length || !*s)
        return fail(b, ev, "a key is empty or holds a zero byte", e);
    if (strcmp(s, "<<") == 0 && ev->data.scalar.style == YAML_PLAIN_SCALAR_STYLE)
        return fail(b, ev, "merge keys are not accepted", e);
    if (cJSON_GetObjectItemCaseSensitive(f->node, s))
        return err_set(e, E_INPUT, "%s: line %zu: key '%.100s' appears twice", b->what,
                       ev->start_mark.line + 1, s);
    return mem_strdup(&f->key, s, e);
}

static err_code on_open(builder *b, const yaml_event_t *ev, bool map, err *e)
{
    if (key_expected(b)) return fail(b, ev, "a key must be a string", e);
    if (b->depth == YAML_MAX_DEPTH) return fail(b, ev, "nested too deep", e);
    cJSON *node = map ? cJSON_CreateObject() : cJSON_CreateArray();
    if (!node) return err_set(e, E_NOMEM, "%s: out of memory", b->what);
    TRY(attach(b, ev, node, e));
    b->at[b->depth++] = (frame){node, NULL};
    return OK;
}

static err_code on_scalar(builder *b, const yaml_event_t *ev, err *e)
{
    cJSON *node;
    if (ev->data.scalar.anchor || ev->data.scalar.tag)
        return fail(b, ev, "anchors and tags are not accepted", e);
    if (key_expected(b)) return on_key(b, ev, e);
    TRY(make_scalar(&node, b, ev, e));
    return attach(b, ev, node, e);
}

static err_code on_event(builder *b, const yaml_event_t *ev, err *e)
{
    switch (ev->type) {
    case YAML_DOCUMENT_START_EVENT:
        if (b->documents++) return fail(b, ev, "a second document", e);
        return OK;
    case YAML_ALIAS_EVENT: return fail(b, ev, "aliases are not accepted", e);
    case YAML_SCALAR_EVENT: return on_scalar(b, ev, e);
    case YAML_MAPPING_START_EVENT:
        if (ev->data.mapping_start.anchor || ev->data.mapping_start.tag)
            return fail(b, ev, "anchors and tags are not accepted", e);
        return on_open(b, ev, true, e);
    case YAML_SEQUENCE_START_EVENT:
        if (ev->data.sequence_start.anchor || ev->data.sequence_start.tag)
            return fail(b, ev, "anchors and tags are not accepted", e);
        return on_open(b, ev, false, e);
    case YAML_MAPPING_END_EVENT:
    case YAML_SEQUENCE_END_EVENT: b->depth--; return OK;
    default: return OK;
    }
}

static err_code read_events(builder *b, yaml_parser_t *p, err *e)
{
    for (bool more = true; more;) {
        yaml_event_t ev;
        if (!yaml_parser_parse(p, &ev)) {
            if (p->error == YAML_MEMORY_ERROR)
                return err_set(e, E_NOMEM, "%s: out of memory", b->what);
            return err_set(e, E_INPUT, "%s: line %zu: %s", b->what, p->problem_mark.line + 1,
                           p->problem ? p->problem : "not YAML");
        }
        more = ev.type != YAML_STREAM_END_EVENT;
        const err_code rc = on_event(b, &ev, e);
        yaml_event_delete(&ev);
        TRY(rc);
    }
    return b->root ? OK : err_set(e, E_INPUT, "%s: no value in it", b->what);
}

err_code yaml_parse(cJSON **out, const char *text, size_t n, const char *what, err *e)
{
    builder b = {.what = what};
    yaml_parser_t p;

    *out = NULL;
    if (n > YAML_MAX_BYTES)
        return err_set(e, E_LIMIT, "%s: %zu bytes, expected at most %zu", what, n, YAML_MAX_BYTES);
    if (!json_utf8_valid(text, n)) return err_set(e, E_INPUT, "%s: not UTF-8", what);
    if (!yaml_parser_initialize(&p)) return err_set(e, E_NOMEM, "%s: out of memory", what);
    yaml_parser_set_encoding(&p, YAML_UTF8_ENCODING);
    yaml_parser_set_input_string(&p, (const unsigned char *)text, n);
    const err_code rc = read_events(&b, &p, e);
    yaml_parser_delete(&p);
    for (int i = 0; i < YAML_MAX_DEPTH; i++) mem_free(b.at[i].key);
    if (rc == OK)
        *out = b.root;
    else
        cJSON_Delete(b.root);
    return rc;
}

err_code yaml_load(cJSON **out, const char *path, err *e)
{
    char *text;
    size_t n;
    *out = NULL;
    TRY(file_read(&text, &n, path, YAML_MAX_BYTES, e));
    const err_code rc = yaml_parse(out, text, n, path, e);
    mem_free(text);
    return rc;
}

/* ---- printing ---- */

typedef struct {
    char *s;
    size_t n, cap;
    err *e;
    err_code rc;
} text_buf;

static void put(text_buf *b, const char *s, size_t n)
{
    if (b->rc != OK) return;
    if (b->n + n + 1 > b->cap) {
        void *p;
        const size_t cap = 2 * (b->n + n + 1) + 1024;
        if ((b->rc = mem_alloc(&p, cap, 1, "YAML text", b->e)) != OK) return;
        if (b->n) memcpy(p, b->s, b->n);
        mem_free(b->s);
        b->s = p;
        b->cap = cap;
    }
    memcpy(b->s + b->n, s, n);
    b->n += n;
    b->s[b->n] = 0;
}
static void puts_buf(text_buf *b, const char *s) { put(b, s, strlen(s)); }

static bool plain_is_safe(const char *s)
{
    static const char first[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_";
    static const char rest[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz_0123456789./-";
    if (!*s || !strchr(first, *s) || s[strspn(s, rest)]) return false;
    return !one_of(s, words_null) && !one_of(s, words_true) && !one_of(s, words_false);
}

/* The code point at s (valid UTF-8) and its length. */
static uint32_t code_point(const char *s, int *len)
{
    const unsigned char c = (unsigned char)*s;
    *len = c < 0x80 ? 1 : c < 0xe0 ? 2 : c < 0xf0 ? 3 : 4;
    uint32_t v = *len == 1 ? c : c & (0x7fu >> *len);
    for (int i = 1; i < *len; i++) v = v << 6 | ((unsigned char)s[i] & 0x3fu);
    return v;
}

/* Everything beyond printable ASCII by number: some of it would count as a line break. */
static void put_escaped(text_buf *b, const char *s)
{
    int len;
    puts_buf(b, "\"");
    for (; *s; s += len) {
        char hex[16];
        const uint32_t c = code_point(s, &len);
        if (c == '"' || c == '\\') {
            put(b, "\\", 1);
            put(b, s, 1);
        } else if (c >= 0x20 && c < 0x7f) {
            put(b, s, 1);
        } else {
            (void)snprintf(hex, sizeof hex,
                           c < 0x100     ? "\\x%02X"
                           : c < 0x10000 ? "\\u%04X"
                                         : "\\U%08X",
                           (unsigned)c);
            puts_buf(b, hex);
        }
    }
    puts_buf(b, "\"");
}

static void put_string(text_buf *b, const char *s)
{
    bool simple = true; /* printable ASCII: single quotes, as PyYAML prints */
    for (const char *p = s; *p; p++) simple = simple && *p >= 0x20 && *p < 0x7f;
    if (plain_is_safe(s)) {
        puts_buf(b, s);
    } else if (!simple) {
        put_escaped(b, s);
    } else {
        puts_buf(b, "'");
        for (; *s; s++) {
            if (*s == '\'') put(b, s, 1);
            put(b, s, 1);
        }
        puts_buf(b, "'");
    }
}

static void put_scalar(text_buf *b, const cJSON *v)
{
    char num[40];
    if (cJSON_IsString(v)) {
        put_string(b, v->valuestring);
    } else if (cJSON_IsRaw(v)) {
        puts_buf(b, v->valuestring);
    } else if (cJSON_IsNumber(v)) {
        (void)snprintf(num, sizeof num, "%.17g", v->valuedouble);
        puts_buf(b, num);
    } else {
        puts_buf(b, cJSON_IsTrue(v) ? "true" : cJSON_IsFalse(v) ? "false" : "null");
    }
}

static void put_value(text_buf *b, const cJSON *v, int indent);

static void put_spaces(text_buf *b, int n)
{
    for (; n > 0; n--) put(b, " ", 1);
}

static int item_by_key(const void *a, const void *b)
{
    return strcmp((*(const cJSON *const *)a)->string, (*(const cJSON *const *)b)->string);
}

static void put_map(text_buf *b, const cJSON *o, int indent)
{
    const int n = cJSON_GetArraySize(o);
    const cJSON *v;
    void *p = NULL;
    int i = 0;

    if (b->rc == OK) b->rc = mem_alloc(&p, (size_t)n, sizeof v, "YAML keys", b->e);
    if (b->rc != OK) return;
    const cJSON **items = p;
    cJSON_ArrayForEach(v, o) items[i++] = v;
    qsort(items, (size_t)n, sizeof *items, item_by_key);
    for (i = 0; i < n; i++) {
        put_spaces(b, indent);
        put_string(b, items[i]->string);
        puts_buf(b, ":");
        put_value(b, items[i], indent);
    }
    mem_free(p);
}

/* What follows "key:" or "-": on the same line, or as a block below. */
static void put_value(text_buf *b, const cJSON *v, int indent)
{
    const cJSON *item;
    if (cJSON_IsObject(v) && v->child) {
        puts_buf(b, "\n");
        put_map(b, v, indent + 2);
    } else if (cJSON_IsArray(v) && v->child) {
        puts_buf(b, "\n");
        cJSON_ArrayForEach(item, v)
        {
            put_spaces(b, indent); /* PyYAML does not indent a list below its key */
            puts_buf(b, "-");
            put_value(b, item, indent + 2);
        }
    } else {
        puts_buf(b, " ");
        if (cJSON_IsObject(v))
            puts_buf(b, "{}");
        else if (cJSON_IsArray(v))
            puts_buf(b, "[]");
        else
            put_scalar(b, v);
        puts_buf(b, "\n");
    }
}

err_code yaml_print(char **out, const cJSON *o, err *e)
{
    text_buf b = {.e = e, .rc = OK};
    *out = NULL;
    if (!cJSON_IsObject(o) || !o->child)
        return err_set(e, E_INPUT, "YAML: expected a map with entries");
    put_map(&b, o, 0);
    if (b.rc == OK)
        *out = b.s;
    else
        mem_free(b.s);
    return b.rc;
}

cJSON *yaml_float(float v)
{
    char s[48], out[64];
    for (int digits = 1; digits <= 9; digits++) {
        (void)snprintf(s, sizeof s, "%.*g", digits, (double)v);
        if (strtof(s, NULL) == v) break;
    }
    char *exp = strchr(s, 'e');
    if (exp && strtol(exp + 1, NULL, 10) > 0 && strtol(exp + 1, NULL, 10) < 16) {
        (void)snprintf(out, sizeof out, "%.1f",
                       (double)v); /* Python switches to exponents at 1e16 */
    } else if (exp && !strchr(s, '.')) {
        (void)snprintf(out, sizeof out, "%.*s.0%s", (int)(exp - s), s, exp);
    } else {
        (void)snprintf(out, sizeof out, "%s%s", s, exp || strchr(s, '.') ? "" : ".0");
    }
    return cJSON_CreateRaw(out);
}
