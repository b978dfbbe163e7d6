/* The merge loop of byte pair encoding: symbols in a linked list, candidate pairs in a binary
 * heap. Entries are not removed when a neighbour changes; a popped entry counts only if its pair
 * still gives the same token (even if another merge of that result is meant now: the tokenizers
 * library does so too). */
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

/* ---- merge table ---- */

static uint64_t pair_key(int32_t left, int32_t right)
{
    return ((uint64_t)(uint32_t)left << 32 | (uint32_t)right) + 1;
}

static uint32_t pair_hash(uint64_t key)
{
    key ^= key >> 29;
    key *= 0xbf58476d1ce4e5b9u;
    return (uint32_t)(key >> 32);
}

static bpe_merge *merge_slot(const bpe_merges *m, uint64_t key)
{
    uint32_t i = pair_hash(key) & (m->slots - 1);
    while (m->slot[i].pair && m->slot[i].pair != key) i = (i + 1) & (m->slots - 1);
    return &m->slot[i];
}

err_code bpe_merges_reserve(bpe_merges *m, uint32_t n, err *e)
{
    bpe_merges to = {NULL, 64, m->used};
    if (n > (1u << 27))
        return err_set(e, E_LIMIT, "merges: expected at most %u, got %u", 1u << 27, n);
    while (to.slots < n * 2) to.slots *= 2;
    if (to.slots <= m->slots) return OK;
    TRY(mem_alloc((void **)&to.slot, to.slots, sizeof *to.slot, "merges", e));
    for (uint32_t i = 0; i < m->slots; i++)
        if (m->slot[i].pair) *merge_slot(&to, m->slot[i].pair) = m->slot[i];
    mem_free(m->slot);
    *m = to;
    return OK;
}

err_code bpe_merges_put(bpe_merges *m, int32_t left, int32_t right, int32_t rank, int32_t id,
                        err *e)
{
    TRY(bpe_merges_reserve(m, m->used + 1, e));
    bpe_merge *s = merge_slot(m, pair_key(left, right));
    if (!s->pair) m->used++;
    *s = (bpe_merge){pair_key(left, right), rank,
                     id}; /* a pair named twice: the later line rules */
    return OK;
}

void bpe_merges_free(bpe_merges *m)
{
    mem_free(m->slot);
    *m = (bpe_merges){0};
}

bool bpe_pair_of_merges(const void *merges, const bpe_symbol *a, const bpe_symbol *b, int32_t *rank,
                        int32_t *id)
{
    const bpe_merges *m = merges;
    if (!m->slots) return false;
    const bpe_merge *s = merge_slot(m, pair_key(a->id, b->id));
    *rank = s->rank;
    *id = s->id;
    return s->pair != 0;
}

/* ---- heap: lowest rank on top, then the leftmost place ---- */

static bool entry_before(const bpe_entry *a, const bpe_entry *b)
{
    return a->rank != b->rank ? a->rank < b->rank : a->pos < b->pos;
}

static void heap_up(bpe_entry *h, int32_t i)
{
    const bpe_entry x = h[i];
    while (i > 0 && entry_before(&x, &h[(i - 1) / 2])) {
        h[i] = h[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    h[i] = x;
}

static bpe_entry heap_pop(bpe_work *w)
{
    bpe_entry *h = w->heap;
    const bpe_entry top = h[0], x = h[--w->heap_n];
    int32_t i = 0;
    for (;;) {
        int32_t c = 2 * i + 1;
        if (c >= w->heap_n) break;
        if (c + 1 < w->heap_n && entry_before(&h[c + 1], &h[c])) c++;
        if (!entry_before(&h[c], &x)) break;
        h[i] = h[c];
        i = c;
    }
    if (w->heap_n) h[i] = x;
    return top;
}

static void pair_offer(bpe_work *w, int32_t pos, bpe_pair_fn pair, const void *ctx)
{
    int32_t rank, id;
    if (pos < 0 || w->sym[pos].next < 0) return;
    if (!pair(ctx, &w->sym[pos], &w->sym[w->sym[pos].next], &rank, &id)) return;
    w->heap[w->heap_n] = (bpe_entry){rank, pos, id};
    heap_up(w->heap, w->heap_n++);
}

/* ---- a word ---- */

err_code bpe_push(bpe_work *w, int32_t id, size_t at, size_t len, err *e)
{
    if (w->n == w->cap) {
        if (w->cap > INT32_MAX / 4)
            return err_set(e, E_LIMIT, "text: more than %d characters in one word", w->cap);
        const int32_t cap = w->cap ? w->cap * 2 : 256;
        bpe_symbol *s;
        TRY(mem_alloc((void **)&s, (size_t)cap, sizeof *s, "tokenizer symbols", e));
        if (w->n) memcpy(s, w->sym, (size_t)w->n * sizeof *s);
        mem_free(w->sym);
        w->sym = s;
        w->cap = cap;
    }
    w->sym[w->n] = (bpe_symbol){id, w->n - 1, w->n + 1, (uint32_t)at, (uint32_t)len};
    w->n++;
    return OK;
}

void bpe_work_free(bpe_work *w)
{
    mem_free(w->sym);
    mem_free(w->heap);
    *w = (bpe_work){0};
}

/* n-1 pairs at the start, at most two new ones for each of at most n-1 merges. */
static err_code heap_room(bpe_work *w, err *e)
{
    if (w->heap_cap >= 3 * w->n) return OK;
    mem_free(w->heap);
    w->heap = NULL;
    w->heap_cap = 0;
    TRY(mem_alloc((void **)&w->heap, (size_t)w->cap, 3 * sizeof *w->heap, "tokenizer pairs", e));
    w->heap_cap = 3 * w->cap;
    return OK;
}

static void merge_all(bpe_work *w, bpe_pair_fn pair, const void *ctx)
{
    bpe_symbol *s = w->sym;
    for (int32_t i = 0; i + 1 < w->n; i++) pair_offer(w, i, pair, ctx);
    while (w->heap_n) {
        const bpe_entry top = heap_pop(w);
        bpe_symbol *a = &s[top.pos];
        int32_t rank, id;
        if (a->id < 0 || a->next < 0) continue; /* gone, or now the last */
        bpe_symbol *b = &s[a->next];
        if (!pair(ctx, a, b, &rank, &id) || id != top.id) continue;
        a->id = id;
        a->len += b->len;
        b->id = -1;
        a->next = b->next;
        if (a->next >= 0) s[a->next].prev = top.pos;
        pair_offer(w, a->prev, pair, ctx);
        pair_offer(w, top.pos, pair, ctx);
    }
}

err_code bpe_run(bpe_work *w, bpe_pair_fn pair, const void *ctx, token_list *out, err *e)
{
    if (w->n == 0) return OK;
    TRY(heap_room(w, e));
    w->sym[w->n - 1].next = -1;
    w->heap_n = 0;
    merge_all(w, pair, ctx);
    err_code rc = OK;
    for (int32_t i = 0; i >= 0 && rc == OK; i = w->sym[i].next)
        rc = token_list_push(out, w->sym[i].id, e);
    w->n = 0;
    return rc;
}
