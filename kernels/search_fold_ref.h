/* References of the ops of the cache's folds (search_ops.h). */
#ifndef TMF_KERNELS_SEARCH_FOLD_REF_H
#define TMF_KERNELS_SEARCH_FOLD_REF_H

#include "kernels/search_ops.h"

err_code search_turn_ref(device *d, tensor *x, const tensor *pos, const rope_spec *r, err *e);
err_code search_cache_errors_ref(device *d, tensor *y, const tensor *x, const tensor *s, err *e);

#endif
