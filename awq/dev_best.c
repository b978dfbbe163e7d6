/* best on a device. As method_best.c has it, tile by tile of rows: a tile's corrected weights, its
 * three ways of rounding and what each loses are made while it is there. */
#include "awq/dev_best.h"

#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "awq/chain_shared.h"
#include "awq/dev_chain.h"
#include "awq/dev_feedback.h"
#include "awq/few.h"
#include "awq/pace.h"

enum { WAYS = DEV_WAYS, FEEDBACK = WAYS - 1 }; /* plain, a searched range, feedback */
/* Rows of sums. */
enum { SUM_BEFORE, SUM_AFTER, SUM_FORM, SUM_DOT = SUM_FORM + WAYS, SUMS = SUM_DOT + WAYS };

typedef struct {
    const quant_block *b;
    dev_scratch *s;
    const best_opts *o;
    const fold *f;
    dev_moments train, held; /* train.lack solved */
    plan_linear *out;
    const fold_linear *fl;
    tensor w; /* bound, [n,k] */
    int64_t n, k, at, rows;
    dev_factors v;
    tensor blocks; /* diagonal ones of the calib file */
} rounding;

static err_code solve_lack(rounding *q, tensor_role r, err *e)
{
    const tensor l = dev_2d(q->s, q->s->factor, DT_F32, q->k, q->k);
    TRY(dev_feedback_ridge(q->b, r, &q->train.h, q->o->correction.ridge, e));
    return op_solve(q->b->d, &q->train.lack, &l, e);
}

/* ---- a tile ---- */

static tensor tile(const rounding *q, int i)
{
    return dev_2d(q->s, q->s->tile[i], DT_F32, q->rows, q->k);
}

static tensor row_factors(const rounding *q)
{
    return q->v.row.data ? tensor_rows(&q->v.row, q->at, q->rows) : q->v.row;
}

static tensor sums_of(const rounding *q, int which)
{
    return dev_1d(q->s, q->s->sums + which * q->n + q->at, DT_F64, q->rows);
}

static tensor scale_of(const rounding *q, int way)
{
    const tensor t = dev_2d(q->s, q->s->ways_scale[way], DT_F16, q->n, q->k / q->s->g);
    return tensor_rows(&t, q->at, q->rows);
}

static tensor zero_of(const rounding *q, int way)
{
    const tensor t = dev_2d(q->s, q->s->ways_zero[way], DT_U8, q->n, q->k / q->s->g);
    return tensor_rows(&t, q->at, q->rows);
}

static tensor packed_of(const rounding *q)
{
    const tensor t = dev_2d(q->s, q->s->packed, DT_U8, q->n, q->k / 2);
    return tensor_rows(&t, q->at, q->rows);
}

static round_state state_of(const rounding *q, int way)
{
    return (round_state){dev_2d(q->s, q->s->codes, DT_U8, q->rows, q->k), scale_of(q, way),
                         zero_of(q, way), dev_2d(q->s, q->s->work, DT_F32, q->rows, 128), q->s->g};
}

/* y (+)= what the linear's outputs lack: of the model's rows x, by the input's lack or their
 * own. */
static err_code pull(const rounding *q, const dev_moments *m, const tensor *x, tensor *y, err *e)
{
    if (!chain_adds(q->out->role)) return op_matmul(q->b->d, y, x, &m->lack, e);
    const tensor own = tensor_rows(&m->lack, q->at, q->rows);
    return op_mix(q->b->d, y, 1.f, &own, 0.f, NULL, e);
}

/* Tile 0: the model's weights, tile 1: corrected ones. */
static err_code load_weights(rounding *q, err *e)
{
    tensor w = tile(q, 0), target = tile(q, 1);
    const tensor from = tensor_rows(&q->w, q->at, q->rows);
    TRY(op_scaled(q->b->d, &w, &from, NULL, NULL, e));
    TRY(pull(q, &q->train, &w, &target, e));
    return op_mix(q->b->d, &target, 1.f, &target, 1.f, &w, e);
}

