/* formats/jinja: equal to Jinja2 on the shared data's renderings and on small cases of each part of
 * the language; who wrote each byte; limits; refusals. */
#include "formats/jinja.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus.h"
#include "support/alloc_fail.h"
#include "support/jinja_scope.h"
#include "support/suite.h"

#define TEMPLATES TMF_SHARED_DIR "/data/chat-templates"
enum { DAY = 1717761600 }; /* 2024-06-07, as the goldens were made on */

static bool have(const char *path, const char *test)
{
    if (file_exists(path)) return true;
    printf("SKIP %s: %s is not there\n", test, path);
    return false;
}

static const cJSON *get(const cJSON *o, const char *key)
{
    return cJSON_GetObjectItemCaseSensitive(o, key);
}

/* want NULL: any refusal. */
static void expect(const char *name, const char *text, size_t n, const cJSON *context,
                   const char *want)
{
    err_code rc;
    err e = {0};
    jinja_text got = jinja_with(text, n, context, DAY, &rc, &e);
    if (want) {
        ck_assert_msg(rc == OK, "%s: %s", name, e.msg);
        ck_assert_msg(!strcmp(got.text, want), "%s: '%s', expected '%s'", name, got.text, want);
        ck_assert_uint_eq(got.n, strlen(want));
    } else {
        ck_assert_msg(rc == E_INPUT || rc == E_UNSUPPORTED, "%s: %s '%s'", name, err_name(rc),
                      rc == OK ? got.text : e.msg);
        ck_assert_msg(e.msg[0] && !strchr(e.msg, '\n'), "%s: '%s'", name, e.msg);
    }
    jinja_text_free(&got);
}

/* ---- against Jinja2 ---- */

START_TEST(jinja_language)
{
    cJSON *all;
    const cJSON *o;
    int n = 0;
    err e;
    ck_assert_msg(json_load(&all, TMF_SOURCE_DIR "/tests/golden/jinja.json", 1 << 20, &e) == OK,
                  "%s", e.msg);
    cJSON_ArrayForEach(o, all)
    {
        const char *t = get(o, "template")->valuestring;
        const cJSON *text = get(o, "text");
        expect(t, t, strlen(t), get(o, "context"), text ? text->valuestring : NULL);
        n++;
    }
    ck_assert_int_ge(n, 130);
    cJSON_Delete(all);
}
END_TEST

typedef struct {
    int texts, errors;
} tally;

static void add(cJSON *o, const char *key, cJSON *v)
{
    if (cJSON_HasObjectItem(o, key))
        cJSON_Delete(v);
    else
        cJSON_AddItemToObject(o, key, v);
}

static err_code shared_row(void *ctx, const cJSON *o, int64_t line, err *e)
{
    tally *t = ctx;
    char path[4096], *text, name[300];
    size_t n;
    const cJSON *out = get(o, "output");
    cJSON *context = cJSON_Duplicate(get(o, "context"), true);
    snprintf(path, sizeof path, TEMPLATES "/%s", get(o, "template")->valuestring);
    TRY(file_read(&text, &n, path, 1 << 20, e));
    add(context, "bos_token", cJSON_CreateString("<s>"));
    add(context, "eos_token", cJSON_CreateString("</s>"));
    add(context, "unk_token", cJSON_CreateString("<unk>"));
    add(context, "add_generation_prompt", cJSON_CreateTrue());
    snprintf(name, sizeof name, "%s %s (line %d)", get(o, "template")->valuestring,
             get(o, "case")->valuestring, (int)line);
    expect(name, text, n, context, out ? out->valuestring : NULL);
    *(out ? &t->texts : &t->errors) += 1;
    cJSON_Delete(context);
    mem_free(text);
    return OK;
}

START_TEST(jinja_shared)
{
    tally t = {0};
    err e;
    if (!have(TEMPLATES "/golden-shared.jsonl.zst", "jinja_shared")) return;
    ck_assert_msg(corpus_rows(TEMPLATES "/golden-shared.jsonl.zst", shared_row, &t, NULL, &e) == OK,
                  "%s", e.msg);
    ck_assert_int_eq(t.texts + t.errors, 352);
    ck_assert_int_eq(t.errors, 7);
}
END_TEST

