/* tm-run bench-serve: a load on a server, and how it stood it. */
#include <math.h>
#include <stdio.h>

#include "base/mem.h"
#include "tools/load_run.h"
#include "tools/tm_run.h"

static struct {
    const char *name, *key_file, *prompts, *route;
    int64_t concurrency, requests, warmup, prompt_tokens, new_tokens;
    double rate, duration_s, temperature;
    bool at_eos, shared;
} opt = {.route = "completions",
         .concurrency = 8,
         .requests = 0,
         .warmup = 0,
         .prompt_tokens = 128,
         .new_tokens = 128};

static const cli_option options[] = {
    {"concurrency", 'c', CLI_I64, &opt.concurrency, "N",
     "closed loop: so many requests are always open [8]", .lo = 1, .hi = LOAD_MAX_OPEN},
    {"rate", 'r', CLI_F64, &opt.rate, "R",
     "open loop: R arrivals a second, at random [0: closed loop]", .lo = 0, .hi = 1e6},
    {"requests", 'n', CLI_I64, &opt.requests, "N",
     "to send [8 for each at once; without limit under --duration]", .lo = 1, .hi = 1e9},
    {"duration", 'd', CLI_F64, &opt.duration_s, "S",
     "begin no request after S seconds [0: no limit]", .lo = 0, .hi = 1e6},
    {"warmup", 0, CLI_I64, &opt.warmup, "N", "requests before, not counted [0]", .lo = 0,
     .hi = 1e6},
    {"prompts", 0, CLI_STR, &opt.prompts, "FILE",
     "a prompt a line; *.jsonl: \"prompt\" or \"messages\" of each row"},
    {"prompt-tokens", 0, CLI_I64, &opt.prompt_tokens, "N", "length of prompts made up [128]",
     .lo = 1, .hi = 1 << 20},
    {"new-tokens", 0, CLI_I64, &opt.new_tokens, "N", "length of the answers [128]", .lo = 1,
     .hi = 1 << 20},
    {"at-eos", 0, CLI_FLAG, &opt.at_eos, NULL, "answers may end earlier, by themselves"},
    {"shared-prompt", 0, CLI_FLAG, &opt.shared, NULL,
     "the same prompt each time: what prefix reuse gains"},
    {"route", 0, CLI_CHOICE, &opt.route, "NAME", "completions or chat [completions]",
     .choices = "completions|chat"},
    {"temperature", 't', CLI_F64, &opt.temperature, "T", "0 is greedy [0]", .lo = 0, .hi = 2},
    {"model", 0, CLI_STR, &opt.name, "NAME", "model to ask [the first that the server names]"},
    {"api-key-file", 0, CLI_STR, &opt.key_file, "FILE",
     "its first key is sent [environment TM_RUN_API_KEY]"},
};

/* ---- report ---- */

typedef struct {
    const char *key, *label;
    load_times *t;
} series;
#define N_SERIES 5
static void make_series(series s[N_SERIES], load_result *r)
{
    s[0] = (series){"ttft", "first token", &r->ttft};
    s[1] = (series){"inter_token", "between tokens", &r->inter};
    s[2] = (series){"per_token", "per token", &r->per_token};
    s[3] = (series){"e2e", "whole answer", &r->whole};
    s[4] = (series){"refused", "refusal", &r->refused};
}

static double mean(const load_times *t)
{
    double sum = 0;
    for (int64_t i = 0; i < t->n; i++) sum += t->v[i];
    return t->n ? sum / (double)t->n : 0;
}

static double per_second(const load_result *r, int64_t n)
{
    return r->wall_s > 0 ? (double)n / r->wall_s : 0;
}

static void print_table(load_result *r, bool exact)
{
    series s[N_SERIES];
    make_series(s, r);
    (void)printf("requests  %8lld ok, %lld failed in %.2f s: %.2f a second\n", (long long)r->ok,
                 (long long)r->failed, r->wall_s, per_second(r, r->ok));
    (void)printf("prompts   %8lld tokens%s, %lld of them from cache: %.1f a second\n",
                 (long long)r->prompt_tokens, exact ? "" : " as the server counts",
                 (long long)r->cached_tokens, per_second(r, r->prompt_tokens));
    (void)printf("answers   %8lld tokens: %.1f a second\n", (long long)r->new_tokens,
                 per_second(r, r->new_tokens));
    (void)printf("%-15s %10s %10s %10s %10s %10s\n", "milliseconds", "mean", "p50", "p90", "p99",
                 "max");
    for (int i = 0; i < N_SERIES; i++) {
        load_times *t = s[i].t;
        if (!t->n) continue;
        (void)printf("%-15s %10.2f %10.2f %10.2f %10.2f %10.2f\n", s[i].label, 1e3 * mean(t),
                     1e3 * load_quantile(t, 0.5), 1e3 * load_quantile(t, 0.9),
                     1e3 * load_quantile(t, 0.99), 1e3 * load_quantile(t, 1));
    }
    for (int i = 0; i < r->n_kinds; i++)
        (void)printf("failed    %8lld with status %ld: %s\n", (long long)r->kinds[i].count,
                     r->kinds[i].status, r->kinds[i].example);
    if (r->late) (void)printf("%lld arrivals had to wait here\n", (long long)r->late);
    (void)printf("this client took %.1f %% of a core\n", 100 * r->cpu_s / r->wall_s);
}

