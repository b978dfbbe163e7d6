/* kcheck: see kcheck.h. Exit 0 when all variants agree with the references, 1 else. */
#include "kcheck.h"

#include <cblas.h>
#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "base/mem.h"
#include "support/splitmix.h"

#define GUARD       256
#define GUARD_BYTE  0xa5
#define FLUSH_BYTES ((size_t)320 << 20) /* beyond the last-level caches we know */

void openblas_set_num_threads(int n);
char *openblas_get_corename(void);

/* ---- buffers ---- */

static void *must_alloc(size_t bytes)
{
    void *p;
    err e;
    if (mem_alloc(&p, bytes ? bytes : 1, 1, "kcheck", &e) != OK) {
        fprintf(stderr, "kcheck: %s\n", e.msg);
        exit(5);
    }
    return p;
}

kbuf kb_new(dtype dt, int ndim, const int64_t *shape, int64_t pad)
{
    kbuf b = {.t = tensor_of(NULL, dt, ndim, shape)};
    if (ndim > 1) b.t.stride[0] += pad;
    const int64_t elements = shape[0] * (ndim > 1 ? b.t.stride[0] : 1);
    b.bytes = (size_t)elements * dtype_bytes(dt) + 2 * GUARD;
    b.raw = must_alloc(b.bytes);
    memset(b.raw, GUARD_BYTE, b.bytes);
    b.t.data = b.raw + GUARD;
    return b;
}

kbuf kb_2d(dtype dt, int64_t rows, int64_t cols, int64_t pad)
{
    return kb_new(dt, 2, (const int64_t[]){rows, cols}, pad);
}

kbuf kb_clone(const kbuf *b)
{
    kbuf c = *b;
    c.raw = must_alloc(b->bytes);
    memcpy(c.raw, b->raw, b->bytes);
    c.t.data = c.raw + GUARD;
    return c;
}

void kb_free(kbuf *b)
{
    mem_free(b->raw);
    memset(b, 0, sizeof *b);
}

static bool all_guard(const uint8_t *p, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (p[i] != GUARD_BYTE) return false;
    }
    return true;
}

bool kb_guards_ok(const kbuf *b)
{
    const size_t unit = dtype_bytes(b->t.dt);
    const size_t rows = (size_t)b->t.shape[0];
    const size_t pitch = (size_t)b->t.stride[0] * unit;
    const size_t used = rows ? tensor_bytes(&b->t) / rows : 0;
    bool ok = all_guard(b->raw, GUARD) && all_guard(b->raw + b->bytes - GUARD, GUARD);
    for (size_t r = 0; ok && r < rows; r++)
        ok = all_guard((uint8_t *)b->t.data + r * pitch + used, pitch - used);
    return ok;
}

static int64_t kb_at(const kbuf *b, int64_t row, int64_t col)
{
    return row * (b->t.ndim > 1 ? b->t.stride[0] : 1) + col;
}

float kb_get(const kbuf *b, int64_t row, int64_t col)
{
    const int64_t i = kb_at(b, row, col);
    if (b->t.dt == DT_F16) return f16_to_f32(((f16 *)b->t.data)[i]);
    if (b->t.dt == DT_BF16) return bf16_to_f32(((bf16 *)b->t.data)[i]);
    return ((float *)b->t.data)[i];
}

void kb_set(kbuf *b, int64_t row, int64_t col, float v)
{
    const int64_t i = kb_at(b, row, col);
    if (b->t.dt == DT_F16)
        ((f16 *)b->t.data)[i] = f32_to_f16(v);
    else if (b->t.dt == DT_BF16)
        ((bf16 *)b->t.data)[i] = f32_to_bf16(v);
    else
        ((float *)b->t.data)[i] = v;
}

/* ---- values ---- */

double kc_uniform(kcheck *c) { return splitmix_uniform(&c->rng); }

double kc_normal(kcheck *c) /* sum of four uniforms: near enough, and cheap */
{
    const uint64_t u = splitmix_next(&c->rng);
    const double sum = (double)(u & 0xffff) + (double)(u >> 16 & 0xffff) +
                       (double)(u >> 32 & 0xffff) + (double)(u >> 48);
    return (sum / 65536 - 2) * 1.7320508;
}

static int64_t kb_cols(const kbuf *b)
{
    return b->t.ndim == 1 ? 1 : tensor_count(&b->t) / b->t.shape[0];
}

void kc_fill(kcheck *c, kbuf *b, double scale)
{
    const int64_t cols = kb_cols(b);
    for (int64_t r = 0; r < b->t.shape[0]; r++) {
        for (int64_t i = 0; i < cols; i++) {
            const float v = (float)(kc_normal(c) * scale);
            if (b->t.ndim == 1)
                kb_set(b, 0, r, v);
            else
                kb_set(b, r, i, v);
        }
    }
}

