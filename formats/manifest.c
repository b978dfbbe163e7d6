/* The manifest of a directory artifact: built while writing, checked while reading. */
#include "formats/manifest.h"

#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"

#define MANIFEST_MAX_BYTES ((size_t)64 << 20)
#define MANIFEST_MAX_FILES 1000000
#define MANIFEST_FORMAT    "tmforge-manifest"
#define MANIFEST_VERSION   1
#define PATH_CAP           4096
#define VERIFY_CHUNK       ((size_t)64 << 20) /* pages are dropped behind, so memory stays small */

err_code manifest_init(manifest *m, const char *kind, const char *parent, const char *options,
                       err *e)
{
    memset(m, 0, sizeof *m);
    err_code rc = mem_strdup(&m->kind, kind, e);
    if (rc == OK) rc = mem_strdup(&m->tool, "tmforge " TMF_VERSION, e);
    if (rc == OK) rc = mem_strdup(&m->parent, parent ? parent : "", e);
    if (rc == OK) rc = mem_strdup(&m->options, options ? options : "", e);
    if (rc != OK) manifest_free(m);
    return rc;
}

void manifest_free(manifest *m)
{
    for (size_t i = 0; i < m->n; i++) mem_free(m->files[i].name);
    mem_free(m->files);
    mem_free(m->kind);
    mem_free(m->tool);
    mem_free(m->parent);
    mem_free(m->options);
    memset(m, 0, sizeof *m);
}

static err_code grow(manifest *m, err *e)
{
    const size_t cap = m->cap ? 2 * m->cap : 64;
    void *p;
    TRY(mem_alloc(&p, cap, sizeof *m->files, "manifest", e));
    if (m->n) memcpy(p, m->files, m->n * sizeof *m->files);
    mem_free(m->files);
    m->files = p;
    m->cap = cap;
    return OK;
}

err_code manifest_add(manifest *m, const char *name, uint64_t size, const hash128 *digest, err *e)
{
    if (m->n == m->cap) TRY(grow(m, e));
    manifest_file *f = &m->files[m->n];
    TRY(mem_strdup(&f->name, name, e));
    f->size = size;
    f->digest = *digest;
    m->n++;
    return OK;
}

static err_code digest_file(hash128 *out, uint64_t *size, const char *path, err *e)
{
    file_map map;
    hash_xxh *h = NULL;

    TRY(file_map_open(&map, path, e));
    const err_code rc = hash_xxh_open(&h, e);
    if (rc == OK) {
        for (size_t at = 0; at < map.size; at += VERIFY_CHUNK) {
            const size_t n = map.size - at < VERIFY_CHUNK ? map.size - at : VERIFY_CHUNK;
            hash_xxh_add(h, map.data + at, n);
            file_map_dontneed(&map, at, n);
        }
        *out = hash_xxh_end(&h);
        *size = map.size;
    }
    file_map_close(&map);
    return rc;
}

err_code manifest_add_file(manifest *m, const char *dir, const char *name, err *e)
{
    char path[PATH_CAP];
    hash128 digest;
    uint64_t size;
    TRY(path_join(path, sizeof path, dir, name, e));
    TRY(digest_file(&digest, &size, path, e));
    return manifest_add(m, name, size, &digest, e);
}

static int by_name(const void *a, const void *b)
{
    return strcmp(((const manifest_file *)a)->name, ((const manifest_file *)b)->name);
}

/* ---- writing ---- */

static bool add_file_json(cJSON *files, const manifest_file *f)
{
    cJSON *o = cJSON_CreateObject();
    if (!o || !cJSON_AddItemToArray(files, o)) {
        cJSON_Delete(o);
        return false;
    }
    return cJSON_AddStringToObject(o, "name", f->name) &&
           cJSON_AddNumberToObject(o, "size", (double)f->size) &&
           cJSON_AddStringToObject(o, "xxh3_128", f->digest.hex);
}

