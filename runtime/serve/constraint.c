/* One answer's position in a grammar that answers share. */
#include "runtime/serve/constraint.h"

#include <string.h>

#include "base/mem.h"
#include "runtime/serve/grammar_run.h"

struct constraint {
    grammar *g;
    grammar_hold hold;
};

err_code constraint_open(constraint **out, grammar *g, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "constraint", e));
    atomic_fetch_add(&g->refs, 1);
    (*out)->g = g;
    pthread_mutex_lock(&g->lock);
    grammar_hold_add(g->run, &(*out)->hold, GRAMMAR_START);
    pthread_mutex_unlock(&g->lock);
    return OK;
}

void constraint_close(constraint **c)
{
    if (!*c) return;
    grammar *g = (*c)->g;
    pthread_mutex_lock(&g->lock);
    grammar_hold_drop(&(*c)->hold);
    pthread_mutex_unlock(&g->lock);
    mem_free(*c);
    *c = NULL;
    grammar_close(&g);
}

int32_t constraint_mask(constraint *c, uint32_t *allowed)
{
    const size_t bytes = ((size_t)c->g->v->n_tokens + 31) / 32 * sizeof *allowed;
    int32_t count;
    pthread_mutex_lock(&c->g->lock);
    const uint32_t *m = grammar_run_mask(c->g->run, &c->hold, &count);
    if (m)
        memcpy(allowed, m, bytes);
    else
        memset(allowed, 0, bytes);
    pthread_mutex_unlock(&c->g->lock);
    return count;
}

bool constraint_may_end(const constraint *c)
{
    pthread_mutex_lock(&c->g->lock);
    const bool ends = grammar_run_may_end(c->g->run, c->hold.at);
    pthread_mutex_unlock(&c->g->lock);
    return ends;
}

bool constraint_accept(constraint *c, int32_t id)
{
    pthread_mutex_lock(&c->g->lock);
    const int32_t to = grammar_run_token(c->g->run, c->hold.at, id);
    if (to != GRAMMAR_DEAD) c->hold.at = to;
    pthread_mutex_unlock(&c->g->lock);
    return to != GRAMMAR_DEAD;
}
