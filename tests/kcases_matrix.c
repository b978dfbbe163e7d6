/* Cases of the matrix products: gemm, gram, cross, quad, matmul, product. Magnitudes that errors
 * scale with come from the reference itself, run on absolute values. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "kcheck.h"
#include "kernels/search_ops.h"

typedef struct {
    kbuf x, w, bias;
    bool add;
} gemm_arg;

typedef struct {
    int64_t m, n, k;
    dtype w;
    bool bias, add, wild;
    int64_t pad;
    int timed; /* 1 cold (decode), 2 warm (prefill) */
} gemm_shape;

static kbuf kb_abs(const kbuf *b)
{
    kbuf a = kb_clone(b);
    const int64_t rows = b->t.ndim == 1 ? 1 : b->t.shape[0];
    const int64_t cols = tensor_count(&b->t) / rows;
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < cols; i++) kb_set(&a, r, i, fabsf(kb_get(b, r, i)));
    }
    return a;
}

/* Rows of b without their padding, as the magnitude array wants them; frees b. */
static float *take_floats(kbuf *b)
{
    void *p = NULL;
    err e;
    const int64_t rows = b->t.shape[0], cols = tensor_count(&b->t) / rows;
    if (mem_alloc(&p, (size_t)(rows * cols), sizeof(float), "kcases", &e) != OK) abort();
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t i = 0; i < cols; i++)
            ((float *)p)[r * cols + i] = b->t.dt == DT_F64 ? (float)((double *)b->t.data)[r]
                                                           : kb_get(b, r, i);
    }
    kb_free(b);
    return p;
}

static err_code reserve(device *d, int64_t rows, int64_t n, int64_t k, err *e)
{
    return ops_reserve(d, &(op_limits){.rows = (int32_t)rows, .k = k, .n = n}, e);
}

/* Runs the case and frees its buffers. Magnitudes: `magnitude` on absolute values. */
static void product_of(kcheck *c, kcase *q, gemm_arg *a,
                       err_code (*magnitude)(device *, void *, kbuf *, err *))
{
    float *mag = NULL;
    if (!c->bench) {
        err e;
        gemm_arg b = {.x = kb_abs(&a->x), .add = a->add};
        if (a->w.raw) b.w = kb_abs(&a->w);
        if (a->bias.raw) b.bias = kb_abs(&a->bias);
        kbuf out = q->out[0].t.dt == DT_F64 ? kb_clone(&q->out[0]) : kb_abs(&q->out[0]);
        if (magnitude(c->ref, &b, &out, &e) != OK) kc_fail(c, "%s: %s", q->op, e.msg);
        kb_free(&b.x);
        kb_free(&b.w);
        kb_free(&b.bias);
        q->mag[0] = mag = take_floats(&out);
    }
    kc_case(c, q);
    mem_free(mag);
    kb_free(&q->out[0]);
    kb_free(&a->x);
    kb_free(&a->w);
    kb_free(&a->bias);
}

static err_code run_gemm(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    TRY(reserve(d, a->x.t.shape[0], a->w.t.shape[0], a->w.t.shape[1], e));
    return op_gemm(d, &out[0].t, &a->x.t, &a->w.t, a->bias.raw ? &a->bias.t : NULL, a->add, e);
}

/* Rows in parts must give the bytes of the whole: a token decoded alone gets what prefill gives it.
 * With AMX that holds on a deterministic device; else for parts of 3 rows and more with bf16
 * weights, of 5 with others. */
