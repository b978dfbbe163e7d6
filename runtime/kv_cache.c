/* Paged KV cache. Blocks are handed out from a stack filled so that the lowest come first: a short
 * conversation touches few pages of the (lazily backed) memory. */
#include "runtime/kv_cache.h"

#include <assert.h>
#include <string.h>

#include "base/mem.h"

/* Bounds of what a caller may ask for; products of them stay far inside 64 bits. */
#define KV_MAX_LAYERS       1024
#define KV_MAX_HEADS        1024
#define KV_MAX_HEAD_DIM     4096
#define KV_MAX_BLOCK_TOKENS 4096
#define KV_MAX_BLOCKS       (1 << 24)
#define KV_MAX_SEQS         (1 << 16)
#define KV_MAX_SEQ_TOKENS   (1 << 28)

struct kv_cache {
    kv_opts o;
    int32_t seq_blocks; /* most blocks of one sequence */
    dev_buf *data;      /* [layers] */
    dev_buf *param;     /* [layers], empty for KV_16 */
    int32_t *table;     /* [max_seqs, seq_blocks] */
    int32_t *used;      /* [max_seqs] blocks held */
    int32_t *spare;     /* [blocks] stack of free blocks */
    int32_t n_spare;
    bool lent; /* blocks are accounted for elsewhere: none is spare */
};

static int32_t blocks_for(int32_t tokens, int32_t block_tokens)
{
    return tokens / block_tokens + (tokens % block_tokens != 0);
}

size_t kv_bytes(const kv_opts *o)
{
    return (size_t)o->layers *
           (kv_layer_data_bytes(o->format, o->blocks, o->block_tokens, o->kv_heads, o->head_dim) +
            kv_layer_param_bytes(o->format, o->blocks, o->block_tokens, o->kv_heads));
}

static err_code opts_check(const kv_opts *o, err *e)
{
    const struct {
        const char *name;
        int32_t value, most;
    } f[] = {{"layers", o->layers, KV_MAX_LAYERS},
             {"kv_heads", o->kv_heads, KV_MAX_HEADS},
             {"head_dim", o->head_dim, KV_MAX_HEAD_DIM},
             {"block_tokens", o->block_tokens, KV_MAX_BLOCK_TOKENS},
             {"blocks", o->blocks, KV_MAX_BLOCKS},
             {"max_seqs", o->max_seqs, KV_MAX_SEQS},
             {"max_seq_tokens", o->max_seq_tokens, KV_MAX_SEQ_TOKENS}};
    for (size_t i = 0; i < sizeof f / sizeof *f; i++) {
        if (f[i].value < 1 || f[i].value > f[i].most)
            return err_set(e, E_LIMIT, "kv cache: %s: expected 1 to %d, got %d", f[i].name,
                           f[i].most, f[i].value);
    }
    if (o->format != KV_16 && o->format != KV_8 && o->format != KV_4)
        return err_set(e, E_UNSUPPORTED, "kv cache: format: expected 0, 8 or 4, got %d",
                       (int)o->format);
    if (o->format == KV_4 && o->head_dim % 2)
        return err_set(e, E_UNSUPPORTED, "kv cache: int4 needs an even head dimension, got %d",
                       o->head_dim);
    return OK;
}

static err_code alloc_i32(int32_t **out, size_t n, err *e)
{
    void *p;
    TRY(mem_alloc(&p, n, sizeof(int32_t), "kv cache tables", e));
    *out = p;
    return OK;
}

static err_code alloc_layers(kv_cache *c, device *d, err *e)
{
    const kv_opts *o = &c->o;
    const size_t data = kv_layer_data_bytes(o->format, o->blocks, o->block_tokens, o->kv_heads,
                                            o->head_dim);
    const size_t param = kv_layer_param_bytes(o->format, o->blocks, o->block_tokens, o->kv_heads);
    void *p;
    TRY(mem_alloc(&p, (size_t)o->layers, sizeof(dev_buf), "kv cache layers", e));
    c->data = p;
    TRY(mem_alloc(&p, (size_t)o->layers, sizeof(dev_buf), "kv cache layers", e));
    c->param = p;
    for (int32_t l = 0; l < o->layers; l++) {
        TRY(dev_alloc(&c->data[l], d, data, "kv cache", e));
        if (param) TRY(dev_alloc(&c->param[l], d, param, "kv cache scales", e));
    }
    return OK;
}

