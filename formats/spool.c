/* Resume: one artifact per finished layer, and at most one set of hidden states. */
#include "formats/spool.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

#define SPOOL_KIND       "spool"
#define SPOOL_VERSION    1
#define SPOOL_MAX_LAYERS 4096

struct spool {
    char target[4096], dir[4096], root[4096];  /* root: of all sets */
    char fingerprint[65], whole[65], kind[32]; /* whole: the target's */
    int version;
    file_lock lock;
    bool locked;
    int32_t layers;
    uint8_t *done; /* [layers] */
};

static err_code layer_path(char *buf, size_t cap, const spool *s, int32_t layer, err *e)
{
    char name[32];
    snprintf(name, sizeof name, "layer-%05d", (int)layer);
    return path_join(buf, cap, s->dir, name, e);
}

/* OK with *out NULL when there is no such file or it is not a sound one of this run. */
static void open_part(st_file **out, const spool *s, const char *path)
{
    err ignored = {0}; /* a damaged part is work to do again, nothing to report */
    st_file *f = NULL;
    *out = NULL;
    if (!file_exists(path) || artifact_open(&f, path, SPOOL_KIND, SPOOL_VERSION, &ignored) != OK)
        return;
    const char *found = st_meta(f, "fingerprint");
    if (found && strcmp(found, s->fingerprint) == 0)
        *out = f;
    else
        st_close(&f);
}

static err_code find_done(spool *s, err *e)
{
    char path[4096];
    for (int32_t i = 0; i < s->layers; i++) {
        st_file *f;
        TRY(layer_path(path, sizeof path, s, i, e));
        open_part(&f, s, path);
        s->done[i] = f != NULL;
        st_close(&f);
    }
    return OK;
}

static err_code copy_text(char *to, size_t cap, const char *from, const char *what, err *e)
{
    const int n = snprintf(to, cap, "%s", from);
    if (n < 0 || (size_t)n >= cap)
        return err_set(e, E_USAGE, "%s '%.64s...': longer than %zu bytes", what, from, cap - 1);
    return OK;
}

static err_code set_names(spool *s, const spool_opts *o, err *e)
{
    s->version = o->version;
    s->layers = o->layers;
    TRY(copy_text(s->target, sizeof s->target, o->target, "output", e));
    TRY(copy_text(s->dir, sizeof s->dir - sizeof ".part", o->target, "output", e));
    strcat(s->dir, ".part");
    memcpy(s->root, s->dir, sizeof s->root);
    TRY(copy_text(s->kind, sizeof s->kind, o->kind, "kind", e));
    TRY(copy_text(s->fingerprint, sizeof s->fingerprint, o->fingerprint, "fingerprint", e));
    memcpy(s->whole, s->fingerprint, sizeof s->whole);
    return OK;
}

static err_code look_at_target(const spool *s, bool force, bool *fresh, err *e)
{
    *fresh = false;
    if (file_is_dir(s->target))
        return err_set(e, E_USAGE, "output '%s': expected a file, found a directory", s->target);
    if (force) return OK;
    const artifact_state state = artifact_state_of(s->target, s->kind, s->version, s->fingerprint);
    *fresh = state == ARTIFACT_FRESH;
    if (state == ARTIFACT_FOREIGN)
        return err_set(e, E_USAGE,
                       "output '%s' exists and is no %s file of ours, use --force to replace it",
                       s->target, s->kind);
    return OK;
}

err_code spool_open(spool **out, const spool_opts *o, bool *fresh, err *e)
{
    spool *s = NULL;
    err_code rc;
    if (o->layers < 1 || o->layers > SPOOL_MAX_LAYERS)
        return err_set(e, E_LIMIT, "layers: expected 1 to %d, got %d", SPOOL_MAX_LAYERS,
                       (int)o->layers);
    TRY(mem_alloc((void **)&s, 1, sizeof *s, "spool", e));
    if ((rc = set_names(s, o, e)) != OK) goto fail;
    if ((rc = mem_alloc((void **)&s->done, (size_t)o->layers, 1, "spool", e)) != OK) goto fail;
    if ((rc = file_lock_take(&s->lock, s->target, e)) != OK) goto fail;
    s->locked = true;
    if ((rc = look_at_target(s, o->force, fresh, e)) != OK) goto fail;
    /* A run killed right behind its rename left its layers. */
    if ((rc = *fresh ? dir_remove_tree(s->dir, e) : find_done(s, e)) != OK) goto fail;
    *out = s;
    return OK;
fail:
    spool_close(&s);
    return rc;
}

err_code spool_open_set(spool **out, const spool *of, const char *name, const char *fingerprint,
                        err *e)
{
    spool *s = NULL;
    err_code rc;
    TRY(mem_alloc((void **)&s, 1, sizeof *s, "spool", e));
    *s = *of;
    s->locked = false; /* the lock is of's */
    s->done = NULL;
    if ((rc = path_join(s->dir, sizeof s->dir, of->root, name, e)) != OK) goto fail;
    rc = copy_text(s->fingerprint, sizeof s->fingerprint, fingerprint, "fingerprint", e);
    if (rc != OK) goto fail;
    if ((rc = mem_alloc((void **)&s->done, (size_t)s->layers, 1, "spool", e)) != OK) goto fail;
    if ((rc = find_done(s, e)) != OK) goto fail;
    *out = s;
    return OK;
fail:
    spool_close(&s);
    return rc;
}

