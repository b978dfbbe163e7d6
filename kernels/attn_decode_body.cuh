/* The body of split-KV decode attention: what one team of warps does for one part of one head.
 * Shared by the kernel of attention alone and by the decode pass. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_DECODE_BODY_CUH
#define TMF_KERNELS_ATTN_DECODE_BODY_CUH

#include "kernels/attn_decode_tile.cuh"

/* Outputs of a block's heads: thread i holds (head i / D, channel i % D) of each NWARPS * 32. With
 * planes a head is a unit of the product behind, which a warp makes of it. */
template <int D> struct out_rows {
    float v[8][D]; /* as f16 rounds them */
};

/* The threads that work on one part of one head: NWARPS warps of a block and their barrier. */
typedef struct {
    int thread, barrier;
} attn_team;
__device__ __forceinline__ void team_sync(const attn_team &tm)
{
    asm volatile("bar.sync %0, %1;" ::"r"(tm.barrier), "n"(NWARPS * 32) : "memory");
}

/* Shared memory of a team, for `heads` query heads (up to 8) of a KV head. */
typedef struct {
    float *merged;              /* [NWARPS][heads][D + 2] */
    __half *turned_q;           /* [heads][D] */
    float *weight, *norm;       /* [heads][ATTN_MAX_SPLITS], [heads] */
    const float (*angles)[128]; /* cos and sin of the newest position; not the team's alone */
    uint32_t *newest; /* [2][D / 2 + 1] K and V of the newest token: a row, scale and zero */
    int *last;
    uint32_t *out; /* or NULL: fresh words of y */
    uint32_t out_tag;
    bool quiet; /* y itself is not written */
} attn_memory;
#define NEWEST_WORDS(D) ((D) / 2 + 1)
#define ATTN_TEAM_BYTES(D, heads)                                                  \
    ((heads) * (NWARPS * ((D) + 2) * 4 + (D)*2 + (ATTN_MAX_SPLITS + 1) * 4) + 16 + \
     2 * NEWEST_WORDS(D) * 4)

/* Cuts `memory`, ATTN_TEAM_BYTES aligned to 16. */
template <int D>
__device__ __forceinline__ attn_memory attn_memory_of(uint8_t *memory, int heads,
                                                      const float (*angles)[128])
{
    attn_memory m = {};
    m.turned_q = (__half *)memory;
    m.merged = (float *)(m.turned_q + heads * D);
    m.weight = m.merged + NWARPS * heads * (D + 2);
    m.norm = m.weight + heads * ATTN_MAX_SPLITS;
    m.newest = (uint32_t *)(m.norm + heads);
    m.last = (int *)(m.newest + 2 * NEWEST_WORDS(D));
    m.angles = angles;
    return m;
}
/* Channels d and d + 1 of head h. */
template <int D>
__device__ __forceinline__ void store_out(const attn_decode_call &c, const attn_memory &sh,
                                          out_rows<D> *rows, int seq, int head, int hg, int h,
                                          int d, float o0, float o1)
{
    const size_t at = ((size_t)head * c.group + hg * 8 + h) * D + d;
    __half2 r = __floats2half2_rn(o0, o1);
    if (sh.out) {
        const uint32_t w = fresh_pair(*(const uint32_t *)&r);
        fresh_store(sh.out + at / 2, w | sh.out_tag);
        r = *(const __half2 *)&w;
    }
    if (!sh.quiet) {
        c.y[seq * c.y_row + at] = __low2half(r);
        c.y[seq * c.y_row + at + 1] = __high2half(r);
    }
    if (D == 128 && c.planes.planes)
        rows->v[h][d] = __low2float(r), rows->v[h][d + 1] = __high2float(r);
}
template <int D>
__device__ __forceinline__ void store_out_planes(const attn_team &tm, const attn_decode_call &c,
                                                 const out_rows<D> *rows, int seq, int head, int hg,
                                                 int heads)
{
    if (D != 128 || !c.planes.planes) return;
    const int lane = tm.thread & 31;
    team_sync(tm);
    for (int h = tm.thread >> 5; h < heads; h += NWARPS) {
        const float4 f = *(const float4 *)&rows->v[h][lane * 4];
        const float v[4] = {f.x, f.y, f.z, f.w};
        w4_store_planes(c.planes, head * c.group + hg * 8 + h, seq, v, lane);
    }
}

