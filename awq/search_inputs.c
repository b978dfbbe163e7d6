/* What a search is asked for, the files it reads, and what it will hold. */
#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "awq/correct.h"
#include "awq/dev_fold.h"
#include "awq/feedback.h"
#include "awq/kv_fold.h"
#include "awq/module_loss.h"
#include "awq/search_internal.h"
#include "awq/stream_stats.h"
#include "kernels/search_ops.h"

/* ---- inputs ---- */

static err_code pick_method(search *s, err *e)
{
    char known[128] = "";
    s->method = method_find(s->o->method);
    if (s->method) return OK;
    for (int i = 0; method_at(i); i++) {
        const size_t used = strlen(known);
        snprintf(known + used, sizeof known - used, "%s%s", i ? ", " : "", method_at(i)->name);
    }
    return err_set(e, E_USAGE, "method '%s': expected one of %s", s->o->method, known);
}

static err_code pick_loss(search *s, err *e)
{
    const char *name = s->o->loss;
    if (!s->calib && s->method->needs & METHOD_CALIB)
        return err_set(e, E_USAGE, "method '%s' needs --calib", s->method->name);
    s->q.loss = s->calib ? s->method->loss : LOSS_WEIGHTS;
    for (loss_kind l = LOSS_WEIGHTS; name && l <= LOSS_MODULE; l++)
        if (strcmp(name, loss_name(l)) == 0) {
            s->q.loss = l;
            name = NULL;
        }
    if (name)
        return err_set(e, E_USAGE, "loss '%s': expected weights, blocks, gram or module", name);
    if (s->q.loss != LOSS_WEIGHTS && !s->calib)
        return err_set(e, E_USAGE, "loss '%s' needs --calib", loss_name(s->q.loss));
    if (s->method->carries && s->q.loss != LOSS_GRAM)
        return err_set(e, E_USAGE, "loss '%s': method '%s' needs gram", loss_name(s->q.loss),
                       s->method->name);
    if (s->q.loss == LOSS_MODULE && !s->method->searches)
        return err_set(e, E_USAGE,
                       "loss 'module': method '%s' searches nothing, use gram or blocks",
                       s->method->name);
    return OK;
}

bool search_walks(const search *s) { return s->q.loss == LOSS_GRAM || s->q.loss == LOSS_MODULE; }

bool search_on_device(const search *s)
{
    return search_walks(s) && (s->o->on_device || dev_mem(s->d) != MEM_HOST);
}

static err_code open_host(search *s, err *e)
{
    const dev_opts o = {.kind = DEV_CPU, .threads = pool_threads(dev_pool(s->d))};
    return dev_open(&s->host, &o, e);
}

/* Without a forward pass there is nothing to do on a device. */
static err_code pick_device(search *s, err *e)
{
    if (search_walks(s) || dev_mem(s->d) == MEM_HOST) return OK;
    job_log(s->j, LOG_INFO, "method '%s' with loss '%s' has no forward pass: it runs on the CPU",
            s->method->name, loss_name(s->q.loss));
    TRY(open_host(s, e));
    s->d = s->host;
    return OK;
}

/* "best" does it unasked. */
static err_code pick_fold(search *s, err *e)
{
    s->q.kv_fold = s->o->kv_fold < 0 ? s->method->carries : s->o->kv_fold > 0;
    if (!s->q.kv_fold) return OK;
    if (!s->method->folds)
        return err_set(e, E_USAGE, "folds of k and v: method '%s' takes no factors",
                       s->method->name);
    return search_walks(s) ? OK : err_set(e, E_USAGE, "folds of k and v need --loss gram");
}

int32_t search_held_out(const search *s)
{
    const uint8_t *out = calib_held_out(s->calib).data;
    int32_t n = 0;
    for (int32_t i = 0; i < calib_info_of(s->calib)->samples; i++) n += out[i] != 0;
    return n;
}

