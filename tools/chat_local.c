/* Answers from a model in this process. The ids of the conversation only grow by
 * chat_encode_next, so that the cache is kept from turn to turn; whatever rewrites the past (system
 * text, loading, dropped turns) encodes all of it anew and keeps the common head of the cache. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "tools/chat_session.h"

typedef struct {
    chat_backend b;
    run_ctx *r;    /* borrowed */
    const chat *c; /* borrowed */
    generator *g;
    token_list ids; /* the conversation; slot 0 holds a prefix of it */
    int32_t last;   /* last generated id, -1 when the answer was cut */
    int32_t stops[RUN_MAX_STOPS];
    int n_stops;
} chat_local;

static void turns_unplaced(chat_session *s)
{
    for (int i = 0; i < s->n_turns; i++) {
        s->turns[i].ids_before = 0;
        s->turns[i].last_before = s->turns[i].dropped = -1;
    }
}

/* Forgets ids and cache; the turns stay and are encoded by the next question. */
static void rewritten(chat_backend *b, chat_session *s)
{
    chat_local *l = (chat_local *)b;
    l->ids.n = 0;
    l->last = -1;
    model_seq_end(l->r->m, 0);
    turns_unplaced(s);
}

/* Ids go back to what they were before the last turn; the cache follows. A conversation that was
 * encoded as a whole has no earlier state within: it is encoded again by the next question. */
static void turn_gone(chat_backend *b, const chat_turn *t)
{
    chat_local *l = (chat_local *)b;
    l->ids.n = t->ids_before;
    if (t->dropped >= 0) l->ids.ids[l->ids.n - 1] = t->dropped;
    l->last = t->last_before;
    model_truncate(l->r->m, 0, (int32_t)(t->dropped >= 0 ? l->ids.n - 1 : l->ids.n));
}

/* ---- ids ---- */

/* All turns anew. Earlier turns lose their own places in the ids: undoing them encodes again. */
static err_code encode_all(chat_local *l, chat_session *s, err *e)
{
    token_list fresh = {0};
    int64_t same = 0;
    void *m;
    TRY(mem_alloc(&m, 2 * (size_t)s->n_turns + 1, sizeof(chat_message), "messages", e));
    const int64_t n = chat_session_messages(s, m);
    const err_code rc = chat_encode(l->c, m, n, s->system ? NULL : s->meta, true, &fresh, e);
    mem_free(m);
    if (rc != OK) {
        token_list_free(&fresh);
        return rc;
    }
    while (same < l->ids.n && same < fresh.n && l->ids.ids[same] == fresh.ids[same]) same++;
    if (same == fresh.n) same--; /* at least one has to run */
    model_truncate(l->r->m, 0, (int32_t)same);
    token_list_free(&l->ids);
    l->ids = fresh;
    turns_unplaced(s);
    return OK;
}

/* The last turn behind what is there. */
static err_code encode_next(chat_local *l, chat_session *s, err *e)
{
    chat_turn *t = &s->turns[s->n_turns - 1];
    const chat_message m = {.role = "user", .content = t->user};
    token_list more = {0};
    int drop = 0;
    err_code rc = chat_encode_next(l->c, &m, 1, l->last, &more, &drop, e);
    if (rc == OK && drop) {
        t->dropped = l->ids.ids[l->ids.n - 1];
        l->ids.n--;
        model_truncate(l->r->m, 0, (int32_t)l->ids.n);
    }
    for (int64_t i = 0; rc == OK && i < more.n; i++) rc = token_list_push(&l->ids, more.ids[i], e);
    token_list_free(&more);
    return rc;
}

/* Room for an answer: some tokens behind the question. */
static bool fits(const chat_local *l, const chat_session *s)
{
    const int32_t wish = s->room / 4;
    const int64_t answer = s->max_new && s->max_new < wish ? s->max_new : wish;
    return l->ids.n + (s->drop_oldest ? answer : 1) <= s->room;
}

