/* Requests by the table of parameters, the JSON writer, faults, and texts that end anywhere. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/api.h"
#include "runtime/serve/session.h"
#include "runtime/text_stream.h"
#include "support/alloc_fail.h"
#include "support/byte_tokenizer.h"
#include "support/suite.h"

static const api_limits limits = {.vocab = 1000, .max_n = 8};

static err_code parse_as(unsigned who, api_request *r, const char *text, api_fault *f)
{
    return api_parse(r, who, text, strlen(text), &limits, f);
}

/* ---- the table: every parameter with a good and a bad value ---- */

static const char *base_of(unsigned who)
{
    switch (who) {
    case API_CHAT: return "\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]";
    case API_COMPLETION: return "\"model\":\"m\",\"prompt\":\"x\"";
    case API_INTERACTIVE: return "\"prompt\":\"x\"";
    case API_GENERATE: return "\"input_ids\":[1]";
    case API_DECODE: return "\"tokens\":[1]";
    case API_TEMPLATE: return "\"messages\":[{\"role\":\"user\",\"content\":\"x\"}]";
    default: return "\"input\":\"x\"";
    }
}

/* The base with one key more; a key of the base itself is replaced. */
static err_code with(unsigned who, api_request *r, const char *name, const char *value,
                     api_fault *f)
{
    char text[2048], key[64];
    const char *base = base_of(who);
    (void)snprintf(key, sizeof key, "\"%s\":", name);
    if (strstr(base, key) == base)
        (void)snprintf(text, sizeof text, "{%s%s%s}", key, value,
                       strchr(base, ',') && who != API_TEMPLATE ? strchr(base, ',') : "");
    else if (strstr(base, key))
        (void)snprintf(text, sizeof text, "{\"model\":\"m\",%s%s}", key, value);
    else
        (void)snprintf(text, sizeof text, "{%s,%s%s}", base, key, value);
    return parse_as(who, r, text, f);
}

static void refused(unsigned who, const char *name, const char *value)
{
    api_request r;
    api_fault f = {0};
    const err_code rc = with(who, &r, name, value, &f);
    ck_assert_msg(rc == E_INPUT, "%s = %s was taken", name, value);
    ck_assert_msg(f.kind == API_INVALID_VALUE && *f.message, "%s = %s: %s", name, value, f.message);
    ck_assert_msg(strncmp(f.param, name, strlen(name)) == 0, "%s = %s: param '%s'", name, value,
                  f.param);
    ck_assert_ptr_null(r.body);
}

static void taken(unsigned who, const char *name, const char *value)
{
    api_request r;
    api_fault f = {0};
    const err_code rc = with(who, &r, name, value, &f);
    ck_assert_msg(rc == OK, "%s = %s: %s", name, value, f.message);
    api_request_free(&r);
}

static void number_row(unsigned who, const api_param *p)
{
    char value[64];
    const double outside[] = {p->lo - 1, p->hi * 2 + 1};
    refused(who, p->name, "\"1\"");
    refused(who, p->name, "[1]");
    refused(who, p->name, "true");
    if (p->type == API_T_INT) refused(who, p->name, "1.5");
    for (int i = 0; i < 2; i++) {
        (void)snprintf(value, sizeof value, "%.17g", outside[i]);
        refused(who, p->name, value);
    }
    (void)snprintf(value, sizeof value, "%.17g", p->lo);
    if (p->lo_open) refused(who, p->name, value);
    /* Not the upper ends: n and top_logprobs depend on more than their range. */
}

