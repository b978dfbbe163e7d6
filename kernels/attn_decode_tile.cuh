/* Decode attention on tiles of 16 tokens: loading them in the cache's formats, scores, and the
 * running softmax over values. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_DECODE_TILE_CUH
#define TMF_KERNELS_ATTN_DECODE_TILE_CUH

#include "kernels/attn_tile.cuh"

/* What unpacked codes of values are more than the codes; scores take the codes as integers. */
template <int BITS> constexpr float CODE_MORE = BITS == 4 ? 64.f : 1024.f;

/* Codes as f16, CODE_MORE too large: what scores of integers leave to be undone at the end. */
struct rough_codes {
    static __device__ __forceinline__ void unpack4(uint32_t o[4], uint32_t q)
    {
        const uint32_t k960 = 0x63806380u;
        o[0] = h2sub(magic<0x000f000fu, 0x64006400u>(q), k960);
        o[1] = magic<0x00f000f0u, 0x54005400u>(q);
        q >>= 8;
        o[2] = h2sub(magic<0x000f000fu, 0x64006400u>(q), k960);
        o[3] = magic<0x00f000f0u, 0x54005400u>(q);
    }
    static __device__ __forceinline__ uint32_t low(uint32_t pair)
    {
        return prmt(pair, 0x64646464u, 0x4140);
    }
    static __device__ __forceinline__ uint32_t high(uint32_t pair)
    {
        return prmt(pair, 0x64646464u, 0x4342);
    }
};

/* mma_u8s8 on every card. */
__device__ __forceinline__ void codes_mma(int d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
#if __CUDA_ARCH__ >= 800
    mma_u8s8(d, a, b0, b1);
#elif __CUDA_ARCH__ >= 750
#pragma unroll
    for (int i = 0; i < 4; i++)
        asm("mma.sync.aligned.m8n8k16.row.col.s32.u8.s8.s32 {%0,%1}, {%2}, {%3}, {%0,%1};"
            : "+r"(d[i % 2 * 2]), "+r"(d[i % 2 * 2 + 1])
            : "r"(a[i]), "r"(i < 2 ? b0 : b1));
#endif
}

/* Fresh words: words that say themselves whether they are written yet, in bit 0
 * (decode_pass.cu). */
__device__ __forceinline__ void fresh_store(uint32_t *p, uint32_t v)
{
    asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}
__device__ __forceinline__ uint32_t fresh_load(const uint32_t *p)
{
    uint32_t v;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
/* Two f16 with bit 0 free: the first is rounded to 10 bits, ties to even, without reaching
 * infinity. */
__device__ __forceinline__ uint32_t fresh_pair(uint32_t v)
{
    const uint32_t up = (v & 0x7fffu) < 0x7bffu ? v >> 1 & 1u : 0u;
    return (v & 0xffff0000u) | ((v & 0xffffu) + up & 0xfffeu);
}

/* A lane's part of the queries, for H heads a lane: t, and t + 4. 16-bit caches: f16, the B
 * operand with head t in column 2t and head t + 4 beside it. Others: fixed point of 16 bits, its
 * high plane in column 2t and the low one beside it; `scale` undoes it. In `sum` the queries are
 * added up; both for exponents of 2. */
template <int D, int BITS, int H> struct query_regs {
    uint32_t b[BITS == 16 ? D / 16 : H * D / 32][2];
    float scale[H], sum[H];
};

/* Scores of 16 tokens: s[i][h] is token g + 8i, head t + 4h. */
template <int D, int BITS, int H>
__device__ __forceinline__ void tile_scores(float s[2][H], const tile_regs<D, BITS> &r,
                                            const query_regs<D, BITS, H> &q)
{
    if (BITS == 16) {
        float d[4] = {};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            const uint32_t a[4] = {
                r.k[0][2 * i % geom<D, BITS>::KW], r.k[1][2 * i % geom<D, BITS>::KW],
                r.k[0][(2 * i + 1) % geom<D, BITS>::KW], r.k[1][(2 * i + 1) % geom<D, BITS>::KW]};
            mma_16816(d, a, q.b[i][0], q.b[i][1]);
        }
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int h = 0; h < H; h++) s[i][h] = d[2 * i + h] * q.scale[h];
        return;
    }
    int d[H][4] = {};
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        uint32_t a[4];
        if (BITS == 8)
            a[0] = r.k[0][2 * i % geom<D, BITS>::KW], a[1] = r.k[1][2 * i % geom<D, BITS>::KW],
            a[2] = r.k[0][(2 * i + 1) % geom<D, BITS>::KW],
            a[3] = r.k[1][(2 * i + 1) % geom<D, BITS>::KW];
        else {
            const uint32_t x = r.k[0][i % geom<D, BITS>::KW], y = r.k[1][i % geom<D, BITS>::KW];
            a[0] = x & 0x0f0f0f0fu, a[1] = y & 0x0f0f0f0fu;
            a[2] = x >> 4 & 0x0f0f0f0fu, a[3] = y >> 4 & 0x0f0f0f0fu;
        }
