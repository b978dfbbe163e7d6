/* One curl multi handle a client, one easy handle a request; easy handles are kept for the next
 * request, and with them their connections. */
#include "tools/http_client.h"

#include <curl/curl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

#define ANSWER_MAX ((size_t)64 << 20) /* of a whole answer */
#define ERROR_MAX  ((size_t)64 << 10) /* of the text of a refusal that is looked at */
#define CONNECT_S  10L
#define WAIT_MS    100 /* how soon a stop is noticed at the latest */
#define SPARE_MAX  256 /* easy handles kept for later requests */

struct http_client {
    CURLM *multi;
    char *url;
    char *socket;  /* path of a Unix socket to go through; NULL: none */
    char *noproxy; /* hosts that no proxy is asked for */
    struct curl_slist *headers;
    CURL *spare[SPARE_MAX];
    int n_spare, open;
};

struct http_stream {
    http_client *c;
    CURL *easy;
    http_stream_calls calls;
    sse_parser sse;
    char *text; /* what came, where it is no stream: refusals and whole answers */
    size_t n_text, cap, most;
    bool whole; /* not a stream, whatever the server says */
    bool sorted, events;
    err failed; /* of a callback */
    char why[CURL_ERROR_SIZE];
};

/* ---- client ---- */

/* Nobody has a proxy for this machine itself, whatever the environment says. */
static err_code make_noproxy(char **out, err *e)
{
    static const char own[] = "localhost,127.0.0.1,::1";
    const char *env = getenv("no_proxy");
    void *p;
    if (!env) env = getenv("NO_PROXY");
    const size_t cap = sizeof own + 1 + (env ? strlen(env) : 0);
    if (env && strcmp(env, "*") == 0) return mem_strdup(out, env, e);
    TRY(mem_alloc(&p, cap, 1, "hosts", e));
    *out = p;
    (void)snprintf(p, cap, "%s%s%s", own, env && *env ? "," : "", env ? env : "");
    return OK;
}

static err_code make_url(char **out, const char *url, err *e)
{
    const bool scheme = strstr(url, "://") != NULL;
    const size_t cap = strlen(url) + 8;
    size_t n;
    void *p;
    if (scheme && strncmp(url, "http://", 7) != 0 && strncmp(url, "https://", 8) != 0)
        return err_set(e, E_USAGE, "'%s': expected http:// or https://", url);
    TRY(mem_alloc(&p, cap, 1, "address", e));
    *out = p;
    n = (size_t)snprintf(p, cap, "%s%s", scheme ? "" : "http://", url);
    while (n && (*out)[n - 1] == '/') (*out)[--n] = 0;
    if (n > 3 && strcmp(*out + n - 3, "/v1") == 0) (*out)[n - 3] = 0;
    return OK;
}

static err_code add_header(http_client *c, const char *line, err *e)
{
    struct curl_slist *l = curl_slist_append(c->headers, line);
    if (!l) return err_set(e, E_NOMEM, "headers: out of memory");
    c->headers = l;
    return OK;
}

/* The first key of a text as servers' key files have it: keys stand apart by line ends or commas,
 * lines that begin with '#' do not count. */
static err_code add_key(http_client *c, const char *text, const char *where, err *e)
{
    char line[4200];
    const char *key = text + strspn(text, " \t\r\n,");
    while (*key == '#') {
        key += strcspn(key, "\r\n");
        key += strspn(key, " \t\r\n,");
    }
    size_t n = strcspn(key, ",\r\n");
    while (n && (key[n - 1] == ' ' || key[n - 1] == '\t')) n--;
    for (size_t i = 0; i < n; i++) {
        if (key[i] <= ' ' || key[i] > '~')
            return err_set(e, E_INPUT, "%s: a key has no spaces or control bytes", where);
    }
    if (n == 0 || n > 4096)
        return err_set(e, E_INPUT, "%s: expected a key of 1 to 4096 bytes, got %zu", where, n);
    (void)snprintf(line, sizeof line, "Authorization: Bearer %.*s", (int)n, key);
    return add_header(c, line, e);
}

