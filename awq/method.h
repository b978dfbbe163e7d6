/* The table of quantization methods, and what a method is given. A method is one file
 * method_<name>.c and one line in method.c: it fills a block_plan, and everything around it (layer
 * loop, second moments, losses, resume, the artifact, packing) stays as it is. */
#ifndef TMF_AWQ_METHOD_H
#define TMF_AWQ_METHOD_H

#include "base/job.h"
#include "base/mem.h"
#include "formats/calib_file.h"
#include "formats/family.h"
#include "formats/plan_file.h"
#include "formats/weights.h"
#include "kernels/ops.h"

/* What errors are weighted by, when candidates are compared and in the losses that are reported. */
typedef enum {
    LOSS_WEIGHTS, /* nothing: the sum of squared weight errors (no calib file) */
    LOSS_BLOCKS,  /* the g x g diagonal blocks of H in the calib file: no forward pass needed */
    LOSS_GRAM,    /* tr(E H E^T) with the whole H, accumulated layer by layer */
    LOSS_MODULE /* ratios by the squared error of the attention's or FFN's output, as llm-awq does;
                     reported losses are LOSS_GRAM's */
} loss_kind;
const char *loss_name(loss_kind l);

/* Stages that best can do without, to tell what each of them brings. */
enum {
    STAGE_FACTORS = 1,     /* channel factors */
    STAGE_VO = 2,          /* those of v -> o */
    STAGE_RANGES = 4,      /* searched ranges: the weights' own instead */
    STAGE_SWEEPS = 8,      /* sweeps behind error feedback */
    STAGE_SCALES = 16,     /* sweeps that move scales */
    STAGE_CORRECTION = 32, /* weights corrected for rounded inputs */
    STAGE_RESIDUAL = 64,   /* o and down take a share of the residual stream's error */
    STAGE_HELD_OUT = 128,  /* falling back by windows held out */
};

typedef struct {
    int32_t group;
    loss_kind loss;
    bool kv_fold; /* k and v have factors already, for the cache, when a method comes to a block */
    bool turn;    /* they may have other bases too */
    uint32_t without; /* STAGE_ bits */
} quant_opts;

typedef struct quant_scratch quant_scratch; /* awq/measure.h */
typedef struct moment_source moment_source; /* awq/moments.h */
typedef struct layer_walk layer_walk;       /* runtime/layer_walk.h */
typedef struct chain chain;                 /* awq/chain.h */
typedef struct dev_scratch dev_scratch;     /* awq/on_device.h */
typedef struct dev_chain dev_chain;         /* awq/dev_chain.h */

/* What a linear is to become where that is not its own weights: corrected for the error of its
 * inputs, f32 [n,k]; and H of the input that it will have, f32 [k,k]. */
typedef struct {
    tensor_role role;
    tensor w, h;
} linear_target;

/* One block as a method sees it; everything is borrowed for the call. */
typedef struct {
    device *d;
    device *host;    /* a CPU, for what is done there whatever d is; NULL: d is one */
    weight_src *src; /* dense */
    const model_desc *m;
    const family *fam;
    int32_t layer;
    const quant_opts *o;
    const calib_block *stats;    /* NULL without a calib file */
    moment_source *moments;      /* H by tap; NULL unless LOSS_GRAM or LOSS_MODULE */
    layer_walk *walk;            /* the bound block and the states that enter it; NULL likewise */
    chain *chain;                /* NULL unless the method carries rounded inputs on */
    const linear_target *target; /* of one linear; NULL: none */
    quant_scratch *scratch;
    dev_scratch *dev; /* NULL: the device's memory is the host's, and the steps run there */
    arena *mem;       /* what the plan points to: factors and codes */
    const job *j;
    struct pace *pace; /* told of each step (awq/pace.h); NULL: nobody asks */
} quant_block;

enum { METHOD_CALIB = 1 }; /* what a method cannot do without */

typedef struct {
    const char *name, *summary;
    uint32_t needs;
    loss_kind loss;   /* its own choice when --loss is not given and there is a calib file */
    bool searches;    /* compares candidates: LOSS_MODULE means something */
    bool fixes_codes; /* fills plan_linear.codes */
    bool stages;      /* quant_opts.without means something */
    bool folds;       /* lets a plan's factors count: quant_opts.kv_fold means something */
    bool carries; /* rounds a layer with the inputs that the rounded layers before it leave: walks
                         through b->chain, fills in the losses, and moves the states on itself */
    /* out comes from plan_shape with scale and zero allocated; factors come from b->mem
     * (plan_factors). */
    err_code (*plan_block)(const quant_block *b, block_plan *out, err *e);
} quant_method;

extern const quant_method method_rtn, method_lmdeploy, method_awq, method_gptq, method_best;
const quant_method *method_find(const char *name); /* NULL when unknown */
const quant_method *method_at(int i);              /* NULL behind the last */

/* A group's factors, taken from b->mem and entered into `out`. */
err_code plan_factors(const quant_block *b, block_plan *out, tensor_role source, float **s, err *e);
/* Bytes of b->mem that any method may use for a block. */
size_t plan_factors_bytes(const model_desc *m, bool codes);

#endif
