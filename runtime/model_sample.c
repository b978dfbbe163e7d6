/* Draws on the device: a sampler's next draw becomes a row of numbers, the logits stay where they
 * are, and only ids come back. */
#include <string.h>

#include "base/mem.h"
#include "runtime/model_internal.h"

#define BIAS_BYTES (SAMPLE_MAX_BIAS * sizeof(sample_bias))

bool model_samples(const model *m, const sample_opts *o)
{
    return m->draws.rows && o->n_bias <= SAMPLE_MAX_BIAS;
}

size_t model_draws_bytes(const device *d, const model_desc *m, const model_plan *p)
{
    if (!dev_samples(d)) return 0;
    return (size_t)p->max_seqs * 2 * (size_t)m->vocab * sizeof(int32_t) +
           (size_t)p->logit_rows * (sizeof(sample_row) + BIAS_BYTES + sizeof(int32_t));
}

err_code model_draws_open(model *m, err *e)
{
    model_draws *w = &m->draws;
    const size_t rows = (size_t)m->plan.logit_rows;
    const size_t counts = (size_t)m->plan.max_seqs * 2 * (size_t)m->m->vocab * sizeof(int32_t);
    void *p;
    if (!dev_samples(m->d)) return OK;
    TRY(dev_alloc(&w->counts, m->d, counts, "counts of ids", e));
    TRY(dev_alloc(&w->rows_dev, m->d, rows * sizeof(sample_row), "draws", e));
    TRY(dev_alloc(&w->bias_dev, m->d, rows * BIAS_BYTES, "draws", e));
    TRY(dev_alloc(&w->ids_dev, m->d, rows * sizeof(int32_t), "drawn ids", e));
    TRY(mem_alloc(&p, rows, BIAS_BYTES, "draws", e));
    w->bias = p;
    TRY(dev_host_alloc(&p, m->d, rows * sizeof(int32_t), "drawn ids", e));
    w->ids = p;
    TRY(mem_alloc(&p, rows, sizeof(sample_row), "draws", e));
    w->rows = p;
    return OK;
}

void model_draws_close(model *m)
{
    model_draws *w = &m->draws;
    dev_buf *bufs[] = {&w->counts, &w->rows_dev, &w->bias_dev, &w->ids_dev};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    mem_free(w->rows);
    mem_free(w->bias);
    dev_host_free(m->d, w->ids);
    memset(w, 0, sizeof *w);
}

static tensor view(const model *m, const dev_buf *buf, dtype dt, int64_t n0, int64_t n1)
{
    tensor t = tensor_2d(buf->data, dt, n0, n1);
    t.mem = dev_mem(m->d);
    return t;
}

/* The host's counts of a sampler to its slot: once a sequence, when penalties look at them. */
static err_code send_counts(model *m, int32_t slot, const sampler *s, err *e)
{
    const int64_t n = 2 * (int64_t)m->m->vocab;
    const tensor src = tensor_1d((void *)(uintptr_t)sampler_counts(s), DT_I32, n);
    tensor dst = tensor_1d((int32_t *)m->draws.counts.data + n * slot, DT_I32, n);
    dst.mem = dev_mem(m->d);
    return dev_copy(m->d, &dst, &src, e);
}

err_code model_draw_fill(model *m, int32_t i, const step_seq *s, err *e)
{
    sample_row *r = &m->draws.rows[i];
    bool send;
    if (!m->draws.rows) return OK;
    memset(r, 0, sizeof *r);
    if (!s->picked) return OK;
    sampler_row(s->sampler, r, m->draws.bias + (size_t)i * SAMPLE_MAX_BIAS, &send);
    if (r->state >= 0) r->state = s->slot;
    return send ? send_counts(m, s->slot, s->sampler, e) : OK;
}

/* Rows, and biases where there are any, to the device. */
err_code model_draw_send(model *m, int32_t n, err *e)
{
    const model_draws *w = &m->draws;
    bool biased = false;
    for (int32_t i = 0; i < n; i++) biased = biased || w->rows[i].n_bias > 0;
    const tensor rows = tensor_2d(w->rows, DT_U8, n, sizeof(sample_row)),
                 bias = tensor_2d(w->bias, DT_U8, n, BIAS_BYTES);
    tensor rows_dev = view(m, &w->rows_dev, DT_U8, n, sizeof(sample_row)),
           bias_dev = view(m, &w->bias_dev, DT_U8, n, BIAS_BYTES);
    TRY(dev_copy(m->d, &rows_dev, &rows, e));
    return biased ? dev_copy(m->d, &bias_dev, &bias, e) : OK;
}

err_code model_draw_run(model *m, int32_t n, tensor *logits, err *e)
{
    const model_draws *w = &m->draws;
    const tensor rows = view(m, &w->rows_dev, DT_U8, n, sizeof(sample_row)),
                 bias = view(m, &w->bias_dev, DT_U8, n, BIAS_BYTES);
    tensor ids = tensor_1d(w->ids_dev.data, DT_I32, n);
    tensor counts = {.data = w->counts.data,
                     .dt = DT_I32,
                     .mem = dev_mem(m->d),
                     .ndim = 3,
                     .shape = {m->plan.max_seqs, 2, m->m->vocab},
                     .stride = {2 * (int64_t)m->m->vocab, m->m->vocab, 1}};
    ids.mem = dev_mem(m->d);
    return op_sample(m->d, &ids, logits, &rows, &bias, &counts, e);
}

err_code model_draw_fetch(model *m, int32_t n, err *e)
{
    tensor src = tensor_1d(m->draws.ids_dev.data, DT_I32, n),
           dst = tensor_1d(m->draws.ids, DT_I32, n);
    src.mem = dev_mem(m->d);
    return dev_copy(m->d, &dst, &src, e);
}
