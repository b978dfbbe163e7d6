/* JSON of answers, in the words of each route. A chunk is made without a tree and without memory
 * of its own: the buffers of a choice and of the stream are used again. */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/server_run.h"

/* ---- log-probabilities ---- */

/* A token's bytes as they stand in text; of a special token its name. */
static const char *token_text(const run *r, int32_t id, size_t *n)
{
    const tokenizer *t = r->c->s->m.t;
    if (tokenizer_is_special(t, id)) return tokenizer_string(t, id, n);
    return tokenizer_piece(t, id, n);
}

static void write_token(const run *r, int32_t id, float logprob, out_buf *o)
{
    size_t n;
    const char *s = token_text(r, id, &n);
    out_text(o, "{\"token\":");
    out_string(o, s, n);
    out_text(o, ",\"logprob\":");
    out_float(o, logprob < -9999.0f ? -9999.0f : logprob);
    out_text(o, ",\"bytes\":[");
    for (size_t i = 0; i < n; i++) {
        if (i) out_bytes(o, ",", 1);
        out_int(o, (unsigned char)s[i]);
    }
    out_bytes(o, "]", 1);
}

/* An item of chat's logprobs.content. */
static void write_chat_prob(const run *r, const answer_token *t, int32_t top, out_buf *o)
{
    if (o->n) out_bytes(o, ",", 1);
    write_token(r, t->id, t->logprob, o);
    out_text(o, ",\"top_logprobs\":[");
    for (int32_t i = 0; i < t->n_top && i < top; i++) {
        if (i) out_bytes(o, ",", 1);
        write_token(r, t->top[i].id, t->top[i].logprob, o);
        out_bytes(o, "}", 1);
    }
    out_text(o, "]}");
}

static size_t count_chars(const char *s, size_t n)
{
    size_t chars = 0;
    for (size_t i = 0; i < n; i++) chars += ((unsigned char)s[i] & 0xc0) != 0x80;
    return chars;
}

/* Alternatives as {"text": logprob}; the token itself is one of them. Two tokens may have the same
 * text (bytes that are not characters): the likelier one keeps it. */
static void write_tops(const run *r, const answer_token *t, out_buf *o)
{
    bool has_own = false;
    size_t n;
    out_bytes(o, "{", 1);
    for (int32_t i = 0; i < t->n_top; i++) {
        const char *s = token_text(r, t->top[i].id, &n);
        if (i) out_bytes(o, ",", 1);
        out_string(o, s, n);
        out_bytes(o, ":", 1);
        out_float(o, t->top[i].logprob);
        has_own |= t->top[i].id == t->id;
    }
    if (!has_own) {
        const char *s = token_text(r, t->id, &n);
        if (t->n_top) out_bytes(o, ",", 1);
        out_string(o, s, n);
        out_bytes(o, ":", 1);
        out_float(o, t->logprob);
    }
    out_bytes(o, "}", 1);
}

/* known: false for the prompt's first token, which nothing foretells. */
static void write_completion_prob(choice *ch, const answer_token *t, bool known)
{
    out_buf *const lists[] = {&ch->tokens, &ch->token_probs, &ch->tops, &ch->offsets};
    const run *r = ch->r;
    size_t n;
    const char *s = token_text(r, t->id, &n);
    if (ch->tokens.n)
        for (int i = 0; i < 4; i++) out_bytes(lists[i], ",", 1);
    out_string(&ch->tokens, s, n);
    out_int(&ch->offsets, (int64_t)ch->n_chars);
    ch->n_chars += count_chars(s, n);
    if (known) {
        out_float(&ch->token_probs, t->logprob);
        write_tops(r, t, &ch->tops);
    } else {
        out_text(&ch->token_probs, "null");
        out_text(&ch->tops, "null");
    }
}

