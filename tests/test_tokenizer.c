/* formats/tokenizer: stored vectors of seven vocabularies, the rules of tokenizer.json one by one, cuts,
 * streaming, and files that lie. */
#include "formats/tokenizer.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus.h"
#include "support/alloc_fail.h"
#include "support/byte_tokenizer.h"
#include "support/tempdir.h"

#define VECTORS TMF_SHARED_DIR "/data/tokenizers"

static int skipped;

static bool have(const char *path, const char *test)
{
    if (file_exists(path)) return true;
    printf("SKIP %s: %s is not there\n", test, path);
    skipped++;
    return false;
}

static tokenizer *open_file(const char *path)
{
    tokenizer *t;
    err e;
    ck_assert_msg(tokenizer_open_file(&t, path, &e) == OK, "%s", e.msg);
    return t;
}

static tokenizer *open_json(const char *json)
{
    tokenizer *t;
    err e;
    ck_assert_msg(tokenizer_open_memory(&t, "tokenizer.json", json, strlen(json), &e) == OK, "%s", e.msg);
    return t;
}

static void expect_ids(const tokenizer *t, const char *text, size_t n, bool special, const int32_t *ids, int64_t n_ids,
                       const char *where)
{
    token_list got = { 0 };
    err e;
    ck_assert_msg(tokenizer_encode(t, text, n, special, &got, &e) == OK, "%s: '%s': %s", where, text, e.msg);
    bool same = got.n == n_ids;
    for (int64_t i = 0; same && i < n_ids; i++) same = got.ids[i] == ids[i];
    if (!same) {
        fprintf(stderr, "%s: '%s': got", where, text);
        for (int64_t i = 0; i < got.n; i++) fprintf(stderr, " %d", got.ids[i]);
        fprintf(stderr, "\n");
    }
    ck_assert_msg(same, "%s: '%s'", where, text);
    token_list_free(&got);
}

/* expect("text", special, 1, 2, 3, -1) */
#define expect(t, text, special, ...)                                                                              \
    do {                                                                                                           \
        const int32_t want_[] = { __VA_ARGS__ };                                                                   \
        int64_t n_ = 0;                                                                                            \
        while (want_[n_] >= 0) n_++;                                                                               \
        expect_ids(t, text, strlen(text), special, want_, n_, __func__);                                           \
    } while (0)

/* Decoding whole and token by token give the same; returns the text (mem_free). */
static char *decode(const tokenizer *t, const int32_t *ids, int64_t n, bool skip, size_t *len)
{
    static char buf[1 << 16];
    char *whole, *parts = NULL;
    decode_state st = { 0 };
    size_t got, k = 0;
    err e;
    ck_assert_msg(tokenizer_decode(t, ids, n, skip, &whole, len, &e) == OK, "%s", e.msg);
    ck_assert_int_eq(whole[*len], 0);
    parts = malloc(*len + 64);
    for (int64_t i = 0; i < n; i++) {
        ck_assert_msg(tokenizer_decode_next(t, &st, ids[i], skip, buf, sizeof buf, &got, &e) == OK, "%s", e.msg);
        ck_assert_uint_le(k + got, *len);
        memcpy(parts + k, buf, got);
        k += got;
    }
    tokenizer_decode_flush(&st, buf, sizeof buf, &got);
    ck_assert_uint_eq(k + got, *len);
    memcpy(parts + k, buf, got);
    ck_assert_mem_eq(parts, whole, *len);
    free(parts);
    return whole;
}

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

