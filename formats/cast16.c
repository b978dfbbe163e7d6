/* Casts to f16 and bf16 with every element judged. */
#include "formats/cast16.h"

#include <assert.h>
#include <math.h>
#include <string.h>

#define CHUNK ((int64_t)(CAST16_BYTES / 2))

/* Exponent all ones: NaN or infinity. */
static uint16_t special_bits(dtype dt) { return dt == DT_F16 ? 0x7c00u : 0x7f80u; }

static err_code refuse(const cast16 *c, int64_t at, float v, err *e)
{
    return err_set(e, E_INPUT, "%s: element %lld is %s, expected a finite number", c->what,
                   (long long)at, isnan(v) ? "NaN" : "infinite");
}

/* The same type: bits stay, only the special ones are looked for. */
static err_code run_same(const cast16 *c, uint16_t *dst, const uint16_t *src, int64_t first,
                         int64_t n, err *e)
{
    const uint16_t special = special_bits(c->to);
    int bad = 0;
    for (int64_t i = 0; i < n; i++) {
        dst[i] = src[i];
        bad |= (src[i] & special) == special;
    }
    for (int64_t i = 0; bad && i < n; i++)
        if ((src[i] & special) == special)
            return refuse(c, first + i, c->to == DT_F16 ? f16_to_f32(src[i]) : bf16_to_f32(src[i]),
                          e);
    return OK;
}

static float load(const void *src, dtype from, int64_t i)
{
    if (from == DT_F32) return ((const float *)src)[i];
    return from == DT_F16 ? f16_to_f32(((const uint16_t *)src)[i])
                          : bf16_to_f32(((const uint16_t *)src)[i]);
}

err_code cast16_run(cast16 *c, uint16_t *dst, const void *src, dtype from, int64_t first, int64_t n,
                    err *e)
{
    assert(c->to == DT_F16 || c->to == DT_BF16);
    assert(from == DT_F32 || from == DT_F16 || from == DT_BF16);
    if (from == c->to) return run_same(c, dst, src, first, n, e);

    const uint16_t special = special_bits(c->to);
    for (int64_t i = 0; i < n; i++) {
        const float v = load(src, from, i);
        uint16_t h = c->to == DT_F16 ? f32_to_f16(v) : f32_to_bf16(v);
        if ((h & special) == special) {
            if (!isfinite(v)) return refuse(c, first + i, v, e);
            c->beyond++;
            if (fabsf(v) > c->largest) c->largest = fabsf(v);
            h = (uint16_t)((h & 0x8000u) | (special - 1u)); /* the largest finite one */
        }
        dst[i] = h;
    }
    return OK;
}

err_code cast16_end(const cast16 *c, const job *j, err *e)
{
    const double limit = c->to == DT_F16 ? 65504 : 0x1.fep127;
    if (!c->beyond) return OK;
    if (!c->clamp)
        return err_set(e, E_INPUT,
                       "%s: %lld values do not fit %s: expected at most %g, got up to %g", c->what,
                       (long long)c->beyond, dtype_name(c->to), limit, (double)c->largest);
    job_log(j, LOG_WARN, "%s: %lld values up to %g cut to %g", c->what, (long long)c->beyond,
            (double)c->largest, limit);
    return OK;
}

err_code cast16_tensor(const tensor *t, cast16 *c, void *buf, cast16_sink sink, void *ctx,
                       const job *j, err *e)
{
    const int64_t rows = t->ndim == 1 ? 1 : t->shape[0], cols = t->shape[t->ndim - 1];
    const size_t item = dtype_bytes(t->dt);
    assert(t->ndim == 1 || t->ndim == 2);
    assert(cols < 2 || t->stride[t->ndim - 1] == 1);

    for (int64_t r = 0; r < rows; r++) {
        const char *row = (const char *)t->data +
                          (size_t)(t->ndim == 2 ? r * t->stride[0] : 0) * item;
        for (int64_t at = 0; at < cols; at += CHUNK) {
            const int64_t n = cols - at < CHUNK ? cols - at : CHUNK, first = r * cols + at;
            TRY(cast16_run(c, buf, row + (size_t)at * item, t->dt, first, n, e));
            if (c->beyond && !c->clamp) continue; /* refused at the end, once all are counted */
            TRY(sink(ctx, first, buf, n, e));
        }
    }
    return cast16_end(c, j, e);
}
