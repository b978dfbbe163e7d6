/* Option tables: the parser. Help and completion are in cli_text.c. */
#include "base/cli.h"

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#define CLI_MAX_SEEN 128 /* later options have no environment variable */

/* What the parser knows besides the table. */
typedef struct {
    const cli_spec *s;
    int argc, at;
    char **argv;
    bool *want_help, *want_version;
    err *e;
    bool seen[CLI_MAX_SEEN]; /* on the command line */
} cli_state;

static bool cli_name_is(const char *name, const char *arg, size_t n)
{
    return name && strlen(name) == n && strncmp(name, arg, n) == 0;
}

static const cli_option *cli_find(const cli_spec *s, const char *name, size_t n)
{
    for (int i = 0; i < s->n_options; i++)
        if (cli_name_is(s->options[i].name, name, n) || cli_name_is(s->options[i].alias, name, n))
            return &s->options[i];
    return NULL;
}

/* Edits between two short names, for "did you mean"; insertion, deletion and substitution cost
 * one. */
static int cli_distance(const char *a, size_t na, const char *b)
{
    int row[64];
    const size_t nb = strlen(b);
    if (na >= 64 || nb >= 64) return 64;
    for (size_t j = 0; j <= nb; j++) row[j] = (int)j;
    for (size_t i = 1; i <= na; i++) {
        int diagonal = row[0];
        row[0] = (int)i;
        for (size_t j = 1; j <= nb; j++) {
            const int keep = diagonal + (a[i - 1] != b[j - 1]);
            diagonal = row[j];
            int best = row[j] < row[j - 1] ? row[j] + 1 : row[j - 1] + 1;
            row[j] = keep < best ? keep : best;
        }
    }
    return row[nb];
}

static err_code cli_unknown(const cli_state *c, const char *name, size_t n)
{
    const char *near = NULL;
    int best = 3;
    for (int i = 0; i < c->s->n_options; i++) {
        const int d = cli_distance(name, n, c->s->options[i].name);
        if (d < best) {
            best = d;
            near = c->s->options[i].name;
        }
    }
    if (near)
        return err_set(c->e, E_USAGE, "unknown option '--%.*s' (did you mean '--%s'?)", (int)n,
                       name, near);
    return err_set(c->e, E_USAGE, "unknown option '--%.*s'", (int)n, name);
}

static err_code cli_i64(const cli_option *o, const char *v, err *e)
{
    char *end;
    errno = 0;
    const long long n = strtoll(v, &end, 10);
    if (end == v || *end || *v == ' ')
        return err_set(e, E_USAGE, "option '--%s': expected an integer, got '%s'", o->name, v);
    /* lo == hi: no bounds. long double keeps every int64 apart. */
    const bool bounded = o->lo != o->hi;
    if (errno == ERANGE ||
        (bounded && ((long double)n < (long double)o->lo || (long double)n > (long double)o->hi)))
        return err_set(e, E_USAGE, "option '--%s': expected %.0f to %.0f, got '%s'", o->name,
                       bounded ? o->lo : (double)INT64_MIN, bounded ? o->hi : (double)INT64_MAX, v);
    *(int64_t *)o->target = n;
    return OK;
}

static err_code cli_f64(const cli_option *o, const char *v, err *e)
{
    char *end;
    const double d = strtod(v, &end);
    if (end == v || *end || *v == ' ' || !isfinite(d))
        return err_set(e, E_USAGE, "option '--%s': expected a number, got '%s'", o->name, v);
    if (o->lo != o->hi && (d < o->lo || d > o->hi))
        return err_set(e, E_USAGE, "option '--%s': expected %g to %g, got '%s'", o->name, o->lo,
                       o->hi, v);
    *(double *)o->target = d;
    return OK;
}

