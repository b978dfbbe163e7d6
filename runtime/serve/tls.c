/* The pair is kept as the files' text and parsed again for each handshake, which costs less than
 * its signature does: so a new pair can come at any time, and nobody has to know who still uses the
 * old one. */
#include "runtime/serve/tls.h"

#include <errno.h>
#include <gnutls/x509.h>
#include <pthread.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

#include "base/file.h"
#include "base/mem.h"

#define TLS_MAX_FILE  ((size_t)1 << 20)
#define TLS_MAX_CERTS 16

typedef struct {
    char *s; /* mem_alloc */
    size_t n;
} pem;

struct tls_pair {
    char *cert_path, *key_path;
    pthread_mutex_t lock; /* of the rest */
    pem cert, key;
    bool key_is_open, expired;
};

static void pem_free(pem *p)
{
    if (p->s) explicit_bzero(p->s, p->n);
    mem_free(p->s);
    *p = (pem){0};
}

static gnutls_datum_t datum(const pem *p)
{
    return (gnutls_datum_t){(unsigned char *)p->s, (unsigned)p->n};
}

static void free_certs(gnutls_pcert_st *certs, unsigned n)
{
    for (unsigned i = 0; certs && i < n; i++) gnutls_pcert_deinit(&certs[i]);
    gnutls_free(certs);
}

/* With gnutls_malloc: who takes them frees them with its counterpart. */
static int parse_certs(const pem *p, gnutls_pcert_st **out, unsigned *n)
{
    const gnutls_datum_t text = datum(p);
    gnutls_pcert_st *certs = gnutls_malloc(TLS_MAX_CERTS * sizeof *certs);
    *n = TLS_MAX_CERTS;
    *out = NULL;
    if (!certs) return GNUTLS_E_MEMORY_ERROR;
    const int rc = gnutls_pcert_list_import_x509_raw(certs, n, &text, GNUTLS_X509_FMT_PEM, 0);
    if (rc < 0) {
        gnutls_free(certs);
        return rc;
    }
    *out = certs;
    return 0;
}

static int parse_key(const pem *p, gnutls_privkey_t *out)
{
    const gnutls_datum_t text = datum(p);
    int rc = gnutls_privkey_init(out);
    if (rc < 0) return rc;
    rc = gnutls_privkey_import_x509_raw(*out, &text, GNUTLS_X509_FMT_PEM, NULL, 0);
    if (rc >= 0) return 0;
    gnutls_privkey_deinit(*out);
    *out = NULL;
    return rc;
}

static bool is_expired(const gnutls_pcert_st *cert)
{
    gnutls_x509_crt_t crt;
    gnutls_pcert_st copy = *cert; /* the call's parameter is not const */
    if (gnutls_pcert_export_x509(&copy, &crt) < 0) return false;
    const time_t end = gnutls_x509_crt_get_expiration_time(crt);
    gnutls_x509_crt_deinit(crt);
    return end != (time_t)-1 && end < time(NULL);
}

/* The credentials' own check. They take over the key and what is in the list, if they accept it. */
static err_code check_pair(const tls_pair *t, gnutls_pcert_st **certs, unsigned n,
                           gnutls_privkey_t *key, err *e)
{
    gnutls_certificate_credentials_t both;
    if (gnutls_certificate_allocate_credentials(&both) < 0)
        return err_set(e, E_NOMEM, "TLS: out of memory");
    const int rc = gnutls_certificate_set_key(both, NULL, 0, *certs, (int)n, *key);
    if (rc >= 0) {
        gnutls_free(*certs);
        *certs = NULL;
        *key = NULL;
    }
    gnutls_certificate_free_credentials(both);
    if (rc >= 0) return OK;
    return err_set(e, E_INPUT, "'%s' is not the key of the certificate in '%s': %s", t->key_path,
                   t->cert_path, gnutls_strerror(rc));
}

static err_code check_files(const tls_pair *t, const pem *cert, const pem *key, bool *expired,
                            err *e)
{
    gnutls_pcert_st *certs;
    gnutls_privkey_t k = NULL;
    unsigned n;
    int rc = parse_certs(cert, &certs, &n);
    if (rc < 0)
        return err_set(e, E_INPUT, "'%s': expected certificates in PEM form: %s", t->cert_path,
                       gnutls_strerror(rc));
    *expired = is_expired(&certs[0]);
    rc = parse_key(key, &k);
    const err_code result = rc < 0 ? err_set(e, E_INPUT,
                                             "'%s': expected a private key in PEM form, without a "
                                             "password: %s",
                                             t->key_path, gnutls_strerror(rc))
                                   : check_pair(t, &certs, n, &k, e);
    free_certs(certs, n);
    gnutls_privkey_deinit(k);
    return result;
}

err_code tls_load(tls_pair *t, err *e)
{
    pem cert = {0}, key = {0};
    struct stat st;
    bool expired = false;
    err_code rc = file_read(&cert.s, &cert.n, t->cert_path, TLS_MAX_FILE, e);
    if (rc == OK) rc = file_read(&key.s, &key.n, t->key_path, TLS_MAX_FILE, e);
    if (rc == OK) rc = check_files(t, &cert, &key, &expired, e);
    if (rc == OK) {
        (void)pthread_mutex_lock(&t->lock);
        const pem old_cert = t->cert, old_key = t->key;
        t->cert = cert;
        t->key = key;
        t->expired = expired;
        t->key_is_open = stat(t->key_path, &st) == 0 && (st.st_mode & S_IROTH) != 0;
        (void)pthread_mutex_unlock(&t->lock);
        cert = old_cert;
        key = old_key;
    }
    pem_free(&cert);
    pem_free(&key);
    return rc;
}

err_code tls_open(tls_pair **out, const char *cert_path, const char *key_path, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(tls_pair), "TLS", e));
    tls_pair *t = p;
    (void)pthread_mutex_init(&t->lock, NULL);
    err_code rc = mem_strdup(&t->cert_path, cert_path, e);
    if (rc == OK) rc = mem_strdup(&t->key_path, key_path, e);
    if (rc == OK) rc = tls_load(t, e);
    if (rc != OK) tls_close(&t);
    *out = t;
    return rc;
}

void tls_close(tls_pair **t)
{
    if (!t || !*t) return;
    pem_free(&(*t)->cert);
    pem_free(&(*t)->key);
    (void)pthread_mutex_destroy(&(*t)->lock);
    mem_free((*t)->cert_path);
    mem_free((*t)->key_path);
    mem_free(*t);
    *t = NULL;
}

bool tls_key_is_open(const tls_pair *t) { return t->key_is_open; }

bool tls_is_expired(const tls_pair *t) { return t->expired; }

int tls_copy(tls_pair *t, gnutls_pcert_st **certs, unsigned *n, gnutls_privkey_t *key)
{
    (void)pthread_mutex_lock(&t->lock);
    int rc = parse_certs(&t->cert, certs, n);
    if (rc == 0 && (rc = parse_key(&t->key, key)) != 0) {
        free_certs(*certs, *n);
        *certs = NULL;
    }
    (void)pthread_mutex_unlock(&t->lock);
    return rc;
}
