/* Pre-tokenizers: a chain of stages, each of which hands its pieces to the next from left to
 * right, so that no list of words is ever held. */
#include <stdlib.h>
#include <string.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

#define SPLIT_MAX_STAGES 16

const char tok_regex_gpt2[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
const char tok_regex_qwen2[] = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}|"
                               " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
const char tok_regex_llama3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}|"
    " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

typedef enum {
    SPLIT_ISOLATED,
    SPLIT_REMOVED,
    SPLIT_PREVIOUS,
    SPLIT_NEXT,
    SPLIT_CONTIGUOUS
} split_behavior;
typedef enum { STAGE_SPLIT, STAGE_METASPACE, STAGE_BYTES } stage_kind;
typedef enum { PREPEND_NEVER, PREPEND_FIRST, PREPEND_ALWAYS } prepend_when;

typedef struct {
    stage_kind kind;
    tok_regex *regex; /* STAGE_SPLIT by pattern, STAGE_BYTES with its own; NULL: none */
    char *literal;    /* STAGE_SPLIT by string */
    split_behavior behavior;
    bool invert;
    bool known;           /* the regex is one whose cuts are understood (tok_split_can_cut) */
    bool split;           /* STAGE_METASPACE: cut before every replacement */
    bool prefix_space;    /* STAGE_BYTES */
    prepend_when prepend; /* STAGE_METASPACE */
    char mark[8];         /* STAGE_METASPACE: what stands for a space */
} stage;

struct tok_split {
    stage st[SPLIT_MAX_STAGES];
    int n;
};

typedef struct {
    const tok_split *s;
    frag_kind kind;
    tok_word_fn each;
    void *ctx;
    tok_regex_scratch *scratch;
} split_run;

/* ---- reading ---- */

static bool regex_known(const char *p)
{
    return !strcmp(p, tok_regex_gpt2) || !strcmp(p, tok_regex_qwen2) ||
           !strcmp(p, tok_regex_llama3);
}

static err_code read_behavior(stage *st, const cJSON *o, err *e)
{
    static const char *const names[] = {"Isolated", "Removed", "MergedWithPrevious",
                                        "MergedWithNext", "Contiguous"};
    const char *b;
    TRY(json_get_str(o, "behavior", &b, e));
    for (int i = 0; i < 5; i++) {
        if (strcmp(b, names[i]) != 0) continue;
        st->behavior = (split_behavior)i;
        return OK;
    }
    return err_set(e, E_UNSUPPORTED, "pre_tokenizer: Split behavior '%.40s'", b);
}

static err_code read_split(stage *st, const cJSON *o, err *e)
{
    const cJSON *p = cJSON_GetObjectItemCaseSensitive(o, "pattern");
    const cJSON *re = cJSON_GetObjectItemCaseSensitive(p, "Regex");
    const cJSON *lit = cJSON_GetObjectItemCaseSensitive(p, "String");
    st->kind = STAGE_SPLIT;
    TRY(read_behavior(st, o, e));
    TRY(json_opt_bool(o, "invert", false, &st->invert, e));
    if (cJSON_IsString(re)) {
        st->known = st->behavior == SPLIT_ISOLATED && regex_known(re->valuestring);
        return tok_regex_open(&st->regex, re->valuestring, e);
    }
    if (cJSON_IsString(lit)) return mem_strdup(&st->literal, lit->valuestring, e);
    return err_set(e, E_INPUT, "pre_tokenizer: Split: expected pattern.Regex or pattern.String");
}

static err_code read_bytes(stage *st, const cJSON *o, err *e)
{
    bool regex;
    st->kind = STAGE_BYTES;
    TRY(json_opt_bool(o, "add_prefix_space", true, &st->prefix_space, e));
    TRY(json_opt_bool(o, "use_regex", true, &regex, e));
    st->known = regex;
    return regex ? tok_regex_open(&st->regex, tok_regex_gpt2, e) : OK;
}

static err_code read_metaspace(stage *st, const cJSON *o, err *e)
{
    const char *mark, *scheme;
    bool prefix;
    st->kind = STAGE_METASPACE;
    TRY(json_opt_str(o, "replacement", "\xe2\x96\x81", &mark, e));
    TRY(json_opt_bool(o, "add_prefix_space", true, &prefix, e));
    TRY(json_opt_str(o, "prepend_scheme", prefix ? "always" : "never", &scheme, e));
    TRY(json_opt_bool(o, "split", true, &st->split, e));
    if (!*mark || utf8_len(mark, strlen(mark)) != strlen(mark))
        return err_set(
            e, E_INPUT,
            "pre_tokenizer: Metaspace: expected one character as replacement, got '%.20s'", mark);
    memcpy(st->mark, mark, strlen(mark) + 1);
    st->prepend = !strcmp(scheme, "first")    ? PREPEND_FIRST
                  : !strcmp(scheme, "always") ? PREPEND_ALWAYS
                                              : PREPEND_NEVER;
    return OK;
}