START_TEST(test_every_row)
{
    static const unsigned all[] = {API_CHAT,   API_COMPLETION, API_INTERACTIVE, API_ENCODE,
                                   API_DECODE, API_PPL,        API_TEMPLATE,    API_GENERATE};
    const api_param *p;
    int rows = 0;
    for (int i = 0; (p = api_param_at(i)) != NULL; i++) {
        for (size_t k = 0; k < sizeof all / sizeof all[0]; k++) {
            if (!(p->who & all[k])) continue;
            rows++;
            ck_assert_msg(*p->doc, "%s is told nowhere", p->name);
            if (strcmp(p->name, "content") != 0 && strcmp(p->name, "prompt") != 0 &&
                strcmp(p->name, "model") != 0 && strcmp(p->name, "messages") != 0 &&
                strcmp(p->name, "input") != 0 && strcmp(p->name, "input_ids") != 0 &&
                strcmp(p->name, "tokens") != 0)
                taken(all[k], p->name, "null");
            if (p->type == API_T_INT || p->type == API_T_NUMBER) number_row(all[k], p);
            if (p->type == API_T_REFUSED) refused(all[k], p->name, "\"x\"");
            if (p->type == API_T_IGNORED) taken(all[k], p->name, "\"x\"");
            if (p->type == API_T_OTHER) refused(all[k], p->name, "-0.5");
            if (p->type != API_T_BOOL) continue;
            taken(all[k], p->name, "true");
            taken(all[k], p->name, "false");
            refused(all[k], p->name, "1");
            refused(all[k], p->name, "\"true\"");
        }
    }
    ck_assert_int_gt(rows, 80);
}
END_TEST

START_TEST(test_good_values)
{
    static const struct {
        const char *name, *value;
    } rows[] = {{"temperature", "0"},
                {"temperature", "-0"},
                {"temperature", "2"},
                {"top_p", "1e-9"},
                {"top_k", "2147483647"},
                {"n", "8"},
                {"seed", "-9223372036854775808"},
                {"seed", "18446744073709551615"},
                {"stop", "\"x\""},
                {"stop", "[\"a\",\"bb\"]"},
                {"stop", "[]"},
                {"logit_bias", "{\"999\":-100,\"0\":100}"},
                {"logit_bias", "{}"},
                {"tool_choice", "\"auto\""},
                {"tools", "[]"},
                {"response_format", "{\"type\":\"text\"}"},
                {"response_format", "{\"type\":\"json_object\"}"},
                {"response_format", "{\"type\":\"regex_schema\",\"regex_schema\":\"a+\"}"},
                {"response_format",
                 "{\"type\":\"json_schema\",\"json_schema\":{\"name\":\"n\",\"schema\":{}}}"},
                {"messages", "\"one text\""},
                {"unknown", "[1,2]"}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++)
        taken(API_CHAT, rows[i].name, rows[i].value);
    refused(API_CHAT, "n", "9");
    refused(API_CHAT, "seed", "18446744073709551616");
    refused(API_CHAT, "seed", "-9223372036854775809");
}
END_TEST

START_TEST(test_values_arrive)
{
    api_request r;
    api_fault f;
    ck_assert_int_eq(
        parse_as(
            API_CHAT, &r,
            "{\"model\":\"m\",\"messages\":[{\"role\":\"developer\",\"content\":[{\"type\":"
            "\"text\",\"text\":\"a\"},{\"type\":\"text\",\"text\":\"b\"}]}],\"top_k\":7,"
            "\"max_completion_tokens\":9,\"max_tokens\":5,\"stop\":[\"x\",\"yy\"],\"min_p\":0.5,"
            "\"logit_bias\":{\"3\":-1.5},\"logprobs\":true,\"top_logprobs\":4,\"stream\":true,"
            "\"stream_options\":{\"include_usage\":true},\"n\":2,\"min_tokens\":3}",
            &f),
        OK);
    ck_assert_str_eq(r.messages[0].role, "system");
    ck_assert_str_eq(r.messages[0].content, "a\nb");
    ck_assert_int_eq(r.sample.top_k, 7);
    ck_assert_int_eq(r.max_tokens, 9);
    ck_assert_int_eq(r.n_stops, 2);
    ck_assert_str_eq(r.stops[1], "yy");
    ck_assert(r.sample.min_p == 0.5 && r.sample.bias[0].id == 3 && r.sample.bias[0].bias == -1.5f);
    ck_assert(r.top_logprobs == 4 && r.stream && r.include_usage && r.n == 2 && r.min_tokens == 3);
    api_request_free(&r);
}
END_TEST

