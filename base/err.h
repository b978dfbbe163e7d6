/* The only error vocabulary. Every function that can fail returns an err_code and takes `err *e`
 * last. `e` is never NULL, untouched on success, and complete enough on failure to print as it is:
 * "model.safetensors: tensor 'lm_head.weight': expected shape [32000,2048], got [32000,1024]". */
#ifndef TMF_BASE_ERR_H
#define TMF_BASE_ERR_H

typedef enum {
    OK = 0,
    E_USAGE,       /* bad command line */
    E_INPUT,       /* a file or text is not what it should be */
    E_IO,          /* the system could not read or write: disk full, permission */
    E_NOMEM,       /* out of host or device memory */
    E_SHAPE,       /* a tensor has another shape or dtype than expected */
    E_UNSUPPORTED, /* valid, but not something this build handles */
    E_DEVICE,      /* the device failed */
    E_CANCELED,    /* stopped by a signal or by the caller */
    E_LIMIT,       /* a stated limit was reached (cache full, session too long) */
    E_CHECK,       /* a comparison or verification failed */
    E_BUSY         /* would fit later: a queue is full */
} err_code;

typedef struct {
    err_code code;
    char msg[512];
} err;

/* Sets code and message; a message that is too long is cut with "...". Returns `c`. */
err_code err_set(err *e, err_code c, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
/* As err_set, with ": " and strerror(errnum) behind. ENOMEM maps to E_NOMEM whatever `c` is. */
err_code err_sys(err *e, err_code c, int errnum, const char *fmt, ...)
    __attribute__((format(printf, 4, 5)));
/* Prepends "<text>: " to the message; returns the code that is already there. */
err_code err_wrap(err *e, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A fixed lower-case name of a code, for logs and tests. */
const char *err_name(err_code c);

#define TRY(x)                             \
    do {                                   \
        err_code try_rc_ = (x);            \
        if (try_rc_ != OK) return try_rc_; \
    } while (0)

#endif
