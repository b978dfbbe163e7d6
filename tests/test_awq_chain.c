/* Rounded inputs carried on: moments of two streams against a plain forward pass, corrected
 * weights and their loss against sums over tokens, ranges by their ends, scales refitted, and
 * what it brings. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/chain_shared.h"
#include "awq/correct.h"
#include "awq/dev_fold.h"
#include "awq/feedback.h"
#include "awq/kv_fold.h"
#include "awq/pack.h"
#include "awq/range.h"
#include "formats/weights_mem.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

enum { ROWS = WINDOWS * SEQLEN, HELD = 3 };

static double next_value(uint32_t *x)
{
    return ((*x = *x * 1664525u + 1013904223u) >> 8) / 16777216. - 0.5;
}

/* ---- two streams ---- */

typedef struct {
    tensor_role role;
    double *x; /* [rows,k] */
    int64_t n, k;
} kept;

static void keep(void *ctx, tensor_role role, int32_t layer, const double *x, int64_t n, int64_t k)
{
    kept *s = ctx;
    if (layer || role != s->role) return;
    memcpy(s->x + s->n * k, x, (size_t)(n * k) * sizeof *x);
    s->n += n;
    s->k = k;
}

/* What layer 0's linear `role` sees, over all windows. */
static kept inputs(weight_src *src, tensor_role role)
{
    const int32_t vocab = weights_desc(src)->vocab;
    kept s = {.role = role, .x = malloc(sizeof(double) * ROWS * 512)};
    double *logits = malloc(sizeof(double) * SEQLEN * (size_t)vocab);
    for (int w = 0; w < WINDOWS; w++) tiny_forward(logits, src, ids + w * SEQLEN, SEQLEN, keep, &s);
    free(logits);
    return s;
}

typedef void (*change_fn)(const model_desc *m, tensor_role r, int32_t layer, tensor *w);

