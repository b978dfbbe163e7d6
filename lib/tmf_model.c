/* Models: opened with options, and what is known of them. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/family.h"
#include "lib/tmf_internal.h"

#define SESSION_DEFAULT 8192 /* tokens: models of long contexts would plan gigabytes of cache */

_Static_assert(TMF_E_BUSY == (int)E_BUSY && TMF_E_LIMIT == (int)E_LIMIT &&
                   TMF_E_USAGE == (int)E_USAGE,
               "tmf_status is err_code");

const char *tmf_version(void) { return TMF_VERSION; }

/* The first `size` bytes of what a struct is by default: callers may know an older, shorter one. */
static void init(void *out, size_t size, const void *from, size_t whole)
{
    memset(out, 0, size);
    memcpy(out, from, size < whole ? size : whole);
    memcpy(out, &size, sizeof size);
}

void tmf_options_init(tmf_options *o, size_t size)
{
    const tmf_options d = {.device = "cpu",
                           .cache_max_entry_count = 0.8,
                           .max_batch = 32,
                           .prefill_tokens = 512,
                           .prefix_cache = 1,
                           .log_level = 1};
    init(o, size, &d, sizeof d);
}

/* ---- opening ---- */

static void on_log(void *ud, log_level level, const char *line)
{
    const tmf_model *m = ud;
    m->log(m->log_ud, (int)level, line);
}

static err_code parse_device(dev_opts *d, const tmf_options *o, err *e)
{
    const char *name = o->device ? o->device : "cpu";
    char *end;
    d->threads = o->threads;
    d->deterministic = o->deterministic || strcmp(name, "cpu") == 0;
    if (strcmp(name, "cpu") == 0) return OK;
    d->kind = DEV_CUDA;
    if (strcmp(name, "cuda") == 0) return OK;
    if (strncmp(name, "cuda:", 5) == 0 && name[5] >= '0' && name[5] <= '9') {
        const long index = strtol(name + 5, &end, 10);
        d->index = (int32_t)index;
        if (!*end && index < 1024) return OK;
    }
    return err_set(e, E_USAGE, "device: expected cpu, cuda or cuda:INDEX, got '%.32s'", name);
}

static err_code check(const tmf_options *o, err *e)
{
    if (o->quant_policy != 0 && o->quant_policy != 4 && o->quant_policy != 8)
        return err_set(e, E_USAGE, "quant_policy: expected 0, 4 or 8, got %d", o->quant_policy);
    if (o->cache_bytes < 0 || !(o->cache_max_entry_count > 0 && o->cache_max_entry_count <= 1))
        return err_set(e, E_USAGE, "cache_max_entry_count: expected above 0, up to 1, got %g",
                       o->cache_max_entry_count);
    if (o->session_len < 0 || o->session_len > 1 << 24)
        return err_set(e, E_USAGE, "session_len: expected 0 to %d, got %d", 1 << 24,
                       o->session_len);
    if (o->max_batch < 1 || o->max_batch > 4096)
        return err_set(e, E_USAGE, "max_batch: expected 1 to 4096, got %d", o->max_batch);
    if (o->prefill_tokens < 0 || o->prefill_tokens > 1 << 20 || o->threads < 0)
        return err_set(e, E_USAGE, "prefill_tokens or threads out of range: %d, %d",
                       o->prefill_tokens, o->threads);
    return OK;
}

static err_code open_texts(tmf_model *m, const tmf_options *o, err *e)
{
    const model_desc *d = weights_desc(m->src);
    TRY(tokenizer_open(&m->t, weights_tokenizer_dir(m->src), e));
    if (tokenizer_vocab(m->t) > d->vocab)
        return err_set(e, E_INPUT, "'%s': the tokenizer has ids up to %d, the model knows %d",
                       weights_tokenizer_dir(m->src), tokenizer_vocab(m->t) - 1, d->vocab);
    for (int32_t id = 0; id < tokenizer_vocab(m->t); id++) {
        size_t n;
        (void)tokenizer_string(m->t, id, &n);
        if (n > m->piece_bytes) m->piece_bytes = n;
    }
    TRY(chat_open(&m->c, m->t, o->chat_template, family_chat_template(d), &m->j, e));
    m->n_stops = chat_stop_ids(m->c, d->stop, d->n_stop, m->stops, TMF_MAX_STOPS);
    return grammar_set_open(&m->grammars, m->t, e);
}

static err_code open_engine(tmf_model *m, const tmf_options *o, err *e)
{
    const int32_t context = weights_desc(m->src)->max_tokens;
    const int32_t session = context < SESSION_DEFAULT ? context : SESSION_DEFAULT;
    const model_opts mo = {.kv = (kv_format)o->quant_policy,
                           .session_len = o->session_len ? o->session_len : session,
                           .max_seqs = o->max_batch,
                           .kv_mem_bytes = o->cache_bytes,
                           .kv_share = o->cache_max_entry_count};
    const engine_opts eo = {.prefill_tokens = o->prefill_tokens,
                            .no_prefix_cache = !o->prefix_cache};
    TRY(model_open(&m->m, m->d, m->src, &mo, &m->j, e));
    m->max_batch = model_plan_of(m->m)->max_seqs;
    return engine_open(&m->g, m->m, &eo, &m->j, e);
}

static err_code open_all(tmf_model *m, const char *path, const tmf_options *o, err *e)
{
    dev_opts d = {0};
    TRY(check(o, e));
    TRY(parse_device(&d, o, e));
    m->log = o->log;
    m->log_ud = o->log_ud;
    m->j = (job){.log = o->log ? on_log : NULL, .ud = m, .level = (log_level)o->log_level};
    TRY(dev_open(&m->d, &d, e));
    TRY(weights_open(&m->src, path, e));
    TRY(open_texts(m, o, e));
    return open_engine(m, o, e);
}

tmf_status tmf_open(tmf_model **out, const char *path, const tmf_options *o, tmf_error *e)
{
    tmf_options all;
    void *p;
    err failed;
    *out = NULL;
    tmf_options_init(&all, sizeof all);
    if (o) memcpy(&all, o, o->size < sizeof all ? o->size : sizeof all);
    if (mem_alloc(&p, 1, sizeof(tmf_model), "model", &failed) != OK) return tmf_told(&failed, e);
    tmf_model *m = p;
    if (open_all(m, path, &all, &failed) != OK) {
        tmf_close(&m);
        return tmf_told(&failed, e);
    }
    *out = m;
    return TMF_OK;
}

void tmf_close(tmf_model **out)
{
    tmf_model *m = out ? *out : NULL;
    if (!m) return;
    engine_close(&m->g);
    model_close(&m->m);
    grammar_set_close(&m->grammars);
    chat_close(&m->c);
    tokenizer_close(&m->t);
    weights_close(&m->src);
    dev_close(&m->d);
    mem_free(m);
    *out = NULL;
}

void tmf_info_get(const tmf_model *m, tmf_info *i, size_t size)
{
    const model_desc *d = model_desc_of(m->m);
    const model_plan *p = model_plan_of(m->m);
    const tmf_info all = {.session_len = p->session_len,
                          .max_batch = m->max_batch,
                          .vocab = d->vocab,
                          .kv_bits = p->kv == KV_16 ? 16 : (int32_t)p->kv,
                          .weight_bits = d->w4_group ? 4 : 16,
                          .bos_id = tokenizer_bos(m->t),
                          .eos_id = tokenizer_eos(m->t),
                          .architecture = d->architecture,
                          .device = dev_name(m->d),
                          .chat_template = chat_name(m->c)};
    init(i, size, &all, sizeof all);
}
