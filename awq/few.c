/* Shrinking. */
#include "awq/few.h"

#include <inttypes.h>

static bool is_few(const calib_tap *t) { return t->count < t->k; }

bool few_tokens(const calib_block *stats, tensor_role r)
{
    const calib_tap *t = stats ? calib_find(stats, r) : NULL;
    return t && is_few(t);
}

void few_shrink(const calib_tap *t, float *to)
{
    const float *from = t->blocks.data;
    const int64_t g = t->g, n = t->k * g;
    const double share = (double)t->k / (double)(t->k + t->count);
    double mean = 0;
    for (int64_t i = 0; i < t->k; i++) mean += from[i * g + i % g];
    mean = mean > 0 ? mean / (double)t->k : 1;
    for (int64_t i = 0; i < n; i++) {
        const bool diagonal = i / g % g == i % g;
        to[i] = (float)((1 - share) * from[i] + (diagonal ? share * mean : 0));
    }
}

err_code few_stats(calib_block *stats, int32_t layer, void **mem, const job *j, err *e)
{
    size_t floats = 0;
    *mem = NULL;
    for (int i = 0; i < stats->n_taps; i++)
        if (is_few(&stats->tap[i])) floats += (size_t)(stats->tap[i].k * stats->tap[i].g);
    if (!floats) return OK;
    TRY(mem_alloc(mem, floats, sizeof(float), "second moments of few tokens", e));
    float *at = *mem;
    for (int i = 0; i < stats->n_taps; i++) {
        calib_tap *t = &stats->tap[i];
        if (!is_few(t)) continue;
        few_shrink(t, at);
        t->blocks.data = at;
        at += t->k * t->g;
        job_log(j, LOG_INFO,
                "layer %d: input of %s: %" PRId64 " tokens for %" PRId64
                " channels: ranges alone are searched",
                (int)layer, role_name(t->tap), t->count, t->k);
    }
    return OK;
}
