/* Weights in tiles of rows, and the loss of an error matrix: what every method's search is made of.
 */
#ifndef TMF_AWQ_MEASURE_H
#define TMF_AWQ_MEASURE_H

#include "awq/fold.h"
#include "awq/method.h"

/* H of one input: the whole, or its diagonal blocks, or neither (errors count as they are). */
typedef struct {
    tensor full;   /* f32 [k,k] */
    tensor blocks; /* f32 [k/g,g,g] */
} second_moment;
/* The weights of linear `r` that a method goes by: its target's or the model's, [n,k]. */
err_code linear_weights(const quant_block *b, tensor_role r, tensor *w, err *e);
/* What losses are weighted by for linear `r` under b->o->loss; its target's H where it has one. */
err_code moment_of(const quant_block *b, tensor_role r, second_moment *h, err *e);

struct quant_scratch {
    float *w; /* [elems] a tile of weights */
    float *x; /* [batch], [widest input] where nothing is searched: candidates, errors */
    float *m0, *limit, *best; /* [groups]: per row and group; NULL where nothing is searched */
    f16 *scale;               /* [groups] */
    uint8_t *zero;            /* [groups] and at least [widest input] */
    double *row;              /* [batch_rows] */
    double *sum; /* [groups] where something is searched, and at least [widest input] */
    arena mem;
    int64_t elems, groups, widest, rows_max, batch, batch_rows;
    bool searches;
};
/* Sizes without memory: what tile_rows and quant_scratch_bytes look at. */
quant_scratch quant_scratch_shape(const model_desc *m, bool searches);
size_t quant_scratch_bytes(const quant_scratch *s);
err_code quant_scratch_init(quant_scratch *s, const model_desc *m, bool searches, err *e);
void quant_scratch_free(quant_scratch *s);
/* Rows of a tile of a linear with k inputs: fixed by k alone. */
int64_t tile_rows(const quant_scratch *s, int64_t k);
/* How many tiles of `rows` rows the scratch's x and row have room for: candidates whose losses are
 * taken together. */
int64_t quant_batch(const quant_scratch *s, int64_t rows, int64_t k);

/* sum over the rows of e [n,k] of e_i H e_i^T, in row order. */
err_code moment_loss(const quant_block *b, const tensor *err_rows, const second_moment *h,
                     double *loss, err *e);

/* Rows [from, from+n) of a linear under the plan, as they act on the unscaled input: x f32 [n,k].
 * Codes are taken where the method fixed them, else rounded from w [n,k], the weights with their
 * factors (another tensor than x; with fixed codes its shape alone counts). */
err_code plan_rows(const quant_block *b, const tensor *w, const plan_linear *l,
                   const fold_linear *f, int64_t from, tensor *x, err *e);
/* Loss of a linear in the terms of its own input: of the plan's scale and zero (l NULL: of plain
 * rounding). f: the factors the plan's weights carry, NULL none. */
err_code linear_loss(const quant_block *b, tensor_role r, const fold *f, const plan_linear *l,
                     double *loss, err *e);
/* Fills loss_before and loss_after of every linear of the plan. */
err_code block_losses(const quant_block *b, block_plan *p, err *e);

#endif
