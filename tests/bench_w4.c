/* Times op_gemm_w4 on the linears of whole models, random weights: each layer has its own copy, so
 * that decode reads far more than the caches hold. Prints the rate of bytes against a plain read by
 * the same pool, and prefill operations a second. usage: bench_w4 [isa] [threads] [group] [rounds]
 * [most rows] [shape] [least rows]; not a test, not installed. */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "base/mem.h"
#include "kernels/device_internal.h"

enum { LINEARS = 4, MAX_LAYERS = 24, PREFILL = 128, READ_PARTS = 8 };

typedef struct {
    const char *name;
    int layers;
    int64_t k[LINEARS], n[LINEARS]; /* qkv, o, gate+up, down */
} shape;

static const shape shapes[] = {
    {"1.1B (2048, ffn 5632, 22 layers)", 22, {2048, 2048, 2048, 5632}, {2560, 2048, 11264, 2048}},
    {"1.8B (2048, ffn 8192, 24 layers)", 24, {2048, 2048, 2048, 8192}, {4096, 2048, 16384, 2048}}};

/* With one thread the time of this process, so that others on the machine count less. */
static clockid_t bench_clock = CLOCK_MONOTONIC;

static double now(void)
{
    struct timespec t;
    (void)clock_gettime(bench_clock, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static void check(err_code rc, const err *e)
{
    if (rc == OK) return;
    fprintf(stderr, "bench_w4: %s\n", e->msg);
    exit(1);
}

static uint32_t state = 12345;
static uint32_t next(void)
{
    state = state * 1664525u + 1013904223u;
    return state >> 8;
}

static void *take(size_t bytes)
{
    void *p;
    err e;
    check(mem_alloc(&p, bytes, 1, "bench", &e), &e);
    return p;
}

/* A random weight in TurboMind's layout. */
static w4_weight random_weight(int64_t k, int64_t n, int32_t group)
{
    w4_weight w = {.k = k, .n = n, .group = group, .layout = W4_TM};
    size_t q, s, z;
    err e;
    check(w4_sizes(&q, &s, &z, k, n, group, W4_TM, &e), &e);
    w.q.data = take(q);
    w.scales.data = take(s);
    w.zeros.data = take(z);
    w4_shape(&w, k, n, group, W4_TM);
    for (size_t i = 0; i < q; i++) ((uint8_t *)w.q.data)[i] = (uint8_t)next();
    for (size_t i = 0; i < s / 2; i++) {
        ((f16 *)w.scales.data)[i] = f32_to_f16(0.002f + 1e-7f * (float)(next() % 10000));
        ((f16 *)w.zeros.data)[i] = f32_to_f16((float)(next() % 16));
    }
    return w;
}

typedef struct {
    dev_buf buf[MAX_LAYERS][LINEARS];
    w4_weight w[MAX_LAYERS][LINEARS];
    size_t bytes;
} model;

static void load(model *mo, device *d, const shape *s, int32_t group)
{
    double upload = 0.0;
    mo->bytes = 0;
    for (int i = 0; i < LINEARS; i++) {
        w4_weight w = random_weight(s->k[i], s->n[i], group);
        const w4_weight *part = &w;
        for (int l = 0; l < s->layers; l++) {
            err e;
            const double t = now();
            check(w4_upload(d, &mo->buf[l][i], &mo->w[l][i], &part, 1, &e), &e);
            upload += now() - t;
            mo->bytes += mo->buf[l][i].bytes;
        }
        mem_free(w.q.data);
        mem_free(w.scales.data);
        mem_free(w.zeros.data);
    }
    printf("  upload %.2f s, %.0f MB\n", upload, (double)mo->bytes * 1e-6);
}

static double step(device *d, const shape *s, model *mo, float *x, float *y, int64_t m, int64_t ld)
{
    const double t = now();
    for (int l = 0; l < s->layers; l++)
        for (int i = 0; i < LINEARS; i++) {
            err e;
            tensor in = tensor_2d(x, DT_F32, m, s->k[i]), out = tensor_2d(y, DT_F32, m, s->n[i]);
            in.stride[0] = out.stride[0] = ld;
            check(op_gemm_w4(d, &out, &in, &mo->w[l][i], false, &e), &e);
        }
    return now() - t;
}

typedef struct {
    const model *mo;
    int linears;
    uint64_t sums[1024];
} reader;

typedef uint64_t lane __attribute__((vector_size(32)));

/* Two streams, as the kernels read. */
#if defined(__x86_64__)
__attribute__((target("avx2")))
#endif
static uint64_t
read_bytes(const uint8_t *p, size_t half)
{
    lane a = {0}, b = {0}, c = {0}, d = {0};
    for (size_t i = 0; i < half; i += 64) {
        a ^= *(const lane *)(const void *)(p + i);
        b ^= *(const lane *)(const void *)(p + i + 32);
        c ^= *(const lane *)(const void *)(p + half + i);
        d ^= *(const lane *)(const void *)(p + half + i + 32);
    }
    a ^= b ^ c ^ d;
    return a[0] ^ a[1] ^ a[2] ^ a[3];
}

/* The roof: every byte of the weights once, in items of an eighth of a matrix. */
static void read_item(void *ctx, int64_t item, int worker)
{
    reader *r = ctx;
    const dev_buf *b = &r->mo->buf[item / READ_PARTS / LINEARS][item / READ_PARTS % LINEARS];
    const size_t part = b->bytes / READ_PARTS / 128 * 128;
    r->sums[worker] ^= read_bytes((const uint8_t *)b->data + part * (size_t)(item % READ_PARTS),
                                  part / 2);
}

static double read_all(device *d, const shape *s, const model *mo)
{
    static reader r;
    r.mo = mo;
    const double t = now();
    pool_run(dev_pool(d), read_item, &r, (int64_t)s->layers * LINEARS * READ_PARTS);
    return now() - t;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, by_value);
    return v[n / 2];
}

static void bench(device *d, const shape *s, int32_t group, int rounds, int64_t least, int64_t most)
{
    static model mo;
    static const int64_t rows[] = {1, 2, 4, 8, 16, 32, PREFILL, 4 * PREFILL};
    enum { SIZES = sizeof rows / sizeof *rows };
    double t[SIZES][64], read[64], weights = 0.0;
    int64_t ld = 0;
    printf("%s\n", s->name);
    load(&mo, d, s, group);
    for (int i = 0; i < LINEARS; i++) {
        weights += (double)s->layers * (double)s->k[i] * (double)s->n[i];
        if (s->k[i] > ld) ld = s->k[i];
        if (s->n[i] > ld) ld = s->n[i];
    }
    float *x = take((size_t)(4 * PREFILL * ld) * sizeof *x),
          *y = take((size_t)(4 * PREFILL * ld) * sizeof *y);
    for (int64_t i = 0; i < 4 * PREFILL * ld; i++)
        x[i] = (float)(int)(next() % 2001) * 1e-3f - 1.0f;
    for (int r = 0; r < rounds; r++) {
        read[r] = read_all(d, s, &mo);
        for (int i = 0; i < SIZES && rows[i] <= most; i++)
            t[i][r] = step(d, s, &mo, x, y, rows[i], ld);
    }
    const double rd = median(read, rounds);
    printf("  plain read       %6.2f ms  %5.1f GB/s (best %.1f)\n", rd * 1e3,
           (double)mo.bytes / rd * 1e-9, (double)mo.bytes / read[0] * 1e-9);
    for (int i = 0; i < SIZES && rows[i] <= most; i++) {
        if (rows[i] < least) continue;
        const double med = median(t[i], rounds), best = t[i][0];
        printf("  rows %4" PRId64
               "  %8.2f ms (best %8.2f)  %5.1f GB/s %3.0f %% of read  %7.1f rows/s "
               "%6.0f Gop/s\n",
               rows[i], med * 1e3, best * 1e3, (double)mo.bytes / med * 1e-9, 100.0 * rd / med,
               (double)rows[i] / med, 2e-9 * weights * (double)rows[i] / med);
    }
    for (int l = 0; l < s->layers; l++)
        for (int i = 0; i < LINEARS; i++) dev_free(&mo.buf[l][i]);
    mem_free(x);
    mem_free(y);
}

int main(int argc, char **argv)
{
    const char *isa = argc > 1 ? argv[1] : "auto";
    const bool narrow = strcmp(isa, "avxvnni") == 0; /* avx512 without its dot product */
    const dev_opts o = {.isa = narrow ? "avx512" : isa, .threads = argc > 2 ? atoi(argv[2]) : 0};
    const int32_t group = argc > 3 ? atoi(argv[3]) : 128;
    int rounds = argc > 4 ? atoi(argv[4]) : 5;
    const int most = argc > 5 ? atoi(argv[5]) : 4 * PREFILL, only = argc > 6 ? atoi(argv[6]) : -1;
    const int least = argc > 7 ? atoi(argv[7]) : 1;
    const op_limits lim = {.rows = 4 * PREFILL, .k = 8192, .n = 16384};
    device *d;
    err e;
    if (rounds < 1 || rounds > 64) rounds = 5;
    check(dev_open(&d, &o, &e), &e);
    if (pool_threads(dev_pool(d)) == 1) bench_clock = CLOCK_PROCESS_CPUTIME_ID;
    if (narrow) d->cpu_flags &= ~(uint32_t)CPU_AVX512VNNI;
    check(ops_reserve(d, &lim, &e), &e);
    printf("%s%s, group %d, median of %d\n", narrow ? "avxvnni on " : "", dev_name(d), group,
           rounds);
    setvbuf(stdout, NULL, _IOLBF, 0);
    for (int i = 0; i < (int)(sizeof shapes / sizeof *shapes); i++)
        if (only < 0 || i == only) bench(d, &shapes[i], group, rounds, least, most);
    dev_close(&d);
    return 0;
}
