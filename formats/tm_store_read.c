/* Reader of a TurboMind workspace as weight_src: views into files that are mapped when first asked
 * for. */
#include <assert.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/hf_config.h"
#include "formats/tm_store.h"
#include "formats/yaml.h"

#define PATH_CAP     4096
#define SAMPLE_BYTES ((size_t)4096)

typedef struct {
    char path[PATH_CAP]; /* of the workspace */
    tm_config c;
    tm_file *files;
    file_map *maps; /* [n], size 0 until mapped */
    size_t n;
    size_t n_model; /* files in front of layer 0 */
    size_t per_layer;
} tm_store;

static err_code join(char buf[PATH_CAP], const char *dir, const char *sub, const char *name, err *e)
{
    char mid[PATH_CAP];
    TRY(path_join(mid, sizeof mid, dir, sub, e));
    return path_join(buf, PATH_CAP, mid, name, e);
}

/* ---- config ---- */

err_code tm_store_config(tm_config *out, const char *path, err *e)
{
    char file[PATH_CAP], ini[PATH_CAP];
    cJSON *yaml;

    TRY(join(file, path, TM_WEIGHTS_DIR, TM_CONFIG_NAME, e));
    TRY(join(ini, path, TM_WEIGHTS_DIR, "config.ini", e));
    if (!file_exists(file) && file_exists(ini))
        return err_set(
            e, E_UNSUPPORTED,
            "%s: a workspace of LMDeploy v0.1.0 .. v0.5.3; readable are v0.6.0 .. v0.7.3 (%s)", ini,
            TM_CONFIG_NAME);
    if (!file_exists(file)) return err_set(e, E_INPUT, "%s: no such file", file);
    TRY(yaml_load(&yaml, file, e));
    const err_code rc = tm_config_read(out, yaml, e);
    cJSON_Delete(yaml);
    return rc == OK ? OK : err_wrap(e, "%s", file);
}

err_code tm_store_tokenizer_dir(char *buf, size_t cap, const char *path, err *e)
{
    static const char *const names[] = {"tokenizer.model", "tokenizer.json", "vocab.json",
                                        "config.json"};
    char dir[PATH_CAP], file[PATH_CAP];

    TRY(path_join(dir, sizeof dir, path, TM_TOKENIZER_DIR, e));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        TRY(path_join(file, sizeof file, dir, names[i], e));
        if (!file_exists(file)) continue;
        (void)snprintf(buf, cap, "%s", dir);
        return OK;
    }
    (void)snprintf(buf, cap, "%s", path);
    return OK;
}

static err_code disagree(const char *key, double yaml, double json, err *e)
{
    return err_set(e, E_INPUT, "%s is %g in config.yaml but %g in config.json", key, yaml, json);
}

/* The yaml rules; config.json beside the tokenizer must not contradict it, and adds what the yaml
 * has no key for: stop ids and the window, which TurboMind itself ignores. */
static err_code merge_config(model_desc *m, const model_desc *h, err *e)
{
    const struct {
        const char *key;
        double yaml, json;
    } same[] = {
        {"num_layer", m->layers, h->layers},
        {"hidden_units", m->hidden, h->hidden},
        {"head_num", m->heads, h->heads},
        {"size_per_head", m->head_dim, h->head_dim},
        {"vocab_size", m->vocab, h->vocab},
        {"attn_bias", m->qkv_bias, h->qkv_bias || h->o_bias},
        {"rope_theta", (double)m->rope_theta, (double)h->rope_theta},
        {"norm_eps", (double)m->norm_eps, (double)h->norm_eps},
    };
    for (size_t i = 0; i < sizeof same / sizeof *same; i++)
        if (fabs(same[i].yaml - same[i].json) > 1e-5 * fabs(same[i].json))
            return disagree(same[i].key, same[i].yaml, same[i].json, e);
    if (m->kv_heads % h->kv_heads) return disagree("kv_head_num", m->kv_heads, h->kv_heads, e);
    if (m->ffn < h->ffn) return disagree("inter_size", m->ffn, h->ffn, e);
    memcpy(m->family, h->family, sizeof m->family);
    m->sliding_window = h->sliding_window;
    m->sliding_from = h->sliding_from;
    m->bos = h->bos;
    m->eos = h->eos;
    m->n_stop = h->n_stop;
    memcpy(m->stop, h->stop, sizeof m->stop);
    return OK;
}

