/* Text: output with its marks, code points, and what Python's str, repr, json.dumps, % and format
 * write. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <utf8proc.h>

#include "formats/jinja_internal.h"

/* ---- output ---- */

static err_code room(jrun *r, jout *o, size_t n)
{
    char *p;
    uint8_t *mark;
    if (n > JINJA_MAX_OUTPUT || o->n + n > JINJA_MAX_OUTPUT)
        return err_set(r->e, E_LIMIT, "the template writes too much");
    if (o->n + n <= o->cap) return OK;
    const size_t cap = o->cap ? 2 * (o->n + n) : n + 64;
    TRY(jinja_get(&r->mem, (void **)&p, cap, r->e));
    TRY(jinja_get(&r->mem, (void **)&mark, cap, r->e));
    if (o->n) {
        memcpy(p, o->p, o->n);
        memcpy(mark, o->mark, o->n);
    }
    o->p = p;
    o->mark = mark;
    o->cap = cap;
    return OK;
}

static err_code put(jrun *r, jout *o, const char *s, size_t n, int mark)
{
    if (!n) return OK;
    TRY(room(r, o, n));
    memcpy(o->p + o->n, s, n);
    memset(o->mark + o->n, mark, n);
    o->n += n;
    return OK;
}

err_code jout_add(jrun *r, jout *o, jstr s)
{
    TRY(jinja_step(r, (int64_t)(s.n / 64)));
    if (!s.mark) return put(r, o, s.p, s.n, JINJA_OWN);
    TRY(room(r, o, s.n));
    memcpy(o->p + o->n, s.p, s.n);
    memcpy(o->mark + o->n, s.mark, s.n);
    o->n += s.n;
    return OK;
}

err_code jout_data(jrun *r, jout *o, const char *s, size_t n)
{
    return put(r, o, s, n, JINJA_DATA);
}

err_code jout_own(jrun *r, jout *o, const char *s, size_t n) { return put(r, o, s, n, JINJA_OWN); }

jstr jout_str(const jout *o) { return (jstr){o->n ? o->p : "", o->n ? o->mark : NULL, o->n}; }

/* ---- code points ---- */

uint32_t jstr_code(jstr s, size_t at, size_t *len)
{
    const uint8_t c = (uint8_t)s.p[at];
    size_t n = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : c >= 0xc0 ? 2 : 1;
    uint32_t v = n > 1 ? c & (0x7fu >> n) : c;
    if (n > s.n - at) n = s.n - at;
    for (size_t i = 1; i < n; i++) v = v << 6 | ((uint8_t)s.p[at + i] & 0x3f);
    *len = n;
    return v;
}

int64_t jstr_length(jstr s)
{
    int64_t n = 0;
    for (size_t i = 0; i < s.n; i++) n += ((uint8_t)s.p[i] & 0xc0) != 0x80;
    return n;
}

size_t jstr_offset(jstr s, int64_t i)
{
    size_t at = 0;
    for (; at < s.n; at++)
        if (((uint8_t)s.p[at] & 0xc0) != 0x80 && i-- == 0) break;
    return at;
}

jstr jstr_part(jstr s, size_t from, size_t to)
{
    if (to > s.n) to = s.n;
    if (from >= to) return (jstr){"", NULL, 0};
    return (jstr){s.p + from, s.mark ? s.mark + from : NULL, to - from};
}

bool jstr_is_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 ||
           c == 0x1680 || (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 ||
           c == 0x202f || c == 0x205f || c == 0x3000;
}

bool jstr_printable(uint32_t c)
{
    if (c < 0x80) return c >= 0x20 && c < 0x7f;
    switch (utf8proc_category((utf8proc_int32_t)c)) {
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS: return false;
    default: return true;
    }
}

int64_t jstr_find(jstr s, jstr what, size_t from)
{
    if (what.n > s.n || from > s.n - what.n) return -1;
    if (!what.n) return (int64_t)from;
    const char *p = memmem(s.p + from, s.n - from, what.p, what.n);
    return p ? p - s.p : -1;
}

/* ---- numbers ---- */

