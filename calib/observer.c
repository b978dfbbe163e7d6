/* Statistics of the inputs of a block's linears. */
#include "calib/observer.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/search_ops.h"

/* One block of device memory, and its copy where the host cannot read the device's. */
struct observer {
    device *d;
    calib_block dev, host;
    dev_buf buf;
    void *copy; /* NULL on a device whose memory is the host's */
    size_t bytes;
};

static size_t align64(size_t n) { return (n + 63) & ~(size_t)63; }

/* Lays the tensors of all taps out from `base` (NULL: sizes alone) and returns the bytes. */
static size_t lay_out(calib_block *b, uint8_t *base, memspace mem)
{
    size_t at = 0;
    for (int i = 0; i < b->n_taps; i++) {
        calib_tap *t = &b->tap[i];
        t->abssum = tensor_1d(base ? base + at : NULL, DT_F64, t->k);
        at += align64((size_t)t->k * sizeof(double));
        t->absmax = tensor_1d(base ? base + at : NULL, DT_F32, t->k);
        at += align64((size_t)t->k * sizeof(float));
        t->blocks = tensor_of(base ? base + at : NULL, DT_F32, 3,
                              (const int64_t[]){t->k / t->g, t->g, t->g});
        at += align64((size_t)t->k * (size_t)t->g * sizeof(float));
        t->abssum.mem = t->absmax.mem = t->blocks.mem = mem;
    }
    return at;
}

size_t observer_bytes(const device *d, const model_desc *m)
{
    calib_block b = calib_shape(m);
    return lay_out(&b, NULL, MEM_HOST) * (dev_mem(d) == MEM_HOST ? 1 : 2);
}

err_code observer_open(observer **out, device *d, const model_desc *m, err *e)
{
    observer *o = NULL;
    err_code rc;
    TRY(mem_alloc((void **)&o, 1, sizeof *o, "observer", e));
    o->d = d;
    o->dev = o->host = calib_shape(m);
    o->bytes = lay_out(&o->dev, NULL, MEM_HOST);
    if ((rc = dev_alloc(&o->buf, d, o->bytes, "statistics", e)) != OK) goto fail;
    lay_out(&o->dev, o->buf.data, dev_mem(d));
    if (dev_mem(d) != MEM_HOST && (rc = mem_alloc(&o->copy, o->bytes, 1, "statistics", e)) != OK)
        goto fail;
    lay_out(&o->host, o->copy ? o->copy : o->buf.data, MEM_HOST);
    *out = o;
    return OK;
fail:
    observer_close(&o);
    return rc;
}

void observer_close(observer **o)
{
    if (!*o) return;
    dev_free(&(*o)->buf);
    mem_free((*o)->copy);
    mem_free(*o);
    *o = NULL;
}

/* The device's zeroes come from the host's: a device has no fill of its own. */
static err_code copy_all(observer *o, bool to_host, err *e)
{
    tensor host = tensor_1d(o->copy ? o->copy : o->buf.data, DT_U8, (int64_t)o->bytes);
    tensor dev = tensor_1d(o->buf.data, DT_U8, (int64_t)o->bytes);
    dev.mem = dev_mem(o->d);
    if (!o->copy) return OK;
    TRY(dev_copy(o->d, to_host ? &host : &dev, to_host ? &dev : &host, e));
    return dev_sync(o->d, e);
}

err_code observer_reset(observer *o, err *e)
{
    memset(o->copy ? o->copy : o->buf.data, 0, o->bytes);
    for (int i = 0; i < o->host.n_taps; i++) o->host.tap[i].count = 0;
    return copy_all(o, false, e);
}

err_code observer_tap(void *ctx, tensor_role role, int32_t layer, const tensor *x, err *e)
{
    observer *o = ctx;
    calib_tap *t = (calib_tap *)(uintptr_t)calib_find(&o->dev, role);
    calib_tap *counted = (calib_tap *)(uintptr_t)calib_find(&o->host, role);
    if (!t || x->shape[1] != t->k)
        return err_set(e, E_SHAPE, "layer %d: tap %s: expected %" PRId64 " channels, got %" PRId64,
                       (int)layer, role_name(role), t ? t->k : 0, x->shape[1]);
    TRY(op_absstat(o->d, &t->absmax, &t->abssum, x, e));
    TRY(op_gram_blocks(o->d, &t->blocks, x, e));
    counted->count += x->shape[0];
    return OK;
}

/* A NaN or infinity anywhere stays in the sums; their channel is the one to name. */
static err_code check_finite(const calib_tap *t, int32_t layer, err *e)
{
    const double *sum = t->abssum.data;
    for (int64_t i = 0; i < t->k; i++)
        if (!isfinite(sum[i]))
            return err_set(e, E_INPUT,
                           "layer %d: tap %s: channel %" PRId64
                           ": expected finite activations, found %s",
                           (int)layer, role_name(t->tap), i, isnan(sum[i]) ? "nan" : "infinity");
    const float *h = t->blocks.data;
    for (int64_t i = 0; i < t->k * t->g; i++)
        if (!isfinite(h[i]))
            return err_set(e, E_INPUT,
                           "layer %d: tap %s: channel %" PRId64
                           ": the sum of squares is beyond f32",
                           (int)layer, role_name(t->tap), i / t->g);
    return OK;
}

err_code observer_finish(observer *o, int32_t layer, calib_block *b, err *e)
{
    TRY(dev_sync(o->d, e));
    TRY(copy_all(o, true, e));
    for (int i = 0; i < o->host.n_taps; i++) TRY(check_finite(&o->host.tap[i], layer, e));
    *b = o->host;
    return OK;
}
