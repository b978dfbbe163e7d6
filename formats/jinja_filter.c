/* Filters. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/jinja_internal.h"

typedef err_code (*filter_fn)(jrun *r, jinja_value *v, jargs *a, jinja_value **out);

/* ---- of text ---- */

static err_code f_case(jrun *r, jinja_value *v, char how, jinja_value **out)
{
    jstr s;
    TRY(jv_text(r, v, &s));
    return jf_case(r, s, how, out);
}

static err_code f_upper(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    return f_case(r, v, 'u', out);
}

static err_code f_lower(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    return f_case(r, v, 'l', out);
}

static err_code f_title(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    return f_case(r, v, 't', out);
}

static err_code f_capitalize(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    return f_case(r, v, 'c', out);
}

static err_code f_string(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jstr s;
    (void)a;
    TRY(jv_text(r, v, &s));
    return jv_str(r, out, s);
}

static err_code f_trim(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jstr s;
    TRY(jv_text(r, v, &s));
    return jf_strip(r, s, jinja_arg(a, 0, "chars"), 3, out);
}

static err_code f_replace(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *from = jinja_arg(a, 0, "old"), *to = jinja_arg(a, 1, "new");
    jstr s, x, y;
    int64_t count;
    if (!from || !to) return jinja_error(r, "replace takes two strings");
    TRY(jinja_arg_int(r, a, 2, "count", -1, &count));
    TRY(jv_text(r, v, &s));
    TRY(jv_text(r, from, &x));
    TRY(jv_text(r, to, &y));
    return jf_replace(r, s, x, y, count, out);
}

static err_code f_indent(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jstr s;
    TRY(jv_text(r, v, &s));
    return jf_indent(r, s, a, out);
}

static err_code f_format(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jstr s;
    jinja_value *args;
    TRY(jv_text(r, v, &s));
    if (a->n_kw) {
        TRY(jv_new(&r->mem, &args, JV_MAP, r->e));
        for (int i = 0; i < a->n_kw; i++) {
            jinja_value *key;
            TRY(jv_str(r, &key, (jstr){a->name[i], NULL, strlen(a->name[i])}));
            TRY(jmap_set(&r->mem, &args->m, key, a->kw[i], r->e));
        }
    } else {
        TRY(jv_list(r, &args, JL_TUPLE));
        for (int i = 0; i < a->n; i++) TRY(jv_list_add(&r->mem, args, a->pos[i], r->e));
    }
    return jinja_printf(r, s, args, out);
}

err_code jf_escape(jrun *r, jstr s, jinja_value **out)
{
    static const struct {
        char c;
        const char *as;
    } codes[] = {{'&', "&amp;"}, {'<', "&lt;"}, {'>', "&gt;"}, {'"', "&#34;"}, {'\'', "&#39;"}};
    jout o = {0};
    for (size_t i = 0; i < s.n; i++) {
        const char *as = NULL;
        for (int k = 0; k < 5; k++)
            if (codes[k].c == s.p[i]) as = codes[k].as;
        TRY(as ? jout_data(r, &o, as, strlen(as)) : jout_add(r, &o, jstr_part(s, i, i + 1)));
    }
    TRY(jv_str(r, out, jout_str(&o)));
    (*out)->kind = 1;
    return OK;
}

static err_code f_escape(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jstr s;
    (void)a;
    *out = v;
    if (v->type == JV_STR && v->kind) return OK;
    TRY(jv_text(r, v, &s));
    return jf_escape(r, s, out);
}

static err_code f_tojson(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jout o = {0};
    TRY(jv_json(r, &o, v, a));
    return jv_str(r, out, jout_str(&o));
}

/* ---- of numbers ---- */

static err_code f_abs(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    if (v->type == JV_FLOAT) return jv_float(r, out, fabs(v->d));
    if (v->type == JV_BOOL) return jv_int(r, out, v->b);
    if (v->type != JV_INT || v->i == INT64_MIN)
        return jinja_error(r, "bad operand type for abs(): '%s'", jv_type_name(v));
    return jv_int(r, out, v->i < 0 ? -v->i : v->i);
}

/* A number at the start of a string that is nothing but that number. */
static bool string_number(jstr s, double *d)
{
    char buf[64], *end;
    while (s.n && jstr_is_space((uint8_t)s.p[0])) s = jstr_part(s, 1, s.n);
    while (s.n && jstr_is_space((uint8_t)s.p[s.n - 1])) s.n--;
    if (!s.n || s.n >= sizeof buf || memchr(s.p, 'x', s.n) || memchr(s.p, 'X', s.n)) return false;
    memcpy(buf, s.p, s.n);
    buf[s.n] = '\0';
    *d = strtod(buf, &end);
    return *end == '\0';
}

