/* Parts of BPE tokenizers: merging, regular expressions, normalizers, pre-tokenizers. Not for
 * callers. */
#ifndef TMF_FORMATS_TOKENIZER_PARTS_H
#define TMF_FORMATS_TOKENIZER_PARTS_H

#include "base/json.h"
#include "formats/tokenizer.h"
#include "formats/tokenizer_vocab.h"

typedef enum {
    FRAG_FIRST, /* begins the text */
    FRAG_NEXT,  /* behind an added token */
    FRAG_CONT   /* continues text that was cut: never gets a prefix */
} frag_kind;

/* ---- BPE core ---- */
typedef struct {
    uint64_t pair;
    int32_t rank, id;
} bpe_merge; /* pair 0 marks an empty slot: it is left<<32|right, plus 1 */
typedef struct {
    bpe_merge *slot; /* [slots] */
    uint32_t slots, used;
} bpe_merges;
err_code bpe_merges_reserve(bpe_merges *m, uint32_t n, err *e);
err_code bpe_merges_put(bpe_merges *m, int32_t left, int32_t right, int32_t rank, int32_t id,
                        err *e);
void bpe_merges_free(bpe_merges *m);

typedef struct {
    int32_t id, prev, next;
    uint32_t at, len;
} bpe_symbol; /* at, len: bytes of the word */
typedef struct {
    int32_t rank, pos, id;
} bpe_entry;
typedef struct { /* reused from word to word; zero-init; free with bpe_work_free */
    bpe_symbol *sym;
    int32_t n, cap;
    bpe_entry *heap;
    int32_t heap_n, heap_cap;
} bpe_work;
err_code bpe_push(bpe_work *w, int32_t id, size_t at, size_t len, err *e);
void bpe_work_free(bpe_work *w);
/* Looks a pair of neighbours up: true with *rank and *id when they merge. */
typedef bool (*bpe_pair_fn)(const void *ctx, const bpe_symbol *a, const bpe_symbol *b,
                            int32_t *rank, int32_t *id);
/* Merges the pushed symbols, lowest rank first and leftmost among equals, O(n log n); appends
 * the ids. */
err_code bpe_run(bpe_work *w, bpe_pair_fn pair, const void *ctx, token_list *out, err *e);
bool bpe_pair_of_merges(const void *merges, const bpe_symbol *a, const bpe_symbol *b, int32_t *rank,
                        int32_t *id);

/* ---- regular expressions ---- */
/* Patterns of tokenizer files are written for Oniguruma; PCRE2 runs them in UTF and Unicode mode
 * with limits. What the two read differently is rewritten (\\s) or refused with E_UNSUPPORTED.
 * Shared between threads. */
typedef struct tok_regex tok_regex;
err_code tok_regex_open(tok_regex **out, const char *pattern, err *e);
void tok_regex_close(tok_regex **r);
/* The leftmost match at or behind `from` in valid UTF-8; *found false when there is none.
 * *scratch is made on first use, kept between calls and freed with tok_regex_scratch_free.
 * E_LIMIT when it takes too long. */
typedef struct tok_regex_scratch tok_regex_scratch;
err_code tok_regex_find(const tok_regex *r, tok_regex_scratch **scratch, const char *s, size_t n,
                        size_t from, bool *found, size_t *start, size_t *end, err *e);
void tok_regex_scratch_free(tok_regex_scratch **s);

/* ---- normalizers and pre-tokenizers ---- */
typedef struct tok_split tok_split;   /* a chain of pre-tokenizers */
typedef struct tok_normal tok_normal; /* a chain of normalizers */
typedef err_code (*tok_word_fn)(void *ctx, const char *word, size_t n, err *e);

err_code tok_normal_open(tok_normal **out, const cJSON *spec,
                         err *e); /* tokenizer.json's "normalizer", may be null */
err_code tok_normal_nfc(tok_normal **out, err *e);
err_code tok_normal_run(const tok_normal *s, const char *text, size_t n, frag_kind kind,
                        tok_buf *out, err *e);
bool tok_normal_can_cut(
    const tok_normal *s); /* a cut before a space or behind a line end changes nothing else */
void tok_normal_close(tok_normal **s);

err_code tok_split_open(tok_split **out, const cJSON *spec,
                        err *e); /* "pre_tokenizer", may be null */
err_code tok_split_regex(tok_split **out, const char *regex,
                         err *e);         /* Split by regex, then bytes */
bool tok_split_bytes(const tok_split *s); /* ends in ByteLevel: words are then raw bytes */
/* Calls each for every word from left to right. */
err_code tok_split_run(const tok_split *s, const char *text, size_t n, frag_kind kind,
                       tok_word_fn each, void *ctx, err *e);
/* See tok_ops.can_cut. */
bool tok_split_can_cut(const tok_split *s, const char *text, size_t n, size_t at);
void tok_split_close(tok_split **s);

extern const char tok_regex_gpt2[], tok_regex_qwen2[], tok_regex_llama3[];

/* The printable stand-ins of bytes in byte-level vocabularies. */
uint32_t bytelevel_code(uint8_t byte);
int bytelevel_byte(uint32_t code); /* -1: not one of them */
/* Bytes of a piece in the byte-level alphabet; a piece with another character stands for itself.
 * out has n. */
size_t bytelevel_text(char *out, const char *raw, size_t n);

/* Cuts (tok_ops.can_cut) for models that do not split words: text may be cut before a space (or
 * U+2581) and behind a line end unless some piece reaches across there. Computed from the
 * vocabulary once. */
typedef struct {
    uint8_t space[32]; /* bit: a piece has a space behind this byte */
    uint8_t line[32];  /* bit: a piece has this byte behind a line end */
    bool off;          /* never cut */
} cut_rules;
void cut_rules_of(cut_rules *c, const vocab *v);
bool cut_rules_ok(const cut_rules *c, const char *s, size_t n, size_t at);

#endif
