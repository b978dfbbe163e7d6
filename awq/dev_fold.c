/* Folding for the cache on a device: sampled tokens become q, k and v there, all candidates of all
 * heads are tried without a wait between them, and one number each comes back. */
#include "awq/dev_fold.h"

#include <math.h>
#include <string.h>

#include "awq/fold.h"
#include "awq/kv_fold.h"
#include "base/mem.h"
#include "kernels/search_ops.h"
#include "runtime/layer_walk.h"

#define POINTS KV_FOLD_POINTS

typedef struct {
    const quant_block *b;
    device *d;
    const model_desc *m;
    int64_t n, cols, heads; /* samples; columns of q, k and v; heads of k and v */
    dev_buf own;
    /* On the device. */
    void *rows, *x, *qkv; /* [n,hidden] states and act, act [n,cols] */
    void *o;              /* act [hidden,hd] */
    float *errors, *work; /* [POINTS * n, hd] */
    float *metric;        /* [hd,hd] */
    float *squares;       /* [heads,hd] sums of k's and v's channels squared */
    float *factors;       /* [heads,POINTS,hd] */
    double *sums;         /* [heads,POINTS] */
    int32_t *pos;         /* [n] */
    float *inv_freq;      /* [rope_dims/2] */
    /* The same on the host. */
    arena mem;
    float *host_squares, *host_factors, *host_freq;
    double *host_sums, *rms; /* rms [hd] */
    int32_t *host_pos;
    float mscale;
} dev_folds;

/* ---- memory ---- */

typedef struct {
    void **out;
    size_t bytes;
} fold_part;
enum { DEVICE_PARTS = 12, HOST_PARTS = 6 };

static size_t act_bytes(const device *d, int64_t count)
{
    return (size_t)count * dtype_bytes(dev_act(d));
}

static void device_parts(dev_folds *f, const device *d, const model_desc *m, int64_t n,
                         fold_part p[DEVICE_PARTS])
{
    const int64_t hd = m->head_dim, heads = 2 * m->kv_heads, half = m->rope_dims / 2;
    const size_t s = sizeof(float);
    const fold_part parts[DEVICE_PARTS] = {
        {&f->rows, (size_t)(n * m->hidden) * s}, /* f32 at most */
        {&f->x, act_bytes(d, n * m->hidden)},
        {&f->qkv, act_bytes(d, n * (m->heads * hd + heads * hd))},
        {&f->o, act_bytes(d, m->hidden * hd)},
        {(void **)&f->errors, (size_t)(POINTS * n * hd) * s},
        {(void **)&f->work, (size_t)(POINTS * n * hd) * s},
        {(void **)&f->metric, (size_t)(hd * hd) * s},
        {(void **)&f->squares, (size_t)(heads * hd) * s},
        {(void **)&f->factors, (size_t)(heads * POINTS * hd) * s},
        {(void **)&f->sums, (size_t)(heads * POINTS) * sizeof(double)},
        {(void **)&f->pos, (size_t)n * sizeof(int32_t)},
        {(void **)&f->inv_freq, (size_t)half * s}};
    for (int i = 0; i < DEVICE_PARTS; i++) p[i] = parts[i];
}

static size_t device_need(const fold_part p[DEVICE_PARTS])
{
    size_t sum = 0;
    for (int i = 0; i < DEVICE_PARTS; i++) sum += (p[i].bytes + 255) & ~(size_t)255;
    return sum;
}

size_t dev_fold_bytes(const device *d, const model_desc *m)
{
    dev_folds f;
    fold_part p[DEVICE_PARTS];
    device_parts(&f, d, m, KV_FOLD_SAMPLES, p);
    return device_need(p);
}

static err_code device_room(dev_folds *f, const dev_buf *lent, err *e)
{
    fold_part p[DEVICE_PARTS];
    device_parts(f, f->d, f->m, f->n, p);
    const size_t need = device_need(p);
    const bool fits = lent && lent->bytes >= need;
    if (!fits) TRY(dev_alloc(&f->own, f->d, need, "keys and values", e));
    uint8_t *at = fits ? lent->data : f->own.data;
    for (int i = 0; i < DEVICE_PARTS; at += (p[i].bytes + 255) & ~(size_t)255, i++) *p[i].out = at;
    return OK;
}

