/* W4A16 for one row: the weight stream of gemm_w4_few with the ends of its neighbours inside.
 * Every block makes the planes of the one row for itself, in shared memory (of the residual stream
 * through the norm, or of f16), while its ring fills; gate and up rows meet in one thread. A block
 * of the model is then five kernels. The sums are those of norm, planes and product as kernels of
 * their own, to the bit. */
#include "kernels/gemm_w4_one.cuh"

#define STAGES 3

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
            stream_tile<GROUP>(ring, w.data + (size_t)tile * w.units * UNIT, full, empty, STAGES,
                               &slot, &round, w.units);
        return;
    }
    if (c.x)
        planes_of_x<GROUP, true>(planes, scales, c.x, w.units, warp, lane);
    else
        planes_of_norm<GROUP, true>(planes, scales, part, c, w.units, warp, lane);
    __syncwarp(); /* a warp multiplies the units whose planes it made */
    int slot = 0, round = 0, turn = 0;
    for (int tile = blockIdx.x; tile < w.tiles; tile += gridDim.x, turn ^= 1) {
        const float held = warp == 0 ? held_one(w, c, tile, lane) : 0.f;
        float acc[2] = {0.f, 0.f};
        mul_tile<GROUP>(acc, ring, full, empty, STAGES, &slot, &round, planes, scales, w.units,
                        warp, lane);
        if ((lane & 3) == 0)
            sums[turn][warp][lane >> 2] = acc[0], sums[turn][warp][8 + (lane >> 2)] = acc[1];
        consumers_sync();
        if (threadIdx.x < 16) finish_tile(w, c, sums[turn], tile, lane, held);
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
