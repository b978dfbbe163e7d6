/* Sampling. Candidates sit in a heap ordered by (logit, lower id first) and are popped only as far
 * as top-k, top-p, min-p and the draw ask for, which is a handful of a vocabulary of 10^5. */
#include "runtime/sampler.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"

typedef struct {
    float logit;
    int32_t id;
} candidate;

struct sampler {
    int32_t vocab;
    sample_opts o;
    logit_bias *bias; /* [o.n_bias] */
    uint64_t rng[4];
    int32_t *history; /* ring of the last max_tokens ids, oldest overwritten */
    int64_t history_cap, history_n;
    int32_t *seen;     /* [vocab] times in the repetition window */
    int32_t *answered; /* [vocab] times in the answer; behind seen */
    bool told;         /* a device has the counts as they were before `since` ids were accepted */
    int32_t since, last, gone; /* the last of them, and what it pushed out of the window or -1 */
    candidate *heap;           /* [vocab] */
    double *weights;           /* [vocab] of what was popped, the largest is 1 */
    int32_t *popped;           /* [vocab] */
    bool beside;               /* heap, weights and popped are another's */
};

sample_opts sample_greedy(void) { return (sample_opts){.top_p = 1, .repetition_penalty = 1}; }

static err_code in_range(const char *what, double v, double lo, double hi, err *e)
{
    if (v >= lo && v <= hi) return OK; /* false for NaN */
    return err_set(e, E_USAGE, "%s: expected %g to %g, got %g", what, lo, hi, v);
}

err_code sample_opts_check(const sample_opts *o, int32_t vocab, err *e)
{
    TRY(in_range("temperature", o->temperature, 0, 100, e));
    TRY(in_range("top-k", o->top_k, 0, INT32_MAX, e));
    TRY(in_range("top-p", o->top_p, 1e-9, 1, e));
    TRY(in_range("min-p", o->min_p, 0, 1, e));
    TRY(in_range("repetition penalty", o->repetition_penalty, 1e-3, 1e3, e));
    TRY(in_range("presence penalty", o->presence_penalty, -2, 2, e));
    TRY(in_range("frequency penalty", o->frequency_penalty, -2, 2, e));
    TRY(in_range("penalty window", o->penalty_window, 0, INT32_MAX, e));
    for (int32_t i = 0; i < o->n_bias; i++) {
        TRY(in_range("logit bias: id", o->bias[i].id, 0, vocab - 1, e));
        TRY(in_range("logit bias", o->bias[i].bias, -1e4, 1e4, e));
    }
    return OK;
}

static err_code get(void **out, int64_t n, size_t size, err *e)
{
    return mem_alloc(out, (size_t)n, size, "sampler", e);
}

static err_code get_scratch(sampler *s, const sampler *with, err *e)
{
    s->beside = with != NULL;
    if (with) {
        s->heap = with->heap;
        s->weights = with->weights;
        s->popped = with->popped;
        return OK;
    }
    TRY(get((void **)&s->heap, s->vocab, sizeof(candidate), e));
    TRY(get((void **)&s->weights, s->vocab, sizeof(double), e));
    return get((void **)&s->popped, s->vocab, sizeof(int32_t), e);
}

err_code sampler_open_beside(sampler **out, sampler *with, int32_t vocab, int32_t max_tokens,
                             err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    assert(vocab > 0 && max_tokens > 0 && (!with || with->vocab == vocab));
    TRY(get(&p, 1, sizeof(sampler), e));
    sampler *s = p;
    s->vocab = vocab;
    s->history_cap = max_tokens;
    if ((rc = get((void **)&s->history, max_tokens, sizeof(int32_t), e)) != OK) goto done;
    if ((rc = get((void **)&s->seen, 2 * (int64_t)vocab, sizeof(int32_t), e)) != OK) goto done;
    s->answered = s->seen + vocab;
    if ((rc = get_scratch(s, with, e)) != OK) goto done;
    const sample_opts greedy = sample_greedy();
    if ((rc = sampler_start(s, &greedy, e)) != OK) goto done;
    *out = s;
    s = NULL;
done:
    sampler_close(&s);
    return rc;
}

err_code sampler_open(sampler **out, int32_t vocab, int32_t max_tokens, err *e)
{
    return sampler_open_beside(out, NULL, vocab, max_tokens, e);
}

void sampler_close(sampler **s)
{
    if (!s || !*s) return;
    mem_free((*s)->bias);
    mem_free((*s)->history);
    mem_free((*s)->seen);
    if (!(*s)->beside) {
        mem_free((*s)->heap);
        mem_free((*s)->weights);
        mem_free((*s)->popped);
    }
    mem_free(*s);
    *s = NULL;
}

/* ---- generator: xoshiro256**, seeded through splitmix64 as its authors advise ---- */

