/* Any bytes as a request's body, the first one saying to which route: refused with a fault that is
 * JSON, or a request whose every value is within what its parameter's row says. */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/serve/api.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void check_fault(const api_fault *f)
{
    out_buf o = {0};
    cJSON *j;
    err e;
    need(f->kind == API_INVALID_VALUE && *f->message);
    api_fault_json(&o, f, "req-0");
    need(!o.failed && json_parse(&j, o.s, o.n, "fault", &e) == OK);
    need(cJSON_GetArraySize(cJSON_GetObjectItem(j, "error")) == 4);
    cJSON_Delete(j);
    out_free(&o);
}

static void check_request(const api_request *r, const api_limits *l)
{
    err e = {OK, ""};
    size_t bytes = 0;
    need(sample_opts_check(&r->sample, l->vocab, &e) == OK);
    need(r->n >= 1 && r->n <= l->max_n && r->max_tokens >= -1 && r->min_tokens >= 0);
    need(r->top_logprobs >= -1 && r->top_logprobs <= API_MAX_TOP);
    need(r->n_stops <= API_MAX_STOPS && r->n_stop_ids <= API_MAX_STOP_IDS);
    for (int i = 0; i < r->n_stops; i++) bytes += strlen(r->stops[i]);
    need(bytes <= API_MAX_STOP_BYTES);
    for (int64_t i = 0; i < r->n_messages; i++)
        need(r->messages[i].role && (r->messages[i].content || r->messages[i].tool_calls));
    for (int32_t i = 0; i < r->n_prompts; i++)
        for (int32_t k = 0; k < r->prompts[i].n_ids; k++)
            need(r->prompts[i].ids[k] >= 0 && r->prompts[i].ids[k] < l->vocab);
    need(r->choice != API_TOOLS_NAMED || (r->tools && r->tool_name));
    need(r->format != API_FORMAT_SCHEMA || r->schema);
    need(r->format != API_FORMAT_REGEX || r->regex);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    const api_limits l = {.vocab = 1000, .max_n = 8, .strict = n > 0 && (data[0] & 128)};
    api_request r;
    api_fault f = {0};
    if (n == 0) return 0;
    if (api_parse(&r, 1u << (data[0] % 8), (const char *)data + 1, n - 1, &l, &f) == OK)
        check_request(&r, &l);
    else
        check_fault(&f);
    api_request_free(&r);
    return 0;
}
