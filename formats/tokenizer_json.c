/* tokenizer.json with a BPE model, vocab.json with merges.txt, and tiktoken rank files: three
 * ways to write down the same thing, one model struct. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <openssl/evp.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/tokenizer_internal.h"

typedef struct {
    const tokenizer *t;
    tok_normal *normal;
    tok_split *split;
    bpe_merges merges;
    cut_rules cuts;
    bool bytes; /* words are raw bytes (byte-level vocabulary) */
    bool ranks; /* tiktoken: any two neighbours merge whose joint bytes are a token, by its id */
    bool whole_words; /* a word that is a token is that token ("ignore_merges") */
    bool fuse_unk, byte_fallback;
    int32_t unk;          /* -1: unknown characters vanish */
    int32_t byte_id[256]; /* bytes: of each byte's character; byte_fallback: of <0xXX>; -1 none */
} bpe_model;

/* ---- the byte-level alphabet ---- */

static bool byte_is_itself(int b)
{
    return (b >= '!' && b <= '~') || (b >= 0xa1 && b <= 0xac) || (b >= 0xae && b <= 0xff);
}

uint32_t bytelevel_code(uint8_t byte)
{
    if (byte_is_itself(byte)) return byte;
    uint32_t k = 0; /* the others follow from U+0100 in order */
    for (int b = 0; b < byte; b++) k += !byte_is_itself(b);
    return 0x100 + k;
}

int bytelevel_byte(uint32_t code)
{
    if (code < 0x100) return byte_is_itself((int)code) ? (int)code : -1;
    uint32_t k = code - 0x100;
    for (int b = 0; b < 256; b++)
        if (!byte_is_itself(b) && k-- == 0) return b;
    return -1;
}

size_t bytelevel_text(char *out, const char *raw, size_t n)
{
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        const size_t len = utf8_len(raw + i, n - i);
        const int b = len ? bytelevel_byte(utf8_code(raw + i, len)) : -1;
        if (b < 0) {
            memcpy(out, raw, n);
            return n;
        }
        out[k++] = (char)b;
        i += len;
    }
    return k;
}

/* ---- encoding ---- */

typedef struct {
    const bpe_model *m;
    bpe_work work;
    tok_buf word; /* the word in the alphabet of the vocabulary */
    token_list *out;
    const char *text;
} bpe_run_state;

/* A token of the model itself, not one that was added to it. */
static int32_t model_find(const bpe_model *m, const char *s, size_t n)
{
    const int32_t id = vocab_find(&m->t->v, s, n);
    return id >= 0 && !(m->t->v.piece[id].flags & PIECE_ADDED) ? id : -1;
}

static bool pair_of_ranks(const void *ctx, const bpe_symbol *a, const bpe_symbol *b, int32_t *rank,
                          int32_t *id)
{
    const bpe_run_state *r = ctx;
    *id = *rank = model_find(r->m, r->text + a->at, a->len + b->len);
    return *id >= 0;
}

static err_code push_unknown(bpe_run_state *r, int32_t *unk_at, size_t *unk_len, size_t at,
                             size_t len, err *e)
{
    if (r->m->unk < 0) return OK;
    if (*unk_at >= 0 && r->m->fuse_unk) {
        *unk_len += len;
        return OK;
    }
    if (*unk_at >= 0) TRY(bpe_push(&r->work, r->m->unk, (size_t)*unk_at, *unk_len, e));
    *unk_at = (int32_t)at;
    *unk_len = len;
    return OK;
}

static err_code push_fallback(bpe_run_state *r, const char *s, size_t at, size_t len, bool *done,
                              err *e)
{
    *done = false;
    if (!r->m->byte_fallback) return OK;
    for (size_t i = 0; i < len; i++)
        if (r->m->byte_id[(uint8_t)s[at + i]] < 0) return OK;
    for (size_t i = 0; i < len; i++)
        TRY(bpe_push(&r->work, r->m->byte_id[(uint8_t)s[at + i]], at + i, 1, e));
    *done = true;
    return OK;
}

/* Characters of the word, unknown ones gathered. A gathered one is put behind byte fallbacks
 * that follow it: so does the tokenizers library. */