void spool_close(spool **s)
{
    if (!*s) return;
    if ((*s)->locked) file_lock_drop(&(*s)->lock);
    mem_free((*s)->done);
    mem_free(*s);
    *s = NULL;
}

bool spool_has(const spool *s, int32_t layer) { return s->done[layer]; }

int32_t spool_count(const spool *s)
{
    int32_t n = 0;
    for (int32_t i = 0; i < s->layers; i++) n += s->done[i];
    return n;
}

err_code spool_put(spool *s, int32_t layer, const artifact_part *parts, int64_t n_parts, err *e)
{
    char path[4096];
    const char *meta[] = {"fingerprint", s->fingerprint, NULL};
    TRY(dir_make(s->dir, e));
    TRY(layer_path(path, sizeof path, s, layer, e));
    TRY(artifact_write(path, SPOOL_KIND, SPOOL_VERSION, meta, parts, n_parts, true, e));
    s->done[layer] = 1;
    return OK;
}

err_code spool_get(const spool *s, int32_t layer, st_file **out, err *e)
{
    char path[4096];
    TRY(layer_path(path, sizeof path, s, layer, e));
    return artifact_open(out, path, SPOOL_KIND, SPOOL_VERSION, e);
}

err_code spool_put_note(spool *s, const artifact_part *parts, int64_t n_parts, err *e)
{
    char path[4096];
    const char *meta[] = {"fingerprint", s->fingerprint, NULL};
    TRY(dir_make(s->dir, e));
    TRY(path_join(path, sizeof path, s->dir, "note", e));
    return artifact_write(path, SPOOL_KIND, SPOOL_VERSION, meta, parts, n_parts, true, e);
}

err_code spool_get_note(const spool *s, st_file **out, err *e)
{
    char path[4096];
    TRY(path_join(path, sizeof path, s->dir, "note", e));
    open_part(out, s, path);
    return OK;
}

err_code spool_put_state(spool *s, int32_t layer, const tensor *state, err *e)
{
    char path[4096], text[16];
    artifact_part part = {.name = "hidden", .t = *state};
    const char *meta[] = {"fingerprint", s->fingerprint, "layer", text, NULL};
    snprintf(text, sizeof text, "%d", (int)layer);
    TRY(dir_make(s->dir, e));
    TRY(path_join(path, sizeof path, s->dir, "state", e));
    return artifact_write(path, SPOOL_KIND, SPOOL_VERSION, meta, &part, 1, true, e);
}

err_code spool_get_state(spool *s, int32_t *layer, tensor *state, err *e)
{
    char path[4096];
    st_file *f = NULL;
    tensor found;
    int at = 0;
    *layer = 0;
    TRY(path_join(path, sizeof path, s->dir, "state", e));
    open_part(&f, s, path);
    if (!f) return OK;
    const char *text = st_meta(f, "layer");
    const bool fits = st_find(f, "hidden", &found) && found.dt == state->dt &&
                      found.ndim == state->ndim &&
                      memcmp(found.shape, state->shape, (size_t)found.ndim * sizeof *found.shape) ==
                          0;
    if (fits && text && sscanf(text, "%d", &at) == 1 && at > 0 && at < s->layers) {
        memcpy(state->data, found.data, tensor_bytes(state));
        *layer = at;
    }
    st_close(&f);
    return OK;
}

/* Every layer's views; the files stay open until the target is written. */
static err_code gather(const spool *s, st_file **files, artifact_part **parts, int64_t *n,
                       const artifact_part *extra, int64_t n_extra, err *e)
{
    int64_t total = n_extra;
    for (int32_t i = 0; i < s->layers; i++) {
        TRY(spool_get(s, i, &files[i], e));
        total += st_count(files[i]);
    }
    TRY(mem_alloc((void **)parts, (size_t)total, sizeof **parts, "list of tensors", e));
    if (n_extra) memcpy(*parts, extra, (size_t)n_extra * sizeof *extra);
    *n = n_extra;
    for (int32_t i = 0; i < s->layers; i++)
        for (int64_t j = 0; j < st_count(files[i]); j++) {
            const st_entry t = st_at(files[i], j);
            artifact_part *p = &(*parts)[(*n)++];
            snprintf(p->name, sizeof p->name, "%s",
                     t.name); /* written through artifact_part: it fits */
            p->t = t.view;
        }
    return OK;
}

static err_code add_fingerprint(artifact_pairs *all, const spool *s, const char *const *meta,
                                err *e)
{
    TRY(artifact_pairs_add(all, "fingerprint", s->whole, e));
    for (; meta[0]; meta += 2) TRY(artifact_pairs_add(all, meta[0], meta[1], e));
    return OK;
}

err_code spool_finish(spool *s, const char *const *meta, const artifact_part *extra,
                      int64_t n_extra, err *e)
{
    st_file **files = NULL;
    artifact_part *parts = NULL;
    artifact_pairs all = {0};
    int64_t n = 0;
    err_code rc;
    TRY(mem_alloc((void **)&files, (size_t)s->layers, sizeof *files, "spool", e));
    if ((rc = gather(s, files, &parts, &n, extra, n_extra, e)) != OK) goto done;
    if ((rc = add_fingerprint(&all, s, meta, e)) != OK) goto done;
    if ((rc = artifact_write(s->target, s->kind, s->version, all.pairs, parts, n, true, e)) != OK)
        goto done;
    rc = dir_remove_tree(s->root, e);
done:
    for (int32_t i = 0; i < s->layers; i++) st_close(&files[i]);
    artifact_pairs_free(&all);
    mem_free(files);
    mem_free(parts);
    return rc;
}
