/* Loading: host memory to the device at the speed of the bus, and cuBLAS made meanwhile. A plain
 * copy of mapped files goes through the driver's own pinned pages on one thread, at a fifth of what
 * the bus takes; here the pool's threads copy into pinned slots while earlier slots travel. Words
 * that are tiled on the device travel on a stream of their own beside the tiling. */
#include <pthread.h>
#include <unistd.h>

#include "kernels/device_cuda.cuh"

#define LOAD_SLOTS 4
#define LOAD_ITEM  ((size_t)256 << 10) /* bytes that a thread copies at a time */
#define LOAD_ALIGN ((size_t)256)

struct cuda_load {
    cudaStream_t stream;             /* of what is tiled */
    uint8_t *pinned;                 /* [LOAD_SLOTS][CUDA_LOAD_BYTES] */
    uint8_t *raw;                    /* the same on the device; NULL until something is tiled */
    cudaEvent_t arrived[LOAD_SLOTS]; /* the pinned slot may be filled again */
    cudaEvent_t tiled[LOAD_SLOTS];   /* the device's may be */
    int next, last;
};

/* ---- filling a slot ---- */

typedef struct {
    const cuda_piece *piece;
    int n;
    uint8_t *to[CUDA_LOAD_PIECES];
    int64_t first[CUDA_LOAD_PIECES + 1]; /* item of the pool with which a piece begins */
} fill_job;

static void fill_item(void *ctx, int64_t item, int worker)
{
    const fill_job *f = (const fill_job *)ctx;
    int p = 0;
    (void)worker;
    while (item >= f->first[p + 1]) p++;
    const size_t at = (size_t)(item - f->first[p]) * LOAD_ITEM, left = f->piece[p].bytes - at;
    memcpy(f->to[p] + at, (const uint8_t *)f->piece[p].src + at,
           left < LOAD_ITEM ? left : LOAD_ITEM);
}

static size_t aligned(size_t n) { return (n + LOAD_ALIGN - 1) & ~(LOAD_ALIGN - 1); }

size_t cuda_load_need(const cuda_piece *piece, int n)
{
    size_t sum = 0;
    for (int i = 0; i < n; i++) sum += aligned(piece[i].bytes);
    return sum;
}

static void fill(device *d, uint8_t *slot, const cuda_piece *piece, int n)
{
    fill_job f = {};
    f.piece = piece;
    f.n = n;
    for (int i = 0; i < n; i++) {
        f.to[i] = slot;
        f.first[i + 1] = f.first[i] + (int64_t)((piece[i].bytes + LOAD_ITEM - 1) / LOAD_ITEM);
        slot += aligned(piece[i].bytes);
    }
    pool_run(d->workers, fill_item, &f, f.first[n]);
}

/* ---- slots ---- */

static void load_free(cuda_load *l)
{
    if (l->stream) cudaStreamSynchronize(l->stream);
    for (int i = 0; i < LOAD_SLOTS; i++) {
        if (l->arrived[i]) cudaEventDestroy(l->arrived[i]);
        if (l->tiled[i]) cudaEventDestroy(l->tiled[i]);
    }
    cudaFreeHost(l->pinned);
    cudaFree(l->raw);
    if (l->stream) cudaStreamDestroy(l->stream);
    mem_free(l);
}

static err_code load_make(cuda_load *l, err *e)
{
    CUDA_TRY(cudaStreamCreateWithFlags(&l->stream, cudaStreamNonBlocking), e);
    CUDA_TRY(cudaHostAlloc((void **)&l->pinned, LOAD_SLOTS * CUDA_LOAD_BYTES, cudaHostAllocDefault),
             e);
    for (int i = 0; i < LOAD_SLOTS; i++) {
        CUDA_TRY(cudaEventCreateWithFlags(&l->arrived[i], cudaEventDisableTiming), e);
        CUDA_TRY(cudaEventCreateWithFlags(&l->tiled[i], cudaEventDisableTiming), e);
    }
    return OK;
}

/* The next slot, once the copy out of it is over. */
static err_code load_slot(device *d, cuda_load **out, err *e)
{
    cuda_state *s = cuda_of(d);
    void *mem;
    if (!s->load) {
        TRY(mem_alloc(&mem, 1, sizeof(cuda_load), "upload", e));
        const err_code rc = load_make((cuda_load *)mem, e);
        if (rc != OK) {
            load_free((cuda_load *)mem);
            return rc;
        }
        s->load = (cuda_load *)mem;
    }
    cuda_load *l = *out = s->load;
    l->last = l->next;
    l->next = (l->next + 1) % LOAD_SLOTS;
    CUDA_TRY(cudaEventSynchronize(l->arrived[l->last]), e);
    return OK;
}

err_code cuda_load_copy(device *d, void *dst, const void *src, size_t bytes, err *e)
{
    const cudaStream_t stream = cuda_of(d)->stream;
    cuda_load *l;
    for (size_t at = 0; at < bytes; at += CUDA_LOAD_BYTES) {
        const size_t left = bytes - at, n = left < CUDA_LOAD_BYTES ? left : CUDA_LOAD_BYTES;
        const cuda_piece piece = {(const uint8_t *)src + at, n};
        TRY(load_slot(d, &l, e));
        uint8_t *pinned = l->pinned + (size_t)l->last * CUDA_LOAD_BYTES;
        fill(d, pinned, &piece, 1);
        CUDA_TRY(cudaMemcpyAsync((uint8_t *)dst + at, pinned, n, cudaMemcpyHostToDevice, stream),
                 e);
        CUDA_TRY(cudaEventRecord(l->arrived[l->last], stream), e);
    }
    return OK;
}

