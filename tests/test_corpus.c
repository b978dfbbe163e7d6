/* datasets/corpus: files of every form to tokens and windows, by a tokenizer whose ids are the
 * bytes, so that what comes out can be read; and files that are cut, packed to death, or point
 * elsewhere. */
#include "datasets/corpus.h"

#include <archive.h>
#include <archive_entry.h>
#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>
#include <zstd.h>

#include "base/file.h"
#include "base/mem.h"
#include "support/alloc_fail.h"
#include "support/byte_tokenizer.h"
#include "support/suite.h"
#include "support/tempdir.h"

static char dir[256];
static tokenizer *tok;
static chat *chatml;

static void setup(void)
{
    err e;
    tempdir_make(dir, sizeof dir);
    tok = byte_tokenizer();
    ck_assert(chat_open(&chatml, tok, "hf-chatml-bos", NULL, NULL, &e) == OK);
}

static void teardown(void)
{
    chat_close(&chatml);
    tokenizer_close(&tok);
    tempdir_drop(dir);
}

static bool have(const char *path, const char *test)
{
    if (file_exists(path)) return true;
    printf("SKIP %s: %s is not there\n", test, path);
    return false;
}

static const char *in_dir(const char *name)
{
    static char paths[4][512];
    static int k;
    char *p = paths[k++ % 4];
    snprintf(p, sizeof paths[0], "%s/%s", dir, name);
    return p;
}

static const char *put(const char *name, const void *data, size_t n)
{
    const char *path = in_dir(name);
    FILE *f = fopen(path, "wb");
    ck_assert_ptr_nonnull(f);
    ck_assert_uint_eq(fwrite(data, 1, n, f), n);
    ck_assert_int_eq(fclose(f), 0);
    return path;
}

static const char *put_text(const char *name, const char *text)
{
    return put(name, text, strlen(text));
}

/* ---- packing ---- */

static size_t packed(char *out, size_t cap, const char *text, size_t n)
{
    const size_t k = ZSTD_compress(out, cap, text, n, 3);
    ck_assert(!ZSTD_isError(k));
    return k;
}

typedef struct {
    const char *name, *data;
    size_t n;
    mode_t type;
    const char *link;
} member;

/* An archive: tar with a filter, or (name NULL of the first member) one raw stream. */
static const char *put_archive(const char *file, int filter, bool raw, const member *m, int count)
{
    const char *path = in_dir(file);
    struct archive *a = archive_write_new();
    if (raw)
        ck_assert_int_eq(archive_write_set_format_raw(a), ARCHIVE_OK);
    else
        ck_assert_int_eq(archive_write_set_format_pax_restricted(a), ARCHIVE_OK);
    ck_assert_int_eq(archive_write_add_filter(a, filter), ARCHIVE_OK);
    ck_assert_int_eq(archive_write_open_filename(a, path), ARCHIVE_OK);
    for (int i = 0; i < count; i++) {
        struct archive_entry *e = archive_entry_new();
        archive_entry_set_pathname(e, m[i].name);
        archive_entry_set_filetype(e, m[i].type ? m[i].type : AE_IFREG);
        archive_entry_set_perm(e, 0644);
        if (m[i].link && m[i].type == AE_IFLNK) archive_entry_set_symlink(e, m[i].link);
        if (m[i].link && m[i].type != AE_IFLNK) archive_entry_set_hardlink(e, m[i].link);
        if (!m[i].type) archive_entry_set_size(e, (la_int64_t)m[i].n);
        ck_assert_int_eq(archive_write_header(a, e), ARCHIVE_OK);
        if (!m[i].type)
            ck_assert_int_eq(archive_write_data(a, m[i].data, m[i].n), (la_ssize_t)m[i].n);
        archive_entry_free(e);
    }
    ck_assert_int_eq(archive_write_close(a), ARCHIVE_OK);
    archive_write_free(a);
    return path;
}

/* ---- streams ---- */

static char *stream_of(const char *path, const corpus_read *r)
{
    token_list l = {0};
    err e;
    ck_assert_msg(corpus_tokens(&l, path, r, tok, chatml, NULL, &e) == OK, "%s", e.msg);
    const size_t cap = (size_t)l.n * 12 + 16;
    char *s = malloc(cap);
    byte_text(s, cap, l.ids, l.n);
    token_list_free(&l);
    return s;
}

static void expect_stream(const char *path, const corpus_read *r, const char *want)
{
    char *s = stream_of(path, r);
    ck_assert_str_eq(s, want);
    free(s);
}

