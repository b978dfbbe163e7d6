/* Error feedback on a device (feedback.h): its factor of H in dev_scratch.factor, and rows through
 * it. */
#ifndef TMF_AWQ_DEV_FEEDBACK_H
#define TMF_AWQ_DEV_FEEDBACK_H

#include "awq/feedback.h"
#include "awq/on_device_internal.h"

/* The lower factor of h, which is of linear r's input, plus a share of its mean diagonal; that is
 * raised until there is one. E_INPUT where nothing helps. */
err_code dev_feedback_ridge(const quant_block *b, tensor_role r, const tensor *h, double share,
                            err *e);
/* The order of rounding into dev_scratch.order, and in it u, the upper factor of the inverse of the
 * scaled input's h, damped. col: factors on the host, v on the device. */
err_code dev_feedback_factor(const quant_block *b, tensor_role r, const tensor *h, const float *col,
                             const dev_factors *v, double damping, err *e);
/* Codes of st, with sweeps its scales too, of rows x with their factors; y and grad are scratch of
 * their shape, grad used by sweeps alone. */
err_code dev_feedback_rows(const quant_block *b, round_state *st, const tensor *x, tensor *y,
                           tensor *grad, const tensor *h, const dev_factors *v,
                           const feedback_opts *o, err *e);
/* As feedback_codes. */
err_code dev_feedback_codes(const quant_block *b, const fold *f, plan_linear *out,
                            const feedback_opts *o, err *e);

#endif
