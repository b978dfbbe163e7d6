/* See decode_pass.cuh. The sums of products are those of gemm_w4_one, to the bit: the same
 * functions in the same order. In a product CW warps multiply, the next adds up what they leave,
 * the last one asks for weights and the others fetch the cache of the attention to come. */
#include "kernels/decode_pass.cuh"

#define ATTN_WARPS 12 /* attention has the whole block as one team */
#include "kernels/attn_decode_body.cuh"
#include "kernels/gemm_w4_one.cuh"

#define WARPS       ATTN_WARPS
#define PRODUCER    (WARPS - 1)
#define FINISHER    CW /* the warp that adds up tiles */
#define TURNS       4  /* tiles whose sums wait for it */
#define MAX_TABLE   512
#define MAX_STAGES  12
#define MAX_NORM    6 /* units a warp of a norm */
#define UNIT_BYTES  (1024 + 64 * (128 / DECODE_PASS_GROUP))
#define STAGE_BYTES (STAGE_UNITS * UNIT_BYTES)
#define SHARED_MOST (227 * 1024 - 7168) /* of a block, less what is declared in the kernel */

/* ---- steps ---- */

/* By one thread behind everything that the block wrote in a step. arrivals: blocks that left a
 * step, the last step, the kernel. */
__device__ __forceinline__ void arrive(const decode_pass &p, bool end)
{
    asm volatile("red.add.release.gpu.global.s32 [%0], 1;" ::"l"(p.arrivals + end) : "memory");
    if (!end || atomicAdd(p.arrivals + 2, 1) != (int)gridDim.x - 1) return;
    p.arrivals[0] = p.arrivals[1] = p.arrivals[2] = 0; /* nobody waits any more */
}

/* Until every block has left the step before; then everything written there is seen. */
__device__ __forceinline__ void step_wait(const decode_pass &p, int step)
{
    if (threadIdx.x == 0) {
        const int want = step * (int)gridDim.x;
        int seen;
        do {
            asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                         : "=r"(seen)
                         : "l"(p.arrivals)
                         : "memory");
        } while (seen < want);
    }
    __syncthreads();
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

/* Asks for one slab, when its place is free. */
__device__ __forceinline__ void feed(const decode_pass &p, const weight_ring &r, feeder *f)
{
    if (f->step >= p.n) return;
    if (f->round) mbar_wait(&r.empty[f->slot], (f->round - 1) & 1);
    bulk_load(r.memory + f->slot * STAGE_BYTES,
              f->data + ((size_t)f->tile * f->units + f->unit) * UNIT_BYTES,
              min(STAGE_UNITS, f->units - f->unit) * UNIT_BYTES, &r.full[f->slot]);
    if (++f->slot == r.stages) f->slot = 0, f->round++;
    f->unit += STAGE_UNITS;
    if (f->unit < f->units) return;
    f->unit = 0;
    f->tile += gridDim.x;
    seek(p, f);
}

/* ---- a product ---- */

/* What a step of a product needs and may have before the wait: norm weights. */
typedef struct {
    uint2 raw[MAX_NORM];
} norm_ahead;

__device__ __forceinline__ void load_norm(norm_ahead *a, const decode_step &s, int warp, int lane)
{
    if (s.attn || !s.norm || s.norm_dt == DT_F32) return;
#pragma unroll
    for (int i = 0; i < MAX_NORM; i++)
        if ((warp + WARPS * i) * 128 < s.k)
            a->raw[i] = *(const uint2 *)((const uint16_t *)s.norm + (warp + WARPS * i) * 128 +
                                         lane * 4);
}

__device__ __forceinline__ float norm_value(const norm_ahead &a, const decode_step &s, int i,
                                            int at, int j)
{
    const uint16_t bits = (uint16_t)((j < 2 ? a.raw[i].x : a.raw[i].y) >> (16 * (j & 1)));
    if (s.norm_dt == DT_F16) return __half2float(__ushort_as_half(bits));
    if (s.norm_dt == DT_BF16) return __bfloat162float(__ushort_as_bfloat16(bits));
    return ((const float *)s.norm)[at + j];
}

