/* See decode_pass.cuh. Products are those of gemm_w4_one, but that the norm's factor comes behind
 * the product, so nothing waits for it. In a product CW warps multiply, the next adds up what
 * they leave and the others fetch the cache of the attention to come; the last one asks for
 * weights all the time. Registers are the tight thing here: what spills costs a tenth of the
 * speed and more. */
#include "kernels/decode_pass.cuh"

#define ATTN_WARPS 11 /* attention has the whole block but its producer as one team */
#include "kernels/attn_decode_body.cuh"
#include "kernels/gemm_w4_one.cuh"

#define WARPS       ATTN_WARPS
#define PRODUCER    WARPS /* one warp more */
#define FINISHER    CW    /* the warp that adds up tiles */
#define TURNS       4     /* tiles whose sums wait for it */
#define MAX_TABLE   512
#define MAX_STAGES  12
#define UNIT_BYTES  (1024 + 64 * (128 / DECODE_PASS_GROUP))
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define SHARED_MOST (227 * 1024 - 7168) /* of a block, less what is declared in the kernel */

/* ---- steps ---- */

__device__ __forceinline__ void block_sync() /* all but the producer */
{
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
}

/* By one thread when the block needs nothing any more that a step reads. */
__device__ __forceinline__ void arrive(const decode_pass &p, uint32_t *set, int step)
{
    uint32_t *left = set + DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS + step;
    asm volatile("red.add.relaxed.gpu.global.u32 [%0], 1;" ::"l"(left) : "memory");
    if (step + 1 < p.n || atomicAdd(p.launches, 1) != (int)gridDim.x - 1) return;
    p.launches[0] = 0;
    p.launches[1]++;
}

/* By one thread in each step, before the block writes: until every block has left the step before
 * the last, so that nobody needs what was in the slot. It rarely waits. */
__device__ __forceinline__ void slot_wait(uint32_t *set, int step)
{
    const uint32_t *left = set + DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS + step - 2;
    while (step > 1 && fresh_load(left) < gridDim.x) continue;
}

/* Where a step leaves its results, and the tag of its words. */
__device__ __forceinline__ uint32_t *slot_of(uint32_t *set, int step)
{
    return set + step % DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS;
}
__device__ __forceinline__ uint32_t tag_of(int step) { return (step / DECODE_PASS_SLOTS + 1) & 1; }

/* Four words that lie beside each other, fresh or not yet. */
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

/* What a step reads: words whose bit 0 counts when `mask` is 1. */
typedef struct {
    const void *at;
    uint32_t tag, mask;
} step_input;
__device__ __forceinline__ step_input input_of(const decode_step &s, int step, uint32_t *set)
{
    step_input in = {s.x, 0, 0};
    if (s.in) in.at = slot_of(set, step - s.in), in.tag = tag_of(step - s.in), in.mask = 1;
    return in;
}

__device__ __forceinline__ w4_tiles tiles_of(const decode_step &s)
{
    w4_tiles w;
    w.data = s.data, w.bias = (const __half *)s.extra;
    w.n = s.n, w.k = s.k, w.group = DECODE_PASS_GROUP;
    w.tiles = (s.n + 15) / 16, w.units = s.k / 128, w.paired = s.paired;
    return w;
}

__device__ __forceinline__ int first_tile(const decode_step &s)
{
    const int b = (int)blockIdx.x - s.first;
    return b < 0 ? b + (int)gridDim.x : b;
}

/* ---- the ring of weights ---- */

/* One thread keeps the next slabs of this block in flight, those of steps to come too. */
typedef struct {
    uint8_t *memory; /* [stages][STAGE_BYTES] */
    uint64_t *full, *empty;
    int stages;
} weight_ring;
typedef struct {
    int step, tile, tiles, unit, units, slot, round; /* the next slab to ask for */
    const uint8_t *data;                             /* of the step */
} feeder;

/* The next tile of this block at or behind f->tile. */
__device__ __forceinline__ void seek(const decode_pass &p, feeder *f)
{
    while (f->tile >= f->tiles && ++f->step < p.n) {
        const decode_step &s = p.steps[f->step];
        if (s.attn) continue;
        f->data = s.data, f->units = s.k / 128, f->tiles = (s.n + 15) / 16;
        f->tile = first_tile(s);
    }
}

