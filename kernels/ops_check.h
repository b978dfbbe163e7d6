/* The checks of the entry points: shape, dtype, space, strides, and on the CPU the indices. */
#ifndef TMF_KERNELS_OPS_CHECK_H
#define TMF_KERNELS_OPS_CHECK_H

#include "kernels/device_internal.h"

/* what: "op_gemm: x". A shape entry of -1 matches anything. Rows may be strided, the last dimension
 * not; rows must not overlap. Zero-sized tensors may have no data. */
err_code check_tensor(const device *d, const tensor *t, const char *what, dtype dt, int ndim,
                      const int64_t *shape, err *e);
/* The same for what may be an activation or the residual stream. */
err_code check_rows(const device *d, const tensor *t, const char *what, const int64_t *shape,
                    err *e);
/* The same for weights: f16, bf16 or f32. */
err_code check_weight(const device *d, const tensor *t, const char *what, int ndim,
                      const int64_t *shape, err *e);
err_code check_contiguous(const tensor *t, const char *what, err *e);
/* Shapes always; positions, row ranges and block numbers only where the host can read them. */
err_code check_batch(const device *d, const batch_rows *rows, const kv_layer *kv, int64_t m,
                     const char *op, err *e);
err_code check_kv(const device *d, const kv_layer *kv, const char *op, err *e);
err_code check_ids(const device *d, const tensor *ids, int64_t limit, const char *what, err *e);

#endif
