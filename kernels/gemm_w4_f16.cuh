/* Codes of W4 weights as f16 fragments for wgmma, which takes its first operand from registers.
 * Private to kernels/. */
#ifndef TMF_KERNELS_GEMM_W4_F16_CUH
#define TMF_KERNELS_GEMM_W4_F16_CUH

#include "kernels/wgmma.cuh"

#ifdef TMF_SM90A

__device__ __forceinline__ uint2 shared_load8(uint32_t at)
{
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at));
    return v;
}
__device__ __forceinline__ uint4 shared_load16(uint32_t at)
{
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "r"(at));
    return v;
}
/* f16 1024 with the masked bits below. */
template <uint32_t MASK> __device__ __forceinline__ uint32_t w_magic(uint32_t word)
{
    uint32_t r;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(r) : "r"(word), "n"(MASK), "r"(0x64006400u));
    return r;
}

/* w = (code - whole) * scale - rest * scale, where whole + rest is the zero point: exact up to the
 * last rounding when the zero point is whole. Of rows g and g + 8. */
typedef struct {
    __half2 scale[2], zero[2], rest[2];
} w_param;

__device__ __forceinline__ w_param param_of(const uint2 raw)
{
    w_param p;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const __half2 sz = *(const __half2 *)(i ? &raw.y : &raw.x);
        const float s = __low2float(sz), z = __high2float(sz), whole = rintf(z);
        p.scale[i] = __low2half2(sz);
        p.zero[i] = __float2half2_rn(-whole - (i ? 64.f : 1024.f));
        p.rest[i] = __float2half2_rn((whole - z) * s);
    }
    return p;
}

/* Four codes of row g in the low nibbles and four of row g + 8 in the high ones: inputs 2t, 2t + 8,
 * 2t + 1, 2t + 9 of 16. */
__device__ __forceinline__ void fragment_of(uint32_t (&a)[4], uint32_t word, const w_param &p)
{
    const __half2 sixteenth = __float2half2_rn(0.0625f);
#pragma unroll
    for (int i = 0; i < 2; i++) { /* 1024 + code, 1024 + 16 code */
        const uint32_t w = i ? word >> 8 : word, l = w_magic<0x000f000fu>(w),
                       h = w_magic<0x00f000f0u>(w);
        const __half2 x = __hadd2(*(const __half2 *)&l, p.zero[0]),
                      y = __hfma2(*(const __half2 *)&h, sixteenth, p.zero[1]);
        const __half2 wl = __hfma2(x, p.scale[0], p.rest[0]),
                      wh = __hfma2(y, p.scale[1], p.rest[1]);
        a[2 * i] = *(const uint32_t *)&wl;
        a[2 * i + 1] = *(const uint32_t *)&wh;
    }
}

/* Those of 64 inputs, four of 16; `param` is that of the first group or before it. */
template <int GROUP>
__device__ __forceinline__ void make_four(uint32_t (&a)[4][4], w_param *param, const uint4 &q,
                                          uint32_t param_at)
{
#pragma unroll
    for (int i = 0; i < 4; i++) {
        if (GROUP <= 64 && i * 16 % GROUP == 0)
            *param = param_of(shared_load8(param_at + i * 16 / GROUP * 64));
        fragment_of(a[i], (&q.x)[i], *param);
    }
}

#endif
#endif
