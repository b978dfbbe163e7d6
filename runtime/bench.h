/* Speed of the step that chat runs: a prompt in one step, then one token a step, greedy. */
#ifndef TMF_RUNTIME_BENCH_H
#define TMF_RUNTIME_BENCH_H

#include "runtime/model.h"

#define BENCH_MAX_ROUNDS 101

typedef struct {
    int32_t prompt_tokens, new_tokens; /* 1 or more; together within the session */
    int32_t rounds;                    /* timed, after one that is not */
    uint64_t seed;                     /* of the prompt's ids */
} bench_opts;

typedef struct {
    double prompt_s, new_s; /* medians over the rounds */
    double prompt_best_s, new_best_s;
    double prompt_tps, new_tps; /* tokens a second, of the medians */
    size_t token_bytes;         /* read for a new token, at the middle of the answer */
    int32_t last_id;            /* greedy end: equal over runs, threads and batch sizes */
} bench_result;
/* Uses slot 0 and ends it. */
err_code bench_run(bench_result *r, model *m, const bench_opts *o, const job *j, err *e);

/* Bytes a second that all threads of `d` together read from a block of `bytes` of its memory: best of
 * `passes`. The block should exceed the last cache by much. CPU only (E_UNSUPPORTED). */
err_code bench_read_rate(double *bytes_per_s, device *d, size_t bytes, int passes, const job *j,
                         err *e);

#endif