static void refuse(const char *path, const corpus_read *r, err_code rc, const char *message)
{
    token_list l = {0};
    err e = {OK, ""};
    const err_code got = corpus_tokens(&l, path, r, tok, chatml, NULL, &e);
    ck_assert_msg(got == rc, "%s: %s: %s", path, err_name(got), got == OK ? "accepted" : e.msg);
    ck_assert_msg(strstr(e.msg, message) != NULL, "'%s', expected '%s'", e.msg, message);
    ck_assert_msg(strstr(e.msg, path) != NULL, "'%s' does not name the file", e.msg);
    token_list_free(&l);
}

START_TEST(corpus_text_file)
{
    const corpus_read bare = {.no_bos = true}, parse = {.parse_special = true},
                      five = {.max_tokens = 5};
    const char *path = put_text("a.txt", "One.\r\nTw\xc3\xb6 </s>");
    expect_stream(path, NULL, "<s>One.\r\nTw\xc3\xb6 </s>");
    expect_stream(path, &bare, "One.\r\nTw\xc3\xb6 </s>");
    expect_stream(path, &five, "<s>One.");
    token_list l = {0};
    err e;
    ck_assert(corpus_tokens(&l, path, &parse, tok, NULL, NULL, &e) == OK);
    ck_assert_int_eq(l.ids[l.n - 1], BYTE_EOS);
    ck_assert_int_eq(l.n, 1 + 11 + 1);
    token_list_free(&l);
    expect_stream(put_text("bom", "\xef\xbb\xbfx"), NULL, "<s>x");
    char *text;
    size_t n;
    ck_assert(corpus_text(&text, &n, path, 100, NULL, &e) == OK);
    ck_assert_str_eq(text, "One.\r\nTw\xc3\xb6 </s>");
    mem_free(text);
    ck_assert(corpus_text(&text, &n, path, 5, NULL, &e) == E_LIMIT);
    ck_assert_ptr_null(text);
}
END_TEST

/* Several megabytes go through in parts and come out whole. */
START_TEST(corpus_long_text)
{
    const size_t n = 3500000;
    char *text = malloc(n + 1);
    uint32_t r = 5;
    for (size_t i = 0; i < n; i++)
        text[i] = "abcdefg    \n\n.,1'"[(r = r * 1664525u + 1013904223u) >> 28];
    text[n] = '\0';
    char *s = stream_of(put("long.txt", text, n), NULL);
    ck_assert(!strncmp(s, "<s>", 3) && !strcmp(s + 3, text));
    free(s);
    memset(text, 'x', n); /* no place to cut */
    s = stream_of(put("x.txt", text, n), NULL);
    ck_assert(!strcmp(s + 3, text));
    free(s);
    free(text);
}
END_TEST

START_TEST(corpus_jsonl)
{
    const char *path = put_text("d.jsonl",
                                "{\"text\":\"one\"}\n\n{\"text\":\"two\\n\",\"meta\":{}}\r\n"
                                "{\"messages\":[{\"role\":\"user\",\"content\":\"Q\"},{\"role\":"
                                "\"assistant\",\"content\":\"A\"}]}\n"
                                "{\"conversations\":[{\"from\":\"human\",\"value\":\"h\"},{"
                                "\"from\":\"gpt\",\"value\":\"g\"}]}");
    const char *dialogues =
        "<s><|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
        "<s><|im_start|>user\nh<|im_end|>\n<|im_start|>assistant\ng<|im_end|>\n";
    char want[1024];
    snprintf(want, sizeof want, "<s>one<s>two\n%s", dialogues);
    expect_stream(path, NULL, want);
    const corpus_read meta = {.meta_instruction = "M"};
    expect_stream(put_text("m.jsonl", "{\"messages\":[{\"role\":\"user\",\"content\":\"Q\"}]}"),
                  &meta, "<s><|im_start|>system\nM<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n");
    refuse(put_text("1.jsonl", "{\"text\":\"a\"}\n{\"text\":"), NULL, E_INPUT, "line 2");
    refuse(put_text("2.jsonl", "{\"text\":\"a\"}\n7"), NULL, E_INPUT,
           "line 2: expected a JSON object");
    refuse(put_text("3.jsonl", "{\"prompt\":\"a\"}"), NULL, E_INPUT, "line 1: expected a key text");
    refuse(put_text("4.jsonl", "{\"messages\":[]}"), NULL, E_INPUT, "line 1");
    refuse(put_text("5.jsonl", "{\"messages\":[{\"role\":\"user\"}]}"), NULL, E_INPUT, "message 1");
    refuse(put_text("6.jsonl", "{\"messages\":[{\"role\":\"x\",\"content\":\"y\"}]}"), NULL,
           E_INPUT, "'x'");
    refuse(put_text("7.json", "[{\"text\":\"a\"}]"), NULL, E_UNSUPPORTED, "array");
    refuse(put_text("8.jsonl", "{\"text\":\"\xff\"}"), NULL, E_INPUT, "line 1");
    token_list l = {0};
    err e;
    ck_assert(corpus_tokens(&l, path, NULL, tok, NULL, NULL, &e) ==
              E_UNSUPPORTED); /* no template */
    token_list_free(&l);
}
END_TEST

