/* Normalizers of tokenizer.json: Sequence, Prepend, Replace, Strip and the Unicode forms. */
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

#define NORMAL_MAX_STEPS 16
#define UNICODE_SPAN \
    4096 /* a Unicode form is computed over spans of about this size where they may end */

typedef enum { STEP_PREPEND, STEP_REPLACE, STEP_UNICODE, STEP_STRIP } step_kind;

typedef struct {
    step_kind kind;
    char *text;             /* STEP_PREPEND: what; STEP_REPLACE: the pattern when it is a string */
    char *with;             /* STEP_REPLACE */
    tok_regex *regex;       /* STEP_REPLACE by pattern */
    utf8proc_option_t form; /* STEP_UNICODE */
    bool left, right;       /* STEP_STRIP */
} step;

struct tok_normal {
    step st[NORMAL_MAX_STEPS];
    int n;
};

/* ---- reading ---- */

static bool unicode_form(const char *type, utf8proc_option_t *form)
{
    const int base = UTF8PROC_STABLE;
    if (!strcmp(type, "NFC"))
        *form = base | UTF8PROC_COMPOSE;
    else if (!strcmp(type, "NFD"))
        *form = base | UTF8PROC_DECOMPOSE;
    else if (!strcmp(type, "NFKC"))
        *form = base | UTF8PROC_COMPOSE | UTF8PROC_COMPAT;
    else if (!strcmp(type, "NFKD"))
        *form = base | UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT;
    else
        return false;
    return true;
}

static err_code read_replace(step *st, const cJSON *o, err *e)
{
    const cJSON *p = cJSON_GetObjectItemCaseSensitive(o, "pattern");
    const cJSON *re = cJSON_GetObjectItemCaseSensitive(p, "Regex");
    const cJSON *lit = cJSON_GetObjectItemCaseSensitive(p, "String");
    const char *with;
    st->kind = STEP_REPLACE;
    TRY(json_get_str(o, "content", &with, e));
    TRY(mem_strdup(&st->with, with, e));
    if (cJSON_IsString(re)) return tok_regex_open(&st->regex, re->valuestring, e);
    if (cJSON_IsString(lit) && *lit->valuestring) return mem_strdup(&st->text, lit->valuestring, e);
    return err_set(e, E_INPUT, "normalizer: Replace: expected pattern.Regex or pattern.String");
}

static err_code read_step(tok_normal *s, const cJSON *o, int depth, err *e)
{
    const char *type;
    TRY(json_get_str(o, "type", &type, e));
    if (!strcmp(type, "Sequence")) {
        const cJSON *list = cJSON_GetObjectItemCaseSensitive(o, "normalizers"), *c;
        if (depth > 4) return err_set(e, E_LIMIT, "normalizer: nested too deep");
        cJSON_ArrayForEach(c, list) TRY(read_step(s, c, depth + 1, e));
        return OK;
    }
    if (s->n == NORMAL_MAX_STEPS)
        return err_set(e, E_LIMIT, "normalizer: more than %d steps", NORMAL_MAX_STEPS);
    step *st = &s->st[s->n++];
    if (!strcmp(type, "Replace")) return read_replace(st, o, e);
    if (!strcmp(type, "Prepend")) {
        const char *text;
        st->kind = STEP_PREPEND;
        TRY(json_get_str(o, "prepend", &text, e));
        return mem_strdup(&st->text, text, e);
    }
    if (!strcmp(type, "Strip")) {
        st->kind = STEP_STRIP;
        TRY(json_opt_bool(o, "strip_left", true, &st->left, e));
        return json_opt_bool(o, "strip_right", true, &st->right, e);
    }
    st->kind = STEP_UNICODE;
    if (unicode_form(type, &st->form)) return OK;
    return err_set(e, E_UNSUPPORTED, "normalizer '%.40s'", type);
}

err_code tok_normal_open(tok_normal **out, const cJSON *spec, err *e)
{
    *out = NULL;
    if (!spec || cJSON_IsNull(spec)) return OK;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "normalizer", e));
    const err_code rc = read_step(*out, spec, 0, e);
    if (rc != OK) tok_normal_close(out);
    return rc;
}

err_code tok_normal_nfc(tok_normal **out, err *e)
{
    TRY(mem_alloc((void **)out, 1, sizeof **out, "normalizer", e));
    (*out)->n = 1;
    (*out)->st[0].kind = STEP_UNICODE;
    (void)unicode_form("NFC", &(*out)->st[0].form);
    return OK;
}

void tok_normal_close(tok_normal **s)
{
    if (!*s) return;
    for (int i = 0; i < (*s)->n; i++) {
        mem_free((*s)->st[i].text);
        mem_free((*s)->st[i].with);
        tok_regex_close(&(*s)->st[i].regex);
    }
    mem_free(*s);
    *s = NULL;
}

bool tok_normal_can_cut(const tok_normal *s)
{
    for (int i = 0; s && i < s->n; i++) {
        const step *st = &s->st[i];
        const bool mark = st->kind == STEP_REPLACE && !st->regex && !strcmp(st->text, " ") &&
                          !strcmp(st->with, "\xe2\x96\x81");
        if (st->kind == STEP_STRIP || (st->kind == STEP_REPLACE && !mark)) return false;
    }
    return true;
}

