/* awq/ and calib/: whole runs with every method, resume, packing, refusals. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "awq/fold.h"
#include "awq/pack.h"
#include "base/half.h"
#include "kernels/quant_group.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

START_TEST(methods)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    static const struct {
        const char *method, *loss;
    } cases[] = {{"rtn", NULL},        {"rtn", "gram"}, {"rtn", "weights"}, {"lmdeploy", NULL},
                 {"lmdeploy", "gram"}, {"awq", NULL},   {"awq", "blocks"},  {"awq", "module"},
                 {"gptq", NULL},       {"best", NULL}};
    search_summary s;
    double gram_rtn = 0;
    err e;
    make_model(small(forms[_i]));
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        search_opts o = options(cases[i].method, cases[i].loss);
        MUST(search_run(&s, dev, &o, NULL, &e));
        ck_assert(s.before > 0 && s.layers == 2 && !s.fresh);
        if (strcmp(o.method, "rtn") == 0) ck_assert(s.after == s.before);
        if (strcmp(o.method, "awq") == 0)
            ck_assert_msg(s.after < s.before, "%s: %g -> %g", s.loss, s.before, s.after);
        if (strcmp(o.method, "gptq") == 0) ck_assert(s.after < s.before);
        if (strcmp(o.method, "best") == 0)
            ck_assert_msg(s.after < s.before, "best %g -> %g", s.before, s.after);
        if (i == 1) gram_rtn = s.before;
        if (i > 1 && strcmp(s.loss, "gram") == 0 && strcmp(o.method, "best") != 0)
            ck_assert(s.before == gram_rtn); /* the same measure */
        o.force = false;
        MUST(search_run(&s, dev, &o, NULL, &e));
        ck_assert(s.fresh && s.before > 0);
    }
}
END_TEST

/* Threads, how the moments are gathered, and being stopped anywhere change no byte. */
typedef struct {
    atomic_bool stop;
    int steps, after;
} stopper;

static void count_steps(void *ud, const job_progress *p)
{
    stopper *s = ud;
    (void)p;
    if (++s->steps >= s->after) atomic_store(&s->stop, true);
}

START_TEST(same_bytes)
{
    search_summary s;
    size_t n, cn;
    err e;
    dev_close(&dev);
    MUST(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 3},
                  &e)); /* with whatever this CPU has */
    make_model(small(tiny_internlm2()));
    char *calib = bytes_of(calib_path, &cn);
    search_opts o = options(_i ? "best" : "awq", NULL);
    o.cache = _i == 2 ? KV_4 : KV_16;
    MUST(search_run(&s, dev, &o, NULL, &e));
    char *want = bytes_of(plan_path, &n);
    o.gram_bytes = 0;
    MUST(search_run(&s, dev, &o, NULL, &e));
    same_as(plan_path, want, n);
    o.gram_bytes = (int64_t)1 << 30;
    dev_close(&dev);
    MUST(dev_open(&dev, &(dev_opts){.kind = DEV_CPU, .threads = 1}, &e));
    weight_src *src = NULL;
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, WINDOWS);
    same_as(calib_path, calib, cn);
    weights_close(&src);
    MUST(search_run(&s, dev, &o, NULL, &e));
    same_as(plan_path, want, n);
    mem_free(want);
    mem_free(calib);
}
END_TEST

START_TEST(stopped_and_resumed)
{
    size_t n, cn;
    int stops = 0;
    err e;
    model_desc m = small(tiny_llama());
    m.layers = 4;
    make_model(m);
    char *calib = bytes_of(calib_path, &cn);
    search_opts o = options(_i ? "best" : "awq", NULL);
    search_summary s;
    o.on_device = _i == 2;
    MUST(search_run(&s, dev, &o, NULL, &e));
    char *plan = bytes_of(plan_path, &n);
    for (int after = 1; after < 8; after += o.on_device ? 3 : 1) { /* references take their time */
        stopper st = {.after = after};
        const job j = {.progress = count_steps, .ud = &st, .stop = &st.stop};
        ck_assert_int_eq(unlink(plan_path), 0);
        o.save_s = after % 2 ? 0 : 1000; /* with and without saved states */
        const err_code rc = search_run(&s, dev, &o, &j, &e);
        ck_assert(rc == OK || rc == E_CANCELED);
        stops += rc == E_CANCELED;
        ck_assert(file_exists(plan_path) == (rc == OK));
        MUST(search_run(&s, dev, &o, NULL, &e));
        same_as(plan_path, plan, n);
    }
    ck_assert_int_ge(stops, o.on_device ? 2 : 5);
    weight_src *src = NULL;
    MUST(weights_open(&src, model_dir, &e));
    for (int after = 1; after < 5; after++) {
        stopper st = {.after = after};
        const job j = {.progress = count_steps, .ud = &st, .stop = &st.stop};
        const collect_opts co = {.out_path = calib_path,
                                 .tokenizer = "t",
                                 .options = "{}",
                                 .save_s = after % 2 ? 0 : 1000};
        const tensor tokens = tensor_2d(ids, DT_I32, WINDOWS, SEQLEN);
        collect_summary cs;
        ck_assert_int_eq(unlink(calib_path), 0);
        if (collect_run(&cs, dev, src, &tokens, &co, &j, &e) == E_CANCELED) {
            ck_assert(!file_exists(calib_path));
            MUST(collect_run(&cs, dev, src, &tokens, &co, NULL, &e));
            ck_assert_int_eq(cs.resumed, after);
        }
        same_as(calib_path, calib, cn);
    }
    weights_close(&src);
    mem_free(plan);
    mem_free(calib);
}
END_TEST

