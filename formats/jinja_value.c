/* Values: memory, maps, truth, equality, order, items and attributes, as Python has them. */
#include <math.h>
#include <string.h>

#include "base/hash.h"
#include "base/mem.h"
#include "formats/jinja_internal.h"

jinja_value jinja_true = {.type = JV_BOOL, .b = true}, jinja_false = {.type = JV_BOOL},
            jinja_null = {.type = JV_NONE};

/* ---- memory ---- */

struct jinja_block {
    jinja_block *next;
    size_t used, cap;
};
enum { BLOCK = 32 << 10 };

err_code jinja_get(jinja_arena *a, void **out, size_t bytes, err *e)
{
    const size_t head = (sizeof(jinja_block) + 15) & ~(size_t)15;
    *out = NULL;
    if (bytes > a->limit) return err_set(e, E_LIMIT, "the template takes too much memory");
    bytes = (bytes + 15) & ~(size_t)15;
    if (!a->top || a->top->cap - a->top->used < bytes) {
        jinja_block *b;
        const size_t want = bytes > BLOCK / 4 ? bytes + head : BLOCK;
        if (want > a->limit - a->bytes)
            return err_set(e, E_LIMIT, "the template takes too much memory");
        TRY(mem_alloc((void **)&b, 1, want, "template", e));
        b->used = head;
        b->cap = want;
        a->bytes += want;
        if (want != BLOCK && a->top) { /* a block of its own stands behind the one in use */
            b->next = a->top->next;
            a->top->next = b;
            b->used = want;
            *out = (char *)b + head;
            return OK;
        }
        b->next = a->top;
        a->top = b;
    }
    *out = (char *)a->top + a->top->used;
    a->top->used += bytes;
    return OK;
}

void jinja_arena_free(jinja_arena *a)
{
    while (a->top) {
        jinja_block *next = a->top->next;
        mem_free(a->top);
        a->top = next;
    }
    a->bytes = 0;
}

/* ---- making ---- */

err_code jv_new(jinja_arena *a, jinja_value **out, jv_type type, err *e)
{
    TRY(jinja_get(a, (void **)out, sizeof **out, e));
    (*out)->type = (uint8_t)type;
    return OK;
}

err_code jv_int(jrun *r, jinja_value **out, int64_t i)
{
    TRY(jv_new(&r->mem, out, JV_INT, r->e));
    (*out)->i = i;
    return OK;
}

err_code jv_float(jrun *r, jinja_value **out, double d)
{
    TRY(jv_new(&r->mem, out, JV_FLOAT, r->e));
    (*out)->d = d;
    return OK;
}

err_code jv_str(jrun *r, jinja_value **out, jstr s)
{
    TRY(jv_new(&r->mem, out, JV_STR, r->e));
    (*out)->s = s;
    return OK;
}

err_code jv_undef(jrun *r, jinja_value **out, const char *name)
{
    TRY(jv_new(&r->mem, out, JV_UNDEF, r->e));
    (*out)->s = (jstr){name, NULL, strlen(name)};
    return OK;
}

err_code jv_list(jrun *r, jinja_value **out, int kind)
{
    TRY(jv_new(&r->mem, out, JV_LIST, r->e));
    (*out)->kind = (uint8_t)kind;
    return OK;
}

err_code jv_list_add(jinja_arena *a, jinja_value *list, jinja_value *v, err *e)
{
    jlist *l = &list->l;
    if (l->n == l->cap) {
        void *more;
        const int64_t cap = l->cap ? 2 * l->cap : 8;
        TRY(jinja_get(a, &more, (size_t)cap * sizeof *l->v, e));
        if (l->n) memcpy(more, l->v, (size_t)l->n * sizeof *l->v);
        l->v = more;
        l->cap = cap;
    }
    l->v[l->n++] = v;
    return OK;
}

/* ---- maps ---- */

enum { FEW = 8 };

