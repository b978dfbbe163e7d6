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
    double kl;         /* mean KL divergence from 16-bit to rounded, nats a token; 0: not asked */
} prediction;

/* w: split, and both streams through the last layer. tokens i32, held_out u8 as in the calib
 * file. kl [windows held out * (seqlen - 1)]: the divergence at every token; NULL: not asked. */
err_code predict_losses(prediction *out, float *kl, device *d, weight_src *src, layer_walk *w,
                        const tensor *tokens, const tensor *held_out, const job *j, err *e);
size_t predict_bytes(const model_desc *m, bool kl);
/* Mean of a - b over n > 1 tokens, and its standard error. */
double predict_gain(const float *a, const float *b, int64_t n, double *error);

#endif
