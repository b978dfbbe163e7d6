/* Final norm, head and losses over rows of hidden states, a few at a time. */
#include "awq/predict.h"

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
} head_job;

size_t predict_bytes(const model_desc *m)
{
    return ROWS * (size_t)(m->hidden + m->vocab) * sizeof(float);
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

/* Sum of the losses of one window of a stream. */
static err_code window_loss(head_job *h, int stream, int32_t window, double *sum, err *e)
{
    const tensor ids = tensor_1d((int32_t *)(uintptr_t)(h->tokens + window * h->seqlen), DT_I32,
                                 h->seqlen);
    tensor states, next;
    TRY(layer_walk_load(h->w, stream, window, 1, &states, e));
    dev_free(&h->ids_buf);
    TRY(dev_upload(h->d, &h->ids_buf, &next, &ids, e));
    for (int64_t at = 0; at + 1 < h->seqlen; at += ROWS) {
        const int64_t left = h->seqlen - 1 - at, n = left < ROWS ? left : ROWS;
        float nll[ROWS];
        const tensor x = tensor_rows(&states, at, n), want = tensor_rows(&next, at + 1, n);
        tensor y = on_device(h, &h->rows_buf, dev_act(h->d), n, h->m->hidden),
               l = on_device(h, &h->logits_buf, DT_F32, n, h->m->vocab),
               out = on_device(h, &h->nll_buf, DT_F32, n, 0), back = tensor_1d(nll, DT_F32, n);
        TRY(op_rmsnorm(h->d, &y, &x, &h->norm, h->m->norm_eps, e));
        TRY(op_gemm(h->d, &l, &y, &h->head, NULL, false, e));
        TRY(op_nll(h->d, &out, NULL, &l, &want, e));
        TRY(dev_copy(h->d, &back, &out, e));
        TRY(dev_sync(h->d, e));
        for (int64_t i = 0; i < n; i++) *sum += nll[i];
    }
    return OK;
}

err_code predict_losses(prediction *out, device *d, weight_src *src, layer_walk *w,
                        const tensor *tokens, const tensor *held_out, const job *j, err *e)
{
    head_job h = {
        .d = d, .w = w, .m = weights_desc(src), .tokens = tokens->data, .seqlen = tokens->shape[1]};
    double sum[2] = {0};
    *out = (prediction){0};
    err_code rc = open_head(&h, src, e);
    for (int32_t i = 0; i < tokens->shape[0] && rc == OK; i++) {
        if (!((const uint8_t *)held_out->data)[i] || h.seqlen < 2) continue;
        if ((rc = job_check(j, e)) != OK) break;
        for (int s = 0; s < 2 && rc == OK; s++) rc = window_loss(&h, s, i, &sum[s], e);
        out->windows++;
    }
    if (rc == OK && out->windows) {
        const double losses = (double)out->windows * (double)(h.seqlen - 1);
        out->nll16 = sum[0] / losses;
        out->nll = sum[1] / losses;
    }
    dev_buf *const bufs[] = {&h.norm_buf, &h.head_buf,   &h.rows_buf,
                             &h.nll_buf,  &h.logits_buf, &h.ids_buf};
    for (size_t i = 0; i < sizeof bufs / sizeof *bufs; i++) dev_free(bufs[i]);
    return rc;
}
