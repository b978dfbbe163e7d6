/* DeepSeek's calls: name or "function", a mark, perhaps the name and a fence, the object. */
#include <string.h>

#include "runtime/serve/toolcall_internal.h"

static const char deepseek_begin[] = "<｜tool▁call▁begin｜>";
static const char deepseek_mark[] = "<｜tool▁sep｜>";
static const char deepseek_end[] = "<｜tool▁call▁end｜>";
static const char deepseek_last[] = "<｜tool▁calls▁end｜>";

err_code toolcall_deepseek_open(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    TRY(toolcall_skip_spaces(t));
    if (!t->in.n) return OK;
    const bool begin = toolcall_begins(&t->in, deepseek_begin, &wait);
    if (begin || (t->list && toolcall_begins(&t->in, deepseek_last, &wait))) {
        const size_t n = begin ? sizeof deepseek_begin - 1 : sizeof deepseek_last - 1;
        t->at = begin ? AT_NAME : AT_CONTENT;
        t->list = begin && t->list;
        if (begin) TRY(toolcall_buf_add(&t->back, t->in.p, n, t->e));
        toolcall_buf_drop(&t->in, n);
        if (!begin) t->back.n = 0;
        return OK;
    }
    if (wait && !last) return OK;
    *more = true;
    return toolcall_give_back(t);
}

err_code toolcall_deepseek_name(toolcall *t, bool last, bool *more)
{
    const char *brace = memchr(t->in.p, '{', t->in.n);
    const size_t n = brace ? (size_t)(brace - t->in.p) : t->in.n;
    if (!brace && !last && n <= 2 * TOOLCALL_MAX_NAME) return OK;
    const char *mark = n ? memmem(t->in.p, n, deepseek_mark, sizeof deepseek_mark - 1) : NULL;
    const char *from = t->in.p, *to = mark, *behind = mark ? mark + sizeof deepseek_mark - 1 : NULL;
    *more = true;
    while (behind && brace && behind < brace && toolcall_is_space(*behind)) behind++;
    if (brace && behind && behind < brace) { /* the name is there, up to the end of its line */
        from = behind;
        to = memchr(from, '\n', (size_t)(brace - from));
    }
    if (!brace || !to || to == from || to - from > TOOLCALL_MAX_NAME) return toolcall_give_back(t);
    toolcall_object_begin(t);
    memcpy(t->name, from, (size_t)(to - from));
    t->name[to - from] = '\0';
    t->key = KEY_BARE;
    toolcall_buf_drop(&t->in, n);
    return toolcall_call_begin(t);
}

err_code toolcall_deepseek_close(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    toolcall_buf_drop(&t->in, toolcall_spaces(&t->in));
    if (!t->in.n && !last) return OK;
    *more = t->in.n > 0;
    if (t->in.n && toolcall_begins(&t->in, "```", &wait)) {
        toolcall_buf_drop(&t->in, 3);
        return OK;
    }
    const bool closed = t->in.n && toolcall_begins(&t->in, deepseek_end, &wait);
    if (!closed && wait && !last) {
        *more = false;
        return OK;
    }
    if (closed) toolcall_buf_drop(&t->in, sizeof deepseek_end - 1);
    if (!closed && wait) t->in.n = 0;
    t->at = closed ? AT_OPEN : AT_CONTENT;
    t->list = closed;
    t->started = true;
    return OK;
}
