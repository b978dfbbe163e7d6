/* "best": AWQ's factors, then linear by linear, each behind the rounded ones before it: weights
 * corrected for the error of their inputs, ranges with a share for either end, error feedback,
 * sweeps that move codes and scales. What does no better on windows held out falls back to AWQ's
 * range or to plain rounding. */
#include <math.h>
#include <string.h>

#include "awq/chain.h"
#include "awq/correct.h"
#include "awq/dev_best.h"
#include "awq/factors.h"
#include "awq/feedback.h"
#include "awq/few.h"
#include "awq/pace.h"
#include "awq/range.h"
#include "base/mem.h"
#include "kernels/quant_group.h"

#define STEP CORRECT_ROWS

static const best_opts all_stages = {.correction = {.ridge = 0.01, .resid = 0.5},
                                     .feeding = {.damping = 0.01, .sweeps = 2, .refit = true},
                                     .ends = {8, 0.4},
                                     .limits = {10, 0.5},
                                     .corrects = true,
                                     .falls_back = true};

/* One linear on its way. */
typedef struct {
    const quant_block *b;
    const best_opts *o;
    const fold *f; /* NULL: no factors */
    plan_linear *out;
    const chain_moments *held; /* what it is judged by */
    tensor pulled;             /* of these (correct_pull) */
    float *tile;               /* weights with their factors, f32 [STEP,k] */
} judged;

/* Rows of the linear under the plan that is there, from the model's own weights. */
static err_code rows_of(void *ctx, int64_t from, int64_t n, tensor *x, err *e)
{
    const judged *j = ctx;
    const fold_linear *f = j->f ? fold_find(j->f, j->out->role) : NULL;
    tensor w = tensor_2d(j->tile, DT_F32, n, x->shape[1]);
    if (!j->out->codes.data) {
        linear_view v;
        TRY(weights_linear(j->b->src, j->out->role, j->b->layer, -1, &v, e));
        TRY(fold_rows(&w, &v.dense, f, from, n, j->b->layer, j->out->role, e));
    }
    return plan_rows(j->b, &w, j->out, f, from, x, e);
}

static err_code judge(judged *j, double *loss, err *e)
{
    return correct_loss(j->b, j->out->role, j->held, &j->pulled, rows_of, j, loss, e);
}

/* Codes by rounding the model's weights, for the scale and zero that are there. */
static err_code round_codes(judged *j, void *codes, err *e)
{
    plan_linear *l = j->out;
    const int64_t n = l->codes.shape[0], k = 2 * l->codes.shape[1], step = STEP;
    const fold_linear *f = fold_find(j->f, l->role);
    linear_view v;
    void *mem;
    TRY(weights_linear(j->b->src, l->role, j->b->layer, -1, &v, e));
    TRY(mem_alloc(&mem, (size_t)(step * k), 1, "codes", e));
    err_code rc = OK;
    for (int64_t at = 0; at < n && rc == OK; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        tensor w = tensor_2d(j->tile, DT_F32, rows, k), c = tensor_2d(mem, DT_U8, rows, k);
        const tensor scale = tensor_rows(&l->scale, at, rows),
                     zero = tensor_rows(&l->zero, at, rows);
        if ((rc = fold_rows(&w, &v.dense, f, at, rows, j->b->layer, l->role, e)) != OK) break;
        rc = op_quant_codes(j->b->d, &c, &w, &scale, &zero, j->b->o->group, e);
        for (int64_t i = 0; i < rows * k / 2; i++)
            ((uint8_t *)codes)[at * k / 2 + i] = (uint8_t)(((uint8_t *)mem)[2 * i] |
                                                           ((uint8_t *)mem)[2 * i + 1] << 4);
    }
    mem_free(mem);
    if (rc == OK) l->codes.data = codes;
    return rc;
}

/* The two ways to fall back to, by index; codes are left to rounding. */
static err_code fall_back(judged *j, int way, err *e)
{
    return way ? range_search(j->b, j->f, j->out, &j->o->limits, e)
               : range_plain(j->b, j->f, j->out, e);
}

static err_code round_target(judged *j, const chain_moments *train, tensor *w, err *e)
{
    quant_block q = *j->b;
    const linear_target target = {j->out->role, *w, train->h};
    q.target = &target;
    TRY(range_fit(&q, j->f, j->out, &j->o->ends, e));
    return feedback_codes(&q, j->f, j->out, &j->o->feeding, e);
}

/* Plain rounding of the model's own weights, as far as it is from the corrected ones. */
static err_code distance_before(judged j, const chain_moments *train, const tensor *w, err *e)
{
    j.f = NULL;
    TRY(range_plain(j.b, NULL, j.out, e));
    return correct_distance(j.b, j.out->role, w, &train->h, rows_of, &j, &j.out->loss_before, e);
}

