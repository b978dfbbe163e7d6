/* Writer: everything is declared first, so the header's size and every place are known before the
 * first byte of data. The header itself is written last, when values of the metadata are final. */
#include "formats/safetensors.h"

#include <assert.h>
#include <stdlib.h>
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "formats/st_header.h"

typedef struct {
    int64_t from, to;
} st_range; /* elements */

typedef struct {
    char *name;
    dtype dt;
    int ndim;
    int64_t shape[ST_MAX_RANK], count;
    uint64_t at, bytes; /* in the data */
    st_range *done;     /* written so far: sorted, disjoint, not touching */
    int n_done, cap_done;
} st_out;

typedef struct {
    char *key, *value;
} st_own_pair;

struct st_writer {
    file_writer *file;
    char *path;
    st_own_pair *meta;
    int n_meta;
    st_out *t;
    int64_t n, cap;
    bool sealed;
    size_t head_bytes; /* length word, JSON and padding */
    uint64_t data_bytes;
};

/* ---- header text: measured with buf NULL, then written ---- */
typedef struct {
    char *buf;
    size_t n;
} text_out;

static void put_raw(text_out *o, const char *s, size_t n)
{
    if (o->buf) memcpy(o->buf + o->n, s, n);
    o->n += n;
}

static void put_str(text_out *o, const char *s) { put_raw(o, s, strlen(s)); }

static void put_quoted(text_out *o, const char *s)
{
    char esc[8];
    put_raw(o, "\"", 1);
    for (; *s; s++) {
        const unsigned char c = (unsigned char)*s;
        if (c >= 0x20 && c != '"' && c != '\\') {
            put_raw(o, s, 1);
            continue;
        }
        const int n = c < 0x20 ? snprintf(esc, sizeof esc, "\\u%04x", c)
                               : snprintf(esc, sizeof esc, "\\%c", c);
        put_raw(o, esc, (size_t)n);
    }
    put_raw(o, "\"", 1);
}

static void put_u64(text_out *o, uint64_t v)
{
    char digits[24];
    put_raw(o, digits, (size_t)snprintf(digits, sizeof digits, "%llu", (unsigned long long)v));
}

static void put_tensor(text_out *o, const st_out *t)
{
    put_quoted(o, t->name);
    put_str(o, ":{\"dtype\":\"");
    put_str(o, dtype_name(t->dt));
    put_str(o, "\",\"shape\":[");
    for (int i = 0; i < t->ndim; i++) {
        if (i) put_str(o, ",");
        put_u64(o, (uint64_t)t->shape[i]);
    }
    put_str(o, "],\"data_offsets\":[");
    put_u64(o, t->at);
    put_str(o, ",");
    put_u64(o, t->at + t->bytes);
    put_str(o, "]}");
}

static void put_header(text_out *o, const st_writer *w)
{
    put_str(o, "{");
    if (w->n_meta) {
        put_str(o, "\"__metadata__\":{");
        for (int i = 0; i < w->n_meta; i++) {
            if (i) put_str(o, ",");
            put_quoted(o, w->meta[i].key);
            put_str(o, ":");
            put_quoted(o, w->meta[i].value);
        }
        put_str(o, w->n ? "}," : "}");
    }
    for (int64_t i = 0; i < w->n; i++) {
        if (i) put_str(o, ",");
        put_tensor(o, &w->t[i]);
    }
    put_str(o, "}");
}

/* ---- opening and declaring ---- */
static int by_key(const void *a, const void *b)
{
    return strcmp(((const st_own_pair *)a)->key, ((const st_own_pair *)b)->key);
}

