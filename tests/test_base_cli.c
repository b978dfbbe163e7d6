/* base/cli: parsing, messages, help, completion. */
#include "base/cli.h"
#include "support/suite.h"

#include <check.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

static struct {
    bool flag, quiet;
    const char *out, *method;
    cli_list data;
    int64_t samples, bytes, seed;
    double temp;
} v;

static const cli_option options[] = {
    {"output", 'o', CLI_STR, &v.out, "FILE", "the artifact to write", .alias = "work-dir"},
    {"data", 0, CLI_LIST, &v.data, "FILE", "calibration text; may be given several times"},
    {"samples", 0, CLI_I64, &v.samples, "N", "windows [128]", .lo = 1, .hi = 4096,
     .alias = "calib-samples"},
    {"seed", 's', CLI_I64, &v.seed, "N", "any integer [0]"},
    {"temperature", 't', CLI_F64, &v.temp, "T", "it's the sampling temperature [1]", .lo = 0,
     .hi = 2},
    {"method", 'm', CLI_CHOICE, &v.method, "NAME", "how", .choices = "rtn|lmdeploy|awq"},
    {"kv-mem", 0, CLI_BYTES, &v.bytes, "BYTES", "size of the cache"},
    {"flag", 'f', CLI_FLAG, &v.flag, NULL, "do it"},
    {"quiet", 'q', CLI_FLAG, &v.quiet, NULL, "errors only"},
    {"help", 'h', CLI_FLAG, NULL, NULL, "show this help"},
};

static const cli_spec spec = {
    .tool = "test-tool",
    .usage = "MODEL_DIR --data FILE [options]",
    .summary =
        "Does what a test wants, and says so in a sentence that is long enough to be wrapped at "
        "the width of a terminal.",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .min_args = 1,
    .max_args = 2,
    .examples = "  test-tool dir --data a.txt\n",
};

static const char *args[4];
static int n_args;
static bool help, version;
static err error;

/* Splits at spaces: "dir -o x". */
static err_code parse_with(const cli_spec *by, const char *line)
{
    static char buf[512];
    static char *argv[64];
    int argc = 1;
    memset(&v, 0, sizeof v);
    argv[0] = buf;
    (void)snprintf(buf, sizeof buf, "%s", line);
    for (char *s = strtok(buf, " "); s; s = strtok(NULL, " ")) argv[argc++] = s;
    return cli_parse(by, argc, argv, args, 4, &n_args, &help, &version, &error);
}

static err_code parse(const char *line) { return parse_with(&spec, line); }

START_TEST(cli_good)
{
    ck_assert_int_eq(
        parse("dir --output=a --data x --data=y --samples 5 -t0.5 -s -3 -fq --kv-mem 2G"), OK);
    ck_assert_str_eq(args[0], "dir");
    ck_assert_int_eq(n_args, 1);
    ck_assert_str_eq(v.out, "a");
    ck_assert(v.data.n == 2 && !strcmp(v.data.v[1], "y"));
    ck_assert_int_eq(v.samples, 5);
    ck_assert_int_eq(v.seed, -3);
    ck_assert_double_eq(v.temp, 0.5);
    ck_assert(v.flag && v.quiet);
    ck_assert(v.bytes == (int64_t)2 << 30);
    ck_assert_int_eq(parse("--work-dir b --calib-samples=4096 -m awq d1 d2"), OK);
    ck_assert_str_eq(v.out, "b");
    ck_assert_int_eq(v.samples, 4096);
    ck_assert_str_eq(v.method, "awq");
    ck_assert_int_eq(n_args, 2);
    ck_assert_int_eq(parse("-o out -- -dir --flag"), OK);
    ck_assert_str_eq(args[0], "-dir");
    ck_assert_str_eq(args[1], "--flag");
    ck_assert(!v.flag);
    ck_assert_int_eq(parse("- --kv-mem 512k"), OK);
    ck_assert_str_eq(args[0], "-");
    ck_assert_int_eq(v.bytes, 512 << 10);
    ck_assert_int_eq(parse("d --kv-mem 1.5MiB"), OK);
    ck_assert_int_eq(v.bytes, 1572864);
    ck_assert_int_eq(parse("d --seed 9223372036854775807"), OK);
    ck_assert(v.seed == INT64_MAX);
    ck_assert_int_eq(parse("d -f --samples 1 --samples 2"), OK); /* the last one counts */
    ck_assert_int_eq(v.samples, 2);
}
END_TEST

