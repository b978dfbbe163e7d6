/* Channel groups: whose rows take 1/s and whose columns take s, and the search for s among
 * candidates. */
#ifndef TMF_AWQ_SMOOTH_H
#define TMF_AWQ_SMOOTH_H

#include "awq/measure.h"

/* Which models get v -> o: none, those where every head has a KV head of its own, or all, with
 * factors that the heads of a KV head share. */
typedef enum { VO_NONE, VO_OWN, VO_SHARED } smooth_vo;
/* The family's groups; then v -> o. */
typedef struct {
    smooth_group g[4];
    int n;
} smooth_groups;
smooth_groups smooth_groups_of(const quant_block *b, smooth_vo vo);

/* mean over the rows of all targets of |W| / its group's largest |W| (plus `eps`; 0: groups without
 * weights count as if their largest were 1e-4): double [k]. */
err_code smooth_weight_mean(const quant_block *b, const smooth_group *g, double eps, double *mean,
                            err *e);

/* Divides by sqrt(max * min) over the channels that `skip` (may be NULL) leaves; skipped ones
 * become 1. false when the result is not finite and positive. */
bool smooth_normalize(float *s, int64_t k, const bool *skip);
/* Channels whose factor must be 1 because their norm weight is 0: bool [k], all false for linear
 * sources. */
err_code smooth_dead(const quant_block *b, const smooth_group *g, bool *dead, err *e);
/* The source divided by s still fits f16: no overflow, and no normal value becomes subnormal. */
err_code smooth_fits(const quant_block *b, const smooth_group *g, const float *s, bool *fits,
                     err *e);

/* Sum over the targets of the loss with plain rounding under each candidate: s f32 [n][k], loss
 * [n]. On the CPU over one row of every `each`. */
err_code smooth_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                       int64_t each, double *loss, err *e);

#endif
