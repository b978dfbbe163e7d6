/* base: errors, memory, half floats, tensors, digests. */
#include <check.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/err.h"
#include "base/half.h"
#include "base/hash.h"
#include "base/job.h"
#include "base/mem.h"
#include "base/tensor.h"
#include "support/suite.h"
#include "support/tempdir.h"

START_TEST(err_messages)
{
    err e;
    ck_assert_int_eq(err_set(&e, E_SHAPE, "%s: %d", "x", 3), E_SHAPE);
    ck_assert_str_eq(e.msg, "x: 3");
    ck_assert_int_eq(err_wrap(&e, "layer %d", 7), E_SHAPE);
    ck_assert_str_eq(e.msg, "layer 7: x: 3");
    err_set(&e, E_INPUT, "again %s", e.msg); /* its own message as an argument */
    ck_assert_str_eq(e.msg, "again layer 7: x: 3");
    ck_assert_int_eq(err_sys(&e, E_IO, ENOENT, "cannot open '%s'", "f"), E_IO);
    ck_assert_str_eq(e.msg, "cannot open 'f': No such file or directory");
    ck_assert_int_eq(err_sys(&e, E_IO, ENOMEM, "x"), E_NOMEM);
    err_set(&e, E_INPUT, "name 'a\nb\033[2J'"); /* stays one harmless line */
    ck_assert_str_eq(e.msg, "name 'a?b?[2J'");
}
END_TEST

START_TEST(err_long_messages)
{
    err e;
    char text[2048];
    memset(text, 'x', sizeof text - 1);
    text[sizeof text - 1] = '\0';
    err_set(&e, E_INPUT, "%s", text);
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
    ck_assert_str_eq(e.msg + sizeof e.msg - 4, "...");
    err_wrap(&e, "%s", text);
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
    err_sys(&e, E_IO, EIO, "%s", text);
    ck_assert_uint_eq(strlen(e.msg), sizeof e.msg - 1);
    memset(text, 'y', 511);
    text[511] = '\0';
    err_set(&e, E_INPUT, "%s", text); /* exactly fits */
    ck_assert_str_eq(e.msg, text);
}
END_TEST

START_TEST(err_names)
{
    for (int a = OK; a <= E_BUSY; a++) {
        ck_assert_str_ne(err_name((err_code)a), "unknown");
        for (int b = OK; b < a; b++) ck_assert_str_ne(err_name((err_code)a), err_name((err_code)b));
    }
    ck_assert_str_eq(err_name((err_code)99), "unknown");
}
END_TEST

START_TEST(mem_sizes)
{
    err e;
    size_t n;
    ck_assert_int_eq(mem_mul(&n, SIZE_MAX / 2, 2, "t", &e), OK);
    ck_assert_uint_eq(n, SIZE_MAX - 1);
    ck_assert_int_eq(mem_mul(&n, SIZE_MAX / 2, 3, "tensor 'a'", &e), E_LIMIT);
    ck_assert_ptr_nonnull(strstr(e.msg, "tensor 'a': size overflows"));
    ck_assert_int_eq(mem_add(&n, SIZE_MAX, 1, "t", &e), E_LIMIT);
}
END_TEST

START_TEST(mem_blocks)
{
    static const size_t sizes[] = {1, 63, 64, 4096, (2u << 20) - 1, 2u << 20, (5u << 20) + 17};
    err e;
    void *p;
    for (size_t s = 0; s < sizeof sizes / sizeof *sizes; s++) {
        for (int round = 0; round < 3; round++) { /* a block that comes back is zero again */
            ck_assert_int_eq(mem_alloc(&p, sizes[s], 1, "block", &e), OK);
            ck_assert_uint_eq((uintptr_t)p % 64, 0);
            size_t dirty = 0;
            for (size_t i = 0; i < sizes[s]; i++) dirty += ((uint8_t *)p)[i] != 0;
            ck_assert_uint_eq(dirty, 0);
            memset(p, 0xa5, sizes[s]);
            mem_free(p);
        }
    }
    ck_assert_int_eq(mem_alloc(&p, 0, 8, "none", &e), OK);
    ck_assert_ptr_null(p);
    ck_assert_int_eq(mem_alloc(&p, SIZE_MAX / 4, 8, "huge", &e), E_LIMIT);
    ck_assert_int_eq(mem_alloc(&p, SIZE_MAX / 2, 1, "huge", &e), E_NOMEM);
    ck_assert_ptr_null(p);
    ck_assert_ptr_nonnull(strstr(e.msg, "huge: cannot allocate"));
}
END_TEST

