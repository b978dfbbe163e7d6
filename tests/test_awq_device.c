/* The search's steps for devices whose memory the host cannot read: on the CPU they must find what
 * the CPU's own steps find, and on a GPU, where there is one, about as much, the same every
 * time. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "awq/chain.h"
#include "awq/chain_shared.h"
#include "awq/dev_chain.h"
#include "awq/pack.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

static const char *const methods[] = {"awq", "best"};
static const char *const others[] = {"rtn", "lmdeploy", "gptq"};
enum { METHODS = sizeof methods / sizeof *methods, OTHERS = sizeof others / sizeof *others };

enum { PLAIN, FOLDED, TURNED, CACHED, KINDS }; /* of k and v; CACHED: best's alone */

static bool has_kind(int method, int kind)
{
    return kind != CACHED || strcmp(methods[method], "best") == 0;
}

static void search(const char *method, bool on_device, int kind, search_summary *s)
{
    search_opts o = options(method, NULL);
    err e;
    o.kv_fold = kind != PLAIN;
    o.rotate = kind == TURNED ? "vo" : NULL;
    o.cache = kind == CACHED ? KV_4 : KV_16;
    o.on_device = on_device;
    MUST(search_run(s, dev, &o, NULL, &e));
}

/* Methods that carry rounded inputs on take each code from all before it: one that falls the other
 * way changes all others, so only how well the whole does can be compared. */
static void same(const char *method, const search_summary *own, const search_summary *want,
                 double before, double after)
{
    if (own->predicted.windows) {
        ck_assert_msg(near(own->predicted.nll16, want->predicted.nll16, before),
                      "%s: 16-bit loss %.6g, expected %.6g", method, own->predicted.nll16,
                      want->predicted.nll16);
        ck_assert_msg(near(own->predicted.nll, want->predicted.nll, 0.02),
                      "%s: loss %.6g, expected %.6g", method, own->predicted.nll,
                      want->predicted.nll);
        ck_assert_msg(own->after < 1.3 * want->after, "%s: after %.6g, expected %.6g", method,
                      own->after, want->after);
    } else {
        ck_assert_msg(near(own->before, want->before, before), "%s: before %.8g, expected %.8g",
                      method, own->before, want->before);
        ck_assert_msg(near(own->after, want->after, after), "%s: after %.8g, expected %.8g", method,
                      own->after, want->after);
    }
}

/* Whether the plan that is there has k or v in other bases. */
static bool turns(void)
{
    plan_file *f;
    block_plan p;
    err e;
    bool any = false;
    MUST(plan_open(&f, plan_path, &e));
    for (int32_t l = 0; l < plan_info_of(f)->layers; l++) {
        MUST(plan_layer(f, l, &p, &e));
        any |= p.turn_k.data || p.turn_v.data;
    }
    plan_close(&f);
    return any;
}

static void stop_behind_first(void *ud, log_level level, const char *line)
{
    (void)level;
    if (strncmp(line, "layer 0: loss", 13) == 0) atomic_store((atomic_bool *)ud, true);
}

/* A run of best that was stopped behind its first layer ends in the bytes of a whole one. */
static void goes_on(bool on_device)
{
    atomic_bool stop = false;
    const job j = {.log = stop_behind_first, .level = LOG_INFO, .ud = &stop, .stop = &stop};
    search_opts o = options("best", NULL);
    search_summary s;
    size_t n;
    err e;
    o.rotate = "vo";
    o.cache = KV_4;
    o.on_device = on_device;
    MUST(search_run(&s, dev, &o, NULL, &e));
    char *want = bytes_of(plan_path, &n);
    ck_assert_int_eq(unlink(plan_path), 0);
    ck_assert_int_eq(search_run(&s, dev, &o, &j, &e), E_CANCELED);
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert_int_eq(s.resumed, 1);
    same_as(plan_path, want, n);
    mem_free(want);
}

/* ---- two streams, the rounded one behind a cache ---- */

/* A block whose linears are rounded with factors, on the CPU and on `on`. */
typedef struct {
    weight_src *src;
    const model_desc *m;
    device *on;
    layer_walk *walk[2];
    chain *host;
    dev_chain *own;
    block_plan p;
    fold f;
} beside;

