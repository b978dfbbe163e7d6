/* Finished layers of a long run, kept in the directory "<target>.part" until the target itself is
 * written: what a killed run leaves, the next one takes up. Every file in it is an artifact with
 * its digests; one that does not check is treated as not done, never as an error. */
#ifndef TMF_FORMATS_SPOOL_H
#define TMF_FORMATS_SPOOL_H

#include "formats/artifact.h"

typedef struct spool spool;

/* What the target will be. */
typedef struct {
    const char *target, *kind;
    int version;
    const char *fingerprint; /* names inputs and options: up to 64 characters */
    int32_t layers;
    bool force; /* make it again, and replace whatever lies there */
} spool_opts;

/* Takes the lock of the target (E_IO naming the holder when another run has it), and keeps the
 * finished layers that were made with the same fingerprint. *fresh: the target is there, intact and
 * of this fingerprint: nothing is to be done, and what a killed run left is removed. A target that
 * is not an artifact of this kind is E_USAGE without `force`, before any work. Strings are copied.
 */
err_code spool_open(spool **out, const spool_opts *o, bool *fresh, err *e);
/* Drops the lock. The directory stays for the next run unless spool_finish was reached. */
void spool_close(spool **s);

bool spool_has(const spool *s, int32_t layer);
int32_t spool_count(const spool *s); /* layers that are done */
err_code spool_put(spool *s, int32_t layer, const artifact_part *parts, int64_t n_parts, err *e);
/* The layer's file, checked when it was opened; close with st_close. */
err_code spool_get(const spool *s, int32_t layer, st_file **out, err *e);

/* Another set of layers for the target of `of` and under its lock, in the directory `name` beside
 * of's own: of several ways to make the target, one is written when all are known. Its parts carry
 * a fingerprint of their own; finishing it writes the target with of's, and removes every set. `of`
 * stays open until it is closed. */
err_code spool_open_set(spool **out, const spool *of, const char *name, const char *fingerprint,
                        err *e);
/* What else is known once all layers of a set are: one artifact. *out NULL when there is none, or
 * not a sound one of this run; close with st_close. */
err_code spool_put_note(spool *s, const artifact_part *parts, int64_t n_parts, err *e);
err_code spool_get_note(const spool *s, st_file **out, err *e);

/* Hidden states as they enter `layer`: saved whole, one at a time. */
err_code spool_put_state(spool *s, int32_t layer, const tensor *state, err *e);
/* *layer of the saved state, whose values go to `state` when dtype and shape agree; 0 when there is
 * none and `state` is untouched. */
err_code spool_get_state(spool *s, int32_t *layer, tensor *state, err *e);

/* Writes the target from `extra` and every layer's tensors, then removes the directory. meta:
 * "key", "value", ..., NULL, to which the fingerprint is added. */
err_code spool_finish(spool *s, const char *const *meta, const artifact_part *extra,
                      int64_t n_extra, err *e);

#endif
