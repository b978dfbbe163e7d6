/* Final norm, head and losses over rows of hidden states, a few at a time. */
#include "awq/predict.h"

#include <math.h>

#include "base/mem.h"
#include "runtime/compare.h"

#define ROWS 64 /* at a time: the logits of a large vocabulary are wide */

typedef struct {
    device *d;
    layer_walk *w;
    const model_desc *m;
    const int32_t *tokens;
    int64_t seqlen;
    tensor norm, head;
    dev_buf norm_buf, head_buf, rows_buf, logits_buf,
        nll_buf; /* [ROWS,hidden], [ROWS,vocab], [ROWS] */
    dev_buf ids_buf;
    float *logits[2]; /* [ROWS,vocab] of both streams; NULL: nobody asks for divergences */
    float *kl;        /* of the tile at work */
} head_job;

size_t predict_bytes(const model_desc *m, bool kl)
{
    return ROWS * (size_t)(m->hidden + (kl ? 3 : 1) * (int64_t)m->vocab) * sizeof(float);
}

static err_code open_head(head_job *h, weight_src *src, err *e)
{
    tensor view;
    const op_limits lim = {.rows = ROWS,
                           .k = h->m->hidden,
                           .n = h->m->vocab,
                           .heads = 1,
                           .head_dim = h->m->head_dim,
                           .max_kv = 1,
                           .seqs = 1};
    const size_t act = dtype_bytes(dev_act(h->d));
    TRY(ops_reserve(h->d, &lim, e));
    TRY(weights_tensor(src, ROLE_FINAL_NORM, -1, &view, e));
    TRY(dev_upload(h->d, &h->norm_buf, &h->norm, &view, e));
    TRY(weights_tensor(src, ROLE_HEAD, -1, &view, e));
    TRY(dev_upload(h->d, &h->head_buf, &h->head, &view, e));
    TRY(dev_alloc(&h->rows_buf, h->d, ROWS * (size_t)h->m->hidden * act, "head", e));
    TRY(dev_alloc(&h->nll_buf, h->d, ROWS * sizeof(float), "head", e));
    return dev_alloc(&h->logits_buf, h->d, ROWS * (size_t)h->m->vocab * sizeof(float), "head", e);
}

static tensor on_device(const head_job *h, const dev_buf *b, dtype dt, int64_t n, int64_t k)
{
    tensor t = k ? tensor_2d(b->data, dt, n, k) : tensor_1d(b->data, dt, n);
    t.mem = dev_mem(h->d);
    return t;
}

/* Rows at.. of a window's states: the sum of their losses, and their logits where they are wanted.
 */
static err_code tile_loss(head_job *h, int stream, const tensor *states, const tensor *ids,
                          int64_t at, int64_t n, double *sum, err *e)
{
    float nll[ROWS];
    const tensor x = tensor_rows(states, at, n), want = tensor_rows(ids, at + 1, n);
    tensor y = on_device(h, &h->rows_buf, dev_act(h->d), n, h->m->hidden),
           l = on_device(h, &h->logits_buf, DT_F32, n, h->m->vocab),
           out = on_device(h, &h->nll_buf, DT_F32, n, 0), back = tensor_1d(nll, DT_F32, n);
    TRY(op_rmsnorm(h->d, &y, &x, &h->norm, h->m->norm_eps, e));
    TRY(op_gemm(h->d, &l, &y, &h->head, NULL, false, e));
    TRY(op_nll(h->d, &out, NULL, &l, &want, e));
    TRY(dev_copy(h->d, &back, &out, e));
    if (h->logits[stream]) {
        tensor host = tensor_2d(h->logits[stream], DT_F32, n, h->m->vocab);
        TRY(dev_copy(h->d, &host, &l, e));
    }
    TRY(dev_sync(h->d, e));
    for (int64_t i = 0; i < n; i++) *sum += nll[i];
    return OK;
}

