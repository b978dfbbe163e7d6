/* Weights in other bases, made when they are asked for. */
#include "awq/rotate.h"

#include <inttypes.h>
#include <math.h>
#include <string.h>

#include "awq/fold.h"
#include "awq/lapack.h"
#include "base/mem.h"

#define ROWS 64 /* of a product's pool item */

struct rotated {
    const model_desc *m; /* the base's */
    weight_src *base, *src;
    device *d;
    float *residual; /* [hidden,hidden] or NULL */
    int32_t layer;   /* whose turns these are; -1 none */
    bool k, v;       /* which there are */
    float *angle;    /* [kv_heads,rope_dims/2] */
    float *turn;     /* [kv_heads,D,D] M */
    float *back;     /* [kv_heads,D,D] transposed inverse of M */
    double *work;    /* [D,2D] */
    float *made[ROLE_COUNT], *bias[ROLE_COUNT];
    size_t room[ROLE_COUNT]; /* floats of made */
    int32_t of[ROLE_COUNT];  /* layer that made holds, -2 none */
    float *gain;             /* [hidden] of a norm */
    float *from;             /* a matrix before its product */
    size_t from_room;
};

/* ---- who reads and writes what ---- */

static bool is_norm(tensor_role r)
{
    return r == ROLE_ATTN_NORM || r == ROLE_FFN_NORM || r == ROLE_FINAL_NORM;
}

/* The norm before a tensor that reads the residual stream; ROLE_COUNT: it does not. */
static tensor_role norm_before(tensor_role r)
{
    switch (r) {
    case ROLE_QKV:
    case ROLE_Q:
    case ROLE_K:
    case ROLE_V: return ROLE_ATTN_NORM;
    case ROLE_GATE:
    case ROLE_UP: return ROLE_FFN_NORM;
    case ROLE_HEAD: return ROLE_FINAL_NORM;
    default: return ROLE_COUNT;
    }
}

static bool writes(tensor_role r) { return r == ROLE_O || r == ROLE_DOWN; }

static bool turned_rows(const rotated *x, tensor_role r, int32_t layer)
{
    const bool k = x->k && layer == x->layer, v = x->v && layer == x->layer;
    return (r == ROLE_QKV && (k || v)) || ((r == ROLE_Q || r == ROLE_K) && k) || (r == ROLE_V && v);
}

static bool turned_cols(const rotated *x, tensor_role r, int32_t layer)
{
    return r == ROLE_O && x->v && layer == x->layer;
}

/* ---- products, by rows of the result in the pool ---- */

typedef struct {
    const float *a, *b;
    float *y;
    int64_t n, inner, cols; /* y [n,cols] = a b; a [n,inner], or [inner,n] when turned */
    bool turned;
} product;

/* Column-major sgemm sees our matrices transposed: y^T = b^T a^T. */
static void product_rows(void *ctx, int64_t item, int worker)
{
    const product *p = ctx;
    const int64_t at = item * ROWS, left = p->n - at;
    const int cols = (int)p->cols, rows = (int)(left < ROWS ? left : ROWS), inner = (int)p->inner;
    const int lda = (int)(p->turned ? p->n : p->inner);
    const float one = 1, none = 0;
    (void)worker;
    sgemm_("N", p->turned ? "T" : "N", &cols, &rows, &inner, &one, p->b, &cols,
           p->turned ? p->a + at : p->a + at * p->inner, &lda, &none, p->y + at * p->cols, &cols);
}

static void multiply(rotated *x, const product *p)
{
    openblas_set_num_threads(1); /* more would change the order of its sums */
    pool_run(dev_pool(x->d), product_rows, (void *)(uintptr_t)p, (p->n + ROWS - 1) / ROWS);
}

/* ---- room ---- */

static err_code grow(float **p, size_t *have, size_t count, err *e)
{
    if (*have >= count) return OK;
    mem_free(*p);
    *have = 0;
    TRY(mem_alloc((void **)p, count, sizeof(float), "turned weights", e));
    *have = count;
    return OK;
}

typedef struct {
    const tensor *from;
    float *to;
} copy_job;

static void copy_rows(void *ctx, int64_t item, int worker)
{
    const copy_job *c = ctx;
    const int64_t at = item * ROWS, left = c->from->shape[0] - at, rows = left < ROWS ? left : ROWS,
                  k = c->from->shape[1];
    const tensor part = tensor_rows(c->from, at, rows);
    tensor to = tensor_2d(c->to + at * k, DT_F32, rows, k);
    (void)worker;
    tensor_convert(&to, &part);
}

