/* Opening a model: the plan first, then weights layer by layer, cache and scratch. */
#include "runtime/model.h"

#include <inttypes.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/model_internal.h"

#define MODEL_DEFAULT_ROWS  512
#define MODEL_DEVICE_ROWS   2048 /* on devices of their own memory: fewer passes over the weights */
#define MODEL_LOGIT_SEQS    256  /* a head over so many sequences stays one product */
#define MODEL_DEFAULT_BLOCK 64
#define MODEL_DEFAULT_SHARE 0.8
#define MODEL_HOST_EMBED    12 /* a twelfth of all weights: a larger embedding stays on the host */
#define MODEL_MAX_ROWS      65536
#define MODEL_MAX_SEQS      4096
#define MODEL_MAX_SESSION   (1 << 24)
#define MODEL_LOGIT_BYTES   ((size_t)16 << 20) /* the head runs on as many rows as fit here */

static int32_t min32(int64_t a, int64_t b) { return (int32_t)(a < b ? a : b); }

/* ---- plan ---- */

static err_code opts_range(const char *what, int64_t v, int64_t hi, err *e)
{
    if (v >= 0 && v <= hi) return OK;
    return err_set(e, E_USAGE, "%s: expected 0 to %" PRId64 ", got %" PRId64, what, hi, v);
}

static err_code opts_check(const model_opts *o, err *e)
{
    TRY(opts_range("session length", o->session_len, MODEL_MAX_SESSION, e));
    TRY(opts_range("sequences", o->max_seqs, MODEL_MAX_SEQS, e));
    TRY(opts_range("rows of a pass", o->max_rows, MODEL_MAX_ROWS, e));
    TRY(opts_range("tokens of a cache block", o->block_tokens, 1024, e));
    TRY(opts_range("cache memory", o->kv_mem_bytes, INT64_MAX / 4, e));
    if (!(o->kv_share >= 0 && o->kv_share <= 1))
        return err_set(e, E_USAGE, "share of memory for the cache: expected 0 to 1, got %g",
                       o->kv_share);
    if (o->kv != KV_16 && o->kv != KV_8 && o->kv != KV_4)
        return err_set(e, E_USAGE, "quant policy: expected 0, 8 or 4, got %d", (int)o->kv);
    return OK;
}

/* A token reads one row of the embedding: over the bus that takes microseconds, and on a device the
 * table may be a quarter of what a small model of large vocabulary takes. Where it is a small part
 * it goes there: rows of a long prompt are a percent faster. */
static void plan_embedding(model_plan *p, device *d, size_t bytes)
{
    p->embed_mapped = dev_can_map(d) && bytes >= (p->weights_bytes + bytes) / MODEL_HOST_EMBED;
    *(p->embed_mapped || dev_mem(d) == MEM_HOST ? &p->mapped_bytes : &p->weights_bytes) += bytes;
}

static err_code plan_weights(model_plan *p, device *d, weight_src *src, err *e)
{
    const model_desc *m = weights_desc(src);
    tensor embed, norm, head;
    p->weights_bytes = (size_t)m->layers * block_bind_bytes(d, m, src);
    p->mapped_bytes = (size_t)m->layers * block_mapped_bytes(d, m, src);
    size_t *rest = dev_mem(d) == MEM_HOST ? &p->mapped_bytes : &p->weights_bytes;
    TRY(weights_tensor(src, ROLE_EMBED, -1, &embed, e));
    TRY(weights_tensor(src, ROLE_FINAL_NORM, -1, &norm, e));
    TRY(weights_tensor(src, ROLE_HEAD, -1, &head, e));
    *rest += dev_upload_bytes(d, &norm) + dev_upload_bytes(d, &head);
    if (head.data != embed.data) plan_embedding(p, d, dev_upload_bytes(d, &embed)); /* else tied */
    return OK;
}

static size_t stage_count(const model_plan *p)
{
    const size_t seq_blocks = (size_t)(p->session_len / p->block_tokens + 1);
    return 2 * (size_t)p->max_rows + 3 * (size_t)p->max_seqs + 2 + 3 * (size_t)p->logit_rows +
           (size_t)p->max_seqs * seq_blocks;
}

