/* Regular expressions to nets: the syntax that Python and ECMA scripts share, less what an
 * automaton has not. Where the two differ in what a class holds, only what both take is generated.
  */
#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "runtime/serve/grammar_internal.h"

enum { MAX_NODES = 20000, MAX_NEST = 64, MAX_RANGES = 2048, MAX_REPEAT = 100000 };
#define LAST_CODE 0x10ffffu

typedef enum { RX_EMPTY, RX_CLASS, RX_CAT, RX_ALT, RX_REPEAT, RX_BEGIN, RX_END } rx_kind;
typedef struct {
    rx_kind kind;
    int32_t a, b;     /* children; of a class: its first range and how many */
    int32_t min, max; /* max -1: no bound */
} rx_node;

typedef struct {
    const char *text, *p, *end;
    rx_node *node;
    int32_t n_nodes;
    code_range *range;
    int32_t n_ranges, cap_ranges;
    int depth;
    err *e;
    err_code rc;
    grammar_build *b;
    regex_use use;
} rx;

static int32_t fail(rx *x, const char *why)
{
    if (x->rc == OK)
        x->rc = err_set(x->e, E_INPUT, "pattern: at byte %d: %s", (int)(x->p - x->text), why);
    return 0;
}

static int32_t node(rx *x, rx_node n)
{
    if (x->n_nodes == MAX_NODES) {
        if (x->rc == OK) x->rc = err_set(x->e, E_LIMIT, "pattern: too long");
        return 0;
    }
    x->node[x->n_nodes] = n;
    return x->n_nodes++;
}

/* ---- classes: ranges gathered at the end of x->range, then put in order ---- */

static void add_range(rx *x, uint32_t lo, uint32_t hi)
{
    code_range *more;
    if (x->rc != OK || lo > hi) return;
    if (x->n_ranges == x->cap_ranges) {
        const int32_t cap = x->cap_ranges ? 2 * x->cap_ranges : 256;
        x->rc = mem_alloc((void **)&more, (size_t)cap, sizeof *more, "pattern", x->e);
        if (x->rc != OK) return;
        if (x->n_ranges) memcpy(more, x->range, (size_t)x->n_ranges * sizeof *more);
        mem_free(x->range);
        x->range = more;
        x->cap_ranges = cap;
    }
    x->range[x->n_ranges++] = (code_range){lo, hi};
}

static void add_ranges(rx *x, const code_range *r, int n)
{
    for (int i = 0; i < n; i++) add_range(x, r[i].lo, r[i].hi);
}

/* Sorts and joins the ranges from `first` on. */
static void join_ranges(rx *x, int32_t first)
{
    code_range *r = x->range + first;
    const int32_t n = x->n_ranges - first;
    int32_t k = 0;
    for (int32_t i = 1; i < n; i++) { /* few of them */
        const code_range v = r[i];
        int32_t at = i;
        for (; at > 0 && r[at - 1].lo > v.lo; at--) r[at] = r[at - 1];
        r[at] = v;
    }
    for (int32_t i = 0; i < n; i++) {
        if (k && r[i].lo <= r[k - 1].hi + 1) {
            if (r[i].hi > r[k - 1].hi) r[k - 1].hi = r[i].hi;
        } else {
            r[k++] = r[i];
        }
    }
    x->n_ranges = first + k;
}

static void negate_ranges(rx *x, int32_t first)
{
    join_ranges(x, first);
    const int32_t n = x->n_ranges - first;
    uint32_t from = 0;
    for (int32_t i = 0; i < n; i++) {
        const code_range r = x->range[first + i];
        if (r.lo > from) add_range(x, from, r.lo - 1);
        from = r.hi + 1;
    }
    if (from <= LAST_CODE) add_range(x, from, LAST_CODE);
    if (x->rc != OK) return;
    memmove(x->range + first, x->range + first + n,
            (size_t)(x->n_ranges - first - n) * sizeof *x->range);
    x->n_ranges -= n;
}

