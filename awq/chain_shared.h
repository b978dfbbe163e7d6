/* What two streams through a block are, whoever computes them: the host (chain.h) or a device
 * (dev_chain.h). */
#ifndef TMF_AWQ_CHAIN_SHARED_H
#define TMF_AWQ_CHAIN_SHARED_H

#include "runtime/layer_walk.h"

typedef struct {
    const uint8_t *held_out; /* [n] 1: kept apart */
    int32_t n, per_pass;
    int64_t seqlen;
    bool holds_out; /* some are held out, some are not */
} chain_windows;
chain_windows chain_windows_of(layer_walk *w, const tensor *held_out);
int32_t chain_windows_at(const chain_windows *w, int32_t first); /* of the pass that begins there */

/* The bound block, none of its linears rounded; its buffers stay the walk's. E_UNSUPPORTED where q,
 * k and v are one matrix. */
err_code chain_variant(block *out, layer_walk *w, const model_desc *m, err *e);
bound_linear *chain_bound(block *b, tensor_role r);
bool chain_adds(tensor_role tap); /* ends in the residual stream */
err_code chain_seen(err *e);      /* ends a pass at its tap: nothing behind it is needed */

#endif
