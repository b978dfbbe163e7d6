/* Attention of many query rows over a 16-bit cache by wgmma, on sm_90a: blocks of 128 query rows of
 * one head walk the cache in tiles of 128 tokens. A producer warp brings tiles by tensor copies
 * from the paged cache; two warpgroups of 64 rows keep queries and probabilities in registers. The
 * scores of the next tile and the sums of the last are worked on while a softmax is. */
#include "kernels/attn_prefill.cuh"
#include "kernels/wgmma.cuh"

#define ROWS   128
#define TOK    128
#define STAGES 2
#define GROUPS 2 /* warpgroups of 64 rows */

#ifdef TMF_SM90A

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

/* What a block works on: query rows [row0, row0 + ROWS) of a sequence, tokens from..last. */
typedef struct {
    int seq, head, sub, first, rows, row0, base, from, last;
} a_block;

__device__ __forceinline__ a_block block_of(const attn_prefill_call &c)
{
    a_block b;
    b.seq = blockIdx.z, b.head = blockIdx.y / c.group, b.sub = blockIdx.y % c.group;
    b.first = c.seq_start[b.seq], b.rows = c.seq_start[b.seq + 1] - b.first;
    /* Late rows see the most tokens: they start first. */
    b.row0 = ((int)gridDim.x - 1 - (int)blockIdx.x) * ROWS;
    b.base = b.row0 < b.rows ? c.pos[b.first] : 0; /* positions of a sequence follow each other */
    b.last = b.base + min(b.row0 + ROWS, b.rows) - 1;
    b.from = c.window > 0 ? max(0, b.base + b.row0 - c.window + 1) / TOK * TOK : 0;
    return b;
}

typedef struct {
    uint8_t *k, *v; /* [STAGES][D / 64][TOK][128 bytes] */
    uint64_t *k_full, *k_empty, *v_full, *v_empty;
} a_ring;

/* One warp: each lane finds a box of 32 or 64 tokens, the first one asks for all. */
template <int D>
__device__ __forceinline__ void produce(const attn_prefill_call &c, const a_block &b,
                                        const CUtensorMap *map, const a_ring &r, int box, int lane)
{
    constexpr int HALF = TOK * 128, TILE = D / 64 * HALF;
    const int boxes = TOK / box, part = lane / boxes, at = lane % boxes;
    const int32_t *table = c.table + (size_t)b.seq * c.table_stride;
    int slot = 0, round = 0;
    for (int tok = b.from; tok <= b.last; tok += TOK) {
        const int t = min(tok + at * box, b.last / box * box);
        const int row = ((table[t / c.block_tokens] * c.kv_heads + b.head) * 2 + (part & 1)) *
                            c.block_tokens +
                        t % c.block_tokens;
        for (int i = 0; i < 2; i++) {
            uint64_t *full = i ? r.v_full : r.k_full, *empty = i ? r.v_empty : r.k_empty;
            uint8_t *tile = (i ? r.v : r.k) + slot * TILE;
            if (round) mbar_wait(&empty[slot], (round - 1) & 1);
            if (lane == 0) mbar_expect(&full[slot], TILE);
            for (int n = 0; n < boxes; n++) {
                const int from = __shfl_sync(~0u, row, i * boxes + n);
                if (lane == 0)
#pragma unroll
                    for (int half = 0; half < D / 64; half++)
                        tensor_copy(tile + half * HALF + n * box * 128, map, half * 64, from,
                                    &full[slot]);
            }
        }
        if (++slot == STAGES) slot = 0, round++;
    }
}

/* Rows g and g + 8 of a warp's 16: unscaled maximum, sum of this lane's columns. */
typedef struct {
    float top[2], sum[2];
} a_rows;

/* Query fragments of a warp's 16 rows; rows past the end repeat the last. */
template <int D>
__device__ __forceinline__ void load_q(uint32_t (&q)[D / 16][4], const attn_prefill_call &c,
                                       const a_block &b, int row, int lane)
{
    const int g = lane >> 2, t = lane & 3;
    const __half *at[2];
#pragma unroll
    for (int i = 0; i < 2; i++)
        at[i] = c.q + (int64_t)(b.first + min(row + g + 8 * i, b.rows - 1)) * c.q_row +
                b.head * c.q_head + b.sub * c.q_sub + 2 * t;
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
            q[i][j] = *(const uint32_t *)(at[j & 1] + i * 16 + (j >> 1) * 8);
}

