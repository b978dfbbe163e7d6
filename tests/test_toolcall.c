/* runtime/serve/toolcall: answers of each format, whole and cut at every byte and into single
 * bytes: the same events, joined. */
#include "runtime/serve/toolcall.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "runtime/serve/grammar.h"
#include "support/alloc_fail.h"
#include "support/grammar_walk.h"
#include "support/suite.h"

/* "content|name(args)|name(args)|content": what an answer came to. */
typedef struct {
    char p[65536];
    size_t n;
    int open; /* the call that is being written; -1 none */
    int events;
} story;

static void put(story *s, const char *p, size_t n)
{
    ck_assert_uint_lt(s->n + n + 2, sizeof s->p);
    memcpy(s->p + s->n, p, n);
    s->n += n;
    s->p[s->n] = '\0';
}

static err_code on_event(void *ud, const toolcall_event *ev, err *e)
{
    story *s = ud;
    (void)e;
    ck_assert_uint_gt(ev->n, 0);
    s->events++;
    if (ev->kind != TOOLCALL_ARGS && s->open >= 0) put(s, ")|", 2);
    if (ev->kind == TOOLCALL_BEGIN) {
        ck_assert_int_eq(ev->index, s->open < 0 ? ev->index : s->open + 1);
        if (s->n && s->p[s->n - 1] != '|') put(s, "|", 1);
        put(s, ev->text, ev->n);
        put(s, "(", 1);
        s->open = ev->index;
        return OK;
    }
    if (ev->kind == TOOLCALL_ARGS) {
        ck_assert_int_eq(ev->index, s->open);
    } else {
        ck_assert_int_eq(ev->index, -1);
        s->open = -1;
    }
    put(s, ev->text, ev->n);
    return OK;
}

static const char tools_of_get[] =
    "[{\"type\": \"function\", \"function\": {\"name\": \"get\", \"parameters\": {\"properties\": {"
    "\"city\": {\"type\": \"string\"}, \"days\": {\"type\": \"integer\"}, "
    "\"text\": {\"type\": \"string\"}, \"both\": {\"type\": [\"integer\", \"string\"]}, "
    "\"on\": {\"type\": \"boolean\"}, \"list\": {\"anyOf\": []}}}}}]";

/* In two parts cut at `at`, or (step) in pieces of so many bytes. */
static void tell(story *s, chat_tools f, const char *text, size_t at, size_t step)
{
    const size_t n = strlen(text);
    toolcall *t;
    err e;
    *s = (story){.open = -1};
    ck_assert(toolcall_open(&t, f, &e) == OK);
    cJSON *tools = cJSON_Parse(tools_of_get);
    toolcall_tools(t, tools);
    for (size_t i = 0, k; i < n; i += k) {
        k = step ? step : i ? n - i : at;
        if (k > n - i) k = n - i;
        if (!k) k = n;
        ck_assert(toolcall_feed(t, text + i, k, on_event, s, &e) == OK);
    }
    ck_assert(toolcall_end(t, on_event, s, &e) == OK);
    if (s->open >= 0) put(s, ")|", 2);
    toolcall_close(&t);
    cJSON_Delete(tools);
}

