/* Attention for devices opened as deterministic: rows of prompts and of decode through one kernel,
 * in which the bits of a row follow from its position and what the cache holds, not from the rows
 * beside it or from how its prompt was cut into steps.
 *
 * It is split-KV attention (attn_decode_body.cuh) with the splits at fixed positions of the context
 * and the columns of its mma shared by the query heads of a KV head and neighbouring rows of a
 * sequence. A tile that a row does not see leaves its sums as they are, to the bit: its largest
 * score stays, so they are scaled by 1, and weights of 0 are added. */
#include <string.h>

#include "kernels/attn_fixed_tile.cuh"
#include "kernels/device_cuda.cuh"

#define SHORT_SPLIT 256 /* tokens; */
#define SHORT_ONES  96  /* beyond so many, */
#define LONG_SPLIT  4096
#define MAX_SPLITS  256
#define COLUMNS     8

typedef struct {
    attn_decode_call a; /* kv_len, counters' slots and splits are of the rows' groups, not of it */
    const int32_t *pos, *seq_start;
    int32_t first, splits; /* number of the launch's first group of rows; splits in the scratch */
} attn_rows_call;

/* Split of a position, and where a split begins. */
__host__ __device__ static inline int split_of(int pos)
{
    const int far = pos - SHORT_ONES * SHORT_SPLIT;
    return far < 0 ? pos / SHORT_SPLIT : SHORT_ONES + far / LONG_SPLIT;
}
__device__ static inline int split_start(int s)
{
    return s < SHORT_ONES ? s * SHORT_SPLIT
                          : SHORT_ONES * SHORT_SPLIT + (s - SHORT_ONES) * LONG_SPLIT;
}

/* Rows that share a block. */
__host__ __device__ static inline int rows_together(int group)
{
    return group < COLUMNS ? COLUMNS / group : 1;
}

/* What a block works on: `columns` of rows row0.. of one sequence, heads sub0.. of one KV head. */
typedef struct {
    int row0, seq, head, sub0, per_row, columns;
    int first, last; /* splits that some row sees */
} rows_block;

/* Positions [from, to) that a column's row sees. */
__device__ __forceinline__ int2 range_of(const attn_rows_call &r, const rows_block &b, int column)
{
    if (column >= b.columns) return make_int2(0, 0);
    const int to = r.pos[b.row0 + column / b.per_row] + 1;
    return make_int2(r.a.window > 0 ? max(0, to - r.a.window) : 0, to);
}

/* Group `n` of rows: groups begin anew with each sequence. False: there are not so many. */
__device__ __forceinline__ bool find_rows(const attn_rows_call &r, rows_block *b, int n)
{
    const int together = rows_together(r.a.group), groups = (r.a.group + COLUMNS - 1) / COLUMNS;
    for (b->seq = 0; b->seq < r.a.seqs; b->seq++) {
        const int from = r.seq_start[b->seq], to = r.seq_start[b->seq + 1];
        const int here = (to - from + together - 1) / together;
        if (n >= here) {
            n -= here;
            continue;
        }
        b->row0 = from + n * together;
        b->head = (int)blockIdx.y / groups;
        b->sub0 = (int)blockIdx.y % groups * COLUMNS;
        b->per_row = min(COLUMNS, r.a.group - b->sub0);
        b->columns = min(together, to - b->row0) * b->per_row;
        const int2 low = range_of(r, *b, 0), high = range_of(r, *b, b->columns - 1);
        b->first = split_of(low.x), b->last = split_of(high.y - 1);
        return true;
    }
    return false;
}

/* The tokens of one split, warps taking turns; each tile is loaded while the one before is worked
 * on. */
template <int D, int BITS, int U>
__device__ __forceinline__ void walk_split(softmax_state<D, BITS> *st, const attn_rows_call &r,
                                           const rows_block &b, const uint32_t q[D / 16][2],
                                           const float sumq[2], int tile, int hi, int lane)
{
    constexpr int TOKENS = U * TILE;
    const int g = lane >> 2, t = lane & 3, per_block = r.a.block_tokens / TOKENS;
    const int2 see[2] = {range_of(r, b, 2 * t), range_of(r, b, 2 * t + 1)};
    const int32_t *table = r.a.table + (size_t)b.seq * r.a.table_stride;
    const float scale_log2 = r.a.scale * 1.44269504f;
    tile_regs<D, BITS> cur[U], next[U];
    const auto load = [&](tile_regs<D, BITS> *to, int at) {
        const int32_t block = table[at / per_block];
#pragma unroll
        for (int u = 0; u < U; u++)
            load_tile<D, BITS>(&to[u], r.a, block, b.head, (at % per_block * U + u) * TILE, g, t);
    };
    if (tile < hi) load(cur, tile);
    for (; tile < hi; tile += NWARPS) {
        if (tile + NWARPS < hi) load(next, tile + NWARPS);
        consume_where<D, BITS, U>(st, cur, q, sumq, scale_log2, [&](int u, int i, int h) {
            const int at = tile * TOKENS + u * TILE + g + 8 * i;
            return at >= see[h].x && at < see[h].y;
        });
#pragma unroll
        for (int u = 0; u < U; u++) cur[u] = next[u];
    }
}

