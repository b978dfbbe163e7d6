/* Rotary embedding of q and k in place, and the append to the paged cache in its format: one block a row and
 * KV head, one warp a head vector. */
#include "kernels/device_cuda.cuh"

#define MAX_DIM 256

typedef struct {
    __half *q, *k;
    const __half *v;
    const float *inv_freq;
    const int32_t *pos, *seq_start, *table;
    uint8_t *data;
    __half2 *param;
    int64_t q_row, q_head, q_sub, k_row, k_head, v_row, v_head;
    int32_t seqs, table_stride, blocks, block_tokens, kv_heads, group, dim, dims, bits;
    bool interleaved;
    float mscale;
} rope_call;

__device__ __forceinline__ float rotated(const float *x, int c, const rope_call &r, float pos)
{
    if (c >= r.dims) return x[c];
    const int half = r.dims / 2;
    const int j = r.interleaved ? c / 2 : c % half;
    const bool first = r.interleaved ? !(c & 1) : c < half;
    const int partner = r.interleaved ? c ^ 1 : first ? c + half : c - half;
    float sn, cs;
    sincosf(pos * r.inv_freq[j], &sn, &cs);
    sn *= r.mscale, cs *= r.mscale;
    return first ? x[c] * cs - x[partner] * sn : x[c] * cs + x[partner] * sn;
}

/* Channel c of a 4-bit row: nibble i of a word is channel 2i, nibble i + 4 channel 2i + 1. */
__device__ __forceinline__ int channel_of_nibble(int p)
{
    return p < 4 ? 2 * p : 2 * (p - 4) + 1;
}

__device__ void store_vector(const rope_call &r, const float *x, int64_t slot, int lane)
{
    if (r.bits == 16) {
        __half *out = (__half *)r.data + slot * r.dim;
        for (int c = lane; c < r.dim; c += 32) out[c] = __float2half_rn(fminf(fmaxf(x[c], -65504.f), 65504.f));
        return;
    }
    float lo = INFINITY, hi = -INFINITY;
    for (int c = lane; c < r.dim; c += 32) lo = fminf(lo, x[c]), hi = fmaxf(hi, x[c]);
    for (int i = 16; i; i >>= 1) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, i));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, i));
    }
    const float top = r.bits == 8 ? 255.f : 15.f;
    const __half scale = __float2half_rn((hi - lo) / top), zero = __float2half_rn(lo);
    const float s = __half2float(scale), z = __half2float(zero), inv = s > 0.f ? 1.f / s : 0.f;
    if (lane == 0) r.param[slot] = __halves2half2(scale, zero);
    uint8_t *out = r.data + slot * (r.dim * r.bits / 8);
    for (int b = lane; b < r.dim * r.bits / 8; b += 32) {
        const int c0 = r.bits == 8 ? b : b / 4 * 8 + channel_of_nibble(b % 4 * 2);
        const int c1 = r.bits == 8 ? b : b / 4 * 8 + channel_of_nibble(b % 4 * 2 + 1);
        const float q0 = fminf(fmaxf(rintf((x[c0] - z) * inv), 0.f), top);
        const float q1 = fminf(fmaxf(rintf((x[c1] - z) * inv), 0.f), top);
        out[b] = r.bits == 8 ? (uint8_t)q0 : (uint8_t)((int)q0 | (int)q1 << 4);
    }
}

__global__ void rope_kv_kernel(rope_call r)
{
    extern __shared__ float vec[]; /* [warps][dim] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int64_t row = blockIdx.x;
    const int head = blockIdx.y;
    float *x = vec + warp * r.dim;
    pdl_launch();
    pdl_wait();
    const int32_t pos = r.pos[row];
    int seq = 0;
    while (seq + 1 < r.seqs && r.seq_start[seq + 1] <= row) seq++;
    const int32_t block = r.table[(int64_t)seq * r.table_stride + pos / r.block_tokens];
    const int64_t region = ((int64_t)block * r.kv_heads + head) * 2 * r.block_tokens + pos % r.block_tokens;
    const int warps = blockDim.x >> 5;
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

extern "C" err_code rope_kv_cuda(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *spec,
                                 const batch_rows *rows, const kv_layer *kv, err *e)
{
    rope_call r = {};
    if (kv->head_dim > MAX_DIM || kv->head_dim % 8)
        return err_set(e, E_UNSUPPORTED, "rope_kv: head size: expected a multiple of 8 up to %d, got %d", MAX_DIM,
                       kv->head_dim);
    r.q = (__half *)q->data, r.k = (__half *)k->data, r.v = (const __half *)v->data;
    r.inv_freq = (const float *)spec->inv_freq.data;
    r.pos = (const int32_t *)rows->pos.data, r.seq_start = (const int32_t *)rows->seq_start.data;
    r.table = (const int32_t *)rows->block_table.data, r.table_stride = (int32_t)rows->block_table.stride[0];
    r.data = (uint8_t *)kv->data, r.param = (__half2 *)kv->param;
    r.q_row = q->stride[0], r.q_head = q->stride[1], r.q_sub = q->stride[2];
    r.k_row = k->stride[0], r.k_head = k->stride[1], r.v_row = v->stride[0], r.v_head = v->stride[1];
    r.seqs = rows->seqs, r.block_tokens = kv->block_tokens, r.kv_heads = kv->kv_heads;
    r.group = (int32_t)q->shape[2], r.dim = kv->head_dim, r.dims = spec->dims;
    r.bits = kv->format == KV_16 ? 16 : (int32_t)kv->format;
    r.interleaved = spec->interleaved, r.mscale = spec->mscale;
    const int warps = r.group + 2 < 8 ? r.group + 2 : 8;
    return cuda_launch(d, "rope_kv", rope_kv_kernel, dim3((unsigned)q->shape[0], (unsigned)kv->kv_heads),
                       dim3((unsigned)warps * 32), (size_t)(warps * r.dim) * sizeof(float), e, r);
}
