/* A memory plan on stdout: what --dry-run prints. */
#ifndef TMF_TOOLS_MEMORY_TEXT_H
#define TMF_TOOLS_MEMORY_TEXT_H

#include "runtime/memory_plan.h"

/* Lines "   12.3 MB  hidden states", the sum last; or one JSON object {"memory": {what: bytes},
 * "total": bytes}. */
err_code tool_print_memory(const memory_plan *p, bool json, err *e);

#endif
