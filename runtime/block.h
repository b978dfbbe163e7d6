/* One transformer block: weights bound to a device, and the only forward pass of the project. */
#ifndef TMF_RUNTIME_BLOCK_H
#define TMF_RUNTIME_BLOCK_H

#include "formats/weights.h"
#include "kernels/ops.h"

/* Sees the input of each linear before it runs; NULL outside calibration. q, k, v (or qkv) share
 * one input: called once with ROLE_QKV for them, once with ROLE_GATE for gate and up, then ROLE_O,
 * ROLE_DOWN. */
typedef err_code (*tap_fn)(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e);

typedef struct {
    tensor dense; /* [n,k] as bound, data NULL when W4 */
    w4_weight w4;
    tensor bias; /* [n], data NULL none (dense only; W4 carries its own) */
    dev_buf buf, bias_buf;
    int64_t n, k;
} bound_linear;

typedef struct {
    const model_desc *m;
    int32_t layer;
    tensor attn_norm, ffn_norm, q_norm, k_norm; /* [hidden] or [head_dim] */
    dev_buf norm_buf[4];
    bound_linear qkv[3]; /* one (fused) or three (q, k, v) */
    int n_qkv;
    bound_linear o, gate_up[2], down; /* gate_up: one fused [2*ffn] (gate rows first) or two */
    int n_gate_up;
} block;

/* Scratch of a forward of at most `rows` rows, shared by all blocks of a model. */
typedef struct block_scratch block_scratch;
op_limits block_limits(const model_desc *m, int32_t rows, int32_t seqs, int32_t max_kv);
err_code block_scratch_open(block_scratch **out, device *d, const model_desc *m, int32_t rows,
                            int32_t seqs, int32_t max_kv, err *e);
size_t block_scratch_bytes(const device *d, const model_desc *m, int32_t rows, int32_t seqs,
                           int32_t max_kv);
void block_scratch_close(block_scratch **s);

/* Binds layer `layer` of `src`: dense weights stay where they are mapped on the CPU, W4 is tiled
 * once. */
err_code block_bind(block *b, device *d, weight_src *src, int32_t layer, err *e);
/* Host memory that binding a layer takes (0 for mapped dense weights on the CPU). */
size_t block_bind_bytes(const device *d, const model_desc *m, weight_src *src);
/* Bytes of a layer's weights that are read where they are mapped: what binding does not copy. */
size_t block_mapped_bytes(const device *d, const model_desc *m, weight_src *src);
/* Bytes of weights that a forward pass of a bound block reads. */
size_t block_read_bytes(const block *b);
void block_free(block *b);

/* x act [m, hidden] in place: x += attn(norm(x)); x += ffn(norm(x)). */
err_code block_forward(const block *b, device *d, block_scratch *s, const rope_spec *rope,
                       tensor *x, const kv_layer *kv, const batch_rows *rows, tap_fn tap,
                       void *tap_ctx, err *e);

/* The second half alone: x is what attention left. */
err_code block_feed_forward(const block *b, device *d, block_scratch *s, tensor *x, tap_fn tap,
                            void *tap_ctx, err *e);

/* The last block where few rows are wanted, or none: keys and values of all rows of x go into the
 * cache, the rest runs on the rows `picks` (i32 [n], ascending; n 0: nothing else) alone, into out
 * res [n, hidden]. `picked` describes them as `rows` does x. At most block_tail_rows of them. */
err_code block_forward_tail(const block *b, device *d, block_scratch *s, const rope_spec *rope,
                            const tensor *x, tensor *out, const tensor *picks, const kv_layer *kv,
                            const batch_rows *rows, const batch_rows *picked, err *e);
int32_t block_tail_rows(const model_desc *m, int32_t rows);

#endif
