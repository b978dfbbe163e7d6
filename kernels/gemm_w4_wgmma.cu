/* W4A16 for many rows on sm_90a: tiles of 256 outputs and 128 tokens by wgmma. Codes become f16 in
 * registers, where wgmma takes its first operand from, so outputs are its rows and tokens its
 * columns; the codes of a lane in our tiling are its fragments of four steps of 16 inputs.
 *
 * A persistent block a multiprocessor. A producer warp streams units of 128 inputs through a ring
 * in shared memory: codes by bulk copies, before the dependency wait where the ring allows,
 * activations by tensor copies. Warpgroups turn the codes of the next 32 inputs into f16 while the
 * tensor cores work on the last 32. Tiles that do not fill a wave of blocks are cut along k so that
 * every block has as much to read; the blocks of a tile leave their sums in memory, and each adds
 * up and finishes a share of the tile, in the order of k. */
#include "kernels/gemm_w4.cuh"
#include "kernels/gemm_w4_f16.cuh"

#define TILE_ROWS 256
#define TOKENS    128 /* of a tile */
#define W4_TILES  (TILE_ROWS / 16)
#define BAND      16 /* token tiles that share weights in L2 */
#define RING_MOST (208 << 10)

/* How the tiles of a product are dealt out. */
typedef struct {
    int tiles_w, tiles_x; /* along outputs, along tokens */
    int whole, shared;    /* tiles of one block, then tiles that all blocks share by units */
} w_plan;

template <int GROUP> struct w_shape {
    static constexpr int GROUPS = 2, /* warpgroups that multiply, */
        PARTS = 2,                   /* 64 outputs twice each */
        THREADS = GROUPS * 128, UNIT = 1024 + 64 * (128 / GROUP), CODES = W4_TILES * UNIT,
                         X = TOKENS * 256, STAGE = CODES + X, STAGES = RING_MOST / STAGE,
                         ROW = PARTS * 128 + 16, /* bytes of a staged token */
        SMEM = 1024 + STAGES * STAGE + GROUPS * 16 * ROW;
    static_assert(STAGE % 1024 == 0, "swizzled tiles begin at multiples of 1024");
};

/* ---- what a block does ---- */

typedef struct {
    int tile, from, to; /* units [from, to) of a tile */
} w_segment;
typedef struct {
    int tile, unit, end;
} w_cursor;

__device__ __forceinline__ int share_begin(const w_plan &p, int units, int block)
{
    return (int)((int64_t)block * p.shared * units / gridDim.x);
}
__device__ __forceinline__ w_cursor first_work(const w_plan &p, int units)
{
    return w_cursor{(int)blockIdx.x, share_begin(p, units, blockIdx.x),
                    share_begin(p, units, blockIdx.x + 1)};
}
__device__ __forceinline__ bool next_work(const w_plan &p, int units, w_cursor *c, w_segment *s)
{
    if (c->tile < p.whole) {
        *s = w_segment{c->tile, 0, units};
        c->tile += gridDim.x;
        return true;
    }
    if (c->unit >= c->end) return false;
    const int from = c->unit % units;
    *s = w_segment{p.whole + c->unit / units, from, min(units, from + c->end - c->unit)};
    c->unit += s->to - from;
    return true;
}
/* The block that has unit `at` of all that is shared. */
__device__ __forceinline__ int owner_of(const w_plan &p, int units, int at)
{
    return (int)((((int64_t)at + 1) * gridDim.x - 1) / ((int64_t)p.shared * units));
}

/* Tile along outputs and along tokens: a band of token tiles shares a tile of weights. */
__device__ __forceinline__ int2 place_of(const w_plan &p, int tile)
{
    const int band = tile / (BAND * p.tiles_w), in = tile - band * BAND * p.tiles_w,
              width = min(BAND, p.tiles_x - band * BAND);
    return make_int2(in / width, band * BAND + in % width);
}

#ifdef TMF_SM90A

/* ---- producer ---- */

typedef struct {
    w_cursor at;
    w_segment s;
    int2 place;
    int unit, slot, round;
} w_stream; /* the units of a block, one after the other */

