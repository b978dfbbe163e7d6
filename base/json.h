/* Typed getters over cJSON with the key path in every error; hardened parse. */
#ifndef TMF_BASE_JSON_H
#define TMF_BASE_JSON_H

#include <cjson/cJSON.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

/* Strict: UTF-8 checked, duplicate keys refused, nesting at most 64, nothing but spaces behind,
 * numbers finite. `what` names the text in errors. Free with cJSON_Delete. */
err_code json_parse(cJSON **out, const char *text, size_t n, const char *what, err *e);
err_code json_load(cJSON **out, const char *path, size_t max_bytes, err *e);

/* json_get_*: the key must exist with that type. json_opt_*: an absent or null key gives `def`.
 * Integers must be whole and within [lo,hi]; the error names key, value and range. Strings are
 * borrowed. */
err_code json_get_i64(const cJSON *o, const char *key, int64_t lo, int64_t hi, int64_t *out,
                      err *e);
err_code json_opt_i64(const cJSON *o, const char *key, int64_t lo, int64_t hi, int64_t def,
                      int64_t *out, err *e);
err_code json_get_i32(const cJSON *o, const char *key, int32_t lo, int32_t hi, int32_t *out,
                      err *e);
err_code json_opt_i32(const cJSON *o, const char *key, int32_t lo, int32_t hi, int32_t def,
                      int32_t *out, err *e);
err_code json_get_f64(const cJSON *o, const char *key, double *out, err *e);
err_code json_opt_f64(const cJSON *o, const char *key, double def, double *out, err *e);
err_code json_opt_bool(const cJSON *o, const char *key, bool def, bool *out, err *e);
err_code json_get_str(const cJSON *o, const char *key, const char **out, err *e);
err_code json_opt_str(const cJSON *o, const char *key, const char *def, const char **out, err *e);

/* Numbers read back as the same double. A NaN or infinity becomes null. Keys keep their order.
 * Caller frees text with mem_free. */
err_code json_print(char **out, const cJSON *o, bool pretty, err *e);
bool json_utf8_valid(const char *s, size_t n);

#endif
