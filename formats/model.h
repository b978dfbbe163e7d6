/* What a model is, whatever file it came from: description, tensor roles, smooth groups. */
#ifndef TMF_FORMATS_MODEL_H
#define TMF_FORMATS_MODEL_H

#include <stdbool.h>

#include "base/tensor.h"
#include "base/w4.h"

typedef enum {
    ROLE_EMBED,
    ROLE_FINAL_NORM,
    ROLE_HEAD, /* model level: layer is -1 */
    ROLE_ATTN_NORM,
    ROLE_QKV,
    ROLE_Q,
    ROLE_K,
    ROLE_V,
    ROLE_O,
    ROLE_FFN_NORM,
    ROLE_GATE,
    ROLE_UP,
    ROLE_DOWN,
    ROLE_Q_NORM,
    ROLE_K_NORM,
    ROLE_ROUTER,
    ROLE_COUNT
} tensor_role;
const char *role_name(tensor_role r); /* "qkv", "o", "gate", ...: used in artifacts and messages */
bool role_from_name(tensor_role *out, const char *name);

/* How q, k and v lie in the output of the attention input projection(s). */
typedef enum {
    QKV_SPLIT,  /* three linears ROLE_Q, ROLE_K, ROLE_V */
    QKV_CONCAT, /* ROLE_QKV = [all Q heads | all K heads | all V heads] */
    QKV_GROUPED /* ROLE_QKV = per KV head [heads/kv_heads Q heads, 1 K, 1 V] (InternLM2) */
} qkv_form;

typedef enum { ROPE_NONE, ROPE_LINEAR, ROPE_DYNAMIC, ROPE_LLAMA3, ROPE_YARN } rope_kind;
typedef struct {
    rope_kind kind;
    float factor, low_freq_factor, high_freq_factor;
    float attention_factor; /* <= 0: automatic */
    float beta_fast, beta_slow;
    int32_t original_max_positions;
} rope_scaling;

/* Bounds of anything a file may claim. Real models stay an order below them. */
enum {
    MODEL_MAX_LAYERS = 1024,
    MODEL_MAX_WIDTH = 1 << 20, /* hidden, ffn, heads * head_dim */
    MODEL_MAX_HEADS = 4096,
    MODEL_MAX_HEAD_DIM = 1024,
    MODEL_MAX_VOCAB = 1 << 24,
    MODEL_MAX_TOKENS = 1 << 28,
    MODEL_MAX_EXPERTS = 1024
};
#define MODEL_MAX_STOP 8
typedef struct {
    char family[32];       /* table name: "internlm2", "llama", "qwen2", "mistral", ... */
    char architecture[64]; /* config.json's architectures[0] */
    dtype dt;              /* stored dtype of the 16-bit parts */
    int32_t layers, hidden, heads, kv_heads, head_dim, ffn, vocab, max_tokens;
    int32_t experts, experts_used;
    float norm_eps, rope_theta;
    rope_scaling scaling;
    int32_t rope_dims;
    bool rope_interleaved;  /* see rope_spec */
    int32_t sliding_window; /* 0: none; read it through model_window */
    int32_t sliding_from;   /* first layer that has the window (Qwen2's max_window_layers) */
    bool qkv_bias, o_bias, qk_norm, tied_embed;
    qkv_form qkv;
    int32_t w4_group; /* 0: 16-bit weights; else the group of its W4 linears */
    int32_t bos, eos; /* -1: none (config.json; the tokenizer config may say otherwise) */
    int32_t stop[MODEL_MAX_STOP]; /* eos ids of config.json and generation_config.json together */
    int32_t n_stop;
} model_desc;
/* Every dimension positive and within bounds named in model.c, heads % kv_heads == 0, ... E_INPUT
 * names the field, the value and the bound. */
err_code model_desc_check(const model_desc *m, err *e);
/* Cached positions a row of this layer sees, itself included; 0: all (op_attn's window). */
int32_t model_window(const model_desc *m, int32_t layer);
int64_t model_linear_n(const model_desc *m, tensor_role r); /* outputs of a linear of the block */
int64_t model_linear_k(const model_desc *m, tensor_role r); /* inputs */
/* The quantizable linears of a block in forward order; returns how many (at most 7). */
int model_block_linears(const model_desc *m, tensor_role out[7]);
/* inv_freq f32 [rope_dims/2] with scaling applied, step for step in f32 as the transformers library
 * does; `n_tokens` (prompt and reply together) matters to dynamic NTK only. *mscale multiplies cos
 * and sin. */
void model_inv_freq(const model_desc *m, int32_t n_tokens, float *inv_freq, float *mscale);

/* source absorbs 1/scale, every target takes scale: x * diag(1/s) * (W diag(s))^T. tap is the role
 * whose input is scaled (targets[0]). */
typedef struct {
    tensor_role source;
    tensor_role targets[4];
    int n_targets;
} smooth_group;

#endif
