/* y (+)= x w^T + bias in f32, for weights of f16, bf16 or f32 read where they are mapped.
 * One definition of the sum for any m: blocks of BLOCK_K inputs; in a block lane l adds the
 * products of inputs l, l + VL, ... by fma, the lanes are added as vf_sum does, the blocks one
 * after another. So a row has the same bytes alone (decode) as among others (prefill), and on any
 * thread. Lanes run along k because both operands lie that way: nothing is transposed or repacked.
 * A tile of VL / 2 weight rows by two of x has VL sums, enough to hide the latency of fma, and ends
 * in one vf_sum_each. */
#include "kernels/cpu_gemm.h"

#include "kernels/cpu_ops.h"
#include "kernels/vec.h"

#define TILE_N (VL / 2)
/* Bytes ahead in each row of 16-bit weights: the rows of a tile are more streams than the hardware
 * follows. A head of 92544 by 2048 on one row: 27 to 30.5 GB/s where a plain read gets 33. */
#define FETCH   512
#define BLOCK_K 512 /* a panel of 8 rows: 16 KB, half of the smallest L1 */
#define STRIP_N 128 /* weight rows of one work item */
#define STRIP_M GEMM_ROWS
/* Up to here weights are converted where they are used, beyond once for all rows. */
#define RAW_M 4

#define ALWAYS_INLINE static inline __attribute__((always_inline))

/* out[j * TILE_N + i] = sum over k of w[i][k] x[j][k]; rows of x: 1 or 2 (out of the second
 * undefined). */
ALWAYS_INLINE void tile(float *out, const void *w, int64_t ldw, dtype dt, const float *x,
                        int64_t ldx, int64_t k, const bool two)
{
    vf acc[VL];
    const size_t pitch = (size_t)ldw * (dt == DT_F32 ? 4 : 2);
    int64_t c = 0;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) acc[i] = vf_zero();
    for (; c + VL <= k; c += VL) {
        const vf x0 = vf_load(x + c), x1 = two ? vf_load(x + ldx + c) : x0;
        if (dt != DT_F32 && c % 32 == 0) { /* once a cache line of 16-bit weights */
#pragma GCC unroll 8
            for (int i = 0; i < TILE_N; i++)
                __builtin_prefetch((const char *)w + (size_t)i * pitch + (size_t)c * 2 + FETCH);
        }
#pragma GCC unroll 8
        for (int i = 0; i < TILE_N; i++) {
            const vf wi = vf_pin(vf_any((const char *)w + (size_t)i * pitch, dt, c));
            acc[i] = vf_fma(wi, x0, acc[i]);
            if (two) acc[TILE_N + i] = vf_fma(wi, x1, acc[TILE_N + i]);
        }
    }
    if (c < k) {
        const int64_t n = k - c;
        const vf x0 = vf_load_n(x + c, n), x1 = two ? vf_load_n(x + ldx + c, n) : x0;
#pragma GCC unroll 8
        for (int i = 0; i < TILE_N; i++) {
            const vf wi = vf_any_n((const char *)w + (size_t)i * pitch, dt, c, n);
            acc[i] = vf_fma(wi, x0, acc[i]);
            if (two) acc[TILE_N + i] = vf_fma(wi, x1, acc[TILE_N + i]);
        }
    }
    vf_store(out, vf_sum_each(acc));
}

typedef void (*tile_fn)(float *, const void *, int64_t, const float *, int64_t, int64_t);
#define TILE_FN(name, dt, two)                                                            \
    static void name(float *out, const void *w, int64_t ldw, const float *x, int64_t ldx, \
                     int64_t k)                                                           \
    {                                                                                     \
        tile(out, w, ldw, dt, x, ldx, k, two);                                            \
    }
TILE_FN(tile_f32_1, DT_F32, false)
TILE_FN(tile_f32_2, DT_F32, true)
TILE_FN(tile_f16_1, DT_F16, false)
TILE_FN(tile_f16_2, DT_F16, true)
TILE_FN(tile_bf16_1, DT_BF16, false)
TILE_FN(tile_bf16_2, DT_BF16, true)

static tile_fn tile_for(dtype dt, bool two)
{
    if (dt == DT_F16) return two ? tile_f16_2 : tile_f16_1;
    if (dt == DT_BF16) return two ? tile_bf16_2 : tile_bf16_1;
    return two ? tile_f32_2 : tile_f32_1;
}

/* Adds a tile's sums to y; the first block of k finds there what the sum begins with. */
static void put(const gemm_job *j, int64_t row, int64_t n0, int64_t n, const float *sum, bool first)
{
    float *y = j->y + row * j->ldy + n0;
    const size_t unit = first && j->bias ? dtype_bytes(j->bias_dt) : 0;
    vf base = first && !j->add ? vf_zero() : vf_load_n(y, n);
    if (unit)
        base = vf_add(base, vf_any_n((const char *)j->bias + (size_t)n0 * unit, j->bias_dt, 0, n));
    vf_store_n(y, vf_add(base, vf_load_n(sum, n)), n);
}

/* Rows [n0, n0+n) of w, inputs [k0, k0+k), as f32 in panel [TILE_N][BLOCK_K]; missing rows are
 * zero. */
