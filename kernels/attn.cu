/* The attention op: decode rows go to the split-KV kernel, longer ones to the flash kernel. */
#include <string.h>

#include "kernels/attn_decode.cuh"
#include "kernels/attn_prefill.cuh"
#include "kernels/device_cuda.cuh"

/* Beyond so much cache a layer, attention is faster as a kernel of its own than inside a decode
 * pass (docs/perf.md). */
#define PASS_BYTES ((int64_t)48 << 20)

static bool fast_dim(int d) { return d == 64 || d == 96 || d == 128 || d == 256; }

bool attn_decodes(const batch_rows *rows, const kv_layer *kv)
{
    return fast_dim(kv->head_dim) && kv->block_tokens % 32 == 0 && rows->max_q == 1;
}

extern "C" {

size_t attn_scratch_cuda(const device *d, const op_limits *lim)
{
    const int sms = cuda_of(d)->sms;
    const size_t parts = (size_t)lim->seqs * (size_t)lim->heads +
                         ATTN_MAX_BLOCKS * (size_t)ATTN_MAX_WAVES * (size_t)sms;
    const size_t bytes = parts * 8 * (size_t)(lim->head_dim + 2) * sizeof(float),
                 fixed = d->deterministic ? attn_fixed_scratch_cuda(lim) : 0;
    return bytes > fixed ? bytes : fixed;
}

} /* extern "C" */

err_code attn_decode_cuda(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                          const batch_rows *rows, float scale, int32_t window,
                          const rope_call *rope, err *e)
{
    const cuda_state *s = cuda_of(d);
    const int bits = kv->format == KV_16 ? 16 : (int)kv->format;
    const int64_t row_bytes = (int64_t)kv->kv_heads * kv->head_dim * 2 * bits / 8;
    attn_decode_call c;
    bool taken = false;
    memset(&c, 0, sizeof c); /* padding too: calls are compared */
    if (rope) memcpy(&c.rope, rope, sizeof c.rope), c.fused = true;
    void *work;
    c.q = (const __half *)q->data, c.y = (__half *)y->data;
    c.data = (const uint8_t *)kv->data, c.param = (const __half2 *)kv->param;
    c.table = (const int32_t *)rows->block_table.data,
    c.table_stride = (int32_t)rows->block_table.stride[0];
    c.kv_len = (const int32_t *)rows->kv_len.data, c.counters = s->counters;
    c.q_row = q->stride[0], c.q_head = q->stride[1], c.q_sub = q->stride[2], c.y_row = y->stride[0];
    c.seqs = rows->seqs, c.kv_heads = kv->kv_heads, c.group = (int32_t)q->shape[2];
    c.block_tokens = kv->block_tokens, c.window = window, c.scale = scale;
    const bool pass = cuda_pass_open(d) && c.seqs == 1 && row_bytes * rows->max_kv <= PASS_BYTES;
    const int units = c.seqs * c.kv_heads * ((c.group + 7) / 8);
    c.crowded = attn_decode_crowded(units, c.group, kv->head_dim, bits, s->sms);
    c.splits = attn_decode_splits(units, rows->max_kv,
                                  pass ? s->sms : attn_decode_slots(bits, c.crowded, s->sms),
                                  pass ? 384 : 128);
    if (units > CUDA_COUNTERS) c.splits = 1;
    const size_t planes = cuda_planes_bytes(y->shape[1]) + 128; /* at the other end */
    const size_t bytes = attn_decode_work_bytes(c.seqs, c.kv_heads, c.group, kv->head_dim,
                                                c.splits);
    TRY(dev_scratch(d, &work, bytes + planes, "attn", e));
    c.work = (float *)work;
    if (pass) TRY(cuda_pass_attn(d, &c, kv->head_dim, bits, &taken, e));
    if (taken) return OK;
    TRY(cuda_pass_stop(d, e));
    if (kv->head_dim == 128) c.planes = cuda_planes_want(d, y->shape[0], y->shape[1]);
    TRY(cuda_launched(d, "attn: decode",
                      attn_decode(&c, kv->head_dim, bits, s->stream, s->sm >= 90), e));
    cuda_planes_made(d, y, &c.planes);
    return OK;
}

extern "C" {

err_code attn_cuda(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                   const batch_rows *rows, float scale, int32_t window, err *e)
{
    const cuda_state *s = cuda_of(d);
    const int bits = kv->format == KV_16 ? 16 : (int)kv->format;
    const bool fast = fast_dim(kv->head_dim) && kv->block_tokens % 32 == 0;
    if (fast && d->deterministic) return attn_fixed_cuda(d, y, q, kv, rows, scale, window, e);
    if (attn_decodes(rows, kv)) return attn_decode_cuda(d, y, q, kv, rows, scale, window, NULL, e);
    attn_prefill_call c = {};
    c.q = (const __half *)q->data, c.y = (__half *)y->data;
    c.data = (const uint8_t *)kv->data, c.param = (const __half2 *)kv->param;
    c.table = (const int32_t *)rows->block_table.data,
    c.table_stride = (int32_t)rows->block_table.stride[0];
    c.pos = (const int32_t *)rows->pos.data, c.seq_start = (const int32_t *)rows->seq_start.data;
    c.q_row = q->stride[0], c.q_head = q->stride[1], c.q_sub = q->stride[2], c.y_row = y->stride[0];
    c.seqs = rows->seqs, c.kv_heads = kv->kv_heads, c.group = (int32_t)q->shape[2];
    c.block_tokens = kv->block_tokens, c.window = window, c.max_q = rows->max_q, c.scale = scale;
    TRY(cuda_pass_flush(d, e));
    const bool wgmma = fast && s->sm >= 90 && bits == 16 &&
                       (kv->head_dim == 64 || kv->head_dim == 128);
    const cudaError_t rc = wgmma  ? attn_prefill_wgmma(&c, kv->head_dim,
                                                       (int64_t)kv->blocks * kv->kv_heads * 2 *
                                                           kv->block_tokens,
                                                       s->stream)
                           : fast ? attn_prefill(&c, kv->head_dim, bits, s->sm, s->stream)
                                  : attn_plain(&c, kv->head_dim, bits, (int)q->shape[0], s->stream,
                                               s->sm >= 90);
    return cuda_launched(d, fast ? "attn: prefill" : "attn: plain", rc, e);
}

} /* extern "C" */
