/* The residual stream's basis, chosen by two searches: a model that gains is turned, the same model
 * turned beforehand, which loses, is left as it is; stopped anywhere the search goes on to the same
 * bytes; what is packed computes as the model does. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "awq/pack.h"
#include "awq/report.h"
#include "awq/search_internal.h"
#include "formats/convert.h"
#include "formats/weights_mem.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

/* ---- models ---- */

/* Weights of linears become their cubes, of about the size they had: a few stand out of every
 * group, each row's elsewhere, so that no factor of a channel helps; mixing all channels does. */
static void spike(const linear_view *v, float *out)
{
    tensor t = tensor_2d(out, DT_F32, v->dense.shape[0], v->dense.shape[1]);
    tensor_convert(&t, &v->dense);
    for (int64_t i = 0; i < tensor_count(&t); i++) out[i] *= 15 * out[i] * out[i];
}

/* src's layers and tables into memory; heavy: with spikes. */
static weight_src *copy_of(weight_src *src, bool heavy)
{
    static const tensor_role tables[] = {ROLE_EMBED, ROLE_FINAL_NORM, ROLE_HEAD},
                             norms[] = {ROLE_ATTN_NORM, ROLE_FFN_NORM};
    model_desc m = *weights_desc(src);
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(&m, roles);
    weights_mem *w = NULL;
    weight_src *out = NULL;
    tensor t;
    err e;
    m.dt = DT_F32;
    MUST(weights_mem_open(&w, &m, &e));
    for (int i = 0; i < (m.tied_embed ? 2 : 3); i++) {
        MUST(weights_tensor(src, tables[i], -1, &t, &e));
        MUST(weights_mem_tensor(w, tables[i], -1, &t, &e));
    }
    for (int32_t l = 0; l < m.layers; l++) {
        for (int i = 0; i < 2; i++) {
            MUST(weights_tensor(src, norms[i], l, &t, &e));
            MUST(weights_mem_tensor(w, norms[i], l, &t, &e));
        }
        for (int i = 0; i < n; i++) {
            linear_view v;
            MUST(weights_linear(src, roles[i], l, -1, &v, &e));
            float *x = malloc((size_t)tensor_count(&v.dense) * sizeof *x);
            if (heavy) {
                spike(&v, x);
                v.dense = tensor_2d(x, DT_F32, v.dense.shape[0], v.dense.shape[1]);
            }
            MUST(weights_mem_linear(w, roles[i], l, &v, &e));
            free(x);
        }
    }
    MUST(weights_mem_source(&out, &w, &e));
    return out;
}

static weight_src *heavy_model(model_desc m)
{
    const tiny_opts o = {.desc = m, .seed = 12};
    weight_src *src = NULL;
    err e;
    MUST(tiny_open(&src, &o, &e));
    weight_src *heavy = copy_of(src, true);
    weights_close(&src);
    return heavy;
}

/* The model whose stream, turned as a search turns it, is src's. */
static weight_src *turned_back(weight_src *src)
{
    const int64_t n = weights_desc(src)->hidden;
    float *q = malloc((size_t)(n * n) * sizeof *q), *back = malloc((size_t)(n * n) * sizeof *back);
    const tensor t = tensor_2d(back, DT_F32, n, n);
    rotated *x = NULL;
    err e;
    rotate_random(q, n, SEARCH_SEED);
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) back[j * n + i] = q[i * n + j];
    MUST(rotated_open(&x, src, dev, &t, &e));
    weight_src *out = copy_of(rotated_src(x), false);
    rotated_close(&x);
    free(q);
    free(back);
    return out;
}

/* In model_dir, with its calib file. */
static void write_model(weight_src *src)
{
    weight_src *dir = NULL;
    err e;
    ck_assert(mkdir(model_dir, 0777) == 0 || file_is_dir(model_dir));
    MUST(tiny_dir_write(model_dir, src, &e));
    MUST(weights_open(&dir, model_dir, &e));
    collect_windows(dir, WINDOWS);
    weights_close(&dir);
}

static void write_heavy(model_desc m, bool back)
{
    weight_src *src = heavy_model(m);
    if (back) {
        weight_src *was = src;
        src = turned_back(was);
        weights_close(&was);
    }
    write_model(src);
    weights_close(&src);
}

