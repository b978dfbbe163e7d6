/* formats/convert: every element of every file against the rules of the format, written out here
 * once more in their plainest form: where does input k, output column n of rank r come from? */
#include "formats/convert.h"

#include <check.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/half.h"
#include "base/mem.h"
#include "formats/manifest.h"
#include "formats/tm_store.h"
#include "tests/support/suite.h"
#include "tests/support/tempdir.h"
#include "tests/support/tiny_dir.h"
#include "tests/support/tiny_weights.h"

#define MUST(x) ck_assert_msg((x) == OK, "%s", e.msg)

static char root[256], dense_path[300], awq_path[300], out_path[300];
static weight_src *src; /* what is converted */
static weight_src *ref; /* the same weights in memory: dense bf16, or codes */

static void open_dense(model_desc m)
{
    err e;
    tempdir_make(root, sizeof root);
    (void)snprintf(dense_path, sizeof dense_path, "%s/dense", root);
    (void)snprintf(awq_path, sizeof awq_path, "%s/awq", root);
    (void)snprintf(out_path, sizeof out_path, "%s/ws", root);
    tiny_dir_make(dense_path, &m, 5);
    const tiny_opts o = {.desc = m, .seed = 5};
    MUST(tiny_open(&ref, &o, &e));
    MUST(weights_open(&src, dense_path, &e));
}

static void open_awq(model_desc m, int32_t group)
{
    err e;
    open_dense(m);
    weights_close(&src);
    weights_close(&ref);
    tiny_awq_make(awq_path, dense_path, &m, 5, group);
    const tiny_opts o = {.desc = m, .seed = 5, .w4_group = group};
    MUST(tiny_open(&ref, &o, &e));
    MUST(weights_open(&src, awq_path, &e));
}

static void close_all(void)
{
    weights_close(&src);
    weights_close(&ref);
    tempdir_drop(root);
}

static void write_tp(int32_t tp)
{
    convert *c;
    err e;
    const convert_opts o = {.tp = tp};
    MUST(convert_open(&c, src, &o, NULL, &e));
    MUST(convert_write(c, out_path, false, &e));
    convert_close(&c);
}

/* ---- the rules ---- */

typedef struct {
    tensor_role role; /* ROLE_COUNT: padding */
    int64_t row;
} place;

/* Output column n of w_qkv of rank r: [Q heads | K heads | V heads] of that rank, rotary columns of
 * Q and K interleaved: new[2j+h] = old[h*D/2+j]. */
static place qkv_place(const model_desc *m, int32_t tp, int32_t rank, int64_t n)
{
    const int64_t d = m->head_dim, per = m->heads / m->kv_heads;
    const int64_t q_local = m->heads / tp, kv_all = m->kv_heads > tp ? m->kv_heads : tp,
                  kv_local = kv_all / tp;
    int64_t head = n / d, i = n % d;
    const int kind = head < q_local ? 0 : head < q_local + kv_local ? 1 : 2;
    if (kind == 0)
        head = rank * q_local + head;
    else
        head = (rank * kv_local + (head - q_local) % kv_local) / (kv_all / m->kv_heads);
    if (kind != 2) i = i % 2 * (d / 2) + i / 2;
    if (m->qkv == QKV_SPLIT)
        return (place){kind == 0 ? ROLE_Q : kind == 1 ? ROLE_K : ROLE_V, head * d + i};
    if (kind == 0) return (place){ROLE_QKV, (head / per * (per + 2) + head % per) * d + i};
    return (place){ROLE_QKV, (head * (per + 2) + per + kind - 1) * d + i};
}

static place column_place(const model_desc *m, const tm_file *f, int32_t tp, int64_t ffn, int64_t n)
{
    if (f->role == ROLE_QKV) return qkv_place(m, tp, f->rank, n);
    if (f->role == ROLE_O || f->role == ROLE_DOWN) return (place){f->role, n};
    const int64_t at = f->rank * (ffn / tp) + n;
    return (place){at < m->ffn ? f->role : ROLE_COUNT, at};
}

static int64_t input_place(const model_desc *m, const tm_file *f, int32_t tp, int64_t ffn,
                           int64_t k)
{
    if (f->role == ROLE_O) return f->rank * ((int64_t)m->heads * m->head_dim / tp) + k;
    if (f->role != ROLE_DOWN) return k;
    const int64_t at = f->rank * (ffn / tp) + k;
    return at < m->ffn ? at : -1;
}

static void *read_file(const tm_file *f)
{
    char path[600], *data;
    size_t n;
    err e;
    (void)snprintf(path, sizeof path, "%s/triton_models/weights/%s", out_path, f->name);
    MUST(file_read(&data, &n, path, 1 << 28, &e));
    ck_assert_uint_eq(n, f->bytes);
    return data;
}

