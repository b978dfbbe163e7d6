/* A block on a device while its linears are rounded one input after another: as chain.h, with
 * everything but the states, which lie where the walk has them, on the device. o and down, which
 * end in the residual stream, have what their outputs lack in place of the square of what their
 * inputs lack: fewer bytes, and no product more. */
#ifndef TMF_AWQ_DEV_CHAIN_H
#define TMF_AWQ_DEV_CHAIN_H

#include "awq/fold.h"
#include "awq/method.h"
#include "kernels/search_ops.h"
#include "runtime/layer_walk.h"

/* Over a set of windows, x the input behind rounded layers, d the 16-bit input less x, r the 16-bit
 * residual stream less the one behind rounded layers: h = sum x^T x; lack = sum d^T x [k,k], of o
 * and down sum (d W^T + share r)^T x [n,k]. On the device, f32; h of windows held out bf16. */
typedef struct {
    tensor h, lack;
} dev_moments;

size_t dev_chain_bytes(const device *d, const model_desc *m, int64_t pass_rows);
err_code dev_chain_open(dev_chain **out, device *d, layer_walk *w, const model_desc *m,
                        const tensor *held_out, kv_format cache, err *e);
void dev_chain_close(dev_chain **c);
/* What the moments of a layer may use until the first dev_chain_gather; dev_chain_square is not in
 * it. */
dev_buf dev_chain_room(const dev_chain *c);

/* What passes alone use: free while a linear is rounded. */
dev_buf dev_chain_pass_room(const dev_chain *c);

/* A new layer is bound. */
err_code dev_chain_layer(dev_chain *c, err *e);
/* As chain_fold; borrowed until the layer's last dev_chain_gather. */
void dev_chain_fold(dev_chain *c, const fold *f);
/* Of the input of linear r, over the windows trained on and those held out; valid until the next
 * call. share: of r. */
err_code dev_chain_gather(dev_chain *c, tensor_role r, float share, const job *j,
                          dev_moments *train, dev_moments *held, err *e);
float *dev_chain_square(dev_chain *c); /* f32 [k,k], free between gathers */
/* From here on linear r is what `spec` makes of it, in f16, as it acts on the unscaled input. With
 * a coarser cache q, k and v keep spec->row, their factors there, in weights and biases, and o
 * keeps spec->col, those of v. Once a layer. */
err_code dev_chain_put(dev_chain *c, tensor_role r, const rounded_spec *spec, err *e);
/* All linears are put and none was gathered for: as dev_chain_advance, in the same two halves as
 * behind gathers. */
err_code dev_chain_replay(dev_chain *c, const walk_progress *p, err *e);
/* Both streams go through the block. */
err_code dev_chain_advance(dev_chain *c, const walk_progress *p, err *e);

#endif
