/* Ops of calibration and search on a device whose memory the host cannot read; on the CPU their
 * references (search_ref.c), which define them. All tensors lie in the device's space; n rows of
 * weights, k inputs, g group. Rows may be strided where nothing else is said. As all ops they
 * neither allocate nor sync, and their sums have a fixed order. */
#ifndef TMF_KERNELS_SEARCH_OPS_H
#define TMF_KERNELS_SEARCH_OPS_H

#include "kernels/ops.h"

/* ---- rows ---- */
err_code op_zero(device *d, tensor *t, err *e); /* contiguous */
/* y [m,k] = alpha a + beta b, each f16, bf16 or f32; b NULL: alpha a. Beyond f16: infinity. y may
 * be a. */
err_code op_mix(device *d, tensor *y, float alpha, const tensor *a, float beta, const tensor *b,
                err *e);
/* out f64 [m] = sum over k of a b, f32 or bf16 [m,k] */
err_code op_row_dots(device *d, tensor *out, const tensor *a, const tensor *b, err *e);

/* ---- second moments ---- */
/* h f32 [k/g,g,g] += the diagonal blocks of x^T x, x act [m,k]; both triangles */
err_code op_gram_blocks(device *d, tensor *h, const tensor *x, err *e);
/* y f32 [n,k] += a^T b, a act [m,n], b act [m,k]; y contiguous */
err_code op_cross(device *d, tensor *y, const tensor *a, const tensor *b, err *e);
err_code op_diagonal(device *d, tensor *out, const tensor *h, err *e); /* f32 [k] of f32 [k,k] */
/* out f64 [m] = x_i H x_i^T as op_quad, with work f32 [m,k] for x H; x and h both f32 or both bf16;
 * products may round f32 to 11 bits (CUDA) */
err_code op_form(device *d, tensor *out, const tensor *x, const tensor *h, tensor *work, err *e);

/* ---- weights ---- */
/* y f32 [n,k] = w * col / row; w f16, bf16 or f32; col f32 [k], row f32 [n], or NULL: 1 */
err_code op_scaled(device *d, tensor *y, const tensor *w, const tensor *col, const tensor *row,
                   err *e);
/* sum f64 [k] += |w| / (the largest |w| of its row's group + eps); w as in op_scaled */
err_code op_relative_sum(device *d, tensor *sum, const tensor *w, int32_t g, double eps, err *e);
/* y f32 or bf16 [n,k] = Q(w s) / s - w under plain rounding (quant_group.h); w as in op_scaled,
 * s f32 [k] */
err_code op_try_factors(device *d, tensor *y, const tensor *w, const tensor *s, int32_t g, err *e);
/* y f32 or f16 [n,k] = w' / col * row: of codes u8 [n,k/2] (low nibble first) where there are some,
 * else of w f32 [n,k] rounded; scale f16 [n,k/g], zero u8 [n,k/g] */
typedef struct {
    const tensor *w, *codes; /* one of them */
    const tensor *scale, *zero;
    const tensor *col, *row; /* f32 [k], [n]; NULL: 1 */
    int32_t g;
} rounded_spec;
err_code op_rounded(device *d, tensor *y, const rounded_spec *r, err *e);

/* ---- ranges ---- */
/* scale f16 [n,k/g] and zero u8 [n,k/g] of w f32 [n,k] (weights with their factors): for every row
 * and group the best of a grid by e H e^T, e the group's error / col and H its diagonal block.
 * `points` shares 1 - i shrink / points of the largest |w| clamp both ends (awq); `ends`: shares of
 * either end of the range, both together first, then each with the other as it is best. The first
 * of equals wins; one point is plain rounding. g 32, 64 or 128. */
typedef struct {
    const tensor *h;   /* f32 [k,k], or [k/s,s,s] with g dividing s */
    const tensor *col; /* f32 [k]; NULL: 1 */
    int32_t g;
    int points;
    double shrink;
    bool ends;
} range_spec;
err_code op_range(device *d, tensor *scale, tensor *zero, const tensor *w, const range_spec *r,
                  err *e);

/* ---- solving ---- */
/* E_UNSUPPORTED where the device cannot run the ops from here on. */
err_code op_rounds(device *d, err *e);
/* y f32 [k,k] = h[o_i][o_j] / (c_i c_j), order i32 [k] into h and col (f32 [k] or NULL: 1), with
 * `add` on the diagonal; contiguous */
err_code op_reorder(device *d, tensor *y, const tensor *h, const tensor *order, const tensor *col,
                    float add, err *e);
/* a f32 [k,k] = L L^T: L into the lower triangle of a, contiguous; what lies above is lost. failed
 * i32 [1] becomes 1 where a is not positive. */
