/* The conversion's decisions: what a workspace can hold, its configuration, its options, and the
 * walk over its files. */
#include "formats/convert.h"

#include <assert.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/convert_internal.h"
#include "formats/family.h"
#include "formats/model_files.h"
#include "formats/tm_store.h"

#define PATH_CAP 4096
#define TM_GROUP 128 /* the only one that any LMDeploy loads */
#define MAX_TP   64

/* ---- decisions ---- */

static err_code check_source(const convert *c, err *e)
{
    const model_desc *m = &c->m;
    if (weights_kind(c->src) == SRC_TM)
        return err_set(e, E_UNSUPPORTED, "'%s' is a TurboMind workspace already",
                       weights_path(c->src));
    if (m->w4_group && m->w4_group != TM_GROUP)
        return err_set(e, E_UNSUPPORTED,
                       "group size is %d, TurboMind loads %d only: tm-run reads '%s' as it is",
                       m->w4_group, TM_GROUP, weights_path(c->src));
    if (m->experts)
        return err_set(e, E_UNSUPPORTED, "mixture of experts (%d) is not handled", m->experts);
    if (m->qk_norm) return err_set(e, E_UNSUPPORTED, "a workspace cannot hold norms of q and k");
    if (m->w4_group && m->head_dim % 8)
        return err_set(e, E_UNSUPPORTED, "head size is %d, 4-bit weights need a multiple of 8",
                       m->head_dim);
    if (m->rope_dims != m->head_dim && !m->rope_interleaved)
        return err_set(e, E_UNSUPPORTED, "%d of %d dimensions of a head are rotated: expected all",
                       m->rope_dims, m->head_dim);
    return OK;
}

static void warn_limits(const convert *c)
{
    const model_desc *m = &c->m;
    if (m->head_dim != 128 && m->head_dim != 64)
        job_log(c->j, LOG_WARN,
                "head size is %d: tm-run reads the workspace, LMDeploy takes 128 and 64 only",
                m->head_dim);
    if (m->sliding_window)
        job_log(c->j, LOG_WARN,
                "the model sees the last %d tokens only: tm-run honours that, LMDeploy runs full "
                "attention",
                m->sliding_window);
}

static err_code need_multiple(const char *what, int64_t value, int64_t unit, int32_t tp, err *e)
{
    if (value % unit == 0) return OK;
    return err_set(e, E_UNSUPPORTED, "tp %d: %s is %lld, expected a multiple of %lld", tp, what,
                   (long long)value, (long long)unit);
}

/* The FFN is padded so that every rank has whole groups; KV heads fewer than ranks are repeated. */
static err_code decide_split(convert *c, err *e)
{
    const model_desc *m = &c->m;
    model_desc *t = &c->c.m;
    const int32_t tp = c->c.tp;
    const int64_t group = m->w4_group ? m->w4_group : 1;

    TRY(need_multiple("number of heads", m->heads, tp, tp, e));
    TRY(need_multiple("hidden size", m->hidden, tp, tp, e));
    if (m->w4_group)
        TRY(need_multiple("attention width", (int64_t)m->heads * m->head_dim, group * tp, tp, e));
    if (tp > m->kv_heads) {
        TRY(need_multiple("ranks per KV head", tp, m->kv_heads, tp, e));
        t->kv_heads = tp;
    } else {
        TRY(need_multiple("number of KV heads", m->kv_heads, tp, tp, e));
    }
    const int64_t groups = (m->ffn + group - 1) / group;
    const int64_t ffn = (groups + tp - 1) / tp * group * tp;
    if (ffn > MODEL_MAX_WIDTH)
        return err_set(e, E_LIMIT, "padded FFN width %lld is too large", (long long)ffn);
    t->ffn = (int32_t)ffn;
    c->c.embedding_size = (m->vocab + tp - 1) / tp * tp;
    return OK;
}

static err_code set_text(char *dst, size_t cap, const char *what, const char *s, err *e)
{
    if (strlen(s) >= cap)
        return err_set(e, E_USAGE, "%s: %zu characters, expected fewer than %zu", what, strlen(s),
                       cap);
    memcpy(dst, s, strlen(s) + 1);
    return OK;
}

static err_code decide_names(convert *c, err *e)
{
    const char *own = family_chat_template(&c->m);
    const char *chat = c->o.chat_template ? c->o.chat_template : own ? own : "base";
    const char *name = c->o.model_name ? c->o.model_name : chat;
    TRY(set_text(c->c.chat_template, sizeof c->c.chat_template, "chat template", chat, e));
    TRY(set_text(c->c.model_name, sizeof c->c.model_name, "model name", name, e));
    return set_text(c->c.model_format, sizeof c->c.model_format, "model format",
                    c->m.w4_group ? "awq" : "hf", e);
}