#define COUNT(a) (int)(sizeof(a) / sizeof *(a))
static const code_range digits[] = {{'0', '9'}}, not_digits[] = {{0, '/'}, {':', 0x7f}};
static const code_range words[] = {{'0', '9'}, {'A', 'Z'}, {'_', '_'}, {'a', 'z'}};
static const code_range not_words[] = {{0, '/'}, {':', '@'}, {'[', '^'}, {'`', '`'}, {'{', 0x7f}};
static const code_range spaces[] = {{9, 13},          {' ', ' '},       {0xa0, 0xa0},
                                    {0x1680, 0x1680}, {0x2000, 0x200a}, {0x2028, 0x2029},
                                    {0x202f, 0x202f}, {0x205f, 0x205f}, {0x3000, 0x3000}};
static const code_range not_spaces[] = {{0, 8},           {14, 0x1b},       {'!', 0x84},
                                        {0x86, 0x9f},     {0xa1, 0x167f},   {0x1681, 0x1fff},
                                        {0x200b, 0x2027}, {0x202a, 0x202e}, {0x2030, 0x205e},
                                        {0x2060, 0x2fff}, {0x3001, 0xfefe}, {0xff00, LAST_CODE}};
static const code_range dots[] = {
    {0, 9}, {11, 12}, {14, 0x84}, {0x86, 0x2027}, {0x202a, LAST_CODE}};

static bool add_shorthand(rx *x, char c)
{
    switch (c) {
    case 'd': add_ranges(x, digits, COUNT(digits)); return true;
    case 'D': add_ranges(x, not_digits, COUNT(not_digits)); return true;
    case 'w': add_ranges(x, words, COUNT(words)); return true;
    case 'W': add_ranges(x, not_words, COUNT(not_words)); return true;
    case 's': add_ranges(x, spaces, COUNT(spaces)); return true;
    case 'S': add_ranges(x, not_spaces, COUNT(not_spaces)); return true;
    default: return false;
    }
}

static uint32_t code_point(rx *x)
{
    const uint8_t c = (uint8_t)*x->p++;
    int more = c >= 0xf0 ? 3 : c >= 0xe0 ? 2 : c >= 0xc0 ? 1 : 0;
    uint32_t v = more ? c & (0x3fu >> more) : c;
    while (more-- && x->p < x->end) v = v << 6 | ((uint8_t)*x->p++ & 0x3f);
    return v;
}

static uint32_t hex(rx *x, int n)
{
    uint32_t v = 0;
    for (int i = 0; i < n; i++) {
        const char c = x->p < x->end ? *x->p : '\0';
        const int d = c >= '0' && c <= '9'   ? c - '0'
                      : c >= 'a' && c <= 'f' ? c - 'a' + 10
                      : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                             : -1;
        if (d < 0) return (uint32_t)fail(x, "expected hexadecimal digits");
        v = v * 16 + (uint32_t)d;
        x->p++;
    }
    return v;
}

/* Behind a backslash: one code point. */
static uint32_t escape(rx *x)
{
    static const char letters[] = "tnrfva0", codes[] = "\t\n\r\f\v\a";
    const char c = *x->p;
    const char *at = c ? strchr(letters, c) : NULL;
    if (at && c != '0') {
        x->p++;
        return (uint8_t)codes[at - letters];
    }
    if (c == 'x' || c == 'u') {
        x->p++;
        const uint32_t v = hex(x, c == 'x' ? 2 : 4);
        if (v - 0xd800 < 0x800) return (uint32_t)fail(x, "a surrogate is not a character");
        return v;
    }
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'))
        return (uint32_t)fail(x, "this escape is not supported (back-references, \\b, \\p and the "
                                 "like are not)");
    return code_point(x);
}

/* One end of a range, or a shorthand (*wide). */
static uint32_t class_atom(rx *x, bool *wide)
{
    *wide = false;
    if (*x->p != '\\') return code_point(x);
    if (++x->p == x->end) return (uint32_t)fail(x, "the pattern ends in a backslash");
    if (add_shorthand(x, *x->p)) {
        x->p++;
        *wide = true;
        return 0;
    }
    if (*x->p == 'b') {
        x->p++;
        return '\b';
    }
    return escape(x);
}

