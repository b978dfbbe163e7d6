/* W4A16 for one row: the weight stream of gemm_w4_few with the ends of its neighbours inside.
 * Every block makes the planes of the one row for itself, in shared memory (of the residual stream
 * through the norm, or of f16), while its ring fills; gate and up rows meet in one thread. A block
 * of the model is then five kernels. The sums are those of norm, planes and product as kernels of
 * their own, to the bit. */
#include "kernels/gemm_w4.cuh"

#include <cuda_bf16.h>

extern "C" {
#include "base/tensor.h"
}

#define CW          8
#define STAGES      3
#define STAGE_UNITS 16

__device__ __forceinline__ void mma_u8s8_one(int d[4], const uint32_t a[4], uint32_t b0,
                                             uint32_t b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void consumers_sync()
{
    asm volatile("bar.sync 1, %0;" ::"n"(CW * 32) : "memory");
}

/* Planes of a unit: 16 bytes for each (pair of steps i, plane, t) at ((i*2 + plane)*4 + t)*16: the
 * two steps' inputs 8t..8t+7. Scales: scale, then the integer sum of each group. */
template <int GROUP>
__device__ __forceinline__ void one_planes(uint8_t *planes, float *scales, int unit,
                                           const float v[4], int lane)
{
    float top = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3])));
#pragma unroll
    for (int i = 16; i; i >>= 1) top = fmaxf(top, __shfl_xor_sync(~0u, top, i));
    const float inv = top > 0.f ? 32512.f / top : 0.f;
    int sum = 0;
    uint32_t hi = 0, lo = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const int q = __float2int_rn(v[i] * inv), h = (q + 128) >> 8;
        hi |= (uint32_t)(h & 255) << (8 * i);
        lo |= (uint32_t)((q - h * 256) & 255) << (8 * i);
        sum += q;
    }
#pragma unroll
    for (int i = GROUP / 8; i; i >>= 1) sum += __shfl_xor_sync(~0u, sum, i);
    const int step = lane >> 3, t = lane >> 1 & 3;
    uint8_t *p = planes + unit * 256 + (step >> 1) * 128 + t * 16 + (step & 1) * 8 + (lane & 1) * 4;
    *(uint32_t *)p = hi;
    *(uint32_t *)(p + 64) = lo;
    float *s = scales + unit * (1 + 128 / GROUP);
    if (lane == 0) s[0] = top > 0.f ? top / 32512.f : 0.f;
    if (lane % (GROUP / 4) == 0) s[1 + lane / (GROUP / 4)] = (float)sum;
}

__device__ __forceinline__ float norm_weight(const void *p, int i, int dt)
{
    if (dt == DT_F16) return __half2float(((const __half *)p)[i]);
    if (dt == DT_BF16) return __bfloat162float(((const __nv_bfloat16 *)p)[i]);
    return ((const float *)p)[i];
}

/* Four f16 values of v, as a reader of f16 memory gets them. */
__device__ __forceinline__ void round4(float v[4])
{
#pragma unroll
    for (int j = 0; j < 4; j++)
        v[j] = __half2float(__float2half_rn(fminf(fmaxf(v[j], -65504.f), 65504.f)));
}

template <int GROUP>
__device__ __forceinline__ void planes_of_norm(uint8_t *planes, float *scales, float *part,
                                               const w4_one_call &c, int units, int warp, int lane)
{
    float v[W4_ONE_NORM][4], g[W4_ONE_NORM][4];
#pragma unroll
    for (int i = 0; i < W4_ONE_NORM; i++) /* weights belong to no earlier kernel */
        if (warp + CW * i < units)
#pragma unroll
            for (int j = 0; j < 4; j++)
                g[i][j] = norm_weight(c.norm, (warp + CW * i) * 128 + lane * 4 + j, c.norm_dt);
    pdl_wait();
#pragma unroll
    for (int i = 0; i < W4_ONE_NORM; i++)
        if (warp + CW * i < units) {
            const float4 f = *(const float4 *)(c.resid + (warp + CW * i) * 128 + lane * 4);
            v[i][0] = f.x, v[i][1] = f.y, v[i][2] = f.z, v[i][3] = f.w;
        }
    if (threadIdx.x < 64) part[threadIdx.x] = 0.f;
    consumers_sync();
#pragma unroll
    for (int i = 0; i < W4_ONE_NORM; i++)
        if (warp + CW * i < units) {
            float sum = v[i][0] * v[i][0] + v[i][1] * v[i][1] + v[i][2] * v[i][2] +
                        v[i][3] * v[i][3];
            for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
            if (lane == 0) part[warp + CW * i] = sum;
        }
    consumers_sync();
    float sum = part[lane] + part[lane + 32];
    for (int x = 16; x; x >>= 1) sum += __shfl_xor_sync(~0u, sum, x);
    const float inv = rsqrtf(sum / (float)(units * 128) + c.eps);
#pragma unroll
    for (int i = 0; i < W4_ONE_NORM; i++)
        if (warp + CW * i < units) {
#pragma unroll
            for (int j = 0; j < 4; j++) v[i][j] *= inv * g[i][j];
            round4(v[i]);
            one_planes<GROUP>(planes, scales, warp + CW * i, v[i], lane);
        }
}