void kc_fill_wild(kcheck *c, kbuf *b, double scale)
{
    const int64_t cols = kb_cols(b);
    kc_fill(c, b, scale);
    for (int64_t r = 0; b->t.ndim > 1 && r < b->t.shape[0]; r++) {
        for (int64_t i = 0; i < cols; i++) {
            if (kc_uniform(c) < 0.3)
                kb_set(b, r, i, 0);
            else if (kc_uniform(c) < 0.1)
                kb_set(b, r, i, kb_get(b, r, i) * 1e-6f);
        }
        kb_set(b, r, (int64_t)(kc_uniform(c) * (double)cols), (float)(300 * scale));
    }
}

/* ---- comparison ---- */

void kc_fail(kcheck *c, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    fprintf(stdout, "FAIL seed %llu: ", (unsigned long long)c->seed);
    vfprintf(stdout, fmt, ap);
    fputc('\n', stdout);
    va_end(ap);
    c->failures++;
}

/* c->only: names, a comma between two. */
bool kc_wants(const kcheck *c, const char *op)
{
    const size_t n = strlen(op);
    const char *at = c->only;
    if (!at) return true;
    while ((at = strstr(at, op)) != NULL) {
        if ((at == c->only || at[-1] == ',') && (at[n] == ',' || at[n] == '\0')) return true;
        at += n;
    }
    return false;
}

static double element(const kbuf *b, int64_t row, int64_t col)
{
    const int64_t i = b->t.ndim == 1 ? row : kb_at(b, row, col);
    if (b->t.dt == DT_F64) return ((double *)b->t.data)[i];
    if (b->t.dt == DT_I32) return ((int32_t *)b->t.data)[i];
    return b->t.ndim == 1 ? kb_get(b, 0, row) : kb_get(b, row, col);
}

/* Equal values (infinities too), both NaN, or near enough. */
static bool agree(double want, double got, double allowed)
{
    if (want == got || (isnan(want) && isnan(got))) return true;
    return fabs(want - got) <= allowed; /* false for a lone NaN */
}

static void compare(kcheck *c, const kcase *k, int o, const char *isa, const kbuf *want,
                    const kbuf *got)
{
    const double tol = kc_tolerance(k->tol[o], isa);
    const int64_t cols = kb_cols(want);
    for (int64_t r = 0; r < want->t.shape[0]; r++) {
        for (int64_t i = 0; i < cols; i++) {
            const double w = element(want, r, i), g = element(got, r, i);
            const double allowed = tol * (k->mag[o] ? k->mag[o][r * cols + i] : fabs(w)) +
                                   1e-36; /* under f32's normal range anything goes */
            if (!agree(w, g, allowed)) {
                kc_fail(c,
                        "%s %s [%s] out %d [%lld,%lld]: expected %.9g, got %.9g, off by %.3g, "
                        "allowed %.3g",
                        k->op, k->label, isa, o, (long long)r, (long long)i, w, g, fabs(w - g),
                        allowed);
                return;
            }
            const double share = w == g || isnan(w) ? 0 : fabs(w - g) / allowed;
            if (share > c->worst[k->tol[o]]) c->worst[k->tol[o]] = share;
        }
    }
}

/* Runs on clones of the templates; false (and a failure) when the op reports an error. */
static bool run_clones(kcheck *c, const kcase *k, device *d, const char *isa, kbuf *out)
{
    err e = {0};
    for (int o = 0; o < k->outs; o++) out[o] = kb_clone(&k->out[o]);
    if (k->run(d, k->arg, out, &e) != OK) {
        kc_fail(c, "%s %s [%s]: %s", k->op, k->label, isa, e.msg);
        return false;
    }
    for (int o = 0; o < k->outs; o++) {
        if (!kb_guards_ok(&out[o]))
            kc_fail(c, "%s %s [%s]: wrote outside of output %d", k->op, k->label, isa, o);
    }
    return true;
}

static void free_clones(const kcase *k, kbuf *out)
{
    for (int o = 0; o < k->outs; o++) kb_free(&out[o]);
}

static void check_variant(kcheck *c, const kcase *k, const kvariant *v, const kbuf *want)
{
    kbuf one[KC_OUTS], two[KC_OUTS];
    if (run_clones(c, k, v->dev[0], v->isa, one)) {
        for (int o = 0; o < k->outs; o++) compare(c, k, o, v->isa, &want[o], &one[o]);
        if (run_clones(c, k, v->dev[1], v->isa, two)) {
            for (int o = 0; o < k->outs; o++) {
                if (memcmp(one[o].raw, two[o].raw, one[o].bytes) != 0)
                    kc_fail(c, "%s %s [%s]: output %d differs between 1 and 2 threads", k->op,
                            k->label, v->isa, o);
            }
        }
        free_clones(k, two);
    }
    free_clones(k, one);
}

