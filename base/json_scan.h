/* The check that every JSON text passes before cJSON sees it. */
#ifndef TMF_BASE_JSON_SCAN_H
#define TMF_BASE_JSON_SCAN_H

#include <stddef.h>

#include "base/err.h"

#define JSON_MAX_DEPTH  64
#define JSON_MAX_NUMBER 63 /* characters of one number: what cJSON keeps of it */

/* RFC 8259, and stricter: no byte order mark, no duplicate keys (after unescaping), depth at most
 * JSON_MAX_DEPTH, numbers finite and at most JSON_MAX_NUMBER characters, no U+0000 and no lone
 * surrogate in strings (a C string cannot carry them). E_INPUT "<what>: byte N, line L: ...";
 * E_NOMEM. */
err_code json_scan(const char *text, size_t n, const char *what, err *e);

#endif
