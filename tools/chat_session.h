/* A conversation with a model: turns, the ids they stand for, and what of them the cache holds.
 * Prints nothing; the terminal around it is tm_run_chat.c. */
#ifndef TMF_TOOLS_CHAT_SESSION_H
#define TMF_TOOLS_CHAT_SESSION_H

#include "tools/tm_run.h"

typedef struct {
    char *user, *answer; /* owned; answer NULL while there is none */
    bool cut;            /* the answer did not come to its own end */
    int64_t ids_before;  /* ids of the conversation before this turn */
    int32_t last_before;
    int32_t dropped; /* the id taken off the end when this turn began, -1 none */
} chat_turn;

typedef struct {
    run_ctx *r; /* borrowed */
    const chat *c;
    generator *g;
    const char *meta; /* system text given at start, borrowed; NULL: the template's */
    char *system;     /* owned, overrides meta */
    chat_turn *turns; /* [n_turns], room for cap */
    int n_turns, cap;
    token_list ids; /* the conversation; slot 0 holds a prefix of it */
    int32_t last;   /* last generated id, -1 when the answer was cut */
    sample_opts sample;
    int64_t max_new;
    int32_t stops[RUN_MAX_STOPS];
    int n_stops;
    cli_list stop_texts;
    uint64_t answers; /* moves the seed on, so that the same question may get another answer */
    bool drop_oldest; /* a full session loses its oldest turns; else E_LIMIT says so */
} chat_session;

/* r->m and c are open; sample, max_new and stop_texts are set by the caller afterwards. */
err_code chat_session_open(chat_session *s, run_ctx *r, const chat *c, const char *meta, err *e);
void chat_session_close(chat_session *s);

/* One more turn. The answer streams through fn as in gen_run, and is kept. A turn without a single
 * generated token is forgotten again. E_LIMIT when the session is full: nothing has changed then.
 */
err_code chat_session_ask(chat_session *s, const char *user, gen_fn fn, void *ud, gen_result *r,
                          int *dropped_turns, const job *j, err *e);
/* Takes the last turn back; *user (if not NULL) receives its text, to be freed with mem_free. False
 * when there is none. */
bool chat_session_undo(chat_session *s, char **user);
void chat_session_clear(chat_session *s); /* keeps the system text */
/* Another system text; NULL: the one given at start. What was said stays and is read again. */
err_code chat_session_system(chat_session *s, const char *text, err *e);
/* One {"role":, "content":} a line. Loading replaces the conversation; E_INPUT leaves it as it was.
 */
err_code chat_session_save(const chat_session *s, const char *path, err *e);
err_code chat_session_load(chat_session *s, const char *path, err *e);

#endif
