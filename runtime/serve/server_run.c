/* Answers on their way: tokens to text, stop texts, tool calls, ends; and watching the client all
 * the while. */
#include "runtime/serve/server_run.h"

#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "runtime/clock.h"

#define READ_TOKENS 32         /* at once */
#define AHEAD_BYTES (64 << 10) /* of a choice's text in a stream, made before its reader takes it */
#define SLICE_MS    500        /* how often flags of others are looked at while nothing comes */
#define SESSION_MS  50         /* the same where a session can be canceled */

/* ---- opening ---- */

static err_code open_grammar(grammar **out, const run *r, err *e)
{
    const api_request *q = &r->q;
    const server *s = r->c->s;
    const bool forced = q->choice == API_TOOLS_REQUIRED || q->choice == API_TOOLS_NAMED;
    *out = NULL;
    if (forced)
        return grammar_set_tool_calls(s->grammars, out, chat_tool_format(s->m.c), q->tools_text,
                                      strlen(q->tools_text), q->tool_name, q->parallel_tools, e);
    switch (q->format) {
    case API_FORMAT_TEXT: return OK;
    case API_FORMAT_OBJECT: return grammar_set_json_object(s->grammars, out, e);
    case API_FORMAT_SCHEMA:
        return grammar_set_json_schema(s->grammars, out, q->schema, strlen(q->schema), e);
    case API_FORMAT_REGEX: return grammar_set_regex(s->grammars, out, q->regex, e);
    }
    return OK;
}

static const char *grammar_param(const api_request *q)
{
    return q->format == API_FORMAT_TEXT ? "tools" : "response_format";
}

static bool wants_tools(const api_request *q)
{
    return q->who == API_CHAT && q->tools && q->choice != API_TOOLS_NONE;
}

static err_code open_text(choice *ch, err *e)
{
    const api_request *q = &ch->r->q;
    const server *s = ch->r->c->s;
    const bool tools = wants_tools(q);
    size_t bytes = 1;
    for (int i = 0; i < q->n_stops; i++) bytes += strlen(q->stops[i]);
    TRY(text_stream_open(&ch->text, s->m.t, API_MAX_STOPS, bytes, s->piece_bytes, e));
    TRY(text_stream_start(ch->text, q->stops, q->n_stops, q->skip_special && !tools, e));
    if (!tools) return OK;
    const chat_tools format = chat_tool_format(s->m.c);
    TRY(toolcall_open(&ch->tools, format == CHAT_TOOLS_NONE ? CHAT_TOOLS_HERMES : format, e));
    toolcall_tools(ch->tools, q->tools);
    return OK;
}

/* The ids that end an answer: the model's unless they are to be ignored, and the request's. */
static int stop_ids(const run *r, int32_t *ids, int cap)
{
    const server_model *m = &r->c->s->m;
    int n = 0;
    for (int i = 0; i < m->n_stop_ids && !r->q.ignore_eos && n < cap; i++)
        ids[n++] = m->stop_ids[i];
    for (int i = 0; i < r->q.n_stop_ids && n < cap; i++) ids[n++] = r->q.stop_ids[i];
    return n;
}

static err_code submit(choice *ch, grammar *g, err *e)
{
    run *r = ch->r;
    const api_request *q = &r->q;
    const server *s = r->c->s;
    int32_t ids[API_MAX_STOP_IDS * 2];
    const bool echo_probs = q->echo && q->top_logprobs >= 0;
    engine_request er = {
        .prompt = r->prompts[ch->prompt].ids,
        .n_prompt = (int32_t)r->prompts[ch->prompt].n,
        .min_new = (int32_t)q->min_tokens,
        .stop_ids = ids,
        .n_stop_ids = stop_ids(r, ids, API_MAX_STOP_IDS * 2),
        .sample = q->sample,
        .top_logprobs = (int32_t)q->top_logprobs,
        .prompt_logprobs = (int32_t)(echo_probs ? q->top_logprobs : q->prompt_logprobs),
        .salt = r->c->salt,
        .no_prefix = q->no_prefix,
        .timeout_ms = q->timeout_ms ? q->timeout_ms : s->o.timeout_ms};
    const int64_t room = (int64_t)s->m.session_len - er.n_prompt;
    if (q->max_tokens >= 0) er.max_new = (int32_t)(q->max_tokens < room ? q->max_tokens : room);
    if (er.max_new == 0 && q->max_tokens == 0)
        er.max_new = 1; /* echo alone: its token is dropped */
    if (er.max_new && er.min_new > er.max_new) er.min_new = er.max_new;
    er.sample.seed += (uint64_t)(ch->index % q->n);
    TRY(open_text(ch, e));
    if (g) TRY(constraint_open(&er.limit, g, e));
    const err_code rc = engine_submit(s->m.g, &er, &ch->a, e);
    if (rc != OK) constraint_close(&er.limit);
    return rc;
}

