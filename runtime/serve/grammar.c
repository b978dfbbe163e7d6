/* Grammars as handles, and the set that keeps those asked for lately. */
#include "runtime/serve/grammar.h"

#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_run.h"

/* ---- one grammar ---- */

void grammar_close(grammar **out)
{
    grammar *g = *out;
    *out = NULL;
    if (!g || atomic_fetch_sub(&g->refs, 1) != 1) return;
    grammar_run_close(&g->run);
    pthread_mutex_destroy(&g->lock);
    grammar_net_free(&g->net);
    grammar_vocab_drop(g->v);
    mem_free(g);
}

/* The first mask, too: what is too much work shows before an answer begins. */
static err_code try_start(grammar *g, err *e)
{
    grammar_hold h;
    int32_t n;
    grammar_hold_add(g->run, &h, GRAMMAR_START);
    const bool ok = grammar_run_mask(g->run, &h, &n) != NULL;
    grammar_hold_drop(&h);
    return ok ? OK : err_set(e, E_LIMIT, "the grammar has too many ways to begin");
}

err_code grammar_make(grammar **out, grammar_build *b, grammar_vocab *v, err *e)
{
    grammar *g;
    *out = NULL;
    TRY(b->rc);
    TRY(mem_alloc((void **)&g, 1, sizeof *g, "grammar", e));
    atomic_init(&g->refs, 1);
    atomic_fetch_add(&v->refs, 1);
    g->v = v;
    pthread_mutex_init(&g->lock, NULL);
    err_code rc = grammar_net_make(&g->net, b, v, e);
    if (rc == OK) rc = grammar_run_open(&g->run, g, e);
    if (rc == OK) rc = try_start(g, e);
    if (rc != OK) grammar_close(&g);
    *out = g;
    return rc;
}

/* ---- compiling ---- */

static err_code add_schema(grammar_json *j, const grammar_source *s, err *e)
{
    const grammar_rule top = j->b->rule[0];
    cJSON *o;
    TRY(json_parse(&o, s->text, s->n, "schema", e));
    const err_code rc = grammar_schema_add(j, top.start, o, o, top.end, e);
    cJSON_Delete(o);
    return rc;
}

static err_code add_source(grammar_json *j, const grammar_source *s, err *e)
{
    const grammar_rule top = j->b->rule[0];
    switch (s->kind) {
    case GRAMMAR_REGEX: return grammar_regex_add(j->b, top.start, s->text, REGEX_BYTES, top.end, e);
    case GRAMMAR_SCHEMA: return add_schema(j, s, e);
    case GRAMMAR_OBJECT:
        grammar_call(j->b, top.start, grammar_json_rule(j, JSON_RULE_OBJECT), top.end);
        return OK;
    case GRAMMAR_TOOLS: return grammar_tools_add(j, s, e);
    }
    return OK;
}

err_code grammar_compile(grammar **out, grammar_vocab *v, const grammar_source *s, err *e)
{
    grammar_build b = {.t = v->t, .e = e};
    grammar_json j;
    *out = NULL;
    grammar_json_init(&j, &b);
    (void)grammar_rule_new(&b);
    err_code rc = b.rc;
    if (rc == OK) rc = add_source(&j, s, e);
    if (rc == OK) rc = grammar_make(out, &b, v, e);
    grammar_build_free(&b);
    return rc;
}

static err_code compile_alone(grammar **out, const tokenizer *t, const grammar_source *s, err *e)
{
    grammar_vocab *v;
    *out = NULL;
    TRY(grammar_vocab_open(&v, t, e));
    const err_code rc = grammar_compile(out, v, s, e);
    grammar_vocab_drop(v);
    return rc;
}

err_code grammar_json_schema(grammar **out, const tokenizer *t, const char *schema, size_t n,
                             err *e)
{
    return compile_alone(out, t, &(grammar_source){.kind = GRAMMAR_SCHEMA, .text = schema, .n = n},
                         e);
}

err_code grammar_json_object(grammar **out, const tokenizer *t, err *e)
{
    return compile_alone(out, t, &(grammar_source){.kind = GRAMMAR_OBJECT, .text = ""}, e);
}

err_code grammar_tool_calls(grammar **out, const tokenizer *t, chat_tools format, const char *tools,
                            size_t n, const char *only, bool parallel, err *e)
{
    return compile_alone(out, t, &(grammar_source){GRAMMAR_TOOLS, tools, n, format, only, parallel},
                         e);
}

/* ---- the set ---- */

typedef struct {
    grammar *g;
    grammar_source s; /* text and only are its own */
    uint64_t used;
} kept;

