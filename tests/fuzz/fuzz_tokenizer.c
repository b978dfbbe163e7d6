/* Any bytes as tokenizer.json, a NUL, a text: refused in one line, or a tokenizer that encodes
 * and decodes. */
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

static void use(const tokenizer *t, const char *text, size_t n)
{
    token_list l = {0};
    char *s;
    size_t len;
    err e;
    for (int special = 0; special < 2; special++) {
        l.n = 0;
        if (tokenizer_encode(t, text, n, special, &l, &e) != OK) continue;
        for (int64_t i = 0; i < l.n; i++) need(l.ids[i] >= 0 && l.ids[i] < tokenizer_vocab(t));
        need(tokenizer_decode(t, l.ids, l.n, !special, &s, &len, &e) == OK && s[len] == '\0');
        mem_free(s);
    }
    const size_t cut = tokenizer_cut(t, text, n);
    need(cut < n || n == 0);
    if (cut) { /* parts are the whole */
        token_list parts = {0};
        l.n = 0;
        if (tokenizer_encode(t, text, n, false, &l, &e) == OK) {
            need(tokenizer_encode_part(t, text, cut, true, &parts, &e) == OK);
            need(tokenizer_encode_part(t, text + cut, n - cut, false, &parts, &e) == OK);
            need(parts.n == l.n &&
                 (l.n == 0 || memcmp(parts.ids, l.ids, (size_t)l.n * sizeof *l.ids) == 0));
        }
        token_list_free(&parts);
    }
    token_list_free(&l);
    (void)tokenizer_id(t, "a");
    for (int32_t id = -1; id < 300; id++) (void)tokenizer_piece(t, id, &len);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const uint8_t *end = n ? memchr(data, 0, n) : NULL;
    const size_t json = end ? (size_t)(end - data) : n;
    tokenizer *t;
    err e = {OK, ""};
    const err_code rc = tokenizer_open_memory(&t, "tokenizer.json", data, json, &e);
    if (rc != OK) {
        need(!t && e.code == rc && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
        return 0;
    }
    static const char text[] = "ab <s>\xc3\xa9 \n\n the a\xcc\x81 123's\xe2\x96\x81 x";
    use(t, text, sizeof text - 1);
    if (end) use(t, (const char *)end + 1, n - json - 1);
    tokenizer_close(&t);
    return 0;
}