/* ---- running ---- */

static bool han_at(const char *s, size_t n)
{
    return n >= 3 && (uint8_t)s[0] >= 0xe5 &&
           (uint8_t)s[0] <= 0xe8; /* U+5000..U+8FFF: inert in every form */
}

/* The end of a span that begins at `from`: all up to ASCII, but the last ASCII character before
 * other text belongs to that (it may compose), and long Han runs are cut between two of them. */
static size_t span_end(const char *s, size_t n, size_t from)
{
    size_t i = from + 1;
    while (i < n && (uint8_t)s[i] >= 0x80) {
        if (i - from >= UNICODE_SPAN && i >= 3 && han_at(s + i - 3, 3) && han_at(s + i, n - i))
            break;
        i++;
    }
    return i;
}

static err_code run_unicode(utf8proc_option_t form, const char *s, size_t n, tok_buf *out, err *e)
{
    for (size_t i = 0; i < n;) {
        if ((uint8_t)s[i] < 0x80 &&
            (i + 1 == n || (uint8_t)s[i + 1] < 0x80)) { /* plain ASCII: as it is */
            size_t j = i + 1;
            while (j + 1 < n && (uint8_t)s[j] < 0x80 && (uint8_t)s[j + 1] < 0x80) j++;
            TRY(tok_buf_add(out, s + i, j - i, e));
            i = j;
            continue;
        }
        const size_t end = span_end(s, n, i);
        utf8proc_uint8_t *got = NULL;
        const utf8proc_ssize_t len = utf8proc_map((const utf8proc_uint8_t *)s + i,
                                                  (utf8proc_ssize_t)(end - i), &got, form);
        if (len < 0)
            return err_set(e, len == UTF8PROC_ERROR_NOMEM ? E_NOMEM : E_INPUT,
                           "cannot normalize text: %s", utf8proc_errmsg(len));
        const err_code rc = tok_buf_add(out, (const char *)got, (size_t)len, e);
        free(got);
        TRY(rc);
        i = end;
    }
    return OK;
}

static err_code run_replace(const step *st, const char *s, size_t n, tok_buf *out, err *e)
{
    tok_regex_scratch *scratch = NULL;
    const size_t with = strlen(st->with);
    size_t done = 0, from = 0;
    err_code rc = OK;
    while (from <= n && rc == OK) {
        bool found;
        size_t a = n, b = n;
        if (st->regex) {
            if ((rc = tok_regex_find(st->regex, &scratch, s, n, from, &found, &a, &b, e)) != OK)
                break;
        } else {
            const char *p = memmem(s + from, n - from, st->text, strlen(st->text));
            if ((found = p != NULL)) {
                a = (size_t)(p - s);
                b = a + strlen(st->text);
            }
        }
        if (!found) break;
        rc = tok_buf_add(out, s + done, a - done, e);
        if (rc == OK) rc = tok_buf_add(out, st->with, with, e);
        done = b;
        const size_t step_over = a == b && b < n ? utf8_len(s + b, n - b) : 0;
        from = a == b ? b + (step_over ? step_over : 1) : b;
    }
    if (rc == OK) rc = tok_buf_add(out, s + done, n - done, e);
    tok_regex_scratch_free(&scratch);
    return rc;
}

static err_code run_strip(const step *st, const char *s, size_t n, tok_buf *out, err *e)
{
    size_t a = 0, b = n;
    while (st->left && a < b) {
        const size_t len = utf8_len(s + a, b - a);
        if (!len || !tok_is_white(utf8_code(s + a, len))) break;
        a += len;
    }
    while (st->right && b > a) {
        size_t i = b - 1;
        while (i > a && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
        const size_t len = utf8_len(s + i, b - i);
        if (!len || !tok_is_white(utf8_code(s + i, len))) break;
        b = i;
    }
    return tok_buf_add(out, s + a, b - a, e);
}

static err_code run_step(const step *st, const char *s, size_t n, frag_kind kind, tok_buf *out,
                         err *e)
{
    switch (st->kind) {
    case STEP_UNICODE: return run_unicode(st->form, s, n, out, e);
    case STEP_REPLACE: return run_replace(st, s, n, out, e);
    case STEP_STRIP: return run_strip(st, s, n, out, e);
    case STEP_PREPEND:
        if (n && kind != FRAG_CONT) TRY(tok_buf_add(out, st->text, strlen(st->text), e));
    }
    return tok_buf_add(out, s, n, e);
}

err_code tok_normal_run(const tok_normal *s, const char *text, size_t n, frag_kind kind,
                        tok_buf *out, err *e)
{
    tok_buf from = {0};
    err_code rc = tok_buf_add(out, text, n, e);
    for (int i = 0; s && i < s->n && rc == OK; i++) {
        const tok_buf swap = from;
        from = *out;
        *out = swap;
        out->n = 0;
        rc = run_step(&s->st[i], from.p, from.n, kind, out, e);
    }
    tok_buf_free(&from);
    return rc;
}
