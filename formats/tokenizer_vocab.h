/* Tables of a tokenizer: growable bytes, pieces by id and by string, added tokens. Not for
 * callers. */
#ifndef TMF_FORMATS_TOKENIZER_VOCAB_H
#define TMF_FORMATS_TOKENIZER_VOCAB_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Limits on what files may ask for. */
#define TOK_MAX_VOCAB       (1 << 22) /* ids are below this */
#define TOK_MAX_PIECE       65536     /* bytes of one piece */
#define TOK_MAX_ADDED_BYTES 1024      /* bytes of one added token: bounds the match at each place */
#define TOK_MAX_JSON        ((size_t)256 << 20) /* bytes of tokenizer.json */
#define TOK_MAX_MODEL       ((size_t)64 << 20)  /* bytes of a sentencepiece model */
#define TOK_MAX_TEXT        ((size_t)1 << 30)   /* bytes of text of one call */
#define TOK_CHUNK \
    ((size_t)128 << 10) /* text is encoded in parts of about this size where cuts are safe */

/* ---- growable bytes ---- */
typedef struct {
    char *p;
    size_t n, cap;
} tok_buf; /* zero-init; always has room for a NUL behind n */
err_code tok_buf_reserve(tok_buf *b, size_t more, err *e);
err_code tok_buf_add(tok_buf *b, const char *s, size_t n, err *e);
void tok_buf_free(tok_buf *b);

/* ---- UTF-8 ---- */
/* Length of the valid character at s (n >= 1 bytes there), 0 when it is not valid. */
size_t utf8_len(const char *s, size_t n);
/* The code point of a valid character. */
uint32_t utf8_code(const char *s, size_t len);
size_t utf8_put(char *out, uint32_t c); /* at most 4 bytes */
bool tok_is_white(uint32_t c);          /* Unicode White_Space */

/* ---- piece table ---- */
enum {
    PIECE_SET = 1,
    PIECE_SPECIAL = 2,
    PIECE_BYTE = 4,
    PIECE_UNK = 8,
    PIECE_ADDED = 16 /* not of the model's own vocabulary */
};
typedef struct {
    uint64_t raw,
        text; /* offsets in vocab.blob: the string as stored, the bytes as they stand in text */
    uint32_t raw_len, text_len;
    uint8_t flags;
} vocab_piece;
typedef struct {
    tok_buf blob;
    vocab_piece *piece; /* [cap], n used; ids without PIECE_SET are holes */
    int32_t n, cap;
    uint32_t *slot; /* [slots] id + 1, 0 empty; by hash of the stored string */
    uint32_t slots, used;
    struct vocab_name {
        uint64_t at;
        uint32_t len;
        int32_t id;
    } * alias; /* further strings of an id */
    int32_t n_alias, cap_alias;
} vocab;
/* Stores a piece. A string that is there already with another id: E_INPUT, unless it is a
 * hole's. `text` NULL means the same bytes as the string. An id set before keeps its old string
 * as an alias. */
err_code vocab_add(vocab *v, int32_t id, const char *raw, size_t n, const char *text, size_t text_n,
                   uint8_t flags, err *e);
err_code vocab_reserve(vocab *v, int32_t n, err *e);
int32_t vocab_find(const vocab *v, const char *raw, size_t n); /* -1 none */
void vocab_free(vocab *v);
static inline const char *vocab_raw(const vocab *v, int32_t id)
{
    return v->blob.p + v->piece[id].raw;
}
static inline const char *vocab_text(const vocab *v, int32_t id)
{
    return v->blob.p + v->piece[id].text;
}

/* ---- added tokens ---- */
typedef struct {
    int32_t id;
    uint64_t at; /* content, in added_set.blob */
    uint32_t len;
    bool special, lstrip, rstrip, single_word, normalized;
} added_token;
typedef struct {    /* a trie over bytes, its edges in one hash table; longest match at a place */
    uint64_t *edge; /* [slots] (node << 8 | byte) + 1, 0 empty */
    uint32_t *to;   /* [slots] */
    uint32_t slots, edges, nodes;
    int32_t *leaf; /* [cap_nodes] index into added_set.tok, -1 none */
    uint32_t cap_nodes;
    bool first[256]; /* some string begins with this byte */
} added_trie;
typedef struct {
    tok_buf blob;
    added_token *tok; /* [cap], n used */
    int32_t n, cap;
    added_trie all;       /* every content: lookups */
    added_trie raw, norm; /* those to match in text as it is, and in normalized text (tok_finish) */
    bool no_cuts; /* some token may reach across a place where text would be cut (tok_finish) */
} added_set;
/* Adds or, where the content is known, changes. */
err_code added_put(added_set *a, const char *s, size_t n, added_token t, err *e);
const added_token *added_find(const added_set *a, const char *s, size_t n);
err_code trie_put(added_trie *t, const char *s, size_t n, int32_t leaf, err *e);
/* Longest string at s; returns its index or -1 and sets *len. */
int32_t trie_match(const added_trie *t, const char *s, size_t n, size_t *len);
void trie_free(added_trie *t);
void added_free(added_set *a);

#endif
