/* formats/tokenizer: sentencepiece models made here, damaged and hostile ones, the other kinds
 * of files, directories, and every allocation failing once. */
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "support/alloc_fail.h"
#include "support/byte_tokenizer.h"
#include "support/suite.h"
#include "support/tempdir.h"
#include "support/token_check.h"

#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"

/* ---- sentencepiece models made here ---- */

typedef struct {
    unsigned char b[1 << 16];
    size_t n;
} proto;

static void put_field(proto *p, int field, const void *data, size_t n)
{
    p->b[p->n++] = (unsigned char)(field << 3 | 2);
    for (size_t k = n;; k >>= 7) {
        p->b[p->n++] = (unsigned char)((k & 0x7f) | (k > 0x7f ? 0x80 : 0));
        if (k <= 0x7f) break;
    }
    memcpy(p->b + p->n, data, n);
    p->n += n;
}

static void put_piece(proto *p, const char *s, size_t n, float score, int type)
{
    static proto q;
    q.n = 0;
    put_field(&q, 1, s, n);
    q.b[q.n++] = 2 << 3 | 5;
    memcpy(q.b + q.n, &score, 4);
    q.n += 4;
    q.b[q.n++] = 3 << 3;
    q.b[q.n++] = (unsigned char)type;
    put_field(p, 1, q.b, q.n);
}

/* <unk> <s> </s>, "▁", a, b, ab, "▁a"; normalizer: see the bytes. */
static void small_model(proto *p, const void *normalizer, size_t n)
{
    static const char trainer[] = {3 << 3, 2}; /* BPE */
    p->n = 0;
    put_piece(p, "<unk>", 5, 0, 2);
    put_piece(p, "<s>", 3, 0, 3);
    put_piece(p, "</s>", 4, 0, 3);
    put_piece(p, "\xe2\x96\x81", 3, -4, 1);
    put_piece(p, "a", 1, -5, 1);
    put_piece(p, "b", 1, -6, 1);
    put_piece(p, "ab", 2, -1, 1);
    put_piece(p,
              "\xe2\x96\x81"
              "a",
              4, -2, 1);
    put_field(p, 2, trainer, sizeof trainer);
    put_field(p, 3, normalizer, n);
}

static err_code open_proto(tokenizer **t, const proto *p, err *e)
{
    return tokenizer_open_memory(t, "tokenizer.model", p->b, p->n, e);
}

static const char normal_prefix[] = {4 << 3, 0}; /* keeps spaces; dummy prefix by default */
static const char normal_plain[] = {3 << 3, 0, 4 << 3, 0};

START_TEST(spm_small)
{
    static proto p;
    tokenizer *t;
    err e;
    small_model(&p, normal_prefix, sizeof normal_prefix);
    ck_assert_msg(open_proto(&t, &p, &e) == OK, "%s", e.msg);
    expect(t, "ab", false, 3, 6, -1);
    expect(t, "a<s>a", true, 7, 1, 7, -1);
    expect(t, "zz", false, 3, 0, -1); /* neighbours that are unknown are one */
    expect(t, "", false, -1);
    ck_assert_int_eq(tokenizer_bos(t), 1);
    ck_assert_int_eq(tokenizer_eos(t), 2);
    ck_assert(tokenizer_add_bos(t) && tokenizer_is_special(t, 2) && !tokenizer_is_special(t, 3));
    const int32_t ids[] = {1, 7, 3, 0, 6, 2};
    size_t n;
    char *s = decode(t, ids, 6, true, &n);
    ck_assert_str_eq(s, "a  \xe2\x81\x87 ab");
    mem_free(s);
    s = decode(t, ids, 6, false, &n);
    ck_assert_str_eq(s, "<s> a  \xe2\x81\x87 ab</s>");
    mem_free(s);
    token_list l = {0};
    ck_assert(tokenizer_encode(t, "a\xff", 2, false, &l, &e) == OK); /* read as U+FFFD: unknown */
    ck_assert_int_eq(l.n, 2);
    token_list_free(&l);
    tokenizer_close(&t);
    small_model(&p, normal_plain, sizeof normal_plain);
    ck_assert_msg(open_proto(&t, &p, &e) == OK, "%s", e.msg);
    expect(t, "ab ab", false, 6, 3, 6, -1);
    tokenizer_close(&t);
}
END_TEST

