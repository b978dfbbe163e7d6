/* Expressions: tokens to a tree, in Jinja's order of precedence. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "formats/jinja_internal.h"

/* ---- what both halves of the parser use ---- */

err_code jinja_fail(const jparse *p, const char *fmt, ...)
{
    char why[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(why, sizeof why, fmt, ap);
    va_end(ap);
    return err_set(p->e, E_INPUT, "line %d: %s", p->t->line, why);
}

err_code jinja_node(jparse *p, jnode **out, jn_kind kind)
{
    if (++p->nodes > JINJA_MAX_NODES)
        return err_set(p->e, E_LIMIT, "line %d: the template is too large", p->t->line);
    TRY(jinja_get(p->a, (void **)out, sizeof **out, p->e));
    (*out)->kind = (uint8_t)kind;
    (*out)->line = p->t->line;
    return OK;
}

err_code jinja_node_add(jparse *p, jnode *list, jnode *item)
{
    if (list->n == list->cap) {
        jnode **more;
        const int32_t cap = list->cap ? 2 * list->cap : 4;
        TRY(jinja_get(p->a, (void **)&more, (size_t)cap * sizeof *more, p->e));
        if (list->n) memcpy(more, list->items, (size_t)list->n * sizeof *more);
        list->items = more;
        list->cap = cap;
    }
    list->items[list->n++] = item;
    return OK;
}

bool jinja_is_op(const jparse *p, const char *op)
{
    return p->t->kind == JT_OP && !strcmp(p->t->str, op);
}

bool jinja_is_name(const jparse *p, const char *name)
{
    return p->t->kind == JT_NAME && !strcmp(p->t->str, name);
}

bool jinja_skip_op(jparse *p, const char *op)
{
    if (!jinja_is_op(p, op)) return false;
    p->t++;
    return true;
}

static const char *token_text(const jtoken *t)
{
    return t->kind == JT_INT || t->kind == JT_FLOAT ? "a number" : t->str;
}

err_code jinja_need_op(jparse *p, const char *op)
{
    if (jinja_skip_op(p, op)) return OK;
    return jinja_fail(p, "expected '%s', got '%.60s'", op, token_text(p->t));
}

static bool skip_name(jparse *p, const char *name)
{
    if (!jinja_is_name(p, name)) return false;
    p->t++;
    return true;
}

static err_code enter(jparse *p)
{
    if (++p->depth > JINJA_MAX_DEPTH)
        return err_set(p->e, E_LIMIT, "line %d: nested too deep", p->t->line);
    return OK;
}

static err_code pair(jparse *p, jnode **io, jn_kind kind, int op, jnode *right)
{
    jnode *n;
    TRY(jinja_node(p, &n, kind));
    n->op = (uint8_t)op;
    n->kid[0] = *io;
    n->kid[1] = right;
    *io = n;
    return OK;
}

/* ---- primaries ---- */

static err_code constant(jparse *p, jnode **out, jinja_value *v)
{
    TRY(jinja_node(p, out, JN_CONST));
    (*out)->value = v;
    return OK;
}

static err_code new_constant(jparse *p, jnode **out, jv_type type)
{
    jinja_value *v;
    TRY(jv_new(p->a, &v, type, p->e));
    return constant(p, out, v);
}

static err_code parse_name(jparse *p, jnode **out)
{
    static const struct {
        const char *name;
        jinja_value *v;
    } words[] = {{"true", &jinja_true},   {"True", &jinja_true}, {"false", &jinja_false},
                 {"False", &jinja_false}, {"none", &jinja_null}, {"None", &jinja_null}};
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        if (!jinja_is_name(p, words[i].name)) continue;
        p->t++;
        return constant(p, out, words[i].v);
    }
    TRY(jinja_node(p, out, JN_NAME));
    (*out)->str = p->t->str;
    (*out)->len = p->t->len;
    p->t++;
    return OK;
}

