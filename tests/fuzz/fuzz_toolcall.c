/* A format, then any bytes as an answer: the same events, joined, from one piece and from pieces of
 * one to seven bytes; and nothing is lost where no call began. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/serve/toolcall.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

typedef struct {
    char *p;
    size_t n;
    int last; /* kind and call of what was written last */
} joined;

static err_code add(void *ud, const toolcall_event *ev, err *e)
{
    joined *j = ud;
    const int now = (int)ev->kind + 4 * ev->index;
    (void)e;
    need(ev->n > 0 && ev->index >= -1 && (ev->kind == TOOLCALL_CONTENT) == (ev->index < 0));
    if (j->last != now) j->n += (size_t)sprintf(j->p + j->n, "\1%d\1", now);
    j->last = now;
    memcpy(j->p + j->n, ev->text, ev->n);
    j->n += ev->n;
    return OK;
}

static int tell(joined *j, chat_tools f, const char *text, size_t n, size_t step)
{
    toolcall *t;
    err e;
    *j = (joined){.p = calloc(n + 64, 24), .last = -100};
    need(toolcall_open(&t, f, &e) == OK);
    for (size_t i = 0; i < n; i += step)
        need(toolcall_feed(t, text + i, i + step < n ? step : n - i, add, j, &e) == OK);
    need(toolcall_end(t, add, j, &e) == OK);
    const int calls = toolcall_count(t);
    toolcall_close(&t);
    return calls;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    joined whole, parts;
    if (n < 2 || n > 4000) return 0;
    const chat_tools f = (chat_tools)(data[0] % 6);
    const char *text = (const char *)data + 1;
    const int calls = tell(&whole, f, text, n - 1, n);
    for (size_t step = 1; step <= 7; step += 3) {
        need(tell(&parts, f, text, n - 1, step) == calls);
        need(parts.n == whole.n && !memcmp(parts.p, whole.p, whole.n));
        free(parts.p);
    }
    if (!calls) { /* all of it is content */
        const size_t head = (size_t)sprintf(whole.p + whole.n + 1, "\1%d\1", TOOLCALL_CONTENT - 4);
        need(whole.n == head + n - 1 && !memcmp(whole.p + head, text, n - 1));
    }
    free(whole.p);
    return 0;
}
