/* The part of a device that is the same for all kinds. */
#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/device_internal.h"

/* A slot that nobody filled would crash in the middle of a run: refuse the device instead. */
static err_code table_complete(const device *d, err *e)
{
    const op_table *t = &d->ops;
    const struct {
        const char *name;
        bool filled;
    } slot[] = {{"embed", t->embed},
                {"rmsnorm", t->rmsnorm},
                {"add", t->add},
                {"gemm", t->gemm},
                {"gemm_w4", t->gemm_w4},
                {"glu", t->glu},
                {"rope_kv", t->rope_kv},
                {"attn", t->attn},
                {"nll", t->nll},
                {"absstat", t->absstat},
                {"gram", t->gram},
                {"gram_finish", t->gram_finish},
                {"quad", t->quad},
                {"matmul", t->matmul},
                {"w4_upload", t->w4_upload},
                {"w4_upload_bytes", t->w4_upload_bytes},
                {"scratch_bytes", t->scratch_bytes}};
    for (size_t i = 0; i < sizeof slot / sizeof *slot; i++) {
        if (!slot[i].filled)
            return err_set(e, E_UNSUPPORTED, "%s: no kernel for '%s'", d->name, slot[i].name);
    }
    return OK;
}

err_code dev_open(device **out, const dev_opts *o, err *e)
{
    void *p;
    *out = NULL;
#ifndef TMF_CUDA
    if (o->kind == DEV_CUDA) return err_set(e, E_UNSUPPORTED, "device cuda: built without CUDA");
#endif
    if (o->kind != DEV_CPU && o->kind != DEV_CUDA)
        return err_set(e, E_USAGE, "device: unknown kind %d", (int)o->kind);
    TRY(mem_alloc(&p, 1, sizeof(device), "device", e));
    device *d = p;
    d->kind = o->kind;
    d->deterministic = o->deterministic;
#ifdef TMF_CUDA
    err_code rc = o->kind == DEV_CUDA ? device_cuda_open(d, o, e) : device_cpu_open(d, o, e);
#else
    err_code rc = device_cpu_open(d, o, e);
#endif
    if (rc == OK) rc = table_complete(d, e);
    if (rc != OK) {
        dev_close(&d);
        return rc;
    }
    *out = d;
    return OK;
}

void dev_close(device **d)
{
    if (!d || !*d) return;
    if ((*d)->backend) (*d)->backend->close(*d);
    mem_free(*d);
    *d = NULL;
}

err_code dev_use(device *d, err *e) { return d->backend->use ? d->backend->use(d, e) : OK; }

dev_kind dev_kind_of(const device *d) { return d->kind; }
memspace dev_mem(const device *d) { return d->mem; }
dtype dev_act(const device *d) { return d->act; }
dtype dev_resid(const device *d) { return d->resid; }
pool *dev_pool(device *d) { return d->workers; }
const char *dev_name(const device *d) { return d->name; }

/* ---- memory ---- */

err_code dev_pack_begin(device *d, size_t bytes, const char *what, err *e)
{
    void *p, *data;
    assert(!d->pack);
    if (d->mem == MEM_HOST || bytes == 0) return OK;
    TRY(d->backend->alloc(&data, d, bytes, what, e));
    const err_code rc = mem_alloc(&p, 1, sizeof(dev_pack), what, e);
    if (rc != OK) {
        d->backend->release(d, data);
        return rc;
    }
    d->pack = p;
    *d->pack = (dev_pack){data, bytes, 0, 1};
    return OK;
}

static void pack_drop(device *d, dev_pack *p)
{
    if (--p->live > 0) return;
    d->backend->release(d, p->data);
    mem_free(p);
}

void dev_pack_end(device *d)
{
    if (d->pack) pack_drop(d, d->pack);
    d->pack = NULL;
}

/* The piece was zeroed, and no part of it is handed out twice. */
static bool pack_take(dev_buf *out, device *d, size_t bytes)
{
    dev_pack *p = d->pack;
    if (!p || bytes == 0 || bytes > p->bytes - p->used) return false;
    const size_t whole = (bytes + DEV_PACK_ALIGN - 1) / DEV_PACK_ALIGN * DEV_PACK_ALIGN;
    out->data = p->data + p->used;
    out->pack = p;
    p->used += whole < p->bytes - p->used ? whole : p->bytes - p->used;
    p->live++;
    return true;
}

err_code dev_alloc(dev_buf *out, device *d, size_t bytes, const char *what, err *e)
{
    memset(out, 0, sizeof *out);
    if (!pack_take(out, d, bytes)) TRY(d->backend->alloc(&out->data, d, bytes, what, e));
    out->bytes = bytes;
    out->mem = d->mem;
    out->dev = d;
    return OK;
}

void dev_free(dev_buf *b)
{
    if (!b) return;
    if (b->data) {
        assert(b->dev);
        if (b->mem != b->dev->mem)
            b->dev->backend->unmap(b->dev, b->data);
        else if (b->pack)
            pack_drop(b->dev, b->pack);
        else
            b->dev->backend->release(b->dev, b->data);
    }
    memset(b, 0, sizeof *b);
}

dev_footprint dev_footprint_of(const device *d) { return d->footprint; }

