/* Tool calls out of text: a small machine that is fed pieces of any size. What it is not sure of it
 * holds; what turns out not to be a call goes back to content as it came. */
#include "runtime/serve/toolcall.h"

#include <string.h>

#include "base/json.h"
#include "base/mem.h"
#include "runtime/serve/toolcall_xml.h"

enum { MAX_CALL = 1 << 20, MAX_NAME = 256, MAX_LEVELS = 256 };

typedef struct {
    char *p;
    size_t n, cap;
} text_buf;

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
    KEY_BARE
} key_kind; /* BARE: the object is the args */

struct toolcall {
    chat_tools format;
    place at;
    text_buf in;   /* not looked at yet, or not decided */
    text_buf back; /* what the call's beginning took: content again when it is none */
    text_buf raw;  /* the object so far */
    bool started;  /* something that is no space was seen */
    bool list;     /* within [TOOL_CALLS] [...] */
    int calls;
    /* the object */
    part part;
    key_kind key;
    int depth;
    bool in_string, escaped, begun;
    size_t from, sent; /* of the key or value in raw; what of the arguments is out */
    size_t args_from, args_to;
    char name[MAX_NAME + 1];
    const cJSON *tools; /* borrowed; NULL: none */
    bool has_args;      /* within tags: one is out */
    toolcall_fn fn;
    void *ud;
    err *e;
};

/* ---- buffers and events ---- */

static err_code buf_add(text_buf *b, const char *s, size_t n, err *e)
{
    if (b->n + n + 1 > b->cap) {
        char *more;
        const size_t cap = 2 * (b->n + n) + 64;
        TRY(mem_alloc((void **)&more, cap, 1, "tool call", e));
        if (b->n) memcpy(more, b->p, b->n);
        mem_free(b->p);
        b->p = more;
        b->cap = cap;
    }
    if (n) memcpy(b->p + b->n, s, n);
    b->n += n;
    b->p[b->n] = '\0';
    return OK;
}

static void buf_drop(text_buf *b, size_t n)
{
    if (!n) return;
    memmove(b->p, b->p + n, b->n - n + 1);
    b->n -= n;
}

static err_code tell(toolcall *t, toolcall_kind kind, const char *s, size_t n)
{
    if (!n) return OK;
    const toolcall_event ev = {kind, kind == TOOLCALL_CONTENT ? -1 : t->calls - 1, s, n};
    return t->fn(t->ud, &ev, t->e);
}

static bool is_space(char c) { return c == ' ' || c == '\n' || c == '\t' || c == '\r'; }

static size_t spaces(const text_buf *b)
{
    size_t n = 0;
    while (n < b->n && is_space(b->p[n])) n++;
    return n;
}

/* ---- begin and end of a call ---- */

#define DEEPSEEK_OPEN "<｜tool▁calls▁begin｜>"
static const char deepseek_begin[] = "<｜tool▁call▁begin｜>";
static const char deepseek_mark[] = "<｜tool▁sep｜>";
static const char deepseek_end[] = "<｜tool▁call▁end｜>";
static const char deepseek_last[] = "<｜tool▁calls▁end｜>";

static const char *opener(chat_tools f, int i)
{
    static const char *const all[][3] = {[CHAT_TOOLS_NONE] = {NULL},
                                         [CHAT_TOOLS_HERMES] = {"<tool_call>", NULL},
                                         [CHAT_TOOLS_INTERNLM2] = {"<|action_start|><|plugin|>",
                                                                   "<|action_start|> <|plugin|>",
                                                                   NULL},
                                         [CHAT_TOOLS_LLAMA3] = {"<|python_tag|>", NULL},
                                         [CHAT_TOOLS_MISTRAL] = {"[TOOL_CALLS]", NULL},
                                         [CHAT_TOOLS_DEEPSEEK] = {DEEPSEEK_OPEN, NULL}};
    return all[f][i];
}

static const char *closer(chat_tools f)
{
    if (f == CHAT_TOOLS_HERMES) return "</tool_call>";
    if (f == CHAT_TOOLS_INTERNLM2) return "<|action_end|>";
    return f == CHAT_TOOLS_LLAMA3 ? ";" : ",";
}