/* ---- few tokens ---- */

/* Codes of the finished plan that plain rounding of the weights would not give. */
static int64_t codes_moved(void)
{
    weight_src *src = NULL;
    plan_file *f = NULL;
    int64_t moved = 0;
    err e;
    MUST(weights_open(&src, model_dir, &e));
    MUST(plan_open(&f, plan_path, &e));
    for (int32_t l = 0; l < weights_desc(src)->layers; l++) {
        block_plan p;
        fold factors;
        MUST(plan_layer(f, l, &p, &e));
        MUST(fold_init(&factors, weights_desc(src), &p, &e));
        for (int i = 0; i < p.n_linears; i++) {
            const plan_linear *q = &p.linear[i];
            linear_view v;
            if (!q->codes.data) continue;
            MUST(weights_linear(src, q->role, l, -1, &v, &e));
            const int64_t n = v.dense.shape[0], k = v.dense.shape[1];
            tensor w = {.data = malloc((size_t)(n * k) * 4)},
                   c = tensor_2d(malloc((size_t)(n * k)), DT_U8, n, k);
            MUST(fold_rows(&w, &v.dense, fold_find(&factors, q->role), 0, n, l, q->role, &e));
            MUST(op_quant_codes(dev, &c, &w, &q->scale, &q->zero, 32, &e));
            for (int64_t at = 0; at < n * k; at++)
                moved += ((uint8_t *)c.data)[at] !=
                         (((uint8_t *)q->codes.data)[at / 2] >> 4 * (at & 1) & 15);
            free(w.data);
            free(c.data);
        }
        fold_free(&factors);
    }
    plan_close(&f);
    weights_close(&src);
    return moved;
}

static void count_lines(void *ud, log_level level, const char *line)
{
    (void)level;
    *(int *)ud += strstr(line, " tokens for ") != NULL;
}

/* With fewer tokens than any linear has inputs no code is moved for their sake, and it is said. */
START_TEST(few_tokens_said)
{
    static const char *const names[] = {"gptq", "best", "best"};
    weight_src *src = NULL;
    err e;
    make_model(small(tiny_llama()));
    MUST(weights_open(&src, model_dir, &e));
    for (int few = 0; few < 2; few++) {
        collect_windows(src, few ? 1 : WINDOWS);
        for (int i = 0; i < 3; i++) {
            search_opts o = options(names[i], NULL);
            search_summary s;
            int lines = 0;
            const job j = {.log = count_lines, .level = LOG_INFO, .ud = &lines};
            o.on_device = i == 2;
            MUST(search_run(&s, dev, &o, &j, &e));
            ck_assert_int_eq(lines, few * s.layers * CALIB_TAPS);
            ck_assert_msg((codes_moved() == 0) == few, "%s, device %d, few %d: %lld codes moved",
                          names[i], i == 2, few, (long long)codes_moved());
        }
    }
    weights_close(&src);
}
END_TEST

/* ---- packing ---- */

static pack_opts pack_options(void)
{
    return (pack_opts){.model_dir = model_dir, .plan_path = plan_path, .out_dir = awq_dir};
}

/* What an AWQ reader gets is the folded weight within half a step (plus what saturates), factor by
 * factor. */