/* Planes of the normed residual stream; part: [64]. */
__device__ __forceinline__ void planes_norm(uint8_t *planes, float *scales, float *part,
                                            const decode_step &s, const norm_ahead &a, int warp,
                                            int lane)
{
    const int units = s.k / 128;
    float v[MAX_NORM][4], sum[MAX_NORM];
#pragma unroll
    for (int i = 0; i < MAX_NORM; i++) {
        const int u = min(warp + WARPS * i, units - 1);
        const float4 f = *(const float4 *)((const float *)s.x + u * 128 + lane * 4);
        v[i][0] = f.x, v[i][1] = f.y, v[i][2] = f.z, v[i][3] = f.w;
    }
#pragma unroll
    for (int i = 0; i < MAX_NORM; i++)
        sum[i] = v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] + v[i][3] * v[i][3];
#pragma unroll
    for (int x = 16; x; x >>= 1)
#pragma unroll
        for (int i = 0; i < MAX_NORM; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], x);
#pragma unroll
    for (int i = 0; i < MAX_NORM; i++)
        if (lane == 0) part[warp + WARPS * i] = warp + WARPS * i < units ? sum[i] : 0.f;
    __syncthreads();
    float all = part[lane] + part[lane + 32];
    for (int x = 16; x; x >>= 1) all += __shfl_xor_sync(~0u, all, x);
    const float inv = rsqrtf(all / (float)(units * 128) + s.eps);
#pragma unroll
    for (int i = 0; i < MAX_NORM; i++) {
        const int u = min(warp + WARPS * i, units - 1);
#pragma unroll
        for (int j = 0; j < 4; j++) v[i][j] *= inv * norm_value(a, s, i, u * 128 + lane * 4, j);
        round4(v[i]);
    }
    if (units <= 3 * WARPS)
        many_planes<DECODE_PASS_GROUP, 3>(planes, scales, warp, WARPS, units, v, lane);
    else
        many_planes<DECODE_PASS_GROUP, MAX_NORM>(planes, scales, warp, WARPS, units, v, lane);
}

__device__ __forceinline__ void planes_x(uint8_t *planes, float *scales, const __half *x, int units,
                                         int warp, int lane)
{
    for (int u = warp; u < units; u += 4 * WARPS) {
        float v[4][4];
        uint2 raw[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            raw[i] = *(const uint2 *)(x + min(u + i * WARPS, units - 1) * 128 + lane * 4);
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float2 a = __half22float2(*(const __half2 *)&raw[i].x),
                         b = __half22float2(*(const __half2 *)&raw[i].y);
            v[i][0] = a.x, v[i][1] = a.y, v[i][2] = b.x, v[i][3] = b.y;
        }
        many_planes<DECODE_PASS_GROUP, 4>(planes, scales, u, WARPS, units, v, lane);
    }
}

/* Sums of tiles on their way to the finisher, which never holds the others up. */
typedef struct {
    float sums[TURNS][CW][16];
    uint64_t full[TURNS], empty[TURNS];
} tile_sums;

/* The tiles of this block, by warps 0..CW-1. slab, tile: of the block before this step. */
__device__ __forceinline__ void multiply(const decode_step &s, const w4_tiles &w,
                                         const weight_ring &r, int slab, int done,
                                         const uint8_t *planes, const float *scales, tile_sums *t,
                                         int warp, int lane)
{
    int slot = slab % r.stages, round = slab / r.stages;
    for (int tile = first_tile(s); tile < w.tiles; tile += gridDim.x, done++) {
        const int turn = done % TURNS, before = done / TURNS;
        float acc[2] = {0.f, 0.f};
        mul_tile<DECODE_PASS_GROUP>(acc, r.memory, r.full, r.empty, r.stages, &slot, &round, planes,
                                    scales, w.units, warp, lane, [] {});
        if (before) mbar_wait(&t->empty[turn], (before - 1) & 1);
        float *sum = t->sums[turn][warp];
        if ((lane & 3) == 0) sum[lane >> 2] = acc[0], sum[8 + (lane >> 2)] = acc[1];
        __syncwarp();
        if (lane == 0) mbar_arrive(&t->full[turn]);
    }
}

/* One warp: it alone writes what the product makes. */
__device__ __forceinline__ void finish(const decode_step &s, const w4_tiles &w, int done,
                                       tile_sums *t, int lane)
{
    w4_one_call c = {};
    c.y = s.y, c.add = s.add, c.wide = s.wide, c.glu = s.glu;
    for (int tile = first_tile(s); tile < w.tiles; tile += gridDim.x, done++) {
        const int turn = done % TURNS;
        const float held = held_one(w, c, tile, lane);
        mbar_wait(&t->full[turn], done / TURNS & 1);
        if (lane < 16) finish_tile(w, c, t->sums[turn], tile, lane, held);
        __syncwarp();
        if (lane == 0) mbar_arrive(&t->empty[turn]);
    }
}

