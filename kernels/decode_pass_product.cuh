/* What the warps of the decode pass that multiply do in a product: each makes the planes of its
 * part of the row, takes its units of the slabs that the ring brings and leaves its sums of a tile
 * to a warp that finishes it. Nothing here waits for another warp of the block but for a free place
 * of sums. Private to decode_pass.cu. */
#ifndef TMF_KERNELS_DECODE_PASS_PRODUCT_CUH
#define TMF_KERNELS_DECODE_PASS_PRODUCT_CUH

#include "kernels/decode_pass.cuh"
#include "kernels/gemm_w4_one.cuh"

#define TURNS       4  /* tiles whose sums wait for who finishes them */
#define MAX_STAGES  12 /* of the ring */
#define UNIT_BYTES  (1024 + 64 * (128 / DECODE_PASS_GROUP))
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define SET_BYTES   512 /* planes of a warp's two units of a slab */

/* ---- shared memory by its address ---- */

__device__ __forceinline__ uint4 shared_load4(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 shared_load2(uint32_t at)
{
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
    return v;
}
__device__ __forceinline__ void shared_store(uint32_t at, float v)
{
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(at), "f"(v) : "memory");
}

/* As the compiler cannot know: it would make a shared address anew at each use. */
__device__ __forceinline__ uint32_t kept(uint32_t v) { return __shfl_sync(~0u, v, 0); }

/* ---- a row ---- */

/* What a step reads: words whose bit 0 counts when `mask` is 1. */
typedef struct {
    const void *at;
    uint32_t tag, mask;
} step_input;

/* Words that lie beside each other, fresh or not yet. */
__device__ __forceinline__ uint4 fresh_load4(const void *p)
{
    uint4 v;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
__device__ __forceinline__ uint2 fresh_load2(const void *p)
{
    uint2 v;
    asm volatile("ld.relaxed.gpu.global.v2.u32 {%0,%1}, [%2];"
                 : "=r"(v.x), "=r"(v.y)
                 : "l"(p)
                 : "memory");
    return v;
}

/* A warp multiplies units warp, warp + CW, .. and makes their planes for itself; two of them, those
 * of a slab, are a set: with one B operand for each 16 bytes of codes that a lane has of a unit.
 * These are, word by word, the A operand as they lie, rows g, g + 8, g, g + 8, though their words
 * differ in inputs and not in rows: so a B operand has the inputs of even words in columns 0 and 1
 * (high and low plane) and those of odd ones in columns 2 and 3, the next unit's in 4 to 7, and of
 * what comes out each lane takes two sums. planes: [sets][32 lanes][16 bytes], scales: [sets][lane
 * & 3] {scale, integer sum or, where another lane has that, 0}, both the warp's own. */
typedef struct {
    uint8_t *planes;
    float2 *scales;
} own_row;

/* A warp's part of a row of so many units, in memory that is the warp's own in all steps: another
 * may be in the next step already. */
__device__ __forceinline__ own_row row_of(uint8_t *own, int units)
{
    const int sets = (units + STAGE_UNITS - 1) / STAGE_UNITS;
    own_row r;
    r.planes = own;
    r.scales = (float2 *)(own + sets * SET_BYTES);
    return r;
}

/* Planes of units n (even) to n + N - 1 of the warp, made beside each other so that none waits for
 * another. From `most` (even, 2 or more) on they are left out: a row has no room for them. */
template <int N>
__device__ __forceinline__ void make_planes(const own_row &r, int n, int most, const float (*v)[4],
                                            int lane)
{
    uint32_t hi[N], lo[N];
    int sum[N];
    float scale[N];
    uint8_t *p = r.planes + n * (SET_BYTES / 2) + (lane >> 2 & 1) * 128 + (lane & 1) * 32 +
                 (lane >> 1 & 1) * 16 + (lane >> 4) * 8 + (lane >> 3 & 1) * 4;
#pragma unroll
    for (int i = 0; i < N; i++)
        scale[i] = w4_fixed(v[i], DECODE_PASS_GROUP, &hi[i], &lo[i], &sum[i], lane);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= 2 && i >= most) break;
        *(uint32_t *)(p + i * (SET_BYTES / 2)) = hi[i];
        *(uint32_t *)(p + i * (SET_BYTES / 2) + 64) = lo[i];
        if (lane < 2)
            r.scales[(n + i) * 2 + lane] = make_float2(scale[i], lane ? 0.f : (float)sum[i]);
    }
}

