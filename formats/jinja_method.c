/* What strings, dictionaries and lists can do by name, and the functions of the environment. */
#include <string.h>
#include <utf8proc.h>

#include "formats/jinja_internal.h"

/* ---- text, shared with the filters ---- */

err_code jf_case(jrun *r, jstr s, char how, jinja_value **out)
{
    jout o = {0};
    char buf[8];
    bool start = true;
    TRY(jinja_step(r, (int64_t)(s.n / 16)));
    for (size_t i = 0, len; i < s.n; i += len) {
        const utf8proc_int32_t c = (utf8proc_int32_t)jstr_code(s, i, &len);
        const bool up = how == 'u' || (start && (how == 't' || how == 'c')) ||
                        (how == 's' && utf8proc_tolower(c) != c ? false : how == 's');
        const utf8proc_int32_t d = up ? utf8proc_toupper(c) : utf8proc_tolower(c);
        const bool letter = utf8proc_toupper(c) != c || utf8proc_tolower(c) != c ||
                            (utf8proc_category(c) >= UTF8PROC_CATEGORY_LU &&
                             utf8proc_category(c) <= UTF8PROC_CATEGORY_LO);
        start = how == 't' ? !letter : false;
        if (d == c) {
            TRY(jout_add(r, &o, jstr_part(s, i, i + len)));
            continue;
        }
        utf8proc_ssize_t n = utf8proc_encode_char(d, (utf8proc_uint8_t *)buf);
        if (c == 0xdf) { /* the one common letter that becomes two */
            buf[0] = 'S';
            buf[1] = how == 't' || how == 'c' ? 's' : 'S';
            n = 2;
        }
        TRY(s.mark && s.mark[i] ? jout_data(r, &o, buf, (size_t)n)
                                : jout_own(r, &o, buf, (size_t)n));
    }
    return jv_str(r, out, jout_str(&o));
}

static bool in_set(uint32_t c, const jinja_value *chars)
{
    if (!chars || chars->type != JV_STR) return jstr_is_space(c);
    for (size_t i = 0, len; i < chars->s.n; i += len)
        if (jstr_code(chars->s, i, &len) == c) return true;
    return false;
}

/* ends: 1 left, 2 right, 3 both; chars NULL or none: white space. */
err_code jf_strip(jrun *r, jstr s, const jinja_value *chars, int ends, jinja_value **out)
{
    size_t from = 0, to = s.n, len;
    if (chars && chars->type != JV_STR && chars->type != JV_NONE)
        return jinja_error(r, "strip arg must be None or str");
    while ((ends & 1) && from < to && in_set(jstr_code(s, from, &len), chars)) from += len;
    while ((ends & 2) && to > from) {
        size_t k = to - 1;
        while (k > from && ((uint8_t)s.p[k] & 0xc0) == 0x80) k--;
        if (!in_set(jstr_code(s, k, &len), chars)) break;
        to = k;
    }
    TRY(jinja_step(r, (int64_t)((from + s.n - to) / 16)));
    return jv_str(r, out, jstr_part(s, from, to));
}

err_code jf_replace(jrun *r, jstr s, jstr from, jstr to, int64_t count, jinja_value **out)
{
    jout o = {0};
    size_t at = 0;
    for (int64_t k = 0; count < 0 || k < count; k++) {
        TRY(jinja_step(r, 1));
        if (!from.n) { /* between all characters */
            size_t len;
            TRY(jout_add(r, &o, to));
            if (at >= s.n) break;
            (void)jstr_code(s, at, &len);
            TRY(jout_add(r, &o, jstr_part(s, at, at + len)));
            at += len;
            continue;
        }
        const int64_t hit = jstr_find(s, from, at);
        if (hit < 0) break;
        TRY(jout_add(r, &o, jstr_part(s, at, (size_t)hit)));
        TRY(jout_add(r, &o, to));
        at = (size_t)hit + from.n;
    }
    TRY(jout_add(r, &o, jstr_part(s, at, s.n)));
    return jv_str(r, out, jout_str(&o));
}

