/* gram, quad and matmul as products of rows (gemm_block), which wants k along the rows of both
 * sides: x and b are transposed into shared scratch first, which costs one pass beside k of
 * arithmetic. cross turns one side and takes the f32 product. */
#include "kernels/cpu_gemm.h"
#include "kernels/cpu_ops.h"
#include "kernels/vec.h"

#define PART      512 /* rows of x in gram, columns of b in matmul, held transposed at a time */
#define BLOCK     64  /* side of a work item's square of h; a multiple of 8 */
#define QUAD_ROWS 64  /* rows of x of a work item of quad, ... */
#define QUAD_COLS 256 /* ... by rows of h: 64 KB of sums */

/* dst [cols, ld_dst] = src [rows, cols]^T, by squares that stay in L1; items are strips of 16
 * columns */
typedef struct {
    float *dst;
    const float *src;
    int64_t rows, cols, ld_src, ld_dst;
} transpose_ctx;

static void transpose_item(void *ctx, int64_t item, int worker)
{
    const transpose_ctx *t = ctx;
    const int64_t from = item * 16, to = from + 16 < t->cols ? from + 16 : t->cols;
    (void)worker;
    for (int64_t r = 0; r < t->rows; r += 16) {
        const int64_t end = r + 16 < t->rows ? r + 16 : t->rows;
        for (int64_t c = from; c < to; c++) {
            for (int64_t i = r; i < end; i++) t->dst[c * t->ld_dst + i] = t->src[i * t->ld_src + c];
        }
    }
}

static void transpose(device *d, float *dst, int64_t ld_dst, const float *src, int64_t ld_src,
                      int64_t rows, int64_t cols)
{
    transpose_ctx t = {dst, src, rows, cols, ld_src, ld_dst};
    pool_run(d->workers, transpose_item, &t, (cols + 15) / 16);
}

size_t CPU_FN(product_cpu_scratch)(const op_limits *l)
{
    return (size_t)l->k * PART * sizeof(float);
}

/* ---- gram ---- */

typedef struct {
    gemm_job job;
    device *d;
    double *out;
} product_ctx;

/* Squares of the lower triangle, row by row of squares: item = i (i + 1) / 2 + j. */
static void gram_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t k = c->job.n;
    int64_t i = 0;
    while ((i + 1) * (i + 2) / 2 <= item) i++;
    const int64_t j = item - i * (i + 1) / 2;
    const int64_t m1 = (i + 1) * BLOCK < k ? (i + 1) * BLOCK : k;
    const int64_t n1 = (j + 1) * BLOCK < k ? (j + 1) * BLOCK : k;
    CPU_FN(gemm_block)(&c->job, j * BLOCK, n1, i * BLOCK, m1, dev_worker(c->d, worker));
}

err_code CPU_FN(gram_cpu)(device *d, tensor *h, const tensor *x, err *e)
{
    const int64_t m = x->shape[0], k = x->shape[1], side = (k + BLOCK - 1) / BLOCK;
    void *p;
    TRY(dev_scratch(d, &p, (size_t)k * (size_t)(m < PART ? m : PART) * sizeof(float), "op_gram",
                    e));
    for (int64_t r = 0; r < m; r += PART) {
        const int64_t n = m - r < PART ? m - r : PART;
        transpose(d, p, n, (const float *)x->data + r * x->stride[0], x->stride[0], n, k);
        product_ctx c = {{.y = h->data,
                          .x = p,
                          .w = p,
                          .m = k,
                          .n = k,
                          .k = n,
                          .ldy = h->stride[0],
                          .ldx = n,
                          .ldw = n,
                          .w_dt = DT_F32,
                          .add = true},
                         d,
                         NULL};
        pool_run(d->workers, gram_item, &c, side * (side + 1) / 2);
    }
    return OK;
}

/* a's rows of a part turned, then the f32 product. */
err_code CPU_FN(product_cross)(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const int64_t m = a->shape[0], n = a->shape[1];
    void *p;
    TRY(dev_scratch(d, &p, (size_t)n * (size_t)(m < PART ? m : PART) * sizeof(float), "op_cross",
                    e));
    for (int64_t r = 0; r < m; r += PART) {
        const int64_t rows = m - r < PART ? m - r : PART;
        transpose(d, p, rows, (const float *)a->data + r * a->stride[0], a->stride[0], rows, n);
        const tensor turned = tensor_2d(p, DT_F32, n, rows), part = tensor_rows(b, r, rows);
        TRY(CPU_FN(product_f32)(d, y, 1.f, &turned, &part, true, e));
    }
    return OK;
}

/* Strips of rows; reads the lower triangle, writes the upper one: no item reads what another
 * writes. */
