/* formats/tokenizer: stored vectors of seven vocabularies, the rules of tokenizer.json one by
 * one, cuts, streaming, and refusals. */
#include "formats/tokenizer.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus.h"
#include "support/suite.h"
#include "support/token_check.h"

#define VECTORS TMF_SHARED_DIR "/data/tokenizers"

/* ---- stored vectors ---- */

#define STAND_IN "\\uE0FF" /* our JSON takes no U+0000 in strings, one vector has some */

/* "\u0000" becomes the stand-in in JSON, and the stand-in a NUL in the string that is parsed. */
static void nul_out(char *line)
{
    for (char *p = line; (p = strstr(p, "\\u0000")) != NULL;) memcpy(p, STAND_IN, 6);
}

static size_t nul_in(char *s)
{
    size_t k = 0;
    for (const char *p = s; *p;) {
        const bool nul = !strncmp(p, "\xee\x83\xbf", 3);
        s[k++] = nul ? '\0' : *p;
        p += nul ? 3 : 1;
    }
    s[k] = '\0';
    return k;
}

static void check_row(const tokenizer *t, bool special, char *line, const char *name)
{
    cJSON *o;
    err e;
    nul_out(line);
    ck_assert_msg(json_parse(&o, line, strlen(line), name, &e) == OK, "%s", e.msg);
    char *text = cJSON_GetObjectItem(o, "text")->valuestring;
    char *decoded = cJSON_GetObjectItem(o, "decoded")->valuestring;
    const size_t n_text = nul_in(text), n_decoded = nul_in(decoded);
    const cJSON *list = cJSON_GetObjectItem(o, "ids"), *c;
    int32_t *ids = calloc((size_t)cJSON_GetArraySize(list) + 1, sizeof *ids);
    int64_t n = 0;
    size_t len;
    cJSON_ArrayForEach(c, list) ids[n++] = c->valueint;
    expect_ids(t, text, n_text, special, ids, n, name);
    char *back = decode(t, ids, n, false, &len);
    ck_assert_uint_eq(len, n_decoded);
    ck_assert_mem_eq(back, decoded, len);
    mem_free(back);
    free(ids);
    cJSON_Delete(o);
}

static void check_llama_cpp(const tokenizer *t, const char *folder)
{
    static const char mark[] = "\n__ggml_vocab_test__\n";
    char path[4096], *in, *out;
    size_t n_in, n_out;
    int cases = 0;
    err e;
    snprintf(path, sizeof path, VECTORS "/%s/llama.cpp.inp", folder);
    if (!file_exists(path)) return;
    ck_assert(file_read(&in, &n_in, path, 1 << 20, &e) == OK);
    snprintf(path, sizeof path, VECTORS "/%s/llama.cpp.out", folder);
    ck_assert(file_read(&out, &n_out, path, 1 << 20, &e) == OK);
    char *text = in, *line = out;
    for (bool more = true; more; cases++) {
        char *end = strstr(text, mark), *eol = line + strcspn(line, "\n");
        int32_t ids[4096];
        int64_t n = 0;
        more = end != NULL;
        for (char *p = line, *q; p < eol; p = q) {
            ids[n] = (int32_t)strtol(p, &q, 10);
            if (q == p || q > eol) break;
            n++;
        }
        const size_t len = end ? (size_t)(end - text) : strlen(text);
        expect_ids(t, text, len, true, ids, n, path);
        text += len + sizeof mark - 1;
        line = eol + (*eol == '\n');
    }
    ck_assert_int_eq(cases, 47);
    mem_free(in);
    mem_free(out);
}

static const struct {
    const char *folder, *file;
    bool special, rows;
} vector_files[] = {
    {"baichuan", "tokenizer.model", false, true},
    {"internlm", "tokenizer.model", false, true},
    {"internlm2", "tokenizer.model", false, true},
    {"llama2", "tokenizer.model", false, true},
    {"llama2", "tokenizer.json", false, true},
    {"mistral-v1", "tokenizer.model", false, true},
    {"mistral-v3", "tokenizer.model", false, true},
    {"llama3", "tokenizer.json", true, true},
    {"llama3", "tokenizer.model", true, true},
    {"qwen2", "tokenizer.json", true, true},
    {"qwen2", "vocab.json", true, true},
    {"gpt2", "vocab.json", true, false},
};

