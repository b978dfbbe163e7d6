/* A fixed set of threads. Items are independent and each is computed by one thread from start to
 * end, so results do not depend on the thread count. */
#ifndef TMF_BASE_POOL_H
#define TMF_BASE_POOL_H

#include <stdint.h>

#include "base/err.h"

typedef struct pool pool;
typedef void (*pool_fn)(void *ctx, int64_t item, int worker); /* worker in 0..threads-1 */

/* `threads` counts the caller; 0 means the CPUs this process may use. */
err_code pool_open(pool **out, int threads, err *e);
void pool_close(pool **p); /* NULL accepted */
int pool_threads(const pool *p);
/* Runs fn for items 0..n-1 and returns when all are done. Threads claim items in order; the wait
 * spins briefly before it sleeps. Not reentrant; one caller at a time. p NULL runs on the caller
 * alone. */
void pool_run(pool *p, pool_fn fn, void *ctx, int64_t n);
int pool_cpu_count(void);

#endif