#define MERGE_LOADS 16 /* of a channel in flight; divides ATTN_MAX_SPLITS */

/* The last block adds up the splits, in their order: first how much each counts, then the
 * channels, whose loads do not wait for each other. */
template <int D>
__device__ __forceinline__ void
merge_splits(const attn_team &tm, const attn_decode_call &c, const float *all,
             const attn_memory &sh, out_rows<D> *rows, int seq, int head, int hg, int heads)
{
    constexpr int PART = geom<D, 16>::PART;
    const int lane = tm.thread & 31, warp = tm.thread >> 5;
    for (int h = warp; h < heads; h += NWARPS) {
        float top = -INFINITY, sum = 0.f, m[ATTN_MAX_SPLITS / 32], l[ATTN_MAX_SPLITS / 32];
#pragma unroll
        for (int i = 0; i < ATTN_MAX_SPLITS / 32; i++) {
            const int s = lane + 32 * i;
            m[i] = s < c.splits ? all[(size_t)s * PART + h * (D + 2) + D] : -INFINITY;
            l[i] = s < c.splits ? all[(size_t)s * PART + h * (D + 2) + D + 1] : 0.f;
            top = fmaxf(top, m[i]);
        }
        for (int x = 16; x; x >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, x));
#pragma unroll
        for (int i = 0; i < ATTN_MAX_SPLITS / 32; i++) {
            const float f = exp2f(m[i] - top);
            sh.weight[h * ATTN_MAX_SPLITS + lane + 32 * i] = f;
            sum += f * l[i];
        }
        for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
        if (lane == 0) sh.norm[h] = 1.f / sum;
    }
    team_sync(tm);
    for (int i = tm.thread; i < heads * D / 2; i += NWARPS * 32) {
        const int h = i / (D / 2), d = i % (D / 2) * 2;
        const float *at = all + h * (D + 2) + d, *weight = sh.weight + h * ATTN_MAX_SPLITS;
        float2 o = make_float2(0.f, 0.f);
        for (int s = 0; s < c.splits; s += MERGE_LOADS) {
            float2 v[MERGE_LOADS];
#pragma unroll
            for (int j = 0; j < MERGE_LOADS; j++) /* beyond the last split weights are 0 */
                v[j] = __ldcg((const float2 *)(at + (size_t)min(s + j, c.splits - 1) * PART));
#pragma unroll
            for (int j = 0; j < MERGE_LOADS; j++)
                o.x += weight[s + j] * v[j].x, o.y += weight[s + j] * v[j].y;
        }
        store_out<D>(c, sh, rows, seq, head, hg, h, d, o.x * sh.norm[h], o.y * sh.norm[h]);
    }
    store_out_planes<D>(tm, c, rows, seq, head, hg, heads);
}

/* cos and sin of the newest token's position; needs nothing that an earlier kernel makes. */
__device__ __forceinline__ void newest_angles(float (*cs)[128], const rope_call &r, int pos)
{
    for (int j = threadIdx.x; j < r.dims / 2; j += blockDim.x) {
        float sn, co;
        sincosf((float)pos * r.inv_freq[j], &sn, &co);
        cs[0][j] = co * r.mscale, cs[1][j] = sn * r.mscale;
    }
}

/* A rotated (`turn`) or plain vector: lane holds channels lane + 32 * i. All loads at once. */
template <int D>
__device__ __forceinline__ void turned(float v[D / 32], const __half *x, const rope_call &r,
                                       const float (*cs)[128], bool turn, int lane)
{
    const int dims = turn ? r.dims : 0, half = dims / 2;
    float o[D / 32];
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        const int c = lane + 32 * i, other = c >= dims       ? c
                                             : r.interleaved ? c ^ 1
                                             : c < half      ? c + half
                                                             : c - half;
        v[i] = __half2float(x[c]), o[i] = __half2float(x[other]);
    }