static err_code push_word(bpe_run_state *r, const char *s, size_t n, err *e)
{
    int32_t unk_at = -1;
    size_t unk_len = 0;
    for (size_t i = 0; i < n;) {
        const size_t len = r->m->bytes ? 1 : utf8_len(s + i, n - i);
        if (len == 0) return err_set(e, E_INPUT, "text: invalid UTF-8");
        const int32_t id = r->m->bytes ? r->m->byte_id[(uint8_t)s[i]]
                                       : model_find(r->m, s + i, len);
        if (id >= 0) {
            if (unk_at >= 0) TRY(bpe_push(&r->work, r->m->unk, (size_t)unk_at, unk_len, e));
            unk_at = -1;
            TRY(bpe_push(&r->work, id, i, len, e));
        } else {
            bool done;
            TRY(push_fallback(r, s, i, len, &done, e));
            if (!done) TRY(push_unknown(r, &unk_at, &unk_len, i, len, e));
        }
        i += len;
    }
    return unk_at >= 0 ? bpe_push(&r->work, r->m->unk, (size_t)unk_at, unk_len, e) : OK;
}

static err_code whole_word(bpe_run_state *r, const char *s, size_t n, int32_t *id, err *e)
{
    *id = -1;
    if (!r->m->whole_words || n > TOK_MAX_PIECE) return OK;
    if (!r->m->bytes || r->m->ranks) {
        *id = model_find(r->m, s, n);
        return OK;
    }
    r->word.n = 0;
    TRY(tok_buf_reserve(&r->word, 2 * n, e));
    for (size_t i = 0; i < n; i++)
        r->word.n += utf8_put(r->word.p + r->word.n, bytelevel_code((uint8_t)s[i]));
    *id = model_find(r->m, r->word.p, r->word.n);
    return OK;
}

static err_code encode_word(void *ctx, const char *s, size_t n, err *e)
{
    bpe_run_state *r = ctx;
    int32_t id;
    TRY(whole_word(r, s, n, &id, e));
    if (id >= 0) return token_list_push(r->out, id, e);
    r->text = s;
    r->work.n = 0;
    TRY(push_word(r, s, n, e));
    if (r->m->ranks) return bpe_run(&r->work, pair_of_ranks, r, r->out, e);
    return bpe_run(&r->work, bpe_pair_of_merges, &r->m->merges, r->out, e);
}

static err_code bpe_encode(const void *self, const char *s, size_t n, frag_kind kind,
                           token_list *out, err *e)
{
    const bpe_model *m = self;
    bpe_run_state r = {.m = m, .out = out};
    const err_code rc = tok_split_run(m->split, s, n, kind, encode_word, &r, e);
    bpe_work_free(&r.work);
    tok_buf_free(&r.word);
    return rc;
}

static err_code bpe_normalize(const void *self, const char *s, size_t n, frag_kind kind,
                              tok_buf *out, err *e)
{
    return tok_normal_run(((const bpe_model *)self)->normal, s, n, kind, out, e);
}

static bool bpe_can_cut(const void *self, const char *s, size_t n, size_t at, bool raw)
{
    const bpe_model *m = self;
    if (raw && !tok_normal_can_cut(m->normal)) return false;
    return tok_split_can_cut(m->split, s, n, at) && (m->bytes || cut_rules_ok(&m->cuts, s, n, at));
}

static void bpe_close(void *self)
{
    bpe_model *m = self;
    tok_normal_close(&m->normal);
    tok_split_close(&m->split);
    bpe_merges_free(&m->merges);
    mem_free(m);
}

static const tok_ops bpe_ops = {bpe_close, bpe_normalize, bpe_encode, bpe_can_cut};

static err_code model_new(bpe_model **out, tokenizer *t, err *e)
{
    bpe_model *m;
    TRY(mem_alloc((void **)&m, 1, sizeof *m, "tokenizer", e));
    m->t = t;
    m->unk = -1;
    memset(m->byte_id, 0xff, sizeof m->byte_id);
    t->self = m;
    t->ops = &bpe_ops;
    *out = m;
    return OK;
}

/* ---- reading: shared ---- */

/* The text of a piece by how the file decodes: byte-level characters, or "▁" and <0xXX>. */
typedef struct {
    bool bytes, mark, fallback;
} piece_form;

