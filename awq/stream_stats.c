/* From H, rows of a block at a time. */
#include "awq/stream_stats.h"

#include <math.h>
#include <string.h>

#include "awq/few.h"
#include "awq/moments.h"
#include "base/mem.h"

static bool reads_stream(const calib_tap *t) { return t->tap == ROLE_QKV || t->tap == ROLE_GATE; }

size_t stream_stats_bytes(const model_desc *m)
{
    const calib_block shape = calib_shape(m);
    size_t sum = 0;
    for (int i = 0; i < shape.n_taps; i++) {
        const calib_tap *t = &shape.tap[i];
        const size_t k = (size_t)t->k, g = (size_t)calib_block_size(t->k);
        if (reads_stream(t))
            sum += arena_need(k * g * sizeof(float)) + arena_need(k * sizeof(double));
    }
    return sum;
}

/* rows [g,k]: room for the rows of a block. */
static err_code take_tap(const quant_block *b, const calib_block *stats, calib_tap *t, float *rows,
                         err *e)
{
    const double mean = sqrt(2 / 3.14159265358979323846);
    tensor h;
    void *blocks, *sums;
    TRY(arena_get(b->mem, &blocks, (size_t)(t->k * t->g) * sizeof(float), e));
    TRY(arena_get(b->mem, &sums, (size_t)t->k * sizeof(double), e));
    TRY(moments_get(b->moments, t->tap, &h, e));
    for (int64_t at = 0; at < t->k; at += t->g) {
        const tensor from = tensor_rows(&h, at, t->g);
        tensor to = tensor_2d(rows, DT_F32, t->g, t->k);
        TRY(dev_copy(b->d, &to, &from, e));
        TRY(dev_sync(b->d, e));
        for (int64_t i = 0; i < t->g; i++) {
            memcpy((float *)blocks + (at + i) * t->g, rows + i * t->k + at,
                   (size_t)t->g * sizeof *rows);
            ((double *)sums)[at + i] = mean *
                                       sqrt((double)rows[i * t->k + at + i] * (double)t->count);
        }
    }
    t->blocks.data = blocks;
    t->abssum.data = sums;
    t->absmax = (tensor){0};
    if (few_tokens(stats, t->tap)) few_shrink(t, blocks);
    return OK;
}

err_code stream_stats(const quant_block *b, calib_block *stats, err *e)
{
    float *rows;
    err_code rc = OK;
    TRY(mem_alloc((void **)&rows, (size_t)(b->m->hidden * calib_block_size(b->m->hidden)),
                  sizeof *rows, "statistics", e));
    for (int i = 0; i < stats->n_taps && rc == OK; i++)
        if (reads_stream(&stats->tap[i])) rc = take_tap(b, stats, &stats->tap[i], rows, e);
    mem_free(rows);
    return rc;
}
