/* Expressions: the tree to values. */
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "formats/jinja_internal.h"

err_code jinja_error(jrun *r, const char *fmt, ...)
{
    char why[400];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    return err_set(r->e, E_INPUT, "line %d: %s", r->line, why);
}

err_code jinja_step(jrun *r, int64_t n)
{
    r->steps += n;
    if (r->steps > JINJA_MAX_STEPS) return err_set(r->e, E_LIMIT, "the template takes too long");
    return OK;
}

/* ---- names ---- */

static err_code eval_name(jrun *r, const jnode *n, jinja_value **out)
{
    const jinja_value key = {.type = JV_STR, .s = {n->str, NULL, n->len}};
    for (const jframe *f = r->frame; f; f = f->up)
        if ((*out = jmap_get(&f->vars, &key)) != NULL) return OK;
    if ((*out = jmap_get(&r->scope->vars, &key)) != NULL) return OK;
    const int which = jinja_func_find(n->str, r);
    if (which < 0) return jv_undef(r, out, n->str);
    TRY(jv_new(&r->mem, out, JV_FUNC, r->e));
    (*out)->i = which;
    return OK;
}

/* ---- arithmetic ---- */

static bool is_number(const jinja_value *v)
{
    return v->type == JV_BOOL || v->type == JV_INT || v->type == JV_FLOAT;
}

static double real(const jinja_value *v)
{
    return v->type == JV_FLOAT ? v->d : v->type == JV_BOOL ? v->b : (double)v->i;
}

static int64_t whole(const jinja_value *v) { return v->type == JV_BOOL ? v->b : v->i; }

static err_code too_large(jrun *r) { return jinja_error(r, "an integer is too large"); }

static err_code int_power(jrun *r, int64_t a, int64_t b, jinja_value **out)
{
    int64_t v = 1;
    if (b < 0) return jv_float(r, out, pow((double)a, (double)b));
    for (int64_t i = 0; i < b && v != 0 && (a != 1 || i < 1); i++) {
        if (a == -1 && i > 1) {
            v = b % 2 ? -1 : 1;
            break;
        }
        if (__builtin_mul_overflow(v, a, &v)) return too_large(r);
    }
    return jv_int(r, out, v);
}

static err_code int_math(jrun *r, jn_op op, int64_t a, int64_t b, jinja_value **out)
{
    int64_t v = 0;
    bool over = false;
    switch (op) {
    case OP_ADD: over = __builtin_add_overflow(a, b, &v); break;
    case OP_SUB: over = __builtin_sub_overflow(a, b, &v); break;
    case OP_MUL: over = __builtin_mul_overflow(a, b, &v); break;
    case OP_POW: return int_power(r, a, b, out);
    default:
        if (b == 0) return jinja_error(r, "division by zero");
        if (op == OP_DIV) return jv_float(r, out, (double)a / (double)b);
        if (a == INT64_MIN && b == -1) return too_large(r);
        v = op == OP_MOD ? a % b : a / b;
        if (op == OP_MOD && v && (v < 0) != (b < 0)) v += b;
        if (op == OP_FLOORDIV && a % b && (a < 0) != (b < 0)) v--;
    }
    return over ? too_large(r) : jv_int(r, out, v);
}

static err_code real_math(jrun *r, jn_op op, double a, double b, jinja_value **out)
{
    double v;
    switch (op) {
    case OP_ADD: v = a + b; break;
    case OP_SUB: v = a - b; break;
    case OP_MUL: v = a * b; break;
    case OP_POW: v = pow(a, b); break;
    default:
        if (b == 0) return jinja_error(r, "division by zero");
        v = op == OP_DIV ? a / b : op == OP_FLOORDIV ? floor(a / b) : fmod(a, b);
        if (op == OP_MOD && v != 0 && (v < 0) != (b < 0)) v += b;
    }
    return jv_float(r, out, v);
}

static err_code repeat(jrun *r, const jinja_value *v, int64_t times, jinja_value **out)
{
    jout o = {0};
    if (v->type == JV_STR) {
        for (int64_t i = 0; i < times && v->s.n; i++) {
            TRY(jinja_step(r, 1));
            TRY(jout_add(r, &o, v->s));
        }
        return jv_str(r, out, jout_str(&o));
    }
    TRY(jv_list(r, out, v->kind));
    for (int64_t i = 0; i < times && v->l.n; i++) {
        for (int64_t k = 0; k < v->l.n; k++) TRY(jv_list_add(&r->mem, *out, v->l.v[k], r->e));
        TRY(jinja_step(r, v->l.n));
    }
    return OK;
}

