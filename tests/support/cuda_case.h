/* What tests of a CUDA device share: the device, memory on both sides, values, and how their cases
 * are run. Without a GPU, or in a build without CUDA, cuda_open says so for main to end with. */
#ifndef TMF_TESTS_CUDA_CASE_H
#define TMF_TESTS_CUDA_CASE_H

#include <check.h>
#include <stdio.h>

#include "base/mem.h"
#include "kernels/ops.h"
#include "support/splitmix.h"
#include "support/suite.h"

static device *gpu;
static uint64_t uniform_state = 1;

static inline double uniform(void) { return splitmix_uniform(&uniform_state); }

/* A call that gets its `e` here, and has to succeed. */
#define OK_(call)                                  \
    do {                                           \
        err e_ = {0}, *e = &e_;                    \
        ck_assert_msg((call) == OK, "%s", e_.msg); \
    } while (0)

/* Room on the host; mem_free. */
static inline void *must(size_t n, size_t size)
{
    void *p;
    OK_(mem_alloc(&p, n ? n : 1, size, "test", e));
    return p;
}

/* A tensor like `t` in memory of its own on the GPU; dev_free(b). */
static inline tensor on_gpu(dev_buf *b, tensor t)
{
    OK_(dev_alloc(b, gpu, tensor_bytes(&t), "test", e));
    t.data = b->data;
    t.mem = dev_mem(gpu);
    return t;
}

/* OK, or 77 (skipped) behind a line that says why. */
static inline int cuda_open(const dev_opts *o)
{
    err e;
    if (dev_open(&gpu, o, &e) == OK) return 0;
    (void)printf("SKIP: %s\n", e.msg);
    return 77;
}

/* A case of its own, which CK_RUN_CASE can pick. */
static inline TCase *cuda_case(Suite *s, const char *name, int seconds)
{
    TCase *t = tcase_create(name);
    tcase_set_timeout(t, seconds);
    suite_add_tcase(s, t);
    return t;
}

/* Random codes and parameters in TurboMind's layout; *mem is freed by the caller. */
static inline w4_weight make_w4(void **mem, int64_t k, int64_t n, int32_t group)
{
    size_t q, s, z;
    w4_weight w = {0};
    OK_(w4_sizes(&q, &s, &z, k, n, group, W4_TM, e));
    uint8_t *p = *mem = must(q + s + z, 1);
    w4_shape(&w, k, n, group, W4_TM);
    w.q.data = p, w.scales.data = p + q, w.zeros.data = p + q + s;
    for (size_t i = 0; i < q; i++) p[i] = (uint8_t)(uniform() * 256);
    for (size_t i = 0; i < s / 2; i++)
        ((f16 *)w.scales.data)[i] = f32_to_f16((float)(0.002 + 0.004 * uniform()));
    for (size_t i = 0; i < z / 2; i++)
        ((f16 *)w.zeros.data)[i] = f32_to_f16((float)(int)(uniform() * 16));
    return w;
}

/* Runs them all and closes the GPU; what main returns. */
static inline int cuda_run(Suite *s)
{
    const int rc = suite_run_forked(s, CK_NOFORK); /* a device does not survive a fork */
    dev_close(&gpu);
    return rc;
}

#endif