/* Rounds one linear and keeps the best way. w: the corrected weights, then the rounded ones. */
static err_code round_linear(judged *j, const chain_moments *train, tensor *w, err *e)
{
    void *codes;
    double loss[3];
    int best = 2;
    TRY(arena_get(j->b->mem, &codes, (size_t)tensor_count(&j->out->codes), e));
    TRY(correct_pull(j->b, j->out->role, j->held, &j->o->correction, &j->pulled, e));
    TRY(distance_before(*j, train, w, e));
    for (int way = 0; way < 2; way++) {
        TRY(fall_back(j, way, e));
        TRY(judge(j, &loss[way], e));
    }
    j->out->codes.data = codes;
    TRY(round_target(j, train, w, e));
    TRY(judge(j, &loss[2], e));
    for (int way = 0; way < 2 && j->o->falls_back; way++)
        if (loss[way] < loss[best]) best = way;
    job_log(j->b->j, LOG_DEBUG, "layer %d: %s: plain %.6g, range %.6g, feedback %.6g",
            (int)j->b->layer, role_name(j->out->role), loss[0], loss[1], loss[2]);
    const bool few = few_tokens(j->b->stats, j->out->role);
    if (few) best = 1;
    if (best == 2) return OK;
    if (!few)
        job_log(j->b->j, LOG_INFO, "layer %d: %s: %s does better on held-out windows",
                (int)j->b->layer, role_name(j->out->role),
                best ? "a searched range" : "plain rounding");
    j->out->codes.data = NULL;
    TRY(fall_back(j, best, e));
    return round_codes(j, codes, e);
}

/* The rounded weights into the chain, their loss on the windows trained on into the plan. */
static err_code hand_on(judged *j, const chain_moments *train, tensor *w, err *e)
{
    TRY(correct_distance(j->b, j->out->role, w, &train->h, rows_of, j, &j->out->loss_after, e));
    for (int64_t at = 0; at < w->shape[0]; at += STEP) {
        const int64_t n = w->shape[0] - at < STEP ? w->shape[0] - at : STEP;
        tensor x = tensor_rows(w, at, n);
        TRY(rows_of(j, at, n, &x, e));
    }
    chain_put(j->b->chain, j->out->role);
    return OK;
}

/* The linears of one input. */
typedef struct {
    tensor_role role[3];
    int n;
} tap_linears;

static void clear(const tensor *t)
{
    if (t->data) memset(t->data, 0, tensor_bytes(t));
}

static err_code round_tap(const quant_block *b, const best_opts *o, const fold *f, block_plan *out,
                          const tap_linears *tap, float *tile, err *e)
{
    chain_moments train, held;
    TRY(chain_gather(b->chain, tap->role[0], b->j, &train, &held, e));
    pace_step(b->pace);
    if (!o->corrects) {
        clear(&train.cross);
        clear(&train.resid);
    }
    float *factor = chain_scratch(b->chain);
    TRY(correct_factor(b, tap->role[0], &train, factor, &o->correction, e));
    for (int i = 0; i < tap->n; i++) {
        judged j = {b,     o,
                    f,     plan_find_linear(out, tap->role[i]),
                    &held, chain_pulled(b->chain, tap->role[i]),
                    tile};
        tensor w = chain_room(b->chain, tap->role[i]);
        TRY(correct_weights(b, tap->role[i], &train, factor, &o->correction, &w, e));
        TRY(round_linear(&j, &train, &w, e));
        TRY(hand_on(&j, &train, &w, e));
        pace_step(b->pace);
    }
    return OK;
}

static err_code round_block(const quant_block *b, const best_opts *o, const fold *f,
                            block_plan *out, err *e)
{
    static const tap_linears split = {{ROLE_Q, ROLE_K, ROLE_V}, 3}, fused = {{ROLE_QKV}, 1},
                             rest[] = {{{ROLE_O}, 1}, {{ROLE_GATE, ROLE_UP}, 2}, {{ROLE_DOWN}, 1}};
    void *tile;
    if (f) TRY(chain_fold(b->chain, f, e));
    TRY(mem_alloc(&tile, STEP * (size_t)b->scratch->widest, sizeof(float), "rows to round", e));
    err_code rc = round_tap(b, o, f, out, b->m->qkv == QKV_SPLIT ? &split : &fused, tile, e);
    for (int i = 0; i < 3 && rc == OK; i++) rc = round_tap(b, o, f, out, &rest[i], tile, e);
    mem_free(tile);
    return rc;
}

static best_opts stages_of(uint32_t without)
{
    best_opts o = all_stages;
    if (without & STAGE_RANGES) o.ends = (range_grid){1, 0};
    if (without & STAGE_SWEEPS) o.feeding.sweeps = 0;
    if (without & (STAGE_SWEEPS | STAGE_SCALES)) o.feeding.refit = false;
    if (without & STAGE_RESIDUAL) o.correction.resid = 0;
    o.corrects = !(without & STAGE_CORRECTION);
    o.falls_back = !(without & STAGE_HELD_OUT);
    return o;
}

static err_code plan_best(const quant_block *b, block_plan *out, err *e)
{
    const uint32_t without = b->o->without;
    const smooth_groups groups = smooth_groups_of(b, without & STAGE_VO ? VO_NONE : VO_SHARED);
    const best_opts o = stages_of(without);
    fold f;
    for (int i = 0; i < groups.n && !(without & STAGE_FACTORS); i++) {
        TRY(factors_search(b, &groups.g[i], true, out, e));
        pace_step(b->pace);
    }
    TRY(fold_init(&f, b->m, out, e));
    const err_code rc = b->dev ? dev_best_block(b, &f, out, &o, e) : round_block(b, &o, &f, out, e);
    fold_free(&f);
    return rc;
}

const quant_method method_best = {
    .name = "best",
    .summary = "awq's factors, weights corrected for rounded inputs, error feedback, sweeps",
    .needs = METHOD_CALIB,
    .loss = LOSS_GRAM,
    .searches = true,
    .fixes_codes = true,
    .stages = true,
    .folds = true,
    .carries = true,
    .plan_block = plan_best};