START_TEST(tokenizer_vectors)
{
    char path[4096];
    err e;
    snprintf(path, sizeof path, VECTORS "/%s/%s", vector_files[_i].folder, vector_files[_i].file);
    if (!have(path, "tokenizer_vectors")) return;
    tokenizer *t = open_file(path);
    check_llama_cpp(t, vector_files[_i].folder);
    if (vector_files[_i].rows) {
        char rows[4096], *text, *save = NULL;
        size_t n;
        int count = 0;
        snprintf(rows, sizeof rows, VECTORS "/%s/vectors-shared.jsonl.zst",
                 vector_files[_i].folder);
        ck_assert_msg(corpus_text(&text, &n, rows, 1 << 24, NULL, &e) == OK, "%s", e.msg);
        for (char *line = strtok_r(text, "\n", &save); line;
             line = strtok_r(NULL, "\n", &save), count++)
            check_row(t, vector_files[_i].special, line, path);
        ck_assert_int_eq(count, 338);
        mem_free(text);
    }
    tokenizer_close(&t);
    ck_assert_ptr_null(t);
}
END_TEST

/* The golden files of the three models; the byte-level one was made with special strings parsed. */
START_TEST(tokenizer_models)
{
    static const char *const models[] = {"demo", "base", "qwen"};
    char dir[4000], path[4096];
    cJSON *o;
    const cJSON *c;
    tokenizer *t;
    err e;
    int count = 0;
    snprintf(dir, sizeof dir, TMF_SHARED_DIR "/models/%s", models[_i]);
    snprintf(path, sizeof path, "%s/golden.json", dir);
    if (!have(path, "tokenizer_models")) return;
    ck_assert(json_load(&o, path, 1 << 24, &e) == OK);
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    cJSON_ArrayForEach(c, cJSON_GetObjectItem(o, "tokenize"))
    {
        const char *text = cJSON_GetObjectItem(c, "text")->valuestring;
        const cJSON *list = cJSON_GetObjectItem(c, "ids"), *id;
        int32_t ids[4096];
        int64_t n = 0;
        size_t len;
        cJSON_ArrayForEach(id, list) ids[n++] = id->valueint;
        expect_ids(t, text, strlen(text), _i == 2, ids, n, path);
        char *back = decode(t, ids, n, false, &len);
        ck_assert_str_eq(back, text);
        mem_free(back);
        count++;
    }
    ck_assert_int_ge(count, 10);
    ck_assert_int_eq(tokenizer_vocab(t), _i == 2 ? 8192 : 4096);
    ck_assert_int_eq(tokenizer_bos(t), _i == 2 ? -1 : 1);
    ck_assert(tokenizer_add_bos(t) == (_i != 2));
    ck_assert_int_eq(tokenizer_eos(t), _i == 2 ? 8191 : 2);
    ck_assert_int_eq(tokenizer_id(t, "<|im_end|>"), _i == 2 ? 8191 : 4094);
    ck_assert(tokenizer_is_special(t, tokenizer_id(t, "<|im_start|>")));
    ck_assert_ptr_nonnull(tokenizer_chat_template(t));
    tokenizer_close(&t);
    cJSON_Delete(o);
}
END_TEST

/* ---- long text: cuts and time ---- */

static const char *const cut_files[] = {"llama2/tokenizer.model", "llama2/tokenizer.json",
                                        "internlm2/tokenizer.model", "qwen2/tokenizer.json",
                                        "gpt2/vocab.json"};

