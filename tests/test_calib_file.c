/* formats/calib_file and the spool behind it: what is written reads back, nothing else passes,
 * resume. */
#include "formats/calib_file.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/mem.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)
enum { SAMPLES = 9, SEQLEN = 5 };

static char root[256], path[300], part[320];
static model_desc m;
static int32_t ids[SAMPLES * SEQLEN];
static uint8_t held_out[SAMPLES];
static calib_block stats; /* owned data, freed in teardown */

static void setup(void)
{
    tempdir_make(root, sizeof root);
    (void)snprintf(path, sizeof path, "%s/calib", root);
    (void)snprintf(part, sizeof part, "%s.part", path);
    m = tiny_llama();
    for (int i = 0; i < SAMPLES * SEQLEN; i++) ids[i] = i % m.vocab;
    memset(held_out, 0, sizeof held_out);
    held_out[7] = 1;
    stats = calib_shape(&m);
    for (int i = 0; i < stats.n_taps; i++) {
        calib_tap *t = &stats.tap[i];
        t->count = SAMPLES * SEQLEN;
        t->absmax = tensor_1d(calloc((size_t)t->k, 4), DT_F32, t->k);
        t->abssum = tensor_1d(calloc((size_t)t->k, 8), DT_F64, t->k);
        t->blocks = tensor_of(calloc((size_t)(t->k * t->g), 4), DT_F32, 3,
                              (const int64_t[]){t->k / t->g, t->g, t->g});
    }
}

static void teardown(void)
{
    for (int i = 0; i < stats.n_taps; i++) {
        free(stats.tap[i].absmax.data);
        free(stats.tap[i].abssum.data);
        free(stats.tap[i].blocks.data);
    }
    tempdir_drop(root);
}

static void fill(int32_t layer)
{
    for (int i = 0; i < stats.n_taps; i++) {
        calib_tap *t = &stats.tap[i];
        for (int64_t c = 0; c < t->k; c++) {
            ((float *)t->absmax.data)[c] = (float)(c + layer) * 0.5f;
            ((double *)t->abssum.data)[c] = (double)(c + i) * 1.25;
        }
        for (int64_t c = 0; c < t->k * t->g; c++) ((float *)t->blocks.data)[c] = (float)(c % 31);
    }
}

static const spool_opts *spool_options(const char *print)
{
    static spool_opts o;
    o = (spool_opts){path, CALIB_KIND, CALIB_VERSION, print, m.layers, false};
    return &o;
}

static spool *open_spool(const char *print, bool *fresh)
{
    spool *s = NULL;
    err e;
    MUST(spool_open(&s, spool_options(print), fresh, &e));
    return s;
}

static void write_all(void)
{
    bool fresh;
    err e;
    spool *s = open_spool("print", &fresh);
    ck_assert(!fresh);
    for (int32_t l = 0; l < m.layers; l++) {
        fill(l);
        MUST(calib_put_layer(s, l, &stats, &e));
    }
    const calib_info info = {m.layers,           SAMPLES,       SEQLEN, "model-digest",
                             "tokenizer-digest", "{\"seed\":0}"};
    const tensor tokens = tensor_2d(ids, DT_I32, SAMPLES, SEQLEN),
                 held = tensor_1d(held_out, DT_U8, SAMPLES);
    MUST(calib_finish(s, &info, &tokens, &held, &e));
    spool_close(&s);
    ck_assert(!file_exists(part));
}

START_TEST(block_sizes)
{
    static const int64_t k[] = {4096, 172, 64, 192, 96, 100, 1, 131, 14336};
    static const int32_t g[] = {128, 86, 64, 64, 32, 100, 1, 1, 128};
    for (size_t i = 0; i < sizeof k / sizeof *k; i++)
        ck_assert_int_eq(calib_block_size(k[i]), g[i]);
}
END_TEST

START_TEST(round_trip)
{
    calib_file *f = NULL;
    calib_block b;
    err e;
    write_all();
    MUST(calib_open(&f, path, &e));
    MUST(calib_check_model(f, &m, "model-digest", &e));
    const calib_info *info = calib_info_of(f);
    ck_assert_int_eq(info->samples, SAMPLES);
    ck_assert_int_eq(info->seqlen, SEQLEN);
    ck_assert_str_eq(info->options, "{\"seed\":0}");
    ck_assert_mem_eq(calib_tokens(f).data, ids, sizeof ids);
    ck_assert_mem_eq(calib_held_out(f).data, held_out, sizeof held_out);
    for (int32_t l = 0; l < m.layers; l++) {
        fill(l);
        MUST(calib_layer(f, l, &b, &e));
        ck_assert_int_eq(b.n_taps, 4);
        for (int i = 0; i < 4; i++) {
            ck_assert_int_eq(b.tap[i].count, SAMPLES * SEQLEN);
            ck_assert_mem_eq(b.tap[i].absmax.data, stats.tap[i].absmax.data,
                             tensor_bytes(&stats.tap[i].absmax));
            ck_assert_mem_eq(b.tap[i].abssum.data, stats.tap[i].abssum.data,
                             tensor_bytes(&stats.tap[i].abssum));
            ck_assert_mem_eq(b.tap[i].blocks.data, stats.tap[i].blocks.data,
                             tensor_bytes(&stats.tap[i].blocks));
        }
    }
    ck_assert_ptr_eq(calib_find(&b, ROLE_K), &b.tap[0]);
    ck_assert_ptr_eq(calib_find(&b, ROLE_UP), &b.tap[2]);
    ck_assert_ptr_null(calib_find(&b, ROLE_EMBED));
    ck_assert_int_eq(calib_layer(f, m.layers, &b, &e), E_INPUT);
    calib_close(&f);
}
END_TEST

