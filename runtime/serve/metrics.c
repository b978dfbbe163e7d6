#include "runtime/serve/metrics.h"

#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

#define METRICS_ROWS 256 /* different (route, code, reason); more are counted together */

typedef struct {
    const char *route, *reason;
    int code;
    int64_t n;
} count_row;

struct metrics {
    pthread_mutex_t lock;
    count_row requests[METRICS_ROWS], rejected[16];
    int n_requests, n_rejected;
    int64_t canceled;
    engine_histogram decode;
};

/* Up to 500 s, a factor of about 2.5 apart. */
static const double decode_bounds[ENGINE_BUCKETS - 1] = {
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 500};

err_code metrics_open(metrics **out, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(metrics), "metrics", e));
    metrics *m = p;
    (void)pthread_mutex_init(&m->lock, NULL);
    memcpy(m->decode.bounds, decode_bounds, sizeof decode_bounds);
    *out = m;
    return OK;
}

void metrics_close(metrics **m)
{
    if (!m || !*m) return;
    (void)pthread_mutex_destroy(&(*m)->lock);
    mem_free(*m);
    *m = NULL;
}

/* The last row takes what has no room. */
static void count(count_row *rows, int *n, int cap, const count_row *key)
{
    int i = 0;
    while (i < *n && (rows[i].code != key->code || strcmp(rows[i].route, key->route) != 0 ||
                      strcmp(rows[i].reason, key->reason) != 0))
        i++;
    if (i == cap) i = cap - 1;
    if (i == *n) {
        rows[i] = i == cap - 1 ? (count_row){"other", "other", 0, 0} : *key;
        rows[i].n = 0;
        (*n)++;
    }
    rows[i].n++;
}

void metrics_request(metrics *m, const char *route, int code, const char *reason)
{
    (void)pthread_mutex_lock(&m->lock);
    count(m->requests, &m->n_requests, METRICS_ROWS, &(count_row){route, reason, code, 0});
    (void)pthread_mutex_unlock(&m->lock);
}

void metrics_rejected(metrics *m, const char *reason)
{
    (void)pthread_mutex_lock(&m->lock);
    count(m->rejected, &m->n_rejected, 16, &(count_row){"", reason, 0, 0});
    (void)pthread_mutex_unlock(&m->lock);
}

void metrics_canceled(metrics *m)
{
    (void)pthread_mutex_lock(&m->lock);
    m->canceled++;
    (void)pthread_mutex_unlock(&m->lock);
}

void metrics_decode(metrics *m, double seconds)
{
    int i = 0;
    while (i < ENGINE_BUCKETS - 1 && seconds > decode_bounds[i]) i++;
    (void)pthread_mutex_lock(&m->lock);
    for (; i < ENGINE_BUCKETS; i++) m->decode.count[i]++;
    m->decode.sum += seconds;
    (void)pthread_mutex_unlock(&m->lock);
}

/* ---- text ---- */

/* How names and labels are written: ours, or those that another server's boards ask for. */
typedef struct {
    const char *prefix, *labels; /* labels: "" or a="b",c="d" */
    out_buf *o;
} style;

static void head(const style *s, const char *name, const char *type, const char *help)
{
    out_printf(s->o, "# HELP %s%s %s\n# TYPE %s%s %s\n", s->prefix, name, help, s->prefix, name,
               type);
}

/* more: labels of this line alone. */
static void begin(const style *s, const char *name, const char *suffix, const char *more)
{
    const char *comma = *s->labels && *more ? "," : "";
    out_text(s->o, s->prefix);
    out_text(s->o, name);
    out_text(s->o, suffix);
    if (!*s->labels && !*more) return;
    const char *const parts[] = {"{", s->labels, comma, more, "}"};
    for (int i = 0; i < 5; i++) out_text(s->o, parts[i]);
}

static void one(const style *s, const char *name, const char *type, const char *help, int64_t v)
{
    head(s, name, type, help);
    begin(s, name, "", "");
    out_printf(s->o, " %" PRId64 "\n", v);
}

static void share(const style *s, const char *name, const char *help, int64_t part, int64_t all)
{
    head(s, name, "gauge", help);
    begin(s, name, "", "");
    out_printf(s->o, " %.9g\n", all > 0 ? (double)part / (double)all : 0.0);
}

