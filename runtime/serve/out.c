#include "runtime/serve/out.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"

#define OUT_MAX_BYTES ((size_t)1 << 30)

void out_free(out_buf *o)
{
    mem_free(o->s);
    memset(o, 0, sizeof *o);
}

void out_reset(out_buf *o)
{
    o->n = 0;
    o->failed = false;
}

/* Room for n more bytes; false: failed. */
static bool out_room(out_buf *o, size_t n)
{
    err ignored;
    void *p;
    if (o->failed) return false;
    if (n <= o->cap - o->n) return true;
    o->failed = true;
    if (n > OUT_MAX_BYTES || o->n + n > OUT_MAX_BYTES) return false;
    const size_t cap = 2 * (o->n + n) < 512 ? 512 : 2 * (o->n + n);
    if (mem_alloc(&p, cap, 1, "text", &ignored) != OK) return false;
    if (o->n) memcpy(p, o->s, o->n);
    mem_free(o->s);
    o->s = p;
    o->cap = cap;
    o->failed = false;
    return true;
}

void out_bytes(out_buf *o, const char *s, size_t n)
{
    if (n == 0 || !out_room(o, n)) return;
    memcpy(o->s + o->n, s, n);
    o->n += n;
}

void out_text(out_buf *o, const char *s) { out_bytes(o, s, strlen(s)); }

void out_printf(out_buf *o, const char *fmt, ...)
{
    va_list args;
    char text[1024];
    va_start(args, fmt);
    const int n = vsnprintf(text, sizeof text, fmt, args);
    va_end(args);
    if (n < 0 || (size_t)n >= sizeof text)
        o->failed = true;
    else
        out_bytes(o, text, (size_t)n);
}

/* Bytes of the character at s (UTF-8, no surrogates, nothing overlong); 0: not one. */
static size_t char_bytes(const unsigned char *s, size_t n)
{
    const unsigned char c = s[0];
    if (c < 0x80) return 1;
    const size_t len = c >= 0xf0 ? 4 : c >= 0xe0 ? 3 : 2;
    if (c < 0xc2 || c > 0xf4 || n < len) return 0;
    for (size_t i = 1; i < len; i++)
        if ((s[i] & 0xc0) != 0x80) return 0;
    if (c == 0xe0 && s[1] < 0xa0) return 0;
    if (c == 0xed && s[1] > 0x9f) return 0;
    if (c == 0xf0 && s[1] < 0x90) return 0;
    if (c == 0xf4 && s[1] > 0x8f) return 0;
    return len;
}

static void escape_one(out_buf *o, unsigned char c)
{
    static const char hex[] = "0123456789abcdef", from[] = "\"\\\b\f\n\r\t", to[] = "\"\\bfnrt";
    const char *at = c ? strchr(from, c) : NULL;
    if (at) {
        const char two[2] = {'\\', to[at - from]};
        out_bytes(o, two, 2);
    } else {
        const char six[6] = {'\\', 'u', '0', '0', hex[c >> 4], hex[c & 15]};
        out_bytes(o, six, 6);
    }
}

void out_escaped(out_buf *o, const char *s, size_t n)
{
    const unsigned char *p = (const unsigned char *)s;
    size_t from = 0, i = 0;
    while (i < n) {
        const unsigned char c = p[i];
        const bool plain = c >= 0x20 && c != '"' && c != '\\' && c != 0x7f;
        const size_t len = plain ? char_bytes(p + i, n - i) : 0;
        if (len) {
            i += len;
            continue;
        }
        out_bytes(o, s + from, i - from);
        if (plain)
            out_bytes(o, "\xef\xbf\xbd", 3);
        else
            escape_one(o, c);
        from = ++i;
    }
    out_bytes(o, s + from, n - from);
}

void out_string(out_buf *o, const char *s, size_t n)
{
    out_bytes(o, "\"", 1);
    out_escaped(o, s, n);
    out_bytes(o, "\"", 1);
}

void out_int(out_buf *o, int64_t v)
{
    char digits[24], *p = digits + sizeof digits;
    uint64_t u = v < 0 ? 0 - (uint64_t)v : (uint64_t)v;
    do *--p = (char)('0' + u % 10);
    while (u /= 10);
    if (v < 0) *--p = '-';
    out_bytes(o, p, (size_t)(digits + sizeof digits - p));
}

void out_number(out_buf *o, double v)
{
    char text[40];
    if (!isfinite(v)) {
        out_text(o, "null");
        return;
    }
    for (int digits = 15; digits <= 17; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, v);
        if (strtod(text, NULL) == v) break;
    }
    out_text(o, text);
}

void out_float(out_buf *o, float v)
{
    char text[40];
    if (!isfinite(v)) {
        out_text(o, "null");
        return;
    }
    for (int digits = 6; digits <= 9; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v) break;
    }
    out_text(o, text);
}
