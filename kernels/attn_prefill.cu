/* Flash-style attention for prefill: blocks of 64 query rows of one head walk the cache in tiles
 * of 32 or 64 tokens. A tile lies in shared memory as f16, whatever the cache's format; 16-bit
 * tiles come by asynchronous copies while the tile before is worked on. Both products run on
 * tensor cores with an online softmax in registers; only tiles that cross the diagonal or the
 * window's edge are masked. */
#include "kernels/attn_prefill.cuh"

#define ROWS  64
#define WARPS 4

/* Registers hold 64 rows of 256 channels and scores of 32 tokens, or of 128 and 64. Two tiles must
 * fit a block's shared memory: 99 KB on 86 and 89, more on 80 and 90, 64 KB on 75, where tiles are
 * half as long. */
#define TILE_TOKENS(D) ((D) > 128 ? 32 : 64)
template <int D, int TOK> struct kv_tile {
    __half k[TOK][D + 8], v[TOK][D + 8];
};
template <int D> struct tiles_fit {
    static_assert(2 * sizeof(kv_tile<D, TILE_TOKENS(D)>) <= 99 * 1024,
                  "shared memory of sm_86, 89");
    static_assert(2 * sizeof(kv_tile<D, TILE_TOKENS(D) / 2>) <= 64 * 1024, "that of sm_75");
};
template struct tiles_fit<64>;
template struct tiles_fit<96>;
template struct tiles_fit<128>;
template struct tiles_fit<256>;

__device__ __forceinline__ float exp2_fast(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
__device__ __forceinline__ void copy16(void *dst, const void *src)
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(smem_addr(dst)), "l"(src)
                 : "memory");
#else
    *(uint4 *)dst = *(const uint4 *)src;
#endif
}
__device__ __forceinline__ void copies_commit()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int LEFT> __device__ __forceinline__ void copies_wait()
{
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
#endif
}

__device__ __forceinline__ void ldmatrix4(uint32_t r[4], const __half *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(p)));
}
__device__ __forceinline__ void ldmatrix4_trans(uint32_t r[4], const __half *p)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(smem_addr(p)));
}

/* 8 channels of a token as f16: word `i` of its row (8 channels each). */
template <int BITS> __device__ __forceinline__ uint4 load8(const uint8_t *row, int i, __half2 p)
{
    uint4 o;
    __half2 *h = (__half2 *)&o;
    if (BITS == 16) return *(const uint4 *)(row + i * 16);
    const float s = __low2float(p), z = __high2float(p);
    if (BITS == 8) {
        const uint2 q = *(const uint2 *)(row + i * 8);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const uint32_t w = (j < 2 ? q.x : q.y) >> (16 * (j & 1));
            h[j] = __floats2half2_rn((float)(w & 255u) * s + z, (float)(w >> 8 & 255u) * s + z);
        }
    } else {
        const uint32_t w = *(const uint32_t *)(row + i * 4);
#pragma unroll
        for (int j = 0; j < 4; j++) /* nibble j: channel 2j, nibble j + 4: channel 2j + 1 */
            h[j] = __floats2half2_rn((float)(w >> (4 * j) & 15u) * s + z,
                                     (float)(w >> (4 * j + 16) & 15u) * s + z);
    }
    return o;
}

/* Tokens at.. of one head; a tile of 64 may lie in two blocks of the cache. `last`: last token
 * anybody sees. */
template <int D, int TOK, int BITS>
__device__ __forceinline__ void load_tile(kv_tile<D, TOK> *tile, const attn_prefill_call &c,
                                          const int32_t *table, int head, int at, int last)
{
    constexpr int ROW = D * BITS / 8;
    const int second = min(at + 32, last);
    const int32_t blocks[2] = {table[at / c.block_tokens], table[second / c.block_tokens]};
#pragma unroll 4
    for (int i = threadIdx.x; i < 2 * TOK * (D / 8); i += WARPS * 32) {
        const int w = i % (D / 8), tok = i / (D / 8) % TOK, part = i / (D / 8) / TOK;
        const int32_t block = blocks[tok >> 5];
        const size_t slot = (((size_t)block * c.kv_heads + head) * 2 + part) * c.block_tokens +
                            (at + tok) % c.block_tokens;
        __half *dst = part ? &tile->v[tok][w * 8] : &tile->k[tok][w * 8];
        if (BITS == 16)
            copy16(dst, c.data + slot * ROW + w * 16);
        else
            *(uint4 *)dst = load8<BITS>(c.data + slot * ROW, w, c.param[slot]);
    }
    copies_commit();
}

