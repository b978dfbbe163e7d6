/* Bytes that are being written: a buffer that grows, and JSON onto it. What failed for lack of
 * memory is noticed once, at the end. */
#ifndef TMF_RUNTIME_SERVE_OUT_H
#define TMF_RUNTIME_SERVE_OUT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"

typedef struct {
    char *s;       /* [n], not terminated; NULL while empty */
    size_t n, cap; /* bytes */
    bool failed;   /* something could not be added: what is there is incomplete */
} out_buf;         /* zero-init; free with out_free */

void out_free(out_buf *o);
void out_reset(out_buf *o); /* empty, memory kept */
void out_bytes(out_buf *o, const char *s, size_t n);
void out_text(out_buf *o, const char *s); /* NUL-terminated, as it is */
void out_printf(out_buf *o, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A JSON string of n bytes of UTF-8, quotes included; bytes that are not UTF-8 become U+FFFD. */
void out_string(out_buf *o, const char *s, size_t n);
/* The same without quotes. */
void out_escaped(out_buf *o, const char *s, size_t n);
void out_int(out_buf *o, int64_t v);
/* Reads back as the same double; null when not finite. out_float: as the same float. */
void out_number(out_buf *o, double v);
void out_float(out_buf *o, float v);

#endif
