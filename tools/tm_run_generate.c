/* tm-run generate: one answer to one prompt. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/generate.h"
#include "tools/tm_run.h"

static struct {
    const char *prompt, *prompt_file, *ids;
    bool chat, parse_special, ignore_stop;
    run_chat_opts template;
    int64_t max_new;
    cli_list stop;
    run_sample_opts sample;
    run_model_opts model;
} opt = {.max_new = 512, .sample = RUN_SAMPLE_DEFAULTS, .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"prompt", 'p', CLI_STR, &opt.prompt, "TEXT",
     "the prompt; BOS goes in front where the tokenizer puts one"},
    {"prompt-file", 'F', CLI_STR, &opt.prompt_file, "FILE",
     "or a file with it; standard input when nothing is given, or for -"},
    {"ids", 0, CLI_STR, &opt.ids, "1,2,3", "or token ids, taken as they are"},
    {"chat", 0, CLI_FLAG, &opt.chat, NULL,
     "the prompt is a user's message: goes through the chat template"},
    RUN_CHAT_OPTIONS(opt.template),
    {"parse-special", 0, CLI_FLAG, &opt.parse_special, NULL,
     "special token strings in the prompt are tokens"},
    {"max-new-tokens", 0, CLI_I64, &opt.max_new, "N", "0: until the session is full [512]", .lo = 0,
     .hi = 1 << 24},
    {"stop", 0, CLI_LIST, &opt.stop, "TEXT",
     "also stop where the answer has this text; repeatable"},
    {"ignore-eos", 0, CLI_FLAG, &opt.ignore_stop, NULL, "go on behind stop tokens"},
    RUN_SAMPLE_OPTIONS(opt.sample),
    RUN_MODEL_OPTIONS(opt.model),
};

typedef struct {
    run_ctx r;
    chat *chat;     /* NULL without --chat */
    token_list ids; /* the prompt */
    run_answer answer;
} gen_ctx;

/* The prompt's ids by whichever way it was given. */
static err_code prompt_ids(gen_ctx *g, err *e)
{
    char *text = NULL;
    size_t n = opt.prompt ? strlen(opt.prompt) : 0;
    if (opt.ids) return run_parse_ids(&g->ids, opt.ids, "ids", e);
    if (!opt.prompt) TRY(run_read_text(&text, &n, opt.prompt_file ? opt.prompt_file : "-", e));
    const char *prompt = opt.prompt ? opt.prompt : text;
    const chat_message m = {"user", prompt};
    const err_code rc = opt.chat ? chat_encode(g->chat, &m, 1, opt.template.meta, true, &g->ids, e)
                                 : run_encode(&g->ids, g->r.t, prompt, n, opt.parse_special, e);
    mem_free(text);
    return rc;
}

static err_code print_json(const gen_ctx *g, const gen_result *r, err *e)
{
    const run_answer *a = &g->answer;
    cJSON *o = cJSON_CreateObject();
    const bool filled = o && cJSON_AddStringToObject(o, "text", a->text ? a->text : "") &&
                        run_add_ids(o, "ids", a->ids.ids, a->ids.n) &&
                        cJSON_AddStringToObject(o, "finish_reason", gen_end_name(r->end)) &&
                        cJSON_AddNumberToObject(o, "prompt_tokens", (double)g->ids.n) &&
                        cJSON_AddNumberToObject(o, "new_tokens", r->n_new) &&
                        cJSON_AddNumberToObject(o, "prompt_seconds", r->prompt_s) &&
                        cJSON_AddNumberToObject(o, "new_seconds", r->new_s) &&
                        cJSON_AddNumberToObject(o, "tokens_per_second",
                                                r->n_new > 1 ? (r->n_new - 1) / r->new_s : 0);
    return run_json(o, filled, e);
}

static err_code answer(gen_ctx *g, const tool_ctx *t, err *e)
{
    logit_bias bias[RUN_MAX_BIAS];
    generator *gen = NULL;
    gen_result result;
    int32_t stops[RUN_MAX_STOPS];
    gen_opts o = {.ids = g->ids.ids,
                  .n_ids = (int32_t)g->ids.n,
                  .max_new = (int32_t)opt.max_new,
                  .stop_ids = stops,
                  .stop_texts = opt.stop.v,
                  .n_stop_texts = opt.stop.n};
    o.n_stop_ids = opt.ignore_stop ? 0 : run_stop_ids(stops, &g->r, g->chat);
    TRY(run_sample(&o.sample, &opt.sample, (uint64_t)t->seed, bias, e));
    TRY(gen_open(&gen, g->r.m, g->r.t, e));
    g->answer.stream = t->json ? NULL : stdout;
    err_code rc = gen_run(gen, &o, &result, run_answer_add, &g->answer, &t->job, e);
    gen_close(&gen);
    if (rc == OK) rc = g->answer.failed.code ? (*e = g->answer.failed, e->code) : OK;
    if (rc != OK) return rc;
    if (!t->json) (void)putchar('\n');
    if (result.end == GEN_CANCELED)
        return err_set(e, E_CANCELED, "stopped after %d tokens", result.n_new);
    return t->json ? print_json(g, &result, e) : OK;
}

static err_code session(gen_ctx *g, const tool_ctx *t, err *e)
{
    const int32_t context = weights_desc(g->r.src)->max_tokens;
    int64_t need = g->ids.n + opt.max_new;
    if (g->ids.n == 0) return err_set(e, E_USAGE, "the prompt is empty");
    if (opt.max_new == 0 || (need > context && g->ids.n < context)) need = context;
    TRY(run_model(&g->r, t, &opt.model, need, 1, e));
    return g->r.m ? answer(g, t, e) : OK;
}

static err_code run(tool_ctx *t, err *e)
{
    gen_ctx g = {0};
    if (!!opt.prompt + !!opt.prompt_file + !!opt.ids > 1)
        return err_set(e, E_USAGE, "expected one of --prompt, --prompt-file and --ids");
    if (opt.chat && opt.ids) return err_set(e, E_USAGE, "--chat needs a text, not --ids");
    err_code rc = run_open(&g.r, t, true, e);
    if (rc == OK && opt.chat) rc = run_chat_open(&g.chat, &g.r, &opt.template, t, e);
    if (rc == OK) rc = prompt_ids(&g, e);
    if (rc == OK) rc = session(&g, t, e);
    run_answer_free(&g.answer);
    token_list_free(&g.ids);
    chat_close(&g.chat);
    run_close(&g.r);
    return rc;
}

const tool_command tm_run_generate = {
    .name = "generate",
    .usage = "PATH --prompt TEXT | --ids 1,2,3 | < FILE [options]",
    .summary = "answers one prompt",
    .examples =
        "  tm-run generate model --prompt 'Once upon a time' --max-new-tokens 60\n"
        "  tm-run generate model --chat --prompt 'What is 17 + 25?' --temperature 0 --json\n"
        "  tm-run generate model --chat < question.txt\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_SEED | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