err_code kv_open(kv_cache **out, device *d, const kv_opts *o, err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    TRY(opts_check(o, e));
    TRY(mem_alloc(&p, 1, sizeof(kv_cache), "kv cache", e));
    kv_cache *c = p;
    c->o = *o;
    c->seq_blocks = blocks_for(o->max_seq_tokens, o->block_tokens);
    if (c->seq_blocks > o->blocks) c->seq_blocks = o->blocks;
    if ((rc = alloc_i32(&c->table, (size_t)o->max_seqs * (size_t)c->seq_blocks, e)) != OK)
        goto done;
    if ((rc = alloc_i32(&c->used, (size_t)o->max_seqs, e)) != OK) goto done;
    if ((rc = alloc_i32(&c->spare, (size_t)o->blocks, e)) != OK) goto done;
    if ((rc = alloc_layers(c, d, e)) != OK) goto done;
    kv_lend_end(c);
    *out = c;
    c = NULL;
done:
    kv_close(&c);
    return rc;
}

void kv_close(kv_cache **c)
{
    if (!c || !*c) return;
    kv_cache *k = *c;
    for (int32_t l = 0; l < k->o.layers; l++) {
        if (k->data) dev_free(&k->data[l]);
        if (k->param) dev_free(&k->param[l]);
    }
    mem_free(k->data);
    mem_free(k->param);
    mem_free(k->table);
    mem_free(k->used);
    mem_free(k->spare);
    mem_free(k);
    *c = NULL;
}

err_code kv_reserve(kv_cache *c, int32_t seq, int32_t tokens, err *e)
{
    if (seq < 0 || seq >= c->o.max_seqs)
        return err_set(e, E_LIMIT, "kv cache: sequence slot: expected 0 to %d, got %d",
                       c->o.max_seqs - 1, seq);
    if (tokens < 0 || tokens > c->o.max_seq_tokens)
        return err_set(e, E_LIMIT, "kv cache: sequence %d needs %d tokens, the session holds %d",
                       seq, tokens, c->o.max_seq_tokens);
    const int32_t want = blocks_for(tokens, c->o.block_tokens), more = want - c->used[seq];
    if (more <= 0) return OK;
    if (want > c->seq_blocks || more > c->n_spare)
        return err_set(e, E_LIMIT,
                       "kv cache: sequence %d needs %d more blocks of %d tokens, %d of %d are free",
                       seq, more, c->o.block_tokens, c->n_spare, c->o.blocks);
    int32_t *row = c->table + (size_t)seq * (size_t)c->seq_blocks;
    while (c->used[seq] < want) row[c->used[seq]++] = c->spare[--c->n_spare];
    return OK;
}

void kv_truncate(kv_cache *c, int32_t seq, int32_t tokens)
{
    if (seq < 0 || seq >= c->o.max_seqs || c->lent) return;
    const int32_t keep = blocks_for(tokens < 0 ? 0 : tokens, c->o.block_tokens);
    const int32_t *row = c->table + (size_t)seq * (size_t)c->seq_blocks;
    while (c->used[seq] > keep) c->spare[c->n_spare++] = row[--c->used[seq]];
}

err_code kv_lend(kv_cache *c, err *e)
{
    if (c->n_spare != c->o.blocks)
        return err_set(e, E_USAGE, "kv cache: %d of %d blocks are in use", c->o.blocks - c->n_spare,
                       c->o.blocks);
    c->lent = true;
    c->n_spare = 0;
    return OK;
}

void kv_lend_end(kv_cache *c)
{
    c->lent = false;
    memset(c->used, 0, (size_t)c->o.max_seqs * sizeof *c->used);
    c->n_spare = c->o.blocks;
    for (int32_t i = 0; i < c->o.blocks; i++) c->spare[i] = c->o.blocks - 1 - i;
}

void kv_set_blocks(kv_cache *c, int32_t seq, const int32_t *blocks, int32_t n)
{
    assert(c->lent && seq >= 0 && seq < c->o.max_seqs && n >= 0 && n <= c->seq_blocks);
    memcpy(c->table + (size_t)seq * (size_t)c->seq_blocks, blocks, (size_t)n * sizeof *blocks);
    c->used[seq] = n;
}

void kv_seq_end(kv_cache *c, int32_t seq) { kv_truncate(c, seq, 0); }

int32_t kv_free_blocks(const kv_cache *c) { return c->n_spare; }

const kv_opts *kv_opts_of(const kv_cache *c) { return &c->o; }

const int32_t *kv_block_list(const kv_cache *c, int32_t seq, int32_t *n)
{
    if (seq < 0 || seq >= c->o.max_seqs) {
        *n = 0;
        return NULL;
    }
    *n = c->used[seq];
    return c->table + (size_t)seq * (size_t)c->seq_blocks;
}

kv_layer kv_layer_view(const kv_cache *c, int32_t layer)
{
    return (kv_layer){.data = c->data[layer].data,
                      .param = c->param[layer].data,
                      .format = c->o.format,
                      .blocks = c->o.blocks,
                      .block_tokens = c->o.block_tokens,
                      .kv_heads = c->o.kv_heads,
                      .head_dim = c->o.head_dim,
                      .mem = c->data[layer].mem};
}
