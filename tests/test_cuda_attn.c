/* Attention of a CUDA device and the decode pass recorded from its ops, against the CPU's
 * references: every cache format, guards behind outputs. Without a GPU, or in a build without
 * CUDA, the cases are skipped out loud. */
#include "support/cuda_pair.h"

/* ---- attention ---- */

typedef struct {
    int32_t heads, kv_heads, dim, block_tokens, window;
    kv_format format;
    bool interleaved;
} attn_shape;

typedef struct {
    device *d;
    kv_layer kv;
    dev_buf data, param, ints, freq, q, y;
    rope_spec rope;
} side;

enum { SEQS = 2, BLOCKS = 24, TABLE = 12 };

static void side_open(side *s, device *d, const attn_shape *a)
{
    float freq[128];
    memset(s, 0, sizeof *s);
    s->d = d;
    s->kv = (kv_layer){NULL,        NULL,   a->format, BLOCKS, a->block_tokens,
                       a->kv_heads, a->dim, dev_mem(d)};
    OK_(dev_alloc(&s->data, d,
                  kv_layer_data_bytes(a->format, BLOCKS, a->block_tokens, a->kv_heads, a->dim),
                  "kv", e));
    s->kv.data = s->data.data;
    if (a->format != KV_16) {
        OK_(dev_alloc(&s->param, d,
                      kv_layer_param_bytes(a->format, BLOCKS, a->block_tokens, a->kv_heads), "kv",
                      e));
        s->kv.param = s->param.data;
    }
    for (int i = 0; i < a->dim / 2; i++) freq[i] = powf(10000, -2.0f * (float)i / (float)a->dim);
    const tensor host = tensor_1d(freq, DT_F32, a->dim / 2);
    s->rope = (rope_spec){host, a->dim, a->interleaved, 1};
    OK_(dev_alloc(&s->freq, d, sizeof freq, "freq", e));
    s->rope.inv_freq.data = s->freq.data;
    s->rope.inv_freq.mem = dev_mem(d);
    OK_(dev_copy(d, &s->rope.inv_freq, &host, e));
    OK_(dev_alloc(&s->ints, d, 4096 * sizeof(int32_t), "tables", e));
    OK_(dev_sync(d, e));
}

static void side_close(side *s)
{
    dev_buf *b[] = {&s->data, &s->param, &s->ints, &s->freq};
    for (int i = 0; i < 4; i++) dev_free(b[i]);
}

/* Rows of SEQS sequences from position from[s], n[s] each; blocks of a sequence lie apart. */
static batch_rows make_rows(side *s, const int32_t *from, const int32_t *n)
{
    int32_t host[4096], m = 0, *start = host + 2000, *len = host + 2100, *table = host + 2200;
    batch_rows r = {.seqs = SEQS};
    start[0] = 0;
    for (int i = 0; i < SEQS; i++) {
        for (int32_t k = 0; k < n[i]; k++) host[m++] = from[i] + k;
        start[i + 1] = m;
        len[i] = from[i] + n[i];
        if (n[i] > r.max_q) r.max_q = n[i];
        if (len[i] > r.max_kv) r.max_kv = len[i];
        for (int32_t b = 0; b < TABLE; b++) table[i * TABLE + b] = (b * SEQS + i) * 5 % BLOCKS;
    }
    const tensor src = tensor_1d(host, DT_I32, 4096);
    tensor dst = src;
    dst.data = s->ints.data;
    dst.mem = dev_mem(s->d);
    OK_(dev_copy(s->d, &dst, &src, e));
    OK_(dev_sync(s->d, e));
    int32_t *p = s->ints.data;
    r.pos = tensor_1d(p, DT_I32, m), r.seq_start = tensor_1d(p + 2000, DT_I32, SEQS + 1);
    r.kv_len = tensor_1d(p + 2100, DT_I32, SEQS),
    r.block_table = tensor_2d(p + 2200, DT_I32, SEQS, TABLE);
    r.pos.mem = r.seq_start.mem = r.kv_len.mem = r.block_table.mem = dev_mem(s->d);
    return r;
}

static tensor heads4(const tensor *t, int64_t at, int64_t c1, int64_t c2, int64_t hd)
{
    const tensor c = tensor_cols(t, at, t->shape[1] - at);
    return (tensor){.data = c.data,
                    .dt = t->dt,
                    .mem = t->mem,
                    .ndim = 4,
                    .shape = {t->shape[0], c1, c2, hd},
                    .stride = {t->stride[0], c2 * hd, hd, 1}};
}