static err_code take_meta(st_writer *w, const char *const *meta, err *e)
{
    int n = 0;
    while (meta && meta[2 * n]) n++;
    TRY(mem_alloc((void **)&w->meta, (size_t)n, sizeof *w->meta, w->path, e));
    for (int i = 0; i < n; i++) {
        const char *key = meta[2 * i], *value = meta[2 * i + 1];
        w->n_meta = i + 1;
        TRY(mem_strdup(&w->meta[i].key, key, e));
        TRY(mem_strdup(&w->meta[i].value, value, e));
        if (!json_utf8_valid(key, strlen(key)) || !json_utf8_valid(value, strlen(value)))
            return err_set(e, E_INPUT, "%s: metadata is not UTF-8", w->path);
    }
    if (n) qsort(w->meta, (size_t)n, sizeof *w->meta, by_key);
    for (int i = 1; i < n; i++)
        if (strcmp(w->meta[i].key, w->meta[i - 1].key) == 0)
            return err_set(e, E_CHECK, "%s: metadata key '%s' given twice", w->path,
                           w->meta[i].key);
    return OK;
}

err_code st_writer_open(st_writer **out, const char *path, const char *const *meta, bool force,
                        err *e)
{
    st_writer *w;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc((void **)&w, 1, sizeof *w, path, e));
    if ((rc = mem_strdup(&w->path, path, e)) != OK) goto done;
    if ((rc = take_meta(w, meta, e)) != OK) goto done;
    if ((rc = file_writer_open(&w->file, path, force, e)) != OK) goto done;
    *out = w;
    w = NULL;
done:
    st_writer_abort(&w);
    return rc;
}

static err_code writer_grow(st_writer *w, err *e)
{
    st_out *bigger;
    const int64_t want = w->cap ? w->cap * 2 : 64;
    if (w->n < w->cap) return OK;
    TRY(mem_alloc((void **)&bigger, (size_t)want, sizeof *bigger, w->path, e));
    if (w->n) memcpy(bigger, w->t, (size_t)w->n * sizeof *bigger);
    mem_free(w->t);
    w->t = bigger;
    w->cap = want;
    return OK;
}

err_code st_writer_add(st_writer *w, const char *name, dtype dt, int ndim, const int64_t *shape,
                       err *e)
{
    char shown[ST_SHOWN];
    st_shown(shown, name);
    if (w->sealed)
        return err_set(e, E_CHECK, "%s: tensor '%s' declared after the first data", w->path, shown);
    if (ndim < 0 || ndim > ST_MAX_RANK || dtype_bytes(dt) == 0 || strcmp(name, "__metadata__") == 0)
        return err_set(e, E_CHECK, "%s: tensor '%s' cannot be stored", w->path, shown);
    if (!json_utf8_valid(name, strlen(name)))
        return err_set(e, E_INPUT, "%s: tensor '%s': the name is not UTF-8", w->path, shown);
    TRY(writer_grow(w, e));
    st_out *t = &w->t[w->n];
    *t = (st_out){.dt = dt, .ndim = ndim};
    if (tensor_count_checked(&t->count, ndim, shape, shown, e) != OK)
        return err_wrap(e, "%s", w->path);
    for (int i = 0; i < ndim; i++) t->shape[i] = shape[i];
    t->bytes = (uint64_t)t->count * dtype_bytes(dt);
    TRY(mem_strdup(&t->name, name, e));
    w->n++;
    return OK;
}

/* ---- sealing: order, places, size of the header ---- */
static int by_name(const void *a, const void *b)
{
    return strcmp(((const st_out *)a)->name, ((const st_out *)b)->name);
}

static int by_alignment(const void *a, const void *b)
{
    const st_out *x = a, *y = b;
    const size_t xb = dtype_bytes(x->dt), yb = dtype_bytes(y->dt);
    return xb != yb ? (xb > yb ? -1 : 1) : strcmp(x->name, y->name);
}

static err_code writer_order(st_writer *w, err *e)
{
    char shown[ST_SHOWN];
    if (w->n == 0) return OK;
    qsort(w->t, (size_t)w->n, sizeof *w->t, by_name);
    for (int64_t i = 1; i < w->n; i++)
        if (strcmp(w->t[i].name, w->t[i - 1].name) == 0)
            return err_set(e, E_CHECK, "%s: tensor '%s' declared twice", w->path,
                           st_shown(shown, w->t[i].name));
    qsort(w->t, (size_t)w->n, sizeof *w->t, by_alignment);
    return OK;
}

