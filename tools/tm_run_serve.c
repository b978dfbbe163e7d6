/* tm-run serve: an OpenAI-compatible server over one model. The process's part of it: options,
 * keys, signals, the order of opening and of going. */
#include <errno.h>
#include <malloc.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"
#include "runtime/serve/server.h"
#include "tools/service.h"
#include "tools/tm_run.h"

#define MAX_KEY_FILE ((size_t)64 << 10)
#define LOOK_MS      50   /* how often the main thread looks for signals and at what still runs */
#define SPARE_FILES  64   /* the model's, the listener's, logs */
#define FLUSH_MS     2000 /* for the last words of answers that are cut */

static struct {
    const char *host, *key_file, *unix_socket, *tls_cert, *tls_key, *alias;
    int64_t port, batch, queue, queue_tokens, per_key, max_body, max_connections, tp, prefill;
    double request_s, head_s, body_s, idle_s, stall_s, queue_s, shutdown_s;
    cli_list names, keys, origins;
    bool no_auth, strict, no_prefix, deterministic;
    run_chat_opts template;
    run_model_opts model;
} opt = {.host = "127.0.0.1",
         .port = 23333,
         .batch = 32,
         .max_body = 4 << 20,
         .max_connections = 1024,
         .tp = 1,
         .prefill = 512,
         .head_s = 10,
         .body_s = 30,
         .idle_s = 60,
         .stall_s = 30,
         .shutdown_s = 30,
         .model = RUN_MODEL_DEFAULTS};

#define SECONDS(name, to, text)                                        \
    {                                                                  \
        name, 0, CLI_F64, &opt.to, "SECONDS", text, .lo = 0, .hi = 1e6 \
    }

static const cli_option options[] = {
    {"server-name", 0, CLI_STR, &opt.host, "ADDRESS",
     "address to listen on, or unix:PATH [127.0.0.1]"},
    {"server-port", 0, CLI_I64, &opt.port, "PORT", "port, 0 for any [23333]", .lo = 0, .hi = 65535},
    {"unix-socket", 0, CLI_STR, &opt.unix_socket, "PATH",
     "listen on a Unix socket of mode 0600 instead"},
    {"ssl-certfile", 0, CLI_STR, &opt.tls_cert, "FILE",
     "HTTPS with this certificate (PEM, chain behind it); SIGHUP reads it again"},
    {"ssl-keyfile", 0, CLI_STR, &opt.tls_key, "FILE", "its private key (PEM, no password)"},
    {"model-name", 0, CLI_LIST, &opt.names, "NAME",
     "what requests call the model [its directory]; repeat for aliases"},
    {"api-key-file", 0, CLI_STR, &opt.key_file, "FILE",
     "keys that requests must have, one a line; mode 0600"},
    {"api-keys", 0, CLI_LIST, &opt.keys, "KEY", "a key; every user of this machine can read it"},
    {"insecure-no-auth", 0, CLI_FLAG, &opt.no_auth, NULL,
     "listen beyond this machine without a key"},
    {"allow-origin", 0, CLI_LIST, &opt.origins, "ORIGIN",
     "a page elsewhere that may call, as https://host; repeatable"},
    {"strict-params", 0, CLI_FLAG, &opt.strict, NULL, "refuse unknown request parameters"},
    {"max-batch-size", 0, CLI_I64, &opt.batch, "N", "answers made at once [32]", .lo = 1,
     .hi = 4096},
    {"max-queue", 0, CLI_I64, &opt.queue, "N",
     "requests that may wait, others get 429 [0: 4 times the batch]", .lo = 0, .hi = 1 << 20},
    {"max-queue-tokens", 0, CLI_I64, &opt.queue_tokens, "N",
     "tokens of prompts that may wait for their answer to begin, others get 429 [0: any]", .lo = 0,
     .hi = 1 << 30},
    {"max-per-key", 0, CLI_I64, &opt.per_key, "N",
     "answers at once, running or waiting, of one API key, others get 429 [0: any]", .lo = 0,
     .hi = 1 << 20},
    {"max-prefill-token-num", 0, CLI_I64, &opt.prefill, "N", "prompt tokens of one step [512]",
     .lo = 1, .hi = 1 << 20},
    {"deterministic", 0, CLI_FLAG, &opt.deterministic, NULL,
     "on CUDA, too, answers that depend on their request alone, for some speed"},
    {"no-prefix-cache", 0, CLI_FLAG, &opt.no_prefix, NULL, "compute every prompt anew"},
    {"metrics-alias", 0, CLI_CHOICE, &opt.alias, "SERVER",
     "/metrics with that server's names, too, for its boards", .choices = "vllm|lmdeploy"},
    {"max-body", 0, CLI_BYTES, &opt.max_body, "BYTES", "longest request [4M]", .lo = 1024,
     .hi = 1 << 30},
    {"max-connections", 0, CLI_I64, &opt.max_connections, "N", "connections at once [1024]",
     .lo = 1, .hi = 65536},
    SECONDS("request-timeout", request_s,
            "most time of an answer, then it ends as length [0: any]"),
    SECONDS("queue-timeout", queue_s, "longest wait for a place in the batch [0: any]"),
    SECONDS("header-timeout", head_s, "time to receive a request's headers [10]"),
    SECONDS("body-timeout", body_s, "and its body [30]"),
    SECONDS("idle-timeout", idle_s, "between requests of a connection [60]"),
    SECONDS("stall-timeout", stall_s, "a reader that takes nothing for so long is gone [30]"),
    SECONDS("shutdown-timeout", shutdown_s, "for running answers after a signal to stop [30]"),
    {"tp", 0, CLI_I64, &opt.tp, "N", "devices that share the model: 1", .lo = 1, .hi = 1024},
    RUN_CHAT_OPTIONS(opt.template),
    RUN_MODEL_OPTIONS(opt.model),
};

