/* JSON as nets: strings, numbers within bounds, any value; white space is bounded everywhere. */
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_internal.h"

enum { MAX_INDENT = 32, MAX_DIGITS = 15, MAX_FRACTION = 15, BOUND_FRACTION = 6 };

void grammar_json_init(grammar_json *j, grammar_build *b)
{
    j->b = b;
    j->compact = false;
    for (int i = 0; i < JSON_RULES; i++) j->rule[i] = -1;
}

/* ---- strings ---- */

static void hex_digit(grammar_build *b, int32_t from, int32_t to)
{
    grammar_bytes(b, from, '0', '9', to);
    grammar_bytes(b, from, 'A', 'F', to);
    grammar_bytes(b, from, 'a', 'f', to);
}

static int32_t hex_digits(grammar_build *b, int32_t from, int n, int32_t to)
{
    for (int i = 0; i < n; i++) {
        const int32_t next = i + 1 == n ? to : grammar_state(b);
        hex_digit(b, from, next);
        from = next;
    }
    return from;
}

/* One of two letters' cases. */
static int32_t hex_d(grammar_build *b, int32_t from)
{
    const int32_t to = grammar_byte_to(b, from, 'd');
    grammar_bytes(b, from, 'D', 'D', to);
    return to;
}

/* What follows \u: any code point but U+0000, beyond U+FFFF as two. */
static void unicode_escape(grammar_build *b, int32_t from, int32_t to)
{
    const int32_t three = grammar_state(b), two = grammar_state(b), d = hex_d(b, from);
    grammar_bytes(b, from, '1', '9', three); /* X... but 0... and d... */
    grammar_bytes(b, from, 'A', 'C', three);
    grammar_bytes(b, from, 'E', 'F', three);
    grammar_bytes(b, from, 'a', 'c', three);
    grammar_bytes(b, from, 'e', 'f', three);
    hex_digit(b, three, two);
    (void)hex_digits(b, two, 2, to);
    grammar_bytes(b, d, '0', '7', two);
    int32_t zero = grammar_byte_to(b, from, '0'); /* 0..., with a digit that is not 0 behind */
    for (int left = 2; left >= 0; left--) {
        const int32_t next = left == 2 ? two : left == 1 ? grammar_state(b) : to;
        grammar_bytes(b, zero, '1', '9', next);
        grammar_bytes(b, zero, 'A', 'F', next);
        grammar_bytes(b, zero, 'a', 'f', next);
        if (left == 1) hex_digit(b, next, to);
        if (left) zero = grammar_byte_to(b, zero, '0');
    }
    const int32_t high = grammar_state(b), back = grammar_state(b), low = grammar_state(b);
    grammar_bytes(b, d, '8', '9', high);
    grammar_bytes(b, d, 'A', 'B', high);
    grammar_bytes(b, d, 'a', 'b', high);
    (void)hex_digits(b, high, 2, back);
    const int32_t d2 = hex_d(b, grammar_text(b, back, "\\u", 2));
    grammar_bytes(b, d2, 'C', 'F', low);
    grammar_bytes(b, d2, 'c', 'f', low);
    (void)hex_digits(b, low, 2, to);
}

/* Raw ones; what must be escaped is written in its short form, or as \u00XX. */
static void add_escape(grammar_build *b, int32_t from, uint32_t c, int32_t to)
{
    static const char codes[] = "\"\\\b\f\n\r\t", letters[] = "\"\\bfnrt";
    const char *at = strchr(codes, (int)c);
    if (at && c) {
        grammar_bytes(b, from, letters[at - codes], letters[at - codes], to);
        return;
    }
    static const char digits[] = "0123456789abcdef";
    const char text[] = {'u', '0', '0', digits[c >> 4], digits[c & 15]};
    grammar_eps(b, grammar_text(b, from, text, sizeof text), to);
}

