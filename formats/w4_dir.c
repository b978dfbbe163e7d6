/* Writer of an AWQ directory: a table of all tensors made at open, one st_writer per shard, then
 * the side files and the manifest. */
#include "formats/w4_dir.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/cast16.h"
#include "formats/family.h"
#include "formats/manifest.h"
#include "formats/model_files.h"
#include "formats/safetensors.h"

#define SHARD_BYTES_DEFAULT ((int64_t)4000000000)
#define CONFIG_MAX_BYTES    ((size_t)16 << 20)
#define PATH_CAP            4096
#define NAME_CAP            256

typedef struct {
    char name[NAME_CAP];
    dtype dt;
    int ndim;
    int64_t shape[2];
    int64_t bytes;
    int shard;
    bool written;
} entry;

typedef struct {
    const model_desc *m;
    const w4_dir_opts *o;
    entry *at;
    int64_t n, cap;
    int shards;
} table;

struct w4_dir_writer {
    model_desc m;
    w4_dir_opts o; /* meta stays borrowed until open returns: it is in the files by then */
    const job *j;
    char src_dir[PATH_CAP];
    char parent[128], options[1024];
    table t;
    dir_writer *dir;
    st_writer **shard; /* [t.shards] */
    w4_weight awq;     /* room for the largest linear */
    void *cast;        /* CAST16_BYTES */
};

/* ---- the table of tensors ---- */

static err_code table_add(table *t, const char *base, const char *suffix, dtype dt, int ndim,
                          int64_t a, int64_t b, err *e)
{
    if (t->n == t->cap) {
        void *p;
        const int64_t cap = t->cap ? 2 * t->cap : 256;
        TRY(mem_alloc(&p, (size_t)cap, sizeof(entry), "tensor table", e));
        if (t->n) memcpy(p, t->at, (size_t)t->n * sizeof(entry));
        mem_free(t->at);
        t->at = p;
        t->cap = cap;
    }
    entry *x = &t->at[t->n];
    memset(x, 0, sizeof *x);
    const int len = snprintf(x->name, sizeof x->name, "%s%s", base, suffix);
    if (len < 0 || (size_t)len >= sizeof x->name)
        return err_set(e, E_LIMIT, "tensor name '%.100s...' is too long", base);
    x->dt = dt;
    x->ndim = ndim;
    x->shape[0] = a;
    x->shape[1] = b;
    x->bytes = a * (ndim == 2 ? b : 1) * (int64_t)dtype_bytes(dt); /* bounded by model_desc_check */
    t->n++;
    return OK;
}

static err_code base_name(const table *t, tensor_role r, int32_t layer, int32_t expert,
                          char buf[NAME_CAP], err *e)
{
    const family *f = family_by_name(t->m->family);
    if (!f) return err_set(e, E_UNSUPPORTED, "unknown family '%s'", t->m->family);
    return f->tensor_name(t->m, r, layer, expert, buf, NAME_CAP, e);
}

static bool role_has_bias(const model_desc *m, tensor_role r)
{
    if (r == ROLE_QKV || r == ROLE_Q || r == ROLE_K || r == ROLE_V) return m->qkv_bias;
    return r == ROLE_O && m->o_bias;
}

static err_code table_linear(table *t, tensor_role r, int32_t layer, err *e)
{
    char base[NAME_CAP];
    const int64_t n = model_linear_n(t->m, r), k = model_linear_k(t->m, r), g = t->o->group;

    TRY(base_name(t, r, layer, -1, base, e));
    if (t->o->dense_roles >> r & 1u) {
        TRY(table_add(t, base, ".weight", DT_F16, 2, n, k, e));
    } else {
        size_t q, s, z;
        if (w4_sizes(&q, &s, &z, k, n, t->o->group, W4_AWQ, e) != OK)
            return err_wrap(e, "%s", base);
        TRY(table_add(t, base, ".qweight", DT_I32, 2, k, n / 8, e));
        TRY(table_add(t, base, ".qzeros", DT_I32, 2, k / g, n / 8, e));
        TRY(table_add(t, base, ".scales", DT_F16, 2, k / g, n, e));
    }
    return role_has_bias(t->m, r) ? table_add(t, base, ".bias", DT_F16, 1, n, 0, e) : OK;
}