static size_t piece_text(char *out, const char *s, size_t n, const piece_form *f, uint8_t *flags)
{
    unsigned b;
    if (f->bytes) return bytelevel_text(out, s, n);
    if (f->fallback && n == 6 && sscanf(s, "<0x%2X>", &b) == 1 && s[5] == '>') {
        *flags |= PIECE_BYTE;
        out[0] = (char)b;
        return 1;
    }
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        if (f->mark && n - i >= 3 && memcmp(s + i, "\xe2\x96\x81", 3) == 0) {
            out[k++] = ' ';
            i += 3;
        } else {
            out[k++] = s[i++];
        }
    }
    return k;
}

static err_code add_vocab(tokenizer *t, const cJSON *vocab_json, const piece_form *form, err *e)
{
    const cJSON *c;
    tok_buf text = {0};
    err_code rc = OK;
    if (!cJSON_IsObject(vocab_json))
        return err_set(e, E_INPUT, "vocab: expected an object of token to id");
    cJSON_ArrayForEach(c, vocab_json)
    {
        const size_t n = strlen(c->string);
        const double id = cJSON_IsNumber(c) ? c->valuedouble : -1;
        uint8_t flags = 0;
        if (!(id >= 0 && id < TOK_MAX_VOCAB && id == (double)(int32_t)id)) {
            rc = err_set(e, E_INPUT, "vocab: token '%.40s': expected an id in [0,%d)", c->string,
                         TOK_MAX_VOCAB);
            break;
        }
        if (t->v.n > (int32_t)id && t->v.piece[(int32_t)id].flags & PIECE_SET) {
            rc = err_set(e, E_INPUT, "vocab: id %d is given to '%.40s' and to another token",
                         (int)id, c->string);
            break;
        }
        text.n = 0;
        if ((rc = tok_buf_reserve(&text, n, e)) != OK) break;
        const size_t len = piece_text(text.p, c->string, n, form, &flags);
        if ((rc = vocab_add(&t->v, (int32_t)id, c->string, n, text.p, len, flags, e)) != OK) break;
    }
    tok_buf_free(&text);
    return rc;
}

/* Ids of a pair and of what it merges to; false when the vocabulary lacks one. */
static bool merge_ids(const vocab *v, const char *a, size_t an, const char *b, size_t bn,
                      tok_buf *joint, int32_t id[3])
{
    memcpy(joint->p, a, an);
    memcpy(joint->p + an, b, bn);
    id[0] = vocab_find(v, a, an);
    id[1] = vocab_find(v, b, bn);
    id[2] = vocab_find(v, joint->p, an + bn);
    return id[0] >= 0 && id[1] >= 0 && id[2] >= 0;
}

static err_code add_merge(bpe_model *m, const char *a, size_t an, const char *b, size_t bn,
                          int32_t rank, tok_buf *joint, err *e)
{
    int32_t id[3];
    TRY(tok_buf_reserve(joint, an + bn, e));
    if (merge_ids(&m->t->v, a, an, b, bn, joint, id))
        return bpe_merges_put(&m->merges, id[0], id[1], rank, id[2], e);
    return err_set(e, E_INPUT,
                   "merges: line %d: '%.*s' '%.*s': not in the vocabulary with what they merge to",
                   rank + 1, (int)(an < 60 ? an : 60), a, (int)(bn < 60 ? bn : 60), b);
}

/* "left right". Where tokens themselves hold spaces (files exist whose no-break spaces became
 * plain ones), the split is the first that the vocabulary knows. */
static err_code add_merge_line(bpe_model *m, const char *line, size_t n, int32_t rank,
                               tok_buf *joint, err *e)
{
    int32_t id[3];
    const char *first = NULL;
    TRY(tok_buf_reserve(joint, n, e));
    for (size_t i = 1; i + 1 < n && n <= TOK_MAX_PIECE; i++) {
        if (line[i] != ' ') continue;
        if (!first) first = line + i;
        if (merge_ids(&m->t->v, line, i, line + i + 1, n - i - 1, joint, id))
            return bpe_merges_put(&m->merges, id[0], id[1], rank, id[2], e);
    }
    if (!first)
        return err_set(e, E_INPUT, "merges: line %d: expected two tokens, got '%.*s'", rank + 1,
                       (int)(n < 60 ? n : 60), line);
    return add_merge(m, line, (size_t)(first - line), first + 1, (size_t)(line + n - first - 1),
                     rank, joint, e);
}

