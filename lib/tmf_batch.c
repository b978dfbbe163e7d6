/* Batches: prompts go to the engine as it has room, pieces come back as they are there. */
#include <errno.h>
#include <poll.h>
#include <string.h>

#include "base/mem.h"
#include "lib/tmf_internal.h"
#include "runtime/clock.h"
#include "runtime/text_stream.h"

#define READ_TOKENS    64 /* in one piece at most */
#define MAX_STOP_IDS   64
#define MAX_STOP_TEXTS 16
#define MAX_STOP_BYTES 4096 /* of one text */
#define MAX_PROMPTS    ((size_t)1 << 24)
#define BUSY_MS        5 /* how often a full queue is tried again */

typedef struct options { /* a copy, shared by prompts that were given the same one */
    struct options *next;
    tmf_gen_options o;
    const char *texts[MAX_STOP_TEXTS];
    int32_t ids[TMF_MAX_STOPS + MAX_STOP_IDS]; /* the model's and the caller's */
    int n_ids;
    size_t text_bytes;
    char *strings; /* what texts, schema and regex point to */
} options;

typedef struct {
    int32_t *ids; /* [n_ids] given back once they are submitted */
    int32_t n_ids;
    const options *o;
    answer *a; /* NULL before and after */
    text_stream *text;
    int32_t n_new;
    bool ended, canceled;
} item;

struct tmf_batch {
    tmf_model *m;
    options *all;
    item *items;     /* [n] */
    int32_t *active; /* [max_batch] of items: submitted, not ended */
    struct pollfd *polls;
    int32_t n, n_active, next, left, turn;
    bool busy; /* the engine's queue is full */
    int32_t ids[READ_TOKENS];
    float logprobs[READ_TOKENS];
    char *buf; /* text of the piece that was given last */
    size_t cap;
};

/* ---- options ---- */

void tmf_gen_options_init(tmf_gen_options *o, size_t size)
{
    const tmf_gen_options d = {.max_new_tokens = 512,
                               .temperature = 0.8,
                               .top_p = 1,
                               .repetition_penalty = 1,
                               .top_k = 50};
    memset(o, 0, size);
    memcpy(o, &d, size < sizeof d ? size : sizeof d);
    o->size = size;
}

static sample_opts sampling(const tmf_gen_options *o)
{
    return (sample_opts){.temperature = o->temperature,
                         .top_k = o->top_k,
                         .top_p = o->top_p,
                         .min_p = o->min_p,
                         .repetition_penalty = o->repetition_penalty,
                         .presence_penalty = o->presence_penalty,
                         .frequency_penalty = o->frequency_penalty,
                         .seed = o->seed};
}

static err_code check_options(const tmf_batch *b, const tmf_gen_options *o, err *e)
{
    const sample_opts s = sampling(o);
    TRY(sample_opts_check(&s, model_desc_of(b->m->m)->vocab, e));
    if (o->max_new_tokens < 0 || o->min_new_tokens < 0)
        return err_set(e, E_USAGE, "max_new_tokens, min_new_tokens: expected 0 or more, got %d, %d",
                       o->max_new_tokens, o->min_new_tokens);
    if (o->n_stop_texts < 0 || o->n_stop_texts > MAX_STOP_TEXTS)
        return err_set(e, E_USAGE, "n_stop_texts: expected 0 to %d, got %d", MAX_STOP_TEXTS,
                       o->n_stop_texts);
    if (o->n_stop_ids < 0 || o->n_stop_ids > MAX_STOP_IDS)
        return err_set(e, E_USAGE, "n_stop_ids: expected 0 to %d, got %d", MAX_STOP_IDS,
                       o->n_stop_ids);
    for (int32_t i = 0; i < o->n_stop_texts; i++) {
        const size_t n = strlen(o->stop_texts[i]);
        if (n == 0 || n > MAX_STOP_BYTES)
            return err_set(e, E_USAGE, "stop_texts[%d]: expected 1 to %d bytes, got %zu", i,
                           MAX_STOP_BYTES, n);
    }
    if (o->json_schema && o->regex)
        return err_set(e, E_USAGE, "json_schema and regex: expected one of them at most");
    return OK;
}

static const char *keep_string(options *to, size_t *at, const char *s)
{
    const size_t n = strlen(s) + 1;
    char *p = memcpy(to->strings + *at, s, n);
    *at += n;
    return p;
}