/* The model with its linears in f32, each as `change` makes it. */
static weight_src *changed_model(weight_src *src, change_fn change)
{
    const model_desc *m = weights_desc(src);
    weights_mem *w = NULL;
    weight_src *out = NULL;
    err e;
    MUST(weights_mem_open(&w, m, &e));
    for (int32_t l = -1; l < m->layers; l++)
        for (tensor_role r = 0; r < ROLE_COUNT; r++) {
            linear_view v;
            tensor t;
            if (!weights_has(src, r, l, -1)) continue;
            if (l < 0 || r == ROLE_ATTN_NORM || r == ROLE_FFN_NORM) {
                MUST(weights_tensor(src, r, l, &t, &e));
                MUST(weights_mem_tensor(w, r, l, &t, &e));
                continue;
            }
            MUST(weights_linear(src, r, l, -1, &v, &e));
            t = tensor_2d(malloc((size_t)tensor_count(&v.dense) * 4), DT_F32, v.dense.shape[0],
                          v.dense.shape[1]);
            tensor_convert(&t, &v.dense);
            change(m, r, l, &t);
            v.dense = t;
            MUST(weights_mem_linear(w, r, l, &v, &e));
            free(t.data);
        }
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

/* v and o of layer 0 move a little. */
static void move(const model_desc *m, tensor_role r, int32_t layer, tensor *w)
{
    uint32_t seed = 7 + r;
    (void)m;
    for (int64_t i = 0; layer == 0 && (r == ROLE_V || r == ROLE_O) && i < tensor_count(w); i++)
        ((float *)w->data)[i] += (float)(0.1 * next_value(&seed));
}

static void as_it_is(const model_desc *m, tensor_role r, int32_t layer, tensor *w)
{
    (void)m;
    (void)r;
    (void)layer;
    (void)w;
}

typedef struct {
    weight_src *src, *other;
    const model_desc *m;
    layer_walk *walk;
    chain *chain;
    quant_block b;
    quant_opts o;
    quant_scratch scratch;
    arena mem;
} two;

static void put(two *t, tensor_role r)
{
    linear_view v;
    err e;
    tensor to = chain_room(t->chain, r);
    MUST(weights_linear(t->other, r, 0, -1, &v, &e));
    tensor_convert(&to, &v.dense);
    chain_put(t->chain, r);
}

static void open_two(two *t, model_desc m, kv_format cache)
{
    static uint8_t held[WINDOWS];
    const tensor tokens = tensor_2d(ids, DT_I32, WINDOWS, SEQLEN),
                 held_out = tensor_1d(held, DT_U8, WINDOWS);
    const tiny_opts o = {.desc = m, .seed = 4};
    err e;
    held[HELD] = 1;
    *t = (two){.o = {.group = 32, .loss = LOSS_GRAM}};
    MUST(tiny_open(&t->src, &o, &e));
    t->m = weights_desc(t->src);
    t->other = changed_model(t->src, move);
    MUST(layer_walk_open(&t->walk, dev, t->src, &tokens, &e));
    MUST(chain_open(&t->chain, dev, t->walk, t->m, &held_out, cache, &e));
    ck_assert(chain_holds_out(t->chain));
    MUST(layer_walk_bind(t->walk, 0, &e));
    MUST(chain_layer(t->chain, &e));
    MUST(quant_scratch_init(&t->scratch, t->m, true, &e));
    MUST(arena_init(&t->mem, 3 * plan_factors_bytes(t->m, true), "test", &e));
    t->b = (quant_block){.d = dev,
                         .src = t->src,
                         .m = t->m,
                         .fam = family_by_name("llama"),
                         .o = &t->o,
                         .walk = t->walk,
                         .chain = t->chain,
                         .scratch = &t->scratch,
                         .mem = &t->mem};
}

static void close_two(two *t)
{
    arena_free(&t->mem);
    quant_scratch_free(&t->scratch);
    chain_close(&t->chain);
    layer_walk_close(&t->walk);
    weights_close(&t->other);
    weights_close(&t->src);
}

/* The 16-bit residual stream of layer 0 behind attention, less the moved one: o's outputs. */
static double *residuals(two *t, const kept *a, const kept *b)
{
    const int64_t hidden = t->m->hidden;
    double *r = calloc((size_t)(ROWS * hidden), sizeof *r);
    linear_view v, w;
    err e;
    MUST(weights_linear(t->src, ROLE_O, 0, -1, &v, &e));
    MUST(weights_linear(t->other, ROLE_O, 0, -1, &w, &e));
    tensor f = tensor_2d(malloc((size_t)(hidden * a->k) * 4), DT_F32, hidden, a->k);
    tensor_convert(&f, &v.dense);
    const float *x = f.data, *y = w.dense.data; /* f32 */
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t n = 0; n < hidden; n++)
            for (int64_t k = 0; k < a->k; k++)
                r[i * hidden + n] += a->x[i * a->k + k] * (double)x[n * a->k + k] -
                                     b->x[i * a->k + k] * (double)y[n * a->k + k];
    free(f.data);
    return r;
}

/* sum over the rows of a set of a^T b (a [rows,n] less `less`), against `have`. */
static void check_moment(const tensor *have, const double *a, const double *less, const double *b,
                         int64_t n, int64_t k, bool held, const char *what)
{
    double most = 0, worst = 0;
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < k; j++) {
            double sum = 0;
            for (int64_t r = 0; r < ROWS; r++)
                if ((r / SEQLEN == HELD) == held)
                    sum += (a[r * n + i] - (less ? less[r * n + i] : 0)) * b[r * k + j];
            most = fmax(most, fabs(sum));
            worst = fmax(worst, fabs(sum - ((float *)have->data)[i * k + j]));
        }
    ck_assert_msg(most > 0 && worst < 2e-3 * most, "%s: off by %g of %g", what, worst, most);
}

