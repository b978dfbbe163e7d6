/* One thread: requests begin when they are due, curl moves all of them on, and each event is timed
 * as it is handed over. */
#include "tools/load_run.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>

#include "base/mem.h"
#include "runtime/clock.h"

#define TIMES_MAX ((int64_t)16 << 20) /* of one kind; further ones are left out */

typedef struct load load;
typedef struct flight { /* one request */
    load *l;
    http_stream *s;
    struct flight *prev, *next; /* of those that are open */
    double begin, first, last;
    int64_t pieces, prompt, cached, tokens;
    bool done, by_length;
    err failed;
} flight;

struct load {
    load_result *r;
    http_client *h;
    load_prompts *p;
    const load_opts *o;
    flight *open;
    int64_t n_open;
    double begin, due, end;
    bool held_up; /* the arrival that is due waits */
    uint64_t state;
    err fatal; /* memory ran out in a callback */
};

/* ---- figures ---- */

static void keep_time(load *l, load_times *t, double s)
{
    if (t->n == TIMES_MAX || l->fatal.code) return;
    if (t->n == t->cap) {
        void *p;
        const int64_t cap = t->cap ? 2 * t->cap : 1024;
        if (mem_alloc(&p, (size_t)cap, sizeof(double), "times", &l->fatal) != OK) return;
        if (t->n) memcpy(p, t->v, (size_t)t->n * sizeof(double));
        mem_free(t->v);
        t->v = p;
        t->cap = cap;
    }
    t->v[t->n++] = s;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

double load_quantile(load_times *t, double q)
{
    if (t->n == 0) return 0;
    qsort(t->v, (size_t)t->n, sizeof(double), by_value);
    int64_t i = (int64_t)ceil(q * (double)t->n) - 1;
    i = i < 0 ? 0 : i >= t->n ? t->n - 1 : i;
    return t->v[i];
}

static void count_failure(load_result *r, long status, const char *text)
{
    int i = 0;
    r->failed++;
    while (i < r->n_kinds && r->kinds[i].status != status) i++;
    if (i == LOAD_MAX_KINDS) i--;
    if (i == r->n_kinds) {
        r->n_kinds++;
        r->kinds[i].status = status;
        (void)snprintf(r->kinds[i].example, sizeof r->kinds[i].example, "%s", text);
    }
    r->kinds[i].count++;
}

static double cpu_seconds(void)
{
    struct rusage u;
    (void)getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) +
           1e-6 * (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec);
}

/* ---- one request ---- */

static void take_piece(flight *f)
{
    const double now = clock_s();
    if (f->pieces++)
        keep_time(f->l, &f->l->r->inter, now - f->last);
    else
        f->first = now;
    f->last = now;
}

static void take_usage(flight *f, const cJSON *u)
{
    err ignored;
    const cJSON *d = cJSON_GetObjectItemCaseSensitive(u, "prompt_tokens_details");
    (void)json_opt_i64(u, "prompt_tokens", 0, INT32_MAX, f->prompt, &f->prompt, &ignored);
    (void)json_opt_i64(u, "completion_tokens", 0, INT32_MAX, f->tokens, &f->tokens, &ignored);
    if (cJSON_IsObject(d))
        (void)json_opt_i64(d, "cached_tokens", 0, INT32_MAX, f->cached, &f->cached, &ignored);
}

static void take_choice(flight *f, const cJSON *c)
{
    const cJSON *delta = cJSON_GetObjectItemCaseSensitive(c, "delta");
    const cJSON *text = cJSON_GetObjectItemCaseSensitive(delta ? delta : c,
                                                         delta ? "content" : "text");
    const cJSON *why = cJSON_GetObjectItemCaseSensitive(c, "finish_reason");
    if (cJSON_IsString(text) && *text->valuestring) take_piece(f);
    if (cJSON_IsString(why)) {
        f->done = true;
        f->by_length = strcmp(why->valuestring, "length") == 0;
    }
}

static bool on_event(void *ud, const char *data, size_t n)
{
    flight *f = ud;
    cJSON *o;
    char text[256] = "unknown error";
    if (n == 6 && memcmp(data, "[DONE]", 6) == 0) return true;
    if (http_answer_json(&o, data, n, "event", &f->failed) != OK) return false;
    const cJSON *c = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(o, "choices"), 0);
    const cJSON *u = cJSON_GetObjectItemCaseSensitive(o, "usage");
    if (cJSON_GetObjectItemCaseSensitive(o, "error")) {
        (void)http_error_text(o, text, sizeof text);
        (void)err_set(&f->failed, E_IO, "%s", text);
    }
    if (c) take_choice(f, c);
    if (cJSON_IsObject(u)) take_usage(f, u);
    cJSON_Delete(o);
    return true;
}

static void flight_free(flight *f)
{
    load *l = f->l;
    if (f->next) f->next->prev = f->prev;
    if (f->prev)
        f->prev->next = f->next;
    else
        l->open = f->next;
    l->n_open--;
    mem_free(f);
}