template <int D>
__device__ __forceinline__ void scores(float (&s)[TOK / 2], const uint32_t (&q)[D / 16][4],
                                       const uint8_t *k)
{
    w_fence();
    w_rs<TOK>::template mma<false>(s, q[0], w_rows128(k));
#pragma unroll
    for (int i = 1; i < D / 16; i++)
        w_rs<TOK>::mma(s, q[i], w_rows128(k + i / 4 * TOK * 128 + i % 4 * 32));
    w_commit();
}

template <int D>
__device__ __forceinline__ void weigh(float (&o)[D / 2], const uint32_t (&p)[TOK / 16][4],
                                      const uint8_t *v)
{
    w_fence();
#pragma unroll
    for (int i = 0; i < TOK / 16; i++)
        w_rs<D>::template mma<true, true>(o, p[i], w_columns64(v + i * 16 * 128, TOK * 128));
    w_commit();
}

/* Scores to probabilities in place; returns in fix what earlier sums are worth now. at: the tile's
 * first token, p0: position of row g. */
__device__ __forceinline__ void softmax(float (&s)[TOK / 2], a_rows *rows, float fix[2],
                                        float scale, int at, int p0, int window, bool masked,
                                        int lane)
{
    const int t = lane & 3;
    if (masked)
#pragma unroll
        for (int i = 0; i < TOK / 2; i++) {
            const int tok = at + i / 4 * 8 + 2 * t + (i & 1), p = p0 + (i >> 1 & 1) * 8;
            if (tok > p || (window && tok <= p - window)) s[i] = -INFINITY;
        }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float now = rows->top[h];
#pragma unroll
        for (int i = 0; i < TOK / 8; i++)
            now = fmaxf(now, fmaxf(s[4 * i + 2 * h], s[4 * i + 2 * h + 1]));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        const float base = now == -INFINITY ? 0.f : now * scale;
        fix[h] = exp2_fast(rows->top[h] * scale - base);
        rows->top[h] = now;
        float sum = 0.f;
#pragma unroll
        for (int i = 0; i < TOK / 8; i++)
#pragma unroll
            for (int e = 0; e < 2; e++) {
                const int at_s = 4 * i + 2 * h + e;
                s[at_s] = exp2_fast(s[at_s] * scale - base);
                sum += s[at_s];
            }
        rows->sum[h] = rows->sum[h] * fix[h] + sum;
    }
}

__device__ __forceinline__ void to_half(uint32_t (&p)[TOK / 16][4], const float (&s)[TOK / 2])
{
#pragma unroll
    for (int i = 0; i < TOK / 16; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const __half2 h = __floats2half2_rn(s[8 * i + 2 * j], s[8 * i + 2 * j + 1]);
            p[i][j] = *(const uint32_t *)&h;
        }
}

template <int D>
__device__ __forceinline__ void store_rows(const attn_prefill_call &c, const a_block &b,
                                           const float (&o)[D / 2], const a_rows &rows, int row,
                                           int lane)
{
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = rows.sum[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int r = row + (lane >> 2) + 8 * h;
        if (r >= b.rows) continue;
        __half *y = c.y + (int64_t)(b.first + r) * c.y_row +
                    ((int64_t)b.head * c.group + b.sub) * D + 2 * (lane & 3);
        const float inv = 1.f / sum;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(__half2 *)(y + i * 8) = __floats2half2_rn(o[4 * i + 2 * h] * inv,
                                                        o[4 * i + 2 * h + 1] * inv);
    }
}

