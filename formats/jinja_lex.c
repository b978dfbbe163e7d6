/* Template text to tokens, with Jinja's rules for white space around tags. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "formats/jinja_internal.h"
#include "formats/tokenizer_vocab.h"

typedef struct {
    jinja_arena *a;
    const char *s;
    size_t n, at;
    int32_t line;
    jtoken *t;
    int32_t n_t, cap;
    bool line_starts; /* what stands before ended a line */
    err *e;
} lexer;

static err_code fail(const lexer *x, const char *why)
{
    return err_set(x->e, E_INPUT, "line %d: %s", x->line, why);
}

static err_code push(lexer *x, jtoken t)
{
    if (x->n_t == x->cap) {
        jtoken *more;
        const int32_t cap = x->cap ? 2 * x->cap : 256;
        TRY(jinja_get(x->a, (void **)&more, (size_t)cap * sizeof *more, x->e));
        if (x->n_t) memcpy(more, x->t, (size_t)x->n_t * sizeof *more);
        x->t = more;
        x->cap = cap;
    }
    x->t[x->n_t++] = t;
    return OK;
}

static err_code push_text(lexer *x, jt_kind kind, const char *s, size_t n)
{
    char *copy;
    TRY(jinja_get(x->a, (void **)&copy, n + 1, x->e));
    memcpy(copy, s, n);
    return push(x, (jtoken){.kind = kind, .line = x->line, .str = copy, .len = n});
}

static void count_lines(lexer *x, size_t from, size_t to)
{
    for (size_t i = from; i < to; i++) x->line += x->s[i] == '\n';
}

static bool is_space(char c) { return c == ' ' || (c >= 9 && c <= 13); }

static bool name_char(char c, bool first)
{
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_' || (uint8_t)c >= 0x80 ||
           (!first && c >= '0' && c <= '9');
}

/* ---- inside of tags ---- */

/* The escapes of Python's strings; s is behind the backslash. Returns how much of it was read. */
static size_t unescape(const char *s, size_t n, char *out, size_t *n_out)
{
    static const char letters[] = "nrtbfva\\'\"", codes[] = "\n\r\t\b\f\v\a\\'\"";
    const char *at = *s ? strchr(letters, *s) : NULL;
    char hex[9] = "";
    if (at) {
        out[(*n_out)++] = codes[at - letters];
        return 1;
    }
    if (*s == '\n') return 1;
    const size_t digits = *s == 'x' ? 2 : *s == 'u' ? 4 : *s == 'U' ? 8 : 0;
    if (digits && n > digits) {
        char *end;
        memcpy(hex, s + 1, digits);
        const unsigned long c = strtoul(hex, &end, 16);
        if (*end == '\0' && c <= 0x10ffff && (c < 0xd800 || c > 0xdfff)) {
            *n_out += utf8_put(out + *n_out, (uint32_t)c);
            return digits + 1;
        }
    }
    if (*s >= '0' && *s <= '7') {
        uint32_t c = 0;
        size_t k = 0;
        for (; k < 3 && k < n && s[k] >= '0' && s[k] <= '7'; k++)
            c = c * 8 + (uint32_t)(s[k] - '0');
        *n_out += utf8_put(out + *n_out, c);
        return k;
    }
    out[(*n_out)++] = '\\';
    out[(*n_out)++] = *s;
    return 1;
}

static err_code lex_string(lexer *x)
{
    const char quote = x->s[x->at];
    const size_t from = x->at + 1;
    size_t end = from, n = 0;
    char *out;
    while (end < x->n && x->s[end] != quote) end += x->s[end] == '\\' ? 2 : 1;
    if (end >= x->n) return fail(x, "a string is not closed");
    TRY(jinja_get(x->a, (void **)&out, 2 * (end - from) + 8, x->e));
    for (size_t i = from; i < end;) {
        if (x->s[i] != '\\') {
            out[n++] = x->s[i++];
            continue;
        }
        i += 1 + unescape(x->s + i + 1, end - i - 1, out, &n);
    }
    out[n] = '\0';
    TRY(push(x, (jtoken){.kind = JT_STRING, .line = x->line, .str = out, .len = n}));
    count_lines(x, x->at, end);
    x->at = end + 1;
    return OK;
}

