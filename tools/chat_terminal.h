/* The terminal of tm-run chat: a line editor with history and completion, messages of several
 * lines. */
#ifndef TMF_TOOLS_CHAT_TERMINAL_H
#define TMF_TOOLS_CHAT_TERMINAL_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>

#include "base/err.h"

typedef struct chat_terminal chat_terminal;
typedef struct {
    bool double_enter;           /* a message ends at an empty line */
    bool history;                /* kept in the XDG state directory, 0600, 1000 lines */
    const char *const *commands; /* NULL-ended "/clear", ...: what Tab completes */
    const atomic_bool *stop;     /* set by a signal: the read in progress ends; NULL never */
} chat_terminal_opts;
typedef enum { CHAT_MESSAGE, CHAT_END, CHAT_INTERRUPT } chat_input;

err_code chat_terminal_open(chat_terminal **out, const chat_terminal_opts *o, err *e);
void chat_terminal_close(chat_terminal **t); /* saves the history */
/* Reads one message; *text is owned by the terminal and valid until the next read. A line that
 * begins with three double quotes opens a block that ends where a line ends with three; a trailing
 * backslash continues on the next line; pasted lines stay together. CHAT_END: end of input.
 * CHAT_INTERRUPT: Ctrl-C, what was typed is gone. */
err_code chat_terminal_read(chat_terminal *t, char **text, chat_input *what, err *e);
/* The next read begins with this text, to be edited. */
void chat_terminal_prefill(chat_terminal *t, const char *text);

#endif
