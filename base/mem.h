/* Checked sizes, zero-filled 64-byte aligned host memory, and an arena. */
#ifndef TMF_BASE_MEM_H
#define TMF_BASE_MEM_H

#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* *out = a*b or a+b; E_LIMIT "<what>: size overflows" when it does not fit. */
err_code mem_mul(size_t *out, size_t a, size_t b, const char *what, err *e);
err_code mem_add(size_t *out, size_t a, size_t b, const char *what, err *e);

/* Zeroed, 64-byte aligned; n*size == 0 gives NULL and OK. *out is NULL on failure. E_NOMEM names
 * `what` and the bytes. Free with mem_free, which accepts NULL. Large blocks ask for huge pages. */
err_code mem_alloc(void **out, size_t n, size_t size, const char *what, err *e);
void mem_free(void *p);
err_code mem_strdup(char **out, const char *s, err *e);

/* One sized-up-front block; arena_get never fails for lack of system memory, only E_LIMIT when the
 * plan was too small (a bug of the planner). 64-byte alignment. Under ASAN a red zone follows each
 * object. */
typedef struct {
    uint8_t *base;
    size_t cap, used;
} arena;
err_code arena_init(arena *a, size_t bytes, const char *what, err *e);
err_code arena_get(arena *a, void **out, size_t bytes, err *e);
size_t
arena_need(size_t bytes); /* what an object of `bytes` takes in the arena: sum these to size it */
void arena_reset(arena *a);
void arena_free(arena *a);

#endif
