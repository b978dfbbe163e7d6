/* What the files of the search on a device share. */
#ifndef TMF_AWQ_ON_DEVICE_INTERNAL_H
#define TMF_AWQ_ON_DEVICE_INTERNAL_H

#include "awq/on_device.h"
#include "kernels/search_ops.h"

#define DEV_TILE_ELEMS ((int64_t)1024 * 11008) /* of each tile; fixed, as sums depend on it */
#define DEV_CANDIDATES 64
#define DEV_TILES      5 /* three where a method carries no rounded inputs on */
#define DEV_WAYS       3 /* of rounding a linear, to choose from */

struct dev_scratch {
    device *d;
    dev_buf buf;
    dev_chain *chain;       /* borrowed; NULL: none, and the last tiles have no room */
    float *tile[DEV_TILES]; /* [elems] */
    float *col, *row;       /* [widest], [most rows]: factors of the linear at work */
    bf16 *half;             /* [widest,widest] H that candidates are compared by */
    float *factor;          /* [widest,widest] of H, where codes are fixed; half may lie there */
    float *square;          /* [widest,128] diagonal blocks of the calib file */
    double *sums;           /* [DEV_CANDIDATES, most rows], or [widest] */
    f16 *scale;             /* [most groups] of the linear at work */
    uint8_t *zero;
    f16 *ways_scale[DEV_WAYS]; /* [most groups] */
    uint8_t *ways_zero[DEV_WAYS];
    /* From here on where codes are fixed. */
    uint8_t *codes;                   /* [elems] of a tile */
    uint8_t *packed;                  /* [largest / 2] of the linear */
    float *work;                      /* [rows of the tallest tile,128] */
    int32_t *order, *back, *identity; /* [widest] of rounding, its reverse, none */
    int32_t *failed;
    double *host; /* [DEV_CANDIDATES, most rows] */
    int64_t elems, widest, narrowest, rows, groups, largest;
    int32_t g;
};

/* Device tensors. */
tensor dev_2d(const dev_scratch *s, void *data, dtype dt, int64_t n, int64_t k);
tensor dev_1d(const dev_scratch *s, void *data, dtype dt, int64_t n);
err_code dev_put(const dev_scratch *s, void *to, const void *from, size_t bytes, err *e);
/* Waits for the copy. */
err_code dev_get(const dev_scratch *s, void *to, const void *from, size_t bytes, err *e);
/* The bound weights of a linear. */
err_code dev_weights(const quant_block *b, tensor_role r, tensor *w, err *e);
int64_t dev_step(const dev_scratch *s, int64_t k); /* rows of a tile */
/* Factors of a linear on the device; without data where they are 1. */
typedef struct {
    tensor col, row;
} dev_factors;
err_code dev_factors_put(const dev_scratch *s, const fold_linear *f, int64_t n, int64_t k,
                         dev_factors *out, err *e);
static inline const tensor *dev_opt(const tensor *t) { return t->data ? t : NULL; }
/* Scale and zero of a linear: to the device, and back. */
err_code dev_params_put(const dev_scratch *s, const plan_linear *l, tensor *scale, tensor *zero,
                        err *e);
err_code dev_params_get(const dev_scratch *s, plan_linear *l, err *e);

#endif
