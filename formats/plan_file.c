/* Reader and writer of the plan artifact. */
#include "formats/plan_file.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "base/mem.h"

#define MAX_LAYERS 4096
#define MAX_DIM    ((int64_t)1 << 24)
#define ROTATION   "rotation."

struct plan_file {
    st_file *st;
    plan_info info;
    hash128 digest;
    int rotations;
};

static const tensor_role fold_sources[PLAN_FOLDS] = {ROLE_ATTN_NORM, ROLE_FFN_NORM, ROLE_UP, ROLE_V,
                                                     ROLE_K};

static int64_t fold_width(const model_desc *m, tensor_role source)
{
    if (source == ROLE_UP) return m->ffn;
    if (source == ROLE_V || source == ROLE_K) return (int64_t)m->kv_heads * m->head_dim;
    return m->hidden;
}

block_plan plan_shape(const model_desc *m, int32_t group)
{
    block_plan b = {0};
    tensor_role roles[PLAN_LINEARS];
    b.n_linears = model_block_linears(m, roles);
    for (int i = 0; i < PLAN_FOLDS; i++)
        b.fold[i] = (plan_fold){fold_sources[i],
                                tensor_1d(NULL, DT_F32, fold_width(m, fold_sources[i]))};
    for (int i = 0; i < b.n_linears; i++) {
        const int64_t n = model_linear_n(m, roles[i]), k = model_linear_k(m, roles[i]);
        b.linear[i].role = roles[i];
        b.linear[i].scale = tensor_2d(NULL, DT_F16, n, k / group);
        b.linear[i].zero = tensor_2d(NULL, DT_U8, n, k / group);
        b.linear[i].codes = tensor_2d(NULL, DT_U8, n, k / 2);
    }
    b.turn_k = tensor_2d(NULL, DT_F32, m->kv_heads, m->rope_dims / 2);
    b.turn_v = tensor_2d(NULL, DT_F32, (int64_t)m->kv_heads * m->head_dim, m->head_dim);
    return b;
}

plan_fold *plan_find_fold(block_plan *b, tensor_role source)
{
    for (int i = 0; i < PLAN_FOLDS; i++)
        if (b->fold[i].source == source) return &b->fold[i];
    return NULL;
}

plan_linear *plan_find_linear(block_plan *b, tensor_role r)
{
    for (int i = 0; i < b->n_linears; i++)
        if (b->linear[i].role == r) return &b->linear[i];
    return NULL;
}

static void part_name(char buf[ARTIFACT_NAME_MAX], int32_t layer, const char *what,
                      const char *part)
{
    snprintf(buf, ARTIFACT_NAME_MAX, "layers.%d.%s.%s", (int)layer, what, part);
}

/* ---- reading ---- */

/* n of a linear may be anything; its scale says which, and zero, codes and loss must agree. */
static err_code get_linear(const plan_file *f, int32_t layer, plan_linear *l, err *e)
{
    char name[ARTIFACT_NAME_MAX];
    tensor loss;
    const char *what = role_name(l->role);
    part_name(name, layer, what, "scale");
    TRY(artifact_get(f->st, name, DT_F16, 2, (const int64_t[]){-1, -1}, &l->scale, e));
    const int64_t n = l->scale.shape[0], groups = l->scale.shape[1];
    if (n < 1 || groups < 1 || n > MAX_DIM || groups > MAX_DIM)
        return err_set(e, E_INPUT,
                       "%s: tensor '%s': expected 1 to %" PRId64 " rows and groups, found [%" PRId64
                       ",%" PRId64 "]",
                       st_path(f->st), name, MAX_DIM, n, groups);
    part_name(name, layer, what, "zero");
    TRY(artifact_get(f->st, name, DT_U8, 2, l->scale.shape, &l->zero, e));
    part_name(name, layer, what, "codes");
    l->codes = (tensor){0};
    if (st_find(f->st, name, &l->codes))
        TRY(artifact_get(f->st, name, DT_U8, 2, (const int64_t[]){n, groups * f->info.group / 2},
                         &l->codes, e));
    part_name(name, layer, what, "loss");
    TRY(artifact_get(f->st, name, DT_F64, 1, (const int64_t[]){2}, &loss, e));
    memcpy(&l->loss_before, loss.data, sizeof(double));
    memcpy(&l->loss_after, (const uint8_t *)loss.data + sizeof(double), sizeof(double));
    return OK;
}

