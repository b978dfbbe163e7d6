/* A layer that an earlier run has rounded, on a device: its plan instead of a search. */
#ifndef TMF_AWQ_DEV_REPLAY_H
#define TMF_AWQ_DEV_REPLAY_H

#include "awq/on_device.h"
#include "runtime/layer_walk.h"

/* The bound block's rounded weights from codes, scales and zeros of `p`, as dev_best_block left
 * them, and both streams through the block to the same bits. The chain that b->dev was opened with
 * is at a new layer (dev_chain_layer). */
err_code dev_replay_block(const quant_block *b, const block_plan *p, const walk_progress *progress,
                          err *e);

#endif
