/* manifest.json of a directory artifact: every file with its size and XXH3-128, the tool version,
 * the options and the digest of the parent, closed by a SHA-256 over all of it (docs/formats.md
 * "Manifest"). */
#ifndef TMF_FORMATS_MANIFEST_H
#define TMF_FORMATS_MANIFEST_H

#include "base/hash.h"
#include "base/job.h"

#define MANIFEST_NAME     "manifest.json"
#define MANIFEST_KIND_AWQ "awq"
#define MANIFEST_KIND_TM  "turbomind-workspace"

typedef struct {
    char *name; /* relative, '/' between plain names */
    uint64_t size;
    hash128 digest;
} manifest_file;

typedef struct {
    char *kind, *tool, *parent, *options; /* never NULL */
    manifest_file *files;                 /* sorted by name once written or read */
    size_t n, cap;
    hash256 digest; /* of the whole manifest once written or read: names this content */
} manifest;

/* Zero-init, then init or read; free accepts a zeroed one. */
err_code manifest_init(manifest *m, const char *kind, const char *parent, const char *options,
                       err *e);
void manifest_free(manifest *m);
err_code manifest_add(manifest *m, const char *name, uint64_t size, const hash128 *digest, err *e);
/* Size and digest read from dir/name. */
err_code manifest_add_file(manifest *m, const char *dir, const char *name, err *e);
/* Sorts, closes with the digest, writes dir/manifest.json. */
err_code manifest_write(manifest *m, const char *dir, err *e);

bool manifest_exists(const char *dir);
/* E_INPUT when it is not a manifest of ours or names leave the directory, E_CHECK when its own
 * digest does not agree. */
err_code manifest_read(manifest *m, const char *dir, err *e);
const manifest_file *manifest_find(const manifest *m, const char *name); /* NULL when absent */
/* Every file there with its size: cheap. E_CHECK naming the file, expected and found. */
err_code manifest_check_sizes(const manifest *m, const char *dir, err *e);
/* Every byte as well; progress through j. */
err_code manifest_verify(const manifest *m, const char *dir, const job *j, err *e);

#endif
