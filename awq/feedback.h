/* Codes by error feedback: each weight's rounding error is spread over the weights not yet rounded
 * (GPTQ, Frantar et al. 2022, with columns in descending order of diag H and the groups' scales
 * fixed beforehand), then sweeps of coordinate descent over the codes. Both minimise tr(E H E^T) of
 * the linear's own input. */
#ifndef TMF_AWQ_FEEDBACK_H
#define TMF_AWQ_FEEDBACK_H

#include "awq/measure.h"

typedef struct {
    double
        damping; /* of H, as a share of its mean diagonal; raised where the factorisation fails */
    int sweeps;  /* of coordinate descent behind it */
    bool refit;  /* each sweep also moves the scales; one more sweep then ends it */
} feedback_opts;

/* Bytes beside the plan that a linear of k inputs takes at most. */
size_t feedback_bytes(int64_t k);
/* The order of rounding: order[place] is an input, by descending diagonal entry of the scaled
 * input's H, d[i * step] / col[i]^2 (col NULL: 1); equal ones stay as they are. */
err_code feedback_order(int32_t *order, const float *d, int64_t step, const float *col, int64_t k,
                        err *e);
/* Fills out->codes, from b->mem unless there is room already, for the scale and zero that are
 * there. Needs LOSS_GRAM. Results do not depend on threads. */
err_code feedback_codes(const quant_block *b, const fold *f, plan_linear *out,
                        const feedback_opts *o, err *e);

#endif
