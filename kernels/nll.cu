/* Losses and best ids: each logit is read once. A thread goes over its fours of logits, BATCH of
 * them on their way at once, and keeps the largest, its id and the sum of e to all of them less the
 * largest. Warps leave that with the first block of their row's cluster, which adds it up in a
 * fixed order. */
#include "kernels/device_cuda.cuh"

#define THREADS 512
#define WARPS   (THREADS / 32)
#define BATCH   8
#define BLOCKS  2 /* for which a multiprocessor has registers */
#define PARTS   8 /* blocks of a row where they can reach each other's memory, at most */

typedef struct __align__(16)
{
    float top, sum;
    int32_t id, none;
}
nll_part;

__device__ __forceinline__ nll_part nll_none()
{
    const nll_part p = {-INFINITY, 0.f, 0, 0};
    return p;
}

/* e^x of what is not above 0; tiny results are 0. */
__device__ __forceinline__ float nll_exp(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.44269504f));
    return y;
}

/* What two parts come to, the same in either order; ties to the lower id. */
__device__ __forceinline__ nll_part nll_both(const nll_part &a, const nll_part &b)
{
    const bool swap = (b.top > a.top) | ((b.top == a.top) & (b.id < a.id));
    const float top = swap ? b.top : a.top, low = swap ? a.top : b.top, sum = swap ? b.sum : a.sum,
                add = swap ? a.sum : b.sum, e = nll_exp(low - top);
    const nll_part p = {top, fmaf(add, low == top ? 1.f : e, sum), swap ? b.id : a.id, 0};
    return p;
}

/* Of the lanes of a warp, for all of them. */
__device__ __forceinline__ nll_part nll_warp(nll_part p)
{
#pragma unroll
    for (int i = 16; i; i >>= 1) {
        const nll_part o = {__shfl_xor_sync(~0u, p.top, i), __shfl_xor_sync(~0u, p.sum, i),
                            __shfl_xor_sync(~0u, p.id, i), 0};
        p = nll_both(p, o);
    }
    return p;
}

/* Four `i` of a row, where there is one before `end`; whether rows are aligned changes no result.
 */
template <bool ALIGNED> __device__ __forceinline__ float4 nll_four(const float *row, int i, int end)
{
    if (i >= end) return make_float4(-INFINITY, -INFINITY, -INFINITY, -INFINITY);
    if (ALIGNED) return ((const float4 *)row)[i];
    return make_float4(row[4 * i], row[4 * i + 1], row[4 * i + 2], row[4 * i + 3]);
}

/* N fours more, `step` apart from four `first` on; from `end` on there are none. A NaN is never the
 * largest, and makes the sum one. Until nll_id, the id is that of the four. */
template <int N>
__device__ __forceinline__ void nll_take(nll_part *p, const float4 (&f)[N], int first, int step,
                                         int end)
{
    float m[N], top = p->top;
#pragma unroll
    for (int j = 0; j < N; j++) {
        m[j] = fmaxf(fmaxf(f[j].x, f[j].y), fmaxf(f[j].z, f[j].w));
        top = fmaxf(top, m[j]);
    }
    if (top > p->top) {
        p->sum *= nll_exp(p->top - top);
        p->top = top;
#pragma unroll
        for (int j = N - 1; j >= 0; j--) /* the first of equals last */
            if (m[j] == top) p->id = first + j * step;
    }
    const float base = top == -INFINITY ? 0.f : top;
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (first + j * step >= end) break;
        p->sum += (nll_exp(f[j].x - base) + nll_exp(f[j].y - base)) +
                  (nll_exp(f[j].z - base) + nll_exp(f[j].w - base));
    }
}

/* From the first of its four that is the largest. */
__device__ __forceinline__ void nll_id(nll_part *p, const float *row, int v)
{
    const int first = 4 * p->id;
    p->id = 0;
#pragma unroll
    for (int j = 3; j >= 0; j--) {
        const int id = min(first + j, v - 1);
        if (row[id] == p->top) p->id = id;
    }
}

/* Fours from..to and, with `rest`, the logits behind all fours: what one thread has of them. */
template <bool ALIGNED>
__device__ __forceinline__ nll_part nll_of(const float *row, int v, int from, int to, bool rest)
{
    nll_part p = nll_none();
#pragma unroll 1
    for (int i = from + (int)threadIdx.x; i < to; i += THREADS * BATCH) {
        float4 f[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; j++) f[j] = nll_four<ALIGNED>(row, i + j * THREADS, to);
        nll_take(&p, f, i, THREADS, to);
    }
    const int i = v / 4, at = 4 * i;
    if (rest && at < v && threadIdx.x == THREADS - 1) {
        const float4 f[1] = {{row[at], at + 1 < v ? row[at + 1] : -INFINITY,
                              at + 2 < v ? row[at + 2] : -INFINITY, -INFINITY}};
        nll_take(&p, f, i, 1, i + 1);
    }
    nll_id(&p, row, v);
    return p;
}

