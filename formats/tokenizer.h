/* Tokenizers: sentencepiece .model (the library behind a C shim), tokenizer.json BPE (byte-level and
 * sentencepiece-style with byte fallback), vocab.json + merges.txt; added tokens of tokenizer_config.json. */
#ifndef TMF_FORMATS_TOKENIZER_H
#define TMF_FORMATS_TOKENIZER_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct tokenizer tokenizer;

err_code tokenizer_open(tokenizer **out, const char *dir, err *e);
void tokenizer_close(tokenizer **t);

typedef struct { int32_t *ids; int64_t n, cap; } token_list; /* zero-init; free with token_list_free */
err_code token_list_push(token_list *l, int32_t id, err *e);
void token_list_free(token_list *l);

/* Appends ids of `text` (UTF-8, n bytes; invalid bytes are handled as the original tokenizer does, or
 * E_INPUT). parse_special: added/special token strings in the text become their ids; else plain text.
 * Adds no BOS. Thread-safe on a shared tokenizer. */
err_code tokenizer_encode(const tokenizer *t, const char *text, size_t n, bool parse_special,
                          token_list *out, err *e);
/* Text of ids; the result is NUL-terminated, freed with mem_free. skip_special leaves special tokens out. */
err_code tokenizer_decode(const tokenizer *t, const int32_t *ids, int64_t n, bool skip_special, char **out,
                          size_t *out_n, err *e);
/* Streaming: appends the bytes that id adds behind the earlier ones; holds back an unfinished UTF-8
 * sequence. Zero-init the state; flush gives what is left (U+FFFD for a cut character). */
typedef struct { char held[16]; int n_held; bool started; } decode_state;
err_code tokenizer_decode_next(const tokenizer *t, decode_state *st, int32_t id, bool skip_special, char *buf,
                               size_t cap, size_t *n, err *e);
void tokenizer_decode_flush(decode_state *st, char *buf, size_t cap, size_t *n);

int32_t tokenizer_vocab(const tokenizer *t);            /* ids are below this */
int32_t tokenizer_bos(const tokenizer *t);              /* -1 none */
int32_t tokenizer_eos(const tokenizer *t);              /* -1 none */
bool tokenizer_add_bos(const tokenizer *t);             /* the tokenizer puts BOS before a prompt */
int32_t tokenizer_id(const tokenizer *t, const char *piece); /* exact token string (also special); -1 none */
bool tokenizer_is_special(const tokenizer *t, int32_t id);
/* Bytes of one token as it stands in text ("" for special); borrowed. Needed by constrained decoding. */
const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *n);
const char *tokenizer_chat_template(const tokenizer *t); /* tokenizer_config.json's, NULL none */

#endif