static tensor heads3(const tensor *t, int64_t at, int64_t c1, int64_t hd)
{
    tensor r = heads4(t, at, c1, 1, hd);
    r.ndim = 3, r.shape[2] = hd, r.stride[2] = 1;
    return r;
}

static void attend(side *s, const attn_shape *a, tensor *qkv, tensor *y, const batch_rows *rows)
{
    const int64_t hd = a->dim;
    tensor q = heads4(qkv, 0, a->kv_heads, a->heads / a->kv_heads, hd);
    tensor k = heads3(qkv, a->heads * hd, a->kv_heads, hd);
    const tensor v = heads3(qkv, (a->heads + a->kv_heads) * hd, a->kv_heads, hd);
    OK_(op_rope_attn(s->d, y, &q, &k, &v, &s->rope, rows, &s->kv, 1 / sqrtf((float)hd), a->window,
                     e));
}

static void attn_step(side *c, side *g, const attn_shape *a, const int32_t *from, const int32_t *n)
{
    static const double tol[] = {[KV_16] = 2e-3, [KV_8] = 6e-3, [KV_4] = 4e-2};
    const int64_t cols = (int64_t)(a->heads + 2 * a->kv_heads) * a->dim,
                  out = (int64_t)a->heads * a->dim;
    const batch_rows rc = make_rows(c, from, n), rg = make_rows(g, from, n);
    const int64_t m = rc.pos.shape[0];
    dev_buf xb, yb;
    char what[128];
    snprintf(what, sizeof what, "attention %d/%d heads of %d, %d bit, window %d, %lld rows at %d",
             a->heads, a->kv_heads, a->dim, a->format == KV_16 ? 16 : (int)a->format, a->window,
             (long long)m, from[0]);
    float *x = values(m * cols, 0.5), *want = must((size_t)(m * out), sizeof *want);
    tensor gx = upload(&xb, DT_F16, m, cols, 0, x), gy = upload(&yb, DT_F16, m, out, PAD, NULL);
    tensor cx = tensor_2d(x, DT_F32, m, cols), cy = tensor_2d(want, DT_F32, m, out);
    attend(g, a, &gx, &gy, &rg);
    attend(c, a, &cx, &cy, &rc);
    float *got = download(&gy, what);
    near(got, want, m * out, tol[a->format], what);
    mem_free(x), mem_free(want), mem_free(got);
    dev_free(&xb), dev_free(&yb);
}

START_TEST(attention)
{
    static const attn_shape shapes[] = {
        {4, 4, 128, 64, 0, KV_16, true}, {8, 2, 128, 64, 0, KV_16, false},
        {18, 2, 64, 32, 0, KV_16, true}, {4, 2, 96, 64, 0, KV_16, false},
        {2, 1, 256, 32, 0, KV_16, true}, {4, 2, 80, 64, 0, KV_16, false},
        {8, 2, 128, 64, 70, KV_16, true}};
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    limits(1024, 2048, 4096);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i += few ? 3 : 1) {
        for (int f = 0; f < 3; f++) {
            attn_shape a = shapes[i];
            side c, g;
            a.format = formats[f];
            side_open(&c, cpu, &a), side_open(&g, gpu, &a);
            attn_step(&c, &g, &a, (const int32_t[]){0, 0}, (const int32_t[]){150, 33});
            attn_step(&c, &g, &a, (const int32_t[]){150, 33}, (const int32_t[]){1, 1});
            attn_step(&c, &g, &a, (const int32_t[]){151, 34}, (const int32_t[]){70, 3});
            attn_step(&c, &g, &a, (const int32_t[]){221, 37}, (const int32_t[]){1, 1});
            side_close(&c), side_close(&g);
        }
    }
}
END_TEST

/* So many heads that blocks run in many waves, which has kernels of its own: up to 4 query heads a
 * KV head, and more. */
START_TEST(many_heads)
{
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    static const int32_t heads[] = {512, 2560}, from[][SEQS] = {{70, 3}, {20, 3}};
    limits(1024, 2560 * 128, 4096);
    for (int i = 0; i < 6; i++) {
        const attn_shape a = {heads[i / 3], 512, 128, 64, 0, formats[i % 3], false};
        side c, g;
        side_open(&c, cpu, &a), side_open(&g, gpu, &a);
        attn_step(&c, &g, &a, (const int32_t[]){0, 0}, from[i / 3]);
        attn_step(&c, &g, &a, from[i / 3], (const int32_t[]){1, 1});
        side_close(&c), side_close(&g);
    }
}
END_TEST

/* What the last block of a prompt does: all rows into the cache, then attention for the last row of
 * each sequence, which must see what the launch just before wrote, and nothing older. */
