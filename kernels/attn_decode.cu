/* Split-KV decode attention straight from the 16, 8 and 4-bit cache.
 *
 * Scores are an mma with 16 tokens as rows and up to 8 query heads of one KV head as columns: of
 * f16, or, from codes, of integers, with the queries as 16-bit fixed point in two planes. Outputs
 * are one with 16 channels as rows, the same heads as columns, tokens as k; codes become f16
 * integers in registers. Scale and zero of a token are factored out of both products:
 *   q.k = s_k (q.k_int) + z_k sum(q),    sum p v = sum (p s_v) v_int + sum p z_v
 * so nothing is done per element but unpacking. Warps own disjoint tokens; warps, then splits,
 * merge in a fixed order, the splits in the block that arrives last. */
#include "kernels/attn_decode_body.cuh"

template <int D, int BITS, int U, int H, bool AHEAD, int MINB>
__global__ void __launch_bounds__(NWARPS * 32, MINB) attn_decode_kernel(attn_decode_call c)
{
    __shared__ __align__(16) uint8_t memory[ATTN_TEAM_BYTES(D, 8)];
    __shared__ __align__(16) out_rows<D == 128 ? 128 : 1> outs;
    __shared__ float angles[2][128];
    const attn_team tm = {(int)threadIdx.x, 0};
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, seq = blockIdx.z;
    const attn_part p = part_of<U>(c, (int)blockIdx.x, (int)blockIdx.y, seq);
    const int32_t *table = c.table + (size_t)seq * c.table_stride;
    tile_regs<D, BITS> cur[U];
    pdl_launch();
    /* Fused, nothing but the newest token is missing in the cache before the wait; else the launch
     * before may be writing all of it (a prompt, of which one row goes on). */
    if (c.fused) load_first<D, BITS, U>(cur, c, p, table, warp, lane >> 2, lane & 3);
    if (c.fused) newest_angles(angles, c.rope, p.len - 1);
    team_sync(tm);
    pdl_wait();
    if (!c.fused) load_first<D, BITS, U>(cur, c, p, table, warp, lane >> 2, lane & 3);
    const attn_memory sh = attn_memory_of<D>(memory, p.heads, angles);
    attn_decode_item<D, BITS, U, AHEAD, H>(
        tm, c, sh, (out_rows<D> *)&outs, p, cur, seq, [&](bool append) {
            enter_newest<D, BITS>(tm, c, sh, seq, p.head, p.hg, p.heads, p.len - 1,
                                  table[(p.len - 1) / c.block_tokens], append);
        });
}

size_t attn_decode_work_bytes(int seqs, int kv_heads, int group, int head_dim, int splits)
{
    return (size_t)seqs * kv_heads * ((group + 7) / 8) * splits * 8 * (head_dim + 2) *
           sizeof(float);
}

/* Measured (docs/perf.md): a block more a multiprocessor beats a tile loaded ahead, once there are
 * so many blocks that the last wave counts little; at 16 bits only with up to 4 query heads. */
bool attn_decode_crowded(int units, int group, int head_dim, int bits, int sms)
{
    if (head_dim != 128) return false;
    return bits == 16 ? group <= 4 && units >= sms * 15 / 2 : units >= sms * 2;
}

int attn_decode_slots(int bits, bool crowded, int sms)
{
    return sms * ((bits == 16 ? 2 : 3) + crowded);
}

/* Blocks run in waves of as many as fit; a wave lasts as long as its tokens and a start that costs
 * about as much as 96 of them. */
int attn_decode_splits(int64_t units, int max_kv, int slots, int least)
{
    int best = 1;
    int64_t cheapest = INT64_MAX;
    for (int s = 1; s <= ATTN_MAX_SPLITS; s++) {
        if (s > 1 &&
            (s * least > max_kv + least - 1 || units * s > (int64_t)ATTN_MAX_WAVES * slots))
            break;
        const int64_t cost = (units * s + slots - 1) / slots * ((max_kv + s - 1) / s + 96);
        if (cost < cheapest) cheapest = cost, best = s;
    }
    return best;
}

template <int D, int BITS, int U, int H, bool AHEAD, int MINB>
static cudaError_t launch_as(const attn_decode_call *c, cudaStream_t stream, bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    cfg.gridDim = dim3((unsigned)c->splits, (unsigned)(c->kv_heads * ((c->group + 7) / 8)),
                       (unsigned)c->seqs);
    cfg.blockDim = dim3(NWARPS * 32);
    cfg.stream = stream;
    cfg.attrs = attr;
    if (pdl) {
        attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attr[0].val.programmaticStreamSerializationAllowed = 1;
        cfg.numAttrs = 1;
    }
    return cudaLaunchKernelEx(&cfg, attn_decode_kernel<D, BITS, U, H, AHEAD, MINB>, *c);
}

/* Kernels for many waves of blocks: smaller tiles at 4 bits, none ahead otherwise, for one block
 * more a multiprocessor. */
template <int D, int BITS, int U, int H>
static cudaError_t launch(const attn_decode_call *c, cudaStream_t stream, bool pdl)
{
    if constexpr (D == 128 && (H == 1 || BITS < 16))
        if (c->crowded)
            return launch_as<D, BITS, 1, H, BITS == 4, (BITS == 16 ? 3 : 4)>(c, stream, pdl);
    return launch_as<D, BITS, U, H, true, (D > 128 || BITS == 16 ? 2 : 3)>(c, stream, pdl);
}

cudaError_t attn_decode(const attn_decode_call *c, int head_dim, int bits, cudaStream_t stream,
                        bool pdl)
{
#define BITS_OF(D, H)                                        \
    return bits == 16  ? launch<D, 16, 1, H>(c, stream, pdl) \
           : bits == 8 ? launch<D, 8, 1, H>(c, stream, pdl)  \
                       : launch<D, 4, 2, H>(c, stream, pdl)
#define CASE(D)                          \
    if (head_dim == D) {                 \
        if (c->group > 4) BITS_OF(D, 2); \
        BITS_OF(D, 1);                   \
    }
    CASE(64);
    CASE(96);
    CASE(128);
    CASE(256);
#undef CASE
#undef BITS_OF
    return cudaErrorInvalidValue;
}