/* Asks for one slab after another, each when its place is free. */
__device__ __forceinline__ void produce(const decode_pass &p, const weight_ring &r)
{
    feeder f = {-1, 0, 0, 0, 0, 0, 0, NULL};
    for (seek(p, &f); f.step < p.n;) {
        if (f.round) mbar_wait(&r.empty[f.slot], (f.round - 1) & 1);
        bulk_load(r.memory + f.slot * STAGE_BYTES,
                  f.data + ((size_t)f.tile * f.units + f.unit) * UNIT_BYTES,
                  min(STAGE_UNITS, f.units - f.unit) * UNIT_BYTES, &r.full[f.slot]);
        if (++f.slot == r.stages) f.slot = 0, f.round++;
        f.unit += STAGE_UNITS;
        if (f.unit < f.units) continue;
        f.unit = 0;
        f.tile += gridDim.x;
        seek(p, &f);
    }
}

/* ---- a product ---- */

__device__ __forceinline__ void copy_step(decode_step *to, const decode_step *from, int lane)
{
    if (lane < (int)sizeof *to / 4) ((uint32_t *)to)[lane] = ((const uint32_t *)from)[lane];
}

/* What a step of a product needs and may have before the wait: norm weights of NORM_UNITS units
 * WARPS apart, whose planes a warp makes at once. */
#define NORM_UNITS 3
typedef struct {
    float g[NORM_UNITS][4];
} norm_ahead;

__device__ __forceinline__ void load_norm(norm_ahead *a, const decode_step &s, int unit, int lane)
{
    const int units = s.k / 128;
    if (s.norm_dt == DT_F32) {
#pragma unroll
        for (int i = 0; i < NORM_UNITS; i++) {
            const float *p = (const float *)s.norm + min(unit + WARPS * i, units - 1) * 128;
#pragma unroll
            for (int j = 0; j < 4; j++) a->g[i][j] = p[lane * 4 + j];
        }
        return;
    }
    const bool f16 = s.norm_dt == DT_F16;
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++) {
        const uint2 raw = *(const uint2 *)((const uint16_t *)s.norm +
                                           min(unit + WARPS * i, units - 1) * 128 + lane * 4);
        const float2 x = __half22float2(*(const __half2 *)&raw.x),
                     y = __half22float2(*(const __half2 *)&raw.y);
        a->g[i][0] = f16 ? x.x : __uint_as_float(raw.x << 16);
        a->g[i][1] = f16 ? x.y : __uint_as_float(raw.x & 0xffff0000u);
        a->g[i][2] = f16 ? y.x : __uint_as_float(raw.y << 16);
        a->g[i][3] = f16 ? y.y : __uint_as_float(raw.y & 0xffff0000u);
    }
}

/* NORM_UNITS units of the stream, WARPS apart. */
__device__ __forceinline__ bool load_stream(uint4 f[NORM_UNITS], const step_input &in, int unit,
                                            int units, int lane)
{
    uint32_t late = 0;
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++)
        f[i] = fresh_load4((const uint32_t *)in.at + min(unit + WARPS * i, units - 1) * 128 +
                           lane * 4);
#pragma unroll
    for (int i = 0; i < NORM_UNITS; i++)
        late |= f[i].x ^ in.tag | f[i].y ^ in.tag | f[i].z ^ in.tag | f[i].w ^ in.tag;
    return __any_sync(~0u, late & in.mask);
}

/* Planes of the residual stream times the norm's weights; part: [WARPS], what its squares add up
 * to. One over their root comes behind the product. */
__device__ __forceinline__ void planes_norm(uint8_t *planes, float *scales, float *part,
                                            const decode_step &s, const step_input &in,
                                            norm_ahead *a, int warp, int lane)
{
    const int units = s.k / 128;
    float sum = 0.f;
    for (int u = warp; u < units; u += NORM_UNITS * WARPS) {
        uint4 raw[NORM_UNITS];
        float v[NORM_UNITS][4];
        if (u != warp) load_norm(a, s, u, lane);
        while (load_stream(raw, in, u, units, lane)) continue;
#pragma unroll
        for (int i = 0; i < NORM_UNITS; i++) {
            const float x = __uint_as_float(raw[i].x & ~in.mask),
                        y = __uint_as_float(raw[i].y & ~in.mask),
                        z = __uint_as_float(raw[i].z & ~in.mask),
                        t = __uint_as_float(raw[i].w & ~in.mask);
            sum += u + WARPS * i < units ? x * x + y * y + z * z + t * t : 0.f;
            v[i][0] = x * a->g[i][0], v[i][1] = y * a->g[i][1];
            v[i][2] = z * a->g[i][2], v[i][3] = t * a->g[i][3];
        }
        many_planes<DECODE_PASS_GROUP, NORM_UNITS>(planes, scales, u, WARPS, units, v, lane);
    }
#pragma unroll
    for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
    if (lane == 0) part[warp] = sum;
}

