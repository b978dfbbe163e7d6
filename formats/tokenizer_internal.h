/* What the tokenizer files share; not for callers. A tokenizer is a piece table (vocab), a set of added
 * tokens that are cut out of the text first, and a model that encodes the text between them. */
#ifndef TMF_FORMATS_TOKENIZER_INTERNAL_H
#define TMF_FORMATS_TOKENIZER_INTERNAL_H

#include "base/json.h"
#include "formats/tokenizer.h"

/* Limits on what files may ask for. */
#define TOK_MAX_VOCAB (1 << 22)           /* ids are below this */
#define TOK_MAX_PIECE 65536               /* bytes of one piece */
#define TOK_MAX_ADDED_BYTES 1024          /* bytes of one added token: bounds the match at each place */
#define TOK_MAX_JSON ((size_t)256 << 20)  /* bytes of tokenizer.json */
#define TOK_MAX_MODEL ((size_t)64 << 20)  /* bytes of a sentencepiece model */
#define TOK_MAX_TEXT ((size_t)1 << 30)    /* bytes of text of one call */
#define TOK_CHUNK ((size_t)128 << 10)     /* text is encoded in parts of about this size where cuts are safe */

/* ---- growable bytes ---- */
typedef struct { char *p; size_t n, cap; } tok_buf; /* zero-init; always has room for a NUL behind n */
err_code tok_buf_reserve(tok_buf *b, size_t more, err *e);
err_code tok_buf_add(tok_buf *b, const char *s, size_t n, err *e);
void tok_buf_free(tok_buf *b);

/* ---- UTF-8 ---- */
/* Length of the valid character at s (n >= 1 bytes there), 0 when it is not valid. */
size_t utf8_len(const char *s, size_t n);
/* The code point of a valid character. */
uint32_t utf8_code(const char *s, size_t len);
size_t utf8_put(char *out, uint32_t c); /* at most 4 bytes */

/* ---- piece table ---- */
enum {
    PIECE_SET = 1,
    PIECE_SPECIAL = 2,
    PIECE_BYTE = 4,
    PIECE_UNK = 8,
    PIECE_ADDED = 16 /* not of the model's own vocabulary */
};
typedef struct {
    uint64_t raw, text; /* offsets in vocab.blob: the string as stored, the bytes as they stand in text */
    uint32_t raw_len, text_len;
    uint8_t flags;
} vocab_piece;
typedef struct {
    tok_buf blob;
    vocab_piece *piece; /* [cap], n used; ids without PIECE_SET are holes */
    int32_t n, cap;
    uint32_t *slot;     /* [slots] id + 1, 0 empty; by hash of the stored string */
    uint32_t slots, used;
    struct vocab_name { uint64_t at; uint32_t len; int32_t id; } *alias; /* further strings of an id */
    int32_t n_alias, cap_alias;
} vocab;
/* Stores a piece. A string that is there already with another id: E_INPUT, unless it is a hole's. `text`
 * NULL means the same bytes as the string. An id set before keeps its old string as an alias. */
err_code vocab_add(vocab *v, int32_t id, const char *raw, size_t n, const char *text, size_t text_n,
                   uint8_t flags, err *e);
err_code vocab_reserve(vocab *v, int32_t n, err *e);
int32_t vocab_find(const vocab *v, const char *raw, size_t n); /* -1 none */
void vocab_free(vocab *v);
static inline const char *vocab_raw(const vocab *v, int32_t id) { return v->blob.p + v->piece[id].raw; }
static inline const char *vocab_text(const vocab *v, int32_t id) { return v->blob.p + v->piece[id].text; }

/* ---- added tokens ---- */
typedef struct {
    int32_t id;
    uint64_t at;   /* content, in added_set.blob */
    uint32_t len;
    bool special, lstrip, rstrip, single_word, normalized;
} added_token;
typedef struct { /* a trie over bytes, its edges in one hash table; longest match at a place */
    uint64_t *edge; /* [slots] (node << 8 | byte) + 1, 0 empty */
    uint32_t *to;   /* [slots] */
    uint32_t slots, edges, nodes;
    int32_t *leaf;  /* [cap_nodes] index into added_set.tok, -1 none */
    uint32_t cap_nodes;
    bool first[256]; /* some string begins with this byte */
} added_trie;
typedef struct {
    tok_buf blob;
    added_token *tok; /* [cap], n used */
    int32_t n, cap;
    added_trie all;       /* every content: lookups */
    added_trie raw, norm; /* those to match in text as it is, and in normalized text (tok_finish) */
    bool no_cuts;         /* some token may reach across a place where text would be cut (tok_finish) */
} added_set;
/* Adds or, where the content is known, changes. */
err_code added_put(added_set *a, const char *s, size_t n, added_token t, err *e);
const added_token *added_find(const added_set *a, const char *s, size_t n);
err_code trie_put(added_trie *t, const char *s, size_t n, int32_t leaf, err *e);
/* Longest string at s; returns its index or -1 and sets *len. */
int32_t trie_match(const added_trie *t, const char *s, size_t n, size_t *len);
void trie_free(added_trie *t);
void added_free(added_set *a);

