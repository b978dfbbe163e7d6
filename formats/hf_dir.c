/* The weight source over a directory's shards. */
#include "formats/hf_dir.h"

#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "formats/hf_config.h"
#include "formats/hf_shards.h"
#include "formats/manifest.h"
#include "formats/st_header.h"

typedef struct {
    char *name;
    tensor view;
} hf_own; /* a converted or realigned tensor */

typedef struct {
    hf_shards *shards;
    char *dir;
    model_desc m;
    hf_quant quant;
    const family *fam;
    hf_own *own;
    size_t n_own, cap_own;
} hf_dir;

enum { HF_NAME = 256, HF_WHAT = 4096 + HF_NAME };

/* ---- views ---- */
static err_code hf_name(const hf_dir *h, tensor_role r, int32_t layer, int32_t expert,
                        const char *suffix, char *buf, err *e)
{
    char name[HF_NAME - 16];
    TRY(h->fam->tensor_name(&h->m, r, layer, expert, name, sizeof name, e));
    (void)snprintf(buf, HF_NAME, "%s%s", name, suffix);
    return OK;
}

static bool hf_there(const hf_dir *h, tensor_role r, int32_t layer, int32_t expert,
                     const char *suffix)
{
    char name[HF_NAME];
    tensor view;
    err ignored;
    return hf_name(h, r, layer, expert, suffix, name, &ignored) == OK &&
           hf_shards_find(h->shards, name, &view, NULL);
}

/* The view as stored; what gets "dir/file: tensor 'name'" for messages. */
static err_code hf_find(const hf_dir *h, const char *name, tensor *view, char what[HF_WHAT], err *e)
{
    const char *file;
    if (!hf_shards_find(h->shards, name, view, &file))
        return err_set(e, E_INPUT, "'%s': tensor '%s' is missing", h->dir, name);
    (void)snprintf(what, HF_WHAT, "%s/%s: tensor '%s'", h->dir, file, name);
    return OK;
}

static err_code expect_float(const tensor *t, const char *what, int ndim, const int64_t *shape,
                             err *e)
{
    char got[128];
    if (t->dt == DT_F16 || t->dt == DT_BF16 || t->dt == DT_F32)
        return tensor_expect(t, what, t->dt, ndim, shape, e);
    tensor_describe(got, sizeof got, t);
    return err_set(e, E_SHAPE, "%s: expected F16, BF16 or F32, got %s", what, got);
}

static err_code get_float(const hf_dir *h, const char *name, int ndim, const int64_t *shape,
                          tensor *view, err *e)
{
    char what[HF_WHAT];
    TRY(hf_find(h, name, view, what, e));
    return expect_float(view, what, ndim, shape, e);
}

/* ---- own memory ---- */
static hf_own *own_find(const hf_dir *h, const char *name)
{
    for (size_t i = 0; i < h->n_own; i++)
        if (strcmp(h->own[i].name, name) == 0) return &h->own[i];
    return NULL;
}

static err_code own_room(hf_dir *h, err *e)
{
    void *bigger;
    const size_t want = h->cap_own ? h->cap_own * 2 : 32;
    if (h->n_own < h->cap_own) return OK;
    TRY(mem_alloc(&bigger, want, sizeof *h->own, h->dir, e));
    if (h->n_own) memcpy(bigger, h->own, h->n_own * sizeof *h->own);
    mem_free(h->own);
    h->own = bigger;
    h->cap_own = want;
    return OK;
}

/* An aligned copy of *view as dt. Conversion reads the copy in place of the file's unaligned data.
 * */
static err_code own_make(hf_dir *h, const char *name, tensor *view, dtype dt, err *e)
{
    void *raw = NULL, *cast = NULL;
    err_code rc;
    TRY(own_room(h, e));
    if ((rc = mem_alloc(&raw, tensor_bytes(view), 1, name, e)) != OK) return rc;
    if (raw) memcpy(raw, view->data, tensor_bytes(view));
    tensor copy = tensor_of(raw, view->dt, view->ndim, view->shape);
    if (dt != view->dt) {
        if ((rc = mem_alloc(&cast, (size_t)tensor_count(view), dtype_bytes(dt), name, e)) != OK)
            goto done;
        const tensor from = copy;
        copy = tensor_of(cast, dt, view->ndim, view->shape);
        const int64_t lost = tensor_convert(&copy, &from);
        if (lost) {
            rc = err_set(e, E_INPUT, "'%s': tensor '%s': %lld values of %s do not fit %s", h->dir,
                         name, (long long)lost, dtype_name(view->dt), dtype_name(dt));
            goto done;
        }
        mem_free(raw);
        raw = cast;
        cast = NULL;
    }
    if ((rc = mem_strdup(&h->own[h->n_own].name, name, e)) != OK) goto done;
    h->own[h->n_own++].view = copy;
    *view = copy;
    raw = NULL;
done:
    mem_free(cast);
    mem_free(raw);
    return rc;
}

