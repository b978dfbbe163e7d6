/* A block while its linears are rounded one group after another: every window runs through it
 * twice, as it is and with what has been rounded so far, each with the states that its own
 * layers left. From both inputs of a linear come the moments that say what its rounded weights
 * should be, and how well they do on windows held out. */
#ifndef TMF_AWQ_CHAIN_H
#define TMF_AWQ_CHAIN_H

#include "awq/fold.h"
#include "runtime/layer_walk.h"

typedef struct chain chain;

/* Over a set of windows, x the input behind rounded layers, d the 16-bit input less x, r the 16-bit
 * residual stream less the one behind rounded layers:  h = sum x^T x, cross = sum d^T x,
 * resid = sum r^T x (o and down; else no data). f32 [k,k], [k,k], [hidden,k]. */
typedef struct {
    tensor h, cross, resid;
} chain_moments;

/* What it holds beside the second stream of states. */
size_t chain_bytes(const model_desc *m, int64_t pass_rows);
size_t chain_split_bytes(const device *d, const model_desc *m, int64_t rows);

/* Splits the walk's states in two: stream 0 is the 16-bit one, 1 the rounded one, which stays in
 * use. held_out u8 [windows]: 1 for windows kept apart. All borrowed until close. */
err_code chain_open(chain **out, device *d, layer_walk *w, const model_desc *m,
                    const tensor *held_out, kv_format cache, err *e);
void chain_close(chain **c);
bool chain_holds_out(const chain *c); /* some window is kept apart */

/* A new layer is bound: none of its linears is rounded. */
err_code chain_layer(chain *c, err *e);
/* The factors of the bound block, which its keys and values have in the cache; borrowed until
 * its last chain_put. */
err_code chain_fold(chain *c, const fold *f, err *e);
/* Of the input of linear r, over the windows that are trained on and those held out; valid until
 * the next call. E_INPUT when they are not finite. */
err_code chain_gather(chain *c, tensor_role r, const job *j, chain_moments *train,
                      chain_moments *held, err *e);
/* f32 [k,k] of the widest k, free until the next chain_gather. */
float *chain_scratch(chain *c);
/* Room for what linear r is pulled by (correct_pull). */
tensor chain_pulled(chain *c, tensor_role r);
/* Where the rounded weights of linear r go, f32 [n,k], as they act on the unscaled input; they
 * count from chain_put on, which may leave the factors of chain_fold in them. */
tensor chain_room(chain *c, tensor_role r);
void chain_put(chain *c, tensor_role r);
/* Both streams go through the block. */
err_code chain_advance(chain *c, const walk_progress *p, err *e);

#endif