static uint64_t splitmix(uint64_t *x)
{
    uint64_t z = *x += 0x9e3779b97f4a7c15u;
    z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
    z = (z ^ z >> 27) * 0x94d049bb133111ebu;
    return z ^ z >> 31;
}

static uint64_t rotl(uint64_t x, int k) { return x << k | x >> (64 - k); }

static uint64_t rng_next(uint64_t s[4])
{
    const uint64_t r = rotl(s[1] * 5, 7) * 9, t = s[1] << 17;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = rotl(s[3], 45);
    return r;
}

sampler_rng sampler_rng_get(const sampler *s)
{
    sampler_rng r;
    memcpy(r.state, s->rng, sizeof r.state);
    return r;
}

void sampler_rng_set(sampler *s, const sampler_rng *r) { memcpy(s->rng, r->state, sizeof s->rng); }

/* Uniform in [0,1): 53 bits. */
static double rng_unit(uint64_t s[4]) { return (double)(rng_next(s) >> 11) * 0x1p-53; }

/* ---- history ---- */

err_code sampler_start(sampler *s, const sample_opts *o, err *e)
{
    void *bias = NULL;
    uint64_t seed = o->seed;
    TRY(sample_opts_check(o, s->vocab, e));
    if (o->n_bias) {
        TRY(get(&bias, o->n_bias, sizeof(logit_bias), e));
        memcpy(bias, o->bias, (size_t)o->n_bias * sizeof(logit_bias));
    }
    mem_free(s->bias);
    s->bias = bias;
    s->o = *o;
    s->o.bias = bias;
    for (int i = 0; i < 4; i++) s->rng[i] = splitmix(&seed);
    s->history_n = 0;
    s->told = false;
    memset(s->seen, 0, 2 * (size_t)s->vocab * sizeof(int32_t));
    return OK;
}

static void remember(sampler *s, int32_t id)
{
    const int64_t window = s->o.penalty_window > 0 && s->o.penalty_window < s->history_cap
                               ? s->o.penalty_window
                               : s->history_cap;
    s->last = id;
    s->gone = -1;
    if (s->history_n >= window) {
        s->gone = s->history[(s->history_n - window) % s->history_cap];
        s->seen[s->gone]--;
    }
    s->history[s->history_n++ % s->history_cap] = id;
    s->seen[id]++;
}

void sampler_prompt(sampler *s, const int32_t *ids, int64_t n)
{
    for (int64_t i = 0; i < n; i++) {
        assert(ids[i] >= 0 && ids[i] < s->vocab);
        remember(s, ids[i]);
    }
    s->told = false;
}

void sampler_accept(sampler *s, int32_t id)
{
    assert(id >= 0 && id < s->vocab);
    remember(s, id);
    s->answered[id]++;
    s->since++;
}

/* ---- steps 1 to 3 ---- */

static void penalize(const sampler *s, float *l)
{
    const sample_opts *o = &s->o;
    const float r = (float)o->repetition_penalty;
    for (int32_t i = 0; i < o->n_bias; i++) l[s->bias[i].id] += s->bias[i].bias;
    if (o->repetition_penalty != 1) {
        for (int32_t i = 0; i < s->vocab; i++) {
            if (s->seen[i]) l[i] = l[i] > 0 ? l[i] / r : l[i] * r;
        }
    }
    if (o->presence_penalty == 0 && o->frequency_penalty == 0) return;
    for (int32_t i = 0; i < s->vocab; i++) {
        if (s->answered[i])
            l[i] -= (float)(o->presence_penalty + o->frequency_penalty * (double)s->answered[i]);
    }
}

int32_t sample_argmax(const float *logits, int32_t vocab)
{
    int32_t best = -1;
    for (int32_t i = 0; i < vocab; i++) {
        if (logits[i] > (best < 0 ? -INFINITY : logits[best])) best = i;
    }
    return best;
}

/* ---- heap: the parent comes before its children ---- */

static bool before(const candidate *a, const candidate *b)
{
    return a->logit > b->logit || (a->logit == b->logit && a->id < b->id);
}

static void sift_down(candidate *h, int32_t n, int32_t i)
{
    const candidate c = h[i];
    for (int32_t k = 2 * i + 1; k < n; k = 2 * i + 1) {
        if (k + 1 < n && before(&h[k + 1], &h[k])) k++;
        if (!before(&h[k], &c)) break;
        h[i] = h[k];
        i = k;
    }
    h[i] = c;
}

static int32_t heap_make(candidate *h, const float *logits, int32_t vocab)
{
    int32_t n = 0;
    for (int32_t i = 0; i < vocab; i++) {
        if (logits[i] > -INFINITY) h[n++] = (candidate){logits[i], i}; /* false for NaN */
    }
    for (int32_t i = n / 2 - 1; i >= 0; i--) sift_down(h, n, i);
    return n;
}

