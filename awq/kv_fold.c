/* Folding for the cache. Exponents were searched on two models: powers of the channels' rms
 * alone beat those that also divide by the rms of q, and moving single channels on top gained
 * nothing. */
#include "awq/kv_fold.h"

#include <math.h>
#include <string.h>

#include "awq/kv_turn.h"
#include "awq/lapack.h"
#include "base/mem.h"
#include "kernels/search_ops.h"
#include "runtime/layer_walk.h"

#define SAMPLES KV_FOLD_SAMPLES
#define WORTH   0.97  /* of the error of v without factors */
#define TURN    0.85  /* of the least error of v without turning it */
#define FLOOR   1e-3f /* of the largest rms: channels that never fire */

typedef struct {
    const quant_block *b;
    const model_desc *m;
    device *host;                /* what does the mathematics */
    int64_t hidden, hd, cols, n; /* cols: of q, k and v; n samples */
    float *x;                    /* [n,hd] errors, and more */
    float *qkv;                  /* [n,cols] */
    int32_t *pos;                /* [n] */
    float *head;                 /* [n,hd] one head */
    float *metric;               /* [hd,hd] */
    float *values;               /* [kv_heads,hd] factors of v */
    float *w;                    /* [hidden,heads*hd] o */
    double *rms, *cost;          /* [hd], [n] */
    float *inv_freq, mscale;     /* [rope_dims/2] */
    float *square;               /* [hd,hd] sum v v^T */
    float *turns, *back;         /* [kv_heads,hd,hd], [hd,hd]: M of v and its inverse */
    float *angles;               /* [rope_dims/2] */
    float *ones;                 /* [hd] */
    double *work;                /* of kv_turn_matrix */
    arena mem;
} kv_job;

/* ---- memory ---- */

static int64_t width(const model_desc *m)
{
    return (int64_t)(m->heads + 2 * m->kv_heads) * m->head_dim;
}

typedef struct {
    void **out;
    int64_t count;
    size_t size;
} kv_part;
enum { PARTS = 16 };

static int parts_of(kv_job *j, const model_desc *m, kv_part p[PARTS])
{
    const int64_t hd = m->head_dim;
    int n = 0;
    p[n++] = (kv_part){(void **)&j->x, SAMPLES * (m->hidden > hd ? m->hidden : hd), sizeof(float)};
    p[n++] = (kv_part){(void **)&j->qkv, SAMPLES * width(m), sizeof(float)};
    p[n++] = (kv_part){(void **)&j->pos, SAMPLES, sizeof(int32_t)};
    p[n++] = (kv_part){(void **)&j->head, SAMPLES * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->metric, hd * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->w, m->hidden * (int64_t)m->heads * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->rms, hd, sizeof(double)};
    p[n++] = (kv_part){(void **)&j->cost, SAMPLES, sizeof(double)};
    p[n++] = (kv_part){(void **)&j->values, m->kv_heads * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->inv_freq, hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->square, hd * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->turns, m->kv_heads * hd * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->back, hd * hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->angles, hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->ones, hd, sizeof(float)};
    p[n++] = (kv_part){(void **)&j->work, kv_turn_work(hd), sizeof(double)};
    return n;
}

static size_t host_bytes(const model_desc *m)
{
    kv_job j;
    kv_part p[PARTS];
    size_t sum = 0;
    const int n = parts_of(&j, m, p);
    for (int i = 0; i < n; i++) sum += arena_need((size_t)p[i].count * p[i].size);
    return sum;
}

static err_code room(kv_job *j, err *e)
{
    kv_part p[PARTS];
    const int n = parts_of(j, j->m, p);
    const op_limits lim = {.rows = SAMPLES > j->hidden ? SAMPLES : (int32_t)j->hidden,
                           .k = j->hidden > j->hd ? j->hidden : j->hd,
                           .n = j->cols,
                           .heads = 1,
                           .head_dim = (int32_t)j->hd,
                           .max_kv = 1,
                           .seqs = 1};
    TRY(arena_init(&j->mem, host_bytes(j->m), "keys and values", e));
    for (int i = 0; i < n; i++)
        TRY(arena_get(&j->mem, p[i].out, (size_t)p[i].count * p[i].size, e));
    TRY(ops_reserve(j->b->d, &lim, e));
    return ops_reserve(j->host, &lim, e);
}

