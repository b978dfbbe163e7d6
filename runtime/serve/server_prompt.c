/* Routes that make the model work: the prompt's ids, and what is asked of the engine. */
#include <math.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "runtime/serve/server_run.h"

#define NEW_SESSION ((int64_t)1 << 53) /* numbers above those that clients may give */

static bool fail(call *c, const err *e, const char *param)
{
    api_fault f;
    (void)api_fail_err(&f, e, param);
    if (f.kind == API_INTERNAL) job_log(c->s->j, LOG_ERROR, "%s: %s", c->id, e->msg);
    server_fail(c, &f);
    return false;
}

static void free_prompts(token_list *prompts, int32_t n)
{
    for (int32_t i = 0; prompts && i < n; i++) token_list_free(&prompts[i]);
    mem_free(prompts);
}

static bool new_prompts(call *c, token_list **prompts, int32_t n)
{
    err e;
    void *p;
    if (mem_alloc(&p, (size_t)n, sizeof(token_list), "prompts", &e) != OK) return fail(c, &e, NULL);
    *prompts = p;
    return true;
}

/* ---- chat ---- */

static chat_request chat_of(const call *c, const api_request *q)
{
    return (chat_request){.messages = q->messages,
                          .n = q->n_messages,
                          .meta_instruction = c->s->m.meta_instruction,
                          .tools = q->choice == API_TOOLS_NONE ? NULL : q->tools,
                          .kwargs = q->kwargs,
                          .now = (int64_t)time(NULL),
                          .add_generation = true};
}

void server_chat(call *c)
{
    api_request q;
    token_list *prompts = NULL;
    err e;
    if (!server_parse(c, API_CHAT, &q)) return;
    if (!server_is_ours(c, q.model) || !new_prompts(c, &prompts, 1)) {
        api_request_free(&q);
        return;
    }
    const chat_request r = chat_of(c, &q);
    if (chat_encode_request(c->s->m.c, &r, prompts, &e) != OK) {
        (void)fail(c, &e, "messages");
        free_prompts(prompts, 1);
        api_request_free(&q);
        return;
    }
    if (server_run_open(c, &q, prompts, 1, NULL)) server_run_answer(c->run);
}

/* ---- texts as they are ---- */

static err_code encode_text(const call *c, const api_request *q, const api_prompt *p,
                            token_list *ids, err *e)
{
    const tokenizer *t = c->s->m.t;
    for (int32_t i = 0; i < p->n_ids; i++) TRY(token_list_push(ids, p->ids[i], e));
    if (!p->text) return OK;
    if (q->add_bos && tokenizer_add_bos(t) && tokenizer_bos(t) >= 0)
        TRY(token_list_push(ids, tokenizer_bos(t), e));
    return tokenizer_encode(t, p->text, strlen(p->text), q->parse_special, ids, e);
}

static bool encode_all(call *c, const api_request *q, const char *param, token_list **prompts)
{
    err e;
    if (!new_prompts(c, prompts, q->n_prompts)) return false;
    for (int32_t i = 0; i < q->n_prompts; i++) {
        if (encode_text(c, q, &q->prompts[i], &(*prompts)[i], &e) == OK) continue;
        free_prompts(*prompts, q->n_prompts);
        return fail(c, &e, param);
    }
    return true;
}

static void complete(call *c, unsigned who)
{
    api_request q;
    token_list *prompts;
    if (!server_parse(c, who, &q)) return;
    const int32_t n = q.n_prompts;
    if (!server_is_ours(c, q.model) || !encode_all(c, &q, "prompt", &prompts)) {
        api_request_free(&q);
        return;
    }
    if (server_run_open(c, &q, prompts, n, NULL)) server_run_answer(c->run);
}

void server_completion(call *c) { complete(c, API_COMPLETION); }

void server_generate(call *c) { complete(c, API_GENERATE); }

static void write_ppl(const run *r, out_buf *o)
{
    static const char *const names[] = {"\"ppl\":[", "],\"nll\":[", "],\"tokens\":["};
    out_bytes(o, "{", 1);
    for (int k = 0; k < 3; k++) {
        out_text(o, names[k]);
        for (int32_t i = 0; i < r->n; i++) {
            const int64_t n = r->prompts[i].n - 1;
            const double nll = n > 0 ? r->choices[i].nll / (double)n : 0;
            if (i) out_bytes(o, ",", 1);
            if (k == 2)
                out_int(o, n);
            else
                out_number(o, k == 0 ? exp(nll) : nll);
        }
    }
    out_text(o, "]}");
}