static err_code set_headers(http_client *c, const char *key_file, err *e)
{
    const char *env = getenv("TM_RUN_API_KEY");
    TRY(add_header(c, "Content-Type: application/json", e));
    TRY(add_header(c, "Expect:", e)); /* long prompts need no leave to be sent */
    if (key_file) {
        char *text;
        size_t n;
        TRY(file_read(&text, &n, key_file, 65536, e));
        const err_code rc = add_key(c, text, key_file, e);
        mem_free(text);
        return rc;
    }
    return env && *env ? add_key(c, env, "TM_RUN_API_KEY", e) : OK;
}

err_code http_client_open(http_client **out, const char *url, const char *key_file, err *e)
{
    void *p;
    *out = NULL;
    if (curl_global_init(CURL_GLOBAL_DEFAULT) != CURLE_OK)
        return err_set(e, E_IO, "libcurl cannot be initialized");
    TRY(mem_alloc(&p, 1, sizeof(http_client), "client", e));
    http_client *c = p;
    const bool local = strncmp(url, "unix:", 5) == 0;
    err_code rc = make_url(&c->url, local ? "localhost" : url, e);
    if (rc == OK && local) rc = mem_strdup(&c->socket, url + 5, e);
    if (rc == OK) rc = make_noproxy(&c->noproxy, e);
    if (rc == OK) rc = set_headers(c, key_file, e);
    if (rc == OK && !(c->multi = curl_multi_init()))
        rc = err_set(e, E_NOMEM, "client: out of memory");
    if (rc != OK) {
        http_client_close(&c);
        return rc;
    }
    *out = c;
    return OK;
}

void http_client_close(http_client **c)
{
    if (!*c) return;
    for (int i = 0; i < (*c)->n_spare; i++) curl_easy_cleanup((*c)->spare[i]);
    if ((*c)->multi) (void)curl_multi_cleanup((*c)->multi);
    curl_slist_free_all((*c)->headers);
    mem_free((*c)->url);
    mem_free((*c)->socket);
    mem_free((*c)->noproxy);
    mem_free(*c);
    *c = NULL;
}

const char *http_client_url(const http_client *c) { return c->url; }

/* ---- what comes ---- */

static void clean(char *s)
{
    for (; *s; s++) {
        if ((unsigned char)*s < 0x20 || *s == 0x7f) *s = ' ';
    }
}

/* A C string ends at U+0000, which a model may well write. */
static void replace_nul(char *s, size_t n)
{
    for (size_t i = 0; i + 6 <= n; i++) {
        if (s[i] != '\\') continue;
        if (memcmp(s + i, "\\u0000", 6) == 0) memcpy(s + i + 2, "fffd", 4);
        i++; /* a backslash behind it is no escape */
    }
}

err_code http_answer_json(cJSON **out, const char *text, size_t n, const char *what, err *e)
{
    void *copy;
    *out = NULL;
    if (!n || !memmem(text, n, "\\u0000", 6)) return json_parse(out, text, n, what, e);
    TRY(mem_alloc(&copy, n, 1, what, e));
    memcpy(copy, text, n);
    replace_nul(copy, n);
    const err_code rc = json_parse(out, copy, n, what, e);
    mem_free(copy);
    return rc;
}

bool http_error_text(const cJSON *o, char *buf, size_t cap)
{
    const cJSON *in = cJSON_GetObjectItemCaseSensitive(o, "error");
    const cJSON *from = cJSON_IsObject(in) ? in : o;
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(from, "message");
    const cJSON *code = cJSON_GetObjectItemCaseSensitive(from, "code");
    if (!text) text = cJSON_GetObjectItemCaseSensitive(from, "detail");
    if (cJSON_IsString(in)) text = in;
    if (!cJSON_IsString(code)) code = cJSON_GetObjectItemCaseSensitive(from, "type");
    if (!cJSON_IsString(text)) return false;
    if (cJSON_IsString(code))
        (void)snprintf(buf, cap, "%s: %s", code->valuestring, text->valuestring);
    else
        (void)snprintf(buf, cap, "%s", text->valuestring);
    clean(buf);
    return true;
}

static bool keep_text(http_stream *s, const char *bytes, size_t n)
{
    if (n > s->most - s->n_text) {
        (void)err_set(&s->failed, E_LIMIT, "an answer of more than %zu bytes", s->most);
        return false;
    }
    if (s->n_text + n + 1 > s->cap) {
        void *p;
        const size_t cap = 2 * (s->n_text + n) + 4096;
        if (mem_alloc(&p, cap, 1, "answer", &s->failed) != OK) return false;
        if (s->n_text) memcpy(p, s->text, s->n_text);
        mem_free(s->text);
        s->text = p;
        s->cap = cap;
    }
    memcpy(s->text + s->n_text, bytes, n);
    s->n_text += n;
    s->text[s->n_text] = 0;
    return true;
}

