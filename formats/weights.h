/* One interface over every weight container: 16-bit HF directory, AWQ HF directory, TurboMind
 * workspace, and memory (tests). Views are borrowed and stay valid until weights_close. A source is
 * used by one thread at a time; the memory behind its views may be read by many. Files are mapped:
 * their sizes are checked at open, and a file that another process shortens while it is open ends
 * the reader with SIGBUS, as any mapping. */
#ifndef TMF_FORMATS_WEIGHTS_H
#define TMF_FORMATS_WEIGHTS_H

#include "base/job.h"
#include "formats/model.h"

typedef struct weight_src weight_src;
typedef enum { SRC_HF, SRC_AWQ, SRC_TM, SRC_MEM } src_kind;

typedef struct {
    bool w4; /* which of the two is set */
    tensor
        dense; /* [n,k]; strides {k,1}, or {1,n} where the container stores inputs first (SRC_TM) */
    w4_weight q;
    tensor bias; /* [n]; data NULL when absent (also copied into q.bias) */
} linear_view;

/* Detects the kind: "triton_models" inside is a workspace; config.json with quantization_config an
 * AWQ directory; else a 16-bit HF directory. A path that is none: E_INPUT saying what was looked
 * for; E_IO when it does not exist. What is checked at open: hf_dir.h, tm_store.h. */
err_code weights_open(weight_src **out, const char *path, err *e);
void weights_close(weight_src **s);
src_kind weights_kind(const weight_src *s);
const model_desc *weights_desc(const weight_src *s);
const char *weights_path(const weight_src *s);
const char *weights_tokenizer_dir(const weight_src *s); /* where tokenizer files and configs lie */
const char *
weights_digest(const weight_src *s); /* hex digest naming this content (headers and sizes; a
                             manifest's when there is one): what artifacts record as parent */

/* Embedding, norms, head: float tensors. ROLE_HEAD of a tied model is the embedding. */
err_code weights_tensor(weight_src *s, tensor_role r, int32_t layer, tensor *view, err *e);
/* A linear of a block. Shapes are checked against the description. */
err_code weights_linear(weight_src *s, tensor_role r, int32_t layer, int32_t expert,
                        linear_view *view, err *e);
bool weights_has(weight_src *s, tensor_role r, int32_t layer, int32_t expert);
/* Hints for streaming: the pages of a layer are needed soon / may go. */
void weights_prefetch(weight_src *s, int32_t layer);
void weights_release(weight_src *s, int32_t layer);

/* ---- content checks: one pass at several GB/s over memory that is about to be used anyway ---- */
/* bf16 and f32 values that become infinite in f16, per tensor: called for every tensor that has
 * some. */
typedef void (*weights_overflow_fn)(void *ud, const char *tensor, int64_t count, float largest);
/* One float vector or matrix with a unit stride (E_SHAPE for others). E_INPUT "<name>: element
 * [3,17]: expected a finite number, got nan". Counts what f16 does not hold, and the largest
 * magnitude of it; both may be NULL. */
err_code weights_check_tensor(const tensor *t, const char *name, int64_t *overflows, float *largest,
                              err *e);
/* Every float tensor of a layer, -1 for embedding, final norm and head: weights, biases, scales.
 * Walks over layers call it as they come to one; the pages are read once. `each` may be NULL. */
err_code weights_check_layer(weight_src *s, int32_t layer, weights_overflow_fn each, void *ud,
                             err *e);
/* The whole source, layer by layer, releasing each: for tools that read it all beforehand. Progress
 * and stop through j. */
err_code weights_check_finite(weight_src *s, const job *j, err *e);
err_code weights_check_f16(weight_src *s, weights_overflow_fn each, void *ud, err *e);

/* ---- implemented by the containers, not for callers ---- */
typedef struct {
    void (*close)(void *self);
    err_code (*tensor)(void *self, tensor_role r, int32_t layer, tensor *view, err *e);
    err_code (*linear)(void *self, tensor_role r, int32_t layer, int32_t expert, linear_view *view,
                       err *e);
    bool (*has)(void *self, tensor_role r, int32_t layer, int32_t expert);
    void (*advise)(void *self, int32_t layer, bool need);
} weight_ops;
/* Takes ownership of `self` on success only. digest may be "" for SRC_MEM. */
err_code weights_make(weight_src **out, src_kind kind, const model_desc *m, const char *path,
                      const char *tokenizer_dir, const char *digest, const weight_ops *ops,
                      void *self, err *e);

#endif
