/* A model in other bases, which computes the same: the residual stream turned as a whole, with the
 * norms' gains moved into what reads them; by head the pairs of q and k that RoPE turns, and v with
 * o's columns. It is a weight source over another one, so that whoever reads weights need not know.
 */
#ifndef TMF_AWQ_ROTATE_H
#define TMF_AWQ_ROTATE_H

#include "formats/plan_file.h"
#include "formats/weights.h"
#include "kernels/device.h"

typedef struct rotated rotated;

/* base and d (whose pool does the work) are borrowed until close. residual f32 [hidden,hidden],
 * orthogonal, copied; no data: the stream stays as it is. Where it is turned, the head is no longer
 * the embedding. E_INPUT when it is not orthogonal. */
err_code rotated_open(rotated **out, weight_src *base, device *d, const tensor *residual, err *e);
/* With the plan's own rotation of the stream. */
err_code rotated_by_plan(rotated **out, weight_src *base, device *d, const plan_file *p, err *e);
/* The model's source; views of what is turned are f32, and last until the same tensor of another
 * layer is asked for, or rotated_layer is called. Gone with rotated_close. */
weight_src *rotated_src(rotated *r);
void rotated_close(rotated **r);
size_t rotated_bytes(const model_desc *m, bool residual);

/* turn_k and turn_v of `p` hold for this layer from here on; other layers have none. E_INPUT when a
 * matrix of turn_v cannot be inverted. */
err_code rotated_layer(rotated *r, int32_t layer, const block_plan *p, err *e);

/* Random signs by splitmix64, then cosines (DCT-II): f32 [n,n], orthogonal, every entry small. */
void rotate_random(float *q, int64_t n, uint64_t seed);

#endif
