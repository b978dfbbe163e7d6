/* The table of routes, and those that answer without the engine. */
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "runtime/serve/page.h"
#include "runtime/serve/server_internal.h"

static const server_route routes[] = {
    {"GET", "/v1/models", server_models, .no_model = true, .summary = "the models"},
    {"GET", "/v1/models/", server_model_one, .no_model = true, .summary = "one model"},
    {"POST", "/v1/chat/completions", server_chat, .door = true, .json = true, .who = API_CHAT,
     .summary = "the next message of a conversation"},
    {"POST", "/v1/completions", server_completion, .door = true, .json = true,
     .who = API_COMPLETION, .summary = "what follows a text"},
    {"POST", "/generate", server_generate, .door = true, .json = true, .who = API_GENERATE,
     .summary = "what follows token ids, as ids"},
    {"POST", "/v1/chat/interactive", server_interactive, .json = true, .who = API_INTERACTIVE,
     .summary = "the next turn of a session that the server keeps"},
    {"POST", "/v1/encode", server_encode, .json = true, .who = API_ENCODE,
     .summary = "token ids of texts"},
    {"POST", "/tokenize", server_encode, .json = true, .who = API_ENCODE,
     .summary = "token ids of texts"},
    {"POST", "/detokenize", server_decode, .json = true, .who = API_DECODE,
     .summary = "the text of token ids"},
    {"POST", "/get_ppl", server_ppl, .door = true, .json = true, .who = API_PPL,
     .summary = "perplexity of texts"},
    {"POST", "/apply-template", server_template, .json = true, .who = API_TEMPLATE,
     .summary = "the prompt of a conversation"},
    {"POST", "/v1/embeddings", server_off, .no_model = true, .summary = "not in this build"},
    {"GET", "/props", server_props, .summary = "the model, its template, limits and defaults"},
    {"GET", "/slots", server_slots, .summary = "the requests that wait or are being answered"},
    {"GET", "/metrics", server_metrics, .no_model = true, .summary = "Prometheus metrics"},
    {"GET", "/openapi.json", server_openapi, .no_model = true, .summary = "this description"},
    {"GET", "/health", server_health, .open = true, .no_model = true,
     .summary = "200 when requests are answered"},
    {"GET", "/readyz", server_ready, .open = true, .no_model = true,
     .summary = "200 when requests are answered"},
    {"GET", "/livez", server_live, .open = true, .no_model = true,
     .summary = "200 while the process runs"},
    {"GET", "/", server_page, .open = true, .no_model = true, .summary = "the chat page"},
};

const server_route *server_route_at(int i)
{
    return i >= 0 && (size_t)i < sizeof routes / sizeof routes[0] ? &routes[i] : NULL;
}

static void fail(call *c, const err *e, const char *param)
{
    api_fault f;
    (void)api_fail_err(&f, e, param);
    server_fail(c, &f);
}

/* ---- what is here ---- */

static void write_model(const call *c, out_buf *o)
{
    const server *s = c->s;
    out_text(o, "{\"id\":");
    out_string(o, s->names[0], strlen(s->names[0]));
    out_printf(o, ",\"object\":\"model\",\"created\":%lld,\"owned_by\":\"tmforge\"",
               (long long)s->created);
    if (atomic_load(&s->ready)) out_printf(o, ",\"max_model_len\":%d", s->m.session_len);
    out_bytes(o, "}", 1);
}

void server_models(call *c)
{
    out_text(&c->a->body, "{\"object\":\"list\",\"data\":[");
    write_model(c, &c->a->body);
    out_text(&c->a->body, "]}");
    server_json(c, 200);
}

void server_model_one(call *c)
{
    if (!server_is_ours(c, c->r->path + strlen("/v1/models/"))) return;
    write_model(c, &c->a->body);
    server_json(c, 200);
}

void server_live(call *c)
{
    out_text(&c->a->body, "{\"status\":\"ok\"}");
    server_json(c, 200);
}

void server_ready(call *c)
{
    server *s = c->s;
    err e;
    api_fault f;
    if (!atomic_load(&s->ready))
        (void)api_fail(&f, API_UNAVAILABLE, NULL, "the model is being loaded: %d %%",
                       atomic_load(&s->percent));
    else if (atomic_load(&s->draining))
        (void)api_fail(&f, API_UNAVAILABLE, NULL, "the server is shutting down");
    else if (engine_health(s->m.g, &e) != OK)
        (void)api_fail(&f, API_UNAVAILABLE, NULL, "the engine has failed");
    else {
        server_live(c);
        return;
    }
    f.retry_after_s = 5;
    server_fail(c, &f);
}

