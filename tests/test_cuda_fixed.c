/* Products and losses of a CUDA device opened as deterministic: the bits of a row are the same
 * alone, in any batch and at any place of it; products are near those of doubles. Skipped out loud
 * without a GPU. */
#include <math.h>
#include <string.h>

#include "base/half.h"
#include "support/cuda_case.h"

#define ROWS 150

static f16 *halves(int64_t n, double scale)
{
    f16 *v = must((size_t)n, sizeof *v);
    for (int64_t i = 0; i < n; i++) v[i] = f32_to_f16((float)((uniform() * 2 - 1) * scale));
    return v;
}

static tensor device_2d(dev_buf *b, dtype dt, int64_t m, int64_t k, void *host)
{
    const tensor src = tensor_2d(host, dt, m, k);
    tensor t = on_gpu(b, src);
    if (host) OK_(dev_copy(gpu, &t, &src, e));
    OK_(dev_sync(gpu, e));
    return t;
}

static void fetch(void *host, const tensor *t)
{
    tensor dst = *t;
    dst.data = host;
    dst.mem = MEM_HOST;
    OK_(dev_copy(gpu, &dst, t, e));
    OK_(dev_sync(gpu, e));
}

/* One product: dense, or of 4-bit weights. */
typedef struct {
    int64_t n, k;
    bool wide, add;
    tensor w, bias; /* bias.data NULL: none */
    w4_weight w4;   /* q.data NULL: dense */
} product;

static void run(const product *p, tensor *y, const tensor *x)
{
    if (p->w4.q.data)
        OK_(op_gemm_w4(gpu, y, x, &p->w4, p->add, e));
    else
        OK_(op_gemm(gpu, y, x, &p->w, p->bias.data ? &p->bias : NULL, p->add, e));
}

/* Rows [from, from + n) in one call, from what y held before. */
static void rows_alone(const product *p, const tensor *x, tensor *y, const void *held,
                       const char *all, int64_t from, int64_t n)
{
    const size_t row = (size_t)p->n * dtype_bytes(y->dt);
    const tensor in = tensor_rows(x, from, n);
    tensor out = tensor_rows(y, 0, n), src = out;
    char *got = must((size_t)n, row);
    src.data = (char *)held + (size_t)from * row; /* const: read only */
    src.mem = MEM_HOST;
    OK_(dev_copy(gpu, &out, &src, e));
    run(p, &out, &in);
    fetch(got, &out);
    ck_assert_msg(memcmp(got, all + (size_t)from * row, (size_t)n * row) == 0,
                  "n %lld k %lld%s: rows %lld + %lld are not those of %d", (long long)p->n,
                  (long long)p->k, p->w4.q.data ? " w4" : "", (long long)from, (long long)n, ROWS);
    mem_free(got);
}

static void check_rows(const product *p, const float *weights, const float *bias)
{
    static const int32_t counts[] = {1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 64, 65, 100, 128, 129};
    const dtype dt = p->wide ? DT_F32 : DT_F16;
    const size_t all = (size_t)ROWS * (size_t)p->n;
    f16 *x = halves(ROWS * p->k, 1);
    char *held = must(all, dtype_bytes(dt)), *got = must(all, dtype_bytes(dt));
    dev_buf xb, yb;
    for (size_t i = 0; i < all && p->add; i++) {
        const float v = (float)uniform();
        if (p->wide)
            memcpy(held + i * 4, &v, 4);
        else
            ((f16 *)(void *)held)[i] = f32_to_f16(v);
    }
    const tensor xt = device_2d(&xb, DT_F16, ROWS, p->k, x);
    tensor y = device_2d(&yb, dt, ROWS, p->n, held);
    run(p, &y, &xt);
    fetch(got, &y);
    double d = 0, w = 0;
    for (int64_t r = 0; r < ROWS; r += 37)
        for (int64_t o = 0; o < p->n; o++) {
            const size_t at = (size_t)(r * p->n + o);
            double want = bias ? bias[o] : 0, is;
            for (int64_t k = 0; k < p->k; k++)
                want += (double)f16_to_f32(x[r * p->k + k]) * weights[o * p->k + k];
            if (p->wide) {
                is = ((float *)(void *)got)[at];
                want += ((float *)(void *)held)[at];
            } else {
                is = f16_to_f32(((f16 *)(void *)got)[at]);
                want += f16_to_f32(((f16 *)(void *)held)[at]);
            }
            d += (is - want) * (is - want), w += want * want;
        }
    ck_assert_msg(sqrt(d) <= (p->wide && !p->w4.q.data ? 2e-6 : 1e-3) * sqrt(w),
                  "n %lld k %lld%s: relative error %.3g", (long long)p->n, (long long)p->k,
                  p->w4.q.data ? " w4" : "", sqrt(d / w));
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int64_t from = 0; from + counts[i] <= ROWS; from += 1 + 41 * (int64_t)(i % 3))
            rows_alone(p, &xt, &y, held, got, from, counts[i]);
    dev_free(&xb), dev_free(&yb);
    mem_free(x), mem_free(held), mem_free(got);
}

