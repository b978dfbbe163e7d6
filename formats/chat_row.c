/* Conversations by a row of the table: pieces around what is said. */
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "formats/chat_internal.h"

/* ---- layout: plain text runs and tokens ---- */

void chat_layout_free(chat_layout *l)
{
    tok_buf_free(&l->text);
    mem_free(l->seg);
}

static err_code seg_add(chat_layout *l, chat_seg s, err *e)
{
    if (l->n == l->cap) {
        chat_seg *p;
        const int64_t cap = l->cap ? 2 * l->cap : 32;
        TRY(mem_alloc((void **)&p, (size_t)cap, sizeof *p, "chat", e));
        if (l->n) memcpy(p, l->seg, (size_t)l->n * sizeof *p);
        mem_free(l->seg);
        l->seg = p;
        l->cap = cap;
    }
    l->seg[l->n++] = s;
    return OK;
}

err_code chat_put_text(chat_layout *l, const char *s, size_t n, err *e)
{
    if (!n) return OK;
    if (!l->n || l->seg[l->n - 1].id >= 0) TRY(seg_add(l, (chat_seg){-1, l->text.n, 0}, e));
    l->seg[l->n - 1].n += n;
    return tok_buf_add(&l->text, s, n, e);
}

err_code chat_put_id(chat_layout *l, int32_t id, err *e)
{
    return id < 0 ? OK : seg_add(l, (chat_seg){id, 0, 0}, e);
}

/* A tokenizer without configuration names no EOS; the usual one may be there nevertheless. */
int32_t chat_eos(const tokenizer *t)
{
    return tokenizer_eos(t) >= 0 ? tokenizer_eos(t) : tokenizer_id(t, "</s>");
}

err_code chat_put_own(chat_layout *l, const char *s, size_t n, err *e)
{
    size_t at, len;
    int32_t id;
    while (n && tokenizer_find_special(l->t, s, n, &at, &len, &id)) {
        TRY(chat_put_text(l, s, at, e));
        TRY(chat_put_id(l, id, e));
        s += at + len;
        n -= at + len;
    }
    return chat_put_text(l, s, n, e);
}

/* A piece of the template: special-token strings in it are tokens. */
static err_code put_piece(chat_layout *l, const char *s, err *e)
{
    while (s && *s) {
        const size_t n = strcspn(s, CHAT_BOS CHAT_EOS);
        if (n)
            TRY(chat_put_own(l, s, n, e));
        else
            TRY(chat_put_id(l, *s == CHAT_BOS[0] ? tokenizer_bos(l->t) : chat_eos(l->t), e));
        s += n ? n : 1;
    }
    return OK;
}

/* ---- a conversation ---- */

enum { ROLE_IS_SYSTEM, ROLE_IS_USER, ROLE_IS_ASSISTANT };

static err_code role_of(int *role, const chat_message *m, int64_t i, err *e)
{
    static const char *const names[] = {"system", "user", "assistant"};
    for (*role = 0; *role < 3; ++*role)
        if (m->role && !strcmp(m->role, names[*role]))
            return m->content ? OK : err_set(e, E_INPUT, "message %d: no content", (int)i + 1);
    return err_set(e, E_INPUT, "message %d: expected role system, user or assistant, got '%.40s'",
                   (int)i + 1, m->role ? m->role : "");
}

static bool trimmed(char c) { return c == ' ' || (c >= 9 && c <= 13) || (c >= 0x1c && c <= 0x1f); }

/* White space of Python's str.strip at s (n bytes) from either end; returns its length. */
static size_t blank_at(const char *s, size_t n, bool end)
{
    if (!n) return 0;
    size_t i = end ? n - 1 : 0;
    while (end && i > 0 && n - i < 4 && ((uint8_t)s[i] & 0xc0) == 0x80) i--;
    const size_t len = utf8_len(s + i, n - i);
    if (!len || (end && i + len != n)) return 0;
    return trimmed(s[i]) || tok_is_white(utf8_code(s + i, len)) ? len : 0;
}

static err_code put_content(chat_layout *l, const chat_row *r, const char *s, bool assistant,
                            bool front, err *e)
{
    size_t n = strlen(s), k;
    if (assistant && (r->flags & CHAT_CUT_THINK)) {
        for (const char *p; (p = strstr(s, "</think>")) != NULL;) s = p + 8;
        n = strlen(s);
    }
    if (r->flags & CHAT_TRIM) {
        while (front && (k = blank_at(s, n, false)) > 0) {
            s += k;
            n -= k;
        }
        while ((k = blank_at(s, n, true)) > 0) n -= k;
    }
    return chat_put_text(l, s, n, e);
}

typedef struct {
    chat_layout *l;
    const chat_row *r;
    const char *system; /* waits for the first user's turn (CHAT_SYSTEM_IN_USER) */
    bool system_shown;
    int64_t users;
} talk;