START_TEST(cli_environment_fills)
{
    static char text[][16] = {"PATH=/bin",    "T_SAMPLES=7", "T_WORK_DIR=near", "T_DATA=x y",
                              "T_METHOD=rtn", "T_KV_MEM=1G", "T_TEMPERATURE=",  "T_FLAG=yes",
                              "T_QUIET=0",    "T_HELP=1",    "T_NOPE=1",        "T_=1",
                              "T_SEED",       "SAMPLES=9",   "T_samples=8"};
    char *env[sizeof text / sizeof *text + 1] = {NULL};
    for (size_t i = 0; i < sizeof text / sizeof *text; i++) env[i] = text[i];
    cli_spec s = spec;
    s.env_prefix = "T_";
    s.env = env;
    ck_assert_int_eq(parse_with(&s, "d"), OK);
    ck_assert(v.samples == 7 && v.bytes == 1 << 30 && v.flag && !v.quiet && !help);
    ck_assert_str_eq(v.out, "near");
    ck_assert_str_eq(v.method, "rtn");
    ck_assert(v.data.n == 1 && !strcmp(v.data.v[0], "x y"));
    ck_assert(v.temp == 0 && v.seed == 0); /* nothing said */
    ck_assert_int_eq(parse_with(&s, "d --samples 3 -oa --data p --data q --method=awq -q"), OK);
    ck_assert(v.samples == 3 && v.quiet && v.data.n == 2); /* the command line rules */
    ck_assert_str_eq(v.out, "a");
    ck_assert_str_eq(v.method, "awq");
    ck_assert_int_eq(parse_with(&s, "--help"), OK);
    ck_assert(help);
    static const char *const known[] = {"T_SAMPLES=", "T_CALIB_SAMPLES=1", "T_KV_MEM=x"};
    static const char *const unknown[] = {"T_NOPE=1", "T_HELP=1", "T_=", "SAMPLES=1", "T_KV-MEM=1"};
    for (size_t i = 0; i < 3; i++) ck_assert_msg(cli_env_known(&s, known[i]), "%s", known[i]);
    for (size_t i = 0; i < 5; i++) ck_assert_msg(!cli_env_known(&s, unknown[i]), "%s", unknown[i]);
    static const char *const bad[][2] = {
        {"T_SAMPLES=x", "environment: T_SAMPLES: option '--samples': expected an integer, got 'x'"},
        {"T_FLAG=maybe", "environment: T_FLAG: option '--flag': expected 1 or 0, got 'maybe'"},
        {"T_METHOD=gptq", "environment: T_METHOD: option '--method': expected one of"}};
    for (size_t i = 0; i < 3; i++) {
        char entry[64];
        char *const one[] = {entry, NULL};
        (void)snprintf(entry, sizeof entry, "%s", bad[i][0]);
        s.env = one;
        ck_assert_int_eq(parse_with(&s, "d"), E_USAGE);
        ck_assert_msg(strstr(error.msg, bad[i][1]) != NULL, "%s", error.msg);
        ck_assert_int_eq(parse_with(&s, "--help"), OK);
    }
}
END_TEST

START_TEST(cli_help_and_version)
{
    ck_assert_int_eq(parse("--help"), OK); /* no positionals needed */
    ck_assert(help && !version);
    ck_assert_int_eq(parse("-h"), OK);
    ck_assert(help);
    ck_assert_int_eq(parse("--version"), OK);
    ck_assert(version && !help);
    ck_assert_int_eq(parse("--help=yes"), E_USAGE);
}
END_TEST

