/* gram, cross, quad and matmul on AMX tiles (amx.h): both sides f32, three tile products each. */
#include "kernels/amx.h"
#include "kernels/cpu.h"

#define ROWS_G      512 /* rows of x of a step of gram */
#define SIDE_G      128 /* side of a work item's square of h */
#define COLS        512 /* columns of b (of h) packed at a time */
#define ROWS        128 /* rows of a (of x) of a work item */
#define BLOCK_STEPS 6

typedef struct {
    device *d;
    const float *a, *b;        /* a [m,k]; b [k, columns] at its first column, k from k0 on */
    int64_t m, n, k, lda, ldb; /* n: of gram and cross */
    int64_t cols, steps;       /* of b as packed: COLS at most, and its k in steps */
    int64_t twice_from;        /* inputs from here on count twice (quad) */
    uint8_t *pa, *pb;          /* panels */
    float *y;
    int64_t ldy;
    double *out;
} product_ctx;

/* ---- b: one step of one tile column ---- */

static void pack_b_item(void *ctx, int64_t column, int worker)
{
    const product_ctx *c = ctx;
    const int64_t c0 = column * AMX_TILE, left = c->cols - c0,
                  cols = left < AMX_TILE ? left : AMX_TILE;
    uint8_t *dst = c->pb + column * c->steps * AMX_PARTS * AMX_BYTES;
    (void)worker;
    for (int64_t s = 0; s < c->steps; s++, dst += AMX_PARTS * AMX_BYTES) {
        __m512i hi[16], lo[16];
        const int64_t k0 = s * AMX_STEP;
        amx_pack_b_cols(hi, lo, c->b + k0 * c->ldb + c0, c->ldb, cols, c->k - k0,
                        k0 >= c->twice_from ? 2.0f : 1.0f);
        amx_store_rows(dst, hi);
        amx_store_rows(dst + AMX_BYTES, lo);
    }
}

/* Sums of rows [r0, r0+rows) of a by all packed columns, in the worker's scratch. */
static float *product_rows(const product_ctx *c, int64_t r0, int64_t rows, int worker)
{
    uint8_t *a = dev_worker(c->d, worker);
    amx_job j = {.a = a,
                 .rows = amx_up(rows, 64) / AMX_TILE,
                 .columns = (c->cols + 15) / AMX_TILE,
                 .a_parts = AMX_PARTS,
                 .b_pitch = c->steps * AMX_PARTS * AMX_BYTES};
    j.c = (float *)(void *)(a + (ROWS / AMX_TILE) * BLOCK_STEPS * AMX_PARTS * AMX_BYTES);
    amx_begin();
    for (int64_t s = 0; s < c->steps; s += BLOCK_STEPS) {
        const int64_t k0 = s * AMX_STEP;
        j.steps = c->steps - s < BLOCK_STEPS ? c->steps - s : BLOCK_STEPS;
        j.a_pitch = j.steps * AMX_PARTS * AMX_BYTES;
        j.b = c->pb + s * AMX_PARTS * AMX_BYTES;
        j.first = s == 0;
        for (int64_t t = 0; t < j.rows; t++) {
            const int64_t left = rows - t * AMX_TILE;
            const int64_t have = left < 0 ? 0 : left < AMX_TILE ? left : AMX_TILE;
            const int64_t r = have ? r0 + t * AMX_TILE : 0;
            amx_pack_a(a + t * j.a_pitch, c->a + r * c->lda + k0, c->lda, DT_F32, have, c->k - k0,
                       j.steps, AMX_PARTS);
        }
        amx_block(&j);
    }
    _tile_release();
    return j.c;
}

/* Row r, columns of tile column t. */
static const float *sum_at(const product_ctx *c, const float *sum, int64_t r, int64_t t)
{
    const int64_t columns = (c->cols + 15) / AMX_TILE;
    return sum + (r / AMX_TILE * columns + t) * 256 + r % AMX_TILE * 16;
}

/* ---- matmul ---- */

static void matmul_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t r0 = item * ROWS, rows = c->m - r0 < ROWS ? c->m - r0 : ROWS;
    const float *sum = product_rows(c, r0, rows, worker);
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t t = 0; t * AMX_TILE < c->cols; t++) {
            const int64_t n = c->cols - t * AMX_TILE;
            vf_store_n(c->y + (r0 + r) * c->ldy + t * AMX_TILE, vf_load(sum_at(c, sum, r, t)),
                       n < AMX_TILE ? n : AMX_TILE);
        }
    }
}

