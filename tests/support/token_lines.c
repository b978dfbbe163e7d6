/* token_lines TOKENIZER plain|special: reads texts from standard input, each a 32-bit length and
 * its bytes; prints for each a line of ids, then the decoded text as length, space, bytes, line
 * end. For comparison with other implementations (tests/oracle_tokenizers.py). */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/tokenizer.h"

static err_code one(const tokenizer *t, const char *text, size_t n, bool special, err *e)
{
    token_list l = {0};
    char *back = NULL;
    size_t len = 0;
    err_code rc = tokenizer_encode(t, text, n, special, &l, e);
    if (rc == OK) rc = tokenizer_decode(t, l.ids, l.n, false, &back, &len, e);
    for (int64_t i = 0; i < l.n && rc == OK; i++) printf("%s%d", i ? " " : "", l.ids[i]);
    if (rc == OK) {
        printf("\n%zu ", len);
        (void)fwrite(back, 1, len, stdout);
        (void)putchar('\n');
    }
    mem_free(back);
    token_list_free(&l);
    return rc;
}

int main(int argc, char **argv)
{
    tokenizer *t;
    uint32_t n;
    err e;
    if (argc != 3) return 2;
    err_code rc = file_is_dir(argv[1]) ? tokenizer_open(&t, argv[1], &e)
                                       : tokenizer_open_file(&t, argv[1], &e);
    while (rc == OK && fread(&n, sizeof n, 1, stdin) == 1) {
        char *text = malloc((size_t)n + 1);
        if (!text || fread(text, 1, n, stdin) != n) rc = err_set(&e, E_INPUT, "input is cut short");
        if (rc == OK) rc = one(t, text, n, strcmp(argv[2], "special") == 0, &e);
        free(text);
    }
    tokenizer_close(&t);
    if (rc != OK) fprintf(stderr, "%s\n", e.msg);
    return rc == OK ? 0 : 1;
}