/* ---- models: what encodes text between added tokens ---- */
typedef enum {
    FRAG_FIRST, /* begins the text */
    FRAG_NEXT,  /* behind an added token */
    FRAG_CONT   /* continues text that was cut: never gets a prefix */
} frag_kind;
typedef struct {
    void (*close)(void *self);
    /* Brings a fragment into the form that normalized added tokens are matched in; NULL: as it is. */
    err_code (*normalize)(const void *self, const char *s, size_t n, frag_kind kind, tok_buf *out, err *e);
    /* Ids of a (normalized) fragment. Thread-safe. */
    err_code (*encode)(const void *self, const char *s, size_t n, frag_kind kind, token_list *out, err *e);
    /* Whether s[0,at) and s[at,n), the second as FRAG_CONT, give the ids of s; 0 < at < n. Holds for
     * normalized text and, with `raw`, for text that is not normalized yet. NULL: never. */
    bool (*can_cut)(const void *self, const char *s, size_t n, size_t at, bool raw);
} tok_ops;

typedef enum { TEXT_BYTES, TEXT_SPM } text_kind; /* how invalid bytes are replaced: maximal parts, or each */

typedef enum {
    STRIP_NONE, STRIP_ONE, /* one space */
    STRIP_TOKEN,           /* every space of the first token */
    STRIP_ALL              /* all leading spaces */
} strip_kind;

struct tokenizer {
    const tok_ops *ops;
    void *self;
    vocab v;
    added_set added;
    int32_t bos, eos, unk;
    int32_t lead_piece;     /* piece put before an added token that is not special and begins the text; -1 */
    bool add_bos;
    bool add_bos_known;     /* a file said so */
    strip_kind strip;       /* what decoding drops at the very start of a text */
    text_kind text;
    char *chat_template;
    char *unk_text;         /* what an unknown id is shown as; NULL: its own string */
};

bool tok_is_white(uint32_t c); /* Unicode White_Space */

/* Openers: fill t (zeroed, ids -1) from bytes; `name` goes into messages. */
err_code tok_open_spm(tokenizer *t, const char *name, const char *data, size_t n, const cJSON *config, err *e);
err_code tok_open_json(tokenizer *t, const char *name, const char *data, size_t n, err *e);
err_code tok_open_vocab_merges(tokenizer *t, const char *vocab_path, const char *merges_path,
                               const cJSON *config, err *e);
err_code tok_open_tiktoken(tokenizer *t, const char *name, const char *data, size_t n, err *e);

/* tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.*: `dir` NULL reads none.
 * *config is NULL when there is no tokenizer_config.json; free with cJSON_Delete. */
err_code tok_config_load(cJSON **config, const char *dir, err *e);
err_code tok_config_apply(tokenizer *t, const char *dir, const cJSON *config, err *e);
/* config[key] as the string of a token: a string or an object with `content`; NULL none. */
const char *tok_config_token(const cJSON *config, const char *key);
/* Registers an added token and its piece. */
err_code tok_add_token(tokenizer *t, const char *s, size_t n, added_token flags, err *e);
/* Builds the tries once all added tokens are known. */
err_code tok_finish(tokenizer *t, err *e);

/* ---- BPE core ---- */
typedef struct { uint64_t pair; int32_t rank, id; } bpe_merge; /* pair 0 marks an empty slot: it is left<<32|right, plus 1 */
typedef struct {
    bpe_merge *slot; /* [slots] */
    uint32_t slots, used;
} bpe_merges;
err_code bpe_merges_reserve(bpe_merges *m, uint32_t n, err *e);
err_code bpe_merges_put(bpe_merges *m, int32_t left, int32_t right, int32_t rank, int32_t id, err *e);
void bpe_merges_free(bpe_merges *m);