static void row_divergence(void *ctx, int64_t i, int worker)
{
    const head_job *h = ctx;
    const int32_t n = h->m->vocab;
    const float *a = h->logits[1] + i * n, *b = h->logits[0] + i * n;
    int32_t best;
    (void)worker;
    const double la = compare_log_sum(a, n, &best), lb = compare_log_sum(b, n, &best);
    h->kl[i] = (float)compare_divergence(a, la, b, lb, n);
}

/* Sums of the losses of one window in both streams. Divergences need the logits of both at once:
 * the states, of which there is one at a time, are then fetched for each tile. */
static err_code window_losses(head_job *h, int32_t window, double sum[2], float *kl, err *e)
{
    const tensor ids = tensor_1d((int32_t *)(uintptr_t)(h->tokens + window * h->seqlen), DT_I32,
                                 h->seqlen);
    const int64_t step = kl ? ROWS : h->seqlen;
    tensor next;
    dev_free(&h->ids_buf);
    TRY(dev_upload(h->d, &h->ids_buf, &next, &ids, e));
    for (int64_t from = 0; from + 1 < h->seqlen; from += step) {
        const int64_t end = from + step + 1 < h->seqlen ? from + step : h->seqlen - 1;
        for (int s = 0; s < 2; s++) {
            tensor states;
            TRY(layer_walk_load(h->w, s, window, 1, &states, e));
            for (int64_t at = from; at < end; at += ROWS)
                TRY(tile_loss(h, s, &states, &next, at, end - at < ROWS ? end - at : ROWS, &sum[s],
                              e));
        }
        if (!kl) continue;
        h->kl = kl + from;
        pool_run(dev_pool(h->d), row_divergence, h, end - from);
    }
    return OK;
}

static err_code take_logits(head_job *h, err *e)
{
    for (int s = 0; s < 2; s++)
        TRY(mem_alloc((void **)&h->logits[s], ROWS * (size_t)h->m->vocab, sizeof(float), "logits",
                      e));
    return OK;
}

static void close_head(head_job *h)
{
    dev_buf *const bufs[] = {&h->norm_buf, &h->head_buf,   &h->rows_buf,
                             &h->nll_buf,  &h->logits_buf, &h->ids_buf};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    for (int s = 0; s < 2; s++) mem_free(h->logits[s]);
}

err_code predict_losses(prediction *out, float *kl, device *d, weight_src *src, layer_walk *w,
                        const tensor *tokens, const tensor *held_out, const job *j, err *e)
{
    head_job h = {
        .d = d, .w = w, .m = weights_desc(src), .tokens = tokens->data, .seqlen = tokens->shape[1]};
    double sum[2] = {0}, far = 0;
    *out = (prediction){0};
    err_code rc = open_head(&h, src, e);
    if (rc == OK && kl) rc = take_logits(&h, e);
    for (int32_t i = 0; i < tokens->shape[0] && rc == OK; i++) {
        if (!((const uint8_t *)held_out->data)[i] || h.seqlen < 2) continue;
        if ((rc = job_check(j, e)) != OK) break;
        rc = window_losses(&h, i, sum, kl ? kl + out->windows * (h.seqlen - 1) : NULL, e);
        out->windows++;
    }
    if (rc == OK && out->windows) {
        const int64_t losses = out->windows * (h.seqlen - 1);
        for (int64_t i = 0; kl && i < losses; i++) far += kl[i];
        out->nll16 = sum[0] / (double)losses;
        out->nll = sum[1] / (double)losses;
        out->kl = far / (double)losses;
    }
    close_head(&h);
    return rc;
}

double predict_gain(const float *a, const float *b, int64_t n, double *error)
{
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) sum += (double)a[i] - b[i];
    const double mean = sum / (double)n;
    for (int64_t i = 0; i < n; i++) squares += pow((double)a[i] - b[i] - mean, 2);
    *error = sqrt(squares / (double)(n - 1) / (double)n);
    return mean;
}