#define NORM_UNITS 4 /* asked for at once, of the stream */
#define X_UNITS    8 /* of f16, */
#define X_MADE     4 /* whose planes are made at once */

/* Weights of the norm that a warp may have before the wait; those of f32 it loads when it needs
 * them. */
__device__ __forceinline__ void load_norm(uint2 g[NORM_UNITS], const decode_step &s, int unit,
                                          int units, int lane)
{
    if (s.norm_dt == DT_F32) return;
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++)
        if (unit + CW * i < units)
            g[i] = *(const uint2 *)((const uint16_t *)s.norm + (unit + CW * i) * 128 + lane * 4);
}

__device__ __forceinline__ float4 norm_weights(const decode_step &s, uint2 raw, int unit, int lane)
{
    if (s.norm_dt == DT_F32)
        return *(const float4 *)((const float *)s.norm + min(unit * 128, s.k - 128) + lane * 4);
    if (s.norm_dt == DT_F16) {
        const float2 x = __half22float2(*(const __half2 *)&raw.x),
                     y = __half22float2(*(const __half2 *)&raw.y);
        return make_float4(x.x, x.y, y.x, y.y);
    }
    return make_float4(__uint_as_float(raw.x << 16), __uint_as_float(raw.x & 0xffff0000u),
                       __uint_as_float(raw.y << 16), __uint_as_float(raw.y & 0xffff0000u));
}

/* The warp's row from the residual stream times the norm's weights; one over the root of its
 * squares, which it returns added up, comes behind the product. */
__device__ __forceinline__ float norm_row(const own_row &r, const decode_step &s,
                                          const step_input &in, int warp, int lane)
{
    const int units = s.k / 128;
    float squares = 0.f;
#pragma unroll 1
    for (int u = warp, n = 0; u < units;) {
        uint2 g[NORM_UNITS] = {};
        uint4 raw[NORM_UNITS];
        uint32_t late;
        load_norm(g, s, u, units, lane);
        do {
            late = 0;
#pragma unroll
            for (int i = 0; i < NORM_UNITS; i++)
                if (u + CW * i < units)
                    raw[i] = fresh_load4((const uint32_t *)in.at + (u + CW * i) * 128 + lane * 4);
                else
                    raw[i] = make_uint4(in.tag, in.tag, in.tag, in.tag);
#pragma unroll
            for (int i = 0; i < NORM_UNITS; i++)
                late |= raw[i].x ^ in.tag | raw[i].y ^ in.tag | raw[i].z ^ in.tag |
                        raw[i].w ^ in.tag;
        } while (__any_sync(~0u, late & in.mask));
#pragma unroll 1
        for (int i = 0; i < NORM_UNITS && u < units; i += 2, n += 2, u += 2 * CW) {
            float v[2][4], sum = 0.f;
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const float4 w = norm_weights(s, g[j], u + CW * j, lane);
                const float x = __uint_as_float(raw[j].x & ~in.mask),
                            y = __uint_as_float(raw[j].y & ~in.mask),
                            z = __uint_as_float(raw[j].z & ~in.mask),
                            t = __uint_as_float(raw[j].w & ~in.mask);
                sum += x * x + y * y + z * z + t * t;
                v[j][0] = x * w.x, v[j][1] = y * w.y, v[j][2] = z * w.z, v[j][3] = t * w.w;
                raw[j] = raw[2 + j], g[j] = g[2 + j];
            }
            make_planes<2>(r, n, 2, v, lane);
#pragma unroll
            for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
            squares += sum;
        }
    }
    return squares;
}