static bool fail_open(call *c, const run *r, const err *e, const char *param)
{
    api_fault f;
    (void)api_fail_err(&f, e, param);
    if (e->code == E_LIMIT && r->n_prompts && !param) {
        f.kind = API_CONTEXT;
        f.n_prompt = (int32_t)r->prompts[0].n;
        f.n_ctx = c->s->m.session_len;
    }
    if (f.kind == API_INTERNAL) job_log(c->s->j, LOG_ERROR, "%s: %s", c->id, e->msg);
    if (f.kind == API_QUEUE_FULL) metrics_rejected(c->s->counts, "queue_full");
    server_fail(c, &f);
    return false;
}

static bool check_prompts(run *r)
{
    call *c = r->c;
    const int32_t room = c->s->m.session_len;
    api_fault f;
    c->n_prompt = 0;
    for (int32_t i = 0; i < r->n_prompts; i++) {
        const int64_t n = r->prompts[i].n;
        c->n_prompt += (int32_t)(n < room ? n : room);
        if (n > 0 && n < room) continue;
        const char *param = r->who == API_CHAT  ? "messages"
                            : r->who == API_PPL ? "input"
                                                : "prompt";
        if (n == 0) {
            (void)api_fail(&f, API_INVALID_VALUE, param, "'%s': the prompt is empty", param);
        } else {
            (void)api_fail(&f, API_CONTEXT, param,
                           "the prompt of %lld tokens leaves no room in a context of %d",
                           (long long)n, room);
            f.n_prompt = (int32_t)(n < INT32_MAX ? n : INT32_MAX);
            f.n_ctx = room;
        }
        server_fail(c, &f);
        return false;
    }
    return true;
}

/* An answer that is asked to be longer than it can get is told so. */
static void tell_limit(const run *r)
{
    char text[16];
    const int64_t room = r->c->s->m.session_len - r->prompts[0].n;
    if (r->q.max_tokens <= room) return;
    (void)snprintf(text, sizeof text, "%d", (int)room);
    http_reply_field(r->c->a, "x-max-tokens", text);
}

static bool submit_all(run *r)
{
    call *c = r->c;
    grammar *g = NULL;
    err e;
    tell_limit(r);
    if (open_grammar(&g, r, &e) != OK) return fail_open(c, r, &e, grammar_param(&r->q));
    err_code rc = OK;
    for (int32_t i = 0; i < r->n && rc == OK; i++) rc = submit(&r->choices[i], g, &e);
    grammar_close(&g);
    return rc == OK || fail_open(c, r, &e, NULL);
}

static bool fill(run *r)
{
    err e;
    void *p;
    call *c = r->c;
    (void)snprintf(r->id, sizeof r->id, "%s-%s", r->who == API_CHAT ? "chatcmpl" : "cmpl",
                   c->id + 4);
    r->created = (int64_t)time(NULL);
    if (r->q.cancel) return true;
    if (!check_prompts(r) || !server_enter(c, r->n - 1) || !server_queue(c, c->n_prompt))
        return false;
    if (mem_alloc(&p, (size_t)r->n, sizeof(choice), "answers", &e) != OK)
        return fail_open(c, r, &e, NULL);
    r->choices = p;
    if (mem_alloc(&p, (size_t)r->n + 1, sizeof(struct pollfd), "answers", &e) != OK)
        return fail_open(c, r, &e, NULL);
    r->polls = p;
    for (int32_t i = 0; i < r->n; i++)
        r->choices[i] = (choice){.r = r, .index = i, .prompt = (int32_t)(i / r->q.n), .last = -1};
    return submit_all(r);
}

