/* W4A16 for few rows: every weight is read once, at the speed of memory.
 *
 * A warp owns `RT` tiles of 16 outputs and a run of k; eight warps of a block split k further, and a cluster
 * of blocks splits it again, so that every multiprocessor has bytes in flight whatever the shape. Partial
 * sums meet in shared memory, then through the cluster's distributed shared memory, always in the same
 * order. Weights are requested before the dependency wait: they belong to no earlier kernel. */
#include <cooperative_groups.h>

#include "gemm_w4.cuh"

namespace cg = cooperative_groups;

#define WARPS 8
#define STEP_CHUNKS 2 /* a pipeline step is 128 inputs */

/* 8 codes of one row pair to 4 half2 in fragment order, exactly (q - zero): 1024 + q sits in the low
 * nibbles, 1024 + 16 q in the high ones, and both differences are exact in f16. */
struct zero_consts {
    __half2 low[2], high[2]; /* [row g, row g + 8]: 1024 + z, -(64 + z) */
};

__device__ __forceinline__ void zero_prepare(zero_consts *z, uint2 p)
{
    const __half2 r[2] = {*(__half2 *)&p.x, *(__half2 *)&p.y};
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const __half2 zz = __half2half2(__high2half(r[i]));
        z->low[i] = __hadd2(__float2half2_rn(1024.f), zz);
        z->high[i] = __hneg2(__hadd2(__float2half2_rn(64.f), zz));
    }
}

__device__ __forceinline__ void unpack8(uint32_t a[4], uint32_t q, const zero_consts *z)
{
    const uint32_t lo = 0x000f000fu, hi = 0x00f000f0u, ex = 0x64006400u;
    const __half2 sixteenth = __float2half2_rn(0.0625f);
    uint32_t v;
    /* Register i holds row g for even i, g + 8 for odd: i = 0, 2 are low nibbles, 1, 3 high ones. */
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "r"(lo), "r"(ex));
    *(__half2 *)&a[0] = __hsub2(*(__half2 *)&v, z->low[0]);
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "r"(hi), "r"(ex));
    *(__half2 *)&a[1] = __hfma2(*(__half2 *)&v, sixteenth, z->high[1]);
    q >>= 8;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "r"(lo), "r"(ex));
    *(__half2 *)&a[2] = __hsub2(*(__half2 *)&v, z->low[0]);
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(v) : "r"(q), "r"(hi), "r"(ex));
    *(__half2 *)&a[3] = __hfma2(*(__half2 *)&v, sixteenth, z->high[1]);
}

/* One step of weights of one tile in registers. */
struct step_regs {
    uint4 q[STEP_CHUNKS];
    uint2 p[4]; /* params of the groups of the step: 1, 2 or 4 */
};

template <int GROUP>
__device__ __forceinline__ void load_step(step_regs *r, const w4_tiles &w, int tile, int step, int lane)
{
    const int groups_step = 128 / GROUP, groups = w.k / GROUP;
    const uint4 *q = w.q + ((size_t)tile * w.chunks + (size_t)step * STEP_CHUNKS) * 32 + lane;
    const bool second = step * STEP_CHUNKS + 1 < w.chunks;
    r->q[0] = load_once16(q);
    r->q[1] = second ? load_once16(q + 32) : make_uint4(0, 0, 0, 0);
    const uint2 *p = w.params + ((size_t)tile * groups + (size_t)step * groups_step) * 8 + (lane >> 2);
#pragma unroll
    for (int i = 0; i < groups_step; i++)
        r->p[i] = step * groups_step + i < groups ? __ldg(p + i * 8) : make_uint2(0, 0);
}

/* Activations of half a chunk for the 8 columns of an mma: 8 values from k0 + 8 t of row `row`. */
__device__ __forceinline__ uint4 load_x(const w4_call &c, int k, int row, int k0, int t)
{
    const int at = k0 + 8 * t;
    if (row >= c.m || at >= k) return make_uint4(0, 0, 0, 0);
    return *(const uint4 *)(c.x + (size_t)row * c.ldx + at);
}

