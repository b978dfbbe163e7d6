/* The life of the server and of a request: who may come, what is refused before it is read, and
 * what is counted and logged when it is over. */
#include "runtime/serve/server.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <time.h>

#include "base/mem.h"
#include "runtime/clock.h"
#include "runtime/serve/server_internal.h"
#include "runtime/serve/server_run.h"

#define SESSIONS       1024
#define SESSION_TOKENS ((int64_t)16 << 20)

/* ---- small parts ---- */

static void set_retry(call *c, api_fault *f)
{
    /* What waits divided by what comes out: a place is free about then. */
    server *s = c->s;
    const double mean = atomic_load(&s->answer_s);
    const int32_t waiting = atomic_load(&s->answers) - s->m.max_batch;
    const double wait = s->m.max_batch > 0 ? mean * waiting / s->m.max_batch : 0;
    f->retry_after_s = wait < 1 ? 1 : wait > 60 ? 60 : (int32_t)ceil(wait);
}

static void common_fields(call *c)
{
    const char *origin = http_header(c->r, "Origin");
    http_reply_field(c->a, "x-request-id", c->id);
    if (c->s->o.n_origins == 0) return;
    http_reply_field(c->a, "Vary", "Origin");
    for (int i = 0; origin && i < c->s->o.n_origins; i++)
        if (strcmp(origin, c->s->origins[i]) == 0)
            http_reply_field(c->a, "Access-Control-Allow-Origin", origin);
}

void server_json(call *c, int status)
{
    c->a->status = status;
    http_reply_field(c->a, "Content-Type", "application/json");
    http_reply_field(c->a, "Cache-Control", "no-store");
}

void server_fail(call *c, const api_fault *f)
{
    char seconds[16];
    server_leave(c);
    out_reset(&c->a->body);
    api_fault_json(&c->a->body, f, c->id);
    server_json(c, api_status(f->kind));
    c->reason = api_code(f->kind);
    if (f->kind == API_KEY) http_reply_field(c->a, "WWW-Authenticate", "Bearer");
    if (f->retry_after_s) {
        (void)snprintf(seconds, sizeof seconds, "%d", f->retry_after_s);
        http_reply_field(c->a, "Retry-After", seconds);
    }
}

static bool refuse(call *c, api_fault_kind kind, const char *text)
{
    api_fault f;
    (void)api_fail(&f, kind, NULL, "%s", text);
    if (kind == API_UNAVAILABLE) f.retry_after_s = 5;
    server_fail(c, &f);
    return false;
}

/* ---- the door ---- */

static bool too_many(call *c, const char *reason, const char *fmt, long long most)
{
    api_fault f;
    (void)api_fail(&f, API_QUEUE_FULL, NULL, fmt, most);
    set_retry(c, &f);
    metrics_rejected(c->s->counts, reason);
    server_fail(c, &f);
    return false;
}

/* What c has already counts, too. */
static bool enter_key(call *c, int32_t n)
{
    const int32_t most = c->s->o.max_per_key;
    if (!c->key || !most) return true;
    if (atomic_fetch_add(&c->key->answers, n) + n <= most) return true;
    (void)atomic_fetch_sub(&c->key->answers, n);
    return too_many(c, "key_limit", "this key may have %lld requests that run or wait", most);
}

bool server_enter(call *c, int32_t n)
{
    server *s = c->s;
    if (!enter_key(c, n)) return false;
    c->n_door += n;
    if (atomic_fetch_add(&s->answers, n) + n <= s->capacity) return true;
    return too_many(c, "queue_full", "the queue is full: %lld requests run or wait", s->capacity);
}

static bool queue_is_full(call *c)
{
    return too_many(c, "queue_tokens", "prompts of %lld tokens wait already",
                    (long long)c->s->o.max_queue_tokens);
}

bool server_queue(call *c, int64_t n_tokens)
{
    server *s = c->s;
    const long long most = s->o.max_queue_tokens, there = atomic_fetch_add(&s->queued, n_tokens);
    c->n_queued += n_tokens;
    return !most || !there || there + n_tokens <= most || queue_is_full(c);
}

void server_begun(call *c)
{
    (void)atomic_fetch_sub(&c->s->queued, c->n_queued);
    c->n_queued = 0;
}

void server_leave(call *c)
{
    server *s = c->s;
    server_begun(c);
    if (c->n_door == 0) return;
    if (c->key && s->o.max_per_key) (void)atomic_fetch_sub(&c->key->answers, c->n_door);
    const double took = clock_s() - c->began, mean = atomic_load(&s->answer_s);
    if (c->n_new > 0) atomic_store(&s->answer_s, mean > 0 ? 0.9 * mean + 0.1 * took : took);
    (void)atomic_fetch_sub(&s->answers, c->n_door);
    c->n_door = 0;
}

