/* See decode_pass.cuh. A block has three kinds of warps. In a product CW of them multiply, each by
 * the inputs whose planes it made itself, so that no barrier stands between a step's inputs and its
 * products (decode_pass_product.cuh); FINISHERS add up in turn what they leave and write it, and
 * the last of these brings the cache of an attention that comes next near. All of them do
 * attention together. The producer, a warp more, asks for weights all the time. Registers are the
 * tight thing here: what spills costs a tenth of the speed and more. */
#include "kernels/decode_pass.cuh"

#define ATTN_WARPS 11 /* attention has the whole block but its producer as one team */
#include "kernels/decode_pass_attn.cuh"

#define WARPS       ATTN_WARPS
#define PRODUCER    WARPS        /* one warp more */
#define FINISHERS   (WARPS - CW) /* the warps behind those that multiply */
#define MAX_TABLE   512
#define SHARED_MOST (227 * 1024 - 7168) /* of a block, less what is declared in the kernel */
#define STEP_WORDS  ((int)sizeof(decode_step) / 4)

/* ---- steps ---- */

__device__ __forceinline__ void block_sync() /* all but the producer */
{
    asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
}

/* By one thread when `warps` of a block's FINISHERS are done with a step. When those of all blocks
 * are, nobody needs what it reads any more: a tile's sums are there only when its inputs are read.
 */
__device__ __forceinline__ void arrive(const decode_pass &p, uint32_t *set, int step, int warps)
{
    uint32_t *left = set + DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS + step;
    asm volatile("red.add.relaxed.gpu.global.u32 [%0], %1;" ::"l"(left), "r"(warps) : "memory");
    if (step + 1 < p.n || atomicAdd(p.launches, warps) != FINISHERS * (int)gridDim.x - warps)
        return;
    p.launches[0] = 0;
    p.launches[1]++;
}

/* Where arrivals of the step before the last are counted. */
__device__ __forceinline__ const uint32_t *left_of(const uint32_t *set, int step)
{
    return set + DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS + max(step - 2, 0);
}
/* By one thread in each step, before its warp or block writes: until every block has left the step
 * before the last, so that nobody needs what was in the slot. It rarely waits. seen: what left_of
 * had a while ago. */
__device__ __forceinline__ void slot_wait(const uint32_t *set, int step, uint32_t seen)
{
    while (step > 1 && seen < FINISHERS * gridDim.x) seen = fresh_load(left_of(set, step));
}

/* Words that are two uses of a slot old look new. So before a warp polls those of step `made`, what
 * wrote over them must be there. It is when the warp saw results of a step soon enough before, as
 * these came of all that others made (products) or of some of it (attention); a warp that had
 * nothing to do for long asks, and for the step behind that: nothing orders a step's words before
 * the count of who left it, but who left the next wrote them a step ago. What is known with the
 * words there. */
__device__ __forceinline__ int settled(const uint32_t *set, int made, int known)
{
    const int over = made - DECODE_PASS_SLOTS + 1;
    while (over > known && fresh_load(left_of(set, over + 2)) < FINISHERS * gridDim.x) continue;
    return max(known, made - DECODE_PASS_BACK);
}

/* The thread's number, asked for in each step: so nothing that follows from it is worked out ahead
 * of the steps and kept in registers over all of them. */
__device__ __forceinline__ int thread_now(void)
{
    uint32_t v;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(v));
    return (int)v;
}

/* Where a step leaves its results, and the tag of its words. */
__device__ __forceinline__ uint32_t *slot_of(uint32_t *set, int step)
{
    return set + step % DECODE_PASS_SLOTS * DECODE_PASS_SLOT_WORDS;
}
__device__ __forceinline__ uint32_t tag_of(int step) { return (step / DECODE_PASS_SLOTS + 1) & 1; }

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
__device__ __forceinline__ void seek(const decode_pass &p, const decode_step *steps, feeder *f)
{
    while (f->tile >= f->tiles && ++f->step < p.n) {
        const decode_step &s = steps[f->step];
        if (s.attn) continue;
        f->data = s.data, f->units = s.k / 128, f->tiles = (s.n + 15) / 16;
        f->tile = first_tile(s);
    }
}