template <int D>
__device__ __forceinline__ void consume(const attn_prefill_call &c, const a_block &b,
                                        const a_ring &r)
{
    constexpr int TILE = D / 64 * TOK * 128;
    const int lane = threadIdx.x & 31, row = b.row0 + ((int)threadIdx.x >> 5) * 16,
              p0 = b.base + row + (lane >> 2), top_row = b.base + row / 64 * 64,
              last = min(b.last, top_row + 63);
    const float scale = c.scale * 1.44269504f;
    uint32_t q[D / 16][4], p[TOK / 16][4];
    float s[TOK / 2], o[D / 2], fix[2];
    a_rows rows = {{-INFINITY, -INFINITY}, {0.f, 0.f}};
    load_q<D>(q, c, b, row, lane);
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] = 0.f;
#pragma unroll
    for (int i = 0; i < TOK / 2; i++) s[i] = 0.f;
    int slot = 0, round = 0, at = b.from;
    mbar_wait(&r.k_full[0], 0);
    scores<D>(s, q, r.k);
    w_wait<0>();
    w_keep(s);
    if (lane == 0) mbar_arrive(&r.k_empty[0]);
    softmax(s, &rows, fix, scale, at, p0, c.window, at + TOK - 1 > top_row || c.window, lane);
    to_half(p, s);
    for (; at + TOK <= last; at += TOK) {
        const int now = slot, phase = round & 1, next = at + TOK;
        if (++slot == STAGES) slot = 0, round++;
        mbar_wait(&r.k_full[slot], round & 1);
        scores<D>(s, q, r.k + slot * TILE);
        mbar_wait(&r.v_full[now], phase);
        weigh<D>(o, p, r.v + now * TILE);
        w_wait<1>();
        w_keep(s);
        if (lane == 0) mbar_arrive(&r.k_empty[slot]);
        softmax(s, &rows, fix, scale, next, p0, c.window,
                next + TOK - 1 > top_row || (c.window && next <= top_row + 63 - c.window), lane);
        w_wait<0>();
        w_keep(o);
        if (lane == 0) mbar_arrive(&r.v_empty[now]);
#pragma unroll
        for (int i = 0; i < D / 2; i++) o[i] *= fix[i >> 1 & 1];
        to_half(p, s);
    }
    mbar_wait(&r.v_full[slot], round & 1);
    weigh<D>(o, p, r.v + slot * TILE);
    w_wait<0>();
    w_keep(o);
    store_rows<D>(c, b, o, rows, row, lane);
}

#endif

template <int D>
__global__ void __launch_bounds__(GROUPS * 128 + 128, 1)
    attn_wgmma_kernel(const __grid_constant__ CUtensorMap map, attn_prefill_call c, int box)
{
#ifdef TMF_SM90A
    constexpr int TILE = D / 64 * TOK * 128;
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint64_t bars[4][STAGES];
    uint8_t *tiles = (uint8_t *)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023);
    const a_ring r = {tiles, tiles + STAGES * TILE, bars[0], bars[1], bars[2], bars[3]};
    pdl_launch();
    if (threadIdx.x == GROUPS * 128) tensor_ahead(&map);
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            mbar_init(&r.k_full[i], 1), mbar_init(&r.k_empty[i], GROUPS * 4);
            mbar_init(&r.v_full[i], 1), mbar_init(&r.v_empty[i], GROUPS * 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    pdl_wait();
    const a_block b = block_of(c);
    if (b.row0 >= b.rows) return;
    if (threadIdx.x >= GROUPS * 128) {
        fewer_regs<40>();
        if (threadIdx.x < GROUPS * 128 + 32) produce<D>(c, b, &map, r, box, (int)threadIdx.x & 31);
    } else {
        more_regs<232>();
        consume<D>(c, b, r);
    }
#endif
}

template <int D>
static cudaError_t run(const attn_prefill_call *c, int64_t slots, cudaStream_t stream)
{
    const int box = c->block_tokens % 64 ? 32 : 64, smem = 1024 + 2 * STAGES * D / 64 * TOK * 128;
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    CUtensorMap map;
    cudaError_t rc = matrix_map(&map, c->data, D, slots, D, box);
    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(attn_wgmma_kernel<D>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                  smem);
    if (rc != cudaSuccess) return rc;
    cfg.gridDim = dim3((unsigned)((c->max_q + ROWS - 1) / ROWS), (unsigned)(c->kv_heads * c->group),
                       (unsigned)c->seqs);
    cfg.blockDim = dim3(GROUPS * 128 + 128);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = 1;
    return cudaLaunchKernelEx(&cfg, attn_wgmma_kernel<D>, map, *c, box);
}

cudaError_t attn_prefill_wgmma(const attn_prefill_call *c, int head_dim, int64_t slots,
                               cudaStream_t stream)
{
    return head_dim == 64 ? run<64>(c, slots, stream) : run<128>(c, slots, stream);
}