START_TEST(test_defaults)
{
    api_request r;
    api_fault f;
    ck_assert_int_eq(with(API_CHAT, &r, "x", "1", &f), OK);
    ck_assert(r.sample.temperature == 1 && r.sample.top_p == 1 && r.sample.top_k == 0);
    ck_assert(r.max_tokens == -1 && r.n == 1 && r.top_logprobs == -1 && r.skip_special);
    api_request_free(&r);
    ck_assert_int_eq(with(API_COMPLETION, &r, "x", "1", &f), OK);
    ck_assert_int_eq(r.max_tokens, 16);
    api_request_free(&r);
    ck_assert_int_eq(with(API_INTERACTIVE, &r, "x", "1", &f), OK);
    ck_assert(r.sample.temperature == 0.8 && r.sample.top_p == 0.8 && r.sample.top_k == 40);
    ck_assert(r.max_tokens == 512 && r.session_id == -1 && !r.interactive);
    api_request_free(&r);
}
END_TEST

START_TEST(test_whole_seeds)
{
    static const struct {
        const char *text;
        uint64_t seed;
    } rows[] = {{"18446744073709551615", UINT64_MAX},
                {"9007199254740993", 9007199254740993u},
                {"-1", UINT64_MAX},
                {"0", 0},
                {"1e3", 1000},
                {"  7", 7}};
    char text[512];
    api_request r;
    api_fault f;
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        /* The key's name as a value, in a string and nested: none of them is it. */
        (void)snprintf(
            text, sizeof text,
            "{%s,\"a\":\"seed\",\"b\":{\"seed\":5},\"c\":\"\\\"seed\\\":6\",\"seed\" :%s}",
            base_of(API_CHAT), rows[i].text);
        ck_assert_int_eq(parse_as(API_CHAT, &r, text, &f), OK);
        ck_assert_uint_eq(r.sample.seed, rows[i].seed);
        api_request_free(&r);
    }
    (void)snprintf(text, sizeof text, "{%s,\"se\\u0065d\":12}", base_of(API_CHAT));
    ck_assert_int_eq(parse_as(API_CHAT, &r, text, &f), OK);
    ck_assert_uint_eq(r.sample.seed, 12);
    api_request_free(&r);
}
END_TEST

START_TEST(test_prompts)
{
    api_request r;
    api_fault f;
    ck_assert_int_eq(parse_as(API_COMPLETION, &r, "{\"prompt\":\"x\"}", &f), E_INPUT);
    ck_assert_str_eq(f.param, "model");
    ck_assert_int_eq(parse_as(API_COMPLETION, &r, "{\"model\":\"m\",\"prompt\":[[1,2],[3]]}", &f),
                     OK);
    ck_assert(r.n_prompts == 2 && r.prompts[0].n_ids == 2 && r.prompts[1].ids[0] == 3);
    api_request_free(&r);
    ck_assert_int_eq(parse_as(API_COMPLETION, &r, "{\"model\":\"m\",\"prompt\":[1,2]}", &f), OK);
    ck_assert(r.n_prompts == 1 && r.prompts[0].n_ids == 2 && !r.prompt_list);
    api_request_free(&r);
    ck_assert_int_eq(
        parse_as(API_COMPLETION, &r, "{\"model\":\"m\",\"prompt\":[[1],\"x\",[1000]]}", &f),
        E_INPUT);
    ck_assert_str_eq(f.param, "prompt[2][0]");
}
END_TEST

START_TEST(test_strict)
{
    const api_limits strict = {.vocab = 1000, .max_n = 8, .strict = true};
    api_request r;
    api_fault f;
    const char *text = "{\"model\":\"m\",\"prompt\":\"x\",\"promt\":1}";
    ck_assert_int_eq(api_parse(&r, API_COMPLETION, text, strlen(text), &strict, &f), E_INPUT);
    ck_assert_str_eq(f.param, "promt");
}
END_TEST

/* Texts, n times each; texts that no answer is made of are not counted. */
START_TEST(test_most_answers)
{
    const api_limits l = {.vocab = 1000, .max_n = 8, .max_answers = 4};
    const struct {
        unsigned who;
        const char *text, *param; /* NULL: allowed */
    } cases[] = {{API_COMPLETION, "{\"model\":\"m\",\"prompt\":[\"a\",\"b\"],\"n\":2}", NULL},
                 {API_COMPLETION, "{\"model\":\"m\",\"prompt\":[\"a\",\"b\"],\"n\":3}", "prompt"},
                 {API_PPL, "{\"input\":[\"a\",\"b\",\"c\",\"d\"]}", NULL},
                 {API_PPL, "{\"input\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", "input"},
                 {API_ENCODE, "{\"input\":[\"a\",\"b\",\"c\",\"d\",\"e\"]}", NULL}};
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const char *text = cases[i].text, *param = cases[i].param;
        api_request r;
        api_fault f;
        const err_code rc = api_parse(&r, cases[i].who, text, strlen(text), &l, &f);
        ck_assert_msg(rc == (param ? E_INPUT : OK), "%s: %s", text, f.message);
        if (param) ck_assert_str_eq(f.param, param);
        api_request_free(&r);
    }
}
END_TEST

