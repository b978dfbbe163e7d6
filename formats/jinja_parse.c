/* Statements: tokens to a tree, and a template as a handle. */
#include <string.h>

#include "base/mem.h"
#include "formats/jinja_internal.h"

/* Parses up to a block whose name is among `ends` (NULL-ended) and leaves p at that name; at the
 * end of the template when ends is NULL. */
static err_code parse_body(jparse *p, jnode **out, const char *const *ends);

static err_code block_end(jparse *p)
{
    if (p->t->kind != JT_BLOCK_END)
        return jinja_fail(p, "expected the end of the tag, got '%.60s'",
                          p->t->str ? p->t->str : "a number");
    p->t++;
    return OK;
}

/* A body, then the tag that closes it. */
static err_code parse_inner(jparse *p, jnode **out, const char *end)
{
    const char *const ends[] = {end, NULL};
    TRY(block_end(p));
    TRY(parse_body(p, out, ends));
    p->t++;
    return block_end(p);
}

static err_code parse_if(jparse *p, jnode *n)
{
    static const char *const ends[] = {"elif", "else", "endif", NULL};
    for (;;) {
        TRY(jinja_parse_tuple(p, &n->kid[0], true));
        TRY(block_end(p));
        TRY(parse_body(p, &n->kid[1], ends));
        if (!jinja_is_name(p, "elif")) break;
        p->t++;
        TRY(jinja_node(p, &n->kid[2], JN_IF));
        n = n->kid[2];
    }
    if (jinja_is_name(p, "endif")) {
        p->t++;
        return block_end(p);
    }
    p->t++;
    return parse_inner(p, &n->kid[2], "endif");
}

static err_code parse_for(jparse *p, jnode *n)
{
    static const char *const ends[] = {"else", "endfor", NULL};
    TRY(jinja_parse_target(p, &n->kid[0], false));
    if (!jinja_is_name(p, "in")) return jinja_fail(p, "expected 'in'");
    p->t++;
    TRY(jinja_parse_tuple(p, &n->kid[1], false));
    if (jinja_is_name(p, "if")) {
        p->t++;
        TRY(jinja_parse_expr(p, &n->kid[2], true));
    }
    if (jinja_is_name(p, "recursive")) {
        n->flag = true;
        p->t++;
    }
    TRY(block_end(p));
    p->loops++;
    TRY(parse_body(p, &n->kid[3], ends));
    p->loops--;
    const bool other = jinja_is_name(p, "else");
    p->t++;
    return other ? parse_inner(p, &n->other, "endfor") : block_end(p);
}

static err_code parse_set(jparse *p, jnode *n)
{
    TRY(jinja_parse_target(p, &n->kid[0], true));
    if (jinja_skip_op(p, "=")) {
        TRY(jinja_parse_tuple(p, &n->kid[1], true));
        return block_end(p);
    }
    n->kind = JN_SETBLOCK;
    TRY(jinja_parse_filters(p, &n->kid[2]));
    return parse_inner(p, &n->kid[1], "endset");
}

/* (a, b=1): names, with their defaults. */
static err_code parse_params(jparse *p, jnode *n)
{
    jnode *arg;
    TRY(jinja_need_op(p, "("));
    while (!jinja_skip_op(p, ")")) {
        if (n->n) TRY(jinja_need_op(p, ","));
        if (jinja_skip_op(p, ")")) break;
        if (p->t->kind != JT_NAME) return jinja_fail(p, "expected the name of an argument");
        TRY(jinja_node(p, &arg, JN_NAME));
        arg->str = p->t->str;
        arg->len = p->t->len;
        p->t++;
        if (jinja_skip_op(p, "=")) TRY(jinja_parse_expr(p, &arg->kid[0], true));
        TRY(jinja_node_add(p, n, arg));
    }
    return OK;
}

static err_code parse_macro(jparse *p, jnode *n)
{
    const int loops = p->loops;
    if (p->t->kind != JT_NAME) return jinja_fail(p, "expected the name of a macro");
    n->str = p->t->str;
    n->len = p->t->len;
    p->t++;
    TRY(parse_params(p, n));
    p->loops = 0;
    TRY(parse_inner(p, &n->kid[3], "endmacro"));
    p->loops = loops;
    return OK;
}

static err_code parse_call_block(jparse *p, jnode *n)
{
    const int loops = p->loops;
    n->str = "caller";
    n->len = 6;
    if (jinja_is_op(p, "(")) TRY(parse_params(p, n));
    TRY(jinja_parse_expr(p, &n->kid[0], true));
    if (n->kid[0]->kind != JN_CALL) return jinja_fail(p, "expected a call");
    p->loops = 0;
    TRY(parse_inner(p, &n->kid[3], "endcall"));
    p->loops = loops;
    return OK;
}

static err_code parse_filter_block(jparse *p, jnode *n)
{
    /* "| f" without its first sign: what stands there is pushed through as if it had one */
    jnode *f;
    TRY(jinja_node(p, &f, JN_FILTER));
    if (p->t->kind != JT_NAME) return jinja_fail(p, "expected the name of a filter");
    f->str = p->t->str;
    f->len = p->t->len;
    p->t++;
    if (jinja_is_op(p, "(")) TRY(jinja_parse_args(p, f));
    TRY(jinja_parse_filters(p, &f));
    n->kid[0] = f;
    return parse_inner(p, &n->kid[1], "endfilter");
}

