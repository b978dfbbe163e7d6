/* A fresh directory for a test case, removed with everything in it. */
#ifndef TMF_TESTS_TEMPDIR_H
#define TMF_TESTS_TEMPDIR_H

#include <check.h>
#include <stdio.h>
#include <stdlib.h>

#include "base/file.h"

static inline void tempdir_make(char *path, size_t cap)
{
    const char *base = getenv("TMPDIR");
    (void)snprintf(path, cap, "%s/tmforge-test-XXXXXX", base && *base ? base : "/tmp");
    ck_assert_ptr_nonnull(mkdtemp(path));
}

static inline void tempdir_drop(const char *path)
{
    err e;
    ck_assert_msg(dir_remove_tree(path, &e) == OK, "%s", e.msg);
}

#endif