static void gemm_split(kcheck *c, const gemm_arg *a, const kbuf *y, const char *label)
{
    const int64_t m = y->t.shape[0];
    for (int v = 0; v < c->variants; v++) {
        const bool all = strcmp(c->variant[v].isa, "amx") != 0;
        const int64_t least = all ? 1 : a->w.t.dt == DT_BF16 ? 3 : 5;
        err e;
        gemm_arg part = *a;
        kbuf whole = kb_clone(y), parts = kb_clone(y);
        bool ok = m >= least && run_gemm(c->variant[v].dev[1], &part, &whole, &e) == OK;
        for (int64_t r = 0, n = least; ok && r < m; r += n, n = n * 2 + 1) {
            if (m - r - n < least) n = m - r;
            kbuf out = parts;
            part.x.t = tensor_rows(&a->x.t, r, n);
            out.t = tensor_rows(&parts.t, r, n);
            ok = run_gemm(c->variant[v].dev[1], &part, &out, &e) == OK;
        }
        if (m >= least && !ok) kc_fail(c, "gemm %s: %s", label, e.msg);
        if (ok && memcmp(whole.raw, parts.raw, whole.bytes) != 0)
            kc_fail(c, "gemm %s [%s]: differs when its rows are split", label, c->variant[v].isa);
        kb_free(&whole);
        kb_free(&parts);
    }
}

static void gemm_case(kcheck *c, const gemm_shape *s)
{
    gemm_arg a = {
        .x = kb_2d(DT_F32, s->m, s->k, s->pad), .w = kb_2d(s->w, s->n, s->k, 0), .add = s->add};
    (s->wild ? kc_fill_wild : kc_fill)(c, &a.x, 1);
    (s->wild ? kc_fill_wild : kc_fill)(c, &a.w, 0.05);
    if (s->bias) {
        a.bias = kb_new(s->w, 1, &s->n, 0);
        kc_fill(c, &a.bias, 1);
    }
    kcase q = {.op = "gemm", .run = run_gemm, .arg = &a, .outs = 1, .tol = {TOL_GEMM}};
    snprintf(q.label, sizeof q.label, "m %d n %d k %d %s%s%s", (int)s->m, (int)s->n, (int)s->k,
             dtype_name(s->w), s->bias ? " bias" : "", s->add ? " add" : "");
    q.out[0] = kb_2d(DT_F32, s->m, s->n, s->pad ? s->pad + 2 : 0);
    if (s->add) kc_fill(c, &q.out[0], 1);
    if (s->timed) {
        q.flops = 2.0 * (double)s->m * (double)s->n * (double)s->k;
        q.bytes = (double)(s->n * s->k) * (double)dtype_bytes(s->w) +
                  4.0 * (double)(s->m * (s->k + s->n));
        q.cold = s->timed == 1;
    }
    if (!c->bench) gemm_split(c, &a, &q.out[0], q.label);
    product_of(c, &q, &a, run_gemm);
}

