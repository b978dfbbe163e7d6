/* The step: sequences are laid out as rows, cut into passes of at most max_rows, each pass goes
 * through all blocks, and the head runs on the rows that somebody wants. */
#include <assert.h>
#include <inttypes.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/model_internal.h"

/* Where the next pass begins: token `off` of sequence `i`. */
typedef struct {
    int i;
    int32_t off;
} cursor;

/* A view of staged integers on the device, copied there first when it is not the host and they are
 * not `there` already. */
static err_code staged(model *m, tensor *out, int32_t *host, int ndim, int64_t n0, int64_t n1,
                       bool there, err *e)
{
    *out = ndim == 1 ? tensor_1d(host, DT_I32, n0) : tensor_2d(host, DT_I32, n0, n1);
    if (dev_mem(m->d) == MEM_HOST) return OK;
    const tensor src = *out;
    out->data = (int32_t *)m->stage.dev.data + (host - m->stage.base);
    out->mem = dev_mem(m->d);
    return there ? OK : dev_copy(m->d, out, &src, e);
}

/* Hidden states: `rows` rows from byte row `at_row` of rows as wide as the residual stream's. */
static tensor hidden_2d(const model *m, const dev_buf *buf, int64_t at_row, int64_t rows, dtype dt)
{
    const int64_t cols = m->m->hidden;
    const size_t row = (size_t)cols * dtype_bytes(dev_resid(m->d));
    tensor t = tensor_2d((char *)buf->data + (size_t)at_row * row, dt, rows, cols);
    t.mem = dev_mem(m->d);
    return t;
}

/* ---- before and after ---- */

static err_code check_seq(const model *m, const step_seq *s, err *e)
{
    if (s->slot < 0 || s->slot >= m->plan.max_seqs)
        return err_set(e, E_LIMIT, "step: slot: expected 0 to %d, got %d", m->plan.max_seqs - 1,
                       s->slot);
    if (m->busy[s->slot]) return err_set(e, E_USAGE, "step: slot %d: given twice", s->slot);
    if (s->n_tokens < 1 || s->n_out < 0 || s->n_out > s->n_tokens)
        return err_set(e, E_USAGE, "step: slot %d: %d tokens with %d outputs", s->slot, s->n_tokens,
                       s->n_out);
    if (s->picked && (s->n_out != 1 || !m->draws.rows))
        return err_set(e, E_USAGE, "step: slot %d: a draw with %d outputs on %s", s->slot, s->n_out,
                       dev_name(m->d));
    for (int32_t i = 0; i < s->n_tokens; i++) {
        if (s->tokens[i] < 0 || s->tokens[i] >= m->m->vocab)
            return err_set(e, E_INPUT, "step: token %d: expected an id from 0 to %d, got %d", i,
                           m->m->vocab - 1, s->tokens[i]);
    }
    for (int32_t i = 0; s->nll && i < s->n_out; i++) {
        if (s->targets[i] < 0 || s->targets[i] >= m->m->vocab)
            return err_set(e, E_INPUT, "step: target %d: expected an id from 0 to %d, got %d", i,
                           m->m->vocab - 1, s->targets[i]);
    }
    return OK;
}

static void forget(model *m, const step_seq *seqs, int n)
{
    model_ahead_drop(m);
    for (int i = 0; i < n; i++) kv_truncate(m->cache, seqs[i].slot, m->len[seqs[i].slot]);
}

/* Checks everything and reserves cache for all sequences, or for none. */
static err_code prepare(model *m, const step_seq *seqs, int n, err *e)
{
    err_code rc = OK;
    int taken = 0;
    for (int i = 0; i < n && rc == OK; i++) {
        if ((rc = check_seq(m, &seqs[i], e)) != OK) break;
        m->busy[seqs[i].slot] = true;
        taken = i + 1;
    }
    for (int i = 0; i < taken; i++) m->busy[seqs[i].slot] = false;
    if (rc != OK) return rc;
    for (int i = 0; i < n && rc == OK; i++) {
        const int32_t len = m->len[seqs[i].slot];
        if (seqs[i].n_tokens > m->plan.session_len - len)
            rc = err_set(e, E_LIMIT, "session full: %d tokens held, %d more, at most %d", len,
                         seqs[i].n_tokens, m->plan.session_len);
        else
            rc = kv_reserve(m->cache, seqs[i].slot, len + seqs[i].n_tokens, e);
        if (rc == OK && len == 0 && !m->lent) m->rope_len[seqs[i].slot] = seqs[i].n_tokens;
    }
    if (rc != OK) forget(m, seqs, n);
    return rc;
}