static err_code to_json(cJSON **out, const manifest *m, err *e)
{
    cJSON *o = cJSON_CreateObject();
    bool ok = o && cJSON_AddStringToObject(o, "format", MANIFEST_FORMAT) &&
              cJSON_AddNumberToObject(o, "version", MANIFEST_VERSION) &&
              cJSON_AddStringToObject(o, "kind", m->kind) &&
              cJSON_AddStringToObject(o, "tool", m->tool) &&
              cJSON_AddStringToObject(o, "parent", m->parent) &&
              cJSON_AddStringToObject(o, "options", m->options);
    cJSON *files = ok ? cJSON_AddArrayToObject(o, "files") : NULL;
    ok = ok && files;
    for (size_t i = 0; ok && i < m->n; i++) ok = add_file_json(files, &m->files[i]);
    if (!ok) {
        cJSON_Delete(o);
        return err_set(e, E_NOMEM, "out of memory for the manifest");
    }
    *out = o;
    return OK;
}

/* The digest is over the compact text of everything else, so indentation is free to change. */
static err_code digest_json(hash256 *out, const cJSON *without_digest, err *e)
{
    char *text;
    TRY(json_print(&text, without_digest, false, e));
    const err_code rc = hash_sha256(out, text, strlen(text), e);
    mem_free(text);
    return rc;
}

err_code manifest_write(manifest *m, const char *dir, err *e)
{
    char path[PATH_CAP], *text = NULL;
    file_writer *w = NULL;
    cJSON *o = NULL;
    err_code rc;

    if (m->n) qsort(m->files, m->n, sizeof *m->files, by_name);
    TRY(path_join(path, sizeof path, dir, MANIFEST_NAME, e));
    if ((rc = to_json(&o, m, e)) != OK) goto done;
    if ((rc = digest_json(&m->digest, o, e)) != OK) goto done;
    if (!cJSON_AddStringToObject(o, "sha256", m->digest.hex)) {
        rc = err_set(e, E_NOMEM, "out of memory for the manifest");
        goto done;
    }
    if ((rc = json_print(&text, o, true, e)) != OK) goto done;
    if ((rc = file_writer_open(&w, path, true, e)) != OK) goto done;
    if ((rc = file_writer_write(w, text, strlen(text), e)) != OK) goto done;
    if ((rc = file_writer_write(w, "\n", 1, e)) != OK) goto done;
    rc = file_writer_commit(&w, e);
done:
    file_writer_abort(&w);
    mem_free(text);
    cJSON_Delete(o);
    return rc;
}

/* ---- reading ---- */

bool manifest_exists(const char *dir)
{
    char path[PATH_CAP];
    err e;
    return path_join(path, sizeof path, dir, MANIFEST_NAME, &e) == OK && file_exists(path);
}

/* Plain names between '/', so that no name leads outside the directory. */
static bool name_is_inside(const char *name)
{
    char part[256];
    for (const char *p = name;;) {
        const size_t n = strcspn(p, "/");
        if (n == 0 || n >= sizeof part) return false;
        memcpy(part, p, n);
        part[n] = 0;
        if (!path_is_plain_name(part)) return false;
        if (!p[n]) return true;
        p += n + 1;
    }
}

static bool is_hex(const char *s, size_t n)
{
    return strlen(s) == n && strspn(s, "0123456789abcdef") == n;
}

static err_code read_file_json(manifest *m, const cJSON *o, err *e)
{
    const char *name, *hex;
    hash128 digest;
    int64_t size;

    TRY(json_get_str(o, "name", &name, e));
    TRY(json_get_i64(o, "size", 0, (int64_t)1 << 53, &size, e));
    TRY(json_get_str(o, "xxh3_128", &hex, e));
    if (!name_is_inside(name))
        return err_set(e, E_INPUT, "name '%.200s' leaves the directory", name);
    if (!is_hex(hex, sizeof digest.hex - 1))
        return err_set(e, E_INPUT, "'%.200s': xxh3_128 is not 32 hex digits", name);
    memcpy(digest.hex, hex, sizeof digest.hex);
    if (m->n && strcmp(m->files[m->n - 1].name, name) >= 0)
        return err_set(e, E_INPUT, "files are not in order at '%.200s'", name);
    return manifest_add(m, name, (uint64_t)size, &digest, e);
}