static int32_t parse_class(rx *x)
{
    const int32_t first = x->n_ranges;
    bool wide, negated = false, any = false, ascii_only = false, space = false;
    if (x->p < x->end && *x->p == '^') {
        negated = true;
        x->p++;
    }
    while (x->rc == OK && x->p < x->end && (*x->p != ']')) {
        const uint32_t lo = class_atom(x, &wide);
        uint32_t hi = lo;
        any = true;
        if (wide) {
            if (negated && strchr("DWS", x->p[-1]))
                return fail(x, "\\D, \\W and \\S are not supported in a negated class");
            ascii_only |= x->p[-1] == 'd' || x->p[-1] == 'w';
            space |= x->p[-1] == 's';
            continue;
        }
        if (x->p + 1 < x->end && *x->p == '-' && x->p[1] != ']') {
            x->p++;
            hi = class_atom(x, &wide);
            if (wide || hi < lo) return fail(x, "the range of a class is out of order");
        }
        add_range(x, lo, hi);
        if (x->n_ranges - first > MAX_RANGES) return fail(x, "a class is too long");
    }
    if (x->rc != OK) return 0;
    if (x->p == x->end) return fail(x, "a class is not closed");
    if (!any) return fail(x, "a class is empty");
    x->p++;
    if (negated) { /* what one of the two dialects takes for a digit or the like is left out */
        if (ascii_only) add_range(x, 0x80, LAST_CODE);
        if (space) {
            add_range(x, 0x1c, 0x1f);
            add_range(x, 0x85, 0x85);
            add_range(x, 0xfeff, 0xfeff);
        }
        negate_ranges(x, first);
    } else {
        join_ranges(x, first);
    }
    return node(x, (rx_node){.kind = RX_CLASS, .a = first, .b = x->n_ranges - first});
}

/* ---- the syntax ---- */

static int32_t parse_alt(rx *x);

static int32_t single(rx *x, uint32_t c)
{
    const int32_t first = x->n_ranges;
    add_range(x, c, c);
    return node(x, (rx_node){.kind = RX_CLASS, .a = first, .b = 1});
}

static int32_t parse_group(rx *x)
{
    if (x->p < x->end && *x->p == '?') {
        const char *q = x->p + 1;
        const bool python = q + 1 < x->end && *q == 'P' && q[1] == '<';
        if (python) q++;
        if (q < x->end && *q == ':') {
            x->p = q + 1;
        } else if (q + 1 < x->end && *q == '<' && q[1] != '=' && q[1] != '!') {
            while (q < x->end && *q != '>') q++;
            if (q == x->end) return fail(x, "the name of a group is not closed");
            x->p = q + 1;
        } else {
            return fail(x, "look-around, conditions and flags are not supported");
        }
    }
    if (++x->depth > MAX_NEST) return fail(x, "groups are nested too deep");
    const int32_t n = parse_alt(x);
    x->depth--;
    if (x->rc != OK) return 0;
    if (x->p == x->end || *x->p != ')') return fail(x, "a group is not closed");
    x->p++;
    return n;
}

static int32_t parse_atom(rx *x)
{
    const int32_t first = x->n_ranges;
    const char c = *x->p;
    switch (c) {
    case '(': x->p++; return parse_group(x);
    case '[': x->p++; return parse_class(x);
    case '.':
        x->p++;
        add_ranges(x, dots, COUNT(dots));
        return node(x, (rx_node){.kind = RX_CLASS, .a = first, .b = COUNT(dots)});
    case '^': x->p++; return node(x, (rx_node){.kind = RX_BEGIN});
    case '$': x->p++; return node(x, (rx_node){.kind = RX_END});
    case '*':
    case '+':
    case '?': return fail(x, "nothing to repeat");
    case '\\':
        if (++x->p == x->end) return fail(x, "the pattern ends in a backslash");
        if (add_shorthand(x, *x->p)) {
            x->p++;
            return node(x, (rx_node){.kind = RX_CLASS, .a = first, .b = x->n_ranges - first});
        }
        return single(x, escape(x));
    default: return single(x, code_point(x));
    }
}

