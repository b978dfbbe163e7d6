/* Checks every variant of every op against its reference, and times the same cases: kcheck --help.
 * kcheck.c owns devices, guarded buffers, comparison and clock; kcases*.c own the cases. */
#ifndef TMF_TESTS_KCHECK_H
#define TMF_TESTS_KCHECK_H

#include "kernels/device.h"
#include "kernels/ops.h"

/* A tensor with guard bytes before, behind and between its rows. */
typedef struct {
    tensor t;
    uint8_t *raw;
    size_t bytes;
} kbuf;

typedef struct {
    const char *isa;
    device *dev[2]; /* 1 and 2 threads */
} kvariant;

typedef struct {
    device *ref;
    kvariant variant[4];
    int variants;
    const char *only; /* op names, or NULL for all */
    bool bench, slow;
    int threads; /* of --bench: 2, or 1: then the thread's CPU time counts, which other load
                    disturbs less */
    uint64_t seed, rng;
    int cases, failures;
    double worst[32];              /* error over tolerance by row of the tolerance table */
    double read_gbs, sgemm_gflops; /* measured at the start of --bench */
} kcheck;

/* Rows of dimension 0 lie `pad` elements apart beyond their length. Contents: all guard bytes. */
kbuf kb_new(dtype dt, int ndim, const int64_t *shape, int64_t pad);
kbuf kb_2d(dtype dt, int64_t rows, int64_t cols, int64_t pad);
kbuf kb_clone(const kbuf *b);
void kb_free(kbuf *b);
bool kb_guards_ok(const kbuf *b);
float kb_get(const kbuf *b, int64_t row, int64_t col); /* any float dtype, 2-d or less */
void kb_set(kbuf *b, int64_t row, int64_t col, float v);

double kc_uniform(kcheck *c); /* [0,1) */
double kc_normal(kcheck *c);
void kc_fill(kcheck *c, kbuf *b, double scale); /* normal values */
/* Zeros, one outlier a row, values of very different size: what breaks sloppy kernels. */
void kc_fill_wild(kcheck *c, kbuf *b, double scale);

typedef enum { /* rows of the tolerance table in kcases.c */
               TOL_EXACT,
               TOL_NORM,
               TOL_ADD,
               TOL_GEMM,
               TOL_GLU,
               TOL_ROPE,
               TOL_KV,
               TOL_ATTN,
               TOL_NLL,
               TOL_ABSSUM,
               TOL_GRAM,
               TOL_QUAD,
               TOL_MATMUL,
               TOL_CROSS,
               TOL_PRODUCT,
               TOL_W4,
               TOL_COUNT
} tol_row;
/* Largest |got - want| allowed, as a share of the case's `mag` (or of |want| where mag is NULL). */
double kc_tolerance(tol_row row, const char *isa);
const char *kc_tolerance_name(tol_row row);

#define KC_OUTS 3
typedef struct {
    const char *op;
    char label[120];
    err_code (*run)(device *d, void *arg, kbuf *out, err *e);
    void *arg;
    int outs;
    kbuf out[KC_OUTS];         /* templates: cloned before each run */
    const float *mag[KC_OUTS]; /* [elements of out] magnitude that errors scale with */
    tol_row tol[KC_OUTS];
    double flops, bytes; /* of one call; 0: not timed */
    bool cold;           /* timed with the caches flushed */
} kcase;
/* Reference, each variant at 1 and 2 threads, guards, comparison; with --bench the time as well. */
void kc_case(kcheck *c, const kcase *k);
void kc_fail(kcheck *c, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
bool kc_wants(const kcheck *c, const char *op);

void kcases_rows(kcheck *c);   /* embed, rmsnorm, add, glu, nll, absstat */
void kcases_matrix(kcheck *c); /* gemm, gram, cross, quad, matmul, product */
void kcases_attn(kcheck *c);   /* rope_kv, attn */

#endif
