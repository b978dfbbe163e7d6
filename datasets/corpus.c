/* Calibration windows: cut from token streams, or drawn from documents without holding more than
 * are kept. */
#include "datasets/corpus.h"

#include <string.h>

#include "base/mem.h"
#include "datasets/corpus_internal.h"

#define STREAM_MAX_TOKENS   ((int64_t)64 << 20) /* of one run with random windows: 256 MiB */
#define PILEVAL_MAX_TOKENS  512                 /* of one document */
#define DOCUMENT_MAX_TOKENS (1 << 20)           /* of a c4 document: the rest cannot be drawn */

/* ---- windows of streams ---- */

static err_code too_few(const corpus_opts *o, int64_t found, err *e)
{
    return err_set(e, E_INPUT, "%s%s: expected at least %lld tokens (%d windows of %d), found %lld",
                   o->paths[0], o->n_paths > 1 ? " and the other files" : "",
                   (long long)o->samples * o->seqlen, o->samples, o->seqlen, (long long)found);
}

static err_code windows_first(int32_t *ids, const corpus_opts *o, const tokenizer *t, const chat *c,
                              const job *j, err *e)
{
    const int64_t need = (int64_t)o->samples * o->seqlen;
    token_list all = {0};
    err_code rc = OK;
    for (int i = 0; i < o->n_paths && all.n < need && rc == OK; i++) {
        const corpus_read r = {.dataset = o->dataset,
                               .meta_instruction = o->meta_instruction,
                               .max_tokens = need - all.n};
        rc = corpus_tokens(&all, o->paths[i], &r, t, c, j, e);
    }
    if (rc == OK && all.n < need) rc = too_few(o, all.n, e);
    if (rc == OK) memcpy(ids, all.ids, (size_t)need * sizeof *ids);
    token_list_free(&all);
    return rc;
}

/* r as a place in [0,n); n is below 2^32, so that the bias stays below n / 2^32. */
static int64_t scaled(uint64_t r, int64_t n) { return (int64_t)((r >> 32) * (uint64_t)n >> 32); }

/* Where the k-th window begins among all places of all files; ends[] are the ends of the files'
 * tokens. */
static int64_t place_of(const int64_t *ends, int n_files, int32_t seqlen, int64_t k)
{
    int64_t begin = 0;
    for (int i = 0; i < n_files; i++) {
        const int64_t places = ends[i] - begin - seqlen + 1;
        if (places > 0 && k < places) return begin + k;
        if (places > 0) k -= places;
        begin = ends[i];
    }
    return -1;
}

static err_code windows_random(int32_t *ids, const corpus_opts *o, const tokenizer *t,
                               const chat *c, const job *j, err *e)
{
    token_list all = {0};
    int64_t *ends = NULL, places = 0;
    err_code rc = mem_alloc((void **)&ends, (size_t)o->n_paths, sizeof *ends, "corpus", e);
    for (int i = 0; i < o->n_paths && rc == OK; i++) {
        const int64_t begin = all.n;
        const corpus_read r = {.dataset = o->dataset,
                               .meta_instruction = o->meta_instruction,
                               .max_tokens = STREAM_MAX_TOKENS - all.n};
        if (all.n < STREAM_MAX_TOKENS) rc = corpus_tokens(&all, o->paths[i], &r, t, c, j, e);
        if (all.n == STREAM_MAX_TOKENS && begin < all.n)
            job_log(j, LOG_WARN, "%s: windows are drawn from the first %lld tokens", o->paths[i],
                    (long long)STREAM_MAX_TOKENS);
        ends[i] = all.n;
        if (all.n - begin >= o->seqlen) places += all.n - begin - o->seqlen + 1;
    }
    if (rc == OK && places == 0)
        rc = err_set(e, E_INPUT, "%s: expected a file with at least %d tokens, found %lld",
                     o->paths[0], o->seqlen, (long long)all.n);
    if (rc == OK && all.n < (int64_t)o->samples * o->seqlen)
        job_log(j, LOG_WARN, "%d windows of %d from %lld tokens: they overlap", o->samples,
                o->seqlen, (long long)all.n);
    for (int32_t i = 0; i < o->samples && rc == OK; i++) {
        const uint64_t r = corpus_random(o->seed, (uint64_t)i);
        const int64_t k = scaled(r, places);
        memcpy(ids + (int64_t)i * o->seqlen, all.ids + place_of(ends, o->n_paths, o->seqlen, k),
               (size_t)o->seqlen * sizeof *ids);
    }
    mem_free(ends);
    token_list_free(&all);
    return rc;
}