static err_code table_float(table *t, tensor_role r, int32_t layer, int ndim, int64_t a, int64_t b,
                            err *e)
{
    char base[NAME_CAP];
    TRY(base_name(t, r, layer, -1, base, e));
    return table_add(t, base, ".weight", DT_F16, ndim, a, b, e);
}

static err_code table_layer(table *t, int32_t layer, err *e)
{
    const model_desc *m = t->m;
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);

    TRY(table_float(t, ROLE_ATTN_NORM, layer, 1, m->hidden, 0, e));
    TRY(table_float(t, ROLE_FFN_NORM, layer, 1, m->hidden, 0, e));
    if (m->qk_norm) {
        TRY(table_float(t, ROLE_Q_NORM, layer, 1, m->head_dim, 0, e));
        TRY(table_float(t, ROLE_K_NORM, layer, 1, m->head_dim, 0, e));
    }
    for (int i = 0; i < n; i++) TRY(table_linear(t, linears[i], layer, e));
    return OK;
}

static void table_shard(table *t)
{
    const int64_t limit = t->o->shard_bytes > 0 ? t->o->shard_bytes : SHARD_BYTES_DEFAULT;
    int64_t used = 0;
    t->shards = 1;
    for (int64_t i = 0; i < t->n; i++) {
        if (used && used + t->at[i].bytes > limit) {
            t->shards++;
            used = 0;
        }
        used += t->at[i].bytes;
        t->at[i].shard = t->shards - 1;
    }
}

static err_code table_make(table *t, const model_desc *m, const w4_dir_opts *o, err *e)
{
    *t = (table){.m = m, .o = o};
    if (m->experts)
        return err_set(e, E_UNSUPPORTED,
                       "mixture-of-experts models (%d experts) have no AWQ directory yet",
                       m->experts);
    TRY(table_float(t, ROLE_EMBED, -1, 2, m->vocab, m->hidden, e));
    for (int32_t l = 0; l < m->layers; l++) TRY(table_layer(t, l, e));
    TRY(table_float(t, ROLE_FINAL_NORM, -1, 1, m->hidden, 0, e));
    if (!m->tied_embed) TRY(table_float(t, ROLE_HEAD, -1, 2, m->vocab, m->hidden, e));
    table_shard(t);
    return OK;
}

static entry *table_find(const table *t, const char *base, const char *suffix)
{
    const size_t n = strlen(base);
    for (int64_t i = 0; i < t->n; i++)
        if (strncmp(t->at[i].name, base, n) == 0 && strcmp(t->at[i].name + n, suffix) == 0)
            return &t->at[i];
    return NULL;
}

err_code w4_dir_bytes(uint64_t *bytes, int64_t *tensors, const model_desc *m, const w4_dir_opts *o,
                      err *e)
{
    table t;
    const err_code rc = table_make(&t, m, o, e);
    *bytes = 0;
    *tensors = t.n;
    for (int64_t i = 0; i < t.n; i++) *bytes += (uint64_t)t.at[i].bytes;
    mem_free(t.at);
    return rc;
}

/* Sizes of the buffers that hold any W4 linear of the model in AWQ layout. */
static void awq_room(size_t *q, size_t *s, size_t *z, const model_desc *m, const w4_dir_opts *o)
{
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    err ignored; /* table_make has reported shapes that do not fit */

    *q = *s = *z = 0;
    for (int i = 0; i < n; i++) {
        size_t a, b, c;
        if (o->dense_roles >> linears[i] & 1u) continue;
        if (w4_sizes(&a, &b, &c, model_linear_k(m, linears[i]), model_linear_n(m, linears[i]),
                     o->group, W4_AWQ, &ignored) != OK)
            continue;
        if (a > *q) *q = a;
        if (b > *s) *s = b;
        if (c > *z) *z = c;
    }
}

size_t w4_dir_memory(const model_desc *m, const w4_dir_opts *o)
{
    size_t q, s, z;
    awq_room(&q, &s, &z, m, o);
    return q + s + z + CAST16_BYTES;
}

/* ---- open ---- */

