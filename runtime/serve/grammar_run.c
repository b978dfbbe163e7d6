/* Positions, their table, and the steps between them. */
#include "runtime/serve/grammar_run.h"

#include <string.h>

#include "base/mem.h"

enum {
    MAX_ITEMS = 16384,   /* of one position */
    MAX_WORK = 2000000,  /* edges looked at for one mask */
    ROOM = 8 << 20,      /* bytes kept between masks */
    MAX_ROOM = 96 << 20, /* bytes within one mask */
    UNKNOWN = -1
};

typedef struct {
    int32_t state, stack;
} item;
typedef struct {
    int32_t ret, below, depth; /* where to go on, the frame below, frames up to here */
} frame;
typedef struct {
    uint32_t hash;
    int32_t first, n; /* into items */
    int32_t row;      /* into rows, n_classes of them; -1 none yet */
    uint32_t *mask;   /* [(n_tokens + 31) / 32] NULL: not made yet */
    int32_t count;
    bool may_end;
} position;
typedef struct {
    void *p;
    int32_t n, cap;
    size_t size;
} vec;

struct grammar_run {
    const grammar *g;
    vec items, frames, positions, rows; /* rows: one int32 an element */
    int32_t *table;                     /* open addressing over positions; cap a power of two */
    int32_t table_cap;
    int32_t *frame_table;
    int32_t frame_cap;
    item *set; /* [MAX_ITEMS] the closure in the making; the rest finds what is in it */
    int32_t n_set;
    int32_t seen[2 * MAX_ITEMS], slot[MAX_ITEMS]; /* where each is in seen */
    bool accepts, over;
    size_t bytes; /* held by all of these */
    int64_t work;
    grammar_hold *holds;
};

#define FRAME(r, i)    ((frame *)(r)->frames.p)[i]
#define POSITION(r, i) ((position *)(r)->positions.p)[i]
#define ITEM(r, i)     ((item *)(r)->items.p)[i]
#define ROW(r, i)      ((int32_t *)(r)->rows.p)[i]

/* ---- memory: failure sets `over`, and what is being made comes to nothing ---- */

static bool reserve(grammar_run *r, vec *v, int32_t n)
{
    void *more;
    err e;
    if (v->n + n <= v->cap) return true;
    int32_t cap = v->cap ? v->cap : 64;
    while (cap < v->n + n) cap *= 2;
    const size_t grown = (size_t)(cap - v->cap) * v->size;
    if (r->bytes + grown > MAX_ROOM ||
        mem_alloc(&more, (size_t)cap, v->size, "grammar", &e) != OK) {
        r->over = true;
        return false;
    }
    if (v->n) memcpy(more, v->p, (size_t)v->n * v->size);
    mem_free(v->p);
    v->p = more;
    v->cap = cap;
    r->bytes += grown;
    return true;
}

static bool table_grow(grammar_run *r, int32_t **table, int32_t *cap, int32_t n)
{
    err e;
    int32_t *more;
    if (2 * (n + 1) <= *cap) return true;
    const int32_t want = *cap ? 2 * *cap : 256;
    if (mem_alloc((void **)&more, (size_t)want, sizeof *more, "grammar", &e) != OK) {
        r->over = true;
        return false;
    }
    r->bytes += (size_t)(want - *cap) * sizeof *more;
    mem_free(*table);
    *table = more;
    *cap = want;
    return true;
}

static uint32_t mix(uint32_t h, uint32_t v)
{
    h = (h ^ v) * 0x9e3779b1u;
    return h ^ (h >> 15);
}

/* ---- stacks ---- */

static uint32_t frame_hash(frame f) { return mix(mix(7, (uint32_t)f.ret), (uint32_t)f.below); }

static void frame_put(grammar_run *r, int32_t i)
{
    uint32_t at = frame_hash(FRAME(r, i));
    while (r->frame_table[at & (uint32_t)(r->frame_cap - 1)]) at++;
    r->frame_table[at & (uint32_t)(r->frame_cap - 1)] = i;
}

