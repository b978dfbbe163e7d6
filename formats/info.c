/* tm-run info as a library: opens a path the way everything else does, so what it says is what a
 * run sees. */
#include "formats/info.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/artifact.h"
#include "formats/family.h"
#include "formats/tm_store.h"
#include "formats/tokenizer.h"
#include "formats/weights.h"

#define PATH_CAP 4096

/* ---- building; the first failure sticks ---- */

typedef struct {
    cJSON *o;
    bool ok;
} obj;

static void add(obj *x, const char *key, cJSON *v)
{
    if (x->ok && v && cJSON_AddItemToObject(x->o, key, v)) return;
    cJSON_Delete(v);
    x->ok = false;
}
static void add_num(obj *x, const char *key, double v) { add(x, key, cJSON_CreateNumber(v)); }
static void add_str(obj *x, const char *key, const char *v) { add(x, key, cJSON_CreateString(v)); }
static void add_bool(obj *x, const char *key, bool v) { add(x, key, cJSON_CreateBool(v)); }

/* A float in the digits that give it back: 1e-05, not 9.99999975e-06. */
static void add_float(obj *x, const char *key, float v)
{
    char text[32];
    for (int digits = 1; digits <= 9; digits++) {
        (void)snprintf(text, sizeof text, "%.*g", digits, (double)v);
        if (strtof(text, NULL) == v) break;
    }
    add_num(x, key, strtod(text, NULL));
}

static obj child(obj *x, const char *key)
{
    obj c = {cJSON_CreateObject(), true};
    cJSON *v = c.o;
    add(x, key, v);
    c.ok = x->ok;
    return c;
}

/* ---- sizes by part ---- */

typedef enum { PART_EMBEDDING, PART_ATTENTION, PART_FFN, PART_NORMS, PART_HEAD, PART_COUNT } part;
static const char *const part_names[PART_COUNT] = {"embedding", "attention", "ffn", "norms",
                                                   "head"};
typedef struct {
    double bytes[PART_COUNT];
    double parameters;
} sizes;

static part part_of(tensor_role r)
{
    switch (r) {
    case ROLE_EMBED: return PART_EMBEDDING;
    case ROLE_HEAD: return PART_HEAD;
    case ROLE_GATE:
    case ROLE_UP:
    case ROLE_DOWN: return PART_FFN;
    case ROLE_QKV:
    case ROLE_Q:
    case ROLE_K:
    case ROLE_V:
    case ROLE_O: return PART_ATTENTION;
    default: return PART_NORMS;
    }
}

/* Parameters of the model, whatever they are stored as. */
static double count_parameters(const model_desc *m)
{
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);
    double layer = 2.0 * m->hidden + (m->qk_norm ? 2.0 * m->head_dim : 0);
    for (int i = 0; i < n; i++)
        layer += (double)model_linear_n(m, linears[i]) * (double)model_linear_k(m, linears[i]);
    if (m->qkv_bias) layer += (double)(m->heads + 2 * m->kv_heads) * m->head_dim;
    if (m->o_bias) layer += m->hidden;
    const double table = (double)m->vocab * m->hidden;
    return m->layers * layer + m->hidden + table * (m->tied_embed ? 1 : 2);
}

static err_code size_tensor(sizes *s, weight_src *src, tensor_role r, int32_t layer, err *e)
{
    tensor t;
    TRY(weights_tensor(src, r, layer, &t, e));
    s->bytes[part_of(r)] += (double)tensor_bytes(&t);
    return OK;
}

static err_code size_linear(sizes *s, weight_src *src, tensor_role r, int32_t layer, err *e)
{
    linear_view v;
    TRY(weights_linear(src, r, layer, -1, &v, e));
    double bytes = v.bias.data ? (double)tensor_bytes(&v.bias) : 0;
    if (v.w4)
        bytes += (double)tensor_bytes(&v.q.q) + (double)tensor_bytes(&v.q.scales) +
                 (double)tensor_bytes(&v.q.zeros);
    else
        bytes += (double)tensor_count(&v.dense) * (double)dtype_bytes(v.dense.dt);
    s->bytes[part_of(r)] += bytes;
    return OK;
}

static err_code size_source(sizes *s, weight_src *src, err *e)
{
    const model_desc *m = weights_desc(src);
    tensor_role linears[7];
    const int n = model_block_linears(m, linears);

    TRY(size_tensor(s, src, ROLE_EMBED, -1, e));
    TRY(size_tensor(s, src, ROLE_FINAL_NORM, -1, e));
    if (!m->tied_embed) TRY(size_tensor(s, src, ROLE_HEAD, -1, e));
    for (int32_t l = 0; l < m->layers; l++) {
        TRY(size_tensor(s, src, ROLE_ATTN_NORM, l, e));
        TRY(size_tensor(s, src, ROLE_FFN_NORM, l, e));
        if (m->qk_norm) TRY(size_tensor(s, src, ROLE_Q_NORM, l, e));
        if (m->qk_norm) TRY(size_tensor(s, src, ROLE_K_NORM, l, e));
        for (int i = 0; i < n; i++) TRY(size_linear(s, src, linears[i], l, e));
    }
    return OK;
}