static dtype decide_dtype(const convert *c)
{
    if (c->m.w4_group) return DT_F16; /* TurboMind computes W4 in f16 */
    if (c->o.dt != DT_NONE) return c->o.dt;
    return c->m.dt == DT_BF16 ? DT_BF16 : DT_F16;
}

static err_code decide(convert *c, err *e)
{
    c->m = *weights_desc(c->src);
    c->c.epoch = TM_C2;
    c->c.tp = c->o.tp ? c->o.tp : 1;
    if (c->c.tp < 1 || c->c.tp > MAX_TP)
        return err_set(e, E_USAGE, "tp: expected 1..%d, got %d", MAX_TP, c->c.tp);
    TRY(check_source(c, e));
    c->c.m = c->m;
    c->c.m.dt = decide_dtype(c);
    c->c.m.qkv = QKV_CONCAT;
    c->c.m.rope_interleaved = true;
    c->c.m.qkv_bias = c->c.m.o_bias = c->m.qkv_bias ||
                                      c->m.o_bias; /* the format has one flag for both */
    c->c.m.tied_embed = false;
    c->c.session_len = c->o.session_len ? c->o.session_len : c->m.max_tokens;
    TRY(decide_split(c, e));
    TRY(decide_names(c, e));
    c->c.start_id =
        c->m.bos; /* only v0.6.4 and v0.6.5 look at them; stop ids come from the json files */
    c->c.end_id = c->m.eos;
    (void)snprintf(c->options, sizeof c->options,
                   "tp=%d dtype=%s session_len=%d model_name=%s chat_template=%s clamp=%d", c->c.tp,
                   c->c.m.w4_group ? "int4" : dtype_name(c->c.m.dt), c->c.session_len,
                   c->c.model_name, c->c.chat_template, c->o.clamp);
    return tm_config_files(&c->files, &c->n, &c->c, e);
}

err_code convert_open(convert **out, weight_src *src, const convert_opts *o, const job *j, err *e)
{
    void *p;
    *out = NULL;
    TRY(mem_alloc(&p, 1, sizeof(convert), "conversion", e));
    convert *c = p;
    c->src = src;
    c->o = *o;
    c->j = j;
    const err_code rc = decide(c, e);
    if (rc != OK) {
        convert_close(&c);
        return rc;
    }
    c->o.model_name = c->o.chat_template = NULL; /* copied; not ours to keep */
    warn_limits(c);
    *out = c;
    return OK;
}

void convert_close(convert **c)
{
    if (!*c) return;
    mem_free((*c)->files);
    mem_free(*c);
    *c = NULL;
}

const tm_config *convert_config(const convert *c) { return &c->c; }

const tm_file *convert_files(const convert *c, size_t *n)
{
    *n = c->n;
    return c->files;
}

uint64_t convert_bytes(const convert *c)
{
    uint64_t sum = 0;
    for (size_t i = 0; i < c->n; i++) sum += c->files[i].bytes;
    return sum;
}

size_t convert_memory(const convert *c) { return convert_make_bytes(c) + c->n * sizeof(tm_file); }

/* ---- what is there already ---- */

convert_state convert_look(const convert *c, const char *path)
{
    manifest m;
    err ignored;
    if (!file_exists(path)) return CONVERT_ABSENT;
    if (manifest_read(&m, path, &ignored) != OK) return CONVERT_FOREIGN;
    convert_state state = CONVERT_FOREIGN;
    if (strcmp(m.kind, MANIFEST_KIND_TM) == 0)
        state = strcmp(m.parent, weights_digest(c->src)) == 0 &&
                        strcmp(m.options, c->options) == 0 &&
                        strcmp(m.tool, "tmforge " TMF_VERSION) == 0 &&
                        manifest_verify(&m, path, c->j, &ignored) == OK
                    ? CONVERT_CURRENT
                    : CONVERT_STALE;
    manifest_free(&m);
    return state;
}

/* ---- writing ---- */

static err_code file_begin(void *ctx, const tm_file *f, err *e)
{
    char name[160];
    (void)snprintf(name, sizeof name, "%s/%s", TM_WEIGHTS_DIR, f->name);
    return tm_writer_begin(ctx, name, e);
}
static err_code file_write(void *ctx, const void *data, size_t n, err *e)
{
    return tm_writer_write(ctx, data, n, e);
}
static err_code file_end(void *ctx, err *e) { return tm_writer_end(ctx, e); }

