/* What the grammar files share; not for callers. A grammar is a net: rules whose states are joined
 * by edges that take a byte, a token, nothing, or a whole rule (a call). grammar_build.c makes it,
 * grammar_run.c walks it by sets of (state, stack) that are numbered as they come up. */
#ifndef TMF_RUNTIME_SERVE_GRAMMAR_INTERNAL_H
#define TMF_RUNTIME_SERVE_GRAMMAR_INTERNAL_H

#include <pthread.h>
#include <stdatomic.h>

#include "runtime/serve/grammar.h"

/* ---- vocabulary (grammar_vocab.c) ---- */

#define GRAMMAR_LONGEST 255 /* bytes of a token; longer ones never come in a constrained answer */
typedef struct {
    uint32_t end;  /* the first node behind this one's subtree */
    int32_t token; /* the first id that ends here; -1 none */
    uint8_t byte, depth;
} grammar_node;
/* Every piece of the vocabulary in one trie, in preorder. Reference counted, read only. */
typedef struct {
    const tokenizer *t;
    int32_t n_tokens;
    grammar_node *node; /* [n_nodes] */
    uint32_t n_nodes;
    int32_t *same;  /* [n_tokens] the next id of the same bytes; -1 none */
    bool byte[256]; /* some token is this byte alone */
    atomic_int refs;
} grammar_vocab;
err_code grammar_vocab_open(grammar_vocab **out, const tokenizer *t, err *e);
void grammar_vocab_drop(grammar_vocab *v); /* one reference; NULL accepted */

/* ---- nets (grammar_build.c) ---- */

enum { GRAMMAR_MAX_STATES = 1 << 17, GRAMMAR_MAX_EDGES = 1 << 19, GRAMMAR_MAX_DEPTH = 64 };
enum { EDGE_BYTES, EDGE_EPS, EDGE_CALL, EDGE_TOKEN };
typedef struct {
    int32_t from, to;
    int32_t a; /* lowest byte; the rule; the token */
    uint8_t kind, hi;
} grammar_edge;
typedef struct {
    int32_t start, end;
} grammar_rule;

/* Building keeps the first failure in rc, and later calls do nothing: check rc at the end. */
typedef struct {
    grammar_edge *edge;
    int32_t n_edges, cap_edges, n_states;
    grammar_rule *rule;
    int32_t n_rules, cap_rules;
    const tokenizer *t; /* for special tokens in literals; NULL: there are none */
    err_code rc;
    err *e;
} grammar_build;
void grammar_build_free(grammar_build *b);
int32_t grammar_state(grammar_build *b);
int32_t grammar_rule_new(grammar_build *b); /* with its two states */
void grammar_bytes(grammar_build *b, int32_t from, int lo, int hi, int32_t to);
void grammar_eps(grammar_build *b, int32_t from, int32_t to);
void grammar_call(grammar_build *b, int32_t from, int32_t rule, int32_t to);
int32_t grammar_call_to(grammar_build *b, int32_t from, int32_t rule); /* to a new state */
int32_t grammar_byte_to(grammar_build *b, int32_t from, int byte);
/* Bytes of a text one after another; returns the state behind them. */
int32_t grammar_text(grammar_build *b, int32_t from, const char *s, size_t n);
/* The same, but strings of special tokens are taken as tokens. */
int32_t grammar_literal(grammar_build *b, int32_t from, const char *s);
/* Code points lo to hi as UTF-8 (surrogates left out). */
void grammar_codes(grammar_build *b, int32_t from, uint32_t lo, uint32_t hi, int32_t to);

typedef struct {
    int32_t *first; /* [n_states + 1] into edge */
    grammar_edge *edge;
    int32_t *need; /* [n_states] calls that must fit on the stack to get to the rule's end */
    bool *end;     /* [n_states] ends its rule */
    grammar_rule *rule;
    int32_t n_states, n_rules;
    uint8_t class_of[256], byte_of[256]; /* bytes that no edge tells apart; one of each class */
    int32_t n_classes;
} grammar_net;
#define GRAMMAR_NEVER (1 << 20) /* need of a state from which the end cannot be reached */
/* Rule 0 is the whole answer. Bytes that no token is alone cannot be walked byte by byte: edges
 * lose them. E_INPUT when nothing can match. */