/* LMDeploy's [log-probability, id], one for each id that is told. */
static void write_pair(const answer_token *t, out_buf *o)
{
    out_text(o, o->n ? ",[" : "[");
    out_float(o, t->logprob);
    out_bytes(o, ",", 1);
    out_int(o, t->id);
    out_bytes(o, "]", 1);
}

void server_write_prob(choice *ch, const answer_token *t)
{
    if (ch->r->who == API_COMPLETION)
        write_completion_prob(ch, t, true);
    else if (ch->r->who == API_GENERATE)
        write_pair(t, &ch->probs);
    else
        write_chat_prob(ch->r, t, (int32_t)ch->r->q.top_logprobs, &ch->probs);
}

void server_write_prompt_probs(choice *ch)
{
    const run *r = ch->r;
    const answer_token *t;
    if (r->who == API_COMPLETION && r->q.echo && r->q.top_logprobs >= 0) {
        const answer_token first = {.id = r->prompts[ch->prompt].ids[0]};
        const int32_t n = answer_prompt(ch->a, &t);
        write_completion_prob(ch, &first, false);
        for (int32_t i = 0; i < n; i++) write_completion_prob(ch, &t[i], true);
    } else if (r->who == API_PPL) {
        const int32_t n = answer_prompt(ch->a, &t);
        for (int32_t i = 0; i < n; i++) ch->nll -= t[i].logprob;
    } else if (r->q.prompt_logprobs >= 0) {
        const int32_t n = answer_prompt(ch->a, &t);
        out_text(&ch->prompt_probs, "null");
        for (int32_t i = 0; i < n; i++)
            write_chat_prob(r, &t[i], (int32_t)r->q.prompt_logprobs, &ch->prompt_probs);
    }
}

static void write_list(out_buf *o, const char *name, const out_buf *items)
{
    out_printf(o, "\"%s\":[", name);
    out_bytes(o, items->s, items->n);
    out_bytes(o, "]", 1);
}

static void write_probs(const choice *ch, out_buf *o)
{
    const run *r = ch->r;
    if (r->q.top_logprobs < 0) {
        out_text(o, "\"logprobs\":null");
    } else if (r->who == API_COMPLETION) {
        out_text(o, "\"logprobs\":{");
        write_list(o, "tokens", &ch->tokens);
        out_bytes(o, ",", 1);
        write_list(o, "token_logprobs", &ch->token_probs);
        out_bytes(o, ",", 1);
        write_list(o, "top_logprobs", &ch->tops);
        out_bytes(o, ",", 1);
        write_list(o, "text_offset", &ch->offsets);
        out_bytes(o, "}", 1);
    } else {
        out_text(o, "\"logprobs\":{");
        write_list(o, "content", &ch->probs);
        out_text(o, ",\"refusal\":null}");
    }
}

/* ---- tool calls ---- */

void server_write_call_begin(choice *ch, const char *name, size_t n)
{
    out_buf *o = &ch->calls;
    if (ch->r->q.stream)
        out_printf(o, "%s{\"index\":%d,", o->n ? "," : "", ch->n_calls);
    else
        out_text(o, ch->n_calls ? "\"}},{" : "{");
    out_printf(o, "\"id\":\"call_%s_%d_%d\",\"type\":\"function\",\"function\":{\"name\":",
               ch->r->c->id + 4, ch->index, ch->n_calls);
    out_string(o, name, n);
    out_text(o, ch->r->q.stream ? ",\"arguments\":\"\"}}" : ",\"arguments\":\"");
    ch->n_calls++;
}

void server_write_call_args(choice *ch, const char *json, size_t n)
{
    out_buf *o = &ch->calls;
    if (!ch->r->q.stream) {
        out_escaped(o, json, n);
        return;
    }
    out_printf(o, "%s{\"index\":%d,\"function\":{\"arguments\":", o->n ? "," : "", ch->n_calls - 1);
    out_string(o, json, n);
    out_text(o, "}}");
}

/* ---- parts of every answer ---- */

