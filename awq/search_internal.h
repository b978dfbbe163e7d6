/* What the files of awq-search's library call share: its inputs (search_inputs.c), the loop over
 * the layers (search.c), and two runs in different bases (search_bases.c). */
#ifndef TMF_AWQ_SEARCH_INTERNAL_H
#define TMF_AWQ_SEARCH_INTERNAL_H

#include "awq/chain.h"
#include "awq/dev_chain.h"
#include "awq/measure.h"
#include "awq/moments.h"
#include "awq/on_device.h"
#include "awq/pace.h"
#include "awq/rotate.h"
#include "awq/search.h"
#include "runtime/layer_walk.h"

typedef struct {
    const search_opts *o;
    device *d, *host; /* host: opened here, for what a device has no part in; or NULL */
    const job *j;
    weight_src *base, *src; /* the model, and as it is searched: maybe in other bases */
    rotated *turned;        /* of src; NULL: src is base */
    bool bases;             /* the residual stream as it is and turned are compared */
    bool stream;            /* it is turned in this run */
    const model_desc *m;
    const family *fam;
    calib_file *calib;
    const quant_method *method;
    quant_opts q;
    layer_walk *walk;
    moment_source *moments;
    chain *chain; /* NULL unless the method carries rounded inputs on */
    quant_scratch scratch;
    dev_scratch *dev;           /* NULL: the device's memory is the host's */
    dev_chain *dev_chain;       /* there in place of chain */
    arena plan_mem;             /* scales and zeros of a block, then what the method adds */
    void *few;                  /* statistics of few tokens, of the layer at work */
    spool *whole;               /* the target's, which holds the lock */
    spool *spool;               /* borrowed: where this run's layers lie */
    pace steps;                 /* of all runs */
    pace *pace;                 /* to steps; NULL: nothing walks */
    int32_t run;                /* how many runs were before this one */
    float *kl;                  /* of the tokens held out (predict.h); NULL: not asked */
    prediction predicted;       /* of this run; no windows: not known */
    double saved_at, save_cost; /* seconds: when the states were saved last, what it took */
    char options[192];
} search;

#define SEARCH_SEED 1 /* of the residual stream's turn (rotate_random); in a plan's options */

/* ---- search_inputs.c ---- */
err_code search_open_inputs(search *s, err *e);
/* What is searched, where that is not the model as it is: s->stream and q.turn say so. */
err_code search_open_source(search *s, err *e);
void search_close_inputs(search *s);
bool search_walks(const search *s); /* needs a forward pass */
bool search_on_device(const search *s);
int32_t search_held_out(const search *s); /* windows */
bool search_all_moments(const search *s);
dev_use_of search_use(const search *s);
size_t search_plan_bytes(const search *s);
op_limits search_limits(const search *s);

/* ---- search.c ---- */
/* One run over all layers into s->spool, and what it loses on windows held out. */
err_code search_run_once(search *s, err *e);
/* What it took; its source is the model again. */
void search_close_work(search *s);
/* Writes the plan from the layers of s->spool. */
err_code search_finish(search *s, const artifact_part *rotation, search_summary *out, err *e);

/* ---- search_bases.c ---- */
/* Runs with the residual stream as it is and turned; the better one becomes the plan. request: what
 * the fingerprints of both begin with. */
err_code search_both(search *s, const char *request, search_summary *out, err *e);
size_t search_bases_bytes(const search *s);

#endif
