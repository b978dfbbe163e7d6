/* Log lines and the progress meter on stderr. */
#ifndef TMF_TOOLS_TOOL_METER_H
#define TMF_TOOLS_TOOL_METER_H

#include <stddef.h>

#include "base/job.h"

typedef enum { METER_NONE, METER_LINES, METER_TTY, METER_JSON } meter_kind;

/* `how` is --progress: auto, none or json; quiet silences auto. The sinks are job callbacks. */
void tool_meter_init(const char *tool, const char *how, bool quiet);
void tool_meter_log(void *ud, log_level level, const char *line);
void tool_meter_progress(void *ud, const job_progress *p);
void tool_meter_status_wanted(
    void); /* from a signal handler: the next step shows its state at once */

/* "1:02:03", "4:05" */
void tool_meter_time(char *buf, size_t cap, double seconds);

#endif
