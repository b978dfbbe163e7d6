/* The loop around a method: one block at a time, its second moments, its plan, its losses. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "awq/dev_fold.h"
#include "awq/dev_replay.h"
#include "awq/few.h"
#include "awq/kv_fold.h"
#include "awq/search_internal.h"
#include "awq/stream_stats.h"
#include "runtime/clock.h"

static bool carries(const search *s) { return s->chain || s->dev_chain; }

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

/* The bound block in a plan's bases for the cache. */
static err_code turn_block(search *s, int32_t layer, const block_plan *p, err *e)
{
    if (!p->turn_k.data && !p->turn_v.data) return OK;
    TRY(rotated_layer(s->turned, layer, p, e));
    return layer_walk_bind(s->walk, layer, e);
}

/* Factors and bases for the cache, before anything is known of the layer's inputs. Bases are the
 * host's to find. */
static err_code fold_cache(search *s, const quant_block *b, block_plan *p, calib_block *stats,
                           err *e)
{
    if (search_on_device(s) && !s->q.turn) {
        const dev_buf room = s->dev_chain ? dev_chain_room(s->dev_chain) : (dev_buf){0};
        return dev_fold_factors(b, &room, p, e);
    }
    TRY(kv_fold_factors(b, p, e));
    TRY(turn_block(s, b->layer, p, e));
    return kv_fold_stats(b, p, stats, e);
}

static void log_losses(const job *j, int32_t layer, const block_plan *p)
{
    double before = 0, after = 0;
    for (int i = 0; i < p->n_linears; i++) {
        const plan_linear *l = &p->linear[i];
        before += l->loss_before;
        after += l->loss_after;
        job_log(j, LOG_DEBUG, "layer %d: %s: loss %.6g -> %.6g", (int)layer, role_name(l->role),
                l->loss_before, l->loss_after);
    }
    job_log(j, LOG_INFO, "layer %d: loss %.6g -> %.6g (%.1f %%)", (int)layer, before, after,
            before > 0 ? 100 * after / before : 100.);
}

