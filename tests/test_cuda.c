/* Products, norms and ops of rows of a CUDA device against the CPU's references: odd sizes, every
 * format, guards behind outputs. Without a GPU, or in a build without CUDA, the cases are skipped
 * out loud. */
#include "support/cuda_pair.h"

/* ---- 4-bit products ---- */

static float *want_w4(const w4_weight *const *parts, int n_parts, const float *x, int64_t m,
                      int64_t k, int64_t n)
{
    float *y = must((size_t)(m * n), sizeof *y), *row = must((size_t)k, sizeof *row);
    int64_t at = 0;
    for (int p = 0; p < n_parts; p++)
        for (int64_t o = 0; o < parts[p]->n; o++, at++) {
            w4_dequant_row(row, parts[p], o);
            for (int64_t i = 0; i < m; i++) {
                double sum = 0;
                for (int64_t j = 0; j < k; j++) sum += (double)x[i * k + j] * row[j];
                y[i * n + at] = (float)sum;
            }
        }
    mem_free(row);
    return y;
}

static void w4_case(int64_t m, int64_t k, int64_t n, int32_t group, int parts, bool wide)
{
    void *mem[3];
    w4_weight w[3], fused;
    const w4_weight *list[3];
    dev_buf wb, xb, yb;
    char what[96];
    snprintf(what, sizeof what, "w4 %lldx%lldx%lld g%d, %d parts%s", (long long)m, (long long)k,
             (long long)n, group, parts, wide ? ", added to f32" : "");
    for (int i = 0; i < parts; i++) w[i] = make_w4(&mem[i], k, n, group), list[i] = &w[i];
    limits(m, k, parts * n);
    OK_(w4_upload(gpu, &wb, &fused, list, parts, e));
    float *x = values(m * k, 1), *want = want_w4(list, parts, x, m, k, parts * n);
    float *before = wide ? values(m * parts * n, 1) : NULL;
    const tensor tx = upload(&xb, DT_F16, m, k, PAD, x);
    tensor ty = upload(&yb, wide ? DT_F32 : DT_F16, m, parts * n, PAD, before);
    OK_(op_gemm_w4(gpu, &ty, &tx, &fused, wide, e));
    float *got = download(&ty, what);
    for (int64_t i = 0; before && i < m * parts * n; i++) want[i] += before[i];
    near(got, want, m * parts * n, 1e-3, what);
    void *all[] = {x, want, before, got};
    for (int i = 0; i < 4; i++) mem_free(all[i]);
    for (int i = 0; i < parts; i++) mem_free(mem[i]);
    dev_free(&wb), dev_free(&xb), dev_free(&yb);
}

START_TEST(w4_products)
{
    static const int64_t rows[] = {1, 2, 4, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 130};
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i += few ? 4 : 1) {
        w4_case(rows[i], 512, 72, 128, 1, false);
        w4_case(rows[i], 2304, 40, 128, 2, true);
        w4_case(rows[i], 640, 8, 64, 3, false);
        w4_case(rows[i], 352, 24, 32, 1, true); /* k no multiple of 128 */
    }
}
END_TEST

/* ---- 16-bit products ---- */

static void dense_case(int64_t m, int64_t k, int64_t n, bool wide, dtype biased)
{
    dev_buf wb, xb, yb, bb;
    char what[96];
    snprintf(what, sizeof what, "gemm %lldx%lldx%lld%s%s", (long long)m, (long long)k, (long long)n,
             wide ? ", added to f32" : "",
             biased == DT_F32 ? ", f32 bias"
             : biased         ? ", bias"
                              : "");
    limits(m, k, n);
    float *x = values(m * k, 1), *w = values(n * k, 0.02), *bias = values(n, 1),
          *before = wide ? values(m * n, 1) : NULL, *want = must((size_t)(m * n), sizeof *want);
    for (int64_t i = 0; i < m; i++)
        for (int64_t o = 0; o < n; o++) {
            double sum = biased ? bias[o] : 0;
            for (int64_t j = 0; j < k; j++) sum += (double)x[i * k + j] * w[o * k + j];
            want[i * n + o] = (float)(sum + (before ? before[i * n + o] : 0));
        }
    const tensor tx = upload(&xb, DT_F16, m, k, 0, x), tw = upload(&wb, DT_F16, n, k, 0, w);
    tensor ty = upload(&yb, wide ? DT_F32 : DT_F16, m, n, PAD, before),
           tb = upload(&bb, biased ? biased : DT_F16, 1, n, 0, bias);
    tb = tensor_1d(tb.data, tb.dt, n);
    tb.mem = dev_mem(gpu);
    OK_(op_gemm(gpu, &ty, &tx, &tw, biased ? &tb : NULL, wide, e));
    float *got = download(&ty, what);
    near(got, want, m * n, 1e-3, what);
    void *all[] = {x, w, bias, before, want, got};
    for (int i = 0; i < 6; i++) mem_free(all[i]);
    dev_free(&wb), dev_free(&xb), dev_free(&yb), dev_free(&bb);
}

