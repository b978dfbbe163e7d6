/* Applying a plan: fold factors, give every weight its code, hand it all to the directory writer.
 */
#include "awq/pack.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "awq/fold.h"
#include "awq/rotate.h"
#include "base/half.h"
#include "base/mem.h"
#include "formats/family.h"
#include "formats/manifest.h"
#include "formats/w4_dir.h"
#include "kernels/quant_group.h"

#define TILE_ELEMS ((int64_t)1 << 21)

typedef struct {
    const pack_opts *o;
    device *d;
    const job *j;
    weight_src *base, *src; /* the model; it in the plan's bases */
    rotated *turned;
    const model_desc *m;
    plan_file *plan;
    const plan_info *info;
    hash128 digest; /* of the plan */
    char options[256];
    uint8_t *codes; /* [n,k] of the largest linear; f32 where weights stay dense */
    float *tile;    /* [TILE_ELEMS] or one row */
    float *line;    /* [widest]: a norm or a bias */
    /* of the block at hand */
    int32_t layer;
    block_plan block;
    fold fold;
} pack;

/* ---- inputs ---- */

static err_code open_inputs(pack *p, err *e)
{
    TRY(weights_open(&p->base, p->o->model_dir, e));
    p->m = weights_desc(p->base);
    if (p->m->w4_group)
        return err_set(e, E_UNSUPPORTED, "%s: expected 16-bit weights, found 4-bit ones",
                       p->o->model_dir);
    TRY(plan_open(&p->plan, p->o->plan_path, e));
    p->info = plan_info_of(p->plan);
    TRY(plan_check_model(p->plan, p->m, weights_digest(p->base), e));
    TRY(rotated_by_plan(&p->turned, p->base, p->d, p->plan, e));
    p->src = rotated_src(p->turned);
    p->m = weights_desc(p->src);
    p->digest = plan_digest(p->plan);
    snprintf(p->options, sizeof p->options,
             "{\"method\":\"%.32s\",\"group\":%d,\"clamp\":%s,\"shard_bytes\":%" PRId64 "%s}",
             p->info->method, (int)p->info->group, p->o->clamp_f16 ? "true" : "false",
             p->o->shard_bytes, p->o->dense ? ",\"bits\":16" : "");
    return OK;
}

static void close_all(pack *p)
{
    fold_free(&p->fold);
    mem_free(p->codes);
    mem_free(p->tile);
    mem_free(p->line);
    plan_close(&p->plan);
    rotated_close(&p->turned);
    weights_close(&p->base);
}

static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

static void room(const model_desc *m, int64_t *codes, int64_t *tile, int64_t *line)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(m, roles);
    *codes = 0;
    *tile = TILE_ELEMS;
    *line = m->hidden;
    for (int i = 0; i < n; i++) {
        const int64_t rows = model_linear_n(m, roles[i]), k = model_linear_k(m, roles[i]);
        *codes = most(*codes, rows * k);
        *tile = most(*tile, k);
        *line = most(*line, most(rows, k));
    }
}

static err_code open_room(pack *p, err *e)
{
    int64_t codes, tile, line;
    room(p->m, &codes, &tile, &line);
    TRY(mem_alloc((void **)&p->codes, (size_t)codes, p->o->dense ? sizeof(float) : 1, "codes", e));
    TRY(mem_alloc((void **)&p->tile, (size_t)tile, sizeof(float), "weights", e));
    return mem_alloc((void **)&p->line, (size_t)line, sizeof(float), "norms", e);
}

static uint32_t linear_roles(const model_desc *m)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(m, roles);
    uint32_t mask = 0;
    for (int i = 0; i < n; i++) mask |= 1u << roles[i];
    return mask;
}

static w4_dir_opts dir_opts(const pack *p, const char *const *meta)
{
    return (w4_dir_opts){.group = p->info->group,
                         .dense_roles = p->o->dense ? linear_roles(p->m) : 0,
                         .shard_bytes = p->o->shard_bytes,
                         .clamp_f16 = p->o->clamp_f16,
                         .workers = dev_pool(p->d),
                         .force = true, /* pack_state has refused what is not ours */
                         .meta = meta};
}

