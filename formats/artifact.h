/* What calib and plan files share: one safetensors file whose metadata says what it is ("kind",
 * "version", "tool"), what it came from ("parent.<name>") and the XXH3-128 of every tensor
 * ("xxh3.<tensor>"). No paths, thread counts or times: the same content gives the same bytes. */
#ifndef TMF_FORMATS_ARTIFACT_H
#define TMF_FORMATS_ARTIFACT_H

#include "base/hash.h"
#include "formats/safetensors.h"

#define ARTIFACT_NAME_MAX 96

/* A tensor to write; `t` is borrowed, host, contiguous. */
typedef struct {
    char name[ARTIFACT_NAME_MAX];
    tensor t;
} artifact_part;

/* Writes all parts atomically. meta: "key", "value", ..., NULL, beside what is written for every
 * artifact. */
err_code artifact_write(const char *path, const char *kind, int version, const char *const *meta,
                        const artifact_part *parts, int64_t n_parts, bool force, err *e);

/* Opens and checks kind, version and every tensor's digest; the views of the file may then be
 * trusted to be what was written. E_INPUT with expected and found. */
err_code artifact_open(st_file **out, const char *path, const char *kind, int version, err *e);
/* The same checks on an open file. */
err_code artifact_check(const st_file *f, const char *kind, int version, err *e);
/* A metadata value that must be there. */
err_code artifact_meta(const st_file *f, const char *key, const char **value, err *e);
/* E_INPUT "<path>: made from model <found>, not from <expected>" unless metadata "parent.<parent>"
 * agrees. */
err_code artifact_check_parent(const st_file *f, const char *parent, const char *expected, err *e);
/* What lies at a path, for tools that must neither repeat finished work nor destroy what is not
 * theirs. FRESH: an intact artifact of `kind` whose metadata "fingerprint" agrees; STALE: one of
 * `kind` that is damaged or made otherwise; FOREIGN: anything else. */
typedef enum { ARTIFACT_ABSENT, ARTIFACT_FRESH, ARTIFACT_STALE, ARTIFACT_FOREIGN } artifact_state;
artifact_state artifact_state_of(const char *path, const char *kind, int version,
                                 const char *fingerprint);
/* Names the content: digest over kind, version, parents and every tensor's name, type, shape and
 * digest. */
err_code artifact_digest(const st_file *f, hash128 *out, err *e);

/* A tensor that must be there with this type and shape (-1 matches anything); errors name file and
 * tensor. */
err_code artifact_get(const st_file *f, const char *name, dtype dt, int ndim, const int64_t *shape,
                      tensor *view, err *e);

/* Collects "key", "value" pairs and tensor names that outlive the calls that build them. */
typedef struct {
    const char **pairs; /* [2*n+1], NULL-ended; keys and values owned */
    int64_t n, cap;
} artifact_pairs;
err_code artifact_pairs_add(artifact_pairs *p, const char *key, const char *value, err *e);
void artifact_pairs_free(artifact_pairs *p);

#endif
