/* Build time only: page.html as a C file, with the content security policy that allows its one
 * style and its one script by their hashes.
 *
 *     embed_page page.html page.c */
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/hash.h"
#include "base/mem.h"

#define PAGE_MAX ((size_t)60 << 10) /* what the page may weigh in the binary */

static const char usage[] = "usage: embed_page PAGE.html OUT.c\n";

/* The one element `tag`: its text, which is what a browser hashes. */
static err_code element(const char *page, const char *tag, const char **text, size_t *n, err *e)
{
    char begin[16], end[16];
    (void)snprintf(begin, sizeof begin, "<%s>", tag);
    (void)snprintf(end, sizeof end, "</%s>", tag);
    const char *from = strstr(page, begin);
    const char *to = from ? strstr(from, end) : NULL;
    if (!to || strstr(to + 1, end))
        return err_set(e, E_INPUT, "expected one %s ... %s", begin, end);
    *text = from + strlen(begin);
    *n = (size_t)(to - *text);
    return OK;
}

static unsigned nibble(char c) { return (unsigned)(c <= '9' ? c - '0' : c - 'a' + 10); }

/* "sha256-..." of the 32 bytes that hex stands for: ten groups of three bytes and one of two. */
static void source_of(char out[64], const hash256 *h)
{
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char *p = out + sprintf(out, "sha256-");
    for (int i = 0; i < 33; i += 3) {
        unsigned v = 0;
        for (int b = i; b < i + 3; b++)
            v = v << 8 | (b < 32 ? nibble(h->hex[2 * b]) << 4 | nibble(h->hex[2 * b + 1]) : 0);
        for (int d = 18; d >= 0; d -= 6) *p++ = digits[v >> d & 63];
    }
    p[-1] = '=';
    *p = 0;
}

static err_code write_page(const char *out, const char *page, size_t n, const char *script,
                           const char *style, err *e)
{
    FILE *f = fopen(out, "w");
    if (!f) return err_set(e, E_IO, "cannot write '%s'", out);
    (void)fprintf(f,
                  "/* Made from page.html by embed_page. */\n#include \"runtime/serve/page.h\"\n\n"
                  "const unsigned char serve_page[] = {");
    for (size_t i = 0; i < n; i++)
        (void)fprintf(f, "%s%u,", i % 24 ? "" : "\n    ", (unsigned char)page[i]);
    (void)fprintf(f,
                  "\n};\nconst size_t serve_page_bytes = sizeof serve_page;\n"
                  "const char serve_page_csp[] =\n"
                  "    \"default-src 'none'; script-src '%s'; \"\n"
                  "    \"style-src '%s'; connect-src 'self'; img-src data:; \"\n"
                  "    \"base-uri 'none'; form-action 'none'; frame-ancestors 'none'\";\n",
                  script, style);
    return fclose(f) == 0 ? OK : err_set(e, E_IO, "cannot write '%s'", out);
}

static err_code embed(const char *in, const char *out, err *e)
{
    char *page = NULL, script[64], style[64];
    const char *text;
    size_t n, part;
    hash256 h;
    err_code rc = file_read(&page, &n, in, PAGE_MAX, e);
    if (rc == OK) rc = element(page, "script", &text, &part, e);
    if (rc == OK) rc = hash_sha256(&h, text, part, e);
    if (rc == OK) source_of(script, &h);
    if (rc == OK) rc = element(page, "style", &text, &part, e);
    if (rc == OK) rc = hash_sha256(&h, text, part, e);
    if (rc == OK) source_of(style, &h);
    if (rc == OK) rc = write_page(out, page, n, script, style, e);
    mem_free(page);
    return rc;
}

int main(int argc, char **argv)
{
    err e;
    if (argc != 3) {
        (void)fputs(usage, stderr);
        return 2;
    }
    if (embed(argv[1], argv[2], &e) == OK) return 0;
    (void)fprintf(stderr, "embed_page: '%s': %s\n", argv[1], e.msg);
    return 1;
}