static void count_ok(flight *f, double now)
{
    load_result *r = f->l->r;
    const int64_t tokens = f->tokens ? f->tokens : f->pieces;
    r->ok++;
    r->prompt_tokens += f->prompt;
    r->cached_tokens += f->cached;
    r->new_tokens += tokens;
    r->by_length += f->by_length;
    keep_time(f->l, &r->whole, now - f->begin);
    if (f->pieces) keep_time(f->l, &r->ttft, f->first - f->begin);
    if (f->pieces > 1 && tokens > 1)
        keep_time(f->l, &r->per_token, (f->last - f->first) / (double)(tokens - 1));
}

static void on_end(void *ud, long status, const err *why)
{
    flight *f = ud;
    load *l = f->l;
    const double now = clock_s();
    l->end = now;
    if (f->failed.code)
        count_failure(l->r, status, f->failed.msg);
    else if (why->code)
        count_failure(l->r, status == 200 ? 0 : status, why->msg);
    else if (!f->done)
        count_failure(l->r, 0, "the connection ended before the answer did");
    else
        count_ok(f, now);
    if (status == 429 || status == 503) keep_time(l, &l->r->refused, now - f->begin);
    flight_free(f);
}

static err_code begin(load *l, err *e)
{
    void *p;
    char *body;
    const char *path;
    TRY(load_prompts_body(l->p, l->o->first + l->r->sent, &body, &path, e));
    err_code rc = mem_alloc(&p, 1, sizeof(flight), "request", e);
    if (rc == OK) {
        flight *f = p;
        *f = (flight){.l = l, .next = l->open, .begin = clock_s()};
        const http_stream_calls calls = {on_event, on_end, f};
        rc = http_stream_open(l->h, path, body, &calls, &f->s, e);
        if (rc == OK) {
            if (l->open) l->open->prev = f;
            l->open = f;
            l->n_open++;
            l->r->sent++;
        } else {
            mem_free(f);
        }
    }
    mem_free(body);
    return rc;
}

/* ---- when ---- */

static bool may_begin(const load *l, double now)
{
    if (l->o->requests && l->r->sent >= l->o->requests) return false;
    return !(l->o->duration_s > 0 && now - l->begin >= l->o->duration_s);
}

/* Begins what is due; *wait_ms: until the next is. */
static err_code begin_due(load *l, int *wait_ms, err *e)
{
    double now = clock_s();
    *wait_ms = 100;
    if (l->o->rate <= 0) {
        while (l->n_open < l->o->concurrency && may_begin(l, now)) TRY(begin(l, e));
        return OK;
    }
    while (may_begin(l, now) && l->due <= now) {
        if (l->n_open >= LOAD_MAX_OPEN) {
            l->r->late += !l->held_up; /* each arrival once */
            l->held_up = true;
            break;
        }
        l->held_up = false;
        TRY(begin(l, e));
        l->due -= log(load_uniform(&l->state)) / l->o->rate;
        now = clock_s();
    }
    if (may_begin(l, now) && l->due - now < 0.1)
        *wait_ms = l->due > now ? (int)(1e3 * (l->due - now)) : 0;
    return OK;
}

static err_code loop(load *l, const job *j, err *e)
{
    int wait_ms;
    for (;;) {
        TRY(job_check(j, e));
        TRY(begin_due(l, &wait_ms, e));
        if (!l->n_open && !may_begin(l, clock_s())) return OK;
        TRY(http_client_step(l->h, wait_ms, NULL, e));
        if (l->fatal.code) {
            *e = l->fatal;
            return e->code;
        }
        if (l->o->requests)
            job_step(j, "requests", "request", l->r->ok + l->r->failed, l->o->requests);
    }
}

/* Every open stream is a descriptor. */
static void allow_descriptors(void)
{
    struct rlimit r;
    if (getrlimit(RLIMIT_NOFILE, &r) == 0 && r.rlim_cur < r.rlim_max) {
        r.rlim_cur = r.rlim_max < 2 * LOAD_MAX_OPEN ? r.rlim_max : 2 * LOAD_MAX_OPEN;
        (void)setrlimit(RLIMIT_NOFILE, &r);
    }
}

err_code load_run(load_result *r, http_client *h, load_prompts *p, const load_opts *o, const job *j,
                  err *e)
{
    load l = {.r = r, .h = h, .p = p, .o = o, .state = o->seed};
    memset(r, 0, sizeof *r);
    allow_descriptors();
    const double cpu = cpu_seconds();
    l.begin = l.due = l.end = clock_s();
    const err_code rc = loop(&l, j, e);
    while (l.open) {
        http_stream_close(l.open->s);
        flight_free(l.open);
    }
    r->wall_s = (rc == OK ? l.end : clock_s()) - l.begin;
    r->cpu_s = cpu_seconds() - cpu;
    return rc;
}

void load_result_free(load_result *r)
{
    load_times *all[] = {&r->ttft, &r->inter, &r->per_token, &r->whole, &r->refused};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        mem_free(all[i]->v);
        *all[i] = (load_times){0};
    }
}
