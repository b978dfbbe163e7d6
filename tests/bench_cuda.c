/* bench_cuda: products and decode attention of a CUDA device alone, beside their floors. Each
 * figure is the median of replays of recorded work over copies of the data that together exceed the
 * L2 cache several times; products of one row are recorded as a decode pass, as in a model. Those
 * of few rows find their activations in fixed point, as norms leave them in a model; `from f16`
 * makes them for each product. Floors: 1.4 us + bytes / 4.4 TB/s, or 2mnk / 790 TFLOP/s, measured
 * on an H200. Arguments: numbers of rows, rising, to measure products of these alone; or
 * `attention`, and sequences and tokens of one case. Without a GPU: one line, exit 77. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/half.h"
#include "base/mem.h"
#include "kernels/ops.h"
#include "support/splitmix.h"

#define RUNS      9
#define MOST_ROWS 16
#define COPIES    64
#define COLD      ((size_t)480 << 20) /* bytes that one replay goes through */

static device *d;
static uint64_t state = 1;

static uint64_t next_u64(void) { return splitmix_next(&state); }

static void must(err_code rc, const err *e)
{
    if (rc == OK) return;
    fprintf(stderr, "bench_cuda: %s\n", e->msg);
    exit(1);
}
#define MUST(call)        \
    do {                  \
        err e_, *e = &e_; \
        must((call), e);  \
    } while (0)

static void *memory(size_t bytes)
{
    void *p;
    MUST(mem_alloc(&p, bytes, 1, "bench", e));
    return p;
}

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec * 1e-3;
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* Microseconds of one of the `n` ops that `work` holds. */
static double replay(dev_graph *work, int n)
{
    double t[RUNS];
    for (int i = -2; i < RUNS; i++) {
        const double begin = now_us();
        for (int r = 0; r < 4; r++) MUST(dev_graph_run(work, e));
        MUST(dev_sync(d, e));
        if (i >= 0) t[i] = (now_us() - begin) / 4 / n;
    }
    qsort(t, RUNS, sizeof *t, by_value);
    return t[RUNS / 2];
}

static double floor_us(double bytes, double flops)
{
    const double read = 1.4 + bytes / 4.4e6, math = flops / 790e6;
    return read > math ? read : math;
}

/* Random bits, or with `half` f16 numbers around zero. */
static void fill(dev_buf *b, bool half)
{
    const size_t piece = (size_t)16 << 20;
    uint64_t *host = memory(piece);
    for (size_t i = 0; i < piece / 8; i++)
        host[i] = half ? (next_u64() & 0x83ff83ff83ff83ffull) | 0x2c002c002c002c00ull : next_u64();
    for (size_t at = 0; at < b->bytes; at += piece) {
        const size_t n = b->bytes - at < piece ? b->bytes - at : piece;
        const tensor src = tensor_1d(host, DT_U8, (int64_t)n);
        tensor dst = tensor_1d((char *)b->data + at, DT_U8, (int64_t)n);
        dst.mem = dev_mem(d);
        MUST(dev_copy(d, &dst, &src, e));
    }
    MUST(dev_sync(d, e));
    mem_free(host);
}

/* ---- products ---- */

typedef struct {
    int64_t k, n;
    int copies;
    dev_buf w4_buf[COPIES], f16_buf[COPIES], x_buf, y_buf;
    w4_weight w4[COPIES];
    tensor f16[COPIES];
} product;

static void product_open(product *p, int64_t k, int64_t n, int64_t rows)
{
    size_t q, s, z;
    w4_weight w = {0};
    memset(p, 0, sizeof *p);
    p->k = k, p->n = n;
    MUST(w4_sizes(&q, &s, &z, k, n, 128, W4_TM, e));
    uint8_t *mem = memory(q + s + z);
    w4_shape(&w, k, n, 128, W4_TM);
    w.q.data = mem, w.scales.data = mem + q, w.zeros.data = mem + q + s;
    for (size_t i = 0; i < q / 8; i++) ((uint64_t *)w.q.data)[i] = next_u64();
    for (size_t i = 0; i < s / 2; i++) ((f16 *)w.scales.data)[i] = f32_to_f16(0.004f);
    for (size_t i = 0; i < z / 2; i++)
        ((f16 *)w.zeros.data)[i] = f32_to_f16((float)(next_u64() & 15));
    const w4_weight *part = &w;
    p->copies = (int)(COLD / (q + s + z)) + 1;
    if (p->copies > COPIES) p->copies = COPIES;
    for (int i = 0; i < p->copies; i++) {
        MUST(w4_upload(d, &p->w4_buf[i], &p->w4[i], &part, 1, e));
        MUST(dev_alloc(&p->f16_buf[i], d, (size_t)(k * n * 2), "weights", e));
        fill(&p->f16_buf[i], true);
        p->f16[i] = tensor_2d(p->f16_buf[i].data, DT_F16, n, k);
        p->f16[i].mem = dev_mem(d);
    }
    MUST(dev_alloc(&p->x_buf, d, (size_t)(rows * k * 4), "activations", e));
    MUST(dev_alloc(&p->y_buf, d, (size_t)(rows * n * 2), "activations", e));
    fill(&p->x_buf, true);
    mem_free(mem);
}

