/* tm-run chat: what its loop (tm_run_chat.c) and its commands (chat_commands.c) share. */
#ifndef TMF_TOOLS_CHAT_APP_H
#define TMF_TOOLS_CHAT_APP_H

#include "tools/chat_session.h"
#include "tools/chat_terminal.h"

typedef struct {
    tool_ctx *t;
    run_ctx r;
    chat *c;
    chat_session s;
    chat_terminal *term; /* NULL when standard input is no terminal */
    bool stats;          /* figures behind each answer */
    bool plain;          /* standard output is no terminal: bytes go out as they are */
    bool quit;
    gen_result last; /* of the last answer */
} chat_app;

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
