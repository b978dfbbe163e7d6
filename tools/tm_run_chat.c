/* tm-run chat: a conversation in the terminal, or one answer where standard input is no terminal.
 */
#include <stdio.h>

#include "tools/chat_app.h"

#define CHAT_SESSION \
    8192 /* tokens by default: models of long contexts would plan gigabytes of cache */

static struct {
    chat_app_opts app;
    run_chat_opts chat;
    int64_t max_new;
    cli_list stop;
    bool drop_oldest;
    run_sample_opts sample;
    run_model_opts model;
} opt = {.max_new = 1024, .sample = RUN_SAMPLE_DEFAULTS, .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    CHAT_APP_OPTIONS(opt.app),
    RUN_CHAT_OPTIONS(opt.chat),
    {"max-new-tokens", 0, CLI_I64, &opt.max_new, "N",
     "of an answer, 0: until the session is full [1024]", .lo = 0, .hi = 1 << 24},
    {"stop", 0, CLI_LIST, &opt.stop, "TEXT", "also stop where an answer has this text; repeatable"},
    {"drop-oldest", 0, CLI_FLAG, &opt.drop_oldest, NULL, "a full session forgets its oldest turns"},
    RUN_SAMPLE_OPTIONS(opt.sample),
    RUN_MODEL_OPTIONS(opt.model),
};

static err_code converse(chat_app *a, run_ctx *r, const chat *c, err *e)
{
    logit_bias bias[RUN_MAX_BIAS];
    char hello[4200];
    TRY(chat_local_open(&a->s, r, c, opt.chat.meta, e));
    TRY(run_sample(&a->s.sample, &opt.sample, (uint64_t)a->t->seed, bias, e));
    a->s.max_new = opt.max_new;
    a->s.stop_texts = opt.stop;
    a->s.drop_oldest = opt.drop_oldest;
    (void)snprintf(hello, sizeof hello, "%s on %s", weights_path(r->src), dev_name(r->d));
    opt.app.hello = hello;
    return chat_app_run(a, &opt.app, e);
}

static err_code run(tool_ctx *t, err *e)
{
    chat_app a = {.t = t};
    run_ctx r;
    chat *c = NULL;
    err_code rc = run_open(&r, t, true, e);
    if (rc == OK) rc = run_chat_open(&c, &r, &opt.chat, t, e);
    if (rc == OK) {
        const int32_t context = weights_desc(r.src)->max_tokens;
        rc = run_model(&r, t, &opt.model, context < CHAT_SESSION ? context : CHAT_SESSION, 1, e);
    }
    if (rc == OK && r.m) rc = converse(&a, &r, c, e);
    chat_app_close(&a);
    chat_close(&c);
    run_close(&r);
    return rc;
}

const tool_command tm_run_chat = {
    .name = "chat",
    .usage = "PATH [-p TEXT] [options]",
    .summary = "talks in the terminal; without one answers what standard input asks",
    .examples = "  tm-run chat model\n"
                "  tm-run chat workspace --quant-policy 8 --stats\n"
                "  git diff | tm-run chat model -p 'Write a commit message for this change:'\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_SEED | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
