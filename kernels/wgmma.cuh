/* Matrix products of a warpgroup on sm_90a and what feeds them: tensor copies into swizzled shared
 * memory, barriers that count bytes. Private to kernels/. */
#ifndef TMF_KERNELS_WGMMA_CUH
#define TMF_KERNELS_WGMMA_CUH

#include <cuda.h>

#include "kernels/cuda_util.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define TMF_SM90A 1
#endif

#ifdef TMF_SM90A

/* ---- barriers and copies ---- */
__device__ __forceinline__ void mbar_expect(uint64_t *bar, uint32_t bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(smem_addr(bar)),
                 "r"(bytes)
                 : "memory");
}
/* Bytes that the barrier was told of; addresses and bytes multiples of 16. */
__device__ __forceinline__ void bulk_copy(void *dst, const void *src, uint32_t bytes, uint64_t *bar)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(smem_addr(dst)),
        "l"(src), "r"(bytes), "r"(smem_addr(bar))
        : "memory");
}
/* The box at (x, y) of a matrix; what lies outside it comes as zeros. */
__device__ __forceinline__ void tensor_copy(void *dst, const CUtensorMap *map, int x, int y,
                                            uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(smem_addr(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(smem_addr(bar))
                 : "memory");
}
/* The same of a matrix that is read once a step. */
__device__ __forceinline__ void tensor_copy_once(void *dst, const CUtensorMap *map, int x, int y,
                                                 uint64_t *bar)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 ".L2::cache_hint [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(smem_addr(dst)),
                 "l"(map), "r"(x), "r"(y), "r"(smem_addr(bar)), "l"(read_once())
                 : "memory");
}
__device__ __forceinline__ void tensor_ahead(const CUtensorMap *map)
{
    asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
template <int ID, int THREADS> __device__ __forceinline__ void bar_sync()
{
    asm volatile("bar.sync %0, %1;" ::"n"(ID), "n"(THREADS) : "memory");
}
__device__ __forceinline__ void bar_sync_id(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N> __device__ __forceinline__ void more_regs()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> __device__ __forceinline__ void fewer_regs()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}

/* Four 8x8 matrices of f16 pairs, each stored transposed: lane l gives the row address of row l % 8
 * of matrix l / 8. */
__device__ __forceinline__ void stmatrix4_trans(void *p, const uint32_t r[4])
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(
                     smem_addr(p)),
                 "r"(r[0]), "r"(r[1]), "r"(r[2]), "r"(r[3])
                 : "memory");
}

/* ---- products ---- */

/* Rows of 128 bytes, swizzled by 128: 8 rows are 1024 bytes, which `p` is a multiple of but for
 * steps of 32 bytes along the row. */
__device__ __forceinline__ uint64_t w_rows128(const void *p)
{
    return (uint64_t)((smem_addr(p) & 0x3ffffu) >> 4) | (uint64_t)1 << 16 | (uint64_t)64 << 32 |
           (uint64_t)1 << 62;
}
/* Rows of 64 outputs of b, one input each, swizzled by 128; the next 64 outputs `next` bytes on. */
__device__ __forceinline__ uint64_t w_columns64(const void *p, int next)
{
    return (uint64_t)((smem_addr(p) & 0x3ffffu) >> 4) | (uint64_t)(next >> 4) << 16 |
           (uint64_t)64 << 32 | (uint64_t)1 << 62;
}
__device__ __forceinline__ void w_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void w_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int LEFT> __device__ __forceinline__ void w_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}
/* Keeps the compiler from reading sums before the wait above it. */
template <int N> __device__ __forceinline__ void w_keep(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}

/* d [64, NT] += a [64, 16] from registers * b [NT, 16] in shared memory; without ADD d is written.
 * The fragments are those of mma.m16n8k16, 16 rows a warp. TRANS: b lies as [16, NT]. */