/* ---- keys ---- */

typedef struct {
    const char *v[SERVER_MAX_KEYS];
    int n;
    char *file, *environment; /* what v points into */
} key_list;

/* One a line; empty lines and those that begin with '#' do not count. `text` is cut up. */
static err_code add_keys(key_list *k, char *text, const char *what, err *e)
{
    char *save = NULL;
    for (char *line = strtok_r(text, ",\r\n", &save); line; line = strtok_r(NULL, ",\r\n", &save)) {
        line += strspn(line, " \t");
        for (size_t n = strlen(line); n && strchr(" \t", line[n - 1]); n--) line[n - 1] = 0;
        if (!*line || *line == '#') continue;
        if (k->n == SERVER_MAX_KEYS)
            return err_set(e, E_USAGE, "%s: more than %d API keys", what, SERVER_MAX_KEYS);
        k->v[k->n++] = line;
    }
    return OK;
}

static err_code read_key_file(key_list *k, const char *path, err *e)
{
    struct stat st;
    size_t n;
    if (stat(path, &st) != 0) return err_sys(e, E_IO, errno, "cannot read '%s'", path);
    if (st.st_mode & 077)
        return err_set(e, E_INPUT, "'%s': others can read it: expected mode 0600, got %04o", path,
                       (unsigned)(st.st_mode & 07777));
    TRY(file_read(&k->file, &n, path, MAX_KEY_FILE, e));
    TRY(add_keys(k, k->file, path, e));
    if (k->n == 0) return err_set(e, E_INPUT, "'%s': there is no key in it", path);
    return OK;
}