static op_limits head_limits(const model_desc *m, const model_plan *p)
{
    return (op_limits){.rows = p->logit_rows,
                       .k = m->hidden,
                       .n = m->vocab,
                       .heads = m->heads,
                       .head_dim = m->head_dim,
                       .max_kv = 1,
                       .seqs = 1};
}

/* On the device: what one with memory of its own needs on the host besides, copies of logits and
 * tables, is not counted. */
static void plan_scratch(model_plan *p, device *d, const model_desc *m)
{
    const op_limits layer = block_limits(m, p->max_rows, p->max_seqs, p->session_len);
    const op_limits head = head_limits(m, p);
    const size_t res = dtype_bytes(dev_resid(d));
    const size_t r_block = ops_reserve_bytes(d, &layer), r_head = ops_reserve_bytes(d, &head);
    p->scratch_bytes = block_scratch_bytes(d, m, p->max_rows, p->max_seqs, p->session_len);
    p->kernel_bytes = r_head > r_block ? r_head : r_block;
    p->scratch_bytes += p->kernel_bytes - r_block;
    p->scratch_bytes += ((size_t)p->max_rows + 2 * (size_t)p->logit_rows) * (size_t)m->hidden * res;
    p->scratch_bytes += (size_t)p->logit_rows * ((size_t)m->vocab + 2) * 4 + stage_count(p) * 4 +
                        model_draws_bytes(d, m, p);
}

/* One piece of device memory for all that the model keeps but the kernels' scratch, which is the
 * device's. On top of the plan: what rounding up costs, the norms, rotary frequencies. */
static size_t pack_bytes(const model_desc *m, const model_plan *p)
{
    const size_t norms = 4 * ((size_t)m->hidden * 4 + DEV_PACK_ALIGN);
    return p->weights_bytes + p->kv_bytes + p->scratch_bytes - p->kernel_bytes +
           (size_t)m->layers * (norms + 12 * DEV_PACK_ALIGN) + (size_t)m->rope_dims * 2 +
           36 * DEV_PACK_ALIGN;
}

static size_t block_cost(const model_desc *m, const model_plan *p)
{
    const kv_opts o = {p->kv, m->layers, m->kv_heads, m->head_dim, p->block_tokens, 1, 1, 1};
    return kv_bytes(&o);
}

static err_code kv_budget(size_t *out, const model_plan *p, device *d, const model_opts *o, err *e)
{
    size_t free_bytes, total;
    if (o->kv_mem_bytes) {
        *out = (size_t)o->kv_mem_bytes;
        return OK;
    }
    TRY(dev_memory(d, &free_bytes, &total, e));
    const size_t mapped = dev_mem(d) == MEM_HOST ? p->mapped_bytes : 0;
    const size_t taken = p->weights_bytes + mapped + p->scratch_bytes;
    const double share = o->kv_share > 0 ? o->kv_share : MODEL_DEFAULT_SHARE;
    *out = free_bytes > taken ? (size_t)((double)(free_bytes - taken) * share) : 0;
    return OK;
}

static err_code plan_cache(model_plan *p, device *d, const model_desc *m, const model_opts *o,
                           const job *j, err *e)
{
    size_t budget;
    const size_t one = block_cost(m, p);
    const int64_t seq_blocks = (p->session_len + p->block_tokens - 1) / p->block_tokens;
    const int64_t want = seq_blocks * p->max_seqs;
    TRY(kv_budget(&budget, p, d, o, e));
    const int64_t fit = (int64_t)(budget / one);
    if (fit < 1)
        return err_set(e, E_LIMIT,
                       "kv cache: %d tokens need %zu bytes, the budget is %zu bytes (--kv-mem, "
                       "--cache-max-entry-count)",
                       p->block_tokens, one, budget);
    p->kv_blocks = min32(want, fit);
    p->kv_bytes = (size_t)p->kv_blocks * one;
    if (p->kv_blocks < seq_blocks) {
        p->session_len = p->kv_blocks * p->block_tokens;
        job_log(j, LOG_WARN, "session length cut to %d tokens: the cache budget is %zu bytes",
                p->session_len, budget);
    }
    return OK;
}