static err_code read_head(manifest *m, const cJSON *o, err *e)
{
    const char *format, *s;
    char **const text[] = {&m->kind, &m->tool, &m->parent, &m->options};
    static const char *const key[] = {"kind", "tool", "parent", "options"};
    int64_t version;

    TRY(json_get_str(o, "format", &format, e));
    if (strcmp(format, MANIFEST_FORMAT) != 0)
        return err_set(e, E_INPUT, "format: expected '%s', got '%.64s'", MANIFEST_FORMAT, format);
    TRY(json_get_i64(o, "version", 0, INT32_MAX, &version, e));
    if (version != MANIFEST_VERSION)
        return err_set(e, E_UNSUPPORTED, "version: expected %d, got %lld", MANIFEST_VERSION,
                       (long long)version);
    for (int i = 0; i < 4; i++) {
        TRY(json_get_str(o, key[i], &s, e));
        TRY(mem_strdup(text[i], s, e));
    }
    return OK;
}

static err_code read_json(manifest *m, cJSON *o, err *e)
{
    const char *sha;
    char stored[65];

    TRY(read_head(m, o, e));
    TRY(json_get_str(o, "sha256", &sha, e));
    if (!is_hex(sha, 64)) return err_set(e, E_INPUT, "sha256 is not 64 hex digits");
    memcpy(stored, sha, sizeof stored);
    cJSON_DeleteItemFromObjectCaseSensitive(o, "sha256");
    TRY(digest_json(&m->digest, o, e));
    if (strcmp(stored, m->digest.hex) != 0)
        return err_set(e, E_CHECK, "sha256: expected %s, found %s", stored, m->digest.hex);

    const cJSON *files = cJSON_GetObjectItemCaseSensitive(o, "files"), *f;
    if (!cJSON_IsArray(files)) return err_set(e, E_INPUT, "files: expected a list");
    if (cJSON_GetArraySize(files) > MANIFEST_MAX_FILES)
        return err_set(e, E_INPUT, "more than %d files", MANIFEST_MAX_FILES);
    cJSON_ArrayForEach(f, files) TRY(read_file_json(m, f, e));
    return OK;
}

err_code manifest_read(manifest *m, const char *dir, err *e)
{
    char path[PATH_CAP];
    cJSON *o = NULL;

    memset(m, 0, sizeof *m);
    TRY(path_join(path, sizeof path, dir, MANIFEST_NAME, e));
    TRY(json_load(&o, path, MANIFEST_MAX_BYTES, e));
    const err_code rc = read_json(m, o, e);
    cJSON_Delete(o);
    if (rc == OK) return OK;
    manifest_free(m);
    return err_wrap(e, "%s", path);
}

const manifest_file *manifest_find(const manifest *m, const char *name)
{
    const manifest_file key = {.name = (char *)(uintptr_t)name};
    return m->n ? bsearch(&key, m->files, m->n, sizeof *m->files, by_name) : NULL;
}

static err_code check_size(const manifest_file *f, const char *dir, char path[PATH_CAP], err *e)
{
    uint64_t size;
    TRY(path_join(path, PATH_CAP, dir, f->name, e));
    if (!file_exists(path))
        return err_set(e, E_CHECK, "%s: expected %llu bytes, found no file", path,
                       (unsigned long long)f->size);
    TRY(file_size(&size, path, e));
    if (size != f->size)
        return err_set(e, E_CHECK, "%s: expected %llu bytes, found %llu", path,
                       (unsigned long long)f->size, (unsigned long long)size);
    return OK;
}

err_code manifest_check_sizes(const manifest *m, const char *dir, err *e)
{
    char path[PATH_CAP];
    for (size_t i = 0; i < m->n; i++) TRY(check_size(&m->files[i], dir, path, e));
    return OK;
}

err_code manifest_verify(const manifest *m, const char *dir, const job *j, err *e)
{
    char path[PATH_CAP];
    hash128 found;
    uint64_t size;

    for (size_t i = 0; i < m->n; i++) {
        const manifest_file *f = &m->files[i];
        TRY(job_check(j, e));
        job_step(j, "verify", "file", (int64_t)i, (int64_t)m->n);
        TRY(check_size(f, dir, path, e));
        TRY(digest_file(&found, &size, path, e));
        if (strcmp(found.hex, f->digest.hex) != 0)
            return err_set(e, E_CHECK, "%s: expected xxh3-128 %s, found %s", path, f->digest.hex,
                           found.hex);
    }
    job_step(j, "verify", "file", (int64_t)m->n, (int64_t)m->n);
    return OK;
}
