/* Answers from a server with OpenAI's chat completions: the whole conversation goes out with each
 * question, the answer comes as server-sent events. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "tools/chat_session.h"

#define WAIT_MS 50 /* how soon Ctrl-C is noticed at the latest */

typedef struct {
    chat_backend b;
    http_client *h;    /* borrowed */
    const char *model; /* borrowed */
} chat_remote;

static void turn_gone(chat_backend *b, const chat_turn *t)
{
    (void)b;
    (void)t;
}

static void rewritten(chat_backend *b, chat_session *s)
{
    (void)b;
    (void)s;
}

/* ---- question ---- */

static bool add_number(cJSON *o, const char *key, double x)
{
    return isnan(x) || cJSON_AddNumberToObject(o, key, x);
}

static bool add_sampling(cJSON *o, const chat_session *s)
{
    const sample_opts *p = &s->sample;
    return add_number(o, "temperature", p->temperature) && add_number(o, "top_p", p->top_p) &&
           add_number(o, "top_k", p->top_k < 0 ? NAN : p->top_k) &&
           add_number(o, "min_p", p->min_p) &&
           add_number(o, "repetition_penalty", p->repetition_penalty) &&
           add_number(o, "presence_penalty", p->presence_penalty) &&
           add_number(o, "frequency_penalty", p->frequency_penalty) &&
           add_number(o, "seed", p->seed == UINT64_MAX ? NAN : (double)(p->seed + s->answers)) &&
           add_number(o, "max_tokens", s->max_new ? (double)s->max_new : NAN);
}

static bool add_message(cJSON *list, const char *role, const char *content)
{
    cJSON *m = cJSON_CreateObject();
    if (m && cJSON_AddItemToArray(list, m))
        return cJSON_AddStringToObject(m, "role", role) &&
               cJSON_AddStringToObject(m, "content", content);
    cJSON_Delete(m);
    return false;
}

static bool add_messages(cJSON *o, const chat_session *s, const chat_message *m, int64_t n)
{
    cJSON *list = cJSON_AddArrayToObject(o, "messages");
    bool ok = list != NULL;
    if (ok && s->meta && !s->system) ok = add_message(list, "system", s->meta);
    for (int64_t i = 0; ok && i < n; i++) ok = add_message(list, m[i].role, m[i].content);
    return ok;
}

static bool add_stops(cJSON *o, const cli_list *stops)
{
    cJSON *list = stops->n ? cJSON_CreateStringArray(stops->v, stops->n) : NULL;
    if (!stops->n || (list && cJSON_AddItemToObject(o, "stop", list))) return true;
    cJSON_Delete(list);
    return false;
}

static err_code make_body(char **out, const chat_remote *b, const chat_session *s, err *e)
{
    void *m;
    TRY(mem_alloc(&m, 2 * (size_t)s->n_turns + 1, sizeof(chat_message), "messages", e));
    const int64_t n = chat_session_messages(s, m);
    cJSON *o = cJSON_CreateObject(), *so = NULL;
    const bool ok = o && cJSON_AddStringToObject(o, "model", b->model) &&
                    add_messages(o, s, m, n) && add_sampling(o, s) &&
                    add_stops(o, &s->stop_texts) && cJSON_AddTrueToObject(o, "stream") &&
                    (so = cJSON_AddObjectToObject(o, "stream_options")) &&
                    cJSON_AddTrueToObject(so, "include_usage");
    const err_code rc = ok ? json_print(out, o, false, e)
                           : err_set(e, E_NOMEM, "question: out of memory");
    cJSON_Delete(o);
    mem_free(m);
    return rc;
}

/* ---- answer ---- */

typedef struct {
    chat_relay *a;
    gen_result *r;
    http_stream *s; /* NULL once it ended */
    double begin, first, last;
    int64_t total; /* tokens of prompt and answer, as the server counted */
    int pieces;
    bool done, finished;
    err failed; /* told in the stream, or an event that is none */
    err why;
} exchange;

static bool take_text(exchange *x, const cJSON *delta)
{
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(delta, "content");
    if (!cJSON_IsString(text) || !*text->valuestring) return true;
    x->last = clock_s();
    if (!x->pieces++) x->first = x->last;
    return chat_relay_token(x->a, -1, text->valuestring, strlen(text->valuestring));
}

static bool take_choice(exchange *x, const cJSON *c)
{
    const char *why;
    err ignored;
    if (!take_text(x, cJSON_GetObjectItemCaseSensitive(c, "delta"))) return false;
    if (json_opt_str(c, "finish_reason", NULL, &why, &ignored) == OK && why) {
        x->finished = true;
        x->r->end = strcmp(why, "length") == 0 ? GEN_LENGTH : GEN_STOP_ID;
    }
    return true;
}

