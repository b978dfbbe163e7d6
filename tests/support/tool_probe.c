/* A tool that does nothing but what tests/cli/tool.sh asks of the shared main. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/file.h"
#include "tools/tool.h"

static struct {
    int64_t code, steps, ms, bytes;
    bool resumable, take;
    const char *output, *text;
} opt = {.steps = 3, .ms = 1, .text = "failed"};

/* A step's work: no signal cuts it short. */
static void nap(int64_t ms)
{
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    while (nanosleep(&t, &t) != 0 && errno == EINTR) continue;
}

static err_code run_fail(tool_ctx *t, err *e)
{
    (void)t;
    return opt.code ? err_set(e, (err_code)opt.code, "%s", opt.text) : OK;
}

static err_code run_steps(tool_ctx *t, err *e)
{
    t->resumable = opt.resumable;
    for (int64_t i = 1; i <= opt.steps; i++) {
        nap(opt.ms);
        if (opt.take && tool_interrupt_take()) job_log(&t->job, LOG_INFO, "took an interrupt");
        TRY(job_check(&t->job, e));
        job_step(&t->job, "probing", "step", i, opt.steps);
    }
    job_log(&t->job, LOG_WARN, "a warning");
    job_log(&t->job, LOG_INFO, "a note");
    job_log(&t->job, LOG_DEBUG, "a detail");
    return OK;
}

static err_code run_print(tool_ctx *t, err *e)
{
    (void)t, (void)e;
    for (int64_t i = 0; i < opt.bytes; i++) (void)putchar(i % 80 == 79 ? '\n' : 'x');
    return OK;
}

static err_code run_write(tool_ctx *t, err *e)
{
    file_writer *w;
    if (!opt.output) return err_set(e, E_USAGE, "option '--output' is required");
    TRY(file_writer_open(&w, opt.output, t->force, e));
    char block[4096] = {0};
    err_code rc = OK;
    for (int64_t i = 0; rc == OK && i < opt.bytes; i += 4096)
        rc = file_writer_write(w, block, sizeof block, e);
    if (rc == OK) rc = file_writer_commit(&w, e);
    file_writer_abort(&w);
    if (rc == OK) tool_wrote(t, opt.output, "probe");
    return rc;
}

/* Shrinks the file below its mapping, then reads it. */
static err_code run_shrink(tool_ctx *t, err *e)
{
    file_map m;
    TRY(file_map_open(&m, t->args[0], e));
    FILE *f = fopen(t->args[0], "w");
    if (f) (void)fclose(f);
    volatile uint8_t last = m.data[m.size - 1];
    (void)last;
    return err_set(e, E_CHECK, "the read went through");
}

static err_code run_show(tool_ctx *t, err *e)
{
    cJSON *o = cJSON_CreateObject();
    (void)cJSON_AddNumberToObject(o, "threads", t->threads);
    (void)cJSON_AddNumberToObject(o, "seed", (double)t->seed);
    (void)cJSON_AddNumberToObject(o, "device", t->device.kind);
    (void)cJSON_AddNumberToObject(o, "index", t->device.index);
    (void)cJSON_AddStringToObject(o, "isa", t->device.isa);
    (void)cJSON_AddBoolToObject(o, "json", t->json);
    (void)cJSON_AddBoolToObject(o, "dry_run", t->dry_run);
    const err_code rc = tool_print_json(o, e);
    cJSON_Delete(o);
    return rc;
}

static const cli_option options[] = {
    {"code", 0, CLI_I64, &opt.code, "N", "err_code to fail with", .lo = 0, .hi = 10},
    {"text", 0, CLI_STR, &opt.text, "TEXT", "message to fail with"},
    {"steps", 0, CLI_I64, &opt.steps, "N", "steps to make", .lo = 0, .hi = 1e6},
    {"ms", 0, CLI_I64, &opt.ms, "N", "milliseconds of a step", .lo = 0, .hi = 1e6},
    {"bytes", 0, CLI_I64, &opt.bytes, "N", "bytes to write", .lo = 0, .hi = 1e9},
    {"resumable", 0, CLI_FLAG, &opt.resumable, NULL, "pretend to leave a checkpoint"},
    {"take", 0, CLI_FLAG, &opt.take, NULL, "take interrupts back"},
    {"output", 'o', CLI_STR, &opt.output, "FILE", "file to write"},
};

#define COMMAND(name, text, args, flags, run)                                                  \
    {                                                                                          \
        name, "[options]", text, NULL, options, sizeof options / sizeof *options, flags, args, \
            args, run                                                                          \
    }

static const tool_command commands[] = {
    COMMAND("fail", "ends with a code", 0, 0, run_fail),
    COMMAND("steps", "makes slow steps", 0, 0, run_steps),
    COMMAND("print", "writes to standard output", 0, 0, run_print),
    COMMAND("write", "writes a file", 0, TOOL_FORCE, run_write),
    COMMAND("shrink", "reads a file that shrinks", 1, 0, run_shrink),
    COMMAND("show", "prints its options", 0, TOOL_DEVICE | TOOL_SEED | TOOL_DRY_RUN | TOOL_JSON,
            run_show),
};

int main(int argc, char **argv)
{
    /* As "tool_probe1" it is a tool of one command, as the four converters are. */
    static const tool_command one = COMMAND(NULL, "ends with a code", 0, 0, run_fail);
    const char *name = path_base(argv[0]);
    const bool single = strcmp(name, "tool_probe1") == 0;
    const tool_spec spec = {single ? "tool_probe1" : "tool_probe", "Probes the shared main.",
                            single ? &one : commands,
                            single ? 1 : (int)(sizeof commands / sizeof *commands)};
    return tool_main(argc, argv, &spec);
}