/* ---- one pass ---- */

/* Dynamic NTK fixes a sequence's frequencies at its start: sequences of other frequencies wait for
 * the next pass. All other kinds share one table. */
int32_t model_seq_variant(const model *m, int32_t prompt_tokens)
{
    const int32_t max = m->m->max_tokens;
    if (m->m->scaling.kind != ROPE_DYNAMIC) return max;
    return prompt_tokens > max ? prompt_tokens : max;
}

static int32_t rope_key(const model *m, int32_t slot)
{
    return model_seq_variant(m, m->rope_len[slot]);
}

static void add_rows(model *m, const step_seq *s, int at, int32_t off, int32_t take, model_pass *p)
{
    const int32_t held = m->len[s->slot] + off;
    int32_t n_blocks;
    const int32_t *blocks = kv_block_list(m->cache, s->slot, &n_blocks);
    memcpy(m->stage.ids + p->rows, s->tokens + off, (size_t)take * sizeof(int32_t));
    for (int32_t i = 0; i < take; i++) m->stage.pos[p->rows + i] = held + i;
    m->stage.start[at] = p->rows;
    m->stage.start[at + 1] = p->rows + take;
    m->stage.kv_len[at] = held + take;
    memcpy(m->stage.table + (size_t)at * (size_t)m->seq_blocks, blocks,
           (size_t)n_blocks * sizeof(int32_t));
    p->rows += take;
    if (take > p->max_q) p->max_q = take;
    if (held + take > p->max_kv) p->max_kv = held + take;
}

/* Fills the tables with the next rows and moves the cursor behind them. */
static model_pass next_pass(model *m, const step_seq *seqs, int n, cursor *c)
{
    model_pass p = {.first = c->i, .off = c->off, .tail = -1};
    const int32_t key = rope_key(m, seqs[c->i].slot);
    while (c->i < n && p.rows < m->plan.max_rows) {
        const step_seq *s = &seqs[c->i];
        const int32_t room = m->plan.max_rows - p.rows, left = s->n_tokens - c->off;
        const int32_t take = left < room ? left : room;
        if (rope_key(m, s->slot) != key) break;
        add_rows(m, s, p.n++, c->off, take, &p);
        c->off += take;
        if (c->off < s->n_tokens) break;
        c->i++;
        c->off = 0;
    }
    return p;
}

/* The pass's tables as the device sees them; copied there before unless `there`. */
static err_code stage_rows(model *m, const model_pass *p, bool there, tensor *ids, batch_rows *rows,
                           err *e)
{
    *rows = (batch_rows){.seqs = p->n, .max_q = p->max_q, .max_kv = p->max_kv};
    TRY(staged(m, ids, m->stage.ids, 1, p->rows, 0, there, e));
    TRY(staged(m, &rows->pos, m->stage.pos, 1, p->rows, 0, there, e));
    TRY(staged(m, &rows->seq_start, m->stage.start, 1, p->n + 1, 0, there, e));
    TRY(staged(m, &rows->kv_len, m->stage.kv_len, 1, p->n, 0, there, e));
    return staged(m, &rows->block_table, m->stage.table, 2, p->n, m->seq_blocks, there, e);
}

/* ---- outputs of a pass ---- */

/* An output row: row `row` of the pass is output `out` of `s`. */
typedef struct {
    const step_seq *s;
    int32_t row, out;
} wanted;

/* Walks the wanted rows of a pass in order. */
typedef struct {
    const step_seq *seqs;
    const model_pass *p;
    const int32_t *start; /* [n+1] rows of the pass */
    int at;               /* sequence within the pass */
    int32_t row;          /* next row of the pass to look at */
} out_iter;