static err_code get_turns(const plan_file *f, int32_t layer, block_plan *b, err *e)
{
    char name[ARTIFACT_NAME_MAX];
    tensor found;
    part_name(name, layer, "turn", "k");
    if (st_find(f->st, name, &found))
        TRY(artifact_get(f->st, name, DT_F32, 2, (const int64_t[]){-1, -1}, &b->turn_k, e));
    part_name(name, layer, "turn", "v");
    if (st_find(f->st, name, &found))
        TRY(artifact_get(f->st, name, DT_F32, 2, (const int64_t[]){-1, -1}, &b->turn_v, e));
    return OK;
}

static err_code get_layer(const plan_file *f, int32_t layer, block_plan *b, err *e)
{
    static const tensor_role all[] = {ROLE_QKV, ROLE_Q,    ROLE_K,  ROLE_V,
                                      ROLE_O,   ROLE_GATE, ROLE_UP, ROLE_DOWN};
    char name[ARTIFACT_NAME_MAX];
    tensor found;
    *b = (block_plan){0};
    for (int i = 0; i < PLAN_FOLDS; i++) {
        plan_fold *d = &b->fold[i];
        char what[32];
        d->source = fold_sources[i];
        snprintf(what, sizeof what, "fold.%s", role_name(d->source));
        snprintf(name, sizeof name, "layers.%d.%s", (int)layer, what);
        if (st_find(f->st, name, &found))
            TRY(artifact_get(f->st, name, DT_F32, 1, (const int64_t[]){-1}, &d->s, e));
    }
    TRY(get_turns(f, layer, b, e));
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        part_name(name, layer, role_name(all[i]), "scale");
        if (!st_find(f->st, name, &found)) continue;
        if (b->n_linears == PLAN_LINEARS)
            return err_set(e, E_INPUT, "%s: layer %d: expected up to %d linears, found more",
                           st_path(f->st), (int)layer, PLAN_LINEARS);
        b->linear[b->n_linears].role = all[i];
        TRY(get_linear(f, layer, &b->linear[b->n_linears++], e));
    }
    if (!b->n_linears)
        return err_set(e, E_INPUT, "%s: layer %d: expected at least one linear, found none",
                       st_path(f->st), (int)layer);
    return OK;
}

static err_code check_fold(const plan_file *f, int32_t layer, const plan_fold *d, err *e)
{
    const float *s = d->s.data;
    for (int64_t i = 0; s && i < d->s.shape[0]; i++)
        if (!(s[i] > 0.f && isfinite(s[i])))
            return err_set(e, E_INPUT,
                           "%s: layer %d: fold of %s: channel %" PRId64
                           ": expected a positive finite factor, found %g",
                           st_path(f->st), (int)layer, role_name(d->source), i, (double)s[i]);
    return OK;
}

static err_code check_turn(const plan_file *f, int32_t layer, const char *what, const tensor *t,
                           err *e)
{
    const float *v = t->data;
    for (int64_t i = 0; v && i < tensor_count(t); i++)
        if (!isfinite(v[i]))
            return err_set(e, E_INPUT,
                           "%s: layer %d: turn of %s: element %" PRId64
                           ": expected a finite number, found %g",
                           st_path(f->st), (int)layer, what, i, (double)v[i]);
    return OK;
}

