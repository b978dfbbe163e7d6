/* From the logits of a step to the next token of an answer. */
#include <math.h>
#include <string.h>

#include "runtime/serve/engine_internal.h"

bool engine_is_stop(const answer *a, int32_t id)
{
    for (int32_t i = 0; i < a->n_stop_ids; i++) {
        if (a->stop_ids[i] == id) return true;
    }
    return false;
}

static float *logits_of(const engine *g, const answer *a)
{
    return g->logits + (size_t)a->q.slot * (size_t)g->vocab;
}

static uint32_t *mask_of(const engine *g, const answer *a)
{
    return g->mask + (size_t)a->q.slot * (size_t)g->mask_words;
}

static bool stops_banned(const answer *a) { return a->n_stop_ids && a->n_new < a->min_new; }

/* The model's own choice of the largest logit will do. */
static bool plain(const answer *a)
{
    return !a->sampled && !a->limit && a->top < 0 && !stops_banned(a);
}

/* The model draws: nobody has to see the logits. */
static bool drawn(const engine *g, const answer *a)
{
    return a->sampled && !a->limit && a->top < 0 && !stops_banned(a) &&
           model_samples(g->m, &a->sample);
}

void engine_want(engine *g, answer *a, step_seq *q)
{
    static const int32_t zero = 0;
    q->n_out = 1;
    q->more = a->n_new + 1 < a->max_new;
    if (plain(a))
        q->argmax = &g->best[a->q.slot];
    else if (drawn(g, a)) {
        q->picked = &g->best[a->q.slot];
        q->sampler = g->samplers[a->q.slot];
    } else
        q->logits = logits_of(g, a);
    if (plain(a) || a->top >= 0) { /* not a number when no logit is; else gives the sum of all */
        q->nll = &g->nll[a->q.slot];
        q->targets = &zero;
    }
}

/* ---- constraints ---- */

static void next_mask(engine *g, answer *a)
{
    memset(mask_of(g, a), 0, (size_t)g->mask_words * sizeof *g->mask);
    a->n_allowed = constraint_mask(a->limit, mask_of(g, a));
}

static void apply_mask(const engine *g, const answer *a, float *logits)
{
    uint32_t *mask = mask_of(g, a);
    const bool may_end = a->n_stop_ids && constraint_may_end(a->limit);
    for (int32_t i = 0; i < a->n_stop_ids && may_end; i++)
        mask[a->stop_ids[i] / 32] |= 1u << a->stop_ids[i] % 32;
    for (int32_t i = 0; i < g->vocab; i++) {
        if (!(mask[i / 32] >> i % 32 & 1)) logits[i] = -INFINITY;
    }
}

/* ---- probabilities ---- */

int32_t engine_top(token_prob *out, int32_t n, const float *logits, int32_t vocab, double lse)
{
    int32_t have = 0;
    for (int32_t i = 0; i < vocab && n > 0; i++) {
        if (have == n && !(logits[i] > out[n - 1].logprob)) continue;
        if (!(logits[i] > -INFINITY)) continue;
        int32_t k = have < n ? have++ : n - 1;
        for (; k > 0 && logits[i] > out[k - 1].logprob; k--) out[k] = out[k - 1];
        out[k] = (token_prob){i, logits[i]};
    }
    for (int32_t k = 0; k < have; k++) out[k].logprob = (float)((double)out[k].logprob - lse);
    for (int32_t k = have; k < n; k++) out[k].id = -1;
    return have;
}

/* ---- a token ---- */

static void restore(const answer *a, sampler *s)
{
    sampler_prompt(s, a->q.tokens, a->n_prompt);
    for (int32_t i = 0; i < a->n_new; i++) sampler_accept(s, a->q.tokens[a->n_prompt + i]);
    if (a->n_new) sampler_rng_set(s, &a->rng);
}

err_code engine_pick_begin(engine *g, answer *a, err *e)
{
    if (a->limit) next_mask(g, a);
    if (!a->sampled) return OK;
    TRY(sampler_start(g->samplers[a->q.slot], &a->sample, e));
    restore(a, g->samplers[a->q.slot]);
    return OK;
}

static err_code no_logit(const answer *a, err *e)
{
    return err_set(e, E_DEVICE, "no finite logit behind %d tokens", a->q.n_tokens);
}

err_code engine_pick(engine *g, answer *a, int32_t *id, err *e)
{
    const size_t bytes = (size_t)g->vocab * sizeof(float);
    float *logits = logits_of(g, a), *l = logits;
    if (plain(a)) {
        *id = g->best[a->q.slot];
        return isfinite(g->nll[a->q.slot]) ? OK : no_logit(a, e);
    }
    if (drawn(g, a)) {
        *id = g->best[a->q.slot];
        return *id >= 0 ? OK : no_logit(a, e);
    }
    if (a->limit && a->n_allowed == 0) {
        *id = -1;
        if (constraint_may_end(a->limit)) return OK;
        return err_set(e, E_LIMIT, "constraint: no token can follow after %d of them", a->n_new);
    }
    if (a->top >= 0) l = memcpy(g->work_logits, logits, bytes);
    if (a->limit) apply_mask(g, a, l);
    for (int32_t i = 0; i < a->n_stop_ids && stops_banned(a); i++) l[a->stop_ids[i]] = -INFINITY;
    *id = a->sampled ? sampler_next(g->samplers[a->q.slot], l) : sample_argmax(l, g->vocab);
    if (*id < 0) return no_logit(a, e);
    if (a->top < 0) return OK;
    const double lse = (double)g->nll[a->q.slot] + (double)logits[0];
    a->logprob[a->n_new] = (float)((double)logits[*id] - lse);
    (void)engine_top(a->tops + (size_t)a->n_new * (size_t)a->top, a->top, logits, g->vocab, lse);
    return OK;
}

bool engine_picked(engine *g, answer *a, int32_t id)
{
    if (a->sampled) {
        sampler_accept(g->samplers[a->q.slot], id);
        a->rng = sampler_rng_get(g->samplers[a->q.slot]);
    }
    if (!a->limit) return false;
    if (!constraint_accept(a->limit, id)) return true; /* a stop id: it ends the answer itself */
    next_mask(g, a);
    return a->n_allowed == 0 && constraint_may_end(a->limit);
}
