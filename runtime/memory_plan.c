/* Memory plans. */
#include "runtime/memory_plan.h"

#include <assert.h>

void memory_plan_add(memory_plan *p, const char *what, size_t bytes)
{
    if (!bytes) return;
    assert(p->n < MEMORY_PLAN_ITEMS);
    p->item[p->n].what = what;
    p->item[p->n++].bytes = bytes;
}

size_t memory_plan_total(const memory_plan *p)
{
    size_t sum = 0;
    for (int i = 0; i < p->n; i++) sum += p->item[i].bytes;
    return sum;
}

void memory_plan_log(const memory_plan *p, const job *j, log_level level)
{
    for (int i = 0; i < p->n; i++)
        job_log(j, level, "memory: %10.1f MB  %s", (double)p->item[i].bytes / 1e6, p->item[i].what);
    job_log(j, level, "memory: %10.1f MB  in all", (double)memory_plan_total(p) / 1e6);
}

size_t memory_plan_process_bytes(void) { return (size_t)6 << 20; }