static err_code add_merges_json(bpe_model *m, const cJSON *list, err *e)
{
    const cJSON *c;
    tok_buf joint = {0};
    err_code rc = OK;
    int32_t rank = 0;
    if (!cJSON_IsArray(list)) return err_set(e, E_INPUT, "merges: expected an array");
    cJSON_ArrayForEach(c, list)
    {
        const cJSON *a = c->child, *b = a ? a->next : NULL;
        if (cJSON_IsString(c))
            rc = add_merge_line(m, c->valuestring, strlen(c->valuestring), rank, &joint, e);
        else if (cJSON_IsArray(c) && cJSON_IsString(a) && cJSON_IsString(b) && !b->next)
            rc = add_merge(m, a->valuestring, strlen(a->valuestring), b->valuestring,
                           strlen(b->valuestring), rank, &joint, e);
        else
            rc = err_set(e, E_INPUT, "merges: line %d: expected two tokens", rank + 1);
        if (rc != OK) break;
        rank++;
    }
    tok_buf_free(&joint);
    return rc;
}

static void find_bytes(bpe_model *m)
{
    for (int b = 0; b < 256; b++) {
        char s[8];
        size_t n;
        if (m->bytes)
            n = utf8_put(s, bytelevel_code((uint8_t)b));
        else
            n = (size_t)snprintf(s, sizeof s, "<0x%02X>", (unsigned)b);
        m->byte_id[b] = vocab_find(&m->t->v, s, n);
    }
}

/* ---- tokenizer.json ---- */

static err_code read_decoder(tokenizer *t, const cJSON *o, piece_form *f, int depth, err *e)
{
    const char *type;
    if (!o || cJSON_IsNull(o)) return OK;
    TRY(json_get_str(o, "type", &type, e));
    if (!strcmp(type, "Sequence")) {
        const cJSON *c;
        if (depth > 2) return err_set(e, E_LIMIT, "decoder: nested too deep");
        cJSON_ArrayForEach(c, cJSON_GetObjectItemCaseSensitive(o, "decoders"))
            TRY(read_decoder(t, c, f, depth + 1, e));
        return OK;
    }
    if (!strcmp(type, "ByteLevel"))
        f->bytes = true;
    else if (!strcmp(type, "ByteFallback"))
        f->fallback = true;
    else if (!strcmp(type, "Fuse"))
        return OK;
    else if (!strcmp(type, "Replace")) {
        const cJSON *p = cJSON_GetObjectItemCaseSensitive(
            cJSON_GetObjectItemCaseSensitive(o, "pattern"), "String");
        const cJSON *c = cJSON_GetObjectItemCaseSensitive(o, "content");
        if (!cJSON_IsString(p) || strcmp(p->valuestring, "\xe2\x96\x81") || !cJSON_IsString(c) ||
            strcmp(c->valuestring, " "))
            return err_set(e, E_UNSUPPORTED, "decoder Replace of anything but U+2581 by a space");
        f->mark = true;
    } else if (!strcmp(type, "Strip")) {
        int64_t start, stop;
        TRY(json_opt_i64(o, "start", 0, 1, 0, &start, e));
        TRY(json_opt_i64(o, "stop", 0, 0, 0, &stop, e));
        if (start) t->strip = STRIP_ONE;
    } else if (!strcmp(type, "Metaspace")) {
        const char *scheme;
        bool prefix;
        TRY(json_opt_bool(o, "add_prefix_space", true, &prefix, e));
        TRY(json_opt_str(o, "prepend_scheme", prefix ? "always" : "never", &scheme, e));
        f->mark = true;
        if (strcmp(scheme, "never") != 0) t->strip = STRIP_TOKEN;
    } else {
        return err_set(e, E_UNSUPPORTED, "decoder '%.40s'", type);
    }
    return OK;
}

