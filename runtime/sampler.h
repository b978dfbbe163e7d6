/* From logits to a token. Steps, in this order:
 *   1. logit bias: l[id] += bias
 *   2. repetition penalty r over the ids of the prompt and of the answer, or of the last
 *      `penalty_window` of them: l > 0 ? l / r : l * r, once per distinct id
 *   3. presence and frequency penalty over the answer's ids: l -= presence + frequency * count
 *   4. temperature 0: the largest l, ties to the lowest id, and nothing below applies
 *   5. p = softmax(l / temperature)
 *   6. top-k: the k largest, ties to the lowest id; p made to sum to 1 again
 *   7. top-p: the shortest head of them, largest first, with a sum of top_p or more
 *   8. min-p: of those, the ones with p >= min_p * largest p
 *   9. one draw from what is left
 * Sums are doubles in a fixed order and the generator is our own: equal logits and seeds give equal
 * tokens, whatever else runs beside. NaN counts as minus infinity. */
#ifndef TMF_RUNTIME_SAMPLER_H
#define TMF_RUNTIME_SAMPLER_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"
#include "kernels/ops.h"

typedef struct {
    int32_t id;
    float bias;
} logit_bias;

typedef struct {
    double temperature;                         /* 0..100; 0 is greedy */
    int32_t top_k;                              /* 0: all */
    double top_p;                               /* above 0, up to 1; 1: all */
    double min_p;                               /* 0..1; 0: off */
    double repetition_penalty;                  /* above 0; 1: off */
    double presence_penalty, frequency_penalty; /* -2..2; 0: off */
    int32_t penalty_window; /* ids that the repetition penalty looks back on; 0: all */
    uint64_t seed;
    const logit_bias *bias; /* [n_bias], copied */
    int32_t n_bias;
} sample_opts;
/* Greedy without penalties. */
sample_opts sample_greedy(void);
/* E_USAGE names the field, its range and the value. */
err_code sample_opts_check(const sample_opts *o, int32_t vocab, err *e);

typedef struct sampler sampler;
/* max_tokens: the longest history (prompt and answer) it must hold. */
err_code sampler_open(sampler **out, int32_t vocab, int32_t max_tokens, err *e);
/* As sampler_open, with the scratch of `with` (20 of 28 bytes a token of the vocabulary), which is
 * closed after it; one thread uses both. */
err_code sampler_open_beside(sampler **out, sampler *with, int32_t vocab, int32_t max_tokens,
                             err *e);
void sampler_close(sampler **s);
/* The generator's state: with it and the same ids told of, a sequence goes on in another sampler.
 */
typedef struct {
    uint64_t state[4];
} sampler_rng;
sampler_rng sampler_rng_get(const sampler *s);
void sampler_rng_set(sampler *s, const sampler_rng *r);
/* Begins a sequence: history empty, generator seeded. o->bias is copied (allocates when there is
 * one). */
err_code sampler_start(sampler *s, const sample_opts *o, err *e);
/* Tells of ids that penalties look at. Beyond max_tokens the oldest are forgotten by the repetition
 * penalty. */
void sampler_prompt(sampler *s, const int32_t *ids, int64_t n);
void sampler_accept(sampler *s, int32_t id);
/* The next id, or -1 when no logit is above minus infinity. Changes logits [vocab]; does not
 * accept. Allocates nothing. */
int32_t sampler_next(sampler *s, float *logits);
/* For devices that draw themselves: what the next draw takes; the generator moves on, as in
 * sampler_next. bias [SAMPLE_MAX_BIAS], enough for o->n_bias. r->state is 0 when penalties look at
 * counts, else -1; *send: the device's counts are not those of s, and the row takes
 * sampler_counts as they are. */
void sampler_row(sampler *s, sample_row *r, sample_bias *bias, bool *send);
/* The row that sampler_row gives next, told of ids or not; the generator stays. False where it
 * depends on ids still to come (penalties) or takes biases. */
bool sampler_row_ahead(const sampler *s, sample_row *r);
const int32_t *sampler_counts(const sampler *s); /* [2, vocab]: in the window, in the answer */
/* The largest logit, ties to the lowest id; -1 as above. */
int32_t sample_argmax(const float *logits, int32_t vocab);

#endif