/* {m}, {m,}, {m,n}; false when it is none (then { stands for itself). */
static bool parse_counts(rx *x, int32_t *min, int32_t *max)
{
    const char *q = x->p + 1;
    int32_t v[2] = {0, -1};
    bool any = false;
    for (; q < x->end && *q >= '0' && *q <= '9' && v[0] <= MAX_REPEAT; q++, any = true)
        v[0] = v[0] * 10 + (*q - '0');
    if (!any) return false;
    v[1] = v[0];
    if (q < x->end && *q == ',') {
        v[1] = -1;
        for (q++; q < x->end && *q >= '0' && *q <= '9' && v[1] <= MAX_REPEAT; q++)
            v[1] = (v[1] < 0 ? 0 : v[1] * 10) + (*q - '0');
    }
    if (q == x->end || *q != '}') {
        if (v[0] > MAX_REPEAT || v[1] > MAX_REPEAT) fail(x, "a count is too large");
        return false;
    }
    x->p = q + 1;
    *min = v[0];
    *max = v[1];
    if (v[0] > MAX_REPEAT || v[1] > MAX_REPEAT) fail(x, "a count is too large");
    if (v[1] >= 0 && v[1] < v[0]) fail(x, "a count is out of order");
    return true;
}

static int32_t parse_repeat(rx *x)
{
    int32_t n = parse_atom(x), min, max;
    for (int times = 0; x->rc == OK && x->p < x->end; times++) {
        const char c = *x->p;
        if (c == '*' || c == '+' || c == '?') {
            x->p++;
            min = c == '+';
            max = c == '?' ? 1 : -1;
        } else if (c != '{' || !parse_counts(x, &min, &max)) {
            break;
        }
        if (times) return fail(x, "nothing to repeat");
        if (x->node[n].kind == RX_BEGIN || x->node[n].kind == RX_END)
            return fail(x, "^ and $ cannot be repeated");
        n = node(x, (rx_node){RX_REPEAT, n, 0, min, max});
        if (x->p < x->end && *x->p == '?') x->p++; /* lazy: the same language */
        if (x->p < x->end && *x->p == '+') return fail(x, "possessive repeats are not supported");
    }
    return n;
}

static int32_t parse_cat(rx *x)
{
    int32_t n = node(x, (rx_node){.kind = RX_EMPTY});
    while (x->rc == OK && x->p < x->end && *x->p != '|' && *x->p != ')') {
        const int32_t right = parse_repeat(x);
        n = node(x, (rx_node){.kind = RX_CAT, .a = n, .b = right});
    }
    return n;
}

static int32_t parse_alt(rx *x)
{
    int32_t n = parse_cat(x);
    while (x->rc == OK && x->p < x->end && *x->p == '|') {
        x->p++;
        const int32_t right = parse_cat(x);
        n = node(x, (rx_node){.kind = RX_ALT, .a = n, .b = right});
    }
    return n;
}

/* ---- to a net ---- */

static int32_t emit(rx *x, int32_t n, int32_t from);

static void emit_class(rx *x, const rx_node *n, int32_t from, int32_t to)
{
    const code_range *r = x->range + n->a;
    if (x->use == REGEX_JSON) {
        grammar_json_codes(x->b, from, r, n->b, to);
        return;
    }
    for (int32_t i = 0; i < n->b; i++) /* U+0000 never: texts end there */
        grammar_codes(x->b, from, r[i].lo ? r[i].lo : 1, r[i].hi, to);
}

static int32_t emit_repeat(rx *x, const rx_node *n, int32_t from)
{
    grammar_build *b = x->b;
    for (int32_t i = 0; i < n->min && b->rc == OK; i++) from = emit(x, n->a, from);
    const int32_t out = grammar_state(b);
    if (n->max < 0) {
        const int32_t loop = grammar_state(b);
        grammar_eps(b, from, loop);
        grammar_eps(b, emit(x, n->a, loop), loop);
        grammar_eps(b, loop, out);
        return out;
    }
    for (int32_t i = n->min; i < n->max && b->rc == OK; i++) {
        grammar_eps(b, from, out);
        from = emit(x, n->a, from);
    }
    grammar_eps(b, from, out);
    return out;
}

/* A chain of CAT leans to the left and may be long: it is walked with an explicit list. */
static int32_t emit_cat(rx *x, int32_t n, int32_t from)
{
    int32_t count = 0, *way;
    for (int32_t i = n; x->node[i].kind == RX_CAT; i = x->node[i].a) count++;
    if (x->b->rc != OK) return from;
    x->b->rc = mem_alloc((void **)&way, (size_t)count, sizeof *way, "pattern", x->e);
    if (x->b->rc != OK) return from;
    for (int32_t i = n, k = count; x->node[i].kind == RX_CAT; i = x->node[i].a)
        way[--k] = x->node[i].b;
    for (int32_t k = 0; k < count; k++) from = emit(x, way[k], from);
    mem_free(way);
    return from;
}

