/* Tool calls out of an answer's text, as it comes or in one piece: both give the same events,
 * joined. What does not turn out to be a call is content. */
#ifndef TMF_RUNTIME_SERVE_TOOLCALL_H
#define TMF_RUNTIME_SERVE_TOOLCALL_H

#include <stddef.h>

#include "base/err.h"
#include "base/json.h"
#include "formats/chat.h"

typedef enum {
    TOOLCALL_CONTENT, /* text of the answer itself */
    TOOLCALL_BEGIN,   /* a call: text is the tool's name */
    TOOLCALL_ARGS     /* more of the call's arguments: JSON text as it was generated */
} toolcall_kind;
typedef struct {
    toolcall_kind kind;
    int index; /* of the call, from 0; -1 with content */
    const char *text;
    size_t n; /* whole UTF-8 characters when what was fed was; never 0 */
} toolcall_event;
/* Anything but OK ends the feeding function with that code. */
typedef err_code (*toolcall_fn)(void *ud, const toolcall_event *ev, err *e);

typedef struct toolcall toolcall;
/* format: chat_tool_format; CHAT_TOOLS_NONE passes everything on as content. */
err_code toolcall_open(toolcall **out, chat_tools format, err *e);
void toolcall_close(toolcall **p); /* NULL accepted */
/* The request's tools (borrowed until the end), whose schemas tell what the text between tags is.
 * Without them it is strings. */
void toolcall_tools(toolcall *p, const cJSON *tools);
/* The answer's next text, with the strings of special tokens in it (decode with skip_special
 * false) but without the stop token that ended it. Holds back what may yet become a call, and
 * white space before one. A single call's text is at most 1 MiB, else it is content. */
err_code toolcall_feed(toolcall *p, const char *text, size_t n, toolcall_fn fn, void *ud, err *e);
/* The answer is over: what is held comes out. A call that was cut keeps what there is of it. */
err_code toolcall_end(toolcall *p, toolcall_fn fn, void *ud, err *e);
int toolcall_count(const toolcall *p); /* calls begun so far */

#endif