err_code model_plan_make(model_plan *p, device *d, weight_src *src, const model_opts *o,
                         const job *j, err *e)
{
    const model_desc *m = weights_desc(src);
    memset(p, 0, sizeof *p);
    TRY(opts_check(o, e));
    p->kv = o->kv;
    p->session_len = o->session_len ? o->session_len : m->max_tokens;
    p->max_seqs = o->max_seqs ? o->max_seqs : 1;
    p->block_tokens = o->block_tokens ? o->block_tokens : MODEL_DEFAULT_BLOCK;
    p->max_rows = o->max_rows              ? o->max_rows
                  : dev_mem(d) == MEM_HOST ? MODEL_DEFAULT_ROWS
                                           : MODEL_DEVICE_ROWS;
    p->max_rows = min32(p->max_rows, (int64_t)p->session_len * p->max_seqs);
    p->logit_rows = min32((int64_t)(MODEL_LOGIT_BYTES / (4 * (size_t)m->vocab)), p->max_rows);
    if (p->logit_rows < 8) p->logit_rows = min32(8, p->max_rows);
    const int32_t seqs = min32(p->max_seqs, MODEL_LOGIT_SEQS);
    if (p->logit_rows < seqs) p->logit_rows = min32(seqs, p->max_rows);
    if (p->session_len > m->max_tokens && m->scaling.kind != ROPE_DYNAMIC)
        job_log(j, LOG_WARN, "session length %d is beyond the model's context of %d",
                p->session_len, m->max_tokens);
    TRY(plan_weights(p, d, src, e));
    plan_scratch(p, d, m);
    return plan_cache(p, d, m, o, j, e);
}

void model_plan_log(const model_plan *p, const job *j, log_level level)
{
    const double mib = 1.0 / (1 << 20);
    job_log(j, level, "weights %.1f MiB in memory, %.1f MiB mapped", (double)p->weights_bytes * mib,
            (double)p->mapped_bytes * mib);
    job_log(j, level,
            "kv cache %.1f MiB: %d-bit, %d blocks of %d tokens, sessions of %d tokens, %d at once",
            (double)p->kv_bytes * mib, p->kv == KV_16 ? 16 : (int)p->kv, p->kv_blocks,
            p->block_tokens, p->session_len, p->max_seqs);
    job_log(j, level, "scratch %.1f MiB: %d rows a pass, logits of %d rows",
            (double)p->scratch_bytes * mib, p->max_rows, p->logit_rows);
}

/* ---- open ---- */

static err_code bind_layers(model *m, const job *j, err *e)
{
    void *p;
    TRY(mem_alloc(&p, (size_t)m->m->layers, sizeof(block), "layers", e));
    m->blocks = p;
    const bool copied = block_bind_bytes(m->d, m->m, m->src) > 0;
    for (int32_t l = 0; l < m->m->layers; l++) {
        TRY(job_check(j, e));
        weights_prefetch(m->src, l + 1 < m->m->layers && copied ? l + 1 : l);
        TRY(block_bind(&m->blocks[l], m->d, m->src, l, e));
        if (copied) weights_release(m->src, l); /* the file's pages were read once */
        job_step(j, "load", "layer", l + 1, m->m->layers);
    }
    return OK;
}

static err_code bind_ends(model *m, err *e)
{
    tensor embed, norm, head;
    TRY(weights_tensor(m->src, ROLE_EMBED, -1, &embed, e));
    TRY(weights_tensor(m->src, ROLE_FINAL_NORM, -1, &norm, e));
    TRY(weights_tensor(m->src, ROLE_HEAD, -1, &head, e));
    if (m->plan.embed_mapped)
        TRY(dev_map(m->d, &m->embed_buf, &m->embed, &embed, e));
    else
        TRY(dev_upload(m->d, &m->embed_buf, &m->embed, &embed, e));
    TRY(dev_upload(m->d, &m->norm_buf, &m->final_norm, &norm, e));
    if (head.data == embed.data) {
        m->head = m->embed;
        return OK;
    }
    return dev_upload(m->d, &m->head_buf, &m->head, &head, e);
}

