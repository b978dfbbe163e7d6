/* kernels: what the entry points refuse, and what a device promises. kcheck checks the numbers. */
#include <check.h>
#include <limits.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "kernels/ops.h"
#include "support/suite.h"

static device *d;
static err e;

static void open_device(void)
{
    ck_assert_int_eq(dev_open(&d, &(dev_opts){.kind = DEV_CPU, .threads = 2}, &e), OK);
}

static void close_device(void) { dev_close(&d); }

#define ck_refused(call, want, text)                                                \
    do {                                                                            \
        memset(&e, 0, sizeof e);                                                    \
        ck_assert_int_eq(call, want);                                               \
        ck_assert_msg(strstr(e.msg, text) != NULL, "'%s' lacks '%s'", e.msg, text); \
    } while (0)

static float buf[8][4096];

static tensor f32(int i, int64_t rows, int64_t cols)
{
    return tensor_2d(buf[i], DT_F32, rows, cols);
}

/* ---- devices ---- */

START_TEST(open_refuses)
{
    device *x = (device *)&e;
    ck_refused(dev_open(&x, &(dev_opts){.isa = "sse9"}, &e), E_USAGE, "'sse9': expected auto");
    ck_assert_ptr_null(x);
    ck_refused(dev_open(&x, &(dev_opts){.threads = -1}, &e), E_USAGE, "-1");
    ck_refused(dev_open(&x, &(dev_opts){.kind = (dev_kind)7}, &e), E_USAGE, "kind 7");
    ck_assert_ptr_null(x);
    dev_close(&x);
    dev_close(NULL);
}
END_TEST

START_TEST(open_bounds)
{
    static const char *const isa[] = {"ref", "avx2", "avx512", "amx", "auto"};
    for (int i = 0; i < 5; i++) {
        device *x;
        ck_assert_int_eq(dev_open(&x, &(dev_opts){.threads = 1, .isa = isa[i]}, &e), OK);
        ck_assert_ptr_nonnull(strstr(dev_name(x), "1 thread)"));
        if (i == 0) ck_assert_str_eq(dev_name(x), "cpu (ref, 1 thread)");
        ck_assert_int_eq(dev_kind_of(x), DEV_CPU);
        ck_assert_int_eq(dev_mem(x), MEM_HOST);
        ck_assert_int_eq(dev_act(x), DT_F32);
        ck_assert_int_eq(pool_threads(dev_pool(x)), 1);
        dev_close(&x);
        ck_assert_ptr_null(x);
    }
}
END_TEST

START_TEST(memory)
{
    dev_buf b, empty = {0};
    size_t avail, total;
    ck_assert_int_eq(dev_alloc(&b, d, 1000, "test", &e), OK);
    ck_assert_uint_eq(b.bytes, 1000);
    for (int i = 0; i < 1000; i++) ck_assert_int_eq(((uint8_t *)b.data)[i], 0);
    dev_free(&b);
    ck_assert_ptr_null(b.data);
    dev_free(&b);
    dev_free(&empty);
    dev_free(NULL);
#if !defined(__SANITIZE_ADDRESS__) /* which ends the program instead of returning NULL */
    ck_refused(dev_alloc(&b, d, (size_t)1 << 60, "the weights", &e), E_NOMEM, "the weights");
    ck_assert_ptr_null(b.data);
#endif
    ck_assert_int_eq(dev_memory(d, &avail, &total, &e), OK);
    ck_assert(avail > 0 && avail <= total);
    ck_assert_int_eq(dev_sync(d, &e), OK);
}
END_TEST

START_TEST(copy)
{
    tensor a = f32(0, 3, 4), b = f32(1, 3, 4), other = f32(2, 3, 5), view = f32(3, 3, 8);
    for (int i = 0; i < 12; i++) buf[1][i] = (float)i;
    ck_assert_int_eq(dev_copy(d, &a, &b, &e), OK);
    ck_assert_mem_eq(buf[0], buf[1], 48);
    ck_refused(dev_copy(d, &a, &other, &e), E_SHAPE, "[3,5]");
    view = tensor_cols(&view, 0, 4);
    ck_refused(dev_copy(d, &a, &view, &e), E_SHAPE, "contiguous");
    dev_buf up;
    tensor seen;
    ck_assert_int_eq(dev_upload(d, &up, &seen, &b, &e), OK);
    ck_assert_ptr_eq(seen.data, b.data);
    ck_assert_ptr_null(up.data);
}
END_TEST