#pragma unroll
    for (int i = 0; i < D / 32; i++) {
        const int c = lane + 32 * i;
        if (c >= dims) continue;
        const int j = r.interleaved ? c >> 1 : c < half ? c : c - half;
        const bool first = r.interleaved ? !(c & 1) : c < half;
        v[i] = first ? v[i] * cs[0][j] - o[i] * cs[1][j] : v[i] * cs[0][j] + o[i] * cs[1][j];
    }
}

/* What store_vector stores of a vector that lies as `turned` leaves it, to the cache and to
 * `newest`; codes: [D] bytes. */
template <int D, int BITS>
__device__ __forceinline__ void store_newest(const rope_call &r, const float v[D / 32],
                                             int64_t slot, uint32_t *newest, uint8_t *codes,
                                             int lane)
{
    constexpr int ROW = D * BITS / 8;
    uint8_t *out = r.data + slot * ROW;
    if (BITS == 16) {
#pragma unroll
        for (int i = 0; i < D / 32; i++) {
            const __half h = __float2half_rn(fminf(fmaxf(v[i], -65504.f), 65504.f));
            ((__half *)newest)[lane + 32 * i] = h, ((__half *)out)[lane + 32 * i] = h;
        }
        return;
    }
    float lo = INFINITY, hi = -INFINITY;
#pragma unroll
    for (int i = 0; i < D / 32; i++) lo = fminf(lo, v[i]), hi = fmaxf(hi, v[i]);
#pragma unroll
    for (int x = 16; x; x >>= 1) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, x));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, x));
    }
    const float top = BITS == 8 ? 255.f : 15.f;
    const __half scale = __float2half_rn((hi - lo) / top), zero = __float2half_rn(lo);
    const float s = __half2float(scale), z = __half2float(zero), inv = s > 0.f ? 1.f / s : 0.f;
    const __half2 both = __halves2half2(scale, zero);
    if (lane == 0) r.param[slot] = both, newest[D / 2] = *(const uint32_t *)&both;
#pragma unroll
    for (int i = 0; i < D / 32; i++)
        codes[lane + 32 * i] = (uint8_t)fminf(fmaxf(rintf((v[i] - z) * inv), 0.f), top);
    __syncwarp();
    for (int w = lane; w < ROW / 4; w += 32) {
        uint32_t q;
        if (BITS == 8)
            q = ((const uint32_t *)codes)[w];
        else { /* channels 2i in nibble i, 2i + 1 in nibble i + 4 */
            const uint32_t a = ((const uint32_t *)codes)[2 * w],
                           b = ((const uint32_t *)codes)[2 * w + 1];
            const uint32_t even = (a & 0xffu) | (a >> 12 & 0xf0u) | (b & 0xffu) << 8 |
                                  (b >> 4 & 0xf000u),
                           odd = (a >> 8 & 0xffu) | (a >> 20 & 0xf0u) | (b & 0xff00u) |
                                 (b >> 12 & 0xf000u);
            q = even | odd << 16;
        }
        newest[w] = q, ((uint32_t *)out)[w] = q;
    }
}

/* Vector i of the newest token's that a block rotates or stores: k and v when `more` is 2 and not
 * 0, then query heads. */
__device__ __forceinline__ const __half *newest_vector(const rope_call &r, int i, int more, int seq,
                                                       int head, int hg)
{
    const int h = i - more;
    return h >= 0 ? r.q + seq * r.q_row + head * r.q_head + (hg * 8 + h) * r.q_sub
           : i    ? r.v + seq * r.v_row + head * r.v_head
                  : r.k + seq * r.k_row + head * r.k_head;
}

/* Rotates the block's query heads into `turned_q`, and where the block reads the newest token, puts
 * that into the cache. */
