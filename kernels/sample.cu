/* From logits to ids on the device, the steps of runtime/sampler.h in their order.
 *
 * Weights are exp((l - largest) / temperature) in double, then integers in units of 2^-44: sums of
 * integers have no order, so a draw is the same however threads meet. Nothing is sorted. What is
 * asked for is always "the id at which a running sum, largest logit first, passes a bound": a
 * histogram over (largest - l) / temperature tells in which bin that is, a finer one is made of a
 * bin that holds too many, and the bin's members count who comes before them. Only where more equal
 * logits than fit a bin are in the way, the bound is found bit by bit.
 *
 * Three kernels: penalties and the largest logit, and the histogram, by parts of the row on many
 * multiprocessors; the search by one block a row. */
#include "kernels/device_cuda.cuh"

#define THREADS      1024 /* of a search; */
#define PART_THREADS 256  /* of a part */
#define PART_IDS     4096 /* at least, but for the last part */
#define MAX_PARTS    32
#define BINS         2048
#define MEMBERS      1024
#define ONE          ((uint64_t)1 << 44) /* a weight of 1; 2^18 of them fit */
#define NATS         32                  /* beyond, a weight is 0 */
#define STEPS        32                  /* of the table that e^x comes from */
#define RESERVE_ROWS 64                  /* rows that a launch finds scratch for, at least */

/* Of a row, in the scratch. */
typedef struct {
    uint64_t weight[BINS];
    uint32_t count[BINS];
    float top[MAX_PARTS];
    int32_t id[MAX_PARTS];
} row_bins;

typedef struct {
    float *logits;
    int32_t *ids;
    const sample_row *rows;
    const sample_bias *bias;
    int32_t *counts;
    row_bins *bins;
    int64_t ld;
    int v, part; /* ids of a part */
} sample_call;

typedef struct {
    uint64_t weight[BINS];
    uint32_t count[BINS];
    uint64_t member_weight[MEMBERS];
    float member[MEMBERS];
    int32_t member_id[MEMBERS];
    uint64_t part_weight[32];
    uint32_t part_count[32];
    /* what a search found */
    uint64_t below, passed; /* weights before the bin; up to and with the id */
    uint64_t below_measure;
    uint32_t members;
    int32_t bin, id;
    double table[STEPS];
} sample_shared;

/* A row as its threads see it. */
typedef struct {
    const float *l;
    int v;
    float top, scale; /* bins of a unit of logit */
    double inverse;   /* of the temperature */
    const double *table;
} sample_view;

typedef struct {
    uint64_t weight;
    uint32_t count;
} sample_sum;

/* 2^(i / STEPS) for power_of. */
__device__ __forceinline__ void fill_table(double *table)
{
    if (threadIdx.x < STEPS) table[threadIdx.x] = exp2((double)threadIdx.x / STEPS);
}

/* e^x for x from -NATS to 0, to a few 1e-16: far fewer operations in double than exp's. */
__device__ __forceinline__ double power_of(double x, const double *table)
{
    const double magic = 6755399441055744.0; /* 1.5 * 2^52: adding it rounds to an integer */
    const double shifted = x * (STEPS / 0.6931471805599453) + magic, n = shifted - magic;
    const int i = __double2loint(shifted);
    const double r = fma(n, -0.6931471805599453 / STEPS, x);
    double p = fma(r, 1.0 / 120, 1.0 / 24);
    p = fma(r, p, 1.0 / 6);
    p = fma(r, p, 0.5);
    p = fma(r, p, 1.0);
    p = fma(r, p, 1.0) * table[i & (STEPS - 1)];
    return __hiloint2double(__double2hiint(p) + (i >> 5) * (1 << 20), __double2loint(p));
}

__device__ __forceinline__ double weight_of(const sample_view &s, float l)
{
    if (l == s.top) return 1; /* infinite minus infinite would be NaN */
    const double d = ((double)l - (double)s.top) * s.inverse;
    return d < -NATS ? 0 : power_of(d, s.table);
}
__device__ __forceinline__ uint64_t fixed_of(double weight)
{
    return __double2ull_rn(weight * (double)ONE);
}

