/* y (+)= alpha a b in f32 throughout, as a BLAS does it: rows of a are put together, b in panels of
 * two vectors, and a tile of MR rows by one panel stays in registers over a block of BLOCK_K
 * inputs. An element's inputs add up in their order, block after block, wherever its tile lies. */
#include "kernels/cpu_ops.h"
#include "kernels/vec.h"

#if VL == 16
#define MR 14 /* 28 sums, two vectors of b; factors of a come from memory */
#else
#define MR 6
#endif
#define NR      (2 * VL)
#define BLOCK_K 256            /* a panel of b: 32 KB */
#define PITCH   (BLOCK_K + 16) /* of rows of a: they would share a few lines of the first cache */
#define ITEM_M  (16 * MR)      /* half where that leaves few items */
#define ITEM_N  512
#define ITEM_P  (ITEM_N / NR)

typedef struct {
    device *d;
    float *y;
    const float *a, *b;
    int64_t m, n, k, ldy, lda, ldb, strip_m, strips_m;
    float alpha;
    bool add;
} product_ctx;

_Static_assert(sizeof(float) * (ITEM_M * PITCH + ITEM_N * BLOCK_K) <= DEV_WORKER_BYTES, "scratch");

/* Rows and columns of one tile that count; the rest of both sides is zero. */
static inline void tile(float *y, int64_t ldy, const float *a, const float *b, int64_t k,
                        int64_t rows, int64_t cols, float alpha, bool add)
{
    vf sum[MR][2];
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++) sum[i][0] = sum[i][1] = vf_zero();
    for (int64_t c = 0; c < k; c++, b += NR) {
        const vf b0 = vf_load(b), b1 = vf_load(b + VL);
#pragma GCC unroll 14
        for (int i = 0; i < MR; i++) {
            const vf f = vf_set(a[i * PITCH + c]);
            sum[i][0] = vf_fma(f, b0, sum[i][0]);
            sum[i][1] = vf_fma(f, b1, sum[i][1]);
        }
    }
    const vf by = vf_set(alpha);
    const int64_t n0 = cols < VL ? cols : VL, n1 = cols - n0;
#pragma GCC unroll 14
    for (int i = 0; i < MR; i++) {
        if (i >= rows) break;
        float *to = y + i * ldy;
        vf_store_n(to, vf_fma(by, sum[i][0], add ? vf_load_n(to, n0) : vf_zero()), n0);
        if (n1)
            vf_store_n(to + VL, vf_fma(by, sum[i][1], add ? vf_load_n(to + VL, n1) : vf_zero()),
                       n1);
    }
}

/* Rows of a, each PITCH behind the other, up to a multiple of MR. */
static void pack_rows(float *dst, const product_ctx *c, int64_t r0, int64_t rows, int64_t k0,
                      int64_t k)
{
    int64_t r = 0;
    for (; r < rows; r++)
        memcpy(dst + r * PITCH, c->a + (r0 + r) * c->lda + k0, (size_t)k * sizeof *dst);
    for (; r % MR; r++) memset(dst + r * PITCH, 0, (size_t)k * sizeof *dst);
}

static void pack_panels(float *dst, const product_ctx *c, int64_t c0, int64_t cols, int64_t k0,
                        int64_t k)
{
    for (int64_t p = 0; p * NR < cols; p++, dst += NR * BLOCK_K) {
        const int64_t left = cols - p * NR, n0 = left < VL ? left : VL,
                      n1 = left - n0 < VL ? left - n0 : VL;
        const float *from = c->b + k0 * c->ldb + c0 + p * NR;
        for (int64_t i = 0; i < k; i++, from += c->ldb) {
            vf_store(dst + i * NR, vf_load_n(from, n0));
            vf_store(dst + i * NR + VL, n1 ? vf_load_n(from + VL, n1) : vf_zero());
        }
    }
}

static void product_item(void *ctx, int64_t item, int worker)
{
    const product_ctx *c = ctx;
    const int64_t r0 = item % c->strips_m * c->strip_m, c0 = item / c->strips_m * ITEM_N,
                  rows = c->m - r0 < c->strip_m ? c->m - r0 : c->strip_m,
                  cols = c->n - c0 < ITEM_N ? c->n - c0 : ITEM_N;
    float *a = dev_worker(c->d, worker), *b = a + ITEM_M * PITCH;
    for (int64_t k0 = 0; k0 < c->k; k0 += BLOCK_K) {
        const int64_t k = c->k - k0 < BLOCK_K ? c->k - k0 : BLOCK_K;
        pack_rows(a, c, r0, rows, k0, k);
        pack_panels(b, c, c0, cols, k0, k);
        for (int64_t p = 0; p * NR < cols; p++)
            for (int64_t r = 0; r < rows; r += MR)
                tile(c->y + (r0 + r) * c->ldy + c0 + p * NR, c->ldy, a + r * PITCH,
                     b + p * NR * BLOCK_K, k, rows - r < MR ? rows - r : MR,
                     cols - p * NR < NR ? cols - p * NR : NR, c->alpha, c->add || k0);
    }
}

err_code CPU_FN(product_f32)(device *d, tensor *y, float alpha, const tensor *a, const tensor *b,
                             bool add, err *e)
{
    (void)e;
    product_ctx c = {.d = d,
                     .y = y->data,
                     .a = a->data,
                     .b = b->data,
                     .m = y->shape[0],
                     .n = y->shape[1],
                     .k = a->shape[1],
                     .ldy = y->stride[0],
                     .lda = a->stride[0],
                     .ldb = b->stride[0],
                     .alpha = alpha,
                     .add = add};
    const int64_t strips_n = (c.n + ITEM_N - 1) / ITEM_N;
    c.strip_m = c.m * strips_n < 8 * ITEM_M * d->threads ? ITEM_M / 2 : ITEM_M;
    c.strips_m = (c.m + c.strip_m - 1) / c.strip_m;
    pool_run(d->workers, product_item, &c, c.strips_m * strips_n);
    return OK;
}
