/* Decode attention on CUDA: one query row per sequence over the paged cache. Private to kernels/.
 * */
#ifndef TMF_KERNELS_ATTN_DECODE_CUH
#define TMF_KERNELS_ATTN_DECODE_CUH

#include "kernels/gemm_w4.cuh"
#include "kernels/kv_append.cuh"

typedef struct attn_decode_call {
    const __half *q;       /* row s: [kv_heads, group, D] at q + s*q_row + h*q_head + r*q_sub */
    __half *y;             /* [seqs, kv_heads*group, D], row stride y_row */
    const uint8_t *data;   /* [blocks][kv_heads][K,V][block_tokens][token bytes] */
    const __half2 *param;  /* [blocks][kv_heads][K,V][block_tokens] {scale, zero} */
    const int32_t *table;  /* [seqs][table_stride] */
    const int32_t *kv_len; /* [seqs] */
    float *work;           /* attn_decode_work_bytes */
    int32_t *counters;     /* [seqs*kv_heads*head groups], zero before and after */
    int64_t q_row, q_head, q_sub, y_row;
    int32_t seqs, kv_heads, group, table_stride, block_tokens;
    int32_t splits, window;
    bool crowded; /* attn_decode_crowded */
    float scale;
    w4_planes_out planes; /* of y, for head_dim 128 */
    bool fused; /* q is rotated on the way in, k and v of the newest token rotated and appended */
    rope_call rope;
} attn_decode_call;

/* Whether `units` heads of sequences go to the kernels for many waves of blocks, built for heads of
 * 128 (at 16 bits for up to 4 query heads each); how many blocks then run at once, at most
 * ATTN_MAX_BLOCKS a multiprocessor. */
bool attn_decode_crowded(int units, int group, int head_dim, int bits, int sms);
int attn_decode_slots(int bits, bool crowded, int sms);
#define ATTN_MAX_BLOCKS 4
size_t attn_decode_work_bytes(int seqs, int kv_heads, int group, int head_dim, int splits);
/* How many parts to cut the longest context of each unit into, where `slots` parts run at once; a
 * part has `least` tokens or more. */
int attn_decode_splits(int64_t units, int max_kv, int slots, int least);
#define ATTN_MAX_SPLITS 64
#define ATTN_MAX_WAVES \
    8 /* more than one split only while splits fill at most so many waves of blocks */
/* head_dim 64, 96, 128, 256; bits 16, 8, 4; block_tokens a multiple of 32. */
cudaError_t attn_decode(const attn_decode_call *c, int head_dim, int bits, cudaStream_t stream,
                        bool pdl);

#endif
