/* The engine over chat_table.c: a conversation is laid out as text and tokens, then encoded. */
#include "formats/chat.h"

#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/chat_table.h"
#include "formats/tokenizer_internal.h"

#define CHAT_FILE_MAX ((size_t)1 << 20)

struct chat {
    const chat_row *row;
    const tokenizer *t;
    chat_row own; /* a row read from a file; its strings lie in json */
    cJSON *json;
    char name[64];
};

/* ---- opening ---- */

/* LMDeploy's JSON form. */
static err_code read_row(chat *c, const char *path, err *e)
{
    const char *name;
    chat_row *r = &c->own;
    TRY(json_load(&c->json, path, CHAT_FILE_MAX, e));
    const cJSON *stops = cJSON_GetObjectItemCaseSensitive(c->json, "stop_words"), *s;
    TRY(json_opt_str(c->json, "model_name", path_base(path), &name, e));
    TRY(json_opt_str(c->json, "system", "", &r->system, e));
    TRY(json_opt_str(c->json, "eosys", "", &r->eosys, e));
    TRY(json_opt_str(c->json, "user", "", &r->user, e));
    TRY(json_opt_str(c->json, "eoh", "", &r->eoh, e));
    TRY(json_opt_str(c->json, "assistant", "", &r->assistant, e));
    TRY(json_opt_str(c->json, "eoa", "", &r->eoa, e));
    TRY(json_opt_str(c->json, "separator", "", &r->separator, e));
    TRY(json_opt_str(c->json, "meta_instruction", NULL, &r->default_system, e));
    int n = 0;
    cJSON_ArrayForEach(s, stops)
    {
        if (!cJSON_IsString(s) || n == 4)
            return err_set(e, E_INPUT, "%s: stop_words: expected at most 4 strings", path);
        r->stop[n++] = s->valuestring;
    }
    r->names = name;
    r->flags = CHAT_CUT_LAST;
    c->row = r;
    return OK;
}

static bool is_json_path(const char *name)
{
    const size_t n = strlen(name);
    return n > 5 && strcmp(name + n - 5, ".json") == 0;
}

static err_code pick_row(chat *c, const char *name, const char *family_default, const job *j,
                         err *e)
{
    bool exact;
    const char *text = tokenizer_chat_template(c->t);
    if (name && is_json_path(name)) return read_row(c, name, e);
    if (name) {
        c->row = chat_row_find(name);
        return c->row ? OK : err_set(e, E_USAGE, "unknown chat template '%.60s'", name);
    }
    if (text) {
        c->row = chat_row_of_text(text, &exact);
        if (c->row && exact) return OK;
        if (c->row) {
            job_log(
                j, LOG_WARN,
                "the model's chat_template is not a known text; by its marks it is read as '%s'",
                c->row->names);
            return OK;
        }
        job_log(j, LOG_WARN,
                "the model's chat_template is not a known text; the family's template '%s' is used",
                family_default ? family_default : "base");
    }
    c->row = chat_row_find(family_default ? family_default : "base");
    return c->row ? OK : err_set(e, E_USAGE, "unknown chat template '%.60s'", family_default);
}

err_code chat_open(chat **out, const tokenizer *t, const char *name, const char *family_default,
                   const job *j, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "chat", e));
    (*out)->t = t;
    const err_code rc = pick_row(*out, name, family_default, j, e);
    if (rc != OK) {
        chat_close(out);
        return rc;
    }
    const char *names = (*out)->row->names;
    snprintf((*out)->name, sizeof(*out)->name, "%.*s",
             (int)((*out)->json ? strlen(names) : strcspn(names, "|")), names);
    return OK;
}

void chat_close(chat **c)
{
    if (!*c) return;
    cJSON_Delete((*c)->json);
    mem_free(*c);
    *c = NULL;
}

const char *chat_name(const chat *c) { return c->name; }

bool chat_known(const char *name) { return chat_row_find(name) != NULL || is_json_path(name); }