/* All logits of [from, to) above minus infinity, which NaN is not, by the threads of a block. */
template <typename F>
__device__ __forceinline__ void each_logit(const float *l, int from, int to, F f)
{
    const int step = blockDim.x;
    int i = from + (int)threadIdx.x;
    for (; i + 3 * step < to; i += 4 * step) {
        float x[4];
#pragma unroll
        for (int k = 0; k < 4; k++) x[k] = l[i + k * step];
#pragma unroll
        for (int k = 0; k < 4; k++)
            if (x[k] > -INFINITY) f(i + k * step, x[k]);
    }
    for (; i < to; i += step)
        if (l[i] > -INFINITY) f(i, l[i]);
}

/* How far behind the largest, in bins; the last bin takes all that weighs nothing. */
__device__ __forceinline__ float depth_of(const sample_view &s, float l)
{
    return l == s.top ? 0.f : fminf((s.top - l) * s.scale, (float)(BINS - 1));
}
__device__ __forceinline__ int finer(float depth)
{
    return min((int)((depth - floorf(depth)) * BINS), BINS - 1);
}
/* In bin `bin`, and with fine >= 0 in that part of it. */
__device__ __forceinline__ bool inside(const sample_view &s, float l, int bin, int fine)
{
    const float depth = depth_of(s, l);
    return (int)depth == bin && (fine < 0 || finer(depth) == fine);
}

/* The sum over the block, for every thread. */
__device__ static sample_sum block_sum(sample_shared &sh, sample_sum v)
{
    for (int i = 16; i; i >>= 1) {
        v.weight += __shfl_xor_sync(~0u, v.weight, i);
        v.count += __shfl_xor_sync(~0u, v.count, i);
    }
    __syncthreads();
    if ((threadIdx.x & 31) == 0)
        sh.part_weight[threadIdx.x >> 5] = v.weight, sh.part_count[threadIdx.x >> 5] = v.count;
    __syncthreads();
    v.weight = sh.part_weight[threadIdx.x & 31];
    v.count = sh.part_count[threadIdx.x & 31];
    for (int i = 16; i; i >>= 1) {
        v.weight += __shfl_xor_sync(~0u, v.weight, i);
        v.count += __shfl_xor_sync(~0u, v.count, i);
    }
    return v;
}

/* The sum of the threads before this one. */
__device__ static sample_sum block_before(sample_shared &sh, sample_sum own)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    sample_sum v = own, w;
    for (int i = 1; i < 32; i <<= 1) {
        const uint64_t a = __shfl_up_sync(~0u, v.weight, i);
        const uint32_t b = __shfl_up_sync(~0u, v.count, i);
        if (lane >= i) v.weight += a, v.count += b;
    }
    __syncthreads();
    if (lane == 31) sh.part_weight[warp] = v.weight, sh.part_count[warp] = v.count;
    __syncthreads();
    w.weight = w.count = 0;
    for (int i = 0; i < warp; i++) w.weight += sh.part_weight[i], w.count += sh.part_count[i];
    w.weight += v.weight - own.weight, w.count += v.count - own.count;
    return w;
}

/* Adds the logits of [from, to) to bins, or with bin >= 0 those of that bin to parts of it. */
__device__ __forceinline__ void add_bins(uint64_t *weight, uint32_t *count, const sample_view &s,
                                         int from, int to, int bin)
{
    each_logit(s.l, from, to, [&](int, float l) {
        const float depth = depth_of(s, l);
        if (bin >= 0 && (int)depth != bin) return;
        const int at = bin >= 0 ? finer(depth) : (int)depth;
        atomicAdd(&count[at], 1u);
        const uint64_t w = fixed_of(weight_of(s, l));
        if (w) atomicAdd((unsigned long long *)&weight[at], (unsigned long long)w);
    });
}

