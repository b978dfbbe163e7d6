#include "support/engine_case.h"

#include <check.h>
#include <pthread.h>
#include <string.h>

#include "support/tiny_weights.h"

#define DEMO TMF_SOURCE_DIR "/datasets/demo"

device *dev;
weight_src *src;
model *mdl;
engine *eng;
case_model up_model;
kv_format up_kv;
dev_kind up_device;

/* ---- steps under the tests' control ---- */

static pthread_mutex_t gate_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t gate_moved = PTHREAD_COND_INITIALIZER;
static int gate_left = -1; /* steps that may begin; -1: all */
static int gate_stuck;     /* steps that wait to begin */
static int gate_done;      /* steps that ended */
bool gate_fault;           /* the next one fails */

err_code __real_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e);
err_code __wrap_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e);
err_code __wrap_model_step(model *m, const step_seq *seqs, int n, const job *j, err *e)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_stuck++;
    (void)pthread_cond_broadcast(&gate_moved);
    while (gate_left == 0) (void)pthread_cond_wait(&gate_moved, &gate_lock);
    if (gate_left > 0) gate_left--;
    gate_stuck--;
    const bool fault = gate_fault;
    (void)pthread_mutex_unlock(&gate_lock);
    const err_code rc = fault ? err_set(e, E_DEVICE, "out of order")
                              : __real_model_step(m, seqs, n, j, e);
    (void)pthread_mutex_lock(&gate_lock);
    gate_done++;
    (void)pthread_cond_broadcast(&gate_moved);
    (void)pthread_mutex_unlock(&gate_lock);
    return rc;
}