static err_code check_linear(const plan_file *f, int32_t layer, const plan_linear *l, err *e)
{
    const f16 *scale = l->scale.data;
    const uint8_t *zero = l->zero.data;
    for (int64_t i = 0; i < tensor_count(&l->scale); i++) {
        const float s = f16_to_f32(scale[i]);
        if (!(s > 0.f && isfinite(s)) || zero[i] > 15)
            return err_set(e, E_INPUT,
                           "%s: layer %d: %s: row %" PRId64 " group %" PRId64
                           ": expected a positive scale and a zero up to 15, found %g and %d",
                           st_path(f->st), (int)layer, role_name(l->role), i / l->scale.shape[1],
                           i % l->scale.shape[1], (double)s, (int)zero[i]);
    }
    return OK;
}

err_code plan_layer(const plan_file *f, int32_t layer, block_plan *view, err *e)
{
    if (layer < 0 || layer >= f->info.layers)
        return err_set(e, E_INPUT, "%s: expected layer 0 to %d, asked for %d", st_path(f->st),
                       (int)f->info.layers - 1, (int)layer);
    TRY(get_layer(f, layer, view, e));
    for (int i = 0; i < PLAN_FOLDS; i++) TRY(check_fold(f, layer, &view->fold[i], e));
    for (int i = 0; i < view->n_linears; i++) TRY(check_linear(f, layer, &view->linear[i], e));
    TRY(check_turn(f, layer, "k", &view->turn_k, e));
    return check_turn(f, layer, "v", &view->turn_v, e);
}

static err_code get_number(const plan_file *f, const char *key, int lo, int hi, int32_t *out,
                           err *e)
{
    const char *text;
    int n = 0, used = 0;
    TRY(artifact_meta(f->st, key, &text, e));
    if (sscanf(text, "%9d%n", &n, &used) != 1 || text[used] || n < lo || n > hi)
        return err_set(e, E_INPUT, "%s: %s: expected %d to %d, found '%.32s'", st_path(f->st), key,
                       lo, hi, text);
    *out = n;
    return OK;
}

/* Every tensor of the file must be one that get_layer or plan_rotation would return: nothing is
 * dropped. */
static err_code check_names(plan_file *f, err *e)
{
    int64_t known = 0;
    block_plan b;
    for (int32_t i = 0; i < f->info.layers; i++) {
        TRY(get_layer(f, i, &b, e));
        for (int d = 0; d < PLAN_FOLDS; d++) known += b.fold[d].s.data != NULL;
        known += (b.turn_k.data != NULL) + (b.turn_v.data != NULL);
        for (int l = 0; l < b.n_linears; l++) known += 3 + (b.linear[l].codes.data != NULL);
    }
    for (int64_t i = 0; i < st_count(f->st); i++) {
        const st_entry t = st_at(f->st, i);
        if (strncmp(t.name, ROTATION, sizeof ROTATION - 1) != 0) continue;
        TRY(artifact_get(f->st, t.name, DT_F32, 2, (const int64_t[]){-1, t.view.shape[0]},
                         &(tensor){0}, e));
        f->rotations++;
    }
    if (known + f->rotations != st_count(f->st))
        return err_set(e, E_INPUT, "%s: expected %" PRId64 " tensors by its layers, found %" PRId64,
                       st_path(f->st), known + f->rotations, st_count(f->st));
    return OK;
}

static err_code plan_check(plan_file *f, err *e)
{
    TRY(artifact_check(f->st, PLAN_KIND, PLAN_VERSION, e));
    TRY(get_number(f, "layers", 1, MAX_LAYERS, &f->info.layers, e));
    TRY(get_number(f, "group", 1, 1 << 20, &f->info.group, e));
    TRY(artifact_meta(f->st, "method", &f->info.method, e));
    TRY(artifact_meta(f->st, "options", &f->info.options, e));
    TRY(artifact_meta(f->st, "loss", &f->info.loss, e));
    TRY(artifact_meta(f->st, "parent.model", &f->info.model, e));
    TRY(artifact_meta(f->st, "parent.calib", &f->info.calib, e));
    TRY(check_names(f, e));
    return artifact_digest(f->st, &f->digest, e);
}

