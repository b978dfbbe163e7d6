/* Factors of second moments: blocked, their bulk by op_product, so that results do not depend on
 * threads. Matrices are f32 [n,n] on the CPU; the row-major lower triangle is what is read. */
#ifndef TMF_AWQ_CHOLESKY_H
#define TMF_AWQ_CHOLESKY_H

#include <stdbool.h>

#include "kernels/device.h"
#include "kernels/ops.h"

/* a = L L^T: L in place of a, and L^T above the diagonal. *positive: false where a is not positive
 * definite; it is lost then. */
err_code cholesky_factor(device *d, float *a, int64_t n, bool *positive, err *e);
/* L^-1 in place of L; what lies above is lost. *regular: false where L has a zero on its
 * diagonal. */
err_code cholesky_invert(device *d, float *l, int64_t n, bool *regular, err *e);
/* What cholesky_invert takes meanwhile. */
size_t cholesky_bytes(int64_t n);
/* x f32 [rows,n], contiguous, = x (L L^T)^-1; l as cholesky_factor leaves it */
err_code cholesky_solve(device *d, const float *l, int64_t n, float *x, int64_t rows, err *e);

#endif