static void object_begin(toolcall *t)
{
    t->at = AT_OBJECT;
    t->part = OBJ_BEGIN;
    t->key = KEY_OTHER;
    t->depth = 0;
    t->in_string = t->escaped = t->begun = false;
    t->from = t->sent = t->args_from = t->args_to = 0;
    t->raw.n = 0;
    t->name[0] = '\0';
}

static err_code call_begin(toolcall *t)
{
    t->calls++;
    t->begun = true;
    return tell(t, TOOLCALL_BEGIN, t->name, strlen(t->name));
}

/* It was no call: all of it is content, and is not looked at again. One that began stays cut. */
static err_code give_back(toolcall *t)
{
    const bool begun = t->begun;
    err_code rc = OK;
    t->at = AT_CONTENT;
    t->list = false;
    t->started = true;
    if (!begun) {
        rc = buf_add(&t->back, t->raw.p, t->raw.n, t->e);
        if (rc == OK) rc = tell(t, TOOLCALL_CONTENT, t->back.p, t->back.n);
    }
    t->back.n = t->raw.n = 0;
    t->begun = false;
    return rc;
}

/* ---- the object ---- */

/* A JSON string of raw, decoded, into the name; empty when it does not fit. */
static bool take_name(toolcall *t, size_t from, size_t to)
{
    cJSON *o;
    err ignored;
    t->name[0] = '\0';
    if (json_parse(&o, t->raw.p + from, to - from, "name", &ignored) != OK) return false;
    const bool ok = cJSON_IsString(o) && o->valuestring[0] && strlen(o->valuestring) <= MAX_NAME;
    if (ok) strcpy(t->name, o->valuestring);
    cJSON_Delete(o);
    return ok;
}

static err_code send_args(toolcall *t, size_t to)
{
    if (!t->begun || t->raw.p[t->args_from] == '"') return OK;
    const size_t from = t->sent;
    if (to <= from) return OK;
    t->sent = to;
    return tell(t, TOOLCALL_ARGS, t->raw.p + from, to - from);
}

/* Arguments that are written as a string are what it holds. */
static err_code send_string(toolcall *t)
{
    cJSON *o;
    err ignored;
    if (json_parse(&o, t->raw.p + t->args_from, t->args_to - t->args_from, "arguments", &ignored) !=
        OK)
        return OK;
    const err_code rc = tell(t, TOOLCALL_ARGS, o->valuestring, strlen(o->valuestring));
    cJSON_Delete(o);
    return rc;
}

static err_code value_ends(toolcall *t, size_t to)
{
    t->part = OBJ_KEY;
    if (t->key == KEY_NAME && !t->begun && take_name(t, t->from, to) && t->args_to) {
        TRY(call_begin(t)); /* the arguments came first */
        t->sent = t->args_from;
        return t->raw.p[t->args_from] == '"' ? send_string(t) : send_args(t, t->args_to);
    }
    if (t->key != KEY_ARGS) return OK;
    t->args_to = to;
    if (!t->begun) return OK;
    return t->raw.p[t->args_from] == '"' ? send_string(t) : send_args(t, to);
}

static err_code object_ends(toolcall *t)
{
    if (t->key == KEY_BARE) TRY(send_args(t, t->raw.n));
    /* an answer that is JSON may well have a name: without arguments it is none of a call */
    const bool bare_text = t->format == CHAT_TOOLS_LLAMA3 && !t->args_to;
    if (!t->begun && (!t->name[0] || bare_text)) return give_back(t);
    if (!t->begun) TRY(call_begin(t));
    if (!t->args_to && t->key != KEY_BARE) TRY(tell(t, TOOLCALL_ARGS, "{}", 2));
    t->at = AT_CLOSE;
    t->begun = false;
    t->raw.n = t->back.n = 0;
    return OK;
}

static key_kind kind_of_key(const char *s, size_t n)
{
    if (n == 6 && !memcmp(s, "\"name\"", 6)) return KEY_NAME;
    if (n == 11 && !memcmp(s, "\"arguments\"", 11)) return KEY_ARGS;
    return n == 12 && !memcmp(s, "\"parameters\"", 12) ? KEY_ARGS : KEY_OTHER;
}

static err_code value_begins(toolcall *t)
{
    t->from = t->raw.n - 1;
    t->part = OBJ_IN_VALUE;
    if (t->key != KEY_ARGS || t->args_from) {
        if (t->key == KEY_ARGS) t->key = KEY_OTHER; /* a second one */
        return OK;
    }
    t->args_from = t->sent = t->from;
    return t->name[0] && !t->begun ? call_begin(t) : OK;
}