START_TEST(moments_of_two)
{
    two t;
    chain_moments set[2];
    err e;
    open_two(&t, small(tiny_llama()), KV_16);
    MUST(chain_gather(t.chain, ROLE_DOWN, NULL, &set[0], &set[1], &e));
    for (int64_t i = 0; i < tensor_count(&set[0].cross); i++) /* nothing is rounded */
        ck_assert(((float *)set[0].cross.data)[i] == 0.f);
    put(&t, ROLE_V);
    put(&t, ROLE_O);
    kept x = inputs(t.src, ROLE_DOWN), y = inputs(t.other, ROLE_DOWN), a = inputs(t.src, ROLE_O),
         b = inputs(t.other, ROLE_O);
    double *r = residuals(&t, &a, &b);
    MUST(chain_gather(t.chain, ROLE_DOWN, NULL, &set[0], &set[1], &e));
    for (int held = 0; held < 2; held++) {
        check_moment(&set[held].h, y.x, NULL, y.x, y.k, y.k, held, "h");
        check_moment(&set[held].cross, x.x, y.x, y.x, y.k, y.k, held, "cross");
        check_moment(&set[held].resid, r, NULL, y.x, t.m->hidden, y.k, held, "resid");
    }
    MUST(chain_gather(t.chain, ROLE_UP, NULL, &set[0], &set[1], &e));
    ck_assert(set[0].resid.data == NULL);
    free(x.x);
    free(y.x);
    x = inputs(t.src, ROLE_GATE);
    y = inputs(t.other, ROLE_GATE);
    check_moment(&set[0].cross, x.x, y.x, y.x, y.k, y.k, false, "cross of gate");
    free(x.x);
    free(y.x);
    free(a.x);
    free(b.x);
    free(r);
    close_two(&t);
}
END_TEST

/* The largest difference of two moments over the largest of the second. */
static double apart(const tensor *x, const double *want)
{
    double most = 0, worst = 0;
    for (int64_t i = 0; i < tensor_count(x); i++) {
        most = fmax(most, fabs(want[i]));
        worst = fmax(worst, fabs(((float *)x->data)[i] - want[i]));
    }
    return worst / most;
}

static double *doubles(const tensor *x)
{
    double *y = malloc((size_t)tensor_count(x) * sizeof *y);
    for (int64_t i = 0; i < tensor_count(x); i++) y[i] = ((float *)x->data)[i];
    return y;
}

/* The rounded stream behind a cache of few bits, its weights the model's own: what o and down see
 * is near what they see without, whatever factors keys and values have, and the nearer the more
 * bits the cache has. */
START_TEST(behind_a_cache)
{
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    static const tensor_role seen[] = {ROLE_O, ROLE_DOWN};
    const model_desc m = _i ? tiny_internlm2() : tiny_qwen2();
    double *want[2] = {0}, off[2][3];
    err e;
    for (int c = 0; c < 3; c++) {
        two t;
        chain_moments set[2];
        block_plan p;
        fold f;
        open_two(&t, small(m), formats[c]);
        random_folds(t.m, &p, 1, 3);
        MUST(fold_init(&f, t.m, &p, &e));
        MUST(chain_fold(t.chain, &f, &e));
        tensor_role roles[PLAN_LINEARS];
        const int n = model_block_linears(t.m, roles);
        weights_close(&t.other);
        t.other = changed_model(t.src, as_it_is);
        for (int i = 0; i < n && calib_tap_of(roles[i]) == ROLE_QKV; i++) put(&t, roles[i]);
        for (int s = 0; s < 2; s++) {
            MUST(chain_gather(t.chain, seen[s], NULL, &set[0], &set[1], &e));
            if (!want[s]) want[s] = doubles(&set[0].h);
            off[s][c] = apart(&set[0].h, want[s]);
            double lost = 0;
            for (int64_t i = 0; i < tensor_count(&set[0].cross); i++)
                lost = fmax(lost, fabs((double)((float *)set[0].cross.data)[i]));
            ck_assert((lost > 0) == (c > 0));
            put(&t, ROLE_O);
        }
        fold_free(&f);
        free_folds(&p);
        close_two(&t);
    }
    for (int s = 0; s < 2; s++) {
        ck_assert_msg(off[s][1] < 0.02, "8 bits: off by %g", off[s][1]);
        ck_assert_msg(off[s][2] < 0.2 && off[s][2] > off[s][1], "4 bits: %g, 8: %g", off[s][2],
                      off[s][1]);
        free(want[s]);
    }
}
END_TEST