__device__ __forceinline__ w_stream stream_begin(const w_plan &p, int units)
{
    return w_stream{first_work(p, units), w_segment{0, 0, 0}, make_int2(0, 0), -1, 0, 0};
}
__device__ __forceinline__ bool stream_next(const w_plan &p, int units, int stages, w_stream *s)
{
    if (s->unit >= 0) {
        s->unit++;
        if (++s->slot == stages) s->slot = 0, s->round++;
    }
    if (s->unit < s->s.to && s->unit >= 0) return true;
    if (!next_work(p, units, &s->at, &s->s)) return false;
    s->unit = s->s.from;
    s->place = place_of(p, s->s.tile);
    return true;
}

template <int GROUP>
__device__ __forceinline__ void load_codes(uint8_t *ring, uint64_t *full, const CUtensorMap *codes,
                                           const w_stream &s)
{
    typedef w_shape<GROUP> S;
    mbar_expect(&full[s.slot], S::CODES + S::X);
    tensor_copy(ring + s.slot * S::STAGE + S::X, codes, s.unit * (S::UNIT / 8),
                s.place.x * W4_TILES, &full[s.slot]);
}

template <int GROUP>
__device__ __forceinline__ void load_tokens(uint8_t *ring, uint64_t *full, const CUtensorMap *x,
                                            const w_stream &s)
{
    typedef w_shape<GROUP> S;
    uint8_t *to = ring + s.slot * S::STAGE;
    const int token = s.place.y * TOKENS;
    tensor_copy(to, x, s.unit * 128, token, &full[s.slot]);
    tensor_copy(to + TOKENS * 128, x, s.unit * 128 + 64, token, &full[s.slot]);
}

/* One thread. */
template <int GROUP>
__device__ __forceinline__ void produce(uint8_t *ring, uint64_t *full, uint64_t *empty,
                                        const CUtensorMap *codes_map, const CUtensorMap *x,
                                        const w_plan &p, int units)
{
    constexpr int STAGES = w_shape<GROUP>::STAGES;
    w_stream codes = stream_begin(p, units), tokens = codes;
    int ahead = 0;
    while (ahead < STAGES && stream_next(p, units, STAGES, &codes)) {
        load_codes<GROUP>(ring, full, codes_map, codes);
        ahead++;
    }
    pdl_wait();
    for (int i = 0; i < ahead; i++) {
        stream_next(p, units, STAGES, &tokens);
        load_tokens<GROUP>(ring, full, x, tokens);
    }
    if (ahead < STAGES) return;
    while (stream_next(p, units, STAGES, &codes)) {
        mbar_wait(&empty[codes.slot], (codes.round - 1) & 1);
        load_codes<GROUP>(ring, full, codes_map, codes);
        load_tokens<GROUP>(ring, full, x, codes);
    }
}

/* ---- consumers ---- */

/* Where a thread of a warpgroup is: warpgroup, warp in it, lane. */
typedef struct {
    int group, warp, lane;
} w_thread;

/* Fragments on their way: two steps of 32 inputs, of which halves of 16 for each part of a
 * warpgroup are pieces. Parameters stay until the next group. */
template <int PARTS> struct w_pieces {
    uint32_t a[2][2][PARTS][4], later[PARTS];
    w_param param[PARTS];
    uint32_t param_at; /* from a lane's codes to its parameters */
};

/* Piece (half h, part i) of step s; mine: shared address of the lane's codes of a unit. */
template <int GROUP>
__device__ __forceinline__ void make_piece(w_pieces<w_shape<GROUP>::PARTS> *f, uint32_t mine, int s,
                                           int h, int i)
{
    typedef w_shape<GROUP> S;
    uint32_t word = f->later[i];
    if (h == 0) {
        const uint2 q = shared_load8(mine + i * 4 * S::UNIT + (s >> 1) * 512 + (s & 1) * 8);
        word = q.x, f->later[i] = q.y;
        if (s * 32 % GROUP == 0)
            f->param[i] = param_of(
                shared_load8(f->param_at + mine + i * 4 * S::UNIT + s * 32 / GROUP * 64));
    }
    fragment_of(f->a[s & 1][h][i], word, f->param[i]);
}

/* Sums of one segment. Behind each product that is queued, the fragment that took part in the one
 * four pieces earlier is made anew: the tensor cores always have work left. */
