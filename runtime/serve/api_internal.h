/* Between the table of parameters and the readers of those that have a form of their own. */
#ifndef TMF_RUNTIME_SERVE_API_INTERNAL_H
#define TMF_RUNTIME_SERVE_API_INTERNAL_H

#include "runtime/serve/api.h"

typedef struct {
    api_request *r;
    const api_limits *l;
    const char *text; /* of the whole request */
    size_t n;
    api_fault *f;
} api_reading;
typedef err_code (*api_reader)(api_reading *x, const char *name, const cJSON *v);

/* "a boolean" and so on, for messages. */
const char *api_json_kind(const cJSON *v);
/* Memory that the request owns: E_INPUT with the fault filled when there is none. */
err_code api_alloc(api_reading *x, void **out, size_t n, size_t size);

err_code api_read_messages(api_reading *x, const char *name, const cJSON *v);
err_code api_read_prompt(api_reading *x, const char *name, const cJSON *v);
err_code api_read_tokens(api_reading *x, const char *name, const cJSON *v);
err_code api_read_stop(api_reading *x, const char *name, const cJSON *v);
err_code api_read_stop_ids(api_reading *x, const char *name, const cJSON *v);
err_code api_read_bias(api_reading *x, const char *name, const cJSON *v);
err_code api_read_logprobs(api_reading *x, const char *name, const cJSON *v);
err_code api_read_seed(api_reading *x, const char *name, const cJSON *v);
err_code api_read_best_of(api_reading *x, const char *name, const cJSON *v);
err_code api_read_stream_options(api_reading *x, const char *name, const cJSON *v);
err_code api_read_tools(api_reading *x, const char *name, const cJSON *v);
err_code api_read_tool_choice(api_reading *x, const char *name, const cJSON *v);
err_code api_read_format(api_reading *x, const char *name, const cJSON *v);
err_code api_read_kwargs(api_reading *x, const char *name, const cJSON *v);

#endif
