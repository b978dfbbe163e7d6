/* Statements: the tree to text; macros, loops, and rendering as a whole. */
#include <string.h>

#include "base/mem.h"
#include "formats/jinja_internal.h"

/* ---- frames ---- */

err_code jinja_frame(jrun *r, jframe **out, jframe *up)
{
    TRY(jinja_get(&r->mem, (void **)out, sizeof **out, r->e));
    (*out)->up = up;
    return OK;
}

static err_code bind(jrun *r, jframe *f, const char *name, size_t n, jinja_value *v)
{
    jinja_value *key;
    TRY(jv_str(r, &key, (jstr){name, NULL, n}));
    return jmap_set(&r->mem, &f->vars, key, v, r->e);
}

static err_code assign_space(jrun *r, const jnode *target, jinja_value *v)
{
    jinja_value *space, *key;
    TRY(jinja_eval(r, target->kid[0], &space));
    if (space->type != JV_SPACE)
        return jinja_error(r, "cannot assign attribute on non-namespace object");
    TRY(jv_str(r, &key, (jstr){target->str, NULL, target->len}));
    return jmap_set(&r->mem, &space->m, key, v, r->e);
}

err_code jinja_assign(jrun *r, const jnode *target, jinja_value *v)
{
    if (target->kind == JN_NAME) return bind(r, r->frame, target->str, target->len, v);
    if (target->kind == JN_ATTR) return assign_space(r, target, v);
    jlist l;
    TRY(jv_items(r, v, &l));
    if (l.n != target->n)
        return jinja_error(r, "%s values to unpack (expected %d)",
                           l.n < target->n ? "not enough" : "too many", target->n);
    for (int32_t i = 0; i < target->n; i++) TRY(jinja_assign(r, target->items[i], l.v[i]));
    return OK;
}

err_code jinja_capture(jrun *r, const jnode *body, jinja_value **out)
{
    jout o = {0}, *outer = r->out;
    r->out = &o;
    const err_code rc = jinja_exec_body(r, body);
    r->out = outer;
    return rc != OK ? rc : jv_str(r, out, jout_str(&o));
}

/* ---- macros ---- */

/* Binds what the call has to the names that the macro has, defaults and the rest included. */
static err_code bind_args(jrun *r, const jmacro *m, const jargs *a, jinja_value *caller)
{
    const jnode *n = m->node;
    jinja_value *rest, *named, *v;
    for (int32_t i = 0; i < n->n; i++) {
        const jnode *p = n->items[i];
        v = jinja_arg(a, i, p->str);
        if (!v && p->kid[0])
            TRY(jinja_eval(r, p->kid[0], &v));
        else if (!v)
            TRY(jv_undef(r, &v, p->str));
        TRY(bind(r, r->frame, p->str, p->len, v));
    }
    TRY(jv_list(r, &rest, JL_TUPLE));
    for (int i = n->n; i < a->n; i++) TRY(jv_list_add(&r->mem, rest, a->pos[i], r->e));
    TRY(jv_new(&r->mem, &named, JV_MAP, r->e));
    for (int k = 0; k < a->n_kw; k++) {
        bool known = false;
        for (int32_t i = 0; i < n->n && !known; i++) known = !strcmp(n->items[i]->str, a->name[k]);
        if (known) continue;
        if (!strcmp(a->name[k], "caller") && !caller) {
            caller = a->kw[k];
            continue;
        }
        jinja_value *key;
        TRY(jv_str(r, &key, (jstr){a->name[k], NULL, strlen(a->name[k])}));
        TRY(jmap_set(&r->mem, &named->m, key, a->kw[k], r->e));
    }
    TRY(bind(r, r->frame, "varargs", 7, rest));
    TRY(bind(r, r->frame, "kwargs", 6, named));
    if (!caller) TRY(jv_undef(r, &caller, "caller"));
    return bind(r, r->frame, "caller", 6, caller);
}