static err_code cli_bytes(const cli_option *o, const char *v, err *e)
{
    char *end;
    const double d = strtod(v, &end);
    double unit = 1;
    if (end != v && *end) {
        const char c = (char)(*end | 32);
        unit = c == 'k' ? 1024.0 : c == 'm' ? 1048576.0 : c == 'g' ? 1073741824.0 : 0;
        end++;
        if (unit > 0 && (strcmp(end, "iB") == 0 || strcmp(end, "B") == 0)) end += strlen(end);
    }
    if (end == v || *end || unit == 0 || !(d >= 0) || d * unit > 0x1p62)
        return err_set(e, E_USAGE, "option '--%s': expected bytes such as 512M or 3G, got '%s'",
                       o->name, v);
    *(int64_t *)o->target = (int64_t)(d * unit);
    return OK;
}

static err_code cli_choice(const cli_option *o, const char *v, err *e)
{
    const size_t n = strlen(v);
    for (const char *s = o->choices;; s++) {
        const size_t len = strcspn(s, "|");
        if (len == n && strncmp(s, v, n) == 0) {
            *(const char **)o->target = v;
            return OK;
        }
        s += len;
        if (!*s) break;
    }
    return err_set(e, E_USAGE, "option '--%s': expected one of %s, got '%s'", o->name, o->choices,
                   v);
}

/* Where --help and --version go; NULL for any other name. */
static bool *cli_special(const cli_state *c, const char *name, size_t n)
{
    if (cli_name_is("help", name, n)) return c->want_help;
    return cli_name_is("version", name, n) ? c->want_version : NULL;
}

static void cli_see(cli_state *c, const cli_option *o)
{
    const ptrdiff_t i = o - c->s->options;
    if (i < CLI_MAX_SEEN) c->seen[i] = true;
}

static err_code cli_store(const cli_option *o, const char *v, err *e)
{
    cli_list *l;
    switch (o->kind) {
    case CLI_FLAG: *(bool *)o->target = true; return OK;
    case CLI_STR: *(const char **)o->target = v; return OK;
    case CLI_I64: return cli_i64(o, v, e);
    case CLI_F64: return cli_f64(o, v, e);
    case CLI_BYTES: return cli_bytes(o, v, e);
    case CLI_CHOICE: return cli_choice(o, v, e);
    case CLI_LIST: break;
    }
    l = o->target;
    if (l->n == (int)(sizeof l->v / sizeof l->v[0]))
        return err_set(e, E_USAGE, "option '--%s': given more than %d times", o->name, l->n);
    l->v[l->n++] = v;
    return OK;
}

/* The argument behind an option that stands alone. */
static err_code cli_value(cli_state *c, const cli_option *o, const char **v)
{
    if (c->at + 1 >= c->argc)
        return err_set(c->e, E_USAGE, "option '--%s' needs a value (%s)", o->name,
                       o->arg ? o->arg : "VALUE");
    *v = c->argv[++c->at];
    return OK;
}

static err_code cli_long(cli_state *c, const char *name)
{
    const size_t n = strcspn(name, "=");
    const char *v = name[n] ? name + n + 1 : NULL;
    const cli_option *o = cli_find(c->s, name, n);
    bool *special = cli_special(c, name, n);
    if (!o && !special) return cli_unknown(c, name, n);
    if (v && (special || o->kind == CLI_FLAG))
        return err_set(c->e, E_USAGE, "option '--%.*s' takes no value", (int)n, name);
    if (special) {
        *special = true;
        return OK;
    }
    if (!v && o->kind != CLI_FLAG) TRY(cli_value(c, o, &v));
    cli_see(c, o);
    return cli_store(o, v, c->e);
}

/* "-qv", "-o FILE", "-oFILE". */
static err_code cli_short(cli_state *c, const char *letters)
{
    for (const char *l = letters; *l; l++) {
        const cli_option *o = NULL;
        for (int i = 0; i < c->s->n_options && !o; i++)
            if (c->s->options[i].letter == *l) o = &c->s->options[i];
        bool *special = o ? cli_special(c, o->name, strlen(o->name)) : NULL;
        if (special) {
            *special = true;
            continue;
        }
        if (!o) return err_set(c->e, E_USAGE, "unknown option '-%c'", *l);
        cli_see(c, o);
        if (o->kind == CLI_FLAG) {
            TRY(cli_store(o, NULL, c->e));
            continue;
        }
        const char *v = l[1] ? l + 1 : NULL;
        if (!v) TRY(cli_value(c, o, &v));
        return cli_store(o, v, c->e);
    }
    return OK;
}