static void shard_name(char *buf, size_t cap, const table *t, int shard)
{
    if (t->shards == 1)
        (void)snprintf(buf, cap, "model.safetensors");
    else
        (void)snprintf(buf, cap, "model-%05d-of-%05d.safetensors", shard + 1, t->shards);
}

/* "format": "pt" and ours in front of the caller's. */
static err_code full_meta(const char ***out, const char *const *meta, err *e)
{
    size_t n = 0;
    void *p;
    while (meta && meta[n]) n++;
    TRY(mem_alloc(&p, n + 5, sizeof(char *), "metadata", e));
    const char **m = p;
    m[0] = "format";
    m[1] = "pt";
    m[2] = "tool";
    m[3] = "tmforge " TMF_VERSION;
    if (n) memcpy(m + 4, meta, n * sizeof *m);
    *out = m;
    return OK;
}

static err_code open_shards(w4_dir_writer *w, err *e)
{
    const char **meta = NULL;
    char path[PATH_CAP], name[64];
    void *p;
    err_code rc = OK;

    TRY(mem_alloc(&p, (size_t)w->t.shards, sizeof(st_writer *), "shard list", e));
    w->shard = p;
    TRY(full_meta(&meta, w->o.meta, e));
    for (int i = 0; rc == OK && i < w->t.shards; i++) {
        shard_name(name, sizeof name, &w->t, i);
        rc = path_join(path, sizeof path, dir_writer_path(w->dir), name, e);
        if (rc == OK) rc = st_writer_open(&w->shard[i], path, meta, true, e);
    }
    for (int64_t i = 0; rc == OK && i < w->t.n; i++) {
        const entry *x = &w->t.at[i];
        rc = st_writer_add(w->shard[x->shard], x->name, x->dt, x->ndim, x->shape, e);
    }
    mem_free(meta);
    return rc;
}

static err_code open_room(w4_dir_writer *w, err *e)
{
    size_t q, s, z;
    awq_room(&q, &s, &z, &w->m, &w->o);
    TRY(mem_alloc(&w->awq.q.data, q, 1, "AWQ words", e));
    TRY(mem_alloc(&w->awq.scales.data, s, 1, "AWQ scales", e));
    TRY(mem_alloc(&w->awq.zeros.data, z, 1, "AWQ zeros", e));
    return mem_alloc(&w->cast, CAST16_BYTES, 1, "f16 conversion", e);
}

static void note_meta(char *dst, size_t cap, const char *const *meta, const char *key)
{
    for (; meta && meta[0] && meta[1]; meta += 2)
        if (strcmp(meta[0], key) == 0) (void)snprintf(dst, cap, "%s", meta[1]);
}

err_code w4_dir_open(w4_dir_writer **out, const char *path, weight_src *src, const w4_dir_opts *o,
                     const job *j, err *e)
{
    void *p;
    err_code rc;

    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(w4_dir_writer), "AWQ directory writer", e));
    w4_dir_writer *w = p;
    w->m = *weights_desc(src);
    w->o = *o;
    w->j = j;
    note_meta(w->parent, sizeof w->parent, o->meta, "parent");
    note_meta(w->options, sizeof w->options, o->meta, "options");
    (void)snprintf(w->src_dir, sizeof w->src_dir, "%s", weights_tokenizer_dir(src));
    if ((rc = table_make(&w->t, &w->m, &w->o, e)) != OK) goto done;
    if ((rc = open_room(w, e)) != OK) goto done;
    if ((rc = dir_writer_open(&w->dir, path, o->force, false, e)) != OK) goto done;
    rc = open_shards(w, e);
done:
    w->o.meta = NULL;
    if (rc != OK)
        w4_dir_abort(&w);
    else
        *out = w;
    return rc;
}

void w4_dir_abort(w4_dir_writer **pw)
{
    w4_dir_writer *w = *pw;
    if (!w) return;
    for (int i = 0; w->shard && i < w->t.shards; i++) st_writer_abort(&w->shard[i]);
    dir_writer_abort(&w->dir);
    mem_free(w->shard);
    mem_free(w->t.at);
    mem_free(w->awq.q.data);
    mem_free(w->awq.scales.data);
    mem_free(w->awq.zeros.data);
    mem_free(w->cast);
    mem_free(w);
    *pw = NULL;
}

