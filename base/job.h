/* What a long-running library call needs from its caller: where notes and progress go, and whether
 * to stop. The library never prints, exits or reads the environment. A `const job *` may be NULL:
 * silent, never stopped. */
#ifndef TMF_BASE_JOB_H
#define TMF_BASE_JOB_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

typedef enum { LOG_ERROR, LOG_WARN, LOG_INFO, LOG_DEBUG } log_level;

typedef struct {
    const char *stage; /* "layers", "windows", ... */
    const char *unit;  /* "layer", "token", ... */
    int64_t done, total;
} job_progress;

typedef struct {
    void (*log)(void *ud, log_level level, const char *line); /* no line end in `line` */
    void (*progress)(void *ud, const job_progress *p);        /* the sink limits the rate */
    void *ud;
    log_level level;         /* lines above this are not formatted */
    const atomic_bool *stop; /* NULL: never */
} job;

void job_log(const job *j, log_level level, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void job_step(const job *j, const char *stage, const char *unit, int64_t done, int64_t total);
/* E_CANCELED with "stopped" when the caller asked for it, else OK. Call between units of work. */
err_code job_check(const job *j, err *e);

#endif
