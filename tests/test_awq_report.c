/* What a search tells: its prediction against a plain forward pass, the report against plan and
 * calib file, the page. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "awq/report.h"
#include "tests/support/awq_case.h"
#include "tests/support/suite.h"
#include "tests/support/tiny_weights.h"

/* Mean loss of the window that is held out. */
static double plain_loss(const char *dir)
{
    weight_src *src = NULL;
    calib_file *f = NULL;
    double sum = 0;
    int n = 0;
    err e;
    MUST(weights_open(&src, dir, &e));
    MUST(calib_open(&f, calib_path, &e));
    const int vocab = weights_desc(src)->vocab;
    const tensor held = calib_held_out(f);
    double *logits = malloc(sizeof(double) * SEQLEN * (size_t)vocab);
    for (int w = 0; w < WINDOWS; w++) {
        if (!((const uint8_t *)held.data)[w]) continue;
        tiny_forward(logits, src, ids + w * SEQLEN, SEQLEN, NULL, NULL);
        for (int t = 0; t + 1 < SEQLEN; t++, n++) {
            double norm = 0;
            for (int v = 0; v < vocab; v++) norm += exp(logits[t * vocab + v]);
            sum += log(norm) - logits[t * vocab + ids[w * SEQLEN + t + 1]];
        }
    }
    free(logits);
    calib_close(&f);
    weights_close(&src);
    return sum / n;
}

START_TEST(prediction_against_plain)
{
    search_summary s;
    err e;
    make_model(small(_i ? tiny_internlm2() : tiny_qwen2()));
    search_opts o = options("best", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert_int_eq(s.predicted.windows, 1);
    ck_assert_double_eq_tol(s.predicted.nll16, plain_loss(model_dir), 2e-3);
    ck_assert(s.predicted.nll != s.predicted.nll16 &&
              fabs(s.predicted.nll - s.predicted.nll16) < 1);
    o.force = false; /* finished already: nothing to tell from */
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert(s.fresh && s.predicted.windows == 0);
    o = options("awq", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    ck_assert_int_eq(s.predicted.windows, 0);
}
END_TEST

static void check_layer(const report_layer *l, const block_plan *p, const calib_block *c)
{
    ck_assert_int_eq(l->n_linears, p->n_linears);
    ck_assert_int_eq(l->n_inputs, c->n_taps);
    for (int i = 0; i < l->n_linears; i++) {
        ck_assert(l->linear[i].role == p->linear[i].role);
        ck_assert(l->linear[i].before == p->linear[i].loss_before);
        ck_assert(l->linear[i].after == p->linear[i].loss_after);
        ck_assert(l->linear[i].kept > 0.3 && l->linear[i].kept <= 1.001); /* awq only shrinks */
    }
    for (int i = 0; i < l->n_inputs; i++) {
        const report_input *x = &l->input[i];
        const float *top = c->tap[i].absmax.data;
        for (int k = 0; k + 1 < REPORT_OUTLIERS; k++)
            ck_assert(top[x->channel[k]] >= top[x->channel[k + 1]] && x->times[k] >= 1);
        for (int64_t q = 0; q < c->tap[i].k; q++) ck_assert(top[q] <= top[x->channel[0]]);
    }
    for (int i = 0; i < l->n_factors; i++)
        ck_assert(l->factors[i].least > 0 && l->factors[i].least < l->factors[i].most);
}

START_TEST(report_of_a_plan)
{
    search_summary s;
    report r;
    plan_file *plan = NULL;
    calib_file *calib = NULL;
    block_plan p;
    calib_block c;
    size_t n;
    char path[300];
    err e;
    make_model(small(tiny_llama()));
    search_opts o = options("awq", NULL);
    MUST(search_run(&s, dev, &o, NULL, &e));
    MUST(report_make(&r, dev, &o, &s, NULL, &e));
    MUST(plan_open(&plan, plan_path, &e));
    MUST(calib_open(&calib, calib_path, &e));
    ck_assert(r.layers == 2 && r.group == 32 && strcmp(r.method, "awq") == 0);
    for (int32_t l = 0; l < r.layers; l++) {
        MUST(plan_layer(plan, l, &p, &e));
        MUST(calib_layer(calib, l, &c, &e));
        check_layer(&r.layer[l], &p, &c);
    }
    cJSON *j = cJSON_CreateObject();
    ck_assert(report_add(&r, j));
    ck_assert_int_eq(cJSON_GetArraySize(cJSON_GetObjectItem(j, "linears")), 2 * p.n_linears);
    ck_assert_int_eq(cJSON_GetArraySize(cJSON_GetObjectItem(j, "outliers")), 2 * c.n_taps);
    ck_assert(cJSON_IsNull(cJSON_GetObjectItem(j, "predicted")));
    cJSON_Delete(j);
    (void)snprintf(path, sizeof path, "%s/page.html", root);
    MUST(report_html(&r, path, false, &e));
    ck_assert_int_eq(report_html(&r, path, false, &e), E_USAGE);
    MUST(report_html(&r, path, true, &e));
    char *page = bytes_of(path, &n);
    ck_assert(strstr(page, "<svg") && strstr(page, "</html>") && strstr(page, "Outlier channels"));
    ck_assert(!strstr(page, "http") && !strstr(page, "<script")); /* nothing is loaded */
    mem_free(page);
    report_free(&r);
    plan_close(&plan);
    calib_close(&calib);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("awq_report");
    TCase *t = tcase_create("awq_report");
    tcase_set_timeout(t, 120);
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_add_loop_test(t, prediction_against_plain, 0, 2);
    tcase_add_test(t, report_of_a_plan);
    suite_add_tcase(s, t);
    return suite_run(s);
}
