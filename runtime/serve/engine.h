/* The engine: one thread that owns a model, its cache and the scheduler, and steps all running
 * requests together. Requests are submitted, read and canceled from any thread. The ids of an
 * answer depend on its request alone, never on what runs beside it, on how long it waited, on
 * preemption or on reuse of cached prefixes (CUDA: with a device opened as deterministic). */
#ifndef TMF_RUNTIME_SERVE_ENGINE_H
#define TMF_RUNTIME_SERVE_ENGINE_H

#include "base/job.h"
#include "runtime/model.h"
#include "runtime/sampler.h"
#include "runtime/serve/constraint.h"

#define ENGINE_MAX_TOP 20 /* most alternatives reported for a token */

typedef struct engine engine;
typedef struct {
    int32_t max_batch;      /* sequences of one step; 0: the model's slots, which bound it */
    int32_t max_queue;      /* requests beyond max_batch that may be here; 0: 4 * max_batch */
    int32_t prefill_tokens; /* prompt tokens of one step, beside all that decode; 0: 512 */
    bool no_prefix_cache;
} engine_opts;
/* m is borrowed until engine_close, and used by the engine's thread alone. Starts the thread. */
err_code engine_open(engine **out, model *m, const engine_opts *o, const job *j, err *e);
/* Cancels what runs and waits for the thread. Every answer must have been closed. */
void engine_close(engine **g);
/* From now on engine_submit refuses (E_CANCELED); what was accepted runs to its end. */
void engine_drain(engine *g);
/* E_DEVICE etc. when a step failed for good: everything running ended as ANSWER_FAILED, and all
 * that follows does. OK otherwise. */
err_code engine_health(const engine *g, err *e);

typedef struct {
    const int32_t *prompt; /* [n_prompt] copied */
    int32_t n_prompt;
    int32_t max_new;         /* 0: what the session has room for; more than that is cut to it */
    int32_t min_new;         /* no stop id before so many tokens */
    const int32_t *stop_ids; /* copied; none: runs to max_new */
    int32_t n_stop_ids;
    sample_opts sample;      /* bias copied */
    int32_t top_logprobs;    /* -1: no log-probabilities; else so many alternatives a token */
    int32_t prompt_logprobs; /* the same for the prompt's tokens, first one excluded; -1: none */
    constraint *limit;       /* taken over (closed with the answer); NULL: any token may come. Its
                                tokenizer has no more ids than the model */
    uint64_t salt;           /* prefixes are shared only between requests of one salt */
    bool no_prefix;          /* neither use nor leave a cached prefix */
    int64_t timeout_ms;      /* from submission; 0: none. Ends as ANSWER_TIMEOUT */
} engine_request;

typedef enum {
    ANSWER_WAITING, /* no token yet */
    ANSWER_RUNNING,
    ANSWER_STOP,     /* a stop id came (it is the last token), or the constraint is complete */
    ANSWER_LENGTH,   /* max_new, or the session is full */
    ANSWER_TIMEOUT,  /* timeout_ms are over */
    ANSWER_CANCELED, /* answer_cancel, or the engine was closed */
    ANSWER_FAILED    /* a step failed: answer_error */
} answer_state;      /* from ANSWER_STOP on it is final, and no token follows */

typedef struct {
    int32_t id;
    float logprob;
} token_prob;
typedef struct {
    int32_t id;
    float logprob; /* natural, of the distribution before temperature and filters; 0 if not asked */
    int32_t n_top;
    token_prob top[ENGINE_MAX_TOP]; /* most likely first, ties to the lowest id */
} answer_token;

typedef struct {
    int32_t n_prompt, n_cached; /* prompt tokens, and how many came from cached blocks */
    int32_t n_new;
    int32_t preemptions;
    double queue_s, prefill_s, decode_s; /* waited; to the first token; from there to the last */
} answer_figures;

typedef struct answer answer;
/* E_LIMIT: can never fit (prompt empty, longer than the session, or than all of the cache);
 * E_USAGE: a field out of range, named; E_BUSY: max_batch + max_queue requests are here, told
 * before anything else is looked at; E_CANCELED: draining. On failure r->limit stays the caller's.
 * Never waits. */
err_code engine_submit(engine *g, const engine_request *r, answer **out, err *e);
/* Waits up to timeout_ms (-1: for ever, 0: not at all) for tokens behind those already read, or for
 * the end; copies up to cap of them; returns how many. *state is final only with the last ones.
 * One thread at a time reads an answer. */
int32_t answer_read(answer *a, answer_token *out, int32_t cap, int timeout_ms, answer_state *state);
/* Readable (poll) whenever answer_read would not wait: to wait for a token and a socket at once.
 * Owned by the answer. */
int answer_fd(answer *a);
/* The prompt's tokens [1, n_prompt) with prompt_logprobs; complete once the first token is there or
 * the answer ended. Borrowed until answer_close. Returns how many. */
int32_t answer_prompt(answer *a, const answer_token **out);
void answer_figures_get(answer *a, answer_figures *f); /* final once the state is */
err_code answer_error(answer *a, err *e);              /* why it is ANSWER_FAILED, else OK */
void answer_cancel(answer *a);                         /* takes effect before the next step */
void answer_close(answer **a);                         /* cancels, if it still runs; never waits */

/* A consistent snapshot, for /metrics and the page. Histograms count observations at or below
 * bounds[i], the last bucket all of them. */
#define ENGINE_BUCKETS 16
typedef struct {
    double bounds[ENGINE_BUCKETS - 1];
    int64_t count[ENGINE_BUCKETS];
    double sum;
} engine_histogram;
typedef struct {
    int32_t running, waiting, max_batch, max_queue;
    int32_t kv_blocks_used, kv_blocks_cached, kv_blocks_total, block_tokens;
    int64_t prompt_tokens, cached_tokens, new_tokens; /* since the start */
    int64_t accepted, refused, preemptions, ended[ANSWER_FAILED + 1];
    int64_t steps;
    double busy_s; /* spent in steps */
    double step_s; /* what the step under way has taken so far; 0: none is. For a watchdog */
    engine_histogram queue_s, prefill_s, ttft_s, inter_token_s, e2e_s, batch;
} engine_stats;
void engine_stats_get(const engine *g, engine_stats *s);

#endif
