/* The only file that sees libmicrohttpd. A thread a connection: there a callback may wait for a
 * token and a hang-up at once, which suspended connections of this library's versions cannot. Its
 * own time limits look at idleness alone and are off: http_watch.c keeps ours. */
#include "runtime/serve/http.h"

#include <errno.h>
#include <microhttpd.h>
#include <netdb.h>
#include <netinet/in.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include "base/mem.h"
#include "runtime/serve/http_watch.h"
#include "runtime/serve/tls.h"

#define HTTP_CONN_BYTES \
    ((size_t)256 << 10) /* the library's buffer of a connection, lazily touched */
#define HTTP_STACK_BYTES ((size_t)2 << 20)
#define HTTP_BACKLOG     1024
#define HTTP_LINGER_MS \
    1000 /* what comes behind a refusal is read so long, or the peer never sees it */
#define HTTP_EXTRA_SLOTS 64 /* connections being cleaned up */

struct http {
    http_opts o;
    http_calls c;
    struct MHD_Daemon *daemon;
    http_watch *watch;
    tls_pair *tls; /* NULL: plain HTTP */
    int fd;        /* listening; -1 once the library closed it */
    int32_t port;
    char unix_path[108];
    const job *j;
};

/* One request and its answer. */
typedef struct {
    http *h;
    http_request r;
    http_reply a;
    http_watch_slot *slot;
    char *body;
    size_t n_body, cap_body, dropped;
    size_t sent_at; /* of a.body while it is streamed */
    size_t sent;
    bool refused, ended, linger;
} exchange;

/* ---- what callers use ---- */

const char *http_header(const http_request *r, const char *name)
{
    return MHD_lookup_connection_value(r->conn, MHD_HEADER_KIND, name);
}

typedef struct {
    const char *name;
    int n;
} header_count;

static enum MHD_Result count_header(void *ud, enum MHD_ValueKind kind, const char *key,
                                    const char *value)
{
    header_count *c = ud;
    (void)kind;
    (void)value;
    if (key && strcasecmp(key, c->name) == 0) c->n++;
    return MHD_YES;
}

int http_header_count(const http_request *r, const char *name)
{
    header_count c = {name, 0};
    (void)MHD_get_connection_values(r->conn, MHD_HEADER_KIND, count_header, &c);
    return c.n;
}

const char *http_query(const http_request *r, const char *name)
{
    const char *value = NULL;
    size_t n;
    if (MHD_lookup_connection_value_n(r->conn, MHD_GET_ARGUMENT_KIND, name, strlen(name), &value,
                                      &n) != MHD_YES)
        return NULL;
    return value ? value : "";
}

void http_reply_field(http_reply *r, const char *name, const char *value)
{
    out_bytes(&r->fields, name, strlen(name) + 1);
    out_bytes(&r->fields, value, strlen(value) + 1);
}

/* ---- answers ---- */

static ssize_t read_stream(void *cls, uint64_t pos, char *buf, size_t max)
{
    exchange *x = cls;
    out_buf *b = &x->a.body;
    (void)pos;
    if (x->sent_at == b->n) {
        if (x->ended) return MHD_CONTENT_READER_END_OF_STREAM;
        http_watch_set(x->slot, WATCH_BUSY);
        out_reset(b);
        x->sent_at = 0;
        x->ended = !x->a.next(x->a.next_ud, b);
        http_watch_set(x->slot, WATCH_WRITE);
        if (b->failed) return MHD_CONTENT_READER_END_WITH_ERROR;
        if (b->n == 0) return MHD_CONTENT_READER_END_OF_STREAM;
    }
    const size_t n = b->n - x->sent_at < max ? b->n - x->sent_at : max;
    memcpy(buf, b->s + x->sent_at, n);
    x->sent_at += n;
    x->sent += n;
    return (ssize_t)n;
}

static struct MHD_Response *make_response(exchange *x)
{
    http_reply *a = &x->a;
    if (a->next)
        return MHD_create_response_from_callback(MHD_SIZE_UNKNOWN, 16384, read_stream, x, NULL);
    /* The library does not write into it; its parameter is not const. */
    void *body = a->fixed ? (void *)(uintptr_t)a->fixed : a->body.s;
    const size_t n = a->fixed ? a->n_fixed : a->body.n;
    x->sent = n;
    return MHD_create_response_from_buffer(n, n ? body : (void *)(uintptr_t) "",
                                           MHD_RESPMEM_PERSISTENT);
}