/* The bins of a row as the parts left them, or with bin >= 0 parts of that one. */
__device__ static void make_bins(sample_shared &sh, const sample_view &s, const row_bins *all,
                                 int bin)
{
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += THREADS) {
        sh.weight[i] = bin < 0 ? all->weight[i] : 0;
        sh.count[i] = bin < 0 ? all->count[i] : 0;
    }
    __syncthreads();
    if (bin < 0) return;
    add_bins(sh.weight, sh.count, s, 0, s.v, bin);
    __syncthreads();
}

/* The bin in which the running sum, from `weight` and `measure` on, passes `bound`; into sh.bin,
 * with sh.below and sh.below_measure the sums before it. */
__device__ static void find_bin(sample_shared &sh, bool counts, uint64_t bound, uint64_t weight,
                                uint64_t measure)
{
    constexpr int PER = BINS / THREADS;
    sample_sum own = {0, 0};
    for (int i = 0; i < PER; i++) {
        own.weight += sh.weight[threadIdx.x * PER + i];
        own.count += sh.count[threadIdx.x * PER + i];
    }
    const sample_sum before = block_before(sh, own);
    weight += before.weight;
    measure += counts ? before.count : before.weight;
    for (int i = 0; i < PER; i++) {
        const int at = threadIdx.x * PER + i;
        const uint64_t m = counts ? sh.count[at] : sh.weight[at];
        if (measure <= bound && bound < measure + m) {
            sh.bin = at, sh.members = sh.count[at];
            sh.below = weight, sh.below_measure = measure;
        }
        measure += m, weight += sh.weight[at];
    }
    __syncthreads();
}

/* Where few enough are inside: each counts who comes before it. */
__device__ static void pass_members(sample_shared &sh, const sample_view &s, bool counts,
                                    uint64_t bound, int bin, int fine)
{
    __syncthreads();
    if (threadIdx.x == 0) sh.members = 0;
    __syncthreads();
    each_logit(s.l, 0, s.v, [&](int i, float l) {
        if (!inside(s, l, bin, fine)) return;
        const uint32_t at = atomicAdd(&sh.members, 1u);
        sh.member[at] = l, sh.member_id[at] = i;
        sh.member_weight[at] = fixed_of(weight_of(s, l));
    });
    __syncthreads();
    const int n = (int)sh.members;
    for (int i = threadIdx.x; i < n; i += THREADS) {
        const float l = sh.member[i];
        const int32_t id = sh.member_id[i];
        uint64_t weight = sh.below, before = 0;
        for (int k = 0; k < n; k++) {
            const float o = sh.member[k];
            if (!(o > l || (o == l && sh.member_id[k] < id))) continue;
            weight += sh.member_weight[k];
            before++;
        }
        const uint64_t own = counts ? 1 : sh.member_weight[i],
                       measure = sh.below_measure + (counts ? before : weight - sh.below);
        if (measure <= bound && bound < measure + own)
            sh.id = id, sh.passed = weight + sh.member_weight[i];
    }
    __syncthreads();
}

/* Order of logits as integers; both zeros are one. */
__device__ __forceinline__ uint32_t key_of(float l)
{
    const uint32_t u = __float_as_uint(l + 0.f);
    return u >> 31 ? ~u : u | 0x80000000u;
}

__device__ static sample_sum sum_from(sample_shared &sh, const sample_view &s, int bin, int fine,
                                      uint32_t key)
{
    sample_sum v = {0, 0};
    each_logit(s.l, 0, s.v, [&](int, float l) {
        if (key_of(l) < key || !inside(s, l, bin, fine)) return;
        v.weight += fixed_of(weight_of(s, l));
        v.count++;
    });
    return block_sum(sh, v);
}

/* Number `nth` of those of one key, in order of ids. */
__device__ static void nth_equal(sample_shared &sh, const sample_view &s, uint32_t key,
                                 uint64_t nth)
{
    const int per = (s.v + THREADS - 1) / THREADS, from = min((int)threadIdx.x * per, s.v),
              to = min(from + per, s.v);
    sample_sum own = {0, 0};
    for (int i = from; i < to; i++) own.count += s.l[i] > -INFINITY && key_of(s.l[i]) == key;
    uint64_t at = block_before(sh, own).count;
    for (int i = from; i < to; i++)
        if (s.l[i] > -INFINITY && key_of(s.l[i]) == key && at++ == nth) sh.id = i;
    __syncthreads();
}