static void write_file(const char *dir, const char *name, const void *data, size_t n)
{
    char path[4096];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(data, 1, n, f), n);
    ck_assert_int_eq(fclose(f), 0);
}

static void write_text(const char *dir, const char *name, const char *text)
{
    write_file(dir, name, text, strlen(text));
}

/* legacy: a prefix for every fragment; legacy=false: one at the start of the text. */
START_TEST(spm_config)
{
    static proto p;
    char dir[256];
    tokenizer *t;
    err e;
    tempdir_make(dir, sizeof dir);
    small_model(&p, normal_prefix, sizeof normal_prefix);
    write_file(dir, "tokenizer.model", p.b, p.n);
    write_text(dir, "tokenizer_config.json",
               "{\"legacy\":false,\"add_bos_token\":false,\"eos_token\":{\"content\":\"<e>\"},"
               "\"added_tokens_decoder\":{\"8\":{\"content\":\"<e>\",\"special\":true},\"9\":{"
               "\"content\":\"<x>\"}},"
               "\"chat_template\":[{\"name\":\"tool\",\"template\":\"no\"},{\"name\":\"default\","
               "\"template\":\"yes\"}]}");
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    expect(t, "a<s>a", true, 7, 1, 4, -1);
    expect(t, "<s>a", true, 1, 4, -1);
    expect(t, "<x>a", false, 3, 9, 4, -1); /* the prefix stays when no special token follows it */
    ck_assert(!tokenizer_add_bos(t));
    ck_assert_int_eq(tokenizer_eos(t), 8);
    ck_assert_int_eq(tokenizer_vocab(t), 10);
    ck_assert_str_eq(tokenizer_chat_template(t), "yes");
    tokenizer_close(&t);
    write_text(dir, "chat_template.jinja", "from a file");
    write_text(dir, "added_tokens.json", "{\"<y>\":12}");
    write_text(dir, "special_tokens_map.json", "{\"bos_token\":\"<y>\"}");
    write_text(dir, "tokenizer_config.json", "{\"legacy\":true}");
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    expect(t, "a<s>a", true, 7, 1, 7, -1);
    expect(t, "a<y>", true, 7, 12, -1);
    ck_assert_int_eq(tokenizer_bos(t), 12);
    ck_assert(tokenizer_is_special(t, 12));
    ck_assert_str_eq(tokenizer_chat_template(t), "from a file");
    size_t n;
    const int32_t hole = 11, beyond = 1 << 30;
    char *s = decode(t, &hole, 1, false, &n); /* within the table, without a token */
    ck_assert_str_eq(s, "");
    mem_free(s);
    ck_assert(tokenizer_decode(t, &beyond, 1, false, &s, &n, &e) == E_INPUT);
    tokenizer_close(&t);
    write_text(dir, "added_tokens.json", "{\"<y>\":-1}");
    ck_assert(tokenizer_open(&t, dir, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "added_tokens.json"));
    write_text(dir, "added_tokens.json", "{\"a\":40}"); /* the model has it elsewhere */
    ck_assert(tokenizer_open(&t, dir, &e) == E_INPUT);
    tempdir_drop(dir);
}
END_TEST

static void refuse_model(const proto *p, const char *message)
{
    tokenizer *t;
    err e = {OK, ""};
    const err_code rc = open_proto(&t, p, &e);
    ck_assert_msg(rc == E_INPUT, "%s: %s", message, rc == OK ? "accepted" : e.msg);
    ck_assert_msg(strstr(e.msg, message) != NULL && strncmp(e.msg, "tokenizer.model", 15) == 0,
                  "'%s'", e.msg);
}

