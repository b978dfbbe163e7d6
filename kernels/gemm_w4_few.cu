/* W4A16 for few rows: every weight is read once, at the speed of memory.
 *
 * Activations become 16-bit fixed point, one scale for 128 of them, kept as two planes of 8 bits;
 * codes are 8-bit integers after one mask. An integer mma then gives the exact product of codes
 * and both planes, and costs a third of the instructions that f16 codes cost. The planes of a
 * token are neighbouring columns, so that one thread holds both sums.
 * Persistent blocks walk tiles of 16 outputs. A producer warp streams the tiles through a ring in
 * shared memory with bulk copies; it starts before the dependency wait, because weights belong to
 * no earlier kernel, and the ring is small enough for the next kernel's blocks to sit beside ours
 * and fill theirs: the stream does not stop between kernels. Consumer warps split k; sums meet in
 * shared memory in a fixed order. */
#include "kernels/gemm_w4.cuh"

/* ---- activations ---- */
__global__ void __launch_bounds__(128)
    w4_planes_kernel(w4_planes_out o, const __half *x, int m, int k, int ldx)
{
    const int lane = threadIdx.x & 31, token = blockIdx.y * 4 + (threadIdx.x >> 5),
              unit = blockIdx.x;
    const int at = unit * 128 + lane * 4;
    pdl_launch();
    pdl_wait();
    if (token >= m) return;
    float v[4] = {};
    if (at < k) {
        const uint2 raw = *(const uint2 *)(x + (size_t)token * ldx + at);
        const float2 a = __half22float2(*(const __half2 *)&raw.x),
                     b = __half22float2(*(const __half2 *)&raw.y);
        v[0] = a.x, v[1] = a.y, v[2] = b.x, v[3] = b.y;
    }
    w4_store_planes(o, unit, token, v, lane);
}

/* Loads that stay where they are written: compilers move ordinary ones behind the products that
 * they should overlap with. */
__device__ __forceinline__ uint4 load_here(const uint4 *p)
{
    uint4 v;
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
__device__ __forceinline__ float load_here(const float *p)
{
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}

/* Planes and scales of one unit for 4 tokens, as a lane needs them. */
template <int GROUP> struct unit_x {
    uint4 b[2];
    float s[1 + 128 / GROUP];
};

template <int GROUP>
__device__ __forceinline__ void load_x(unit_x<GROUP> *x, const uint8_t *planes, const float *scales,
                                       int at, int lane)
{
    const uint4 *p = (const uint4 *)(planes + (size_t)at * 1024) + lane;
    const float *s = scales + ((size_t)at * 4 + (lane & 3)) * (1 + 128 / GROUP);
    x->b[0] = load_here(p), x->b[1] = load_here(p + 32);
#pragma unroll
    for (int i = 0; i < 1 + 128 / GROUP; i++) x->s[i] = load_here(s + i);
}

/* R tiles of one unit, ready for the integer mma. */
template <int R, int GROUP> struct unit_w {
    uint32_t a[R][4][4];
    uint2 p[R][128 / GROUP];
};

template <int R, int GROUP>
__device__ __forceinline__ void load_w(unit_w<R, GROUP> *w, const uint8_t *unit, int stride,
                                       int lane)
{
#pragma unroll
    for (int r = 0; r < R; r++) {
        const uint4 *codes = (const uint4 *)(unit + r * stride) + lane;
        const uint2 *params = (const uint2 *)(unit + r * stride + 1024) + (lane >> 2);
        const uint4 q[2] = {codes[0], codes[32]};
#pragma unroll
        for (int h = 0; h < 4; h++) { /* steps of 32 inputs */
            const uint32_t w0 = (&q[h / 2].x)[(h & 1) * 2], w1 = (&q[h / 2].x)[(h & 1) * 2 + 1];
            w->a[r][h][0] = w0 & 0x0f0f0f0fu, w->a[r][h][1] = w0 >> 4 & 0x0f0f0f0fu;
            w->a[r][h][2] = w1 & 0x0f0f0f0fu, w->a[r][h][3] = w1 >> 4 & 0x0f0f0f0fu;
        }
#pragma unroll
        for (int i = 0; i < 128 / GROUP; i++) w->p[r][i] = params[i * 8];
    }
}

/* acc[r][0]: row g of token t, acc[r][1]: row g + 8, of tile r. */
template <int R, int GROUP>
__device__ __forceinline__ void mul_unit(float (*acc)[2], int stride, const unit_w<R, GROUP> &w,
                                         const unit_x<GROUP> &x)
{
    int part[R][4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
        if (h * 32 % GROUP == 0)
#pragma unroll
            for (int i = 0; i < R * 4; i++) (&part[0][0])[i] = 0;
#pragma unroll
        for (int r = 0; r < R; r++)
            mma_u8s8(part[r], w.a[r][h], (&x.b[h / 2].x)[(h & 1) * 2],
                     (&x.b[h / 2].x)[(h & 1) * 2 + 1]);
        if ((h * 32 + 32) % GROUP == 0)
#pragma unroll
            for (int r = 0; r < R; r++) {
                const uint2 p = w.p[r][h * 32 / GROUP];
                const float2 p0 = __half22float2(*(const __half2 *)&p.x),
                             p1 = __half22float2(*(const __half2 *)&p.y);
                const float sum = x.s[1 + h * 32 / GROUP];
                float *o = acc[r * stride];
                o[0] += p0.x * x.s[0] * ((float)(part[r][0] * 256 + part[r][1]) - p0.y * sum);
                o[1] += p1.x * x.s[0] * ((float)(part[r][2] * 256 + part[r][3]) - p1.y * sum);
            }
    }
}

/* Row `row` (0..7) and row + 8 of a tile, one token. */
__device__ __forceinline__ void store_pair(const w4_tiles &w, const w4_call &c, int tile, int row,
                                           int col, float v0, float v1)
{
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int o = w4_row(w.n, w.paired, tile, row + 8 * i);
        float v = i ? v1 : v0;
        if (o >= w.n) continue;
        const size_t at = (size_t)col * c.ldy + o;
        if (w.bias) v += __half2float(w.bias[o]);
        if (c.wide)
            ((float *)c.y)[at] = c.add ? ((float *)c.y)[at] + v : v;
        else {
            if (c.add) v += __half2float(((__half *)c.y)[at]);
            ((__half *)c.y)[at] = __float2half_rn(v);
        }
    }
}