static enum MHD_Result queue(exchange *x, struct MHD_Connection *conn)
{
    http_reply *a = &x->a;
    const char *p = a->fields.s, *end = p + a->fields.n;
    http_watch_set(x->slot, WATCH_WRITE);
    struct MHD_Response *response = a->body.failed || a->fields.failed ? NULL : make_response(x);
    if (!response) return MHD_NO;
    while (p < end) {
        const char *value = p + strlen(p) + 1;
        (void)MHD_add_response_header(response, p, value);
        p = value + strlen(value) + 1;
    }
    if (a->close || x->linger)
        (void)MHD_add_response_header(response, MHD_HTTP_HEADER_CONNECTION, "close");
    const enum MHD_Result rc = MHD_queue_response(conn, (unsigned)a->status, response);
    MHD_destroy_response(response);
    return rc;
}

/* ---- requests ---- */

static int64_t announced_bytes(const http_request *r)
{
    const char *n = http_header(r, MHD_HTTP_HEADER_CONTENT_LENGTH);
    int64_t v = 0;
    if (http_header(r, MHD_HTTP_HEADER_TRANSFER_ENCODING)) return -1;
    for (; n && *n; n++) {
        if (*n < '0' || *n > '9' || v > INT64_MAX / 10 - 1) return -1;
        v = 10 * v + (*n - '0');
    }
    return v;
}

static exchange *begin(http *h, struct MHD_Connection *conn, const char *url, const char *method,
                       const char *version)
{
    err ignored;
    void *p;
    const union MHD_ConnectionInfo *slot = MHD_get_connection_info(
        conn, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    const union MHD_ConnectionInfo *fd = MHD_get_connection_info(conn,
                                                                 MHD_CONNECTION_INFO_CONNECTION_FD);
    const union MHD_ConnectionInfo *bytes = MHD_get_connection_info(
        conn, MHD_CONNECTION_INFO_REQUEST_HEADER_SIZE);
    if (!slot || !slot->socket_context || !fd) return NULL;
    if (mem_alloc(&p, 1, sizeof(exchange), "request", &ignored) != OK) return NULL;
    exchange *x = p;
    x->h = h;
    x->slot = slot->socket_context;
    x->r = (http_request){.method = method,
                          .path = url,
                          .fd = fd->connect_fd,
                          .conn = conn,
                          .header_bytes = bytes ? bytes->header_size : 0,
                          .http10 = strcmp(version, "HTTP/1.1") != 0};
    x->r.body_bytes = announced_bytes(&x->r);
    return x;
}

/* A body within bounds is read to its end even when it was refused, so that the connection can go
 * on; of others the answer comes at once, and what still arrives is read before it is closed. */
static enum MHD_Result accept_head(exchange *x, struct MHD_Connection *conn)
{
    http_watch_set(x->slot, WATCH_BODY);
    x->refused = !x->h->c.head(x->h->c.ud, &x->r, &x->a);
    if (!x->refused || (x->r.body_bytes >= 0 && !x->a.close &&
                        (uint64_t)x->r.body_bytes <= x->h->o.max_body_bytes))
        return MHD_YES;
    x->linger = true;
    return queue(x, conn);
}

static enum MHD_Result add_body(exchange *x, const char *data, size_t n)
{
    err ignored;
    void *p;
    const size_t max = x->h->o.max_body_bytes;
    if (x->refused || n > max - x->n_body) {
        /* http calls refuse by the announced length; this is a body without one. */
        x->refused = true;
        x->dropped += n;
        return x->dropped > max ? MHD_NO : MHD_YES;
    }
    if (x->n_body + n + 1 > x->cap_body) {
        size_t cap = x->r.body_bytes > 0 ? (size_t)x->r.body_bytes + 1 : 4096;
        if (cap < x->n_body + n + 1) cap = 2 * (x->n_body + n + 1);
        if (mem_alloc(&p, cap, 1, "body", &ignored) != OK) return MHD_NO;
        if (x->n_body) memcpy(p, x->body, x->n_body);
        mem_free(x->body);
        x->body = p;
        x->cap_body = cap;
    }
    memcpy(x->body + x->n_body, data, n);
    x->n_body += n;
    return MHD_YES;
}

static enum MHD_Result handle(void *cls, struct MHD_Connection *conn, const char *url,
                              const char *method, const char *version, const char *data, size_t *n,
                              void **ud)
{
    http *h = cls;
    exchange *x = *ud;
    if (!x) {
        x = begin(h, conn, url, method, version);
        *ud = x;
        return x ? accept_head(x, conn) : MHD_NO;
    }
    if (*n) {
        const enum MHD_Result rc = add_body(x, data, *n);
        *n = 0;
        return rc;
    }
    http_watch_set(x->slot, WATCH_BUSY);
    x->r.body = x->body ? x->body : "";
    x->r.n_body = x->n_body;
    if (x->dropped && !x->a.status) { /* it grew too long: the head's refusal of that length */
        x->r.body_bytes = INT64_MAX;
        (void)h->c.head(h->c.ud, &x->r, &x->a);
    } else if (!x->refused) {
        h->c.request(h->c.ud, &x->r, &x->a);
    }
    return queue(x, conn);
}

/* What the peer still sends is read for a moment: closing with unread bytes would reset the
 * connection, and the answer with it. TLS has a last word to write behind it. */
static void linger(int fd, bool tls)
{
    char sink[16384];
    int left = HTTP_LINGER_MS;
    if (!tls) (void)shutdown(fd, SHUT_WR);
    while (left > 0) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (poll(&p, 1, 50) > 0 && recv(fd, sink, sizeof sink, MSG_DONTWAIT) <= 0) break;
        left -= p.revents ? 1 : 50;
    }
}