void grammar_json_codes(grammar_build *b, int32_t from, const code_range *r, int n, int32_t to)
{
    static const uint32_t raw[][2] = {{0x20, 0x21}, {0x23, 0x5b}, {0x5d, 0x10ffff}};
    int32_t back = -1;
    for (int i = 0; i < n; i++) {
        for (int k = 0; k < 3; k++)
            grammar_codes(b, from, r[i].lo > raw[k][0] ? r[i].lo : raw[k][0],
                          r[i].hi < raw[k][1] ? r[i].hi : raw[k][1], to);
        for (uint32_t c = 1; c <= 0x5c; c++) {
            if (c < r[i].lo || c > r[i].hi || (c >= 0x20 && c != '"' && c != '\\')) continue;
            if (back < 0) back = grammar_byte_to(b, from, '\\');
            add_escape(b, back, c, to);
        }
    }
}

static void any_char(grammar_build *b, int32_t from, int32_t to)
{
    static const code_range all[] = {{0x20, 0x21}, {0x23, 0x5b}, {0x5d, 0x10ffff}};
    grammar_json_codes(b, from, all, 3, to);
    const int32_t back = grammar_byte_to(b, from, '\\');
    for (const char *p = "\"\\/bfnrt"; *p; p++) grammar_bytes(b, back, *p, *p, to);
    unicode_escape(b, grammar_byte_to(b, back, 'u'), to);
}

static void string_rule(grammar_build *b, grammar_rule r)
{
    const int32_t loop = grammar_byte_to(b, r.start, '"');
    any_char(b, loop, loop);
    grammar_bytes(b, loop, '"', '"', r.end);
}

/* ---- numbers ---- */

/* Decimal strings of one length between two of them. */
static void decimal_range(grammar_build *b, int32_t from, const char *lo, const char *hi, int n,
                          int32_t to)
{
    if (n == 1) {
        grammar_bytes(b, from, lo[0], hi[0], to);
        return;
    }
    if (lo[0] == hi[0]) {
        decimal_range(b, grammar_byte_to(b, from, lo[0]), lo + 1, hi + 1, n - 1, to);
        return;
    }
    static const char least[] = "0000000000000000000", most[] = "9999999999999999999";
    int a = lo[0], z = hi[0];
    if (memcmp(lo + 1, least, (size_t)n - 1) != 0)
        decimal_range(b, grammar_byte_to(b, from, a++), lo + 1, most, n - 1, to);
    if (memcmp(hi + 1, most, (size_t)n - 1) != 0)
        decimal_range(b, grammar_byte_to(b, from, z--), least, hi + 1, n - 1, to);
    if (a > z) return;
    int32_t at = grammar_state(b);
    grammar_bytes(b, from, a, z, at);
    for (int i = 1; i < n; i++) {
        const int32_t next = i + 1 == n ? to : grammar_state(b);
        grammar_bytes(b, at, '0', '9', next);
        at = next;
    }
}

/* lo <= hi, both at least 0: without leading zeros. */
static void whole_range(grammar_build *b, int32_t from, int64_t lo, int64_t hi, int32_t to)
{
    char l[24], h[24];
    int64_t least = 0, most = 9;
    for (int n = 1; lo <= hi && least <= hi; n++) {
        const int64_t a = lo > least ? lo : least, z = hi < most ? hi : most;
        if (a <= z) {
            for (int i = n, k = 0; k < n; k++) {
                int64_t p = 1;
                for (int q = 1; q < i - k; q++) p *= 10;
                l[k] = (char)('0' + a / p % 10);
                h[k] = (char)('0' + z / p % 10);
            }
            decimal_range(b, from, l, h, n, to);
        }
        if (most == INT64_MAX) break;
        least = most + 1;
        most = n < 18 ? most * 10 + 9 : INT64_MAX;
    }
}

#define UNBOUNDED 999999999999999 /* MAX_DIGITS nines: written and read back without loss */

