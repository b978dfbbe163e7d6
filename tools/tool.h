/* The shared main of every tool: options, log and progress on stderr, signals, exit codes. A tool
 * is a table of commands (one without a name, or several as in tm-run) whose `run` calls a library
 * and returns its err; results go to stdout, whose write and close errors tool_main reports.
 *
 *     static struct { const char *out; int64_t samples; } opt = {.samples = 128};
 *     static const cli_option options[] = {
 *         {"output", 'o', CLI_STR, &opt.out, "FILE", "the artifact to write", .alias = "work-dir"},
 *         {"samples", 0, CLI_I64, &opt.samples, "N", "windows [128]", .lo = 1, .hi = 65536},
 *     };
 *     static err_code run(tool_ctx *t, err *e) { ... }
 *     static const tool_command command = {
 *         .usage = "MODEL_DIR --data FILE -o CALIB [options]",
 *         .summary = "...", .options = options, .n_options = 2, .min_args = 1, .max_args = 1,
 *         .shared = TOOL_DEVICE | TOOL_SEED | TOOL_DRY_RUN | TOOL_FORCE, .run = run};
 *     int main(int argc, char **argv)
 *     {
 *         return tool_main(argc, argv, &(tool_spec){"calib-collect", "...", &command, 1});
 *     }
 */
#ifndef TMF_TOOLS_TOOL_H
#define TMF_TOOLS_TOOL_H

#include "base/cli.h"
#include "base/job.h"
#include "base/json.h"
#include "kernels/device.h"

/* Shared options a command takes besides -q, -v, --progress, --help, --version and --completion. */
enum {
    TOOL_DEVICE = 1,  /* --device cpu|cuda[:i], --threads N (0: CPUs of this process), --isa NAME */
    TOOL_SEED = 2,    /* --seed N */
    TOOL_DRY_RUN = 4, /* --dry-run */
    TOOL_FORCE = 8,   /* --force */
    TOOL_JSON = 16,   /* --json */
    TOOL_THREADS = 32 /* --threads alone, for tools without a device */
};

typedef struct {
    const char *tool;        /* "awq-search"; "tm-run" for every subcommand */
    const char *const *args; /* positionals, [n_args] */
    int n_args;
    int32_t threads; /* as given; 0: CPUs of this process */
    int64_t seed;
    bool dry_run, force, json;
    dev_opts device;
    bool device_insists; /* cuda:INDEX: no falling back to the CPU */
    job job;             /* log, progress and stop of this run: hand &t->job to library calls */
    bool resumable; /* set by a command when what it leaves on E_CANCELED can be resumed: exit 8 */
} tool_ctx;

typedef struct {
    const char *name;                       /* NULL: the tool's only command */
    const char *usage, *summary, *examples; /* as in cli_spec */
    const cli_option *options;              /* its own; targets must live through tool_main */
    int n_options;
    unsigned shared; /* TOOL_* */
    int min_args, max_args;
    err_code (*run)(tool_ctx *t, err *e);
} tool_command;

typedef struct {
    const char *tool, *summary;
    const tool_command *commands; /* [n_commands] */
    int n_commands;
    /* As in cli_spec, for all commands; NULL: none. env_more: further names of the tool's own, in
     * spaces (" API_KEY "). Variables that are neither are warned of. */
    const char *env_prefix, *env_more;
} tool_spec;

/* Never exits by itself; main returns its value. */
int tool_main(int argc, char **argv, const tool_spec *spec);

/* Exit code of a result (serving conventions): 0 done, 1 device or other failure, 2 usage, 3 input,
 * 4 unsupported, 5 memory or limit, 6 read or write, 7 check failed, 8 stopped but resumable,
 * 128+signal stopped. */
int tool_exit_code(err_code c, int signal_number, bool resumable);

/* Opens the device that --device, --threads and --isa name; for `cuda` without an index, in builds
 * with CUDA on a machine without a GPU, the CPU, with a warning. */
err_code tool_device_open(const tool_ctx *t, device **out, err *e);
/* One line of JSON on stdout. */
err_code tool_print_json(const cJSON *o, err *e);
/* Logs "wrote 'PATH': 12.3 MB in 4.5 s, <detail>"; detail NULL: none. The time counts from the
 * start. */
void tool_wrote(const tool_ctx *t, const char *path, const char *detail);
/* Seconds since tool_main began. */
double tool_seconds(void);
/* For interactive commands: takes back a pending SIGINT, so that job_check passes again. True when
 * there was one. A second SIGINT that is not taken back in time ends the process at once. */
bool tool_interrupt_take(void);
/* Clears the progress line before something else is written to a terminal. */
void tool_progress_clear(void);
/* "3.2 KB", "1.23 GB" (powers of 1000) into buf; returns buf. */
const char *tool_bytes_text(char *buf, size_t cap, uint64_t bytes);

#endif