START_TEST(spm_refuses)
{
    static proto p;
    tokenizer *t;
    err e;
    float nan;
    const uint32_t bits = 0x7fc00000u;
    memcpy(&nan, &bits, 4);
    p.n = 0;
    refuse_model(&p, "no pieces");
    small_model(&p, normal_plain, sizeof normal_plain);
    put_piece(&p, "a", 1, 0, 1);
    refuse_model(&p, "there already");
    small_model(&p, normal_plain, sizeof normal_plain);
    put_piece(&p, "x", 1, nan, 1);
    refuse_model(&p, "score");
    small_model(&p, normal_plain, sizeof normal_plain);
    put_piece(&p, "", 0, 0, 1);
    refuse_model(&p, "piece 8");
    small_model(&p, normal_plain, sizeof normal_plain);
    put_piece(&p, "u\0v", 3, 0, 4);
    refuse_model(&p, "NUL");
    small_model(&p, normal_plain, sizeof normal_plain);
    char big[5000];
    memset(big, 'q', sizeof big);
    put_piece(&p, big, sizeof big, 0, 1);
    refuse_model(&p, "5000");
    /* every truncation: refused, or (cut between fields) a smaller model that works */
    small_model(&p, normal_plain, sizeof normal_plain);
    const size_t full = p.n;
    for (p.n = 0; p.n < full; p.n++) {
        if (open_proto(&t, &p, &e) != OK) continue;
        token_list l = {0};
        (void)tokenizer_encode(t, "ab a", 4, true, &l, &e);
        token_list_free(&l);
        tokenizer_close(&t);
    }
}
END_TEST

/* A character map is walked without bounds by the library: one that leads outside must not reach
 * it. */
START_TEST(spm_charsmap)
{
    static proto p, q;
    static unsigned char map[4 + 256 * 4 + 4];
    uint32_t bytes = 256 * 4, *u = (uint32_t *)(void *)(map + 4);
    tokenizer *t;
    err e;
    for (int k = 0; k < 6; k++) {
        memset(map, 0, sizeof map);
        memcpy(map, &bytes, 4);
        const char *message = NULL;
        size_t n = sizeof map;
        if (k == 1) u[0] = 1u << 20, message = "outside"; /* offset 1024 */
        if (k == 2) u[7] = 1u << 8, u[7] |= 9u << 10, u[7 ^ 9] = 0x80000000u | 4, message = "value";
        if (k == 3) map[n - 1] = 'x', message = "not ended";
        if (k == 4) n = 3, message = "cut short";
        if (k == 5) map[1] = 0xff, message = "wrong size";
        q.n = 0;
        put_field(&q, 2, map, n);
        small_model(&p, q.b, q.n);
        if (message) {
            refuse_model(&p, message);
            continue;
        }
        ck_assert_msg(open_proto(&t, &p, &e) == OK, "%s", e.msg); /* an empty map */
        expect(t, "ab", false, 3, 6, -1);
        tokenizer_close(&t);
    }
}
END_TEST

/* Flipped bytes of a real model are refused or harmless. */
START_TEST(spm_flips)
{
    const char *path = TMF_SHARED_DIR "/data/models/stories260K/hf/tokenizer.model";
    char *model;
    size_t n;
    uint32_t r = 3;
    err e;
    if (!have(path, "spm_flips")) return;
    ck_assert(file_read(&model, &n, path, 1 << 20, &e) == OK);
    for (int k = 0; k < 150; k++) {
        tokenizer *t;
        r = r * 1664525u + 1013904223u;
        const size_t at = (r >> 8) % n;
        const char was = model[at];
        model[at] = (char)(was ^ (1 << (r & 7)));
        if (tokenizer_open_memory(&t, "tokenizer.model", model, n, &e) == OK) {
            token_list l = {0};
            (void)tokenizer_encode(t, "Once upon a time, \xc3\xa9!", 21, true, &l, &e);
            token_list_free(&l);
            tokenizer_close(&t);
        }
        model[at] = was;
    }
    mem_free(model);
}
END_TEST

/* ---- the other forms ---- */