START_TEST(dense_products)
{
    for (int64_t m = 1; m < 3; m++) {
        dense_case(m, 4096, 520, true, DT_NONE);
        dense_case(m, 4360, 72, false, DT_F16);
        dense_case(m, 104, 4300, true, DT_F16);
        dense_case(m, 10000, 9, false, DT_NONE);
        dense_case(m, 104, 4300, m > 1, DT_F32); /* of a model in f32 */
    }
}
END_TEST

/* Tiles of outputs and tokens that blocks share, and more tiles than blocks. */
START_TEST(w4_many_tiles)
{
    w4_case(20, 4096, 1032, 128, 1, false);
    w4_case(3, 512, 8200, 128, 1, false); /* few rows, so many tiles that a warp takes several */
    w4_case(7, 384, 8200, 64, 2, true);
    w4_case(11, 384, 11520, 32, 1, true);
    w4_case(16, 640, 11536, 128, 1, false);
    w4_case(40, 11008, 520, 128, 1, true); /* eight blocks share a tile */
    w4_case(48, 11008, 264, 64, 1, false);
    w4_case(33, 8192, 2056, 128, 2, true);
    w4_case(50, 2816, 1304, 64, 2, true);
    w4_case(64, 1280, 4096, 128, 1, true);
    w4_case(100, 2048, 1032, 32, 2, false);
    w4_case(300, 256, 8200, 128, 2, false);
    w4_case(400, 1184, 520, 32, 3, true);
}
END_TEST

/* Norm, product and GLU at once against the same in turn. */
START_TEST(norm_w4_glu)
{
    static const int64_t rows[] = {1, 2, 7, 20, 70, 150, 40};
    for (size_t r = 0; r < sizeof rows / sizeof *rows; r += few ? 3 : 1) {
        for (int glu = 0; glu < 2; glu++) {
            const int64_t m = rows[r], k = r % 2 ? 512 : 5120, n = m < 100 ? 56 : 17000;
            void *mem[2];
            w4_weight w[2], fused;
            const w4_weight *list[2] = {&w[0], &w[1]};
            dev_buf wb, xb, hb, nb, yb, ob;
            w[0] = make_w4(&mem[0], k, n, 128), w[1] = make_w4(&mem[1], k, n, 128);
            limits(m, k, 2 * n);
            OK_(w4_upload(gpu, &wb, &fused, list, 2, e));
            float *x = values(m * k, 1), *g = values(k, 1);
            const tensor tx = upload(&xb, DT_F32, m, k, 0, x);
            tensor th = upload(&hb, DT_F16, m, k, 0, NULL), norm = upload(&nb, DT_F16, 1, k, 0, g);
            tensor ty = upload(&yb, DT_F16, m, 2 * n, 0, NULL),
                   one = upload(&ob, DT_F16, m, 2 * n, 0, NULL);
            norm = tensor_1d(norm.data, DT_F16, k);
            norm.mem = dev_mem(gpu);
            OK_(op_rmsnorm(gpu, &th, &tx, &norm, 1e-5f, e));
            OK_(op_gemm_w4(gpu, &ty, &th, &fused, false, e));
            tensor gate = tensor_cols(&ty, 0, n);
            const tensor up = tensor_cols(&ty, n, n);
            if (glu) OK_(op_glu(gpu, &gate, &gate, &up, e));
            OK_(op_norm_gemm_w4(gpu, &one, &th, &tx, &norm, 1e-5f, &fused, glu, e));
            float *a = download(&ty, "in turn"), *b = download(&one, "at once");
            for (int64_t i = 0; i < m * 2 * n; i++)
                if (!glu || i % (2 * n) < n)
                    ck_assert_msg(a[i] == b[i],
                                  "norm, w4, glu %d, %lld rows: at %lld: %g in turn, %g at once",
                                  glu, (long long)m, (long long)i, a[i], b[i]);
            void *all[] = {x, g, a, b, mem[0], mem[1]};
            for (int i = 0; i < 6; i++) mem_free(all[i]);
            dev_buf *bufs[] = {&wb, &xb, &hb, &nb, &yb, &ob};
            for (int i = 0; i < 6; i++) dev_free(bufs[i]);
        }
    }
}
END_TEST

