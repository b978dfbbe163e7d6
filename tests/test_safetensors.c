/* formats/safetensors: the collection of damaged files, every truncation, the rules one by one,
 * round trips, and the writer's promises. */
#include "formats/safetensors.h"

#include <check.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include "base/json.h"
#include "base/mem.h"
#include "support/alloc_fail.h"
#include "support/suite.h"
#include "support/tempdir.h"

#define DAMAGED TMF_SHARED_DIR "/data/malformed/safetensors"

/* One line that begins with the subject and says more than it. */
static void check_message(const err *e, const char *subject, const char *file)
{
    ck_assert_msg(strncmp(e->msg, subject, strlen(subject)) == 0, "%s: '%s'", file, e->msg);
    ck_assert_uint_gt(strlen(e->msg), strlen(subject) + 2);
    for (const char *p = e->msg; *p; p++)
        ck_assert_msg((unsigned char)*p >= 0x20, "%s: control byte in '%s'", file, e->msg);
}

/* ---- the collection ---- */
START_TEST(st_collection)
{
    cJSON *list;
    err e;
    int accepted = 0, refused = 0;
    if (!file_exists(DAMAGED "/MANIFEST.json")) {
        printf("SKIP st_collection: " DAMAGED " is not there\n");
        return;
    }
    ck_assert_msg(json_load(&list, DAMAGED "/MANIFEST.json", 1 << 20, &e) == OK, "%s", e.msg);
    for (const cJSON *c = list->child; c; c = c->next) {
        const char *name = cJSON_GetObjectItem(c, "file")->valuestring;
        const bool accept = strcmp(cJSON_GetObjectItem(c, "expect")->valuestring, "accept") == 0;
        char path[4096];
        st_file *f;
        (void)snprintf(path, sizeof path, "%s/%s", DAMAGED, name);
        const err_code rc = st_open(&f, path, &e);
        ck_assert_msg((rc == OK) == accept, "%s: %s", name, rc == OK ? "accepted" : e.msg);
        if (rc == OK) {
            accepted++;
            size_t sum = 0, head;
            for (int64_t i = 0; i < st_count(f); i++) {
                const st_entry t = st_at(f, i);
                sum += tensor_bytes(&t.view);
            }
            (void)st_head(f, &head);
            ck_assert_uint_eq(head + sum, st_bytes(f));
        } else {
            refused++;
            ck_assert_msg(rc == E_INPUT, "%s: %s", name, err_name(rc));
            ck_assert_ptr_null(f);
            check_message(&e, path, name);
        }
        st_close(&f);
    }
    ck_assert_int_eq(accepted, 5);
    ck_assert_int_eq(refused, 22);
    cJSON_Delete(list);
}
END_TEST

START_TEST(st_collection_content)
{
    st_file *f;
    err e;
    if (!file_exists(DAMAGED "/ok-metadata.safetensors")) {
        printf("SKIP st_collection_content: " DAMAGED " is not there\n");
        return;
    }
    ck_assert(st_open(&f, DAMAGED "/ok-scalar.safetensors", &e) == OK);
    ck_assert_int_eq(st_count(f), 1);
    const st_entry scalar = st_at(f, 0);
    ck_assert_int_eq(scalar.view.ndim, 0);
    ck_assert_int_eq(tensor_count(&scalar.view), 1);
    st_close(&f);
    ck_assert(st_open(&f, DAMAGED "/ok-zero-size.safetensors", &e) == OK);
    bool empty = false;
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        empty = empty || tensor_count(&t.view) == 0;
    }
    ck_assert(empty);
    st_close(&f);
    ck_assert(st_open(&f, DAMAGED "/ok-metadata.safetensors", &e) == OK);
    ck_assert_str_eq(st_meta(f, "format"), "pt");
    ck_assert_ptr_null(st_meta(f, "no such key"));
    st_close(&f);
}
END_TEST

/* ---- headers made here ---- */
static size_t compose(uint8_t *buf, const char *header, size_t n, size_t data)
{
    for (int i = 0; i < 8; i++) buf[i] = (uint8_t)(n >> (8 * i));
    memcpy(buf + 8, header, n);
    memset(buf + 8 + n, 0x5a, data);
    return 8 + n + data;
}