/* Brings the cache of this block's parts of the attention step `next` near. */
__device__ __forceinline__ void fetch_cache(const decode_pass &p, const decode_step &next,
                                            const int32_t *table, int len, int thread, int threads);

/* What a block has done in the steps before. */
typedef struct {
    int slabs, tiles;
} progress;

__device__ __forceinline__ void product(const decode_pass &p, const decode_step &s,
                                        const decode_step *next, const weight_ring &r, feeder *f,
                                        progress *g, const norm_ahead &a, uint8_t *planes,
                                        tile_sums *sums, float *part, const int32_t *table, int len,
                                        int warp, int lane)
{
    const w4_tiles w = tiles_of(s);
    const int first = first_tile(s),
              tiles = first < w.tiles ? (w.tiles - first + gridDim.x - 1) / gridDim.x : 0,
              slabs = tiles * ((w.units + STAGE_UNITS - 1) / STAGE_UNITS);
    float *scales = (float *)(planes + w.units * 256);
    if (s.norm)
        planes_norm(planes, scales, part, s, a, warp, lane);
    else
        planes_x(planes, scales, (const __half *)s.x, w.units, warp, lane);
    __syncthreads();
    if (warp < CW)
        multiply(s, w, r, g->slabs, g->tiles, planes, scales, sums, warp, lane);
    else if (warp == FINISHER)
        finish(s, w, g->tiles, sums, lane);
    else if (warp == PRODUCER) {
        for (int i = 0; lane == 0 && i < slabs; i++) feed(p, r, f);
    } else if (next && next->attn)
        fetch_cache(p, *next, table, len, (warp - FINISHER - 1) * 32 + lane,
                    (PRODUCER - FINISHER - 1) * 32);
    g->slabs += slabs, g->tiles += tiles;
}

/* ---- attention ---- */

#define FETCH_TOKENS 256 /* of a part */
__device__ __forceinline__ void fetch_cache(const decode_pass &p, const decode_step &next,
                                            const int32_t *table, int len, int thread, int threads)
{
    const attn_decode_call &c = p.attn;
    const int row = c.rope.dim * c.rope.bits / 8, heads = (c.group + 7) / 8,
              from = next.n > 0 ? max(0, len - next.n) : 0;
    for (int i = blockIdx.x; i < p.attn_items; i += gridDim.x) {
        const int split = i % c.splits, head = i / c.splits / heads;
        const int lo = from + (int)((int64_t)(len - from) * split / c.splits),
                  hi = min(lo + FETCH_TOKENS,
                           from + (int)((int64_t)(len - from) * (split + 1) / c.splits));
#pragma unroll 4
        for (int j = thread; j < 2 * (hi - lo) * row / 128; j += threads) {
            const int tok = lo + j / 2 * 128 / row;
            const size_t slot = (((size_t)table[tok / c.block_tokens] * c.kv_heads + head) * 2 +
                                 (j & 1)) *
                                    c.block_tokens +
                                tok % c.block_tokens;
            asm volatile("prefetch.global.L2 [%0];" ::"l"(next.data + slot * row +
                                                          (size_t)(j / 2 * 128 % row)));
        }
    }
}

template <int D, int BITS>
__device__ __forceinline__ void attention(const decode_pass &p, const decode_step &s, uint8_t *work,
                                          const float (*angles)[128], const int32_t *len,
                                          const int32_t *table)
{
    constexpr int U = BITS == 4 ? 2 : 1;
    const attn_team tm = {(int)threadIdx.x, 0};
    const attn_memory sh = attn_memory_of<D>(work, min(8, p.attn.group), angles);
    attn_decode_call c = p.attn;
    c.data = s.data, c.param = (const __half2 *)s.extra, c.window = s.n;
    c.rope.data = (uint8_t *)s.data, c.rope.param = (__half2 *)s.extra;
    c.kv_len = len, c.table = table;
    for (int i = blockIdx.x; i < p.attn_items; i += gridDim.x) {
        attn_decode_item<D, BITS, U, false, false>(tm, c, sh, (out_rows<D> *)NULL, i % c.splits,
                                                   i / c.splits, 0);
        team_sync(tm);
    }
}