template <int GROUP>
__device__ __forceinline__ void multiply(float (&acc)[w_shape<GROUP>::PARTS][TOKENS / 2],
                                         uint8_t *ring, uint64_t *full, uint64_t *empty, int units,
                                         int *slot, int *round, const w_thread &th)
{
    typedef w_shape<GROUP> S;
    w_pieces<S::PARTS> f;
    int last = -1;
    const uint32_t lane_at = smem_addr(ring) + S::X +
                             (th.group * S::PARTS * 4 + th.warp) * S::UNIT + th.lane * 16;
    f.param_at = 1024 + (th.lane >> 2) * 8 - th.lane * 16;
#pragma unroll
    for (int i = 0; i < S::PARTS; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 2; j++) acc[i][j] = 0.f;
    mbar_wait(&full[*slot], *round & 1);
    uint32_t mine = lane_at + *slot * S::STAGE;
#pragma unroll
    for (int j = 0; j < 2 * S::PARTS; j++)
        make_piece<GROUP>(&f, mine, 0, j / S::PARTS, j % S::PARTS);
    for (int u = 0; u < units; u++) {
        const uint64_t x = w_rows128(ring + *slot * S::STAGE);
        const int here = *slot;
#pragma unroll
        for (int s = 0; s < 4; s++) {
#pragma unroll
            for (int j = 0; j < 2 * S::PARTS; j++) {
                const int h = j / S::PARTS, i = j % S::PARTS;
                w_fence();
                w_rs<TOKENS>::mma(acc[i], f.a[s & 1][h][i],
                                  x + (((s >> 1) * TOKENS * 128 + (s & 1) * 64 + h * 32) >> 4));
                w_commit();
                w_wait<2 * S::PARTS>();
                if (s == 3 && j == 0 && u + 1 < units) { /* the first piece of the next unit */
                    if (++*slot == S::STAGES) *slot = 0, ++*round;
                    mbar_wait(&full[*slot], *round & 1);
                    mine = lane_at + *slot * S::STAGE;
                }
                make_piece<GROUP>(&f, mine, (s + 1) & 3, h, i);
            }
            if (s == 0 && last >= 0 && th.lane == 0) mbar_arrive(&empty[last]);
        }
        last = here;
    }
    w_wait<0>();
#pragma unroll
    for (int i = 0; i < S::PARTS; i++) w_keep(acc[i]);
    __syncwarp();
    if (th.lane == 0) mbar_arrive(&empty[last]);
    if (++*slot == S::STAGES) *slot = 0, ++*round;
}

/* ---- outputs ---- */

__device__ __forceinline__ float2 bias_of(const w4_tiles &w, int tile, int g)
{
    const int o0 = w4_row(w.n, w.paired, tile, g), o1 = w4_row(w.n, w.paired, tile, g + 8);
    if (!w.bias || tile >= w.tiles) return make_float2(0.f, 0.f);
    return make_float2(o0 < w.n ? __half2float(w.bias[o0]) : 0.f,
                       o1 < w.n ? __half2float(w.bias[o1]) : 0.f);
}

/* How outputs go to memory one by one. */
typedef enum { PUT_HALF, PUT_HALF_ADD, PUT_FLOAT, PUT_FLOAT_ADD, PUT_GLU } put_kind;

template <put_kind KIND> __device__ __forceinline__ void put(void *y, float v)
{
    if (KIND == PUT_FLOAT_ADD)
        atomicAdd((float *)y, v); /* nobody else has this one: no need to wait for it */
    else if (KIND == PUT_FLOAT)
        *(float *)y = v;
    else {
        if (KIND == PUT_HALF_ADD) v += __half2float(*(const __half *)y);
        *(__half *)y = __float2half_rn(v);
    }
}