/* By the whole warp that adds tiles up. */
__device__ __forceinline__ float norm_factor(const decode_step &s, const float *part, int lane)
{
    if (!s.norm) return 1.f;
    float sum = lane < WARPS ? part[lane] : 0.f;
#pragma unroll
    for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
    return rsqrtf(sum / (float)s.k + s.eps);
}

/* Planes of 4 units from f16. */
__device__ __forceinline__ void planes_four(uint8_t *planes, float *scales, const uint2 raw[4],
                                            int unit, int units, int lane)
{
    float v[4][4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const float2 a = __half22float2(*(const __half2 *)&raw[i].x),
                     b = __half22float2(*(const __half2 *)&raw[i].y);
        v[i][0] = a.x, v[i][1] = a.y, v[i][2] = b.x, v[i][3] = b.y;
    }
    many_planes<DECODE_PASS_GROUP, 4>(planes, scales, unit, WARPS, units, v, lane);
}

__device__ __forceinline__ bool load_x(uint2 raw[8], const step_input &in, int unit, int units,
                                       int lane)
{
    uint32_t late = 0;
#pragma unroll
    for (int i = 0; i < 8; i++)
        if (unit + i * WARPS < units)
            raw[i] = fresh_load2((const __half *)in.at + (unit + i * WARPS) * 128 + lane * 4);
        else
            raw[i] = make_uint2(in.tag, in.tag);
#pragma unroll
    for (int i = 0; i < 8; i++) late |= raw[i].x ^ in.tag | raw[i].y ^ in.tag;
    return __any_sync(~0u, late & in.mask);
}

__device__ __forceinline__ void planes_x(uint8_t *planes, float *scales, const step_input &in,
                                         int units, int warp, int lane)
{
    for (int u = warp; u < units; u += 8 * WARPS) {
        uint2 raw[8];
        while (load_x(raw, in, u, units, lane)) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) raw[i].x &= ~in.mask, raw[i].y &= ~in.mask;
#pragma unroll 1
        for (int i = 0; i < 2; i++) {
            if (u + 4 * i * WARPS >= units) break;
            planes_four(planes, scales, raw, u + 4 * i * WARPS, units, lane);
#pragma unroll
            for (int j = 0; j < 4; j++) raw[j] = raw[4 + j];
        }
    }
}

/* Sums of tiles on their way to the finisher, which never holds the others up. */
typedef struct {
    float sums[TURNS][CW][16];
    uint64_t full[TURNS], empty[TURNS];
} tile_sums;

/* Where warps that multiply are in the ring. */
typedef struct {
    int slot, round, done; /* done: tiles so far */
} ring_place;

/* The tiles of this block, by warps 0..CW-1. */
__device__ __forceinline__ void multiply(const decode_step &s, const w4_tiles &w,
                                         const weight_ring &r, ring_place *g, const uint8_t *planes,
                                         const float *scales, tile_sums *t, int warp, int lane)
{
    for (int tile = first_tile(s); tile < w.tiles; tile += gridDim.x, g->done++) {
        const int turn = g->done % TURNS, before = g->done / TURNS;
        float acc[2] = {0.f, 0.f};
        mul_tile<DECODE_PASS_GROUP>(acc, r.memory, r.full, r.empty, r.stages, &g->slot, &g->round,
                                    planes, scales, w.units, warp, lane, [] {});
        if (before) mbar_wait(&t->empty[turn], (before - 1) & 1);
        float *sum = t->sums[turn][warp];
        if ((lane & 3) == 0) sum[lane >> 2] = acc[0], sum[8 + (lane >> 2)] = acc[1];
        __syncwarp();
        if (lane == 0) mbar_arrive(&t->full[turn]);
    }
}

/* What row `lane` of a tile holds already. */
__device__ __forceinline__ float held_of(const decode_step &s, const w4_tiles &w, int step,
                                         uint32_t *set, int tile, int lane)
{
    const int o = w4_row(w.n, w.paired, tile, lane & 15);
    if (!s.add || lane >= 16 || o >= w.n) return 0.f;
    if (!s.held) return s.wide ? ((const float *)s.y)[o] : __half2float(((const __half *)s.y)[o]);
    const uint32_t *at = slot_of(set, step - s.held), tag = tag_of(step - s.held);
    uint32_t v;
    do v = fresh_load(at + (s.wide ? o : o / 2));
    while ((v ^ tag) & 1);
    v &= ~1u;
    return s.wide ? __uint_as_float(v)
                  : __half2float(__ushort_as_half((uint16_t)(v >> o % 2 * 16)));
}