static err_code read_model(bpe_model *m, const cJSON *model, const piece_form *form, tokenizer *t,
                           err *e)
{
    const char *type, *unk, *prefix, *suffix;
    double dropout;
    TRY(json_opt_str(model, "type", "BPE", &type, e));
    if (strcmp(type, "BPE") != 0)
        return err_set(e, E_UNSUPPORTED,
                       "model type '%.40s' (BPE is read; for others give the .model file)", type);
    TRY(json_opt_f64(model, "dropout", 0, &dropout, e));
    TRY(json_opt_str(model, "continuing_subword_prefix", "", &prefix, e));
    TRY(json_opt_str(model, "end_of_word_suffix", "", &suffix, e));
    if (dropout != 0 || *prefix || *suffix)
        return err_set(e, E_UNSUPPORTED,
                       "model with dropout, continuing_subword_prefix or end_of_word_suffix");
    TRY(json_opt_str(model, "unk_token", "", &unk, e));
    TRY(json_opt_bool(model, "fuse_unk", false, &m->fuse_unk, e));
    TRY(json_opt_bool(model, "byte_fallback", false, &m->byte_fallback, e));
    TRY(json_opt_bool(model, "ignore_merges", false, &m->whole_words, e));
    m->bytes = tok_split_bytes(m->split);
    TRY(add_vocab(t, cJSON_GetObjectItemCaseSensitive(model, "vocab"), form, e));
    TRY(add_merges_json(m, cJSON_GetObjectItemCaseSensitive(model, "merges"), e));
    find_bytes(m);
    if (!*unk) return OK;
    m->unk = t->unk = vocab_find(&t->v, unk, strlen(unk));
    if (m->unk < 0)
        return err_set(e, E_INPUT, "model: unk_token '%.40s' is not in the vocabulary", unk);
    return OK;
}

static err_code read_added(tokenizer *t, const cJSON *list, err *e)
{
    const cJSON *c;
    cJSON_ArrayForEach(c, list)
    {
        const char *content;
        added_token a = {0};
        TRY(json_get_str(c, "content", &content, e));
        TRY(json_get_i32(c, "id", 0, TOK_MAX_VOCAB - 1, &a.id, e));
        TRY(json_opt_bool(c, "special", false, &a.special, e));
        TRY(json_opt_bool(c, "lstrip", false, &a.lstrip, e));
        TRY(json_opt_bool(c, "rstrip", false, &a.rstrip, e));
        TRY(json_opt_bool(c, "single_word", false, &a.single_word, e));
        TRY(json_opt_bool(c, "normalized", !a.special, &a.normalized, e));
        if (*content) TRY(tok_add_token(t, content, strlen(content), a, e));
    }
    return OK;
}

/* A post processor that puts one special token in front of the text: the BOS. */
static void read_template(tokenizer *t, const cJSON *o, int depth)
{
    const cJSON *type = cJSON_GetObjectItemCaseSensitive(o, "type"), *c;
    if (!cJSON_IsString(type) || depth > 2) return;
    if (!strcmp(type->valuestring, "Sequence")) {
        cJSON_ArrayForEach(c, cJSON_GetObjectItemCaseSensitive(o, "processors"))
            read_template(t, c, depth + 1);
        return;
    }
    if (strcmp(type->valuestring, "TemplateProcessing") != 0) return;
    const cJSON *first = cJSON_GetArrayItem(cJSON_GetObjectItemCaseSensitive(o, "single"), 0);
    const cJSON *id = cJSON_GetObjectItemCaseSensitive(
        cJSON_GetObjectItemCaseSensitive(first, "SpecialToken"), "id");
    if (!cJSON_IsString(id)) return;
    t->bos = vocab_find(&t->v, id->valuestring, strlen(id->valuestring));
    t->add_bos = t->bos >= 0;
}