template <int D> struct row_state {
    float o[D / 8][4], top[2], sum[2]; /* top in units of the scores */
};

/* One tile: rows p0 and p0 + 8 of this lane see tokens up to themselves. */
template <int D, int TOK>
__device__ __forceinline__ void consume_tile(row_state<D> *st, const kv_tile<D, TOK> &tile,
                                             const uint32_t (*q)[4], float scale, int at, int p0,
                                             int window, bool masked, int lane)
{
    const int t = lane & 3;
    float s[TOK / 8][4] = {};
#pragma unroll
    for (int i = 0; i < D / 16; i++)
#pragma unroll
        for (int n = 0; n < TOK / 16; n++) {
            uint32_t b[4]; /* tokens 16n..+7 k low, high; tokens 16n+8.. k low, high */
            ldmatrix4(b,
                      &tile.k[n * 16 + (lane >> 4) * 8 + (lane & 7)][i * 16 + (lane >> 3 & 1) * 8]);
            mma_16816(s[2 * n], q[i], b[0], b[1]);
            mma_16816(s[2 * n + 1], q[i], b[2], b[3]);
        }
    if (masked)
#pragma unroll
        for (int n = 0; n < TOK / 8; n++)
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int tok = at + n * 8 + 2 * t + (j & 1), p = p0 + (j >> 1) * 8;
                if (tok > p || (window && tok <= p - window)) s[n][j] = -INFINITY;
            }
    float base[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float now = st->top[h];
#pragma unroll
        for (int n = 0; n < TOK / 8; n++) now = fmaxf(now, fmaxf(s[n][2 * h], s[n][2 * h + 1]));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
        now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
        base[h] = now == -INFINITY ? 0.f : now * scale;
        const float fix = exp2_fast(st->top[h] * scale - base[h]);
        st->top[h] = now;
        st->sum[h] *= fix;
#pragma unroll
        for (int i = 0; i < D / 8; i++) st->o[i][2 * h] *= fix, st->o[i][2 * h + 1] *= fix;
    }
#pragma unroll
    for (int n = 0; n < TOK / 8; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            s[n][j] = exp2_fast(s[n][j] * scale - base[j >> 1]);
            st->sum[j >> 1] += s[n][j];
        }
#pragma unroll
    for (int n = 0; n < TOK / 16; n++) {
        const __half2 a[4] = {__floats2half2_rn(s[2 * n][0], s[2 * n][1]),
                              __floats2half2_rn(s[2 * n][2], s[2 * n][3]),
                              __floats2half2_rn(s[2 * n + 1][0], s[2 * n + 1][1]),
                              __floats2half2_rn(s[2 * n + 1][2], s[2 * n + 1][3])};
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            uint32_t b[4]; /* channels 16i..+7: tokens low, high; channels 16i+8.. */
            ldmatrix4_trans(
                b, &tile.v[n * 16 + (lane >> 3 & 1) * 8 + (lane & 7)][i * 16 + (lane >> 4) * 8]);
            mma_16816(st->o[2 * i], (const uint32_t *)a, b[0], b[1]);
            mma_16816(st->o[2 * i + 1], (const uint32_t *)a, b[2], b[3]);
        }
    }
}