/* How a product of NT tiles of 4 tokens is cut: R tiles of 16 outputs a warp, which share what it
 * reads of activations; CW warps that multiply; a ring of STAGES slabs of SU units each; BLOCKS of
 * a multiprocessor. More tokens want more outputs a warp, while there is a tile for everybody. */
template <int NT_, int R_, int CW_, int STAGES_, int SU_, int BLOCKS_> struct few_cut {
    static constexpr int NT = NT_, R = R_, CW = CW_, STAGES = STAGES_, SU = SU_, BLOCKS = BLOCKS_;
    static constexpr int SUMS = R * NT * 64;      /* of a warp */
    static constexpr int AHEAD = NT < 8 ? NT : 2; /* tiles of tokens whose planes are loaded */
    static constexpr bool TWICE = NT * R <= 4;    /* sums of two turns fit */
};
template <class C, int GROUP> struct few_ring {
    static constexpr int UNIT = 1024 + 64 * (128 / GROUP), STAGE = C::SU * C::R * UNIT;
};

/* One thread: slab after slab of the block's tiles into the ring. */
template <class C, int GROUP>
__device__ __forceinline__ void few_produce(uint8_t *ring, uint64_t *full, uint64_t *empty,
                                            const w4_tiles &w)
{
    typedef few_ring<C, GROUP> S;
    const int slabs = (w.units + C::SU - 1) / C::SU, items = (w.tiles + C::R - 1) / C::R;
    int slot = 0, round = 0;
    for (int item = blockIdx.x; item < items; item += gridDim.x)
        for (int s = 0; s < slabs; s++) {
            if (round) mbar_wait(&empty[slot], (round - 1) & 1);
            const int first = s * C::SU, n = min(C::SU, w.units - first);
            for (int r = 0; r < C::R; r++) {
                const int tile = min(item * C::R + r, w.tiles - 1); /* an odd last one again */
                bulk_load(ring + slot * S::STAGE + r * C::SU * S::UNIT,
                          w.data + ((size_t)tile * w.units + first) * S::UNIT, n * S::UNIT,
                          &full[slot]);
            }
            if (++slot == C::STAGES) slot = 0, round++;
        }
}

/* One warp's units of a slab that begins with unit `first`. Behind each product planes to come take
 * the place of those just used: their way takes as long as the products of AHEAD - 1 tiles. */
