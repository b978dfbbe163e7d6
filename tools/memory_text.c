/* Memory plans as text and JSON. */
#include "tools/memory_text.h"

#include <stdio.h>

#include "tools/tool.h"

static err_code print_json(const memory_plan *p, err *e)
{
    cJSON *o = cJSON_CreateObject(), *m = cJSON_AddObjectToObject(o, "memory");
    for (int i = 0; i < p->n; i++)
        cJSON_AddNumberToObject(m, p->item[i].what, (double)p->item[i].bytes);
    cJSON_AddNumberToObject(o, "total", (double)memory_plan_total(p));
    const err_code rc = tool_print_json(o, e);
    cJSON_Delete(o);
    return rc;
}

err_code tool_print_memory(const memory_plan *p, bool json, err *e)
{
    if (json) return print_json(p, e);
    for (int i = 0; i < p->n; i++)
        printf("%10.1f MB  %s\n", (double)p->item[i].bytes / 1e6, p->item[i].what);
    printf("%10.1f MB  in all\n", (double)memory_plan_total(p) / 1e6);
    return OK;
}
