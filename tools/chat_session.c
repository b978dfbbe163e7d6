/* Turns and ids. The ids of the conversation only grow by chat_encode_next, so that the cache is
 * kept from turn to turn; whatever rewrites the past (system text, loading, dropped turns) encodes
 * all of it anew and keeps the common head of the cache. */
#include "tools/chat_session.h"

#include <string.h>

#include "base/file.h"
#include "base/mem.h"

#define CHAT_MAX_FILE ((size_t)64 << 20)

err_code chat_session_open(chat_session *s, run_ctx *r, const chat *c, const char *meta, err *e)
{
    memset(s, 0, sizeof *s);
    s->r = r;
    s->c = c;
    s->meta = meta;
    s->last = -1;
    s->n_stops = run_stop_ids(s->stops, r, c);
    return gen_open(&s->g, r->m, r->t, e);
}

static void turn_free(chat_turn *t)
{
    mem_free(t->user);
    mem_free(t->answer);
    memset(t, 0, sizeof *t);
}

static void turns_free(chat_turn *turns, int n)
{
    for (int i = 0; i < n; i++) turn_free(&turns[i]);
    mem_free(turns);
}

void chat_session_close(chat_session *s)
{
    turns_free(s->turns, s->n_turns);
    gen_close(&s->g);
    token_list_free(&s->ids);
    mem_free(s->system);
    memset(s, 0, sizeof *s);
}

/* ---- turns ---- */

static err_code turn_push(chat_session *s, const char *user, err *e)
{
    if (s->n_turns == s->cap) {
        void *p;
        const int cap = s->cap ? 2 * s->cap : 16;
        TRY(mem_alloc(&p, (size_t)cap, sizeof(chat_turn), "turns", e));
        if (s->n_turns) memcpy(p, s->turns, (size_t)s->n_turns * sizeof(chat_turn));
        mem_free(s->turns);
        s->turns = p;
        s->cap = cap;
    }
    chat_turn *t = &s->turns[s->n_turns];
    *t = (chat_turn){.ids_before = s->ids.n, .last_before = s->last, .dropped = -1};
    TRY(mem_strdup(&t->user, user, e));
    s->n_turns++;
    return OK;
}

/* Ids go back to what they were before the last turn; the cache follows. A conversation that was
 * encoded as a whole has no earlier state within: it is encoded again by the next question. */
static void turn_pop(chat_session *s)
{
    chat_turn *t = &s->turns[--s->n_turns];
    s->ids.n = t->ids_before;
    if (t->dropped >= 0) s->ids.ids[s->ids.n - 1] = t->dropped;
    s->last = t->last_before;
    model_truncate(s->r->m, 0, (int32_t)(t->dropped >= 0 ? s->ids.n - 1 : s->ids.n));
    turn_free(t);
}

bool chat_session_undo(chat_session *s, char **user)
{
    if (s->n_turns == 0) return false;
    if (user) {
        *user = s->turns[s->n_turns - 1].user;
        s->turns[s->n_turns - 1].user = NULL;
    }
    turn_pop(s);
    return true;
}

/* Forgets ids and cache; the turns stay and are encoded by the next question. */
static void forget_ids(chat_session *s)
{
    s->ids.n = 0;
    s->last = -1;
    model_seq_end(s->r->m, 0);
    for (int i = 0; i < s->n_turns; i++) {
        s->turns[i].ids_before = 0;
        s->turns[i].last_before = s->turns[i].dropped = -1;
    }
}

void chat_session_clear(chat_session *s)
{
    for (int i = 0; i < s->n_turns; i++) turn_free(&s->turns[i]);
    s->n_turns = 0;
    forget_ids(s);
}

err_code chat_session_system(chat_session *s, const char *text, err *e)
{
    char *copy = NULL;
    if (text) TRY(mem_strdup(&copy, text, e));
    mem_free(s->system);
    s->system = copy;
    forget_ids(s);
    return OK;
}

/* ---- ids ---- */

/* The conversation as messages; m has room for 2 * n_turns + 1. */
static int64_t messages_of(const chat_session *s, chat_message *m)
{
    int64_t n = 0;
    if (s->system) m[n++] = (chat_message){"system", s->system};
    for (int i = 0; i < s->n_turns; i++) {
        m[n++] = (chat_message){"user", s->turns[i].user};
        if (s->turns[i].answer) m[n++] = (chat_message){"assistant", s->turns[i].answer};
    }
    return n;
}