static bool is_whole_text(jstr s)
{
    for (size_t i = 0; i < s.n; i++)
        if (!(s.p[i] >= '0' && s.p[i] <= '9') && s.p[i] != '-' && s.p[i] != '+' &&
            !jstr_is_space((uint8_t)s.p[i]))
            return false;
    return true;
}

static err_code f_int(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jinja_value *def = jinja_arg(a, 0, "default");
    double d = 0;
    if (v->type == JV_INT) return jv_int(r, out, v->i);
    if (v->type == JV_BOOL) return jv_int(r, out, v->b);
    if (v->type == JV_STR && v->s.n < 20 && is_whole_text(v->s) && string_number(v->s, &d)) {
        char buf[32] = "";
        memcpy(buf, v->s.p, v->s.n);
        return jv_int(r, out, strtoll(buf, NULL, 10));
    }
    const bool number = v->type == JV_FLOAT || (v->type == JV_STR && string_number(v->s, &d));
    if (v->type == JV_FLOAT) d = v->d;
    if (number && fabs(d) < 9e18) return jv_int(r, out, (int64_t)d);
    if (def) {
        *out = def;
        return OK;
    }
    return jv_int(r, out, 0);
}

static err_code f_float(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jinja_value *def = jinja_arg(a, 0, "default");
    double d = 0;
    if (v->type == JV_INT) return jv_float(r, out, (double)v->i);
    if (v->type == JV_BOOL) return jv_float(r, out, v->b);
    if (v->type == JV_FLOAT) return jv_float(r, out, v->d);
    if (v->type == JV_STR && string_number(v->s, &d)) return jv_float(r, out, d);
    if (def) {
        *out = def;
        return OK;
    }
    return jv_float(r, out, 0);
}

static err_code f_round(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *how = jinja_arg(a, 1, "method");
    int64_t digits;
    jinja_value *x;
    jargs none = {0};
    TRY(jinja_arg_int(r, a, 0, "precision", 0, &digits));
    if (v->type != JV_INT && v->type != JV_FLOAT && v->type != JV_BOOL)
        return jinja_error(r, "round: expected a number, got '%s'", jv_type_name(v));
    TRY(f_float(r, v, &none, &x));
    const double scale = pow(10, (double)(digits < -20 ? -20 : digits > 20 ? 20 : digits));
    const char kind = how && how->type == JV_STR && how->s.n ? how->s.p[0] : 'c';
    const bool up = kind == 'c' && how && how->s.n > 1 && how->s.p[1] == 'e'; /* "ceil" */
    if (up) return jv_float(r, out, ceil(x->d * scale) / scale);
    if (kind == 'f') return jv_float(r, out, floor(x->d * scale) / scale);
    return jv_float(r, out, nearbyint(x->d * scale) / scale);
}

/* ---- of values ---- */

static err_code f_length(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    int64_t n;
    (void)a;
    TRY(jv_length(r, v, &n));
    return jv_int(r, out, n);
}

static err_code f_default(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jinja_value *def = jinja_arg(a, 0, "default_value");
    const bool any = jinja_arg_true(a, 1, "boolean", false);
    *out = v;
    if (v->type != JV_UNDEF && !(any && !jv_truth(v))) return OK;
    *out = def;
    return def ? OK : jv_str(r, out, (jstr){"", NULL, 0});
}

static err_code f_safe(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    TRY(f_string(r, v, a, out));
    (*out)->kind = 1;
    return OK;
}

static err_code f_attr(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *name = jinja_arg(a, 0, "name");
    char s[128];
    if (!name || name->type != JV_STR || name->s.n >= sizeof s)
        return jinja_error(r, "attr takes a name");
    memcpy(s, name->s.p, name->s.n);
    s[name->s.n] = '\0';
    if (v->type == JV_MAP) return jv_undef(r, out, "attribute"); /* attributes, not items */
    return jv_attr(r, v, s, out);
}

/* ---- of sequences ---- */

static err_code f_list(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    (void)a;
    TRY(jv_items(r, v, &l));
    TRY(jv_list(r, out, JL_LIST));
    (*out)->l = (jlist){l.v, l.n, l.n};
    return OK;
}

