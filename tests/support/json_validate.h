/* A second opinion on JSON schema, for the keywords that grammars take: plain recursion over parsed
 * values, written apart from the code under test. */
#ifndef TMF_TESTS_JSON_VALIDATE_H
#define TMF_TESTS_JSON_VALIDATE_H

#include <stdbool.h>

#include "base/json.h"

/* `pattern` and `format` are not looked at. */
bool json_validates(const cJSON *v, const cJSON *schema, const cJSON *root);

#endif
