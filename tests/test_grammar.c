/* runtime/serve: grammars. What regular expressions and schemas take and refuse, byte by byte;
 * random answers that must validate; masks against stepping; limits; tool calls. */
#include "runtime/serve/grammar.h"

#include <check.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "support/alloc_fail.h"
#include "support/byte_tokenizer.h"
#include "support/grammar_walk.h"
#include "support/json_validate.h"
#include "support/schema_maker.h"
#include "support/suite.h"

static const tokenizer *bytes;
static grammar_set *set;

static void setup(void)
{
    err e;
    bytes = byte_tokenizer();
    ck_assert(grammar_set_open(&set, bytes, &e) == OK);
}

static void teardown(void)
{
    tokenizer *t = (tokenizer *)(uintptr_t)bytes;
    grammar_set_close(&set);
    tokenizer_close(&t);
}

/* Whether text is a whole answer, a byte a token. */
static bool takes(grammar *g, const char *text)
{
    constraint *c;
    err e;
    ck_assert(constraint_open(&c, g, &e) == OK);
    bool ok = true;
    for (const char *p = text; *p && ok; p++) ok = constraint_accept(c, (uint8_t)*p);
    ok = ok && constraint_may_end(c);
    constraint_close(&c);
    return ok;
}

static grammar *schema(const char *text)
{
    grammar *g;
    err e;
    ck_assert_msg(grammar_set_json_schema(set, &g, text, strlen(text), &e) == OK, "%s: %s", text,
                  e.msg);
    return g;
}

/* ---- regular expressions ---- */

static const struct {
    const char *pattern, *yes[6], *no[6];
} regexes[] = {
    {"abc", {"abc"}, {"", "ab", "abcd", "abd"}},
    {"", {""}, {"a"}},
    {"a|bc|", {"a", "bc", ""}, {"b", "abc"}},
    {"(ab)*c+d?", {"c", "ababccd"}, {"abab", "abad", "d"}},
    {"a{2,3}", {"aa", "aaa"}, {"a", "aaaa"}},
    {"a{2}b{0}", {"aa"}, {"aab", "aaa"}},
    {"a{1,}", {"a", "aaaaa"}, {""}},
    {"x{,2}", {"x{,2}"}, {"xx"}},
    {"(?:a|b){2}(?<n>c)(?P<m>d)", {"abcd", "bbcd"}, {"acd"}},
    {"[a-c][^a-c]", {"ad", "c\xc3\xa9", "b-"}, {"ab", "d", "a\xc3"}},
    {"[]-]", {NULL}, {NULL}},
    {"[\\]\\-x]+", {"]-x"}, {"a"}},
    {"[-a]", {"-", "a"}, {"b"}},
    {"\\d+\\.\\w\\s", {"12.a ", "0._\t"}, {"1.- ", "x"}},
    {"\\x41\\u00e9\\n", {"A\xc3\xa9\n"}, {"A\xc3\n"}},
    {".", {"a", "\xc3\xa9", "\xf0\x9f\x98\x80"}, {"\n", "", "ab", "\xc3", "\xed\xa0\x80"}},
    {"[^\"]*",
     {"", "\xe4\xb8\xad\xe6\x96\x87"},
     {"\"", "\xe4\xb8", "\xc0\x80", "\xf4\x90\x80\x80"}},
    {"^a$|^b", {"a", "b"}, {"ab"}},
    {"a*?b+?", {"b", "aab"}, {"a"}},
    {"(a*)*b", {"b", "aaab"}, {"a"}},
    {"\\S\\D\\W", {"aa-"}, {" a-", "a1-", "aaa"}},
};

START_TEST(regex_takes)
{
    grammar *g;
    err e;
    const err_code rc = grammar_set_regex(set, &g, regexes[_i].pattern, &e);
    if (!regexes[_i].yes[0]) {
        ck_assert(rc == E_INPUT && g == NULL);
        return;
    }
    ck_assert_msg(rc == OK, "%s: %s", regexes[_i].pattern, e.msg);
    for (int k = 0; k < 6 && regexes[_i].yes[k]; k++)
        ck_assert_msg(takes(g, regexes[_i].yes[k]), "/%s/ takes '%s'", regexes[_i].pattern,
                      regexes[_i].yes[k]);
    for (int k = 0; k < 6 && regexes[_i].no[k]; k++)
        ck_assert_msg(!takes(g, regexes[_i].no[k]), "/%s/ refuses '%s'", regexes[_i].pattern,
                      regexes[_i].no[k]);
    grammar_close(&g);
}
END_TEST

START_TEST(regex_refuses)
{
    static const char *const bad[] = {
        "(",    ")",     "a)",     "[a",      "*a",  "a**",   "\\",      "(?=a)",   "\\1", "(?i)a",
        "\\bx", "[b-a]", "a{3,2}", "a\\p{L}", "a++", "\\u12", "\\ud800", "x^y|a$b", "[]",  "^*"};
    char deep[1024];
    grammar *g;
    err e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        const err_code rc = grammar_set_regex(set, &g, bad[i], &e);
        ck_assert_msg(rc == E_INPUT && !g && !strncmp(e.msg, "pattern: ", 9), "'%s': %s", bad[i],
                      err_name(rc));
    }
    memset(deep, '(', 500);
    deep[500] = '\0';
    ck_assert(grammar_set_regex(set, &g, deep, &e) == E_INPUT);
    ck_assert(grammar_set_regex(set, &g, "(a{1000}){1000}", &e) == E_LIMIT);
    ck_assert(grammar_set_regex(set, &g, "a{200000}", &e) == E_INPUT);
    ck_assert(grammar_set_regex(set, &g, "[^\\s\\S]", &e) == E_INPUT);
}
END_TEST

