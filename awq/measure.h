/* Weights in tiles of rows, and the loss of an error matrix: what every method's search is made of. */
#ifndef TMF_AWQ_MEASURE_H
#define TMF_AWQ_MEASURE_H

#include "awq/fold.h"
#include "awq/method.h"

/* H of one input: the whole, or its diagonal blocks, or neither (errors count as they are). */
typedef struct {
    tensor full;   /* f32 [k,k] */
    tensor blocks; /* f32 [k/g,g,g] */
} second_moment;
/* What losses are weighted by for linear `r` under b->o->loss. */
err_code moment_of(const quant_block *b, tensor_role r, second_moment *h, err *e);

struct quant_scratch {
    float *w, *x;             /* two tiles of `elems` */
    float *m0, *limit, *best; /* [elems/32]: per row and group */
    f16 *scale;               /* [elems/32] */
    uint8_t *zero;            /* [elems/32] */
    double *row;              /* [rows_max] */
    double *sum;              /* [elems/32] */
    arena mem;
    int64_t elems, rows_max;
};
size_t quant_scratch_bytes(const model_desc *m);
quant_scratch quant_scratch_shape(const model_desc *m); /* sizes without memory */
err_code quant_scratch_init(quant_scratch *s, const model_desc *m, err *e);
void quant_scratch_free(quant_scratch *s);
/* Rows of a tile of a linear with k inputs: fixed by k alone. */
int64_t tile_rows(const quant_scratch *s, int64_t k);

/* sum over the rows of e [n,k] of e_i H e_i^T, in row order. */
err_code moment_loss(const quant_block *b, const tensor *err_rows, const second_moment *h,
                     double *loss, err *e);

/* Loss of a linear in the terms of its own input: of the plan's scale and zero (l NULL: of plain rounding). f:
 * the factors the plan's weights carry, NULL none. */
err_code linear_loss(const quant_block *b, tensor_role r, const fold *f, const plan_linear *l,
                     double *loss, err *e);
/* Fills loss_before and loss_after of every linear of the plan. */
err_code block_losses(const quant_block *b, block_plan *p, err *e);

#endif
