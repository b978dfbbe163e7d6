/* Any bytes as a stream of events: in one piece and cut by themselves into small ones, the events
 * are the same. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tools/http_client.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

typedef struct {
    char *all; /* [cap] events, each with a zero behind */
    size_t n, cap;
} seen;

static bool on_event(void *ud, const char *event, size_t n)
{
    seen *s = ud;
    need(event[n] == 0 && s->n + n + 1 <= s->cap);
    memcpy(s->all + s->n, event, n + 1);
    s->n += n + 1;
    return true;
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const char *bytes = (const char *)data;
    sse_parser whole = {0}, pieces = {0};
    seen a = {malloc(n + 2), 0, n + 2}, b = {malloc(n + 2), 0, n + 2};
    err e;
    need(a.all && b.all);
    need(sse_feed(&whole, bytes, n, on_event, &a, &e) == OK);
    for (size_t at = 0; at < n;) {
        const size_t most = 1 + data[at] % 5, left = n - at, len = most < left ? most : left;
        need(sse_feed(&pieces, bytes + at, len, on_event, &b, &e) == OK);
        at += len;
    }
    need(a.n == b.n && (a.n == 0 || memcmp(a.all, b.all, a.n) == 0));
    sse_free(&whole);
    sse_free(&pieces);
    free(a.all);
    free(b.all);
    return 0;
}