/* Patterns that are many states at once stay within their bounds. */
START_TEST(regex_hard)
{
    static const char *const hard[] = {"(a|a|aa)*(a|b){40}c", "(.*a){30}", "(x?){500}x{500}",
                                       "((a*)*)*b", "(.{0,200}y){20}"};
    uint32_t mask[(BYTE_VOCAB + 31) / 32];
    constraint *c;
    grammar *g;
    err e;
    for (size_t i = 0; i < sizeof hard / sizeof *hard; i++) {
        const err_code rc = grammar_set_regex(set, &g, hard[i], &e);
        ck_assert_msg(rc == OK || rc == E_LIMIT, "%s: %s", hard[i], e.msg);
        if (rc != OK) continue;
        ck_assert(constraint_open(&c, g, &e) == OK);
        for (int k = 0; k < 200; k++) {
            (void)constraint_mask(c, mask);
            if (!constraint_accept(c, k % 3 ? 'a' : 'x') && !constraint_accept(c, 'a')) break;
        }
        constraint_close(&c);
        grammar_close(&g);
    }
}
END_TEST

/* ---- JSON schema ---- */

#define O    "{\"type\":\"object\","
#define I    "{\"type\":\"integer\"}"
#define S    "{\"type\":\"string\"}"
#define Q(s) "\"" s "\""