static err_code writer_seal(st_writer *w, err *e)
{
    uint64_t at = 0;
    text_out o = {0};
    if (w->sealed) return OK;
    TRY(writer_order(w, e));
    for (int64_t i = 0; i < w->n; i++) {
        w->t[i].at = at;
        if (__builtin_add_overflow(at, w->t[i].bytes, &at) || at > INT64_MAX / 2)
            return err_set(e, E_LIMIT, "%s: more data than a file holds", w->path);
    }
    put_header(&o, w);
    if (o.n > ST_MAX_HEADER - 64)
        return err_set(e, E_LIMIT, "%s: header of %zu bytes, the format allows %d", w->path, o.n,
                       ST_MAX_HEADER);
    w->head_bytes = (8 + o.n + 63) / 64 * 64;
    w->data_bytes = at;
    w->sealed = true;
    return OK;
}

/* Sorted by alignment, then name: one search for each of the four alignments. */
static st_out *writer_find(st_writer *w, const char *name)
{
    static const dtype of_bytes[] = {DT_F64, DT_F32, DT_F16, DT_U8};
    st_out key = {.name = (char *)(uintptr_t)name};
    for (int i = 0; w->n && i < 4; i++) {
        key.dt = of_bytes[i];
        st_out *t = bsearch(&key, w->t, (size_t)w->n, sizeof *w->t, by_alignment);
        if (t) return t;
    }
    return NULL;
}

static err_code writer_get(st_writer *w, const char *name, st_out **t, err *e)
{
    char shown[ST_SHOWN];
    TRY(writer_seal(w, e));
    *t = writer_find(w, name);
    if (!*t)
        return err_set(e, E_CHECK, "%s: tensor '%s' was not declared", w->path,
                       st_shown(shown, name));
    return OK;
}

/* ---- data ---- */
static err_code range_room(st_writer *w, st_out *t, err *e)
{
    st_range *bigger;
    if (t->n_done < t->cap_done) return OK;
    const int want = t->cap_done ? t->cap_done * 2 : 4;
    TRY(mem_alloc((void **)&bigger, (size_t)want, sizeof *bigger, w->path, e));
    if (t->n_done) memcpy(bigger, t->done, (size_t)t->n_done * sizeof *bigger);
    mem_free(t->done);
    t->done = bigger;
    t->cap_done = want;
    return OK;
}

/* Adds [from,to) to what is written, merged with neighbours that it touches. */
static err_code range_add(st_writer *w, st_out *t, int64_t from, int64_t to, err *e)
{
    char shown[ST_SHOWN];
    int i = t->n_done;
    while (i > 0 && t->done[i - 1].from >= from) i--; /* parts mostly come in order */
    const bool after = i > 0 && t->done[i - 1].to >= from,
               before = i < t->n_done && t->done[i].from <= to;
    if ((i > 0 && t->done[i - 1].to > from) || (i < t->n_done && t->done[i].from < to))
        return err_set(e, E_CHECK, "%s: tensor '%s': elements %lld..%lld written twice", w->path,
                       st_shown(shown, t->name), (long long)from, (long long)to - 1);
    if (after && before) {
        t->done[i - 1].to = t->done[i].to;
        memmove(t->done + i, t->done + i + 1, (size_t)(--t->n_done - i) * sizeof *t->done);
    } else if (after) {
        t->done[i - 1].to = to;
    } else if (before) {
        t->done[i].from = from;
    } else {
        TRY(range_room(w, t, e));
        memmove(t->done + i + 1, t->done + i, (size_t)(t->n_done++ - i) * sizeof *t->done);
        t->done[i] = (st_range){from, to};
    }
    return OK;
}

static err_code write_part(st_writer *w, st_out *t, int64_t first, const void *data, int64_t count,
                           err *e)
{
    char shown[ST_SHOWN];
    const uint64_t size = dtype_bytes(t->dt);
    if (first < 0 || count < 0 || first > t->count - count)
        return err_set(e, E_CHECK,
                       "%s: tensor '%s': part [%lld,+%lld) lies outside its %lld elements", w->path,
                       st_shown(shown, t->name), (long long)first, (long long)count,
                       (long long)t->count);
    if (count == 0) return OK;
    TRY(range_add(w, t, first, first + count, e));
    return file_writer_pwrite(w->file, data, (size_t)((uint64_t)count * size),
                              w->head_bytes + t->at + (uint64_t)first * size, e);
}