static bool add_series(cJSON *o, const series *s)
{
    static const struct {
        const char *name;
        double q;
    } parts[] = {{"p50", 0.5}, {"p90", 0.9}, {"p99", 0.99}, {"max", 1}};
    char key[32];
    (void)snprintf(key, sizeof key, "%s_ms", s->key);
    cJSON *in = cJSON_AddObjectToObject(o, key);
    bool ok = in && cJSON_AddNumberToObject(in, "count", (double)s->t->n) &&
              cJSON_AddNumberToObject(in, "mean", 1e3 * mean(s->t));
    for (size_t i = 0; ok && i < sizeof parts / sizeof *parts; i++)
        ok = cJSON_AddNumberToObject(in, parts[i].name, 1e3 * load_quantile(s->t, parts[i].q));
    return ok;
}

static bool add_errors(cJSON *o, const load_result *r)
{
    cJSON *list = cJSON_AddArrayToObject(o, "errors");
    bool ok = list != NULL;
    for (int i = 0; ok && i < r->n_kinds; i++) {
        cJSON *k = cJSON_CreateObject();
        ok = k && cJSON_AddItemToArray(list, k) &&
             cJSON_AddNumberToObject(k, "status", (double)r->kinds[i].status) &&
             cJSON_AddNumberToObject(k, "count", (double)r->kinds[i].count) &&
             cJSON_AddStringToObject(k, "example", r->kinds[i].example);
    }
    return ok;
}

static err_code print_json(load_result *r, const http_client *h, const char *name, err *e)
{
    series s[N_SERIES];
    make_series(s, r);
    cJSON *o = cJSON_CreateObject();
    bool ok = o && cJSON_AddStringToObject(o, "url", http_client_url(h)) &&
              cJSON_AddStringToObject(o, "model", name) &&
              (opt.rate > 0 ? cJSON_AddNumberToObject(o, "rate", opt.rate)
                            : cJSON_AddNumberToObject(o, "concurrency", (double)opt.concurrency)) &&
              cJSON_AddNumberToObject(o, "sent", (double)r->sent) &&
              cJSON_AddNumberToObject(o, "ok", (double)r->ok) &&
              cJSON_AddNumberToObject(o, "failed", (double)r->failed) &&
              cJSON_AddNumberToObject(o, "late", (double)r->late) &&
              cJSON_AddNumberToObject(o, "wall_seconds", r->wall_s) &&
              cJSON_AddNumberToObject(o, "requests_per_second", per_second(r, r->ok)) &&
              cJSON_AddNumberToObject(o, "prompt_tokens", (double)r->prompt_tokens) &&
              cJSON_AddNumberToObject(o, "cached_tokens", (double)r->cached_tokens) &&
              cJSON_AddNumberToObject(o, "new_tokens", (double)r->new_tokens) &&
              cJSON_AddNumberToObject(o, "ended_by_length", (double)r->by_length) &&
              cJSON_AddNumberToObject(o, "prompt_tokens_per_second",
                                      per_second(r, r->prompt_tokens)) &&
              cJSON_AddNumberToObject(o, "new_tokens_per_second", per_second(r, r->new_tokens)) &&
              cJSON_AddNumberToObject(o, "client_cpu_seconds", r->cpu_s) && add_errors(o, r);
    for (int i = 0; ok && i < N_SERIES; i++) ok = add_series(o, &s[i]);
    return run_json(o, ok, e);
}

/* ---- run ---- */

static err_code measure(const tool_ctx *t, http_client *h, load_prompts *p, const char *name,
                        err *e)
{
    load_result r;
    load_opts o = {.requests = opt.warmup,
                   .concurrency = (int32_t)opt.concurrency,
                   .rate = opt.rate,
                   .seed = (uint64_t)t->seed};
    err_code rc = OK;
    if (opt.warmup) {
        rc = load_run(&r, h, p, &o, &t->job, e);
        load_result_free(&r);
        if (rc != OK) return rc;
    }
    o.first = opt.warmup;
    o.duration_s = opt.duration_s;
    o.requests = opt.requests;
    if (!o.requests && opt.duration_s <= 0) o.requests = 8 * opt.concurrency;
    rc = load_run(&r, h, p, &o, &t->job, e);
    if (rc == OK || rc == E_CANCELED) { /* what was measured until then */
        err ignored;
        tool_progress_clear();
        if (t->json)
            (void)print_json(&r, h, name, rc == OK ? e : &ignored);
        else
            print_table(&r, load_prompts_exact(p));
    }
    if (rc == OK && !r.ok)
        rc = err_set(e, E_CHECK, "not one of %lld requests was answered: %s", (long long)r.sent,
                     r.n_kinds ? r.kinds[0].example : "none was sent");
    load_result_free(&r);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    http_client *h = NULL;
    load_prompts *p = NULL;
    char *name = NULL;
    err_code rc = http_client_open(&h, t->args[0], opt.key_file, e);
    if (rc == OK)
        rc = opt.name ? mem_strdup(&name, opt.name, e) : http_client_model(h, &t->job, &name, e);
    const load_prompts_opts po = {name,           opt.prompts,         opt.prompt_tokens,
                                  opt.new_tokens, opt.route[1] == 'h', opt.at_eos,
                                  opt.shared,     opt.temperature,     (uint64_t)t->seed};
    if (rc == OK) rc = load_prompts_open(&p, &po, h, &t->job, e);
    if (rc == OK) rc = measure(t, h, p, name, e);
    load_prompts_close(&p);
    http_client_close(&h);
    mem_free(name);
    return rc;
}

const tool_command tm_run_bench_serve = {
    .name = "bench-serve",
    .usage = "URL [options]",
    .summary = "puts a load on a server and times its answers",
    .examples =
        "  tm-run bench-serve 127.0.0.1:23333 --concurrency 32 --new-tokens 128\n"
        "  tm-run bench-serve 127.0.0.1:23333 --rate 4 --duration 60 --prompts p.jsonl --json\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_SEED | TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};