static const struct {
    const char *schema, *yes[8], *no[8];
} schemas[] = {
    {"{}",
     {"1", "-2.5e3", "\"a\"", "null", "[1, {\"a\": []}]", "{}", "[\n  1,\n  2\n]"},
     {"", "01", "+1", "[1,]", "{\"a\"}", "'a'", "[1  ,2]", "\"\n\""}},
    {"true", {"false"}, {"x"}},
    {I, {"0", "-1", "123456789012345"}, {"1.0", "1e3", "00", "-0", "--1", "-"}},
    {"{\"type\":\"integer\",\"minimum\":-3,\"maximum\":12}",
     {"-3", "-1", "0", "9", "10", "12"},
     {"-4", "13", "99", "012", "-0"}},
    {"{\"type\":\"integer\",\"minimum\":95,\"exclusiveMaximum\":1103}",
     {"95", "99", "100", "999", "1000", "1102"},
     {"94", "1103", "9", "1110", "2000"}},
    {"{\"type\":\"integer\",\"maximum\":-7}", {"-7", "-70", "-123"}, {"-6", "7", "0"}},
    {"{\"type\":\"number\",\"minimum\":0,\"maximum\":1}",
     {"0", "0.5", "1", "0.0"},
     {"1.5", "-1", "1e0", "2"}},
    {"{\"type\":\"number\",\"exclusiveMinimum\":0}", {"0.1", "1", "5.25"}, {"0", "0.0", "-1"}},
    {"{\"type\":\"number\",\"exclusiveMaximum\":-2}", {"-2.5", "-3"}, {"-2", "-1", "-2.0", "3"}},
    {"{\"type\":\"boolean\"}", {"true", "false"}, {"True", "null", "tru"}},
    {"{\"type\":[\"null\",\"boolean\"]}", {"null", "true"}, {"1"}},
    {"{\"type\":\"boolean\",\"nullable\":true}", {"null", "true"}, {"1"}},
    {S,
     {Q(""), Q("\\n\\u00e9\\ud83d\\ude00\xc3\xa9"), Q("\\u0fff\\u0100\\u0010\\u0001")},
     {Q("\\x"), "\"", Q("\\ud83d"), Q("\t"), Q("\\u0000"), Q("\xc3"), Q("\\udc00"), Q("\"")}},
    {"{\"type\":\"string\",\"minLength\":2,\"maxLength\":3}",
     {Q("ab"), Q("\\n\xc3\xa9"), Q("\\ud83d\\ude00xy")},
     {Q(""), Q("a"), Q("abcd")}},
    {"{\"type\":\"string\",\"maxLength\":0}", {Q("")}, {Q("a")}},
    {"{\"type\":\"string\",\"pattern\":\"^a[\\\"\\\\\\\\]b$\"}",
     {Q("a\\\"b"), Q("a\\\\b")},
     {Q("ab"), Q("a\"b")}},
    {"{\"type\":\"string\",\"pattern\":\"x\"}", {Q("x"), Q("axb"), Q("\\nx")}, {Q(""), Q("a")}},
    {"{\"type\":\"string\",\"pattern\":\"^a|b$\"}", {Q("ax"), Q("xb")}, {Q("xax"), Q("bx")}},
    {"{\"type\":\"string\",\"format\":\"date\"}",
     {Q("2024-02-28"), Q("1999-12-31")},
     {Q("2024-02-30"), Q("2024-13-01"), Q("2024-04-31"), Q("24-01-01")}},
    {"{\"type\":\"string\",\"format\":\"time\"}",
     {Q("23:59:59Z"), Q("00:00:00.5+01:00")},
     {Q("24:00:00Z"), Q("1:00:00Z"), Q("00:00:00")}},
    {"{\"type\":\"string\",\"format\":\"date-time\"}",
     {Q("2024-02-28T00:00:00Z")},
     {Q("2024-02-28"), Q("2024-02-28 00:00:00Z")}},
    {"{\"type\":\"string\",\"format\":\"uuid\"}",
     {Q("01234567-89ab-cdef-0123-456789abcdef")},
     {Q("01234567")}},
    {"{\"type\":\"string\",\"format\":\"ipv4\"}",
     {Q("255.0.10.249")},
     {Q("256.0.0.1"), Q("1.2.3")}},
    {"{\"enum\":[1,\"a\",null,{\"k\":[true]}]}",
     {"1", Q("a"), "null", "{\"k\":[true]}"},
     {"2", "a", "{\"k\": [true]}"}},
    {"{\"type\":\"string\",\"enum\":[1,\"a\"]}", {Q("a")}, {"1"}},
    {"{\"const\":\"x\\n\"}", {Q("x\\n")}, {Q("x")}},
    {O "\"properties\":{\"a\":" I ",\"b\":" S "},\"required\":[\"a\"]}",
     {"{\"a\":1}", "{\"a\": 1, \"b\": \"\"}", "{\n  \"a\": 1\n}"},
     {"{}", "{\"b\":\"\"}", "{\"b\":\"\",\"a\":1}", "{\"a\":1,}", "{\"a\":1,\"c\":1}",
      "{,\"a\":1}"}},
    {O "\"properties\":{\"a\":" I ",\"b\":" I ",\"c\":" I "}}",
     {"{}", "{\"a\":1}", "{\"b\":1}", "{\"a\":1,\"c\":2}", "{\"b\":1,\"c\":2}"},
     {"{\"b\":1,\"a\":2}", "{\"a\":1\"b\":2}", "{\"a\":1,\"a\":2}"}},
    {O "\"properties\":{\"ab\":" I "},\"additionalProperties\":" S "}",
     {"{}", "{\"ab\":1}", "{\"a\":\"\"}", "{\"ab\":1,\"abc\":\"\",\"\":\"x\"}", "{\"b\":\"\"}"},
     {"{\"ab\":\"\"}", "{\"a\":1}", "{\"x\":\"\",\"ab\":1}", "{\"\\u0061b\":\"\"}"}},
    {O "\"properties\":{}}", {"{}"}, {"{\"a\":1}"}},
    {"{\"type\":\"object\"}", {"{}", "{\"a\": {\"b\": [1]}}"}, {"[]", "{a:1}"}},
    {O "\"required\":[\"x\"]}", {"{\"x\":1}", "{\"x\":[],\"y\":2}"}, {"{}", "{\"y\":2}"}},
    {O "\"properties\":{\"q\\\"\xc3\xa9\":" I "},\"required\":[\"q\\\"\xc3\xa9\"]}",
     {"{\"q\\\"\xc3\xa9\":7}"},
     {"{\"q\":7}"}},
    {"{\"type\":\"array\",\"items\":" I ",\"minItems\":1,\"maxItems\":2}",
     {"[1]", "[1, 2]"},
     {"[]", "[1,2,3]", "[\"\"]", "[1,]"}},
    {"{\"type\":\"array\",\"maxItems\":0}", {"[]"}, {"[1]"}},
    {"{\"type\":\"array\",\"prefixItems\":[" I "," S "],\"items\":false}",
     {"[]", "[1]", "[1,\"\"]"},
     {"[\"\"]", "[1,\"\",1]"}},
    {"{\"type\":\"array\",\"prefixItems\":[" I "],\"items\":" S ",\"minItems\":2}",
     {"[1,\"\"]", "[1,\"\",\"\"]"},
     {"[1]", "[1,1]"}},
    {"{\"anyOf\":[" I "," S "]}", {"1", Q("")}, {"null"}},
    {"{\"oneOf\":[" I "," S "]}", {"1", Q("")}, {"null"}},
    {"{\"oneOf\":[" O "\"properties\":{\"k\":{\"const\":\"a\"},\"v\":" I
     "},\"required\":[\"k\",\"v\"]}," O
     "\"properties\":{\"k\":{\"const\":\"b\"}},\"required\":[\"k\"]}]}",
     {"{\"k\":\"a\",\"v\":1}", "{\"k\":\"b\"}"},
     {"{\"k\":\"a\"}", "{\"k\":\"b\",\"v\":1}"}},
    {"{\"allOf\":[" O "\"properties\":{\"a\":" I "},\"required\":[\"a\"]},{\"properties\":{\"b\":" I
     "},\"required\":[\"b\"]}]}",
     {"{\"a\":1,\"b\":2}"},
     {"{\"a\":1}", "{\"b\":2}"}},
    {"{\"allOf\":[{\"type\":[\"integer\",\"string\"]},{\"type\":\"number\",\"minimum\":3},"
     "{\"minimum\":5}]}",
     {"5", "17"},
     {"4", "5.5", Q("")}},
    {"{\"type\":\"object\",\"anyOf\":[{\"properties\":{\"a\":" I "},\"required\":[\"a\"]},"
     "{\"properties\":{\"b\":" I "},\"required\":[\"b\"]}]}",
     {"{\"a\":1}", "{\"b\":1}"},
     {"{}"}},
    {"{\"$ref\":\"#/$defs/n\",\"$defs\":{\"n\":" O "\"properties\":{\"v\":" I
     ",\"next\":{\"anyOf\":[{\"type\":\"null\"},{\"$ref\":\"#/$defs/"
     "n\"}]}},\"required\":[\"v\",\"next\"]}}}",
     {"{\"v\":1,\"next\":null}", "{\"v\":1,\"next\":{\"v\":2,\"next\":null}}"},
     {"{\"v\":1}", "{\"v\":1,\"next\":1}"}},
    {"{\"type\":\"array\",\"items\":{\"$ref\":\"#\"}}", {"[]", "[[],[[]]]"}, {"[1]", "[[]"}},
    {"{\"title\":\"t\",\"description\":\"d\",\"default\":1,\"examples\":[1],\"type\":\"null\"}",
     {"null"},
     {"1"}},
    {"{\"minimum\":3,\"description\":\"\"}", {"3", "4.5"}, {"2", Q("")}},
};