static void open_beside(beside *t, const tiny_opts *tiny, device *on, kv_format cache)
{
    static uint8_t held[WINDOWS] = {[3] = 1};
    const tensor tokens = tensor_2d(ids, DT_I32, WINDOWS, SEQLEN),
                 held_out = tensor_1d(held, DT_U8, WINDOWS);
    err e;
    *t = (beside){.on = on};
    MUST(tiny_open(&t->src, tiny, &e));
    t->m = weights_desc(t->src);
    random_folds(t->m, &t->p, 1, 3);
    MUST(fold_init(&t->f, t->m, &t->p, &e));
    for (int i = 0; i < 2; i++) {
        MUST(layer_walk_open(&t->walk[i], i ? on : dev, t->src, &tokens, &e));
        MUST(layer_walk_bind(t->walk[i], 0, &e));
    }
    MUST(chain_open(&t->host, dev, t->walk[0], t->m, &held_out, cache, &e));
    MUST(dev_chain_open(&t->own, on, t->walk[1], t->m, &held_out, cache, &e));
    MUST(chain_layer(t->host, &e));
    MUST(dev_chain_layer(t->own, &e));
    MUST(chain_fold(t->host, &t->f, &e));
    dev_chain_fold(t->own, &t->f);
}

static void close_beside(beside *t)
{
    chain_close(&t->host);
    dev_chain_close(&t->own);
    for (int i = 0; i < 2; i++) layer_walk_close(&t->walk[i]);
    fold_free(&t->f);
    free_folds(&t->p);
    weights_close(&t->src);
}

/* What a linear is rounded by: on the host, and where a device has it. */
typedef struct {
    tensor w, scale, zero, col, row;
    dev_buf buf[5];
} rounded_parts;

static rounded_spec spec_of(const rounded_parts *p)
{
    return (rounded_spec){&p->w,
                          NULL,
                          &p->scale,
                          &p->zero,
                          p->col.data ? &p->col : NULL,
                          p->row.data ? &p->row : NULL,
                          32};
}

static rounded_parts there(device *on, const rounded_parts *host)
{
    rounded_parts p = *host;
    tensor *const parts[] = {&p.w, &p.scale, &p.zero, &p.col, &p.row};
    err e;
    for (int i = 0; i < 5; i++) {
        const tensor from = *parts[i];
        if (!from.data) continue;
        MUST(dev_alloc(&p.buf[i], on, tensor_bytes(&from), "test", &e));
        parts[i]->data = p.buf[i].data;
        parts[i]->mem = dev_mem(on);
        MUST(dev_copy(on, parts[i], &from, &e));
    }
    return p;
}

/* Weights with their factors, their ranges plain, by groups of 32; scales of 7 bits, so that f16
 * holds what comes of 4-bit codes. */
static rounded_parts round_plainly(const beside *t, tensor_role r)
{
    const fold_linear *f = fold_find(&t->f, r);
    linear_view v;
    err e;
    MUST(weights_linear(t->src, r, 0, -1, &v, &e));
    const int64_t n = v.dense.shape[0], k = v.dense.shape[1], blocks[] = {k / 32, 32, 32};
    const tensor h = tensor_of(calloc((size_t)k, 32 * sizeof(float)), DT_F32, 3, blocks);
    const range_spec plain = {&h, NULL, 32, 1, 0, false};
    rounded_parts p = {.w = tensor_2d(malloc((size_t)(n * k) * 4), DT_F32, n, k),
                       .scale = tensor_2d(malloc((size_t)(n * k) / 16), DT_F16, n, k / 32),
                       .zero = tensor_2d(malloc((size_t)(n * k) / 32), DT_U8, n, k / 32),
                       .col = tensor_1d(f->col, DT_F32, k),
                       .row = tensor_1d(f->row, DT_F32, n)};
    MUST(fold_rows(&p.w, &v.dense, f, 0, n, 0, r, &e));
    MUST(op_range(dev, &p.scale, &p.zero, &p.w, &plain, &e));
    for (int64_t i = 0; i < tensor_count(&p.scale); i++) ((f16 *)p.scale.data)[i] &= 0xfff0;
    free(h.data);
    return p;
}