/* ---- tensors ---- */

typedef struct {
    st_writer *st;
    const char *name;
} part_ctx;

static err_code write_part(void *ctx, int64_t first, const uint16_t *data, int64_t count, err *e)
{
    const part_ctx *c = ctx;
    return st_writer_part(c->st, c->name, first, data, count, e);
}

static err_code take_entry(w4_dir_writer *w, entry **out, const char *base, const char *suffix,
                           err *e)
{
    *out = table_find(&w->t, base, suffix);
    if (!*out) return err_set(e, E_SHAPE, "%s%s: the model has no such tensor", base, suffix);
    if ((*out)->written) return err_set(e, E_SHAPE, "%s%s: written twice", base, suffix);
    (*out)->written = true;
    return OK;
}

static err_code put_float(w4_dir_writer *w, const char *base, const char *suffix, const tensor *t,
                          err *e)
{
    entry *x;
    TRY(take_entry(w, &x, base, suffix, e));
    TRY(tensor_expect(t, x->name, t->dt, x->ndim, x->shape, e));
    if (t->stride[t->ndim - 1] != 1)
        return err_set(e, E_SHAPE, "%s: expected contiguous rows", x->name);
    part_ctx c = {w->shard[x->shard], x->name};
    cast16 cast = {.what = x->name, .to = DT_F16, .clamp = w->o.clamp_f16};
    return cast16_tensor(t, &cast, w->cast, write_part, &c, w->j, e);
}

static err_code put_words(w4_dir_writer *w, const char *base, const char *suffix, const tensor *t,
                          err *e)
{
    entry *x;
    TRY(take_entry(w, &x, base, suffix, e));
    return st_writer_data(w->shard[x->shard], x->name, t, e);
}

static err_code put_bias(w4_dir_writer *w, tensor_role r, const char *base, const tensor *bias,
                         err *e)
{
    const bool has = bias && bias->data, needs = role_has_bias(&w->m, r);
    if (has != needs)
        return err_set(e, E_SHAPE, "%s.bias: expected %s, got %s", base, needs ? "a bias" : "none",
                       has ? "one" : "none");
    return has ? put_float(w, base, ".bias", bias, e) : OK;
}

err_code w4_dir_tensor(w4_dir_writer *w, tensor_role r, int32_t layer, const tensor *view, err *e)
{
    char base[NAME_CAP];
    assert(!(r == ROLE_HEAD && w->m.tied_embed));
    TRY(base_name(&w->t, r, layer, -1, base, e));
    return put_float(w, base, ".weight", view, e);
}

err_code w4_dir_linear(w4_dir_writer *w, tensor_role r, int32_t layer, int32_t expert,
                       const w4_weight *codes, err *e)
{
    char base[NAME_CAP];

    TRY(base_name(&w->t, r, layer, expert, base, e));
    TRY(w4_check(codes, base, e));
    if (codes->k != model_linear_k(&w->m, r) || codes->n != model_linear_n(&w->m, r) ||
        codes->group != w->o.group)
        return err_set(e, E_SHAPE, "%s: expected k %lld, n %lld, group %d, got %lld, %lld, %d",
                       base, (long long)model_linear_k(&w->m, r),
                       (long long)model_linear_n(&w->m, r), w->o.group, (long long)codes->k,
                       (long long)codes->n, codes->group);
    w4_shape(&w->awq, codes->k, codes->n, codes->group, W4_AWQ);
    if (w4_repack_on(&w->awq, codes, w->o.workers, e) != OK) return err_wrap(e, "%s", base);
    TRY(put_words(w, base, ".qweight", &w->awq.q, e));
    TRY(put_words(w, base, ".qzeros", &w->awq.zeros, e));
    TRY(put_float(w, base, ".scales", &w->awq.scales, e)); /* refuses scales that are not finite */
    return put_bias(w, r, base, &codes->bias, e);
}