static const char *or_null(const char *word, char *buf, size_t cap)
{
    if (!word || strlen(word) + 3 > cap) return "null";
    buf[0] = '"';
    memcpy(buf + 1, word, strlen(word));
    memcpy(buf + 1 + strlen(word), "\"", 2);
    return buf;
}

static void write_finish_reason(const choice *ch, out_buf *o)
{
    char word[32];
    out_printf(o, ",\"finish_reason\":%s,\"stop_reason\":", or_null(ch->finish, word, sizeof word));
    if (ch->stopped)
        out_string(o, ch->stopped, strlen(ch->stopped));
    else if (ch->at_stop_id)
        out_int(o, ch->last);
    else
        out_text(o, "null");
    if (ch->timed_out) out_text(o, ",\"timed_out\":true");
}

/* Tokens of each prompt once, whatever the number of answers to it. */
static void write_usage(const run *r, out_buf *o)
{
    int64_t prompt = 0, cached = 0, new = 0;
    for (int32_t i = 0; i < r->n_prompts; i++) prompt += r->prompts[i].n;
    for (int32_t i = 0; i < r->n; i++) {
        new += r->choices[i].n_new;
        if (i % r->q.n == 0) cached += r->choices[i].figures.n_cached;
    }
    out_printf(o,
               "\"usage\":{\"prompt_tokens\":%lld,\"completion_tokens\":%lld,\"total_tokens\":%lld,"
               "\"prompt_tokens_details\":{\"cached_tokens\":%lld},"
               "\"completion_tokens_details\":{\"reasoning_tokens\":0}}",
               (long long)prompt, (long long)new, (long long)(prompt + new), (long long)cached);
}

static void write_timings(const run *r, out_buf *o)
{
    const answer_figures *f = &r->choices[0].figures;
    const int32_t fresh = f->n_prompt - f->n_cached;
    out_printf(o,
               "\"timings\":{\"queue_ms\":%.3f,\"prompt_n\":%d,\"prompt_ms\":%.3f,"
               "\"prompt_per_second\":%.3f,\"predicted_n\":%d,\"predicted_ms\":%.3f,"
               "\"predicted_per_second\":%.3f,\"cache_n\":%d,\"preemptions\":%d}",
               1e3 * f->queue_s, fresh, 1e3 * f->prefill_s,
               f->prefill_s > 0 ? fresh / f->prefill_s : 0, f->n_new, 1e3 * f->decode_s,
               f->decode_s > 0 ? (f->n_new - 1) / f->decode_s : 0, f->n_cached, f->preemptions);
}

static void write_head(const run *r, const char *object, out_buf *o)
{
    const char *name = r->c->s->names[0];
    out_printf(o, "{\"id\":\"%s\",\"object\":\"%s\",\"created\":%lld,\"model\":\"", r->id, object,
               (long long)r->created);
    out_escaped(o, name, strlen(name));
    out_text(o, "\",");
}

static void write_ids(const out_buf *ids, out_buf *o)
{
    out_text(o, ",");
    write_list(o, "token_ids", ids);
}

/* ---- streams ---- */

static void chunk_open(const run *r, int32_t index, out_buf *o)
{
    out_text(o, "data: ");
    write_head(r, r->who == API_CHAT ? "chat.completion.chunk" : "text_completion", o);
    out_text(o, "\"choices\":[{\"index\":");
    out_int(o, index);
}

static void chunk_close(const run *r, bool with_timings, out_buf *o)
{
    out_text(o, r->q.include_usage ? "}],\"usage\":null" : "}]");
    if (with_timings) {
        out_bytes(o, ",", 1);
        write_timings(r, o);
    }
    out_text(o, "}\n\n");
}