static const struct { const char *folder, *file; bool special, rows; } vector_files[] = {
    { "baichuan", "tokenizer.model", false, true },  { "internlm", "tokenizer.model", false, true },
    { "internlm2", "tokenizer.model", false, true }, { "llama2", "tokenizer.model", false, true },
    { "llama2", "tokenizer.json", false, true },     { "mistral-v1", "tokenizer.model", false, true },
    { "mistral-v3", "tokenizer.model", false, true }, { "llama3", "tokenizer.json", true, true },
    { "llama3", "tokenizer.model", true, true },     { "qwen2", "tokenizer.json", true, true },
    { "qwen2", "vocab.json", true, true },           { "gpt2", "vocab.json", true, false },
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
        snprintf(rows, sizeof rows, VECTORS "/%s/vectors-shared.jsonl.zst", vector_files[_i].folder);
        ck_assert_msg(corpus_text(&text, &n, rows, 1 << 24, NULL, &e) == OK, "%s", e.msg);
        for (char *line = strtok_r(text, "\n", &save); line; line = strtok_r(NULL, "\n", &save), count++)
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
    static const char *const models[] = { "demo", "base", "qwen" };
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
    cJSON_ArrayForEach(c, cJSON_GetObjectItem(o, "tokenize")) {
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

static const char *const cut_files[] = { "llama2/tokenizer.model", "llama2/tokenizer.json", "internlm2/tokenizer.model",
                                         "qwen2/tokenizer.json", "gpt2/vocab.json" };

/* Text encoded in parts is text encoded whole, at every place that is offered. */
START_TEST(tokenizer_cuts)
{
    static const char *const texts[] = { "text/zh/lmdeploy-docs-zh.md", "text/calib/multilingual.utf8", "text/botchan.txt" };
    char path[4096];
    snprintf(path, sizeof path, VECTORS "/%s", cut_files[_i]);
    if (!have(path, "tokenizer_cuts")) return;
    tokenizer *t = open_file(path);
    for (int k = 0; k < 3; k++) {
        char *text;
        size_t n, cuts = 0;
        err e;
        token_list whole = { 0 }, parts = { 0 };
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
            for (size_t more = take; !cut; cut = more >= n - at ? n - at : tokenizer_cut(t, text + at, more)) more *= 2;
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
    token_list l = { 0 };
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
    ck_assert_msg(large < 30 * small + 0.5, "%.3f s for %d bytes, %.3f s for %d", small, N / 10, large, N);
    memset(text, ' ', N);
    ck_assert_double_lt(seconds_of(t, text, N), 10);
    free(text);
    tokenizer_close(&t);
}
END_TEST

/* ---- tokenizer.json by rules ---- */

#define HEAD "{\"added_tokens\":[%s],\"normalizer\":%s,\"pre_tokenizer\":%s,\"decoder\":%s,\"model\":{%s}}"
#define BYTES "{\"type\":\"ByteLevel\",\"add_prefix_space\":false,\"use_regex\":false}"
#define SMALL "\"type\":\"BPE\",\"vocab\":{\"a\":0,\"b\":1,\"c\":2,\"\\u0120\":3,\"ab\":4,\"bc\":5,\"abc\":6,\"\\u010a\":7}," \
              "\"merges\":[\"b c\",\"a b\",\"a bc\"]"

static tokenizer *made(const char *added, const char *normalizer, const char *pre, const char *decoder, const char *model)
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
    /* rank decides, not place: b+c comes first, so "ab" is not reached in "abc"; equal ranks go left first */
    t = made("", "null", BYTES, "null", "\"vocab\":{\"a\":0,\"aa\":1,\"aaa\":2},\"merges\":[[\"a\",\"a\"],[\"aa\",\"a\"]]");
    expect(t, "aaa", false, 2, -1);
    expect(t, "aaaaa", false, 1, 2, -1);
    tokenizer_close(&t);
}
END_TEST

START_TEST(tokenizer_unknown)
{
    const char *vocab = "\"vocab\":{\"<unk>\":0,\"a\":1,\"\\u2581\":2,\"<0xC3>\":3,\"<0xA9>\":4,\"b\":5}";
    char model[512];
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"fuse_unk\":true,\"merges\":[],%s", vocab);
    tokenizer *t = made("", "null", "null", "null", model);
    expect(t, "axxa", false, 1, 0, 1, -1);
    tokenizer_close(&t);
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"merges\":[],%s", vocab);
    t = made("", "null", "null", "null", model);
    expect(t, "axxa", false, 1, 0, 0, 1, -1);
    tokenizer_close(&t);
    /* byte fallback where all bytes of a character have a token; an unknown one waits for what is known */
    snprintf(model, sizeof model, "\"unk_token\":\"<unk>\",\"byte_fallback\":true,\"merges\":[],%s", vocab);
    t = made("", "null", "null", "{\"type\":\"Sequence\",\"decoders\":[{\"type\":\"Replace\",\"pattern\":{\"String\":\"\\u2581\"},"
             "\"content\":\" \"},{\"type\":\"ByteFallback\"},{\"type\":\"Fuse\"},{\"type\":\"Strip\",\"content\":\" \",\"start\":1,\"stop\":0}]}",
             model);
    expect(t, "a\xc3\xa9" "b", false, 1, 3, 4, 5, -1);
    expect(t, "x\xc3\xa9" "b", false, 3, 4, 0, 5, -1);
    const int32_t ids[] = { 2, 2, 1, 3, 4, 3, 5 };
    size_t n;
    char *s = decode(t, ids, 7, false, &n);
    ck_assert_str_eq(s, " a\xc3\xa9\xef\xbf\xbd" "b");
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
    tokenizer *t = made(ADD(10, "<s>", "\"special\":true,\"normalized\":false") ","
                        ADD(11, "<t>", "\"special\":false,\"normalized\":false") ","
                        ADD(12, "<l>", "\"special\":true,\"lstrip\":true,\"normalized\":false") ","
                        ADD(13, "<r>", "\"special\":true,\"rstrip\":true,\"normalized\":false") ","
                        ADD(14, "cab", "\"special\":true,\"single_word\":true,\"normalized\":false") ","
                        ADD(15, "<t><t>", "\"special\":false,\"normalized\":false"),
                        "null", BYTES, "{\"type\":\"ByteLevel\"}", SMALL);
    expect(t, "a<s>b", true, 0, 10, 1, -1);
    expect(t, "a<s>b", false, 4, -1); /* special: plain text, whose other bytes have no token and vanish */
    expect(t, "a<t>b", false, 0, 11, 1, -1);  /* not special: found in any case */
    expect(t, "<t><t><t>", false, 15, 11, -1); /* the longest */
    expect(t, "a  <l> b", true, 0, 12, 3, 1, -1);
    expect(t, "a  <r> \n b", true, 0, 3, 3, 13, 1, -1);
    expect(t, "a cab b", true, 0, 3, 14, 3, 1, -1);
    expect(t, "acab", true, 0, 2, 4, -1);
    expect(t, "cabc", true, 2, 6, -1);
    ck_assert(tokenizer_is_special(t, 10) && !tokenizer_is_special(t, 11) && !tokenizer_is_special(t, -1));
    const int32_t ids[] = { 10, 0, 11, 5 };
    size_t n;
    char *s = decode(t, ids, 4, false, &n);
    ck_assert_str_eq(s, "<s>a<t>bc");
    mem_free(s);
    s = decode(t, ids, 4, true, &n);
    ck_assert_str_eq(s, "a<t>bc");
    mem_free(s);
    /* segments: tokens by id between texts that stay texts */
    const token_seg segs[] = { { "a<s> ", 5, -1 }, { NULL, 0, 12 }, { "b", 1, -1 } };
    token_list l = { 0 };
    err e;
    ck_assert(tokenizer_encode_segs(t, segs, 3, true, &l, &e) == OK);
    ck_assert_int_eq(l.n, 3);
    ck_assert(l.ids[0] == 0 && l.ids[1] == 12 && l.ids[2] == 1);
    token_list_free(&l);
    const token_seg beyond = { NULL, 0, 16 };
    ck_assert(tokenizer_encode_segs(t, &beyond, 1, true, &l, &e) == E_INPUT);
    token_list_free(&l);
    size_t at, len;
    int32_t id;
    ck_assert(tokenizer_find_special(t, "xx<t><s>", 8, &at, &len, &id) && at == 5 && len == 3 && id == 10);
    ck_assert(!tokenizer_find_special(t, "xx<t>", 5, &at, &len, &id));
    tokenizer_close(&t);
}
END_TEST