START_TEST(corpus_packed)
{
    char buf[4096];
    const char text[] = "packed text\n", rows[] = "{\"text\":\"row\"}\n";
    const size_t n = sizeof text - 1, z = packed(buf, sizeof buf, text, n);
    expect_stream(put("a.txt.zst", buf, z), NULL, "<s>packed text\n");
    memcpy(buf + z, buf, z); /* two frames, then a skippable one */
    memcpy(buf + 2 * z, "\x50\x2a\x4d\x18\2\0\0\0hi", 10);
    expect_stream(put("two.zst", buf, 2 * z + 10), NULL, "<s>packed text\npacked text\n");
    for (size_t k = 1; k < z; k++) { /* cut at every byte */
        const char *path = put("cut.zst", buf, k);
        if (k >= 4) refuse(path, NULL, E_INPUT, "zstd: cut short");
    }
    buf[z] = 'x';
    refuse(put("tail.zst", buf, z + 1), NULL, E_INPUT, "zstd");
    const member m[] = {{"x", text, n, 0, NULL}}, r[] = {{"x", rows, sizeof rows - 1, 0, NULL}};
    expect_stream(put_archive("a.gz", ARCHIVE_FILTER_GZIP, true, m, 1), NULL, "<s>packed text\n");
    expect_stream(put_archive("a.xz", ARCHIVE_FILTER_XZ, true, m, 1), NULL, "<s>packed text\n");
    expect_stream(put_archive("a.bz2", ARCHIVE_FILTER_BZIP2, true, m, 1), NULL, "<s>packed text\n");
    expect_stream(put_archive("r.jsonl.gz", ARCHIVE_FILTER_GZIP, true, r, 1), NULL, "<s>row");
    char *gz;
    size_t got;
    err e;
    ck_assert(file_read(&gz, &got, in_dir("a.xz"), 4096, &e) == OK);
    for (size_t k = 8; k < got; k += 5) refuse(put("cut.xz", gz, k), NULL, E_INPUT, "corrupt");
    mem_free(gz);
}
END_TEST

START_TEST(corpus_tar)
{
    char z[256];
    const size_t nz = packed(z, sizeof z, "zipped", 6);
    const member m[] = {{"d/", "", 0, AE_IFDIR, NULL},
                        {"d/a.txt", "A", 1, 0, NULL},
                        {"d/b.jsonl", "{\"text\":\"B\"}", 12, 0, NULL},
                        {"d/.hidden", "H", 1, 0, NULL},
                        {"l", "", 0, AE_IFLNK, "/etc/passwd"},
                        {"p", "", 0, AE_IFIFO, NULL},
                        {"d/c.txt.zst", z, nz, 0, NULL},
                        {"empty", "", 0, 0, NULL}};
    static const struct {
        const char *name;
        int filter;
    } kinds[] = {{"a.tar", ARCHIVE_FILTER_NONE},     {"a.tar.gz", ARCHIVE_FILTER_GZIP},
                 {"a.tgz", ARCHIVE_FILTER_GZIP},     {"a.tar.xz", ARCHIVE_FILTER_XZ},
                 {"a.tar.zst", ARCHIVE_FILTER_ZSTD}, {"named-oddly", ARCHIVE_FILTER_NONE}};
    for (size_t i = 0; i < sizeof kinds / sizeof *kinds; i++)
        expect_stream(put_archive(kinds[i].name, kinds[i].filter, false, m, 8), NULL,
                      "<s>A<s>B<s>zipped");
    const member hard[] = {{"a", "A", 1, 0, NULL}, {"h", "", 0, 0, "a"}};
    expect_stream(put_archive("hard.tar", ARCHIVE_FILTER_NONE, false, hard, 2), NULL, "<s>A");
    static const char *const hostile[] = {"/etc/x", "../x",  "a/../../x", "a/..",
                                          "..",     "C:\\x", "a\\..\\x",  "\\x"};
    for (size_t i = 0; i < sizeof hostile / sizeof *hostile; i++) {
        const member bad[] = {{"ok", "A", 1, 0, NULL}, {hostile[i], "B", 1, 0, NULL}};
        refuse(put_archive("bad.tar", ARCHIVE_FILTER_NONE, false, bad, 2), NULL, E_INPUT,
               "inside the archive");
    }
    const member dots[] = {{"a..b/c..d..", "A", 1, 0, NULL}};
    expect_stream(put_archive("dots.tar", ARCHIVE_FILTER_NONE, false, dots, 1), NULL, "<s>A");
    char *inner;
    size_t n;
    err e;
    ck_assert(file_read(&inner, &n, in_dir("dots.tar"), 1 << 20, &e) == OK);
    const member nested[] = {{"x.tar", inner, n, 0, NULL}};
    refuse(put_archive("nest.tar", ARCHIVE_FILTER_NONE, false, nested, 1), NULL, E_UNSUPPORTED,
           "inside an archive");
    refuse(put("cut.tar", inner, 512), NULL, E_INPUT, "cut.tar");
    mem_free(inner);
    refuse(put("empty.tar", "", 0), NULL, E_INPUT, "empty.tar");
}
END_TEST

