/* tm-run score: the most probable next tokens behind given ids. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/score.h"
#include "tools/tm_run.h"

static struct {
    const char *ids, *prompt;
    int64_t top;
    bool parse_special;
    run_model_opts model;
} opt = {.top = 10, .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"ids", 0, CLI_STR, &opt.ids, "1,2,3", "token ids, taken as they are"},
    {"prompt", 'p', CLI_STR, &opt.prompt, "TEXT",
     "or a text, with BOS where the tokenizer puts one"},
    {"parse-special", 0, CLI_FLAG, &opt.parse_special, NULL,
     "special token strings in TEXT are tokens"},
    {"top", 0, CLI_I64, &opt.top, "N", "how many [10]", .lo = 1, .hi = 1 << 22},
    RUN_MODEL_OPTIONS(opt.model),
};

static err_code print_json(const id_logprob *top, int32_t n, err *e)
{
    cJSON *o = cJSON_CreateObject(), *list = o ? cJSON_AddArrayToObject(o, "top") : NULL;
    bool filled = list != NULL;
    for (int32_t i = 0; i < n && filled; i++) {
        cJSON *pair = cJSON_CreateArray();
        filled = pair && cJSON_AddItemToArray(list, pair) &&
                 cJSON_AddItemToArray(pair, cJSON_CreateNumber(top[i].id)) &&
                 cJSON_AddItemToArray(pair, cJSON_CreateNumber(top[i].logprob));
    }
    return run_json(o, filled, e);
}

static err_code print_text(const run_ctx *r, const id_logprob *top, int32_t n, err *e)
{
    for (int32_t i = 0; i < n; i++) {
        char *piece = NULL;
        size_t bytes;
        if (r->t) TRY(tokenizer_decode(r->t, &top[i].id, 1, false, &piece, &bytes, e));
        (void)printf("%8d %10.5f %s\n", top[i].id, top[i].logprob, piece ? piece : "");
        mem_free(piece);
    }
    return OK;
}

static err_code score(run_ctx *r, const tool_ctx *t, const token_list *ids, err *e)
{
    const int32_t vocab = weights_desc(r->src)->vocab;
    const int32_t top = opt.top < vocab ? (int32_t)opt.top : vocab;
    int32_t n;
    void *list;
    TRY(run_model(r, t, &opt.model, ids->n, 1, e));
    if (!r->m) return OK;
    TRY(mem_alloc(&list, (size_t)top, sizeof(id_logprob), "scores", e));
    err_code rc = score_next(r->m, ids->ids, (int32_t)ids->n, top, list, &n, &t->job, e);
    if (rc == OK) rc = t->json ? print_json(list, n, e) : print_text(r, list, n, e);
    mem_free(list);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    run_ctx r = {0};
    token_list ids = {0};
    err_code rc;
    if (!opt.ids == !opt.prompt) return err_set(e, E_USAGE, "expected one of --ids and --prompt");
    if ((rc = run_open(&r, t, opt.prompt || !t->json, e)) != OK) goto done;
    rc = opt.ids ? run_parse_ids(&ids, opt.ids, "ids", e)
                 : run_encode(&ids, r.t, opt.prompt, strlen(opt.prompt), opt.parse_special, e);
    if (rc == OK && ids.n == 0) rc = err_set(e, E_USAGE, "the prompt is empty");
    if (rc == OK) rc = score(&r, t, &ids, e);
done:
    token_list_free(&ids);
    run_close(&r);
    return rc;
}

const tool_command tm_run_score = {
    .name = "score",
    .usage = "PATH --ids 1,2,3 | --prompt TEXT [options]",
    .summary = "shows the most probable next tokens with their natural log-probabilities",
    .examples = "  tm-run score model --prompt 'Once upon a' --top 5\n"
                "  tm-run score model --ids 1,403,407 --top 10 --json\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
