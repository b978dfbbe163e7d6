/* y = silu(gate) * up, silu(a) = a / (1 + exp(-a)) */
#include <math.h>

#include "kernels/ref.h"

err_code glu_ref(device *d, tensor *y, const tensor *gate, const tensor *up, err *e)
{
    (void)d;
    (void)e;
    for (int64_t i = 0; i < y->shape[0]; i++) {
        const float *g = ref_row_f32(gate, i), *u = ref_row_f32(up, i);
        float *out = ref_row_f32(y, i);
        for (int64_t c = 0; c < y->shape[1]; c++) {
            const double a = g[c];
            out[c] = (float)(a / (1.0 + exp(-a)) * u[c]);
        }
    }
    return OK;
}