/* Any number inside: the logit at which the sum passes, bit by bit, then its place among equals. */
__device__ static void pass_equals(sample_shared &sh, const sample_view &s, bool counts,
                                   uint64_t bound, int bin, int fine)
{
    const uint64_t below = sh.below, below_measure = sh.below_measure;
    uint32_t key = 0;
    for (int b = 31; b >= 0; b--) {
        const sample_sum v = sum_from(sh, s, bin, fine, key | 1u << b);
        if (below_measure + (counts ? v.count : v.weight) > bound) key |= 1u << b;
    }
    const sample_sum above = sum_from(sh, s, bin, fine, key + 1),
                     with = sum_from(sh, s, bin, fine, key);
    const uint64_t one = (with.weight - above.weight) / (with.count - above.count),
                   left = bound - below_measure - (counts ? above.count : above.weight),
                   nth = counts ? left : left / one;
    nth_equal(sh, s, key, nth);
    if (threadIdx.x == 0) sh.passed = below + above.weight + (nth + 1) * one;
    __syncthreads();
}

/* The id at which the running sum of weights (or of ids) passes `bound`, into sh.id, and the
 * weights up to and with it, into sh.passed. *made: the bins are those of all logits. */
__device__ static void pass_bound(sample_shared &sh, const sample_view &s, const row_bins *all,
                                  bool counts, uint64_t bound, bool *made)
{
    if (!*made) make_bins(sh, s, all, -1);
    *made = true;
    find_bin(sh, counts, bound, 0, 0);
    const int bin = sh.bin;
    int fine = -1;
    if (sh.members > MEMBERS) {
        const uint64_t below = sh.below, measure = sh.below_measure;
        make_bins(sh, s, all, bin);
        *made = false;
        find_bin(sh, counts, bound, below, measure);
        fine = sh.bin;
    }
    if (sh.members > MEMBERS)
        pass_equals(sh, s, counts, bound, bin, fine);
    else
        pass_members(sh, s, counts, bound, bin, fine);
}

/* Steps 1 to 3 for ids [from, to). */
__device__ static void penalize(float *l, int from, int to, const sample_row &r,
                                const sample_bias *bias, int32_t *seen, int32_t *answered)
{
    const auto mine = [&](int id) { return id >= from && id < to; };
    if (threadIdx.x == 0) {
        for (int i = 0; i < r.n_bias; i++)
            if (mine(bias[i].id)) l[bias[i].id] += bias[i].bias;
        if (r.state >= 0 && mine(r.last)) seen[r.last]++, answered[r.last]++;
        if (r.state >= 0 && mine(r.gone)) seen[r.gone]--;
    }
    __syncthreads();
    if (r.state < 0) return;
    const bool counted = r.presence != 0 || r.frequency != 0;
    for (int i = from + threadIdx.x; i < to; i += blockDim.x) {
        float x = l[i];
        if (r.repetition != 1.f && seen[i])
            x = x > 0 ? __fdiv_rn(x, r.repetition) : x * r.repetition;
        if (counted && answered[i])
            x -= (float)__dadd_rn(r.presence, __dmul_rn(r.frequency, (double)answered[i]));
        l[i] = x;
    }
    __syncthreads();
}

/* The larger of two, ties to the lower id; id -1: none. */
__device__ __forceinline__ void take_larger(float *top, int32_t *id, float o, int32_t oid)
{
    if (oid >= 0 && (*id < 0 || o > *top || (o == *top && oid < *id))) *top = o, *id = oid;
}
__device__ __forceinline__ void warp_larger(float *top, int32_t *id)
{
    for (int x = 16; x; x >>= 1)
        take_larger(top, id, __shfl_xor_sync(~0u, *top, x), __shfl_xor_sync(~0u, *id, x));
}

