/* base/json: the public parsing vectors, our stricter limits, getters, memory failures. */
#include "base/json.h"

#include <check.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json_scan.h"
#include "base/mem.h"
#include "support/suite.h"

#define VECTORS TMF_SHARED_DIR "/data/malformed/json"

/* Valid JSON that we refuse on purpose (base/json_scan.h), each with the reason it must give. */
static const struct {
    const char *name, *reason;
} stricter[] = {
    {"y_object_duplicated_key.json", "duplicate key"},
    {"y_object_duplicated_key_and_value.json", "duplicate key"},
    {"y_object_escaped_null_in_key.json", "U+0000"},
    {"y_string_null_escape.json", "U+0000"},
    {"y_number_double_close_to_zero.json", "more than 63 characters"},
};

static const char *stricter_reason(const char *name)
{
    for (size_t i = 0; i < sizeof stricter / sizeof *stricter; i++)
        if (strcmp(stricter[i].name, name) == 0) return stricter[i].reason;
    return NULL;
}

static void check_vector(const char *name, const char *text, size_t n, int *count)
{
    err e = {OK, ""};
    cJSON *o;
    const err_code rc = json_parse(&o, text, n, name, &e);
    const char *reason = stricter_reason(name);
    if (name[0] == 'y' && !reason) {
        ck_assert_msg(rc == OK, "%s", e.msg);
    } else if (name[0] == 'y' || name[0] == 'n') {
        ck_assert_msg(rc == E_INPUT, "%s: got %s", name, err_name(rc));
        ck_assert_msg(strncmp(e.msg, name, strlen(name)) == 0, "%s", e.msg);
        if (reason) ck_assert_msg(strstr(e.msg, reason) != NULL, "%s", e.msg);
    }
    count[name[0] == 'y' ? 0 : name[0] == 'n' ? 1 : 2]++;
    cJSON_Delete(o);
}

START_TEST(json_vectors)
{
    err e;
    dir_list l;
    char path[4096];
    int count[3] = {0};
    if (!file_is_dir(VECTORS)) {
        puts("SKIP json_vectors: no " VECTORS);
        return;
    }
    ck_assert_int_eq(dir_list_open(&l, VECTORS, &e), OK);
    for (size_t i = 0; i < l.n; i++) {
        char *text;
        size_t n;
        ck_assert_int_eq(path_join(path, sizeof path, VECTORS, l.names[i], &e), OK);
        ck_assert_int_eq(file_read(&text, &n, path, 1 << 24, &e), OK);
        check_vector(l.names[i], text, n, count);
        mem_free(text);
    }
    dir_list_free(&l);
    printf("json vectors: %d y_, %d n_, %d others\n", count[0], count[1], count[2]);
    ck_assert_int_ge(count[0], 95);
    ck_assert_int_ge(count[1], 88);
}
END_TEST

static err_code parse(const char *text, err *e)
{
    cJSON *o;
    const err_code rc = json_parse(&o, text, strlen(text), "text", e);
    cJSON_Delete(o);
    return rc;
}

START_TEST(json_refusals)
{
    static const char *const bad[][2] = {
        {"{\"a\":1,\"b\":{\"a\":2},\"a\":3}", "byte 19, line 1: duplicate key 'a'"},
        {"{\"a\":1,\"\\u0061\":3}", "duplicate key 'a'"},
        {"[\"\\u0000\"]", "U+0000"},
        {"[\"\\ud800\"]", "lone surrogate"},
        {"[\"\\udc00\\ud800\"]", "lone surrogate"},
        {"[\"\\ud800\\u0041\"]", "lone surrogate"},
        {"[\"\xc0\x80\"]", "UTF-8"},
        {"[\"\xed\xa0\x80\"]", "UTF-8"},
        {"[\"\xf4\x90\x80\x80\"]", "UTF-8"},
        {"[\"\xe2\x82\"]", "UTF-8"},
        {"[1e999]", "beyond the range"},
        {"[-1e999]", "beyond the range"},
        {"\xef\xbb\xbf{}", "expected a value"},
        {"{}\n{}", "byte 3, line 2: more text"},
        {"[1,]", "expected a value"},
        {"{\"a\" 1}", "expected ':'"},
        {"", "the text ends"},
        {"[\"a", "ends inside a string"},
        {"[\"a\\", "ends inside a string"},
        {"[01]", "bad number"},
        {"[nulL]", "expected a value"},
        {"[0000000000000000000000000000000000000000000000000000000000000000000]", "bad number"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        err e;
        ck_assert_msg(parse(bad[i][0], &e) == E_INPUT, "accepted: %s", bad[i][0]);
        ck_assert_msg(strstr(e.msg, bad[i][1]) != NULL, "%s: %s", bad[i][0], e.msg);
    }
}
END_TEST

START_TEST(json_depth)
{
    char text[256];
    err e;
    memset(text, '[', 64);
    memset(text + 64, ']', 64);
    text[128] = '\0';
    ck_assert_int_eq(parse(text, &e), OK);
    memset(text, '[', 65);
    memset(text + 65, ']', 65);
    text[130] = '\0';
    ck_assert_int_eq(parse(text, &e), E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "nested deeper than 64"));
    /* Each sibling starts from its parent's depth again. */
    ck_assert_int_eq(parse("[[[]],[[]],{\"a\":[{}]},[]]", &e), OK);
}
END_TEST