/* indent(width=4, first=False, blank=False) */
err_code jf_indent(jrun *r, jstr s, const jargs *a, jinja_value **out)
{
    const jinja_value *width = jinja_arg(a, 0, "width");
    const bool first = jinja_arg_true(a, 1, "first", false),
               blank = jinja_arg_true(a, 2, "blank", false);
    jout pad = {0}, o = {0};
    int64_t n = 4;
    if (width && width->type == JV_STR) {
        TRY(jout_add(r, &pad, width->s));
    } else {
        TRY(jinja_arg_int(r, a, 0, "width", 4, &n));
        if (n > 1000) return jinja_error(r, "indent: too wide");
        for (int64_t i = 0; i < n; i++) TRY(jout_data(r, &pad, " ", 1));
    }
    for (size_t at = 0, line = 0;; line++) {
        const char *p = memchr(s.p + at, '\n', s.n - at);
        const size_t end = p ? (size_t)(p - s.p) : s.n;
        if (line ? blank || end > at : first) TRY(jout_add(r, &o, jout_str(&pad)));
        TRY(jout_add(r, &o, jstr_part(s, at, p ? end + 1 : end)));
        if (!p) break;
        at = end + 1;
    }
    return jv_str(r, out, jout_str(&o));
}

/* ---- methods of strings ---- */

static err_code add_part(jrun *r, jinja_value *list, jstr s)
{
    jinja_value *v;
    TRY(jv_str(r, &v, s));
    return jv_list_add(&r->mem, list, v, r->e);
}

static err_code split_space(jrun *r, jstr s, int64_t max, jinja_value *list)
{
    size_t at = 0, len;
    for (;;) {
        while (at < s.n && jstr_is_space(jstr_code(s, at, &len))) at += len;
        if (at == s.n) return OK;
        if (max >= 0 && list->l.n == max) {
            jinja_value *rest;
            TRY(jf_strip(r, jstr_part(s, at, s.n), NULL, 0, &rest));
            return jv_list_add(&r->mem, list, rest, r->e);
        }
        const size_t from = at;
        while (at < s.n && !jstr_is_space(jstr_code(s, at, &len))) at += len;
        TRY(jinja_step(r, 1));
        TRY(add_part(r, list, jstr_part(s, from, at)));
    }
}

static int64_t rfind(jstr s, jstr what, size_t end)
{
    if (what.n > end) return -1;
    for (size_t at = end - what.n + 1; at-- > 0;)
        if (!what.n || !memcmp(s.p + at, what.p, what.n)) return (int64_t)at;
    return -1;
}

static err_code m_split(jrun *r, jstr s, const jargs *a, bool right, jinja_value **out)
{
    const jinja_value *sep = jinja_arg(a, 0, "sep");
    int64_t max;
    size_t at = 0, end = s.n;
    TRY(jinja_arg_int(r, a, 1, "maxsplit", -1, &max));
    TRY(jv_list(r, out, JL_LIST));
    if (!sep || sep->type == JV_NONE) {
        if (right && max >= 0) return jinja_error(r, "rsplit by white space takes no count");
        return split_space(r, s, max, *out);
    }
    if (sep->type != JV_STR || !sep->s.n) return jinja_error(r, "split: an empty separator");
    for (int64_t k = 0; !right && (max < 0 || k < max); k++) {
        const int64_t hit = jstr_find(s, sep->s, at);
        if (hit < 0) break;
        TRY(jinja_step(r, 1));
        TRY(add_part(r, *out, jstr_part(s, at, (size_t)hit)));
        at = (size_t)hit + sep->s.n;
    }
    if (!right) return add_part(r, *out, jstr_part(s, at, s.n));
    jinja_value *back;
    TRY(jv_list(r, &back, JL_LIST));
    for (int64_t k = 0; max < 0 || k < max; k++) {
        const int64_t hit = rfind(s, sep->s, end);
        if (hit < 0) break;
        TRY(jinja_step(r, 1 + (int64_t)(end - (size_t)hit) / 16));
        TRY(add_part(r, back, jstr_part(s, (size_t)hit + sep->s.n, end)));
        end = (size_t)hit;
    }
    TRY(add_part(r, *out, jstr_part(s, 0, end)));
    for (int64_t i = back->l.n; i-- > 0;) TRY(jv_list_add(&r->mem, *out, back->l.v[i], r->e));
    return OK;
}

static err_code m_splitlines(jrun *r, jstr s, jinja_value **out)
{
    TRY(jv_list(r, out, JL_LIST));
    for (size_t at = 0; at < s.n;) {
        size_t end = at;
        while (end < s.n && s.p[end] != '\n' && s.p[end] != '\r') end++;
        TRY(jinja_step(r, 1));
        TRY(add_part(r, *out, jstr_part(s, at, end)));
        at = end + 1;
        if (end + 1 < s.n && s.p[end] == '\r' && s.p[end + 1] == '\n') at++;
    }
    return OK;
}

