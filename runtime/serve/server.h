/* The server: routes, keys, limits and what is counted, over one engine. It listens from
 * server_open on and answers 503 until server_start tells it of a model; after server_drain new
 * requests get 503 and those that run go on. */
#ifndef TMF_RUNTIME_SERVE_SERVER_H
#define TMF_RUNTIME_SERVE_SERVER_H

#include "formats/chat.h"
#include "runtime/serve/engine.h"
#include "runtime/serve/http.h"
#include "runtime/serve/metrics.h"

#define SERVER_MAX_NAMES 16
#define SERVER_MAX_KEYS  64

typedef struct {
    http_opts http;           /* timeout_body is the server's own */
    const char *const *names; /* [n_names] of the model: the first is told, the others are taken */
    int n_names;
    const char *const *keys; /* [n_keys] hashed at once, not kept; none: every request may come */
    int n_keys;
    const char *const *origins; /* [n_origins] of pages elsewhere that may call */
    int n_origins;
    bool check_host;          /* loopback: refuse names that are not ours (DNS rebinding) */
    bool strict_params;       /* unknown parameters are refused */
    metrics_names alias;      /* of /metrics */
    int64_t timeout_ms;       /* of a request that says none; 0: none */
    int32_t queue_ms;         /* longest wait for a place in the batch; 0: none */
    int32_t max_per_key;      /* answers at once, running or waiting, of one key; 0: any number */
    int64_t max_queue_tokens; /* of prompts whose answers have not begun; 0: any number. One request
                                  passes however long it is */
    size_t max_head_bytes;
    /* One JSON line a request, no line end. NULL: none. Any thread. */
    void (*log)(void *ud, const char *line);
    void *log_ud;
} server_opts;

/* Borrowed until server_close. */
typedef struct {
    engine *g;
    const tokenizer *t;
    const chat *c;
    const char *meta_instruction; /* as in chat_request; NULL: the template's own */
    const int32_t *stop_ids;      /* what ends an answer, chat_stop_ids */
    int n_stop_ids;
    int32_t session_len, max_batch, max_queue;
    int kv_bits;
    const char *quant; /* "w4" or "f16", for /metrics and /props */
    int64_t weights_bytes, kv_bytes;
} server_model;

typedef struct server server;
/* Everything in o but the paths in http and log is copied. */
err_code server_open(server **out, const server_opts *o, const job *j, err *e);
int32_t server_port(const server *s);
/* http_reload */
err_code server_reload(server *s, err *e);
void server_loading(server *s, int percent);
err_code server_start(server *s, const server_model *m, err *e);
void server_drain(server *s);
int32_t server_active(const server *s); /* requests being answered */
/* Answers that still run end with an error. */
void server_abort(server *s);
/* Ends every connection and closes every answer: call it before engine_close. */
void server_close(server **s);

#endif
