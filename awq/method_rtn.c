/* Round to nearest: the baseline, which needs no data. */
#include "awq/range.h"

static err_code plan_block(const quant_block *b, block_plan *out, err *e)
{
    for (int i = 0; i < out->n_linears; i++) TRY(range_plain(b, NULL, &out->linear[i], e));
    return OK;
}

const quant_method method_rtn = {
    .name = "rtn", .summary = "round to nearest", .loss = LOSS_BLOCKS, .plan_block = plan_block};