static void copy_matrix(rotated *x, float *to, const tensor *from)
{
    copy_job c = {from, to};
    pool_run(dev_pool(x->d), copy_rows, &c, (from->shape[0] + ROWS - 1) / ROWS);
}

/* ---- the residual stream ---- */

/* What reads the stream: W diag(gain) Q. */
static err_code turn_reader(rotated *x, tensor_role r, int32_t layer, float *w, int64_t n, err *e)
{
    const tensor_role norm = norm_before(r);
    const int64_t k = x->m->hidden;
    tensor view, gain = tensor_1d(x->gain, DT_F32, k);
    if (norm != ROLE_COUNT) {
        TRY(weights_tensor(x->base, norm, layer, &view, e));
        tensor_convert(&gain, &view);
        for (int64_t i = 0; i < n; i++)
            for (int64_t j = 0; j < k; j++) w[i * k + j] *= x->gain[j];
    }
    TRY(grow(&x->from, &x->from_room, (size_t)(n * k), e));
    memcpy(x->from, w, (size_t)(n * k) * sizeof *w);
    const product p = {x->from, x->residual, w, n, k, k, false};
    multiply(x, &p);
    return OK;
}

/* What writes it: Q^T W. */
static err_code turn_writer(rotated *x, float *w, int64_t k, err *e)
{
    const int64_t n = x->m->hidden;
    TRY(grow(&x->from, &x->from_room, (size_t)(n * k), e));
    memcpy(x->from, w, (size_t)(n * k) * sizeof *w);
    const product p = {x->residual, x->from, w, n, n, k, true};
    multiply(x, &p);
    return OK;
}

/* ---- heads ---- */

typedef struct {
    const rotated *x;
    float *w;
    int64_t k; /* columns: 1 for a bias */
} head_job;

/* Rows of one head of q or k, pair by pair. */
static void turn_pairs(const head_job *j, int64_t row, int32_t kv_head)
{
    const int64_t half = j->x->m->rope_dims / 2;
    const float *angle = j->x->angle + kv_head * half;
    for (int64_t i = 0; i < half; i++) {
        int64_t a, b;
        fold_rope_pair(j->x->m, i, &a, &b);
        const float c = (float)cos((double)angle[i]), s = (float)sin((double)angle[i]);
        float *p = j->w + (row + a) * j->k, *q = j->w + (row + b) * j->k;
        for (int64_t n = 0; n < j->k; n++) {
            const float u = p[n], v = q[n];
            p[n] = u * c - v * s;
            q[n] = v * c + u * s;
        }
    }
}

static void turn_q_or_k(const head_job *j, tensor_role part)
{
    const model_desc *m = j->x->m;
    const int32_t heads = part == ROLE_Q ? m->heads : m->kv_heads, share = heads / m->kv_heads;
    for (int32_t h = 0; h < heads; h++) turn_pairs(j, fold_head_row(m, part, h), h / share);
}

/* Rows of v: M^T times those of a head. */
static err_code turn_v(rotated *x, const head_job *j, err *e)
{
    const int64_t hd = x->m->head_dim;
    const size_t size = (size_t)(hd * j->k);
    TRY(grow(&x->from, &x->from_room, size, e));
    for (int32_t h = 0; h < x->m->kv_heads; h++) {
        float *rows = j->w + fold_head_row(x->m, ROLE_V, h) * j->k;
        memcpy(x->from, rows, size * sizeof *rows);
        const product p = {x->turn + h * hd * hd, x->from, rows, hd, hd, j->k, true};
        multiply(x, &p);
    }
    return OK;
}

static err_code turn_heads(rotated *x, tensor_role r, float *w, int64_t k, err *e)
{
    const head_job j = {x, w, k};
    if (x->k && (r == ROLE_QKV || r == ROLE_Q)) turn_q_or_k(&j, ROLE_Q);
    if (x->k && (r == ROLE_QKV || r == ROLE_K)) turn_q_or_k(&j, ROLE_K);
    return x->v && (r == ROLE_QKV || r == ROLE_V) ? turn_v(x, &j, e) : OK;
}