START_TEST(json_every_prefix)
{
    static const char text[] =
        "{\"a\":[1,-2.5e3,true,null,\"x\\u00e9\\ud83d\\ude00\\n\"],\"b\":{\"c\":\"\xc3\xa9\"}}";
    for (size_t n = 0; n < sizeof text - 1; n++) {
        err e;
        cJSON *o;
        char *copy = malloc(n ? n : 1); /* exact size: the sanitizer sees one byte too many */
        memcpy(copy, text, n);
        ck_assert_int_eq(json_parse(&o, copy, n, "cut", &e), E_INPUT);
        ck_assert_ptr_null(o);
        free(copy);
    }
    err e;
    ck_assert_int_eq(parse(text, &e), OK);
}
END_TEST

/* A million keys: a quadratic check would take hours. */
START_TEST(json_many_keys)
{
    enum { N = 1000000 };
    err e;
    char *text = malloc((size_t)N * 16 + 16);
    size_t at = 0;
    text[at++] = '{';
    for (int i = 0; i < N; i++) at += (size_t)sprintf(text + at, "\"k%d\":0,", i);
    at += (size_t)sprintf(text + at, "\"last\":1}");
    ck_assert_int_eq(json_scan(text, at, "keys", &e), OK);
    memcpy(text + at - 8, "k77\":1 }", 8);
    text[at - 9] = '"';
    ck_assert_int_eq(json_scan(text, at, "keys", &e), E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "duplicate key 'k77'"));
    free(text);
}
END_TEST

static cJSON *object(const char *text)
{
    err e;
    cJSON *o;
    ck_assert_msg(json_parse(&o, text, strlen(text), "object", &e) == OK, "%s", e.msg);
    return o;
}