static linear_view ref_linear(tensor_role r, int32_t layer)
{
    linear_view v;
    err e;
    MUST(weights_linear(ref, r, layer, -1, &v, &e));
    return v;
}

/* Value of one stored element: bits of a weight or bias, code, scale or zero. */
static uint32_t expected(const tm_file *f, const linear_view *v, place p, int64_t k,
                         uint16_t (*cast)(uint16_t))
{
    if (p.role == ROLE_COUNT || k < 0) return 0;
    switch (f->part) {
    case TM_WEIGHT: return cast(((uint16_t *)v->dense.data)[p.row * v->dense.stride[0] + k]);
    case TM_BIAS: return v->bias.data ? cast(((uint16_t *)v->bias.data)[p.row]) : 0;
    case TM_QWEIGHT: return (uint32_t)w4_code(&v->q, p.row, k);
    case TM_SCALES: return w4_scale(&v->q, p.row, k);
    case TM_ZEROS: return f32_to_f16(w4_zero(&v->q, p.row, k));
    default: ck_abort_msg("part"); return 0;
    }
}

static uint16_t as_is(uint16_t h) { return h; }
static uint16_t bf16_as_f16(uint16_t h) { return f32_to_f16(bf16_to_f32(h)); }

static void check_linear_file(const tm_file *f, int32_t tp, int64_t ffn, uint16_t (*cast)(uint16_t))
{
    const model_desc *m = weights_desc(ref);
    const int64_t n_cols = f->part == TM_QWEIGHT ? f->cols * 8 : f->cols, group = m->w4_group;
    void *data = read_file(f);
    for (int64_t n = 0; n < n_cols; n++) {
        const place p = column_place(m, f, tp, ffn, n);
        linear_view v = {0};
        if (p.role != ROLE_COUNT) v = ref_linear(p.role, f->layer);
        for (int64_t i = 0; i < f->rows; i++) {
            int64_t k = i;
            if (f->part == TM_SCALES || f->part == TM_ZEROS) {
                k = input_place(m, f, tp, ffn, i * group);
                k = k < 0 ? -1 : k / group;
            } else if (f->part != TM_BIAS) {
                k = input_place(m, f, tp, ffn, i);
            }
            const uint32_t got = f->part == TM_QWEIGHT
                                     ? ((uint32_t *)data)[i * f->cols + n / 8] >> n % 8 * 4 & 15u
                                     : ((uint16_t *)data)[i * f->cols + n];
            if (got != expected(f, &v, p, k, cast))
                ck_abort_msg("%s: row %lld column %lld: got %x, expected %x", f->name, (long long)i,
                             (long long)n, got, expected(f, &v, p, k, cast));
        }
    }
    mem_free(data);
}

static void check_plain_file(const tm_file *f, uint16_t (*cast)(uint16_t))
{
    tensor t;
    err e;
    uint16_t *data = read_file(f);
    MUST(weights_tensor(ref, f->role, f->layer, &t, &e));
    const int64_t cols = t.shape[t.ndim - 1], rows = t.ndim == 2 ? t.shape[0] : 1;
    for (int64_t r = 0; r < f->rows; r++)
        for (int64_t c = 0; c < f->cols; c++) {
            const int64_t row = f->role == ROLE_HEAD ? f->rank * f->rows + r : r;
            const int64_t col = f->role == ROLE_EMBED ? f->rank * f->cols + c : c;
            const uint16_t want = row < rows ? cast(((uint16_t *)t.data)[row * cols + col]) : 0;
            if (data[r * f->cols + c] != want)
                ck_abort_msg("%s: row %lld column %lld: got %x, expected %x", f->name, (long long)r,
                             (long long)c, data[r * f->cols + c], want);
        }
    mem_free(data);
}

/* Every file of the workspace at out_path. */
static void check_workspace(int32_t tp, uint16_t (*cast)(uint16_t))
{
    tm_config c;
    tm_file *files;
    size_t n;
    err e;
    MUST(tm_store_config(&c, out_path, &e));
    ck_assert_int_eq(c.tp, tp);
    MUST(tm_config_files(&files, &n, &c, &e));
    for (size_t i = 0; i < n; i++) {
        const tensor_role r = files[i].role;
        if (r == ROLE_QKV || r == ROLE_O || r == ROLE_GATE || r == ROLE_UP || r == ROLE_DOWN)
            check_linear_file(&files[i], tp, c.m.ffn, cast);
        else
            check_plain_file(&files[i], cast);
    }
    mem_free(files);
}

