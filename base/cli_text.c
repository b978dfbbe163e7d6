/* Option tables: what users read and what their shells complete. */
#include <stdlib.h>
#include <string.h>

#include "base/cli.h"

#define HELP_COLUMNS 100
#define HELP_INDENT  30

/* "  -o, --output FILE" */
static int cli_left(char *buf, size_t cap, const cli_option *o)
{
    char letter[8] = "    ";
    if (o->letter) (void)snprintf(letter, sizeof letter, "-%c, ", o->letter);
    return snprintf(buf, cap, "  %s--%s%s%s", letter, o->name, o->arg ? " " : "",
                    o->arg ? o->arg : "");
}

/* Words of `text` from column `at` on, wrapped at HELP_COLUMNS, later lines indented. */
static void cli_wrap(FILE *out, const char *text, int at, int indent)
{
    bool first = true;
    while (*text) {
        const int len = (int)strcspn(text, " ");
        if (!first && at + 1 + len > HELP_COLUMNS) {
            (void)fprintf(out, "\n%*s", indent, "");
            at = indent;
            first = true;
        }
        (void)fprintf(out, "%s%.*s", first ? "" : " ", len, text);
        at += len + !first;
        first = false;
        text += len;
        text += strspn(text, " ");
    }
    (void)fputc('\n', out);
}

static void cli_help_option(const cli_option *o, FILE *out)
{
    char left[128], help[1024];
    const char *alias_open = o->alias ? "; also --" : "", *alias = o->alias ? o->alias : "";
    const int n = cli_left(left, sizeof left, o);
    if (o->kind == CLI_CHOICE)
        (void)snprintf(help, sizeof help, "%s: %s%s%s", o->help, o->choices, alias_open, alias);
    else
        (void)snprintf(help, sizeof help, "%s%s%s", o->help, alias_open, alias);
    (void)fputs(left, out);
    if (n + 2 > HELP_INDENT)
        (void)fprintf(out, "\n%*s", HELP_INDENT, "");
    else
        (void)fprintf(out, "%*s", HELP_INDENT - n, "");
    cli_wrap(out, help, HELP_INDENT, HELP_INDENT);
}

void cli_help(const cli_spec *s, FILE *out)
{
    (void)fprintf(out, "usage: %s ", s->tool);
    cli_wrap(out, s->usage, (int)strlen(s->tool) + 8, 7);
    cli_wrap(out, s->summary, 0, 0);
    (void)fputs("\noptions:\n", out);
    for (int i = 0; i < s->n_options; i++) cli_help_option(&s->options[i], out);
    if (s->env_prefix)
        (void)fprintf(out,
                      "\nEach option has an environment variable, %sNAME in capitals with _ for -; "
                      "the option wins.\n",
                      s->env_prefix);
    if (s->examples)
        (void)fprintf(out, "\nexamples:\n%s%s", s->examples,
                      *s->examples && s->examples[strlen(s->examples) - 1] == '\n' ? "" : "\n");
}

/* "awq-search" -> "awq_search": a name that is a function in every shell. */
static void cli_ident(char *buf, size_t cap, const char *tool)
{
    (void)snprintf(buf, cap, "%s", tool);
    for (char *s = buf; *s; s++)
        if (*s == '-' || *s == ' ') *s = '_';
}

/* Text inside single quotes of a shell script. */
static void cli_quoted(FILE *out, const char *s, const char *also)
{
    for (; *s; s++) {
        if (*s == '\'')
            (void)fputs("'\\''", out);
        else if (strchr(also, *s))
            (void)fprintf(out, "\\%c", *s);
        else
            (void)fputc(*s, out);
    }
}

static bool cli_takes_path(const cli_option *o)
{
    return (o->kind == CLI_STR || o->kind == CLI_LIST) && o->arg &&
           (strstr(o->arg, "FILE") || strstr(o->arg, "DIR") || strstr(o->arg, "PATH"));
}

/* "a|b|c" with another separator. */
static void cli_choices(FILE *out, const char *choices, char sep)
{
    for (; *choices; choices++) (void)fputc(*choices == '|' ? sep : *choices, out);
}

static void cli_bash_option(const cli_option *o, FILE *out)
{
    if (o->kind == CLI_FLAG) return;
    (void)fprintf(out, "            --%s", o->name);
    if (o->alias) (void)fprintf(out, "|--%s", o->alias);
    if (o->letter) (void)fprintf(out, "|-%c", o->letter);
    (void)fputs(") ", out);
    if (o->kind == CLI_CHOICE) {
        (void)fputs("words='", out);
        cli_choices(out, o->choices, ' ');
        (void)fputs("' ;;\n", out);
    } else {
        (void)fprintf(out, "%s ;;\n", cli_takes_path(o) ? "files=1" : "return");
    }
}

static void cli_bash_words(const cli_spec *s, FILE *out)
{
    for (int i = 0; i < s->n_options; i++)
        (void)fprintf(out, "%s--%s", i ? " " : "", s->options[i].name);
}