/* Neighbouring strings are one. */
static err_code parse_string(jparse *p, jnode **out)
{
    size_t n = 0, k = 0;
    const jtoken *end = p->t;
    char *s;
    for (; end->kind == JT_STRING; end++) n += end->len;
    TRY(new_constant(p, out, JV_STR));
    TRY(jinja_get(p->a, (void **)&s, n + 1, p->e));
    for (; p->t < end; p->t++) {
        memcpy(s + k, p->t->str, p->t->len);
        k += p->t->len;
    }
    (*out)->value->s = (jstr){s, NULL, n};
    return OK;
}

static err_code parse_list(jparse *p, jnode **out)
{
    jnode *item;
    TRY(jinja_node(p, out, JN_LIST));
    p->t++;
    while (!jinja_skip_op(p, "]")) {
        if ((*out)->n) TRY(jinja_need_op(p, ","));
        if (jinja_skip_op(p, "]")) break;
        TRY(jinja_parse_expr(p, &item, true));
        TRY(jinja_node_add(p, *out, item));
    }
    return OK;
}

static err_code parse_dict(jparse *p, jnode **out)
{
    jnode *item;
    TRY(jinja_node(p, out, JN_DICT));
    p->t++;
    while (!jinja_skip_op(p, "}")) {
        if ((*out)->n) TRY(jinja_need_op(p, ","));
        if (jinja_skip_op(p, "}")) break;
        TRY(jinja_parse_expr(p, &item, true));
        TRY(jinja_node_add(p, *out, item));
        TRY(jinja_need_op(p, ":"));
        TRY(jinja_parse_expr(p, &item, true));
        TRY(jinja_node_add(p, *out, item));
    }
    return OK;
}

static err_code parse_primary(jparse *p, jnode **out)
{
    const jtoken *t = p->t;
    switch (t->kind) {
    case JT_NAME: return parse_name(p, out);
    case JT_STRING: return parse_string(p, out);
    case JT_INT:
        TRY(new_constant(p, out, JV_INT));
        (*out)->value->i = t->i;
        p->t++;
        return OK;
    case JT_FLOAT:
        TRY(new_constant(p, out, JV_FLOAT));
        (*out)->value->d = t->d;
        p->t++;
        return OK;
    default: break;
    }
    if (jinja_is_op(p, "[")) return parse_list(p, out);
    if (jinja_is_op(p, "{")) return parse_dict(p, out);
    if (!jinja_skip_op(p, "(")) return jinja_fail(p, "unexpected '%.60s'", token_text(t));
    if (jinja_skip_op(p, ")")) return jinja_node(p, out, JN_TUPLE);
    TRY(jinja_parse_tuple(p, out, true));
    return jinja_need_op(p, ")");
}

/* ---- what may follow a primary ---- */

static err_code parse_slice(jparse *p, jnode **io)
{
    jnode *k[3] = {NULL, NULL, NULL}, *n;
    int part = 0;
    bool slice = false;
    while (!jinja_is_op(p, "]")) {
        if (jinja_skip_op(p, ":")) {
            if (++part > 2) return jinja_fail(p, "a slice has three parts at most");
            slice = true;
        } else if (k[part]) {
            return jinja_fail(p, "expected ']', got '%.60s'", token_text(p->t));
        } else {
            TRY(jinja_parse_expr(p, &k[part], true));
        }
    }
    p->t++;
    if (!slice && !k[0]) return jinja_fail(p, "an empty subscript");
    TRY(jinja_node(p, &n, slice ? JN_SLICE : JN_ITEM));
    n->kid[0] = *io;
    for (int i = 0; i < 3; i++) n->kid[i + 1] = k[i];
    *io = n;
    return OK;
}

static err_code parse_dot(jparse *p, jnode **io)
{
    jnode *n, *key;
    if (p->t->kind == JT_INT) {
        TRY(parse_primary(p, &key));
        return pair(p, io, JN_ITEM, 0, key);
    }
    if (p->t->kind != JT_NAME) return jinja_fail(p, "expected a name behind '.'");
    TRY(jinja_node(p, &n, JN_ATTR));
    n->kid[0] = *io;
    n->str = p->t->str;
    n->len = p->t->len;
    p->t++;
    *io = n;
    return OK;
}

