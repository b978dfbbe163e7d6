/* sentencepiece models. The file is read here first: pieces and settings are wanted anyway, and
 * the library trusts what it loads (the character map is a double array that it walks without
 * bounds), so nothing reaches it that was not checked. Encoding is the library's. */
#include <math.h>
#include <string.h>

#include "base/mem.h"
#include "formats/sp_shim.h"
#include "formats/tokenizer_internal.h"

/* The library splits pieces by recursion, so their length bounds its stack. */
#define SPM_MAX_PIECE 4096

typedef struct {
    sp_shim *plain;  /* never a prefix; NULL when the model puts none anyway (prefix is used) */
    sp_shim *prefix; /* as the model says */
    bool legacy;     /* a prefix also behind added tokens */
    cut_rules cuts;
} spm_model;

/* ---- protobuf: just enough to walk fields ---- */

typedef struct {
    const uint8_t *p, *end;
} pb;
typedef struct {
    uint32_t field, wire;
    uint64_t value;
    const uint8_t *data;
    size_t len;
} pb_field;

static bool pb_varint(pb *b, uint64_t *out)
{
    *out = 0;
    for (int shift = 0; shift < 64; shift += 7) {
        if (b->p == b->end) return false;
        const uint8_t c = *b->p++;
        *out |= (uint64_t)(c & 0x7f) << shift;
        if (!(c & 0x80)) return true;
    }
    return false;
}

static bool pb_next(pb *b, pb_field *f)
{
    uint64_t key;
    if (!pb_varint(b, &key) || key >> 3 == 0 || key >> 3 > UINT32_MAX) return false;
    *f = (pb_field){(uint32_t)(key >> 3), (uint32_t)(key & 7), 0, b->p, 0};
    switch (f->wire) {
    case 0: return pb_varint(b, &f->value);
    case 1: f->len = 8; break;
    case 2:
        if (!pb_varint(b, &f->value) || f->value > (uint64_t)(b->end - b->p)) return false;
        f->len = (size_t)f->value;
        break;
    case 5: f->len = 4; break;
    default: return false; /* groups: not in these messages */
    }
    f->data = b->p;
    if (f->len > (size_t)(b->end - b->p)) return false;
    b->p += f->len;
    return true;
}

/* ---- what a model file says ---- */

enum {
    SPM_NORMAL = 1,
    SPM_UNKNOWN,
    SPM_CONTROL,
    SPM_USER,
    SPM_UNUSED,
    SPM_BYTE
}; /* piece types of the format */

typedef struct {
    bool dummy_prefix, remove_spaces, escape_spaces, suffix, unigram;
    bool nul, nul_user; /* a piece, a user-defined piece, holds a NUL */
    const uint8_t *charsmap, *unk_surface;
    size_t charsmap_len, unk_surface_len;
    int32_t bos, eos;
} spm_info;

static err_code spm_bad(const char *name, const char *why, err *e)
{
    return err_set(e, E_INPUT, "%s: not a sentencepiece model: %s", name, why);
}

/* A double array as the library walks it: unit i, byte c -> i ^ offset(unit) ^ c, and a value at
 * i ^ offset where bit 8 says so. Every place that a unit can lead to must lie inside, and every
 * value inside the replacement texts. */
static err_code charsmap_check(const char *name, const uint8_t *map, size_t len, err *e)
{
    uint32_t bytes;
    if (len == 0) return OK;
    if (len <= 4) return spm_bad(name, "character map is cut short", e);
    memcpy(&bytes, map, 4);
    if (bytes % 4 || bytes < 4 || bytes >= len - 4)
        return spm_bad(name, "character map has a wrong size", e);
    const size_t units = bytes / 4, texts = len - 4 - bytes;
    if (map[len - 1] != 0) return spm_bad(name, "character map text is not ended", e);
    for (size_t i = 0; i < units; i++) {
        uint32_t u, to;
        memcpy(&u, map + 4 + 4 * i, 4);
        if (u & 0x80000000u && i > 0) continue; /* a value: never walked through */
        const size_t next = i ^ ((size_t)(u >> 10) << ((u & (1u << 9)) >> 6));
        if ((next | 0xff) >= units)
            return spm_bad(name, "character map leads outside of itself", e);
        if (!(u & 1u << 8)) continue;
        memcpy(&to, map + 4 + 4 * next, 4);
        if ((to & 0x7fffffffu) >= texts)
            return spm_bad(name, "character map value is out of range", e);
    }
    return OK;
}

