/* The op table and the checked entry points that all callers use. Entry points check shape, dtype
 * and space once, then call the table; ops neither allocate nor sync. <op>_ref.c is the definition
 * of right. m rows (tokens), n outputs, k inputs, g group. "act" is dev_act(d), "res" dev_resid(d)
 * or act. Rows of x and y may be strided (stride[ndim-1] == 1). Reductions have a fixed order:
 * results do not depend on threads or on m's split (with AMX some products and attention of
 * up to 4 rows round differently from longer ones, on CUDA those of few and of many rows, unless
 * the device is deterministic: docs/numerics.md). */
#ifndef TMF_KERNELS_OPS_H
#define TMF_KERNELS_OPS_H

#include "base/w4.h"
#include "kernels/device.h"

/* ---- rows of a batch ---- */
/* Rows of one sequence are consecutive; sequence s owns rows [seq_start[s], seq_start[s+1]). All
 * i32, in the device's space. */
typedef struct {
    tensor pos;            /* [m] absolute position of each row, from 0 */
    tensor seq_start;      /* [s+1] */
    tensor kv_len;         /* [s] cached tokens of the sequence including this step's rows */
    tensor block_table;    /* [s, max_blocks] physical block of each logical block */
    int32_t seqs;          /* s */
    int32_t max_q, max_kv; /* host copies: most rows and largest kv_len of any sequence */
} batch_rows;

/* ---- KV cache of one layer ---- */
typedef enum { KV_16 = 0, KV_8 = 8, KV_4 = 4 } kv_format;
/* data: [blocks][kv_heads][K,V] regions, each block_tokens * token_bytes, token_bytes = D*2, D or
 * D/2. param: f16 {scale, zero} pairs [blocks][kv_heads][K,V][block_tokens], absent for KV_16.
 * KV_16 holds f16. Quantization per token and head (turbomind-format 5.2): zero = min, scale =
 * (max-min)/(2^b-1), q = rne((x-zero)/scale), x' = q*scale+zero, scale and zero rounded to f16
 * before use. KV_4: channel c sits in byte c/2, low nibble first, unless the device documents its
 * own order. */
typedef struct {
    void *data;
    void *param;
    kv_format format;
    int32_t blocks, block_tokens, kv_heads, head_dim;
    memspace mem;
} kv_layer;
size_t kv_layer_data_bytes(kv_format f, int32_t blocks, int32_t block_tokens, int32_t kv_heads,
                           int32_t head_dim);
size_t kv_layer_param_bytes(kv_format f, int32_t blocks, int32_t block_tokens, int32_t kv_heads);

/* ---- rotary embedding ---- */
typedef struct {
    tensor inv_freq;  /* f32 [dims/2]: scaling (linear, llama3, yarn) already applied */
    int32_t dims;     /* rotated dims of a head, the rest pass through */
    bool interleaved; /* pairs (2j,2j+1) as TurboMind stores them; else (j, j+dims/2) as Hugging
                         Face */
    float mscale;     /* multiplies cos and sin; 1 normally */
} rope_spec;

/* ---- ops ---- */
err_code op_embed(device *d, tensor *y, const tensor *table, const tensor *ids, err *e);
/* y res [m,h] = table[ids]; table f16/bf16/f32 [v,h]; ids i32 [m] in range (checked on the CPU) */
err_code op_rmsnorm(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e);
/* y act, x res [m,k]; w f16/bf16/f32 [k]; y = x / sqrt(mean(x^2)+eps) * w */
err_code op_add(device *d, tensor *y, const tensor *x, err *e); /* y += x, res [m,k] */
err_code op_gemm(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                 bool add, err *e);
/* y res [m,n] (+)= x act [m,k] * w^T + bias; w f16/bf16/f32 [n,k] contiguous rows; bias [n] or
 * NULL */
err_code op_gemm_w4(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e);
/* as op_gemm with w from w4_upload (layout W4_DEVICE, bias inside) */
err_code op_glu(device *d, tensor *y, const tensor *gate, const tensor *up, err *e);
/* y act [m,i] = silu(gate) * up; y may be gate */
err_code op_rope_kv(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                    const batch_rows *rows, const kv_layer *kv, err *e);
/* rotates q act [m, kv_heads, heads/kv_heads, D] in place (strided), rotates k and stores k and v
 * act [m, kv_heads, D] (strided) into the cache in its format. k's memory may be overwritten. */
err_code op_attn(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                 float scale, int32_t window, err *e);
/* y act [m, heads*D]; q as above; row at position p sees cached positions max(0,p-window+1)..p
 * (window 0: from 0); softmax in f32 */
/* ---- two or three ops at once, where a device has a kernel for it; else one after the other ----
 * */
err_code op_norm_gemm_w4(device *d, tensor *y, tensor *h, const tensor *x, const tensor *norm,
                         float eps, const w4_weight *w, bool glu, err *e);
/* h act [m,k] = rmsnorm(x res [m,k]); y act [m,n] = h * w^T; with glu, columns 0..n/2 of y then
 * become silu of themselves times columns n/2..n. A device may leave h, and with glu the upper
 * columns, as they were. */
err_code op_rope_attn(device *d, tensor *y, tensor *q, tensor *k, const tensor *v,
                      const rope_spec *r, const batch_rows *rows, const kv_layer *kv, float scale,
                      int32_t window, err *e);
/* op_rope_kv, then op_attn; a device may leave q and k as they were */
err_code op_nll(device *d, tensor *nll, tensor *argmax, const tensor *logits, const tensor *target,
                err *e);