static void gemm_cases(kcheck *c)
{
    static const int64_t edge[] = {1, 2, 3, 5, 8, 11, 12, 13, 15, 16, 17, 31, 32, 33, 63, 65, 100};
    static const int64_t inner[] = {1,  2,  3,   8,   15,  16,  17,  31,  32,
                                    33, 64, 127, 256, 511, 512, 513, 1030};
    static const dtype weight[] = {DT_F16, DT_BF16, DT_F32};
    const size_t ne = sizeof edge / sizeof *edge, ni = sizeof inner / sizeof *inner;
    for (size_t i = 0; i < ne * 3; i++) {
        const gemm_shape s = {edge[i % ne],
                              edge[(i * 5 + 3) % ne],
                              inner[(i * 7 + 5) % ni],
                              weight[i % 3],
                              i % 2 == 1,
                              i % 4 == 2,
                              i % 3 == 1,
                              (int64_t)i % 5,
                              0};
        gemm_case(c, &s);
    }
    static const gemm_shape real[] = {
        {1, 2048, 2048, DT_F16, false, true, false, 0, 0},
        {1, 32000, 256, DT_BF16, false, false, true, 0, 0},
        {7, 640, 2048, DT_F32, true, false, false, 0, 0},
        {70, 520, 2816, DT_BF16, false, true, false, 0, 0},
        {300, 264, 700, DT_F16, true, false, true, 3, 0},
        {520, 300, 320, DT_F32, false, false, false, 0, 0},
        {260, 512, 512, DT_BF16, false, false, false, 0, 0},
    };
    for (size_t i = 0; i < sizeof real / sizeof *real; i++) gemm_case(c, &real[i]);
    static const gemm_shape timed[] = {
        {1, 5632, 2048, DT_F16, false, false, false, 0, 1},
        {1, 5632, 2048, DT_BF16, false, false, false, 0, 1},
        {1, 32000, 2048, DT_F16, false, false, false, 0, 1},
        {1, 32000, 2048, DT_BF16, false, false, false, 0, 1},
        {4, 32000, 2048, DT_F16, false, false, false, 0, 1},
        {8, 5632, 2048, DT_BF16, false, false, false, 0, 1},
        {32, 5632, 2048, DT_BF16, false, false, false, 0, 2},
        {128, 2048, 5632, DT_F16, false, false, false, 0, 2},
        {512, 2048, 2048, DT_BF16, false, false, false, 0, 2},
        {512, 5632, 2048, DT_BF16, false, false, false, 0, 2},
        {512, 5632, 2048, DT_F16, false, false, false, 0, 2},
        {512, 5632, 2048, DT_F32, false, false, false, 0, 2},
        {1024, 512, 512, DT_BF16, false, false, false, 0, 2},
        {1024, 1536, 512, DT_BF16, false, false, false, 0, 2},
        {1024, 512, 1536, DT_BF16, false, false, false, 0, 2},
        {1024, 4096, 512, DT_BF16, false, false, false, 0, 2},
    };
    for (size_t i = 0; c->bench && i < sizeof timed / sizeof *timed; i++) gemm_case(c, &timed[i]);
}

/* ---- gram ---- */

static err_code run_gram(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    TRY(reserve(d, a->x.t.shape[0], a->x.t.shape[1], a->x.t.shape[1], e));
    TRY(op_gram(d, &out[0].t, &a->x.t, e));
    return a->add ? op_gram_finish(d, &out[0].t, e) : OK;
}

static void gram_case(kcheck *c, int64_t m, int64_t k, int64_t pad, bool timed)
{
    gemm_arg a = {.x = kb_2d(DT_F32, m, k, pad), .add = !timed};
    (timed ? kc_fill : kc_fill_wild)(c, &a.x, 1);
    kcase q = {.op = "gram", .run = run_gram, .arg = &a, .outs = 1, .tol = {TOL_GRAM}};
    snprintf(q.label, sizeof q.label, "m %d k %d", (int)m, (int)k);
    q.out[0] = kb_2d(DT_F32, k, k, pad);
    for (int64_t i = 0; i < k; i++) { /* symmetric, as an accumulated one is */
        for (int64_t j = 0; j <= i; j++) {
            const float v = (float)kc_normal(c);
            kb_set(&q.out[0], i, j, v);
            kb_set(&q.out[0], j, i, v);
        }
    }
    q.flops = timed ? (double)m * (double)k * (double)(k + 1) : 0;
    q.bytes = timed ? 4.0 * (double)(m * k) + 4.0 * (double)(k * k) : 0;
    product_of(c, &q, &a, run_gram);
}

/* ---- cross ---- */

static err_code run_cross(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    const int64_t m = a->x.t.shape[1], n = a->w.t.shape[1];
    TRY(reserve(d, a->x.t.shape[0], m > n ? m : n, m > n ? m : n, e));
    return op_cross(d, &out[0].t, &a->x.t, &a->w.t, e);
}