/* Text encoded in parts is text encoded whole, at every place that is offered. */
START_TEST(tokenizer_cuts)
{
    static const char *const texts[] = {"text/zh/lmdeploy-docs-zh.md",
                                        "text/calib/multilingual.utf8", "text/botchan.txt"};
    char path[4096];
    snprintf(path, sizeof path, VECTORS "/%s", cut_files[_i]);
    if (!have(path, "tokenizer_cuts")) return;
    tokenizer *t = open_file(path);
    for (int k = 0; k < 3; k++) {
        char *text;
        size_t n, cuts = 0;
        err e;
        token_list whole = {0}, parts = {0};
        snprintf(path, sizeof path, TMF_SHARED_DIR "/data/%s", texts[k]);
        ck_assert(file_read(&text, &n, path, 1 << 24, &e) == OK);
        if (n > 60000) n = 60000;
        while (n && ((unsigned char)text[n] & 0xc0) == 0x80) n--;
        ck_assert(tokenizer_encode(t, text, n, false, &whole, &e) == OK);
        uint32_t r = 1;
        for (size_t at = 0; at < n;) {
            r = r * 1664525u + 1013904223u;
            size_t take = 50 + (r >> 16) % 3000;
            if (take > n - at) take = n - at;
            size_t cut = take == n - at ? take : tokenizer_cut(t, text + at, take);
            for (size_t more = take; !cut;
                 cut = more >= n - at ? n - at : tokenizer_cut(t, text + at, more))
                more *= 2;
            ck_assert(tokenizer_encode_part(t, text + at, cut, at == 0, &parts, &e) == OK);
            at += cut;
            cuts++;
        }
        ck_assert_uint_ge(cuts, 10);
        ck_assert_int_eq(whole.n, parts.n);
        ck_assert_mem_eq(whole.ids, parts.ids, (size_t)whole.n * sizeof *whole.ids);
        token_list_free(&whole);
        token_list_free(&parts);
        mem_free(text);
    }
    tokenizer_close(&t);
}
END_TEST

static double seconds_of(const tokenizer *t, const char *text, size_t n)
{
    token_list l = {0};
    err e;
    const clock_t c = clock();
    ck_assert(tokenizer_encode(t, text, n, false, &l, &e) == OK);
    token_list_free(&l);
    return (double)(clock() - c) / CLOCKS_PER_SEC;
}

/* One word of a megabyte: ten times the bytes may take little more than ten times as long. */
START_TEST(tokenizer_long_word)
{
    enum { N = 1 << 20 };
    if (!have(VECTORS "/gpt2/vocab.json", "tokenizer_long_word")) return;
    tokenizer *t = open_file(VECTORS "/gpt2/vocab.json");
    char *text = malloc(N);
    uint32_t r = 7;
    for (int i = 0; i < N; i++) text[i] = (char)('a' + (r = r * 1664525u + 1013904223u) % 26);
    const double small = seconds_of(t, text, N / 10), large = seconds_of(t, text, N);
    ck_assert_msg(large < 30 * small + 0.5, "%.3f s for %d bytes, %.3f s for %d", small, N / 10,
                  large, N);
    memset(text, ' ', N);
    ck_assert_double_lt(seconds_of(t, text, N), 10);
    free(text);
    tokenizer_close(&t);
}
END_TEST

/* ---- tokenizer.json by rules ---- */

#define HEAD \
    "{\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":%s,\"model\":{%s}}"
#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define SMALL                                                                                      \
    "\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"\\u0120\":3,\"ab\":4,\"bc\":5,\"abc\":" \
    "6,\"\\u010a\":7},"                                                                            \
    "\"merges\":[\"b c\",\"a b\",\"a bc\"]"

static tokenizer *made(const char *added, const char *normalizer, const char *pre,
                       const char *decoder, const char *model)
{
    char json[8192];
    snprintf(json, sizeof json, HEAD, added, normalizer, pre, decoder, model);
    return open_json(json);
}

