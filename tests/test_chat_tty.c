/* tm-run chat on a pseudo terminal: typing, commands, Ctrl-C, paste, history. The bundled model
 * answers; it is greedy, so its words are known (datasets/demo/golden.json). */
#include "support/suite.h"
#include <check.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define WAIT_S 60 /* sanitizers on a busy machine */

static char state_dir[64];
static int master = -1;
static pid_t child;
static char seen[1 << 20]; /* everything the terminal showed */
static size_t n_seen, looked;

static void setup(void)
{
    (void)snprintf(state_dir, sizeof state_dir, "/tmp/tmforge-tty-XXXXXX");
    ck_assert_ptr_nonnull(mkdtemp(state_dir));
    n_seen = looked = 0;
}

static void teardown(void)
{
    char line[128];
    if (master >= 0) close(master);
    master = -1;
    (void)snprintf(line, sizeof line, "rm -rf %s", state_dir);
    ck_assert_int_eq(system(line), 0);
}

static void in_child(int slave, char *const *argv)
{
    (void)setsid();
    (void)ioctl(slave, TIOCSCTTY, 0);
    for (int fd = 0; fd < 3; fd++) (void)dup2(slave, fd);
    (void)setenv("XDG_STATE_HOME", state_dir, 1);
    (void)setenv("TERM", "xterm", 1);
    (void)setenv("LC_ALL", "C.UTF-8", 1);
    (void)unsetenv("NO_HISTORY");
    (void)execv(TM_RUN, argv);
    _exit(99);
}

/* Starts tm-run chat MODEL -t 0 with further arguments (NULL-ended). */
static void start(const char *arg, ...)
{
    char *argv[24] = {(char *)(uintptr_t) "tm-run", (char *)(uintptr_t) "chat",
                      (char *)(uintptr_t)(TMF_SOURCE_DIR "/datasets/demo"),
                      (char *)(uintptr_t) "-t", (char *)(uintptr_t) "0"};
    int n = 5;
    va_list args;
    va_start(args, arg);
    for (const char *a = arg; a; a = va_arg(args, const char *)) argv[n++] = (char *)(uintptr_t)a;
    va_end(args);
    const struct winsize size = {24, 100, 0, 0};
    master = posix_openpt(O_RDWR | O_NOCTTY);
    ck_assert_int_ge(master, 0);
    ck_assert_int_eq(grantpt(master), 0);
    ck_assert_int_eq(unlockpt(master), 0);
    const int slave = open(ptsname(master), O_RDWR | O_NOCTTY);
    ck_assert_int_ge(slave, 0);
    (void)ioctl(slave, TIOCSWINSZ, &size);
    child = fork();
    if (child == 0) in_child(slave, argv);
    ck_assert_int_gt(child, 0);
    close(slave);
}

static double now_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static bool read_some(int ms)
{
    struct pollfd p = {.fd = master, .events = POLLIN};
    if (poll(&p, 1, ms) != 1) return true;
    const ssize_t n = read(master, seen + n_seen, sizeof seen - n_seen - 1);
    if (n <= 0) return false; /* the other side is closed */
    n_seen += (size_t)n;
    seen[n_seen] = 0;
    return true;
}

/* Waits until `text` shows up behind what was looked at before, and looks behind it from then on.
 */
static void expect(const char *text)
{
    const double until = now_s() + WAIT_S;
    for (;;) {
        const char *hit = memmem(seen + looked, n_seen - looked, text, strlen(text));
        if (hit) {
            looked = (size_t)(hit - seen) + strlen(text);
            return;
        }
        const bool open = read_some(100);
        ck_assert_msg(open || memmem(seen + looked, n_seen - looked, text, strlen(text)),
                      "ended without '%s' in: %s", text, seen + looked);
        ck_assert_msg(now_s() < until, "no '%s' in: %s", text, seen + looked);
    }
}

static void type(const char *text)
{
    ck_assert_int_eq(write(master, text, strlen(text)), (ssize_t)strlen(text));
}

