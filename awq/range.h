/* Scale and zero of a linear's groups: plain rounding's, or after a search of each group's range.
 */
#ifndef TMF_AWQ_RANGE_H
#define TMF_AWQ_RANGE_H

#include "awq/measure.h"

/* Plain: the range of the weights with their factors. */
err_code range_plain(const quant_block *b, const fold *f, plan_linear *out, err *e);
/* Per row and group the best of `points` limits m0 (1 - i * shrink / points) to which the weights
 * are taken as clamped (m0: the group's largest |w|; ties keep the larger limit), by the error
 * against the group's diagonal block of H, which comes from the calib file. */
typedef struct {
    int points;
    double shrink;
} range_grid;
err_code range_search(const quant_block *b, const fold *f, plan_linear *out, const range_grid *grid,
                      err *e);
/* As range_search, with a share for each end of the range (which holds 0), by the error against the
 * group's diagonal block of the whole H of the input: LOSS_GRAM. */
err_code range_fit(const quant_block *b, const fold *f, plan_linear *out, const range_grid *grid,
                   err *e);

#endif