template <int D, int TOK, int BITS>
__global__ void __launch_bounds__(WARPS * 32, D > 128 ? 1 : 3)
    attn_prefill_kernel(attn_prefill_call c)
{
    extern __shared__ __align__(16) uint8_t raw[];
    kv_tile<D, TOK> *tiles = (kv_tile<D, TOK> *)raw; /* [2] */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    const int seq = blockIdx.z, head = blockIdx.y / c.group, sub = blockIdx.y % c.group;
    pdl_launch();
    pdl_wait();
    const int first = c.seq_start[seq], rows = c.seq_start[seq + 1] - first;
    /* Late rows see the most tokens: they start first. */
    const int row0 = ((int)gridDim.x - 1 - (int)blockIdx.x) * ROWS;
    if (row0 >= rows) return;
    const int base = c.pos[first]; /* positions of a sequence's rows are consecutive */
    const int last = base + min(row0 + ROWS, rows) - 1;
    const int from = c.window > 0 ? max(0, base + row0 - c.window + 1) / TOK * TOK : 0;
    const int32_t *table = c.table + (size_t)seq * c.table_stride;

    load_tile<D, TOK, BITS>(&tiles[0], c, table, head, from, last);
    /* Q fragments of this warp's 16 rows; rows past the end repeat the last. */
    uint32_t q[D / 16][4];
    {
        const int r0 = min(row0 + warp * 16 + g, rows - 1),
                  r1 = min(row0 + warp * 16 + g + 8, rows - 1);
        const __half *q0 = c.q + (int64_t)(first + r0) * c.q_row + head * c.q_head + sub * c.q_sub;
        const __half *q1 = c.q + (int64_t)(first + r1) * c.q_row + head * c.q_head + sub * c.q_sub;
#pragma unroll
        for (int i = 0; i < D / 16; i++) {
            q[i][0] = *(const uint32_t *)(q0 + i * 16 + 2 * t);
            q[i][1] = *(const uint32_t *)(q1 + i * 16 + 2 * t);
            q[i][2] = *(const uint32_t *)(q0 + i * 16 + 8 + 2 * t);
            q[i][3] = *(const uint32_t *)(q1 + i * 16 + 8 + 2 * t);
        }
    }
    row_state<D> st = {};
    st.top[0] = st.top[1] = -INFINITY;
    const float scale = c.scale * 1.44269504f;
    const int w0 = base + row0 + warp * 16; /* the warp's first row */
    for (int at = from, turn = 0; at <= last; at += TOK, turn ^= 1) {
        if (at + TOK <= last) {
            load_tile<D, TOK, BITS>(&tiles[turn ^ 1], c, table, head, at + TOK, last);
            copies_wait<1>();
        } else
            copies_wait<0>();
        __syncthreads();
        const bool masked = at + TOK - 1 > w0 || (c.window && at <= w0 + 15 - c.window);
        consume_tile<D, TOK>(&st, tiles[turn], q, scale, at, w0 + g, c.window, masked, lane);
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float sum = st.sum[h];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        const int r = row0 + warp * 16 + g + 8 * h;
        if (r >= rows) continue;
        __half *y = c.y + (int64_t)(first + r) * c.y_row + ((int64_t)head * c.group + sub) * D;
        const float inv = 1.f / sum;
#pragma unroll
        for (int i = 0; i < D / 8; i++)
            *(__half2 *)(y + i * 8 + 2 * t) = __floats2half2_rn(st.o[i][2 * h] * inv,
                                                                st.o[i][2 * h + 1] * inv);
    }
}

/* One channel of a cached token. */
__device__ __forceinline__ float cached(const attn_prefill_call &c, size_t slot, int ch, int dim,
                                        int bits)
{
    const uint8_t *row = c.data + slot * (size_t)(dim * bits / 8);
    if (bits == 16) return __half2float(((const __half *)row)[ch]);
    const __half2 p = c.param[slot];
    int code = bits == 8 ? row[ch] : 0;
    if (bits == 4) {
        const int nib = (ch & 1) * 4 + (ch & 7) / 2;
        code = row[ch / 8 * 4 + nib / 2] >> (4 * (nib & 1)) & 15;
    }
    return (float)code * __low2float(p) + __high2float(p);
}

