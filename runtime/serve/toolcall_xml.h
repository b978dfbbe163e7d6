/* Arguments that are written as text between tags: what they are as JSON depends on the tool. */
#ifndef TMF_RUNTIME_SERVE_TOOLCALL_XML_H
#define TMF_RUNTIME_SERVE_TOOLCALL_XML_H

#include <stddef.h>

#include "base/err.h"
#include "base/json.h"

/* `"key": value` of one argument: value as it stands where the schema of tools' `tool` says another
 * type than a string and it is JSON, else a string. tools: as in the OpenAI API, NULL: none. Free
 * with mem_free. */
err_code toolcall_xml_argument(char **out, const cJSON *tools, const char *tool, const char *key,
                               const char *value, err *e);

#endif
