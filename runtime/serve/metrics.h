/* What the server counts itself, and everything as Prometheus text. */
#ifndef TMF_RUNTIME_SERVE_METRICS_H
#define TMF_RUNTIME_SERVE_METRICS_H

#include "runtime/serve/engine.h"
#include "runtime/serve/out.h"

typedef struct metrics metrics;
err_code metrics_open(metrics **out, err *e);
void metrics_close(metrics **m);
/* A request is over. route and reason are constants; any thread. */
void metrics_request(metrics *m, const char *route, int code, const char *reason);
void metrics_rejected(metrics *m, const char *reason); /* "queue_full", "loading", ... a constant */
void metrics_canceled(metrics *m);
void metrics_decode(metrics *m, double seconds);

typedef enum { METRICS_TM, METRICS_VLLM, METRICS_LMDEPLOY } metrics_names;
typedef struct {
    const char *version, *model, *quant;
    int kv_bits;
    int64_t weights_bytes, kv_bytes;
    int64_t queued_tokens; /* of prompts whose answers have not begun */
    bool ready;
    metrics_names alias;       /* whose names stand beside ours */
    const engine_stats *stats; /* NULL while there is no engine */
} metrics_facts;
void metrics_text(metrics *m, const metrics_facts *f, out_buf *o);

#endif
