/* Chat templates as handles: which one, and a conversation laid out as text and tokens, encoded. */
#include "formats/chat.h"

#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/json.h"
#include "base/mem.h"
#include "formats/chat_internal.h"

#define CHAT_FILE_MAX ((size_t)1 << 20)

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

static bool ends_in(const char *name, const char *end)
{
    const size_t n = strlen(name), k = strlen(end);
    return n > k && strcmp(name + n - k, end) == 0;
}

static bool is_path(const char *name) { return ends_in(name, ".json") || ends_in(name, ".jinja"); }

static err_code read_template(chat *c, const char *path, err *e)
{
    size_t n;
    TRY(file_read(&c->text, &n, path, CHAT_FILE_MAX, e));
    const err_code rc = jinja_open(&c->tmpl, c->text, n, e);
    return rc == OK ? OK : err_wrap(e, "%s", path_base(path));
}

static err_code pick_row(chat *c, const char *name, err *e)
{
    c->row = chat_row_find(name ? name : "base");
    return c->row ? OK : err_set(e, E_USAGE, "unknown chat template '%.60s'", name);
}

/* The directory's own: read, and for the texts known a row, too. What cannot be read is taken for
 * what its marks look like. */
static err_code pick_own(chat *c, const char *text, const char *family_default, const job *j,
                         err *e)
{
    bool exact;
    err why;
    c->row = chat_row_of_text(text, &exact);
    if (jinja_open(&c->tmpl, text, strlen(text), &why) == OK) {
        if (!exact) c->row = NULL;
        return OK;
    }
    if (c->row) {
        job_log(j, LOG_WARN, "the model's chat_template is read as '%s': %s", c->row->names,
                why.msg);
        return OK;
    }
    job_log(j, LOG_WARN, "the model's chat_template cannot be read, '%s' is used: %s",
            family_default ? family_default : "base", why.msg);
    return pick_row(c, family_default, e);
}

static err_code pick(chat *c, const char *name, const char *family_default, const job *j, err *e)
{
    const char *text = tokenizer_chat_template(c->t);
    if (name && ends_in(name, ".json")) return read_row(c, name, e);
    if (name && ends_in(name, ".jinja")) return read_template(c, name, e);
    if (name) return pick_row(c, name, e);
    return text ? pick_own(c, text, family_default, j, e) : pick_row(c, family_default, e);
}

static void name_it(chat *c, const char *path)
{
    if (c->json || c->text) {
        const char *name = c->json ? c->row->names : path_base(path);
        snprintf(c->name, sizeof c->name, "%s", name);
    } else {
        const char *names = c->row ? c->row->names : "jinja";
        snprintf(c->name, sizeof c->name, "%.*s", (int)strcspn(names, "|"), names);
    }
}

err_code chat_open(chat **out, const tokenizer *t, const char *name, const char *family_default,
                   const job *j, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "chat", e));
    (*out)->t = t;
    (*out)->end_id = -1;
    const err_code rc = pick(*out, name, family_default, j, e);
    if (rc != OK) {
        chat_close(out);
        return rc;
    }
    name_it(*out, name);
    (*out)->format = CHAT_TOOLS_HERMES;
    if ((*out)->tmpl) chat_jinja_learn(*out);
    return OK;
}

void chat_close(chat **c)
{
    if (!*c) return;
    cJSON_Delete((*c)->json);
    jinja_close(&(*c)->tmpl);
    mem_free((*c)->text);
    mem_free(*c);
    *c = NULL;
}

const char *chat_name(const chat *c) { return c->name; }

bool chat_known(const char *name) { return chat_row_find(name) != NULL || is_path(name); }

chat_tools chat_tool_format(const chat *c) { return c->format; }

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

/* ---- encoding ---- */

static err_code encode_layout(const chat_layout *l, int64_t from, bool begins, token_list *out,
                              err *e)
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

static bool usual_role(const char *role)
{
    return role && (!strcmp(role, "system") || !strcmp(role, "user") || !strcmp(role, "assistant"));
}

/* Whether the row says all that the template would. */
static bool row_serves(const chat *c, const chat_request *r)
{
    if (!c->row) return false;
    if (!c->tmpl) return true;
    if ((r->tools && r->tools->child) || (r->kwargs && r->kwargs->child)) return false;
    if (r->now && c->dated) return false;
    for (int64_t i = 0; i < r->n; i++) {
        const chat_message *m = &r->messages[i];
        if (!usual_role(m->role) || m->tool_calls || m->reasoning || !m->content) return false;
    }
    return true;
}

static err_code lay_out_plain(const chat *c, chat_layout *l, const chat_request *r, err *e)
{
    return row_serves(c, r) ? chat_row_lay_out(c, l, r, e) : chat_jinja_lay_out(c, l, r, e);
}

