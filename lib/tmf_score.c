/* How likely prompts are: the engine looks at them and makes one token each, which is dropped. */
#include <poll.h>

#include "base/mem.h"
#include "lib/tmf_internal.h"

#define BUSY_MS 5 /* how often a full queue is tried again */

static err_code submit(answer **out, tmf_model *m, const tmf_prompt *p, err *e)
{
    if (p->n_ids < 2 || p->n_ids > INT32_MAX)
        return err_set(e, E_USAGE, "expected 2 ids or more, got %zu", p->n_ids);
    const engine_request r = {.prompt = p->ids,
                              .n_prompt = (int32_t)p->n_ids,
                              .max_new = 1,
                              .sample = sample_greedy(),
                              .top_logprobs = -1,
                              .prompt_logprobs = 0,
                              .no_prefix = true}; /* what a cached prefix holds is not scored */
    err_code rc;
    while ((rc = engine_submit(m->g, &r, out, e)) == E_BUSY) (void)poll(NULL, 0, BUSY_MS);
    return rc;
}

static err_code take(answer **a, double *nll, err *e)
{
    const answer_token *t;
    answer_token made;
    answer_state state;
    double sum = 0;
    do (void)answer_read(*a, &made, 1, -1, &state);
    while (state < ANSWER_STOP);
    err_code rc = answer_error(*a, e);
    if (rc == OK && state == ANSWER_CANCELED)
        rc = err_set(e, E_CANCELED, "the model is being closed");
    if (rc == OK) {
        const int32_t n = answer_prompt(*a, &t);
        for (int32_t i = 0; i < n; i++) sum -= (double)t[i].logprob;
        *nll = n > 0 ? sum / n : 0;
    }
    answer_close(a);
    return rc;
}

/* As many at once as the batch holds, taken in order. */
static err_code score(tmf_model *m, const tmf_prompt *prompts, size_t n, answer **a, double *nll,
                      err *e)
{
    const size_t window = (size_t)m->max_batch;
    for (size_t i = 0; i < n + window; i++) {
        if (i >= window && i - window < n) {
            const err_code rc = take(&a[i % window], &nll[i - window], e);
            if (rc != OK) return err_wrap(e, "prompt %zu", i - window);
        }
        if (i < n && submit(&a[i % window], m, &prompts[i], e) != OK)
            return err_wrap(e, "prompt %zu", i);
    }
    return OK;
}

tmf_status tmf_score(tmf_model *m, const tmf_prompt *prompts, size_t n, double *nll, tmf_error *e)
{
    void *p;
    err failed = {OK, ""};
    if (mem_alloc(&p, (size_t)m->max_batch, sizeof(answer *), "answers", &failed) != OK)
        return tmf_told(&failed, e);
    answer **a = p;
    (void)score(m, prompts, n, a, nll, &failed);
    for (int32_t i = 0; i < m->max_batch; i++) answer_close(&a[i]);
    mem_free(p);
    return tmf_told(&failed, e);
}
