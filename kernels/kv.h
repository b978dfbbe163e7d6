/* Where a token of a head lies in the paged cache, and its scale and zero. The only place that
 * knows. */
#ifndef TMF_KERNELS_KV_H
#define TMF_KERNELS_KV_H

#include "base/half.h"
#include "kernels/ops.h"

enum { KV_K = 0, KV_V = 1 };

static inline size_t kv_token_bytes(const kv_layer *kv)
{
    return (size_t)kv->head_dim * (kv->format == KV_16 ? 16 : (size_t)kv->format) / 8;
}
/* Index of slot 0 of (block, head, K or V), counted in tokens. */
static inline size_t kv_region(const kv_layer *kv, int32_t block, int32_t head, int part)
{
    return (((size_t)block * (size_t)kv->kv_heads + (size_t)head) * 2 + (size_t)part) *
           (size_t)kv->block_tokens;
}
/* [block_tokens, token bytes] */
static inline uint8_t *kv_data(const kv_layer *kv, int32_t block, int32_t head, int part)
{
    return (uint8_t *)kv->data + kv_region(kv, block, head, part) * kv_token_bytes(kv);
}
/* f16 [block_tokens, {scale, zero}] */
static inline f16 *kv_param(const kv_layer *kv, int32_t block, int32_t head, int part)
{
    return (f16 *)kv->param + kv_region(kv, block, head, part) * 2;
}
/* Blocks of sequence s. */
static inline const int32_t *kv_blocks(const batch_rows *r, int32_t s)
{
    return (const int32_t *)r->block_table.data + s * r->block_table.stride[0];
}
static inline const int32_t *kv_i32(const tensor *t) { return t->data; }

#endif
