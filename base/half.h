/* f16 and bf16 scalars, bit-exact IEEE round to nearest even, no compiler extension needed. */
#ifndef TMF_BASE_HALF_H
#define TMF_BASE_HALF_H

#include <stdint.h>
#include <string.h>

typedef uint16_t f16;
typedef uint16_t bf16;

static inline float half_bits_f32(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}
static inline uint32_t half_f32_bits(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    return u;
}
static inline float bf16_to_f32(bf16 h) { return half_bits_f32((uint32_t)h << 16); }
static inline bf16 f32_to_bf16(float f)
{
    uint32_t u = half_f32_bits(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (bf16)(u >> 16 | 0x40u); /* quiet NaN */
    return (bf16)((u + 0x7fffu + (u >> 16 & 1u)) >> 16);
}
static inline float f16_to_f32(f16 h)
{
    const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, exp = h >> 10 & 31u, man = h & 0x3ffu;
    if (exp == 31u) return half_bits_f32(sign | 0x7f800000u | man << 13);
    if (exp) return half_bits_f32(sign | (exp + 112u) << 23 | man << 13);
    const float f = (float)man * 0x1p-24f; /* subnormal or zero: exact */
    return half_bits_f32(sign | half_f32_bits(f));
}
static inline f16 f32_to_f16(float f)
{
    const uint32_t u = half_f32_bits(f), a = u & 0x7fffffffu;
    const f16 sign = (f16)(u >> 16 & 0x8000u);
    if (a > 0x7f800000u) return (f16)(sign | 0x7e00u | (a >> 13 & 0x3ffu));
    if (a >= 0x477ff000u) return (f16)(sign | 0x7c00u); /* rounds past 65504 */
    if (a >= 0x38800000u) {
        const uint32_t r = a + 0xfffu + (a >> 13 & 1u);
        return (f16)(sign | (uint16_t)((r - 0x38000000u) >> 13));
    }
    /* Subnormal: adding 0.5 puts the rounding at 2^-24 and the value into the low mantissa bits. */
    const float g = half_bits_f32(a) + 0.5f;
    return (f16)(sign | (uint16_t)(half_f32_bits(g) - 0x3f000000u));
}

#endif
