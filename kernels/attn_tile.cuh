/* Tiles of 16 tokens of the paged cache in a warp's registers: which lane loads what, and the
 * product with values. What decode attention and the deterministic form have in common: a change of
 * order here changes bits of both. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_TILE_CUH
#define TMF_KERNELS_ATTN_TILE_CUH

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
template <uint32_t MASK, uint32_t BASE> __device__ __forceinline__ uint32_t magic(uint32_t q)
{
    uint32_t v;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "n"(MASK), "r"(BASE));
    return v;
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

/* Keys and values, which: 1, 2 or both, of 16 tokens. */
template <int D, int BITS, int WHICH = 3>
__device__ __forceinline__ void load_tile(tile_regs<D, BITS> *r, const attn_decode_call &c,
                                          int32_t block, int head, int first, int g, int t)
{
    typedef geom<D, BITS> G;
    const size_t region = ((size_t)block * c.kv_heads + head) * 2 * c.block_tokens;
    const uint8_t *kb = c.data + (region + first) * G::ROW;
    const uint8_t *vb = c.data + (region + c.block_tokens + first) * G::ROW;
    if (WHICH & 1)
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int n = 0; n < G::KN; n++)
                load_vec<G::KV>(&r->k[i][n * G::KV / 4],
                                kb + (g + 8 * i) * G::ROW + (n * 4 + t) * G::KV);
    if (WHICH & 2)
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
            if (WHICH & 1) r->kp[i] = c.param[region + first + g + 8 * i];
            if (WHICH & 2) r->vp[i] = c.param[region + c.block_tokens + first + g + 8 * i];
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

/* out += V^T p: two channels of each lane g a tile, 16 tokens. C makes f16 of codes: unpack4 of
 * 8 nibbles 4 pairs, nibble i beside nibble i + 4; low and high of 4 bytes 2. */
template <int D, int BITS, typename C>
__device__ __forceinline__ void tile_values(float (*o)[4], const tile_regs<D, BITS> &r, uint32_t b0,
                                            uint32_t b1)
{
    typedef geom<D, BITS> G;
#pragma unroll
    for (int w = 0; w < G::VW; w++) {
        if (BITS == 4) { /* channel 2i sits in nibble i, 2i + 1 in nibble i + 4 */
            uint32_t e0[4], o0[4], e1[4], o1[4];
            C::unpack4(e0, prmt(r.v[0][w], r.v[1][w], 0x5410));
            C::unpack4(o0, prmt(r.v[0][w], r.v[1][w], 0x7632));
            C::unpack4(e1, prmt(r.v[2][w], r.v[3][w], 0x5410));
            C::unpack4(o1, prmt(r.v[2][w], r.v[3][w], 0x7632));
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
            const uint32_t a[4] = {C::low(x0), C::high(x0), C::low(y0), C::high(y0)};
            const uint32_t b[4] = {C::low(x1), C::high(x1), C::low(y1), C::high(y1)};
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

#endif
