/* References of the ops that solve and that round in an order of the inputs, for search_ref.c. */
#ifndef TMF_KERNELS_ROUND_REF_H
#define TMF_KERNELS_ROUND_REF_H

#include "kernels/search_ops.h"

err_code round_reorder_ref(device *, tensor *, const tensor *, const tensor *, const tensor *,
                           float, err *);
err_code round_factor_ref(device *, tensor *, tensor *, err *);
err_code round_invert_ref(device *, tensor *, err *);
err_code round_reverse_ref(device *, tensor *, err *);
err_code round_solve_ref(device *, tensor *, const tensor *, err *);
err_code round_by_place_ref(device *, tensor *, const tensor *, const tensor *, err *);
err_code round_feedback_ref(device *, round_state *, tensor *, const tensor *, const tensor *,
                            err *);
err_code round_code_errors_ref(device *, tensor *, const round_state *, const tensor *,
                               const tensor *, err *);
err_code round_sweep_ref(device *, round_state *, tensor *, const tensor *, const tensor *, bool,
                         err *);
err_code round_pack_codes_ref(device *, tensor *, const round_state *, const tensor *, err *);

#endif