/* A line at the prompt. */
static void say(const char *text)
{
    type(text);
    type("\r");
}

static int end_code(void)
{
    const double until = now_s() + WAIT_S;
    int status;
    while (waitpid(child, &status, WNOHANG) == 0) {
        (void)read_some(50);
        ck_assert_msg(now_s() < until, "does not end: %s", seen + looked);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

/* The prompt: bracketed paste goes on, then "> ", and the editor has the terminal: a key typed
 * while lines are still cooked would be lost with that mode. */
static void prompt(void)
{
    const double until = now_s() + WAIT_S;
    struct termios mode;
    expect("\x1b[?2004h");
    expect("> ");
    while (tcgetattr(master, &mode) == 0 && mode.c_lflag & ICANON) {
        ck_assert_msg(now_s() < until, "the editor does not take the terminal");
        (void)read_some(5);
    }
}

START_TEST(test_turns)
{
    start("--no-history", NULL);
    prompt();
    say("What is 17 + 25?");
    expect("17 + 25 = 42.");
    prompt();
    say("/clear");
    expect("new conversation");
    prompt();
    say("Remember this. The code of Anna is 4821. The code of Ben is 9377.");
    expect("I will remember it.");
    prompt();
    say("What is the code of Ben?");
    expect("The code of Ben is 9377.");
    prompt();
    say("/undo");
    expect("the last turn is gone, 1 left");
    prompt();
    say("What is the code of Anna?");
    expect("The code of Anna is 4821.");
    prompt();
    say("/regen");
    expect("The code of Anna is 4821.");
    prompt();
    type("\x04");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_commands)
{
    char path[128], line[160];
    (void)snprintf(path, sizeof path, "%s/talk.jsonl", state_dir);
    start("--no-history", NULL);
    prompt();
    say("/help");
    expect("/regen");
    prompt();
    say("/set temperature 0.5");
    expect("temperature is 0.5");
    prompt();
    say("/set temperature 1000");
    expect("temperature: expected 0 to 100, got 1000");
    prompt();
    say("/set top_k many");
    expect("'many' is no value for it");
    prompt();
    say("/set nonsense 1");
    expect("unknown setting 'nonsense'");
    prompt();
    say("/set temperature 0");
    expect("temperature is 0");
    prompt();
    say("/set");
    expect("repetition-penalty");
    prompt();
    say("/nonsense");
    expect("unknown command '/nonsense'");
    prompt();
    say("/undo");
    expect("there is no turn to take back");
    prompt();
    say("Remember this. The code of Anna is 4821. The code of Ben is 9377.");
    expect("I will remember it.");
    prompt();
    (void)snprintf(line, sizeof line, "/save %s", path);
    say(line);
    expect("1 turns");
    prompt();
    say("end");
    expect("new conversation");
    prompt();
    (void)snprintf(line, sizeof line, "/load %s", path);
    say(line);
    expect("1 turns");
    prompt();
    say("What is the code of Ben?");
    expect("The code of Ben is 9377.");
    prompt();
    say("/stats");
    expect("of 1024 tokens");
    prompt();
    say("/stats on");
    expect("stats is on");
    prompt();
    say("/load /nowhere");
    expect("/nowhere");
    prompt();
    say("/system You are a helpful assistant.");
    expect("system text set");
    prompt();
    say("What is the code of Anna?");
    expect("4821");
    expect("tokens/s");
    prompt();
    say("/show");
    expect("InternLM2ForCausalLM");
    prompt();
    say("exit");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_several_lines)
{
    start("--no-history", NULL);
    prompt();
    say("\"\"\"What is");
    expect("... ");
    say("17 + 25?\"\"\"");
    expect("42");
    prompt();
    say("/clear");
    prompt();
    say("What is \\");
    expect("... ");
    say("17 + 25?");
    expect("42");
    prompt();
    say("/clear");
    prompt();
    type("\x1b[200~What is\n17 + 25?\x1b[201~");
    expect("\xe2\x90\xa4"); /* the line end is seen, and does not send */
    type("\r");
    expect("42");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_double_enter)
{
    start("--no-history", "--double-enter", NULL);
    prompt();
    say("What is");
    expect("... ");
    say("17 + 25?");
    expect("... ");
    say("");
    expect("42");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_interrupt)
{
    /* Without its stop tokens the model writes until the session is full: for seconds. */
    start("--no-history", "--session-len", "8192", "--max-new-tokens", "8000", "--logit-bias",
          "4094=-1000", "--logit-bias", "2=-1000", NULL);
    prompt();
    say("hello");
    expect("Hello!");
    type("\x03");
    expect("[stopped]");
    prompt();
    say("/undo");
    expect("the last turn is gone");
    prompt();
    type("half a line");
    expect("half a line");
    type("\x03");
    expect("(Ctrl-C again or Ctrl-D leaves)");
    prompt();
    type("\x03");
    ck_assert_int_eq(end_code(), 130);
}
END_TEST

START_TEST(test_terminated)
{
    start("--no-history", NULL);
    prompt();
    ck_assert_int_eq(kill(child, SIGTERM), 0);
    ck_assert_int_eq(end_code(), 143);
}
END_TEST

START_TEST(test_full_session)
{
    start("--no-history", "--session-len", "40", NULL);
    prompt();
    say("What is 17 + 25?");
    expect("42");
    prompt();
    say("What is 17 + 26?");
    expect("/clear begins anew");
    prompt();
    say("/set drop-oldest on");
    expect("drop-oldest is on");
    prompt();
    say("What is 17 + 26?");
    expect("of the oldest turns were forgotten");
    prompt();
    say("What is the capital of France, what of Germany, what of Italy, what of Spain and what of "
        "Portugal?");
    expect("the session is full");
    prompt();
    say("/clear");
    prompt();
    say("What is 17 + 25?");
    expect("= 42.");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_control_bytes)
{
    /* The byte piece of ESC, forced: the terminal must not get it. */
    start("--no-history", "--logit-bias", "30=1000", "--max-new-tokens", "3", NULL);
    prompt();
    say("hello");
    expect("???");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_history_and_completion)
{
    char path[128];
    struct stat st;
    (void)snprintf(path, sizeof path, "%s/tmforge/chat_history", state_dir);
    start(NULL);
    prompt();
    type("/cl\t\r");
    expect("new conversation");
    prompt();
    say("What is 17 + 25?");
    expect("42");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
    ck_assert_int_eq(stat(path, &st), 0);
    ck_assert_int_eq(st.st_mode & 0777, 0600);
    close(master);

    start(NULL); /* the line before the last, from the other process's history */
    prompt();
    type("\x1b[A");
    expect("/bye");
    type("\x1b[A");
    expect("What is 17 + 25?");
    type("\r");
    expect("= 42.");
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
}
END_TEST

START_TEST(test_no_history)
{
    char path[128];
    (void)snprintf(path, sizeof path, "%s/tmforge", state_dir);
    start("--no-history", NULL);
    prompt();
    say("/bye");
    ck_assert_int_eq(end_code(), 0);
    ck_assert_int_ne(access(path, F_OK), 0);
}
END_TEST

int main(void)
{
    Suite *s = suite_create("chat_tty");
    TCase *t = tcase_create("chat_tty");
    tcase_add_checked_fixture(t, setup, teardown);
    tcase_set_timeout(t, 5 * WAIT_S);
    tcase_add_test(t, test_turns);
    tcase_add_test(t, test_commands);
    tcase_add_test(t, test_several_lines);
    tcase_add_test(t, test_double_enter);
    tcase_add_test(t, test_interrupt);
    tcase_add_test(t, test_terminated);
    tcase_add_test(t, test_full_session);
    tcase_add_test(t, test_control_bytes);
    tcase_add_test(t, test_history_and_completion);
    tcase_add_test(t, test_no_history);
    suite_add_tcase(s, t);
    return suite_run(s);
}