/* Columns of o: those of a head times the transposed inverse of its M. */
static void turn_o_rows(void *ctx, int64_t row, int worker)
{
    const head_job *j = ctx;
    const model_desc *m = j->x->m;
    const int64_t hd = m->head_dim, share = m->heads / m->kv_heads;
    float *w = j->w + row * j->k, old[MODEL_MAX_HEAD_DIM];
    (void)worker;
    for (int64_t h = 0; h < m->heads; h++, w += hd) {
        const float *back = j->x->back + h / share * hd * hd;
        memcpy(old, w, (size_t)hd * sizeof *w);
        memset(w, 0, (size_t)hd * sizeof *w);
        for (int64_t i = 0; i < hd; i++)
            for (int64_t c = 0; c < hd; c++) w[c] += old[i] * back[i * hd + c];
    }
}

/* ---- the source ---- */

static bool touched(const rotated *x, tensor_role r, int32_t layer)
{
    if (turned_rows(x, r, layer) || turned_cols(x, r, layer)) return true;
    return x->residual && (norm_before(r) != ROLE_COUNT || writes(r) || r == ROLE_EMBED);
}

static err_code make(rotated *x, tensor_role r, int32_t layer, const tensor *view, err *e)
{
    const int64_t n = view->shape[0], k = view->shape[1];
    const bool columns = turned_cols(x, r, layer);
    TRY(grow(&x->made[r], &x->room[r], (size_t)(n * k), e));
    float *w = x->made[r];
    copy_matrix(x, w, view);
    if (x->residual && (norm_before(r) != ROLE_COUNT || r == ROLE_EMBED))
        TRY(turn_reader(x, r, layer, w, n, e));
    if (turned_rows(x, r, layer)) TRY(turn_heads(x, r, w, k, e));
    if (columns) {
        head_job j = {x, w, k};
        pool_run(dev_pool(x->d), turn_o_rows, &j, n);
    }
    if (x->residual && writes(r)) TRY(turn_writer(x, w, k, e));
    x->of[r] = layer;
    return OK;
}

static bool touches_bias(const rotated *x, tensor_role r, int32_t layer)
{
    return turned_rows(x, r, layer) || (x->residual && writes(r));
}

static err_code make_bias(rotated *x, tensor_role r, int32_t layer, const tensor *bias, err *e)
{
    const int64_t n = bias->shape[0];
    size_t room = x->bias[r] ? (size_t)n : 0; /* that of a role is always the same */
    TRY(grow(&x->bias[r], &room, (size_t)n, e));
    tensor to = tensor_1d(x->bias[r], DT_F32, n);
    tensor_convert(&to, bias);
    if (turned_rows(x, r, layer)) TRY(turn_heads(x, r, x->bias[r], 1, e));
    return x->residual && writes(r) ? turn_writer(x, x->bias[r], 1, e) : OK;
}

static err_code source_linear(void *self, tensor_role r, int32_t layer, int32_t expert,
                              linear_view *view, err *e)
{
    rotated *x = self;
    TRY(weights_linear(x->base, r, layer, expert, view, e));
    if (!touched(x, r, layer)) return OK;
    const bool bias = view->bias.data && touches_bias(x, r, layer);
    if (x->of[r] != layer) {
        if (bias) TRY(make_bias(x, r, layer, &view->bias, e));
        TRY(make(x, r, layer, &view->dense, e));
    }
    view->dense = tensor_2d(x->made[r], DT_F32, view->dense.shape[0], view->dense.shape[1]);
    if (bias) view->bias = tensor_1d(x->bias[r], DT_F32, view->bias.shape[0]);
    return OK;
}

static err_code source_tensor(void *self, tensor_role r, int32_t layer, tensor *view, err *e)
{
    rotated *x = self;
    TRY(weights_tensor(x->base, r, layer, view, e));
    if (x->residual && is_norm(r)) {
        const size_t n = (size_t)view->shape[0];
        TRY(grow(&x->made[r], &x->room[r], n, e));
        for (size_t i = 0; i < n; i++) x->made[r][i] = 1.f;
        *view = tensor_1d(x->made[r], DT_F32, (int64_t)n);
        return OK;
    }
    if (!touched(x, r, layer)) return OK;
    if (x->of[r] != layer) TRY(make(x, r, layer, view, e));
    *view = tensor_2d(x->made[r], DT_F32, view->shape[0], view->shape[1]);
    return OK;
}

