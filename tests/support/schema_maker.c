#include "support/schema_maker.h"

#include <check.h>
#include <stdio.h>
#include <string.h>

#include "support/grammar_walk.h"

static int roll(schema_maker *m, int n) { return (int)(walk_random(&m->seed) % (uint64_t)n); }

static void put(schema_maker *m, const char *s)
{
    const size_t n = strlen(s);
    ck_assert_uint_lt(m->n + n, sizeof m->p);
    memcpy(m->p + m->n, s, n + 1);
    m->n += n;
}

static void putf(schema_maker *m, const char *fmt, int a)
{
    char s[200];
    snprintf(s, sizeof s, fmt, a);
    put(m, s);
}

static void make(schema_maker *m, int depth);

static void make_limits(schema_maker *m, const char *low, const char *high, int from, int to)
{
    const int a = from + roll(m, to - from), b = a + roll(m, to - a + 3);
    if (roll(m, 2)) putf(m, low, a);
    if (roll(m, 2)) putf(m, high, b);
}

static void make_object(schema_maker *m, int depth)
{
    static const char *const names[] = {"a", "ab", "abc", "b c", "\xc3\xa9", "x\\\"y", "", "id"};
    const int n = roll(m, 5), from = roll(m, 4);
    put(m, "{\"type\":\"object\",\"properties\":{");
    for (int i = 0; i < n; i++) {
        put(m, i ? ",\"" : "\"");
        put(m, names[from + i]);
        put(m, "\":");
        make(m, depth - 1);
    }
    put(m, "},\"required\":[");
    for (int i = 0, any = 0; i < n; i++) {
        if (roll(m, 2)) continue;
        put(m, any++ ? ",\"" : "\"");
        put(m, names[from + i]);
        put(m, "\"");
    }
    put(m, "]");
    const int more = roll(m, 4);
    if (more == 0) put(m, ",\"additionalProperties\":false");
    if (more == 1) put(m, ",\"additionalProperties\":true");
    if (more == 2) {
        put(m, ",\"additionalProperties\":");
        make(m, depth - 1);
    }
    put(m, "}");
}

static void make_array(schema_maker *m, int depth)
{
    put(m, "{\"type\":\"array\"");
    if (roll(m, 3) == 0) {
        put(m, ",\"prefixItems\":[");
        make(m, depth - 1);
        put(m, ",");
        make(m, depth - 1);
        put(m, "]");
    }
    if (roll(m, 4)) {
        put(m, ",\"items\":");
        make(m, depth - 1);
    }
    make_limits(m, ",\"minItems\":%d", ",\"maxItems\":%d", 0, 4);
    put(m, "}");
}

static void make_any_of(schema_maker *m, int depth)
{
    put(m, roll(m, 2) ? "{\"anyOf\":[" : "{\"title\":\"t\",\"anyOf\":[");
    m->any++;
    for (int i = 0, n = 1 + roll(m, 3); i < n; i++) {
        if (i) put(m, ",");
        make(m, depth - 1);
    }
    m->any--;
    put(m, "]}");
}

static void make_leaf(schema_maker *m)
{
    static const char *const leaves[] = {"{\"type\":\"null\"}",
                                         "{\"type\":\"boolean\"}",
                                         "{\"enum\":[1,\"a\\n\",null,[1]]}",
                                         "{\"const\":{\"a\":1}}",
                                         "{\"type\":[\"string\",\"null\"]}",
                                         "true",
                                         "{}",
                                         "{\"type\":\"integer\",\"nullable\":true}"};
    const int k = roll(m, 14);
    if (k < 8) {
        put(m, leaves[k]);
    } else if (k < 10) {
        put(m, "{\"type\":\"string\"");
        make_limits(m, ",\"minLength\":%d", ",\"maxLength\":%d", 0, 12);
        put(m, "}");
    } else if (k < 12) {
        put(m, "{\"type\":\"integer\"");
        make_limits(m, ",\"minimum\":%d", ",\"maximum\":%d", -1500, 1500);
        put(m, "}");
    } else {
        put(m, "{\"type\":\"number\"");
        make_limits(m, roll(m, 2) ? ",\"minimum\":%d" : ",\"exclusiveMinimum\":%d",
                    roll(m, 2) ? ",\"maximum\":%d" : ",\"exclusiveMaximum\":%d", -20, 20);
        put(m, "}");
    }
}

static void make(schema_maker *m, int depth)
{
    const int k = roll(m, 10);
    if (depth <= 0 || k < 3)
        make_leaf(m);
    else if (k < 6)
        make_object(m, depth);
    else if (k < 8)
        make_array(m, depth);
    else if (k == 8 || !m->defs || m->any)
        make_any_of(m, depth);
    else
        put(m, "{\"$ref\":\"#/$defs/d\"}");
}

void schema_make(schema_maker *m)
{
    m->n = 0;
    m->defs = roll(m, 3) == 0;
    if (!m->defs) {
        make(m, 3);
        return;
    }
    put(m, "{\"$defs\":{\"d\":");
    make_object(m, 2);
    put(m, "},\"type\":\"array\",\"maxItems\":3,\"items\":");
    make(m, 2);
    put(m, "}");
}
