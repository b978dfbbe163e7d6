/* Bytes of a data file, unpacked: layers of file, zstd, gzip/xz/bzip2 and tar, told by content.
 * Not for callers of corpus.h. */
#ifndef TMF_DATASETS_SOURCE_H
#define TMF_DATASETS_SOURCE_H

#include <stdbool.h>
#include <stddef.h>

#include "base/job.h"

#define SOURCE_MAX_RATIO   2000 /* unpacked to packed bytes, beyond SOURCE_FREE_BYTES */
#define SOURCE_FREE_BYTES  ((uint64_t)64 << 20)
#define SOURCE_MAX_ENTRIES (1 << 20) /* of an archive */

typedef struct source source;
/* Errors name the path. A JSON array, parquet or zip file is E_UNSUPPORTED. */
err_code source_open(source **out, const char *path, const job *j, err *e);
void source_close(source **s);
/* The next file inside: itself once, or the regular entries of an archive. *name is borrowed
 * until the next call, without the endings of compressions; NULL when there is none left. */
err_code source_next(source *s, const char **name, err *e);
/* Bytes of the current file; *n is 0 at its end. */
err_code source_read(source *s, void *buf, size_t cap, size_t *n, err *e);
/* "path" or "path: entry", for messages. */
const char *source_where(const source *s);

#endif
