/* The scheduler: who runs, with how many rows, on which blocks. */
#include "runtime/serve/sched.h"

#include <assert.h>
#include <string.h>

#include "base/mem.h"

struct sched {
    sched_opts o;
    blocks *blocks;
    sched_seq **running; /* [slots] oldest first */
    int32_t n_running;
    int32_t *slot; /* [slots] stack of free slots */
    int32_t n_slots;
    sched_seq *first, *last; /* those that wait, oldest first */
    int32_t n_waiting;
    uint64_t orders; /* handed out */
    int64_t preemptions;
    sched_step step;
};

static int32_t min32(int32_t a, int32_t b) { return a < b ? a : b; }
static int32_t max32(int32_t a, int32_t b) { return a > b ? a : b; }

static int32_t blocks_for(const sched *s, int32_t tokens)
{
    return tokens / s->o.block_tokens + (tokens % s->o.block_tokens != 0);
}

err_code sched_open(sched **out, const sched_opts *o, err *e)
{
    void *p;
    err_code rc;
    *out = NULL;
    assert(o->slots > 0 && o->prefill_tokens > 0 && o->score_rows > 0);
    TRY(mem_alloc(&p, 1, sizeof(sched), "scheduler", e));
    sched *s = p;
    s->o = *o;
    assert(blocks_for(s, o->session_tokens) <= o->blocks);
    if ((rc = blocks_open(&s->blocks, o->blocks, o->block_tokens, e)) != OK) goto done;
    const size_t n = (size_t)o->slots;
    if ((rc = mem_alloc(&p, n, sizeof(sched_seq *), "scheduler", e)) != OK) goto done;
    s->running = p;
    if ((rc = mem_alloc(&p, n, sizeof(int32_t), "scheduler", e)) != OK) goto done;
    s->slot = p;
    if ((rc = mem_alloc(&p, n, sizeof(sched_part), "scheduler", e)) != OK) goto done;
    s->step.part = p;
    for (s->n_slots = 0; s->n_slots < o->slots; s->n_slots++)
        s->slot[s->n_slots] = o->slots - 1 - s->n_slots; /* slot 0 first */
    *out = s;
    s = NULL;
done:
    sched_close(&s);
    return rc;
}

void sched_close(sched **s)
{
    if (!s || !*s) return;
    blocks_close(&(*s)->blocks);
    mem_free((*s)->running);
    mem_free((*s)->slot);
    mem_free((*s)->step.part);
    mem_free(*s);
    *s = NULL;
}

/* ---- those that wait ---- */

static void wait_insert(sched *s, sched_seq *q)
{
    sched_seq *before = s->last; /* arrivals go to the end at once */
    while (before && before->order > q->order) before = before->prev;
    q->prev = before;
    q->next = before ? before->next : s->first;
    *(q->next ? &q->next->prev : &s->last) = q;
    *(before ? &before->next : &s->first) = q;
    q->state = SCHED_WAITING;
    s->n_waiting++;
}

static void wait_remove(sched *s, sched_seq *q)
{
    *(q->prev ? &q->prev->next : &s->first) = q->next;
    *(q->next ? &q->next->prev : &s->last) = q->prev;
    q->prev = q->next = NULL;
    s->n_waiting--;
}

void sched_submit(sched *s, sched_seq *q)
{
    assert(q->n_tokens > 0 && q->n_tokens <= q->cap && q->cap <= s->o.session_tokens);
    assert(q->n_score < q->n_tokens);
    q->order = s->orders++;
    q->n_blocks = q->n_held = q->n_shared = q->n_scored = q->n_kept = q->preemptions = 0;
    wait_insert(s, q);
}

/* ---- blocks and slots of a sequence ---- */

/* From the end on: see blocks.h. */
static void let_go(sched *s, sched_seq *q)
{
    while (q->n_blocks) blocks_release(s->blocks, q->blocks[--q->n_blocks]);
    q->n_held = q->n_kept = 0;
}

