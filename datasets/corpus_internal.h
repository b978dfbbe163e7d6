/* What the corpus files share; not for callers. */
#ifndef TMF_DATASETS_CORPUS_INTERNAL_H
#define TMF_DATASETS_CORPUS_INTERNAL_H

#include "datasets/corpus.h"
#include "datasets/source.h"

#define CORPUS_MAX_LINE ((size_t)64 << 20) /* bytes of one jsonl line */
#define CORPUS_PART     ((size_t)1 << 20)  /* text is tokenized in parts of about this size */
#define CORPUS_MAX_TEXT ((size_t)1 << 30)  /* text without a place to cut, bytes */

typedef enum {
    JOIN_NONE,
    JOIN_WIKITEXT,
    JOIN_PTB,
    JOIN_DOCS
} corpus_join; /* DOCS: c4 and pileval */
/* E_USAGE for an unknown name; NULL and "self" are JOIN_NONE. */
err_code corpus_join_of(corpus_join *out, const char *dataset, err *e);

/* ---- growable bytes ---- */
typedef struct {
    char *p;
    size_t n, cap;
} corpus_buf; /* zero-init; a NUL fits behind n */
err_code corpus_buf_add(corpus_buf *b, const char *s, size_t n, err *e);
void corpus_buf_free(corpus_buf *b);
/* White space (ASCII) taken off both ends. */
void corpus_strip(const char **s, size_t *n);

/* ---- rows: what a file holds one after another ---- */
typedef struct {
    const char *text; /* a text of n bytes, valid UTF-8; NULL: a dialogue */
    size_t n;
    const chat_message *messages;
    int64_t n_messages;
    bool line; /* a line of a text file, without its line end */
} corpus_row;
/* *stop set ends the reading early. */
typedef err_code (*row_fn)(void *ctx, const corpus_row *row, bool *stop, err *e);
/* Rows of every file in `path`: jsonl objects, or (lines) lines of text. Files that are not
 * jsonl are handed to `whole` when it is given instead: it reads from the source to the end. */
typedef err_code (*whole_fn)(void *ctx, source *s, bool *stop, err *e);
err_code corpus_each_row(const char *path, row_fn each, whole_fn whole, void *ctx, const job *j,
                         err *e);

/* ---- tokens ---- */
typedef struct { /* feeds text piece by piece into tokens */
    const tokenizer *t;
    token_list *out;
    int64_t max_tokens; /* of out, 0: any */
    bool parse_special, bos;
    const char *where; /* for messages; borrowed */
    corpus_buf carry;  /* not tokenized yet */
    bool begun;        /* the carry continues a text */
    uint64_t offset;   /* of carry in the text */
} feeder;
err_code corpus_feed_add(feeder *f, const char *s, size_t n, err *e);
err_code corpus_feed_end(feeder *f, err *e); /* the text ends: ready for another one */
bool corpus_feed_full(const feeder *f);
void corpus_feed_free(feeder *f);

/* One document: its BOS where the tokenizer puts one (text), or by the template (dialogue). */
err_code corpus_document(token_list *out, const corpus_row *row, const corpus_read *r,
                         const tokenizer *t, const chat *c, err *e);

/* splitmix64's finaliser over seed and counter. */
uint64_t corpus_random(uint64_t seed, uint64_t counter);

/* Windows of files with shares. */
err_code corpus_mixed_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t, const chat *c,
                              const job *j, err *e);

/* Windows of c4 and pileval. */
err_code corpus_document_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t,
                                 const chat *c, const job *j, err *e);

#endif
