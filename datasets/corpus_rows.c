/* Files to rows: lines, jsonl objects, dialogues. */
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus_internal.h"

#define READ_BLOCK ((size_t)256 << 10)

/* ---- small things ---- */

err_code corpus_buf_add(corpus_buf *b, const char *s, size_t n, err *e)
{
    size_t need;
    TRY(mem_add(&need, b->n, n, "text", e));
    TRY(mem_add(&need, need, 1, "text", e));
    if (need > b->cap) {
        void *p;
        size_t cap = b->cap ? b->cap : 4096;
        while (cap < need) TRY(mem_mul(&cap, cap, 2, "text", e));
        TRY(mem_alloc(&p, cap, 1, "text", e));
        if (b->n) memcpy(p, b->p, b->n);
        mem_free(b->p);
        b->p = p;
        b->cap = cap;
    }
    if (n) memcpy(b->p + b->n, s, n);
    b->n += n;
    b->p[b->n] = '\0';
    return OK;
}

void corpus_buf_free(corpus_buf *b)
{
    mem_free(b->p);
    *b = (corpus_buf){0};
}

static bool blank(char c) { return c == ' ' || (c >= 9 && c <= 13); }

void corpus_strip(const char **s, size_t *n)
{
    while (*n && blank(**s)) {
        ++*s;
        --*n;
    }
    while (*n && blank((*s)[*n - 1])) --*n;
}

static bool ends_with(const char *s, const char *tail)
{
    const size_t n = strlen(s), k = strlen(tail);
    return n >= k && strcmp(s + n - k, tail) == 0;
}

static bool is_jsonl(const char *name)
{
    return ends_with(name, ".jsonl") || ends_with(name, ".ndjson") || ends_with(name, ".json");
}

/* ---- dialogues ---- */

static const char *role_name_of(const char *from)
{
    static const char *const pairs[][2] = {
        {"human", "user"}, {"gpt", "assistant"}, {"bot", "assistant"}, {"model", "assistant"}};
    for (size_t i = 0; i < sizeof pairs / sizeof *pairs; i++)
        if (!strcmp(from, pairs[i][0])) return pairs[i][1];
    return from;
}

static err_code one_message(chat_message *m, const cJSON *o, int64_t i, err *e)
{
    const cJSON *role = cJSON_GetObjectItemCaseSensitive(o, "role");
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(o, "content");
    if (!role) role = cJSON_GetObjectItemCaseSensitive(o, "from");
    if (!text) text = cJSON_GetObjectItemCaseSensitive(o, "value");
    if (!cJSON_IsString(role) || !cJSON_IsString(text))
        return err_set(e, E_INPUT, "message %d: expected strings role and content", (int)i + 1);
    *m = (chat_message){role_name_of(role->valuestring), text->valuestring};
    return OK;
}

err_code corpus_messages(chat_message **m, int64_t *n, const cJSON *o, err *e)
{
    const cJSON *list = cJSON_GetObjectItemCaseSensitive(o, "messages"), *c;
    *m = NULL;
    *n = 0;
    if (!list) list = cJSON_GetObjectItemCaseSensitive(o, "conversations");
    if (!list) return OK;
    const int count = cJSON_GetArraySize(list);
    if (!cJSON_IsArray(list) || count == 0)
        return err_set(e, E_INPUT, "messages: expected an array of messages");
    TRY(mem_alloc((void **)m, (size_t)count, sizeof **m, "messages", e));
    err_code rc = OK;
    cJSON_ArrayForEach(c, list)
    {
        if ((rc = one_message(*m + *n, c, *n, e)) != OK) break;
        ++*n;
    }
    if (rc == OK) return OK;
    mem_free(*m);
    *m = NULL;
    *n = 0;
    return rc;
}

/* ---- lines ---- */

typedef struct {
    source *s;
    corpus_buf block; /* bytes read, from `at` on not given out */
    size_t at;
    bool ended;
    int64_t number; /* of the line given last */
} line_reader;

/* The next line without its end (LF); false at the end of the file. The line is valid until the
 * next call. */
static err_code next_line(line_reader *r, const char **line, size_t *n, bool *more, err *e)
{
    size_t looked = r->at;
    char buf[READ_BLOCK / 8];
    for (;;) {
        const char *end = r->block.n > looked
                              ? memchr(r->block.p + looked, '\n', r->block.n - looked)
                              : NULL;
        if (end || r->ended) {
            const size_t to = end ? (size_t)(end - r->block.p) : r->block.n;
            *more = end || to > r->at;
            *line = r->block.p ? r->block.p + r->at : "";
            *n = to - r->at;
            r->at = end ? to + 1 : to;
            r->number++;
            return OK;
        }
        if (r->at) memmove(r->block.p, r->block.p + r->at, r->block.n - r->at);
        r->block.n -= r->at;
        looked = r->block.n;
        r->at = 0;
        if (r->block.n > CORPUS_MAX_LINE)
            return err_set(e, E_LIMIT, "%s: line %lld: expected at most %zu bytes",
                           source_where(r->s), (long long)r->number + 1, CORPUS_MAX_LINE);
        size_t got;
        TRY(source_read(r->s, buf, sizeof buf, &got, e));
        r->ended = got == 0;
        TRY(corpus_buf_add(&r->block, buf, got, e));
    }
}

