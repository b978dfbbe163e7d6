/* Split-KV decode attention straight from the 16, 8 and 4-bit cache.
 *
 * Scores are an mma with 16 tokens as rows and up to 8 query heads of one KV head as columns;
 * outputs one with 16 channels as rows, the same heads as columns, tokens as k. Codes become f16
 * integers in registers; scale and zero of a token are factored out of both products:
 *   q.k = s_k (q.k_int) + z_k sum(q),    sum p v = sum (p s_v) v_int + sum p z_v
 * so nothing is done per element but unpacking. Warps own disjoint tokens; warps, then splits,
 * merge in a fixed order, the splits in the block that arrives last. */
#include "kernels/attn_decode_body.cuh"

template <int D, int BITS, int U>
__global__ void __launch_bounds__(NWARPS * 32) attn_decode_kernel(attn_decode_call c)
{
    __shared__ __align__(16) uint8_t memory[ATTN_TEAM_BYTES(D, 8)];
    __shared__ __align__(16) out_rows<D == 128 ? 128 : 1> outs;
    __shared__ float angles[2][128];
    const attn_team tm = {(int)threadIdx.x, 0};
    const int hg = (int)blockIdx.y % ((c.group + 7) / 8);
    pdl_launch();
    if (c.fused) newest_angles(angles, c.rope, c.kv_len[blockIdx.z] - 1);
    attn_decode_item<D, BITS, U, true, true>(
        tm, c, attn_memory_of<D>(memory, min(8, c.group - hg * 8), angles), (out_rows<D> *)&outs,
        (int)blockIdx.x, (int)blockIdx.y, (int)blockIdx.z);
}

size_t attn_decode_work_bytes(int seqs, int kv_heads, int group, int head_dim, int splits)
{
    return (size_t)seqs * kv_heads * ((group + 7) / 8) * splits * 8 * (head_dim + 2) *
           sizeof(float);
}

/* Blocks run in waves of as many as fit; a wave lasts as long as its tokens and a start that costs
 * about as much as 96 of them. */
int attn_decode_splits(int seqs, int kv_heads, int group, int max_kv, int slots, int least)
{
    const int64_t units = (int64_t)seqs * kv_heads * ((group + 7) / 8);
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

template <int D, int BITS, int U>
static cudaError_t launch(const attn_decode_call *c, cudaStream_t stream, bool pdl)
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
    return cudaLaunchKernelEx(&cfg, attn_decode_kernel<D, BITS, U>, *c);
}

cudaError_t attn_decode(const attn_decode_call *c, int head_dim, int bits, cudaStream_t stream,
                        bool pdl)
{
#define CASE(D)                                           \
    if (head_dim == D)                                    \
    return bits == 16  ? launch<D, 16, 1>(c, stream, pdl) \
           : bits == 8 ? launch<D, 8, 1>(c, stream, pdl)  \
                       : launch<D, 4, 2>(c, stream, pdl)
    CASE(64);
    CASE(96);
    CASE(128);
    CASE(256);
#undef CASE
    return cudaErrorInvalidValue;
}
