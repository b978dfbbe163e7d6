/* Factors of second moments on the pool: LAPACK's blocked algorithms with OpenBLAS on one thread
 * for each tile, so that results do not depend on threads. a is f32 [n,n]; only its row-major lower
 * triangle is read and written sensibly, the rest is scratch. */
#ifndef TMF_AWQ_CHOLESKY_H
#define TMF_AWQ_CHOLESKY_H

#include <stdbool.h>
#include <stdint.h>

#include "base/pool.h"

/* a = L L^T, L in place of a. False where a is not positive definite. */
bool cholesky_factor(pool *p, float *a, int64_t n);
/* L^-1 in place of L. False where L has a zero on its diagonal. */
bool cholesky_invert(pool *p, float *l, int64_t n);
/* x f32 [rows,n] = x (L L^T)^-1, on the thread that calls */
void cholesky_solve(const float *l, int64_t n, float *x, int64_t rows);

#endif
