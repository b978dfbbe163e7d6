/* The search for one channel group's factors among powers of its input's mean |x| and its weights'
 * mean relative |W|, the identity among them. */
#ifndef TMF_AWQ_FACTORS_H
#define TMF_AWQ_FACTORS_H

#include "awq/smooth.h"

/* Enters the best into the plan; nothing where that is the identity. E_INPUT without statistics. */
err_code factors_search(const quant_block *b, const smooth_group *g, block_plan *out, err *e);

#endif
