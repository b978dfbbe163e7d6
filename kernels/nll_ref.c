/* Negative log-likelihood of the target and the most likely id (the first of equals). */
#include <math.h>

#include "kernels/ref.h"

err_code nll_ref(device *d, tensor *nll, tensor *argmax, const tensor *logits, const tensor *target,
                 err *e)
{
    const int64_t v = logits->shape[1];
    (void)d;
    (void)e;
    for (int64_t i = 0; i < logits->shape[0]; i++) {
        const float *row = ref_row_f32(logits, i);
        int64_t top = 0;
        double sum = 0;
        for (int64_t c = 1; c < v; c++) {
            if (row[c] > row[top]) top = c;
        }
        for (int64_t c = 0; c < v; c++) sum += exp((double)row[c] - row[top]);
        const double lse = row[top] + log(sum);
        ((float *)nll->data)[i] = (float)(lse - row[((const int32_t *)target->data)[i]]);
        if (argmax) ((int32_t *)argmax->data)[i] = (int32_t)top;
    }
    return OK;
}
