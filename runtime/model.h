/* A model on a device: every weight bound, one paged cache, scratch for steps of many sequences.
 * The step is the only way tokens go through it: chat, perplexity, bench and a server all call
 * model_step. One thread at a time may use a model. */
#ifndef TMF_RUNTIME_MODEL_H
#define TMF_RUNTIME_MODEL_H

#include "base/job.h"
#include "formats/weights.h"
#include "runtime/kv_cache.h"
#include "runtime/sampler.h"

typedef struct model model;

typedef struct {
    kv_format kv;
    int32_t session_len;  /* most tokens of a sequence; 0: the model's context */
    int32_t max_seqs;     /* sequence slots; 0: 1 */
    int32_t max_rows;     /* rows of one pass, longer steps are cut; 0: 512 */
    int32_t block_tokens; /* of the cache; 0: 64 */
    int64_t
        kv_mem_bytes; /* cache budget; 0: kv_share of the memory free after weights and scratch */
    double kv_share;  /* 0: 0.8 */
} model_opts;

/* What opening takes, known before anything is read. */
typedef struct {
    size_t weights_bytes; /* device memory for weights (tiled W4, turned or copied tensors) */
    size_t mapped_bytes;  /* weights used where they lie in the page cache: all 16-bit ones on the
                             CPU, an embedding at most elsewhere */
    size_t kv_bytes;      /* the cache at its fullest; host pages are taken as they are used */
    size_t scratch_bytes; /* on the device */
    size_t kernel_bytes;  /* of these, what the kernels share: it stays with the device */
    bool embed_mapped;    /* a device with memory of its own reads the embedding on the host */
    int32_t session_len, kv_blocks, block_tokens, max_seqs, max_rows, logit_rows;
    kv_format kv;
} model_plan;
/* E_LIMIT when not even one block of cache fits the budget. A budget under session_len * max_seqs
 * gives fewer blocks, and shortens the session when one sequence alone does not fit (a warning goes
 * to `j`). */
err_code model_plan_make(model_plan *p, device *d, weight_src *src, const model_opts *o,
                         const job *j, err *e);
/* The plan as lines through job_log at `level`. */
void model_plan_log(const model_plan *p, const job *j, log_level level);

/* d and src are borrowed until model_close. Logs the plan at LOG_DEBUG. */
err_code model_open(model **out, device *d, weight_src *src, const model_opts *o, const job *j,
                    err *e);
void model_close(model **m);
const model_desc *model_desc_of(const model *m);
const model_plan *model_plan_of(const model *m);
device *model_device(const model *m);

/* One sequence's part of a step: `tokens` follow what slot `slot` already holds. Of the last n_out
 * rows each of these that is not NULL is filled, on the host, in row order: */
typedef struct {
    int32_t slot;
    const int32_t *tokens;  /* [n_tokens], in [0, vocab) */
    int32_t n_tokens;       /* 1 or more */
    int32_t n_out;          /* 0..n_tokens; 0: nothing is computed behind the blocks */
    float *logits;          /* [n_out, vocab] */
    int32_t *argmax;        /* [n_out], ties to the lowest id */
    float *nll;             /* [n_out] -log p of targets[i] behind row i */
    const int32_t *targets; /* [n_out], needed by nll alone */
    /* With n_out 1 and options that model_samples takes, in place of logits: the id that `sampler`
     * draws behind the row, -1 without a finite logit. Its generator moves on, its history is the
     * caller's to tell (sampler_accept). */
    int32_t *picked; /* [1] */
    sampler *sampler;
    /* A guess: the next step of this slot will be the one id that comes out here (`picked`, else
     * `argmax`), and ask for the same. Devices that can begin it before this step returns then do,
     * which saves them a wait; whatever is asked instead is as right. */
    bool more;
} step_seq;
/* Runs n sequences of distinct slots, prefill and decode rows mixed. All or nothing: on failure
 * (E_LIMIT: a session or the cache is full; E_CANCELED by `j`; E_DEVICE) every slot holds what it
 * held. Results of a row depend neither on the other sequences nor on how a prompt is cut into
 * steps: to the bit on the CPU up to AVX-512 and on deterministic devices, on others within the
 * rounding of products and attention of few and of many rows. Allocates nothing. */
err_code model_step(model *m, const step_seq *seqs, int n, const job *j, err *e);

/* Whether steps draw ids where the logits are (`picked`), so that no logits come to the host. */
bool model_samples(const model *m, const sample_opts *o);

int32_t model_session_len(const model *m);
int32_t model_seq_len(const model *m, int32_t slot);         /* tokens held */
void model_truncate(model *m, int32_t slot, int32_t tokens); /* keeps the first `tokens` */
void model_seq_end(model *m, int32_t slot);
int32_t model_kv_free_tokens(const model *m); /* room left in free blocks */

/* For schedulers that let sequences share cached blocks. From model_lend on, the blocks of a slot
 * are those that model_seq_begin and model_seq_blocks set (blocks 0 .. kv_blocks - 1 of the plan),
 * and model_step needs them to be enough. Rows are written behind the tokens held only, so a block
 * that is full in one slot may stand in the tables of others. E_USAGE unless all slots are empty.
 */
err_code model_lend(model *m, err *e);
void model_lend_end(model *m); /* every slot is empty again */
/* The slot holds `held` tokens, which these blocks contain; rotary frequencies are those of a
 * prompt of prompt_tokens. */
void model_seq_begin(model *m, int32_t slot, int32_t held, int32_t prompt_tokens);
void model_seq_blocks(model *m, int32_t slot, const int32_t *blocks, int32_t n);
/* Equal tokens give equal keys and values in sequences of one variant (dynamic NTK scaling tells
 * long prompts apart). */
int32_t model_seq_variant(const model *m, int32_t prompt_tokens);

/* Bytes that one decoded token of one sequence must read with `context` tokens in the cache: every
 * bound weight once, one embedding row, K and V of the context. */
size_t model_token_bytes(const model *m, int32_t context);

#endif
