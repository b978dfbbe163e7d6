/* TurboMind workspace on disk: reader (as weight_src) and writer. Layout of LMDeploy v0.6.4 ..
 * v0.7.3, and v0.6.0 .. v0.6.3 for reading; see docs/formats.md "TurboMind workspace". */
#ifndef TMF_FORMATS_TM_STORE_H
#define TMF_FORMATS_TM_STORE_H

#include "base/job.h"
#include "formats/manifest.h"
#include "formats/tm_config.h"
#include "formats/weights.h"

#define TM_WEIGHTS_DIR   "triton_models/weights"
#define TM_TOKENIZER_DIR "triton_models/tokenizer"
#define TM_CONFIG_NAME   "config.yaml"

/* ---- reading ---- */

/* Opens a workspace: config.yaml is read, every weight file that it implies must be there with its
 * exact size (E_INPUT with expected and found; LMDeploy only warns), and where there is a manifest
 * it must list them with the same sizes. Contents are not hashed here (manifest_verify). Files are
 * mapped on first use. E_UNSUPPORTED for config.ini (v0.1.0 .. v0.5.3), for tp above 1 and for what
 * tm_config_read refuses. */
err_code tm_store_weights(weight_src **out, const char *path, err *e);
/* The configuration alone, for info: "<path>/triton_models/weights/config.yaml". */
err_code tm_store_config(tm_config *out, const char *path, err *e);
/* Where the tokenizer files lie: triton_models/tokenizer, or the root (v0.7.0.post2 and later). */
err_code tm_store_tokenizer_dir(char *buf, size_t cap, const char *path, err *e);

/* ---- writing: files in any order, one open at a time; they appear together at commit ---- */

typedef struct tm_writer tm_writer;
err_code tm_writer_open(tm_writer **out, const char *path, bool force, const char *parent,
                        const char *options, err *e);
/* A file by its name relative to the workspace ("triton_models/weights/norm.weight"). */
err_code tm_writer_begin(tm_writer *w, const char *name, err *e);
err_code tm_writer_write(tm_writer *w, const void *data, size_t n, err *e);
err_code tm_writer_end(tm_writer *w, err *e);
err_code tm_writer_copy(tm_writer *w, const char *from, const char *name, err *e);
/* Writes the manifest and renames. Nulls *w, also on failure. */
err_code tm_writer_commit(tm_writer **w, err *e);
void tm_writer_abort(tm_writer **w); /* NULL accepted */

#endif