__device__ __forceinline__ __half *out_of(const attn_rows_call &r, const rows_block &b, int column,
                                          int D)
{
    return r.a.y + (b.row0 + column / b.per_row) * r.a.y_row +
           ((int64_t)b.head * r.a.group + b.sub0 + column % b.per_row) * D;
}

/* The warps' sums of a split, in their order: to `work` [columns][D + 2], or out where a row sees
 * no other split. */
template <int D>
__device__ __forceinline__ void join_warps(const attn_rows_call &r, const rows_block &b,
                                           const float *merged, float *work)
{
    for (int i = threadIdx.x; i < b.columns * D; i += NWARPS * 32) {
        const int col = i / D, d = i % D;
        const float *at = merged + col * (D + 2);
        float m = -INFINITY, sum = 0.f, o = 0.f;
#pragma unroll
        for (int w = 0; w < NWARPS; w++) m = fmaxf(m, at[w * b.columns * (D + 2) + D]);
        const float base = m == -INFINITY ? 0.f : m;
#pragma unroll
        for (int w = 0; w < NWARPS; w++) {
            const float f = exp2f(at[w * b.columns * (D + 2) + D] - base);
            sum = __fmaf_rn(f, at[w * b.columns * (D + 2) + D + 1], sum);
            o = __fmaf_rn(f, at[w * b.columns * (D + 2) + d], o);
        }
        if (b.first == b.last) {
            out_of(r, b, col, D)[d] = __float2half_rn(o * (1.f / sum));
            continue;
        }
        work[col * (D + 2) + d] = o;
        if (d == 0) work[col * (D + 2) + D] = m, work[col * (D + 2) + D + 1] = sum;
    }
}

/* The splits that each column's row sees, in their order. all: that of b.first. */
template <int D>
__device__ __forceinline__ void join_splits(const attn_rows_call &r, const rows_block &b,
                                            const float *all, float (*weight)[MAX_SPLITS],
                                            float *norm)
{
    constexpr int PART = COLUMNS * (D + 2);
    const int lane = threadIdx.x & 31;
    for (int col = threadIdx.x >> 5; col < b.columns; col += NWARPS) {
        const int2 see = range_of(r, b, col);
        const int first = split_of(see.x), n = split_of(see.y - 1) - first + 1;
        const float *at = all + (size_t)(first - b.first) * PART + col * (D + 2) + D;
        float top = -INFINITY, sum = 0.f;
        for (int s = lane; s < n; s += 32) top = fmaxf(top, __ldcg(at + (size_t)s * PART));
        for (int x = 16; x; x >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
        for (int s = lane; s < n; s += 32) {
            const float f = exp2f(__ldcg(at + (size_t)s * PART) - top);
            weight[col][s] = f;
            sum = __fmaf_rn(f, __ldcg(at + (size_t)s * PART + 1), sum);
        }
        for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
        if (lane == 0) norm[col] = 1.f / sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < b.columns * D; i += NWARPS * 32) {
        const int col = i / D, d = i % D;
        const int2 see = range_of(r, b, col);
        const int first = split_of(see.x), n = split_of(see.y - 1) - first + 1;
        const float *at = all + (size_t)(first - b.first) * PART + col * (D + 2) + d;
        float o = 0.f;
#pragma unroll 8
        for (int s = 0; s < n; s++) o = __fmaf_rn(weight[col][s], __ldcg(at + (size_t)s * PART), o);
        out_of(r, b, col, D)[d] = __float2half_rn(o * norm[col]);
    }
}

template <int D, int BITS, int U>
__global__ void __launch_bounds__(NWARPS * 32) attn_rows_kernel(attn_rows_call r)
{
    __shared__ float merged[NWARPS * COLUMNS * (D + 2)], weight[COLUMNS][MAX_SPLITS], norm[COLUMNS];
    __shared__ int last;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
    rows_block b;
    pdl_launch();
    /* Tables come from copies, which no launch overtakes. */
    if (!find_rows(r, &b, r.first + (int)blockIdx.z)) return;
    const int split = b.first + (int)blockIdx.x;
    if (split > b.last) return;
    pdl_wait();
    uint32_t q[D / 16][2];
    float sumq[2];
    const int col = g < b.columns ? g : 0;
    load_query<D, BITS>(q, sumq,
                        r.a.q + (b.row0 + col / b.per_row) * r.a.q_row + b.head * r.a.q_head +
                            (b.sub0 + col % b.per_row) * r.a.q_sub,
                        g < b.columns, t);
    softmax_state<D, BITS> st = {};
    st.max[0] = st.max[1] = -INFINITY;
    const int to = min(split_start(split + 1), range_of(r, b, b.columns - 1).y);
    walk_split<D, BITS, U>(&st, r, b, q, sumq, split_start(split) / (U * TILE) + warp,
                           (to + U * TILE - 1) / (U * TILE), lane);
    leave_warp<D, BITS>(merged + warp * b.columns * (D + 2), &st, b.columns, g, t);
    __syncthreads();
    const size_t slot = (size_t)blockIdx.z * gridDim.y + blockIdx.y;
    float *work = r.a.work + slot * r.splits * COLUMNS * (D + 2);
    join_warps<D>(r, b, merged, work + (size_t)blockIdx.x * COLUMNS * (D + 2));
    if (b.first == b.last) return;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        last = atomicAdd(&r.a.counters[slot], 1) == b.last - b.first;
        if (last) r.a.counters[slot] = 0;
    }
    __syncthreads();
    if (!last) return;
    __threadfence();
    join_splits<D>(r, b, work, weight, norm);
}