err_code op_factor(device *d, tensor *a, tensor *failed, err *e);
/* The lower triangle becomes its inverse. */
err_code op_invert(device *d, tensor *a, err *e);
/* Rows and columns from the other end: a lower triangle becomes an upper one. */
err_code op_reverse(device *d, tensor *a, err *e);
/* x f32 [n,k] = x (L L^T)^-1, contiguous */
err_code op_solve(device *d, tensor *x, const tensor *l, err *e);

/* ---- rounding ---- */
/* What the next ops share: codes u8 [n,k], scale f16 [n,k/g], zero u8 [n,k/g]; all contiguous. work
 * f32 [n,128]. g 32, 64 or 128. */
typedef struct {
    tensor codes, scale, zero, work;
    int32_t g;
} round_state;
/* Rounds w f32 [n,k] (lost; its columns in the order of `order` i32 [k], the input of each place)
 * column by column; the error of each over u's diagonal goes to the columns behind it, along u f32
 * [k,k], the upper factor of H^-1 in that order. */
err_code op_feedback(device *d, round_state *s, tensor *w, const tensor *u, const tensor *order,
                     err *e);
/* y f32 [n,k] = w with its columns in that order */
err_code op_by_place(device *d, tensor *y, const tensor *w, const tensor *order, err *e);
/* y f32 [n,k] = (w' - w) / col; y may be w; col f32 [k] or NULL: 1 */
err_code op_code_errors(device *d, tensor *y, const round_state *s, const tensor *w,
                        const tensor *col, err *e);
/* With x = ((w' - w) / col) H, h f32 [k,k]: 128 inputs after the other, each code moves to where
 * the loss, all else fixed, is least, then, with `refit`, each scale. x is kept up to date. */
err_code op_sweep(device *d, round_state *s, tensor *x, const tensor *h, const tensor *col,
                  bool refit, err *e);
/* out u8 [n,k/2]: codes, low nibble first; of w f32 [n,k] rounded where there are some, else of
 * s->codes. */
err_code op_pack_codes(device *d, tensor *out, const round_state *s, const tensor *w, err *e);

/* ---- folds for a 4-bit cache ---- */
/* x act [m,heads,D], rows and heads strided: turned in place to its positions pos i32 [m], as
 * op_rope_kv turns (ops.h); r->inv_freq in the device's space. */
err_code op_turn(device *d, tensor *x, const tensor *pos, const rope_spec *r, err *e);
/* y f32 [c*n,k] = Q(x / s_i) s_i - x for each of c factors s f32 [c,k], one behind the other, of
 * x act [n,k]: Q as the cache rounds a token's head to 4 bits (ops.h); y and s contiguous */
err_code op_cache_errors(device *d, tensor *y, const tensor *x, const tensor *s, err *e);
/* One row of it, on the host. */
void search_cache_row(float *y, const float *x, const float *s, int64_t k);

typedef struct search_ops {
    err_code (*zero)(device *, tensor *, err *);
    err_code (*mix)(device *, tensor *, float, const tensor *, float, const tensor *, err *);
    err_code (*row_dots)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*gram_blocks)(device *, tensor *, const tensor *, err *);
    err_code (*cross)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*diagonal)(device *, tensor *, const tensor *, err *);
    err_code (*form)(device *, tensor *, const tensor *, const tensor *, tensor *, err *);
    err_code (*scaled)(device *, tensor *, const tensor *, const tensor *, const tensor *, err *);
    err_code (*relative_sum)(device *, tensor *, const tensor *, int32_t, double, err *);
    err_code (*try_factors)(device *, tensor *, const tensor *, const tensor *, int32_t, err *);
    err_code (*rounded)(device *, tensor *, const rounded_spec *, err *);
    err_code (*range)(device *, tensor *, tensor *, const tensor *, const range_spec *, err *);
    err_code (*rounds)(device *, err *); /* NULL: always */
    err_code (*reorder)(device *, tensor *, const tensor *, const tensor *, const tensor *, float,
                        err *);
    err_code (*factor)(device *, tensor *, tensor *, err *);
    err_code (*invert)(device *, tensor *, err *);
    err_code (*reverse)(device *, tensor *, err *);
    err_code (*solve)(device *, tensor *, const tensor *, err *);
    err_code (*by_place)(device *, tensor *, const tensor *, const tensor *, err *);
    err_code (*feedback)(device *, round_state *, tensor *, const tensor *, const tensor *, err *);
    err_code (*code_errors)(device *, tensor *, const round_state *, const tensor *, const tensor *,
                            err *);
    err_code (*sweep)(device *, round_state *, tensor *, const tensor *, const tensor *, bool,
                      err *);
    err_code (*pack_codes)(device *, tensor *, const round_state *, const tensor *, err *);
    err_code (*turn)(device *, tensor *, const tensor *, const rope_spec *, err *);
    err_code (*cache_errors)(device *, tensor *, const tensor *, const tensor *, err *);
} search_ops;
extern const search_ops search_ops_ref, search_ops_cuda;

#endif