START_TEST(same_bytes_twice)
{
    char *first, *second;
    size_t a, b;
    err e;
    write_all();
    MUST(file_read(&first, &a, path, 1 << 24, &e));
    ck_assert_int_eq(unlink(path), 0);
    write_all();
    MUST(file_read(&second, &b, path, 1 << 24, &e));
    ck_assert_uint_eq(a, b);
    ck_assert_mem_eq(first, second, a);
    mem_free(first);
    mem_free(second);
}
END_TEST

START_TEST(wrong_parent)
{
    calib_file *f = NULL;
    err e;
    write_all();
    MUST(calib_open(&f, path, &e));
    ck_assert_int_eq(calib_check_model(f, &m, "another", &e), E_INPUT);
    ck_assert(strstr(e.msg, "model-digest") && strstr(e.msg, "another"));
    model_desc other = m;
    other.layers++;
    ck_assert_int_eq(calib_check_model(f, &other, "model-digest", &e), E_INPUT);
    ck_assert(strstr(e.msg, "expected 3 layers, found 2") != NULL);
    other = m;
    other.ffn += 128;
    ck_assert_int_eq(calib_check_model(f, &other, "model-digest", &e), E_INPUT);
    ck_assert(strstr(e.msg, "down: expected 512 channels, found 384") != NULL);
    other = m;
    other.vocab = 40;
    ck_assert_int_eq(calib_check_model(f, &other, "model-digest", &e), E_INPUT);
    calib_close(&f);
}
END_TEST

/* The bytes of the file with one changed; must be refused naming the file. */
static void refuse_changed(const char *text, size_t n, size_t at, uint8_t value)
{
    calib_file *f = NULL;
    char *copy = malloc(n);
    err e = {0};
    memcpy(copy, text, n);
    copy[at] = (char)value;
    ck_assert_msg(calib_open_memory(&f, copy, n, "x.calib", &e) != OK, "byte %zu", at);
    ck_assert(strncmp(e.msg, "x.calib: ", 9) == 0);
    free(copy);
}

START_TEST(corruption)
{
    calib_file *f = NULL;
    char *text;
    size_t n;
    err e;
    write_all();
    MUST(file_read(&text, &n, path, 1 << 24, &e));
    uint64_t head;
    memcpy(&head, text, 8);
    for (size_t at = 8 + head; at < n; at += 4999)
        refuse_changed(text, n, at, (uint8_t)(text[at] ^ 0x40));
    refuse_changed(text, n, n - 1, (uint8_t)(text[n - 1] ^ 1));
    for (size_t at = 0; at < n; at += at < 9 + head ? 251 : 65521) {
        ck_assert_int_ne(calib_open_memory(&f, text, at, "cut", &e), OK);
        ck_assert_ptr_null(f);
    }
    mem_free(text);
}
END_TEST

/* Replaces a text in the header by one of equal length. */
static void replace(char *text, size_t n, const char *from, const char *to)
{
    char *at = memmem(text, n, from, strlen(from));
    ck_assert_ptr_nonnull(at);
    ck_assert_uint_eq(strlen(from), strlen(to));
    memcpy(at, to, strlen(to));
}

START_TEST(other_headers)
{
    static const char *const cases[][3] = {
        {"\"kind\":\"calib\"", "\"kind\":\"plane\"", "kind: expected 'calib', found 'plane'"},
        {"\"version\":\"1\"", "\"version\":\"9\"", "version: expected '1', found '9'"},
        {"\"layers\":\"2\"", "\"layers\":\"3\"", "layers.2.qkv.absmax"},
        {"\"layers\":\"2\"", "\"layers\":\"x\"", "layers: expected 1 to 4096, found 'x'"},
        {"\"layers\":\"2\"", "\"layers\":\"1\"", "expected 18 tensors, found 34"},
        {"\"parent.model\"", "\"parent.motel\"", "expected key 'parent.model', found none"},
    };
    char *text;
    size_t n;
    err e;
    write_all();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        calib_file *f = NULL;
        MUST(file_read(&text, &n, path, 1 << 24, &e));
        replace(text, n, cases[i][0], cases[i][1]);
        ck_assert_int_eq(calib_open_memory(&f, text, n, "x", &e), E_INPUT);
        ck_assert_msg(strstr(e.msg, cases[i][2]) != NULL, "%s", e.msg);
        mem_free(text);
    }
}
END_TEST

