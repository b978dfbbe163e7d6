/* tm-run: runs a model from a workspace, an AWQ directory or a 16-bit directory. */
#include "tools/tm_run.h"

int main(int argc, char **argv)
{
    const tool_command commands[] = {tm_run_chat,        tm_run_generate, tm_run_ppl,
                                     tm_run_score,       tm_run_tasks,    tm_run_bench,
                                     tm_run_tokenize,    tm_run_info,     tm_run_client,
                                     tm_run_bench_serve, tm_run_serve};
    const tool_spec spec = {.tool = "tm-run",
                            .summary = "runs a model: chat, server, measurements",
                            .commands = commands,
                            .n_commands = sizeof commands / sizeof *commands,
                            .env_prefix = "TM_RUN_",
                            .env_more = " API_KEY "};
    return tool_main(argc, argv, &spec);
}