/* Opens a header with `data` bytes behind it; NULL: accepted, else the message must hold the
 * fragment. */
static void check_header(const char *header, size_t data, const char *fragment)
{
    uint8_t *buf = malloc(8 + strlen(header) + data);
    const size_t n = compose(buf, header, strlen(header), data);
    st_file *f;
    err e;
    const err_code rc = st_open_memory(&f, buf, n, "m", &e);
    if (!fragment) {
        ck_assert_msg(rc == OK, "%s: %s", header, e.msg);
    } else {
        ck_assert_msg(rc != OK, "%s: accepted", header);
        ck_assert_msg(strstr(e.msg, fragment), "%s: '%s' lacks '%s'", header, e.msg, fragment);
        check_message(&e, "m: ", header);
    }
    st_close(&f);
    free(buf);
}

#define T(members) "{\"a\":{" members "}}"
#define U8(shape, from, to) \
    "\"dtype\":\"U8\",\"shape\":[" shape "],\"data_offsets\":[" #from "," #to "]"

START_TEST(st_rules)
{
    static const struct {
        const char *header;
        size_t data;
        const char *fragment;
    } cases[] = {
        {"{}", 0, NULL},
        {"{ }", 0, NULL},
        {"{}   ", 0, NULL},
        {"{}", 1, "end at byte 0"},
        {" {}", 0, "expected '{'"},
        {"[]", 0, "expected '{'"},
        {"{}x", 0, "nothing but spaces"},
        {"{,}", 0, "name of a tensor"},
        {"{\"a\"}", 0, "':'"},
        {T(U8("4", 0, 4)), 4, NULL},
        {T(U8("4", 0, 4) ","), 4, "member of a tensor"},
        {T(U8("4", 0, 4)) "{}", 4, "nothing but spaces"},
        {T(U8("4", 0, 4)), 3, "beyond the file's 3 bytes"},
        {T(U8("4", 0, 4)), 5, "the file has 5"},
        {T(U8("4", 1, 5)), 5, "a gap"},
        {T(U8("4", 4, 0)), 4, "before they begin"},
        {T(U8("5", 0, 4)), 4, "make 5 bytes"},
        {T(U8("4.0", 0, 4)), 4, "not whole"},
        {T(U8("4e0", 0, 4)), 4, "not whole"},
        {T(U8("04", 0, 4)), 4, "begins with 0"},
        {T(U8("-4", 0, 4)), 4, "not below 0"},
        {T(U8("+4", 0, 4)), 4, "not below 0"},
        {T(U8("4,", 0, 4)), 4, "not below 0"},
        {T(U8("\"4\"", 0, 4)), 4, "not below 0"},
        {T(U8("9223372036854775808", 0, 4)), 4, "above 2^63"},
        {T(U8("18446744073709551620", 0, 4)), 4, "above 2^63"},
        {T(U8("4294967296,4294967296,0", 0, 0)), 0, "overflows"},
        {T(U8("1,1,1,1,1,1,1,1", 0, 1)), 1, NULL},
        {T(U8("1,1,1,1,1,1,1,1,1", 0, 1)), 1, "more than 8 dimensions"},
        {T("\"dtype\":\"U8\",\"shape\":[4]"), 4, "data_offsets is missing"},
        {T("\"shape\":[4],\"data_offsets\":[0,4]"), 4, "dtype is missing"},
        {T("\"dtype\":\"U8\",\"data_offsets\":[0,4]"), 4, "shape is missing"},
        {T(U8("4", 0, 4) ",\"dtype\":\"U8\""), 4, "dtype stands there twice"},
        {T("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4,4]"), 4,
         "behind two data_offsets"},
        {T("\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0]"), 4, "between data_offsets"},
        {T("\"dtype\":\"u8\",\"shape\":[4],\"data_offsets\":[0,4]"), 4, "unknown dtype 'u8'"},
        {T("\"dtype\":\"none\",\"shape\":[4],\"data_offsets\":[0,4]"), 4, "unknown dtype"},
        {T("\"dtype\":\"F4\",\"shape\":[4],\"data_offsets\":[0,2]"), 2, "F4 is not supported"},
        {T("\"dtype\":5,\"shape\":[4],\"data_offsets\":[0,4]"), 4, "expected a dtype"},
        {T("\"x\":[1,{\"y\":[null,true,-1.5e3,\"]}\"],\"z\":{}},[]],\"w\":{}," U8("4", 0, 4)), 4,
         NULL},
        {T("\"x\":[1,{\"y\":[null}]]," U8("4", 0, 4)), 4, "closing bracket"},
        {T("\"x\":[[[[[[[[[[[[[[[[[[1]]]]]]]]]]]]]]]]]]," U8("4", 0, 4)), 4, "nested deeper"},
        {T("\"x\":," U8("4", 0, 4)), 4, "expected a value"},
        {"{\"a\":[]}", 0, "'{' of a tensor"},
        {"{\"a\":{" U8("2", 0, 2) "},\"b\":{" U8("2", 1, 3) "}}", 3, "overlap"},
        {"{\"a\":{" U8("2", 0, 2) "},\"b\":{" U8("2", 3, 5) "}}", 5, "a gap"},
        {"{\"a\":{" U8("2", 0, 2) "},\"a\":{" U8("2", 2, 4) "}}", 4,
         "tensor 'a' stands there twice"},
        {"{\"a\":{" U8("2", 0, 2) "},\"\\u0061\":{" U8("2", 2, 4) "}}", 4,
         "tensor 'a' stands there twice"},
        {"{\"b\":{" U8("2", 2, 4) "},\"a\":{" U8("2", 0, 2) "}}", 4, NULL},
        {"{\"a\":{" U8("0", 0, 0) "},\"b\":{" U8("2", 0, 2) "},\"c\":{" U8("0", 2, 2) "}}", 2,
         NULL},
        {"{\"a\":{" U8("0", 1, 1) "},\"b\":{" U8("2", 0, 2) "}}", 2,
         "tensor 'a': begins at byte 1"},
        {"{\"__metadata__\":{\"a\":\"b\",\"c\":\"\"}}", 0, NULL},
        {"{\"__metadata__\":{}}", 0, NULL},
        {"{\"__metadata__\":{\"a\":1}}", 0, "a string as value"},
        {"{\"__metadata__\":{\"a\":null}}", 0, "a string as value"},
        {"{\"__metadata__\":null}", 0, "'{' of __metadata__"},
        {"{\"__metadata__\":{\"a\":\"b\",\"a\":\"b\"}}", 0, "key 'a' stands there twice"},
        {"{\"__metadata__\":{},\"__metadata__\":{}}", 0, "__metadata__ stands there twice"},
        {"{\"\\u0000\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"\\ud800\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"\\udc00\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"\\ud83d\\u0041\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"\\ud83d\\ude00\\n\\\"\\\\\":{" U8("0", 0, 0) "}}", 0, NULL},
        {"{\"\\x41\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"\\u12g4\":{" U8("0", 0, 0) "}}", 0, "valid escape"},
        {"{\"a\nb\":{" U8("0", 0, 0) "}}", 0, "character of a string"},
        {"{\"a", 0, "end of a string"},
        {"{\"\xc3\x28\":{" U8("0", 0, 0) "}}", 0, "UTF-8"},
        {"{\"\xed\xa0\x80\":{" U8("0", 0, 0) "}}", 0, "UTF-8"},
        {"{'a':{" U8("0", 0, 0) "}}", 0, "name of a tensor"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        check_header(cases[i].header, cases[i].data, cases[i].fragment);
}
END_TEST

START_TEST(st_names_in_messages)
{
    char header[8192], want[128];
    /* A name of 5,000 bytes with control bytes: the message shows its start on one line. */
    int n = snprintf(header, sizeof header, "{\"\\n\\u001b[2J");
    memset(header + n, 'x', 5000);
    (void)snprintf(header + n + 5000, sizeof header - (size_t)n - 5000, "\":{" U8("3", 0, 4) "}}");
    check_header(header, 4, "??[2Jxxx");
    check_header(header, 4, "xxx...'");
    /* The cut does not fall into a character. */
    n = snprintf(header, sizeof header, "{\"");
    for (int i = 0; i < 200; i++, n += 3) memcpy(header + n, "\xe4\xb8\xad", 3);
    (void)snprintf(header + n, sizeof header - (size_t)n, "\":{" U8("3", 0, 4) "}}");
    (void)snprintf(want, sizeof want, "\xe4\xb8\xad...'");
    check_header(header, 4, want);
}
END_TEST

START_TEST(st_many_tensors)
{
    enum { N = 200000 };
    char *header = malloc((size_t)N * 80);
    uint8_t *buf;
    size_t n = 0;
    st_file *f;
    tensor v;
    err e;
    n += (size_t)sprintf(header + n, "{");
    for (int i = 0; i < N; i++)
        n += (size_t)sprintf(
            header + n, "%s\"layer.%d\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[%d,%d]}",
            i ? "," : "", i, i, i + 1);
    n += (size_t)sprintf(header + n, "}");
    buf = malloc(8 + n + N);
    const size_t size = compose(buf, header, n, N);
    const clock_t start = clock();
    ck_assert_msg(st_open_memory(&f, buf, size, "m", &e) == OK, "%s", e.msg);
    ck_assert_int_eq(st_count(f), N);
    for (int i = 0; i < N; i += 7) {
        char name[32];
        (void)snprintf(name, sizeof name, "layer.%d", i);
        ck_assert(st_find(f, name, &v));
        ck_assert_ptr_eq(v.data, buf + 8 + n + i);
    }
    ck_assert(!st_find(f, "layer.-1", &v));
    ck_assert_double_lt((double)(clock() - start) / CLOCKS_PER_SEC,
                        20.0); /* quadratic would take minutes */
    st_close(&f);
    free(buf);
    free(header);
}
END_TEST

START_TEST(st_unaligned)
{
    /* One byte before a tensor of two-byte values: found, but not handed out as readable. */
    static const char header[] = "{\"a\":{" U8(
        "1", 0, 1) "},\"b\":{\"dtype\":\"F16\",\"shape\":[2],\"data_offsets\":[1,5]}}  ";
    uint8_t *buf = malloc(8 + sizeof header + 8);
    const size_t pad = strlen(header) % 2; /* the data begins on an even byte */
    const size_t n = compose(buf, header, strlen(header) - pad, 5);
    st_file *f;
    tensor v;
    err e;
    ck_assert_msg(st_open_memory(&f, buf, n, "m", &e) == OK, "%s", e.msg);
    ck_assert(st_find(f, "b", &v));
    ck_assert(!st_aligned(&v));
    ck_assert_int_eq(st_get(f, "b", &v, &e), E_UNSUPPORTED);
    ck_assert_str_eq(e.msg, "m: tensor 'b': its data is not aligned to F16");
    ck_assert_int_eq(st_get(f, "a", &v, &e), OK);
    ck_assert_int_eq(st_get(f, "c", &v, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "m: tensor 'c' is missing");
    st_close(&f);
    free(buf);
}
END_TEST

/* ---- writing ---- */
static const char *const meta[] = {"zeta",   "last \"quoted\"\n", "format", "pt",
                                   "digest", "00000000",          NULL};

static char long_name[5001] = "nnnnnnnnnn"; /* long only where that is the point */

/* Small tensors of all kinds; value i of tensor t is a pattern of both. */
static const struct {
    const char *name;
    dtype dt;
    int ndim;
    int64_t shape[8];
} sample[] = {
    {"b.f64", DT_F64, 1, {3}},
    {"a.f16", DT_F16, 2, {2, 3}},
    {"scalar", DT_F32, 0, {0}},
    {"empty", DT_BF16, 3, {4, 0, 2}},
    {long_name, DT_U8, 1, {5}},
    {"quote\" back\\ tab\t bell\a \xe4\xb8\xad", DT_I32, 1, {2}},
    {"rank8", DT_I8, 8, {1, 2, 1, 2, 1, 3, 1, 2}},
    {"flags", DT_BOOL, 1, {7}},
    {"", DT_U64, 1, {1}},
    {"f8", DT_F8_E5M2, 1, {3}},
    {"i64", DT_I64, 1, {2}},
    {"u16", DT_U16, 1, {9}},
};
enum { N_SAMPLE = sizeof sample / sizeof sample[0] };

static int64_t sample_count(int t)
{
    int64_t n = 1;
    for (int i = 0; i < sample[t].ndim; i++) n *= sample[t].shape[i];
    return n;
}

static void sample_fill(uint8_t *buf, int t)
{
    const size_t n = (size_t)sample_count(t) * dtype_bytes(sample[t].dt);
    for (size_t i = 0; i < n; i++) buf[i] = (uint8_t)(i * 7 + (size_t)t * 31 + 1);
}

/* step walks the tensors in another order for another value; parts writes each in pieces from the
 * back. */
static void write_sample(const char *path, int step, bool parts)
{
    st_writer *w;
    err e;
    uint8_t buf[256];
    ck_assert_msg(st_writer_open(&w, path, meta, true, &e) == OK, "%s", e.msg);
    for (int k = 0; k < N_SAMPLE; k++) {
        const int t = k * step % N_SAMPLE;
        ck_assert_msg(st_writer_add(w, sample[t].name, sample[t].dt, sample[t].ndim,
                                    sample[t].shape, &e) == OK,
                      "%s", e.msg);
    }
    for (int k = 0; k < N_SAMPLE; k++) {
        const int t = (k * step + 3) % N_SAMPLE;
        const int64_t n = sample_count(t);
        const size_t size = dtype_bytes(sample[t].dt);
        sample_fill(buf, t);
        if (!parts && sample[t].ndim <= 4) {
            const tensor v = tensor_of(buf, sample[t].dt, sample[t].ndim, sample[t].shape);
            ck_assert_msg(st_writer_data(w, sample[t].name, &v, &e) == OK, "%s", e.msg);
            continue;
        }
        /* odd elements from the back, then the even ones: ranges must merge */
        for (int64_t i = n - 1; i >= 0; i--)
            if (i % 2)
                ck_assert(st_writer_part(w, sample[t].name, i, buf + (size_t)i * size, 1, &e) ==
                          OK);
        for (int64_t i = 0; i < n; i += 2)
            ck_assert_msg(st_writer_part(w, sample[t].name, i, buf + (size_t)i * size, 1, &e) == OK,
                          "%s", e.msg);
    }
    ck_assert(st_writer_meta(w, "digest", "cafe1234", &e) == OK);
    const uint64_t bytes = st_writer_bytes(w);
    uint64_t size;
    ck_assert_msg(st_writer_commit(&w, &e) == OK, "%s", e.msg);
    ck_assert_ptr_null(w);
    ck_assert(file_size(&size, path, &e) == OK);
    ck_assert_uint_eq(size, bytes);
}

static void check_sample(const st_file *f)
{
    ck_assert_int_eq(st_count(f), N_SAMPLE);
    for (int t = 0; t < N_SAMPLE; t++) {
        uint8_t want[256];
        tensor v;
        err e;
        sample_fill(want, t);
        ck_assert_msg(st_get(f, sample[t].name, &v, &e) == OK, "%s", e.msg);
        ck_assert_int_eq((int)v.dt, (int)sample[t].dt);
        ck_assert_int_eq(tensor_count(&v), sample_count(t));
        if (sample[t].ndim <= 4) ck_assert_int_eq(v.ndim, sample[t].ndim);
        ck_assert_mem_eq(v.data, want, tensor_bytes(&v));
    }
    ck_assert_str_eq(st_meta(f, "digest"), "cafe1234");
    ck_assert_str_eq(st_meta(f, "zeta"), "last \"quoted\"\n");
}

START_TEST(st_round_trip)
{
    char dir[64], path[128];
    st_file *f;
    size_t head;
    err e;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x.safetensors", dir);
    memset(long_name, 'n', sizeof long_name - 1);
    write_sample(path, 1, false);
    ck_assert_msg(st_open(&f, path, &e) == OK, "%s", e.msg);
    check_sample(f);
    ck_assert_str_eq(st_path(f), path);
    (void)st_head(f, &head);
    ck_assert_uint_eq(head % 64, 0);
    for (int64_t i = 0; i < st_count(f); i++) { /* alignment falls, names rise within it */
        const st_entry t = st_at(f, i);
        ck_assert(st_aligned(&t.view));
        if (i) {
            const st_entry p = st_at(f, i - 1);
            ck_assert_uint_ge(dtype_bytes(p.view.dt), dtype_bytes(t.view.dt));
            if (dtype_bytes(p.view.dt) == dtype_bytes(t.view.dt))
                ck_assert_int_lt(strcmp(p.name, t.name), 0);
        }
        if (strcmp(t.name, "rank8") == 0) {
            ck_assert_int_eq(t.full_ndim, 8);
            ck_assert_int_eq(t.full_shape[5], 3);
            ck_assert_int_eq(t.view.ndim, 4);
            ck_assert_int_eq(t.view.shape[0], 4);
            ck_assert_int_eq(t.view.shape[1], 3);
        }
    }
    for (int need = 1; need >= 0; need--) { /* hints change nothing that is read */
        const st_entry t = st_at(f, 0);
        st_advise(f, &t.view, need);
    }
    check_sample(f);
    st_close(&f);
    tempdir_drop(dir);
}
END_TEST

static void check_same_file(const char *a, const char *b)
{
    char *x, *y;
    size_t n, m;
    err e;
    ck_assert(file_read(&x, &n, a, 1 << 20, &e) == OK);
    ck_assert(file_read(&y, &m, b, 1 << 20, &e) == OK);
    ck_assert_uint_eq(n, m);
    ck_assert_mem_eq(x, y, n);
    mem_free(x);
    mem_free(y);
}

START_TEST(st_same_calls_same_bytes)
{
    char dir[64], a[128], b[128];
    tempdir_make(dir, sizeof dir);
    (void)snprintf(a, sizeof a, "%s/a", dir);
    (void)snprintf(b, sizeof b, "%s/b", dir);
    write_sample(a, 1, false);
    write_sample(b, 1, false);
    check_same_file(a, b);
    write_sample(b, 5, true); /* another order, in pieces */
    check_same_file(a, b);
    tempdir_drop(dir);
}
END_TEST

/* A valid file in memory, from the writer. */
static char *sample_bytes(size_t *n)
{
    char dir[64], path[128], *text;
    err e;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    write_sample(path, 1, false);
    ck_assert(file_read(&text, n, path, 1 << 20, &e) == OK);
    tempdir_drop(dir);
    return text;
}

START_TEST(st_every_truncation)
{
    size_t n;
    char *text = sample_bytes(&n);
    err e;
    for (size_t cut = 0; cut <= n; cut++) {
        st_file *f;
        char *copy = malloc(cut ? cut : 1); /* exact, so that a sanitizer sees a read beyond */
        memcpy(copy, text, cut);
        const err_code rc = st_open_memory(&f, copy, cut, "m", &e);
        ck_assert_msg((rc == OK) == (cut == n), "cut at %zu", cut);
        if (rc != OK) ck_assert_int_eq(rc, E_INPUT);
        st_close(&f);
        free(copy);
    }
    char *more = malloc(n + 1);
    st_file *f;
    memcpy(more, text, n);
    more[n] = 0;
    ck_assert_int_eq(st_open_memory(&f, more, n + 1, "m", &e), E_INPUT);
    free(more);
    mem_free(text);
}
END_TEST

/* Any byte of the header turned into any of a few others: refused or still a consistent file. */
START_TEST(st_every_changed_byte)
{
    static const char other[] = "\0\"{}[],:0919\\a \x80\xff";
    size_t n, head;
    char *text = sample_bytes(&n);
    st_file *f;
    err e;
    ck_assert(st_open_memory(&f, text, n, "m", &e) == OK);
    (void)st_head(f, &head);
    st_close(&f);
    for (size_t at = 0; at < head; at++) {
        const char was = text[at];
        for (size_t k = 0; k < sizeof other - 1; k++) {
            text[at] = other[k];
            if (st_open_memory(&f, text, n, "m", &e) == OK) {
                size_t sum = 0;
                for (int64_t i = 0; i < st_count(f); i++) {
                    const st_entry t = st_at(f, i);
                    sum += tensor_bytes(&t.view);
                }
                (void)st_head(f, &head);
                ck_assert_uint_eq(sum, n - head);
            } else {
                check_message(&e, "m: ", "changed byte");
            }
            st_close(&f);
        }
        text[at] = was;
    }
    mem_free(text);
}
END_TEST

START_TEST(st_writer_misuse)
{
    char dir[64], path[128];
    st_writer *w;
    err e;
    const int64_t shape[] = {2, 3}, other[] = {3, 2};
    float data[6] = {0};
    tensor v = tensor_of(data, DT_F32, 2, other);
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    ck_assert(st_writer_open(&w, path, meta, false, &e) == OK);
    ck_assert_int_eq(st_writer_add(w, "__metadata__", DT_F32, 2, shape, &e), E_CHECK);
    ck_assert_int_eq(st_writer_add(w, "a", DT_F32, 9, shape, &e), E_CHECK);
    ck_assert_int_eq(st_writer_add(w, "\xff", DT_F32, 2, shape, &e), E_INPUT);
    ck_assert_int_eq(st_writer_add(w, "a", DT_F32, 1, (const int64_t[]){-1}, &e), E_INPUT);
    ck_assert(st_writer_add(w, "a", DT_F32, 2, shape, &e) == OK);
    ck_assert_int_eq(st_writer_data(w, "b", &v, &e), E_CHECK);
    ck_assert_int_eq(st_writer_add(w, "b", DT_F32, 2, shape, &e), E_CHECK); /* too late */
    ck_assert_int_eq(st_writer_data(w, "a", &v, &e), E_CHECK);              /* another shape */
    ck_assert_int_eq(st_writer_part(w, "a", 4, data, 3, &e), E_CHECK);
    ck_assert_int_eq(st_writer_part(w, "a", -1, data, 1, &e), E_CHECK);
    ck_assert(st_writer_part(w, "a", 1, data, 3, &e) == OK);
    ck_assert_int_eq(st_writer_part(w, "a", 3, data, 2, &e), E_CHECK);
    ck_assert_int_eq(st_writer_part(w, "a", 0, data, 2, &e), E_CHECK);
    ck_assert_int_eq(st_writer_part(w, "a", 0, data, 6, &e), E_CHECK);
    ck_assert_int_eq(st_writer_meta(w, "digest", "short", &e), E_CHECK);
    ck_assert_int_eq(st_writer_meta(w, "none", "short", &e), E_CHECK);
    ck_assert_int_eq(st_writer_commit(&w, &e), E_CHECK);
    ck_assert_msg(strstr(e.msg, "tensor 'a' was not written whole"), "%s", e.msg);
    ck_assert_ptr_null(w);
    ck_assert(!file_exists(path));
    ck_assert(st_writer_open(&w, path, NULL, false, &e) == OK);
    ck_assert(st_writer_add(w, "a", DT_F32, 2, shape, &e) == OK);
    ck_assert(st_writer_add(w, "a", DT_U8, 2, shape, &e) == OK);
    ck_assert_int_eq(st_writer_commit(&w, &e), E_CHECK);
    ck_assert_msg(strstr(e.msg, "declared twice"), "%s", e.msg);
    ck_assert_int_eq(
        st_writer_open(&w, path, (const char *const[]){"k", "v", "k", "w", NULL}, false, &e),
        E_CHECK);
    ck_assert(!file_exists(path));
    tempdir_drop(dir);
}
END_TEST

START_TEST(st_writer_atomic)
{
    char dir[64], path[128];
    st_writer *w;
    dir_list l;
    err e;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    ck_assert(st_writer_open(&w, path, NULL, false, &e) == OK);
    ck_assert(st_writer_add(w, "a", DT_U8, 1, (const int64_t[]){1}, &e) == OK);
    ck_assert(st_writer_part(w, "a", 0, "x", 1, &e) == OK);
    ck_assert(!file_exists(path));
    st_writer_abort(&w);
    ck_assert_ptr_null(w);
    st_writer_abort(&w);
    ck_assert(dir_list_open(&l, dir, &e) == OK);
    ck_assert_uint_eq(l.n, 0);
    dir_list_free(&l);
    write_sample(path, 1, false);
    ck_assert_int_eq(st_writer_open(&w, path, NULL, false, &e), E_USAGE);
    ck_assert_int_eq(st_writer_open(&w, "/nonexistent/dir/x", NULL, false, &e), E_IO);
    tempdir_drop(dir);
}
END_TEST

/* As a full disk: the system refuses to let the file grow. */
START_TEST(st_writer_full)
{
    char dir[64], path[128];
    static const char data[65536];
    st_writer *w;
    err e;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    ck_assert(signal(SIGXFSZ, SIG_IGN) != SIG_ERR);
    const struct rlimit small = {8192, 8192};
    ck_assert(st_writer_open(&w, path, NULL, false, &e) == OK);
    ck_assert(st_writer_add(w, "a", DT_U8, 1, (const int64_t[]){sizeof data}, &e) == OK);
    ck_assert_int_eq(setrlimit(RLIMIT_FSIZE, &small), 0);
    ck_assert_int_eq(st_writer_part(w, "a", 0, data, sizeof data, &e), E_IO);
    ck_assert_msg(strstr(e.msg, path), "%s", e.msg);
    st_writer_abort(&w);
    ck_assert(!file_exists(path));
    tempdir_drop(dir);
}
END_TEST

START_TEST(st_no_tensors)
{
    char dir[64], path[128];
    st_writer *w;
    st_file *f;
    err e;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    ck_assert(st_writer_open(&w, path, meta, false, &e) == OK);
    ck_assert(st_writer_commit(&w, &e) == OK);
    ck_assert(st_open(&f, path, &e) == OK);
    ck_assert_int_eq(st_count(f), 0);
    ck_assert_str_eq(st_meta(f, "format"), "pt");
    st_close(&f);
    tempdir_drop(dir);
}
END_TEST

START_TEST(st_out_of_memory)
{
    char dir[64], path[128];
    err e;
    long k = 0;
    tempdir_make(dir, sizeof dir);
    (void)snprintf(path, sizeof path, "%s/x", dir);
    write_sample(path, 1, false);
    for (bool again = true; again; k++) {
        st_file *f;
        alloc_fail_at(k + 1);
        const err_code rc = st_open(&f, path, &e);
        again = alloc_failed();
        ck_assert_int_eq(rc, again ? E_NOMEM : OK);
        st_close(&f);
    }
    ck_assert_int_gt(k, 5);
    for (bool again = true; again;) {
        st_writer *w = NULL;
        const int64_t shape[] = {3};
        alloc_fail_at(k++ - 5);
        err_code rc = st_writer_open(&w, path, meta, true, &e);
        if (rc == OK) rc = st_writer_add(w, "a", DT_U8, 1, shape, &e);
        if (rc == OK) rc = st_writer_part(w, "a", 2, "x", 1, &e);
        if (rc == OK) rc = st_writer_part(w, "a", 0, "xx", 2, &e);
        if (rc == OK) rc = st_writer_commit(&w, &e);
        again = alloc_failed();
        ck_assert_int_eq(rc, again ? E_NOMEM : OK);
        st_writer_abort(&w);
    }
    alloc_fail_at(0);
    tempdir_drop(dir);
}
END_TEST

int main(void)
{
    if (access("/dev/shm", W_OK) == 0)
        (void)setenv("TMPDIR", "/dev/shm", 0); /* syncs cost nothing there */
    Suite *s = suite_create("safetensors");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, st_collection);
    tcase_add_test(t, st_collection_content);
    tcase_add_test(t, st_rules);
    tcase_add_test(t, st_names_in_messages);
    tcase_add_test(t, st_many_tensors);
    tcase_add_test(t, st_unaligned);
    tcase_add_test(t, st_round_trip);
    tcase_add_test(t, st_same_calls_same_bytes);
    tcase_add_test(t, st_every_truncation);
    tcase_add_test(t, st_every_changed_byte);
    tcase_add_test(t, st_writer_misuse);
    tcase_add_test(t, st_writer_atomic);
    tcase_add_test(t, st_writer_full);
    tcase_add_test(t, st_no_tensors);
    tcase_add_test(t, st_out_of_memory);
    suite_add_tcase(s, t);
    return suite_run(s);
}
