/* Error feedback and coordinate descent over the codes of one linear. */
#include "awq/feedback.h"

#include <inttypes.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "awq/lapack.h"
#include "base/half.h"

#define BLOCK      128 /* columns between two products with the rest */
#define TILE       256 /* rows rounded together */
#define ROW_CHUNK  8   /* rows of a pool item */
#define MAX_RAISES 6   /* of the damping, each tenfold */

typedef struct {
    const quant_block *b;
    plan_linear *out;
    int64_t n, k, groups;
    float *h;            /* [k,k] H of the scaled input, columns and rows in rounding order */
    float *u;            /* [k,k] upper factor of its damped inverse */
    int32_t *order;      /* [k] input of each place */
    int32_t *place;      /* [k] place of each input */
    float *w, *x;        /* [TILE,k] weights in rounding order; products */
    float *spread;       /* [TILE,BLOCK] error over the pivot */
    float *scale, *zero; /* [TILE,groups] */
    uint8_t *codes;      /* [TILE,k] in rounding order */
    int64_t from, rows;  /* the tile */
    int64_t at, width;   /* the block of columns */
    int64_t changed[TILE / ROW_CHUNK];
    bool refit;
} feedback;

size_t feedback_bytes(int64_t k)
{
    const size_t n = (size_t)k;
    return 2 * n * n * sizeof(float) + 2 * n * sizeof(int32_t) +
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

static err_code sort_inputs(feedback *s, const tensor *h, const float *col, err *e)
{
    void *mem;
    TRY(mem_alloc(&mem, (size_t)s->k, sizeof(ranked), "order of inputs", e));
    ranked *p = mem;
    for (int64_t i = 0; i < s->k; i++) {
        const float c = col ? col[i] : 1.f;
        p[i] = (ranked){((const float *)h->data)[i * s->k + i] / (c * c), (int32_t)i};
    }
    qsort(p, (size_t)s->k, sizeof *p, by_diagonal);
    for (int64_t i = 0; i < s->k; i++) {
        s->order[i] = p[i].at;
        s->place[p[i].at] = (int32_t)i;
    }
    mem_free(mem);
    return OK;
}

typedef struct {
    feedback *s;
    const float *h, *col;
} gather_job;

/* The scaled input is x / col, so its H is H / (col col^T). */
static void gather_row(void *ctx, int64_t i, int worker)
{
    const gather_job *j = ctx;
    const feedback *s = j->s;
    const float *row = j->h + s->order[i] * s->k;
    const float c = j->col ? j->col[s->order[i]] : 1.f;
    (void)worker;
    for (int64_t q = 0; q < s->k; q++)
        s->h[i * s->k + q] = row[s->order[q]] / (c * (j->col ? j->col[s->order[q]] : 1.f));
}

/* With the order reversed, H = L L^T; the inverse of L, read from its end, is the upper factor of
 * H's inverse in rounding order. */
static bool factor(feedback *s, float add)
{
    const int n = (int)s->k;
    int info;
    for (int64_t i = 0; i < s->k; i++)
        for (int64_t j = 0; j < s->k; j++)
            s->u[i * s->k + j] = s->h[(s->k - 1 - i) * s->k + s->k - 1 - j] + (i == j ? add : 0.f);
    spotrf_("U", &n, s->u, &n, &info);
    if (info == 0) strtri_("U", "N", &n, s->u, &n, &info);
    if (info != 0) return false;
    for (int64_t a = 0, z = s->k * s->k - 1; a < z; a++, z--) {
        const float t = s->u[a];
        s->u[a] = s->u[z];
        s->u[z] = t;
    }
    return true;
}

static err_code factor_damped(feedback *s, double damping, err *e)
{
    double mean = 0;
    for (int64_t i = 0; i < s->k; i++) mean += s->h[i * s->k + i];
    mean /= (double)s->k;
    if (!(mean > 0)) mean = 1; /* no activations at all: any factor will do */
    for (int i = 0; i < MAX_RAISES; i++, damping *= 10) {
        if (factor(s, (float)(damping * mean))) return OK;
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
    float *w = s->w + r * s->k, *spread = s->spread + r * BLOCK;
    for (int64_t c = 0; c < s->width; c++) {
        const int64_t j = s->at + c, g = r * s->groups + s->order[j] / s->b->o->group;
        const float *u = s->u + j * s->k;
        const int code = code_of(w[j], s->scale[g], s->zero[g]);
        const float miss = (w[j] - ((float)code - s->zero[g]) * s->scale[g]) / u[j];
        s->codes[r * s->k + j] = (uint8_t)code;
        spread[c] = miss;
        for (int64_t q = j + 1; q < s->at + s->width; q++) w[q] -= miss * u[q];
    }
}

static void round_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++)
        round_row(s, r);
}

