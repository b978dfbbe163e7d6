/* One row of activations through the weight stream: the parts of the kernel of one product; the
 * decode pass cuts a tile into the same slabs. Every block makes the planes of the row for itself,
 * in shared memory; CW warps split k, a warp multiplies the units whose planes it made, and sums
 * meet in the order of the warps. Private to kernels/. */
#ifndef TMF_KERNELS_GEMM_W4_ONE_CUH
#define TMF_KERNELS_GEMM_W4_ONE_CUH

#include <cuda_bf16.h>

#include "kernels/gemm_w4.cuh"

extern "C" {
#include "base/tensor.h"
}

#define CW          8
#define STAGE_UNITS 16 /* two a warp */

__device__ __forceinline__ void consumers_sync()
{
    asm volatile("bar.sync 1, %0;" ::"n"(CW * 32) : "memory");
}

/* Planes of a unit: 16 bytes for each (pair of steps i, plane, t) at ((i*2 + plane)*4 + t)*16: the
 * two steps' inputs in the order of codes. Scales: scale, then the integer sum of each group. */
template <int GROUP>
__device__ __forceinline__ void unit_planes(uint8_t *planes, float *scales, int unit,
                                            const float v[4], int lane)
{
    uint32_t hi, lo;
    int sum;
    const float scale = w4_fixed(v, GROUP, &hi, &lo, &sum, lane);
    uint8_t *p = planes + unit * 256 + (lane >> 4) * 128 + w4_lane_place(lane);
    *(uint32_t *)p = hi;
    *(uint32_t *)(p + 64) = lo;
    float *sc = scales + unit * (1 + 128 / GROUP);
    if (lane == 0) sc[0] = scale;
    if (lane % (GROUP / 4) == 0) sc[1 + lane / (GROUP / 4)] = (float)sum;
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

template <int GROUP, bool WAIT>
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
    if (WAIT) pdl_wait();
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
            unit_planes<GROUP>(planes, scales, warp + CW * i, v[i], lane);
        }
}

template <int GROUP, bool WAIT>
__device__ __forceinline__ void planes_of_x(uint8_t *planes, float *scales, const __half *x,
                                            int units, int warp, int lane)
{
    if (WAIT) pdl_wait();
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
                unit_planes<GROUP>(planes, scales, u + i * CW, v, lane);
            }
    }
}

/* The product of N units at once, so that none waits for another; summed in their order. */
template <int GROUP, int N>
__device__ __forceinline__ void mul_units(float acc[2], const uint8_t *unit, const uint8_t *planes,
                                          const float *scales, int lane)
{
    constexpr int UNIT = 1024 + 64 * (128 / GROUP), PER = 128 / GROUP;
    uint4 q[N][2], x[N][2];
    uint2 p[N][PER];
    int part[N][4][4];
#pragma unroll
    for (int n = 0; n < N; n++) {
        const uint4 *codes = (const uint4 *)(unit + n * CW * UNIT) + lane;
        const uint4 *b = (const uint4 *)(planes + n * CW * 256) + (lane >> 2 & 1) * 4 + (lane & 3);
        q[n][0] = codes[0], q[n][1] = codes[32], x[n][0] = b[0], x[n][1] = b[8];
#pragma unroll
        for (int g = 0; g < PER; g++)
            p[n][g] = ((const uint2 *)(unit + n * CW * UNIT + 1024))[g * 8 + (lane >> 2)];
    }
#pragma unroll
    for (int h = 0; h < 4; h++)
#pragma unroll
        for (int n = 0; n < N; n++) {
            const uint32_t w0 = (&q[n][h / 2].x)[(h & 1) * 2],
                           w1 = (&q[n][h / 2].x)[(h & 1) * 2 + 1];
            const uint32_t a[4] = {w0 & 0x0f0f0f0fu, w0 >> 4 & 0x0f0f0f0fu, w1 & 0x0f0f0f0fu,
                                   w1 >> 4 & 0x0f0f0f0fu};
            part[n][h][0] = part[n][h][1] = part[n][h][2] = part[n][h][3] = 0;
            mma_u8s8(part[n][h], a, (&x[n][h / 2].x)[(h & 1) * 2],
                     (&x[n][h / 2].x)[(h & 1) * 2 + 1]);
        }
#pragma unroll
    for (int n = 0; n < N; n++)
#pragma unroll
        for (int g = 0; g < PER; g++) {
            int sum[4] = {0, 0, 0, 0};
#pragma unroll
            for (int h = g * GROUP / 32; h < (g + 1) * GROUP / 32; h++)
#pragma unroll
                for (int i = 0; i < 4; i++) sum[i] += part[n][h][i];
            const float2 p0 = __half22float2(*(const __half2 *)&p[n][g].x),
                         p1 = __half22float2(*(const __half2 *)&p[n][g].y);
            const float *sc = scales + n * CW * (1 + PER);
            const float s = sc[0], all = sc[1 + g];
            acc[0] += p0.x * s * ((float)(sum[0] * 256 + sum[1]) - p0.y * all);
            acc[1] += p1.x * s * ((float)(sum[2] * 256 + sum[3]) - p1.y * all);
        }
}

