/* The search's steps on a device whose memory the host cannot read: the bound block's weights, the
 * second moments and all tiles stay there; factors go in, losses, scales and zeros come back. */
#ifndef TMF_AWQ_ON_DEVICE_H
#define TMF_AWQ_ON_DEVICE_H

#include "awq/measure.h"

typedef struct dev_scratch dev_scratch;

/* What a method asks of it. */
typedef enum { DEV_RANGES, DEV_CODES, DEV_CARRIES } dev_use_of;
/* inputs: of a method that carries rounded inputs on, else NULL; borrowed. */
size_t dev_scratch_bytes(const model_desc *m, int32_t group, dev_use_of use);
err_code dev_scratch_open(dev_scratch **out, device *d, const model_desc *m, int32_t group,
                          dev_use_of use, dev_chain *inputs, err *e);
void dev_scratch_close(dev_scratch **s);

/* As smooth_weight_mean, smooth_losses (smooth.h), range_plain and range_search (range.h; points 1:
 * plain, with whole or diagonal blocks of H alike), block_losses (measure.h). */
err_code dev_weight_mean(const quant_block *b, const smooth_group *g, double eps, double *mean,
                         err *e);
err_code dev_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                    double *loss, err *e);
err_code dev_range(const quant_block *b, const fold *f, plan_linear *out, int points, double shrink,
                   err *e);
err_code dev_block_losses(const quant_block *b, const fold *f, block_plan *p, err *e);

#endif