/* Rows g and g + 8 of a tile of 16, tokens 2t and 2t + 1 of each of N eights from `token`. */
template <put_kind KIND, int N>
__device__ __forceinline__ void put_eights(const w4_tiles &w, const w4_wide_call &c, int tile,
                                           int token, const float *v, int lane)
{
    constexpr int SIZE = KIND == PUT_FLOAT || KIND == PUT_FLOAT_ADD ? 4 : 2;
    const int g = lane >> 2, o0 = w4_row(w.n, w.paired, tile, g),
              o1 = w4_row(w.n, w.paired, tile, g + 8), first = token + 2 * (lane & 3),
              left = c.m - first;
    const bool in0 = tile < w.tiles && o0 < w.n, in1 = tile < w.tiles && o1 < w.n;
    const float2 bias = bias_of(w, tile, g);
    const size_t row = (size_t)c.ldy * SIZE;
    uint8_t *y = (uint8_t *)c.y + first * row + (size_t)o0 * SIZE;
    const size_t next = (size_t)(o1 - o0) * SIZE;
#pragma unroll
    for (int j = 0; j < N; j++)
#pragma unroll
        for (int e = 0; e < 2; e++) {
            const float v0 = v[4 * j + e] + bias.x, v1 = v[4 * j + 2 + e] + bias.y;
            if (8 * j + e < left) {
                if (KIND == PUT_GLU) {
                    if (in0) put<KIND>(y, w4_gated(v0, v1));
                } else {
                    if (in0) put<KIND>(y, v0);
                    if (in1) put<KIND>(y + next, v1);
                }
            }
            y += e ? 7 * row : row;
        }
}

/* One eight, whatever the call wants. */
__device__ __forceinline__ void put_any(const w4_tiles &w, const w4_wide_call &c, int tile,
                                        int token, const float *v, int lane)
{
    if (c.glu)
        put_eights<PUT_GLU, 1>(w, c, tile, token, v, lane);
    else if (c.wide && c.add)
        put_eights<PUT_FLOAT_ADD, 1>(w, c, tile, token, v, lane);
    else if (c.wide)
        put_eights<PUT_FLOAT, 1>(w, c, tile, token, v, lane);
    else if (c.add)
        put_eights<PUT_HALF_ADD, 1>(w, c, tile, token, v, lane);
    else
        put_eights<PUT_HALF, 1>(w, c, tile, token, v, lane);
}

/* Piece `p` of the outputs of a token that a warpgroup staged, 8 of them: the first, or -1. */
template <bool GLU> __device__ __forceinline__ int piece_row(const w4_tiles &w, int tile, int p)
{
    if (!w.paired) {
        const int o = tile * 16 + p * 8;
        return o < w.n ? o : -1;
    }
    const int i = GLU ? p / 4 : p / 8, half = GLU ? 0 : p >> 2 & 1, t = tile + i * 4 + p % 4;
    return t < w.tiles ? half * (w.n / 2) + t * 8 : -1;
}

/* 16 tokens of a part of a warpgroup into shared memory, a row a token. */
template <bool GLU>
__device__ __forceinline__ void stage_part(uint8_t *stage, int row_bytes, const float *v,
                                           float2 bias, bool paired, int i, const w_thread &th)
{
    const int half = th.lane >> 3 & 1, col = GLU      ? i * 4 + th.warp
                                             : paired ? i * 8 + half * 4 + th.warp
                                                      : i * 8 + th.warp * 2 + half;
    uint32_t r[4]; /* tokens 0..7: rows g, g + 8; tokens 8..15 */
#pragma unroll
    for (int e = 0; e < 4; e++) {
        const float b = e & 1 ? bias.y : bias.x, *a = v + e * 2;
        if (GLU && (e & 1)) continue;
        const __half2 h = GLU ? __floats2half2_rn(w4_gated(a[0] + b, a[2] + bias.y),
                                                  w4_gated(a[1] + b, a[3] + bias.y))
                              : __floats2half2_rn(a[0] + b, a[1] + b);
        r[e] = *(const uint32_t *)&h;
    }
    if (GLU) r[1] = r[0], r[3] = r[2]; /* both halves write the same there */
    stmatrix4_trans(stage + ((th.lane >> 4) * 8 + (th.lane & 7)) * row_bytes + col * 16, r);
}

/* f16 outputs of a tile by way of shared memory, 16 tokens at a time, so that stores are 16 bytes
 * and neighbours. `tile`: the first of the warpgroup. */