#define MARK "\"vocab\":{\"\\u2581\":0,\"a\":1,\"\\u2581a\":2,\"b\":3,\"\\u2581b\":4,\"<s>\":5,\"\\u2581\\u2581\":6}," \
             "\"merges\":[\"\\u2581 a\",\"\\u2581 b\",\"\\u2581 \\u2581\"]"

/* Llama 2's form: a normalizer that puts a mark in front of every fragment. */
START_TEST(tokenizer_normalizers)
{
    const char *prepend = "{\"type\":\"Sequence\",\"normalizers\":[{\"type\":\"Prepend\",\"prepend\":\"\\u2581\"},"
                          "{\"type\":\"Replace\",\"pattern\":{\"String\":\" \"},\"content\":\"\\u2581\"}]}";
    tokenizer *t = made(ADD(5, "<s>", "\"special\":true,\"normalized\":false"), prepend, "null", "null", MARK);
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
             "{\"type\":\"Metaspace\",\"replacement\":\"\\u2581\",\"prepend_scheme\":\"first\",\"split\":false}", "null", MARK);
    expect(t, "a<s>b", true, 2, 5, 3, -1);
    expect(t, " a", true, 2, -1);
    tokenizer_close(&t);
    t = made("", "{\"type\":\"NFC\"}", BYTES, "null",
             "\"vocab\":{\"\\u00c3\":0,\"\\u00a9\":1,\"e\":2,\"\\u00cc\":3,\"\\u0123\":4},\"merges\":[]");
    expect(t, "e\xcc\x81" "e", false, 0, 1, 2, -1); /* composed */
    tokenizer_close(&t);
    t = made("", "{\"type\":\"Strip\",\"strip_left\":true,\"strip_right\":true}", BYTES, "null", SMALL);
    expect(t, " \xe3\x80\x80 a b \n", false, 0, 3, 1, -1);
    tokenizer_close(&t);
    t = made("", "{\"type\":\"Replace\",\"pattern\":{\"Regex\":\"x+\"},\"content\":\"b\"}", BYTES, "null", SMALL);
    expect(t, "xxaxx", false, 1, 4, -1);
    tokenizer_close(&t);
}
END_TEST

