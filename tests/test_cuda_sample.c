/* Draws on a CUDA device against the host's sampler: the same ids of the same logits, over answers
 * of some length with every option. Skipped out loud without a GPU. */
#include <math.h>
#include <string.h>

#include "runtime/sampler.h"
#include "support/cuda_case.h"

#define ROWS       24
#define STEPS      12
#define BIAS_BYTES (SAMPLE_MAX_BIAS * sizeof(sample_bias))

static tensor device_tensor(dev_buf *b, dtype dt, int ndim, int64_t n0, int64_t n1, int64_t n2)
{
    const int64_t shape[3] = {n0, n1, n2};
    return on_gpu(b, tensor_of(NULL, dt, ndim, shape));
}

static void copy(const tensor *to, const void *host, void *back)
{
    tensor h = *to, d = *to;
    h.data = back ? back : (void *)(uintptr_t)host;
    h.mem = MEM_HOST;
    if (back)
        OK_(dev_copy(gpu, &h, &d, e));
    else
        OK_(dev_copy(gpu, &d, &h, e));
    OK_(dev_sync(gpu, e));
}

/* Shapes of logits: like a model's, flat, with many equal ones, with infinite ones. */
static float logit(int kind, int32_t i, int32_t vocab)
{
    const double n = uniform() + uniform() + uniform() + uniform() - 2;
    switch (kind) {
    case 0: return (float)(n * 3 + (i % 97 == 0 ? 6 * uniform() : 0));
    case 1: return (float)(n * 1e-3);
    case 2: return (float)(int)(n * 4);
    case 3: return i % 3 ? -INFINITY : i == vocab / 2 ? NAN : (float)n;
    case 4: return i % 5 ? -0.0f : 0.0f;
    default: return (float)(n * 12);
    }
}

static const sample_bias some[3] = {{5, 4.0f}, {7, -3.0f}, {5, 1.0f}};

static sample_opts opts_of(int i)
{
    static const double temperatures[] = {0.7, 1, 1.8, 0, 60, 0.05};
    sample_opts o = sample_greedy();
    o.temperature = temperatures[i % 6];
    if (i % 2) o.top_p = i % 4 == 1 ? 0.9 : 0.3;
    if (i % 3 == 1) o.top_k = i % 5 == 0 ? 1 : 1 + 37 * (i % 7);
    if (i % 5 == 2) o.min_p = 0.08;
    if (i % 4 == 2) o.repetition_penalty = 1.3;
    if (i % 4 == 3) o.presence_penalty = 0.6, o.frequency_penalty = 0.4;
    if (i % 8 == 6) o.penalty_window = 3;
    if (i % 6 == 1) o.bias = (const logit_bias *)some, o.n_bias = 3;
    o.seed = 77u + (uint64_t)i;
    return o;
}

typedef struct {
    tensor logits, ids, rows, bias, counts;
    dev_buf buf[5];
    sampler *s[ROWS];
    sample_row *row;
    sample_bias *biases;
    float *l;
} bench;

static void bench_open(bench *b, int32_t vocab, int shift)
{
    static const int32_t prompt[] = {1, 2, 3, 5, 8, 13, 21};
    b->logits = device_tensor(&b->buf[0], DT_F32, 2, ROWS, vocab, 1);
    b->ids = device_tensor(&b->buf[1], DT_I32, 1, ROWS, 1, 1);
    b->rows = device_tensor(&b->buf[2], DT_U8, 2, ROWS, sizeof(sample_row), 1);
    b->bias = device_tensor(&b->buf[3], DT_U8, 2, ROWS, BIAS_BYTES, 1);
    b->counts = device_tensor(&b->buf[4], DT_I32, 3, ROWS, 2, vocab);
    b->row = must(ROWS, sizeof *b->row);
    b->biases = must(ROWS, BIAS_BYTES);
    b->l = must((size_t)ROWS * (size_t)vocab, sizeof *b->l);
    for (int i = 0; i < ROWS; i++) {
        const sample_opts o = opts_of(i + shift);
        OK_(sampler_open(&b->s[i], vocab, 64, e));
        OK_(sampler_start(b->s[i], &o, e));
        sampler_prompt(b->s[i], prompt, 7);
    }
}

