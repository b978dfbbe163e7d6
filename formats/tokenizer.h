/* Tokenizers: sentencepiece .model (the library behind a C shim), tokenizer.json BPE (byte-level
 * and sentencepiece-style with byte fallback), vocab.json + merges.txt; added tokens of
 * tokenizer_config.json. */
#ifndef TMF_FORMATS_TOKENIZER_H
#define TMF_FORMATS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct tokenizer tokenizer;

/* Files in `dir` are looked for in this order: tokenizer.json (when its model is BPE),
 * tokenizer.model (sentencepiece or tiktoken ranks), vocab.json with merges.txt, *.tiktoken;
 * tokenizer_config.json, special_tokens_map.json, added_tokens.json and chat_template.* add to
 * it. Where transformers applies `clean_up_tokenization_spaces` on decoding, this does not.
 * E_INPUT names the file and what is wrong. */
err_code tokenizer_open(tokenizer **out, const char *dir, err *e);
/* One of the files above; the others of its folder that describe it (configs, merges) are read
 * as well. */
err_code tokenizer_open_file(tokenizer **out, const char *path, err *e);
/* The bytes of one file, its kind told by `name`; nothing else is read. For tests and fuzzing. */
err_code tokenizer_open_memory(tokenizer **out, const char *name, const void *data, size_t n,
                               err *e);
void tokenizer_close(tokenizer **t);

typedef struct {
    int32_t *ids;
    int64_t n, cap;
} token_list; /* zero-init; free with token_list_free */
err_code token_list_push(token_list *l, int32_t id, err *e);
void token_list_free(token_list *l);

/* Appends ids of `text` (UTF-8, n bytes, at most 1 GiB). Invalid UTF-8: sentencepiece reads
 * U+FFFD for each such byte, others give E_INPUT. parse_special: strings of special tokens in
 * the text become their ids; else they are plain text (added tokens that are not special are
 * found in any case, as in the original tokenizers). Adds no BOS. Thread-safe on a shared
 * tokenizer. */
err_code tokenizer_encode(const tokenizer *t, const char *text, size_t n, bool parse_special,
                          token_list *out, err *e);
/* Text in parts: plain text or, where id >= 0, one token (text unused). Special-token strings in
 * the text parts stay text, so this is how chat prompts are made from users' words. */
typedef struct {
    const char *text;
    size_t n;
    int32_t id;
} token_seg;
err_code tokenizer_encode_segs(const tokenizer *t, const token_seg *segs, int64_t n_segs,
                               bool begins, token_list *out,
                               err *e); /* begins: nothing stands before */
/* The first special token's string in text[0,n): false when there is none. */
bool tokenizer_find_special(const tokenizer *t, const char *text, size_t n, size_t *at, size_t *len,
                            int32_t *id);
/* The string of a token as the files have it, also of special ones; "" for none. Borrowed,
 * NUL-terminated unless it holds a NUL itself (see *n). */
const char *tokenizer_string(const tokenizer *t, int32_t id, size_t *n);
/* A long text in pieces: the largest p <= n such that text[0,p) and what follows, encoded one
 * after another with tokenizer_encode_part (only the first with `begins`), give the ids of the
 * whole, whatever follows text[0,n); 0 when no such place is known. No special tokens are
 * parsed. */
size_t tokenizer_cut(const tokenizer *t, const char *text, size_t n);
err_code tokenizer_encode_part(const tokenizer *t, const char *text, size_t n, bool begins,
                               token_list *out, err *e);
/* Text of ids; the result is NUL-terminated, freed with mem_free. skip_special leaves special
 * tokens out. */
err_code tokenizer_decode(const tokenizer *t, const int32_t *ids, int64_t n, bool skip_special,
                          char **out, size_t *out_n, err *e);
/* Streaming: appends the bytes that id adds behind the earlier ones; holds back an unfinished
 * UTF-8 sequence. `cap` of three times the longest token's bytes plus 16 always suffices, else
 * E_LIMIT. The parts joined are what tokenizer_decode gives. An id within the model's table but
 * without a token adds nothing. Zero-init the state; flush gives what is left (U+FFFD for a cut
 * character; cap of 16). */
typedef struct {
    char held[16];
    int n_held;
    bool started, each;
} decode_state;
err_code tokenizer_decode_next(const tokenizer *t, decode_state *st, int32_t id, bool skip_special,
                               char *buf, size_t cap, size_t *n, err *e);
void tokenizer_decode_flush(decode_state *st, char *buf, size_t cap, size_t *n);

int32_t tokenizer_vocab(const tokenizer *t); /* ids are below this */
int32_t tokenizer_bos(const tokenizer *t);   /* -1 none */
int32_t tokenizer_eos(const tokenizer *t);   /* -1 none */
bool tokenizer_add_bos(const tokenizer *t);  /* the tokenizer puts BOS before a prompt */
int32_t tokenizer_id(const tokenizer *t,
                     const char *piece); /* exact token string (also special); -1 none */
bool tokenizer_is_special(const tokenizer *t, int32_t id);
/* Bytes of one token as it stands in text ("" for special); borrowed. Needed by constrained
 * decoding. */
const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *n);
const char *tokenizer_chat_template(const tokenizer *t); /* tokenizer_config.json's, NULL none */

#endif
