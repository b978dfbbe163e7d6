/* Tool calls out of text: a small machine that is fed pieces of any size. What it is not sure of it
 * holds; what turns out not to be a call goes back to content as it came. */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/toolcall_internal.h"

/* ---- buffers and events ---- */

err_code toolcall_buf_add(toolcall_buf *b, const char *s, size_t n, err *e)
{
    if (b->n + n + 1 > b->cap) {
        char *more;
        const size_t cap = 2 * (b->n + n) + 64;
        TRY(mem_alloc((void **)&more, cap, 1, "tool call", e));
        if (b->n) memcpy(more, b->p, b->n);
        mem_free(b->p);
        b->p = more;
        b->cap = cap;
    }
    if (n) memcpy(b->p + b->n, s, n);
    b->n += n;
    b->p[b->n] = '\0';
    return OK;
}

void toolcall_buf_drop(toolcall_buf *b, size_t n)
{
    if (!n) return;
    memmove(b->p, b->p + n, b->n - n + 1);
    b->n -= n;
}

err_code toolcall_tell(toolcall *t, toolcall_kind kind, const char *s, size_t n)
{
    if (!n) return OK;
    const toolcall_event ev = {kind, kind == TOOLCALL_CONTENT ? -1 : t->calls - 1, s, n};
    return t->fn(t->ud, &ev, t->e);
}

bool toolcall_begins(const toolcall_buf *b, const char *what, bool *wait)
{
    const size_t n = strlen(what), have = b->n < n ? b->n : n;
    const bool same = !memcmp(b->p, what, have);
    if (same && have < n) *wait = true;
    return same && have == n;
}

/* ---- begin and end of a call ---- */

#define DEEPSEEK_OPEN "<｜tool▁calls▁begin｜>"

static const char *opener(chat_tools f, int i)
{
    static const char *const all[][3] = {[CHAT_TOOLS_NONE] = {NULL},
                                         [CHAT_TOOLS_HERMES] = {"<tool_call>", NULL},
                                         [CHAT_TOOLS_INTERNLM2] = {"<|action_start|><|plugin|>",
                                                                   "<|action_start|> <|plugin|>",
                                                                   NULL},
                                         [CHAT_TOOLS_LLAMA3] = {"<|python_tag|>", NULL},
                                         [CHAT_TOOLS_MISTRAL] = {"[TOOL_CALLS]", NULL},
                                         [CHAT_TOOLS_DEEPSEEK] = {DEEPSEEK_OPEN, NULL}};
    return all[f][i];
}

static const char *closer(chat_tools f)
{
    if (f == CHAT_TOOLS_HERMES) return "</tool_call>";
    if (f == CHAT_TOOLS_INTERNLM2) return "<|action_end|>";
    return f == CHAT_TOOLS_LLAMA3 ? ";" : ",";
}

void toolcall_object_begin(toolcall *t)
{
    t->at = AT_OBJECT;
    t->part = OBJ_BEGIN;
    t->key = KEY_OTHER;
    t->depth = 0;
    t->in_string = t->escaped = t->begun = false;
    t->from = t->sent = t->args_from = t->args_to = 0;
    t->raw.n = 0;
    t->name[0] = '\0';
}

err_code toolcall_call_begin(toolcall *t)
{
    t->calls++;
    t->begun = true;
    return toolcall_tell(t, TOOLCALL_BEGIN, t->name, strlen(t->name));
}

err_code toolcall_give_back(toolcall *t)
{
    const bool begun = t->begun;
    err_code rc = OK;
    t->at = AT_CONTENT;
    t->list = false;
    t->started = true;
    if (!begun) {
        rc = toolcall_buf_add(&t->back, t->raw.p, t->raw.n, t->e);
        if (rc == OK) rc = toolcall_tell(t, TOOLCALL_CONTENT, t->back.p, t->back.n);
    }
    t->back.n = t->raw.n = 0;
    t->begun = false;
    return rc;
}

/* ---- around it ---- */

/* How much of the end of s could be the beginning of `what`. */
static size_t tail_of(const toolcall_buf *s, const char *what)
{
    const size_t n = strlen(what);
    for (size_t k = n - 1 < s->n ? n - 1 : s->n; k > 0; k--)
        if (!memcmp(s->p + s->n - k, what, k)) return k;
    return 0;
}

