/* What the tokenizer files share; not for callers. A tokenizer is a piece table (vocab), a set
 * of added tokens that are cut out of the text first, and a model that encodes the text between
 * them. */
#ifndef TMF_FORMATS_TOKENIZER_INTERNAL_H
#define TMF_FORMATS_TOKENIZER_INTERNAL_H

#include "formats/tokenizer_parts.h"

/* ---- models: what encodes text between added tokens ---- */
typedef struct {
    void (*close)(void *self);
    /* Brings a fragment into the form that normalized added tokens are matched in; NULL: as it
     * is. */
    err_code (*normalize)(const void *self, const char *s, size_t n, frag_kind kind, tok_buf *out,
                          err *e);
    /* Ids of a (normalized) fragment. Thread-safe. */
    err_code (*encode)(const void *self, const char *s, size_t n, frag_kind kind, token_list *out,
                       err *e);
    /* Whether s[0,at) and s[at,n), the second as FRAG_CONT, give the ids of s; 0 < at < n. Holds
     * for normalized text and, with `raw`, for text that is not normalized yet. NULL: never. */
    bool (*can_cut)(const void *self, const char *s, size_t n, size_t at, bool raw);
} tok_ops;

typedef enum {
    TEXT_BYTES,
    TEXT_SPM
} text_kind; /* how invalid bytes are replaced: maximal parts, or each */

typedef enum {
    STRIP_NONE,
    STRIP_ONE,   /* one space */
    STRIP_TOKEN, /* every space of the first token */
    STRIP_ALL    /* all leading spaces */
} strip_kind;

struct tokenizer {
    const tok_ops *ops;
    void *self;
    vocab v;
    added_set added;
    int32_t bos, eos, unk;
    int32_t lead_piece; /* put before a non-special added token that begins the text; -1 */
    bool add_bos;
    bool add_bos_known; /* a file said so */
    strip_kind strip;   /* what decoding drops at the very start of a text */
    text_kind text;
    char *chat_template;
    char *unk_text; /* what an unknown id is shown as; NULL: its own string */
};

/* Openers: fill t (zeroed, ids -1) from bytes; `name` goes into messages. */
err_code tok_open_spm(tokenizer *t, const char *name, const char *data, size_t n,
                      const cJSON *config, err *e);
err_code tok_open_json(tokenizer *t, const char *name, const char *data, size_t n, err *e);
err_code tok_open_vocab_merges(tokenizer *t, const char *vocab_path, const char *merges_path,
                               const cJSON *config, err *e);
err_code tok_open_tiktoken(tokenizer *t, const char *name, const char *data, size_t n, err *e);

/* tokenizer_config.json, special_tokens_map.json, added_tokens.json, chat_template.*: `dir` NULL
 * reads none. *config is NULL when there is no tokenizer_config.json; free with cJSON_Delete. */
err_code tok_config_load(cJSON **config, const char *dir, err *e);
err_code tok_config_apply(tokenizer *t, const char *dir, const cJSON *config, err *e);
/* config[key] as the string of a token: a string or an object with `content`; NULL none. */
const char *tok_config_token(const cJSON *config, const char *key);
/* Registers an added token and its piece. */
err_code tok_add_token(tokenizer *t, const char *s, size_t n, added_token flags, err *e);
/* Builds the tries once all added tokens are known. */
err_code tok_finish(tokenizer *t, err *e);

#endif
