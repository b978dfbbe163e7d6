/* The CPU as a device: host memory, ops that run at once on the pool. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/device_internal.h"

static err_code cpu_alloc(void **out, device *d, size_t bytes, const char *what, err *e)
{
    (void)d;
    return mem_alloc(out, bytes, 1, what, e);
}

static void cpu_release(device *d, void *p)
{
    (void)d;
    mem_free(p);
}

static err_code cpu_copy(device *d, tensor *dst, const tensor *src, err *e)
{
    (void)d;
    if (dst->mem != MEM_HOST || src->mem != MEM_HOST)
        return err_set(e, E_SHAPE, "dev_copy: a tensor of another device on the CPU");
    if (tensor_count(dst)) memmove(dst->data, src->data, tensor_bytes(dst));
    return OK;
}

static err_code cpu_sync(device *d, err *e)
{
    (void)d;
    (void)e;
    return OK;
}

/* MemAvailable counts page cache that can be dropped; free memory alone would understate it. */
static err_code cpu_memory(device *d, size_t *free_bytes, size_t *total_bytes, err *e)
{
    char line[256];
    uint64_t kb, avail_kb = 0, total_kb = 0;
    (void)d;
    FILE *f = fopen("/proc/meminfo", "r");
    while (f && fgets(line, sizeof line, f)) {
        if (sscanf(line, "MemAvailable: %" SCNu64, &kb) == 1) avail_kb = kb;
        if (sscanf(line, "MemTotal: %" SCNu64, &kb) == 1) total_kb = kb;
    }
    if (f) fclose(f);
    if (!avail_kb || !total_kb)
        return err_set(e, E_IO, "/proc/meminfo: cannot read MemAvailable and MemTotal");
    *free_bytes = (size_t)avail_kb * 1024;
    *total_bytes = (size_t)total_kb * 1024;
    return OK;
}

static err_code cpu_upload(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e)
{
    (void)d;
    (void)buf;
    (void)e;
    *out = *host;
    return OK;
}

static void cpu_close(device *d)
{
    pool_close(&d->workers);
    mem_free(d->worker_scratch);
    mem_free(d->shared_scratch);
}

static const dev_backend cpu_backend = {.alloc = cpu_alloc,
                                        .release = cpu_release,
                                        .copy = cpu_copy,
                                        .sync = cpu_sync,
                                        .memory = cpu_memory,
                                        .upload = cpu_upload,
                                        .close = cpu_close};

err_code device_cpu_open(device *d, const dev_opts *o, err *e)
{
    void *p;
    d->backend = &cpu_backend;
    d->mem = MEM_HOST;
    d->act = d->resid = DT_F32;
    if (o->threads < 0 || o->threads > 1024)
        return err_set(e, E_USAGE, "threads: expected 0 to 1024, got %d", o->threads);
    TRY(cpu_flags_get(&d->cpu_flags, o->isa, e));
    TRY(pool_open(&d->workers, o->threads, e));
    d->threads = pool_threads(d->workers);
    snprintf(d->name, sizeof d->name, "cpu (%s, %d thread%s)", cpu_flags_name(d->cpu_flags),
             d->threads, d->threads == 1 ? "" : "s");
    TRY(mem_alloc(&p, (size_t)d->threads, DEV_WORKER_BYTES, "kernel scratch", e));
    d->worker_scratch = p;
    ops_init_ref(&d->ops);
    ops_init_cpu(&d->ops, d->cpu_flags);
    return OK;
}