START_TEST(cli_bad)
{
    static const char *const bad[][2] = {
        {"", "missing argument"},
        {"a b c", "unexpected argument 'c'"},
        {"d --nope", "unknown option '--nope'"},
        {"d --sample 3", "did you mean '--samples'?"},
        {"d -x", "unknown option '-x'"},
        {"d -fx", "unknown option '-x'"},
        {"d --output", "'--output' needs a value (FILE)"},
        {"d -o", "'--output' needs a value (FILE)"},
        {"d --flag=1", "'--flag' takes no value"},
        {"d --samples 0", "'--samples': expected 1 to 4096, got '0'"},
        {"d --samples 4097", "expected 1 to 4096"},
        {"d --samples 1x", "expected an integer, got '1x'"},
        {"d --samples=", "expected an integer, got ''"},
        {"d --samples 1.0", "expected an integer"},
        {"d --samples 99999999999999999999", "expected 1 to 4096"},
        {"d --seed 99999999999999999999", "got '99999999999999999999'"},
        {"d -t nan", "expected a number"},
        {"d -t inf", "expected a number"},
        {"d -t 2.01", "expected 0 to 2"},
        {"d -t 1e", "expected a number"},
        {"d -m aw", "expected one of rtn|lmdeploy|awq, got 'aw'"},
        {"d -m rtn|lmdeploy", "expected one of"},
        {"d -m=", "expected one of"},
        {"d --kv-mem 3T", "expected bytes"},
        {"d --kv-mem -1", "expected bytes"},
        {"d --kv-mem G", "expected bytes"},
        {"d --kv-mem 1GG", "expected bytes"},
        {"d --kv-mem 1e30G", "expected bytes"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        ck_assert_msg(parse(bad[i][0]) == E_USAGE, "accepted: %s", bad[i][0]);
        ck_assert_msg(strstr(error.msg, bad[i][1]) != NULL, "%s: %s", bad[i][0], error.msg);
    }
}
END_TEST

START_TEST(cli_list_overflow)
{
    static char tool[] = "t", dir[] = "dir", data[] = "--data", file[] = "f";
    char *argv[2 + 2 * 65];
    int argc = 0;
    memset(&v, 0, sizeof v);
    argv[argc++] = tool;
    argv[argc++] = dir;
    for (int i = 0; i < 65; i++) {
        argv[argc++] = data;
        argv[argc++] = file;
    }
    ck_assert_int_eq(cli_parse(&spec, argc, argv, args, 4, &n_args, &help, &version, &error),
                     E_USAGE);
    ck_assert_ptr_nonnull(strstr(error.msg, "more than 64 times"));
}
END_TEST

START_TEST(cli_help_text)
{
    char *text;
    size_t n;
    FILE *f = open_memstream(&text, &n);
    cli_help(&spec, f);
    (void)fclose(f);
    for (const char *s = text; *s; s += strcspn(s, "\n") + 1)
        ck_assert_uint_le(strcspn(s, "\n"), 100);
    for (int i = 0; i < spec.n_options; i++) {
        char name[64];
        (void)snprintf(name, sizeof name, "--%s", options[i].name);
        ck_assert_msg(strstr(text, name) != NULL, "%s", name);
    }
    ck_assert_ptr_nonnull(strstr(text, "usage: test-tool MODEL_DIR"));
    ck_assert_ptr_nonnull(strstr(text, "also --work-dir"));
    ck_assert_ptr_nonnull(strstr(text, "rtn|lmdeploy|awq"));
    ck_assert_ptr_nonnull(strstr(text, "examples:\n  test-tool dir"));
    free(text);
}
END_TEST

/* Writes the script to a file and lets the shell itself say whether it parses. */
static void check_syntax(const char *shell, bool commands)
{
    char command[256], path[] = "/tmp/tmforge-completion-XXXXXX";
    const cli_command cmd[] = {{"run", &spec}, {"show", &spec}};
    const int fd = mkstemp(path);
    ck_assert_int_ge(fd, 0);
    FILE *f = fdopen(fd, "w");
    if (commands)
        cli_completion_commands(&spec, cmd, 2, shell, f);
    else
        cli_completion(&spec, shell, f);
    ck_assert_int_eq(fclose(f), 0);
    (void)snprintf(command, sizeof command, "command -v %s >/dev/null || exit 9; %s -n %s", shell,
                   shell, path);
    const int status = system(command);
    (void)unlink(path);
    if (WIFEXITED(status) && WEXITSTATUS(status) == 9)
        printf("SKIP completion syntax: no %s\n", shell);
    else
        ck_assert_msg(status == 0, "%s refuses its completion script", shell);
}

START_TEST(cli_completion_syntax)
{
    static const char *const shells[] = {"bash", "zsh", "fish"};
    for (int i = 0; i < 3; i++) {
        check_syntax(shells[i], false);
        check_syntax(shells[i], true);
    }
}
END_TEST

/* What bash offers behind "test-tool WORDS": evaluated by bash itself. */
static void check_bash(bool commands, const char *words, int at, const char *want)
{
    char *script, line[1024], got[1024] = "";
    size_t n;
    const cli_command cmd[] = {{"run", &spec}, {"show", &spec}};
    FILE *f = open_memstream(&script, &n);
    cli_completion_commands(&spec, cmd, commands ? 2 : 0, "bash", f);
    (void)fprintf(
        f, "COMP_WORDS=(test-tool %s); COMP_CWORD=%d; _test_tool; echo \"${COMPREPLY[*]}\"\n",
        words, at);
    (void)fclose(f);
    ck_assert_int_eq(setenv("SCRIPT", script, 1), 0);
    (void)snprintf(line, sizeof line, "bash -c \"$SCRIPT\"");
    FILE *p = popen(line, "r");
    ck_assert(p && fgets(got, sizeof got, p));
    ck_assert_int_eq(pclose(p), 0);
    got[strcspn(got, "\n")] = '\0';
    ck_assert_str_eq(got, want);
    free(script);
}

START_TEST(cli_completion_bash)
{
    check_bash(false, "--sa", 1, "--samples");
    check_bash(false, "dir --method ''", 3, "rtn lmdeploy awq");
    check_bash(false, "dir -m l", 3, "lmdeploy");
    check_bash(true, "s", 1, "show");
    check_bash(true, "show --te", 2, "--temperature");
    check_bash(true, "run x --method a", 4, "awq");
}
END_TEST

int main(void)
{
    Suite *s = suite_create("base cli");
    TCase *t = tcase_create("all");
    tcase_set_timeout(t, 60);
    tcase_add_test(t, cli_good);
    tcase_add_test(t, cli_environment_fills);
    tcase_add_test(t, cli_help_and_version);
    tcase_add_test(t, cli_bad);
    tcase_add_test(t, cli_list_overflow);
    tcase_add_test(t, cli_help_text);
    tcase_add_test(t, cli_completion_syntax);
    tcase_add_test(t, cli_completion_bash);
    suite_add_tcase(s, t);
    return suite_run(s);
}
