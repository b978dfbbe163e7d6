/* tm-run info: what a path holds, with every digest checked. */
#include <stdio.h>

#include "base/mem.h"
#include "formats/info.h"
#include "tools/tm_run.h"

static struct {
    bool quick;
} opt;

static const cli_option options[] = {
    {"no-verify", 0, CLI_FLAG, &opt.quick, NULL, "do not read the weights to check their digests"},
};

static err_code print_text(const cJSON *o, err *e)
{
    char *text;
    TRY(info_text(&text, o, e));
    (void)fputs(text, stdout);
    mem_free(text);
    return OK;
}

static err_code run(tool_ctx *t, err *e)
{
    cJSON *o;
    TRY(info_read(&o, t->args[0], !opt.quick, &t->job, e));
    const err_code rc = t->json ? tool_print_json(o, e) : print_text(o, e);
    cJSON_Delete(o);
    return rc;
}

const tool_command tm_run_info = {
    .name = "info",
    .usage = "PATH [options]",
    .summary = "says what a model directory, workspace, calib or plan file holds and verifies it",
    .examples = "  tm-run info workspace\n"
                "  tm-run info model-w4 --no-verify --json\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};