void server_health(call *c) { server_ready(c); }

void server_page(call *c)
{
    c->a->status = 200;
    c->a->fixed = serve_page;
    c->a->n_fixed = serve_page_bytes;
    http_reply_field(c->a, "Content-Type", "text/html; charset=utf-8");
    http_reply_field(c->a, "Content-Security-Policy", serve_page_csp);
    http_reply_field(c->a, "X-Content-Type-Options", "nosniff");
    http_reply_field(c->a, "Referrer-Policy", "no-referrer");
    http_reply_field(c->a, "Cache-Control", "no-cache");
}

void server_off(call *c)
{
    api_fault f;
    (void)api_fail(&f, API_UNSUPPORTED, NULL, "embeddings are not in this build");
    server_fail(c, &f);
}

void server_metrics(call *c)
{
    server *s = c->s;
    engine_stats stats;
    const bool ready = atomic_load(&s->ready);
    if (ready) engine_stats_get(s->m.g, &stats);
    const metrics_facts f = {.version = TMF_VERSION,
                             .model = s->names[0],
                             .quant = ready ? s->m.quant : "",
                             .kv_bits = s->m.kv_bits,
                             .weights_bytes = s->m.weights_bytes,
                             .kv_bytes = s->m.kv_bytes,
                             .queued_tokens = atomic_load(&s->queued),
                             .alias = s->o.alias,
                             .ready = ready && !atomic_load(&s->draining),
                             .stats = ready ? &stats : NULL};
    metrics_text(s->counts, &f, &c->a->body);
    c->a->status = 200;
    http_reply_field(c->a, "Content-Type", "text/plain; version=0.0.4; charset=utf-8");
}

static void write_template(const call *c, out_buf *o)
{
    const char *text = tokenizer_chat_template(c->s->m.t), *name = chat_name(c->s->m.c);
    out_text(o, "\"chat_template_name\":");
    out_string(o, name, strlen(name));
    out_text(o, ",\"chat_template\":");
    if (text)
        out_string(o, text, strlen(text));
    else
        out_text(o, "null");
}

void server_props(call *c)
{
    const server *s = c->s;
    out_buf *o = &c->a->body;
    engine_stats e;
    engine_stats_get(s->m.g, &e);
    out_text(o, "{\"model\":");
    out_string(o, s->names[0], strlen(s->names[0]));
    out_printf(o,
               ",\"version\":\"%s\",\"n_ctx\":%d,\"max_batch\":%d,\"max_queue\":%d,"
               "\"max_body_bytes\":%zu,\"quant\":\"%s\",\"kv_bits\":%d,\"kv_blocks_total\":%d,"
               "\"kv_blocks_used\":%d,\"kv_blocks_cached\":%d,\"block_tokens\":%d,"
               "\"requests_running\":%d,\"requests_waiting\":%d,",
               TMF_VERSION, s->m.session_len, s->m.max_batch, s->m.max_queue,
               s->o.http.max_body_bytes, s->m.quant, s->m.kv_bits, e.kv_blocks_total,
               e.kv_blocks_used, e.kv_blocks_cached, e.block_tokens, e.running, e.waiting);
    write_template(c, o);
    out_text(o, ",\"default_generation_settings\":{\"temperature\":1,\"top_p\":1,\"top_k\":0,"
                "\"min_p\":0,\"repetition_penalty\":1,\"presence_penalty\":0,"
                "\"frequency_penalty\":0,\"n\":1,\"max_tokens\":null}}");
    server_json(c, 200);
}

/* What is being answered, for who runs the server: no words, no ids of tokens. */
void server_slots(call *c)
{
    server *s = c->s;
    out_buf *o = &c->a->body;
    const double now = clock_s();
    const char *sep = "";
    out_text(o, "[");
    (void)pthread_mutex_lock(&s->lock);
    for (call *x = s->calls; x; x = x->next) {
        const int32_t n_prompt = atomic_load(&x->n_prompt), n_new = atomic_load(&x->n_new);
        if (n_prompt < 0) continue; /* not one of the engine's */
        out_printf(o,
                   "%s{\"id\":\"%s\",\"route\":\"%s\",\"state\":\"%s\",\"prompt_tokens\":%d,"
                   "\"tokens\":%d,\"seconds\":%.3f}",
                   sep, x->id, x->route->path, n_new ? "answering" : "waiting", n_prompt, n_new,
                   now - x->began);
        sep = ",";
    }
    (void)pthread_mutex_unlock(&s->lock);
    out_text(o, "]");
    server_json(c, 200);
}

