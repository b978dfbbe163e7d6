/* base/w4: golden vectors made outside this code (docs/formats.md), round trips of all pairs,
 * refusals. */
#include "base/w4.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/hash.h"
#include "base/mem.h"
#include "support/suite.h"

static const w4_layout all[] = {W4_CODES, W4_AWQ, W4_GPTQ, W4_TM, W4_TM_A};
#define N_LAYOUTS ((int)(sizeof all / sizeof *all))

static w4_weight make(int64_t k, int64_t n, int32_t group, w4_layout l)
{
    w4_weight w;
    size_t q, s, z;
    err e;
    memset(&w, 0, sizeof w);
    ck_assert_msg(w4_sizes(&q, &s, &z, k, n, group, l, &e) == OK, "%s", e.msg);
    ck_assert_int_eq(mem_alloc(&w.q.data, q, 1, "q", &e), OK);
    ck_assert_int_eq(mem_alloc(&w.scales.data, s, 1, "scales", &e), OK);
    ck_assert_int_eq(mem_alloc(&w.zeros.data, z, 1, "zeros", &e), OK);
    w4_shape(&w, k, n, group, l);
    return w;
}

static void drop(w4_weight *w)
{
    mem_free(w->q.data);
    mem_free(w->scales.data);
    mem_free(w->zeros.data);
}