/* ---- corrected weights ---- */

static const correct_opts halfway = {.ridge = 1e-6, .resid = 0.5};

static err_code given_rows(void *ctx, int64_t from, int64_t n, tensor *x, err *e)
{
    const tensor *w = ctx;
    (void)e;
    memcpy(x->data, (float *)w->data + from * w->shape[1],
           (size_t)(n * w->shape[1]) * sizeof(float));
    return OK;
}

static double loss_of(two *t, tensor_role r, const chain_moments *m, tensor *w)
{
    double loss;
    tensor y = chain_pulled(t->chain, r);
    err e;
    MUST(correct_pull(&t->b, r, m, &halfway, &y, &e));
    MUST(correct_loss(&t->b, r, m, &y, given_rows, w, &loss, &e));
    return loss;
}

/* sum over the windows trained on of |w y - W x - r/2|^2, in plain words. */
static double plain_loss(const tensor *w, const tensor *was, const kept *x, const kept *y,
                         const double *r)
{
    const int64_t n = w->shape[0], k = w->shape[1];
    double sum = 0;
    for (int64_t i = 0; i < ROWS; i++)
        for (int64_t q = 0; q < n && i / SEQLEN != HELD; q++) {
            double miss = -r[i * n + q] / 2;
            for (int64_t j = 0; j < k; j++)
                miss += (double)((float *)w->data)[q * k + j] * y->x[i * k + j] -
                        (double)((float *)was->data)[q * k + j] * x->x[i * k + j];
            sum += miss * miss;
        }
    return sum;
}

START_TEST(correction)
{
    two t;
    chain_moments set[2];
    uint32_t seed = 1;
    linear_view v;
    err e;
    open_two(&t, small(tiny_llama()), KV_16);
    put(&t, ROLE_V);
    put(&t, ROLE_O);
    kept x = inputs(t.src, ROLE_DOWN), y = inputs(t.other, ROLE_DOWN), a = inputs(t.src, ROLE_O),
         b = inputs(t.other, ROLE_O);
    double *r = residuals(&t, &a, &b);
    MUST(weights_linear(t.src, ROLE_DOWN, 0, -1, &v, &e));
    const int64_t n = v.dense.shape[0], k = v.dense.shape[1];
    tensor was = tensor_2d(malloc((size_t)(n * k) * 4), DT_F32, n, k), moved = was,
           best = chain_room(t.chain, ROLE_DOWN);
    moved.data = malloc((size_t)(n * k) * 4);
    tensor_convert(&was, &v.dense);
    for (int64_t i = 0; i < n * k; i++)
        ((float *)moved.data)[i] = ((float *)was.data)[i] + (float)(0.05 * next_value(&seed));
    MUST(chain_gather(t.chain, ROLE_DOWN, NULL, &set[0], &set[1], &e));
    const double have = loss_of(&t, ROLE_DOWN, &set[0], &moved) -
                        loss_of(&t, ROLE_DOWN, &set[0], &was),
                 want = plain_loss(&moved, &was, &x, &y, r) - plain_loss(&was, &was, &x, &y, r);
    ck_assert_msg(near(have, want, 5e-3), "%.9g, expected %.9g", have, want);

    float *factor = chain_scratch(t.chain);
    MUST(correct_factor(&t.b, ROLE_DOWN, &set[0], factor, &halfway, &e));
    MUST(correct_weights(&t.b, ROLE_DOWN, &set[0], factor, &halfway, &best, &e));
    const double least = plain_loss(&best, &was, &x, &y, r);
    ck_assert_msg(least < 0.6 * plain_loss(&was, &was, &x, &y, r), "%g of %g", least,
                  plain_loss(&was, &was, &x, &y, r));
    for (int trial = 0; trial < 4; trial++) { /* and no direction goes further down */
        for (int64_t i = 0; i < n * k; i++)
            ((float *)moved.data)[i] = ((float *)best.data)[i] + (float)(0.02 * next_value(&seed));
        ck_assert(plain_loss(&moved, &was, &x, &y, r) > least);
    }
    free(was.data);
    free(moved.data);
    free(x.x);
    free(y.x);
    free(a.x);
    free(b.x);
    free(r);
    close_two(&t);
}
END_TEST

