/* Building nets, and what is found out about a finished one: which states lead to the end, with how
 * many calls, and which bytes no edge tells apart. */
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer_vocab.h"
#include "runtime/serve/grammar_internal.h"

void grammar_build_free(grammar_build *b)
{
    mem_free(b->edge);
    mem_free(b->rule);
    b->edge = NULL;
    b->rule = NULL;
}

static void fail(grammar_build *b, err_code rc, const char *why)
{
    if (b->rc == OK) b->rc = err_set(b->e, rc, "the grammar %s", why);
}

/* Room for one more of an array; false when there is none. */
static bool grow(grammar_build *b, void **p, int32_t n, int32_t *cap, size_t size)
{
    void *more;
    if (b->rc != OK) return false;
    if (n < *cap) return true;
    const int32_t want = *cap ? 2 * *cap : 256;
    if ((b->rc = mem_alloc(&more, (size_t)want, size, "grammar", b->e)) != OK) return false;
    if (n) memcpy(more, *p, (size_t)n * size);
    mem_free(*p);
    *p = more;
    *cap = want;
    return true;
}

int32_t grammar_state(grammar_build *b)
{
    if (b->n_states == GRAMMAR_MAX_STATES) fail(b, E_LIMIT, "has too many states");
    return b->rc == OK ? b->n_states++ : 0;
}

int32_t grammar_rule_new(grammar_build *b)
{
    if (!grow(b, (void **)&b->rule, b->n_rules, &b->cap_rules, sizeof *b->rule)) return 0;
    const int32_t start = grammar_state(b), end = grammar_state(b);
    b->rule[b->n_rules] = (grammar_rule){start, end};
    return b->n_rules++;
}

static void add_edge(grammar_build *b, grammar_edge g)
{
    if (b->n_edges == GRAMMAR_MAX_EDGES) fail(b, E_LIMIT, "has too many edges");
    if (grow(b, (void **)&b->edge, b->n_edges, &b->cap_edges, sizeof *b->edge))
        b->edge[b->n_edges++] = g;
}

void grammar_bytes(grammar_build *b, int32_t from, int lo, int hi, int32_t to)
{
    if (lo <= hi) add_edge(b, (grammar_edge){from, to, lo, EDGE_BYTES, (uint8_t)hi});
}

void grammar_eps(grammar_build *b, int32_t from, int32_t to)
{
    add_edge(b, (grammar_edge){from, to, 0, EDGE_EPS, 0});
}

void grammar_call(grammar_build *b, int32_t from, int32_t rule, int32_t to)
{
    add_edge(b, (grammar_edge){from, to, rule, EDGE_CALL, 0});
}

int32_t grammar_call_to(grammar_build *b, int32_t from, int32_t rule)
{
    const int32_t to = grammar_state(b);
    grammar_call(b, from, rule, to);
    return to;
}

int32_t grammar_byte_to(grammar_build *b, int32_t from, int byte)
{
    const int32_t to = grammar_state(b);
    grammar_bytes(b, from, byte, byte, to);
    return to;
}

int32_t grammar_text(grammar_build *b, int32_t from, const char *s, size_t n)
{
    for (size_t i = 0; i < n && b->rc == OK; i++) from = grammar_byte_to(b, from, (uint8_t)s[i]);
    return from;
}

int32_t grammar_literal(grammar_build *b, int32_t from, const char *s)
{
    size_t n = strlen(s), at, len;
    int32_t id;
    while (n && b->t && tokenizer_find_special(b->t, s, n, &at, &len, &id)) {
        from = grammar_text(b, from, s, at);
        const int32_t to = grammar_state(b);
        add_edge(b, (grammar_edge){from, to, id, EDGE_TOKEN, 0});
        from = to;
        s += at + len;
        n -= at + len;
    }
    return grammar_text(b, from, s, n);
}

/* ---- UTF-8 ---- */