err_code matmul_amx(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const int64_t n = y->shape[1], k = a->shape[1];
    product_ctx c = {.d = d,
                     .a = a->data,
                     .m = a->shape[0],
                     .k = k,
                     .lda = a->stride[0],
                     .ldb = b->stride[0],
                     .steps = (k + AMX_STEP - 1) / AMX_STEP,
                     .twice_from = INT64_MAX,
                     .ldy = y->stride[0]};
    void *p;
    TRY(dev_scratch(d, &p, (size_t)(amx_up(n < COLS ? n : COLS, AMX_TILE) * c.steps * 128),
                    "op_matmul", e));
    c.pb = p;
    for (int64_t c0 = 0; c0 < n; c0 += COLS) {
        c.cols = n - c0 < COLS ? n - c0 : COLS;
        c.b = (const float *)b->data + c0;
        c.y = (float *)y->data + c0;
        pool_run(d->workers, pack_b_item, &c, (c.cols + 15) / AMX_TILE);
        pool_run(d->workers, matmul_item, &c, (c.m + ROWS - 1) / ROWS);
    }
    return OK;
}

/* ---- quad ---- */

/* out_i += (x_i H') . x_i over the packed columns; c->a and c->b begin at the diagonal block. */
static void quad_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t r0 = item * ROWS, rows = c->m - r0 < ROWS ? c->m - r0 : ROWS;
    const float *sum = product_rows(c, r0, rows, worker);
    for (int64_t r = 0; r < rows; r++) {
        const float *x = c->a + (r0 + r) * c->lda;
        double dot = 0;
        for (int64_t i = 0; i < c->cols; i++)
            dot += (double)sum_at(c, sum, r, i / AMX_TILE)[i % AMX_TILE] * x[i];
        c->out[r0 + r] += dot;
    }
}

err_code quad_amx(device *d, tensor *out, const tensor *x, const tensor *h, err *e)
{
    const int64_t m = x->shape[0], k = x->shape[1];
    product_ctx c = {.d = d, .m = m, .lda = x->stride[0], .ldb = h->stride[0], .out = out->data};
    void *p;
    TRY(dev_scratch(d, &p, (size_t)(COLS * amx_up(k, AMX_STEP) * 2 * AMX_PARTS), "op_quad", e));
    c.pb = p;
    for (int64_t i = 0; i < m; i++) c.out[i] = 0;
    for (int64_t c0 = 0; c0 < k;
         c0 += COLS) { /* h is symmetric: what lies left of the block came before */
        c.cols = k - c0 < COLS ? k - c0 : COLS;
        c.k = k - c0;
        c.steps = (c.k + AMX_STEP - 1) / AMX_STEP;
        c.twice_from = COLS;
        c.a = (const float *)x->data + c0;
        c.b = (const float *)h->data + c0 * c.ldb + c0;
        pool_run(d->workers, pack_b_item, &c, (c.cols + 15) / AMX_TILE);
        pool_run(d->workers, quad_item, &c, (m + ROWS - 1) / ROWS);
    }
    return OK;
}

/* ---- gram, cross ---- */

/* One tile column of x as the B panel and, where there is room for it, the A panel: an A tile is
 * the B tile with its pairs transposed. */
static void pack_x_item(void *ctx, int64_t column, int worker)
{
    const product_ctx *c = ctx;
    const int64_t c0 = column * AMX_TILE, left = c->cols - c0,
                  cols = left < AMX_TILE ? left : AMX_TILE;
    const int64_t at = column * c->steps * AMX_PARTS * AMX_BYTES;
    (void)worker;
    for (int64_t s = 0; s < c->steps; s++) {
        __m512i hi[16], lo[16];
        uint8_t *a = c->pa ? c->pa + at + s * AMX_PARTS * AMX_BYTES : NULL,
                *b = c->pb ? c->pb + at + s * AMX_PARTS * AMX_BYTES : NULL;
        amx_pack_b_cols(hi, lo, c->b + s * AMX_STEP * c->ldb + c0, c->ldb, cols,
                        c->k - s * AMX_STEP, 1.0f);
        if (b) {
            amx_store_rows(b, hi);
            amx_store_rows(b + AMX_BYTES, lo);
        }
        if (a) {
            amx_transpose(hi);
            amx_transpose(lo);
            amx_store_rows(a, hi);
            amx_store_rows(a + AMX_BYTES, lo);
        }
    }
}