/* ---- sampled tokens ---- */

int64_t kv_fold_stride(int64_t rows)
{
    const int64_t stride = (rows + SAMPLES - 1) / SAMPLES;
    return stride + (stride > 1 && stride % 2 == 0); /* odd: all positions take part */
}

err_code kv_fold_samples(const quant_block *b, int64_t stride, tensor *rows, tensor *x,
                         const tensor *qkv, err *e)
{
    const block *bl = layer_walk_block(b->walk);
    int64_t at = 0;
    TRY(layer_walk_pick(b->walk, stride, rows, e));
    TRY(op_rmsnorm(b->d, x, rows, &bl->attn_norm, b->m->norm_eps, e));
    for (int i = 0; i < bl->n_qkv; i++) {
        const bound_linear *l = &bl->qkv[i];
        tensor y = tensor_cols(qkv, at, l->n);
        TRY(op_gemm(b->d, &y, x, &l->dense, l->bias.data ? &l->bias : NULL, false, e));
        at += l->n;
    }
    return OK;
}

/* f32 on the host of what the device has; j->x has room for some rows at a time. */
static err_code fetch(kv_job *j, const tensor *qkv, err *e)
{
    device *d = j->b->d;
    const int64_t step = SAMPLES * j->hidden * (int64_t)sizeof(float) /
                         (j->cols * (int64_t)dtype_bytes(qkv->dt));
    for (int64_t at = 0; at < j->n; at += step) {
        const int64_t n = j->n - at < step ? j->n - at : step;
        const tensor from = tensor_rows(qkv, at, n);
        tensor part = tensor_2d(j->x, qkv->dt, n, j->cols),
               to = tensor_2d(j->qkv + at * j->cols, DT_F32, n, j->cols);
        TRY(dev_copy(d, &part, &from, e));
        TRY(dev_sync(d, e));
        tensor_convert(&to, &part);
    }
    return OK;
}

/* Rows of states, and on a device, which cannot reach the host's room, what is made of them. */
static size_t sample_bytes(const device *d, const model_desc *m)
{
    const int64_t made = dev_mem(d) == MEM_HOST ? 0 : m->hidden + width(m);
    return (size_t)(SAMPLES * m->hidden) * sizeof(float) +
           (size_t)(SAMPLES * made) * dtype_bytes(dev_act(d));
}

size_t kv_fold_bytes(const device *d, const model_desc *m)
{
    return host_bytes(m) + sample_bytes(d, m);
}

/* q, k and v of the samples, made where the weights are. */
static err_code sample(kv_job *j, err *e)
{
    const quant_block *b = j->b;
    device *d = b->d;
    const int64_t all = layer_walk_states(b->walk).shape[0],
                  seqlen = all / layer_walk_windows(b->walk), stride = kv_fold_stride(all);
    dev_buf buf = {0};
    j->n = (all + stride - 1) / stride;
    for (int64_t i = 0; i < j->n; i++) j->pos[i] = (int32_t)(i * stride % seqlen);
    TRY(dev_alloc(&buf, d, sample_bytes(d, j->m), "keys and values", e));
    const bool here = dev_mem(d) == MEM_HOST;
    const int64_t wide = SAMPLES * j->hidden;
    uint8_t *made = (uint8_t *)buf.data + (size_t)wide * sizeof(float);
    tensor rows = tensor_2d(buf.data, layer_walk_kept(b->walk), j->n, j->hidden),
           x = tensor_2d(here ? (void *)j->x : made, dev_act(d), j->n, j->hidden),
           qkv = tensor_2d(here ? (void *)j->qkv : made + (size_t)wide * dtype_bytes(dev_act(d)),
                           dev_act(d), j->n, j->cols);
    rows.mem = x.mem = qkv.mem = dev_mem(d);
    err_code rc = kv_fold_samples(b, stride, &rows, &x, &qkv, e);
    if (rc == OK && !here) rc = fetch(j, &qkv, e);
    dev_free(&buf);
    return rc;
}

