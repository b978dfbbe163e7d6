/* W4A16 for few rows: every weight is read once, at the speed of memory.
 *
 * Activations become 16-bit fixed point, one scale for 128 of them, kept as two planes of 8 bits;
 * codes are 8-bit integers after one mask. An integer mma then gives the exact product of codes
 * and both planes, and costs a third of the instructions that f16 codes cost. The planes of a
 * token are neighbouring columns, so that one thread holds both sums.
 * One persistent block a multiprocessor walks tiles of 16 outputs. A producer warp streams the
 * tiles through a ring in shared memory with bulk copies; it starts before the dependency wait,
 * because weights belong to no earlier kernel, and the ring is small enough for the next kernel's
 * blocks to sit beside ours and fill theirs: the stream does not stop between kernels. Consumer
 * warps split k; sums meet in shared memory in a fixed order that does not depend on m. */
#include "kernels/gemm_w4.cuh"

#define STAGE_UNITS 16

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
    x->b[0] = p[0];
    x->b[1] = p[32];
#pragma unroll
    for (int i = 0; i < 1 + 128 / GROUP; i++) x->s[i] = s[i];
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

/* NT tiles of 4 tokens, R tiles of 16 outputs a warp: more tokens read more activations, which R
 * tiles share. blockIdx.y is the chunk of W4_CHUNK tokens; chunks walk the weights together, so
 * the second reads them from L2. */
template <int NT, int R, int GROUP, int CW, int STAGES>
__global__ void __launch_bounds__((CW + 1) * 32, NT > 4 ? 1 : 2)
    gemm_w4_few_kernel(w4_tiles w, w4_call c)
{
#if __CUDA_ARCH__ >= 900
    constexpr int UNIT = 1024 + 64 * (128 / GROUP), SU = STAGE_UNITS / R,
                  STAGE = STAGE_UNITS * UNIT;
    constexpr bool TWICE = NT * R <= 4; /* sums of two turns fit */
    extern __shared__ __align__(128)
        uint8_t ring[]; /* [STAGES][R][SU][UNIT], then sums[1 or 2][CW][R*NT*64] */
    __shared__ uint64_t full[STAGES], empty[STAGES];
    float *sums = (float *)(ring + STAGES * STAGE);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int slabs = (w.units + SU - 1) / SU, items = (w.tiles + R - 1) / R;

    pdl_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbar_init(&full[i], R), mbar_init(&empty[i], CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == CW) { /* producer */
        if (lane) return;
        int slot = 0, round = 0;
        for (int item = blockIdx.x; item < items; item += gridDim.x)
            for (int s = 0; s < slabs; s++) {
                if (round) mbar_wait(&empty[slot], (round - 1) & 1);
                const int first = s * SU, n = min(SU, w.units - first);
                for (int r = 0; r < R; r++) {
                    const int tile = min(item * R + r, w.tiles - 1); /* an odd last one twice */
                    bulk_load(ring + slot * STAGE + r * SU * UNIT,
                              w.data + ((size_t)tile * w.units + first) * UNIT, n * UNIT,
                              &full[slot]);
                }
                if (++slot == STAGES) slot = 0, round++;
            }
        return;
    }
    int slot = 0, round = 0, turn = 0;
    const int m = min(c.m - (int)blockIdx.y * W4_CHUNK, W4_CHUNK);
    const uint8_t *planes = c.planes + (size_t)blockIdx.y * w.units * NT * 1024;
    const float *scales = c.scales + (size_t)blockIdx.y * w.units * NT * 4 * (1 + 128 / GROUP);
    w4_call out = c;
    if (c.wide)
        out.y = (float *)c.y + (size_t)blockIdx.y * W4_CHUNK * c.ldy;
    else
        out.y = (__half *)c.y + (size_t)blockIdx.y * W4_CHUNK * c.ldy;
    unit_x<GROUP> x, next;
    pdl_wait();
    if (warp < w.units) load_x<GROUP>(&x, planes, scales, warp * NT, lane);
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        float acc[R * NT][2] = {};
        for (int s = 0; s < slabs; s++) {
            mbar_wait(&full[slot], round & 1);
#pragma unroll
            for (int u = 0; u < SU; u += CW) {
                const int at = s * SU + u + warp, then = at + CW < w.units ? at + CW : warp;
                if (at >= w.units) break;
                unit_w<R, GROUP> uw;
                load_w<R, GROUP>(&uw, ring + slot * STAGE + (u + warp) * UNIT, SU * UNIT, lane);
#pragma unroll
                for (int b = 0; b < NT; b++) { /* the next tokens' planes are on their way */
                    load_x<GROUP>(&next, planes, scales, b + 1 < NT ? at * NT + b + 1 : then * NT,
                                  lane);
                    mul_unit<R, GROUP>(acc + b, NT, uw, x);
                    x = next;
                }
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(&empty[slot]);
            if (++slot == STAGES) slot = 0, round++;
        }
        float *sum = sums + (TWICE ? turn : 0) * CW * R * NT * 64;
        turn ^= 1;
#pragma unroll
        for (int i = 0; i < R * NT * 2; i++)
            sum[warp * R * NT * 64 + i * 32 + lane] = (&acc[0][0])[i];
        asm volatile("bar.sync 1, %0;" ::"n"(CW * 32) : "memory");
        for (int p = threadIdx.x; p < R * NT * 32; p += CW * 32) {
            const int l = p & 31, b = p >> 5, col = b % NT * 4 + (l & 3), tile = item * R + b / NT;
            float v0 = 0.f, v1 = 0.f;
            if (col >= m || tile >= w.tiles) continue;
#pragma unroll
            for (int k = 0; k < CW; k++) {
                v0 += sum[k * R * NT * 64 + b * 64 + l];
                v1 += sum[k * R * NT * 64 + b * 64 + 32 + l];
            }
            store_pair(w, out, tile, l >> 2, col, v0, v1);
        }
        if (!TWICE) asm volatile("bar.sync 1, %0;" ::"n"(CW * 32) : "memory");
    }
#endif
}

