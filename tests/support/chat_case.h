/* What tests of chat templates share. */
#ifndef TMF_TESTS_CHAT_CASE_H
#define TMF_TESTS_CHAT_CASE_H

#include <check.h>
#include <stdbool.h>
#include <stdio.h>

#include "base/file.h"
#include "formats/chat.h"

#define TEMPLATES TMF_SHARED_DIR "/data/chat-templates"

/* Says SKIP where a file of the shared data is missing. */
static inline bool have(const char *path, const char *test)
{
    if (file_exists(path)) return true;
    printf("SKIP %s: %s is not there\n", test, path);
    return false;
}

/* Never fails: NAME is a template of ours. */
static inline chat *open_row(const tokenizer *t, const char *name)
{
    chat *c;
    err e;
    ck_assert_msg(chat_open(&c, t, name, NULL, NULL, &e) == OK, "%s", e.msg);
    return c;
}

/* Writes DIR/NAME. */
static inline void put(const char *dir, const char *name, const char *text)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_int_ge(fputs(text, f), 0);
    ck_assert_int_eq(fclose(f), 0);
}

#endif