bool server_parse(call *c, unsigned who, api_request *q)
{
    const server *s = c->s;
    const bool of_key = c->key && s->o.max_per_key && s->o.max_per_key < s->capacity;
    const int32_t most = of_key ? s->o.max_per_key : s->capacity;
    const api_limits l = {.vocab = tokenizer_vocab(s->m.t),
                          .max_n = most < s->m.max_batch ? most : s->m.max_batch,
                          .max_answers = most,
                          .strict = s->o.strict_params};
    api_fault f;
    if (api_parse(q, who, c->r->body, c->r->n_body, &l, &f) == OK) return true;
    server_fail(c, &f);
    return false;
}

bool server_is_ours(call *c, const char *name)
{
    api_fault f;
    for (int i = 0; i < c->s->o.n_names; i++)
        if (!name || strcmp(name, c->s->names[i]) == 0) return true;
    (void)api_fail(&f, API_NO_MODEL, "model", "the model '%.100s' does not exist here", name);
    server_fail(c, &f);
    return false;
}

/* ---- who may come ---- */

static bool is_local_name(const char *s, size_t n)
{
    static const char *const names[] = {"localhost", "127.0.0.1", "[::1]"};
    for (size_t i = 0; i < sizeof names / sizeof names[0]; i++)
        if (strlen(names[i]) == n && strncasecmp(s, names[i], n) == 0) return true;
    return false;
}

/* "name", "name:port" or "[v6]:port". */
static size_t name_bytes(const char *host)
{
    const char *end = *host == '[' ? strchr(host, ']') : NULL;
    return end ? (size_t)(end + 1 - host) : strcspn(host, ":");
}

static bool host_is_ours(const server *s, const char *host)
{
    const size_t n = name_bytes(host);
    if (host[n] && (host[n] != ':' || strspn(host + n + 1, "0123456789") != strlen(host + n + 1)))
        return false;
    return is_local_name(host, n) || (strlen(s->host) == n && strncasecmp(host, s->host, n) == 0);
}

/* Pages of this server itself, and those that were allowed. */
static bool origin_is_ours(const server *s, const char *origin, const char *host)
{
    const char *name = strstr(origin, "://");
    for (int i = 0; i < s->o.n_origins; i++)
        if (strcmp(origin, s->origins[i]) == 0) return true;
    return name && host && strcasecmp(name + 3, host) == 0;
}

static bool check_peer(call *c)
{
    const server *s = c->s;
    const char *host = http_header(c->r, "Host"), *origin = http_header(c->r, "Origin");
    if (s->o.check_host && host && !host_is_ours(s, host))
        return refuse(c, API_FORBIDDEN, "the Host header does not name this server");
    if (origin && !origin_is_ours(s, origin, host))
        return refuse(c, API_FORBIDDEN, "requests from this origin are not allowed");
    return true;
}

/* Every key is compared, each in constant time. */
static bool check_key(call *c)
{
    server *s = c->s;
    const char *given = http_header(c->r, "Authorization");
    hash256 h;
    err ignored;
    bool found = false;
    c->salt = s->salt;
    if (s->o.n_keys == 0) return true;
    given = given && strncasecmp(given, "Bearer ", 7) == 0 ? given + 7
                                                           : http_header(c->r, "X-Api-Key");
    if (given && hash_sha256(&h, given, strlen(given), &ignored) == OK) {
        for (int i = 0; i < s->o.n_keys; i++) {
            if (!hash_equal(&h, &s->keys[i].hash)) continue;
            found = true;
            c->key = &s->keys[i];
            c->salt = c->key->salt;
        }
    }
    if (found || (c->route && c->route->open)) return true;
    return refuse(c, API_KEY, given ? "the API key is not known" : "an API key is needed");
}

/* ---- what may be asked ---- */

static bool route_matches(const server_route *w, const char *path)
{
    const size_t n = strlen(w->path);
    if (strcmp(w->path, path) == 0) return true;
    return n > 1 && w->path[n - 1] == '/' && strncmp(w->path, path, n) == 0 && path[n];
}

static bool method_matches(const server_route *w, const char *method)
{
    return strcmp(w->method, method) == 0 ||
           (strcmp(w->method, "GET") == 0 && strcmp(method, "HEAD") == 0);
}