static err_code lex_number(lexer *x)
{
    char s[64];
    size_t n = 0, i = x->at;
    bool real = false;
    const bool after_dot = x->at > 0 && x->s[x->at - 1] == '.';
    for (; i < x->n && n + 1 < sizeof s; i++) {
        const char c = x->s[i], next = i + 1 < x->n ? x->s[i + 1] : '\0';
        const bool digit = c >= '0' && c <= '9';
        if (c == '_' && next >= '0' && next <= '9') continue;
        if (!digit) {
            const bool sign = (next == '+' || next == '-') && i + 2 < x->n && x->s[i + 2] >= '0' &&
                              x->s[i + 2] <= '9';
            const bool point = c == '.' && !real && next >= '0' && next <= '9';
            const bool exp = (c == 'e' || c == 'E') && ((next >= '0' && next <= '9') || sign);
            if (after_dot || (!point && !exp)) break;
            real = true;
            if (exp && sign) {
                s[n++] = c;
                s[n++] = next;
                i++;
                continue;
            }
        }
        s[n++] = c;
    }
    s[n] = '\0';
    jtoken t = {.kind = real ? JT_FLOAT : JT_INT, .line = x->line, .str = ""};
    if (n + 1 >= sizeof s || (!real && n > 18)) return fail(x, "a number is too long");
    if (real)
        t.d = strtod(s, NULL);
    else
        t.i = strtoll(s, NULL, 10);
    x->at = i;
    return push(x, t);
}

static err_code lex_op(lexer *x)
{
    static const char *const ops[] = {"==", "!=", ">=", "<=", "//", "**", "+", "-", "*",
                                      "/",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                      ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};
    for (size_t i = 0; i < sizeof ops / sizeof *ops; i++) {
        const size_t n = strlen(ops[i]);
        if (x->n - x->at < n || memcmp(x->s + x->at, ops[i], n) != 0) continue;
        x->at += n;
        return push(x, (jtoken){.kind = JT_OP, .line = x->line, .str = ops[i], .len = n});
    }
    return fail(x, "unexpected character");
}

/* Up to the end of a tag, which `end` is ("}}" or "%}"); braces of dictionaries are balanced. */
static err_code lex_tag(lexer *x, const char *end, jt_kind end_kind)
{
    int open = 0;
    for (;;) {
        while (x->at < x->n && is_space(x->s[x->at])) x->line += x->s[x->at++] == '\n';
        if (x->at >= x->n) return fail(x, "a tag is not closed");
        const char *p = x->s + x->at;
        const size_t left = x->n - x->at;
        const bool strip = *p == '-' && left > 2 && !memcmp(p + 1, end, 2),
                   keep = *p == '+' && left > 2 && *end == '%' && !memcmp(p + 1, end, 2);
        if (!open && (strip || keep || (left > 1 && !memcmp(p, end, 2)))) {
            x->at += 2 + (strip || keep);
            TRY(push(x, (jtoken){.kind = end_kind, .line = x->line, .str = end}));
            const size_t from = x->at;
            while (strip && x->at < x->n && is_space(x->s[x->at])) x->at++;
            if (!strip && !keep && *end == '%' && x->at < x->n && x->s[x->at] == '\n') x->at++;
            count_lines(x, from, x->at);
            x->line_starts = x->at > from && x->s[x->at - 1] == '\n';
            return OK;
        }
        open += *p == '{' || *p == '(' || *p == '[';
        open -= open && (*p == '}' || *p == ')' || *p == ']');
        if (name_char(*p, true)) {
            size_t k = x->at;
            while (k < x->n && name_char(x->s[k], false)) k++;
            TRY(push_text(x, JT_NAME, p, k - x->at));
            x->at = k;
        } else if (*p >= '0' && *p <= '9') {
            TRY(lex_number(x));
        } else if (*p == '\'' || *p == '"') {
            TRY(lex_string(x));
        } else {
            TRY(lex_op(x));
        }
    }
}

/* ---- between tags ---- */

/* Text before a tag: what the tag's sign, or being alone on its line, takes off its end. */
static size_t text_end(const lexer *x, size_t from, size_t tag, char sign, bool variable)
{
    size_t end = tag;
    if (sign == '-') {
        while (end > from && is_space(x->s[end - 1])) end--;
        return end;
    }
    if (sign == '+' || variable) return tag;
    while (end > from && x->s[end - 1] != '\n' && is_space(x->s[end - 1])) end--;
    const bool at_line = end > from ? x->s[end - 1] == '\n' : x->line_starts;
    return at_line ? end : tag;
}