err_code pack_memory(memory_plan *plan, device *d, const pack_opts *o, err *e)
{
    pack p = {.o = o, .d = d};
    *plan = (memory_plan){0};
    const err_code rc = open_inputs(&p, e);
    if (rc == OK) {
        const w4_dir_opts w = dir_opts(&p, NULL);
        int64_t codes, tile, line;
        room(p.m, &codes, &tile, &line);
        memory_plan_add(plan, "program", memory_plan_process_bytes());
        memory_plan_add(plan, o->dense ? "a linear" : "codes of a linear",
                        (size_t)codes * (o->dense ? sizeof(float) : 1));
        memory_plan_add(plan, "rows of a linear", (size_t)(tile + line) * sizeof(float));
        memory_plan_add(plan, "directory writer", w4_dir_memory(p.m, &w));
    }
    close_all(&p);
    return rc;
}

/* ---- one block ---- */

static err_code take_block(pack *p, int32_t layer, err *e)
{
    fold_free(&p->fold);
    p->layer = layer;
    TRY(plan_layer(p->plan, layer, &p->block, e));
    TRY(rotated_layer(p->turned, layer, &p->block, e));
    return fold_init(&p->fold, p->m, &p->block, e);
}

#define ITEM_ROWS 32

typedef struct {
    uint8_t *to;
    const uint8_t *packed;
    int64_t n, half; /* rows, bytes of a packed row */
} unpack_job;

static void unpack_rows(void *ctx, int64_t item, int worker)
{
    const unpack_job *j = ctx;
    const int64_t last = (item + 1) * ITEM_ROWS < j->n ? (item + 1) * ITEM_ROWS : j->n;
    (void)worker;
    for (int64_t i = item * ITEM_ROWS * j->half; i < last * j->half; i++) {
        j->to[2 * i] = j->packed[i] & 15;
        j->to[2 * i + 1] = j->packed[i] >> 4;
    }
}

static void fixed_codes(pack *p, const plan_linear *l)
{
    unpack_job j = {p->codes, l->codes.data, l->codes.shape[0], l->codes.shape[1]};
    pool_run(dev_pool(p->d), unpack_rows, &j, (j.n + ITEM_ROWS - 1) / ITEM_ROWS);
}

typedef struct {
    pack *p;
    const tensor *dense;
    tensor_role role;
    int64_t at, n;
    err_code *rc; /* of each item */
    err *e;
} fold_job;

static void fold_item(void *ctx, int64_t item, int worker)
{
    fold_job *j = ctx;
    const int64_t from = item * ITEM_ROWS, left = j->n - from, k = j->dense->shape[1];
    tensor out = {.data = j->p->tile + from * k};
    (void)worker;
    j->rc[item] = fold_rows(&out, j->dense, fold_find(&j->p->fold, j->role), j->at + from,
                            left < ITEM_ROWS ? left : ITEM_ROWS, j->p->layer, j->role, &j->e[item]);
}

/* Rows of a linear with their factors into p->tile, on all threads; the first bad one is told. */
static err_code fold_tile(pack *p, const tensor *dense, tensor_role r, int64_t at, int64_t n,
                          err *e)
{
    const int64_t items = (n + ITEM_ROWS - 1) / ITEM_ROWS;
    void *mem;
    TRY(mem_alloc(&mem, (size_t)items, sizeof(err) + sizeof(err_code), "rows", e));
    err *errs = mem;
    fold_job j = {p, dense, r, at, n, (err_code *)(errs + items), errs};
    pool_run(dev_pool(p->d), fold_item, &j, items);
    err_code rc = OK;
    for (int64_t i = 0; i < items && rc == OK; i++)
        if ((rc = j.rc[i]) != OK) *e = errs[i];
    mem_free(mem);
    return rc;
}

static err_code rounded_codes(pack *p, const plan_linear *l, const tensor *dense, err *e)
{
    const int64_t n = dense->shape[0], k = dense->shape[1], step = most(1, TILE_ELEMS / k);
    for (int64_t at = 0; at < n; at += step) {
        const int64_t rows = n - at < step ? n - at : step;
        const tensor w = tensor_2d(p->tile, DT_F32, rows, k);
        tensor codes = tensor_2d(p->codes + at * k, DT_U8, rows, k);
        const tensor scale = tensor_rows(&l->scale, at, rows),
                     zero = tensor_rows(&l->zero, at, rows);
        TRY(fold_tile(p, dense, l->role, at, rows, e));
        TRY(op_quant_codes(p->d, &codes, &w, &scale, &zero, p->info->group, e));
    }
    return OK;
}

