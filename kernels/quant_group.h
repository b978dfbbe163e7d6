/* Group-wise 4-bit quantization: the one rounding rule of the project, in f32 with the scale
 * already rounded to f16, so that every AWQ reader gets the same weights back. For a group of
 * weights w of one row: lo = min(0, min w), hi = max(0, max w)     the range always holds 0:
 * one-sided groups lose nothing scale = f16(clamp((hi - lo) / 15, 1e-5 / 15, 65504)) zero =
 * clamp(rne(-lo / scale), 0, 15) code = clamp(rne(w / scale) + zero, 0, 15) w' = (code - zero) *
 * scale An all-zero group has scale f16(1e-5/15), zero 0 and codes 0. Weights must be finite. Rows
 * are independent: results do not depend on threads. All tensors f32 unless stated, host, rows of w
 * and y may be strided. */
#ifndef TMF_KERNELS_QUANT_GROUP_H
#define TMF_KERNELS_QUANT_GROUP_H

#include "kernels/device.h"

#define QUANT_SCALE_MAX 65504.f
#define QUANT_RANGE_MIN 1e-5f

/* scale f16 [n,k/group], zero u8 [n,k/group] of w [n,k]. limit [n,k/group] or NULL: w is taken as
 * clamped to -limit..limit (limit > 0). */
err_code op_quant_range(device *d, tensor *scale, tensor *zero, const tensor *w,
                        const tensor *limit, int32_t group, err *e);
/* codes u8 [n,k] */
err_code op_quant_codes(device *d, tensor *codes, const tensor *w, const tensor *scale,
                        const tensor *zero, int32_t group, err *e);
/* y [n,k] = (w' - w) / col, col [k] or NULL for 1; y may be w */
err_code op_quant_error(device *d, tensor *y, const tensor *w, const tensor *scale,
                        const tensor *zero, const tensor *col, int32_t group, err *e);

#endif
