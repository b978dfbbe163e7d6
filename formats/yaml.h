/* The YAML that a workspace's config.yaml is written in: maps, lists and scalars, block or flow
 * style, over libyaml. No anchors, aliases, tags or second document: nothing that a loader could be
 * tricked with. */
#ifndef TMF_FORMATS_YAML_H
#define TMF_FORMATS_YAML_H

#include <cjson/cJSON.h>
#include <stddef.h>

#include "base/err.h"

#define YAML_MAX_BYTES ((size_t)4 << 20)
#define YAML_MAX_DEPTH 16

/* As JSON, for the typed getters of base/json.h. Plain scalars become null, booleans (YAML 1.1
 * words) and decimal numbers as PyYAML reads them, also floats without a point; quoted ones stay
 * strings. E_INPUT names `what` and the line. Free with cJSON_Delete. */
err_code yaml_parse(cJSON **out, const char *text, size_t n, const char *what, err *e);
err_code yaml_load(cJSON **out, const char *path, err *e);

/* Block style with sorted keys, as yaml.safe_dump prints. Whole numbers print without a point; a
 * float that must stay a float is made by yaml_float. Caller frees with mem_free. */
err_code yaml_print(char **out, const cJSON *o, err *e);
/* A float in the shortest digits that give the same f32 back, always with a point: 1.0e-05,
 * 10000.0. NULL when out of memory. */
cJSON *yaml_float(float v);

#endif