template <class C, int GROUP>
__device__ __forceinline__ void few_slab(float (*acc)[2], unit_x<GROUP> x[C::AHEAD],
                                         const uint8_t *slab, const w4_call &c, int units,
                                         int first, int warp, int lane)
{
    typedef few_ring<C, GROUP> S;
#pragma unroll
    for (int u = 0; u < C::SU; u += C::CW) {
        const int at = first + u + warp, then = at + C::CW < units ? at + C::CW : warp;
        if (at >= units) break;
        unit_w<C::R, GROUP> uw;
        load_w<C::R, GROUP>(&uw, slab + (u + warp) * S::UNIT, C::SU * S::UNIT, lane);
#pragma unroll
        for (int b = 0; b < C::NT; b++) {
            const int next = b + C::AHEAD;
            mul_unit<C::R, GROUP>(acc + b, C::NT, uw, x[b % C::AHEAD]);
            load_x<GROUP>(&x[b % C::AHEAD], c.planes, c.scales,
                          next < C::NT ? at * C::NT + next : then * C::NT + next - C::NT, lane);
        }
    }
}

template <class C> __device__ __forceinline__ void few_meet() /* the warps that multiply */
{
    asm volatile("bar.sync 1, %0;" ::"n"(C::CW * 32) : "memory");
}

/* The warps' sums of one item, [CW][R * NT][2][32 lanes], added up and stored. */
template <class C>
__device__ __forceinline__ void few_finish(const w4_tiles &w, const w4_call &c, const float *sum,
                                           int item)
{
    for (int p = threadIdx.x; p < C::R * C::NT * 32; p += C::CW * 32) {
        const int l = p & 31, b = p >> 5, col = b % C::NT * 4 + (l & 3),
                  tile = item * C::R + b / C::NT;
        float v0 = 0.f, v1 = 0.f;
        if (col >= c.m || tile >= w.tiles) continue;
#pragma unroll
        for (int k = 0; k < C::CW; k++) {
            v0 += sum[k * C::SUMS + b * 64 + l];
            v1 += sum[k * C::SUMS + b * 64 + 32 + l];
        }
        store_pair(w, c, tile, l >> 2, col, v0, v1);
    }
}

/* The call of this block's chunk of W4_CHUNK tokens. */
template <class C, int GROUP>
__device__ __forceinline__ w4_call few_chunk(w4_call c, int units, int chunk)
{
    c.m = min(c.m - chunk * W4_CHUNK, W4_CHUNK);
    c.planes += (size_t)chunk * units * C::NT * 1024;
    c.scales += (size_t)chunk * units * C::NT * 4 * (1 + 128 / GROUP);
    const size_t row = (size_t)chunk * W4_CHUNK * c.ldy;
    c.y = c.wide ? (void *)((float *)c.y + row) : (void *)((__half *)c.y + row);
    return c;
}

template <class C, int GROUP>
__device__ __forceinline__ void few_consume(const uint8_t *ring, float *sums, uint64_t *full,
                                            uint64_t *empty, const w4_tiles &w, const w4_call &c)
{
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int slot = 0, round = 0, turn = 0;
    unit_x<GROUP> x[C::AHEAD];
    pdl_wait();
    if (warp < w.units)
#pragma unroll
        for (int b = 0; b < C::AHEAD; b++)
            load_x<GROUP>(&x[b], c.planes, c.scales, warp * C::NT + b, lane);
    for (int item = blockIdx.x; item * C::R < w.tiles; item += gridDim.x) {
        float acc[C::R * C::NT][2] = {};
        for (int first = 0; first < w.units; first += C::SU) {
            mbar_wait(&full[slot], round & 1);
            few_slab<C, GROUP>(acc, x, ring + slot * few_ring<C, GROUP>::STAGE, c, w.units, first,
                               warp, lane);
            __syncwarp();
            if (lane == 0) mbar_arrive(&empty[slot]);
            if (++slot == C::STAGES) slot = 0, round++;
        }
        float *sum = sums + (C::TWICE ? turn : 0) * C::CW * C::SUMS;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < C::R * C::NT * 2; i++)
            sum[warp * C::SUMS + i * 32 + lane] = (&acc[0][0])[i];
        few_meet<C>();
        few_finish<C>(w, c, sum, item);
        if (!C::TWICE) few_meet<C>();
    }
}

/* blockIdx.y is the chunk of tokens; chunks walk the weights together, so that the second reads
 * them from L2. Dynamic memory: the ring [STAGES][R][SU][unit], then sums[1 or 2][CW][SUMS]. */
