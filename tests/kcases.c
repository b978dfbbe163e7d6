/* The tolerance table, and the cases of the ops that go row by row. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "kcheck.h"

/* u = 2^-24, half a unit in the last place of 1. Errors scale with `mag` of the case, or the value
 * itself. Sums over k in 16 (8) lanes have a depth of k/16 + 4 and their rounding errors add like a
 * random walk: sqrt(depth) u; the largest k here is 14336, depth 900 (AVX2 1800), so 42 u is 3
 * sigma of 14 u.
 * AMX splits each f32 into two bf16 parts of 8 bits: the value is kept to 2^-17, and where both
 * sides are split, the product of the low parts is dropped, at most 2^-16. With bf16 weights that
 * is 2^-17 in all, else 2 * 2^-17 + 2^-16 = 2^-15, reached by a single product; sums come out far
 * better. */
#define U 0x1p-24
static const struct {
    const char *name;
    double vec, amx;
} table[TOL_COUNT] = {
    [TOL_EXACT] = {"exact", 0, 0},
    [TOL_NORM] = {"rmsnorm", 16 * U,
                  16 * U}, /* mean 8 u (half of it after the root), div, 2 products */
    [TOL_ADD] = {"add", 0, 0},
    [TOL_GEMM] = {"gemm", 42 * U, 0x1p-15}, /* of sum |x||w| */
    [TOL_GLU] = {"glu", 8 * U, 8 * U},      /* exp 2 u, sum, quotient, product; of |silu||up| */
    [TOL_ROPE] = {"rope", 4 * U, 4 * U},    /* sin and cos 1 u, two products; of |a| + |b| */
    [TOL_KV] = {"kv", 1.01, 1.01},         /* of one code step (or f16 step): ties may fall apart */
    [TOL_ATTN] = {"attn", 4 * U, 0x1p-14}, /* of max|v| (1 + |score|): see kcases_attn.c */
    [TOL_NLL] = {"nll", 16 * U, 16 * U},   /* of max|logit| + 1 */
    [TOL_ABSSUM] = {"abssum", 0x1p-40, 0x1p-40},   /* sums in double on both sides */
    [TOL_GRAM] = {"gram", 16 * U, 0x1p-15},        /* of sum |x_i||x_j|; depth 512/16 */
    [TOL_QUAD] = {"quad", 42 * U, 0x1p-15},        /* of sum |x||H||x| */
    [TOL_MATMUL] = {"matmul", 42 * U, 0x1p-15},    /* of sum |a||b| */
    [TOL_CROSS] = {"cross", 262 * U, 0x1p-15},     /* as product, as gram; + |y| */
    [TOL_PRODUCT] = {"product", 262 * U, 262 * U}, /* chains of 256; of sum |a||b| + |y| */
    [TOL_W4] = {"w4", 0x1p-6, 0x1p-6},             /* tighter: test_gemm_w4.c */
};

double kc_tolerance(tol_row row, const char *isa)
{
    return strncmp(isa, "amx", 3) == 0 ? table[row].amx : table[row].vec;
}

const char *kc_tolerance_name(tol_row row) { return table[row].name; }

static float *must_floats(int64_t n)
{
    void *p;
    err e;
    if (mem_alloc(&p, (size_t)n, sizeof(float), "kcases", &e) != OK) return NULL;
    return p;
}

/* ---- embed ---- */

typedef struct {
    kbuf table, ids;
} embed_arg;

static err_code run_embed(device *d, void *arg, kbuf *out, err *e)
{
    const embed_arg *a = arg;
    return op_embed(d, &out[0].t, &a->table.t, &a->ids.t, e);
}

static void embed_case(kcheck *c, int64_t m, int64_t h, dtype dt, int64_t pad)
{
    embed_arg a = {kb_2d(dt, 50, h, pad), kb_new(DT_I32, 1, &m, 0)};
    kc_fill(c, &a.table, 1);
    for (int64_t i = 0; i < m; i++) ((int32_t *)a.ids.t.data)[i] = (int32_t)(kc_uniform(c) * 50);
    kcase k = {.op = "embed", .run = run_embed, .arg = &a, .outs = 1, .tol = {TOL_EXACT}};
    snprintf(k.label, sizeof k.label, "m %d h %d %s", (int)m, (int)h, dtype_name(dt));
    k.out[0] = kb_2d(DT_F32, m, h, pad);
    kc_case(c, &k);
    kb_free(&k.out[0]);
    kb_free(&a.table);
    kb_free(&a.ids);
}