static void put(beside *t, tensor_role r)
{
    rounded_parts host = round_plainly(t, r), own = there(t->on, &host);
    const rounded_spec a = spec_of(&host), b = spec_of(&own);
    tensor y = chain_room(t->host, r);
    err e;
    MUST(op_rounded(dev, &y, &a, &e));
    chain_put(t->host, r);
    MUST(dev_chain_put(t->own, r, &b, &e));
    MUST(dev_sync(t->on, &e));
    for (int i = 0; i < 5; i++) dev_free(&own.buf[i]);
    free(host.w.data);
    free(host.scale.data);
    free(host.zero.data);
}

/* W cross + share resid, where that is what the device has in place of cross. */
static double *lacking(const beside *t, tensor_role r, const chain_moments *m, float share)
{
    const int64_t n = m->resid.shape[0], k = m->h.shape[0], rows = m->resid.data ? n : k;
    double *y = calloc((size_t)(rows * k), sizeof *y);
    const float *cross = m->cross.data, *resid = m->resid.data;
    linear_view v;
    err e;
    if (!resid) {
        for (int64_t i = 0; i < k * k; i++) y[i] = cross[i];
        return y;
    }
    MUST(weights_linear(t->src, r, 0, -1, &v, &e));
    tensor w = tensor_2d(malloc((size_t)(n * k) * 4), DT_F32, n, k);
    tensor_convert(&w, &v.dense);
    for (int64_t i = 0; i < n * k; i++) {
        y[i] = (double)share * resid[i];
        for (int64_t j = 0; j < k; j++)
            y[i] += (double)((float *)w.data)[i / k * k + j] * cross[j * k + i % k];
    }
    free(w.data);
    return y;
}

/* The largest difference over the largest value. */
static double apart(const beside *t, const tensor *own, const double *want)
{
    const int64_t count = tensor_count(own);
    tensor raw = *own, f = tensor_1d(malloc((size_t)count * 4), DT_F32, count), flat;
    double most = 0, worst = 0;
    err e;
    raw.data = malloc(tensor_bytes(own));
    raw.mem = MEM_HOST;
    MUST(dev_copy(t->on, &raw, own, &e));
    MUST(dev_sync(t->on, &e));
    flat = tensor_1d(raw.data, raw.dt, count);
    tensor_convert(&f, &flat);
    for (int64_t i = 0; i < count; i++) {
        most = fmax(most, fabs(want[i]));
        worst = fmax(worst, fabs(want[i] - ((float *)f.data)[i]));
    }
    free(raw.data);
    free(f.data);
    return worst / most;
}

/* H of windows held out is bf16 on a device. */
static void check_moments(beside *t, tensor_role r, double h, double lack)
{
    const float share = 0.5f;
    chain_moments host[2];
    dev_moments own[2];
    err e;
    MUST(chain_gather(t->host, r, NULL, &host[0], &host[1], &e));
    MUST(dev_chain_gather(t->own, r, share, NULL, &own[0], &own[1], &e));
    for (int i = 0; i < 2; i++) {
        const int64_t count = tensor_count(&host[i].h);
        double *want = malloc((size_t)count * sizeof *want),
               *lacks = lacking(t, r, &host[i], share);
        for (int64_t j = 0; j < count; j++) want[j] = ((float *)host[i].h.data)[j];
        const double far = apart(t, &own[i].h, want), further = apart(t, &own[i].lack, lacks);
        ck_assert_msg(far < h + (i ? 4e-3 : 0) && further < lack,
                      "%s, %s: H off by %g of %g, what it lacks by %g of %g", role_name(r),
                      i ? "held out" : "trained on", far, h, further, lack);
        free(want);
        free(lacks);
    }
}

/* What stands behind keys and values in a cache of few bits sees the same on a device. o has more
 * inputs than the stream is wide in one of the models, and q, k and v have biases. */
static void see_the_same(device *on, bool grouped, kv_format cache, double h, double lack)
{
    tiny_opts o = {.desc = small(grouped ? tiny_internlm2() : tiny_qwen2()), .seed = 4};
    tensor_role roles[PLAN_LINEARS];
    beside t;
    if (!grouped) o.desc.heads = 6;
    open_beside(&t, &o, on, cache);
    const int n = model_block_linears(t.m, roles);
    for (int i = 0; i < n; i++)
        if (calib_tap_of(roles[i]) == ROLE_QKV) put(&t, roles[i]);
    check_moments(&t, ROLE_O, h, lack);
    put(&t, ROLE_O);
    check_moments(&t, ROLE_GATE, h, lack);
    check_moments(&t, ROLE_DOWN, h, lack);
    close_beside(&t);
}

