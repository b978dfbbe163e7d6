/* Ranges. Groups of a row do not interact here: a group's error counts by its own block of H. */
#include "awq/range.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "awq/on_device.h"
#include "kernels/quant_group.h"

typedef struct {
    const quant_block *b;
    const float *col;                 /* [k] factors of the inputs, NULL: 1 */
    const calib_tap *tap;             /* where h has no data */
    tensor h;                         /* f32 [k,k] */
    tensor w, x;                      /* f32 [n,k]: the tile with its factors; errors */
    tensor scale, zero;               /* [n,k/g] of the candidate, then of the winner */
    tensor limit;                     /* f32 [n,k/g] of the candidate */
    float *m0, *best;                 /* [n,k/g] largest |w|, winning limit */
    float *ends, *pair, *part, *kept; /* [n,k/g,2] both ends, as tried, shares tried and kept */
    double *loss;                     /* [k/g][n] least so far */
    int64_t groups;
} range_tile;

static err_code load_tile(const quant_block *b, const fold_linear *f, const tensor *dense,
                          tensor_role r, int64_t from, int64_t n, tensor *w, err *e)
{
    *w = (tensor){.data = b->scratch->w};
    TRY(job_check(b->j, e));
    return fold_rows(w, dense, f, from, n, b->layer, r, e);
}

err_code range_plain(const quant_block *b, const fold *f, plan_linear *out, err *e)
{
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    tensor dense;
    if (b->dev) return dev_range(b, f, out, 1, 0, e);
    TRY(linear_weights(b, out->role, &dense, e));
    const int64_t n = dense.shape[0], step = tile_rows(b->scratch, dense.shape[1]);
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        tensor w, scale = tensor_rows(&out->scale, at, rows),
                  zero = tensor_rows(&out->zero, at, rows);
        TRY(load_tile(b, fl, &dense, out->role, at, rows, &w, e));
        TRY(op_quant_range(b->d, &scale, &zero, &w, NULL, b->o->group, e));
    }
    return OK;
}

/* m0 of every group; 1 where all weights are 0, since a limit must be positive. */
static void largest(range_tile *t)
{
    const int32_t g = t->b->o->group;
    const float *w = t->w.data;
    for (int64_t i = 0; i < t->w.shape[0] * t->groups; i++) {
        float most = 0.f;
        for (int32_t j = 0; j < g; j++) most = fmaxf(most, fabsf(w[i * g + j]));
        t->m0[i] = most > 0.f ? most : 1.f;
    }
}

/* H's block of one quantization group: a square on the diagonal of a calib block, whose size it
 * divides. */
static tensor group_block(const range_tile *t, int64_t group)
{
    if (t->h.data) {
        const tensor rows = tensor_rows(&t->h, group * t->b->o->group, t->b->o->group);
        return tensor_cols(&rows, group * t->b->o->group, t->b->o->group);
    }
    const int64_t g = t->b->o->group, s = t->tap->g, at = group * g % s;
    tensor h = tensor_2d((float *)t->tap->blocks.data + group * g / s * s * s + at * s + at, DT_F32,
                         g, g);
    h.stride[0] = s;
    return h;
}

/* Errors of every group under t->scale and t->zero: t->b->scratch->row [n] a group, handed to
 * `take`. */
typedef void (*take_fn)(void *ctx, range_tile *t, int64_t group, const double *row);

static err_code group_errors(range_tile *t, take_fn take, void *ctx, err *e)
{
    const quant_block *b = t->b;
    const int64_t n = t->w.shape[0];
    double *row = b->scratch->row;
    tensor col = tensor_1d((float *)(uintptr_t)t->col, DT_F32, t->w.shape[1]),
           out = tensor_1d(row, DT_F64, n);
    TRY(op_quant_error(b->d, &t->x, &t->w, &t->scale, &t->zero, t->col ? &col : NULL, b->o->group,
                       e));
    for (int64_t j = 0; j < t->groups; j++) {
        const tensor x = tensor_cols(&t->x, j * b->o->group, b->o->group), h = group_block(t, j);
        TRY(op_quad(b->d, &out, &x, &h, e));
        take(ctx, t, j, row);
    }
    return OK;
}

/* ---- one limit for both ends ---- */

static void take_limit(void *first, range_tile *t, int64_t group, const double *row)
{
    const int64_t n = t->w.shape[0];
    double *least = t->loss + group * n;
    for (int64_t i = 0; i < n; i++) {
        if (!first && row[i] >= least[i]) continue;
        least[i] = row[i];
        t->best[i * t->groups + group] = ((float *)t->limit.data)[i * t->groups + group];
    }
}

/* Error of every group under the candidate's limits; keeps the limits that improve. */
static err_code try_limits(range_tile *t, float part, bool first, err *e)
{
    float *limit = t->limit.data;
    for (int64_t i = 0; i < t->w.shape[0] * t->groups; i++) limit[i] = t->m0[i] * part;
    TRY(op_quant_range(t->b->d, &t->scale, &t->zero, &t->w, &t->limit, t->b->o->group, e));
    return group_errors(t, take_limit, first ? t : NULL, e);
}

static err_code search_tile(range_tile *t, const range_grid *grid, err *e)
{
    largest(t);
    for (int i = 0; i < grid->points; i++)
        TRY(try_limits(t, (float)(1. - grid->shrink * i / grid->points), i == 0, e));
    memcpy(t->limit.data, t->best, (size_t)(t->w.shape[0] * t->groups) * sizeof *t->best);
    return op_quant_range(t->b->d, &t->scale, &t->zero, &t->w, &t->limit, t->b->o->group, e);
}