/* A megabyte of the same byte packs a thousand times and more; that much is let through only
 * once. */
START_TEST(corpus_bomb)
{
    enum { BLOCK = 1 << 20, BLOCKS = 80 };
    char *zeros = malloc(BLOCK), *out = malloc(ZSTD_compressBound(BLOCK));
    memset(zeros, 'a', BLOCK);
    const size_t n = ZSTD_compress(out, ZSTD_compressBound(BLOCK), zeros, BLOCK, 19);
    FILE *f = fopen(in_dir("bomb.zst"), "wb");
    for (int i = 0; i < BLOCKS; i++) ck_assert_uint_eq(fwrite(out, 1, n, f), n);
    fclose(f);
    char *text;
    size_t got;
    err e;
    ck_assert(corpus_text(&text, &got, in_dir("bomb.zst"), (size_t)1 << 30, NULL, &e) == E_LIMIT);
    ck_assert_ptr_nonnull(strstr(e.msg, "times its size"));
    free(zeros);
    free(out);
}
END_TEST

START_TEST(corpus_bad_files)
{
    refuse(put_text("empty.txt", ""), NULL, E_INPUT, "no text");
    refuse(put_text("empty.jsonl", "\n\n"), NULL, E_INPUT, "no text");
    refuse(put("latin1.txt", "caf\xe9 x", 7), NULL, E_INPUT, "byte 3: invalid UTF-8");
    refuse(put("cut.txt", "ab\xe2\x82", 4), NULL, E_INPUT, "byte 2: invalid UTF-8");
    refuse(put("overlong.txt", "\xc0\xaf", 2), NULL, E_INPUT, "byte 0");
    refuse(put("surrogate.txt", "a\xed\xa0\x80", 4), NULL, E_INPUT, "byte 1");
    refuse(put("binary", "ab\0cd", 5), NULL, E_INPUT, "byte 2: a NUL byte");
    refuse(put("a.parquet", "PAR1xxxx", 8), NULL, E_UNSUPPORTED, "parquet");
    refuse(put("a.zip", "PK\3\4xxxx", 8), NULL, E_UNSUPPORTED, "zip");
    refuse(in_dir("nowhere"), NULL, E_IO, "cannot open");
    refuse(dir, NULL, E_INPUT, "regular file");
    ck_assert_int_eq(mkfifo(in_dir("fifo"), 0600), 0);
    refuse(in_dir("fifo"), NULL, E_INPUT, "regular file"); /* and does not wait for a writer */
    const corpus_read unknown = {.dataset = "imagenet"};
    token_list l = {0};
    err e;
    ck_assert(corpus_tokens(&l, put_text("a", "x"), &unknown, tok, NULL, NULL, &e) == E_USAGE);
    ck_assert(corpus_dataset_known("c4") && corpus_dataset_known("self") &&
              !corpus_dataset_known("imagenet"));
}
END_TEST

