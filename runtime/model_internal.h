/* The inside of a model, for model.c and model_step.c alone. */
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

#endif