/* ---- rows ---- */

/* A host tensor of the CPU device; 16-bit values are f32 there. */
static tensor host_2d(float *v, int64_t m, int64_t k) { return tensor_2d(v, DT_F32, m, k); }

static void norm_case(int64_t m, int64_t k)
{
    dev_buf xb, wb, yb;
    char what[64];
    snprintf(what, sizeof what, "norm %lldx%lld", (long long)m, (long long)k);
    float *x = values(m * k, 1), *w = values(k, 1), *want = must((size_t)(m * k), sizeof *want);
    const tensor tx = upload(&xb, DT_F32, m, k, PAD, x);
    tensor tw = upload(&wb, DT_F16, 1, k, 0, w), ty = upload(&yb, DT_F16, m, k, PAD, NULL);
    tensor cy = host_2d(want, m, k);
    const tensor cx = host_2d(x, m, k), cw = tensor_1d(w, DT_F32, k);
    tw = tensor_1d(tw.data, DT_F16, k);
    tw.mem = dev_mem(gpu);
    OK_(op_rmsnorm(gpu, &ty, &tx, &tw, 1e-5f, e));
    OK_(op_rmsnorm(cpu, &cy, &cx, &cw, 1e-5f, e));
    float *got = download(&ty, what);
    near(got, want, m * k, 1e-3, what);
    mem_free(x), mem_free(w), mem_free(want), mem_free(got);
    dev_free(&xb), dev_free(&wb), dev_free(&yb);
}

static void glu_case(int64_t m, int64_t n)
{
    dev_buf xb;
    char what[64];
    snprintf(what, sizeof what, "glu %lldx%lld", (long long)m, (long long)n);
    float *x = values(m * 2 * n, 1), *want = must((size_t)(m * n), sizeof *want);
    tensor tx = upload(&xb, DT_F16, m, 2 * n, PAD, x), gate = tensor_cols(&tx, 0, n),
           cy = host_2d(want, m, n);
    const tensor up = tensor_cols(&tx, n, n), cx = host_2d(x, m, 2 * n),
                 cg = tensor_cols(&cx, 0, n), cu = tensor_cols(&cx, n, n);
    OK_(op_glu(gpu, &gate, &gate, &up, e));
    OK_(op_glu(cpu, &cy, &cg, &cu, e));
    float *all = download(&tx, what), *got = must((size_t)(m * n), sizeof *got);
    for (int64_t i = 0; i < m * n; i++) got[i] = all[i / n * 2 * n + i % n];
    near(got, want, m * n, 1e-3, what);
    for (int64_t i = 0; i < m * n; i++)
        ck_assert_msg(all[i / n * 2 * n + n + i % n] == x[i / n * 2 * n + n + i % n],
                      "%s: changed the upper half", what);
    mem_free(x), mem_free(want), mem_free(all), mem_free(got);
    dev_free(&xb);
}

/* Losses and best ids, with a tie for the largest logit; in one row a NaN, in another nothing but
 * -infinity, where there are as many. */
