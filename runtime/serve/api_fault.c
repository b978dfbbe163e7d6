/* Faults: which status, type and code, and their JSON. */
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include "runtime/serve/api.h"

static const struct {
    int status;
    const char *type, *code;
} kinds[API_FAULTS] = {
    [API_INVALID_VALUE] = {400, "invalid_request_error", "invalid_value"},
    [API_CONTEXT] = {400, "invalid_request_error", "context_length_exceeded"},
    [API_KEY] = {401, "authentication_error", "invalid_api_key"},
    [API_FORBIDDEN] = {403, "permission_error", "forbidden"},
    [API_NO_MODEL] = {404, "invalid_request_error", "model_not_found"},
    [API_NOT_FOUND] = {404, "invalid_request_error", "not_found"},
    [API_METHOD] = {405, "invalid_request_error", "method_not_allowed"},
    [API_TIMEOUT] = {408, "invalid_request_error", "request_timeout"},
    [API_CONFLICT] = {409, "invalid_request_error", "conflict"},
    [API_TOO_LARGE] = {413, "invalid_request_error", "body_too_large"},
    [API_MEDIA_TYPE] = {415, "invalid_request_error", "unsupported_media_type"},
    [API_QUEUE_FULL] = {429, "rate_limit", "queue_full"},
    [API_HEADERS] = {431, "invalid_request_error", "headers_too_large"},
    [API_CANCELED] = {499, "invalid_request_error", "cancelled"},
    [API_INTERNAL] = {500, "server_error", "internal_error"},
    [API_UNSUPPORTED] = {501, "invalid_request_error", "unsupported_feature"},
    [API_UNAVAILABLE] = {503, "server_error", "service_unavailable"},
};

int api_status(api_fault_kind kind) { return kinds[kind].status; }

const char *api_code(api_fault_kind kind) { return kinds[kind].code; }

err_code api_fail(api_fault *f, api_fault_kind kind, const char *param, const char *fmt, ...)
{
    va_list args;
    memset(f, 0, sizeof *f);
    f->kind = kind;
    (void)snprintf(f->param, sizeof f->param, "%s", param ? param : "");
    va_start(args, fmt);
    (void)vsnprintf(f->message, sizeof f->message, fmt, args);
    va_end(args);
    return E_INPUT;
}

err_code api_fail_err(api_fault *f, const err *e, const char *param)
{
    switch (e->code) {
    case E_USAGE:
    case E_INPUT:
    case E_LIMIT:
    case E_UNSUPPORTED: return api_fail(f, API_INVALID_VALUE, param, "%s", e->msg);
    case E_BUSY:
        (void)api_fail(f, API_QUEUE_FULL, NULL, "the queue is full");
        f->retry_after_s = 1;
        return E_INPUT;
    case E_CANCELED:
        (void)api_fail(f, API_UNAVAILABLE, NULL, "the server is shutting down");
        f->retry_after_s = 5;
        return E_INPUT;
    case E_NOMEM:
        (void)api_fail(f, API_UNAVAILABLE, NULL, "out of memory");
        f->retry_after_s = 5;
        return E_INPUT;
    default: return api_fail(f, API_INTERNAL, NULL, "internal error");
    }
}

void api_fault_json(out_buf *o, const api_fault *f, const char *request_id)
{
    out_text(o, "{\"error\":{\"message\":\"");
    out_escaped(o, f->message, strlen(f->message));
    if (f->kind == API_INTERNAL && request_id) {
        out_text(o, " (request ");
        out_escaped(o, request_id, strlen(request_id));
        out_text(o, ")");
    }
    out_printf(o, "\",\"type\":\"%s\",\"param\":", kinds[f->kind].type);
    if (*f->param)
        out_string(o, f->param, strlen(f->param));
    else
        out_text(o, "null");
    out_printf(o, ",\"code\":\"%s\"", kinds[f->kind].code);
    if (f->n_ctx) out_printf(o, ",\"n_prompt_tokens\":%d,\"n_ctx\":%d", f->n_prompt, f->n_ctx);
    out_text(o, "}}");
}
