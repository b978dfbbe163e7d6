/* AWQ: per channel group the best of a grid of factors, then the best range of every group of
 * weights. */
#include "awq/factors.h"
#include "awq/pace.h"
#include "awq/range.h"

/* q and k feed a softmax: llm-awq leaves their range alone, except where one projection holds q, k
 * and v. */
static bool clips(tensor_role r) { return r != ROLE_Q && r != ROLE_K; }

static err_code plan_block(const quant_block *b, block_plan *out, err *e)
{
    static const range_grid grid = {10, 0.5};
    const smooth_groups groups = smooth_groups_of(b, VO_OWN);
    fold f;
    err_code rc = OK;
    for (int i = 0; i < groups.n; i++) {
        TRY(factors_search(b, &groups.g[i], false, out, e));
        pace_step(b->pace);
    }
    TRY(fold_init(&f, b->m, out, e));
    for (int i = 0; i < out->n_linears && rc == OK; i++) {
        plan_linear *l = &out->linear[i];
        rc = clips(l->role) ? range_search(b, &f, l, &grid, e) : range_plain(b, &f, l, e);
        pace_step(b->pace);
    }
    fold_free(&f);
    return rc;
}

const quant_method method_awq = {.name = "awq",
                                 .summary = "searched factors and ranges",
                                 .needs = METHOD_CALIB,
                                 .loss = LOSS_GRAM,
                                 .searches = true,
                                 .folds = true,
                                 .plan_block = plan_block};
