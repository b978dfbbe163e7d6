/* The public face: encoding around added tokens, decoding, lookups. Opening is in
 * tokenizer_config.c. */
#include "formats/tokenizer.h"

#include <string.h>
#include <utf8proc.h>

#include "base/mem.h"
#include "formats/tokenizer_internal.h"

/* ---- token lists ---- */

err_code token_list_push(token_list *l, int32_t id, err *e)
{
    if (l->n == l->cap) {
        int32_t *p;
        const int64_t cap = l->cap ? l->cap * 2 : 256;
        TRY(mem_alloc((void **)&p, (size_t)cap, sizeof *p, "tokens", e));
        if (l->n) memcpy(p, l->ids, (size_t)l->n * sizeof *p);
        mem_free(l->ids);
        l->ids = p;
        l->cap = cap;
    }
    l->ids[l->n++] = id;
    return OK;
}

void token_list_free(token_list *l)
{
    mem_free(l->ids);
    *l = (token_list){0};
}

/* ---- encoding: text between added tokens ---- */

/* A model may need tens of bytes of memory for a byte of text, so long text goes through it in
 * parts. */
static err_code encode_plain(const tokenizer *t, const char *s, size_t n, frag_kind kind,
                             token_list *out, err *e)
{
    while (n > TOK_CHUNK && t->ops->can_cut) {
        size_t at = TOK_CHUNK;
        while (at < n && !t->ops->can_cut(t->self, s, n, at, !t->ops->normalize)) at++;
        if (at >= n) break;
        TRY(t->ops->encode(t->self, s, at, kind, out, e));
        kind = FRAG_CONT;
        s += at;
        n -= at;
    }
    return n ? t->ops->encode(t->self, s, n, kind, out, e) : OK;
}

