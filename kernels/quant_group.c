/* The rounding rule of quant_group.h. Plain loops: every operation is exact IEEE f32, so that a
 * vectorizing compiler changes nothing but the time. rne(x) adds and takes away 1.5 * 2^23, exact
 * for |x| < 2^22; x is bounded first, which no code between 0 and 15 can notice. */
#include "kernels/quant_group.h"

#include <inttypes.h>

#include "base/half.h"
#include "kernels/ops_check.h"

#define ROWS_PER_ITEM 8
#define LANES         8
#define RNE_MAGIC     12582912.f /* 1.5 * 2^23 */

typedef struct {
    const tensor *w, *scale, *zero, *limit, *col;
    tensor *out, *out_zero;
    int64_t n, k;
    int32_t group;
} quant_job;

static inline float minf(float a, float b) { return a < b ? a : b; }
static inline float maxf(float a, float b) { return a > b ? a : b; }
static inline float rne(float x)
{
    const float y = x + RNE_MAGIC;
    return y - RNE_MAGIC;
}

static inline void *row_of(const tensor *t, int64_t i)
{
    return (char *)t->data + (size_t)(i * t->stride[0]) * dtype_bytes(t->dt);
}

/* (code - zero) as a float, -15..15. zero - 32 and zero + 32 lie beyond both ends of the code
 * range. */
static inline float step_of(float w, float scale, float zero)
{
    const float q = rne(minf(maxf(w / scale, -32.f), 32.f)) + zero;
    return minf(maxf(q, 0.f), 15.f) - zero;
}

static void group_range(f16 *scale, uint8_t *zero, const float *w, int32_t g, float limit)
{
    float lo8[LANES] = {0}, hi8[LANES] = {0}, lo = 0.f, hi = 0.f;
    int32_t i = 0;
    for (; i + LANES <= g; i += LANES)
        for (int32_t l = 0; l < LANES; l++) {
            lo8[l] = minf(lo8[l], w[i + l]);
            hi8[l] = maxf(hi8[l], w[i + l]);
        }
    for (; i < g; i++) {
        lo = minf(lo, w[i]);
        hi = maxf(hi, w[i]);
    }
    for (int32_t l = 0; l < LANES; l++) {
        lo = minf(lo, lo8[l]);
        hi = maxf(hi, hi8[l]);
    }
    lo = maxf(lo, -limit);
    hi = minf(hi, limit);
    const float range = maxf(hi / 15.f - lo / 15.f,
                             QUANT_RANGE_MIN / 15.f); /* hi - lo may overflow */
    *scale = f32_to_f16(minf(range, QUANT_SCALE_MAX));
    *zero = (uint8_t)minf(rne(minf(-lo / f16_to_f32(*scale), 32.f)), 15.f);
}

static void range_rows(void *ctx, int64_t item, int worker)
{
    const quant_job *j = ctx;
    const int64_t from = item * ROWS_PER_ITEM,
                  end = from + ROWS_PER_ITEM < j->n ? from + ROWS_PER_ITEM : j->n;
    (void)worker;
    for (int64_t r = from; r < end; r++) {
        const float *w = row_of(j->w, r), *limit = j->limit ? row_of(j->limit, r) : NULL;
        f16 *scale = row_of(j->out, r);
        uint8_t *zero = row_of(j->out_zero, r);
        for (int64_t b = 0; b < j->k / j->group; b++)
            group_range(&scale[b], &zero[b], w + b * j->group, j->group, limit ? limit[b] : 3e38f);
    }
}

static void code_rows(void *ctx, int64_t item, int worker)
{
    const quant_job *j = ctx;
    const int64_t from = item * ROWS_PER_ITEM,
                  end = from + ROWS_PER_ITEM < j->n ? from + ROWS_PER_ITEM : j->n;
    (void)worker;
    for (int64_t r = from; r < end; r++) {
        const float *w = row_of(j->w, r);
        const f16 *scale = row_of(j->scale, r);
        const uint8_t *zero = row_of(j->zero, r);
        uint8_t *code = row_of(j->out, r);
        for (int64_t b = 0; b < j->k / j->group; b++) {
            const float s = f16_to_f32(scale[b]), z = zero[b];
            for (int64_t i = b * j->group; i < (b + 1) * j->group; i++)
                code[i] = (uint8_t)(step_of(w[i], s, z) + z);
        }
    }
}