err_code cuda_load_raw(device *d, const cuda_piece *piece, int n, uint8_t **at, err *e)
{
    const size_t bytes = cuda_load_need(piece, n);
    cuda_load *l;
    TRY(load_slot(d, &l, e));
    if (!l->raw) CUDA_TRY(cudaMalloc((void **)&l->raw, LOAD_SLOTS * CUDA_LOAD_BYTES), e);
    const size_t slot = (size_t)l->last * CUDA_LOAD_BYTES;
    fill(d, l->pinned + slot, piece, n);
    CUDA_TRY(cudaStreamWaitEvent(l->stream, l->tiled[l->last], 0), e);
    CUDA_TRY(
        cudaMemcpyAsync(l->raw + slot, l->pinned + slot, bytes, cudaMemcpyHostToDevice, l->stream),
        e);
    CUDA_TRY(cudaEventRecord(l->arrived[l->last], l->stream), e);
    CUDA_TRY(cudaStreamWaitEvent(cuda_of(d)->stream, l->arrived[l->last], 0), e);
    size_t off = slot;
    for (int i = 0; i < n; i++) {
        at[i] = l->raw + off;
        off += aligned(piece[i].bytes);
    }
    return OK;
}

err_code cuda_load_tiled(device *d, err *e)
{
    cuda_load *l = cuda_of(d)->load;
    CUDA_TRY(cudaEventRecord(l->tiled[l->last], cuda_of(d)->stream), e);
    return OK;
}

err_code cuda_load_end(device *d, err *e)
{
    cuda_state *s = cuda_of(d);
    if (!s->load) return OK;
    const cudaError_t rc = cudaStreamSynchronize(s->stream);
    load_free(s->load);
    s->load = NULL;
    return cuda_launched(d, "upload", rc, e);
}

/* ---- memory read where it lies ---- */

static uintptr_t page_down(uintptr_t p)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    return p / page * page;
}

err_code cuda_map(void **out, device *d, const void *host, size_t bytes, err *e)
{
    const uintptr_t at = (uintptr_t)host, first = page_down(at);
    const size_t all = page_down(at + bytes - 1) + (size_t)sysconf(_SC_PAGESIZE) - first;
    void *there;
    (void)d;
    CUDA_TRY(
        cudaHostRegister((void *)first, all, cudaHostRegisterMapped | cudaHostRegisterReadOnly), e);
    CUDA_TRY(cudaHostGetDevicePointer(&there, (void *)first, 0), e);
    *out = (uint8_t *)there + (at - first);
    return OK;
}

void cuda_unmap(device *d, void *host)
{
    cudaStreamSynchronize(cuda_of(d)->stream);
    cudaHostUnregister((void *)page_down((uintptr_t)host));
}

/* ---- cuBLAS ---- */

/* A handle takes hundreds of milliseconds: a thread makes it while weights are loaded. */
struct cuda_blas_maker {
    pthread_t thread;
    bool running;
    int index;
    cudaStream_t stream;
    void *work;
    cublasHandle_t blas;
    cublasStatus_t rc;
};

static void *blas_make(void *arg)
{
    cuda_blas_maker *b = (cuda_blas_maker *)arg;
    b->rc = CUBLAS_STATUS_NOT_INITIALIZED;
    if (cudaSetDevice(b->index) != cudaSuccess) return NULL;
    if ((b->rc = cublasCreate(&b->blas)) != CUBLAS_STATUS_SUCCESS) return NULL;
    if ((b->rc = cublasSetStream(b->blas, b->stream)) != CUBLAS_STATUS_SUCCESS) return NULL;
    b->rc = cublasSetWorkspace(b->blas, b->work, CUDA_BLAS_BYTES);
    return NULL;
}

err_code cuda_blas_open(device *d, int index, err *e)
{
    cuda_state *s = cuda_of(d);
    void *mem;
    TRY(mem_alloc(&mem, 1, sizeof(cuda_blas_maker), "cublas", e));
    cuda_blas_maker *b = s->maker = (cuda_blas_maker *)mem;
    b->index = index;
    b->stream = s->stream;
    /* A workspace of our own: recorded work may not allocate, and its bytes are counted. */
    CUDA_TRY(cudaMalloc(&b->work, CUDA_BLAS_BYTES), e);
    b->running = pthread_create(&b->thread, NULL, blas_make, b) == 0;
    if (!b->running) blas_make(b);
    return OK;
}

cublasHandle_t cuda_blas_of(const device *d)
{
    cuda_blas_maker *b = cuda_of(d)->maker;
    if (b->running) pthread_join(b->thread, NULL);
    b->running = false;
    return b->rc == CUBLAS_STATUS_SUCCESS ? b->blas : NULL;
}

void cuda_blas_close(device *d)
{
    cuda_blas_maker *b = cuda_of(d)->maker;
    if (!b) return;
    if (b->running) pthread_join(b->thread, NULL);
    if (b->blas) cublasDestroy(b->blas);
    cudaFree(b->work);
    mem_free(b);
}