static err_code plan_take(plan_file **out, st_file *st, err *e)
{
    plan_file *f = NULL;
    err_code rc = mem_alloc((void **)&f, 1, sizeof *f, "plan file", e);
    if (rc != OK) {
        st_close(&st);
        return rc;
    }
    f->st = st;
    if ((rc = plan_check(f, e)) != OK) {
        plan_close(&f);
        return rc;
    }
    *out = f;
    return OK;
}

err_code plan_open(plan_file **out, const char *path, err *e)
{
    st_file *st = NULL;
    TRY(st_open(&st, path, e));
    return plan_take(out, st, e);
}

err_code plan_open_memory(plan_file **out, const void *data, size_t size, const char *name, err *e)
{
    st_file *st = NULL;
    TRY(st_open_memory(&st, data, size, name, e));
    return plan_take(out, st, e);
}

void plan_close(plan_file **f)
{
    if (!*f) return;
    st_close(&(*f)->st);
    mem_free(*f);
    *f = NULL;
}

const plan_info *plan_info_of(const plan_file *f) { return &f->info; }
hash128 plan_digest(const plan_file *f) { return f->digest; }
int plan_rotation_count(const plan_file *f) { return f->rotations; }

bool plan_rotation(const plan_file *f, const char *name, tensor *view)
{
    char full[ARTIFACT_NAME_MAX];
    snprintf(full, sizeof full, ROTATION "%s", name);
    return st_find(f->st, full, view);
}

static err_code check_shape(const plan_file *f, int32_t layer, const char *what, const tensor *have,
                            const tensor *want, err *e)
{
    char name[64];
    if (!have->data) return OK;
    snprintf(name, sizeof name, "layers.%d.turn.%s", (int)layer, what);
    for (int i = 0; i < want->ndim; i++)
        if (have->shape[i] != want->shape[i])
            return err_set(e, E_INPUT, "%s: %s: dimension %d: expected %" PRId64 ", found %" PRId64,
                           st_path(f->st), name, i, want->shape[i], have->shape[i]);
    return OK;
}

static err_code check_block(const plan_file *f, const model_desc *m, int32_t layer, err *e)
{
    block_plan want = plan_shape(m, f->info.group), have;
    TRY(get_layer(f, layer, &have, e));
    if (have.n_linears != want.n_linears)
        return err_set(e, E_INPUT, "%s: layer %d: expected %d linears, found %d", st_path(f->st),
                       (int)layer, want.n_linears, have.n_linears);
    for (int i = 0; i < want.n_linears; i++) {
        const plan_linear *w = &want.linear[i], *h = plan_find_linear(&have, w->role);
        if (!h || h->scale.shape[0] != w->scale.shape[0] || h->scale.shape[1] != w->scale.shape[1])
            return err_set(e, E_INPUT,
                           "%s: layer %d: %s: expected scales [%" PRId64 ",%" PRId64
                           "], found [%" PRId64 ",%" PRId64 "]",
                           st_path(f->st), (int)layer, role_name(w->role), w->scale.shape[0],
                           w->scale.shape[1], h ? h->scale.shape[0] : 0, h ? h->scale.shape[1] : 0);
    }
    for (int i = 0; i < PLAN_FOLDS; i++)
        if (have.fold[i].s.data && have.fold[i].s.shape[0] != want.fold[i].s.shape[0])
            return err_set(e, E_INPUT,
                           "%s: layer %d: fold of %s: expected %" PRId64
                           " channels, found %" PRId64,
                           st_path(f->st), (int)layer, role_name(want.fold[i].source),
                           want.fold[i].s.shape[0], have.fold[i].s.shape[0]);
    TRY(check_shape(f, layer, "k", &have.turn_k, &want.turn_k, e));
    return check_shape(f, layer, "v", &have.turn_v, &want.turn_v, e);
}