/* y [n,k] += a^T b over m rows. */
static void cross_case(kcheck *c, int64_t m, int64_t n, int64_t k, int64_t pad, bool timed)
{
    gemm_arg a = {.x = kb_2d(DT_F32, m, n, pad), .w = kb_2d(DT_F32, m, k, pad)};
    kc_fill_wild(c, &a.x, 1);
    kc_fill(c, &a.w, 1);
    kcase q = {.op = "cross", .run = run_cross, .arg = &a, .outs = 1, .tol = {TOL_CROSS}};
    snprintf(q.label, sizeof q.label, "m %d n %d k %d", (int)m, (int)n, (int)k);
    q.out[0] = kb_2d(DT_F32, n, k, 0);
    kc_fill(c, &q.out[0], 1);
    q.flops = timed ? 2.0 * (double)m * (double)n * (double)k : 0;
    q.bytes = timed ? 4.0 * (double)(m * n + m * k) + 8.0 * (double)(n * k) : 0;
    product_of(c, &q, &a, run_cross);
}

/* ---- quad ---- */

static err_code run_quad(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    TRY(reserve(d, a->x.t.shape[0], a->x.t.shape[1], a->x.t.shape[1], e));
    return op_quad(d, &out[0].t, &a->x.t, &a->w.t, e);
}

static void quad_case(kcheck *c, int64_t m, int64_t k, int64_t pad, bool timed)
{
    gemm_arg a = {.x = kb_2d(DT_F32, m, k, pad), .w = kb_2d(DT_F32, k, k, pad)};
    kc_fill(c, &a.x, 0.01);
    for (int64_t i = 0; i < k; i++) {
        for (int64_t j = 0; j <= i; j++) {
            const float v = (float)(kc_normal(c) * (i == j ? 30 : 3));
            kb_set(&a.w, i, j, v);
            kb_set(&a.w, j, i, v);
        }
    }
    kcase q = {.op = "quad", .run = run_quad, .arg = &a, .outs = 1, .tol = {TOL_QUAD}};
    snprintf(q.label, sizeof q.label, "m %d k %d", (int)m, (int)k);
    q.out[0] = kb_new(DT_F64, 1, &m, 0);
    q.flops = timed ? 2.0 * (double)m * (double)k * (double)k : 0;
    q.bytes = timed ? 4.0 * (double)(m * k) + 4.0 * (double)(k * k) : 0;
    product_of(c, &q, &a, run_quad);
}

/* ---- matmul ---- */

static err_code run_matmul(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    TRY(reserve(d, a->x.t.shape[0], a->w.t.shape[1], a->x.t.shape[1], e));
    return op_matmul(d, &out[0].t, &a->x.t, &a->w.t, e);
}

static void matmul_case(kcheck *c, int64_t m, int64_t n, int64_t k, int64_t pad, bool timed)
{
    gemm_arg a = {.x = kb_2d(DT_F32, m, k, pad), .w = kb_2d(DT_F32, k, n, pad)};
    kc_fill_wild(c, &a.x, 1);
    kc_fill(c, &a.w, 1);
    kcase q = {.op = "matmul", .run = run_matmul, .arg = &a, .outs = 1, .tol = {TOL_MATMUL}};
    snprintf(q.label, sizeof q.label, "m %d n %d k %d", (int)m, (int)n, (int)k);
    q.out[0] = kb_2d(DT_F32, m, n, pad);
    q.flops = timed ? 2.0 * (double)m * (double)n * (double)k : 0;
    q.bytes = timed ? 4.0 * (double)(m * k + k * n + m * n) : 0;
    product_of(c, &q, &a, run_matmul);
}

/* ---- product ---- */

enum { ADDED = 7 }; /* what y holds where it is added to */

static err_code run_product(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    for (int64_t i = 0; a->add && i < out[0].t.shape[0]; i++)
        for (int64_t j = 0; j < out[0].t.shape[1]; j++) kb_set(&out[0], i, j, ADDED);
    return op_product(d, &out[0].t, a->add ? -0.5f : 1.f, &a->x.t, &a->w.t, a->add, e);
}

