/* Reading back. */
#include "awq/report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "awq/few.h"
#include "awq/fold.h"
#include "awq/rotate.h"
#include "base/half.h"
#include "base/mem.h"
#include "kernels/quant_group.h"

#define ROWS 64

typedef struct {
    report *out;
    device *d;
    weight_src *base, *src; /* the model; it in the plan's bases */
    rotated *turned;
    const model_desc *m;
    calib_file *calib;
    plan_file *plan;
    void *room; /* a tile of weights, scales, zeros */
} reading;

/* ---- a linear ---- */

static int64_t widest(const model_desc *m)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(m, roles);
    int64_t k = m->hidden;
    for (int i = 0; i < n; i++)
        if (model_linear_k(m, roles[i]) > k) k = model_linear_k(m, roles[i]);
    return k;
}

/* Mean over all groups of scale / the scale of the whole range. */
static err_code range_kept(const reading *r, int32_t layer, const plan_linear *l, const fold *f,
                           double *kept, err *e)
{
    const int64_t g = r->out->group;
    linear_view v;
    double sum = 0;
    TRY(weights_linear(r->src, l->role, layer, -1, &v, e));
    const int64_t n = v.dense.shape[0], k = v.dense.shape[1], groups = k / g;
    f16 *scale = (f16 *)((float *)r->room + ROWS * k);
    for (int64_t at = 0; at < n; at += ROWS) {
        const int64_t rows = n - at < ROWS ? n - at : ROWS;
        const f16 *have = (const f16 *)l->scale.data + at * groups;
        tensor w = {.data = r->room}, whole = tensor_2d(scale, DT_F16, rows, groups),
               zero = tensor_2d(scale + rows * groups, DT_U8, rows, groups);
        TRY(fold_rows(&w, &v.dense, fold_find(f, l->role), at, rows, layer, l->role, e));
        TRY(op_quant_range(r->d, &whole, &zero, &w, NULL, (int32_t)g, e));
        for (int64_t i = 0; i < rows * groups; i++)
            sum += (double)f16_to_f32(have[i]) / (double)f16_to_f32(scale[i]);
    }
    *kept = sum / (double)(n * groups);
    return OK;
}

/* ---- factors ---- */

/* Factors of v stand for the channels of o of all heads that share them. */
static double mean_of(const reading *r, const calib_tap *t, tensor_role source, int64_t c)
{
    const double *sum = t->abssum.data;
    if (source != ROLE_V) return sum[c] / (double)t->count;
    const int64_t hd = r->m->head_dim, share = r->m->heads / r->m->kv_heads;
    double all = 0;
    for (int64_t i = 0; i < share; i++) all += sum[(c / hd * share + i) * hd + c % hd];
    return all / (double)(share * t->count);
}

static double slope(const reading *r, const calib_tap *t, const plan_fold *f)
{
    const float *s = f->s.data;
    double n = 0, x = 0, y = 0, xx = 0, xy = 0;
    for (int64_t c = 0; t && c < tensor_count(&f->s); c++) {
        const double mean = mean_of(r, t, f->source, c);
        if (!(mean > 0)) continue;
        const double a = log(mean), b = log(s[c]);
        n++;
        x += a;
        y += b;
        xx += a * a;
        xy += a * b;
    }
    const double wide = n * xx - x * x;
    return wide > 0 ? (n * xy - x * y) / wide : NAN;
}

static bool reads_stream(tensor_role r) { return r == ROLE_QKV || r == ROLE_GATE; }

static void read_factors(const reading *r, const calib_block *stats, const block_plan *p,
                         report_layer *out)
{
    for (int i = 0; i < PLAN_FOLDS; i++) {
        const plan_fold *f = &p->fold[i];
        const tensor_role reader = f->source == ROLE_ATTN_NORM  ? ROLE_QKV
                                   : f->source == ROLE_FFN_NORM ? ROLE_GATE
                                   : f->source == ROLE_UP       ? ROLE_DOWN
                                                                : ROLE_O;
        const bool other = f->source == ROLE_K || (r->out->turned && reads_stream(reader));
        const calib_tap *t = stats && !other ? calib_find(stats, reader) : NULL;
        if (!f->s.data) continue;
        report_factors *to = &out->factors[out->n_factors++];
        *to = (report_factors){.source = f->source, .least = INFINITY, .ratio = slope(r, t, f)};
        for (int64_t c = 0; c < tensor_count(&f->s); c++) {
            to->least = fmin(to->least, ((float *)f->s.data)[c]);
            to->most = fmax(to->most, ((float *)f->s.data)[c]);
        }
    }
}

