/* out_i = x_i H x_i^T */
#include "kernels/ref.h"

err_code quad_ref(device *d, tensor *out, const tensor *x, const tensor *h, err *e)
{
    const int64_t k = x->shape[1];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < x->shape[0]; i++) {
        const float *row = ref_row_f32(x, i);
        double sum = 0;
        for (int64_t a = 0; a < k; a++) {
            const float *line = ref_row_f32(h, a);
            double dot = 0;
            for (int64_t b = 0; b < k; b++) dot += (double)line[b] * row[b];
            sum += dot * row[a];
        }
        ((double *)out->data)[i] = sum;
    }
    return OK;
}
