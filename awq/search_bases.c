/* Two searches, of the residual stream as it is and turned, and which of them becomes the plan.
 * Divergence from the 16-bit model decides: a difference of perplexities would need many times
 * the tokens to be told from chance. */
#include <math.h>
#include <stdio.h>
#include <string.h>

#include "awq/search_internal.h"
#include "base/mem.h"

enum { STILL, TURNED, RUNS };
/* Standard errors that a turn must gain. A wrong choice costs little where the two are that near,
 * but the turn is not for nothing: a tied head is then stored. */
#define SURE 1.

typedef struct {
    spool *set;
    float *kl; /* [tokens] of those held out */
    prediction predicted;
    bool done;
} basis_run;

/* Losses of the windows held out. */
static int64_t losses_of(const search *s)
{
    return (int64_t)search_held_out(s) * (calib_info_of(s->calib)->seqlen - 1);
}

size_t search_bases_bytes(const search *s) { return RUNS * (size_t)losses_of(s) * sizeof(float); }

/* ---- what a run leaves ---- */

static err_code put_note(basis_run *r, int64_t n, err *e)
{
    double nll[] = {r->predicted.nll16, r->predicted.nll, r->predicted.kl};
    const artifact_part parts[] = {{.name = "losses", .t = tensor_1d(nll, DT_F64, 3)},
                                   {.name = "kl", .t = tensor_1d(r->kl, DT_F32, n)}};
    return spool_put_note(r->set, parts, 2, e);
}

/* Done only with all layers and a note of these windows. */
static err_code get_note(basis_run *r, const search *s, int64_t n, err *e)
{
    const int64_t three = 3;
    st_file *f;
    tensor nll, kl;
    err ignored = {0}; /* as any damaged part: work to do again */
    TRY(spool_get_note(r->set, &f, e));
    if (!f) return OK;
    r->done = spool_count(r->set) == s->m->layers &&
              artifact_get(f, "losses", DT_F64, 1, &three, &nll, &ignored) == OK &&
              artifact_get(f, "kl", DT_F32, 1, &n, &kl, &ignored) == OK;
    if (r->done) {
        const double *v = nll.data;
        r->predicted = (prediction){(int32_t)(n / (calib_info_of(s->calib)->seqlen - 1)), v[0],
                                    v[1], v[2]};
        memcpy(r->kl, kl.data, tensor_bytes(&kl));
    }
    st_close(&f);
    return OK;
}

static err_code open_runs(search *s, basis_run *run, const char *request, int64_t n, err *e)
{
    static const char *const names[RUNS] = {"still", "turned"};
    char text[600];
    for (int i = 0; i < RUNS; i++) {
        snprintf(text, sizeof text, "%s %s", request, names[i]);
        const hash128 print = hash_xxh128(text, strlen(text));
        TRY(spool_open_set(&run[i].set, s->whole, names[i], print.hex, e));
        TRY(mem_alloc((void **)&run[i].kl, (size_t)n, sizeof(float), "comparison of bases", e));
        TRY(get_note(&run[i], s, n, e));
    }
    return OK;
}

/* ---- the choice ---- */

static void choose(const search *s, const basis_run *run, int64_t n, basis_choice *c)
{
    const prediction *still = &run[STILL].predicted, *other = &run[TURNED].predicted;
    *c = (basis_choice){.compared = true, .still = *still, .other = *other};
    c->gain = predict_gain(run[STILL].kl, run[TURNED].kl, n, &c->error);
    c->turned = c->gain > SURE * c->error;
    job_log(s->j, LOG_INFO,
            "residual stream: KL divergence on held-out windows %.5f nats, turned %.5f: %.5f +- "
            "%.5f less; perplexity %.4f, turned %.4f; it %s",
            still->kl, other->kl, c->gain, c->error, exp(still->nll), exp(other->nll),
            c->turned ? "is turned" : "stays as it is");
}

static err_code write_plan(search *s, const basis_run *run, search_summary *out, err *e)
{
    const int64_t n = s->m->hidden;
    artifact_part q = {.name = "rotation.residual", .t = tensor_2d(NULL, DT_F32, n, n)};
    const int kept = out->basis.turned ? TURNED : STILL;
    s->spool = run[kept].set;
    out->predicted = run[kept].predicted;
    if (kept == STILL) return search_finish(s, NULL, out, e);
    TRY(mem_alloc(&q.t.data, (size_t)(n * n), sizeof(float), "rotation", e));
    rotate_random(q.t.data, n, SEARCH_SEED);
    const err_code rc = search_finish(s, &q, out, e);
    mem_free(q.t.data);
    return rc;
}

static err_code one_run(search *s, basis_run *r, int which, int64_t n, err *e)
{
    if (r->done) return OK;
    job_log(s->j, LOG_INFO, "search %d of %d: the residual stream %s", which + 1, RUNS,
            which == TURNED ? "turned" : "as it is");
    s->spool = r->set;
    s->stream = which == TURNED;
    s->run = which;
    s->kl = r->kl;
    const err_code rc = search_run_once(s, e);
    search_close_work(s);
    if (rc != OK) return rc;
    r->predicted = s->predicted;
    return put_note(r, n, e);
}

err_code search_both(search *s, const char *request, search_summary *out, err *e)
{
    const int64_t n = losses_of(s);
    basis_run run[RUNS] = {{0}};
    err_code rc = open_runs(s, run, request, n, e);
    for (int i = 0; i < RUNS && rc == OK; i++) out->resumed += spool_count(run[i].set);
    if (rc == OK && out->resumed)
        job_log(s->j, LOG_INFO, "resuming: %d of %d layers are done", (int)out->resumed,
                (int)(RUNS * s->m->layers));
    for (int i = 0; i < RUNS && rc == OK; i++) rc = one_run(s, &run[i], i, n, e);
    if (rc == OK) {
        choose(s, run, n, &out->basis);
        rc = write_plan(s, run, out, e);
    }
    for (int i = 0; i < RUNS; i++) {
        spool_close(&run[i].set);
        mem_free(run[i].kl);
    }
    s->spool = s->whole;
    return rc;
}
