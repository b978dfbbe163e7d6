/* Final norm, head and losses over rows of hidden states, a few at a time. */
#include "awq/predict.h"

#include <string.h>

#include "base/mem.h"

#define ROWS 64 /* at a time: the logits of a large vocabulary are wide */

typedef struct {
    device *d;
    layer_walk *w;
    const model_desc *m;
    const int32_t *tokens;
    int64_t seqlen;
    tensor norm, head;
    dev_buf norm_buf, head_buf;
    float *rows, *logits; /* [ROWS,hidden], [ROWS,vocab] */
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
    TRY(ops_reserve(h->d, &lim, e));
    TRY(weights_tensor(src, ROLE_FINAL_NORM, -1, &view, e));
    TRY(dev_upload(h->d, &h->norm_buf, &h->norm, &view, e));
    TRY(weights_tensor(src, ROLE_HEAD, -1, &view, e));
    TRY(dev_upload(h->d, &h->head_buf, &h->head, &view, e));
    TRY(mem_alloc((void **)&h->rows, ROWS * (size_t)h->m->hidden, sizeof(float), "head", e));
    return mem_alloc((void **)&h->logits, ROWS * (size_t)h->m->vocab, sizeof(float), "head", e);
}

/* Sum of the losses of one window in the stream in use. */
static err_code window_loss(head_job *h, int32_t window, double *sum, err *e)
{
    const tensor states = layer_walk_states(h->w);
    for (int64_t at = 0; at + 1 < h->seqlen; at += ROWS) {
        const int64_t left = h->seqlen - 1 - at, n = left < ROWS ? left : ROWS,
                      row = window * h->seqlen + at;
        float nll[ROWS];
        const tensor x = tensor_rows(&states, row, n),
                     next = tensor_1d((int32_t *)(uintptr_t)(h->tokens + row + 1), DT_I32, n);
        tensor y = tensor_2d(h->rows, DT_F32, n, h->m->hidden),
               l = tensor_2d(h->logits, DT_F32, n, h->m->vocab), out = tensor_1d(nll, DT_F32, n);
        TRY(op_rmsnorm(h->d, &y, &x, &h->norm, h->m->norm_eps, e));
        TRY(op_gemm(h->d, &l, &y, &h->head, NULL, false, e));
        TRY(op_nll(h->d, &out, NULL, &l, &next, e));
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
        for (int s = 0; s < 2 && rc == OK; s++) {
            layer_walk_use(w, s);
            rc = window_loss(&h, i, &sum[s], e);
        }
        out->windows++;
    }
    layer_walk_use(w, 1);
    if (rc == OK && out->windows) {
        const double losses = (double)out->windows * (double)(h.seqlen - 1);
        out->nll16 = sum[0] / losses;
        out->nll = sum[1] / losses;
    }
    mem_free(h.rows);
    mem_free(h.logits);
    dev_free(&h.norm_buf);
    dev_free(&h.head_buf);
    return rc;
}