/* ---- ops ---- */

START_TEST(shapes)
{
    tensor x = f32(0, 2, 8), y = f32(1, 2, 8), z = f32(2, 2, 9), w = f32(3, 5, 8), h = f32(4, 8, 8);
    tensor v8 = tensor_1d(buf[5], DT_F32, 8), v9 = tensor_1d(buf[5], DT_F32, 9);
    tensor out = f32(6, 2, 5);
    ck_refused(op_rmsnorm(d, &z, &x, &v8, 1e-5f, &e), E_SHAPE, "op_rmsnorm: y");
    ck_refused(op_rmsnorm(d, &y, &x, &v9, 1e-5f, &e), E_SHAPE, "op_rmsnorm: w: expected F32 [8]");
    ck_refused(op_add(d, &z, &x, &e), E_SHAPE, "op_add: y: expected F32 [2,8], got F32 [2,9]");
    ck_refused(op_glu(d, &y, &x, &z, &e), E_SHAPE, "op_glu: up");
    ck_refused(op_gemm(d, &y, &x, &w, NULL, false, &e), E_SHAPE, "op_gemm: y: expected F32 [2,5]");
    ck_refused(op_gemm(d, &out, &z, &w, NULL, false, &e), E_SHAPE, "op_gemm: w");
    ck_refused(op_gemm(d, &out, &x, &w, &v8, false, &e), E_SHAPE,
               "op_gemm: bias: expected F32 [5]");
    ck_refused(op_gram(d, &w, &x, &e), E_SHAPE, "op_gram: h");
    ck_refused(op_gram_finish(d, &w, &e), E_SHAPE, "op_gram_finish: h");
    tensor sums = tensor_1d(buf[6], DT_F64, 2), wrong = tensor_1d(buf[6], DT_F32, 2);
    ck_refused(op_quad(d, &wrong, &x, &h, &e), E_SHAPE, "op_quad: out: expected F64");
    ck_refused(op_quad(d, &sums, &x, &w, &e), E_SHAPE, "op_quad: h");
    ck_refused(op_matmul(d, &y, &x, &x, &e), E_SHAPE, "op_matmul: b");
    ck_refused(op_absstat(d, &v8, &v8, &x, &e), E_SHAPE, "op_absstat: abssum: expected F64");
}
END_TEST

START_TEST(types_and_strides)
{
    tensor x = f32(0, 2, 8), y = f32(1, 2, 8), w = f32(3, 8, 8);
    tensor half = tensor_2d(buf[2], DT_F16, 2, 8), ints = tensor_2d(buf[2], DT_I32, 8, 8);
    ck_refused(op_add(d, &y, &half, &e), E_SHAPE, "op_add: x: expected F32");
    ck_refused(op_gemm(d, &y, &x, &ints, NULL, false, &e), E_SHAPE,
               "op_gemm: w: expected F16, BF16 or F32, got I32");
    tensor col = x;
    col.stride[1] = 2;
    ck_refused(op_add(d, &y, &col, &e), E_SHAPE, "last stride of 1, got 2");
    tensor overlap = y;
    overlap.stride[0] = 4;
    ck_refused(op_add(d, &overlap, &x, &e), E_SHAPE, "stride 4");
    tensor gap = f32(3, 8, 16);
    gap = tensor_cols(&gap, 0, 8);
    ck_refused(op_gemm(d, &y, &x, &gap, NULL, false, &e), E_SHAPE,
               "op_gemm: w: expected contiguous");
    tensor cuda = x;
    cuda.mem = MEM_CUDA;
    ck_refused(op_add(d, &y, &cuda, &e), E_SHAPE, "got cuda memory");
    tensor null = x;
    null.data = NULL;
    ck_refused(op_add(d, &y, &null, &e), E_SHAPE, "no data");
    tensor none = f32(0, 0, 8), none_y = f32(1, 0, 8);
    none.data = none_y.data = NULL;
    ck_assert_int_eq(op_add(d, &none_y, &none, &e), OK); /* no rows: nothing to do */
    ck_assert_int_eq(op_gemm(d, &none_y, &none, &w, NULL, false, &e), OK);
    w4_weight w4 = {.k = 8, .n = 8, .group = 8, .layout = W4_AWQ};
    ck_refused(op_gemm_w4(d, &y, &x, &w4, false, &e), E_UNSUPPORTED,
               "op_gemm_w4: w: expected layout");
}
END_TEST

