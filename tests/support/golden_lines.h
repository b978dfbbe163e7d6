/* Line-based golden files: "key value value ...", values decimal or hexadecimal. */
#ifndef TMF_TESTS_GOLDEN_LINES_H
#define TMF_TESTS_GOLDEN_LINES_H

#include <check.h>
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

typedef struct {
    char *text; /* mem_free */
} golden;

static inline golden golden_open(const char *name)
{
    golden g;
    size_t n;
    char path[4096];
    err e;
    (void)snprintf(path, sizeof path, TMF_SOURCE_DIR "/tests/golden/%s", name);
    ck_assert_msg(file_read(&g.text, &n, path, (size_t)16 << 20, &e) == OK, "%s", e.msg);
    return g;
}

/* The text behind the first "key " at the start of a line at or behind `from`; NULL when there is
 * none. */
static inline const char *golden_find(const char *from, const char *key)
{
    const size_t n = strlen(key);
    for (const char *p = from; p; p = strchr(p, '\n')) {
        if (*p == '\n') p++;
        if (strncmp(p, key, n) == 0 && p[n] == ' ') return p + n + 1;
        if (!*p) return NULL;
    }
    return NULL;
}

/* Hexadecimal values of a line into elements of `size` bytes; exactly `count` of them. */
static inline void golden_hex(const char *from, const char *key, void *out, size_t size,
                              int64_t count)
{
    const char *p = golden_find(from, key);
    ck_assert_msg(p != NULL, "golden: no '%s'", key);
    for (int64_t i = 0; i < count; i++) {
        char *end;
        const uint64_t v = strtoull(p, &end, 16);
        ck_assert_msg(end != p, "golden: %s: value %" PRId64 " is missing", key, i);
        memcpy((char *)out + (size_t)i * size, &v, size); /* little endian, as all the project */
        p = end;
    }
    ck_assert_msg(*p == '\n', "golden: %s: more than %" PRId64 " values", key, count);
}

#endif