/* Row `lane` of a tile, lanes 0..15 (gated: 0..7), all lanes call. */
__device__ __forceinline__ void store_tile(const decode_step &s, const w4_tiles &w, uint32_t *out,
                                           uint32_t tag, float v, float held, int tile, int lane)
{
    const int r = lane & 15, row = w4_row(w.n, w.paired, tile, r), o = s.glu ? tile * 8 + r : row;
    const bool mine = lane < (s.glu ? 8 : 16) && row < w.n;
    if (w.bias && row < w.n) v += __half2float(w.bias[row]);
    if (s.glu) {
        v = __half2float(__float2half_rn(v));
        const float up = __shfl_down_sync(~0u, v, 8);
        v = fminf(fmaxf(v / (1.f + __expf(-v)) * up, -65504.f), 65504.f);
    } else if (s.add)
        v = held + v;
    if (s.wide) {
        const uint32_t bits = __float_as_uint(v) & ~1u;
        if (!mine) return;
        fresh_store(out + o, bits | tag);
        if (!s.quiet) ((float *)s.y)[o] = __uint_as_float(bits);
        return;
    }
    const uint32_t bits = __half_as_ushort(__float2half_rn(v));
    if (s.single) {
        if (!mine) return;
        fresh_store(out + o, bits << 16 | tag);
        if (!s.quiet) ((uint16_t *)s.y)[o] = (uint16_t)bits;
        return;
    }
    const uint32_t other = __shfl_xor_sync(~0u, bits, 1),
                   pair = fresh_pair(lane & 1 ? other | bits << 16 : bits | other << 16);
    if (!mine) return;
    if (!(lane & 1)) fresh_store(out + o / 2, pair | tag);
    if (!s.quiet) ((uint16_t *)s.y)[o] = (uint16_t)(pair >> (lane & 1) * 16);
}

/* One warp: it alone writes what the product makes. */
__device__ __forceinline__ void finish(const decode_pass &p, const decode_step &s, int step,
                                       uint32_t *set, const w4_tiles &w, int done, tile_sums *t,
                                       float factor, int lane)
{
    uint32_t *out = slot_of(set, step);
    const uint32_t tag = tag_of(step);
    if (lane == 0) slot_wait(set, step);
    __syncwarp();
    for (int tile = first_tile(s); tile < w.tiles; tile += gridDim.x, done++) {
        const int turn = done % TURNS;
        const float held = held_of(s, w, step, set, tile, lane);
        __syncwarp();
        mbar_wait(&t->full[turn], done / TURNS & 1);
        float v = 0.f;
#pragma unroll
        for (int k = 0; k < CW; k++) v += t->sums[turn][k][lane & 15];
        store_tile(s, w, out, tag, v * factor, held, tile, lane);
        __syncwarp();
        if (lane == 0) mbar_arrive(&t->empty[turn]);
    }
    if (lane == 0) arrive(p, set, step);
}

