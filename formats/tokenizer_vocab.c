/* Tables of a tokenizer: growable bytes, pieces by id and by string, added tokens and their
 * trie. */
#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

/* ---- growable bytes ---- */

err_code tok_buf_reserve(tok_buf *b, size_t more, err *e)
{
    size_t need;
    TRY(mem_add(&need, b->n, more, "text", e));
    TRY(mem_add(&need, need, 1, "text", e));
    if (need <= b->cap) return OK;
    size_t cap = b->cap ? b->cap : 64;
    while (cap < need) TRY(mem_mul(&cap, cap, 2, "text", e));
    void *p;
    TRY(mem_alloc(&p, cap, 1, "text", e));
    if (b->n) memcpy(p, b->p, b->n);
    mem_free(b->p);
    b->p = p;
    b->cap = cap;
    return OK;
}

err_code tok_buf_add(tok_buf *b, const char *s, size_t n, err *e)
{
    TRY(tok_buf_reserve(b, n, e));
    if (n) memcpy(b->p + b->n, s, n);
    b->n += n;
    b->p[b->n] = '\0';
    return OK;
}

void tok_buf_free(tok_buf *b)
{
    mem_free(b->p);
    *b = (tok_buf){0};
}

/* Room for one more element behind `n` of an array of `*cap`; doubles. */
static err_code table_grow(void **p, int32_t n, int32_t *cap, size_t size, err *e)
{
    if (n < *cap) return OK;
    const int32_t to = *cap ? *cap * 2 : 16;
    void *q;
    TRY(mem_alloc(&q, (size_t)to, size, "tokenizer table", e));
    if (n) memcpy(q, *p, (size_t)n * size);
    mem_free(*p);
    *p = q;
    *cap = to;
    return OK;
}

/* ---- UTF-8 ---- */

size_t utf8_len(const char *s, size_t n)
{
    const uint8_t *u = (const uint8_t *)s;
    if (n == 0) return 0;
    if (u[0] < 0x80) return 1;
    if (u[0] < 0xc2 || u[0] > 0xf4) return 0;
    const size_t len = u[0] < 0xe0 ? 2 : u[0] < 0xf0 ? 3 : 4;
    if (n < len) return 0;
    for (size_t i = 1; i < len; i++)
        if ((u[i] & 0xc0) != 0x80) return 0;
    if (u[0] == 0xe0 && u[1] < 0xa0) return 0; /* overlong */
    if (u[0] == 0xed && u[1] > 0x9f) return 0; /* surrogate */
    if (u[0] == 0xf0 && u[1] < 0x90) return 0;
    if (u[0] == 0xf4 && u[1] > 0x8f) return 0; /* beyond U+10FFFF */
    return len;
}

uint32_t utf8_code(const char *s, size_t len)
{
    const uint8_t *u = (const uint8_t *)s;
    if (len == 1) return u[0];
    uint32_t c = u[0] & (0xffu >> (len + 1));
    for (size_t i = 1; i < len; i++) c = c << 6 | (u[i] & 0x3fu);
    return c;
}

size_t utf8_put(char *out, uint32_t c)
{
    if (c < 0x80) {
        out[0] = (char)c;
        return 1;
    }
    const size_t len = c < 0x800 ? 2 : c < 0x10000 ? 3 : 4;
    for (size_t i = len - 1; i > 0; i--, c >>= 6) out[i] = (char)(0x80 | (c & 0x3f));
    out[0] = (char)((0xf00u >> len & 0xff) | c);
    return len;
}

bool tok_is_white(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xa0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f ||
           c == 0x205f || c == 0x3000;
}

/* ---- piece table ---- */

static uint32_t bytes_hash(const char *s, size_t n)
{
    uint64_t h = 0xcbf29ce484222325u; /* FNV-1a, then mixed: the low bits index the table */
    for (size_t i = 0; i < n; i++) h = (h ^ (uint8_t)s[i]) * 0x100000001b3u;
    h ^= h >> 32;
    h *= 0x9e3779b97f4a7c15u;
    return (uint32_t)(h >> 32);
}

/* A slot holds id + 1, or, for a further string of an id, its index in alias[] above this bit. */
#define SLOT_ALIAS 0x80000000u

static bool slot_is(const vocab *v, uint32_t slot, const char *s, size_t n, int32_t *id)
{
    if (slot & SLOT_ALIAS) {
        const struct vocab_name *a = &v->alias[slot & ~SLOT_ALIAS];
        *id = a->id;
        return a->len == n && memcmp(v->blob.p + a->at, s, n) == 0;
    }
    *id = (int32_t)(slot - 1);
    const vocab_piece *p = &v->piece[*id];
    return p->raw_len == n && memcmp(v->blob.p + p->raw, s, n) == 0;
}

int32_t vocab_find(const vocab *v, const char *raw, size_t n)
{
    if (!v->slots) return -1;
    int32_t id;
    for (uint32_t i = bytes_hash(raw, n) & (v->slots - 1); v->slot[i]; i = (i + 1) & (v->slots - 1))
        if (slot_is(v, v->slot[i], raw, n, &id)) return id;
    return -1;
}

