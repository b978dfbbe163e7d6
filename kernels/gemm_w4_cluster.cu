/* W4A16 for 17 to 64 rows on sm_90a: tiles of 128 outputs by two warpgroups, f16 fragments in
 * registers as in gemm_w4_wgmma.cu. The blocks of a cluster share a tile, each with a part of k;
 * their sums meet in each other's shared memory, where each finishes a share of the tile, parts
 * added in the order of k. Two blocks fit on a multiprocessor, so that those of the next product
 * fetch their weights, which they may before the dependency wait, while this one ends. */
#include "kernels/gemm_w4.cuh"
#include "kernels/gemm_w4_f16.cuh"

#define TILE_16S 8               /* tiles of 16 outputs of a block, one a warp */
#define WORKERS  (TILE_16S * 32) /* threads that multiply; a warp more fills the ring */
#define THREADS  (WORKERS + 32)
#define BLOCKS   2
#define PARTS    8 /* blocks of a cluster, at most */

/* XS units of activations and WS of weights in the ring. */
template <int NT, int GROUP> struct c_shape {
    static constexpr int UNIT = 1024 + 64 * (128 / GROUP), CODES = TILE_16S * UNIT, X = NT * 256,
                         XS = NT == 64 ? 3 : 4,
                         FIT = ((228 << 10) / BLOCKS - 4096 - XS * X) / CODES,
                         WS = FIT < 10 ? FIT : 10, SMEM = 1024 + XS * X + WS * CODES;
    static_assert(WS >= 3 && WS * CODES >= NT * 512, "sums take the place of codes");
    static_assert(SMEM + 1024 + 512 <= (228 << 10) / BLOCKS, "two blocks a multiprocessor");
};

#ifdef TMF_SM90A

template <int NT, int GROUP> struct c_bars {
    typedef c_shape<NT, GROUP> S;
    uint64_t full_w[S::WS], empty_w[S::WS], full_x[S::XS], empty_x[S::XS];
};

/* What a block does: units [from, from + n) of a tile, part `part` of its k. */
template <int NT, int GROUP> struct c_block {
    const CUtensorMap *codes, *x;
    uint8_t *ring, *tokens; /* shared */
    c_bars<NT, GROUP> *bars;
    int tile, part, parts, from, n, warp, lane;
};

__device__ __forceinline__ void c_cluster_arrive()
{
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}
__device__ __forceinline__ void c_cluster_wait()
{
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
/* Nobody leaves while its sums are needed. */
__device__ __forceinline__ void c_cluster_leave()
{
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}
/* 16 bytes at a shared address as block `rank` of the cluster has it. */
__device__ __forceinline__ float4 c_cluster_load(uint32_t at, int rank)
{
    uint32_t there;
    float4 v;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(at), "r"(rank));
    asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "r"(there)
                 : "memory");
    return v;
}

/* ---- the ring, by one thread ---- */

template <int NT, int GROUP>
__device__ __forceinline__ void c_load_codes(const c_block<NT, GROUP> &b, int i)
{
    typedef c_shape<NT, GROUP> S;
    uint64_t *full = &b.bars->full_w[i % S::WS];
    mbar_expect(full, S::CODES);
    tensor_copy_once(b.ring + i % S::WS * S::CODES, b.codes, (b.from + i) * (S::UNIT / 8),
                     b.tile * TILE_16S, full);
}
template <int NT, int GROUP>
__device__ __forceinline__ void c_load_tokens(const c_block<NT, GROUP> &b, int i)
{
    typedef c_shape<NT, GROUP> S;
    uint64_t *full = &b.bars->full_x[i % S::XS];
    uint8_t *to = b.tokens + i % S::XS * S::X;
    mbar_expect(full, S::X);
    tensor_copy(to, b.x, (b.from + i) * 128, 0, full);
    tensor_copy(to + NT * 128, b.x, (b.from + i) * 128 + 64, 0, full);
}

