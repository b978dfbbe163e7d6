/* Opening: which files there are, and what the small ones around the vocabulary say. */
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/tokenizer_internal.h"

#define CONFIG_MAX   ((size_t)64 << 20)
#define TEMPLATE_MAX ((size_t)1 << 20)

static bool dir_has(const char *dir, const char *name, char *path, size_t cap)
{
    err e;
    return dir && path_join(path, cap, dir, name, &e) == OK && file_exists(path) &&
           !file_is_dir(path);
}

/* ---- added tokens ---- */

err_code tok_add_token(tokenizer *t, const char *s, size_t n, added_token a, err *e)
{
    const int32_t there = vocab_find(&t->v, s, n);
    if (there >= 0 && there != a.id)
        return err_set(e, E_INPUT, "added token '%.40s': id %d, but the vocabulary has it as %d", s,
                       a.id, there);
    uint8_t flags = a.special ? PIECE_SPECIAL : 0;
    if (there < 0) flags |= PIECE_ADDED;
    TRY(vocab_add(&t->v, a.id, s, n, NULL, 0, flags, e));
    return added_put(&t->added, s, n, a, e);
}

/* Tokens that are found in any text, hold white space or take it from their neighbours. */
static bool crosses_cuts(const added_token *a, const char *s)
{
    return !a->special &&
           (a->lstrip || a->rstrip || memchr(s, ' ', a->len) || memchr(s, '\n', a->len));
}

err_code tok_finish(tokenizer *t, err *e)
{
    added_set *a = &t->added;
    added_trie raw = {0}, norm = {0};
    err_code rc = OK;
    for (int32_t i = 0; i < a->n && rc == OK; i++) {
        const char *s = a->blob.p + a->tok[i].at;
        a->no_cuts |= crosses_cuts(&a->tok[i], s);
        if (!a->tok[i].normalized || !t->ops->normalize) {
            rc = trie_put(&raw, s, a->tok[i].len, i, e);
            continue;
        }
        tok_buf b = {0};
        rc = t->ops->normalize(t->self, s, a->tok[i].len, FRAG_FIRST, &b, e);
        if (rc == OK && b.n) rc = trie_put(&norm, b.p, b.n, i, e);
        tok_buf_free(&b);
    }
    trie_free(&a->raw);
    trie_free(&a->norm);
    a->raw = raw;
    a->norm = norm;
    return rc;
}

/* ---- tokenizer_config.json and its neighbours ---- */

static const char *const token_keys[] = {"bos_token", "eos_token", "unk_token", "pad_token",
                                         "sep_token", "cls_token", "mask_token"};

const char *tok_config_token(const cJSON *config, const char *key)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(config, key);
    if (cJSON_IsObject(v)) v = cJSON_GetObjectItemCaseSensitive(v, "content");
    return cJSON_IsString(v) && *v->valuestring ? v->valuestring : NULL;
}

err_code tok_config_load(cJSON **config, const char *dir, err *e)
{
    char path[4096];
    *config = NULL;
    return dir_has(dir, "tokenizer_config.json", path, sizeof path)
               ? json_load(config, path, CONFIG_MAX, e)
               : OK;
}

/* {"content":, "lstrip":, ...} under its id as key. Tokens that a tokenizer.json defines keep
 * its flags. */
static err_code add_decoder_entry(tokenizer *t, const cJSON *c, err *e)
{
    const char *content;
    added_token a = {0};
    char *end;
    const long id = strtol(c->string, &end, 10);
    if (*end || id < 0 || id >= TOK_MAX_VOCAB)
        return err_set(e, E_INPUT,
                       "added_tokens_decoder: expected an id in [0,%d) as key, got '%.20s'",
                       TOK_MAX_VOCAB, c->string);
    a.id = (int32_t)id;
    TRY(json_get_str(c, "content", &content, e));
    TRY(json_opt_bool(c, "special", false, &a.special, e));
    TRY(json_opt_bool(c, "lstrip", false, &a.lstrip, e));
    TRY(json_opt_bool(c, "rstrip", false, &a.rstrip, e));
    TRY(json_opt_bool(c, "single_word", false, &a.single_word, e));
    TRY(json_opt_bool(c, "normalized", !a.special, &a.normalized, e));
    if (!*content || (t->ops->normalize && added_find(&t->added, content, strlen(content))))
        return OK;
    return tok_add_token(t, content, strlen(content), a, e);
}