/* Makes *view readable as dt, DT_NONE: as it is. */
static err_code own_take(hf_dir *h, const char *name, tensor *view, dtype dt, err *e)
{
    if (dt == DT_NONE) dt = view->dt;
    if (st_aligned(view) && view->dt == dt) return OK;
    const hf_own *o = own_find(h, name);
    if (!o) return own_make(h, name, view, dt, e);
    *view = o->view;
    return OK;
}

/* ---- tensors of a role, as stored and checked ---- */
static err_code stored_tensor(const hf_dir *h, tensor_role r, int32_t layer, char name[HF_NAME],
                              tensor *view, err *e)
{
    int64_t shape[2] = {h->m.hidden, h->m.hidden};
    if (r == ROLE_HEAD && h->m.tied_embed) r = ROLE_EMBED;
    if (r == ROLE_EMBED || r == ROLE_HEAD) shape[0] = h->m.vocab;
    if (r == ROLE_Q_NORM || r == ROLE_K_NORM) shape[0] = h->m.head_dim;
    TRY(hf_name(h, r, layer, -1, ".weight", name, e));
    return get_float(h, name, r == ROLE_EMBED || r == ROLE_HEAD ? 2 : 1, shape, view, e);
}

static bool wants_bias(const model_desc *m, tensor_role r)
{
    if (r == ROLE_O) return m->o_bias;
    return m->qkv_bias && (r == ROLE_QKV || r == ROLE_Q || r == ROLE_K || r == ROLE_V);
}

static err_code stored_bias(const hf_dir *h, tensor_role r, int32_t layer, int32_t expert,
                            char name[HF_NAME], tensor *view, err *e)
{
    const int64_t n = model_linear_n(&h->m, r);
    *view = (tensor){0};
    TRY(hf_name(h, r, layer, expert, ".bias", name, e));
    if (wants_bias(&h->m, r)) return get_float(h, name, 1, &n, view, e);
    if (hf_there(h, r, layer, expert, ".bias"))
        return err_set(e, E_INPUT,
                       "'%s': tensor '%s' is there, but config.json says there is no bias", h->dir,
                       name);
    return OK;
}

typedef enum { PART_QWEIGHT, PART_QZEROS, PART_SCALES } w4_part;
static const char *const part_suffix[] = {".qweight", ".qzeros", ".scales"};

static err_code stored_part(const hf_dir *h, tensor_role r, int32_t layer, int32_t expert,
                            w4_part p, char name[HF_NAME], tensor *view, err *e)
{
    char what[HF_WHAT];
    const int64_t n = model_linear_n(&h->m, r), k = model_linear_k(&h->m, r), g = h->quant.group;
    const int64_t shape[2] = {p == PART_QWEIGHT ? k : k / g, p == PART_SCALES ? n : n / 8};
    TRY(hf_name(h, r, layer, expert, part_suffix[p], name, e));
    TRY(hf_find(h, name, view, what, e));
    return p == PART_SCALES ? expect_float(view, what, 2, shape, e)
                            : tensor_expect(view, what, DT_I32, 2, shape, e);
}

/* Which of the two kinds a linear is; contradictions are errors. */
static err_code linear_is_w4(const hf_dir *h, tensor_role r, int32_t layer, int32_t expert,
                             bool *w4, err *e)
{
    char name[HF_NAME];
    const bool dense = hf_there(h, r, layer, expert, ".weight");
    const int64_t n = model_linear_n(&h->m, r), k = model_linear_k(&h->m, r);
    *w4 = hf_there(h, r, layer, expert, ".qweight");
    TRY(hf_name(h, r, layer, expert, "", name, e));
    if (!*w4) return OK;
    if (dense)
        return err_set(e, E_INPUT, "'%s': tensor '%s' is there as weight and as qweight", h->dir,
                       name);
    if (hf_there(h, r, layer, expert, ".g_idx"))
        return err_set(e, E_UNSUPPORTED,
                       "'%s': tensor '%s.g_idx' belongs to GPTQ, which is not supported", h->dir,
                       name);
    if (!h->quant.awq)
        return err_set(
            e, E_INPUT,
            "'%s': tensor '%s.qweight' is there, but config.json has no quantization_config",
            h->dir, name);
    if (k % h->quant.group || n % 8)
        return err_set(
            e, E_SHAPE,
            "'%s': tensor '%s.qweight': %lld inputs and %lld outputs do not suit groups of %d",
            h->dir, name, (long long)k, (long long)n, h->quant.group);
    return OK;
}