/* ---- where the parts of a row meet: in the memory of the first block of its cluster ---- */

typedef struct {
    nll_part part[PARTS * WARPS];
    uint64_t full;
} nll_meeting;

/* By all threads, long before the others: blocks tell each other that they are there. */
__device__ __forceinline__ void meet_open(nll_meeting *m, int n)
{
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x == 0) {
        mbar_init(&m->full, 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(&m->full)),
            "r"(n * (int)sizeof(nll_part))
            : "memory");
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
/* By all threads: what lane 0 has becomes part i. */
__device__ __forceinline__ void meet_leave(nll_meeting *m, int i, const nll_part &p)
{
    const bool mine = threadIdx.x % 32 == 0;
#if __CUDA_ARCH__ >= 900
    uint32_t to, bar;
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(to) : "r"(smem_addr(&m->part[i])));
    asm("mapa.shared::cluster.u32 %0, %1, 0;" : "=r"(bar) : "r"(smem_addr(&m->full)));
    if (mine)
        asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, "
                     "%3, %4}, [%5];" ::"r"(to),
                     "r"(__float_as_uint(p.top)), "r"(__float_as_uint(p.sum)), "r"(p.id),
                     "r"(p.none), "r"(bar)
                     : "memory");
#else
    if (mine) m->part[i] = p;
#endif
}
/* By all threads of the first block. */
__device__ __forceinline__ void meet_wait(nll_meeting *m)
{
#if __CUDA_ARCH__ >= 900
    mbar_wait(&m->full, 0);
#else
    __syncthreads();
#endif
}

/* A row by `parts` blocks, a cluster. */
__global__ void __launch_bounds__(THREADS, BLOCKS)
    nll_kernel(float *nll, int32_t *best, const float *logits, int64_t ld, const int32_t *target,
               int v, int parts)
{
    __shared__ nll_meeting met;
    const int rank = (int)blockIdx.x % parts, at = (int)blockIdx.x / parts, n = parts * WARPS,
              lane = (int)threadIdx.x & 31, warp = (int)threadIdx.x >> 5, fours = v / 4,
              share = (fours + parts - 1) / parts, from = min(rank * share, fours),
              to = min(from + share, fours);
    const float *row = logits + at * ld;
    const bool last = rank == parts - 1;
    meet_open(&met, n);
    pdl_launch();
    pdl_wait();
    const int id = target[at];
    nll_part p = ((uintptr_t)logits | (uintptr_t)(ld * 4)) % 16 == 0
                     ? nll_of<true>(row, v, from, to, last)
                     : nll_of<false>(row, v, from, to, last);
    const float wanted = row[id]; /* on its way while the parts meet */
    meet_leave(&met, rank * WARPS + warp, nll_warp(p));
    if (rank) return;
    meet_wait(&met);
    if (warp) return;
    p = nll_none();
#pragma unroll 1
    for (int i = lane; i < n; i += 32) p = nll_both(p, met.part[i]);
    p = nll_warp(p);
    if (lane) return;
    nll[at] = p.top + logf(p.sum) - wanted;
    if (best) best[at] = p.id;
}

/* Blocks of a row: no more in all than multiprocessors, as measured (docs/perf.md), but two, as one
 * is no cluster to store to. A row's sum depends on it, so it is not for devices whose rows round
 * alike. */
static int nll_parts(const device *d, int64_t rows)
{
    const cuda_state *s = cuda_of(d);
    int parts = s->sm >= 90 ? PARTS : 1;
    while (!d->deterministic && parts > 2 && rows * parts > s->sms) parts /= 2;
    return parts;
}

extern "C" err_code nll_cuda(device *d, tensor *nll, tensor *argmax, const tensor *logits,
                             const tensor *target, err *e)
{
    const int parts = nll_parts(d, logits->shape[0]);
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[2];
    TRY(cuda_pass_flush(d, e));
    cfg.gridDim = dim3((unsigned)(logits->shape[0] * parts));
    cfg.blockDim = dim3(THREADS);
    cfg.stream = cuda_of(d)->stream;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    attr[1].id = cudaLaunchAttributeClusterDimension;
    attr[1].val.clusterDim.x = (unsigned)parts;
    attr[1].val.clusterDim.y = attr[1].val.clusterDim.z = 1;
    cfg.attrs = attr;
    cfg.numAttrs = cuda_of(d)->sm >= 90 ? 2 : 0;
    return cuda_launched(d, "nll",
                         cudaLaunchKernelEx(&cfg, nll_kernel, (float *)nll->data,
                                            argmax ? (int32_t *)argmax->data : (int32_t *)NULL,
                                            (const float *)logits->data, logits->stride[0],
                                            (const int32_t *)target->data, (int)logits->shape[1],
                                            parts),
                         e);
}
