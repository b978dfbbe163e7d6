/* llm-awq's objective: squared error of what the attention or the feed-forward part adds to the
 * residual stream, when the linears behind a norm are rounded under a candidate's factors and
 * everything else is not. */
#ifndef TMF_AWQ_MODULE_LOSS_H
#define TMF_AWQ_MODULE_LOSS_H

#include "awq/measure.h"

/* g's source is ROLE_ATTN_NORM or ROLE_FFN_NORM. s f32 [n][k], loss [n]: sums over all tokens and
 * channels. */
err_code module_losses(const quant_block *b, const smooth_group *g, const float *s, int n,
                       double *loss, err *e);
/* Host and device memory it takes. */
size_t module_loss_bytes(const device *d, const model_desc *m, int64_t pass_rows);

#endif