template <int NT> struct w_rs;
// clang-format off
/* N sums from d[i] on; W_AT_N: where they stand in the instruction, as its first operands. */
#define W_SUMS_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define W_SUMS_8(i) W_SUMS_4(i), W_SUMS_4(i + 4)
#define W_SUMS_16(i) W_SUMS_8(i), W_SUMS_8(i + 8)
#define W_SUMS_32(i) W_SUMS_16(i), W_SUMS_16(i + 16)
#define W_SUMS_64(i) W_SUMS_32(i), W_SUMS_32(i + 32)
#define W_AT_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define W_AT_16 W_AT_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define W_AT_32 W_AT_16 ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, " \
                        "%30, %31"
#define W_AT_64 W_AT_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, " \
                        "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, " \
                        "%60, %61, %62, %63"
/* REST: the operands behind N sums. */
#define W_RS(NT, N, REST) \
    template <> struct w_rs<NT> { \
        template <bool ADD = true, bool TRANS = false> \
        __device__ static __forceinline__ void mma(float (&d)[N], const uint32_t (&a)[4], \
                                                   uint64_t b) \
        { \
            asm volatile("wgmma.mma_async.sync.aligned.m64n" #NT "k16.f32.f16.f16 {" W_AT_##N \
                         "}, " REST \
                         : W_SUMS_##N(0) \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(ADD), \
                           "n"(TRANS)); \
        } \
    }
W_RS(16, 8, "{%8, %9, %10, %11}, %12, %13, 1, 1, %14;");
W_RS(32, 16, "{%16, %17, %18, %19}, %20, %21, 1, 1, %22;");
W_RS(64, 32, "{%32, %33, %34, %35}, %36, %37, 1, 1, %38;");
W_RS(128, 64, "{%64, %65, %66, %67}, %68, %69, 1, 1, %70;");
#undef W_RS
// clang-format on

#endif

/* ---- host ---- */

/* Maps for tensor_copy. The driver's maker is looked up, so that nothing links the driver. */
static inline cudaError_t tensor_map(CUtensorMap *map, CUtensorMapDataType type, const void *data,
                                     const cuuint64_t size[2], cuuint64_t row_bytes,
                                     const cuuint32_t box[2], CUtensorMapSwizzle swizzle)
{
    typedef CUresult (*maker)(CUtensorMap *, CUtensorMapDataType, cuuint32_t, void *,
                              const cuuint64_t *, const cuuint64_t *, const cuuint32_t *,
                              const cuuint32_t *, CUtensorMapInterleave, CUtensorMapSwizzle,
                              CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    void *make = NULL;
    cudaDriverEntryPointQueryResult found;
    const cuuint32_t step[2] = {1, 1};
    const cudaError_t rc = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &make, 12000,
                                                            cudaEnableDefault, &found);
    if (rc != cudaSuccess) return rc;
    if (!make || found != cudaDriverEntryPointSuccess) return cudaErrorNotSupported;
    return ((maker)make)(map, type, 2, (void *)data, size, &row_bytes, box, step,
                         CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                         CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS
               ? cudaSuccess
               : cudaErrorInvalidValue;
}

/* Of an f16 matrix: boxes of 64 columns and `box` rows, swizzled by 128. */
static inline cudaError_t matrix_map(CUtensorMap *map, const void *data, int64_t columns,
                                     int64_t rows, int64_t stride, int box)
{
    const cuuint64_t size[2] = {(cuuint64_t)columns, (cuuint64_t)rows};
    const cuuint32_t boxes[2] = {64, (cuuint32_t)box};
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT16, data, size, (cuuint64_t)stride * 2,
                      boxes, CU_TENSOR_MAP_SWIZZLE_128B);
}

/* Of rows of bytes, counted in words of 8 and as they lie: boxes of `piece` bytes (up to 2048, a
 * multiple of 16) and `box` rows. */
static inline cudaError_t bytes_map(CUtensorMap *map, const void *data, int64_t row_bytes,
                                    int64_t rows, int piece, int box)
{
    const cuuint64_t size[2] = {(cuuint64_t)row_bytes / 8, (cuuint64_t)rows};
    const cuuint32_t boxes[2] = {(cuuint32_t)piece / 8, (cuuint32_t)box};
    return tensor_map(map, CU_TENSOR_MAP_DATA_TYPE_UINT64, data, size, (cuuint64_t)row_bytes, boxes,
                      CU_TENSOR_MAP_SWIZZLE_NONE);
}

#endif
