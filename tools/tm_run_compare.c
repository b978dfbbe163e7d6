/* tm-run ppl --compare. */
#include <math.h>
#include <stdio.h>

#include "runtime/compare.h"
#include "tools/tm_run.h"

/* Of perplexity, from a difference of losses. */
static double percent(double nll) { return 100 * (exp(nll) - 1); }

static err_code report(const tool_ctx *t, const compare_result *c, int32_t window, err *e)
{
    if (!t->json) {
        (void)printf(
            "perplexity %.5f against %.5f: %+.3f %% +- %.3f over %lld windows of %lld\n"
            "nll %+.6f +- %.6f, KL divergence %.6f +- %.6f nats, best id the same %.2f %%\n",
            c->model.ppl, c->reference.ppl, percent(c->nll), percent(c->nll_error),
            (long long)c->model.windows, (long long)window, c->nll, c->nll_error, c->kl,
            c->kl_error, 100 * c->top1);
        return OK;
    }
    cJSON *o = cJSON_CreateObject();
    const struct {
        const char *key;
        double value;
    } fields[] = {{"ppl", c->model.ppl},
                  {"reference_ppl", c->reference.ppl},
                  {"tokens", (double)c->model.tokens},
                  {"windows", (double)c->model.windows},
                  {"window", window},
                  {"nll_difference", c->nll},
                  {"nll_difference_error", c->nll_error},
                  {"kl", c->kl},
                  {"kl_error", c->kl_error},
                  {"top1_agreement", c->top1},
                  {"seconds", c->seconds}};
    bool filled = o != NULL;
    for (size_t i = 0; i < sizeof fields / sizeof *fields; i++)
        filled = filled && cJSON_AddNumberToObject(o, fields[i].key, fields[i].value);
    return run_json(o, filled, e);
}

err_code run_compare(run_ctx *r, const tool_ctx *t, const char *path, const run_model_opts *mo,
                     const token_list *ids, const ppl_opts *o, err *e)
{
    run_ctx other = {.d = r->d};
    compare_result result;
    err_code rc = weights_open(&other.src, path, e);
    if (rc == OK) rc = run_model(&other, t, mo, o->window - 1, 1, e);
    if (rc == OK) rc = compare_run(&result, r->m, other.m, ids->ids, ids->n, o, &t->job, e);
    if (rc == OK) rc = report(t, &result, o->window, e);
    other.d = NULL; /* r's */
    run_close(&other);
    return rc;
}