template <int D, int BITS>
__device__ __forceinline__ void enter_newest(const attn_team &tm, const attn_decode_call &c,
                                             const attn_memory &sh, int seq, int head, int hg,
                                             int heads, int pos, int32_t block, bool append)
{
    const rope_call &r = c.rope;
    const int lane = tm.thread & 31, warp = tm.thread >> 5, more = append ? 2 : 0;
    for (int i = warp; i < heads + more; i += NWARPS) { /* k, v, query heads */
        const int h = i - more;
        const __half *x = newest_vector(r, i, more, seq, head, hg);
        float v[D / 32];
        turned<D>(v, x, r, sh.angles, h >= 0 || i == 0, lane);
        if (h < 0) {
            store_newest<D, BITS>(r, v,
                                  ((int64_t)block * r.kv_heads + head) * 2 * r.block_tokens +
                                      i * r.block_tokens + pos % r.block_tokens,
                                  sh.newest + i * NEWEST_WORDS(D), (uint8_t *)sh.merged + i * D,
                                  lane);
            continue;
        }
#pragma unroll
        for (int j = 0; j < D / 32; j++) sh.turned_q[h * D + lane + 32 * j] = __float2half_rn(v[j]);
    }
}

/* Puts the newest token, which is number `at` of a tile, into what was loaded before it was made.
 * */
template <int D, int BITS>
__device__ __forceinline__ void patch_tile(tile_regs<D, BITS> *r, const uint32_t *newest, int at,
                                           int g, int t)
{
    typedef geom<D, BITS> G;
    const uint32_t *k = newest, *v = newest + NEWEST_WORDS(D);
#pragma unroll
    for (int i = 0; i < 2; i++) {
        if (g + 8 * i != at) continue;
#pragma unroll
        for (int w = 0; w < G::KW; w++)
            r->k[i][w] = k[(w / (G::KV / 4) * 4 + t) * (G::KV / 4) + w % (G::KV / 4)];
        if (BITS < 16)
            r->kp[i] = *(const __half2 *)&k[D / 2], r->vp[i] = *(const __half2 *)&v[D / 2];
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (2 * t + (i & 1) + 8 * (i >> 1) != at) continue;
#pragma unroll
        for (int w = 0; w < G::VW; w++) {
            const int word = (w / (G::VV / 4) * 8 + g) * (G::VV / 4) + w % (G::VV / 4);
            r->v[i][w] = word < G::ROW / 4 ? v[word] : 0;
        }
    }
}

/* Channel of the first code of word w of lane t's part of a K row. */
template <int D, int BITS> __device__ __forceinline__ int channel_of_word(int w, int t)
{
    typedef geom<D, BITS> G;
    return ((w / (G::KV / 4) * 4 + t) * (G::KV / 4) + w % (G::KV / 4)) * 32 / BITS;
}

/* A head's query as planes of fixed point; its sum and scale on every lane of g. */
template <int D, int BITS, int H>
__device__ __forceinline__ void query_planes(query_regs<D, BITS, H> *q, int h, const __half2 *x,
                                             float *sum, float *scale, float scale_log2, int g,
                                             int t)
{
    constexpr int WORDS = geom<D, BITS>::KW, PER = 32 / BITS; /* channels of a word */
    float top = 0.f;
    uint32_t raw[WORDS][PER / 2];
#pragma unroll
    for (int w = 0; w < WORDS; w++)
#pragma unroll
        for (int i = 0; i < PER / 2; i++) {
            const __half2 v = x[channel_of_word<D, BITS>(w, t) / 2 + i];
            const float2 f = __half22float2(v);
            raw[w][i] = *(const uint32_t *)&v;
            *sum += f.x + f.y;
            top = fmaxf(top, fmaxf(fabsf(f.x), fabsf(f.y)));
        }
#pragma unroll
    for (int m = 1; m < 4; m <<= 1) {
        *sum += __shfl_xor_sync(~0u, *sum, m);
        top = fmaxf(top, __shfl_xor_sync(~0u, top, m));
    }
    const float inv = top > 0.f ? 32512.f / top : 0.f;
    *scale = top * (scale_log2 / 32512.f);
#pragma unroll
    for (int w = 0; w < WORDS; w++) {
        uint32_t byte[PER]; /* of this lane's plane */
#pragma unroll
        for (int i = 0; i < PER / 2; i++) {
            const float2 f = __half22float2(*(const __half2 *)&raw[w][i]);
            const int a = __float2int_rn(f.x * inv), b = __float2int_rn(f.y * inv);
            byte[2 * i] = (uint32_t)(g & 1 ? a : (a + 128) >> 8) & 255u;
            byte[2 * i + 1] = (uint32_t)(g & 1 ? b : (b + 128) >> 8) & 255u;
        }
        if (BITS == 8)
            q->b[h * (D / 32) + w / 2][w % 2] = byte[0] | byte[1] << 8 | byte[2 % PER] << 16 |
                                                byte[3 % PER] << 24;
        else { /* byte j of the low nibbles is nibble 2j: channels 0, 4, 1, 5 */
            uint32_t *b = q->b[h * (D / 32) + w % (D / 32)];
            b[0] = byte[0] | byte[4 % PER] << 8 | byte[1] << 16 | byte[5 % PER] << 24;
            b[1] = byte[2 % PER] | byte[6 % PER] << 8 | byte[3 % PER] << 16 | byte[7 % PER] << 24;
        }
    }
}

