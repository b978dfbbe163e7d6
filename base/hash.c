/* Digests over xxHash and libcrypto. */
#include "base/hash.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <xxhash.h>

#include "base/file.h"
#include "base/mem.h"

struct hash_xxh {
    XXH3_state_t *state;
};

static void hash_hex(char *out, const unsigned char *bytes, size_t n)
{
    static const char digits[] = "0123456789abcdef";
    for (size_t i = 0; i < n; i++) {
        *out++ = digits[bytes[i] >> 4];
        *out++ = digits[bytes[i] & 15];
    }
    *out = '\0';
}

static hash128 hash_of_xxh(XXH128_hash_t h)
{
    XXH128_canonical_t c; /* big endian: the same text on every machine, and what xxhsum prints */
    hash128 out;
    XXH128_canonicalFromHash(&c, h);
    hash_hex(out.hex, c.digest, sizeof c.digest);
    return out;
}

hash128 hash_xxh128(const void *data, size_t n) { return hash_of_xxh(XXH3_128bits(data, n)); }

err_code hash_xxh_open(hash_xxh **out, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(hash_xxh), "hash state", e));
    hash_xxh *h = p;
    h->state = XXH3_createState();
    if (!h->state) {
        mem_free(h);
        return err_set(e, E_NOMEM, "hash state: out of memory");
    }
    (void)XXH3_128bits_reset(h->state); /* fails for a NULL state only */
    *out = h;
    return OK;
}

void hash_xxh_add(hash_xxh *h, const void *data, size_t n)
{
    if (n) (void)XXH3_128bits_update(h->state, data, n); /* fails for a NULL state only */
}

hash128 hash_xxh_end(hash_xxh **h)
{
    const hash128 out = hash_of_xxh(XXH3_128bits_digest((*h)->state));
    (void)XXH3_freeState((*h)->state);
    mem_free(*h);
    *h = NULL;
    return out;
}

err_code hash_sha256(hash256 *out, const void *data, size_t n, err *e)
{
    unsigned char md[EVP_MAX_MD_SIZE];
    unsigned int len = 0;
    if (EVP_Digest(n ? data : "", n, md, &len, EVP_sha256(), NULL) != 1 || len != 32)
        return err_set(e, E_NOMEM, "sha-256: libcrypto failed");
    hash_hex(out->hex, md, 32);
    return OK;
}

bool hash_equal(const hash256 *a, const hash256 *b)
{
    return CRYPTO_memcmp(a->hex, b->hex, sizeof a->hex) == 0;
}

err_code hash_sha256_file(hash256 *out, const char *path, err *e)
{
    file_map m;
    TRY(file_map_open(&m, path, e));
    const err_code rc = hash_sha256(out, m.data, m.size, e);
    file_map_close(&m);
    return rc;
}