static void completed(void *cls, struct MHD_Connection *conn, void **ud,
                      enum MHD_RequestTerminationCode code)
{
    http *h = cls;
    exchange *x = *ud;
    (void)conn;
    if (!x) return;
    const bool expired = atomic_load(&x->slot->expired) && !x->a.status;
    const bool gone = code != MHD_REQUEST_TERMINATED_COMPLETED_OK;
    http_watch_set(x->slot, WATCH_IDLE);
    if (x->linger && !gone) linger(x->r.fd, h->tls != NULL);
    h->c.done(h->c.ud, &x->r, expired ? 408 : x->a.status, x->sent, gone && !expired);
    out_free(&x->a.fields);
    out_free(&x->a.body);
    mem_free(x->body);
    mem_free(x);
    *ud = NULL;
}

static void connection(void *cls, struct MHD_Connection *conn, void **slot,
                       enum MHD_ConnectionNotificationCode code)
{
    http *h = cls;
    if (code == MHD_CONNECTION_NOTIFY_STARTED) {
        const union MHD_ConnectionInfo *fd = MHD_get_connection_info(
            conn, MHD_CONNECTION_INFO_CONNECTION_FD);
        *slot = fd ? http_watch_add(h->watch, fd->connect_fd, h) : NULL;
        if (!*slot && fd) (void)shutdown(fd->connect_fd, SHUT_RDWR);
    } else if (*slot) {
        http_watch_remove(h->watch, *slot);
    }
}

