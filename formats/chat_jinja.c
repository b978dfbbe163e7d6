/* Conversations by the directory's own template. Its output comes with marks of who wrote each
 * byte: only what the template wrote itself can become special tokens. */
#include <string.h>

#include "base/mem.h"
#include "formats/chat_internal.h"

/* The mark of the earlier answer behind which the next turns are wanted. */
enum { MARK_ANSWER = 2 };
#define SAME_DAY 1721952000 /* 2024-07-26: a prompt that changes overnight serves nobody */

/* Keys of chat_template_kwargs: what published templates look at. */
static const char *const kwargs[] = {
    "enable_thinking",    "thinking",          "thinking_budget",    "reasoning_effort",
    "reasoning_strength", "date_string",       "current_date",       "knowledge_cutoff",
    "model_identity",     "documents",         "builtin_tools",      "tools_in_user_message",
    "add_vision_id",      "drop_thinking",     "preserved_thinking", "truncate_history_thinking",
    "clear_thinking",     "keep_past_thinking"};

const char *chat_kwarg_at(int i)
{
    return i >= 0 && i < (int)(sizeof kwargs / sizeof *kwargs) ? kwargs[i] : NULL;
}

/* ---- what the template sees ---- */

/* Templates build special tokens from roles: the usual ones are theirs, others the user's words. */
static uint8_t role_mark(const char *role)
{
    static const char *const own[] = {"system",    "user",    "assistant",   "tool",
                                      "developer", "ipython", "environment", "function"};
    for (size_t i = 0; i < sizeof own / sizeof *own; i++)
        if (!strcmp(own[i], role)) return JINJA_OWN;
    return JINJA_DATA;
}

static err_code set_text(jinja_scope *s, jinja_value *map, const char *key, const char *text,
                         uint8_t mark, err *e)
{
    jinja_value *v;
    TRY(jinja_string(s, &v, text, strlen(text), mark, e));
    return jinja_map_set(s, map, key, v, e);
}

/* A call's function: its arguments are a string in the API, but templates are written for the
 * object. */
static err_code make_function(jinja_scope *s, jinja_value **out, const cJSON *f, err *e)
{
    const cJSON *o;
    jinja_value *v;
    err ignored;
    TRY(jinja_map(s, out, e));
    cJSON_ArrayForEach(o, f)
    {
        const bool args = cJSON_IsString(o) && !strcmp(o->string, "arguments");
        if (!args ||
            jinja_json(s, &v, o->valuestring, strlen(o->valuestring), JINJA_DATA, &ignored) != OK)
            TRY(jinja_cjson(s, &v, o, JINJA_DATA, e));
        TRY(jinja_map_set(s, *out, o->string, v, e));
    }
    return OK;
}

static err_code make_calls(jinja_scope *s, jinja_value **out, const cJSON *calls, err *e)
{
    const cJSON *c, *o;
    jinja_value *call, *v;
    TRY(jinja_list(s, out, e));
    cJSON_ArrayForEach(c, calls)
    {
        TRY(jinja_map(s, &call, e));
        cJSON_ArrayForEach(o, c)
        {
            if (!o->string) return err_set(e, E_INPUT, "tool_calls: expected objects");
            if (cJSON_IsObject(o) && !strcmp(o->string, "function"))
                TRY(make_function(s, &v, o, e));
            else
                TRY(jinja_cjson(s, &v, o, JINJA_DATA, e));
            TRY(jinja_map_set(s, call, o->string, v, e));
        }
        TRY(jinja_list_add(s, *out, call, e));
    }
    return OK;
}

static err_code make_message(jinja_scope *s, jinja_value **out, const chat_message *m, uint8_t mark,
                             err *e)
{
    jinja_value *v;
    TRY(jinja_map(s, out, e));
    TRY(set_text(s, *out, "role", m->role, role_mark(m->role), e));
    /* no content is empty content: templates add to it */
    TRY(set_text(s, *out, "content", m->content ? m->content : "", mark, e));
    if (m->name) TRY(set_text(s, *out, "name", m->name, JINJA_DATA, e));
    if (m->tool_call_id) TRY(set_text(s, *out, "tool_call_id", m->tool_call_id, JINJA_DATA, e));
    if (m->reasoning) TRY(set_text(s, *out, "reasoning_content", m->reasoning, JINJA_DATA, e));
    if (!m->tool_calls || !m->tool_calls->child) return OK;
    TRY(make_calls(s, &v, m->tool_calls, e));
    return jinja_map_set(s, *out, "tool_calls", v, e);
}

static err_code set_token(jinja_scope *s, const char *name, const tokenizer *t, int32_t id, err *e)
{
    jinja_value *v;
    size_t n;
    if (id < 0) return OK;
    const char *text = tokenizer_string(t, id, &n);
    TRY(jinja_string(s, &v, text, n, JINJA_OWN, e));
    return jinja_set(s, name, v, e);
}

static err_code set_names(const chat *c, jinja_scope *s, const chat_request *r, err *e)
{
    jinja_value *v;
    const cJSON *o;
    TRY(set_token(s, "bos_token", c->t, tokenizer_bos(c->t), e));
    TRY(set_token(s, "eos_token", c->t, chat_eos(c->t), e));
    TRY(set_token(s, "unk_token", c->t, c->t->unk, e));
    TRY(jinja_bool(s, &v, r->add_generation, e));
    TRY(jinja_set(s, "add_generation_prompt", v, e));
    TRY(jinja_none(s, &v, e));
    TRY(jinja_set(s, "documents", v, e));
    if (r->tools && r->tools->child) TRY(jinja_cjson(s, &v, r->tools, JINJA_DATA, e));
    TRY(jinja_set(s, "tools", v, e));
    cJSON_ArrayForEach(o, r->kwargs)
    {
        TRY(jinja_cjson(s, &v, o, JINJA_DATA, e));
        TRY(jinja_set(s, o->string, v, e));
    }
    jinja_now(s, r->now ? r->now : SAME_DAY);
    return OK;
}

