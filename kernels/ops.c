/* The checked entry points: everything that a kernel may assume is established here, once. */
#include "kernels/ops.h"

#include <inttypes.h>
#include <stdint.h>

#include "base/mem.h"
#include "kernels/device_internal.h"
#include "kernels/ops_check.h"

#define SHAPE(...) ((const int64_t[]){__VA_ARGS__})

/* Products that do not fit saturate: no allocation of that size can succeed. */
static size_t times(size_t a, size_t b) { return b && a > SIZE_MAX / b ? SIZE_MAX : a * b; }

size_t kv_layer_data_bytes(kv_format f, int32_t blocks, int32_t block_tokens, int32_t kv_heads,
                           int32_t head_dim)
{
    const size_t bits = f == KV_16 ? 16 : f == KV_8 ? 8 : 4;
    const size_t token = (size_t)head_dim * bits / 8;
    return times(times(times((size_t)blocks, 2 * (size_t)kv_heads), (size_t)block_tokens), token);
}

size_t kv_layer_param_bytes(kv_format f, int32_t blocks, int32_t block_tokens, int32_t kv_heads)
{
    if (f == KV_16) return 0;
    return times(times(times((size_t)blocks, 2 * (size_t)kv_heads), (size_t)block_tokens), 4);
}

err_code op_embed(device *d, tensor *y, const tensor *table, const tensor *ids, err *e)
{
    TRY(check_weight(d, table, "op_embed: table", 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, ids, "op_embed: ids", DT_I32, 1, SHAPE(-1), e));
    TRY(check_rows(d, y, "op_embed: y", SHAPE(ids->shape[0], table->shape[1]), e));
    TRY(check_ids(d, ids, table->shape[0], "op_embed: ids", e));
    return tensor_count(y) ? d->ops.embed(d, y, table, ids, e) : OK;
}

err_code op_rmsnorm(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e)
{
    TRY(check_rows(d, x, "op_rmsnorm: x", SHAPE(-1, -1), e));
    TRY(check_tensor(d, y, "op_rmsnorm: y", d->act, 2, x->shape, e));
    TRY(check_weight(d, w, "op_rmsnorm: w", 1, SHAPE(x->shape[1]), e));
    return tensor_count(x) ? d->ops.rmsnorm(d, y, x, w, eps, e) : OK;
}

err_code op_add(device *d, tensor *y, const tensor *x, err *e)
{
    TRY(check_rows(d, x, "op_add: x", SHAPE(-1, -1), e));
    TRY(check_rows(d, y, "op_add: y", x->shape, e));
    return tensor_count(x) ? d->ops.add(d, y, x, e) : OK;
}

