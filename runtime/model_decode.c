/* Decode passes: one token and one output a sequence, recorded once and run again. Where callers
 * say that more follows, the next pass is queued before the results of this one are on the host:
 * its ids are those that this one leaves on the device. When the next step asks for what is on its
 * way it takes it, else it is as if it had not been: what a pass writes stands behind the tokens
 * held, and whatever is queued later comes after it. */
#include <stddef.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/model_internal.h"

bool model_decodes(const model *m, const step_seq *seqs, const model_pass *p)
{
    if (!dev_can_record(m->d) || p->max_q != 1 || p->rows != p->n || p->n > m->plan.logit_rows)
        return false;
    for (int i = 0; i < p->n; i++) {
        const step_seq *s = &seqs[p->first + i];
        if (s->n_tokens != 1 || s->n_out != 1) return false;
    }
    return true;
}

/* ---- recordings ---- */

/* Attention is cut by the longest sequence: recordings are kept for lengths up to an eighth apart.
 */
static int32_t kv_step_up(int32_t kv)
{
    int32_t step = 256;
    while (step * 8 < kv) step *= 2;
    return (kv + step - 1) / step * step;
}

static err_code record(model *m, model_recording *r, const model_pass *p, const job *j, err *e)
{
    model_pass longest = *p;
    tensor logits;
    err ignored;
    longest.max_kv = r->max_kv;
    TRY(dev_record_begin(m->d, e));
    err_code rc = model_blocks_run(m, &longest, true, j, e);
    const model_needs want = {.nll = r->score, .draw = r->draw};
    if (rc == OK) rc = model_head_run(m, p->n, &m->x_buf, want, true, &logits, e);
    const err_code end = dev_record_end(m->d, &r->work, rc == OK ? e : &ignored);
    if (rc == OK) rc = end;
    if (rc != OK) dev_graph_free(&r->work);
    return rc;
}

static err_code recorded(model *m, dev_graph **out, const model_pass *p, model_needs want,
                         const job *j, err *e)
{
    const bool score = want.nll || want.best;
    const int32_t max_kv = kv_step_up(p->max_kv);
    model_recording *r = &m->recordings[0];
    m->recording_clock++;
    for (int i = 0; i < MODEL_RECORDINGS; i++) {
        model_recording *o = &m->recordings[i];
        if (o->work && o->n == p->n && o->max_kv == max_kv && o->score == score &&
            o->draw == want.draw) {
            o->used = m->recording_clock;
            *out = o->work;
            return OK;
        }
        if (o->used < r->used) r = o; /* the one unused for longest makes room */
    }
    dev_graph_free(&r->work);
    *r = (model_recording){.n = p->n, .max_kv = max_kv, .score = score, .draw = want.draw};
    TRY(record(m, r, p, j, e));
    r->used = m->recording_clock;
    *out = r->work;
    return OK;
}

/* ---- what lies on the host for the device to take ---- */

err_code model_ahead_open(model *m, err *e)
{
    model_ahead *a = &m->ahead;
    const size_t seqs = (size_t)m->plan.max_seqs, rows = (size_t)m->plan.logit_rows,
                 n = seqs < rows ? seqs : rows;
    void *p;
    if (!dev_can_record(m->d)) return OK;
    TRY(mem_alloc(&p, n, sizeof *a->rows, "decode passes", e));
    a->rows = p;
    TRY(mem_alloc(&p, seqs, sizeof *a->split, "decode passes", e));
    a->split = p;
    TRY(mem_alloc(&p, seqs, sizeof *a->map, "decode passes", e));
    a->map = p;
    TRY(dev_host_alloc(&p, m->d,
                       n * (sizeof(sample_row) + (9 + (size_t)m->seq_blocks) * sizeof(int32_t)) +
                           sizeof(int32_t),
                       "decode passes", e));
    a->draws = p;
    int32_t *at = (int32_t *)(a->draws + n);
    int32_t **const parts[] = {&a->best, &a->drawn,  &a->from_best, &a->from_draw,
                               &a->pos,  &a->kv_len, &a->target,    &a->start};
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++, at += n) *parts[i] = at;
    a->table = at + 1; /* start has one more */
    a->nll = (float *)(a->table + n * (size_t)m->seq_blocks);
    return OK;
}

void model_ahead_close(model *m)
{
    model_ahead *a = &m->ahead;
    dev_host_free(m->d, a->draws);
    mem_free(a->rows);
    mem_free(a->split);
    mem_free(a->map);
    memset(a, 0, sizeof *a);
}

/* ---- the pass that follows ---- */

/* Whether the step behind this one can be queued now: cache is reserved for it, its draws are
 * known. */
static bool follows(model *m, const step_seq *s, sample_row *draw)
{
    const int32_t tokens = m->len[s->slot] + 2;
    err ignored;
    memset(draw, 0, sizeof *draw);
    if (!s->more || s->logits || !(s->argmax || s->picked)) return false;
    if (tokens > m->plan.session_len) return false;
    if (s->picked && !sampler_row_ahead(s->sampler, draw)) return false;
    return kv_reserve(m->cache, s->slot, tokens, &ignored) == OK;
}