/* The route of this path and method; *path_known: of this path at all. */
static const server_route *find_route(const char *method, const char *path, bool *path_known)
{
    const server_route *w;
    *path_known = false;
    for (int i = 0; (w = server_route_at(i)) != NULL; i++) {
        if (!route_matches(w, path)) continue;
        *path_known = true;
        if (method_matches(w, method)) return w;
    }
    return NULL;
}

static void allow_field(call *c)
{
    const server_route *w;
    char list[64] = "";
    size_t n = 0;
    for (int i = 0; (w = server_route_at(i)) != NULL && n < 32; i++) {
        if (!route_matches(w, c->r->path)) continue;
        const char *names = strcmp(w->method, "GET") == 0 ? "GET, HEAD" : w->method;
        n += (size_t)snprintf(list + n, sizeof list - n, "%s%s", n ? ", " : "", names);
    }
    http_reply_field(c->a, "Allow", list);
}

static bool is_preflight(const call *c, bool path_known)
{
    return path_known && c->s->o.n_origins && strcmp(c->r->method, "OPTIONS") == 0 &&
           http_header(c->r, "Access-Control-Request-Method");
}

static bool preflight(call *c)
{
    c->a->status = 204;
    c->reason = "preflight";
    http_reply_field(c->a, "Access-Control-Allow-Methods", "GET, POST");
    http_reply_field(c->a, "Access-Control-Allow-Headers", "Authorization, Content-Type");
    http_reply_field(c->a, "Access-Control-Max-Age", "600");
    return false;
}

static bool check_route(call *c, bool path_known)
{
    char text[160];
    if (c->route) return true;
    if (path_known) {
        (void)refuse(c, API_METHOD, "this path does not take that method");
        allow_field(c);
        return false;
    }
    (void)snprintf(text, sizeof text, "there is nothing at '%.100s'", c->r->path);
    return refuse(c, API_NOT_FOUND, text);
}

static bool is_json(const char *type)
{
    static const char json[] = "application/json";
    const size_t n = sizeof json - 1;
    if (!type || strncasecmp(type, json, n) != 0) return false;
    return type[n] == 0 || type[n] == ';' || type[n] == ' ';
}

static bool check_body(call *c)
{
    const http_request *r = c->r;
    const char *coding = http_header(r, "Content-Encoding");
    char text[96];
    if (r->body_bytes > 0 && (uint64_t)r->body_bytes > c->s->o.http.max_body_bytes) {
        (void)snprintf(text, sizeof text, "the body is longer than %zu bytes",
                       c->s->o.http.max_body_bytes);
        return refuse(c, API_TOO_LARGE, text);
    }
    if (c->route->json && (!is_json(http_header(r, "Content-Type")) ||
                           (coding && strcasecmp(coding, "identity") != 0)))
        return refuse(c, API_MEDIA_TYPE, "expected Content-Type: application/json, not encoded");
    return true;
}

/* Two ways to tell where a body ends are how requests are smuggled past proxies. */
static bool check_framing(call *c)
{
    const http_request *r = c->r;
    const int lengths = http_header_count(r, "Content-Length"),
              codings = http_header_count(r, "Transfer-Encoding"),
              hosts = http_header_count(r, "Host");
    c->a->close = true;
    if (r->header_bytes > c->s->o.max_head_bytes)
        return refuse(c, API_HEADERS, "the headers are too large");
    if (lengths + codings > 1)
        return refuse(c, API_INVALID_VALUE, "more than one Content-Length or Transfer-Encoding");
    if (hosts > 1 || (hosts == 0 && !r->http10))
        return refuse(c, API_INVALID_VALUE, "expected one Host header");
    c->a->close = false;
    return true;
}

/* ---- a request's life ---- */

static call *call_new(server *s, http_request *r, http_reply *a)
{
    err ignored;
    void *p;
    if (mem_alloc(&p, 1, sizeof(call), "request", &ignored) != OK) return NULL;
    call *c = p;
    c->s = s;
    c->r = r;
    c->a = a;
    c->began = clock_s();
    c->reason = "ok";
    c->n_prompt = -1;
    const uint64_t n = atomic_fetch_add(&s->serial, 1) * 0x9e3779b97f4a7c15ULL;
    (void)snprintf(c->id, sizeof c->id, "req-%016" PRIx64, n ^ s->salt);
    r->ud = c;
    return c;
}