static err_code host_room(dev_folds *f, err *e)
{
    const size_t hd = (size_t)f->m->head_dim, heads = (size_t)f->heads, s = sizeof(float);
    const fold_part p[HOST_PARTS] = {{(void **)&f->host_squares, heads * hd * s},
                                     {(void **)&f->host_factors, heads * POINTS * hd * s},
                                     {(void **)&f->host_freq, hd * s},
                                     {(void **)&f->host_sums, heads * POINTS * sizeof(double)},
                                     {(void **)&f->rms, hd * sizeof(double)},
                                     {(void **)&f->host_pos, (size_t)f->n * sizeof(int32_t)}};
    size_t need = 0;
    for (int i = 0; i < HOST_PARTS; i++) need += arena_need(p[i].bytes);
    TRY(arena_init(&f->mem, need, "keys and values", e));
    for (int i = 0; i < HOST_PARTS; i++) TRY(arena_get(&f->mem, p[i].out, p[i].bytes, e));
    return OK;
}

/* Largest products: of the samples by the weights, and of their errors by a head's metric. */
static err_code reserve(const dev_folds *f, err *e)
{
    op_limits lim = {.rows = (int32_t)(f->n > f->m->hidden ? f->n : f->m->hidden),
                     .k = f->m->hidden > f->m->head_dim ? f->m->hidden : f->m->head_dim,
                     .n = f->cols,
                     .heads = 1,
                     .head_dim = f->m->head_dim,
                     .max_kv = 1,
                     .seqs = 1};
    TRY(ops_reserve(f->d, &lim, e));
    lim.rows = (int32_t)(POINTS * f->n);
    lim.k = lim.n = f->m->head_dim;
    return ops_reserve(f->d, &lim, e);
}

/* ---- parts ---- */

static tensor on_device(const dev_folds *f, void *data, dtype dt, int64_t n, int64_t k)
{
    tensor t = tensor_2d(data, dt, n, k);
    t.mem = dev_mem(f->d);
    return t;
}

static err_code put(const dev_folds *f, void *to, const void *from, size_t bytes, err *e)
{
    const tensor src = tensor_2d((void *)(uintptr_t)from, DT_U8, 1, (int64_t)bytes);
    tensor dst = on_device(f, to, DT_U8, 1, (int64_t)bytes);
    return dev_copy(f->d, &dst, &src, e);
}

static err_code get(const dev_folds *f, void *to, const void *from, size_t bytes, err *e)
{
    const tensor src = on_device(f, (void *)(uintptr_t)from, DT_U8, 1, (int64_t)bytes);
    tensor dst = tensor_2d(to, DT_U8, 1, (int64_t)bytes);
    TRY(dev_copy(f->d, &dst, &src, e));
    return dev_sync(f->d, e);
}

/* Head h of q, k or v: act [n,hd]. */
static tensor head_of(const dev_folds *f, tensor_role part, int32_t h)
{
    const tensor all = on_device(f, f->qkv, dev_act(f->d), f->n, f->cols);
    return tensor_cols(&all, fold_head_col(f->m, part, h), f->m->head_dim);
}

/* Heads of k, then of v, as they are counted in squares, factors and sums. */
static tensor head_at(const dev_folds *f, int64_t i)
{
    const int32_t kv = f->m->kv_heads, h = (int32_t)(i % kv);
    return head_of(f, i < kv ? ROLE_K : ROLE_V, h);
}

/* ---- sampled tokens ---- */

static err_code turn(dev_folds *f, tensor_role part, int32_t h, err *e)
{
    const tensor head = head_of(f, part, h);
    tensor x = head, pos = tensor_1d(f->pos, DT_I32, f->n);
    rope_spec r = {tensor_1d(f->inv_freq, DT_F32, f->m->rope_dims / 2), f->m->rope_dims,
                   f->m->rope_interleaved, f->mscale};
    pos.mem = r.inv_freq.mem = dev_mem(f->d);
    x.ndim = 3;
    x.shape[1] = x.stride[2] = 1;
    x.shape[2] = x.stride[1] = f->m->head_dim;
    return op_turn(f->d, &x, &pos, &r, e);
}