static err_code spm_trainer(spm_info *m, const pb_field *f, const char *name, err *e)
{
    pb b = {f->data, f->data + f->len};
    pb_field g;
    while (b.p < b.end) {
        if (!pb_next(&b, &g)) return spm_bad(name, "trainer settings are cut short", e);
        if (g.field == 3 && g.wire == 0) m->unigram = g.value != 2;
        if (g.field == 24 && g.wire == 0) m->suffix = g.value != 0;
        if (g.field == 41 && g.wire == 0) m->bos = (int32_t)g.value;
        if (g.field == 42 && g.wire == 0) m->eos = (int32_t)g.value;
        if (g.field == 44 && g.wire == 2) {
            m->unk_surface = g.data;
            m->unk_surface_len = g.len;
        }
    }
    return OK;
}

static err_code spm_normalizer(spm_info *m, const pb_field *f, const char *name, err *e)
{
    pb b = {f->data, f->data + f->len};
    pb_field g;
    while (b.p < b.end) {
        if (!pb_next(&b, &g)) return spm_bad(name, "normalizer settings are cut short", e);
        if (g.field == 2 && g.wire == 2) {
            m->charsmap = g.data;
            m->charsmap_len = g.len;
        }
        if (g.field == 3 && g.wire == 0) m->dummy_prefix = g.value != 0;
        if (g.field == 4 && g.wire == 0) m->remove_spaces = g.value != 0;
        if (g.field == 5 && g.wire == 0) m->escape_spaces = g.value != 0;
    }
    return OK;
}

/* "▁" becomes a space, "<0x0A>" of a byte piece its byte. Returns the length. */
static size_t spm_text(char *out, const char *s, size_t n, uint64_t type)
{
    static const char hex[] = "0123456789ABCDEF";
    if (type == SPM_BYTE && n == 6) {
        const char *hi = memchr(hex, s[3], 16), *lo = memchr(hex, s[4], 16);
        if (hi && lo) {
            out[0] = (char)((hi - hex) << 4 | (lo - hex));
            return 1;
        }
    }
    size_t k = 0;
    for (size_t i = 0; i < n;) {
        if (n - i >= 3 && memcmp(s + i, "\xe2\x96\x81", 3) == 0) {
            out[k++] = ' ';
            i += 3;
        } else {
            out[k++] = s[i++];
        }
    }
    return k;
}

static err_code spm_piece(tokenizer *t, spm_info *m, const pb_field *f, const char *name, err *e)
{
    pb b = {f->data, f->data + f->len};
    pb_field g;
    const char *s = NULL;
    size_t n = 0;
    uint64_t type = SPM_NORMAL;
    char text[SPM_MAX_PIECE];
    while (b.p < b.end) {
        if (!pb_next(&b, &g)) return spm_bad(name, "a piece is cut short", e);
        if (g.field == 1 && g.wire == 2) {
            s = (const char *)g.data;
            n = g.len;
        }
        if (g.field == 2 && g.wire == 5) {
            float score;
            memcpy(&score, g.data, 4);
            if (!isfinite(score)) return spm_bad(name, "a score is not finite", e);
        }
        if (g.field == 3 && g.wire == 0) type = g.value;
    }
    const int32_t id = t->v.n;
    if (!s || !n || n > SPM_MAX_PIECE)
        return err_set(e, E_INPUT, "%s: piece %d: expected a string of 1 to %d bytes, got %zu",
                       name, id, SPM_MAX_PIECE, n);
    if (memchr(s, 0, n)) {
        m->nul = true;
        m->nul_user |= type == SPM_USER;
    }
    const uint8_t flags = type == SPM_CONTROL   ? PIECE_SPECIAL
                          : type == SPM_UNKNOWN ? PIECE_SPECIAL | PIECE_UNK
                          : type == SPM_BYTE    ? PIECE_BYTE
                                                : 0;
    if (vocab_find(&t->v, s, n) >= 0)
        return err_set(e, E_INPUT, "%s: piece %d: '%.*s' is there already", name, id,
                       (int)(n < 60 ? n : 60), s);
    if (type == SPM_UNKNOWN) t->unk = id;
    if (flags & PIECE_SPECIAL) {
        const added_token a = {.id = id, .special = true};
        if (n <= TOK_MAX_ADDED_BYTES) TRY(added_put(&t->added, s, n, a, e));
    }
    return vocab_add(&t->v, id, s, n, text, spm_text(text, s, n, type), flags, e);
}