static err_code parse_arg(jparse *p, jnode *call)
{
    jnode *n, *v;
    const jn_kind kind = jinja_skip_op(p, "**")  ? JN_STAR2
                         : jinja_skip_op(p, "*") ? JN_STAR
                         : p->t->kind == JT_NAME && p->t[1].kind == JT_OP &&
                                 !strcmp(p->t[1].str, "=")
                             ? JN_KWARG
                             : JN_CONST;
    TRY(jinja_node(p, &n, kind));
    if (kind == JN_KWARG) {
        n->str = p->t->str;
        n->len = p->t->len;
        p->t += 2;
    }
    TRY(jinja_parse_expr(p, &v, true));
    n->kid[0] = v;
    return jinja_node_add(p, call, kind == JN_CONST ? v : n);
}

err_code jinja_parse_args(jparse *p, jnode *call)
{
    bool first = true;
    TRY(jinja_need_op(p, "("));
    while (!jinja_skip_op(p, ")")) {
        if (!first) TRY(jinja_need_op(p, ","));
        if (jinja_skip_op(p, ")")) break;
        TRY(parse_arg(p, call));
        first = false;
    }
    return OK;
}

static err_code parse_call(jparse *p, jnode **io)
{
    jnode *n;
    TRY(jinja_node(p, &n, JN_CALL));
    n->kid[0] = *io;
    *io = n;
    return jinja_parse_args(p, n);
}

err_code jinja_parse_postfix(jparse *p, jnode **io)
{
    for (int levels = 0;; levels++) {
        if (levels > JINJA_MAX_DEPTH)
            return err_set(p->e, E_LIMIT, "line %d: nested too deep", p->t->line);
        if (jinja_skip_op(p, "."))
            TRY(parse_dot(p, io));
        else if (jinja_skip_op(p, "["))
            TRY(parse_slice(p, io));
        else if (jinja_is_op(p, "("))
            TRY(parse_call(p, io));
        else
            return OK;
    }
}

/* A dotted name, as filters and tests have. */
static err_code take_dotted(jparse *p, jnode *n)
{
    if (p->t->kind != JT_NAME)
        return jinja_fail(p, "expected a name, got '%.60s'", token_text(p->t));
    n->str = p->t->str;
    n->len = p->t->len;
    p->t++;
    if (jinja_is_op(p, ".")) return jinja_fail(p, "'%s.' is no filter or test", n->str);
    return OK;
}

static err_code parse_one_filter(jparse *p, jnode **io)
{
    jnode *n;
    TRY(jinja_node(p, &n, JN_FILTER));
    n->kid[0] = *io;
    TRY(take_dotted(p, n));
    if (jinja_is_op(p, "(")) TRY(jinja_parse_args(p, n));
    *io = n;
    return OK;
}

/* "is", and what follows: an argument may stand without parentheses. */
static err_code parse_test(jparse *p, jnode **io)
{
    static const char *const words[] = {"else", "or", "and", "is", "if"};
    jnode *n, *arg, *no;
    const bool negated = skip_name(p, "not");
    TRY(jinja_node(p, &n, JN_TEST));
    n->kid[0] = *io;
    TRY(take_dotted(p, n));
    if (jinja_is_op(p, "(")) {
        TRY(jinja_parse_args(p, n));
    } else {
        const jt_kind k = p->t->kind;
        bool more = k == JT_NAME || k == JT_STRING || k == JT_INT || k == JT_FLOAT ||
                    jinja_is_op(p, "[") || jinja_is_op(p, "{");
        for (size_t i = 0; i < sizeof words / sizeof *words; i++)
            more = more && !jinja_is_name(p, words[i]);
        if (more && !jinja_is_name(p, "in") && !jinja_is_name(p, "not")) {
            TRY(parse_primary(p, &arg));
            TRY(jinja_parse_postfix(p, &arg));
            TRY(jinja_node_add(p, n, arg));
        }
    }
    *io = n;
    if (!negated) return OK;
    TRY(jinja_node(p, &no, JN_NOT));
    no->kid[0] = n;
    *io = no;
    return OK;
}