__global__ void __launch_bounds__(PART_THREADS) sample_top_kernel(sample_call c)
{
    __shared__ float tops[PART_THREADS / 32];
    __shared__ int32_t ids[PART_THREADS / 32];
    const int from = blockIdx.x * c.part, to = min(from + c.part, c.v), lane = threadIdx.x & 31;
    float *l = c.logits + blockIdx.y * c.ld, top = -INFINITY;
    row_bins *b = c.bins + blockIdx.y;
    int32_t id = -1;
    pdl_launch();
    pdl_wait();
    const sample_row r = c.rows[blockIdx.y];
    if (!r.wanted) return;
    for (int i = blockIdx.x * PART_THREADS + threadIdx.x; i < BINS; i += gridDim.x * PART_THREADS)
        b->weight[i] = 0, b->count[i] = 0;
    int32_t *seen = c.counts + (int64_t)max(r.state, 0) * 2 * c.v;
    penalize(l, from, to, r, c.bias + (int64_t)blockIdx.y * SAMPLE_MAX_BIAS, seen, seen + c.v);
    each_logit(l, from, to, [&](int i, float x) { take_larger(&top, &id, x, i); });
    warp_larger(&top, &id);
    if (lane == 0) tops[threadIdx.x >> 5] = top, ids[threadIdx.x >> 5] = id;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    const bool there = lane < PART_THREADS / 32;
    top = there ? tops[lane] : -INFINITY, id = there ? ids[lane] : -1;
    warp_larger(&top, &id);
    if (lane == 0) b->top[blockIdx.x] = top, b->id[blockIdx.x] = id;
}

/* The row's largest logit and its id out of those of `parts`. All lanes of a warp call. */
__device__ __forceinline__ void row_largest(const row_bins *b, int parts, float *top, int32_t *id)
{
    const int lane = threadIdx.x & 31;
    *top = lane < parts ? b->top[lane] : -INFINITY, *id = lane < parts ? b->id[lane] : -1;
    warp_larger(top, id);
}

__device__ __forceinline__ sample_view view_of(const sample_call &c, const sample_row &r, float top,
                                               int row, const double *table)
{
    return sample_view{c.logits + row * c.ld, c.v,  top, (float)(BINS / NATS / r.temperature),
                       1 / r.temperature,     table};
}

__global__ void __launch_bounds__(PART_THREADS) sample_bins_kernel(sample_call c)
{
    __shared__ uint64_t weight[BINS];
    __shared__ uint32_t count[BINS];
    __shared__ double table[STEPS];
    const int from = blockIdx.x * c.part, to = min(from + c.part, c.v);
    row_bins *b = c.bins + blockIdx.y;
    float top;
    int32_t id;
    pdl_launch();
    fill_table(table);
    for (int i = threadIdx.x; i < BINS; i += PART_THREADS) weight[i] = 0, count[i] = 0;
    pdl_wait();
    const sample_row r = c.rows[blockIdx.y];
    if (!r.wanted || !(r.temperature > 0)) return;
    row_largest(b, gridDim.x, &top, &id);
    __syncthreads();
    add_bins(weight, count, view_of(c, r, top, blockIdx.y, table), from, to, -1);
    __syncthreads();
    for (int i = threadIdx.x; i < BINS; i += PART_THREADS) {
        if (!count[i]) continue;
        atomicAdd(&b->count[i], count[i]);
        if (weight[i])
            atomicAdd((unsigned long long *)&b->weight[i], (unsigned long long)weight[i]);
    }
}

/* Weights that min-p leaves. Bins are far finer than what the bound of one can be off by. */
__device__ static uint64_t above_least(sample_shared &sh, const sample_view &s, const row_bins *all,
                                       double least)
{
    const int edge = (int)fmin(-log(least) * (BINS / NATS), (double)(BINS - 1));
    sample_sum v = {0, 0};
    for (int i = threadIdx.x; i < edge - 1; i += THREADS) v.weight += all->weight[i];
    each_logit(s.l, 0, s.v, [&](int, float l) {
        const int bin = (int)depth_of(s, l);
        if (bin < edge - 1 || bin > edge + 1) return;
        const double w = weight_of(s, l);
        if (w >= least) v.weight += fixed_of(w);
    });
    return block_sum(sh, v).weight;
}

