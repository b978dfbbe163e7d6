/* Option tables: parse, check, help, man and completion from one place. Long options as --name
 * VALUE or --name=VALUE; "--" ends options. */
#ifndef TMF_BASE_CLI_H
#define TMF_BASE_CLI_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

#include "base/err.h"

typedef enum {
    CLI_FLAG,   /* bool *  */
    CLI_STR,    /* const char ** (borrowed from argv) */
    CLI_LIST,   /* cli_list *: repeatable */
    CLI_I64,    /* int64_t *, within [lo,hi] */
    CLI_F64,    /* double *, within [lo,hi] */
    CLI_CHOICE, /* const char **: one of `choices`, separated by '|' */
    CLI_BYTES   /* int64_t *: a number with optional K, M, G (powers of 1024) */
} cli_kind;

typedef struct {
    const char *v[64];
    int n;
} cli_list;

typedef struct {
    const char *name; /* without "--" */
    char letter;      /* short form, 0 none */
    cli_kind kind;
    void *target;
    const char *arg;     /* shown in help: FILE, N, ... ; NULL for flags */
    const char *help;    /* one line, lower case, no full stop; the default in brackets */
    double lo, hi;       /* CLI_I64, CLI_F64: the range; equal means any value */
    const char *choices; /* CLI_CHOICE */
    const char *alias;   /* another accepted long name (LMDeploy's), NULL none */
} cli_option;

typedef struct {
    const char *tool;    /* "awq-search" */
    const char *usage;   /* "MODEL_DIR --calib CALIB -o PLAN [options]" */
    const char *summary; /* one sentence */
    const cli_option *options;
    int n_options;
    int min_args, max_args; /* positionals */
    const char *examples;   /* lines, or NULL */
    /* "TM_RUN_": what the command line does not say is taken from `env` (as environ), where the
     * option's name is in capitals with '_' for '-'. NULL: nothing is. */
    const char *env_prefix;
    char *const *env;
} cli_spec;

/* Fills targets and the positionals (args, at most cap; *n_args counts). E_USAGE with one line
 * naming the option (or the variable). --help and --version are the caller's: the parser sets
 * *want_help / *want_version; rows of those names (target NULL) are for the help text and
 * completion. */
err_code cli_parse(const cli_spec *s, int argc, char **argv, const char **args, int cap,
                   int *n_args, bool *want_help, bool *want_version, err *e);
/* entry: "NAME=value" of an environment. NAME stands for one of the options. */
bool cli_env_known(const cli_spec *s, const char *entry);
void cli_help(const cli_spec *s, FILE *out);                          /* at most 100 columns */
void cli_completion(const cli_spec *s, const char *shell, FILE *out); /* bash, zsh or fish */

/* The same for a tool of subcommands ("tm-run chat ..."); s->tool is the tool, its options are not
 * used. */
typedef struct {
    const char *name;
    const cli_spec *spec;
} cli_command;
/* Options (and commands, n > 0) as a part of a man page in scdoc's language. */
void cli_man(const cli_spec *s, const cli_command *cmd, int n, FILE *out);
void cli_completion_commands(const cli_spec *s, const cli_command *cmd, int n, const char *shell,
                             FILE *out);

#endif
