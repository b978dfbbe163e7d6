/* A grid of factors for one channel group. */
#include "awq/factors.h"

#include <math.h>
#include <string.h>

#include "awq/few.h"
#include "awq/module_loss.h"

#define POINTS     20 /* ratios 0, 1/20 .. 1 */
#define CANDIDATES (2 * (POINTS + 1) + 1)
#define FLOOR      1e-4
#define ENOUGH     512 /* rows that tell candidates apart */
#define THINNEST   4   /* rows of which one is looked at */
#define FINALISTS  6

/* Candidate factors of one group: the identity first, then a^r, then a^r / w^(1-r) (the "duo"
 * form), a: mean |x|, w: mean relative |W|. Candidates that are not finite, or whose folded norm
 * leaves f16, are left out. */
typedef struct {
    float *s;     /* [n][k] */
    double *loss; /* [n] */
    double *mean; /* [k] mean |x| */
    int *number;  /* [n] in the grid */
    int n;
    int64_t k;
} candidates;

static err_code add_candidate(const quant_block *b, const smooth_group *g, candidates *c,
                              const bool *dead, err *e)
{
    float *s = c->s + c->n * c->k;
    bool fits;
    if (!smooth_normalize(s, c->k, dead)) return OK;
    TRY(smooth_fits(b, g, s, &fits, e));
    c->n += fits;
    return OK;
}

/* v's rows take one factor for all heads of o that read them: the mean over these heads. */
static void share(const model_desc *m, const smooth_group *g, double *v, int64_t k)
{
    const int64_t hd = m->head_dim, n = m->heads / m->kv_heads;
    if (g->source != ROLE_V) return;
    for (int64_t at = 0; at < k; at += n * hd)
        for (int64_t i = 0; i < hd; i++) {
            double sum = 0;
            for (int64_t h = 0; h < n; h++) sum += v[at + h * hd + i];
            for (int64_t h = 0; h < n; h++) v[at + h * hd + i] = sum / (double)n;
        }
}

static err_code make_candidates(const quant_block *b, const smooth_group *g, candidates *c, err *e)
{
    const calib_tap *t = calib_find(b->stats, g->targets[0]);
    const double *sum = t->abssum.data;
    double *w = b->scratch->sum;
    bool *dead = (bool *)b->scratch->zero;
    TRY(smooth_weight_mean(b, g, 1e-6, w, e));
    TRY(smooth_dead(b, g, dead, e));
    share(b->m, g, w, c->k);
    for (int64_t i = 0; i < c->k; i++) c->mean[i] = sum[i] / (double)t->count;
    share(b->m, g, c->mean, c->k);
    for (int64_t i = 0; i < c->k; i++) c->s[i] = 1.f;
    c->n = 1;
    const int forms = b->o->loss == LOSS_MODULE
                          ? 1
                          : 2; /* llm-awq's own objective goes with its own grid */
    for (int duo = 0; duo < forms; duo++)
        for (int p = 0; p <= POINTS; p++) {
            const double r = (double)p / POINTS;
            float *s = c->s + c->n * c->k;
            for (int64_t i = 0; i < c->k; i++) {
                const double a = pow(c->mean[i], r), d = duo ? pow(w[i], 1 - r) + FLOOR : 1;
                s[i] = (float)fmax(a / d, FLOOR);
            }
            TRY(add_candidate(b, g, c, dead, e));
        }
    return OK;
}

static err_code losses(const quant_block *b, const smooth_group *g, candidates *c, int64_t each,
                       err *e)
{
    const bool module = b->o->loss == LOSS_MODULE &&
                        (g->source == ROLE_ATTN_NORM || g->source == ROLE_FFN_NORM);
    if (module) return module_losses(b, g, c->s, c->n, c->loss, e);
    return smooth_losses(b, g, c->s, c->n, each, c->loss,
                         e); /* for down and o the module is the linear itself */
}

static int least_of(const double *loss, int n)
{
    int best = 0;
    for (int i = 1; i < n; i++)
        if (loss[i] < loss[best]) best = i;
    return best;
}

/* Leaves the identity and the FINALISTS best. */
static void keep_finalists(candidates *c)
{
    bool kept[CANDIDATES] = {true};
    int n = 0;
    for (int f = 0; f < FINALISTS && f < c->n; f++) {
        const int best = least_of(c->loss, c->n);
        kept[best] = true;
        c->loss[best] = INFINITY;
    }
    for (int i = 0; i < c->n; i++) {
        if (!kept[i]) continue;
        memmove(c->s + n * c->k, c->s + i * c->k, (size_t)c->k * sizeof *c->s);
        c->number[n++] = c->number[i];
    }
    c->n = n;
}

static err_code compare(const quant_block *b, const smooth_group *g, candidates *c, bool thin,
                        err *e)
{
    int64_t rows = 0, each;
    for (int t = 0; t < g->n_targets; t++) rows += model_linear_n(b->m, g->targets[t]);
    each = rows / ENOUGH < THINNEST ? rows / ENOUGH : THINNEST;
    for (int i = 0; i < c->n; i++) c->number[i] = i;
    if (thin && each > 1 && !b->dev) {
        TRY(losses(b, g, c, each, e));
        keep_finalists(c);
    }
    return losses(b, g, c, 1, e);
}

/* The plan has v's factors once for each KV head. */
static void take(const model_desc *m, const smooth_group *g, float *to, const float *from,
                 int64_t k)
{
    const int64_t n = g->source == ROLE_V ? m->heads / m->kv_heads : 1,
                  run = g->source == ROLE_V ? m->head_dim : k;
    for (int64_t i = 0; i < k / n; i += run) memcpy(to + i, from + i * n, (size_t)run * sizeof *to);
}

err_code factors_search(const quant_block *b, const smooth_group *g, bool thin, block_plan *out,
                        err *e)
{
    int number[CANDIDATES];
    candidates c = {.k = model_linear_k(b->m, g->targets[0])};
    void *mem = NULL;
    float *s;
    int made;
    err_code rc;
    if (plan_find_fold(out, g->source)->s.data) return OK; /* chosen for the cache */
    if (few_tokens(b->stats, g->targets[0])) return OK;
    if (!calib_find(b->stats, g->targets[0]))
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)b->layer, role_name(g->targets[0]));
    TRY(mem_alloc(&mem,
                  CANDIDATES * ((size_t)c.k * sizeof(float) + sizeof(double)) +
                      (size_t)c.k * sizeof(double),
                  1, "candidates", e));
    c.loss = mem;
    c.mean = c.loss + CANDIDATES;
    c.s = (float *)(c.mean + c.k);
    if ((rc = make_candidates(b, g, &c, e)) != OK) goto done;
    c.number = number;
    made = c.n;
    if ((rc = compare(b, g, &c, thin, e)) != OK) goto done;
    const int best = least_of(c.loss, c.n);
    job_log(b->j, LOG_DEBUG, "layer %d: %s: candidate %d of %d, loss %.6g of %.6g", (int)b->layer,
            role_name(g->source), number[best], made, c.loss[best], c.loss[0]);
    if (best > 0 && (rc = plan_factors(b, out, g->source, &s, e)) == OK)
        take(b->m, g, s, c.s + best * c.k, c.k);
done:
    mem_free(mem);
    return rc;
}
