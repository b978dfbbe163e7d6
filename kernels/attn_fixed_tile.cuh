/* Attention on tiles of 16 tokens for devices opened as deterministic: up to 8 columns, each a
 * query head of a row. Apart from the tiles of decode attention, so that what makes those faster
 * changes no bit here. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_FIXED_TILE_CUH
#define TMF_KERNELS_ATTN_FIXED_TILE_CUH

#include "kernels/attn_decode.cuh"

#ifndef ATTN_WARPS
#define ATTN_WARPS 4 /* of a team */
#endif
#define NWARPS  ATTN_WARPS
#define TILE    16
#define P_SCALE 2048.f /* keeps p * s_v out of the f16 subnormals; undone at the end */

__device__ __forceinline__ uint32_t prmt(uint32_t a, uint32_t b, uint32_t s)
{
    return __byte_perm(a, b, s);
}
__device__ __forceinline__ uint32_t h2sub(uint32_t a, uint32_t b)
{
    __half2 r = __hsub2(*(__half2 *)&a, *(__half2 *)&b);
    return *(uint32_t *)&r;
}
__device__ __forceinline__ uint32_t h2fma(uint32_t a, uint32_t b, uint32_t c)
{
    __half2 r = __hfma2(*(__half2 *)&a, *(__half2 *)&b, *(__half2 *)&c);
    return *(uint32_t *)&r;
}
template <uint32_t MASK> __device__ __forceinline__ uint32_t magic(uint32_t q)
{
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "n"(MASK), "r"(0x64006400u));
    return v;
}
/* 8 nibbles to 4 half2 of integers: nibble i beside nibble i + 4. */
__device__ __forceinline__ void unpack4(uint32_t o[4], uint32_t q)
{
    const uint32_t k1024 = 0x64006400u, k16th = 0x2c002c00u, km64 = 0xd400d400u;
    o[0] = h2sub(magic<0x000f000fu>(q), k1024);
    o[1] = h2fma(magic<0x00f000f0u>(q), k16th, km64);
    q >>= 8;
    o[2] = h2sub(magic<0x000f000fu>(q), k1024);
    o[3] = h2fma(magic<0x00f000f0u>(q), k16th, km64);
}
__device__ __forceinline__ uint32_t bytes_h2(uint32_t pair) /* {b0, b1, ...} low two bytes */
{
    return h2sub(prmt(pair, 0x64646464u, 0x4140), 0x64006400u);
}
__device__ __forceinline__ uint32_t bytes_h2_high(uint32_t pair)
{
    return h2sub(prmt(pair, 0x64646464u, 0x4342), 0x64006400u);
}
__device__ __forceinline__ uint32_t transpose8x8(uint32_t v)
{
    uint32_t r;
#if __CUDA_ARCH__ >= 750
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
#else
    r = v;
#endif
    return r;
}
/* Not through the read-only path: a block may have written the newest token itself. */
template <int BYTES> __device__ __forceinline__ void load_vec(uint32_t *o, const void *p)
{
    if (BYTES == 16) {
        asm volatile("ld.global.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
                     : "=r"(o[0]), "=r"(o[1]), "=r"(o[2]), "=r"(o[3])
                     : "l"(p)
                     : "memory");
    } else if (BYTES == 8) {
        asm volatile("ld.global.L1::no_allocate.v2.u32 {%0,%1}, [%2];"
                     : "=r"(o[0]), "=r"(o[1])
                     : "l"(p)
                     : "memory");
    } else
        asm volatile("ld.global.L1::no_allocate.u32 %0, [%1];" : "=r"(o[0]) : "l"(p) : "memory");
}

constexpr int pow2_part(int n) { return n % 16 == 0 ? 16 : n % 8 == 0 ? 8 : 4; }

/* Which bytes of a token's row a lane reads, and which channels they are. K: lane t takes a
 * quarter of the row; V: lane g an eighth (of a padded row for head size 96 at 4 bit). */
template <int D, int BITS> struct geom {
    static constexpr int ROW = D * BITS / 8;
    static constexpr int KV = pow2_part(ROW / 4); /* bytes of one load */
    static constexpr int KN = ROW / 4 / KV;       /* loads of a row */
    static constexpr int KW = ROW / 16;           /* words of a row */
    static constexpr int KD = KV * 8 / BITS;      /* channels of one load */
    static constexpr int VV = ROW % 32 ? 4 : pow2_part(ROW / 8);
    static constexpr int VN = (ROW + 8 * VV - 1) / (8 * VV);
    static constexpr int VW = VN * VV / 4;
    static constexpr int VD = VV * 8 / BITS;
    static constexpr int F = VN * VD; /* channels a lane g holds */
    static constexpr int STEPS = D / 16;
    static constexpr int PART = 8 * (D + 2); /* floats a split leaves: out[8][D], max, sum */
};

template <int D, int BITS> struct tile_regs {
    uint32_t k[2][geom<D, BITS>::KW]; /* tokens g, g + 8 */
    uint32_t v[4][geom<D, BITS>::VW]; /* tokens 2t, 2t + 1, 2t + 8, 2t + 9 */
    __half2 kp[2], vp[2];             /* tokens g, g + 8 */
};