static bool all_follow(model *m, const step_seq *seqs, int n)
{
    for (int i = 0; i < n; i++) {
        if (follows(m, &seqs[i], &m->ahead.draws[i])) continue;
        for (int k = 0; k < i; k++) kv_truncate(m->cache, seqs[k].slot, m->len[seqs[k].slot] + 1);
        return false;
    }
    return true;
}

/* The tables of the pass that follows. Row i of seqs has its results in row map[i]. */
static model_pass lay_out(model *m, const step_seq *seqs, int n)
{
    model_ahead *a = &m->ahead;
    model_pass p = {.n = n, .rows = n, .max_q = 1, .tail = -1};
    a->start[n] = n;
    for (int i = 0; i < n; i++) {
        const step_seq *s = &seqs[i];
        const int32_t held = m->len[s->slot] + 1;
        int32_t blocks;
        const int32_t *list = kv_block_list(m->cache, s->slot, &blocks);
        a->pos[i] = held;
        a->kv_len[i] = held + 1;
        a->start[i] = i;
        a->target[i] = s->nll ? s->targets[0] : 0;
        a->from_best[i] = s->picked ? -1 : a->map[i];
        a->from_draw[i] = s->picked ? a->map[i] : -1;
        memcpy(a->table + (size_t)i * (size_t)m->seq_blocks, list,
               (size_t)blocks * sizeof(int32_t));
        if (held + 1 > p.max_kv) p.max_kv = held + 1;
        a->rows[i] = (model_ahead_row){.slot = s->slot,
                                       .id = -1,
                                       .target = a->target[i],
                                       .score = s->argmax || s->nll,
                                       .draws = s->picked != NULL,
                                       .draw = a->draws[i]};
    }
    return p;
}

typedef struct {
    dev_move at[DEV_MOVES];
    int n;
} move_list;

static void move_to(move_list *l, void *to, const void *from, int64_t n)
{
    l->at[l->n++] = (dev_move){.to = to, .from = from, .n = n};
}

static void move_ids(move_list *l, void *to, const void *from, const int32_t *index, int64_t n)
{
    l->at[l->n++] = (dev_move){.to = to, .from = from, .index = index, .n = n, .ids = true};
}

static int32_t *staged_at(const model *m, const int32_t *host)
{
    return (int32_t *)m->stage.dev.data + (host - m->stage.base);
}

/* Whether each row takes the id of the same row, so that no trip over the bus says which. */
static bool rows_stay(const model_ahead *a, int n)
{
    for (int i = 0; i < n; i++) {
        if (a->from_best[i] != i) return false;
    }
    return true;
}

static void move_tables(const model *m, move_list *l, int n, model_needs want)
{
    const model_ahead *a = &m->ahead;
    const model_stage *s = &m->stage;
    if (want.best)
        move_ids(l, staged_at(m, s->ids), m->best_buf.data, rows_stay(a, n) ? NULL : a->from_best,
                 n);
    if (want.draw) {
        move_ids(l, staged_at(m, s->ids), m->draws.ids_dev.data, a->from_draw, n);
        move_to(l, m->draws.rows_dev.data, a->draws,
                (int64_t)n * (int64_t)(sizeof(sample_row) / sizeof(int32_t)));
    }
    move_to(l, staged_at(m, s->pos), a->pos, n);
    move_to(l, staged_at(m, s->kv_len), a->kv_len, n);
    move_to(l, staged_at(m, s->start), a->start, n + 1);
    move_to(l, staged_at(m, s->target), a->target, n);
    move_to(l, staged_at(m, s->table), a->table, (int64_t)n * m->seq_blocks);
}

/* ---- results ---- */

static void deliver(model *m, const step_seq *s, int32_t row, model_ahead_row *next)
{
    const model_ahead *a = &m->ahead;
    if (s->argmax) *s->argmax = a->best[row];
    if (s->nll) *s->nll = a->nll[row];
    if (s->picked) *s->picked = a->drawn[row];
    if (next) next->id = s->picked ? a->drawn[row] : a->best[row];
}

/* Hands out the results of the pass queued last, of `rows` rows, row map[i] to seqs[i]; with `more`
 * the pass that follows is queued before the wait. */
static err_code finish(model *m, const step_seq *seqs, int n, int rows, bool more, const job *j,
                       err *e)
{
    model_ahead *a = &m->ahead;
    model_needs want = {0};
    model_pass next = {0};
    dev_graph *work;
    move_list l = {.n = 0};
    for (int i = 0; i < n; i++) want = model_needs_of(want, &seqs[i]);
    a->n = 0;
    if (want.nll || want.best) {
        move_to(&l, a->best, m->best_buf.data, rows);
        move_to(&l, a->nll, m->nll_buf.data, rows);
    }
    if (want.draw) move_to(&l, a->drawn, m->draws.ids_dev.data, rows);
    if (more && all_follow(m, seqs, n)) {
        next = lay_out(m, seqs, n);
        move_tables(m, &l, n, want);
    }
    TRY(dev_move_words(m->d, l.at, l.n, e));
    TRY(dev_mark(m->d, e));
    if (next.n) {
        TRY(recorded(m, &work, &next, want, j, e));
        TRY(dev_graph_run(work, e));
        a->n = next.n;
    }
    TRY(dev_mark_wait(m->d, e));
    for (int i = 0; i < n; i++) deliver(m, &seqs[i], a->map[i], next.n ? &a->rows[i] : NULL);
    return OK;
}