static err_code spm_scan(tokenizer *t, spm_info *m, const char *name, const char *data, size_t n,
                         err *e)
{
    pb b = {(const uint8_t *)data, (const uint8_t *)data + n};
    pb_field f;
    *m = (spm_info){.dummy_prefix = true,
                    .remove_spaces = true,
                    .escape_spaces = true,
                    .unigram = true,
                    .bos = 1,
                    .eos = 2};
    while (b.p < b.end) {
        if (!pb_next(&b, &f)) return spm_bad(name, "a field is cut short", e);
        if (f.wire != 2) continue;
        if (f.field == 1) TRY(spm_piece(t, m, &f, name, e));
        if (f.field == 2) TRY(spm_trainer(m, &f, name, e));
        if (f.field == 3) TRY(spm_normalizer(m, &f, name, e));
        if (f.field == 5) { /* denormalizer: only its map concerns the library */
            spm_info d = *m;
            d.charsmap_len = 0;
            TRY(spm_normalizer(&d, &f, name, e));
            TRY(charsmap_check(name, d.charsmap, d.charsmap_len, e));
        }
    }
    if (t->v.n == 0) return spm_bad(name, "it has no pieces", e);
    /* The library keeps these in tables of C strings. */
    if (m->nul_user || (m->nul && m->unigram)) return spm_bad(name, "a piece holds a NUL", e);
    return charsmap_check(name, m->charsmap, m->charsmap_len, e);
}

/* ---- encoding ---- */

typedef struct {
    token_list *out;
    const tokenizer *t;
    err *e;
    err_code rc;
} spm_sink;

static int spm_push(void *ctx, int id)
{
    spm_sink *s = ctx;
    s->rc = token_list_push(s->out, id, s->e);
    return s->rc != OK;
}

static err_code spm_encode(const void *self, const char *text, size_t n, frag_kind kind,
                           token_list *out, err *e)
{
    const spm_model *m = self;
    const bool prefix = kind == FRAG_FIRST || (kind == FRAG_NEXT && m->legacy);
    spm_sink sink = {out, NULL, e, OK};
    char msg[256] = "";
    switch (sp_shim_encode(prefix || !m->plain ? m->prefix : m->plain, text, n, spm_push, &sink,
                           msg, sizeof msg)) {
    case SP_OK: return OK;
    case SP_STOPPED: return sink.rc;
    case SP_NOMEM:
        return err_set(e, E_NOMEM, "sentencepiece: out of memory for %zu bytes of text", n);
    default: return err_set(e, E_INPUT, "sentencepiece: cannot encode: %s", msg);
    }
}

static bool spm_can_cut(const void *self, const char *s, size_t n, size_t at, bool raw)
{
    (void)raw; /* what the model does to text before merging, it does to each character alone */
    return cut_rules_ok(&((const spm_model *)self)->cuts, s, n, at);
}

static void spm_close(void *self)
{
    spm_model *m = self;
    sp_shim_close(m->plain);
    sp_shim_close(m->prefix);
    mem_free(m);
}

