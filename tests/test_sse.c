/* Server-sent events: lines of every kind, cut anywhere. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/suite.h"
#include "tools/http_client.h"

typedef struct {
    char all[4096]; /* "event|event|" */
    int n, most;    /* most: says no at that one, 0 never */
} seen;

static bool on_event(void *ud, const char *data, size_t n)
{
    seen *s = ud;
    ck_assert_uint_eq(strlen(data), n);
    ck_assert_uint_lt(strlen(s->all) + n + 2, sizeof s->all);
    strcat(strcat(s->all, data), "|");
    return ++s->n != s->most;
}

/* In two pieces cut at each place, and byte by byte. */
static void expect(const char *bytes, const char *want)
{
    const size_t n = strlen(bytes);
    err e;
    for (size_t cut = 0; cut <= n + 1; cut++) {
        sse_parser p = {0};
        seen s = {0};
        if (cut <= n) {
            ck_assert_int_eq(sse_feed(&p, bytes, cut, on_event, &s, &e), OK);
            ck_assert_int_eq(sse_feed(&p, bytes + cut, n - cut, on_event, &s, &e), OK);
        }
        for (size_t i = 0; cut > n && i < n; i++)
            ck_assert_int_eq(sse_feed(&p, bytes + i, 1, on_event, &s, &e), OK);
        ck_assert_msg(strcmp(s.all, want) == 0, "cut at %zu: '%s', expected '%s'", cut, s.all,
                      want);
        sse_free(&p);
    }
}

START_TEST(lines)
{
    expect("", "");
    expect("data: a\n\ndata: b\n\n", "a|b|");
    expect("data:a\r\n\r\ndata:b\r\n\r\n", "a|b|");
    expect("data: a\r\rdata:  b\r\r", "a| b|");
    expect("data: a\ndata: b\n\n", "a\nb|");
    expect("data: a\n", "");                             /* not ended */
    expect("\n\n\r\n: ping\n\nevent: x\nid: 3\n\n", ""); /* nothing in it */
    expect("data\n\ndata:\n\n", "||");
    expect("dat: a\ndatax: b\ndata : c\n\n", "");
    expect("event: x\ndata: a\nretry: 5\n:\n\n", "a|");
    expect("\xef\xbb\xbf"
           "data: a\n\n",
           "a|"); /* a byte order mark at the beginning alone */
    expect("data: \xef\xbb\xbf\n\n", "\xef\xbb\xbf|");
    expect("data: [DONE]\n\n\n\n", "[DONE]|");
    expect("data: \xc3\xa9\xf0\x9f\x8c\x8d\n\n", "\xc3\xa9\xf0\x9f\x8c\x8d|");
}
END_TEST

START_TEST(ends)
{
    sse_parser p = {0};
    seen s = {.most = 2};
    err e;
    const char *bytes = "data: a\n\ndata: b\n\ndata: c\n\n";
    ck_assert_int_eq(sse_feed(&p, bytes, strlen(bytes), on_event, &s, &e), E_CANCELED);
    ck_assert_str_eq(s.all, "a|b|");
    sse_free(&p);
    char *much = malloc(1 << 20);
    ck_assert_ptr_nonnull(much);
    memset(much, 'x', 1 << 20);
    err_code rc = sse_feed(&p, "data: ", 6, on_event, &s, &e);
    for (int i = 0; rc == OK && i < 17; i++) rc = sse_feed(&p, much, 1 << 20, on_event, &s, &e);
    ck_assert_int_eq(rc, E_LIMIT);
    sse_free(&p);
    rc = OK; /* the same in many lines of one event */
    for (int i = 0; rc == OK && i < 17; i++) {
        rc = sse_feed(&p, "data:", 5, on_event, &s, &e);
        if (rc == OK) rc = sse_feed(&p, much, 1 << 20, on_event, &s, &e);
        if (rc == OK) rc = sse_feed(&p, "\n", 1, on_event, &s, &e);
    }
    ck_assert_int_eq(rc, E_LIMIT);
    sse_free(&p);
    free(much);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("sse");
    TCase *c = tcase_create("sse");
    tcase_add_test(c, lines);
    tcase_add_test(c, ends);
    suite_add_tcase(s, c);
    return suite_run(s);
}