static uint32_t hash32(uint32_t x)
{
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

/* Codes, zeros in 1..15 (the range every layout holds) and finite scales, all different by place.
 */
static w4_weight random_codes(int64_t k, int64_t n, int32_t group)
{
    w4_weight w = make(k, n, group, W4_CODES);
    uint8_t *q = w.q.data, *z = w.zeros.data;
    f16 *s = w.scales.data;
    for (int64_t i = 0; i < n * k; i++) q[i] = hash32((uint32_t)i) & 15;
    for (int64_t i = 0; i < n * (k / group); i++) {
        z[i] = (uint8_t)(1 + hash32((uint32_t)i + 77777u) % 15);
        s[i] = (f16)(hash32((uint32_t)i + 99999u) & 0x3fffu); /* up to 2.0, subnormals too */
    }
    return w;
}

static void repack(w4_weight *dst, const w4_weight *src)
{
    err e;
    ck_assert_msg(w4_repack(dst, src, &e) == OK, "%s", e.msg);
}

/* ---- golden: q[k][n] = ((64k+n)*2654435761 mod 2^32) >> 28, K = N = 64 ---- */

static w4_weight golden_codes(void)
{
    w4_weight w = make(64, 64, 64, W4_CODES);
    uint8_t *q = w.q.data;
    for (uint32_t k = 0; k < 64; k++)
        for (uint32_t n = 0; n < 64; n++)
            q[n * 64 + k] = (uint8_t)((64 * k + n) * 2654435761u >> 28);
    memset(w.zeros.data, 8, 64);
    return w;
}

static const struct {
    w4_layout layout;
    uint32_t first[4], last;
    const char *sha256;
} golden[] = {
    {W4_AWQ,
     {0x51d9b730, 0x40c8a62f, 0x3fb8951e, 0x2ea7841d},
     0xd9623fc8,
     "6e0b93c4ebd68cd66f83ae3027c47d3e86129cae7af2aafb99bee3bd28259fb3"},
    {W4_TM_A,
     {0xef7866f0, 0xde6745de, 0xcd5634cd, 0xab4423bc},
     0xde6745de,
     "656ee9075cb34924a08f9d5b928f70e5f693d00b34f49c86120d5badba6a716a"},
    {W4_TM,
     {0x5b17d390, 0x4a06c28f, 0x39f5b18e, 0x28e4a17d},
     0xd39f6c28,
     "589a22b39f0dfb7a2c629e1387a111e2e46e0f55f0583fc0c62b0ddc3860829c"},
    {W4_GPTQ,
     {0xe5c3a180, 0x7f6d4b29, 0x1807e5c3, 0xb2918f6d},
     0xd4b2a18f,
     "e7cab92d23d611a21d1b149aec8e164359ff6f1ede8128b7f94f6bf0d7524237"},
};

START_TEST(golden_vectors)
{
    w4_weight src = golden_codes(), dst = make(64, 64, 64, golden[_i].layout);
    hash256 h;
    err e;
    repack(&dst, &src);
    const uint32_t *u = dst.q.data;
    for (int i = 0; i < 4; i++) ck_assert_uint_eq(u[i], golden[_i].first[i]);
    ck_assert_uint_eq(u[511], golden[_i].last);
    ck_assert_int_eq(hash_sha256(&h, u, 2048, &e), OK);
    ck_assert_str_eq(h.hex, golden[_i].sha256);
    for (int n = 0; n < 64; n++)
        for (int k = 0; k < 64; k++)
            ck_assert_int_eq(w4_code(&dst, n, k), ((uint8_t *)src.q.data)[n * 64 + k]);
    drop(&src);
    drop(&dst);
}
END_TEST

/* ---- zeros as each format stores them ---- */

START_TEST(zeros_bits)
{
    w4_weight c = make(32, 32, 32, W4_CODES), awq = make(32, 32, 32, W4_AWQ),
              a = make(32, 32, 32, W4_TM_A), tm = make(32, 32, 32, W4_TM),
              gptq = make(32, 32, 32, W4_GPTQ);
    for (int n = 0; n < 32; n++) {
        ((uint8_t *)c.zeros.data)[n] = (uint8_t)(n % 8 + 8);
        ((f16 *)c.scales.data)[n] = (f16)(0x2000 + n);
    }
    repack(&awq, &c);
    repack(&a, &c);
    repack(&tm, &c);
    repack(&gptq, &c);
    /* columns 8..15 carry zeros 8..15: nibble p = column {0,2,4,6,1,3,5,7}[p] */
    ck_assert_uint_eq(((uint32_t *)awq.zeros.data)[1], 0xfdb9eca8u);
    ck_assert_uint_eq(((uint32_t *)gptq.zeros.data)[1], 0xedcba987u); /* zero - 1, in order */
    for (int n = 0; n < 32; n++) {
        const uint32_t z = (uint32_t)n % 8 + 8;
        ck_assert_uint_eq(((uint32_t *)a.scales.data)[n],
                          (0x2000u + (uint32_t)n) << 16 | 0x5400u | z << 4);
        ck_assert(f16_to_f32((f16)(((uint32_t *)a.scales.data)[n] & 0xffff)) == 64.0f + (float)z);
        ck_assert(f16_to_f32(((f16 *)tm.zeros.data)[n]) == (float)z);
        ck_assert_uint_eq(((f16 *)tm.scales.data)[n], 0x2000u + (uint32_t)n);
    }
    drop(&c);
    drop(&awq);
    drop(&a);
    drop(&tm);
    drop(&gptq);
}
END_TEST

static void assert_zero_refused(w4_layout from, w4_layout to, int zero, bool refused)
{
    w4_weight codes = make(32, 32, 32, W4_CODES), src = make(32, 32, 32, from),
              dst = make(32, 32, 32, to);
    err e = {0};
    memset(codes.zeros.data, 5, 32);
    ((uint8_t *)codes.zeros.data)[11] = (uint8_t)zero;
    repack(&src, &codes);
    const err_code rc = w4_repack(&dst, &src, &e);
    ck_assert_int_eq(rc, refused ? E_UNSUPPORTED : OK);
    if (refused) ck_assert_msg(strstr(e.msg, "row 11 group 0") != NULL, "%s", e.msg);
    drop(&codes);
    drop(&src);
    drop(&dst);
}

START_TEST(zeros_out_of_range)
{
    assert_zero_refused(W4_CODES, W4_AWQ, 16, true); /* a GPTQ zero that AWQ cannot hold */
    assert_zero_refused(W4_GPTQ, W4_AWQ, 16, true);
    assert_zero_refused(W4_CODES, W4_GPTQ, 0, true); /* stored as zero - 1 */
    assert_zero_refused(W4_AWQ, W4_GPTQ, 0, true);
    assert_zero_refused(W4_CODES, W4_GPTQ, 17, true);
    assert_zero_refused(W4_CODES, W4_TM_A, 64, true); /* 64+z leaves the exponent of 64 */
    assert_zero_refused(W4_TM, W4_AWQ, 255, true);
    assert_zero_refused(W4_GPTQ, W4_TM, 16, false);
    assert_zero_refused(W4_TM, W4_CODES, 255, false);
    assert_zero_refused(W4_CODES, W4_AWQ, 0, false);
}
END_TEST

START_TEST(fractional_zero)
{
    static const float bad[] = {7.5f, -1.0f, 70000.0f /* inf as f16 */, 300.0f};
    w4_weight tm = make(32, 32, 32, W4_TM), copy = make(32, 32, 32, W4_TM),
              awq = make(32, 32, 32, W4_AWQ);
    err e;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ((f16 *)tm.zeros.data)[3] = f32_to_f16(bad[i]);
        ck_assert_int_eq(w4_repack(&awq, &tm, &e), E_UNSUPPORTED);
        repack(&copy, &tm); /* the same layout keeps it */
        ck_assert_uint_eq(((f16 *)copy.zeros.data)[3], ((f16 *)tm.zeros.data)[3]);
    }
    ((f16 *)tm.zeros.data)[3] = 0x7e00; /* NaN */
    ck_assert_int_eq(w4_repack(&awq, &tm, &e), E_UNSUPPORTED);
    drop(&tm);
    drop(&copy);
    drop(&awq);
}
END_TEST

