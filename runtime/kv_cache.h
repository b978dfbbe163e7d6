/* Paged KV cache of all layers: blocks of block_tokens tokens, handed out per sequence. Pure
 * accounting on the host, memory on the device. */
#ifndef TMF_RUNTIME_KV_CACHE_H
#define TMF_RUNTIME_KV_CACHE_H

#include "formats/model.h"
#include "kernels/ops.h"

typedef struct kv_cache kv_cache;
typedef struct {
    kv_format format;
    int32_t layers, kv_heads, head_dim;
    int32_t block_tokens; /* 64 */
    int32_t blocks;       /* how many in all */
    int32_t max_seqs;     /* sequence slots 0..max_seqs-1 */
    int32_t max_seq_tokens;
} kv_opts;
size_t kv_bytes(const kv_opts *o); /* cost before allocation */
err_code kv_open(kv_cache **out, device *d, const kv_opts *o, err *e);
void kv_close(kv_cache **c);
/* Room for `tokens` in all in slot `seq`: all or nothing, E_LIMIT when the cache or the session is
 * full. */
err_code kv_reserve(kv_cache *c, int32_t seq, int32_t tokens, err *e);
void kv_truncate(kv_cache *c, int32_t seq, int32_t tokens); /* frees whole blocks beyond */
void kv_seq_end(kv_cache *c, int32_t seq);
int32_t kv_free_blocks(const kv_cache *c);
const kv_opts *kv_opts_of(const kv_cache *c);
const int32_t *kv_block_list(const kv_cache *c, int32_t seq, int32_t *n); /* logical -> physical */
/* From here on the caller says which blocks a slot has: several slots may share one, whose tokens
 * are then not written any more. kv_reserve hands nothing out and succeeds within the blocks set;
 * truncating and ending leave the table alone. E_USAGE unless all slots are empty. */
err_code kv_lend(kv_cache *c, err *e);
/* Every slot is empty and every block free again. */
void kv_lend_end(kv_cache *c);
/* n blocks, at most those of a session. Lent caches only. */
void kv_set_blocks(kv_cache *c, int32_t seq, const int32_t *blocks, int32_t n);
kv_layer kv_layer_view(const kv_cache *c, int32_t layer);

#endif