static err_code run_magnitude(device *d, void *arg, kbuf *out, err *e)
{
    const gemm_arg *a = arg;
    const float from = (float)ADDED;
    for (int64_t i = 0; i < out->t.shape[0]; i++)
        for (int64_t j = 0; j < out->t.shape[1]; j++) kb_set(out, i, j, from);
    return op_product(d, &out->t, 1.f, &a->x.t, &a->w.t, true, e);
}

static void product_case(kcheck *c, int64_t m, int64_t n, int64_t k, int64_t pad, bool add,
                         bool timed)
{
    gemm_arg a = {
        .x = kb_2d(DT_F32, m, k, pad), .w = kb_2d(DT_F32, k, n, pad), .add = add && !timed};
    kc_fill_wild(c, &a.x, 1);
    kc_fill(c, &a.w, 1);
    kcase q = {.op = "product", .run = run_product, .arg = &a, .outs = 1, .tol = {TOL_PRODUCT}};
    snprintf(q.label, sizeof q.label, "m %d n %d k %d%s", (int)m, (int)n, (int)k,
             add ? " added" : "");
    q.out[0] = kb_2d(DT_F32, m, n, pad);
    q.flops = timed ? 2.0 * (double)m * (double)n * (double)k : 0;
    q.bytes = timed ? 4.0 * (double)(m * k + k * n + m * n) : 0;
    product_of(c, &q, &a, run_magnitude);
}

void kcases_matrix(kcheck *c)
{
    static const int64_t edge[] = {1, 2, 5, 11, 15, 16, 17, 31, 33, 64, 100, 129};
    const int ne = sizeof edge / sizeof *edge;
    if (kc_wants(c, "gemm")) gemm_cases(c);
    for (int i = 0; i < ne; i++) {
        const int64_t m = edge[(i * 5 + 2) % ne], k = edge[i], n = edge[(i * 7 + 3) % ne],
                      pad = i % 4;
        if (kc_wants(c, "gram")) gram_case(c, m, k, pad, false);
        if (kc_wants(c, "cross")) cross_case(c, m, n, k, pad, false);
        if (kc_wants(c, "quad")) quad_case(c, m, k, pad, false);
        if (kc_wants(c, "matmul")) matmul_case(c, m, n, k, pad, false);
        if (kc_wants(c, "product")) product_case(c, m, n, k, pad, i % 2, false);
    }
    if (kc_wants(c, "gram")) gram_case(c, 700, 300, 0, false);
    if (kc_wants(c, "gram")) gram_case(c, 33, 520, 0, false);
    if (kc_wants(c, "cross")) cross_case(c, 600, 300, 700, 1, false);
    if (kc_wants(c, "quad")) quad_case(c, 300, 333, 1, false);
    if (kc_wants(c, "quad")) quad_case(c, 17, 600, 0, false);
    if (kc_wants(c, "matmul")) matmul_case(c, 270, 300, 550, 1, false);
    if (kc_wants(c, "product")) product_case(c, 270, 600, 550, 1, true, false);
    if (!c->bench) return;
    if (kc_wants(c, "gram")) gram_case(c, 512, 512, 0, true);
    if (kc_wants(c, "gram")) gram_case(c, 512, 2048, 0, true);
    if (kc_wants(c, "gram")) gram_case(c, 512, 5632, 0, true);
    if (kc_wants(c, "cross")) cross_case(c, 512, 2048, 2048, 0, true);
    if (kc_wants(c, "quad")) quad_case(c, 512, 512, 0, true);
    if (kc_wants(c, "quad")) quad_case(c, 2048, 2048, 0, true);
    if (kc_wants(c, "matmul")) matmul_case(c, 1024, 1024, 1024, 0, true);
    if (kc_wants(c, "matmul")) matmul_case(c, 1024, 128, 8192, 0, true);
    if (kc_wants(c, "product")) product_case(c, 1024, 2048, 2048, 0, false, true);
    if (kc_wants(c, "product")) product_case(c, 1024, 256, 8192, 0, false, true);
}
