/* Tests: what may stand behind "is". */
#include <string.h>
#include <utf8proc.h>

#include "formats/jinja_internal.h"

static bool all_case(jstr s, bool upper)
{
    bool any = false;
    for (size_t i = 0, len; i < s.n; i += len) {
        const utf8proc_int32_t c = (utf8proc_int32_t)jstr_code(s, i, &len);
        if (upper ? utf8proc_tolower(c) != c : utf8proc_toupper(c) != c) any = true;
        if (upper ? utf8proc_toupper(c) != c : utf8proc_tolower(c) != c) return false;
    }
    return any;
}

static err_code t_compare(jrun *r, const char *name, jinja_value *v, jinja_value *w, bool *out)
{
    const bool less = name[0] == 'l' || name[0] == '<';
    const bool equal = name[1] == 'e' || name[1] == '=';
    if (equal) {
        TRY(less ? jv_less(r, w, v, out) : jv_less(r, v, w, out));
        *out = !*out;
        return OK;
    }
    return less ? jv_less(r, v, w, out) : jv_less(r, w, v, out);
}

static err_code t_divides(jrun *r, const char *name, jinja_value *v, const jinja_value *w,
                          bool *out)
{
    if (v->type != JV_INT || (w && w->type != JV_INT))
        return jinja_error(r, "%s: expected an integer, got '%s'", name, jv_type_name(v));
    const int64_t by = w ? w->i : 2;
    if (by == 0) return jinja_error(r, "division by zero");
    *out = by == -1 || v->i % by == 0;
    if (!strcmp(name, "odd")) *out = !*out;
    return OK;
}

/* Tests of a kind; -1 when the name is none of them. */
static int of_kind(const char *name, const jinja_value *v)
{
    const jv_type t = (jv_type)v->type;
    const struct {
        const char *name;
        bool is;
    } kinds[] = {
        {"defined", t != JV_UNDEF},
        {"undefined", t == JV_UNDEF},
        {"none", t == JV_NONE},
        {"string", t == JV_STR},
        {"mapping", t == JV_MAP},
        {"boolean", t == JV_BOOL},
        {"true", t == JV_BOOL && v->b},
        {"false", t == JV_BOOL && !v->b},
        {"integer", t == JV_INT},
        {"float", t == JV_FLOAT},
        {"number", t == JV_INT || t == JV_FLOAT || t == JV_BOOL},
        {"iterable", t == JV_STR || t == JV_LIST || t == JV_MAP || t == JV_UNDEF},
        {"sequence",
         t == JV_STR || t == JV_MAP || t == JV_UNDEF || (t == JV_LIST && v->kind != JL_ITER)},
        {"callable", t == JV_MACRO || t == JV_FUNC || t == JV_METHOD || t == JV_LOOP},
        {"escaped", false},
    };
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        if (!strcmp(kinds[i].name, name)) return kinds[i].is;
    return -1;
}

static bool is_one_of(const char *name, const char *const *names)
{
    for (; *names; names++)
        if (!strcmp(*names, name)) return true;
    return false;
}

err_code jinja_test(jrun *r, const char *name, jinja_value *v, jargs *a, bool *out)
{
    static const char *const equal[] = {"eq", "==", "equalto", NULL};
    static const char *const order[] = {"lt", "<", "le", "<=", "gt", ">", "ge", ">=", NULL};
    jinja_value *w = jinja_arg(a, 0, NULL);
    TRY(jinja_step(r, 1));
    const int kind = of_kind(name, v);
    if (kind >= 0) {
        *out = kind;
        return OK;
    }
    if (!strcmp(name, "even")) return t_divides(r, name, v, NULL, out);
    if (!strcmp(name, "odd")) return t_divides(r, name, v, NULL, out);
    if (!strcmp(name, "lower") || !strcmp(name, "upper")) {
        jstr s;
        TRY(jv_text(r, v, &s));
        *out = all_case(s, name[0] == 'u');
        return OK;
    }
    if (!strcmp(name, "filter") || !strcmp(name, "test"))
        return jinja_error(r, "the test '%s' is not supported", name);
    if (!w) return jinja_error(r, "No test named '%.60s', or it lacks an argument.", name);
    if (is_one_of(name, equal) || !strcmp(name, "ne") || !strcmp(name, "!=")) {
        *out = jv_equal(v, w, 0) == (name[0] == 'e' || name[0] == '=');
        return OK;
    }
    if (!strcmp(name, "greaterthan")) return t_compare(r, "gt", v, w, out);
    if (!strcmp(name, "lessthan")) return t_compare(r, "lt", v, w, out);
    if (is_one_of(name, order)) return t_compare(r, name, v, w, out);
    if (!strcmp(name, "in")) return jv_in(r, v, w, out);
    if (!strcmp(name, "divisibleby")) return t_divides(r, name, v, w, out);
    if (!strcmp(name, "sameas")) {
        *out = v == w || (v->type == w->type && v->type != JV_LIST && v->type != JV_MAP &&
                          v->type != JV_STR && jv_equal(v, w, 0));
        return OK;
    }
    return jinja_error(r, "No test named '%.60s'.", name);
}
