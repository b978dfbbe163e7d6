/* The walk of a net, made deterministic as it goes: a position is the set of (state, stack) that
 * the bytes so far can have led to, and has a number. Positions, their followers and token masks
 * are kept until they take too much room; then all but those in use are forgotten. Not thread-
 * safe. */
#ifndef TMF_RUNTIME_SERVE_GRAMMAR_RUN_H
#define TMF_RUNTIME_SERVE_GRAMMAR_RUN_H

#include "runtime/serve/grammar_internal.h"

enum { GRAMMAR_DEAD = 0, GRAMMAR_START = 1 };
/* What a position is good for while others are forgotten: hold it in a grammar_hold. */
typedef struct grammar_hold grammar_hold;
struct grammar_hold {
    int32_t at;
    grammar_hold *next, **link;
};
void grammar_hold_add(grammar_run *r, grammar_hold *h, int32_t at);
void grammar_hold_drop(grammar_hold *h);
/* The mask of h->at: NULL when there is no memory or the work is over its limit. */
const uint32_t *grammar_run_mask(grammar_run *r, grammar_hold *h, int32_t *count);
bool grammar_run_may_end(const grammar_run *r, int32_t at);
/* The position behind a token; GRAMMAR_DEAD when it may not come. */
int32_t grammar_run_token(grammar_run *r, int32_t at, int32_t id);

#endif