/* ---- round trips: codes -> a -> b -> codes for every pair, sizes off the tile grid ---- */

static const struct {
    int64_t k, n;
    int32_t group;
} shapes[] = {
    {32, 32, 32}, {64, 96, 32}, {128, 256, 128}, {192, 288, 64}, {96, 1056, 32}, {512, 64, 128},
};

START_TEST(round_trip)
{
    const int64_t k = shapes[_i].k, n = shapes[_i].n;
    const int32_t g = shapes[_i].group;
    w4_weight src = random_codes(k, n, g);
    for (int a = 0; a < N_LAYOUTS; a++)
        for (int b = 0; b < N_LAYOUTS; b++) {
            w4_weight wa = make(k, n, g, all[a]), wb = make(k, n, g, all[b]),
                      back = make(k, n, g, W4_CODES);
            repack(&wa, &src);
            repack(&wb, &wa);
            repack(&back, &wb);
            ck_assert_mem_eq(back.q.data, src.q.data, (size_t)(n * k));
            ck_assert_mem_eq(back.zeros.data, src.zeros.data, (size_t)(n * k / g));
            ck_assert_mem_eq(back.scales.data, src.scales.data, (size_t)(n * k / g) * 2);
            drop(&wa);
            drop(&wb);
            drop(&back);
        }
    drop(&src);
}
END_TEST

/* AWQ and epoch C have no unit in k: groups such as 20 with k = 60 cross the byte blocks. */
START_TEST(odd_inputs)
{
    w4_weight src = random_codes(60, 40, 20), awq = make(60, 40, 20, W4_AWQ),
              tm = make(60, 40, 20, W4_TM), back = make(60, 40, 20, W4_CODES);
    repack(&awq, &src);
    repack(&tm, &awq);
    repack(&back, &tm);
    ck_assert_mem_eq(back.q.data, src.q.data, 60 * 40);
    drop(&src);
    drop(&awq);
    drop(&tm);
    drop(&back);
}
END_TEST

START_TEST(dequant)
{
    w4_weight src = random_codes(64, 32, 32);
    float want[64], got[64];
    for (int l = 0; l < N_LAYOUTS; l++) {
        w4_weight w = make(64, 32, 32, all[l]);
        repack(&w, &src);
        for (int64_t n = 0; n < 32; n++) {
            for (int64_t k = 0; k < 64; k++) {
                const int q = ((uint8_t *)src.q.data)[n * 64 + k];
                const int z = ((uint8_t *)src.zeros.data)[n * 2 + k / 32];
                want[k] = (float)(q - z) * f16_to_f32(((f16 *)src.scales.data)[n * 2 + k / 32]);
            }
            w4_dequant_row(got, &w, n);
            ck_assert_mem_eq(got, want, sizeof want);
        }
        drop(&w);
    }
    drop(&src);
}
END_TEST