START_TEST(schema_takes)
{
    grammar *g = schema(schemas[_i].schema);
    for (int k = 0; k < 8 && schemas[_i].yes[k]; k++)
        ck_assert_msg(takes(g, schemas[_i].yes[k]), "%s takes '%s'", schemas[_i].schema,
                      schemas[_i].yes[k]);
    for (int k = 0; k < 8 && schemas[_i].no[k]; k++)
        ck_assert_msg(!takes(g, schemas[_i].no[k]), "%s refuses '%s'", schemas[_i].schema,
                      schemas[_i].no[k]);
    grammar_close(&g);
}
END_TEST

static const struct {
    const char *schema;
    err_code code;
    const char *word; /* in the message */
} refused[] = {
    {"", E_INPUT, "schema"},
    {"[]", E_INPUT, "object"},
    {"{\"type\":\"int\"}", E_INPUT, "type"},
    {"{\"type\":7}", E_INPUT, "type"},
    {"false", E_INPUT, "match"},
    {"{\"not\":{}}", E_UNSUPPORTED, "'not'"},
    {"{\"type\":\"array\",\"uniqueItems\":true}", E_UNSUPPORTED, "uniqueItems"},
    {"{\"type\":\"object\",\"patternProperties\":{}}", E_UNSUPPORTED, "patternProperties"},
    {"{\"if\":{}}", E_UNSUPPORTED, "'if'"},
    {"{\"type\":\"number\",\"multipleOf\":2}", E_UNSUPPORTED, "multipleOf"},
    {"{\"type\":\"number\",\"minimum\":0.5}", E_UNSUPPORTED, "minimum"},
    {"{\"type\":\"number\",\"minimum\":true}", E_INPUT, "minimum"},
    {"{\"type\":\"string\",\"format\":\"email\"}", E_UNSUPPORTED, "email"},
    {"{\"type\":\"string\",\"pattern\":\"(\"}", E_INPUT, "pattern"},
    {"{\"type\":\"string\",\"pattern\":\"(?=a)\"}", E_INPUT, "pattern"},
    {"{\"type\":\"string\",\"minLength\":-1}", E_INPUT, "minLength"},
    {"{\"type\":\"string\",\"minLength\":3,\"maxLength\":2}", E_INPUT, "maxLength"},
    {"{\"type\":\"string\",\"maxLength\":2147483648}", E_LIMIT, "maxLength"},
    {"{\"type\":\"array\",\"minItems\":2147483648}", E_LIMIT, "minItems"},
    {"{\"type\":\"array\",\"minItems\":90000}", E_LIMIT, "states"},
    {"{\"type\":\"array\",\"items\":[" I "]}", E_UNSUPPORTED, "items"},
    {"{\"oneOf\":[{\"type\":\"number\"}," I "]}", E_UNSUPPORTED, "oneOf"},
    {"{\"anyOf\":[]}", E_INPUT, "anyOf"},
    {"{\"$ref\":\"http://x\"}", E_UNSUPPORTED, "$ref"},
    {"{\"$ref\":\"#/$defs/x\"}", E_INPUT, "$ref"},
    {"{\"$ref\":\"#\"}", E_INPUT, "match"},
    {"{\"enum\":[]}", E_INPUT, "enum"},
    {"{\"enum\":[1],\"minimum\":2}", E_UNSUPPORTED, "minimum"},
    {"{\"type\":\"integer\",\"minimum\":5,\"maximum\":4}", E_INPUT, "match"},
    {"{\"allOf\":[" I "," S "]}", E_INPUT, "type"},
    {"{\"allOf\":[{\"pattern\":\"a\"},{\"pattern\":\"b\"}]}", E_UNSUPPORTED, "pattern"},
    {O "\"required\":[\"a\"],\"additionalProperties\":false}", E_INPUT, "'a'"},
    {O "\"properties\":{\"c\":{\"$ref\":\"#\"}},\"required\":[\"c\"]}", E_INPUT, "match"},
    {"{\"type\":\"string\",\"type\":\"string\"}", E_INPUT, "duplicate"},
};