/* The number of a frame; frame 0 is the empty stack. */
static int32_t frame_of(grammar_run *r, int32_t ret, int32_t below)
{
    const frame f = {ret, below, FRAME(r, below).depth + 1};
    const int32_t old = r->frame_cap;
    if (!reserve(r, &r->frames, 1)) return 0;
    if (!table_grow(r, &r->frame_table, &r->frame_cap, r->frames.n)) return 0;
    if (old != r->frame_cap)
        for (int32_t i = 1; i < r->frames.n; i++) frame_put(r, i);
    for (uint32_t at = frame_hash(f);; at++) {
        const int32_t i = r->frame_table[at & (uint32_t)(r->frame_cap - 1)];
        if (!i) break;
        if (FRAME(r, i).ret == ret && FRAME(r, i).below == below) return i;
    }
    FRAME(r, r->frames.n) = f;
    frame_put(r, r->frames.n);
    return r->frames.n++;
}

/* ---- closures ---- */

static void set_clear(grammar_run *r)
{
    for (int32_t i = 0; i < r->n_set; i++) r->seen[r->slot[i]] = 0;
    r->n_set = 0;
    r->accepts = false;
}

/* Adds what can still get to the end within the depth that is left. */
static void set_add(grammar_run *r, int32_t state, int32_t stack)
{
    const grammar_net *net = &r->g->net;
    if (FRAME(r, stack).depth + net->need[state] > GRAMMAR_MAX_DEPTH) return;
    uint32_t at = mix(mix(3, (uint32_t)state), (uint32_t)stack);
    for (;; at++) {
        const int32_t i = r->seen[at & (2 * MAX_ITEMS - 1)];
        if (!i) break;
        if (r->set[i - 1].state == state && r->set[i - 1].stack == stack) return;
    }
    if (r->n_set == MAX_ITEMS) {
        r->over = true;
        return;
    }
    r->set[r->n_set] = (item){state, stack};
    r->slot[r->n_set] = (int32_t)(at & (2 * MAX_ITEMS - 1));
    r->seen[r->slot[r->n_set]] = r->n_set + 1;
    r->n_set++;
}

static bool only_ends(const grammar_net *n, int32_t state)
{
    return n->end[state] && n->first[state] == n->first[state + 1];
}

static void close_one(grammar_run *r, item it)
{
    const grammar_net *net = &r->g->net;
    if (net->end[it.state]) {
        if (it.stack)
            set_add(r, FRAME(r, it.stack).ret, FRAME(r, it.stack).below);
        else
            r->accepts = true;
    }
    for (int32_t i = net->first[it.state]; i < net->first[it.state + 1]; i++) {
        const grammar_edge *g = &net->edge[i];
        if (g->kind == EDGE_EPS) set_add(r, g->to, it.stack);
        if (g->kind != EDGE_CALL) continue;
        const int32_t start = net->rule[g->a].start;
        if (only_ends(net, g->to)) { /* nothing to come back for */
            set_add(r, start, it.stack);
        } else if (FRAME(r, it.stack).depth + net->need[g->to] <= GRAMMAR_MAX_DEPTH &&
                   FRAME(r, it.stack).depth < GRAMMAR_MAX_DEPTH) {
            const int32_t f = frame_of(r, g->to, it.stack);
            if (f) set_add(r, start, f);
        }
    }
}

/* ---- positions ---- */

static bool takes_something(const grammar_net *n, int32_t state)
{
    for (int32_t i = n->first[state]; i < n->first[state + 1]; i++)
        if (n->edge[i].kind == EDGE_BYTES || n->edge[i].kind == EDGE_TOKEN) return true;
    return false;
}

static void position_put(grammar_run *r, int32_t i)
{
    uint32_t at = POSITION(r, i).hash;
    while (r->table[at & (uint32_t)(r->table_cap - 1)]) at++;
    r->table[at & (uint32_t)(r->table_cap - 1)] = i;
}

/* Order of items follows from the order of steps, so equal sets may come in different orders and
 * get two numbers; what they allow is the same. */