static bool out_next(out_iter *it, wanted *w)
{
    for (; it->at < it->p->n; it->at++) {
        const step_seq *s = &it->seqs[it->p->first + it->at];
        const int32_t begin = it->start[it->at], end = it->start[it->at + 1];
        const int32_t off = it->at == 0 ? it->p->off : 0; /* token of the first row */
        const int32_t first = begin + (s->n_tokens - s->n_out) - off;
        if (it->row < begin) it->row = begin;
        if (it->row < first) it->row = first;
        if (it->row >= end) continue;
        *w = (wanted){s, it->row, it->row - first};
        it->row++;
        return true;
    }
    return false;
}

/* ---- the last block ---- */

/* Where few rows of a pass are wanted, only those go through the attention, projection and
 * feed-forward of the last block: of a prompt that is one row. Fills the tables of the tail when it
 * pays. */
static void plan_tail(model *m, const step_seq *seqs, model_pass *p)
{
    const int32_t fit = block_tail_rows(m->m, m->plan.max_rows), most = p->rows / 2;
    out_iter it = {.seqs = seqs, .p = p, .start = m->stage.start};
    int32_t n = 0, at = 0;
    wanted w;
    m->stage.tail_start[0] = 0;
    while (out_next(&it, &w)) {
        if (n == fit || n == most || n == m->plan.logit_rows) return;
        for (; at < it.at; at++) m->stage.tail_start[at + 1] = n;
        m->stage.pick[n] = w.row;
        m->stage.tail_pos[n++] = m->stage.pos[w.row];
    }
    for (; at < p->n; at++) m->stage.tail_start[at + 1] = n;
    p->tail_q = 0;
    for (at = 0; at < p->n; at++) {
        const int32_t q = m->stage.tail_start[at + 1] - m->stage.tail_start[at];
        if (q == 0 && n > 0) return; /* kernels see sequences with rows only */
        if (q > p->tail_q) p->tail_q = q;
    }
    p->tail = n;
}

/* The last block for the rows of the tail, which land in pick_buf. */
static err_code run_tail(model *m, const model_pass *p, const tensor *x, const batch_rows *rows,
                         bool there, err *e)
{
    const int32_t last = m->m->layers - 1;
    const kv_layer kv = kv_layer_view(m->cache, last);
    tensor out = hidden_2d(m, &m->pick_buf, 0, p->tail, dev_resid(m->d)), pick;
    batch_rows picked = *rows;
    picked.max_q = p->tail_q;
    TRY(staged(m, &pick, m->stage.pick, 1, p->tail, 0, there, e));
    TRY(staged(m, &picked.pos, m->stage.tail_pos, 1, p->tail, 0, there, e));
    TRY(staged(m, &picked.seq_start, m->stage.tail_start, 1, p->n + 1, 0, there, e));
    return block_forward_tail(&m->blocks[last], m->d, m->scratch, &m->rope, x, &out, &pick, &kv,
                              rows, &picked, e);
}

err_code model_blocks_run(model *m, const model_pass *p, bool there, const job *j, err *e)
{
    batch_rows rows;
    tensor ids, x = hidden_2d(m, &m->x_buf, 0, p->rows, dev_resid(m->d));
    const int32_t whole = m->m->layers - (p->tail >= 0 ? 1 : 0);
    TRY(stage_rows(m, p, there, &ids, &rows, e));
    TRY(op_embed(m->d, &x, &m->embed, &ids, e));
    for (int32_t l = 0; l < whole; l++) {
        const kv_layer kv = kv_layer_view(m->cache, l);
        TRY(job_check(j, e));
        TRY(block_forward(&m->blocks[l], m->d, m->scratch, &m->rope, &x, &kv, &rows, NULL, NULL,
                          e));
    }
    return p->tail >= 0 ? run_tail(m, p, &x, &rows, there, e) : OK;
}

model_needs model_needs_of(model_needs had, const step_seq *s)
{
    return (model_needs){had.logits || s->logits, had.nll || s->nll, had.best || s->argmax,
                         had.draw || s->picked};
}

static tensor outputs_1d(const model *m, const dev_buf *buf, dtype dt, int64_t n)
{
    tensor t = tensor_1d(buf->data, dt, n);
    t.mem = dev_mem(m->d);
    return t;
}

static err_code score_ops(model *m, int32_t n, bool there, const tensor *logits, err *e)
{
    tensor nll = outputs_1d(m, &m->nll_buf, DT_F32, n),
           best = outputs_1d(m, &m->best_buf, DT_I32, n), target;
    TRY(staged(m, &target, m->stage.target, 1, n, 0, there, e));
    return op_nll(m->d, &nll, &best, logits, &target, e);
}