static bool on_head(void *ud, http_request *r, http_reply *a)
{
    bool path_known;
    call *c = r->ud;
    if (c) return check_body(c); /* the body grew beyond what is taken */
    c = call_new(ud, r, a);
    if (!c) {
        a->status = 503;
        a->close = true;
        return false;
    }
    common_fields(c);
    c->route = find_route(r->method, r->path, &path_known);
    if (!check_framing(c) || !check_peer(c)) return false;
    if (is_preflight(c, path_known)) return preflight(c); /* browsers send no key with it */
    return check_key(c) && check_route(c, path_known) && check_body(c);
}

static bool check_model(call *c)
{
    server *s = c->s;
    char text[64];
    if (c->route->no_model) return true;
    if (!atomic_load(&s->ready)) {
        (void)snprintf(text, sizeof text, "the model is being loaded: %d %%",
                       atomic_load(&s->percent));
        metrics_rejected(s->counts, "loading");
        return refuse(c, API_UNAVAILABLE, text);
    }
    return !c->route->door || server_door(c);
}

bool server_door(call *c)
{
    server *s = c->s;
    err e;
    if (atomic_load(&s->draining)) {
        metrics_rejected(s->counts, "draining");
        c->a->close = true;
        return refuse(c, API_UNAVAILABLE, "the server is shutting down");
    }
    if (engine_health(s->m.g, &e) != OK) {
        metrics_rejected(s->counts, "failed");
        return refuse(c, API_UNAVAILABLE, "the engine has failed");
    }
    /* before anything of it is looked at */
    if (s->o.max_queue_tokens && atomic_load(&s->queued) >= s->o.max_queue_tokens)
        return queue_is_full(c);
    return server_enter(c, 1);
}

/* On the list of those being answered, and off it. */
static void list_call(call *c)
{
    server *s = c->s;
    (void)pthread_mutex_lock(&s->lock);
    c->next = s->calls;
    if (c->next) c->next->prev = c;
    s->calls = c;
    (void)pthread_mutex_unlock(&s->lock);
    (void)atomic_fetch_add(&s->active, 1);
    c->counted = true;
}

static void unlist_call(call *c)
{
    server *s = c->s;
    if (!c->counted) return;
    (void)pthread_mutex_lock(&s->lock);
    if (c->next) c->next->prev = c->prev;
    if (c->prev)
        c->prev->next = c->next;
    else
        s->calls = c->next;
    (void)pthread_mutex_unlock(&s->lock);
    (void)atomic_fetch_sub(&s->active, 1);
}

static void on_request(void *ud, http_request *r, http_reply *a)
{
    call *c = r->ud;
    (void)ud;
    (void)a;
    list_call(c);
    if (check_model(c)) c->route->handle(c);
}

static void log_line(call *c, int status, size_t bytes)
{
    char line[512];
    char ttft[32] = "null";
    const double now = clock_s();
    if (!c->s->o.log) return;
    if (c->first_s > 0) (void)snprintf(ttft, sizeof ttft, "%.1f", 1e3 * c->first_s);
    (void)snprintf(line, sizeof line,
                   "{\"time\":%lld,\"id\":\"%s\",\"method\":\"%.8s\",\"route\":\"%s\",\"code\":%d,"
                   "\"prompt_tokens\":%d,\"tokens\":%d,\"ttft_ms\":%s,\"ms\":%.1f,\"bytes\":%zu,"
                   "\"reason\":\"%s\"}",
                   (long long)time(NULL), c->id, c->route ? c->r->method : "",
                   c->route ? c->route->path : "", status, c->n_prompt < 0 ? 0 : c->n_prompt,
                   c->n_new, ttft, 1e3 * (now - c->began), bytes, c->reason);
    c->s->o.log(c->s->o.log_ud, line);
}

static void on_done(void *ud, http_request *r, int status, size_t bytes, bool gone)
{
    server *s = ud;
    call *c = r->ud;
    if (!c) return;
    if (gone || strcmp(c->reason, api_code(API_CANCELED)) == 0) {
        status = 499;
        c->reason = api_code(API_CANCELED);
        metrics_canceled(s->counts);
    }
    if (status == 408) c->reason = api_code(API_TIMEOUT);
    server_run_close(&c->run);
    server_leave(c);
    metrics_request(s->counts, c->route ? c->route->path : "none", status, c->reason);
    log_line(c, status, bytes);
    unlist_call(c);
    mem_free(c);
    r->ud = NULL;
}

/* ---- opening and closing ---- */

static err_code copy_texts(char **to, const char *const *from, int n, const char *what, err *e)
{
    if (n > SERVER_MAX_NAMES)
        return err_set(e, E_USAGE, "%s: expected at most %d, got %d", what, SERVER_MAX_NAMES, n);
    for (int i = 0; i < n; i++) TRY(mem_strdup(&to[i], from[i], e));
    return OK;
}

