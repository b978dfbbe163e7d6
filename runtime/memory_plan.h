/* What a run will hold, told before it starts. Mapped files do not count: their pages belong to the
 * page cache. */
#ifndef TMF_RUNTIME_MEMORY_PLAN_H
#define TMF_RUNTIME_MEMORY_PLAN_H

#include <stddef.h>

#include "base/job.h"

#define MEMORY_PLAN_ITEMS 12

typedef struct {
    struct {
        const char *what;
        size_t bytes;
    } item[MEMORY_PLAN_ITEMS]; /* what: a literal */
    int n;
} memory_plan;

void memory_plan_add(memory_plan *p, const char *what, size_t bytes); /* 0 bytes: left out */
size_t memory_plan_total(const memory_plan *p);
void memory_plan_log(const memory_plan *p, const job *j, log_level level);
/* What the program itself takes: libraries' data, thread stacks in use, allocator slack. Measured.
 */
size_t memory_plan_process_bytes(void);

#endif
