/* W4A16 products on CUDA straight from our device tiling. Private to kernels/.
 *
 * Tiling. Outputs go in tiles of 16 rows, inputs in units of 128. A unit is 1024 bytes of codes
 * and then the parameters of its groups, so that a tile is one contiguous stream; units lie in
 * order of k. Codes: uint4 [2][32 lanes]. Lane 4*g + t of pair p holds two words for each of the
 * steps s = 2p, 2p + 1 of 32 inputs: bytes 0..3 of word h are codes of row g, inputs 32*s + 16*h +
 * {2t, 2t + 8, 2t + 1, 2t + 9}, in their low nibbles and the same of row g + 8 in the high ones: a
 * word is the A operand of one f16 mma of 16 inputs, and after one mask two words are that of
 * mma.m16n8k32 with inputs in this order. Parameters: for each group of the unit (128 / group of
 * them) 8 x {half2 (scale, zero) of row g, half2 of row g + 8}. Inputs beyond k and rows beyond n
 * have scale 0. */
#ifndef TMF_KERNELS_GEMM_W4_CUH
#define TMF_KERNELS_GEMM_W4_CUH

#include "kernels/cuda_util.cuh"

#define W4_FEW_MAX 64 /* rows of gemm_w4_few, */
#define W4_CHUNK   32 /* in chunks of so many */

typedef struct {
    const uint8_t *data; /* [tiles][units][unit bytes] */
    const __half *bias;  /* [n] or NULL */
    int n, k, group;
    int tiles, units;
    bool paired; /* tile t: rows 8t..8t+7, then n/2 + 8t..; else rows 16t..16t+15 */
} w4_tiles;

typedef struct {
    const __half *x; /* [m,k], row stride ldx; 16-byte aligned rows */
    void *y;         /* f16, or f32 when `wide`: row stride ldy */
    uint8_t *planes; /* w4_planes_bytes */
    float *scales;   /* w4_scales_bytes */
    int m, ldx, ldy;
    bool add, wide; /* y +=; y is f32 */
} w4_call;

static inline int w4_unit_bytes(int group) { return 1024 + 64 * (128 / group); }
/* Tokens go in tiles of 4; 1, 2, 4 or 8 tiles, then chunks of 8 tiles. */
static inline int w4_token_tiles(int m) { return m <= 4 ? 1 : m <= 8 ? 2 : m <= 16 ? 4 : 8; }
static inline int w4_chunks(int m) { return (m + W4_CHUNK - 1) / W4_CHUNK; }
static inline size_t w4_planes_bytes(int units, int m)
{
    return (size_t)units * w4_chunks(m) * w4_token_tiles(m) * 1024;
}
static inline size_t w4_scales_bytes(int units, int m, int group)
{
    return (size_t)units * w4_chunks(m) * w4_token_tiles(m) * 4 * (size_t)(1 + 128 / group) *
           sizeof(float);
}
/* Row of the weight that row r (0..15) of a tile is. */
#ifdef __CUDACC__
__host__ __device__
#endif
    static inline int
    w4_row(int n, bool paired, int tile, int r)
{
    return paired ? (r >> 3) * (n / 2) + tile * 8 + (r & 7) : tile * 16 + r;
}

/* Where a producer of activations leaves them as fixed point too; planes NULL: nowhere. */
typedef struct {
    uint8_t *planes;
    float *scales;
    int token_tiles, group, units;
} w4_planes_out;

#ifdef __CUDACC__
/* The integer product: codes [16 rows, 32] times planes [32, 8 columns]. */
__device__ __forceinline__ void mma_u8s8(int d[4], const uint32_t a[4], uint32_t b0, uint32_t b1)
{
#if __CUDA_ARCH__ >= 800
    asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

__device__ __forceinline__ float warp_most(float v) /* of values that are not negative */
{
#if __CUDA_ARCH__ >= 800
    return __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(v)));
#else
    for (int i = 16; i; i >>= 1) v = fmaxf(v, __shfl_xor_sync(~0u, v, i));
    return v;
#endif
}

/* Over the lanes of a group of inputs, 4 a lane. */
__device__ __forceinline__ int group_sum(int v, int group)
{
#if __CUDA_ARCH__ >= 800
    if (group == 128) return __reduce_add_sync(~0u, v);
#endif
    for (int i = group / 8; i; i >>= 1) v += __shfl_xor_sync(~0u, v, i);
    return v;
}

/* Bytes of lane l's inputs 4*l.. and of the lane whose inputs are 8 further or nearer, as words of
 * codes have them: of t = 2 * (l & 1), or t + 1 in the lane of the further inputs. */
__device__ __forceinline__ uint32_t w4_in_order(uint32_t four, int lane)
{
    const uint32_t other = __shfl_xor_sync(~0u, four, 2);
    return __byte_perm(four, other, lane & 2 ? 0x3726 : 0x5140);
}
/* Where that word lies in the planes of a column. */
__device__ __forceinline__ int w4_lane_place(int lane)
{
    return (lane & 1) * 32 + (lane >> 1 & 1) * 16 + (lane >> 3 & 1) * 8 + (lane >> 2 & 1) * 4;
}

/* Four values of each lane, 128 of a warp, as 16-bit fixed point in two planes of bytes, in order
 * of the codes. Returns the scale; *sum: the integers of this lane's group added up. All lanes
 * call. */