static int32_t position_of(grammar_run *r, const item *it, int32_t n, bool may_end)
{
    uint32_t h = mix(may_end, (uint32_t)n);
    if (!n && !may_end) return GRAMMAR_DEAD;
    for (int32_t i = 0; i < n; i++) h = mix(mix(h, (uint32_t)it[i].state), (uint32_t)it[i].stack);
    const int32_t old = r->table_cap;
    if (!reserve(r, &r->items, n) || !reserve(r, &r->positions, 1) ||
        !table_grow(r, &r->table, &r->table_cap, r->positions.n))
        return GRAMMAR_DEAD;
    if (old != r->table_cap)
        for (int32_t i = 1; i < r->positions.n; i++) position_put(r, i);
    for (uint32_t at = h;; at++) {
        const int32_t i = r->table[at & (uint32_t)(r->table_cap - 1)];
        if (!i) break;
        const position *p = &POSITION(r, i);
        if (p->hash == h && p->n == n && p->may_end == may_end &&
            (!n || !memcmp(&ITEM(r, p->first), it, (size_t)n * sizeof *it)))
            return i;
    }
    if (n) memcpy(&ITEM(r, r->items.n), it, (size_t)n * sizeof *it);
    POSITION(r, r->positions.n) = (position){
        .hash = h, .first = r->items.n, .n = n, .row = -1, .may_end = may_end};
    r->items.n += n;
    position_put(r, r->positions.n);
    return r->positions.n++;
}

/* The set with all that follows from it, as a position. */
static int32_t close_set(grammar_run *r)
{
    int32_t k = 0;
    for (int32_t i = 0; i < r->n_set && !r->over; i++) close_one(r, r->set[i]);
    r->work += 2 * r->n_set;
    if (r->over) return GRAMMAR_DEAD;
    for (int32_t i = 0; i < r->n_set; i++)
        if (takes_something(&r->g->net, r->set[i].state)) r->set[k++] = r->set[i];
    return position_of(r, r->set, k, r->accepts);
}

/* What a byte of a class, or a token (class -1), leads to. */
static int32_t follow(grammar_run *r, int32_t at, int cls, int32_t token)
{
    const grammar_net *net = &r->g->net;
    const position p = POSITION(r, at);
    set_clear(r);
    for (int32_t k = 0; k < p.n; k++) {
        const item it = ITEM(r, p.first + k);
        r->work += 1 + net->first[it.state + 1] - net->first[it.state];
        for (int32_t i = net->first[it.state]; i < net->first[it.state + 1]; i++) {
            const grammar_edge *g = &net->edge[i];
            const bool hit = cls >= 0 ? g->kind == EDGE_BYTES && g->a <= net->byte_of[cls] &&
                                            net->byte_of[cls] <= g->hi
                                      : g->kind == EDGE_TOKEN && g->a == token;
            if (hit) set_add(r, g->to, it.stack);
        }
    }
    return close_set(r);
}

/* Where a position's followers are in rows; -1 when there is no room. */
static int32_t row_of(grammar_run *r, int32_t at)
{
    const int n = r->g->net.n_classes;
    if (POSITION(r, at).row >= 0) return POSITION(r, at).row;
    if (!reserve(r, &r->rows, n)) return -1;
    POSITION(r, at).row = r->rows.n;
    for (int i = 0; i < n; i++) ROW(r, r->rows.n + i) = UNKNOWN;
    r->rows.n += n;
    return POSITION(r, at).row;
}

static int32_t step(grammar_run *r, int32_t at, uint8_t byte)
{
    const int cls = r->g->net.class_of[byte];
    const int32_t row = row_of(r, at);
    if (row < 0) return GRAMMAR_DEAD;
    const int32_t known = ROW(r, row + cls);
    if (known != UNKNOWN) return known;
    const int32_t to = follow(r, at, cls, -1);
    if (!r->over) ROW(r, row + cls) = to;
    return to;
}

/* ---- opening, forgetting ---- */

