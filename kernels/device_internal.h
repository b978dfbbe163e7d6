/* What kernels/ alone knows of a device: its table, pool, scratch and CPU features. */
#ifndef TMF_KERNELS_DEVICE_INTERNAL_H
#define TMF_KERNELS_DEVICE_INTERNAL_H

#include "kernels/device.h"
#include "kernels/ops.h"

/* Bits of device.cpu_flags. Each implies the instruction sets named and nothing about the others.
 */
enum {
    CPU_AVX2 = 1u << 0,       /* avx2, fma, f16c */
    CPU_AVX512 = 1u << 1,     /* avx512 f, bw, vl, dq */
    CPU_AVX512VNNI = 1u << 2, /* vpdpbusd on zmm */
    CPU_AVX512BF16 = 1u << 3, /* vdpbf16ps, vcvtne2ps2bf16 */
    CPU_AVXVNNI = 1u << 4,    /* vpdpbusd on ymm, VEX form */
    CPU_AMX = 1u << 5         /* amx-tile, amx-int8, amx-bf16, permitted to this process */
};
/* What this CPU and its system offer, bounded by `isa` (dev_opts.isa). E_USAGE for an unknown name.
 */
err_code cpu_flags_get(uint32_t *flags, const char *isa, err *e);
const char *cpu_flags_name(uint32_t flags); /* "amx", "avx512-vnni", "avx512", "avx2", "ref" */

/* Scratch of one device. Ops run one at a time, so each may use all of it from the start.
 * worker: a slice for each pool thread, of a size fixed here; tiles are cut to fit.
 * shared: sized by ops_reserve as the largest need of any op. */
#define DEV_WORKER_BYTES ((size_t)2 << 20)
/* The shared scratch if it has at least `bytes`, else E_LIMIT naming the op: ops_reserve was not
 * told. */
err_code dev_scratch(device *d, void **out, size_t bytes, const char *op, err *e);
/* One piece of device memory that buffers are cut from, in order. */
typedef struct dev_pack {
    uint8_t *data;
    size_t bytes, used;
    int64_t live; /* buffers cut from it, and 1 while it is open */
} dev_pack;
static inline size_t dev_align64(size_t n) { return (n + 63) & ~(size_t)63; }

typedef struct dev_backend {
    err_code (*alloc)(void **out, device *d, size_t bytes, const char *what, err *e); /* zeroed */
    void (*release)(device *d, void *p);
    err_code (*copy)(device *d, tensor *dst, const tensor *src, err *e);
    err_code (*sync)(device *d, err *e);
    err_code (*memory)(device *d, size_t *free_bytes, size_t *total_bytes, err *e);
    err_code (*upload)(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e);
    void (*close)(device *d);           /* what dev_open of the backend made, scratch included */
    err_code (*use)(device *d, err *e); /* NULL: any thread may */
    /* recorded work; NULL where the device cannot */
    err_code (*record_begin)(device *d, err *e);
    err_code (*record_end)(device *d, void **graph, err *e);
    err_code (*record_run)(device *d, void *graph, err *e);
    void (*record_free)(device *d, void *graph);
    err_code (*move_words)(device *d, const dev_move *moves, int n, err *e);
    err_code (*mark)(device *d, err *e);
    err_code (*mark_wait)(device *d, err *e);
    /* copies beside the ops; NULL where nothing runs beside anything */
    err_code (*host_alloc)(void **out, device *d, size_t bytes, const char *what, err *e);
    void (*host_release)(device *d, void *p);
    err_code (*copy_beside)(device *d, tensor *dst, const tensor *src, dev_lane lane, err *e);
    err_code (*order)(device *d, dev_lane first, dev_lane then, err *e);
    err_code (*upload_end)(device *d, err *e); /* NULL: nothing to do */
    /* host memory as ops read it; NULL where the device cannot */
    err_code (*map)(void **out, device *d, const void *host, size_t bytes, err *e);
    void (*unmap)(device *d, void *host);
} dev_backend;

struct device {
    dev_kind kind;
    memspace mem;
    dtype act, resid;
    const dev_backend *backend;
    op_table ops;
    pool *workers;
    int threads;
    uint32_t cpu_flags;      /* 0 on CUDA */
    bool deterministic;      /* as dev_opts has it */
    uint8_t *worker_scratch; /* [threads][DEV_WORKER_BYTES] */
    void *shared_scratch;    /* [shared_bytes], NULL until ops_reserve */
    size_t shared_bytes;
    dev_pack *pack; /* what dev_alloc takes from, or NULL */
    dev_footprint footprint;
    bool maps;          /* read-only files too */
    void *backend_data; /* the backend's own */
    char name[64];
};

static inline void *dev_worker(device *d, int worker)
{
    return d->worker_scratch + (size_t)worker * DEV_WORKER_BYTES;
}

err_code device_cpu_open(device *d, const dev_opts *o, err *e); /* fills all but kind */
err_code device_cuda_open(device *d, const dev_opts *o,
                          err *e); /* in builds with CUDA (TMF_CUDA) */

#endif