START_TEST(tokenizer_merges)
{
    tokenizer *t = made("", "null", BYTES, "{\"type\":\"ByteLevel\"}", SMALL);
    expect(t, "abc", false, 6, -1);
    expect(t, "ab", false, 4, -1);
    expect(t, "abab c\n", false, 4, 4, 3, 2, 7, -1);
    expect(t, "", false, -1);
    expect(t, "xay", false, 0, -1); /* bytes without a token vanish: there is no unk */
    ck_assert_int_eq(tokenizer_id(t, "abc"), 6);
    ck_assert_int_eq(tokenizer_id(t, "abcd"), -1);
    size_t n;
    ck_assert_int_eq(tokenizer_piece(t, 3, &n)[0], ' ');
    ck_assert_uint_eq(n, 1);
    ck_assert_str_eq(tokenizer_piece(t, 99, &n), "");
    ck_assert_int_eq(tokenizer_bos(t), -1);
    tokenizer_close(&t);
    t = made("", "null", BYTES, "{\"type\":\"ByteLevel\"}", "\"ignore_merges\":true," SMALL);
    expect(t, "bc", false, 5, -1);
    tokenizer_close(&t);
    /* rank decides, not place: b+c comes first, so "ab" is not reached in "abc"; equal ranks go
     * left first */
    t = made("", "null", BYTES, "null",
             "\"vocab\":{\"a\":0,\"aa\":1,\"aaa\":2},\"merges\":[[\"a\",\"a\"],[\"aa\",\"a\"]]");
    expect(t, "aaa", false, 2, -1);
    expect(t, "aaaaa", false, 1, 2, -1);
    tokenizer_close(&t);
}
END_TEST

START_TEST(tokenizer_unknown)
{
    const char *vocab =
        "\"vocab\":{\"<unk>\":0,\"a\":1,\"\\u2581\":2,\"<0xC3>\":3,\"<0xA9>\":4,\"b\":5}";
    char model[512];
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"merges\":[],%s",
             vocab);
    tokenizer *t = made("", "null", "null", "null", model);
    expect(t, "axxa", false, 1, 0, 1, -1);
    tokenizer_close(&t);
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"merges\":[],%s", vocab);
    t = made("", "null", "null", "null", model);
    expect(t, "axxa", false, 1, 0, 0, 1, -1);
    tokenizer_close(&t);
    /* byte fallback where all bytes of a character have a token; an unknown one waits for what
     * is known */
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"byte_fallback\":true,\"merges\":[],%s",
             vocab);
    t = made("", "null", "null",
             "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":"
             "\"\\u2581\"},"
             "\"content\":\" "
             "\"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":"
             "\" \",\"start\":1,\"stop\":0}]}",
             model);
    expect(t,
           "a\xc3\xa9"
           "b",
           false, 1, 3, 4, 5, -1);
    expect(t,
           "x\xc3\xa9"
           "b",
           false, 3, 4, 0, 5, -1);
    const int32_t ids[] = {2, 2, 1, 3, 4, 3, 5};
    size_t n;
    char *s = decode(t, ids, 7, false, &n);
    ck_assert_str_eq(s, " a\xc3\xa9\xef\xbf\xbd"
                        "b");
    mem_free(s);
    s = decode(t, ids + 3, 1, false, &n);
    ck_assert_str_eq(s, "\xef\xbf\xbd");
    mem_free(s);
    tokenizer_close(&t);
}
END_TEST

#define ADD(id, text, more) "{\"id\":" #id ",\"content\":\"" text "\"," more "}"

