/* Loading on a CUDA device: uploads larger than what they travel through, weights tiled in slices,
 * many buffers in one piece of memory, and what the device says it holds. Without a GPU, or in a
 * build without CUDA, the cases are skipped out loud. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "support/cuda_case.h"

static uint32_t noise(uint64_t i) { return (uint32_t)(splitmix_next(&i) >> 32); }

/* Of what the device has; other programs may share it, so that little differences mean nothing. */
#define NEAR_BYTES ((size_t)4 << 20)
static size_t free_now(void)
{
    size_t free_bytes, total;
    OK_(dev_sync(gpu, e));
    OK_(dev_memory(gpu, &free_bytes, &total, e));
    return free_bytes;
}

/* ---- uploads ---- */

static void upload_case(int64_t n)
{
    uint16_t *v = must((size_t)n, 2), *back = must((size_t)n, 2);
    for (int64_t i = 0; i < n; i++) v[i] = (uint16_t)(noise((uint64_t)i) & 0x3bff); /* finite */
    const tensor host = tensor_1d(v, DT_F16, n);
    tensor there, here = tensor_1d(back, DT_F16, n);
    dev_buf b;
    OK_(dev_upload(gpu, &b, &there, &host, e));
    for (int64_t i = 0; i < n; i++) v[i] = (uint16_t)~v[i]; /* no longer needed by the upload */
    OK_(dev_copy(gpu, &here, &there, e));
    OK_(dev_sync(gpu, e));
    int64_t at = 0;
    while (at < n && (back[at] ^ v[at]) == 0xffff) at++;
    ck_assert_msg(at == n, "upload of %lld: differs at %lld", (long long)n, (long long)at);
    dev_free(&b);
    mem_free(v);
    mem_free(back);
}

START_TEST(uploads)
{
    upload_case(1);
    upload_case(4097);
    upload_case((4 << 20) - 1); /* around 8 MiB, what one slot holds */
    upload_case(4 << 20);
    upload_case((4 << 20) + 3);
    upload_case((int64_t)21 << 20); /* every slot, and the first again */
    OK_(dev_upload_end(gpu, e));
    upload_case(5); /* slots are made anew */
    OK_(dev_upload_end(gpu, e));
}
END_TEST

/* ---- weights in slices ---- */

/* As base/w4.h lays them out, random, with a bias. */
static w4_weight make_slice(void **mem, int64_t k, int64_t n, int32_t group, w4_layout layout)
{
    size_t q, s, z;
    w4_weight w;
    OK_(w4_sizes(&q, &s, &z, k, n, group, layout, e));
    uint8_t *p = *mem = must(q + s + z + (size_t)n * 2, 1);
    w4_shape(&w, k, n, group, layout);
    w.q.data = p, w.scales.data = p + q, w.zeros.data = p + q + s;
    w.bias = tensor_1d(p + q + s + z, DT_F16, n);
    for (size_t i = 0; i < q; i++) p[i] = (uint8_t)noise(i);
    for (size_t i = 0; i < s / 2; i++)
        ((f16 *)w.scales.data)[i] = f32_to_f16(0.002f + 0.004f * (float)(noise(i) % 64) / 64);
    for (size_t i = 0; i < z && layout == W4_AWQ; i++) p[q + s + i] = (uint8_t)noise(i + 7);
    for (size_t i = 0; i < z / 2 && layout == W4_TM; i++)
        ((f16 *)w.zeros.data)[i] = f32_to_f16((float)(noise(i + 7) % 16));
    for (int64_t i = 0; i < n; i++)
        ((f16 *)w.bias.data)[i] = f32_to_f16((float)(noise((uint64_t)i) % 64) / 32);
    return w;
}

/* One row through the product against a double sum over the host's own reading of the words. */
static void slices_case(int64_t k, int64_t n, int32_t group, w4_layout layout, int parts)
{
    const int64_t all = n * parts;
    void *mem[2];
    w4_weight w[2], fused;
    const w4_weight *list[2] = {&w[0], &w[1]};
    dev_buf wb, xb, yb;
    f16 *x = must((size_t)k, 2), *y = must((size_t)all, 2);
    float *row = must((size_t)k, sizeof *row);
    double d = 0, sum2 = 0;
    for (int i = 0; i < parts; i++) w[i] = make_slice(&mem[i], k, n, group, layout);
    for (int64_t i = 0; i < k; i++) x[i] = f32_to_f16((float)(noise((uint64_t)i) % 200) / 100 - 1);
    const op_limits lim = {1, k, all, 8, 128, 256, 1};
    OK_(ops_reserve(gpu, &lim, e));
    OK_(w4_upload(gpu, &wb, &fused, list, parts, e));
    const tensor hx = tensor_2d(x, DT_F16, 1, k);
    tensor tx, hy = tensor_2d(y, DT_F16, 1, all), ty = hy;
    OK_(dev_upload(gpu, &xb, &tx, &hx, e));
    OK_(dev_alloc(&yb, gpu, (size_t)all * 2, "test", e));
    ty.data = yb.data, ty.mem = dev_mem(gpu);
    OK_(op_gemm_w4(gpu, &ty, &tx, &fused, false, e));
    OK_(dev_copy(gpu, &hy, &ty, e));
    OK_(dev_sync(gpu, e));
    for (int64_t o = 0; o < all; o++) {
        double want = f16_to_f32(((f16 *)w[o / n].bias.data)[o % n]);
        w4_dequant_row(row, &w[o / n], o % n);
        for (int64_t i = 0; i < k; i++) want += (double)f16_to_f32(x[i]) * row[i];
        d += (f16_to_f32(y[o]) - want) * (f16_to_f32(y[o]) - want);
        sum2 += want * want;
    }
    ck_assert_msg(sqrt(d) <= 1e-3 * sqrt(sum2), "%lldx%lld, groups of %d, %d parts: error %.3g",
                  (long long)k, (long long)n, group, parts, sqrt(d / sum2));
    dev_free(&wb), dev_free(&xb), dev_free(&yb);
    for (int i = 0; i < parts; i++) mem_free(mem[i]);
    mem_free(x), mem_free(y), mem_free(row);
}