START_TEST(mem_arena)
{
    static const size_t want[] = {1, 64, 65, 0, 1000};
    err e;
    arena a;
    void *p[5], *extra;
    size_t total = 0;
    for (int i = 0; i < 5; i++) total += arena_need(want[i]);
    ck_assert_int_eq(arena_init(&a, total, "scratch", &e), OK);
    for (int round = 0; round < 2; round++) {
        for (int i = 0; i < 5; i++) {
            ck_assert_int_eq(arena_get(&a, &p[i], want[i], &e), OK);
            ck_assert_uint_eq((uintptr_t)p[i] % 64, 0);
            if (want[i]) memset(p[i], i, want[i]);
        }
        ck_assert_ptr_null(p[3]);
        ck_assert_int_eq(((uint8_t *)p[1])[63], 1); /* not overwritten by its neighbours */
        ck_assert_int_eq(arena_get(&a, &extra, 1, &e), E_LIMIT);
        ck_assert_ptr_null(extra);
        arena_reset(&a);
    }
    arena_free(&a);
    ck_assert_int_eq(arena_init(&a, arena_need(SIZE_MAX), "scratch", &e), E_NOMEM);
}
END_TEST

/* The compiler's own type is the oracle; without it, exact arithmetic in double. */
#ifdef __FLT16_MANT_DIG__
__extension__ typedef _Float16 native16;
static float native_f16_to_f32(uint16_t bits)
{
    native16 h;
    memcpy(&h, &bits, 2);
    return (float)h;
}
static uint16_t native_f32_to_f16(float f)
{
    const native16 h = (native16)f;
    uint16_t bits;
    memcpy(&bits, &h, 2);
    return bits;
}
#else
static float native_f16_to_f32(uint16_t bits)
{
    const int exp = bits >> 10 & 31, man = bits & 1023;
    double v = exp == 31 ? (man ? NAN : INFINITY)
               : exp     ? ldexp(1024 + man, exp - 25)
                         : ldexp(man, -24);
    return (float)(bits & 0x8000 ? -v : v);
}
static uint16_t native_f32_to_f16(float f)
{
    const double a = fabs((double)f);
    const uint16_t sign = signbit(f) ? 0x8000 : 0;
    int exp;
    if (isnan(f)) return 0x7e00;
    if (a >= 65520) return (uint16_t)(sign | 0x7c00);
    (void)frexp(a, &exp);
    const int unit = a == 0 || exp < -13 ? -24 : exp - 11; /* the weight of the last bit */
    const double q = nearbyint(ldexp(a, -unit));
    const double v = ldexp(q, unit);
    if (v < 0x1p-14) return (uint16_t)(sign | (uint16_t)ldexp(v, 24));
    (void)frexp(v, &exp);
    return (uint16_t)(sign | (exp + 14) << 10 | ((int)ldexp(v, 11 - exp) & 1023));
}
#endif

static void check_to_f16(float f)
{
    const uint16_t got = f32_to_f16(f), want = native_f32_to_f16(f);
    const bool good = isnan(f) ? (got & 0x7c00) == 0x7c00 && (got & 0x3ff) != 0 : got == want;
    if (!good)
        ck_abort_msg("%a: got %04x, expected %04x", (double)f, got, want); /* quick when good */
}

