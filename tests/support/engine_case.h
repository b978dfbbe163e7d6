/* The engine on the bundled model: steps held up and let go by the test, requests of many kinds,
 * their results. Links with -Wl,--wrap=model_step. */
#ifndef TMF_TESTS_ENGINE_CASE_H
#define TMF_TESTS_ENGINE_CASE_H

#include "runtime/serve/engine.h"

#define SESSION  512
#define REQUESTS 32
#define MAX_NEW  48

extern device *dev;
extern weight_src *src;
extern model *mdl;
extern engine *eng;
/* What `up` opens: the bundled model, or a random one of 50 ids with 4-bit weights, or with rotary
 * frequencies that depend on the prompt's length; the cache's format. */
typedef enum { CASE_DEMO, CASE_W4, CASE_DYNAMIC } case_model;
extern case_model up_model;
extern kv_format up_kv;
extern dev_kind up_device; /* a deterministic one */
int32_t case_block(void);  /* tokens of a block of the cache */
/* Model and engine with room for `tokens` in the cache; sessions of SESSION. */
void up(const char *isa, int32_t batch, int32_t tokens, engine_opts o);
void down(void);
void must(err_code rc, const err *e);

/* Steps of the model begin only as allowed. */
void gate_set(int left); /* -1: all, the beginning */
void gate_wait(void);   /* until a step waits to begin: the engine stands still, its plan is made */
void gate_steps(int n); /* lets n steps run, and returns as the last of them has ended */
extern bool gate_fault; /* steps fail; set while one waits */

typedef struct {
    int32_t ids[SESSION];
    engine_request r;
    constraint *(*limit)(void);
} request;

typedef struct {
    int32_t n;
    answer_state state;
    answer_token token[SESSION];
    answer_token prompt[SESSION];
    int32_t n_prompt;
    answer_figures figures;
} result;

extern request requests[REQUESTS];
extern result alone[REQUESTS], together[REQUESTS];
extern const int32_t stops[2];

uint32_t next_random(uint32_t *x);
/* Request i of many: lengths, sampling and options vary; every third shares its beginning. */
void request_make(request *q, int32_t i);
/* n random ids, greedy. */
void plain_request(request *q, int32_t n, int32_t max_new, uint32_t seed);
answer *submit(const request *q);
void finish(answer *a, result *r); /* reads to the end and closes */
void run_together(int32_t n);      /* requests[0..n) to together[0..n) */
/* Ids and the bits of every log-probability. */
void must_equal(const result *a, const result *b, const char *what, int i);

#define refused(call, want, text)                                                   \
    do {                                                                            \
        memset(&e, 0, sizeof e);                                                    \
        ck_assert_int_eq(call, want);                                               \
        ck_assert_msg(strstr(e.msg, text) != NULL, "'%s' lacks '%s'", e.msg, text); \
    } while (0)

#endif