/* ---- time ---- */

static double now_s(const kcheck *c)
{
    struct timespec t;
    clock_gettime(c->threads == 1 ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static volatile uint64_t sink;
typedef struct {
    const uint64_t *p;
    size_t words;
} read_arg;

/* Four streams at once, each fetched ahead: one stream of plain loads leaves a third of what memory
 * gives unused. */
#define STREAMS 4
typedef uint64_t line __attribute__((vector_size(64), aligned(8)));
static void read_item(void *ctx, int64_t item, int worker)
{
    const read_arg *a = ctx;
    const size_t part = a->words / 64 / 8 / STREAMS;
    const line *p = (const line *)a->p + (size_t)item * part * STREAMS;
    line s[STREAMS] = {{0}};
    (void)worker;
    for (size_t i = 0; i < part; i++) {
        for (size_t j = 0; j < STREAMS; j++) {
            __builtin_prefetch((const char *)(p + j * part + i) + 2048, 0, 0);
            s[j] += p[j * part + i];
        }
    }
    for (int j = 0; j < STREAMS; j++) sink += s[j][0] + s[j][7];
}

static uint64_t *flush_buf(void)
{
    static uint64_t *p; /* one for the whole run: this is a program, not a library */
    if (!p) {
        p = must_alloc(FLUSH_BYTES);
        memset(p, 1, FLUSH_BYTES);
    }
    return p;
}

static double read_seconds(const kcheck *c, device *d)
{
    read_arg a = {flush_buf(), FLUSH_BYTES / 8};
    const double t = now_s(c);
    pool_run(dev_pool(d), read_item, &a, 64);
    return now_s(c) - t;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct {
    const float *a, *b;
    float *y;
    int n;
} sgemm_arg;

static void sgemm_item(void *ctx, int64_t item, int worker) /* one strip of columns a thread */
{
    const sgemm_arg *s = ctx;
    (void)worker;
    cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, s->n, s->n / 2, s->n, 1, s->a, s->n,
                s->b + item * s->n * s->n / 2, s->n, 0, s->y + item * s->n / 2, s->n);
}

/* What the machine gives right now: a read test and OpenBLAS, both over our pool with 2 threads. */
static void measure_roofs(kcheck *c)
{
    const int n = 4096;
    device *d = c->variant[0].dev[c->threads - 1];
    kbuf a = kb_2d(DT_F32, n, n, 0), b = kb_2d(DT_F32, n, n, 0), y = kb_2d(DT_F32, n, n, 0);
    kc_fill(c, &a, 1);
    kc_fill(c, &b, 1);
    openblas_set_num_threads(1);
    c->read_gbs = c->sgemm_gflops = 0;
    for (int i = 0; i < 3; i++) {
        const double gbs = (double)FLUSH_BYTES / read_seconds(c, d) * 1e-9;
        sgemm_arg s = {a.t.data, b.t.data, y.t.data, n};
        const double t = now_s(c);
        pool_run(dev_pool(d), sgemm_item, &s, 2);
        const double gf = 2.0 * n * n * n / (now_s(c) - t) * 1e-9;
        c->read_gbs = fmax(c->read_gbs, gbs);
        c->sgemm_gflops = fmax(c->sgemm_gflops, gf);
    }
    printf("read %.1f GB/s, OpenBLAS (%s) sgemm of 4096^3 %.0f GFLOP/s (%d threads, best of 3)\n",
           c->read_gbs, openblas_get_corename(), c->sgemm_gflops, c->threads);
    kb_free(&a);
    kb_free(&b);
    kb_free(&y);
}

static double time_variant(kcheck *c, const kcase *k, const kvariant *v, kbuf *out)
{
    double t[9];
    err e = {0};
    const int runs = 9;
    device *d = v->dev[c->threads - 1];
    if (k->run(d, k->arg, out, &e) != OK) return 0; /* warm-up; errors were reported before */
    for (int i = 0; i < runs; i++) {
        if (k->cold) read_seconds(c, d);
        const double start = now_s(c);
        if (k->run(d, k->arg, out, &e) != OK) return 0;
        t[i] = now_s(c) - start;
    }
    qsort(t, (size_t)runs, sizeof *t, by_value);
    return t[runs / 2];
}

static void bench_case(kcheck *c, const kcase *k)
{
    for (int i = 0; i < c->variants; i++) {
        kbuf out[KC_OUTS];
        for (int o = 0; o < k->outs; o++) out[o] = kb_clone(&k->out[o]);
        const double s = time_variant(c, k, &c->variant[i], out);
        const double gbs = k->bytes / s * 1e-9, gf = k->flops / s * 1e-9;
        printf("%-8s %-44s %-7s %9.1f us %7.2f GB/s %4.0f%% %8.1f GFLOP/s %5.0f%%\n", k->op,
               k->label, c->variant[i].isa, s * 1e6, gbs, 100 * gbs / c->read_gbs, gf,
               100 * gf / c->sgemm_gflops);
        free_clones(k, out);
    }
    fflush(stdout);
}

void kc_case(kcheck *c, const kcase *k)
{
    kbuf want[KC_OUTS];
    c->cases++;
    if (c->bench) {
        if (k->flops > 0) bench_case(c, k);
        return;
    }
    if (run_clones(c, k, c->ref, "ref", want)) {
        for (int i = 0; i < c->variants; i++) check_variant(c, k, &c->variant[i], want);
    }
    free_clones(k, want);
}

/* ---- main ---- */

static device *must_open(const char *isa, int threads, bool deterministic)
{
    device *d;
    err e;
    const dev_opts o = {
        .kind = DEV_CPU, .threads = threads, .isa = isa, .deterministic = deterministic};
    if (dev_open(&d, &o, &e) != OK) {
        fprintf(stderr, "kcheck: %s\n", e.msg);
        exit(2);
    }
    return d;
}

/* A bound above what the machine has gives the same kernels once more: such a one is left out. */
static void open_variants(kcheck *c, const char *only)
{
    static const char *const isa[] = {"avx2", "avx512", "amx"};
    char last[64];
    c->ref = must_open("ref", 1, false);
    snprintf(last, sizeof last, "%s", dev_name(c->ref));
    for (int i = 0; i < 3; i++) {
        device *d = must_open(isa[i], 1, false);
        if (strcmp(dev_name(d), last) == 0 || (only && strcmp(only, isa[i]) != 0)) {
            if (!only) printf("%s: not on this machine\n", isa[i]);
            dev_close(&d);
            continue;
        }
        snprintf(last, sizeof last, "%s", dev_name(d));
        c->variant[c->variants++] = (kvariant){isa[i], {d, must_open(isa[i], 2, false)}};
        if (strcmp(isa[i], "amx") == 0) /* the only one where it makes a difference */
            c->variant[c->variants++] = (kvariant){
                "amx-det", {must_open("amx", 1, true), must_open("amx", 2, true)}};
    }
}

static int usage(FILE *f, int code)
{
    fputs("usage: kcheck [--bench [--threads 1|2]] [--slow] [--op NAME,..] [--isa avx2|avx512|amx] "
          "[--seed N]\n"
          "compares every kernel variant with its reference; --bench times the marked cases "
          "instead\n",
          f);
    return code;
}

static int parse(kcheck *c, const char **isa, int argc, char **argv)
{
    for (int i = 1; i < argc; i++) {
        const char *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (strcmp(argv[i], "--bench") == 0)
            c->bench = true;
        else if (strcmp(argv[i], "--slow") == 0)
            c->slow = true;
        else if (strcmp(argv[i], "--op") == 0 && value)
            c->only = argv[++i];
        else if (strcmp(argv[i], "--isa") == 0 && value)
            *isa = argv[++i];
        else if (strcmp(argv[i], "--threads") == 0 && value && (*value == '1' || *value == '2'))
            c->threads = *argv[++i] - '0';
        else if (strcmp(argv[i], "--seed") == 0 && value)
            c->seed = strtoull(argv[++i], NULL, 10);
        else if (strcmp(argv[i], "--help") == 0)
            return usage(stdout, 0);
        else
            return usage(stderr, 2);
    }
    return -1;
}

int main(int argc, char **argv)
{
    kcheck c = {.seed = 1, .threads = 2};
    const char *isa = NULL;
    const int code = parse(&c, &isa, argc, argv);
    if (code >= 0) return code;
    c.rng = c.seed;
    open_variants(&c, isa);
    if (c.bench && c.variants) measure_roofs(&c);
    kcases_rows(&c);
    kcases_matrix(&c);
    kcases_attn(&c);
    for (int r = 0; r < TOL_COUNT && !c.bench; r++) {
        if (c.worst[r] > 0)
            printf("%-8s worst error %.3f of the tolerance\n", kc_tolerance_name(r), c.worst[r]);
    }
    printf("%d cases, %d variants, %d failures\n", c.cases, c.variants, c.failures);
    for (int i = 0; i < c.variants; i++) {
        dev_close(&c.variant[i].dev[0]);
        dev_close(&c.variant[i].dev[1]);
    }
    dev_close(&c.ref);
    return c.failures ? 1 : 0;
}