START_TEST(values_are_checked)
{
    static const struct {
        int what;
        double v;
        const char *text;
    } cases[] = {
        {0, NAN, "qkv: absmax of channel 3"},
        {0, -1, "absmax of channel 3"},
        {1, INFINITY, "abssum of channel 3"},
        {2, NAN, "blocks of channel 0"},
    };
    err e;
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        calib_file *f = NULL;
        calib_block b;
        bool fresh;
        spool *s = open_spool("print", &fresh);
        for (int32_t l = 0; l < m.layers; l++) {
            fill(l);
            if (cases[i].what == 0) ((float *)stats.tap[0].absmax.data)[3] = (float)cases[i].v;
            if (cases[i].what == 1) ((double *)stats.tap[0].abssum.data)[3] = cases[i].v;
            if (cases[i].what == 2) ((float *)stats.tap[0].blocks.data)[3] = (float)cases[i].v;
            MUST(calib_put_layer(s, l, &stats, &e));
        }
        const calib_info info = {m.layers, SAMPLES, SEQLEN, "model", "tokenizer", "{}"};
        const tensor tokens = tensor_2d(ids, DT_I32, SAMPLES, SEQLEN),
                     held = tensor_1d(held_out, DT_U8, SAMPLES);
        MUST(calib_finish(s, &info, &tokens, &held, &e));
        spool_close(&s);
        MUST(calib_open(&f, path, &e));
        ck_assert_int_eq(calib_layer(f, 0, &b, &e), E_INPUT);
        ck_assert_msg(strstr(e.msg, cases[i].text) != NULL, "%s", e.msg);
        calib_close(&f);
        ck_assert_int_eq(unlink(path), 0);
    }
}
END_TEST

/* What a killed run leaves: its layers are there for the same fingerprint only, damaged ones are
 * not. */
START_TEST(resume)
{
    float states[6] = {1, 2, 3, 4, 5, 6}, found[6] = {0};
    tensor in = tensor_2d(states, DT_F32, 2, 3), out = tensor_2d(found, DT_F32, 2, 3);
    char file[400];
    bool fresh;
    int32_t layer;
    err e;
    spool *s = open_spool("print", &fresh);
    fill(0);
    MUST(calib_put_layer(s, 0, &stats, &e));
    MUST(spool_put_state(s, 1, &in, &e));
    spool_close(&s);
    ck_assert(!file_exists(path) && file_is_dir(part));

    s = open_spool("another", &fresh);
    ck_assert_int_eq(spool_count(s), 0);
    MUST(spool_get_state(s, &layer, &out, &e));
    ck_assert_int_eq(layer, 0);
    spool_close(&s);

    s = open_spool("print", &fresh);
    ck_assert(spool_has(s, 0) && !spool_has(s, 1));
    MUST(spool_get_state(s, &layer, &out, &e));
    ck_assert_int_eq(layer, 1);
    ck_assert_mem_eq(found, states, sizeof states);
    out = tensor_2d(found, DT_F32, 3, 2); /* of another run's shape */
    MUST(spool_get_state(s, &layer, &out, &e));
    ck_assert_int_eq(layer, 0);
    spool_close(&s);

    (void)snprintf(file, sizeof file, "%s/layer-00000", part);
    ck_assert_int_eq(truncate(file, 1000), 0);
    s = open_spool("print", &fresh);
    ck_assert(!spool_has(s, 0));
    spool_close(&s);
    write_all();
}
END_TEST

START_TEST(targets)
{
    bool fresh;
    spool *s = NULL, *second = NULL;
    err e;
    write_all();
    s = open_spool("print", &fresh);
    ck_assert(fresh);
    ck_assert_int_eq(spool_open(&second, spool_options("print"), &fresh, &e), E_IO); /* locked */
    spool_close(&s);
    s = open_spool("another", &fresh); /* ours and stale: will be replaced */
    ck_assert(!fresh);
    spool_close(&s);
    tiny_file_write(root, "calib", "somebody's notes");
    ck_assert_int_eq(spool_open(&s, spool_options("print"), &fresh, &e), E_USAGE);
    ck_assert(strstr(e.msg, "--force") != NULL);
    ck_assert_ptr_null(s);
    ck_assert_int_eq(unlink(path), 0);
    ck_assert_int_eq(mkdir(path, 0777), 0);
    ck_assert_int_eq(spool_open(&s, spool_options("print"), &fresh, &e), E_USAGE);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("calib_file");
    TCase *t = tcase_create("file");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, block_sizes);
    tcase_add_test(t, round_trip);
    tcase_add_test(t, same_bytes_twice);
    tcase_add_test(t, wrong_parent);
    tcase_add_test(t, corruption);
    tcase_add_test(t, other_headers);
    tcase_add_test(t, values_are_checked);
    tcase_add_test(t, resume);
    tcase_add_test(t, targets);
    suite_add_tcase(s, t);
    return suite_run(s);
}