START_TEST(slices)
{
    slices_case(4096, 4352, 128, W4_AWQ, 1); /* over 8 MiB: two slices, the last a short one */
    slices_case(2048, 4608, 64, W4_TM, 2);   /* pairs, each in two slices */
    slices_case(1056, 17024, 32, W4_AWQ, 1); /* slices that end inside a unit of 128 inputs */
}
END_TEST

/* ---- memory ---- */

/* cuBLAS, which a thread makes, takes memory: wait for it. */
static void settle(void)
{
    float v[4] = {1, 2, 3, 4};
    const tensor host = tensor_2d(v, DT_F32, 2, 2);
    tensor a = host, y = host;
    dev_buf ab, yb;
    OK_(dev_alloc(&ab, gpu, sizeof v, "test", e));
    OK_(dev_alloc(&yb, gpu, sizeof v, "test", e));
    a.data = ab.data, y.data = yb.data, a.mem = y.mem = dev_mem(gpu);
    OK_(dev_copy(gpu, &a, &host, e));
    OK_(op_matmul(gpu, &y, &a, &a, e));
    OK_(dev_sync(gpu, e));
    dev_free(&ab), dev_free(&yb);
}

START_TEST(one_piece)
{
    enum { N = 40, BYTES = 4456448 }; /* 4.25 MiB, which would take 6 */
    dev_buf b[N], outside, after;
    settle();
    const size_t before = free_now();
    OK_(dev_pack_begin(gpu, (size_t)N * BYTES, "test", e));
    for (int i = 0; i < N; i++) {
        OK_(dev_alloc(&b[i], gpu, BYTES, "test", e));
        ck_assert_ptr_nonnull(b[i].pack);
        ck_assert_uint_eq((uintptr_t)b[i].data % DEV_PACK_ALIGN, 0);
        ck_assert(!i || (char *)b[i].data >= (char *)b[i - 1].data + BYTES);
    }
    OK_(dev_alloc(&outside, gpu, BYTES, "test", e)); /* there is no room left */
    ck_assert_ptr_null(outside.pack);
    dev_pack_end(gpu);
    OK_(dev_alloc(&after, gpu, BYTES, "test", e));
    ck_assert_ptr_null(after.pack);
    dev_free(&outside), dev_free(&after);
    ck_assert_uint_le(before - free_now(), (size_t)N * BYTES + NEAR_BYTES);
    for (int i = N - 1; i >= 0; i--) dev_free(&b[i]);
    ck_assert_uint_ge(free_now() + NEAR_BYTES, before);
}
END_TEST

/* A piece that was opened in vain goes as well. */
START_TEST(empty_piece)
{
    settle();
    const size_t before = free_now();
    OK_(dev_pack_begin(gpu, (size_t)64 << 20, "test", e));
    ck_assert_uint_ge(before - free_now() + NEAR_BYTES, (size_t)64 << 20);
    dev_pack_end(gpu);
    ck_assert_uint_ge(free_now() + NEAR_BYTES, before);
}
END_TEST

START_TEST(footprint)
{
    size_t free_bytes, total;
    const dev_footprint f = dev_footprint_of(gpu);
    OK_(dev_memory(gpu, &free_bytes, &total, e));
    ck_assert_uint_eq(f.context_bytes + f.free_bytes, total);
    ck_assert_uint_gt(f.context_bytes, 0);
    ck_assert_uint_gt(f.own_bytes, 0);
    ck_assert_uint_gt(f.free_bytes, free_bytes);
}
END_TEST

int main(void)
{
    const struct {
        const char *name;
        const TTest *test;
    } cases[] = {{"uploads", uploads},
                 {"slices", slices},
                 {"piece", one_piece},
                 {"empty", empty_piece},
                 {"footprint", footprint}};
    const dev_opts card = {.kind = DEV_CUDA, .threads = 3};
    if (cuda_open(&card) != 0) return 77;
    Suite *s = suite_create("cuda_load");
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++)
        tcase_add_test(cuda_case(s, cases[i].name, 120), cases[i].test);
    return cuda_run(s);
}