/* Column slices of a wider buffer, as the fusion of q, k and v writes them. */
START_TEST(strided_target)
{
    w4_weight src = random_codes(64, 32, 32), wide = make(64, 96, 32, W4_TM), part = wide;
    part.n = 32;
    part.q = tensor_cols(&wide.q, 4, 4);
    part.scales = tensor_cols(&wide.scales, 32, 32);
    part.zeros = tensor_cols(&wide.zeros, 32, 32);
    repack(&part, &src);
    for (int64_t k = 0; k < 64; k++)
        for (int64_t n = 0; n < 96; n++)
            ck_assert_int_eq(w4_code(&wide, n, k), n / 32 == 1 ? w4_code(&src, n - 32, k) : 0);
    drop(&src);
    drop(&wide);
}
END_TEST

/* Two halves along the inputs give the same as the whole. */
START_TEST(input_views)
{
    w4_weight src = random_codes(128, 64, 32), want = make(128, 64, 32, W4_TM);
    repack(&want, &src);
    for (int l = 0; l < N_LAYOUTS; l++) {
        w4_weight w = make(128, 64, 32, all[l]), got = make(128, 64, 32, W4_TM);
        repack(&w, &src);
        for (int64_t from = 0; from < 128; from += 64) {
            const w4_weight part = w4_inputs(&w, from, 64);
            w4_weight to = w4_inputs(&got, from, 64);
            repack(&to, &part);
        }
        ck_assert_mem_eq(got.q.data, want.q.data, 128 * 64 / 2);
        ck_assert_mem_eq(got.scales.data, want.scales.data, 4 * 64 * 2);
        ck_assert_mem_eq(got.zeros.data, want.zeros.data, 4 * 64 * 2);
        drop(&w);
        drop(&got);
    }
    drop(&src);
    drop(&want);
}
END_TEST

START_TEST(refused_shapes)
{
    size_t q, s, z;
    err e;
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 100, 32, 128, W4_AWQ, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 128, 36, 128, W4_AWQ, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 12, 32, 12, W4_GPTQ, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 64, 40, 64, W4_TM_A, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 48, 32, 16, W4_TM_A, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 0, 32, 16, W4_TM, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 64, 32, 0, W4_TM, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, (int64_t)1 << 40, 32, 32, W4_TM, &e), E_SHAPE);
    ck_assert_int_eq(w4_sizes(&q, &s, &z, 64, 32, 32, W4_DEVICE, &e), E_UNSUPPORTED);

    w4_weight w = make(64, 32, 32, W4_AWQ);
    ck_assert_int_eq(w4_check(&w, "x", &e), OK);
    w4_weight bad = w;
    bad.k = 128;
    ck_assert_int_eq(w4_check(&bad, "layer 3: q", &e), E_SHAPE);
    ck_assert_msg(strstr(e.msg, "layer 3: q") != NULL, "%s", e.msg);
    bad = w;
    bad.scales.dt = DT_F32;
    ck_assert_int_eq(w4_check(&bad, "x", &e), E_SHAPE);
    bad = w;
    bad.zeros.data = NULL;
    ck_assert_int_eq(w4_check(&bad, "x", &e), E_SHAPE);
    bad = w;
    bad.q.stride[0] = 2;
    ck_assert_int_eq(w4_check(&bad, "x", &e), E_SHAPE);
    bad = w;
    bad.q.dt = DT_U32; /* the sign of packed words does not matter */
    ck_assert_int_eq(w4_check(&bad, "x", &e), OK);
    bad.layout = W4_TM;
    ck_assert_int_eq(w4_repack(&w, &bad, &e), E_SHAPE);
    drop(&w);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("w4");
    TCase *t = tcase_create("w4");
    tcase_set_timeout(t, 600);
    tcase_add_loop_test(t, golden_vectors, 0, (int)(sizeof golden / sizeof *golden));
    tcase_add_test(t, zeros_bits);
    tcase_add_test(t, zeros_out_of_range);
    tcase_add_test(t, fractional_zero);
    tcase_add_loop_test(t, round_trip, 0, (int)(sizeof shapes / sizeof *shapes));
    tcase_add_test(t, odd_inputs);
    tcase_add_test(t, dequant);
    tcase_add_test(t, strided_target);
    tcase_add_test(t, input_views);
    tcase_add_test(t, refused_shapes);
    suite_add_tcase(s, t);
    return suite_run(s);
}