/* Plain rounding of the model's weights, as far as it is from the corrected ones. */
static err_code distance_before(rounding *q, err *e)
{
    const tensor w = tile(q, 0), target = tile(q, 1);
    tensor scale = scale_of(q, 0), zero = zero_of(q, 0), x = tile(q, 2), work = tile(q, 3),
           sum = sums_of(q, SUM_BEFORE);
    const range_spec plain = {&q->train.h, NULL, q->s->g, 1, 0, false};
    const rounded_spec spec = {&w, NULL, &scale, &zero, NULL, NULL, q->s->g};
    TRY(op_range(q->b->d, &scale, &zero, &w, &plain, e));
    TRY(op_rounded(q->b->d, &x, &spec, e));
    TRY(op_mix(q->b->d, &x, 1.f, &x, -1.f, &target, e));
    return op_form(q->b->d, &sum, &x, &q->train.h, &work, e);
}

/* Tile 2: weights of tile `from` with their factors. */
static err_code with_factors(rounding *q, int from, err *e)
{
    const tensor w = tile(q, from), row = row_factors(q);
    tensor x = tile(q, 2);
    return op_scaled(q->b->d, &x, &w, dev_opt(&q->v.col), dev_opt(&row), e);
}

static err_code fall_back(rounding *q, int way, err *e)
{
    const range_grid *g = &q->o->limits;
    tensor scale = scale_of(q, way), zero = zero_of(q, way), x = tile(q, 2);
    const range_spec spec = {&q->blocks,          dev_opt(&q->v.col),  q->s->g,
                             way ? g->points : 1, way ? g->shrink : 0, false};
    TRY(with_factors(q, 0, e));
    return op_range(q->b->d, &scale, &zero, &x, &spec, e);
}

static err_code feed(rounding *q, err *e)
{
    const range_grid *g = &q->o->ends;
    round_state st = state_of(q, FEEDBACK);
    tensor x = tile(q, 2), y = tile(q, 3), grad = tile(q, 4), packed = packed_of(q);
    const range_spec spec = {&q->train.h, dev_opt(&q->v.col), q->s->g, g->points, g->shrink, true};
    TRY(with_factors(q, 1, e));
    TRY(op_range(q->b->d, &st.scale, &st.zero, &x, &spec, e));
    TRY(dev_feedback_rows(q->b, &st, &x, &y, &grad, &q->train.h, &q->v, &q->o->feeding, e));
    return op_pack_codes(q->b->d, &packed, &st, NULL, e);
}

/* Tile 2: rounded weights as they act on the unscaled input. */
static err_code rounded_weights(rounding *q, int way, err *e)
{
    const tensor scale = scale_of(q, way), zero = zero_of(q, way), packed = packed_of(q),
                 row = row_factors(q);
    tensor x = tile(q, 2);
    rounded_spec spec = {&x, NULL, &scale, &zero, dev_opt(&q->v.col), dev_opt(&row), q->s->g};
    if (way == FEEDBACK) {
        spec.w = NULL;
        spec.codes = &packed;
    } else {
        TRY(with_factors(q, 0, e));
    }
    return op_rounded(q->b->d, &x, &spec, e);
}

/* On windows held out: tr(E H E^T) - 2 tr(E lack^T), E what rounding changes; tile 3: the lack. */
static err_code judge(rounding *q, int way, err *e)
{
    const tensor w = tile(q, 0), lack = tile(q, 3);
    tensor x = tile(q, 2), form = sums_of(q, SUM_FORM + way), dot = sums_of(q, SUM_DOT + way),
           half = dev_2d(q->s, q->s->tile[4], DT_BF16, q->rows, q->k);
    TRY(rounded_weights(q, way, e));
    TRY(op_mix(q->b->d, &x, 1.f, &x, -1.f, &w, e));
    TRY(op_row_dots(q->b->d, &dot, &x, &lack, e));
    TRY(op_mix(q->b->d, &half, 1.f, &x, 0.f, NULL, e));
    return op_form(q->b->d, &form, &half, &q->held.h, &x, e);
}