err_code model_head_run(model *m, int32_t n, const dev_buf *from, model_needs want, bool there,
                        tensor *logits, err *e)
{
    const tensor x = hidden_2d(m, &m->x_buf, 0, m->plan.max_rows, dev_resid(m->d));
    tensor rows = hidden_2d(m, from ? from : &m->pick_buf, 0, n, dev_resid(m->d)), pick;
    tensor normed = hidden_2d(m, &m->pick_buf, m->plan.logit_rows, n, dev_act(m->d));
    *logits = tensor_2d(m->logits_buf.data, DT_F32, n, m->m->vocab);
    logits->mem = dev_mem(m->d);
    if (!from) {
        TRY(staged(m, &pick, m->stage.pick, 1, n, 0, there, e));
        TRY(op_embed(m->d, &rows, &x, &pick, e)); /* a gather of rows */
    }
    TRY(op_rmsnorm(m->d, &normed, &rows, &m->final_norm, m->m->norm_eps, e));
    TRY(op_gemm(m->d, logits, &normed, &m->head, NULL, false, e));
    if (want.nll || want.best) TRY(score_ops(m, n, there, logits, e));
    return want.draw ? model_draw_run(m, n, logits, e) : OK;
}

/* Losses and best ids of the first n rows to the host. */
static err_code fetch_scores(model *m, int32_t n, model_needs want, err *e)
{
    if (dev_mem(m->d) == MEM_HOST) return OK;
    const tensor nll = outputs_1d(m, &m->nll_buf, DT_F32, n),
                 best = outputs_1d(m, &m->best_buf, DT_I32, n);
    tensor nll_host = tensor_1d(m->nll_host, DT_F32, n),
           best_host = tensor_1d(m->best_host, DT_I32, n);
    if (want.nll) TRY(dev_copy(m->d, &nll_host, &nll, e));
    return want.best ? dev_copy(m->d, &best_host, &best, e) : OK;
}

/* Brings the logits of rows that need them to the host; *host points at row 0. */
static err_code fetch_logits(model *m, out_iter it, const tensor *logits, int32_t n,
                             const float **host, err *e)
{
    wanted w;
    *host = logits->data;
    if (dev_mem(m->d) == MEM_HOST) return OK;
    *host = m->logits_host;
    for (int32_t i = 0; i < n && out_next(&it, &w); i++) {
        const tensor row = tensor_rows(logits, i, 1);
        tensor copy = tensor_2d(m->logits_host + (size_t)i * (size_t)m->m->vocab, DT_F32, 1,
                                m->m->vocab);
        if (w.s->logits) TRY(dev_copy(m->d, &copy, &row, e));
    }
    return OK;
}

static void deliver(const model *m, const wanted *w, int32_t i, const float *logits)
{
    const size_t v = (size_t)m->m->vocab;
    if (w->s->logits)
        memcpy(w->s->logits + (size_t)w->out * v, logits + (size_t)i * v, v * sizeof(float));
    if (w->s->argmax) w->s->argmax[w->out] = m->best_host[i];
    if (w->s->nll) w->s->nll[w->out] = m->nll_host[i];
    if (w->s->picked) *w->s->picked = m->draws.ids[i];
}

/* What head_ops left, handed out to the next n rows of `it`. */
static err_code finish_head(model *m, out_iter it, const tensor *logits, int32_t n,
                            model_needs want, err *e)
{
    const float *host = NULL;
    wanted w;
    TRY(fetch_scores(m, n, want, e));
    if (want.draw) TRY(model_draw_fetch(m, n, e));
    if (want.logits) TRY(fetch_logits(m, it, logits, n, &host, e));
    TRY(dev_sync(m->d, e));
    for (int32_t i = 0; i < n && out_next(&it, &w); i++) deliver(m, &w, i, host);
    return OK;
}

err_code model_head_finish(model *m, const step_seq *seqs, const model_pass *p, model_needs want,
                           err *e)
{
    const out_iter it = {.seqs = seqs, .p = p, .start = m->stage.start};
    tensor logits = tensor_2d(m->logits_buf.data, DT_F32, p->n, m->m->vocab);
    logits.mem = dev_mem(m->d);
    return finish_head(m, it, &logits, p->n, want, e);
}

