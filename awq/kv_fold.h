/* Factors of K and V channels that make a 4-bit KV cache lose least, at no cost when the model
 * runs: K's fold into q, pair by pair as RoPE turns them, V's into o. */
#ifndef TMF_AWQ_KV_FOLD_H
#define TMF_AWQ_KV_FOLD_H

#include "awq/measure.h"

/* Enters the folds of k (none where a norm stands on it) and v into the plan: per head rms^a of
 * the channels (of the pairs of k), with the a in 0, 1/4 .. 1 whose 4-bit values of sampled
 * tokens are nearest: k's as q sees them, v's as o does. v's are left out where they save
 * little. One pass over the windows of b->walk. E_UNSUPPORTED without it. */
err_code kv_fold_factors(const quant_block *b, block_plan *out, err *e);
size_t kv_fold_bytes(const model_desc *m);

#endif
