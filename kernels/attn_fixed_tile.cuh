/* Attention on tiles of 16 tokens for devices opened as deterministic: up to 8 columns, each a
 * query head of a row. Apart from the tiles of decode attention, so that what makes those faster
 * changes no bit here. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_FIXED_TILE_CUH
#define TMF_KERNELS_ATTN_FIXED_TILE_CUH

#include "kernels/attn_tile.cuh"

/* Codes as f16. */
struct true_codes {
    static __device__ __forceinline__ void unpack4(uint32_t o[4], uint32_t q)
    {
        const uint32_t k1024 = 0x64006400u, k16th = 0x2c002c00u, km64 = 0xd400d400u;
        o[0] = h2sub(magic<0x000f000fu, 0x64006400u>(q), k1024);
        o[1] = h2fma(magic<0x00f000f0u, 0x64006400u>(q), k16th, km64);
        q >>= 8;
        o[2] = h2sub(magic<0x000f000fu, 0x64006400u>(q), k1024);
        o[3] = h2fma(magic<0x00f000f0u, 0x64006400u>(q), k16th, km64);
    }
    static __device__ __forceinline__ uint32_t low(uint32_t pair)
    {
        return h2sub(prmt(pair, 0x64646464u, 0x4140), 0x64006400u);
    }
    static __device__ __forceinline__ uint32_t high(uint32_t pair)
    {
        return h2sub(prmt(pair, 0x64646464u, 0x4342), 0x64006400u);
    }
};

/* Scores of 16 tokens for heads 2t, 2t + 1: s[0..1] token g, s[2..3] token g + 8; before scale and
 * zero. */
template <int D, int BITS>
__device__ __forceinline__ void tile_scores(float s[4], const tile_regs<D, BITS> &r,
                                            const uint32_t q[D / 16][2])
{
    s[0] = s[1] = s[2] = s[3] = 0.f;
    if (BITS == 4) {
#pragma unroll
        for (int w = 0; w < D / 32; w++) {
            uint32_t x[4], y[4];
            true_codes::unpack4(x, r.k[0][w]);
            true_codes::unpack4(y, r.k[1][w]);
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const uint32_t a[4] = {x[2 * h], y[2 * h], x[2 * h + 1], y[2 * h + 1]};
                mma_16816(s, a, q[2 * w + h][0], q[2 * w + h][1]);
            }
        }
    } else {
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t a[4];
            if (BITS == 8) {
                a[0] = true_codes::low(r.k[0][i]), a[1] = true_codes::low(r.k[1][i]);
                a[2] = true_codes::high(r.k[0][i]), a[3] = true_codes::high(r.k[1][i]);
            } else {
                a[0] = r.k[0][2 * i], a[1] = r.k[1][2 * i];
                a[2] = r.k[0][2 * i + 1], a[3] = r.k[1][2 * i + 1];
            }
            mma_16816(s, a, q[i][0], q[i][1]);
        }
    }
}

/* Running softmax of heads 2t, 2t + 1 over this lane's tokens. */
template <int D, int BITS> struct softmax_state {
    float max[2], sum[2], zsum[2];
    float o[geom<D, BITS>::F / 2][4];
};

/* seen(u, i, h): whether head 2t + h sees token g + 8 * i of tile u. */
template <int D, int BITS, int U, typename S>
__device__ __forceinline__ void
consume_where(softmax_state<D, BITS> *st, const tile_regs<D, BITS> r[U],
              const uint32_t q[D / 16][2], const float sumq[2], float scale_log2, S seen)
{
    float s[U][4], top[2] = {st->max[0], st->max[1]};
#pragma unroll
    for (int u = 0; u < U; u++) {
        tile_scores<D, BITS>(s[u], r[u], q);
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                float v = s[u][2 * i + h];
                if (BITS < 16) v = __low2float(r[u].kp[i]) * v + __high2float(r[u].kp[i]) * sumq[h];
                v = seen(u, i, h) ? v * scale_log2 : -INFINITY;
                s[u][2 * i + h] = v;
                top[h] = fmaxf(top[h], v);
            }
        }
    }
#pragma unroll
    for (int x = 4; x < 32; x <<= 1)
#pragma unroll
        for (int h = 0; h < 2; h++) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], x));
    float base[2], fix[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        base[h] = top[h] == -INFINITY ? 0.f : top[h];
        fix[h] = exp2f(st->max[h] - base[h]);
        st->max[h] = top[h];
        st->sum[h] *= fix[h];
        st->zsum[h] *= fix[h];
    }
#pragma unroll
    for (int i = 0; i < geom<D, BITS>::F / 2; i++) {
        st->o[i][0] *= fix[0], st->o[i][1] *= fix[1];
        st->o[i][2] *= fix[0], st->o[i][3] *= fix[1];
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float p[2];
#pragma unroll
            for (int h = 0; h < 2; h++) {
                p[h] = exp2f(s[u][2 * i + h] - base[h]);
                st->sum[h] += p[h];
                if (BITS < 16) {
                    st->zsum[h] += p[h] * __high2float(r[u].vp[i]);
                    p[h] *= __low2float(r[u].vp[i]) * P_SCALE;
                }
            }
            const __half2 h2 = __floats2half2_rn(p[0], p[1]);
            b[i] = transpose8x8(*(const uint32_t *)&h2);
        }
        tile_values<D, BITS, true_codes>(st->o, r[u], b[0], b[1]);
    }
}

/* Query fragments of this lane's head, and the sums of heads 2t, 2t + 1. */
template <int D, int BITS>
__device__ __forceinline__ void load_query(uint32_t q[D / 16][2], float sumq[2], const __half *qr,
                                           bool real, int t)
{
    typedef geom<D, BITS> G;
    float sum = 0.f;
#pragma unroll
    for (int s = 0; s < G::STEPS; s++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int e = 4 * s + 2 * i, d = (e / G::KD * 4 + t) * G::KD + e % G::KD;
            q[s][i] = real ? *(const uint32_t *)(qr + d) : 0u;
            const float2 f = __half22float2(*(__half2 *)&q[s][i]);
            sum += f.x + f.y;
        }
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    sumq[0] = __shfl_sync(~0u, sum, 8 * t);
    sumq[1] = __shfl_sync(~0u, sum, 8 * t + 4);
}

/* A warp's state into its [8][D + 2]: channels, then max and sum. */
template <int D, int BITS>
__device__ __forceinline__ void leave_warp(float *out, softmax_state<D, BITS> *st, int heads, int g,
                                           int t)
{
#pragma unroll
    for (int x = 4; x < 32; x <<= 1)
#pragma unroll
        for (int h = 0; h < 2; h++) {
            st->sum[h] += __shfl_xor_sync(~0u, st->sum[h], x);
            st->zsum[h] += __shfl_xor_sync(~0u, st->zsum[h], x);
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float *m = out + (2 * t + h) * (D + 2);
        if (2 * t + h >= heads) continue;
        if (g == 0) m[D] = st->max[h], m[D + 1] = st->sum[h];
#pragma unroll
        for (int i = 0; i < geom<D, BITS>::F / 2; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int d = channel_of<D, BITS>(i, odd, g);
                const float v = st->o[i][2 * odd + h];
                if (d < D) m[d] = BITS < 16 ? v * (1.f / P_SCALE) + st->zsum[h] : v;
            }
    }
}

#endif
