/* The inside of a model, for the files model*.c alone. */
#ifndef TMF_RUNTIME_MODEL_INTERNAL_H
#define TMF_RUNTIME_MODEL_INTERNAL_H

#include "runtime/block.h"
#include "runtime/model.h"

/* Integers that a pass needs on the device. Host arrays; `dev` mirrors them at equal offsets where
 * the device has memory of its own. */
typedef struct {
    int32_t *ids, *pos;  /* [max_rows] */
    int32_t *start;      /* [max_seqs+1] */
    int32_t *kv_len;     /* [max_seqs] */
    int32_t *pick;       /* [logit_rows] rows of the pass whose logits are wanted */
    int32_t *target;     /* [logit_rows] */
    int32_t *tail_pos;   /* [logit_rows] positions of the picked rows */
    int32_t *tail_start; /* [max_seqs+1] */
    int32_t *table;      /* [max_seqs, seq_blocks] */
    int32_t *base;       /* all of them, one block */
    size_t count;
    dev_buf dev;
} model_stage;

/* Draws on the device; all of it empty where the device does not sample. */
typedef struct {
    sample_row *rows;  /* [logit_rows] of the head's rows */
    sample_bias *bias; /* [logit_rows, SAMPLE_MAX_BIAS] */
    int32_t *ids;      /* [logit_rows] what came of them */
    dev_buf rows_dev, bias_dev, ids_dev;
    dev_buf counts; /* [max_seqs, 2, vocab] */
} model_draws;

/* The work of a decode pass, on devices that can record. */
#define MODEL_RECORDINGS 32
typedef struct {
    int32_t n, max_kv; /* sequences; attention is laid out for contexts up to max_kv */
    bool score;        /* with losses and best ids */
    bool draw;         /* with draws */
    uint64_t used;     /* recording_clock at its last use, 0: empty */
    dev_graph *work;
} model_recording;

/* A decode pass on its way whose results nobody asked for yet (model_decode.c). */
typedef struct {
    int32_t slot;   /* -1: nobody will */
    int32_t id;     /* its token */
    int32_t target; /* of its loss */
    bool score, draws, taken;
    sample_row draw;
} model_ahead_row;

typedef struct {
    int32_t n;             /* rows on their way, 0: none */
    model_ahead_row *rows; /* [n] */
    step_seq *split;       /* [max_seqs] of a step, those first whose rows are on their way */
    int32_t *map;          /* [max_seqs] and which */
    /* Host memory that the device reads and writes. Of the pass that follows: */
    sample_row *draws;
    int32_t *from_best, *from_draw; /* the row of this pass whose id it takes, or -1 */
    int32_t *pos, *kv_len, *target, *start, *table;
    /* results of this one */
    int32_t *best, *drawn;
    float *nll;
} model_ahead;

struct model {
    device *d;
    weight_src *src;
    const model_desc *m;
    model_plan plan;
    block *blocks;                  /* [layers] */
    tensor embed, final_norm, head; /* [vocab,hidden], [hidden], [vocab,hidden] */
    dev_buf embed_buf, norm_buf, head_buf;
    block_scratch *scratch;
    kv_cache *cache;
    int32_t seq_blocks; /* columns of the block table */

    int32_t *len;      /* [max_seqs] tokens held */
    int32_t *rope_len; /* [max_seqs] tokens of the step that began the sequence (dynamic NTK) */
    bool *busy;        /* [max_seqs] taking part in the current step */
    bool lent;         /* the cache's blocks are handed out by the caller */

    model_stage stage;
    dev_buf x_buf, pick_buf, logits_buf, nll_buf, best_buf;
    float *logits_host; /* [logit_rows, vocab]; NULL where the device's memory is the host's */
    float *nll_host;    /* [logit_rows] likewise */
    int32_t *best_host;

    model_draws draws;
    model_recording recordings[MODEL_RECORDINGS];
    uint64_t recording_clock;
    model_ahead ahead;

    rope_spec rope;
    float *inv_freq; /* [rope_dims/2] host */
    dev_buf inv_freq_buf;
    int32_t rope_tokens; /* what inv_freq was made for */
};

/* model_sample.c */
size_t model_draws_bytes(const device *d, const model_desc *m, const model_plan *p);
err_code model_draws_open(model *m, err *e);
void model_draws_close(model *m);
/* Row i of the head is of s. */
err_code model_draw_fill(model *m, int32_t i, const step_seq *s, err *e);
err_code model_draw_send(model *m, int32_t n, err *e);
err_code model_draw_run(model *m, int32_t n, tensor *logits, err *e);
err_code model_draw_fetch(model *m, int32_t n, err *e);

err_code model_rope_set(model *m, int32_t n_tokens, err *e);

/* model_step.c */
/* One pass: rows of sequences first..first+n-1; the first begins at token `off`. */
typedef struct {
    int first, n;
    int32_t off, rows;
    int32_t max_q, max_kv;
    int32_t tail;   /* rows that go through all of the last block; -1: every one */
    int32_t tail_q; /* most of them of one sequence */
} model_pass;
/* What somebody wants of the rows of a head. */
typedef struct {
    bool logits, nll, best, draw;
} model_needs;
model_needs model_needs_of(model_needs had, const step_seq *s);
/* Rows of a pass through the blocks; `there`: the device has its tables already. */
err_code model_blocks_run(model *m, const model_pass *p, bool there, const job *j, err *e);
/* Head over n rows: the first ones of `from`, else (NULL) those of x_buf that stage.pick names.
 * Logits, then losses and best ids, and draws, which change the logits of their rows, as asked
 * for. */
err_code model_head_run(model *m, int32_t n, const dev_buf *from, model_needs want, bool there,
                        tensor *logits, err *e);
/* What a head over all rows of a decode pass left, to the host. */
err_code model_head_finish(model *m, const step_seq *seqs, const model_pass *p, model_needs want,
                           err *e);

/* model_decode.c */
err_code model_ahead_open(model *m, err *e);
void model_ahead_close(model *m);
/* Whether a pass is one token and one output of each sequence, on a device that records. */
bool model_decodes(const model *m, const step_seq *seqs, const model_pass *p);
/* With `more`, for a pass that is a whole step, what follows may be queued behind it. */
err_code model_decode_run(model *m, const step_seq *seqs, const model_pass *p, bool more,
                          const job *j, err *e);
/* How many of a step's sequences ask for rows that are on their way: they come first in what *seqs
 * is then. Other rows on their way are dropped. */
int model_ahead_take(model *m, const step_seq **seqs, int n);
/* Results of n sequences, all taken. more: they are the whole step. */
err_code model_ahead_finish(model *m, const step_seq *seqs, int n, bool more, const job *j, err *e);
/* Nobody will ask for what is on its way, or for what of it is of a slot, whose cache is the
 * caller's to truncate. */
void model_ahead_drop(model *m);
void model_ahead_forget(model *m, int32_t slot);

#endif
