/* One name for the vectors of each instruction set, so that a variant is written once and compiled
 * for AVX2 (8 lanes) and AVX-512 (16 lanes). Only files of KERNELS_VEC and KERNELS_AMX include
 * this. Tails go through *_n forms: lanes beyond n load as zero and are not stored. */
#ifndef TMF_KERNELS_VEC_H
#define TMF_KERNELS_VEC_H

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "base/half.h"
#include "base/tensor.h"

#if defined(__AVX512F__)
#define VL 16
typedef __m512 vf;

static inline vf vf_set(float a) { return _mm512_set1_ps(a); }
static inline vf vf_zero(void) { return _mm512_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline __mmask16 vf_mask_(int64_t n) { return (__mmask16)((1u << n) - 1); }
static inline vf vf_load_n(const float *p, int64_t n)
{
    return _mm512_maskz_loadu_ps(vf_mask_(n), p);
}
static inline void vf_store_n(float *p, vf a, int64_t n)
{
    _mm512_mask_storeu_ps(p, vf_mask_(n), a);
}
static inline vf vf_f16(const f16 *p)
{
    return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)(const void *)p));
}
static inline vf vf_bf16(const bf16 *p)
{
    const __m256i h = _mm256_loadu_si256((const __m256i *)(const void *)p);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
static inline vf vf_u8(const uint8_t *p) /* codes as numbers */
{
    const __m128i b = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(b));
}
static inline vf vf_u4(const uint8_t *p) /* VL codes, two a byte, low nibble first */
{
    const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)p), low = _mm_set1_epi8(15);
    const __m128i hi = _mm_and_si128(_mm_srli_epi16(b, 4), low);
    const __m128i c = _mm_unpacklo_epi8(_mm_and_si128(b, low), hi);
    return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(c));
}
static inline void vf_to_f16(f16 *p, vf a)
{
    _mm256_storeu_si256((__m256i *)(void *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }   /* ab + c */
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm512_fnmadd_ps(a, b, c); } /* c - ab */
static inline vf vf_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf vf_round(vf a)
{
    return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
/* 2^n, n integral, -126..127 */
static inline vf vf_pow2(vf n)
{
    const __m512i i = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(i, 23));
}
/* a * 2^n, n integral; saturates to infinity and 0 as it should */
static inline vf vf_ldexp(vf a, vf n) { return _mm512_scalef_ps(a, n); }
/* Lane by lane: yes where a > b, no where it is not or either is a NaN. */
static inline vf vf_select_gt(vf a, vf b, vf yes, vf no)
{
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}
static inline float vf_sum(vf a) /* ((0+8)+(4+12))... : halves, always in this order */
{
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
/* Lane i = vf_sum(a[i]), to the bit: the same additions, sixteen at a time. */
static inline vf vf_sum_each(const vf a[16])
{
    vf t[8], u[4], v[2]; /* halves, then quarters, then pairs of lanes of 2, 4 and 8 inputs */
    for (int i = 0; i < 8; i++) { /* output lane 4p + r comes from input 4p + r of group r */
        const vf x = a[8 * (i & 1) + i / 2], y = a[8 * (i & 1) + i / 2 + 4];
        t[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
    }
    for (int i = 0; i < 4; i++) {
        const vf x = t[2 * i], y = t[2 * i + 1];
        u[i] = _mm512_add_ps(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
    }
    for (int i = 0; i < 2; i++) {
        const vf x = u[2 * i], y = u[2 * i + 1];
        v[i] = _mm512_add_ps(_mm512_shuffle_ps(x, y, 0x44), _mm512_shuffle_ps(x, y, 0xee));
    }
    return _mm512_add_ps(_mm512_shuffle_ps(v[0], v[1], 0x88), _mm512_shuffle_ps(v[0], v[1], 0xdd));
}
static inline float vf_hmax(vf a) { return _mm512_reduce_max_ps(a); }
static inline float vf_hmin(vf a) { return _mm512_reduce_min_ps(a); }

#else
#define VL 8
typedef __m256 vf;

static inline vf vf_set(float a) { return _mm256_set1_ps(a); }
static inline vf vf_zero(void) { return _mm256_setzero_ps(); }
static inline vf vf_load(const float *p) { return _mm256_loadu_ps(p); }
static inline void vf_store(float *p, vf a) { _mm256_storeu_ps(p, a); }
static inline __m256i vf_mask_(int64_t n)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32((int)n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
static inline vf vf_load_n(const float *p, int64_t n) { return _mm256_maskload_ps(p, vf_mask_(n)); }
static inline void vf_store_n(float *p, vf a, int64_t n) { _mm256_maskstore_ps(p, vf_mask_(n), a); }
static inline vf vf_f16(const f16 *p)
{
    return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(const void *)p));
}
static inline vf vf_bf16(const bf16 *p)
{
    const __m128i h = _mm_loadu_si128((const __m128i *)(const void *)p);
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
static inline vf vf_u8(const uint8_t *p)
{
    const __m128i b = _mm_loadl_epi64((const __m128i *)(const void *)p);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(b));
}
static inline vf vf_u4(const uint8_t *p)
{
    int32_t w;
    memcpy(&w, p, 4);
    const __m128i b = _mm_cvtsi32_si128(w), low = _mm_set1_epi8(15);
    const __m128i hi = _mm_and_si128(_mm_srli_epi16(b, 4), low);
    const __m128i c = _mm_unpacklo_epi8(_mm_and_si128(b, low), hi);
    return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(c));
}
static inline void vf_to_f16(f16 *p, vf a)
{
    _mm_storeu_si128((__m128i *)(void *)p, _mm256_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT));
}
static inline vf vf_add(vf a, vf b) { return _mm256_add_ps(a, b); }
static inline vf vf_sub(vf a, vf b) { return _mm256_sub_ps(a, b); }
static inline vf vf_mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
static inline vf vf_div(vf a, vf b) { return _mm256_div_ps(a, b); }
static inline vf vf_min(vf a, vf b) { return _mm256_min_ps(a, b); }
static inline vf vf_max(vf a, vf b) { return _mm256_max_ps(a, b); }
static inline vf vf_fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
static inline vf vf_fnma(vf a, vf b, vf c) { return _mm256_fnmadd_ps(a, b, c); }
static inline vf vf_abs(vf a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline vf vf_round(vf a)
{
    return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
static inline vf vf_pow2(vf n)
{
    const __m256i i = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(i, 23));
}
/* In two steps, so that results below the normal range and 2^128 come out right. |n| < 256 */
static inline vf vf_ldexp(vf a, vf n)
{
    const __m256i i = _mm256_cvtps_epi32(n), h = _mm256_srai_epi32(i, 1);
    const __m256i bias = _mm256_set1_epi32(127);
    const __m256i lo = _mm256_slli_epi32(_mm256_add_epi32(h, bias), 23);
    const __m256i hi = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(i, h), bias), 23);
    return _mm256_mul_ps(_mm256_mul_ps(a, _mm256_castsi256_ps(lo)), _mm256_castsi256_ps(hi));
}
static inline vf vf_select_gt(vf a, vf b, vf yes, vf no)
{
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}
static inline float vf_sum(vf a)
{
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps(d, d, 1)));
}
/* Lane i = vf_sum(a[i]), to the bit: the same additions, eight at a time. */
static inline vf vf_sum_each(const vf a[8])
{
    vf t[4], u[2];
    for (int i = 0; i < 4; i++) { /* halves of inputs i and i + 4 */
        const vf x = a[i], y = a[i + 4];
        t[i] = _mm256_add_ps(_mm256_permute2f128_ps(x, y, 0x20),
                             _mm256_permute2f128_ps(x, y, 0x31));
    }
    for (int i = 0; i < 2; i++) {
        const vf x = t[2 * i], y = t[2 * i + 1];
        u[i] = _mm256_add_ps(_mm256_shuffle_ps(x, y, 0x44), _mm256_shuffle_ps(x, y, 0xee));
    }
    return _mm256_add_ps(_mm256_shuffle_ps(u[0], u[1], 0x88), _mm256_shuffle_ps(u[0], u[1], 0xdd));
}
static inline float vf_hmax(vf a)
{
    __m128 q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(q, _mm_shuffle_ps(q, q, 1)));
}
static inline float vf_hmin(vf a)
{
    __m128 q = _mm_min_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    q = _mm_min_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_min_ss(q, _mm_shuffle_ps(q, q, 1)));
}
#endif

