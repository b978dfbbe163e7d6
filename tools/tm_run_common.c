/* What the commands of tm-run share. */
#include <errno.h>
#include <inttypes.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus.h"
#include "formats/family.h"
#include "tools/memory_text.h"
#include "tools/tm_run.h"

#define RUN_MAX_TEXT    ((size_t)64 << 20) /* of a prompt */
#define RUN_PIECE_BYTES 256                /* of a tokenizer's tables a piece, measured */

/* ---- opening ---- */

static err_code open_path(run_ctx *r, const tool_ctx *t, bool need_tokenizer, err *e)
{
    TRY(weights_open(&r->src, t->args[0], e));
    if (!need_tokenizer) return OK;
    TRY(tokenizer_open(&r->t, weights_tokenizer_dir(r->src), e));
    const int32_t vocab = weights_desc(r->src)->vocab;
    if (tokenizer_vocab(r->t) > vocab)
        return err_set(e, E_INPUT, "'%s': the tokenizer has ids up to %d, the model knows %d",
                       weights_tokenizer_dir(r->src), tokenizer_vocab(r->t) - 1, vocab);
    return OK;
}

/* Opening a GPU takes a driver longer than reading a directory: both at once. */
typedef struct {
    const tool_ctx *t;
    device *d;
    err_code rc;
    err e;
} device_opening;

static void *open_device(void *arg)
{
    device_opening *o = arg;
    o->rc = tool_device_open(o->t, &o->d, &o->e);
    return NULL;
}

err_code run_open(run_ctx *r, const tool_ctx *t, bool need_tokenizer, err *e)
{
    device_opening o = {.t = t};
    pthread_t thread;
    memset(r, 0, sizeof *r);
    const bool apart = t->device.kind == DEV_CUDA &&
                       pthread_create(&thread, NULL, open_device, &o) == 0;
    if (!apart) open_device(&o);
    const err_code rc = apart || o.rc == OK ? open_path(r, t, need_tokenizer, e) : OK;
    if (apart) (void)pthread_join(thread, NULL);
    r->d = o.d;
    if (o.rc == OK) return rc;
    *e = o.e;
    return o.rc;
}

void run_close(run_ctx *r)
{
    model_close(&r->m);
    tokenizer_close(&r->t);
    weights_close(&r->src);
    dev_close(&r->d);
}

static err_code print_plan(const run_ctx *r, const tool_ctx *t, const model_plan *p, err *e)
{
    memory_plan m = {0};
    model_plan_log(p, &t->job, LOG_INFO);
    memory_plan_add(&m, "weights", p->weights_bytes);
    memory_plan_add(&m, "kv cache", p->kv_bytes);
    memory_plan_add(&m, "scratch", p->scratch_bytes);
    memory_plan_add(&m, "libraries", dev_footprint_of(r->d).own_bytes);
    memory_plan_add(&m, "tokenizer", r->t ? (size_t)tokenizer_vocab(r->t) * RUN_PIECE_BYTES : 0);
    memory_plan_add(&m, "process", memory_plan_process_bytes());
    return tool_print_memory(&m, t->json, e);
}

err_code run_model(run_ctx *r, const tool_ctx *t, const run_model_opts *o, int64_t session,
                   int32_t seqs, err *e)
{
    model_plan plan;
    if (o->session_len) session = o->session_len;
    if (session > INT32_MAX / 2)
        return err_set(e, E_LIMIT, "%" PRId64 " tokens: more than a session can hold", session);
    const model_opts mo = {.kv = (kv_format)atoi(o->quant_policy),
                           .session_len = (int32_t)session,
                           .max_seqs = seqs,
                           .kv_mem_bytes = o->kv_mem,
                           .kv_share = o->cache_share};
    if (!t->dry_run) return model_open(&r->m, r->d, r->src, &mo, &t->job, e);
    TRY(model_plan_make(&plan, r->d, r->src, &mo, &t->job, e));
    return print_plan(r, t, &plan, e);
}

/* ---- sampling ---- */

static err_code parse_bias(logit_bias *out, const char *text, err *e)
{
    char *end, *last;
    errno = 0;
    const long id = strtol(text, &end, 10);
    const double x = *end == '=' ? strtod(end + 1, &last) : 0;
    if (end == text || *end != '=' || last == end + 1 || *last || errno || id < 0 || id > INT32_MAX)
        return err_set(e, E_USAGE, "option '--logit-bias': expected ID=NUMBER, got '%s'", text);
    *out = (logit_bias){(int32_t)id, (float)x};
    return OK;
}

err_code run_sample(sample_opts *out, const run_sample_opts *o, uint64_t seed, logit_bias *bias,
                    err *e)
{
    *out = (sample_opts){.temperature = o->temperature,
                         .top_k = (int32_t)o->top_k,
                         .top_p = o->top_p,
                         .min_p = o->min_p,
                         .repetition_penalty = o->repetition,
                         .presence_penalty = o->presence,
                         .frequency_penalty = o->frequency,
                         .penalty_window = (int32_t)o->penalty_window,
                         .seed = seed,
                         .bias = bias,
                         .n_bias = o->bias.n};
    for (int i = 0; i < o->bias.n; i++) TRY(parse_bias(&bias[i], o->bias.v[i], e));
    return OK;
}

/* ---- texts ---- */

