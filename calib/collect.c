/* The layer loop of calibration. */
#include "calib/collect.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "calib/observer.h"
#include "formats/calib_file.h"
#include "runtime/clock.h"
#include "runtime/layer_walk.h"

typedef struct {
    const collect_opts *o;
    const job *j;
    device *d;
    weight_src *src;
    const model_desc *m;
    const tensor *tokens;
    uint8_t *held_out; /* [samples] */
    layer_walk *walk;
    observer *seen;
    spool *spool;
    double saved_at, save_cost; /* seconds: when the states were saved last, what it took */
} collect;

void collect_memory(memory_plan *p, device *d, weight_src *src, int32_t samples, int32_t seqlen)
{
    const model_desc *m = weights_desc(src);
    memory_plan_add(p, "hidden states and forward pass",
                    layer_walk_bytes(d, m, src, samples, seqlen));
    memory_plan_add(p, "statistics of a block", observer_bytes(d, m));
}

static err_code collect_layer(collect *c, int32_t layer, const walk_progress *p, err *e)
{
    calib_block b;
    TRY(observer_reset(c->seen, e));
    TRY(layer_walk_run(c->walk, false, observer_tap, c->seen, p, e));
    TRY(observer_finish(c->seen, layer, &b, e));
    return calib_put_layer(c->spool, layer, &b, e);
}

/* Saving may cost at most a twentieth of the time: then an interruption costs little and so does
 * the insurance. */
static err_code save_states(collect *c, int32_t next, err *e)
{
    const double start = clock_s(),
                 pause = 20 * c->save_cost > c->o->save_s ? 20 * c->save_cost : c->o->save_s;
    if (next >= c->m->layers || start - c->saved_at < pause) return OK;
    const tensor states = layer_walk_states(c->walk);
    TRY(spool_put_state(c->spool, next, &states, e));
    c->saved_at = clock_s();
    c->save_cost = c->saved_at - start;
    return OK;
}

/* Where to go on: the layer whose states were saved, unless a layer before it is damaged. */
static err_code first_layer(collect *c, int32_t *first, err *e)
{
    tensor states = layer_walk_states(c->walk);
    TRY(spool_get_state(c->spool, first, &states, e));
    for (int32_t i = 0; i < *first; i++)
        if (!spool_has(c->spool, i)) {
            *first = 0;
            return layer_walk_restart(c->walk, c->tokens, e);
        }
    return OK;
}

static err_code run_layers(collect *c, err *e)
{
    const int64_t windows = c->tokens->shape[0], total = windows * c->m->layers;
    int32_t first;
    TRY(first_layer(c, &first, e));
    c->saved_at = clock_s();
    for (int32_t l = first; l < c->m->layers && spool_count(c->spool) < c->m->layers; l++) {
        const walk_progress p = {c->j, "collect", l * windows, total};
        TRY(layer_walk_bind(c->walk, l, e));
        if (spool_has(c->spool, l))
            TRY(layer_walk_run(c->walk, false, NULL, NULL, &p, e));
        else
            TRY(collect_layer(c, l, &p, e));
        TRY(save_states(c, l + 1, e));
    }
    return OK;
}

static err_code open_spool(collect *c, collect_summary *out, err *e)
{
    hash_xxh *h = NULL;
    char text[512];
    TRY(hash_xxh_open(&h, e));
    const int n = snprintf(text, sizeof text, "%s calib %d %s %s %d %d ", TMF_VERSION,
                           CALIB_VERSION, weights_digest(c->src), c->o->tokenizer,
                           (int)c->tokens->shape[0], (int)c->tokens->shape[1]);
    hash_xxh_add(h, text, (size_t)n);
    hash_xxh_add(h, c->o->options, strlen(c->o->options));
    hash_xxh_add(h, c->tokens->data, tensor_bytes(c->tokens));
    const hash128 print = hash_xxh_end(&h);
    const spool_opts o = {c->o->out_path, CALIB_KIND,   CALIB_VERSION,
                          print.hex,      c->m->layers, c->o->force};
    TRY(spool_open(&c->spool, &o, &out->fresh, e));
    if (!out->fresh) out->resumed = spool_count(c->spool);
    if (out->resumed)
        job_log(c->j, LOG_INFO, "resuming: %d of %d layers are done", (int)out->resumed,
                (int)c->m->layers);
    return OK;
}

static err_code mark_held_out(collect *c, collect_summary *out, err *e)
{
    TRY(mem_alloc((void **)&c->held_out, (size_t)out->samples, 1, "windows", e));
    for (int32_t i = CALIB_HELD_OUT_EVERY - 1; i < out->samples; i += CALIB_HELD_OUT_EVERY) {
        c->held_out[i] = 1;
        out->held_out++;
    }
    return OK;
}

static err_code finish(collect *c, err *e)
{
    const calib_info info = {.layers = c->m->layers,
                             .samples = (int32_t)c->tokens->shape[0],
                             .seqlen = (int32_t)c->tokens->shape[1],
                             .model = weights_digest(c->src),
                             .tokenizer = c->o->tokenizer,
                             .options = c->o->options};
    const tensor held_out = tensor_1d(c->held_out, DT_U8, c->tokens->shape[0]);
    return calib_finish(c->spool, &info, c->tokens, &held_out, e);
}

err_code collect_run(collect_summary *out, device *d, weight_src *src, const tensor *tokens,
                     const collect_opts *o, const job *j, err *e)
{
    collect c = {.o = o, .j = j, .d = d, .src = src, .m = weights_desc(src), .tokens = tokens};
    err_code rc;
    *out = (collect_summary){.layers = c.m->layers,
                             .samples = (int32_t)tokens->shape[0],
                             .seqlen = (int32_t)tokens->shape[1]};
    if (c.m->experts)
        return err_set(e, E_UNSUPPORTED, "%s: mixtures of experts are not supported",
                       weights_path(src));
    if ((rc = mark_held_out(&c, out, e)) != OK) goto done;
    if ((rc = open_spool(&c, out, e)) != OK || out->fresh) goto done;
    if ((rc = layer_walk_open(&c.walk, d, src, tokens, e)) != OK) goto done;
    if ((rc = observer_open(&c.seen, d, c.m, e)) != OK) goto done;
    if ((rc = run_layers(&c, e)) != OK) goto done;
    rc = finish(&c, e);
done:
    spool_close(&c.spool);
    observer_close(&c.seen);
    layer_walk_close(&c.walk);
    mem_free(c.held_out);
    return rc;
}
