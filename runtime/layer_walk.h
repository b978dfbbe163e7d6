/* A model layer by layer: one block bound at a time, the hidden states of all windows in host
 * memory, passes of a few windows through the block. What calibration and search share. */
#ifndef TMF_RUNTIME_LAYER_WALK_H
#define TMF_RUNTIME_LAYER_WALK_H

#include "base/job.h"
#include "runtime/block.h"

typedef struct layer_walk layer_walk;

/* Host and device memory that opening takes, the states of all windows included. */
size_t layer_walk_bytes(const device *d, const model_desc *m, weight_src *src, int32_t windows,
                        int32_t seqlen);

/* tokens i32 [windows,seqlen]; every window is a sequence of its own from position 0. The states
 * start as the embeddings. d and src are borrowed until close. */
err_code layer_walk_open(layer_walk **out, device *d, weight_src *src, const tensor *tokens,
                         err *e);
void layer_walk_close(layer_walk **w);

/* The states are the embeddings again. */
err_code layer_walk_restart(layer_walk *w, const tensor *tokens, err *e);

/* A second stream of states over the same windows, equal to the first as it is now; from here on
 * everything below speaks of the stream in use (0 at first). It takes as much memory as the first
 * (layer_walk_bytes knows of one). */
err_code layer_walk_split(layer_walk *w, err *e);
void layer_walk_use(layer_walk *w, int stream);
/* Keys and values of the second stream go through a cache of this format. Once, before any pass;
 * KV_16 needs none. */
size_t layer_walk_cache_bytes(const model_desc *m, int32_t windows, int32_t seqlen,
                              kv_format format); /* KV_16: none */
err_code layer_walk_cache(layer_walk *w, kv_format format, err *e);

/* [windows*seqlen, hidden] on the host, of dev_resid's type on the CPU, else f16: the stream
 * in use. */
tensor layer_walk_states(layer_walk *w);
/* Rows 0, stride, 2 stride .. of them to `to`, device memory [n, hidden] of the same type. */
err_code layer_walk_pick(layer_walk *w, int64_t stride, tensor *to, err *e);
dtype layer_walk_kept(const layer_walk *w); /* of the states */
/* All streams, one behind the other: to save and to restore. Two that lie apart, as on other
 * devices than the CPU, cannot be saved. */
bool layer_walk_saves(const layer_walk *w);
tensor layer_walk_saved(layer_walk *w);
/* While a tap of layer_walk_pass runs: the residual stream [rows, hidden] as it is there. */
tensor layer_walk_residual(const layer_walk *w, int64_t rows);
/* ---- a pass step by step, for callers that lay passes of both streams side by side ---- */
/* *x resid [n*seqlen, hidden], in scratch: the states of `n` windows from `first`. */
err_code layer_walk_load(layer_walk *w, int stream, int32_t first, int32_t n, tensor *x, err *e);
/* Starts to fetch what the next load will ask for; nothing with n 0. */
err_code layer_walk_prefetch(layer_walk *w, int stream, int32_t first, int32_t n, err *e);
/* x through `b`, in place; E_CANCELED where the tap says so. */
err_code layer_walk_forward(layer_walk *w, const block *b, tensor *x, tap_fn tap, void *tap_ctx,
                            err *e);
/* As layer_walk_forward, from behind the attention on. */
err_code layer_walk_feed_forward(layer_walk *w, const block *b, tensor *x, tap_fn tap,
                                 void *tap_ctx, err *e);
err_code layer_walk_store(layer_walk *w, int stream, int32_t first, const tensor *x, err *e);
/* What was stored has arrived and all ops are done. */
err_code layer_walk_settle(layer_walk *w, err *e);

int64_t layer_walk_pass_rows(int32_t windows, int32_t seqlen); /* at most, over so many */
int32_t layer_walk_windows(const layer_walk *w);
int32_t layer_walk_windows_per_pass(const layer_walk *w);

/* Binds a layer, after weights_check_layer. Unbinds what was bound before. */
err_code layer_walk_bind(layer_walk *w, int32_t layer, err *e);
const block *layer_walk_block(const layer_walk *w);

/* Progress of a run within the whole job: base..base+windows*each of total. */
typedef struct {
    const job *j;
    const char *stage; /* NULL: none is told */
    int64_t base, total;
    double each; /* 0: 1 */
} walk_progress;

/* All windows through the bound block, in order; the states become its output unless `keep`. */
err_code layer_walk_run(layer_walk *w, bool keep, tap_fn tap, void *tap_ctx, const walk_progress *p,
                        err *e);
/* One pass by itself: the states of `n` windows from `first` go through `b` (the bound block or a
 * variant of it) into scratch; the states stay. *y: the block's output, valid until the next pass.
 * NULL when not wanted. A tap that returns E_CANCELED ends the pass early: layer_walk_pass then
 * returns OK and *y is unset. */
err_code layer_walk_pass(layer_walk *w, const block *b, int32_t first, int32_t n, tap_fn tap,
                         void *tap_ctx, tensor *y, err *e);

#endif