static err_code open_stage(model *m, err *e)
{
    model_stage *s = &m->stage;
    const model_plan *p = &m->plan;
    void *mem;
    s->count = stage_count(p);
    TRY(mem_alloc(&mem, s->count, sizeof(int32_t), "step tables", e));
    s->base = mem;
    s->ids = s->base;
    s->pos = s->ids + p->max_rows;
    s->start = s->pos + p->max_rows;
    s->kv_len = s->start + p->max_seqs + 1;
    s->pick = s->kv_len + p->max_seqs;
    s->target = s->pick + p->logit_rows;
    s->tail_pos = s->target + p->logit_rows;
    s->tail_start = s->tail_pos + p->logit_rows;
    s->table = s->tail_start + p->max_seqs + 1;
    if (dev_mem(m->d) == MEM_HOST) return OK;
    return dev_alloc(&s->dev, m->d, s->count * sizeof(int32_t), "step tables", e);
}

static err_code open_host_outputs(model *m, err *e)
{
    const size_t rows = (size_t)m->plan.logit_rows;
    void *p;
    if (dev_mem(m->d) == MEM_HOST) {
        m->nll_host = m->nll_buf.data;
        m->best_host = m->best_buf.data;
        return OK;
    }
    TRY(dev_host_alloc(&p, m->d, rows * (size_t)m->m->vocab * sizeof(float), "logits", e));
    m->logits_host = p;
    TRY(dev_host_alloc(&p, m->d, rows * sizeof(float), "losses", e));
    m->nll_host = p;
    TRY(dev_host_alloc(&p, m->d, rows * sizeof(int32_t), "best ids", e));
    m->best_host = p;
    return model_draws_open(m, e);
}

static err_code open_scratch(model *m, err *e)
{
    const model_plan *p = &m->plan;
    const size_t res = dtype_bytes(dev_resid(m->d)), rows = (size_t)p->logit_rows;
    const size_t row = (size_t)m->m->hidden * res;
    const op_limits head = head_limits(m->m, p);
    TRY(block_scratch_open(&m->scratch, m->d, m->m, p->max_rows, p->max_seqs, p->session_len, e));
    TRY(ops_reserve(m->d, &head, e));
    TRY(dev_alloc(&m->x_buf, m->d, (size_t)p->max_rows * row, "hidden states", e));
    TRY(dev_alloc(&m->pick_buf, m->d, 2 * rows * row, "hidden states", e));
    TRY(dev_alloc(&m->logits_buf, m->d, rows * (size_t)m->m->vocab * sizeof(float), "logits", e));
    TRY(dev_alloc(&m->nll_buf, m->d, rows * sizeof(float), "losses", e));
    TRY(dev_alloc(&m->best_buf, m->d, rows * sizeof(int32_t), "best ids", e));
    TRY(open_host_outputs(m, e));
    return open_stage(m, e);
}

static err_code open_slots(model *m, err *e)
{
    const model_plan *p = &m->plan;
    const size_t n = (size_t)p->max_seqs;
    const kv_opts o = {p->kv,           m->m->layers, m->m->kv_heads, m->m->head_dim,
                       p->block_tokens, p->kv_blocks, p->max_seqs,    p->session_len};
    void *mem;
    TRY(kv_open(&m->cache, m->d, &o, e));
    m->seq_blocks = (p->session_len + p->block_tokens - 1) / p->block_tokens;
    TRY(mem_alloc(&mem, n, sizeof(int32_t), "slots", e));
    m->len = mem;
    TRY(mem_alloc(&mem, n, sizeof(int32_t), "slots", e));
    m->rope_len = mem;
    TRY(mem_alloc(&mem, n, sizeof(bool), "slots", e));
    m->busy = mem;
    return OK;
}

static err_code open_rope(model *m, err *e)
{
    const size_t n = (size_t)m->m->rope_dims / 2;
    void *mem;
    TRY(mem_alloc(&mem, n, sizeof(float), "rotary frequencies", e));
    m->inv_freq = mem;
    if (dev_mem(m->d) != MEM_HOST)
        TRY(dev_alloc(&m->inv_freq_buf, m->d, n * sizeof(float), "rotary frequencies", e));
    m->rope.inv_freq = tensor_1d(m->inv_freq_buf.data ? m->inv_freq_buf.data : (void *)m->inv_freq,
                                 DT_F32, (int64_t)n);
    m->rope.inv_freq.mem = dev_mem(m->d);
    m->rope.dims = m->m->rope_dims;
    m->rope.interleaved = m->m->rope_interleaved;
    m->rope_tokens = -1;
    return model_rope_set(m, m->m->max_tokens, e);
}