/* What a plan says of the residual stream is compared with what it would say of a turned one, by
 * the windows held out: both must be there. */
static err_code check_bases(const search *s, err *e)
{
    if (!s->bases) return OK;
    if (!s->method->carries)
        return err_set(e, E_USAGE,
                       "rotation 'residual': method '%s' does not predict what held-out windows "
                       "lose, expected best",
                       s->method->name);
    const calib_info *c = calib_info_of(s->calib);
    const int32_t held = search_held_out(s);
    if (held && held < c->samples && c->seqlen > 2) return OK;
    return err_set(
        e, E_USAGE,
        "rotation 'residual': '%s': expected windows held out to compare by, found %d of "
        "%d windows of %d tokens",
        s->o->calib_path, (int)held, (int)c->samples, (int)c->seqlen);
}

static err_code pick_rotation(search *s, err *e)
{
    const struct {
        const char *name;
        bool *asked;
    } kinds[] = {{"vo", &s->q.turn}, {"residual", &s->bases}};
    const char *at = s->o->rotate ? s->o->rotate : "none";
    if (strcmp(at, "none") == 0) return OK;
    do {
        const size_t n = strcspn(at, ",");
        size_t i = 0;
        while (i < 2 && (strlen(kinds[i].name) != n || memcmp(kinds[i].name, at, n) != 0)) i++;
        if (i == 2)
            return err_set(e, E_USAGE,
                           "rotation '%.*s': expected none, vo, residual or vo,residual", (int)n,
                           at);
        *kinds[i].asked = true;
        at += n + (at[n] == ',');
    } while (*at);
    if (s->q.turn && !s->q.kv_fold)
        return err_set(e, E_USAGE, "rotation 'vo': expected folds of k and v (--kv-fold yes)");
    return check_bases(s, e);
}

static err_code pick_stages(search *s, err *e)
{
    static const struct {
        const char *name;
        uint32_t bit;
    } stages[] = {{"factors", STAGE_FACTORS},   {"vo", STAGE_VO},
                  {"ranges", STAGE_RANGES},     {"sweeps", STAGE_SWEEPS},
                  {"scales", STAGE_SCALES},     {"correction", STAGE_CORRECTION},
                  {"residual", STAGE_RESIDUAL}, {"held-out", STAGE_HELD_OUT}};
    const char *at = s->o->without ? s->o->without : "";
    if (*at && !s->method->stages)
        return err_set(e, E_USAGE, "without '%s': expected method best, got %s", at,
                       s->method->name);
    while (*at) {
        const size_t n = strcspn(at, ",");
        uint32_t bit = 0;
        for (size_t i = 0; i < sizeof stages / sizeof *stages; i++)
            if (strlen(stages[i].name) == n && memcmp(stages[i].name, at, n) == 0)
                bit = stages[i].bit;
        if (!bit)
            return err_set(e, E_USAGE,
                           "without '%.*s': expected factors, vo, ranges, sweeps, scales, "
                           "correction, residual or held-out",
                           (int)n, at);
        s->q.without |= bit;
        at += n + (at[n] == ',');
    }
    return OK;
}

static err_code check_device(search *s, err *e)
{
    if (s->o->cache != KV_16 && !s->method->carries)
        return err_set(e, E_USAGE,
                       "cache of %d bits: method '%s' carries no rounded inputs, expected best",
                       (int)s->o->cache, s->method->name);
    if (!search_on_device(s)) return OK;
    if (s->q.turn && dev_mem(s->d) != MEM_HOST) TRY(open_host(s, e)); /* bases are found there */
    return s->method->fixes_codes ? op_rounds(s->d, e) : OK;
}

static err_code check_groups(const search *s, err *e)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(s->m, roles);
    for (int i = 0; i < n; i++) {
        const int64_t k = model_linear_k(s->m, roles[i]);
        if (k % s->q.group)
            return err_set(e, E_UNSUPPORTED,
                           "%s: group %d does not divide the %" PRId64 " inputs of %s",
                           s->o->model_dir, (int)s->q.group, k, role_name(roles[i]));
    }
    return OK;
}

