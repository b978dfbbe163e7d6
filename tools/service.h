/* What a supervisor that started the process (systemd's Type=notify) is told. */
#ifndef TMF_TOOLS_SERVICE_H
#define TMF_TOOLS_SERVICE_H

#include <stdint.h>

/* Sends "READY=1" and the like to the socket that the environment names. Where there is none, or it
 * does not listen, nothing happens: no server ends for that. */
void service_tell(const char *text);
/* How often "WATCHDOG=1" is expected, in ms; 0: not at all. */
int64_t service_watchdog_ms(void);

#endif