START_TEST(half_f16_all)
{
    for (uint32_t h = 0; h < 65536; h++) {
        const float f = f16_to_f32((f16)h), want = native_f16_to_f32((uint16_t)h);
        if (isnan(want)) {
            ck_assert(isnan(f));
            ck_assert(isnan(f16_to_f32(f32_to_f16(f))));
            continue;
        }
        ck_assert_msg(half_f32_bits(f) == half_f32_bits(want), "%04x: got %a, expected %a", h,
                      (double)f, (double)want);
        ck_assert_uint_eq(f32_to_f16(f), h);
        /* Midpoints to both neighbours and the floats around them: where rounding can go wrong. */
        for (int side = -1; side <= 1; side += 2) {
            const uint32_t n = (h & 0x7fff) == 0 && side < 0 ? h : (uint32_t)((int)h + side);
            const float mid = f / 2 + native_f16_to_f32((uint16_t)n) / 2;
            check_to_f16(mid);
            check_to_f16(nextafterf(mid, INFINITY));
            check_to_f16(nextafterf(mid, -INFINITY));
        }
    }
}
END_TEST

START_TEST(half_f32_sweep)
{
    /* A prime step visits every exponent and mixed mantissas; both signs. */
    for (uint64_t u = 0; u < 0x100000000u; u += 65521) check_to_f16(half_bits_f32((uint32_t)u));
    check_to_f16(65504.0f);
    check_to_f16(65519.99f);
    check_to_f16(65520.0f);
    check_to_f16(INFINITY);
    check_to_f16(0x1p-25f);
    check_to_f16(0x1.000002p-25f);
    check_to_f16(-0.0f);
    check_to_f16(0x1p-149f);
}
END_TEST

START_TEST(half_bf16_all)
{
    for (uint32_t h = 0; h < 65536; h++) {
        const float f = bf16_to_f32((bf16)h);
        if (isnan(f)) {
            ck_assert(isnan(bf16_to_f32(f32_to_bf16(f))));
            continue;
        }
        ck_assert_uint_eq(f32_to_bf16(f), h);
        if (isinf(f)) continue;
        const uint32_t u = h << 16; /* ties go to the even neighbour, more than half goes up */
        ck_assert_uint_eq(f32_to_bf16(half_bits_f32(u + 0x7fff)), h);
        ck_assert_uint_eq(f32_to_bf16(half_bits_f32(u + 0x8000)), h + (h & 1));
        ck_assert_uint_eq(f32_to_bf16(half_bits_f32(u + 0x8001)), h + 1);
    }
}
END_TEST

START_TEST(tensor_views)
{
    float data[6 * 8];
    for (int i = 0; i < 48; i++) data[i] = (float)i;
    const tensor t = tensor_2d(data, DT_F32, 6, 8);
    ck_assert(tensor_contiguous(&t));
    ck_assert_int_eq(tensor_count(&t), 48);
    ck_assert_uint_eq(tensor_bytes(&t), 192);
    const tensor rows = tensor_rows(&t, 2, 3);
    ck_assert(tensor_contiguous(&rows));
    ck_assert_float_eq(((float *)rows.data)[0], 16);
    const tensor cols = tensor_cols(&rows, 5, 2);
    ck_assert(!tensor_contiguous(&cols));
    ck_assert_float_eq(((float *)cols.data)[cols.stride[0]], 29);
    const tensor row = tensor_rows(&cols, 0, 1); /* one row of any view is contiguous */
    ck_assert(tensor_contiguous(&row));
}
END_TEST

START_TEST(tensor_messages)
{
    err e;
    char buf[64];
    float x[4];
    const tensor t = tensor_2d(x, DT_F32, 2, 2);
    ck_assert_int_eq(tensor_expect(&t, "w", DT_F32, 2, (int64_t[]){2, -1}, &e), OK);
    ck_assert_int_eq(tensor_expect(&t, "tensor 'w'", DT_F16, 2, (int64_t[]){-1, 4}, &e), E_SHAPE);
    ck_assert_str_eq(e.msg, "tensor 'w': expected F16 [*,4], got F32 [2,2]");
    ck_assert_int_eq(tensor_expect(&t, "w", DT_F32, 1, (int64_t[]){4}, &e), E_SHAPE);
    tensor_describe(buf, sizeof buf, &t);
    ck_assert_str_eq(buf, "F32 [2,2]");
    tensor_describe(buf, 6, &t); /* cut, not overrun */
    ck_assert_uint_eq(strlen(buf), 5);
    for (int i = DT_NONE + 1; i < DT_COUNT; i++) {
        dtype back;
        ck_assert(dtype_from_name(&back, dtype_name((dtype)i)));
        ck_assert_int_eq(back, i);
        ck_assert_uint_gt(dtype_bytes((dtype)i), 0);
    }
    dtype none;
    ck_assert(!dtype_from_name(&none, "none") && !dtype_from_name(&none, "f16"));
}
END_TEST