static uint32_t hash_of(const jinja_value *k)
{
    uint64_t h = 0;
    if (k->type == JV_STR) {
        h = 0xcbf29ce484222325u;
        for (size_t i = 0; i < k->s.n; i++) h = (h ^ (uint8_t)k->s.p[i]) * 0x100000001b3u;
    } else if (k->type == JV_INT) {
        h = (uint64_t)k->i * 0x9e3779b97f4a7c15u;
    }
    return (uint32_t)(h ^ h >> 32);
}

static int32_t find(const jmap *m, const jinja_value *key)
{
    if (!m->slot) {
        for (int32_t i = 0; i < m->n; i++)
            if (jv_equal(m->key[i], key, 0)) return i;
        return -1;
    }
    for (uint32_t at = hash_of(key);; at++) {
        const int32_t i = m->slot[at & (uint32_t)(m->n_slots - 1)];
        if (!i) return -1;
        if (jv_equal(m->key[i - 1], key, 0)) return i - 1;
    }
}

static void put_slot(jmap *m, int32_t i)
{
    uint32_t at = hash_of(m->key[i]);
    while (m->slot[at & (uint32_t)(m->n_slots - 1)]) at++;
    m->slot[at & (uint32_t)(m->n_slots - 1)] = i + 1;
}

static err_code grow(jinja_arena *a, jmap *m, err *e)
{
    void *key, *val;
    const int32_t cap = m->cap ? 2 * m->cap : 4;
    TRY(jinja_get(a, &key, (size_t)cap * sizeof *m->key, e));
    TRY(jinja_get(a, &val, (size_t)cap * sizeof *m->val, e));
    if (m->n) {
        memcpy(key, m->key, (size_t)m->n * sizeof *m->key);
        memcpy(val, m->val, (size_t)m->n * sizeof *m->val);
    }
    m->key = key;
    m->val = val;
    m->cap = cap;
    if (cap <= FEW) return OK;
    TRY(jinja_get(a, (void **)&m->slot, (size_t)cap * 2 * sizeof *m->slot, e));
    m->n_slots = 2 * cap;
    for (int32_t i = 0; i < m->n; i++) put_slot(m, i);
    return OK;
}

err_code jmap_set(jinja_arena *a, jmap *m, jinja_value *key, jinja_value *v, err *e)
{
    const int32_t i = find(m, key);
    if (i >= 0) {
        m->val[i] = v;
        return OK;
    }
    if (m->n == m->cap) TRY(grow(a, m, e));
    m->key[m->n] = key;
    m->val[m->n++] = v;
    if (m->slot) put_slot(m, m->n - 1);
    return OK;
}

jinja_value *jmap_get(const jmap *m, const jinja_value *key)
{
    const int32_t i = find(m, key);
    return i < 0 ? NULL : m->val[i];
}

jinja_value *jmap_name(const jmap *m, const char *name)
{
    const jinja_value key = {.type = JV_STR, .s = {name, NULL, strlen(name)}};
    return jmap_get(m, &key);
}

/* ---- truth, equality, order ---- */

bool jv_truth(const jinja_value *v)
{
    switch (v->type) {
    case JV_UNDEF:
    case JV_NONE: return false;
    case JV_BOOL: return v->b;
    case JV_INT: return v->i != 0;
    case JV_FLOAT: return v->d != 0;
    case JV_STR: return v->s.n != 0;
    case JV_LIST: return v->kind == JL_ITER || v->l.n != 0;
    case JV_MAP: return v->m.n != 0;
    default: return true;
    }
}

static bool is_number(const jinja_value *v)
{
    return v->type == JV_BOOL || v->type == JV_INT || v->type == JV_FLOAT;
}

static double number(const jinja_value *v)
{
    return v->type == JV_FLOAT ? v->d : v->type == JV_BOOL ? v->b : (double)v->i;
}

static int64_t whole(const jinja_value *v) { return v->type == JV_BOOL ? v->b : v->i; }

static bool maps_equal(const jmap *a, const jmap *b, int depth)
{
    if (a->n != b->n) return false;
    for (int32_t i = 0; i < a->n; i++) {
        const jinja_value *other = jmap_get(b, a->key[i]);
        if (!other || !jv_equal(a->val[i], other, depth + 1)) return false;
    }
    return true;
}

