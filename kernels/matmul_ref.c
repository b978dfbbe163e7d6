/* y = a b, both f32; the search's product, not the forward pass's. */
#include "kernels/ref.h"

err_code matmul_ref(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++) {
        const float *row = ref_row_f32(a, i);
        float *out = ref_row_f32(y, i);
        for (int64_t j = 0; j < y->shape[1]; j++) {
            double sum = 0;
            for (int64_t c = 0; c < a->shape[1]; c++) sum += (double)row[c] * ref_row_f32(b, c)[j];
            out[j] = (float)sum;
        }
    }
    return OK;
}