template <int GROUP>
__device__ __forceinline__ void planes_of_x(uint8_t *planes, float *scales, const __half *x,
                                            int units, int warp, int lane)
{
    pdl_wait();
    for (int u = warp; u < units; u += 4 * CW) {
        uint2 raw[4];
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (u + i * CW < units) raw[i] = *(const uint2 *)(x + (u + i * CW) * 128 + lane * 4);
#pragma unroll
        for (int i = 0; i < 4; i++)
            if (u + i * CW < units) {
                const float2 a = __half22float2(*(const __half2 *)&raw[i].x),
                             b = __half22float2(*(const __half2 *)&raw[i].y);
                const float v[4] = {a.x, a.y, b.x, b.y};
                one_planes<GROUP>(planes, scales, u + i * CW, v, lane);
            }
    }
}

template <int GROUP>
__device__ __forceinline__ void mul_one(float acc[2], const uint8_t *unit, const uint8_t *planes,
                                        const float *scales, int lane)
{
    const uint4 *codes = (const uint4 *)unit + lane;
    const uint2 *params = (const uint2 *)(unit + 1024) + (lane >> 2);
    const uint4 *b = (const uint4 *)planes + (lane >> 2 & 1) * 4 + (lane & 3);
    const uint4 q[2] = {codes[0], codes[32]}, x[2] = {b[0], b[8]};
    int part[4];
#pragma unroll
    for (int h = 0; h < 4; h++) {
        if (h * 32 % GROUP == 0) part[0] = part[1] = part[2] = part[3] = 0;
        const uint32_t w0 = (&q[h / 2].x)[(h & 1) * 2], w1 = (&q[h / 2].x)[(h & 1) * 2 + 1];
        const uint32_t a[4] = {w0 & 0x0f0f0f0fu, w0 >> 4 & 0x0f0f0f0fu, w1 & 0x0f0f0f0fu,
                               w1 >> 4 & 0x0f0f0f0fu};
        mma_u8s8_one(part, a, (&x[h / 2].x)[(h & 1) * 2], (&x[h / 2].x)[(h & 1) * 2 + 1]);
        if ((h * 32 + 32) % GROUP == 0) {
            const uint2 p = params[h * 32 / GROUP * 8];
            const float2 p0 = __half22float2(*(const __half2 *)&p.x),
                         p1 = __half22float2(*(const __half2 *)&p.y);
            const float s = scales[0], sum = scales[1 + h * 32 / GROUP];
            acc[0] += p0.x * s * ((float)(part[0] * 256 + part[1]) - p0.y * sum);
            acc[1] += p1.x * s * ((float)(part[2] * 256 + part[3]) - p1.y * sum);
        }
    }
}

__device__ __forceinline__ void store_one(const w4_tiles &w, const w4_one_call &c, int tile, int r,
                                          float v)
{
    const int o = w4_row(w.n, w.paired, tile, r);
    if (o >= w.n) return;
    if (w.bias) v += __half2float(w.bias[o]);
    if (c.wide)
        ((float *)c.y)[o] = c.add ? ((float *)c.y)[o] + v : v;
    else {
        if (c.add) v += __half2float(((__half *)c.y)[o]);
        ((__half *)c.y)[o] = __float2half_rn(v);
    }
}

