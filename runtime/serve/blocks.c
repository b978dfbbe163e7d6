/* Block accounting. A cached block sits in a hash chain; one that nobody holds sits in the list of
 * available ones, too: free blocks at its front, lowest first so that little memory is touched,
 * cached ones behind them in the order of their last use. */
#include "runtime/serve/blocks.h"

#include <assert.h>
#include <string.h>

#include "base/mem.h"

typedef struct {
    uint64_t hash; /* of a cached block: chained over all in front of it */
    blocks_root root;
    int32_t holders;
    int32_t parent;       /* of a cached block */
    int32_t children;     /* cached blocks behind this one */
    int32_t older, newer; /* neighbours in the list, for those without holders */
    int32_t next;         /* in the hash chain */
    bool cached;
} info;

struct blocks {
    int32_t count, block_tokens;
    int32_t n_available, n_cached; /* without holders; of them cached */
    int32_t oldest, newest;        /* ends of the list */
    uint64_t mask;                 /* buckets - 1 */
    int32_t *bucket;               /* [mask + 1] first of a chain */
    info *info;                    /* [count] */
    int32_t *tokens;               /* [count, block_tokens] of cached blocks */
};

/* ---- list of available blocks ---- */

static void list_append(blocks *b, int32_t i)
{
    b->info[i].older = b->newest;
    b->info[i].newer = BLOCKS_NONE;
    *(b->newest == BLOCKS_NONE ? &b->oldest : &b->info[b->newest].newer) = i;
    b->newest = i;
}

static void list_prepend(blocks *b, int32_t i)
{
    b->info[i].newer = b->oldest;
    b->info[i].older = BLOCKS_NONE;
    *(b->oldest == BLOCKS_NONE ? &b->newest : &b->info[b->oldest].older) = i;
    b->oldest = i;
}

static void list_remove(blocks *b, int32_t i)
{
    const int32_t older = b->info[i].older, newer = b->info[i].newer;
    *(older == BLOCKS_NONE ? &b->oldest : &b->info[older].newer) = newer;
    *(newer == BLOCKS_NONE ? &b->newest : &b->info[newer].older) = older;
}

/* ---- hash chains ---- */

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0x9e3779b97f4a7c15u;
    return h ^ h >> 32;
}

static uint64_t hash_of(const blocks *b, const blocks_root *root, int32_t parent,
                        const int32_t *tokens)
{
    uint64_t h = parent == BLOCKS_NONE
                     ? mix(mix(0x746d666f72676531u, root->salt), (uint32_t)root->variant)
                     : b->info[parent].hash;
    for (int32_t i = 0; i < b->block_tokens; i++) h = mix(h, (uint32_t)tokens[i]);
    return h;
}

static int32_t *tokens_of(const blocks *b, int32_t i)
{
    return b->tokens + (size_t)i * (size_t)b->block_tokens;
}

static int32_t lookup(const blocks *b, uint64_t hash, const blocks_root *root, int32_t parent,
                      const int32_t *tokens)
{
    const size_t bytes = (size_t)b->block_tokens * sizeof *tokens;
    for (int32_t i = b->bucket[hash & b->mask]; i != BLOCKS_NONE; i = b->info[i].next) {
        const info *f = &b->info[i];
        if (f->hash == hash && f->parent == parent && f->root.salt == root->salt &&
            f->root.variant == root->variant && memcmp(tokens_of(b, i), tokens, bytes) == 0)
            return i;
    }
    return BLOCKS_NONE;
}

static void chain_remove(blocks *b, int32_t i)
{
    int32_t *at = &b->bucket[b->info[i].hash & b->mask];
    while (*at != i) at = &b->info[*at].next;
    *at = b->info[i].next;
    if (b->info[i].parent != BLOCKS_NONE) b->info[b->info[i].parent].children--;
    b->info[i].cached = false;
}

/* ---- open ---- */