static model_desc model_at(int i)
{
    return i == 0 ? tiny_llama() : i == 1 ? tiny_internlm2() : tiny_qwen2();
}

/* ---- one rank ---- */

START_TEST(dense_files)
{
    open_dense(model_at(_i));
    write_tp(1);
    check_workspace(1, as_is);
    close_all();
}
END_TEST

START_TEST(awq_files)
{
    open_awq(model_at(_i), 128);
    write_tp(1);
    check_workspace(1, bf16_as_f16);
    close_all();
}
END_TEST

START_TEST(dense_as_f16)
{
    convert *c;
    err e;
    const convert_opts o = {.dt = DT_F16};
    open_dense(tiny_llama());
    MUST(convert_open(&c, src, &o, NULL, &e));
    MUST(convert_write(c, out_path, false, &e));
    convert_close(&c);
    check_workspace(1, bf16_as_f16);
    close_all();
}
END_TEST

/* What the reader gives back: description and views. */
START_TEST(read_back)
{
    weight_src *ws;
    linear_view v;
    tensor t;
    err e;
    open_awq(tiny_qwen2(), 128);
    write_tp(1);
    MUST(weights_open(&ws, out_path, &e));
    const model_desc *m = weights_desc(ws), *h = weights_desc(src);
    ck_assert_int_eq(weights_kind(ws), SRC_TM);
    ck_assert_int_eq(m->qkv, QKV_CONCAT);
    ck_assert(m->rope_interleaved && m->qkv_bias && m->o_bias && !m->tied_embed);
    ck_assert_str_eq(m->family, "qwen2");
    ck_assert(m->layers == h->layers && m->hidden == h->hidden && m->heads == h->heads &&
              m->kv_heads == h->kv_heads && m->head_dim == h->head_dim && m->ffn == h->ffn &&
              m->vocab == h->vocab && m->max_tokens == h->max_tokens);
    ck_assert(m->norm_eps == h->norm_eps && m->rope_theta == h->rope_theta &&
              m->rope_dims == h->rope_dims);
    ck_assert_int_eq(m->w4_group, 128);
    ck_assert_int_eq(m->n_stop, h->n_stop);
    ck_assert_mem_eq(m->stop, h->stop, sizeof m->stop);
    MUST(weights_linear(ws, ROLE_QKV, 1, -1, &v, &e));
    MUST(w4_check(&v.q, "qkv", &e));
    ck_assert(v.w4 && v.q.layout == W4_TM && v.q.n == (4 + 2 * 2) * 64 && v.q.k == 256);
    ck_assert_ptr_nonnull(v.q.bias.data);
    MUST(weights_linear(ws, ROLE_O, 1, -1, &v, &e));
    for (int i = 0; i < 256; i++) ck_assert_uint_eq(((uint16_t *)v.bias.data)[i], 0);
    MUST(weights_tensor(ws, ROLE_HEAD, -1, &t, &e)); /* the tied embedding, copied */
    ck_assert(t.ndim == 2 && t.shape[0] == 50 && t.shape[1] == 256);
    ck_assert(weights_has(ws, ROLE_QKV, 0, -1) && !weights_has(ws, ROLE_Q, 0, -1));
    weights_prefetch(ws, 0);
    weights_release(ws, 0);
    weights_close(&ws);
    close_all();
}
END_TEST

START_TEST(read_back_dense)
{
    weight_src *ws;
    linear_view v, want;
    err e;
    open_dense(tiny_llama());
    write_tp(1);
    MUST(weights_open(&ws, out_path, &e));
    ck_assert_int_eq(weights_desc(ws)->dt, DT_BF16);
    MUST(weights_linear(ws, ROLE_UP, 0, -1, &v, &e));
    want = ref_linear(ROLE_UP, 0);
    ck_assert(!v.w4 && v.dense.shape[0] == 384 && v.dense.shape[1] == 256);
    ck_assert(v.dense.stride[0] == 1 && v.dense.stride[1] == 384);
    for (int64_t n = 0; n < 384; n++)
        for (int64_t k = 0; k < 256; k++)
            ck_assert_uint_eq(((uint16_t *)v.dense.data)[n + k * 384],
                              ((uint16_t *)want.dense.data)[n * 256 + k]);
    weights_close(&ws);
    close_all();
}
END_TEST

/* ---- ranks ---- */

START_TEST(two_ranks_dense)
{
    open_dense(model_at(_i)); /* internlm2 has one KV head: it is repeated */
    write_tp(2);
    check_workspace(2, as_is);
    close_all();
}
END_TEST

