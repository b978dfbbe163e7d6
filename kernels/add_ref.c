/* y += x */
#include "kernels/ref.h"

err_code add_ref(device *d, tensor *y, const tensor *x, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < x->shape[0]; i++) {
        const float *in = ref_row_f32(x, i);
        float *out = ref_row_f32(y, i);
        for (int64_t c = 0; c < x->shape[1]; c++) out[c] += in[c];
    }
    return OK;
}
