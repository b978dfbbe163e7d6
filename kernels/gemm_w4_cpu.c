/* op_gemm_w4 on the CPU: quantize the rows once, then let the pool walk the weights. */
#include "kernels/gemm_w4.h"

#include <assert.h>

#include "base/half.h"

#if defined(__x86_64__)

/* Tiles of the smallest pool item; even, so that both streams of a kernel are fed. */
enum { ITEM_TILES = 4 };
/* Below this many rows a second pool run costs more than it saves. */
enum { QUANTIZE_ALONE = 4 };

static const w4_kernels *kernels_for(const device *d)
{
    if (d->cpu_flags & CPU_AMX) return &w4_kernels_amx;
    if (d->cpu_flags & CPU_AVX512VNNI) return &w4_kernels_avx512;
    if (d->cpu_flags & CPU_AVXVNNI) return &w4_kernels_avxvnni;
    assert(d->cpu_flags & CPU_AVX2);
    return &w4_kernels_avx2;
}

/* What the op takes of the shared scratch for m rows, in this order. */
typedef struct {
    size_t x, param, bias, all;
} scratch_plan;

static scratch_plan scratch_of(int64_t m, int64_t k, int64_t groups, int64_t n)
{
    const size_t rows = ((size_t)m + W4_AMX_ROWS - 1) / W4_AMX_ROWS * W4_AMX_ROWS;
    const size_t lanes = ((size_t)n + W4_TILE_N - 1) / W4_TILE_N * W4_TILE_N;
    scratch_plan p = {.x = 0};
    p.param = rows * 2 * (size_t)k;
    p.bias = dev_align64(p.param + rows * 2 * (size_t)groups * sizeof(float));
    p.all = dev_align64(p.bias + lanes * sizeof(float));
    return p;
}

size_t gemm_w4_cpu_scratch(const op_limits *l)
{
    return scratch_of(l->rows, l->k, (l->k + 31) / 32, l->n).all;
}

typedef struct {
    const w4_call *call;
    const w4_kernels *kernels;
    int threads;
} job_ctx;

/* Item i is the i-th block of rows. All blocks but the last ones are equally long. */
static void quantize_item(void *ctx, int64_t item, int worker)
{
    const job_ctx *j = ctx;
    int64_t row = 0;
    (void)worker;
    for (int64_t i = 0; i < item; i++) row += j->kernels->block_rows(j->call, row);
    j->kernels->quantize(j->call, row, j->kernels->block_rows(j->call, row));
}

/* Items shrink: each takes its thread's half share of what is left. The first ones are long runs of
 * memory, which is what the fetch ahead wants; the last ones are short, so that threads end
 * together. */
static int64_t item_tiles(int64_t left, int threads)
{
    const int64_t share = left / (2 * threads) / ITEM_TILES * ITEM_TILES;
    const int64_t tiles = share < ITEM_TILES ? ITEM_TILES : share;
    return tiles < left ? tiles : left;
}

static void compute_item(void *ctx, int64_t item, int worker)
{
    const job_ctx *j = ctx;
    int64_t tile = 0, tiles = item_tiles(j->call->w.tiles, j->threads);
    for (int64_t i = 0; i < item; i++) {
        tile += tiles;
        tiles = item_tiles(j->call->w.tiles - tile, j->threads);
    }
    j->kernels->compute(j->call, tile, tiles, worker);
}

static const float *bias_f32(const tensor *bias, float *scratch)
{
    if (!bias->data) return NULL;
    if (bias->dt == DT_F32 && bias->stride[0] == 1) return bias->data;
    tensor dst = tensor_1d(scratch, DT_F32, bias->shape[0]);
    tensor_convert(&dst, bias);
    return scratch;
}

err_code gemm_w4_cpu(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e)
{
    w4_call c = {.w = w4_tiles_of(w), .m = x->shape[0], .add = add, .d = d};
    const scratch_plan plan = scratch_of(c.m, c.w.k, c.w.groups, c.w.n);
    job_ctx j = {&c, kernels_for(d), d->threads};
    void *scratch;
    TRY(dev_scratch(d, &scratch, plan.all, "op_gemm_w4", e));
    c.in = x->data;
    c.in_stride = x->stride[0];
    c.y = y->data;
    c.y_stride = y->stride[0];
    c.x = scratch;
    c.param = (float *)(void *)(c.x + plan.param);
    c.bias = bias_f32(&w->bias, (float *)(void *)(c.x + plan.bias));
    int64_t blocks = 0, items = 0;
    for (int64_t row = 0; row < c.m; row += j.kernels->block_rows(&c, row)) blocks++;
    pool_run(c.m < QUANTIZE_ALONE ? NULL : d->workers, quantize_item, &j, blocks);
    for (int64_t tile = 0; tile < c.w.tiles; items++)
        tile += item_tiles(c.w.tiles - tile, d->threads);
    pool_run(d->workers, compute_item, &j, items);
    return OK;
}

#else

size_t gemm_w4_cpu_scratch(const op_limits *l)
{
    (void)l;
    return 0;
}

#endif