static void *request_line(void *cls, const char *uri, struct MHD_Connection *conn)
{
    const union MHD_ConnectionInfo *slot = MHD_get_connection_info(
        conn, MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    (void)cls;
    (void)uri;
    if (slot && slot->socket_context) http_watch_set(slot->socket_context, WATCH_HEAD);
    return NULL;
}

/* ---- listening ---- */

static err_code listen_unix(http *h, err *e)
{
    struct sockaddr_un a = {.sun_family = AF_UNIX};
    struct stat st;
    const char *path = h->o.unix_path;
    if (strlen(path) >= sizeof a.sun_path)
        return err_set(e, E_USAGE, "socket '%s': a path of at most %zu bytes is needed", path,
                       sizeof a.sun_path - 1);
    memcpy(a.sun_path, path, strlen(path) + 1);
    if (lstat(path, &st) == 0 && !S_ISSOCK(st.st_mode))
        return err_set(e, E_IO, "'%s' is there and no socket", path);
    (void)unlink(path);
    h->fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (h->fd < 0) return err_sys(e, E_IO, errno, "cannot make a socket");
    (void)fchmod(h->fd, 0600); /* the file comes with these rights */
    if (bind(h->fd, (struct sockaddr *)&a, sizeof a) != 0)
        return err_sys(e, E_IO, errno, "cannot bind to '%s'", path);
    memcpy(h->unix_path, path, strlen(path) + 1);
    if (chmod(path, 0600) != 0 || listen(h->fd, HTTP_BACKLOG) != 0)
        return err_sys(e, E_IO, errno, "cannot listen on '%s'", path);
    return OK;
}

static int32_t bound_port(int fd)
{
    struct sockaddr_storage a;
    socklen_t n = sizeof a;
    if (getsockname(fd, (struct sockaddr *)&a, &n) != 0) return 0;
    return ntohs(a.ss_family == AF_INET6 ? ((struct sockaddr_in6 *)&a)->sin6_port
                                         : ((struct sockaddr_in *)&a)->sin_port);
}

static err_code listen_tcp(http *h, err *e)
{
    const struct addrinfo hints = {.ai_socktype = SOCK_STREAM, .ai_flags = AI_PASSIVE};
    struct addrinfo *list = NULL;
    char port[16];
    const int one = 1;
    (void)snprintf(port, sizeof port, "%d", h->o.port);
    const int rc = getaddrinfo(h->o.host, port, &hints, &list);
    if (rc != 0) return err_set(e, E_IO, "cannot resolve '%s': %s", h->o.host, gai_strerror(rc));
    int number = EADDRNOTAVAIL;
    for (const struct addrinfo *a = list; a && h->port == 0; a = a->ai_next) {
        h->fd = socket(a->ai_family, a->ai_socktype | SOCK_CLOEXEC, a->ai_protocol);
        if (h->fd < 0) continue;
        (void)setsockopt(h->fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof one);
        if (bind(h->fd, a->ai_addr, a->ai_addrlen) == 0 && listen(h->fd, HTTP_BACKLOG) == 0) {
            h->port = bound_port(h->fd);
        } else {
            number = errno;
            (void)close(h->fd);
            h->fd = -1;
        }
    }
    freeaddrinfo(list);
    if (h->port) return OK;
    return err_sys(e, E_IO, number, "cannot listen on %s:%d", h->o.host, h->o.port);
}

/* What a handshake is made with. The library's callback has no pointer of ours: its session's is
 * the connection, and that one's is the slot. */
static int handshake_pair(gnutls_session_t session, const struct gnutls_cert_retr_st *info,
                          gnutls_pcert_st **certs, unsigned *n_certs, gnutls_ocsp_data_st **ocsp,
                          unsigned *n_ocsp, gnutls_privkey_t *key, unsigned *flags)
{
    const union MHD_ConnectionInfo *slot = MHD_get_connection_info(
        gnutls_session_get_ptr(session), MHD_CONNECTION_INFO_SOCKET_CONTEXT);
    (void)info;
    *ocsp = NULL;
    *n_ocsp = 0;
    *flags = GNUTLS_CERT_RETR_DEINIT_ALL;
    if (!slot || !slot->socket_context) return -1;
    const http_watch_slot *s = slot->socket_context;
    return tls_copy(((http *)s->ud)->tls, certs, n_certs, key);
}

static void library_log(void *cls, const char *fmt, va_list args)
{
    char line[256];
    (void)vsnprintf(line, sizeof line, fmt, args);
    line[strcspn(line, "\n")] = 0;
    job_log(cls, LOG_DEBUG, "http: %s", line);
}

static err_code start(http *h, err *e)
{
    const http_watch_opts w = {.slots = h->o.max_connections + HTTP_EXTRA_SLOTS,
                               .limit_ms = {[WATCH_FRESH] = h->o.head_ms,
                                            [WATCH_HEAD] = h->o.head_ms,
                                            [WATCH_BODY] = h->o.body_ms,
                                            [WATCH_WRITE] = h->o.stall_ms,
                                            [WATCH_IDLE] = h->o.idle_ms},
                               /* nothing can be put beside what TLS sends */
                               .timeout_body = h->tls ? NULL : h->o.timeout_body};
    /* The last option ends the list where there is no TLS. */
    const unsigned tls = h->tls ? MHD_USE_TLS : 0;
    const struct MHD_OptionItem tls_options[] = {
        {tls ? MHD_OPTION_HTTPS_PRIORITIES : MHD_OPTION_END, 0, (void *)(uintptr_t)TLS_PRIORITIES},
        {MHD_OPTION_HTTPS_CERT_CALLBACK2, 0, (void *)(uintptr_t)handshake_pair},
        {MHD_OPTION_END, 0, NULL}};
    TRY(http_watch_open(&h->watch, &w, e));
    h->daemon = MHD_start_daemon(
        MHD_USE_THREAD_PER_CONNECTION | MHD_USE_INTERNAL_POLLING_THREAD | MHD_USE_POLL |
            MHD_USE_ITC | MHD_USE_ERROR_LOG | tls,
        0, NULL, NULL, handle, h, MHD_OPTION_EXTERNAL_LOGGER, library_log, (void *)(uintptr_t)h->j,
        MHD_OPTION_LISTEN_SOCKET, h->fd, MHD_OPTION_CONNECTION_LIMIT,
        (unsigned)h->o.max_connections, MHD_OPTION_CONNECTION_MEMORY_LIMIT, HTTP_CONN_BYTES,
        MHD_OPTION_CONNECTION_TIMEOUT, 0U, MHD_OPTION_THREAD_STACK_SIZE, HTTP_STACK_BYTES,
        MHD_OPTION_NOTIFY_COMPLETED, completed, h, MHD_OPTION_NOTIFY_CONNECTION, connection, h,
        MHD_OPTION_URI_LOG_CALLBACK, request_line, h, MHD_OPTION_ARRAY, tls_options,
        MHD_OPTION_END);
    return h->daemon ? OK : err_set(e, E_IO, "cannot start the HTTP server");
}

static void tell_of_tls(const http *h)
{
    if (tls_key_is_open(h->tls))
        job_log(h->j, LOG_WARN, "'%s': every user of this machine can read this key", h->o.tls_key);
    if (tls_is_expired(h->tls))
        job_log(h->j, LOG_WARN, "'%s': the certificate has expired", h->o.tls_cert);
}

static err_code open_tls(http *h, err *e)
{
    const http_opts *o = &h->o;
    if (!o->tls_cert && !o->tls_key) return OK;
    if (!o->tls_cert || !o->tls_key)
        return err_set(e, E_USAGE, "TLS needs a certificate and its key: %s is missing",
                       o->tls_cert ? "the key" : "the certificate");
    if (MHD_is_feature_supported(MHD_FEATURE_TLS) != MHD_YES ||
        MHD_is_feature_supported(MHD_FEATURE_HTTPS_CERT_CALLBACK2) != MHD_YES)
        return err_set(e, E_UNSUPPORTED, "TLS: this libmicrohttpd (%s) was built without it",
                       MHD_get_version());
    TRY(tls_open(&h->tls, o->tls_cert, o->tls_key, e));
    tell_of_tls(h);
    return OK;
}

err_code http_reload(http *h, err *e)
{
    if (!h->tls) return OK;
    TRY(tls_load(h->tls, e));
    tell_of_tls(h);
    return OK;
}

err_code http_open(http **out, const http_opts *o, const http_calls *c, const job *j, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(http), "http", e));
    http *h = p;
    h->o = *o;
    h->c = *c;
    h->j = j;
    h->fd = -1;
    err_code rc = open_tls(h, e);
    if (rc == OK) rc = o->unix_path ? listen_unix(h, e) : listen_tcp(h, e);
    if (rc == OK) rc = start(h, e);
    if (rc != OK) http_close(&h);
    *out = h;
    return rc;
}

int32_t http_port(const http *h) { return h->port; }

void http_close(http **h)
{
    if (!h || !*h) return;
    if ((*h)->daemon) {
        MHD_stop_daemon((*h)->daemon); /* closes the listening socket */
        (*h)->fd = -1;
    }
    if ((*h)->fd >= 0) (void)close((*h)->fd);
    if (*(*h)->unix_path) (void)unlink((*h)->unix_path);
    http_watch_close(&(*h)->watch);
    tls_close(&(*h)->tls);
    mem_free(*h);
    *h = NULL;
}
