/* A conversation: turns, and what it is to be answered with. Who answers is a backend: a model
 * here (chat_local.c) or a server (chat_remote.c). Prints nothing; the terminal around it is
 * chat_app.c. */
#ifndef TMF_TOOLS_CHAT_SESSION_H
#define TMF_TOOLS_CHAT_SESSION_H

#include "tools/http_client.h"
#include "tools/tm_run.h"

typedef struct {
    char *user, *answer; /* owned; answer NULL while there is none */
    bool cut;            /* the answer did not come to its own end */
    int64_t ids_before;  /* the local backend's: ids of the conversation before this turn */
    int32_t last_before;
    int32_t dropped; /* the id taken off the end when this turn began, -1 none */
} chat_turn;

typedef struct chat_session chat_session;
typedef struct chat_backend chat_backend;
typedef struct { /* an answer on its way: kept, and handed on */
    run_answer answer;
    gen_fn fn;
    void *ud;
} chat_relay;
bool chat_relay_token(void *relay, int32_t id, const char *text, size_t n); /* a gen_fn */

struct chat_backend {
    /* Answers the last turn through chat_relay_token; r->n_new 0: nothing came. Failing leaves
     * the turns as they are, up to *dropped_turns forgotten at the front. */
    err_code (*answer)(chat_backend *b, chat_session *s, chat_relay *a, gen_result *r,
                       int *dropped_turns, const job *j, err *e);
    void (*turn_gone)(chat_backend *b, const chat_turn *t);     /* the last turn is taken back */
    void (*rewritten)(chat_backend *b, chat_session *s);        /* system text or turns changed */
    void (*show)(const chat_backend *b, char *buf, size_t cap); /* what answers, in lines */
    void (*close)(chat_backend *b);                             /* frees b */
};

struct chat_session {
    chat_backend *b;  /* owned */
    const char *meta; /* system text given at start, borrowed; NULL: the template's */
    char *system;     /* owned, overrides meta */
    chat_turn *turns; /* [n_turns], room for cap */
    int n_turns, cap;
    /* With a remote backend a NaN, -1 or UINT64_MAX in here (chat_sample_unset) is the server's
     * own choice. */
    sample_opts sample;
    int64_t max_new;
    cli_list stop_texts;
    uint64_t answers; /* moves the seed on, so that the same question may get another answer */
    bool drop_oldest; /* a full session loses its oldest turns; else E_LIMIT says so */
    bool remote;
    int32_t vocab;   /* of ids in a bias */
    int64_t context; /* tokens that the conversation takes now, as far as is known */
    int32_t room;    /* and may take; 0: not known */
};

/* r->m and c are open, and borrowed; sample, max_new and stop_texts are set by the caller
 * afterwards. */
err_code chat_local_open(chat_session *s, run_ctx *r, const chat *c, const char *meta, err *e);
/* h is borrowed; name: the model's there, borrowed. */
err_code chat_remote_open(chat_session *s, http_client *h, const char *name, const char *meta,
                          err *e);
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
/* E_USAGE names a sampling field that is out of range. */
err_code chat_session_check(const chat_session *s, err *e);
sample_opts chat_sample_unset(void);

/* ---- for backends ---- */
/* The conversation as messages; m has room for 2 * n_turns + 1. A system text that was set is one
 * of them, meta is not. */
int64_t chat_session_messages(const chat_session *s, chat_message *m);
void chat_session_drop_first(chat_session *s);

#endif