static err_code put_system(talk *k, const char *s, const char *prefix, err *e)
{
    const chat_row *r = k->r;
    if (r->flags & CHAT_NO_SYSTEM)
        return err_set(e, E_INPUT, "the chat template takes no system message");
    if ((r->flags & CHAT_SKIP_EMPTY) && !*s) return OK;
    k->system_shown = true;
    TRY(put_piece(k->l, r->system, e));
    TRY(put_piece(k->l, prefix, e));
    if (r->flags & CHAT_SYSTEM_IN_USER)
        TRY(chat_put_text(k->l, s, strlen(s), e)); /* only the turn's ends are trimmed */
    else
        TRY(put_content(k->l, r, s, false, true, e));
    return put_piece(k->l, r->eosys, e);
}

static err_code put_user(talk *k, const char *s, err *e)
{
    const chat_row *r = k->r;
    const char *system = k->system;
    char round[40];
    k->users++;
    if (r->flags & CHAT_ROUNDS) {
        snprintf(round, sizeof round, "[Round %lld]\n\n", (long long)k->users);
        TRY(put_piece(k->l, round, e));
    }
    if (k->users == 1 && !k->system_shown) TRY(put_piece(k->l, r->first_user, e));
    TRY(put_piece(k->l, r->user, e));
    k->system = NULL;
    if (system) TRY(put_system(k, system, NULL, e));
    TRY(put_content(k->l, r, s, false, !system, e));
    return put_piece(k->l, r->eoh, e);
}

static err_code put_assistant(talk *k, const char *s, bool last, bool head, err *e)
{
    const chat_row *r = k->r;
    TRY(put_piece(k->l, r->assistant, e));
    TRY(put_content(k->l, r, s, true, true, e));
    if (last && (r->flags & CHAT_CUT_LAST)) return OK;
    TRY(put_piece(k->l, r->eoa, e));
    TRY(put_piece(k->l, r->separator, e));
    return last && !head && (r->flags & CHAT_END_EOS) ? put_piece(k->l, CHAT_EOS, e) : OK;
}

static err_code put_turns(talk *k, const chat_message *m, int64_t from, int64_t n, bool head,
                          err *e)
{
    const chat_row *r = k->r;
    int role = ROLE_IS_USER;
    for (int64_t i = from; i < n; i++) {
        TRY(role_of(&role, &m[i], i, e));
        const bool odd = (i - from) % 2 != 0;
        if ((r->flags & CHAT_ALTERNATE) && role != (odd ? ROLE_IS_ASSISTANT : ROLE_IS_USER))
            return err_set(
                e, E_INPUT,
                "message %d: the chat template wants user and assistant in turn, got '%.40s'",
                (int)i + 1, m[i].role);
        if (role == ROLE_IS_SYSTEM) TRY(put_system(k, m[i].content, NULL, e));
        if (role == ROLE_IS_USER) TRY(put_user(k, m[i].content, e));
        if (role == ROLE_IS_ASSISTANT) TRY(put_assistant(k, m[i].content, i + 1 == n, head, e));
    }
    const bool open = role == ROLE_IS_ASSISTANT && (r->flags & CHAT_CUT_LAST);
    return head && !open ? put_piece(k->l, r->gen ? r->gen : r->assistant, e) : OK;
}

err_code chat_row_lay_out(const chat *c, chat_layout *l, const chat_request *q, err *e)
{
    const chat_row *r = c->row;
    talk k = {.l = l, .r = r};
    int role;
    int64_t from = 0;
    const char *system = NULL, *prefix = NULL;
    if (q->n < 1) return err_set(e, E_INPUT, "a conversation needs at least one message");
    TRY(role_of(&role, &q->messages[0], 0, e));
    if (role == ROLE_IS_SYSTEM) {
        system = q->messages[from++].content;
    } else if (q->meta_instruction) {
        system = q->meta_instruction;
        prefix = r->meta_prefix;
    } else {
        system = r->default_system;
    }
    if (r->bos == BOS_TOKENIZER && tokenizer_add_bos(c->t))
        TRY(chat_put_id(l, tokenizer_bos(c->t), e));
    TRY(put_piece(l, r->begin, e));
    if (system && (r->flags & CHAT_SYSTEM_IN_USER))
        k.system = system;
    else if (system)
        TRY(put_system(&k, system, prefix, e));
    return put_turns(&k, q->messages, from, q->n, q->add_generation, e);
}

err_code chat_row_next(const chat *c, chat_layout *l, const chat_message *m, int64_t n,
                       int64_t *eoa_end, err *e)
{
    /* users counts from 1 on here: nothing of the first turn is put again */
    talk k = {.l = l, .r = c->row, .system_shown = true, .users = 1};
    TRY(put_piece(l, c->row->eoa, e));
    *eoa_end = l->n;
    TRY(put_piece(l, c->row->separator, e));
    return put_turns(&k, m, 0, n, true, e);
}
