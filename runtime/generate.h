/* One sequence: ids in, tokens out one by one, with stop ids, stop texts and limits. */
#ifndef TMF_RUNTIME_GENERATE_H
#define TMF_RUNTIME_GENERATE_H

#include "formats/tokenizer.h"
#include "runtime/model.h"
#include "runtime/sampler.h"

#define GEN_MAX_STOP_TEXTS 16
#define GEN_MAX_STOP_BYTES 256 /* of one stop text */

typedef enum {
    GEN_STOP_ID,   /* a stop id came: the last id, without text */
    GEN_STOP_TEXT, /* a stop text came: text ends before it, ids do not */
    GEN_LENGTH,    /* max_new reached */
    GEN_SESSION,   /* the session or the cache is full */
    GEN_CALLER,    /* the callback said so */
    GEN_CANCELED   /* the job was stopped; what came before stays in the slot */
} gen_end;
const char *
gen_end_name(gen_end end); /* "stop", "stop_text", "length", "session", "caller", "canceled" */

typedef struct {
    int32_t slot;
    const int32_t
        *ids;        /* [n_ids] the whole sequence so far; the slot holds its first model_seq_len */
    int32_t n_ids;   /* above model_seq_len(slot) */
    int32_t max_new; /* 0: as the session allows */
    const int32_t *stop_ids;
    int n_stop_ids;
    const char *const *stop_texts; /* UTF-8, not empty; need a tokenizer */
    int n_stop_texts;
    sample_opts sample;
} gen_opts;

typedef struct {
    gen_end end;
    int32_t n_prompt;       /* ids that had to run */
    int32_t n_new;          /* generated, a stop id included */
    double prompt_s, new_s; /* until the first token, and all behind it */
} gen_result;

/* Each generated id with the text (UTF-8, not terminated) that became certain by it: a text that
 * may be the beginning of a stop text or of a character waits. A last call with id -1 brings what
 * waited, if any. false ends the answer (the id stands). */
typedef bool (*gen_fn)(void *ud, int32_t id, const char *text, size_t n);

typedef struct generator generator;
/* m and t are borrowed; t may be NULL (no text). One sequence at a time. */
err_code gen_open(generator **out, model *m, const tokenizer *t, err *e);
void gen_close(generator **g);
/* Afterwards the slot holds n_ids + n_new - 1 tokens (the last one never ran), fewer when the
 * prompt itself was canceled. E_LIMIT when the prompt does not fit. The token loop allocates
 * nothing. */
err_code gen_run(generator *g, const gen_opts *o, gen_result *r, gen_fn fn, void *ud, const job *j,
                 err *e);

#endif