typedef struct { int32_t id, prev, next; uint32_t at, len; } bpe_symbol; /* at, len: bytes of the word */
typedef struct { int32_t rank, pos, id; } bpe_entry;
typedef struct { /* reused from word to word; zero-init; free with bpe_work_free */
    bpe_symbol *sym;
    int32_t n, cap;
    bpe_entry *heap;
    int32_t heap_n, heap_cap;
} bpe_work;
err_code bpe_push(bpe_work *w, int32_t id, size_t at, size_t len, err *e);
void bpe_work_free(bpe_work *w);
/* Looks a pair of neighbours up: true with *rank and *id when they merge. */
typedef bool (*bpe_pair_fn)(const void *ctx, const bpe_symbol *a, const bpe_symbol *b, int32_t *rank, int32_t *id);
/* Merges the pushed symbols, lowest rank first and leftmost among equals, O(n log n); appends the ids. */
err_code bpe_run(bpe_work *w, bpe_pair_fn pair, const void *ctx, token_list *out, err *e);
bool bpe_pair_of_merges(const void *merges, const bpe_symbol *a, const bpe_symbol *b, int32_t *rank, int32_t *id);

/* ---- regular expressions ---- */
/* Patterns of tokenizer files are written for Oniguruma; PCRE2 runs them in UTF and Unicode mode with limits.
 * What the two read differently is rewritten (\\s) or refused with E_UNSUPPORTED. Shared between threads. */
typedef struct tok_regex tok_regex;
err_code tok_regex_open(tok_regex **out, const char *pattern, err *e);
void tok_regex_close(tok_regex **r);
/* The leftmost match at or behind `from` in valid UTF-8; *found false when there is none. *scratch is made on
 * first use, kept between calls and freed with tok_regex_scratch_free. E_LIMIT when it takes too long. */
typedef struct tok_regex_scratch tok_regex_scratch;
err_code tok_regex_find(const tok_regex *r, tok_regex_scratch **scratch, const char *s, size_t n, size_t from,
                        bool *found, size_t *start, size_t *end, err *e);
void tok_regex_scratch_free(tok_regex_scratch **s);

/* ---- normalizers and pre-tokenizers ---- */
typedef struct tok_split tok_split;   /* a chain of pre-tokenizers */
typedef struct tok_normal tok_normal; /* a chain of normalizers */
typedef err_code (*tok_word_fn)(void *ctx, const char *word, size_t n, err *e);

err_code tok_normal_open(tok_normal **out, const cJSON *spec, err *e); /* tokenizer.json's "normalizer", may be null */
err_code tok_normal_nfc(tok_normal **out, err *e);
err_code tok_normal_run(const tok_normal *s, const char *text, size_t n, frag_kind kind, tok_buf *out, err *e);
bool tok_normal_can_cut(const tok_normal *s); /* a cut before a space or behind a line end changes nothing else */
void tok_normal_close(tok_normal **s);

err_code tok_split_open(tok_split **out, const cJSON *spec, err *e);  /* "pre_tokenizer", may be null */
err_code tok_split_regex(tok_split **out, const char *regex, err *e); /* Split by regex, then bytes */
bool tok_split_bytes(const tok_split *s); /* ends in ByteLevel: words are then raw bytes */
/* Calls each for every word from left to right. */
err_code tok_split_run(const tok_split *s, const char *text, size_t n, frag_kind kind, tok_word_fn each,
                       void *ctx, err *e);
/* See tok_ops.can_cut. */
bool tok_split_can_cut(const tok_split *s, const char *text, size_t n, size_t at);
void tok_split_close(tok_split **s);

extern const char tok_regex_gpt2[], tok_regex_qwen2[], tok_regex_llama3[];

/* The printable stand-ins of bytes in byte-level vocabularies. */
uint32_t bytelevel_code(uint8_t byte);
int bytelevel_byte(uint32_t code); /* -1: not one of them */
/* Bytes of a piece in the byte-level alphabet; a piece with another character stands for itself. out has n. */
size_t bytelevel_text(char *out, const char *raw, size_t n);

/* Cuts (tok_ops.can_cut) for models that do not split words: text may be cut before a space (or U+2581) and
 * behind a line end unless some piece reaches across there. Computed from the vocabulary once. */
typedef struct {
    uint8_t space[32]; /* bit: a piece has a space behind this byte */
    uint8_t line[32];  /* bit: a piece has this byte behind a line end */
    bool off;          /* never cut */
} cut_rules;
void cut_rules_of(cut_rules *c, const vocab *v);
bool cut_rules_ok(const cut_rules *c, const char *s, size_t n, size_t at);

#endif
