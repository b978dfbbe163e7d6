/* Writer of a Hugging Face AWQ directory (docs/formats.md "AWQ directory"): config.json, tokenizer
 * files, model.safetensors or shards with an index, and a manifest. Every tensor's name, shape and
 * place is fixed at open from the description of the source, so parts may come in any order and
 * memory stays at one linear. The directory appears under its name at commit only. */
#ifndef TMF_FORMATS_W4_DIR_H
#define TMF_FORMATS_W4_DIR_H

#include "base/job.h"
#include "formats/weights.h"

typedef struct w4_dir_writer w4_dir_writer;

typedef struct {
    int32_t group;        /* of every W4 linear; must divide their inputs (E_SHAPE) */
    uint32_t dense_roles; /* bit r: role r stays f16, named in modules_to_not_convert; all linears:
                             the directory is a 16-bit model */
    int64_t shard_bytes;  /* 0: 4 GB (10^9); a tensor is never cut */
    bool clamp_f16;       /* beyond f16: +-65504 with a warning; else E_INPUT naming them */
    bool force;           /* replace what is at the output path */
    pool *workers;        /* threads to lay codes out with; NULL: none */
    /* Provenance "key", "value", ..., NULL: no paths, no times; NULL: none. "parent" and "options"
     * also go to the manifest. */
    const char *const *meta;
} w4_dir_opts;

/* `src` is what was quantized: it gives names, shapes, and the directory whose config.json and
 * tokenizer files go along (weights_tokenizer_dir). Borrowed until commit or abort. `j` may be
 * NULL. */
err_code w4_dir_open(w4_dir_writer **out, const char *path, weight_src *src, const w4_dir_opts *o,
                     const job *j, err *e);
/* Embedding, norm or head (layer -1 for those of the model): any float dtype and strides, in the
 * shape of the source. NaN, infinity, and values beyond f16 are refused as opts says (E_INPUT). The
 * head of a tied model is not written: giving it is a bug (assert). */
err_code w4_dir_tensor(w4_dir_writer *w, tensor_role r, int32_t layer, const tensor *view, err *e);
/* A linear as codes in any host layout; codes->bias (any float dtype) goes along and must be there
 * exactly when the model has one for this role. expert -1 in dense models. */
err_code w4_dir_linear(w4_dir_writer *w, tensor_role r, int32_t layer, int32_t expert,
                       const w4_weight *codes, err *e);
/* A linear of opts->dense_roles: weight [n,k], bias [n] or NULL. */
err_code w4_dir_dense(w4_dir_writer *w, tensor_role r, int32_t layer, int32_t expert,
                      const tensor *weight, const tensor *bias, err *e);
/* Checks that everything was written, adds config, tokenizer files and manifest, renames. Nulls *w,
 * also on failure (what was written is removed). */
err_code w4_dir_commit(w4_dir_writer **w, err *e);
void w4_dir_abort(w4_dir_writer **w); /* NULL accepted */

/* Bytes of the weight files that w4_dir_open would declare: for --dry-run. */
err_code w4_dir_bytes(uint64_t *bytes, int64_t *tensors, const model_desc *m, const w4_dir_opts *o,
                      err *e);
/* Bytes that the writer allocates at most, beside what the caller holds. */
size_t w4_dir_memory(const model_desc *m, const w4_dir_opts *o);

#endif
