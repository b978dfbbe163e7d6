/* HTTP/1.1 as a thread a connection: requests come whole, answers go out whole or piece by piece.
 * Callers see bytes; http.c alone sees the library that parses. Limits on connections, headers,
 * body and every wait are enforced here. */
#ifndef TMF_RUNTIME_SERVE_HTTP_H
#define TMF_RUNTIME_SERVE_HTTP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/job.h"
#include "runtime/serve/out.h"

typedef struct http http;

typedef struct {
    const char *method, *path; /* path: decoded, without the query */
    const char *body;          /* [n_body] */
    size_t n_body;
    int64_t body_bytes; /* as announced; -1: not, though a body may come */
    size_t header_bytes;
    bool http10;
    int fd;     /* its socket: poll it for POLLRDHUP while an answer takes its time */
    void *ud;   /* the callbacks' own; NULL at first */
    void *conn; /* http.c's */
} http_request;
/* The first value of a header, NULL when there is none; how many there are. */
const char *http_header(const http_request *r, const char *name);
int http_header_count(const http_request *r, const char *name);
/* The value of ?name=, "" without one, NULL when it is not there. */
const char *http_query(const http_request *r, const char *name);

typedef struct {
    int status;
    out_buf fields; /* by http_reply_field */
    out_buf body;
    const void *fixed; /* instead of body: bytes that outlive the server, [n_fixed] */
    size_t n_fixed;
    /* instead of both: appends at least one byte to o, or returns false: the end. Called by the
     * connection's thread, may block. */
    bool (*next)(void *ud, out_buf *o);
    void *next_ud;
    bool close; /* end the connection behind it */
} http_reply;
void http_reply_field(http_reply *r, const char *name, const char *value);

typedef struct {
    /* Headers are here, the body is not: false with *a filled refuses the request. */
    bool (*head)(void *ud, http_request *r, http_reply *a);
    /* The whole request: fills *a. In the connection's thread, may block. */
    void (*request)(void *ud, http_request *r, http_reply *a);
    /* The answer is out (`gone`: or could not be). status 408: the request never came whole. */
    void (*done)(void *ud, http_request *r, int status, size_t bytes, bool gone);
    void *ud;
} http_calls;

typedef struct {
    const char *host, *unix_path; /* unix_path: instead of host and port, mode 0600 */
    int32_t port;                 /* 0: any, see http_port */
    int32_t max_connections;
    size_t max_body_bytes;
    int32_t head_ms, body_ms; /* to receive headers and body */
    int32_t idle_ms;          /* between requests of a connection */
    int32_t stall_ms;         /* without progress of what is sent */
    const char *timeout_body; /* JSON of a 408; borrowed */
    /* PEM files: HTTPS (TLS 1.2 and 1.3) instead of HTTP. Both or none; borrowed. */
    const char *tls_cert, *tls_key;
} http_opts;
/* Listens from now on. E_IO names the address; of files as tls_load. */
err_code http_open(http **out, const http_opts *o, const http_calls *c, const job *j, err *e);
int32_t http_port(const http *h);
/* Reads certificate and key again, for connections to come; what is there stays when it fails.
 * Nothing without TLS. */
err_code http_reload(http *h, err *e);
/* Ends every connection; callbacks may come until it returns. */
void http_close(http **h);

#endif