static void finish_item(void *ctx, int64_t item, int worker)
{
    const tensor *h = ctx;
    const int64_t from = item * 16, k = h->shape[0], to = from + 16 < k ? from + 16 : k;
    float *data = h->data;
    (void)worker;
    for (int64_t b = 0; b < to; b += 16) {
        for (int64_t i = from; i < to; i++) {
            for (int64_t j = b; j < b + 16 && j < i; j++)
                data[j * h->stride[0] + i] = data[i * h->stride[0] + j];
        }
    }
}

err_code CPU_FN(gram_finish_cpu)(device *d, tensor *h, err *e)
{
    (void)e;
    pool_run(d->workers, finish_item, h, (h->shape[0] + 15) / 16);
    return OK;
}

/* ---- quad ---- */

/* Sum over a block of columns of h of (x H)_i . x_i; h is symmetric, so its rows serve as columns,
 * and what lies below the diagonal block counts twice for what lies above. */
static void quad_block(const product_ctx *c, int64_t r0, int64_t rows, int64_t col, int64_t cols,
                       float *sum, void *panel)
{
    gemm_job j = c->job;
    j.x = c->job.x + r0 * j.ldx;
    j.y = sum;
    j.m = rows;
    j.n = cols;
    for (int part = 0; part < 2; part++) { /* the diagonal block, then the rest of k */
        const int64_t k0 = part ? col + cols : col;
        j.k = part ? c->job.k - k0 : cols;
        if (!j.k) continue;
        j.w = (const float *)c->job.w + col * j.ldw + k0;
        j.x = c->job.x + r0 * j.ldx + k0;
        CPU_FN(gemm_block)(&j, 0, cols, 0, rows, panel);
        for (int64_t r = 0; r < rows; r++) {
            const float *x = c->job.x + (r0 + r) * j.ldx + col, *s = sum + r * QUAD_COLS;
            double dot = 0;
            for (int64_t i = 0; i < cols; i++) dot += (double)s[i] * x[i];
            c->out[r0 + r] += part ? 2 * dot : dot;
        }
    }
}

static void quad_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t r0 = item * QUAD_ROWS, left = c->job.m - r0,
                  rows = left < QUAD_ROWS ? left : QUAD_ROWS;
    uint8_t *scratch = dev_worker(c->d, worker);
    float *sum = (float *)(void *)(scratch + GEMM_SCRATCH_BYTES);
    for (int64_t r = 0; r < rows; r++) c->out[r0 + r] = 0;
    for (int64_t col = 0; col < c->job.k; col += QUAD_COLS) {
        const int64_t cols = c->job.k - col < QUAD_COLS ? c->job.k - col : QUAD_COLS;
        quad_block(c, r0, rows, col, cols, sum, scratch);
    }
}

err_code CPU_FN(quad_cpu)(device *d, tensor *out, const tensor *x, const tensor *h, err *e)
{
    const int64_t m = x->shape[0], k = x->shape[1];
    (void)e;
    product_ctx c = {{.x = x->data,
                      .w = h->data,
                      .m = m,
                      .k = k,
                      .ldy = QUAD_COLS,
                      .ldx = x->stride[0],
                      .ldw = h->stride[0],
                      .w_dt = DT_F32},
                     d,
                     out->data};
    pool_run(d->workers, quad_item, &c, (m + QUAD_ROWS - 1) / QUAD_ROWS);
    return OK;
}

/* ---- matmul ---- */

static void matmul_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t m0 = item * BLOCK, m1 = m0 + BLOCK < c->job.m ? m0 + BLOCK : c->job.m;
    CPU_FN(gemm_block)(&c->job, 0, c->job.n, m0, m1, dev_worker(c->d, worker));
}

err_code CPU_FN(matmul_cpu)(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const int64_t m = y->shape[0], n = y->shape[1], k = a->shape[1];
    void *p;
    TRY(dev_scratch(d, &p, (size_t)k * (size_t)(n < PART ? n : PART) * sizeof(float), "op_matmul",
                    e));
    for (int64_t c0 = 0; c0 < n; c0 += PART) {
        const int64_t cols = n - c0 < PART ? n - c0 : PART;
        transpose(d, p, k, (const float *)b->data + c0, b->stride[0], k, cols);
        product_ctx c = {{.y = (float *)y->data + c0,
                          .x = a->data,
                          .w = p,
                          .m = m,
                          .n = cols,
                          .k = k,
                          .ldy = y->stride[0],
                          .ldx = a->stride[0],
                          .ldw = k,
                          .w_dt = DT_F32},
                         d,
                         NULL};
        pool_run(d->workers, matmul_item, &c, (m + BLOCK - 1) / BLOCK);
    }
    return OK;
}
