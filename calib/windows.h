/* Token windows for calibration: from local texts (datasets/corpus.h), or written by the model
 * itself. */
#ifndef TMF_CALIB_WINDOWS_H
#define TMF_CALIB_WINDOWS_H

#include "base/hash.h"
#include "datasets/corpus.h"
#include "formats/weights.h"
#include "kernels/device.h"
#include "runtime/memory_plan.h"

typedef struct {
    corpus_opts corpus;        /* dataset "self" without files: the model writes */
    const char *chat_template; /* NULL: the directory's own or the family's */
} windows_opts;

/* "self" and no file to read. */
bool windows_self(const windows_opts *o);
/* ids i32 [samples,seqlen]. */
err_code windows_make(int32_t *ids, device *d, weight_src *src, const windows_opts *o, const job *j,
                      err *e);
/* What windows_make holds beside the ids. */
err_code windows_memory(memory_plan *p, device *d, weight_src *src, const windows_opts *o, err *e);
/* How the windows were chosen, as JSON: no paths. Free with mem_free. */
err_code windows_describe(char **out, const windows_opts *o, err *e);
/* Names the tokenizer by the bytes of its files. */
err_code windows_tokenizer_digest(hash128 *out, const char *tokenizer_dir, err *e);

/* Windows of the model's own text: each starts with what the tokenizer puts before a text, every
 * other one with the head of a user's turn where there is a chat template; sampled at temperature
 * 1, top-p 0.95. When an answer ends, the next text begins behind it. The same seed gives the same
 * ids at any thread count. */
err_code self_windows(int32_t *ids, device *d, weight_src *src, const tokenizer *t, const chat *c,
                      const windows_opts *o, const job *j, err *e);
err_code self_memory(memory_plan *p, device *d, weight_src *src, int32_t samples, int32_t seqlen,
                     err *e);
/* The whole memory of a calibration run over these windows: program, windows, forward passes. */
err_code windows_run_memory(memory_plan *p, device *d, weight_src *src, const windows_opts *w,
                            err *e);

#endif