START_TEST(tokenizer_added)
{
    static const char added[] =
        "{\"id\":10,\"content\":\"<s>\",\"special\":true,\"normalized\":false},"
        "{\"id\":11,\"content\":\"<t>\",\"special\":false,\"normalized\":false},"
        "{\"id\":12,\"content\":\"<l>\",\"special\":true,\"lstrip\":true,\"normalized\":false},"
        "{\"id\":13,\"content\":\"<r>\",\"special\":true,\"rstrip\":true,\"normalized\":false},"
        "{\"id\":14,\"content\":\"cab\",\"special\":true,\"single_word\":true,\"normalized\":false}"
        ","
        "{\"id\":15,\"content\":\"<t><t>\",\"special\":false,\"normalized\":false}";
    tokenizer *t = made(added, "null", BYTES, "{\"type\":\"ByteLevel\"}", SMALL);
    expect(t, "a<s>b", true, 0, 10, 1, -1);
    expect(t, "a<s>b", false, 4,
           -1); /* special: plain text, whose other bytes have no token and vanish */
    expect(t, "a<t>b", false, 0, 11, 1, -1);   /* not special: found in any case */
    expect(t, "<t><t><t>", false, 15, 11, -1); /* the longest */
    expect(t, "a  <l> b", true, 0, 12, 3, 1, -1);
    expect(t, "a  <r> \n b", true, 0, 3, 3, 13, 1, -1);
    expect(t, "a cab b", true, 0, 3, 14, 3, 1, -1);
    expect(t, "acab", true, 0, 2, 4, -1);
    expect(t, "cabc", true, 2, 6, -1);
    ck_assert(tokenizer_is_special(t, 10) && !tokenizer_is_special(t, 11) &&
              !tokenizer_is_special(t, -1));
    const int32_t ids[] = {10, 0, 11, 5};
    size_t n;
    char *s = decode(t, ids, 4, false, &n);
    ck_assert_str_eq(s, "<s>a<t>bc");
    mem_free(s);
    s = decode(t, ids, 4, true, &n);
    ck_assert_str_eq(s, "a<t>bc");
    mem_free(s);
    /* segments: tokens by id between texts that stay texts */
    const token_seg segs[] = {{"a<s> ", 5, -1}, {NULL, 0, 12}, {"b", 1, -1}};
    token_list l = {0};
    err e;
    ck_assert(tokenizer_encode_segs(t, segs, 3, true, &l, &e) == OK);
    ck_assert_int_eq(l.n, 3);
    ck_assert(l.ids[0] == 0 && l.ids[1] == 12 && l.ids[2] == 1);
    token_list_free(&l);
    const token_seg beyond = {NULL, 0, 16};
    ck_assert(tokenizer_encode_segs(t, &beyond, 1, true, &l, &e) == E_INPUT);
    token_list_free(&l);
    size_t at, len;
    int32_t id;
    ck_assert(tokenizer_find_special(t, "xx<t><s>", 8, &at, &len, &id) && at == 5 && len == 3 &&
              id == 10);
    ck_assert(!tokenizer_find_special(t, "xx<t>", 5, &at, &len, &id));
    tokenizer_close(&t);
}
END_TEST

#define MARK                                                                            \
    "\"vocab\":{\"\\u2581\":0,\"a\":1,\"\\u2581a\":2,\"b\":3,\"\\u2581b\":4,\"<s>\":5," \
    "\"\\u2581\\u2581\":6},"                                                            \
    "\"merges\":[\"\\u2581 a\",\"\\u2581 b\",\"\\u2581 \\u2581\"]"

/* Llama 2's form: a normalizer that puts a mark in front of every fragment. */
START_TEST(tokenizer_normalizers)
{
    const char *prepend =
        "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},"
        "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]}";
    tokenizer *t = made(ADD(5, "<s>", "\"special\":true,\"normalized\":false"), prepend, "null",
                        "null", MARK);
    expect(t, "a", false, 2, -1);
    expect(t, "a<s>b", true, 2, 5, 4, -1);
    expect(t, " a b", false, 0, 2, 4, -1);
    tokenizer_close(&t);
    /* a normalized added token is matched behind its own mark */
    t = made(ADD(5, "<s>", "\"special\":true,\"normalized\":true"), prepend, "null", "null", MARK);
    expect(t, "<s>a", true, 5, 1, -1);
    expect(t, "a<s>", true, 2, -1);
    tokenizer_close(&t);
    t = made(ADD(5, "<s>", "\"special\":true,\"normalized\":false"), "null",
             "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"first\","
             "\"split\":false}",
             "null", MARK);
    expect(t, "a<s>b", true, 2, 5, 3, -1);
    expect(t, " a", true, 2, -1);
    tokenizer_close(&t);
    t = made("", "{\"type\":\"NFC\"}", BYTES, "null",
             "\"vocab\":{\"\\u00c3\":0,\"\\u00a9\":1,\"e\":2,\"\\u00cc\":3,\"\\u0123\":4},"
             "\"merges\":[]");
    expect(t,
           "e\xcc\x81"
           "e",
           false, 0, 1, 2, -1); /* composed */
    tokenizer_close(&t);
    t = made("", "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true}", BYTES, "null",
             SMALL);
    expect(t, " \xe3\x80\x80 a b \n", false, 0, 3, 1, -1);
    tokenizer_close(&t);
    t = made("", "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"x+\"},\"content\":\"b\"}", BYTES,
             "null", SMALL);
    expect(t, "xxaxx", false, 1, 4, -1);
    tokenizer_close(&t);
}
END_TEST