template <int GROUP, bool GLU>
__device__ __forceinline__ void store_staged(const float (*acc)[TOKENS / 2], const w4_tiles &w,
                                             const w4_wide_call &c, int tile, int token,
                                             uint8_t *stage, const w_thread &th)
{
    typedef w_shape<GROUP> S;
    constexpr int PIECES = S::PARTS * (GLU ? 4 : 8);
    const int in = th.warp * 32 + th.lane, piece = in % PIECES, o = piece_row<GLU>(w, tile, piece);
    float2 bias[S::PARTS];
#pragma unroll
    for (int i = 0; i < S::PARTS; i++) bias[i] = bias_of(w, tile + i * 4 + th.warp, th.lane >> 2);
#pragma unroll
    for (int j = 0; j < TOKENS / 16; j++) {
        if (token + j * 16 >= c.m) break;
#pragma unroll
        for (int i = 0; i < S::PARTS; i++)
            stage_part<GLU>(stage, S::ROW, acc[i] + j * 8, bias[i], w.paired, i, th);
        bar_sync_id(2 + th.group, 128);
#pragma unroll
        for (int r = in / PIECES; r < 16; r += 128 / PIECES)
            if (token + j * 16 + r < c.m && o >= 0)
                *(uint4 *)((__half *)c.y + (size_t)(token + j * 16 + r) * c.ldy +
                           o) = *(const uint4 *)(stage + r * S::ROW + piece * 16);
        bar_sync_id(2 + th.group, 128);
    }
}

template <int GROUP, put_kind KIND>
__device__ __forceinline__ void store_each(const float (*acc)[TOKENS / 2], const w4_tiles &w,
                                           const w4_wide_call &c, int tile, int token,
                                           const w_thread &th)
{
#pragma unroll
    for (int i = 0; i < w_shape<GROUP>::PARTS; i++)
        put_eights<KIND, TOKENS / 8>(w, c, tile + i * 4 + th.warp, token, acc[i], th.lane);
}

template <int GROUP>
__device__ __forceinline__ void store_tile(const float (*acc)[TOKENS / 2], const w4_tiles &w,
                                           const w4_wide_call &c, int2 place, uint8_t *stage,
                                           const w_thread &th)
{
    typedef w_shape<GROUP> S;
    const int tile = place.x * W4_TILES + th.group * S::PARTS * 4, token = place.y * TOKENS;
    stage += th.group * 16 * S::ROW;
    if (c.wide && c.add)
        store_each<GROUP, PUT_FLOAT_ADD>(acc, w, c, tile, token, th);
    else if (c.wide)
        store_each<GROUP, PUT_FLOAT>(acc, w, c, tile, token, th);
    else if (c.add)
        store_each<GROUP, PUT_HALF_ADD>(acc, w, c, tile, token, th);
    else if (c.glu)
        store_staged<GROUP, true>(acc, w, c, tile, token, stage, th);
    else
        store_staged<GROUP, false>(acc, w, c, tile, token, stage, th);
}

/* ---- tiles that blocks share ---- */

/* Sums lie as [block][2][float4 of a thread][THREADS]: the second for a tile that the block only
 * begins behind another. */
template <int GROUP>
__device__ __forceinline__ float4 *sums_of(const w4_wide_call &c, int block, int second)
{
    typedef w_shape<GROUP> S;
    return (float4 *)c.sums + ((size_t)block * 2 + second) * (S::PARTS * TOKENS / 8) * S::THREADS;
}

__device__ __forceinline__ int seen(const int *p)
{
    int v;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
__device__ __forceinline__ float4 load_sum(const float4 *p) /* of another block: not from L1 */
{
    float4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p));
    return v;
}

template <int GROUP>
__device__ __forceinline__ void leave_sums(const float (*acc)[TOKENS / 2], const w4_wide_call &c,
                                           int second, int *arrived)
{
    typedef w_shape<GROUP> S;
    float4 *out = sums_of<GROUP>(c, blockIdx.x, second) + threadIdx.x;
#pragma unroll
    for (int i = 0; i < S::PARTS; i++)
#pragma unroll
        for (int j = 0; j < TOKENS / 8; j++)
            out[(i * (TOKENS / 8) + j) * S::THREADS] = make_float4(
                acc[i][4 * j], acc[i][4 * j + 1], acc[i][4 * j + 2], acc[i][4 * j + 3]);
    __threadfence();
    bar_sync<1, S::THREADS>();
    if (threadIdx.x == 0) atomicAdd(arrived, 1);
}

