/* Folds for a 4-bit cache on a device: kv_fold.h's search with its errors measured there. */
#ifndef TMF_AWQ_DEV_FOLD_H
#define TMF_AWQ_DEV_FOLD_H

#include "awq/method.h"

/* As kv_fold_factors, of the stream in use. lent: device memory to use, NULL or too small: its
 * own. No other bases (quant_opts.turn): those are kv_fold_factors'. */
err_code dev_fold_factors(const quant_block *b, const dev_buf *lent, block_plan *out, err *e);
size_t dev_fold_bytes(const device *d, const model_desc *m);

#endif
