/* Factors of K and V channels that make a 4-bit KV cache lose least, at no cost when the model
 * runs: K's fold into q, pair by pair as RoPE turns them, V's into o. */
#ifndef TMF_AWQ_KV_FOLD_H
#define TMF_AWQ_KV_FOLD_H

#include "awq/measure.h"

/* Enters the folds of k (none where a norm stands on it) and v into the plan: per head rms^a of
 * the channels (of the pairs of k), with the a in 0, 1/4 .. 1 whose 4-bit values of sampled
 * tokens are nearest: k's as q sees them, v's as o does. v's are left out where they save
 * little. b->walk's stream in use; its mathematics on b->host. */
err_code kv_fold_factors(const quant_block *b, block_plan *out, err *e);
size_t kv_fold_bytes(const device *d, const model_desc *m);
/* ---- what the search on a device shares (dev_fold.h) ---- */
#define KV_FOLD_SAMPLES 2048 /* tokens */
#define KV_FOLD_POINTS  5    /* candidates of a head */
/* rms [head_dim] of a head's channels as factors are made of it: pairs: those of k that RoPE turns
 * together have one. */
void kv_fold_rms(const model_desc *m, double *rms, bool pairs);
/* Candidate `point` of a head: s [hd]. The first is 1. */
void kv_fold_candidate(const double *rms, int64_t hd, int point, float *s);
/* Whether v's factors are worth what they take from o. */
bool kv_fold_pays(double plain, double folded);
int64_t kv_fold_stride(int64_t rows); /* one row in so many is a sample */
/* q, k and v of every stride-th row as the bound block makes them, act [n,cols] on b->d, not yet
 * turned to their positions. rows [n,hidden] of layer_walk_kept's type, x act [n,hidden]: room. */
err_code kv_fold_samples(const quant_block *b, int64_t stride, tensor *rows, tensor *x,
                         const tensor *qkv, err *e);

/* Of b->mem, with quant_opts.turn: what kv_fold_factors and kv_fold_stats add to a plan. */
size_t kv_turn_bytes(const model_desc *m);

/* With quant_opts.turn kv_fold_factors also turns the pairs of k, and v with all of its channels,
 * where that saves the cache more: plan.turn_k, turn_v. Its other entries, and everything
 * behind, are then about weights in these bases (awq/rotate.h). *stats: what the layer's inputs are
 * in them, from those in the model's own; parts of it come from b->mem. */
err_code kv_fold_stats(const quant_block *b, const block_plan *p, calib_block *stats, err *e);

#endif