static void write_interactive(choice *ch, out_buf *o)
{
    const run *r = ch->r;
    char word[32];
    out_text(o, r->lines ? "{\"text\":" : "data: {\"text\":");
    out_string(o, ch->content.s, ch->content.n);
    out_printf(o, ",\"tokens\":%d,\"input_tokens\":%d,\"history_tokens\":%d,\"finish_reason\":%s}",
               ch->n_new, r->c->n_prompt - r->history, r->history,
               or_null(ch->finish, word, sizeof word));
    out_text(o, r->lines ? "\n" : "\n\n");
}

/* An event of /generate, or all of its answer: what came since the last one. */
static void write_generated(const choice *ch, out_buf *o)
{
    const run *r = ch->r;
    char word[32];
    out_text(o, "{\"text\":");
    out_string(o, ch->content.s, ch->content.n);
    out_text(o, ",");
    write_list(o, "output_ids", &ch->ids);
    out_printf(o, ",\"meta_info\":{\"prompt_tokens\":%d,\"completion_tokens\":%d,", r->c->n_prompt,
               ch->n_new);
    if (ch->finish)
        out_printf(o, "\"finish_reason\":{\"type\":%s},", or_null(ch->finish, word, sizeof word));
    else
        out_text(o, "\"finish_reason\":null,");
    if (r->q.top_logprobs >= 0)
        write_list(o, "output_token_logprobs", &ch->probs);
    else
        out_text(o, "\"output_token_logprobs\":null");
    out_text(o, "}}");
}

static void write_generated_event(choice *ch, bool last, out_buf *o)
{
    const char *finish = ch->finish;
    if (!last) ch->finish = NULL; /* the end has an event of its own */
    out_text(o, "data: ");
    write_generated(ch, o);
    out_text(o, "\n\n");
    ch->finish = finish;
}

void server_write_first(choice *ch, out_buf *o)
{
    if (ch->r->who != API_CHAT) return;
    chunk_open(ch->r, ch->index, o);
    out_text(o, ",\"delta\":{\"role\":\"assistant\",\"content\":\"\"},\"logprobs\":null,"
                "\"finish_reason\":null");
    chunk_close(ch->r, false, o);
}

static void write_chat_delta(const choice *ch, out_buf *o)
{
    out_text(o, ",\"delta\":{");
    if (ch->content.n || !ch->calls.n) {
        out_text(o, "\"content\":");
        out_string(o, ch->content.s, ch->content.n);
    }
    if (ch->calls.n) {
        out_text(o, ch->content.n ? "," : "");
        write_list(o, "tool_calls", &ch->calls);
    }
    out_text(o, "},");
}

void server_write_delta(choice *ch, out_buf *o)
{
    const run *r = ch->r;
    if (r->who == API_INTERACTIVE) {
        const char *finish = ch->finish;
        ch->finish = NULL; /* the end has an event of its own */
        write_interactive(ch, o);
        ch->finish = finish;
    } else if (r->who == API_GENERATE) {
        write_generated_event(ch, false, o);
    } else {
        chunk_open(r, ch->index, o);
        if (r->who == API_CHAT) {
            write_chat_delta(ch, o);
        } else {
            out_text(o, ",\"text\":");
            out_string(o, ch->content.s, ch->content.n);
            out_bytes(o, ",", 1);
        }
        write_probs(ch, o);
        out_text(o, ",\"finish_reason\":null");
        if (r->q.return_ids) write_ids(&ch->ids, o);
        chunk_close(r, false, o);
    }
    out_buf *const sent[] = {&ch->content,     &ch->calls, &ch->probs, &ch->tokens,
                             &ch->token_probs, &ch->tops,  &ch->ids,   &ch->offsets};
    for (size_t i = 0; i < sizeof sent / sizeof sent[0]; i++) {
        o->failed |= sent[i]->failed;
        out_reset(sent[i]);
    }
}