/* The words of the turn: what was asked, and the answer as its reader saw it. */
static void keep_words(const run *r, const choice *ch)
{
    const int64_t n = ch->kept.n - ch->at_stop_id;
    err ignored;
    char *text = NULL, *stop;
    size_t n_text;
    chat_message m = {.role = "assistant"};
    for (int64_t i = 0; i < r->q.n_messages; i++) session_say(r->session, &r->q.messages[i]);
    if (tokenizer_decode(r->c->s->m.t, ch->kept.ids, n, r->q.skip_special, &text, &n_text,
                         &ignored) == OK)
        m.content = text;
    if (text && ch->stopped && (stop = strstr(text, ch->stopped)) != NULL) *stop = '\0';
    session_say(r->session, &m);
    mem_free(text);
}

/* What the next turn of the session continues. */
static void keep_session(run *r)
{
    token_list *ids = session_ids(r->session);
    const choice *ch = r->choices;
    const bool keep = r->q.interactive && ch && ch->n_new > 0;
    if (keep) {
        keep_words(r, ch);
        token_list_free(ids);
        *ids = r->prompts[0];
        memset(&r->prompts[0], 0, sizeof r->prompts[0]);
        err ignored;
        for (int64_t i = 0; i < ch->kept.n; i++)
            (void)token_list_push(ids, ch->kept.ids[i], &ignored);
        *session_last(r->session) = ch->at_stop_id ? ch->last : -1;
    }
    session_give(r->c->s->sessions, &r->session, r->q.interactive);
}

/* Everything that the client's next request may need is given back before it hears of the end. */
static void let_go(run *r)
{
    for (int32_t i = 0; i < r->n && r->choices; i++) answer_close(&r->choices[i].a);
    if (r->session) keep_session(r);
    server_leave(r->c);
}

/* How many of the session's ids the prompt begins with: all, unless the template rewrites. */
static int32_t shared_ids(const token_list *held, const token_list *prompt)
{
    int64_t n = 0;
    while (n < held->n && n < prompt->n && held->ids[n] == prompt->ids[n]) n++;
    return (int32_t)n;
}

bool server_run_open(call *c, api_request *q, token_list *prompts, int32_t n_prompts, session *s)
{
    err e;
    void *p;
    if (mem_alloc(&p, 1, sizeof(run), "answers", &e) != OK) {
        for (int32_t i = 0; i < n_prompts; i++) token_list_free(&prompts[i]);
        mem_free(prompts);
        api_request_free(q);
        session_give(c->s->sessions, &s, true);
        api_fault f;
        (void)api_fail_err(&f, &e, NULL);
        server_fail(c, &f);
        return false;
    }
    run *r = p;
    r->c = c;
    r->who = q->who;
    r->q = *q;
    memset(q, 0, sizeof *q);
    r->prompts = prompts;
    r->n_prompts = n_prompts;
    r->n = n_prompts * (int32_t)r->q.n;
    r->session = s;
    r->history = s ? shared_ids(session_ids(s), &prompts[0]) : 0;
    r->sent_s = clock_s();
    c->run = r; /* closed with the call */
    const bool filled = fill(r);
    if (!filled) let_go(r);
    return filled;
}

/* ---- closing ---- */

static void free_choice(choice *ch)
{
    out_buf *const bufs[] = {&ch->content, &ch->calls,       &ch->probs,
                             &ch->tokens,  &ch->token_probs, &ch->tops,
                             &ch->offsets, &ch->ids,         &ch->prompt_probs};
    answer_close(&ch->a);
    text_stream_close(&ch->text);
    toolcall_close(&ch->tools);
    for (size_t i = 0; i < sizeof bufs / sizeof bufs[0]; i++) out_free(bufs[i]);
    token_list_free(&ch->kept);
}