/* ---- the interface ---- */
static err_code hf_tensor(void *self, tensor_role r, int32_t layer, tensor *view, err *e)
{
    hf_dir *h = self;
    char name[HF_NAME];
    TRY(stored_tensor(h, r, layer, name, view, e));
    return own_take(h, name, view, DT_NONE, e);
}

static err_code linear_w4(hf_dir *h, tensor_role r, int32_t layer, int32_t expert, w4_weight *q,
                          err *e)
{
    char name[HF_NAME];
    tensor *const part[] = {&q->q, &q->zeros, &q->scales};
    *q = (w4_weight){.k = model_linear_k(&h->m, r),
                     .n = model_linear_n(&h->m, r),
                     .group = h->quant.group,
                     .layout = W4_AWQ};
    for (w4_part p = PART_QWEIGHT; p <= PART_SCALES; p++) {
        TRY(stored_part(h, r, layer, expert, p, name, part[p], e));
        TRY(own_take(h, name, part[p], p == PART_SCALES ? DT_F16 : DT_NONE, e));
    }
    return OK;
}

static err_code hf_linear(void *self, tensor_role r, int32_t layer, int32_t expert, linear_view *v,
                          err *e)
{
    hf_dir *h = self;
    char name[HF_NAME];
    *v = (linear_view){0};
    TRY(linear_is_w4(h, r, layer, expert, &v->w4, e));
    TRY(stored_bias(h, r, layer, expert, name, &v->bias, e));
    if (v->bias.data) TRY(own_take(h, name, &v->bias, DT_NONE, e));
    if (v->w4) {
        TRY(linear_w4(h, r, layer, expert, &v->q, e));
        v->q.bias = v->bias;
        return OK;
    }
    const int64_t shape[2] = {model_linear_n(&h->m, r), model_linear_k(&h->m, r)};
    TRY(hf_name(h, r, layer, expert, ".weight", name, e));
    TRY(get_float(h, name, 2, shape, &v->dense, e));
    return own_take(h, name, &v->dense, DT_NONE, e);
}

static bool hf_has(void *self, tensor_role r, int32_t layer, int32_t expert)
{
    const hf_dir *h = self;
    if (r == ROLE_HEAD && h->m.tied_embed) r = ROLE_EMBED;
    return hf_there(h, r, layer, expert, ".weight") || hf_there(h, r, layer, expert, ".qweight");
}

static void hf_advise(void *self, int32_t layer, bool need)
{
    static const char *const suffixes[] = {".weight", ".bias", ".qweight", ".qzeros", ".scales"};
    const hf_dir *h = self;
    char name[HF_NAME];
    err ignored;
    for (int r = 0; r < ROLE_COUNT; r++)
        for (int i = 0; i < 5; i++)
            if (hf_name(h, (tensor_role)r, layer, -1, suffixes[i], name, &ignored) == OK)
                hf_shards_advise(h->shards, name, need);
}

static void hf_close(void *self)
{
    hf_dir *h = self;
    if (!h) return;
    for (size_t i = 0; i < h->n_own; i++) {
        mem_free(h->own[i].view.data);
        mem_free(h->own[i].name);
    }
    mem_free(h->own);
    hf_shards_close(&h->shards);
    mem_free(h->dir);
    mem_free(h);
}

/* ---- checks at open ---- */
/* Writers of symmetric checkpoints either store all zeros as 8 or leave the words 0, which nobody
 * can tell from asymmetric ones: the second kind is refused. */
static err_code check_zeros(const hf_dir *h, const tensor *zeros, const char *name, err *e)
{
    const uint8_t *p = zeros->data;
    const size_t n = tensor_bytes(zeros);
    for (size_t i = 0; i < n; i++)
        if (p[i]) return OK;
    return err_set(e, E_UNSUPPORTED, "'%s': zero_point is false and '%s' holds nothing", h->dir,
                   name);
}

