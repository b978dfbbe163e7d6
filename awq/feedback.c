/* Error feedback and coordinate descent over the codes of one linear. */
#include "awq/feedback.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/cholesky.h"
#include "awq/dev_feedback.h"
#include "base/half.h"

#define BLOCK      128  /* columns between two products with the rest */
#define TILE       1024 /* rows rounded together */
#define ROW_CHUNK  8    /* rows of a pool item */
#define MAX_RAISES 6    /* of the damping, each tenfold */

typedef struct {
    const quant_block *b;
    plan_linear *out;
    int64_t n, k, groups;
    float *h;            /* [k,k] H of the scaled input */
    float *u;            /* [k,k] upper factor of its damped inverse, in rounding order */
    int32_t *order;      /* [k] input of each place in rounding order */
    float *w, *x;        /* [TILE,k] weights, or errors; errors over the pivot */
    float *sums;         /* [TILE,BLOCK] what the products give a block */
    float *square;       /* [BLOCK,BLOCK] of h, at the block */
    float *scale, *zero; /* [TILE,groups] */
    uint8_t *codes;      /* [TILE,k] */
    int64_t from, rows;  /* the tile */
    int64_t at, width;   /* the block of columns: in rounding order to round, of inputs to sweep */
    int64_t changed[TILE / ROW_CHUNK];
    bool refit;
} feedback;

size_t feedback_bytes(int64_t k)
{
    const size_t n = (size_t)k;
    return cholesky_bytes(k) + (2 * n * n + BLOCK * BLOCK) * sizeof(float) + n * sizeof(int32_t) +
           TILE * (2 * n * sizeof(float) + BLOCK * sizeof(float) + n + 2 * n / 32 * sizeof(float));
}

/* ---- H ---- */

typedef struct {
    float d;
    int32_t at;
} ranked;

static int by_diagonal(const void *a, const void *b)
{
    const ranked *x = a, *y = b;
    if (x->d != y->d) return x->d < y->d ? 1 : -1;
    return x->at < y->at ? -1 : x->at > y->at; /* ties in order: the same bytes everywhere */
}

err_code feedback_order(int32_t *order, const float *d, int64_t step, const float *col, int64_t k,
                        err *e)
{
    void *mem;
    TRY(mem_alloc(&mem, (size_t)k, sizeof(ranked), "order of inputs", e));
    ranked *p = mem;
    for (int64_t i = 0; i < k; i++) {
        const float c = col ? col[i] : 1.f;
        p[i] = (ranked){d[i * step] / (c * c), (int32_t)i};
    }
    qsort(p, (size_t)k, sizeof *p, by_diagonal);
    for (int64_t i = 0; i < k; i++) order[i] = p[i].at;
    mem_free(mem);
    return OK;
}

typedef struct {
    feedback *s;
    const float *h, *col;
} scale_job;

/* The scaled input is x / col, so its H is H / (col col^T). */
static void scale_row(void *ctx, int64_t i, int worker)
{
    const scale_job *j = ctx;
    const int64_t k = j->s->k;
    const float *from = j->h + i * k, c = j->col ? j->col[i] : 1.f;
    float *to = j->s->h + i * k;
    (void)worker;
    for (int64_t q = 0; q < k; q++) to[q] = from[q] / (c * (j->col ? j->col[q] : 1.f));
}

/* With the rounding order reversed. */
static void gather_row(void *ctx, int64_t i, int worker)
{
    const feedback *s = ctx;
    const int64_t k = s->k;
    const float *from = s->h + s->order[k - 1 - i] * k;
    float *to = s->u + i * k;
    (void)worker;
    for (int64_t q = 0; q < k; q++) to[q] = from[s->order[k - 1 - q]];
}

/* The row and its opposite, both from their ends; the one in the middle with itself. */
static void reverse_row(void *ctx, int64_t i, int worker)
{
    const feedback *s = ctx;
    float *a = s->u + i * s->k, *z = s->u + (s->k - i) * s->k - 1;
    (void)worker;
    for (int64_t q = 0; q < s->k && a < z; q++, a++, z--) {
        const float t = *a;
        *a = *z;
        *z = t;
    }
}

/* In that order H = L L^T; the inverse of L, read from its end, is the upper factor of
 * H's inverse in rounding order. */
