/* A CUDA device: one stream, cuBLAS on it, its table by compute capability. */
#include <cublas_v2.h>
#include <stdio.h>
#include <string.h>

#include "kernels/device_cuda.cuh"

static cuda_state *state(const device *d) { return (cuda_state *)d->backend_data; }

cudaStream_t dev_stream(const device *d) { return state(d)->stream; }

extern "C" {

static err_code cuda_alloc(void **out, device *d, size_t bytes, const char *what, err *e)
{
    *out = NULL;
    if (!bytes) return OK;
    const cudaError_t rc = cudaMalloc(out, bytes);
    if (rc != cudaSuccess) {
        cudaGetLastError();
        *out = NULL;
        return err_set(e, rc == cudaErrorMemoryAllocation ? E_NOMEM : E_DEVICE,
                       "%s: %zu bytes on %s: %s", what, bytes, d->name, cudaGetErrorString(rc));
    }
    CUDA_TRY(cudaMemsetAsync(*out, 0, bytes, state(d)->stream), e);
    return OK;
}

static void cuda_release(device *d, void *p)
{
    cudaStreamSynchronize(state(d)->stream);
    cudaFree(p);
}

static err_code cuda_copy(device *d, tensor *dst, const tensor *src, err *e)
{
    if (!tensor_count(dst)) return OK;
    TRY(cuda_pass_flush(d, e));
    state(d)->planes.x = NULL;
    CUDA_TRY(cudaMemcpyAsync(dst->data, src->data, tensor_bytes(dst), cudaMemcpyDefault,
                             state(d)->stream),
             e);
    return OK;
}

/* What a wait for the ops came to. */
static err_code cuda_waited(const device *d, cudaError_t rc, err *e)
{
    if (rc == cudaSuccess) return OK;
    cudaGetLastError();
    return err_set(e, E_DEVICE, "%s: after %s: %s", d->name, state(d)->last_op,
                   cudaGetErrorString(rc));
}

static err_code cuda_sync(device *d, err *e)
{
    return cuda_waited(d, cudaStreamSynchronize(state(d)->stream), e);
}

static err_code cuda_memory(device *d, size_t *free_bytes, size_t *total_bytes, err *e)
{
    (void)d;
    CUDA_TRY(cudaMemGetInfo(free_bytes, total_bytes), e);
    return OK;
}

/* 16-bit matrices are f16 on the device: bf16 ones are turned in place, f32 ones on the host. */
static err_code upload_f32(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e)
{
    void *mem;
    TRY(mem_alloc(&mem, (size_t)tensor_count(host), 2, "weights", e));
    tensor half = tensor_of(mem, DT_F16, host->ndim, host->shape);
    tensor_convert(&half, host);
    err_code rc = dev_alloc(buf, d, tensor_bytes(&half), "weights", e);
    if (rc == OK) {
        *out = half;
        out->data = buf->data;
        out->mem = MEM_CUDA;
        rc = dev_copy(d, out, &half, e);
    }
    if (rc == OK) rc = dev_sync(d, e);
    mem_free(mem);
    return rc;
}

static err_code cuda_upload(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e)
{
    if (host->ndim == 2 && host->dt == DT_F32) return upload_f32(d, buf, out, host, e);
    TRY(dev_alloc(buf, d, tensor_bytes(host), "weights", e));
    *out = *host;
    out->data = buf->data;
    out->mem = MEM_CUDA;
    TRY(cuda_load_copy(d, out->data, host->data, tensor_bytes(host), e));
    if (host->dt != DT_BF16) return OK;
    out->dt = DT_F16;
    return rows_bf16_to_f16_cuda(d, out, e);
}

static void cuda_close(device *d)
{
    cuda_state *s = state(d);
    if (s) {
        err ignored;
        (void)cuda_load_end(d, &ignored);
        cuda_blas_close(d);
        cudaFree(s->counters);
        cudaFree(d->shared_scratch);
        for (int i = 0; i < 2; i++)
            if (s->lane[i]) cudaStreamDestroy(s->lane[i]);
        if (s->order) cudaEventDestroy(s->order);
        if (s->mark) cudaEventDestroy(s->mark);
        if (s->stream) cudaStreamDestroy(s->stream);
        mem_free(s->pass);
    }
    mem_free(s);
    pool_close(&d->workers);
}

/* Streams belong to a device, which is a thread's own setting. */
static err_code cuda_use(device *d, err *e)
{
    CUDA_TRY(cudaSetDevice(state(d)->index), e);
    return OK;
}

/* ---- recorded work ---- */
static err_code cuda_record_begin(device *d, err *e)
{
    CUDA_TRY(cudaStreamBeginCapture(state(d)->stream, cudaStreamCaptureModeThreadLocal), e);
    cuda_pass_begin(d);
    return OK;
}

static err_code cuda_record_end(device *d, void **graph, err *e)
{
    cudaGraph_t g = NULL;
    cudaGraphExec_t x = NULL;
    const err_code flushed = cuda_pass_flush(d, e);
    cuda_pass_end(d);
    cudaError_t rc = cudaStreamEndCapture(state(d)->stream, &g);
    if (flushed != OK) {
        if (g) cudaGraphDestroy(g);
        return flushed;
    }
    if (rc == cudaSuccess) rc = cudaGraphInstantiate(&x, g, 0);
    if (g) cudaGraphDestroy(g);
    CUDA_TRY(rc, e);
    *graph = x;
    return OK;
}

static err_code cuda_record_run(device *d, void *graph, err *e)
{
    state(d)->planes.x = NULL;
    CUDA_TRY(cudaGraphLaunch((cudaGraphExec_t)graph, state(d)->stream), e);
    return OK;
}

static void cuda_record_free(device *d, void *graph)
{
    cudaStreamSynchronize(state(d)->stream);
    cudaGraphExecDestroy((cudaGraphExec_t)graph);
}

static err_code cuda_mark(device *d, err *e)
{
    cuda_state *s = state(d);
    TRY(cuda_pass_flush(d, e));
    if (!s->mark) CUDA_TRY(cudaEventCreateWithFlags(&s->mark, cudaEventDisableTiming), e);
    CUDA_TRY(cudaEventRecord(s->mark, s->stream), e);
    return OK;
}

static err_code cuda_mark_wait(device *d, err *e)
{
    return cuda_waited(d, cudaEventSynchronize(state(d)->mark), e);
}

/* ---- copies beside the ops ---- */

static err_code cuda_host_alloc(void **out, device *d, size_t bytes, const char *what, err *e)
{
    const cudaError_t rc = cudaHostAlloc(out, bytes ? bytes : 1, cudaHostAllocDefault);
    if (rc == cudaSuccess) {
        memset(*out, 0, bytes);
        return OK;
    }
    cudaGetLastError();
    *out = NULL;
    return err_set(e, rc == cudaErrorMemoryAllocation ? E_NOMEM : E_DEVICE,
                   "%s: %zu pinned bytes for %s: %s", what, bytes, d->name, cudaGetErrorString(rc));
}

static void cuda_host_release(device *d, void *p)
{
    cuda_state *s = state(d);
    for (int i = 0; i < 2; i++)
        if (s->lane[i]) cudaStreamSynchronize(s->lane[i]);
    cudaStreamSynchronize(s->stream);
    cudaFreeHost(p);
}

static err_code lane_of(device *d, dev_lane lane, cudaStream_t *out, err *e)
{
    cuda_state *s = state(d);
    *out = s->stream;
    if (lane == LANE_OPS) return cuda_pass_flush(d, e);
    if (!s->order) CUDA_TRY(cudaEventCreateWithFlags(&s->order, cudaEventDisableTiming), e);
    if (!s->lane[lane - 1])
        CUDA_TRY(cudaStreamCreateWithFlags(&s->lane[lane - 1], cudaStreamNonBlocking), e);
    *out = s->lane[lane - 1];
    return OK;
}

static err_code cuda_copy_beside(device *d, tensor *dst, const tensor *src, dev_lane lane, err *e)
{
    cudaStream_t q;
    TRY(lane_of(d, lane, &q, e));
    CUDA_TRY(cudaMemcpyAsync(dst->data, src->data, tensor_bytes(dst), cudaMemcpyDefault, q), e);
    return OK;
}

static err_code cuda_order(device *d, dev_lane first, dev_lane then, err *e)
{
    cudaStream_t a, b;
    TRY(lane_of(d, first, &a, e));
    TRY(lane_of(d, then, &b, e));
    CUDA_TRY(cudaEventRecord(state(d)->order, a), e);
    CUDA_TRY(cudaStreamWaitEvent(b, state(d)->order, 0), e);
    return OK;
}

static const dev_backend cuda_backend = {
    cuda_alloc,      cuda_release,      cuda_copy,        cuda_sync,         cuda_memory,
    cuda_upload,     cuda_close,        cuda_use,         cuda_record_begin, cuda_record_end,
    cuda_record_run, cuda_record_free,  cuda_move_words,  cuda_mark,         cuda_mark_wait,
    cuda_host_alloc, cuda_host_release, cuda_copy_beside, cuda_order,        cuda_load_end,
    cuda_map,        cuda_unmap};

/* Asked as soon as there is a context. */
static err_code open_footprint(device *d, err *e)
{
    size_t total;
    CUDA_TRY(cudaMemGetInfo(&d->footprint.free_bytes, &total), e);
    d->footprint.context_bytes = total - d->footprint.free_bytes;
    return OK;
}

static err_code open_handles(device *d, cuda_state *s, int index, err *e)
{
    CUDA_TRY(cudaStreamCreateWithFlags(&s->stream, cudaStreamNonBlocking), e);
    CUDA_TRY(cudaMalloc((void **)&s->counters, CUDA_COUNTER_BYTES), e);
    CUDA_TRY(cudaMemsetAsync(s->counters, 0, CUDA_COUNTER_BYTES, s->stream), e);
    return cuda_blas_open(d, index, e);
}

err_code device_cuda_open(device *d, const dev_opts *o, err *e)
{
    struct cudaDeviceProp p;
    void *mem;
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
        cudaGetLastError();
        return err_set(e, E_UNSUPPORTED, "device cuda: no usable driver or GPU on this machine");
    }
    if (o->index < 0 || o->index >= count)
        return err_set(e, E_USAGE, "device cuda:%d: expected 0 to %d", o->index, count - 1);
    CUDA_TRY(cudaSetDevice(o->index), e);
    CUDA_TRY(cudaGetDeviceProperties(&p, o->index), e);
    const int own = p.major * 10 + p.minor, sm = o->sm && o->sm < own ? o->sm : own;
    snprintf(d->name, sizeof d->name, "cuda:%d (%.40s, sm_%d)", o->index, p.name, sm);
    if (sm < 75)
        return err_set(e, E_UNSUPPORTED, "%s: needs compute capability 7.5 or newer", d->name);
    d->backend = &cuda_backend;
    d->mem = MEM_CUDA;
    d->act = DT_F16;
    d->resid = DT_F32;
    TRY(pool_open(&d->workers, o->threads, e));
    d->threads = pool_threads(d->workers);
    TRY(mem_alloc(&mem, 1, sizeof(cuda_state), "device", e));
    d->backend_data = mem;
    cuda_state *s = (cuda_state *)mem;
    s->index = o->index;
    s->sm = sm;
    s->sms = p.multiProcessorCount;
    s->last_op = "open";
    TRY(open_footprint(d, e));
    int maps;
    CUDA_TRY(cudaDeviceGetAttribute(&maps, cudaDevAttrHostRegisterReadOnlySupported, o->index), e);
    d->maps = maps;
    d->footprint.own_bytes = CUDA_BLAS_BYTES + CUDA_COUNTER_BYTES;
    TRY(open_handles(d, s, o->index, e));
    if (!d->deterministic) TRY(cuda_pass_make(d, e)); /* its splits follow the batch */
    ops_init_cuda(&d->ops, sm);
    return OK;
}

} /* extern "C" */