err_code jinja_parse_filters(jparse *p, jnode **io)
{
    for (int levels = 0;; levels++) {
        if (levels > JINJA_MAX_DEPTH)
            return err_set(p->e, E_LIMIT, "line %d: nested too deep", p->t->line);
        if (jinja_skip_op(p, "|"))
            TRY(parse_one_filter(p, io));
        else if (*io && skip_name(p, "is"))
            TRY(parse_test(p, io));
        else if (*io && jinja_is_op(p, "("))
            TRY(parse_call(p, io));
        else
            return OK;
    }
}

/* ---- operators, tightest last ---- */

err_code jinja_parse_unary(jparse *p, jnode **out, bool filters)
{
    TRY(enter(p));
    const bool neg = jinja_skip_op(p, "-"), pos = !neg && jinja_skip_op(p, "+");
    if (neg || pos) {
        jnode *kid;
        TRY(jinja_parse_unary(p, &kid, false));
        TRY(jinja_node(p, out, neg ? JN_NEG : JN_POS));
        (*out)->kid[0] = kid;
    } else {
        TRY(parse_primary(p, out));
    }
    TRY(jinja_parse_postfix(p, out));
    if (filters) TRY(jinja_parse_filters(p, out));
    p->depth--;
    return OK;
}

static err_code parse_pow(jparse *p, jnode **out)
{
    jnode *right;
    TRY(jinja_parse_unary(p, out, true));
    while (jinja_skip_op(p, "**")) {
        TRY(jinja_parse_unary(p, &right, true));
        TRY(pair(p, out, JN_BINARY, OP_POW, right));
    }
    return OK;
}

typedef struct {
    const char *text;
    jn_op op;
} binary;

/* One level of operators that group to the left. */
static err_code parse_level(jparse *p, jnode **out, int level)
{
    static const binary ops[3][5] = {
        {{"+", OP_ADD}, {"-", OP_SUB}},
        {{"~", OP_CONCAT}},
        {{"*", OP_MUL}, {"/", OP_DIV}, {"//", OP_FLOORDIV}, {"%", OP_MOD}}};
    jnode *right;
    if (level == 3) return parse_pow(p, out);
    TRY(parse_level(p, out, level + 1));
    for (;;) {
        const binary *b = NULL;
        for (int i = 0; i < 5 && ops[level][i].text && !b; i++)
            if (jinja_skip_op(p, ops[level][i].text)) b = &ops[level][i];
        if (!b) return OK;
        TRY(parse_level(p, &right, level + 1));
        TRY(pair(p, out, JN_BINARY, (int)b->op, right));
    }
}

static bool take_compare(jparse *p, jn_op *op)
{
    static const binary ops[] = {{"==", OP_EQ}, {"!=", OP_NE}, {"<=", OP_LE},
                                 {">=", OP_GE}, {"<", OP_LT},  {">", OP_GT}};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        *op = ops[i].op;
        if (jinja_skip_op(p, ops[i].text)) return true;
    }
    *op = OP_IN;
    if (skip_name(p, "in")) return true;
    *op = OP_NOTIN;
    if (!jinja_is_name(p, "not") || p->t[1].kind != JT_NAME || strcmp(p->t[1].str, "in") != 0)
        return false;
    p->t += 2;
    return true;
}

static err_code parse_compare(jparse *p, jnode **out)
{
    jnode *all = NULL, *right, *part;
    jn_op op;
    TRY(parse_level(p, out, 0));
    while (take_compare(p, &op)) {
        TRY(parse_level(p, &right, 0));
        if (!all) {
            TRY(jinja_node(p, &all, JN_COMPARE));
            all->kid[0] = *out;
            *out = all;
        }
        TRY(jinja_node(p, &part, JN_CONST));
        part->op = (uint8_t)op;
        part->kid[0] = right;
        TRY(jinja_node_add(p, all, part));
    }
    return OK;
}