/* y's square i, j of SIDE_G += the columns of A's panel there by those of B's. */
static void add_square(const product_ctx *c, int64_t i, int64_t j0, int worker)
{
    const int64_t pitch = c->steps * AMX_PARTS * AMX_BYTES, tiles = SIDE_G / AMX_TILE;
    const int64_t rows = c->m - i * SIDE_G < SIDE_G ? c->m - i * SIDE_G : SIDE_G;
    const int64_t cols = c->n - j0 * SIDE_G < SIDE_G ? c->n - j0 * SIDE_G : SIDE_G;
    amx_job j = {.c = dev_worker(c->d, worker),
                 .rows = amx_up(rows, 64) / AMX_TILE,
                 .columns = (cols + 15) / AMX_TILE,
                 .a_pitch = pitch,
                 .b_pitch = pitch,
                 .a_parts = AMX_PARTS};
    amx_begin();
    for (int64_t s = 0; s < c->steps; s += BLOCK_STEPS) {
        j.steps = c->steps - s < BLOCK_STEPS ? c->steps - s : BLOCK_STEPS;
        j.a = c->pa + i * tiles * pitch + s * AMX_PARTS * AMX_BYTES;
        j.b = c->pb + j0 * tiles * pitch + s * AMX_PARTS * AMX_BYTES;
        j.first = s == 0;
        amx_block(&j);
    }
    _tile_release();
    for (int64_t r = 0; r < rows; r++) {
        for (int64_t t = 0; t < j.columns; t++) {
            float *h = c->y + (i * SIDE_G + r) * c->ldy + j0 * SIDE_G + t * AMX_TILE;
            const int64_t n = cols - t * AMX_TILE < AMX_TILE ? cols - t * AMX_TILE : AMX_TILE;
            const float *sum = j.c + (r / AMX_TILE * j.columns + t) * 256 + r % AMX_TILE * 16;
            vf_store_n(h, vf_add(vf_load_n(h, n), vf_load(sum)), n);
        }
    }
}

/* Squares of the lower triangle, row by row of squares. */
static void gram_item(void *ctx, int64_t item, int worker)
{
    int64_t i = 0;
    while ((i + 1) * (i + 2) / 2 <= item) i++;
    add_square(ctx, i, item - i * (i + 1) / 2, worker);
}

/* Squares in strips of four columns, so that what the last ones read is still near. */
static void cross_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t down = (c->m + SIDE_G - 1) / SIDE_G, strip = item / (4 * down) * 4,
                  across = (c->n + SIDE_G - 1) / SIDE_G - strip, wide = across < 4 ? across : 4,
                  in = item - strip * down;
    add_square(c, in / wide, strip + in % wide, worker);
}

/* Both panels, with room for whole squares: their last one may reach beyond k. */
static size_t gram_scratch(int64_t m, int64_t k)
{
    const int64_t rows = m < ROWS_G ? m : ROWS_G;
    return (size_t)(2 * amx_up(k, 64) * amx_up(rows, AMX_STEP) * 2 * AMX_PARTS);
}

err_code gram_amx(device *d, tensor *h, const tensor *x, err *e)
{
    const int64_t m = x->shape[0], k = x->shape[1], side = (k + SIDE_G - 1) / SIDE_G;
    product_ctx c = {
        .d = d, .m = k, .n = k, .cols = k, .ldb = x->stride[0], .y = h->data, .ldy = h->stride[0]};
    void *p;
    TRY(dev_scratch(d, &p, gram_scratch(m, k), "op_gram", e));
    for (int64_t r = 0; r < m; r += ROWS_G) {
        c.k = m - r < ROWS_G ? m - r : ROWS_G;
        c.steps = (c.k + AMX_STEP - 1) / AMX_STEP;
        c.b = (const float *)x->data + r * x->stride[0];
        c.pa = p;
        c.pb = c.pa + amx_up(k, 64) * c.steps * 128;
        pool_run(d->workers, pack_x_item, &c, (k + 15) / AMX_TILE);
        pool_run(d->workers, gram_item, &c, side * (side + 1) / 2);
    }
    return OK;
}

err_code product_cross_amx(device *d, tensor *y, const tensor *a, const tensor *b, err *e)
{
    const int64_t rows = a->shape[0], m = a->shape[1], n = b->shape[1];
    product_ctx c = {.d = d, .m = m, .n = n, .y = y->data, .ldy = y->stride[0]};
    void *p;
    TRY(dev_scratch(d, &p, gram_scratch(rows, m > n ? m : n), "op_cross", e));
    for (int64_t r = 0; r < rows; r += ROWS_G) {
        c.k = rows - r < ROWS_G ? rows - r : ROWS_G;
        c.steps = (c.k + AMX_STEP - 1) / AMX_STEP;
        product_ctx side = c;
        side.cols = m;
        side.ldb = a->stride[0];
        side.b = (const float *)a->data + r * side.ldb;
        side.pa = c.pa = p;
        pool_run(d->workers, pack_x_item, &side, (m + 15) / AMX_TILE);
        side.cols = n;
        side.ldb = b->stride[0];
        side.b = (const float *)b->data + r * side.ldb;
        side.pa = NULL;
        side.pb = c.pb = c.pa + amx_up(m, 64) * c.steps * 128;
        pool_run(d->workers, pack_x_item, &side, (n + 15) / AMX_TILE);
        pool_run(d->workers, cross_item, &c,
                 (m + SIDE_G - 1) / SIDE_G * ((n + SIDE_G - 1) / SIDE_G));
    }
    return OK;
}

size_t product_amx_scratch(const op_limits *l)
{
    const size_t gram = gram_scratch(l->rows, l->k);
    const size_t quad = (size_t)(COLS * amx_up(l->k, AMX_STEP) * 2 * AMX_PARTS);
    return gram > quad ? gram : quad;
}
