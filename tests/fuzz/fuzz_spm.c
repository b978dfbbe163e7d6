/* Any bytes as a sentencepiece model or a rank file: refused in one line, or a tokenizer that
 * works. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const texts[] = {"ab a", " a  b\n", "<s>a\xc3\xa9\xff</s>",
                                        "\xe2\x96\x81"
                                        "ab\xe2\x96",
                                        ""};
    tokenizer *t;
    err e = {OK, ""};
    const err_code rc = tokenizer_open_memory(&t, "tokenizer.model", data, n, &e);
    if (rc != OK) {
        need(!t && e.code == rc && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
        return 0;
    }
    for (size_t i = 0; i < sizeof texts / sizeof *texts; i++) {
        token_list l = {0};
        char *s;
        size_t len;
        if (tokenizer_encode(t, texts[i], strlen(texts[i]), i & 1, &l, &e) == OK) {
            for (int64_t k = 0; k < l.n; k++) need(l.ids[k] >= 0 && l.ids[k] < tokenizer_vocab(t));
            need(tokenizer_decode(t, l.ids, l.n, false, &s, &len, &e) == OK);
            mem_free(s);
        }
        token_list_free(&l);
    }
    tokenizer_close(&t);
    return 0;
}