/* Cut anywhere, a request is refused and leaves nothing behind (the sanitizer looks). */
START_TEST(test_truncated)
{
    static const char text[] =
        "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\","
        "\"text\":"
        "\"\\u00e9\"}]}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],"
        "\"stop\":"
        "[\"a\"],\"logit_bias\":{\"1\":2},\"response_format\":{\"type\":\"json_schema\","
        "\"json_schema\":{\"schema\":{}}}}";
    api_request r;
    api_fault f;
    for (size_t n = 0; n < sizeof text - 1; n++)
        ck_assert_int_eq(api_parse(&r, API_CHAT, text, n, &limits, &f), E_INPUT);
    ck_assert_int_eq(api_parse(&r, API_CHAT, text, sizeof text - 1, &limits, &f), OK);
    api_request_free(&r);
}
END_TEST

/* Whichever allocation fails: a 503 that says so, and nothing is left. */
START_TEST(test_every_allocation)
{
    static const char text[] =
        "{\"model\":\"m\",\"messages\":[{\"role\":\"user\",\"content\":[{\"type\":\"text\","
        "\"text\":"
        "\"a\"}]}],\"tools\":[{\"type\":\"function\",\"function\":{\"name\":\"f\"}}],"
        "\"logit_bias\":{\"1\":2},\"response_format\":{\"type\":\"json_schema\",\"json_schema\":"
        "{\"schema\":{}}}}";
    api_request r;
    api_fault f;
    long n = 0;
    for (;;) {
        alloc_fail_at(++n);
        const err_code rc = api_parse(&r, API_CHAT, text, sizeof text - 1, &limits, &f);
        if (!alloc_failed()) break;
        ck_assert_int_eq(rc, E_INPUT);
        ck_assert_msg(f.kind == API_UNAVAILABLE && f.retry_after_s > 0, "allocation %ld", n);
    }
    alloc_fail_at(0);
    api_request_free(&r);
    ck_assert_int_gt(n, 5);
}
END_TEST

/* ---- faults ---- */

START_TEST(test_faults)
{
    err e;
    for (int kind = 0; kind < API_FAULTS; kind++) {
        api_fault f;
        out_buf o = {0};
        cJSON *j;
        (void)api_fail(&f, (api_fault_kind)kind, kind % 2 ? "a\"b" : NULL, "text \"%d\"\n", kind);
        api_fault_json(&o, &f, "req-1");
        ck_assert_int_eq(json_parse(&j, o.s, o.n, "fault", &e), OK);
        const cJSON *in = cJSON_GetObjectItem(j, "error");
        ck_assert_int_eq(cJSON_GetArraySize(in), 4);
        ck_assert(cJSON_IsString(cJSON_GetObjectItem(in, "message")));
        ck_assert(cJSON_IsString(cJSON_GetObjectItem(in, "type")));
        ck_assert_str_eq(cJSON_GetObjectItem(in, "code")->valuestring,
                         api_code((api_fault_kind)kind));
        ck_assert(kind % 2 ? cJSON_IsString(cJSON_GetObjectItem(in, "param"))
                           : cJSON_IsNull(cJSON_GetObjectItem(in, "param")));
        ck_assert_int_ge(api_status((api_fault_kind)kind), 400);
        cJSON_Delete(j);
        out_free(&o);
    }
}
END_TEST

