/* What the jinja files share; not for callers. jinja_lex.c makes tokens, jinja_parse.c and
 * jinja_expr.c a tree, jinja_run.c and jinja_eval.c walk it; values are in jinja_value.c and
 * jinja_text.c, what can be done with them in jinja_filter.c, jinja_test.c and jinja_method.c. */
#ifndef TMF_FORMATS_JINJA_INTERNAL_H
#define TMF_FORMATS_JINJA_INTERNAL_H

#include "formats/jinja.h"

/* ---- memory: freed all at once ---- */

typedef struct jinja_block jinja_block;
typedef struct {
    jinja_block *top;
    size_t bytes, limit;
} jinja_arena;
err_code jinja_get(jinja_arena *a, void **out, size_t bytes, err *e); /* zeroed; E_LIMIT */
void jinja_arena_free(jinja_arena *a);

/* ---- values ---- */

typedef enum {
    JV_UNDEF, /* s: the name, for messages */
    JV_NONE,
    JV_BOOL,
    JV_INT,
    JV_FLOAT,
    JV_STR,
    JV_LIST,
    JV_MAP,
    JV_SPACE, /* namespace: a map that can be set */
    JV_MACRO,
    JV_FUNC,   /* of the environment; i: which */
    JV_METHOD, /* of a value: i which, of */
    JV_LOOP    /* the variable of a loop */
} jv_type;
enum { JL_LIST, JL_TUPLE, JL_ITER }; /* kinds of lists: iterators are always true, have no length */

typedef struct {
    const char *p;
    const uint8_t *mark; /* [n] who wrote each byte; NULL: all by the template */
    size_t n;
} jstr;
typedef struct {
    jinja_value **v;
    int64_t n, cap;
} jlist;
typedef struct {
    jinja_value **key, **val;
    int32_t *slot; /* hash table of indexes + 1, once there are more than a few; [n_slots] */
    int32_t n, cap, n_slots;
} jmap;
typedef struct jmacro jmacro;
typedef struct jloop jloop;
struct jinja_value {
    uint8_t type, kind; /* kind of a list; of a string 1: marked as safe HTML */
    union {
        bool b;
        int64_t i;
        double d;
        jstr s;
        jlist l;
        jmap m;
        jmacro *macro;
        jloop *loop;
        struct {
            int which;
            jinja_value *of;
        } method;
    };
};

/* ---- the tree ---- */

typedef enum {
    /* expressions */
    JN_CONST,
    JN_NAME,
    JN_LIST,
    JN_TUPLE,
    JN_DICT,  /* items: key, value, key, ... */
    JN_ATTR,  /* kid[0].str */
    JN_ITEM,  /* kid[0][kid[1]] */
    JN_SLICE, /* kid[0][kid[1]:kid[2]:kid[3]], NULL where left out */
    JN_CALL,  /* kid[0](items) */
    JN_FILTER,
    JN_TEST, /* kid[0] (NULL: the block's text) with str and items */
    JN_NOT,
    JN_NEG,
    JN_POS,
    JN_AND,
    JN_OR,
    JN_COND,    /* kid[0] if kid[1] else kid[2] */
    JN_BINARY,  /* kid[0] op kid[1] */
    JN_COMPARE, /* kid[0], then items with ops in their op */
    JN_KWARG,
    JN_STAR,
    JN_STAR2, /* within items of a call: str = kid[0] */
    /* statements */
    JN_TEXT,        /* str */
    JN_OUTPUT,      /* kid[0] */
    JN_BODY,        /* items */
    JN_IF,          /* kid[0]: then kid[1], else kid[2] */
    JN_FOR,         /* kid[0] in kid[1] if kid[2]: kid[3]; other: else; flag: recursive */
    JN_SET,         /* kid[0] = kid[1] */
    JN_SETBLOCK,    /* kid[0] = text of kid[1] through the filters kid[2] */
    JN_MACRO,       /* str, items (names, with kid[0] the default), kid[3] the body */
    JN_CALLBLOCK,   /* kid[0] the call, items, kid[3] */
    JN_FILTERBLOCK, /* kid[0] the filters, kid[1] the body */
    JN_WITH,        /* items: JN_SET; kid[0] the body */
    JN_DO,          /* kid[0], nothing is written */
    JN_BREAK,
    JN_CONTINUE
} jn_kind;
typedef enum {
    OP_ADD,
    OP_SUB,
    OP_MUL,
    OP_DIV,
    OP_FLOORDIV,
    OP_MOD,
    OP_POW,
    OP_CONCAT,
    OP_EQ,
    OP_NE,
    OP_LT,
    OP_LE,
    OP_GT,
    OP_GE,
    OP_IN,
    OP_NOTIN
} jn_op;
typedef struct jnode jnode;
struct jnode {
    uint8_t kind, op;
    bool flag;
    int32_t line;
    int32_t n, cap;
    jnode *kid[4], *other;
    jnode **items; /* [n] */
    const char *str;
    size_t len;
    jinja_value *value;
};