/* What row `lane` of a tile already holds, for a product that is added to it. */
__device__ __forceinline__ float held_one(const w4_tiles &w, const w4_one_call &c, int tile,
                                          int lane)
{
    const int o = w4_row(w.n, w.paired, tile, lane);
    if (!c.add || lane >= 16 || o >= w.n) return 0.f;
    return c.wide ? ((const float *)c.y)[o] : __half2float(((const __half *)c.y)[o]);
}

__device__ __forceinline__ void store_one(const w4_tiles &w, const w4_one_call &c, int tile, int r,
                                          float v, float held)
{
    const int o = w4_row(w.n, w.paired, tile, r);
    if (o >= w.n) return;
    if (w.bias) v += __half2float(w.bias[o]);
    if (c.add) v = held + v;
    if (c.wide)
        ((float *)c.y)[o] = v;
    else
        ((__half *)c.y)[o] = __float2half_rn(v);
}

/* Lanes 0..15 of one warp: all sums of a tile, in the order of the warps. */
__device__ __forceinline__ void finish_tile(const w4_tiles &w, const w4_one_call &c,
                                            const float (*sums)[16], int tile, int lane, float held)
{
    float v = 0.f;
#pragma unroll
    for (int k = 0; k < CW; k++) v += sums[k][lane];
    if (!c.glu) {
        store_one(w, c, tile, lane, v, held);
        return;
    }
    if (w.bias) v += __half2float(w.bias[w4_row(w.n, true, tile, lane)]);
    v = __half2float(__float2half_rn(v));
    const float up = __shfl_down_sync(0xffffu, v, 8);
    v = v / (1.f + __expf(-v)) * up;
    if (lane < 8)
        ((__half *)c.y)[tile * 8 + lane] = __float2half_rn(fminf(fmaxf(v, -65504.f), 65504.f));
}

/* Multiplies one tile of the stream: the slabs that the producer fills, in the ring from `slot`. */
template <int GROUP>
__device__ __forceinline__ void
mul_tile(float acc[2], const uint8_t *ring, uint64_t *full, uint64_t *empty, int stages, int *slot,
         int *round, const uint8_t *planes, const float *scales, int units, int warp, int lane)
{
    constexpr int UNIT = 1024 + 64 * (128 / GROUP), STAGE = STAGE_UNITS * UNIT;
    for (int first = 0; first < units; first += STAGE_UNITS) {
        mbar_wait(&full[*slot], *round & 1);
        const int at = first + warp;
        const uint8_t *unit = ring + *slot * STAGE + warp * UNIT;
        if (at + CW < units)
            mul_units<GROUP, 2>(acc, unit, planes + at * 256, scales + at * (1 + 128 / GROUP),
                                lane);
        else if (at < units)
            mul_units<GROUP, 1>(acc, unit, planes + at * 256, scales + at * (1 + 128 / GROUP),
                                lane);
        __syncwarp();
        if (lane == 0) mbar_arrive(&empty[*slot]);
        if (++*slot == stages) *slot = 0, ++*round;
    }
}

/* Streams one tile into the ring; one thread. */
template <int GROUP>
__device__ __forceinline__ void stream_tile(uint8_t *ring, const uint8_t *data, uint64_t *full,
                                            uint64_t *empty, int stages, int *slot, int *round,
                                            int units)
{
    constexpr int UNIT = 1024 + 64 * (128 / GROUP), STAGE = STAGE_UNITS * UNIT;
    for (int first = 0; first < units; first += STAGE_UNITS) {
        if (*round) mbar_wait(&empty[*slot], (*round - 1) & 1);
        bulk_load(ring + *slot * STAGE, data + (size_t)first * UNIT,
                  min(STAGE_UNITS, units - first) * UNIT, &full[*slot]);
        if (++*slot == stages) *slot = 0, ++*round;
    }
}

#endif
