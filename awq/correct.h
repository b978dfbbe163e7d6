/* Weights corrected for the error of their inputs: the least-squares answer, with the rounded
 * inputs, to what the 16-bit linear gives with its own, and how far rounded weights are from it. */
#ifndef TMF_AWQ_CORRECT_H
#define TMF_AWQ_CORRECT_H

#include "awq/chain.h"
#include "awq/measure.h"

typedef struct {
    double
        ridge; /* added to H, as a share of its mean diagonal; raised where that does not factor */
    double resid; /* share of the residual stream's error that o and down take upon themselves */
} correct_opts;

/* Bytes that these take beside the chain, with its widest input k. */
size_t correct_bytes(int64_t k);
/* The Cholesky factor of H + ridge into factor f32 [k,k], for correct_weights. */
err_code correct_factor(const quant_block *b, tensor_role r, const chain_moments *m, float *factor,
                        const correct_opts *o, err *e);
/* w f32 [n,k] = W + (W cross + o->resid * resid) (H + ridge)^-1, of the model's W. */
err_code correct_weights(const quant_block *b, tensor_role r, const chain_moments *m,
                         const float *factor, const correct_opts *o, tensor *w, err *e);

#define CORRECT_ROWS 1024 /* at most so many rows at a time */
/* y f32 [n,k] = W cross + o->resid * resid over the windows of m. */
err_code correct_pull(const quant_block *b, tensor_role r, const chain_moments *m,
                      const correct_opts *o, tensor *y, err *e);
/* The squared error of rounded weights over the windows of m, less what no weights
 * change: tr(E H E^T) - 2 tr(E Y^T), E = rounded - W, y: of correct_pull. `rounded` gives rows of
 * the weights as they act on the unscaled input. */
typedef err_code (*rounded_rows)(void *ctx, int64_t from, int64_t n, tensor *x, err *e);
err_code correct_loss(const quant_block *b, tensor_role r, const chain_moments *m, const tensor *y,
                      rounded_rows rounded, void *ctx, double *loss, err *e);
/* tr(D H D^T), D = rounded - w, over the windows trained on: how far from the corrected weights
 * w. */
err_code correct_distance(const quant_block *b, tensor_role r, const tensor *w, const tensor *h,
                          rounded_rows rounded, void *ctx, double *loss, err *e);

#endif
