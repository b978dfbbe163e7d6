/* Random answers within a grammar. */
#ifndef TMF_TESTS_GRAMMAR_WALK_H
#define TMF_TESTS_GRAMMAR_WALK_H

#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/serve/constraint.h"

static inline uint64_t walk_random(uint64_t *s)
{
    *s ^= *s << 13;
    *s ^= *s >> 7;
    return *s ^= *s << 17;
}

typedef struct {
    char *text; /* free */
    size_t n;
    int tokens;
    bool done;  /* it could end, and did */
    bool stuck; /* nothing could follow, but it could not end */
} walk_answer;

/* The k-th set bit from a random place on, short or closing tokens when `hurry`. */
static inline int32_t walk_pick(const tokenizer *t, const uint32_t *mask, int32_t vocab, bool hurry,
                                uint64_t *seed)
{
    int32_t best = -1;
    size_t n;
    const int32_t at = (int32_t)(walk_random(seed) % (uint64_t)vocab);
    for (int32_t k = 0; k < vocab; k++) {
        const int32_t id = (at + k) % vocab;
        if (!(mask[id / 32] >> (id % 32) & 1)) continue;
        const char *p = tokenizer_piece(t, id, &n);
        if (best < 0) best = id;
        if (!hurry || (n == 1 && strchr("\"}]", *p))) return id;
    }
    return best;
}

/* A token at a time, any that the mask has; behind `calm` tokens it looks for the end. */
static inline walk_answer walk_random_answer(const tokenizer *t, grammar *g, int calm,
                                             uint64_t *seed)
{
    const int32_t vocab = tokenizer_vocab(t);
    uint32_t *mask = calloc(((size_t)vocab + 31) / 32, sizeof *mask);
    walk_answer a = {.text = calloc(1, 1 << 16)};
    constraint *c;
    err e;
    if (constraint_open(&c, g, &e) != OK) abort();
    for (; a.tokens < calm + 300 && a.n < 60000; a.tokens++) {
        const bool hurry = a.tokens >= calm, ends = constraint_may_end(c);
        const int32_t n = constraint_mask(c, mask);
        if (n == 0 || (ends && (hurry || walk_random(seed) % 4 == 0))) {
            a.done = ends;
            a.stuck = !ends;
            break;
        }
        const int32_t id = walk_pick(t, mask, vocab, hurry, seed);
        size_t len;
        const char *p = tokenizer_is_special(t, id) ? tokenizer_string(t, id, &len)
                                                    : tokenizer_piece(t, id, &len);
        if (!constraint_accept(c, id)) {
            a.stuck = true;
            break;
        }
        memcpy(a.text + a.n, p, len);
        a.n += len;
    }
    constraint_close(&c);
    free(mask);
    return a;
}

#endif