/* The warp's row from f16. */
__device__ __forceinline__ void x_row(const own_row &r, int units, const step_input &in, int warp,
                                      int lane)
{
#pragma unroll 1
    for (int u = warp, n = 0; u < units;) {
        uint2 raw[X_UNITS];
        uint32_t late;
        do {
            late = 0;
#pragma unroll
            for (int i = 0; i < X_UNITS; i++)
                if (u + CW * i < units)
                    raw[i] = fresh_load2((const __half *)in.at + (u + CW * i) * 128 + lane * 4);
                else
                    raw[i] = make_uint2(in.tag, in.tag);
#pragma unroll
            for (int i = 0; i < X_UNITS; i++) late |= raw[i].x ^ in.tag | raw[i].y ^ in.tag;
        } while (__any_sync(~0u, late & in.mask));
#pragma unroll 1
        for (int i = 0; i < X_UNITS && u < units; i += X_MADE, n += X_MADE, u += X_MADE * CW) {
            float v[X_MADE][4];
#pragma unroll
            for (int j = 0; j < X_MADE; j++) {
                const uint32_t x = raw[j].x & ~in.mask, y = raw[j].y & ~in.mask;
                const float2 a = __half22float2(*(const __half2 *)&x),
                             b = __half22float2(*(const __half2 *)&y);
                v[j][0] = a.x, v[j][1] = a.y, v[j][2] = b.x, v[j][3] = b.y;
            }
#pragma unroll
            for (int j = 0; j + X_MADE < X_UNITS; j++) raw[j] = raw[j + X_MADE];
            make_planes<X_MADE>(r, n, ((units - u + CW - 1) / CW + 1) & ~1, v, lane);
        }
    }
}

/* ---- a product ---- */

/* Sums of tiles on their way to the warps that finish them, which never hold the others up. */
typedef struct {
    float sums[TURNS][CW][16], squares[TURNS][CW];
    uint64_t full[TURNS], empty[TURNS];
} tile_sums;

/* Where a warp is in the ring, and how many tiles its block has had. It lies in shared memory from
 * one product to the next: attention needs all registers. */
typedef struct {
    int slot;
    uint32_t phase, done;
    int known; /* the last step that all blocks are known to have left, and whose words are there */
} ring_place;

/* Shared addresses of a warp that multiplies. codes, param: this lane's in the ring's first slab;
 * bars: of full places, then of empty ones. */
typedef struct {
    uint32_t codes, param, bars;
    int stages;
} ring_view;

/* A warp's two units of a slab, and this lane's parameters of one of them. */
typedef struct {
    uint4 q[2][2];
    uint2 p;
    uint32_t empty; /* where to say that they are read */
} slab_regs;

__device__ __forceinline__ void take_slab(slab_regs *v, ring_place *g, const ring_view &r)
{
    const uint32_t at = g->slot * STAGE_BYTES, bar = r.bars + g->slot * 8;
    mbar_wait(bar, g->phase);
#pragma unroll
    for (int n = 0; n < 2; n++)
        v->q[n][0] = shared_load4(r.codes + at + n * CW * UNIT_BYTES),
        v->q[n][1] = shared_load4(r.codes + at + n * CW * UNIT_BYTES + 512);
    v->p = shared_load2(r.param + at);
    v->empty = bar + MAX_STAGES * 8;
    if (++g->slot == r.stages) g->slot = 0, g->phase ^= 1;
}

/* A set of a row. */
typedef struct {
    uint4 b;
    float scale, sum;
} row_set;
__device__ __forceinline__ row_set load_set(uint32_t planes, uint32_t scales, int set)
{
    row_set x;
    x.b = shared_load4(planes + set * SET_BYTES);
    const uint2 sc = shared_load2(scales + set * 32);
    x.scale = __uint_as_float(sc.x), x.sum = __uint_as_float(sc.y);
    return x;
}

/* Adds this lane's part of a slab, rows g and g + 8 of one of the two units, when that is `mine`.
 * Codes of rows g + 8 are multiplied with those of rows g below them, as 16 times one and the
 * other. */
__device__ __forceinline__ void add_slab(float acc[2], const slab_regs &v, const row_set &x,
                                         bool mine, int lane)
{
    int low[2][4], both[2][4];
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int n = 0; n < 2; n++) {
            const uint4 q = v.q[n][i];
            const uint32_t a[4] = {q.x, q.y, q.z, q.w},
                           c[4] = {q.x & 0x0f0f0f0fu, q.y & 0x0f0f0f0fu, q.z & 0x0f0f0f0fu,
                                   q.w & 0x0f0f0f0fu};
            if (i == 0)
#pragma unroll
                for (int j = 0; j < 4; j++) low[n][j] = both[n][j] = 0;
            mma_u8s8(both[n], a, i ? x.b.z : x.b.x, i ? x.b.w : x.b.y);
            mma_u8s8(low[n], c, i ? x.b.z : x.b.x, i ? x.b.w : x.b.y);
        }
    int d[4];