static void take_usage(exchange *x, const cJSON *u)
{
    err ignored;
    int32_t n;
    if (json_get_i32(u, "prompt_tokens", 0, INT32_MAX, &n, &ignored) == OK) x->r->n_prompt = n;
    if (json_get_i32(u, "completion_tokens", 0, INT32_MAX, &n, &ignored) == OK) x->r->n_new = n;
    x->total = (int64_t)x->r->n_prompt + x->r->n_new;
}

static bool on_event(void *ud, const char *data, size_t n)
{
    exchange *x = ud;
    cJSON *o;
    char text[400] = "unknown error";
    if (n == 6 && memcmp(data, "[DONE]", 6) == 0) {
        x->done = true;
        return true;
    }
    if (http_answer_json(&o, data, n, "event", &x->failed) != OK) return false;
    bool more = true;
    if (cJSON_GetObjectItemCaseSensitive(o, "error")) {
        (void)http_error_text(o, text, sizeof text);
        (void)err_set(&x->failed, E_IO, "the answer failed: %s", text);
    } else {
        const cJSON *u = cJSON_GetObjectItemCaseSensitive(o, "usage");
        const cJSON *c = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(o, "choices"), 0);
        if (c) more = take_choice(x, c);
        if (cJSON_IsObject(u)) take_usage(x, u);
    }
    cJSON_Delete(o);
    return more;
}

static void on_end(void *ud, long status, const err *why)
{
    exchange *x = ud;
    (void)status;
    x->why = *why;
    x->s = NULL;
}

/* What is wrong with an answer that has ended, if anything. */
static err_code outcome(const exchange *x, const http_client *h, err *e)
{
    const err *failed = x->failed.code ? &x->failed : &x->why;
    if (failed->code) {
        *e = *failed;
        return e->code;
    }
    if (!x->done && !x->finished)
        return err_set(e, E_IO, "%s: the connection ended before the answer did",
                       http_client_url(h));
    return OK;
}

static err_code run_exchange(chat_remote *b, exchange *x, const char *body, const job *j, err *e)
{
    const http_stream_calls calls = {on_event, on_end, x};
    err ignored;
    TRY(http_stream_open(b->h, "/v1/chat/completions", body, &calls, &x->s, e));
    err_code rc = OK;
    while (rc == OK && x->s) {
        if (job_check(j, &ignored) != OK) { /* closing the connection is what stops a server */
            http_stream_close(x->s);
            x->r->end = GEN_CANCELED;
            return OK;
        }
        rc = http_client_step(b->h, WAIT_MS, NULL, e);
    }
    if (x->s) http_stream_close(x->s);
    if (rc == OK && x->a->answer.failed.code == OK) rc = outcome(x, b->h, e);
    return rc;
}

static err_code answer(chat_backend *back, chat_session *s, chat_relay *a, gen_result *r,
                       int *dropped_turns, const job *j, err *e)
{
    chat_remote *b = (chat_remote *)back;
    exchange x = {.a = a, .r = r, .begin = clock_s()};
    char *body;
    (void)dropped_turns;
    TRY(make_body(&body, b, s, e));
    const err_code rc = run_exchange(b, &x, body, j, e);
    mem_free(body);
    if (rc != OK) return rc;
    s->answers++;
    if (r->n_new < x.pieces) r->n_new = x.pieces; /* without figures from there: pieces of text */
    r->prompt_s = (x.pieces ? x.first : clock_s()) - x.begin;
    r->new_s = x.last - x.first;
    s->context = x.total;
    return OK;
}

/* ---- open, show, close ---- */

static void show(const chat_backend *back, char *buf, size_t cap)
{
    const chat_remote *b = (const chat_remote *)back;
    (void)snprintf(buf, cap, "%s: model '%s'", http_client_url(b->h), b->model);
}

static void close_remote(chat_backend *b) { mem_free(b); }

err_code chat_remote_open(chat_session *s, http_client *h, const char *name, const char *meta,
                          err *e)
{
    void *p;
    memset(s, 0, sizeof *s);
    TRY(mem_alloc(&p, 1, sizeof(chat_remote), "conversation", e));
    chat_remote *b = p;
    b->b = (chat_backend){answer, turn_gone, rewritten, show, close_remote};
    b->h = h;
    b->model = name;
    s->b = &b->b;
    s->meta = meta;
    s->remote = true;
    s->vocab = INT32_MAX;
    s->sample = chat_sample_unset();
    return OK;
}