/* Events only where status and media type say so: a refusal is JSON, a proxy's may be anything. */
static void sort(http_stream *s)
{
    long status = 0;
    const char *type = NULL;
    (void)curl_easy_getinfo(s->easy, CURLINFO_RESPONSE_CODE, &status);
    (void)curl_easy_getinfo(s->easy, CURLINFO_CONTENT_TYPE, &type);
    s->events = !s->whole && status == 200 && type && strstr(type, "event-stream");
    s->sorted = true;
}

static size_t on_bytes(char *bytes, size_t size, size_t n, void *ud)
{
    http_stream *s = ud;
    n *= size;
    if (!s->sorted) sort(s);
    if (!s->events) return keep_text(s, bytes, n) ? n : 0;
    return sse_feed(&s->sse, bytes, n, s->calls.event, s->calls.ud, &s->failed) == OK ? n : 0;
}

static err_code refusal(const http_stream *s, long status, err *e)
{
    char text[400] = "";
    cJSON *o = NULL;
    err ignored;
    const err_code code = status == 429 || status == 503 ? E_BUSY : status >= 500 ? E_IO : E_INPUT;
    if (s->n_text && http_answer_json(&o, s->text, s->n_text, "answer", &ignored) == OK)
        (void)http_error_text(o, text, sizeof text);
    cJSON_Delete(o);
    return err_set(e, code, "%s: status %ld%s%s", s->c->url, status, *text ? ": " : "", text);
}

static err_code outcome(const http_stream *s, CURLcode code, long status, err *e)
{
    if (s->failed.code) {
        *e = s->failed;
        return e->code;
    }
    if (code != CURLE_OK)
        return err_set(e, E_IO, "%s: %s", s->c->url, *s->why ? s->why : curl_easy_strerror(code));
    if (status != 200) return refusal(s, status, e);
    if (!s->whole && !s->events)
        return err_set(e, E_INPUT, "%s: expected a stream of events, got another answer",
                       s->c->url);
    return OK;
}

/* ---- streams ---- */

static void stream_free(http_stream *s)
{
    http_client *c = s->c;
    if (s->easy) {
        (void)curl_multi_remove_handle(c->multi, s->easy);
        if (c->n_spare < SPARE_MAX)
            c->spare[c->n_spare++] = s->easy;
        else
            curl_easy_cleanup(s->easy);
        c->open--;
    }
    sse_free(&s->sse);
    mem_free(s->text);
    mem_free(s);
}

void http_stream_close(http_stream *s) { stream_free(s); }

static err_code set_request(http_stream *s, const char *path, const char *body, err *e)
{
    char url[2048];
    CURL *h = s->easy;
    if (snprintf(url, sizeof url, "%s%s", s->c->url, path) >= (int)sizeof url)
        return err_set(e, E_USAGE, "the address is too long");
    curl_easy_reset(h);
    const char *certs = getenv("SSL_CERT_FILE"); /* as OpenSSL's own tools take it */
    CURLcode rc = curl_easy_setopt(h, CURLOPT_URL, url);
    if (rc == CURLE_OK && certs && *certs) rc = curl_easy_setopt(h, CURLOPT_CAINFO, certs);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_PROTOCOLS_STR, "http,https");
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_HTTPHEADER, s->c->headers);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_USERAGENT, "tm-run/" TMF_VERSION);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_NOPROXY, s->c->noproxy);
    if (rc == CURLE_OK && s->c->socket)
        rc = curl_easy_setopt(h, CURLOPT_UNIX_SOCKET_PATH, s->c->socket);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_TCP_KEEPALIVE, 1L);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_NOSIGNAL, 1L);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_TCP_NODELAY, 1L);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_CONNECTTIMEOUT, CONNECT_S);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_ERRORBUFFER, s->why);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_PRIVATE, s);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_WRITEFUNCTION, on_bytes);
    if (rc == CURLE_OK) rc = curl_easy_setopt(h, CURLOPT_WRITEDATA, s);
    if (rc == CURLE_OK && body) rc = curl_easy_setopt(h, CURLOPT_POST, 1L);
    if (rc == CURLE_OK && body)
        rc = curl_easy_setopt(h, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)strlen(body));
    if (rc == CURLE_OK && body) rc = curl_easy_setopt(h, CURLOPT_COPYPOSTFIELDS, body);
    return rc == CURLE_OK ? OK : err_set(e, E_IO, "%s: %s", url, curl_easy_strerror(rc));
}