static void clear(grammar_run *r)
{
    for (int32_t i = 0; i < r->positions.n; i++) mem_free(POSITION(r, i).mask);
    vec *const all[] = {&r->items, &r->frames, &r->positions, &r->rows};
    for (int i = 0; i < 4; i++) {
        mem_free(all[i]->p);
        *all[i] = (vec){.size = all[i]->size};
    }
    mem_free(r->table);
    mem_free(r->frame_table);
    r->table = r->frame_table = NULL;
    r->table_cap = r->frame_cap = 0;
    r->bytes = 0;
}

/* Frame 0, position 0 (dead), and position 1: the start. */
static bool begin(grammar_run *r)
{
    r->over = false;
    r->work = 0;
    if (!reserve(r, &r->frames, 1) || !reserve(r, &r->positions, 1)) return false;
    FRAME(r, 0) = (frame){-1, 0, 0};
    r->frames.n = 1;
    POSITION(r, 0) = (position){.row = -1};
    r->positions.n = 1;
    set_clear(r);
    set_add(r, r->g->net.rule[0].start, 0);
    return close_set(r) == GRAMMAR_START;
}

static int32_t copy_stack(grammar_run *r, const frame *old, int32_t stack)
{
    int32_t way[GRAMMAR_MAX_DEPTH + 1], n = 0, to = 0;
    for (; stack; stack = old[stack].below) way[n++] = old[stack].ret;
    while (n && !r->over) to = frame_of(r, way[--n], to);
    return to;
}

/* Starts anew with nothing but the positions that are held. */
static bool forget(grammar_run *r)
{
    vec items = r->items, frames = r->frames, positions = r->positions;
    for (int32_t i = 0; i < positions.n; i++) mem_free(((position *)positions.p)[i].mask);
    r->items = (vec){.size = sizeof(item)};
    r->frames = (vec){.size = sizeof(frame)};
    r->positions = (vec){.size = sizeof(position)};
    clear(r);
    bool ok = begin(r);
    for (grammar_hold *h = r->holds; h; h = h->next) {
        const position p = ((position *)positions.p)[h->at];
        const item *it = (const item *)items.p + p.first;
        if (h->at == GRAMMAR_DEAD || !ok) continue;
        for (int32_t i = 0; i < p.n; i++)
            r->set[i] = (item){it[i].state, copy_stack(r, frames.p, it[i].stack)};
        h->at = position_of(r, r->set, p.n, p.may_end);
        ok = !r->over;
    }
    for (grammar_hold *h = r->holds; h && !ok; h = h->next) h->at = GRAMMAR_DEAD;
    mem_free(items.p);
    mem_free(frames.p);
    mem_free(positions.p);
    return ok;
}

err_code grammar_run_open(grammar_run **out, const grammar *g, err *e)
{
    grammar_run *r;
    *out = NULL;
    TRY(mem_alloc((void **)&r, 1, sizeof *r, "grammar", e));
    r->g = g;
    r->items.size = sizeof(item);
    r->frames.size = sizeof(frame);
    r->positions.size = sizeof(position);
    r->rows.size = sizeof(int32_t);
    const err_code rc = mem_alloc((void **)&r->set, MAX_ITEMS, sizeof(item), "grammar", e);
    if (rc != OK || !begin(r)) {
        grammar_run_close(&r);
        return rc != OK ? rc : err_set(e, E_LIMIT, "the grammar has too many ways to begin");
    }
    *out = r;
    return OK;
}

void grammar_run_close(grammar_run **r)
{
    if (!*r) return;
    clear(*r);
    mem_free((*r)->set);
    mem_free(*r);
    *r = NULL;
}

void grammar_hold_add(grammar_run *r, grammar_hold *h, int32_t at)
{
    *h = (grammar_hold){at, r->holds, &r->holds};
    if (h->next) h->next->link = &h->next;
    r->holds = h;
}

void grammar_hold_drop(grammar_hold *h)
{
    if (h->link) *h->link = h->next;
    if (h->next) h->next->link = h->link;
    *h = (grammar_hold){0};
}