/* One character outside of strings. */
static err_code structure(toolcall *t, char c, bool *bad)
{
    const bool opens = c == '{' || c == '[', closes = c == '}' || c == ']';
    if (t->depth == 1 && c == ']') { /* it was opened by a brace */
        *bad = true;
        return OK;
    }
    if (t->key == KEY_BARE) { /* whatever is in it is the arguments */
        t->in_string = c == '"';
        t->depth += opens - closes;
        *bad = t->depth > MAX_LEVELS;
        return t->depth == 0 ? object_ends(t) : OK;
    }
    if (t->depth == 1 && t->part == OBJ_IN_VALUE && (c == ',' || c == '}'))
        TRY(value_ends(t, t->raw.n - 1));
    if (t->depth == 1 && t->part == OBJ_VALUE && !is_space(c)) {
        if (c == ',' || closes) *bad = true;
        TRY(value_begins(t));
    }
    if (t->depth == 1 && t->part == OBJ_COLON && !is_space(c)) {
        *bad = c != ':';
        t->part = OBJ_VALUE;
    } else if (t->depth == 1 && t->part == OBJ_KEY && !is_space(c) && c != ',' && c != '"' &&
               c != '}') {
        *bad = true;
    }
    if (c == '"') {
        t->in_string = true;
        if (t->depth == 1 && t->part == OBJ_KEY) {
            t->part = OBJ_IN_KEY;
            t->from = t->raw.n - 1;
        }
    }
    t->depth += opens - closes;
    if (t->depth > MAX_LEVELS) *bad = true;
    if (t->depth == 0) return object_ends(t);
    if (closes && t->depth == 1 && t->part == OBJ_IN_VALUE) return value_ends(t, t->raw.n);
    return OK;
}

static err_code string_char(toolcall *t, char c)
{
    if (t->escaped) {
        t->escaped = false;
        return OK;
    }
    t->escaped = c == '\\';
    if (c != '"') return OK;
    t->in_string = false;
    if (t->depth != 1 || t->key == KEY_BARE) return OK;
    if (t->part == OBJ_IN_KEY) {
        t->key = kind_of_key(t->raw.p + t->from, t->raw.n - t->from);
        t->part = OBJ_COLON;
        return OK;
    }
    return t->part == OBJ_IN_VALUE ? value_ends(t, t->raw.n) : OK;
}

/* Feeds the object until it ends or there is no more. */
static err_code run_object(toolcall *t)
{
    size_t i = 0;
    bool bad = false;
    err_code rc = OK;
    for (; i < t->in.n && t->at == AT_OBJECT && rc == OK && !bad;) {
        const char c = t->in.p[i++];
        if ((rc = buf_add(&t->raw, &c, 1, t->e)) != OK) break;
        if (t->raw.n > MAX_CALL || ((uint8_t)c < 0x20 && t->in_string)) bad = true;
        if (bad) break;
        if (t->part == OBJ_BEGIN) { /* "{" */
            t->depth = 1;
            t->part = t->key == KEY_BARE ? OBJ_IN_VALUE : OBJ_KEY;
        } else if (t->in_string) {
            rc = string_char(t, c);
        } else {
            rc = structure(t, c, &bad);
        }
    }
    buf_drop(&t->in, i);
    if (rc != OK) return rc;
    const bool open = t->at == AT_OBJECT && t->part == OBJ_IN_VALUE;
    if (open && (t->key == KEY_ARGS || t->key == KEY_BARE)) TRY(send_args(t, t->raw.n - bad));
    return bad ? give_back(t) : OK;
}

/* ---- around it ---- */

/* How much of the end of s could be the beginning of `what`. */
static size_t tail_of(const text_buf *s, const char *what)
{
    const size_t n = strlen(what);
    for (size_t k = n - 1 < s->n ? n - 1 : s->n; k > 0; k--)
        if (!memcmp(s->p + s->n - k, what, k)) return k;
    return 0;
}

