/* The loop around a method: one block at a time, its second moments, its plan, its losses. */
#include "awq/search.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "awq/chain.h"
#include "awq/correct.h"
#include "awq/dev_chain.h"
#include "awq/dev_fold.h"
#include "awq/dev_replay.h"
#include "awq/feedback.h"
#include "awq/few.h"
#include "awq/kv_fold.h"
#include "awq/measure.h"
#include "awq/module_loss.h"
#include "awq/moments.h"
#include "awq/on_device.h"
#include "awq/pace.h"
#include "awq/rotate.h"
#include "kernels/search_ops.h"
#include "runtime/layer_walk.h"

typedef struct {
    const search_opts *o;
    device *d, *host; /* host: opened here, for what needs no device */
    const job *j;
    weight_src *base, *src; /* the model, and as it is searched: maybe in other bases */
    rotated *turned;        /* of src; NULL: src is base */
    const model_desc *m;
    const family *fam;
    calib_file *calib;
    const quant_method *method;
    quant_opts q;
    layer_walk *walk;
    moment_source *moments;
    chain *chain; /* NULL unless the method carries rounded inputs on */
    quant_scratch scratch;
    dev_scratch *dev;     /* NULL: the device's memory is the host's */
    dev_chain *dev_chain; /* there in place of chain */
    arena plan_mem;       /* scales and zeros of a block, then what the method adds */
    void *few;            /* statistics of few tokens, of the layer at work */
    spool *spool;
    pace *pace;                 /* NULL: nothing walks */
    double saved_at, save_cost; /* seconds: when the states were saved last, what it took */
    char options[160];
} search;

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

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

static bool walks(const search *s) { return s->q.loss == LOSS_GRAM || s->q.loss == LOSS_MODULE; }

static bool on_device(const search *s)
{
    return walks(s) && (s->o->on_device || dev_mem(s->d) != MEM_HOST);
}

/* Without a forward pass there is nothing to do on a device. */
static err_code pick_device(search *s, err *e)
{
    if (walks(s) || dev_mem(s->d) == MEM_HOST) return OK;
    const dev_opts o = {.kind = DEV_CPU, .threads = pool_threads(dev_pool(s->d))};
    job_log(s->j, LOG_INFO, "method '%s' with loss '%s' has no forward pass: it runs on the CPU",
            s->method->name, loss_name(s->q.loss));
    TRY(dev_open(&s->host, &o, e));
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
    return walks(s) ? OK : err_set(e, E_USAGE, "folds of k and v need --loss gram");
}

