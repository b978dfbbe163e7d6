/* One block at a time over many windows. */
#include "runtime/layer_walk.h"

#include <inttypes.h>
#include <stdatomic.h>
#include <string.h>

#include "base/mem.h"
#include "kernels/search_ops.h"
#include "runtime/kv_cache.h"

/* Rows of a pass: enough for the kernels, small beside the states. Fixed, since the order of sums
 * over rows depends on it. */
#define PASS_ROWS 2048
/* Bytes of pinned states; beyond, the second stream is on the device. */
#define HOST_STATES ((int64_t)3350 * 1000 * 1000)
#define KV_BLOCK    64

struct layer_walk {
    device *d;
    weight_src *src;
    const model_desc *m;
    int32_t windows, seqlen, per_pass, seq_blocks;
    dtype kept;   /* of the states: dev_resid's on the CPU, else f16, half the bytes to copy */
    void *states; /* [streams, windows*seqlen, hidden]; staged: of stream 0 */
    /* Staged: stream 1, of which the host holds what the limit leaves and the device the rest. */
    void *second;
    dev_buf second_buf;
    int64_t second_rows; /* on the host */
    int stream, streams;
    dev_buf x_buf; /* resid [per_pass*seqlen, hidden] */
    dev_buf in_buf,
        out_buf; /* states on their way; nothing where the device's memory is the host's */
    struct {
        int stream;
        int32_t first, n; /* n 0: nothing is coming */
    } coming;
    block b;
    bool bound;
    block_scratch *scratch;
    kv_cache *kv;
    kv_cache *kv_second; /* of stream 1; NULL: it uses kv */
    int loaded;          /* the stream that the rows of this pass are of */
    int32_t *ints;       /* host: pos, seq_start, kv_len, table, one behind the other */
    dev_buf pos_buf, start_buf, len_buf, table_buf, freq_buf;
    batch_rows full; /* of a whole pass; the last may have fewer sequences */
    float *inv_freq;
    rope_spec rope;
};

static int32_t per_pass_of(int32_t windows, int32_t seqlen)
{
    const int32_t n = seqlen < PASS_ROWS ? PASS_ROWS / seqlen : 1;
    return n < windows ? n : windows;
}

int64_t layer_walk_pass_rows(int32_t windows, int32_t seqlen)
{
    return (int64_t)per_pass_of(windows, seqlen) * seqlen;
}

static kv_opts kv_opts_for(const model_desc *m, int32_t per_pass, int32_t seqlen)
{
    return (kv_opts){.format = KV_16, /* of stream 0, and of both where nothing else is said */
                     .layers = 1,
                     .kv_heads = m->kv_heads,
                     .head_dim = m->head_dim,
                     .block_tokens = KV_BLOCK,
                     .blocks = per_pass * ((seqlen + KV_BLOCK - 1) / KV_BLOCK),
                     .max_seqs = per_pass,
                     .max_seq_tokens = seqlen};
}

static dtype kept_as(const device *d) { return dev_mem(d) == MEM_HOST ? dev_resid(d) : DT_F16; }

size_t layer_walk_bytes(const device *d, const model_desc *m, weight_src *src, int32_t windows,
                        int32_t seqlen)
{
    const int32_t per_pass = per_pass_of(windows, seqlen);
    const kv_opts o = kv_opts_for(m, per_pass, seqlen);
    const size_t row = (size_t)m->hidden * dtype_bytes(dev_resid(d)),
                 kept = (size_t)m->hidden * dtype_bytes(kept_as(d)),
                 pass = (size_t)per_pass * (size_t)seqlen;
    return (size_t)windows * (size_t)seqlen * kept + pass * row +
           (dev_mem(d) == MEM_HOST ? 0 : 2 * pass * kept) + kv_bytes(&o) +
           block_scratch_bytes(d, m, per_pass * seqlen, per_pass, seqlen) +
           block_bind_bytes(d, m, src);
}

/* ---- opening ---- */

static err_code upload_ints(layer_walk *w, dev_buf *buf, tensor *out, int32_t *host, int ndim,
                            int64_t n0, int64_t n1, err *e)
{
    const tensor t = ndim == 1 ? tensor_1d(host, DT_I32, n0) : tensor_2d(host, DT_I32, n0, n1);
    return dev_upload(w->d, buf, out, &t, e);
}

