/* Blocked Cholesky factors: their bulk are f32 products of the device; triangles of BLOCK alone are
 * LAPACK's, whose matrices are column-major: its upper triangle is our row-major lower one. */
#include "awq/cholesky.h"

#include <string.h>

#include "awq/lapack.h"
#include "base/mem.h"

#define BLOCK 256  /* of the diagonal: inputs of a product */
#define STRIP 1024 /* rows of a product behind the diagonal */
#define ITEM  32   /* rows or columns of a pool item */

typedef struct {
    float *a;
    int64_t n, at, width; /* the block of the diagonal */
    float *x;             /* rows to solve */
    const char *trans;
} factors;

static const float one = 1.f, minus = -1.f;

static float *entry(const factors *f, int64_t row, int64_t column)
{
    return f->a + row * f->n + column;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t items(int64_t n) { return (n + ITEM - 1) / ITEM; }

static tensor part(float *at, int64_t rows, int64_t columns, int64_t pitch)
{
    tensor t = tensor_2d(at, DT_F32, rows, columns);
    t.stride[0] = pitch;
    return t;
}

static tensor square_part(const factors *f, int64_t row, int64_t rows, int64_t column,
                          int64_t columns)
{
    return part(entry(f, row, column), rows, columns, f->n);
}

/* ---- factor ---- */

/* Rows behind the block: their part of L, and its mirror image above the diagonal. */
static void panel_item(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t r = f->at + f->width + item * ITEM, rows = least(ITEM, f->n - r);
    const int n = (int)f->n, nb = (int)f->width, m = (int)rows;
    (void)worker;
    strsm_("L", "U", "T", "N", &nb, &m, &one, entry(f, f->at, f->at), &n, entry(f, r, f->at), &n);
    for (int64_t c = f->at; c < f->at + f->width; c++)
        for (int64_t i = r; i < r + rows; i++) *entry(f, c, i) = *entry(f, i, c);
}

/* What lies behind, less what the block explains of it. */
static err_code trailing(device *d, const factors *f, err *e)
{
    const int64_t next = f->at + f->width;
    for (int64_t r = next; r < f->n; r += STRIP) {
        const int64_t rows = least(STRIP, f->n - r), columns = r + rows - next;
        const tensor l = square_part(f, r, rows, f->at, f->width),
                     mirror = square_part(f, f->at, f->width, next, columns);
        tensor y = square_part(f, r, rows, next, columns);
        TRY(op_product(d, &y, -1.f, &l, &mirror, true, e));
    }
    return OK;
}

err_code cholesky_factor(device *d, float *a, int64_t n, bool *positive, err *e)
{
    factors f = {.a = a, .n = n};
    const int ld = (int)n;
    openblas_set_num_threads(1); /* more would change the order of its sums */
    *positive = true;
    for (; f.at < n; f.at += f.width) {
        f.width = least(BLOCK, n - f.at);
        const int nb = (int)f.width;
        int info;
        spotrf_("U", &nb, entry(&f, f.at, f.at), &ld, &info);
        *positive = info == 0;
        if (!*positive) return OK;
        for (int64_t i = f.at; i < f.at + f.width; i++)
            for (int64_t j = f.at; j < i; j++) *entry(&f, j, i) = *entry(&f, i, j);
        pool_run(dev_pool(d), panel_item, &f, items(n - f.at - f.width));
        TRY(trailing(d, &f, e));
    }
    return OK;
}

/* ---- inverse ---- */

/* With S, what rows of L before made of the block's columns on their left, there: -(L's block)^-1
 * S. */
static void left_item(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t c = item * ITEM;
    const int n = (int)f->n, nb = (int)f->width, w = (int)least(ITEM, f->at - c);
    (void)worker;
    strsm_("R", "U", "N", "N", &w, &nb, &minus, entry(f, f->at, f->at), &n, entry(f, f->at, c), &n);
}

/* The rows behind: their L by the rows of the inverse that are there now. panel: room for that
 * L. */
static err_code behind(device *d, const factors *f, float *panel, err *e)
{
    const int64_t next = f->at + f->width, rows = f->n - next;
    if (!rows) return OK;
    for (int64_t i = 0; i < rows; i++)
        memcpy(panel + i * f->width, entry(f, next + i, f->at), (size_t)f->width * sizeof *panel);
    const tensor l = part(panel, rows, f->width, f->width),
                 square = square_part(f, f->at, f->width, f->at, f->width),
                 left = square_part(f, f->at, f->width, 0, f->at);
    tensor under = square_part(f, next, rows, f->at, f->width),
           sums = square_part(f, next, rows, 0, f->at);
    TRY(op_product(d, &under, 1.f, &l, &square, false, e));
    return op_product(d, &sums, 1.f, &l, &left, true, e);
}

err_code cholesky_invert(device *d, float *a, int64_t n, bool *regular, err *e)
{
    factors f = {.a = a, .n = n};
    const int ld = (int)n;
    void *panel;
    err_code rc = OK;
    openblas_set_num_threads(1);
    TRY(mem_alloc(&panel, cholesky_bytes(n), 1, "inverse of a factor", e));
    *regular = true;
    for (; f.at < n && rc == OK; f.at += f.width) {
        f.width = least(BLOCK, n - f.at);
        const int nb = (int)f.width;
        int info;
        pool_run(dev_pool(d), left_item, &f, items(f.at));
        strtri_("U", "N", &nb, entry(&f, f.at, f.at), &ld, &info);
        *regular = info == 0;
        if (!*regular) break;
        for (int64_t i = f.at; i < f.at + f.width; i++)
            memset(entry(&f, i, i + 1), 0, (size_t)(f.at + f.width - i - 1) * sizeof *f.a);
        rc = behind(d, &f, panel, e);
    }
    mem_free(panel);
    return rc;
}

size_t cholesky_bytes(int64_t n) { return (size_t)n * BLOCK * sizeof(float); }

/* ---- solve ---- */

/* The block's columns of some rows: x L^-1 or, turned, x L^-T. Our rows are LAPACK's columns. */
static void solve_item(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int n = (int)f->n, nb = (int)f->width, rows = ITEM;
    (void)worker;
    strsm_("L", "U", f->trans, "N", &nb, &rows, &one, entry(f, f->at, f->at), &n,
           f->x + item * ITEM * f->n + f->at, &n);
}

static void solve_block(device *d, factors *f, int64_t rows)
{
    const int n = (int)f->n, nb = (int)f->width, last = (int)(rows % ITEM);
    pool_run(dev_pool(d), solve_item, f, rows / ITEM);
    if (last)
        strsm_("L", "U", f->trans, "N", &nb, &last, &one, entry(f, f->at, f->at), &n,
               f->x + (rows - last) * f->n + f->at, &n);
}

err_code cholesky_solve(device *d, const float *l, int64_t n, float *x, int64_t rows, err *e)
{
    factors f = {.a = (float *)(uintptr_t)l, .n = n, .x = x, .trans = "T"};
    openblas_set_num_threads(1);
    for (; f.at < n; f.at += f.width) { /* by L^T: what is known of x is on the left */
        f.width = least(BLOCK, n - f.at);
        const tensor known = part(x, rows, f.at, n), by = square_part(&f, 0, f.at, f.at, f.width);
        tensor y = part(x + f.at, rows, f.width, n);
        if (f.at) TRY(op_product(d, &y, -1.f, &known, &by, true, e));
        solve_block(d, &f, rows);
    }
    f.trans = "N";
    for (int64_t end = n; end > 0; end = f.at) { /* by L: on the right */
        f.at = (end - 1) / BLOCK * BLOCK;
        f.width = end - f.at;
        const tensor known = part(x + end, rows, n - end, n),
                     by = square_part(&f, end, n - end, f.at, f.width);
        tensor y = part(x + f.at, rows, f.width, n);
        if (end < n) TRY(op_product(d, &y, -1.f, &known, &by, true, e));
        solve_block(d, &f, rows);
    }
    return OK;
}