static void tail_step(side *s, side *last, const attn_shape *a, tensor *qkv, tensor *y)
{
    static const int32_t n[SEQS] = {700, 40}, zero[SEQS] = {0}, from[SEQS] = {699, 39},
                         one[SEQS] = {1, 1};
    const int64_t hd = a->dim, kv_at = a->heads * hd;
    const batch_rows all = make_rows(s, zero, n), picked = make_rows(last, from, one);
    tensor q = heads4(qkv, 0, a->kv_heads, a->heads / a->kv_heads, hd),
           k = heads3(qkv, kv_at, a->kv_heads, hd), end = tensor_rows(&q, from[0], SEQS);
    const tensor v = heads3(qkv, kv_at + a->kv_heads * hd, a->kv_heads, hd);
    end.stride[0] *= n[1];
    OK_(op_rope_kv(s->d, &q, &k, &v, &s->rope, &all, &s->kv, e));
    OK_(op_attn(s->d, y, &end, &s->kv, &picked, 1 / sqrtf((float)hd), a->window, e));
}

static void tail_case(const attn_shape *a, double tol)
{
    const int64_t m = 740, cols = (int64_t)(a->heads + 2 * a->kv_heads) * a->dim,
                  out = (int64_t)a->heads * a->dim;
    float *x = values(m * cols, 0.5), *want = must((size_t)(SEQS * out), sizeof *want);
    side c, cl, g, gl;
    dev_buf xb, yb;
    side_open(&c, cpu, a), side_open(&cl, cpu, a), side_open(&g, gpu, a), side_open(&gl, gpu, a);
    tensor gx = upload(&xb, DT_F16, m, cols, 0, x), gy = upload(&yb, DT_F16, SEQS, out, PAD, NULL),
           cx = tensor_2d(x, DT_F32, m, cols), cy = tensor_2d(want, DT_F32, SEQS, out);
    tail_step(&g, &gl, a, &gx, &gy);
    tail_step(&c, &cl, a, &cx, &cy);
    float *got = download(&gy, "last rows of prompts");
    near(got, want, SEQS * out, tol, "last rows of prompts");
    mem_free(x), mem_free(want), mem_free(got);
    dev_free(&xb), dev_free(&yb);
    side_close(&c), side_close(&cl), side_close(&g), side_close(&gl);
}

START_TEST(prompt_tails)
{
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    static const double tol[] = {2e-3, 6e-3, 4e-2};
    limits(1024, 2048, 4096);
    for (int i = 0; i < (few ? 6 : 36); i++) {
        const attn_shape a = {8, 2, i % 6 < 3 ? 64 : 128, 64, 0, formats[i % 3], false};
        tail_case(&a, tol[i % 3]);
    }
}
END_TEST

/* ---- a recorded pass ---- */

/* So small that most blocks have no tile in most steps. LONG: rows of one and of two sets of planes
 * (decode_pass_product.cuh). */
enum { LAYERS = 2, HIDDEN = 512, FFN = 1408, LONG = 2432, RUNS = 200 };

/* A small model's blocks: q|k|v, o, gate|up and down of each layer, one row of activations. */
typedef struct {
    attn_shape a;
    int64_t ffn;
    side side[LAYERS];
    w4_weight w[LAYERS][4];
    dev_buf wb[LAYERS][4], xb, nb, narrow, wide, ab;
    tensor x, norm;
    float *start;
} stack;

static void stack_open(stack *s, const attn_shape *a, int64_t ffn)
{
    const int64_t q = (int64_t)a->heads * a->dim, kv = (int64_t)a->kv_heads * a->dim;
    const int64_t k[4] = {HIDDEN, q, HIDDEN, ffn}, n[4] = {q + 2 * kv, HIDDEN, ffn, HIDDEN};
    memset(s, 0, sizeof *s);
    s->a = *a;
    s->ffn = ffn;
    for (int l = 0; l < LAYERS; l++) {
        side_open(&s->side[l], gpu, a);
        for (int i = 0; i < 4; i++) {
            const int parts = i == 2 ? 2 : 1;
            void *mem[2];
            w4_weight w[2];
            const w4_weight *list[2] = {&w[0], &w[1]};
            for (int p = 0; p < parts; p++) w[p] = make_w4(&mem[p], k[i], n[i], 128);
            OK_(w4_upload(gpu, &s->wb[l][i], &s->w[l][i], list, parts, e));
            for (int p = 0; p < parts; p++) mem_free(mem[p]);
        }
    }
    s->start = values(HIDDEN, 1);
    s->x = upload(&s->xb, DT_F32, 1, HIDDEN, 0, s->start);
    float *g = values(HIDDEN, 1);
    s->norm = upload(&s->nb, DT_F16, 1, HIDDEN, 0, g);
    s->norm = tensor_1d(s->norm.data, DT_F16, HIDDEN);
    s->norm.mem = dev_mem(gpu);
    mem_free(g);
    OK_(dev_alloc(&s->narrow, gpu, 65536, "test", e));
    OK_(dev_alloc(&s->wide, gpu, 65536, "test", e));
    OK_(dev_alloc(&s->ab, gpu, 65536, "test", e));
}

