/* Reader and writer of the calib artifact. */
#include "formats/calib_file.h"

#include <inttypes.h>
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"

#define MAX_LAYERS  4096
#define MAX_SAMPLES (1 << 20)
#define MAX_SEQLEN  (1 << 20)
#define MAX_K       (1 << 20)

struct calib_file {
    st_file *st;
    calib_info info;
    hash128 digest;
    tensor tokens, held_out;
};

int32_t calib_block_size(int64_t k)
{
    for (int32_t g = 128; g >= 32; g /= 2)
        if (k % g == 0) return g;
    for (int32_t g = 128; g > 1; g--)
        if (k % g == 0) return g;
    return 1;
}

tensor_role calib_tap_of(tensor_role r)
{
    if (r == ROLE_Q || r == ROLE_K || r == ROLE_V) return ROLE_QKV;
    return r == ROLE_UP ? ROLE_GATE : r;
}

const calib_tap *calib_find(const calib_block *b, tensor_role r)
{
    for (int i = 0; i < b->n_taps; i++)
        if (b->tap[i].tap == calib_tap_of(r)) return &b->tap[i];
    return NULL;
}

calib_block calib_shape(const model_desc *m)
{
    static const tensor_role taps[CALIB_TAPS] = {ROLE_QKV, ROLE_O, ROLE_GATE, ROLE_DOWN};
    calib_block b = {.n_taps = CALIB_TAPS};
    for (int i = 0; i < CALIB_TAPS; i++) {
        calib_tap *t = &b.tap[i];
        t->tap = taps[i];
        t->k = taps[i] == ROLE_O      ? (int64_t)m->heads * m->head_dim
               : taps[i] == ROLE_DOWN ? m->ffn
                                      : m->hidden;
        t->g = calib_block_size(t->k);
    }
    return b;
}

static void part_name(char buf[ARTIFACT_NAME_MAX], int32_t layer, tensor_role tap, const char *what)
{
    snprintf(buf, ARTIFACT_NAME_MAX, "layers.%d.%s.%s", (int)layer, role_name(tap), what);
}

/* ---- reading ---- */

static err_code get_tap(const calib_file *f, int32_t layer, calib_tap *t, err *e)
{
    char name[ARTIFACT_NAME_MAX];
    tensor count;
    part_name(name, layer, t->tap, "absmax");
    TRY(artifact_get(f->st, name, DT_F32, 1, (const int64_t[]){-1}, &t->absmax, e));
    t->k = t->absmax.shape[0];
    if (t->k < 1 || t->k > MAX_K)
        return err_set(e, E_INPUT, "%s: tensor '%s': expected 1 to %d channels, found %" PRId64,
                       st_path(f->st), name, MAX_K, t->k);
    t->g = calib_block_size(t->k);
    part_name(name, layer, t->tap, "abssum");
    TRY(artifact_get(f->st, name, DT_F64, 1, &t->k, &t->abssum, e));
    part_name(name, layer, t->tap, "count");
    TRY(artifact_get(f->st, name, DT_I64, 1, (const int64_t[]){1}, &count, e));
    memcpy(&t->count, count.data, sizeof t->count);
    if (t->count < 0)
        return err_set(e, E_INPUT, "%s: tensor '%s': expected 0 or more tokens, found %" PRId64,
                       st_path(f->st), name, t->count);
    part_name(name, layer, t->tap, "blocks");
    return artifact_get(f->st, name, DT_F32, 3, (const int64_t[]){t->k / t->g, t->g, t->g},
                        &t->blocks, e);
}

static err_code get_layer(const calib_file *f, int32_t layer, calib_block *b, err *e)
{
    const model_desc none = {.heads = 1, .head_dim = 1, .hidden = 1, .ffn = 1};
    *b = calib_shape(&none); /* which taps there are; widths come from the file */
    for (int i = 0; i < b->n_taps; i++) TRY(get_tap(f, layer, &b->tap[i], e));
    return OK;
}

static err_code bad_value(const calib_file *f, int32_t layer, const calib_tap *t, const char *what,
                          int64_t channel, double v, err *e)
{
    return err_set(e, E_INPUT,
                   "%s: layer %d: %s: %s of channel %" PRId64
                   ": expected a finite value of 0 or more, found %g",
                   st_path(f->st), (int)layer, role_name(t->tap), what, channel, v);
}

