/* libtmforge: what its parts share. */
#ifndef TMF_LIB_TMF_INTERNAL_H
#define TMF_LIB_TMF_INTERNAL_H

#include <string.h>

#include "formats/chat.h"
#include "lib/tmforge.h"
#include "runtime/serve/engine.h"
#include "runtime/serve/grammar.h"

#define TMF_MAX_STOPS 64

struct tmf_model {
    device *d;
    weight_src *src;
    tokenizer *t;
    chat *c;
    model *m;
    engine *g;
    grammar_set *grammars;
    job j;
    void (*log)(void *ud, int level, const char *line);
    void *log_ud;
    int32_t stops[TMF_MAX_STOPS];
    int n_stops;
    int32_t max_batch;
    size_t piece_bytes; /* of the longest token */
};

_Static_assert(sizeof((tmf_error *)0)->message == sizeof((err *)0)->msg, "messages have one size");
/* err as the caller sees it; e may be NULL. Here, so that it is no symbol of the library. */
static inline tmf_status tmf_told(const err *from, tmf_error *e)
{
    if (e) {
        e->code = (int32_t)from->code;
        memcpy(e->message, from->msg, sizeof e->message);
    }
    return (tmf_status)from->code;
}

#endif