static err_code run_head(model *m, out_iter it, int32_t n, model_needs want, err *e)
{
    tensor logits;
    if (want.draw) TRY(model_draw_send(m, n, e));
    TRY(model_head_run(m, n, it.p->tail >= 0 ? &m->pick_buf : NULL, want, false, &logits, e));
    return finish_head(m, it, &logits, n, want, e);
}

static err_code run_outputs(model *m, const step_seq *seqs, const model_pass *p, err *e)
{
    out_iter it = {.seqs = seqs, .p = p, .start = m->stage.start}, begin = it;
    model_needs want = {0};
    int32_t n = 0;
    wanted w;
    while (out_next(&it, &w)) {
        TRY(model_draw_fill(m, n, w.s, e));
        m->stage.pick[n] = w.row;
        m->stage.target[n++] = w.s->nll ? w.s->targets[w.out] : 0;
        want = model_needs_of(want, w.s);
        if (n < m->plan.logit_rows) continue;
        TRY(run_head(m, begin, n, want, e));
        begin = it;
        n = 0;
        want = (model_needs){0};
    }
    return n ? run_head(m, begin, n, want, e) : OK;
}

/* ---- the step ---- */

err_code model_step(model *m, const step_seq *seqs, int n, const job *j, err *e)
{
    err_code rc = OK;
    if (n < 1) return OK;
    const int taken = model_ahead_take(m, &seqs, n);
    cursor c = {taken, 0};
    TRY(prepare(m, seqs, n, e));
    if (taken) rc = model_ahead_finish(m, seqs, taken, taken == n, j, e);
    while (c.i < n && rc == OK) {
        const int32_t key = rope_key(m, seqs[c.i].slot);
        model_pass p = next_pass(m, seqs, n, &c);
        if ((rc = model_rope_set(m, key, e)) != OK) break;
        if (model_decodes(m, seqs, &p)) {
            rc = model_decode_run(m, seqs, &p, p.n == n, j, e);
            continue;
        }
        plan_tail(m, seqs, &p);
        if ((rc = model_blocks_run(m, &p, false, j, e)) != OK) break;
        rc = run_outputs(m, seqs, &p, e);
    }
    if (rc == OK && !m->ahead.n) rc = dev_sync(m->d, e);
    if (rc != OK) {
        forget(m, seqs, n);
        return rc;
    }
    for (int i = 0; i < n; i++) m->len[seqs[i].slot] += seqs[i].n_tokens;
    return OK;
}

int32_t model_seq_len(const model *m, int32_t slot)
{
    return slot >= 0 && slot < m->plan.max_seqs ? m->len[slot] : 0;
}

void model_truncate(model *m, int32_t slot, int32_t tokens)
{
    if (slot < 0 || slot >= m->plan.max_seqs || tokens >= m->len[slot]) return;
    model_ahead_forget(m, slot);
    m->len[slot] = tokens < 0 ? 0 : tokens;
    kv_truncate(m->cache, slot, m->len[slot]);
}

void model_seq_end(model *m, int32_t slot) { model_truncate(m, slot, 0); }

err_code model_lend(model *m, err *e)
{
    TRY(kv_lend(m->cache, e));
    m->lent = true;
    return OK;
}

void model_lend_end(model *m)
{
    m->lent = false;
    m->ahead.n = 0;
    for (int32_t i = 0; i < m->plan.max_seqs; i++) m->len[i] = 0;
    kv_lend_end(m->cache);
}

void model_seq_begin(model *m, int32_t slot, int32_t held, int32_t prompt_tokens)
{
    assert(m->lent && slot >= 0 && slot < m->plan.max_seqs);
    model_ahead_forget(m, slot);
    m->len[slot] = held;
    m->rope_len[slot] = prompt_tokens;
}

void model_seq_blocks(model *m, int32_t slot, const int32_t *blocks, int32_t n)
{
    kv_set_blocks(m->cache, slot, blocks, n);
}

int32_t model_kv_free_tokens(const model *m)
{
    return kv_free_blocks(m->cache) * m->plan.block_tokens;
}