START_TEST(schema_refuses)
{
    grammar *g;
    err e;
    const err_code rc = grammar_set_json_schema(set, &g, refused[_i].schema,
                                                strlen(refused[_i].schema), &e);
    ck_assert_msg(rc == refused[_i].code, "%s: %s %s", refused[_i].schema, err_name(rc),
                  rc == OK ? "" : e.msg);
    ck_assert_ptr_null(g);
    ck_assert_msg(strstr(e.msg, refused[_i].word) != NULL, "%s: %s", refused[_i].schema, e.msg);
}
END_TEST

START_TEST(object_takes)
{
    grammar *g;
    err e;
    ck_assert(grammar_json_object(&g, bytes, &e) == OK);
    ck_assert(takes(g, "{}") && takes(g, "{\"a\": [1, true], \"b\": {}}"));
    ck_assert(!takes(g, "[]") && !takes(g, "1") && !takes(g, " {}") && !takes(g, "{} "));
    char deep[512] = "", *p = deep; /* as deep as JSON readers here go, and no deeper */
    for (int i = 0; i < 80; i++) p += sprintf(p, "%s", i ? "[" : "{\"a\":");
    constraint *c;
    int n = 0;
    ck_assert(constraint_open(&c, g, &e) == OK);
    while (constraint_accept(c, (uint8_t)deep[n])) n++;
    ck_assert(n > 40 && n < 70);
    constraint_close(&c);
    grammar_close(&g);
}
END_TEST

/* ---- random schemas, random answers ---- */

static tokenizer *open_demo(void)
{
    tokenizer *t;
    err e;
    ck_assert_msg(tokenizer_open(&t, TMF_SOURCE_DIR "/datasets/demo", &e) == OK, "%s", e.msg);
    return t;
}

static void walk_schema(const tokenizer *t, grammar *g, schema_maker *m, const cJSON *s,
                        int *complete)
{
    err e;
    for (int k = 0; k < 4; k++) {
        walk_answer a = walk_random_answer(t, g, 8 << k, &m->seed);
        ck_assert_msg(!a.stuck, "%s: stuck behind '%s'", m->p, a.text);
        if (a.done) {
            cJSON *v = NULL;
            const err_code rc = json_parse(&v, a.text, a.n, "answer", &e);
            /* names may come twice in objects of any names: other readers take the last */
            if (rc != OK && strstr(e.msg, "duplicate")) v = cJSON_Parse(a.text);
            ck_assert_msg(v != NULL, "%s: %s: '%s'", m->p, e.msg, a.text);
            if (rc == OK) ck_assert_msg(json_validates(v, s, s), "%s: '%s'", m->p, a.text);
            cJSON_Delete(v);
            ++*complete;
        }
        free(a.text);
    }
}

START_TEST(schema_walks)
{
    tokenizer *t = open_demo();
    grammar_set *demo;
    schema_maker m = {.seed = 88172645463325252u + (uint64_t)_i};
    int compiled = 0, complete = 0;
    err e;
    ck_assert(grammar_set_open(&demo, t, &e) == OK);
    for (int i = 0; i < 200; i++) {
        grammar *g;
        cJSON *s;
        schema_make(&m);
        const err_code rc = grammar_set_json_schema(demo, &g, m.p, m.n, &e);
        /* some have no value at all, or two ways to say a thing */
        ck_assert_msg(rc == OK || rc == E_INPUT, "%s: %s", m.p, e.msg);
        if (rc != OK) continue;
        ck_assert(json_parse(&s, m.p, m.n, "schema", &e) == OK);
        walk_schema(t, g, &m, s, &complete);
        compiled++;
        cJSON_Delete(s);
        grammar_close(&g);
    }
    ck_assert_int_ge(compiled, 170);
    ck_assert_int_ge(complete, compiled * 3);
    grammar_set_close(&demo);
    tokenizer_close(&t);
}
END_TEST

/* ---- masks ---- */