static void slot_put(uint32_t *slot, uint32_t slots, uint32_t hash, uint32_t value)
{
    uint32_t i = hash & (slots - 1);
    while (slot[i]) i = (i + 1) & (slots - 1);
    slot[i] = value;
}

static err_code vocab_rehash(vocab *v, uint32_t want, err *e)
{
    uint32_t slots = v->slots ? v->slots : 64;
    while (slots < want * 2) slots *= 2;
    if (slots == v->slots) return OK;
    uint32_t *slot;
    TRY(mem_alloc((void **)&slot, slots, sizeof *slot, "tokenizer pieces", e));
    for (uint32_t i = 0; i < v->slots; i++) {
        if (!v->slot[i]) continue;
        const bool alias = v->slot[i] & SLOT_ALIAS;
        const struct vocab_name *a = alias ? &v->alias[v->slot[i] & ~SLOT_ALIAS] : NULL;
        const vocab_piece *p = alias ? NULL : &v->piece[v->slot[i] - 1];
        slot_put(slot, slots,
                 alias ? bytes_hash(v->blob.p + a->at, a->len)
                       : bytes_hash(v->blob.p + p->raw, p->raw_len),
                 v->slot[i]);
    }
    mem_free(v->slot);
    v->slot = slot;
    v->slots = slots;
    return OK;
}

err_code vocab_reserve(vocab *v, int32_t n, err *e)
{
    if (n > TOK_MAX_VOCAB)
        return err_set(e, E_LIMIT, "token id %d: expected less than %d", n - 1, TOK_MAX_VOCAB);
    if (n > v->cap) {
        int32_t cap = v->cap ? v->cap : 1024;
        while (cap < n) cap *= 2;
        vocab_piece *p;
        TRY(mem_alloc((void **)&p, (size_t)cap, sizeof *p, "tokenizer pieces", e));
        if (v->n) memcpy(p, v->piece, (size_t)v->n * sizeof *p);
        mem_free(v->piece);
        v->piece = p;
        v->cap = cap;
    }
    return OK;
}

/* The string of an id becomes an alias: found by name still, but no longer what the id is shown
 * as. */
static err_code vocab_demote(vocab *v, int32_t id, err *e)
{
    const vocab_piece *p = &v->piece[id];
    TRY(table_grow((void **)&v->alias, v->n_alias, &v->cap_alias, sizeof *v->alias, e));
    uint32_t i = bytes_hash(v->blob.p + p->raw, p->raw_len) & (v->slots - 1);
    while (v->slot[i] != (uint32_t)id + 1) i = (i + 1) & (v->slots - 1);
    v->alias[v->n_alias] = (struct vocab_name){p->raw, p->raw_len, id};
    v->slot[i] = SLOT_ALIAS | (uint32_t)v->n_alias++;
    return OK;
}

err_code vocab_add(vocab *v, int32_t id, const char *raw, size_t n, const char *text, size_t text_n,
                   uint8_t flags, err *e)
{
    if (id < 0 || id >= TOK_MAX_VOCAB)
        return err_set(e, E_LIMIT, "token '%.40s': expected an id in [0,%d), got %d", raw,
                       TOK_MAX_VOCAB, id);
    if (n > TOK_MAX_PIECE)
        return err_set(e, E_LIMIT, "token %d: expected at most %d bytes, got %zu", id,
                       TOK_MAX_PIECE, n);
    const int32_t there = vocab_find(v, raw, n);
    if (there >= 0 && there != id)
        return err_set(e, E_INPUT, "token '%.40s': two ids, %d and %d", raw, there, id);
    TRY(vocab_reserve(v, id + 1, e));
    TRY(vocab_rehash(v, v->used + 1, e));
    vocab_piece p = {v->blob.n, v->blob.n, (uint32_t)n, (uint32_t)n, flags | PIECE_SET};
    if (there == id) { /* the same string again, or one of its aliases: keeps its name */
        v->piece[id].flags |= flags;
        return OK;
    }
    if (v->piece[id].flags & PIECE_SET) TRY(vocab_demote(v, id, e));
    TRY(tok_buf_add(&v->blob, raw, n, e));
    TRY(tok_buf_add(&v->blob, "", 1, e)); /* the NUL that callers of tokenizer_string count on */
    if (text && (text_n != n || memcmp(text, raw, n) != 0)) {
        p.text = v->blob.n;
        p.text_len = (uint32_t)text_n;
        TRY(tok_buf_add(&v->blob, text, text_n, e));
    }
    v->piece[id] = p;
    if (id >= v->n) v->n = id + 1;
    slot_put(v->slot, v->slots, bytes_hash(raw, n), (uint32_t)id + 1);
    v->used++;
    return OK;
}

void vocab_free(vocab *v)
{
    tok_buf_free(&v->blob);
    mem_free(v->piece);
    mem_free(v->slot);
    mem_free(v->alias);
    *v = (vocab){0};
}

/* ---- trie ---- */

static uint32_t edge_hash(uint64_t key)
{
    key *= 0x9e3779b97f4a7c15u;
    return (uint32_t)(key >> 32);
}