/* Takes what opens a call off the input; spaces before it go with it. */
static err_code open_call(toolcall *t, size_t at, size_t n)
{
    size_t end = at;
    while (end > 0 && toolcall_is_space(t->in.p[end - 1])) end--;
    TRY(toolcall_tell(t, TOOLCALL_CONTENT, t->in.p, end));
    t->back.n = 0;
    TRY(toolcall_buf_add(&t->back, t->in.p + end, at + n - end, t->e));
    toolcall_buf_drop(&t->in, at + n);
    t->raw.n = 0;
    t->begun = false;
    t->at = AT_OPEN;
    return OK;
}

static err_code run_content(toolcall *t, bool last, bool *more)
{
    size_t keep = 0, best = t->in.n, len = 0;
    const size_t lead = toolcall_spaces(&t->in);
    if (t->format == CHAT_TOOLS_LLAMA3 && !t->started && lead < t->in.n && t->in.p[lead] == '{') {
        *more = true;
        return open_call(t, lead, 0);
    }
    for (int i = 0; opener(t->format, i); i++) {
        const char *open = opener(t->format, i);
        const char *p = t->in.n ? memmem(t->in.p, t->in.n, open, strlen(open)) : NULL;
        const size_t k = tail_of(&t->in, opener(t->format, i));
        if (k > keep) keep = k;
        if (!p || (size_t)(p - t->in.p) >= best) continue;
        best = (size_t)(p - t->in.p);
        len = strlen(opener(t->format, i));
    }
    if (len) {
        *more = true;
        return open_call(t, best, len);
    }
    size_t end = last ? t->in.n : t->in.n - keep;
    while (!last && t->format != CHAT_TOOLS_NONE && end > 0 && toolcall_is_space(t->in.p[end - 1]))
        end--;
    if (last && t->calls && toolcall_spaces(&t->in) == t->in.n) {
        toolcall_buf_drop(&t->in, t->in.n); /* line ends behind calls */
        return OK;
    }
    if (end > lead) t->started = true;
    TRY(toolcall_tell(t, TOOLCALL_CONTENT, t->in.p, end));
    toolcall_buf_drop(&t->in, end);
    return OK;
}

err_code toolcall_skip_spaces(toolcall *t)
{
    const size_t n = toolcall_spaces(&t->in);
    if (n) TRY(toolcall_buf_add(&t->back, t->in.p, n, t->e));
    toolcall_buf_drop(&t->in, n);
    return OK;
}

static err_code run_open(toolcall *t, bool *more)
{
    TRY(toolcall_skip_spaces(t));
    if (!t->in.n) return OK;
    *more = true;
    const char c = t->in.p[0];
    if (c == '{') {
        toolcall_object_begin(t);
        return OK;
    }
    if (t->format == CHAT_TOOLS_MISTRAL && c == '[' && !t->list) {
        t->list = true;
        TRY(toolcall_buf_add(&t->back, t->in.p, 1, t->e));
        toolcall_buf_drop(&t->in, 1);
        return OK;
    }
    if (t->format == CHAT_TOOLS_MISTRAL && !t->list) {
        t->at = AT_NAME;
        return OK;
    }
    if (t->format == CHAT_TOOLS_LLAMA3) {
        t->at = AT_CODE;
        return OK;
    }
    if (t->format == CHAT_TOOLS_HERMES && c == '<') {
        t->at = AT_FUNCTION;
        return OK;
    }
    return toolcall_give_back(t);
}

/* name[ARGS]{...} or name{...} */
static err_code run_name(toolcall *t, bool last, bool *more)
{
    const char *brace = memchr(t->in.p, '{', t->in.n);
    const size_t n = brace ? (size_t)(brace - t->in.p) : t->in.n;
    if (!brace && !last && n <= TOOLCALL_MAX_NAME) return OK;
    *more = true;
    const char *mark = t->in.n ? memmem(t->in.p, t->in.n, "[ARGS]", 6) : NULL;
    size_t len = mark && mark < t->in.p + n ? (size_t)(mark - t->in.p) : n;
    while (len && toolcall_is_space(t->in.p[len - 1])) len--;
    if (!brace || !len || len > TOOLCALL_MAX_NAME) {
        TRY(toolcall_buf_add(&t->back, t->in.p, t->in.n, t->e));
        toolcall_buf_drop(&t->in, t->in.n);
        return toolcall_give_back(t);
    }
    toolcall_object_begin(t);
    memcpy(t->name, t->in.p, len);
    t->name[len] = '\0';
    t->key = KEY_BARE;
    toolcall_buf_drop(&t->in, n);
    return toolcall_call_begin(t);
}