/* The stored odd files end in tokens or in one line. */
START_TEST(corpus_stored_odd_files)
{
    static const char *const folders[] = {"tar", "zstd/errors", "zstd/ok"};
    int seen = 0, accepted = 0;
    for (int k = 0; k < 3; k++) {
        char folder[512], path[1024];
        dir_list files;
        err e;
        snprintf(folder, sizeof folder, TMF_SHARED_DIR "/data/malformed/%s", folders[k]);
        if (!have(folder, "corpus_stored_odd_files")) return;
        ck_assert(dir_list_open(&files, folder, &e) == OK);
        for (size_t i = 0; i < files.n; i++, seen++) {
            token_list l = {0};
            e = (err){OK, ""};
            snprintf(path, sizeof path, "%s/%s", folder, files.names[i]);
            const err_code rc = corpus_tokens(&l, path, NULL, tok, chatml, NULL, &e);
            ck_assert_msg(rc == OK || rc == E_INPUT || rc == E_UNSUPPORTED, "%s: %s", path, e.msg);
            ck_assert_msg(rc == OK || strncmp(e.msg, path, strlen(path)) == 0, "'%s'", e.msg);
            accepted += rc == OK;
            token_list_free(&l);
        }
        dir_list_free(&files);
    }
    ck_assert_int_ge(seen, 23);
    ck_assert_int_ge(accepted, 6);
}
END_TEST

/* ---- named data sets ---- */

START_TEST(corpus_joins)
{
    const corpus_read wiki = {.dataset = "wikitext2"}, ptb = {.dataset = "ptb"},
                      self = {.dataset = "self"};
    const char *path = put_text("rows.txt", " \n = T = \n\n a b \nlast");
    expect_stream(path, &wiki, "<s>\n\n = T = \n\n\n\n\n a b \n\n\nlast\n");
    expect_stream(path, &ptb, "<s>\n\n= T =\n\n\n\na b\n\nlast");
    expect_stream(path, &self, "<s> \n = T = \n\n a b \nlast");
    expect_stream(
        put_text("rows.jsonl", "{\"text\":\"\"}\n{\"text\":\" x \\n\"}\n{\"text\":\"y\"}\n"), &wiki,
        "<s>\n\n x \n\n\ny");
    const char *raw = TMF_SHARED_DIR "/data/text/wikitext-2/wiki.test.raw";
    if (!have(raw, "corpus_joins")) return;
    const corpus_read joined = {.dataset = "wikitext2", .no_bos = true};
    char *want;
    size_t n;
    err e;
    ck_assert(corpus_text(&want, &n,
                          TMF_SHARED_DIR "/data/text/wikitext-2/wiki.test.joined.txt.zst", 1 << 24,
                          NULL, &e) == OK);
    char *got = stream_of(raw, &joined);
    ck_assert(!strcmp(got, want));
    free(got);
    mem_free(want);
}
END_TEST

/* ---- windows ---- */

static err_code windows(int32_t *ids, corpus_opts o, const char *const *paths, int n, err *e)
{
    o.paths = paths;
    o.n_paths = n;
    return corpus_windows(ids, &o, tok, chatml, NULL, e);
}

START_TEST(windows_first)
{
    const char *paths[] = {put_text("1", "abcdef"), put_text("2", "ghijkl")};
    int32_t ids[12], k = 0;
    char s[64];
    err e;
    const corpus_opts o = {.pick = PICK_FIRST, .samples = 3, .seqlen = 4};
    ck_assert_msg(windows(ids, o, paths, 2, &e) == OK, "%s", e.msg);
    byte_text(s, sizeof s, ids, 12);
    ck_assert_str_eq(s, "<s>abcdef<s>ghij");
    corpus_opts more = o;
    more.samples = 4;
    int32_t more_ids[16];
    ck_assert(windows(more_ids, more, paths, 2, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "at least 16 tokens (4 windows of 4), found 14"));
    more.samples = 0;
    ck_assert(windows(&k, more, paths, 2, &e) == E_USAGE);
    ck_assert(windows(ids, o, paths, 0, &e) == E_USAGE);
    paths[1] = in_dir("none");
    ck_assert(windows(ids, o, paths, 2, &e) == E_IO);
}
END_TEST

