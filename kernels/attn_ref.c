/* Causal attention of each row over the cached tokens of its sequence: softmax(q k^T * scale) v in
 * two passes, so that no rescaling hides in the definition. */
#include <math.h>

#include "kernels/kv.h"
#include "kernels/ref.h"

/* Channel c of the cached token `t` of sequence s. */
static double kv_value(const kv_layer *kv, const int32_t *blocks, int32_t t, int32_t head, int part,
                       int c)
{
    const int32_t block = blocks[t / kv->block_tokens], slot = t % kv->block_tokens;
    const uint8_t *data = kv_data(kv, block, head, part) + (size_t)slot * kv_token_bytes(kv);
    if (kv->format == KV_16) return f16_to_f32(((const f16 *)data)[c]);
    const f16 *p = kv_param(kv, block, head, part) + 2 * slot;
    const int code = kv->format == KV_8 ? data[c] : data[c / 2] >> (c % 2 * 4) & 15;
    return (double)code * f16_to_f32(p[0]) + f16_to_f32(p[1]);
}

static double score(const float *q, const kv_layer *kv, const int32_t *blocks, int32_t t,
                    int32_t head, float scale)
{
    double dot = 0;
    for (int c = 0; c < kv->head_dim; c++) dot += q[c] * kv_value(kv, blocks, t, head, KV_K, c);
    return dot * scale;
}

static void attend(float *y, const float *q, const kv_layer *kv, const int32_t *blocks,
                   int32_t first, int32_t last, int32_t head, float scale)
{
    double top = -INFINITY, sum = 0, acc[1024] = {0}; /* check_kv bounds head_dim */
    for (int32_t t = first; t <= last; t++) top = fmax(top, score(q, kv, blocks, t, head, scale));
    for (int32_t t = first; t <= last; t++) {
        const double p = exp(score(q, kv, blocks, t, head, scale) - top);
        sum += p;
        for (int c = 0; c < kv->head_dim; c++) acc[c] += p * kv_value(kv, blocks, t, head, KV_V, c);
    }
    for (int c = 0; c < kv->head_dim; c++) y[c] = (float)(acc[c] / sum);
}

err_code attn_ref(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                  float scale, int32_t window, err *e)
{
    const int32_t *start = kv_i32(&rows->seq_start), *pos = kv_i32(&rows->pos);
    const int64_t groups = q->shape[2];
    (void)d;
    (void)e;
    for (int32_t s = 0; s < rows->seqs; s++) {
        for (int32_t i = start[s]; i < start[s + 1]; i++) {
            const int32_t first = window && pos[i] >= window ? pos[i] - window + 1 : 0;
            for (int32_t h = 0; h < kv->kv_heads; h++) {
                for (int64_t g = 0; g < groups; g++) {
                    const float *qh = (const float *)q->data + i * q->stride[0] + h * q->stride[1] +
                                      g * q->stride[2];
                    attend(ref_row_f32(y, i) + (h * groups + g) * kv->head_dim, qh, kv,
                           kv_blocks(rows, s), first, pos[i], h, scale);
                }
            }
        }
    }
    return OK;
}