#define SPLIT(re, behavior, invert) "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":{" re "},\"behavior\":\"" \
    behavior "\",\"invert\":" invert "}," BYTES "]}"

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
    expect(t, "a\xc2\x85" "bcxxa", false, 0, 5, 0, -1);
    tokenizer_close(&t);
    t = made("", "null", "{\"type\":\"ByteLevel\",\"add_prefix_space\":true,\"use_regex\":true}", "null", SMALL);
    expect(t, "a", false, 3, 0, -1);
    expect(t, " a", false, 3, 0, -1);
    tokenizer_close(&t);
}
END_TEST

/* ---- refusals ---- */

typedef struct { const char *json, *message; err_code rc; } refusal;

static const refusal refusals[] = {
    { "", "tokenizer.json", E_INPUT },
    { "{", "tokenizer.json", E_INPUT },
    { "{}", "model", E_INPUT },
    { "{\"model\":{\"type\":\"Unigram\"}}", "Unigram", E_UNSUPPORTED },
    { "{\"model\":{\"vocab\":[],\"merges\":[]}}", "vocab", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":-1},\"merges\":[]}}", "'a'", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1.5},\"merges\":[]}}", "'a'", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1e9},\"merges\":[]}}", "'a'", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":\"1\"},\"merges\":[]}}", "'a'", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1,\"b\":1},\"merges\":[]}}", "id 1", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1,\"a\":2},\"merges\":[]}}", "tokenizer.json", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":{}}}", "merges", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[\"aa\"]}}", "line 1", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[\"a a\"]}}", "line 1", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1,\"aa\":2},\"merges\":[\"a a\",[\"a\"]]}}", "line 2", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[],\"unk_token\":\"u\"}}", "unk_token", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[],\"dropout\":0.1}}", "dropout", E_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"normalizer\":{\"type\":\"Nmt\"}}", "Nmt", E_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"normalizer\":{}}", "type", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Whitespace\"}}", "Whitespace", E_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"decoder\":{\"type\":\"CTC\"}}", "CTC", E_UNSUPPORTED },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"id\":5,\"content\":\"a\"}]}", "'a'", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"id\":99999999,\"content\":\"x\"}]}", "id", E_INPUT },
    { "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"added_tokens\":[{\"content\":\"x\"}]}", "id", E_INPUT },
};

