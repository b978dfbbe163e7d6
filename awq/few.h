/* Inputs that few tokens came through, as those of a mixture's experts may be. With fewer tokens
 * than inputs second moments have no full rank, and whatever is fitted to them fits these tokens
 * alone: such linears get no factors, no error feedback and no corrected weights; their ranges are
 * searched by second moments that are shrunk towards their mean diagonal, a share k / (k + tokens)
 * of the way, which without a token weighs all inputs alike. */
#ifndef TMF_AWQ_FEW_H
#define TMF_AWQ_FEW_H

#include "awq/method.h"

/* Fewer tokens than inputs; false without statistics. */
bool few_tokens(const calib_block *stats, tensor_role r);
/* The blocks of such an input, f32 as in t->blocks, shrunk; in place when `to` is them. */
void few_shrink(const calib_tap *t, float *to);
/* Shrinks the blocks of such inputs, and says so. *stats then points into *mem: mem_free when the
 * layer is done. */
err_code few_stats(calib_block *stats, int32_t layer, void **mem, const job *j, err *e);

#endif
