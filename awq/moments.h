/* H = sum x x^T of every input of the bound block, f32 [k,k], over the windows of a layer walk. All
 * taps are gathered in one forward pass where they fit a budget; else one at a time, when asked
 * for. */
#ifndef TMF_AWQ_MOMENTS_H
#define TMF_AWQ_MOMENTS_H

#include "kernels/ops.h"
#include "runtime/layer_walk.h"

typedef struct moment_source moment_source;

/* Bytes that the four H of a block take: all, or the largest when `all` is false. */
size_t moments_bytes(const model_desc *m, bool all);
/* Everything at once when moments_bytes(m, true) <= budget. lent: device memory to use, of the
 * largest H at least, whose owner takes it back for each layer when no H is asked for any more;
 * NULL: its own. */
err_code moments_open(moment_source **out, device *d, layer_walk *w, const model_desc *m,
                      size_t budget, const dev_buf *lent, err *e);
void moments_close(moment_source **s);

/* A new layer is bound. Where all fit, they are gathered now; `advance` lets this pass replace the
 * states (then *advanced is true and the caller needs no further pass). */
err_code moments_layer(moment_source *s, int32_t layer, bool advance, bool *advanced,
                       const walk_progress *p, err *e);
/* H of the input of linear r (q, k, v: qkv; up: gate), both triangles; valid until the next call.
 * E_INPUT naming layer and tap when it is not finite. */
err_code moments_get(moment_source *s, tensor_role r, tensor *h, err *e);

/* d[i * step], i < k: the diagonal of an H, where a NaN in any activation of a channel shows.
 * E_INPUT "layer 3: tap o: channel 5: ..". */
err_code moments_finite(const float *d, int64_t step, int64_t k, int32_t layer, tensor_role tap,
                        err *e);

#endif
