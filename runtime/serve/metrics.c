#include "runtime/serve/metrics.h"

#include <inttypes.h>
#include <pthread.h>
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

static void head(out_buf *o, const char *name, const char *type, const char *help)
{
    out_printf(o, "# HELP tm_%s %s\n# TYPE tm_%s %s\n", name, help, name, type);
}

static void one(out_buf *o, const char *name, const char *type, const char *help, int64_t v)
{
    head(o, name, type, help);
    out_printf(o, "tm_%s %" PRId64 "\n", name, v);
}

static void histogram(out_buf *o, const char *name, const char *help, const engine_histogram *h)
{
    head(o, name, "histogram", help);
    for (int i = 0; i < ENGINE_BUCKETS - 1; i++)
        out_printf(o, "tm_%s_bucket{le=\"%g\"} %" PRId64 "\n", name, h->bounds[i], h->count[i]);
    out_printf(
        o, "tm_%s_bucket{le=\"+Inf\"} %" PRId64 "\ntm_%s_sum %.9g\ntm_%s_count %" PRId64 "\n", name,
        h->count[ENGINE_BUCKETS - 1], name, h->sum, name, h->count[ENGINE_BUCKETS - 1]);
}

/* A label's value: JSON's escapes are Prometheus' for what names hold. */
static void label(out_buf *o, const char *name, const char *value)
{
    out_printf(o, "%s=", name);
    out_string(o, value, strlen(value));
}

static void engine_text(const engine_stats *s, out_buf *o)
{
    one(o, "requests_running", "gauge", "Requests in the batch.", s->running);
    one(o, "requests_waiting", "gauge", "Requests that wait for a place.", s->waiting);
    one(o, "kv_blocks_used", "gauge", "Cache blocks held by requests.", s->kv_blocks_used);
    one(o, "kv_blocks_cached", "gauge", "Cache blocks kept for reuse.", s->kv_blocks_cached);
    one(o, "kv_blocks_total", "gauge", "Cache blocks.", s->kv_blocks_total);
    head(o, "prefix_cache_tokens_total", "counter", "Prompt tokens by whether a prefix had them.");
    out_printf(o, "tm_prefix_cache_tokens_total{result=\"hit\"} %" PRId64 "\n", s->cached_tokens);
    out_printf(o, "tm_prefix_cache_tokens_total{result=\"miss\"} %" PRId64 "\n",
               s->prompt_tokens - s->cached_tokens);
    one(o, "prompt_tokens_total", "counter", "Tokens of prompts.", s->prompt_tokens);
    one(o, "generation_tokens_total", "counter", "Tokens of answers.", s->new_tokens);
    one(o, "preemptions_total", "counter", "Requests set back for want of blocks.", s->preemptions);
    one(o, "engine_steps_total", "counter", "Steps of the engine.", s->steps);
    head(o, "engine_busy_seconds_total", "counter", "Time spent in steps.");
    out_printf(o, "tm_engine_busy_seconds_total %.9g\n", s->busy_s);
    histogram(o, "time_to_first_token_seconds", "From submission to the first token.", &s->ttft_s);
    histogram(o, "time_per_output_token_seconds", "Between two tokens of an answer.",
              &s->inter_token_s);
    histogram(o, "e2e_request_latency_seconds", "From submission to the end.", &s->e2e_s);
    histogram(o, "request_queue_time_seconds", "Waiting for a place.", &s->queue_s);
    histogram(o, "request_prefill_time_seconds", "From a place to the first token.", &s->prefill_s);
    histogram(o, "decode_batch_size", "Sequences of a step.", &s->batch);
}

static void own_text(const metrics *m, out_buf *o)
{
    head(o, "requests_total", "counter", "Requests answered.");
    for (int i = 0; i < m->n_requests; i++) {
        const count_row *r = &m->requests[i];
        out_text(o, "tm_requests_total{");
        label(o, "route", r->route);
        out_printf(o, ",code=\"%d\",", r->code);
        label(o, "finish_reason", r->reason);
        out_printf(o, "} %" PRId64 "\n", r->n);
    }
    head(o, "requests_rejected_total", "counter", "Requests refused for want of room or a model.");
    for (int i = 0; i < m->n_rejected; i++) {
        out_text(o, "tm_requests_rejected_total{");
        label(o, "reason", m->rejected[i].reason);
        out_printf(o, "} %" PRId64 "\n", m->rejected[i].n);
    }
    one(o, "requests_cancelled_total", "counter", "Requests whose client went away.", m->canceled);
    histogram(o, "request_decode_time_seconds", "From the first token to the last.", &m->decode);
}

void metrics_text(metrics *m, const metrics_facts *f, out_buf *o)
{
    head(o, "build_info", "gauge", "The version.");
    out_text(o, "tm_build_info{");
    label(o, "version", f->version);
    out_text(o, "} 1\n");
    one(o, "ready", "gauge", "1 when requests are answered.", f->ready);
    if (f->stats) {
        head(o, "model_info", "gauge", "The model.");
        out_text(o, "tm_model_info{");
        label(o, "model", f->model);
        out_text(o, ",");
        label(o, "quant", f->quant);
        out_printf(o, ",kv_bits=\"%d\"} 1\n", f->kv_bits);
        head(o, "device_mem_bytes", "gauge", "Device memory by what holds it.");
        out_printf(o, "tm_device_mem_bytes{kind=\"weights\"} %" PRId64 "\n", f->weights_bytes);
        out_printf(o, "tm_device_mem_bytes{kind=\"kv\"} %" PRId64 "\n", f->kv_bytes);
        one(o, "prompt_tokens_waiting", "gauge", "Tokens of prompts whose answers have not begun.",
            f->queued_tokens);
        engine_text(f->stats, o);
    }
    (void)pthread_mutex_lock(&m->lock);
    own_text(m, o);
    (void)pthread_mutex_unlock(&m->lock);
}