static err_code add_json_tokens(tokenizer *t, const char *dir, err *e)
{
    char path[4096];
    cJSON *o = NULL;
    const cJSON *c;
    if (!dir_has(dir, "added_tokens.json", path, sizeof path)) return OK;
    TRY(json_load(&o, path, CONFIG_MAX, e));
    err_code rc = OK;
    cJSON_ArrayForEach(c, o)
    {
        added_token a = {0};
        if (!c->string || !*c->string) continue;
        if ((rc = json_get_i32(o, c->string, 0, TOK_MAX_VOCAB - 1, &a.id, e)) != OK) break;
        if (added_find(&t->added, c->string, strlen(c->string))) continue;
        if ((rc = tok_add_token(t, c->string, strlen(c->string), a, e)) != OK) break;
    }
    cJSON_Delete(o);
    return rc == OK ? OK : err_wrap(e, "%s", path);
}

/* A token that plays a role is special, if the vocabulary has it. */
static err_code mark_special(tokenizer *t, const char *s, err *e)
{
    const size_t n = strlen(s);
    const int32_t id = vocab_find(&t->v, s, n);
    if (id < 0 || n > TOK_MAX_ADDED_BYTES) return OK;
    const added_token *known = added_find(&t->added, s, n);
    added_token a = known ? *known : (added_token){.id = id};
    a.special = true;
    return tok_add_token(t, s, n, a, e);
}

static err_code mark_roles(tokenizer *t, const cJSON *o, err *e)
{
    const cJSON *c;
    for (size_t i = 0; i < sizeof token_keys / sizeof *token_keys; i++) {
        const char *s = tok_config_token(o, token_keys[i]);
        if (s) TRY(mark_special(t, s, e));
    }
    cJSON_ArrayForEach(c, cJSON_GetObjectItemCaseSensitive(o, "additional_special_tokens"))
    {
        const cJSON *v = cJSON_IsObject(c) ? cJSON_GetObjectItemCaseSensitive(c, "content") : c;
        if (cJSON_IsString(v) && *v->valuestring) TRY(mark_special(t, v->valuestring, e));
    }
    return OK;
}

static void set_role(const tokenizer *t, const cJSON *o, const char *key, int32_t *id)
{
    const char *s = tok_config_token(o, key);
    if (s)
        *id = vocab_find(&t->v, s, strlen(s));
    else if (cJSON_IsNull(cJSON_GetObjectItemCaseSensitive(o, key)) && cJSON_HasObjectItem(o, key))
        *id = -1;
}

/* Classes whose fast form builds its own post processor: BOS in front unless the config says
 * otherwise. */
static bool class_adds_bos(const cJSON *config)
{
    static const char *const names[] = {"Llama", "CodeLlama", "Gemma", "InternLM", "Mistral"};
    const cJSON *c = cJSON_GetObjectItemCaseSensitive(config, "tokenizer_class");
    for (size_t i = 0; cJSON_IsString(c) && i < sizeof names / sizeof *names; i++)
        if (!strncmp(c->valuestring, names[i], strlen(names[i]))) return true;
    return false;
}

static void apply_bos(tokenizer *t, const cJSON *config)
{
    const cJSON *add = cJSON_GetObjectItemCaseSensitive(config, "add_bos_token");
    if (cJSON_IsBool(add))
        t->add_bos = cJSON_IsTrue(add);
    else if (class_adds_bos(config))
        t->add_bos = true;
    if (t->bos < 0) t->add_bos = false;
}

/* ---- chat template ---- */

static err_code template_from_file(tokenizer *t, const char *path, err *e)
{
    size_t n;
    TRY(file_read(&t->chat_template, &n, path, TEMPLATE_MAX, e));
    if (json_utf8_valid(t->chat_template, n) && strlen(t->chat_template) == n) return OK;
    return err_set(e, E_INPUT, "%s: expected UTF-8 text", path);
}