START_TEST(jinja_vectors)
{
    cJSON *all;
    const cJSON *o;
    int n = 0;
    err e;
    if (!have(TEMPLATES "/vectors-default.json", "jinja_vectors")) return;
    ck_assert_msg(json_load(&all, TEMPLATES "/vectors-default.json", 1 << 20, &e) == OK, "%s",
                  e.msg);
    cJSON_ArrayForEach(o, all)
    {
        const char *t = get(o, "chat_template")->valuestring;
        expect(o->string, t, strlen(t), get(o, "data"), get(o, "target")->valuestring);
        n++;
    }
    ck_assert_int_ge(n, 8);
    cJSON_Delete(all);
}
END_TEST

/* Written for another implementation; what Jinja2 itself gives is beside it. */
START_TEST(jinja_unit)
{
    cJSON *all;
    const cJSON *o;
    int n = 0;
    err e;
    if (!have(TEMPLATES "/jinja-unit-shared.json", "jinja_unit")) return;
    ck_assert_msg(json_load(&all, TEMPLATES "/jinja-unit-shared.json", 1 << 20, &e) == OK, "%s",
                  e.msg);
    cJSON_ArrayForEach(o, all)
    {
        const char *t = get(o, "template")->valuestring;
        const cJSON *want = get(o, "jinja2");
        expect(get(o, "name")->valuestring, t, strlen(t), get(o, "context"),
               cJSON_IsString(want) ? want->valuestring : NULL);
        n++;
    }
    ck_assert_int_ge(n, 80);
    cJSON_Delete(all);
}
END_TEST

static err_code listed_row(void *ctx, const cJSON *o, int64_t line, err *e)
{
    jinja *t;
    const char *text = o->child->valuestring;
    (void)line;
    TRY(jinja_open(&t, text, strlen(text), e));
    jinja_close(&t);
    ++*(int *)ctx;
    return OK;
}

START_TEST(jinja_listed)
{
    int n = 0;
    err e;
    if (!have(TEMPLATES "/templates.jsonl", "jinja_listed")) return;
    ck_assert_msg(corpus_rows(TEMPLATES "/templates.jsonl", listed_row, &n, NULL, &e) == OK, "%s",
                  e.msg);
    ck_assert_int_eq(n, 35);
}
END_TEST

/* ---- who wrote what ---- */

/* Bytes of the template as they are, those of the data in capitals. */
static const struct {
    const char *text, *want;
} marks[] = {
    {"a{{ x }}b", "aXYZb"},
    {"{{ 'p' + x + 'q' }}", "pXYZq"},
    {"{{ x[1:] ~ 'n' ~ x[0] }}", "YZnX"},
    {"{{ ('p' ~ x ~ 'q').replace('y', 'n') }}", "pXnZq"},
    {"{{ 'xyz'.replace('y', x) }}", "xXYZz"},
    {"{{ (' ' ~ x ~ ' ')|trim }}", "XYZ"},
    {"{{ ('k,' ~ x).split(',')|join('-') }}", "k-XYZ"},
    {"{{ x|upper }}{{ 'Q'|lower }}", "XYZq"},
    {"{{ {'k': x}|tojson }}", "{\"k\": \"XYZ\"}"},
    {"{{ '{}:{}'.format(x, 'v') }}{{ '%s-' % x }}", "XYZ:vXYZ-"},
    {"{% set y %}({{ x }}){% endset %}{{ y }}", "(XYZ)"},
    {"{% macro f(a) %}<{{ a }}>{% endmacro %}{{ f(x) }}{{ f('t') }}", "<XYZ><t>"},
    {"{% filter replace('y', 'm') %}y{{ x }}{% endfilter %}", "mXmZ"},
    {"{% for c in x %}{{ c }}.{% endfor %}", "X.Y.Z."},
    {"{{ x|list|join|reverse }}", "ZYX"},
    {"{{ (x ~ 't')|indent(first=true) }}", "    XYZt"},
    {"{{ [x, 't']|join(' ') }}", "XYZ t"},
    {"{{ m.k }}{% for k in m %}{{ k }}{% endfor %}", "VK"},
    {"{{ x.strip('x') ~ x.partition('y')[2] }}", "YZZ"},
};