/* ---- documents drawn at random: those with the smallest keys, a key being random of seed and
 * number ---- */

typedef struct {
    uint64_t key, number;
    int32_t *ids;
    int64_t n;
} drawn;

typedef struct {
    const corpus_opts *o;
    const corpus_read *r;
    const tokenizer *t;
    const chat *c;
    bool pile;
    drawn *heap; /* [cap] largest key on top */
    int64_t n, cap;
    int64_t tokens;  /* held in all */
    uint64_t number; /* of the document at hand */
    int64_t seen, fit;
} draw;

static bool drawn_before(const drawn *a, const drawn *b)
{
    return a->key != b->key ? a->key < b->key : a->number < b->number;
}

static void sift(drawn *h, int64_t n, int64_t i)
{
    const drawn x = h[i];
    for (int64_t c; (c = 2 * i + 1) < n; i = c) {
        if (c + 1 < n && drawn_before(&h[c], &h[c + 1])) c++;
        if (!drawn_before(&x, &h[c])) break;
        h[i] = h[c];
    }
    h[i] = x;
}

static void drop_top(draw *d)
{
    d->tokens -= d->heap[0].n;
    mem_free(d->heap[0].ids);
    d->heap[0] = d->heap[--d->n];
    if (d->n) sift(d->heap, d->n, 0);
}

static int64_t wanted(const draw *d)
{
    return d->pile ? (int64_t)d->o->samples * d->o->seqlen : d->o->samples;
}

/* Enough is held, also without the top. */
static bool top_is_spare(const draw *d)
{
    return d->n && (d->pile ? d->tokens - d->heap[0].n >= wanted(d) : d->n - 1 >= wanted(d));
}

static bool enough(const draw *d) { return d->pile ? d->tokens >= wanted(d) : d->n >= wanted(d); }

static err_code hold(draw *d, uint64_t key, token_list *ids, err *e)
{
    if (d->n == d->cap) {
        drawn *p;
        const int64_t cap = d->cap ? 2 * d->cap : 64;
        TRY(mem_alloc((void **)&p, (size_t)cap, sizeof *p, "corpus", e));
        if (d->n) memcpy(p, d->heap, (size_t)d->n * sizeof *p);
        mem_free(d->heap);
        d->heap = p;
        d->cap = cap;
    }
    int64_t i = d->n++;
    const drawn x = {key, d->number, ids->ids, ids->n};
    *ids = (token_list){0};
    d->tokens += x.n;
    for (; i > 0 && drawn_before(&d->heap[(i - 1) / 2], &x); i = (i - 1) / 2)
        d->heap[i] = d->heap[(i - 1) / 2];
    d->heap[i] = x;
    while (top_is_spare(d)) drop_top(d);
    return OK;
}

static bool fits(const draw *d, const token_list *ids)
{
    return d->pile ? ids->n >= 1 && ids->n <= PILEVAL_MAX_TOKENS : ids->n >= d->o->seqlen;
}

static err_code draw_row(void *ctx, const corpus_row *row, bool *stop, err *e)
{
    draw *d = ctx;
    corpus_row doc = *row;
    token_list ids = {0};
    const bool first = d->o->pick == PICK_FIRST;
    const uint64_t key = first ? d->number : corpus_random(d->o->seed, d->number);
    d->seen++;
    if (doc.text && d->pile) corpus_strip(&doc.text, &doc.n);
    const bool late = enough(d) && key > d->heap[0].key;
    const bool short_text = doc.text && (d->pile ? doc.n == 0 : doc.n + 1 < (size_t)d->o->seqlen);
    err_code rc = OK;
    if (!late && !short_text) {
        rc = corpus_document(&ids, &doc, d->r, d->t, d->c, e);
        if (rc == OK && ids.n > DOCUMENT_MAX_TOKENS) ids.n = DOCUMENT_MAX_TOKENS;
        if (rc == OK && fits(d, &ids)) {
            d->fit++;
            rc = hold(d, key, &ids, e);
        }
    }
    token_list_free(&ids);
    d->number++;
    *stop = first && enough(d);
    return rc;
}

