/* h += x^T x in its lower triangle; finish copies that to the upper one. */
#include "kernels/ref.h"

err_code gram_ref(device *d, tensor *h, const tensor *x, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < h->shape[0]; i++) {
        float *out = ref_row_f32(h, i);
        for (int64_t j = 0; j <= i; j++) {
            double sum = out[j];
            for (int64_t r = 0; r < x->shape[0]; r++) {
                const float *row = ref_row_f32(x, r);
                sum += (double)row[i] * row[j];
            }
            out[j] = (float)sum;
        }
    }
    return OK;
}

err_code gram_finish_ref(device *d, tensor *h, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < h->shape[0]; i++) {
        for (int64_t j = 0; j < i; j++) ref_row_f32(h, j)[i] = ref_row_f32(h, i)[j];
    }
    return OK;
}