START_TEST(jinja_marks)
{
    cJSON *context = cJSON_Parse("{\"x\":\"xyz\",\"m\":{\"k\":\"v\"}}");
    const char *text = marks[_i].text;
    err_code rc;
    err e;
    jinja_text t = jinja_with(text, strlen(text), context, 0, &rc, &e);
    ck_assert_msg(rc == OK, "%s: %s", text, e.msg);
    for (size_t i = 0; i < t.n; i++)
        if (t.mark[i] == JINJA_DATA && t.text[i] >= 'a' && t.text[i] <= 'z')
            t.text[i] = (char)(t.text[i] - 'a' + 'A');
        else if (t.mark[i] == JINJA_OWN && t.text[i] >= 'A' && t.text[i] <= 'Z')
            t.text[i] = '?';
    /* k of the literal is the template's, quotes and braces around it count as data */
    ck_assert_str_eq(t.text, marks[_i].want);
    jinja_text_free(&t);
    cJSON_Delete(context);
}
END_TEST

/* ---- limits and refusals ---- */

static const struct {
    const char *text;
    err_code code;
} hard[] = {
    {"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", E_LIMIT},
    {"{% set ns = namespace(s='x') %}{% for a in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor "
     "%}",
     E_LIMIT},
    {"{{ 'x' * 999999999 }}", E_LIMIT},
    {"{{ 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx' * 9999999 }}", E_LIMIT},
    {"{{ [0] * 99999999 }}", E_LIMIT},
    {"{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", E_LIMIT},
    {"{% macro f(n) %}{{ f(n ~ n) }}{% endmacro %}{{ f('x') }}", E_LIMIT},
    {"{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", E_LIMIT},
    {"{{ range(100001) }}", E_INPUT},
    {"{{ 99999999999 * 99999999999 }}", E_INPUT},
    {"{{ 9 ** 99 }}", E_INPUT},
    {"{{ 'a'.ljust(99999999) }}", E_INPUT},
    {"{{ '%999999999d' % 1 }}", E_INPUT},
    {"{{ '{:999999999d}'.format(1) }}", E_INPUT},
    {"{% set l = [1] %}{% for i in range(99) %}{% set l = [l] %}{% endfor %}{{ l }}", OK},
    {"{% set ns = namespace(l=[1]) %}{% for i in range(999) %}{% set ns.l = [ns.l] %}{% endfor %}"
     "{{ ns.l|tojson }}",
     E_LIMIT},
    {"{% set ns = namespace(l=[1]) %}{% for i in range(999) %}{% set ns.l = [ns.l] %}{% endfor %}"
     "{{ ns.l }}{{ ns.l == [ns.l] }}",
     E_LIMIT},
};

START_TEST(jinja_limits)
{
    err_code rc;
    err e = {0};
    jinja_text t = jinja_with(hard[_i].text, strlen(hard[_i].text), NULL, 0, &rc, &e);
    ck_assert_msg(rc == hard[_i].code, "%s: %s %s", hard[_i].text, err_name(rc), e.msg);
    jinja_text_free(&t);
}
END_TEST

/* Nesting in the text itself: refused at some depth, never the end of the stack. */
START_TEST(jinja_deep)
{
    static const char *const open[] = {"(", "[", "{'a':", "-", "not ", "a[", "f(", "1 if ", "a.b."};
    static const char *const blocks[] = {"{% if 1 %}", "{% for x in y %}", "{% macro f() %}",
                                         "{% set x %}", "{% filter upper %}"};
    enum { TIMES = 30000 };
    char *s = malloc(TIMES * 20 + 100);
    jinja *t;
    err e;
    for (size_t k = 0; k < sizeof open / sizeof *open; k++) {
        char *p = s + sprintf(s, "{{ ");
        for (int i = 0; i < TIMES; i++) p = stpcpy(p, open[k]);
        ck_assert(jinja_open(&t, s, (size_t)(p - s), &e) != OK);
        ck_assert_ptr_null(t);
    }
    for (size_t k = 0; k < sizeof blocks / sizeof *blocks; k++) {
        char *p = s;
        for (int i = 0; i < TIMES; i++) p = stpcpy(p, blocks[k]);
        ck_assert(jinja_open(&t, s, (size_t)(p - s), &e) != OK);
    }
    char *p = s + sprintf(s, "{{ 1"); /* flat, but a deep tree */
    for (int i = 0; i < TIMES; i++) p = stpcpy(p, "+1");
    p = stpcpy(p, " }}");
    err_code rc;
    jinja_text text = jinja_with(s, (size_t)(p - s), NULL, 0, &rc, &e);
    ck_assert_int_eq(rc, E_LIMIT);
    jinja_text_free(&text);
    free(s);
}
END_TEST