/* Head `h` of a part into j->head, turned to its position unless it is v's. */
static void take_head(kv_job *j, tensor_role part, int32_t h)
{
    const int64_t at = fold_head_col(j->m, part, h), half = j->m->rope_dims / 2;
    for (int64_t t = 0; t < j->n; t++) {
        float *to = j->head + t * j->hd;
        memcpy(to, j->qkv + t * j->cols + at, (size_t)j->hd * sizeof *to);
        for (int64_t i = 0; i < half && part != ROLE_V; i++) {
            const double angle = (double)j->pos[t] * j->inv_freq[i];
            const float c = (float)cos(angle) * j->mscale, s = (float)sin(angle) * j->mscale;
            int64_t a, b;
            fold_rope_pair(j->m, i, &a, &b);
            const float x = to[a], y = to[b];
            to[a] = x * c - y * s;
            to[b] = y * c + x * s;
        }
    }
}

/* ---- one head ---- */

void kv_fold_rms(const model_desc *m, double *rms, bool pairs)
{
    double most = 0;
    for (int64_t i = 0; pairs && i < m->rope_dims / 2; i++) {
        int64_t a, b;
        fold_rope_pair(m, i, &a, &b);
        rms[a] = rms[b] = sqrt((rms[a] * rms[a] + rms[b] * rms[b]) / 2);
    }
    for (int64_t i = 0; i < m->head_dim; i++) most = fmax(most, rms[i]);
    for (int64_t i = 0; i < m->head_dim; i++) rms[i] = most > 0 ? fmax(rms[i], FLOOR * most) : 1;
}

static void measure_rms(kv_job *j, bool pairs)
{
    for (int64_t i = 0; i < j->hd; i++) {
        double sum = 0;
        for (int64_t t = 0; t < j->n; t++) sum += pow(j->head[t * j->hd + i], 2);
        j->rms[i] = sqrt(sum / (double)j->n);
    }
    kv_fold_rms(j->m, j->rms, pairs);
}

/* rms^a with a geometric mean of 1; a: 0, 1/4 .. 1. */
void kv_fold_candidate(const double *rms, int64_t hd, int point, float *s)
{
    const double a = (double)point / (KV_FOLD_POINTS - 1);
    double mean = 0;
    for (int64_t i = 0; i < hd; i++) mean += a * log(rms[i]) / (double)hd;
    for (int64_t i = 0; i < hd; i++) s[i] = (float)exp(a * log(rms[i]) - mean);
}

typedef struct {
    const kv_job *j;
    const float *s;           /* [hd] */
    const float *turn, *back; /* [hd,hd] M and its inverse; NULL: none */
    float *out;               /* [n,hd] */
} error_job;

/* y = x a, a [hd,hd]. */
static void times(float *y, const float *x, const float *a, int64_t hd)
{
    memset(y, 0, (size_t)hd * sizeof *y);
    for (int64_t i = 0; i < hd; i++)
        for (int64_t k = 0; k < hd; k++) y[k] += x[i] * a[i * hd + k];
}

/* What the cache's rule (kernels/ops.h) makes of head M / s, times s M^-1, less the head. */
static void token_error(void *ctx, int64_t t, int worker)
{
    const error_job *c = ctx;
    const int64_t hd = c->j->hd;
    const float *own = c->j->head + t * hd, *x = own;
    float *y = c->out + t * hd, turned[MODEL_MAX_HEAD_DIM];
    (void)worker;
    if (c->turn) {
        times(turned, own, c->turn, hd);
        x = turned;
    }
    search_cache_row(y, x, c->s, hd);
    if (c->back) {
        memcpy(turned, y, (size_t)hd * sizeof *y);
        times(y, turned, c->back, hd);
    }
}

/* The errors of all samples under c, by the metric. */
static err_code error_sum(kv_job *j, error_job *c, double *sum, err *e)
{
    const tensor metric = tensor_2d(j->metric, DT_F32, j->hd, j->hd),
                 rows = tensor_2d(j->x, DT_F32, j->n, j->hd);
    tensor cost = tensor_1d(j->cost, DT_F64, j->n);
    c->j = j;
    c->out = j->x;
    pool_run(dev_pool(j->host), token_error, c, j->n);
    TRY(op_quad(j->host, &cost, &rows, &metric, e));
    *sum = 0;
    for (int64_t t = 0; t < j->n; t++) *sum += j->cost[t];
    return OK;
}