static err_code read_side_config(tm_store *s, const char *tokenizer_dir, err *e)
{
    char path[PATH_CAP];
    model_desc h;
    hf_quant q;
    const family *f;
    err ignored;

    TRY(path_join(path, sizeof path, tokenizer_dir, "config.json", e));
    if (!file_exists(path)) return OK;
    const err_code rc = hf_config_load(&h, &q, &f, tokenizer_dir, &ignored);
    if (rc == E_UNSUPPORTED) return OK; /* for example a GPTQ source: the yaml alone must do */
    if (rc != OK) {
        *e = ignored;
        return rc;
    }
    return merge_config(&s->c.m, &h, e);
}

/* ---- checks at open ---- */

static err_code check_files(const tm_store *s, err *e)
{
    char path[PATH_CAP];
    for (size_t i = 0; i < s->n; i++) {
        uint64_t size;
        TRY(join(path, s->path, TM_WEIGHTS_DIR, s->files[i].name, e));
        if (!file_exists(path))
            return err_set(e, E_INPUT, "%s: expected %llu bytes, found no file", path,
                           (unsigned long long)s->files[i].bytes);
        TRY(file_size(&size, path, e));
        if (size != s->files[i].bytes)
            return err_set(e, E_INPUT, "%s: expected %llu bytes ([%lld,%lld] %s), found %llu", path,
                           (unsigned long long)s->files[i].bytes, (long long)s->files[i].rows,
                           (long long)s->files[i].cols, dtype_name(s->files[i].dt),
                           (unsigned long long)size);
    }
    return OK;
}

static err_code check_manifest(const tm_store *s, const manifest *man, err *e)
{
    char name[256], path[PATH_CAP], *text;
    size_t n;

    for (size_t i = 0; i < s->n; i++) {
        (void)snprintf(name, sizeof name, "%s/%s", TM_WEIGHTS_DIR, s->files[i].name);
        const manifest_file *f = manifest_find(man, name);
        if (!f) return err_set(e, E_CHECK, "%s: '%s' is not in the manifest", s->path, name);
        if (f->size != s->files[i].bytes)
            return err_set(e, E_CHECK, "%s: '%s': expected %llu bytes by the manifest, found %llu",
                           s->path, name, (unsigned long long)f->size,
                           (unsigned long long)s->files[i].bytes);
    }
    /* weights are verified on demand; the configuration is small and decides what the weights mean
     */
    const manifest_file *config = manifest_find(man, TM_WEIGHTS_DIR "/" TM_CONFIG_NAME);
    if (!config) return err_set(e, E_CHECK, "%s: config.yaml is not in the manifest", s->path);
    TRY(join(path, s->path, TM_WEIGHTS_DIR, TM_CONFIG_NAME, e));
    TRY(file_read(&text, &n, path, YAML_MAX_BYTES, e));
    const hash128 found = hash_xxh128(text, n);
    mem_free(text);
    if (strcmp(found.hex, config->digest.hex) != 0)
        return err_set(
            e, E_CHECK,
            "%s: expected xxh3-128 %s, found %s; to use the changed file, delete " MANIFEST_NAME,
            path, config->digest.hex, found.hex);
    return OK;
}

/* Without a manifest: names, sizes and the ends of every file, so that two models of one shape
 * differ. */