static err_code read_json(tokenizer *t, const cJSON *o, err *e)
{
    bpe_model *m;
    piece_form form = {0};
    const cJSON *model = cJSON_GetObjectItemCaseSensitive(o, "model");
    if (!cJSON_IsObject(model)) return err_set(e, E_INPUT, "expected an object 'model'");
    TRY(model_new(&m, t, e));
    TRY(tok_normal_open(&m->normal, cJSON_GetObjectItemCaseSensitive(o, "normalizer"), e));
    TRY(tok_split_open(&m->split, cJSON_GetObjectItemCaseSensitive(o, "pre_tokenizer"), e));
    TRY(read_decoder(t, cJSON_GetObjectItemCaseSensitive(o, "decoder"), &form, 0, e));
    TRY(read_model(m, model, &form, t, e));
    t->text = form.fallback ? TEXT_SPM : TEXT_BYTES;
    TRY(read_added(t, cJSON_GetObjectItemCaseSensitive(o, "added_tokens"), e));
    cut_rules_of(&m->cuts, &t->v);
    read_template(t, cJSON_GetObjectItemCaseSensitive(o, "post_processor"), 0);
    return OK;
}

err_code tok_open_json(tokenizer *t, const char *name, const char *data, size_t n, err *e)
{
    cJSON *o = NULL;
    TRY(json_parse(&o, data, n, name, e));
    err_code rc = read_json(t, o, e);
    if (rc != OK) rc = err_wrap(e, "%s", name);
    cJSON_Delete(o);
    return rc;
}

/* ---- vocab.json and merges.txt ---- */

static err_code read_merges_text(bpe_model *m, const char *text, size_t n, err *e)
{
    tok_buf joint = {0};
    err_code rc = OK;
    int32_t rank = 0;
    for (size_t i = 0; i < n && rc == OK;) {
        const char *end = memchr(text + i, '\n', n - i);
        const size_t next = end ? (size_t)(end - text) + 1 : n;
        size_t len = (end ? (size_t)(end - text) : n) - i;
        if (len && text[i + len - 1] == '\r') len--;
        const bool version = len >= 8 && memcmp(text + i, "#version", 8) == 0;
        if (len && !(version && rank == 0))
            rc = add_merge_line(m, text + i, len, rank++, &joint, e);
        i = next;
    }
    tok_buf_free(&joint);
    return rc;
}

/* The files do not say how text is split or normalized: the class in the tokenizer config does. */
static err_code split_of_class(bpe_model *m, const cJSON *config, err *e)
{
    const cJSON *c = cJSON_GetObjectItemCaseSensitive(config, "tokenizer_class");
    const char *name = cJSON_IsString(c) ? c->valuestring : "";
    if (!strncmp(name, "Qwen2Tokenizer", 14)) {
        TRY(tok_normal_nfc(&m->normal, e));
        return tok_split_regex(&m->split, tok_regex_qwen2, e);
    }
    return tok_split_regex(&m->split, tok_regex_gpt2, e);
}

static err_code read_vocab_merges(tokenizer *t, const cJSON *vocab_json, const char *merges,
                                  size_t n, const cJSON *config, err *e)
{
    static const char end[] = "<|endoftext|>";
    const piece_form form = {.bytes = true};
    bpe_model *m;
    TRY(model_new(&m, t, e));
    TRY(split_of_class(m, config, e));
    m->bytes = true;
    TRY(add_vocab(t, vocab_json, &form, e));
    TRY(read_merges_text(m, merges, n, e));
    find_bytes(m);
    /* The one special token that such vocabularies hold in themselves. */
    const added_token a = {.id = vocab_find(&t->v, end, sizeof end - 1), .special = true};
    return a.id >= 0 ? tok_add_token(t, end, sizeof end - 1, a, e) : OK;
}

err_code tok_open_vocab_merges(tokenizer *t, const char *vocab_path, const char *merges_path,
                               const cJSON *config, err *e)
{
    cJSON *o = NULL;
    char *text = NULL;
    size_t n = 0;
    err_code rc;
    if ((rc = json_load(&o, vocab_path, TOK_MAX_JSON, e)) != OK) goto done;
    if ((rc = file_read(&text, &n, merges_path, TOK_MAX_JSON, e)) != OK) goto done;
    if ((rc = read_vocab_merges(t, o, text, n, config, e)) != OK)
        rc = err_wrap(e, "%s", vocab_path);
done:
    mem_free(text);
    cJSON_Delete(o);
    return rc;
}

/* ---- tiktoken ranks: one "base64 rank" a line ---- */