/* The salt is a part of the hash of key and secret, so that it tells nothing of the key. */
static err_code add_key(server *s, int i, const char *key, err *e)
{
    hash256 mixed;
    char text[65 + 16 + 1];
    if (!*key) return err_set(e, E_USAGE, "API key %d is empty", i + 1);
    TRY(hash_sha256(&s->keys[i].hash, key, strlen(key), e));
    (void)snprintf(text, sizeof text, "%s%016" PRIx64, s->keys[i].hash.hex, s->salt);
    TRY(hash_sha256(&mixed, text, strlen(text), e));
    memcpy(&s->keys[i].salt, mixed.hex, sizeof s->keys[i].salt);
    return OK;
}

static err_code copy_opts(server *s, const server_opts *o, err *e)
{
    s->o = *o;
    s->o.names = s->o.origins = s->o.keys = NULL;
    TRY(mem_strdup(&s->host, o->http.host ? o->http.host : "", e));
    s->o.http.host = s->host;
    TRY(copy_texts(s->names, o->names, o->n_names, "model names", e));
    TRY(copy_texts(s->origins, o->origins, o->n_origins, "origins", e));
    if (o->n_keys > SERVER_MAX_KEYS)
        return err_set(e, E_USAGE, "API keys: expected at most %d, got %d", SERVER_MAX_KEYS,
                       o->n_keys);
    for (int i = 0; i < o->n_keys; i++) TRY(add_key(s, i, o->keys[i], e));
    return OK;
}

static err_code listen_now(server *s, err *e)
{
    const http_calls calls = {on_head, on_request, on_done, s};
    api_fault f;
    out_buf o = {0};
    (void)api_fail(&f, API_TIMEOUT, NULL, "the request did not arrive in time");
    api_fault_json(&o, &f, NULL);
    const bool filled = !o.failed && o.n < sizeof s->timeout_body;
    if (filled) memcpy(s->timeout_body, o.s, o.n);
    out_free(&o);
    if (!filled) return err_set(e, E_NOMEM, "server: out of memory");
    s->o.http.timeout_body = s->timeout_body;
    return http_open(&s->h, &s->o.http, &calls, s->j, e);
}

err_code server_open(server **out, const server_opts *o, const job *j, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(server), "server", e));
    server *s = p;
    s->j = j;
    (void)pthread_mutex_init(&s->lock, NULL);
    s->created = (int64_t)time(NULL);
    if (getrandom(&s->salt, sizeof s->salt, 0) != sizeof s->salt) s->salt = (uint64_t)s->created;
    err_code rc = copy_opts(s, o, e);
    if (rc == OK) rc = metrics_open(&s->counts, e);
    if (rc == OK) rc = listen_now(s, e);
    if (rc != OK) server_close(&s);
    *out = s;
    return rc;
}

int32_t server_port(const server *s) { return http_port(s->h); }

err_code server_reload(server *s, err *e) { return http_reload(s->h, e); }

void server_loading(server *s, int percent) { atomic_store(&s->percent, percent); }

err_code server_start(server *s, const server_model *m, err *e)
{
    s->m = *m;
    s->capacity = m->max_batch + m->max_queue;
    for (int32_t i = 0; i < tokenizer_vocab(m->t); i++) {
        size_t n = 0, n_string = 0;
        (void)tokenizer_piece(m->t, i, &n);
        (void)tokenizer_string(m->t, i, &n_string);
        if (n > s->piece_bytes) s->piece_bytes = n;
        if (n_string > s->piece_bytes) s->piece_bytes = n_string;
    }
    TRY(session_table_open(&s->sessions, SESSIONS, SESSION_TOKENS, e));
    TRY(grammar_set_open(&s->grammars, m->t, e));
    atomic_store(&s->ready, true);
    return OK;
}

void server_drain(server *s) { atomic_store(&s->draining, true); }

int32_t server_active(const server *s) { return atomic_load(&s->active); }

void server_abort(server *s) { atomic_store(&s->aborting, true); }

void server_close(server **s)
{
    if (!s || !*s) return;
    server_abort(*s);
    http_close(&(*s)->h);
    session_table_close(&(*s)->sessions);
    grammar_set_close(&(*s)->grammars);
    metrics_close(&(*s)->counts);
    for (int i = 0; i < SERVER_MAX_NAMES; i++) {
        mem_free((*s)->names[i]);
        mem_free((*s)->origins[i]);
    }
    mem_free((*s)->host);
    (void)pthread_mutex_destroy(&(*s)->lock);
    mem_free(*s);
    *s = NULL;
}
