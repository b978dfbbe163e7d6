/* The inside of the engine, for engine*.c alone. What a comment gives to "thread" is touched by the
 * engine's thread only, what it gives to "lock" under engine.lock. */
#ifndef TMF_RUNTIME_SERVE_ENGINE_INTERNAL_H
#define TMF_RUNTIME_SERVE_ENGINE_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "runtime/serve/engine.h"
#include "runtime/serve/sched.h"

/* Rows of one step whose alternatives are listed for prompts: their logits come to the host. */
#define ENGINE_SCORE_ROWS 16

/* One block of memory, released by the last of its two holders: the engine, as long as it runs, and
 * the reader. */
struct answer {
    engine *g;
    atomic_int holders;
    atomic_bool cancel;
    sched_seq q; /* thread; tokens [q.cap]: the prompt, then the answer */

    /* the request, constant */
    int32_t n_prompt, max_new, min_new;
    const int32_t *stop_ids; /* [n_stop_ids] */
    int32_t n_stop_ids;
    sample_opts sample;
    bool sampled; /* needs a sampler: not just the largest logit */
    int32_t top, prompt_top;
    constraint *limit;
    double submitted, deadline; /* seconds of clock_s; deadline 0: none */

    /* thread */
    answer *next; /* in the inbox: lock */
    int32_t live; /* index among the engine's */
    int32_t n_new;
    int32_t n_allowed; /* ids that the constraint lets follow */
    sampler_rng rng;   /* behind n_new tokens: a slot may go to another and come back */

    /* written by the thread, read by others once `ready` says so */
    float *logprob;       /* [max_new] or NULL */
    token_prob *tops;     /* [max_new, top] or NULL */
    answer_token *prompt; /* [n_prompt - 1] or NULL */
    err error;

    _Atomic uint64_t ready; /* answer_state << 32 | tokens */
    atomic_int prompt_ready;
    _Atomic int32_t n_cached, preemptions;
    _Atomic double began, first, last; /* seconds of clock_s; 0: not yet */

    /* the reader's */
    int fd;          /* eventfd, readable while `lit` */
    atomic_bool lit; /* somebody wrote to fd, or is about to */
    int32_t n_read;
};

struct engine {
    model *m;
    job job; /* without a stop flag: a step is never cut short */
    int32_t vocab, max_batch, max_live;
    bool no_prefix_cache;
    sched *sched;
    pthread_t thread;

    pthread_mutex_t lock;
    pthread_cond_t work;        /* the inbox has something, or closing */
    answer *inbox, **inbox_end; /* lock */
    int32_t n_accepted;         /* lock: live, in the inbox or about to be */
    bool draining, closing;     /* lock */
    err failed;                 /* lock, written by the thread; code OK: healthy */
    engine_stats shown;         /* lock */
    _Atomic double step_began;  /* clock_s; 0: no step is under way */

    /* thread */
    answer **live; /* [max_live] in no order */
    int32_t n_live, n_ended;
    struct {
        answer *a;
        answer_state state;
    } * news; /* [2 * max_live] what readers do not know yet */
    int32_t n_news;
    engine_stats stats;
    step_seq *seqs;     /* [max_batch] */
    sampler **samplers; /* [max_batch], one a slot; the first one's scratch serves all */
    uint32_t *mask;     /* [max_batch, mask_words] ids that constraints allow */
    int32_t mask_words;
    float *logits;       /* [max_batch, vocab] of rows that are sampled */
    float *work_logits;  /* [vocab] */
    float *score_logits; /* [ENGINE_SCORE_ROWS, vocab] */
    int32_t *best;       /* [max_batch] */
    float *nll;          /* [max_batch] against id 0 */
    float *score_nll;    /* [prompt rows of a step] */
};

/* engine_pick.c */
/* What the next token of a takes from the model. */
void engine_want(engine *g, answer *a, step_seq *q);
/* The slot of a is new to it: its sampler and its mask. */
err_code engine_pick_begin(engine *g, answer *a, err *e);
/* The next token out of what engine_want asked for, with its probabilities; -1: the answer is
 * complete without one. */
err_code engine_pick(engine *g, answer *a, int32_t *id, err *e);
/* Tells sampler and constraint of it. True when nothing can follow. */
bool engine_picked(engine *g, answer *a, int32_t id);
bool engine_is_stop(const answer *a, int32_t id);
/* The n most likely ids. Returns how many there are; the others of `out` have id -1. */
int32_t engine_top(token_prob *out, int32_t n, const float *logits, int32_t vocab, double lse);

/* engine_answer.c */
void answer_publish(answer *a, answer_state state);
void answer_release(answer *a);

/* engine_stats.c */
void engine_stats_begin(engine_stats *s);
void engine_observe(engine_histogram *h, double x);

#endif
