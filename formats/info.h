/* What a path holds: a Hugging Face directory, an AWQ directory, a workspace, or a calib or plan
 * file. As one JSON document with stable keys, and as text. */
#ifndef TMF_FORMATS_INFO_H
#define TMF_FORMATS_INFO_H

#include "base/job.h"
#include "base/json.h"

/* With verify every digest that the artifact carries is checked: manifests (E_CHECK naming file,
 * expected and found) and the tensors of calib and plan files (E_INPUT). Free with cJSON_Delete.
 * Keys: kind ("hf", "awq", "workspace", "calib", "plan"), digest, bytes {part: n, ..., total};
 * directories add model {...}, tokenizer {...}, files, and manifest {tool, parent, options, files,
 * verified} where there is one. */
err_code info_read(cJSON **out, const char *path, bool verify, const job *j, err *e);
/* Aligned lines "key  value", nested keys joined with a point. Free with mem_free. */
err_code info_text(char **out, const cJSON *info, err *e);

#endif