/* The request in JSON: of the plan, and of its fingerprint. */
static void write_options(search *s)
{
    char without[32] = "", rotate[64] = "", cache[32] = "";
    if (s->o->cache != KV_16)
        snprintf(cache, sizeof cache, ",\"quant_policy\":%d", (int)s->o->cache);
    if (s->q.without) snprintf(without, sizeof without, ",\"without\":%u", (unsigned)s->q.without);
    if (s->bases)
        snprintf(rotate, sizeof rotate, ",\"rotate\":\"%sresidual\",\"rotate_seed\":%d",
                 s->q.turn ? "vo," : "", SEARCH_SEED);
    else if (s->q.turn)
        snprintf(rotate, sizeof rotate, ",\"rotate\":\"vo\"");
    snprintf(s->options, sizeof s->options, "{\"group\":%d,\"loss\":\"%s\"%s%s%s%s}",
             (int)s->q.group, loss_name(s->q.loss), s->q.kv_fold ? ",\"kv_fold\":true" : "", rotate,
             cache, without);
}

err_code search_open_inputs(search *s, err *e)
{
    TRY(pick_method(s, e));
    TRY(weights_open(&s->base, s->o->model_dir, e));
    s->src = s->base;
    s->m = weights_desc(s->src);
    s->fam = family_by_name(s->m->family);
    if (s->m->w4_group || !s->fam)
        return err_set(e, E_UNSUPPORTED, "%s: expected 16-bit weights, found 4-bit ones",
                       s->o->model_dir);
    if (s->m->experts)
        return err_set(e, E_UNSUPPORTED, "%s: mixtures of experts are not supported",
                       s->o->model_dir);
    s->q.group = s->o->group;
    TRY(check_groups(s, e));
    if (s->o->calib_path) {
        TRY(calib_open(&s->calib, s->o->calib_path, e));
        TRY(calib_check_model(s->calib, s->m, weights_digest(s->src), e));
    }
    TRY(pick_loss(s, e));
    TRY(pick_device(s, e));
    TRY(pick_fold(s, e));
    TRY(pick_rotation(s, e));
    TRY(pick_stages(s, e));
    TRY(check_device(s, e));
    write_options(s);
    return OK;
}

err_code search_open_source(search *s, err *e)
{
    const int64_t n = s->m->hidden;
    tensor q = {0};
    if (!s->q.turn && !s->stream) return OK;
    if (s->stream) {
        q = tensor_2d(NULL, DT_F32, n, n);
        TRY(mem_alloc(&q.data, (size_t)(n * n), sizeof(float), "rotation", e));
        rotate_random(q.data, n, SEARCH_SEED);
    }
    const err_code rc = rotated_open(&s->turned, s->base, s->d, &q, e);
    mem_free(q.data);
    if (rc != OK) return rc;
    s->src = rotated_src(s->turned);
    s->m = weights_desc(s->src);
    return OK;
}

void search_close_inputs(search *s)
{
    calib_close(&s->calib);
    rotated_close(&s->turned);
    weights_close(&s->base);
    dev_close(&s->host);
}

dev_use_of search_use(const search *s)
{
    return s->method->carries ? DEV_CARRIES : s->method->fixes_codes ? DEV_CODES : DEV_RANGES;
}

/* ---- memory ---- */

size_t search_plan_bytes(const search *s)
{
    block_plan p = plan_shape(s->m, s->q.group);
    size_t n = plan_factors_bytes(s->m, s->method->fixes_codes) +
               (s->q.turn ? kv_turn_bytes(s->m) : 0) + (s->bases ? stream_stats_bytes(s->m) : 0);
    for (int i = 0; i < p.n_linears; i++)
        n += arena_need(tensor_bytes(&p.linear[i].scale)) +
             arena_need(tensor_bytes(&p.linear[i].zero));
    return n;
}