err_code blocks_open(blocks **out, int32_t count, int32_t block_tokens, err *e)
{
    void *p;
    err_code rc;
    size_t buckets = 16;
    *out = NULL;
    assert(count > 0 && block_tokens > 0);
    while (buckets < 2 * (size_t)count) buckets *= 2;
    TRY(mem_alloc(&p, 1, sizeof(blocks), "block accounts", e));
    blocks *b = p;
    b->count = count;
    b->block_tokens = block_tokens;
    b->mask = buckets - 1;
    if ((rc = mem_alloc(&p, buckets, sizeof(int32_t), "block accounts", e)) != OK) goto done;
    b->bucket = p;
    for (size_t i = 0; i < buckets; i++) b->bucket[i] = BLOCKS_NONE;
    if ((rc = mem_alloc(&p, (size_t)count, sizeof(info), "block accounts", e)) != OK) goto done;
    b->info = p;
    rc = mem_alloc(&p, (size_t)count, (size_t)block_tokens * sizeof(int32_t), "block accounts", e);
    if (rc != OK) goto done;
    b->tokens = p;
    b->oldest = b->newest = BLOCKS_NONE;
    for (int32_t i = 0; i < count; i++) list_append(b, i);
    b->n_available = count;
    *out = b;
    b = NULL;
done:
    blocks_close(&b);
    return rc;
}

void blocks_close(blocks **b)
{
    if (!b || !*b) return;
    mem_free((*b)->bucket);
    mem_free((*b)->info);
    mem_free((*b)->tokens);
    mem_free(*b);
    *b = NULL;
}

/* ---- holders ---- */

static void hold(blocks *b, int32_t i)
{
    if (b->info[i].holders++) return;
    list_remove(b, i);
    b->n_available--;
    b->n_cached -= b->info[i].cached;
}

int32_t blocks_take(blocks *b)
{
    const int32_t i = b->oldest;
    if (i == BLOCKS_NONE) return BLOCKS_NONE;
    hold(b, i);
    if (b->info[i].cached) {
        assert(b->info[i].children == 0);
        chain_remove(b, i);
    }
    return i;
}

void blocks_release(blocks *b, int32_t block)
{
    assert(block >= 0 && block < b->count && b->info[block].holders > 0);
    if (--b->info[block].holders) return;
    if (b->info[block].cached)
        list_append(b, block);
    else
        list_prepend(b, block);
    b->n_available++;
    b->n_cached += b->info[block].cached;
}

int32_t blocks_find(blocks *b, const blocks_root *root, int32_t parent, const int32_t *tokens)
{
    const int32_t i = lookup(b, hash_of(b, root, parent, tokens), root, parent, tokens);
    if (i != BLOCKS_NONE) hold(b, i);
    return i;
}

int32_t blocks_keep(blocks *b, int32_t block, const blocks_root *root, int32_t parent,
                    const int32_t *tokens)
{
    info *f = &b->info[block];
    const uint64_t hash = hash_of(b, root, parent, tokens);
    const int32_t twin = lookup(b, hash, root, parent, tokens);
    assert(f->holders == 1 && !f->cached);
    assert(parent == BLOCKS_NONE || (b->info[parent].cached && b->info[parent].holders > 0));
    if (twin != BLOCKS_NONE) {
        hold(b, twin);
        blocks_release(b, block);
        return twin;
    }
    memcpy(tokens_of(b, block), tokens, (size_t)b->block_tokens * sizeof *tokens);
    f->hash = hash;
    f->root = *root;
    f->parent = parent;
    f->children = 0;
    f->cached = true;
    f->next = b->bucket[hash & b->mask];
    b->bucket[hash & b->mask] = block;
    if (parent != BLOCKS_NONE) b->info[parent].children++;
    return block;
}

/* ---- questions ---- */

int32_t blocks_used(const blocks *b) { return b->count - b->n_available; }
int32_t blocks_available(const blocks *b) { return b->n_available; }
int32_t blocks_cached(const blocks *b) { return b->n_cached; }
int32_t blocks_holders(const blocks *b, int32_t block) { return b->info[block].holders; }
bool blocks_is_cached(const blocks *b, int32_t block) { return b->info[block].cached; }
int32_t blocks_parent(const blocks *b, int32_t block) { return b->info[block].parent; }
