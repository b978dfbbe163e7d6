/* Until the chat templates and the parser of tool calls land: plain conversations, no calls. Goes away with them. */
#include "formats/chat.h"
#include "runtime/serve/toolcall.h"
#include <stdlib.h>
#define W __attribute__((weak))
W err_code chat_encode_request(const chat *c, const chat_request *r, token_list *out, err *e)
{
    return chat_encode(c, r->messages, r->n, r->meta_instruction, r->add_generation, out, e);
}
W err_code chat_render_request(const chat *c, const chat_request *r, char **out, err *e)
{
    return chat_render(c, r->messages, r->n, r->meta_instruction, r->add_generation, out, e);
}
W const char *chat_kwarg_at(int i)
{
    (void)i;
    return NULL;
}
W chat_tools chat_tool_format(const chat *c)
{
    (void)c;
    return CHAT_TOOLS_NONE;
}
struct toolcall {
    int x;
};
W err_code toolcall_open(toolcall **out, chat_tools f, err *e)
{
    (void)f;
    (void)e;
    *out = calloc(1, 4);
    return OK;
}
W void toolcall_close(toolcall **p)
{
    if (p) {
        free(*p);
        *p = NULL;
    }
}
W err_code toolcall_feed(toolcall *p, const char *t, size_t n, toolcall_fn fn, void *ud, err *e)
{
    (void)p;
    toolcall_event ev = {TOOLCALL_CONTENT, -1, t, n};
    return fn(ud, &ev, e);
}
W err_code toolcall_end(toolcall *p, toolcall_fn fn, void *ud, err *e)
{
    (void)p;
    (void)fn;
    (void)ud;
    (void)e;
    return OK;
}
W int toolcall_count(const toolcall *p)
{
    (void)p;
    return 0;
}