enum { CACHES = 3 };
static const kv_format caches[CACHES] = {KV_16, KV_8, KV_4};

START_TEST(behind_a_cache) { see_the_same(dev, _i / CACHES, caches[_i % CACHES], 1e-5, 1e-5); }
END_TEST

/* ---- whole searches ---- */

START_TEST(as_on_the_cpu)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    search_summary host, own;
    make_model(small(forms[_i]));
    for (int i = 0; i < KINDS * METHODS; i++) {
        const char *method = methods[i / KINDS];
        if (!has_kind(i / KINDS, i % KINDS)) continue;
        search(method, false, i % KINDS, &host);
        search(method, true, i % KINDS, &own);
        same(method, &own, &host, 1e-4, 5e-3);
        ck_assert(own.after < own.before);
        ck_assert_int_eq(turns(), i % KINDS == TURNED);
    }
    if (forms[_i].qkv_bias) goes_on(true);
}
END_TEST

static void compare(const char *method, const char *loss, device *on, double before, double after)
{
    search_summary host, own;
    search_opts o = options(method, loss);
    err e;
    MUST(search_run(&host, dev, &o, NULL, &e));
    o.on_device = true;
    MUST(search_run(&own, on, &o, NULL, &e));
    ck_assert_str_eq(own.loss, host.loss);
    same(method, &own, &host, before, after);
}

/* Methods for comparison, with H and by their own loss, for which they have no use for a device;
 * and llm-awq's objective. */
static void compare_others(device *on, double before, double after)
{
    for (int i = 0; i < OTHERS; i++) {
        compare(others[i], NULL, on, before, after);
        compare(others[i], "gram", on, before, after);
    }
    compare("awq", "module", on, before, after);
}

START_TEST(other_methods)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2()};
    make_model(small(forms[_i]));
    compare_others(dev, 1e-4, 1e-3);
}
END_TEST

START_TEST(on_a_gpu)
{
    search_summary host[KINDS * METHODS], own;
    size_t n;
    err e;
    device *gpu = NULL, *cpu = dev;
    if (dev_open(&gpu, &(dev_opts){.kind = DEV_CUDA, .threads = 2}, &e) != OK) {
        printf("SKIP on_a_gpu: %s\n", e.msg);
        return;
    }
    for (int i = 0; i < 2 * CACHES; i++) {
        /* Products in f16: some keys and values fall to the next code. Off by 0.095 and 0.22 on an
         * H200 at 4 bits; without the cache what H lacks is off by 0.55 or more there, any other
         * part left out by 1.2. */
        const double h[CACHES] = {0.01, 0.024, 0.2}, lack[CACHES] = {0.05, 0.12, 0.4};
        see_the_same(gpu, i / CACHES, caches[i % CACHES], h[i % CACHES], lack[i % CACHES]);
    }
    make_model(small(tiny_llama()));
    for (int i = 0; i < KINDS * METHODS; i++)
        if (has_kind(i / KINDS, i % KINDS)) search(methods[i / KINDS], false, i % KINDS, &host[i]);
    compare_others(gpu, 1e-2, 3e-2);
    dev = gpu;
    weight_src *src = NULL;
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, WINDOWS);
    weights_close(&src);
    for (int i = 0; i < KINDS * METHODS; i++) {
        const char *method = methods[i / KINDS];
        if (!has_kind(i / KINDS, i % KINDS)) continue;
        search(method, false, i % KINDS, &own);
        same(method, &own, &host[i], 1e-2, 3e-2);
        char *bytes = bytes_of(plan_path, &n);
        search(method, false, i % KINDS, &own);
        same_as(plan_path, bytes, n);
        mem_free(bytes);
    }
    goes_on(false);
    dev_close(&gpu);
    dev = cpu;
}
END_TEST

int main(void)
{
    Suite *s = suite_create("awq_device");
    TCase *t = tcase_create("device");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, behind_a_cache, 0, 2 * CACHES);
    tcase_add_loop_test(t, as_on_the_cpu, 0, 3);
    tcase_add_loop_test(t, other_methods, 0, 2);
    tcase_add_test(t, on_a_gpu);
    suite_add_tcase(s, t);
    return suite_run(s);
}
