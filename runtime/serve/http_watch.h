/* The connections that are open and what each waits for: a thread of its own ends those that wait
 * too long for their peer. */
#ifndef TMF_RUNTIME_SERVE_HTTP_WATCH_H
#define TMF_RUNTIME_SERVE_HTTP_WATCH_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

typedef enum {
    WATCH_FRESH, /* nothing came yet */
    WATCH_HEAD,  /* a request line came */
    WATCH_BODY,
    WATCH_BUSY,  /* we work: no limit here */
    WATCH_WRITE, /* the peer has to take what is sent */
    WATCH_IDLE,  /* between two requests */
    WATCH_STATES
} http_watch_state;

typedef struct {
    int fd; /* -1: free */
    atomic_int state;
    atomic_llong since_ms;
    atomic_bool expired;
    int unsent; /* of the kernel's, when last looked at */
    void *ud;   /* the adder's */
} http_watch_slot;

typedef struct http_watch http_watch;
typedef struct {
    int32_t slots;
    int32_t limit_ms[WATCH_STATES]; /* 0: none */
    const char *timeout_body;       /* borrowed: JSON of the 408 that FRESH, HEAD and BODY get */
} http_watch_opts;
err_code http_watch_open(http_watch **out, const http_watch_opts *o, err *e);
void http_watch_close(http_watch **w);
/* NULL: no slot is free. */
http_watch_slot *http_watch_add(http_watch *w, int fd, void *ud);
/* Before the socket is closed. */
void http_watch_remove(http_watch *w, http_watch_slot *s);
/* From now on it waits for this. */
void http_watch_set(http_watch_slot *s, http_watch_state state);

#endif
