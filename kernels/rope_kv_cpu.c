/* Rotary embedding and the cache's formats in vectors. Sines of a row are computed once for all its
 * heads. */
#include <assert.h>
#include <math.h>

#include "kernels/cpu_ops.h"
#include "kernels/kv.h"
#include "kernels/vec.h"

#define MAX_DIM 1024 /* check_kv */

typedef struct {
    tensor *q, *k;
    const tensor *v;
    const rope_spec *r;
    const batch_rows *rows;
    const kv_layer *kv;
} rope_ctx;

/* Sine and cosine of x: x = n pi/2 + r, |r| <= pi/4 (pi/2 in three parts, so that the rest of an
 * angle up to 1e6 is right to 2e-7), Taylor series to r^9 and r^10 (remainders under 2e-9),
 * quadrant by n mod 4. */
static inline void vf_sincos(vf x, vf *sine, vf *cosine)
{
    const vf n = vf_round(vf_mul(x, vf_set(0.636619772f)));
    vf r = vf_fnma(n, vf_set(0x1.921fb6p+0f), x);
    r = vf_fnma(n, vf_set(-0x1.777a5cp-25f), r);
    r = vf_fnma(n, vf_set(-0x1.ee59dap-50f), r);
    const vf z = vf_mul(r, r);
    vf s = vf_set(1.0f / 362880);
    s = vf_fma(s, z, vf_set(-1.0f / 5040));
    s = vf_fma(s, z, vf_set(1.0f / 120));
    s = vf_fma(s, z, vf_set(-1.0f / 6));
    s = vf_fma(vf_mul(s, z), r, r);
    vf c = vf_set(-1.0f / 3628800);
    c = vf_fma(c, z, vf_set(1.0f / 40320));
    c = vf_fma(c, z, vf_set(-1.0f / 720));
    c = vf_fma(c, z, vf_set(1.0f / 24));
    c = vf_fma(c, z, vf_set(-0.5f));
    c = vf_fma(c, z, vf_set(1.0f));
    /* quadrant m = n mod 4 in 0..3: odd ones swap, m 2 and 3 turn the sine, 1 and 2 the cosine */
    const vf four = vf_set(4.0f), half = vf_set(0.5f), zero = vf_zero();
    const vf whole = vf_round(vf_sub(vf_mul(n, vf_set(0.25f)), vf_set(0.375f))); /* floor(n / 4) */
    const vf m = vf_fnma(whole, four, n);
    const vf pair = vf_round(vf_sub(vf_mul(m, half), vf_set(0.25f))); /* 0, 0, 1, 1 */
    const vf odd = vf_fnma(pair, vf_set(2.0f), m);
    const vf a = vf_select_gt(odd, half, c, s), b = vf_select_gt(odd, half, s, c);
    const vf flip = vf_sub(vf_add(pair, odd), vf_mul(vf_set(2.0f), vf_mul(pair, odd))); /* xor */
    *sine = vf_select_gt(pair, half, vf_sub(zero, a), a);
    *cosine = vf_select_gt(flip, half, vf_sub(zero, b), b);
}

/* cos and sin of a position, [dims/2] each, times mscale; arrays hold whole vectors */
static void angles(float *cosine, float *sine, const rope_spec *r, int32_t pos)
{
    const float *inv_freq = r->inv_freq.data;
    const int64_t half = r->dims / 2;
    for (int64_t j = 0; j < half; j += VL) {
        const int64_t n = half - j < VL ? half - j : VL;
        vf s, c;
        vf_sincos(vf_mul(vf_set((float)pos), vf_load_n(inv_freq + j, n)), &s, &c);
        vf_store(cosine + j, vf_mul(c, vf_set(r->mscale)));
        vf_store(sine + j, vf_mul(s, vf_set(r->mscale)));
    }
}

static void rotate_halves(float *head, const float *c, const float *s, int64_t half)
{
    for (int64_t j = 0; j < half; j += VL) {
        const int64_t n = half - j < VL ? half - j : VL;
        const vf x = vf_load_n(head + j, n), y = vf_load_n(head + half + j, n);
        const vf cj = vf_load(c + j), sj = vf_load(s + j);
        vf_store_n(head + j, vf_fnma(y, sj, vf_mul(x, cj)), n);
        vf_store_n(head + half + j, vf_fma(x, sj, vf_mul(y, cj)), n);
    }
}

static void rotate_pairs(float *head, const float *c, const float *s, int64_t half)
{
    for (int64_t j = 0; j < half; j++) {
        const float x = head[2 * j], y = head[2 * j + 1];
        head[2 * j] = x * c[j] - y * s[j];
        head[2 * j + 1] = x * s[j] + y * c[j];
    }
}

