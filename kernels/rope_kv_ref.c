/* Rotary embedding of q and k, then k and v into the cache. The angle is the f32 product of
 * position and inverse frequency, as the training code had it: computing it more exactly would move
 * far positions away from what the model learnt. */
#include <math.h>

#include "kernels/kv.h"
#include "kernels/ref.h"

/* Pairs (2j,2j+1) or (j, j+dims/2) of one head turn by angle j. */
static void rotate_head(float *head, const rope_spec *r, int32_t pos)
{
    const float *inv_freq = r->inv_freq.data;
    const int half = r->dims / 2;
    for (int j = 0; j < half; j++) {
        const float angle = (float)pos * inv_freq[j];
        const float c = (float)cos(angle) * r->mscale, s = (float)sin(angle) * r->mscale;
        float *a = r->interleaved ? head + 2 * j : head + j;
        float *b = r->interleaved ? a + 1 : a + half;
        const double x = *a, y = *b;
        *a = (float)(x * c - y * s);
        *b = (float)(x * s + y * c);
    }
}

/* q = rne((x - zero) / scale), with zero and scale as stored in f16. A scale of 0 (all values
 * equal, or a range under f16's smallest) gives codes 0. */
static void quantize_head(uint8_t *data, f16 *param, const float *x, int head_dim, int bits)
{
    const int top = (1 << bits) - 1;
    float lo = x[0], hi = x[0];
    for (int c = 1; c < head_dim; c++) {
        lo = fminf(lo, x[c]);
        hi = fmaxf(hi, x[c]);
    }
    param[0] = f32_to_f16((hi - lo) / (float)top);
    param[1] = f32_to_f16(lo);
    const float scale = f16_to_f32(param[0]), zero = f16_to_f32(param[1]);
    for (int c = 0; c < head_dim; c++) {
        const float f = scale > 0 ? rintf((x[c] - zero) / scale) : 0.0f;
        const int code = f > 0 ? (f < (float)top ? (int)f : top) : 0; /* NaN becomes 0 */
        if (bits == 8)
            data[c] = (uint8_t)code;
        else if (c % 2 == 0)
            data[c / 2] = (uint8_t)code;
        else
            data[c / 2] |= (uint8_t)(code << 4);
    }
}

static void store_head(const kv_layer *kv, int32_t block, int32_t slot, int32_t head, int part,
                       const float *x)
{
    uint8_t *data = kv_data(kv, block, head, part) + (size_t)slot * kv_token_bytes(kv);
    if (kv->format == KV_16) {
        for (int c = 0; c < kv->head_dim; c++) ((f16 *)data)[c] = f32_to_f16(x[c]);
        return;
    }
    quantize_head(data, kv_param(kv, block, head, part) + 2 * slot, x, kv->head_dim,
                  (int)kv->format);
}

err_code rope_kv_ref(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                     const batch_rows *rows, const kv_layer *kv, err *e)
{
    const int32_t *start = kv_i32(&rows->seq_start), *pos = kv_i32(&rows->pos);
    (void)d;
    (void)e;
    for (int32_t s = 0; s < rows->seqs; s++) {
        for (int32_t i = start[s]; i < start[s + 1]; i++) {
            const int32_t block = kv_blocks(rows, s)[pos[i] / kv->block_tokens];
            const int32_t slot = pos[i] % kv->block_tokens;
            for (int32_t h = 0; h < kv->kv_heads; h++) {
                float *kh = (float *)k->data + i * k->stride[0] + h * k->stride[1];
                const float *vh = (const float *)v->data + i * v->stride[0] + h * v->stride[1];
                float *qh = (float *)q->data + i * q->stride[0] + h * q->stride[1];
                for (int64_t g = 0; g < q->shape[2]; g++)
                    rotate_head(qh + g * q->stride[2], r, pos[i]);
                rotate_head(kh, r, pos[i]);
                store_head(kv, block, slot, h, KV_K, kh);
                store_head(kv, block, slot, h, KV_V, vh);
            }
        }
    }
    return OK;
}