START_TEST(two_ranks_awq)
{
    open_awq(model_at(_i), 128); /* three groups of 128 in the FFN: padded to four */
    write_tp(2);
    tm_config c;
    err e;
    MUST(tm_store_config(&c, out_path, &e));
    ck_assert_int_eq(c.m.ffn, 512);
    ck_assert_int_eq(c.m.kv_heads, 2);
    check_workspace(2, bf16_as_f16);
    close_all();
}
END_TEST

static void assert_open_fails(const convert_opts *o, err_code code, const char *text)
{
    convert *c;
    err e = {0};
    ck_assert_int_eq(convert_open(&c, src, o, NULL, &e), code);
    ck_assert_msg(strstr(e.msg, text) != NULL, "%s", e.msg);
    ck_assert_ptr_null(c);
}

START_TEST(ranks_that_do_not_divide)
{
    open_dense(tiny_llama());
    assert_open_fails(&(convert_opts){.tp = 3}, E_UNSUPPORTED, "number of heads is 4");
    assert_open_fails(&(convert_opts){.tp = 8}, E_UNSUPPORTED, "number of heads is 4");
    assert_open_fails(&(convert_opts){.tp = 100}, E_USAGE, "expected 1..64");
    assert_open_fails(&(convert_opts){.tp = -1}, E_USAGE, "expected 1..64");
    close_all();
}
END_TEST

START_TEST(unsupported_sources)
{
    weight_src *awq = NULL;
    err e;
    open_awq(tiny_llama(), 64);
    assert_open_fails(&(convert_opts){0}, E_UNSUPPORTED, "tm-run reads");
    weights_close(&src);
    MUST(weights_open(&src, dense_path, &e));
    write_tp(1);
    awq = src;
    MUST(weights_open(&src, out_path, &e));
    assert_open_fails(&(convert_opts){0}, E_UNSUPPORTED, "workspace already");
    weights_close(&awq);
    close_all();
}
END_TEST

/* ---- output ---- */

static void count_warnings(void *ud, log_level level, const char *line)
{
    (void)line;
    if (level == LOG_WARN) ++*(int *)ud;
}

START_TEST(odd_head_size)
{
    model_desc m = tiny_llama();
    convert *c;
    int warnings = 0;
    err e;
    const job j = {.log = count_warnings, .ud = &warnings, .level = LOG_WARN};
    const convert_opts o = {0};
    m.heads = 8;
    m.kv_heads = 4;
    m.head_dim = m.rope_dims = 32;
    open_awq(m, 128);
    MUST(convert_open(&c, src, &o, &j, &e));
    ck_assert_int_eq(warnings, 1);
    MUST(convert_write(c, out_path, false, &e));
    convert_close(&c);
    check_workspace(1, bf16_as_f16);
    close_all();
}
END_TEST

START_TEST(same_bytes_and_states)
{
    convert *c;
    manifest a, b;
    err e;
    const convert_opts o = {0}, other = {.session_len = 77};
    char second[600], path[700];
    open_awq(tiny_internlm2(), 128);
    (void)snprintf(second, sizeof second, "%s/second", root);
    MUST(convert_open(&c, src, &o, NULL, &e));
    ck_assert_int_eq(convert_look(c, out_path), CONVERT_ABSENT);
    ck_assert_int_eq(convert_look(c, awq_path), CONVERT_FOREIGN); /* a manifest of another kind */
    ck_assert_int_eq(convert_look(c, dense_path), CONVERT_FOREIGN);
    MUST(convert_write(c, out_path, false, &e));
    ck_assert_int_eq(convert_look(c, out_path), CONVERT_CURRENT);
    ck_assert_int_eq(convert_write(c, out_path, false, &e), E_USAGE);
    MUST(convert_write(c, second, false, &e));
    MUST(manifest_read(&a, out_path, &e));
    MUST(manifest_read(&b, second, &e));
    ck_assert_str_eq(a.digest.hex, b.digest.hex);
    ck_assert_str_eq(a.parent, weights_digest(src));
    MUST(manifest_verify(&a, out_path, NULL, &e));
    manifest_free(&a);
    manifest_free(&b);
    (void)snprintf(path, sizeof path, "%s/triton_models/weights/norm.weight", out_path);
    FILE *f = fopen(path, "r+b");
    ck_assert_ptr_nonnull(f);
    (void)fputc(1, f);
    ck_assert_int_eq(fclose(f), 0);
    ck_assert_int_eq(convert_look(c, out_path), CONVERT_STALE); /* a changed byte */
    convert_close(&c);
    MUST(convert_open(&c, src, &other, NULL, &e));
    ck_assert_int_eq(convert_look(c, second), CONVERT_STALE); /* another option */
    convert_close(&c);
    close_all();
}
END_TEST

