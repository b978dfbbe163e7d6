/* Shared main: from argv to a command's run and from its err to an exit code. The state below is
 * the process's own (signals, clock); nothing under tools/ is linked by a library. */
#include "tools/tool.h"

#include <errno.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "base/file.h"
#include "base/mem.h"
#include "tools/tool_meter.h"

#define TOOL_MAX_OPTIONS 80
#define TOOL_MAX_ARGS    64

static struct {
    atomic_bool stop;
    volatile sig_atomic_t signal_number;
    const char *name;
    double start; /* seconds on the monotonic clock */
} tool;

/* Values of the shared options. */
typedef struct {
    const char *device, *isa, *progress, *completion;
    int64_t threads, seed;
    bool quiet, verbose, dry_run, force, json;
} tool_shared;

static double tool_clock(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

double tool_seconds(void) { return tool_clock() - tool.start; }

int tool_exit_code(err_code c, int signal_number, bool resumable)
{
    switch (c) {
    case OK: return 0;
    case E_USAGE: return 2;
    case E_INPUT:
    case E_SHAPE: return 3;
    case E_UNSUPPORTED: return 4;
    case E_NOMEM:
    case E_LIMIT: return 5;
    case E_IO: return 6;
    case E_CHECK: return 7;
    case E_BUSY:
    case E_DEVICE: return 1;
    case E_CANCELED: return resumable ? 8 : signal_number ? 128 + signal_number : 1;
    }
    return 1;
}

/* SA_RESETHAND: a second signal ends a run that does not come to its next check. */
static void tool_on_stop(int signal_number)
{
    tool.signal_number = signal_number;
    atomic_store(&tool.stop, true);
}

static void tool_on_status(int signal_number)
{
    (void)signal_number;
    tool_meter_status_wanted();
}

/* A mapped input that another process cuts short cannot be read on, and no library code can tell.
 * Only calls that are safe in a signal handler. */
static void tool_on_bus_error(int signal_number)
{
    static const char text[] = ": an input file shrank while it was read, or its disk failed\n";
    (void)signal_number;
    if (write(STDERR_FILENO, tool.name, strlen(tool.name)) < 0 ||
        write(STDERR_FILENO, text, sizeof text - 1) < 0)
        _exit(1);
    _exit(tool_exit_code(E_IO, 0, false));
}

/* No SA_RESTART: a read from a terminal comes back when the user interrupts it. */
static void tool_signal(int signal_number, void (*handler)(int), int flags)
{
    struct sigaction a = {.sa_handler = handler, .sa_flags = flags};
    (void)sigemptyset(&a.sa_mask);
    (void)sigaction(signal_number, &a, NULL);
}

static void tool_signals(void)
{
    tool_signal(SIGINT, tool_on_stop, SA_RESETHAND);
    tool_signal(SIGTERM, tool_on_stop, SA_RESETHAND);
    tool_signal(SIGHUP, tool_on_stop, SA_RESETHAND);
    tool_signal(SIGUSR1, tool_on_status, SA_RESTART);
    tool_signal(SIGBUS, tool_on_bus_error, 0);
    tool_signal(SIGPIPE, SIG_DFL,
                0); /* even when the parent ignores it: a closed pipe ends us, 141 */
    tool_signal(SIGXFSZ, SIG_IGN, 0); /* writes then fail with an error that we report */
}

bool tool_interrupt_take(void)
{
    if (tool.signal_number != SIGINT) return false;
    tool_signal(SIGINT, tool_on_stop, SA_RESETHAND);
    tool.signal_number = 0;
    atomic_store(&tool.stop, false);
    return true;
}

static int tool_options(cli_option *out, tool_shared *v, const tool_command *c)
{
    const cli_option shared[] = {
        {"device", 0, CLI_STR, &v->device, "NAME", "cpu or cuda[:index] [cpu]"},
        {"isa", 0, CLI_CHOICE, &v->isa, "NAME", "fastest CPU kernels allowed [auto]",
         .choices = "auto|ref|avx2|avx512|amx"},
        {"threads", 0, CLI_I64, &v->threads, "N",
         "CPU threads [0: as many as this process may use]", .lo = 0, .hi = 1024},
        {"seed", 0, CLI_I64, &v->seed, "N", "seed of every random choice [0]", .lo = 0,
         .hi = 0x1p53},
        {"dry-run", 'n', CLI_FLAG, &v->dry_run, NULL,
         "print what would be done and its memory, then end"},
        {"force", 'f', CLI_FLAG, &v->force, NULL, "replace an existing output"},
        {"json", 0, CLI_FLAG, &v->json, NULL, "results as JSON on standard output"},
        {"progress", 0, CLI_CHOICE, &v->progress, "HOW", "progress on standard error [auto]",
         .choices = "auto|none|json"},
        {"quiet", 'q', CLI_FLAG, &v->quiet, NULL, "errors only"},
        {"verbose", 'v', CLI_FLAG, &v->verbose, NULL, "more notes"},
        {"help", 'h', CLI_FLAG, NULL, NULL, "show this help"},
        {"version", 0, CLI_FLAG, NULL, NULL,
         "show version, licence and backends; with --json as JSON"},
        {"completion", 0, CLI_CHOICE, &v->completion, "SHELL",
         "print the shell's completion script", .choices = "bash|zsh|fish"},
    };
    const unsigned need[] = {TOOL_DEVICE, TOOL_DEVICE,  TOOL_DEVICE | TOOL_THREADS,
                             TOOL_SEED,   TOOL_DRY_RUN, TOOL_FORCE,
                             TOOL_JSON};
    int n = 0;
    for (int i = 0; i < c->n_options && n < TOOL_MAX_OPTIONS; i++) out[n++] = c->options[i];
    for (size_t i = 0; i < sizeof shared / sizeof shared[0] && n < TOOL_MAX_OPTIONS; i++)
        if (i >= sizeof need / sizeof need[0] || (c->shared & need[i])) out[n++] = shared[i];
    return n;
}

static err_code tool_parse_device(dev_opts *o, bool *insists, const tool_shared *v, err *e)
{
    char *end;
    *o = (dev_opts){.kind = DEV_CPU, .threads = (int32_t)v->threads, .isa = v->isa};
    if (strcmp(v->device, "cpu") == 0) return OK;
    if (strncmp(v->device, "cuda", 4) == 0) {
        const char *index = v->device + 4;
        o->kind = DEV_CUDA;
        if (!*index) return OK;
        const long i = strtol(index + 1, &end, 10);
        if (*index == ':' && index[1] >= '0' && index[1] <= '9' && !*end && i < 1024) {
            o->index = (int32_t)i;
            *insists = true;
            return OK;
        }
    }
    return err_set(e, E_USAGE, "option '--device': expected cpu, cuda or cuda:INDEX, got '%s'",
                   v->device);
}

/* A binary with CUDA also serves machines without a GPU: `cuda` takes one if there is one, while
 * `cuda:0` insists. */
err_code tool_device_open(const tool_ctx *t, device **out, err *e)
{
    dev_opts o = t->device;
    const err_code rc = dev_open(out, &o, e);
    if (rc != E_UNSUPPORTED || o.kind != DEV_CUDA || o.deterministic || t->device_insists ||
        !TMF_WITH_CUDA)
        return rc;
    job_log(&t->job, LOG_WARN, "%s; using the CPU", e->msg);
    o.kind = DEV_CPU;
    return dev_open(out, &o, e);
}

err_code tool_print_json(const cJSON *o, err *e)
{
    char *text;
    TRY(json_print(&text, o, false, e));
    (void)puts(text); /* tool_main reports what stdout could not take */
    mem_free(text);
    return OK;
}

const char *tool_bytes_text(char *buf, size_t cap, uint64_t bytes)
{
    static const char *const unit[] = {"B", "KB", "MB", "GB", "TB"};
    double v = (double)bytes;
    int u = 0;
    while (v >= 999.5 && u < 4) {
        v /= 1000;
        u++;
    }
    (void)snprintf(buf, cap, "%.*f %s", u == 0 || v >= 99.95 ? 0 : v >= 9.995 ? 1 : 2, v, unit[u]);
    return buf;
}

static err_code tool_version(const char *name, bool json, err *e)
{
    if (!json) {
        (void)printf("%s (tmforge) %s\nlicence: Apache-2.0\nbackends: %s\nbuild: %s\n", name,
                     TMF_VERSION, TMF_BACKENDS, TMF_BUILD);
        return OK;
    }
    cJSON *o = cJSON_CreateObject();
    const bool filled = cJSON_AddStringToObject(o, "name", name) &&
                        cJSON_AddStringToObject(o, "package", "tmforge") &&
                        cJSON_AddStringToObject(o, "version", TMF_VERSION) &&
                        cJSON_AddStringToObject(o, "licence", "Apache-2.0") &&
                        cJSON_AddStringToObject(o, "backends", TMF_BACKENDS) &&
                        cJSON_AddStringToObject(o, "build", TMF_BUILD);
    const err_code rc = filled ? tool_print_json(o, e)
                               : err_set(e, E_NOMEM, "version: out of memory");
    cJSON_Delete(o);
    return rc;
}

/* A full disk or a closed descriptor behind stdout is a failure like any other. */
static err_code tool_close_stdout(err *e)
{
    const bool bad = ferror(stdout) != 0;
    errno = 0;
    if (fclose(stdout) != 0 || bad)
        return err_sys(e, E_IO, errno ? errno : EIO, "cannot write to standard output");
    return OK;
}

static err_code tool_help_commands(const tool_spec *s)
{
    (void)printf("usage: %s COMMAND ... [options]\n%s\n\ncommands:\n", s->tool, s->summary);
    for (int i = 0; i < s->n_commands; i++)
        (void)printf("  %-12s %s\n", s->commands[i].name, s->commands[i].summary);
    (void)printf(
        "\n'%s COMMAND --help' shows the options of a command; '%s --version' the build.\n",
        s->tool, s->tool);
    return OK;
}

/* A command as the text generators want it. */
typedef struct {
    cli_spec spec;
    cli_option options[TOOL_MAX_OPTIONS];
} tool_row;

static void tool_fill_row(tool_row *r, const char *tool_name, const tool_command *c)
{
    tool_shared unused = {0};
    const int n = tool_options(r->options, &unused, c);
    r->spec = (cli_spec){.tool = tool_name,
                         .usage = c->usage,
                         .summary = c->summary,
                         .examples = c->examples,
                         .options = r->options,
                         .n_options = n};
}

/* "scdoc" is for the build: the generated part of the man page. */
static err_code tool_complete(const tool_spec *s, const char *shell, err *e)
{
    const int n = s->n_commands;
    const bool single = n == 1 && !s->commands[0].name, man = strcmp(shell, "scdoc") == 0;
    void *rows = NULL, *list = NULL;
    err_code rc;
    if (!man && strcmp(shell, "bash") != 0 && strcmp(shell, "zsh") != 0 &&
        strcmp(shell, "fish") != 0)
        return err_set(e, E_USAGE, "option '--completion': expected bash, zsh or fish, got '%s'",
                       shell);
    if ((rc = mem_alloc(&rows, (size_t)n, sizeof(tool_row), "completion", e)) != OK) goto done;
    if ((rc = mem_alloc(&list, (size_t)n, sizeof(cli_command), "completion", e)) != OK) goto done;
    tool_row *r = rows;
    cli_command *commands = list;
    for (int i = 0; i < n; i++) {
        tool_fill_row(&r[i], s->tool, &s->commands[i]);
        commands[i] = (cli_command){s->commands[i].name, &r[i].spec};
    }
    if (man)
        cli_man(&r->spec, commands, single ? 0 : n, stdout);
    else
        cli_completion_commands(&r->spec, commands, single ? 0 : n, shell, stdout);
done:
    mem_free(list);
    mem_free(rows);
    return rc;
}

/* The values are parsed: fills the context and runs the command. */
static err_code tool_start(tool_ctx *t, const tool_command *c, const tool_shared *v, err *e)
{
    TRY(tool_parse_device(&t->device, &t->device_insists, v, e));
    tool_meter_init(t->tool, v->progress, v->quiet);
    t->threads = (int32_t)v->threads;
    t->seed = v->seed;
    t->dry_run = v->dry_run;
    t->force = v->force;
    t->json = v->json;
    t->job = (job){.log = tool_meter_log,
                   .progress = tool_meter_progress,
                   .stop = &tool.stop,
                   .level = v->quiet     ? LOG_ERROR
                            : v->verbose ? LOG_DEBUG
                                         : LOG_INFO};
    return c->run(t, e);
}

/* A variable may be meant for another command. */
static bool tool_env_known(const tool_spec *s, const char *entry)
{
    tool_shared unused = {0};
    cli_option options[TOOL_MAX_OPTIONS];
    char word[64];
    const size_t skip = strlen(s->env_prefix);
    (void)snprintf(word, sizeof word, " %.*s ", (int)strcspn(entry + skip, "="), entry + skip);
    if (s->env_more && strstr(s->env_more, word)) return true;
    for (int i = 0; i < s->n_commands; i++) {
        const cli_spec cs = {.options = options,
                             .n_options = tool_options(options, &unused, &s->commands[i]),
                             .env_prefix = s->env_prefix};
        if (cli_env_known(&cs, entry)) return true;
    }
    return false;
}

static void tool_env_check(const tool_spec *s)
{
    for (char **p = environ; s->env_prefix && *p; p++)
        if (strncmp(*p, s->env_prefix, strlen(s->env_prefix)) == 0 && !tool_env_known(s, *p))
            (void)fprintf(stderr, "%s: the environment's %.*s is no option and has no effect\n",
                          s->tool, (int)strcspn(*p, "="), *p);
}

static err_code tool_command_main(tool_ctx *t, const tool_spec *s, const tool_command *c, int argc,
                                  char **argv, err *e)
{
    tool_shared v = {.device = "cpu", .isa = "auto", .progress = "auto"};
    cli_option options[TOOL_MAX_OPTIONS];
    const char *args[TOOL_MAX_ARGS];
    char name[64];
    bool help, version;
    (void)snprintf(name, sizeof name, "%s%s%s", s->tool, c->name ? " " : "",
                   c->name ? c->name : "");
    const int n_options = tool_options(options, &v, c);
    const cli_spec cs = {name,        c->usage,    c->summary,  options,       n_options,
                         c->min_args, c->max_args, c->examples, s->env_prefix, environ};
    const err_code rc = cli_parse(&cs, argc, argv, args, TOOL_MAX_ARGS, &t->n_args, &help, &version,
                                  e);
    if (help || version || rc == OK) {
        if (help) return cli_help(&cs, stdout), OK;
        if (version) return tool_version(s->tool, v.json, e);
        if (v.completion) return tool_complete(s, v.completion, e);
    }
    TRY(rc);
    if (!v.quiet) tool_env_check(s);
    t->args = args;
    return tool_start(t, c, &v, e);
}

static const tool_command *tool_find(const tool_spec *s, const char *name)
{
    for (int i = 0; i < s->n_commands; i++)
        if (strcmp(s->commands[i].name, name) == 0) return &s->commands[i];
    return NULL;
}

static bool tool_is(const char *arg, const char *a, const char *b)
{
    return arg && (strcmp(arg, a) == 0 || strcmp(arg, b) == 0);
}

static err_code tool_dispatch(tool_ctx *t, const tool_spec *s, int argc, char **argv, err *e)
{
    const bool single = s->n_commands == 1 && !s->commands[0].name;
    const char *first = argc > 1 ? argv[1] : NULL, *second = argc > 2 ? argv[2] : NULL;
    if (argc <= 3 && tool_is(first, "--version", "-V") &&
        (!second || tool_is(second, "--json", "--json")))
        return tool_version(s->tool, second != NULL, e);
    if (argc <= 3 && tool_is(first, "--completion", "--completions"))
        return tool_complete(s, second ? second : "", e);
    if (single) return tool_command_main(t, s, &s->commands[0], argc, argv, e);
    if (tool_is(first, "--help", "-h")) return tool_help_commands(s);
    if (!first) return err_set(e, E_USAGE, "missing command");
    const tool_command *c = tool_find(s, first);
    if (!c)
        return err_set(e, E_USAGE, "unknown %s '%s'", *first == '-' ? "option" : "command", first);
    return tool_command_main(t, s, c, argc - 1, argv + 1, e);
}

static void tool_report(const tool_ctx *t, const char *help, const err *e)
{
    tool_progress_clear();
    if (e->code == E_USAGE && !strstr(e->msg, "--force"))
        (void)fprintf(stderr, "%s: %s (try '%s --help')\n", t->tool, e->msg, help);
    else if (e->code == E_CANCELED && t->resumable)
        (void)fprintf(stderr, "%s: %s; the same command goes on from here\n", t->tool, e->msg);
    else
        (void)fprintf(stderr, "%s: %s\n", t->tool, e->msg);
}

int tool_main(int argc, char **argv, const tool_spec *s)
{
    tool_ctx t = {.tool = s->tool};
    err e = {OK, ""}, close_error;
    char help[64];
    tool.start = tool_clock();
    tool.name = s->tool;
    tool_signals();
    tool_meter_init(s->tool, "auto", false);
    const bool named = argc > 1 && s->commands[0].name && tool_find(s, argv[1]);
    (void)snprintf(help, sizeof help, "%s%s%s", s->tool, named ? " " : "", named ? argv[1] : "");
    err_code rc = tool_dispatch(&t, s, argc, argv, &e);
    if (rc != OK) tool_report(&t, help, &e);
    if (tool_close_stdout(&close_error) != OK && rc == OK) {
        rc = close_error.code;
        tool_report(&t, help, &close_error);
    }
    tool_progress_clear();
    return tool_exit_code(rc, tool.signal_number, t.resumable);
}

void tool_wrote(const tool_ctx *t, const char *path, const char *detail)
{
    char size[32] = "", spent[32];
    uint64_t bytes;
    err ignored;
    if (!file_is_dir(path) && file_size(&bytes, path, &ignored) == OK)
        (void)tool_bytes_text(size, sizeof size, bytes);
    tool_meter_time(spent, sizeof spent, tool_seconds());
    job_log(&t->job, LOG_INFO, "wrote '%s'%s%s in %s%s%s", path, *size ? ": " : "", size, spent,
            detail ? ", " : "", detail ? detail : "");
}