static err_code check_values(const calib_file *f, int32_t layer, const calib_tap *t, err *e)
{
    const float *mx = t->absmax.data, *h = t->blocks.data;
    const double *sum = t->abssum.data;
    const int64_t g = t->g;
    for (int64_t i = 0; i < t->k; i++) {
        if (!(mx[i] >= 0.f && isfinite(mx[i])))
            return bad_value(f, layer, t, "absmax", i, mx[i], e);
        if (!(sum[i] >= 0. && isfinite(sum[i])))
            return bad_value(f, layer, t, "abssum", i, sum[i], e);
        const float *row = h + i * g; /* row i%g of block i/g */
        for (int64_t j = 0; j < g; j++)
            if (!isfinite(row[j]) || (j == i % g && row[j] < 0.f))
                return bad_value(f, layer, t, "blocks", i, row[j], e);
    }
    return OK;
}

err_code calib_layer(const calib_file *f, int32_t layer, calib_block *view, err *e)
{
    if (layer < 0 || layer >= f->info.layers)
        return err_set(e, E_INPUT, "%s: expected layer 0 to %d, asked for %d", st_path(f->st),
                       (int)f->info.layers - 1, (int)layer);
    TRY(get_layer(f, layer, view, e));
    for (int i = 0; i < view->n_taps; i++) TRY(check_values(f, layer, &view->tap[i], e));
    return OK;
}

static err_code get_layers(const calib_file *f, int32_t *layers, err *e)
{
    const char *text;
    int n = 0, used = 0;
    TRY(artifact_meta(f->st, "layers", &text, e));
    if (sscanf(text, "%9d%n", &n, &used) != 1 || text[used] || n < 1 || n > MAX_LAYERS)
        return err_set(e, E_INPUT, "%s: layers: expected 1 to %d, found '%.32s'", st_path(f->st),
                       MAX_LAYERS, text);
    *layers = n;
    return OK;
}

static err_code get_windows(calib_file *f, err *e)
{
    TRY(artifact_get(f->st, "tokens", DT_I32, 2, (const int64_t[]){-1, -1}, &f->tokens, e));
    const int64_t n = f->tokens.shape[0], len = f->tokens.shape[1];
    if (n < 1 || n > MAX_SAMPLES || len < 1 || len > MAX_SEQLEN)
        return err_set(e, E_INPUT,
                       "%s: tensor 'tokens': expected [1..%d,1..%d], found [%" PRId64 ",%" PRId64
                       "]",
                       st_path(f->st), MAX_SAMPLES, MAX_SEQLEN, n, len);
    f->info.samples = (int32_t)n;
    f->info.seqlen = (int32_t)len;
    const int32_t *ids = f->tokens.data;
    for (int64_t i = 0; i < n * len; i++)
        if (ids[i] < 0)
            return err_set(e, E_INPUT, "%s: tensor 'tokens': expected ids of 0 or more, found %d",
                           st_path(f->st), (int)ids[i]);
    return artifact_get(f->st, "held_out", DT_U8, 1, &n, &f->held_out, e);
}

static err_code calib_check(calib_file *f, err *e)
{
    calib_block b;
    TRY(artifact_check(f->st, CALIB_KIND, CALIB_VERSION, e));
    TRY(get_layers(f, &f->info.layers, e));
    TRY(artifact_meta(f->st, "parent.model", &f->info.model, e));
    TRY(artifact_meta(f->st, "parent.tokenizer", &f->info.tokenizer, e));
    TRY(artifact_meta(f->st, "options", &f->info.options, e));
    TRY(get_windows(f, e));
    for (int32_t i = 0; i < f->info.layers; i++) TRY(get_layer(f, i, &b, e));
    const int64_t expected = 2 + (int64_t)f->info.layers * CALIB_TAPS * 4;
    if (st_count(f->st) != expected)
        return err_set(e, E_INPUT, "%s: expected %" PRId64 " tensors, found %" PRId64,
                       st_path(f->st), expected, st_count(f->st));
    return artifact_digest(f->st, &f->digest, e);
}