static void fill_panel(float *panel, const gemm_job *j, int64_t n0, int64_t n, int64_t k0,
                       int64_t k)
{
    const size_t unit = dtype_bytes(j->w_dt);
    for (int64_t r = 0; r < TILE_N; r++) {
        float *dst = panel + r * BLOCK_K;
        const char *src = (const char *)j->w + (size_t)((n0 + r) * j->ldw + k0) * unit;
        int64_t c = 0;
        if (r >= n) {
            memset(dst, 0, (size_t)k * sizeof *dst);
            continue;
        }
        for (; c + VL <= k; c += VL) vf_store(dst + c, vf_any(src, j->w_dt, c));
        if (c < k) vf_store_n(dst + c, vf_any_n(src, j->w_dt, c, k - c), k - c);
    }
}

/* One tile of weight rows, one block of k, all rows of x of the item (x at row m0, input k0). */
static void panel_rows(const gemm_job *j, int64_t n0, int64_t n, int64_t k0, int64_t k, int64_t m0,
                       int64_t m1, const float *x, int64_t ldx, float *panel)
{
    float sum[VL];
    const bool raw = m1 - m0 <= RAW_M && n == TILE_N;
    const void *w = panel;
    if (raw)
        w = (const char *)j->w + (size_t)(n0 * j->ldw + k0) * dtype_bytes(j->w_dt);
    else
        fill_panel(panel, j, n0, n, k0, k);
    const int64_t ldw = raw ? j->ldw : BLOCK_K;
    const dtype dt = raw ? j->w_dt : DT_F32;
    const tile_fn two = tile_for(dt, true), one = tile_for(dt, false);
    int64_t r = m0;
    for (; r + 2 <= m1; r += 2, x += 2 * ldx) {
        two(sum, w, ldw, x, ldx, k);
        put(j, r, n0, n, sum, k0 == 0);
        put(j, r + 1, n0, n, sum + TILE_N, k0 == 0);
    }
    if (r < m1) {
        one(sum, w, ldw, x, ldx, k);
        put(j, r, n0, n, sum, k0 == 0);
    }
}

/* Rows of a block of k that lie far apart are put together once for a strip: each would begin a
 * page and a stream of its own. */
static const float *gather_x(const gemm_job *j, int64_t k0, int64_t k, int64_t m0, int64_t m1,
                             int64_t *ldx, float *dst)
{
    const float *x = j->x + m0 * j->ldx + k0;
    *ldx = j->ldx;
    if (m1 - m0 <= RAW_M || j->ldx <= BLOCK_K) return x;
    for (int64_t r = 0; r < m1 - m0; r++)
        memcpy(dst + r * BLOCK_K, x + r * j->ldx, (size_t)k * sizeof *dst);
    *ldx = BLOCK_K;
    return dst;
}

void CPU_FN(gemm_block)(const gemm_job *j, int64_t n0, int64_t n1, int64_t m0, int64_t m1,
                        void *scratch)
{
    /* Few rows: one pass over each weight row, as memory likes it. Many: x stays in L2. */
    const int64_t outer_n = m1 - m0 <= RAW_M ? TILE_N : n1 - n0;
    float *panel = scratch, *gathered = panel + TILE_N * BLOCK_K;
    int64_t ldx;
    for (int64_t s = n0; s < n1; s += outer_n) {
        const int64_t end = s + outer_n < n1 ? s + outer_n : n1;
        for (int64_t k0 = 0; k0 < j->k; k0 += BLOCK_K) {
            const int64_t k = j->k - k0 < BLOCK_K ? j->k - k0 : BLOCK_K;
            const float *x = gather_x(j, k0, k, m0, m1, &ldx, gathered);
            for (int64_t r = s; r < end; r += TILE_N) {
                const int64_t n = end - r < TILE_N ? end - r : TILE_N;
                panel_rows(j, r, n, k0, k, m0, m1, x, ldx, panel);
            }
        }
    }
}

typedef struct {
    gemm_job job;
    device *d;
    int64_t strips_n;
} gemm_ctx;

static void gemm_item(void *ctx, int64_t item, int worker)
{
    const gemm_ctx *c = ctx;
    const gemm_job *j = &c->job;
    const int64_t n0 = item % c->strips_n * STRIP_N, m0 = item / c->strips_n * STRIP_M;
    const int64_t n1 = n0 + STRIP_N < j->n ? n0 + STRIP_N : j->n;
    const int64_t m1 = m0 + STRIP_M < j->m ? m0 + STRIP_M : j->m;
    CPU_FN(gemm_block)(j, n0, n1, m0, m1, dev_worker(c->d, worker));
}

err_code CPU_FN(gemm_cpu)(device *d, tensor *y, const tensor *x, const tensor *w,
                          const tensor *bias, bool add, err *e)
{
    (void)e;
    gemm_ctx c = {{y->data, x->data, w->data, bias ? bias->data : NULL, y->shape[0], y->shape[1],
                   x->shape[1], y->stride[0], x->stride[0], w->stride[0], w->dt,
                   bias ? bias->dt : DT_NONE, add},
                  d,
                  0};
    c.strips_n = (c.job.n + STRIP_N - 1) / STRIP_N;
    pool_run(d->workers, gemm_item, &c, c.strips_n * ((c.job.m + STRIP_M - 1) / STRIP_M));
    return OK;
}