/* ---- ranges and scales ---- */

/* H of correlated inputs, or its diagonal blocks alone. */
static void make_h(float *h, int64_t k, int64_t size)
{
    uint32_t seed = 3;
    double *x = malloc(sizeof(double) * 400 * (size_t)k);
    for (int t = 0; t < 400; t++) {
        const double common = next_value(&seed);
        for (int64_t i = 0; i < k; i++)
            x[t * k + i] = (next_value(&seed) + 0.7 * common) * (i % 7 ? 1 : 4);
    }
    for (int64_t i = 0; i < k; i++)
        for (int64_t j = 0; j < k; j++) {
            double sum = 0;
            for (int t = 0; t < 400; t++) sum += x[t * k + i] * x[t * k + j];
            h[i * k + j] = (float)(i / size == j / size ? sum : 0);
        }
    free(x);
}

static void open_linear(two *t, plan_linear *l, linear_target *target, int64_t size)
{
    uint32_t seed = 5;
    open_two(t, small(tiny_llama()), KV_16);
    const block_plan p = plan_shape(t->m, 32);
    for (int i = 0; i < p.n_linears; i++)
        if (p.linear[i].role == ROLE_GATE) *l = p.linear[i];
    const int64_t n = model_linear_n(t->m, ROLE_GATE), k = model_linear_k(t->m, ROLE_GATE);
    l->scale.data = calloc((size_t)tensor_count(&l->scale), 2);
    l->zero.data = calloc((size_t)tensor_count(&l->zero), 1);
    *target = (linear_target){ROLE_GATE, tensor_2d(malloc((size_t)(n * k) * 4), DT_F32, n, k),
                              tensor_2d(malloc((size_t)(k * k) * 4), DT_F32, k, k)};
    for (int64_t i = 0; i < n * k; i++) { /* long tails on one side */
        const double u = next_value(&seed) + next_value(&seed);
        ((float *)target->w.data)[i] = (float)(u + (i % 29 ? 0 : 2));
    }
    make_h(target->h.data, k, size);
    t->b.target = target;
}

static void close_linear(two *t, plan_linear *l, linear_target *target)
{
    free(l->scale.data);
    free(l->zero.data);
    free(target->w.data);
    free(target->h.data);
    close_two(t);
}

START_TEST(ranges_by_ends)
{
    static const range_grid grid = {8, 0.4}, one = {1, 0.5};
    two t;
    plan_linear l;
    linear_target target;
    double plain, fitted, same, stated;
    err e;
    open_linear(&t, &l, &target, 32);
    MUST(range_plain(&t.b, NULL, &l, &e));
    MUST(linear_loss(&t.b, ROLE_GATE, NULL, &l, &plain, &e));
    MUST(linear_loss(&t.b, ROLE_GATE, NULL, NULL, &stated, &e));
    ck_assert(plain == stated);
    MUST(range_fit(&t.b, NULL, &l, &one, &e)); /* the only candidate is the whole range */
    MUST(linear_loss(&t.b, ROLE_GATE, NULL, &l, &same, &e));
    ck_assert(same == plain);
    MUST(range_fit(&t.b, NULL, &l, &grid, &e));
    MUST(linear_loss(&t.b, ROLE_GATE, NULL, &l, &fitted, &e));
    ck_assert_msg(fitted < 0.95 * plain, "%g of %g", fitted, plain);
    close_linear(&t, &l, &target);
}
END_TEST