static err_code write_weights(convert *c, tm_writer *w, err *e)
{
    const convert_sink sink = {file_begin, file_write, file_end, w};
    int32_t layer = -1;

    for (size_t i = 0; i < c->n; i += convert_unit(c, i)) {
        TRY(job_check(c->j, e));
        job_step(c->j, "convert", "file", (int64_t)i, (int64_t)c->n);
        if (c->files[i].layer != layer) {
            if (layer >= 0) weights_release(c->src, layer);
            layer = c->files[i].layer;
            weights_prefetch(c->src, layer);
        }
        TRY(convert_make(c, i, &sink, e));
    }
    if (layer >= 0) weights_release(c->src, layer);
    job_step(c->j, "convert", "file", (int64_t)c->n, (int64_t)c->n);
    return OK;
}

static err_code write_config(convert *c, tm_writer *w, err *e)
{
    char *text;
    TRY(tm_config_print(&text, &c->c, e));
    err_code rc = tm_writer_begin(w, TM_WEIGHTS_DIR "/" TM_CONFIG_NAME, e);
    if (rc == OK) rc = tm_writer_write(w, text, strlen(text), e);
    if (rc == OK) rc = tm_writer_end(w, e);
    mem_free(text);
    return rc;
}

/* To both places where LMDeploy has looked for them: the root since v0.7.0.post2. */
static err_code copy_twice(const char *dir, const char *name, tm_writer *w, err *e)
{
    char from[PATH_CAP], sub[PATH_CAP];
    TRY(path_join(from, sizeof from, dir, name, e));
    TRY(path_join(sub, sizeof sub, TM_TOKENIZER_DIR, name, e));
    TRY(tm_writer_copy(w, from, name, e));
    return tm_writer_copy(w, from, sub, e);
}

static err_code copy_side_files(convert *c, tm_writer *w, err *e)
{
    const char *dir = weights_tokenizer_dir(c->src);
    char path[PATH_CAP];
    dir_list files;
    err_code rc = OK;

    if (!*dir) return OK; /* weights in memory */
    TRY(model_files_list(&files, dir, e));
    for (size_t i = 0; rc == OK && i < files.n; i++) rc = copy_twice(dir, files.names[i], w, e);
    dir_list_free(&files);
    if (rc == OK) rc = path_join(path, sizeof path, dir, "config.json", e);
    return rc == OK && file_exists(path) ? copy_twice(dir, "config.json", w, e) : rc;
}

err_code convert_write(convert *c, const char *path, bool force, err *e)
{
    tm_writer *w;
    TRY(tm_writer_open(&w, path, force, weights_digest(c->src), c->options, e));
    err_code rc = write_weights(c, w, e);
    if (rc == OK) rc = write_config(c, w, e);
    if (rc == OK) rc = copy_side_files(c, w, e);
    if (rc == OK) return tm_writer_commit(&w, e);
    tm_writer_abort(&w);
    return rc;
}

/* ---- comparing ---- */

typedef struct {
    const char *name, *path;
    file_map map;
    bool active;
    size_t at;
} compare_ctx;

static err_code compare_begin(void *ctx, const tm_file *f, err *e)
{
    compare_ctx *c = ctx;
    c->active = strcmp(f->name, c->name) == 0;
    c->at = 0;
    if (!c->active || c->map.size == f->bytes) return OK;
    return err_set(e, E_CHECK, "%s: expected %llu bytes, found %zu", c->path,
                   (unsigned long long)f->bytes, c->map.size);
}

static err_code compare_write(void *ctx, const void *data, size_t n, err *e)
{
    compare_ctx *c = ctx;
    const uint8_t *want = data, *found = c->map.data + c->at;
    if (!c->active) return OK;
    assert(n <= c->map.size - c->at);
    for (size_t i = 0; i < n && memcmp(want, found, n) != 0; i++)
        if (want[i] != found[i])
            return err_set(e, E_CHECK, "%s: byte %zu: expected %02x, found %02x", c->path,
                           c->at + i, want[i], found[i]);
    c->at += n;
    return OK;
}

static err_code compare_end(void *ctx, err *e)
{
    (void)ctx;
    (void)e;
    return OK;
}

err_code convert_compare(convert *c, const char *workspace, const char *name, err *e)
{
    char dir[PATH_CAP], path[PATH_CAP];
    compare_ctx ctx = {.name = name, .path = path};
    const convert_sink sink = {compare_begin, compare_write, compare_end, &ctx};
    size_t i = 0;

    while (i < c->n && strcmp(c->files[i].name, name) != 0) i++;
    if (i == c->n) return err_set(e, E_INPUT, "no file '%s' in this conversion", name);
    if (c->files[i].part == TM_SCALES) i -= 1;
    if (c->files[i].part == TM_ZEROS) i -= 2;
    TRY(path_join(dir, sizeof dir, workspace, TM_WEIGHTS_DIR, e));
    TRY(path_join(path, sizeof path, dir, name, e));
    TRY(file_map_open(&ctx.map, path, e));
    const err_code rc = convert_make(c, i, &sink, e);
    file_map_close(&ctx.map);
    return rc;
}
