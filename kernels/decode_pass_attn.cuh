/* How attention in the decode pass takes the newest token's vectors, which the product before hands
 * on as fresh words: a warp has one vector, a lane D / 32 channels of it beside each other, so that
 * nothing goes through shared memory before it is rotated. Private to decode_pass.cu. */
#ifndef TMF_KERNELS_DECODE_PASS_ATTN_CUH
#define TMF_KERNELS_DECODE_PASS_ATTN_CUH

#include "kernels/attn_decode_body.cuh"
#include "kernels/decode_pass_product.cuh"

/* A lane's words of a vector, one an element with the f16 in its high half; of memory, where `in`
 * has no mask, made of f16. */
template <int D> struct fresh_vector {
    uint32_t w[D / 32];
};

/* Asks for the vector at in.at. */
template <int D>
__device__ __forceinline__ void ask_vector(fresh_vector<D> *f, const step_input &in, int lane)
{
    if (in.mask) {
        const uint32_t *at = (const uint32_t *)in.at + lane * (D / 32);
        if (D == 128)
            *(uint4 *)f->w = fresh_load4(at);
        else
            *(uint2 *)f->w = fresh_load2(at);
        return;
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++)
        f->w[i] = (uint32_t)((const uint16_t *)in.at)[lane * (D / 32) + i] << 16;
}

/* cos and sin of a lane's channels. */
template <int D> struct lane_angles {
    float c[D / 32], s[D / 32];
};
template <int D>
__device__ __forceinline__ lane_angles<D> angles_of(const rope_call &r, const float (*cs)[128],
                                                    int lane)
{
    lane_angles<D> a;
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        const int c = lane * (D / 32) + i, half = r.dims / 2,
                  j = r.interleaved ? c >> 1
                      : c < half    ? c
                                    : c - half;
        a.c[i] = 1.f, a.s[i] = 0.f;
        if (c < r.dims) a.c[i] = cs[0][j], a.s[i] = cs[1][j];
    }
    return a;
}

/* Rotates; dims is a multiple of 8, so that a lane's channels have their partners all in one other
 * lane, or each in its neighbour. All lanes call. */
template <int D>
__device__ __forceinline__ void turn_lane(float v[D / 32], const rope_call &r,
                                          const lane_angles<D> &a, int lane)
{
    const int far = r.dims / (2 * (D / 32)), from = lane < far ? lane + far : lane - far;
    const bool first = lane < far;
    float o[D / 32];
    if (r.interleaved)
#pragma unroll
        for (int i = 0; i < D / 32; i++) o[i] = i & 1 ? v[i - 1] : -v[i + 1];
    else
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            o[i] = __shfl_sync(~0u, v[i], from & 31);
            if (first) o[i] = -o[i];
        }
#pragma unroll
    for (int i = 0; i < D / 32; i++) v[i] = v[i] * a.c[i] + o[i] * a.s[i];
}

/* What store_vector stores of a vector that lies so, to the cache's token `slot` and `newest`. */
template <int D, int BITS>
__device__ __forceinline__ void store_fresh(const rope_call &r, const float v[D / 32], int64_t slot,
                                            uint32_t *newest, int lane)
{
    constexpr int N = D / 32;
    uint32_t *out = (uint32_t *)(r.data + slot * (D * BITS / 8));
    if (BITS == 16) {
#pragma unroll
        for (int i = 0; i < N; i += 2) {
            const __half2 h = __floats2half2_rn(fminf(fmaxf(v[i], -65504.f), 65504.f),
                                                fminf(fmaxf(v[i + 1], -65504.f), 65504.f));
            const int at = (lane * N + i) / 2;
            newest[at] = out[at] = *(const uint32_t *)&h;
        }
        return;
    }
    float lo = v[0], hi = v[0];
#pragma unroll
    for (int i = 1; i < N; i++) lo = fminf(lo, v[i]), hi = fmaxf(hi, v[i]);
#pragma unroll
    for (int x = 16; x; x >>= 1) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, x));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, x));
    }
    const float top = BITS == 8 ? 255.f : 15.f;
    const __half scale = __float2half_rn((hi - lo) / top), zero = __float2half_rn(lo);
    const float s = __half2float(scale), z = __half2float(zero), inv = s > 0.f ? 1.f / s : 0.f;
    const __half2 both = __halves2half2(scale, zero);
    if (lane == 0) r.param[slot] = both, newest[D / 2] = *(const uint32_t *)&both;
    /* Lanes that have a word: its bytes, or channels 2i in nibble i and 2i + 1 in nibble i + 4. */
    constexpr int LANES = BITS < 16 ? 32 / BITS / N : 1;
    uint32_t q = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
        const int at = lane % LANES * N + i, shift = BITS == 8 ? 8 * at : at / 2 * 4 + at % 2 * 16;
        q |= (uint32_t)fminf(fmaxf(rintf((v[i] - z) * inv), 0.f), top) << shift;
    }
#pragma unroll
    for (int x = 1; x < LANES; x <<= 1) q |= __shfl_xor_sync(~0u, q, x);
    if (lane % LANES == 0) newest[lane / LANES] = out[lane / LANES] = q;
}

/* Vector i of an item, as newest_vector counts them: waits for what was asked for, rotates and
 * leaves it. */
template <int D, int BITS>
__device__ __forceinline__ void enter_vector(const attn_decode_call &c, const attn_memory &sh,
                                             const attn_part &p, fresh_vector<D> *f,
                                             const step_input &in, int i, int more,
                                             const int32_t *table, int lane)
{
    const rope_call &r = c.rope;
    const lane_angles<D> a = angles_of<D>(r, sh.angles, lane);
    float v[D / 32];
    for (;;) {
        uint32_t late = 0;
#pragma unroll
        for (int j = 0; j < D / 32; j++) late |= f->w[j] ^ in.tag;
        if (!__any_sync(~0u, late & in.mask)) break;
        ask_vector<D>(f, in, lane);
    }
#pragma unroll
    for (int j = 0; j < D / 32; j++)
        v[j] = __half2float(__ushort_as_half((uint16_t)(f->w[j] >> 16)));
    if (i != 1 || more == 0) turn_lane<D>(v, r, a, lane);
    if (i < more) {
        const int last = p.len - 1, block = (int)((uint32_t)last / (uint32_t)r.block_tokens);
        store_fresh<D, BITS>(r, v,
                             (((int64_t)table[block] * r.kv_heads + p.head) * 2 + i) *
                                     r.block_tokens +
                                 (last - block * r.block_tokens),
                             sh.newest + i * NEWEST_WORDS(D), lane);
        return;
    }
#pragma unroll
    for (int j = 0; j < D / 32; j += 2)
        *(__half2 *)(sh.turned_q + (i - more) * D + lane * (D / 32) +
                     j) = __floats2half2_rn(v[j], v[j + 1]);
}

#endif