/* Takes what opens a call off the input; spaces before it go with it. */
static err_code open_call(toolcall *t, size_t at, size_t n)
{
    size_t end = at;
    while (end > 0 && is_space(t->in.p[end - 1])) end--;
    TRY(tell(t, TOOLCALL_CONTENT, t->in.p, end));
    t->back.n = 0;
    TRY(buf_add(&t->back, t->in.p + end, at + n - end, t->e));
    buf_drop(&t->in, at + n);
    t->raw.n = 0;
    t->begun = false;
    t->at = AT_OPEN;
    return OK;
}

static err_code run_content(toolcall *t, bool last, bool *more)
{
    size_t keep = 0, best = t->in.n, len = 0;
    const size_t lead = spaces(&t->in);
    if (t->format == CHAT_TOOLS_LLAMA3 && !t->started && lead < t->in.n && t->in.p[lead] == '{') {
        *more = true;
        return open_call(t, lead, 0);
    }
    for (int i = 0; opener(t->format, i); i++) {
        const char *open = opener(t->format, i);
        const char *p = t->in.n ? memmem(t->in.p, t->in.n, open, strlen(open)) : NULL;
        const size_t k = tail_of(&t->in, opener(t->format, i));
        if (k > keep) keep = k;
        if (!p || (size_t)(p - t->in.p) >= best) continue;
        best = (size_t)(p - t->in.p);
        len = strlen(opener(t->format, i));
    }
    if (len) {
        *more = true;
        return open_call(t, best, len);
    }
    size_t end = last ? t->in.n : t->in.n - keep;
    while (!last && t->format != CHAT_TOOLS_NONE && end > 0 && is_space(t->in.p[end - 1])) end--;
    if (last && t->calls && spaces(&t->in) == t->in.n) {
        buf_drop(&t->in, t->in.n); /* line ends behind calls */
        return OK;
    }
    if (end > lead) t->started = true;
    TRY(tell(t, TOOLCALL_CONTENT, t->in.p, end));
    buf_drop(&t->in, end);
    return OK;
}

/* Spaces of the frame go where the frame goes. */
static err_code skip_spaces(toolcall *t)
{
    const size_t n = spaces(&t->in);
    if (n) TRY(buf_add(&t->back, t->in.p, n, t->e));
    buf_drop(&t->in, n);
    return OK;
}

static err_code run_open(toolcall *t, bool *more)
{
    TRY(skip_spaces(t));
    if (!t->in.n) return OK;
    *more = true;
    const char c = t->in.p[0];
    if (c == '{') {
        object_begin(t);
        return OK;
    }
    if (t->format == CHAT_TOOLS_MISTRAL && c == '[' && !t->list) {
        t->list = true;
        TRY(buf_add(&t->back, t->in.p, 1, t->e));
        buf_drop(&t->in, 1);
        return OK;
    }
    if (t->format == CHAT_TOOLS_MISTRAL && !t->list) {
        t->at = AT_NAME;
        return OK;
    }
    if (t->format == CHAT_TOOLS_LLAMA3) {
        t->at = AT_CODE;
        return OK;
    }
    if (t->format == CHAT_TOOLS_HERMES && c == '<') {
        t->at = AT_FUNCTION;
        return OK;
    }
    return give_back(t);
}

/* ---- the call between tags, as Qwen3-Coder writes it ---- */

/* b begins with what; *wait: more of it could come. */
static bool begins(const text_buf *b, const char *what, bool *wait)
{
    const size_t n = strlen(what), have = b->n < n ? b->n : n;
    const bool same = !memcmp(b->p, what, have);
    if (same && have < n) *wait = true;
    return same && have == n;
}

/* The tag's own word, up to '>': false when there is none (*wait: yet). */
static bool tag_word(const text_buf *b, size_t skip, char word[MAX_NAME + 1], size_t *end,
                     bool *wait)
{
    const char *close = b->n > skip ? memchr(b->p + skip, '>', b->n - skip) : NULL;
    const size_t n = close ? (size_t)(close - b->p) - skip : b->n - skip;
    if (n > MAX_NAME || (close && n == 0)) return false;
    if (!close) {
        *wait = true;
        return false;
    }
    memcpy(word, b->p + skip, n);
    word[n] = '\0';
    *end = skip + n + 1;
    return !strpbrk(word, "<\n");
}

