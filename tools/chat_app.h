/* A conversation in the terminal: what its loop (chat_app.c) and its commands (chat_commands.c)
 * share. tm-run chat and tm-run client open the session. */
#ifndef TMF_TOOLS_CHAT_APP_H
#define TMF_TOOLS_CHAT_APP_H

#include "tools/chat_session.h"
#include "tools/chat_terminal.h"

typedef struct {
    tool_ctx *t;
    chat_session s;
    chat_terminal *term; /* NULL when standard input is no terminal */
    bool stats;          /* figures behind each answer */
    bool plain;          /* standard output is no terminal: bytes go out as they are */
    bool quit, midline;
    gen_result last; /* of the last answer */
} chat_app;

typedef struct {
    const char *prompt, *load, *hello; /* NULL: none; hello is required */
    bool stats, double_enter, no_history;
} chat_app_opts;
/* Rows of an option table; o is a static chat_app_opts. */
#define CHAT_APP_OPTIONS(o)                                                                        \
    {"prompt",    'p',    CLI_STR,                                                                 \
     &(o).prompt, "TEXT", "answer this and end; what standard input brings is put behind it"},     \
        {"load", 0, CLI_STR, &(o).load, "FILE", "go on with a conversation that /save wrote"},     \
        {"stats",    0,    CLI_FLAG,                                                               \
         &(o).stats, NULL, "time to the first token, tokens a second, context used"},              \
        {"double-enter", 0, CLI_FLAG, &(o).double_enter, NULL, "a message ends at an empty line"}, \
    {                                                                                              \
        "no-history", 0, CLI_FLAG, &(o).no_history, NULL, "keep no history of what was typed"      \
    }

/* The session is open and its sampling set. Returns when the conversation is over. */
err_code chat_app_run(chat_app *a, const chat_app_opts *o, err *e);
void chat_app_close(chat_app *a); /* terminal and session */

/* One question and its answer on stdout. A full session and refused texts are told on stderr and
 * are OK. */
err_code chat_app_ask(chat_app *a, const char *text, err *e);
void chat_app_note(const chat_app *a, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void chat_app_stats(const chat_app *a); /* one line on stderr */

/* "/clear", "/set temperature 0.5", ...: what the line asks for. Unknown commands and wrong values
 * are told on stderr. Failures that end the chat come back. */
err_code chat_command_run(chat_app *a, const char *line, err *e);
extern const char *const chat_command_names[]; /* NULL-ended */

#endif