/* ---- the choice ---- */

static search_opts residual_options(void)
{
    search_opts o = options("best", NULL);
    o.rotate = "residual";
    o.force = false;
    return o;
}

static bool plan_turns(void)
{
    plan_file *f = NULL;
    tensor q;
    err e;
    MUST(plan_open(&f, plan_path, &e));
    const bool turns = plan_rotation(f, "residual", &q);
    ck_assert(!turns || q.shape[0] == 64);
    plan_close(&f);
    return turns;
}

static void nothing_left(void)
{
    char path[320];
    (void)snprintf(path, sizeof path, "%s.part", plan_path);
    ck_assert(!file_exists(path));
}

START_TEST(kept_where_it_wins)
{
    basis_choice gains = {0}, loses = {0};
    search_summary s;
    err e;
    for (int back = 0; back < 2; back++) {
        search_opts o = residual_options();
        o.on_device = _i;
        write_heavy(small(tiny_llama()), back);
        o.force = true;
        MUST(search_run(&s, dev, &o, NULL, &e));
        ck_assert(s.basis.compared);
        printf("%s%s: KL %.5f, turned %.5f, gain %.5f +- %.5f\n", _i ? "on a device, " : "",
               back ? "turned back" : "spikes", s.basis.still.kl, s.basis.other.kl, s.basis.gain,
               s.basis.error);
        ck_assert_int_eq(plan_turns(), !back);
        ck_assert_int_eq(s.basis.turned, !back);
        ck_assert(near(s.predicted.kl, back ? s.basis.still.kl : s.basis.other.kl, 0));
        ck_assert(near(s.basis.gain, s.basis.still.kl - s.basis.other.kl, 1e-4));
        nothing_left();
        *(back ? &loses : &gains) = s.basis;
        if (o.on_device) return; /* whose tiles take a second a run to clear */
    }
    ck_assert_msg(gains.other.kl < 0.8 * gains.still.kl, "%g of %g", gains.other.kl,
                  gains.still.kl);
    ck_assert_msg(loses.still.kl < 0.8 * loses.other.kl, "%g of %g", loses.still.kl,
                  loses.other.kl);
    /* the two models are one in two bases */
    ck_assert(near(gains.still.nll16, loses.still.nll16, 1e-3));
    ck_assert(near(gains.still.nll16, gains.other.nll16, 1e-3));
}
END_TEST

/* Random weights gain nothing from another random basis. */
START_TEST(left_where_it_does_not)
{
    search_opts o = residual_options();
    search_summary s, alone;
    size_t n;
    err e;
    make_model(small(tiny_internlm2()));
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert(s.basis.compared && !s.basis.turned && !plan_turns());
    ck_assert(s.basis.gain <= s.basis.error);
    char *plan = bytes_of(plan_path, &n);
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert(s.fresh && !s.basis.compared);
    same_as(plan_path, plan, n);
    mem_free(plan);
    o.rotate = NULL; /* another plan: it says what it was asked */
    MUST(search_run(&alone, dev, &o, NULL, &e));
    ck_assert(!alone.fresh && !alone.basis.compared);
    ck_assert(near(alone.after, s.after, 1e-12));
}
END_TEST

/* ---- resume ---- */

typedef struct {
    atomic_bool stop;
    int lines, at; /* lines about layers so far; the one that stops */
} stopper;

static void stop_at(void *ud, log_level level, const char *line)
{
    stopper *s = ud;
    (void)level;
    if ((strstr(line, ": loss ") || strncmp(line, "perplexity", 10) == 0) && ++s->lines == s->at)
        atomic_store(&s->stop, true);
}

/* Lines: two layers, a prediction, twice. A stop in the last two prediction lines' wake comes too
 * late for the run, or hits the search behind it. */