static err_code calib_take(calib_file **out, st_file *st, err *e)
{
    calib_file *f = NULL;
    err_code rc = mem_alloc((void **)&f, 1, sizeof *f, "calib file", e);
    if (rc != OK) {
        st_close(&st);
        return rc;
    }
    f->st = st;
    if ((rc = calib_check(f, e)) != OK) {
        calib_close(&f);
        return rc;
    }
    *out = f;
    return OK;
}

err_code calib_open(calib_file **out, const char *path, err *e)
{
    st_file *st = NULL;
    TRY(st_open(&st, path, e));
    return calib_take(out, st, e);
}

err_code calib_open_memory(calib_file **out, const void *data, size_t size, const char *name,
                           err *e)
{
    st_file *st = NULL;
    TRY(st_open_memory(&st, data, size, name, e));
    return calib_take(out, st, e);
}

void calib_close(calib_file **f)
{
    if (!*f) return;
    st_close(&(*f)->st);
    mem_free(*f);
    *f = NULL;
}

const calib_info *calib_info_of(const calib_file *f) { return &f->info; }
hash128 calib_digest(const calib_file *f) { return f->digest; }
tensor calib_tokens(const calib_file *f) { return f->tokens; }
tensor calib_held_out(const calib_file *f) { return f->held_out; }

err_code calib_check_model(const calib_file *f, const model_desc *m, const char *digest, err *e)
{
    const calib_block want = calib_shape(m);
    calib_block have;
    TRY(artifact_check_parent(f->st, "model", digest, e));
    if (f->info.layers != m->layers)
        return err_set(e, E_INPUT, "%s: expected %d layers, found %d", st_path(f->st),
                       (int)m->layers, (int)f->info.layers);
    for (int32_t l = 0; l < m->layers; l++) {
        TRY(get_layer(f, l, &have, e));
        for (int i = 0; i < want.n_taps; i++)
            if (have.tap[i].k != want.tap[i].k)
                return err_set(e, E_INPUT,
                               "%s: layer %d: %s: expected %" PRId64 " channels, found %" PRId64,
                               st_path(f->st), (int)l, role_name(want.tap[i].tap), want.tap[i].k,
                               have.tap[i].k);
    }
    const int32_t *ids = f->tokens.data;
    for (int64_t i = 0; i < tensor_count(&f->tokens); i++)
        if (ids[i] >= m->vocab)
            return err_set(e, E_INPUT, "%s: tensor 'tokens': expected ids below %d, found %d",
                           st_path(f->st), (int)m->vocab, (int)ids[i]);
    return OK;
}

/* ---- writing ---- */

err_code calib_put_layer(spool *s, int32_t layer, const calib_block *b, err *e)
{
    artifact_part parts[4 * CALIB_TAPS];
    int64_t counts[CALIB_TAPS];
    int n = 0;
    for (int i = 0; i < b->n_taps; i++) {
        const calib_tap *t = &b->tap[i];
        counts[i] = t->count;
        part_name(parts[n].name, layer, t->tap, "absmax");
        parts[n++].t = t->absmax;
        part_name(parts[n].name, layer, t->tap, "abssum");
        parts[n++].t = t->abssum;
        part_name(parts[n].name, layer, t->tap, "count");
        parts[n++].t = tensor_1d(&counts[i], DT_I64, 1);
        part_name(parts[n].name, layer, t->tap, "blocks");
        parts[n++].t = t->blocks;
    }
    return spool_put(s, layer, parts, n, e);
}

err_code calib_finish(spool *s, const calib_info *info, const tensor *tokens,
                      const tensor *held_out, err *e)
{
    const artifact_part extra[] = {{.name = "tokens", .t = *tokens},
                                   {.name = "held_out", .t = *held_out}};
    char layers[16];
    const char *meta[] = {
        "layers",        layers,    "parent.model", info->model, "parent.tokenizer",
        info->tokenizer, "options", info->options,  NULL};
    snprintf(layers, sizeof layers, "%d", (int)info->layers);
    return spool_finish(s, meta, extra, 2, e);
}
