/* The parts of awq/ and calib/: folding, candidates and ranges against numbers made by NumPy,
 * statistics and losses against a plain forward pass. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/factors.h"
#include "awq/few.h"
#include "awq/fold.h"
#include "awq/measure.h"
#include "awq/module_loss.h"
#include "awq/smooth.h"
#include "base/half.h"
#include "formats/weights_mem.h"
#include "runtime/layer_walk.h"
#include "tests/support/awq_case.h"
#include "tests/support/golden_lines.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

/* ---- folding ---- */

static double next_value(uint32_t *x)
{
    return ((*x = *x * 1664525u + 1013904223u) >> 8) / 16777216.;
}

/* The model with every block folded, dense in f32. */
static weight_src *folded_model(weight_src *src)
{
    const model_desc *m = weights_desc(src);
    weights_mem *w = NULL;
    weight_src *out = NULL;
    tensor t;
    err e;
    MUST(weights_mem_open(&w, m, &e));
    static const tensor_role model[] = {ROLE_EMBED, ROLE_FINAL_NORM, ROLE_HEAD};
    for (int i = 0; i < (m->tied_embed ? 2 : 3); i++) {
        MUST(weights_tensor(src, model[i], -1, &t, &e));
        MUST(weights_mem_tensor(w, model[i], -1, &t, &e));
    }
    for (int32_t l = 0; l < m->layers; l++) {
        block_plan p;
        fold f;
        float *buf = malloc((size_t)1 << 22);
        random_folds(m, &p, 2, 77u + (uint32_t)l);
        MUST(fold_init(&f, m, &p, &e));
        for (int i = 0; i < 2; i++) {
            MUST(weights_tensor(src, i ? ROLE_FFN_NORM : ROLE_ATTN_NORM, l, &t, &e));
            MUST(fold_norm(buf, &t, f.norm[i], l, ROLE_ATTN_NORM, &e));
            t = tensor_1d(buf, DT_F32, m->hidden);
            MUST(weights_mem_tensor(w, i ? ROLE_FFN_NORM : ROLE_ATTN_NORM, l, &t, &e));
        }
        for (int i = 0; i < p.n_linears; i++) {
            linear_view v;
            float bias[4096];
            const tensor_role r = p.linear[i].role;
            MUST(weights_linear(src, r, l, -1, &v, &e));
            tensor rows = {.data = buf};
            MUST(fold_rows(&rows, &v.dense, fold_find(&f, r), 0, v.dense.shape[0], l, r, &e));
            v.dense = rows;
            if (v.bias.data) {
                MUST(fold_bias(bias, &v.bias, fold_find(&f, r), l, r, &e));
                v.bias = tensor_1d(bias, DT_F32, v.dense.shape[0]);
            }
            MUST(weights_mem_linear(w, r, l, &v, &e));
        }
        fold_free(&f);
        free_folds(&p);
        free(buf);
    }
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

/* A folded model is the same function: grouped-query, multi-head, fused and split projections, with
 * biases. */
START_TEST(folding_preserves)
{
    model_desc forms[4] = {tiny_llama(), tiny_internlm2(), tiny_qwen2(), tiny_llama()};
    forms[1].heads = 4;
    forms[1].kv_heads = 2;
    forms[1].head_dim = forms[1].rope_dims = 64;
    forms[3].kv_heads = forms[3].heads;
    const tiny_opts o = {.desc = forms[_i], .seed = 3};
    weight_src *src = NULL;
    err e;
    MUST(tiny_open(&src, &o, &e));
    weight_src *changed = folded_model(src);
    const int n = 12, vocab = forms[_i].vocab;
    double *a = malloc(sizeof(double) * (size_t)(n * vocab)),
           *b = malloc(sizeof(double) * (size_t)(n * vocab)), most = 0;
    tiny_forward(a, src, ids, n, NULL, NULL);
    tiny_forward(b, changed, ids, n, NULL, NULL);
    for (int i = 0; i < n * vocab; i++) most = fmax(most, fabs(a[i] - b[i]));
    ck_assert_msg(most < 1e-5, "logits differ by %g", most);
    free(a);
    free(b);
    weights_close(&changed);
    weights_close(&src);
}
END_TEST

START_TEST(folding_refuses)
{
    model_desc m = tiny_llama();
    block_plan p;
    fold f;
    err e;
    random_folds(&m, &p, 2, 5);
    ((float *)plan_find_fold(&p, ROLE_K)->s.data)[1] *= 2;
    ck_assert_int_eq(fold_init(&f, &m, &p, &e), E_INPUT);
    ck_assert(strstr(e.msg, "dims 1 and 33 rotate together") != NULL);
    ((float *)plan_find_fold(&p, ROLE_K)->s.data)[1] /= 2;
    m.qk_norm = true;
    ck_assert_int_eq(fold_init(&f, &m, &p, &e), E_UNSUPPORTED);
    free_folds(&p);
}
END_TEST

/* ---- one search against NumPy ---- */

typedef struct {
    model_desc m;
    weight_src *src;
    calib_block stats;
    quant_opts o;
    quant_scratch scratch;
    arena mem;
    block_plan plan;
    golden g;
} one_block;

static void *values(const one_block *b, const char *key, size_t size, int64_t n)
{
    void *p = calloc((size_t)n, size);
    golden_hex(b->g.text, key, p, size, n);
    return p;
}

/* hidden = ffn = one head of 64: every linear is 64 x 64, every H one block. */
static void open_block(one_block *b)
{
    weights_mem *w = NULL;
    err e;
    *b = (one_block){.m = tiny_desc(),
                     .o = {.group = 32, .loss = LOSS_BLOCKS},
                     .g = golden_open("awq_search.txt")};
    b->m.hidden = b->m.ffn = b->m.head_dim = b->m.rope_dims = 64;
    b->m.heads = b->m.kv_heads = 1;
    MUST(weights_mem_open(&w, &b->m, &e));
    float *norm = malloc(64 * 4), *gate = values(b, "gate", 4, 64 * 64),
          *up = values(b, "up", 4, 64 * 64);
    for (int i = 0; i < 64; i++) norm[i] = i == 5 ? 0.f : 1.f; /* "dead 5" */
    const tensor t = tensor_1d(norm, DT_F32, 64);
    linear_view v = {.dense = tensor_2d(gate, DT_F32, 64, 64)};
    MUST(weights_mem_tensor(w, ROLE_FFN_NORM, 0, &t, &e));
    MUST(weights_mem_linear(w, ROLE_GATE, 0, &v, &e));
    v.dense.data = up;
    MUST(weights_mem_linear(w, ROLE_UP, 0, &v, &e));
    MUST(weights_mem_random(w, 1, 0.1f, &e));
    MUST(weights_mem_source(&b->src, &w, &e));
    b->stats = calib_shape(&b->m);
    for (int i = 0; i < b->stats.n_taps; i++) {
        calib_tap *c = &b->stats.tap[i];
        c->count = 512;
        c->absmax = tensor_1d(values(b, "absmax", 4, 64), DT_F32, 64);
        c->abssum = tensor_1d(values(b, "abssum", 8, 64), DT_F64, 64);
        c->blocks = tensor_of(values(b, "h", 4, 64 * 64), DT_F32, 3, (const int64_t[]){1, 64, 64});
    }
    MUST(quant_scratch_init(&b->scratch, &b->m, true, &e));
    MUST(arena_init(&b->mem, plan_factors_bytes(&b->m, false), "test", &e));
    b->plan = plan_shape(&b->m, b->o.group);
    for (int i = 0; i < b->plan.n_linears; i++) {
        b->plan.linear[i].scale.data = calloc(64 * 2, 2);
        b->plan.linear[i].zero.data = calloc(64 * 2, 1);
    }
    MUST(ops_reserve(
        dev,
        &(op_limits){
            .rows = 4096, .k = 64, .n = 64, .heads = 1, .head_dim = 64, .max_kv = 1, .seqs = 1},
        &e));
    free(norm);
    free(gate);
    free(up);
}

static void close_block(one_block *b)
{
    for (int i = 0; i < b->stats.n_taps; i++) {
        free(b->stats.tap[i].absmax.data);
        free(b->stats.tap[i].abssum.data);
        free(b->stats.tap[i].blocks.data);
    }
    for (int i = 0; i < b->plan.n_linears; i++) {
        free(b->plan.linear[i].scale.data);
        free(b->plan.linear[i].zero.data);
    }
    quant_scratch_free(&b->scratch);
    arena_free(&b->mem);
    weights_close(&b->src);
    mem_free(b->g.text);
}

static quant_block as_quant_block(one_block *b)
{
    return (quant_block){.d = dev,
                         .src = b->src,
                         .m = &b->m,
                         .fam = family_by_name("llama"),
                         .o = &b->o,
                         .stats = &b->stats,
                         .scratch = &b->scratch,
                         .mem = &b->mem};
}

static void check_factors(one_block *b, const char *key)
{
    float *want = values(b, key, 4, 64);
    const float *have = plan_find_fold(&b->plan, ROLE_FFN_NORM)->s.data;
    ck_assert_ptr_nonnull(have);
    for (int i = 0; i < 64; i++)
        ck_assert_msg(near(have[i], want[i], 3e-7), "factor %d: %g, expected %g", i,
                      (double)have[i], (double)want[i]);
    ck_assert(have[5] == 1.f);
    free(want);
}

START_TEST(awq_against_numpy)
{
    one_block b;
    err e;
    open_block(&b);
    quant_block q = as_quant_block(&b);
    MUST(method_awq.plan_block(&q, &b.plan, &e));
    check_factors(&b, "factors");
    MUST(block_losses(&q, &b.plan, &e));
    static const tensor_role roles[] = {ROLE_GATE, ROLE_UP};
    for (int i = 0; i < 2; i++) {
        char key[32];
        int other = 0;
        const plan_linear *l = plan_find_linear(&b.plan, roles[i]);
        (void)snprintf(key, sizeof key, "%s.scale", role_name(roles[i]));
        f16 *scale = values(&b, key, 2, 128);
        (void)snprintf(key, sizeof key, "%s.zero", role_name(roles[i]));
        uint8_t *zero = values(&b, key, 1, 128);
        (void)snprintf(key, sizeof key, "%s.loss", role_name(roles[i]));
        double *loss = values(&b, key, 8, 2);
        for (int k = 0; k < 128; k++) { /* up's rows also carry 1/s of the group behind it */
            ck_assert_int_le(abs(((uint8_t *)l->zero.data)[k] - zero[k]), i);
            const float row = i ? ((float *)plan_find_fold(&b.plan, ROLE_UP)->s.data)[k / 2] : 1.f;
            const float have = f16_to_f32(((f16 *)l->scale.data)[k]) * row;
            if (i == 0) ck_assert(have == f16_to_f32(scale[k]));
            if (i == 1) other += !near(have, f16_to_f32(scale[k]), 2e-3);
        }
        ck_assert_int_le(other, 2); /* where two limits were as good */
        ck_assert_msg(near(l->loss_before, loss[0], 1e-4), "%.9g, expected %.9g", l->loss_before,
                      loss[0]);
        ck_assert_msg(near(l->loss_after, loss[1], i ? 1e-2 : 1e-4), "%.9g, expected %.9g",
                      l->loss_after, loss[1]);
        free(scale);
        free(zero);
        free(loss);
    }
    close_block(&b);
}
END_TEST

START_TEST(lmdeploy_against_numpy)
{
    one_block b;
    err e;
    open_block(&b);
    quant_block q = as_quant_block(&b);
    MUST(method_lmdeploy.plan_block(&q, &b.plan, &e));
    check_factors(&b, "lmdeploy");
    close_block(&b);
}
END_TEST

/* Channels that never fire, all-zero weights, one huge channel: factors stay finite and nothing
 * gets worse. */
START_TEST(degenerate_statistics)
{
    one_block b;
    err e;
    for (int what = 0; what < 4; what++) {
        open_block(&b);
        quant_block q = as_quant_block(&b);
        for (int i = 0; i < b.stats.n_taps; i++) {
            calib_tap *t = &b.stats.tap[i];
            for (int c = 0; c < 64; c++) {
                const double f = what == 0   ? 0
                                 : what == 1 ? (c == 9 ? 1e8 : 1)
                                 : what == 2 ? (c < 60 ? 0 : 1)
                                             : 1e-30;
                ((float *)t->absmax.data)[c] *= (float)f;
                ((double *)t->abssum.data)[c] *= f;
                for (int r = 0; r < 64; r++) {
                    ((float *)t->blocks.data)[c * 64 + r] *= (float)f;
                    ((float *)t->blocks.data)[r * 64 + c] *= (float)f;
                }
            }
        }
        const quant_method *const methods[] = {&method_awq, &method_lmdeploy};
        for (int k = 0; k < 2; k++) {
            arena_reset(&b.mem);
            for (int i = 0; i < PLAN_FOLDS; i++) b.plan.fold[i].s.data = NULL;
            MUST(methods[k]->plan_block(&q, &b.plan, &e));
            MUST(block_losses(&q, &b.plan, &e));
            for (int i = 0; i < PLAN_FOLDS; i++) {
                const float *s = b.plan.fold[i].s.data;
                for (int64_t c = 0; s && c < 64; c++) ck_assert(s[c] > 0.f && isfinite(s[c]));
            }
            double before = 0, after = 0;
            for (int i = 0; i < b.plan.n_linears; i++) {
                const plan_linear *l = &b.plan.linear[i];
                ck_assert(isfinite(l->loss_after));
                before += l->loss_before;
                after += l->loss_after;
            }
            if (k == 0)
                ck_assert_msg(after <= before * 1.0001 + 1e-30, "case %d: %g, %g", what, before,
                              after);
        }
        close_block(&b);
    }
}
END_TEST

/* ---- few tokens ---- */

/* Statistics of every input from `count` rows, which differ in size by channel. */
static void seen_rows(one_block *b, int64_t count)
{
    uint32_t x = 5;
    for (int i = 0; i < b->stats.n_taps; i++) {
        calib_tap *t = &b->stats.tap[i];
        float *h = t->blocks.data, row[64];
        t->count = count;
        memset(t->absmax.data, 0, 64 * sizeof(float));
        memset(t->abssum.data, 0, 64 * sizeof(double));
        memset(h, 0, 64 * 64 * sizeof(float));
        for (int64_t r = 0; r < count; r++) {
            for (int c = 0; c < 64; c++) {
                row[c] = (float)((next_value(&x) - 0.5) * (c % 9 ? 1 : 12));
                ((float *)t->absmax.data)[c] = fmaxf(((float *)t->absmax.data)[c], fabsf(row[c]));
                ((double *)t->abssum.data)[c] += fabsf(row[c]);
            }
            for (int c = 0; c < 64 * 64; c++) h[c] += row[c / 64] * row[c % 64];
        }
    }
}

/* Losses of the plan by what many rows say, over those of plain rounding. */
static double loss_by_many(one_block *b, const calib_block *few)
{
    const calib_block kept = b->stats;
    double before = 0, after = 0;
    err e;
    b->stats = *few;
    seen_rows(b, 4096);
    quant_block q = as_quant_block(b);
    MUST(block_losses(&q, &b->plan, &e));
    for (int i = 0; i < b->plan.n_linears; i++) {
        before += b->plan.linear[i].loss_before;
        after += b->plan.linear[i].loss_after;
    }
    b->stats = kept;
    return after / before;
}

/* Without a token, with 3, and with many: nothing is fitted to what was hardly seen. */
START_TEST(few_tokens_fall_back)
{
    static const int64_t counts[] = {0, 3, 512};
    const quant_method *const methods[] = {&method_awq, &method_lmdeploy};
    err e;
    for (int i = 0; i < 6; i++) {
        const int64_t count = counts[i / 2];
        const bool few = count < 64;
        void *mem;
        one_block b;
        open_block(&b);
        seen_rows(&b, count);
        const calib_block own = b.stats;
        MUST(few_stats(&b.stats, 0, &mem, NULL, &e));
        ck_assert((mem != NULL) == few && few_tokens(&b.stats, ROLE_UP) == few);
        const float *h = b.stats.tap[0].blocks.data;
        for (int c = 0; c < 64 * 64 && !count; c++) ck_assert(h[c] == (c / 64 == c % 64));
        quant_block q = as_quant_block(&b);
        MUST(methods[i % 2]->plan_block(&q, &b.plan, &e));
        bool factors = false;
        for (int k = 0; k < PLAN_FOLDS; k++) factors |= b.plan.fold[k].s.data != NULL;
        ck_assert(factors != few);
        const double left = loss_by_many(&b, &own);
        ck_assert_msg(i % 2 ? !few || left == 1 : left < (few ? 1.02 : 0.9),
                      "%s, %d tokens: %g of plain rounding's loss", methods[i % 2]->name,
                      (int)count, left);
        b.stats = own;
        mem_free(mem);
        close_block(&b);
    }
}
END_TEST

/* ---- statistics against a plain forward pass ---- */

typedef struct {
    double absmax[1024], abssum[1024], *h; /* h [k,k] */
    tensor_role role;
    int32_t layer;
    int64_t k, count;
} seen;

static void see(void *ctx, tensor_role role, int32_t layer, const double *x, int64_t n, int64_t k)
{
    seen *s = ctx;
    if (role != s->role || layer != s->layer) return;
    s->k = k;
    s->count += n;
    for (int64_t t = 0; t < n; t++)
        for (int64_t i = 0; i < k; i++) {
            s->absmax[i] = fmax(s->absmax[i], fabs(x[t * k + i]));
            s->abssum[i] += fabs(x[t * k + i]);
            for (int64_t j = 0; j < k; j++) s->h[i * k + j] += x[t * k + i] * x[t * k + j];
        }
}

static void check_tap(const calib_tap *t, const seen *s)
{
    ck_assert_int_eq(t->count, s->count);
    ck_assert_int_eq(t->k, s->k);
    double top = 0;
    for (int64_t i = 0; i < s->k; i++) top = fmax(top, s->h[i * s->k + i]);
    for (int64_t i = 0; i < s->k; i++) {
        const double mx = ((float *)t->absmax.data)[i], sum = ((double *)t->abssum.data)[i];
        ck_assert_msg(fabs(mx - s->absmax[i]) < 1e-3 * (1 + s->absmax[i]), "absmax %g, expected %g",
                      mx, s->absmax[i]);
        ck_assert_msg(near(sum, s->abssum[i], 1e-3), "abssum %g, expected %g", sum, s->abssum[i]);
        for (int64_t j = i / t->g * t->g; j < (i / t->g + 1) * t->g; j++) {
            const double h =
                ((float *)t->blocks.data)[i / t->g * t->g * t->g + i % t->g * t->g + j % t->g];
            ck_assert_msg(fabs(h - s->h[i * s->k + j]) < 1e-3 * top, "H[%d][%d] %g, expected %g",
                          (int)i, (int)j, h, s->h[i * s->k + j]);
        }
    }
}

START_TEST(statistics)
{
    model_desc m = small(_i ? tiny_internlm2() : tiny_qwen2());
    const tiny_opts o = {.desc = m, .seed = 9};
    weight_src *src = NULL;
    calib_file *f = NULL;
    calib_block b;
    err e;
    MUST(tiny_open(&src, &o, &e));
    collect_windows(src, WINDOWS);
    MUST(calib_open(&f, calib_path, &e));
    double *logits = malloc(sizeof(double) * SEQLEN * (size_t)m.vocab);
    for (int32_t l = 0; l < m.layers; l++) {
        MUST(calib_layer(f, l, &b, &e));
        for (int i = 0; i < b.n_taps; i++) {
            seen *s = calloc(1, sizeof *s);
            s->role = b.tap[i].tap;
            s->layer = l;
            s->h = calloc((size_t)(b.tap[i].k * b.tap[i].k), sizeof(double));
            for (int w = 0; w < WINDOWS; w++)
                tiny_forward(logits, src, ids + w * SEQLEN, SEQLEN, see, s);
            check_tap(&b.tap[i], s);
            free(s->h);
            free(s);
        }
    }
    free(logits);
    calib_close(&f);
    weights_close(&src);
}
END_TEST

/* ---- module losses against a plain forward pass ---- */

typedef struct {
    tensor_role role;
    double *x; /* [rows, k] behind one another */
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

/* Layer 0's linears behind a norm rounded to 4 bits (factors 1), all else as it is. */
static weight_src *rounded_model(weight_src *src, const smooth_group *g, int32_t group)
{
    const model_desc *m = weights_desc(src);
    weights_mem *w = NULL;
    weight_src *out = NULL;
    tensor t;
    err e;
    MUST(weights_mem_open(&w, m, &e));
    for (int32_t l = -1; l < m->layers; l++)
        for (tensor_role r = 0; r < ROLE_COUNT; r++) {
            linear_view v;
            const bool plain = l < 0 || r == ROLE_ATTN_NORM || r == ROLE_FFN_NORM;
            if (!weights_has(src, r, l, -1)) continue;
            if (plain) {
                MUST(weights_tensor(src, r, l, &t, &e));
                MUST(weights_mem_tensor(w, r, l, &t, &e));
                continue;
            }
            MUST(weights_linear(src, r, l, -1, &v, &e));
            bool target = false;
            for (int i = 0; i < g->n_targets; i++)
                target = target || (l == 0 && g->targets[i] == r);
            float *rows = NULL;
            if (target) {
                const int64_t n = v.dense.shape[0], k = v.dense.shape[1];
                rows = malloc((size_t)(n * k) * 4);
                tensor d = {.data = rows};
                MUST(fold_rows(&d, &v.dense, NULL, 0, n, 0, r, &e));
                for (int64_t at = 0; at < n * k;
                     at += group) { /* the rule once more, in plain words */
                    double lo = 0, hi = 0;
                    for (int i = 0; i < group; i++) {
                        lo = fmin(lo, rows[at + i]);
                        hi = fmax(hi, rows[at + i]);
                    }
                    const double step = f16_to_f32(f32_to_f16((float)((hi - lo) / 15))),
                                 z = rint(-lo / step);
                    for (int i = 0; i < group; i++)
                        rows[at + i] =
                            (float)((fmin(fmax(rint(rows[at + i] / step) + z, 0), 15) - z) * step);
                }
                v.dense = d;
            }
            MUST(weights_mem_linear(w, r, l, &v, &e));
            free(rows);
        }
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

START_TEST(module_loss_against_plain)
{
    const smooth_group groups[] = {{ROLE_ATTN_NORM, {ROLE_Q, ROLE_K, ROLE_V}, 3},
                                   {ROLE_FFN_NORM, {ROLE_GATE, ROLE_UP}, 2}};
    const smooth_group *g = &groups[_i];
    const tensor_role last = _i ? ROLE_DOWN : ROLE_O;
    model_desc m = tiny_llama();
    const tiny_opts o = {.desc = m, .seed = 4};
    weight_src *src = NULL;
    layer_walk *walk = NULL;
    quant_scratch scratch;
    quant_opts qo = {.group = 64, .loss = LOSS_MODULE};
    err e;
    MUST(tiny_open(&src, &o, &e));
    weight_src *other = rounded_model(src, g, qo.group);
    const tensor tokens = tensor_2d(ids, DT_I32, WINDOWS, SEQLEN);
    MUST(layer_walk_open(&walk, dev, src, &tokens, &e));
    MUST(layer_walk_bind(walk, 0, &e));
    MUST(quant_scratch_init(&scratch, &m, true, &e));
    const quant_block b = {.d = dev,
                           .src = src,
                           .m = &m,
                           .fam = family_by_name("llama"),
                           .o = &qo,
                           .walk = walk,
                           .scratch = &scratch};
    float *s = malloc(256 * 4);
    for (int i = 0; i < 256; i++) s[i] = 1.f;
    double loss, want = 0, *logits = malloc(sizeof(double) * SEQLEN * (size_t)m.vocab);
    MUST(module_losses(&b, g, s, 1, &loss, &e));

    kept x = {.role = last, .x = malloc(sizeof(double) * WINDOWS * SEQLEN * 384)}, y = x;
    y.x = malloc(sizeof(double) * WINDOWS * SEQLEN * 384);
    for (int w = 0; w < WINDOWS; w++) {
        tiny_forward(logits, src, ids + w * SEQLEN, SEQLEN, keep, &x);
        tiny_forward(logits, other, ids + w * SEQLEN, SEQLEN, keep, &y);
    }
    linear_view v;
    float *rows = malloc(sizeof(float) * 256 * 384);
    tensor d = {.data = rows};
    MUST(weights_linear(src, last, 0, -1, &v, &e));
    MUST(fold_rows(&d, &v.dense, NULL, 0, 256, 0, last, &e));
    for (int64_t t = 0; t < x.n; t++)
        for (int64_t n = 0; n < 256; n++) {
            double sum = 0;
            for (int64_t i = 0; i < x.k; i++)
                sum += (x.x[t * x.k + i] - y.x[t * x.k + i]) * rows[n * x.k + i];
            want += sum * sum;
        }
    ck_assert_msg(want > 0 && near(loss, want, 2e-3), "%.9g, expected %.9g", loss, want);
    free(rows);
    free(x.x);
    free(y.x);
    free(s);
    free(logits);
    quant_scratch_free(&scratch);
    layer_walk_close(&walk);
    weights_close(&other);
    weights_close(&src);
}
END_TEST

/* ---- candidates by some of the rows ---- */

enum { WIDE = 1024, K = 64 }; /* rows of gate and of up; their inputs */

/* A block whose gate and up are tall, H of their input and its mean |x|, in channels of very
 * different size. */
static void open_tall(one_block *b, float *h, double *abssum)
{
    weights_mem *w = NULL;
    uint32_t seed = 3;
    err e;
    *b = (one_block){.m = tiny_desc(), .o = {.group = 32, .loss = LOSS_GRAM}};
    b->m.hidden = b->m.head_dim = b->m.rope_dims = K;
    b->m.ffn = WIDE;
    b->m.heads = b->m.kv_heads = 1;
    MUST(weights_mem_open(&w, &b->m, &e));
    MUST(weights_mem_random(w, 1, 0.1f, &e));
    MUST(weights_mem_source(&b->src, &w, &e));
    memset(h, 0, K * K * sizeof *h);
    memset(abssum, 0, K * sizeof *abssum);
    for (int r = 0; r < 4 * K; r++) {
        double x[K];
        for (int i = 0; i < K; i++) x[i] = next_value(&seed) * exp2(i % 7 - 3);
        for (int i = 0; i < K; i++) abssum[i] += fabs(x[i]);
        for (int i = 0; i < K * K; i++) h[i] += (float)(x[i / K] * x[i % K]);
    }
    b->stats = calib_shape(&b->m);
    for (int i = 0; i < b->stats.n_taps; i++) {
        b->stats.tap[i].count = 4 * K;
        b->stats.tap[i].abssum = tensor_1d(abssum, DT_F64, K);
    }
    MUST(quant_scratch_init(&b->scratch, &b->m, true, &e));
    MUST(arena_init(&b->mem, 2 * plan_factors_bytes(&b->m, false), "test", &e));
    MUST(ops_reserve(
        dev,
        &(op_limits){
            .rows = 4096, .k = WIDE, .n = WIDE, .heads = 1, .head_dim = K, .max_kv = 1, .seqs = 1},
        &e));
}

/* Candidates' losses are the same taken together and alone, about a quarter over one row in four,
 * and these find what all rows find. */
START_TEST(thinned_candidates)
{
    one_block b;
    float h[K * K], s[5 * K];
    double abssum[K], loss[5], alone, part[5];
    err e;
    open_tall(&b, h, abssum);
    quant_block q = as_quant_block(&b);
    const linear_target target = {ROLE_GATE, {0}, tensor_2d(h, DT_F32, K, K)};
    const smooth_group g = {ROLE_FFN_NORM, {ROLE_GATE, ROLE_UP}, 2};
    q.target = &target;
    for (int i = 0; i < 5 * K; i++) s[i] = (float)pow(abssum[i % K], i / K / 5.);
    MUST(smooth_losses(&q, &g, s, 5, 1, loss, &e));
    MUST(smooth_losses(&q, &g, s, 5, 4, part, &e));
    for (int c = 0; c < 5; c++) {
        MUST(smooth_losses(&q, &g, s + c * K, 1, 1, &alone, &e));
        ck_assert(alone == loss[c]);
        ck_assert_msg(near(4 * part[c], loss[c], 0.1), "%g of %g", part[c], loss[c]);
    }
    float *found[2];
    for (int thin = 0; thin < 2; thin++) {
        b.plan = plan_shape(&b.m, b.o.group);
        MUST(factors_search(&q, &g, thin, &b.plan, &e));
        found[thin] = plan_find_fold(&b.plan, ROLE_FFN_NORM)->s.data;
        ck_assert_ptr_nonnull(found[thin]);
    }
    ck_assert_mem_eq(found[0], found[1], K * sizeof(float));
    quant_scratch_free(&b.scratch);
    arena_free(&b.mem);
    weights_close(&b.src);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("awq_parts");
    TCase *t = tcase_create("awq_parts");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, folding_preserves, 0, 4);
    tcase_add_test(t, folding_refuses);
    tcase_add_test(t, awq_against_numpy);
    tcase_add_test(t, lmdeploy_against_numpy);
    tcase_add_test(t, degenerate_statistics);
    tcase_add_test(t, few_tokens_fall_back);
    tcase_add_loop_test(t, statistics, 0, 2);
    tcase_add_loop_test(t, module_loss_against_plain, 0, 2);
    tcase_add_test(t, thinned_candidates);
    suite_add_tcase(s, t);
    return suite_run(s);
}