static err_code windows_of_pile(int32_t *ids, const draw *d, err *e)
{
    const int64_t need = wanted(d);
    int64_t at = 0;
    if (d->tokens < need)
        return err_set(e, E_INPUT,
                       "%s: expected documents of 1 to %d tokens with %lld tokens in all, found "
                       "%lld in %lld of %lld documents",
                       d->o->paths[0], PILEVAL_MAX_TOKENS, (long long)need, (long long)d->tokens,
                       (long long)d->fit, (long long)d->seen);
    for (int64_t i = 0; i < d->n && at < need; i++) {
        const int64_t n = d->heap[i].n < need - at ? d->heap[i].n : need - at;
        memcpy(ids + at, d->heap[i].ids, (size_t)n * sizeof *ids);
        at += n;
    }
    return OK;
}

/* With fewer documents than windows each is used again with another crop. */
static err_code windows_of_crops(int32_t *ids, const draw *d, const job *j, err *e)
{
    const corpus_opts *o = d->o;
    const bool first = o->pick == PICK_FIRST;
    if (d->n == 0 || (first && d->n < o->samples))
        return err_set(
            e, E_INPUT, "%s: expected %d documents with at least %d tokens, found %lld of %lld",
            o->paths[0], first ? o->samples : 1, o->seqlen, (long long)d->n, (long long)d->seen);
    if (d->n < o->samples)
        job_log(j, LOG_WARN,
                "%lld documents with at least %d tokens for %d windows: some are used again",
                (long long)d->n, o->seqlen, o->samples);
    for (int32_t i = 0; i < o->samples; i++) {
        const drawn *x = &d->heap[i % d->n];
        const uint64_t r = first ? 0 : corpus_random(~o->seed, (uint64_t)i);
        const int64_t at = scaled(r, x->n - o->seqlen + 1);
        memcpy(ids + (int64_t)i * o->seqlen, x->ids + at, (size_t)o->seqlen * sizeof *ids);
    }
    return OK;
}

err_code corpus_document_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t,
                                 const chat *c, const job *j, err *e)
{
    const corpus_read r = {.meta_instruction = o->meta_instruction};
    draw d = {.o = o, .r = &r, .t = t, .c = c, .pile = strcmp(o->dataset, "pileval") == 0};
    err_code rc = OK;
    for (int i = 0; i < o->n_paths && rc == OK; i++)
        if (!(o->pick == PICK_FIRST && enough(&d)))
            rc = corpus_each_row(o->paths[i], draw_row, NULL, &d, j, e);
    for (int64_t n = d.n; n > 1 && rc == OK;) { /* the heap becomes a list by key */
        const drawn top = d.heap[0];
        d.heap[0] = d.heap[--n];
        sift(d.heap, n, 0);
        d.heap[n] = top;
    }
    if (rc == OK) rc = d.pile ? windows_of_pile(ids, &d, e) : windows_of_crops(ids, &d, j, e);
    for (int64_t i = 0; i < d.n; i++) mem_free(d.heap[i].ids);
    mem_free(d.heap);
    return rc;
}

err_code corpus_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t, const chat *c,
                        const job *j, err *e)
{
    corpus_join join;
    TRY(corpus_join_of(&join, o->dataset, e));
    if (o->n_paths < 1) return err_set(e, E_USAGE, "expected at least one data file");
    if (o->samples < 1 || o->seqlen < 1)
        return err_set(e, E_USAGE, "expected positive samples and seqlen, got %d and %d",
                       o->samples, o->seqlen);
    if (o->shares) return corpus_mixed_windows(ids, o, t, c, j, e);
    if (join == JOIN_DOCS) return corpus_document_windows(ids, o, t, c, j, e);
    return o->pick == PICK_FIRST ? windows_first(ids, o, t, c, j, e)
                                 : windows_random(ids, o, t, c, j, e);
}