static void subtract_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    const int64_t next = s->at + s->width, rest = s->k - next;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++)
        for (int64_t i = 0; i < rest; i++) s->w[r * s->k + next + i] -= s->x[r * rest + i];
}

static int64_t chunks(const feedback *s) { return (s->rows + ROW_CHUNK - 1) / ROW_CHUNK; }

static err_code round_tile(feedback *s, err *e)
{
    for (s->at = 0; s->at < s->k; s->at += s->width) {
        s->width = s->k - s->at < BLOCK ? s->k - s->at : BLOCK;
        const int64_t next = s->at + s->width, rest = s->k - next;
        pool_run(dev_pool(s->b->d), round_rows, s, chunks(s));
        if (!rest) continue;
        tensor miss = tensor_2d(s->spread, DT_F32, s->rows, s->width);
        miss.stride[0] = BLOCK;
        tensor u = tensor_2d(s->u + s->at * s->k + next, DT_F32, s->width, rest);
        u.stride[0] = s->k;
        tensor y = tensor_2d(s->x, DT_F32, s->rows, rest);
        TRY(op_matmul(s->b->d, &y, &miss, &u, e));
        pool_run(dev_pool(s->b->d), subtract_rows, s, chunks(s));
    }
    return OK;
}

/* ---- coordinate descent ---- */

/* x holds the row's (w' - w) H. A code moves to where the loss, with all others fixed, is least. */
static int64_t sweep_row(feedback *s, int64_t r)
{
    float *g = s->x + r * s->k;
    uint8_t *codes = s->codes + r * s->k;
    int64_t changed = 0;
    for (int64_t j = 0; j < s->k; j++) {
        const float *h = s->h + j * s->k,
                    step = s->scale[r * s->groups + s->order[j] / s->b->o->group];
        if (!(h[j] > 0.f)) continue;
        float q = (float)codes[j] + nearbyintf(-g[j] / (h[j] * step));
        q = q < 0.f ? 0.f : q > 15.f ? 15.f : q;
        const float move = (q - (float)codes[j]) * step;
        if (move == 0.f) continue;
        codes[j] = (uint8_t)q;
        changed++;
        for (int64_t i = 0; i < s->k; i++) g[i] += move * h[i];
    }
    return changed;
}

/* The scale of a group goes to where the loss, with all codes and other scales fixed, is least:
 * along u, the steps of its codes, that is scale - u.g / u H u. */
static void refit_group(feedback *s, int64_t r, int64_t group)
{
    float *g = s->x + r * s->k, *uh = s->w + r * s->k, *scale = s->scale + r * s->groups + group;
    const uint8_t *codes = s->codes + r * s->k;
    const float zero = s->zero[r * s->groups + group];
    const int32_t *place = s->place + group * s->b->o->group;
    double slope = 0, bend = 0;
    memset(uh, 0, (size_t)s->k * sizeof *uh);
    for (int32_t i = 0; i < s->b->o->group; i++) {
        const float u = (float)codes[place[i]] - zero, *h = s->h + place[i] * s->k;
        if (u == 0.f) continue;
        slope += (double)u * g[place[i]];
        for (int64_t j = 0; j < s->k; j++) uh[j] += u * h[j];
    }
    for (int32_t i = 0; i < s->b->o->group; i++)
        bend += ((double)codes[place[i]] - zero) * uh[place[i]];
    if (!(bend > 0)) return;
    const float next = f16_to_f32(f32_to_f16(*scale - (float)(slope / bend))), move = next - *scale;
    if (!(next > 0.f && next <= 65504.f) || 2 * move * slope + (double)move * move * bend >= 0)
        return;
    *scale = next;
    for (int64_t j = 0; j < s->k; j++) g[j] += move * uh[j];
}