err_code plan_check_model(const plan_file *f, const model_desc *m, const char *digest, err *e)
{
    TRY(artifact_check_parent(f->st, "model", digest, e));
    if (f->info.layers != m->layers)
        return err_set(e, E_INPUT, "%s: expected %d layers, found %d", st_path(f->st),
                       (int)m->layers, (int)f->info.layers);
    for (int32_t i = 0; i < m->layers; i++) TRY(check_block(f, m, i, e));
    return OK;
}

/* ---- writing ---- */

err_code plan_put_layer(spool *s, int32_t layer, const block_plan *b, err *e)
{
    artifact_part parts[PLAN_FOLDS + 4 * PLAN_LINEARS + 2];
    double loss[PLAN_LINEARS][2];
    int n = 0;
    for (int i = 0; i < PLAN_FOLDS; i++) {
        if (!b->fold[i].s.data) continue;
        snprintf(parts[n].name, sizeof parts[n].name, "layers.%d.fold.%s", (int)layer,
                 role_name(b->fold[i].source));
        parts[n++].t = b->fold[i].s;
    }
    for (int i = 0; i < b->n_linears; i++) {
        const plan_linear *l = &b->linear[i];
        const char *what = role_name(l->role);
        loss[i][0] = l->loss_before;
        loss[i][1] = l->loss_after;
        part_name(parts[n].name, layer, what, "scale");
        parts[n++].t = l->scale;
        part_name(parts[n].name, layer, what, "zero");
        parts[n++].t = l->zero;
        part_name(parts[n].name, layer, what, "loss");
        parts[n++].t = tensor_1d(loss[i], DT_F64, 2);
        if (!l->codes.data) continue;
        part_name(parts[n].name, layer, what, "codes");
        parts[n++].t = l->codes;
    }
    const tensor turns[] = {b->turn_k, b->turn_v};
    for (int i = 0; i < 2; i++) {
        if (!turns[i].data) continue;
        part_name(parts[n].name, layer, "turn", i ? "v" : "k");
        parts[n++].t = turns[i];
    }
    return spool_put(s, layer, parts, n, e);
}

err_code plan_finish(spool *s, const plan_info *info, const artifact_part *rotations,
                     int64_t n_rotations, err *e)
{
    char layers[16], group[16];
    const char *meta[] = {"layers",       layers,      "group",        group,       "method",
                          info->method,   "options",   info->options,  "loss",      info->loss,
                          "parent.model", info->model, "parent.calib", info->calib, NULL};
    snprintf(layers, sizeof layers, "%d", (int)info->layers);
    snprintf(group, sizeof group, "%d", (int)info->group);
    return spool_finish(s, meta, rotations, n_rotations, e);
}

err_code plan_spooled_loss(const spool *s, int32_t layer, double *before, double *after, err *e)
{
    static const char tail[] = ".loss";
    st_file *f = NULL;
    *before = *after = 0;
    TRY(spool_get(s, layer, &f, e));
    for (int64_t i = 0; i < st_count(f); i++) {
        const st_entry t = st_at(f, i);
        const size_t n = strlen(t.name);
        if (n < sizeof tail || strcmp(t.name + n - sizeof tail + 1, tail) != 0 ||
            t.view.dt != DT_F64)
            continue;
        double v[2];
        memcpy(v, t.view.data, sizeof v);
        *before += v[0];
        *after += v[1];
    }
    st_close(&f);
    return OK;
}

err_code plan_spooled_layer(const spool *s, const model_desc *m, int32_t group, int32_t layer,
                            plan_file **out, block_plan *view, err *e)
{
    plan_file *f = NULL;
    *out = NULL;
    TRY(mem_alloc((void **)&f, 1, sizeof *f, "plan file", e));
    f->info.layers = m->layers;
    f->info.group = group;
    err_code rc = spool_get(s, layer, &f->st, e);
    if (rc == OK) rc = check_block(f, m, layer, e);
    if (rc == OK) rc = plan_layer(f, layer, view, e);
    if (rc == OK)
        *out = f;
    else
        plan_close(&f);
    return rc;
}