bool jv_equal(const jinja_value *a, const jinja_value *b, int depth)
{
    if (a == b) return true;
    if (depth > JINJA_MAX_DEPTH) return false;
    if (is_number(a) && is_number(b))
        return a->type == JV_FLOAT || b->type == JV_FLOAT ? number(a) == number(b)
                                                          : whole(a) == whole(b);
    if (a->type != b->type) return false;
    switch (a->type) {
    case JV_UNDEF:
    case JV_NONE: return true;
    case JV_STR: return a->s.n == b->s.n && (!a->s.n || !memcmp(a->s.p, b->s.p, a->s.n));
    case JV_LIST:
        if (a->kind != b->kind || a->l.n != b->l.n || a->kind == JL_ITER) return false;
        for (int64_t i = 0; i < a->l.n; i++)
            if (!jv_equal(a->l.v[i], b->l.v[i], depth + 1)) return false;
        return true;
    case JV_MAP: return maps_equal(&a->m, &b->m, depth);
    default: return false;
    }
}

const char *jv_type_name(const jinja_value *v)
{
    static const char *const names[] = {"Undefined", "NoneType", "bool",       "int",       "float",
                                        "str",       "list",     "dict",       "Namespace", "Macro",
                                        "function",  "method",   "LoopContext"};
    if (v->type == JV_LIST && v->kind) return v->kind == JL_TUPLE ? "tuple" : "generator";
    return names[v->type];
}

err_code jv_less(jrun *r, const jinja_value *a, const jinja_value *b, bool *out)
{
    if (is_number(a) && is_number(b)) {
        *out = a->type == JV_FLOAT || b->type == JV_FLOAT ? number(a) < number(b)
                                                          : whole(a) < whole(b);
        return OK;
    }
    if (a->type == JV_STR && b->type == JV_STR) { /* UTF-8 sorts as its code points */
        const size_t n = a->s.n < b->s.n ? a->s.n : b->s.n;
        const int c = n ? memcmp(a->s.p, b->s.p, n) : 0;
        *out = c ? c < 0 : a->s.n < b->s.n;
        return OK;
    }
    if (a->type == JV_LIST && b->type == JV_LIST && a->kind == b->kind && a->kind != JL_ITER) {
        for (int64_t i = 0; i < a->l.n && i < b->l.n; i++) {
            TRY(jinja_step(r, 1));
            if (jv_equal(a->l.v[i], b->l.v[i], 0)) continue;
            if (++r->depth > JINJA_MAX_LEVELS) return jinja_error(r, "lists nested too deep");
            const err_code rc = jv_less(r, a->l.v[i], b->l.v[i], out);
            r->depth--;
            return rc;
        }
        *out = a->l.n < b->l.n;
        return OK;
    }
    return jinja_error(r, "'<' not supported between '%s' and '%s'", jv_type_name(a),
                       jv_type_name(b));
}

err_code jv_in(jrun *r, const jinja_value *needle, jinja_value *hay, bool *out)
{
    *out = false;
    if (hay->type == JV_STR) {
        if (needle->type != JV_STR)
            return jinja_error(r, "'in <string>' requires string as left operand, not %s",
                               jv_type_name(needle));
        *out = jstr_find(hay->s, needle->s, 0) >= 0;
        return jinja_step(r, (int64_t)(hay->s.n / 16));
    }
    if (hay->type == JV_MAP) {
        *out = jmap_get(&hay->m, needle) != NULL;
        return OK;
    }
    jlist l;
    TRY(jv_items(r, hay, &l));
    for (int64_t i = 0; i < l.n && !*out; i++) *out = jv_equal(l.v[i], needle, 0);
    return jinja_step(r, l.n);
}

/* ---- items ---- */

static err_code characters(jrun *r, jstr s, jlist *out)
{
    jinja_value *list, *c;
    TRY(jv_list(r, &list, JL_LIST));
    for (size_t i = 0, len; i < s.n; i += len) {
        (void)jstr_code(s, i, &len);
        TRY(jinja_step(r, 1));
        TRY(jv_str(r, &c, jstr_part(s, i, i + len)));
        TRY(jv_list_add(&r->mem, list, c, r->e));
    }
    *out = list->l;
    return OK;
}