/* ---- inputs ---- */

static int by_value(const void *a, const void *b)
{
    const float x = *(const float *)a, y = *(const float *)b;
    return x < y ? 1 : x > y ? -1 : 0;
}

static void read_outliers(reading *r, const calib_tap *t, report_input *out)
{
    const float *top = t->absmax.data;
    float *sorted = r->room;
    *out = (report_input){.tap = t->tap};
    memcpy(sorted, top, (size_t)t->k * sizeof *sorted);
    qsort(sorted, (size_t)t->k, sizeof *sorted, by_value);
    const double median = sorted[t->k / 2];
    for (int i = 0; i < REPORT_OUTLIERS; i++) {
        int32_t best = -1;
        for (int32_t c = 0; c < t->k; c++) {
            bool taken = false;
            for (int p = 0; p < i; p++) taken = taken || out->channel[p] == c;
            if (!taken && (best < 0 || top[c] > top[best])) best = c;
        }
        out->channel[i] = best;
        out->times[i] = best >= 0 && median > 0 ? top[best] / median : 0;
    }
}

/* ---- a layer ---- */

static err_code read_layer(reading *r, int32_t layer, err *e)
{
    report_layer *out = &r->out->layer[layer];
    calib_block stats;
    block_plan p;
    fold f;
    TRY(plan_layer(r->plan, layer, &p, e));
    TRY(rotated_layer(r->turned, layer, &p, e));
    if (r->calib) TRY(calib_layer(r->calib, layer, &stats, e));
    read_factors(r, r->calib ? &stats : NULL, &p, out);
    for (int i = 0; r->calib && i < stats.n_taps; i++)
        read_outliers(r, &stats.tap[i], &out->input[out->n_inputs++]);
    TRY(fold_init(&f, r->m, &p, e));
    err_code rc = OK;
    for (int i = 0; i < p.n_linears && rc == OK; i++) {
        const plan_linear *l = &p.linear[i];
        report_linear *to = &out->linear[out->n_linears++];
        *to = (report_linear){.role = l->role,
                              .n = model_linear_n(r->m, l->role),
                              .k = model_linear_k(r->m, l->role),
                              .before = l->loss_before,
                              .after = l->loss_after,
                              .few = r->calib && few_tokens(&stats, l->role)};
        rc = range_kept(r, layer, l, &f, &to->kept, e);
    }
    fold_free(&f);
    weights_release(r->src, layer);
    return rc;
}

static err_code read_all(reading *r, const search_opts *o, const job *j, err *e)
{
    TRY(weights_open(&r->base, o->model_dir, e));
    if (o->calib_path) TRY(calib_open(&r->calib, o->calib_path, e));
    TRY(plan_open(&r->plan, o->out_path, e));
    TRY(plan_check_model(r->plan, weights_desc(r->base), weights_digest(r->base), e));
    TRY(rotated_by_plan(&r->turned, r->base, r->d, r->plan, e));
    r->src = rotated_src(r->turned);
    r->m = weights_desc(r->src);
    const plan_info *info = plan_info_of(r->plan);
    tensor q;
    r->out->turned = plan_rotation(r->plan, "residual", &q);
    r->out->layers = info->layers;
    r->out->group = info->group;
    (void)snprintf(r->out->method, sizeof r->out->method, "%s", info->method);
    (void)snprintf(r->out->loss, sizeof r->out->loss, "%s", info->loss);
    TRY(mem_alloc((void **)&r->out->layer, (size_t)info->layers, sizeof(report_layer), "report",
                  e));
    TRY(mem_alloc(&r->room, 2 * ROWS * (size_t)widest(r->m), sizeof(float), "rows to report", e));
    for (int32_t l = 0; l < info->layers; l++) {
        TRY(job_check(j, e));
        TRY(read_layer(r, l, e));
    }
    return OK;
}

err_code report_make(report *out, device *d, const search_opts *o, const search_summary *s,
                     const job *j, err *e)
{
    reading r = {.out = out, .d = d};
    *out = (report){.predicted = s->predicted, .basis = s->basis};
    const err_code rc = read_all(&r, o, j, e);
    mem_free(r.room);
    plan_close(&r.plan);
    calib_close(&r.calib);
    rotated_close(&r.turned);
    weights_close(&r.base);
    if (rc != OK) report_free(out);
    return rc;
}