/* Every place of every file is as likely, no window crosses files, the seed decides. */
START_TEST(windows_random)
{
    char a[41], b[11];
    for (int i = 0; i < 40; i++) a[i] = (char)('0' + i);
    for (int i = 0; i < 10; i++) b[i] = (char)('a' + 10 + i);
    a[40] = b[10] = '\0';
    const char *paths[] = {put_text("1", a), put_text("2", b), put_text("3", "xyz")};
    enum { N = 4000, L = 5 };
    static int32_t ids[N * L], again[N * L];
    int from_b = 0, starts[64] = {0};
    err e;
    corpus_opts o = {.samples = N, .seqlen = L, .seed = 7};
    ck_assert_msg(windows(ids, o, paths, 3, &e) == OK, "%s", e.msg);
    for (int i = 0; i < N; i++) {
        const int32_t *w = ids + i * L;
        for (int k = 1; k + 1 < L; k++) ck_assert_int_eq(w[k + 1], w[k] + 1);
        if (w[1] >= 'a' + 10 && w[1] < 'a' + 20)
            from_b++;
        else
            starts[w[1] - '0']++;
    }
    /* 41 - 4 = 37 places in the first file, 11 - 4 = 7 in the second, none in the third */
    ck_assert_int_gt(from_b, N * 7 / 44 - 120);
    ck_assert_int_lt(from_b, N * 7 / 44 + 120);
    for (int i = 0; i < 36; i++)
        ck_assert_msg(starts[i] > 40 && starts[i] < 160, "place %d: %d times", i, starts[i]);
    ck_assert(windows(again, o, paths, 3, &e) == OK);
    ck_assert_mem_eq(ids, again, sizeof ids);
    o.seed = 8;
    ck_assert(windows(again, o, paths, 3, &e) == OK);
    ck_assert_mem_ne(ids, again, sizeof ids);
    o.seqlen = 60;
    o.samples = 1;
    ck_assert(windows(again, o, paths, 3, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "at least 60 tokens"));
}
END_TEST

/* "FILE:WEIGHT", and what is a name all the same. */
START_TEST(sources_parse)
{
    const char *odd = put_text("odd:3", "x");
    const char *const texts[] = {"a.txt:3", "b.jsonl", "c:d.txt", odd, "/e/f:1.0"};
    const double want[] = {3 / 7., 1 / 7., 1 / 7., 1 / 7., 1 / 7.};
    const char *const names[] = {"a.txt", "b.jsonl", "c:d.txt", odd, "/e/f"};
    const char *const wrong[] = {"a:0", "a:-1", "a:nan", "a:inf", "a:1e30"};
    corpus_sources s;
    err e;
    ck_assert_msg(corpus_sources_parse(&s, texts, 5, &e) == OK, "%s", e.msg);
    ck_assert(s.weighted);
    for (int i = 0; i < 5; i++) {
        ck_assert_str_eq(s.paths[i], names[i]);
        ck_assert_double_eq_tol(s.shares[i], want[i], 1e-12);
    }
    corpus_sources_free(&s);
    ck_assert(corpus_sources_parse(&s, texts + 1, 3, &e) == OK && !s.weighted);
    corpus_sources_free(&s);
    for (int i = 0; i < 5; i++) {
        ck_assert(corpus_sources_parse(&s, &wrong[i], 1, &e) == E_USAGE);
        ck_assert_ptr_nonnull(strstr(e.msg, "expected a weight above 0"));
        ck_assert_ptr_null(s.paths);
    }
}
END_TEST

/* Counts within one window of the shares, also among every eighth window. */
START_TEST(windows_shares)
{
    enum { N = 128 };
    const double shares[] = {0.5, 0.3, 0.2};
    int32_t source[N], counts[3], eighth[8][3] = {0};
    corpus_mix(source, counts, shares, 3, N);
    for (int i = 0; i < N; i++) eighth[i % 8][source[i]]++;
    for (int s = 0; s < 3; s++) {
        int32_t sum = 0;
        ck_assert(counts[s] > shares[s] * N - 1 && counts[s] < shares[s] * N + 1);
        for (int i = 0; i < 8; i++) {
            sum += eighth[i][s];
            ck_assert(eighth[i][s] > shares[s] * N / 8 - 2 && eighth[i][s] < shares[s] * N / 8 + 2);
        }
        ck_assert_int_eq(sum, counts[s]);
    }
    for (int n = 1; n < 20; n++) { /* every window has a source, however few there are */
        int32_t of[20], c[3];
        memset(of, -1, sizeof of);
        corpus_mix(of, c, shares, 3, n);
        for (int i = 0; i < n; i++) ck_assert(of[i] >= 0 && of[i] < 3);
        ck_assert_int_eq(of[n], -1);
        ck_assert_int_eq(c[0] + c[1] + c[2], n);
    }
}
END_TEST