static err_code distance_after(rounding *q, int way, err *e)
{
    const tensor target = tile(q, 1);
    tensor x = tile(q, 2), work = tile(q, 4), sum = sums_of(q, SUM_AFTER);
    TRY(rounded_weights(q, way, e));
    TRY(op_mix(q->b->d, &x, 1.f, &x, -1.f, &target, e));
    return op_form(q->b->d, &sum, &x, &q->train.h, &work, e);
}

static err_code round_tile(rounding *q, err *e)
{
    const tensor w = tile(q, 0);
    tensor lack = tile(q, 3);
    TRY(job_check(q->b->j, e));
    TRY(load_weights(q, e));
    TRY(distance_before(q, e));
    for (int way = 0; way < FEEDBACK; way++) TRY(fall_back(q, way, e));
    TRY(feed(q, e));
    TRY(distance_after(q, FEEDBACK, e));
    TRY(pull(q, &q->held, &w, &lack, e));
    for (int way = 0; way < WAYS; way++) TRY(judge(q, way, e));
    return OK;
}

/* ---- a linear ---- */

typedef err_code (*tile_fn)(rounding *q, err *e);

static err_code each_tile(rounding *q, tile_fn f, err *e)
{
    const int64_t step = dev_step(q->s, q->k);
    for (q->at = 0; q->at < q->n; q->at += q->rows) {
        q->rows = q->n - q->at < step ? q->n - q->at : step;
        TRY(f(q, e));
    }
    return OK;
}

/* Codes by plain rounding for a way that has none, and its distance. */
static err_code fall_back_tile(rounding *q, int way, err *e)
{
    const round_state st = state_of(q, way);
    tensor packed = packed_of(q), x = tile(q, 2);
    TRY(load_weights(q, e));
    TRY(with_factors(q, 0, e));
    TRY(op_pack_codes(q->b->d, &packed, &st, &x, e));
    return distance_after(q, way, e);
}
static err_code plain_tile(rounding *q, err *e) { return fall_back_tile(q, 0, e); }
static err_code limits_tile(rounding *q, err *e) { return fall_back_tile(q, 1, e); }

static double sum_of(const rounding *q, int which)
{
    double sum = 0;
    for (int64_t i = 0; i < q->n; i++) sum += q->s->host[which * q->n + i];
    return sum;
}

static err_code get_sums(rounding *q, err *e)
{
    return dev_get(q->s, q->s->host, q->s->sums, (size_t)(SUMS * q->n) * sizeof(double), e);
}

/* The way that loses least; feedback where they are equal. */
static err_code choose(rounding *q, int *best, err *e)
{
    double loss[WAYS];
    TRY(get_sums(q, e));
    q->out->loss_before = sum_of(q, SUM_BEFORE);
    q->out->loss_after = sum_of(q, SUM_AFTER);
    *best = FEEDBACK;
    for (int way = 0; way < WAYS; way++)
        loss[way] = sum_of(q, SUM_FORM + way) - 2 * sum_of(q, SUM_DOT + way);
    for (int way = 0; way < FEEDBACK && q->o->falls_back; way++)
        if (loss[way] < loss[*best]) *best = way;
    job_log(q->b->j, LOG_DEBUG, "layer %d: %s: plain %.6g, range %.6g, feedback %.6g",
            (int)q->b->layer, role_name(q->out->role), loss[0], loss[1], loss[2]);
    const bool few = few_tokens(q->b->stats, q->out->role);
    if (few) *best = 1;
    if (*best == FEEDBACK) return OK;
    if (!few)
        job_log(q->b->j, LOG_INFO, "layer %d: %s: %s does better on held-out windows",
                (int)q->b->layer, role_name(q->out->role),
                *best ? "a searched range" : "plain rounding");
    TRY(each_tile(q, *best ? limits_tile : plain_tile, e));
    TRY(get_sums(q, e));
    q->out->loss_after = sum_of(q, SUM_AFTER);
    return OK;
}

