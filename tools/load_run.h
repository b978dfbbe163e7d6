/* A load of requests on a server, and what it measured. */
#ifndef TMF_TOOLS_LOAD_RUN_H
#define TMF_TOOLS_LOAD_RUN_H

#include "tools/load_prompts.h"

#define LOAD_MAX_OPEN  4096 /* requests at once, also of an open loop */
#define LOAD_MAX_KINDS 16   /* of failures told apart */

typedef struct {
    int64_t requests;    /* to send; 0: as many as duration_s allows */
    double duration_s;   /* no request begins later; 0: no such limit */
    int32_t concurrency; /* closed loop: so many are always open */
    double rate;         /* open loop: arrivals a second, exponential gaps; 0: closed loop */
    int64_t first;       /* number of the first request, for its prompt */
    uint64_t seed;       /* of the gaps */
} load_opts;

typedef struct {
    double *v; /* [n] seconds */
    int64_t n, cap;
} load_times;
/* The q-th part of them in order (0.5: the median), seconds; 0 of none. Sorts v. */
double load_quantile(load_times *t, double q);

typedef struct {
    int64_t sent, ok, failed;
    int64_t late; /* open loop: arrivals that waited, LOAD_MAX_OPEN being open */
    int64_t prompt_tokens, cached_tokens, new_tokens; /* of those that are ok */
    int64_t by_length;                                /* of them, those that ended at max_tokens */
    double wall_s, cpu_s; /* from the first request to the last end; our own time */
    load_times ttft, inter, per_token, whole, refused; /* refused: to the end of a 429 or 503 */
    struct {
        long status; /* 0: no connection, or it broke; 200: the stream told of an error */
        int64_t count;
        char example[256];
    } kinds[LOAD_MAX_KINDS];
    int n_kinds;
} load_result;

/* Runs until everything that was sent has ended. E_CANCELED by j: what ran is closed, the result
 * holds what came before. Free with load_result_free in any case. */
err_code load_run(load_result *r, http_client *h, load_prompts *p, const load_opts *o, const job *j,
                  err *e);
void load_result_free(load_result *r);

#endif