static err_code run_function(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    size_t end = 0;
    if (!begins(&t->in, "<function=", &wait) || !tag_word(&t->in, 10, t->name, &end, &wait)) {
        if (wait && !last) return OK;
        *more = true;
        return give_back(t);
    }
    *more = true;
    buf_drop(&t->in, end);
    t->at = AT_TAGS;
    t->has_args = false;
    t->sent = 0;
    return call_begin(t);
}

/* The text of a value stands on lines of its own. */
static err_code take_argument(toolcall *t, const char *key, size_t from, size_t to)
{
    char *argument = NULL;
    if (to > from && t->in.p[from] == '\n') from++;
    if (to > from && t->in.p[to - 1] == '\n') to--;
    const char kept = t->in.p[to];
    t->in.p[to] = '\0';
    err_code rc = toolcall_xml_argument(&argument, t->tools, t->name, key, t->in.p + from, t->e);
    t->in.p[to] = kept;
    if (rc == OK) rc = tell(t, TOOLCALL_ARGS, t->has_args ? ", " : "{", t->has_args ? 2 : 1);
    if (rc == OK) rc = tell(t, TOOLCALL_ARGS, argument, strlen(argument));
    t->has_args = true;
    mem_free(argument);
    return rc;
}

static err_code run_tags(toolcall *t, bool last, bool *more)
{
    static const char open[] = "<parameter=", close[] = "</parameter>", end[] = "</function>";
    char key[MAX_NAME + 1];
    bool wait = false;
    size_t from = 0;
    buf_drop(&t->in, spaces(&t->in));
    if (!t->in.n && !last) return OK;
    if (t->in.n && begins(&t->in, end, &wait)) {
        buf_drop(&t->in, sizeof end - 1);
        t->at = AT_CLOSE;
        t->begun = false;
        t->back.n = t->raw.n = 0;
        return t->has_args ? tell(t, TOOLCALL_ARGS, "}", 1) : tell(t, TOOLCALL_ARGS, "{}", 2);
    }
    if (t->in.n && begins(&t->in, open, &wait) &&
        tag_word(&t->in, sizeof open - 1, key, &from, &wait)) {
        const size_t seen = t->sent > from + sizeof close ? t->sent - sizeof close : from;
        const char *p = memmem(t->in.p + seen, t->in.n - seen, close, sizeof close - 1);
        t->sent = p ? 0 : t->in.n; /* looked through */
        if (p) {
            const size_t to = (size_t)(p - t->in.p);
            *more = true;
            TRY(take_argument(t, key, from, to));
            buf_drop(&t->in, to + sizeof close - 1);
            return OK;
        }
        wait = t->in.n <= MAX_CALL;
    }
    if (wait && !last) return OK;
    if (wait) t->in.n = 0; /* it was cut in the middle: what was whole is told */
    *more = true;
    return give_back(t);
}

/* name[ARGS]{...} or name{...} */
static err_code run_name(toolcall *t, bool last, bool *more)
{
    const char *brace = memchr(t->in.p, '{', t->in.n);
    const size_t n = brace ? (size_t)(brace - t->in.p) : t->in.n;
    if (!brace && !last && n <= MAX_NAME) return OK;
    *more = true;
    const char *mark = t->in.n ? memmem(t->in.p, t->in.n, "[ARGS]", 6) : NULL;
    size_t len = mark && mark < t->in.p + n ? (size_t)(mark - t->in.p) : n;
    while (len && is_space(t->in.p[len - 1])) len--;
    if (!brace || !len || len > MAX_NAME) {
        TRY(buf_add(&t->back, t->in.p, t->in.n, t->e));
        buf_drop(&t->in, t->in.n);
        return give_back(t);
    }
    object_begin(t);
    memcpy(t->name, t->in.p, len);
    t->name[len] = '\0';
    t->key = KEY_BARE;
    buf_drop(&t->in, n);
    return call_begin(t);
}

/* ---- DeepSeek's: name or "function", a mark, perhaps the name and a fence, the object ---- */

static err_code run_deepseek_open(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    TRY(skip_spaces(t));
    if (!t->in.n) return OK;
    const bool begin = begins(&t->in, deepseek_begin, &wait);
    if (begin || (t->list && begins(&t->in, deepseek_last, &wait))) {
        const size_t n = begin ? sizeof deepseek_begin - 1 : sizeof deepseek_last - 1;
        t->at = begin ? AT_NAME : AT_CONTENT;
        t->list = begin && t->list;
        if (begin) TRY(buf_add(&t->back, t->in.p, n, t->e));
        buf_drop(&t->in, n);
        if (!begin) t->back.n = 0;
        return OK;
    }
    if (wait && !last) return OK;
    *more = true;
    return give_back(t);
}