/* ---- tokens and texts ---- */

static err_code encode_one(const call *c, const api_request *q, const api_prompt *p,
                           token_list *ids, err *e)
{
    const tokenizer *t = c->s->m.t;
    if (!p->text) return err_set(e, E_INPUT, "'input': expected a text, got token ids");
    if (q->add_bos && tokenizer_add_bos(t) && tokenizer_bos(t) >= 0)
        TRY(token_list_push(ids, tokenizer_bos(t), e));
    return tokenizer_encode(t, p->text, strlen(p->text), q->parse_special, ids, e);
}

static void write_ids(out_buf *o, const token_list *ids)
{
    out_bytes(o, "[", 1);
    for (int64_t i = 0; i < ids->n; i++) {
        if (i) out_bytes(o, ",", 1);
        out_int(o, ids->ids[i]);
    }
    out_bytes(o, "]", 1);
}

/* LMDeploy's keys (input_ids, length) and those of others (tokens, count): lists where the input
 * is one. */
static err_code write_encoded(const call *c, const api_request *q, out_buf *o, err *e)
{
    out_buf lengths = {0};
    const bool list = q->prompt_list;
    const char *sep = "";
    err_code rc = OK;
    out_text(o, list ? "{\"input_ids\":[" : "{\"input_ids\":");
    const size_t from = o->n - list;
    for (int32_t i = 0; i < q->n_prompts && rc == OK; i++) {
        token_list ids = {0};
        rc = encode_one(c, q, &q->prompts[i], &ids, e);
        out_text(o, sep);
        out_text(&lengths, sep);
        write_ids(o, &ids);
        out_int(&lengths, ids.n);
        token_list_free(&ids);
        sep = ",";
    }
    if (list) out_bytes(o, "]", 1);
    const size_t n = o->n - from;
    out_text(o, list ? ",\"length\":[" : ",\"length\":");
    out_bytes(o, lengths.s, lengths.n);
    out_text(o, list ? "],\"count\":[" : ",\"count\":");
    out_bytes(o, lengths.s, lengths.n);
    out_text(o, list ? "],\"tokens\":" : ",\"tokens\":");
    out_buf copy = {0};
    if (!o->failed) out_bytes(&copy, o->s + from, n);
    out_bytes(o, copy.s, copy.n);
    out_printf(o, ",\"max_model_len\":%d}", c->s->m.session_len);
    o->failed |= copy.failed || lengths.failed;
    out_free(&copy);
    out_free(&lengths);
    return rc;
}

void server_encode(call *c)
{
    api_request q;
    err e;
    if (!server_parse(c, API_ENCODE, &q)) return;
    if (server_is_ours(c, q.model)) {
        if (write_encoded(c, &q, &c->a->body, &e) == OK)
            server_json(c, 200);
        else
            fail(c, &e, "input");
    }
    api_request_free(&q);
}

void server_decode(call *c)
{
    api_request q;
    err e;
    char *text = NULL;
    size_t n = 0;
    out_buf *o = &c->a->body;
    if (!server_parse(c, API_DECODE, &q)) return;
    if (!server_is_ours(c, q.model)) {
        api_request_free(&q);
        return;
    }
    if (tokenizer_decode(c->s->m.t, q.prompts->ids, q.prompts->n_ids, q.skip_special, &text, &n,
                         &e) == OK) {
        static const char *const names[] = {"{\"text\":", ",\"content\":", ",\"prompt\":"};
        for (int i = 0; i < 3; i++) {
            out_text(o, names[i]);
            out_string(o, text, n);
        }
        out_bytes(o, "}", 1);
        server_json(c, 200);
    } else {
        fail(c, &e, "tokens");
    }
    mem_free(text);
    api_request_free(&q);
}

static err_code render(const call *c, const api_request *q, out_buf *o, err *e)
{
    const chat_request r = {.messages = q->messages,
                            .n = q->n_messages,
                            .meta_instruction = c->s->m.meta_instruction,
                            .tools = q->tools,
                            .kwargs = q->kwargs,
                            .now = (int64_t)time(NULL),
                            .add_generation = q->add_generation};
    char *text;
    token_list ids = {0};
    TRY(chat_render_request(c->s->m.c, &r, &text, e));
    const err_code rc = chat_encode_request(c->s->m.c, &r, &ids, e);
    out_text(o, "{\"prompt\":");
    out_string(o, text, strlen(text));
    out_text(o, ",\"tokens\":");
    write_ids(o, &ids);
    out_printf(o, ",\"count\":%lld}", (long long)ids.n);
    token_list_free(&ids);
    mem_free(text);
    return rc;
}