static err_code f_first(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    (void)a;
    TRY(jv_items(r, v, &l));
    if (!l.n) return jv_undef(r, out, "the first item of nothing");
    *out = l.v[0];
    return OK;
}

static err_code f_last(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    (void)a;
    TRY(jv_items(r, v, &l));
    if (!l.n) return jv_undef(r, out, "the last item of nothing");
    *out = l.v[l.n - 1];
    return OK;
}

static err_code f_join(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *sep = jinja_arg(a, 0, "d"), *attr = jinja_arg(a, 1, "attribute");
    jstr s = {"", NULL, 0};
    jout o = {0};
    jlist l;
    if (sep) TRY(jv_text(r, sep, &s));
    TRY(jv_items(r, v, &l));
    for (int64_t i = 0; i < l.n; i++) {
        jinja_value *x = l.v[i];
        if (attr && attr->type != JV_NONE) TRY(jv_path(r, x, attr, &x));
        if (i) TRY(jout_add(r, &o, s));
        TRY(jv_show(r, &o, x));
    }
    return jv_str(r, out, jout_str(&o));
}

static err_code f_reverse(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    jinja_value *list;
    (void)a;
    TRY(jv_items(r, v, &l));
    TRY(jv_list(r, &list, JL_ITER));
    for (int64_t i = l.n; i-- > 0;) TRY(jv_list_add(&r->mem, list, l.v[i], r->e));
    *out = list;
    if (v->type != JV_STR) return OK;
    jargs none = {0};
    return f_join(r, list, &none, out);
}

/* Keys lower-cased unless case matters, of an attribute where one is named. */
static err_code make_keys(jrun *r, const jlist *l, const jinja_value *attr, bool by_case,
                          jinja_value ***out)
{
    TRY(jinja_get(&r->mem, (void **)out, (size_t)(l->n + 1) * sizeof **out, r->e));
    for (int64_t i = 0; i < l->n; i++) {
        jinja_value *k = l->v[i];
        if (attr && attr->type != JV_NONE) TRY(jv_path(r, k, attr, &k));
        if (!by_case && k->type == JV_STR) TRY(jf_case(r, k->s, 'l', &k));
        (*out)[i] = k;
    }
    return OK;
}

/* Stable, by merging runs of growing length. */
err_code jf_sort(jrun *r, jlist *l, jinja_value **keys, bool reverse)
{
    const int64_t n = l->n;
    jinja_value **v, **k, **from_v = l->v, **from_k = keys;
    TRY(jinja_get(&r->mem, (void **)&v, (size_t)(n + 1) * sizeof *v, r->e));
    TRY(jinja_get(&r->mem, (void **)&k, (size_t)(n + 1) * sizeof *k, r->e));
    for (int64_t run = 1; run < n; run *= 2) {
        for (int64_t at = 0; at < n; at += 2 * run) {
            const int64_t mid = at + run < n ? at + run : n, end = mid + run < n ? mid + run : n;
            int64_t a = at, b = mid;
            for (int64_t i = at; i < end; i++) {
                bool right = a == mid;
                if (a < mid && b < end)
                    TRY(reverse ? jv_less(r, from_k[a], from_k[b], &right)
                                : jv_less(r, from_k[b], from_k[a], &right));
                const int64_t pick = right ? b++ : a++;
                v[i] = from_v[pick];
                k[i] = from_k[pick];
            }
        }
        TRY(jinja_step(r, n));
        jinja_value **t = v;
        v = from_v;
        from_v = t;
        t = k;
        k = from_k;
        from_k = t;
    }
    l->v = from_v;
    return OK;
}

static err_code own_list(jrun *r, jinja_value *v, jlist *l)
{
    jinja_value **copy;
    TRY(jv_items(r, v, l));
    TRY(jinja_get(&r->mem, (void **)&copy, (size_t)(l->n + 1) * sizeof *copy, r->e));
    if (l->n) memcpy(copy, l->v, (size_t)l->n * sizeof *copy);
    l->v = copy;
    return OK;
}

static err_code f_sort(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    jinja_value **keys;
    TRY(own_list(r, v, &l));
    TRY(make_keys(r, &l, jinja_arg(a, 2, "attribute"),
                  jinja_arg_true(a, 1, "case_sensitive", false), &keys));
    TRY(jf_sort(r, &l, keys, jinja_arg_true(a, 0, "reverse", false)));
    TRY(jv_list(r, out, JL_LIST));
    (*out)->l = (jlist){l.v, l.n, l.n};
    return OK;
}

