/* The error vocabulary: codes with one printable line. */
#include "base/err.h"

#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

/* Callers format into their own buffer first: e->msg itself may be an argument. Names from files
 * end up in messages, so control bytes are blanked: a message is one line and cannot drive a
 * terminal. */
static void err_store(err *e, const char *text, size_t full)
{
    const size_t cap = sizeof e->msg;
    const size_t n = full < cap ? full : cap - 1;
    memcpy(e->msg, text, n);
    e->msg[n] = '\0';
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)e->msg[i] < 0x20 || e->msg[i] == 0x7f) e->msg[i] = '?';
    if (full >= cap) memcpy(e->msg + cap - 4, "...", 4);
}

static size_t err_format(char *buf, size_t cap, const char *fmt, va_list ap)
{
    const int n = vsnprintf(buf, cap, fmt, ap);
    if (n >= 0) return (size_t)n;
    buf[0] = '\0';
    return 0;
}

err_code err_set(err *e, err_code c, const char *fmt, ...)
{
    char buf[sizeof e->msg];
    va_list ap;
    va_start(ap, fmt);
    const size_t n = err_format(buf, sizeof buf, fmt, ap);
    va_end(ap);
    err_store(e, buf, n);
    e->code = c;
    return c;
}

err_code err_sys(err *e, err_code c, int errnum, const char *fmt, ...)
{
    char head[sizeof e->msg], full[2 * sizeof e->msg], text[128];
    va_list ap;
    va_start(ap, fmt);
    (void)err_format(head, sizeof head, fmt, ap);
    va_end(ap);
    const int n = snprintf(full, sizeof full, "%s: %s", head,
                           strerror_r(errnum, text, sizeof text));
    err_store(e, full, n < 0 ? 0 : (size_t)n);
    e->code = errnum == ENOMEM ? E_NOMEM : c;
    return e->code;
}

err_code err_wrap(err *e, const char *fmt, ...)
{
    char head[sizeof e->msg], full[2 * sizeof e->msg];
    va_list ap;
    va_start(ap, fmt);
    (void)err_format(head, sizeof head, fmt, ap);
    va_end(ap);
    const int n = snprintf(full, sizeof full, "%s: %s", head, e->msg);
    err_store(e, full, n < 0 ? 0 : (size_t)n);
    return e->code;
}

const char *err_name(err_code c)
{
    switch (c) {
    case OK: return "ok";
    case E_USAGE: return "usage";
    case E_INPUT: return "input";
    case E_IO: return "io";
    case E_NOMEM: return "nomem";
    case E_SHAPE: return "shape";
    case E_UNSUPPORTED: return "unsupported";
    case E_DEVICE: return "device";
    case E_CANCELED: return "canceled";
    case E_LIMIT: return "limit";
    case E_CHECK: return "check";
    case E_BUSY: return "busy";
    }
    return "unknown";
}
