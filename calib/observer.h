/* Taps that accumulate what a calib file holds of one layer: absmax, sum of |x| and the diagonal
 * blocks of H for the input of every linear. */
#ifndef TMF_CALIB_OBSERVER_H
#define TMF_CALIB_OBSERVER_H

#include "formats/calib_file.h"
#include "kernels/ops.h"

typedef struct observer observer;

size_t observer_bytes(const device *d, const model_desc *m);
err_code observer_open(observer **out, device *d, const model_desc *m, err *e);
void observer_close(observer **o);

/* Zeroes everything: before each layer. */
err_code observer_reset(observer *o, err *e);
/* A tap_fn (runtime/block.h) whose ctx is the observer. */
err_code observer_tap(void *o, tensor_role role, int32_t layer, const tensor *x, err *e);
/* After all windows: fills `b` with host views that stay until the next reset. E_INPUT naming
 * layer, tap and channel when an activation was not finite. */
err_code observer_finish(observer *o, int32_t layer, calib_block *b, err *e);

#endif