void server_template(call *c)
{
    api_request q;
    err e;
    if (!server_parse(c, API_TEMPLATE, &q)) return;
    if (server_is_ours(c, q.model)) {
        if (render(c, &q, &c->a->body, &e) == OK)
            server_json(c, 200);
        else
            fail(c, &e, "messages");
    }
    api_request_free(&q);
}

/* ---- /openapi.json ---- */

static void write_param(const api_param *p, out_buf *o)
{
    out_string(o, p->name, strlen(p->name));
    out_text(o, ":{");
    switch (p->type) {
    case API_T_BOOL: out_text(o, "\"type\":\"boolean\""); break;
    case API_T_STRING: out_text(o, "\"type\":\"string\""); break;
    case API_T_OTHER: out_bytes(o, p->schema + 1, strlen(p->schema) - 2); break;
    case API_T_INT:
    case API_T_NUMBER:
        out_printf(o, "\"type\":\"%s\",\"%s\":", p->type == API_T_INT ? "integer" : "number",
                   p->lo_open ? "exclusiveMinimum" : "minimum");
        out_number(o, p->lo);
        out_text(o, ",\"maximum\":");
        out_number(o, p->hi);
        break;
    case API_T_IGNORED:
    case API_T_REFUSED: out_text(o, "\"deprecated\":true"); break;
    }
    out_text(o, ",\"description\":");
    out_string(o, p->doc, strlen(p->doc));
    out_bytes(o, "}", 1);
}

static void write_params(unsigned who, out_buf *o)
{
    const api_param *p;
    const char *sep = "";
    out_text(o, ",\"requestBody\":{\"required\":true,\"content\":{\"application/json\":{\"schema\":"
                "{\"type\":\"object\",\"properties\":{");
    for (int i = 0; (p = api_param_at(i)) != NULL; i++) {
        if (!(p->who & who)) continue;
        out_text(o, sep);
        write_param(p, o);
        sep = ",";
    }
    out_text(o, "}}}}}");
}

static void write_operation(const server_route *w, out_buf *o)
{
    out_text(o, strcmp(w->method, "GET") == 0 ? "{\"get\":{" : "{\"post\":{");
    out_text(o, "\"summary\":");
    out_string(o, w->summary, strlen(w->summary));
    if (w->path[strlen(w->path) - 1] == '/' && w->path[1])
        out_text(o, ",\"parameters\":[{\"name\":\"id\",\"in\":\"path\",\"required\":true,"
                    "\"schema\":{\"type\":\"string\"}}]");
    if (w->open) out_text(o, ",\"security\":[]");
    if (w->who) write_params(w->who, o);
    out_text(o, ",\"responses\":{\"200\":{\"description\":\"the answer\"},\"default\":"
                "{\"description\":\"an error\",\"content\":{\"application/json\":{\"schema\":"
                "{\"$ref\":\"#/components/schemas/Error\"}}}}}}}");
}

void server_openapi(call *c)
{
    out_buf *o = &c->a->body;
    const server_route *w;
    out_printf(o,
               "{\"openapi\":\"3.1.0\",\"info\":{\"title\":\"tm-run serve\",\"version\":\"%s\"},"
               "\"security\":[{\"key\":[]}],\"paths\":{",
               TMF_VERSION);
    for (int i = 0; (w = server_route_at(i)) != NULL; i++) {
        const bool one = w->path[strlen(w->path) - 1] == '/' && w->path[1];
        out_printf(o, "%s\"%s%s\":", i ? "," : "", w->path, one ? "{id}" : "");
        write_operation(w, o);
    }
    out_text(o, "},\"components\":{\"securitySchemes\":{\"key\":{\"type\":\"http\",\"scheme\":"
                "\"bearer\"}},\"schemas\":{\"Error\":{\"type\":\"object\",\"required\":[\"error\"],"
                "\"properties\":{\"error\":{\"type\":\"object\",\"required\":[\"message\",\"type\","
                "\"param\",\"code\"],\"properties\":{\"message\":{\"type\":\"string\"},\"type\":"
                "{\"type\":\"string\"},\"param\":{\"type\":[\"string\",\"null\"]},\"code\":"
                "{\"type\":[\"string\",\"null\"]}}}}}}}}");
    server_json(c, 200);
}