static err_code skip_comment(lexer *x)
{
    const char *p = x->at < x->n ? memmem(x->s + x->at, x->n - x->at, "#}", 2) : NULL;
    if (!p) return fail(x, "a comment is not closed");
    size_t end = (size_t)(p - x->s), from = end + 2;
    const char sign = end > x->at ? x->s[end - 1] : '\0';
    size_t to = from;
    while (sign == '-' && to < x->n && is_space(x->s[to])) to++;
    if (sign != '-' && sign != '+' && to < x->n && x->s[to] == '\n') to++;
    x->line_starts = to > from && x->s[to - 1] == '\n';
    count_lines(x, x->at, to);
    x->at = to;
    return OK;
}

/* At "{%", is it {% raw %}? Then its text becomes data up to {% endraw %}. */
static err_code lex_raw(lexer *x, bool *was)
{
    size_t i = x->at + 2;
    *was = false;
    if (i < x->n && (x->s[i] == '-' || x->s[i] == '+')) i++;
    while (i < x->n && is_space(x->s[i])) i++;
    if (x->n - i < 3 || memcmp(x->s + i, "raw", 3) != 0 ||
        (i + 3 < x->n && name_char(x->s[i + 3], false)))
        return OK;
    *was = true;
    const int32_t n_t = x->n_t;
    x->at = i + 3;
    TRY(lex_tag(x, "%}", JT_BLOCK_END));
    x->n_t = n_t; /* the tag itself says nothing */
    const size_t from = x->at;
    for (size_t k = from; k + 1 < x->n; k++) {
        if (x->s[k] != '{' || x->s[k + 1] != '%') continue;
        size_t q = k + 2;
        const char sign = q < x->n && (x->s[q] == '-' || x->s[q] == '+') ? x->s[q++] : '\0';
        while (q < x->n && is_space(x->s[q])) q++;
        if (x->n - q < 6 || memcmp(x->s + q, "endraw", 6) != 0) continue;
        const size_t end = text_end(x, from, k, sign, false);
        TRY(push_text(x, JT_DATA, x->s + from, end - from));
        count_lines(x, from, q);
        x->at = q + 6;
        const int32_t n_after = x->n_t;
        TRY(lex_tag(x, "%}", JT_BLOCK_END));
        x->n_t = n_after;
        return OK;
    }
    return fail(x, "{% raw %} is not closed");
}

static err_code lex_all(lexer *x)
{
    while (x->at < x->n) {
        const size_t from = x->at;
        size_t tag = from;
        while (tag < x->n && !(x->s[tag] == '{' && tag + 1 < x->n && strchr("{%#", x->s[tag + 1]) &&
                               x->s[tag + 1]))
            tag++;
        const char kind = tag < x->n ? x->s[tag + 1] : '\0';
        const char sign = tag + 2 < x->n && strchr("-+", x->s[tag + 2]) ? x->s[tag + 2] : '\0';
        const size_t end = tag < x->n ? text_end(x, from, tag,
                                                 sign == '+' && kind == '{' ? 0 : sign, kind == '{')
                                      : tag;
        if (end > from) TRY(push_text(x, JT_DATA, x->s + from, end - from));
        count_lines(x, from, tag);
        if (tag == x->n) break;
        x->at = tag;
        if (kind == '%') {
            bool raw;
            TRY(lex_raw(x, &raw));
            if (raw) continue;
        }
        x->at = tag + 2 + (sign == '-' || (sign == '+' && kind != '{'));
        if (kind == '#') {
            TRY(skip_comment(x));
            continue;
        }
        TRY(push(x, (jtoken){.kind = kind == '{' ? JT_VAR_BEGIN : JT_BLOCK_BEGIN,
                             .line = x->line,
                             .str = ""}));
        TRY(lex_tag(x, kind == '{' ? "}}" : "%}", kind == '{' ? JT_VAR_END : JT_BLOCK_END));
    }
    return push(x, (jtoken){.kind = JT_END, .line = x->line, .str = "end of the template"});
}

err_code jinja_lex(jinja_arena *a, const char *text, size_t n, jtoken **out, int32_t *n_out, err *e)
{
    char *s;
    size_t k = 0;
    TRY(jinja_get(a, (void **)&s, n + 1, e));
    for (size_t i = 0; i < n; i++) { /* line ends are \n; the last one goes */
        if (text[i] == '\r') {
            s[k++] = '\n';
            i += i + 1 < n && text[i + 1] == '\n';
        } else {
            s[k++] = text[i];
        }
    }
    if (k && s[k - 1] == '\n') k--;
    lexer x = {.a = a, .s = s, .n = k, .line = 1, .line_starts = true, .e = e};
    TRY(lex_all(&x));
    *out = x.t;
    *n_out = x.n_t;
    return OK;
}
