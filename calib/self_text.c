/* A model's own text as calibration data. Several windows are written side by side, since a step of
 * many sequences reads the weights once. */
#include <inttypes.h>
#include <string.h>

#include "base/mem.h"
#include "calib/windows.h"
#include "runtime/model.h"
#include "runtime/sampler.h"

#define SLOTS     16
#define HEAD_MAX  64 /* ids before the model's own */
#define STOPS_MAX 16

typedef struct {
    int32_t ids[HEAD_MAX], n;
} head;

typedef struct {
    model *m;
    sampler *s[SLOTS];
    head plain, user; /* what a text, and a dialogue, begins with */
    int32_t stop[STOPS_MAX];
    int n_stop;
    float *logits; /* [SLOTS, vocab] */
    int32_t vocab, seqlen;
    /* of the windows at hand */
    int32_t *ids[SLOTS]; /* [seqlen] each */
    int32_t n[SLOTS];    /* ids there */
    int32_t ran[SLOTS];  /* ids that the model has seen */
    bool dialogue[SLOTS];
} writer;

/* ---- how a text begins ---- */

static void plain_head(head *h, const tokenizer *t, const model_desc *m)
{
    const int32_t bos = tokenizer_bos(t), eos = tokenizer_eos(t);
    h->n = 1;
    h->ids[0] = tokenizer_add_bos(t) && bos >= 0 ? bos : eos >= 0 ? eos : m->bos >= 0 ? m->bos : 0;
}

/* The head of a user's turn is what the renderings of two different turns have in common. */
static err_code user_head(head *h, const head *plain, const chat *c, err *e)
{
    const chat_message a = {"user", "a"}, b = {"user", "0"};
    token_list x = {0}, y = {0};
    *h = *plain;
    err_code rc = chat_encode(c, &a, 1, NULL, false, &x, e);
    if (rc == OK) rc = chat_encode(c, &b, 1, NULL, false, &y, e);
    if (rc == OK) {
        int32_t n = 0;
        while (n < HEAD_MAX && n < x.n && n < y.n && x.ids[n] == y.ids[n]) n++;
        if (n > 0 && n < HEAD_MAX) {
            memcpy(h->ids, x.ids, (size_t)n * sizeof *x.ids);
            h->n = n;
        }
    }
    token_list_free(&x);
    token_list_free(&y);
    return rc;
}

static bool is_stop(const writer *w, int32_t id)
{
    for (int i = 0; i < w->n_stop; i++)
        if (w->stop[i] == id) return true;
    return false;
}

static void push(writer *w, int i, int32_t id)
{
    if (w->n[i] < w->seqlen) w->ids[i][w->n[i]++] = id;
}

static void begin_text(writer *w, int i)
{
    const head *h = w->dialogue[i] ? &w->user : &w->plain;
    for (int32_t j = 0; j < h->n; j++) push(w, i, h->ids[j]);
}

/* ---- writing ---- */

static err_code step(writer *w, int slots, const job *j, err *e)
{
    step_seq seqs[SLOTS] = {0};
    int at[SLOTS], n = 0;
    for (int i = 0; i < slots; i++) {
        if (w->n[i] >= w->seqlen) continue;
        seqs[n] = (step_seq){.slot = i,
                             .tokens = w->ids[i] + w->ran[i],
                             .n_tokens = w->n[i] - w->ran[i],
                             .n_out = 1,
                             .logits = w->logits + (int64_t)n * w->vocab};
        at[n++] = i;
    }
    TRY(model_step(w->m, seqs, n, j, e));
    for (int k = 0; k < n; k++) {
        const int i = at[k];
        w->ran[i] = w->n[i];
        const int32_t id = sampler_next(w->s[i], seqs[k].logits);
        if (id < 0) return err_set(e, E_INPUT, "window %d: the model's logits are not finite", i);
        push(w, i, id);
        /* A user's turn ends with a stop id too; the dialogue goes on until the text's end. */
        if (is_stop(w, id)) begin_text(w, i);
    }
    return OK;
}

static bool all_full(const writer *w, int slots)
{
    for (int i = 0; i < slots; i++)
        if (w->n[i] < w->seqlen) return false;
    return true;
}

static err_code write_windows(writer *w, int32_t *ids, int32_t first, int slots,
                              const windows_opts *o, const job *j, err *e)
{
    for (int i = 0; i < slots; i++) {
        sample_opts s = sample_greedy();
        s.temperature = 1;
        s.top_p = 0.95;
        s.seed = o->corpus.seed * 0x9e3779b97f4a7c15u + (uint64_t)(first + i);
        TRY(sampler_start(w->s[i], &s, e));
        model_seq_end(w->m, i);
        w->ids[i] = ids + (int64_t)(first + i) * w->seqlen;
        w->n[i] = w->ran[i] = 0;
        w->dialogue[i] = (first + i) % 2;
        begin_text(w, i);
    }
    while (!all_full(w, slots)) TRY(step(w, slots, j, e));
    return OK;
}

/* ---- set-up ---- */

static model_opts opts_for(int32_t samples, int32_t seqlen)
{
    const int32_t slots = samples < SLOTS ? samples : SLOTS;
    return (model_opts){
        .kv = KV_16, .session_len = seqlen, .max_seqs = slots, .max_rows = 256, .kv_share = 0.5};
}

err_code self_memory(memory_plan *p, device *d, weight_src *src, int32_t samples, int32_t seqlen,
                     err *e)
{
    const model_opts o = opts_for(samples, seqlen);
    model_plan plan;
    TRY(model_plan_make(&plan, d, src, &o, NULL, e));
    memory_plan_add(p, "model that writes its text",
                    plan.weights_bytes + plan.kv_bytes + plan.scratch_bytes);
    return OK;
}

static err_code open_writer(writer *w, device *d, weight_src *src, const tokenizer *t,
                            const chat *c, const windows_opts *o, const job *j, err *e)
{
    const model_desc *m = weights_desc(src);
    const model_opts mo = opts_for(o->corpus.samples, o->corpus.seqlen);
    w->vocab = m->vocab;
    w->seqlen = o->corpus.seqlen;
    plain_head(&w->plain, t, m);
    TRY(user_head(&w->user, &w->plain, c, e));
    w->n_stop = chat_stop_ids(c, m->stop, m->n_stop, w->stop, STOPS_MAX);
    TRY(model_open(&w->m, d, src, &mo, j, e));
    for (int i = 0; i < mo.max_seqs; i++) TRY(sampler_open(&w->s[i], m->vocab, w->seqlen, e));
    return mem_alloc((void **)&w->logits, (size_t)mo.max_seqs * (size_t)m->vocab, sizeof(float),
                     "logits", e);
}

err_code self_windows(int32_t *ids, device *d, weight_src *src, const tokenizer *t, const chat *c,
                      const windows_opts *o, const job *j, err *e)
{
    const int32_t samples = o->corpus.samples;
    writer *w = NULL;
    err_code rc;
    TRY(mem_alloc((void **)&w, 1, sizeof *w, "writer", e));
    if ((rc = open_writer(w, d, src, t, c, o, j, e)) != OK) goto done;
    for (int32_t at = 0; at < samples && rc == OK; at += SLOTS) {
        const int slots = samples - at < SLOTS ? samples - at : SLOTS;
        rc = write_windows(w, ids, at, slots, o, j, e);
        job_step(j, "write", "window", at + slots, samples);
    }
done:
    for (int i = 0; i < SLOTS; i++) sampler_close(&w->s[i]);
    model_close(&w->m);
    mem_free(w->logits);
    mem_free(w);
    return rc;
}
