/* The scheduler without a device: single rules, then a simulator. A seed makes a world of its own
 * of its own (slots, blocks, budgets, arrivals, cancellations); a model that only remembers which
 * tokens it saw writes into the blocks it is given and answers from what it finds there, so a block
 * that is lost, shared too early or written twice changes an answer. Every rule is checked after
 * every step.
 * test_sched SEED plays one world and says what happens. */
#include <check.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "runtime/serve/sched.h"
#include "support/suite.h"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define WORLDS 60
#else
#define WORLDS 1000
#endif
#define STEPS    1000 /* of a world with arrivals; then it is emptied */
#define LIVE     24
#define MAX_CAP  96
#define MAX_SEQ  160 /* blocks of the largest world */
#define ID_COUNT 1000

/* ---- a world ---- */

typedef struct {
    sched_seq q;
    bool live;
    int32_t tokens[MAX_CAP + 1], blocks[MAX_CAP + 1];
    int32_t n_prompt, goal; /* tokens at which it ends */
    uint64_t key;           /* of its answer */
    int32_t steps_oldest;   /* steps it was the oldest one in */
    int32_t scored;         /* rows that were scored, each once */
} actor;

typedef struct {
    uint64_t seed, rng;
    sched_opts o;
    sched *s;
    actor actor[LIVE];
    uint64_t content[MAX_SEQ * 8]; /* [block, block_tokens] what the model wrote */
    int64_t steps, ended, canceled, shared, preempted;
    int load; /* arrivals in 100 steps */
    char why[256];
} world;

static uint64_t mix(uint64_t h, uint64_t x)
{
    h = (h ^ x) * 0xff51afd7ed558ccdu;
    return h ^ h >> 29;
}

static uint32_t draw(world *w, uint32_t n)
{
    w->rng = w->rng * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(w->rng >> 33) % n;
}

