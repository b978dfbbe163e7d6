/* Ranges. Groups of a row do not interact here: a group's error counts by its own block of H. */
#include "awq/range.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "kernels/quant_group.h"

typedef struct {
    const quant_block *b;
    const float *col; /* [k] factors of the inputs, NULL: 1 */
    const calib_tap *tap;
    tensor w, x;        /* f32 [n,k]: the tile with its factors; errors */
    tensor scale, zero; /* [n,k/g] of the candidate, then of the winner */
    tensor limit;       /* f32 [n,k/g] of the candidate */
    float *m0, *best;   /* [n,k/g] largest |w|, winning limit */
    double *loss;       /* [k/g][n] least so far */
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
    linear_view v;
    TRY(weights_linear(b->src, out->role, b->layer, -1, &v, e));
    const int64_t n = v.dense.shape[0], step = tile_rows(b->scratch, v.dense.shape[1]);
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        tensor w, scale = tensor_rows(&out->scale, at, rows),
                  zero = tensor_rows(&out->zero, at, rows);
        TRY(load_tile(b, fl, &v.dense, out->role, at, rows, &w, e));
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
    const int64_t g = t->b->o->group, s = t->tap->g, at = group * g % s;
    tensor h = tensor_2d((float *)t->tap->blocks.data + group * g / s * s * s + at * s + at, DT_F32,
                         g, g);
    h.stride[0] = s;
    return h;
}

/* Error of every group under the candidate's limits; keeps the limits that improve. */
static err_code try_limits(range_tile *t, float part, bool first, err *e)
{
    const quant_block *b = t->b;
    const int64_t n = t->w.shape[0];
    float *limit = t->limit.data;
    double *row = b->scratch->row;
    tensor col = tensor_1d((float *)(uintptr_t)t->col, DT_F32, t->w.shape[1]),
           out = tensor_1d(row, DT_F64, n);
    for (int64_t i = 0; i < n * t->groups; i++) limit[i] = t->m0[i] * part;
    TRY(op_quant_range(b->d, &t->scale, &t->zero, &t->w, &t->limit, b->o->group, e));
    TRY(op_quant_error(b->d, &t->x, &t->w, &t->scale, &t->zero, t->col ? &col : NULL, b->o->group,
                       e));
    for (int64_t j = 0; j < t->groups; j++) {
        const tensor x = tensor_cols(&t->x, j * b->o->group, b->o->group), h = group_block(t, j);
        double *least = t->loss + j * n;
        TRY(op_quad(b->d, &out, &x, &h, e));
        for (int64_t i = 0; i < n; i++) {
            if (!first && row[i] >= least[i]) continue;
            least[i] = row[i];
            t->best[i * t->groups + j] = limit[i * t->groups + j];
        }
    }
    return OK;
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

err_code range_search(const quant_block *b, const fold *f, plan_linear *out, const range_grid *grid,
                      err *e)
{
    const fold_linear *fl = f ? fold_find(f, out->role) : NULL;
    const quant_scratch *q = b->scratch;
    linear_view v;
    range_tile t = {.b = b,
                    .col = fl ? fl->col : NULL,
                    .tap = b->stats ? calib_find(b->stats, out->role) : NULL,
                    .m0 = q->m0,
                    .best = q->best,
                    .loss = q->sum};
    TRY(check_tap(b, out->role, t.tap, e));
    TRY(weights_linear(b->src, out->role, b->layer, -1, &v, e));
    const int64_t n = v.dense.shape[0], k = v.dense.shape[1], step = tile_rows(q, k);
    t.groups = k / b->o->group;
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        TRY(load_tile(b, fl, &v.dense, out->role, at, rows, &t.w, e));
        t.x = tensor_2d(q->x, DT_F32, rows, k);
        t.limit = tensor_2d(q->limit, DT_F32, rows, t.groups);
        t.scale = tensor_rows(&out->scale, at, rows);
        t.zero = tensor_rows(&out->zero, at, rows);
        TRY(search_tile(&t, grid, e));
    }
    return OK;
}