/* Whether the macro's body speaks of a name: then it takes more than it lists. */
static bool mentions(const jnode *n, const char *name, int depth)
{
    if (!n || depth > 60) return false;
    if (n->kind == JN_NAME && n->str && !strcmp(n->str, name)) return true;
    for (int i = 0; i < 4; i++)
        if (mentions(n->kid[i], name, depth + 1)) return true;
    for (int32_t i = 0; i < n->n; i++)
        if (mentions(n->items[i], name, depth + 1)) return true;
    return mentions(n->other, name, depth + 1);
}

static err_code check_args(jrun *r, const jmacro *m, const jargs *a)
{
    const jnode *n = m->node;
    if (a->n > n->n && !mentions(n->kid[3], "varargs", 0))
        return jinja_error(r, "macro '%.60s' takes not more than %d argument(s)", n->str, n->n);
    for (int k = 0; k < a->n_kw; k++) {
        bool known = !strcmp(a->name[k], "caller");
        for (int32_t i = 0; i < n->n && !known; i++) known = !strcmp(n->items[i]->str, a->name[k]);
        if (!known && !mentions(n->kid[3], "kwargs", 0))
            return jinja_error(r, "macro '%.60s' takes no keyword argument '%.60s'", n->str,
                               a->name[k]);
    }
    return OK;
}

err_code jinja_call_macro(jrun *r, const jmacro *m, jargs *a, jinja_value *caller,
                          jinja_value **out)
{
    jframe *outer = r->frame;
    const int flow = r->flow;
    if (r->depth + 10 > JINJA_MAX_LEVELS)
        return err_set(r->e, E_LIMIT, "line %d: calls nested too deep", r->line);
    TRY(check_args(r, m, a));
    TRY(jinja_frame(r, &r->frame, m->frame));
    r->depth += 10; /* a call takes as much stack as a few levels of evaluation */
    r->flow = 0;
    err_code rc = bind_args(r, m, a, caller);
    if (rc == OK) rc = jinja_capture(r, m->node->kid[3], out);
    r->depth -= 10;
    r->flow = flow;
    r->frame = outer;
    return rc;
}

static err_code make_macro(jrun *r, const jnode *n, jinja_value **out)
{
    TRY(jv_new(&r->mem, out, JV_MACRO, r->e));
    TRY(jinja_get(&r->mem, (void **)&(*out)->macro, sizeof(jmacro), r->e));
    *(*out)->macro = (jmacro){.node = n, .frame = r->frame};
    return OK;
}

static err_code exec_call_block(jrun *r, const jnode *n)
{
    jinja_value *caller, *f, *text;
    jargs a;
    TRY(make_macro(r, n, &caller));
    TRY(jinja_eval(r, n->kid[0]->kid[0], &f));
    TRY(jinja_args_of(r, n->kid[0], 0, &a));
    r->line = n->line;
    if (f->type != JV_MACRO) return jinja_error(r, "only macros can be called with a block");
    TRY(jinja_call_macro(r, f->macro, &a, caller, &text));
    return jout_add(r, r->out, text->s);
}

/* ---- loops ---- */

static err_code filter_items(jrun *r, const jnode *n, jlist *l)
{
    jframe *outer = r->frame;
    jinja_value *kept, *ok;
    TRY(jv_list(r, &kept, JL_LIST));
    for (int64_t i = 0; i < l->n; i++) {
        TRY(jinja_frame(r, &r->frame, outer));
        err_code rc = jinja_assign(r, n->kid[0], l->v[i]);
        if (rc == OK) rc = jinja_eval(r, n->kid[2], &ok);
        r->frame = outer;
        TRY(rc);
        if (jv_truth(ok)) TRY(jv_list_add(&r->mem, kept, l->v[i], r->e));
    }
    *l = kept->l;
    return OK;
}

static err_code loop_body(jrun *r, const jnode *n, jinja_value *loop, jinja_value *item)
{
    jframe *outer = r->frame;
    TRY(jinja_frame(r, &r->frame, outer));
    err_code rc = jinja_assign(r, n->kid[0], item);
    if (rc == OK) rc = bind(r, r->frame, "loop", 4, loop);
    if (rc == OK) rc = jinja_exec_body(r, n->kid[3]);
    r->frame = outer;
    return rc;
}