/* nll f32 [m] = logsumexp(logits row) - logits[target]; argmax i32 [m] or NULL; logits f32 [m,v] */
err_code op_absstat(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e);
/* accumulates max|x| into f32 [k] and sum|x| into f64 [k] over the rows of x act [m,k] */
err_code op_gram(device *d, tensor *h, const tensor *x, err *e);
/* h f32 [k,k] += x^T x, x act [m,k]; only the lower triangle is valid until op_gram_finish mirrors
 * it */
err_code op_gram_finish(device *d, tensor *h, err *e);
err_code op_quad(device *d, tensor *out, const tensor *x, const tensor *h, err *e);
/* out f64 [m] = x_i H x_i^T for each row of x f32 [m,k]; h f32 [k,k] symmetric */
err_code op_matmul(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
/* y f32 [m,n] = a f32 [m,k] * b f32 [k,n]; for the search, not for the forward pass */
err_code op_product(device *d, tensor *y, float alpha, const tensor *a, const tensor *b, bool add,
                    err *e);
/* y (+)= alpha a b as above, but f32 arithmetic wherever op_matmul takes less; y overlaps neither.
 * The CPU only. */

/* ---- sampling, where a device does it itself ---- */
/* How one row is drawn from. What is done, and in which order, is defined by runtime/sampler.h. */
#define SAMPLE_MAX_BIAS 64
typedef struct {
    int32_t id;
    float bias;
} sample_bias;
typedef struct {
    double temperature, top_p, min_p, presence, frequency;
    double u; /* the draw: [0,1) */
    float repetition;
    int32_t top_k, n_bias;
    int32_t wanted;     /* 0: the row stays as it is, without an id */
    int32_t state;      /* its pair of `counts`, -1: no penalties */
    int32_t last, gone; /* ids that came into the counts and fell out of `seen` since; -1: none */
} sample_row;
bool dev_samples(const device *d); /* else the logits go to the host's sampler */
err_code op_sample(device *d, tensor *ids, tensor *logits, const tensor *rows, const tensor *bias,
                   tensor *counts, err *e);
/* ids i32 [m] of logits f32 [m,v], which change; rows u8 [m, sizeof(sample_row)]; bias u8 [m,
 * SAMPLE_MAX_BIAS * sizeof(sample_bias)]; counts i32 [states, 2, v]: how often an id was seen in
 * the window, and answered. -1: no logit is above minus infinity. The host's sampler gives the same
 * id unless its draw is within 1e-9 of the border of two. */

/* ---- weights and scratch, before the loop ---- */
/* Fuses `n_parts` linears of equal k and group along n (any on-disk layout) into the device's
 * tiling. */
err_code w4_upload(device *d, dev_buf *buf, w4_weight *out, const w4_weight *const *parts,
                   int n_parts, err *e);
size_t w4_upload_bytes(const device *d, int64_t k, int64_t n, int32_t group);

typedef struct {
    int32_t rows;            /* most rows of any op call */
    int64_t k, n;            /* largest inner and outer size of any linear */
    int32_t heads, head_dim; /* attention */
    int32_t max_kv;          /* longest sequence */
    int32_t seqs;
} op_limits;
/* Scratch the ops may use; call again with larger limits to grow. */
err_code ops_reserve(device *d, const op_limits *lim, err *e);
size_t ops_reserve_bytes(const device *d, const op_limits *lim);

/* ---- the table (kernels/ and kcheck only) ---- */
typedef struct op_table {
    err_code (*embed)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*rmsnorm)(device *, tensor *, const tensor *, const tensor *, float, err *);
    err_code (*add)(device *, tensor *, const tensor *, err *);
    err_code (*gemm)(device *, tensor *, const tensor *, const tensor *, const tensor *, bool,
                     err *);
    err_code (*gemm_w4)(device *, tensor *, const tensor *, const w4_weight *, bool, err *);
    err_code (*glu)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*rope_kv)(device *, tensor *, tensor *, const tensor *, const rope_spec *,
                        const batch_rows *, const kv_layer *, err *);
    err_code (*attn)(device *, tensor *, const tensor *, const kv_layer *, const batch_rows *,
                     float, int32_t, err *);
    err_code (*nll)(device *, tensor *, tensor *, const tensor *, const tensor *, err *);
    err_code (*absstat)(device *, tensor *, tensor *, const tensor *, err *);
    err_code (*gram)(device *, tensor *, const tensor *, err *);
    err_code (*gram_finish)(device *, tensor *, err *);
    err_code (*quad)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*matmul)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*cross)(device *, tensor *, const tensor *, const tensor *,
                      err *); /* NULL: the one of `search` */
    err_code (*product)(device *, tensor *, float, const tensor *, const tensor *, bool,
                        err *); /* NULL: not here */
    /* NULL: the ops in turn */
    err_code (*norm_gemm_w4)(device *, tensor *, tensor *, const tensor *, const tensor *, float,
                             const w4_weight *, bool, err *);
    err_code (*rope_attn)(device *, tensor *, tensor *, tensor *, const tensor *, const rope_spec *,
                          const batch_rows *, const kv_layer *, float, int32_t, err *);
    err_code (*sample)(device *, tensor *, tensor *, const tensor *, const tensor *, tensor *,
                       err *); /* NULL: not here */
    err_code (*w4_upload)(device *, dev_buf *, w4_weight *, const w4_weight *const *, int, err *);
    size_t (*w4_upload_bytes)(int64_t, int64_t, int32_t);
    size_t (*scratch_bytes)(const device *, const op_limits *);
    const struct search_ops *search; /* kernels/search_ops.h */
} op_table;
void ops_init_ref(op_table *t);
void ops_init_cpu(op_table *t,
                  uint32_t cpu_flags);       /* over the reference, rising order of CPU flags */
void ops_init_cuda(op_table *t, int32_t sm); /* a table of its own */

#endif
