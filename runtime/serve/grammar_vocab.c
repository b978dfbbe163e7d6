/* The vocabulary as a trie in preorder: a walk skips what cannot come by one jump. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_internal.h"

typedef struct {
    const char *p;
    size_t n;
    int32_t id;
} piece;

static int by_bytes(const void *a, const void *b)
{
    const piece *x = a, *y = b;
    const size_t n = x->n < y->n ? x->n : y->n;
    const int c = memcmp(x->p, y->p, n);
    if (c) return c;
    if (x->n != y->n) return x->n < y->n ? -1 : 1;
    return x->id < y->id ? -1 : x->id > y->id;
}

static int32_t gather(grammar_vocab *v, piece *out, size_t *bytes)
{
    int32_t n = 0;
    *bytes = 0;
    for (int32_t id = 0; id < v->n_tokens; id++) {
        piece p = {.id = id};
        if (tokenizer_is_special(v->t, id)) continue;
        p.p = tokenizer_piece(v->t, id, &p.n);
        if (!p.n || p.n > GRAMMAR_LONGEST) continue;
        if (p.n == 1) v->byte[(uint8_t)p.p[0]] = true;
        *bytes += p.n;
        out[n++] = p;
    }
    qsort(out, (size_t)n, sizeof *out, by_bytes);
    return n;
}

static void link_nodes(grammar_vocab *v, const piece *p, int32_t n)
{
    uint32_t open[GRAMMAR_LONGEST + 1]; /* nodes on the way to the last piece */
    size_t depth = 0;
    for (int32_t i = 0; i < n; i++) {
        size_t same = 0;
        while (i && same < depth && same < p[i].n && p[i].p[same] == p[i - 1].p[same]) same++;
        while (depth > same) v->node[open[--depth]].end = v->n_nodes;
        while (depth < p[i].n) {
            open[depth] = v->n_nodes;
            v->node[v->n_nodes++] = (grammar_node){0, -1, (uint8_t)p[i].p[depth],
                                                   (uint8_t)(depth + 1)};
            depth++;
        }
        grammar_node *last = &v->node[open[depth - 1]];
        v->same[p[i].id] = last->token;
        last->token = p[i].id;
    }
    while (depth) v->node[open[--depth]].end = v->n_nodes;
}

err_code grammar_vocab_open(grammar_vocab **out, const tokenizer *t, err *e)
{
    piece *p = NULL;
    size_t bytes;
    *out = NULL;
    grammar_vocab *v;
    TRY(mem_alloc((void **)&v, 1, sizeof *v, "vocabulary", e));
    atomic_init(&v->refs, 1);
    v->t = t;
    v->n_tokens = tokenizer_vocab(t);
    const size_t n_ids = (size_t)v->n_tokens;
    err_code rc = mem_alloc((void **)&p, n_ids + 1, sizeof *p, "vocabulary", e);
    if (rc == OK) rc = mem_alloc((void **)&v->same, n_ids + 1, sizeof *v->same, "vocabulary", e);
    if (rc == OK) {
        const int32_t n = gather(v, p, &bytes);
        rc = mem_alloc((void **)&v->node, bytes + 1, sizeof *v->node, "vocabulary", e);
        if (rc == OK) link_nodes(v, p, n);
    }
    mem_free(p);
    if (rc != OK) {
        grammar_vocab_drop(v);
        return rc;
    }
    *out = v;
    return OK;
}

void grammar_vocab_drop(grammar_vocab *v)
{
    if (!v || atomic_fetch_sub(&v->refs, 1) != 1) return;
    mem_free(v->node);
    mem_free(v->same);
    mem_free(v);
}