START_TEST(tiktoken_refuses)
{
    static const struct {
        const char *text, *message;
    } bad[] = {
        {"IQ== 0\nIg== x\n", "line 2"}, {"IQ== 0\nIg==\n", "line 2"},
        {"IQ== 0\n!!!! 1\n", "line 2"}, {"IQ== 0\nIQ== 1\n", "two ids"},
        {"IQ== 0\n", "byte 0"},         {"IQ== 0\nIg== 12345678901\n", "line 2"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        tokenizer *t;
        err e = {OK, ""};
        ck_assert_msg(tokenizer_open_memory(&t, "x.tiktoken", bad[i].text, strlen(bad[i].text),
                                            &e) == E_INPUT,
                      "%s: %s", bad[i].text, e.msg);
        ck_assert_msg(strstr(e.msg, bad[i].message) != NULL, "'%s'", e.msg);
    }
}
END_TEST

START_TEST(vocab_merges)
{
    char dir[256];
    tokenizer *t;
    err e;
    tempdir_make(dir, sizeof dir);
    ck_assert(tokenizer_open(&t, dir, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "no tokenizer"));
    ck_assert_ptr_null(t);
    write_text(dir, "vocab.json", "{\"a\":0,\"b\":1,\"ab\":2,\"<|endoftext|>\":3}");
    ck_assert(tokenizer_open(&t, dir, &e) != OK); /* no merges.txt */
    ck_assert_ptr_nonnull(strstr(e.msg, "merges.txt"));
    write_text(dir, "merges.txt", "#version: 0.2\r\na b\r\n");
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    expect(t, "ab<|endoftext|>", true, 2, 3, -1);
    tokenizer_close(&t);
    write_text(dir, "merges.txt", "a b\nab\n");
    ck_assert(tokenizer_open(&t, dir, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "line 2"));
    /* a tokenizer.json of another kind gives way to the model file */
    static proto p;
    small_model(&p, normal_plain, sizeof normal_plain);
    write_file(dir, "tokenizer.model", p.b, p.n);
    write_text(dir, "tokenizer.json", "{\"model\":{\"type\":\"Unigram\"}}");
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    expect(t, "ab", false, 6, -1);
    tokenizer_close(&t);
    write_text(dir, "tokenizer.json", "{}"); /* but a broken one does not */
    ck_assert(tokenizer_open(&t, dir, &e) == E_INPUT);
    tempdir_drop(dir);
}
END_TEST

/* Every allocation of opening, encoding and decoding fails once. */
START_TEST(tokenizer_no_memory)
{
    static proto p;
    char json[16 << 10];
    const size_t n = byte_tokenizer_json(
        json, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
              "{\"Regex\":\"b\"},\"behavior\":\"Isolated\"}," BYTES "]}");
    small_model(&p, normal_prefix, sizeof normal_prefix);
    for (int kind = 0; kind < 2; kind++) {
        bool reached = true;
        for (long k = 1; reached; k++) {
            tokenizer *t = NULL;
            token_list l = {0};
            char *s = NULL;
            size_t len;
            err e = {OK, ""};
            alloc_fail_at(k);
            err_code rc = kind ? open_proto(&t, &p, &e)
                               : tokenizer_open_memory(&t, "tokenizer.json", json, n, &e);
            if (rc == OK) rc = tokenizer_encode(t, "ab <s>a", 7, true, &l, &e);
            if (rc == OK) rc = tokenizer_decode(t, l.ids, l.n, false, &s, &len, &e);
            reached = alloc_failed();
            alloc_fail_at(0);
            ck_assert_msg(rc == (reached ? E_NOMEM : OK), "allocation %ld: %s '%s'", k,
                          err_name(rc), e.msg);
            mem_free(s);
            token_list_free(&l);
            tokenizer_close(&t);
        }
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tokenizer_files");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 300);
    tcase_add_test(c, spm_small);
    tcase_add_test(c, spm_config);
    tcase_add_test(c, spm_refuses);
    tcase_add_test(c, spm_charsmap);
    tcase_add_test(c, spm_flips);
    tcase_add_test(c, tiktoken_refuses);
    tcase_add_test(c, vocab_merges);
    tcase_add_test(c, tokenizer_no_memory);
    suite_add_tcase(s, c);
    return suite_run(s);
}