/* A string, or a list of {"name":, "template":} of which the one named default counts. */
static err_code template_from_json(tokenizer *t, const cJSON *o, err *e)
{
    const cJSON *v = cJSON_GetObjectItemCaseSensitive(o, "chat_template"), *c, *found = NULL;
    if (cJSON_IsString(v)) found = v;
    if (cJSON_IsArray(v)) {
        cJSON_ArrayForEach(c, v)
        {
            const cJSON *name = cJSON_GetObjectItemCaseSensitive(c, "name");
            if (cJSON_IsString(name) && !strcmp(name->valuestring, "default"))
                found = cJSON_GetObjectItemCaseSensitive(c, "template");
        }
    }
    return cJSON_IsString(found) && !t->chat_template
               ? mem_strdup(&t->chat_template, found->valuestring, e)
               : OK;
}

static err_code load_template(tokenizer *t, const char *dir, const cJSON *config, err *e)
{
    char path[4096];
    cJSON *o = NULL;
    if (dir_has(dir, "chat_template.jinja", path, sizeof path))
        return template_from_file(t, path, e);
    if (dir_has(dir, "chat_template.json", path, sizeof path)) {
        TRY(json_load(&o, path, TEMPLATE_MAX, e));
        const err_code rc = template_from_json(t, o, e);
        cJSON_Delete(o);
        TRY(rc);
    }
    return template_from_json(t, config, e);
}

static err_code apply_special_map(tokenizer *t, const char *dir, err *e)
{
    char path[4096];
    cJSON *o = NULL;
    if (!dir_has(dir, "special_tokens_map.json", path, sizeof path)) return OK;
    TRY(json_load(&o, path, CONFIG_MAX, e));
    const err_code rc = mark_roles(t, o, e);
    set_role(t, o, "bos_token", &t->bos);
    set_role(t, o, "eos_token", &t->eos);
    cJSON_Delete(o);
    return rc;
}

err_code tok_config_apply(tokenizer *t, const char *dir, const cJSON *config, err *e)
{
    const cJSON *c;
    err_code rc = OK;
    cJSON_ArrayForEach(
        c, cJSON_GetObjectItemCaseSensitive(config, "added_tokens_decoder")) if (rc == OK)
        rc = add_decoder_entry(t, c, e);
    if (rc != OK) return err_wrap(e, "%s/tokenizer_config.json", dir);
    TRY(add_json_tokens(t, dir, e));
    TRY(apply_special_map(t, dir, e));
    if (config) {
        TRY(mark_roles(t, config, e));
        set_role(t, config, "bos_token", &t->bos);
        set_role(t, config, "eos_token", &t->eos);
    }
    apply_bos(t, config);
    return load_template(t, dir, config, e);
}

/* ---- opening ---- */

static bool ends_with(const char *s, const char *tail)
{
    const size_t n = strlen(s), k = strlen(tail);
    return n >= k && memcmp(s + n - k, tail, k) == 0;
}