/* The mask is what can be accepted, for every token of the vocabulary. */
START_TEST(mask_is_accept)
{
    tokenizer *t = open_demo();
    const int32_t vocab = tokenizer_vocab(t);
    uint32_t *mask = calloc(((size_t)vocab + 31) / 32, sizeof *mask);
    static const char text[] = "{\"name\": \"caf\xc3\xa9 \\n\", \"list\": [1.5, -2]}";
    token_list ids = {0};
    grammar *g;
    constraint *c, *probe;
    err e;
    ck_assert(grammar_json_object(&g, t, &e) == OK);
    ck_assert(tokenizer_encode_part(t, text, strlen(text), false, &ids, &e) == OK);
    ck_assert(constraint_open(&c, g, &e) == OK);
    for (int64_t i = 0; i <= ids.n; i++) {
        int32_t n = 0;
        const int32_t count = constraint_mask(c, mask);
        for (int32_t id = 0; id < vocab; id++) {
            const bool bit = mask[id / 32] >> (id % 32) & 1;
            n += bit;
            if ((id + i) % 7 && !bit) continue;
            ck_assert(constraint_open(&probe, g, &e) == OK);
            for (int64_t k = 0; k < i; k++) ck_assert(constraint_accept(probe, ids.ids[k]));
            ck_assert_int_eq(constraint_accept(probe, id), bit);
            constraint_close(&probe);
        }
        ck_assert_int_eq(count, n);
        ck_assert_int_eq(constraint_may_end(c), i == ids.n);
        if (i < ids.n) ck_assert(constraint_accept(c, ids.ids[i]));
    }
    ck_assert_int_eq(constraint_mask(c, mask), 0); /* complete: nothing may follow */
    ck_assert(!constraint_accept(c, ids.ids[0]) && constraint_may_end(c));
    ck_assert(!constraint_accept(c, -1) && !constraint_accept(c, vocab));
    ck_assert(!constraint_accept(c, tokenizer_eos(t)));
    constraint_close(&c);
    grammar_close(&g);
    token_list_free(&ids);
    free(mask);
    tokenizer_close(&t);
}
END_TEST

static double now_ms(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts); /* whatever else runs */
    return 1e3 * (double)ts.tv_sec + 1e-6 * (double)ts.tv_nsec;
}

/* A large vocabulary: answers are found, and masks are quick enough (printed, loosely bounded). */
START_TEST(mask_large)
{
    static const char dir[] = TMF_SHARED_DIR "/data/tokenizers/qwen2";
    tokenizer *t;
    grammar_set *big;
    grammar *g;
    constraint *c;
    err e;
    if (!file_exists(dir)) {
        printf("SKIP mask_large: %s is not there\n", dir);
        return;
    }
    ck_assert_msg(tokenizer_open(&t, dir, &e) == OK, "%s", e.msg);
    double at = now_ms();
    ck_assert(grammar_set_open(&big, t, &e) == OK);
    const double trie = now_ms() - at;
    at = now_ms();
    ck_assert(grammar_set_json_object(big, &g, &e) == OK);
    const double compiled = now_ms() - at;
    const int32_t vocab = tokenizer_vocab(t);
    uint32_t *mask = calloc(((size_t)vocab + 31) / 32, sizeof *mask);
    ck_assert(constraint_open(&c, g, &e) == OK);
    double worst = 0;
    for (const char *p = "{\"abc\": [12, \"x"; *p; p++) {
        char one[2] = {*p, 0};
        at = now_ms();
        ck_assert_int_gt(constraint_mask(c, mask), 0);
        if (now_ms() - at > worst) worst = now_ms() - at;
        const int32_t id = *p == ' ' ? tokenizer_id(t, "\xc4\xa0") : tokenizer_id(t, one);
        ck_assert_msg(constraint_accept(c, id), "'%c'", *p);
    }
    const int32_t n = constraint_mask(c, mask);
    ck_assert_int_gt(n, 100000); /* within a string nearly everything may come */
    at = now_ms();
    for (int i = 0; i < 100; i++) (void)constraint_mask(c, mask);
    const double again = (now_ms() - at) / 100;
    printf("%d tokens: trie %.1f ms, compile %.1f ms, mask %.2f ms at worst, %.4f ms again\n",
           vocab, trie, compiled, worst, again);
    ck_assert(worst < 500 && again < 5);
    constraint_close(&c);
    uint64_t seed = 5;
    for (int i = 0; i < 20; i++) {
        walk_answer a = walk_random_answer(t, g, 10, &seed);
        ck_assert(!a.stuck);
        if (a.done) ck_assert(json_utf8_valid(a.text, a.n));
        free(a.text);
    }
    grammar_close(&g);
    grammar_set_close(&big);
    free(mask);
    tokenizer_close(&t);
}
END_TEST

/* What is kept is forgotten now and then; answers on the way stay where they are. */
START_TEST(mask_forgets)
{
    tokenizer *t = open_demo();
    const int32_t vocab = tokenizer_vocab(t);
    uint32_t *mask = calloc(((size_t)vocab + 31) / 32, sizeof *mask);
    static const char text[] = "{\"type\":\"string\",\"maxLength\":20000}";
    grammar *g;
    constraint *early, *late;
    err e;
    ck_assert(grammar_json_schema(&g, t, text, strlen(text), &e) == OK);
    ck_assert(constraint_open(&early, g, &e) == OK && constraint_open(&late, g, &e) == OK);
    const int32_t quote = tokenizer_id(t, "\"");
    ck_assert(constraint_accept(early, quote) && constraint_accept(late, quote));
    const int32_t before = constraint_mask(early, mask), a = tokenizer_id(t, "a");
    for (int i = 0; i < 6000; i++) { /* a position of its own each: more than is kept */
        if (i % 2 == 0) ck_assert_int_gt(constraint_mask(late, mask), 0);
        ck_assert(constraint_accept(late, a));
    }
    ck_assert_int_eq(constraint_mask(early, mask), before);
    ck_assert(constraint_accept(early, quote) && constraint_may_end(early));
    ck_assert(constraint_accept(late, quote) && constraint_may_end(late));
    constraint_close(&early);
    constraint_close(&late);
    grammar_close(&g);
    free(mask);
    tokenizer_close(&t);
}
END_TEST