template <class C, int GROUP>
__global__ void __launch_bounds__((C::CW + 1) * 32, C::BLOCKS)
    gemm_w4_few_kernel(w4_tiles w, w4_call c)
{
#if __CUDA_ARCH__ >= 900
    extern __shared__ __align__(128) uint8_t ring[];
    __shared__ uint64_t full[C::STAGES], empty[C::STAGES];
    pdl_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < C::STAGES; i++) mbar_init(&full[i], C::R), mbar_init(&empty[i], C::CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (threadIdx.x < C::CW * 32)
        few_consume<C, GROUP>(ring, (float *)(ring + C::STAGES * few_ring<C, GROUP>::STAGE), full,
                              empty, w, few_chunk<C, GROUP>(c, w.units, blockIdx.y));
    else if (threadIdx.x == C::CW * 32)
        few_produce<C, GROUP>(ring, full, empty, w);
#endif
}

template <class C, int GROUP>
static cudaError_t launch_few(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t stream,
                              bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const int smem = C::STAGES * few_ring<C, GROUP>::STAGE +
                     (C::TWICE ? 2 : 1) * C::CW * C::SUMS * (int)sizeof(float);
    const cudaError_t rc = cudaFuncSetAttribute(gemm_w4_few_kernel<C, GROUP>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (rc != cudaSuccess) return rc;
    const int chunks = w4_chunks(c->m), items = (w->tiles + C::R - 1) / C::R,
              most = C::BLOCKS * sms / chunks;
    cfg.gridDim = dim3((unsigned)(items < most ? items : most), (unsigned)chunks);
    cfg.blockDim = dim3((C::CW + 1) * 32);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, gemm_w4_few_kernel<C, GROUP>, *w, *c);
}

/* Whether items of r tiles fill two blocks a multiprocessor, or nearly. */
static bool enough(const w4_tiles *w, int r, int sms) { return w->tiles >= r * sms * 9 / 5; }

/* Which cut, by what was measured (docs/perf.md). `alike`: sums in the same order whatever m is,
 * which is that of eight warps that take a unit each in turn. */
template <int GROUP>
static cudaError_t few_group(const w4_tiles *w, const w4_call *c, int sms, bool alike,
                             cudaStream_t s, bool pdl)
{
    const bool two = enough(w, 2, sms);
    switch (w4_token_tiles(c->m)) {
    case 1:
        if (w->units <= 16 && two)
            return launch_few<few_cut<1, 2, 8, 3, 8, 2>, GROUP>(w, c, sms, s, pdl);
        if (alike) return launch_few<few_cut<1, 1, 8, 3, 16, 2>, GROUP>(w, c, sms, s, pdl);
        return launch_few<few_cut<1, 1, 12, 4, 12, 2>, GROUP>(w, c, sms, s, pdl);
    case 2:
        if (two) return launch_few<few_cut<2, 2, 8, 3, 8, 2>, GROUP>(w, c, sms, s, pdl);
        return launch_few<few_cut<2, 1, 8, 3, 16, 2>, GROUP>(w, c, sms, s, pdl);
    case 4:
        if (enough(w, 3, sms) && !alike)
            return launch_few<few_cut<4, 3, 4, 3, 4, 2>, GROUP>(w, c, sms, s, pdl);
        return launch_few<few_cut<4, 2, 8, 4, 8, 1>, GROUP>(w, c, sms, s, pdl);
    default: return launch_few<few_cut<8, 2, 8, 6, 8, 1>, GROUP>(w, c, sms, s, pdl);
    }
}

cudaError_t gemm_w4_few(const w4_tiles *w, const w4_call *c, int sms, bool alike,
                        cudaStream_t stream, bool pdl)
{
    if (w->group == 128) return few_group<128>(w, c, sms, alike, stream, pdl);
    if (w->group == 64) return few_group<64>(w, c, sms, alike, stream, pdl);
    return few_group<32>(w, c, sms, alike, stream, pdl);
}

cudaError_t gemm_w4_planes(const w4_tiles *w, const w4_call *c, cudaStream_t stream, bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const w4_planes_out o = {c->planes, c->scales, w4_token_tiles(c->m), w->group, w->units};
    cfg.gridDim = dim3((unsigned)w->units, (unsigned)(c->m + 3) / 4);
    cfg.blockDim = dim3(128);
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, w4_planes_kernel, o, c->x, c->m, w->k, c->ldx);
}
