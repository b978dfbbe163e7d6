/* awq-search as a library call: model and calib file in, plan file out, layer by layer with resume.
 */
#ifndef TMF_AWQ_SEARCH_H
#define TMF_AWQ_SEARCH_H

#include "awq/method.h"
#include "awq/predict.h"
#include "runtime/memory_plan.h"

typedef struct {
    const char *model_dir;
    const char *calib_path; /* NULL: none, for methods that can do without */
    const char *out_path;
    const char *method;
    const char *loss; /* NULL: the method's own; "blocks", "gram", "module" */
    int32_t group;
    int kv_fold; /* factors of k and v for a 4-bit cache: 1 yes, 0 no, -1 as the method does */
    /* By commas: "vo", of keys and values where their 4-bit error gains; "residual", of the stream
     * where held-out windows gain, after a search of either; "none", and NULL: none. */
    const char *rotate;
    const char *without; /* names of best's stages to leave out, by commas; NULL: none */
    int64_t gram_bytes;  /* second moments beyond this are gathered one at a time */
    double save_s;       /* least seconds between two savings of the hidden states */
    kv_format cache;     /* of methods that carry rounded inputs: what these are behind */
    bool force;
    bool on_device; /* the steps of other devices on the CPU as well: for tests */
} search_opts;

/* The residual stream as it is and turned, by KL divergence from the 16-bit model. */
typedef struct {
    bool compared;           /* else nothing is known */
    bool turned;             /* the plan turns it */
    prediction still, other; /* as it is; turned */
    double gain, error;      /* nats a token that turning it takes off the divergence, and the
                                standard error of that, which it must exceed */
} basis_choice;

typedef struct {
    int32_t layers, resumed; /* layers taken over from a killed run, of all its searches */
    bool fresh;              /* the plan was there already */
    double before, after;    /* sums over all layers */
    const char *loss;        /* what they measure */
    prediction predicted;    /* of methods that carry rounded inputs on; no windows: not known */
    basis_choice basis;      /* with rotate "residual" */
} search_summary;

/* What the run will hold; reads headers only. */
err_code search_memory(memory_plan *p, device *d, const search_opts *o, err *e);
/* E_CANCELED leaves finished layers in "<out_path>.part". */
err_code search_run(search_summary *out, device *d, const search_opts *o, const job *j, err *e);

#endif
