/* y (+)= x w^T + bias on AMX tiles (amx.h). Weights are the A side, packed a block of k at a time
 * from where they are mapped; x is the B side, packed once for all strips, at most CHUNK_M rows at
 * a time. The order of sums is the same for any number of rows. Up to 16 of them, tiles of bf16
 * weights are loaded from where they lie, those of f16 split a step ahead. For few rows the f32
 * product is faster, and takes over but on a deterministic device. */
#include "kernels/amx.h"
#include "kernels/cpu.h"

#define CHUNK_M     512 /* rows of x packed at a time: k * 2 KB of shared scratch */
#define STRIP_N     256 /* weight rows of a work item; 64 where x is one tile wide */
#define BLOCK_STEPS 16  /* 512 inputs: packed weights, x and sums of an item stay in 2 MB of L2 */

typedef struct {
    device *d;
    tensor *y;
    const tensor *x, *w, *bias;
    bool add;
    int64_t m0, m;   /* rows of x of this chunk */
    int64_t columns; /* tiles of it */
    int64_t steps;   /* of k */
    int64_t strip;   /* weight rows of an item */
    uint8_t *packed; /* [columns][steps][2] tiles */
} gemm_ctx;

static void pack_item(void *ctx, int64_t column, int worker)
{
    const gemm_ctx *c = ctx;
    const int64_t r = column * AMX_TILE, left = c->m - r;
    const float *x = (const float *)c->x->data + (c->m0 + r) * c->x->stride[0];
    (void)worker;
    amx_pack_b_rows(c->packed + column * c->steps * AMX_PARTS * AMX_BYTES, x, c->x->stride[0],
                    left < AMX_TILE ? left : AMX_TILE, c->x->shape[1], c->steps);
}

/* Weight rows [n0, n0+n) and inputs from step s0 on as an A panel. */
static void pack_weights(const gemm_ctx *c, uint8_t *a, int64_t n0, int64_t n, int64_t rows,
                         int64_t s0, int64_t steps)
{
    const tensor *w = c->w;
    const int64_t k0 = s0 * AMX_STEP, k = w->shape[1] - k0, ld = w->stride[0];
    for (int64_t t = 0; t < rows; t++) {
        const int64_t r = t * AMX_TILE, left = n - r;
        const int64_t have = left < 0 ? 0 : left < AMX_TILE ? left : AMX_TILE;
        const int64_t at = (n0 + (have ? r : 0)) * ld + k0;
        if (w->dt == DT_BF16)
            amx_pack_a(a + t * steps * AMX_BYTES, (bf16 *)w->data + at, ld, DT_BF16, have, k, steps,
                       1);
        else if (w->dt == DT_F16)
            amx_pack_a(a + t * steps * 2 * AMX_BYTES, (f16 *)w->data + at, ld, DT_F16, have, k,
                       steps, 2);
        else
            amx_pack_a(a + t * steps * 2 * AMX_BYTES, (float *)w->data + at, ld, DT_F32, have, k,
                       steps, 2);
    }
}

static float bias_at(const tensor *b, int64_t i)
{
    if (b->dt == DT_F16) return f16_to_f32(((const f16 *)b->data)[i]);
    if (b->dt == DT_BF16) return bf16_to_f32(((const bf16 *)b->data)[i]);
    return ((const float *)b->data)[i];
}

/* A tile [16 weight rows, 16 rows of x] into y, where it lies the other way round. */
static void put_tile(const gemm_ctx *c, const float *tile, int64_t n0, int64_t n, int64_t r0,
                     int64_t rows)
{
    __m512i t[16];
    float b[AMX_TILE] = {0};
    for (int i = 0; i < 16; i++) t[i] = _mm512_loadu_si512(tile + 16 * i);
    amx_transpose(t);
    for (int64_t i = 0; c->bias && i < n; i++) b[i] = bias_at(c->bias, n0 + i);
    const vf bias = vf_load(b);
    for (int64_t r = 0; r < rows; r++) {
        float *y = (float *)c->y->data + (c->m0 + r0 + r) * c->y->stride[0] + n0;
        const vf base = c->add ? vf_add(vf_load_n(y, n), bias) : bias;
        vf_store_n(y, vf_add(base, _mm512_castsi512_ps(t[r])), n);
    }
}

/* Each weight is used once or little more: no panel of them. */
static bool use_direct(const gemm_ctx *c, int64_t n)
{
    return c->columns == 1 && n == 4 * AMX_TILE && c->w->shape[1] % AMX_STEP == 0 &&
           c->w->dt != DT_F32;
}