/* Sums of BATCH items from `item` over the n blocks from `first`, in their order; all loads of a
 * few blocks are in flight at once. */
template <int GROUP, int BATCH>
__device__ __forceinline__ void add_shares(float (&v)[BATCH][4], const w4_wide_call &c, int first,
                                           int n, bool first_second, int item)
{
    typedef w_shape<GROUP> S;
    constexpr int ITEMS = S::PARTS * TOKENS / 8;
#pragma unroll
    for (int x = 0; x < BATCH; x++) v[x][0] = v[x][1] = v[x][2] = v[x][3] = 0.f;
#pragma unroll 4
    for (int b = 0; b < n; b++) {
        const float4 *sums = sums_of<GROUP>(c, first + b, b == 0 && first_second) + threadIdx.x;
        float4 f[BATCH];
#pragma unroll
        for (int x = 0; x < BATCH; x++)
            f[x] = load_sum(sums + min(item + x, ITEMS - 1) * S::THREADS);
#pragma unroll
        for (int x = 0; x < BATCH; x++)
            v[x][0] += f[x].x, v[x][1] += f[x].y, v[x][2] += f[x].z, v[x][3] += f[x].w;
    }
}

/* This block's share of a tile that blocks first..first + n - 1 worked on. */
template <int GROUP>
__device__ __forceinline__ void finish_share(const w4_tiles &w, const w4_wide_call &c,
                                             const w_plan &p, int tile, int *arrived,
                                             const w_thread &th)
{
    typedef w_shape<GROUP> S;
    constexpr int ITEMS = S::PARTS * TOKENS / 8, BATCH = 4;
    const int begin = (tile - p.whole) * w.units, first = owner_of(p, w.units, begin),
              n = owner_of(p, w.units, begin + w.units - 1) - first + 1,
              me = (int)blockIdx.x - first;
    const int2 place = place_of(p, tile);
    if (threadIdx.x == 0)
        while (seen(arrived) < n) {
        }
    bar_sync<1, S::THREADS>();
    const int end = (me + 1) * ITEMS / n;
    for (int item = me * ITEMS / n; item < end; item += BATCH) {
        float v[BATCH][4];
        add_shares<GROUP, BATCH>(v, c, first, n, share_begin(p, w.units, first) < begin, item);
#pragma unroll
        for (int x = 0; x < BATCH; x++) {
            const int i = (item + x) / (TOKENS / 8),
                      token = place.y * TOKENS + (item + x) % (TOKENS / 8) * 8,
                      at = place.x * W4_TILES + (th.group * S::PARTS + i) * 4 + th.warp;
            if (item + x < end) put_any(w, c, at, token, v[x], th.lane);
        }
    }
    bar_sync<1, S::THREADS>();
    if (threadIdx.x == 0 && atomicAdd(arrived + 1, 1) == n - 1) arrived[0] = arrived[1] = 0;
}

template <int GROUP>
__device__ __forceinline__ void consume(uint8_t *ring, uint64_t *full, uint64_t *empty,
                                        const w4_tiles &w, const w4_wide_call &c, const w_plan &p)
{
    typedef w_shape<GROUP> S;
    const w_thread th = {(int)threadIdx.x >> 7, (int)threadIdx.x >> 5 & 3, (int)threadIdx.x & 31};
    float acc[S::PARTS][TOKENS / 2];
    int slot = 0, round = 0, left0 = -1, left1 = -1;
    w_cursor at = first_work(p, w.units);
    w_segment s;
    pdl_wait();
    while (next_work(p, w.units, &at, &s)) {
        multiply<GROUP>(acc, ring, full, empty, s.to - s.from, &slot, &round, th);
        if (s.to - s.from == w.units)
            store_tile<GROUP>(acc, w, c, place_of(p, s.tile), ring + S::STAGES * S::STAGE, th);
        else {
            leave_sums<GROUP>(acc, c, left0 >= 0, c.arrived + 2 * (s.tile - p.whole));
            left1 = left0 >= 0 ? s.tile : -1;
            left0 = left0 >= 0 ? left0 : s.tile;
        }
    }
    for (; left0 >= 0; left0 = left1, left1 = -1)
        finish_share<GROUP>(w, c, p, left0, c.arrived + 2 * (left0 - p.whole), th);
}