/* lo and hi have n bytes each, and every code point between them as many. */
static void add_sequence(grammar_build *b, int32_t from, const uint8_t *lo, const uint8_t *hi,
                         int n, int32_t to)
{
    if (n == 1) {
        grammar_bytes(b, from, lo[0], hi[0], to);
        return;
    }
    if (lo[0] == hi[0]) {
        add_sequence(b, grammar_byte_to(b, from, lo[0]), lo + 1, hi + 1, n - 1, to);
        return;
    }
    static const uint8_t least[] = {0x80, 0x80, 0x80}, most[] = {0xbf, 0xbf, 0xbf};
    int a = lo[0], z = hi[0];
    if (memcmp(lo + 1, least, (size_t)n - 1) != 0) { /* the first byte's tail */
        add_sequence(b, grammar_byte_to(b, from, a), lo + 1, most, n - 1, to);
        a++;
    }
    if (memcmp(hi + 1, most, (size_t)n - 1) != 0) { /* the last byte's head */
        add_sequence(b, grammar_byte_to(b, from, z), least, hi + 1, n - 1, to);
        z--;
    }
    if (a > z) return;
    const int32_t mid = grammar_state(b);
    grammar_bytes(b, from, a, z, mid);
    add_sequence(b, mid, least, most, n - 1, to);
}

void grammar_codes(grammar_build *b, int32_t from, uint32_t lo, uint32_t hi, int32_t to)
{
    static const uint32_t part[][2] = {
        {0, 0x7f}, {0x80, 0x7ff}, {0x800, 0xd7ff}, {0xe000, 0xffff}, {0x10000, 0x10ffff}};
    uint8_t l[4], h[4];
    for (int i = 0; i < 5; i++) {
        const uint32_t a = lo > part[i][0] ? lo : part[i][0], z = hi < part[i][1] ? hi : part[i][1];
        if (a > z) continue;
        const int n = (int)utf8_put((char *)l, a);
        (void)utf8_put((char *)h, z);
        add_sequence(b, from, l, h, n, to);
    }
}

/* ---- the finished net ---- */

void grammar_net_free(grammar_net *n)
{
    mem_free(n->first);
    mem_free(n->edge);
    mem_free(n->need);
    mem_free(n->end);
    mem_free(n->rule);
    memset(n, 0, sizeof *n);
}

/* Ranges of bytes are cut around bytes that no token is alone. */
static void cut_bytes(grammar_build *b, const grammar_vocab *v)
{
    const int32_t n = b->n_edges;
    for (int32_t i = 0; i < n && b->rc == OK; i++) {
        const grammar_edge g = b->edge[i];
        if (g.kind != EDGE_BYTES) continue;
        int lo = g.a;
        bool first = true;
        for (int c = g.a; c <= g.hi + 1; c++) {
            if (c <= g.hi && v->byte[c]) continue;
            if (c > lo && first)
                b->edge[i].a = lo, b->edge[i].hi = (uint8_t)(c - 1), first = false;
            else if (c > lo)
                grammar_bytes(b, g.from, lo, c - 1, g.to);
            lo = c + 1;
        }
        if (first) b->edge[i].a = 1, b->edge[i].hi = 0; /* takes nothing */
    }
}

/* ---- the fewest calls below each state on a way to its rule's end ---- */

/* Settled in rising order: an edge gives its state what the state behind it has, a call at least
 * one more than its rule's start. So a value found is of the level at hand or of the next one. */
typedef struct {
    grammar_net *n;
    int32_t *to_first, *to_edge;     /* edges by the state they lead to */
    int32_t *call_first, *call_edge; /* calls by rule */
    int32_t *rule_of;                /* of a rule's start; -1 */
    int32_t *queue[2], n_queue[2];
    bool *settled;
} need_search;

static void need_free(need_search *x)
{
    mem_free(x->to_first);
    mem_free(x->to_edge);
    mem_free(x->call_first);
    mem_free(x->call_edge);
    mem_free(x->rule_of);
    mem_free(x->queue[0]);
    mem_free(x->queue[1]);
    mem_free(x->settled);
}