static err_code sample_digest(const tm_store *s, hash256 *out, err *e)
{
    char path[PATH_CAP];
    hash_xxh *h = NULL;

    TRY(hash_xxh_open(&h, e));
    err_code rc = OK;
    for (size_t i = 0; rc == OK && i < s->n; i++) {
        file_map map;
        rc = join(path, s->path, TM_WEIGHTS_DIR, s->files[i].name, e);
        if (rc == OK) rc = file_map_open(&map, path, e);
        if (rc != OK) break;
        const size_t n = map.size < SAMPLE_BYTES ? map.size : SAMPLE_BYTES;
        hash_xxh_add(h, s->files[i].name, sizeof s->files[i].name);
        hash_xxh_add(h, &map.size, sizeof map.size);
        hash_xxh_add(h, map.data, n);
        hash_xxh_add(h, map.data + map.size - n, n);
        file_map_close(&map);
    }
    const hash128 d = hash_xxh_end(&h);
    return rc == OK ? hash_sha256(out, d.hex, sizeof d.hex, e) : rc;
}

static err_code find_digest(const tm_store *s, hash256 *out, err *e)
{
    manifest man;
    if (!manifest_exists(s->path)) return sample_digest(s, out, e);
    TRY(manifest_read(&man, s->path, e));
    err_code rc = strcmp(man.kind, MANIFEST_KIND_TM) == 0
                      ? check_manifest(s, &man, e)
                      : err_set(e, E_INPUT, "%s/%s: expected kind '%s', got '%.64s'", s->path,
                                MANIFEST_NAME, MANIFEST_KIND_TM, man.kind);
    *out = man.digest;
    manifest_free(&man);
    return rc;
}

/* ---- weight_src ---- */

static void store_close(void *self)
{
    tm_store *s = self;
    if (!s) return;
    for (size_t i = 0; s->maps && i < s->n; i++) file_map_close(&s->maps[i]);
    mem_free(s->maps);
    mem_free(s->files);
    mem_free(s);
}

/* Index of a file, or n when there is none. */
static size_t find(const tm_store *s, tensor_role r, int32_t layer, tm_part part)
{
    size_t from = 0, to = s->n_model;
    if (layer >= s->c.m.layers) return s->n;
    if (layer >= 0) {
        from = s->n_model + (size_t)layer * s->per_layer;
        to = from + s->per_layer;
    }
    for (size_t i = from; i < to; i++)
        if (s->files[i].role == r && s->files[i].part == part) return i;
    return s->n;
}

static err_code map_file(tm_store *s, size_t i, err *e)
{
    char path[PATH_CAP];
    if (s->maps[i].size) return OK;
    TRY(join(path, s->path, TM_WEIGHTS_DIR, s->files[i].name, e));
    TRY(file_map_open(&s->maps[i], path, e));
    if (s->maps[i].size == s->files[i].bytes) return OK;
    const size_t found = s->maps[i].size;
    file_map_close(&s->maps[i]);
    return err_set(e, E_INPUT, "%s: expected %llu bytes, found %zu: it changed since it was opened",
                   path, (unsigned long long)s->files[i].bytes, found);
}

static bool is_vector(const tm_file *f)
{
    return f->part == TM_BIAS || f->role == ROLE_ATTN_NORM || f->role == ROLE_FFN_NORM ||
           f->role == ROLE_FINAL_NORM;
}

/* The stored matrix or vector. */
static err_code get(tm_store *s, tensor_role r, int32_t layer, tm_part part, tensor *view, err *e)
{
    const size_t i = find(s, r, layer, part);
    if (i == s->n)
        return err_set(e, E_INPUT, "%s: no %s in layer %d", s->path, role_name(r), layer);
    TRY(map_file(s, i, e));
    const tm_file *f = &s->files[i];
    void *data = (void *)(uintptr_t)s->maps[i].data;
    *view = is_vector(f) ? tensor_1d(data, f->dt, f->cols)
                         : tensor_2d(data, f->dt, f->rows, f->cols);
    return OK;
}

static err_code store_tensor(void *self, tensor_role r, int32_t layer, tensor *view, err *e)
{
    tm_store *s = self;
    TRY(get(s, r, layer, TM_WEIGHT, view, e));
    if (r == ROLE_EMBED || r == ROLE_HEAD)
        *view = tensor_rows(view, 0, s->c.m.vocab); /* drop padding */
    return OK;
}