struct jinja {
    jinja_arena mem;
    jnode *root;
};

/* ---- tokens ---- */

typedef enum {
    JT_END,
    JT_DATA,
    JT_VAR_BEGIN,
    JT_VAR_END,
    JT_BLOCK_BEGIN,
    JT_BLOCK_END,
    JT_NAME,
    JT_STRING,
    JT_INT,
    JT_FLOAT,
    JT_OP /* str: the operator */
} jt_kind;
typedef struct {
    jt_kind kind;
    int32_t line;
    const char *str; /* NUL-terminated */
    size_t len;
    int64_t i;
    double d;
} jtoken;
/* Into an array in `a`, JT_END last. */
err_code jinja_lex(jinja_arena *a, const char *text, size_t n, jtoken **out, int32_t *n_out,
                   err *e);

/* ---- the parser ---- */

typedef struct {
    jinja_arena *a;
    const jtoken *t;
    int nodes, depth, loops;
    err *e;
} jparse;
err_code jinja_fail(const jparse *p, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
err_code jinja_node(jparse *p, jnode **out, jn_kind kind);
err_code jinja_node_add(jparse *p, jnode *list, jnode *item);
bool jinja_is_op(const jparse *p, const char *op);
bool jinja_is_name(const jparse *p, const char *name);
bool jinja_skip_op(jparse *p, const char *op);
err_code jinja_need_op(jparse *p, const char *op);
err_code jinja_parse_expr(jparse *p, jnode **out, bool with_cond);
/* An expression or, with commas, a tuple; with_cond as above. */
err_code jinja_parse_tuple(jparse *p, jnode **out, bool with_cond);
err_code jinja_parse_target(jparse *p, jnode **out, bool space); /* names to assign to */
err_code jinja_parse_filters(jparse *p, jnode **io);             /* "| f | g" behind *io */
err_code jinja_parse_args(jparse *p, jnode *call);               /* from "(" to ")" */
err_code jinja_parse_unary(jparse *p, jnode **out, bool filters);
err_code jinja_parse_postfix(jparse *p, jnode **io);
err_code jinja_parse(jparse *p, jnode **out);

/* ---- running ---- */

typedef struct jframe jframe;
struct jframe {
    jframe *up;
    jmap vars;
};
struct jinja_scope {
    jinja_arena mem;
    jmap vars;
    bool has_now;
    int64_t now;
};
struct jmacro {
    const jnode *node;
    jframe *frame;       /* where it was made */
    jinja_value *caller; /* of a call block's macro: none */
};
struct jloop {
    jinja_value **v;
    int64_t n, at;
    int depth;
    const jnode *node; /* of a recursive one */
    jframe *frame;
};
typedef struct {
    char *p;
    uint8_t *mark;
    size_t n, cap;
} jout;
typedef struct {
    jinja_arena mem;
    jinja_scope *scope;
    jframe *frame;
    jout *out;
    int64_t steps;
    int depth, loop_depth, line, flow; /* flow: 1 break, 2 continue */
    err *e;
} jrun;

#define JINJA_MAX_LEVELS 400 /* of evaluation: C's stack */

typedef struct {
    jinja_value **pos; /* [n] */
    int n, n_kw;
    const char **name; /* [n_kw] */
    jinja_value **kw;
    bool used;
} jargs;

err_code jinja_error(jrun *r, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
err_code jinja_step(jrun *r, int64_t n); /* E_LIMIT when there were too many */
err_code jinja_eval(jrun *r, const jnode *n, jinja_value **out);
err_code jinja_exec(jrun *r, const jnode *n);
err_code jinja_exec_body(jrun *r, const jnode *n); /* in the frame that is there */
err_code jinja_frame(jrun *r, jframe **out, jframe *up);
err_code jinja_assign(jrun *r, const jnode *target, jinja_value *v);
err_code jinja_capture(jrun *r, const jnode *body, jinja_value **out); /* its text */
err_code jinja_call(jrun *r, jinja_value *f, jargs *a, jinja_value **out);
err_code jinja_call_macro(jrun *r, const jmacro *m, jargs *a, jinja_value *caller,
                          jinja_value **out);
err_code jinja_loop_again(jrun *r, jloop *l, jinja_value *items, jinja_value **out);
err_code jinja_loop_attr(jrun *r, const jloop *l, const char *name, jinja_value **out);
err_code jinja_args_of(jrun *r, const jnode *call, int from, jargs *a);
err_code jinja_filter(jrun *r, const char *name, jinja_value *v, jargs *a, jinja_value **out);
err_code jinja_test(jrun *r, const char *name, jinja_value *v, jargs *a, bool *out);
int jinja_method_find(const jinja_value *of, const char *name); /* -1 none */
err_code jinja_method(jrun *r, int which, jinja_value *of, jargs *a, jinja_value **out);
int jinja_func_find(const char *name, const jrun *r); /* -1 none */
err_code jinja_func(jrun *r, int which, jargs *a, jinja_value **out);

/* The i-th argument or the one called `name`; NULL when absent. */
jinja_value *jinja_arg(const jargs *a, int i, const char *name);
err_code jinja_arg_int(jrun *r, const jargs *a, int i, const char *name, int64_t def, int64_t *out);
bool jinja_arg_true(const jargs *a, int i, const char *name, bool def);

/* ---- values: making, comparing, showing (jinja_value.c) ---- */

extern jinja_value jinja_true, jinja_false, jinja_null; /* never changed */
err_code jv_new(jinja_arena *a, jinja_value **out, jv_type type, err *e);
err_code jv_int(jrun *r, jinja_value **out, int64_t i);
err_code jv_float(jrun *r, jinja_value **out, double d);
err_code jv_str(jrun *r, jinja_value **out, jstr s); /* s lives long enough */
err_code jv_undef(jrun *r, jinja_value **out, const char *name);
err_code jv_list(jrun *r, jinja_value **out, int kind);
err_code jv_list_add(jinja_arena *a, jinja_value *list, jinja_value *v, err *e);
static inline jinja_value *jv_bool(bool b) { return b ? &jinja_true : &jinja_false; }
err_code jmap_set(jinja_arena *a, jmap *m, jinja_value *key, jinja_value *v, err *e);
jinja_value *jmap_get(const jmap *m, const jinja_value *key);
jinja_value *jmap_name(const jmap *m, const char *name);
bool jv_truth(const jinja_value *v);
bool jv_equal(const jinja_value *a, const jinja_value *b, int depth);
err_code jv_less(jrun *r, const jinja_value *a, const jinja_value *b, bool *out);
err_code jv_in(jrun *r, const jinja_value *needle, jinja_value *hay, bool *out);
const char *jv_type_name(const jinja_value *v);
/* What iterating over v gives, as a list of its own; an iterator is empty afterwards. */
err_code jv_items(jrun *r, jinja_value *v, jlist *out);
err_code jv_length(jrun *r, const jinja_value *v, int64_t *out);
err_code jv_attr(jrun *r, jinja_value *of, const char *name, jinja_value **out);
err_code jv_item(jrun *r, jinja_value *of, const jinja_value *key, jinja_value **out);
err_code jv_slice(jrun *r, jinja_value *of, const jinja_value *k[3], jinja_value **out);
err_code jv_path(jrun *r, jinja_value *of, const jinja_value *path, jinja_value **out); /* a.b.0 */

/* ---- text (jinja_text.c) ---- */

err_code jout_add(jrun *r, jout *o, jstr s);
err_code jout_data(jrun *r, jout *o, const char *s, size_t n); /* marked JINJA_DATA */
err_code jout_own(jrun *r, jout *o, const char *s, size_t n);  /* marked JINJA_OWN */
jstr jout_str(const jout *o);
err_code jv_show(jrun *r, jout *o, const jinja_value *v);                 /* str(v) */
err_code jv_repr(jrun *r, jout *o, const jinja_value *v, int depth);      /* repr(v) */
err_code jv_text(jrun *r, const jinja_value *v, jstr *out);               /* str(v) as a string */
err_code jv_json(jrun *r, jout *o, const jinja_value *v, const jargs *a); /* tojson */
err_code jinja_printf(jrun *r, jstr fmt, jinja_value *args, jinja_value **out); /* fmt % args */
err_code jinja_format(jrun *r, jstr fmt, const jargs *a, jinja_value **out);    /* str.format */
err_code jinja_strftime(jrun *r, jstr fmt, jinja_value **out);
/* Code points: length, the byte of the i-th, one at a place. */
int64_t jstr_length(jstr s);
size_t jstr_offset(jstr s, int64_t i);
uint32_t jstr_code(jstr s, size_t at, size_t *len);
jstr jstr_part(jstr s, size_t from, size_t to);
bool jstr_is_space(uint32_t c);
bool jstr_printable(uint32_t c);
int64_t jstr_find(jstr s, jstr what, size_t from); /* -1 none */

/* ---- filters shared between files ---- */
err_code jf_indent(jrun *r, jstr s, const jargs *a, jinja_value **out);
err_code jf_replace(jrun *r, jstr s, jstr from, jstr to, int64_t count, jinja_value **out);
err_code jf_strip(jrun *r, jstr s, const jinja_value *chars, int ends, jinja_value **out);
/* u l t c s: upper lower title ... */
err_code jf_case(jrun *r, jstr s, char how, jinja_value **out);
err_code jf_sort(jrun *r, jlist *l, jinja_value **keys, bool reverse);
err_code jf_escape(jrun *r, jstr s, jinja_value **out); /* HTML */

#endif