static void product_close(product *p)
{
    for (int i = 0; i < p->copies; i++) dev_free(&p->w4_buf[i]), dev_free(&p->f16_buf[i]);
    dev_free(&p->x_buf), dev_free(&p->y_buf);
}

/* inputs 2: two matrices in turn, of which a device has made nothing for the product before. */
static double product_us(product *p, int64_t m, bool w4, int inputs)
{
    tensor x[2], y = tensor_2d(p->y_buf.data, DT_F16, m, p->n);
    dev_graph *work;
    for (int i = 0; i < 2; i++) {
        x[i] = tensor_2d((f16 *)p->x_buf.data + i * m * p->k, DT_F16, m, p->k);
        x[i].mem = dev_mem(d);
    }
    y.mem = dev_mem(d);
    MUST(dev_record_begin(d, e));
    for (int i = 0; i < p->copies; i++)
        MUST(w4 ? op_gemm_w4(d, &y, &x[i % inputs], &p->w4[i], false, e)
                : op_gemm(d, &y, &x[0], &p->f16[i], NULL, false, e));
    MUST(dev_record_end(d, &work, e));
    const double us = replay(work, p->copies);
    dev_graph_free(&work);
    return us;
}

static void bench_products(const int64_t *rows, int n_rows)
{
    static const int64_t shape[][2] = {{2048, 16384}, {4096, 4096}, {4096, 12288},
                                       {4096, 22016}, {8192, 8192}, {11008, 4096}};
    enum { SHAPES = sizeof shape / sizeof *shape };
    double over[MOST_ROWS] = {0}, gain[MOST_ROWS] = {0}, whole[MOST_ROWS] = {0};
    puts(
        "| K x N | M | floor us | f16 | W4 | W4 over floor | f16 over W4 | from f16, over floor |\n"
        "|---|---:|---:|---:|---:|---:|---:|---:|");
    for (int s = 0; s < SHAPES; s++) {
        product p;
        const int64_t k = shape[s][0], n = shape[s][1];
        product_open(&p, k, n, rows[n_rows - 1]);
        for (int r = 0; r < n_rows; r++) {
            const int64_t m = rows[r];
            const double least = floor_us((double)(k * n) * 0.5195,
                                          2.0 * (double)m * (double)k * (double)n),
                         dense = product_us(&p, m, false, 1), w4 = product_us(&p, m, true, 1),
                         made = product_us(&p, m, true, 2);
            over[r] += log(w4 / least), gain[r] += log(dense / w4), whole[r] += log(made / least);
            printf("| %lld x %lld | %lld | %.1f | %.2f | %.2f | %.2f | %.2f | %.2f |\n",
                   (long long)k, (long long)n, (long long)m, least, dense, w4, w4 / least,
                   dense / w4, made / least);
        }
        product_close(&p);
    }
    for (int r = 0; r < n_rows; r++)
        printf("| geometric mean | %lld | | | | %.2f | %.2f | %.2f |\n", (long long)rows[r],
               exp(over[r] / SHAPES), exp(gain[r] / SHAPES), exp(whole[r] / SHAPES));
}

/* ---- decode attention ---- */

enum { HEADS = 16, KV_HEADS = 8, DIM = 128, BLOCK = 64 };

typedef struct {
    int32_t seqs, tokens, blocks;
    kv_layer kv[COPIES];
    dev_buf data[COPIES], param[COPIES], tables, q, y;
    int copies;
    size_t bytes; /* of a copy */
    batch_rows rows;
} attention;

static void tables_open(attention *a)
{
    const int32_t n = a->seqs, per = a->tokens / BLOCK;
    const int64_t all = 3 * (int64_t)n + 1 + (int64_t)n * per;
    int32_t *host = memory((size_t)all * 4), *start = host + n, *len = start + n + 1;
    for (int32_t i = 0; i < n; i++) host[i] = a->tokens - 1, start[i] = i, len[i] = a->tokens;
    start[n] = n;
    for (int32_t i = 0; i < n * per; i++) len[n + i] = i;
    MUST(dev_alloc(&a->tables, d, (size_t)all * 4, "tables", e));
    const tensor src = tensor_1d(host, DT_I32, all);
    int32_t *at = a->tables.data;
    tensor dst = tensor_1d(at, DT_I32, all);
    dst.mem = dev_mem(d);
    MUST(dev_copy(d, &dst, &src, e));
    MUST(dev_sync(d, e));
    mem_free(host);
    a->rows = (batch_rows){.pos = tensor_1d(at, DT_I32, n),
                           .seq_start = tensor_1d(at + n, DT_I32, n + 1),
                           .kv_len = tensor_1d(at + 2 * n + 1, DT_I32, n),
                           .block_table = tensor_2d(at + 3 * n + 1, DT_I32, n, per),
                           .seqs = n,
                           .max_q = 1,
                           .max_kv = a->tokens};
    tensor *t[] = {&a->rows.pos, &a->rows.seq_start, &a->rows.kv_len, &a->rows.block_table};
    for (int i = 0; i < 4; i++) t[i]->mem = dev_mem(d);
}