START_TEST(sweeps_and_scales)
{
    static const feedback_opts steps[] = {{.damping = 0.01},
                                          {.damping = 0.01, .sweeps = 1},
                                          {.damping = 0.01, .sweeps = 1, .refit = true},
                                          {.damping = 0.01, .sweeps = 3, .refit = true}};
    two t;
    plan_linear l;
    linear_target target;
    double before, loss = 0;
    err e;
    open_linear(&t, &l, &target, 1 << 20);
    MUST(range_plain(&t.b, NULL, &l, &e));
    MUST(linear_loss(&t.b, ROLE_GATE, NULL, &l, &before, &e));
    for (int i = 0; i < 4; i++) { /* every step goes down from where the one before it ended */
        MUST(range_plain(&t.b, NULL, &l, &e));
        MUST(feedback_codes(&t.b, NULL, &l, &steps[i], &e));
        MUST(linear_loss(&t.b, ROLE_GATE, NULL, &l, &loss, &e));
        ck_assert_msg(loss < before * (i ? 1 : 0.9), "step %d: %g, before it %g", i, loss, before);
        before = loss;
    }
    close_linear(&t, &l, &target);
}
END_TEST

/* ---- folds for the cache ---- */

/* Channel 3 of every value head and pair 2 of every key head are large. */
static void outliers(const model_desc *m, tensor_role r, int32_t layer, tensor *w)
{
    (void)layer;
    for (int64_t i = 0; i < tensor_count(w); i++) {
        const int64_t dim = i / w->shape[1] % m->head_dim, half = m->rope_dims / 2;
        if ((r == ROLE_V && dim == 3) || (r == ROLE_K && (dim == 2 || dim == 2 + half)))
            ((float *)w->data)[i] *= 20;
    }
}

/* One token's values of a head through 4 bits under the factors s: what o makes of the errors. */
static double value_error(const double *v, const float *s, const float *o, int64_t stride,
                          int64_t hidden, int64_t hd)
{
    double lo = INFINITY, hi = -INFINITY, sum = 0, miss[512];
    for (int64_t i = 0; i < hd; i++) {
        lo = fmin(lo, v[i] / s[i]);
        hi = fmax(hi, v[i] / s[i]);
    }
    const double step = (hi - lo) / 15;
    for (int64_t i = 0; i < hd; i++)
        miss[i] = (rint((v[i] / s[i] - lo) / step) * step + lo) * s[i] - v[i];
    for (int64_t n = 0; n < hidden; n++) {
        double y = 0;
        for (int64_t i = 0; i < hd; i++) y += o[n * stride + i] * miss[i];
        sum += y * y;
    }
    return sum;
}

/* The steps of other devices find the same factors, in memory that was lent or their own. */
static void same_on_device(const two *t, block_plan *want)
{
    static const tensor_role sources[] = {ROLE_K, ROLE_V};
    dev_buf room = {0};
    err e;
    MUST(dev_alloc(&room, dev, dev_fold_bytes(dev, t->m), "test", &e));
    for (int lent = 0; lent < 2; lent++) {
        block_plan p = plan_shape(t->m, 32);
        MUST(dev_fold_factors(&t->b, lent ? &room : NULL, &p, &e));
        for (int i = 0; i < 2; i++) {
            const tensor a = plan_find_fold(want, sources[i])->s,
                         b = plan_find_fold(&p, sources[i])->s;
            ck_assert(a.data && b.data);
            for (int64_t c = 0; c < tensor_count(&a); c++)
                ck_assert(near(((float *)a.data)[c], ((float *)b.data)[c], 1e-3));
        }
    }
    dev_free(&room);
}

