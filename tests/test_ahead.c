/* Steps that a caller announces (step_seq.more) against the same steps unannounced: results and
 * tokens held are the same, bit for bit, whatever is then asked. "test_ahead cuda" runs on that
 * device, which begins announced steps early; others must not mind. */
#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/model_internal.h"
#include "support/suite.h"
#include "support/tiny_weights.h"

#define SLOTS   6
#define SESSION 160
#define VOCAB   50

static dev_kind kind = DEV_CPU;
static device *dev;
static weight_src *src;

static void must(err_code rc, const err *e)
{
    if (rc != OK) ck_abort_msg("%s", e->msg);
}

/* What a slot is asked for. */
typedef enum { BEST, BEST_NLL, GREEDY, WARM, PENALTY, LOGITS, WANTS } want_kind;

typedef struct {
    int32_t best, picked;
    float nll, logits[VOCAB];
} outputs;

typedef struct {
    model *m;
    sampler *s[SLOTS];
    outputs out[SLOTS];
} side;

static uint32_t rng;
static int32_t below(int32_t n)
{
    rng = rng * 1664525u + 1013904223u;
    return (int32_t)((rng >> 8) % (uint32_t)n);
}

/* tokens: that the cache has room for. */
static void open_side(side *x, int32_t tokens)
{
    err e;
    const model_desc *d = weights_desc(src);
    const kv_opts one = {KV_16, d->layers, d->kv_heads, d->head_dim, 32, 1, 1, 1};
    const model_opts o = {.session_len = SESSION,
                          .max_seqs = SLOTS,
                          .block_tokens = 32,
                          .kv_mem_bytes = (int64_t)kv_bytes(&one) * (tokens / 32)};
    must(model_open(&x->m, dev, src, &o, NULL, &e), &e);
    for (int i = 0; i < SLOTS; i++) must(sampler_open(&x->s[i], VOCAB, SESSION + 1, &e), &e);
}

static void close_side(side *x)
{
    for (int i = 0; i < SLOTS; i++) sampler_close(&x->s[i]);
    model_close(&x->m);
}

static void up(bool deterministic)
{
    err e;
    const dev_opts d = {.kind = kind, .threads = 1, .deterministic = deterministic};
    tiny_opts o = {.desc = tiny_desc(), .seed = 5, .w4_group = 128};
    o.desc.hidden = 256; /* sizes that the fast kernels take */
    o.desc.head_dim = o.desc.rope_dims = 64;
    o.desc.ffn = 384;
    must(dev_open(&dev, &d, &e), &e);
    must(tiny_open(&src, &o, &e), &e);
}

static void down(void)
{
    weights_close(&src);
    dev_close(&dev);
}

static sample_opts options(want_kind w, uint64_t seed)
{
    sample_opts o = sample_greedy();
    o.seed = seed;
    if (w == WARM) o.temperature = 0.9, o.top_k = 20;
    if (w == PENALTY) o.temperature = 0.7, o.repetition_penalty = 1.3;
    return o;
}

static step_seq part_of(side *x, int slot, want_kind w, const int32_t *tokens, int32_t n, bool more)
{
    static const int32_t zero = 0;
    outputs *out = &x->out[slot];
    step_seq s = {.slot = slot, .tokens = tokens, .n_tokens = n, .n_out = 1, .more = more};
    memset(out, 0, sizeof *out);
    if (w == LOGITS) s.logits = out->logits;
    if (w == BEST || w == BEST_NLL) s.argmax = &out->best;
    if (w == BEST_NLL) s.nll = &out->nll, s.targets = &zero;
    if (w == GREEDY || w == WARM || w == PENALTY) s.picked = &out->picked, s.sampler = x->s[slot];
    return s;
}

/* The id that comes out, which a sampler is told of. */
static int32_t taken(side *x, int slot, want_kind w)
{
    const outputs *out = &x->out[slot];
    if (w == LOGITS) return sample_argmax(out->logits, VOCAB);
    if (w == BEST || w == BEST_NLL) return out->best;
    sampler_accept(x->s[slot], out->picked);
    return out->picked;
}

/* What is known of the slots, the same on both sides. */
typedef struct {
    want_kind want[SLOTS];
    int32_t next[SLOTS]; /* the id that came out last */
    int32_t held[SLOTS];
    int32_t prompt[SLOTS][SESSION];
    int32_t early; /* steps that left one on its way */
    bool steady;   /* what came out is what goes on */
} world;

static void begin(world *w, side *a, side *b, int slot)
{
    err e;
    const bool draws = model_samples(a->m, &(sample_opts){.top_p = 1, .repetition_penalty = 1});
    w->want[slot] = (want_kind)below(WANTS);
    if (!draws && w->want[slot] >= GREEDY && w->want[slot] <= PENALTY) w->want[slot] = BEST;
    const sample_opts o = options(w->want[slot], (uint64_t)below(1000));
    must(sampler_start(a->s[slot], &o, &e), &e);
    must(sampler_start(b->s[slot], &o, &e), &e);
}

