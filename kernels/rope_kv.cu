/* Rotary embedding of q and k in place, and the append to the paged cache in its format: one block
 * a row and KV head, one warp a head vector. */
#include <string.h>

#include "kernels/device_cuda.cuh"
#include "kernels/kv_append.cuh"

#define MAX_DIM 256

__global__ void rope_kv_kernel(rope_call r)
{
    extern __shared__ float vec[]; /* [warps][dim] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y;
    float *x = vec + warp * r.dim;
    pdl_launch();
    const int32_t pos = r.pos[row]; /* tables come from copies, which no launch overtakes */
    int seq = 0;
    while (seq + 1 < r.seqs && r.seq_start[seq + 1] <= row) seq++;
    const int32_t block = r.table[(int64_t)seq * r.table_stride + pos / r.block_tokens];
    const int64_t region = ((int64_t)block * r.kv_heads + head) * 2 * r.block_tokens +
                           pos % r.block_tokens;
    const int warps = blockDim.x >> 5;
    pdl_wait();
    for (int i = warp; i < r.group + 2; i += warps) { /* q heads, then k, then v */
        __half *qk = i < r.group ? r.q + row * r.q_row + head * r.q_head + i * r.q_sub
                                 : r.k + row * r.k_row + head * r.k_head;
        const __half *in = i <= r.group ? qk : r.v + row * r.v_row + head * r.v_head;
        for (int c = lane; c < r.dim; c += 32) x[c] = __half2float(in[c]);
        __syncwarp();
        if (i <= r.group) {
            float y[MAX_DIM / 32];
#pragma unroll
            for (int j = 0; j < MAX_DIM / 32; j++)
                if (lane + 32 * j < r.dim) y[j] = rotated(x, lane + 32 * j, r, (float)pos);
            __syncwarp();
#pragma unroll
            for (int j = 0; j < MAX_DIM / 32; j++)
                if (lane + 32 * j < r.dim) x[lane + 32 * j] = y[j];
            __syncwarp();
        }
        if (i < r.group)
            for (int c = lane; c < r.dim; c += 32) qk[c] = __float2half_rn(x[c]);
        else
            store_vector(r, x, region + (i == r.group ? 0 : r.block_tokens), lane);
        __syncwarp();
    }
}

/* Many rows: a block turns all heads of a row, with one table of its angles. Pairs of channels a
 * lane: rows and heads must be even elements apart. */
#define ROW_WARPS 8
__global__ void __launch_bounds__(ROW_WARPS * 32) rope_kv_rows_kernel(rope_call r)
{
    __shared__ float cs[2][MAX_DIM / 2], vec[ROW_WARPS][MAX_DIM];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, per = r.group + 2;
    const int64_t row = blockIdx.x;
    const int half = r.dims / 2;
    float *x = vec[warp];
    pdl_launch();
    const int32_t pos = r.pos[row]; /* tables come from copies, which no launch overtakes */
    int seq = 0;
    while (seq + 1 < r.seqs && r.seq_start[seq + 1] <= row) seq++;
    const int32_t block = r.table[(int64_t)seq * r.table_stride + pos / r.block_tokens];
    for (int j = threadIdx.x; j < half; j += ROW_WARPS * 32) {
        float sn, co;
        sincosf((float)pos * r.inv_freq[j], &sn, &co);
        cs[0][j] = co * r.mscale, cs[1][j] = sn * r.mscale;
    }
    pdl_wait();
    __syncthreads();
    for (int v = warp; v < r.kv_heads * per; v += ROW_WARPS) {
        const int head = v / per, i = v % per; /* q heads, then k, then v */
        __half *qk = i < r.group ? r.q + row * r.q_row + head * r.q_head + i * r.q_sub
                                 : r.k + row * r.k_row + head * r.k_head;
        const __half *in = i <= r.group ? qk : r.v + row * r.v_row + head * r.v_head;
        for (int c = 2 * lane; c < r.dim; c += 64)
            *(float2 *)(x + c) = __half22float2(*(const __half2 *)(in + c));
        __syncwarp();
        for (int j = lane; i <= r.group && j < half; j += 32) {
            const int a = r.interleaved ? 2 * j : j, b = r.interleaved ? 2 * j + 1 : j + half;
            const float va = x[a], vb = x[b];
            x[a] = va * cs[0][j] - vb * cs[1][j], x[b] = vb * cs[0][j] + va * cs[1][j];
        }
        __syncwarp();
        if (i < r.group)
            for (int c = 2 * lane; c < r.dim; c += 64)
                *(__half2 *)(qk + c) = __floats2half2_rn(x[c], x[c + 1]);
        else
            store_vector(r, x,
                         ((int64_t)block * r.kv_heads + head) * 2 * r.block_tokens +
                             pos % r.block_tokens + (i == r.group ? 0 : r.block_tokens),
                         lane);
        __syncwarp();
    }
}