static err_code open_rows(layer_walk *w, err *e)
{
    const int64_t rows = (int64_t)w->per_pass * w->seqlen, seqs = w->per_pass;
    const int64_t count = rows + seqs + 1 + seqs + seqs * w->seq_blocks;
    void *mem;
    TRY(mem_alloc(&mem, (size_t)count, sizeof(int32_t), "rows of a pass", e));
    w->ints = mem;
    int32_t *pos = w->ints, *start = pos + rows, *len = start + seqs + 1, *table = len + seqs;
    for (int64_t i = 0; i < rows; i++) pos[i] = (int32_t)(i % w->seqlen);
    for (int32_t s = 0; s < w->per_pass; s++) {
        int32_t n;
        TRY(kv_reserve(w->kv, s, w->seqlen, e));
        const int32_t *blocks = kv_block_list(w->kv, s, &n);
        memcpy(table + (int64_t)s * w->seq_blocks, blocks, (size_t)n * sizeof *blocks);
        start[s + 1] = (s + 1) * w->seqlen;
        len[s] = w->seqlen;
    }
    w->full.seqs = w->per_pass;
    w->full.max_q = w->full.max_kv = w->seqlen;
    TRY(upload_ints(w, &w->pos_buf, &w->full.pos, pos, 1, rows, 0, e));
    TRY(upload_ints(w, &w->start_buf, &w->full.seq_start, start, 1, seqs + 1, 0, e));
    TRY(upload_ints(w, &w->len_buf, &w->full.kv_len, len, 1, seqs, 0, e));
    return upload_ints(w, &w->table_buf, &w->full.block_table, table, 2, seqs, w->seq_blocks, e);
}

static err_code open_rope(layer_walk *w, err *e)
{
    const int64_t n = w->m->rope_dims / 2;
    void *mem;
    TRY(mem_alloc(&mem, (size_t)n, sizeof(float), "rotary frequencies", e));
    w->inv_freq = mem;
    model_inv_freq(w->m, w->seqlen > w->m->max_tokens ? w->seqlen : w->m->max_tokens, w->inv_freq,
                   &w->rope.mscale);
    w->rope.dims = w->m->rope_dims;
    w->rope.interleaved = w->m->rope_interleaved;
    const tensor host = tensor_1d(w->inv_freq, DT_F32, n);
    return dev_upload(w->d, &w->freq_buf, &w->rope.inv_freq, &host, e);
}

static bool staged(const layer_walk *w) { return dev_mem(w->d) != MEM_HOST; }

static tensor rows_at(const layer_walk *w, void *base, dtype dt, int64_t first, int64_t rows,
                      memspace mem)
{
    tensor t = tensor_2d((char *)base + (size_t)(first * w->m->hidden) * dtype_bytes(dt), dt, rows,
                         w->m->hidden);
    t.mem = mem;
    return t;
}

/* The first rows of the residual stream of a pass, or of the states on their way. */
static tensor pass_rows(const layer_walk *w, const dev_buf *b, dtype dt, int64_t rows)
{
    return rows_at(w, b->data, dt, 0, rows, dev_mem(w->d));
}

static tensor state_rows(const layer_walk *w, int stream, int64_t first, int64_t rows)
{
    const int64_t all = (int64_t)w->windows * w->seqlen;
    if (!stream || !staged(w))
        return rows_at(w, w->states, w->kept, stream * all + first, rows, MEM_HOST);
    if (first < w->second_rows) return rows_at(w, w->second, w->kept, first, rows, MEM_HOST);
    return rows_at(w, w->second_buf.data, w->kept, first - w->second_rows, rows, dev_mem(w->d));
}

/* ---- states in and out ---- */

err_code layer_walk_prefetch(layer_walk *w, int stream, int32_t first, int32_t n, err *e)
{
    const int64_t rows = (int64_t)n * w->seqlen;
    if (!staged(w) || n < 1) return OK;
    const tensor from = state_rows(w, stream, (int64_t)first * w->seqlen, rows);
    tensor to = pass_rows(w, &w->in_buf, w->kept, rows);
    TRY(dev_order(w->d, LANE_OPS, LANE_IN, e)); /* what lay there has been taken */
    TRY(dev_order(w->d, LANE_OUT, LANE_IN, e)); /* what was stored has arrived */
    TRY(dev_copy_beside(w->d, &to, &from, LANE_IN, e));
    w->coming.stream = stream;
    w->coming.first = first;
    w->coming.n = n;
    return OK;
}