static err_code gather_keys(key_list *k, const tool_ctx *t, err *e)
{
    const char *environment = getenv("TM_RUN_API_KEY");
    if (opt.key_file) TRY(read_key_file(k, opt.key_file, e));
    if (environment && *environment) {
        TRY(mem_strdup(&k->environment, environment, e));
        TRY(add_keys(k, k->environment, "TM_RUN_API_KEY", e));
    }
    const char *named = getenv("TM_RUN_API_KEYS"); /* --api-keys where it does not show */
    if (opt.keys.n && opt.keys.v[0] != named)
        job_log(&t->job, LOG_WARN,
                "--api-keys: every user of this machine can read them; use --api-key-file or "
                "TM_RUN_API_KEY");
    for (int i = 0; i < opt.keys.n; i++) {
        if (k->n == SERVER_MAX_KEYS) return err_set(e, E_USAGE, "more than %d API keys", k->n);
        k->v[k->n++] = opt.keys.v[i];
    }
    return OK;
}

static void free_keys(key_list *k)
{
    mem_free(k->file);
    mem_free(k->environment);
}

/* ---- opening ---- */

static bool is_loopback(const char *host)
{
    return strcmp(host, "localhost") == 0 || strcmp(host, "::1") == 0 ||
           strncmp(host, "127.", 4) == 0;
}

static err_code check_options(const key_list *k, err *e)
{
    if (!opt.tls_cert != !opt.tls_key)
        return err_set(e, E_USAGE, "--ssl-certfile and --ssl-keyfile need each other");
    if (opt.tp > 1)
        return err_set(e, E_UNSUPPORTED,
                       "--tp %lld: this version runs a model on one device; use --tp 1",
                       (long long)opt.tp);
    if (!opt.unix_socket && !is_loopback(opt.host) && k->n == 0 && !opt.no_auth)
        return err_set(e, E_USAGE,
                       "'%s' is open to other machines: set --api-key-file, or --insecure-no-auth "
                       "if everyone may use it",
                       opt.host);
    return OK;
}

static int32_t ms(double seconds) { return seconds >= 2e6 ? INT32_MAX : (int32_t)(1000 * seconds); }

static void log_request(void *ud, const char *line)
{
    char text[600];
    (void)ud;
    const int n = snprintf(text, sizeof text, "%s\n", line);
    if (n > 0 && (size_t)n < sizeof text && write(STDERR_FILENO, text, (size_t)n) < 0)
        return; /* a log that cannot be written ends no server */
}

/* "dir/model/" is "model". */
static void default_name(char *buf, size_t cap, const char *path)
{
    size_t n = strlen(path);
    while (n > 1 && path[n - 1] == '/') n--;
    size_t from = n;
    while (from > 0 && path[from - 1] != '/') from--;
    (void)snprintf(buf, cap, "%.*s", (int)(n - from), path + from);
}

static err_code open_server(server **s, const tool_ctx *t, const key_list *k, err *e)
{
    char name[256];
    const char *const only[] = {name};
    default_name(name, sizeof name, t->args[0]);
    const server_opts o = {.http = {.host = opt.host,
                                    .unix_path = opt.unix_socket,
                                    .tls_cert = opt.tls_cert,
                                    .tls_key = opt.tls_key,
                                    .port = (int32_t)opt.port,
                                    .max_connections = (int32_t)opt.max_connections,
                                    .max_body_bytes = (size_t)opt.max_body,
                                    .head_ms = ms(opt.head_s),
                                    .body_ms = ms(opt.body_s),
                                    .idle_ms = ms(opt.idle_s),
                                    .stall_ms = ms(opt.stall_s)},
                           .names = opt.names.n ? opt.names.v : only,
                           .n_names = opt.names.n ? opt.names.n : 1,
                           .keys = k->v,
                           .n_keys = k->n,
                           .origins = opt.origins.v,
                           .n_origins = opt.origins.n,
                           .check_host = !opt.unix_socket && is_loopback(opt.host),
                           .strict_params = opt.strict,
                           .timeout_ms = (int64_t)(1000 * opt.request_s),
                           .queue_ms = ms(opt.queue_s),
                           .alias = !opt.alias                       ? METRICS_TM
                                    : strcmp(opt.alias, "vllm") == 0 ? METRICS_VLLM
                                                                     : METRICS_LMDEPLOY,
                           .max_per_key = (int32_t)opt.per_key,
                           .max_queue_tokens = opt.queue_tokens,
                           .max_head_bytes = 32 << 10,
                           .log = t->job.level == LOG_ERROR ? NULL : log_request};
    return server_open(s, &o, &t->job, e);
}

