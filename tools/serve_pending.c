/* Until the parser of tool calls lands: all is content. Goes away with it. */
#include "formats/chat.h"
#include "runtime/serve/toolcall.h"
#include <stdlib.h>
#define W __attribute__((weak))
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