/* The linear as codes; views into p and the plan. */
static err_code pack_linear(pack *p, const plan_linear *l, w4_weight *out, err *e)
{
    linear_view v;
    TRY(weights_linear(p->src, l->role, p->layer, -1, &v, e));
    const int64_t n = v.dense.shape[0], k = v.dense.shape[1];
    if (l->codes.data)
        fixed_codes(p, l);
    else
        TRY(rounded_codes(p, l, &v.dense, e));
    w4_shape(out, k, n, p->info->group, W4_CODES);
    out->q.data = p->codes;
    out->scales.data = l->scale.data;
    out->zeros.data = l->zero.data;
    out->bias = (tensor){0};
    if (!v.bias.data) return OK;
    TRY(fold_bias(p->line, &v.bias, fold_find(&p->fold, l->role), p->layer, l->role, e));
    out->bias = tensor_1d(p->line, DT_F32, n);
    return OK;
}

static err_code pack_norm(pack *p, tensor_role r, tensor *out, err *e)
{
    tensor view;
    TRY(weights_tensor(p->src, r, p->layer, &view, e));
    const float *div = r == ROLE_ATTN_NORM  ? p->fold.norm[0]
                       : r == ROLE_FFN_NORM ? p->fold.norm[1]
                                            : NULL;
    TRY(fold_norm(p->line, &view, div, p->layer, r, e));
    *out = tensor_1d(p->line, DT_F32, view.shape[0]);
    return OK;
}

static int block_norms(const model_desc *m, tensor_role out[4])
{
    int n = 0;
    out[n++] = ROLE_ATTN_NORM;
    out[n++] = ROLE_FFN_NORM;
    if (m->qk_norm) {
        out[n++] = ROLE_Q_NORM;
        out[n++] = ROLE_K_NORM;
    }
    return n;
}

static err_code write_dense(pack *p, w4_dir_writer *w, tensor_role r, err *e)
{
    const fold_linear *f = fold_find(&p->fold, r);
    tensor rows = {.data = p->codes}, bias;
    linear_view v;
    TRY(weights_linear(p->src, r, p->layer, -1, &v, e));
    TRY(fold_rows(&rows, &v.dense, f, 0, v.dense.shape[0], p->layer, r, e));
    if (v.bias.data) TRY(fold_bias(p->line, &v.bias, f, p->layer, r, e));
    bias = tensor_1d(p->line, DT_F32, v.dense.shape[0]);
    return w4_dir_dense(w, r, p->layer, -1, &rows, v.bias.data ? &bias : NULL, e);
}

static err_code write_block(pack *p, w4_dir_writer *w, err *e)
{
    tensor_role norms[4];
    const int n = block_norms(p->m, norms);
    for (int i = 0; i < n; i++) {
        tensor t;
        TRY(pack_norm(p, norms[i], &t, e));
        TRY(w4_dir_tensor(w, norms[i], p->layer, &t, e));
    }
    for (int i = 0; i < p->block.n_linears; i++) {
        w4_weight q = {0};
        if (p->o->dense) {
            TRY(write_dense(p, w, p->block.linear[i].role, e));
            continue;
        }
        TRY(pack_linear(p, &p->block.linear[i], &q, e));
        TRY(w4_dir_linear(w, p->block.linear[i].role, p->layer, -1, &q, e));
    }
    return OK;
}

/* ---- the directory ---- */

static int model_tensors(const model_desc *m, tensor_role out[3])
{
    out[0] = ROLE_EMBED;
    out[1] = ROLE_FINAL_NORM;
    out[2] = ROLE_HEAD;
    return m->tied_embed ? 2 : 3;
}

static err_code write_all(pack *p, w4_dir_writer *w, err *e)
{
    tensor_role roles[3];
    const int n = model_tensors(p->m, roles);
    for (int i = 0; i < n; i++) {
        tensor t;
        TRY(weights_tensor(p->src, roles[i], -1, &t, e));
        TRY(w4_dir_tensor(w, roles[i], -1, &t, e));
    }
    for (int32_t l = 0; l < p->m->layers; l++) {
        TRY(job_check(p->j, e));
        weights_prefetch(p->src, l);
        TRY(take_block(p, l, e));
        TRY(write_block(p, w, e));
        weights_release(p->src, l);
        job_step(p->j, "pack", "layer", l + 1, p->m->layers);
    }
    return OK;
}

/* What lies at out_dir: nothing or a directory of ours may be replaced; one made from this plan is
 * done. */