static void attention_open(attention *a, int32_t seqs, int32_t tokens, kv_format f)
{
    memset(a, 0, sizeof *a);
    a->seqs = seqs, a->tokens = tokens, a->blocks = seqs * (tokens / BLOCK);
    const size_t data = kv_layer_data_bytes(f, a->blocks, BLOCK, KV_HEADS, DIM),
                 param = f == KV_16 ? 0 : kv_layer_param_bytes(f, a->blocks, BLOCK, KV_HEADS);
    a->bytes = data + param;
    a->copies = (int)(COLD / a->bytes) + 1;
    if (a->copies > COPIES) a->copies = COPIES;
    for (int i = 0; i < a->copies; i++) {
        MUST(dev_alloc(&a->data[i], d, data, "cache", e));
        fill(&a->data[i], f == KV_16);
        if (param) MUST(dev_alloc(&a->param[i], d, param, "cache", e));
        if (param) fill(&a->param[i], true);
        a->kv[i] = (kv_layer){a->data[i].data, a->param[i].data, f,   a->blocks,
                              BLOCK,           KV_HEADS,         DIM, dev_mem(d)};
    }
    tables_open(a);
    MUST(dev_alloc(&a->q, d, (size_t)seqs * HEADS * DIM * 2, "queries", e));
    MUST(dev_alloc(&a->y, d, (size_t)seqs * HEADS * DIM * 2, "outputs", e));
    fill(&a->q, true);
}

static void attention_close(attention *a)
{
    for (int i = 0; i < a->copies; i++) dev_free(&a->data[i]), dev_free(&a->param[i]);
    dev_free(&a->tables), dev_free(&a->q), dev_free(&a->y);
}

static void bench_attention(int32_t seqs, int32_t tokens) /* 0: every case */
{
    static const int32_t cases[][2] = {{1, 4096}, {1, 32768}, {8, 4096}, {64, 2048}, {64, 8192}};
    static const kv_format format[] = {KV_16, KV_8, KV_4};
    puts("\n| sequences x tokens | bits | floor us | us | share of 4.4 TB/s "
         "|\n|---|---:|---:|---:|---:|");
    for (size_t c = 0; c < sizeof cases / sizeof *cases; c++) {
        for (int f = 0; f < 3; f++) {
            if (tokens && (cases[c][0] != seqs || cases[c][1] != tokens)) continue;
            attention a;
            dev_graph *work;
            attention_open(&a, cases[c][0], cases[c][1], format[f]);
            tensor q = {.data = a.q.data,
                        .dt = DT_F16,
                        .mem = dev_mem(d),
                        .ndim = 4,
                        .shape = {a.seqs, KV_HEADS, HEADS / KV_HEADS, DIM},
                        .stride = {HEADS * DIM, HEADS / KV_HEADS * DIM, DIM, 1}},
                   y = tensor_2d(a.y.data, DT_F16, a.seqs, HEADS * DIM);
            y.mem = dev_mem(d);
            MUST(dev_record_begin(d, e));
            for (int i = 0; i < a.copies; i++)
                MUST(op_attn(d, &y, &q, &a.kv[i], &a.rows, 0.08838835f, 0, e));
            MUST(dev_record_end(d, &work, e));
            const double us = replay(work, a.copies);
            printf("| %d x %d | %d | %.1f | %.1f | %.0f %% |\n", a.seqs, a.tokens,
                   format[f] == KV_16 ? 16 : (int)format[f], floor_us((double)a.bytes, 0), us,
                   (double)a.bytes / us / 4.4e4);
            dev_graph_free(&work);
            attention_close(&a);
        }
    }
}

int main(int argc, char **argv)
{
    int64_t rows[MOST_ROWS] = {1, 2, 4, 8, 16, 32, 64, 128, 512, 2048, 8192};
    int n_rows = 11;
    err open_err;
    const dev_opts card = {.kind = DEV_CUDA, .threads = 1};
    if (dev_open(&d, &card, &open_err) != OK) {
        printf("SKIP: %s\n", open_err.msg);
        return 77;
    }
    const bool alone = argc > 1 && strcmp(argv[1], "attention") == 0;
    if (argc > 1 && !alone) n_rows = argc - 1 < MOST_ROWS ? argc - 1 : MOST_ROWS;
    for (int i = 1; !alone && i < argc && i <= n_rows; i++) rows[i - 1] = atoll(argv[i]);
    const op_limits lim = {(int32_t)rows[n_rows - 1], 11008, 22016, HEADS, DIM, 32768, 64};
    MUST(ops_reserve(d, &lim, e));
    if (alone)
        bench_attention(argc > 3 ? atoi(argv[2]) : 0, argc > 3 ? atoi(argv[3]) : 0);
    else
        bench_products(rows, n_rows);
    if (argc == 1) bench_attention(0, 0);
    dev_close(&d);
    return 0;
}