/* Blocks for its first `tokens` tokens: all or none. */
static bool grow(sched *s, sched_seq *q, int32_t tokens)
{
    const int32_t want = blocks_for(s, tokens);
    if (want - q->n_blocks > blocks_available(s->blocks)) return false;
    for (; q->n_blocks < want; q->moved = true) q->blocks[q->n_blocks++] = blocks_take(s->blocks);
    return true;
}

static int32_t running_at(const sched *s, const sched_seq *q)
{
    int32_t i = 0;
    while (s->running[i] != q) i++;
    return i;
}

static void run_end(sched *s, sched_seq *q)
{
    const int32_t i = running_at(s, q);
    s->n_running--;
    memmove(s->running + i, s->running + i + 1, (size_t)(s->n_running - i) * sizeof(sched_seq *));
    s->slot[s->n_slots++] = q->slot;
    let_go(s, q);
}

static void preempt(sched *s, sched_seq *q)
{
    run_end(s, q);
    q->preemptions++;
    s->preemptions++;
    wait_insert(s, q);
}

void sched_end(sched *s, sched_seq *q)
{
    if (q->state == SCHED_WAITING) wait_remove(s, q);
    if (q->state == SCHED_RUNNING) run_end(s, q);
    q->state = SCHED_ENDED;
}

/* ---- planning ---- */

/* Takes hold of the cached blocks that q's tokens begin with, but for the last token, whose row has
 * to run. */
static void find_prefix(sched *s, sched_seq *q)
{
    const int32_t whole = (q->n_tokens - 1) / s->o.block_tokens;
    int32_t parent = BLOCKS_NONE;
    if (q->no_prefix || q->n_scored < q->n_score) return;
    while (q->n_blocks < whole) {
        parent = blocks_find(s->blocks, &q->root, parent,
                             q->tokens + (size_t)q->n_blocks * (size_t)s->o.block_tokens);
        if (parent == BLOCKS_NONE) break;
        q->blocks[q->n_blocks++] = parent;
    }
    q->n_kept = q->n_blocks;
    q->n_held = q->n_shared = q->n_blocks * s->o.block_tokens;
}

/* The block behind what find_prefix found is being computed for another: it is there in a step or
 * a few, which is sooner than to compute it twice. */
static bool found_soon(const sched *s, const sched_seq *q)
{
    const int32_t tokens = (q->n_blocks + 1) * s->o.block_tokens;
    if (q->no_prefix || q->n_scored < q->n_score || tokens >= q->n_tokens) return false;
    for (int32_t i = 0; i < s->n_running; i++) {
        const sched_seq *r = s->running[i];
        if (!r->no_prefix && r->n_held < tokens && r->n_tokens >= tokens &&
            r->root.salt == q->root.salt && r->root.variant == q->root.variant &&
            memcmp(r->tokens, q->tokens, (size_t)tokens * sizeof *q->tokens) == 0)
            return true;
    }
    return false;
}

/* Beside its own blocks one for each that runs, so that nobody is stopped at once. Alone a sequence
 * always has room. */
static bool has_room(sched *s, sched_seq *q)
{
    const int32_t need = blocks_for(s, q->n_tokens) - q->n_blocks;
    if (s->n_running && need + s->n_running > blocks_available(s->blocks)) return false;
    return grow(s, q, q->n_tokens);
}

/* The oldest that waits begins to run, if there is room; NULL if not. It is younger than all that
 * run, since the youngest of these are the ones to be stopped. */
static sched_seq *admit(sched *s)
{
    sched_seq *q = s->first;
    if (!q || !s->n_slots) return NULL;
    find_prefix(s, q);
    if (found_soon(s, q) || !has_room(s, q)) {
        let_go(s, q);
        return NULL;
    }
    wait_remove(s, q);
    assert(!s->n_running || s->running[s->n_running - 1]->order < q->order);
    q->state = SCHED_RUNNING;
    q->slot = s->slot[--s->n_slots];
    q->moved = true;
    s->running[s->n_running++] = q;
    return q;
}

/* Every sequence that runs gets blocks for its tokens, the oldest first; the youngest give theirs
 * up. */