static void bench_close(bench *b)
{
    for (int i = 0; i < 5; i++) dev_free(&b->buf[i]);
    for (int i = 0; i < ROWS; i++) sampler_close(&b->s[i]);
    mem_free(b->row), mem_free(b->biases), mem_free(b->l);
}

/* One draw of every row; the host's generators are as they were before. */
static void draw_there(bench *b, int32_t vocab, int32_t *ids)
{
    sampler_rng before[ROWS];
    for (int i = 0; i < ROWS; i++) {
        bool send;
        before[i] = sampler_rng_get(b->s[i]);
        sampler_row(b->s[i], &b->row[i], b->biases + (size_t)i * SAMPLE_MAX_BIAS, &send);
        sampler_rng_set(b->s[i], &before[i]);
        if (b->row[i].state >= 0) b->row[i].state = i;
        if (!send) continue;
        tensor part = tensor_2d((int32_t *)b->counts.data + (int64_t)i * 2 * vocab, DT_I32, 2,
                                vocab);
        part.mem = b->counts.mem;
        copy(&part, sampler_counts(b->s[i]), NULL);
    }
    copy(&b->logits, b->l, NULL);
    copy(&b->rows, b->row, NULL);
    copy(&b->bias, b->biases, NULL);
    OK_(op_sample(gpu, &b->ids, &b->logits, &b->rows, &b->bias, &b->counts, e));
    copy(&b->ids, NULL, ids);
}

static void same_ids(int32_t vocab, int shift)
{
    bench b;
    bench_open(&b, vocab, shift);
    for (int step = 0; step < STEPS; step++) {
        int32_t ids[ROWS];
        for (int i = 0; i < ROWS; i++)
            for (int32_t k = 0; k < vocab; k++)
                b.l[(size_t)i * (size_t)vocab + (size_t)k] = logit((i / 2 + step) % 6, k, vocab);
        draw_there(&b, vocab, ids);
        for (int i = 0; i < ROWS; i++) {
            const int32_t want = sampler_next(b.s[i], b.l + (size_t)i * (size_t)vocab);
            ck_assert_msg(ids[i] == want,
                          "%d ids, step %d, options %d, logits %d: drew %d, the host %d", vocab,
                          step, i + shift, (i / 2 + step) % 6, ids[i], want);
            sampler_accept(b.s[i], want);
        }
    }
    bench_close(&b);
}

START_TEST(as_the_host)
{
    same_ids(50, 0);
    same_ids(4096, 24);
    same_ids(32003, 48);
    same_ids(92544, 72);
}
END_TEST

/* Rows without a number, and rows that nobody draws from. */
START_TEST(nothing_there)
{
    bench b;
    int32_t ids[ROWS];
    bench_open(&b, 100, 0);
    for (int i = 0; i < ROWS * 100; i++) b.l[i] = i % 2 ? NAN : -INFINITY;
    draw_there(&b, 100, ids);
    for (int i = 0; i < ROWS; i++) /* a bias moves minus infinity nowhere */
        ck_assert_msg(ids[i] == -1, "options %d: %d", i, ids[i]);
    for (int i = 0; i < ROWS; i++) ids[i] = 1000 + i;
    copy(&b.ids, ids, NULL);
    memset(b.row, 0, ROWS * sizeof *b.row);
    copy(&b.rows, b.row, NULL);
    OK_(op_sample(gpu, &b.ids, &b.logits, &b.rows, &b.bias, &b.counts, e));
    copy(&b.ids, NULL, ids);
    for (int i = 0; i < ROWS; i++) ck_assert_int_eq(ids[i], 1000 + i);
    bench_close(&b);
}
END_TEST

int main(void)
{
    err e;
    const dev_opts card = {.kind = DEV_CUDA, .threads = 1};
    if (cuda_open(&card) != 0) return 77;
    const op_limits lim = {ROWS, 128, 92544, 1, 64, 1, 1};
    if (ops_reserve(gpu, &lim, &e) != OK) return 1;
    Suite *s = suite_create("cuda_sample");
    TCase *t = cuda_case(s, "draws", 120);
    uniform_state = 11;
    tcase_add_test(t, as_the_host);
    tcase_add_test(t, nothing_there);
    return cuda_run(s);
}