static err_code add_rank(tokenizer *t, const char *line, size_t n, int32_t number, err *e)
{
    unsigned char bytes[2048];
    const char *gap = memchr(line, ' ', n);
    char *end = NULL;
    const size_t b64 = gap ? (size_t)(gap - line) : 0;
    if (!gap || b64 == 0 || b64 % 4 || b64 > 2700)
        return err_set(e, E_INPUT, "line %d: expected base64 and a rank", number);
    char digits[16] = "";
    const size_t nd = (size_t)(line + n - gap - 1);
    if (nd == 0 || nd > 9) return err_set(e, E_INPUT, "line %d: expected a rank", number);
    memcpy(digits, gap + 1, nd);
    const long id = strtol(digits, &end, 10);
    const int len = EVP_DecodeBlock(bytes, (const unsigned char *)line, (int)b64);
    if (*end || digits[0] == '-' || len < 0)
        return err_set(e, E_INPUT, "line %d: expected base64 and a rank", number);
    const size_t pad = (size_t)(line[b64 - 1] == '=') + (line[b64 - 2] == '=');
    return vocab_add(&t->v, (int32_t)id, (const char *)bytes, (size_t)len - pad, NULL, 0, 0, e);
}

/* Rank files hold no special tokens: they are known by their size. */
static err_code tiktoken_specials(tokenizer *t, int32_t base, err *e)
{
    static const char *const llama3[] = {"<|begin_of_text|>",
                                         "<|end_of_text|>",
                                         "<|reserved_special_token_0|>",
                                         "<|reserved_special_token_1|>",
                                         "<|finetune_right_pad_id|>",
                                         "<|reserved_special_token_2|>",
                                         "<|start_header_id|>",
                                         "<|end_header_id|>",
                                         "<|eom_id|>",
                                         "<|eot_id|>",
                                         "<|python_tag|>"};
    static const char *const qwen[] = {"<|endoftext|>", "<|im_start|>", "<|im_end|>"};
    const bool l3 = base == 128000, qw = base == 151643;
    const int32_t total = l3 ? 256 : qw ? 208 : 0;
    for (int32_t i = 0; i < total; i++) {
        char name[40];
        const int32_t named = l3 ? 11 : 3;
        if (i < named)
            snprintf(name, sizeof name, "%s", l3 ? llama3[i] : qwen[i]);
        else if (l3)
            snprintf(name, sizeof name, "<|reserved_special_token_%d|>", i - named + 3);
        else
            snprintf(name, sizeof name, "<|extra_%d|>", i - named);
        const added_token a = {.id = base + i, .special = true};
        TRY(tok_add_token(t, name, strlen(name), a, e));
    }
    t->bos = l3 ? base : -1;
    t->eos = l3 ? base + 1 : qw ? base : -1;
    t->add_bos = l3;
    return OK;
}

static err_code read_ranks(tokenizer *t, const char *data, size_t n, err *e)
{
    bpe_model *m;
    int32_t number = 0;
    TRY(model_new(&m, t, e));
    for (size_t i = 0; i < n;) {
        const char *end = memchr(data + i, '\n', n - i);
        size_t len = (end ? (size_t)(end - data) : n) - i;
        if (len && data[i + len - 1] == '\r') len--;
        number++;
        if (len) TRY(add_rank(t, data + i, len, number, e));
        i = end ? (size_t)(end - data) + 1 : n;
    }
    m->bytes = m->ranks = m->whole_words = true;
    for (int b = 0; b < 256; b++) {
        const char c = (char)b;
        m->byte_id[b] = vocab_find(&t->v, &c, 1);
        if (m->byte_id[b] < 0)
            return err_set(e, E_INPUT, "expected a rank for every byte, byte %d has none", b);
    }
    if (t->v.n != 128000)
        TRY(tok_normal_nfc(&m->normal, e)); /* Qwen normalizes, Llama 3 does not */
    TRY(tok_split_regex(&m->split, t->v.n == 128000 ? tok_regex_llama3 : tok_regex_qwen2, e));
    return tiktoken_specials(t, t->v.n, e);
}

err_code tok_open_tiktoken(tokenizer *t, const char *name, const char *data, size_t n, err *e)
{
    const err_code rc = read_ranks(t, data, n, e);
    return rc == OK ? OK : err_wrap(e, "%s", name);
}