/* All turns anew. Earlier turns lose their own places in the ids: undoing them encodes again. */
static err_code encode_all(chat_session *s, err *e)
{
    token_list fresh = {0};
    int64_t same = 0;
    void *m;
    TRY(mem_alloc(&m, 2 * (size_t)s->n_turns + 1, sizeof(chat_message), "messages", e));
    const int64_t n = messages_of(s, m);
    const err_code rc = chat_encode(s->c, m, n, s->system ? NULL : s->meta, true, &fresh, e);
    mem_free(m);
    if (rc != OK) {
        token_list_free(&fresh);
        return rc;
    }
    while (same < s->ids.n && same < fresh.n && s->ids.ids[same] == fresh.ids[same]) same++;
    if (same == fresh.n) same--; /* at least one has to run */
    model_truncate(s->r->m, 0, (int32_t)same);
    token_list_free(&s->ids);
    s->ids = fresh;
    for (int i = 0; i < s->n_turns; i++) {
        s->turns[i].ids_before = 0;
        s->turns[i].last_before = s->turns[i].dropped = -1;
    }
    return OK;
}

/* The last turn behind what is there. */
static err_code encode_next(chat_session *s, err *e)
{
    chat_turn *t = &s->turns[s->n_turns - 1];
    const chat_message m = {"user", t->user};
    token_list more = {0};
    int drop = 0;
    err_code rc = chat_encode_next(s->c, &m, 1, s->last, &more, &drop, e);
    if (rc == OK && drop) {
        t->dropped = s->ids.ids[s->ids.n - 1];
        s->ids.n--;
        model_truncate(s->r->m, 0, (int32_t)s->ids.n);
    }
    for (int64_t i = 0; rc == OK && i < more.n; i++) rc = token_list_push(&s->ids, more.ids[i], e);
    token_list_free(&more);
    return rc;
}

/* Room for an answer: some tokens behind the question. */
static bool fits(const chat_session *s)
{
    const int32_t room = model_session_len(s->r->m), wish = room / 4;
    const int64_t answer = s->max_new && s->max_new < wish ? s->max_new : wish;
    return s->ids.n + (s->drop_oldest ? answer : 1) <= room;
}

static void drop_first(chat_session *s)
{
    turn_free(&s->turns[0]);
    memmove(s->turns, s->turns + 1, (size_t)(s->n_turns - 1) * sizeof(chat_turn));
    s->n_turns--;
}

/* Ids of the conversation with the new turn, shortened to what the session holds. */
static err_code encode_turn(chat_session *s, int *dropped_turns, err *e)
{
    TRY(s->ids.n == 0 ? encode_all(s, e) : encode_next(s, e));
    while (!fits(s) && s->drop_oldest && s->n_turns > 1) {
        drop_first(s);
        ++*dropped_turns;
        TRY(encode_all(s, e));
    }
    if (s->ids.n < model_session_len(s->r->m)) return OK;
    return err_set(e, E_LIMIT, "the session is full: %lld tokens with this question, it holds %d",
                   (long long)s->ids.n, model_session_len(s->r->m));
}

/* ---- asking ---- */

typedef struct {
    run_answer answer;
    gen_fn fn;
    void *ud;
} relay;

static bool on_token(void *ud, int32_t id, const char *text, size_t n)
{
    relay *r = ud;
    return run_answer_add(&r->answer, id, text, n) && (!r->fn || r->fn(r->ud, id, text, n));
}

static err_code keep_answer(chat_session *s, relay *a, const gen_result *r, err *e)
{
    chat_turn *t = &s->turns[s->n_turns - 1];
    for (int64_t i = 0; i < a->answer.ids.n; i++)
        TRY(token_list_push(&s->ids, a->answer.ids.ids[i], e));
    TRY(mem_strdup(&t->answer, a->answer.text ? a->answer.text : "", e));
    t->cut = r->end != GEN_STOP_ID && r->end != GEN_STOP_TEXT;
    s->last = r->end == GEN_STOP_ID ? a->answer.ids.ids[a->answer.ids.n - 1] : -1;
    return OK;
}

static err_code generate(chat_session *s, relay *a, gen_result *r, const job *j, err *e)
{
    gen_opts o = {.ids = s->ids.ids,
                  .n_ids = (int32_t)s->ids.n,
                  .max_new = (int32_t)s->max_new,
                  .stop_ids = s->stops,
                  .n_stop_ids = s->n_stops,
                  .stop_texts = s->stop_texts.v,
                  .n_stop_texts = s->stop_texts.n,
                  .sample = s->sample};
    o.sample.seed += s->answers++;
    TRY(gen_run(s->g, &o, r, on_token, a, j, e));
    if (a->answer.failed.code) {
        *e = a->answer.failed;
        return e->code;
    }
    return r->n_new ? keep_answer(s, a, r, e) : OK;
}