/* Ids of the conversation with the new turn, shortened to what the session holds. */
static err_code encode_turn(chat_local *l, chat_session *s, int *dropped_turns, err *e)
{
    chat_turn *t = &s->turns[s->n_turns - 1];
    t->ids_before = l->ids.n;
    t->last_before = l->last;
    err_code rc = l->ids.n == 0 ? encode_all(l, s, e) : encode_next(l, s, e);
    if (rc == E_UNSUPPORTED) rc = encode_all(l, s, e); /* it looks further back */
    TRY(rc);
    while (!fits(l, s) && s->drop_oldest && s->n_turns > 1) {
        chat_session_drop_first(s);
        ++*dropped_turns;
        TRY(encode_all(l, s, e));
    }
    if (l->ids.n < s->room) return OK;
    return err_set(e, E_LIMIT, "the session is full: %lld tokens with this question, it holds %d",
                   (long long)l->ids.n, s->room);
}

/* ---- asking ---- */

static err_code keep_ids(chat_local *l, const chat_relay *a, const gen_result *r, err *e)
{
    const token_list *ids = &a->answer.ids;
    for (int64_t i = 0; i < ids->n; i++) TRY(token_list_push(&l->ids, ids->ids[i], e));
    l->last = r->end == GEN_STOP_ID ? ids->ids[ids->n - 1] : -1;
    return OK;
}

static err_code answer(chat_backend *b, chat_session *s, chat_relay *a, gen_result *r,
                       int *dropped_turns, const job *j, err *e)
{
    chat_local *l = (chat_local *)b;
    TRY(encode_turn(l, s, dropped_turns, e));
    gen_opts o = {.ids = l->ids.ids,
                  .n_ids = (int32_t)l->ids.n,
                  .max_new = (int32_t)s->max_new,
                  .stop_ids = l->stops,
                  .n_stop_ids = l->n_stops,
                  .stop_texts = s->stop_texts.v,
                  .n_stop_texts = s->stop_texts.n,
                  .sample = s->sample};
    o.sample.seed += s->answers++;
    TRY(gen_run(l->g, &o, r, chat_relay_token, a, j, e));
    if (r->n_new && !a->answer.failed.code) TRY(keep_ids(l, a, r, e));
    s->context = l->ids.n;
    return OK;
}

/* ---- open, show, close ---- */

static void show(const chat_backend *b, char *buf, size_t cap)
{
    const chat_local *l = (const chat_local *)b;
    const model_desc *m = model_desc_of(l->r->m);
    const model_plan *p = model_plan_of(l->r->m);
    (void)snprintf(buf, cap,
                   "%s: %s, %d layers, hidden %d, vocabulary %d\n"
                   "%s; %s weights; %d-bit cache of %d tokens; chat template '%s'",
                   weights_path(l->r->src), m->architecture, m->layers, m->hidden, m->vocab,
                   dev_name(l->r->d), m->w4_group ? "4-bit" : "16-bit",
                   p->kv == KV_16 ? 16 : (int)p->kv, p->session_len, chat_name(l->c));
}

static void close_local(chat_backend *b)
{
    chat_local *l = (chat_local *)b;
    gen_close(&l->g);
    token_list_free(&l->ids);
    mem_free(l);
}

err_code chat_local_open(chat_session *s, run_ctx *r, const chat *c, const char *meta, err *e)
{
    void *p;
    memset(s, 0, sizeof *s);
    TRY(mem_alloc(&p, 1, sizeof(chat_local), "conversation", e));
    chat_local *l = p;
    l->b = (chat_backend){answer, turn_gone, rewritten, show, close_local};
    l->r = r;
    l->c = c;
    l->last = -1;
    l->n_stops = run_stop_ids(l->stops, r, c);
    s->b = &l->b;
    s->meta = meta;
    s->vocab = model_desc_of(r->m)->vocab;
    s->room = model_session_len(r->m);
    return gen_open(&l->g, r->m, r->t, e);
}