static err_code add_lists(jrun *r, const jinja_value *a, const jinja_value *b, jinja_value **out)
{
    TRY(jv_list(r, out, a->kind));
    TRY(jinja_step(r, a->l.n + b->l.n));
    for (int64_t i = 0; i < a->l.n; i++) TRY(jv_list_add(&r->mem, *out, a->l.v[i], r->e));
    for (int64_t i = 0; i < b->l.n; i++) TRY(jv_list_add(&r->mem, *out, b->l.v[i], r->e));
    return OK;
}

static err_code concat(jrun *r, const jinja_value *a, const jinja_value *b, jinja_value **out)
{
    jout o = {0};
    TRY(jv_show(r, &o, a));
    TRY(jv_show(r, &o, b));
    return jv_str(r, out, jout_str(&o));
}

/* Strings; one that is marked as safe escapes the other. */
static err_code add_strings(jrun *r, jinja_value *a, jinja_value *b, jinja_value **out)
{
    const bool safe = a->kind || b->kind;
    if (safe && !a->kind) TRY(jf_escape(r, a->s, &a));
    if (safe && !b->kind) TRY(jf_escape(r, b->s, &b));
    TRY(concat(r, a, b, out));
    (*out)->kind = safe;
    return OK;
}

static err_code binary(jrun *r, jn_op op, jinja_value *a, jinja_value *b, jinja_value **out)
{
    static const char *const signs[] = {"+", "-", "*", "/", "//", "%", "**", "~"};
    if (op == OP_CONCAT) return concat(r, a, b, out);
    if (is_number(a) && is_number(b)) {
        if (a->type != JV_FLOAT && b->type != JV_FLOAT)
            return int_math(r, op, whole(a), whole(b), out);
        return real_math(r, op, real(a), real(b), out);
    }
    if (op == OP_ADD && a->type == JV_STR && b->type == JV_STR) return add_strings(r, a, b, out);
    if (op == OP_ADD && a->type == JV_LIST && b->type == JV_LIST && a->kind == b->kind &&
        a->kind != JL_ITER)
        return add_lists(r, a, b, out);
    if (op == OP_MOD && a->type == JV_STR) return jinja_printf(r, a->s, b, out);
    if (op == OP_MUL) {
        const bool left = a->type == JV_INT || a->type == JV_BOOL;
        const jinja_value *seq = left ? b : a, *n = left ? a : b;
        if ((n->type == JV_INT || n->type == JV_BOOL) &&
            (seq->type == JV_STR || (seq->type == JV_LIST && seq->kind != JL_ITER)))
            return repeat(r, seq, whole(n), out);
    }
    const jinja_value *u = a->type == JV_UNDEF ? a : b;
    if (u->type == JV_UNDEF) return jinja_error(r, "'%.100s' is undefined", u->s.p);
    return jinja_error(r, "unsupported operand type(s) for %s: '%s' and '%s'", signs[op],
                       jv_type_name(a), jv_type_name(b));
}

static err_code compare(jrun *r, jn_op op, jinja_value *a, jinja_value *b, bool *out)
{
    TRY(jinja_step(r, a->type == JV_STR ? (int64_t)(a->s.n / 64) : 1));
    switch (op) {
    case OP_EQ: *out = jv_equal(a, b, 0); return OK;
    case OP_NE: *out = !jv_equal(a, b, 0); return OK;
    case OP_LT: return jv_less(r, a, b, out);
    case OP_GT: return jv_less(r, b, a, out);
    case OP_LE:
    case OP_GE:
        TRY(op == OP_LE ? jv_less(r, b, a, out) : jv_less(r, a, b, out));
        *out = !*out;
        return OK;
    default:
        TRY(jv_in(r, a, b, out));
        *out = *out == (op == OP_IN);
        return OK;
    }
}

static err_code eval_compare(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *a, *b;
    bool is = true;
    TRY(jinja_eval(r, n->kid[0], &a));
    for (int32_t i = 0; i < n->n && is; i++) {
        TRY(jinja_eval(r, n->items[i]->kid[0], &b));
        r->line = n->line;
        TRY(compare(r, (jn_op)n->items[i]->op, a, b, &is));
        a = b;
    }
    *out = jv_bool(is);
    return OK;
}

static err_code eval_sign(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *v;
    TRY(jinja_eval(r, n->kid[0], &v));
    if (!is_number(v)) return jinja_error(r, "bad operand type for unary: '%s'", jv_type_name(v));
    if (v->type == JV_FLOAT) return jv_float(r, out, n->kind == JN_NEG ? -v->d : v->d);
    if (n->kind == JN_NEG && whole(v) == INT64_MIN) return too_large(r);
    return jv_int(r, out, n->kind == JN_NEG ? -whole(v) : whole(v));
}