START_TEST(ids)
{
    int32_t id[3] = {0, 4, 2};
    tensor table = f32(0, 5, 8), y = f32(1, 3, 8), t = tensor_1d(id, DT_I32, 3);
    tensor logits = f32(2, 3, 5), nll = tensor_1d(buf[3], DT_F32, 3);
    ck_assert_int_eq(op_embed(d, &y, &table, &t, &e), OK);
    ck_assert_int_eq(op_nll(d, &nll, NULL, &logits, &t, &e), OK);
    for (int i = 0; i < 3; i++) ck_assert_float_eq_tol(buf[3][i], logf(5), 1e-6);
    id[1] = 5;
    ck_refused(op_embed(d, &y, &table, &t, &e), E_SHAPE,
               "op_embed: ids[1]: expected 0 to 4, got 5");
    id[1] = -1;
    ck_refused(op_nll(d, &nll, NULL, &logits, &t, &e), E_SHAPE, "op_nll: target[1]");
}
END_TEST

START_TEST(scratch)
{
    static float x[20 * 8], w[8 * 8], y[20 * 8];
    tensor tx = tensor_2d(x, DT_F32, 20, 8), tw = tensor_2d(w, DT_F32, 8, 8);
    tensor ty = tensor_2d(y, DT_F32, 20, 8);
    const op_limits small = {
        .rows = 20, .k = 8, .n = 8, .heads = 1, .head_dim = 8, .max_kv = 8, .seqs = 1};
    op_limits large = small;
    large.max_kv = 1 << 16;
    if (ops_reserve_bytes(d, &small) > 0) /* the reference needs none */
        ck_refused(op_gram(d, &tw, &tx, &e), E_LIMIT, "op_gram: needs");
    ck_assert_int_eq(ops_reserve(d, &small, &e), OK);
    ck_assert_int_eq(op_gram(d, &tw, &tx, &e), OK);
    ck_assert_uint_ge(ops_reserve_bytes(d, &large), ops_reserve_bytes(d, &small));
    ck_assert_int_eq(ops_reserve(d, &large, &e), OK);
    ck_assert_int_eq(ops_reserve(d, &small, &e), OK); /* never shrinks */
    ck_assert_int_eq(op_gemm(d, &ty, &tx, &tw, NULL, false, &e), OK);
}
END_TEST

START_TEST(cache_bytes)
{
    ck_assert_uint_eq(kv_layer_data_bytes(KV_16, 3, 64, 2, 128), 3u * 64 * 2 * 2 * 256);
    ck_assert_uint_eq(kv_layer_data_bytes(KV_8, 3, 64, 2, 128), 3u * 64 * 2 * 2 * 128);
    ck_assert_uint_eq(kv_layer_data_bytes(KV_4, 3, 64, 2, 10), 3u * 64 * 2 * 2 * 5);
    ck_assert_uint_eq(kv_layer_param_bytes(KV_16, 3, 64, 2), 0);
    ck_assert_uint_eq(kv_layer_param_bytes(KV_4, 3, 64, 2), 3u * 64 * 2 * 2 * 4);
    ck_assert_uint_eq(kv_layer_data_bytes(KV_16, INT_MAX, INT_MAX, INT_MAX, INT_MAX), SIZE_MAX);
}
END_TEST

/* ---- batches and the cache ---- */

typedef struct {
    int32_t pos[4], start[3], len[2], table[4];
    float inv_freq[4];
    tensor q, k, v, y;
    batch_rows rows;
    kv_layer kv;
    rope_spec rope;
} step;

/* Two sequences of 3 and 1 rows, head dimension 8, blocks of 4 tokens. */
static step make_step(void)
{
    static uint8_t data[2048], param[512];
    step s = {.pos = {0, 1, 2, 5}, .start = {0, 3, 4}, .len = {3, 6}, .table = {2, 0, 1, 3}};
    s.q = tensor_of(buf[0], DT_F32, 4, (int64_t[]){4, 1, 2, 8});
    s.k = tensor_of(buf[1], DT_F32, 3, (int64_t[]){4, 1, 8});
    s.v = tensor_of(buf[2], DT_F32, 3, (int64_t[]){4, 1, 8});
    s.y = f32(3, 4, 16);
    s.kv = (kv_layer){data, param, KV_8, 4, 4, 1, 8, MEM_HOST};
    s.rope = (rope_spec){.dims = 8, .mscale = 1};
    return s;
}