static int32_t emit_alt(rx *x, int32_t n, int32_t from)
{
    const int32_t out = grammar_state(x->b);
    for (;; n = x->node[n].a) {
        const bool last = x->node[n].kind != RX_ALT;
        grammar_eps(x->b, emit(x, last ? n : x->node[n].b, from), out);
        if (last) return out;
    }
}

static int32_t emit(rx *x, int32_t n, int32_t from)
{
    const rx_node *nd = &x->node[n];
    int32_t out;
    if (x->b->rc != OK || x->rc != OK) return from;
    switch (nd->kind) {
    case RX_CLASS:
        out = grammar_state(x->b);
        emit_class(x, nd, from, out);
        return out;
    case RX_CAT: return emit_cat(x, n, from);
    case RX_ALT: return emit_alt(x, n, from);
    case RX_REPEAT: return emit_repeat(x, nd, from);
    case RX_BEGIN:
    case RX_END:
        if (x->rc == OK)
            x->rc = err_set(x->e, E_INPUT,
                            "pattern: ^ and $ are supported at the ends of the pattern only");
        return from;
    default: return from;
    }
}

static const code_range anything[] = {{0, LAST_CODE}};

static int32_t emit_anything(rx *x, int32_t from)
{
    const int32_t loop = grammar_state(x->b);
    grammar_eps(x->b, from, loop);
    grammar_json_codes(x->b, loop, anything, 1, loop);
    return loop;
}

/* Takes ^ and $ off the ends of a chain: what is left runs from `n`. */
static int32_t take_anchors(rx *x, int32_t n, bool *begins, bool *ends)
{
    int32_t i = n, above = -1;
    *begins = *ends = false;
    while (x->node[n].kind == RX_CAT && x->node[x->node[n].b].kind == RX_END) {
        *ends = true;
        n = x->node[n].a;
    }
    for (i = n; x->node[i].kind == RX_CAT; i = x->node[i].a) above = i;
    while (above >= 0 && x->node[x->node[above].b].kind == RX_BEGIN) {
        *begins = true;
        x->node[above].b = x->node[above].a; /* the empty node below it */
        int32_t next = -1;
        for (i = n; i != above; i = x->node[i].a) next = i;
        above = next;
    }
    return n;
}

/* One branch of the pattern; a group around all of it is looked into. */
static void emit_branch(rx *x, int32_t n, int32_t from, int32_t to)
{
    bool begins, ends;
    const int32_t body = take_anchors(x, n, &begins, &ends);
    if (x->use == REGEX_JSON && !begins) from = emit_anything(x, from);
    int32_t out = emit(x, body, from);
    if (x->use == REGEX_JSON && !ends) out = emit_anything(x, out);
    grammar_eps(x->b, out, to);
}

err_code grammar_regex_add(grammar_build *b, int32_t from, const char *pattern, regex_use use,
                           int32_t to, err *e)
{
    const size_t n = strlen(pattern);
    rx x = {.text = pattern, .p = pattern, .end = pattern + n, .e = e, .b = b, .use = use};
    if (n > MAX_NODES) return err_set(e, E_LIMIT, "pattern: longer than %d bytes", MAX_NODES);
    if (!json_utf8_valid(pattern, n)) return err_set(e, E_INPUT, "pattern: not UTF-8");
    TRY(mem_alloc((void **)&x.node, MAX_NODES, sizeof *x.node, "pattern", e));
    int32_t top = parse_alt(&x);
    if (x.rc == OK && x.p < x.end) fail(&x, "unbalanced parenthesis");
    for (; x.rc == OK; top = x.node[top].a) {
        const bool last = x.node[top].kind != RX_ALT;
        emit_branch(&x, last ? top : x.node[top].b, from, to);
        if (last) break;
    }
    mem_free(x.node);
    mem_free(x.range);
    return x.rc != OK ? x.rc : b->rc;
}
