/* GPTQ: error feedback over plain ranges. */
#include "awq/feedback.h"
#include "awq/few.h"
#include "awq/range.h"

static err_code feed_all(const quant_block *b, block_plan *out, const feedback_opts *o, err *e)
{
    fold f;
    err_code rc = OK;
    TRY(fold_init(&f, b->m, out, e));
    for (int i = 0; i < out->n_linears && rc == OK; i++)
        if (!few_tokens(b->stats, out->linear[i].role))
            rc = feedback_codes(b, &f, &out->linear[i], o, e);
    fold_free(&f);
    return rc;
}

static err_code plan_gptq(const quant_block *b, block_plan *out, err *e)
{
    for (int i = 0; i < out->n_linears; i++) TRY(range_plain(b, NULL, &out->linear[i], e));
    return feed_all(b, out, &(feedback_opts){.damping = 0.01}, e);
}

const quant_method method_gptq = {.name = "gptq",
                                  .summary = "error feedback, inputs in order of their weight",
                                  .needs = METHOD_CALIB,
                                  .loss = LOSS_GRAM,
                                  .fixes_codes = true,
                                  .plan_block = plan_gptq};