/* repr of a float: the fewest digits that read back. */
static size_t float_text(char out[64], double d)
{
    char digits[64];
    int n = 0;
    if (isnan(d)) return (size_t)sprintf(out, "nan");
    if (isinf(d)) return (size_t)sprintf(out, d < 0 ? "-inf" : "inf");
    for (int p = 1; p <= 17; p++) {
        n = snprintf(digits, sizeof digits, "%.*e", p - 1, d);
        if (strtod(digits, NULL) == d) break;
    }
    const char *e = strchr(digits, 'e');
    const int exp = atoi(e + 1),
              places = (int)(e - digits) - (digits[0] == '-') - (strchr(digits, '.') != NULL);
    if (exp >= -4 && exp < 16) {
        n = snprintf(out, 64, "%.*f", places - 1 > exp ? places - 1 - exp : 0, d);
        if (!strchr(out, '.')) n += sprintf(out + n, ".0");
        return (size_t)n;
    }
    return (size_t)snprintf(out, 64, "%.*se%c%02d", (int)(e - digits), digits, exp < 0 ? '-' : '+',
                            abs(exp));
}

/* ---- str and repr ---- */

static err_code show_number(jrun *r, jout *o, const jinja_value *v)
{
    char s[64];
    const size_t n = v->type == JV_FLOAT ? float_text(s, v->d)
                                         : (size_t)snprintf(s, sizeof s, "%lld", (long long)v->i);
    return jout_data(r, o, s, n);
}

static err_code repr_string(jrun *r, jout *o, jstr s)
{
    const bool single = !memchr(s.p, '\'', s.n) || memchr(s.p, '"', s.n);
    const char quote = single ? '\'' : '"';
    char esc[16];
    TRY(jout_data(r, o, &quote, 1));
    for (size_t i = 0, len; i < s.n; i += len) {
        const uint32_t c = jstr_code(s, i, &len);
        int n = 0;
        if (c == (uint32_t)quote || c == '\\')
            n = sprintf(esc, "\\%c", (int)c);
        else if (c == '\n')
            n = sprintf(esc, "\\n");
        else if (c == '\r')
            n = sprintf(esc, "\\r");
        else if (c == '\t')
            n = sprintf(esc, "\\t");
        else if (!jstr_printable(c))
            n = sprintf(esc, c < 0x100 ? "\\x%02x" : c < 0x10000 ? "\\u%04x" : "\\U%08x", c);
        TRY(n ? jout_data(r, o, esc, (size_t)n) : jout_add(r, o, jstr_part(s, i, i + len)));
    }
    return jout_data(r, o, &quote, 1);
}

static err_code repr_list(jrun *r, jout *o, const jinja_value *v, int depth)
{
    const bool tuple = v->kind == JL_TUPLE;
    TRY(jout_data(r, o, tuple ? "(" : "[", 1));
    for (int64_t i = 0; i < v->l.n; i++) {
        if (i) TRY(jout_data(r, o, ", ", 2));
        TRY(jv_repr(r, o, v->l.v[i], depth + 1));
    }
    if (tuple && v->l.n == 1) TRY(jout_data(r, o, ",", 1));
    return jout_data(r, o, tuple ? ")" : "]", 1);
}

static err_code repr_map(jrun *r, jout *o, const jinja_value *v, int depth)
{
    TRY(jout_data(r, o, "{", 1));
    for (int32_t i = 0; i < v->m.n; i++) {
        if (i) TRY(jout_data(r, o, ", ", 2));
        TRY(jv_repr(r, o, v->m.key[i], depth + 1));
        TRY(jout_data(r, o, ": ", 2));
        TRY(jv_repr(r, o, v->m.val[i], depth + 1));
    }
    return jout_data(r, o, "}", 1);
}

err_code jv_repr(jrun *r, jout *o, const jinja_value *v, int depth)
{
    TRY(jinja_step(r, 1));
    if (depth > JINJA_MAX_DEPTH) return err_set(r->e, E_LIMIT, "a value is nested too deep");
    switch (v->type) {
    case JV_UNDEF: return jout_data(r, o, "Undefined", 9);
    case JV_STR: return repr_string(r, o, v->s);
    case JV_LIST:
        if (v->kind == JL_ITER) return jout_data(r, o, "<generator object>", 18);
        return repr_list(r, o, v, depth);
    case JV_MAP: return repr_map(r, o, v, depth);
    default: return jv_show(r, o, v);
    }
}