START_TEST(tensor_counts)
{
    err e;
    int64_t n;
    ck_assert_int_eq(tensor_count_checked(&n, 0, NULL, "t", &e), OK);
    ck_assert_int_eq(n, 1);
    ck_assert_int_eq(tensor_count_checked(&n, 3, (int64_t[]){3, 0, 5}, "t", &e), OK);
    ck_assert_int_eq(n, 0);
    ck_assert_int_eq(tensor_count_checked(&n, 2, (int64_t[]){3, -1}, "t", &e), E_INPUT);
    const int64_t big = (int64_t)1 << 40;
    ck_assert_int_eq(tensor_count_checked(&n, 2, (int64_t[]){big, big}, "t", &e), E_INPUT);
    ck_assert_int_eq(tensor_count_checked(&n, 3, (int64_t[]){big, big, 0}, "t", &e), E_INPUT);
    ck_assert_int_eq(tensor_count_checked(&n, 1, (int64_t[]){(int64_t)1 << 62}, "t", &e), E_INPUT);
}
END_TEST

START_TEST(tensor_conversion)
{
    enum { ROWS = 3, COLS = 1100 }; /* more than one block of the converter */
    static float in[ROWS * COLS], out[ROWS * COLS];
    static f16 mid[COLS * ROWS];
    for (int i = 0; i < ROWS * COLS; i++) in[i] = (float)(i - 1500) * 0.37f;
    in[5] = 70000.0f;
    in[7] = -65519.0f;
    in[1300] = -1e30f;
    in[1301] = INFINITY; /* was infinite before: not counted */
    tensor a = tensor_2d(in, DT_F32, ROWS, COLS), b = tensor_2d(mid, DT_F16, ROWS, COLS);
    ck_assert_int_eq(tensor_convert(&b, &a), 2);
    for (int i = 0; i < ROWS * COLS; i++) ck_assert_uint_eq(mid[i], f32_to_f16(in[i]));
    /* Transposed on the way back: strides are honoured on both sides. */
    tensor view = {
        .data = out, .dt = DT_F32, .ndim = 2, .shape = {ROWS, COLS}, .stride = {1, ROWS}};
    ck_assert_int_eq(tensor_convert(&view, &b), 0);
    for (int r = 0; r < ROWS; r++)
        for (int c = 0; c < COLS; c++)
            ck_assert(out[c * ROWS + r] == f16_to_f32(mid[r * COLS + c]));
}
END_TEST

START_TEST(tensor_conversion_types)
{
    double d[3] = {1.5, 1e300, -2.25};
    float f[3];
    bf16 h[3];
    uint8_t e4[6] = {0x38, 0x7e, 0x01, 0xb8, 0x7f, 0x80}, e5[4] = {0x3c, 0x7b, 0x01, 0x7c};
    float want4[6] = {1.0f, 448.0f, 0x1p-9f, -1.0f, NAN, -0.0f};
    float want5[4] = {1.0f, 57344.0f, 0x1p-16f, INFINITY}, out[6];
    tensor td = tensor_1d(d, DT_F64, 3), tf = tensor_1d(f, DT_F32, 3),
           th = tensor_1d(h, DT_BF16, 3);
    ck_assert_int_eq(tensor_convert(&tf, &td), 1);
    ck_assert(f[0] == 1.5f && isinf(f[1]) && f[2] == -2.25f);
    f[1] = 3.3961775e38f; /* the largest floats are beyond bf16 */
    ck_assert_int_eq(tensor_convert(&th, &tf), 1);
    ck_assert_uint_eq(h[0], 0x3fc0);
    tensor t4 = tensor_1d(e4, DT_F8_E4M3, 6), o4 = tensor_1d(out, DT_F32, 6);
    ck_assert_int_eq(tensor_convert(&o4, &t4), 0);
    for (int i = 0; i < 6; i++)
        ck_assert(isnan(want4[i]) ? isnan(out[i])
                                  : half_f32_bits(out[i]) == half_f32_bits(want4[i]));
    tensor t5 = tensor_1d(e5, DT_F8_E5M2, 4), o5 = tensor_1d(out, DT_F32, 4);
    ck_assert_int_eq(tensor_convert(&o5, &t5), 0);
    for (int i = 0; i < 4; i++) ck_assert(out[i] == want5[i]);
}
END_TEST