/* ---- tokens ---- */

bool grammar_run_may_end(const grammar_run *r, int32_t at) { return POSITION(r, at).may_end; }

int32_t grammar_run_token(grammar_run *r, int32_t at, int32_t id)
{
    size_t n;
    if (id < 0 || id >= r->g->v->n_tokens || at == GRAMMAR_DEAD) return GRAMMAR_DEAD;
    r->over = false;
    if (tokenizer_is_special(r->g->v->t, id)) return follow(r, at, -1, id);
    const char *p = tokenizer_piece(r->g->v->t, id, &n);
    if (!n || n > GRAMMAR_LONGEST) return GRAMMAR_DEAD;
    for (size_t i = 0; i < n && at != GRAMMAR_DEAD; i++) at = step(r, at, (uint8_t)p[i]);
    return at;
}

static void mark_tokens(grammar_run *r, int32_t at, uint32_t *mask)
{
    const grammar_net *net = &r->g->net;
    const position p = POSITION(r, at);
    for (int32_t k = 0; k < p.n; k++) {
        const int32_t s = ITEM(r, p.first + k).state;
        for (int32_t i = net->first[s]; i < net->first[s + 1]; i++)
            if (net->edge[i].kind == EDGE_TOKEN && net->edge[i].a < r->g->v->n_tokens)
                mask[net->edge[i].a / 32] |= 1u << (net->edge[i].a % 32);
    }
}

/* Every token whose bytes lead somewhere. Rows are kept by depth: most steps are one look-up. */
static bool walk(grammar_run *r, int32_t at, uint32_t *mask)
{
    const grammar_vocab *v = r->g->v;
    const uint8_t *cls = r->g->net.class_of;
    int32_t way[GRAMMAR_LONGEST + 1] = {at}, row[GRAMMAR_LONGEST + 1] = {row_of(r, at)};
    if (row[0] < 0) return false;
    for (uint32_t i = 0; i < v->n_nodes;) {
        const grammar_node nd = v->node[i];
        int32_t to = ROW(r, row[nd.depth - 1] + cls[nd.byte]);
        if (to == UNKNOWN) {
            to = step(r, way[nd.depth - 1], nd.byte);
            if (r->over || r->work > MAX_WORK) return false;
        }
        if (to == GRAMMAR_DEAD) {
            i = nd.end;
            continue;
        }
        for (int32_t id = nd.token; id >= 0; id = v->same[id]) mask[id / 32] |= 1u << (id % 32);
        if (++i == nd.end) continue;
        way[nd.depth] = to;
        if ((row[nd.depth] = row_of(r, to)) < 0) return false;
    }
    mark_tokens(r, at, mask);
    return true;
}

static uint32_t *make_mask(grammar_run *r, const grammar_hold *h)
{
    const size_t words = ((size_t)r->g->v->n_tokens + 31) / 32;
    uint32_t *mask;
    err e;
    if (mem_alloc((void **)&mask, words, sizeof *mask, "mask", &e) != OK) return NULL;
    r->work = 0;
    r->over = false;
    if (!walk(r, h->at, mask)) {
        mem_free(mask);
        return NULL;
    }
    int32_t n = 0;
    for (size_t i = 0; i < words; i++) n += __builtin_popcount(mask[i]);
    POSITION(r, h->at).count = n;
    r->bytes += words * sizeof *mask;
    return POSITION(r, h->at).mask = mask;
}

/* A mask that fails for work or room is tried once more from a clean state, so that what is kept
 * never decides what is allowed. */
const uint32_t *grammar_run_mask(grammar_run *r, grammar_hold *h, int32_t *count)
{
    *count = 0;
    if (h->at == GRAMMAR_DEAD) return NULL;
    const uint32_t *m = POSITION(r, h->at).mask;
    if (!m) {
        if (r->bytes > ROOM && !forget(r)) return NULL;
        m = make_mask(r, h);
        if (!m && forget(r)) m = make_mask(r, h);
    }
    if (m) *count = POSITION(r, h->at).count;
    return m;
}