err_code jv_show(jrun *r, jout *o, const jinja_value *v)
{
    char s[64];
    switch (v->type) {
    case JV_UNDEF: return OK;
    case JV_NONE: return jout_data(r, o, "None", 4);
    case JV_BOOL: return jout_data(r, o, v->b ? "True" : "False", v->b ? 4 : 5);
    case JV_INT:
    case JV_FLOAT: return show_number(r, o, v);
    case JV_STR: return jout_add(r, o, v->s);
    case JV_LIST:
    case JV_MAP: return jv_repr(r, o, v, 0);
    default: return jout_data(r, o, s, (size_t)snprintf(s, sizeof s, "<%s>", jv_type_name(v)));
    }
}

err_code jv_text(jrun *r, const jinja_value *v, jstr *out)
{
    jout o = {0};
    if (v->type == JV_STR) {
        *out = v->s;
        return OK;
    }
    TRY(jv_show(r, &o, v));
    *out = jout_str(&o);
    return OK;
}

/* ---- json.dumps(ensure_ascii=False) ---- */

typedef struct {
    int64_t indent;              /* -1: one line */
    jstr indent_text, item, key; /* separators */
    bool sort, ascii;
} json_style;

static err_code json_string(jrun *r, jout *o, jstr s, bool ascii)
{
    static const char codes[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    char esc[16];
    TRY(jout_data(r, o, "\"", 1));
    for (size_t i = 0, len; i < s.n; i += len) {
        const uint32_t c = jstr_code(s, i, &len);
        const char *at = c && c < 0x80 ? strchr(codes, (int)c) : NULL;
        int n = 0;
        if (at)
            n = sprintf(esc, "\\%c", letters[at - codes]);
        else if (c < 0x20 || (ascii && c >= 0x7f && c < 0x10000))
            n = c == 0x7f ? 0 : sprintf(esc, "\\u%04x", c);
        else if (ascii && c >= 0x10000)
            n = sprintf(esc, "\\u%04x\\u%04x", 0xd7c0 + (c >> 10), 0xdc00 + (c & 0x3ff));
        TRY(n ? jout_data(r, o, esc, (size_t)n) : jout_add(r, o, jstr_part(s, i, i + len)));
    }
    return jout_data(r, o, "\"", 1);
}

static err_code json_value(jrun *r, jout *o, const jinja_value *v, const json_style *s, int depth);

static err_code json_line(jrun *r, jout *o, const json_style *s, int depth)
{
    if (s->indent < 0) return OK;
    TRY(jout_data(r, o, "\n", 1));
    for (int i = 0; i < depth; i++) TRY(jout_add(r, o, s->indent_text));
    return OK;
}

static err_code json_key(jrun *r, jout *o, const jinja_value *k, const json_style *s)
{
    static const char *const words[] = {"\"null\"", "\"false\"", "\"true\""};
    if (k->type == JV_STR) return json_string(r, o, k->s, s->ascii);
    if (k->type == JV_NONE || k->type == JV_BOOL) {
        const char *w = words[k->type == JV_NONE ? 0 : 1 + k->b];
        return jout_data(r, o, w, strlen(w));
    }
    if (k->type != JV_INT && k->type != JV_FLOAT)
        return jinja_error(r, "keys must be str, int, float, bool or None, not %s",
                           jv_type_name(k));
    TRY(jout_data(r, o, "\"", 1));
    TRY(jv_show(r, o, k));
    return jout_data(r, o, "\"", 1);
}

static err_code json_map(jrun *r, jout *o, const jinja_value *v, const json_style *s, int depth)
{
    jlist order = {0};
    if (!v->m.n) return jout_data(r, o, "{}", 2);
    TRY(jinja_get(&r->mem, (void **)&order.v, (size_t)v->m.n * sizeof *order.v, r->e));
    memcpy(order.v, v->m.key, (size_t)v->m.n * sizeof *order.v);
    order.n = v->m.n;
    if (s->sort) TRY(jf_sort(r, &order, order.v, false));
    TRY(jout_data(r, o, "{", 1));
    for (int64_t i = 0; i < order.n; i++) {
        if (i) TRY(jout_add(r, o, s->item));
        TRY(json_line(r, o, s, depth + 1));
        TRY(json_key(r, o, order.v[i], s));
        TRY(jout_add(r, o, s->key));
        TRY(json_value(r, o, jmap_get(&v->m, order.v[i]), s, depth + 1));
    }
    TRY(json_line(r, o, s, depth));
    return jout_data(r, o, "}", 1);
}

static err_code json_list(jrun *r, jout *o, const jinja_value *v, const json_style *s, int depth)
{
    if (!v->l.n) return jout_data(r, o, "[]", 2);
    TRY(jout_data(r, o, "[", 1));
    for (int64_t i = 0; i < v->l.n; i++) {
        if (i) TRY(jout_add(r, o, s->item));
        TRY(json_line(r, o, s, depth + 1));
        TRY(json_value(r, o, v->l.v[i], s, depth + 1));
    }
    TRY(json_line(r, o, s, depth));
    return jout_data(r, o, "]", 1);
}

static err_code json_value(jrun *r, jout *o, const jinja_value *v, const json_style *s, int depth)
{
    TRY(jinja_step(r, 1));
    if (depth > JINJA_MAX_DEPTH) return err_set(r->e, E_LIMIT, "a value is nested too deep");
    switch (v->type) {
    case JV_NONE: return jout_data(r, o, "null", 4);
    case JV_BOOL: return jout_data(r, o, v->b ? "true" : "false", v->b ? 4 : 5);
    case JV_INT: return show_number(r, o, v);
    case JV_FLOAT:
        if (isnan(v->d)) return jout_data(r, o, "NaN", 3);
        if (isinf(v->d))
            return jout_data(r, o, v->d < 0 ? "-Infinity" : "Infinity", v->d < 0 ? 9 : 8);
        return show_number(r, o, v);
    case JV_STR: return json_string(r, o, v->s, s->ascii);
    case JV_MAP: return json_map(r, o, v, s, depth);
    case JV_LIST:
        if (v->kind != JL_ITER) return json_list(r, o, v, s, depth);
        /* fall through */
    default: return jinja_error(r, "Object of type %s is not JSON serializable", jv_type_name(v));
    }
}

/* tojson(ensure_ascii=False, indent=None, separators=None, sort_keys=False), as transformers has
 * it. */
err_code jv_json(jrun *r, jout *o, const jinja_value *v, const jargs *a)
{
    json_style s = {.indent = -1, .item = {", ", NULL, 2}, .key = {": ", NULL, 2}};
    const jinja_value *indent = jinja_arg(a, 1, "indent"), *sep = jinja_arg(a, 2, "separators");
    jout pad = {0};
    s.ascii = jinja_arg_true(a, 0, "ensure_ascii", false);
    s.sort = jinja_arg_true(a, 3, "sort_keys", false);
    if (indent && indent->type == JV_STR) {
        s.indent = 1;
        s.indent_text = indent->s;
    } else if (indent && indent->type != JV_NONE) {
        TRY(jinja_arg_int(r, a, 1, "indent", 0, &s.indent));
        if (s.indent > 256) return jinja_error(r, "tojson: the indent is too large");
        if (s.indent < 0) s.indent = 0;
        for (int64_t i = 0; i < s.indent; i++) TRY(jout_data(r, &pad, " ", 1));
        s.indent_text = jout_str(&pad);
    }
    if (s.indent >= 0) s.item.n = 1; /* "," */
    if (sep && sep->type == JV_LIST && sep->l.n == 2 && sep->l.v[0]->type == JV_STR &&
        sep->l.v[1]->type == JV_STR) {
        s.item = sep->l.v[0]->s;
        s.key = sep->l.v[1]->s;
    } else if (sep && sep->type != JV_NONE) {
        return jinja_error(r, "tojson: separators must be two strings");
    }
    return json_value(r, o, v, &s, 0);
}

/* ---- % and format ---- */

/* One value by a conversion: d i f g e x s r, with C's flags, width and precision. */
static err_code convert(jrun *r, jout *o, const char *flags, char how, const jinja_value *v)
{
    char fmt[64], s[512];
    jout text = {0};
    int n;
    const bool number = v->type == JV_INT || v->type == JV_FLOAT || v->type == JV_BOOL;
    if (how == 's' || how == 'r') {
        char *end;
        TRY(how == 's' ? jv_show(r, &text, v) : jv_repr(r, &text, v, 0));
        const bool left = *flags == '-';
        const long width = strtol(flags + left, &end, 10);
        const int64_t cut = *end == '.' ? strtol(end + 1, NULL, 10) : INT64_MAX;
        jstr t = jout_str(&text);
        if (cut < jstr_length(t)) t = jstr_part(t, 0, jstr_offset(t, cut));
        const int64_t pad = width - jstr_length(t);
        if (left) TRY(jout_add(r, o, t));
        for (int64_t i = 0; i < pad; i++) TRY(jout_data(r, o, " ", 1));
        return left ? OK : jout_add(r, o, t);
    }
    if (!number)
        return jinja_error(r, "%%%c format: a real number is required, not %s", how,
                           jv_type_name(v));
    if (strchr("dixXo", how)) {
        const long long i = v->type == JV_FLOAT ? (long long)v->d
                            : v->type == JV_INT ? (long long)v->i
                                                : v->b;
        snprintf(fmt, sizeof fmt, "%%%sll%c", flags, how);
        n = snprintf(s, sizeof s, fmt, i);
    } else {
        snprintf(fmt, sizeof fmt, "%%%s%c", flags, how);
        n = snprintf(s, sizeof s, fmt,
                     v->type == JV_FLOAT ? v->d
                     : v->type == JV_INT ? (double)v->i
                                         : v->b);
    }
    if (n < 0 || n >= (int)sizeof s) return jinja_error(r, "a formatted number is too long");
    return jout_data(r, o, s, (size_t)n);
}

/* Flags, width and precision at s into flags [16]; widths below 100. */
static bool take_flags(const char *s, size_t n, char *flags, size_t *len)
{
    size_t i = 0;
    while (i < n && i < 12 && strchr("-+ 0#.123456789", s[i]) && s[i]) i++;
    memcpy(flags, s, i);
    flags[i] = '\0';
    *len = i;
    int run = 0;
    for (size_t k = 0; k < i; k++) {
        run = flags[k] >= '0' && flags[k] <= '9' ? run + 1 : 0;
        if (run > 2) return false;
    }
    return true;
}

err_code jinja_printf(jrun *r, jstr fmt, jinja_value *args, jinja_value **out)
{
    jinja_value *one[1] = {args}, **v = one;
    int64_t n = 1, used = 0;
    jout o = {0};
    char flags[16];
    if (args->type == JV_LIST && args->kind == JL_TUPLE) {
        v = args->l.v;
        n = args->l.n;
    }
    for (size_t i = 0; i < fmt.n;) {
        const char *p = memchr(fmt.p + i, '%', fmt.n - i);
        const size_t at = p ? (size_t)(p - fmt.p) : fmt.n;
        TRY(jout_add(r, &o, jstr_part(fmt, i, at)));
        i = at + 1;
        if (at == fmt.n) break;
        const jinja_value *val = NULL;
        if (i < fmt.n && fmt.p[i] == '(' && args->type == JV_MAP) {
            const char *close = memchr(fmt.p + i, ')', fmt.n - i);
            if (!close) return jinja_error(r, "incomplete format key");
            const jinja_value key = {.type = JV_STR,
                                     .s = jstr_part(fmt, i + 1, (size_t)(close - fmt.p))};
            val = jmap_get(&args->m, &key);
            if (!val) return jinja_error(r, "a format key is missing");
            i = (size_t)(close - fmt.p) + 1;
        }
        size_t len = 0;
        if (!take_flags(fmt.p + i, fmt.n - i, flags, &len)) return jinja_error(r, "bad format");
        i += len;
        if (i >= fmt.n) return jinja_error(r, "incomplete format");
        const char how = fmt.p[i++];
        if (how == '%') {
            TRY(jout_data(r, &o, "%", 1));
            continue;
        }
        if (!how || !strchr("dixXofFgGeEsr", how)) return jinja_error(r, "unsupported format");
        if (!val && used == n) return jinja_error(r, "not enough arguments for format string");
        TRY(convert(r, &o, flags, how, val ? val : v[used++]));
    }
    if (used < n && args->type != JV_MAP)
        return jinja_error(r, "not all arguments converted during string formatting");
    return jv_str(r, out, jout_str(&o));
}

/* What a replacement field names: a number, a name, or the next one; then .attr parts. */
static err_code field_value(jrun *r, jstr name, const jargs *a, int *next, jinja_value **out)
{
    char part[128];
    size_t n = 0;
    while (n < name.n && name.p[n] != '.' && name.p[n] != '[') n++;
    if (n >= sizeof part) return jinja_error(r, "format: a name is too long");
    memcpy(part, name.p, n);
    part[n] = '\0';
    *out = NULL;
    if (!n)
        *out = *next < a->n ? a->pos[(*next)++] : NULL;
    else if (part[0] >= '0' && part[0] <= '9')
        *out = atoi(part) < a->n ? a->pos[atoi(part)] : NULL;
    else
        *out = jinja_arg(a, -1, part);
    if (!*out) return jinja_error(r, "format: there is no argument '%s'", part);
    if (n == name.n) return OK;
    if (name.p[n] != '.') return jinja_error(r, "format: items of arguments are not supported");
    const jinja_value path = {.type = JV_STR, .s = jstr_part(name, n + 1, name.n)};
    return jv_path(r, *out, &path, out);
}

static err_code format_field(jrun *r, jout *o, jstr f, const jargs *a, int *next)
{
    const char *colon = memchr(f.p, ':', f.n);
    size_t end = colon ? (size_t)(colon - f.p) : f.n, len = 0;
    jinja_value *v;
    bool repr = false;
    char flags[20] = "";
    if (end >= 2 && f.p[end - 2] == '!') {
        repr = f.p[end - 1] == 'r';
        TRY(field_value(r, jstr_part(f, 0, end - 2), a, next, &v));
    } else {
        TRY(field_value(r, jstr_part(f, 0, end), a, next, &v));
    }
    if (!colon || end + 1 == f.n) return repr ? jv_repr(r, o, v, 0) : jv_show(r, o, v);
    const char *spec = colon + 1;
    size_t n = f.n - end - 1;
    bool left = v->type == JV_STR; /* strings stand left, numbers right */
    if (*spec == '<' || *spec == '>') {
        left = *spec == '<';
        spec++;
        n--;
    }
    if (!take_flags(spec, n, flags + 1, &len) || n - len > 1)
        return jinja_error(r, "format: this specification is not supported");
    char how = n > len ? spec[len] : v->type == JV_FLOAT ? 'g' : v->type == JV_INT ? 'd' : 's';
    flags[0] = '-';
    if (!strchr("dxXofFgGeEs", how)) return jinja_error(r, "format: unknown code '%c'", how);
    return convert(r, o, left ? flags : flags + 1, how, v);
}

err_code jinja_format(jrun *r, jstr fmt, const jargs *a, jinja_value **out)
{
    jout o = {0};
    int next = 0;
    for (size_t i = 0; i < fmt.n;) {
        const size_t from = i;
        while (i < fmt.n && fmt.p[i] != '{' && fmt.p[i] != '}') i++;
        TRY(jout_add(r, &o, jstr_part(fmt, from, i)));
        if (i == fmt.n) break;
        if (i + 1 < fmt.n && fmt.p[i + 1] == fmt.p[i]) {
            TRY(jout_add(r, &o, jstr_part(fmt, i, i + 1)));
            i += 2;
            continue;
        }
        const char *close = fmt.p[i] == '{' ? memchr(fmt.p + i, '}', fmt.n - i) : NULL;
        if (!close) return jinja_error(r, "format: a brace stands alone");
        TRY(format_field(r, &o, jstr_part(fmt, i + 1, (size_t)(close - fmt.p)), a, &next));
        i = (size_t)(close - fmt.p) + 1;
    }
    return jv_str(r, out, jout_str(&o));
}

/* ---- dates ---- */

err_code jinja_strftime(jrun *r, jstr fmt, jinja_value **out)
{
    const time_t now = (time_t)r->scope->now;
    struct tm tm;
    char f[256], s[1024];
    jout o = {0};
    if (fmt.n >= sizeof f) return jinja_error(r, "strftime_now: the format is too long");
    memcpy(f, fmt.p, fmt.n);
    f[fmt.n] = '\0';
    if (!gmtime_r(&now, &tm)) return jinja_error(r, "strftime_now: the date is out of range");
    const size_t n = strftime(s, sizeof s, f, &tm);
    TRY(jout_own(r, &o, s, n));
    return jv_str(r, out, jout_str(&o));
}