template <int NT, int R, int GROUP, int CW, int STAGES>
static cudaError_t launch_few(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t stream,
                              bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const int smem = STAGES * STAGE_UNITS * w4_unit_bytes(GROUP) +
                     (NT * R <= 4 ? 2 : 1) * CW * R * NT * 64 * (int)sizeof(float);
    const cudaError_t rc = cudaFuncSetAttribute(gemm_w4_few_kernel<NT, R, GROUP, CW, STAGES>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (rc != cudaSuccess) return rc;
    /* Two blocks a multiprocessor hide each other's ends; one where registers or a longer ring
     * fill it. */
    const int chunks = w4_chunks(c->m), items = (w->tiles + R - 1) / R,
              most = NT > 4 ? sms / chunks : 2 * sms;
    cfg.gridDim = dim3((unsigned)(items < most ? items : most), (unsigned)chunks);
    cfg.blockDim = dim3((CW + 1) * 32);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, gemm_w4_few_kernel<NT, R, GROUP, CW, STAGES>, *w, *c);
}

template <int GROUP>
static cudaError_t few_group(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t s, bool pdl)
{
    switch (w4_token_tiles(c->m)) {
    case 1: return launch_few<1, 1, GROUP, 8, 3>(w, c, sms, s, pdl);
    case 2: return launch_few<2, 1, GROUP, 8, 3>(w, c, sms, s, pdl);
    case 4: return launch_few<4, 2, GROUP, 8, 3>(w, c, sms, s, pdl);
    default: return launch_few<8, 2, GROUP, 8, 6>(w, c, sms, s, pdl);
    }
}

cudaError_t gemm_w4_few(const w4_tiles *w, const w4_call *c, int sms, cudaStream_t stream, bool pdl)
{
    if (w->group == 128) return few_group<128>(w, c, sms, stream, pdl);
    if (w->group == 64) return few_group<64>(w, c, sms, stream, pdl);
    return few_group<32>(w, c, sms, stream, pdl);
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
