/* Digests: XXH3-128 for checksums of tensors, SHA-256 for provenance. Hex strings are lower
 * case. */
#ifndef TMF_BASE_HASH_H
#define TMF_BASE_HASH_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct {
    char hex[33];
} hash128;
typedef struct {
    char hex[65];
} hash256;

hash128 hash_xxh128(const void *data, size_t n);
typedef struct hash_xxh hash_xxh; /* streaming */
err_code hash_xxh_open(hash_xxh **h, err *e);
void hash_xxh_add(hash_xxh *h, const void *data, size_t n);
hash128 hash_xxh_end(hash_xxh **h); /* frees */

err_code hash_sha256(hash256 *out, const void *data, size_t n, err *e);
/* In a time that does not depend on where they differ. */
bool hash_equal(const hash256 *a, const hash256 *b);
err_code hash_sha256_file(hash256 *out, const char *path, err *e);

#endif