START_TEST(folds_for_the_cache)
{
    two t;
    block_plan p;
    fold f;
    linear_view v, o;
    double before = 0, after = 0, value[512];
    err e;
    open_two(&t, small(tiny_llama()), KV_16);
    const int64_t hd = t.m->head_dim, share = t.m->heads / t.m->kv_heads, half = hd / 2;
    weight_src *plain = t.src;
    t.src = changed_model(plain, outliers);
    layer_walk_close(&t.walk);
    const tensor tokens = tensor_2d(ids, DT_I32, WINDOWS, SEQLEN);
    MUST(layer_walk_open(&t.walk, dev, t.src, &tokens, &e));
    MUST(layer_walk_bind(t.walk, 0, &e));
    t.b.src = t.src;
    t.b.walk = t.walk;
    p = plan_shape(t.m, 32);
    MUST(kv_fold_factors(&t.b, &p, &e));
    MUST(fold_init(&f, t.m, &p, &e)); /* pairs are equal, or it says so */
    fold_free(&f);
    const float *k = plan_find_fold(&p, ROLE_K)->s.data, *s = plan_find_fold(&p, ROLE_V)->s.data;
    kept x = inputs(t.src, ROLE_QKV);
    MUST(weights_linear(t.src, ROLE_V, 0, -1, &v, &e));
    MUST(weights_linear(t.src, ROLE_O, 0, -1, &o, &e));
    for (int64_t h = 0; h < t.m->kv_heads; h++) {
        double logs = 0, ones = 0;
        float one[512];
        for (int64_t i = 0; i < hd; i++) {
            one[i] = 1;
            ones += log(k[h * hd + i]);
            logs += log(s[h * hd + i]);
            ck_assert(k[h * hd + i] <= k[h * hd + 2] && s[h * hd + i] <= s[h * hd + 3]);
        }
        ck_assert(fabs(logs) < 1e-4 && fabs(ones) < 1e-4 && s[h * hd + 3] > 2 &&
                  k[h * hd + 2] > 2 && k[h * hd + 2] == k[h * hd + 2 + half]);
        for (int64_t r = 0; r < x.n; r += 5)
            for (int64_t q = 0; q < share; q++) {
                for (int64_t i = 0; i < hd; i++) {
                    value[i] = 0;
                    for (int64_t c = 0; c < x.k; c++)
                        value[i] += ((float *)v.dense.data)[(h * hd + i) * x.k + c] *
                                    x.x[r * x.k + c];
                }
                const float *at = (float *)o.dense.data + (h * share + q) * hd;
                before += value_error(value, one, at, o.dense.shape[1], t.m->hidden, hd);
                after += value_error(value, s + h * hd, at, o.dense.shape[1], t.m->hidden, hd);
            }
    }
    ck_assert_msg(after < 0.5 * before, "%g of %g", after, before);
    same_on_device(&t, &p);
    free(x.x);
    weights_close(&t.src);
    t.src = plain;
    close_two(&t);
}
END_TEST

/* A directory of 16-bit weights with a plan's factors is the same function. */
START_TEST(folded_alone)
{
    const pack_opts po = {
        .model_dir = model_dir, .plan_path = plan_path, .out_dir = awq_dir, .dense = true};
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    search_summary s;
    pack_summary ps;
    weight_src *src = NULL, *made = NULL;
    err e;
    make_model(small(forms[_i]));
    search_opts o = options("awq", NULL);
    o.kv_fold = 1;
    MUST(search_run(&s, dev, &o, NULL, &e));
    MUST(pack_run(&ps, dev, &po, NULL, &e));
    MUST(weights_open(&src, model_dir, &e));
    MUST(weights_open(&made, awq_dir, &e));
    ck_assert(weights_kind(made) == SRC_HF);
    const int32_t vocab = weights_desc(src)->vocab;
    const size_t n = SEQLEN * (size_t)vocab;
    double *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b), most = 0, size = 0;
    tiny_forward(a, src, ids, SEQLEN, NULL, NULL);
    tiny_forward(b, made, ids, SEQLEN, NULL, NULL);
    for (size_t i = 0; i < n; i++) {
        most = fmax(most, fabs(a[i] - b[i]));
        size = fmax(size, fabs(a[i]));
    }
    ck_assert_msg(most > 0 && most < 0.01 * size, "%g of %g", most, size);
    free(a);
    free(b);
    weights_close(&made);
    weights_close(&src);
    MUST(pack_run(&ps, dev, &po, NULL, &e));
    ck_assert(ps.fresh);
    o = options("gptq", NULL);
    o.kv_fold = 1;
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "'gptq' takes no factors") != NULL, "%s", e.msg);
    o = options("awq", "blocks");
    o.kv_fold = 1;
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
}
END_TEST