static err_code turn_all(dev_folds *f, int64_t stride, err *e)
{
    layer_walk *w = f->b->walk;
    const int64_t seqlen = layer_walk_states(w).shape[0] / layer_walk_windows(w);
    for (int64_t i = 0; i < f->n; i++) f->host_pos[i] = (int32_t)(i * stride % seqlen);
    model_inv_freq(f->m, f->m->max_tokens, f->host_freq, &f->mscale);
    TRY(put(f, f->pos, f->host_pos, (size_t)f->n * sizeof(int32_t), e));
    TRY(put(f, f->inv_freq, f->host_freq, (size_t)(f->m->rope_dims / 2) * sizeof(float), e));
    for (int32_t h = 0; h < f->m->heads; h++) TRY(turn(f, ROLE_Q, h, e));
    for (int32_t h = 0; h < f->m->kv_heads; h++) TRY(turn(f, ROLE_K, h, e));
    return OK;
}

static err_code sample(dev_folds *f, int64_t stride, err *e)
{
    tensor rows = on_device(f, f->rows, layer_walk_kept(f->b->walk), f->n, f->m->hidden),
           x = on_device(f, f->x, dev_act(f->d), f->n, f->m->hidden);
    const tensor all = on_device(f, f->qkv, dev_act(f->d), f->n, f->cols);
    TRY(kv_fold_samples(f->b, stride, &rows, &x, &all, e));
    return f->m->qk_norm ? OK : turn_all(f, stride, e);
}

/* ---- candidates ---- */

/* Factors of all candidates from what the channels of k and v sum up to. */
static err_code make_candidates(dev_folds *f, int64_t first, err *e)
{
    const int64_t hd = f->m->head_dim;
    tensor square = on_device(f, f->metric, DT_F32, hd, hd);
    for (int64_t i = first; i < f->heads; i++) {
        const tensor x = head_at(f, i);
        tensor sums = tensor_1d(f->squares + i * hd, DT_F32, hd);
        sums.mem = dev_mem(f->d);
        TRY(op_zero(f->d, &square, e));
        TRY(op_gram(f->d, &square, &x, e));
        TRY(op_diagonal(f->d, &sums, &square, e));
    }
    TRY(get(f, f->host_squares, f->squares, (size_t)(f->heads * hd) * sizeof(float), e));
    for (int64_t i = first; i < f->heads; i++) {
        for (int64_t c = 0; c < hd; c++)
            f->rms[c] = sqrt((double)f->host_squares[i * hd + c] / (double)f->n);
        kv_fold_rms(f->m, f->rms, i < f->m->kv_heads);
        for (int p = 0; p < POINTS; p++)
            kv_fold_candidate(f->rms, hd, p, f->host_factors + (i * POINTS + p) * hd);
    }
    return put(f, f->factors, f->host_factors, (size_t)(f->heads * POINTS * hd) * sizeof(float), e);
}

/* What errors of head i count by: those of k reach the scores through all heads of q that read it,
 * those of v the residual stream through o's columns. */
static err_code make_metric(dev_folds *f, int64_t i, err *e)
{
    const int32_t kv = f->m->kv_heads, share = f->m->heads / kv;
    const int64_t hd = f->m->head_dim;
    const tensor *o = &layer_walk_block(f->b->walk)->o.dense;
    tensor metric = on_device(f, f->metric, DT_F32, hd, hd),
           own = on_device(f, f->o, dev_act(f->d), f->m->hidden, hd);
    TRY(op_zero(f->d, &metric, e));
    for (int32_t h = (int32_t)(i % kv) * share, end = h + share; h < end; h++) {
        tensor x = own;
        if (i < kv) {
            x = head_of(f, ROLE_Q, h);
        } else {
            const tensor cols = tensor_cols(o, h * hd, hd);
            TRY(op_mix(f->d, &own, 1.f, &cols, 0.f, NULL, e));
        }
        TRY(op_gram(f->d, &metric, &x, e));
    }
    return op_gram_finish(f->d, &metric, e);
}