static void stack_close(stack *s)
{
    for (int l = 0; l < LAYERS; l++) {
        side_close(&s->side[l]);
        for (int i = 0; i < 4; i++) dev_free(&s->wb[l][i]);
    }
    dev_buf *b[] = {&s->xb, &s->nb, &s->narrow, &s->wide, &s->ab};
    for (int i = 0; i < 5; i++) dev_free(b[i]);
    mem_free(s->start);
}

static tensor row_of(const dev_buf *b, int64_t n)
{
    tensor t = tensor_2d(b->data, dev_mem(gpu) == MEM_HOST ? DT_F32 : DT_F16, 1, n);
    t.mem = dev_mem(gpu);
    return t;
}

static void stack_run(stack *s, const batch_rows *rows)
{
    const int64_t q = (int64_t)s->a.heads * s->a.dim, kv = (int64_t)s->a.kv_heads * s->a.dim;
    for (int l = 0; l < LAYERS; l++) {
        tensor h = row_of(&s->narrow, HIDDEN), qkv = row_of(&s->wide, q + 2 * kv),
               y = row_of(&s->ab, q), both = row_of(&s->wide, 2 * s->ffn);
        tensor gate = tensor_cols(&both, 0, s->ffn);
        OK_(op_norm_gemm_w4(gpu, &qkv, &h, &s->x, &s->norm, 1e-5f, &s->w[l][0], false, e));
        attend(&s->side[l], &s->a, &qkv, &y, rows);
        OK_(op_gemm_w4(gpu, &s->x, &y, &s->w[l][1], true, e));
        OK_(op_norm_gemm_w4(gpu, &both, &h, &s->x, &s->norm, 1e-5f, &s->w[l][2], true, e));
        OK_(op_gemm_w4(gpu, &s->x, &gate, &s->w[l][3], true, e));
    }
}

static void stack_restart(stack *s)
{
    const tensor host = tensor_2d(s->start, DT_F32, 1, HIDDEN);
    OK_(dev_copy(gpu, &s->x, &host, e));
    OK_(dev_sync(gpu, e));
}

/* The row of the sequence that holds `held` tokens. */
static batch_rows one_row(stack *s, int32_t held)
{
    const int32_t from[SEQS] = {held, 0}, n[SEQS] = {1, 1};
    batch_rows rows = {0};
    for (int l = LAYERS - 1; l >= 0; l--) rows = make_rows(&s->side[l], from, n);
    rows.seqs = 1, rows.pos.shape[0] = rows.kv_len.shape[0] = rows.block_table.shape[0] = 1;
    rows.seq_start.shape[0] = 2;
    return rows;
}

static void copy_bytes(void *to, memspace there, const void *from, memspace here, size_t n)
{
    tensor dst = tensor_1d(to, DT_U8, (int64_t)n), src = tensor_1d((void *)from, DT_U8, (int64_t)n);
    dst.mem = there, src.mem = here;
    OK_(dev_copy(gpu, &dst, &src, e));
    OK_(dev_sync(gpu, e));
}

/* The same stack with the caches of s by the CPU's references; seed: what the numbers of s began
 * with. Free with mem_free. */
static float *by_reference(const stack *s, int32_t held, uint64_t seed)
{
    const attn_shape *a = &s->a;
    device *card = gpu;
    const uint64_t after = uniform_state;
    stack c;
    uniform_state = seed;
    gpu = cpu;
    stack_open(&c, a, s->ffn);
    gpu = card;
    for (int l = 0; l < LAYERS; l++) {
        copy_bytes(c.side[l].data.data, MEM_HOST, s->side[l].data.data, dev_mem(card),
                   kv_layer_data_bytes(a->format, BLOCKS, a->block_tokens, a->kv_heads, a->dim));
        if (a->format != KV_16)
            copy_bytes(c.side[l].param.data, MEM_HOST, s->side[l].param.data, dev_mem(card),
                       kv_layer_param_bytes(a->format, BLOCKS, a->block_tokens, a->kv_heads));
    }
    gpu = cpu;
    const batch_rows rows = one_row(&c, held);
    stack_run(&c, &rows);
    float *out = download(&c.x, "reference");
    stack_close(&c);
    gpu = card;
    uniform_state = after;
    return out;
}