err_code layer_walk_load(layer_walk *w, int stream, int32_t first, int32_t n, tensor *x, err *e)
{
    const int64_t rows = (int64_t)n * w->seqlen;
    w->loaded = stream;
    *x = pass_rows(w, &w->x_buf, dev_resid(w->d), rows);
    if (!staged(w)) {
        const tensor from = state_rows(w, stream, (int64_t)first * w->seqlen, rows);
        return dev_copy(w->d, x, &from, e);
    }
    if (w->coming.n != n || w->coming.first != first || w->coming.stream != stream)
        TRY(layer_walk_prefetch(w, stream, first, n, e));
    w->coming.n = 0;
    const tensor in = pass_rows(w, &w->in_buf, w->kept, rows);
    TRY(dev_order(w->d, LANE_IN, LANE_OPS, e));
    return op_mix(w->d, x, 1.f, &in, 0.f, NULL, e);
}

err_code layer_walk_store(layer_walk *w, int stream, int32_t first, const tensor *x, err *e)
{
    tensor to = state_rows(w, stream, (int64_t)first * w->seqlen, x->shape[0]);
    if (!staged(w)) return dev_copy(w->d, &to, x, e);
    tensor out = pass_rows(w, &w->out_buf, w->kept, x->shape[0]);
    TRY(dev_order(w->d, LANE_OUT, LANE_OPS, e)); /* what lay there has been copied */
    TRY(op_mix(w->d, &out, 1.f, x, 0.f, NULL, e));
    TRY(dev_order(w->d, LANE_OPS, LANE_OUT, e));
    return dev_copy_beside(w->d, &to, &out, LANE_OUT, e);
}

err_code layer_walk_settle(layer_walk *w, err *e)
{
    TRY(dev_order(w->d, LANE_OUT, LANE_OPS, e));
    return dev_sync(w->d, e);
}

static err_code embed(layer_walk *w, const tensor *tokens, err *e)
{
    dev_buf table_buf = {0}, ids_buf = {0};
    tensor host, table, ids;
    err_code rc;
    TRY(weights_check_layer(w->src, -1, NULL, NULL, e));
    TRY(weights_tensor(w->src, ROLE_EMBED, -1, &host, e));
    if ((rc = dev_upload(w->d, &table_buf, &table, &host, e)) != OK) goto done;
    for (int32_t at = 0; at < w->windows; at += w->per_pass) {
        const int32_t n = w->windows - at < w->per_pass ? w->windows - at : w->per_pass;
        const int64_t first = (int64_t)at * w->seqlen, rows = (int64_t)n * w->seqlen;
        const tensor part = tensor_1d((int32_t *)tokens->data + first, DT_I32, rows);
        tensor x = pass_rows(w, &w->x_buf, dev_resid(w->d), rows);
        dev_free(&ids_buf);
        if ((rc = dev_upload(w->d, &ids_buf, &ids, &part, e)) != OK) goto done;
        if ((rc = op_embed(w->d, &x, &table, &ids, e)) != OK) goto done;
        if ((rc = layer_walk_store(w, 0, at, &x, e)) != OK) goto done;
    }
    rc = layer_walk_settle(w, e);
done:
    dev_free(&ids_buf);
    dev_free(&table_buf);
    return rc;
}

/* Streams begin equal. */
static err_code copy_stream(layer_walk *w, err *e)
{
    if (w->streams < 2) return OK;
    for (int32_t at = 0; at < w->windows; at += w->per_pass) {
        const int32_t n = w->windows - at < w->per_pass ? w->windows - at : w->per_pass;
        const int64_t first = (int64_t)at * w->seqlen, rows = (int64_t)n * w->seqlen;
        const tensor from = state_rows(w, 0, first, rows);
        tensor to = state_rows(w, 1, first, rows);
        TRY(dev_copy(w->d, &to, &from, e));
    }
    return dev_sync(w->d, e);
}

err_code layer_walk_restart(layer_walk *w, const tensor *tokens, err *e)
{
    TRY(embed(w, tokens, e));
    return copy_stream(w, e);
}

