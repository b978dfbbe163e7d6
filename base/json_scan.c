/* A strict JSON checker in one pass, without recursion. Keys are remembered as 128-bit hashes
 * seeded with the number of their object, in one table: finding a duplicate costs the same with a
 * million keys. */
#include "base/json_scan.h"

#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/json.h"
#include "base/mem.h"

typedef struct {
    const unsigned char *s;
    size_t n, at;
    const char *what;
    err *e;
    int depth;
    bool object[JSON_MAX_DEPTH];     /* else an array */
    uint64_t number[JSON_MAX_DEPTH]; /* of the object at this depth */
    uint64_t objects;                /* seen so far */
    XXH128_hash_t *keys;             /* open addressing; {0,0} is empty */
    size_t n_keys, cap_keys;         /* cap is a power of two */
    unsigned char *key;              /* the key being read, unescaped */
    size_t key_len, key_cap;
} scan;

static err_code scan_fail(scan *c, const char *problem)
{
    size_t line = 1;
    for (size_t i = 0; i < c->at && i < c->n; i++) line += c->s[i] == '\n';
    return err_set(c->e, E_INPUT, "%s: byte %zu, line %zu: %s", c->what, c->at, line, problem);
}

/* Length of the UTF-8 sequence at s (1..4), 0 when it is not one. No overlong forms, no
 * surrogates. */
static size_t utf8_length(const unsigned char *s, size_t n)
{
    const unsigned char a = s[0];
    if (a < 0x80) return 1;
    const size_t len = a >= 0xc2 && a < 0xe0   ? 2
                       : a >= 0xe0 && a < 0xf0 ? 3
                       : a >= 0xf0 && a < 0xf5 ? 4
                                               : 0;
    if (len == 0 || len > n) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if ((a == 0xe0 && s[1] < 0xa0) || (a == 0xed && s[1] >= 0xa0)) return 0;
    if ((a == 0xf0 && s[1] < 0x90) || (a == 0xf4 && s[1] >= 0x90)) return 0;
    return len;
}

bool json_utf8_valid(const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        const size_t len = utf8_length((const unsigned char *)s + i, n - i);
        if (len == 0) return false;
        i += len;
    }
    return true;
}

static void scan_space(scan *c)
{
    while (c->at < c->n && (c->s[c->at] == ' ' || c->s[c->at] == '\n' || c->s[c->at] == '\r' ||
                            c->s[c->at] == '\t'))
        c->at++;
}

static err_code scan_key_put(scan *c, const unsigned char *bytes, size_t n)
{
    if (c->key_cap - c->key_len < n) {
        void *p;
        const size_t cap = (c->key_cap + n) * 2 + 64;
        TRY(mem_alloc(&p, cap, 1, c->what, c->e));
        if (c->key_len) memcpy(p, c->key, c->key_len);
        mem_free(c->key);
        c->key = p;
        c->key_cap = cap;
    }
    memcpy(c->key + c->key_len, bytes, n);
    c->key_len += n;
    return OK;
}

static bool scan_hex4(const scan *c, size_t at, unsigned *out)
{
    unsigned v = 0;
    if (c->n - at < 4) return false;
    for (size_t i = 0; i < 4; i++) {
        const unsigned char ch = c->s[at + i];
        if (ch >= '0' && ch <= '9')
            v = v << 4 | (unsigned)(ch - '0');
        else if ((ch | 32) >= 'a' && (ch | 32) <= 'f')
            v = v << 4 | (unsigned)((ch | 32) - 'a' + 10);
        else
            return false;
    }
    *out = v;
    return true;
}

static size_t utf8_put(unsigned char *out, unsigned v)
{
    if (v < 0x80) return out[0] = (unsigned char)v, (size_t)1;
    const int extra = v < 0x800 ? 1 : v < 0x10000 ? 2 : 3;
    static const unsigned char lead[] = {0, 0xc0, 0xe0, 0xf0};
    out[0] = (unsigned char)(lead[extra] | v >> (6 * extra));
    for (int i = 1; i <= extra; i++)
        out[i] = (unsigned char)(0x80 | (v >> (6 * (extra - i)) & 0x3f));
    return (size_t)extra + 1;
}

