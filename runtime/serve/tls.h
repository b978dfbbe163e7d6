/* A certificate and its key from PEM files, as handshakes want them. */
#ifndef TMF_RUNTIME_SERVE_TLS_H
#define TMF_RUNTIME_SERVE_TLS_H

#include <gnutls/abstract.h>
#include <stdbool.h>

#include "base/err.h"

/* TLS 1.2 and 1.3, nothing older. */
#define TLS_PRIORITIES "NORMAL:-VERS-ALL:+VERS-TLS1.3:+VERS-TLS1.2"

typedef struct tls_pair tls_pair;
/* The paths are copied. */
err_code tls_open(tls_pair **out, const char *cert_path, const char *key_path, err *e);
void tls_close(tls_pair **t); /* NULL accepted */
/* Reads both files: from now on new handshakes get them. E_IO: not there or not readable; E_INPUT:
 * not PEM, not a certificate (chain: ours first), not an unencrypted key, or the two do not belong
 * together; what was there before stays then. Any thread. */
err_code tls_load(tls_pair *t, err *e);
/* As loaded last: other users can read the key; the certificate's time is over. */
bool tls_key_is_open(const tls_pair *t);
bool tls_is_expired(const tls_pair *t);
/* Copies for one handshake, which frees them (GNUTLS_CERT_RETR_DEINIT_ALL); not 0: failed. Any
 * thread. */
int tls_copy(tls_pair *t, gnutls_pcert_st **certs, unsigned *n, gnutls_privkey_t *key);

#endif