static bool touches(jstr s, jstr what, bool end)
{
    return what.n <= s.n && (!what.n || !memcmp(end ? s.p + s.n - what.n : s.p, what.p, what.n));
}

static err_code m_startswith(jrun *r, jstr s, const jargs *a, bool end, jinja_value **out)
{
    jinja_value *w = jinja_arg(a, 0, "prefix");
    bool is = false;
    if (w && w->type == JV_STR) {
        is = touches(s, w->s, end);
    } else if (w && w->type == JV_LIST && w->kind == JL_TUPLE) {
        for (int64_t i = 0; i < w->l.n; i++)
            is |= w->l.v[i]->type == JV_STR && touches(s, w->l.v[i]->s, end);
    } else {
        return jinja_error(r, "%s first arg must be str or a tuple of str, not %s",
                           end ? "endswith" : "startswith", w ? jv_type_name(w) : "nothing");
    }
    *out = jv_bool(is);
    return OK;
}

static err_code need_str(jrun *r, const jargs *a, int i, jstr *out)
{
    const jinja_value *v = jinja_arg(a, i, NULL);
    if (!v || v->type != JV_STR)
        return jinja_error(r, "expected a string, got '%s'", v ? jv_type_name(v) : "nothing");
    *out = v->s;
    return OK;
}

/* find, rfind, index, rindex, count */
static err_code m_find(jrun *r, jstr s, const jargs *a, const char *name, jinja_value **out)
{
    jstr what;
    TRY(need_str(r, a, 0, &what));
    if (a->n > 1) return jinja_error(r, "%s: bounds are not supported", name);
    TRY(jinja_step(r, (int64_t)(s.n / 16)));
    if (!strcmp(name, "count")) {
        int64_t n = 0;
        if (!what.n) return jv_int(r, out, jstr_length(s) + 1);
        for (int64_t at = jstr_find(s, what, 0); at >= 0;
             at = jstr_find(s, what, (size_t)at + what.n))
            n++;
        return jv_int(r, out, n);
    }
    const int64_t at = name[0] == 'r' ? rfind(s, what, s.n) : jstr_find(s, what, 0);
    if (at < 0 && strstr(name, "index")) return jinja_error(r, "substring not found");
    return jv_int(r, out, at < 0 ? -1 : jstr_length(jstr_part(s, 0, (size_t)at)));
}

static err_code m_join(jrun *r, jstr s, const jargs *a, jinja_value **out)
{
    jout o = {0};
    jlist l;
    if (a->n != 1) return jinja_error(r, "join takes one list");
    TRY(jv_items(r, a->pos[0], &l));
    for (int64_t i = 0; i < l.n; i++) {
        if (l.v[i]->type != JV_STR)
            return jinja_error(r, "join: expected str instance, %s found", jv_type_name(l.v[i]));
        if (i) TRY(jout_add(r, &o, s));
        TRY(jout_add(r, &o, l.v[i]->s));
    }
    return jv_str(r, out, jout_str(&o));
}

/* isdigit, isalpha, isalnum, isspace, isupper, islower, isnumeric, isdecimal */
static bool has_only(jstr s, const char *name)
{
    if (!strcmp(name, "isupper") || !strcmp(name, "islower")) {
        bool any = false;
        for (size_t i = 0, len; i < s.n; i += len) {
            const utf8proc_int32_t c = (utf8proc_int32_t)jstr_code(s, i, &len);
            const bool upper = utf8proc_tolower(c) != c, lower = utf8proc_toupper(c) != c;
            if (name[2] == 'u' ? lower && !upper : upper && !lower) return false;
            any |= upper || lower;
        }
        return any;
    }
    for (size_t i = 0, len; i < s.n; i += len) {
        const uint32_t c = jstr_code(s, i, &len);
        const utf8proc_category_t cat = utf8proc_category((utf8proc_int32_t)c);
        const bool alpha = cat >= UTF8PROC_CATEGORY_LU && cat <= UTF8PROC_CATEGORY_LO,
                   digit = cat == UTF8PROC_CATEGORY_ND;
        if (!strcmp(name, "isspace")   ? !jstr_is_space(c)
            : !strcmp(name, "isalpha") ? !alpha
            : !strcmp(name, "isalnum") ? !alpha && !digit
                                       : !digit)
            return false;
    }
    return s.n > 0;
}