static err_code look_at_target(const pack *p, bool *fresh, err *e)
{
    manifest found = {0};
    err ignored = {0};
    *fresh = false;
    if (p->o->force || !file_exists(p->o->out_dir)) return OK;
    const bool ours = manifest_exists(p->o->out_dir) &&
                      manifest_read(&found, p->o->out_dir, &ignored) == OK &&
                      strcmp(found.kind, MANIFEST_KIND_AWQ) == 0;
    if (ours)
        *fresh = strcmp(found.parent, p->digest.hex) == 0 &&
                 strcmp(found.options, p->options) == 0 &&
                 manifest_verify(&found, p->o->out_dir, p->j, &ignored) == OK;
    manifest_free(&found);
    if (ours) return OK;
    return err_set(e, E_USAGE,
                   "output '%s' exists and is no AWQ directory of ours, use --force to replace it",
                   p->o->out_dir);
}

static err_code write_dir(pack *p, err *e)
{
    const char *const meta[] = {
        "parent", p->digest.hex,   "parent.model", p->info->model, "parent.calib", p->info->calib,
        "method", p->info->method, "options",      p->options,     "loss",         p->info->loss,
        NULL};
    const w4_dir_opts opts = dir_opts(p, meta);
    w4_dir_writer *w = NULL;
    err_code rc;
    TRY(w4_dir_open(&w, p->o->out_dir, p->src, &opts, p->j, e));
    if ((rc = write_all(p, w, e)) == OK) return w4_dir_commit(&w, e);
    w4_dir_abort(&w);
    return rc;
}

err_code pack_run(pack_summary *out, device *d, const pack_opts *o, const job *j, err *e)
{
    pack p = {.o = o, .d = d, .j = j};
    *out = (pack_summary){0};
    err_code rc = open_inputs(&p, e);
    if (rc != OK) goto done;
    const w4_dir_opts sizes = dir_opts(&p, NULL);
    out->group = p.info->group;
    if ((rc = w4_dir_bytes(&out->bytes, &out->tensors, p.m, &sizes, e)) != OK) goto done;
    if ((rc = look_at_target(&p, &out->fresh, e)) != OK || out->fresh) goto done;
    if ((rc = open_room(&p, e)) != OK) goto done;
    rc = write_dir(&p, e);
done:
    close_all(&p);
    return rc;
}

/* ---- comparing one tensor ---- */

/* Bytes of `made` against those of the directory, whose view must have the same type and shape. */
static err_code same_bytes(const char *name, const tensor *made, const tensor *found, err *e)
{
    const uint8_t *a = made->data, *b = found->data;
    const size_t n = tensor_bytes(made), size = dtype_bytes(made->dt);
    TRY(tensor_expect(found, name, made->dt, made->ndim, made->shape, e));
    for (size_t i = 0; i < n; i++)
        if (a[i] != b[i])
            return err_set(e, E_CHECK, "%s: element %zu: byte %zu: expected %02x, found %02x", name,
                           i / size, i % size, a[i], b[i]);
    return OK;
}

static err_code compare_floats(pack *p, const char *name, const tensor *made, const tensor *found,
                               err *e)
{
    tensor half = *made;
    err_code rc = mem_alloc(&half.data, (size_t)tensor_count(made), sizeof(f16),
                            "values to compare", e);
    half.dt = DT_F16;
    if (rc == OK) {
        const int64_t beyond = tensor_convert(&half, made);
        f16 *h = half.data;
        for (int64_t i = 0; beyond && p->o->clamp_f16 && i < tensor_count(made); i++)
            if ((h[i] & 0x7fff) == 0x7c00) h[i]--; /* infinity to +-65504 */
        rc = same_bytes(name, &half, found, e);
    }
    mem_free(half.data);
    return rc;
}

static err_code compare_linear(pack *p, weight_src *dir, tensor_role r, const char *base,
                               const char *suffix, err *e)
{
    w4_weight codes = {0}, made;
    linear_view v;
    size_t q, s, z;
    char name[320];
    void *mem = NULL;
    err_code rc;
    TRY(weights_linear(dir, r, p->layer, -1, &v, e));
    if (!v.w4) return err_set(e, E_CHECK, "%s: expected 4-bit codes, found 16-bit weights", base);
    TRY(pack_linear(p, plan_find_linear(&p->block, r), &codes, e));
    w4_shape(&made, codes.k, codes.n, codes.group, W4_AWQ);
    made.bias = (tensor){0};
    TRY(w4_sizes(&q, &s, &z, codes.k, codes.n, codes.group, W4_AWQ, e));
    TRY(mem_alloc(&mem, q + s + z, 1, "linear to compare", e));
    made.q.data = mem;
    made.scales.data = (uint8_t *)mem + q;
    made.zeros.data = (uint8_t *)mem + q + s;
    rc = w4_repack(&made, &codes, e);
    const struct {
        const char *suffix;
        const tensor *a, *b;
    } parts[] = {{".qweight", &made.q, &v.q.q},
                 {".qzeros", &made.zeros, &v.q.zeros},
                 {".scales", &made.scales, &v.q.scales}};
    for (int i = 0; i < 3 && rc == OK; i++) {
        if (*suffix && strcmp(suffix, parts[i].suffix) != 0) continue;
        snprintf(name, sizeof name, "%s%s", base, parts[i].suffix);
        rc = same_bytes(name, parts[i].a, parts[i].b, e);
    }
    if (rc == OK && codes.bias.data && (!*suffix || strcmp(suffix, ".bias") == 0)) {
        snprintf(name, sizeof name, "%s.bias", base);
        rc = compare_floats(p, name, &codes.bias, &v.bias, e);
    }
    mem_free(mem);
    return rc;
}