/* Templates that take no system message get the tools in the first user's. */
static err_code lay_out_tools(const chat *c, chat_layout *l, const chat_request *r, err *e)
{
    chat_plain p;
    err_code rc = E_INPUT;
    for (int in_user = 0; in_user < 2 && rc == E_INPUT; in_user++) {
        chat_layout_free(l);
        *l = (chat_layout){.t = c->t};
        rc = chat_plain_make(&p, r, in_user, e);
        if (rc == OK) rc = lay_out_plain(c, l, &p.r, e);
        chat_plain_free(&p);
    }
    return rc;
}

static err_code check_request(const chat_request *r, err *e)
{
    const cJSON *o;
    if (r->n < 1) return err_set(e, E_INPUT, "a conversation needs at least one message");
    cJSON_ArrayForEach(o, r->kwargs)
    {
        bool known = false;
        for (int i = 0; chat_kwarg_at(i) && !known; i++)
            known = !strcmp(chat_kwarg_at(i), o->string);
        if (!known)
            return err_set(e, E_INPUT, "chat_template_kwargs: '%.60s' is not one of the keys taken",
                           o->string);
    }
    for (int64_t i = 0; i < r->n; i++) {
        const chat_message *m = &r->messages[i];
        if (!m->role || !*m->role) return err_set(e, E_INPUT, "message %d: no role", (int)i + 1);
        if (!m->content && !m->tool_calls)
            return err_set(e, E_INPUT, "message %d: no content", (int)i + 1);
    }
    return OK;
}

static err_code lay_out(const chat *c, chat_layout *l, const chat_request *r, err *e)
{
    l->t = c->t;
    TRY(check_request(r, e));
    return chat_needs_plain(c, r) ? lay_out_tools(c, l, r, e) : lay_out_plain(c, l, r, e);
}

err_code chat_encode_request(const chat *c, const chat_request *r, token_list *out, err *e)
{
    chat_layout l = {0};
    err_code rc = lay_out(c, &l, r, e);
    if (rc == OK) rc = encode_layout(&l, 0, true, out, e);
    chat_layout_free(&l);
    return rc;
}

err_code chat_encode(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, token_list *out, err *e)
{
    return chat_encode_request(c,
                               &(chat_request){.messages = messages,
                                               .n = n,
                                               .meta_instruction = meta_instruction,
                                               .add_generation = add_generation},
                               out, e);
}

/* Which of the laid-out segments the answer's last token stands for: all up to it are there
 * already. */
static int64_t closed_by(const chat_layout *l, int64_t eoa_end, int32_t last)
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

static err_code lay_out_next(const chat *c, chat_layout *l, const chat_message *m, int64_t n,
                             int64_t *eoa_end, err *e)
{
    chat_plain p;
    const chat_request r = {.messages = m, .n = n, .add_generation = true};
    if (n < 1) return err_set(e, E_INPUT, "a conversation needs at least one message");
    if (!chat_needs_plain(c, &r)) {
        if (row_serves(c, &r)) return chat_row_next(c, l, m, n, eoa_end, e);
        const err_code rc = chat_jinja_next(c, l, m, n, e);
        *eoa_end = l->n;
        return rc;
    }
    err_code rc = chat_plain_make(&p, &r, true, e);
    if (rc == OK) rc = lay_out_next(c, l, p.m, p.r.n, eoa_end, e);
    chat_plain_free(&p);
    return rc;
}

err_code chat_encode_next(const chat *c, const chat_message *messages, int64_t n, int32_t last,
                          token_list *out, int *drop, err *e)
{
    chat_layout l = {.t = c->t};
    int64_t eoa_end = 0;
    *drop = 0;
    err_code rc = lay_out_next(c, &l, messages, n, &eoa_end, e);
    const int64_t from = rc == OK ? closed_by(&l, eoa_end, last) : 0;
    if (rc == OK && !from && last >= 0 && is_stop(c, last)) *drop = 1;
    if (rc == OK) rc = encode_layout(&l, from, false, out, e);
    chat_layout_free(&l);
    return rc;
}

err_code chat_render_request(const chat *c, const chat_request *r, char **out, err *e)
{
    chat_layout l = {0};
    tok_buf b = {0};
    *out = NULL;
    err_code rc = lay_out(c, &l, r, e);
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
    chat_layout_free(&l);
    return rc;
}

err_code chat_render(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, char **out, err *e)
{
    return chat_render_request(c,
                               &(chat_request){.messages = messages,
                                               .n = n,
                                               .meta_instruction = meta_instruction,
                                               .add_generation = add_generation},
                               out, e);
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
    n = add_stop(out, n, cap, c->end_id);
    if (c->format == CHAT_TOOLS_LLAMA3) /* behind a call */
        n = add_stop(out, n, cap, tokenizer_id(c->t, "<|eom_id|>"));
    for (int i = 0; i < 4 && c->row && c->row->stop[i]; i++) {
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
