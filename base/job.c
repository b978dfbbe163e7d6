/* Calls through the caller's sinks. */
#include "base/job.h"

#include <stdarg.h>
#include <stdio.h>

void job_log(const job *j, log_level level, const char *fmt, ...)
{
    char line[1024];
    va_list ap;
    if (!j || !j->log || level > j->level) return;
    va_start(ap, fmt);
    const int n = vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    if (n >= 0) j->log(j->ud, level, line);
}

void job_step(const job *j, const char *stage, const char *unit, int64_t done, int64_t total)
{
    if (!j || !j->progress) return;
    const job_progress p = {stage, unit, done, total};
    j->progress(j->ud, &p);
}

err_code job_check(const job *j, err *e)
{
    if (j && j->stop && atomic_load_explicit(j->stop, memory_order_relaxed))
        return err_set(e, E_CANCELED, "stopped");
    return OK;
}