err_code jv_items(jrun *r, jinja_value *v, jlist *out)
{
    *out = (jlist){0};
    switch (v->type) {
    case JV_UNDEF: return OK;
    case JV_LIST:
        *out = v->l;
        if (v->kind == JL_ITER) v->l.n = 0;
        return OK;
    case JV_MAP: *out = (jlist){v->m.key, v->m.n, v->m.n}; return OK;
    case JV_STR: return characters(r, v->s, out);
    default: return jinja_error(r, "'%s' object is not iterable", jv_type_name(v));
    }
}

err_code jv_length(jrun *r, const jinja_value *v, int64_t *out)
{
    switch (v->type) {
    case JV_UNDEF: *out = 0; return OK;
    case JV_STR: *out = jstr_length(v->s); return jinja_step(r, *out / 16);
    case JV_MAP: *out = v->m.n; return OK;
    case JV_LOOP: *out = v->loop->n; return OK;
    case JV_LIST:
        *out = v->l.n;
        if (v->kind != JL_ITER) return OK;
        /* fall through */
    default: return jinja_error(r, "object of type '%s' has no len()", jv_type_name(v));
    }
}

/* ---- attributes and items ---- */

static err_code refuse_undefined(jrun *r, const jinja_value *of, const char *name)
{
    if (of->s.n) return jinja_error(r, "'%.100s' is undefined (asked for '%.100s')", of->s.p, name);
    return jinja_error(r, "an undefined value has no '%.100s'", name);
}

/* What Python's getattr finds; NULL none. */
static err_code own_attr(jrun *r, jinja_value *of, const char *name, jinja_value **out)
{
    *out = NULL;
    if (of->type == JV_SPACE) {
        *out = jmap_name(&of->m, name);
        return OK;
    }
    if (of->type == JV_LOOP) return jinja_loop_attr(r, of->loop, name, out);
    if (of->type == JV_MACRO && !strcmp(name, "name"))
        return jv_str(r, out, (jstr){of->macro->node->str, NULL, of->macro->node->len});
    const int which = jinja_method_find(of, name);
    if (which < 0) return OK;
    TRY(jv_new(&r->mem, out, JV_METHOD, r->e));
    (*out)->method.which = which;
    (*out)->method.of = of;
    return OK;
}

err_code jv_attr(jrun *r, jinja_value *of, const char *name, jinja_value **out)
{
    if (of->type == JV_UNDEF) return refuse_undefined(r, of, name);
    TRY(own_attr(r, of, name, out));
    if (!*out && of->type == JV_MAP) *out = jmap_name(&of->m, name);
    return *out ? OK : jv_undef(r, out, name);
}

static err_code at_index(jrun *r, jinja_value *of, int64_t i, jinja_value **out)
{
    int64_t n;
    if (of->type == JV_LIST) {
        n = of->kind == JL_ITER ? 0 : of->l.n;
        if (i < 0) i += n;
        if (i < 0 || i >= n) return jv_undef(r, out, "list element");
        *out = of->l.v[i];
        return OK;
    }
    TRY(jv_length(r, of, &n));
    if (i < 0) i += n;
    if (i < 0 || i >= n) return jv_undef(r, out, "string element");
    const size_t at = jstr_offset(of->s, i);
    size_t len;
    (void)jstr_code(of->s, at, &len);
    return jv_str(r, out, jstr_part(of->s, at, at + len));
}