START_TEST(tokenizer_refuses)
{
    tokenizer *t = (tokenizer *)&skipped;
    err e = { OK, "" };
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
    static const struct { const char *re; err_code rc; } bad[] = {
        { "(", E_UNSUPPORTED }, { "\\\\w+", E_UNSUPPORTED }, { "[a-z&&[^b]]", E_UNSUPPORTED }, { "a\\\\", E_INPUT },
        { "\\\\u12", E_INPUT }, { "\\\\p{Nonsense}", E_UNSUPPORTED }, { "\\\\C", E_UNSUPPORTED },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        char json[1024];
        tokenizer *t;
        err e;
        snprintf(json, sizeof json, "{\"model\":{\"vocab\":{\"a\":1},\"merges\":[]},\"pre_tokenizer\":{\"type\":\"Split\","
                 "\"pattern\":{\"Regex\":\"%s\"},\"behavior\":\"Isolated\"}}", bad[i].re);
        const err_code rc = tokenizer_open_memory(&t, "tokenizer.json", json, strlen(json), &e);
        ck_assert_msg(rc == bad[i].rc, "%s: %s", bad[i].re, rc == OK ? "accepted" : e.msg);
    }
    /* a pattern that backtracks without end gives up */
    tokenizer *t = made("", "null", SPLIT("\"Regex\":\"(?:a+)+[xy]\"", "Isolated", "false"), "null", SMALL);
    char text[64];
    token_list l = { 0 };
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

/* ---- sentencepiece models made here ---- */

typedef struct { unsigned char b[1 << 16]; size_t n; } proto;

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
    static const char trainer[] = { 3 << 3, 2 }; /* BPE */
    p->n = 0;
    put_piece(p, "<unk>", 5, 0, 2);
    put_piece(p, "<s>", 3, 0, 3);
    put_piece(p, "</s>", 4, 0, 3);
    put_piece(p, "\xe2\x96\x81", 3, -4, 1);
    put_piece(p, "a", 1, -5, 1);
    put_piece(p, "b", 1, -6, 1);
    put_piece(p, "ab", 2, -1, 1);
    put_piece(p, "\xe2\x96\x81" "a", 4, -2, 1);
    put_field(p, 2, trainer, sizeof trainer);
    put_field(p, 3, normalizer, n);
}

static err_code open_proto(tokenizer **t, const proto *p, err *e)
{
    return tokenizer_open_memory(t, "tokenizer.model", p->b, p->n, e);
}