/* ---- what it brings ---- */

/* Mean squared error of the 4-bit directory's logits over the windows. */
static double logit_error(void)
{
    weight_src *src = NULL, *awq = NULL;
    err e;
    MUST(weights_open(&src, model_dir, &e));
    MUST(weights_open(&awq, awq_dir, &e));
    const int32_t vocab = weights_desc(src)->vocab;
    const size_t n = SEQLEN * (size_t)vocab;
    double *a = malloc(n * sizeof *a), *b = malloc(n * sizeof *b), sum = 0;
    for (int w = 0; w < WINDOWS; w++) {
        tiny_forward(a, src, ids + w * SEQLEN, SEQLEN, NULL, NULL);
        tiny_forward(b, awq, ids + w * SEQLEN, SEQLEN, NULL, NULL);
        for (size_t i = 0; i < n; i++) sum += (a[i] - b[i]) * (a[i] - b[i]);
    }
    free(a);
    free(b);
    weights_close(&awq);
    weights_close(&src);
    return sum;
}

START_TEST(carried_is_better)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    static const char *const methods[] = {"awq", "best"};
    const pack_opts po = {
        .model_dir = model_dir, .plan_path = plan_path, .out_dir = awq_dir, .force = true};
    search_summary s;
    pack_summary ps;
    double error[2];
    err e;
    model_desc m = small(forms[_i]);
    m.layers = 4;
    make_model(m);
    for (int i = 0; i < 2; i++) {
        const search_opts o = options(methods[i], NULL);
        MUST(search_run(&s, dev, &o, NULL, &e));
        MUST(pack_run(&ps, dev, &po, NULL, &e));
        error[i] = logit_error();
    }
    ck_assert_msg(error[1] < 0.7 * error[0], "best %g, awq %g", error[1], error[0]);
}
END_TEST

/* Each stage does something, and together they are worth their while. */
START_TEST(stages_left_out)
{
    static const char *const without[] = {"",
                                          "factors",
                                          "ranges",
                                          "sweeps",
                                          "scales",
                                          "correction",
                                          "held-out",
                                          "held-out,residual",
                                          "ranges,sweeps,correction"};
    enum { CASES = sizeof without / sizeof *without, HELD_OUT = 6 };
    const pack_opts po = {
        .model_dir = model_dir, .plan_path = plan_path, .out_dir = awq_dir, .force = true};
    search_opts o = options("best", NULL);
    search_summary s;
    pack_summary ps;
    double error[CASES];
    err e;
    model_desc m = small(tiny_llama());
    m.layers = 2;
    make_model(m);
    for (int i = 0; i < CASES; i++) {
        o.without = without[i];
        MUST(search_run(&s, dev, &o, NULL, &e));
        MUST(pack_run(&ps, dev, &po, NULL, &e));
        error[i] = logit_error();
        ck_assert_msg(i == 0 || error[i] != error[0], "without %s: as with it", without[i]);
    }
    /* o and down, which alone see the residual's error, fall back here where they may */
    ck_assert(error[HELD_OUT + 1] != error[HELD_OUT]);
    ck_assert_msg(error[0] < error[CASES - 1], "best %g, without most %g", error[0],
                  error[CASES - 1]);
    o.without = "sweeps,feet";
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "without 'feet': expected factors, vo") != NULL, "%s", e.msg);
    o = options("gptq", NULL);
    o.without = "sweeps";
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("awq_chain");
    TCase *t = tcase_create("awq_chain");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_test(t, moments_of_two);
    tcase_add_loop_test(t, behind_a_cache, 0, 2);
    tcase_add_test(t, correction);
    tcase_add_test(t, ranges_by_ends);
    tcase_add_test(t, sweeps_and_scales);
    tcase_add_test(t, folds_for_the_cache);
    tcase_add_loop_test(t, folded_alone, 0, 3);
    tcase_add_loop_test(t, carried_is_better, 0, 3);
    tcase_add_test(t, stages_left_out);
    suite_add_tcase(s, t);
    return suite_run(s);
}
