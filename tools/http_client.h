/* Requests to an OpenAI-compatible server, over libcurl: whole answers, and streams of server-sent
 * events. All of a client runs in the thread that calls http_client_step; many streams may be open
 * at once. */
#ifndef TMF_TOOLS_HTTP_CLIENT_H
#define TMF_TOOLS_HTTP_CLIENT_H

#include "base/job.h"
#include "base/json.h"

typedef struct http_client http_client;
/* url: "host:port", "http://host:port", with or without "/v1" behind, or "unix:PATH" of a socket.
 * key_file: its first key goes out as bearer token; NULL: that of the environment variable
 * TM_RUN_API_KEY, if it is set. Nothing is sent yet. */
err_code http_client_open(http_client **out, const char *url, const char *key_file, err *e);
void http_client_close(http_client **c);           /* every stream must have ended or been closed */
const char *http_client_url(const http_client *c); /* without "/v1" */

/* ---- whole answers ---- */
/* GET path, or POST body where it is not NULL; the answer as JSON, freed with cJSON_Delete. Waits,
 * until j is stopped. E_IO: no connection, or the server failed (5xx); E_BUSY: 429, 503; E_INPUT:
 * other statuses, and answers that are no JSON. */
err_code http_client_json(http_client *c, const char *path, const char *body, const job *j,
                          cJSON **out, err *e);
/* The id of the first model that the server names; free with mem_free. */
err_code http_client_model(http_client *c, const job *j, char **out, err *e);

/* ---- streams ---- */
typedef struct http_stream http_stream;
typedef struct {
    /* The data of one event, NUL-terminated. False closes the connection; end follows. */
    bool (*event)(void *ud, const char *data, size_t n);
    /* Last call: status 0 when there was no answer at all; why is OK, or an error as above (also
     * when the connection broke, E_CANCELED after event was false). The stream is gone then. */
    void (*end)(void *ud, long status, const err *why);
    void *ud;
} http_stream_calls;
/* POST body (copied) to path. *out may be NULL; else it is valid until end was called. */
err_code http_stream_open(http_client *c, const char *path, const char *body,
                          const http_stream_calls *calls, http_stream **out, err *e);
void http_stream_close(http_stream *s); /* closes the connection; end is not called */
/* Moves every stream on, calling back as things come; waits for at most wait_ms when there is
 * nothing to do. *open: how many streams there still are (NULL: not asked). */
err_code http_client_step(http_client *c, int wait_ms, int *open, err *e);

/* ---- server-sent events, apart from any connection ---- */
typedef struct {
    char *line, *data; /* owned; NULL while empty */
    size_t n_line, line_cap, n_data, data_cap;
    bool has_data, after_cr, started;
} sse_parser; /* zero-init */
#define SSE_MAX_EVENT ((size_t)16 << 20)
/* Bytes as they come, in any pieces. Lines end in LF, CR LF or CR; comments and fields other than
 * data are passed over. E_LIMIT: an event of more than SSE_MAX_EVENT; E_CANCELED: fn was false. */
err_code sse_feed(sse_parser *p, const char *bytes, size_t n,
                  bool (*fn)(void *ud, const char *data, size_t n), void *ud, err *e);
void sse_free(sse_parser *p);

/* An answer's JSON, or an event's, as json_parse has it; but U+0000 in strings becomes U+FFFD. */
err_code http_answer_json(cJSON **out, const char *text, size_t n, const char *what, err *e);
/* What "error" of an answer says, on one line, without control bytes, into buf. False when o has
 * none. Takes {"error":{"message","code"|"type"}}, {"error":"..."}, {"message":...} and
 * {"detail":...}. */
bool http_error_text(const cJSON *o, char *buf, size_t cap);

#endif
