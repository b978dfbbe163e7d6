/* The factors of a block's channel groups, expanded to what each linear takes: W'[n][k] = W[n][k] *
 * col[k] / row[n]. Search and packing both go through here, so the weights they round are the same
 * bits. */
#ifndef TMF_AWQ_FOLD_H
#define TMF_AWQ_FOLD_H

#include "formats/plan_file.h"
#include "formats/weights.h"

typedef struct {
    tensor_role role;
    float *row; /* [n] or NULL: 1 */
    float *col; /* [k] or NULL: 1 */
} fold_linear;

typedef struct {
    fold_linear linear[PLAN_LINEARS];
    int n_linears;
    const float
        *norm[2]; /* attn_norm, ffn_norm: [hidden] divisors, borrowed from the plan; NULL: 1 */
} fold;

/* Factors of every linear of the block from the plan's folds; the plan's data is borrowed. */
err_code fold_init(fold *f, const model_desc *m, const block_plan *p, err *e);
void fold_free(fold *f);
const fold_linear *fold_find(const fold *f, tensor_role r);

/* Where head h of a part (ROLE_Q, ROLE_K, ROLE_V) begins among the rows of the fused projection, or
 * of its own linear. */
int64_t fold_head_row(const model_desc *m, tensor_role part, int32_t h);
/* Where it begins among the columns of what q, k and v come to, side by side. */
int64_t fold_head_col(const model_desc *m, tensor_role part, int32_t h);
/* The two dims of a head that RoPE turns into each other. */
void fold_rope_pair(const model_desc *m, int64_t i, int64_t *a, int64_t *b);

/* Rows [from, from+n) of a dense linear as f32 [n,k], contiguous, with its factors (l NULL:
 * without). E_INPUT "layer 3: gate: row 5 column 7: ..." when a result is not finite. */
err_code fold_rows(tensor *out, const tensor *dense, const fold_linear *l, int64_t from, int64_t n,
                   int32_t layer, tensor_role r, err *e);
/* bias [n] as f32 with the row factors; norm [hidden] as f32 divided by `div` (NULL: 1). */
err_code fold_bias(float *out, const tensor *bias, const fold_linear *l, int32_t layer,
                   tensor_role r, err *e);
err_code fold_norm(float *out, const tensor *norm, const float *div, int32_t layer, tensor_role r,
                   err *e);

#endif