/* How far off the reference a recorded pass may be. At 16 bits of cache 1.0e-3 at most was
 * measured; where there is no pass it is the same ops again. In few bits a code of the newest token
 * may round to its neighbour, and scores are steep here: the ops one by one are off as much, the
 * pass by up to 1.2 times what they are. Of long rows 1.2e-3 and 1.9e-3 were measured; planes of
 * another warp give 1e-2 and more. */
static double most_off(kv_format f, int64_t ffn, double by_ops)
{
    return f == KV_16 ? fmax(ffn == LONG ? 3e-3 : 1.5e-3, by_ops) : 1.25 * by_ops + 2e-3;
}

static void stack_case(const attn_shape *a, int64_t ffn, int32_t held)
{
    stack s;
    dev_graph *work;
    char what[96];
    const uint64_t seed = uniform_state;
    const int32_t none[SEQS] = {0, 0}, filled[SEQS] = {held, 1};
    snprintf(what, sizeof what, "recorded pass, %d/%d heads of %d, %d bit, ffn %d, %d held",
             a->heads, a->kv_heads, a->dim, (int)a->format, (int)ffn, held);
    stack_open(&s, a, ffn);
    for (int l = 0; l < LAYERS; l++) {
        side c;
        side_open(&c, cpu, a);
        attn_step(&c, &s.side[l], a, none, filled);
        side_close(&c);
    }
    const batch_rows rows = one_row(&s, held);
    float *want = by_reference(&s, held, seed), *first = NULL;
    stack_run(&s, &rows);
    float *ops = download(&s.x, what);
    ck_assert_msg(ops[1] != s.start[1], "%s: the stream did not change", what);
    stack_restart(&s);
    OK_(dev_record_begin(gpu, e));
    stack_run(&s, &rows);
    OK_(dev_record_end(gpu, &work, e));
    for (int i = 0; i < (few ? 3 : RUNS); i++) {
        stack_restart(&s);
        OK_(dev_graph_run(work, e));
        float *got = download(&s.x, what);
        for (int j = 0; first && j < HIDDEN; j++)
            ck_assert_msg(memcmp(&got[j], &first[j], sizeof *got) == 0,
                          "%s: run %d differs from the first at %d: %.9g, %.9g", what, i, j, got[j],
                          first[j]);
        if (first)
            mem_free(got);
        else
            first = got;
    }
    const double off = distance(first, want, HIDDEN), by_ops = distance(ops, want, HIDDEN);
    printf("%s: %.2g off the reference, its ops %.2g\n", what, off, by_ops);
    ck_assert_msg(off <= most_off(a->format, ffn, by_ops),
                  "%s: %.3g off the reference, its ops %.3g", what, off, by_ops);
    dev_graph_free(&work);
    mem_free(first), mem_free(want), mem_free(ops);
    stack_close(&s);
}

/* What is recorded as one kernel is what its ops are one by one, but for the roundings between them
 * (decode_pass.cuh). */
START_TEST(recorded_pass)
{
    static const attn_shape shapes[] = {{4, 4, 128, 64, 0, KV_16, true},
                                        {8, 2, 64, 64, 0, KV_16, false},
                                        {18, 2, 64, 32, 50, KV_16, true},
                                        {4, 2, 96, 64, 0, KV_16, false}};
    static const kv_format formats[] = {KV_16, KV_8, KV_4};
    uniform_state = 1; /* the same values whatever ran before: single codes that flip weigh much */
    limits(1024, 2560, 5120);
    for (size_t i = 0; i < sizeof shapes / sizeof *shapes; i += few ? 2 : 1) {
        for (int f = 0; f < 3; f++) {
            attn_shape a = shapes[i];
            a.format = formats[f];
            if (!few) stack_case(&a, FFN, 1);
            if (!few) stack_case(&a, FFN, 130);
            stack_case(&a, FFN, 350);
        }
    }
    stack_case(&shapes[1], LONG, 130);
}
END_TEST

/* Options: cuda_pair.h. */
int main(int argc, char **argv)
{
    const int rc = pair_open(argc, argv, SEQS);
    if (rc != 0) return rc;
    Suite *s = suite_create("cuda_attn");
    tcase_add_test(cuda_case(s, "attention", 300), attention);
    tcase_add_test(cuda_case(s, "many heads", 300), many_heads);
    tcase_add_test(cuda_case(s, "prompt tails", 300), prompt_tails);
    tcase_add_test(cuda_case(s, "pass", 300), recorded_pass);
    return pair_run(s);
}
