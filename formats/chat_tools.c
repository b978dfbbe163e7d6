/* Tools for templates that know nothing of them: told in words, called and answered in text, in the
 * way of CHAT_TOOLS_HERMES. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "formats/chat_internal.h"

static const cJSON *get(const cJSON *o, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(o, key);
}

bool chat_needs_plain(const chat *c, const chat_request *r)
{
    if (c->knows_tools) return false;
    if (r->tools && r->tools->child) return true;
    for (int64_t i = 0; i < r->n; i++)
        if ((r->messages[i].tool_calls && r->messages[i].tool_calls->child) ||
            (r->messages[i].role && !strcmp(r->messages[i].role, "tool")))
            return true;
    return false;
}

static err_code add(tok_buf *b, const char *s, err *e) { return tok_buf_add(b, s, strlen(s), e); }

static err_code add_json(tok_buf *b, const cJSON *o, err *e)
{
    char *s;
    TRY(json_print(&s, o, false, e));
    const err_code rc = add(b, s, e);
    mem_free(s);
    return rc;
}

static err_code tell_tools(tok_buf *b, const cJSON *tools, err *e)
{
    const cJSON *t;
    TRY(add(b, "You can call tools. These are there, each with the JSON schema of its arguments:\n",
            e));
    cJSON_ArrayForEach(t, tools)
    {
        TRY(add_json(b, get(t, "function") ? get(t, "function") : t, e));
        TRY(add(b, "\n", e));
    }
    return add(b,
               "To call one, write its name and arguments as JSON between tags:\n"
               "<tool_call>\n{\"name\": \"...\", \"arguments\": {...}}\n</tool_call>",
               e);
}

static err_code tell_call(tok_buf *b, const cJSON *call, err *e)
{
    const cJSON *f = get(call, "function"), *name = get(f, "name"), *args = get(f, "arguments");
    if (!cJSON_IsString(name)) return err_set(e, E_INPUT, "tool_calls: a call without a name");
    TRY(add(b, b->n ? "\n<tool_call>\n{\"name\": " : "<tool_call>\n{\"name\": ", e));
    TRY(add_json(b, name, e));
    TRY(add(b, ", \"arguments\": ", e));
    if (cJSON_IsString(args))
        TRY(add(b, args->valuestring, e));
    else if (args)
        TRY(add_json(b, args, e));
    else
        TRY(add(b, "{}", e));
    return add(b, "}\n</tool_call>", e);
}

/* Takes over the text; m borrows it. */
static err_code keep(chat_plain *p, chat_message *m, tok_buf *b, err *e)
{
    const err_code rc = tok_buf_add(b, "", 1, e);
    if (rc != OK) {
        tok_buf_free(b);
        return rc;
    }
    p->text[p->n_text++] = b->p;
    m->content = b->p;
    *b = (tok_buf){0};
    return OK;
}

static err_code tell_message(chat_plain *p, const chat_message *from, chat_message *m, err *e)
{
    tok_buf b = {0};
    const cJSON *call;
    const bool tool = !strcmp(from->role, "tool");
    *m = (chat_message){.role = tool ? "user" : from->role, .content = from->content};
    if (!tool && !(from->tool_calls && from->tool_calls->child)) return OK;
    err_code rc = OK;
    if (tool) {
        rc = add(&b, "<tool_response>\n", e);
        if (rc == OK) rc = add(&b, from->content ? from->content : "", e);
        if (rc == OK) rc = add(&b, "\n</tool_response>", e);
    } else {
        if (from->content) rc = add(&b, from->content, e);
        cJSON_ArrayForEach(call, from->tool_calls) if (rc == OK) rc = tell_call(&b, call, e);
    }
    if (rc == OK) return keep(p, m, &b, e);
    tok_buf_free(&b);
    return rc;
}

/* Neighbours of one role, which tools' answers make, become one message. */
static err_code join(chat_plain *p, chat_message *m, const char *more, err *e)
{
    tok_buf b = {0};
    err_code rc = add(&b, m->content, e);
    if (rc == OK) rc = add(&b, "\n", e);
    if (rc == OK) rc = add(&b, more, e);
    if (rc == OK) return keep(p, m, &b, e);
    tok_buf_free(&b);
    return rc;
}

/* The tools in front of the first system message or (in_user) the first user's words. */
static err_code place_tools(chat_plain *p, const chat_request *r, bool in_user, err *e)
{
    tok_buf b = {0};
    const char *role = in_user ? "user" : "system";
    chat_message *m = NULL;
    const char *meta = r->meta_instruction;
    for (int64_t i = 0; i < p->r.n && !m; i++)
        if (!strcmp(p->m[i].role, role)) m = &p->m[i];
    if (!m || (!in_user && m != p->m)) {
        memmove(p->m + 1, p->m, (size_t)p->r.n * sizeof *p->m);
        m = p->m;
        *m = (chat_message){.role = role, .content = !in_user && meta ? meta : ""};
        p->r.n++;
        if (!in_user) p->r.meta_instruction = NULL;
    }
    err_code rc = OK;
    if (!in_user && *m->content) {
        rc = add(&b, m->content, e);
        if (rc == OK) rc = add(&b, "\n\n", e);
    }
    if (rc == OK) rc = tell_tools(&b, r->tools, e);
    if (rc == OK && in_user && *m->content) {
        rc = add(&b, "\n\n", e);
        if (rc == OK) rc = add(&b, m->content, e);
    }
    if (rc == OK) return keep(p, m, &b, e);
    tok_buf_free(&b);
    return rc;
}

err_code chat_plain_make(chat_plain *p, const chat_request *r, bool in_user, err *e)
{
    *p = (chat_plain){.r = *r};
    p->r.tools = NULL;
    p->r.n = 0;
    TRY(mem_alloc((void **)&p->m, (size_t)r->n + 1, sizeof *p->m, "chat", e));
    TRY(mem_alloc((void **)&p->text, 2 * (size_t)r->n + 2, sizeof *p->text, "chat", e));
    p->r.messages = p->m;
    for (int64_t i = 0; i < r->n; i++) {
        chat_message m;
        const bool tool = !strcmp(r->messages[i].role, "tool");
        TRY(tell_message(p, &r->messages[i], &m, e));
        if (tool && i && !strcmp(r->messages[i - 1].role, "tool"))
            TRY(join(p, &p->m[p->r.n - 1], m.content, e));
        else
            p->m[p->r.n++] = m;
    }
    return r->tools && r->tools->child ? place_tools(p, r, in_user, e) : OK;
}

void chat_plain_free(chat_plain *p)
{
    for (int64_t i = 0; i < p->n_text; i++) mem_free(p->text[i]);
    mem_free(p->text);
    mem_free(p->m);
    *p = (chat_plain){0};
}