/* ---- rmsnorm, add, glu ---- */

typedef struct {
    kbuf x, w;
} two_arg;

static err_code run_rmsnorm(device *d, void *arg, kbuf *out, err *e)
{
    const two_arg *a = arg;
    return op_rmsnorm(d, &out[0].t, &a->x.t, &a->w.t, 1e-5f, e);
}

static err_code run_add(device *d, void *arg, kbuf *out, err *e)
{
    const two_arg *a = arg;
    return op_add(d, &out[0].t, &a->x.t, e);
}

static err_code run_glu(device *d, void *arg, kbuf *out, err *e)
{
    const two_arg *a = arg;
    return op_glu(d, &out[0].t, &a->x.t, &a->w.t, e);
}

static void norm_case(kcheck *c, int64_t m, int64_t k, dtype dt, int64_t pad, double scale)
{
    two_arg a = {kb_2d(DT_F32, m, k, pad), kb_new(dt, 1, &k, 0)};
    kc_fill_wild(c, &a.x, scale);
    kc_fill(c, &a.w, 1);
    kcase q = {.op = "rmsnorm", .run = run_rmsnorm, .arg = &a, .outs = 1, .tol = {TOL_NORM}};
    snprintf(q.label, sizeof q.label, "m %d k %d %s scale %g", (int)m, (int)k, dtype_name(dt),
             scale);
    q.out[0] = kb_2d(DT_F32, m, k, pad);
    q.bytes = 8.0 * (double)(m * k);
    q.flops = m == 512 ? 4.0 * (double)(m * k) : 0;
    kc_case(c, &q);
    kb_free(&q.out[0]);
    kb_free(&a.x);
    kb_free(&a.w);
}

static void add_case(kcheck *c, int64_t m, int64_t k, int64_t pad)
{
    two_arg a = {.x = kb_2d(DT_F32, m, k, pad)};
    kc_fill_wild(c, &a.x, 1);
    kcase q = {.op = "add", .run = run_add, .arg = &a, .outs = 1, .tol = {TOL_ADD}};
    snprintf(q.label, sizeof q.label, "m %d k %d", (int)m, (int)k);
    q.out[0] = kb_2d(DT_F32, m, k, pad + 1);
    kc_fill(c, &q.out[0], 1);
    kc_case(c, &q);
    kb_free(&q.out[0]);
    kb_free(&a.x);
}

static void glu_case(kcheck *c, int64_t m, int64_t n, int64_t pad, double scale)
{
    two_arg a = {kb_2d(DT_F32, m, n, pad), kb_2d(DT_F32, m, n, pad)};
    kc_fill_wild(c, &a.x, scale);
    kc_fill(c, &a.w, 1);
    kb_set(&a.x, 0, 0, -1e30f);
    kb_set(&a.x, m - 1, n - 1, 1e30f);
    kcase q = {.op = "glu", .run = run_glu, .arg = &a, .outs = 1, .tol = {TOL_GLU}};
    snprintf(q.label, sizeof q.label, "m %d n %d scale %g", (int)m, (int)n, scale);
    q.out[0] = kb_2d(DT_F32, m, n, pad + 3);
    q.bytes = 12.0 * (double)(m * n);
    q.flops = m == 512 ? 20.0 * (double)(m * n) : 0;
    kc_case(c, &q);
    kb_free(&q.out[0]);
    kb_free(&a.x);
    kb_free(&a.w);
}

/* ---- nll ---- */

static err_code run_nll(device *d, void *arg, kbuf *out, err *e)
{
    const two_arg *a = arg;
    return op_nll(d, &out[0].t, out[1].raw ? &out[1].t : NULL, &a->x.t, &a->w.t, e);
}