void report_free(report *r)
{
    mem_free(r->layer);
    r->layer = NULL;
    r->layers = 0;
}

/* ---- JSON ---- */

static cJSON *row_of(cJSON *list, int32_t layer, tensor_role role, const char *key)
{
    cJSON *o = cJSON_CreateObject();
    if (o && cJSON_AddNumberToObject(o, "layer", layer) &&
        cJSON_AddStringToObject(o, key, role_name(role)) && cJSON_AddItemToArray(list, o))
        return o;
    cJSON_Delete(o);
    return NULL;
}

static bool add_number(cJSON *o, const char *key, double v)
{
    return isfinite(v) ? cJSON_AddNumberToObject(o, key, v) != NULL
                       : cJSON_AddNullToObject(o, key) != NULL;
}

static bool add_layer(const report_layer *l, int32_t at, cJSON *linears, cJSON *factors,
                      cJSON *inputs)
{
    bool ok = true;
    for (int i = 0; i < l->n_linears && ok; i++) {
        const report_linear *x = &l->linear[i];
        cJSON *o = row_of(linears, at, x->role, "linear");
        ok = o && add_number(o, "loss_before", x->before) &&
             add_number(o, "loss_after", x->after) && add_number(o, "range_kept", x->kept) &&
             cJSON_AddBoolToObject(o, "few_tokens", x->few);
    }
    for (int i = 0; i < l->n_factors && ok; i++) {
        const report_factors *x = &l->factors[i];
        cJSON *o = row_of(factors, at, x->source, "source");
        ok = o && add_number(o, "ratio", x->ratio) && add_number(o, "least", x->least) &&
             add_number(o, "most", x->most);
    }
    for (int i = 0; i < l->n_inputs && ok; i++) {
        const report_input *x = &l->input[i];
        cJSON *o = row_of(inputs, at, x->tap, "input");
        cJSON *c = o ? cJSON_AddArrayToObject(o, "channels") : NULL,
              *t = o ? cJSON_AddArrayToObject(o, "times_median") : NULL;
        ok = c && t;
        for (int k = 0; k < REPORT_OUTLIERS && ok && x->channel[k] >= 0; k++)
            ok = cJSON_AddItemToArray(c, cJSON_CreateNumber(x->channel[k])) &&
                 cJSON_AddItemToArray(t, cJSON_CreateNumber(x->times[k]));
    }
    return ok;
}

static bool add_prediction(const prediction *p, cJSON *to)
{
    if (!p->windows) return cJSON_AddNullToObject(to, "predicted") != NULL;
    cJSON *o = cJSON_AddObjectToObject(to, "predicted");
    return o && add_number(o, "windows", p->windows) && add_number(o, "nll_16_bit", p->nll16) &&
           add_number(o, "nll", p->nll) &&
           add_number(o, "perplexity_change_percent", 100 * (exp(p->nll - p->nll16) - 1));
}

/* "turned" is what the plan does; null: no comparison is known, as of a plan that was there. */
static bool add_basis(const report *r, cJSON *to)
{
    const basis_choice *c = &r->basis;
    cJSON *o = cJSON_AddObjectToObject(to, "residual_stream");
    if (!o || !cJSON_AddBoolToObject(o, "turned", r->turned)) return false;
    if (!c->compared) return cJSON_AddNullToObject(o, "compared") != NULL;
    o = cJSON_AddObjectToObject(o, "compared");
    return o && add_number(o, "nll", c->still.nll) && add_number(o, "nll_turned", c->other.nll) &&
           add_number(o, "kl", c->still.kl) && add_number(o, "kl_turned", c->other.kl) &&
           add_number(o, "kl_gain", c->gain) && add_number(o, "kl_gain_error", c->error);
}

bool report_add(const report *r, cJSON *to)
{
    cJSON *linears = cJSON_AddArrayToObject(to, "linears"),
          *factors = cJSON_AddArrayToObject(to, "factors"),
          *inputs = cJSON_AddArrayToObject(to, "outliers");
    bool ok = linears && factors && inputs;
    for (int32_t l = 0; l < r->layers && ok; l++)
        ok = add_layer(&r->layer[l], l, linears, factors, inputs);
    return ok && add_prediction(&r->predicted, to) && add_basis(r, to);
}