/* `name` is `base`, or `base` with one of the suffixes. */
static bool name_matches(const char *name, const char *base, const char *const *suffixes,
                         const char **suffix)
{
    const size_t n = strlen(base);
    if (strncmp(name, base, n) != 0) return false;
    *suffix = name + n;
    if (!**suffix) return true;
    for (; *suffixes; suffixes++)
        if (strcmp(*suffix, *suffixes) == 0) return true;
    return false;
}

static err_code role_matches(const pack *p, const char *name, tensor_role r, int32_t layer,
                             bool linear, char *base, size_t cap, const char **suffix, bool *hit,
                             err *e)
{
    static const char *const of_linear[] = {".qweight", ".qzeros", ".scales", ".bias", NULL};
    static const char *const of_tensor[] = {".weight", NULL};
    const family *f = family_by_name(p->m->family);
    TRY(f->tensor_name(p->m, r, layer, -1, base, cap, e));
    *hit = name_matches(name, base, linear ? of_linear : of_tensor, suffix);
    return OK;
}

static err_code compare_in_layer(pack *p, weight_src *dir, const char *name, int32_t layer,
                                 bool *found, err *e)
{
    tensor_role roles[PLAN_LINEARS], norms[4];
    const int n = model_block_linears(p->m, roles), n_norms = block_norms(p->m, norms);
    char base[256];
    const char *suffix;
    tensor made, view;
    for (int i = 0; i < n && !*found; i++) {
        TRY(role_matches(p, name, roles[i], layer, true, base, sizeof base, &suffix, found, e));
        if (!*found) continue;
        TRY(take_block(p, layer, e));
        TRY(compare_linear(p, dir, roles[i], base, suffix, e));
    }
    for (int i = 0; i < n_norms && !*found; i++) {
        TRY(role_matches(p, name, norms[i], layer, false, base, sizeof base, &suffix, found, e));
        if (!*found) continue;
        TRY(take_block(p, layer, e));
        TRY(pack_norm(p, norms[i], &made, e));
        TRY(weights_tensor(dir, norms[i], layer, &view, e));
        TRY(compare_floats(p, name, &made, &view, e));
    }
    return OK;
}

static err_code compare_model(pack *p, weight_src *dir, const char *name, bool *found, err *e)
{
    tensor_role roles[3];
    const int n = model_tensors(p->m, roles);
    char base[256];
    const char *suffix;
    tensor made, view;
    for (int i = 0; i < n && !*found; i++) {
        TRY(role_matches(p, name, roles[i], -1, false, base, sizeof base, &suffix, found, e));
        if (!*found) continue;
        TRY(weights_tensor(p->src, roles[i], -1, &made, e));
        TRY(weights_tensor(dir, roles[i], -1, &view, e));
        TRY(compare_floats(p, name, &made, &view, e));
    }
    return OK;
}

err_code pack_compare(device *d, const pack_opts *o, const char *tensor_name, err *e)
{
    pack p = {.o = o, .d = d};
    weight_src *dir = NULL;
    bool found = false;
    err_code rc = open_inputs(&p, e);
    if (rc != OK) goto done;
    if ((rc = open_room(&p, e)) != OK) goto done;
    if ((rc = weights_open(&dir, o->out_dir, e)) != OK) goto done;
    rc = compare_model(&p, dir, tensor_name, &found, e);
    for (int32_t l = 0; l < p.m->layers && rc == OK && !found; l++)
        rc = compare_in_layer(&p, dir, tensor_name, l, &found, e);
    if (rc == OK && !found) rc = err_set(e, E_USAGE, "%s: no tensor '%s'", o->out_dir, tensor_name);
done:
    weights_close(&dir);
    close_all(&p);
    return rc;
}