static void add_sizes(obj *x, const sizes *s)
{
    obj b = child(x, "bytes");
    double total = 0;
    for (int i = 0; i < PART_COUNT; i++) {
        add_num(&b, part_names[i], s->bytes[i]);
        total += s->bytes[i];
    }
    add_num(&b, "total", total);
    add_num(x, "parameters", s->parameters);
    x->ok = x->ok && b.ok;
}

/* ---- model and tokenizer ---- */

static void add_model(obj *x, const model_desc *m)
{
    obj o = child(x, "model");
    add_str(&o, "family", m->family);
    add_str(&o, "architecture", m->architecture);
    add_num(&o, "layers", m->layers);
    add_num(&o, "hidden", m->hidden);
    add_num(&o, "heads", m->heads);
    add_num(&o, "kv_heads", m->kv_heads);
    add_num(&o, "head_dim", m->head_dim);
    add_num(&o, "ffn", m->ffn);
    add_num(&o, "vocab", m->vocab);
    add_num(&o, "context", m->max_tokens);
    add_num(&o, "sliding_window", m->sliding_window);
    add_str(&o, "dtype", dtype_name(m->dt));
    add_num(&o, "w4_group", m->w4_group);
    add_float(&o, "rope_theta", m->rope_theta);
    add_str(&o, "rope_scaling", tm_config_scaling(m->scaling.kind));
    add_float(&o, "norm_eps", m->norm_eps);
    add_bool(&o, "qkv_bias", m->qkv_bias);
    add_bool(&o, "tied_embedding", m->tied_embed);
    add(&o, "stop_ids", cJSON_CreateIntArray(m->stop, m->n_stop));
    add_str(&o, "chat_template", family_chat_template(m) ? family_chat_template(m) : "");
    x->ok = x->ok && o.ok;
}

/* A directory without a tokenizer that opens is still worth describing: the reason goes in its
 * place. */
static void add_tokenizer(obj *x, const char *dir)
{
    tokenizer *t = NULL;
    err e = {0};
    obj o = child(x, "tokenizer");
    if (tokenizer_open(&t, dir, &e) != OK) {
        add_str(&o, "error", e.msg);
    } else {
        add_num(&o, "vocab", tokenizer_vocab(t));
        add_num(&o, "bos", tokenizer_bos(t));
        add_num(&o, "eos", tokenizer_eos(t));
        add_bool(&o, "adds_bos", tokenizer_add_bos(t));
        add_bool(&o, "chat_template", tokenizer_chat_template(t) != NULL);
        tokenizer_close(&t);
    }
    x->ok = x->ok && o.ok;
}

/* ---- manifest ---- */

static err_code add_manifest(obj *x, const char *path, bool verify, const job *j, err *e)
{
    manifest m;
    if (!manifest_exists(path)) return OK;
    TRY(manifest_read(&m, path, e));
    const err_code rc = verify ? manifest_verify(&m, path, j, e) : OK;
    if (rc == OK) {
        obj o = child(x, "manifest");
        add_str(&o, "tool", m.tool);
        add_str(&o, "parent", m.parent);
        add_str(&o, "options", m.options);
        add_num(&o, "files", (double)m.n);
        add_str(&o, "sha256", m.digest.hex);
        add_bool(&o, "verified", verify);
        x->ok = x->ok && o.ok;
    }
    manifest_free(&m);
    return rc;
}

/* ---- the kinds of path ---- */

static err_code read_source(obj *x, const char *path, err *e)
{
    weight_src *src;
    sizes s = {{0}, 0};

    TRY(weights_open(&src, path, e));
    const err_code rc = size_source(&s, src, e);
    s.parameters = count_parameters(weights_desc(src));
    if (rc == OK) {
        add_str(x, "kind",
                weights_kind(src) == SRC_AWQ  ? "awq"
                : weights_kind(src) == SRC_TM ? "workspace"
                                              : "hf");
        add_str(x, "digest", weights_digest(src));
        add_model(x, weights_desc(src));
        add_sizes(x, &s);
        add_tokenizer(x, weights_tokenizer_dir(src));
    }
    weights_close(&src);
    return rc;
}

/* A workspace split for several devices, which weights_open does not read: config and file list
 * tell. */
static err_code read_split(obj *x, const tm_config *c, const char *path, err *e)
{
    char dir[PATH_CAP];
    sizes s = {{0}, count_parameters(&c->m)};
    tm_file *f;
    size_t n;

    TRY(tm_config_files(&f, &n, c, e));
    for (size_t i = 0; i < n; i++) s.bytes[part_of(f[i].role)] += (double)f[i].bytes;
    mem_free(f);
    TRY(tm_store_tokenizer_dir(dir, sizeof dir, path, e));
    add_str(x, "kind", "workspace");
    add_model(x, &c->m);
    add_sizes(x, &s);
    add_tokenizer(x, dir);
    return OK;
}

