/* The W4 op on CUDA: tiling at load; few rows through the weight stream, more through wgmma; below
 * sm_90 through f16 and cuBLAS. */
#include "kernels/device_cuda.cuh"
#include "kernels/gemm_w4.cuh"

extern "C" {
#include "base/w4.h"
}

#define THREADS     256
#define STREAM_ROWS 16 /* beyond, wgmma is faster */
#define DENSE_BYTES \
    ((size_t)32 << 20) /* an f16 slab of the unpacked weight: stays in L2 on large parts */

/* ---- tiling ---- */

/* A weight as it lies on disk: q [k, n/8] words, zeros either packed alike [k/g, n/8] or f16 [k/g,
 * n]. */
typedef struct {
    const uint32_t *q;
    const __half *scales;
    const void *zeros;
    int n, k, group, first; /* first: row of the fused weight where this part begins */
    int k0;                 /* input of the weight with which q, scales and zeros begin */
    int paired;             /* 0, or 1 + which half of pairs the part is */
    bool awq;               /* nibble order 0,2,4,6,1,3,5,7 and packed zeros; else TurboMind */
} disk_w4;

/* Where row n of a part lies: tile, and 0..15 within. */
__device__ __forceinline__ int2 tile_row(const disk_w4 &s, int n)
{
    if (s.paired) return make_int2(n / 8, (s.paired - 1) * 8 + n % 8);
    return make_int2((s.first + n) / 16, (s.first + n) % 16);
}

__device__ __forceinline__ int nibble_of(bool awq, int col)
{
    return awq ? ((col & 1) << 2 | (col & 7) >> 1) : col & 7;
}
__device__ __forceinline__ uint32_t disk_code(const disk_w4 &s, int k, int n)
{
    return s.q[(size_t)k * (s.n / 8) + n / 8] >> (4 * nibble_of(s.awq, n)) & 15u;
}

/* Input of 32 that byte j (0..7) of the two words of lane t has. */
__device__ __forceinline__ int code_input(int t, int j)
{
    return (j >> 2) * 16 + (j & 1) * 8 + 2 * t + (j >> 1 & 1);
}

/* One thread a row and lane of a step, 8 inputs. Rows g and g + 8 share bytes and may come from
 * different parts: the buffer starts as zeros and nibbles are or-ed in, in any order. */
__global__ void w4_tile_codes(uint8_t *data, disk_w4 s, int units, int unit_bytes)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= (int64_t)s.n * (s.k / 8)) return;
    const int n = (int)(i % s.n), t = (int)(i / s.n) % 4, k = (int)(i / s.n) / 4 * 32;
    const int2 at = tile_row(s, n);
    const int tile = at.x, g = at.y & 7, high = at.y >> 3, to = s.k0 + k;
    const int unit = to / 128, step = to % 128 / 32;
    uint32_t *p = (uint32_t *)(data + ((size_t)tile * units + unit) * unit_bytes) +
                  ((step >> 1) * 32 + g * 4 + t) * 4 + (step & 1) * 2;
    uint32_t word[2] = {0, 0};
#pragma unroll
    for (int j = 0; j < 8; j++)
        word[j / 4] |= disk_code(s, k + code_input(t, j), n) << (8 * (j & 3) + 4 * high);
    atomicOr(p, word[0]);
    atomicOr(p + 1, word[1]);
}

__global__ void w4_tile_params(uint8_t *data, disk_w4 s, int units, int unit_bytes)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int groups = s.k / s.group;
    if (i >= (int64_t)s.n * groups) return;
    const int n = (int)(i % s.n), gr = (int)(i / s.n), k = s.k0 + gr * s.group;
    const int2 at = tile_row(s, n);
    const __half zero =
        s.awq ? __int2half_rn((int)(((const uint32_t *)s.zeros)[(size_t)gr * (s.n / 8) + n / 8] >>
                                        (4 * nibble_of(true, n)) &
                                    15u))
              : ((const __half *)s.zeros)[(size_t)gr * s.n + n];
    __half2 *p = (__half2 *)(data + ((size_t)at.x * units + k / 128) * unit_bytes + 1024) +
                 (k % 128 / s.group) * 16 + (at.y & 7) * 2 + (at.y >> 3);
    *p = __halves2half2(s.scales[(size_t)gr * s.n + n], zero);
}

/* Back to f16 rows [n0, n0 + rows) of the fused weight: out [rows, k]. One thread 8 inputs of a
 * row. */
