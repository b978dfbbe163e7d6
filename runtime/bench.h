/* Speed of the step that chat runs: prompts in one step, then one token a sequence and step,
 * greedy. */
#ifndef TMF_RUNTIME_BENCH_H
#define TMF_RUNTIME_BENCH_H

#include "runtime/model.h"

#define BENCH_MAX_ROUNDS 101

typedef struct {
    int32_t prompt_tokens, new_tokens; /* 1 or more; together within the session */
    int32_t batch;                     /* sequences of equal length, one slot each; 1 or more */
    int32_t rounds;                    /* timed, after one that is not */
    uint64_t seed;                     /* of the prompt's ids */
} bench_opts;

typedef struct {
    double prompt_s, new_s; /* medians over the rounds */
    double prompt_best_s, new_best_s;
    double first_s; /* the prompt's step of the round that is not timed: the first of this model */
    double prompt_tps, new_tps; /* tokens a second of all sequences together, of the medians */
    size_t token_bytes; /* read for a new token of one sequence, at the middle of the answer */
    int32_t last_id;    /* greedy end of the first: equal over runs, threads and batch sizes */
} bench_result;
/* Uses slots 0..batch-1 and ends them. Sequences differ from each other; the first is the same in
 * any batch. */
err_code bench_run(bench_result *r, model *m, const bench_opts *o, const job *j, err *e);

/* Bytes a second that all threads of `d` together read from a block of `bytes` of its memory: best
 * of `passes`. The block should exceed the last cache by much. CPU only (E_UNSUPPORTED). */
err_code bench_read_rate(double *bytes_per_s, device *d, size_t bytes, int passes, const job *j,
                         err *e);

#endif