static void bind_step(step *s) /* tensors point into s: after it has its place */
{
    s->rows = (batch_rows){tensor_1d(s->pos, DT_I32, 4),
                           tensor_1d(s->start, DT_I32, 3),
                           tensor_1d(s->len, DT_I32, 2),
                           tensor_2d(s->table, DT_I32, 2, 2),
                           2,
                           3,
                           6};
    s->rope.inv_freq = tensor_1d(s->inv_freq, DT_F32, 4);
}

static err_code run_step(step *s)
{
    bind_step(s);
    err_code rc = op_rope_kv(d, &s->q, &s->k, &s->v, &s->rope, &s->rows, &s->kv, &e);
    if (rc == OK) rc = op_attn(d, &s->y, &s->q, &s->kv, &s->rows, 1, 0, &e);
    return rc;
}

#define ck_step(change, want, text)          \
    do {                                     \
        step s_ = make_step();               \
        step *s = &s_;                       \
        change;                              \
        ck_refused(run_step(s), want, text); \
    } while (0)

START_TEST(batches)
{
    step good = make_step();
    ck_assert_msg(run_step(&good) == OK, "%s", e.msg);
    ck_step(s->pos[3] = 6, E_SHAPE, "pos[3]: expected 0 to 5, got 6");
    ck_step(s->pos[0] = -1, E_SHAPE, "pos[0]");
    ck_step(s->start[1] = 5, E_SHAPE, "seq_start[2] is under");
    ck_step(s->start[2] = 3, E_SHAPE, "seq_start: expected 0 to 4, got 0 to 3");
    ck_step(s->start[0] = 1, E_SHAPE, "seq_start");
    ck_step(s->len[1] = 9, E_SHAPE, "over max_q 3 or max_kv 6");
    ck_step(s->table[3] = 4, E_SHAPE, "sequence 1: block 1: expected 0 to 3, got 4");
    ck_step(s->table[0] = -1, E_SHAPE, "sequence 0: block 0");
    ck_step(s->kv.format = (kv_format)5, E_UNSUPPORTED, "kv format 5");
    ck_step(s->kv.head_dim = 7, E_UNSUPPORTED, "head dimension 7");
    ck_step(s->kv.param = NULL, E_SHAPE, "without data");
    ck_step(s->kv.blocks = 0, E_SHAPE, "0 blocks");
    ck_step(s->kv.mem = MEM_CUDA, E_SHAPE, "not in memory of cpu");
    ck_step(s->rope.dims = 9, E_SHAPE, "rotated dims");
    ck_step(s->v.shape[0] = 3, E_SHAPE, "op_rope_kv: v");
    ck_step(s->y.shape[1] = 15, E_SHAPE, "op_attn: y");
    step s = make_step();
    bind_step(&s);
    ck_refused(op_attn(d, &s.y, &s.q, &s.kv, &s.rows, 1, -1, &e), E_SHAPE, "window");
    s.rows.max_kv = 5;
    ck_refused(op_attn(d, &s.y, &s.q, &s.kv, &s.rows, 1, 0, &e), E_SHAPE, "max_kv 5");
}
END_TEST

/* Values that f16 cannot hold must show, not turn into plausible numbers. */
START_TEST(overflow_shows)
{
    static const kv_format format[] = {KV_16, KV_8, KV_4};
    for (int f = 0; f < 3; f++) {
        step s = make_step();
        s.kv.format = format[f];
        for (int i = 0; i < 64; i++) buf[0][i] = buf[1][i % 32] = buf[2][i % 32] = 0.5f;
        buf[2][2 * 8 + 3] = 1e9f; /* v of row 2, the last of its sequence */
        ck_assert_int_eq(run_step(&s), OK);
        ck_assert(!isfinite(buf[3][2 * 16 + 3]));
        ck_assert(isfinite(buf[3][3 * 16 + 3])); /* another sequence does not see it */
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("kernels");
    TCase *t = tcase_create("kernels");
    tcase_add_checked_fixture(t, open_device, close_device);
    tcase_add_test(t, open_refuses);
    tcase_add_test(t, open_bounds);
    tcase_add_test(t, memory);
    tcase_add_test(t, copy);
    tcase_add_test(t, shapes);
    tcase_add_test(t, types_and_strides);
    tcase_add_test(t, ids);
    tcase_add_test(t, scratch);
    tcase_add_test(t, cache_bytes);
    tcase_add_test(t, batches);
    tcase_add_test(t, overflow_shows);
    suite_add_tcase(s, t);
    return suite_run(s);
}
