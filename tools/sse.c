/* Server-sent events: bytes to events. */
#include <string.h>

#include "base/mem.h"
#include "tools/http_client.h"

static err_code append(char **buf, size_t *n, size_t *cap, const char *s, size_t len, err *e)
{
    if (len > SSE_MAX_EVENT - *n)
        return err_set(e, E_LIMIT, "an event of more than %zu bytes", SSE_MAX_EVENT);
    if (*n + len + 1 > *cap) {
        void *p;
        size_t want = *cap ? *cap : 4096;
        while (want < *n + len + 1) want *= 2;
        TRY(mem_alloc(&p, want, 1, "event", e));
        if (*n) memcpy(p, *buf, *n);
        mem_free(*buf);
        *buf = p;
        *cap = want;
    }
    memcpy(*buf + *n, s, len);
    *n += len;
    (*buf)[*n] = 0;
    return OK;
}

typedef bool (*event_fn)(void *ud, const char *data, size_t n);

/* One whole line: a data field is kept, an empty line ends the event. */
static err_code take_line(sse_parser *p, const char *s, size_t n, event_fn fn, void *ud, err *e)
{
    if (!p->started && n >= 3 && memcmp(s, "\xef\xbb\xbf", 3) == 0) {
        s += 3;
        n -= 3;
    }
    p->started = true;
    if (n == 0) {
        const bool has = p->has_data;
        const size_t len = p->n_data;
        p->has_data = false;
        p->n_data = 0;
        if (has && !fn(ud, p->data, len)) return err_set(e, E_CANCELED, "closed by the reader");
        return OK;
    }
    if (n < 4 || memcmp(s, "data", 4) != 0 || (n > 4 && s[4] != ':')) return OK;
    const size_t skip = n > 5 && s[5] == ' ' ? 6 : n > 4 ? 5 : 4;
    if (p->has_data) TRY(append(&p->data, &p->n_data, &p->data_cap, "\n", 1, e));
    p->has_data = true;
    return append(&p->data, &p->n_data, &p->data_cap, s + skip, n - skip, e);
}

err_code sse_feed(sse_parser *p, const char *bytes, size_t n, event_fn fn, void *ud, err *e)
{
    const char *at = bytes, *end = bytes + n;
    while (at < end) {
        if (p->after_cr && *at == '\n') at++; /* the second half of CR LF */
        p->after_cr = false;
        const char *stop = at;
        while (stop < end && *stop != '\n' && *stop != '\r') stop++;
        if (stop == end)
            return append(&p->line, &p->n_line, &p->line_cap, at, (size_t)(end - at), e);
        p->after_cr = *stop == '\r';
        if (p->n_line) { /* began in an earlier piece */
            TRY(append(&p->line, &p->n_line, &p->line_cap, at, (size_t)(stop - at), e));
            const size_t len = p->n_line;
            p->n_line = 0;
            TRY(take_line(p, p->line, len, fn, ud, e));
        } else {
            TRY(take_line(p, at, (size_t)(stop - at), fn, ud, e));
        }
        at = stop + 1;
    }
    return OK;
}

void sse_free(sse_parser *p)
{
    mem_free(p->line);
    mem_free(p->data);
    memset(p, 0, sizeof *p);
}