err_code st_writer_part(st_writer *w, const char *name, int64_t first, const void *data,
                        int64_t count, err *e)
{
    st_out *t;
    TRY(writer_get(w, name, &t, e));
    return write_part(w, t, first, data, count, e);
}

err_code st_writer_data(st_writer *w, const char *name, const tensor *host, err *e)
{
    st_out *t;
    char shown[ST_SHOWN];
    TRY(writer_get(w, name, &t, e));
    bool same = host->dt == t->dt && host->ndim == t->ndim && host->mem == MEM_HOST &&
                tensor_contiguous(host);
    for (int i = 0; same && i < t->ndim; i++) same = host->shape[i] == t->shape[i];
    if (!same)
        return err_set(e, E_CHECK, "%s: tensor '%s': the data is not as it was declared", w->path,
                       st_shown(shown, name));
    return write_part(w, t, 0, host->data, t->count, e);
}

err_code st_writer_meta(st_writer *w, const char *key, const char *value, err *e)
{
    for (int i = 0; i < w->n_meta; i++) {
        if (strcmp(w->meta[i].key, key) != 0) continue;
        text_out was = {0}, now = {0};
        put_quoted(&was, w->meta[i].value);
        put_quoted(&now, value);
        if (was.n != now.n || strlen(value) != strlen(w->meta[i].value) ||
            !json_utf8_valid(value, strlen(value)))
            return err_set(e, E_CHECK, "%s: metadata '%s': the new value has another length",
                           w->path, key);
        memcpy(w->meta[i].value, value, strlen(value));
        return OK;
    }
    return err_set(e, E_CHECK, "%s: metadata '%s' was not given at open", w->path, key);
}

uint64_t st_writer_bytes(st_writer *w) { return w->sealed ? w->head_bytes + w->data_bytes : 0; }

/* ---- the end ---- */
static err_code write_head(st_writer *w, err *e)
{
    text_out o = {0};
    TRY(mem_alloc((void **)&o.buf, w->head_bytes, 1, w->path, e));
    o.n = 8;
    put_header(&o, w);
    memset(o.buf + o.n, ' ', w->head_bytes - o.n);
    for (int i = 0; i < 8; i++) o.buf[i] = (char)((uint64_t)(w->head_bytes - 8) >> (8 * i) & 255);
    const err_code rc = file_writer_pwrite(w->file, o.buf, w->head_bytes, 0, e);
    mem_free(o.buf);
    return rc;
}

static err_code check_complete(const st_writer *w, err *e)
{
    char shown[ST_SHOWN];
    for (int64_t i = 0; i < w->n; i++) {
        const st_out *t = &w->t[i];
        if (t->count == 0) continue;
        if (t->n_done != 1 || t->done[0].to - t->done[0].from != t->count)
            return err_set(e, E_CHECK, "%s: tensor '%s' was not written whole", w->path,
                           st_shown(shown, t->name));
    }
    return OK;
}

err_code st_writer_commit(st_writer **w, err *e)
{
    err_code rc;
    if ((rc = writer_seal(*w, e)) != OK) goto done;
    if ((rc = check_complete(*w, e)) != OK) goto done;
    if ((rc = write_head(*w, e)) != OK) goto done;
    rc = file_writer_commit(&(*w)->file, e);
done:
    st_writer_abort(w); /* closes what a failure left; nothing remains to undo after a commit */
    return rc;
}

void st_writer_abort(st_writer **w)
{
    st_writer *v = *w;
    if (!v) return;
    file_writer_abort(&v->file);
    for (int64_t i = 0; i < v->n; i++) {
        mem_free(v->t[i].done);
        mem_free(v->t[i].name);
    }
    for (int i = 0; i < v->n_meta; i++) {
        mem_free(v->meta[i].key);
        mem_free(v->meta[i].value);
    }
    mem_free(v->t);
    mem_free(v->meta);
    mem_free(v->path);
    mem_free(v);
    *w = NULL;
}
