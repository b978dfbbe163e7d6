/* A device: one in-order stream, its op table, its scratch. The CPU device runs ops at once on a
 * thread pool; on CUDA they are queued and errors surface in dev_sync, naming the last op. One
 * thread at a time may use a device. */
#ifndef TMF_KERNELS_DEVICE_H
#define TMF_KERNELS_DEVICE_H

#include "base/err.h"
#include "base/pool.h"
#include "base/tensor.h"

typedef struct device device;
typedef enum { DEV_CPU = 0, DEV_CUDA } dev_kind;

typedef struct {
    dev_kind kind;
    int32_t index;   /* CUDA ordinal */
    int32_t threads; /* CPU: pool size, 0 = CPUs of this process */
    const char *isa; /* CPU: NULL or "auto", "ref", "avx2", "avx512", "amx": an upper bound on the
                        kernels used */
    bool deterministic; /* only kernels that round a row in the same way whatever rows are with it:
                           a sequence's results depend on nothing but its tokens */
    int32_t
        sm; /* CUDA: kernels for this compute capability (75, 80 ..) where the device has a newer
                   one, to check them; 0: its own */
} dev_opts;

typedef struct {
    void *data;
    size_t bytes;
    memspace mem;
    device *dev;
    struct dev_pack *pack; /* that it is a part of, or NULL */
} dev_buf;

err_code dev_open(device **out, const dev_opts *o,
                  err *e);  /* E_UNSUPPORTED without that backend or driver */
void dev_close(device **d); /* NULL accepted */
/* The calling thread is from now on the one that uses d; needless in the one that opened it. */
err_code dev_use(device *d, err *e);
dev_kind dev_kind_of(const device *d);
memspace dev_mem(const device *d);
dtype dev_act(const device *d);        /* activations: DT_F32 on the CPU, DT_F16 on CUDA */
dtype dev_resid(const device *d);      /* the residual stream: DT_F32 on both */
pool *dev_pool(device *d);             /* host threads (also of a CUDA device, for host work) */
const char *dev_name(const device *d); /* "cpu (avx512-vnni, 2 threads)" */

err_code dev_alloc(dev_buf *out, device *d, size_t bytes, const char *what, err *e); /* zeroed */
void dev_free(dev_buf *b); /* an empty one is fine */
err_code dev_copy(device *d, tensor *dst, const tensor *src,
                  err *e); /* same dtype and shape, contiguous, any space */
err_code dev_sync(device *d, err *e);
err_code dev_memory(device *d, size_t *free_bytes, size_t *total_bytes, err *e);
/* What the open device takes before anybody allocates. 0 on the CPU. */
typedef struct {
    size_t context_bytes; /* in use as soon as it could be asked: the driver's context, and whatever
                             other programs hold */
    size_t free_bytes;    /* free then */
    size_t own_bytes;     /* workspaces of libraries, counters */
} dev_footprint;
dev_footprint dev_footprint_of(const device *d);
/* From begin to end buffers are cut from one piece of `bytes` as long as they fit: devices hand
 * memory out in pages of 2 MiB, of which a buffer of its own wastes half a one. The piece goes with
 * the last of its buffers. Nothing happens on the CPU. */
err_code dev_pack_begin(device *d, size_t bytes, const char *what, err *e);
void dev_pack_end(device *d);
#define DEV_PACK_ALIGN 256 /* that each buffer is rounded up to */
/* A host tensor as the device sees it: on the CPU the same pointer (nothing copied, buf stays
 * empty), on CUDA a copy in `buf`. */
err_code dev_upload(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e);
size_t dev_upload_bytes(const device *d,
                        const tensor *host); /* of `buf`; on the CPU: of the tensor,
                                                                 where it lies */
/* Host memory, a mapped file's too, as the ops of a device with memory of its own read it: where it
 * lies, over the bus each time, its pages held until dev_free. For op_embed's tables. */
bool dev_can_map(const device *d);
err_code dev_map(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e);
/* Behind the last upload for now: waits for it and gives back what uploads travel through. */
err_code dev_upload_end(device *d, err *e);

/* Host memory that copies may use while ops run: pinned on CUDA. Zeroed. */
err_code dev_host_alloc(void **out, device *d, size_t bytes, const char *what, err *e);
void dev_host_free(device *d, void *p);
/* Queues of copies beside the queue of ops; on the CPU everything runs at once. */
typedef enum { LANE_OPS = 0, LANE_IN, LANE_OUT } dev_lane;
err_code dev_copy_beside(device *d, tensor *dst, const tensor *src, dev_lane lane, err *e);
/* What is queued on `then` from now on waits for what lies queued on `first`. dev_sync waits for
 * the ops alone. */
err_code dev_order(device *d, dev_lane first, dev_lane then, err *e);

/* Recorded work: ops between begin and end are not run but kept, and run again at each
 * dev_graph_run with what their tensors hold then. Only on devices that can; shapes, pointers and
 * host-side values (batch_rows' max_q and max_kv) are fixed at recording. Nothing may be allocated
 * or copied from the host meanwhile. */
typedef struct dev_graph dev_graph;
bool dev_can_record(const device *d);
err_code dev_record_begin(device *d, err *e);
err_code dev_record_end(device *d, dev_graph **out,
                        err *e); /* also after a failed op, to leave the state */
err_code dev_graph_run(dev_graph *g, err *e);
void dev_graph_free(dev_graph **g);

/* What lets a run be queued behind another whose results the host has not seen; only on devices
 * that can record. Moves of 32-bit words, done by the device in the order of its ops: both ends in
 * its memory or of dev_host_alloc. */
typedef struct {
    void *to;
    const void *from;
    const int32_t *index; /* NULL: to[i] = from[i]; else from[index[i]], and to[i] stays as it is
                             where index[i] is below 0 */
    int64_t n;
    bool ids; /* words below 0 become 0 */
} dev_move;
#define DEV_MOVES 12 /* at most, none reads what another one writes */
err_code dev_move_words(device *d, const dev_move *moves, int n, err *e);
/* The host waits for what was queued before the mark alone, not for what came behind it. */
err_code dev_mark(device *d, err *e);
err_code dev_mark_wait(device *d, err *e);

#endif