/* A connection takes a descriptor, an answer another. */
static void raise_files(const tool_ctx *t)
{
    struct rlimit l;
    const rlim_t need = (rlim_t)(opt.max_connections + opt.batch +
                                 (opt.queue ? opt.queue : 4 * opt.batch) + SPARE_FILES);
    if (getrlimit(RLIMIT_NOFILE, &l) != 0 || l.rlim_cur >= need) return;
    l.rlim_cur = l.rlim_max < need ? l.rlim_max : need;
    if (setrlimit(RLIMIT_NOFILE, &l) != 0 || l.rlim_cur < need)
        job_log(&t->job, LOG_WARN,
                "%llu open files are allowed, %llu may be needed: raise the limit (ulimit -n) or "
                "lower --max-connections",
                (unsigned long long)l.rlim_cur, (unsigned long long)need);
}

/* Everything behind the HTTP server. */
typedef struct {
    run_ctx r;
    chat *c;
    engine *g;
    job quiet; /* the engine's: what runs is not cut short by the signal that ends the process */
    int32_t stops[RUN_MAX_STOPS];
} backend;

static err_code start_engine(backend *b, server *s, const tool_ctx *t, err *e)
{
    const engine_opts o = {
        .max_batch = (int32_t)opt.batch,
        /* the door counts those that run, too: the engine takes whom it lets in */
        .max_queue = (int32_t)(opt.batch + (opt.queue ? opt.queue : 4 * opt.batch)),
        .prefill_tokens = (int32_t)opt.prefill,
        .no_prefix_cache = opt.no_prefix};
    b->quiet = t->job;
    b->quiet.stop = NULL;
    TRY(engine_open(&b->g, b->r.m, &o, &b->quiet, e));
    const model_plan *plan = model_plan_of(b->r.m);
    const model_desc *d = model_desc_of(b->r.m);
    const server_model m = {.g = b->g,
                            .t = b->r.t,
                            .c = b->c,
                            .meta_instruction = opt.template.meta,
                            .stop_ids = b->stops,
                            .n_stop_ids = run_stop_ids(b->stops, &b->r, b->c),
                            .session_len = model_session_len(b->r.m),
                            .max_batch = (int32_t)opt.batch,
                            .max_queue = o.max_queue - (int32_t)opt.batch,
                            .kv_bits = plan->kv == KV_16 ? 16 : (int)plan->kv,
                            .quant = d->w4_group ? "w4" : "16-bit",
                            .weights_bytes = (int64_t)plan->weights_bytes,
                            .kv_bytes = (int64_t)plan->kv_bytes};
    return server_start(s, &m, e);
}

static err_code open_backend(backend *b, server *s, const tool_ctx *t, err *e)
{
    tool_ctx own = *t;
    own.device.deterministic = opt.deterministic || t->device.kind == DEV_CPU;
    TRY(run_open(&b->r, &own, true, e));
    server_loading(s, 10);
    TRY(run_model(&b->r, t, &opt.model, 0, (int32_t)opt.batch, e));
    server_loading(s, 90);
    TRY(run_chat_open(&b->c, &b->r, &opt.template, t, e));
    return start_engine(b, s, t, e);
}

static void close_backend(backend *b)
{
    engine_close(&b->g);
    chat_close(&b->c);
    run_close(&b->r);
}

/* ---- running and ending ---- */

static bool wait_idle(const server *s, int64_t limit_ms)
{
    int64_t waited = 0;
    while (server_active(s) > 0 && waited < limit_ms) {
        (void)poll(NULL, 0, LOOK_MS);
        waited += LOOK_MS;
    }
    return server_active(s) == 0;
}