static size_t white_before(const char *s, size_t from, size_t to)
{
    while (to > from) {
        size_t i = to - 1;
        while (i > from && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
        const size_t len = utf8_len(s + i, to - i);
        if (!len || !tok_is_white(utf8_code(s + i, len))) break;
        to = i;
    }
    return to;
}

static size_t white_behind(const char *s, size_t from, size_t to)
{
    while (from < to) {
        const size_t len = utf8_len(s + from, to - from);
        if (!len || !tok_is_white(utf8_code(s + from, len))) break;
        from += len;
    }
    return from;
}

static bool word_char(const char *s, size_t len)
{
    if (!len) return false;
    const utf8proc_category_t c = utf8proc_category((utf8proc_int32_t)utf8_code(s, len));
    return (c >= UTF8PROC_CATEGORY_LU && c <= UTF8PROC_CATEGORY_NO) || c == UTF8PROC_CATEGORY_PC;
}

static bool is_single_word(const char *s, size_t start, size_t end, size_t n)
{
    size_t i = start ? start - 1 : 0;
    while (i > 0 && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
    if (start && word_char(s + i, utf8_len(s + i, start - i))) return false;
    return end == n || !word_char(s + end, utf8_len(s + end, n - end));
}

/* Walks the text: `text` gets what lies between tokens of the trie, `token` the tokens. */
typedef struct {
    const tokenizer *t;
    bool parse_special;
    frag_kind begin; /* how the text at hand begins */
    token_list *out;
} encoder;
typedef err_code (*frag_fn)(const encoder *x, const char *s, size_t n, frag_kind kind, err *e);

static err_code split_added(const encoder *x, const added_trie *trie, const char *s, size_t n,
                            frag_kind begin, frag_fn text, err *e)
{
    size_t done = 0;
    if (!trie->slots) return text(x, s, n, begin, e);
    for (size_t i = 0; i < n;) {
        size_t len = 0;
        const int32_t k = trie_match(trie, s + i, n - i, &len);
        if (k < 0) {
            i++;
            continue;
        }
        const added_token *a = &x->t->added.tok[k];
        size_t start = i, end = i + len;
        i = end;
        if ((a->special && !x->parse_special) ||
            (a->single_word && !is_single_word(s, start, end, n)))
            continue;
        if (a->lstrip) start = white_before(s, done, start);
        if (a->rstrip) end = white_behind(s, end, n);
        if (done == 0 && start == 0 && begin == FRAG_FIRST && !a->special && x->t->lead_piece >= 0)
            TRY(token_list_push(x->out, x->t->lead_piece, e));
        if (start > done) TRY(text(x, s + done, start - done, done ? FRAG_NEXT : begin, e));
        TRY(token_list_push(x->out, a->id, e));
        done = i = end;
    }
    return done < n ? text(x, s + done, n - done, done ? FRAG_NEXT : begin, e) : OK;
}

static err_code frag_normalized(const encoder *x, const char *s, size_t n, frag_kind kind, err *e)
{
    return encode_plain(x->t, s, n, kind, x->out, e);
}

static err_code frag_raw(const encoder *x, const char *s, size_t n, frag_kind kind, err *e)
{
    if (!x->t->ops->normalize) return encode_plain(x->t, s, n, kind, x->out, e);
    tok_buf b = {0};
    err_code rc = x->t->ops->normalize(x->t->self, s, n, kind, &b, e);
    if (rc == OK) rc = split_added(x, &x->t->added.norm, b.p, b.n, kind, frag_normalized, e);
    tok_buf_free(&b);
    return rc;
}

static err_code encode_text(const encoder *x, const char *s, size_t n, err *e)
{
    if (n > TOK_MAX_TEXT)
        return err_set(e, E_LIMIT, "text: expected at most %zu bytes, got %zu", TOK_MAX_TEXT, n);
    if (x->t->ops->normalize && !json_utf8_valid(s, n))
        return err_set(e, E_INPUT, "text: invalid UTF-8");
    return n ? split_added(x, &x->t->added.raw, s, n, x->begin, frag_raw, e) : OK;
}

err_code tokenizer_encode(const tokenizer *t, const char *text, size_t n, bool parse_special,
                          token_list *out, err *e)
{
    const encoder x = {t, parse_special, FRAG_FIRST, out};
    return encode_text(&x, text, n, e);
}

err_code tokenizer_encode_part(const tokenizer *t, const char *text, size_t n, bool begins,
                               token_list *out, err *e)
{
    const encoder x = {t, false, begins ? FRAG_FIRST : FRAG_CONT, out};
    return encode_text(&x, text, n, e);
}

size_t tokenizer_cut(const tokenizer *t, const char *text, size_t n)
{
    if (!t->ops->can_cut || t->added.no_cuts || n < 2) return 0;
    for (size_t at = n < 4 ? 0 : n - 4; at > 0; at--) /* the character at the cut is whole */
        if (t->ops->can_cut(t->self, text, n, at, true)) return at;
    return 0;
}

/* A token given by id strips its neighbours as one found in text would. */
static err_code encode_seg(const encoder *x, const token_seg *segs, int64_t i, int64_t n, err *e)
{
    const tokenizer *t = x->t;
    const token_seg *s = &segs[i];
    size_t from = 0, to = s->n;
    for (int32_t k = 0; k < t->added.n; k++) {
        const added_token *a = &t->added.tok[k];
        if (i > 0 && segs[i - 1].id == a->id && a->rstrip) from = white_behind(s->text, from, to);
        if (i + 1 < n && segs[i + 1].id == a->id && a->lstrip) to = white_before(s->text, from, to);
    }
    return encode_text(x, s->text + from, to - from, e);
}

err_code tokenizer_encode_segs(const tokenizer *t, const token_seg *segs, int64_t n_segs,
                               bool begins, token_list *out, err *e)
{
    encoder x = {t, false, begins ? FRAG_FIRST : FRAG_NEXT, out};
    for (int64_t i = 0; i < n_segs; i++, x.begin = FRAG_NEXT) {
        if (segs[i].id >= t->v.n)
            return err_set(e, E_INPUT, "token %d: the tokenizer has %d", segs[i].id, t->v.n);
        if (segs[i].id >= 0)
            TRY(token_list_push(out, segs[i].id, e));
        else
            TRY(encode_seg(&x, segs, i, n_segs, e));
    }
    return OK;
}

bool tokenizer_find_special(const tokenizer *t, const char *text, size_t n, size_t *at, size_t *len,
                            int32_t *id)
{
    for (size_t i = 0; t->added.all.slots && i < n; i++) {
        const int32_t k = trie_match(&t->added.all, text + i, n - i, len);
        if (k < 0 || !t->added.tok[k].special) continue;
        *at = i;
        *id = t->added.tok[k].id;
        return true;
    }
    return false;
}

/* ---- decoding ---- */

/* What a token adds to the text, before stripping, and whether that applies to it. */
static const char *shown(const tokenizer *t, int32_t id, bool skip_special, size_t *n,
                         bool *strippable)
{
    const vocab_piece *p = &t->v.piece[id];
    *strippable = false;
    if ((p->flags & PIECE_UNK) && t->unk_text) {
        *n = strlen(t->unk_text);
        return t->unk_text;
    }
    if (p->flags & PIECE_SPECIAL) {
        *n = skip_special ? 0 : p->raw_len;
        return vocab_raw(&t->v, id);
    }
    *strippable = !(p->flags & PIECE_BYTE);
    *n = p->text_len;
    return vocab_text(&t->v, id);
}

static void strip_start(const tokenizer *t, decode_state *st, const char **s, size_t *n)
{
    const char *p = *s;
    size_t k = 0;
    if (t->strip != STRIP_NONE && *n && p[0] == ' ') {
        while (k < *n && p[k] == ' ' && (t->strip != STRIP_ONE || k < 1)) k++;
        if (t->strip != STRIP_ALL) st->started = true;
    }
    *s += k;
    *n -= k;
}

typedef enum { UTF8_WHOLE, UTF8_CUT, UTF8_BAD } utf8_state;

/* What begins at s (n >= 1): a whole character of *len bytes, the first bytes of one that the
 * text ends in, or *len bytes that begin none. */
static utf8_state utf8_probe(const char *s, size_t n, size_t *len)
{
    const uint8_t *u = (const uint8_t *)s;
    const size_t need = u[0] < 0x80   ? 1
                        : u[0] < 0xc2 ? 0
                        : u[0] < 0xe0 ? 2
                        : u[0] < 0xf0 ? 3
                        : u[0] < 0xf5 ? 4
                                      : 0;
    const uint8_t lo = u[0] == 0xe0 ? 0xa0 : u[0] == 0xf0 ? 0x90 : 0x80;
    const uint8_t hi = u[0] == 0xed ? 0x9f : u[0] == 0xf4 ? 0x8f : 0xbf;
    *len = 1;
    if (need == 0) return UTF8_BAD;
    while (*len < need && *len < n && u[*len] >= (*len == 1 ? lo : 0x80) &&
           u[*len] <= (*len == 1 ? hi : 0xbf))
        ++*len;
    return *len == need ? UTF8_WHOLE : *len == n ? UTF8_CUT : UTF8_BAD;
}

/* Moves complete characters of s into buf, U+FFFD for what is not one; an unfinished one at the
 * end is held. */
static void put_utf8(decode_state *st, const char *s, size_t n, char *buf, size_t *out)
{
    for (size_t i = 0; i < n;) {
        size_t len;
        const utf8_state what = utf8_probe(s + i, n - i, &len);
        if (what == UTF8_CUT) {
            memcpy(st->held, s + i, len);
            st->n_held = (int)len;
            return;
        }
        if (what == UTF8_BAD) {
            memcpy(buf + *out, "\xef\xbf\xbd", 3);
            *out += 3;
            i += st->each ? 1 : len;
            continue;
        }
        memcpy(buf + *out, s + i, len);
        *out += len;
        i += len;
    }
}

err_code tokenizer_decode_next(const tokenizer *t, decode_state *st, int32_t id, bool skip_special,
                               char *buf, size_t cap, size_t *n, err *e)
{
    *n = 0;
    st->each = t->text == TEXT_SPM;
    if (id < 0 || id >= t->v.n || !(t->v.piece[id].flags & PIECE_SET))
        return id >= 0 && id < TOK_MAX_VOCAB
                   ? OK /* a place in the table of the model without a token */
                   : err_set(e, E_INPUT, "token %d: the tokenizer has %d", id, t->v.n);
    bool strippable;
    size_t len;
    const char *s = shown(t, id, skip_special, &len, &strippable);
    if (!st->started && strippable) strip_start(t, st, &s, &len);
    if (len) st->started = true;
    if (!len) return OK;
    const size_t held = (size_t)st->n_held;
    if (cap < 3 * (len + held) + 1)
        return err_set(e, E_LIMIT, "decoding token %d: expected a buffer of %zu bytes, got %zu", id,
                       3 * (len + held) + 1, cap);
    if (held) { /* join: rare, and short except for odd vocabularies */
        tok_buf b = {0};
        err_code rc = tok_buf_add(&b, st->held, held, e);
        if (rc == OK) rc = tok_buf_add(&b, s, len, e);
        st->n_held = 0;
        if (rc == OK) put_utf8(st, b.p, b.n, buf, n);
        tok_buf_free(&b);
        TRY(rc);
    } else {
        put_utf8(st, s, len, buf, n);
    }
    buf[*n] = '\0';
    return OK;
}

void tokenizer_decode_flush(decode_state *st, char *buf, size_t cap, size_t *n)
{
    *n = 0;
    for (int i = 0; i < (st->each ? st->n_held : st->n_held > 0) && cap > *n + 3; i++) {
        memcpy(buf + *n, "\xef\xbf\xbd", 3);
        *n += 3;
    }
    if (cap > *n) buf[*n] = '\0';
    *st = (decode_state){0};
}

err_code tokenizer_decode(const tokenizer *t, const int32_t *ids, int64_t n, bool skip_special,
                          char **out, size_t *out_n, err *e)
{
    tok_buf b = {0};
    decode_state st = {0};
    err_code rc = OK;
    size_t got;
    *out = NULL;
    for (int64_t i = 0; i < n && rc == OK; i++) {
        const int32_t id = ids[i];
        size_t most = 64;
        if (id >= 0 && id < t->v.n)
            most += 3 * (size_t)(t->v.piece[id].raw_len + t->v.piece[id].text_len);
        if (t->unk_text) most += 3 * strlen(t->unk_text);
        if ((rc = tok_buf_reserve(&b, most, e)) != OK) break;
        rc = tokenizer_decode_next(t, &st, id, skip_special, b.p + b.n, b.cap - b.n, &got, e);
        b.n += got;
    }
    if (rc == OK) rc = tok_buf_reserve(&b, 16, e);
    if (rc == OK) {
        tokenizer_decode_flush(&st, b.p + b.n, 16, &got);
        b.n += got;
        b.p[b.n] = '\0';
        *out = b.p;
        *out_n = b.n;
        return OK;
    }
    tok_buf_free(&b);
    return rc;
}

/* ---- lookups ---- */

int32_t tokenizer_vocab(const tokenizer *t) { return t->v.n; }
int32_t tokenizer_bos(const tokenizer *t) { return t->bos; }
int32_t tokenizer_eos(const tokenizer *t) { return t->eos; }
bool tokenizer_add_bos(const tokenizer *t) { return t->add_bos; }
int32_t tokenizer_id(const tokenizer *t, const char *piece)
{
    return vocab_find(&t->v, piece, strlen(piece));
}
const char *tokenizer_chat_template(const tokenizer *t) { return t->chat_template; }

bool tokenizer_is_special(const tokenizer *t, int32_t id)
{
    return id >= 0 && id < t->v.n && (t->v.piece[id].flags & PIECE_SPECIAL);
}

const char *tokenizer_string(const tokenizer *t, int32_t id, size_t *n)
{
    *n = 0;
    if (id < 0 || id >= t->v.n || !(t->v.piece[id].flags & PIECE_SET)) return "";
    *n = t->v.piece[id].raw_len;
    return vocab_raw(&t->v, id);
}

const char *tokenizer_piece(const tokenizer *t, int32_t id, size_t *n)
{
    *n = 0;
    if (id < 0 || id >= t->v.n || !(t->v.piece[id].flags & PIECE_SET) ||
        (t->v.piece[id].flags & PIECE_SPECIAL))
        return "";
    *n = t->v.piece[id].text_len;
    return vocab_text(&t->v, id);
}