/* From qr, rows q_sub apart. */
template <int D, int BITS, int H>
__device__ __forceinline__ void load_query(query_regs<D, BITS, H> *q, const __half *qr,
                                           int64_t q_sub, int heads, float scale_log2, int g, int t)
{
    float sum[2] = {}, scale[2] = {};
    if (BITS == 16) {
        const int head = (g >> 1) + 4 * (g & 1);
        const __half *x = qr + (head < heads ? head : 0) * q_sub;
#pragma unroll
        for (int w = 0; w < geom<D, BITS>::KW; w++)
            q->b[w / 2][w % 2] = head < heads && (H == 2 || !(g & 1))
                                     ? *(const uint32_t *)(x + channel_of_word<D, BITS>(w, t))
                                     : 0u;
        scale[0] = scale[1] = scale_log2;
    } else {
#pragma unroll
        for (int h = 0; h < H; h++) {
            const int head = (g >> 1) + 4 * h;
            const __half2 *x = (const __half2 *)(qr + (head < heads ? head : 0) * q_sub);
            query_planes<D, BITS, H>(q, h, x, &sum[h], &scale[h], scale_log2, g, t);
        }
    }
#pragma unroll
    for (int h = 0; h < H; h++) { /* of head t + 4h: lanes of g = 2t have it */
        q->scale[h] = BITS == 16 ? scale[h] : __shfl_sync(~0u, scale[h], 8 * t);
        q->sum[h] = BITS == 16 ? 0.f : __shfl_sync(~0u, sum[h], 8 * t) * scale_log2;
    }
}

/* A warp's state into its [heads][D + 2]: channels, then max and sum. */
template <int D, int BITS, int H>
__device__ __forceinline__ void leave_warp(float *out, softmax_state<D, BITS, H> *st, int heads,
                                           int g, int t)
{
#pragma unroll
    for (int x = 4; x < 32; x <<= 1)
#pragma unroll
        for (int h = 0; h < H; h++) {
            st->sum[h] += __shfl_xor_sync(~0u, st->sum[h], x);
            if (BITS == 16) continue;
            st->zsum[h] += __shfl_xor_sync(~0u, st->zsum[h], x);
            st->psum[h] += __shfl_xor_sync(~0u, st->psum[h], x);
        }
#pragma unroll
    for (int h = 0; h < H; h++) {
        float *m = out + (t + 4 * h) * (D + 2);
        if (t + 4 * h >= heads) continue;
        if (g == 0) m[D] = st->max[h], m[D + 1] = st->sum[h];
        const float more = st->zsum[h] - st->psum[h] * (CODE_MORE<BITS> / P_SCALE);
#pragma unroll
        for (int i = 0; i < geom<D, BITS>::F / 2; i++)
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                const int d = channel_of<D, BITS>(i, odd, g);
                const float v = st->o[i][2 * odd + h];
                if (d < D) m[d] = BITS < 16 ? v * (1.f / P_SCALE) + more : v;
            }
    }
}