void grammar_json_integer(grammar_build *b, int32_t from, const int64_t *lo, const int64_t *hi,
                          int32_t to)
{
    /* a bound beyond the usual digits widens the other side's default */
    int64_t least = lo ? *lo : -UNBOUNDED, most = hi ? *hi : UNBOUNDED;
    if (!lo && most < least) least = most;
    if (!hi && least > most) most = least;
    if (most >= 0 && most >= least) whole_range(b, from, least > 0 ? least : 0, most, to);
    if (least < 0) {
        const int64_t far = least == INT64_MIN ? INT64_MAX : -least;
        const int64_t near = most < 0 ? (most == INT64_MIN ? INT64_MAX : -most) : 1;
        whole_range(b, grammar_byte_to(b, from, '-'), near, far, to);
    }
}

/* "" or a point and digits; nonzero: the digits are not all 0. */
static void fraction(grammar_build *b, int32_t from, int max, bool nonzero, int32_t to)
{
    int32_t at = grammar_byte_to(b, from, '.');
    if (!nonzero) grammar_eps(b, from, to);
    for (int i = 0; i < max; i++) {
        const int32_t next = grammar_state(b);
        grammar_bytes(b, at, nonzero ? '1' : '0', '9', to);
        grammar_bytes(b, at, '0', '9', next);
        at = next;
    }
}

/* Sizes from lo to hi (hi < 0: no bound). */
static void size_range(grammar_build *b, int32_t from, int64_t lo, bool open_lo, int64_t hi,
                       bool open_hi, int32_t to)
{
    const int64_t most = hi < 0 ? UNBOUNDED + 1 : hi;
    const int32_t inner = grammar_state(b);
    if (lo == most) {
        if (!open_lo && !open_hi) whole_range(b, from, lo, lo, to);
        return;
    }
    if (open_lo) {
        const int32_t edge = grammar_state(b);
        whole_range(b, from, lo, lo, edge);
        fraction(b, edge, BOUND_FRACTION, true, to);
    }
    if (lo + open_lo <= most - 1) whole_range(b, from, lo + open_lo, most - 1, inner);
    fraction(b, inner, BOUND_FRACTION, false, to);
    if (hi >= 0 && !open_hi) whole_range(b, from, hi, hi, to);
}

void grammar_json_number(grammar_build *b, int32_t from, const number_bounds *r, int32_t to)
{
    if (!r->has_hi || r->hi > 0 || (r->hi == 0 && !r->open_hi)) {
        const bool above = r->has_lo && r->lo >= 0;
        if (!r->has_hi || !above || r->lo <= r->hi)
            size_range(b, from, above ? r->lo : 0, above && r->open_lo, r->has_hi ? r->hi : -1,
                       r->open_hi, to);
    }
    if (!r->has_lo || r->lo < 0) {
        const bool below = r->has_hi && r->hi <= 0;
        if (!r->has_lo || !below || r->lo <= r->hi)
            size_range(b, grammar_byte_to(b, from, '-'), below ? -r->hi : 0, below && r->open_hi,
                       r->has_lo ? -r->lo : -1, r->open_lo, to);
    }
}

static void number_rule(grammar_build *b, grammar_rule r)
{
    const int32_t whole = grammar_state(b), point = grammar_state(b), sign = grammar_state(b);
    const int32_t minus = grammar_byte_to(b, r.start, '-');
    whole_range(b, r.start, 0, UNBOUNDED, whole);
    whole_range(b, minus, 0, UNBOUNDED, whole);
    fraction(b, whole, MAX_FRACTION, false, point);
    grammar_eps(b, point, r.end);
    const int32_t exp = grammar_byte_to(b, point, 'e'), digit = grammar_state(b);
    grammar_bytes(b, point, 'E', 'E', exp);
    grammar_bytes(b, exp, '+', '+', sign);
    grammar_bytes(b, exp, '-', '-', sign);
    grammar_eps(b, exp, sign);
    grammar_bytes(b, sign, '0', '9', digit);
    grammar_bytes(b, digit, '0', '9', r.end);
    grammar_eps(b, digit, r.end);
}