static err_code read_digits(stage *st, const cJSON *o, err *e)
{
    bool single;
    st->kind = STAGE_SPLIT;
    TRY(json_opt_bool(o, "individual_digits", false, &single, e));
    return tok_regex_open(&st->regex, single ? "\\p{N}" : "\\p{N}+", e);
}

static err_code read_stage(tok_split *s, const cJSON *o, int depth, err *e)
{
    const char *type;
    TRY(json_get_str(o, "type", &type, e));
    if (!strcmp(type, "Sequence")) {
        const cJSON *list = cJSON_GetObjectItemCaseSensitive(o, "pretokenizers"), *c;
        if (depth > 4) return err_set(e, E_LIMIT, "pre_tokenizer: nested too deep");
        cJSON_ArrayForEach(c, list) TRY(read_stage(s, c, depth + 1, e));
        return OK;
    }
    if (s->n == SPLIT_MAX_STAGES)
        return err_set(e, E_LIMIT, "pre_tokenizer: more than %d steps", SPLIT_MAX_STAGES);
    if (s->n && s->st[s->n - 1].kind == STAGE_BYTES)
        return err_set(e, E_UNSUPPORTED, "pre_tokenizer: '%.40s' behind ByteLevel", type);
    stage *st = &s->st[s->n++];
    if (!strcmp(type, "Split")) return read_split(st, o, e);
    if (!strcmp(type, "ByteLevel")) return read_bytes(st, o, e);
    if (!strcmp(type, "Metaspace")) return read_metaspace(st, o, e);
    if (!strcmp(type, "Digits")) return read_digits(st, o, e);
    return err_set(e, E_UNSUPPORTED, "pre_tokenizer '%.40s'", type);
}

err_code tok_split_open(tok_split **out, const cJSON *spec, err *e)
{
    *out = NULL;
    if (!spec || cJSON_IsNull(spec)) return OK;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "pre_tokenizer", e));
    const err_code rc = read_stage(*out, spec, 0, e);
    if (rc != OK) tok_split_close(out);
    return rc;
}

err_code tok_split_regex(tok_split **out, const char *regex, err *e)
{
    TRY(mem_alloc((void **)out, 1, sizeof **out, "pre_tokenizer", e));
    tok_split *s = *out;
    s->n = 2;
    s->st[0].known = regex_known(regex);
    s->st[1].kind = STAGE_BYTES;
    const err_code rc = tok_regex_open(&s->st[0].regex, regex, e);
    if (rc != OK) tok_split_close(out);
    return rc;
}

void tok_split_close(tok_split **s)
{
    if (!*s) return;
    for (int i = 0; i < (*s)->n; i++) {
        tok_regex_close(&(*s)->st[i].regex);
        mem_free((*s)->st[i].literal);
    }
    mem_free(*s);
    *s = NULL;
}

bool tok_split_bytes(const tok_split *s)
{
    return s && s->n && s->st[s->n - 1].kind == STAGE_BYTES;
}

/* ---- running ---- */

static err_code run_stage(split_run *r, int k, const char *s, size_t n, bool at_start, err *e);

/* The next piece of s behind *at: a match, or what lies before one. False at the end. */
typedef struct {
    size_t at, match_start, match_end;
    bool have;
} finder;

static err_code find_next(split_run *r, const stage *st, finder *f, const char *s, size_t n,
                          size_t *start, size_t *end, bool *is_match, bool *more, err *e)
{
    *more = f->at < n;
    if (!*more) return OK;
    if (!f->have) {
        bool found = false;
        size_t a = n, b = n, from = f->at;
        while (from <= n) { /* empty matches cut nothing */
            if (st->regex) {
                TRY(tok_regex_find(st->regex, &r->scratch, s, n, from, &found, &a, &b, e));
            } else {
                const char *p = *st->literal
                                    ? memmem(s + from, n - from, st->literal, strlen(st->literal))
                                    : NULL;
                found = p != NULL;
                a = p ? (size_t)(p - s) : n;
                b = p ? a + strlen(st->literal) : n;
            }
            if (!found || b > a) break;
            const size_t step = utf8_len(s + b, n - b);
            from = b + (step ? step : 1);
            found = false;
        }
        f->match_start = found ? a : n;
        f->match_end = found ? b : n;
        f->have = true;
    }
    *start = f->at;
    *is_match = f->at == f->match_start;
    *end = *is_match ? f->match_end : f->match_start;
    if (*is_match) f->have = false;
    *is_match ^= st->invert;
    f->at = *end;
    return OK;
}