__device__ __forceinline__ void copy_step(decode_step *to, const decode_step *from, int lane)
{
    if (lane < (int)sizeof *to / 4) ((uint32_t *)to)[lane] = ((const uint32_t *)from)[lane];
}

template <int D, int BITS>
__global__ void __launch_bounds__(WARPS * 32, 1)
    decode_pass_kernel(const __grid_constant__ decode_pass p)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint64_t full[MAX_STAGES], empty[MAX_STAGES];
    __shared__ tile_sums sums;
    __shared__ float part[WARPS * MAX_NORM], angles[2][128];
    __shared__ int32_t len, table[MAX_TABLE];      /* what attention asks for again and again */
    __shared__ __align__(16) decode_step steps[2]; /* this one and the next */
    __shared__ feeder f;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const weight_ring r = {memory, full, empty, p.stages};
    uint8_t *work = memory + p.stages * STAGE_BYTES; /* a row's planes, or memory of teams */
    norm_ahead a = {};
    progress g = {0, 0};
    if (threadIdx.x == PRODUCER * 32) {
        for (int i = 0; i < p.stages; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        f = feeder{-1, 0, 0, 0, 0, 0, 0, NULL};
        seek(p, &f);
        for (int i = 0; i < p.stages; i++) feed(p, r, &f);
    }
    if (threadIdx.x == 0)
        for (int i = 0; i < TURNS; i++) mbar_init(&sums.full[i], CW), mbar_init(&sums.empty[i], 1);
    if (threadIdx.x == 0 && p.attn_items) len = p.attn.kv_len[0];
    const bool near = p.attn.table_stride <= MAX_TABLE;
    for (int i = threadIdx.x; p.attn_items && near && i < p.attn.table_stride; i += WARPS * 32)
        table[i] = p.attn.table[i];
    if (p.attn_items) newest_angles(angles, p.attn.rope, p.attn.kv_len[0] - 1);
    if (warp == 0) copy_step(&steps[0], &p.steps[0], lane);
    if (warp == 0 && p.n > 1) copy_step(&steps[1], &p.steps[1], lane);
    __syncthreads();
    for (int i = 0; i < p.n; i++) {
        const decode_step &s = steps[i & 1];
        const bool end = i + 1 == p.n;
        load_norm(&a, s, warp, lane);
        if (i) step_wait(p, i);
        if (s.attn)
            attention<D, BITS>(p, s, work, angles, &len, near ? table : p.attn.table);
        else
            product(p, s, end ? NULL : &steps[(i + 1) & 1], r, &f, &g, a, work, &sums, part,
                    near ? table : p.attn.table, len, warp, lane);
        __syncthreads();
        if (threadIdx.x == 0) arrive(p, end);
        if (warp == 1 && i + 2 < p.n) copy_step(&steps[i & 1], &p.steps[i + 2], lane);
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

template <int D, int BITS>
static cudaError_t launch(decode_pass *p, int work_bytes, int sms, cudaStream_t stream)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    void *args[] = {p};
    p->stages = (SHARED_MOST - work_bytes) / STAGE_BYTES;
    if (p->stages > MAX_STAGES) p->stages = MAX_STAGES;
    const int smem = p->stages * STAGE_BYTES + work_bytes;
    const cudaError_t rc = cudaFuncSetAttribute(decode_pass_kernel<D, BITS>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (rc != cudaSuccess) return rc;
    cfg.gridDim = dim3((unsigned)sms);
    cfg.blockDim = dim3(WARPS * 32);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    attr[0].id = cudaLaunchAttributeCooperative; /* all blocks run at once, or none */
    attr[0].val.cooperative = 1;
    cfg.attrs = attr;
    cfg.numAttrs = 1;
    return cudaLaunchKernelExC(&cfg, (const void *)decode_pass_kernel<D, BITS>, args);
}

cudaError_t decode_pass_run(decode_pass *p, int head_dim, int bits, int work_bytes, int sms,
                            cudaStream_t stream)
{
#define CASE(D)                                                    \
    return bits == 16  ? launch<D, 16>(p, work_bytes, sms, stream) \
           : bits == 8 ? launch<D, 8>(p, work_bytes, sms, stream)  \
                       : launch<D, 4>(p, work_bytes, sms, stream)
    if (head_dim == 64) CASE(64);
    CASE(128);
#undef CASE
}