START_TEST(packing)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    search_summary s;
    pack_summary ps;
    err e;
    make_model(small(forms[_i]));
    search_opts o = options("awq", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    pack_opts po = pack_options();
    MUST(pack_run(&ps, dev, &po, NULL, &e));
    ck_assert(!ps.fresh && ps.group == 32);

    weight_src *src = NULL, *awq = NULL;
    plan_file *plan = NULL;
    MUST(weights_open(&src, model_dir, &e));
    MUST(weights_open(&awq, awq_dir, &e));
    MUST(plan_open(&plan, plan_path, &e));
    for (int32_t l = 0; l < 2; l++) {
        block_plan p;
        fold f;
        MUST(plan_layer(plan, l, &p, &e));
        MUST(fold_init(&f, weights_desc(src), &p, &e));
        for (int i = 0; i < p.n_linears; i++) {
            const plan_linear *pl = &p.linear[i];
            linear_view dense, w4;
            float row[512], want[512];
            MUST(weights_linear(src, pl->role, l, -1, &dense, &e));
            MUST(weights_linear(awq, pl->role, l, -1, &w4, &e));
            ck_assert(w4.w4);
            for (int64_t r = 0; r < dense.dense.shape[0]; r += 7) {
                tensor t = {.data = want};
                MUST(fold_rows(&t, &dense.dense, fold_find(&f, pl->role), r, 1, l, pl->role, &e));
                w4_dequant_row(row, &w4.q, r);
                for (int64_t k = 0; k < dense.dense.shape[1]; k++) {
                    const int64_t at = r * pl->scale.shape[1] + k / 32;
                    const float step = f16_to_f32(((f16 *)pl->scale.data)[at]),
                                z = ((uint8_t *)pl->zero.data)[at];
                    const float bound = fminf(fmaxf(want[k], -z * step),
                                              (15 - z) * step); /* what can be said */
                    ck_assert_msg(fabsf(row[k] - bound) <= 0.501f * step, "%s row %d column %d",
                                  role_name(pl->role), (int)r, (int)k);
                }
            }
        }
        fold_free(&f);
    }
    plan_close(&plan);
    weights_close(&awq);
    weights_close(&src);
    MUST(pack_run(&ps, dev, &po, NULL, &e));
    ck_assert(ps.fresh);
}
END_TEST

/* The name of some tensor of layer 1 as the family spells it. */
static void tensor_of_layer(char *buf, size_t cap, tensor_role r, const char *suffix)
{
    const model_desc m = tiny_qwen2();
    err e;
    MUST(family_by_name(m.family)->tensor_name(&m, r, 1, -1, buf, cap, &e));
    (void)snprintf(buf + strlen(buf), cap - strlen(buf), "%s", suffix);
}

START_TEST(comparing)
{
    static const struct {
        tensor_role r;
        const char *suffix;
    } names[] = {{ROLE_Q, ".qweight"}, {ROLE_Q, ".qzeros"}, {ROLE_Q, ".scales"},
                 {ROLE_Q, ".bias"},    {ROLE_DOWN, ""},     {ROLE_FFN_NORM, ".weight"}};
    char name[256], file[400];
    search_summary s;
    pack_summary ps;
    size_t n;
    err e;
    make_model(small(tiny_qwen2()));
    search_opts o = options("lmdeploy", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    pack_opts po = pack_options();
    MUST(pack_run(&ps, dev, &po, NULL, &e));
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        tensor_of_layer(name, sizeof name, names[i].r, names[i].suffix);
        MUST(pack_compare(dev, &po, name, &e));
    }
    MUST(pack_compare(dev, &po, "model.norm.weight", &e));
    ck_assert_int_eq(pack_compare(dev, &po, "model.nothing", &e), E_USAGE);
    ck_assert(strstr(e.msg, "no tensor 'model.nothing'") != NULL);
    /* one bit of every tensor of layer 1 changed */
    (void)snprintf(file, sizeof file, "%s/model.safetensors", awq_dir);
    char *text = bytes_of(file, &n);
    for (size_t i = 0; i < sizeof names / sizeof *names; i++) {
        weight_src *awq = NULL;
        linear_view v;
        tensor t;
        MUST(weights_open(&awq, awq_dir, &e));
        const void *at = NULL;
        if (names[i].r == ROLE_FFN_NORM) {
            MUST(weights_tensor(awq, ROLE_FFN_NORM, 1, &t, &e));
            at = t.data;
        } else {
            MUST(weights_linear(awq, names[i].r, 1, -1, &v, &e));
            at = strstr(names[i].suffix, "zeros")    ? v.q.zeros.data
                 : strstr(names[i].suffix, "scales") ? v.q.scales.data
                 : strstr(names[i].suffix, "bias")   ? v.bias.data
                                                     : v.q.q.data;
        }
        char *place = memmem(text, n, at, 64);
        ck_assert_ptr_nonnull(place);
        weights_close(&awq);
        place[3] = (char)(place[3] ^ 1);
        FILE *f = fopen(file, "wb");
        ck_assert(f && fwrite(text, 1, n, f) == n && fclose(f) == 0);
        place[3] = (char)(place[3] ^ 1);
        tensor_of_layer(name, sizeof name, names[i].r, names[i].suffix);
        ck_assert_int_eq(pack_compare(dev, &po, name, &e), E_CHECK);
        ck_assert_msg(strstr(e.msg, "byte") != NULL, "%s", e.msg);
    }
    mem_free(text);
}
END_TEST

/* ---- refusals ---- */