static err_code store_linear(void *self, tensor_role r, int32_t layer, int32_t expert,
                             linear_view *view, err *e)
{
    tm_store *s = self;
    assert(expert <= 0);
    (void)expert;
    memset(view, 0, sizeof *view);
    if (find(s, r, layer, TM_BIAS) < s->n) TRY(get(s, r, layer, TM_BIAS, &view->bias, e));
    if (!s->c.m.w4_group) {
        tensor t; /* [k,n] as stored */
        TRY(get(s, r, layer, TM_WEIGHT, &t, e));
        view->dense = tensor_2d(t.data, t.dt, t.shape[1], t.shape[0]);
        view->dense.stride[0] = 1;
        view->dense.stride[1] = t.shape[1];
        return OK;
    }
    view->w4 = true;
    TRY(get(s, r, layer, TM_QWEIGHT, &view->q.q, e));
    TRY(get(s, r, layer, TM_SCALES, &view->q.scales, e));
    TRY(get(s, r, layer, TM_ZEROS, &view->q.zeros, e));
    w4_shape(&view->q, view->q.q.shape[0], view->q.q.shape[1] * 8, s->c.m.w4_group, W4_TM);
    view->q.bias = view->bias;
    return OK;
}

static bool store_has(void *self, tensor_role r, int32_t layer, int32_t expert)
{
    const tm_store *s = self;
    (void)expert;
    return find(s, r, layer, TM_WEIGHT) < s->n || find(s, r, layer, TM_QWEIGHT) < s->n;
}

static void store_advise(void *self, int32_t layer, bool need)
{
    tm_store *s = self;
    err ignored; /* a hint: what cannot be mapped fails when it is asked for */
    if (layer < 0 || layer >= s->c.m.layers) return;
    for (size_t i = 0; i < s->per_layer; i++) {
        const size_t at = s->n_model + (size_t)layer * s->per_layer + i;
        file_map *m = &s->maps[at];
        if (need && map_file(s, at, &ignored) == OK)
            file_map_willneed(m, 0, m->size);
        else if (!need && m->size)
            file_map_dontneed(m, 0, m->size);
    }
}

static err_code store_open(tm_store *s, const char *tokenizer_dir, hash256 *digest, err *e)
{
    void *p;
    TRY(tm_store_config(&s->c, s->path, e));
    if (s->c.tp != 1)
        return err_set(e, E_UNSUPPORTED,
                       "%s: split for tp %d; readable is tp 1 (convert with --tp 1)", s->path,
                       s->c.tp);
    if (tm_config_files(&s->files, &s->n, &s->c, e) != OK)
        return err_wrap(e, "%s: config.yaml", s->path);
    while (s->n_model < s->n && s->files[s->n_model].layer < 0) s->n_model++;
    s->per_layer = (s->n - s->n_model) / (size_t)s->c.m.layers;
    TRY(mem_alloc(&p, s->n, sizeof(file_map), "file maps", e));
    s->maps = p;
    TRY(check_files(s, e));
    if (read_side_config(s, tokenizer_dir, e) != OK) return err_wrap(e, "%s", s->path);
    TRY(model_desc_check(&s->c.m, e));
    return find_digest(s, digest, e);
}

err_code tm_store_weights(weight_src **out, const char *path, err *e)
{
    static const weight_ops ops = {store_close, store_tensor, store_linear, store_has,
                                   store_advise};
    char tokenizer_dir[PATH_CAP];
    hash256 digest;
    void *p;

    *out = NULL;
    TRY(tm_store_tokenizer_dir(tokenizer_dir, sizeof tokenizer_dir, path, e));
    TRY(mem_alloc(&p, 1, sizeof(tm_store), "workspace", e));
    tm_store *s = p;
    const int n = snprintf(s->path, sizeof s->path, "%s", path);
    err_code rc = n >= 0 && (size_t)n < sizeof s->path
                      ? OK
                      : err_set(e, E_LIMIT, "'%.100s...' is too long", path);
    if (rc == OK) rc = store_open(s, tokenizer_dir, &digest, e);
    if (rc == OK)
        rc = weights_make(out, SRC_TM, &s->c.m, path, tokenizer_dir, digest.hex, &ops, s, e);
    if (rc != OK) store_close(s);
    return rc;
}