static err_code parse_with(jparse *p, jnode *n)
{
    jnode *set;
    while (p->t->kind != JT_BLOCK_END) {
        if (n->n) TRY(jinja_need_op(p, ","));
        TRY(jinja_node(p, &set, JN_SET));
        TRY(jinja_parse_target(p, &set->kid[0], false));
        TRY(jinja_need_op(p, "="));
        TRY(jinja_parse_expr(p, &set->kid[1], true));
        TRY(jinja_node_add(p, n, set));
    }
    return parse_inner(p, &n->kid[0], "endwith");
}

/* What transformers marks assistants' words with: the text itself is written as it is. */
static err_code parse_generation(jparse *p, jnode *n)
{
    return parse_inner(p, &n->kid[0], "endgeneration");
}

static err_code parse_jump(jparse *p, jnode *n)
{
    if (!p->loops)
        return jinja_fail(p, "'%s' outside of a loop", n->kind == JN_BREAK ? "break" : "continue");
    return block_end(p);
}

static err_code parse_do(jparse *p, jnode *n)
{
    TRY(jinja_parse_tuple(p, &n->kid[0], true));
    return block_end(p);
}

static const struct {
    const char *name;
    jn_kind kind;
    err_code (*parse)(jparse *p, jnode *n);
} statements[] = {{"if", JN_IF, parse_if},
                  {"for", JN_FOR, parse_for},
                  {"set", JN_SET, parse_set},
                  {"macro", JN_MACRO, parse_macro},
                  {"call", JN_CALLBLOCK, parse_call_block},
                  {"filter", JN_FILTERBLOCK, parse_filter_block},
                  {"with", JN_WITH, parse_with},
                  {"generation", JN_WITH, parse_generation},
                  {"break", JN_BREAK, parse_jump},
                  {"continue", JN_CONTINUE, parse_jump},
                  {"do", JN_DO, parse_do}};

static err_code parse_statement(jparse *p, jnode **out)
{
    static const char *const others[] = {"include", "import",     "from", "extends",
                                         "block",   "autoescape", "trans"};
    if (p->t->kind != JT_NAME) return jinja_fail(p, "expected the name of a tag");
    for (size_t i = 0; i < sizeof statements / sizeof *statements; i++) {
        if (!jinja_is_name(p, statements[i].name)) continue;
        TRY(jinja_node(p, out, statements[i].kind));
        p->t++;
        if (++p->depth > JINJA_MAX_DEPTH)
            return err_set(p->e, E_LIMIT, "line %d: nested too deep", p->t->line);
        TRY(statements[i].parse(p, *out));
        p->depth--;
        return OK;
    }
    for (size_t i = 0; i < sizeof others / sizeof *others; i++)
        if (jinja_is_name(p, others[i]))
            return err_set(p->e, E_UNSUPPORTED, "line %d: the tag '%s' is not supported",
                           p->t->line, others[i]);
    return jinja_fail(p, "unknown tag '%.60s'", p->t->str);
}

static bool ends_here(const jparse *p, const char *const *ends)
{
    for (; ends && *ends; ends++)
        if (p->t->kind == JT_NAME && !strcmp(p->t->str, *ends)) return true;
    return false;
}

static err_code parse_body(jparse *p, jnode **out, const char *const *ends)
{
    jnode *n;
    TRY(jinja_node(p, out, JN_BODY));
    for (;;) {
        const jtoken *t = p->t;
        if (t->kind == JT_END)
            return ends ? jinja_fail(p, "expected '%s' before the end", ends[0]) : OK;
        p->t++;
        if (t->kind == JT_DATA) {
            TRY(jinja_node(p, &n, JN_TEXT));
            n->str = t->str;
            n->len = t->len;
        } else if (t->kind == JT_VAR_BEGIN) {
            TRY(jinja_node(p, &n, JN_OUTPUT));
            TRY(jinja_parse_tuple(p, &n->kid[0], true));
            if (p->t->kind != JT_VAR_END)
                return jinja_fail(p, "expected '}}', got '%.60s'", p->t->str);
            p->t++;
        } else {
            if (ends_here(p, ends)) return OK;
            TRY(parse_statement(p, &n));
        }
        TRY(jinja_node_add(p, *out, n));
    }
}

err_code jinja_parse(jparse *p, jnode **out) { return parse_body(p, out, NULL); }

err_code jinja_open(jinja **out, const char *text, size_t n, err *e)
{
    jtoken *tokens;
    int32_t n_tokens;
    *out = NULL;
    if (n > JINJA_MAX_TEMPLATE)
        return err_set(e, E_LIMIT, "a template of %zu bytes is too large", n);
    if (!json_utf8_valid(text, n)) return err_set(e, E_INPUT, "the template is not UTF-8");
    if (memchr(text, 0, n)) return err_set(e, E_INPUT, "the template has a zero byte");
    TRY(mem_alloc((void **)out, 1, sizeof **out, "template", e));
    (*out)->mem.limit = JINJA_MAX_MEMORY;
    err_code rc = jinja_lex(&(*out)->mem, text, n, &tokens, &n_tokens, e);
    if (rc == OK) {
        jparse p = {.a = &(*out)->mem, .t = tokens, .e = e};
        rc = jinja_parse(&p, &(*out)->root);
    }
    if (rc != OK) jinja_close(out);
    return rc;
}

void jinja_close(jinja **t)
{
    if (!*t) return;
    jinja_arena_free(&(*t)->mem);
    mem_free(*t);
    *t = NULL;
}