static void nll_case(int64_t m, int64_t v, int64_t pad)
{
    dev_buf lb, tb, nb, bb;
    char what[64];
    snprintf(what, sizeof what, "nll %lldx%lld + %lld", (long long)m, (long long)v, (long long)pad);
    float *x = values(m * v, 2), *want = must((size_t)m, sizeof *want);
    int32_t *id = must((size_t)m, 3 * sizeof *id), *best = id + m, *got_best = best + m;
    for (int64_t i = 0; i < m; i++) {
        id[i] = (int32_t)(uniform() * (double)v);
        x[i * v + v / 3] = x[i * v + v - 1] = 90;
    }
    for (int64_t j = 0; m > 2 && j < v; j++) x[v + j] = -INFINITY;
    if (m > 2) x[2 * v + v / 2] = NAN;
    const tensor tl = upload(&lb, DT_F32, m, v, pad, x), cl = host_2d(x, m, v);
    tensor tn = upload(&nb, DT_F32, 1, m, 0, NULL), ct = tensor_1d(id, DT_I32, m),
           cn = tensor_1d(want, DT_F32, m), cb = tensor_1d(best, DT_I32, m), tt = ct, best_dev = cb,
           back = tensor_1d(got_best, DT_I32, m);
    tn = tensor_1d(tn.data, DT_F32, m);
    OK_(dev_alloc(&tb, gpu, (size_t)m * 4, "test", e));
    OK_(dev_alloc(&bb, gpu, (size_t)m * 4, "test", e));
    tt.data = tb.data, best_dev.data = bb.data;
    tn.mem = tt.mem = best_dev.mem = dev_mem(gpu);
    OK_(dev_copy(gpu, &tt, &ct, e));
    OK_(op_nll(gpu, &tn, &best_dev, &tl, &tt, e));
    OK_(op_nll(cpu, &cn, &cb, &cl, &ct, e));
    OK_(dev_copy(gpu, &back, &best_dev, e));
    tensor row = tensor_2d(tn.data, DT_F32, 1, m);
    row.mem = dev_mem(gpu);
    float *got = download(&row, what);
    for (int64_t i = 0; i < m; i++)
        ck_assert_msg(got_best[i] == best[i], "%s: best of row %lld: %d, expected %d", what,
                      (long long)i, got_best[i], best[i]);
    for (int64_t i = 1; m > 2 && i < 3; i++) {
        ck_assert_msg(isnan(got[i]) && isnan(want[i]), "%s: row %lld: %g, expected %g", what,
                      (long long)i, (double)got[i], (double)want[i]);
        got[i] = want[i] = 0;
    }
    near(got, want, m, 1e-5, what);
    mem_free(x), mem_free(want), mem_free(id), mem_free(got);
    dev_free(&lb), dev_free(&tb), dev_free(&nb), dev_free(&bb);
}

START_TEST(rows_ops)
{
    static const int64_t rows[] = {1, 3, 17, 64, 65, 130};
    limits(1024, 5120, 10240);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        norm_case(rows[i], 512), norm_case(rows[i], 5120), norm_case(rows[i], 200);
        glu_case(rows[i], 1408), glu_case(rows[i], 72), glu_case(rows[i], 37);
        nll_case(rows[i], 1000, PAD), nll_case(rows[i], 4099, 1), nll_case(rows[i], 4099, 0);
        for (int64_t v = 1; v < 7; v++) nll_case(rows[i], v, 8 - v);
    }
    nll_case(1, 92544, 0), nll_case(3, 151675, 0), nll_case(67, 32001, 3);
    if (!few) nll_case(300, 40003, 1); /* a row to a block: threads go round */
}
END_TEST

/* Options: cuda_pair.h. */
int main(int argc, char **argv)
{
    const int rc = pair_open(argc, argv, 2);
    if (rc != 0) return rc;
    Suite *s = suite_create("cuda");
    tcase_add_test(cuda_case(s, "w4", 300), w4_products);
    tcase_add_test(cuda_case(s, "w4 tiles", 300), w4_many_tiles);
    tcase_add_test(cuda_case(s, "dense", 300), dense_products);
    tcase_add_test(cuda_case(s, "norm", 300), norm_w4_glu);
    tcase_add_test(cuda_case(s, "rows", 300), rows_ops);
    return pair_run(s);
}