static err_code pass_on(split_run *r, int k, const char *s, size_t from, size_t to, bool at_start,
                        err *e)
{
    return from < to ? run_stage(r, k + 1, s + from, to - from, at_start && from == 0, e) : OK;
}

/* One piece is held back, because a neighbour may still join it. */
static err_code run_split(split_run *r, int k, const char *s, size_t n, bool at_start, err *e)
{
    const stage *st = &r->s->st[k];
    finder f = {0};
    size_t from = 0, to = 0, a, b;
    bool last_match = false, match, more;
    for (;;) {
        TRY(find_next(r, st, &f, s, n, &a, &b, &match, &more, e));
        if (!more) break;
        bool join = false;
        switch (st->behavior) {
        case SPLIT_ISOLATED: break;
        case SPLIT_REMOVED: break;
        case SPLIT_PREVIOUS: join = match && !last_match; break;
        case SPLIT_NEXT: join = !match && last_match; break;
        case SPLIT_CONTIGUOUS: join = match == last_match; break;
        }
        if (!join) {
            TRY(pass_on(r, k, s, from, to, at_start, e));
            from = a;
        }
        to = b;
        if (st->behavior == SPLIT_REMOVED && match) from = to;
        last_match = match;
    }
    return pass_on(r, k, s, from, to, at_start, e);
}

static err_code run_metaspace(split_run *r, int k, const char *s, size_t n, bool at_start, err *e)
{
    const stage *st = &r->s->st[k];
    const size_t mark = strlen(st->mark);
    const bool has = n && (s[0] == ' ' || (n >= mark && memcmp(s, st->mark, mark) == 0));
    const bool add = !has && r->kind != FRAG_CONT &&
                     (st->prepend == PREPEND_ALWAYS ||
                      (st->prepend == PREPEND_FIRST && at_start && r->kind == FRAG_FIRST));
    tok_buf b = {0};
    err_code rc = tok_buf_reserve(&b, n, e);
    if (rc == OK && add) rc = tok_buf_add(&b, st->mark, mark, e);
    for (size_t i = 0; i < n && rc == OK; i++)
        rc = s[i] == ' ' ? tok_buf_add(&b, st->mark, mark, e) : tok_buf_add(&b, s + i, 1, e);
    size_t from = 0;
    for (size_t i = 1; st->split && i + mark <= b.n && rc == OK; i++) {
        if (memcmp(b.p + i, st->mark, mark) != 0) continue;
        rc = pass_on(r, k, b.p, from, i, at_start, e);
        from = i;
    }
    if (rc == OK) rc = pass_on(r, k, b.p, from, b.n, at_start, e);
    tok_buf_free(&b);
    return rc;
}

static err_code run_bytes(split_run *r, int k, const char *s, size_t n, bool at_start, err *e)
{
    const stage *st = &r->s->st[k];
    tok_buf b = {0};
    err_code rc = OK;
    if (st->prefix_space && s[0] != ' ' && r->kind != FRAG_CONT) {
        rc = tok_buf_add(&b, " ", 1, e);
        if (rc == OK) rc = tok_buf_add(&b, s, n, e);
        s = b.p;
        n = b.n;
    }
    if (rc == OK)
        rc = st->regex ? run_split(r, k, s, n, at_start, e) : pass_on(r, k, s, 0, n, at_start, e);
    tok_buf_free(&b);
    return rc;
}

static err_code run_stage(split_run *r, int k, const char *s, size_t n, bool at_start, err *e)
{
    if (k == r->s->n) return r->each(r->ctx, s, n, e);
    switch (r->s->st[k].kind) {
    case STAGE_METASPACE: return run_metaspace(r, k, s, n, at_start, e);
    case STAGE_BYTES: return run_bytes(r, k, s, n, at_start, e);
    default: return run_split(r, k, s, n, at_start, e);
    }
}

