/* Bases of keys and values in which the rule of a 4-bit cache, one range for the channels of a
 * token and head, loses least. Plain mathematics over matrices in host memory. */
#ifndef TMF_AWQ_KV_TURN_H
#define TMF_AWQ_KV_TURN_H

#include <stdbool.h>
#include <stdint.h>

#include "formats/model.h"

/* Angles by which the pairs of k (and q) turn so that those whose mean over x [n,hd], keys as the
 * cache has them, stands out point the same way in both dims: what all channels have in common
 * costs an asymmetric range nothing. */
void kv_turn_angles(const model_desc *m, const float *x, int64_t n, float *angle);
/* x [n,hd] turned by them, in place. */
void kv_turn_pairs(const model_desc *m, float *x, int64_t n, const float *angle);

/* M [hd,hd] for v -> v M and its inverse. c [hd,hd]: sum v v^T; g [hd,hd]: what errors of v count
 * by. Of all M, up to turns, (c, g) becomes (D, D) with the same diagonal D: there the product of
 * the channels' spread and of what their errors cost is least. A DCT then makes all channels alike,
 * with the largest of D on what they have in common. work: kv_turn_work(hd) doubles. false: c or g
 * are not such sums. */
bool kv_turn_matrix(const float *c, const float *g, int64_t hd, float *m, float *inverse,
                    double *work);
int64_t kv_turn_work(int64_t hd);

#endif