/* At the 'u' of a \u escape; leaves `at` behind it. */
static err_code scan_unicode(scan *c, bool keep)
{
    unsigned v, low;
    unsigned char bytes[4];
    if (!scan_hex4(c, c->at + 1, &v)) return scan_fail(c, "bad \\u escape");
    if (v == 0) return scan_fail(c, "U+0000 in a string");
    c->at += 5;
    if (v >= 0xd800 && v < 0xe000) {
        const bool pair = v < 0xdc00 && c->n - c->at >= 6 && c->s[c->at] == '\\' &&
                          c->s[c->at + 1] == 'u' && scan_hex4(c, c->at + 2, &low) &&
                          low >= 0xdc00 && low < 0xe000;
        if (!pair) return scan_fail(c, "lone surrogate in a string");
        v = 0x10000 + ((v - 0xd800) << 10 | (low - 0xdc00));
        c->at += 6;
    }
    return keep ? scan_key_put(c, bytes, utf8_put(bytes, v)) : OK;
}

static err_code scan_escape(scan *c, bool keep)
{
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    c->at++; /* the backslash */
    if (c->at >= c->n) return scan_fail(c, "the text ends inside a string");
    if (c->s[c->at] == 'u') return scan_unicode(c, keep);
    const char *p = c->s[c->at] ? strchr(from, c->s[c->at]) : NULL;
    if (!p) return scan_fail(c, "bad escape in a string");
    c->at++;
    return keep ? scan_key_put(c, (const unsigned char *)&to[p - from], 1) : OK;
}

/* Bytes from `at` that a string may hold as they are, without looking further. */
static size_t scan_plain(const scan *c)
{
    size_t at = c->at;
    while (at < c->n) {
        const unsigned char ch = c->s[at];
        if (ch < 0x20 || ch >= 0x80 || ch == '"' || ch == '\\') break;
        at++;
    }
    return at - c->at;
}

/* At the opening quote. With `keep` the unescaped bytes are left in c->key. */
static err_code scan_string(scan *c, bool keep)
{
    c->key_len = 0;
    c->at++;
    for (;;) {
        size_t len = scan_plain(c);
        if (len == 0) {
            if (c->at >= c->n) return scan_fail(c, "the text ends inside a string");
            const unsigned char ch = c->s[c->at];
            if (ch == '"') break;
            if (ch < 0x20) return scan_fail(c, "control character in a string");
            if (ch == '\\') {
                TRY(scan_escape(c, keep));
                continue;
            }
            len = utf8_length(c->s + c->at, c->n - c->at);
            if (len == 0) return scan_fail(c, "not valid UTF-8");
        }
        if (keep) TRY(scan_key_put(c, c->s + c->at, len));
        c->at += len;
    }
    c->at++;
    return OK;
}

static size_t scan_digits(const scan *c, size_t at)
{
    const size_t from = at;
    while (at < c->n && c->s[at] >= '0' && c->s[at] <= '9') at++;
    return at - from;
}

static err_code scan_number(scan *c)
{
    char text[JSON_MAX_NUMBER + 1];
    size_t at = c->at, digits;
    if (c->s[at] == '-') at++;
    digits = scan_digits(c, at);
    if (digits == 0 || (digits > 1 && c->s[at] == '0')) return scan_fail(c, "bad number");
    at += digits;
    if (at < c->n && c->s[at] == '.') {
        digits = scan_digits(c, at + 1);
        if (digits == 0) return scan_fail(c, "bad number");
        at += 1 + digits;
    }
    const bool exponent = at < c->n && (c->s[at] | 32) == 'e';
    if (exponent) {
        at++;
        if (at < c->n && (c->s[at] == '+' || c->s[at] == '-')) at++;
        digits = scan_digits(c, at);
        if (digits == 0) return scan_fail(c, "bad number");
        at += digits;
    }
    const size_t len = at - c->at;
    if (len > JSON_MAX_NUMBER) return scan_fail(c, "a number of more than 63 characters");
    if (exponent) { /* 63 digits alone cannot leave the range */
        memcpy(text, c->s + c->at, len);
        text[len] = '\0';
        if (!isfinite(strtod(text, NULL)))
            return scan_fail(c, "a number beyond the range of a double");
    }
    c->at = at;
    return OK;
}

/* Inserts without checking room; true when the key was there already. */
static bool scan_key_insert(XXH128_hash_t *keys, size_t cap, XXH128_hash_t h)
{
    if (h.low64 == 0 && h.high64 == 0) h.low64 = 1;
    size_t i = (size_t)h.low64 & (cap - 1);
    while (keys[i].low64 || keys[i].high64) {
        if (keys[i].low64 == h.low64 && keys[i].high64 == h.high64) return true;
        i = (i + 1) & (cap - 1);
    }
    keys[i] = h;
    return false;
}