#define H       CHAT_TOOLS_HERMES
#define I       CHAT_TOOLS_INTERNLM2
#define L       CHAT_TOOLS_LLAMA3
#define M       CHAT_TOOLS_MISTRAL
#define D       CHAT_TOOLS_DEEPSEEK
#define D_CALLS "<｜tool▁calls▁begin｜>"
#define D_CALL  "<｜tool▁call▁begin｜>"
#define D_MARK  "<｜tool▁sep｜>"
#define D_END   "<｜tool▁call▁end｜>"
#define D_LAST  "<｜tool▁calls▁end｜>"
#define A       "{\"x\": 1, \"s\": \"}{\\\"<\"}"
static const struct {
    chat_tools f;
    const char *text, *want;
} answers[] = {
    {CHAT_TOOLS_NONE, "a <tool_call>{\"name\": \"f\"} \n", "a <tool_call>{\"name\": \"f\"} \n"},
    {H, "", ""},
    {H, "  plain text \n", "  plain text \n"},
    {H, "<tool_call>\n{\"name\": \"f\", \"arguments\": " A "}\n</tool_call>", "f(" A ")|"},
    {H, "<tool_call>{\"arguments\": " A ", \"name\": \"f\"}</tool_call>", "f(" A ")|"},
    {H, "Sure.\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n",
     "Sure.|f({})|"},
    {H,
     "<tool_call>{\"name\": \"f\", \"arguments\": {}}</tool_call>\n<tool_call>{\"name\": \"g\", "
     "\"arguments\": [1]}</tool_call> bye",
     "f({})|g([1])| bye"},
    {H, "<tool_call>{\"name\": \"f\"}</tool_call>", "f({})|"},
    {H,
     "<tool_call>{\"id\": 3, \"name\": \"f\\u00e9\", \"arguments\": {\"name\": \"g\"}}</tool_call>",
     "f\xc3\xa9({\"name\": \"g\"})|"},
    {H, "<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>",
     "f({\"a\": 1})|"},
    {H, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": 1}}", "f({\"a\": 1})|"},
    {H, "<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"tr", "f({\"a\": \"tr)|"},
    {H, "<tool_call>{\"name\": \"f\", \"argum", "<tool_call>{\"name\": \"f\", \"argum"},
    {H, "a <tool_call> is a tag", "a <tool_call> is a tag"},
    {H, "a <tool_call>\n[1]</tool_call>", "a <tool_call>\n[1]</tool_call>"},
    {H, "<tool_call>{\"nome\": \"f\"}</tool_call>", "<tool_call>{\"nome\": \"f\"}</tool_call>"},
    {H, "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>",
     "<tool_call>{\"name\": 5, \"arguments\": {}}</tool_call>"},
    {H, "<tool_call>{name: f}</tool_call>", "<tool_call>{name: f}</tool_call>"},
    {H, "<tool_cal", "<tool_cal"},
    {H, "x < y <tool", "x < y <tool"},
    {H, "caf\xc3\xa9 <tool_call>{\"name\":\"f\",\"arguments\":{\"c\":\"K\xc3\xb6ln\"}}</tool_call>",
     "caf\xc3\xa9|f({\"c\":\"K\xc3\xb6ln\"})|"},
    {H, "<tool_call>{\"name\": \"f\", \"arguments\": 5 , \"z\": null}</tool_call>", "f(5 )|"},
    {H,
     "So:\n<tool_call>\n<function=get>\n<parameter=city>\nK\xc3\xb6ln \"x\"\n</parameter>\n"
     "<parameter=days>\n3\n</parameter>\n<parameter=text>\n3\n</parameter>\n"
     "<parameter=both>\n4\n</parameter>\n<parameter=on>\nTrue\n</parameter>\n"
     "<parameter=list>\n[1, {\"a\": null}]\n</parameter>\n<parameter=more>\n3\n</parameter>\n"
     "</function>\n</tool_call>\n<tool_call><function=now></function></tool_call> bye",
     "So:|get({\"city\": \"K\xc3\xb6ln \\\"x\\\"\", \"days\": 3, \"text\": \"3\", \"both\": \"4\", "
     "\"on\": true, \"list\": [1, {\"a\": null}], \"more\": \"3\"})|now({})| bye"},
    {H, "<tool_call><function=get><parameter=days>soon</parameter></function></tool_call>",
     "get({\"days\": \"soon\"})|"},
    {H, "<tool_call><function=f><parameter=a>\n\n</b>\n<parameter=c>\n\n</parameter></function>",
     "f({\"a\": \"\\n</b>\\n<parameter=c>\\n\"})|"},
    {H, "<tool_call><function=f><parameter=a>1</parameter><parameter=b>2", "f({\"a\": \"1\")|"},
    {H, "<tool_call><function=f>nothing", "f()|nothing"},
    {H, "<tool_call><function=f", "<tool_call><function=f"},
    {H, "<tool_call><function=>", "<tool_call><function=>"},
    {H, "<tool_call><b>bold</b>", "<tool_call><b>bold</b>"},
    {H, "{\"name\": \"f\", \"arguments\": {}}", "{\"name\": \"f\", \"arguments\": {}}"},
    {I,
     "Let me see.<|action_start|><|plugin|>\n{\"name\": \"f\", \"parameters\": " A
     "}<|action_end|>\n",
     "Let me see.|f(" A ")|"},
    {I, "<|action_start|> <|plugin|>{\"name\": \"f\", \"parameters\": {}}", "f({})|"},
    {I, "<|action_start|><|interpreter|>print(1)", "<|action_start|><|interpreter|>print(1)"},
    {L, "{\"name\": \"f\", \"parameters\": " A "}", "f(" A ")|"},
    {L, " \n{\"type\": \"function\", \"name\": \"f\", \"parameters\": {}}", "f({})|"},
    {L, "{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"g\", \"parameters\": {\"a\": 1}}",
     "f({})|g({\"a\": 1})|"},
    {L, "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}", "f({})|"},
    {L, "<|python_tag|>search.call(query=\"a \\\"b\\\"\", n=\"1\")",
     "search({\"query\": \"a \\\"b\\\"\", \"n\": \"1\"})|"},
    {L, "<|python_tag|>print(1)\nx", "<|python_tag|>print(1)\nx"},
    {L, "{\"answer\": 42, \"list\": [1, {\"a\": 2}]} and more",
     "{\"answer\": 42, \"list\": [1, {\"a\": 2}]} and more"},
    {L, "{\"name\": \"Bob\", \"age\": 3}", "{\"name\": \"Bob\", \"age\": 3}"},
    {L, "Text with {\"name\": \"f\", \"parameters\": {}}",
     "Text with {\"name\": \"f\", \"parameters\": {}}"},
    {M,
     "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": " A "}, {\"name\": \"g\", \"arguments\": {}}]",
     "f(" A ")|g({})|"},
    {M, "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {}, \"id\": \"abc123456\"}]", "f({})|"},
    {M, "[TOOL_CALLS]f[ARGS]" A, "f(" A ")|"},
    {M, "[TOOL_CALLS]f[ARGS]{\"a\": 1}[TOOL_CALLS]g{}", "f({\"a\": 1})|g({})|"},
    {M, "[TOOL_CALLS] []", "[TOOL_CALLS] []"},
    {M, "[1, 2] is a list", "[1, 2] is a list"},
    {M, "[TOOL_CALLS] nothing here", "[TOOL_CALLS] nothing here"},
    {D,
     "Well.\n" D_CALLS D_CALL "function" D_MARK "f\n```json\n" A "\n```" D_END "\n" D_CALL
     "function" D_MARK "g\n```json\n{}\n```" D_END D_LAST,
     "Well.|f(" A ")|g({})|"},
    {D, D_CALLS D_CALL "f" D_MARK A D_END D_CALL "g" D_MARK "{}" D_END D_LAST " bye",
     "f(" A ")|g({})| bye"},
    {D, D_CALLS D_CALL "f" D_MARK "{\"a\": 1}" D_END "\n", "f({\"a\": 1})|"},
    {D, D_CALLS D_CALL "f" D_MARK "{\"a\": [", "f({\"a\": [)|"},
    {D, D_CALLS D_CALL "f" D_MARK, D_CALLS D_CALL "f" D_MARK},
    {D, D_CALLS "nothing", D_CALLS "nothing"},
    {D, "<｜tool▁calls", "<｜tool▁calls"},
};

START_TEST(answers_told)
{
    const char *text = answers[_i].text, *want = answers[_i].want;
    static story s;
    const size_t n = strlen(text);
    for (size_t at = 0; at <= n; at++) {
        tell(&s, answers[_i].f, text, at, 0);
        ck_assert_msg(!strcmp(s.p, want), "'%s' cut at %zu: '%s', expected '%s'", text, at, s.p,
                      want);
    }
    for (size_t step = 1; step < 4; step++) {
        tell(&s, answers[_i].f, text, 0, step);
        ck_assert_msg(!strcmp(s.p, want), "'%s' by %zu: '%s', expected '%s'", text, step, s.p,
                      want);
    }
}
END_TEST

/* Arguments come out while they come in. */
START_TEST(answers_stream)
{
    static story s;
    toolcall *t;
    err e;
    static const char begin[] = "<tool_call>{\"name\":\"f\",\"arguments\":{\"a\":\"";
    s = (story){.open = -1};
    ck_assert(toolcall_open(&t, H, &e) == OK);
    ck_assert(toolcall_feed(t, begin, strlen(begin), on_event, &s, &e) == OK);
    ck_assert_int_eq(toolcall_count(t), 1);
    ck_assert_str_eq(s.p, "f({\"a\":\"");
    for (int i = 0; i < 10; i++) {
        ck_assert(toolcall_feed(t, "word ", 5, on_event, &s, &e) == OK);
        ck_assert_int_eq(s.events, 3 + i);
    }
    ck_assert(toolcall_end(t, on_event, &s, &e) == OK);
    toolcall_close(&t);
}
END_TEST

static err_code stop(void *ud, const toolcall_event *ev, err *e)
{
    (void)ud;
    return ev->kind == TOOLCALL_ARGS ? err_set(e, E_CANCELED, "enough") : OK;
}

START_TEST(answers_stop)
{
    toolcall *t;
    err e;
    static const char text[] = "<tool_call>{\"name\":\"f\",\"arguments\":{}}</tool_call>";
    ck_assert(toolcall_open(&t, H, &e) == OK);
    ck_assert(toolcall_feed(t, text, strlen(text), stop, NULL, &e) == E_CANCELED);
    toolcall_close(&t);
    toolcall_close(&t);
}
END_TEST

/* A call that never ends is content in the end. */
START_TEST(answers_large)
{
    static story s;
    toolcall *t;
    err e;
    char *block = malloc(1 << 16);
    memset(block, 'x', 1 << 16);
    s = (story){.open = -1};
    ck_assert(toolcall_open(&t, H, &e) == OK);
    static const char begin[] = "<tool_call>{\"arguments\":\"";
    size_t told = 0;
    ck_assert(toolcall_feed(t, begin, strlen(begin), on_event, &s, &e) == OK);
    for (int i = 0; i < 40; i++) {
        s = (story){.open = -1};
        err_code rc = toolcall_feed(t, block, i < 16 ? 1 << 15 : 1 << 4, on_event, &s, &e);
        ck_assert_int_eq(rc, OK);
        told += s.n;
    }
    ck_assert_uint_eq(told, 0); /* still held: it could become one */
    toolcall_close(&t);
    free(block);
}
END_TEST

/* What the grammar of each format allows, the parser reads as calls. */
START_TEST(grammar_parses)
{
    static const char tools[] =
        "[{\"type\":\"function\",\"function\":{\"name\":\"add\",\"parameters\":{\"type\":"
        "\"object\","
        "\"properties\":{\"x\":{\"type\":\"integer\"},\"s\":{\"type\":\"string\"}},\"required\":"
        "[\"x\"]}}},{\"function\":{\"name\":\"now\",\"parameters\":{}}}]";
    static const chat_tools formats[] = {H, I, L, M, D};
    static story s;
    tokenizer *t;
    uint64_t seed = 99;
    int calls = 0;
    err e;
    ck_assert(tokenizer_open(&t, TMF_SOURCE_DIR "/datasets/demo", &e) == OK);
    for (int k = 0; k < 5; k++) {
        grammar *g;
        ck_assert_msg(grammar_tool_calls(&g, t, formats[k], tools, strlen(tools), NULL, true, &e) ==
                          OK,
                      "%s", e.msg);
        for (int i = 0; i < 25; i++) {
            walk_answer a = walk_random_answer(t, g, 40, &seed);
            ck_assert(!a.stuck);
            if (a.done) {
                tell(&s, formats[k], a.text, 0, 3);
                ck_assert_msg(!strncmp(s.p, "add({", 5) || !strncmp(s.p, "now({", 5), "'%s': '%s'",
                              a.text, s.p);
                calls++;
            }
            free(a.text);
        }
        grammar_close(&g);
    }
    ck_assert_int_ge(calls, 60);
    tokenizer_close(&t);
}
END_TEST

START_TEST(memory_fails)
{
    static const char tags[] =
        "<tool_call><function=get><parameter=days>3</parameter></function></tool_call>";
    const char *text = _i ? tags : answers[4].text;
    static story s;
    long n = 0;
    for (bool failed = true; failed; n++) {
        toolcall *t = NULL;
        err e;
        s = (story){.open = -1};
        alloc_fail_at(n + 1);
        err_code rc = toolcall_open(&t, H, &e);
        if (rc == OK) rc = toolcall_feed(t, text, strlen(text), on_event, &s, &e);
        if (rc == OK) rc = toolcall_end(t, on_event, &s, &e);
        failed = alloc_failed();
        alloc_fail_at(0);
        /* a name that there is no memory to read is none */
        ck_assert(rc == OK || rc == E_NOMEM);
        toolcall_close(&t);
    }
    ck_assert_int_ge(n, 4);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("toolcall");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 60);
    tcase_add_loop_test(c, answers_told, 0, (int)(sizeof answers / sizeof *answers));
    tcase_add_test(c, answers_stream);
    tcase_add_test(c, answers_stop);
    tcase_add_test(c, answers_large);
    tcase_add_test(c, grammar_parses);
    tcase_add_loop_test(c, memory_fails, 0, 2);
    suite_add_tcase(s, c);
    return suite_run(s);
}