static void histogram(const style *s, const char *name, const char *help, const engine_histogram *h)
{
    char le[32];
    head(s, name, "histogram", help);
    for (int i = 0; i < ENGINE_BUCKETS - 1; i++) {
        (void)snprintf(le, sizeof le, "le=\"%g\"", h->bounds[i]);
        begin(s, name, "_bucket", le);
        out_printf(s->o, " %" PRId64 "\n", h->count[i]);
    }
    begin(s, name, "_bucket", "le=\"+Inf\"");
    out_printf(s->o, " %" PRId64 "\n", h->count[ENGINE_BUCKETS - 1]);
    begin(s, name, "_sum", "");
    out_printf(s->o, " %.9g\n", h->sum);
    begin(s, name, "_count", "");
    out_printf(s->o, " %" PRId64 "\n", h->count[ENGINE_BUCKETS - 1]);
}

/* A label's value: JSON's escapes are Prometheus' for what names hold. */
static void label(out_buf *o, const char *name, const char *value)
{
    out_printf(o, "%s=", name);
    out_string(o, value, strlen(value));
}

/* Under these names everywhere. */
static void latencies(const engine_stats *s, const style *y)
{
    histogram(y, "time_to_first_token_seconds", "From submission to the first token.", &s->ttft_s);
    histogram(y, "time_per_output_token_seconds", "Between two tokens of an answer.",
              &s->inter_token_s);
    histogram(y, "e2e_request_latency_seconds", "From submission to the end.", &s->e2e_s);
    histogram(y, "request_queue_time_seconds", "Waiting for a place.", &s->queue_s);
    histogram(y, "request_prefill_time_seconds", "From a place to the first token.", &s->prefill_s);
}

static void engine_text(const engine_stats *s, const style *y)
{
    out_buf *o = y->o;
    one(y, "requests_running", "gauge", "Requests in the batch.", s->running);
    one(y, "requests_waiting", "gauge", "Requests that wait for a place.", s->waiting);
    one(y, "kv_blocks_used", "gauge", "Cache blocks held by requests.", s->kv_blocks_used);
    one(y, "kv_blocks_cached", "gauge", "Cache blocks kept for reuse.", s->kv_blocks_cached);
    one(y, "kv_blocks_total", "gauge", "Cache blocks.", s->kv_blocks_total);
    head(y, "prefix_cache_tokens_total", "counter", "Prompt tokens by whether a prefix had them.");
    out_printf(o, "tm_prefix_cache_tokens_total{result=\"hit\"} %" PRId64 "\n", s->cached_tokens);
    out_printf(o, "tm_prefix_cache_tokens_total{result=\"miss\"} %" PRId64 "\n",
               s->prompt_tokens - s->cached_tokens);
    one(y, "prompt_tokens_total", "counter", "Tokens of prompts.", s->prompt_tokens);
    one(y, "generation_tokens_total", "counter", "Tokens of answers.", s->new_tokens);
    one(y, "preemptions_total", "counter", "Requests set back for want of blocks.", s->preemptions);
    one(y, "engine_steps_total", "counter", "Steps of the engine.", s->steps);
    head(y, "engine_step_seconds", "gauge", "What the step under way has taken; 0: none is.");
    out_printf(o, "tm_engine_step_seconds %.9g\n", s->step_s);
    head(y, "engine_busy_seconds_total", "counter", "Time spent in steps.");
    out_printf(o, "tm_engine_busy_seconds_total %.9g\n", s->busy_s);
    latencies(s, y);
    histogram(y, "decode_batch_size", "Sequences of a step.", &s->batch);
}

static void own_text(const metrics *m, const style *y)
{
    out_buf *o = y->o;
    head(y, "requests_total", "counter", "Requests answered.");
    for (int i = 0; i < m->n_requests; i++) {
        const count_row *r = &m->requests[i];
        out_text(o, "tm_requests_total{");
        label(o, "route", r->route);
        out_printf(o, ",code=\"%d\",", r->code);
        label(o, "finish_reason", r->reason);
        out_printf(o, "} %" PRId64 "\n", r->n);
    }
    head(y, "requests_rejected_total", "counter", "Requests refused for want of room or a model.");
    for (int i = 0; i < m->n_rejected; i++) {
        out_text(o, "tm_requests_rejected_total{");
        label(o, "reason", m->rejected[i].reason);
        out_printf(o, "} %" PRId64 "\n", m->rejected[i].n);
    }
    one(y, "requests_cancelled_total", "counter", "Requests whose client went away.", m->canceled);
    histogram(y, "request_decode_time_seconds", "From the first token to the last.", &m->decode);
}