/* Barriers, and weights as far as the ring goes. */
template <int NT, int GROUP> __device__ __forceinline__ void c_begin(const c_block<NT, GROUP> &b)
{
    typedef c_shape<NT, GROUP> S;
    for (int i = 0; i < S::WS; i++)
        mbar_init(&b.bars->full_w[i], 1), mbar_init(&b.bars->empty_w[i], TILE_16S);
    for (int i = 0; i < S::XS; i++)
        mbar_init(&b.bars->full_x[i], 1), mbar_init(&b.bars->empty_x[i], TILE_16S);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#pragma unroll 1
    for (int i = 0; i < min(b.n, S::WS); i++) c_load_codes(b, i);
}

template <int NT, int GROUP> __device__ __forceinline__ void c_go_on(const c_block<NT, GROUP> &b)
{
    typedef c_shape<NT, GROUP> S;
    pdl_wait();
#pragma unroll 1
    for (int i = 0; i < min(b.n, S::XS); i++) c_load_tokens(b, i);
#pragma unroll 1
    for (int i = 0; i < b.n; i++) { /* when unit i is done with, its slots take what comes next */
        if (i + S::XS < b.n) {
            mbar_wait(&b.bars->empty_x[i % S::XS], i / S::XS & 1);
            c_load_tokens(b, i + S::XS);
        }
        if (i + S::WS < b.n) {
            mbar_wait(&b.bars->empty_w[i % S::WS], i / S::WS & 1);
            c_load_codes(b, i + S::WS);
        }
    }
}

/* ---- multiplying ---- */

/* Four products of 16 inputs are queued at once; the fragments of the next four are made meanwhile.
 */
template <int NT, int GROUP>
__device__ __forceinline__ void c_multiply(float (&acc)[NT / 2], const c_block<NT, GROUP> &b)
{
    typedef c_shape<NT, GROUP> S;
    uint32_t a[2][4][4];
    w_param param;
    int ws = 0, wr = 0, xs = 0, xr = 0, last_w = 0, last_x = 0;
    const uint32_t unit_at = smem_addr(b.ring) + b.warp * S::UNIT, mine = unit_at + b.lane * 16,
                   params = unit_at + 1024 + (b.lane >> 2) * 8;
#pragma unroll
    for (int j = 0; j < NT / 2; j++) acc[j] = 0.f;
    mbar_wait(&b.bars->full_w[0], 0);
    param = param_of(shared_load8(params));
    make_four<GROUP>(a[0], &param, shared_load16(mine), params);
    pdl_wait();
    for (int u = 0; u < b.n; u++) {
        const uint64_t x = w_rows128(b.tokens + xs * S::X);
        const int here_w = ws, here_x = xs;
        mbar_wait(&b.bars->full_x[xs], xr & 1);
        if (++xs == S::XS) xs = 0, ++xr;
#pragma unroll
        for (int p = 0; p < 2; p++) {
            w_fence();
#pragma unroll
            for (int i = 0; i < 4; i++)
                w_rs<NT>::mma(acc, a[p][i], x + ((p * NT * 128 + i * 32) >> 4));
            w_commit();
            if (p == 1 && u + 1 < b.n) {
                if (++ws == S::WS) ws = 0, ++wr;
                mbar_wait(&b.bars->full_w[ws], wr & 1);
            }
            const uint32_t at = ws * S::CODES;
            const uint4 q = shared_load16(mine + at + (p ? 0 : 512));
            if (p == 1 && GROUP == 128) param = param_of(shared_load8(params + at));
            w_wait<1>();
            if (p == 0 && u > 0 && b.lane == 0)
                mbar_arrive(&b.bars->empty_w[last_w]), mbar_arrive(&b.bars->empty_x[last_x]);
            make_four<GROUP>(a[p ^ 1], &param, q, params + at + (p ? 0 : 64 / GROUP * 64));
        }
        last_w = here_w, last_x = here_x;
    }
    w_wait<0>();
    w_keep(acc);
}

/* ---- outputs ---- */

enum { C_F16, C_F16_ADD, C_F32, C_F32_ADD };
template <int KIND> __device__ __forceinline__ void c_put(const w4_wide_call &c, size_t at, float v)
{
    if (KIND == C_F32)
        ((float *)c.y)[at] = v;
    else if (KIND == C_F32_ADD)
        atomicAdd((float *)c.y + at, v); /* nobody else has this one: no need to wait for it */
    else
        ((__half *)c.y)[at] = __float2half_rn(
            KIND == C_F16_ADD ? v + __half2float(((__half *)c.y)[at]) : v);
}
__device__ __forceinline__ void c_put_any(const w4_wide_call &c, size_t at, float v)
{
    if (c.wide && c.add)
        c_put<C_F32_ADD>(c, at, v);
    else if (c.wide)
        c_put<C_F32>(c, at, v);
    else if (c.add)
        c_put<C_F16_ADD>(c, at, v);
    else
        c_put<C_F16>(c, at, v);
}