static err_code run_loop(jrun *r, const jnode *n, jinja_value *over)
{
    jlist l;
    jinja_value *loop;
    jframe *outer = r->frame;
    TRY(jv_items(r, over, &l));
    if (n->kid[2]) TRY(filter_items(r, n, &l));
    if (!l.n && n->other) {
        TRY(jinja_frame(r, &r->frame, outer));
        const err_code rc = jinja_exec_body(r, n->other);
        r->frame = outer;
        return rc;
    }
    TRY(jv_new(&r->mem, &loop, JV_LOOP, r->e));
    TRY(jinja_get(&r->mem, (void **)&loop->loop, sizeof(jloop), r->e));
    *loop->loop = (jloop){l.v, l.n, 0, r->loop_depth, n->flag ? n : NULL, r->frame};
    for (int64_t i = 0; i < l.n; i++) {
        TRY(jinja_step(r, 1));
        loop->loop->at = i;
        TRY(loop_body(r, n, loop, l.v[i]));
        const int flow = r->flow;
        r->flow = 0;
        if (flow == 1) break;
    }
    return OK;
}

static err_code exec_for(jrun *r, const jnode *n)
{
    jinja_value *over;
    TRY(jinja_eval(r, n->kid[1], &over));
    r->line = n->line;
    const int depth = r->loop_depth;
    r->loop_depth = 0;
    const err_code rc = run_loop(r, n, over);
    r->loop_depth = depth;
    return rc;
}

err_code jinja_loop_again(jrun *r, jloop *l, jinja_value *items, jinja_value **out)
{
    jframe *outer = r->frame;
    jout o = {0}, *text = r->out;
    const int depth = r->loop_depth, flow = r->flow;
    if (!l->node) return jinja_error(r, "the loop must have the 'recursive' marker to be called");
    if (r->depth + 10 > JINJA_MAX_LEVELS)
        return err_set(r->e, E_LIMIT, "line %d: loops nested too deep", r->line);
    r->depth += 10;
    r->frame = l->frame;
    r->loop_depth = l->depth + 1;
    r->out = &o;
    r->flow = 0;
    const err_code rc = run_loop(r, l->node, items);
    r->depth -= 10;
    r->frame = outer;
    r->loop_depth = depth;
    r->out = text;
    r->flow = flow;
    return rc != OK ? rc : jv_str(r, out, jout_str(&o));
}

err_code jinja_loop_attr(jrun *r, const jloop *l, const char *name, jinja_value **out)
{
    const struct {
        const char *name;
        int64_t v;
    } numbers[] = {{"index", l->at + 1},       {"index0", l->at},
                   {"revindex", l->n - l->at}, {"revindex0", l->n - l->at - 1},
                   {"length", l->n},           {"depth", l->depth + 1},
                   {"depth0", l->depth}};
    *out = NULL;
    for (size_t i = 0; i < sizeof numbers / sizeof *numbers; i++)
        if (!strcmp(name, numbers[i].name)) return jv_int(r, out, numbers[i].v);
    if (!strcmp(name, "first")) *out = jv_bool(l->at == 0);
    if (!strcmp(name, "last")) *out = jv_bool(l->at + 1 == l->n);
    if (!strcmp(name, "previtem"))
        return l->at ? (*out = l->v[l->at - 1], OK) : jv_undef(r, out, "there is no previous item");
    if (!strcmp(name, "nextitem"))
        return l->at + 1 < l->n ? (*out = l->v[l->at + 1], OK)
                                : jv_undef(r, out, "there is no next item");
    return OK;
}

/* ---- statements ---- */