/* The engine has to make one token to look at a prompt; it is dropped. */
void server_ppl(call *c)
{
    api_request q;
    token_list *prompts;
    if (!server_parse(c, API_PPL, &q)) return;
    const int32_t n = q.n_prompts;
    if (!server_is_ours(c, q.model) || !encode_all(c, &q, "input", &prompts)) {
        api_request_free(&q);
        return;
    }
    q.sample = sample_greedy();
    q.max_tokens = q.prompt_logprobs = 0;
    q.no_prefix = true; /* what a cached prefix holds is not scored */
    if (!server_run_open(c, &q, prompts, n, NULL) || !server_run_wait(c->run)) return;
    write_ppl(c->run, &c->a->body);
    server_json(c, 200);
}

/* ---- sessions ---- */

static void answer_idle(call *c)
{
    out_text(&c->a->body, "{\"text\":\"\",\"tokens\":0,\"input_tokens\":0,\"history_tokens\":0,"
                          "\"finish_reason\":\"stop\"}");
    server_json(c, 200);
}

/* All that was said and the new turn, laid out together: for templates whose next turn depends on
 * more than the last answer. */
static err_code whole_again(const call *c, const api_request *q, session *s, token_list *ids,
                            err *e)
{
    chat_request r = chat_of(c, q);
    int64_t n;
    void *p;
    const chat_message *said = session_said(s, &n);
    if (!said) return e->code;
    TRY(mem_alloc(&p, (size_t)(n + q->n_messages), sizeof(chat_message), "session", e));
    chat_message *all = p;
    memcpy(all, said, (size_t)n * sizeof *all);
    memcpy(all + n, q->messages, (size_t)q->n_messages * sizeof *all);
    r.messages = all;
    r.n += n;
    const err_code rc = chat_encode_request(c->s->m.c, &r, ids, e);
    mem_free(p);
    return rc;
}

/* The session so far and the new turn behind it. */
static err_code next_turn(const call *c, const api_request *q, session *s, token_list *ids, err *e)
{
    const token_list *held = session_ids(s);
    const chat_request r = chat_of(c, q);
    token_list next = {0};
    int drop = 0;
    if (held->n == 0) return chat_encode_request(c->s->m.c, &r, ids, e);
    err_code rc = chat_encode_next(c->s->m.c, q->messages, q->n_messages, *session_last(s), &next,
                                   &drop, e);
    for (int64_t i = 0; i < held->n - drop && rc == OK; i++)
        rc = token_list_push(ids, held->ids[i], e);
    for (int64_t i = 0; i < next.n && rc == OK; i++) rc = token_list_push(ids, next.ids[i], e);
    token_list_free(&next);
    return rc == E_UNSUPPORTED ? whole_again(c, q, s, ids, e) : rc;
}

static void converse(call *c, api_request *q, session *s)
{
    token_list *prompts = NULL;
    err e;
    const char *framing = http_query(c->r, "framing");
    bool ok = new_prompts(c, &prompts, 1);
    if (ok && next_turn(c, q, s, prompts, &e) != OK) ok = fail(c, &e, "prompt");
    if (!ok) {
        free_prompts(prompts, 1);
        session_give(c->s->sessions, &s, q->interactive);
        api_request_free(q);
        return;
    }
    const bool opened = server_run_open(c, q, prompts, 1, s);
    if (!opened) return;
    c->run->lines = framing && strcmp(framing, "lines") == 0;
    server_run_answer(c->run);
}

void server_interactive(call *c)
{
    api_request q;
    session *s;
    err e;
    if (!server_parse(c, API_INTERACTIVE, &q)) return;
    if (q.session_id < 0) q.session_id = NEW_SESSION + (int64_t)atomic_fetch_add(&c->s->serial, 1);
    if (q.cancel) {
        (void)session_cancel(c->s->sessions, c->salt, q.session_id);
        answer_idle(c);
        api_request_free(&q);
        return;
    }
    if (!server_door(c)) { /* only now: a cancel must pass when the queue is full */
        api_request_free(&q);
        return;
    }
    if (session_take(&s, c->s->sessions, c->salt, q.session_id, &e) != OK) {
        api_fault f;
        (void)api_fail(&f, API_CONFLICT, "session_id", "%s", e.msg);
        server_fail(c, &f);
        api_request_free(&q);
        return;
    }
    if (q.messages && q.max_tokens != 0) {
        converse(c, &q, s);
        return;
    }
    session_give(c->s->sessions, &s, q.interactive); /* nothing to say: LMDeploy's way to end it */
    answer_idle(c);
    api_request_free(&q);
}