static void store_f16(f16 *dst, const float *x, int d)
{
    int c = 0;
    for (; c + VL <= d; c += VL) vf_to_f16(dst + c, vf_load(x + c));
    if (c < d) vf_to_f16_n(dst + c, vf_load_n(x + c, d - c), d - c);
}

/* As rope_kv_ref.c, step by step: the same f32 operations, so the same codes for the same values.
 */
static void quantize(uint8_t *data, f16 *param, const float *x, int d, int bits)
{
    uint8_t codes[MAX_DIM + VL];
    float value[VL];
    vf lo_v = vf_set(INFINITY), hi_v = vf_set(-INFINITY);
    const float top = (float)((1 << bits) - 1);
    int c = 0;
    for (; c + VL <= d; c += VL) {
        lo_v = vf_min(vf_load(x + c), lo_v);
        hi_v = vf_max(vf_load(x + c), hi_v);
    }
    float lo = vf_hmin(lo_v), hi = vf_hmax(hi_v);
    for (; c < d; c++) {
        lo = fminf(lo, x[c]);
        hi = fmaxf(hi, x[c]);
    }
    param[0] = f32_to_f16((hi - lo) / top);
    param[1] = f32_to_f16(lo);
    const float scale = f16_to_f32(param[0]);
    const vf zero = vf_set(f16_to_f32(param[1])), div = vf_set(scale > 0 ? scale : 1.0f);
    const vf limit = vf_set(scale > 0 ? top : 0.0f);
    for (c = 0; c < d; c += VL) {
        vf f = vf_round(vf_div(vf_sub(vf_load_n(x + c, d - c < VL ? d - c : VL), zero), div));
        f = vf_min(vf_max(f, vf_zero()), limit); /* max gives its second operand for a NaN */
        vf_store(value, f);
        for (int i = 0; i < VL; i++) codes[c + i] = (uint8_t)value[i];
    }
    if (bits == 8)
        memcpy(data, codes, (size_t)d);
    else
        for (c = 0; c < d / 2; c++) data[c] = (uint8_t)(codes[2 * c] | codes[2 * c + 1] << 4);
}

static void store_head(const kv_layer *kv, int32_t block, int32_t slot, int32_t head, int part,
                       const float *x)
{
    uint8_t *data = kv_data(kv, block, head, part) + (size_t)slot * kv_token_bytes(kv);
    if (kv->format == KV_16)
        store_f16((f16 *)(void *)data, x, kv->head_dim);
    else
        quantize(data, kv_param(kv, block, head, part) + 2 * slot, x, kv->head_dim,
                 (int)kv->format);
}

static void rope_row(void *ctx, int64_t i, int worker)
{
    const rope_ctx *c = ctx;
    const kv_layer *kv = c->kv;
    const int32_t *start = kv_i32(&c->rows->seq_start), pos = kv_i32(&c->rows->pos)[i];
    float cosine[MAX_DIM / 2 + VL], sine[MAX_DIM / 2 + VL];
    int32_t seq = 0;
    (void)worker;
    assert(kv->head_dim <= MAX_DIM);
    while (start[seq + 1] <= i) seq++;
    const int32_t block = kv_blocks(c->rows, seq)[pos / kv->block_tokens],
                  slot = pos % kv->block_tokens;
    angles(cosine, sine, c->r, pos);
    void (*const rotate)(float *, const float *, const float *,
                         int64_t) = c->r->interleaved ? rotate_pairs : rotate_halves;
    for (int32_t h = 0; h < kv->kv_heads; h++) {
        float *kh = (float *)c->k->data + i * c->k->stride[0] + h * c->k->stride[1];
        const float *vh = (const float *)c->v->data + i * c->v->stride[0] + h * c->v->stride[1];
        float *qh = (float *)c->q->data + i * c->q->stride[0] + h * c->q->stride[1];
        for (int64_t g = 0; g < c->q->shape[2]; g++)
            rotate(qh + g * c->q->stride[2], cosine, sine, c->r->dims / 2);
        rotate(kh, cosine, sine, c->r->dims / 2);
        store_head(kv, block, slot, h, KV_K, kh);
        store_head(kv, block, slot, h, KV_V, vh);
    }
}

err_code CPU_FN(rope_kv_cpu)(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                             const batch_rows *rows, const kv_layer *kv, err *e)
{
    rope_ctx c = {q, k, v, r, rows, kv};
    (void)e;
    pool_run(q->shape[0] < 4 ? NULL : d->workers, rope_row, &c, q->shape[0]);
    return OK;
}