START_TEST(refusals)
{
    search_summary s;
    memory_plan p;
    err e;
    make_model(small(tiny_llama()));
    search_opts o = options("nonesuch", NULL);
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "method 'nonesuch': expected one of rtn, lmdeploy, awq") != NULL,
                  "%s", e.msg);
    o = options("awq", NULL);
    o.calib_path = NULL;
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    o = options("rtn", "module");
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    o = options("awq", "hessian");
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    o = options("rtn", NULL);
    o.calib_path = NULL; /* no data at all */
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert_str_eq(s.loss, "weights");
    o = options("awq", NULL);
    o.group = 48;
    ck_assert_int_eq(search_memory(&p, dev, &o, &e), E_UNSUPPORTED);
    ck_assert_msg(strstr(e.msg, "group 48 does not divide the 64 inputs of q") != NULL, "%s",
                  e.msg);
    o = options("gptq", NULL);
    o.cache = KV_4;
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_USAGE);
    ck_assert_msg(strstr(e.msg, "cache of 4 bits: method 'gptq'") != NULL, "%s", e.msg);
}
END_TEST

START_TEST(another_model)
{
    search_summary s;
    pack_summary ps;
    err e;
    make_model(small(tiny_llama()));
    search_opts o = options("awq", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    MUST(dir_remove_tree(model_dir, &e));
    const model_desc m = small(tiny_llama());
    tiny_dir_make(model_dir, &m, 99);
    weight_src *src = NULL;
    MUST(weights_open(&src, model_dir, &e));
    char digest[128];
    (void)snprintf(digest, sizeof digest, "%s", weights_digest(src));
    weights_close(&src);
    ck_assert_int_eq(search_run(&s, dev, &o, NULL, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, digest) != NULL, "%s", e.msg);
    pack_opts po = pack_options();
    ck_assert_int_eq(pack_run(&ps, dev, &po, NULL, &e), E_INPUT);
    ck_assert_msg(strstr(e.msg, "made from model") && strstr(e.msg, digest), "%s", e.msg);
    ck_assert(!file_exists(awq_dir));
}
END_TEST

/* A NaN in any part of any layer is named, before anything is written. */
START_TEST(not_finite)
{
    static const struct {
        tensor_role r;
        int32_t layer;
        const char *text;
    } cases[] = {{ROLE_GATE, 1, "layers.1.mlp.gate_proj.weight: element [3,5]"},
                 {ROLE_DOWN, 1, "layers.1.mlp.down_proj.weight: element [3,5]"},
                 {ROLE_Q, 0, "layers.0.self_attn.q_proj.weight: element [3,5]"},
                 {ROLE_ATTN_NORM, 1, "layers.1.input_layernorm.weight: element [5]"},
                 {ROLE_EMBED, -1, "embed_tokens.weight: element [0,5]"}};
    model_desc m = tiny_llama();
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        const tiny_opts to = {.desc = m, .seed = 4};
        weight_src *src = NULL;
        linear_view v;
        tensor t;
        collect_summary cs;
        err e;
        MUST(tiny_open(&src, &to, &e));
        bf16 *w;
        if (cases[i].r == ROLE_EMBED || cases[i].r == ROLE_ATTN_NORM) {
            MUST(weights_tensor(src, cases[i].r, cases[i].layer, &t, &e));
            w = t.data;
        } else {
            MUST(weights_linear(src, cases[i].r, cases[i].layer, -1, &v, &e));
            w = v.dense.data;
            w += 3 * v.dense.shape[1];
        }
        w[5] = 0x7fc0;
        const collect_opts o = {.out_path = calib_path, .tokenizer = "t", .options = "{}"};
        const tensor tokens = tensor_2d(ids, DT_I32, 2, SEQLEN);
        ck_assert_msg(collect_run(&cs, dev, src, &tokens, &o, NULL, &e) == E_INPUT, "no error: %s",
                      cases[i].text);
        ck_assert_msg(strstr(e.msg, cases[i].text) != NULL, "%s", e.msg);
        ck_assert(!file_exists(calib_path));
        weights_close(&src);
        char part[400]; /* sources in memory have no digest: what is left would pass for the next
                           one's */
        (void)snprintf(part, sizeof part, "%s.part", calib_path);
        if (file_exists(part)) MUST(dir_remove_tree(part, &e));
    }
}
END_TEST

int main(void)
{
    Suite *s = suite_create("awq");
    TCase *t = tcase_create("awq");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, methods, 0, 3);
    tcase_add_loop_test(t, same_bytes, 0, 3);
    tcase_add_loop_test(t, stopped_and_resumed, 0, 3);
    tcase_add_test(t, few_tokens_said);
    tcase_add_loop_test(t, packing, 0, 3);
    tcase_add_test(t, comparing);
    tcase_add_test(t, refusals);
    tcase_add_test(t, another_model);
    tcase_add_test(t, not_finite);
    suite_add_tcase(s, t);
    return suite_run(s);
}