#define SPLIT(re, behavior, invert)                                                  \
    "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{" re \
    "},\"behavior\":\"" behavior "\",\"invert\":" invert "}," BYTES "]}"

/* The merges of SMALL join a, b and c unless a word ends between them. */
START_TEST(tokenizer_splits)
{
    tokenizer *t = made("", "null", SPLIT("\"Regex\":\"b\"", "Isolated", "false"), "null", SMALL);
    expect(t, "abc", false, 0, 1, 2, -1);
    tokenizer_close(&t);
    t = made("", "null", SPLIT("\"String\":\"b\"", "MergedWithPrevious", "false"), "null", SMALL);
    expect(t, "abcb", false, 4, 2, 1, -1);
    tokenizer_close(&t);
    t = made("", "null", SPLIT("\"String\":\"b\"", "MergedWithNext", "false"), "null", SMALL);
    expect(t, "abcbbc", false, 0, 5, 1, 5, -1);
    tokenizer_close(&t);
    t = made("", "null", SPLIT("\"String\":\"b\"", "Removed", "false"), "null", SMALL);
    expect(t, "abcba", false, 0, 2, 0, -1);
    tokenizer_close(&t);
    t = made("", "null", SPLIT("\"Regex\":\"[ab]\"", "Contiguous", "false"), "null", SMALL);
    expect(t, "abcab", false, 4, 2, 4, -1);
    tokenizer_close(&t);
    t = made("", "null", SPLIT("\"Regex\":\"b\"", "Removed", "true"), "null", SMALL);
    expect(t, "abcba", false, 1, 1, -1);
    tokenizer_close(&t);
    /* U+180E is not white space here, U+0085 is; an empty match cuts nothing */
    t = made("", "null", SPLIT("\"Regex\":\"\\\\s|x*\"", "Removed", "false"), "null", SMALL);
    expect(t,
           "a\xc2\x85"
           "bcxxa",
           false, 0, 5, 0, -1);
    tokenizer_close(&t);
    t = made("", "null", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":true}",
             "null", SMALL);
    expect(t, "a", false, 3, 0, -1);
    expect(t, " a", false, 3, 0, -1);
    tokenizer_close(&t);
}
END_TEST

/* ---- refusals ---- */

typedef struct {
    const char *json, *message;
    err_code rc;
} refusal;

static const refusal refusals[] = {
    {"", "tokenizer.json", E_INPUT},
    {"{", "tokenizer.json", E_INPUT},
    {"{}", "model", E_INPUT},
    {"{\"model\":{\"type\":\"Unigram\"}}", "Unigram", E_UNSUPPORTED},
    {"{\"model\":{\"vocab\":[],\"merges\":[]}}", "vocab", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", "'a'", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1.5},\"merges\":[]}}", "'a'", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1e9},\"merges\":[]}}", "'a'", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":\"1\"},\"merges\":[]}}", "'a'", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1,\"b\":1},\"merges\":[]}}", "id 1", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1,\"a\":2},\"merges\":[]}}", "tokenizer.json", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":{}}}", "merges", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[\"aa\"]}}", "line 1", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[\"a a\"]}}", "line 1", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1,\"aa\":2},\"merges\":[\"a a\",[\"a\"]]}}", "line 2", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[],\"unk_token\":\"u\"}}", "unk_token", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[],\"dropout\":0.1}}", "dropout", E_UNSUPPORTED},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"normalizer\":{\"type\":\"Nmt\"}}", "Nmt",
     E_UNSUPPORTED},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"normalizer\":{}}", "type", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Whitespace\"}}",
     "Whitespace", E_UNSUPPORTED},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"decoder\":{\"type\":\"CTC\"}}", "CTC",
     E_UNSUPPORTED},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"id\":5,\"content\":\"a\"}"
     "]}",
     "'a'", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"id\":99999999,"
     "\"content\":\"x\"}]}",
     "id", E_INPUT},
    {"{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"content\":\"x\"}]}", "id",
     E_INPUT},
};

