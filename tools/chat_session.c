/* Turns, files and the way of a question. What depends on who answers is in the backends. */
#include "tools/chat_session.h"

#include <math.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

#define CHAT_MAX_FILE ((size_t)64 << 20)

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
    if (s->b) s->b->close(s->b);
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
    *t = (chat_turn){.last_before = -1, .dropped = -1};
    TRY(mem_strdup(&t->user, user, e));
    s->n_turns++;
    return OK;
}

static void turn_pop(chat_session *s)
{
    chat_turn *t = &s->turns[--s->n_turns];
    s->b->turn_gone(s->b, t);
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

static void rewritten(chat_session *s)
{
    if (s->b) s->b->rewritten(s->b, s);
    s->context = 0;
}

void chat_session_clear(chat_session *s)
{
    for (int i = 0; i < s->n_turns; i++) turn_free(&s->turns[i]);
    s->n_turns = 0;
    rewritten(s);
}

err_code chat_session_system(chat_session *s, const char *text, err *e)
{
    char *copy = NULL;
    if (text) TRY(mem_strdup(&copy, text, e));
    mem_free(s->system);
    s->system = copy;
    rewritten(s);
    return OK;
}

int64_t chat_session_messages(const chat_session *s, chat_message *m)
{
    int64_t n = 0;
    if (s->system) m[n++] = (chat_message){.role = "system", .content = s->system};
    for (int i = 0; i < s->n_turns; i++) {
        const chat_turn *t = &s->turns[i];
        m[n++] = (chat_message){.role = "user", .content = t->user};
        if (t->answer) m[n++] = (chat_message){.role = "assistant", .content = t->answer};
    }
    return n;
}

void chat_session_drop_first(chat_session *s)
{
    turn_free(&s->turns[0]);
    memmove(s->turns, s->turns + 1, (size_t)(s->n_turns - 1) * sizeof(chat_turn));
    s->n_turns--;
}

/* ---- sampling ---- */

sample_opts chat_sample_unset(void)
{
    return (sample_opts){.temperature = NAN,
                         .top_k = -1,
                         .top_p = NAN,
                         .min_p = NAN,
                         .repetition_penalty = NAN,
                         .presence_penalty = NAN,
                         .frequency_penalty = NAN,
                         .penalty_window = -1,
                         .seed = UINT64_MAX};
}

err_code chat_session_check(const chat_session *s, err *e)
{
    sample_opts o = s->sample;
    if (s->remote) { /* what is left to the server is in range */
        if (isnan(o.temperature)) o.temperature = 0;
        if (isnan(o.top_p)) o.top_p = 1;
        if (isnan(o.min_p)) o.min_p = 0;
        if (isnan(o.repetition_penalty)) o.repetition_penalty = 1;
        if (isnan(o.presence_penalty)) o.presence_penalty = 0;
        if (isnan(o.frequency_penalty)) o.frequency_penalty = 0;
        if (o.top_k < 0) o.top_k = 0;
        if (o.penalty_window < 0) o.penalty_window = 0;
    }
    return sample_opts_check(&o, s->vocab, e);
}

/* ---- asking ---- */

bool chat_relay_token(void *relay, int32_t id, const char *text, size_t n)
{
    chat_relay *r = relay;
    return run_answer_add(&r->answer, id, text, n) && (!r->fn || r->fn(r->ud, id, text, n));
}

static err_code keep_answer(chat_session *s, const chat_relay *a, const gen_result *r, err *e)
{
    chat_turn *t = &s->turns[s->n_turns - 1];
    t->cut = r->end != GEN_STOP_ID && r->end != GEN_STOP_TEXT;
    return mem_strdup(&t->answer, a->answer.text ? a->answer.text : "", e);
}

err_code chat_session_ask(chat_session *s, const char *user, gen_fn fn, void *ud, gen_result *r,
                          int *dropped_turns, const job *j, err *e)
{
    chat_relay a = {.fn = fn, .ud = ud};
    memset(r, 0, sizeof *r);
    *dropped_turns = 0;
    TRY(turn_push(s, user, e));
    err_code rc = s->b->answer(s->b, s, &a, r, dropped_turns, j, e);
    if (rc == OK && a.answer.failed.code) {
        *e = a.answer.failed;
        rc = e->code;
    }
    if (rc == OK && r->n_new) rc = keep_answer(s, &a, r, e);
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
    rewritten(s);
    return OK;
}