/* Both streams beside each other on the host would need more than its share: whole passes of the
 * second go to the device. */
static err_code split_staged(layer_walk *w, err *e)
{
    const int64_t row = w->m->hidden * (int64_t)dtype_bytes(w->kept),
                  all = (int64_t)w->windows * w->seqlen, pass = (int64_t)w->per_pass * w->seqlen,
                  left = HOST_STATES / row - all;
    w->second_rows = left >= all ? all : left > 0 ? left / pass * pass : 0;
    TRY(dev_host_alloc(&w->second, w->d, (size_t)(w->second_rows * row), "hidden states", e));
    return dev_alloc(&w->second_buf, w->d, (size_t)((all - w->second_rows) * row), "hidden states",
                     e);
}

err_code layer_walk_split(layer_walk *w, err *e)
{
    const tensor one = layer_walk_states(w);
    const size_t bytes = tensor_bytes(&one);
    void *both;
    if (w->streams > 1) return OK;
    if (staged(w)) {
        TRY(split_staged(w, e));
    } else {
        TRY(mem_alloc(&both, 2, bytes, "hidden states", e));
        memcpy(both, w->states, bytes);
        mem_free(w->states);
        w->states = both;
    }
    w->streams = 2;
    return copy_stream(w, e);
}

size_t layer_walk_cache_bytes(const model_desc *m, int32_t windows, int32_t seqlen,
                              kv_format format)
{
    kv_opts o = kv_opts_for(m, per_pass_of(windows, seqlen), seqlen);
    o.format = format;
    return format == KV_16 ? 0 : kv_bytes(&o);
}

err_code layer_walk_cache(layer_walk *w, kv_format format, err *e)
{
    kv_opts o = kv_opts_for(w->m, w->per_pass, w->seqlen);
    o.format = format;
    TRY(kv_open(&w->kv_second, w->d, &o, e));
    for (int32_t s = 0; s < w->per_pass; s++) /* the same blocks as the first one's: one table */
        TRY(kv_reserve(w->kv_second, s, w->seqlen, e));
    return OK;
}

void layer_walk_use(layer_walk *w, int stream) { w->stream = stream; }

tensor layer_walk_residual(const layer_walk *w, int64_t rows)
{
    return pass_rows(w, &w->x_buf, dev_resid(w->d), rows);
}

static err_code open_all(layer_walk *w, const tensor *tokens, err *e)
{
    const int32_t rows = w->per_pass * w->seqlen;
    const size_t row = (size_t)w->m->hidden * dtype_bytes(dev_resid(w->d));
    const kv_opts o = kv_opts_for(w->m, w->per_pass, w->seqlen);
    const size_t kept = (size_t)w->m->hidden * dtype_bytes(w->kept);
    size_t bytes;
    TRY(mem_mul(&bytes, (size_t)w->windows * (size_t)w->seqlen, kept, "hidden states", e));
    TRY(dev_host_alloc(&w->states, w->d, bytes, "hidden states", e));
    TRY(dev_alloc(&w->x_buf, w->d, (size_t)rows * row, "rows of a pass", e));
    if (staged(w)) {
        TRY(dev_alloc(&w->in_buf, w->d, (size_t)rows * kept, "rows of a pass", e));
        TRY(dev_alloc(&w->out_buf, w->d, (size_t)rows * kept, "rows of a pass", e));
    }
    TRY(block_scratch_open(&w->scratch, w->d, w->m, rows, w->per_pass, w->seqlen, e));
    TRY(kv_open(&w->kv, w->d, &o, e));
    TRY(open_rows(w, e));
    TRY(open_rope(w, e));
    return layer_walk_restart(w, tokens, e);
}

err_code layer_walk_open(layer_walk **out, device *d, weight_src *src, const tensor *tokens, err *e)
{
    const int64_t windows = tokens->shape[0], seqlen = tokens->shape[1];
    void *mem;
    if (windows < 1 || seqlen < 1 || windows > INT32_MAX / seqlen)
        return err_set(e, E_LIMIT, "windows: expected 1 to 2^31 tokens, got %" PRId64 " x %" PRId64,
                       windows, seqlen);
    TRY(mem_alloc(&mem, 1, sizeof(layer_walk), "layer walk", e));
    layer_walk *w = mem;
    w->d = d;
    w->src = src;
    w->m = weights_desc(src);
    w->windows = (int32_t)windows;
    w->seqlen = (int32_t)seqlen;
    w->streams = 1;
    w->kept = kept_as(d);
    w->per_pass = per_pass_of(w->windows, w->seqlen);
    w->seq_blocks = (w->seqlen + KV_BLOCK - 1) / KV_BLOCK;
    const err_code rc = open_all(w, tokens, e);
    if (rc != OK) {
        layer_walk_close(&w);
        return rc;
    }
    *out = w;
    return OK;
}

