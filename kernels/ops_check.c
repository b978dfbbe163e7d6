/* See ops_check.h. Messages name op and tensor, expected and found. */
#include "kernels/ops_check.h"

#include <inttypes.h>
#include <stdio.h>

static err_code check_place(const device *d, const tensor *t, const char *what, err *e)
{
    if (t->mem != d->mem)
        return err_set(e, E_SHAPE, "%s: expected memory of %s, got %s memory", what, d->name,
                       t->mem == MEM_HOST ? "host" : "cuda");
    if (tensor_count(t) == 0) return OK;
    if (!t->data) return err_set(e, E_SHAPE, "%s: no data", what);
    if (t->stride[t->ndim - 1] != 1)
        return err_set(e, E_SHAPE, "%s: expected a last stride of 1, got %" PRId64, what,
                       t->stride[t->ndim - 1]);
    for (int i = 0; i + 1 < t->ndim; i++) {
        const int64_t least = t->stride[i + 1] * t->shape[i + 1];
        if (t->shape[i] > 1 && t->stride[i] < least)
            return err_set(e, E_SHAPE, "%s: stride %" PRId64 " of dimension %d is under %" PRId64,
                           what, t->stride[i], i, least);
    }
    return OK;
}

err_code check_tensor(const device *d, const tensor *t, const char *what, dtype dt, int ndim,
                      const int64_t *shape, err *e)
{
    TRY(tensor_expect(t, what, dt, ndim, shape, e));
    return check_place(d, t, what, e);
}

err_code check_rows(const device *d, const tensor *t, const char *what, const int64_t *shape,
                    err *e)
{
    return check_tensor(d, t, what, t->dt == d->resid ? d->resid : d->act, 2, shape, e);
}

err_code check_weight(const device *d, const tensor *t, const char *what, int ndim,
                      const int64_t *shape, err *e)
{
    const dtype dt = t->dt;
    if (dt != DT_F16 && dt != DT_BF16 && dt != DT_F32)
        return err_set(e, E_SHAPE, "%s: expected F16, BF16 or F32, got %s", what, dtype_name(dt));
    return check_tensor(d, t, what, dt, ndim, shape, e);
}

err_code check_contiguous(const tensor *t, const char *what, err *e)
{
    if (tensor_contiguous(t)) return OK;
    return err_set(e, E_SHAPE, "%s: expected contiguous rows", what);
}

err_code check_ids(const device *d, const tensor *ids, int64_t limit, const char *what, err *e)
{
    if (d->mem != MEM_HOST) return OK;
    const int32_t *id = ids->data;
    for (int64_t i = 0; i < ids->shape[0]; i++) {
        if (id[i] < 0 || id[i] >= limit)
            return err_set(e, E_SHAPE, "%s[%" PRId64 "]: expected 0 to %" PRId64 ", got %" PRId32,
                           what, i, limit - 1, id[i]);
    }
    return OK;
}

err_code check_kv(const device *d, const kv_layer *kv, const char *op, err *e)
{
    if (kv->format != KV_16 && kv->format != KV_8 && kv->format != KV_4)
        return err_set(e, E_UNSUPPORTED, "%s: kv format %d: expected 0, 8 or 4", op,
                       (int)kv->format);
    if (kv->mem != d->mem)
        return err_set(e, E_SHAPE, "%s: the kv cache is not in memory of %s", op, d->name);
    if (kv->blocks < 1 || kv->block_tokens < 1 || kv->kv_heads < 1)
        return err_set(
            e, E_SHAPE,
            "%s: kv cache of %d blocks of %d tokens, %d heads: expected 1 or more of each", op,
            kv->blocks, kv->block_tokens, kv->kv_heads);
    if (kv->head_dim < 2 || kv->head_dim > 1024 || kv->head_dim % 2)
        return err_set(e, E_UNSUPPORTED,
                       "%s: head dimension %d: expected an even number up to 1024", op,
                       kv->head_dim);
    if (!kv->data || (kv->format != KV_16 && !kv->param))
        return err_set(e, E_SHAPE, "%s: kv cache without data", op);
    return OK;
}

/* One sequence: its rows, their positions, its blocks. */
static err_code check_seq(const batch_rows *r, const kv_layer *kv, int32_t s, const char *op,
                          err *e)
{
    const int32_t *start = r->seq_start.data, *pos = r->pos.data, *block = r->block_table.data;
    const int32_t len = ((const int32_t *)r->kv_len.data)[s];
    const int64_t max_blocks = r->block_table.shape[1];
    if (start[s + 1] - start[s] > r->max_q || len > r->max_kv)
        return err_set(e, E_SHAPE,
                       "%s: sequence %d: %d rows, %d cached: over max_q %d or max_kv %d", op, s,
                       start[s + 1] - start[s], len, r->max_q, r->max_kv);
    if (len < 0 || len > max_blocks * kv->block_tokens)
        return err_set(e, E_SHAPE, "%s: sequence %d: kv_len %d: expected 0 to %" PRId64, op, s, len,
                       max_blocks * kv->block_tokens);
    for (int32_t i = start[s]; i < start[s + 1]; i++) {
        if (pos[i] < 0 || pos[i] >= len)
            return err_set(e, E_SHAPE, "%s: pos[%d]: expected 0 to %d, got %d", op, i, len - 1,
                           pos[i]);
    }
    block += s * r->block_table.stride[0];
    for (int64_t b = 0; b * kv->block_tokens < len; b++) {
        if (block[b] < 0 || block[b] >= kv->blocks)
            return err_set(e, E_SHAPE,
                           "%s: sequence %d: block %" PRId64 ": expected 0 to %d, got %d", op, s, b,
                           kv->blocks - 1, block[b]);
    }
    return OK;
}

err_code check_batch(const device *d, const batch_rows *r, const kv_layer *kv, int64_t m,
                     const char *op, err *e)
{
    char what[64];
    const int64_t s = r->seqs;
    if (s < 1) return err_set(e, E_SHAPE, "%s: expected 1 or more sequences, got %" PRId64, op, s);
    snprintf(what, sizeof what, "%s: pos", op);
    TRY(check_tensor(d, &r->pos, what, DT_I32, 1, (int64_t[]){m}, e));
    snprintf(what, sizeof what, "%s: seq_start", op);
    TRY(check_tensor(d, &r->seq_start, what, DT_I32, 1, (int64_t[]){s + 1}, e));
    snprintf(what, sizeof what, "%s: kv_len", op);
    TRY(check_tensor(d, &r->kv_len, what, DT_I32, 1, (int64_t[]){s}, e));
    snprintf(what, sizeof what, "%s: block_table", op);
    TRY(check_tensor(d, &r->block_table, what, DT_I32, 2, (int64_t[]){s, -1}, e));
    if (d->mem != MEM_HOST) return OK;

    const int32_t *start = r->seq_start.data;
    if (start[0] != 0 || start[s] != m)
        return err_set(e, E_SHAPE, "%s: seq_start: expected 0 to %" PRId64 ", got %d to %d", op, m,
                       start[0], start[s]);
    for (int32_t i = 0; i < s; i++) {
        if (start[i + 1] < start[i])
            return err_set(e, E_SHAPE, "%s: seq_start[%d] is under its predecessor", op, i + 1);
    }
    for (int32_t i = 0; i < s; i++) TRY(check_seq(r, kv, i, op, e));
    return OK;
}
