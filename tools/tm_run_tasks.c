/* tm-run tasks: share of dialogues whose greedy reply is exactly the expected one. */
#include <stdio.h>

#include "runtime/tasks.h"
#include "tools/tm_run.h"

static struct {
    const char *data;
    run_chat_opts chat;
    int64_t max_new, batch;
    bool show;
    run_model_opts model;
} opt = {.max_new = 256, .batch = 16, .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"data", 'd', CLI_STR, &opt.data, "FILE", "jsonl with kind, messages and answer"},
    RUN_CHAT_OPTIONS(opt.chat),
    {"max-new-tokens", 0, CLI_I64, &opt.max_new, "N", "longest reply [256]", .lo = 1,
     .hi = 1 << 20},
    {"max-batch-size", 0, CLI_I64, &opt.batch, "N", "dialogues at once [16]", .lo = 1, .hi = 1024},
    {"show", 0, CLI_FLAG, &opt.show, NULL, "print each wrong reply on standard error"},
    RUN_MODEL_OPTIONS(opt.model),
};

static void show_wrong(void *ud, int32_t line, const char *kind, const char *expected,
                       const char *got)
{
    const tool_ctx *t = ud;
    tool_progress_clear();
    (void)fprintf(stderr, "%s: line %d (%s): expected '%s', got '%s'\n", t->tool, line, kind,
                  expected, got);
}

static err_code report(const tool_ctx *t, const tasks_result *s, err *e)
{
    if (!t->json) {
        for (int i = 0; i < s->n_kinds; i++)
            (void)printf("%-10s %6.2f %% (%d of %d)\n", s->kind[i].kind,
                         100.0 * s->kind[i].right / s->kind[i].total, s->kind[i].right,
                         s->kind[i].total);
        (void)printf("%-10s %6.2f %% (%d of %d)\n", "all", 100.0 * s->right / s->total, s->right,
                     s->total);
        return OK;
    }
    cJSON *o = cJSON_CreateObject();
    bool filled = o != NULL;
    for (int i = 0; i < s->n_kinds && filled; i++)
        filled = cJSON_AddNumberToObject(o, s->kind[i].kind,
                                         (double)s->kind[i].right / s->kind[i].total);
    filled = filled && cJSON_AddNumberToObject(o, "all", (double)s->right / s->total) &&
             cJSON_AddNumberToObject(o, "tasks", s->total);
    return run_json(o, filled, e);
}

static err_code answer(run_ctx *r, const chat *c, const tool_ctx *t, err *e)
{
    int32_t stops[RUN_MAX_STOPS];
    tasks *k = NULL;
    tasks_result result;
    TRY(tasks_open(&k, opt.data, r->t, c, opt.chat.meta, e));
    const int32_t n = tasks_count(k), seqs = n < opt.batch ? n : (int32_t)opt.batch;
    const tasks_opts o = {.max_new = (int32_t)opt.max_new,
                          .stop_ids = stops,
                          .n_stop_ids = run_stop_ids(stops, r, c),
                          .on_wrong = opt.show ? show_wrong : NULL,
                          .ud = (void *)(uintptr_t)t};
    err_code rc = run_model(r, t, &opt.model, tasks_longest(k) + opt.max_new, seqs, e);
    if (rc == OK && r->m) {
        rc = tasks_run(&result, k, r->m, &o, &t->job, e);
        if (rc == OK) rc = report(t, &result, e);
    }
    tasks_close(&k);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    run_ctx r = {0};
    chat *c = NULL;
    if (!opt.data) return err_set(e, E_USAGE, "option '--data' is missing");
    err_code rc = run_open(&r, t, true, e);
    if (rc == OK) rc = run_chat_open(&c, &r, &opt.chat, t, e);
    if (rc == OK) rc = answer(&r, c, t, e);
    chat_close(&c);
    run_close(&r);
    return rc;
}

const tool_command tm_run_tasks = {
    .name = "tasks",
    .usage = "PATH --data FILE [options]",
    .summary = "counts the dialogues whose greedy reply is exactly the expected one, by kind",
    .examples = "  tm-run tasks model --data tasks.jsonl --json\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