static err_code run_deepseek_name(toolcall *t, bool last, bool *more)
{
    const char *brace = memchr(t->in.p, '{', t->in.n);
    const size_t n = brace ? (size_t)(brace - t->in.p) : t->in.n;
    if (!brace && !last && n <= 2 * MAX_NAME) return OK;
    const char *mark = n ? memmem(t->in.p, n, deepseek_mark, sizeof deepseek_mark - 1) : NULL;
    const char *from = t->in.p, *to = mark, *behind = mark ? mark + sizeof deepseek_mark - 1 : NULL;
    *more = true;
    while (behind && brace && behind < brace && is_space(*behind)) behind++;
    if (brace && behind && behind < brace) { /* the name is there, up to the end of its line */
        from = behind;
        to = memchr(from, '\n', (size_t)(brace - from));
    }
    if (!brace || !to || to == from || to - from > MAX_NAME) return give_back(t);
    object_begin(t);
    memcpy(t->name, from, (size_t)(to - from));
    t->name[to - from] = '\0';
    t->key = KEY_BARE;
    buf_drop(&t->in, n);
    return call_begin(t);
}

static err_code run_deepseek_close(toolcall *t, bool last, bool *more)
{
    bool wait = false;
    buf_drop(&t->in, spaces(&t->in));
    if (!t->in.n && !last) return OK;
    *more = t->in.n > 0;
    if (t->in.n && begins(&t->in, "```", &wait)) {
        buf_drop(&t->in, 3);
        return OK;
    }
    const bool closed = t->in.n && begins(&t->in, deepseek_end, &wait);
    if (!closed && wait && !last) {
        *more = false;
        return OK;
    }
    if (closed) buf_drop(&t->in, sizeof deepseek_end - 1);
    if (!closed && wait) t->in.n = 0;
    t->at = closed ? AT_OPEN : AT_CONTENT;
    t->list = closed;
    t->started = true;
    return OK;
}

/* Behind a call: its closing tag, or a sign that there is another. */
static err_code run_close(toolcall *t, bool last, bool *more)
{
    const char *end = closer(t->format);
    const size_t lead = spaces(&t->in), n = strlen(end);
    const char *p = t->in.n ? t->in.p + lead : "";
    const size_t left = t->in.n - lead;
    if (left < n && !memcmp(p, end, left) && !last) return OK;
    *more = left > 0;
    const bool closed = left >= n && !memcmp(p, end, n);
    const bool tagged = t->format == CHAT_TOOLS_HERMES || t->format == CHAT_TOOLS_INTERNLM2;
    t->at = AT_CONTENT;
    t->started = true;
    if (closed) {
        buf_drop(&t->in, lead + n);
        if (!tagged && (t->list || t->format == CHAT_TOOLS_LLAMA3)) {
            t->back.n = 0;
            TRY(buf_add(&t->back, end, n, t->e));
            t->at = AT_OPEN;
        }
        return OK;
    }
    if (t->list && left && *p == ']') {
        t->list = false;
        buf_drop(&t->in, lead + 1);
    }
    if (tagged && last && left && left < n && !memcmp(p, end, left)) buf_drop(&t->in, t->in.n);
    return OK;
}

/* ---- name.call(key="value", ...), as the tools that a model was trained with are called ---- */

static size_t word(const char *p)
{
    size_t n = 0;
    while ((p[n] >= 'a' && p[n] <= 'z') || (p[n] >= 'A' && p[n] <= 'Z') || p[n] == '_' ||
           (n && p[n] >= '0' && p[n] <= '9'))
        n++;
    return n;
}