START_TEST(test_errors_of_the_inside)
{
    api_fault f;
    const err io = {E_IO, "/secret/path: 0x1234"}, full = {E_BUSY, "x"}, gone = {E_CANCELED, "x"};
    (void)api_fail_err(&f, &io, "x");
    ck_assert(f.kind == API_INTERNAL && !strstr(f.message, "secret") && !*f.param);
    (void)api_fail_err(&f, &full, NULL);
    ck_assert(f.kind == API_QUEUE_FULL && f.retry_after_s > 0);
    (void)api_fail_err(&f, &gone, NULL);
    ck_assert(f.kind == API_UNAVAILABLE && f.retry_after_s > 0);
}
END_TEST

/* ---- JSON out ---- */

START_TEST(test_strings_out)
{
    static const struct {
        const char *in;
        size_t n;
        const char *want;
    } rows[] = {{"a\"b\\c\n\t\x01\x7f", 9, "\"a\\\"b\\\\c\\n\\t\\u0001\\u007f\""},
                {"\0x", 2, "\"\\u0000x\""},
                {"\xc3\xa9\xf0\x9f\x99\x82", 6, "\"\xc3\xa9\xf0\x9f\x99\x82\""},
                {"a\xc3", 2, "\"a\xef\xbf\xbd\""},
                {"\xff\xfe", 2, "\"\xef\xbf\xbd\xef\xbf\xbd\""},
                {"\xed\xa0\x80", 3, "\"\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\""},
                {"\xc0\xaf", 2, "\"\xef\xbf\xbd\xef\xbf\xbd\""},
                {"", 0, "\"\""}};
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        out_buf o = {0};
        out_string(&o, rows[i].in, rows[i].n);
        out_bytes(&o, "", 1);
        ck_assert_str_eq(o.s, rows[i].want);
        out_free(&o);
    }
}
END_TEST

/* Whatever the bytes, what comes out is JSON that our own reader takes. */
START_TEST(test_any_bytes_out)
{
    uint32_t x = 1;
    err e;
    for (int round = 0; round < 3000; round++) {
        char in[24];
        out_buf o = {0};
        cJSON *j;
        for (size_t i = 0; i < sizeof in; i++) {
            x = x * 1664525u + 1013904223u;
            in[i] = (char)(x >> 24);
            if (in[i] == 0) in[i] = 'z'; /* our reader refuses U+0000 */
        }
        out_string(&o, in, sizeof in);
        ck_assert_msg(json_parse(&j, o.s, o.n, "string", &e) == OK, "%s", e.msg);
        cJSON_Delete(j);
        out_free(&o);
    }
}
END_TEST

START_TEST(test_numbers_out)
{
    static const double values[] = {0, -1.5, 0.1, 1e300, 5e-324, 1.0 / 3};
    static const int64_t whole[] = {0, -1, INT64_MAX, INT64_MIN, 42};
    char *end;
    for (size_t i = 0; i < sizeof values / sizeof values[0]; i++) {
        out_buf o = {0};
        out_number(&o, values[i]);
        out_bytes(&o, "", 1);
        ck_assert(strtod(o.s, &end) == values[i] && !*end);
        out_free(&o);
    }
    for (size_t i = 0; i < sizeof whole / sizeof whole[0]; i++) {
        out_buf o = {0};
        out_int(&o, whole[i]);
        out_bytes(&o, "", 1);
        ck_assert_int_eq(strtoll(o.s, &end, 10), whole[i]);
        out_free(&o);
    }
    out_buf o = {0};
    out_float(&o, 0.1f);
    out_bytes(&o, "", 1);
    ck_assert_str_eq(o.s, "0.1");
    out_free(&o);
}
END_TEST

/* ---- stop texts and characters across tokens: a token a byte, then a token a piece ---- */

typedef struct {
    char text[256];
    size_t n;
    int stop;
} heard;

/* Feeds `text` in tokens of a byte each. Every part is whole characters. */
static heard feed(const char *text, const char *const *stops, int n_stops)
{
    heard h = {.stop = -1};
    text_stream *s;
    tokenizer *t = byte_tokenizer();
    err e;
    size_t n;
    ck_assert_int_eq(text_stream_open(&s, t, 8, 512, 0, &e), OK);
    ck_assert_int_eq(text_stream_start(s, stops, n_stops, true, &e), OK);
    for (const char *p = text; *p && h.stop < 0; p++) {
        ck_assert_int_eq(text_stream_add(s, (unsigned char)*p, &h.stop, &e), OK);
        const char *ready = text_stream_ready(s, &n);
        ck_assert(json_utf8_valid(ready, n));
        memcpy(h.text + h.n, ready, n);
        h.n += n;
        text_stream_taken(s);
    }
    text_stream_flush(s);
    const char *ready = text_stream_ready(s, &n);
    ck_assert(json_utf8_valid(ready, n));
    memcpy(h.text + h.n, ready, n);
    h.n += n;
    text_stream_close(&s);
    tokenizer_close(&t);
    return h;
}