static err_code factor(feedback *s, float add, bool *good, err *e)
{
    pool *p = dev_pool(s->b->d);
    pool_run(p, gather_row, s, s->k);
    for (int64_t i = 0; i < s->k; i++) s->u[i * s->k + i] += add;
    TRY(cholesky_factor(s->b->d, s->u, s->k, good, e));
    if (*good) TRY(cholesky_invert(s->b->d, s->u, s->k, good, e));
    if (*good) pool_run(p, reverse_row, s, (s->k + 1) / 2);
    return OK;
}

static err_code factor_damped(feedback *s, double damping, err *e)
{
    double mean = 0;
    for (int64_t i = 0; i < s->k; i++) mean += s->h[i * s->k + i];
    mean /= (double)s->k;
    if (!(mean > 0)) mean = 1; /* no activations at all: any factor will do */
    for (int i = 0; i < MAX_RAISES; i++, damping *= 10) {
        bool good;
        TRY(factor(s, (float)(damping * mean), &good, e));
        if (good) return OK;
        job_log(s->b->j, LOG_DEBUG, "layer %d: %s: damping %g is not enough", (int)s->b->layer,
                role_name(s->out->role), damping);
    }
    return err_set(e, E_INPUT,
                   "layer %d: %s: second moments cannot be factored, whatever the damping",
                   (int)s->b->layer, role_name(s->out->role));
}

/* ---- rounding a tile ---- */

static int code_of(float w, float scale, float zero)
{
    const float q = nearbyintf(w / scale) + zero;
    return q < 0.f ? 0 : q > 15.f ? 15 : (int)q;
}

/* One row through the columns of the block. */
static void round_row(feedback *s, int64_t r)
{
    float *w = s->w + r * s->k, *miss = s->x + r * s->k;
    const float *sums = s->sums + r * BLOCK;
    for (int64_t c = 0; s->at && c < s->width; c++) w[s->at + c] -= sums[c];
    for (int64_t c = 0; c < s->width; c++) {
        const int64_t j = s->at + c, g = r * s->groups + s->order[j] / s->b->o->group;
        const float *u = s->u + j * s->k;
        const int code = code_of(w[j], s->scale[g], s->zero[g]);
        const float off = (w[j] - ((float)code - s->zero[g]) * s->scale[g]) / u[j];
        s->codes[r * s->k + s->order[j]] = (uint8_t)code;
        miss[j] = off;
        for (int64_t q = j + 1; q < s->at + s->width; q++) w[q] -= off * u[q];
    }
}

static void round_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++)
        round_row(s, r);
}

static int64_t chunks(const feedback *s) { return (s->rows + ROW_CHUNK - 1) / ROW_CHUNK; }

/* What the rows of x [rows, inputs] make of the block's columns of h, into s->sums: one block's
 * worth of results at a time, so that they stay near. */
static err_code block_sums(feedback *s, float *x, float *h, int64_t inputs, err *e)
{
    tensor y = tensor_2d(s->sums, DT_F32, s->rows, s->width),
           a = tensor_2d(x, DT_F32, s->rows, inputs),
           b = tensor_2d(h + s->at, DT_F32, inputs, s->width);
    y.stride[0] = BLOCK;
    a.stride[0] = b.stride[0] = s->k;
    return op_matmul(s->b->d, &y, &a, &b, e);
}

static err_code round_tile(feedback *s, err *e)
{
    for (s->at = 0; s->at < s->k; s->at += s->width) {
        s->width = s->k - s->at < BLOCK ? s->k - s->at : BLOCK;
        if (s->at) TRY(block_sums(s, s->x, s->u, s->at, e));
        pool_run(dev_pool(s->b->d), round_rows, s, chunks(s));
    }
    return OK;
}

/* ---- coordinate descent ----
 * w holds the errors w' - w. Block by block of inputs: one product gives the block's columns of
 * (w' - w) H; against the block's own square of H its codes and scales move to where the loss, with
 * all else fixed, is least. */

/* One row at its block. */
typedef struct {
    const float *square; /* [BLOCK,BLOCK] of H */
    uint8_t *codes;
    float *scale;
    const float *zero;
    float *grad;  /* [BLOCK] of (w' - w) H */
    float *error; /* [BLOCK] of w' - w */
    int64_t width;
    int32_t group;
} descent;

static void add_scaled(float *to, float a, const float *x, int64_t n)
{
    for (int64_t i = 0; i < n; i++) to[i] += a * x[i];
}

