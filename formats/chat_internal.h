/* What the chat files share; not for callers. chat.c opens and asks, chat_row.c lays out by a row
 * of chat_table.c, chat_jinja.c by a template, chat_tools.c tells tools to templates that know
 * none. */
#ifndef TMF_FORMATS_CHAT_INTERNAL_H
#define TMF_FORMATS_CHAT_INTERNAL_H

#include "formats/chat.h"
#include "formats/chat_table.h"
#include "formats/jinja.h"
#include "formats/tokenizer_internal.h"

struct chat {
    const tokenizer *t;
    const chat_row *row; /* NULL: the template alone */
    chat_row own;        /* a row read from a file; its strings lie in json */
    cJSON *json;
    jinja *tmpl; /* NULL: the row alone */
    char *text;  /* of a template from a file */
    char name[64];
    chat_tools format;
    bool knows_tools; /* the template writes tools itself */
    bool dated;       /* it asks for the date */
    int32_t end_id;   /* what ends an answer in the template's words; -1 unknown */
};

/* ---- layout: plain text runs and tokens (chat_row.c) ---- */
typedef struct {
    int32_t id;
    size_t at, n;
} chat_seg; /* id < 0: text */
typedef struct {
    const tokenizer *t;
    tok_buf text;
    chat_seg *seg;
    int64_t n, cap;
} chat_layout;
void chat_layout_free(chat_layout *l);
/* Neighbouring text is one run: the tokenizer sees it as the template would render it. */
err_code chat_put_text(chat_layout *l, const char *s, size_t n, err *e);
err_code chat_put_id(chat_layout *l, int32_t id, err *e); /* nothing when id < 0 */
/* Text in which strings of special tokens are tokens. */
err_code chat_put_own(chat_layout *l, const char *s, size_t n, err *e);
int32_t chat_eos(const tokenizer *t);

err_code chat_row_lay_out(const chat *c, chat_layout *l, const chat_request *r, err *e);
/* The end of an answer and the messages behind it; *eoa_end: segments of that end. */
err_code chat_row_next(const chat *c, chat_layout *l, const chat_message *m, int64_t n,
                       int64_t *eoa_end, err *e);

/* ---- templates (chat_jinja.c) ---- */
err_code chat_jinja_lay_out(const chat *c, chat_layout *l, const chat_request *r, err *e);
/* E_UNSUPPORTED when the template does not show earlier answers. */
err_code chat_jinja_next(const chat *c, chat_layout *l, const chat_message *m, int64_t n, err *e);
void chat_jinja_learn(chat *c); /* end_id, knows_tools, dated, format */

/* ---- tools in plain words (chat_tools.c) ---- */
typedef struct {
    chat_request r;
    chat_message *m;
    char **text; /* [2 * n] that m borrows */
    int64_t n_text;
} chat_plain;
bool chat_needs_plain(const chat *c, const chat_request *r);
/* The request without tools: they stand in the system message (in_user: before the first user's
 * words), calls and their results in the messages. */
err_code chat_plain_make(chat_plain *p, const chat_request *r, bool in_user, err *e);
void chat_plain_free(chat_plain *p);

#endif