START_TEST(hash_known)
{
    err e;
    hash256 s;
    hash_xxh *h;
    char dir[256], path[512];
    /* Empty-input values published with the algorithms. */
    ck_assert_str_eq(hash_xxh128("", 0).hex, "99aa06d3014798d86001c324468d497f");
    ck_assert_int_eq(hash_sha256(&s, NULL, 0, &e), OK);
    ck_assert_str_eq(s.hex, "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
    ck_assert_int_eq(hash_sha256(&s, "abc", 3, &e), OK);
    ck_assert_str_eq(s.hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    tempdir_make(dir, sizeof dir);
    ck_assert_int_eq(path_join(path, sizeof path, dir, "f", &e), OK);
    FILE *f = fopen(path, "w");
    ck_assert(fputs("abc", f) >= 0 && fclose(f) == 0);
    ck_assert_int_eq(hash_sha256_file(&s, path, &e), OK);
    ck_assert_str_eq(s.hex, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
    tempdir_drop(dir);
    uint8_t data[5000];
    for (int i = 0; i < 5000; i++) data[i] = (uint8_t)(i * 7);
    ck_assert_int_eq(hash_xxh_open(&h, &e), OK);
    for (size_t at = 0, n = 1; at < 5000; at += n, n = n * 2 + 1)
        hash_xxh_add(h, data + at, 5000 - at < n ? 5000 - at : n);
    hash_xxh_add(h, NULL, 0);
    const hash128 all = hash_xxh_end(&h);
    ck_assert_ptr_null(h);
    ck_assert_str_eq(all.hex, hash_xxh128(data, 5000).hex);
}
END_TEST

static void count_log(void *ud, log_level level, const char *line)
{
    int *n = ud;
    ck_assert_int_le(level, LOG_INFO);
    ck_assert_str_eq(line, "note 5");
    ++*n;
}

START_TEST(job_calls)
{
    err e;
    int n = 0;
    atomic_bool stop = false;
    const job j = {.log = count_log, .ud = &n, .level = LOG_INFO, .stop = &stop};
    job_log(&j, LOG_INFO, "note %d", 5);
    job_log(&j, LOG_DEBUG, "note %d", 6);
    job_log(NULL, LOG_ERROR, "nobody");
    job_step(&j, "stage", "unit", 1, 2);
    job_step(NULL, "stage", "unit", 1, 2);
    ck_assert_int_eq(n, 1);
    ck_assert_int_eq(job_check(&j, &e), OK);
    ck_assert_int_eq(job_check(NULL, &e), OK);
    atomic_store(&stop, true);
    ck_assert_int_eq(job_check(&j, &e), E_CANCELED);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base values");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, err_messages);
    tcase_add_test(t, err_long_messages);
    tcase_add_test(t, err_names);
    tcase_add_test(t, mem_sizes);
    tcase_add_test(t, mem_blocks);
    tcase_add_test(t, mem_arena);
    tcase_add_test(t, half_f16_all);
    tcase_add_test(t, half_f32_sweep);
    tcase_add_test(t, half_bf16_all);
    tcase_add_test(t, tensor_views);
    tcase_add_test(t, tensor_messages);
    tcase_add_test(t, tensor_counts);
    tcase_add_test(t, tensor_conversion);
    tcase_add_test(t, tensor_conversion_types);
    tcase_add_test(t, hash_known);
    tcase_add_test(t, job_calls);
    suite_add_tcase(s, t);
    return suite_run(s);
}
