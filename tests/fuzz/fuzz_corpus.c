/* A byte for the kind of file, then its bytes: read as a stream and as windows. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "datasets/corpus.h"
#include "support/byte_tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static char dir[64];

static void clean(void)
{
    char path[96];
    snprintf(path, sizeof path, "%s/f.jsonl", dir);
    (void)unlink(path);
    snprintf(path, sizeof path, "%s/f.tar", dir);
    (void)unlink(path);
    snprintf(path, sizeof path, "%s/f", dir);
    (void)unlink(path);
    (void)rmdir(dir);
}

static tokenizer *t;
static chat *c;

static void start(void)
{
    static char json[16 << 10];
    err e;
    const size_t n = byte_tokenizer_json(json,
                                         "{\"type\":\"ByteLevel\",\"add_prefix_space\":false}");
    need(tokenizer_open_memory(&t, "tokenizer.json", json, n, &e) == OK);
    need(chat_open(&c, t, "hf-chatml-bos", NULL, NULL, &e) == OK);
    snprintf(dir, sizeof dir, "/tmp/tmforge-fuzz-XXXXXX");
    need(mkdtemp(dir) != NULL);
    need(atexit(clean) == 0);
}

static void check(err_code rc, const err *e)
{
    need(rc == OK || (e->code == rc && strlen(e->msg) > 6 && !strchr(e->msg, '\n')));
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    static const char *const names[] = {"f", "f.jsonl", "f.tar"}, *const sets[] = {
                                                                      NULL, "wikitext2", "ptb",
                                                                      "c4", "pileval"};
    char path[96];
    const char *const paths[] = {path};
    int32_t ids[8];
    token_list l = {0};
    err e = {OK, ""};
    if (n < 1) return 0;
    if (!t) start();
    snprintf(path, sizeof path, "%s/%s", dir, names[data[0] % 3]);
    FILE *f = fopen(path, "wb");
    need(f && fwrite(data + 1, 1, n - 1, f) == n - 1 && fclose(f) == 0);
    const char *set = sets[data[0] / 3 % 5];
    const corpus_read r = {.dataset = set, .max_tokens = 1000};
    check(corpus_tokens(&l, path, &r, t, c, NULL, &e), &e);
    need(l.n <= 1000);
    const corpus_opts o = {.paths = paths,
                           .n_paths = 1,
                           .dataset = set,
                           .samples = 2,
                           .seqlen = 4,
                           .pick = data[0] & 0x80 ? PICK_FIRST : PICK_RANDOM};
    check(corpus_windows(ids, &o, t, c, NULL, &e), &e);
    token_list_free(&l);
    return 0;
}
