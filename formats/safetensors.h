/* safetensors files: u64 LE header length, JSON header, data. The reader maps; the writer is
 * atomic. */
#ifndef TMF_FORMATS_SAFETENSORS_H
#define TMF_FORMATS_SAFETENSORS_H

#include "base/file.h"
#include "base/tensor.h"

/* ---- reading ---- */
typedef struct st_file st_file;
/* view has the shape as stored up to rank 4; of a higher rank (at most 8) its first dimension is
 * the product of the leading ones. view.data is NULL only when the file has no data at all. Old
 * writers did not align the data: ask st_aligned before reading through a typed pointer. */
typedef struct {
    const char *name;
    tensor view;
    int full_ndim;
    int64_t full_shape[8];
} st_entry;
/* Everything is checked here: header size (at most 100 MB), UTF-8, no duplicate key, dtypes, shape
 * products, offsets that cover the data exactly without gap or overlap. E_INPUT "<path>: tensor
 * 'x': ..."; E_UNSUPPORTED for dtypes of newer versions and ranks above 8. The sizes are those at
 * open: another process that shortens the file later makes reads of the lost pages end in SIGBUS,
 * as with any mapping. */
err_code st_open(st_file **out, const char *path, err *e);
err_code st_open_memory(st_file **out, const void *data, size_t size, const char *name,
                        err *e); /* borrowed bytes; for fuzzing */
void st_close(st_file **f);
const char *st_path(const st_file *f);
int64_t st_count(const st_file *f);
st_entry st_at(const st_file *f, int64_t i);                    /* in order of the data */
bool st_find(const st_file *f, const char *name, tensor *view); /* hashed */
/* As st_find; E_INPUT when absent, E_UNSUPPORTED when the data is not aligned to its dtype. */
err_code st_get(const st_file *f, const char *name, tensor *view, err *e);
bool st_aligned(const tensor *view);
const void *st_head(const st_file *f,
                    size_t *n);      /* length word and header as stored, for digests */
uint64_t st_bytes(const st_file *f); /* the whole file */
const char *st_meta(const st_file *f, const char *key);          /* NULL when absent */
void st_advise(const st_file *f, const tensor *view, bool need); /* page hints for one tensor */

/* ---- writing: declare all, then stream in any order, then commit. Tensors lie sorted by alignment
 * then name, metadata keys sorted: same calls, same bytes. The data begins at a multiple of 64.
 * Misuse (a name that was not declared, another shape, a part written twice) is E_CHECK. ---- */
typedef struct st_writer st_writer;
/* meta: "key", "value", ..., NULL; or NULL for none */
err_code st_writer_open(st_writer **out, const char *path, const char *const *meta, bool force,
                        err *e);
err_code st_writer_add(st_writer *w, const char *name, dtype dt, int ndim, const int64_t *shape,
                       err *e);
err_code st_writer_data(st_writer *w, const char *name, const tensor *host,
                        err *e); /* contiguous, as declared */
/* Part of a tensor by element offset, for streaming; every byte must be written before commit. */
err_code st_writer_part(st_writer *w, const char *name, int64_t first, const void *data,
                        int64_t count, err *e);
/* Replaces a value given at open by one of the same length: a digest that is known only after the
 * data. */
err_code st_writer_meta(st_writer *w, const char *key, const char *value, err *e);
uint64_t st_writer_bytes(st_writer *w); /* size of the file to come; 0 before the first data */
/* fsync and rename; nulls w. E_CHECK when a tensor was declared but not written whole. */
err_code st_writer_commit(st_writer **w, err *e);
void st_writer_abort(st_writer **w);

#endif
