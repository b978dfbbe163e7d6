/* Rows and texts to token streams. */
#include <string.h>

#include "base/mem.h"
#include "datasets/corpus_internal.h"

err_code corpus_join_of(corpus_join *out, const char *dataset, err *e)
{
    static const struct {
        const char *name;
        corpus_join join;
    } names[] = {
        {"wikitext2", JOIN_WIKITEXT}, {"ptb", JOIN_PTB},   {"c4", JOIN_DOCS},
        {"pileval", JOIN_DOCS},       {"self", JOIN_NONE},
    };
    *out = JOIN_NONE;
    if (!dataset) return OK;
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        if (strcmp(dataset, names[i].name) != 0) continue;
        *out = names[i].join;
        return OK;
    }
    return err_set(e, E_USAGE, "unknown data set '%.60s' (wikitext2, ptb, c4, pileval, self)",
                   dataset);
}

bool corpus_dataset_known(const char *name)
{
    corpus_join j;
    err e;
    return corpus_join_of(&j, name, &e) == OK;
}

uint64_t corpus_random(uint64_t seed, uint64_t counter)
{
    uint64_t z = seed * 0xd1342543de82ef95u + (counter + 1) * 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

/* ---- feeder ---- */

bool corpus_feed_full(const feeder *f) { return f->max_tokens > 0 && f->out->n >= f->max_tokens; }

/* Where the first byte stands that no character explains. */
static size_t utf8_fault(const char *s, size_t n)
{
    for (size_t i = 0; i < n;) {
        size_t len = 1;
        while (len <= 4 && i + len <= n && !json_utf8_valid(s + i, len)) len++;
        if (len > 4 || i + len > n) return i;
        i += len;
    }
    return n;
}

static err_code feed_part(feeder *f, size_t n, err *e)
{
    if (!json_utf8_valid(f->carry.p, n))
        return err_set(e, E_INPUT, "%s: byte %llu: invalid UTF-8", f->where,
                       (unsigned long long)(f->offset + utf8_fault(f->carry.p, n)));
    const char *nul = memchr(f->carry.p, 0, n);
    if (nul)
        return err_set(e, E_INPUT, "%s: byte %llu: a NUL byte: not a text", f->where,
                       (unsigned long long)(f->offset + (uint64_t)(nul - f->carry.p)));
    if (!f->begun && f->bos && tokenizer_add_bos(f->t))
        TRY(token_list_push(f->out, tokenizer_bos(f->t), e));
    err_code rc = f->parse_special
                      ? tokenizer_encode(f->t, f->carry.p, n, true, f->out, e)
                      : tokenizer_encode_part(f->t, f->carry.p, n, !f->begun, f->out, e);
    if (rc != OK) return err_wrap(e, "%s", f->where);
    memmove(f->carry.p, f->carry.p + n, f->carry.n - n);
    f->carry.n -= n;
    f->offset += n;
    f->begun = true;
    return OK;
}

err_code corpus_feed_add(feeder *f, const char *s, size_t n, err *e)
{
    if (corpus_feed_full(f)) return OK;
    if (f->carry.n + n > CORPUS_MAX_TEXT)
        return err_set(e, E_LIMIT, "%s: expected at most %zu bytes of text that cannot be cut",
                       f->where, CORPUS_MAX_TEXT);
    const size_t before = f->carry.n;
    TRY(corpus_buf_add(&f->carry, s, n, e));
    /* Look for a cut at each doubling only: text without one must not be searched again and
     * again. */
    if (f->parse_special || f->carry.n < CORPUS_PART ||
        (before >= CORPUS_PART && before / CORPUS_PART == f->carry.n / CORPUS_PART))
        return OK;
    const size_t cut = tokenizer_cut(f->t, f->carry.p, f->carry.n);
    return cut ? feed_part(f, cut, e) : OK;
}

err_code corpus_feed_end(feeder *f, err *e)
{
    const bool any = f->carry.n > 0 && !corpus_feed_full(f);
    const err_code rc = any ? feed_part(f, f->carry.n, e) : OK;
    f->carry.n = 0;
    f->offset = 0;
    f->begun = false;
    if (corpus_feed_full(f)) f->out->n = f->max_tokens;
    return rc;
}

void corpus_feed_free(feeder *f) { corpus_buf_free(&f->carry); }

/* ---- documents ---- */

err_code corpus_document(token_list *out, const corpus_row *row, const corpus_read *r,
                         const tokenizer *t, const chat *c, err *e)
{
    if (row->text) {
        if (!r->no_bos && tokenizer_add_bos(t)) TRY(token_list_push(out, tokenizer_bos(t), e));
        return tokenizer_encode(t, row->text, row->n, r->parse_special, out, e);
    }
    if (!c) return err_set(e, E_UNSUPPORTED, "a dialogue, but no chat template is given");
    return chat_encode(c, row->messages, row->n_messages, r->meta_instruction, false, out, e);
}

/* ---- the stream of a file ---- */

typedef struct {
    feeder f;
    const corpus_read *r;
    const chat *c;
    const job *j;
    corpus_join join;
    int64_t rows, bytes;
} stream;

static err_code stream_step(stream *st, size_t n, bool *stop, err *e)
{
    const int64_t before = st->bytes >> 22;
    st->bytes += (int64_t)n;
    if (st->bytes >> 22 != before)
        job_step(st->j, "corpus", "token", st->f.out->n, st->f.max_tokens);
    *stop = corpus_feed_full(&st->f);
    return job_check(st->j, e);
}

/* A text file as it is. */
static err_code stream_whole(void *ctx, source *s, bool *stop, err *e)
{
    stream *st = ctx;
    char buf[64 << 10];
    bool start = true;
    st->f.where = source_where(s);
    while (!*stop) {
        size_t n;
        TRY(source_read(s, buf, sizeof buf, &n, e));
        if (!n) break;
        const size_t mark = start && n >= 3 && memcmp(buf, "\xef\xbb\xbf", 3) == 0 ? 3 : 0;
        start = false;
        TRY(corpus_feed_add(&st->f, buf + mark, n - mark, e));
        TRY(stream_step(st, n, stop, e));
    }
    return corpus_feed_end(&st->f, e);
}

/* Rows of wikitext2 and ptb make one text. The data set's blank rows are empty, its others keep
 * their end. */
static err_code stream_joined(stream *st, const corpus_row *row, err *e)
{
    const char *s = row->text;
    size_t n = row->n;
    if (st->rows++ > 0) TRY(corpus_feed_add(&st->f, "\n\n", 2, e));
    const char *t = s;
    size_t tn = n;
    corpus_strip(&t, &tn);
    if (st->join == JOIN_PTB) return corpus_feed_add(&st->f, t, tn, e);
    if (tn == 0) return OK;
    TRY(corpus_feed_add(&st->f, s, n, e));
    return row->line ? corpus_feed_add(&st->f, "\n", 1, e) : OK;
}

static err_code stream_row(void *ctx, const corpus_row *row, bool *stop, err *e)
{
    stream *st = ctx;
    if (st->join == JOIN_WIKITEXT || st->join == JOIN_PTB) {
        if (!row->text) return err_set(e, E_INPUT, "expected a key text");
        TRY(stream_joined(st, row, e));
        return stream_step(st, row->n, stop, e);
    }
    corpus_row doc = *row;
    if (doc.text && st->r->dataset && !strcmp(st->r->dataset, "pileval"))
        corpus_strip(&doc.text, &doc.n);
    if (doc.text && !doc.n) return OK;
    TRY(corpus_document(st->f.out, &doc, st->r, st->f.t, st->c, e));
    return stream_step(st, row->n, stop, e);
}

err_code corpus_tokens(token_list *out, const char *path, const corpus_read *r, const tokenizer *t,
                       const chat *c, const job *j, err *e)
{
    static const corpus_read plain = {0};
    if (!r) r = &plain;
    stream st = {.f = {.t = t,
                       .out = out,
                       .parse_special = r->parse_special,
                       .bos = !r->no_bos,
                       .where = path,
                       .max_tokens = r->max_tokens ? out->n + r->max_tokens : 0},
                 .r = r,
                 .c = c,
                 .j = j};
    const int64_t before = out->n;
    TRY(corpus_join_of(&st.join, r->dataset, e));
    err_code rc = corpus_each_row(path, stream_row, st.join == JOIN_NONE ? stream_whole : NULL, &st,
                                  j, e);
    st.f.where = path;
    if (rc == OK) rc = corpus_feed_end(&st.f, e);
    corpus_feed_free(&st.f);
    if (rc != OK) return rc;
    if (corpus_feed_full(&st.f)) out->n = st.f.max_tokens;
    if (out->n == before) return err_set(e, E_INPUT, "%s: no text in it", path);
    return OK;
}

err_code corpus_text(char **out, size_t *n, const char *path, size_t max, const job *j, err *e)
{
    source *s;
    const char *name;
    corpus_buf b = {0};
    char buf[64 << 10];
    size_t got;
    *out = NULL;
    TRY(source_open(&s, path, j, e));
    err_code rc = source_next(s, &name, e);
    if (rc == OK && !name) rc = err_set(e, E_INPUT, "%s: no file in it", path);
    if (rc == OK) rc = corpus_buf_add(&b, "", 0, e);
    while (rc == OK && (rc = source_read(s, buf, sizeof buf, &got, e)) == OK && got) {
        if (b.n + got > max)
            rc = err_set(e, E_LIMIT, "%s: expected at most %zu bytes", source_where(s), max);
        else
            rc = corpus_buf_add(&b, buf, got, e);
    }
    source_close(&s);
    if (rc != OK) {
        corpus_buf_free(&b);
        return rc;
    }
    *out = b.p;
    *n = b.n;
    return OK;
}