static volatile sig_atomic_t reload_wanted;

static void on_hangup(int signal_number) { reload_wanted = signal_number; }

/* A new certificate; one that is no good does not end what works. */
static void reload(server *s, const tool_ctx *t)
{
    err e;
    reload_wanted = 0;
    if (server_reload(s, &e) == OK)
        job_log(&t->job, LOG_INFO, "the certificate was read again");
    else
        job_log(&t->job, LOG_ERROR, "%s; the earlier certificate stays", e.msg);
}

/* A step that takes longer than a supervisor waits is one that hangs. */
static void feed_watchdog(const backend *b, double *fed_s)
{
    const double every_s = 1e-3 * (double)service_watchdog_ms();
    engine_stats stats;
    if (every_s <= 0 || tool_seconds() - *fed_s < every_s / 3) return;
    engine_stats_get(b->g, &stats);
    if (stats.step_s >= every_s) return;
    service_tell("WATCHDOG=1");
    *fed_s = tool_seconds();
}

static err_code serve(server *s, backend *b, const tool_ctx *t, err *e)
{
    double fed_s = 0;
    if (opt.unix_socket)
        job_log(&t->job, LOG_INFO, "listening on %s", opt.unix_socket);
    else
        job_log(&t->job, LOG_INFO, "listening on %s://%s:%d", opt.tls_cert ? "https" : "http",
                opt.host, server_port(s));
    service_tell("READY=1");
    while (!atomic_load(t->job.stop)) {
        if (reload_wanted) reload(s, t);
        (void)poll(NULL, 0, LOOK_MS); /* a signal ends the wait early */
        TRY(engine_health(b->g, e));  /* a supervisor starts it anew */
        feed_watchdog(b, &fed_s);
    }
    service_tell("STOPPING=1");
    server_drain(s);
    job_log(&t->job, LOG_INFO, "stopping: %d requests run, up to %g s", server_active(s),
            opt.shutdown_s);
    if (wait_idle(s, (int64_t)(1000 * opt.shutdown_s))) return OK;
    const int32_t cut = server_active(s);
    server_abort(s);
    (void)wait_idle(s, FLUSH_MS);
    return err_set(e, E_CANCELED, "stopped with %d answers cut short", cut);
}

static err_code run(tool_ctx *t, err *e)
{
    server *s = NULL;
    backend b = {0};
    key_list k = {0};
    if (strncmp(opt.host, "unix:", 5) == 0) opt.unix_socket = opt.host + 5;
    err_code rc = gather_keys(&k, t, e);
    if (rc == OK) rc = check_options(&k, e);
    if (rc == OK && t->dry_run) {
        rc = run_open(&b.r, t, true, e);
        if (rc == OK) rc = run_model(&b.r, t, &opt.model, 0, (int32_t)opt.batch, e);
        goto done;
    }
    (void)signal(SIGPIPE, SIG_IGN); /* a peer or a log reader that goes away ends no server */
    (void)mallopt(M_ARENA_MAX,
                  4); /* a thread a connection: not an arena each, which never shrink */
    if (opt.tls_cert) (void)signal(SIGHUP, on_hangup);
    raise_files(t);
    if (rc == OK) rc = open_server(&s, t, &k, e);
    if (rc == OK) rc = open_backend(&b, s, t, e);
    if (rc == OK) rc = serve(s, &b, t, e);
done:
    server_close(&s);
    close_backend(&b);
    free_keys(&k);
    return rc;
}

const tool_command tm_run_serve = {
    .name = "serve",
    .usage = "PATH [options]",
    .summary = "answers requests over HTTP as OpenAI's API does, with a chat page",
    .examples = "  tm-run serve workspace --model-name internlm2\n"
                "  tm-run serve model --server-name 0.0.0.0 --api-key-file keys --quant-policy 8\n"
                "  curl http://127.0.0.1:23333/v1/models\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