__device__ __forceinline__ float w4_fixed(const float v[4], int group, uint32_t *hi, uint32_t *lo,
                                          int *sum, int lane)
{
    const float top = warp_most(
        fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))));
    const float inv = top > 1e-30f ? __fdividef(32512.f, top) : 0.f;
    int q[4];
    uint32_t r[4]; /* byte 1: the high plane, rounded */
#pragma unroll
    for (int i = 0; i < 4; i++) q[i] = __float2int_rn(v[i] * inv), r[i] = (uint32_t)(q[i] + 128);
    *hi = __byte_perm(__byte_perm(r[0], r[1], 0x0051), __byte_perm(r[2], r[3], 0x0051), 0x5410);
    *lo = __byte_perm(__byte_perm(q[0], q[1], 0x0040), __byte_perm(q[2], q[3], 0x0040), 0x5410);
    *sum = q[0] + q[1] + q[2] + q[3];
    *sum = group_sum(*sum, group);
    *hi = w4_in_order(*hi, lane);
    *lo = w4_in_order(*lo, lane);
    return top * (1.f / 32512.f);
}

/* silu(gate) * up, both rounded to f16 first. */
__device__ __forceinline__ float w4_gated(float gate, float up)
{
    gate = __half2float(__float2half_rn(gate)), up = __half2float(__float2half_rn(up));
    const float v = gate / (1.f + __expf(-gate)) * up;
    return fminf(fmaxf(v, -65504.f), 65504.f);
}

/* Four activations of a token to fixed point: lane l of a warp holds inputs 4*l.. of unit `unit`.
 * All lanes call. planes[chunk][unit][tile of 4 tokens][2][32 lanes][16 bytes]: lane 4*g + t holds
 * column g (token g / 2, high plane when g is even) of steps 2*i and 2*i + 1, each 8 bytes: the
 * inputs of codes. scales[chunk][unit][tokens of all tiles][1 + 128/group]: f32
 * scale, then the integer sum of each group. Columns of tokens that nobody stored hold anything:
 * they reach no output of another token. */
__device__ __forceinline__ void w4_store_planes(const w4_planes_out &o, int unit, int token,
                                                const float v[4], int lane)
{
    uint32_t hi, lo;
    int sum;
    const float scale = w4_fixed(v, o.group, &hi, &lo, &sum, lane);
    const int step = lane >> 3, col = 2 * (token & 3), per = 1 + 128 / o.group;
    const size_t at = (size_t)(token / W4_CHUNK) * o.units + unit;
    token %= W4_CHUNK;
    uint8_t *p = o.planes + ((at * o.token_tiles + (token >> 2)) * 2 + (step >> 1)) * 512 +
                 col * 64 + w4_lane_place(lane);
    *(uint32_t *)p = hi;
    *(uint32_t *)(p + 64) = lo;
    float *s = o.scales + (at * o.token_tiles * 4 + token) * per;
    if (lane == 0) s[0] = scale;
    if (lane % (o.group / 4) == 0) s[1 + lane / (o.group / 4)] = (float)sum;
}
#endif

/* Activations of up to W4_FEW_MAX rows to fixed point, then the product; alike: a row's sums do not
 * depend on m. */
cudaError_t gemm_w4_planes(const w4_tiles *w, const w4_call *c, cudaStream_t stream, bool pdl);
cudaError_t gemm_w4_few(const w4_tiles *w, const w4_call *c, int sms, bool alike,
                        cudaStream_t stream, bool pdl);

/* More rows, on sm_90a: x and y 16-byte aligned with strides of 8 elements, else not taken. */
typedef struct {
    const __half *x; /* [m,k], row stride ldx */
    void *y;         /* f16, or f32 when `wide`: row stride ldy */
    void *sums;      /* gemm_w4_wide_sums bytes */
    int *arrived;    /* 2 * multiprocessors, zero before and after */
    int m, ldx, ldy;
    bool add, wide;
    bool glu; /* w paired: column i of y = silu(row i) * row n/2 + i; f16, not added */
} w4_wide_call;
size_t gemm_w4_wide_sums(int sms);
bool gemm_w4_wide_takes(const w4_tiles *w, const w4_wide_call *c);
cudaError_t gemm_w4_wide(const w4_tiles *w, const w4_wide_call *c, int sms, cudaStream_t stream);
/* Up to W4_FEW_MAX rows of what gemm_w4_wide takes, without sums: the blocks of a cluster share a
 * tile of outputs, each with a part of k. */
cudaError_t gemm_w4_cluster(const w4_tiles *w, const w4_wide_call *c, int sms, cudaStream_t stream);

/* One row of activations, a whole step of the block in one kernel: what makes the activations and
 * what takes the product happen inside. k a multiple of 128 up to W4_ONE_UNITS * 128. */
#define W4_ONE_UNITS 256
#define W4_ONE_NORM  8 /* units a warp of the norm: k up to 8 * W4_ONE_NORM * 128 */
typedef struct {
    const __half *x;    /* f16 [k], or NULL: */
    const float *resid; /* f32 [k], normed by */
    const void *norm;   /* [k], f16, bf16 or f32 */
    int norm_dt;        /* dtype */
    float eps;
    void *y; /* f16, or f32 when `wide` */
    bool add, wide;
    bool glu; /* w paired: y[i] = silu(row i) * row n/2 + i */
} w4_one_call;
cudaError_t gemm_w4_one(const w4_tiles *w, const w4_one_call *c, int sms, cudaStream_t stream,
                        bool pdl);

#endif
