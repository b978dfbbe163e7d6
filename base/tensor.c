/* Tensor views: shapes, checks, slices and the one conversion between float types. */
#include "base/tensor.h"

#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/half.h"

static const struct {
    const char *name;
    uint8_t bytes;
} dtype_table[DT_COUNT] = {
    [DT_NONE] = {"none", 0},       [DT_F64] = {"F64", 8},   [DT_F32] = {"F32", 4},
    [DT_F16] = {"F16", 2},         [DT_BF16] = {"BF16", 2}, [DT_I64] = {"I64", 8},
    [DT_I32] = {"I32", 4},         [DT_I16] = {"I16", 2},   [DT_I8] = {"I8", 1},
    [DT_U64] = {"U64", 8},         [DT_U32] = {"U32", 4},   [DT_U16] = {"U16", 2},
    [DT_U8] = {"U8", 1},           [DT_BOOL] = {"BOOL", 1}, [DT_F8_E4M3] = {"F8_E4M3", 1},
    [DT_F8_E5M2] = {"F8_E5M2", 1},
};

size_t dtype_bytes(dtype dt)
{
    assert(dt >= DT_NONE && dt < DT_COUNT);
    return dtype_table[dt].bytes;
}

const char *dtype_name(dtype dt)
{
    assert(dt >= DT_NONE && dt < DT_COUNT);
    return dtype_table[dt].name;
}

bool dtype_from_name(dtype *out, const char *name)
{
    for (int i = DT_NONE + 1; i < DT_COUNT; i++) {
        if (strcmp(dtype_table[i].name, name) == 0) {
            *out = (dtype)i;
            return true;
        }
    }
    return false;
}

tensor tensor_of(void *data, dtype dt, int ndim, const int64_t *shape)
{
    assert(ndim >= 0 && ndim <= TENSOR_MAX_DIMS);
    tensor t = {.data = data, .dt = dt, .mem = MEM_HOST, .ndim = ndim};
    int64_t step = 1;
    for (int i = ndim - 1; i >= 0; i--) {
        t.shape[i] = shape[i];
        t.stride[i] = step;
        step *= shape[i];
    }
    return t;
}

tensor tensor_1d(void *data, dtype dt, int64_t n) { return tensor_of(data, dt, 1, &n); }

tensor tensor_2d(void *data, dtype dt, int64_t rows, int64_t cols)
{
    return tensor_of(data, dt, 2, (const int64_t[]){rows, cols});
}

static tensor tensor_slice(const tensor *t, int dim, int64_t from, int64_t n)
{
    assert(dim >= 0 && dim < t->ndim);
    assert(from >= 0 && n >= 0 && from <= t->shape[dim] - n);
    tensor s = *t;
    s.shape[dim] = n;
    if (t->data) s.data = (uint8_t *)t->data + (size_t)(from * t->stride[dim]) * dtype_bytes(t->dt);
    return s;
}

tensor tensor_rows(const tensor *t, int64_t from, int64_t n) { return tensor_slice(t, 0, from, n); }

tensor tensor_cols(const tensor *t, int64_t from, int64_t n)
{
    return tensor_slice(t, t->ndim - 1, from, n);
}

bool tensor_contiguous(const tensor *t)
{
    int64_t step = 1;
    for (int i = t->ndim - 1; i >= 0; i--) {
        if (t->shape[i] != 1 && t->stride[i] != step) return false;
        step *= t->shape[i];
    }
    return true;
}

int64_t tensor_count(const tensor *t)
{
    int64_t n = 1;
    for (int i = 0; i < t->ndim; i++) n *= t->shape[i];
    return n;
}

size_t tensor_bytes(const tensor *t) { return (size_t)tensor_count(t) * dtype_bytes(t->dt); }

err_code tensor_count_checked(int64_t *count, int ndim, const int64_t *shape, const char *what,
                              err *e)
{
    int64_t n = 1;
    for (int i = 0; i < ndim; i++) {
        if (shape[i] < 0)
            return err_set(e, E_INPUT, "%s: dimension %d is negative (%lld)", what, i,
                           (long long)shape[i]);
        /* An 8-byte type must still fit, and a zero must not hide an absurd neighbour. */
        if (shape[i] > INT64_MAX / 16 ||
            __builtin_mul_overflow(n ? n : 1, shape[i] ? shape[i] : 1, &n) || n > INT64_MAX / 16)
            return err_set(e, E_INPUT, "%s: the product of the dimensions overflows", what);
    }
    for (int i = 0; i < ndim; i++)
        if (shape[i] == 0) n = 0;
    *count = n;
    return OK;
}

static void tensor_shape_text(char *buf, size_t cap, dtype dt, int ndim, const int64_t *shape)
{
    size_t at = 0;
    int n = snprintf(buf, cap, "%s [", dtype_name(dt));
    for (int i = 0; n >= 0 && i <= ndim; i++) {
        at += (size_t)n;
        if (at >= cap) return;
        if (i == ndim)
            n = snprintf(buf + at, cap - at, "]");
        else if (shape[i] < 0)
            n = snprintf(buf + at, cap - at, "%s*", i ? "," : "");
        else
            n = snprintf(buf + at, cap - at, "%s%lld", i ? "," : "", (long long)shape[i]);
    }
}

void tensor_describe(char *buf, size_t cap, const tensor *t)
{
    tensor_shape_text(buf, cap, t->dt, t->ndim, t->shape);
}