static void sweep_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    (void)worker;
    s->changed[item] = 0;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++) {
        s->changed[item] += sweep_row(s, r);
        for (int64_t g = 0; s->refit && g < s->groups; g++) refit_group(s, r, g);
    }
}

/* w holds the weights again; errors into it. */
static void error_rows(void *ctx, int64_t item, int worker)
{
    feedback *s = ctx;
    (void)worker;
    for (int64_t r = item * ROW_CHUNK; r < (item + 1) * ROW_CHUNK && r < s->rows; r++)
        for (int64_t j = 0; j < s->k; j++) {
            const int64_t g = r * s->groups + s->order[j] / s->b->o->group, i = r * s->k + j;
            s->w[i] = ((float)s->codes[i] - s->zero[g]) * s->scale[g] - s->w[i];
        }
}

static err_code sweep_tile(feedback *s, const feedback_opts *o, err *e)
{
    if (!o->sweeps) return OK;
    pool_run(dev_pool(s->b->d), error_rows, s, chunks(s));
    tensor w = tensor_2d(s->w, DT_F32, s->rows, s->k), h = tensor_2d(s->h, DT_F32, s->k, s->k),
           x = tensor_2d(s->x, DT_F32, s->rows, s->k);
    TRY(op_matmul(s->b->d, &x, &w, &h, e));
    s->refit = o->refit;
    for (int i = 0; i < o->sweeps; i++) {
        int64_t changed = 0;
        pool_run(dev_pool(s->b->d), sweep_rows, s, chunks(s));
        for (int64_t c = 0; c < chunks(s); c++) changed += s->changed[c];
        if (!changed) break;
    }
    s->refit = false; /* the last sweep is for the codes */
    if (o->refit) pool_run(dev_pool(s->b->d), sweep_rows, s, chunks(s));
    return OK;
}

/* ---- a linear ---- */

static err_code load_tile(feedback *s, const tensor *dense, const fold_linear *f, err *e)
{
    tensor w = {.data = s->x};
    TRY(fold_rows(&w, dense, f, s->from, s->rows, s->b->layer, s->out->role, e));
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t j = 0; j < s->k; j++) s->w[r * s->k + j] = s->x[r * s->k + s->order[j]];
    return OK;
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
    memset(out, 0, (size_t)(s->rows * s->k / 2));
    f16 *scale = (f16 *)s->out->scale.data + s->from * s->groups;
    for (int64_t i = 0; i < s->rows * s->groups; i++) scale[i] = f32_to_f16(s->scale[i]);
    for (int64_t r = 0; r < s->rows; r++)
        for (int64_t j = 0; j < s->k; j++) {
            const int64_t at = r * s->k + s->order[j];
            out[at / 2] |= (uint8_t)(s->codes[r * s->k + j] << 4 * (at & 1));
        }
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
                {(void **)&s->place, k * sizeof(int32_t)},
                {(void **)&s->w, TILE * k * f},
                {(void **)&s->x, TILE * k * f},
                {(void **)&s->spread, TILE * BLOCK * f},
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
    gather_job g = {s, m.full.data, col};
    TRY(sort_inputs(s, &m.full, col, e));
    pool_run(dev_pool(s->b->d), gather_row, &g, s->k);
    openblas_set_num_threads(1); /* more would change the order of its sums */
    return factor_damped(s, o->damping, e);
}

err_code feedback_codes(const quant_block *b, const fold *f, plan_linear *out,
                        const feedback_opts *o, err *e)
{
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    arena mem = {0};
    tensor dense;
    err_code rc;
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
        if ((rc = load_tile(&s, &dense, fl, e)) != OK) break;
        load_params(&s);
        if ((rc = round_tile(&s, e)) != OK) break;
        if (o->sweeps && (rc = load_tile(&s, &dense, fl, e)) != OK) break;
        if ((rc = sweep_tile(&s, o, e)) != OK) break;
        store_codes(&s);
    }
done:
    arena_free(&mem);
    return rc;
}
