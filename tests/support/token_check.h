/* What the tokenizer suites share: opening, and comparing ids and texts. */
#ifndef TMF_TESTS_TOKEN_CHECK_H
#define TMF_TESTS_TOKEN_CHECK_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/tokenizer.h"

static inline bool have(const char *path, const char *test)
{
    if (file_exists(path)) return true;
    printf("SKIP %s: %s is not there\n", test, path);
    return false;
}

static inline tokenizer *open_file(const char *path)
{
    tokenizer *t;
    err e;
    ck_assert_msg(tokenizer_open_file(&t, path, &e) == OK, "%s", e.msg);
    return t;
}

static inline tokenizer *open_json(const char *json)
{
    tokenizer *t;
    err e;
    ck_assert_msg(tokenizer_open_memory(&t, "tokenizer.json", json, strlen(json), &e) == OK, "%s",
                  e.msg);
    return t;
}

static inline void expect_ids(const tokenizer *t, const char *text, size_t n, bool special,
                              const int32_t *ids, int64_t n_ids, const char *where)
{
    token_list got = {0};
    err e;
    ck_assert_msg(tokenizer_encode(t, text, n, special, &got, &e) == OK, "%s: '%s': %s", where,
                  text, e.msg);
    bool same = got.n == n_ids;
    for (int64_t i = 0; same && i < n_ids; i++) same = got.ids[i] == ids[i];
    if (!same) {
        fprintf(stderr, "%s: '%s': got", where, text);
        for (int64_t i = 0; i < got.n; i++) fprintf(stderr, " %d", got.ids[i]);
        fprintf(stderr, "\n");
    }
    ck_assert_msg(same, "%s: '%s'", where, text);
    token_list_free(&got);
}

/* expect("text", special, 1, 2, 3, -1) */
#define expect(t, text, special, ...)                                    \
    do {                                                                 \
        const int32_t want_[] = {__VA_ARGS__};                           \
        int64_t n_ = 0;                                                  \
        while (want_[n_] >= 0) n_++;                                     \
        expect_ids(t, text, strlen(text), special, want_, n_, __func__); \
    } while (0)

/* Decoding whole and token by token give the same; returns the text (mem_free). */
static inline char *decode(const tokenizer *t, const int32_t *ids, int64_t n, bool skip,
                           size_t *len)
{
    static char buf[1 << 16];
    char *whole, *parts = NULL;
    decode_state st = {0};
    size_t got, k = 0;
    err e;
    ck_assert_msg(tokenizer_decode(t, ids, n, skip, &whole, len, &e) == OK, "%s", e.msg);
    ck_assert_int_eq(whole[*len], 0);
    parts = malloc(*len + 64);
    for (int64_t i = 0; i < n; i++) {
        ck_assert_msg(tokenizer_decode_next(t, &st, ids[i], skip, buf, sizeof buf, &got, &e) == OK,
                      "%s", e.msg);
        ck_assert_uint_le(k + got, *len);
        memcpy(parts + k, buf, got);
        k += got;
    }
    tokenizer_decode_flush(&st, buf, sizeof buf, &got);
    ck_assert_uint_eq(k + got, *len);
    memcpy(parts + k, buf, got);
    ck_assert_mem_eq(parts, whole, *len);
    free(parts);
    return whole;
}

#endif