/* ---- steps 5 to 9 ---- */

typedef struct {
    sampler *s;
    int32_t left; /* in the heap */
    int32_t n;    /* popped */
    float top;    /* the largest logit */
} draw;

static double weight(const draw *w, float logit)
{
    /* Infinite minus infinite would be NaN: an infinite logit takes all. */
    return logit == w->top ? 1 : exp(((double)logit - (double)w->top) / w->s->o.temperature);
}

static void draw_pop(draw *w)
{
    sampler *s = w->s;
    const candidate c = s->heap[0];
    s->heap[0] = s->heap[--w->left];
    if (w->left) sift_down(s->heap, w->left, 0);
    s->popped[w->n] = c.id;
    s->weights[w->n++] = weight(w, c.logit);
}

/* Sum of weights after top-k: of the popped ones, or of all in id order. */
static double draw_total(draw *w, const float *logits)
{
    const int32_t k = w->s->o.top_k;
    double sum = 0;
    if (k > 0 && k < w->left) {
        while (w->n < k) draw_pop(w);
        w->left = 0;
        for (int32_t i = 0; i < k; i++) sum += w->s->weights[i];
        return sum;
    }
    for (int32_t i = 0; i < w->s->vocab; i++) {
        if (logits[i] > -INFINITY) sum += weight(w, logits[i]);
    }
    return sum;
}

/* Pops what survives top-p and min-p and drops the rest; returns its sum. */
static double draw_head(draw *w, double total)
{
    const sampler *s = w->s;
    const double enough = s->o.top_p < 1 ? s->o.top_p * total : INFINITY;
    double sum = 0;
    int32_t i = 0;
    for (; i < w->n || w->left; i++) {
        if (i == w->n) draw_pop(w);
        if (i && s->weights[i] < s->o.min_p) break;
        sum += s->weights[i];
        if (sum >= enough) {
            i++;
            break;
        }
    }
    w->n = i;
    w->left = 0;
    return sum;
}

static int32_t draw_one(sampler *s, const float *logits)
{
    draw w = {.s = s, .left = heap_make(s->heap, logits, s->vocab)};
    double sum = 0;
    if (w.left == 0) return -1;
    w.top = s->heap[0].logit;
    double total = draw_total(&w, logits);
    if (s->o.top_p < 1 || s->o.min_p > 0) total = draw_head(&w, total);
    const double u = rng_unit(s->rng) * total;
    for (int32_t i = 0; i < w.n || w.left; i++) {
        if (i == w.n) draw_pop(&w);
        sum += s->weights[i];
        if (sum > u) return s->popped[i];
    }
    return s->popped[w.n - 1]; /* u met the rounding of the sum */
}

int32_t sampler_next(sampler *s, float *logits)
{
    penalize(s, logits);
    return s->o.temperature == 0 ? sample_argmax(logits, s->vocab) : draw_one(s, logits);
}

/* ---- for a device ---- */

const int32_t *sampler_counts(const sampler *s) { return s->seen; }

static bool counted(const sample_opts *o)
{
    return o->repetition_penalty != 1 || o->presence_penalty != 0 || o->frequency_penalty != 0;
}

/* All of a row but what came into the counts. */
static sample_row row_of(const sample_opts *o, uint64_t rng[4])
{
    return (sample_row){.temperature = o->temperature,
                        .top_p = o->top_p,
                        .min_p = o->min_p,
                        .presence = o->presence_penalty,
                        .frequency = o->frequency_penalty,
                        .u = o->temperature > 0 ? rng_unit(rng) : 0,
                        .repetition = (float)o->repetition_penalty,
                        .top_k = o->top_k,
                        .n_bias = o->n_bias,
                        .wanted = 1,
                        .state = counted(o) ? 0 : -1,
                        .last = -1,
                        .gone = -1};
}

void sampler_row(sampler *s, sample_row *r, sample_bias *bias, bool *send)
{
    const sample_opts *o = &s->o;
    const bool counts = counted(o), known = s->told && s->since <= 1;
    *r = row_of(o, s->rng);
    if (known && s->since) r->last = s->last, r->gone = s->gone;
    for (int32_t i = 0; i < o->n_bias; i++) bias[i] = (sample_bias){s->bias[i].id, s->bias[i].bias};
    *send = counts && !known;
    s->told = counts;
    s->since = 0;
}

bool sampler_row_ahead(const sampler *s, sample_row *r)
{
    uint64_t rng[4];
    if (counted(&s->o) || s->o.n_bias) return false;
    memcpy(rng, s->rng, sizeof rng);
    *r = row_of(&s->o, rng);
    return true;
}