/* Behind a call: its closing tag, or a sign that there is another. */
static err_code run_close(toolcall *t, bool last, bool *more)
{
    const char *end = closer(t->format);
    const size_t lead = toolcall_spaces(&t->in), n = strlen(end);
    const char *p = t->in.n ? t->in.p + lead : "";
    const size_t left = t->in.n - lead;
    if (left < n && !memcmp(p, end, left) && !last) return OK;
    *more = left > 0;
    const bool closed = left >= n && !memcmp(p, end, n);
    const bool tagged = t->format == CHAT_TOOLS_HERMES || t->format == CHAT_TOOLS_INTERNLM2;
    t->at = AT_CONTENT;
    t->started = true;
    if (closed) {
        toolcall_buf_drop(&t->in, lead + n);
        if (!tagged && (t->list || t->format == CHAT_TOOLS_LLAMA3)) {
            t->back.n = 0;
            TRY(toolcall_buf_add(&t->back, end, n, t->e));
            t->at = AT_OPEN;
        }
        return OK;
    }
    if (t->list && left && *p == ']') {
        t->list = false;
        toolcall_buf_drop(&t->in, lead + 1);
    }
    if (tagged && last && left && left < n && !memcmp(p, end, left))
        toolcall_buf_drop(&t->in, t->in.n);
    return OK;
}

/* ---- the whole ---- */

err_code toolcall_open(toolcall **out, chat_tools format, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "tool calls", e));
    (*out)->format = format;
    return OK;
}

void toolcall_close(toolcall **t)
{
    if (!*t) return;
    mem_free((*t)->in.p);
    mem_free((*t)->back.p);
    mem_free((*t)->raw.p);
    mem_free(*t);
    *t = NULL;
}

void toolcall_tools(toolcall *t, const cJSON *tools) { t->tools = tools; }

int toolcall_count(const toolcall *t) { return t->calls; }

static err_code run(toolcall *t, bool last)
{
    const bool deepseek = t->format == CHAT_TOOLS_DEEPSEEK;
    for (bool more = true; more;) {
        const place at = t->at;
        const size_t left = t->in.n;
        more = false;
        switch (at) {
        case AT_CONTENT: TRY(run_content(t, last, &more)); break;
        case AT_OPEN:
            TRY(deepseek ? toolcall_deepseek_open(t, last, &more) : run_open(t, &more));
            break;
        case AT_NAME:
            TRY(deepseek ? toolcall_deepseek_name(t, last, &more) : run_name(t, last, &more));
            break;
        case AT_OBJECT: TRY(toolcall_run_object(t)); break;
        case AT_CLOSE:
            TRY(deepseek ? toolcall_deepseek_close(t, last, &more) : run_close(t, last, &more));
            break;
        case AT_FUNCTION: TRY(toolcall_run_function(t, last, &more)); break;
        case AT_TAGS: TRY(toolcall_run_tags(t, last, &more)); break;
        case AT_CODE:
            if (t->in.n > TOOLCALL_MAX_BYTES || last) TRY(toolcall_run_code(t));
            break;
        }
        more = more || t->at != at || (t->in.n && t->in.n != left);
    }
    return OK;
}

err_code toolcall_feed(toolcall *t, const char *text, size_t n, toolcall_fn fn, void *ud, err *e)
{
    t->fn = fn;
    t->ud = ud;
    t->e = e;
    TRY(toolcall_buf_add(&t->in, text, n, e));
    return run(t, false);
}

err_code toolcall_end(toolcall *t, toolcall_fn fn, void *ud, err *e)
{
    t->fn = fn;
    t->ud = ud;
    t->e = e;
    TRY(toolcall_buf_add(&t->in, "", 0, e));
    TRY(run(t, true));
    if (t->at == AT_OPEN && t->list && t->format == CHAT_TOOLS_DEEPSEEK) t->back.n = 0;
    if (t->at == AT_OBJECT || t->at == AT_OPEN) {
        TRY(toolcall_give_back(t));
        return run(t, true);
    }
    return OK;
}