static void facts_text(const metrics_facts *f, const style *y)
{
    out_buf *o = y->o;
    head(y, "build_info", "gauge", "The version.");
    out_text(o, "tm_build_info{");
    label(o, "version", f->version);
    out_text(o, "} 1\n");
    one(y, "ready", "gauge", "1 when requests are answered.", f->ready);
    if (f->stats) {
        head(y, "model_info", "gauge", "The model.");
        out_text(o, "tm_model_info{");
        label(o, "model", f->model);
        out_text(o, ",");
        label(o, "quant", f->quant);
        out_printf(o, ",kv_bits=\"%d\"} 1\n", f->kv_bits);
        head(y, "device_mem_bytes", "gauge", "Device memory by what holds it.");
        out_printf(o, "tm_device_mem_bytes{kind=\"weights\"} %" PRId64 "\n", f->weights_bytes);
        out_printf(o, "tm_device_mem_bytes{kind=\"kv\"} %" PRId64 "\n", f->kv_bytes);
        one(y, "prompt_tokens_waiting", "gauge", "Tokens of prompts whose answers have not begun.",
            f->queued_tokens);
        engine_text(f->stats, y);
    }
}

/* ---- names of other servers ---- */

/* Answers that ended well, by their reason. */
static void alias_success(const metrics *m, const style *y)
{
    static const char *const reasons[] = {"stop", "length", "tool_calls"};
    char more[48];
    head(y, "request_success_total", "counter", "Requests answered.");
    for (int k = 0; k < 3; k++) {
        int64_t n = 0;
        for (int i = 0; i < m->n_requests; i++)
            if (m->requests[i].code == 200 && strcmp(m->requests[i].reason, reasons[k]) == 0)
                n += m->requests[i].n;
        (void)snprintf(more, sizeof more, "finished_reason=\"%s\"", reasons[k]);
        begin(y, "request_success_total", "", more);
        out_printf(y->o, " %" PRId64 "\n", n);
    }
}

/* What vLLM and LMDeploy call alike. */
static void alias_common(const metrics *m, const engine_stats *s, const style *y)
{
    one(y, "num_requests_running", "gauge", "As tm_requests_running.", s->running);
    one(y, "num_requests_waiting", "gauge", "As tm_requests_waiting.", s->waiting);
    share(y, "gpu_cache_usage_perc", "Share of cache blocks held by requests.", s->kv_blocks_used,
          s->kv_blocks_total);
    one(y, "prompt_tokens_total", "counter", "As tm_prompt_tokens_total.", s->prompt_tokens);
    one(y, "generation_tokens_total", "counter", "As tm_generation_tokens_total.", s->new_tokens);
    alias_success(m, y);
    latencies(s, y);
    histogram(y, "request_decode_time_seconds", "From the first token to the last.", &m->decode);
}

static void alias_text(const metrics *m, const metrics_facts *f, out_buf *o)
{
    const engine_stats *s = f->stats;
    out_buf labels = {0};
    label(&labels, "model_name", f->model);
    out_bytes(&labels, ",engine=\"0\"", sizeof ",engine=\"0\""); /* and its end */
    const style y = {f->alias == METRICS_VLLM ? "vllm:" : "lmdeploy:", labels.s, o};
    if (labels.failed) {
        o->failed = true;
    } else {
        alias_common(m, s, &y);
        if (f->alias == METRICS_VLLM) {
            share(&y, "kv_cache_usage_perc", "Share of cache blocks held by requests.",
                  s->kv_blocks_used, s->kv_blocks_total);
            one(&y, "prefix_cache_queries_total", "counter", "Prompt tokens.", s->prompt_tokens);
            one(&y, "prefix_cache_hits_total", "counter", "Those that a cached prefix had.",
                s->cached_tokens);
            one(&y, "num_preemptions_total", "counter", "As tm_preemptions_total.", s->preemptions);
            histogram(&y, "inter_token_latency_seconds", "Between two tokens of an answer.",
                      &s->inter_token_s);
        } else {
            share(&y, "prefix_cache_hit_rate", "Share of prompt tokens that a cached prefix had.",
                  s->cached_tokens, s->prompt_tokens);
            one(&y, "cached_tokens_total", "counter", "Prompt tokens that a cached prefix had.",
                s->cached_tokens);
        }
    }
    out_free(&labels);
}

void metrics_text(metrics *m, const metrics_facts *f, out_buf *o)
{
    const style y = {"tm_", "", o};
    facts_text(f, &y);
    (void)pthread_mutex_lock(&m->lock);
    own_text(m, &y);
    if (f->alias != METRICS_TM && f->stats) alias_text(m, f, o);
    (void)pthread_mutex_unlock(&m->lock);
}