template <int D, int BITS, int U>
static err_code run(device *d, const attn_rows_call &r, int slots, int groups, err *e)
{
    return cuda_launch(d, "attn: rows", attn_rows_kernel<D, BITS, U>,
                       dim3((unsigned)r.splits, (unsigned)slots, (unsigned)groups),
                       dim3(NWARPS * 32), 0, e, r);
}

static err_code run_rows(device *d, const attn_rows_call &r, int head_dim, int bits, int slots,
                         int groups, err *e)
{
#define CASE(D)                                                \
    if (head_dim == D)                                         \
    return bits == 16  ? run<D, 16, 1>(d, r, slots, groups, e) \
           : bits == 8 ? run<D, 8, 1>(d, r, slots, groups, e)  \
                       : run<D, 4, 2>(d, r, slots, groups, e)
    CASE(64);
    CASE(96);
    CASE(128);
    CASE(256);
#undef CASE
    return err_set(e, E_UNSUPPORTED, "attn: rows: head size %d", head_dim);
}

size_t attn_fixed_scratch_cuda(const op_limits *lim)
{
    const int splits = split_of(lim->max_kv - 1) + 1;
    const size_t group = (size_t)lim->heads * (size_t)splits * COLUMNS *
                         (size_t)(lim->head_dim + 2) * sizeof(float);
    return group > ((size_t)64 << 20) ? group : (size_t)64 << 20;
}

static attn_rows_call call_of(const device *d, tensor *y, const tensor *q, const kv_layer *kv,
                              const batch_rows *rows, float scale, int32_t window)
{
    attn_rows_call r;
    memset(&r, 0, sizeof r);
    r.a.q = (const __half *)q->data, r.a.y = (__half *)y->data;
    r.a.data = (const uint8_t *)kv->data, r.a.param = (const __half2 *)kv->param;
    r.a.table = (const int32_t *)rows->block_table.data,
    r.a.table_stride = (int32_t)rows->block_table.stride[0];
    r.a.q_row = q->stride[0], r.a.q_head = q->stride[1], r.a.q_sub = q->stride[2];
    r.a.y_row = y->stride[0];
    r.a.seqs = rows->seqs, r.a.kv_heads = kv->kv_heads, r.a.group = (int32_t)q->shape[2];
    r.a.block_tokens = kv->block_tokens, r.a.window = window, r.a.scale = scale;
    r.a.counters = cuda_of(d)->counters;
    r.pos = (const int32_t *)rows->pos.data, r.seq_start = (const int32_t *)rows->seq_start.data;
    return r;
}

err_code attn_fixed_cuda(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                         const batch_rows *rows, float scale, int32_t window, err *e)
{
    attn_rows_call r = call_of(d, y, q, kv, rows, scale, window);
    const int64_t m = q->shape[0], slots = kv->kv_heads * ((r.a.group + COLUMNS - 1) / COLUMNS);
    const int together = rows_together(r.a.group);
    /* at most: a sequence's last group may be short */
    int64_t groups = rows->max_q == 1 ? m : m / together + rows->seqs;
    void *work;
    r.splits = split_of(rows->max_kv - 1) + 1;
    if (r.splits > MAX_SPLITS)
        return err_set(e, E_LIMIT, "attn: rows: expected up to %d tokens, got %d",
                       SHORT_ONES * SHORT_SPLIT + (MAX_SPLITS - SHORT_ONES) * LONG_SPLIT,
                       rows->max_kv);
    if (groups > m) groups = m;
    const size_t bytes = (size_t)slots * (size_t)r.splits * COLUMNS * (size_t)(kv->head_dim + 2) *
                         sizeof(float);
    TRY(dev_scratch(d, &work, r.splits > 1 ? bytes : 0, "attn", e));
    r.a.work = (float *)work;
    int64_t most = r.splits > 1 ? (int64_t)(d->shared_bytes / bytes) : groups;
    if (most > CUDA_COUNTERS / slots) most = CUDA_COUNTERS / slots;
    if (most > 65535) most = 65535;
    for (int64_t i = 0; i < groups; i += most) {
        r.first = (int32_t)i;
        TRY(run_rows(d, r, kv->head_dim, kv->format == KV_16 ? 16 : (int)kv->format, (int)slots,
                     (int)(groups - i < most ? groups - i : most), e));
    }
    return OK;
}