err_code run_parse_ids(token_list *out, const char *text, const char *option, err *e)
{
    const char *p = text;
    for (int i = 0;; i++) {
        char *end;
        errno = 0;
        const long id = strtol(p, &end, 10);
        if (end == p || errno || id < 0 || id > INT32_MAX || (*end && *end != ','))
            return err_set(e, E_USAGE, "option '--%s': number %d: expected an id, got '%.20s'",
                           option, i + 1, p);
        TRY(token_list_push(out, (int32_t)id, e));
        if (!*end) return OK;
        p = end + 1;
    }
}

static err_code read_stdin(char **out, size_t *n, err *e)
{
    char *text = NULL;
    size_t used = 0, cap = 0;
    for (;;) {
        if (used + 4096 > cap) {
            void *grown;
            cap = cap ? 2 * cap : 65536;
            const err_code rc = cap > RUN_MAX_TEXT + 65536
                                    ? err_set(e, E_LIMIT, "standard input: more than %zu bytes",
                                              RUN_MAX_TEXT)
                                    : mem_alloc(&grown, cap, 1, "standard input", e);
            if (rc != OK) {
                mem_free(text);
                return rc;
            }
            if (used) memcpy(grown, text, used);
            mem_free(text);
            text = grown;
        }
        const size_t got = fread(text + used, 1, cap - used - 1, stdin);
        used += got;
        if (got == 0) break;
    }
    if (ferror(stdin)) {
        mem_free(text);
        return err_sys(e, E_IO, errno, "cannot read standard input");
    }
    text[used] = 0;
    *out = text;
    *n = used;
    return OK;
}

err_code run_read_text(char **out, size_t *n, const char *path, err *e)
{
    if (strcmp(path, "-") == 0) return read_stdin(out, n, e);
    return file_read(out, n, path, RUN_MAX_TEXT, e);
}

err_code run_encode(token_list *out, const tokenizer *t, const char *text, size_t n,
                    bool parse_special, err *e)
{
    if (tokenizer_add_bos(t) && tokenizer_bos(t) >= 0)
        TRY(token_list_push(out, tokenizer_bos(t), e));
    return tokenizer_encode(t, text, n, parse_special, out, e);
}

err_code run_data_ids(token_list *out, const run_ctx *r, const cli_list *files, const char *dataset,
                      const run_chat_opts *o, const tool_ctx *t, err *e)
{
    chat *c = NULL;
    const corpus_read how = {.dataset = dataset, .meta_instruction = o->meta};
    err_code rc = run_chat_open(&c, r, o, t, e);
    for (int i = 0; rc == OK && i < files->n; i++)
        rc = corpus_tokens(out, files->v[i], &how, r->t, c, &t->job, e);
    chat_close(&c);
    return rc;
}

/* ---- chat ---- */

err_code run_chat_open(chat **out, const run_ctx *r, const run_chat_opts *o, const tool_ctx *t,
                       err *e)
{
    return chat_open(out, r->t, o->name, family_chat_template(weights_desc(r->src)), &t->job, e);
}

static int add_stop(int32_t *out, int n, int32_t id)
{
    for (int i = 0; i < n; i++) {
        if (out[i] == id) return n;
    }
    if (id < 0 || n == RUN_MAX_STOPS) return n;
    out[n] = id;
    return n + 1;
}

int run_stop_ids(int32_t out[RUN_MAX_STOPS], const run_ctx *r, const chat *c)
{
    const model_desc *m = weights_desc(r->src);
    int n = 0;
    if (c) return chat_stop_ids(c, m->stop, m->n_stop, out, RUN_MAX_STOPS);
    for (int i = 0; i < m->n_stop; i++) n = add_stop(out, n, m->stop[i]);
    return add_stop(out, n, tokenizer_eos(r->t));
}

static err_code answer_grow(run_answer *a, size_t more, err *e)
{
    void *p;
    if (a->n + more + 1 <= a->cap) return OK;
    const size_t cap = 2 * (a->n + more + 1) + 1024;
    TRY(mem_alloc(&p, cap, 1, "answer", e));
    if (a->n) memcpy(p, a->text, a->n);
    mem_free(a->text);
    a->text = p;
    a->cap = cap;
    return OK;
}

bool run_answer_add(void *answer, int32_t id, const char *text, size_t n)
{
    run_answer *a = answer;
    if (id >= 0 && token_list_push(&a->ids, id, &a->failed) != OK) return false;
    if (answer_grow(a, n, &a->failed) != OK) return false;
    memcpy(a->text + a->n, text, n);
    a->n += n;
    a->text[a->n] = 0;
    if (a->stream && n) {
        (void)fwrite(text, 1, n, a->stream);
        (void)fflush(a->stream);
    }
    return true;
}

void run_answer_free(run_answer *a)
{
    token_list_free(&a->ids);
    mem_free(a->text);
    memset(a, 0, sizeof *a);
}

/* ---- JSON ---- */

bool run_add_ids(cJSON *o, const char *key, const int32_t *ids, int64_t n)
{
    cJSON *list = cJSON_AddArrayToObject(o, key);
    bool filled = list != NULL;
    for (int64_t i = 0; i < n && filled; i++) {
        cJSON *id = cJSON_CreateNumber(ids[i]);
        filled = id && cJSON_AddItemToArray(list, id);
    }
    return filled;
}

err_code run_json(cJSON *o, bool filled, err *e)
{
    const err_code rc = o && filled ? tool_print_json(o, e)
                                    : err_set(e, E_NOMEM, "JSON: out of memory");
    cJSON_Delete(o);
    return rc;
}
