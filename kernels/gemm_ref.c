/* y (+)= x w^T + bias; w [n,k] as checkpoints store it. */
#include "kernels/ref.h"

err_code gemm_ref(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                  bool add, err *e)
{
    const int64_t k = x->shape[1];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++) {
        const float *in = ref_row_f32(x, i);
        float *out = ref_row_f32(y, i);
        for (int64_t j = 0; j < y->shape[1]; j++) {
            const void *row = ref_row(w, j);
            double sum = bias ? ref_load(bias->data, bias->dt, j) : 0.0;
            for (int64_t c = 0; c < k; c++) sum += (double)in[c] * ref_load(row, w->dt, c);
            out[j] = (float)(add ? out[j] + sum : sum);
        }
    }
    return OK;
}