/* Multiplies a step of RT tiles into acc. */
template <int RT, int NB, int GROUP>
__device__ __forceinline__ void mul_step(float acc[RT][NB][4], const step_regs r[RT], const w4_tiles &w,
                                         const w4_call &c, int step, int g, int t)
{
    float part[RT][NB][4];
#pragma unroll
    for (int h = 0; h < 4; h++) { /* four halves of 32 inputs */
        uint4 x[NB];
#pragma unroll
        for (int b = 0; b < NB; b++) x[b] = load_x(c, w.k, b * 8 + g, step * 128 + h * 32, t);
#pragma unroll
        for (int i = 0; i < RT; i++) {
            const uint2 p = r[i].p[h * 32 / GROUP];
            zero_consts z;
            zero_prepare(&z, p);
            if (h * 32 % GROUP == 0)
#pragma unroll
                for (int b = 0; b < NB; b++)
#pragma unroll
                    for (int j = 0; j < 4; j++) part[i][b][j] = 0.f;
            const uint32_t *q = (const uint32_t *)&r[i].q[h / 2] + (h & 1) * 2;
#pragma unroll
            for (int s = 0; s < 2; s++) {
                uint32_t a[4];
                unpack8(a, q[s], &z);
#pragma unroll
                for (int b = 0; b < NB; b++)
                    mma_16816(part[i][b], a, s ? x[b].z : x[b].x, s ? x[b].w : x[b].y);
            }
            if ((h * 32 + 32) % GROUP == 0) {
                const float s0 = __low2float(*(const __half2 *)&p.x);
                const float s1 = __low2float(*(const __half2 *)&p.y);
#pragma unroll
                for (int b = 0; b < NB; b++) {
                    acc[i][b][0] += s0 * part[i][b][0];
                    acc[i][b][1] += s0 * part[i][b][1];
                    acc[i][b][2] += s1 * part[i][b][2];
                    acc[i][b][3] += s1 * part[i][b][3];
                }
            }
        }
    }
}

/* Writes one output (or a gate/up pair) of token `col`. */
__device__ __forceinline__ void store_out(const w4_tiles &w, const w4_call &c, int tile, int row, int col,
                                          float v, float up)
{
    if (col >= c.m) return;
    if (w.glu) {
        const int o = tile * 8 + row;
        if (o >= w.n / 2) return;
        const float s = v / (1.f + __expf(-v)) * up;
        ((__half *)c.y)[(size_t)col * c.ldy + o] = __float2half_rn(s);
        return;
    }
    const int o = tile * 16 + row;
    if (o >= w.n) return;
    if (w.bias) v += __half2float(w.bias[o]);
    if (c.add)
        ((float *)c.y)[(size_t)col * c.ldy + o] += v;
    else
        ((__half *)c.y)[(size_t)col * c.ldy + o] = __float2half_rn(v);
}

