/* One interface over every weight container: 16-bit HF directory, AWQ HF directory, TurboMind workspace,
 * and memory (tests). Views are borrowed and stay valid until weights_close. */
#ifndef TMF_FORMATS_WEIGHTS_H
#define TMF_FORMATS_WEIGHTS_H

#include "formats/model.h"

typedef struct weight_src weight_src;
typedef enum { SRC_HF, SRC_AWQ, SRC_TM, SRC_MEM } src_kind;

typedef struct {
    bool w4;       /* which of the two is set */
    tensor dense;  /* [n,k]; strides {k,1}, or {1,n} where the container stores inputs first (SRC_TM) */
    w4_weight q;
    tensor bias;   /* [n]; data NULL when absent (also copied into q.bias) */
} linear_view;

/* Detects the kind: "triton_models" inside is a workspace; config.json with quantization_config an AWQ
 * directory; else a 16-bit HF directory. A path that is none: E_INPUT saying what was looked for. */
err_code weights_open(weight_src **out, const char *path, err *e);
void weights_close(weight_src **s);
src_kind weights_kind(const weight_src *s);
const model_desc *weights_desc(const weight_src *s);
const char *weights_path(const weight_src *s);
const char *weights_tokenizer_dir(const weight_src *s); /* where tokenizer files and configs lie */
const char *weights_digest(const weight_src *s); /* hex digest naming this content (headers and sizes; a
                                                    manifest's when there is one): what artifacts record as parent */

/* Embedding, norms, head: float tensors. ROLE_HEAD of a tied model is the embedding. */
err_code weights_tensor(weight_src *s, tensor_role r, int32_t layer, tensor *view, err *e);
/* A linear of a block. Shapes are checked against the description. */
err_code weights_linear(weight_src *s, tensor_role r, int32_t layer, int32_t expert, linear_view *view,
                        err *e);
bool weights_has(weight_src *s, tensor_role r, int32_t layer, int32_t expert);
/* Hints for streaming: the pages of a layer are needed soon / may go. */
void weights_prefetch(weight_src *s, int32_t layer);
void weights_release(weight_src *s, int32_t layer);
/* bf16 values that do not fit f16, per tensor: calls `each` for every tensor that has some. */
typedef void (*weights_overflow_fn)(void *ud, const char *tensor, int64_t count, float largest);
err_code weights_check_f16(weight_src *s, weights_overflow_fn each, void *ud, err *e);

/* ---- implemented by the containers, not for callers ---- */
typedef struct {
    void (*close)(void *self);
    err_code (*tensor)(void *self, tensor_role r, int32_t layer, tensor *view, err *e);
    err_code (*linear)(void *self, tensor_role r, int32_t layer, int32_t expert, linear_view *view, err *e);
    bool (*has)(void *self, tensor_role r, int32_t layer, int32_t expert);
    void (*advise)(void *self, int32_t layer, bool need);
} weight_ops;
/* Takes ownership of `self` on success only. digest may be "" for SRC_MEM. */
err_code weights_make(weight_src **out, src_kind kind, const model_desc *m, const char *path,
                      const char *tokenizer_dir, const char *digest, const weight_ops *ops, void *self,
                      err *e);

#endif