#endif

template <int GROUP>
__global__ void __launch_bounds__(w_shape<GROUP>::THREADS + 128, 1)
    gemm_w4_wide_kernel(const __grid_constant__ CUtensorMap codes,
                        const __grid_constant__ CUtensorMap x, w4_tiles w, w4_wide_call c, w_plan p)
{
#ifdef TMF_SM90A
    typedef w_shape<GROUP> S;
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint64_t full[S::STAGES], empty[S::STAGES];
    uint8_t *ring = (uint8_t *)(((uintptr_t)memory + 1023) & ~(uintptr_t)1023);
    pdl_launch();
    if (threadIdx.x == S::THREADS) tensor_ahead(&codes), tensor_ahead(&x);
    if (threadIdx.x == 0) {
        for (int i = 0; i < S::STAGES; i++)
            mbar_init(&full[i], 1), mbar_init(&empty[i], S::GROUPS * 4);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x >= S::THREADS) {
        fewer_regs<40>();
        if (threadIdx.x == S::THREADS) produce<GROUP>(ring, full, empty, &codes, &x, p, w.units);
    } else {
        more_regs<232>(); /* what the producers give back */
        consume<GROUP>(ring, full, empty, w, c, p);
    }
#endif
}

/* ---- host ---- */

/* Tiles that fill waves of blocks go whole; so does a wave that is nearly full. */
static w_plan plan_of(const w4_tiles *w, int m, int sms)
{
    w_plan p;
    p.tiles_w = (w->tiles + W4_TILES - 1) / W4_TILES;
    p.tiles_x = (m + TOKENS - 1) / TOKENS;
    const int all = p.tiles_w * p.tiles_x, rest = all % sms;
    const bool cut = rest < sms - sms / 8 && (all < sms || rest * w->units >= 2 * sms);
    p.shared = cut ? rest : 0;
    p.whole = all - p.shared;
    return p;
}

template <int GROUP>
static cudaError_t launch_wide(const w4_tiles *w, const w4_wide_call *c, int sms,
                               cudaStream_t stream)
{
    typedef w_shape<GROUP> S;
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    CUtensorMap codes, x;
    const w_plan p = plan_of(w, c->m, sms);
    cudaError_t rc = matrix_map(&x, c->x, w->k, c->m, c->ldx, TOKENS);
    if (rc == cudaSuccess)
        rc = bytes_map(&codes, w->data, (int64_t)w->units * S::UNIT, w->tiles, S::UNIT, W4_TILES);
    if (rc == cudaSuccess)
        rc = cudaFuncSetAttribute(gemm_w4_wide_kernel<GROUP>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, S::SMEM);
    if (rc != cudaSuccess) return rc;
    const int most = p.shared ? p.whole ? sms : p.shared * w->units : p.whole;
    cfg.gridDim = dim3((unsigned)(most < sms ? most : sms));
    cfg.blockDim = dim3(S::THREADS + 128);
    cfg.dynamicSmemBytes = S::SMEM;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = 1;
    return cudaLaunchKernelEx(&cfg, gemm_w4_wide_kernel<GROUP>, codes, x, *w, *c, p);
}

size_t gemm_w4_wide_sums(int sms) { return (size_t)sms * 2 * TILE_ROWS * TOKENS * sizeof(float); }

bool gemm_w4_wide_takes(const w4_tiles *w, const w4_wide_call *c)
{
    return (uintptr_t)c->x % 16 == 0 && c->ldx % 8 == 0 && (uintptr_t)c->y % 16 == 0 &&
           c->ldy % 8 == 0 && w->n % 8 == 0;
}

cudaError_t gemm_w4_wide(const w4_tiles *w, const w4_wide_call *c, int sms, cudaStream_t stream)
{
    if (w->group == 128) return launch_wide<128>(w, c, sms, stream);
    if (w->group == 64) return launch_wide<64>(w, c, sms, stream);
    return launch_wide<32>(w, c, sms, stream);
}