/* Asks for one slab after another, each when its place is free. */
__device__ __forceinline__ void produce(const decode_pass &p, const decode_step *steps,
                                        const weight_ring &r)
{
    feeder f = {-1, 0, 0, 0, 0, 0, 0, NULL};
    for (seek(p, steps, &f); f.step < p.n;) {
        if (f.round) mbar_wait(&r.empty[f.slot], (f.round - 1) & 1);
        bulk_load(r.memory + f.slot * STAGE_BYTES,
                  f.data + ((size_t)f.tile * f.units + f.unit) * UNIT_BYTES,
                  min(STAGE_UNITS, f.units - f.unit) * UNIT_BYTES, &r.full[f.slot]);
        if (++f.slot == r.stages) f.slot = 0, f.round++;
        f.unit += STAGE_UNITS;
        if (f.unit < f.units) continue;
        f.unit = 0;
        f.tile += gridDim.x;
        seek(p, steps, &f);
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
                                           uint32_t tag, float v, float held, float bias, int tile,
                                           int lane)
{
    const int r = lane & 15, row = w4_row(w.n, w.paired, tile, r), o = s.glu ? tile * 8 + r : row;
    const bool mine = lane < (s.glu ? 8 : 16) && row < w.n;
    v += bias;
    if (s.glu) {
        v = __half2float(__float2half_rn(v));
        const float up = __shfl_down_sync(~0u, v, 8);
        v = __fdividef(v, 1.f + __expf(-v)) * up;
        v = fminf(fmaxf(v, -65504.f), 65504.f);
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

/* All sums of row `lane` of a tile; *factor: of the norm, when `norm`. */
__device__ __forceinline__ float sums_of(const tile_sums *t, int turn, const decode_step &s,
                                         bool norm, float *factor, int lane)
{
    const float *at = &t->sums[turn][lane >> 4][lane & 15];
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < CW / 2; k++) v += at[k * 32];
    v += __shfl_xor_sync(~0u, v, 16);
    if (norm) {
        float sum = t->squares[turn][lane & (CW - 1)];
#pragma unroll
        for (int x = CW / 2; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
        *factor = rsqrtf(sum / (float)s.k + s.eps);
    }
    return v;
}

/* By warps CW.. in turn over all steps, as one that waits for a tile must know that the one TURNS
 * before is done: they alone write what the product makes. done: tiles before. Whether there was
 * one for this finisher. */
__device__ __forceinline__ bool finish(const decode_step &s, int step, uint32_t *set,
                                       const w4_tiles &w, uint32_t done, tile_sums *t, int finisher,
                                       int lane)
{
    uint32_t *out = slot_of(set, step);
    const uint32_t tag = tag_of(step);
    const int grid = (int)gridDim.x;
    float factor = 1.f;
    bool first = true;
    const int skip = (int)((finisher + FINISHERS - done % FINISHERS) % FINISHERS);
    done += skip;
#pragma unroll 1
    for (int tile = first_tile(s) + skip * grid; tile < w.tiles;
         tile += FINISHERS * grid, done += FINISHERS) {
        const int turn = done % TURNS, row = w4_row(w.n, w.paired, tile, lane & 15);
        slot_wait(set, step, first && lane == 0 ? fresh_load(left_of(set, step)) : ~0u);
        __syncwarp(); /* from here on what is held is no older than it looks */
        const float held = held_of(s, w, step, set, tile, lane),
                    bias = w.bias && row < w.n ? __half2float(w.bias[row]) : 0.f;
        mbar_wait(&t->full[turn], done / TURNS & 1);
        const float v = sums_of(t, turn, s, first && s.norm, &factor, lane);
        first = false;
        __syncwarp();
        if (lane == 0) mbar_arrive(&t->empty[turn]);
        store_tile(s, w, out, tag, v * factor, held, bias, tile, lane);
    }
    return !first;
}

#define FETCH_TOKENS 256 /* of a part */

/* Asks for bytes to come into L2; address and bytes multiples of 16. */
__device__ __forceinline__ void prefetch_bulk(const void *p, int bytes)
{
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(p), "r"(bytes) : "memory");
}
/* Brings the cache of this block's parts of the attention step `next` into L2: behind the weights
 * that are on their way it would wait for long. By one warp. */
template <int D, int BITS>
__device__ __forceinline__ void fetch_cache(const decode_pass &p, const decode_step &next,
                                            const int32_t *table, const int32_t *len, int lane)
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
        for (int tok = (lo / c.block_tokens + lane) * c.block_tokens; tok < hi;
             tok += 32 * c.block_tokens) {
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
__device__ __forceinline__ void product(const decode_pass &p, const decode_step &s, int step,
                                        uint32_t *set, const weight_ring &ring, ring_place *place,
                                        uint8_t *rows, tile_sums *sums, const int32_t *table,
                                        const int32_t *len)
{
    const int lane = thread_now() & 31, warp = thread_now() >> 5;
    const w4_tiles w = tiles_of(s);
    const int first = first_tile(s), finisher = warp - CW;
    ring_place g = *place;
    if (finisher < 0) {
        if (first >= w.tiles) return;
        const own_row own = row_of(rows + warp * (p.row_bytes / CW), w.units);
        const step_input in = input_of(s, step, set);
        if (s.in && warp < w.units) g.known = settled(set, step - s.in, g.known);
        float squares = 0.f;
        if (s.norm)
            squares = norm_row(own, s, in, warp, lane);
        else
            x_row(own, w.units, in, warp, lane);
        __syncwarp();
        walk_state k = {first, w.tiles, w.units, warp + (lane >> 1 & 1) * CW, 0, 0, 0, 0, squares};
        k.planes = smem_addr(own.planes) + lane * 16;
        k.scales = smem_addr(own.scales) + (lane & 3) * 8;
        k.sums = kept(smem_addr(sums));
        const uint32_t slab = kept(smem_addr(ring.memory) + warp * UNIT_BYTES);
        const ring_view r = {slab + lane * 16,
                             slab + 1024 + (lane >> 1 & 1) * CW * UNIT_BYTES + (lane >> 2) * 8,
                             kept(smem_addr(ring.full)), ring.stages};
        multiply(&k, r, &g, warp, lane);
        if (lane == 0) *place = g;
        return;
    }
    const decode_step *next = &s + 1; /* of all, which lie beside each other */
    if (finisher == FINISHERS - 1 && step + 1 < p.n && next->attn)
        fetch_cache<D, BITS>(p, *next, table, len, lane);
    if (finish(s, step, set, w, g.done, sums, finisher, lane)) g.known = max(g.known, step - 2);
    if (first < w.tiles) g.done += (w.tiles - first + (int)gridDim.x - 1) / (int)gridDim.x;
    __syncwarp();
    if (lane == 0) *place = g, arrive(p, set, step, 1);
}

/* ---- attention ---- */

static_assert(WARPS > 8 + 2, "each vector has a warp of its own, and the last warp has none");

template <int D, int BITS, int H>
__device__ __forceinline__ void
attention(const decode_pass &p, const decode_step &s, int step, uint32_t *set, ring_place *place,
          uint8_t *work, const float (*angles)[128], const int32_t *len, const int32_t *table)
{
    constexpr int U = BITS == 4 ? 2 : 1;
    const attn_team tm = {thread_now(), 1};
    const int lane = tm.thread & 31, warp = tm.thread >> 5;
    if (blockIdx.x >= p.attn_items) { /* nothing to do but to let the others know */
        if (warp >= CW && lane == 0) arrive(p, set, step, 1);
        return;
    }
    if (s.in) { /* before anything is asked for: what looks new must be */
        const int known = settled(set, step - s.in, place->known);
        __syncwarp();
        if (lane == 0) place->known = known;
    }
    attn_memory sh = attn_memory_of<D>(work, min(8, p.attn.group), angles);
    sh.out = slot_of(set, step), sh.out_tag = tag_of(step), sh.quiet = s.quiet;
    attn_decode_call c = p.attn;
    c.data = s.data, c.param = (const __half2 *)s.extra, c.window = s.n;
    c.rope.data = (uint8_t *)s.data, c.rope.param = (__half2 *)s.extra;
    c.kv_len = len, c.table = table;
#pragma unroll 1
    for (int i = blockIdx.x; i < p.attn_items; i += gridDim.x) {
        tile_regs<D, BITS> cur[U];
        const int slot = c.splits > 1 ? i / c.splits : i;
        /* A warp's vector before all else, as everything waits for it. */
        const int split = i - slot * c.splits, more = split == c.splits - 1 ? 2 : 0;
        int head = slot, hg = 0;
        if (c.group > 8) hg = (c.group + 7) / 8, head = slot / hg, hg = slot - head * hg;
        const __half *x = newest_vector(c.rope, warp, more, 0, head, hg);
        step_input in = input_of(s, step, set);
        in.at = s.in ? (const void *)((const uint32_t *)in.at + (x - c.rope.q)) : (const void *)x;
        fresh_vector<D> asked = {};
        if (warp < min(8, c.group - hg * 8) + more) ask_vector<D>(&asked, in, lane);
        const attn_part part = part_of<U>(c, split, slot, 0);
        /* the warp's first tile, or any: what is not loaded here would be kept from step to step */
        load_tiles<D, BITS, U>(cur, c, table, max(min(part.lo + warp, part.hi - 1), 0), part.head,
                               lane >> 2, lane & 3);
        if (tm.thread == (WARPS - 1) * 32) /* it has no vector; a barrier follows before a write */
            slot_wait(set, step, fresh_load(left_of(set, step)));
        attn_decode_item<D, BITS, U, false, H>(
            tm, c, sh, (out_rows<D> *)NULL, part, cur, 0, [&](bool append) {
                const int v = thread_now() >> 5; /* the warp's, as above, and not kept */
                if (v < part.heads + (append ? 2 : 0))
                    enter_vector<D, BITS>(c, sh, part, &asked, in, v, append ? 2 : 0, table,
                                          thread_now() & 31);
            });
        team_sync(tm);
    }
    if (tm.thread == 0) arrive(p, set, step, FINISHERS);
}

template <int D, int BITS, int H>
__global__ void __launch_bounds__((WARPS + 1) * 32, 1)
    decode_pass_kernel(const __grid_constant__ decode_pass p)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t memory[];
    __shared__ uint64_t bars[2 * MAX_STAGES]; /* of full places of the ring, of empty ones */
    __shared__ tile_sums sums;
    __shared__ float angles[2][128];
    __shared__ int32_t len, table[MAX_TABLE]; /* what attention asks for again and again */
    __shared__ ring_place places[WARPS];      /* where each warp is */
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const weight_ring r = {memory, bars, bars + MAX_STAGES, p.stages};
    uint8_t *rows = memory + p.stages * STAGE_BYTES, *work = rows + p.row_bytes;
    /* For all warps: kernel parameters are slow to read, and leave their cache. */
    decode_step *steps = (decode_step *)(rows + p.steps_at);
    for (int i = threadIdx.x; i < p.n * STEP_WORDS; i += (WARPS + 1) * 32)
        ((uint32_t *)steps)[i] = ((const uint32_t *)p.steps)[i];
    if (threadIdx.x == PRODUCER * 32) {
        for (int i = 0; i < p.stages; i++)
            mbar_init(&bars[i], 1), mbar_init(&bars[MAX_STAGES + i], CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == PRODUCER) {
        if (lane == 0) produce(p, steps, r);
        return;
    }
    if (threadIdx.x == 0)
        for (int i = 0; i < TURNS; i++) mbar_init(&sums.full[i], CW), mbar_init(&sums.empty[i], 1);
    if (threadIdx.x == 0 && p.attn_items) len = p.attn.kv_len[0];
    const bool near = p.attn.table_stride <= MAX_TABLE;
    for (int i = threadIdx.x; p.attn_items && near && i < p.attn.table_stride; i += WARPS * 32)
        table[i] = p.attn.table[i];
    if (p.attn_items) newest_angles(angles, p.attn.rope, p.attn.kv_len[0] - 1);
    const int launch = p.launches[1] & 1;
    uint32_t *set = p.exchange + launch * DECODE_PASS_SET_WORDS;
    uint4 *other = (uint4 *)(p.exchange + (launch ^ 1) * DECODE_PASS_SET_WORDS);
    for (int i = blockIdx.x * WARPS * 32 + threadIdx.x; i < DECODE_PASS_SET_WORDS / 4;
         i += gridDim.x * WARPS * 32)
        other[i] = make_uint4(0, 0, 0, 0); /* for the next launch */
    if (lane == 0) places[warp] = {0, 0, 0, -1};
    block_sync();
#pragma unroll 1
    for (int i = 0; i < p.n; i++) {
        const decode_step &s = steps[i];
        if (s.attn)
            attention<D, BITS, H>(p, s, i, set, &places[warp], work, angles, &len,
                                  near ? table : p.attn.table);
        else
            product<D, BITS>(p, s, i, set, r, &places[warp], rows, &sums,
                             near ? table : p.attn.table, &len);
        __syncwarp();
    }
#endif
}

/* ---- launch ---- */

int decode_pass_row_bytes(int units)
{
    return (units + STAGE_UNITS - 1) / STAGE_UNITS * CW * (SET_BYTES + 32);
}

int decode_pass_attn_bytes(int head_dim, int group)
{
    return (ATTN_TEAM_BYTES(head_dim, group < 8 ? group : 8) + 15) & ~15;
}

bool decode_pass_fits(int64_t k)
{
    return k % 128 == 0 && k <= 32768 &&
           decode_pass_row_bytes((int)(k / 128)) + decode_pass_attn_bytes(128, 8) +
                   DECODE_PASS_STEPS * (int)sizeof(decode_step) + 4 * STAGE_BYTES <=
               SHARED_MOST;
}

template <int D, int BITS, int H>
static cudaError_t launch(decode_pass *p, int attn_bytes, int sms, cudaStream_t stream)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    void *args[] = {p};
    const int work_bytes = p->row_bytes + attn_bytes + p->n * (int)sizeof(decode_step);
    p->steps_at = p->row_bytes + attn_bytes;
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

cudaError_t decode_pass_run(decode_pass *p, int head_dim, int bits, int attn_bytes, int sms,
                            cudaStream_t stream)
{
#define CASE(D, H)                                                    \
    return bits == 16  ? launch<D, 16, H>(p, attn_bytes, sms, stream) \
           : bits == 8 ? launch<D, 8, H>(p, attn_bytes, sms, stream)  \
                       : launch<D, 4, H>(p, attn_bytes, sms, stream)
    const bool two = p->attn_items && p->attn.group > 4; /* heads a lane */
    if (head_dim == 64 && two) CASE(64, 2);
    if (head_dim == 64) CASE(64, 1);
    if (two) CASE(128, 2);
    CASE(128, 1);
#undef CASE
}