START_TEST(goes_on)
{
    search_opts o = residual_options();
    search_summary s;
    size_t n;
    err e;
    o.on_device = _i;
    if (_i) o.rotate = "vo,residual";
    o.save_s = 0;
    write_heavy(small(tiny_llama()), false);
    MUST(search_run(&s, dev, &o, NULL, &e));
    const basis_choice want = s.basis;
    char *plan = bytes_of(plan_path, &n);
    for (int at = 1; at <= 5; at++) {
        if (o.on_device && at != 2) continue;
        stopper stop = {.at = at};
        const job j = {.log = stop_at, .level = LOG_INFO, .ud = &stop, .stop = &stop.stop};
        ck_assert_int_eq(unlink(plan_path), 0);
        ck_assert_int_eq(search_run(&s, dev, &o, &j, &e), E_CANCELED);
        ck_assert(!file_exists(plan_path));
        MUST(search_run(&s, dev, &o, NULL, &e));
        ck_assert_int_eq(s.resumed, at < 3 ? at : at == 3 ? 2 : at - 1);
        ck_assert(s.basis.gain == want.gain && s.basis.error == want.error &&
                  s.basis.still.nll == want.still.nll && s.basis.other.nll16 == want.other.nll16);
        same_as(plan_path, plan, n);
        nothing_left();
    }
    mem_free(plan);
}
END_TEST

START_TEST(same_bytes_at_any_threads)
{
    search_opts o = residual_options();
    search_summary s;
    device *const two = dev;
    size_t n;
    err e;
    o.rotate = "vo,residual";
    write_heavy(small(tiny_qwen2()), false);
    MUST(search_run(&s, two, &o, NULL, &e));
    char *plan = bytes_of(plan_path, &n);
    for (int threads = 1; threads < 4; threads += 2) {
        device *other = NULL;
        MUST(dev_open(&other, &(dev_opts){.kind = DEV_CPU, .threads = threads, .isa = "avx2"}, &e));
        o.force = true;
        ck_assert_int_eq(unlink(plan_path), 0);
        MUST(search_run(&s, other, &o, NULL, &e));
        same_as(plan_path, plan, n);
        dev_close(&other);
    }
    mem_free(plan);
}
END_TEST

/* ---- what is packed ---- */

static double apart(const float *a, const float *b, int64_t n)
{
    double sum = 0, size = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += ((double)a[i] - b[i]) * ((double)a[i] - b[i]);
        size += (double)a[i] * a[i];
    }
    return sqrt(sum / size);
}

static void pack(const char *out, bool dense)
{
    const pack_opts p = {
        .model_dir = model_dir, .plan_path = plan_path, .out_dir = out, .dense = dense};
    pack_summary done;
    err e;
    MUST(pack_run(&done, dev, &p, NULL, &e));
}

/* Forms of q, k and v, biases, own and tied heads: with 16 bits the turned model's logits are the
 * model's, with 4 bits near them, from the directory and from a workspace alike. */
START_TEST(packed_computes_the_same)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    model_desc m = forms[_i];
    search_opts o = residual_options();
    search_summary s;
    char dense[320], tm[320];
    err e;
    m.hidden = m.ffn = 128;
    m.heads = 2;
    m.kv_heads = 1;
    m.head_dim = m.rope_dims = 64;
    o.group = 128;
    (void)snprintf(dense, sizeof dense, "%s/dense", root);
    (void)snprintf(tm, sizeof tm, "%s/tm", root);
    weight_src *src = heavy_model(m);
    write_model(src);
    const int64_t n = (int64_t)WINDOWS * weights_desc(src)->vocab;
    weights_close(&src);
    o.rotate = _i == 1 ? "residual,vo" : "residual";
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert(s.basis.turned);
    pack(dense, true);
    pack(awq_dir, false);
    convert *c = NULL;
    MUST(weights_open(&src, awq_dir, &e));
    MUST(convert_open(&c, src, &(convert_opts){0}, NULL, &e));
    MUST(convert_write(c, tm, false, &e));
    convert_close(&c);
    weights_close(&src);
    float *want = malloc((size_t)n * sizeof *want), *have = malloc((size_t)n * sizeof *have),
          *other = malloc((size_t)n * sizeof *other);
    last_logits(model_dir, KV_16, want);
    last_logits(dense, KV_16, have);
    ck_assert_msg(apart(want, have, n) < 0.005, "16 bits: %g", apart(want, have, n));
    last_logits(awq_dir, KV_16, have);
    const double by = apart(want, have, n);
    ck_assert_msg(by > 0.005 && by < 0.5, "4 bits: %g", by);
    last_logits(tm, KV_16, other);
    ck_assert_msg(apart(have, other, n) < 1e-3, "workspace: %g", apart(have, other, n));
    free(want);
    free(have);
    free(other);
}
END_TEST