struct grammar_set {
    grammar_vocab *v;
    pthread_mutex_t lock;
    kept k[GRAMMAR_KEPT];
    int n;
    size_t bytes;
    uint64_t clock;
};

err_code grammar_set_open(grammar_set **out, const tokenizer *t, err *e)
{
    grammar_set *s;
    *out = NULL;
    TRY(mem_alloc((void **)&s, 1, sizeof *s, "grammars", e));
    const err_code rc = grammar_vocab_open(&s->v, t, e);
    if (rc != OK) {
        mem_free(s);
        return rc;
    }
    pthread_mutex_init(&s->lock, NULL);
    *out = s;
    return OK;
}

static void drop_kept(grammar_set *s, int i)
{
    s->bytes -= s->k[i].s.n;
    grammar_close(&s->k[i].g);
    mem_free((void *)(uintptr_t)s->k[i].s.text);
    mem_free((void *)(uintptr_t)s->k[i].s.only);
    s->k[i] = s->k[--s->n];
}

void grammar_set_close(grammar_set **out)
{
    grammar_set *s = *out;
    *out = NULL;
    if (!s) return;
    while (s->n) drop_kept(s, s->n - 1);
    pthread_mutex_destroy(&s->lock);
    grammar_vocab_drop(s->v);
    mem_free(s);
}

static bool same_source(const grammar_source *a, const grammar_source *b)
{
    return a->kind == b->kind && a->n == b->n && a->format == b->format &&
           a->parallel == b->parallel && !a->only == !b->only &&
           (!a->only || !strcmp(a->only, b->only)) && !memcmp(a->text, b->text, a->n);
}

static grammar *find_kept(grammar_set *s, const grammar_source *src)
{
    for (int i = 0; i < s->n; i++) {
        if (!same_source(&s->k[i].s, src)) continue;
        s->k[i].used = ++s->clock;
        atomic_fetch_add(&s->k[i].g->refs, 1);
        return s->k[i].g;
    }
    return NULL;
}

/* Keeps a grammar; one that there is no memory for is not kept, which costs only time. */
static void keep(grammar_set *s, grammar *g, const grammar_source *src)
{
    char *text = NULL, *only = NULL;
    err e;
    if (src->n > GRAMMAR_KEPT_BYTES / 4) return;
    if (mem_alloc((void **)&text, src->n + 1, 1, "grammar", &e) != OK) return;
    if (src->only && mem_strdup(&only, src->only, &e) != OK) {
        mem_free(text);
        return;
    }
    memcpy(text, src->text, src->n);
    while (s->n == GRAMMAR_KEPT || (s->n && s->bytes + src->n > GRAMMAR_KEPT_BYTES)) {
        int oldest = 0;
        for (int i = 1; i < s->n; i++)
            if (s->k[i].used < s->k[oldest].used) oldest = i;
        drop_kept(s, oldest);
    }
    kept *k = &s->k[s->n++];
    *k = (kept){g, *src, ++s->clock};
    k->s.text = text;
    k->s.only = only;
    s->bytes += src->n;
    atomic_fetch_add(&g->refs, 1);
}

/* Compiled without the lock: two who ask for the same at once may both compile it. */
static err_code set_get(grammar_set *s, grammar **out, const grammar_source *src, err *e)
{
    pthread_mutex_lock(&s->lock);
    *out = find_kept(s, src);
    pthread_mutex_unlock(&s->lock);
    if (*out) return OK;
    TRY(grammar_compile(out, s->v, src, e));
    pthread_mutex_lock(&s->lock);
    keep(s, *out, src);
    pthread_mutex_unlock(&s->lock);
    return OK;
}

err_code grammar_set_regex(grammar_set *s, grammar **out, const char *pattern, err *e)
{
    return set_get(
        s, out, &(grammar_source){.kind = GRAMMAR_REGEX, .text = pattern, .n = strlen(pattern)}, e);
}

err_code grammar_set_json_schema(grammar_set *s, grammar **out, const char *schema, size_t n,
                                 err *e)
{
    return set_get(s, out, &(grammar_source){.kind = GRAMMAR_SCHEMA, .text = schema, .n = n}, e);
}

err_code grammar_set_json_object(grammar_set *s, grammar **out, err *e)
{
    return set_get(s, out, &(grammar_source){.kind = GRAMMAR_OBJECT, .text = ""}, e);
}

err_code grammar_set_tool_calls(grammar_set *s, grammar **out, chat_tools format, const char *tools,
                                size_t n, const char *only, bool parallel, err *e)
{
    return set_get(s, out, &(grammar_source){GRAMMAR_TOOLS, tools, n, format, only, parallel}, e);
}