err_code w4_dir_dense(w4_dir_writer *w, tensor_role r, int32_t layer, int32_t expert,
                      const tensor *weight, const tensor *bias, err *e)
{
    char base[NAME_CAP];
    TRY(base_name(&w->t, r, layer, expert, base, e));
    TRY(put_float(w, base, ".weight", weight, e));
    return put_bias(w, r, base, bias, e);
}

/* ---- commit ---- */

static err_code out_of_memory(const char *what, err *e)
{
    return err_set(e, E_NOMEM, "out of memory for %s", what);
}

static err_code write_json(const char *dir, const char *name, const cJSON *o, err *e)
{
    char path[PATH_CAP], *text = NULL;
    file_writer *f = NULL;
    err_code rc;

    TRY(path_join(path, sizeof path, dir, name, e));
    TRY(json_print(&text, o, true, e));
    if ((rc = file_writer_open(&f, path, true, e)) != OK) goto done;
    if ((rc = file_writer_write(f, text, strlen(text), e)) != OK) goto done;
    if ((rc = file_writer_write(f, "\n", 1, e)) != OK) goto done;
    rc = file_writer_commit(&f, e);
done:
    file_writer_abort(&f);
    mem_free(text);
    return rc;
}

static err_code write_index(w4_dir_writer *w, err *e)
{
    char name[64];
    double total = 0;
    cJSON *o = cJSON_CreateObject();
    cJSON *meta = o ? cJSON_AddObjectToObject(o, "metadata") : NULL;
    cJSON *map = o ? cJSON_AddObjectToObject(o, "weight_map") : NULL;
    bool ok = meta && map;
    for (int64_t i = 0; ok && i < w->t.n; i++) {
        shard_name(name, sizeof name, &w->t, w->t.at[i].shard);
        ok = cJSON_AddStringToObject(map, w->t.at[i].name, name) != NULL;
        total += (double)w->t.at[i].bytes;
    }
    ok = ok && cJSON_AddNumberToObject(meta, "total_size", total);
    const err_code rc = ok ? write_json(dir_writer_path(w->dir), "model.safetensors.index.json", o,
                                        e)
                           : out_of_memory("the shard index", e);
    cJSON_Delete(o);
    return rc;
}

static err_code add_skipped(const w4_dir_writer *w, cJSON *list, err *e)
{
    char base[NAME_CAP];
    tensor_role linears[7];
    const int n = model_block_linears(&w->m, linears);
    for (int32_t l = 0; l < w->m.layers; l++)
        for (int i = 0; i < n; i++) {
            if (!(w->o.dense_roles >> linears[i] & 1u)) continue;
            TRY(base_name(&w->t, linears[i], l, -1, base, e));
            cJSON *s = cJSON_CreateString(base);
            if (!s || !cJSON_AddItemToArray(list, s)) {
                cJSON_Delete(s);
                return out_of_memory("config.json", e);
            }
        }
    return OK;
}

static bool all_dense(const w4_dir_writer *w)
{
    tensor_role roles[7];
    const int n = model_block_linears(w->t.m, roles);
    bool all = true;
    for (int i = 0; i < n; i++) all = all && (w->o.dense_roles >> roles[i] & 1u);
    return all;
}

/* quant_method, version, bits, group_size, zero_point as AutoAWQ and LMDeploy write them. */
static err_code add_quantization(const w4_dir_writer *w, cJSON *config, err *e)
{
    cJSON_DeleteItemFromObjectCaseSensitive(config, "quantization_config");
    if (all_dense(w)) return OK; /* a 16-bit model */
    cJSON *q = cJSON_AddObjectToObject(config, "quantization_config");
    if (!q || !cJSON_AddStringToObject(q, "quant_method", "awq") ||
        !cJSON_AddStringToObject(q, "version", "gemm") || !cJSON_AddNumberToObject(q, "bits", 4) ||
        !cJSON_AddNumberToObject(q, "group_size", w->o.group) ||
        !cJSON_AddTrueToObject(q, "zero_point"))
        return out_of_memory("config.json", e);
    if (!w->o.dense_roles)
        return cJSON_AddNullToObject(q, "modules_to_not_convert") ? OK
                                                                  : out_of_memory("config.json", e);
    cJSON *list = cJSON_AddArrayToObject(q, "modules_to_not_convert");
    return list ? add_skipped(w, list, e) : out_of_memory("config.json", e);
}

