/* What the .cu files know of a CUDA device. */
#ifndef TMF_KERNELS_DEVICE_CUDA_CUH
#define TMF_KERNELS_DEVICE_CUDA_CUH

#include <cublas_v2.h>

#include "kernels/cuda_util.cuh"
#include "kernels/gemm_w4.cuh"

extern "C" {
#include "base/mem.h"
#include "kernels/device_internal.h"
}

#define CUDA_COUNTERS      (1 << 16)                    /* arrival counters of split attention */
#define CUDA_PASS_WORDS    (16 + 2 * (5 * 16384 + 384)) /* of the decode pass: decode_pass.cuh */
#define CUDA_COUNTER_BYTES ((size_t)(CUDA_COUNTERS + CUDA_PASS_WORDS) * sizeof(int32_t))
#define CUDA_BLAS_BYTES    ((size_t)32 << 20)

/* The planes that lie at the end of the scratch: of these activations, until any op but a product
 * is queued. */
typedef struct {
    const void *x;
    int64_t m, k, ld;
    int group;
} cuda_planes;

/* Work of a decode pass that is being recorded and not launched yet: device_cuda_pass.cu. */
typedef struct cuda_pass cuda_pass;
/* device_cuda_load.cu */
typedef struct cuda_load cuda_load;
typedef struct cuda_blas_maker cuda_blas_maker;

typedef struct {
    cudaStream_t stream;
    cuda_blas_maker *maker; /* of the cuBLAS handle */
    cuda_load *load;        /* NULL while nothing is loaded */
    int32_t *counters;      /* [CUDA_COUNTERS], zero between ops, then CUDA_PASS_WORDS */
    cuda_pass *pass;        /* NULL below sm_90 */
    const char *last_op;    /* for errors that surface later */
    int w4_group; /* of the weight uploaded last: what producers make planes for; 0 none */
    cuda_planes planes;
    int index, sm, sms;
    cudaStream_t lane[2]; /* of copies in and out; NULL until used */
    cudaEvent_t order;    /* recorded on one lane, waited for on another */
    cudaEvent_t mark;     /* that the host waits for; NULL until used */
} cuda_state;

static inline cuda_state *cuda_of(const device *d) { return (cuda_state *)d->backend_data; }

/* After every launch: what the launch itself reports. */
static inline err_code cuda_launched(device *d, const char *op, cudaError_t rc, err *e)
{
    cuda_of(d)->last_op = op;
    cuda_of(d)->planes.x = NULL;
    if (rc == cudaSuccess) rc = cudaPeekAtLastError();
    if (rc == cudaSuccess) return OK;
    cudaGetLastError();
    return err_set(e, E_DEVICE, "%s: %s: %s", d->name, op, cudaGetErrorString(rc));
}

static inline err_code cuda_blas(device *d, const char *op, cublasStatus_t rc, err *e)
{
    cuda_of(d)->last_op = op;
    cuda_of(d)->planes.x = NULL;
    if (rc == CUBLAS_STATUS_SUCCESS) return OK;
    return err_set(e, E_DEVICE, "%s: %s: cublas status %d", d->name, op, (int)rc);
}

/* device_cuda_move.cu */
err_code cuda_move_words(device *d, const dev_move *moves, int n, err *e);

/* ---- loading ---- */
#define CUDA_LOAD_BYTES  ((size_t)8 << 20) /* of a slot */
#define CUDA_LOAD_PIECES 3
typedef struct {
    const void *src; /* host */
    size_t bytes;
} cuda_piece;
/* Host memory to dst, queued on the device's stream; src may go when it returns. */
err_code cuda_load_copy(device *d, void *dst, const void *src, size_t bytes, err *e);
/* Up to CUDA_LOAD_PIECES pieces, cuda_load_need of them at most CUDA_LOAD_BYTES, into one slot on
 * the device: at[i] holds piece i for what is queued next, until cuda_load_tiled. */
size_t cuda_load_need(const cuda_piece *piece, int n);
err_code cuda_load_raw(device *d, const cuda_piece *piece, int n, uint8_t **at, err *e);
err_code cuda_load_tiled(device *d, err *e);
err_code cuda_load_end(device *d, err *e); /* waits, and gives the slots back */
err_code cuda_map(void **out, device *d, const void *host, size_t bytes, err *e);
void cuda_unmap(device *d, void *host);
/* A thread makes the handle; who asks first waits for it. NULL when it could not be made: every
 * call of cuBLAS fails with it. */
err_code cuda_blas_open(device *d, int index, err *e);
cublasHandle_t cuda_blas_of(const device *d);
void cuda_blas_close(device *d);

/* Launches what is gathered; before anything else is queued. */
err_code cuda_pass_flush(device *d, err *e);
err_code cuda_pass_make(device *d, err *e);
/* Launches what is gathered and gathers no more: a pass with attention between its products
 * would be two kernels a layer, slower than one for each op. */