__global__ void w4_untile(__half *out, w4_tiles w, int n0, int rows)
{
    const int64_t i = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int k8 = w.k / 8;
    pdl_launch();
    pdl_wait();
    if (i >= (int64_t)rows * k8) return;
    const int n = n0 + (int)(i / k8), k = (int)(i % k8) * 8;
    const int half = w.n / 2, part = w.paired && n >= half, r = w.paired ? n - part * half : n;
    const int tile = w.paired ? r / 8 : r / 16, high = w.paired ? part : r >> 3 & 1;
    const int ub = 1024 + 64 * (128 / w.group), g = r & 7, step = k % 128 / 32, eight = k % 32 / 8;
    const uint8_t *unit = w.data + ((size_t)tile * w.units + k / 128) * ub;
    const uint32_t *q = (const uint32_t *)unit + ((step >> 1) * 32 + g * 4) * 4 + (step & 1) * 2 +
                        (eight >> 1); /* of lane t: 4 * t further, bytes (eight & 1), + 2 */
    const __half2 p = ((const __half2 *)(unit + 1024))[(k % 128 / w.group) * 16 + g * 2 + high];
    const float scale = __low2float(p), zero = __high2float(p);
    __half v[8];
#pragma unroll
    for (int j = 0; j < 8; j++) {
        const uint32_t code = q[j / 2 * 4] >> (8 * (eight & 1) + 16 * (j & 1) + 4 * high) & 15u;
        v[j] = __float2half_rn(((float)code - zero) * scale);
    }
    *(uint4 *)(out + (size_t)(n - n0) * w.k + k) = *(const uint4 *)v;
}

static unsigned blocks_for(int64_t n) { return (unsigned)((n + THREADS - 1) / THREADS); }

static w4_tiles tiles_of(const w4_weight *w)
{
    w4_tiles t = {};
    t.data = (const uint8_t *)w->q.data;
    t.bias = (const __half *)w->bias.data;
    t.n = (int)w->n, t.k = (int)w->k, t.group = w->group;
    t.tiles = (t.n + 15) / 16, t.units = (t.k + 127) / 128;
    t.paired = w->paired;
    return t;
}

size_t cuda_planes_bytes(int64_t k)
{
    const int units = (int)((k + 127) / 128);
    return (w4_planes_bytes(units, W4_FEW_MAX) + w4_scales_bytes(units, W4_FEW_MAX, 32) + 127) &
           ~(size_t)127;
}

/* Planes, then scales, at the end of the scratch: what other ops keep there lies in front. */
static w4_planes_out planes_at(const device *d, int64_t m, int64_t k, int group)
{
    const int units = (int)((k + 127) / 128);
    w4_planes_out o = {};
    if (d->shared_bytes < cuda_planes_bytes(k)) return o;
    o.planes = (uint8_t *)d->shared_scratch + (d->shared_bytes & ~(size_t)127) -
               cuda_planes_bytes(k);
    o.scales = (float *)(o.planes + w4_planes_bytes(units, (int)m));
    o.token_tiles = w4_token_tiles((int)m);
    o.group = group;
    o.units = units;
    return o;
}

w4_planes_out cuda_planes_want(device *d, int64_t m, int64_t k)
{
    const cuda_state *s = cuda_of(d);
    /* one row goes to the kernel that makes its own */
    if (s->sm < 90 || !s->w4_group || m < 2 || m > STREAM_ROWS || k % 128) return w4_planes_out{};
    return planes_at(d, m, k, s->w4_group);
}

void cuda_planes_made(device *d, const tensor *y, const w4_planes_out *o)
{
    if (!o->planes) return;
    cuda_of(d)->planes = cuda_planes{y->data, y->shape[0], y->shape[1], y->stride[0], o->group};
}