void layer_walk_close(layer_walk **out)
{
    layer_walk *w = *out;
    if (!w) return;
    dev_buf *const bufs[] = {&w->x_buf,   &w->in_buf,    &w->out_buf,  &w->pos_buf,   &w->start_buf,
                             &w->len_buf, &w->table_buf, &w->freq_buf, &w->second_buf};
    if (w->bound) block_free(&w->b);
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    block_scratch_close(&w->scratch);
    kv_close(&w->kv);
    kv_close(&w->kv_second);
    mem_free(w->ints);
    mem_free(w->inv_freq);
    dev_host_free(w->d, w->states);
    dev_host_free(w->d, w->second);
    mem_free(w);
    *out = NULL;
}

tensor layer_walk_states(layer_walk *w)
{
    return state_rows(w, w->stream, 0, (int64_t)w->windows * w->seqlen);
}

err_code layer_walk_pick(layer_walk *w, int64_t stride, tensor *to, err *e)
{
    for (int64_t i = 0; i < to->shape[0]; i++) {
        const tensor from = state_rows(w, w->stream, i * stride, 1);
        tensor row = tensor_rows(to, i, 1);
        TRY(dev_copy(w->d, &row, &from, e));
    }
    return OK;
}

dtype layer_walk_kept(const layer_walk *w) { return w->kept; }

bool layer_walk_saves(const layer_walk *w) { return !staged(w) || w->streams == 1; }

tensor layer_walk_saved(layer_walk *w)
{
    return state_rows(w, 0, 0, (int64_t)w->streams * w->windows * w->seqlen);
}

int32_t layer_walk_windows(const layer_walk *w) { return w->windows; }
int32_t layer_walk_windows_per_pass(const layer_walk *w) { return w->per_pass; }
const block *layer_walk_block(const layer_walk *w) { return &w->b; }

/* ---- binding ---- */

#define CHECK_ROWS 256 /* of an item */

typedef struct {
    tensor part[7]; /* [n,k] */
    int64_t end[7]; /* items up to and with each part */
    int n;
    atomic_bool bad;
} finite_job;

static void check_item(void *ctx, int64_t item, int worker)
{
    finite_job *j = ctx;
    int i = 0;
    err ignored;
    (void)worker;
    while (item >= j->end[i]) i++;
    const int64_t from = (item - (i ? j->end[i - 1] : 0)) * CHECK_ROWS,
                  left = j->part[i].shape[0] - from;
    const tensor rows = tensor_rows(&j->part[i], from, left < CHECK_ROWS ? left : CHECK_ROWS);
    if (weights_check_tensor(&rows, "", NULL, NULL, &ignored) != OK) atomic_store(&j->bad, true);
}

/* The large matrices on all threads, which also brings their pages; whatever is found is told by
 * weights_check_layer. */
static bool finite_layer(layer_walk *w, int32_t layer)
{
    tensor_role roles[7];
    finite_job j = {.n = model_block_linears(w->m, roles)};
    int64_t items = 0;
    err ignored;
    for (int i = 0; i < j.n; i++) {
        linear_view v;
        if (weights_linear(w->src, roles[i], layer, -1, &v, &ignored) != OK || v.w4 ||
            v.bias.data || !tensor_contiguous(&v.dense))
            return false;
        j.part[i] = v.dense;
        j.end[i] = items += (v.dense.shape[0] + CHECK_ROWS - 1) / CHECK_ROWS;
    }
    pool_run(dev_pool(w->d), check_item, &j, items);
    return !atomic_load(&j.bad);
}