static err_code need_open(need_search *x, grammar_net *n, err *e)
{
    const size_t states = (size_t)n->n_states, edges = (size_t)n->first[n->n_states] + 1;
    *x = (need_search){.n = n};
    struct {
        void **out;
        size_t count;
    } all[] = {{(void **)&x->to_first, states + 1},
               {(void **)&x->to_edge, edges},
               {(void **)&x->call_first, (size_t)n->n_rules + 1},
               {(void **)&x->call_edge, edges},
               {(void **)&x->rule_of, states},
               {(void **)&x->queue[0], states},
               {(void **)&x->queue[1], states}};
    for (size_t i = 0; i < sizeof all / sizeof *all; i++)
        TRY(mem_alloc(all[i].out, all[i].count, sizeof(int32_t), "grammar", e));
    return mem_alloc((void **)&x->settled, states, 1, "grammar", e);
}

/* Counting sort of edge numbers by a key below n_keys; key < 0: left out. */
static void sort_by(int32_t *first, int32_t *out, int32_t n_keys, const grammar_net *n, bool calls)
{
    const int32_t n_edges = n->first[n->n_states];
    for (int pass = 0; pass < 2; pass++) {
        for (int32_t i = 0; i < n_edges; i++) {
            const grammar_edge *g = &n->edge[i];
            if (calls && g->kind != EDGE_CALL) continue;
            const int32_t key = calls ? g->a : g->to;
            if (pass)
                out[first[key]++] = i;
            else
                first[key + 1]++;
        }
        for (int32_t k = 0; !pass && k < n_keys; k++) first[k + 1] += first[k];
    }
    for (int32_t k = n_keys; k > 0; k--) first[k] = first[k - 1];
    first[0] = 0;
}

static void need_offer(need_search *x, int32_t s, int32_t v, int32_t level)
{
    if (v >= x->n->need[s]) return;
    const int which = v > level; /* each state once into each queue at most */
    x->n->need[s] = v;
    x->queue[which][x->n_queue[which]++] = s;
}

static void need_settle(need_search *x, int32_t s, int32_t level)
{
    grammar_net *n = x->n;
    x->settled[s] = true;
    for (int32_t k = x->to_first[s]; k < x->to_first[s + 1]; k++) {
        const grammar_edge *g = &n->edge[x->to_edge[k]];
        const int32_t in = g->kind == EDGE_CALL ? n->rule[g->a].start : -1;
        if (g->kind == EDGE_BYTES && g->a > g->hi) continue;
        if (in >= 0 && !x->settled[in]) continue;
        const int32_t v = in >= 0 && n->need[in] + 1 > level ? n->need[in] + 1 : level;
        need_offer(x, g->from, v, level);
    }
    if (x->rule_of[s] < 0) return;
    for (int32_t k = x->call_first[x->rule_of[s]]; k < x->call_first[x->rule_of[s] + 1]; k++) {
        const grammar_edge *g = &n->edge[x->call_edge[k]];
        if (x->settled[g->to]) need_offer(x, g->from, level + 1, level);
    }
}

static err_code find_need(grammar_net *n, err *e)
{
    need_search x;
    err_code rc = need_open(&x, n, e);
    if (rc != OK) {
        need_free(&x);
        return rc;
    }
    sort_by(x.to_first, x.to_edge, n->n_states, n, false);
    sort_by(x.call_first, x.call_edge, n->n_rules, n, true);
    for (int32_t s = 0; s < n->n_states; s++) {
        n->need[s] = GRAMMAR_NEVER;
        x.rule_of[s] = -1;
    }
    for (int32_t i = 0; i < n->n_rules; i++) x.rule_of[n->rule[i].start] = i;
    for (int32_t s = 0; s < n->n_states; s++)
        if (n->end[s]) need_offer(&x, s, 0, 0);
    for (int32_t level = 0; level <= GRAMMAR_MAX_DEPTH; level++) {
        for (int32_t k = 0; k < x.n_queue[0]; k++)
            if (!x.settled[x.queue[0][k]]) need_settle(&x, x.queue[0][k], level);
        int32_t *done = x.queue[0];
        x.queue[0] = x.queue[1];
        x.n_queue[0] = x.n_queue[1];
        x.queue[1] = done;
        x.n_queue[1] = 0;
    }
    need_free(&x);
    return OK;
}