extern "C" {

size_t w4_upload_bytes_cuda(int64_t k, int64_t n, int32_t group)
{
    return (size_t)((n + 15) / 16) * (size_t)((k + 127) / 128) * (size_t)w4_unit_bytes(group) +
           (size_t)n * 2;
}

/* Inputs [w.k0, w.k0 + w.k) of a part to the device, tiled there. */
static err_code upload_slice(device *d, uint8_t *data, disk_w4 w, const cuda_piece *piece,
                             int units, err *e)
{
    const cudaStream_t stream = cuda_of(d)->stream;
    uint8_t *at[3];
    TRY(cuda_load_raw(d, piece, 3, at, e));
    w.q = (const uint32_t *)at[0], w.scales = (const __half *)at[1], w.zeros = at[2];
    w4_tile_codes<<<blocks_for((int64_t)w.n * (w.k / 8)), THREADS, 0, stream>>>(
        data, w, units, w4_unit_bytes(w.group));
    w4_tile_params<<<blocks_for((int64_t)w.n * (w.k / w.group)), THREADS, 0, stream>>>(
        data, w, units, w4_unit_bytes(w.group));
    TRY(cuda_launched(d, "w4_upload", cudaSuccess, e));
    return cuda_load_tiled(d, e);
}

/* Words as they lie on disk, in slices of whole groups; anything but AWQ and TurboMind words goes
 * through the host first. */
static err_code upload_part(device *d, uint8_t *data, const w4_weight *src, int first, int paired,
                            int units, err *e)
{
    const size_t groups = (size_t)(src->k / src->group);
    const size_t bytes[3] = {tensor_bytes(&src->q) / groups, tensor_bytes(&src->scales) / groups,
                             tensor_bytes(&src->zeros) / groups};
    const void *const from[3] = {src->q.data, src->scales.data, src->zeros.data};
    const size_t most = (CUDA_LOAD_BYTES - 3 * 256) / (bytes[0] + bytes[1] + bytes[2]);
    disk_w4 w = {};
    if (!most)
        return err_set(e, E_UNSUPPORTED, "w4_upload: %lld outputs: more than a slot holds",
                       (long long)src->n);
    w.n = (int)src->n, w.group = src->group, w.first = first, w.paired = paired,
    w.awq = src->layout == W4_AWQ;
    for (size_t g = 0; g < groups; g += most) {
        const size_t n = groups - g < most ? groups - g : most;
        cuda_piece piece[3];
        for (int i = 0; i < 3; i++) {
            piece[i].src = (const uint8_t *)from[i] + g * bytes[i];
            piece[i].bytes = n * bytes[i];
        }
        w.k0 = (int)g * w.group, w.k = (int)n * w.group;
        TRY(upload_slice(d, data, w, piece, units, e));
    }
    return OK;
}

static err_code upload_any(device *d, uint8_t *data, const w4_weight *src, int first, int paired,
                           int units, err *e)
{
    w4_weight t = {};
    size_t q, s, z;
    void *mem;
    if (src->layout == W4_AWQ || src->layout == W4_TM)
        return upload_part(d, data, src, first, paired, units, e);
    TRY(w4_sizes(&q, &s, &z, src->k, src->n, src->group, W4_TM, e));
    TRY(mem_alloc(&mem, q + s + z, 1, "w4 tiling", e));
    w4_shape(&t, src->k, src->n, src->group, W4_TM);
    t.q.data = mem, t.scales.data = (uint8_t *)mem + q, t.zeros.data = (uint8_t *)mem + q + s;
    err_code rc = w4_repack(&t, src, e);
    if (rc == OK) rc = upload_part(d, data, &t, first, paired, units, e);
    mem_free(mem);
    return rc;
}

static err_code upload_bias(device *d, __half *bias, const w4_weight *const *parts, int n_parts,
                            err *e)
{
    for (int i = 0; i < n_parts; i++) {
        const int64_t n = parts[i]->n;
        if (parts[i]->bias.data) {
            void *mem;
            TRY(mem_alloc(&mem, (size_t)n, 2, "bias", e));
            tensor t = tensor_1d(mem, DT_F16, n);
            tensor_convert(&t, &parts[i]->bias);
            const err_code rc = cuda_load_copy(d, bias, mem, (size_t)n * 2, e);
            mem_free(mem);
            if (rc != OK) return rc;
        }
        bias += n;
    }
    return OK;
}

err_code w4_upload_cuda(device *d, dev_buf *buf, w4_weight *out, const w4_weight *const *parts,
                        int n_parts, err *e)
{
    int64_t n = 0;
    bool bias = false;
    for (int i = 0; i < n_parts; i++) n += parts[i]->n, bias = bias || parts[i]->bias.data;
    const int64_t k = parts[0]->k;
    const int units = (int)((k + 127) / 128), group = parts[0]->group;
    if (k % 32 || n > INT32_MAX || k > INT32_MAX)
        return err_set(e, E_UNSUPPORTED, "w4_upload: inputs: expected a multiple of 32, got %lld",
                       (long long)k);
    TRY(dev_alloc(buf, d, w4_upload_bytes_cuda(k, n, group), "w4 weights", e));
    __half *b = (__half *)((uint8_t *)buf->data + w4_upload_bytes_cuda(k, n, group) -
                           (size_t)n * 2);
    err_code rc = OK;
    int first = 0;
    /* Two parts of one size are gate and up: their rows meet in the product's epilogue. */
    const bool paired = n_parts == 2 && parts[0]->n == parts[1]->n && parts[0]->n % 8 == 0;
    for (int i = 0; i < n_parts && rc == OK; i++) {
        rc = upload_any(d, (uint8_t *)buf->data, parts[i], first, paired ? 1 + i : 0, units, e);
        first += (int)parts[i]->n;
    }
    if (rc == OK && bias) rc = upload_bias(d, b, parts, n_parts, e);
    if (rc != OK) {
        dev_free(buf);
        return rc;
    }
    memset(out, 0, sizeof *out);
    out->k = k, out->n = n, out->group = group, out->layout = W4_DEVICE, out->paired = paired;
    cuda_of(d)->w4_group = group;
    out->q = tensor_1d(buf->data, DT_U8, (int64_t)buf->bytes);
    out->q.mem = MEM_CUDA;
    if (bias) {
        out->bias = tensor_1d(b, DT_F16, n);
        out->bias.mem = MEM_CUDA;
    }
    return OK;
}

size_t gemm_w4_scratch_cuda(const device *d, const op_limits *lim)
{
    const size_t dense = (size_t)lim->n * (size_t)lim->k * 2;
    if (cuda_of(d)->sm < 90) return dense < DENSE_BYTES ? dense : DENSE_BYTES;
    return lim->rows <= STREAM_ROWS ? 0 : gemm_w4_wide_sums(cuda_of(d)->sms);
}

static err_code few_rows(device *d, const w4_tiles *w, w4_call *c, err *e)
{
    cuda_state *s = cuda_of(d);
    const w4_planes_out o = planes_at(d, c->m, w->k, w->group);
    cuda_planes p = s->planes;
    if (!o.planes)
        return err_set(e, E_LIMIT, "gemm_w4: ops_reserve was not told of %d inputs", w->k);
    c->planes = o.planes;
    c->scales = o.scales;
    TRY(cuda_pass_flush(d, e));
    if (p.x != c->x || p.m != c->m || p.k != w->k || p.ld != c->ldx || p.group != w->group) {
        TRY(cuda_launched(d, "gemm_w4: planes", gemm_w4_planes(w, c, s->stream, s->sm >= 90), e));
        p.x = c->x, p.m = c->m, p.k = w->k, p.ld = c->ldx, p.group = w->group;
    }
    TRY(cuda_launched(d, "gemm_w4",
                      gemm_w4_few(w, c, s->sms, d->deterministic, s->stream, s->sm >= 90), e));
    s->planes = p; /* the product changed neither x nor its planes */
    return OK;
}

/* Slabs of outputs: unpack to f16, then a dense product. */
static err_code many_rows(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add,
                          err *e)
{
    const w4_tiles t = tiles_of(w);
    const size_t room = d->shared_bytes < DENSE_BYTES ? d->shared_bytes : DENSE_BYTES;
    int64_t slab = (int64_t)(room / ((size_t)t.k * 2)) / 64 * 64;
    void *scratch;
    if (slab > t.n) slab = t.n;
    if (slab < 1) slab = 1;
    TRY(dev_scratch(d, &scratch, (size_t)slab * (size_t)t.k * 2, "gemm_w4", e));
    for (int64_t n = 0; n < t.n; n += slab) {
        const int64_t rows = t.n - n < slab ? t.n - n : slab;
        tensor dense = tensor_2d(scratch, DT_F16, rows, t.k), part = tensor_cols(y, n, rows), bias;
        dense.mem = MEM_CUDA;
        TRY(cuda_launch(d, "gemm_w4: unpack", w4_untile, dim3(blocks_for(rows * (t.k / 8))),
                        dim3(THREADS), 0, e, (__half *)scratch, t, (int)n, (int)rows));
        if (w->bias.data) bias = tensor_rows(&w->bias, n, rows);
        TRY(gemm_cuda(d, &part, x, &dense, w->bias.data ? &bias : NULL, add, e));
    }
    return OK;
}

/* *taken: through wgmma. */
static err_code wide_rows(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add,
                          bool glu, bool *taken, err *e)
{
    cuda_state *s = cuda_of(d);
    const w4_tiles t = tiles_of(w);
    w4_wide_call c = {};
    c.x = (const __half *)x->data, c.y = y->data, c.arrived = s->counters;
    c.m = (int)x->shape[0], c.ldx = (int)x->stride[0], c.ldy = (int)y->stride[0];
    c.add = add, c.wide = y->dt == DT_F32, c.glu = glu;
    *taken = s->sm >= 90 && !d->deterministic && x->shape[0] > STREAM_ROWS &&
             gemm_w4_wide_takes(&t, &c);
    if (!*taken) return OK;
    TRY(cuda_pass_flush(d, e));
    if (c.m <= W4_FEW_MAX)
        return cuda_launched(d, "gemm_w4: clusters", gemm_w4_cluster(&t, &c, s->sms, s->stream), e);
    TRY(dev_scratch(d, &c.sums, gemm_w4_wide_sums(s->sms), "gemm_w4", e));
    return cuda_launched(d, "gemm_w4: wgmma", gemm_w4_wide(&t, &c, s->sms, s->stream), e);
}

/* Rows of one call of the weight stream. */
static int64_t few_most(const device *d) { return d->deterministic ? W4_FEW_MAX : STREAM_ROWS; }

/* One row of activations through the kernel that makes their planes itself; its sums are those of
 * few rows to the bit, which deterministic devices rely on (tests/test_cuda_fixed.c). */
static bool one_row(const device *d, const tensor *x, const w4_weight *w)
{
    return cuda_of(d)->sm >= 90 && x->shape[0] == 1 && w->k % 128 == 0 &&
           w->k <= W4_ONE_UNITS * 128 && (uintptr_t)x->data % 16 == 0;
}

static err_code run_one(device *d, const w4_weight *w, const w4_one_call *c, err *e)
{
    const w4_tiles t = tiles_of(w);
    bool taken;
    TRY(cuda_pass_product(d, &t, c, &taken, e));
    if (taken) return OK;
    TRY(cuda_pass_flush(d, e));
    return cuda_launched(d, "gemm_w4: one row",
                         gemm_w4_one(&t, c, cuda_of(d)->sms, cuda_of(d)->stream, true), e);
}

err_code gemm_w4_cuda(device *d, tensor *y, const tensor *x, const w4_weight *w, bool add, err *e)
{
    const w4_tiles t = tiles_of(w);
    const int64_t m = x->shape[0];
    if (one_row(d, x, w)) {
        w4_one_call c = {};
        c.x = (const __half *)x->data, c.y = y->data, c.add = add, c.wide = y->dt == DT_F32;
        return run_one(d, w, &c, e);
    }
    bool taken;
    TRY(wide_rows(d, y, x, w, add, false, &taken, e));
    if (taken) return OK;
    if (cuda_of(d)->sm < 90 || x->stride[0] % 4 || (m > few_most(d) && !d->deterministic))
        return many_rows(d, y, x, w, add, e);
    if (m > few_most(d)) { /* each weight again for each slice, in the order of few rows */
        for (int64_t i = 0; i < m; i += few_most(d)) {
            const int64_t n = m - i < few_most(d) ? m - i : few_most(d);
            const tensor part = tensor_rows(x, i, n);
            tensor out = tensor_rows(y, i, n);
            TRY(gemm_w4_cuda(d, &out, &part, w, add, e));
        }
        return OK;
    }
    w4_call c = {};
    c.x = (const __half *)x->data, c.y = y->data, c.m = (int)m;
    c.ldx = (int)x->stride[0], c.ldy = (int)y->stride[0];
    c.add = add, c.wide = y->dt == DT_F32;
    return few_rows(d, &t, &c, e);
}

err_code gemm_w4_norm_cuda(device *d, tensor *y, tensor *h, const tensor *x, const tensor *norm,
                           float eps, const w4_weight *w, bool glu, err *e)
{
    if (one_row(d, x, w) && x->dt == DT_F32 && y->dt == DT_F16 && w->k <= 8 * W4_ONE_NORM * 128 &&
        (!glu || w->paired)) {
        w4_one_call c = {};
        c.resid = (const float *)x->data, c.norm = norm->data, c.norm_dt = (int)norm->dt,
        c.eps = eps;
        c.y = y->data, c.glu = glu;
        return run_one(d, w, &c, e);
    }
    TRY(rmsnorm_cuda(d, h, x, norm, eps, e));
    if (glu && w->paired && y->dt == DT_F16) {
        bool taken;
        TRY(wide_rows(d, y, h, w, false, true, &taken, e));
        if (taken) return OK;
    }
    TRY(gemm_w4_cuda(d, y, h, w, false, e));
    if (!glu) return OK;
    tensor gate = tensor_cols(y, 0, w->n / 2);
    const tensor up = tensor_cols(y, w->n / 2, w->n / 2);
    return glu_cuda(d, &gate, &gate, &up, e);
}

} /* extern "C" */
