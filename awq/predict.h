/* What rounding costs in perplexity, before anything is packed: the losses of held-out windows
 * behind the last layer, with the states of both streams of a chain. */
#ifndef TMF_AWQ_PREDICT_H
#define TMF_AWQ_PREDICT_H

#include "base/job.h"
#include "formats/weights.h"
#include "runtime/layer_walk.h"

typedef struct {
    int32_t windows;   /* 0: none is held out, and nothing is known */
    double nll16, nll; /* mean losses with 16-bit and with rounded weights */
} prediction;

/* w: split, and both streams through the last layer. tokens i32, held_out u8 as in the calib
 * file. */
err_code predict_losses(prediction *out, device *d, weight_src *src, layer_walk *w,
                        const tensor *tokens, const tensor *held_out, const job *j, err *e);
size_t predict_bytes(const model_desc *m);

#endif
