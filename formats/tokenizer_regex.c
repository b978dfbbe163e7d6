/* Oniguruma patterns of tokenizer files on PCRE2. */
#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

#define REGEX_MAX_BYTES 65536
#define REGEX_MATCH_LIMIT \
    20000000 /* steps of one match; a pattern that backtracks without end stops here */
#define REGEX_HEAP_KB 65536

struct tok_regex {
    pcre2_code *code;
    pcre2_match_context *limits;
};
struct tok_regex_scratch {
    pcre2_match_data *data;
};

/* White space as Unicode defines it and Oniguruma reads \s. PCRE2's own \s also takes U+180E. */
static const char spaces[] =
    "\\t-\\r\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}"
    "\\x{205f}\\x{3000}";
static const char no_spaces[] =
    "\\x{0}-\\x{8}\\x{e}-\\x{1f}\\x{21}-\\x{84}\\x{86}-\\x{9f}\\x{a1}-\\x{167f}"
    "\\x{1681}-\\x{1fff}\\x{200b}-\\x{2027}\\x{202a}-\\x{202e}\\x{2030}-\\x{205e}"
    "\\x{2060}-\\x{2fff}\\x{3001}-\\x{10ffff}";

static err_code add_class(tok_buf *out, const char *set, bool in_class, err *e)
{
    if (!in_class) TRY(tok_buf_add(out, "[", 1, e));
    TRY(tok_buf_add(out, set, strlen(set), e));
    return in_class ? OK : tok_buf_add(out, "]", 1, e);
}

/* One escape; p points behind the backslash. Returns how many bytes it took through *took. */
static err_code add_escape(tok_buf *out, const char *p, bool in_class, size_t *took, err *e)
{
    char hex[16];
    *took = 1;
    switch (*p) {
    case 's': return add_class(out, spaces, in_class, e);
    case 'S': return add_class(out, no_spaces, in_class, e);
    case 'u':
        if (strspn(p + 1, "0123456789abcdefABCDEF") < 4)
            return err_set(e, E_INPUT, "regex: \\u wants four digits");
        *took = 5;
        snprintf(hex, sizeof hex, "\\x{%.4s}", p + 1);
        return tok_buf_add(out, hex, strlen(hex), e);
    case 'p':
    case 'P':
    case 'd':
    case 'D':
    case 'n':
    case 'r':
    case 't':
    case 'f':
    case 'x': break;
    case 0: return err_set(e, E_INPUT, "regex: ends in a backslash");
    default:
        if ((*p >= '0' && *p <= '9') || (*p >= 'a' && *p <= 'z') || (*p >= 'A' && *p <= 'Z'))
            return err_set(e, E_UNSUPPORTED, "regex: escape '\\%c'", *p);
    }
    TRY(tok_buf_add(out, "\\", 1, e));
    return tok_buf_add(out, p, 1, e);
}

static err_code translate(tok_buf *out, const char *pattern, err *e)
{
    bool in_class = false;
    for (const char *p = pattern; *p;) {
        if (*p == '\\') {
            size_t took;
            TRY(add_escape(out, p + 1, in_class, &took, e));
            p += 1 + took;
            continue;
        }
        if (in_class && (*p == '[' || (*p == '&' && p[1] == '&')))
            return err_set(e, E_UNSUPPORTED, "regex: set operations in a class: '%.60s'", pattern);
        TRY(tok_buf_add(out, p, 1, e));
        if (!in_class && *p == '[') {
            in_class = true;
            if (p[1] == '^') TRY(tok_buf_add(out, ++p, 1, e));
            if (p[1] == ']') TRY(tok_buf_add(out, ++p, 1, e));
        } else if (*p == ']') {
            in_class = false;
        }
        p++;
    }
    return OK;
}

static err_code regex_compile(tok_regex *r, const char *pattern, const tok_buf *text, err *e)
{
    int code;
    PCRE2_SIZE at;
    r->code = pcre2_compile((PCRE2_SPTR)text->p, text->n,
                            PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                            &code, &at, NULL);
    if (!r->code) {
        char why[160] = "";
        pcre2_get_error_message(code, (PCRE2_UCHAR *)why, sizeof why);
        return err_set(e, E_UNSUPPORTED, "regex '%.80s': %s", pattern, why);
    }
    /* Without JIT (not compiled in, or no memory for code) matching still works. */
    (void)pcre2_jit_compile(r->code, PCRE2_JIT_COMPLETE);
    r->limits = pcre2_match_context_create(NULL);
    if (!r->limits) return err_set(e, E_NOMEM, "regex: out of memory");
    pcre2_set_match_limit(r->limits, REGEX_MATCH_LIMIT);
    pcre2_set_heap_limit(r->limits, REGEX_HEAP_KB);
    return OK;
}

err_code tok_regex_open(tok_regex **out, const char *pattern, err *e)
{
    tok_buf text = {0};
    tok_regex *r = NULL;
    err_code rc;
    *out = NULL;
    if (strlen(pattern) > REGEX_MAX_BYTES)
        return err_set(e, E_LIMIT, "regex: expected at most %d bytes, got %zu", REGEX_MAX_BYTES,
                       strlen(pattern));
    if ((rc = tok_buf_reserve(&text, 64, e)) != OK) goto done;
    if ((rc = mem_alloc((void **)&r, 1, sizeof *r, "regex", e)) != OK) goto done;
    if ((rc = translate(&text, pattern, e)) != OK) goto done;
    if ((rc = regex_compile(r, pattern, &text, e)) != OK) goto done;
    *out = r;
    r = NULL;
done:
    tok_regex_close(&r);
    tok_buf_free(&text);
    return rc;
}

void tok_regex_close(tok_regex **r)
{
    if (!*r) return;
    pcre2_match_context_free((*r)->limits);
    pcre2_code_free((*r)->code);
    mem_free(*r);
    *r = NULL;
}

static err_code scratch_get(tok_regex_scratch **s, err *e)
{
    if (*s) return OK;
    TRY(mem_alloc((void **)s, 1, sizeof **s, "regex", e));
    (*s)->data = pcre2_match_data_create(1, NULL);
    if ((*s)->data) return OK;
    mem_free(*s);
    *s = NULL;
    return err_set(e, E_NOMEM, "regex: out of memory");
}

err_code tok_regex_find(const tok_regex *r, tok_regex_scratch **scratch, const char *s, size_t n,
                        size_t from, bool *found, size_t *start, size_t *end, err *e)
{
    TRY(scratch_get(scratch, e));
    pcre2_match_data *m = (*scratch)->data;
    int rc = pcre2_match(r->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK, m, r->limits);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT) /* the interpreter keeps its frames on the heap */
        rc = pcre2_match(r->code, (PCRE2_SPTR)s, n, from, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT, m,
                         r->limits);
    *found = rc >= 0;
    if (rc == PCRE2_ERROR_NOMATCH) return OK;
    if (rc == PCRE2_ERROR_NOMEMORY) return err_set(e, E_NOMEM, "regex: out of memory");
    if (rc < 0)
        return err_set(e, E_LIMIT,
                       "regex: gave up at byte %zu of the text (matching limit, code %d)", from,
                       rc);
    *start = pcre2_get_ovector_pointer(m)[0];
    *end = pcre2_get_ovector_pointer(m)[1];
    if (*end < *start)
        return err_set(e, E_UNSUPPORTED, "regex: a match ends before it begins (\\K)");
    return OK;
}

void tok_regex_scratch_free(tok_regex_scratch **s)
{
    if (!*s) return;
    pcre2_match_data_free((*s)->data);
    mem_free(*s);
    *s = NULL;
}