err_code jv_item(jrun *r, jinja_value *of, const jinja_value *key, jinja_value **out)
{
    *out = NULL;
    if (of->type == JV_UNDEF) return refuse_undefined(r, of, "an element");
    if ((of->type == JV_LIST || of->type == JV_STR) &&
        (key->type == JV_INT || key->type == JV_BOOL))
        return at_index(r, of, whole(key), out);
    if (of->type == JV_MAP) *out = jmap_get(&of->m, key);
    if (*out) return OK;
    if (key->type != JV_STR) return jv_undef(r, out, "element");
    char name[128];
    if (key->s.n >= sizeof name) return jv_undef(r, out, "element");
    memcpy(name, key->s.p, key->s.n);
    name[key->s.n] = '\0';
    TRY(own_attr(r, of, name, out));
    if (*out) return OK;
    char *copy; /* the message names it */
    TRY(jinja_get(&r->mem, (void **)&copy, key->s.n + 1, r->e));
    memcpy(copy, name, key->s.n);
    return jv_undef(r, out, copy);
}

/* "a.b.0": as filters take attributes; an integer is an index. */
err_code jv_path(jrun *r, jinja_value *of, const jinja_value *path, jinja_value **out)
{
    char part[128];
    *out = of;
    if (path->type == JV_INT) return jv_item(r, of, path, out);
    if (path->type != JV_STR) return jinja_error(r, "an attribute must be a string or a number");
    for (size_t i = 0; i <= path->s.n;) {
        size_t n = 0;
        bool digits = true;
        for (; i < path->s.n && path->s.p[i] != '.'; i++) {
            if (n + 1 >= sizeof part) return jinja_error(r, "the name of an attribute is too long");
            part[n++] = path->s.p[i];
            digits &= path->s.p[i] >= '0' && path->s.p[i] <= '9';
        }
        i++;
        part[n] = '\0';
        jinja_value key = {.type = JV_STR, .s = {part, NULL, n}};
        if (digits && n && n < 10) {
            key = (jinja_value){.type = JV_INT};
            for (size_t k = 0; k < n; k++) key.i = key.i * 10 + (part[k] - '0');
        }
        TRY(jv_item(r, *out, &key, out));
    }
    return OK;
}

static err_code slice_bound(jrun *r, const jinja_value *v, int64_t def, int64_t *out)
{
    *out = def;
    if (!v || v->type == JV_NONE) return OK;
    if (v->type != JV_INT && v->type != JV_BOOL)
        return jinja_error(r, "slice indices must be integers or None");
    *out = whole(v);
    return OK;
}

/* Python's rules for where a slice begins and ends. */
static int64_t slice_clamp(int64_t i, int64_t n, int64_t step)
{
    if (i < 0) i += n;
    if (i < 0) return step < 0 ? -1 : 0;
    if (i >= n) return step < 0 ? n - 1 : n;
    return i;
}

err_code jv_slice(jrun *r, jinja_value *of, const jinja_value *k[3], jinja_value **out)
{
    int64_t from, to, step;
    jlist l;
    jinja_value *list;
    if (of->type != JV_LIST && of->type != JV_STR && of->type != JV_UNDEF)
        return jinja_error(r, "'%s' object cannot be sliced", jv_type_name(of));
    if (of->type == JV_UNDEF) return refuse_undefined(r, of, "a slice");
    TRY(slice_bound(r, k[2], 1, &step));
    if (step == 0 || step == INT64_MIN) return jinja_error(r, "slice step cannot be zero");
    TRY(jv_items(r, of, &l));
    TRY(slice_bound(r, k[0], step < 0 ? INT64_MAX : 0, &from));
    TRY(slice_bound(r, k[1], step < 0 ? INT64_MIN : INT64_MAX, &to));
    from = slice_clamp(from, l.n, step);
    to = to == INT64_MIN ? -1 : slice_clamp(to, l.n, step);
    TRY(jv_list(r, &list, of->type == JV_LIST ? of->kind : JL_LIST));
    for (int64_t i = from; step > 0 ? i < to : i > to; i += step) {
        TRY(jinja_step(r, 1));
        TRY(jv_list_add(&r->mem, list, l.v[i], r->e));
        if (step > 0 ? i > l.n - step : i < -step - 1) break; /* no overflow with huge steps */
    }
    *out = list;
    if (of->type == JV_LIST) return OK;
    jout o = {0};
    for (int64_t i = 0; i < list->l.n; i++) TRY(jout_add(r, &o, list->l.v[i]->s));
    return jv_str(r, out, jout_str(&o));
}