/* Files give their shares whatever their lengths; one file twice gives two draws. */
START_TEST(windows_mixed)
{
    enum { N = 200, L = 4 };
    char a[401];
    for (int i = 0; i < 400; i++) a[i] = (char)('a' + i % 26);
    a[400] = 0;
    const char *paths[] = {put_text("1", a), put_text("2", "0123456789"), put_text("3", a)};
    const double shares[] = {0.25, 0.5, 0.25}, first[] = {0.5, 0.25, 0.25};
    static int32_t ids[N * L], again[N * L];
    int digits = 0;
    err e;
    corpus_opts o = {.samples = N, .seqlen = L, .seed = 3, .shares = shares};
    ck_assert_msg(windows(ids, o, paths, 3, &e) == OK, "%s", e.msg);
    for (int i = 0; i < N; i++) digits += ids[i * L + 1] >= '0' && ids[i * L + 1] <= '9';
    ck_assert_int_eq(digits, N / 2);
    ck_assert(windows(again, o, paths, 3, &e) == OK);
    ck_assert_mem_eq(ids, again, sizeof ids);
    o.seed = 4;
    ck_assert(windows(again, o, paths, 3, &e) == OK);
    ck_assert_mem_ne(ids, again, sizeof ids);
    int32_t source[N], counts[3], own[2][N * L], n[2] = {0};
    corpus_mix(source, counts, shares, 3, N);
    for (int i = 0; i < N; i++)
        if (source[i] != 1)
            memcpy(own[source[i] / 2] + L * n[source[i] / 2]++, again + i * L, L * sizeof *ids);
    ck_assert_int_eq(n[0], counts[0]);
    ck_assert(memcmp(own[0], own[1], (size_t)(n[0] * L) * sizeof *ids) != 0);
    o = (corpus_opts){.samples = 4, .seqlen = 2, .pick = PICK_FIRST, .shares = first};
    char s[64];
    ck_assert(windows(ids, o, paths, 3, &e) == OK);
    byte_text(s, sizeof s, ids, 8);
    ck_assert_str_eq(s, "<s>a<s>a<s>0bc");
    o.samples = 200; /* each file must hold its own windows */
    ck_assert(windows(again, o, paths, 3, &e) == E_INPUT);
}
END_TEST

/* Documents "aaaa...", "bbbb...": of 1 to 12 bytes each. */
static const char *documents(const char *name, int n)
{
    const char *path = in_dir(name);
    FILE *f = fopen(path, "wb");
    for (int i = 0; i < n; i++) {
        fprintf(f, "{\"text\":\" ");
        for (int k = 0; k <= i % 12; k++) fputc('A' + i % 50, f);
        fprintf(f, "\"}\n");
    }
    fclose(f);
    return path;
}

START_TEST(windows_c4)
{
    const char *paths[] = {documents("c4.json", 120)};
    enum { N = 20, L = 8 };
    int32_t ids[N * L], again[N * L];
    err e;
    corpus_opts o = {.dataset = "c4", .samples = N, .seqlen = L, .seed = 3};
    ck_assert_msg(windows(ids, o, paths, 1, &e) == OK, "%s", e.msg);
    int begins = 0, kinds[128] = {0};
    for (int i = 0; i < N; i++) {
        const int32_t last = ids[i * L + L - 1];
        begins += ids[i * L] == BYTE_BOS;
        kinds[last]++;
        for (int k = 2; k < L; k++) ck_assert_int_eq(ids[i * L + k], last); /* one document */
    }
    ck_assert(begins > 0 && begins < N); /* crops, and not all from the start */
    int several = 0;
    for (int i = 0; i < 128; i++) several += kinds[i] > 0;
    ck_assert_int_ge(several, 10);
    ck_assert(windows(again, o, paths, 1, &e) == OK);
    ck_assert_mem_eq(ids, again, sizeof ids);
    o.pick = PICK_FIRST;
    ck_assert(windows(ids, o, paths, 1, &e) == OK);
    for (int i = 0; i < N; i++) ck_assert_int_eq(ids[i * L], BYTE_BOS);
    ck_assert_int_eq(ids[3], 'A' + 5); /* the first with 8 tokens: <s>, a space and six letters */
    o.pick = PICK_RANDOM;
    o.seqlen = 15;
    o.samples = 1;
    ck_assert(windows(again, o, paths, 1, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "found 0 of 120"));
}
END_TEST