static err_code check_tap(const quant_block *b, tensor_role r, const calib_tap *t, err *e)
{
    if (!t)
        return err_set(e, E_INPUT, "layer %d: %s: expected statistics of its input, found none",
                       (int)b->layer, role_name(r));
    if (t->g % b->o->group)
        return err_set(e, E_UNSUPPORTED,
                       "layer %d: %s: group %d does not divide the calib file's blocks of %d",
                       (int)b->layer, role_name(r), (int)b->o->group, (int)t->g);
    return OK;
}

/* Tile by tile: `each` finds scale and zero of t's rows. */
typedef err_code (*tile_fn)(range_tile *t, const range_grid *grid, err *e);

static err_code search_tiles(const quant_block *b, const fold *f, plan_linear *out,
                             const range_grid *grid, range_tile *t, tile_fn each, err *e)
{
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    const quant_scratch *q = b->scratch;
    tensor dense;
    TRY(linear_weights(b, out->role, &dense, e));
    const int64_t n = dense.shape[0], k = dense.shape[1], step = tile_rows(q, k);
    t->b = b;
    t->col = fl ? fl->col : NULL;
    t->m0 = q->m0;
    t->best = q->best;
    t->loss = q->sum;
    t->groups = k / b->o->group;
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        TRY(load_tile(b, fl, &dense, out->role, at, rows, &t->w, e));
        t->x = tensor_2d(q->x, DT_F32, rows, k);
        t->limit = tensor_2d(q->limit, DT_F32, rows, t->groups);
        t->scale = tensor_rows(&out->scale, at, rows);
        t->zero = tensor_rows(&out->zero, at, rows);
        TRY(each(t, grid, e));
    }
    return OK;
}

err_code range_search(const quant_block *b, const fold *f, plan_linear *out, const range_grid *grid,
                      err *e)
{
    range_tile t = {.tap = b->stats ? calib_find(b->stats, out->role) : NULL};
    if (b->dev) return dev_range(b, f, out, grid->points, grid->shrink, e);
    TRY(check_tap(b, out->role, t.tap, e));
    return search_tiles(b, f, out, grid, &t, search_tile, e);
}

/* ---- an end each ---- */

/* Largest part of both ends, of each group of each row: in ends[2i], ends[2i+1]. */
static void ends_of(range_tile *t)
{
    const int32_t g = t->b->o->group;
    const float *w = t->w.data;
    for (int64_t i = 0; i < t->w.shape[0] * t->groups; i++) {
        float lo = 0.f, hi = 0.f;
        for (int32_t j = 0; j < g; j++) {
            lo = fminf(lo, w[i * g + j]);
            hi = fmaxf(hi, w[i * g + j]);
        }
        t->ends[2 * i] = lo;
        t->ends[2 * i + 1] = hi;
    }
}

/* Two weights at the ends have the range of the group: the rule stays in one place. A part below 0
 * stands for the best so far. */
static err_code range_of_parts(range_tile *t, float lo, float hi, err *e)
{
    const int64_t n = t->w.shape[0];
    const tensor pair = tensor_2d(t->pair, DT_F32, n, 2 * t->groups);
    for (int64_t i = 0; i < n * t->groups; i++) {
        t->part[2 * i] = lo < 0 ? t->kept[2 * i] : lo;
        t->part[2 * i + 1] = hi < 0 ? t->kept[2 * i + 1] : hi;
        for (int64_t j = 2 * i; j < 2 * i + 2; j++) t->pair[j] = t->ends[j] * t->part[j];
    }
    return op_quant_range(t->b->d, &t->scale, &t->zero, &pair, NULL, 2, e);
}

static void take_parts(void *first, range_tile *t, int64_t group, const double *row)
{
    const int64_t n = t->w.shape[0];
    double *least = t->loss + group * n;
    for (int64_t i = 0; i < n; i++) {
        const int64_t at = 2 * (i * t->groups + group);
        if (!first && row[i] >= least[i]) continue;
        least[i] = row[i];
        t->kept[at] = t->part[at];
        t->kept[at + 1] = t->part[at + 1];
    }
}

static err_code try_parts(range_tile *t, float lo, float hi, bool first, err *e)
{
    TRY(range_of_parts(t, lo, hi, e));
    return group_errors(t, take_parts, first ? t : NULL, e);
}

/* Both ends together first, then each with the other as it is best. */
static err_code fit_tile(range_tile *t, const range_grid *grid, err *e)
{
    ends_of(t);
    for (int pass = 0; pass < 3; pass++)
        for (int i = 0; i < grid->points; i++) {
            const float part = (float)(1. - grid->shrink * i / grid->points);
            TRY(try_parts(t, pass == 2 ? -1.f : part, pass == 1 ? -1.f : part, pass == 0 && i == 0,
                          e));
        }
    return range_of_parts(t, -1.f, -1.f, e);
}

err_code range_fit(const quant_block *b, const fold *f, plan_linear *out, const range_grid *grid,
                   err *e)
{
    range_tile t = {0};
    second_moment h;
    void *mem;
    const int64_t most = 2 * b->scratch->groups;
    TRY(moment_of(b, out->role, &h, e));
    if (!h.full.data) return err_set(e, E_UNSUPPORTED, "ranges by their ends need --loss gram");
    t.h = h.full;
    TRY(mem_alloc(&mem, (size_t)(4 * most), sizeof(float), "ranges", e));
    t.ends = mem;
    t.pair = t.ends + most;
    t.part = t.pair + most;
    t.kept = t.part + most;
    const err_code rc = search_tiles(b, f, out, grid, &t, fit_tile, e);
    mem_free(mem);
    return rc;
}