/* ---- steps that take what is on its way ---- */

static bool same_draw(const model_ahead_row *r, const sampler *s)
{
    const size_t bytes = offsetof(sample_row, gone) + sizeof r->draw.gone; /* less what pads it */
    sample_row now;
    return sampler_row_ahead(s, &now) && memcmp(&now, &r->draw, bytes) == 0;
}

static bool asks_for(const step_seq *s, const model_ahead_row *r)
{
    if (s->slot != r->slot || s->n_tokens != 1 || s->n_out != 1 || s->logits) return false;
    if (s->tokens[0] != r->id || ((s->argmax || s->nll) && !r->score)) return false;
    if (s->nll && s->targets[0] != r->target) return false;
    return s->picked ? r->draws && s->sampler && same_draw(r, s->sampler) : true;
}

static int row_of(const model_ahead *a, const step_seq *s, int near)
{
    if (near < a->n && asks_for(s, &a->rows[near])) return near;
    for (int i = 0; i < a->n; i++) {
        if (asks_for(s, &a->rows[i])) return i;
    }
    return -1;
}

static void drop_row(model *m, model_ahead_row *r)
{
    if (r->slot >= 0) kv_truncate(m->cache, r->slot, m->len[r->slot]);
    r->slot = -1;
}

int model_ahead_take(model *m, const step_seq **seqs, int n)
{
    model_ahead *a = &m->ahead;
    int taken = 0, rest = 0;
    if (!a->n || n > m->plan.max_seqs) {
        model_ahead_drop(m);
        return 0;
    }
    for (int i = 0; i < n; i++) {
        const int row = row_of(a, &(*seqs)[i], i);
        if (row < 0) continue;
        a->map[taken] = row;
        a->split[taken++] = (*seqs)[i];
    }
    for (int i = 0; i < n && taken < n; i++) {
        if (row_of(a, &(*seqs)[i], i) < 0) a->split[taken + rest++] = (*seqs)[i];
    }
    for (int i = 0; i < taken; i++) a->rows[a->map[i]].taken = true;
    for (int i = 0; i < a->n; i++) {
        if (!a->rows[i].taken) drop_row(m, &a->rows[i]);
    }
    if (taken)
        *seqs = a->split;
    else
        a->n = 0;
    return taken;
}

void model_ahead_drop(model *m)
{
    for (int i = 0; i < m->ahead.n; i++) drop_row(m, &m->ahead.rows[i]);
    m->ahead.n = 0;
}

void model_ahead_forget(model *m, int32_t slot)
{
    for (int i = 0; i < m->ahead.n; i++) {
        if (m->ahead.rows[i].slot == slot) m->ahead.rows[i].slot = -1;
    }
}

err_code model_ahead_finish(model *m, const step_seq *seqs, int n, bool more, const job *j, err *e)
{
    TRY(job_check(j, e));
    for (int i = 0; i < n; i++) TRY(model_draw_fill(m, i, &seqs[i], e)); /* generators move on */
    return finish(m, seqs, n, m->ahead.n, more, j, e);
}

/* ---- a pass from the start ---- */

/* All tables in one copy. */
static err_code stage_all(model *m, const model_pass *p, err *e)
{
    const int64_t n = m->stage.table - m->stage.base + (int64_t)p->n * m->seq_blocks;
    const tensor src = tensor_1d(m->stage.base, DT_I32, n);
    tensor dst = tensor_1d(m->stage.dev.data, DT_I32, n);
    dst.mem = dev_mem(m->d);
    return dev_copy(m->d, &dst, &src, e);
}

err_code model_decode_run(model *m, const step_seq *seqs, const model_pass *p, bool more,
                          const job *j, err *e)
{
    model_needs want = {0};
    dev_graph *work;
    for (int i = 0; i < p->n; i++) {
        const step_seq *s = &seqs[p->first + i];
        m->ahead.map[i] = m->stage.pick[i] = i;
        m->stage.target[i] = s->nll ? s->targets[0] : 0;
        TRY(model_draw_fill(m, i, s, e));
        want = model_needs_of(want, s);
    }
    TRY(job_check(j, e));
    TRY(stage_all(m, p, e));
    if (want.draw) TRY(model_draw_send(m, p->n, e));
    TRY(recorded(m, &work, p, want, j, e));
    TRY(dev_graph_run(work, e));
    if (want.logits) return model_head_finish(m, seqs, p, want, e);
    return finish(m, seqs + p->first, p->n, p->n, more, j, e);
}
