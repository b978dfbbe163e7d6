/* Calib and plan files on disk: one writer and one set of checks for both. */
#include "formats/artifact.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

#define DIGEST_KEY "xxh3."
#define PARENT_KEY "parent."

/* ---- metadata pairs ---- */

static err_code pairs_grow(artifact_pairs *p, err *e)
{
    const int64_t cap = p->cap ? 2 * p->cap : 32;
    void *grown = NULL;
    TRY(mem_alloc(&grown, (size_t)(2 * cap + 1), sizeof *p->pairs, "metadata", e));
    if (p->n) memcpy(grown, p->pairs, (size_t)(2 * p->n) * sizeof *p->pairs);
    mem_free((void *)p->pairs);
    p->pairs = grown;
    p->cap = cap;
    return OK;
}

err_code artifact_pairs_add(artifact_pairs *p, const char *key, const char *value, err *e)
{
    char *k = NULL, *v = NULL;
    err_code rc;
    if (p->n == p->cap) TRY(pairs_grow(p, e));
    if ((rc = mem_strdup(&k, key, e)) != OK) return rc;
    if ((rc = mem_strdup(&v, value, e)) != OK) {
        mem_free(k);
        return rc;
    }
    p->pairs[2 * p->n] = k;
    p->pairs[2 * p->n + 1] = v;
    p->n++;
    p->pairs[2 * p->n] = NULL;
    return OK;
}

void artifact_pairs_free(artifact_pairs *p)
{
    for (int64_t i = 0; i < 2 * p->n; i++) mem_free((void *)(uintptr_t)p->pairs[i]);
    mem_free((void *)p->pairs);
    *p = (artifact_pairs){0};
}

/* ---- writing ---- */

static err_code digest_key(char buf[ARTIFACT_NAME_MAX + 8], const char *tensor_name, err *e)
{
    const int n = snprintf(buf, ARTIFACT_NAME_MAX + 8, DIGEST_KEY "%s", tensor_name);
    if (n < 0 || n >= ARTIFACT_NAME_MAX + 8)
        return err_set(e, E_LIMIT, "tensor name '%s': longer than %d bytes", tensor_name,
                       ARTIFACT_NAME_MAX);
    return OK;
}

static err_code write_meta(artifact_pairs *all, const char *kind, int version,
                           const char *const *meta, const artifact_part *parts, int64_t n_parts,
                           err *e)
{
    char text[32], key[ARTIFACT_NAME_MAX + 8];
    snprintf(text, sizeof text, "%d", version);
    TRY(artifact_pairs_add(all, "kind", kind, e));
    TRY(artifact_pairs_add(all, "version", text, e));
    TRY(artifact_pairs_add(all, "tool", "tmforge " TMF_VERSION, e));
    for (; meta && meta[0]; meta += 2) TRY(artifact_pairs_add(all, meta[0], meta[1], e));
    for (int64_t i = 0; i < n_parts; i++) {
        const hash128 h = hash_xxh128(parts[i].t.data, tensor_bytes(&parts[i].t));
        TRY(digest_key(key, parts[i].name, e));
        TRY(artifact_pairs_add(all, key, h.hex, e));
    }
    return OK;
}

err_code artifact_write(const char *path, const char *kind, int version, const char *const *meta,
                        const artifact_part *parts, int64_t n_parts, bool force, err *e)
{
    artifact_pairs all = {0};
    st_writer *w = NULL;
    err_code rc = write_meta(&all, kind, version, meta, parts, n_parts, e);
    if (rc != OK) goto done;
    if ((rc = st_writer_open(&w, path, all.pairs, force, e)) != OK) goto done;
    for (int64_t i = 0; i < n_parts; i++) {
        const tensor *t = &parts[i].t;
        if ((rc = st_writer_add(w, parts[i].name, t->dt, t->ndim, t->shape, e)) != OK) goto done;
    }
    for (int64_t i = 0; i < n_parts; i++)
        if ((rc = st_writer_data(w, parts[i].name, &parts[i].t, e)) != OK) goto done;
    rc = st_writer_commit(&w, e);
done:
    st_writer_abort(&w);
    artifact_pairs_free(&all);
    return rc;
}

/* ---- reading ---- */

err_code artifact_meta(const st_file *f, const char *key, const char **value, err *e)
{
    *value = st_meta(f, key);
    if (!*value)
        return err_set(e, E_INPUT, "%s: metadata: expected key '%s', found none", st_path(f), key);
    return OK;
}