static int64_t move_codes(descent *c)
{
    int64_t changed = 0;
    for (int64_t j = 0; j < c->width; j++) {
        const float *h = c->square + j * BLOCK, step = c->scale[j / c->group];
        if (!(h[j] > 0.f)) continue;
        float q = (float)c->codes[j] + nearbyintf(-c->grad[j] / (h[j] * step));
        q = q < 0.f ? 0.f : q > 15.f ? 15.f : q;
        const float move = (q - (float)c->codes[j]) * step;
        if (move == 0.f) continue;
        c->codes[j] = (uint8_t)q;
        c->error[j] += move;
        changed++;
        add_scaled(c->grad, move, h, c->width);
    }
    return changed;
}

/* Along u, the steps of the group's codes: scale - u.g / u H u. */
static void refit_group(descent *c, int64_t group)
{
    const int64_t from = group * c->group, end = from + c->group;
    const float zero = c->zero[group];
    float uh[BLOCK] = {0};
    double slope = 0, bend = 0;
    for (int64_t i = from; i < end; i++) {
        const float u = (float)c->codes[i] - zero;
        if (u == 0.f) continue;
        slope += (double)u * c->grad[i];
        add_scaled(uh, u, c->square + i * BLOCK, c->width);
    }
    for (int64_t i = from; i < end; i++) bend += ((double)c->codes[i] - zero) * uh[i];
    if (!(bend > 0)) return;
    const float next = f16_to_f32(f32_to_f16(c->scale[group] - (float)(slope / bend))),
                move = next - c->scale[group];
    if (!(next > 0.f && next <= 65504.f) || 2 * move * slope + (double)move * move * bend >= 0)
        return;
    c->scale[group] = next;
    add_scaled(c->grad, move, uh, c->width);
    for (int64_t i = from; i < end; i++) c->error[i] += move * ((float)c->codes[i] - zero);
}

static void sweep_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    const int64_t first = s->at / s->b->o->group, groups = s->width / s->b->o->group;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++) {
        descent c = {.square = s->square,
                     .codes = s->codes + r * s->k + s->at,
                     .scale = s->scale + r * s->groups + first,
                     .zero = s->zero + r * s->groups + first,
                     .grad = s->sums + r * BLOCK,
                     .error = s->w + r * s->k + s->at,
                     .width = s->width,
                     .group = s->b->o->group};
        s->changed[item] += move_codes(&c);
        for (int64_t g = 0; s->refit && g < groups; g++) refit_group(&c, g);
    }
}

static err_code sweep_block(feedback *s, err *e)
{
    for (int64_t i = 0; i < s->width; i++)
        memcpy(s->square + i * BLOCK, s->h + (s->at + i) * s->k + s->at,
               (size_t)s->width * sizeof *s->square);
    TRY(block_sums(s, s->w, s->h, s->k, e));
    pool_run(dev_pool(s->b->d), sweep_rows, s, chunks(s));
    return OK;
}

/* Whether any code changed into *any. */
static err_code sweep(feedback *s, bool *any, err *e)
{
    *any = false;
    memset(s->changed, 0, sizeof s->changed);
    for (s->at = 0; s->at < s->k; s->at += s->width) {
        s->width = s->k - s->at < BLOCK ? s->k - s->at : BLOCK;
        TRY(sweep_block(s, e));
    }
    for (int64_t c = 0; c < chunks(s); c++) *any |= s->changed[c] > 0;
    return OK;
}

/* w holds the weights again; errors into it. */
static void error_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++)
        for (int64_t j = 0; j < s->k; j++) {
            const int64_t g = r * s->groups + j / s->b->o->group, i = r * s->k + j;
            s->w[i] = ((float)s->codes[i] - s->zero[g]) * s->scale[g] - s->w[i];
        }
}

static err_code sweep_tile(feedback *s, const feedback_opts *o, err *e)
{
    bool any = true;
    pool_run(dev_pool(s->b->d), error_rows, s, chunks(s));
    s->refit = o->refit;
    for (int i = 0; i < o->sweeps && any; i++) TRY(sweep(s, &any, e));
    s->refit = false; /* the last sweep is for the codes */
    return o->refit ? sweep(s, &any, e) : OK;
}

/* ---- a linear ---- */

/* The tile's weights into `to`. */
static err_code load_tile(const feedback *s, float *to, const tensor *dense, const fold_linear *f,
                          err *e)
{
    tensor w = {.data = to};
    return fold_rows(&w, dense, f, s->from, s->rows, s->b->layer, s->out->role, e);
}