static err_code read_workspace(obj *x, const char *path, err *e)
{
    tm_config c;
    TRY(tm_store_config(&c, path, e));
    TRY(c.tp == 1 ? read_source(x, path, e) : read_split(x, &c, path, e));
    obj o = child(x, "workspace");
    add_str(&o, "lmdeploy", c.epoch == TM_C1 ? "v0.6.0 .. v0.6.3" : "v0.6.4 .. v0.7.3");
    add_num(&o, "tp", c.tp);
    add_num(&o, "session_len", c.session_len);
    add_str(&o, "model_name", c.model_name);
    add_str(&o, "chat_template", c.chat_template);
    add_str(&o, "model_format", c.model_format);
    x->ok = x->ok && o.ok;
    return OK;
}

static err_code read_directory(obj *x, const char *path, bool verify, const job *j, err *e)
{
    char probe[PATH_CAP];
    TRY(path_join(probe, sizeof probe, path, "triton_models", e));
    TRY(file_is_dir(probe) ? read_workspace(x, path, e) : read_source(x, path, e));
    return add_manifest(x, path, verify, j, e);
}

/* ---- calib and plan files ---- */

static void add_artifact(obj *x, const st_file *f)
{
    static const char *const keys[] = {"tool",         "layers",       "group",
                                       "method",       "loss",         "options",
                                       "parent.model", "parent.calib", "parent.tokenizer"};
    tensor t;
    double total = 0;
    obj m = child(x, "metadata");
    for (size_t i = 0; i < sizeof keys / sizeof *keys; i++)
        if (st_meta(f, keys[i])) add_str(&m, keys[i], st_meta(f, keys[i]));
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry at = st_at(f, i);
        total += (double)tensor_bytes(&at.view);
    }
    obj b = child(x, "bytes");
    add_num(&b, "total", total);
    add_num(x, "tensors", (double)st_count(f));
    if (st_find(f, "tokens", &t) && t.ndim == 2) {
        add_num(x, "samples", (double)t.shape[0]);
        add_num(x, "seqlen", (double)t.shape[1]);
    }
    x->ok = x->ok && m.ok && b.ok;
}

static err_code read_file(obj *x, const char *path, bool verify, err *e)
{
    st_file *f = NULL;
    hash128 digest;
    err_code rc;

    TRY(st_open(&f, path, e));
    const char *kind = st_meta(f, "kind"), *version = st_meta(f, "version");
    if (!kind || !version || (strcmp(kind, "calib") != 0 && strcmp(kind, "plan") != 0)) {
        rc = err_set(e, E_INPUT, "%s: neither a calib nor a plan file", path);
    } else {
        rc = verify ? artifact_check(f, kind, atoi(version), e) : OK;
        if (rc == OK) rc = artifact_digest(f, &digest, e);
    }
    if (rc == OK) {
        add_str(x, "kind", kind);
        add_str(x, "version", version);
        add_str(x, "digest", digest.hex);
        add_bool(x, "verified", verify);
        add_artifact(x, f);
    }
    st_close(&f);
    return rc;
}

err_code info_read(cJSON **out, const char *path, bool verify, const job *j, err *e)
{
    obj x = {cJSON_CreateObject(), true};
    err_code rc;

    *out = NULL;
    if (!x.o) return err_set(e, E_NOMEM, "out of memory");
    if (file_exists(path) && !file_is_dir(path))
        rc = read_file(&x, path, verify, e);
    else
        rc = read_directory(&x, path, verify, j, e);
    if (rc == OK && !x.ok) rc = err_set(e, E_NOMEM, "out of memory");
    if (rc == OK)
        *out = x.o;
    else
        cJSON_Delete(x.o);
    return rc;
}

/* ---- text ---- */

static err_code append(char **text, size_t *n, size_t *cap, const char *key, const char *value,
                       err *e)
{
    const size_t need = strlen(key) + strlen(value) + 32;
    if (*n + need > *cap) {
        void *p;
        const size_t bigger = 2 * *cap + need;
        TRY(mem_alloc(&p, bigger, 1, "text", e));
        if (*n) memcpy(p, *text, *n);
        mem_free(*text);
        *text = p;
        *cap = bigger;
    }
    *n += (size_t)snprintf(*text + *n, *cap - *n, "%-24s  %s\n", key, value);
    return OK;
}

static err_code text_level(char **text, size_t *n, size_t *cap, const char *prefix, const cJSON *o,
                           err *e)
{
    const cJSON *v;
    char key[128], *value;
    cJSON_ArrayForEach(v, o)
    {
        (void)snprintf(key, sizeof key, "%s%s%s", prefix, *prefix ? "." : "", v->string);
        if (cJSON_IsObject(v)) {
            TRY(text_level(text, n, cap, key, v, e));
        } else if (cJSON_IsString(v)) {
            TRY(append(text, n, cap, key, v->valuestring, e));
        } else {
            TRY(json_print(&value, v, false, e));
            const err_code rc = append(text, n, cap, key, value, e);
            mem_free(value);
            TRY(rc);
        }
    }
    return OK;
}

err_code info_text(char **out, const cJSON *info, err *e)
{
    size_t n = 0, cap = 0;
    *out = NULL;
    const err_code rc = text_level(out, &n, &cap, "", info, e);
    if (rc == OK) return OK;
    mem_free(*out);
    *out = NULL;
    return rc;
}