err_code cuda_pass_stop(device *d, err *e);
void cuda_pass_begin(device *d);
bool cuda_pass_open(const device *d);
void cuda_pass_end(device *d); /* drops what was not launched */
/* *taken: the op is part of the pass; else the caller launches it. */
err_code cuda_pass_product(device *d, const w4_tiles *w, const w4_one_call *c, bool *taken, err *e);

struct attn_decode_call;
err_code cuda_pass_attn(device *d, const struct attn_decode_call *c, int head_dim, int bits,
                        bool *taken, err *e);

/* Launches with programmatic dependency: the kernel calls pdl_wait before it reads what earlier
 * ones wrote. */
template <typename... P, typename... A>
static inline err_code cuda_launch(device *d, const char *op, void (*kernel)(P...), dim3 grid,
                                   dim3 block, size_t smem, err *e, A... args)
{
    cudaLaunchConfig_t cfg = {};
    cudaLaunchAttribute attr[1];
    TRY(cuda_pass_flush(d, e));
    cfg.gridDim = grid;
    cfg.blockDim = block;
    cfg.dynamicSmemBytes = smem;
    cfg.stream = cuda_of(d)->stream;
    attr[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attr[0].val.programmaticStreamSerializationAllowed = 1;
    cfg.attrs = attr;
    cfg.numAttrs = cuda_of(d)->sm >= 90 ? 1 : 0;
    return cuda_launched(d, op, cudaLaunchKernelEx(&cfg, kernel, P(args)...), e);
}

/* Where the op that makes activations [m,k] should leave their planes: planes NULL when no product
 * will ask. Behind its launch the op calls cuda_planes_made. */
w4_planes_out cuda_planes_want(device *d, int64_t m, int64_t k);
void cuda_planes_made(device *d, const tensor *y, const w4_planes_out *o);
/* Bytes at the end of the scratch that belong to planes. */
size_t cuda_planes_bytes(int64_t k);

/* Whether attention of these rows is one kernel of one row a sequence; `rope` as in
 * attn_decode.cuh, or NULL. */
struct rope_call;
bool attn_decodes(const batch_rows *rows, const kv_layer *kv);
err_code attn_decode_cuda(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                          const batch_rows *rows, float scale, int32_t window,
                          const struct rope_call *rope, err *e);

/* The same on a device opened as deterministic: a row's bits depend on the row alone. */
err_code gemm_fixed_cuda(device *d, tensor *y, const tensor *x, const tensor *w, const tensor *bias,
                         bool add, err *e);
err_code attn_fixed_cuda(device *d, tensor *y, const tensor *q, const kv_layer *kv,
                         const batch_rows *rows, float scale, int32_t window, err *e);
size_t attn_fixed_scratch_cuda(const op_limits *lim);

/* ---- the ops, one file each; filled into the table by ops_cuda.cu ---- */
extern "C" {
err_code embed_cuda(device *, tensor *, const tensor *, const tensor *, err *);
err_code rmsnorm_cuda(device *, tensor *, const tensor *, const tensor *, float, err *);
err_code add_cuda(device *, tensor *, const tensor *, err *);
err_code glu_cuda(device *, tensor *, const tensor *, const tensor *, err *);
err_code nll_cuda(device *, tensor *, tensor *, const tensor *, const tensor *, err *);
err_code absstat_cuda(device *, tensor *, tensor *, const tensor *, err *);
err_code gemm_cuda(device *, tensor *, const tensor *, const tensor *, const tensor *, bool, err *);
err_code gemm_w4_cuda(device *, tensor *, const tensor *, const w4_weight *, bool, err *);
err_code gemm_w4_norm_cuda(device *, tensor *, tensor *, const tensor *, const tensor *, float,
                           const w4_weight *, bool, err *);
err_code w4_upload_cuda(device *, dev_buf *, w4_weight *, const w4_weight *const *, int, err *);
size_t w4_upload_bytes_cuda(int64_t, int64_t, int32_t);
err_code rope_kv_cuda(device *, tensor *, tensor *, const tensor *, const rope_spec *,
                      const batch_rows *, const kv_layer *, err *);
err_code attn_cuda(device *, tensor *, const tensor *, const kv_layer *, const batch_rows *, float,
                   int32_t, err *);
err_code rope_attn_cuda(device *, tensor *, tensor *, tensor *, const tensor *, const rope_spec *,
                        const batch_rows *, const kv_layer *, float, int32_t, err *);
err_code gram_cuda(device *, tensor *, const tensor *, err *);
err_code gram_finish_cuda(device *, tensor *, err *);
err_code quad_cuda(device *, tensor *, const tensor *, const tensor *, err *);
err_code matmul_cuda(device *, tensor *, const tensor *, const tensor *, err *);
err_code sample_cuda(device *, tensor *, tensor *, const tensor *, const tensor *, tensor *, err *);
err_code rows_bf16_to_f16_cuda(device *, tensor *, err *); /* in place; beyond f16: infinity */
size_t sample_scratch_cuda(const op_limits *);
size_t attn_scratch_cuda(const device *, const op_limits *);
size_t gemm_w4_scratch_cuda(const device *, const op_limits *);
}

#endif
