/* A call between tags, as Qwen3-Coder writes it:
 * <function=NAME> <parameter=KEY>VALUE</parameter> ... </function> */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/toolcall_internal.h"
#include "runtime/serve/toolcall_xml.h"

/* The tag's own word, up to '>': false when there is none (*wait: yet). */
static bool tag_word(const toolcall_buf *b, size_t skip, char word[TOOLCALL_MAX_NAME + 1],
                     size_t *end, bool *wait)
{
    const char *close = b->n > skip ? memchr(b->p + skip, '>', b->n - skip) : NULL;
    const size_t n = close ? (size_t)(close - b->p) - skip : b->n - skip;
    if (n > TOOLCALL_MAX_NAME || (close && n == 0)) return false;
    if (!close) {
        *wait = true;
        return false;
    }
    memcpy(word, b->p + skip, n);
    word[n] = '\0';
    *end = skip + n + 1;
    return !strpbrk(word, "<\n");
}

err_code toolcall_run_function(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    size_t end = 0;
    if (!toolcall_begins(&t->in, "<function=", &wait) ||
        !tag_word(&t->in, 10, t->name, &end, &wait)) {
        if (wait && !last) return OK;
        *more = true;
        return toolcall_give_back(t);
    }
    *more = true;
    toolcall_buf_drop(&t->in, end);
    t->at = AT_TAGS;
    t->has_args = false;
    t->sent = 0;
    return toolcall_call_begin(t);
}

/* The text of a value stands on lines of its own. */
static err_code take_argument(toolcall *t, const char *key, size_t from, size_t to)
{
    char *argument = NULL;
    if (to > from && t->in.p[from] == '\n') from++;
    if (to > from && t->in.p[to - 1] == '\n') to--;
    const char kept = t->in.p[to];
    t->in.p[to] = '\0';
    err_code rc = toolcall_xml_argument(&argument, t->tools, t->name, key, t->in.p + from, t->e);
    t->in.p[to] = kept;
    if (rc == OK)
        rc = toolcall_tell(t, TOOLCALL_ARGS, t->has_args ? ", " : "{", t->has_args ? 2 : 1);
    if (rc == OK) rc = toolcall_tell(t, TOOLCALL_ARGS, argument, strlen(argument));
    t->has_args = true;
    mem_free(argument);
    return rc;
}

err_code toolcall_run_tags(toolcall *t, bool last, bool *more)
{
    static const char open[] = "<parameter=", close[] = "</parameter>", end[] = "</function>";
    char key[TOOLCALL_MAX_NAME + 1];
    bool wait = false;
    size_t from = 0;
    toolcall_buf_drop(&t->in, toolcall_spaces(&t->in));
    if (!t->in.n && !last) return OK;
    if (t->in.n && toolcall_begins(&t->in, end, &wait)) {
        toolcall_buf_drop(&t->in, sizeof end - 1);
        t->at = AT_CLOSE;
        t->begun = false;
        t->back.n = t->raw.n = 0;
        return t->has_args ? toolcall_tell(t, TOOLCALL_ARGS, "}", 1)
                           : toolcall_tell(t, TOOLCALL_ARGS, "{}", 2);
    }
    if (t->in.n && toolcall_begins(&t->in, open, &wait) &&
        tag_word(&t->in, sizeof open - 1, key, &from, &wait)) {
        const size_t seen = t->sent > from + sizeof close ? t->sent - sizeof close : from;
        const char *p = memmem(t->in.p + seen, t->in.n - seen, close, sizeof close - 1);
        t->sent = p ? 0 : t->in.n; /* looked through */
        if (p) {
            const size_t to = (size_t)(p - t->in.p);
            *more = true;
            TRY(take_argument(t, key, from, to));
            toolcall_buf_drop(&t->in, to + sizeof close - 1);
            return OK;
        }
        wait = t->in.n <= TOOLCALL_MAX_BYTES;
    }
    if (wait && !last) return OK;
    if (wait) t->in.n = 0; /* it was cut in the middle: what was whole is told */
    *more = true;
    return toolcall_give_back(t);
}
