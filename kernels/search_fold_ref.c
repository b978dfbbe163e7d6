/* What the ops of the cache's folds mean. */
#include <math.h>

#include "base/half.h"
#include "kernels/device_internal.h"
#include "kernels/search_fold_ref.h"

#define LEVELS 15.f /* of 4 bits */

static void turn_head(float *head, const rope_spec *r, int32_t pos)
{
    const float *inv_freq = r->inv_freq.data;
    const int half = r->dims / 2;
    for (int j = 0; j < half; j++) {
        const float angle = (float)pos * inv_freq[j];
        const float c = (float)cos(angle) * r->mscale, s = (float)sin(angle) * r->mscale;
        float *a = r->interleaved ? head + 2 * j : head + j, *b = r->interleaved ? a + 1 : a + half;
        const float x = *a, y = *b;
        *a = x * c - y * s;
        *b = x * s + y * c;
    }
}

typedef struct {
    tensor *x;
    const int32_t *pos;
    const rope_spec *r;
} turn_job;

static void turn_row(void *ctx, int64_t i, int worker)
{
    const turn_job *t = ctx;
    float *row = (float *)t->x->data + i * t->x->stride[0];
    (void)worker;
    for (int64_t h = 0; h < t->x->shape[1]; h++)
        turn_head(row + h * t->x->stride[1], t->r, t->pos[i]);
}

err_code search_turn_ref(device *d, tensor *x, const tensor *pos, const rope_spec *r, err *e)
{
    (void)e;
    pool_run(dev_pool(d), turn_row, &(turn_job){x, pos->data, r}, x->shape[0]);
    return OK;
}

void search_cache_row(float *y, const float *x, const float *s, int64_t k)
{
    float lo = x[0] / s[0], hi = lo;
    for (int64_t i = 0; i < k; i++) {
        y[i] = x[i] / s[i];
        lo = fminf(lo, y[i]);
        hi = fmaxf(hi, y[i]);
    }
    const float zero = f16_to_f32(f32_to_f16(lo)),
                step = f16_to_f32(f32_to_f16((hi - lo) / LEVELS));
    for (int64_t i = 0; i < k; i++) {
        const float q = step > 0 ? fminf(fmaxf(rintf((y[i] - zero) / step), 0.f), LEVELS) : 0;
        y[i] = (q * step + zero) * s[i] - x[i];
    }
}

typedef struct {
    tensor *y;
    const tensor *x, *s;
} error_job;

static void error_row(void *ctx, int64_t at, int worker)
{
    const error_job *j = ctx;
    const int64_t n = j->x->shape[0], k = j->x->shape[1];
    (void)worker;
    search_cache_row((float *)j->y->data + at * k,
                     (const float *)j->x->data + at % n * j->x->stride[0],
                     (const float *)j->s->data + at / n * k, k);
}

err_code search_cache_errors_ref(device *d, tensor *y, const tensor *x, const tensor *s, err *e)
{
    (void)e;
    pool_run(dev_pool(d), error_row, &(error_job){y, x, s}, y->shape[0]);
    return OK;
}