static err_code expect_meta(const st_file *f, const char *key, const char *expected, err *e)
{
    const char *found;
    TRY(artifact_meta(f, key, &found, e));
    if (strcmp(found, expected) != 0)
        return err_set(e, E_INPUT, "%s: %s: expected '%s', found '%.64s'", st_path(f), key,
                       expected, found);
    return OK;
}

err_code artifact_check(const st_file *f, const char *kind, int version, err *e)
{
    char text[32], key[ARTIFACT_NAME_MAX + 8];
    const char *found;
    snprintf(text, sizeof text, "%d", version);
    TRY(expect_meta(f, "kind", kind, e));
    TRY(expect_meta(f, "version", text, e));
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        if (digest_key(key, t.name, e) != OK)
            return e->code = E_INPUT, err_wrap(e, "%s", st_path(f));
        TRY(artifact_meta(f, key, &found, e));
        const hash128 h = hash_xxh128(t.view.data, tensor_bytes(&t.view));
        if (strcmp(found, h.hex) != 0)
            return err_set(e, E_INPUT, "%s: tensor '%s': expected digest %.32s, found %s",
                           st_path(f), t.name, found, h.hex);
    }
    return OK;
}

err_code artifact_open(st_file **out, const char *path, const char *kind, int version, err *e)
{
    st_file *f = NULL;
    TRY(st_open(&f, path, e));
    const err_code rc = artifact_check(f, kind, version, e);
    if (rc != OK) {
        st_close(&f);
        return rc;
    }
    *out = f;
    return OK;
}

artifact_state artifact_state_of(const char *path, const char *kind, int version,
                                 const char *fingerprint)
{
    err ignored = {0}; /* whatever is wrong with the file, it is one of four states */
    st_file *f = NULL;
    artifact_state state = ARTIFACT_FOREIGN;
    if (!file_exists(path)) return ARTIFACT_ABSENT;
    if (st_open(&f, path, &ignored) != OK) return state;
    const char *found = st_meta(f, "kind"), *print = st_meta(f, "fingerprint");
    if (found && strcmp(found, kind) == 0) state = ARTIFACT_STALE;
    if (state == ARTIFACT_STALE && print && strcmp(print, fingerprint) == 0 &&
        artifact_check(f, kind, version, &ignored) == OK)
        state = ARTIFACT_FRESH;
    st_close(&f);
    return state;
}

err_code artifact_check_parent(const st_file *f, const char *parent, const char *expected, err *e)
{
    char key[64];
    const char *found;
    snprintf(key, sizeof key, PARENT_KEY "%s", parent);
    TRY(artifact_meta(f, key, &found, e));
    if (strcmp(found, expected) != 0)
        return err_set(e, E_INPUT, "%s: made from %s %.64s, but this one is %s", st_path(f), parent,
                       found, expected);
    return OK;
}

static void add_text(hash_xxh *h, const char *text)
{
    hash_xxh_add(h, text ? text : "", text ? strlen(text) : 0);
    hash_xxh_add(h, "\n", 1);
}

err_code artifact_digest(const st_file *f, hash128 *out, err *e)
{
    static const char *const keys[] = {
        "kind", "version", "parent.model", "parent.tokenizer", "parent.calib", "options"};
    hash_xxh *h = NULL;
    char text[160], key[ARTIFACT_NAME_MAX + 8];
    TRY(hash_xxh_open(&h, e));
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++) add_text(h, st_meta(f, keys[i]));
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        int used = snprintf(text, sizeof text, "%s", dtype_name(t.view.dt));
        for (int d = 0; d < t.view.ndim; d++)
            used += snprintf(text + used, sizeof text - (size_t)used, " %" PRId64, t.view.shape[d]);
        add_text(h, t.name);
        add_text(h, text);
        add_text(h, digest_key(key, t.name, e) == OK ? st_meta(f, key) : NULL);
    }
    *out = hash_xxh_end(&h);
    return OK;
}

err_code artifact_get(const st_file *f, const char *name, dtype dt, int ndim, const int64_t *shape,
                      tensor *view, err *e)
{
    char what[ARTIFACT_NAME_MAX + 16];
    tensor t;
    TRY(st_get(f, name, &t, e));
    snprintf(what, sizeof what, "tensor '%s'", name);
    if (tensor_expect(&t, what, dt, ndim, shape, e) != OK) {
        e->code = E_INPUT; /* the file is at fault, not a caller's tensor */
        return err_wrap(e, "%s", st_path(f));
    }
    *view = t;
    return OK;
}