err_code tensor_expect(const tensor *t, const char *what, dtype dt, int ndim, const int64_t *shape,
                       err *e)
{
    assert(ndim >= 0 && ndim <= TENSOR_MAX_DIMS);
    bool same = t->dt == dt && t->ndim == ndim;
    for (int i = 0; same && i < ndim; i++) same = shape[i] == -1 || t->shape[i] == shape[i];
    if (same) return OK;
    char want[128], got[128];
    tensor_shape_text(want, sizeof want, dt, ndim, shape);
    tensor_describe(got, sizeof got, t);
    return err_set(e, E_SHAPE, "%s: expected %s, got %s", what, want, got);
}

static float f8_e4m3_to_f32(uint8_t v)
{
    const int exp = v >> 3 & 15, man = v & 7;
    float f;
    if (exp == 15 && man == 7)
        f = NAN;
    else
        f = exp ? ldexpf((float)(8 + man), exp - 10) : ldexpf((float)man, -9);
    return v & 0x80 ? -f : f;
}

/* E5M2 is the upper byte of an f16. */
static float f8_e5m2_to_f32(uint8_t v) { return f16_to_f32((f16)(v << 8)); }

#define LOAD_LOOP(type, expr)             \
    do {                                  \
        const type *s = src;              \
        for (int64_t i = 0; i < n; i++) { \
            const type v = s[i * step];   \
            out[i] = (expr);              \
        }                                 \
    } while (0)

static void convert_load(float *out, const void *src, dtype dt, int64_t step, int64_t n)
{
    switch (dt) {
    case DT_F64: LOAD_LOOP(double, (float)v); break;
    case DT_F32: LOAD_LOOP(float, v); break;
    case DT_F16: LOAD_LOOP(f16, f16_to_f32(v)); break;
    case DT_BF16: LOAD_LOOP(bf16, bf16_to_f32(v)); break;
    case DT_F8_E4M3: LOAD_LOOP(uint8_t, f8_e4m3_to_f32(v)); break;
    case DT_F8_E5M2: LOAD_LOOP(uint8_t, f8_e5m2_to_f32(v)); break;
    default: assert(!"tensor_convert reads float types only");
    }
}

#define STORE_LOOP(type, expr)            \
    do {                                  \
        type *d = dst;                    \
        for (int64_t i = 0; i < n; i++) { \
            const float v = in[i];        \
            d[i * step] = (expr);         \
        }                                 \
    } while (0)

/* Returns how many finite inputs went to infinity. */
static int64_t convert_store(void *dst, const float *in, dtype dt, int64_t step, int64_t n)
{
    int64_t over = 0;
    switch (dt) {
    case DT_F64: STORE_LOOP(double, (double)v); break;
    case DT_F32: STORE_LOOP(float, v); break;
    case DT_F16:
        STORE_LOOP(f16, f32_to_f16(v));
        for (int64_t i = 0; i < n; i++) over += fabsf(in[i]) >= 65520.0f && isfinite(in[i]);
        break;
    case DT_BF16:
        STORE_LOOP(bf16, f32_to_bf16(v));
        for (int64_t i = 0; i < n; i++) over += fabsf(in[i]) >= 0x1.ffp127f && isfinite(in[i]);
        break;
    default: assert(!"tensor_convert writes F64, F32, F16 and BF16 only");
    }
    return over;
}

static int64_t convert_f64_over(const void *src, int64_t step, const float *in, int64_t n)
{
    const double *s = src;
    int64_t over = 0;
    for (int64_t i = 0; i < n; i++) over += isfinite(s[i * step]) && !isfinite(in[i]);
    return over;
}

static int64_t convert_row(void *dst, dtype ddt, int64_t dstep, const void *src, dtype sdt,
                           int64_t sstep, int64_t n)
{
    float buf[512];
    int64_t over = 0;
    const size_t db = dtype_bytes(ddt), sb = dtype_bytes(sdt);
    for (int64_t at = 0; at < n; at += 512) {
        const int64_t m = n - at < 512 ? n - at : 512;
        const uint8_t *s = (const uint8_t *)src + (size_t)(at * sstep) * sb;
        convert_load(buf, s, sdt, sstep, m);
        if (sdt == DT_F64) over += convert_f64_over(s, sstep, buf, m);
        over += convert_store((uint8_t *)dst + (size_t)(at * dstep) * db, buf, ddt, dstep, m);
    }
    return over;
}

int64_t tensor_convert(tensor *dst, const tensor *src)
{
    assert(dst->mem == MEM_HOST && src->mem == MEM_HOST && dst->ndim == src->ndim);
    int64_t shape[TENSOR_MAX_DIMS] = {1, 1, 1, 1};
    int64_t ds[TENSOR_MAX_DIMS] = {0}, ss[TENSOR_MAX_DIMS] = {0};
    const int pad = TENSOR_MAX_DIMS - dst->ndim;
    for (int i = 0; i < dst->ndim; i++) {
        assert(dst->shape[i] == src->shape[i]);
        shape[pad + i] = dst->shape[i];
        ds[pad + i] = dst->stride[i];
        ss[pad + i] = src->stride[i];
    }
    const size_t db = dtype_bytes(dst->dt), sb = dtype_bytes(src->dt);
    int64_t over = 0;
    for (int64_t a = 0; a < shape[0]; a++)
        for (int64_t b = 0; b < shape[1]; b++)
            for (int64_t c = 0; c < shape[2]; c++) {
                const int64_t d = a * ds[0] + b * ds[1] + c * ds[2];
                const int64_t s = a * ss[0] + b * ss[1] + c * ss[2];
                over += convert_row((uint8_t *)dst->data + (size_t)d * db, dst->dt, ds[3],
                                    (const uint8_t *)src->data + (size_t)s * sb, src->dt, ss[3],
                                    shape[3]);
            }
    return over;
}