static void rows_direct(const gemm_ctx *c, float *sums, uint8_t *scratch, int64_t n0)
{
    const int64_t ld = c->w->stride[0];
    AMX_FENCE();
    if (c->w->dt == DT_BF16)
        amx_4x1_bf16(sums, (const bf16 *)c->w->data + n0 * ld, ld, c->packed, c->steps);
    else
        amx_4x1_f16(sums, (const f16 *)c->w->data + n0 * ld, ld, c->packed, c->steps, scratch);
    AMX_FENCE();
}

static void gemm_item(void *ctx, int64_t item, int worker)
{
    const gemm_ctx *c = ctx;
    const int64_t n0 = item * c->strip, left = c->w->shape[0] - n0,
                  n = left < c->strip ? left : c->strip;
    const int parts = c->w->dt == DT_BF16 ? 1 : AMX_PARTS;
    amx_job j = {.rows = amx_up(n, 64) / AMX_TILE,
                 .columns = c->columns,
                 .a_parts = parts,
                 .b_pitch = c->steps * AMX_PARTS * AMX_BYTES};
    uint8_t *a = dev_worker(c->d, worker);
    j.a = a;
    j.c = (float *)(void *)(a + (STRIP_N / AMX_TILE) * BLOCK_STEPS * AMX_PARTS * AMX_BYTES);
    amx_begin();
    const bool direct = use_direct(c, n);
    if (direct) rows_direct(c, j.c, a, n0);
    for (int64_t s = 0; s < c->steps && !direct; s += BLOCK_STEPS) {
        j.steps = c->steps - s < BLOCK_STEPS ? c->steps - s : BLOCK_STEPS;
        j.a_pitch = j.steps * parts * AMX_BYTES;
        j.b = c->packed + s * AMX_PARTS * AMX_BYTES;
        j.first = s == 0;
        pack_weights(c, a, n0, n, j.rows, s, j.steps);
        amx_block(&j);
    }
    _tile_release();
    for (int64_t k = 0; k < c->columns; k++) { /* along the rows of y: fewer pages at a time */
        for (int64_t i = 0; i * AMX_TILE < n; i++) {
            const int64_t cols = n - i * AMX_TILE, rows = c->m - k * AMX_TILE;
            put_tile(c, j.c + (i * c->columns + k) * 256, n0 + i * AMX_TILE,
                     cols < AMX_TILE ? cols : AMX_TILE, k * AMX_TILE,
                     rows < AMX_TILE ? rows : AMX_TILE);
        }
    }
}

/* Narrower strips where threads would go without; what is computed stays the same. */
static int64_t strip_rows(const gemm_ctx *c, int64_t n)
{
    int64_t rows = c->columns == 1 ? 64 : STRIP_N;
    while (rows > 64 && n < 2 * rows * c->d->threads) rows /= 2;
    return rows;
}

size_t gemm_amx_scratch(const op_limits *l)
{
    const int64_t rows = l->rows < CHUNK_M ? l->rows : CHUNK_M;
    return (size_t)(amx_up(rows, AMX_TILE) * amx_up(l->k, AMX_STEP) * 2 * AMX_PARTS);
}

/* Tiles of one or two rows cost small matrices half their speed; f16 pays for its split up to 4. */
static int64_t vector_rows(const device *d, dtype dt)
{
    if (d->deterministic) return 0;
    return dt == DT_BF16 ? 2 : AMX_VECTOR_ROWS;
}

err_code gemm_amx(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                  bool add, err *e)
{
    gemm_ctx c = {.d = d, .y = y, .x = x, .w = w, .bias = bias, .add = add};
    const int64_t m = x->shape[0], n = w->shape[0], k = x->shape[1];
    const op_limits need = {.rows = m < CHUNK_M ? (int32_t)m : CHUNK_M, .k = k};
    void *p;
    if (m <= vector_rows(d, w->dt)) return gemm_cpu_avx512(d, y, x, w, bias, add, e);
    TRY(dev_scratch(d, &p, gemm_amx_scratch(&need), "op_gemm", e));
    c.packed = p;
    c.steps = (k + AMX_STEP - 1) / AMX_STEP;
    for (c.m0 = 0; c.m0 < m; c.m0 += CHUNK_M) {
        c.m = m - c.m0 < CHUNK_M ? m - c.m0 : CHUNK_M;
        c.columns = (c.m + AMX_TILE - 1) / AMX_TILE;
        c.strip = strip_rows(&c, n);
        pool_run(d->workers, pack_item, &c, c.columns);
        pool_run(d->workers, gemm_item, &c, (n + c.strip - 1) / c.strip);
    }
    return OK;
}