void server_run_close(run **r)
{
    if (!r || !*r) return;
    let_go(*r);
    for (int32_t i = 0; i < (*r)->n && (*r)->choices; i++) free_choice(&(*r)->choices[i]);
    for (int32_t i = 0; i < (*r)->n_prompts; i++) token_list_free(&(*r)->prompts[i]);
    mem_free((*r)->prompts);
    mem_free((*r)->choices);
    mem_free((*r)->polls);
    api_request_free(&(*r)->q);
    mem_free(*r);
    *r = NULL;
}

/* ---- tokens ---- */

static void fail_run(run *r, const err *e)
{
    if (r->failed) return;
    (void)api_fail_err(&r->fault, e, NULL);
    if (r->fault.kind == API_INTERNAL) job_log(r->c->s->j, LOG_ERROR, "%s: %s", r->c->id, e->msg);
    r->failed = true;
}

static err_code on_tool(void *ud, const toolcall_event *ev, err *e)
{
    choice *ch = ud;
    (void)e;
    switch (ev->kind) {
    case TOOLCALL_CONTENT: out_bytes(&ch->content, ev->text, ev->n); break;
    case TOOLCALL_BEGIN: server_write_call_begin(ch, ev->text, ev->n); break;
    case TOOLCALL_ARGS: server_write_call_args(ch, ev->text, ev->n); break;
    }
    return OK;
}

/* Moves what is certain on. */
static err_code take_text(choice *ch, err *e)
{
    size_t n;
    const char *text = text_stream_ready(ch->text, &n);
    err_code rc = OK;
    if (n && ch->tools)
        rc = toolcall_feed(ch->tools, text, n, on_tool, ch, e);
    else
        out_bytes(&ch->content, text, n);
    text_stream_taken(ch->text);
    return rc;
}

/* In front of the answer: with echo the prompt. Its log-probabilities are there with the first
 * token. */
static err_code begin_choice(choice *ch, err *e)
{
    const token_list *ids = &ch->r->prompts[ch->prompt];
    char *text;
    size_t n;
    if (ch->begun) return OK;
    ch->begun = true;
    server_write_prompt_probs(ch);
    if (!ch->r->q.echo) return OK;
    if (ch->r->q.prompts[ch->prompt].text) {
        out_text(&ch->content, ch->r->q.prompts[ch->prompt].text);
        return OK;
    }
    TRY(tokenizer_decode(ch->r->c->s->m.t, ids->ids, ids->n, ch->r->q.skip_special, &text, &n, e));
    out_bytes(&ch->content, text, n);
    mem_free(text);
    return OK;
}

static void end_choice(choice *ch, const char *finish)
{
    run *r = ch->r;
    err e;
    err_code rc = begin_choice(ch, &e);
    text_stream_flush(ch->text);
    if (rc == OK) rc = take_text(ch, &e);
    if (ch->stopped && r->q.include_stop && rc == OK)
        out_bytes(&ch->content, ch->stopped, strlen(ch->stopped));
    if (rc == OK && ch->tools) rc = toolcall_end(ch->tools, on_tool, ch, &e);
    if (rc != OK) fail_run(r, &e);
    ch->finish = ch->n_calls && strcmp(finish, "stop") == 0 ? "tool_calls" : finish;
    answer_figures_get(ch->a, &ch->figures);
    if (ch->figures.n_new > 1) metrics_decode(r->c->s->counts, ch->figures.decode_s);
    answer_close(&ch->a);
    ch->ended = true;
    r->n_ended++;
    r->c->reason = ch->finish;
}

static bool is_stop_id(const run *r, int32_t id)
{
    int32_t ids[API_MAX_STOP_IDS * 2];
    const int n = stop_ids(r, ids, API_MAX_STOP_IDS * 2);
    for (int i = 0; i < n; i++)
        if (ids[i] == id) return true;
    return false;
}

static void keep_id(choice *ch, int32_t id)
{
    err e;
    if (ch->r->q.return_ids) {
        if (ch->ids.n) out_bytes(&ch->ids, ",", 1);
        out_int(&ch->ids, id);
    }
    if (ch->r->session && token_list_push(&ch->kept, id, &e) != OK) fail_run(ch->r, &e);
}