static inline vf vf_f16_n(const f16 *p, int64_t n)
{
    f16 tmp[VL] = {0};
    memcpy(tmp, p, (size_t)n * sizeof *p);
    return vf_f16(tmp);
}
static inline vf vf_bf16_n(const bf16 *p, int64_t n)
{
    bf16 tmp[VL] = {0};
    memcpy(tmp, p, (size_t)n * sizeof *p);
    return vf_bf16(tmp);
}
static inline vf vf_u8_n(const uint8_t *p, int64_t n)
{
    uint8_t tmp[16] = {0};
    memcpy(tmp, p, (size_t)n);
    return vf_u8(tmp);
}
static inline vf vf_u4_n(const uint8_t *p, int64_t n)
{
    uint8_t tmp[8] = {0};
    memcpy(tmp, p, (size_t)n / 2);
    return vf_u4(tmp);
}
static inline void vf_to_f16_n(f16 *p, vf a, int64_t n)
{
    f16 tmp[VL];
    vf_to_f16(tmp, a);
    memcpy(p, tmp, (size_t)n * sizeof *p);
}

/* Keeps a loaded vector in a register: compilers like to load it again into each of its uses, and
 * where two uses share a load port is what limits. */
static inline vf vf_pin(vf a)
{
    __asm__("" : "+v"(a));
    return a;
}