START_TEST(tokenizer_refuses)
{
    err e = {OK, ""};
    tokenizer *t = (tokenizer *)(void *)&e;
    const refusal *r = &refusals[_i];
    const err_code rc = tokenizer_open_memory(&t, "tokenizer.json", r->json, strlen(r->json), &e);
    ck_assert_msg(rc == r->rc, "%s: %s: %s", r->json, err_name(rc), e.msg);
    ck_assert_ptr_null(t);
    ck_assert_msg(strstr(e.msg, r->message) != NULL, "%s: '%s'", r->json, e.msg);
    ck_assert_msg(strncmp(e.msg, "tokenizer.json", 14) == 0, "'%s'", e.msg);
}
END_TEST

START_TEST(tokenizer_bad_regex)
{
    static const struct {
        const char *re;
        err_code rc;
    } bad[] = {
        {"(", E_UNSUPPORTED},     {"\\\\w+", E_UNSUPPORTED}, {"[a-z&&[^b]]", E_UNSUPPORTED},
        {"a\\\\", E_INPUT},       {"\\\\u12", E_INPUT},      {"\\\\p{Nonsense}", E_UNSUPPORTED},
        {"\\\\C", E_UNSUPPORTED},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char json[1024];
        tokenizer *t;
        err e;
        snprintf(
            json, sizeof json,
            "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Split\","
            "\"pattern\":{\"Regex\":\"%s\"},\"behavior\":\"Isolated\"}}",
            bad[i].re);
        const err_code rc = tokenizer_open_memory(&t, "tokenizer.json", json, strlen(json), &e);
        ck_assert_msg(rc == bad[i].rc, "%s: %s", bad[i].re, rc == OK ? "accepted" : e.msg);
    }
    /* a pattern that backtracks without end gives up */
    tokenizer *t = made("", "null", SPLIT("\"Regex\":\"(?:a+)+[xy]\"", "Isolated", "false"), "null",
                        SMALL);
    char text[64];
    token_list l = {0};
    err e;
    memset(text, 'a', sizeof text);
    ck_assert(tokenizer_encode(t, text, sizeof text, false, &l, &e) == E_LIMIT);
    token_list_free(&l);
    ck_assert(tokenizer_encode(t, "\xff", 1, false, &l, &e) == E_INPUT); /* not UTF-8 */
    ck_assert(tokenizer_encode(t, "a\xed\xa0\x80", 4, false, &l, &e) == E_INPUT);
    token_list_free(&l);
    tokenizer_close(&t);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("tokenizer");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 300);
    tcase_add_loop_test(c, tokenizer_vectors, 0, (int)(sizeof vector_files / sizeof *vector_files));
    tcase_add_loop_test(c, tokenizer_models, 0, 3);
    tcase_add_loop_test(c, tokenizer_cuts, 0, (int)(sizeof cut_files / sizeof *cut_files));
    tcase_add_test(c, tokenizer_long_word);
    tcase_add_test(c, tokenizer_merges);
    tcase_add_test(c, tokenizer_unknown);
    tcase_add_test(c, tokenizer_added);
    tcase_add_test(c, tokenizer_normalizers);
    tcase_add_test(c, tokenizer_splits);
    tcase_add_loop_test(c, tokenizer_refuses, 0, (int)(sizeof refusals / sizeof *refusals));
    tcase_add_test(c, tokenizer_bad_regex);
    suite_add_tcase(s, c);
    return suite_run(s);
}