/* One token; the choice may be ended by it. `final`: the engine ended with it at a stop id. */
static err_code take_token(choice *ch, const answer_token *t, bool final, err *e)
{
    run *r = ch->r;
    int stop = -1;
    TRY(begin_choice(ch, e));
    if (r->q.max_tokens == 0) return OK; /* echo alone */
    if (ch->n_new++ == 0 && r->c->first_s <= 0) {
        r->c->first_s = clock_s() - r->c->began;
        server_begun(r->c);
    }
    r->c->n_new++;
    ch->last = t->id;
    keep_id(ch, t->id);
    ch->at_stop_id = final && is_stop_id(r, t->id);
    const bool prob = r->q.top_logprobs >= 0;
    if (prob && (!ch->at_stop_id || r->who == API_GENERATE)) server_write_prob(ch, t);
    if (ch->at_stop_id) return OK;
    TRY(text_stream_add(ch->text, t->id, &stop, e));
    if (stop >= 0) ch->stopped = r->q.stops[stop];
    return take_text(ch, e);
}

static void end_by_state(choice *ch, answer_state state)
{
    err e = {OK, ""};
    switch (state) {
    case ANSWER_STOP: end_choice(ch, "stop"); return;
    case ANSWER_TIMEOUT:
        ch->timed_out = true;
        end_choice(ch, "length");
        return;
    case ANSWER_LENGTH: end_choice(ch, "length"); return;
    case ANSWER_FAILED: (void)answer_error(ch->a, &e); break;
    default: break;
    }
    if (state == ANSWER_CANCELED && ch->r->session && session_canceled(ch->r->session)) {
        end_choice(ch, "stop");
        return;
    }
    if (e.code == OK) (void)err_set(&e, E_CANCELED, "the server is shutting down");
    fail_run(ch->r, &e);
    end_choice(ch, "stop");
}

/* A stream whose reader is slow: tokens are read on when it has taken what was made of them. With
 * log-probabilities a token is more than a thousand times as long there as with the engine. */
static bool is_ahead(const choice *ch)
{
    return ch->r->q.stream && ch->content.n + ch->calls.n + ch->probs.n + ch->tops.n + ch->ids.n +
                                      ch->offsets.n + ch->tokens.n + ch->token_probs.n >
                                  AHEAD_BYTES;
}

static void read_tokens(choice *ch)
{
    answer_token t[READ_TOKENS];
    answer_state state;
    err e;
    do {
        const int32_t n = answer_read(ch->a, t, READ_TOKENS, 0, &state);
        for (int32_t i = 0; i < n && !ch->stopped; i++) {
            if (take_token(ch, &t[i], state == ANSWER_STOP && i == n - 1, &e) == OK) continue;
            fail_run(ch->r, &e);
            return;
        }
        if (ch->stopped)
            end_choice(ch, "stop");
        else if (state >= ANSWER_STOP)
            end_by_state(ch, state);
        else if (n < READ_TOKENS)
            return;
    } while (!ch->ended && !ch->r->failed && !is_ahead(ch));
}

/* ---- waiting ---- */

/* No answer of it has got a place yet. */
static bool still_waits(const run *r)
{
    for (int32_t i = 0; i < r->n; i++) {
        answer_state state = ANSWER_RUNNING;
        answer_token none;
        if (r->choices[i].a) (void)answer_read(r->choices[i].a, &none, 0, 0, &state);
        if (state != ANSWER_WAITING) return false;
    }
    return true;
}

static void look_at_flags(run *r)
{
    err e;
    server *s = r->c->s;
    const bool canceled = r->session && session_canceled(r->session);
    if (atomic_load(&s->aborting)) {
        (void)err_set(&e, E_CANCELED, "the server is shutting down");
        fail_run(r, &e);
    }
    if (canceled)
        for (int32_t i = 0; i < r->n; i++)
            if (!r->choices[i].ended) answer_cancel(r->choices[i].a);
    if (s->o.queue_ms && !r->c->n_new && clock_s() - r->c->began > 1e-3 * s->o.queue_ms &&
        still_waits(r)) {
        (void)api_fail(&r->fault, API_UNAVAILABLE, NULL, "no place became free within %d ms",
                       s->o.queue_ms);
        r->fault.retry_after_s = 5;
        r->failed = true;
        metrics_rejected(s->counts, "queue_timeout");
    }
}