START_TEST(test_stops_across_tokens)
{
    static const struct {
        const char *text, *stops[3], *want;
        int stop;
    } rows[] = {
        {"one two three", {"two"}, "one ", 0},
        {"one twthree", {"two"}, "one twthree", -1},
        {"aaaab", {"aab"}, "aa", 0},       /* the beginning lies in what was held */
        {"abababac", {"ababac"}, "ab", 0}, /* what a search without a failure function misses */
        {"hello wor", {"world"}, "hello wor", -1},
        {"xabc", {"abc", "b"}, "xa", 1}, /* ends first */
        {"xabc", {"c", "abc"}, "x", 1},  /* end together: the longer */
        {"\xe6\x97\xa5\xe6\x9c\xac", {"\xe6\x9c\xac"}, "\xe6\x97\xa5", 0},
        {"a\xe6\x97", {"zz"}, "a\xef\xbf\xbd", -1},
        {"", {"a"}, "", -1},
    };
    for (size_t i = 0; i < sizeof rows / sizeof rows[0]; i++) {
        int n = 0;
        while (n < 3 && rows[i].stops[n]) n++;
        const heard h = feed(rows[i].text, rows[i].stops, n);
        ck_assert_msg(strncmp(h.text, rows[i].want, sizeof h.text) == 0 && h.stop == rows[i].stop,
                      "row %zu: '%s' %d", i, h.text, h.stop);
    }
}
END_TEST

/* Against a plain search: the first end of any stop text. */
START_TEST(test_stops_at_random)
{
    uint32_t x = 5;
    for (int round = 0; round < 2000; round++) {
        char text[24], a[5], b[5];
        const char *const stops[] = {a, b};
        size_t best = sizeof text, at = 0;
        memset(text, 0, sizeof text);
        memset(a, 0, sizeof a);
        memset(b, 0, sizeof b);
        for (size_t i = 0; i < sizeof text - 1; i++, x = x * 1664525u + 1013904223u)
            text[i] = "ab"[x >> 31];
        for (size_t i = 0; i < 1 + (x >> 30); i++, x = x * 1664525u + 1013904223u)
            a[i] = "ab"[x >> 31];
        for (size_t i = 0; i < 4; i++, x = x * 1664525u + 1013904223u) b[i] = "ab"[x >> 31];
        for (int k = 0; k < 2; k++) {
            const char *hit = strstr(text, stops[k]);
            const size_t len = strlen(stops[k]), end = hit ? (size_t)(hit - text) + len : best + 1;
            if (hit && (end < best || (end == best && len > best - at))) {
                best = end;
                at = end - len;
            }
        }
        const heard h = feed(text, stops, 2);
        ck_assert_msg(h.n == (h.stop >= 0 ? at : strlen(text)), "%s | %s %s: %zu, %zu", text, a, b,
                      h.n, at);
    }
}
END_TEST

/* ---- sessions ---- */

START_TEST(test_sessions)
{
    session_table *t;
    session *a, *b, *c;
    err e;
    ck_assert_int_eq(session_table_open(&t, 2, 5, &e), OK);
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    ck_assert_int_eq(session_take(&b, t, 1, 7, &e), E_BUSY);
    ck_assert_int_eq(session_take(&b, t, 2, 7, &e), OK);     /* another owner's */
    ck_assert_int_eq(session_take(&c, t, 1, 8, &e), E_BUSY); /* no place */
    ck_assert(!session_canceled(a) && session_cancel(t, 1, 7) && session_canceled(a));
    ck_assert(!session_canceled(b) && !session_cancel(t, 3, 7));
    for (int i = 0; i < 3; i++) ck_assert_int_eq(token_list_push(session_ids(a), i, &e), OK);
    for (int i = 0; i < 3; i++) ck_assert_int_eq(token_list_push(session_ids(b), i, &e), OK);
    session_give(t, &a, true);
    ck_assert_ptr_null(a);
    ck_assert(!session_cancel(t, 1, 7)); /* nobody holds it */
    session_give(t, &b, true);           /* six ids in all: the older one is forgotten */
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    ck_assert_int_eq(session_ids(a)->n, 0);
    ck_assert_int_eq(session_take(&b, t, 2, 7, &e), OK);
    ck_assert_int_eq(session_ids(b)->n, 3);
    session_give(t, &b, false);
    ck_assert_int_eq(session_take(&b, t, 2, 7, &e), OK);
    ck_assert_int_eq(session_ids(b)->n, 0);
    session_give(t, &a, true);
    session_give(t, &b, true);
    session_table_close(&t);
}
END_TEST

