/* y (+)= alpha a b. */
#include "kernels/ref.h"

err_code product_ref(device *d, tensor *y, float alpha, const tensor *a, const tensor *b, bool add,
                     err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++)
        for (int64_t j = 0; j < y->shape[1]; j++) {
            double sum = 0;
            for (int64_t c = 0; c < a->shape[1]; c++)
                sum += (double)ref_row_f32(a, i)[c] * ref_row_f32(b, c)[j];
            float *out = &ref_row_f32(y, i)[j];
            *out = (float)(alpha * sum + (add ? *out : 0));
        }
    return OK;
}
