/* One sequence, token by token. */
#include "runtime/generate.h"

#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "runtime/text_stream.h"

struct generator {
    model *m;
    const tokenizer *t;
    sampler *sampler;
    float *logits;     /* [vocab] */
    text_stream *text; /* NULL without t */
};

const char *gen_end_name(gen_end end)
{
    static const char *const names[] = {"stop",    "stop_text", "length",
                                        "session", "caller",    "canceled"};
    return names[end];
}

err_code gen_open(generator **out, model *m, const tokenizer *t, err *e)
{
    const int32_t vocab = model_desc_of(m)->vocab;
    void *p;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(generator), "generator", e));
    generator *g = p;
    g->m = m;
    g->t = t;
    if ((rc = sampler_open(&g->sampler, vocab, model_session_len(m) + 1, e)) != OK) goto done;
    if ((rc = mem_alloc(&p, (size_t)vocab, sizeof(float), "logits", e)) != OK) goto done;
    g->logits = p;
    if (t && (rc = text_stream_open(&g->text, t, GEN_MAX_STOP_TEXTS,
                                    (size_t)GEN_MAX_STOP_TEXTS * GEN_MAX_STOP_BYTES, 0, e)) != OK)
        goto done;
    *out = g;
    g = NULL;
done:
    gen_close(&g);
    return rc;
}

void gen_close(generator **g)
{
    if (!g || !*g) return;
    sampler_close(&(*g)->sampler);
    mem_free((*g)->logits);
    text_stream_close(&(*g)->text);
    mem_free(*g);
    *g = NULL;
}

/* ---- the loop ---- */

static bool is_stop(const gen_opts *o, int32_t id)
{
    for (int i = 0; i < o->n_stop_ids; i++) {
        if (o->stop_ids[i] == id) return true;
    }
    return false;
}

typedef struct {
    gen_fn fn;
    void *ud;
} sink;

/* Hands out id with the text that is ready. */
static bool emit(generator *g, const sink *s, int32_t id)
{
    size_t n = 0;
    const char *text = g->text ? text_stream_ready(g->text, &n) : "";
    const bool go = !s->fn || s->fn(s->ud, id, text, n);
    if (g->text) text_stream_taken(g->text);
    return go;
}

/* Hands out id and its text. True when the answer goes on; else r->end says why not. */
static err_code take(generator *g, const gen_opts *o, const sink *s, int32_t id, gen_result *r,
                     bool *go, err *e)
{
    int stop = -1;
    r->n_new++;
    sampler_accept(g->sampler, id);
    *go = false;
    if (is_stop(o, id)) {
        r->end = GEN_STOP_ID;
        (void)(s->fn && s->fn(s->ud, id, "", 0));
        return OK;
    }
    if (g->text) TRY(text_stream_add(g->text, id, &stop, e));
    r->end = stop >= 0 ? GEN_STOP_TEXT : GEN_CALLER;
    if (!emit(g, s, id) || stop >= 0) return OK;
    r->end = GEN_LENGTH;
    *go = r->n_new < o->max_new || o->max_new == 0;
    return OK;
}

static err_code check_opts(const generator *g, const gen_opts *o, err *e)
{
    const int32_t held = model_seq_len(g->m, o->slot), room = model_session_len(g->m);
    if (o->n_ids <= held)
        return err_set(e, E_USAGE, "generate: %d ids, the slot already holds %d", o->n_ids, held);
    if (o->n_ids > room)
        return err_set(e, E_LIMIT, "prompt of %d tokens does not fit the session of %d", o->n_ids,
                       room);
    for (int32_t i = 0; i < o->n_ids; i++) {
        if (o->ids[i] < 0 || o->ids[i] >= model_desc_of(g->m)->vocab)
            return err_set(e, E_INPUT, "prompt: token %d: expected an id from 0 to %d, got %d", i,
                           model_desc_of(g->m)->vocab - 1, o->ids[i]);
    }
    if (o->max_new < 0)
        return err_set(e, E_USAGE, "new tokens: expected 0 or more, got %d", o->max_new);
    if (o->n_stop_texts > GEN_MAX_STOP_TEXTS || (o->n_stop_texts && !g->t))
        return err_set(e, E_USAGE, "stop texts: expected at most %d, got %d",
                       g->t ? GEN_MAX_STOP_TEXTS : 0, o->n_stop_texts);
    for (int i = 0; i < o->n_stop_texts; i++) {
        const size_t n = strlen(o->stop_texts[i]);
        if (n == 0 || n > GEN_MAX_STOP_BYTES)
            return err_set(e, E_USAGE, "stop text %d: expected 1 to %d bytes, got %zu", i,
                           GEN_MAX_STOP_BYTES, n);
    }
    return OK;
}

/* Runs ids [n] and draws the next id. E_CANCELED and a full session end the answer without failing.
 */
static err_code advance(generator *g, const gen_opts *o, const int32_t *ids, int32_t n,
                        int32_t *next, gen_result *r, bool *go, const job *j, err *e)
{
    const bool there = model_samples(g->m, &o->sample);
    const step_seq s = {.slot = o->slot,
                        .tokens = ids,
                        .n_tokens = n,
                        .n_out = 1,
                        .logits = there ? NULL : g->logits,
                        .picked = there ? next : NULL,
                        .sampler = there ? g->sampler : NULL,
                        .more = o->max_new == 0 || r->n_new + 1 < o->max_new};
    err step_err;
    const err_code rc = model_step(g->m, &s, 1, j, &step_err);
    *go = rc == OK;
    if (rc == E_CANCELED) r->end = GEN_CANCELED;
    if (rc == E_LIMIT && r->n_new > 0) r->end = GEN_SESSION;
    if (rc != OK && rc != E_CANCELED && !(rc == E_LIMIT && r->n_new > 0)) {
        *e = step_err;
        return rc;
    }
    if (!*go) return OK;
    if (!there) *next = sampler_next(g->sampler, g->logits);
    if (*next < 0)
        return err_set(e, E_DEVICE, "generate: no finite logit behind %d tokens",
                       model_seq_len(g->m, o->slot));
    return OK;
}

static void flush_text(generator *g, const sink *s)
{
    size_t n = 0;
    if (!g->text) return;
    text_stream_flush(g->text);
    (void)text_stream_ready(g->text, &n);
    if (n) (void)emit(g, s, -1);
}

err_code gen_run(generator *g, const gen_opts *o, gen_result *r, gen_fn fn, void *ud, const job *j,
                 err *e)
{
    const sink s = {fn, ud};
    int32_t id = -1;
    bool go = true;
    memset(r, 0, sizeof *r);
    TRY(check_opts(g, o, e));
    TRY(sampler_start(g->sampler, &o->sample, e));
    sampler_prompt(g->sampler, o->ids, o->n_ids);
    if (g->text) TRY(text_stream_start(g->text, o->stop_texts, o->n_stop_texts, true, e));
    const int32_t held = model_seq_len(g->m, o->slot);
    const double begin = clock_s();
    TRY(advance(g, o, o->ids + held, o->n_ids - held, &id, r, &go, j, e));
    r->n_prompt = o->n_ids - held;
    const double first = clock_s();
    r->prompt_s = first - begin;
    while (go) {
        TRY(take(g, o, &s, id, r, &go, e));
        if (go) TRY(advance(g, o, &id, 1, &id, r, &go, j, e));
    }
    r->new_s = clock_s() - first;
    if (r->end != GEN_STOP_TEXT) flush_text(g, &s);
    return OK;
}