START_TEST(json_getters)
{
    err e = {OK, "untouched"};
    int64_t i;
    int32_t k;
    double d;
    bool b;
    const char *s;
    cJSON *o = object("{\"i\":-3,\"big\":9007199254740993,\"most\":9007199254740991,\"half\":0.5,"
                      "\"s\":\"x\",\"t\":true,\"n\":null,\"rope\":{\"factor\":\"8\"},\"e\":1e2}");
    ck_assert_int_eq(json_get_i64(o, "i", -5, 5, &i, &e), OK);
    ck_assert_int_eq(i, -3);
    ck_assert_int_eq(json_get_i32(o, "e", 0, 1000, &k, &e), OK);
    ck_assert_int_eq(k, 100);
    ck_assert_int_eq(json_get_i64(o, "most", 0, INT64_MAX, &i, &e), OK);
    ck_assert(i == 9007199254740991);
    ck_assert_int_eq(json_opt_i64(o, "n", 0, 9, 7, &i, &e), OK);
    ck_assert_int_eq(i, 7);
    ck_assert_int_eq(json_opt_bool(o, "t", false, &b, &e), OK);
    ck_assert(b);
    ck_assert_int_eq(json_opt_str(o, "none", "def", &s, &e), OK);
    ck_assert_str_eq(s, "def");
    ck_assert_int_eq(json_get_f64(o, "half", &d, &e), OK);
    ck_assert_double_eq(d, 0.5);
    ck_assert_str_eq(e.msg, "untouched");

    ck_assert_int_eq(json_get_i64(o, "i", 0, 5, &i, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "key 'i': expected an integer in [0,5], got -3");
    ck_assert_int_eq(json_get_i64(o, "big", 0, INT64_MAX, &i, &e), E_INPUT); /* a double lost it */
    ck_assert_int_eq(json_get_i64(o, "half", 0, 5, &i, &e), E_INPUT);
    ck_assert_int_eq(json_get_i64(o, "n", 0, 5, &i, &e), E_INPUT);
    ck_assert_int_eq(json_get_i64(o, "gone", 0, 5, &i, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "key 'gone' is missing");
    const cJSON *rope = cJSON_GetObjectItemCaseSensitive(o, "rope");
    ck_assert_int_eq(json_opt_f64(rope, "factor", 1, &d, &e), E_INPUT);
    ck_assert_str_eq(e.msg, "key 'rope.factor': expected a number, got a string");
    ck_assert_int_eq(json_get_str(o, "rope", &s, &e), E_INPUT);
    ck_assert_int_eq(json_opt_bool(o, "i", false, &b, &e), E_INPUT);
    ck_assert_int_eq(json_get_str(NULL, "x", &s, &e), E_INPUT);
    cJSON_Delete(o);
}
END_TEST

START_TEST(json_text)
{
    err e;
    char *text;
    cJSON *o = cJSON_CreateObject();
    cJSON_AddNumberToObject(o, "z", NAN);
    cJSON_AddNumberToObject(o, "a", 0.1);
    cJSON_AddNumberToObject(o, "big", 9007199254740991.0);
    cJSON_AddNumberToObject(o, "third", 1.0 / 3);
    cJSON_AddNumberToObject(o, "tiny", -5e-324);
    cJSON_AddStringToObject(o, "s", "\xc3\xa9\n\"");
    ck_assert_int_eq(json_print(&text, o, false, &e), OK);
    ck_assert_str_eq(text,
                     "{\"z\":null,\"a\":0.1,\"big\":9007199254740991,\"third\":0.3333333333333333,"
                     "\"tiny\":-4.94065645841247e-324,\"s\":\"\xc3\xa9\\n\\\"\"}");
    ck_assert_int_eq(parse(text, &e), OK);
    mem_free(text);
    cJSON_Delete(o);
    ck_assert(json_utf8_valid("a\xf0\x9f\x98\x80", 5) && !json_utf8_valid("a\xf0\x9f\x98\x80", 4));
}
END_TEST

static int until_failure; /* mallocs of cJSON that still work; negative: all */

static void *failing_malloc(size_t n)
{
    if (until_failure == 0) return NULL;
    until_failure--;
    return malloc(n);
}

/* Any memory failure inside cJSON is E_NOMEM, and nothing leaks (the sanitizer build looks). */
START_TEST(json_out_of_memory)
{
    cJSON_Hooks hooks = {failing_malloc, free};
    static const char text[] = "{\"a\":[1,\"two\",{\"b\":null}],\"c\":3.5}";
    cJSON_InitHooks(&hooks);
    err_code rc = E_NOMEM;
    int k = 0;
    for (; rc != OK; k++) {
        err e;
        until_failure = k;
        rc = parse(text, &e);
        ck_assert_int_lt(k, 100);
        if (rc != OK) ck_assert_int_eq(rc, E_NOMEM);
    }
    ck_assert_int_gt(k, 8);
    cJSON_InitHooks(NULL);
    cJSON *o = object(text);
    cJSON_InitHooks(&hooks);
    rc = E_NOMEM;
    for (k = 0; rc != OK; k++) {
        err e;
        char *out;
        until_failure = k;
        rc = json_print(&out, o, false, &e);
        ck_assert_int_lt(k, 100);
        mem_free(out);
    }
    cJSON_InitHooks(NULL);
    cJSON_Delete(o);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base json");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, json_vectors);
    tcase_add_test(t, json_refusals);
    tcase_add_test(t, json_depth);
    tcase_add_test(t, json_every_prefix);
    tcase_add_test(t, json_many_keys);
    tcase_add_test(t, json_getters);
    tcase_add_test(t, json_text);
    tcase_add_test(t, json_out_of_memory);
    suite_add_tcase(s, t);
    return suite_run(s);
}