static void dense_case(int64_t n, int64_t k, bool wide, bool add, dtype with_bias)
{
    product p = {.n = n, .k = k, .wide = wide, .add = add};
    f16 *w = halves(n * k, 0.1), *b = halves(n, 1);
    float *wf = must((size_t)(n * k), sizeof *wf), *bf = must((size_t)n, sizeof *bf);
    dev_buf wb, bb;
    for (int64_t i = 0; i < n * k; i++) wf[i] = f16_to_f32(w[i]);
    for (int64_t i = 0; i < n; i++) bf[i] = f16_to_f32(b[i]);
    p.w = device_2d(&wb, DT_F16, n, k, w);
    const tensor bias = with_bias == DT_F32 ? device_2d(&bb, DT_F32, 1, n, bf)
                                            : device_2d(&bb, DT_F16, 1, n, b);
    if (with_bias) {
        p.bias = tensor_1d(bias.data, bias.dt, n);
        p.bias.mem = bias.mem;
    }
    check_rows(&p, wf, with_bias ? bf : NULL);
    dev_free(&wb), dev_free(&bb);
    mem_free(w), mem_free(b), mem_free(wf), mem_free(bf);
}

static void w4_case(int64_t n, int64_t k, int32_t group, bool wide, bool add)
{
    product p = {.n = n, .k = k, .wide = wide, .add = add};
    void *mem;
    const w4_weight w = make_w4(&mem, k, n, group), *part = &w;
    dev_buf buf;
    float *wf = must((size_t)(n * k), sizeof *wf);
    for (int64_t o = 0; o < n; o++) w4_dequant_row(wf + o * k, &w, o);
    OK_(w4_upload(gpu, &buf, &p.w4, &part, 1, e));
    check_rows(&p, wf, NULL);
    dev_free(&buf);
    mem_free(mem), mem_free(wf);
}

START_TEST(dense)
{
    dense_case(100, 64, true, false, DT_NONE);
    dense_case(96, 520, false, false, DT_F16);
    dense_case(250, 1000, true, true, DT_NONE);
    dense_case(33, 2048, false, true, DT_F16);
    dense_case(50, 100, true, true, DT_F32); /* 100 inputs: no 16-byte rows */
    dense_case(40, 128, false, false, DT_F32);
}
END_TEST

START_TEST(four_bit)
{
    w4_case(64, 256, 128, false, false);
    w4_case(136, 1024, 32, true, true);
    w4_case(72, 2176, 64, false, true);
    w4_case(304, 1664, 128, true, false);
}
END_TEST

/* Norm, product of gate and up, silu: rows alone against all of them. */
static void norm_case(int64_t half, int64_t k, bool glu)
{
    static const int32_t counts[] = {1, 2, 7, 33, 64, 65, 100};
    const size_t row = (size_t)(glu ? half : 2 * half) * sizeof(f16);
    size_t q, s, z;
    w4_weight parts[2], w4;
    const w4_weight *const both[2] = {&parts[0], &parts[1]};
    uint8_t *mem[2];
    dev_buf buf, xb, nb, hb, yb;
    memset(parts, 0, sizeof parts);
    for (int i = 0; i < 2; i++) {
        OK_(w4_sizes(&q, &s, &z, k, half, 128, W4_TM, e));
        uint8_t *p = mem[i] = must(q + s + z, 1);
        w4_shape(&parts[i], k, half, 128, W4_TM);
        parts[i].q.data = p, parts[i].scales.data = p + q, parts[i].zeros.data = p + q + s;
        for (size_t j = 0; j < q; j++) p[j] = (uint8_t)(uniform() * 256);
        for (size_t j = 0; j < s / 2; j++)
            ((f16 *)parts[i].scales.data)[j] = f32_to_f16((float)(0.002 + 0.004 * uniform()));
        for (size_t j = 0; j < z / 2; j++)
            ((f16 *)parts[i].zeros.data)[j] = f32_to_f16((float)(int)(uniform() * 16));
    }
    OK_(w4_upload(gpu, &buf, &w4, both, 2, e));
    float *x = must((size_t)(ROWS * k), sizeof *x);
    for (int64_t i = 0; i < ROWS * k; i++) x[i] = (float)(uniform() * 2 - 1);
    f16 *norm = halves(k, 1);
    const tensor xt = device_2d(&xb, DT_F32, ROWS, k, x), nt = device_2d(&nb, DT_F16, 1, k, norm);
    tensor w = tensor_1d(nt.data, DT_F16, k), h = device_2d(&hb, DT_F16, ROWS, k, NULL),
           y = device_2d(&yb, DT_F16, ROWS, 2 * half, NULL);
    w.mem = nt.mem;
    char *all = must(ROWS, (size_t)half * 4), *got = must(ROWS, (size_t)half * 4);
    OK_(op_norm_gemm_w4(gpu, &y, &h, &xt, &w, 1e-5f, &w4, glu, e));
    fetch(all, &y);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int64_t from = 0; from + counts[i] <= ROWS; from += 29) {
            const tensor in = tensor_rows(&xt, from, counts[i]);
            tensor hp = tensor_rows(&h, 0, counts[i]), yp = tensor_rows(&y, 0, counts[i]);
            OK_(op_norm_gemm_w4(gpu, &yp, &hp, &in, &w, 1e-5f, &w4, glu, e));
            fetch(got, &yp);
            for (int64_t r = 0; r < counts[i]; r++)
                ck_assert_msg(memcmp(got + (size_t)(r * half) * 4,
                                     all + (size_t)((from + r) * half) * 4, row) == 0,
                              "norm, %lld outputs: row %lld of %lld + %d", (long long)half,
                              (long long)r, (long long)from, counts[i]);
        }
    dev_free(&buf), dev_free(&xb), dev_free(&nb), dev_free(&hb), dev_free(&yb);
    for (int i = 0; i < 2; i++) mem_free(mem[i]);
    mem_free(x), mem_free(norm), mem_free(all), mem_free(got);
}