static err_code set_messages(jinja_scope *s, const chat_request *r, int64_t answer, err *e)
{
    jinja_value *list, *v;
    TRY(jinja_list(s, &list, e));
    if (r->meta_instruction && (!r->n || strcmp(r->messages[0].role, "system") != 0)) {
        const chat_message system = {.role = "system", .content = r->meta_instruction};
        TRY(make_message(s, &v, &system, JINJA_DATA, e));
        TRY(jinja_list_add(s, list, v, e));
    }
    for (int64_t i = 0; i < r->n; i++) {
        TRY(make_message(s, &v, &r->messages[i], i == answer ? MARK_ANSWER : JINJA_DATA, e));
        TRY(jinja_list_add(s, list, v, e));
    }
    return jinja_set(s, "messages", list, e);
}

static err_code render(const chat *c, const chat_request *r, int64_t answer, jinja_text *out,
                       err *e)
{
    jinja_scope *s;
    TRY(jinja_scope_open(&s, e));
    err_code rc = set_names(c, s, r, e);
    if (rc == OK) rc = set_messages(s, r, answer, e);
    if (rc == OK) {
        rc = jinja_render(c->tmpl, s, out, e);
        if (rc != OK) err_wrap(e, "chat template");
    }
    jinja_scope_close(&s);
    return rc;
}

/* ---- to tokens ---- */

/* Runs of one writer: the template's may hold special tokens. */
static err_code lay_out_text(chat_layout *l, const jinja_text *t, size_t from, err *e)
{
    for (size_t at = from, end; at < t->n; at = end) {
        const bool own = t->mark[at] == JINJA_OWN;
        for (end = at + 1; end < t->n && (t->mark[end] == JINJA_OWN) == own;) end++;
        TRY(own ? chat_put_own(l, t->text + at, end - at, e)
                : chat_put_text(l, t->text + at, end - at, e));
    }
    return OK;
}

err_code chat_jinja_lay_out(const chat *c, chat_layout *l, const chat_request *r, err *e)
{
    jinja_text t = {0};
    err_code rc = render(c, r, -1, &t, e);
    if (rc == OK) rc = lay_out_text(l, &t, 0, e);
    jinja_text_free(&t);
    return rc;
}

/* An exchange is made up in front; what stands behind its answer is the same in every
 * conversation, as far as templates look at roles and places only. */
err_code chat_jinja_next(const chat *c, chat_layout *l, const chat_message *m, int64_t n, err *e)
{
    jinja_text t = {0};
    chat_message *all;
    size_t from;
    TRY(mem_alloc((void **)&all, (size_t)n + 2, sizeof *all, "chat", e));
    all[0] = (chat_message){.role = "user", .content = "x"};
    all[1] = (chat_message){.role = "assistant", .content = "x"};
    if (n) memcpy(all + 2, m, (size_t)n * sizeof *all);
    const chat_request r = {.messages = all, .n = n + 2, .add_generation = true};
    err_code rc = render(c, &r, 1, &t, e);
    for (from = t.n; from > 0 && t.mark[from - 1] != MARK_ANSWER;) from--;
    if (rc == OK && !from)
        rc = err_set(e, E_UNSUPPORTED, "the chat template does not show earlier answers");
    if (rc == OK) rc = lay_out_text(l, &t, from, e);
    jinja_text_free(&t);
    mem_free(all);
    return rc;
}

/* ---- what can be told from the template ---- */

static chat_tools format_of(const char *text)
{
    if (strstr(text, "<|action_start|>")) return CHAT_TOOLS_INTERNLM2;
    if (strstr(text, "[TOOL_CALLS]")) return CHAT_TOOLS_MISTRAL;
    if (strstr(text, "<｜tool▁calls▁begin｜>")) return CHAT_TOOLS_DEEPSEEK;
    if (strstr(text, "<tool_call>")) return CHAT_TOOLS_HERMES;
    if (strstr(text, "<|python_tag|>") || strstr(text, "\"parameters\": "))
        return CHAT_TOOLS_LLAMA3;
    return CHAT_TOOLS_HERMES;
}

/* "tools" as a name of its own. */
static bool speaks_of_tools(const char *text)
{
    for (const char *p = text; (p = strstr(p, "tools")) != NULL; p += 5) {
        const char before = p > text ? p[-1] : ' ', after = p[5];
        if ((before == ' ' || before == '(') && (after == ' ' || after == '|' || after == ')'))
            return true;
    }
    return false;
}

void chat_jinja_learn(chat *c)
{
    const char *text = c->text ? c->text : tokenizer_chat_template(c->t);
    const chat_message more = {.role = "user", .content = "x"};
    chat_layout l = {.t = c->t};
    err e;
    c->knows_tools = speaks_of_tools(text);
    c->dated = strstr(text, "strftime_now") != NULL;
    if (c->knows_tools) c->format = format_of(text);
    if (!c->row && chat_jinja_next(c, &l, &more, 1, &e) == OK)
        for (int64_t i = 0; i < l.n && c->end_id < 0; i++) c->end_id = l.seg[i].id;
    chat_layout_free(&l);
}