static err_code exec_if(jrun *r, const jnode *n)
{
    jinja_value *v;
    for (;;) {
        TRY(jinja_step(r, 1));
        TRY(jinja_eval(r, n->kid[0], &v));
        if (jv_truth(v)) return jinja_exec_body(r, n->kid[1]);
        n = n->kid[2];
        if (!n) return OK;
        if (n->kind != JN_IF) return jinja_exec_body(r, n);
    }
}

/* A chain of filters whose innermost takes `text`. */
static err_code apply_filters(jrun *r, const jnode *f, jinja_value *text, jinja_value **out)
{
    jargs a;
    *out = text;
    if (!f) return OK;
    TRY(apply_filters(r, f->kid[0], text, out));
    TRY(jinja_args_of(r, f, 0, &a));
    r->line = f->line;
    return jinja_filter(r, f->str, *out, &a, out);
}

static err_code exec_set_block(jrun *r, const jnode *n)
{
    jframe *outer = r->frame;
    jinja_value *v;
    TRY(jinja_frame(r, &r->frame, outer));
    err_code rc = jinja_capture(r, n->kid[1], &v);
    r->frame = outer;
    if (rc == OK) rc = apply_filters(r, n->kid[2], v, &v);
    return rc != OK ? rc : jinja_assign(r, n->kid[0], v);
}

static err_code exec_filter_block(jrun *r, const jnode *n)
{
    jframe *outer = r->frame;
    jinja_value *v;
    TRY(jinja_frame(r, &r->frame, outer));
    err_code rc = jinja_capture(r, n->kid[1], &v);
    r->frame = outer;
    if (rc == OK) rc = apply_filters(r, n->kid[0], v, &v);
    return rc != OK ? rc : jv_show(r, r->out, v);
}

static err_code exec_with(jrun *r, const jnode *n)
{
    jframe *outer = r->frame, *inner;
    jinja_value *v;
    TRY(jinja_frame(r, &inner, outer));
    for (int32_t i = 0; i < n->n; i++) {
        TRY(jinja_eval(r, n->items[i]->kid[1], &v));
        r->frame = inner;
        const err_code rc = jinja_assign(r, n->items[i]->kid[0], v);
        r->frame = outer;
        TRY(rc);
    }
    r->frame = inner;
    const err_code rc = jinja_exec_body(r, n->kid[0]);
    r->frame = outer;
    return rc;
}

static err_code exec_node(jrun *r, const jnode *n)
{
    jinja_value *v;
    switch (n->kind) {
    case JN_TEXT: return jout_add(r, r->out, (jstr){n->str, NULL, n->len});
    case JN_OUTPUT: TRY(jinja_eval(r, n->kid[0], &v)); return jv_show(r, r->out, v);
    case JN_IF: return exec_if(r, n);
    case JN_FOR: return exec_for(r, n);
    case JN_SET: TRY(jinja_eval(r, n->kid[1], &v)); return jinja_assign(r, n->kid[0], v);
    case JN_SETBLOCK: return exec_set_block(r, n);
    case JN_MACRO: TRY(make_macro(r, n, &v)); return bind(r, r->frame, n->str, n->len, v);
    case JN_CALLBLOCK: return exec_call_block(r, n);
    case JN_FILTERBLOCK: return exec_filter_block(r, n);
    case JN_WITH: return exec_with(r, n);
    case JN_DO: return jinja_eval(r, n->kid[0], &v);
    case JN_BREAK: r->flow = 1; return OK;
    case JN_CONTINUE: r->flow = 2; return OK;
    default: return jinja_exec_body(r, n);
    }
}

err_code jinja_exec(jrun *r, const jnode *n)
{
    TRY(jinja_step(r, 1));
    r->line = n->line;
    if (++r->depth > JINJA_MAX_LEVELS)
        return err_set(r->e, E_LIMIT, "line %d: nested too deep", n->line);
    const err_code rc = exec_node(r, n);
    r->depth--;
    return rc;
}

err_code jinja_exec_body(jrun *r, const jnode *n)
{
    for (int32_t i = 0; i < n->n && !r->flow; i++) TRY(jinja_exec(r, n->items[i]));
    return OK;
}