/* One step of some slots on both sides; b is never told what comes. */
static void step(world *w, side *a, side *b, const int *slots, int n)
{
    step_seq p[SLOTS], q[SLOTS];
    int32_t count[SLOTS];
    err e, f;
    for (int i = 0; i < n; i++) {
        const int s = slots[i];
        const bool fresh = w->held[s] == 0;
        count[i] = fresh ? 1 + below(40) : 1;
        if (fresh) begin(w, a, b, s);
        for (int32_t k = 0; k < count[i]; k++) w->prompt[s][k] = below(VOCAB);
        if (!fresh && (w->steady || below(10))) w->prompt[s][0] = w->next[s];
        p[i] = part_of(a, s, w->want[s], w->prompt[s], count[i], below(8) > 0);
        q[i] = part_of(b, s, w->want[s], w->prompt[s], count[i], false);
    }
    const err_code rc = model_step(a->m, p, n, NULL, &e);
    ck_assert_int_eq(rc, model_step(b->m, q, n, NULL, &f));
    ck_assert_int_eq(b->m->ahead.n, 0);
    w->early += a->m->ahead.n > 0;
    if (rc == E_LIMIT) { /* the session or the cache is full: somebody ends */
        model_seq_end(a->m, slots[0]), model_seq_end(b->m, slots[0]);
        w->held[slots[0]] = 0;
        return;
    }
    must(rc, &e);
    for (int i = 0; i < n; i++) {
        const int s = slots[i];
        ck_assert_msg(memcmp(&a->out[s], &b->out[s], sizeof a->out[s]) == 0,
                      "slot %d, wanting %d, behind %d tokens: best %d and %d, drawn %d and %d", s,
                      (int)w->want[s], w->held[s], a->out[s].best, b->out[s].best, a->out[s].picked,
                      b->out[s].picked);
        w->held[s] += count[i];
        w->next[s] = taken(a, s, w->want[s]);
        ck_assert_int_eq(w->next[s], taken(b, s, w->want[s]));
        ck_assert_int_eq(model_seq_len(a->m, s), w->held[s]);
    }
}

/* Some of the slots in any order: mostly all that hold something. */
static int choose(const world *w, int *slots)
{
    int n = 0;
    const bool all = below(4) > 0;
    for (int s = 0; s < SLOTS; s++) {
        const bool in = w->held[s] ? all || below(2) : below(12) == 0;
        if (in) slots[n++] = s;
    }
    if (!n) slots[n++] = below(SLOTS);
    for (int i = n - 1; i > 0 && below(3) == 0; i--) {
        const int k = below(i + 1), s = slots[i];
        slots[i] = slots[k], slots[k] = s;
    }
    return n;
}

static void shorten(world *w, side *a, side *b)
{
    const int s = below(SLOTS);
    const int32_t to = below(3) && w->held[s] ? below(w->held[s]) : 0;
    model_truncate(a->m, s, to), model_truncate(b->m, s, to);
    if (w->held[s] > to) w->held[s] = to;
}

START_TEST(test_any_steps)
{
    static world w;
    static side a, b;
    static const int32_t rooms[] = {SLOTS * SESSION, 416};
    rng = 99;
    up(true);
    for (int room = 0; room < 2; room++) {
        memset(&w, 0, sizeof w);
        open_side(&a, rooms[room]), open_side(&b, rooms[room]);
        for (int i = 0; i < (kind == DEV_CUDA ? 1500 : 200); i++) {
            int slots[SLOTS];
            if (below(14) == 0) shorten(&w, &a, &b);
            const int n = choose(&w, slots);
            step(&w, &a, &b, slots, n);
        }
        ck_assert((w.early > 100) == (kind == DEV_CUDA));
        close_side(&a), close_side(&b);
    }
    down();
}
END_TEST

/* With the kernels that are fast: the same passes run, so the bits are the same here too. */
START_TEST(test_long_answers)
{
    static const int counts[] = {1, 3, SLOTS};
    static world w;
    static side a, b;
    rng = 7;
    up(false);
    for (int c = 0; c < 3; c++) {
        int slots[SLOTS];
        memset(&w, 0, sizeof w);
        w.steady = true;
        open_side(&a, SLOTS * SESSION), open_side(&b, SLOTS * SESSION);
        for (int i = 0; i < counts[c]; i++) slots[i] = i;
        for (int i = 0; i < counts[c]; i++) step(&w, &a, &b, &slots[i], 1);
        for (int i = 0; i < 90; i++) step(&w, &a, &b, slots, counts[c]);
        close_side(&a), close_side(&b);
    }
    down();
}
END_TEST

static void add_case(Suite *s, const char *name, const TTest *test)
{
    TCase *t = tcase_create(name);
    tcase_add_test(t, test);
    suite_add_tcase(s, t);
}

static Suite *suite(void)
{
    Suite *s = suite_create("ahead");
    add_case(s, "any steps", test_any_steps);
    add_case(s, "long answers", test_long_answers);
    return s;
}

int main(int argc, char **argv)
{
    if (argc == 2 && strcmp(argv[1], "cuda") == 0) kind = DEV_CUDA;
    /* A context outlives no fork. */
    return suite_run_forked(suite(), kind == DEV_CUDA ? CK_NOFORK : CK_FORK_GETENV);
}