/* ---- tool calls ---- */

#define TOOLS                                                                                     \
    "[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"parameters\":{\"type\":\"object\"," \
    "\"properties\":{\"x\":" I ",\"y\":" I "},\"required\":[\"x\"]}}},"                           \
    "{\"type\":\"function\",\"function\":{\"name\":\"now\"}}]"

static grammar *calls(chat_tools format, const char *only, bool parallel)
{
    grammar *g;
    err e;
    ck_assert_msg(
        grammar_set_tool_calls(set, &g, format, TOOLS, strlen(TOOLS), only, parallel, &e) == OK,
        "%s", e.msg);
    return g;
}

START_TEST(tools_take)
{
    grammar *g = calls(CHAT_TOOLS_HERMES, NULL, false);
#define ADD "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\":1}}\n</tool_call>"
#define NOW "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>"
    ck_assert(takes(g, ADD) && takes(g, NOW));
    ck_assert(!takes(g, ADD "\n" NOW) && !takes(g, "") && !takes(g, "hello"));
    ck_assert(!takes(g, "<tool_call>\n{\"name\": \"now\", \"arguments\": {\n}}\n</tool_call>"));
    ck_assert(
        !takes(g, "<tool_call>\n{\"name\": \"sub\", \"arguments\": {\"x\":1}}\n</tool_call>"));
    ck_assert(!takes(g, "<tool_call>\n{\"name\": \"add\", \"arguments\": {}}\n</tool_call>"));
    grammar_close(&g);
    g = calls(CHAT_TOOLS_NONE, "now", true);
    ck_assert(!takes(g, ADD) && takes(g, NOW) && !takes(g, NOW "\n" NOW));
    grammar_close(&g);
    g = calls(CHAT_TOOLS_NONE, NULL, true);
#define FOUR NOW "\n" ADD "\n" NOW "\n" NOW
    ck_assert(takes(g, ADD) && takes(g, FOUR) && takes(g, FOUR "\n" FOUR));
    ck_assert(!takes(g, FOUR "\n" FOUR "\n" ADD) && !takes(g, ADD "\n"));
    grammar_close(&g);
    g = calls(CHAT_TOOLS_LLAMA3, NULL, true);
    ck_assert(takes(g, "{\"name\": \"add\", \"parameters\": {\"x\":1, \"y\":2}}"));
    ck_assert(takes(g, "{\"name\": \"now\", \"parameters\": {}}; {\"name\": \"now\", "
                       "\"parameters\": {}}"));
    grammar_close(&g);
    g = calls(CHAT_TOOLS_MISTRAL, NULL, true);
    ck_assert(takes(g, "[TOOL_CALLS] [{\"name\": \"now\", \"arguments\": {}}]"));
    grammar_close(&g);
}
END_TEST

START_TEST(tools_refuse)
{
    static const struct {
        const char *tools, *only;
        err_code code;
    } bad[] = {
        {"{}", NULL, E_INPUT},
        {"[]", NULL, E_INPUT},
        {"[{}]", NULL, E_INPUT},
        {"[{\"function\":{\"name\":\"a\"}},{\"function\":{\"name\":\"a\"}}]", NULL, E_INPUT},
        {"[{\"function\":{\"name\":\"a\"}}]", "b", E_INPUT},
        {"[{\"function\":{\"name\":\"a\",\"parameters\":{\"not\":{}}}}]", NULL, E_UNSUPPORTED},
    };
    grammar *g;
    err e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        ck_assert_int_eq(grammar_set_tool_calls(set, &g, CHAT_TOOLS_HERMES, bad[i].tools,
                                                strlen(bad[i].tools), bad[i].only, false, &e),
                         bad[i].code);
}
END_TEST

/* Special tokens of the format are taken as tokens, and nowhere else. */
START_TEST(tools_special)
{
    tokenizer *t = open_demo();
    uint32_t mask[4096 / 32 + 1];
    const int32_t action = tokenizer_id(t, "<|action_start|>");
    grammar *g;
    err e;
    if (action < 0) {
        tokenizer_close(&t);
        return;
    }
    ck_assert(tokenizer_vocab(t) <= 4096);
    ck_assert(grammar_tool_calls(&g, t, CHAT_TOOLS_INTERNLM2, TOOLS, strlen(TOOLS), NULL, false,
                                 &e) == OK);
    constraint *c;
    ck_assert(constraint_open(&c, g, &e) == OK);
    ck_assert_int_eq(constraint_mask(c, mask), 1);
    ck_assert(mask[action / 32] >> (action % 32) & 1);
    ck_assert(constraint_accept(c, action));
    ck_assert(!constraint_accept(c, action));
    ck_assert(constraint_accept(c, tokenizer_id(t, "<|plugin|>")));
    constraint_close(&c);
    uint64_t seed = 3;
    for (int i = 0; i < 20; i++) {
        walk_answer a = walk_random_answer(t, g, 60, &seed);
        ck_assert_msg(a.done && !strncmp(a.text, "<|action_start|><|plugin|>\n{\"name\": \"", 36),
                      "'%s'", a.text);
        free(a.text);
    }
    grammar_close(&g);
    tokenizer_close(&t);
}
END_TEST

