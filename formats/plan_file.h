/* The plan artifact: what a method decided, whatever the method. One safetensors file
 * (docs/formats.md "Plan file"): layers.<i>.fold.<source>   f32 [c]    factors s of a channel
 * group: the source's rows take 1/s, what reads those channels takes s layers.<i>.<linear>.scale
 * f16 [n,k/g]   W' = (code - zero) * scale, W' the weight with its factors layers.<i>.<linear>.zero
 * u8  [n,k/g]   0..15 layers.<i>.<linear>.codes  u8  [n,k/2]   only where the method fixed them:
 * low nibble first; without them code = clamp(rne(W'/scale) + zero, 0, 15) layers.<i>.<linear>.loss
 * f64 [2]       before (plain rounding) and after; layers.<i>.turn.k and .v: see block_plan
 * rotation.<name> f32 [d,d] optional, orthogonal, by name
 * Sources: attn_norm (read by q k v), ffn_norm (gate up), up (down); v (o, one factor per KV head
 * and dim, [kv_heads*D]); k (q, the same shape). */
#ifndef TMF_FORMATS_PLAN_FILE_H
#define TMF_FORMATS_PLAN_FILE_H

#include "formats/artifact.h"
#include "formats/model.h"
#include "formats/spool.h"

#define PLAN_KIND    "plan"
#define PLAN_VERSION 1
#define PLAN_FOLDS   5
#define PLAN_LINEARS 7

typedef struct {
    tensor_role source;
    tensor s; /* f32 [c], data NULL when the method leaves this group alone */
} plan_fold;

typedef struct {
    tensor_role role;
    tensor scale; /* f16 [n,k/g] */
    tensor zero;  /* u8 [n,k/g] */
    tensor codes; /* u8 [n,k/2], data NULL when rounding gives them */
    double loss_before, loss_after;
} plan_linear;

typedef struct {
    plan_fold fold[PLAN_FOLDS]; /* always all five sources, in the order of plan_shape */
    plan_linear linear[PLAN_LINEARS];
    int n_linears;
    /* Other bases of keys and values, data NULL: none. The above is about weights in them. */
    tensor turn_k; /* f32 [kv_heads,rope_dims/2]: angles by which the pairs of q and k turn */
    tensor turn_v; /* f32 [kv_heads*D,D]: M by head, v becomes v M and o's columns follow */
} block_plan;
/* The folds and linears of a block of this model with their shapes set and no data. */
block_plan plan_shape(const model_desc *m, int32_t group);
plan_fold *plan_find_fold(block_plan *b, tensor_role source); /* NULL when there is none */
plan_linear *plan_find_linear(block_plan *b, tensor_role r);  /* NULL when there is none */

typedef struct {
    int32_t layers, group;
    const char *method;  /* "awq" */
    const char *options; /* JSON of the method's options */
    const char *loss;    /* what the losses measure: "gram", "blocks", "module", "weights" */
    const char *model;   /* weights_digest of the parent */
    const char *calib;   /* calib_digest of the parent; "none" for a method without one */
} plan_info;

/* ---- reading ---- */
typedef struct plan_file plan_file;
err_code plan_open(plan_file **out, const char *path, err *e);
err_code plan_open_memory(plan_file **out, const void *data, size_t size, const char *name,
                          err *e); /* borrowed */
void plan_close(plan_file **f);
const plan_info *plan_info_of(const plan_file *f);
hash128 plan_digest(const plan_file *f);
/* Views into the file. Values are checked: factors finite and positive, scales finite and positive,
 * zeros up to 15 (E_INPUT naming layer, part and place). */
err_code plan_layer(const plan_file *f, int32_t layer, block_plan *view, err *e);
bool plan_rotation(const plan_file *f, const char *name,
                   tensor *view); /* f32 [d,d]; false when absent */
int plan_rotation_count(const plan_file *f);
/* E_INPUT with both digests unless made from the model with this digest; E_INPUT when layers or
 * shapes are not the model's. */
err_code plan_check_model(const plan_file *f, const model_desc *m, const char *digest, err *e);

/* ---- writing ---- */
err_code plan_put_layer(spool *s, int32_t layer, const block_plan *b, err *e);
/* rotations: named "rotation.<name>"; n_rotations may be 0. */
err_code plan_finish(spool *s, const plan_info *info, const artifact_part *rotations,
                     int64_t n_rotations, err *e);
/* Losses of a layer that lies in the spool: for the summary of a resumed run. */
err_code plan_spooled_loss(const spool *s, int32_t layer, double *before, double *after, err *e);
/* A layer that lies in the spool, as plan_layer gives it, its shapes those of the model; *out holds
 * what it points to: plan_close. */
err_code plan_spooled_layer(const spool *s, const model_desc *m, int32_t group, int32_t layer,
                            plan_file **out, block_plan *view, err *e);

#endif