/* What the search asks of the ops beside the forward pass, whose own reserve covers op_gram:
 * op_quad alone, and its scratch does not depend on the rows of a call. */
op_limits search_limits(const search *s)
{
    const int64_t k = search_walks(s) ? s->scratch.widest : 128;
    return (op_limits){
        .rows = 1, .k = k, .n = k, .heads = 1, .head_dim = s->m->head_dim, .max_kv = 1, .seqs = 1};
}

bool search_all_moments(const search *s)
{
    return moments_bytes(s->m, true) <= (size_t)s->o->gram_bytes;
}

/* The second stream, its cache, and what is made of both: passes of `rows`. */
static size_t carried_bytes(const device *d, const search *s, int64_t rows)
{
    const calib_info *c = calib_info_of(s->calib);
    const int64_t all = (int64_t)c->samples * c->seqlen;
    const size_t cache = layer_walk_cache_bytes(s->m, c->samples, c->seqlen, s->o->cache);
    if (search_on_device(s))
        return cache + dev_chain_bytes(d, s->m, rows) +
               (size_t)(all * s->m->hidden) * dtype_bytes(DT_F16);
    return cache + chain_bytes(s->m, rows) + chain_split_bytes(d, s->m, all);
}

/* Beside the forward pass. */
static void add_walk(memory_plan *p, device *d, const search *s)
{
    const calib_info *c = calib_info_of(s->calib);
    const int64_t rows = layer_walk_pass_rows(c->samples, c->seqlen);
    const bool dev = search_on_device(s), carries = s->method->carries;
    memory_plan_add(p, "hidden states and forward pass",
                    layer_walk_bytes(d, s->m, s->src, c->samples, c->seqlen));
    if (!dev || !carries)
        memory_plan_add(p, "second moments", moments_bytes(s->m, search_all_moments(s)));
    if (carries)
        memory_plan_add(p, "prediction",
                        predict_bytes(s->m, s->bases) + (s->bases ? search_bases_bytes(s) : 0));
    if (s->q.kv_fold && (!dev || s->q.turn))
        memory_plan_add(p, "keys and values", kv_fold_bytes(d, s->m));
    else if (s->q.kv_fold && !carries) /* else in the room of the rounded inputs */
        memory_plan_add(p, "keys and values", dev_fold_bytes(d, s->m));
    if (s->q.turn || s->bases) memory_plan_add(p, "turned weights", rotated_bytes(s->m, s->bases));
    if (carries) memory_plan_add(p, "rounded inputs", carried_bytes(d, s, rows));
    if (carries && !dev) memory_plan_add(p, "corrected rows", correct_bytes(s->scratch.widest));
    if (s->method->fixes_codes && !dev)
        memory_plan_add(p, "error feedback", feedback_bytes(s->scratch.widest));
    if (s->q.loss == LOSS_MODULE)
        memory_plan_add(p, "module loss", module_loss_bytes(d, s->m, rows));
}

err_code search_memory(memory_plan *p, device *d, const search_opts *o, err *e)
{
    search s = {.o = o, .d = d};
    *p = (memory_plan){0};
    err_code rc = search_open_inputs(&s, e);
    if (rc == OK) {
        d = s.d;
        s.scratch = quant_scratch_shape(s.m, s.method->searches);
        const op_limits lim = search_limits(&s);
        memory_plan_add(p, "program", memory_plan_process_bytes());
        memory_plan_add(p, "search scratch",
                        quant_scratch_bytes(&s.scratch) + ops_reserve_bytes(d, &lim));
        if (search_on_device(&s))
            memory_plan_add(p, "tiles", dev_scratch_bytes(s.m, s.q.group, search_use(&s)));
        memory_plan_add(p, "plan of a block", search_plan_bytes(&s));
        if (search_walks(&s)) add_walk(p, d, &s);
    }
    search_close_inputs(&s);
    return rc;
}