/* Replaced in place, so that the key keeps its position; newer configs say "dtype". */
static err_code set_float16(cJSON *config, err *e)
{
    const char *key = cJSON_GetObjectItemCaseSensitive(config, "dtype") &&
                              !cJSON_GetObjectItemCaseSensitive(config, "torch_dtype")
                          ? "dtype"
                          : "torch_dtype";
    cJSON *v = cJSON_CreateString("float16");
    if (!v) return out_of_memory("config.json", e);
    const bool ok = cJSON_GetObjectItemCaseSensitive(config, key)
                        ? cJSON_ReplaceItemInObjectCaseSensitive(config, key, v)
                        : cJSON_AddItemToObject(config, key, v);
    if (ok) return OK;
    cJSON_Delete(v);
    return out_of_memory("config.json", e);
}

/* A head that is written beside the embedding is one of its own. */
static err_code set_untied(const w4_dir_writer *w, cJSON *config, err *e)
{
    static const char key[] = "tie_word_embeddings";
    if (w->m.tied_embed || !cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(config, key))) return OK;
    cJSON *v = cJSON_CreateFalse();
    if (v && cJSON_ReplaceItemInObjectCaseSensitive(config, key, v)) return OK;
    cJSON_Delete(v);
    return out_of_memory("config.json", e);
}

static err_code write_config(w4_dir_writer *w, err *e)
{
    char path[PATH_CAP];
    cJSON *config = NULL;
    err_code rc;

    TRY(path_join(path, sizeof path, w->src_dir, "config.json", e));
    TRY(json_load(&config, path, CONFIG_MAX_BYTES, e));
    if (!cJSON_IsObject(config))
        rc = err_set(e, E_INPUT, "%s: expected an object", path);
    else if ((rc = set_float16(config, e)) == OK && (rc = set_untied(w, config, e)) == OK &&
             (rc = add_quantization(w, config, e)) == OK)
        rc = write_json(dir_writer_path(w->dir), "config.json", config, e);
    cJSON_Delete(config);
    return rc;
}

static err_code copy_side_files(w4_dir_writer *w, err *e)
{
    char from[PATH_CAP], to[PATH_CAP];
    dir_list files;
    err_code rc = OK;

    TRY(model_files_list(&files, w->src_dir, e));
    for (size_t i = 0; rc == OK && i < files.n; i++) {
        rc = path_join(from, sizeof from, w->src_dir, files.names[i], e);
        if (rc == OK) rc = path_join(to, sizeof to, dir_writer_path(w->dir), files.names[i], e);
        if (rc == OK) rc = file_copy(from, to, e);
    }
    dir_list_free(&files);
    return rc;
}

static err_code write_manifest(w4_dir_writer *w, err *e)
{
    const char *dir = dir_writer_path(w->dir);
    manifest m;
    dir_list files = {0};
    err_code rc;

    TRY(manifest_init(&m, MANIFEST_KIND_AWQ, w->parent, w->options, e));
    rc = dir_list_open(&files, dir, e);
    for (size_t i = 0; rc == OK && i < files.n; i++)
        rc = manifest_add_file(&m, dir, files.names[i], e);
    if (rc == OK) rc = manifest_write(&m, dir, e);
    dir_list_free(&files);
    manifest_free(&m);
    return rc;
}

static err_code finish(w4_dir_writer *w, err *e)
{
    for (int64_t i = 0; i < w->t.n; i++)
        if (!w->t.at[i].written) return err_set(e, E_INPUT, "%s was not written", w->t.at[i].name);
    for (int i = 0; i < w->t.shards; i++) TRY(st_writer_commit(&w->shard[i], e));
    if (w->t.shards > 1) TRY(write_index(w, e));
    TRY(write_config(w, e));
    TRY(copy_side_files(w, e));
    TRY(write_manifest(w, e));
    return dir_writer_commit(&w->dir, e);
}

err_code w4_dir_commit(w4_dir_writer **w, err *e)
{
    const err_code rc = finish(*w, e);
    w4_dir_abort(w); /* after a commit only memory is left to free */
    return rc;
}