/* Rows g and g + 8 of a tile of 16, tokens token and token + 1: v is (g, token), (g, token + 1), (g
 * + 8, token), (g + 8, token + 1). */
__device__ __forceinline__ void c_finish(const w4_tiles &w, const w4_wide_call &c, int tile,
                                         int token, float4 v, int lane)
{
    const int g = lane >> 2, r0 = w4_row(w.n, w.paired, tile, g),
              r1 = w4_row(w.n, w.paired, tile, g + 8);
    if (tile >= w.tiles) return;
    if (w.bias) {
        const float b0 = r0 < w.n ? __half2float(w.bias[r0]) : 0.f,
                    b1 = r1 < w.n ? __half2float(w.bias[r1]) : 0.f;
        v.x += b0, v.y += b0, v.z += b1, v.w += b1;
    }
#pragma unroll
    for (int i = 0; i < 2; i++, token++) {
        const float v0 = i ? v.y : v.x, v1 = i ? v.w : v.z;
        const size_t at = (size_t)token * c.ldy;
        if (token >= c.m) return;
        if (c.glu) {
            c_put<C_F16>(c, at + tile * 8 + g, w4_gated(v0, v1));
            continue;
        }
        if (r0 < w.n) c_put_any(c, at + r0, v0);
        if (r1 < w.n) c_put_any(c, at + r1, v1);
    }
}

/* The blocks of a tile leave their sums where their codes were; each adds and finishes a share.
 * Pieces of 16 bytes: piece j * WORKERS + t are sums 4j.. of thread t. */
template <int NT, int GROUP>
__device__ __forceinline__ void c_meet(const float (&acc)[NT / 2], const c_block<NT, GROUP> &b,
                                       const w4_tiles &w, const w4_wide_call &c)
{
    constexpr int PIECES = NT / 8 * WORKERS;
    const int begin = b.part * PIECES / b.parts, end = (b.part + 1) * PIECES / b.parts;
    float4 *own = (float4 *)b.ring + threadIdx.x;
    bar_sync<1, WORKERS>(); /* codes are done with */
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
        own[j * WORKERS] = make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]);
    c_cluster_arrive();
    c_cluster_wait();
#pragma unroll 1
    for (int i = begin + (int)threadIdx.x; i < end; i += WORKERS) {
        float4 f[PARTS], v = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int r = 0; r < PARTS; r++)
            f[r] = r < b.parts ? c_cluster_load(smem_addr(b.ring) + i * 16, r) : v;
#pragma unroll
        for (int r = 0; r < PARTS; r++) v.x += f[r].x, v.y += f[r].y, v.z += f[r].z, v.w += f[r].w;
        const int t = i % WORKERS;
        c_finish(w, c, b.tile * TILE_16S + (t >> 5), i / WORKERS * 8 + 2 * (t & 3), v, t & 31);
    }
    __syncwarp();
    c_cluster_leave();
}

#endif