template <int D, int BITS>
__device__ __forceinline__ void load_tile(tile_regs<D, BITS> *r, const attn_decode_call &c,
                                          int32_t block, int head, int first, int g, int t)
{
    typedef geom<D, BITS> G;
    const size_t region = ((size_t)block * c.kv_heads + head) * 2 * c.block_tokens;
    const uint8_t *kb = c.data + (region + first) * G::ROW;
    const uint8_t *vb = c.data + (region + c.block_tokens + first) * G::ROW;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < G::KN; n++)
            load_vec<G::KV>(&r->k[i][n * G::KV / 4],
                            kb + (g + 8 * i) * G::ROW + (n * 4 + t) * G::KV);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int n = 0; n < G::VN; n++) {
            const int at = (n * 8 + g) * G::VV;
            uint32_t *o = &r->v[i][n * G::VV / 4];
            if (G::VN * 8 * G::VV == G::ROW || at < G::ROW)
                load_vec<G::VV>(o, vb + (2 * t + (i & 1) + 8 * (i >> 1)) * G::ROW + at);
            else
#pragma unroll
                for (int w = 0; w < G::VV / 4; w++) o[w] = 0;
        }
    if (BITS < 16)
#pragma unroll
        for (int i = 0; i < 2; i++) {
            r->kp[i] = c.param[region + first + g + 8 * i];
            r->vp[i] = c.param[region + c.block_tokens + first + g + 8 * i];
        }
}

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
            unpack4(x, r.k[0][w]);
            unpack4(y, r.k[1][w]);
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
                a[0] = bytes_h2(r.k[0][i]), a[1] = bytes_h2(r.k[1][i]);
                a[2] = bytes_h2_high(r.k[0][i]), a[3] = bytes_h2_high(r.k[1][i]);
            } else {
                a[0] = r.k[0][2 * i], a[1] = r.k[1][2 * i];
                a[2] = r.k[0][2 * i + 1], a[3] = r.k[1][2 * i + 1];
            }
            mma_16816(s, a, q[i][0], q[i][1]);
        }
    }
}

/* out += V^T p: two channels of each lane g a tile, 16 tokens. */
template <int D, int BITS>
__device__ __forceinline__ void tile_values(float (*o)[4], const tile_regs<D, BITS> &r, uint32_t b0,
                                            uint32_t b1)
{
    typedef geom<D, BITS> G;
#pragma unroll
    for (int w = 0; w < G::VW; w++) {
        if (BITS == 4) { /* channel 2i sits in nibble i, 2i + 1 in nibble i + 4 */
            uint32_t e0[4], o0[4], e1[4], o1[4];
            unpack4(e0, prmt(r.v[0][w], r.v[1][w], 0x5410));
            unpack4(o0, prmt(r.v[0][w], r.v[1][w], 0x7632));
            unpack4(e1, prmt(r.v[2][w], r.v[3][w], 0x5410));
            unpack4(o1, prmt(r.v[2][w], r.v[3][w], 0x7632));
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const uint32_t a[4] = {e0[i], o0[i], e1[i], o1[i]};
                mma_16816(o[w * 4 + i], a, b0, b1);
            }
        } else if (BITS == 8) {
            const uint32_t x0 = prmt(r.v[0][w], r.v[1][w], 0x5140),
                           x1 = prmt(r.v[0][w], r.v[1][w], 0x7362);
            const uint32_t y0 = prmt(r.v[2][w], r.v[3][w], 0x5140),
                           y1 = prmt(r.v[2][w], r.v[3][w], 0x7362);
            const uint32_t a[4] = {bytes_h2(x0), bytes_h2_high(x0), bytes_h2(y0),
                                   bytes_h2_high(y0)};
            const uint32_t b[4] = {bytes_h2(x1), bytes_h2_high(x1), bytes_h2(y1),
                                   bytes_h2_high(y1)};
            mma_16816(o[w * 2], a, b0, b1);
            mma_16816(o[w * 2 + 1], b, b0, b1);
        } else {
            const uint32_t a[4] = {
                prmt(r.v[0][w], r.v[1][w], 0x5410), prmt(r.v[0][w], r.v[1][w], 0x7632),
                prmt(r.v[2][w], r.v[3][w], 0x5410), prmt(r.v[2][w], r.v[3][w], 0x7632)};
            mma_16816(o[w], a, b0, b1);
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
        tile_values<D, BITS>(st->o, r[u], b[0], b[1]);
    }
}

/* Channel f (0..F-1) that lane g holds; D or more when it is padding. */
template <int D, int BITS> __device__ __forceinline__ int channel_of(int i, int odd, int g)
{
    typedef geom<D, BITS> G;
    /* tile i of a word holds, by BITS: 4: channels 2i, 2i + 1; 8: pairs; 16: the pair of the word
     * */
    const int f = 2 * i + odd;
    return (f / G::VD * 8 + g) * G::VD + f % G::VD;
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