static uint32_t trie_step(const added_trie *t, uint32_t node, uint8_t byte)
{
    const uint64_t key = ((uint64_t)node << 8 | byte) + 1;
    for (uint32_t i = edge_hash(key) & (t->slots - 1); t->edge[i]; i = (i + 1) & (t->slots - 1))
        if (t->edge[i] == key) return t->to[i];
    return 0; /* the root is nobody's child */
}

static err_code trie_room(added_trie *t, err *e)
{
    if (t->nodes + 1 >= t->cap_nodes) {
        int32_t *leaf;
        const uint32_t cap = t->cap_nodes ? t->cap_nodes * 2 : 64;
        TRY(mem_alloc((void **)&leaf, cap, sizeof *leaf, "added tokens", e));
        if (t->leaf) memcpy(leaf, t->leaf, t->nodes * sizeof *leaf);
        mem_free(t->leaf);
        t->leaf = leaf;
        t->cap_nodes = cap;
        if (!t->nodes) t->leaf[t->nodes++] = -1;
    }
    if (t->slots && (t->edges + 1) * 2 <= t->slots) return OK;
    const uint32_t slots = t->slots ? t->slots * 2 : 128;
    uint64_t *edge = NULL;
    uint32_t *to = NULL;
    err_code rc;
    if ((rc = mem_alloc((void **)&edge, slots, sizeof *edge, "added tokens", e)) != OK ||
        (rc = mem_alloc((void **)&to, slots, sizeof *to, "added tokens", e)) != OK) {
        mem_free(edge);
        return rc;
    }
    for (uint32_t i = 0; i < t->slots; i++) {
        if (!t->edge[i]) continue;
        uint32_t j = edge_hash(t->edge[i]) & (slots - 1);
        while (edge[j]) j = (j + 1) & (slots - 1);
        edge[j] = t->edge[i];
        to[j] = t->to[i];
    }
    mem_free(t->edge);
    mem_free(t->to);
    t->edge = edge;
    t->to = to;
    t->slots = slots;
    return OK;
}

err_code trie_put(added_trie *t, const char *s, size_t n, int32_t leaf, err *e)
{
    assert(n > 0);
    uint32_t node = 0;
    for (size_t i = 0; i < n; i++) {
        TRY(trie_room(t, e));
        uint32_t next = trie_step(t, node, (uint8_t)s[i]);
        if (!next) {
            const uint64_t key = ((uint64_t)node << 8 | (uint8_t)s[i]) + 1;
            uint32_t j = edge_hash(key) & (t->slots - 1);
            while (t->edge[j]) j = (j + 1) & (t->slots - 1);
            next = t->nodes++;
            t->edge[j] = key;
            t->to[j] = next;
            t->edges++;
            t->leaf[next] = -1;
        }
        node = next;
    }
    t->leaf[node] = leaf;
    t->first[(uint8_t)s[0]] = true;
    return OK;
}

int32_t trie_match(const added_trie *t, const char *s, size_t n, size_t *len)
{
    int32_t best = -1;
    uint32_t node = 0;
    if (!n || !t->first[(uint8_t)s[0]]) return -1;
    for (size_t i = 0; i < n; i++) {
        node = trie_step(t, node, (uint8_t)s[i]);
        if (!node) break;
        if (t->leaf[node] < 0) continue;
        best = t->leaf[node];
        *len = i + 1;
    }
    return best;
}

void trie_free(added_trie *t)
{
    mem_free(t->edge);
    mem_free(t->to);
    mem_free(t->leaf);
    *t = (added_trie){0};
}

/* ---- added tokens ---- */

const added_token *added_find(const added_set *a, const char *s, size_t n)
{
    size_t len = 0;
    if (!a->all.slots) return NULL;
    const int32_t i = trie_match(&a->all, s, n, &len);
    return i >= 0 && len == n ? &a->tok[i] : NULL;
}

err_code added_put(added_set *a, const char *s, size_t n, added_token t, err *e)
{
    if (n == 0 || n > TOK_MAX_ADDED_BYTES)
        return err_set(e, E_LIMIT, "added token %d: expected 1 to %d bytes, got %zu", t.id,
                       TOK_MAX_ADDED_BYTES, n);
    size_t len = 0;
    int32_t i = a->all.slots ? trie_match(&a->all, s, n, &len) : -1;
    if (i < 0 || len != n) {
        TRY(table_grow((void **)&a->tok, a->n, &a->cap, sizeof *a->tok, e));
        t.at = a->blob.n;
        TRY(tok_buf_add(&a->blob, s, n, e));
        TRY(trie_put(&a->all, s, n, a->n, e));
        i = a->n++;
    } else {
        t.at = a->tok[i].at;
    }
    t.len = (uint32_t)n;
    a->tok[i] = t;
    return OK;
}

void added_free(added_set *a)
{
    trie_free(&a->all);
    trie_free(&a->raw);
    trie_free(&a->norm);
    tok_buf_free(&a->blob);
    mem_free(a->tok);
    *a = (added_set){0};
}
