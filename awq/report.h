/* What a plan did to every linear, read back from the plan, the calib file and the weights: as
 * JSON, and as an HTML page that needs nothing beside it. */
#ifndef TMF_AWQ_REPORT_H
#define TMF_AWQ_REPORT_H

#include "awq/search.h"
#include "base/json.h"

#define REPORT_OUTLIERS 4

typedef struct {
    tensor_role role;
    int64_t n, k;
    double before, after; /* losses, as the plan has them */
    bool few;             /* its input saw too few tokens for more than ranges (few.h) */
    double kept;          /* mean share of a group's range that its scale spans */
} report_linear;

typedef struct {
    tensor_role source;
    double least, most; /* of the factors */
    double ratio; /* slope of log factor over log mean |x|; NaN where there are no statistics, or
                     only of other channels: the residual stream is turned */
} report_factors;

typedef struct {
    tensor_role tap;
    int32_t
        channel[REPORT_OUTLIERS];  /* largest |x|, descending; -1 where there are fewer channels */
    double times[REPORT_OUTLIERS]; /* over the median channel's */
} report_input;

typedef struct {
    report_linear linear[PLAN_LINEARS];
    int n_linears;
    report_factors factors[PLAN_FOLDS];
    int n_factors;
    report_input input[CALIB_TAPS];
    int n_inputs;
} report_layer;

typedef struct {
    report_layer *layer; /* [layers] */
    int32_t layers, group;
    char method[32], loss[16];
    prediction predicted;
    basis_choice basis;
    bool turned; /* the plan turns the residual stream */
} report;

/* Reads o's model, calib file (may be NULL) and finished plan. */
err_code report_make(report *out, device *d, const search_opts *o, const search_summary *s,
                     const job *j, err *e);
void report_free(report *r);
/* Adds "linears", "factors", "outliers", "predicted" and "residual_stream" to an object; false when
 * out of memory. */
bool report_add(const report *r, cJSON *to);
/* Written beside `path` and renamed; an existing file is replaced with `force` only. */
err_code report_html(const report *r, const char *path, bool force, err *e);

#endif