/* One arm of the case over subcommands; `name` NULL for a tool without any. */
static void cli_bash_arm(const cli_spec *s, const char *name, FILE *out)
{
    (void)fprintf(out, "    %s)\n        case \"$prev\" in\n", name ? name : "*");
    for (int i = 0; i < s->n_options; i++) cli_bash_option(&s->options[i], out);
    (void)fputs("            *) case \"$cur\" in -*) words='", out);
    cli_bash_words(s, out);
    (void)fputs("' ;; *) files=1 ;; esac ;;\n        esac ;;\n", out);
}

static void cli_bash(const cli_spec *s, const cli_command *cmd, int n, FILE *out)
{
    char id[64];
    cli_ident(id, sizeof id, s->tool);
    (void)fprintf(out,
                  "# bash completion for %s\n"
                  "_%s() {\n"
                  "    local cur=\"${COMP_WORDS[COMP_CWORD]}\" "
                  "prev=\"${COMP_WORDS[COMP_CWORD-1]}\" words='' files=''\n",
                  s->tool, id);
    (void)fputs("    case \"${COMP_WORDS[1]}\" in\n", out);
    for (int i = 0; i < n; i++) cli_bash_arm(cmd[i].spec, cmd[i].name, out);
    if (n) {
        (void)fputs("    *) words='--help --version --completion", out);
        for (int i = 0; i < n; i++) (void)fprintf(out, " %s", cmd[i].name);
        (void)fputs("' ;;\n", out);
    } else {
        cli_bash_arm(s, NULL, out);
    }
    /* A subcommand being typed is not yet one: complete its name. */
    if (n) {
        (void)fputs("    esac\n    if [ \"$COMP_CWORD\" -eq 1 ]; then files=''; words='--help "
                    "--version --completion",
                    out);
        for (int i = 0; i < n; i++) (void)fprintf(out, " %s", cmd[i].name);
        (void)fputs("'; fi\n", out);
    } else {
        (void)fputs("    esac\n", out);
    }
    (void)fprintf(out,
                  "    if [ -n \"$files\" ]; then\n"
                  "        mapfile -t COMPREPLY < <(compgen -f -- \"$cur\"); compopt -o filenames "
                  "2>/dev/null\n"
                  "    else\n"
                  "        mapfile -t COMPREPLY < <(compgen -W \"$words\" -- \"$cur\")\n"
                  "    fi\n"
                  "}\n"
                  "complete -F _%s %s\n",
                  id, s->tool);
}

static void cli_zsh_option(const cli_option *o, FILE *out)
{
    (void)fprintf(out, " \\\n        '%s--%s%s[", o->kind == CLI_LIST ? "*" : "", o->name,
                  o->kind == CLI_FLAG ? "" : "=");
    cli_quoted(out, o->help, "[]:");
    (void)fputc(']', out);
    if (o->kind == CLI_CHOICE) {
        (void)fputs(":value:(", out);
        cli_choices(out, o->choices, ' ');
        (void)fputc(')', out);
    } else if (o->kind != CLI_FLAG) {
        (void)fprintf(out, ":%s:%s", o->arg ? o->arg : "value", cli_takes_path(o) ? "_files" : "");
    }
    (void)fputc('\'', out);
}

static void cli_zsh_arm(const cli_spec *s, FILE *out)
{
    (void)fputs("    _arguments -s", out);
    for (int i = 0; i < s->n_options; i++) cli_zsh_option(&s->options[i], out);
    (void)fputs(" \\\n        '*:path:_files'\n", out);
}

static void cli_zsh(const cli_spec *s, const cli_command *cmd, int n, FILE *out)
{
    (void)fprintf(out, "#compdef %s\n", s->tool);
    if (n == 0) {
        cli_zsh_arm(s, out);
        return;
    }
    (void)fputs("if (( CURRENT == 2 )); then\n    _values 'command'", out);
    for (int i = 0; i < n; i++) {
        (void)fprintf(out, " '%s[", cmd[i].name);
        cli_quoted(out, cmd[i].spec->summary, "[]:");
        (void)fputs("]'", out);
    }
    (void)fputs("\n    return\nfi\nlocal command=$words[2]\nshift words; (( CURRENT-- ))\ncase "
                "$command in\n",
                out);
    for (int i = 0; i < n; i++) {
        (void)fprintf(out, "%s)\n", cmd[i].name);
        cli_zsh_arm(cmd[i].spec, out);
        (void)fputs("    ;;\n", out);
    }
    (void)fputs("esac\n", out);
}