__global__ void attn_plain_kernel(attn_prefill_call c, int dim, int bits, int rows)
{
    const int lane = threadIdx.x & 31, heads = c.kv_heads * c.group;
    const int64_t i = (int64_t)blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
    pdl_launch();
    pdl_wait();
    if (i >= (int64_t)rows * heads) return;
    const int row = (int)(i / heads), h = (int)(i % heads), head = h / c.group, sub = h % c.group;
    int seq = 0;
    while (seq + 1 < c.seqs && c.seq_start[seq + 1] <= row) seq++;
    const int pos = c.pos[row], from = c.window > 0 ? max(0, pos - c.window + 1) : 0;
    const __half *q = c.q + (int64_t)row * c.q_row + head * c.q_head + sub * c.q_sub;
    float qv[8], o[8] = {}, top = -INFINITY, sum = 0.f;
    for (int j = 0; j < 8; j++) qv[j] = lane + 32 * j < dim ? __half2float(q[lane + 32 * j]) : 0.f;
    for (int tok = from; tok <= pos; tok++) {
        const int32_t block = c.table[(int64_t)seq * c.table_stride + tok / c.block_tokens];
        const size_t slot = ((size_t)block * c.kv_heads + head) * 2 * c.block_tokens +
                            tok % c.block_tokens;
        float s = 0.f;
        for (int j = 0; j < 8; j++)
            if (lane + 32 * j < dim) s += qv[j] * cached(c, slot, lane + 32 * j, dim, bits);
        for (int x = 16; x; x >>= 1) s += __shfl_xor_sync(~0u, s, x);
        s *= c.scale;
        const float now = fmaxf(top, s), fix = expf(top - now), p = expf(s - now);
        top = now;
        sum = sum * fix + p;
        for (int j = 0; j < 8; j++)
            if (lane + 32 * j < dim)
                o[j] = o[j] * fix + p * cached(c, slot + c.block_tokens, lane + 32 * j, dim, bits);
    }
    for (int j = 0; j < 8; j++)
        if (lane + 32 * j < dim)
            c.y[(int64_t)row * c.y_row + (int64_t)h * dim + lane + 32 * j] = __float2half_rn(o[j] /
                                                                                             sum);
}

template <typename K, typename... A>
static cudaError_t run(K kernel, dim3 grid, int threads, int smem, cudaStream_t stream, bool pdl,
                       A... args)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const cudaError_t rc = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                smem);
    if (rc != cudaSuccess) return rc;
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.gridDim = grid;
    cfg.blockDim = dim3((unsigned)threads);
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, kernel, args...);
}

template <int D, int TOK>
static cudaError_t run_prefill(const attn_prefill_call *c, int bits, cudaStream_t stream, bool pdl)
{
    const dim3 grid((unsigned)((c->max_q + ROWS - 1) / ROWS), (unsigned)(c->kv_heads * c->group),
                    (unsigned)c->seqs);
    const int threads = WARPS * 32, smem = 2 * (int)sizeof(kv_tile<D, TOK>);
    if (bits == 16)
        return run(attn_prefill_kernel<D, TOK, 16>, grid, threads, smem, stream, pdl, *c);
    if (bits == 8) return run(attn_prefill_kernel<D, TOK, 8>, grid, threads, smem, stream, pdl, *c);
    return run(attn_prefill_kernel<D, TOK, 4>, grid, threads, smem, stream, pdl, *c);
}

cudaError_t attn_prefill(const attn_prefill_call *c, int head_dim, int bits, int sm,
                         cudaStream_t stream)
{
    const bool pdl = sm >= 90;
#define CASE(D)                                                            \
    if (head_dim == D)                                                     \
    return sm >= 80 ? run_prefill<D, TILE_TOKENS(D)>(c, bits, stream, pdl) \
                    : run_prefill<D, TILE_TOKENS(D) / 2>(c, bits, stream, pdl)
    CASE(64);
    CASE(96);
    CASE(128);
    CASE(256);
#undef CASE
    return cudaErrorInvalidValue;
}

cudaError_t attn_plain(const attn_prefill_call *c, int head_dim, int bits, int rows,
                       cudaStream_t stream, bool pdl)
{
    const int64_t warps = (int64_t)rows * c->kv_heads * c->group;
    return run(attn_plain_kernel, dim3((unsigned)((warps + 3) / 4)), 128, 0, stream, pdl, *c,
               head_dim, bits, rows);
}