START_TEST(test_kwargs)
{
    static const char good[] = "{\"messages\":\"x\",\"chat_template_kwargs\":{\"thinking\":true}}";
    static const char bad[] =
        "{\"messages\":\"x\",\"chat_template_kwargs\":{\"thinking\":true,\"messages\":[]}}";
    api_request r;
    api_fault f = {0};
    ck_assert_int_eq(parse_as(API_TEMPLATE, &r, good, &f), OK);
    ck_assert(cJSON_IsObject(r.kwargs));
    api_request_free(&r);
    ck_assert_int_eq(parse_as(API_TEMPLATE, &r, bad, &f), E_INPUT);
    ck_assert_str_eq(f.param, "chat_template_kwargs.messages");
}
END_TEST

START_TEST(test_session_words)
{
    session_table *t;
    session *a;
    const chat_message *said, call = {.role = "tool", .content = "5", .tool_call_id = "c"};
    char role[] = "user", word[] = "w0";
    int64_t n;
    err e;
    ck_assert_int_eq(session_table_open(&t, 2, 40, &e), OK);
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    for (int i = 0; i < 20; i++) { /* eight bytes each, copied */
        word[1] = (char)('a' + i);
        session_say(a, &(chat_message){.role = role, .content = word});
    }
    word[0] = role[0] = '?';
    session_give(t, &a, true); /* 160 bytes count as 40 ids */
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    said = session_said(a, &n);
    ck_assert(said && n == 20);
    ck_assert_str_eq(said[0].content, "wa");
    ck_assert_str_eq(said[19].content, "wt");
    ck_assert_str_eq(said[19].role, "user");
    session_say(a, &call); /* what cannot be told again makes all of it useless */
    session_say(a, said);
    ck_assert_ptr_null(session_said(a, &n));
    session_give(t, &a, false);
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    ck_assert_ptr_null(session_said(a, &n)); /* nothing yet */
    ck_assert_int_eq(n, 0);
    for (int i = 0; i < 21; i++) session_say(a, &(chat_message){.role = "user", .content = "ww"});
    session_give(t, &a, true); /* too much */
    ck_assert_int_eq(session_take(&a, t, 1, 7, &e), OK);
    (void)session_said(a, &n);
    ck_assert_int_eq(n, 0);
    session_give(t, &a, true);
    session_table_close(&t);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("api");
    TCase *t = tcase_create("api");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, test_every_row);
    tcase_add_test(t, test_good_values);
    tcase_add_test(t, test_values_arrive);
    tcase_add_test(t, test_defaults);
    tcase_add_test(t, test_whole_seeds);
    tcase_add_test(t, test_prompts);
    tcase_add_test(t, test_strict);
    tcase_add_test(t, test_most_answers);
    tcase_add_test(t, test_truncated);
    tcase_add_test(t, test_every_allocation);
    tcase_add_test(t, test_faults);
    tcase_add_test(t, test_errors_of_the_inside);
    tcase_add_test(t, test_strings_out);
    tcase_add_test(t, test_any_bytes_out);
    tcase_add_test(t, test_numbers_out);
    tcase_add_test(t, test_stops_across_tokens);
    tcase_add_test(t, test_stops_at_random);
    tcase_add_test(t, test_kwargs);
    tcase_add_test(t, test_sessions);
    tcase_add_test(t, test_session_words);
    suite_add_tcase(s, t);
    return suite_run(s);
}