static err_code at_line(const line_reader *r, err *e)
{
    return err_wrap(e, "%s: line %lld", source_where(r->s), (long long)r->number);
}

static err_code parse_line(cJSON **o, const line_reader *r, const char *line, size_t n, err *e)
{
    char what[64];
    snprintf(what, sizeof what, "line %lld", (long long)r->number);
    if (line[0] == '[')
        return err_set(e, E_UNSUPPORTED, "%s: a JSON array (expected one object a line)",
                       source_where(r->s));
    if (json_parse(o, line, n, what, e) != OK) return err_wrap(e, "%s", source_where(r->s));
    if (cJSON_IsObject(*o)) return OK;
    cJSON_Delete(*o);
    *o = NULL;
    return err_set(e, E_INPUT, "%s: line %lld: expected a JSON object", source_where(r->s),
                   (long long)r->number);
}

/* ---- rows ---- */

static err_code json_row(const cJSON *o, row_fn each, void *ctx, bool *stop, err *e)
{
    static const char *const keys[] = {"text", "sentence", "content"};
    chat_message *m;
    int64_t n;
    for (size_t i = 0; i < 3; i++) {
        const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, keys[i]);
        if (!cJSON_IsString(v)) continue;
        const corpus_row row = {.text = v->valuestring, .n = strlen(v->valuestring)};
        return each(ctx, &row, stop, e);
    }
    TRY(corpus_messages(&m, &n, o, e));
    if (!n) return err_set(e, E_INPUT, "expected a key text, messages or conversations");
    const corpus_row row = {.messages = m, .n_messages = n};
    const err_code rc = each(ctx, &row, stop, e);
    mem_free(m);
    return rc;
}

static err_code each_json(source *s, row_fn each, corpus_row_fn each_object, void *ctx, bool *stop,
                          const job *j, err *e)
{
    line_reader r = {.s = s};
    err_code rc;
    for (;;) {
        const char *line;
        size_t n;
        bool more;
        cJSON *o;
        if ((rc = next_line(&r, &line, &n, &more, e)) != OK || !more || *stop) break;
        if (r.number == 1 && n >= 3 && memcmp(line, "\xef\xbb\xbf", 3) == 0) {
            line += 3;
            n -= 3;
        }
        corpus_strip(&line, &n);
        if (!n) continue;
        if ((rc = job_check(j, e)) != OK || (rc = parse_line(&o, &r, line, n, e)) != OK) break;
        rc = each ? json_row(o, each, ctx, stop, e) : each_object(ctx, o, r.number, e);
        cJSON_Delete(o);
        if (rc != OK) {
            if (rc != E_CANCELED) rc = at_line(&r, e);
            break;
        }
    }
    corpus_buf_free(&r.block);
    return rc;
}

static err_code each_line(source *s, row_fn each, void *ctx, bool *stop, const job *j, err *e)
{
    line_reader r = {.s = s};
    err_code rc;
    for (;;) {
        const char *line;
        size_t n;
        bool more;
        if ((rc = next_line(&r, &line, &n, &more, e)) != OK || !more || *stop) break;
        if ((rc = job_check(j, e)) != OK) break;
        if (!json_utf8_valid(line, n)) {
            rc = err_set(e, E_INPUT, "%s: line %lld: invalid UTF-8", source_where(s),
                         (long long)r.number);
            break;
        }
        const corpus_row row = {.text = line, .n = n, .line = true};
        if ((rc = each(ctx, &row, stop, e)) != OK) break;
    }
    corpus_buf_free(&r.block);
    return rc;
}

err_code corpus_each_row(const char *path, row_fn each, whole_fn whole, void *ctx, const job *j,
                         err *e)
{
    source *s;
    bool stop = false;
    err_code rc;
    TRY(source_open(&s, path, j, e));
    for (;;) {
        const char *name;
        if ((rc = source_next(s, &name, e)) != OK || !name || stop) break;
        if (is_jsonl(name))
            rc = each_json(s, each, NULL, ctx, &stop, j, e);
        else if (whole)
            rc = whole(ctx, s, &stop, e);
        else
            rc = each_line(s, each, ctx, &stop, j, e);
        if (rc != OK) break;
    }
    source_close(&s);
    return rc;
}

err_code corpus_rows(const char *path, corpus_row_fn each, void *ctx, const job *j, err *e)
{
    source *s;
    const char *name;
    bool stop = false;
    TRY(source_open(&s, path, j, e));
    err_code rc;
    while ((rc = source_next(s, &name, e)) == OK && name)
        if ((rc = each_json(s, NULL, each, ctx, &stop, j, e)) != OK) break;
    source_close(&s);
    return rc;
}