static void order_tile(feedback *s)
{
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t j = 0; j < s->k; j++) s->w[r * s->k + j] = s->x[r * s->k + s->order[j]];
}

static void load_params(feedback *s)
{
    const f16 *scale = (const f16 *)s->out->scale.data + s->from * s->groups;
    const uint8_t *zero = (const uint8_t *)s->out->zero.data + s->from * s->groups;
    for (int64_t i = 0; i < s->rows * s->groups; i++) {
        s->scale[i] = f16_to_f32(scale[i]);
        s->zero[i] = zero[i];
    }
}

static void store_codes(feedback *s)
{
    uint8_t *out = (uint8_t *)s->out->codes.data + s->from * s->k / 2;
    f16 *scale = (f16 *)s->out->scale.data + s->from * s->groups;
    for (int64_t i = 0; i < s->rows * s->groups; i++) scale[i] = f32_to_f16(s->scale[i]);
    for (int64_t i = 0; i < s->rows * s->k / 2; i++)
        out[i] = (uint8_t)(s->codes[2 * i] | s->codes[2 * i + 1] << 4);
}

static err_code room(feedback *s, arena *a, err *e)
{
    const size_t k = (size_t)s->k, g = (size_t)s->groups, f = sizeof(float);
    const struct {
        void **out;
        size_t bytes;
    } part[] = {{(void **)&s->h, k * k * f},
                {(void **)&s->u, k * k * f},
                {(void **)&s->order, k * sizeof(int32_t)},
                {(void **)&s->w, TILE * k * f},
                {(void **)&s->x, TILE * k * f},
                {(void **)&s->sums, TILE * BLOCK * f},
                {(void **)&s->square, BLOCK * BLOCK * f},
                {(void **)&s->scale, TILE * g * f},
                {(void **)&s->zero, TILE * g * f},
                {(void **)&s->codes, TILE * k}};
    size_t sum = 0;
    for (size_t i = 0; i < sizeof part / sizeof *part; i++) sum += arena_need(part[i].bytes);
    TRY(arena_init(a, sum, "error feedback", e));
    for (size_t i = 0; i < sizeof part / sizeof *part; i++)
        TRY(arena_get(a, part[i].out, part[i].bytes, e));
    return OK;
}

static err_code prepare(feedback *s, const float *col, const feedback_opts *o, err *e)
{
    second_moment m;
    TRY(moment_of(s->b, s->out->role, &m, e));
    if (!m.full.data) return err_set(e, E_UNSUPPORTED, "error feedback needs --loss gram");
    scale_job g = {s, m.full.data, col};
    TRY(feedback_order(s->order, m.full.data, s->k + 1, col, s->k, e));
    pool_run(dev_pool(s->b->d), scale_row, &g, s->k);
    return factor_damped(s, o->damping, e);
}

err_code feedback_codes(const quant_block *b, const fold *f, plan_linear *out,
                        const feedback_opts *o, err *e)
{
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    arena mem = {0};
    tensor dense;
    err_code rc;
    if (b->dev) return dev_feedback_codes(b, f, out, o, e);
    TRY(linear_weights(b, out->role, &dense, e));
    feedback s = {.b = b, .out = out, .n = dense.shape[0], .k = dense.shape[1]};
    s.groups = s.k / b->o->group;
    if (!out->codes.data)
        TRY(arena_get(b->mem, &out->codes.data, (size_t)tensor_count(&out->codes), e));
    if ((rc = room(&s, &mem, e)) != OK) goto done;
    if ((rc = prepare(&s, fl ? fl->col : NULL, o, e)) != OK) goto done;
    for (s.from = 0; s.from < s.n && rc == OK; s.from += s.rows) {
        s.rows = s.n - s.from < TILE ? s.n - s.from : TILE;
        if ((rc = job_check(b->j, e)) != OK) break;
        if ((rc = load_tile(&s, s.x, &dense, fl, e)) != OK) break;
        order_tile(&s);
        load_params(&s);
        if ((rc = round_tile(&s, e)) != OK) break;
        if (o->sweeps) {
            if ((rc = load_tile(&s, s.w, &dense, fl, e)) != OK) break;
            if ((rc = sweep_tile(&s, o, e)) != OK) break;
        }
        store_codes(&s);
    }
done:
    arena_free(&mem);
    return rc;
}