static bool broken(world *w, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
static bool broken(world *w, const char *fmt, ...)
{
    va_list args;
    const int n = snprintf(w->why, sizeof w->why,
                           "seed %llu, step %lld: ", (unsigned long long)w->seed,
                           (long long)w->steps);
    va_start(args, fmt);
    (void)vsnprintf(w->why + n, sizeof w->why - (size_t)n, fmt, args);
    va_end(args);
    return false;
}

#define REQUIRE(cond, ...) \
    if (!(cond)) return broken(w, __VA_ARGS__)
#define DO(call) \
    if (!(call)) return false

static void world_opts(world *w)
{
    sched_opts *o = &w->o;
    o->slots = 1 + (int32_t)draw(w, 8);
    o->block_tokens = 1 + (int32_t)draw(w, 8);
    const int32_t least = MAX_CAP / o->block_tokens / (1 + (int32_t)draw(w, 4)) + 1;
    o->blocks = least + (int32_t)draw(w, draw(w, 2) ? 8 : (uint32_t)(MAX_SEQ - least));
    if (o->blocks > MAX_SEQ) o->blocks = MAX_SEQ;
    o->session_tokens = least * o->block_tokens < MAX_CAP ? least * o->block_tokens : MAX_CAP;
    o->prefill_tokens = 1 + (int32_t)draw(w, 60);
    o->step_rows = 1 + (int32_t)draw(w, 80);
    o->score_rows = 1 + (int32_t)draw(w, 6);
    w->load = 2 + (int)draw(w, 60);
}

/* ---- the model ---- */

static uint64_t root_hash(const sched_seq *q)
{
    return mix(mix(7, q->root.salt), (uint32_t)q->root.variant);
}

static uint64_t *cell(world *w, const sched_seq *q, int32_t pos)
{
    const int32_t t = w->o.block_tokens;
    return &w->content[q->blocks[pos / t] * t + pos % t];
}

/* What the answer must be: a function of prompt, root and key alone. */
static int32_t answer_of(uint64_t h, uint64_t key) { return (int32_t)(mix(h, key) % ID_COUNT); }

static uint64_t chain(const actor *a, int32_t n)
{
    uint64_t h = root_hash(&a->q);
    for (int32_t i = 0; i < n; i++) h = mix(h, (uint32_t)a->tokens[i]);
    return h;
}

static bool run_part(world *w, const sched_part *p)
{
    const actor *a = (const actor *)(const void *)p->q;
    const blocks *b = sched_blocks(w->s);
    uint64_t h = root_hash(p->q);
    for (int32_t i = 0; i < p->first + p->n; i++) {
        const int32_t block = p->q->blocks[i / w->o.block_tokens];
        uint64_t *at = cell(w, p->q, i);
        h = mix(h, (uint32_t)a->tokens[i]);
        if (i < p->first) {
            REQUIRE(*at == h, "token %d of block %d is not what was computed", i, block);
            continue;
        }
        REQUIRE(blocks_holders(b, block) == 1 && !blocks_is_cached(b, block),
                "block %d is written to while others may read it", block);
        *at = h;
    }
    return true;
}

/* ---- rules ---- */

static bool check_blocks(world *w)
{
    const blocks *b = sched_blocks(w->s);
    int32_t holders[MAX_SEQ] = {0}, used = 0, cached = 0;
    for (int i = 0; i < LIVE; i++) {
        const sched_seq *q = &w->actor[i].q;
        if (!w->actor[i].live) continue;
        REQUIRE(q->state == SCHED_RUNNING || q->n_blocks == 0, "one that waits holds blocks");
        for (int32_t k = 0; k < q->n_blocks; k++) {
            holders[q->blocks[k]]++;
            REQUIRE(!q->no_prefix || !blocks_is_cached(b, q->blocks[k]), "block %d is left behind",
                    q->blocks[k]);
        }
    }
    for (int32_t i = 0; i < w->o.blocks; i++) {
        REQUIRE(holders[i] == blocks_holders(b, i), "block %d: %d holders, counted %d", i,
                holders[i], blocks_holders(b, i));
        REQUIRE(holders[i] < 2 || blocks_is_cached(b, i), "block %d is shared and not full", i);
        used += holders[i] > 0;
        cached += blocks_is_cached(b, i) && holders[i] == 0;
        const int32_t parent = blocks_is_cached(b, i) ? blocks_parent(b, i) : BLOCKS_NONE;
        REQUIRE(parent == BLOCKS_NONE ||
                    (blocks_is_cached(b, parent) && holders[parent] >= (holders[i] > 0)),
                "block %d outlives block %d in front of it", i, parent);
    }
    REQUIRE(used == blocks_used(b) && w->o.blocks - used == blocks_available(b) &&
                cached == blocks_cached(b),
            "%d blocks used and %d cached, counted %d and %d", used, cached, blocks_used(b),
            blocks_cached(b));
    return true;
}

static bool check_parts(world *w, const sched_step *s)
{
    int32_t rows = 0, prompt = 0, score = 0;
    uint32_t slots = 0;
    for (int32_t i = 0; i < s->n; i++) {
        const sched_part *p = &s->part[i];
        const sched_seq *q = p->q;
        const actor *a = (const actor *)(const void *)q;
        const bool answers = p->n == 1 && p->last;
        REQUIRE(a->live && q->state == SCHED_RUNNING, "part %d is not running", i);
        REQUIRE(q->slot >= 0 && q->slot < w->o.slots && !(slots >> q->slot & 1), "slot %d",
                q->slot);
        REQUIRE(i == 0 || s->part[i - 1].q->order < q->order, "parts are not in order");
        REQUIRE(p->n > 0 && p->first == q->n_held && p->first + p->n <= q->n_tokens,
                "rows %d + %d of %d", p->first, p->n, q->n_tokens);
        REQUIRE(p->last == (p->first + p->n == q->n_tokens), "the last row is not known");
        REQUIRE(q->n_blocks * w->o.block_tokens >= p->first + p->n, "blocks for the rows");
        REQUIRE(p->n_score == 0 || (!p->last && p->n_score <= p->n), "score %d", p->n_score);
        slots |= 1u << q->slot;
        rows += p->n;
        prompt += answers ? 0 : p->n;
        score += q->score_logits ? p->n_score : 0;
    }
    REQUIRE(rows == s->rows && prompt <= s->prompt_rows + w->o.slots &&
                s->prompt_rows <= w->o.prefill_tokens && score <= w->o.score_rows,
            "%d rows, %d of prompts, %d scored", rows, s->prompt_rows, score);
    return true;
}

/* Who came first runs first: the oldest is in every step, and none that waits is older than one
 * that runs. */
static bool check_order(world *w, const sched_step *s)
{
    actor *oldest = NULL;
    uint64_t youngest_running = 0, oldest_waiting = UINT64_MAX;
    int32_t running = 0, waiting = 0;
    for (int i = 0; i < LIVE; i++) {
        actor *a = &w->actor[i];
        if (!a->live) continue;
        if (!oldest || a->q.order < oldest->q.order) oldest = a;
        if (a->q.state == SCHED_RUNNING) {
            running++;
            if (a->q.order > youngest_running) youngest_running = a->q.order;
        } else {
            waiting++;
            if (a->q.order < oldest_waiting) oldest_waiting = a->q.order;
        }
    }
    REQUIRE(running == sched_running(w->s) && waiting == sched_waiting(w->s), "%d run, %d wait",
            running, waiting);
    REQUIRE(!running || youngest_running < oldest_waiting, "one that waits is older");
    if (!oldest) return true;
    REQUIRE(s->n && s->part[0].q == &oldest->q, "the oldest does not run");
    oldest->steps_oldest++;
    REQUIRE(oldest->steps_oldest <= oldest->q.cap + oldest->q.n_score,
            "the oldest takes %d steps for %d tokens", oldest->steps_oldest, oldest->q.cap);
    return true;
}

/* ---- what happens ---- */

static void end(world *w, actor *a)
{
    w->preempted += a->q.preemptions;
    sched_end(w->s, &a->q);
    a->live = false;
}

/* Prompts begin as one of four texts do, or with nothing in common. */
static void arrive(world *w)
{
    actor *a = w->actor;
    while (a < w->actor + LIVE && a->live) a++;
    if (a == w->actor + LIVE) return;
    memset(a, 0, sizeof *a);
    const int32_t room = w->o.session_tokens;
    const int32_t cap = 2 + (int32_t)draw(w, (uint32_t)room - 1);
    a->n_prompt = 1 + (int32_t)draw(w, (uint32_t)cap - 1);
    const uint64_t text = draw(w, 5);
    const int32_t common = text < 4 ? (int32_t)draw(w, (uint32_t)a->n_prompt + 1) : 0;
    for (int32_t i = 0; i < a->n_prompt; i++)
        a->tokens[i] = i < common ? (int32_t)(mix(text, (uint64_t)i) % ID_COUNT)
                                  : (int32_t)draw(w, ID_COUNT);
    a->goal = a->n_prompt + 1 + (int32_t)draw(w, (uint32_t)(cap - a->n_prompt));
    a->key = draw(w, 1000);
    a->q.tokens = a->tokens;
    a->q.blocks = a->blocks;
    a->q.n_tokens = a->n_prompt;
    a->q.cap = cap;
    a->q.no_prefix = draw(w, 6) == 0;
    a->q.root.salt = draw(w, 4) == 0;
    a->q.root.variant = draw(w, 8) == 0;
    if (draw(w, 6) == 0) {
        a->q.n_score = a->n_prompt - 1;
        a->q.score_logits = draw(w, 2);
    }
    a->live = true;
    sched_submit(w->s, &a->q);
}

static void cancel(world *w)
{
    actor *a = &w->actor[draw(w, LIVE)];
    if (!a->live) return;
    w->canceled++;
    end(w, a);
}

/* The token behind a part whose last row ran: read from the cache, compared with what the request
 * alone gives. */
static bool answer(world *w, const sched_part *p)
{
    actor *a = (actor *)(void *)p->q;
    const int32_t n = a->q.n_tokens;
    const int32_t id = answer_of(*cell(w, &a->q, n - 1), a->key);
    REQUIRE(id == answer_of(chain(a, n), a->key), "an answer depends on others");
    if (n + 1 < a->goal) {
        sched_append(w->s, &a->q, id);
        return true;
    }
    REQUIRE(a->scored == a->q.n_score, "%d rows scored of %d", a->scored, a->q.n_score);
    w->ended++;
    end(w, a);
    return true;
}

static bool step(world *w)
{
    const sched_step *s = sched_next(w->s);
    w->steps++;
    DO(check_blocks(w));
    DO(check_parts(w, s));
    DO(check_order(w, s));
    for (int32_t i = 0; i < s->n; i++) {
        const sched_part *p = &s->part[i];
        actor *a = (actor *)(void *)p->q;
        REQUIRE(p->begins == (a->q.n_held == a->q.n_shared), "part %d begins", i);
        if (p->begins) w->shared += p->first;
        REQUIRE(!p->n_score || a->scored == p->first + p->n - p->n_score, "rows scored twice");
        a->scored += p->n_score;
        DO(run_part(w, p));
    }
    sched_commit(w->s);
    DO(check_blocks(w));
    for (int32_t i = 0; i < s->n; i++) {
        if (s->part[i].last) DO(answer(w, &s->part[i]));
    }
    return true;
}

static bool idle(const world *w) { return sched_running(w->s) == 0 && sched_waiting(w->s) == 0; }

static bool play_steps(world *w)
{
    while (w->steps < STEPS || !idle(w)) {
        if (w->steps < STEPS) {
            while (draw(w, 100) < (uint32_t)w->load) arrive(w);
            if (draw(w, 40) == 0) cancel(w);
            if (draw(w, 2000) == 0) { /* all at once */
                for (int i = 0; i < LIVE; i++) cancel(w);
            }
        }
        DO(step(w));
        REQUIRE(w->steps < STEPS + LIVE * (2 * MAX_CAP + 1), "it does not end");
    }
    REQUIRE(blocks_used(sched_blocks(w->s)) == 0, "%d blocks are held by nobody",
            blocks_used(sched_blocks(w->s)));
    return true;
}

static bool play(world *w, uint64_t seed)
{
    err e;
    memset(w, 0, sizeof *w);
    w->seed = w->rng = seed;
    for (int i = 0; i < 4; i++) (void)draw(w, 2);
    world_opts(w);
    if (sched_open(&w->s, &w->o, &e) != OK) return broken(w, "%s", e.msg);
    const bool ok = play_steps(w);
    sched_close(&w->s);
    return ok;
}

/* ---- tests ---- */

static uint64_t first_seed = 1;

START_TEST(test_worlds)
{
    static world w;
    int64_t steps = 0, ended = 0, canceled = 0, shared = 0, preempted = 0;
    for (uint64_t seed = first_seed; seed < first_seed + WORLDS; seed++) {
        ck_assert_msg(play(&w, seed), "%s", w.why);
        steps += w.steps;
        ended += w.ended;
        canceled += w.canceled;
        shared += w.shared;
        preempted += w.preempted;
    }
    printf("%d worlds, %lld steps: %lld ended, %lld canceled, %lld preemptions, %lld tokens "
           "shared\n",
           WORLDS, (long long)steps, (long long)ended, (long long)canceled, (long long)preempted,
           (long long)shared);
    ck_assert_int_ge(steps, (int64_t)WORLDS * STEPS);
    ck_assert_int_gt(ended, steps / 20);
    ck_assert_int_gt(canceled, WORLDS);
    ck_assert_int_gt(preempted, WORLDS);
    ck_assert_int_gt(shared, WORLDS * 10);
}
END_TEST

static const blocks_root root = {1, 0};

static blocks *open_blocks(int32_t n)
{
    err e;
    blocks *b;
    ck_assert_int_eq(blocks_open(&b, n, 2, &e), OK);
    return b;
}

START_TEST(test_blocks_found_by_content)
{
    blocks *b = open_blocks(8);
    const int32_t t[] = {5, 6, 7, 8};
    const int32_t a = blocks_keep(b, blocks_take(b), &root, BLOCKS_NONE, t);
    const int32_t c = blocks_keep(b, blocks_take(b), &root, a, t + 2);
    ck_assert_int_eq(blocks_find(b, &root, BLOCKS_NONE, t), a);
    ck_assert_int_eq(blocks_find(b, &root, a, t + 2), c);
    ck_assert_int_eq(blocks_holders(b, a), 2);
    ck_assert_int_eq(blocks_find(b, &root, BLOCKS_NONE, t + 2), BLOCKS_NONE); /* not behind a */
    ck_assert_int_eq(blocks_find(b, &root, c, t), BLOCKS_NONE);
    ck_assert_int_eq(blocks_find(b, &(blocks_root){2, 0}, BLOCKS_NONE, t), BLOCKS_NONE);
    ck_assert_int_eq(blocks_find(b, &(blocks_root){1, 1}, BLOCKS_NONE, t), BLOCKS_NONE);
    /* The same content computed twice: the second copy goes. */
    const int32_t twin = blocks_take(b);
    ck_assert_int_eq(blocks_keep(b, twin, &root, BLOCKS_NONE, t), a);
    ck_assert_int_eq(blocks_holders(b, twin), 0);
    ck_assert_int_eq(blocks_holders(b, a), 3);
    ck_assert_int_eq(blocks_used(b), 2);
    blocks_close(&b);
}
END_TEST

START_TEST(test_blocks_leave_oldest_first)
{
    blocks *b = open_blocks(4);
    int32_t at[4];
    for (int32_t i = 0; i < 4; i++) {
        const int32_t t[] = {i, i};
        at[i] = blocks_keep(b, blocks_take(b), &root, i == 1 ? at[0] : BLOCKS_NONE, t);
    }
    ck_assert_int_eq(blocks_take(b), BLOCKS_NONE);
    for (int32_t i = 3; i >= 0; i--) blocks_release(b, at[i]); /* 3, 2, 1, 0 */
    ck_assert_int_eq(blocks_cached(b), 4);
    ck_assert_int_eq(blocks_find(b, &root, BLOCKS_NONE, (int32_t[]){2, 2}), at[2]);
    blocks_release(b, at[2]); /* 3, 1, 0, 2 */
    ck_assert_int_eq(blocks_take(b), at[3]);
    ck_assert_int_eq(blocks_take(b), at[1]);
    ck_assert_int_eq(blocks_take(b), at[0]);
    ck_assert_int_eq(blocks_cached(b), 1);
    ck_assert_int_eq(blocks_find(b, &root, BLOCKS_NONE, (int32_t[]){0, 0}), BLOCKS_NONE);
    ck_assert_int_eq(blocks_find(b, &root, BLOCKS_NONE, (int32_t[]){2, 2}), at[2]);
    ck_assert_int_eq(blocks_available(b), 0);
    blocks_close(&b);
}
END_TEST

static void seq_of(sched_seq *q, int32_t *tokens, int32_t *blocks_at, int32_t n, int32_t cap)
{
    *q = (sched_seq){.tokens = tokens, .blocks = blocks_at, .n_tokens = n, .cap = cap};
}

/* A long prompt runs in chunks beside one that answers. */
START_TEST(test_chunks_beside_answers)
{
    err e;
    sched *s;
    sched_seq a, b;
    int32_t ta[64] = {1, 2, 3}, tb[64] = {9}, ba[16], bb[16];
    const sched_opts o = {.slots = 4,
                          .prefill_tokens = 16,
                          .step_rows = 64,
                          .score_rows = 4,
                          .blocks = 32,
                          .block_tokens = 4,
                          .session_tokens = 64};
    ck_assert_int_eq(sched_open(&s, &o, &e), OK);
    seq_of(&a, ta, ba, 3, 40);
    sched_submit(s, &a);
    ck_assert_int_eq(sched_next(s)->rows, 3);
    sched_commit(s);
    sched_append(s, &a, 4);
    seq_of(&b, tb, bb, 40, 60);
    sched_submit(s, &b);
    for (int32_t i = 0; i < 3; i++) {
        const sched_step *p = sched_next(s);
        ck_assert_int_eq(p->n, 2);
        ck_assert(p->part[0].q == &a && p->part[0].n == 1 && p->part[0].last);
        ck_assert(p->part[1].q == &b && p->part[1].first == i * 16);
        ck_assert_int_eq(p->part[1].n, i < 2 ? 16 : 8);
        ck_assert_int_eq(p->part[1].last, i == 2);
        sched_commit(s);
        sched_append(s, &a, 5 + i);
    }
    sched_end(s, &a);
    sched_end(s, &b);
    sched_end(s, &b); /* once more: nothing */
    ck_assert_int_eq(sched_next(s)->n, 0);
    ck_assert_int_eq(blocks_used(sched_blocks(s)), 0);
    sched_close(&s);
}
END_TEST

/* One with the same beginning waits for the blocks that are being computed. */
START_TEST(test_waits_for_common_beginning)
{
    err e;
    sched *s;
    sched_seq a, b;
    int32_t ta[64], tb[64], ba[16], bb[16];
    const sched_opts o = {.slots = 4,
                          .prefill_tokens = 8,
                          .step_rows = 64,
                          .score_rows = 4,
                          .blocks = 32,
                          .block_tokens = 4,
                          .session_tokens = 64};
    for (int32_t i = 0; i < 64; i++) ta[i] = tb[i] = i;
    ck_assert_int_eq(sched_open(&s, &o, &e), OK);
    seq_of(&a, ta, ba, 17, 40);
    seq_of(&b, tb, bb, 18, 40);
    sched_submit(s, &a);
    sched_submit(s, &b);
    for (int i = 0; i < 2; i++) {
        ck_assert_int_eq(sched_next(s)->n, 1); /* 16 tokens: four blocks */
        sched_commit(s);
    }
    const sched_step *p = sched_next(s);
    ck_assert_int_eq(p->n, 2);
    ck_assert(p->part[1].q == &b && p->part[1].first == 16 && p->part[1].n == 2);
    ck_assert_int_eq(b.n_shared, 16);
    ck_assert_int_eq(a.blocks[3], b.blocks[3]);
    ck_assert_int_ne(a.blocks[4], b.blocks[4]);
    sched_commit(s);
    sched_end(s, &b);
    sched_end(s, &a);
    sched_close(&s);
}
END_TEST

static Suite *suite(void)
{
    Suite *s = suite_create("sched");
    TCase *t = tcase_create("rules");
    tcase_add_test(t, test_blocks_found_by_content);
    tcase_add_test(t, test_blocks_leave_oldest_first);
    tcase_add_test(t, test_chunks_beside_answers);
    tcase_add_test(t, test_waits_for_common_beginning);
    suite_add_tcase(s, t);
    t = tcase_create("worlds");
    tcase_set_timeout(t, 120);
    tcase_add_test(t, test_worlds);
    suite_add_tcase(s, t);
    return s;
}

static int replay(const char *seed)
{
    static world w;
    const bool ok = play(&w, strtoull(seed, NULL, 10));
    printf("seed %s: %d slots, %d blocks of %d, session %d, prefill %d, rows %d, score %d\n", seed,
           w.o.slots, w.o.blocks, w.o.block_tokens, w.o.session_tokens, w.o.prefill_tokens,
           w.o.step_rows, w.o.score_rows);
    printf("%lld steps, %lld ended, %lld canceled, %lld preemptions, %lld tokens shared\n%s\n",
           (long long)w.steps, (long long)w.ended, (long long)w.canceled, (long long)w.preempted,
           (long long)w.shared, ok ? "ok" : w.why);
    return !ok;
}

int main(int argc, char **argv)
{
    if (argc == 2) return replay(argv[1]);
    return suite_run(suite());
}