START_TEST(windows_pileval)
{
    char want[4096], got[4096];
    const char *paths[] = {documents("pile.jsonl", 12)};
    enum { N = 5, L = 10 };
    int32_t ids[N * L], again[N * L];
    err e;
    corpus_opts o = {.dataset = "pileval", .samples = N, .seqlen = L, .pick = PICK_FIRST};
    ck_assert_msg(windows(ids, o, paths, 1, &e) == OK, "%s", e.msg);
    byte_text(got, sizeof got, ids, N * L);
    char *all = stream_of(paths[0],
                          &(corpus_read){.dataset = "pileval"}); /* stripped documents in order */
    snprintf(want, sizeof want, "%s", all);
    ck_assert(!strncmp(got, want, strlen(got)));
    ck_assert(!strncmp(want, "<s>A<s>BB<s>CCC", 15));
    free(all);
    o.pick = PICK_RANDOM;
    ck_assert(windows(ids, o, paths, 1, &e) == OK && windows(again, o, paths, 1, &e) == OK);
    ck_assert_mem_eq(ids, again, sizeof ids);
    byte_text(want, sizeof want, ids, N * L);
    ck_assert_str_ne(got, want);
    ck_assert_int_eq(ids[0], BYTE_BOS);
    /* long documents are left out */
    char *big = malloc(5000);
    snprintf(big, 5000, "{\"text\":\"%0600d\"}\n{\"text\":\"ok\"}\n", 0);
    paths[0] = put_text("big.jsonl", big);
    free(big);
    o.samples = 1;
    o.seqlen = 3;
    ck_assert_msg(windows(ids, o, paths, 1, &e) == OK, "%s", e.msg);
    byte_text(got, sizeof got, ids, 3);
    ck_assert_str_eq(got, "<s>ok");
    o.seqlen = 4;
    ck_assert(windows(ids, o, paths, 1, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "found 3 in 1 of 2 documents"));
}
END_TEST

/* ---- stopping, memory ---- */

START_TEST(corpus_stops)
{
    atomic_bool stop = true;
    const job j = {.stop = &stop};
    token_list l = {0};
    err e;
    ck_assert(corpus_tokens(&l, put_text("t", "abc"), NULL, tok, NULL, &j, &e) == E_CANCELED);
    ck_assert(corpus_tokens(&l, put_text("t.jsonl", "{\"text\":\"a\"}"), NULL, tok, NULL, &j, &e) ==
              E_CANCELED);
    token_list_free(&l);
}
END_TEST

START_TEST(corpus_no_memory)
{
    const member m[] = {{"a.txt", "some text", 9, 0, NULL},
                        {"b.jsonl", "{\"text\":\"B\"}", 12, 0, NULL}};
    const char *tar = put_archive("a.tar.gz", ARCHIVE_FILTER_GZIP, false, m, 2),
               *docs = documents("p.jsonl", 30);
    const double all = 1;
    for (int kind = 0; kind < 4; kind++) {
        bool reached = true;
        for (long k = 1; reached; k++) {
            int32_t ids[6];
            const corpus_opts o = {.dataset = kind == 2 ? "pileval" : NULL,
                                   .shares = kind == 3 ? &all : NULL,
                                   .samples = 2,
                                   .seqlen = 3,
                                   .pick = kind ? PICK_RANDOM : PICK_FIRST};
            err e = {OK, ""};
            alloc_fail_at(k);
            const err_code rc = windows(ids, o, kind == 2 ? &docs : &tar, 1, &e);
            reached = alloc_failed();
            alloc_fail_at(0);
            ck_assert_msg(rc == (reached ? E_NOMEM : OK), "allocation %ld: %s '%s'", k,
                          err_name(rc), e.msg);
        }
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("corpus");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_test(c, corpus_text_file);
    tcase_add_test(c, corpus_long_text);
    tcase_add_test(c, corpus_jsonl);
    tcase_add_test(c, corpus_packed);
    tcase_add_test(c, corpus_tar);
    tcase_add_test(c, corpus_bomb);
    tcase_add_test(c, corpus_bad_files);
    tcase_add_test(c, corpus_stored_odd_files);
    tcase_add_test(c, corpus_joins);
    tcase_add_test(c, windows_first);
    tcase_add_test(c, windows_random);
    tcase_add_test(c, sources_parse);
    tcase_add_test(c, windows_shares);
    tcase_add_test(c, windows_mixed);
    tcase_add_test(c, windows_c4);
    tcase_add_test(c, windows_pileval);
    tcase_add_test(c, corpus_stops);
    tcase_add_test(c, corpus_no_memory);
    suite_add_tcase(s, c);
    return suite_run(s);
}