err_code chat_session_ask(chat_session *s, const char *user, gen_fn fn, void *ud, gen_result *r,
                          int *dropped_turns, const job *j, err *e)
{
    relay a = {.fn = fn, .ud = ud};
    memset(r, 0, sizeof *r);
    *dropped_turns = 0;
    TRY(turn_push(s, user, e));
    err_code rc = encode_turn(s, dropped_turns, e);
    if (rc == OK) rc = generate(s, &a, r, j, e);
    if (rc != OK || r->n_new == 0) turn_pop(s);
    run_answer_free(&a.answer);
    return rc;
}

/* ---- files ---- */

static err_code write_message(file_writer *w, const char *role, const char *content, err *e)
{
    cJSON *o = cJSON_CreateObject();
    char *text = NULL;
    err_code rc = OK;
    if (!o || !cJSON_AddStringToObject(o, "role", role) ||
        !cJSON_AddStringToObject(o, "content", content))
        rc = err_set(e, E_NOMEM, "save: out of memory");
    if (rc == OK) rc = json_print(&text, o, false, e);
    if (rc == OK) rc = file_writer_write(w, text, strlen(text), e);
    if (rc == OK) rc = file_writer_write(w, "\n", 1, e);
    mem_free(text);
    cJSON_Delete(o);
    return rc;
}

err_code chat_session_save(const chat_session *s, const char *path, err *e)
{
    file_writer *w = NULL;
    const char *system = s->system ? s->system : s->meta;
    TRY(file_writer_open(&w, path, true, e));
    err_code rc = system ? write_message(w, "system", system, e) : OK;
    for (int i = 0; rc == OK && i < s->n_turns; i++) {
        rc = write_message(w, "user", s->turns[i].user, e);
        if (rc == OK && s->turns[i].answer)
            rc = write_message(w, "assistant", s->turns[i].answer, e);
    }
    if (rc == OK) rc = file_writer_commit(&w, e);
    file_writer_abort(&w);
    return rc;
}

/* Adds a message to a conversation being read: system first, then user and assistant in turn. */
static err_code load_message(chat_session *s, const char *role, const char *content, err *e)
{
    chat_turn *last = s->n_turns ? &s->turns[s->n_turns - 1] : NULL;
    const bool open = last && !last->answer;
    if (strcmp(role, "system") == 0 && !last && !s->system)
        return mem_strdup(&s->system, content, e);
    if (strcmp(role, "user") == 0 && !open) return turn_push(s, content, e);
    if (strcmp(role, "assistant") == 0 && open) return mem_strdup(&last->answer, content, e);
    return err_set(e, E_INPUT,
                   "a message of '%.20s' does not fit here: expected system first, then user and "
                   "assistant in turn",
                   role);
}

static err_code load_line(chat_session *s, const char *text, size_t n, err *e)
{
    cJSON *o = NULL;
    const char *role, *content;
    err_code rc = json_parse(&o, text, n, "message", e);
    if (rc == OK) rc = json_get_str(o, "role", &role, e);
    if (rc == OK) rc = json_get_str(o, "content", &content, e);
    if (rc == OK) rc = load_message(s, role, content, e);
    cJSON_Delete(o);
    return rc;
}

static err_code load_lines(chat_session *s, const char *text, size_t n, const char *path, err *e)
{
    int line = 0;
    for (size_t at = 0; at < n;) {
        const char *end = memchr(text + at, '\n', n - at);
        const size_t len = end ? (size_t)(end - text) - at : n - at;
        line++;
        if (strspn(text + at, " \t\r\n") < len && load_line(s, text + at, len, e) != OK)
            return err_wrap(e, "'%s': line %d", path, line);
        at += len + 1;
    }
    if (s->n_turns && !s->turns[s->n_turns - 1].answer)
        return err_set(e, E_INPUT,
                       "'%s': the last message is the user's: expected an answer behind it", path);
    return OK;
}

err_code chat_session_load(chat_session *s, const char *path, err *e)
{
    chat_session fresh = {0};
    char *text;
    size_t n;
    TRY(file_read(&text, &n, path, CHAT_MAX_FILE, e));
    const err_code rc = load_lines(&fresh, text, n, path, e);
    mem_free(text);
    if (rc != OK) {
        turns_free(fresh.turns, fresh.n_turns);
        mem_free(fresh.system);
        return rc;
    }
    turns_free(s->turns, s->n_turns);
    mem_free(s->system);
    s->turns = fresh.turns;
    s->n_turns = fresh.n_turns;
    s->cap = fresh.cap;
    s->system = fresh.system;
    forget_ids(s);
    return OK;
}