static void error_group(float *y, const float *w, const float *col, int32_t g, float s, float z)
{
    if (col)
        for (int32_t i = 0; i < g; i++) y[i] = (step_of(w[i], s, z) * s - w[i]) / col[i];
    else
        for (int32_t i = 0; i < g; i++) y[i] = step_of(w[i], s, z) * s - w[i];
}

static void error_rows(void *ctx, int64_t item, int worker)
{
    const quant_job *j = ctx;
    const int64_t from = item * ROWS_PER_ITEM,
                  end = from + ROWS_PER_ITEM < j->n ? from + ROWS_PER_ITEM : j->n;
    const float *col = j->col ? j->col->data : NULL;
    (void)worker;
    for (int64_t r = from; r < end; r++) {
        const float *w = row_of(j->w, r);
        const f16 *scale = row_of(j->scale, r);
        const uint8_t *zero = row_of(j->zero, r);
        float *y = row_of(j->out, r);
        for (int64_t b = 0; b < j->k / j->group; b++) {
            const int64_t at = b * j->group;
            error_group(y + at, w + at, col ? col + at : NULL, j->group, f16_to_f32(scale[b]),
                        zero[b]);
        }
    }
}

static err_code check_common(const device *d, const tensor *w, const tensor *scale,
                             const tensor *zero, int32_t group, const char *op, err *e)
{
    if (dev_kind_of(d) != DEV_CPU)
        return err_set(e, E_UNSUPPORTED, "%s: expected the CPU device, got %s", op, dev_name(d));
    TRY(check_tensor(d, w, op, DT_F32, 2, (const int64_t[]){-1, -1}, e));
    if (group < 1 || w->shape[1] % group)
        return err_set(e, E_SHAPE, "%s: group: expected a divisor of %" PRId64 ", got %d", op,
                       w->shape[1], (int)group);
    const int64_t parts[] = {w->shape[0], w->shape[1] / group};
    TRY(check_tensor(d, scale, op, DT_F16, 2, parts, e));
    return check_tensor(d, zero, op, DT_U8, 2, parts, e);
}

static err_code run(device *d, pool_fn fn, quant_job *j, const tensor *w, int32_t group)
{
    j->w = w;
    j->n = w->shape[0];
    j->k = w->shape[1];
    j->group = group;
    pool_run(dev_pool(d), fn, j, (j->n + ROWS_PER_ITEM - 1) / ROWS_PER_ITEM);
    return OK;
}

err_code op_quant_range(device *d, tensor *scale, tensor *zero, const tensor *w,
                        const tensor *limit, int32_t group, err *e)
{
    TRY(check_common(d, w, scale, zero, group, "op_quant_range", e));
    if (limit) TRY(check_tensor(d, limit, "op_quant_range: limit", DT_F32, 2, scale->shape, e));
    return run(d, range_rows, &(quant_job){.limit = limit, .out = scale, .out_zero = zero}, w,
               group);
}

err_code op_quant_codes(device *d, tensor *codes, const tensor *w, const tensor *scale,
                        const tensor *zero, int32_t group, err *e)
{
    TRY(check_common(d, w, scale, zero, group, "op_quant_codes", e));
    TRY(check_tensor(d, codes, "op_quant_codes: codes", DT_U8, 2, w->shape, e));
    return run(d, code_rows, &(quant_job){.scale = scale, .zero = zero, .out = codes}, w, group);
}

err_code op_quant_error(device *d, tensor *y, const tensor *w, const tensor *scale,
                        const tensor *zero, const tensor *col, int32_t group, err *e)
{
    TRY(check_common(d, w, scale, zero, group, "op_quant_error", e));
    TRY(check_tensor(d, y, "op_quant_error: y", DT_F32, 2, w->shape, e));
    if (col) TRY(check_tensor(d, col, "op_quant_error: col", DT_F32, 1, &w->shape[1], e));
    return run(d, error_rows, &(quant_job){.scale = scale, .zero = zero, .col = col, .out = y}, w,
               group);
}