static bool source_has(void *self, tensor_role r, int32_t layer, int32_t expert)
{
    return weights_has(((rotated *)self)->base, r, layer, expert);
}

static void source_advise(void *self, int32_t layer, bool need)
{
    rotated *x = self;
    if (need)
        weights_prefetch(x->base, layer);
    else
        weights_release(x->base, layer);
}

static void source_close(void *self)
{
    rotated *x = self;
    for (int i = 0; i < ROLE_COUNT; i++) {
        mem_free(x->made[i]);
        mem_free(x->bias[i]);
    }
    mem_free(x->residual);
    mem_free(x->angle);
    mem_free(x->turn);
    mem_free(x->back);
    mem_free(x->work);
    mem_free(x->gain);
    mem_free(x->from);
    mem_free(x);
}

/* ---- opening ---- */

static err_code take_residual(rotated *x, const tensor *q, err *e)
{
    const int64_t n = x->m->hidden;
    const float *a = q->data;
    if (!q->data) return OK;
    if (q->shape[0] != n || q->shape[1] != n)
        return err_set(e, E_INPUT,
                       "rotation of the residual stream: expected [%d,%d], found [%" PRId64
                       ",%" PRId64 "]",
                       (int)n, (int)n, q->shape[0], q->shape[1]);
    for (int64_t i = 0; i < n; i++) { /* neighbours stand for all pairs: a damaged file is found */
        double one = 0, none = 0;
        for (int64_t j = 0; j < n; j++) {
            one += (double)a[i * n + j] * a[i * n + j];
            none += (double)a[i * n + j] * a[(i + 1) % n * n + j];
        }
        if (!(fabs(one - 1) < 1e-4) || (n > 1 && !(fabs(none) < 1e-4)))
            return err_set(e, E_INPUT,
                           "rotation of the residual stream: row %" PRId64
                           ": expected orthogonal rows of length 1",
                           i);
    }
    TRY(mem_alloc((void **)&x->residual, (size_t)(n * n), sizeof(float), "rotation", e));
    memcpy(x->residual, a, (size_t)(n * n) * sizeof *a);
    return OK;
}

static err_code take_room(rotated *x, err *e)
{
    const size_t hd = (size_t)x->m->head_dim, kv = (size_t)x->m->kv_heads;
    TRY(mem_alloc((void **)&x->angle, kv * (size_t)(x->m->rope_dims / 2), sizeof(float), "turns",
                  e));
    TRY(mem_alloc((void **)&x->turn, kv * hd * hd, sizeof(float), "turns", e));
    TRY(mem_alloc((void **)&x->back, kv * hd * hd, sizeof(float), "turns", e));
    TRY(mem_alloc((void **)&x->work, 2 * hd * hd, sizeof(double), "turns", e));
    return mem_alloc((void **)&x->gain, (size_t)x->m->hidden, sizeof(float), "turns", e);
}

err_code rotated_open(rotated **out, weight_src *base, device *d, const tensor *residual, err *e)
{
    static const weight_ops ops = {source_close, source_tensor, source_linear, source_has,
                                   source_advise};
    rotated *x;
    TRY(mem_alloc((void **)&x, 1, sizeof *x, "turned weights", e));
    x->m = weights_desc(base);
    x->base = base;
    x->d = d;
    x->layer = -1;
    for (int i = 0; i < ROLE_COUNT; i++) x->of[i] = -2;
    model_desc m = *x->m;
    err_code rc = take_residual(x, residual, e);
    if (rc == OK) rc = take_room(x, e);
    if (x->residual) m.tied_embed = false;
    if (rc == OK)
        rc = weights_make(&x->src, weights_kind(base), &m, weights_path(base),
                          weights_tokenizer_dir(base), weights_digest(base), &ops, x, e);
    if (rc != OK) {
        source_close(x);
        return rc;
    }
    *out = x;
    return OK;
}

err_code rotated_by_plan(rotated **out, weight_src *base, device *d, const plan_file *p, err *e)
{
    tensor residual = {0};
    const bool known = plan_rotation(p, "residual", &residual);
    if (plan_rotation_count(p) > known)
        return err_set(e, E_UNSUPPORTED,
                       "%s: the plan holds rotations that this version does not know",
                       weights_path(base));
    return rotated_open(out, base, d, &residual, e);
}

weight_src *rotated_src(rotated *r) { return r->src; }

