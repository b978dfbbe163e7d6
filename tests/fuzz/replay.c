/* Runs a fuzz target over stored inputs, without a fuzzer: each file, and each file of each folder,
 * named on the command line. Every input is a block of its exact size, so that a sanitizer sees a
 * read beyond it. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

enum { MAX_INPUT = 16 << 20 };

static err_code replay_file(const char *path, err *e)
{
    char *text;
    size_t n;
    TRY(file_read(&text, &n, path, MAX_INPUT, e));
    uint8_t *exact = malloc(n ? n : 1);
    if (exact) {
        if (n) memcpy(exact, text, n);
        (void)LLVMFuzzerTestOneInput(exact, n);
    }
    free(exact);
    mem_free(text);
    return exact ? OK : err_set(e, E_NOMEM, "'%s': no memory", path);
}

static err_code replay(const char *path, int *count, err *e)
{
    dir_list l;
    err_code rc = OK;
    if (!file_is_dir(path)) {
        ++*count;
        return replay_file(path, e);
    }
    TRY(dir_list_open(&l, path, e));
    for (size_t i = 0; i < l.n && rc == OK; i++) {
        char file[4096];
        if ((rc = path_join(file, sizeof file, path, l.names[i], e)) == OK)
            rc = replay(file, count, e);
    }
    dir_list_free(&l);
    return rc;
}

int main(int argc, char **argv)
{
    int count = 0;
    err e;
    for (int i = 1; i < argc; i++) {
        if (replay(argv[i], &count, &e) != OK) {
            fprintf(stderr, "%s: %s\n", argv[0], e.msg);
            return 1;
        }
    }
    if (count == 0) {
        fprintf(stderr, "%s: no input\n", argv[0]);
        return 1;
    }
    printf("%d inputs\n", count);
    return 0;
}