static err_code check_norms(layer_walk *w, int32_t layer, err *e)
{
    static const tensor_role norms[] = {ROLE_ATTN_NORM, ROLE_FFN_NORM, ROLE_Q_NORM, ROLE_K_NORM};
    tensor view;
    for (int i = 0; i < (w->m->qk_norm ? 4 : 2); i++) {
        TRY(weights_tensor(w->src, norms[i], layer, &view, e));
        TRY(weights_check_tensor(&view, role_name(norms[i]), NULL, NULL, e));
    }
    return OK;
}

static err_code check_layer(layer_walk *w, int32_t layer, err *e)
{
    err ignored;
    if (finite_layer(w, layer) && check_norms(w, layer, &ignored) == OK) return OK;
    return weights_check_layer(w->src, layer, NULL, NULL, e);
}

err_code layer_walk_bind(layer_walk *w, int32_t layer, err *e)
{
    if (w->bound) {
        weights_release(w->src, w->b.layer);
        block_free(&w->b);
        w->bound = false;
    }
    weights_prefetch(w->src, layer);
    TRY(check_layer(w, layer, e));
    TRY(block_bind(&w->b, w->d, w->src, layer, e));
    w->bound = true;
    return OK;
}

/* ---- running ---- */

err_code layer_walk_forward(layer_walk *w, const block *b, tensor *x, tap_fn tap, void *tap_ctx,
                            err *e)
{
    batch_rows rows = w->full;
    const kv_layer kv = kv_layer_view(w->loaded && w->kv_second ? w->kv_second : w->kv, 0);
    const int32_t n = (int32_t)(x->shape[0] / w->seqlen);
    rows.seqs = n;
    rows.pos.shape[0] = (int64_t)n * w->seqlen;
    rows.seq_start.shape[0] = n + 1;
    rows.kv_len.shape[0] = n;
    rows.block_table.shape[0] = n;
    return block_forward(b, w->d, w->scratch, &w->rope, x, &kv, &rows, tap, tap_ctx, e);
}

err_code layer_walk_feed_forward(layer_walk *w, const block *b, tensor *x, tap_fn tap,
                                 void *tap_ctx, err *e)
{
    return block_feed_forward(b, w->d, w->scratch, x, tap, tap_ctx, e);
}

err_code layer_walk_pass(layer_walk *w, const block *b, int32_t first, int32_t n, tap_fn tap,
                         void *tap_ctx, tensor *y, err *e)
{
    tensor x;
    TRY(layer_walk_load(w, w->stream, first, n, &x, e));
    err failure = {0};
    const err_code rc = layer_walk_forward(w, b, &x, tap, tap_ctx, &failure);
    if (rc != OK && !(rc == E_CANCELED && tap)) {
        *e = failure;
        return rc;
    }
    if (rc == OK && y) *y = x;
    return dev_sync(w->d, e);
}

/* On the CPU in place; else the next states come and the last go while this pass runs. */
static err_code run_pass(layer_walk *w, int32_t first, int32_t n, bool keep, tap_fn tap,
                         void *tap_ctx, err *e)
{
    const int32_t next = first + n, left = w->windows - next;
    tensor x;
    if (!staged(w) && !keep) {
        x = state_rows(w, w->stream, (int64_t)first * w->seqlen, (int64_t)n * w->seqlen);
        w->loaded = w->stream;
        return layer_walk_forward(w, &w->b, &x, tap, tap_ctx, e);
    }
    TRY(layer_walk_load(w, w->stream, first, n, &x, e));
    TRY(layer_walk_prefetch(w, w->stream, next, left < w->per_pass ? left : w->per_pass, e));
    TRY(layer_walk_forward(w, &w->b, &x, tap, tap_ctx, e));
    return keep ? OK : layer_walk_store(w, w->stream, first, &x, e);
}

err_code layer_walk_run(layer_walk *w, bool keep, tap_fn tap, void *tap_ctx, const walk_progress *p,
                        err *e)
{
    for (int32_t at = 0; at < w->windows; at += w->per_pass) {
        const int32_t n = w->windows - at < w->per_pass ? w->windows - at : w->per_pass;
        TRY(job_check(p->j, e));
        TRY(run_pass(w, at, n, keep, tap, tap_ctx, e));
        if (!p->stage) continue;
        job_step(p->j, p->stage, "window",
                 p->base + (p->each > 0 ? (int64_t)(p->each * (at + n)) : at + n), p->total);
    }
    return layer_walk_settle(w, e);
}