static bool even_rows(const rope_call *r)
{
    const int64_t s = r->q_row | r->q_head | r->q_sub | r->k_row | r->k_head | r->v_row | r->v_head;
    return s % 2 == 0 && ((uintptr_t)r->q | (uintptr_t)r->k | (uintptr_t)r->v) % 4 == 0 &&
           r->dims <= r->dim;
}

/* What the kernels need of a rotation and append. */
static rope_call rope_call_of(tensor *q, tensor *k, const tensor *v, const rope_spec *spec,
                              const batch_rows *rows, const kv_layer *kv)
{
    rope_call r;
    memset(&r, 0, sizeof r); /* padding too: calls are compared */
    r.q = (__half *)q->data, r.k = (__half *)k->data, r.v = (const __half *)v->data;
    r.inv_freq = (const float *)spec->inv_freq.data;
    r.pos = (const int32_t *)rows->pos.data, r.seq_start = (const int32_t *)rows->seq_start.data;
    r.table = (const int32_t *)rows->block_table.data,
    r.table_stride = (int32_t)rows->block_table.stride[0];
    r.data = (uint8_t *)kv->data, r.param = (__half2 *)kv->param;
    r.q_row = q->stride[0], r.q_head = q->stride[1], r.q_sub = q->stride[2];
    r.k_row = k->stride[0], r.k_head = k->stride[1], r.v_row = v->stride[0],
    r.v_head = v->stride[1];
    r.seqs = rows->seqs, r.block_tokens = kv->block_tokens, r.kv_heads = kv->kv_heads;
    r.group = (int32_t)q->shape[2], r.dim = kv->head_dim, r.dims = spec->dims;
    r.bits = kv->format == KV_16 ? 16 : (int32_t)kv->format;
    r.interleaved = spec->interleaved, r.mscale = spec->mscale;
    return r;
}

extern "C" err_code rope_kv_cuda(device *d, tensor *q, tensor *k, const tensor *v,
                                 const rope_spec *spec, const batch_rows *rows, const kv_layer *kv,
                                 err *e)
{
    if (kv->head_dim > MAX_DIM || kv->head_dim % 8)
        return err_set(e, E_UNSUPPORTED,
                       "rope_kv: head size: expected a multiple of 8 up to %d, got %d", MAX_DIM,
                       kv->head_dim);
    const rope_call r = rope_call_of(q, k, v, spec, rows, kv);
    const int warps = r.group + 2 < 8 ? r.group + 2 : 8;
    if (q->shape[0] > 64 && !d->deterministic && even_rows(&r)) /* the two may round apart */
        return cuda_launch(d, "rope_kv", rope_kv_rows_kernel, dim3((unsigned)q->shape[0]),
                           dim3(ROW_WARPS * 32), 0, e, r);
    return cuda_launch(d, "rope_kv", rope_kv_kernel,
                       dim3((unsigned)q->shape[0], (unsigned)kv->kv_heads),
                       dim3((unsigned)warps * 32), (size_t)(warps * r.dim) * sizeof(float), e, r);
}

extern "C" err_code rope_attn_cuda(device *d, tensor *y, tensor *q, tensor *k, const tensor *v,
                                   const rope_spec *spec, const batch_rows *rows,
                                   const kv_layer *kv, float scale, int32_t window, err *e)
{
    if (!d->deterministic && attn_decodes(rows, kv)) {
        const rope_call r = rope_call_of(q, k, v, spec, rows, kv);
        return attn_decode_cuda(d, y, q, kv, rows, scale, window, &r, e);
    }
    TRY(rope_kv_cuda(d, q, k, v, spec, rows, kv, e));
    return attn_cuda(d, y, q, kv, rows, scale, window, e);
}