/* ---- environment ---- */

static bool cli_env_is(const char *name, const char *env, size_t n)
{
    if (!name || strlen(name) != n) return false;
    for (size_t i = 0; i < n; i++)
        if (env[i] != (name[i] == '-' ? '_' : toupper((unsigned char)name[i]))) return false;
    return true;
}

/* The option of "PREFIX_NAME=...", NULL when there is none. --help, --version and the like are
 * asked for, not set. */
static const cli_option *cli_env_option(const cli_spec *s, const char *entry)
{
    const size_t skip = strlen(s->env_prefix), n = strcspn(entry, "=");
    if (strncmp(entry, s->env_prefix, skip) != 0 || n <= skip) return NULL;
    for (int i = 0; i < s->n_options && i < CLI_MAX_SEEN; i++) {
        const cli_option *o = &s->options[i];
        if (o->target && (cli_env_is(o->name, entry + skip, n - skip) ||
                          cli_env_is(o->alias, entry + skip, n - skip)))
            return o;
    }
    return NULL;
}

bool cli_env_known(const cli_spec *s, const char *entry)
{
    return cli_env_option(s, entry) != NULL;
}

static err_code cli_env_flag(const cli_option *o, const char *v, err *e)
{
    static const char *const words[] = {"0", "1", "no", "yes", "false", "true", "off", "on"};
    for (size_t i = 0; i < sizeof words / sizeof words[0]; i++)
        if (strcmp(v, words[i]) == 0) {
            *(bool *)o->target = i & 1;
            return OK;
        }
    return err_set(e, E_USAGE, "option '--%s': expected 1 or 0, got '%s'", o->name, v);
}

/* A variable without a value says nothing. */
static err_code cli_environment(const cli_state *c)
{
    const cli_spec *s = c->s;
    for (char *const *p = s->env; s->env_prefix && p && *p; p++) {
        const cli_option *o = cli_env_option(s, *p);
        const char *v = strchr(*p, '=');
        if (!o || !v || !v[1] || c->seen[o - s->options]) continue;
        const err_code rc = o->kind == CLI_FLAG ? cli_env_flag(o, v + 1, c->e)
                                                : cli_store(o, v + 1, c->e);
        if (rc != OK) return err_wrap(c->e, "environment: %.*s", (int)(v - *p), *p);
    }
    return OK;
}

err_code cli_parse(const cli_spec *s, int argc, char **argv, const char **args, int cap,
                   int *n_args, bool *want_help, bool *want_version, err *e)
{
    cli_state c = {s, argc, 1, argv, want_help, want_version, e, {false}};
    bool options = true;
    *n_args = 0;
    *want_help = *want_version = false;
    for (; c.at < argc; c.at++) {
        const char *a = argv[c.at];
        if (options && strcmp(a, "--") == 0) {
            options = false;
        } else if (options && a[0] == '-' && a[1] == '-') {
            TRY(cli_long(&c, a + 2));
        } else if (options && a[0] == '-' && a[1]) {
            TRY(cli_short(&c, a + 1));
        } else {
            if (*n_args >= s->max_args || *n_args >= cap)
                return err_set(e, E_USAGE, "unexpected argument '%s'", a);
            args[(*n_args)++] = a;
        }
    }
    if (!*want_help && !*want_version) TRY(cli_environment(&c));
    if (*n_args < s->min_args && !*want_help && !*want_version)
        return err_set(e, E_USAGE, "missing argument: usage is %s %s", s->tool, s->usage);
    return OK;
}