/* ---- containers ---- */

static err_code eval_list(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *v;
    TRY(jv_list(r, out, n->kind == JN_TUPLE ? JL_TUPLE : JL_LIST));
    for (int32_t i = 0; i < n->n; i++) {
        TRY(jinja_eval(r, n->items[i], &v));
        TRY(jv_list_add(&r->mem, *out, v, r->e));
    }
    return OK;
}

static err_code eval_dict(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *k, *v;
    TRY(jv_new(&r->mem, out, JV_MAP, r->e));
    for (int32_t i = 0; i + 1 < n->n; i += 2) {
        TRY(jinja_eval(r, n->items[i], &k));
        TRY(jinja_eval(r, n->items[i + 1], &v));
        if ((k->type == JV_LIST && k->kind != JL_TUPLE) || k->type == JV_MAP)
            return jinja_error(r, "unhashable type: '%s'", jv_type_name(k));
        TRY(jmap_set(&r->mem, &(*out)->m, k, v, r->e));
    }
    return OK;
}

static err_code eval_item(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *of, *key;
    TRY(jinja_eval(r, n->kid[0], &of));
    TRY(jinja_eval(r, n->kid[1], &key));
    r->line = n->line;
    return jv_item(r, of, key, out);
}

static err_code eval_slice(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *of, *v;
    const jinja_value *k[3] = {NULL, NULL, NULL};
    TRY(jinja_eval(r, n->kid[0], &of));
    for (int i = 0; i < 3; i++) {
        if (!n->kid[i + 1]) continue;
        TRY(jinja_eval(r, n->kid[i + 1], &v));
        k[i] = v;
    }
    r->line = n->line;
    return jv_slice(r, of, k, out);
}

/* ---- calls ---- */

jinja_value *jinja_arg(const jargs *a, int i, const char *name)
{
    if (i >= 0 && i < a->n) return a->pos[i];
    for (int k = 0; name && k < a->n_kw; k++)
        if (!strcmp(a->name[k], name)) return a->kw[k];
    return NULL;
}

err_code jinja_arg_int(jrun *r, const jargs *a, int i, const char *name, int64_t def, int64_t *out)
{
    const jinja_value *v = jinja_arg(a, i, name);
    *out = def;
    if (!v || v->type == JV_NONE) return OK;
    if (v->type != JV_INT && v->type != JV_BOOL)
        return jinja_error(r, "expected an integer, got '%s'", jv_type_name(v));
    *out = whole(v);
    return OK;
}

bool jinja_arg_true(const jargs *a, int i, const char *name, bool def)
{
    const jinja_value *v = jinja_arg(a, i, name);
    return v ? jv_truth(v) : def;
}

static err_code add_named(jrun *r, jargs *a, int *cap, const char *name, jinja_value *v)
{
    if (a->n_kw == *cap) {
        const char **names;
        jinja_value **kw;
        const int more = *cap ? 2 * *cap : 8;
        TRY(jinja_get(&r->mem, (void **)&names, (size_t)more * sizeof *names, r->e));
        TRY(jinja_get(&r->mem, (void **)&kw, (size_t)more * sizeof *kw, r->e));
        for (int i = 0; i < a->n_kw; i++) {
            names[i] = a->name[i];
            kw[i] = a->kw[i];
        }
        a->name = names;
        a->kw = kw;
        *cap = more;
    }
    a->name[a->n_kw] = name;
    a->kw[a->n_kw++] = v;
    return OK;
}

static err_code add_star2(jrun *r, jargs *a, int *cap, const jinja_value *v)
{
    if (v->type != JV_MAP) return jinja_error(r, "argument after ** must be a mapping");
    for (int32_t i = 0; i < v->m.n; i++) {
        char *name;
        const jinja_value *k = v->m.key[i];
        if (k->type != JV_STR) return jinja_error(r, "keywords must be strings");
        TRY(jinja_get(&r->mem, (void **)&name, k->s.n + 1, r->e));
        memcpy(name, k->s.p, k->s.n);
        TRY(add_named(r, a, cap, name, v->m.val[i]));
    }
    return OK;
}