#define FETCH_TOKENS 256 /* of a part */
/* Asks for bytes to come into L2; address and bytes multiples of 16. */
__device__ __forceinline__ void prefetch_bulk(const void *p, int bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
/* Brings the cache of this block's parts of the attention step `next` near. */
template <int D, int BITS>
__device__ __forceinline__ void fetch_cache(const decode_pass &p, const decode_step &next,
                                            const int32_t *table, const int32_t *len, int thread,
                                            int threads)
{
    constexpr int U = BITS == 4 ? 2 : 1, ROW = D * BITS / 8;
    attn_decode_call c = p.attn;
    c.window = next.n, c.kv_len = len;
#pragma unroll 1
    for (int i = blockIdx.x; i < p.attn_items; i += gridDim.x) {
        const int slot = c.splits > 1 ? i / c.splits : i;
        const attn_part part = part_of<U>(c, i - slot * c.splits, slot, 0);
        const int lo = part.lo * U * TILE,
                  hi = min(min(part.hi * U * TILE, part.len), lo + FETCH_TOKENS);
        for (int tok = (lo / c.block_tokens + thread) * c.block_tokens; tok < hi;
             tok += threads * c.block_tokens) {
            const int from = max(tok, lo), n = min(tok + c.block_tokens, hi) - from;
            const uint8_t *k = next.data +
                               (((size_t)table[tok / c.block_tokens] * c.kv_heads + part.head) * 2 *
                                    c.block_tokens +
                                (from - tok)) *
                                   ROW;
            prefetch_bulk(k, n * ROW);
            prefetch_bulk(k + c.block_tokens * ROW, n * ROW);
        }
    }
}

template <int D, int BITS>
__device__ __forceinline__ void
product(const decode_pass &p, const decode_step &s, int step, decode_step *next_step, uint32_t *set,
        const weight_ring &r, ring_place *g, uint8_t *planes, tile_sums *sums, float *part,
        const int32_t *table, const int32_t *len, int warp, int lane)
{
    const w4_tiles w = tiles_of(s);
    const int first = first_tile(s),
              tiles = first < w.tiles ? (w.tiles - first + gridDim.x - 1) / gridDim.x : 0;
    float *scales = (float *)(planes + w.units * 256);
    norm_ahead a;
    if (s.norm) load_norm(&a, s, warp, lane);
    const step_input in = input_of(s, step, set);
    block_sync(); /* nobody needs the memory of the step before any more */
    if (next_step && warp == WARPS - 1) copy_step(next_step, &p.steps[step + 1], lane);
    if (tiles == 0) /* nothing to do but to let the others know */
        ;
    else if (s.norm)
        planes_norm(planes, scales, part, s, in, &a, warp, lane);
    else
        planes_x(planes, scales, in, w.units, warp, lane);
    block_sync();
    const decode_step *next = next_step;
    if (warp < CW) {
        multiply(s, w, r, g, planes, scales, sums, warp, lane);
    } else if (warp == FINISHER)
        finish(p, s, step, set, w, g->done, sums, norm_factor(s, part, lane), lane);
    else if (next && next->attn)
        fetch_cache<D, BITS>(p, *next, table, len, (warp - FINISHER - 1) * 32 + lane,
                             (WARPS - FINISHER - 1) * 32);
    if (warp >= CW) g->done += tiles;
}

/* ---- attention ---- */

template <int D, int BITS, int H>
__device__ __forceinline__ void
attention(const decode_pass &p, const decode_step &s, int step, decode_step *next, uint32_t *set,
          uint8_t *work, const float (*angles)[128], const int32_t *len, const int32_t *table)
{
    constexpr int U = BITS == 4 ? 2 : 1;
    const attn_team tm = {(int)threadIdx.x, 1};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    attn_memory sh = attn_memory_of<D>(work, min(8, p.attn.group), angles);
    if (s.in) sh.in = slot_of(set, step - s.in), sh.in_tag = tag_of(step - s.in);
    sh.out = slot_of(set, step), sh.out_tag = tag_of(step), sh.quiet = s.quiet;
    attn_decode_call c = p.attn;
    c.data = s.data, c.param = (const __half2 *)s.extra, c.window = s.n;
    c.rope.data = (uint8_t *)s.data, c.rope.param = (__half2 *)s.extra;
    c.kv_len = len, c.table = table;
    bool waited = false;
    for (int i = blockIdx.x; i < p.attn_items || !waited; i += gridDim.x) {
        tile_regs<D, BITS> cur[U];
        attn_part part = {};
        if (i < p.attn_items) {
            const int slot = c.splits > 1 ? i / c.splits : i;
            part = part_of<U>(c, i - slot * c.splits, slot, 0);
            load_first<D, BITS, U>(cur, c, part, table, warp, lane >> 2, lane & 3);
        }
        if (!waited) {
            block_sync(); /* nobody needs the memory of the step before any more */
            if (threadIdx.x == 0) slot_wait(set, step); /* a barrier follows before a write */
            if (next && warp == WARPS - 1) copy_step(next, &p.steps[step + 1], lane);
            waited = true;
        }
        if (i >= p.attn_items) break;
        attn_decode_item<D, BITS, U, false, H>(tm, c, sh, (out_rows<D> *)NULL, part, cur, 0);
        team_sync(tm);
    }
    block_sync();
    if (threadIdx.x == 0) arrive(p, set, step);
}

template <int D, int BITS, int H>
__global__ void __launch_bounds__((WARPS + 1) * 32, 1)
    decode_pass_kernel(const __grid_constant__ decode_pass p)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    __shared__ tile_sums sums;
    __shared__ float part[WARPS], angles[2][128];
    __shared__ int32_t len, table[MAX_TABLE];      /* what attention asks for again and again */
    __shared__ __align__(16) decode_step steps[2]; /* this one and the next */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const weight_ring r = {memory, full, empty, p.stages};
    uint8_t *work = memory + p.stages * STAGE_BYTES; /* a row's planes, or memory of teams */
    ring_place g = {0, 0, 0};
    if (threadIdx.x == PRODUCER * 32) {
        for (int i = 0; i < p.stages; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == PRODUCER) {
        if (lane == 0) produce(p, r);
        return;
    }
    if (threadIdx.x == 0)
        for (int i = 0; i < TURNS; i++) mbar_init(&sums.full[i], CW), mbar_init(&sums.empty[i], 1);
    if (threadIdx.x == 0 && p.attn_items) len = p.attn.kv_len[0];
    const bool near = p.attn.table_stride <= MAX_TABLE;
    for (int i = threadIdx.x; p.attn_items && near && i < p.attn.table_stride; i += WARPS * 32)
        table[i] = p.attn.table[i];
    if (p.attn_items) newest_angles(angles, p.attn.rope, p.attn.kv_len[0] - 1);
    if (warp == 0) copy_step(&steps[0], &p.steps[0], lane);
    const int launch = p.launches[1] & 1;
    uint32_t *set = p.exchange + launch * DECODE_PASS_SET_WORDS;
    uint4 *other = (uint4 *)(p.exchange + (launch ^ 1) * DECODE_PASS_SET_WORDS);
    for (int i = blockIdx.x * WARPS * 32 + threadIdx.x; i < DECODE_PASS_SET_WORDS / 4;
         i += gridDim.x * WARPS * 32)
        other[i] = make_uint4(0, 0, 0, 0); /* for the next launch */
    block_sync();
    for (int i = 0; i < p.n; i++) {
        const decode_step &s = steps[i & 1];
        decode_step *next = i + 1 < p.n ? &steps[(i + 1) & 1] : NULL;
        if (s.attn)
            attention<D, BITS, H>(p, s, i, next, set, work, angles, &len,
                                  near ? table : p.attn.table);
        else
            product<D, BITS>(p, s, i, next, set, r, &g, work, &sums, part,
                             near ? table : p.attn.table, &len, warp, lane);
    }
#endif
}

/* ---- launch ---- */

int decode_pass_work_bytes(int units, int head_dim, int group)
{
    const int heads = group < 8 ? group : 8;
    const int row = (units * (256 + (1 + 128 / DECODE_PASS_GROUP) * 4) + 15) & ~15;
    const int team = ATTN_TEAM_BYTES(head_dim, heads);
    return ((row > team ? row : team) + 15) & ~15;
}

bool decode_pass_fits(int64_t k)
{
    return k % 128 == 0 && k <= 32768 &&
           decode_pass_work_bytes((int)(k / 128), 128, 8) + 4 * STAGE_BYTES <= SHARED_MOST;
}

template <int D, int BITS, int H>
static cudaError_t launch(decode_pass *p, int work_bytes, int sms, cudaStream_t stream)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    void *args[] = {p};
    p->stages = (SHARED_MOST - work_bytes) / STAGE_BYTES;
    if (p->stages > MAX_STAGES) p->stages = MAX_STAGES;
    const int smem = p->stages * STAGE_BYTES + work_bytes;
    const cudaError_t rc = cudaFuncSetAttribute(decode_pass_kernel<D, BITS, H>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (rc != cudaSuccess) return rc;
    cfg.gridDim = dim3((unsigned)sms);
    cfg.blockDim = dim3((WARPS + 1) * 32);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    attr[0].id = cudaLaunchAttributeCooperative; /* all blocks run at once, or none */
    attr[0].val.cooperative = 1;
    cfg.attrs = attr;
    cfg.numAttrs = 1;
    return cudaLaunchKernelExC(&cfg, (const void *)decode_pass_kernel<D, BITS, H>, args);
}

cudaError_t decode_pass_run(decode_pass *p, int head_dim, int bits, int work_bytes, int sms,
                            cudaStream_t stream)
{
#define CASE(D, H)                                                    \
    return bits == 16  ? launch<D, 16, H>(p, work_bytes, sms, stream) \
           : bits == 8 ? launch<D, 8, H>(p, work_bytes, sms, stream)  \
                       : launch<D, 4, H>(p, work_bytes, sms, stream)
    const bool two = p->attn_items && p->attn.group > 4; /* heads a lane */
    if (head_dim == 64 && two) CASE(64, 2);
    if (head_dim == 64) CASE(64, 1);
    if (two) CASE(128, 2);
    CASE(128, 1);
#undef CASE
}