void gate_set(int left)
{
    (void)pthread_mutex_lock(&gate_lock);
    gate_left = left;
    (void)pthread_cond_broadcast(&gate_moved);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* Until a step waits to begin: the engine stands still, its plan is made. */
void gate_wait(void)
{
    (void)pthread_mutex_lock(&gate_lock);
    while (!gate_stuck) (void)pthread_cond_wait(&gate_moved, &gate_lock);
    (void)pthread_mutex_unlock(&gate_lock);
}

/* n steps, then again until one waits. */
void gate_steps(int n)
{
    for (int i = 0; i < n; i++) {
        (void)pthread_mutex_lock(&gate_lock);
        const int done = gate_done;
        gate_left = 1;
        (void)pthread_cond_broadcast(&gate_moved);
        while (gate_done == done) (void)pthread_cond_wait(&gate_moved, &gate_lock);
        (void)pthread_mutex_unlock(&gate_lock);
        if (i + 1 < n) gate_wait();
    }
}

/* ---- model and engine ---- */

void must(err_code rc, const err *e) { ck_assert_msg(rc == OK, "%s", e->msg); }

static void open_weights(void)
{
    err e;
    tiny_opts o = {.desc = tiny_desc(), .seed = 5};
    if (up_model == CASE_DEMO) {
        must(weights_open(&src, DEMO, &e), &e);
        return;
    }
    if (up_model == CASE_W4) o.w4_group = 32;
    if (up_model == CASE_W4 && up_device == DEV_CUDA) { /* sizes that the fast kernels take */
        o.desc.hidden = 256;
        o.desc.head_dim = o.desc.rope_dims = 64;
        o.desc.ffn = 384;
        o.w4_group = 128;
    }
    if (up_model == CASE_DYNAMIC) {
        o.desc.scaling = (rope_scaling){
            .kind = ROPE_DYNAMIC, .factor = 2, .original_max_positions = 64};
        o.desc.max_tokens = 64;
    }
    must(tiny_open(&src, &o, &e), &e);
}

/* CUDA's fast attention wants blocks in multiples of 32. */
int32_t case_block(void) { return up_device == DEV_CUDA ? 32 : 16; }

void up(const char *isa, int32_t batch, int32_t tokens, engine_opts o)
{
    err e;
    const int32_t block_tokens = case_block();
    model_opts m = {.session_len = SESSION, .max_seqs = batch, .block_tokens = block_tokens};
    const dev_opts d = {.kind = up_device, .threads = 2, .isa = isa, .deterministic = true};
    must(dev_open(&dev, &d, &e), &e);
    open_weights();
    m.kv = up_kv;
    const model_desc *desc = weights_desc(src);
    const kv_opts block = {up_kv, desc->layers, desc->kv_heads, desc->head_dim, block_tokens, 1, 1,
                           1};
    m.kv_mem_bytes = (int64_t)kv_bytes(&block) * (tokens / block_tokens);
    must(model_open(&mdl, dev, src, &m, NULL, &e), &e);
    ck_assert_int_eq(model_session_len(mdl), SESSION);
    must(engine_open(&eng, mdl, &o, NULL, &e), &e);
}

void down(void)
{
    engine_close(&eng);
    model_close(&mdl);
    weights_close(&src);
    dev_close(&dev);
}

/* ---- requests of all kinds ---- */

uint32_t next_random(uint32_t *x) { return (*x = *x * 1664525u + 1013904223u) >> 8; }

static const logit_bias biases[2] = {{17, 3.5f}, {40, -2.0f}};
const int32_t stops[2] = {2, 7};

/* Request i: lengths, sampling and options vary; every third shares its beginning with others. */
void request_make(request *q, int32_t i)
{
    uint32_t x = 12345u + (uint32_t)i * 77u, y = 4242;
    const int32_t n = i % 5 == 0 ? 1 + i : 20 + (int32_t)(next_random(&x) % 180);
    const uint32_t ids = up_model == CASE_DEMO ? 4000 : 47;
    for (int32_t k = 0; k < n; k++)
        q->ids[k] = (int32_t)(next_random(i % 3 == 0 && k < 100 ? &y : &x) % ids) + 3;
    q->limit = NULL;
    q->r = (engine_request){.prompt = q->ids,
                            .n_prompt = n,
                            .max_new = MAX_NEW - i % 7,
                            .sample = sample_greedy(),
                            .top_logprobs = i % 2 ? 2 : -1,
                            .prompt_logprobs = i % 8 == 3   ? 1
                                               : i % 8 == 5 ? 0
                                                            : -1};
    if (i % 4 == 1) {
        q->r.sample.temperature = 0.9;
        q->r.sample.top_p = 0.95;
        q->r.sample.seed = (uint64_t)i * 1000003u;
    }
    if (i % 4 == 2) {
        q->r.sample.temperature = 1.3;
        q->r.sample.top_k = 40;
        q->r.sample.frequency_penalty = 0.5;
        q->r.sample.repetition_penalty = 1.1;
        q->r.sample.seed = 5;
        q->r.sample.bias = biases;
        q->r.sample.n_bias = 2;
    }
    if (i % 6 == 4) {
        q->r.stop_ids = stops;
        q->r.n_stop_ids = 2;
        q->r.min_new = 5;
    }
}

answer *submit(const request *q)
{
    err e;
    answer *a;
    engine_request r = q->r;
    if (q->limit) r.limit = q->limit();
    must(engine_submit(eng, &r, &a, &e), &e);
    return a;
}

/* Reads to the end and closes. */
void finish(answer *a, result *r)
{
    const answer_token *prompt;
    memset(r, 0, sizeof *r);
    do {
        ck_assert_int_lt(r->n, SESSION);
        r->n += answer_read(a, r->token + r->n, SESSION - r->n, 60000, &r->state);
    } while (r->state < ANSWER_STOP);
    r->n_prompt = answer_prompt(a, &prompt);
    if (r->n_prompt) memcpy(r->prompt, prompt, (size_t)r->n_prompt * sizeof *prompt);
    answer_figures_get(a, &r->figures);
    answer_close(&a);
}

static bool tokens_equal(const answer_token *a, const answer_token *b, int32_t n)
{
    for (int32_t i = 0; i < n; i++) {
        if (a[i].id != b[i].id || a[i].n_top != b[i].n_top ||
            memcmp(&a[i].logprob, &b[i].logprob, sizeof(float)) != 0 ||
            memcmp(a[i].top, b[i].top, (size_t)a[i].n_top * sizeof(token_prob)) != 0)
            return false;
    }
    return true;
}

/* Ids and the bits of every log-probability. */
void must_equal(const result *a, const result *b, const char *what, int i)
{
    ck_assert_msg(a->state == b->state && a->n == b->n,
                  "%s: request %d: state %d after %d, %d "
                  "after %d",
                  what, i, (int)a->state, a->n, (int)b->state, b->n);
    ck_assert_msg(tokens_equal(a->token, b->token, a->n), "%s: request %d: tokens", what, i);
    ck_assert_msg(a->n_prompt == b->n_prompt && tokens_equal(a->prompt, b->prompt, a->n_prompt),
                  "%s: request %d: prompt", what, i);
}

request requests[REQUESTS];
result alone[REQUESTS], together[REQUESTS];

void run_together(int32_t n)
{
    answer *a[REQUESTS];
    gate_set(0); /* they come together */
    for (int32_t i = 0; i < n; i++) a[i] = submit(&requests[i]);
    gate_set(-1);
    for (int32_t i = 0; i < n; i++) finish(a[i], &together[i]);
}

void plain_request(request *q, int32_t n, int32_t max_new, uint32_t seed)
{
    memset(q, 0, sizeof *q);
    for (int32_t k = 0; k < n; k++) q->ids[k] = (int32_t)(next_random(&seed) % 4000) + 3;
    q->r = (engine_request){.prompt = q->ids,
                            .n_prompt = n,
                            .max_new = max_new,
                            .sample = sample_greedy(),
                            .top_logprobs = -1,
                            .prompt_logprobs = -1};
}