void rotated_close(rotated **r)
{
    weight_src *src = *r ? (*r)->src : NULL;
    *r = NULL;
    weights_close(&src); /* which frees it all */
}

size_t rotated_bytes(const model_desc *m, bool residual)
{
    tensor_role roles[PLAN_LINEARS];
    const int n = model_block_linears(m, roles);
    const size_t hidden = (size_t)m->hidden, hd = (size_t)m->head_dim;
    size_t sum = 0, most = 0;
    for (int i = 0; i < n; i++) {
        const size_t w = (size_t)model_linear_n(m, roles[i]) * (size_t)model_linear_k(m, roles[i]);
        const bool heads = norm_before(roles[i]) == ROLE_ATTN_NORM || roles[i] == ROLE_O;
        if (heads || residual) sum += w;
        if (w > most) most = w;
    }
    const size_t table = (size_t)m->vocab * hidden;
    if (residual) sum += 2 * table + hidden * hidden + (table > most ? table : most);
    return (sum + (size_t)m->kv_heads * hd * (2 * hd + (size_t)m->rope_dims / 2)) * sizeof(float);
}

/* ---- turns of a layer ---- */

/* Gauss-Jordan with pivots: out = (m^-1)^T. */
static bool invert(const float *m, float *out, double *w, int64_t n)
{
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < 2 * n; j++)
            w[i * 2 * n + j] = j < n ? m[i * n + j] : (double)(j - n == i);
    for (int64_t c = 0; c < n; c++) {
        int64_t p = c;
        for (int64_t i = c + 1; i < n; i++)
            if (fabs(w[i * 2 * n + c]) > fabs(w[p * 2 * n + c])) p = i;
        const double pivot = w[p * 2 * n + c];
        if (!(fabs(pivot) > 1e-12)) return false;
        for (int64_t j = 0; j < 2 * n; j++) {
            const double v = w[p * 2 * n + j] / pivot;
            w[p * 2 * n + j] = w[c * 2 * n + j];
            w[c * 2 * n + j] = v;
        }
        for (int64_t i = 0; i < n; i++) {
            const double f = w[i * 2 * n + c];
            if (i == c || f == 0) continue;
            for (int64_t j = c; j < 2 * n; j++) w[i * 2 * n + j] -= f * w[c * 2 * n + j];
        }
    }
    for (int64_t i = 0; i < n; i++)
        for (int64_t j = 0; j < n; j++) out[j * n + i] = (float)w[i * 2 * n + n + j];
    return true;
}

err_code rotated_layer(rotated *x, int32_t layer, const block_plan *p, err *e)
{
    const int64_t hd = x->m->head_dim;
    if (x->layer >= 0) /* its turns are gone */
        for (int i = 0; i < ROLE_COUNT; i++)
            if (x->of[i] == x->layer) x->of[i] = -2;
    for (int i = 0; i < ROLE_COUNT; i++)
        if (x->of[i] == layer) x->of[i] = -2;
    x->layer = layer;
    x->k = p->turn_k.data != NULL;
    x->v = p->turn_v.data != NULL;
    if (x->k) memcpy(x->angle, p->turn_k.data, tensor_bytes(&p->turn_k));
    if (!x->v) return OK;
    memcpy(x->turn, p->turn_v.data, tensor_bytes(&p->turn_v));
    for (int32_t h = 0; h < x->m->kv_heads; h++)
        if (!invert(x->turn + h * hd * hd, x->back + h * hd * hd, x->work, hd))
            return err_set(e, E_INPUT,
                           "layer %d: turn of v: head %d: expected a matrix with an inverse",
                           (int)layer, (int)h);
    return OK;
}

/* ---- random rotations ---- */

static uint64_t mix(uint64_t x)
{
    x += 0x9e3779b97f4a7c15u;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
    x = (x ^ x >> 27) * 0x94d049bb133111ebu;
    return x ^ x >> 31;
}

void rotate_random(float *q, int64_t n, uint64_t seed)
{
    const double pi = 3.14159265358979323846;
    for (int64_t i = 0; i < n; i++) {
        const double sign = mix(seed + (uint64_t)i) >> 63 ? -1 : 1;
        for (int64_t j = 0; j < n; j++)
            q[i * n + j] = (float)(sign * sqrt((j ? 2. : 1.) / (double)n) *
                                   cos(pi * ((double)i + 0.5) * (double)j / (double)n));
    }
}