static err_code pairs(jrun *r, const jmap *m, int kind, jinja_value **out)
{
    jinja_value *pair;
    TRY(jv_list(r, out, kind));
    for (int32_t i = 0; i < m->n; i++) {
        TRY(jinja_step(r, 1));
        TRY(jv_list(r, &pair, JL_TUPLE));
        TRY(jv_list_add(&r->mem, pair, m->key[i], r->e));
        TRY(jv_list_add(&r->mem, pair, m->val[i], r->e));
        TRY(jv_list_add(&r->mem, *out, pair, r->e));
    }
    return OK;
}

static err_code f_items(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    (void)a;
    if (v->type == JV_UNDEF) return jv_list(r, out, JL_ITER);
    if (v->type != JV_MAP) return jinja_error(r, "Can only get item pairs from a mapping.");
    return pairs(r, &v->m, JL_ITER, out);
}

static err_code f_dictsort(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *by = jinja_arg(a, 1, "by");
    const jinja_value column = {.type = JV_INT,
                                .i = by && by->type == JV_STR && by->s.n == 5 ? 1 : 0};
    jinja_value **keys;
    if (v->type != JV_MAP) return jinja_error(r, "dictsort takes a mapping");
    TRY(pairs(r, &v->m, JL_LIST, out));
    TRY(make_keys(r, &(*out)->l, &column, jinja_arg_true(a, 0, "case_sensitive", false), &keys));
    return jf_sort(r, &(*out)->l, keys, jinja_arg_true(a, 2, "reverse", false));
}

static err_code f_unique(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    jlist l;
    jinja_value **keys, *seen;
    TRY(jv_items(r, v, &l));
    TRY(make_keys(r, &l, jinja_arg(a, 1, "attribute"),
                  jinja_arg_true(a, 0, "case_sensitive", false), &keys));
    TRY(jv_list(r, out, JL_ITER));
    TRY(jv_new(&r->mem, &seen, JV_MAP, r->e));
    for (int64_t i = 0; i < l.n; i++) {
        if (jmap_get(&seen->m, keys[i])) continue;
        TRY(jmap_set(&r->mem, &seen->m, keys[i], keys[i], r->e));
        TRY(jv_list_add(&r->mem, *out, l.v[i], r->e));
    }
    return OK;
}

static err_code best(jrun *r, jinja_value *v, jargs *a, bool most, jinja_value **out)
{
    jlist l;
    jinja_value **keys;
    int64_t at = 0;
    bool less;
    TRY(jv_items(r, v, &l));
    if (!l.n) return jv_undef(r, out, "the best of nothing");
    TRY(make_keys(r, &l, jinja_arg(a, 1, "attribute"),
                  jinja_arg_true(a, 0, "case_sensitive", false), &keys));
    for (int64_t i = 1; i < l.n; i++) {
        TRY(most ? jv_less(r, keys[at], keys[i], &less) : jv_less(r, keys[i], keys[at], &less));
        if (less) at = i;
    }
    *out = l.v[at];
    return OK;
}

static err_code f_min(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return best(r, v, a, false, out);
}

static err_code f_max(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return best(r, v, a, true, out);
}

static err_code f_sum(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *attr = jinja_arg(a, 0, "attribute");
    jlist l;
    double d = 0;
    int64_t n = 0;
    bool real = false;
    TRY(jv_items(r, v, &l));
    for (int64_t i = 0; i < l.n; i++) {
        jinja_value *x = l.v[i];
        if (attr && attr->type != JV_NONE) TRY(jv_path(r, x, attr, &x));
        if (x->type != JV_INT && x->type != JV_FLOAT && x->type != JV_BOOL)
            return jinja_error(r, "sum: expected numbers, got '%s'", jv_type_name(x));
        real |= x->type == JV_FLOAT;
        const int64_t k = x->type == JV_BOOL ? x->b : x->type == JV_INT ? x->i : 0;
        d += x->type == JV_FLOAT ? x->d : (double)k;
        if (__builtin_add_overflow(n, k, &n)) return jinja_error(r, "an integer is too large");
    }
    return real ? jv_float(r, out, d) : jv_int(r, out, n);
}