static err_code best_factors(kv_job *j, float *s, double *plain, double *folded, err *e)
{
    double least = INFINITY;
    int best = 0;
    for (int p = 0; p < KV_FOLD_POINTS; p++) {
        error_job c = {.s = s};
        double sum;
        kv_fold_candidate(j->rms, j->hd, p, s);
        TRY(error_sum(j, &c, &sum, e));
        if (p == 0) *plain += sum;
        if (sum < least) {
            least = sum;
            best = p;
        }
    }
    kv_fold_candidate(j->rms, j->hd, best, s);
    *folded += least;
    return OK;
}

/* ---- what errors count by ---- */

static err_code add_gram(kv_job *j, const float *rows, int64_t n, int64_t stride, err *e)
{
    tensor h = tensor_2d(j->metric, DT_F32, j->hd, j->hd),
           x = tensor_2d((float *)(uintptr_t)rows, DT_F32, n, j->hd);
    x.stride[0] = stride;
    return op_gram(j->host, &h, &x, e);
}

static err_code finish_gram(kv_job *j, err *e)
{
    tensor h = tensor_2d(j->metric, DT_F32, j->hd, j->hd);
    return op_gram_finish(j->host, &h, e);
}

typedef struct {
    double plain, folded, turned; /* errors of all heads */
} kv_errors;

static void clear_gram(kv_job *j) { memset(j->metric, 0, (size_t)(j->hd * j->hd) * sizeof(float)); }

/* Errors of k reach the scores through q, of all heads that read it. turn: by j->angles. */
static err_code k_errors(kv_job *j, int32_t h, bool turn, float *s, double *plain, double *folded,
                         err *e)
{
    const int32_t share = j->m->heads / j->m->kv_heads;
    clear_gram(j);
    for (int32_t i = 0; i < share; i++) {
        take_head(j, ROLE_Q, h * share + i);
        if (turn) kv_turn_pairs(j->m, j->head, j->n, j->angles);
        TRY(add_gram(j, j->head, j->n, j->hd, e));
    }
    TRY(finish_gram(j, e));
    take_head(j, ROLE_K, h);
    if (turn) kv_turn_pairs(j->m, j->head, j->n, j->angles);
    measure_rms(j, true);
    return best_factors(j, s, plain, folded, e);
}

/* Neither k's factors nor its angles cost the weights anything: whatever helps is taken. */
static err_code k_head(kv_job *j, int32_t h, float *s, float *angles, kv_errors *sum, err *e)
{
    double still = 0, turned = 0, ignored = 0;
    TRY(k_errors(j, h, false, s, &sum->plain, &still, e));
    if (angles) {
        kv_turn_angles(j->m, j->head, j->n, j->angles);
        TRY(k_errors(j, h, true, j->values, &ignored, &turned, e));
    }
    if (angles && turned < still) {
        memcpy(s, j->values, (size_t)j->hd * sizeof *s);
        memcpy(angles, j->angles, (size_t)(j->m->rope_dims / 2) * sizeof *angles);
        still = turned;
    }
    sum->folded += still;
    return OK;
}

/* Errors of v reach the residual stream through o's columns. */
static err_code v_head(kv_job *j, int32_t h, float *s, kv_errors *sum, err *e)
{
    const int32_t share = j->m->heads / j->m->kv_heads;
    const int64_t k = j->m->heads * j->hd;
    clear_gram(j);
    for (int32_t i = 0; i < share; i++)
        TRY(add_gram(j, j->w + (h * share + i) * j->hd, j->hidden, k, e));
    TRY(finish_gram(j, e));
    take_head(j, ROLE_V, h);
    measure_rms(j, false);
    return best_factors(j, s, &sum->plain, &sum->folded, e);
}