err_code jinja_args_of(jrun *r, const jnode *call, int from, jargs *a)
{
    jinja_value *list, *v;
    int cap = 0;
    *a = (jargs){0};
    if (!call->n && !from) return OK;
    TRY(jv_list(r, &list, JL_LIST));
    for (int i = 0; i < from; i++) TRY(jv_list_add(&r->mem, list, &jinja_null, r->e));
    for (int32_t i = 0; i < call->n; i++) {
        const jnode *n = call->items[i];
        const bool named = n->kind == JN_KWARG, star = n->kind == JN_STAR,
                   star2 = n->kind == JN_STAR2;
        TRY(jinja_eval(r, named || star || star2 ? n->kid[0] : n, &v));
        if (named) {
            TRY(add_named(r, a, &cap, n->str, v));
        } else if (star2) {
            TRY(add_star2(r, a, &cap, v));
        } else if (star) {
            jlist l;
            TRY(jv_items(r, v, &l));
            for (int64_t k = 0; k < l.n; k++) TRY(jv_list_add(&r->mem, list, l.v[k], r->e));
        } else {
            TRY(jv_list_add(&r->mem, list, v, r->e));
        }
    }
    a->pos = list->l.v;
    a->n = (int)list->l.n;
    return OK;
}

err_code jinja_call(jrun *r, jinja_value *f, jargs *a, jinja_value **out)
{
    switch (f->type) {
    case JV_MACRO: return jinja_call_macro(r, f->macro, a, NULL, out);
    case JV_FUNC: return jinja_func(r, (int)f->i, a, out);
    case JV_METHOD: return jinja_method(r, f->method.which, f->method.of, a, out);
    case JV_LOOP:
        if (a->n != 1) return jinja_error(r, "loop() takes what to go through");
        return jinja_loop_again(r, f->loop, a->pos[0], out);
    case JV_UNDEF: return jinja_error(r, "'%.100s' is undefined", f->s.p);
    default: return jinja_error(r, "'%s' object is not callable", jv_type_name(f));
    }
}

static err_code eval_call(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *f;
    jargs a;
    TRY(jinja_eval(r, n->kid[0], &f));
    TRY(jinja_args_of(r, n, 0, &a));
    r->line = n->line;
    return jinja_call(r, f, &a, out);
}

static err_code eval_filter(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *v;
    jargs a;
    TRY(jinja_eval(r, n->kid[0], &v));
    TRY(jinja_args_of(r, n, 0, &a));
    r->line = n->line;
    return jinja_filter(r, n->str, v, &a, out);
}

static err_code eval_test(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *v;
    jargs a;
    bool is;
    TRY(jinja_eval(r, n->kid[0], &v));
    TRY(jinja_args_of(r, n, 0, &a));
    r->line = n->line;
    TRY(jinja_test(r, n->str, v, &a, &is));
    *out = jv_bool(is);
    return OK;
}

/* ---- all of them ---- */

static err_code eval_choice(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *v;
    switch (n->kind) {
    case JN_NOT:
        TRY(jinja_eval(r, n->kid[0], &v));
        *out = jv_bool(!jv_truth(v));
        return OK;
    case JN_COND:
        TRY(jinja_eval(r, n->kid[1], &v));
        if (jv_truth(v)) return jinja_eval(r, n->kid[0], out);
        return n->kid[2] ? jinja_eval(r, n->kid[2], out) : jv_undef(r, out, "the inline if");
    default:
        TRY(jinja_eval(r, n->kid[0], out));
        return jv_truth(*out) == (n->kind == JN_AND) ? jinja_eval(r, n->kid[1], out) : OK;
    }
}

static err_code eval_node(jrun *r, const jnode *n, jinja_value **out)
{
    jinja_value *a, *b;
    switch (n->kind) {
    case JN_CONST: *out = n->value; return OK;
    case JN_NAME: return eval_name(r, n, out);
    case JN_LIST:
    case JN_TUPLE: return eval_list(r, n, out);
    case JN_DICT: return eval_dict(r, n, out);
    case JN_ATTR:
        TRY(jinja_eval(r, n->kid[0], &a));
        r->line = n->line;
        return jv_attr(r, a, n->str, out);
    case JN_ITEM: return eval_item(r, n, out);
    case JN_SLICE: return eval_slice(r, n, out);
    case JN_CALL: return eval_call(r, n, out);
    case JN_FILTER: return eval_filter(r, n, out);
    case JN_TEST: return eval_test(r, n, out);
    case JN_NEG:
    case JN_POS: return eval_sign(r, n, out);
    case JN_BINARY:
        TRY(jinja_eval(r, n->kid[0], &a));
        TRY(jinja_eval(r, n->kid[1], &b));
        r->line = n->line;
        return binary(r, (jn_op)n->op, a, b, out);
    case JN_COMPARE: return eval_compare(r, n, out);
    default: return eval_choice(r, n, out);
    }
}

err_code jinja_eval(jrun *r, const jnode *n, jinja_value **out)
{
    TRY(jinja_step(r, 1));
    if (++r->depth > JINJA_MAX_LEVELS)
        return err_set(r->e, E_LIMIT, "line %d: evaluation nested too deep", n->line);
    const err_code rc = eval_node(r, n, out);
    r->depth--;
    return rc;
}
