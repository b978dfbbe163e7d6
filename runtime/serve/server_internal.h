/* The inside of the server, for server*.c alone. */
#ifndef TMF_RUNTIME_SERVE_SERVER_INTERNAL_H
#define TMF_RUNTIME_SERVE_SERVER_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "base/hash.h"
#include "runtime/serve/api.h"
#include "runtime/serve/grammar.h"
#include "runtime/serve/metrics.h"
#include "runtime/serve/server.h"
#include "runtime/serve/session.h"
#include "runtime/text_stream.h"

#define SERVER_PING_MS  15000
#define SERVER_ID_BYTES 24

typedef struct {
    hash256 hash;
    uint64_t salt;      /* of cached prefixes */
    atomic_int answers; /* of it, at the door */
} server_key;

struct call;
struct server {
    server_opts o;
    char *names[SERVER_MAX_NAMES], *origins[SERVER_MAX_NAMES];
    char *host;
    server_key keys[SERVER_MAX_KEYS];
    char timeout_body[256];
    int64_t created; /* seconds since 1970 */
    uint64_t salt;   /* of ids, and of prefixes of requests without a key */
    atomic_ullong serial;
    http *h;
    metrics *counts;
    const job *j;

    /* Set once by server_start, before `ready`. */
    server_model m;
    grammar_set *grammars;
    session_table *sessions;
    size_t piece_bytes;
    int32_t capacity; /* answers at once, waiting or running */

    pthread_mutex_t lock; /* of the list */
    struct call *calls;   /* in their handlers and streams */
    atomic_bool ready, draining, aborting;
    atomic_int percent;
    atomic_int active;       /* requests in a handler or a stream */
    atomic_int answers;      /* that count at the door */
    atomic_llong queued;     /* tokens of prompts whose answers have not begun */
    _Atomic double answer_s; /* mean seconds of an answer, lately */
};

struct call;
typedef struct {
    const char *method, *path; /* path ending in '/': anything behind it, too */
    void (*handle)(struct call *c);
    bool open;           /* needs no key */
    bool no_model;       /* answers before there is a model */
    bool door;           /* makes the engine work: counted */
    bool json;           /* has a JSON body */
    const char *summary; /* for /openapi.json */
    unsigned who;        /* its parameters, API_*; 0: none */
} server_route;
/* The i-th, NULL past the end. */
const server_route *server_route_at(int i);

struct run; /* server_run.c */
/* One request on its way. */
typedef struct call {
    server *s;
    http_request *r;
    http_reply *a;
    const server_route *route; /* NULL: none */
    char id[SERVER_ID_BYTES];
    uint64_t salt;
    double began;     /* clock_s */
    bool counted;     /* in s->active */
    int32_t n_door;   /* in s->answers, and in the key's */
    int64_t n_queued; /* in s->queued */
    server_key *key;  /* NULL: none was needed */
    struct run *run;
    /* for the log */
    _Atomic int32_t n_prompt, n_new; /* -1: no prompt yet */
    double first_s;                  /* to the first token; 0: none */
    const char *reason;              /* a finish reason or a fault's code */
    struct call *prev, *next;        /* in s->calls */
} call;

/* Answers a fault, with the headers that belong to its status. */
void server_fail(call *c, const api_fault *f);
/* The whole answer is in c->a->body: its status and type. */
void server_json(call *c, int status);
/* One place at the door, unless the server is going or the engine has failed; false: answered. */
bool server_door(call *c);
/* Takes n more places at the door; false: there is no room, and a 429 was answered. */
bool server_enter(call *c, int32_t n);
/* So many tokens wait for their answer; false: there are too many, and a 429 was answered. */
bool server_queue(call *c, int64_t n_tokens);
void server_begun(call *c); /* they wait no longer */
/* Gives all its places back: before the last byte goes out, its client may come again at once. */
void server_leave(call *c);
/* Parses the body; false: answered. */
bool server_parse(call *c, unsigned who, api_request *q);
/* The model that a request names is ours; else answered. */
bool server_is_ours(call *c, const char *name);

/* ---- server_text.c: everything that is not an answer of the model ---- */
void server_models(call *c);
void server_model_one(call *c);
void server_health(call *c);
void server_live(call *c);
void server_ready(call *c);
void server_page(call *c);
void server_metrics(call *c);
void server_props(call *c);
void server_slots(call *c);
void server_openapi(call *c);
void server_encode(call *c);
void server_decode(call *c);
void server_template(call *c);
void server_off(call *c); /* 501 */

/* ---- server_prompt.c: from requests to what the engine is asked ---- */
void server_chat(call *c);
void server_completion(call *c);
void server_generate(call *c);
void server_interactive(call *c);
void server_ppl(call *c);

#endif