/* The warps of the block in order 0.., one thread for two channels of a head. */
template <int D>
__device__ __forceinline__ void merge_warps(const attn_team &tm, const attn_decode_call &c,
                                            const attn_memory &sh, float *work, out_rows<D> *rows,
                                            int seq, int head, int hg, int heads)
{
    for (int i = tm.thread; i < heads * D / 2; i += NWARPS * 32) {
        const int h = i / (D / 2), d = i % (D / 2) * 2, stride = heads * (D + 2);
        const float *at = sh.merged + h * (D + 2);
        float m = -INFINITY, sum = 0.f;
        float2 o = make_float2(0.f, 0.f);
#pragma unroll
        for (int w = 0; w < NWARPS; w++) m = fmaxf(m, at[w * stride + D]);
        const float base = m == -INFINITY ? 0.f : m;
#pragma unroll
        for (int w = 0; w < NWARPS; w++) {
            const float f = exp2f(at[w * stride + D] - base);
            const float2 v = *(const float2 *)(at + w * stride + d);
            sum += f * at[w * stride + D + 1];
            o.x += f * v.x, o.y += f * v.y;
        }
        if (c.splits == 1)
            store_out<D>(c, sh, rows, seq, head, hg, h, d, o.x / sum, o.y / sum);
        else {
            *(float2 *)(work + h * (D + 2) + d) = o;
            if (d == 0) work[h * (D + 2) + D] = m, work[h * (D + 2) + D + 1] = sum;
        }
    }
}

/* A part of a head's work: tiles lo.. of U * TILE tokens up to hi. */
typedef struct {
    int split, head, hg, heads, slot; /* slot: of the head group among all */
    int len, from, lo, hi;
} attn_part;

template <int U>
__device__ __forceinline__ attn_part part_of(const attn_decode_call &c, int split, int slot_y,
                                             int seq)
{
    attn_part p;
    const int head_groups = (c.group + 7) / 8;
    p.split = split, p.head = slot_y, p.hg = 0;
    if (head_groups > 1) p.head = slot_y / head_groups, p.hg = slot_y % head_groups;
    p.heads = min(8, c.group - p.hg * 8);
    p.slot = seq * c.kv_heads * head_groups + slot_y;
    /* Tables come from copies, which no launch overtakes. */
    p.len = c.kv_len[seq], p.from = c.window > 0 ? max(0, p.len - c.window) : 0;
    const int tiles = (p.len + U * TILE - 1) / (U * TILE), first = p.from / (U * TILE);
    p.lo = first, p.hi = tiles;
    if (c.splits > 1) {
        const uint32_t of = (uint32_t)(tiles - first), n = (uint32_t)c.splits;
        p.lo = first + (int)(of * (uint32_t)split / n);
        p.hi = first + (int)(of * (uint32_t)(split + 1) / n);
    }
    return p;
}

/* Keys and values, or WHICH of them, of U tiles beside each other: tile `tile` of U * TILE
 * tokens. */
template <int D, int BITS, int U, int WHICH = 3>
__device__ __forceinline__ void load_tiles(tile_regs<D, BITS> r[U], const attn_decode_call &c,
                                           const int32_t *table, int tile, int head, int g, int t)
{
    const int per_block = (int)((uint32_t)c.block_tokens / (U * TILE)),
              block = (int)((uint32_t)tile / (uint32_t)per_block);
#pragma unroll
    for (int u = 0; u < U; u++)
        load_tile<D, BITS, WHICH>(&r[u], c, table[block], head,
                                  ((tile - block * per_block) * U + u) * TILE, g, t);
}

/* The first tile of each warp. It may be asked for before the newest token is known. */
template <int D, int BITS, int U>
__device__ __forceinline__ void load_first(tile_regs<D, BITS> cur[U], const attn_decode_call &c,
                                           const attn_part &p, const int32_t *table, int warp,
                                           int g, int t)
{
    if (p.lo + warp < p.hi) load_tiles<D, BITS, U>(cur, c, table, p.lo + warp, p.head, g, t);
}

/* Tiles tile, tile + NWARPS .. of a warp, the first of which is in `cur`. With AHEAD each is loaded
 * while the one before is worked on, else into the same registers as they become free. */
