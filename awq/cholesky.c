/* Blocked Cholesky factors. In the comments matrices are LAPACK's: column-major, A = U^T U with U
 * the upper triangle, which is our row-major lower one. */
#include "awq/cholesky.h"

#include "awq/lapack.h"

#define BLOCK 256 /* of the diagonal, and columns of an item */
#define THIN  64  /* columns of an item where BLOCK would leave too few of them */

typedef struct {
    float *a;
    int64_t n, at, width; /* the block of the diagonal */
} factors;

static const float one = 1.f, minus = -1.f;

static float *entry(const factors *f, int64_t row, int64_t column)
{
    return f->a + column * f->n + row;
}

static int least(int64_t a, int64_t b) { return (int)(a < b ? a : b); }

static int64_t items(int64_t n, int64_t size) { return (n + size - 1) / size; }

/* Columns behind the block: its rows of U. */
static void panel_item(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t c = f->at + f->width + item * BLOCK;
    const int n = (int)f->n, nb = (int)f->width, w = least(BLOCK, f->n - c);
    (void)worker;
    strsm_("L", "U", "T", "N", &nb, &w, &one, entry(f, f->at, f->at), &n, entry(f, f->at, c), &n);
}

/* The same columns, less what the block explains of them. */
static void trailing_item(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t next = f->at + f->width, c = next + item * BLOCK;
    const int n = (int)f->n, nb = (int)f->width, w = least(BLOCK, f->n - c),
              m = (int)(c + w - next);
    (void)worker;
    sgemm_("T", "N", &m, &w, &nb, &minus, entry(f, f->at, next), &n, entry(f, f->at, c), &n, &one,
           entry(f, next, c), &n);
}

bool cholesky_factor(pool *p, float *a, int64_t n)
{
    factors f = {.a = a, .n = n};
    const int ld = (int)n;
    openblas_set_num_threads(1); /* more would change the order of its sums */
    for (; f.at < n; f.at += f.width) {
        f.width = least(BLOCK, n - f.at);
        const int nb = (int)f.width;
        const int64_t behind = items(n - f.at - f.width, BLOCK);
        int info;
        spotrf_("U", &nb, entry(&f, f.at, f.at), &ld, &info);
        if (info != 0) return false;
        pool_run(p, panel_item, &f, behind);
        pool_run(p, trailing_item, &f, behind);
    }
    return true;
}

/* U^-1 above the block is -(U^-1 so far) U above (U of the block)^-1: columns, then rows. */
static void above_columns(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t c = f->at + item * THIN;
    const int n = (int)f->n, m = (int)f->at, w = least(THIN, f->at + f->width - c);
    (void)worker;
    strmm_("L", "U", "N", "N", &m, &w, &one, f->a, &n, entry(f, 0, c), &n);
}

static void above_rows(void *ctx, int64_t item, int worker)
{
    const factors *f = ctx;
    const int64_t r = item * BLOCK;
    const int n = (int)f->n, m = least(BLOCK, f->at - r), nb = (int)f->width;
    (void)worker;
    strsm_("R", "U", "N", "N", &m, &nb, &minus, entry(f, f->at, f->at), &n, entry(f, r, f->at), &n);
}

bool cholesky_invert(pool *p, float *l, int64_t n)
{
    factors f = {.a = l, .n = n};
    const int ld = (int)n;
    openblas_set_num_threads(1);
    for (; f.at < n; f.at += f.width) {
        f.width = least(BLOCK, n - f.at);
        const int nb = (int)f.width;
        int info;
        if (f.at) {
            pool_run(p, above_columns, &f, items(f.width, THIN));
            pool_run(p, above_rows, &f, items(f.at, BLOCK));
        }
        strtri_("U", "N", &nb, entry(&f, f.at, f.at), &ld, &info);
        if (info != 0) return false;
    }
    return true;
}

/* Our rows are LAPACK's right-hand sides. */
void cholesky_solve(const float *l, int64_t n, float *x, int64_t rows)
{
    const int width = (int)n, count = (int)rows;
    int info;
    spotrs_("U", &width, &count, l, &width, x, &width, &info);
}