static err_code m_pad(jrun *r, jstr s, const jargs *a, const char *name, jinja_value **out)
{
    int64_t width;
    jout o = {0};
    jstr fill = {" ", NULL, 1};
    TRY(jinja_arg_int(r, a, 0, NULL, 0, &width));
    if (a->n > 1) TRY(need_str(r, a, 1, &fill));
    if (width > 10000) return jinja_error(r, "%s: too wide", name);
    const int64_t n = width - jstr_length(s), left = name[0] == 'r'   ? n
                                                     : name[0] == 'c' ? n / 2 + (n & width & 1)
                                                     : name[0] == 'z' ? n
                                                                      : 0;
    if (name[0] == 'z') fill = (jstr){"0", NULL, 1};
    if (name[0] == 'z' && n > 0 && s.n && (s.p[0] == '-' || s.p[0] == '+')) {
        TRY(jout_add(r, &o, jstr_part(s, 0, 1)));
        s = jstr_part(s, 1, s.n);
    }
    for (int64_t i = 0; i < left; i++) TRY(jout_add(r, &o, fill));
    TRY(jout_add(r, &o, s));
    for (int64_t i = left > 0 ? left : 0; i < n; i++) TRY(jout_add(r, &o, fill));
    return jv_str(r, out, jout_str(&o));
}

static err_code m_partition(jrun *r, jstr s, const jargs *a, bool right, jinja_value **out)
{
    jstr sep;
    TRY(need_str(r, a, 0, &sep));
    if (!sep.n) return jinja_error(r, "partition: an empty separator");
    const int64_t at = right ? rfind(s, sep, s.n) : jstr_find(s, sep, 0);
    const size_t from = at < 0 ? (right ? 0 : s.n) : (size_t)at;
    TRY(jv_list(r, out, JL_TUPLE));
    TRY(add_part(r, *out, at < 0 && right ? jstr_part(s, 0, 0) : jstr_part(s, 0, from)));
    TRY(add_part(r, *out, at < 0 ? jstr_part(s, 0, 0) : jstr_part(s, from, from + sep.n)));
    return add_part(r, *out,
                    at < 0 ? (right ? s : jstr_part(s, 0, 0)) : jstr_part(s, from + sep.n, s.n));
}

static err_code str_method(jrun *r, const char *name, jstr s, jargs *a, jinja_value **out)
{
    jstr x, y;
    int64_t count;
    if (!strcmp(name, "strip")) return jf_strip(r, s, jinja_arg(a, 0, NULL), 3, out);
    if (!strcmp(name, "lstrip")) return jf_strip(r, s, jinja_arg(a, 0, NULL), 1, out);
    if (!strcmp(name, "rstrip")) return jf_strip(r, s, jinja_arg(a, 0, NULL), 2, out);
    if (!strcmp(name, "split")) return m_split(r, s, a, false, out);
    if (!strcmp(name, "rsplit")) return m_split(r, s, a, true, out);
    if (!strcmp(name, "splitlines")) return m_splitlines(r, s, out);
    if (!strcmp(name, "startswith")) return m_startswith(r, s, a, false, out);
    if (!strcmp(name, "endswith")) return m_startswith(r, s, a, true, out);
    if (!strcmp(name, "upper")) return jf_case(r, s, 'u', out);
    if (!strcmp(name, "lower") || !strcmp(name, "casefold")) return jf_case(r, s, 'l', out);
    if (!strcmp(name, "title")) return jf_case(r, s, 't', out);
    if (!strcmp(name, "capitalize")) return jf_case(r, s, 'c', out);
    if (!strcmp(name, "swapcase")) return jf_case(r, s, 's', out);
    if (!strcmp(name, "join")) return m_join(r, s, a, out);
    if (!strcmp(name, "format")) return jinja_format(r, s, a, out);
    if (!strcmp(name, "partition")) return m_partition(r, s, a, false, out);
    if (!strcmp(name, "rpartition")) return m_partition(r, s, a, true, out);
    if (!strcmp(name, "replace")) {
        TRY(need_str(r, a, 0, &x));
        TRY(need_str(r, a, 1, &y));
        TRY(jinja_arg_int(r, a, 2, "count", -1, &count));
        return jf_replace(r, s, x, y, count, out);
    }
    if (!strcmp(name, "removeprefix") || !strcmp(name, "removesuffix")) {
        const bool end = name[6] == 's';
        TRY(need_str(r, a, 0, &x));
        if (!touches(s, x, end)) return jv_str(r, out, s);
        return jv_str(r, out, end ? jstr_part(s, 0, s.n - x.n) : jstr_part(s, x.n, s.n));
    }
    if (!strncmp(name, "is", 2)) {
        *out = jv_bool(has_only(s, name));
        return OK;
    }
    if (strstr(name, "just") || !strcmp(name, "center") || !strcmp(name, "zfill"))
        return m_pad(r, s, a, name, out);
    return m_find(r, s, a, name, out);
}