/* Steps 5 to 9. What top-k, top-p and min-p leave is the beginning of one order: the shortest has
 * the least weight. */
__device__ static int32_t draw(sample_shared &sh, const sample_view &s, const row_bins *bins,
                               const sample_row &r)
{
    bool made = true;
    make_bins(sh, s, bins, -1);
    sample_sum all = {0, 0};
    for (int i = threadIdx.x; i < BINS; i += THREADS)
        all.weight += sh.weight[i], all.count += sh.count[i];
    all = block_sum(sh, all);
    uint64_t left = all.weight;
    if (r.top_k > 0 && (uint32_t)r.top_k < all.count) {
        pass_bound(sh, s, bins, true, (uint64_t)r.top_k - 1, &made);
        left = sh.passed;
    }
    const uint64_t whole = left;
    if (r.top_p < 1) {
        const uint64_t enough = (uint64_t)ceil(r.top_p * (double)whole);
        const uint64_t bound = enough > whole ? whole - 1 : enough ? enough - 1 : 0;
        pass_bound(sh, s, bins, false, bound, &made);
        left = min(left, sh.passed);
    }
    if (r.min_p > 0) left = min(left, above_least(sh, s, bins, r.min_p));
    const uint64_t at = (uint64_t)(r.u * (double)left);
    pass_bound(sh, s, bins, false, at < left ? at : left - 1, &made);
    return sh.id;
}

__global__ void __launch_bounds__(THREADS) sample_kernel(sample_call c, int parts)
{
    __shared__ sample_shared sh;
    const int row = blockIdx.x;
    float top;
    int32_t id;
    pdl_launch();
    fill_table(sh.table);
    pdl_wait();
    const sample_row r = c.rows[row];
    if (!r.wanted) return;
    row_largest(c.bins + row, parts, &top, &id);
    if (r.temperature > 0 && id >= 0)
        id = draw(sh, view_of(c, r, top, row, sh.table), c.bins + row, r);
    if (threadIdx.x == 0) c.ids[row] = id;
}

extern "C" {

size_t sample_scratch_cuda(const op_limits *lim)
{
    const size_t rows = lim->rows < RESERVE_ROWS ? (size_t)lim->rows : RESERVE_ROWS;
    return rows * sizeof(row_bins);
}

err_code sample_cuda(device *d, tensor *ids, tensor *logits, const tensor *rows, const tensor *bias,
                     tensor *counts, err *e)
{
    const int64_t m = logits->shape[0], v = logits->shape[1];
    sample_call c = {};
    void *work;
    TRY(dev_scratch(d, &work, sizeof(row_bins), "sample", e));
    int64_t most = (int64_t)(d->shared_bytes / sizeof(row_bins)), parts = v / PART_IDS;
    if (most > 65535) most = 65535;
    parts = parts < 1 ? 1 : parts > MAX_PARTS ? MAX_PARTS : parts;
    c.bins = (row_bins *)work;
    c.counts = (int32_t *)counts->data;
    c.ld = logits->stride[0], c.v = (int)v, c.part = (int)((v + parts - 1) / parts);
    for (int64_t i = 0; i < m; i += most) {
        const unsigned n = (unsigned)(m - i < most ? m - i : most);
        const dim3 grid((unsigned)parts, n);
        c.logits = (float *)logits->data + i * c.ld;
        c.ids = (int32_t *)ids->data + i;
        c.rows = (const sample_row *)rows->data + i;
        c.bias = (const sample_bias *)bias->data + i * SAMPLE_MAX_BIAS;
        TRY(cuda_launch(d, "sample", sample_top_kernel, grid, dim3(PART_THREADS), 0, e, c));
        TRY(cuda_launch(d, "sample", sample_bins_kernel, grid, dim3(PART_THREADS), 0, e, c));
        TRY(cuda_launch(d, "sample", sample_kernel, dim3(n), dim3(THREADS), 0, e, c, (int)parts));
    }
    return OK;
}

} /* extern "C" */