/* The head of v_head in another basis, which every other sample chooses. */
static err_code v_turn(kv_job *j, int32_t h, kv_errors *sum, err *e)
{
    tensor c = tensor_2d(j->square, DT_F32, j->hd, j->hd),
           half = tensor_2d(j->head, DT_F32, (j->n + 1) / 2, j->hd);
    float *m = j->turns + h * j->hd * j->hd;
    error_job errors = {.s = j->ones, .turn = m, .back = j->back};
    double turned;
    half.stride[0] = 2 * j->hd;
    memset(j->square, 0, tensor_bytes(&c));
    TRY(op_gram(j->host, &c, &half, e));
    TRY(op_gram_finish(j->host, &c, e));
    openblas_set_num_threads(1); /* more would change the order of its sums */
    sum->turned = kv_turn_matrix(j->square, j->metric, j->hd, m, j->back, j->work) ? sum->turned
                                                                                   : INFINITY;
    if (sum->turned == INFINITY) return OK; /* some head has no such basis: none is turned */
    TRY(error_sum(j, &errors, &turned, e));
    sum->turned += turned;
    return OK;
}

/* Whether v's channels can be mixed: the blocks of H that the calib file has of o's input must go
 * along, so they hold whole heads. */
static bool may_turn_v(const kv_job *j)
{
    const calib_tap *t = j->b->stats ? calib_find(j->b->stats, ROLE_O) : NULL;
    return j->b->o->turn && (!t || t->g % j->hd == 0);
}

static err_code take_turns(kv_job *j, block_plan *out, float *factors, err *e)
{
    out->turn_v = tensor_2d(NULL, DT_F32, j->m->kv_heads * j->hd, j->hd);
    TRY(arena_get(j->b->mem, &out->turn_v.data, tensor_bytes(&out->turn_v), e));
    memcpy(out->turn_v.data, j->turns, tensor_bytes(&out->turn_v));
    for (int64_t i = 0; i < j->m->kv_heads * j->hd; i++) factors[i] = 1.f;
    return OK;
}

bool kv_fold_pays(double plain, double folded) { return folded <= WORTH * plain; }

/* Factors of v also scale o's inputs, which then are no longer free to suit o's weights. A search
 * of v -> o for the weights' sake brings nothing that can be measured, so they are taken where
 * they save the cache anything, and left to that search elsewhere. */
static err_code all_values(kv_job *j, block_plan *out, err *e)
{
    const int64_t n = j->m->kv_heads * j->hd;
    const bool may_turn = may_turn_v(j);
    kv_errors sum = {0};
    float *v;
    linear_view o;
    tensor w = {.data = j->w};
    TRY(weights_linear(j->b->src, ROLE_O, j->b->layer, -1, &o, e));
    TRY(fold_rows(&w, &o.dense, NULL, 0, j->hidden, j->b->layer, ROLE_O, e));
    for (int64_t i = 0; i < j->hd; i++) j->ones[i] = 1.f;
    for (int32_t h = 0; h < j->m->kv_heads; h++) {
        TRY(job_check(j->b->j, e));
        TRY(v_head(j, h, j->values + h * j->hd, &sum, e));
        if (may_turn) TRY(v_turn(j, h, &sum, e));
    }
    job_log(j->b->j, LOG_DEBUG,
            "layer %d: 4-bit values: error %.4g, with factors %.4g, turned %.4g", (int)j->b->layer,
            sum.plain, sum.folded, may_turn ? sum.turned : NAN);
    const bool scaled = kv_fold_pays(sum.plain, sum.folded),
               turn = may_turn && sum.turned < TURN * (scaled ? sum.folded : sum.plain);
    if (!scaled && !turn) return OK;
    TRY(plan_factors(j->b, out, ROLE_V, &v, e));
    if (turn) return take_turns(j, out, v, e);
    memcpy(v, j->values, (size_t)n * sizeof *v);
    return OK;
}