/* ---- methods of dictionaries and lists ---- */

static err_code map_method(jrun *r, const char *name, const jinja_value *m, jargs *a,
                           jinja_value **out)
{
    if (!strcmp(name, "get")) {
        if (a->n < 1 || a->n > 2) return jinja_error(r, "get takes one or two arguments");
        *out = jmap_get(&m->m, a->pos[0]);
        if (!*out) *out = a->n == 2 ? a->pos[1] : &jinja_null;
        return OK;
    }
    if (a->n || a->n_kw) return jinja_error(r, "%s takes no arguments", name);
    if (!strcmp(name, "copy")) {
        TRY(jv_new(&r->mem, out, JV_MAP, r->e));
        for (int32_t i = 0; i < m->m.n; i++)
            TRY(jmap_set(&r->mem, &(*out)->m, m->m.key[i], m->m.val[i], r->e));
        return OK;
    }
    TRY(jv_list(r, out, JL_LIST));
    for (int32_t i = 0; i < m->m.n; i++) {
        jinja_value *v = name[0] == 'k' ? m->m.key[i] : m->m.val[i];
        if (name[0] == 'i') {
            TRY(jv_list(r, &v, JL_TUPLE));
            TRY(jv_list_add(&r->mem, v, m->m.key[i], r->e));
            TRY(jv_list_add(&r->mem, v, m->m.val[i], r->e));
        }
        TRY(jinja_step(r, 1));
        TRY(jv_list_add(&r->mem, *out, v, r->e));
    }
    return OK;
}

static err_code list_method(jrun *r, const char *name, const jinja_value *l, jargs *a,
                            jinja_value **out)
{
    if (!strcmp(name, "copy")) {
        *out = (jinja_value *)(uintptr_t)l; /* nothing can change it */
        return OK;
    }
    int64_t n = 0, first = -1;
    if (a->n != 1) return jinja_error(r, "%s takes one argument", name);
    TRY(jinja_step(r, l->l.n));
    for (int64_t i = 0; i < l->l.n; i++) {
        if (!jv_equal(l->l.v[i], a->pos[0], 0)) continue;
        if (!n++) first = i;
    }
    if (!strcmp(name, "count")) return jv_int(r, out, n);
    return n ? jv_int(r, out, first) : jinja_error(r, "index: it is not in the list");
}

static const struct {
    jv_type of;
    const char *name;
} methods[] = {{JV_STR, "strip"},      {JV_STR, "lstrip"},       {JV_STR, "rstrip"},
               {JV_STR, "split"},      {JV_STR, "rsplit"},       {JV_STR, "splitlines"},
               {JV_STR, "startswith"}, {JV_STR, "endswith"},     {JV_STR, "upper"},
               {JV_STR, "lower"},      {JV_STR, "casefold"},     {JV_STR, "title"},
               {JV_STR, "capitalize"}, {JV_STR, "swapcase"},     {JV_STR, "join"},
               {JV_STR, "format"},     {JV_STR, "partition"},    {JV_STR, "rpartition"},
               {JV_STR, "replace"},    {JV_STR, "removeprefix"}, {JV_STR, "removesuffix"},
               {JV_STR, "isdigit"},    {JV_STR, "isalpha"},      {JV_STR, "isalnum"},
               {JV_STR, "isspace"},    {JV_STR, "isupper"},      {JV_STR, "islower"},
               {JV_STR, "isnumeric"},  {JV_STR, "isdecimal"},    {JV_STR, "ljust"},
               {JV_STR, "rjust"},      {JV_STR, "center"},       {JV_STR, "zfill"},
               {JV_STR, "find"},       {JV_STR, "rfind"},        {JV_STR, "index"},
               {JV_STR, "rindex"},     {JV_STR, "count"},        {JV_MAP, "get"},
               {JV_MAP, "items"},      {JV_MAP, "keys"},         {JV_MAP, "values"},
               {JV_MAP, "copy"},       {JV_LIST, "index"},       {JV_LIST, "count"},
               {JV_LIST, "copy"}};

