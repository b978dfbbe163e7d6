/* What runs in the next step: continuous batching over a cache of blocks. Pure accounting: it knows
 * token counts, slots and blocks, never what a model makes of them, and is tested without one.
 *
 * A sequence waits until it has a slot and blocks for all tokens it has by then; those in the cache
 * already are shared, not computed again. Then its tokens run in chunks, beside the sequences that
 * already answer with one row each. When blocks run out, the sequence that came last gives its own
 * up and waits again (in order of arrival), to be computed again later. The oldest sequence is
 * never the one to stop and has the first claim on every step: it gets on with each of them, so
 * every sequence ends.
 *
 * One thread. Nothing here allocates but sched_open. */
#ifndef TMF_RUNTIME_SERVE_SCHED_H
#define TMF_RUNTIME_SERVE_SCHED_H

#include "runtime/serve/blocks.h"

typedef struct {
    int32_t slots;          /* sequences of a step */
    int32_t prefill_tokens; /* most prompt rows of a step */
    int32_t step_rows;  /* prompt rows are cut to this less the rows that answer, within reason */
    int32_t score_rows; /* most rows of a step whose logits are wanted beside the answers' */
    int32_t blocks, block_tokens;
    int32_t session_tokens; /* most of a sequence; its blocks are within `blocks` */
} sched_opts;

typedef enum { SCHED_NEW, SCHED_WAITING, SCHED_RUNNING, SCHED_ENDED } sched_state;

/* A sequence, in the caller's memory from sched_submit to sched_end. */
typedef struct sched_seq sched_seq;
struct sched_seq {
    /* the caller's, before sched_submit */
    int32_t *tokens;  /* [cap] the prompt; sched_append writes behind it */
    int32_t *blocks;  /* [blocks of cap tokens] */
    int32_t n_tokens; /* of the prompt, 1 or more; grows with the answer */
    int32_t cap;      /* at most the session */
    int32_t
        n_score; /* rows before this are wanted, too (prompt tokens - 1); no prefix is used then */
    bool score_logits; /* with their logits: at most sched_opts.score_rows a step */
    bool no_prefix;    /* shares no blocks, leaves none */
    blocks_root root;
    /* the scheduler's, to be read */
    sched_state state;
    int32_t slot;     /* while it runs */
    int32_t n_blocks; /* of blocks[], while it runs */
    int32_t n_held;   /* tokens that the cache holds */
    int32_t n_shared; /* of them found there when it last began to run */
    int32_t n_scored; /* rows that were scored */
    int32_t preemptions;
    bool moved; /* blocks[] changed since the step before; the caller may clear it */
    /* its own */
    int32_t n_kept; /* leading blocks that are findable */
    uint64_t order;
    sched_seq *prev, *next; /* among those that wait */
};

/* One sequence's part of a step: tokens [first, first + n) run in its slot, behind those held. */
typedef struct {
    sched_seq *q;
    int32_t first, n;
    int32_t n_score; /* of these rows the last n_score are scored; never together with `last` */
    bool last;       /* the last row gives the next token: sched_append or sched_end follows */
    bool begins;     /* the slot is new to the sequence: it holds its first `first` tokens by now */
} sched_part;
typedef struct {
    sched_part *part; /* [slots], oldest sequence first */
    int32_t n;
    int32_t rows, prompt_rows; /* in all; of parts that have more than the answer's last token */
} sched_step;

typedef struct sched sched;
err_code sched_open(sched **out, const sched_opts *o, err *e);
void sched_close(sched **s);
/* Behind all that came before. */
void sched_submit(sched *s, sched_seq *q);
/* Plans a step; every part's blocks are there. Without parts nothing is left to do. Valid until the
 * next call. */
const sched_step *sched_next(sched *s);
/* The step has run. Follow it up: sched_append or sched_end for each part with `last`. */
void sched_commit(sched *s);
/* The token behind all of q's; below cap of them. */
void sched_append(sched *s, sched_seq *q, int32_t id);
/* Takes q out, in any state, with all that it holds. Not between sched_next and sched_commit. */
void sched_end(sched *s, sched_seq *q);

int32_t sched_running(const sched *s);
int32_t sched_waiting(const sched *s);
int64_t sched_preemptions(const sched *s); /* since the start */
const blocks *sched_blocks(const sched *s);

#endif