err_code op_gemm(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                 bool add, err *e)
{
    TRY(check_tensor(d, x, "op_gemm: x", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_weight(d, w, "op_gemm: w", 2, SHAPE(-1, x->shape[1]), e));
    TRY(check_contiguous(w, "op_gemm: w", e));
    if (!w->shape[1]) return err_set(e, E_SHAPE, "op_gemm: x: no columns");
    TRY(check_rows(d, y, "op_gemm: y", SHAPE(x->shape[0], w->shape[0]), e));
    if (bias) TRY(check_weight(d, bias, "op_gemm: bias", 1, SHAPE(w->shape[0]), e));
    return tensor_count(y) ? d->ops.gemm(d, y, x, w, bias, add, e) : OK;
}

err_code op_gemm_w4(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e)
{
    if (w->layout != W4_DEVICE)
        return err_set(e, E_UNSUPPORTED, "op_gemm_w4: w: expected layout %s, got %s",
                       w4_layout_name(W4_DEVICE), w4_layout_name(w->layout));
    TRY(check_tensor(d, x, "op_gemm_w4: x", d->act, 2, SHAPE(-1, w->k), e));
    TRY(check_rows(d, y, "op_gemm_w4: y", SHAPE(x->shape[0], w->n), e));
    if (w->bias.data) TRY(check_weight(d, &w->bias, "op_gemm_w4: bias", 1, SHAPE(w->n), e));
    return tensor_count(y) ? d->ops.gemm_w4(d, y, x, w, add, e) : OK;
}

err_code op_glu(device *d, tensor *y, const tensor *gate, const tensor *up, err *e)
{
    TRY(check_tensor(d, gate, "op_glu: gate", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, up, "op_glu: up", d->act, 2, gate->shape, e));
    TRY(check_tensor(d, y, "op_glu: y", d->act, 2, gate->shape, e));
    return tensor_count(y) ? d->ops.glu(d, y, gate, up, e) : OK;
}

err_code op_norm_gemm_w4(device *d, tensor *y, tensor *h, const tensor *x, const tensor *norm,
                         float eps, const w4_weight *w, bool glu, err *e)
{
    if (!d->ops.norm_gemm_w4) {
        TRY(op_rmsnorm(d, h, x, norm, eps, e));
        TRY(op_gemm_w4(d, y, h, w, false, e));
        if (!glu) return OK;
        tensor gate = tensor_cols(y, 0, w->n / 2);
        const tensor up = tensor_cols(y, w->n / 2, w->n / 2);
        return op_glu(d, &gate, &gate, &up, e);
    }
    if (w->layout != W4_DEVICE)
        return err_set(e, E_UNSUPPORTED, "op_norm_gemm_w4: w: expected layout %s, got %s",
                       w4_layout_name(W4_DEVICE), w4_layout_name(w->layout));
    TRY(check_rows(d, x, "op_norm_gemm_w4: x", SHAPE(-1, w->k), e));
    TRY(check_tensor(d, h, "op_norm_gemm_w4: h", d->act, 2, x->shape, e));
    TRY(check_weight(d, norm, "op_norm_gemm_w4: norm", 1, SHAPE(w->k), e));
    TRY(check_tensor(d, y, "op_norm_gemm_w4: y", d->act, 2, SHAPE(x->shape[0], w->n), e));
    if (w->bias.data) TRY(check_weight(d, &w->bias, "op_norm_gemm_w4: bias", 1, SHAPE(w->n), e));
    return tensor_count(y) ? d->ops.norm_gemm_w4(d, y, h, x, norm, eps, w, glu, e) : OK;
}

static err_code check_rope(const device *d, const tensor *q, const tensor *k, const tensor *v,
                           const rope_spec *r, const batch_rows *rows, const kv_layer *kv, err *e)
{
    TRY(check_kv(d, kv, "op_rope_kv", e));
    const int64_t hd = kv->head_dim, kvh = kv->kv_heads;
    TRY(check_tensor(d, q, "op_rope_kv: q", d->act, 4, SHAPE(-1, kvh, -1, hd), e));
    const int64_t m = q->shape[0];
    TRY(check_tensor(d, k, "op_rope_kv: k", d->act, 3, SHAPE(m, kvh, hd), e));
    TRY(check_tensor(d, v, "op_rope_kv: v", d->act, 3, SHAPE(m, kvh, hd), e));
    if (r->dims < 0 || r->dims > hd || r->dims % 2)
        return err_set(e, E_SHAPE,
                       "op_rope_kv: rotated dims: expected an even number up to %" PRId64
                       ", got %d",
                       hd, r->dims);
    TRY(check_tensor(d, &r->inv_freq, "op_rope_kv: inv_freq", DT_F32, 1, SHAPE(r->dims / 2), e));
    return check_batch(d, rows, kv, m, "op_rope_kv", e);
}

err_code op_rope_kv(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                    const batch_rows *rows, const kv_layer *kv, err *e)
{
    TRY(check_rope(d, q, k, v, r, rows, kv, e));
    return q->shape[0] ? d->ops.rope_kv(d, q, k, v, r, rows, kv, e) : OK;
}

err_code op_rope_attn(device *d, tensor *y, tensor *q, tensor *k, const tensor *v,
                      const rope_spec *r, const batch_rows *rows, const kv_layer *kv, float scale,
                      int32_t window, err *e)
{
    if (!d->ops.rope_attn) {
        TRY(op_rope_kv(d, q, k, v, r, rows, kv, e));
        return op_attn(d, y, q, kv, rows, scale, window, e);
    }
    TRY(check_rope(d, q, k, v, r, rows, kv, e));
    const int64_t m = q->shape[0], width = q->shape[1] * q->shape[2] * q->shape[3];
    TRY(check_tensor(d, y, "op_rope_attn: y", d->act, 2, SHAPE(m, width), e));
    if (window < 0)
        return err_set(e, E_SHAPE, "op_rope_attn: window: expected 0 or more, got %d", window);
    return m ? d->ops.rope_attn(d, y, q, k, v, r, rows, kv, scale, window, e) : OK;
}

err_code op_attn(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                 float scale, int32_t window, err *e)
{
    TRY(check_kv(d, kv, "op_attn", e));
    TRY(check_tensor(d, q, "op_attn: q", d->act, 4, SHAPE(-1, kv->kv_heads, -1, kv->head_dim), e));
    const int64_t m = q->shape[0], width = q->shape[1] * q->shape[2] * q->shape[3];
    TRY(check_tensor(d, y, "op_attn: y", d->act, 2, SHAPE(m, width), e));
    TRY(check_batch(d, rows, kv, m, "op_attn", e));
    if (window < 0)
        return err_set(e, E_SHAPE, "op_attn: window: expected 0 or more, got %d", window);
    return tensor_count(y) ? d->ops.attn(d, y, q, kv, rows, scale, window, e) : OK;
}

err_code op_nll(device *d, tensor *nll, tensor *argmax, const tensor *logits, const tensor *target,
                err *e)
{
    TRY(check_tensor(d, logits, "op_nll: logits", DT_F32, 2, SHAPE(-1, -1), e));
    const int64_t m = logits->shape[0];
    TRY(check_tensor(d, nll, "op_nll: nll", DT_F32, 1, &m, e));
    if (argmax) TRY(check_tensor(d, argmax, "op_nll: argmax", DT_I32, 1, &m, e));
    TRY(check_tensor(d, target, "op_nll: target", DT_I32, 1, &m, e));
    TRY(check_ids(d, target, logits->shape[1], "op_nll: target", e));
    return m ? d->ops.nll(d, nll, argmax, logits, target, e) : OK;
}

bool dev_samples(const device *d) { return d->ops.sample != NULL; }

err_code op_sample(device *d, tensor *ids, tensor *logits, const tensor *rows, const tensor *bias,
                   tensor *counts, err *e)
{
    TRY(check_tensor(d, logits, "op_sample: logits", DT_F32, 2, SHAPE(-1, -1), e));
    const int64_t m = logits->shape[0], v = logits->shape[1];
    TRY(check_tensor(d, ids, "op_sample: ids", DT_I32, 1, &m, e));
    TRY(check_tensor(d, rows, "op_sample: rows", DT_U8, 2, SHAPE(m, sizeof(sample_row)), e));
    TRY(check_tensor(d, bias, "op_sample: bias", DT_U8, 2,
                     SHAPE(m, SAMPLE_MAX_BIAS * sizeof(sample_bias)), e));
    TRY(check_tensor(d, counts, "op_sample: counts", DT_I32, 3, SHAPE(-1, 2, v), e));
    if (!dev_samples(d)) return err_set(e, E_UNSUPPORTED, "op_sample: not on %s", d->name);
    if (v > 1 << 18)
        return err_set(e, E_UNSUPPORTED, "op_sample: expected up to %d ids, got %" PRId64, 1 << 18,
                       v);
    return m ? d->ops.sample(d, ids, logits, rows, bias, counts, e) : OK;
}

err_code op_absstat(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e)
{
    TRY(check_tensor(d, x, "op_absstat: x", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, absmax, "op_absstat: absmax", DT_F32, 1, SHAPE(x->shape[1]), e));
    TRY(check_tensor(d, abssum, "op_absstat: abssum", DT_F64, 1, SHAPE(x->shape[1]), e));
    return tensor_count(x) ? d->ops.absstat(d, absmax, abssum, x, e) : OK;
}

err_code op_gram(device *d, tensor *h, const tensor *x, err *e)
{
    TRY(check_tensor(d, x, "op_gram: x", d->act, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, h, "op_gram: h", DT_F32, 2, SHAPE(x->shape[1], x->shape[1]), e));
    return tensor_count(x) ? d->ops.gram(d, h, x, e) : OK;
}

err_code op_gram_finish(device *d, tensor *h, err *e)
{
    TRY(check_tensor(d, h, "op_gram_finish: h", DT_F32, 2, SHAPE(-1, h->shape[0]), e));
    return tensor_count(h) ? d->ops.gram_finish(d, h, e) : OK;
}

err_code op_quad(device *d, tensor *out, const tensor *x, const tensor *h, err *e)
{
    TRY(check_tensor(d, x, "op_quad: x", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, h, "op_quad: h", DT_F32, 2, SHAPE(x->shape[1], x->shape[1]), e));
    TRY(check_tensor(d, out, "op_quad: out", DT_F64, 1, SHAPE(x->shape[0]), e));
    return tensor_count(out) ? d->ops.quad(d, out, x, h, e) : OK;
}

err_code op_matmul(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    TRY(check_tensor(d, a, "op_matmul: a", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, b, "op_matmul: b", DT_F32, 2, SHAPE(a->shape[1], -1), e));
    TRY(check_tensor(d, y, "op_matmul: y", DT_F32, 2, SHAPE(a->shape[0], b->shape[1]), e));
    return tensor_count(y) ? d->ops.matmul(d, y, a, b, e) : OK;
}

err_code op_product(device *d, tensor *y, float alpha, const tensor *a, const tensor *b, bool add,
                    err *e)
{
    if (!d->ops.product)
        return err_set(e, E_UNSUPPORTED, "op_product: expected the CPU device, got %s", d->name);
    TRY(check_tensor(d, a, "op_product: a", DT_F32, 2, SHAPE(-1, -1), e));
    TRY(check_tensor(d, b, "op_product: b", DT_F32, 2, SHAPE(a->shape[1], -1), e));
    TRY(check_tensor(d, y, "op_product: y", DT_F32, 2, SHAPE(a->shape[0], b->shape[1]), e));
    return tensor_count(y) ? d->ops.product(d, y, alpha, a, b, add, e) : OK;
}

err_code w4_upload(device *d, dev_buf *buf, w4_weight *out, const w4_weight *const *parts,
                   int n_parts, err *e)
{
    if (n_parts < 1)
        return err_set(e, E_SHAPE, "w4_upload: expected 1 or more parts, got %d", n_parts);
    for (int i = 0; i < n_parts; i++) {
        TRY(w4_check(parts[i], "w4_upload", e));
        if (parts[i]->layout == W4_DEVICE)
            return err_set(e, E_UNSUPPORTED, "w4_upload: part %d is already tiled for a device", i);
        if (parts[i]->k != parts[0]->k || parts[i]->group != parts[0]->group)
            return err_set(e, E_SHAPE,
                           "w4_upload: part %d: expected k %" PRId64 " and group %d, got %" PRId64
                           " and %d",
                           i, parts[0]->k, parts[0]->group, parts[i]->k, parts[i]->group);
    }
    return d->ops.w4_upload(d, buf, out, parts, n_parts, e);
}

size_t w4_upload_bytes(const device *d, int64_t k, int64_t n, int32_t group)
{
    return d->ops.w4_upload_bytes(k, n, group);
}

size_t ops_reserve_bytes(const device *d, const op_limits *lim)
{
    return d->ops.scratch_bytes(d, lim);
}

err_code ops_reserve(device *d, const op_limits *lim, err *e)
{
    void *p;
    const size_t bytes = ops_reserve_bytes(d, lim);
    if (bytes <= d->shared_bytes) return OK;
    TRY(d->backend->alloc(&p, d, bytes, "kernel scratch", e));
    d->backend->release(d, d->shared_scratch);
    d->shared_scratch = p;
    d->shared_bytes = bytes;
    return OK;
}
