/* Largest and summed absolute value of each channel, over what is already there. */
#include <math.h>

#include "kernels/ref.h"

err_code absstat_ref(device *d, tensor *absmax, tensor *abssum, const tensor *x, err *e)
{
    float *max = absmax->data;
    double *sum = abssum->data;
    (void)d;
    (void)e;
    for (int64_t i = 0; i < x->shape[0]; i++) {
        const float *row = ref_row_f32(x, i);
        for (int64_t c = 0; c < x->shape[1]; c++) {
            const float a = fabsf(row[c]);
            if (!(a <= max[c])) max[c] = a; /* a NaN stays visible */
            sum[c] += a;
        }
    }
    return OK;
}
