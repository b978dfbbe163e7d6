/* The search for one channel group's factors among powers of its input's mean |x| and its weights'
 * mean relative |W|, the identity among them. */
#ifndef TMF_AWQ_FACTORS_H
#define TMF_AWQ_FACTORS_H

#include "awq/smooth.h"

/* Enters the best into the plan; nothing where that is the identity. E_INPUT without statistics.
 * thin: on the CPU, where some of the targets' rows are enough to tell candidates apart, these
 * decide which few of them are compared over all rows. */
err_code factors_search(const quant_block *b, const smooth_group *g, bool thin, block_plan *out,
                        err *e);

#endif