static err_code f_map(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    const jinja_value *attr = jinja_arg(a, -1, "attribute");
    jinja_value *def = jinja_arg(a, -1, "default"), *x;
    jlist l;
    char name[64] = "";
    TRY(jv_list(r, out, JL_ITER));
    if (!jv_truth(v)) return OK; /* also of None */
    TRY(jv_items(r, v, &l));
    if (!attr) {
        if (!a->n || a->pos[0]->type != JV_STR || a->pos[0]->s.n >= sizeof name)
            return jinja_error(r, "map requires a filter argument");
        memcpy(name, a->pos[0]->s.p, a->pos[0]->s.n);
    }
    jargs rest = {a->n ? a->pos + 1 : NULL, a->n ? a->n - 1 : 0, a->n_kw, a->name, a->kw, false};
    for (int64_t i = 0; i < l.n; i++) {
        TRY(attr ? jv_path(r, l.v[i], attr, &x) : jinja_filter(r, name, l.v[i], &rest, &x));
        if (attr && x->type == JV_UNDEF && def) x = def;
        TRY(jv_list_add(&r->mem, *out, x, r->e));
    }
    return OK;
}

/* select, reject, selectattr, rejectattr */
static err_code choose(jrun *r, jinja_value *v, jargs *a, bool want, bool attr, jinja_value **out)
{
    jlist l;
    char name[64] = "";
    bool is;
    const int skip = attr ? 1 : 0;
    if (attr && !a->n) return jinja_error(r, "missing attribute name");
    if (a->n > skip) {
        const jinja_value *t = a->pos[skip];
        if (t->type != JV_STR || t->s.n >= sizeof name) return jinja_error(r, "expected a test");
        memcpy(name, t->s.p, t->s.n);
    }
    const int used = a->n > skip ? skip + 1 : a->n;
    jargs rest = {a->n ? a->pos + used : NULL, a->n - used, 0, NULL, NULL, false};
    TRY(jv_list(r, out, JL_ITER));
    if (!jv_truth(v)) return OK; /* also of None */
    TRY(jv_items(r, v, &l));
    for (int64_t i = 0; i < l.n; i++) {
        jinja_value *x = l.v[i];
        if (attr) TRY(jv_path(r, x, a->pos[0], &x));
        is = jv_truth(x);
        if (name[0]) TRY(jinja_test(r, name, x, &rest, &is));
        if (is == want) TRY(jv_list_add(&r->mem, *out, l.v[i], r->e));
        TRY(jinja_step(r, 1));
    }
    return OK;
}

static err_code f_select(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return choose(r, v, a, true, false, out);
}

static err_code f_reject(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return choose(r, v, a, false, false, out);
}

static err_code f_selectattr(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return choose(r, v, a, true, true, out);
}

static err_code f_rejectattr(jrun *r, jinja_value *v, jargs *a, jinja_value **out)
{
    return choose(r, v, a, false, true, out);
}

/* ---- all of them ---- */

static const struct {
    const char *name;
    filter_fn fn;
} filters[] = {{"tojson", f_tojson},
               {"trim", f_trim},
               {"length", f_length},
               {"count", f_length},
               {"string", f_string},
               {"default", f_default},
               {"d", f_default},
               {"list", f_list},
               {"selectattr", f_selectattr},
               {"rejectattr", f_rejectattr},
               {"select", f_select},
               {"reject", f_reject},
               {"map", f_map},
               {"lower", f_lower},
               {"upper", f_upper},
               {"title", f_title},
               {"capitalize", f_capitalize},
               {"safe", f_safe},
               {"join", f_join},
               {"items", f_items},
               {"replace", f_replace},
               {"dictsort", f_dictsort},
               {"sort", f_sort},
               {"first", f_first},
               {"last", f_last},
               {"reverse", f_reverse},
               {"unique", f_unique},
               {"min", f_min},
               {"max", f_max},
               {"sum", f_sum},
               {"int", f_int},
               {"float", f_float},
               {"abs", f_abs},
               {"round", f_round},
               {"indent", f_indent},
               {"format", f_format},
               {"attr", f_attr},
               {"escape", f_escape},
               {"e", f_escape}};

err_code jinja_filter(jrun *r, const char *name, jinja_value *v, jargs *a, jinja_value **out)
{
    TRY(jinja_step(r, 1));
    for (size_t i = 0; i < sizeof filters / sizeof *filters; i++)
        if (!strcmp(filters[i].name, name)) return filters[i].fn(r, v, a, out);
    return jinja_error(r, "No filter named '%.60s'.", name);
}
