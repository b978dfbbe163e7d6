/* Attention of many query rows a sequence over the paged cache. Private to kernels/. */
#ifndef TMF_KERNELS_ATTN_PREFILL_CUH
#define TMF_KERNELS_ATTN_PREFILL_CUH

#include "kernels/cuda_util.cuh"

typedef struct {
    const __half *q;     /* row i: [kv_heads, group, D] at q + i*q_row + h*q_head + r*q_sub */
    __half *y;           /* [rows, kv_heads*group*D], row stride y_row */
    const uint8_t *data; /* [blocks][kv_heads][K,V][block_tokens][token bytes] */
    const __half2 *param;
    const int32_t *table, *pos, *seq_start;
    int64_t q_row, q_head, q_sub, y_row;
    int32_t seqs, kv_heads, group, table_stride, block_tokens, window, max_q;
    float scale;
} attn_prefill_call;

/* head_dim 64, 96, 128, 256; bits 16, 8, 4; block_tokens a multiple of 32. */
cudaError_t attn_prefill(const attn_prefill_call *c, int head_dim, int bits, int sm,
                         cudaStream_t stream);
/* On sm_90a, a 16-bit cache of `slots` tokens (of K or of V), head_dim 64 or 128; 16-byte
 * aligned. */
cudaError_t attn_prefill_wgmma(const attn_prefill_call *c, int head_dim, int64_t slots,
                               cudaStream_t stream);
/* Any head size up to 256 that is a multiple of 8, any rows: one warp a row and head. Slow. */
cudaError_t attn_plain(const attn_prefill_call *c, int head_dim, int bits, int rows,
                       cudaStream_t stream, bool pdl);

#endif