/* Into the plan, and as f16 into the rounded block. */
static err_code hand_on(rounding *q, int way, err *e)
{
    plan_linear *l = q->out;
    q->at = 0;
    q->rows = q->n;
    const tensor scale = scale_of(q, way), zero = zero_of(q, way), packed = packed_of(q);
    const rounded_spec spec = {
        NULL, &packed, &scale, &zero, dev_opt(&q->v.col), dev_opt(&q->v.row), q->s->g};
    TRY(dev_chain_put(q->s->chain, l->role, &spec, e));
    TRY(dev_copy(q->b->d, &l->scale, &scale, e));
    TRY(dev_copy(q->b->d, &l->zero, &zero, e));
    TRY(dev_copy(q->b->d, &l->codes, &packed, e));
    return dev_sync(q->b->d, e);
}

static err_code open_linear(rounding *q, tensor_role r, block_plan *out, err *e)
{
    const calib_tap *tap = calib_find(q->b->stats, r);
    q->out = plan_find_linear(out, r);
    q->fl = q->f ? fold_find(q->f, r) : NULL;
    TRY(dev_weights(q->b, r, &q->w, e));
    q->n = q->w.shape[0];
    q->k = q->w.shape[1];
    if (!tap)
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)q->b->layer, role_name(r));
    q->blocks = tensor_of(q->s->square, DT_F32, 3, tap->blocks.shape);
    q->blocks.mem = dev_mem(q->b->d);
    TRY(dev_copy(q->b->d, &q->blocks, &tap->blocks, e));
    TRY(dev_factors_put(q->s, q->fl, q->n, q->k, &q->v, e));
    return arena_get(q->b->mem, &q->out->codes.data, (size_t)tensor_count(&q->out->codes), e);
}

/* The linears of one input share its moments, and the factors of its channels. */
static err_code round_tap(rounding *q, const tensor_role *roles, int n, block_plan *out, err *e)
{
    int way;
    q->k = model_linear_k(q->b->m, roles[0]);
    TRY(dev_chain_gather(q->s->chain, roles[0], (float)q->o->correction.resid, q->b->j, &q->train,
                         &q->held, e));
    pace_step(q->b->pace);
    TRY(q->o->corrects ? solve_lack(q, roles[0], e) : op_zero(q->b->d, &q->train.lack, e));
    for (int i = 0; i < n; i++) {
        TRY(open_linear(q, roles[i], out, e));
        if (i == 0)
            TRY(dev_feedback_factor(q->b, roles[i], &q->train.h, q->fl ? q->fl->col : NULL, &q->v,
                                    q->o->feeding.damping, e));
        TRY(each_tile(q, round_tile, e));
        TRY(choose(q, &way, e));
        TRY(hand_on(q, way, e));
        pace_step(q->b->pace);
    }
    return OK;
}

err_code dev_best_block(const quant_block *b, const fold *f, block_plan *out, const best_opts *o,
                        err *e)
{
    static const tensor_role split[] = {ROLE_Q, ROLE_K, ROLE_V}, fused[] = {ROLE_QKV},
                             attn[] = {ROLE_O}, ffn[] = {ROLE_GATE, ROLE_UP}, down[] = {ROLE_DOWN};
    rounding q = {.b = b, .s = b->dev, .o = o, .f = f};
    dev_chain_fold(q.s->chain, f);
    if (b->m->qkv == QKV_SPLIT)
        TRY(round_tap(&q, split, 3, out, e));
    else
        TRY(round_tap(&q, fused, 1, out, e));
    TRY(round_tap(&q, attn, 1, out, e));
    TRY(round_tap(&q, ffn, 2, out, e));
    return round_tap(&q, down, 1, out, e);
}