/* ---- values ---- */

static void ws_rule(grammar_build *b, grammar_rule r, bool compact)
{
    grammar_eps(b, r.start, r.end);
    grammar_bytes(b, r.start, ' ', ' ', r.end);
    if (compact) return;
    int32_t line = grammar_byte_to(b, r.start, '\n'), tab = line;
    for (int i = 0; i < MAX_INDENT; i++) {
        grammar_eps(b, line, r.end);
        line = grammar_byte_to(b, line, ' ');
    }
    grammar_eps(b, line, r.end);
    for (int i = 0; i < MAX_INDENT / 4; i++) {
        tab = grammar_byte_to(b, tab, '\t');
        grammar_eps(b, tab, r.end);
    }
}

/* An object's or array's inside: members, of which there may be none. */
static void members(grammar_json *j, int32_t from, bool named, int close, int32_t to)
{
    grammar_build *b = j->b;
    const int32_t ws = grammar_json_rule(j, JSON_RULE_WS),
                  any = grammar_json_rule(j, JSON_RULE_ANY);
    const int32_t first = grammar_call_to(b, from, ws), next = grammar_state(b);
    const int32_t done = grammar_state(b);
    int32_t member = next;
    grammar_bytes(b, first, close, close, to);
    grammar_eps(b, first, next);
    if (named) {
        member = grammar_call_to(b, member, grammar_json_rule(j, JSON_RULE_STRING));
        member = grammar_call_to(b, grammar_byte_to(b, member, ':'), ws);
    }
    grammar_call(b, member, any, done);
    grammar_call(b, grammar_byte_to(b, done, ','), ws, next);
    grammar_bytes(b, grammar_call_to(b, done, ws), close, close, to);
}

static void any_rule(grammar_json *j, grammar_rule r)
{
    static const char *const words[] = {"true", "false", "null"};
    grammar_build *b = j->b;
    for (int i = 0; i < 3; i++)
        grammar_eps(b, grammar_text(b, r.start, words[i], strlen(words[i])), r.end);
    grammar_call(b, r.start, grammar_json_rule(j, JSON_RULE_STRING), r.end);
    grammar_call(b, r.start, grammar_json_rule(j, JSON_RULE_NUMBER), r.end);
    grammar_call(b, r.start, grammar_json_rule(j, JSON_RULE_OBJECT), r.end);
    members(j, grammar_byte_to(b, r.start, '['), false, ']', r.end);
}

int32_t grammar_json_rule(grammar_json *j, int which)
{
    grammar_build *b = j->b;
    if (j->rule[which] >= 0 || b->rc != OK) return j->rule[which] >= 0 ? j->rule[which] : 0;
    const int32_t rule = j->rule[which] = grammar_rule_new(b);
    if (b->rc != OK) return 0;
    const grammar_rule r = b->rule[rule];
    switch (which) {
    case JSON_RULE_WS: ws_rule(b, r, j->compact); break;
    case JSON_RULE_STRING: string_rule(b, r); break;
    case JSON_RULE_CHAR: any_char(b, r.start, r.end); break;
    case JSON_RULE_NUMBER: number_rule(b, r); break;
    case JSON_RULE_INTEGER: grammar_json_integer(b, r.start, NULL, NULL, r.end); break;
    case JSON_RULE_OBJECT: members(j, grammar_byte_to(b, r.start, '{'), true, '}', r.end); break;
    default: any_rule(j, r); break;
    }
    return rule;
}

int32_t grammar_json_value(grammar_build *b, int32_t from, const cJSON *v)
{
    char *text;
    if (b->rc == OK) b->rc = json_print(&text, v, false, b->e);
    if (b->rc != OK) return from;
    from = grammar_text(b, from, text, strlen(text));
    mem_free(text);
    return from;
}