err_code model_rope_set(model *m, int32_t n_tokens, err *e)
{
    if (n_tokens == m->rope_tokens) return OK;
    model_inv_freq(m->m, n_tokens, m->inv_freq, &m->rope.mscale);
    m->rope_tokens = n_tokens;
    if (!m->inv_freq_buf.data) return OK;
    const tensor host = tensor_1d(m->inv_freq, DT_F32, m->rope.inv_freq.shape[0]);
    return dev_copy(m->d, &m->rope.inv_freq, &host, e);
}

err_code model_open(model **out, device *d, weight_src *src, const model_opts *o, const job *j,
                    err *e)
{
    model_plan plan;
    void *p;
    err_code rc;
    *out = NULL;
    TRY(model_plan_make(&plan, d, src, o, j, e));
    model_plan_log(&plan, j, LOG_DEBUG);
    TRY(mem_alloc(&p, 1, sizeof(model), "model", e));
    model *m = p;
    m->d = d;
    m->src = src;
    m->m = weights_desc(src);
    m->plan = plan;
    if ((rc = dev_pack_begin(d, pack_bytes(m->m, &plan), "model", e)) != OK) goto done;
    if ((rc = bind_layers(m, j, e)) != OK) goto done;
    if ((rc = bind_ends(m, e)) != OK) goto done;
    if ((rc = dev_upload_end(d, e)) != OK) goto done;
    if ((rc = open_slots(m, e)) != OK) goto done;
    if ((rc = open_scratch(m, e)) != OK) goto done;
    if ((rc = open_rope(m, e)) != OK) goto done;
    if ((rc = model_ahead_open(m, e)) != OK) goto done;
    *out = m;
    m = NULL;
done:
    dev_pack_end(d);
    model_close(&m);
    return rc;
}

void model_close(model **mp)
{
    if (!mp || !*mp) return;
    model *m = *mp;
    for (int i = 0; i < MODEL_RECORDINGS; i++) dev_graph_free(&m->recordings[i].work);
    for (int32_t l = 0; m->blocks && l < m->m->layers; l++) block_free(&m->blocks[l]);
    mem_free(m->blocks);
    block_scratch_close(&m->scratch);
    kv_close(&m->cache);
    dev_buf *bufs[] = {&m->embed_buf,  &m->norm_buf, &m->head_buf, &m->x_buf,        &m->pick_buf,
                       &m->logits_buf, &m->nll_buf,  &m->best_buf, &m->inv_freq_buf, &m->stage.dev};
    if (dev_mem(m->d) != MEM_HOST) {
        dev_host_free(m->d, m->nll_host);
        dev_host_free(m->d, m->best_host);
        dev_host_free(m->d, m->logits_host);
    }
    model_draws_close(m);
    model_ahead_close(m);
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    mem_free(m->stage.base);
    mem_free(m->len);
    mem_free(m->rope_len);
    mem_free(m->busy);
    mem_free(m->inv_freq);
    mem_free(m);
    *mp = NULL;
}

/* ---- questions ---- */

const model_desc *model_desc_of(const model *m) { return m->m; }

const model_plan *model_plan_of(const model *m) { return &m->plan; }

device *model_device(const model *m) { return m->d; }

int32_t model_session_len(const model *m) { return m->plan.session_len; }

size_t model_token_bytes(const model *m, int32_t context)
{
    size_t sum = tensor_bytes(&m->head) + tensor_bytes(&m->final_norm);
    for (int32_t l = 0; l < m->m->layers; l++) sum += block_read_bytes(&m->blocks[l]);
    sum += (size_t)m->m->hidden * dtype_bytes(m->embed.dt);
    const size_t kv_block = block_cost(m->m, &m->plan);
    return sum + kv_block / (size_t)m->plan.block_tokens * (size_t)context;
}