/* A line of base64, a space and digits: a rank file. */
static bool is_tiktoken(const char *data, size_t n)
{
    static const char b64[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=";
    size_t i = 0;
    while (i < n && i < 4096 && data[i] && strchr(b64, data[i])) i++;
    return i >= 4 && i + 1 < n && data[i] == ' ' && data[i + 1] >= '0' && data[i + 1] <= '9';
}

static err_code open_bytes(tokenizer *t, const char *name, const char *data, size_t n,
                           const cJSON *config, err *e)
{
    if (ends_with(name, ".json")) return tok_open_json(t, name, data, n, e);
    if (is_tiktoken(data, n)) return tok_open_tiktoken(t, name, data, n, e);
    return tok_open_spm(t, name, data, n, config, e);
}

static err_code open_mapped(tokenizer *t, const char *path, const cJSON *config, err *e)
{
    file_map m;
    TRY(file_map_open(&m, path, e));
    err_code rc = m.size > TOK_MAX_JSON
                      ? err_set(e, E_LIMIT, "%s: expected at most %zu bytes, got %zu", path,
                                TOK_MAX_JSON, m.size)
                      : open_bytes(t, path, m.data ? (const char *)m.data : "", m.size, config, e);
    file_map_close(&m);
    return rc;
}

static err_code tokenizer_new(tokenizer **out, err *e)
{
    *out = NULL;
    TRY(mem_alloc((void **)out, 1, sizeof **out, "tokenizer", e));
    (*out)->bos = (*out)->eos = (*out)->unk = (*out)->lead_piece = -1;
    return OK;
}

void tokenizer_close(tokenizer **t)
{
    if (!*t) return;
    if ((*t)->self) (*t)->ops->close((*t)->self);
    vocab_free(&(*t)->v);
    added_free(&(*t)->added);
    mem_free((*t)->chat_template);
    mem_free((*t)->unk_text);
    mem_free(*t);
    *t = NULL;
}

err_code tokenizer_open_memory(tokenizer **out, const char *name, const void *data, size_t n,
                               err *e)
{
    tokenizer *t;
    TRY(tokenizer_new(&t, e));
    err_code rc = open_bytes(t, name, data, n, NULL, e);
    if (rc == OK) rc = tok_finish(t, e);
    if (rc != OK) tokenizer_close(&t);
    *out = t;
    return rc;
}

/* The folder of a path, "." when it names none. */
static err_code dir_of(char *buf, size_t cap, const char *path, err *e)
{
    const size_t n = (size_t)(path_base(path) - path);
    if (n >= cap) return err_set(e, E_LIMIT, "path is too long: '%.60s...'", path);
    memcpy(buf, n ? path : ".", n ? n : 1);
    buf[n ? n : 1] = '\0';
    return OK;
}

static err_code open_in_dir(tokenizer **out, const char *path, const char *dir, err *e)
{
    char merges[4096];
    cJSON *config = NULL;
    tokenizer *t = NULL;
    err_code rc;
    if ((rc = tokenizer_new(&t, e)) != OK) goto done;
    if ((rc = tok_config_load(&config, dir, e)) != OK) goto done;
    if (strcmp(path_base(path), "vocab.json") == 0) {
        if ((rc = path_join(merges, sizeof merges, dir, "merges.txt", e)) != OK) goto done;
        rc = tok_open_vocab_merges(t, path, merges, config, e);
    } else {
        rc = open_mapped(t, path, config, e);
    }
    if (rc != OK) goto done;
    if ((rc = tok_config_apply(t, dir, config, e)) != OK) goto done;
    if ((rc = tok_finish(t, e)) != OK) goto done;
    *out = t;
    t = NULL;
done:
    tokenizer_close(&t);
    cJSON_Delete(config);
    return rc;
}

err_code tokenizer_open_file(tokenizer **out, const char *path, err *e)
{
    char dir[4096];
    *out = NULL;
    TRY(dir_of(dir, sizeof dir, path, e));
    return open_in_dir(out, path, dir, e);
}

static err_code find_tiktoken(char *path, size_t cap, const char *dir, bool *found, err *e)
{
    dir_list l;
    *found = false;
    TRY(dir_list_open(&l, dir, e));
    err_code rc = OK;
    for (size_t i = 0; i < l.n && !*found && rc == OK; i++) {
        if (!ends_with(l.names[i], ".tiktoken")) continue;
        rc = path_join(path, cap, dir, l.names[i], e);
        *found = rc == OK;
    }
    dir_list_free(&l);
    return rc;
}

err_code tokenizer_open(tokenizer **out, const char *dir, err *e)
{
    char path[4096], model[4096];
    bool found;
    *out = NULL;
    const bool has_model = dir_has(dir, "tokenizer.model", model, sizeof model);
    if (dir_has(dir, "tokenizer.json", path, sizeof path)) {
        const err_code rc = open_in_dir(out, path, dir, e);
        if (rc != E_UNSUPPORTED || !has_model)
            return rc; /* not BPE: the model file says the same */
    }
    if (has_model) return open_in_dir(out, model, dir, e);
    if (dir_has(dir, "vocab.json", path, sizeof path)) return open_in_dir(out, path, dir, e);
    TRY(find_tiktoken(path, sizeof path, dir, &found, e));
    if (found) return open_in_dir(out, path, dir, e);
    return err_set(
        e, E_INPUT,
        "%s: no tokenizer (looked for tokenizer.json, tokenizer.model, vocab.json, *.tiktoken)",
        dir);
}
