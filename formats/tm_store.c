/* Writer of a TurboMind workspace: files stream through a digest into a hidden directory, which the
 * manifest closes and a rename makes visible. */
#include "formats/tm_store.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"

#define PATH_CAP       4096
#define COPY_MAX_BYTES ((size_t)256 << 20) /* of a tokenizer file */

struct tm_writer {
    dir_writer *dir;
    manifest man;
    file_writer *file; /* the open one */
    hash_xxh *hash;
    char name[256];
    uint64_t size;
};

err_code tm_writer_open(tm_writer **out, const char *path, bool force, const char *parent,
                        const char *options, err *e)
{
    static const char *const dirs[] = {TM_WEIGHTS_DIR, TM_TOKENIZER_DIR};
    char sub[PATH_CAP];
    void *p;
    err_code rc;

    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(tm_writer), "workspace writer", e));
    tm_writer *w = p;
    rc = manifest_init(&w->man, MANIFEST_KIND_TM, parent, options, e);
    if (rc == OK) rc = dir_writer_open(&w->dir, path, force, false, e);
    for (size_t i = 0; rc == OK && i < sizeof dirs / sizeof *dirs; i++) {
        rc = path_join(sub, sizeof sub, dir_writer_path(w->dir), dirs[i], e);
        if (rc == OK) rc = dir_make(sub, e);
    }
    if (rc != OK)
        tm_writer_abort(&w);
    else
        *out = w;
    return rc;
}

err_code tm_writer_begin(tm_writer *w, const char *name, err *e)
{
    char path[PATH_CAP];
    assert(!w->file);
    const int n = snprintf(w->name, sizeof w->name, "%s", name);
    if (n < 0 || (size_t)n >= sizeof w->name)
        return err_set(e, E_LIMIT, "file name '%.100s...' is too long", name);
    TRY(path_join(path, sizeof path, dir_writer_path(w->dir), name, e));
    TRY(file_writer_open(&w->file, path, false, e));
    w->size = 0;
    return hash_xxh_open(&w->hash, e);
}

err_code tm_writer_write(tm_writer *w, const void *data, size_t n, err *e)
{
    TRY(file_writer_write(w->file, data, n, e));
    hash_xxh_add(w->hash, data, n);
    w->size += n;
    return OK;
}

err_code tm_writer_end(tm_writer *w, err *e)
{
    TRY(file_writer_commit(&w->file, e));
    const hash128 digest = hash_xxh_end(&w->hash);
    return manifest_add(&w->man, w->name, w->size, &digest, e);
}

err_code tm_writer_copy(tm_writer *w, const char *from, const char *name, err *e)
{
    char *text;
    size_t n;
    TRY(file_read(&text, &n, from, COPY_MAX_BYTES, e));
    err_code rc = tm_writer_begin(w, name, e);
    if (rc == OK) rc = tm_writer_write(w, text, n, e);
    if (rc == OK) rc = tm_writer_end(w, e);
    mem_free(text);
    return rc;
}

err_code tm_writer_commit(tm_writer **pw, err *e)
{
    tm_writer *w = *pw;
    assert(!w->file);
    err_code rc = manifest_write(&w->man, dir_writer_path(w->dir), e);
    if (rc == OK) rc = dir_writer_commit(&w->dir, e);
    tm_writer_abort(pw); /* after a commit only memory is left to free */
    return rc;
}

void tm_writer_abort(tm_writer **pw)
{
    tm_writer *w = *pw;
    if (!w) return;
    file_writer_abort(&w->file);
    if (w->hash) (void)hash_xxh_end(&w->hash);
    dir_writer_abort(&w->dir);
    manifest_free(&w->man);
    mem_free(w);
    *pw = NULL;
}
