/* One request's answers, from submission to the last byte: server_run.c moves them on,
 * server_write.c makes JSON of them. */
#ifndef TMF_RUNTIME_SERVE_SERVER_RUN_H
#define TMF_RUNTIME_SERVE_SERVER_RUN_H

#include <poll.h>

#include "runtime/serve/server_internal.h"
#include "runtime/serve/toolcall.h"

typedef struct run run;

/* One choice. What buffers hold is all of it, or in a stream what is behind the last chunk. */
typedef struct {
    run *r;
    answer *a; /* NULL once it ended */
    text_stream *text;
    toolcall *tools;
    int32_t index, prompt; /* the prompt's place in run.prompts */
    bool begun, ended;
    bool at_stop_id;     /* the last id is a stop id: no text, no log-probability */
    const char *finish;  /* "stop", "length", "tool_calls"; NULL: not yet */
    const char *stopped; /* the stop text that ended it */
    bool timed_out;
    int32_t n_new, last;
    int n_calls;
    size_t n_chars;  /* of the text so far: text_offset */
    out_buf content; /* text */
    out_buf calls;   /* JSON of tool calls: whole ones, or a stream's deltas */
    out_buf probs;   /* chat: log-probabilities, JSON items with commas */
    out_buf tokens, token_probs, tops, offsets; /* completions: lists, the same way */
    out_buf prompt_probs;                       /* items of "prompt_logprobs" */
    out_buf ids;                                /* "1,2" */
    double nll;                                 /* /get_ppl: of the prompt's tokens, summed */
    token_list kept;                            /* ids for the session */
    answer_figures figures;
} choice;

struct run {
    call *c;
    api_request q;
    unsigned who;
    int64_t created;
    char id[40];
    choice *choices; /* [n] */
    int32_t n, n_ended;
    token_list *prompts; /* [n_prompts] */
    int32_t n_prompts;
    session *session; /* of /v1/chat/interactive; NULL: none */
    int32_t history;  /* its tokens before */
    bool lines;       /* interactive: JSON lines instead of events */
    bool gone;        /* the client is */
    bool failed;      /* `fault` is the end */
    bool begun;       /* the stream's first chunk is out */
    api_fault fault;
    double sent_s;        /* when a stream last sent something */
    struct pollfd *polls; /* [n + 1] */
};

/* Takes over *q and prompts [n_prompts] (allocated with mem_alloc, each list with it) whatever
 * comes of it; session NULL: none, else it is given back at the end. Submits q->n answers to each
 * prompt. False: answered with a fault. */
bool server_run_open(call *c, api_request *q, token_list *prompts, int32_t n_prompts, session *s);
/* Fills the call's reply: the whole answer, or the start of a stream. */
void server_run_answer(run *r);
void server_run_close(run **r); /* NULL accepted */
/* Waits until all answers ended, without making text of tokens; false: the client is gone, or it
 * failed and was answered. For what wants log-probabilities alone. */
bool server_run_wait(run *r);

/* ---- server_write.c ---- */
/* A token's log-probabilities, in the form of the request's route. */
void server_write_prob(choice *ch, const answer_token *t);
/* The prompt's, where they were asked for: with echo in front of the answer's, else for
 * "prompt_logprobs". */
void server_write_prompt_probs(choice *ch);
void server_write_call_begin(choice *ch, const char *name, size_t n);
void server_write_call_args(choice *ch, const char *json, size_t n);
/* Events of a stream: its first (nothing on most routes), what a choice has now, a choice's end. */
void server_write_first(choice *ch, out_buf *o);
void server_write_delta(choice *ch, out_buf *o);
void server_write_finish(choice *ch, out_buf *o);
/* Behind all choices: figures, or the fault; and the mark of the end. */
void server_write_end(run *r, out_buf *o);
/* The whole answer of a request that is no stream. */
void server_write_whole(run *r, out_buf *o);

#endif
