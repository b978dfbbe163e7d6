/* tm-run ppl: perplexity of a text over windows that do not overlap. */
#include <stdio.h>

#include "runtime/score.h"
#include "tools/tm_run.h"

static struct {
    cli_list data;
    const char *dataset, *compare;
    run_chat_opts chat;
    int64_t window, windows;
    run_model_opts model;
} opt = {.model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"data", 'd', CLI_LIST, &opt.data, "FILE",
     "text, jsonl (text or messages), .zst, .gz or .tar of them; repeatable"},
    {"dataset", 0, CLI_CHOICE, &opt.dataset, "NAME",
     "join rows as this data set's users do [as they are]", .choices = "wikitext2|ptb|c4|pileval"},
    {"window", 'w', CLI_I64, &opt.window, "N",
     "tokens of a window [the smaller of 2048 and the model's context]", .lo = 2, .hi = 1 << 24},
    {"windows", 0, CLI_I64, &opt.windows, "N", "how many from the start [0: all]", .lo = 0,
     .hi = 1e9},
    {"compare", 0, CLI_STR, &opt.compare, "PATH2",
     "another model of the same tokens: paired differences from it, KL divergence, best ids"},
    RUN_CHAT_OPTIONS(opt.chat),
    RUN_MODEL_OPTIONS(opt.model),
};

static err_code report(const tool_ctx *t, const run_ctx *r, const ppl_result *p, err *e)
{
    const model_plan *plan = model_plan_of(r->m);
    if (!t->json) {
        (void)printf(
            "perplexity %.5f (nll %.6f +- %.6f) over %lld tokens in %lld windows of %lld\n", p->ppl,
            p->nll, p->nll_error, (long long)p->tokens, (long long)p->windows,
            (long long)opt.window);
        return OK;
    }
    cJSON *o = cJSON_CreateObject();
    const bool filled = cJSON_AddNumberToObject(o, "ppl", p->ppl) &&
                        cJSON_AddNumberToObject(o, "tokens", (double)p->tokens) &&
                        cJSON_AddNumberToObject(o, "windows", (double)p->windows) &&
                        cJSON_AddNumberToObject(o, "window", (double)opt.window) &&
                        cJSON_AddNumberToObject(o, "nll", p->nll) &&
                        cJSON_AddNumberToObject(o, "nll_error", p->nll_error) &&
                        cJSON_AddNumberToObject(o, "kv_bits",
                                                plan->kv == KV_16 ? 16 : (int)plan->kv) &&
                        cJSON_AddNumberToObject(o, "seconds", p->seconds) &&
                        cJSON_AddNumberToObject(o, "tokens_per_second",
                                                p->seconds > 0 ? (double)p->tokens / p->seconds
                                                               : 0);
    return run_json(o, filled, e);
}

static err_code measure(run_ctx *r, const tool_ctx *t, err *e)
{
    token_list ids = {0};
    ppl_result result;
    const int32_t context = weights_desc(r->src)->max_tokens;
    if (!opt.window) opt.window = context < 2048 ? context : 2048;
    const ppl_opts o = {(int32_t)opt.window, opt.windows};
    const int32_t seqs = ppl_seqs(o.window, 512);
    err_code rc = run_model(r, t, &opt.model, opt.window - 1, seqs, e);
    if (rc == OK && r->m) {
        rc = run_data_ids(&ids, r, &opt.data, opt.dataset, &opt.chat, t, e);
        if (rc == OK && opt.compare) {
            rc = run_compare(r, t, opt.compare, &opt.model, &ids, &o, e);
        } else if (rc == OK) {
            rc = ppl_run(&result, r->m, ids.ids, ids.n, &o, &t->job, e);
            if (rc == OK) rc = report(t, r, &result, e);
        }
    }
    token_list_free(&ids);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    run_ctx r = {0};
    if (!opt.data.n) return err_set(e, E_USAGE, "option '--data' is missing");
    err_code rc = run_open(&r, t, true, e);
    if (rc == OK) rc = measure(&r, t, e);
    run_close(&r);
    return rc;
}

const tool_command tm_run_ppl = {
    .name = "ppl",
    .usage = "PATH --data FILE [options]",
    .summary = "measures perplexity over windows that do not overlap",
    .examples =
        "  tm-run ppl model --data wiki.test.txt --window 1024 --json\n"
        "  tm-run ppl workspace --data wiki.test.txt --window 1024 --windows 20 --quant-policy 4\n"
        "  tm-run ppl model-w4 --compare model --data wiki.test.txt --window 1024\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