static const tok_ops spm_ops = {spm_close, NULL, spm_encode, spm_can_cut};

static err_code spm_load(sp_shim **out, const char *name, const char *data, size_t n, err *e)
{
    char msg[256] = "";
    const sp_status rc = sp_shim_open(out, data, n, msg, sizeof msg);
    if (rc == SP_OK) return OK;
    if (rc == SP_NOMEM) return err_set(e, E_NOMEM, "%s: out of memory", name);
    return err_set(e, E_INPUT, "%s: not a sentencepiece model: %s", name, msg);
}

/* A later field of the same message overrides an earlier one, so a setting is changed by
 * appending it. */
static err_code spm_load_with_prefix(sp_shim **out, const char *name, const char *data, size_t n,
                                     bool on, err *e)
{
    const char tail[] = {3 << 3 | 2, 2, 3 << 3 | 0, (char)on};
    tok_buf b = {0};
    err_code rc = tok_buf_add(&b, data, n, e);
    if (rc == OK) rc = tok_buf_add(&b, tail, sizeof tail, e);
    if (rc == OK) rc = spm_load(out, name, b.p, b.n, e);
    tok_buf_free(&b);
    return rc;
}

/* Transformers' legacy=false: one prefix at the start of the text, none behind added tokens, and
 * the prefix is the tokenizer config's choice. Otherwise the model's setting rules for each
 * fragment. */
static err_code spm_prefixes(tokenizer *t, spm_model *m, const spm_info *info, const char *name,
                             const char *data, size_t n, const cJSON *config, err *e)
{
    const cJSON *legacy = cJSON_GetObjectItemCaseSensitive(config, "legacy");
    const cJSON *space = cJSON_GetObjectItemCaseSensitive(config, "add_prefix_space");
    const bool modern = cJSON_IsFalse(legacy);
    bool prefix = info->dummy_prefix;
    if (modern && cJSON_IsBool(space)) prefix = cJSON_IsTrue(space);
    m->legacy = !modern;
    TRY(spm_load_with_prefix(&m->prefix, name, data, n, prefix, e));
    if (prefix) TRY(spm_load_with_prefix(&m->plain, name, data, n, false, e));
    if (modern && prefix) t->lead_piece = vocab_find(&t->v, "\xe2\x96\x81", 3);
    t->strip = info->remove_spaces ? STRIP_ALL : prefix ? STRIP_ONE : STRIP_NONE;
    return OK;
}

err_code tok_open_spm(tokenizer *t, const char *name, const char *data, size_t n,
                      const cJSON *config, err *e)
{
    spm_info info;
    spm_model *m;
    if (n > TOK_MAX_MODEL)
        return err_set(e, E_LIMIT, "%s: expected at most %zu bytes, got %zu", name, TOK_MAX_MODEL,
                       n);
    TRY(spm_scan(t, &info, name, data, n, e));
    TRY(mem_alloc((void **)&m, 1, sizeof *m, name, e));
    t->self = m;
    t->ops = &spm_ops;
    t->text = TEXT_SPM;
    TRY(spm_prefixes(t, m, &info, name, data, n, config, e));
    cut_rules_of(&m->cuts, &t->v);
    /* Best paths of unigram models depend on rounding of long sums, the others on what is beyond
     * the cut. */
    if (info.unigram || info.suffix || info.remove_spaces || !info.escape_spaces ||
        info.charsmap_len)
        m->cuts.off = true;
    t->bos = info.bos >= 0 && info.bos < t->v.n ? info.bos : -1;
    t->eos = info.eos >= 0 && info.eos < t->v.n ? info.eos : -1;
    t->add_bos = t->bos >= 0;
    tok_buf unk = {0};
    TRY(info.unk_surface
            ? tok_buf_add(&unk, (const char *)info.unk_surface, info.unk_surface_len, e)
            : tok_buf_add(&unk, " \xe2\x81\x87 ", 5, e));
    t->unk_text = unk.p;
    return OK;
}