static err_code copy_strings(options *to, err *e)
{
    tmf_gen_options *o = &to->o;
    void *p;
    size_t bytes = 1, at = 0;
    for (int32_t i = 0; i < o->n_stop_texts; i++) bytes += strlen(o->stop_texts[i]) + 1;
    to->text_bytes = bytes;
    if (o->json_schema) bytes += strlen(o->json_schema) + 1;
    if (o->regex) bytes += strlen(o->regex) + 1;
    TRY(mem_alloc(&p, bytes, 1, "options", e));
    to->strings = p;
    for (int32_t i = 0; i < o->n_stop_texts; i++)
        to->texts[i] = keep_string(to, &at, o->stop_texts[i]);
    if (o->json_schema) o->json_schema = keep_string(to, &at, o->json_schema);
    if (o->regex) o->regex = keep_string(to, &at, o->regex);
    return OK;
}

static err_code add_options(tmf_batch *b, const tmf_gen_options *from, err *e)
{
    void *p;
    tmf_gen_options o;
    tmf_gen_options_init(&o, sizeof o);
    if (from) memcpy(&o, from, from->size < sizeof o ? from->size : sizeof o);
    TRY(check_options(b, &o, e));
    TRY(mem_alloc(&p, 1, sizeof(options), "options", e));
    options *to = p;
    to->o = o;
    to->next = b->all;
    b->all = to;
    for (int i = 0; i < b->m->n_stops && !o.ignore_eos; i++) to->ids[to->n_ids++] = b->m->stops[i];
    for (int32_t i = 0; i < o.n_stop_ids; i++) to->ids[to->n_ids++] = o.stop_ids[i];
    return copy_strings(to, e);
}

/* ---- opening ---- */

static err_code add_item(tmf_batch *b, const tmf_prompt *p, err *e)
{
    void *ids;
    item *it = &b->items[b->n];
    if (p->n_ids == 0 || p->n_ids > INT32_MAX)
        return err_set(e, E_USAGE, "prompt %d: expected ids, got %zu", b->n, p->n_ids);
    TRY(mem_alloc(&ids, p->n_ids, sizeof *p->ids, "prompt", e));
    memcpy(ids, p->ids, p->n_ids * sizeof *p->ids);
    *it = (item){.ids = ids, .n_ids = (int32_t)p->n_ids, .o = b->all};
    b->n++;
    b->left++;
    return OK;
}

static err_code fill(tmf_batch *b, const tmf_prompt *prompts, size_t n, err *e)
{
    void *p;
    if (n > MAX_PROMPTS)
        return err_set(e, E_USAGE, "n: expected at most %zu prompts, got %zu", MAX_PROMPTS, n);
    TRY(mem_alloc(&p, n, sizeof(item), "prompts", e));
    b->items = p;
    TRY(mem_alloc(&p, (size_t)b->m->max_batch, sizeof(int32_t), "answers", e));
    b->active = p;
    TRY(mem_alloc(&p, (size_t)b->m->max_batch, sizeof(struct pollfd), "answers", e));
    b->polls = p;
    for (size_t i = 0; i < n; i++) {
        if (i == 0 || prompts[i].options != prompts[i - 1].options)
            TRY(add_options(b, prompts[i].options, e));
        TRY(add_item(b, &prompts[i], e));
    }
    return OK;
}

tmf_status tmf_batch_open(tmf_batch **out, tmf_model *m, const tmf_prompt *prompts, size_t n,
                          tmf_error *e)
{
    void *p;
    err failed;
    *out = NULL;
    if (mem_alloc(&p, 1, sizeof(tmf_batch), "batch", &failed) != OK) return tmf_told(&failed, e);
    tmf_batch *b = p;
    b->m = m;
    if (fill(b, prompts, n, &failed) != OK) {
        tmf_batch_close(&b);
        return tmf_told(&failed, e);
    }
    *out = b;
    return TMF_OK;
}

static void item_end(item *it)
{
    it->ended = true;
    answer_close(&it->a);
    text_stream_close(&it->text);
    mem_free(it->ids);
    it->ids = NULL;
}

void tmf_batch_close(tmf_batch **out)
{
    tmf_batch *b = out ? *out : NULL;
    if (!b) return;
    for (int32_t i = 0; i < b->n; i++) item_end(&b->items[i]);
    for (options *o = b->all, *next; o; o = next) {
        next = o->next;
        mem_free(o->strings);
        mem_free(o);
    }
    mem_free(b->items);
    mem_free(b->active);
    mem_free(b->polls);
    mem_free(b->buf);
    mem_free(b);
    *out = NULL;
}

/* ---- submitting ---- */

static err_code open_limit(constraint **out, const item *it, const tmf_model *m, err *e)
{
    const tmf_gen_options *o = &it->o->o;
    grammar *g = NULL;
    *out = NULL;
    if (o->json_schema)
        TRY(grammar_set_json_schema(m->grammars, &g, o->json_schema, strlen(o->json_schema), e));
    if (o->regex) TRY(grammar_set_regex(m->grammars, &g, o->regex, e));
    if (!g) return OK;
    const err_code rc = constraint_open(out, g, e);
    grammar_close(&g);
    return rc;
}

