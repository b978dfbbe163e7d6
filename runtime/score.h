/* What a model says of given ids: next-token probabilities, and perplexity over windows. */
#ifndef TMF_RUNTIME_SCORE_H
#define TMF_RUNTIME_SCORE_H

#include "runtime/model.h"

typedef struct {
    int32_t id;
    double logprob; /* natural */
} id_logprob;
/* The `top` most probable ids behind ids [n], largest first, ties to the lowest id. Uses slot 0 and
 * ends it. *n_out counts them: top, or the vocabulary when that is smaller. */
err_code score_next(model *m, const int32_t *ids, int32_t n, int32_t top, id_logprob *out,
                    int32_t *n_out, const job *j, err *e);

/* Perplexity: the ids (one BOS in front where the tokenizer has one, put there by the caller) are
 * cut into windows that do not overlap; each runs alone from position 0 and gives window-1 losses;
 * the tail is dropped; ppl = exp(mean loss). Keys and values are read back through the cache in its
 * format. */
typedef struct {
    int32_t window;      /* tokens, 2 or more, at most the session */
    int64_t max_windows; /* 0: all */
} ppl_opts;
typedef struct {
    double ppl, nll;  /* nll: mean loss */
    double nll_error; /* standard error of the mean over windows; 0 for one window */
    int64_t tokens;   /* losses summed */
    int64_t windows;
    double seconds;
} ppl_result;
/* Sequences that one pass of max_rows rows can hold: open the model with that many slots. */
int32_t ppl_seqs(int32_t window, int32_t max_rows);
/* How many of n ids' windows ppl_run would run. E_INPUT when there is not one whole window. */
err_code ppl_windows(int64_t *windows, const model *m, int64_t n, const ppl_opts *o, err *e);
/* E_INPUT when there is not one whole window. Uses every slot and ends them. */
err_code ppl_run(ppl_result *r, model *m, const int32_t *ids, int64_t n, const ppl_opts *o,
                 const job *j, err *e);

#endif
