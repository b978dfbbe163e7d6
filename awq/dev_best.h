/* best's rounding of a block on a device, when its factors are chosen. */
#ifndef TMF_AWQ_DEV_BEST_H
#define TMF_AWQ_DEV_BEST_H

#include "awq/correct.h"
#include "awq/feedback.h"
#include "awq/on_device.h"
#include "awq/range.h"

typedef struct {
    correct_opts correction;
    feedback_opts feeding;
    range_grid ends, limits;
    bool corrects, falls_back;
} best_opts;

/* Fills scale, zero, codes and losses of every linear; codes come from b->mem. */
err_code dev_best_block(const quant_block *b, const fold *f, block_plan *out, const best_opts *o,
                        err *e);

#endif
