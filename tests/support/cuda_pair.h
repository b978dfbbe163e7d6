/* What tests of a CUDA device against the CPU's references share: both devices, tensors on either,
 * guards behind outputs, distances, and random 4-bit weights. */
#ifndef TMF_TESTS_CUDA_PAIR_H
#define TMF_TESTS_CUDA_PAIR_H

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/half.h"
#include "support/cuda_case.h"

#define PAD   8      /* elements between rows of outputs */
#define GUARD 0x5a5a /* what lies there */

static device *cpu;
static bool few; /* one shape of each kind: a sanitizer makes kernels many times slower */

/* Values that f16 holds; every 40th some times as large. */
static inline float *values(int64_t n, double scale)
{
    float *v = must((size_t)n, sizeof *v);
    for (int64_t i = 0; i < n; i++) {
        const double x = (uniform() + uniform() + uniform() - 1.5) * 2 * scale * (i % 40 ? 1 : 12);
        v[i] = f16_to_f32(f32_to_f16((float)x));
    }
    return v;
}

/* A device tensor [m,k] with `pad` elements behind each row, from f32 values (NULL: guards
 * everywhere). */
static inline tensor upload(dev_buf *b, dtype dt, int64_t m, int64_t k, int64_t pad, const float *v)
{
    const int64_t ld = k + pad, all = m * ld;
    uint16_t *half = must((size_t)all, 4);
    float *wide = (float *)half;
    for (int64_t i = 0; i < all; i++) {
        const bool in = i % ld < k && v;
        const float x = in ? v[i / ld * k + i % ld] : 0;
        if (dt == DT_F16)
            half[i] = in ? f32_to_f16(x) : GUARD;
        else
            wide[i] = in ? x : (float)GUARD;
    }
    const tensor src = tensor_2d(half, dt, m, ld);
    tensor t = on_gpu(b, src);
    OK_(dev_copy(gpu, &t, &src, e));
    OK_(dev_sync(gpu, e));
    mem_free(half);
    t.shape[1] = k;
    return t;
}

/* Values of a tensor made by upload; checks the guards. */
static inline float *download(const tensor *t, const char *what)
{
    const int64_t m = t->shape[0], k = t->shape[1], ld = t->stride[0];
    tensor dev = tensor_2d(t->data, t->dt, m, ld), host = dev;
    uint16_t *half = must((size_t)(m * ld), 4);
    const float *wide = (const float *)half;
    float *out = must((size_t)(m * k), sizeof *out);
    dev.mem = dev_mem(gpu);
    host.data = half;
    OK_(dev_copy(gpu, &host, &dev, e));
    OK_(dev_sync(gpu, e));
    for (int64_t i = 0; i < m * ld; i++) {
        if (i % ld < k)
            out[i / ld * k + i % ld] = t->dt == DT_F16 ? f16_to_f32(half[i]) : wide[i];
        else
            ck_assert_msg(t->dt == DT_F16 ? half[i] == GUARD : wide[i] == (float)GUARD,
                          "%s: wrote behind row %lld", what, (long long)(i / ld));
    }
    mem_free(half);
    return out;
}

/* || got - want || / || want || */
static inline double distance(const float *got, const float *want, int64_t n)
{
    double d = 0, w = 0;
    for (int64_t i = 0; i < n; i++) {
        d += ((double)got[i] - want[i]) * ((double)got[i] - want[i]);
        w += (double)want[i] * want[i];
    }
    return w > 0 ? sqrt(d / w) : sqrt(d);
}

/* NaN fails. */
static inline void near(const float *got, const float *want, int64_t n, double tol,
                        const char *what)
{
    const double d = distance(got, want, n);
    ck_assert_msg(d <= tol, "%s: relative error %.3g, at most %.3g", what, d, tol);
}

static inline void limits(int64_t rows, int64_t k, int64_t n)
{
    const op_limits lim = {(int32_t)rows, k, n, 8, 256, 4096, 8};
    OK_(ops_reserve(gpu, &lim, e));
}
/* [--sm N] [--few] [--deterministic]: --sm with the kernels of an older capability, of which the
 * build has PTX; --deterministic with those of such a device. 0, or what main returns; room for
 * `seqs` sequences on the CPU. */
static inline int pair_open(int argc, char **argv, int32_t seqs)
{
    err e;
    dev_opts card = {.kind = DEV_CUDA, .threads = 1};
    const dev_opts host = {.kind = DEV_CPU, .threads = 2, .isa = "ref"};
    const op_limits lim = {1024, 2560, 5120, 32, 256, 1024, seqs};
    for (int i = 1; i < argc; i++) {
        if (strcmp(argv[i], "--few") == 0) few = true;
        if (strcmp(argv[i], "--deterministic") == 0) card.deterministic = true;
        if (strcmp(argv[i], "--sm") == 0 && i + 1 < argc) card.sm = atoi(argv[i + 1]);
    }
    if (cuda_open(&card) != 0) return 77;
    return dev_open(&cpu, &host, &e) != OK || ops_reserve(cpu, &lim, &e) != OK;
}

static inline int pair_run(Suite *s)
{
    const int rc = cuda_run(s);
    dev_close(&cpu);
    return rc;
}

#endif