static err_code scan_key(scan *c)
{
    const size_t start = c->at;
    if (c->at >= c->n || c->s[c->at] != '"') return scan_fail(c, "expected a key in quotes");
    TRY(scan_string(c, true));
    if (c->n_keys * 2 >= c->cap_keys) {
        void *p;
        const size_t cap = c->cap_keys ? c->cap_keys * 2 : 64;
        TRY(mem_alloc(&p, cap, sizeof *c->keys, c->what, c->e));
        for (size_t i = 0; i < c->cap_keys; i++)
            if (c->keys[i].low64 || c->keys[i].high64) (void)scan_key_insert(p, cap, c->keys[i]);
        mem_free(c->keys);
        c->keys = p;
        c->cap_keys = cap;
    }
    const XXH128_hash_t h = XXH3_128bits_withSeed(c->key, c->key_len, c->number[c->depth - 1]);
    if (scan_key_insert(c->keys, c->cap_keys, h)) {
        char problem[128];
        (void)snprintf(problem, sizeof problem, "duplicate key '%.*s'",
                       (int)(c->key_len < 64 ? c->key_len : 64), (const char *)c->key);
        c->at = start;
        return scan_fail(c, problem);
    }
    c->n_keys++;
    scan_space(c);
    if (c->at >= c->n || c->s[c->at] != ':') return scan_fail(c, "expected ':' behind a key");
    c->at++;
    return OK;
}

static err_code scan_word(scan *c, const char *word)
{
    const size_t len = strlen(word);
    if (c->n - c->at < len || memcmp(c->s + c->at, word, len) != 0)
        return scan_fail(c, "expected a value");
    c->at += len;
    return OK;
}

/* At a value: a scalar is consumed; a container is entered. *open tells which. */
static err_code scan_value(scan *c, bool *open)
{
    scan_space(c);
    *open = false;
    if (c->at >= c->n) return scan_fail(c, "expected a value, the text ends");
    switch (c->s[c->at]) {
    case '"': return scan_string(c, false);
    case 't': return scan_word(c, "true");
    case 'f': return scan_word(c, "false");
    case 'n': return scan_word(c, "null");
    case '-':
    case '0':
    case '1':
    case '2':
    case '3':
    case '4':
    case '5':
    case '6':
    case '7':
    case '8':
    case '9': return scan_number(c);
    case '{':
    case '[':
        if (c->depth == JSON_MAX_DEPTH) return scan_fail(c, "nested deeper than 64 levels");
        c->object[c->depth] = c->s[c->at] == '{';
        c->number[c->depth] = ++c->objects;
        c->depth++;
        c->at++;
        *open = true;
        return OK;
    default: return scan_fail(c, "expected a value");
    }
}

/* Right behind an opening bracket: closes an empty container or reads up to its first value. */
static err_code scan_enter(scan *c, bool *closed)
{
    const bool object = c->object[c->depth - 1];
    scan_space(c);
    *closed = c->at < c->n && c->s[c->at] == (object ? '}' : ']');
    if (*closed) {
        c->at++;
        c->depth--;
        return OK;
    }
    return object ? scan_key(c) : OK;
}

/* Behind a complete value: closes containers until one goes on with a comma, or the text's value is
 * done. */
static err_code scan_leave(scan *c)
{
    while (c->depth) {
        const bool object = c->object[c->depth - 1];
        scan_space(c);
        if (c->at >= c->n) return scan_fail(c, object ? "'}' is missing" : "']' is missing");
        if (c->s[c->at] == ',') {
            c->at++;
            scan_space(c);
            return object ? scan_key(c) : OK;
        }
        if (c->s[c->at] != (object ? '}' : ']'))
            return scan_fail(c, object ? "expected ',' or '}'" : "expected ',' or ']'");
        c->at++;
        c->depth--;
    }
    return OK;
}

static err_code scan_text(scan *c)
{
    do {
        bool open, closed = false;
        TRY(scan_value(c, &open));
        if (open) {
            TRY(scan_enter(c, &closed));
            if (!closed) continue;
        }
        TRY(scan_leave(c));
    } while (c->depth);
    scan_space(c);
    if (c->at < c->n) return scan_fail(c, "more text behind the value");
    return OK;
}

err_code json_scan(const char *text, size_t n, const char *what, err *e)
{
    scan c = {.s = (const unsigned char *)text, .n = n, .what = what, .e = e};
    const err_code rc = scan_text(&c);
    mem_free(c.keys);
    mem_free(c.key);
    return rc;
}