static const char normal_prefix[] = { 4 << 3, 0 };             /* keeps spaces; dummy prefix by default */
static const char normal_plain[] = { 3 << 3, 0, 4 << 3, 0 };

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
    const int32_t ids[] = { 1, 7, 3, 0, 6, 2 };
    size_t n;
    char *s = decode(t, ids, 6, true, &n);
    ck_assert_str_eq(s, "a  \xe2\x81\x87 ab");
    mem_free(s);
    s = decode(t, ids, 6, false, &n);
    ck_assert_str_eq(s, "<s> a  \xe2\x81\x87 ab</s>");
    mem_free(s);
    token_list l = { 0 };
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
    write_text(dir, "tokenizer_config.json", "{\"legacy\":false,\"add_bos_token\":false,\"eos_token\":{\"content\":\"<e>\"},"
               "\"added_tokens_decoder\":{\"8\":{\"content\":\"<e>\",\"special\":true},\"9\":{\"content\":\"<x>\"}},"
               "\"chat_template\":[{\"name\":\"tool\",\"template\":\"no\"},{\"name\":\"default\",\"template\":\"yes\"}]}");
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
    err e = { OK, "" };
    const err_code rc = open_proto(&t, p, &e);
    ck_assert_msg(rc == E_INPUT, "%s: %s", message, rc == OK ? "accepted" : e.msg);
    ck_assert_msg(strstr(e.msg, message) != NULL && strncmp(e.msg, "tokenizer.model", 15) == 0, "'%s'", e.msg);
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
        token_list l = { 0 };
        (void)tokenizer_encode(t, "ab a", 4, true, &l, &e);
        token_list_free(&l);
        tokenizer_close(&t);
    }
}
END_TEST

/* A character map is walked without bounds by the library: one that leads outside must not reach it. */
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
        if (k == 1) u[0] = 1u << 20, message = "outside";        /* offset 1024 */
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
            token_list l = { 0 };
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
    static const struct { const char *text, *message; } bad[] = {
        { "IQ== 0\nIg== x\n", "line 2" }, { "IQ== 0\nIg==\n", "line 2" }, { "IQ== 0\n!!!! 1\n", "line 2" },
        { "IQ== 0\nIQ== 1\n", "two ids" }, { "IQ== 0\n", "byte 0" }, { "IQ== 0\nIg== 12345678901\n", "line 2" },
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        tokenizer *t;
        err e = { OK, "" };
        ck_assert_msg(tokenizer_open_memory(&t, "x.tiktoken", bad[i].text, strlen(bad[i].text), &e) == E_INPUT, "%s: %s",
                      bad[i].text, e.msg);
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
    const size_t n = byte_tokenizer_json(json, "{\"type\":\"Sequence\",\"pretokenizers\":[{\"type\":\"Split\",\"pattern\":"
                                               "{\"Regex\":\"b\"},\"behavior\":\"Isolated\"}," BYTES "]}");
    small_model(&p, normal_prefix, sizeof normal_prefix);
    for (int kind = 0; kind < 2; kind++) {
        bool reached = true;
        for (long k = 1; reached; k++) {
            tokenizer *t = NULL;
            token_list l = { 0 };
            char *s = NULL;
            size_t len;
            err e = { OK, "" };
            alloc_fail_at(k);
            err_code rc = kind ? open_proto(&t, &p, &e) : tokenizer_open_memory(&t, "tokenizer.json", json, n, &e);
            if (rc == OK) rc = tokenizer_encode(t, "ab <s>a", 7, true, &l, &e);
            if (rc == OK) rc = tokenizer_decode(t, l.ids, l.n, false, &s, &len, &e);
            reached = alloc_failed();
            alloc_fail_at(0);
            ck_assert_msg(rc == (reached ? E_NOMEM : OK), "allocation %ld: %s '%s'", k, err_name(rc), e.msg);
            mem_free(s);
            token_list_free(&l);
            tokenizer_close(&t);
        }
    }
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
    tcase_add_test(c, spm_small);
    tcase_add_test(c, spm_config);
    tcase_add_test(c, spm_refuses);
    tcase_add_test(c, spm_charsmap);
    tcase_add_test(c, spm_flips);
    tcase_add_test(c, tiktoken_refuses);
    tcase_add_test(c, vocab_merges);
    tcase_add_test(c, tokenizer_no_memory);
    suite_add_tcase(s, c);
    SRunner *r = srunner_create(s);
    srunner_run_all(r, CK_ENV);
    const int failed = srunner_ntests_failed(r);
    srunner_free(r);
    return failed ? 1 : 0;
}