err_code tok_split_run(const tok_split *s, const char *text, size_t n, frag_kind kind,
                       tok_word_fn each, void *ctx, err *e)
{
    split_run r = {s, kind, each, ctx, NULL};
    if (!n) return OK;
    if (!s) return each(ctx, text, n, e);
    const err_code rc = run_stage(&r, 0, text, n, true, e);
    tok_regex_scratch_free(&r.scratch);
    return rc;
}

/* ---- cuts ---- */

static bool is_letter(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

/* U+4E00 to U+9FBF as UTF-8 at s. */
static bool is_han(const char *s, size_t n)
{
    const uint8_t *u = (const uint8_t *)s;
    return n >= 3 && ((u[0] == 0xe4 && u[1] >= 0xb8) || (u[0] > 0xe4 && u[0] < 0xe9) ||
                      (u[0] == 0xe9 && u[1] < 0xbf));
}

/* In each of the known patterns a word may begin with one space and letters but has no space
 * inside, and a line end is only followed by more white space in its word. So text may be cut in
 * "x| y" and in "x\n|y", where x is not white space and y a letter. x is limited to ASCII and
 * Han to stay clear of other spaces. */
bool tok_split_can_cut(const tok_split *s, const char *text, size_t n, size_t at)
{
    if (!s) return true;
    const bool regex_bytes = (s->n == 2 && s->st[0].known && s->st[1].kind == STAGE_BYTES &&
                              !s->st[1].regex && !s->st[1].prefix_space) ||
                             (s->n == 1 && s->st[0].kind == STAGE_BYTES && s->st[0].known);
    if (s->n == 1 &&
        s->st[0].kind == STAGE_METASPACE) /* the vocabulary's rules decide, which know this mark */
        return !strcmp(s->st[0].mark, "\xe2\x96\x81");
    if (!regex_bytes || at < 4 || at + 4 > n) return false;
    const size_t x = text[at - 1] == '\n' ? at - 1 : at; /* x ends here */
    const size_t y = text[at - 1] == '\n' ? at : at + 1; /* y begins here */
    if (text[at - 1] != '\n' && text[at] != ' ') return false;
    return ((text[x - 1] > ' ' && text[x - 1] < 0x7f) || is_han(text + x - 3, 3)) &&
           (is_letter(text[y]) || is_han(text + y, n - y));
}

static bool bit(const uint8_t *set, uint8_t c) { return set[c >> 3] >> (c & 7) & 1; }

/* ---- cuts of models that do not split words ---- */

static const char u2581[] = "\xe2\x96\x81"; /* a space in vocabularies and normalized text */

static bool space_at(const char *s, size_t n, size_t at)
{
    return s[at] == ' ' || (n - at >= 3 && memcmp(s + at, u2581, 3) == 0);
}

static bool space_before(const char *s, size_t at)
{
    return s[at - 1] == ' ' || (at >= 3 && memcmp(s + at - 3, u2581, 3) == 0);
}

void cut_rules_of(cut_rules *c, const vocab *v)
{
    static const char line[] = "<0x0A>"; /* a line end that only byte fallback knows */
    memset(c, 0, sizeof *c);
    const int32_t fallback = vocab_find(v, line, 6);
    c->off = vocab_find(v, u2581, 3) < 0 ||
             (vocab_find(v, "\n", 1) < 0 && fallback < 0); /* unknown ones join */
    for (int32_t id = 0; id < v->n; id++) {
        const vocab_piece *p = &v->piece[id];
        if (!(p->flags & PIECE_SET)) continue;
        const char *t = vocab_raw(v, id);
        if (id != fallback && p->raw_len > 6 && memmem(t, p->raw_len, line, 6)) c->off = true;
        for (uint32_t i = 1; i < p->raw_len; i++) {
            const uint8_t before = (uint8_t)t[i - 1], here = (uint8_t)t[i];
            if (space_at(t, p->raw_len, i) && !space_before(t, i))
                c->space[before >> 3] |= (uint8_t)(1 << (before & 7));
            if (before == '\n' && here != '\n') c->line[here >> 3] |= (uint8_t)(1 << (here & 7));
        }
    }
}

bool cut_rules_ok(const cut_rules *c, const char *s, size_t n, size_t at)
{
    const uint8_t before = (uint8_t)s[at - 1], here = (uint8_t)s[at];
    if (c->off) return false;
    if (space_at(s, n, at)) return !space_before(s, at) && !bit(c->space, before);
    return before == '\n' && here != '\n' && !bit(c->line, here);
}
