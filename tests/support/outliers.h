/* Models whose channels differ by powers of two, as those of large models do by chance, and which
 * compute the same as without: for what folds and bases are good for. */
#ifndef TMF_TESTS_OUTLIERS_H
#define TMF_TESTS_OUTLIERS_H

#include "formats/weights.h"

/* A multi-head Llama of the same function as `base` (grouped-query, any form of q, k and v, no norm
 * on q and k): each head has a KV head of its own. With `outliers` about one in 16 channels of v,
 * of the pairs of k, and of what the norms and up give is 16 to 64 times larger, and what reads it
 * as much smaller. Ends the test on failure. base stays the caller's. */
weight_src *outlier_model(weight_src *base, bool outliers, uint64_t seed);

#endif