static err_code submit(tmf_batch *b, item *it, err *e)
{
    const tmf_gen_options *o = &it->o->o;
    if (!it->text) {
        TRY(text_stream_open(&it->text, b->m->t, MAX_STOP_TEXTS, it->o->text_bytes,
                             b->m->piece_bytes, e));
        TRY(text_stream_start(it->text, it->o->texts, o->n_stop_texts, !o->keep_special, e));
    }
    engine_request r = {.prompt = it->ids,
                        .n_prompt = it->n_ids,
                        .max_new = o->max_new_tokens,
                        .min_new = o->min_new_tokens,
                        .stop_ids = it->o->ids,
                        .n_stop_ids = it->o->n_ids,
                        .sample = sampling(o),
                        .top_logprobs = o->logprobs ? 0 : -1,
                        .prompt_logprobs = -1};
    if (r.max_new && r.min_new > r.max_new) r.min_new = r.max_new;
    TRY(open_limit(&r.limit, it, b->m, e));
    const err_code rc = engine_submit(b->m->g, &r, &it->a, e);
    if (rc != OK) constraint_close(&r.limit);
    return rc;
}

static void start_piece(const tmf_batch *b, tmf_piece *p, int32_t index)
{
    const size_t size = p->size;
    *p = (tmf_piece){.size = size, .index = index, .left = b->left, .text = ""};
}

/* An answer that never began, or broke: its only or last piece. */
static void give_failure(tmf_batch *b, int32_t index, const err *why, tmf_piece *p)
{
    item *it = &b->items[index];
    b->left--;
    start_piece(b, p, index);
    p->finish = it->canceled ? TMF_STOPPED : TMF_FAILED;
    if (!it->canceled) (void)tmf_told(why, &p->error);
    p->n_new = it->n_new;
    item_end(it);
}

/* Submits what there is room for. True: *p is the end of one that could not be. */
static bool submit_some(tmf_batch *b, tmf_piece *p)
{
    b->busy = false;
    while (b->next < b->n && b->n_active < b->m->max_batch) {
        err why = {0};
        item *it = &b->items[b->next];
        const err_code rc = it->canceled ? E_CANCELED : submit(b, it, &why);
        if (rc == E_BUSY) {
            b->busy = true;
            return false;
        }
        b->next++;
        if (rc != OK) {
            give_failure(b, b->next - 1, &why, p);
            return true;
        }
        mem_free(it->ids);
        it->ids = NULL;
        b->active[b->n_active++] = b->next - 1;
    }
    return false;
}

/* ---- pieces ---- */

static bool is_stop_id(const item *it, int32_t id)
{
    for (int i = 0; i < it->o->n_ids; i++) {
        if (it->o->ids[i] == id) return true;
    }
    return false;
}

/* Tokens into text. *stopped: a stop text is complete, what is behind it does not count. */
static err_code take_tokens(tmf_batch *b, item *it, const answer_token *t, int32_t n, bool *stopped,
                            tmf_piece *p, err *e)
{
    for (int32_t i = 0; i < n && !*stopped; i++) {
        int stop = -1;
        TRY(text_stream_add(it->text, t[i].id, &stop, e));
        b->ids[p->n_ids] = t[i].id;
        b->logprobs[p->n_ids++] = t[i].logprob;
        it->n_new++;
        *stopped = stop >= 0;
    }
    return OK;
}

static err_code take_text(tmf_batch *b, item *it, tmf_piece *p, err *e)
{
    size_t n;
    const char *text = text_stream_ready(it->text, &n);
    if (n + 1 > b->cap) {
        void *grown;
        TRY(mem_alloc(&grown, 2 * (n + 1), 1, "text", e));
        mem_free(b->buf);
        b->buf = grown;
        b->cap = 2 * (n + 1);
    }
    if (n) memcpy(b->buf, text, n);
    b->buf[n] = 0;
    text_stream_taken(it->text);
    p->text = b->buf;
    p->n_text = n;
    return OK;
}

static void take_figures(item *it, tmf_piece *p)
{
    answer_figures f;
    answer_figures_get(it->a, &f);
    p->n_prompt = f.n_prompt;
    p->n_cached = f.n_cached;
    p->n_new = it->n_new;
    p->preemptions = f.preemptions;
    p->queue_s = f.queue_s;
    p->prefill_s = f.prefill_s;
    p->decode_s = f.decode_s;
}