static void cli_fish_options(const cli_spec *s, const char *tool, const char *name, FILE *out)
{
    for (int i = 0; i < s->n_options; i++) {
        const cli_option *o = &s->options[i];
        (void)fprintf(out, "complete -c %s", tool);
        if (name) (void)fprintf(out, " -n '__fish_seen_subcommand_from %s'", name);
        (void)fprintf(out, " -l %s", o->name);
        if (o->letter) (void)fprintf(out, " -s %c", o->letter);
        if (o->kind == CLI_CHOICE) {
            (void)fputs(" -x -a '", out);
            cli_choices(out, o->choices, ' ');
            (void)fputc('\'', out);
        } else if (o->kind != CLI_FLAG) {
            (void)fputs(cli_takes_path(o) ? " -r" : " -x", out);
        }
        (void)fputs(" -d '", out);
        for (const char *h = o->help; *h; h++)
            (void)fprintf(out, *h == '\'' || *h == '\\' ? "\\%c" : "%c", *h);
        (void)fputs("'\n", out);
    }
}

static void cli_fish(const cli_spec *s, const cli_command *cmd, int n, FILE *out)
{
    (void)fprintf(out, "# fish completion for %s\n", s->tool);
    if (n == 0) cli_fish_options(s, s->tool, NULL, out);
    for (int i = 0; i < n; i++) {
        (void)fprintf(out, "complete -c %s -f -n __fish_use_subcommand -a %s -d '", s->tool,
                      cmd[i].name);
        for (const char *h = cmd[i].spec->summary; *h; h++)
            (void)fprintf(out, *h == '\'' || *h == '\\' ? "\\%c" : "%c", *h);
        (void)fputs("'\n", out);
        cli_fish_options(cmd[i].spec, s->tool, cmd[i].name, out);
    }
}

void cli_completion_commands(const cli_spec *s, const cli_command *cmd, int n, const char *shell,
                             FILE *out)
{
    if (strcmp(shell, "zsh") == 0)
        cli_zsh(s, cmd, n, out);
    else if (strcmp(shell, "fish") == 0)
        cli_fish(s, cmd, n, out);
    else
        cli_bash(s, cmd, n, out);
}

void cli_completion(const cli_spec *s, const char *shell, FILE *out)
{
    cli_completion_commands(s, NULL, 0, shell, out);
}

/* scdoc text: '*', '_' and '\' mean something inside words too. */
static void cli_man_text(FILE *out, const char *s)
{
    for (; *s; s++) {
        if (strchr("*_\\`", *s)) (void)fputc('\\', out);
        (void)fputc(*s, out);
    }
}

static void cli_man_option(const cli_option *o, FILE *out)
{
    if (o->letter) (void)fprintf(out, "*-%c*, ", o->letter);
    (void)fprintf(out, "*--%s*", o->name);
    if (o->arg) (void)fprintf(out, " _%s_", o->arg);
    if (o->alias) (void)fprintf(out, ", *--%s*", o->alias);
    (void)fputs("\n\t", out);
    cli_man_text(out, o->help);
    if (o->kind == CLI_CHOICE) {
        (void)fputs(": one of ", out);
        for (const char *c = o->choices; *c; c++) {
            if (*c == '|')
                (void)fputs(", ", out);
            else
                cli_man_text(out, (char[]){*c, '\0'});
        }
    }
    (void)fputs("\n\n", out);
}

/* An option that every command has is told once, behind the commands. */
static bool cli_man_common(const cli_option *o, const cli_command *cmd, int n)
{
    for (int i = 0; i < n; i++) {
        bool there = false;
        for (int k = 0; k < cmd[i].spec->n_options && !there; k++)
            there = strcmp(cmd[i].spec->options[k].name, o->name) == 0 &&
                    strcmp(cmd[i].spec->options[k].help, o->help) == 0;
        if (!there) return false;
    }
    return n > 0;
}

static void cli_man_examples(const cli_spec *s, FILE *out)
{
    if (!s->examples || !*s->examples) return;
    (void)fprintf(out, "Examples:\n\n```\n%s%s```\n\n", s->examples,
                  s->examples[strlen(s->examples) - 1] == '\n' ? "" : "\n");
}

void cli_man(const cli_spec *s, const cli_command *cmd, int n, FILE *out)
{
    (void)fputs(n ? "# COMMANDS\n\n" : "# OPTIONS\n\n", out);
    for (int i = 0; i < n; i++) {
        const cli_spec *c = cmd[i].spec;
        (void)fprintf(out, "## %s %s ", s->tool, cmd[i].name);
        cli_man_text(out, c->usage);
        (void)fputs("\n\n", out);
        cli_man_text(out, c->summary);
        (void)fputs("\n\n", out);
        for (int k = 0; k < c->n_options; k++)
            if (!cli_man_common(&c->options[k], cmd, n)) cli_man_option(&c->options[k], out);
        cli_man_examples(c, out);
    }
    if (n) (void)fputs("# OPTIONS OF EVERY COMMAND\n\n", out);
    for (int k = 0; k < s->n_options; k++)
        if (n == 0 || cli_man_common(&s->options[k], cmd, n)) cli_man_option(&s->options[k], out);
    if (n == 0) cli_man_examples(s, out);
}
