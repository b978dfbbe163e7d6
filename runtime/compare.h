/* Two models over the same windows: how their losses differ window by window, and how far one's
 * probabilities are from the other's. */
#ifndef TMF_RUNTIME_COMPARE_H
#define TMF_RUNTIME_COMPARE_H

#include "runtime/score.h"

typedef struct {
    ppl_result model, reference; /* seconds: 0 */
    double nll, nll_error;       /* mean loss of the model less the reference's; standard error of
                                    the paired differences over windows, 0 for one window */
    double kl, kl_error;         /* nats a token from the reference to the model, likewise */
    double top1;                 /* share of tokens whose most probable id is the same */
    double seconds;
} compare_result;

/* Of a row of logits [n]: log of the sum of exponentials, and the first of the largest. */
double compare_log_sum(const float *logits, int32_t n, int32_t *best);
/* KL divergence in nats from row b to row a, whose log sums are la and lb. */
double compare_divergence(const float *a, double la, const float *b, double lb, int32_t n);

/* Windows as ppl_run cuts them, by slot 0 of either model. E_INPUT when the vocabularies differ
 * or a logit is not finite; else as ppl_run. */
err_code compare_run(compare_result *r, model *m, model *reference, const int32_t *ids, int64_t n,
                     const ppl_opts *o, const job *j, err *e);

#endif