static err_code stream_start(http_client *c, const char *path, const char *body,
                             const http_stream_calls *calls, bool whole, http_stream **out, err *e)
{
    void *p;
    TRY(mem_alloc(&p, 1, sizeof(http_stream), "request", e));
    http_stream *s = p;
    *s = (http_stream){.c = c, .calls = *calls, .whole = whole};
    s->most = whole ? ANSWER_MAX : ERROR_MAX;
    CURL *h = c->n_spare ? c->spare[--c->n_spare] : curl_easy_init();
    err_code rc = h ? OK : err_set(e, E_NOMEM, "request: out of memory");
    if (rc == OK) {
        s->easy = h;
        c->open++;
        rc = set_request(s, path, body, e);
    }
    if (rc == OK && curl_multi_add_handle(c->multi, h) != CURLM_OK)
        rc = err_set(e, E_NOMEM, "request: out of memory");
    if (rc != OK) {
        stream_free(s);
        return rc;
    }
    if (out) *out = s;
    return OK;
}

err_code http_stream_open(http_client *c, const char *path, const char *body,
                          const http_stream_calls *calls, http_stream **out, err *e)
{
    return stream_start(c, path, body, calls, false, out, e);
}

static void finish(http_stream *s, CURLcode code)
{
    long status = 0;
    err why = {0};
    (void)curl_easy_getinfo(s->easy, CURLINFO_RESPONSE_CODE, &status);
    (void)outcome(s, code, status, &why);
    s->calls.end(s->calls.ud, status, &why);
    stream_free(s);
}

err_code http_client_step(http_client *c, int wait_ms, int *open, err *e)
{
    int running, left;
    CURLMcode rc = curl_multi_poll(c->multi, NULL, 0, wait_ms, NULL);
    if (rc == CURLM_OK) rc = curl_multi_perform(c->multi, &running);
    if (rc != CURLM_OK) return err_set(e, E_IO, "%s: %s", c->url, curl_multi_strerror(rc));
    for (CURLMsg *m; (m = curl_multi_info_read(c->multi, &left));) {
        char *s;
        if (m->msg != CURLMSG_DONE) continue;
        const CURLcode code = m->data.result;
        (void)curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, &s);
        finish((http_stream *)(void *)s, code);
    }
    if (open) *open = c->open;
    return OK;
}

/* ---- whole answers ---- */

typedef struct {
    http_stream *s; /* NULL once it ended */
    char *text;
    size_t n;
    err why;
} exchange;

static void on_end(void *ud, long status, const err *why)
{
    exchange *x = ud;
    (void)status;
    x->why = *why;
    x->text = x->s->text;
    x->n = x->s->n_text;
    x->s->text = NULL;
    x->s = NULL;
}

err_code http_client_json(http_client *c, const char *path, const char *body, const job *j,
                          cJSON **out, err *e)
{
    exchange x = {0};
    err_code rc;
    const http_stream_calls calls = {.end = on_end, .ud = &x};
    *out = NULL;
    TRY(stream_start(c, path, body, &calls, true, &x.s, e));
    do {
        rc = job_check(j, e);
        if (rc == OK) rc = http_client_step(c, WAIT_MS, NULL, e);
    } while (rc == OK && x.s);
    if (x.s) http_stream_close(x.s);
    if (rc == OK && x.why.code) {
        *e = x.why;
        rc = e->code;
    }
    if (rc == OK) rc = http_answer_json(out, x.text ? x.text : "", x.n, path, e);
    mem_free(x.text);
    return rc;
}

err_code http_client_model(http_client *c, const job *j, char **out, err *e)
{
    cJSON *o;
    const char *id;
    TRY(http_client_json(c, "/v1/models", NULL, j, &o, e));
    const cJSON *first = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(o, "data"), 0);
    err_code rc = cJSON_IsObject(first)
                      ? json_get_str(first, "id", &id, e)
                      : err_set(e, E_INPUT, "%s: no models listed: --model names one", c->url);
    if (rc == OK) rc = mem_strdup(out, id, e);
    cJSON_Delete(o);
    return rc;
}