template <int GROUP>
__global__ void __launch_bounds__((CW + 1) * 32, 2) gemm_w4_one_kernel(w4_tiles w, w4_one_call c)
{
#if __CUDA_ARCH__ >= 900
    constexpr int UNIT = 1024 + 64 * (128 / GROUP), STAGE = STAGE_UNITS * UNIT;
    extern __shared__ __align__(128)
        uint8_t ring[]; /* [STAGES][STAGE], planes [units][256], scales */
    __shared__ uint64_t full[STAGES], empty[STAGES];
    __shared__ float sums[2][CW][16], part[64];
    uint8_t *planes = ring + STAGES * STAGE;
    float *scales = (float *)(planes + w.units * 256);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const int slabs = (w.units + STAGE_UNITS - 1) / STAGE_UNITS;

    pdl_launch();
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) mbar_init(&full[i], 1), mbar_init(&empty[i], CW);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == CW) { /* producer */
        if (lane) return;
        int slot = 0, round = 0;
        for (int tile = blockIdx.x; tile < w.tiles; tile += gridDim.x)
            for (int s = 0; s < slabs; s++) {
                if (round) mbar_wait(&empty[slot], (round - 1) & 1);
                const int first = s * STAGE_UNITS, n = min(STAGE_UNITS, w.units - first);
                bulk_load(ring + slot * STAGE, w.data + ((size_t)tile * w.units + first) * UNIT,
                          n * UNIT, &full[slot]);
                if (++slot == STAGES) slot = 0, round++;
            }
        return;
    }
    if (c.x)
        planes_of_x<GROUP>(planes, scales, c.x, w.units, warp, lane);
    else
        planes_of_norm<GROUP>(planes, scales, part, c, w.units, warp, lane);
    __syncwarp(); /* a warp multiplies the units whose planes it made */
    int slot = 0, round = 0, turn = 0;
    for (int tile = blockIdx.x; tile < w.tiles; tile += gridDim.x, turn ^= 1) {
        float acc[2] = {0.f, 0.f};
        for (int s = 0; s < slabs; s++) {
            mbar_wait(&full[slot], round & 1);
#pragma unroll
            for (int u = 0; u < STAGE_UNITS; u += CW) {
                const int at = s * STAGE_UNITS + u + warp;
                if (at < w.units)
                    mul_one<GROUP>(acc, ring + slot * STAGE + (u + warp) * UNIT, planes + at * 256,
                                   scales + at * (1 + 128 / GROUP), lane);
            }
            __syncwarp();
            if (lane == 0) mbar_arrive(&empty[slot]);
            if (++slot == STAGES) slot = 0, round++;
        }
        if ((lane & 3) == 0)
            sums[turn][warp][lane >> 2] = acc[0], sums[turn][warp][8 + (lane >> 2)] = acc[1];
        consumers_sync();
        if (threadIdx.x < 16) {
            float v = 0.f;
#pragma unroll
            for (int k = 0; k < CW; k++) v += sums[turn][k][threadIdx.x];
            if (!c.glu)
                store_one(w, c, tile, threadIdx.x, v);
            else {
                if (w.bias) v += __half2float(w.bias[w4_row(w.n, true, tile, threadIdx.x)]);
                v = __half2float(__float2half_rn(v));
                const float up = __shfl_down_sync(0xffffu, v, 8);
                v = v / (1.f + __expf(-v)) * up;
                if (threadIdx.x < 8)
                    ((__half *)c.y)[tile * 8 + threadIdx.x] = __float2half_rn(
                        fminf(fmaxf(v, -65504.f), 65504.f));
            }
        }
    }
#endif
}

template <int GROUP>
static cudaError_t launch_one(const w4_tiles *w, const w4_one_call *c, int sms, cudaStream_t stream,
                              bool pdl)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    const int smem = STAGES * STAGE_UNITS * w4_unit_bytes(GROUP) +
                     w->units * (256 + (1 + 128 / GROUP) * (int)sizeof(float));
    const cudaError_t rc = cudaFuncSetAttribute(gemm_w4_one_kernel<GROUP>,
                                                cudaFuncAttributeMaxDynamicSharedMemorySize, smem);
    if (rc != cudaSuccess) return rc;
    cfg.gridDim = dim3((unsigned)(w->tiles < 2 * sms ? w->tiles : 2 * sms));
    cfg.blockDim = dim3((CW + 1) * 32);
    cfg.dynamicSmemBytes = (size_t)smem;
    cfg.stream = stream;
    cfg.attrs = attr;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.numAttrs = pdl ? 1 : 0;
    return cudaLaunchKernelEx(&cfg, gemm_w4_one_kernel<GROUP>, *w, *c);
}

cudaError_t gemm_w4_one(const w4_tiles *w, const w4_one_call *c, int sms, cudaStream_t stream,
                        bool pdl)
{
    if (w->group == 128) return launch_one<128>(w, c, sms, stream, pdl);
    if (w->group == 64) return launch_one<64>(w, c, sms, stream, pdl);
    return launch_one<32>(w, c, sms, stream, pdl);
}