/* ---- the scope ---- */

err_code jinja_scope_open(jinja_scope **out, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "template", e));
    (*out)->mem.limit = JINJA_MAX_MEMORY;
    return OK;
}

void jinja_scope_close(jinja_scope **s)
{
    if (!*s) return;
    jinja_arena_free(&(*s)->mem);
    mem_free(*s);
    *s = NULL;
}

err_code jinja_string(jinja_scope *s, jinja_value **out, const char *p, size_t n, uint8_t mark,
                      err *e)
{
    char *copy;
    uint8_t *marks = NULL;
    if (!json_utf8_valid(p, n)) return err_set(e, E_INPUT, "a string is not UTF-8");
    TRY(jv_new(&s->mem, out, JV_STR, e));
    TRY(jinja_get(&s->mem, (void **)&copy, n + 1, e));
    if (n) memcpy(copy, p, n);
    if (mark != JINJA_OWN && n) {
        TRY(jinja_get(&s->mem, (void **)&marks, n, e));
        memset(marks, mark, n);
    }
    (*out)->s = (jstr){copy, marks, n};
    return OK;
}

err_code jinja_bool(jinja_scope *s, jinja_value **out, bool b, err *e)
{
    TRY(jv_new(&s->mem, out, JV_BOOL, e));
    (*out)->b = b;
    return OK;
}

err_code jinja_none(jinja_scope *s, jinja_value **out, err *e)
{
    return jv_new(&s->mem, out, JV_NONE, e);
}

err_code jinja_list(jinja_scope *s, jinja_value **out, err *e)
{
    return jv_new(&s->mem, out, JV_LIST, e);
}

err_code jinja_list_add(jinja_scope *s, jinja_value *list, jinja_value *v, err *e)
{
    return jv_list_add(&s->mem, list, v, e);
}

err_code jinja_map(jinja_scope *s, jinja_value **out, err *e)
{
    return jv_new(&s->mem, out, JV_MAP, e);
}

err_code jinja_map_set(jinja_scope *s, jinja_value *map, const char *key, jinja_value *v, err *e)
{
    jinja_value *k;
    TRY(jinja_string(s, &k, key, strlen(key), JINJA_DATA, e));
    return jmap_set(&s->mem, &map->m, k, v, e);
}

err_code jinja_set(jinja_scope *s, const char *name, jinja_value *v, err *e)
{
    jinja_value *k;
    TRY(jinja_string(s, &k, name, strlen(name), JINJA_OWN, e));
    return jmap_set(&s->mem, &s->vars, k, v, e);
}

void jinja_now(jinja_scope *s, int64_t seconds)
{
    s->has_now = true;
    s->now = seconds;
}

/* ---- rendering ---- */

static err_code copy_out(jinja_text *out, const jout *o, err *e)
{
    TRY(mem_alloc((void **)&out->text, o->n + 1, 1, "template", e));
    const err_code rc = mem_alloc((void **)&out->mark, o->n + 1, 1, "template", e);
    if (rc != OK) {
        jinja_text_free(out);
        return rc;
    }
    if (o->n) {
        memcpy(out->text, o->p, o->n);
        memcpy(out->mark, o->mark, o->n);
    }
    out->n = o->n;
    return OK;
}

err_code jinja_render(const jinja *t, jinja_scope *s, jinja_text *out, err *e)
{
    jout o = {0};
    jrun r = {.mem = {.limit = JINJA_MAX_MEMORY}, .scope = s, .out = &o, .line = 1, .e = e};
    *out = (jinja_text){0};
    err_code rc = jinja_frame(&r, &r.frame, NULL);
    if (rc == OK) rc = jinja_exec_body(&r, t->root);
    if (rc == OK) rc = copy_out(out, &o, e);
    jinja_arena_free(&r.mem);
    return rc;
}

void jinja_text_free(jinja_text *t)
{
    mem_free(t->text);
    mem_free(t->mark);
    *t = (jinja_text){0};
}
