/* The search's steps for devices whose memory the host cannot read: on the CPU they must find what
 * the CPU's own steps find, and on a GPU, where there is one, about as much, the same every
 * time. */
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "awq/pack.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

static const char *const methods[] = {"awq", "best"};
static const char *const others[] = {"rtn", "lmdeploy", "gptq"};
enum { METHODS = sizeof methods / sizeof *methods, OTHERS = sizeof others / sizeof *others };

enum { PLAIN, FOLDED, TURNED, KINDS }; /* of k and v */

static void search(const char *method, bool on_device, int kind, search_summary *s)
{
    search_opts o = options(method, NULL);
    err e;
    o.kv_fold = kind != PLAIN;
    o.rotate = kind == TURNED ? "vo" : NULL;
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

/* A run of best that was stopped behind its first layer ends in the bytes of the plan that is
 * there. */
static void goes_on(bool on_device)
{
    atomic_bool stop = false;
    const job j = {.log = stop_behind_first, .level = LOG_INFO, .ud = &stop, .stop = &stop};
    search_opts o = options("best", NULL);
    search_summary s;
    size_t n;
    err e;
    char *want = bytes_of(plan_path, &n);
    o.kv_fold = true;
    o.rotate = "vo";
    o.on_device = on_device;
    ck_assert_int_eq(unlink(plan_path), 0);
    ck_assert_int_eq(search_run(&s, dev, &o, &j, &e), E_CANCELED);
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert_int_eq(s.resumed, 1);
    same_as(plan_path, want, n);
    mem_free(want);
}

START_TEST(as_on_the_cpu)
{
    const model_desc forms[] = {tiny_llama(), tiny_internlm2(), tiny_qwen2()};
    search_summary host, own;
    make_model(small(forms[_i]));
    for (int i = 0; i < KINDS * METHODS; i++) {
        const char *method = methods[i / KINDS];
        search(method, false, i % KINDS, &host);
        search(method, true, i % KINDS, &own);
        same(method, &own, &host, 1e-4, 5e-3);
        ck_assert(own.after < own.before);
        ck_assert_int_eq(turns(), i % KINDS == TURNED);
    }
    if (_i == 0) goes_on(true);
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
    make_model(small(tiny_llama()));
    for (int i = 0; i < KINDS * METHODS; i++)
        search(methods[i / KINDS], false, i % KINDS, &host[i]);
    compare_others(gpu, 1e-2, 3e-2);
    dev = gpu;
    weight_src *src = NULL;
    MUST(weights_open(&src, model_dir, &e));
    collect_windows(src, WINDOWS);
    weights_close(&src);
    for (int i = 0; i < KINDS * METHODS; i++) {
        const char *method = methods[i / KINDS];
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
    tcase_add_loop_test(t, as_on_the_cpu, 0, 3);
    tcase_add_loop_test(t, other_methods, 0, 2);
    tcase_add_test(t, on_a_gpu);
    suite_add_tcase(s, t);
    return suite_run(s);
}
