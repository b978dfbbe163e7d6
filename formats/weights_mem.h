/* A weight source built in memory: for tests and for anything that makes weights rather than reads
 * them. */
#ifndef TMF_FORMATS_WEIGHTS_MEM_H
#define TMF_FORMATS_WEIGHTS_MEM_H

#include "formats/weights.h"

typedef struct weights_mem weights_mem;

/* m->family must be known (names in messages come from it). m is copied. */
err_code weights_mem_open(weights_mem **out, const model_desc *m, err *e);
/* Embedding, norms, head (layer -1 for those of the model). Data is copied; a second call replaces.
 * E_SHAPE when the shape is not the description's. */
err_code weights_mem_tensor(weights_mem *w, tensor_role r, int32_t layer, const tensor *t, err *e);
/* A linear of a block, dense or W4 in an on-disk layout; the bias goes along. */
err_code weights_mem_linear(weights_mem *w, tensor_role r, int32_t layer, const linear_view *v,
                            err *e);
/* Fills what is still missing: matrices and biases normal with `deviation`, norms 1 + normal, all
 * rounded to m->dt. Each tensor has its own stream: the values depend on seed, role and layer
 * alone. */
err_code weights_mem_random(weights_mem *w, uint64_t seed, float deviation, err *e);
/* Dense linears as W4 codes, plain round to nearest in groups of `group`; sets the description's
 * w4_group. */
err_code weights_mem_quantize(weights_mem *w, int32_t group, err *e);
/* Everything there? Then a source that owns w (*w is nulled); E_INPUT naming what is missing. */
err_code weights_mem_source(weight_src **out, weights_mem **w, err *e);
void weights_mem_close(weights_mem **w); /* NULL accepted */

#endif