START_TEST(norm_four_bit)
{
    norm_case(256, 512, true);
    norm_case(200, 2048, true);
    norm_case(256, 1024, false);
}
END_TEST

static tensor device_1d(dev_buf *b, dtype dt, int64_t n, void *host)
{
    tensor t = device_2d(b, dt, 1, n, host);
    const memspace mem = t.mem;
    t = tensor_1d(t.data, dt, n);
    t.mem = mem;
    return t;
}

/* Losses and best ids: rows alone against all of them. */
static void losses_case(int64_t v)
{
    static const int32_t counts[] = {1, 2, 7, 33, 64, 65, 100};
    dev_buf lb, tb, nb, bb;
    float *x = must((size_t)(ROWS * v), sizeof *x), all[ROWS], got[ROWS];
    int32_t target[ROWS], best[ROWS], id[ROWS];
    for (int64_t i = 0; i < ROWS * v; i++) x[i] = (float)(uniform() * 20);
    for (int i = 0; i < ROWS; i++) target[i] = (int32_t)(uniform() * (double)v);
    const tensor logits = device_2d(&lb, DT_F32, ROWS, v, x),
                 ids = device_1d(&tb, DT_I32, ROWS, target);
    tensor nll = device_1d(&nb, DT_F32, ROWS, NULL), argmax = device_1d(&bb, DT_I32, ROWS, NULL);
    OK_(op_nll(gpu, &nll, &argmax, &logits, &ids, e));
    fetch(all, &nll), fetch(best, &argmax);
    for (size_t i = 0; i < sizeof counts / sizeof *counts; i++)
        for (int64_t from = 0; from + counts[i] <= ROWS; from += 29) {
            const tensor in = tensor_rows(&logits, from, counts[i]),
                         to = tensor_rows(&ids, from, counts[i]);
            tensor n = tensor_rows(&nll, 0, counts[i]), b = tensor_rows(&argmax, 0, counts[i]);
            OK_(op_nll(gpu, &n, &b, &in, &to, e));
            fetch(got, &n), fetch(id, &b);
            ck_assert_msg(memcmp(got, all + from, (size_t)counts[i] * 4) == 0 &&
                              memcmp(id, best + from, (size_t)counts[i] * 4) == 0,
                          "losses of %lld logits: rows %lld + %d", (long long)v, (long long)from,
                          counts[i]);
        }
    dev_free(&lb), dev_free(&tb), dev_free(&nb), dev_free(&bb);
    mem_free(x);
}

START_TEST(losses)
{
    losses_case(32000);
    losses_case(4099);
}
END_TEST

int main(void)
{
    err e;
    const dev_opts card = {.kind = DEV_CUDA, .threads = 1, .deterministic = true};
    if (cuda_open(&card) != 0) return 77;
    const op_limits lim = {ROWS, 4096, 1024, 8, 128, 512, 8};
    if (ops_reserve(gpu, &lim, &e) != OK) return 1;
    Suite *s = suite_create("cuda_fixed");
    TCase *t = cuda_case(s, "products", 120);
    uniform_state = 7;
    tcase_add_test(t, dense);
    tcase_add_test(t, four_bit);
    tcase_add_test(t, norm_four_bit);
    tcase_add_test(t, losses);
    return cuda_run(s);
}
