/* Who holds which block of a paged cache: reference counts, full blocks found again by what is in
 * them, and which of these make room first. Accounting alone: no device, no memory of the cache. A
 * block is free, or held by one sequence or more, or cached: full, findable, held by none or some.
 * A cached block without holders counts as available; the least recently used one goes first.
 *
 * What is cached forms trees: a block is known by its tokens and by the block in front of it, up to
 * the root that its salt and variant name. Holders of a block hold those in front of it as well,
 * and sequences let go from their end, so a block always leaves before the one in front of it.
 *
 * One thread. Nothing here allocates but blocks_open. */
#ifndef TMF_RUNTIME_SERVE_BLOCKS_H
#define TMF_RUNTIME_SERVE_BLOCKS_H

#include <stdbool.h>
#include <stdint.h>

#include "base/err.h"

#define BLOCKS_NONE (-1)

typedef struct blocks blocks;
typedef struct {
    uint64_t salt;   /* only sequences of one salt share */
    int32_t variant; /* of the computation: equal tokens of other variants have other contents */
} blocks_root;

err_code blocks_open(blocks **out, int32_t count, int32_t block_tokens, err *e);
void blocks_close(blocks **b);

/* An empty block with one holder, thrown out of the cache if need be; BLOCKS_NONE when every block
 * is held. */
int32_t blocks_take(blocks *b);
/* One holder less. A block without holders stays findable when it is cached, else it is free. */
void blocks_release(blocks *b, int32_t block);
/* The cached block of these tokens [block_tokens] behind `parent` (BLOCKS_NONE: at the root) with
 * one more holder, or BLOCKS_NONE. Tokens are compared, not only their hash. */
int32_t blocks_find(blocks *b, const blocks_root *root, int32_t parent, const int32_t *tokens);
/* `block`, held by the caller, is full of these tokens behind `parent`, which is cached and held by
 * the caller, too: makes it findable. Returns the block to go on with: where the same content is
 * cached already that one, now held in place of `block`. */
int32_t blocks_keep(blocks *b, int32_t block, const blocks_root *root, int32_t parent,
                    const int32_t *tokens);

int32_t blocks_used(const blocks *b);      /* with a holder */
int32_t blocks_available(const blocks *b); /* the others */
int32_t blocks_cached(const blocks *b);    /* of the others: findable */
int32_t blocks_holders(const blocks *b, int32_t block);
bool blocks_is_cached(const blocks *b, int32_t block);
int32_t blocks_parent(const blocks *b, int32_t block); /* of a cached one */

#endif