/* Until an answer has something, the client is gone or timeout_ms are over. */
static void wait_for_tokens(run *r, int timeout_ms)
{
    const int slice = r->session ? SESSION_MS : SLICE_MS;
    int n = 1;
    r->polls[0] = (struct pollfd){.fd = r->c->r->fd, .events = POLLRDHUP};
    for (int32_t i = 0; i < r->n; i++)
        if (!r->choices[i].ended)
            r->polls[n++] = (struct pollfd){.fd = answer_fd(r->choices[i].a), .events = POLLIN};
    const int ready = poll(r->polls, (nfds_t)n, timeout_ms < slice ? timeout_ms : slice);
    look_at_flags(r);
    if (ready <= 0) return;
    if (r->polls[0].revents) r->gone = true;
    n = 1;
    for (int32_t i = 0; i < r->n && !r->gone && !r->failed; i++) {
        choice *ch = &r->choices[i];
        if (ch->ended) continue;
        if (r->polls[n++].revents) read_tokens(ch);
    }
}

static bool over(const run *r) { return r->gone || r->failed || r->n_ended == r->n; }

/* ---- whole answers ---- */

static void answer_gone(run *r)
{
    r->c->a->status = api_status(API_CANCELED);
    r->c->a->close = true;
    r->c->reason = api_code(API_CANCELED);
}

bool server_run_wait(run *r)
{
    while (!over(r)) wait_for_tokens(r, SLICE_MS);
    let_go(r);
    if (!r->gone && !r->failed) return true;
    if (r->gone)
        answer_gone(r);
    else
        server_fail(r->c, &r->fault);
    return false;
}

/* ---- streams ---- */

static bool has_news(const choice *ch)
{
    return ch->content.n || ch->calls.n || ch->probs.n || ch->tokens.n;
}

static void write_news(run *r, out_buf *o)
{
    for (int32_t i = 0; i < r->n; i++) {
        choice *ch = &r->choices[i];
        if (has_news(ch)) server_write_delta(ch, o);
        if (ch->ended && ch->finish) {
            server_write_finish(ch, o);
            ch->finish = NULL;
        }
    }
}

static bool run_next(void *ud, out_buf *o)
{
    run *r = ud;
    if (!r->begun) {
        for (int32_t i = 0; i < r->n; i++) server_write_first(&r->choices[i], o);
        r->begun = true;
    }
    for (;;) {
        if (!r->gone && !r->failed) write_news(r, o);
        if (over(r) || o->n) break;
        const double idle_s = clock_s() - r->sent_s;
        if (idle_s * 1000 >= SERVER_PING_MS && !r->lines) {
            out_text(o, ": ping\n\n");
            break;
        }
        wait_for_tokens(r, SLICE_MS);
    }
    r->sent_s = clock_s();
    if (!over(r)) return true;
    let_go(r);
    if (r->gone) {
        r->c->reason = api_code(API_CANCELED);
    } else {
        if (r->failed) r->c->reason = api_code(r->fault.kind);
        server_write_end(r, o);
    }
    return false;
}

/* The headers wait for the first token, or for as long as a client may be left without a byte:
 * until then a failure still has a status of its own. */
static void start_stream(run *r)
{
    call *c = r->c;
    while (!over(r) && c->n_new == 0 && 1000 * (clock_s() - c->began) < SERVER_PING_MS)
        wait_for_tokens(r, SLICE_MS);
    if (r->gone || r->failed) {
        let_go(r);
        if (r->gone)
            answer_gone(r);
        else
            server_fail(c, &r->fault);
        return;
    }
    c->a->status = 200;
    c->a->next = run_next;
    c->a->next_ud = r;
    http_reply_field(c->a, "Content-Type",
                     r->lines ? "application/x-ndjson" : "text/event-stream; charset=utf-8");
    http_reply_field(c->a, "Cache-Control", "no-cache");
    http_reply_field(c->a, "X-Accel-Buffering", "no");
}

void server_run_answer(run *r)
{
    call *c = r->c;
    if (r->q.stream) {
        start_stream(r);
        return;
    }
    if (!server_run_wait(r)) return;
    server_write_whole(r, &c->a->body);
    server_json(c, 200);
}