static err_code parse_not(jparse *p, jnode **out)
{
    jnode *kid;
    TRY(enter(p));
    if (skip_name(p, "not")) {
        TRY(parse_not(p, &kid));
        TRY(jinja_node(p, out, JN_NOT));
        (*out)->kid[0] = kid;
    } else {
        TRY(parse_compare(p, out));
    }
    p->depth--;
    return OK;
}

static err_code parse_and(jparse *p, jnode **out)
{
    jnode *right;
    TRY(parse_not(p, out));
    while (skip_name(p, "and")) {
        TRY(parse_not(p, &right));
        TRY(pair(p, out, JN_AND, 0, right));
    }
    return OK;
}

static err_code parse_or(jparse *p, jnode **out)
{
    jnode *right;
    TRY(parse_and(p, out));
    while (skip_name(p, "or")) {
        TRY(parse_and(p, &right));
        TRY(pair(p, out, JN_OR, 0, right));
    }
    return OK;
}

err_code jinja_parse_expr(jparse *p, jnode **out, bool with_cond)
{
    TRY(enter(p));
    TRY(parse_or(p, out));
    while (with_cond && skip_name(p, "if")) {
        jnode *test, *other = NULL, *n;
        TRY(parse_or(p, &test));
        if (skip_name(p, "else")) TRY(jinja_parse_expr(p, &other, true));
        TRY(jinja_node(p, &n, JN_COND));
        n->kid[0] = *out;
        n->kid[1] = test;
        n->kid[2] = other;
        *out = n;
    }
    p->depth--;
    return OK;
}

static bool tuple_ends(const jparse *p)
{
    return p->t->kind == JT_VAR_END || p->t->kind == JT_BLOCK_END || jinja_is_op(p, ")") ||
           jinja_is_name(p, "in") || jinja_is_name(p, "if") || jinja_is_name(p, "recursive") ||
           jinja_is_op(p, "=");
}

err_code jinja_parse_tuple(jparse *p, jnode **out, bool with_cond)
{
    jnode *first, *item;
    TRY(jinja_parse_expr(p, &first, with_cond));
    *out = first;
    if (!jinja_is_op(p, ",")) return OK;
    TRY(jinja_node(p, out, JN_TUPLE));
    TRY(jinja_node_add(p, *out, first));
    while (jinja_skip_op(p, ",")) {
        if (tuple_ends(p)) break;
        TRY(jinja_parse_expr(p, &item, with_cond));
        TRY(jinja_node_add(p, *out, item));
    }
    return OK;
}

/* A name, or a tuple of targets in parentheses. */
static err_code parse_one_target(jparse *p, jnode **out)
{
    if (jinja_is_op(p, "(")) {
        if (++p->depth > JINJA_MAX_DEPTH)
            return err_set(p->e, E_LIMIT, "line %d: nested too deep", p->t->line);
        p->t++;
        TRY(jinja_parse_target(p, out, false));
        p->depth--;
        return jinja_need_op(p, ")");
    }
    if (p->t->kind != JT_NAME) return jinja_fail(p, "cannot assign to '%.60s'", token_text(p->t));
    TRY(jinja_node(p, out, JN_NAME));
    (*out)->str = p->t->str;
    (*out)->len = p->t->len;
    p->t++;
    return OK;
}

/* Targets with commas, or (space) one attribute of a name. */
err_code jinja_parse_target(jparse *p, jnode **out, bool space)
{
    jnode *item, *list;
    TRY(parse_one_target(p, out));
    if (space && (*out)->kind == JN_NAME && jinja_skip_op(p, ".")) {
        TRY(parse_dot(p, out));
        return (*out)->kind == JN_ATTR ? OK : jinja_fail(p, "cannot assign to an index");
    }
    if (!jinja_is_op(p, ",")) return OK;
    TRY(jinja_node(p, &list, JN_TUPLE));
    TRY(jinja_node_add(p, list, *out));
    *out = list;
    while (jinja_skip_op(p, ",") && !tuple_ends(p)) {
        TRY(parse_one_target(p, &item));
        TRY(jinja_node_add(p, list, item));
    }
    return OK;
}