static void nll_case(kcheck *c, int64_t m, int64_t v, int64_t pad, double scale, bool ties)
{
    two_arg a = {kb_2d(DT_F32, m, v, pad), kb_new(DT_I32, 1, &m, 0)};
    float *mag = must_floats(m);
    kc_fill(c, &a.x, scale);
    for (int64_t i = 0; i < m; i++) {
        ((int32_t *)a.w.t.data)[i] = (int32_t)(kc_uniform(c) * (double)v);
        if (ties) { /* the first of equal maxima wins, wherever the two lie */
            kb_set(&a.x, i, (int64_t)(kc_uniform(c) * (double)v), (float)(20 * scale));
            kb_set(&a.x, i, (int64_t)(kc_uniform(c) * (double)v), (float)(20 * scale));
        }
        for (int64_t j = 0; j < v; j++) mag[i] = fmaxf(mag[i], fabsf(kb_get(&a.x, i, j)) + 1);
    }
    kcase q = {.op = "nll", .run = run_nll, .arg = &a, .outs = 2, .tol = {TOL_NLL, TOL_EXACT}};
    snprintf(q.label, sizeof q.label, "m %d v %d scale %g%s", (int)m, (int)v, scale,
             ties ? " ties" : "");
    q.out[0] = kb_new(DT_F32, 1, &m, 0);
    q.out[1] = kb_new(DT_I32, 1, &m, 0);
    q.mag[0] = mag;
    q.bytes = 4.0 * (double)(m * v);
    q.flops = v == 32000 ? 20.0 * (double)(m * v) : 0;
    kc_case(c, &q);
    mem_free(mag);
    kb_free(&q.out[0]);
    kb_free(&q.out[1]);
    kb_free(&a.x);
    kb_free(&a.w);
}

/* ---- absstat ---- */

static err_code run_absstat(device *d, void *arg, kbuf *out, err *e)
{
    const two_arg *a = arg;
    TRY(op_absstat(d, &out[0].t, &out[1].t, &a->x.t, e));
    return op_absstat(d, &out[0].t, &out[1].t, &a->x.t, e); /* accumulates */
}

static void absstat_case(kcheck *c, int64_t m, int64_t k, int64_t pad)
{
    two_arg a = {.x = kb_2d(DT_F32, m, k, pad)};
    kc_fill_wild(c, &a.x, 1);
    kcase q = {
        .op = "absstat", .run = run_absstat, .arg = &a, .outs = 2, .tol = {TOL_EXACT, TOL_ABSSUM}};
    snprintf(q.label, sizeof q.label, "m %d k %d", (int)m, (int)k);
    q.out[0] = kb_new(DT_F32, 1, &k, 0);
    q.out[1] = kb_new(DT_F64, 1, &k, 0);
    for (int64_t i = 0; i < k; i++) {
        ((float *)q.out[0].t.data)[i] = i % 3 ? 0 : 0.5f;
        ((double *)q.out[1].t.data)[i] = (double)i;
    }
    q.bytes = 8.0 * (double)(m * k);
    q.flops = m == 512 ? 8.0 * (double)(m * k) : 0;
    kc_case(c, &q);
    kb_free(&q.out[0]);
    kb_free(&q.out[1]);
    kb_free(&a.x);
}

void kcases_rows(kcheck *c)
{
    static const int64_t cols[] = {1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 255, 1000};
    static const dtype weight[] = {DT_F16, DT_BF16, DT_F32};
    for (size_t i = 0; i < sizeof cols / sizeof *cols; i++) {
        const int64_t n = cols[i], m = 1 + (int64_t)i % 5, pad = (int64_t)i % 4;
        const dtype dt = weight[i % 3];
        if (kc_wants(c, "embed")) embed_case(c, m, n, dt, pad);
        if (kc_wants(c, "rmsnorm")) norm_case(c, m, n, dt, pad, 1);
        if (kc_wants(c, "add")) add_case(c, m, n, pad);
        if (kc_wants(c, "glu")) glu_case(c, m, n, pad, 1);
        if (kc_wants(c, "nll")) nll_case(c, m, n, pad, 5, false);
        if (kc_wants(c, "nll")) nll_case(c, m, n, pad, 5, true);
        if (kc_wants(c, "absstat")) absstat_case(c, m, n, pad);
    }
    if (kc_wants(c, "embed")) embed_case(c, 300, 2048, DT_BF16, 0);
    for (int i = 0; i < 3 && kc_wants(c, "rmsnorm"); i++)
        norm_case(c, i ? 512 : 1, 2048, weight[i], 0, i == 2 ? 1e-12 : 1e4);
    if (kc_wants(c, "add")) add_case(c, 512, 2048, 0);
    if (kc_wants(c, "glu")) glu_case(c, 1, 5632, 0, 1);
    if (kc_wants(c, "glu")) glu_case(c, 512, 5632, 0, 30);
    if (kc_wants(c, "nll")) nll_case(c, 130, 32000, 0, 8, false);
    if (kc_wants(c, "nll")) nll_case(c, 3, 92544, 1, 1000, true);
    if (kc_wants(c, "absstat")) absstat_case(c, 512, 2048, 0);
}