static int32_t finish_of(const item *it, answer_state state, bool stopped)
{
    if (stopped) return TMF_STOP;
    switch (state) {
    case ANSWER_WAITING:
    case ANSWER_RUNNING: return TMF_RUNNING;
    case ANSWER_STOP: return TMF_STOP;
    case ANSWER_LENGTH:
    case ANSWER_TIMEOUT: return TMF_LENGTH;
    case ANSWER_CANCELED: return it->canceled ? TMF_STOPPED : TMF_FAILED;
    case ANSWER_FAILED: return TMF_FAILED;
    }
    return TMF_FAILED;
}

static void drop_active(tmf_batch *b, int32_t at) { b->active[at] = b->active[--b->n_active]; }

/* What the answer at place `at` has; false: nothing yet. */
static bool take_piece(tmf_batch *b, int32_t at, tmf_piece *p)
{
    const int32_t index = b->active[at];
    item *it = &b->items[index];
    answer_token t[READ_TOKENS];
    answer_state state;
    bool stopped = false;
    err why = {0};
    int32_t n = answer_read(it->a, t, READ_TOKENS, 0, &state);
    if (n == 0 && state < ANSWER_STOP) return false;
    start_piece(b, p, index);
    if (n && state == ANSWER_STOP && is_stop_id(it, t[n - 1].id)) n--; /* no part of the answer */
    err_code rc = take_tokens(b, it, t, n, &stopped, p, &why);
    p->finish = finish_of(it, state, stopped);
    if (rc == OK && p->finish != TMF_RUNNING && !stopped) text_stream_flush(it->text);
    if (rc == OK) rc = take_text(b, it, p, &why);
    if (rc == OK && p->finish == TMF_FAILED && answer_error(it->a, &why) == OK)
        (void)err_set(&why, E_CANCELED, "the model was closed");
    if (rc != OK) p->finish = TMF_FAILED;
    p->ids = b->ids;
    if (it->o->o.logprobs) p->logprobs = b->logprobs;
    if (p->finish == TMF_RUNNING) return true;
    if (p->finish == TMF_FAILED) (void)tmf_told(&why, &p->error);
    take_figures(it, p);
    p->left = --b->left;
    drop_active(b, at);
    item_end(it);
    return true;
}

/* Waits until something is there, at most ms (-1: for ever). */
static err_code wait_some(tmf_batch *b, int ms, err *e)
{
    if (b->busy && (ms < 0 || ms > BUSY_MS)) ms = BUSY_MS;
    for (int32_t i = 0; i < b->n_active; i++)
        b->polls[i] = (struct pollfd){.fd = answer_fd(b->items[b->active[i]].a), .events = POLLIN};
    if (poll(b->polls, (nfds_t)b->n_active, ms) < 0 && errno != EINTR)
        return err_sys(e, E_IO, errno, "cannot wait for answers");
    return OK;
}

tmf_status tmf_batch_next(tmf_batch *b, int timeout_ms, tmf_piece *p, tmf_error *e)
{
    const double until = timeout_ms < 0 ? 0 : clock_s() + 1e-3 * timeout_ms;
    tmf_piece all = {.size = sizeof all};
    const size_t size = p->size < sizeof all ? p->size : sizeof all;
    bool found = false;
    err failed;
    for (;;) {
        found = submit_some(b, &all);
        for (int32_t i = 0; i < b->n_active && !found; i++) { /* in turn, so that none waits */
            if (b->turn >= b->n_active) b->turn = 0;
            found = take_piece(b, b->turn++, &all);
        }
        if (found || b->left == 0) break;
        const int ms = timeout_ms < 0 ? -1 : (int)(1e3 * (until - clock_s()) + 0.999);
        if (timeout_ms >= 0 && ms <= 0) break;
        if (wait_some(b, ms, &failed) != OK) return tmf_told(&failed, e);
    }
    if (!found) start_piece(b, &all, -1);
    all.size = p->size;
    memcpy(p, &all, size);
    return TMF_OK;
}

void tmf_batch_cancel(tmf_batch *b, int32_t index)
{
    const int32_t from = index < 0 ? 0 : index, to = index < 0 ? b->n : index + 1;
    for (int32_t i = from; i < to && i < b->n; i++) {
        item *it = &b->items[i];
        it->canceled = true;
        if (it->a) answer_cancel(it->a);
    }
}

tmf_status tmf_generate(tmf_model *m, const tmf_prompt *prompts, size_t n, tmf_piece_fn fn,
                        void *ud, tmf_error *e)
{
    tmf_batch *b;
    tmf_piece p = {.size = sizeof p};
    tmf_status rc = tmf_batch_open(&b, m, prompts, n, e);
    if (rc != TMF_OK) return rc;
    do {
        rc = tmf_batch_next(b, -1, &p, e);
        if (rc == TMF_OK && p.index >= 0 && fn && fn(ud, &p) != 0) tmf_batch_cancel(b, -1);
    } while (rc == TMF_OK && p.left);
    tmf_batch_close(&b);
    return rc;
}