/* ---- refusals, report ---- */

static void refused(const search_opts *o, const char *text)
{
    search_summary s;
    memory_plan p;
    err e;
    ck_assert_int_eq(search_run(&s, dev, o, NULL, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, text) != NULL && !strchr(e.msg, '\n'), "%s", e.msg);
    ck_assert_int_eq(search_memory(&p, dev, o, &e), E_USAGE);
    ck_assert(!file_exists(plan_path));
}

START_TEST(refusals)
{
    weight_src *src = NULL;
    err e;
    make_model(small(tiny_llama()));
    search_opts o = residual_options();
    o.rotate = "vo,left";
    refused(&o, "rotation 'left': expected none, vo, residual");
    o.rotate = "";
    refused(&o, "rotation '': expected none, vo, residual");
    o = residual_options();
    o.method = "gptq";
    refused(&o, "rotation 'residual': method 'gptq' does not predict");
    o = residual_options();
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, 7);
    weights_close(&src);
    refused(&o, "expected windows held out to compare by, found 0 of 7 windows");
}
END_TEST

START_TEST(told)
{
    search_opts o = residual_options();
    search_summary s;
    memory_plan with, without;
    report r;
    size_t n;
    err e;
    write_heavy(small(tiny_llama()), false);
    MUST(search_memory(&with, dev, &o, &e));
    o.rotate = NULL;
    MUST(search_memory(&without, dev, &o, &e));
    ck_assert_uint_gt(memory_plan_total(&with), memory_plan_total(&without) + 50 * 64 * 2 * 4);
    o = residual_options();
    MUST(search_run(&s, dev, &o, NULL, &e));
    MUST(report_make(&r, dev, &o, &s, NULL, &e));
    cJSON *j = cJSON_CreateObject();
    ck_assert(report_add(&r, j));
    const cJSON *x = cJSON_GetObjectItem(j, "residual_stream"),
                *c = cJSON_GetObjectItem(x, "compared");
    ck_assert(cJSON_IsTrue(cJSON_GetObjectItem(x, "turned")));
    ck_assert(cJSON_GetObjectItem(c, "kl")->valuedouble == s.basis.still.kl);
    ck_assert(cJSON_GetObjectItem(c, "kl_turned")->valuedouble == s.basis.other.kl);
    ck_assert(cJSON_GetObjectItem(c, "kl_gain")->valuedouble == s.basis.gain);
    for (int i = 0; i < r.layer[0].n_factors; i++) { /* statistics of other channels say nothing */
        const report_factors *f = &r.layer[0].factors[i];
        ck_assert(isfinite(f->ratio) == (f->source == ROLE_UP || f->source == ROLE_V));
    }
    cJSON_Delete(j);
    MUST(report_html(&r, calib_path, true, &e));
    char *page = bytes_of(calib_path, &n);
    ck_assert_ptr_nonnull(strstr(page, "Residual stream: turned. KL divergence"));
    mem_free(page);
    report_free(&r);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("bases");
    TCase *c = tcase_create("all");
    tcase_set_timeout(c, 120);
    tcase_add_checked_fixture(c, setup, teardown);
#ifdef __SANITIZE_ADDRESS__ /* tiles of a device take long to clear there */
    const int kinds = 1;
    printf(
        "SKIP kept_where_it_wins, goes_on: on a device, in a build with the address sanitizer\n");
#else
    const int kinds = 2;
#endif
    tcase_add_loop_test(c, kept_where_it_wins, 0, kinds);
    tcase_add_test(c, left_where_it_does_not);
    tcase_add_loop_test(c, goes_on, 0, kinds);
    tcase_add_test(c, same_bytes_at_any_threads);
    tcase_add_loop_test(c, packed_computes_the_same, 0, 3);
    tcase_add_test(c, refusals);
    tcase_add_test(c, told);
    suite_add_tcase(s, c);
    return suite_run(s);
}