bool chat_name_at(int i, char buf[64])
{
    for (int r = 0; r < chat_n_rows; r++) {
        for (const char *p = chat_rows[r].names; *p;
             p += strcspn(p, "|") + (p[strcspn(p, "|")] == '|')) {
            if (i-- > 0) continue;
            snprintf(buf, 64, "%.*s", (int)strcspn(p, "|"), p);
            return true;
        }
    }
    return false;
}

/* ---- layout: plain text runs and tokens ---- */

typedef struct {
    int32_t id;
    size_t at, n;
} layout_seg; /* id < 0: text */
typedef struct {
    const tokenizer *t;
    tok_buf text;
    layout_seg *seg;
    int64_t n, cap;
} layout;

static void layout_free(layout *l)
{
    tok_buf_free(&l->text);
    mem_free(l->seg);
}

static err_code layout_seg_add(layout *l, layout_seg s, err *e)
{
    if (l->n == l->cap) {
        layout_seg *p;
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

/* Neighbouring text is one run: the tokenizer sees it as the template would render it. */
static err_code put_text(layout *l, const char *s, size_t n, err *e)
{
    if (!n) return OK;
    if (!l->n || l->seg[l->n - 1].id >= 0)
        TRY(layout_seg_add(l, (layout_seg){-1, l->text.n, 0}, e));
    l->seg[l->n - 1].n += n;
    return tok_buf_add(&l->text, s, n, e);
}

static err_code put_id(layout *l, int32_t id, err *e)
{
    return id < 0 ? OK : layout_seg_add(l, (layout_seg){id, 0, 0}, e);
}

/* A tokenizer without configuration names no EOS; the usual one may be there nevertheless. */
static int32_t eos_of(const tokenizer *t)
{
    return tokenizer_eos(t) >= 0 ? tokenizer_eos(t) : tokenizer_id(t, "</s>");
}

/* A piece of the template: special-token strings in it are tokens. */
static err_code put_piece(layout *l, const char *s, err *e)
{
    while (s && *s) {
        size_t n = strcspn(s, CHAT_BOS CHAT_EOS), at, len;
        int32_t id;
        if (n == 0) {
            TRY(put_id(l, *s++ == CHAT_BOS[0] ? tokenizer_bos(l->t) : eos_of(l->t), e));
            continue;
        }
        if (tokenizer_find_special(l->t, s, n, &at, &len, &id)) {
            TRY(put_text(l, s, at, e));
            TRY(put_id(l, id, e));
            s += at + len;
        } else {
            TRY(put_text(l, s, n, e));
            s += n;
        }
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

static err_code put_content(layout *l, const chat_row *r, const char *s, bool assistant, bool front,
                            err *e)
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
    return put_text(l, s, n, e);
}

typedef struct {
    layout *l;
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
        TRY(put_text(k->l, s, strlen(s), e)); /* only the turn's ends are trimmed */
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

static err_code lay_out(const chat *c, layout *l, const chat_message *m, int64_t n,
                        const char *meta, bool head, err *e)
{
    const chat_row *r = c->row;
    talk k = {.l = l, .r = r};
    int role;
    int64_t from = 0;
    const char *system = NULL, *prefix = NULL;
    l->t = c->t;
    if (n < 1) return err_set(e, E_INPUT, "a conversation needs at least one message");
    TRY(role_of(&role, &m[0], 0, e));
    if (role == ROLE_IS_SYSTEM) {
        system = m[from++].content;
    } else if (meta) {
        system = meta;
        prefix = r->meta_prefix;
    } else {
        system = r->default_system;
    }
    if (r->bos == BOS_TOKENIZER && tokenizer_add_bos(c->t)) TRY(put_id(l, tokenizer_bos(c->t), e));
    TRY(put_piece(l, r->begin, e));
    if (system && (r->flags & CHAT_SYSTEM_IN_USER))
        k.system = system;
    else if (system)
        TRY(put_system(&k, system, prefix, e));
    return put_turns(&k, m, from, n, head, e);
}

static err_code encode_layout(const layout *l, int64_t from, bool begins, token_list *out, err *e)
{
    token_seg *s;
    TRY(mem_alloc((void **)&s, (size_t)(l->n - from), sizeof *s, "chat", e));
    for (int64_t i = from; i < l->n; i++)
        s[i - from] = (token_seg){l->seg[i].id < 0 ? l->text.p + l->seg[i].at : "", l->seg[i].n,
                                  l->seg[i].id};
    const err_code rc = tokenizer_encode_segs(l->t, s, l->n - from, begins, out, e);
    mem_free(s);
    return rc;
}

err_code chat_encode(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, token_list *out, err *e)
{
    layout l = {0};
    err_code rc = lay_out(c, &l, messages, n, meta_instruction, add_generation, e);
    if (rc == OK) rc = encode_layout(&l, 0, true, out, e);
    layout_free(&l);
    return rc;
}

/* Which of the laid-out segments the answer's last token stands for: all up to it are there
 * already. */
static int64_t closed_by(const layout *l, int64_t eoa_end, int32_t last)
{
    for (int64_t i = 0; i < eoa_end && last >= 0; i++)
        if (l->seg[i].id >= 0) return l->seg[i].id == last ? i + 1 : 0;
    return 0;
}

static bool is_stop(const chat *c, int32_t id)
{
    int32_t stops[64];
    const int n = chat_stop_ids(c, NULL, 0, stops, 64);
    for (int i = 0; i < n; i++)
        if (stops[i] == id) return true;
    return tokenizer_is_special(c->t, id);
}

err_code chat_encode_next(const chat *c, const chat_message *messages, int64_t n, int32_t last,
                          token_list *out, int *drop, err *e)
{
    layout l = {.t = c->t};
    /* users counts from 1 on here: nothing of the first turn is put again */
    talk k = {.l = &l, .r = c->row, .system_shown = true, .users = 1};
    int64_t eoa_end = 0, from = 0;
    *drop = 0;
    err_code rc = put_piece(&l, c->row->eoa, e);
    if (rc == OK) {
        eoa_end = l.n;
        from = closed_by(&l, eoa_end, last);
        if (!from && last >= 0 && is_stop(c, last)) *drop = 1;
        rc = put_piece(&l, c->row->separator, e);
    }
    if (rc == OK) rc = put_turns(&k, messages, 0, n, true, e);
    if (rc == OK) rc = encode_layout(&l, from, false, out, e);
    layout_free(&l);
    return rc;
}

err_code chat_render(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, char **out, err *e)
{
    layout l = {0};
    tok_buf b = {0};
    *out = NULL;
    err_code rc = lay_out(c, &l, messages, n, meta_instruction, add_generation, e);
    if (rc == OK) rc = tok_buf_reserve(&b, 1, e);
    for (int64_t i = 0; i < l.n && rc == OK; i++) {
        size_t len = l.seg[i].n;
        const char *s = l.seg[i].id < 0 ? l.text.p + l.seg[i].at
                                        : tokenizer_string(c->t, l.seg[i].id, &len);
        rc = tok_buf_add(&b, s, len, e);
    }
    if (rc == OK) {
        *out = b.p;
        b.p = NULL;
    }
    tok_buf_free(&b);
    layout_free(&l);
    return rc;
}

static int add_stop(int32_t *out, int n, int cap, int32_t id)
{
    if (id < 0) return n;
    for (int i = 0; i < n; i++)
        if (out[i] == id) return n;
    if (n < cap) out[n++] = id;
    return n;
}

int chat_stop_ids(const chat *c, const int32_t *model_stop, int n_model_stop, int32_t *out, int cap)
{
    int n = 0;
    for (int i = 0; i < n_model_stop; i++) n = add_stop(out, n, cap, model_stop[i]);
    n = add_stop(out, n, cap, tokenizer_eos(c->t));
    for (int i = 0; i < 4 && c->row->stop[i]; i++) {
        const char *word = c->row->stop[i];
        token_list ids = {0};
        err e;
        if (!strcmp(word, CHAT_EOS))
            n = add_stop(out, n, cap, tokenizer_eos(c->t));
        else if (tokenizer_encode(c->t, word, strlen(word), true, &ids, &e) == OK && ids.n == 1)
            n = add_stop(out, n, cap, ids.ids[0]);
        token_list_free(&ids);
    }
    return n;
}