int jinja_method_find(const jinja_value *of, const char *name)
{
    for (size_t i = 0; i < sizeof methods / sizeof *methods; i++)
        if (methods[i].of == (jv_type)of->type && !strcmp(methods[i].name, name)) return (int)i;
    return -1;
}

err_code jinja_method(jrun *r, int which, jinja_value *of, jargs *a, jinja_value **out)
{
    const char *name = methods[which].name;
    if (of->type == JV_STR) return str_method(r, name, of->s, a, out);
    if (of->type == JV_MAP) return map_method(r, name, of, a, out);
    return list_method(r, name, of, a, out);
}

/* ---- functions ---- */

enum { RANGE_MAX = 100000 }; /* as Jinja2's sandbox has it */

static err_code fn_range(jrun *r, const jargs *a, jinja_value **out)
{
    int64_t v[3] = {0, 0, 1};
    jinja_value *x;
    if (a->n < 1 || a->n > 3) return jinja_error(r, "range takes one to three numbers");
    for (int i = 0; i < a->n; i++) {
        if (a->pos[i]->type != JV_INT && a->pos[i]->type != JV_BOOL)
            return jinja_error(r, "'%s' object cannot be interpreted as an integer",
                               jv_type_name(a->pos[i]));
        TRY(jinja_arg_int(r, a, i, NULL, 0, &v[a->n == 1 ? 1 : i]));
    }
    if (v[2] == 0) return jinja_error(r, "range() arg 3 must not be zero");
    TRY(jv_list(r, out, JL_LIST));
    for (int64_t i = v[0]; v[2] > 0 ? i < v[1] : i > v[1];) {
        if ((*out)->l.n == RANGE_MAX)
            return jinja_error(r, "Range too big. The sandbox blocks ranges larger than %d.",
                               RANGE_MAX);
        TRY(jinja_step(r, 1));
        TRY(jv_int(r, &x, i));
        TRY(jv_list_add(&r->mem, *out, x, r->e));
        if (__builtin_add_overflow(i, v[2], &i)) break;
    }
    return OK;
}

static err_code fn_map(jrun *r, const jargs *a, jv_type type, jinja_value **out)
{
    jinja_value *key;
    TRY(jv_new(&r->mem, out, type, r->e));
    if (a->n > 1 || (a->n && a->pos[0]->type != JV_MAP && a->pos[0]->type != JV_SPACE))
        return jinja_error(r, "expected a mapping or keywords");
    for (int32_t i = 0; a->n && i < a->pos[0]->m.n; i++)
        TRY(jmap_set(&r->mem, &(*out)->m, a->pos[0]->m.key[i], a->pos[0]->m.val[i], r->e));
    for (int i = 0; i < a->n_kw; i++) {
        TRY(jv_str(r, &key, (jstr){a->name[i], NULL, strlen(a->name[i])}));
        TRY(jmap_set(&r->mem, &(*out)->m, key, a->kw[i], r->e));
    }
    return OK;
}

static err_code fn_raise(jrun *r, const jargs *a)
{
    const jinja_value *v = jinja_arg(a, 0, "message");
    jstr s = {"", NULL, 0};
    if (v) TRY(jv_text(r, v, &s));
    return err_set(r->e, E_INPUT, "%.*s", s.n > 400 ? 400 : (int)s.n, s.p);
}

static const char *const functions[] = {"range", "namespace", "dict", "raise_exception",
                                        "strftime_now"};

int jinja_func_find(const char *name, const jrun *r)
{
    for (int i = 0; i < 5; i++)
        if (!strcmp(functions[i], name)) return i == 4 && !r->scope->has_now ? -1 : i;
    return -1;
}

err_code jinja_func(jrun *r, int which, jargs *a, jinja_value **out)
{
    jstr s;
    switch (which) {
    case 0: return fn_range(r, a, out);
    case 1: return fn_map(r, a, JV_SPACE, out);
    case 2: return fn_map(r, a, JV_MAP, out);
    case 3: return fn_raise(r, a);
    default: TRY(need_str(r, a, 0, &s)); return jinja_strftime(r, s, out);
    }
}