static err_code code_args(const char *p, text_buf *out, bool *ok, err *e)
{
    TRY(buf_add(out, "{", 1, e));
    while (*p && *p != ')') {
        const size_t n = word(p);
        if (!n || p[n] != '=' || p[n + 1] != '"') return OK;
        size_t k = n + 2;
        while (p[k] && p[k] != '"') k += p[k] == '\\' && p[k + 1] ? 2 : 1;
        if (!p[k]) return OK;
        if (out->n > 1) TRY(buf_add(out, ", ", 2, e));
        TRY(buf_add(out, "\"", 1, e));
        TRY(buf_add(out, p, n, e));
        TRY(buf_add(out, "\": ", 3, e));
        TRY(buf_add(out, p + n + 1, k - n, e));
        p += k + 1;
        while (*p == ',' || *p == ' ') p++;
    }
    TRY(buf_add(out, "}", 1, e));
    *ok = *p == ')';
    for (p += *ok; is_space(*p);) p++;
    *ok = *ok && !*p;
    return OK;
}

static err_code run_code(toolcall *t)
{
    text_buf args = {0};
    const size_t n = t->in.n ? word(t->in.p) : 0;
    bool ok = false;
    err_code rc = OK;
    if (n && n <= MAX_NAME && !strncmp(t->in.p + n, ".call(", 6))
        rc = code_args(t->in.p + n + 6, &args, &ok, t->e);
    if (rc == OK && ok) {
        cJSON *o = NULL;
        err ignored;
        ok = json_parse(&o, args.p, args.n, "arguments", &ignored) == OK;
        cJSON_Delete(o);
    }
    if (rc == OK && ok) {
        memcpy(t->name, t->in.p, n);
        t->name[n] = '\0';
        rc = call_begin(t);
        if (rc == OK) rc = tell(t, TOOLCALL_ARGS, args.p, args.n);
    } else if (rc == OK) {
        rc = buf_add(&t->back, t->in.p, t->in.n, t->e);
        if (rc == OK) rc = give_back(t);
    }
    buf_drop(&t->in, t->in.n);
    mem_free(args.p);
    return rc;
}

/* ---- the whole ---- */

err_code toolcall_open(toolcall **out, chat_tools format, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "tool calls", e));
    (*out)->format = format;
    return OK;
}

void toolcall_close(toolcall **t)
{
    if (!*t) return;
    mem_free((*t)->in.p);
    mem_free((*t)->back.p);
    mem_free((*t)->raw.p);
    mem_free(*t);
    *t = NULL;
}

void toolcall_tools(toolcall *t, const cJSON *tools) { t->tools = tools; }

int toolcall_count(const toolcall *t) { return t->calls; }

static err_code run(toolcall *t, bool last)
{
    const bool deepseek = t->format == CHAT_TOOLS_DEEPSEEK;
    for (bool more = true; more;) {
        const place at = t->at;
        const size_t left = t->in.n;
        more = false;
        switch (at) {
        case AT_CONTENT: TRY(run_content(t, last, &more)); break;
        case AT_OPEN: TRY(deepseek ? run_deepseek_open(t, last, &more) : run_open(t, &more)); break;
        case AT_NAME:
            TRY(deepseek ? run_deepseek_name(t, last, &more) : run_name(t, last, &more));
            break;
        case AT_OBJECT: TRY(run_object(t)); break;
        case AT_CLOSE:
            TRY(deepseek ? run_deepseek_close(t, last, &more) : run_close(t, last, &more));
            break;
        case AT_FUNCTION: TRY(run_function(t, last, &more)); break;
        case AT_TAGS: TRY(run_tags(t, last, &more)); break;
        case AT_CODE:
            if (t->in.n > MAX_CALL || last) TRY(run_code(t));
            break;
        }
        more = more || t->at != at || (t->in.n && t->in.n != left);
    }
    return OK;
}

err_code toolcall_feed(toolcall *t, const char *text, size_t n, toolcall_fn fn, void *ud, err *e)
{
    t->fn = fn;
    t->ud = ud;
    t->e = e;
    TRY(buf_add(&t->in, text, n, e));
    return run(t, false);
}

err_code toolcall_end(toolcall *t, toolcall_fn fn, void *ud, err *e)
{
    t->fn = fn;
    t->ud = ud;
    t->e = e;
    TRY(buf_add(&t->in, "", 0, e));
    TRY(run(t, true));
    if (t->at == AT_OPEN && t->list && t->format == CHAT_TOOLS_DEEPSEEK) t->back.n = 0;
    if (t->at == AT_OBJECT || t->at == AT_OPEN) {
        TRY(give_back(t));
        return run(t, true);
    }
    return OK;
}