static void secure_blocks(sched *s)
{
    for (int32_t i = 0; i < s->n_running; i++) {
        sched_seq *q = s->running[i];
        while (!grow(s, q, q->n_tokens)) {
            sched_seq *youngest = s->running[s->n_running - 1];
            preempt(s, youngest);
            if (youngest == q) break;
        }
    }
}

/* A block for the token after the next one where there are enough for everybody: so the step that
 * writes it can begin before it is planned. */
static void look_ahead(sched *s)
{
    for (int32_t i = 0; i < s->n_running && s->n_running <= blocks_available(s->blocks); i++) {
        sched_seq *q = s->running[i];
        if (q->n_tokens < q->cap) (void)grow(s, q, q->n_tokens + 1);
    }
}

static bool answers(const sched_seq *q)
{
    return q->n_tokens - q->n_held == 1 && q->n_held >= q->n_score;
}

typedef struct {
    int32_t prompt, score; /* rows left */
} budget;

static void plan_part(sched *s, sched_seq *q, budget *left)
{
    int32_t n = 1, score = 0;
    if (!answers(q)) {
        const int32_t end = q->n_held < q->n_score ? q->n_score : q->n_tokens;
        n = min32(end - q->n_held, left->prompt);
        const int32_t unscored = max32(q->n_scored, q->n_held);
        if (q->n_held < q->n_score && q->score_logits)
            n = min32(n, unscored - q->n_held + left->score);
        if (n == 0) return;
        left->prompt -= n;
        s->step.prompt_rows += n;
        if (q->n_held < q->n_score) score = max32(0, q->n_held + n - unscored);
        if (q->score_logits) left->score -= score;
    }
    s->step.part[s->step.n++] = (sched_part){.q = q,
                                             .first = q->n_held,
                                             .n = n,
                                             .n_score = score,
                                             .last = q->n_held + n == q->n_tokens,
                                             .begins = q->n_held == q->n_shared};
    s->step.rows += n;
}

const sched_step *sched_next(sched *s)
{
    int32_t answering = 0;
    sched_seq *q;
    secure_blocks(s);
    for (int32_t i = 0; i < s->n_running; i++) answering += answers(s->running[i]);
    budget left = {
        min32(s->o.prefill_tokens, max32(s->o.step_rows - answering, s->o.step_rows / 4 + 1)),
        s->o.score_rows};
    s->step.n = s->step.rows = s->step.prompt_rows = 0;
    for (int32_t i = 0; i < s->n_running; i++) plan_part(s, s->running[i], &left);
    while (left.prompt > 0 && (q = admit(s)) != NULL) plan_part(s, q, &left);
    look_ahead(s);
    return &s->step;
}

/* ---- after a step ---- */

static void keep_full(sched *s, sched_seq *q)
{
    const int32_t full = q->n_held / s->o.block_tokens;
    if (q->no_prefix) return;
    for (; q->n_kept < full; q->n_kept++) {
        const int32_t parent = q->n_kept ? q->blocks[q->n_kept - 1] : BLOCKS_NONE;
        const int32_t block = blocks_keep(s->blocks, q->blocks[q->n_kept], &q->root, parent,
                                          q->tokens +
                                              (size_t)q->n_kept * (size_t)s->o.block_tokens);
        q->moved = q->moved || block != q->blocks[q->n_kept];
        q->blocks[q->n_kept] = block;
    }
}

void sched_commit(sched *s)
{
    for (int32_t i = 0; i < s->step.n; i++) {
        const sched_part *p = &s->step.part[i];
        p->q->n_held += p->n;
        p->q->n_scored = max32(p->q->n_scored, min32(p->q->n_held, p->q->n_score));
        keep_full(s, p->q);
    }
}

void sched_append(sched *s, sched_seq *q, int32_t id)
{
    (void)s;
    assert(q->state == SCHED_RUNNING && q->n_held == q->n_tokens && q->n_tokens < q->cap);
    q->tokens[q->n_tokens++] = id;
}

/* ---- questions ---- */

int32_t sched_running(const sched *s) { return s->n_running; }
int32_t sched_waiting(const sched *s) { return s->n_waiting; }
int64_t sched_preemptions(const sched *s) { return s->preemptions; }
const blocks *sched_blocks(const sched *s) { return s->blocks; }