static err_code check_copy(const tensor *dst, const tensor *src, err *e)
{
    bool same = dst->dt == src->dt && dst->ndim == src->ndim;
    for (int i = 0; same && i < dst->ndim; i++) same = dst->shape[i] == src->shape[i];
    if (!same) {
        char a[128], b[128];
        tensor_describe(a, sizeof a, dst);
        tensor_describe(b, sizeof b, src);
        return err_set(e, E_SHAPE, "dev_copy: expected %s, got %s", a, b);
    }
    if (!tensor_contiguous(dst) || !tensor_contiguous(src))
        return err_set(e, E_SHAPE, "dev_copy: expected contiguous tensors");
    return OK;
}

err_code dev_copy(device *d, tensor *dst, const tensor *src, err *e)
{
    TRY(check_copy(dst, src, e));
    return d->backend->copy(d, dst, src, e);
}

err_code dev_host_alloc(void **out, device *d, size_t bytes, const char *what, err *e)
{
    if (d->backend->host_alloc) return d->backend->host_alloc(out, d, bytes, what, e);
    return mem_alloc(out, bytes, 1, what, e);
}

void dev_host_free(device *d, void *p)
{
    if (!p) return;
    if (d->backend->host_release)
        d->backend->host_release(d, p);
    else
        mem_free(p);
}

err_code dev_copy_beside(device *d, tensor *dst, const tensor *src, dev_lane lane, err *e)
{
    TRY(check_copy(dst, src, e));
    if (!d->backend->copy_beside) return d->backend->copy(d, dst, src, e);
    return d->backend->copy_beside(d, dst, src, lane, e);
}

err_code dev_order(device *d, dev_lane first, dev_lane then, err *e)
{
    return d->backend->order ? d->backend->order(d, first, then, e) : OK;
}

err_code dev_sync(device *d, err *e) { return d->backend->sync(d, e); }

err_code dev_memory(device *d, size_t *free_bytes, size_t *total_bytes, err *e)
{
    return d->backend->memory(d, free_bytes, total_bytes, e);
}

err_code dev_upload(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e)
{
    memset(buf, 0, sizeof *buf);
    if (host->mem != MEM_HOST) return err_set(e, E_SHAPE, "dev_upload: expected a host tensor");
    return d->backend->upload(d, buf, out, host, e);
}

bool dev_can_map(const device *d) { return d->maps; }

err_code dev_map(device *d, dev_buf *buf, tensor *out, const tensor *host, err *e)
{
    void *there;
    memset(buf, 0, sizeof *buf);
    if (!d->maps) return err_set(e, E_UNSUPPORTED, "%s: cannot read host memory", d->name);
    if (host->mem != MEM_HOST || !tensor_contiguous(host))
        return err_set(e, E_SHAPE, "dev_map: expected a contiguous host tensor");
    TRY(d->backend->map(&there, d, host->data, tensor_bytes(host), e));
    *buf = (dev_buf){.data = host->data, .bytes = tensor_bytes(host), .mem = MEM_HOST, .dev = d};
    *out = *host;
    out->data = there;
    out->mem = d->mem;
    return OK;
}

/* Matrices are 16-bit on CUDA. */
size_t dev_upload_bytes(const device *d, const tensor *host)
{
    const bool halved = d->mem != MEM_HOST && host->ndim == 2 && host->dt == DT_F32;
    return tensor_bytes(host) / (halved ? 2 : 1);
}

err_code dev_upload_end(device *d, err *e)
{
    return d->backend->upload_end ? d->backend->upload_end(d, e) : OK;
}

err_code dev_scratch(device *d, void **out, size_t bytes, const char *op, err *e)
{
    *out = d->shared_scratch;
    if (bytes <= d->shared_bytes) return OK;
    return err_set(e, E_LIMIT, "%s: needs %zu bytes of scratch, ops_reserve was told of %zu", op,
                   bytes, d->shared_bytes);
}

/* ---- recorded work ---- */

struct dev_graph {
    device *d;
    void *graph;
};

bool dev_can_record(const device *d) { return d->backend->record_begin != NULL; }

err_code dev_record_begin(device *d, err *e) { return d->backend->record_begin(d, e); }

err_code dev_record_end(device *d, dev_graph **out, err *e)
{
    void *graph, *p;
    *out = NULL;
    TRY(d->backend->record_end(d, &graph, e));
    const err_code rc = mem_alloc(&p, 1, sizeof(dev_graph), "recorded work", e);
    if (rc != OK) {
        d->backend->record_free(d, graph);
        return rc;
    }
    *out = p;
    (*out)->d = d;
    (*out)->graph = graph;
    return OK;
}

err_code dev_graph_run(dev_graph *g, err *e)
{
    return g->d->backend->record_run(g->d, g->graph, e);
}

void dev_graph_free(dev_graph **g)
{
    if (!g || !*g) return;
    (*g)->d->backend->record_free((*g)->d, (*g)->graph);
    mem_free(*g);
    *g = NULL;
}

err_code dev_move_words(device *d, const dev_move *moves, int n, err *e)
{
    if (n < 0 || n > DEV_MOVES)
        return err_set(e, E_LIMIT, "dev_move_words: expected up to %d moves, got %d", DEV_MOVES, n);
    return d->backend->move_words(d, moves, n, e);
}

err_code dev_mark(device *d, err *e) { return d->backend->mark(d, e); }

err_code dev_mark_wait(device *d, err *e) { return d->backend->mark_wait(d, e); }
