/* A small model in memory with seeded random weights, as a weight_src of kind SRC_MEM, and a plain
 * forward pass in doubles over the same numbers, which shares no code with the runtime. */
#ifndef TMF_TESTS_TINY_WEIGHTS_H
#define TMF_TESTS_TINY_WEIGHTS_H

#include "formats/weights.h"

typedef struct {
    model_desc desc; /* tiny_desc fills it */
    uint64_t seed;
    float deviation;  /* of the random weights; 0: 0.15 */
    int32_t w4_group; /* 0: dense; else linears of the blocks are rounded to 4 bits */
} tiny_opts;

/* 2 layers, hidden 64, 4 heads of 16 over 2 kv heads, ffn 96, vocabulary 50, context 256, f32,
 * split qkv. */
model_desc tiny_desc(void);
err_code tiny_open(weight_src **out, const tiny_opts *o, err *e);
/* The same weights with dense linears stored inputs first, as 16-bit workspaces have them. Owns
 * *base. */
err_code tiny_turned(weight_src **out, weight_src **base, err *e);

/* Called for the input of each linear: x [n, k]. NULL: none. */
typedef void (*tiny_tap)(void *ctx, tensor_role role, int32_t layer, const double *x, int64_t n,
                         int64_t k);
/* Logits [n, vocab] of ids [n] from position 0, keys and values rounded to f16 as the cache does.
 */
void tiny_forward(double *logits, weight_src *src, const int32_t *ids, int32_t n, tiny_tap tap,
                  void *ctx);

#endif