/* Element i.. of a row of f16, bf16 or f32. `dt` is constant at every call: the branch folds. */
static inline vf vf_any(const void *row, dtype dt, int64_t i)
{
    if (dt == DT_F16) return vf_f16((const f16 *)row + i);
    if (dt == DT_BF16) return vf_bf16((const bf16 *)row + i);
    return vf_load((const float *)row + i);
}
static inline vf vf_any_n(const void *row, dtype dt, int64_t i, int64_t n)
{
    if (dt == DT_F16) return vf_f16_n((const f16 *)row + i, n);
    if (dt == DT_BF16) return vf_bf16_n((const bf16 *)row + i, n);
    return vf_load_n((const float *)row + i, n);
}

/* e^r and the n of x = n ln2 + r, |r| <= ln2/2: Taylor to r^7 by Horner (remainder under 6e-9), ln2
 * in two parts. */
static inline vf vf_exp_parts_(vf x, vf *n)
{
    *n = vf_round(vf_mul(x, vf_set(1.44269504089f)));
    vf r = vf_fnma(*n, vf_set(0x1.62e400p-1f), x);
    r = vf_fnma(*n, vf_set(0x1.7f7d1cp-20f), r);
    vf p = vf_set(1.0f / 5040);
    p = vf_fma(p, r, vf_set(1.0f / 720));
    p = vf_fma(p, r, vf_set(1.0f / 120));
    p = vf_fma(p, r, vf_set(1.0f / 24));
    p = vf_fma(p, r, vf_set(1.0f / 6));
    p = vf_fma(p, r, vf_set(0.5f));
    p = vf_fma(p, r, vf_set(1.0f));
    return vf_fma(p, r, vf_set(1.0f));
}

/* e^x to about 1 ulp. Under -104 it is 0, above 89 infinity; a NaN stays one. */
static inline vf vf_exp(vf x)
{
    vf n;
    /* min and max return their second operand for a NaN: it must pass through */
    const vf p = vf_exp_parts_(vf_max(vf_set(-110.0f), vf_min(vf_set(100.0f), x)), &n);
    return vf_ldexp(p, n);
}

/* The same for the weights of a softmax, x <= 0: 0 under -64 (1e-28 beside a largest of 1). So
 * neither they nor what they are multiplied with becomes subnormal, which costs a hundred cycles a
 * time. */
static inline vf vf_exp_neg(vf x)
{
    vf n;
    const vf p = vf_exp_parts_(vf_max(vf_set(-64.0f), x), &n);
    return vf_select_gt(vf_set(-64.0f), x, vf_zero(), vf_mul(p, vf_pow2(n)));
}

#endif