#pragma unroll
        for (int h = 0; h < H; h++)
            codes_mma(d[h], a, q.b[h * (D / 32) + i][0], q.b[h * (D / 32) + i][1]);
    }
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float2 kp = __half22float2(r.kp[i]);
#pragma unroll
        for (int h = 0; h < H; h++)
            s[i][h] = kp.x * q.scale[h] * (float)(d[h][2 * i] * 256 + d[h][2 * i + 1]) +
                      kp.y * q.sum[h];
    }
}

/* Running softmax of heads t, t + 4 over this lane's tokens; psum: of the weights as they enter the
 * product. */
template <int D, int BITS, int H> struct softmax_state {
    float max[H], sum[H], zsum[H], psum[H];
    float o[geom<D, BITS>::F / 2][4];
};

/* Calls `scored` when the keys are no longer needed, and `done` when the values are not. */
template <int D, int BITS, int U, int H, typename F, typename L>
__device__ __forceinline__ void consume(softmax_state<D, BITS, H> *st, tile_regs<D, BITS> r[U],
                                        const query_regs<D, BITS, H> &q, int pos, int from, int to,
                                        int g, F scored, L done)
{
    float s[U][2][H], top[H], base[H], fix[H];
    bool moved = false;
#pragma unroll
    for (int h = 0; h < H; h++) top[h] = st->max[h];
#pragma unroll
    for (int u = 0; u < U; u++) {
        tile_scores<D, BITS, H>(s[u], r[u], q);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int at = pos + u * TILE + g + 8 * i;
            const bool seen = at >= from && at < to;
#pragma unroll
            for (int h = 0; h < H; h++) {
                s[u][i][h] = seen ? s[u][i][h] : -INFINITY;
                top[h] = fmaxf(top[h], s[u][i][h]);
            }
        }
    }
    scored();
#pragma unroll
    for (int x = 4; x < 32; x <<= 1)
#pragma unroll
        for (int h = 0; h < H; h++) top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], x));
#pragma unroll
    for (int h = 0; h < H; h++) {
        base[h] = top[h] == -INFINITY ? 0.f : top[h];
        moved = moved || top[h] != st->max[h];
    }
    if (__any_sync(~0u, moved)) { /* seldom, after the first tiles */
#pragma unroll
        for (int h = 0; h < H; h++) {
            fix[h] = exp2f(st->max[h] - base[h]);
            st->max[h] = top[h];
            st->sum[h] *= fix[h], st->zsum[h] *= fix[h], st->psum[h] *= fix[h];
        }
#pragma unroll
        for (int i = 0; i < geom<D, BITS>::F / 2; i++)
#pragma unroll
            for (int h = 0; h < H; h++) st->o[i][h] *= fix[h], st->o[i][2 + h] *= fix[h];
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
        uint32_t b[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float p[2] = {};
            const float2 vp = __half22float2(r[u].vp[i]);
#pragma unroll
            for (int h = 0; h < H; h++) {
                p[h] = exp2f(s[u][i][h] - base[h]);
                st->sum[h] += p[h];
                if (BITS < 16) {
                    st->zsum[h] += p[h] * vp.y;
                    p[h] *= vp.x * P_SCALE;
                }
            }
            const __half2 h2 = __floats2half2_rn(p[0], p[1]);
            if (BITS < 16) {
                st->psum[0] += __low2float(h2);
                if (H == 2) st->psum[H - 1] += __high2float(h2);
            }
            b[i] = transpose8x8(*(const uint32_t *)&h2);
        }
        tile_values<D, BITS, rough_codes>(st->o, r[u], b[0], b[1]);
    }
    done();
}

#endif
