/* tm-run client: the conversation of tm-run chat, answered by a server. */
#include <math.h>
#include <stdio.h>

#include "base/mem.h"
#include "tools/chat_app.h"

static struct {
    chat_app_opts app;
    const char *model, *key_file, *meta;
    int64_t max_new, top_k, seed;
    double temperature, top_p, min_p, repetition, presence, frequency;
    cli_list stop;
} opt = {.top_k = -1,
         .seed = -1,
         .temperature = -1,
         .top_p = -1,
         .min_p = -1,
         .repetition = -1,
         .presence = -9,
         .frequency = -9};

static const cli_option options[] = {
    CHAT_APP_OPTIONS(opt.app),
    {"model", 0, CLI_STR, &opt.model, "NAME", "model to ask [the first that the server names]"},
    {"api-key-file", 0, CLI_STR, &opt.key_file, "FILE",
     "its first key is sent [environment TM_RUN_API_KEY]"},
    {"meta-instruction", 0, CLI_STR, &opt.meta, "TEXT", "system text [none]"},
    {"max-new-tokens", 0, CLI_I64, &opt.max_new, "N", "of an answer [server's]", .lo = 1,
     .hi = 1 << 24},
    {"stop", 0, CLI_LIST, &opt.stop, "TEXT", "also stop where an answer has this text; repeatable"},
    {"temperature", 't', CLI_F64, &opt.temperature, "T", "0 is greedy [server's]", .lo = 0,
     .hi = 2},
    {"top-k", 0, CLI_I64, &opt.top_k, "K", "keep the K most probable, 0 for all [server's]",
     .lo = 0, .hi = INT32_MAX},
    {"top-p", 0, CLI_F64, &opt.top_p, "P", "then the shortest head with sum P [server's]",
     .lo = 1e-9, .hi = 1},
    {"min-p", 0, CLI_F64, &opt.min_p, "P", "then those of P times the best or more [server's]",
     .lo = 0, .hi = 1},
    {"repetition-penalty", 0, CLI_F64, &opt.repetition, "R",
     "weakens what prompt and answer hold already [server's]", .lo = 1e-3, .hi = 1e3},
    {"presence-penalty", 0, CLI_F64, &opt.presence, "X", "off what the answer holds [server's]",
     .lo = -2, .hi = 2},
    {"frequency-penalty", 0, CLI_F64, &opt.frequency, "X", "and off for each time [server's]",
     .lo = -2, .hi = 2},
    {"seed", 0, CLI_I64, &opt.seed, "N", "of the first answer, one more for each [server's]",
     .lo = 0, .hi = 0x1p53},
};

/* What no option named is left to the server. */
static void set_sampling(sample_opts *s)
{
    *s = chat_sample_unset();
    if (opt.temperature >= 0) s->temperature = opt.temperature;
    if (opt.top_k >= 0) s->top_k = (int32_t)opt.top_k;
    if (opt.top_p >= 0) s->top_p = opt.top_p;
    if (opt.min_p >= 0) s->min_p = opt.min_p;
    if (opt.repetition >= 0) s->repetition_penalty = opt.repetition;
    if (opt.presence >= -2) s->presence_penalty = opt.presence;
    if (opt.frequency >= -2) s->frequency_penalty = opt.frequency;
    if (opt.seed >= 0) s->seed = (uint64_t)opt.seed;
}

static err_code converse(chat_app *a, http_client *h, const char *name, err *e)
{
    char hello[1024];
    TRY(chat_remote_open(&a->s, h, name, opt.meta, e));
    set_sampling(&a->s.sample);
    a->s.max_new = opt.max_new;
    a->s.stop_texts = opt.stop;
    (void)snprintf(hello, sizeof hello, "%s at %s", name, http_client_url(h));
    opt.app.hello = hello;
    return chat_app_run(a, &opt.app, e);
}

static err_code run(tool_ctx *t, err *e)
{
    chat_app a = {.t = t};
    http_client *h = NULL;
    char *name = NULL;
    err_code rc = http_client_open(&h, t->args[0], opt.key_file, e);
    if (rc == OK)
        rc = opt.model ? mem_strdup(&name, opt.model, e) : http_client_model(h, &t->job, &name, e);
    if (rc == OK) rc = converse(&a, h, name, e);
    chat_app_close(&a);
    http_client_close(&h);
    mem_free(name);
    return rc;
}

const tool_command tm_run_client = {
    .name = "client",
    .usage = "URL [-p TEXT] [options]",
    .summary = "talks in the terminal with a server of OpenAI's chat interface",
    .examples =
        "  tm-run client 127.0.0.1:23333\n"
        "  tm-run client https://host/v1 --api-key-file key --model name\n"
        "  git diff | tm-run client localhost:23333 -p 'Write a commit message for this:'\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};
