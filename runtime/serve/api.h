/* Requests: bytes in, a checked struct out, or a fault that is ready to be answered. One table
 * holds every parameter with its type and range: it checks requests, and /openapi.json is made of
 * it. Nothing here knows of sockets, engines or tensors. */
#ifndef TMF_RUNTIME_SERVE_API_H
#define TMF_RUNTIME_SERVE_API_H

#include "base/json.h"
#include "formats/chat.h"
#include "runtime/sampler.h"
#include "runtime/serve/out.h"

/* ---- faults ---- */
typedef enum {
    API_INVALID_VALUE, /* 400 */
    API_CONTEXT,       /* 400 */
    API_KEY,           /* 401 */
    API_FORBIDDEN,     /* 403 */
    API_NO_MODEL,      /* 404 */
    API_NOT_FOUND,     /* 404 */
    API_METHOD,        /* 405 */
    API_TIMEOUT,       /* 408 */
    API_CONFLICT,      /* 409 */
    API_TOO_LARGE,     /* 413 */
    API_MEDIA_TYPE,    /* 415 */
    API_QUEUE_FULL,    /* 429 */
    API_HEADERS,       /* 431 */
    API_CANCELED,      /* 499, seen in logs only */
    API_INTERNAL,      /* 500 */
    API_UNSUPPORTED,   /* 501 */
    API_UNAVAILABLE,   /* 503 */
    API_FAULTS
} api_fault_kind;
typedef struct {
    api_fault_kind kind;
    char param[96]; /* "messages[0].content"; "": none */
    char message[512];
    int32_t retry_after_s;   /* 0: none */
    int32_t n_prompt, n_ctx; /* API_CONTEXT; n_ctx 0: not told */
} api_fault;
/* Fills *f; returns E_INPUT. param NULL: none. */
err_code api_fail(api_fault *f, api_fault_kind kind, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* What a library call's error is to a client; E_NOMEM and the like tell nothing of the inside. */
err_code api_fail_err(api_fault *f, const err *e, const char *param);
int api_status(api_fault_kind kind);
const char *api_code(api_fault_kind kind);
/* {"error":{"message","type","param","code"}}; request_id stands in the message of a 500. */
void api_fault_json(out_buf *o, const api_fault *f, const char *request_id);

/* ---- parameters ---- */
enum { /* who takes a parameter */
       API_CHAT = 1,
       API_COMPLETION = 2,
       API_INTERACTIVE = 4,
       API_ENCODE = 8,
       API_DECODE = 16,
       API_PPL = 32,
       API_TEMPLATE = 64,
       API_GENERATE = 128
};
typedef enum {
    API_T_BOOL,
    API_T_INT,
    API_T_NUMBER,
    API_T_STRING,
    API_T_OTHER,   /* checked by code of its own: `schema` tells its form */
    API_T_IGNORED, /* known, without effect */
    API_T_REFUSED  /* known, refused unless null or false: what `doc` says */
} api_type;
typedef struct {
    const char *name;
    unsigned who;
    api_type type;
    double lo, hi; /* API_T_INT, API_T_NUMBER; NUMBER with lo_open: above lo */
    bool lo_open;
    const char *schema; /* API_T_OTHER: JSON schema text */
    const char *doc;
} api_param;
/* The i-th row; NULL past the end. */
const api_param *api_param_at(int i);

/* ---- requests ---- */
#define API_MAX_STOPS      16
#define API_MAX_STOP_BYTES (64 << 10) /* of all stop texts together */
#define API_MAX_STOP_IDS   64
#define API_MAX_BIAS       1024
#define API_MAX_MESSAGES   16384
#define API_MAX_PROMPTS    1024
#define API_MAX_TOP        20
#define API_MAX_TOOLS      128

typedef enum { API_FORMAT_TEXT, API_FORMAT_OBJECT, API_FORMAT_SCHEMA, API_FORMAT_REGEX } api_format;
typedef enum { API_TOOLS_AUTO, API_TOOLS_NONE, API_TOOLS_REQUIRED, API_TOOLS_NAMED } api_choice;
typedef struct {
    const char *text; /* NULL: ids */
    int32_t *ids;     /* [n_ids] */
    int32_t n_ids;
} api_prompt;

typedef struct {
    unsigned who;      /* the API_* it was parsed as */
    cJSON *body;       /* strings below point into it */
    const char *model; /* NULL: not said */
    sample_opts sample;
    int64_t max_tokens; /* -1: not said */
    int64_t min_tokens, n, timeout_ms, session_id;
    int64_t top_logprobs;    /* -1: no log-probabilities; else alternatives beside each token's */
    int64_t prompt_logprobs; /* the same for the prompt */
    bool stream, include_usage, ignore_eos, skip_special, include_stop, echo, return_ids, no_prefix;
    bool return_logprob; /* API_GENERATE's way of top_logprobs 0 */
    bool parallel_tools, interactive, cancel, add_generation, add_bos, parse_special;
    const char *stops[API_MAX_STOPS];
    int n_stops;
    int32_t stop_ids[API_MAX_STOP_IDS];
    int n_stop_ids;
    api_prompt *prompts; /* [n_prompts]; chat has messages instead */
    int32_t n_prompts;
    bool prompt_list;       /* prompts came as a list of several */
    chat_message *messages; /* [n_messages] */
    int64_t n_messages;
    const cJSON *tools; /* NULL: none */
    api_choice choice;
    const char *tool_name; /* API_TOOLS_NAMED */
    char *tools_text;      /* tools as JSON; NULL: none */
    api_format format;
    char *schema;      /* API_FORMAT_SCHEMA: its text */
    const char *regex; /* API_FORMAT_REGEX */
    const cJSON *kwargs;
    logit_bias *bias;
    void *joined; /* texts put together from parts: a list, the next one's address first */
} api_request;

typedef struct {
    int32_t vocab, max_n;
    int32_t max_answers; /* of a request: its texts, n times; 0: any number */
    bool strict;         /* unknown fields are refused */
} api_limits;
/* E_INPUT with *f filled; *r is then empty. Free with api_request_free. */
err_code api_parse(api_request *r, unsigned who, const char *text, size_t n, const api_limits *l,
                   api_fault *f);
void api_request_free(api_request *r);

#endif