static err_code all_keys(kv_job *j, block_plan *out, err *e)
{
    const int64_t half = j->m->rope_dims / 2;
    kv_errors sum = {0};
    bool turned = false;
    float *k, *angles = NULL;
    if (j->m->qk_norm) return OK;
    TRY(plan_factors(j->b, out, ROLE_K, &k, e));
    if (j->b->o->turn) {
        out->turn_k = tensor_2d(NULL, DT_F32, j->m->kv_heads, half);
        TRY(arena_get(j->b->mem, &out->turn_k.data, tensor_bytes(&out->turn_k), e));
        angles = out->turn_k.data;
        memset(angles, 0, tensor_bytes(&out->turn_k));
    }
    model_inv_freq(j->m, j->m->max_tokens, j->inv_freq, &j->mscale);
    for (int32_t h = 0; h < j->m->kv_heads; h++) {
        TRY(job_check(j->b->j, e));
        TRY(k_head(j, h, k + h * j->hd, angles ? angles + h * half : NULL, &sum, e));
    }
    for (int64_t i = 0; angles && i < j->m->kv_heads * half; i++) turned |= angles[i] != 0;
    if (!turned) out->turn_k.data = NULL;
    job_log(j->b->j, LOG_DEBUG, "layer %d: 4-bit keys: error %.4g, with factors%s %.4g",
            (int)j->b->layer, sum.plain, turned ? " and turned" : "", sum.folded);
    return OK;
}

/* ---- statistics in the plan's bases ---- */

size_t kv_turn_bytes(const model_desc *m)
{
    const calib_block shape = calib_shape(m);
    const calib_tap *o = calib_find(&shape, ROLE_O);
    const size_t hd = (size_t)m->head_dim, kv = (size_t)m->kv_heads;
    return arena_need(kv * hd * hd * sizeof(float)) +
           arena_need(kv * (size_t)(m->rope_dims / 2) * sizeof(float)) +
           arena_need((size_t)(o->k * calib_block_size(o->k)) * sizeof(float));
}

/* One block of H becomes T^T H T, T having the M of its heads on the diagonal. half [g,g]: H T. */
static void turn_block(const model_desc *m, const float *turn, const float *from, float *to,
                       int64_t at, int64_t g, double *half)
{
    const int64_t hd = m->head_dim, share = m->heads / m->kv_heads;
    for (int64_t h = 0; h < g; h += hd) {
        const float *own = turn + (at + h) / hd / share * hd * hd;
        for (int64_t i = 0; i < g; i++)
            for (int64_t k = 0; k < hd; k++) {
                double sum = 0;
                for (int64_t v = 0; v < hd; v++)
                    sum += (double)from[i * g + h + v] * own[v * hd + k];
                half[i * g + h + k] = sum;
            }
    }
    for (int64_t i = 0; i < g; i++) {
        const float *own = turn + (at + i) / hd / share * hd * hd;
        for (int64_t k = 0; k < g; k++) {
            double sum = 0;
            for (int64_t u = 0; u < hd; u++)
                sum += own[u * hd + i % hd] * half[(i / hd * hd + u) * g + k];
            to[i * g + k] = (float)sum;
        }
    }
}

err_code kv_fold_stats(const quant_block *b, const block_plan *p, calib_block *stats, err *e)
{
    void *mem;
    double *half;
    for (int i = 0; p->turn_v.data && i < stats->n_taps; i++) {
        calib_tap *t = &stats->tap[i];
        if (t->tap != ROLE_O) continue;
        TRY(arena_get(b->mem, &mem, tensor_bytes(&t->blocks), e));
        TRY(mem_alloc((void **)&half, (size_t)t->g * (size_t)t->g, sizeof *half, "blocks", e));
        for (int64_t at = 0; at < t->k; at += t->g)
            turn_block(b->m, p->turn_v.data, (const float *)t->blocks.data + at * t->g,
                       (float *)mem + at * t->g, at, t->g, half);
        mem_free(half);
        t->blocks.data = mem;
    }
    return OK;
}

/* ---- all of it ---- */

err_code kv_fold_factors(const quant_block *b, block_plan *out, err *e)
{
    kv_job j = {.b = b,
                .m = b->m,
                .host = b->host ? b->host : b->d,
                .hidden = b->m->hidden,
                .hd = b->m->head_dim,
                .cols = width(b->m)};
    err_code rc = room(&j, e);
    if (rc == OK) rc = sample(&j, e);
    if (rc == OK) rc = all_keys(&j, out, e);
    if (rc == OK) rc = all_values(&j, out, e);
    arena_free(&j.mem);
    return rc;
}
