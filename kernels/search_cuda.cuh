/* Shared by the kernels of the search: weights as floats, and the rounding rule of quant_group.h,
 * operation by operation. */
#ifndef TMF_KERNELS_SEARCH_CUDA_CUH
#define TMF_KERNELS_SEARCH_CUDA_CUH

#include <cuda_bf16.h>

#include "kernels/device_cuda.cuh"

extern "C" {
#include "kernels/quant_group.h"
#include "kernels/search_ops.h"
}

/* A warp has one group of one row: lane l its inputs l, l + 32, .. */
#define GROUP_LANES 32

__device__ __forceinline__ float load_any(const void *p, int64_t i, dtype dt)
{
    if (dt == DT_F16) return __half2float(((const __half *)p)[i]);
    if (dt == DT_BF16) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    return ((const float *)p)[i];
}

__device__ __forceinline__ void store_any(void *p, int64_t i, dtype dt, float v)
{
    if (dt == DT_F16)
        ((__half *)p)[i] = __float2half_rn(v);
    else if (dt == DT_BF16)
        ((__nv_bfloat16 *)p)[i] = __float2bfloat16_rn(v);
    else
        ((float *)p)[i] = v;
}

__device__ __forceinline__ float warp_max(float v)
{
    for (int i = 16; i; i >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
    return v;
}

__device__ __forceinline__ float warp_sum(float v)
{
    for (int i = 16; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

/* Of a range that holds 0. */
__device__ __forceinline__ __half range_scale(float lo, float hi)
{
    const float step = fmaxf(__fsub_rn(__fdiv_rn(hi, 15.f), __fdiv_rn(lo, 15.f)),
                             QUANT_RANGE_MIN / 15.f);
    return __float2half_rn(fminf(step, QUANT_SCALE_MAX));
}

__device__ __forceinline__ float range_zero(float lo, float scale)
{
    return fminf(rintf(fminf(__fdiv_rn(-lo, scale), 32.f)), 15.f);
}

/* (code - zero) of w. */
__device__ __forceinline__ float step_of(float w, float scale, float zero)
{
    const float q = rintf(fminf(fmaxf(__fdiv_rn(w, scale), -32.f), 32.f)) + zero;
    return fminf(fmaxf(q, 0.f), 15.f) - zero;
}

extern "C" {
err_code search_rounds_cuda(device *, err *);
err_code search_range_cuda(device *, tensor *, tensor *, const tensor *, const range_spec *, err *);
err_code search_reorder_cuda(device *, tensor *, const tensor *, const tensor *, const tensor *,
                             float, err *);
err_code search_factor_cuda(device *, tensor *, tensor *, err *);
err_code search_invert_cuda(device *, tensor *, err *);
err_code search_reverse_cuda(device *, tensor *, err *);
err_code search_solve_cuda(device *, tensor *, const tensor *, err *);
err_code search_by_place_cuda(device *, tensor *, const tensor *, const tensor *, err *);
err_code search_feedback_cuda(device *, round_state *, tensor *, const tensor *, const tensor *,
                              err *);
err_code search_code_errors_cuda(device *, tensor *, const round_state *, const tensor *,
                                 const tensor *, err *);
err_code search_sweep_cuda(device *, round_state *, tensor *, const tensor *, const tensor *, bool,
                           err *);
err_code search_pack_codes_cuda(device *, tensor *, const round_state *, const tensor *, err *);
err_code search_turn_cuda(device *, tensor *, const tensor *, const rope_spec *, err *);
err_code search_cache_errors_cuda(device *, tensor *, const tensor *, const tensor *, err *);
}

#endif
