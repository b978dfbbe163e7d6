/* What the parts of toolcall.c share: the machine, and what each syntax does with it. */
#ifndef TMF_RUNTIME_SERVE_TOOLCALL_INTERNAL_H
#define TMF_RUNTIME_SERVE_TOOLCALL_INTERNAL_H

#include "runtime/serve/toolcall.h"

enum { TOOLCALL_MAX_BYTES = 1 << 20, TOOLCALL_MAX_NAME = 256 };

typedef struct {
    char *p; /* NULL, or ends in 0 */
    size_t n, cap;
} toolcall_buf;

typedef enum {
    AT_CONTENT,
    AT_OPEN,
    AT_NAME,
    AT_OBJECT,
    AT_CLOSE,
    AT_CODE,
    AT_FUNCTION, /* <function=NAME> */
    AT_TAGS      /* within it: <parameter=KEY>VALUE</parameter> ... </function> */
} place;
/* Within a call's object, at its first level. */
typedef enum { OBJ_BEGIN, OBJ_KEY, OBJ_IN_KEY, OBJ_COLON, OBJ_VALUE, OBJ_IN_VALUE } part;
typedef enum {
    KEY_OTHER,
    KEY_NAME,
    KEY_ARGS,
    KEY_BARE /* the object is the arguments */
} key_kind;

struct toolcall {
    chat_tools format;
    place at;
    toolcall_buf in;   /* not looked at yet, or not decided */
    toolcall_buf back; /* what the call's beginning took: content again when it is none */
    toolcall_buf raw;  /* the object so far */
    bool started;      /* something that is no space was seen */
    bool list;         /* within [TOOL_CALLS] [...] */
    int calls;
    /* the object */
    part part;
    key_kind key;
    int depth;
    bool in_string, escaped, begun;
    size_t from, sent; /* of the key or value in raw; what of the arguments is out */
    size_t args_from, args_to;
    char name[TOOLCALL_MAX_NAME + 1];
    const cJSON *tools; /* borrowed; NULL: none */
    bool has_args;      /* within tags: one is out */
    toolcall_fn fn;
    void *ud;
    err *e;
};

static inline bool toolcall_is_space(char c)
{
    return c == ' ' || c == '\n' || c == '\t' || c == '\r';
}

static inline size_t toolcall_spaces(const toolcall_buf *b) /* that it begins with */
{
    size_t n = 0;
    while (n < b->n && toolcall_is_space(b->p[n])) n++;
    return n;
}

/* ---- toolcall.c ---- */
err_code toolcall_buf_add(toolcall_buf *b, const char *s, size_t n, err *e);
void toolcall_buf_drop(toolcall_buf *b, size_t n); /* off its front */
/* b begins with what; *wait: more of it could come. */
bool toolcall_begins(const toolcall_buf *b, const char *what, bool *wait);
err_code toolcall_tell(toolcall *t, toolcall_kind kind, const char *s, size_t n); /* n 0: nothing */
/* Spaces of the frame go where the frame goes. */
err_code toolcall_skip_spaces(toolcall *t);
void toolcall_object_begin(toolcall *t);
err_code toolcall_call_begin(toolcall *t); /* its name is known */
/* It was no call: all of it is content, and is not looked at again. One that began stays cut. */
err_code toolcall_give_back(toolcall *t);

/* ---- a place of a syntax each: takes what is decided off t->in. last: nothing comes behind it.
 * *more: there is more to look at, though the place stays. ---- */
/* toolcall_object.c */
err_code toolcall_run_object(toolcall *t);
/* toolcall_tags.c */
err_code toolcall_run_function(toolcall *t, bool last, bool *more);
err_code toolcall_run_tags(toolcall *t, bool last, bool *more);
/* toolcall_deepseek.c */
err_code toolcall_deepseek_open(toolcall *t, bool last, bool *more);
err_code toolcall_deepseek_name(toolcall *t, bool last, bool *more);
err_code toolcall_deepseek_close(toolcall *t, bool last, bool *more);
/* toolcall_code.c: of all that is in t->in */
err_code toolcall_run_code(toolcall *t);

#endif