template <int NT, int GROUP>
__global__ void __launch_bounds__(THREADS, BLOCKS)
    gemm_w4_cluster_kernel(const __grid_constant__ CUtensorMap codes,
                           const __grid_constant__ CUtensorMap x, w4_tiles w, w4_wide_call c,
                           int parts)
{
#ifdef TMF_SM90A
    typedef c_shape<NT, GROUP> S;
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ c_bars<NT, GROUP> bars;
    c_block<NT, GROUP> b;
    b.codes = &codes, b.x = &x, b.bars = &bars;
    /* The same place in all blocks of a cluster, as is where dynamic memory begins. */
    b.tokens = memory + (-(int)smem_addr(memory) & 1023), b.ring = b.tokens + S::XS * S::X;
    b.warp = (int)threadIdx.x >> 5, b.lane = (int)threadIdx.x & 31;
    b.tile = (int)blockIdx.x / parts, b.part = (int)blockIdx.x % parts, b.parts = parts;
    b.from = b.part * w.units / parts;
    b.n = (b.part + 1) * w.units / parts - b.from;
    pdl_launch();
    if (threadIdx.x == WORKERS) c_begin(b);
    __syncthreads();
    if (threadIdx.x >= WORKERS) {
        if (threadIdx.x == WORKERS) c_go_on(b);
        __syncwarp();
        if (parts > 1) {
            c_cluster_arrive();
            c_cluster_wait();
            c_cluster_leave();
        }
        return;
    }
    float acc[NT / 2];
    c_multiply<NT, GROUP>(acc, b);
    __syncwarp();
    if (parts > 1) {
        c_meet<NT, GROUP>(acc, b, w, c);
        return;
    }
#pragma unroll
    for (int j = 0; j < NT / 8; j++)
        c_finish(w, c, b.tile * TILE_16S + b.warp, j * 8 + 2 * (b.lane & 3),
                 make_float4(acc[4 * j], acc[4 * j + 1], acc[4 * j + 2], acc[4 * j + 3]), b.lane);
#endif
}

/* ---- host ---- */

/* Blocks of a cluster, by what was measured: one wave of blocks, as wide as it may be. Clusters of
 * more than two reach fewer multiprocessors, and a wave begun costs them a whole one. A tile costs
 * as much as 4 units more, another 4 where blocks meet. */
static int c_parts(const w4_tiles *w, int sms)
{
    static const int some[] = {1, 2, 3, 4, 6, 8};
    const int tiles = (w->tiles + TILE_16S - 1) / TILE_16S;
    int best = 1;
    float least = 1e30f;
    for (int i = 0; i < 6; i++) {
        const int p = some[i];
        const float slots = (float)BLOCKS * (float)sms * (p > 2 ? 0.91f : 1.f),
                    fill = (float)(tiles * p) / slots,
                    waves = fill <= 1.f ? 1.f
                            : p > 2     ? ceilf(fill)
                                        : fill,
                    cost = waves * (float)((w->units + p - 1) / p + (p > 1 ? 8 : 4));
        if (p <= w->units && cost < least) best = p, least = cost;
    }
    return best;
}

template <int NT, int GROUP>
static cudaError_t c_launch(const w4_tiles *w, const w4_wide_call *c, int parts,
                            cudaStream_t stream)
{
    typedef c_shape<NT, GROUP> S;
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[2];
    CUtensorMap codes, x;
    cudaError_t rc = matrix_map(&x, c->x, w->k, c->m, c->ldx, NT);
    if (rc == cudaSuccess)
        rc = bytes_map(&codes, w->data, (int64_t)w->units * S::UNIT, w->tiles, S::UNIT, TILE_16S);
    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(gemm_w4_cluster_kernel<NT, GROUP>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, S::SMEM);
    if (rc != cudaSuccess) return rc;
    cfg.gridDim = dim3((unsigned)((w->tiles + TILE_16S - 1) / TILE_16S * parts));
    cfg.blockDim = dim3(THREADS);
    cfg.dynamicSmemBytes = S::SMEM;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    attr[1].id = cudaLaunchAttributeClusterDimension;
    attr[1].val.clusterDim.x = (unsigned)parts;
    attr[1].val.clusterDim.y = attr[1].val.clusterDim.z = 1;
    cfg.numAttrs = parts > 1 ? 2 : 1;
    return cudaLaunchKernelEx(&cfg, gemm_w4_cluster_kernel<NT, GROUP>, codes, x, *w, *c, parts);
}

template <int GROUP>
static cudaError_t c_group(const w4_tiles *w, const w4_wide_call *c, int parts, cudaStream_t s)
{
    if (c->m <= 32) return c_launch<32, GROUP>(w, c, parts, s);
    return c_launch<64, GROUP>(w, c, parts, s);
}

cudaError_t gemm_w4_cluster(const w4_tiles *w, const w4_wide_call *c, int sms, cudaStream_t stream)
{
    const int parts = c_parts(w, sms);
    if (w->group == 128) return c_group<128>(w, c, parts, stream);
    if (w->group == 64) return c_group<64>(w, c, parts, stream);
    return c_group<32>(w, c, parts, stream);
}
