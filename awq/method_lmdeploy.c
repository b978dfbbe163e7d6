/* What `lmdeploy lite auto_awq` does by default: one factor per channel from the largest activation
 * and the mean relative weight, both to the power 1/2, then plain rounding. No search, no clipping.
 */
#include <math.h>

#include "awq/few.h"
#include "awq/range.h"
#include "awq/smooth.h"

#define FLOOR 1e-4

static err_code factors(const quant_block *b, const smooth_group *g, block_plan *out, err *e)
{
    const calib_tap *t = calib_find(b->stats, g->targets[0]);
    const int64_t k = model_linear_k(b->m, g->targets[0]);
    double *mean = b->scratch->sum;
    bool *dead = (bool *)b->scratch->zero;
    bool floor_needed = false;
    float *s;
    if (plan_find_fold(out, g->source)->s.data) return OK; /* chosen for the cache */
    if (few_tokens(b->stats, g->targets[0])) return OK;
    if (!t)
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)b->layer, role_name(g->targets[0]));
    TRY(plan_factors(b, out, g->source, &s, e));
    TRY(smooth_weight_mean(b, g, 0, mean, e));
    TRY(smooth_dead(b, g, dead, e));
    for (int64_t i = 0; i < k; i++) floor_needed = floor_needed || mean[i] == 0;
    for (int64_t i = 0; i < k; i++) {
        const double root = sqrt(mean[i]), div = floor_needed ? fmax(root, FLOOR) : root;
        s[i] = (float)fmax(sqrt((double)((const float *)t->absmax.data)[i]) / div, FLOOR);
    }
    if (!smooth_normalize(s, k, dead))
        return err_set(e, E_INPUT, "layer %d: %s: the statistics give factors that are not finite",
                       (int)b->layer, role_name(g->source));
    return OK;
}

static err_code plan_block(const quant_block *b, block_plan *out, err *e)
{
    /* v -> o exists where v is a linear of its own */
    const smooth_groups groups = smooth_groups_of(b, b->m->qkv == QKV_SPLIT ? VO_OWN : VO_NONE);
    fold f;
    err_code rc = OK;
    for (int i = 0; i < groups.n; i++) TRY(factors(b, &groups.g[i], out, e));
    TRY(fold_init(&f, b->m, out, e));
    for (int i = 0; i < out->n_linears && rc == OK; i++)
        rc = range_plain(b, &f, &out->linear[i], e);
    fold_free(&f);
    return rc;
}

const quant_method method_lmdeploy = {
    .name = "lmdeploy",
    .summary = "LMDeploy's default: fixed factors from absmax, no search",
    .needs = METHOD_CALIB,
    .loss = LOSS_BLOCKS,
    .folds = true,
    .plan_block = plan_block};
