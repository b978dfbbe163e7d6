/* Reader: the file is mapped, the header parsed once, tensors are views into the mapping. */
#include "formats/safetensors.h"

#include <assert.h>
#include <string.h>

#include "base/mem.h"
#include "formats/st_header.h"

struct st_file {
    char *path;
    file_map map; /* empty for borrowed bytes */
    const uint8_t *bytes;
    size_t size;
    const uint8_t *data; /* behind the header */
    st_header h;
};

static uint64_t load_u64(const uint8_t *p)
{
    uint64_t v = 0;
    for (int i = 7; i >= 0; i--) v = v << 8 | p[i];
    return v;
}

/* f->bytes and f->size are set. */
static err_code st_parse(st_file *f, err *e)
{
    if (f->size < 8)
        return err_set(e, E_INPUT, "a safetensors file has at least 8 bytes, this one has %zu",
                       f->size);
    const uint64_t n = load_u64(f->bytes);
    if (n > ST_MAX_HEADER)
        return err_set(e, E_INPUT, "header of %llu bytes, expected at most %d",
                       (unsigned long long)n, ST_MAX_HEADER);
    if (n > f->size - 8)
        return err_set(e, E_INPUT,
                       "header of %llu bytes reaches beyond the file's %zu (cut short?)",
                       (unsigned long long)n, f->size);
    f->data = f->bytes + 8 + n;
    return st_header_parse(&f->h, (const char *)f->bytes + 8, (size_t)n, f->size - 8 - n, e);
}

/* map: the file at `path`, which may be empty; else the borrowed bytes. */
static err_code st_start(st_file **out, const char *path, const void *data, size_t size, bool map,
                         err *e)
{
    st_file *f;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc((void **)&f, 1, sizeof *f, path, e));
    if ((rc = mem_strdup(&f->path, path, e)) != OK) goto done;
    if (map && (rc = file_map_open(&f->map, path, e)) != OK) goto done;
    f->bytes = map ? f->map.data : data;
    f->size = map ? f->map.size : size;
    if ((rc = st_parse(f, e)) != OK) {
        rc = err_wrap(e, "%s", path);
        goto done;
    }
    *out = f;
    f = NULL;
done:
    st_close(&f);
    return rc;
}

err_code st_open(st_file **out, const char *path, err *e)
{
    return st_start(out, path, NULL, 0, true, e);
}

err_code st_open_memory(st_file **out, const void *data, size_t size, const char *name, err *e)
{
    return st_start(out, name, data, size, false, e);
}

void st_close(st_file **f)
{
    if (!*f) return;
    st_header_free(&(*f)->h);
    file_map_close(&(*f)->map);
    mem_free((*f)->path);
    mem_free(*f);
    *f = NULL;
}

const char *st_path(const st_file *f) { return f->path; }
int64_t st_count(const st_file *f) { return f->h.n; }
uint64_t st_bytes(const st_file *f) { return f->size; }

const void *st_head(const st_file *f, size_t *n)
{
    *n = (size_t)(f->data - f->bytes);
    return f->bytes;
}

static tensor st_view(const st_file *f, const st_item *t)
{
    int64_t shape[TENSOR_MAX_DIMS];
    const int fold = t->ndim > TENSOR_MAX_DIMS ? t->ndim - TENSOR_MAX_DIMS : 0;
    for (int i = 0; i < t->ndim - fold; i++) shape[i] = t->shape[i + fold];
    for (int i = 0; i < fold; i++) shape[0] *= t->shape[i]; /* the whole product was checked */
    return tensor_of((void *)(uintptr_t)(f->data + t->begin), t->dt, t->ndim - fold, shape);
}

st_entry st_at(const st_file *f, int64_t i)
{
    assert(i >= 0 && i < f->h.n);
    const st_item *t = &f->h.items[i];
    st_entry r = {.name = t->name, .view = st_view(f, t), .full_ndim = t->ndim};
    memcpy(r.full_shape, t->shape, sizeof r.full_shape);
    return r;
}

bool st_find(const st_file *f, const char *name, tensor *view)
{
    const st_item *t = st_header_find(&f->h, name);
    if (t) *view = st_view(f, t);
    return t != NULL;
}

bool st_aligned(const tensor *view)
{
    const size_t bytes = dtype_bytes(view->dt);
    return bytes < 2 || (uintptr_t)view->data % bytes == 0;
}

err_code st_get(const st_file *f, const char *name, tensor *view, err *e)
{
    char shown[ST_SHOWN];
    if (!st_find(f, name, view))
        return err_set(e, E_INPUT, "%s: tensor '%s' is missing", f->path, st_shown(shown, name));
    if (!st_aligned(view))
        return err_set(e, E_UNSUPPORTED, "%s: tensor '%s': its data is not aligned to %s", f->path,
                       st_shown(shown, name), dtype_name(view->dt));
    return OK;
}

const char *st_meta(const st_file *f, const char *key)
{
    for (int64_t i = 0; i < f->h.n_meta; i++)
        if (strcmp(f->h.meta[i].key, key) == 0) return f->h.meta[i].value;
    return NULL;
}

void st_advise(const st_file *f, const tensor *view, bool need)
{
    if (!f->map.data) return; /* borrowed bytes */
    const size_t off = (size_t)((const uint8_t *)view->data - f->bytes);
    if (need)
        file_map_willneed(&f->map, off, tensor_bytes(view));
    else
        file_map_dontneed(&f->map, off, tensor_bytes(view));
}