template <int D, int BITS, int U, bool AHEAD, int H>
__device__ __forceinline__ void walk(softmax_state<D, BITS, H> *st, const attn_decode_call &c,
                                     const attn_part &p, const int32_t *table,
                                     tile_regs<D, BITS> cur[U], const query_regs<D, BITS, H> &q,
                                     int warp, int g, int t)
{
    const auto nothing = [] {};
    int tile = p.lo + warp;
    if constexpr (!AHEAD) {
#pragma unroll 1
        for (; tile < p.hi; tile += NWARPS) {
            const int n = tile + NWARPS;
            consume<D, BITS, U, H>(
                st, cur, q, tile * U * TILE, p.from, p.len, g,
                [&] {
                    if (n < p.hi) load_tiles<D, BITS, U, 1>(cur, c, table, n, p.head, g, t);
                },
                [&] {
                    if (n < p.hi) load_tiles<D, BITS, U, 2>(cur, c, table, n, p.head, g, t);
                });
        }
    } else {
        tile_regs<D, BITS> next[U];
        while (tile < p.hi) {
            if (tile + NWARPS < p.hi)
                load_tiles<D, BITS, U>(next, c, table, tile + NWARPS, p.head, g, t);
            consume<D, BITS, U, H>(st, cur, q, tile * U * TILE, p.from, p.len, g, nothing, nothing);
            tile += NWARPS;
            if (tile >= p.hi) break;
            if (tile + NWARPS < p.hi)
                load_tiles<D, BITS, U>(cur, c, table, tile + NWARPS, p.head, g, t);
            consume<D, BITS, U, H>(st, next, q, tile * U * TILE, p.from, p.len, g, nothing,
                                   nothing);
            tile += NWARPS;
        }
    }
}

/* Part p of the heads of a sequence; cur: what load_first left. With c.fused enter(append) leaves
 * the queries in turned_q and with `append` the newest token in the cache and in `newest`. */
template <int D, int BITS, int U, bool AHEAD, int H, typename E>
__device__ __forceinline__ void
attn_decode_item(const attn_team &tm, const attn_decode_call &c, const attn_memory &sh,
                 out_rows<D> *rows, const attn_part &p, tile_regs<D, BITS> cur[U], int seq, E enter)
{
    typedef geom<D, BITS> G;
    const int lane = tm.thread & 31, warp = tm.thread >> 5, g = lane >> 2, t = lane & 3;
    const int32_t *table = c.table + (size_t)seq * c.table_stride;
    const int last = p.len - 1;
    const __half *qr = c.q + seq * c.q_row + p.head * c.q_head + p.hg * 8 * c.q_sub;
    if (c.fused) { /* `merged` is free until the end */
        const bool append = p.split == c.splits - 1;
        enter(append);
        team_sync(tm);
        qr = sh.turned_q;
        if (append && p.lo + warp == p.hi - 1)
#pragma unroll
            for (int u = 0; u < U; u++)
                patch_tile<D, BITS>(&cur[u], sh.newest, last - ((p.hi - 1) * U + u) * TILE, g, t);
    }
    query_regs<D, BITS, H> q;
    load_query<D, BITS, H>(&q, qr, c.fused ? D : c.q_sub, p.heads, c.scale * 1.44269504f, g, t);
    softmax_state<D, BITS, H> st = {};
#pragma unroll
    for (int h = 0; h < H; h++) st.max[h] = -INFINITY;
    walk<D, BITS, U, AHEAD, H>(&st, c, p, table, cur, q, warp, g, t);
    leave_warp<D, BITS, H>(sh.merged + warp * p.heads * (D + 2), &st, p.heads, g, t);
    team_sync(tm);
    float *all = c.work + (size_t)p.slot * c.splits * G::PART;
    merge_warps<D>(tm, c, sh, all + p.split * G::PART, rows, seq, p.head, p.hg, p.heads);
    if (c.splits == 1) {
        store_out_planes<D>(tm, c, rows, seq, p.head, p.hg, p.heads);
        return;
    }
    __threadfence();
    team_sync(tm);
    if (tm.thread == 0) {
        *sh.last = atomicAdd(&c.counters[p.slot], 1) == c.splits - 1;
        if (*sh.last) c.counters[p.slot] = 0;
    }
    team_sync(tm);
    if (!*sh.last) return;
    __threadfence();
    merge_splits<D>(tm, c, all, sh, rows, seq, p.head, p.hg, p.heads);
}

#endif