err_code grammar_net_make(grammar_net *out, grammar_build *b, const grammar_vocab *v, err *e);
void grammar_net_free(grammar_net *n);

/* ---- parts of JSON (grammar_json.c) ---- */

typedef struct {
    uint32_t lo, hi;
} code_range;
enum {
    JSON_RULE_WS,
    JSON_RULE_STRING,
    JSON_RULE_CHAR,
    JSON_RULE_NUMBER,
    JSON_RULE_INTEGER,
    JSON_RULE_ANY,
    JSON_RULE_OBJECT,
    JSON_RULES
};
typedef struct {
    grammar_build *b;
    int32_t rule[JSON_RULES]; /* made when first asked for; -1 */
    bool compact;             /* white space is at most one space */
} grammar_json;
void grammar_json_init(grammar_json *j, grammar_build *b);
int32_t grammar_json_rule(grammar_json *j, int which);
/* A string's content of which each code point is in r[n] (sorted, disjoint): one of them. */
void grammar_json_codes(grammar_build *b, int32_t from, const code_range *r, int n, int32_t to);
/* A whole string or value as compact JSON, spelled in one way. */
int32_t grammar_json_value(grammar_build *b, int32_t from, const cJSON *v);
/* An integer within [lo, hi] (NULL: no bound). */
void grammar_json_integer(grammar_build *b, int32_t from, const int64_t *lo, const int64_t *hi,
                          int32_t to);
/* A number within bounds that are whole; open: the bound itself is not allowed. */
typedef struct {
    bool has_lo, has_hi, open_lo, open_hi;
    int64_t lo, hi;
} number_bounds;
void grammar_json_number(grammar_build *b, int32_t from, const number_bounds *r, int32_t to);

/* ---- regular expressions (grammar_regex.c) ---- */

typedef enum {
    REGEX_BYTES, /* the answer itself, from end to end */
    REGEX_JSON   /* the content of a JSON string, found anywhere in it as JSON schema says */
} regex_use;
/* E_INPUT names the place; an edge path from `from` to `to`. */
err_code grammar_regex_add(grammar_build *b, int32_t from, const char *pattern, regex_use use,
                           int32_t to, err *e);

/* ---- JSON schema (grammar_schema.c, grammar_merge.c) ---- */

/* Values that validate against root's schema `s`, from one state to another. */
err_code grammar_schema_add(grammar_json *j, int32_t from, const cJSON *s, const cJSON *root,
                            int32_t to, err *e);
/* a and b at once, as one new schema (free with cJSON_Delete); E_UNSUPPORTED when that is not
 * simple. */
err_code grammar_merge(cJSON **out, const cJSON *a, const cJSON *b, err *e);
/* Whether no value validates against both, as far as types and constants tell. */
bool grammar_disjoint(const cJSON *a, const cJSON *b);
bool grammar_annotation(const char *key); /* says nothing about what validates */

/* ---- the grammar (grammar.c, grammar_run.c) ---- */

typedef struct grammar_run grammar_run;
struct grammar {
    grammar_net net;
    grammar_vocab *v;
    pthread_mutex_t lock; /* around run and its users */
    grammar_run *run;
    atomic_int refs;
};
err_code grammar_make(grammar **out, grammar_build *b, grammar_vocab *v, err *e);
err_code grammar_run_open(grammar_run **out, const grammar *g, err *e);
void grammar_run_close(grammar_run **r);
/* Compiling onto a vocabulary that is there. */
typedef enum { GRAMMAR_REGEX, GRAMMAR_SCHEMA, GRAMMAR_OBJECT, GRAMMAR_TOOLS } grammar_kind;
typedef struct {
    grammar_kind kind;
    const char *text;
    size_t n;
    chat_tools format;
    const char *only;
    bool parallel;
} grammar_source;
err_code grammar_compile(grammar **out, grammar_vocab *v, const grammar_source *s, err *e);
err_code grammar_tools_add(grammar_json *j, const grammar_source *s, err *e); /* grammar_tools.c */

#endif