/* Edges sorted by state, then those that lead nowhere dropped. */
static err_code sort_edges(grammar_net *n, const grammar_build *b, err *e)
{
    TRY(mem_alloc((void **)&n->first, (size_t)n->n_states + 1, sizeof *n->first, "grammar", e));
    TRY(mem_alloc((void **)&n->edge, (size_t)b->n_edges + 1, sizeof *n->edge, "grammar", e));
    for (int32_t i = 0; i < b->n_edges; i++) n->first[b->edge[i].from + 1]++;
    for (int32_t s = 0; s < n->n_states; s++) n->first[s + 1] += n->first[s];
    for (int32_t i = 0; i < b->n_edges; i++) n->edge[n->first[b->edge[i].from]++] = b->edge[i];
    for (int32_t s = n->n_states; s > 0; s--) n->first[s] = n->first[s - 1];
    n->first[0] = 0;
    return OK;
}

static void drop_dead(grammar_net *n)
{
    int32_t k = 0;
    for (int32_t s = 0; s < n->n_states; s++) {
        const int32_t a = n->first[s], z = n->first[s + 1];
        n->first[s] = k;
        for (int32_t i = a; i < z; i++) {
            const grammar_edge g = n->edge[i];
            const bool empty = g.kind == EDGE_BYTES && g.a > g.hi;
            const bool never = g.kind == EDGE_CALL &&
                               n->need[n->rule[g.a].start] >= GRAMMAR_MAX_DEPTH;
            if (!empty && !never && n->need[g.to] <= GRAMMAR_MAX_DEPTH) n->edge[k++] = g;
        }
    }
    n->first[n->n_states] = k;
}

static void find_classes(grammar_net *n)
{
    bool begins[257] = {true};
    for (int32_t i = 0; i < n->first[n->n_states]; i++) {
        if (n->edge[i].kind != EDGE_BYTES) continue;
        begins[n->edge[i].a] = true;
        begins[n->edge[i].hi + 1] = true;
    }
    n->n_classes = 0;
    for (int c = 0; c < 256; c++) {
        if (begins[c]) n->byte_of[n->n_classes++] = (uint8_t)c;
        n->class_of[c] = (uint8_t)(n->n_classes - 1);
    }
}

err_code grammar_net_make(grammar_net *out, grammar_build *b, const grammar_vocab *v, err *e)
{
    grammar_net n = {.n_states = b->n_states, .n_rules = b->n_rules};
    memset(out, 0, sizeof *out);
    cut_bytes(b, v);
    TRY(b->rc);
    err_code rc = sort_edges(&n, b, e);
    if (rc == OK)
        rc = mem_alloc((void **)&n.need, (size_t)n.n_states, sizeof *n.need, "grammar", e);
    if (rc == OK) rc = mem_alloc((void **)&n.end, (size_t)n.n_states, 1, "grammar", e);
    if (rc != OK) {
        grammar_net_free(&n);
        return rc;
    }
    n.rule = b->rule;
    b->rule = NULL;
    for (int32_t i = 0; i < n.n_rules; i++) n.end[n.rule[i].end] = true;
    if ((rc = find_need(&n, e)) != OK) {
        grammar_net_free(&n);
        return rc;
    }
    drop_dead(&n);
    find_classes(&n);
    *out = n;
    if (n.need[n.rule[0].start] < GRAMMAR_MAX_DEPTH) return OK;
    grammar_net_free(out);
    return err_set(e, E_INPUT, "no answer can match");
}