#pragma unroll
    for (int j = 0; j < 2; j++) {
        const int a0 = lane & 1 ? both[0][2 + j] : both[0][j],
                  a1 = lane & 1 ? both[1][2 + j] : both[1][j],
                  b0 = lane & 1 ? low[0][2 + j] : low[0][j],
                  b1 = lane & 1 ? low[1][2 + j] : low[1][j];
        d[j] = lane & 2 ? a1 : a0, d[2 + j] = lane & 2 ? b1 : b0;
    }
    const int one = d[2] * 256 + d[3], other = d[0] * 256 + d[1] - one;
    const float2 p0 = __half22float2(*(const __half2 *)&v.p.x),
                 p1 = __half22float2(*(const __half2 *)&v.p.y);
    if (!mine) return; /* parameters may be anything */
    acc[0] += p0.x * x.scale * ((float)one - p0.y * x.sum);
    acc[1] += p1.x * x.scale * ((float)other * 0.0625f - p1.y * x.sum);
}

/* A warp's sums of a tile go to who finishes it, and what its squares add up to. */
__device__ __forceinline__ void leave_tile(uint32_t sums, ring_place *g, const float acc[2],
                                           float squares, int warp, int lane)
{
    const uint32_t turn = g->done % TURNS, bars = sums + (uint32_t)offsetof(tile_sums, full);
    const bool odd = lane & 1; /* lanes t and t + 1 take a row each */
    float v = odd ? acc[1] : acc[0];
    v += __shfl_xor_sync(~0u, odd ? acc[0] : acc[1], 1);
    v += __shfl_xor_sync(~0u, v, 2);
    mbar_wait(bars + (TURNS + turn) * 8, (g->done / TURNS & 1) ^ 1); /* at first it is free */
    if ((lane & 2) == 0)
        shared_store(sums + ((turn * CW + warp) * 16 + (lane >> 2) + (odd ? 8 : 0)) * 4, v);
    if (lane == 0)
        shared_store(sums + (uint32_t)offsetof(tile_sums, squares) + (turn * CW + warp) * 4,
                     squares);
    __syncwarp();
    if (lane == 0) mbar_arrive(bars + turn * 8);
    g->done++;
}

/* What a warp multiplies in a step. */
typedef struct {
    int tile, tiles, units, unit; /* unit: of this lane in a tile's first slab */
    int first;                    /* of the slab */
    uint32_t planes, scales, sums;
    float squares;
} walk_state;

/* Multiplies a slab while the next one comes into registers; false when it was the last. */
__device__ __forceinline__ bool one_slab(walk_state *k, float acc[2], const slab_regs &v,
                                         slab_regs *next, row_set *x, const ring_view &r,
                                         ring_place *g, int warp, int lane)
{
    const bool ends = k->first + STAGE_UNITS >= k->units, mine = k->first + k->unit < k->units,
               more = !ends || k->tile + (int)gridDim.x < k->tiles;
    if (k->units > STAGE_UNITS) *x = load_set(k->planes, k->scales, k->first / STAGE_UNITS);
    if (more) take_slab(next, g, r);
    add_slab(acc, v, *x, mine, lane);
    __syncwarp();
    if (lane == 0) mbar_arrive(v.empty);
    k->first += STAGE_UNITS;
    if (ends) {
        leave_tile(k->sums, g, acc, k->squares, warp, lane);
        acc[0] = acc[1] = 0.f;
        k->first = 0;
        k->tile += gridDim.x;
    }
    return more;
}

/* The tiles of this block, by warps 0..CW-1. */
__device__ __forceinline__ void multiply(walk_state *k, const ring_view &r, ring_place *g, int warp,
                                         int lane)
{
    slab_regs v, next = {}; /* as what is not set here would be kept from step to step */
    float acc[2] = {0.f, 0.f};
    take_slab(&v, g, r);
    row_set x = load_set(k->planes, k->scales, 0);
#pragma unroll 1
    while (one_slab(k, acc, v, &next, &x, r, g, warp, lane) &&
           one_slab(k, acc, next, &v, &x, r, g, warp, lane))
        continue;
}

#endif