/* ---- the set ---- */

START_TEST(set_keeps)
{
    grammar *a, *b, *c;
    char text[200];
    err e;
    ck_assert(grammar_set_regex(set, &a, "ab", &e) == OK);
    ck_assert(grammar_set_regex(set, &b, "ab", &e) == OK);
    ck_assert_ptr_eq(a, b);
    for (int i = 0; i < GRAMMAR_KEPT + 10; i++) {
        snprintf(text, sizeof text, "{\"const\":%d}", i);
        ck_assert(grammar_set_json_schema(set, &c, text, strlen(text), &e) == OK);
        grammar_close(&c);
    }
    ck_assert(grammar_set_regex(set, &c, "ab", &e) == OK);
    ck_assert_ptr_ne(a, c); /* pushed out; who has it keeps it */
    ck_assert(takes(a, "ab") && takes(c, "ab"));
    grammar_close(&a);
    grammar_close(&b);
    grammar_close(&c);
    grammar_close(&c);
}
END_TEST

/* Compiled, asked and closed by several threads at once. */
static void *use_set(void *ud)
{
    static char refused_it[] = "refused", no_answer[] = "no answer";
    uint64_t seed = *(uint64_t *)ud;
    for (int i = 0; i < 30; i++) {
        char text[100];
        grammar *g;
        err e;
        snprintf(text, sizeof text, "{\"type\":\"string\",\"maxLength\":%d}", i % 7);
        if (grammar_set_json_schema(set, &g, text, strlen(text), &e) != OK) return refused_it;
        walk_answer a = walk_random_answer(bytes, g, 5, &seed);
        const bool ok = a.done && a.n >= 2;
        free(a.text);
        grammar_close(&g);
        if (!ok) return no_answer;
    }
    return NULL;
}

START_TEST(set_threads)
{
    pthread_t t[4];
    uint64_t seed[4] = {11, 22, 33, 44};
    void *said;
    for (int i = 0; i < 4; i++) ck_assert(pthread_create(&t[i], NULL, use_set, &seed[i]) == 0);
    for (int i = 0; i < 4; i++) {
        ck_assert(pthread_join(t[i], &said) == 0);
        ck_assert_msg(!said, "%s", (char *)said);
    }
}
END_TEST

/* Every allocation fails once: refused, or nothing may come; nothing is lost. */
START_TEST(memory_fails)
{
    static const char text[] =
        "{\"type\":\"object\",\"properties\":{\"a\":{\"$ref\":\"#/$defs/d\"},\"b\":{\"type\":"
        "\"string\",\"pattern\":\"^a[^b]*$\"}},\"required\":[\"a\"],\"additionalProperties\":{"
        "\"type\":\"null\"},\"$defs\":{\"d\":{\"type\":\"array\",\"maxItems\":2}}}";
    static const char answer[] = "{\"a\":[1],\"b\":\"ac\",\"c\":null}";
    uint32_t mask[(BYTE_VOCAB + 31) / 32];
    long n = 0;
    int complete = 0;
    for (bool failed = true; failed; n++) {
        grammar *g;
        constraint *c = NULL;
        err e;
        alloc_fail_at(n + 1);
        err_code rc = grammar_json_schema(&g, bytes, text, strlen(text), &e);
        if (rc == OK) rc = constraint_open(&c, g, &e);
        bool ok = rc == OK;
        for (const char *p = answer; *p && ok; p++) {
            (void)constraint_mask(c, mask);
            ok = constraint_accept(c, (uint8_t)*p);
        }
        failed = alloc_failed();
        alloc_fail_at(0);
        ck_assert(rc == OK || rc == E_NOMEM || rc == E_LIMIT);
        complete += ok && constraint_may_end(c);
        ck_assert(failed || complete);
        constraint_close(&c);
        grammar_close(&g);
    }
    ck_assert_int_ge(n, 30);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("grammar");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
    tcase_add_loop_test(c, regex_takes, 0, (int)(sizeof regexes / sizeof *regexes));
    tcase_add_test(c, regex_refuses);
    tcase_add_test(c, regex_hard);
    tcase_add_loop_test(c, schema_takes, 0, (int)(sizeof schemas / sizeof *schemas));
    tcase_add_loop_test(c, schema_refuses, 0, (int)(sizeof refused / sizeof *refused));
    tcase_add_test(c, object_takes);
    tcase_add_loop_test(c, schema_walks, 0, 3);
    tcase_add_test(c, mask_is_accept);
    tcase_add_test(c, mask_large);
    tcase_add_test(c, mask_forgets);
    tcase_add_test(c, tools_take);
    tcase_add_test(c, tools_refuse);
    tcase_add_test(c, tools_special);
    tcase_add_test(c, set_keeps);
    tcase_add_test(c, set_threads);
    tcase_add_test(c, memory_fails);
    suite_add_tcase(s, c);
    return suite_run(s);
}