static err_code search_layer(search *s, int32_t layer, const walk_progress *p, bool *advanced,
                             err *e)
{
    calib_block stats;
    block_plan plan;
    quant_block b = {.d = s->d,
                     .host = s->host,
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
        if (s->stream) TRY(stream_stats(&b, &stats, e));
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
    log_losses(s->j, layer, &plan);
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
    TRY(plan_spooled_layer(s->spool, s->m, s->q.group, layer, &f, &plan, e));
    err_code rc = turn_block(s, layer, &plan, e);
    if (rc == OK) rc = dev_chain_layer(s->dev_chain, e);
    if (rc == OK) rc = dev_replay_block(&b, &plan, p, e);
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
    const double start = clock_s(),
                 pause = 20 * s->save_cost > s->o->save_s ? 20 * s->save_cost : s->o->save_s;
    if (next >= s->m->layers || start - s->saved_at < pause) return OK;
    if (!saves(s)) return OK;
    const tensor states = layer_walk_saved(s->walk);
    TRY(spool_put_state(s->spool, next, &states, e));
    s->saved_at = clock_s();
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

/* Without the last layer there are no states to tell from: a plan that was finished up to its last
 * file. */
static err_code predict(search *s, bool walked, err *e)
{
    if (!carries(s) || !walked) return OK;
    moments_close(&s->moments); /* the head needs their memory more than they do */
    dev_scratch_close(&s->dev);
    dev_chain_close(&s->dev_chain);
    const tensor tokens = calib_tokens(s->calib), held_out = calib_held_out(s->calib);
    TRY(predict_losses(&s->predicted, s->kl, s->d, s->src, s->walk, &tokens, &held_out, s->j, e));
    const prediction *p = &s->predicted;
    if (p->windows)
        job_log(s->j, LOG_INFO,
                "perplexity of %d held-out windows: %.4f, with 16 bits %.4f (%+.2f %%)",
                (int)p->windows, exp(p->nll), exp(p->nll16), 100 * (exp(p->nll - p->nll16) - 1));
    return OK;
}

/* Where runs are compared, one that is done but for its prediction goes through its last layers
 * again. */
static bool goes_on(const search *s) { return s->bases || spool_count(s->spool) < s->m->layers; }

static err_code run_layers(search *s, err *e)
{
    const int32_t layers = s->m->layers;
    const int64_t per_layer = s->walk ? layer_walk_windows(s->walk) : 1;
    pace *const steps = &s->steps;
    bool walked = false;
    int32_t first;
    if (!steps->total)
        *steps = pace_open(s->j, "search", per_layer, (s->bases ? 2 : 1) * per_layer * layers);
    if (s->walk) s->pace = steps;
    TRY(first_layer(s, &first, e));
    s->saved_at = clock_s();
    for (int32_t l = first; l < layers && goes_on(s); l++) {
        bool advanced = false;
        pace_layer(steps, (int64_t)s->run * layers + l);
        walk_progress p = pace_pass(steps);
        TRY(job_check(s->j, e));
        TRY(one_layer(s, l, &p, &advanced, e));
        p = pace_pass(steps);
        if (s->walk && !advanced && l + 1 < layers)
            TRY(layer_walk_run(s->walk, false, NULL, NULL, &p, e));
        if (s->walk) TRY(save_states(s, l + 1, e));
        pace_end(steps);
        walked = l + 1 == layers;
    }
    s->pace = NULL;
    return predict(s, walked, e);
}

static hash128 parent_calib(const search *s)
{
    return s->calib ? calib_digest(s->calib) : (hash128){"none"};
}

#define REQUEST 512 /* text of what decides a plan's bytes */

static err_code open_spool(search *s, char request[REQUEST], search_summary *out, err *e)
{
    const hash128 calib = parent_calib(s);
    snprintf(request, REQUEST, "%s plan %d %s %s %s %s", TMF_VERSION, PLAN_VERSION,
             weights_digest(s->src), calib.hex, s->method->name, s->options);
    const hash128 print = hash_xxh128(request, strlen(request));
    const spool_opts o = {s->o->out_path, PLAN_KIND,    PLAN_VERSION,
                          print.hex,      s->m->layers, s->o->force};
    TRY(spool_open(&s->whole, &o, &out->fresh, e));
    s->spool = s->whole;
    return OK;
}

/* The moments of a layer lie where the chain's will, which come when they are done with. */
static err_code open_on_device(search *s, const tensor *held_out, err *e)
{
    dev_buf room;
    if (s->method->carries) {
        TRY(dev_chain_open(&s->dev_chain, s->d, s->walk, s->m, held_out, s->o->cache, e));
        room = dev_chain_room(s->dev_chain);
    }
    TRY(dev_scratch_open(&s->dev, s->d, s->m, s->q.group, search_use(s), s->dev_chain, e));
    return moments_open(&s->moments, s->d, s->walk, s->m, (size_t)s->o->gram_bytes,
                        s->dev_chain ? &room : NULL, e);
}

static err_code open_work(search *s, err *e)
{
    TRY(arena_init(&s->plan_mem, search_plan_bytes(s), "plan of a block", e));
    TRY(quant_scratch_init(&s->scratch, s->m, s->method->searches, e));
    const op_limits lim = search_limits(s);
    TRY(ops_reserve(s->d, &lim, e));
    if (!search_walks(s)) return OK;
    const tensor tokens = calib_tokens(s->calib);
    TRY(layer_walk_open(&s->walk, s->d, s->src, &tokens, e));
    const tensor held_out = calib_held_out(s->calib);
    if (search_on_device(s)) return open_on_device(s, &held_out, e);
    if (s->method->carries)
        TRY(chain_open(&s->chain, s->d, s->walk, s->m, &held_out, s->o->cache, e));
    return moments_open(&s->moments, s->d, s->walk, s->m, (size_t)s->o->gram_bytes, NULL, e);
}

err_code search_run_once(search *s, err *e)
{
    s->predicted = (prediction){0};
    TRY(search_open_source(s, e));
    TRY(open_work(s, e));
    return run_layers(s, e);
}

void search_close_work(search *s)
{
    moments_close(&s->moments);
    chain_close(&s->chain);
    layer_walk_close(&s->walk);
    dev_scratch_close(&s->dev);
    dev_chain_close(&s->dev_chain);
    quant_scratch_free(&s->scratch);
    arena_free(&s->plan_mem);
    mem_free(s->few);
    s->few = NULL;
    rotated_close(&s->turned);
    s->src = s->base;
    if (s->base) s->m = weights_desc(s->base);
}

err_code search_finish(search *s, const artifact_part *rotation, search_summary *out, err *e)
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
    return plan_finish(s->spool, &info, rotation, rotation ? 1 : 0, e);
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

/* The layers of one run, which become the plan. */
static err_code search_alone(search *s, search_summary *out, err *e)
{
    out->resumed = spool_count(s->spool);
    if (out->resumed)
        job_log(s->j, LOG_INFO, "resuming: %d of %d layers are done", (int)out->resumed,
                (int)s->m->layers);
    TRY(search_run_once(s, e));
    out->predicted = s->predicted;
    return search_finish(s, NULL, out, e);
}

err_code search_run(search_summary *out, device *d, const search_opts *o, const job *j, err *e)
{
    search s = {.o = o, .d = d, .j = j};
    char request[REQUEST];
    *out = (search_summary){0};
    err_code rc = search_open_inputs(&s, e);
    if (rc != OK) goto done;
    out->layers = s.m->layers;
    if ((rc = open_spool(&s, request, out, e)) != OK) goto done;
    if (out->fresh)
        rc = read_back(&s, out, e);
    else
        rc = s.bases ? search_both(&s, request, out, e) : search_alone(&s, out, e);
done:
    search_close_work(&s);
    spool_close(&s.whole);
    search_close_inputs(&s);
    return rc;
}