void server_write_finish(choice *ch, out_buf *o)
{
    const run *r = ch->r;
    if (r->who == API_INTERACTIVE) {
        write_interactive(ch, o);
        return;
    }
    if (r->who == API_GENERATE) {
        write_generated_event(ch, true, o);
        return;
    }
    chunk_open(r, ch->index, o);
    out_text(o, r->who == API_CHAT ? ",\"delta\":{},\"logprobs\":null"
                                   : ",\"text\":\"\",\"logprobs\":null");
    write_finish_reason(ch, o);
    if (r->q.return_ids && ch->ids.n) write_ids(&ch->ids, o); /* of tokens without text */
    chunk_close(r, r->n_ended == r->n, o);
}

void server_write_end(run *r, out_buf *o)
{
    const char *lead = r->lines ? "" : "data: ", *tail = r->lines ? "\n" : "\n\n";
    if (r->failed) {
        out_text(o, lead);
        api_fault_json(o, &r->fault, r->c->id);
        out_text(o, tail);
    } else if (r->q.include_usage) {
        out_text(o, "data: ");
        write_head(r, r->who == API_CHAT ? "chat.completion.chunk" : "text_completion", o);
        out_text(o, "\"choices\":[],");
        write_usage(r, o);
        out_text(o, "}\n\n");
    }
    if (!r->lines) out_text(o, "data: [DONE]\n\n");
}

/* ---- whole answers ---- */

static void write_message(const choice *ch, out_buf *o)
{
    out_text(o, "\"message\":{\"role\":\"assistant\",\"content\":");
    if (ch->n_calls && ch->content.n == 0)
        out_text(o, "null");
    else
        out_string(o, ch->content.s, ch->content.n);
    out_text(o, ",\"refusal\":null");
    if (ch->n_calls) {
        out_text(o, ",\"tool_calls\":[");
        out_bytes(o, ch->calls.s, ch->calls.n);
        out_text(o, "\"}}]");
    }
    out_text(o, "},");
}

static void write_choice(const choice *ch, out_buf *o)
{
    const run *r = ch->r;
    out_printf(o, "%s{\"index\":%d,", ch->index ? "," : "", ch->index);
    if (r->who == API_CHAT) {
        write_message(ch, o);
    } else {
        out_text(o, "\"text\":");
        out_string(o, ch->content.s, ch->content.n);
        out_bytes(o, ",", 1);
    }
    write_probs(ch, o);
    write_finish_reason(ch, o);
    if (r->q.return_ids) write_ids(&ch->ids, o);
    if (r->q.prompt_logprobs >= 0) {
        out_bytes(o, ",", 1);
        write_list(o, "prompt_logprobs", &ch->prompt_probs);
    }
    out_bytes(o, "}", 1);
}

static void write_prompt_ids(const run *r, out_buf *o)
{
    out_text(o, "\"prompt_token_ids\":[");
    for (int64_t i = 0; i < r->prompts[0].n; i++) {
        if (i) out_bytes(o, ",", 1);
        out_int(o, r->prompts[0].ids[i]);
    }
    out_text(o, "],");
}

void server_write_whole(run *r, out_buf *o)
{
    for (int32_t i = 0; i < r->n; i++) {
        const choice *ch = &r->choices[i];
        o->failed |= ch->content.failed || ch->calls.failed || ch->probs.failed ||
                     ch->tokens.failed || ch->tops.failed || ch->ids.failed;
    }
    if (r->who == API_INTERACTIVE) {
        r->lines = true;
        write_interactive(r->choices, o);
        return;
    }
    if (r->who == API_GENERATE) {
        write_generated(r->choices, o);
        return;
    }
    write_head(r, r->who == API_CHAT ? "chat.completion" : "text_completion", o);
    out_text(o, "\"choices\":[");
    for (int32_t i = 0; i < r->n; i++) write_choice(&r->choices[i], o);
    out_text(o, "],");
    if (r->q.return_ids) write_prompt_ids(r, o);
    write_usage(r, o);
    out_bytes(o, ",", 1);
    write_timings(r, o);
    out_bytes(o, "}", 1);
}
