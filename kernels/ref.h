/* The references: one file an op, plain loops, sums in double, one thread. They define right; every
 * other variant is compared with them. Arguments have passed the checks of ops.c. */
#ifndef TMF_KERNELS_REF_H
#define TMF_KERNELS_REF_H

#include <assert.h>

#include "base/half.h"
#include "kernels/device_internal.h"

/* Element i of a row of any float type that weights come in. */
static inline float ref_load(const void *row, dtype dt, int64_t i)
{
    if (dt == DT_F32) return ((const float *)row)[i];
    if (dt == DT_F16) return f16_to_f32(((const f16 *)row)[i]);
    assert(dt == DT_BF16);
    return bf16_to_f32(((const bf16 *)row)[i]);
}
/* Row i of a 2-d tensor. */
static inline const void *ref_row(const tensor *t, int64_t i)
{
    return (const char *)t->data + (size_t)(i * t->stride[0]) * dtype_bytes(t->dt);
}
static inline float *ref_row_f32(const tensor *t, int64_t i)
{
    assert(t->dt == DT_F32);
    return (float *)t->data + i * t->stride[0];
}

err_code embed_ref(device *d, tensor *y, const tensor *table, const tensor *ids, err *e);
err_code rmsnorm_ref(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e);
err_code add_ref(device *d, tensor *y, const tensor *x, err *e);
err_code gemm_ref(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                  bool add, err *e);
err_code gemm_w4_ref(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e);
err_code glu_ref(device *d, tensor *y, const tensor *gate, const tensor *up, err *e);
err_code rope_kv_ref(device *d, tensor *q, tensor *k, const tensor *v, const rope_spec *r,
                     const batch_rows *rows, const kv_layer *kv, err *e);
err_code attn_ref(device *d, tensor *y, const tensor *q, const kv_layer *kv, const batch_rows *rows,
                  float scale, int32_t window, err *e);
err_code nll_ref(device *d, tensor *nll, tensor *argmax, const tensor *logits, const tensor *target,
                 err *e);
err_code absstat_ref(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e);
err_code gram_ref(device *d, tensor *h, const tensor *x, err *e);
err_code gram_finish_ref(device *d, tensor *h, err *e);
err_code quad_ref(device *d, tensor *out, const tensor *x, const tensor *h, err *e);
err_code matmul_ref(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
err_code product_ref(device *d, tensor *y, float alpha, const tensor *a, const tensor *b, bool add,
                     err *e);

#endif