static err_code pick_rotation(search *s, err *e)
{
    const char *name = s->o->rotate ? s->o->rotate : "none";
    s->q.turn = strcmp(name, "vo") == 0;
    if (!s->q.turn && strcmp(name, "none") != 0)
        return err_set(e, E_USAGE, "rotation '%s': expected none or vo", name);
    if (s->q.turn && !s->q.kv_fold)
        return err_set(e, E_USAGE, "rotation 'vo': expected folds of k and v (--kv-fold yes)");
    if (!s->q.turn) return OK;
    TRY(rotated_open(&s->turned, s->base, s->d, &(tensor){0}, e));
    s->src = rotated_src(s->turned);
    s->m = weights_desc(s->src);
    return OK;
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

static err_code check_device(const search *s, err *e)
{
    if (!on_device(s)) return OK;
    if (s->q.turn)
        return err_set(e, E_UNSUPPORTED, "rotation 'vo': expected the CPU (--device cpu), got %s",
                       dev_name(s->d));
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

static err_code open_inputs(search *s, err *e)
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
    char without[32] = "";
    if (s->q.without) snprintf(without, sizeof without, ",\"without\":%u", (unsigned)s->q.without);
    snprintf(s->options, sizeof s->options, "{\"group\":%d,\"loss\":\"%s\"%s%s%s}", (int)s->q.group,
             loss_name(s->q.loss), s->q.kv_fold ? ",\"kv_fold\":true" : "",
             s->q.turn ? ",\"rotate\":\"vo\"" : "", without);
    return OK;
}

static void close_all(search *s)
{
    spool_close(&s->spool);
    moments_close(&s->moments);
    chain_close(&s->chain);
    layer_walk_close(&s->walk);
    dev_scratch_close(&s->dev);
    dev_chain_close(&s->dev_chain);
    quant_scratch_free(&s->scratch);
    arena_free(&s->plan_mem);
    mem_free(s->few);
    calib_close(&s->calib);
    rotated_close(&s->turned);
    weights_close(&s->base);
    dev_close(&s->host);
}

static bool carries(const search *s) { return s->chain || s->dev_chain; }

static dev_use_of use_of(const search *s)
{
    return s->method->carries ? DEV_CARRIES : s->method->fixes_codes ? DEV_CODES : DEV_RANGES;
}

/* ---- memory ---- */

static size_t plan_bytes(const search *s)
{
    block_plan p = plan_shape(s->m, s->q.group);
    size_t n = plan_factors_bytes(s->m, s->method->fixes_codes) +
               (s->q.turn ? kv_turn_bytes(s->m) : 0);
    for (int i = 0; i < p.n_linears; i++)
        n += arena_need(tensor_bytes(&p.linear[i].scale)) +
             arena_need(tensor_bytes(&p.linear[i].zero));
    return n;
}

/* What the search asks of the ops beside the forward pass, whose own reserve covers op_gram:
 * op_quad alone, and its scratch does not depend on the rows of a call. */
static op_limits search_limits(const search *s)
{
    const int64_t k = walks(s) ? s->scratch.widest : 128;
    return (op_limits){
        .rows = 1, .k = k, .n = k, .heads = 1, .head_dim = s->m->head_dim, .max_kv = 1, .seqs = 1};
}

static bool all_moments(const search *s)
{
    return moments_bytes(s->m, true) <= (size_t)s->o->gram_bytes;
}

err_code search_memory(memory_plan *p, device *d, const search_opts *o, err *e)
{
    search s = {.o = o, .d = d};
    *p = (memory_plan){0};
    err_code rc = open_inputs(&s, e);
    d = s.d;
    if (rc == OK) {
        s.scratch = quant_scratch_shape(s.m, s.method->searches);
        const op_limits lim = search_limits(&s);
        memory_plan_add(p, "program", memory_plan_process_bytes());
        memory_plan_add(p, "search scratch",
                        quant_scratch_bytes(&s.scratch) + ops_reserve_bytes(d, &lim));
        if (on_device(&s))
            memory_plan_add(p, "tiles", dev_scratch_bytes(s.m, s.q.group, use_of(&s)));
        memory_plan_add(p, "plan of a block", plan_bytes(&s));
    }
    if (rc == OK && walks(&s)) {
        const calib_info *c = calib_info_of(s.calib);
        const int32_t per_pass = c->seqlen < 2048 ? 2048 / c->seqlen : 1;
        memory_plan_add(p, "hidden states and forward pass",
                        layer_walk_bytes(d, s.m, s.src, c->samples, c->seqlen));
        if (!on_device(&s) || !s.method->carries)
            memory_plan_add(p, "second moments", moments_bytes(s.m, all_moments(&s)));
        if (s.method->carries) memory_plan_add(p, "prediction", predict_bytes(s.m));
        if (s.q.kv_fold && !on_device(&s))
            memory_plan_add(p, "keys and values", kv_fold_bytes(s.m));
        else if (s.q.kv_fold && !s.method->carries) /* else in the room of the rounded inputs */
            memory_plan_add(p, "keys and values", dev_fold_bytes(d, s.m));
        if (s.q.turn) memory_plan_add(p, "turned weights", rotated_bytes(s.m, false));
        if (s.method->carries && on_device(&s))
            memory_plan_add(p, "rounded inputs",
                            dev_chain_bytes(d, s.m, (int64_t)per_pass * c->seqlen) +
                                (size_t)(2 * (int64_t)s.m->hidden * c->samples * c->seqlen));
        else if (s.method->carries)
            memory_plan_add(p, "rounded inputs",
                            chain_bytes(s.m, (int64_t)per_pass * c->seqlen) +
                                chain_split_bytes(d, s.m, (int64_t)c->samples * c->seqlen));
        if (s.method->carries && !on_device(&s))
            memory_plan_add(p, "corrected rows", correct_bytes(s.scratch.widest));
        if (s.method->fixes_codes && !on_device(&s))
            memory_plan_add(p, "error feedback", feedback_bytes(s.scratch.widest));
        if (s.q.loss == LOSS_MODULE)
            memory_plan_add(p, "module loss",
                            module_loss_bytes(d, s.m, (int64_t)per_pass * c->seqlen));
    }
    close_all(&s);
    return rc;
}

/* ---- one layer ---- */

static err_code plan_alloc(search *s, block_plan *p, err *e)
{
    *p = plan_shape(s->m, s->q.group);
    arena_reset(&s->plan_mem);
    for (int i = 0; i < p->n_linears; i++) {
        TRY(arena_get(&s->plan_mem, &p->linear[i].scale.data, tensor_bytes(&p->linear[i].scale),
                      e));
        TRY(arena_get(&s->plan_mem, &p->linear[i].zero.data, tensor_bytes(&p->linear[i].zero), e));
    }
    return OK;
}

/* Factors and bases for the cache, before anything is known of the layer's inputs; the block is
 * bound again where its weights have other bases then. */
static err_code fold_cache(search *s, const quant_block *b, block_plan *p, calib_block *stats,
                           err *e)
{
    if (on_device(s)) {
        const dev_buf room = s->dev_chain ? dev_chain_room(s->dev_chain) : (dev_buf){0};
        return dev_fold_factors(b, &room, p, e);
    }
    TRY(kv_fold_factors(b, p, e));
    if (!p->turn_k.data && !p->turn_v.data) return OK;
    TRY(rotated_layer(s->turned, b->layer, p, e));
    TRY(layer_walk_bind(s->walk, b->layer, e));
    return kv_fold_stats(b, p, stats, e);
}

static err_code search_layer(search *s, int32_t layer, const walk_progress *p, bool *advanced,
                             err *e)
{
    calib_block stats;
    block_plan plan;
    double before = 0, after = 0;
    quant_block b = {.d = s->d,
                     .src = s->src,
                     .m = s->m,
                     .fam = s->fam,
                     .layer = layer,
                     .o = &s->q,
                     .moments = s->moments,
                     .walk = s->walk,
                     .chain = s->chain,
                     .scratch = &s->scratch,
                     .dev = s->dev,
                     .mem = &s->plan_mem,
                     .j = s->j,
                     .pace = s->pace};
    *advanced = false;
    if (s->calib) {
        TRY(calib_layer(s->calib, layer, &stats, e));
        mem_free(s->few);
        TRY(few_stats(&stats, layer, &s->few, s->j, e));
        b.stats = &stats;
    }
    if (s->walk) {
        TRY(layer_walk_bind(s->walk, layer, e));
        TRY(plan_alloc(s, &plan, e));
        if (s->q.kv_fold) TRY(fold_cache(s, &b, &plan, &stats, e));
        if (s->chain) TRY(chain_layer(s->chain, e));
        if (s->dev_chain) TRY(dev_chain_layer(s->dev_chain, e));
        TRY(moments_layer(s->moments, layer, s->q.loss == LOSS_GRAM && !carries(s), advanced, p,
                          e));
        pace_step(s->pace);
    }
    if (!s->walk) {
        weights_prefetch(s->src, layer);
        TRY(weights_check_layer(s->src, layer, NULL, NULL, e));
        TRY(plan_alloc(s, &plan, e));
    }
    TRY(s->method->plan_block(&b, &plan, e));
    if (!carries(s)) TRY(block_losses(&b, &plan, e));
    if (s->chain) TRY(chain_advance(s->chain, p, e));
    if (s->dev_chain) TRY(dev_chain_advance(s->dev_chain, p, e));
    *advanced = *advanced || carries(s);
    TRY(plan_put_layer(s->spool, layer, &plan, e));
    if (!s->walk) weights_release(s->src, layer);
    for (int i = 0; i < plan.n_linears; i++) {
        before += plan.linear[i].loss_before;
        after += plan.linear[i].loss_after;
        job_log(s->j, LOG_DEBUG, "layer %d: %s: loss %.6g -> %.6g", (int)layer,
                role_name(plan.linear[i].role), plan.linear[i].loss_before,
                plan.linear[i].loss_after);
    }
    job_log(s->j, LOG_INFO, "layer %d: loss %.6g -> %.6g (%.1f %%)", (int)layer, before, after,
            before > 0 ? 100 * after / before : 100.);
    return OK;
}

/* ---- the loop ---- */

/* A layer that was rounded by an earlier run: on a device, whose two streams of states lie apart
 * and are not saved, they are made again by passes, which cost a sixth of a search. */
static err_code replay_layer(search *s, int32_t layer, const walk_progress *p, err *e)
{
    const quant_block b = {
        .d = s->d, .src = s->src, .m = s->m, .layer = layer, .o = &s->q, .dev = s->dev, .j = s->j};
    plan_file *f;
    block_plan plan;
    TRY(layer_walk_bind(s->walk, layer, e));
    TRY(dev_chain_layer(s->dev_chain, e));
    TRY(plan_spooled_layer(s->spool, s->m, s->q.group, layer, &f, &plan, e));
    const err_code rc = dev_replay_block(&b, s->dev_chain, &plan, p, e);
    plan_close(&f);
    return rc;
}

/* One layer on the way to the next; *advanced: the states are what enters that. */
static err_code one_layer(search *s, int32_t layer, const walk_progress *p, bool *advanced, err *e)
{
    const bool done = spool_has(s->spool, layer);
    *advanced = false;
    if (done && s->dev_chain) {
        *advanced = true;
        return replay_layer(s, layer, p, e);
    }
    if (!done || carries(s)) /* the next layer's inputs need this one's rounding */
        return search_layer(s, layer, p, advanced, e);
    return s->walk ? layer_walk_bind(s->walk, layer, e) : OK;
}

static bool saves(const search *s) { return layer_walk_saves(s->walk) && !s->dev_chain; }

/* Saving may cost at most a twentieth of the time: then an interruption costs little and so does
 * the insurance. */
static err_code save_states(search *s, int32_t next, err *e)
{
    const double start = now_s(),
                 pause = 20 * s->save_cost > s->o->save_s ? 20 * s->save_cost : s->o->save_s;
    if (next >= s->m->layers || start - s->saved_at < pause) return OK;
    if (!saves(s)) return OK;
    const tensor states = layer_walk_saved(s->walk);
    TRY(spool_put_state(s->spool, next, &states, e));
    s->saved_at = now_s();
    s->save_cost = s->saved_at - start;
    return OK;
}

static err_code first_layer(search *s, int32_t *first, err *e)
{
    *first = 0;
    if (!s->walk || !saves(s)) return OK;
    tensor states = layer_walk_saved(s->walk);
    TRY(spool_get_state(s->spool, first, &states, e));
    for (int32_t i = 0; i < *first; i++)
        if (!spool_has(s->spool, i)) { /* its plan was damaged: begin again */
            const tensor tokens = calib_tokens(s->calib);
            *first = 0;
            return layer_walk_restart(s->walk, &tokens, e);
        }
    return OK;
}

/* A plan that was finished already, or up to its last file, has no states to tell from. */
static err_code predict(search *s, search_summary *out, bool walked, err *e)
{
    if (!carries(s) || !walked) return OK;
    moments_close(&s->moments); /* the head needs their memory more than they do */
    dev_scratch_close(&s->dev);
    dev_chain_close(&s->dev_chain);
    const tensor tokens = calib_tokens(s->calib), held_out = calib_held_out(s->calib);
    TRY(predict_losses(&out->predicted, s->d, s->src, s->walk, &tokens, &held_out, s->j, e));
    const prediction *p = &out->predicted;
    if (p->windows)
        job_log(s->j, LOG_INFO,
                "perplexity of %d held-out windows: %.4f, with 16 bits %.4f (%+.2f %%)",
                (int)p->windows, exp(p->nll), exp(p->nll16), 100 * (exp(p->nll - p->nll16) - 1));
    return OK;
}

static err_code run_layers(search *s, search_summary *out, err *e)
{
    const int64_t per_layer = s->walk ? layer_walk_windows(s->walk) : 1,
                  total = per_layer * s->m->layers;
    bool walked = false;
    int32_t first;
    pace steps = pace_open(s->j, "search", per_layer, total);
    if (s->walk) s->pace = &steps;
    TRY(first_layer(s, &first, e));
    s->saved_at = now_s();
    for (int32_t l = first; l < s->m->layers && spool_count(s->spool) < s->m->layers; l++) {
        bool advanced = false;
        pace_layer(&steps, l);
        walk_progress p = pace_pass(&steps);
        TRY(job_check(s->j, e));
        TRY(one_layer(s, l, &p, &advanced, e));
        p = pace_pass(&steps);
        if (s->walk && !advanced && l + 1 < s->m->layers)
            TRY(layer_walk_run(s->walk, false, NULL, NULL, &p, e));
        if (s->walk) TRY(save_states(s, l + 1, e));
        pace_end(&steps);
        walked = l + 1 == s->m->layers;
    }
    s->pace = NULL;
    return predict(s, out, walked, e);
}

static hash128 parent_calib(const search *s)
{
    return s->calib ? calib_digest(s->calib) : (hash128){"none"};
}

static err_code open_spool(search *s, search_summary *out, err *e)
{
    char text[512];
    const hash128 calib = parent_calib(s);
    snprintf(text, sizeof text, "%s plan %d %s %s %s %s", TMF_VERSION, PLAN_VERSION,
             weights_digest(s->src), calib.hex, s->method->name, s->options);
    const hash128 print = hash_xxh128(text, strlen(text));
    const spool_opts o = {s->o->out_path, PLAN_KIND,    PLAN_VERSION,
                          print.hex,      s->m->layers, s->o->force};
    TRY(spool_open(&s->spool, &o, &out->fresh, e));
    if (!out->fresh) out->resumed = spool_count(s->spool);
    if (out->resumed)
        job_log(s->j, LOG_INFO, "resuming: %d of %d layers are done", (int)out->resumed,
                (int)s->m->layers);
    return OK;
}

/* The moments of a layer lie where the chain's will, which come when they are done with. */
static err_code open_on_device(search *s, const tensor *held_out, err *e)
{
    dev_buf room;
    if (s->method->carries) {
        TRY(dev_chain_open(&s->dev_chain, s->d, s->walk, s->m, held_out, e));
        room = dev_chain_room(s->dev_chain);
    }
    TRY(dev_scratch_open(&s->dev, s->d, s->m, s->q.group, use_of(s), s->dev_chain, e));
    return moments_open(&s->moments, s->d, s->walk, s->m, (size_t)s->o->gram_bytes,
                        s->dev_chain ? &room : NULL, e);
}

static err_code open_work(search *s, err *e)
{
    TRY(arena_init(&s->plan_mem, plan_bytes(s), "plan of a block", e));
    TRY(quant_scratch_init(&s->scratch, s->m, s->method->searches, e));
    const op_limits lim = search_limits(s);
    TRY(ops_reserve(s->d, &lim, e));
    if (!walks(s)) return OK;
    const tensor tokens = calib_tokens(s->calib);
    TRY(layer_walk_open(&s->walk, s->d, s->src, &tokens, e));
    const tensor held_out = calib_held_out(s->calib);
    if (on_device(s)) return open_on_device(s, &held_out, e);
    if (s->method->carries) TRY(chain_open(&s->chain, s->d, s->walk, s->m, &held_out, e));
    return moments_open(&s->moments, s->d, s->walk, s->m, (size_t)s->o->gram_bytes, NULL, e);
}

static err_code finish(search *s, search_summary *out, err *e)
{
    const hash128 calib = parent_calib(s);
    const plan_info info = {.layers = s->m->layers,
                            .group = s->q.group,
                            .method = s->method->name,
                            .options = s->options,
                            .loss = loss_name(s->q.loss == LOSS_MODULE ? LOSS_GRAM : s->q.loss),
                            .model = weights_digest(s->src),
                            .calib = calib.hex};
    for (int32_t l = 0; l < s->m->layers; l++) {
        double before, after;
        TRY(plan_spooled_loss(s->spool, l, &before, &after, e));
        out->before += before;
        out->after += after;
    }
    out->loss = info.loss;
    return plan_finish(s->spool, &info, NULL, 0, e);
}

/* The summary of a plan that was there already. */
static err_code read_back(search *s, search_summary *out, err *e)
{
    plan_file *f = NULL;
    block_plan p;
    err_code rc = OK;
    TRY(plan_open(&f, s->o->out_path, e));
    for (int32_t l = 0; l < s->m->layers && rc == OK; l++) {
        rc = plan_layer(f, l, &p, e);
        for (int i = 0; rc == OK && i < p.n_linears; i++) {
            out->before += p.linear[i].loss_before;
            out->after += p.linear[i].loss_after;
        }
    }
    out->loss = loss_name(s->q.loss == LOSS_MODULE ? LOSS_GRAM : s->q.loss);
    plan_close(&f);
    return rc;
}

err_code search_run(search_summary *out, device *d, const search_opts *o, const job *j, err *e)
{
    search s = {.o = o, .d = d, .j = j};
    *out = (search_summary){0};
    err_code rc = open_inputs(&s, e);
    if (rc != OK) goto done;
    out->layers = s.m->layers;
    if ((rc = open_spool(&s, out, e)) != OK) goto done;
    if (out->fresh) {
        rc = read_back(&s, out, e);
        goto done;
    }
    if ((rc = open_work(&s, e)) != OK) goto done;
    if ((rc = run_layers(&s, out, e)) != OK) goto done;
    rc = finish(&s, out, e);
done:
    close_all(&s);
    return rc;
}
