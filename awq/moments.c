/* Second moments by tap. */
#include "awq/moments.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "formats/calib_file.h"
#include "kernels/search_ops.h"

typedef struct {
    tensor_role tap;
    int64_t k;
    tensor h;
    bool ready;
} moment;

struct moment_source {
    device *d;
    layer_walk *walk;
    moment m[CALIB_TAPS];
    bool all;
    int only; /* the one being gathered, -1: all */
    int32_t layer;
    dev_buf buf, diagonal_buf;
    void *at;        /* the squares: in buf or in what was lent */
    float *diagonal; /* host, [widest k] */
    walk_progress progress;
};

static void taps_of(const model_desc *m, moment out[CALIB_TAPS])
{
    const calib_block b = calib_shape(m);
    for (int i = 0; i < CALIB_TAPS; i++) out[i] = (moment){.tap = b.tap[i].tap, .k = b.tap[i].k};
}

static size_t square_bytes(int64_t k) { return (size_t)k * (size_t)k * sizeof(float); }

size_t moments_bytes(const model_desc *m, bool all)
{
    moment t[CALIB_TAPS];
    size_t sum = 0, most = 0;
    taps_of(m, t);
    for (int i = 0; i < CALIB_TAPS; i++) {
        const size_t n = square_bytes(t[i].k);
        sum += n;
        most = n > most ? n : most;
    }
    return all ? sum : most;
}

static err_code take_room(moment_source *s, device *d, const model_desc *m, const dev_buf *lent,
                          err *e)
{
    int64_t widest = 0;
    void *mem;
    for (int i = 0; i < CALIB_TAPS; i++)
        if (s->m[i].k > widest) widest = s->m[i].k;
    TRY(mem_alloc(&mem, (size_t)widest, sizeof(float), "second moments", e));
    s->diagonal = mem;
    TRY(dev_alloc(&s->diagonal_buf, d, (size_t)widest * sizeof(float), "second moments", e));
    s->at = lent ? lent->data : NULL;
    if (lent) return OK;
    TRY(dev_alloc(&s->buf, d, moments_bytes(m, s->all), "second moments", e));
    s->at = s->buf.data;
    return OK;
}

err_code moments_open(moment_source **out, device *d, layer_walk *w, const model_desc *m,
                      size_t budget, const dev_buf *lent, err *e)
{
    void *mem;
    TRY(mem_alloc(&mem, 1, sizeof(moment_source), "second moments", e));
    moment_source *s = mem;
    s->d = d;
    s->walk = w;
    if (lent && lent->bytes < budget) budget = lent->bytes;
    s->all = moments_bytes(m, true) <= budget;
    taps_of(m, s->m);
    const err_code rc = take_room(s, d, m, lent, e);
    if (rc != OK) {
        moments_close(&s);
        return rc;
    }
    size_t at = 0;
    for (int i = 0; i < CALIB_TAPS; i++) {
        s->m[i].h = tensor_2d((uint8_t *)s->at + at, DT_F32, s->m[i].k, s->m[i].k);
        s->m[i].h.mem = dev_mem(d);
        if (s->all) at += square_bytes(s->m[i].k);
    }
    *out = s;
    return OK;
}

void moments_close(moment_source **s)
{
    if (!*s) return;
    dev_free(&(*s)->buf);
    dev_free(&(*s)->diagonal_buf);
    mem_free((*s)->diagonal);
    mem_free(*s);
    *s = NULL;
}

static err_code gather_tap(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    moment_source *s = ctx;
    (void)layer;
    for (int i = 0; i < CALIB_TAPS; i++)
        if (s->m[i].tap == role && (s->only < 0 || s->only == i))
            return op_gram(s->d, &s->m[i].h, x, e);
    return OK;
}

err_code moments_finite(const float *d, int64_t step, int64_t k, int32_t layer, tensor_role tap,
                        err *e)
{
    for (int64_t i = 0; i < k; i++)
        if (!isfinite(d[i * step]))
            return err_set(e, E_INPUT,
                           "layer %d: tap %s: channel %" PRId64
                           ": expected finite activations, found %s",
                           (int)layer, role_name(tap), i, isnan(d[i * step]) ? "nan" : "infinity");
    return OK;
}

static err_code check_finite(const moment_source *s, const moment *m, err *e)
{
    tensor dev = tensor_1d(s->diagonal_buf.data, DT_F32, m->k),
           host = tensor_1d(s->diagonal, DT_F32, m->k);
    dev.mem = dev_mem(s->d);
    TRY(op_diagonal(s->d, &dev, &m->h, e));
    TRY(dev_copy(s->d, &host, &dev, e));
    TRY(dev_sync(s->d, e));
    return moments_finite(s->diagonal, 1, m->k, s->layer, m->tap, e);
}

static err_code zero(moment_source *s, moment *m, err *e)
{
    m->ready = false;
    return op_zero(s->d, &m->h, e);
}

static err_code finish(moment_source *s, moment *m, err *e)
{
    TRY(op_gram_finish(s->d, &m->h, e));
    TRY(check_finite(s, m, e));
    m->ready = true;
    return OK;
}

err_code moments_layer(moment_source *s, int32_t layer, bool advance, bool *advanced,
                       const walk_progress *p, err *e)
{
    s->layer = layer;
    s->progress = *p;
    if (!s->all) s->progress.stage = NULL; /* passes come again and again */
    *advanced = false;
    for (int i = 0; i < CALIB_TAPS; i++) s->m[i].ready = false;
    if (!s->all) return OK;
    s->only = -1;
    for (int i = 0; i < CALIB_TAPS; i++) TRY(zero(s, &s->m[i], e));
    TRY(layer_walk_run(s->walk, !advance, gather_tap, s, p, e));
    for (int i = 0; i < CALIB_TAPS; i++) TRY(finish(s, &s->m[i], e));
    *advanced = advance;
    return OK;
}

err_code moments_get(moment_source *s, tensor_role r, tensor *h, err *e)
{
    int at = 0;
    while (at < CALIB_TAPS && s->m[at].tap != calib_tap_of(r)) at++;
    if (at == CALIB_TAPS)
        return err_set(e, E_UNSUPPORTED, "second moments: %s: no such input", role_name(r));
    moment *m = &s->m[at];
    if (!m->ready) {
        for (int i = 0; i < CALIB_TAPS; i++) s->m[i].ready = false; /* they share the memory */
        s->only = at;
        TRY(zero(s, m, e));
        TRY(layer_walk_run(s->walk, true, gather_tap, s, &s->progress, e));
        TRY(finish(s, m, e));
    }
    *h = m->h;
    return OK;
}