START_TEST(compare_one)
{
    static const char *const names[] = {
        "layers.0.attention.w_qkv.0.qweight", "layers.1.feed_forward.w2.0.zeros",
        "layers.1.attention.wo.0.scales", "output.0.weight", "norm.weight"};
    convert *c;
    char path[600];
    const convert_opts o = {0};
    err e = {0};
    open_awq(tiny_llama(), 128);
    MUST(convert_open(&c, src, &o, NULL, &e));
    MUST(convert_write(c, out_path, false, &e));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        MUST(convert_compare(c, out_path, names[i], &e));
        (void)snprintf(path, sizeof path, "%s/triton_models/weights/%s", out_path, names[i]);
        FILE *f = fopen(path, "r+b");
        ck_assert_ptr_nonnull(f);
        ck_assert_int_eq(fseek(f, 33, SEEK_SET), 0);
        const int byte = fgetc(f);
        ck_assert_int_eq(fseek(f, 33, SEEK_SET), 0);
        (void)fputc(byte ^ 1, f);
        (void)fclose(f);
        ck_assert_int_eq(convert_compare(c, out_path, names[i], &e), E_CHECK);
        ck_assert_msg(strstr(e.msg, "byte 33") != NULL, "%s", e.msg);
    }
    ck_assert_int_eq(convert_compare(c, out_path, "layers.9.x", &e), E_INPUT);
    convert_close(&c);
    close_all();
}
END_TEST

/* NaN in an input, and bf16 beyond f16. */
START_TEST(values)
{
    convert *c;
    model_desc m = tiny_llama();
    linear_view v;
    weight_src *mem;
    err e = {0};
    const tiny_opts t = {.desc = m, .seed = 5};
    const convert_opts f16_out = {.dt = DT_F16}, clamped = {.dt = DT_F16, .clamp = true};
    open_dense(m);
    MUST(tiny_open(&mem, &t, &e));
    MUST(weights_linear(mem, ROLE_K, 1, -1, &v, &e));
    ((uint16_t *)v.dense.data)[77] = 0x7f00; /* 1.7e38 */
    MUST(convert_open(&c, mem, &f16_out, NULL, &e));
    ck_assert_int_eq(convert_write(c, out_path, false, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layer 1: k: 1 values") != NULL, "%s", e.msg);
    ck_assert(!file_exists(out_path));
    convert_close(&c);
    MUST(convert_open(&c, mem, &clamped, NULL, &e));
    MUST(convert_write(c, out_path, false, &e));
    convert_close(&c);

    ((uint16_t *)v.dense.data)[9 * 256 + 200] = 0x7fc0; /* NaN */
    MUST(convert_open(&c, mem, &(convert_opts){0}, NULL, &e));
    ck_assert_int_eq(convert_write(c, awq_path, false, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "layer 1: k: element 2504 is NaN") != NULL, "%s", e.msg);
    convert_close(&c);
    weights_close(&mem);
    close_all();
}
END_TEST

START_TEST(stops)
{
    convert *c;
    atomic_bool stop = true;
    const job j = {.stop = &stop};
    err e;
    open_dense(tiny_llama());
    MUST(convert_open(&c, src, &(convert_opts){0}, &j, &e));
    ck_assert_int_eq(convert_write(c, out_path, false, &e), E_CANCELED);
    ck_assert(!file_exists(out_path));
    convert_close(&c);
    close_all();
}
END_TEST

int main(void)
{
    (void)setenv("TMPDIR", "/dev/shm",
                 0); /* every file is synced: on a disk that is most of the time */
    Suite *s = suite_create("convert");
    TCase *t = tcase_create("convert");
    tcase_set_timeout(t, 600);
    tcase_add_loop_test(t, dense_files, 0, 3);
    tcase_add_loop_test(t, awq_files, 0, 3);
    tcase_add_test(t, dense_as_f16);
    tcase_add_test(t, read_back);
    tcase_add_test(t, read_back_dense);
    tcase_add_loop_test(t, two_ranks_dense, 0, 3);
    tcase_add_loop_test(t, two_ranks_awq, 0, 3);
    tcase_add_test(t, ranks_that_do_not_divide);
    tcase_add_test(t, unsupported_sources);
    tcase_add_test(t, odd_head_size);
    tcase_add_test(t, same_bytes_and_states);
    tcase_add_test(t, compare_one);
    tcase_add_test(t, values);
    tcase_add_test(t, stops);
    suite_add_tcase(s, t);
    return suite_run(s);
}