/* NT tile groups a block (each of RT tiles), KW = WARPS / NT slices of k in the block. */
template <int RT, int NT, int NB, int GROUP, int DEPTH>
__global__ void __launch_bounds__(WARPS * 32) gemm_w4_small_kernel(w4_tiles w, w4_call c)
{
    constexpr int KW = WARPS / NT, ROWS = RT * NT * 16, COLS = NB * 8;
    __shared__ float sum[WARPS][RT * 16 * COLS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int nt = warp % NT, kw = warp / NT;
#if __CUDA_ARCH__ >= 900
    cg::cluster_group cluster = cg::this_cluster();
    const int rank = (int)cluster.block_rank(), ranks = (int)cluster.num_blocks();
#else
    const int rank = 0, ranks = 1;
#endif
    const int block = blockIdx.x / ranks;
    const int tile0 = (block * NT + nt) * RT;
    const int steps = (w.chunks + STEP_CHUNKS - 1) / STEP_CHUNKS;
    const int slices = ranks * KW, slice = rank * KW + kw;
    const int from = (int)((int64_t)steps * slice / slices), to = (int)((int64_t)steps * (slice + 1) / slices);

    step_regs ring[DEPTH][RT];
    float acc[RT][NB][4] = {};
#pragma unroll
    for (int d = 0; d < DEPTH; d++)
        if (from + d < to)
#pragma unroll
            for (int i = 0; i < RT; i++)
                load_step<GROUP>(&ring[d][i], w, min(tile0 + i, w.tiles - 1), from + d, lane);
    pdl_wait();
    pdl_launch();
    for (int s0 = from; s0 < to; s0 += DEPTH) {
#pragma unroll
        for (int d = 0; d < DEPTH; d++) {
            const int s = s0 + d;
            if (s >= to) break;
            mul_step<RT, NB, GROUP>(acc, ring[d], w, c, s, g, t);
            if (s + DEPTH < to)
#pragma unroll
                for (int i = 0; i < RT; i++)
                    load_step<GROUP>(&ring[d][i], w, min(tile0 + i, w.tiles - 1), s + DEPTH, lane);
        }
    }
    /* Fragment order in shared memory: [i][b][j][lane], conflict free. */
#pragma unroll
    for (int i = 0; i < RT; i++)
#pragma unroll
        for (int b = 0; b < NB; b++)
#pragma unroll
            for (int j = 0; j < 4; j++) sum[warp][((i * NB + b) * 4 + j) * 32 + lane] = acc[i][b][j];
#if __CUDA_ARCH__ >= 900
    if (ranks > 1)
        cluster.sync();
    else
#endif
        __syncthreads();
    /* Every rank finishes its share of the block's outputs: pairs (row g, row g + 8) of one column. */
    const int pairs = ROWS * COLS / 2;
    for (int p = rank * WARPS * 32 + (int)threadIdx.x; p < pairs; p += ranks * WARPS * 32) {
        const int l = p & 31, j = p >> 5 & 1, rest = p >> 6, b = rest % NB, i = rest / NB % RT, n = rest / NB / RT;
        const int at = ((i * NB + b) * 4 + j) * 32 + l;
        float v0 = 0.f, v1 = 0.f;
        for (int r = 0; r < ranks; r++) {
#if __CUDA_ARCH__ >= 900
            const float *s = ranks > 1 ? cluster.map_shared_rank(&sum[0][0], r) : &sum[0][0];
#else
            const float *s = &sum[0][0];
#endif
#pragma unroll
            for (int k = 0; k < KW; k++) {
                const float *q = s + (size_t)(k * NT + n) * (RT * 16 * COLS) + at;
                v0 += q[0];
                v1 += q[64];
            }
        }
        const int tile = (block * NT + n) * RT + i, row = l >> 2, col = b * 8 + 2 * (l & 3) + j;
        if (tile >= w.tiles) continue;
        if (w.glu)
            store_out(w, c, tile, row, col, v0, v1);
        else {
            store_out(w, c, tile, row, col, v0, 0.f);
            store_out(w, c, tile, row + 8, col, v1, 0.f);
        }
    }
#if __CUDA_ARCH__ >= 900
    if (ranks > 1) cluster.sync(); /* nobody leaves while its sums are read */
#endif
}

template <int RT, int NT, int NB, int GROUP, int DEPTH>
static cudaError_t launch_small(const w4_tiles *w, const w4_call *c, int ranks, cudaStream_t stream, bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[2];
    const int blocks = (w->tiles + RT * NT - 1) / (RT * NT);
    cfg.gridDim = dim3((unsigned)(blocks * ranks));
    cfg.blockDim = dim3(WARPS * 32);
    cfg.stream = stream;
    cfg.attrs = attr;
    if (ranks > 1) {
        attr[cfg.numAttrs].id = cudaLaunchAttributeClusterDimension;
        attr[cfg.numAttrs].val.clusterDim.x = (unsigned)ranks;
        attr[cfg.numAttrs].val.clusterDim.y = attr[cfg.numAttrs].val.clusterDim.z = 1;
        cfg.numAttrs++;
    }
    if (pdl) {
        attr[cfg.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[cfg.numAttrs].val.programmaticStreamSerializationAllowed = 1;
        cfg.numAttrs++;
    }
    return cudaLaunchKernelEx(&cfg, gemm_w4_small_kernel<RT, NT, NB, GROUP, DEPTH>, *w, *c);
}
