/* Rotating a head's vector and storing it in the cache's format: shared by the append kernel and
 * by decode attention, which appends its own token. Private to kernels/. */
#ifndef TMF_KERNELS_KV_APPEND_CUH
#define TMF_KERNELS_KV_APPEND_CUH

#include "kernels/cuda_util.cuh"

typedef struct rope_call {
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
__device__ __forceinline__ int channel_of_nibble(int p) { return p < 4 ? 2 * p : 2 * (p - 4) + 1; }

__device__ __forceinline__ void store_vector(const rope_call &r, const float *x, int64_t slot,
                                             int lane)
{
    if (r.bits == 16) {
        __half2 *out = (__half2 *)((__half *)r.data + slot * r.dim);
        for (int c = lane; c < r.dim / 2; c += 32)
            out[c] = __floats2half2_rn(fminf(fmaxf(x[2 * c], -65504.f), 65504.f),
                                       fminf(fmaxf(x[2 * c + 1], -65504.f), 65504.f));
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

#endif