static err_code try_candidates(dev_folds *f, int64_t i, err *e)
{
    const int64_t hd = f->m->head_dim, rows = POINTS * f->n;
    const tensor x = head_at(f, i), metric = on_device(f, f->metric, DT_F32, hd, hd),
                 s = on_device(f, f->factors + i * POINTS * hd, DT_F32, POINTS, hd);
    tensor errors = on_device(f, f->errors, DT_F32, rows, hd),
           work = on_device(f, f->work, DT_F32, rows, hd),
           sums = tensor_1d(f->sums + i * POINTS, DT_F64, POINTS);
    const tensor one = on_device(f, f->errors, DT_F32, POINTS, f->n * hd),
                 other = on_device(f, f->work, DT_F32, POINTS, f->n * hd);
    sums.mem = dev_mem(f->d);
    TRY(make_metric(f, i, e));
    TRY(op_cache_errors(f->d, &errors, &x, &s, e));
    TRY(op_matmul(f->d, &work, &errors, &metric, e));
    return op_row_dots(f->d, &sums, &one, &other, e);
}

/* ---- the choice ---- */

/* The best candidates of kv heads from `first` into s [kv_heads,hd]. */
static void choose(const dev_folds *f, int64_t first, float *s, double *plain, double *folded)
{
    const int64_t hd = f->m->head_dim;
    *plain = *folded = 0;
    for (int64_t h = 0; h < f->m->kv_heads; h++) {
        const double *loss = f->host_sums + (first + h) * POINTS;
        int best = 0;
        for (int p = 1; p < POINTS; p++)
            if (loss[p] < loss[best]) best = p;
        *plain += loss[0];
        *folded += loss[best];
        memcpy(s + h * hd, f->host_factors + ((first + h) * POINTS + best) * hd,
               (size_t)hd * sizeof *s);
    }
}

static err_code enter(dev_folds *f, block_plan *out, err *e)
{
    const int64_t kv = f->m->kv_heads;
    double plain, folded;
    float *s = f->host_squares; /* no longer needed */
    if (!f->m->qk_norm) {
        TRY(plan_factors(f->b, out, ROLE_K, &s, e));
        choose(f, 0, s, &plain, &folded);
        job_log(f->b->j, LOG_DEBUG, "layer %d: 4-bit keys: error %.4g, with factors %.4g",
                (int)f->b->layer, plain, folded);
    }
    choose(f, kv, f->host_squares, &plain, &folded);
    job_log(f->b->j, LOG_DEBUG, "layer %d: 4-bit values: error %.4g, with factors %.4g",
            (int)f->b->layer, plain, folded);
    if (!kv_fold_pays(plain, folded)) return OK;
    TRY(plan_factors(f->b, out, ROLE_V, &s, e));
    choose(f, kv, s, &plain, &folded);
    return OK;
}

static err_code search(dev_folds *f, const dev_buf *lent, int64_t stride, block_plan *out, err *e)
{
    const int64_t first = f->m->qk_norm ? f->m->kv_heads : 0;
    TRY(host_room(f, e));
    TRY(device_room(f, lent, e));
    TRY(reserve(f, e));
    TRY(sample(f, stride, e));
    TRY(make_candidates(f, first, e));
    TRY(job_check(f->b->j, e));
    for (int64_t i = first; i < f->heads; i++) TRY(try_candidates(f, i, e));
    TRY(get(f, f->host_sums, f->sums, (size_t)(f->heads * POINTS) * sizeof(double), e));
    return enter(f, out, e);
}

err_code dev_fold_factors(const quant_block *b, const dev_buf *lent, block_plan *out, err *e)
{
    const model_desc *m = b->m;
    const int64_t rows = layer_walk_states(b->walk).shape[0], stride = kv_fold_stride(rows);
    dev_folds f = {.b = b,
                   .d = b->d,
                   .m = m,
                   .n = (rows + stride - 1) / stride,
                   .cols = (int64_t)(m->heads + 2 * m->kv_heads) * m->head_dim,
                   .heads = 2 * m->kv_heads};
    const err_code rc = search(&f, lent, stride, out, e);
    dev_free(&f.own);
    arena_free(&f.mem);
    return rc;
}