static err_code check_linear(const hf_dir *h, tensor_role r, int32_t layer, int *n_w4, err *e)
{
    char name[HF_NAME];
    tensor view;
    bool w4;
    TRY(linear_is_w4(h, r, layer, -1, &w4, e));
    TRY(stored_bias(h, r, layer, -1, name, &view, e));
    if (!w4) {
        const int64_t shape[2] = {model_linear_n(&h->m, r), model_linear_k(&h->m, r)};
        TRY(hf_name(h, r, layer, -1, ".weight", name, e));
        return get_float(h, name, 2, shape, &view, e);
    }
    for (w4_part p = PART_QWEIGHT; p <= PART_SCALES; p++) {
        TRY(stored_part(h, r, layer, -1, p, name, &view, e));
        if (p == PART_QZEROS && *n_w4 == 0 && !h->quant.zero_point)
            TRY(check_zeros(h, &view, name, e));
    }
    (*n_w4)++;
    return OK;
}

static err_code check_all(hf_dir *h, err *e)
{
    tensor_role linears[7];
    const int n = model_block_linears(&h->m, linears);
    char name[HF_NAME];
    tensor view;
    int n_w4 = 0;
    TRY(stored_tensor(h, ROLE_FINAL_NORM, -1, name, &view, e));
    TRY(stored_tensor(h, ROLE_HEAD, -1, name, &view, e));
    TRY(stored_tensor(h, ROLE_EMBED, -1, name, &view, e));
    h->m.dt = view.dt; /* what is stored, whatever config.json claims */
    for (int32_t layer = 0; layer < h->m.layers; layer++) {
        TRY(stored_tensor(h, ROLE_ATTN_NORM, layer, name, &view, e));
        TRY(stored_tensor(h, ROLE_FFN_NORM, layer, name, &view, e));
        for (int i = 0; i < n; i++) TRY(check_linear(h, linears[i], layer, &n_w4, e));
    }
    if (h->quant.awq && n_w4 == 0)
        return err_set(e, E_INPUT, "'%s': config.json says awq, but no linear has a qweight",
                       h->dir);
    /* One layer more than config.json says: the config belongs to another model. */
    h->m.layers++;
    const bool more = hf_there(h, ROLE_ATTN_NORM, h->m.layers - 1, -1, ".weight");
    h->m.layers--;
    if (more)
        return err_set(e, E_INPUT, "'%s': config.json says %d layers, the files have more", h->dir,
                       h->m.layers);
    return OK;
}

/* An AWQ directory of ours names itself by its manifest, unless a file was changed since. */
static bool manifest_digest(const char *dir, hash256 *out)
{
    manifest m = {0};
    err ignored;
    const bool good = manifest_exists(dir) && manifest_read(&m, dir, &ignored) == OK &&
                      strcmp(m.kind, MANIFEST_KIND_AWQ) == 0 &&
                      manifest_check_sizes(&m, dir, &ignored) == OK;
    if (good) *out = m.digest;
    manifest_free(&m);
    return good;
}

static err_code hf_digest(const hf_dir *h, hash256 *out, err *e)
{
    char path[4096], *text;
    size_t n;
    if (h->quant.awq && manifest_digest(h->dir, out)) return OK;
    TRY(path_join(path, sizeof path, h->dir, "config.json", e));
    TRY(file_read(&text, &n, path, HF_MAX_CONFIG, e));
    const err_code rc = hf_shards_digest(h->shards, text, n, out, e);
    mem_free(text);
    return rc;
}

err_code hf_open(weight_src **out, const char *path, err *e)
{
    static const weight_ops ops = {hf_close, hf_tensor, hf_linear, hf_has, hf_advise};
    hf_dir *h;
    hash256 digest;
    err_code rc;
    *out = NULL;
    TRY(mem_alloc((void **)&h, 1, sizeof *h, path, e));
    if ((rc = mem_strdup(&h->dir, path, e)) != OK) goto done;
    if ((rc = hf_config_load(&h->m, &h->quant, &h->fam, path, e)) != OK) goto done;
    if ((rc = hf_shards_open(&h->shards, path, e)) != OK) goto done;
    if ((rc = check_all(h, e)) != OK) goto done;
    if ((rc = hf_digest(h, &digest, e)) != OK) goto done;
    rc = weights_make(out, h->quant.awq ? SRC_AWQ : SRC_HF, &h->m, path, path, digest.hex, &ops, h,
                      e);
    if (rc == OK) h = NULL;
done:
    hf_close(h);
    return rc;
}
