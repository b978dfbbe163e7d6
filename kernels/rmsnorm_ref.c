/* y = x / sqrt(mean(x^2) + eps) * w */
#include <math.h>

#include "kernels/ref.h"

err_code rmsnorm_ref(device *d, tensor *y, const tensor *x, const tensor *w, float eps, err *e)
{
    const int64_t k = x->shape[1];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < x->shape[0]; i++) {
        const float *in = ref_row_f32(x, i);
        float *out = ref_row_f32(y, i);
        double sum = 0;
        for (int64_t c = 0; c < k; c++) sum += (double)in[c] * in[c];
        const double inv = 1.0 / sqrt(sum / (double)k + eps);
        for (int64_t c = 0; c < k; c++) out[c] = (float)(in[c] * inv * ref_load(w->data, w->dt, c));
    }
    return OK;
}