START_TEST(jinja_refuses)
{
    static const char zero[] = "a\0b", broken[] = "\xff{{ 1 }}";
    jinja *t;
    err e;
    ck_assert(jinja_open(&t, zero, 3, &e) == E_INPUT);
    ck_assert(jinja_open(&t, broken, strlen(broken), &e) == E_INPUT);
    char *large = calloc(1, JINJA_MAX_TEMPLATE + 1);
    memset(large, 'x', JINJA_MAX_TEMPLATE + 1);
    ck_assert(jinja_open(&t, large, JINJA_MAX_TEMPLATE + 1, &e) == E_LIMIT);
    free(large);
    ck_assert(jinja_open(&t, "a\n\n{% if x %}\n{{ 1 + }}", 22, &e) == E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "line 4: "));
    ck_assert(jinja_open(&t, "{% include 'x' %}", 17, &e) == E_UNSUPPORTED);
    err_code rc;
    const char *raises = "\n{{ raise_exception('Roles must alternate') }}";
    jinja_text text = jinja_with(raises, strlen(raises), NULL, 0, &rc, &e);
    ck_assert_int_eq(rc, E_INPUT);
    ck_assert_str_eq(e.msg, "Roles must alternate");
    const char *fails = "\n\n{{ 1 + 'a' }}";
    text = jinja_with(fails, strlen(fails), NULL, 0, &rc, &e);
    ck_assert_int_eq(rc, E_INPUT);
    ck_assert_ptr_nonnull(strstr(e.msg, "line 3: unsupported operand"));
    const char *day = "{{ strftime_now is defined }}";
    text = jinja_with(day, strlen(day), NULL, 0, &rc, &e);
    ck_assert_str_eq(text.text, "False");
    jinja_text_free(&text);
}
END_TEST

/* Every allocation fails once: refused, nothing lost. */
START_TEST(jinja_memory)
{
    static const char text[] =
        "{% macro f(a) %}{{ a|tojson }}{% endmacro %}{% for m in l %}{{ f(m) "
        "}}{% endfor %}{{ 'x' * 40000 }}";
    cJSON *context = cJSON_Parse("{\"l\":[{\"a\":[1,2,\"b\"]},\"c\",null]}");
    long n = 0;
    for (bool failed = true; failed; n++) {
        err_code rc;
        err e;
        alloc_fail_at(n + 1);
        jinja_text t = jinja_with(text, strlen(text), context, 0, &rc, &e);
        failed = alloc_failed();
        alloc_fail_at(0);
        ck_assert_int_eq(rc, failed ? E_NOMEM : OK);
        jinja_text_free(&t);
    }
    ck_assert_int_ge(n, 6);
    cJSON_Delete(context);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("jinja");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 60);
    tcase_add_test(c, jinja_language);
    tcase_add_test(c, jinja_shared);
    tcase_add_test(c, jinja_vectors);
    tcase_add_test(c, jinja_unit);
    tcase_add_test(c, jinja_listed);
    tcase_add_loop_test(c, jinja_marks, 0, (int)(sizeof marks / sizeof *marks));
    tcase_add_loop_test(c, jinja_limits, 0, (int)(sizeof hard / sizeof *hard));
    tcase_add_test(c, jinja_deep);
    tcase_add_test(c, jinja_refuses);
    tcase_add_test(c, jinja_memory);
    suite_add_tcase(s, c);
    return suite_run(s);
}
