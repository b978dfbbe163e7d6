/* Several sources by weight: how many windows each one gives, and where they stand. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "datasets/corpus_internal.h"

/* Any set of every eighth window, as those that are held out, has its share of each source. */
#define STRIDE 8

/* ---- "FILE:WEIGHT" ---- */

/* A file of the whole name goes before a weight behind the last colon. */
static err_code parse_source(const char *text, char **path, double *weight, err *e)
{
    const char *colon = strrchr(text, ':');
    char *end;
    *weight = 0;
    TRY(mem_strdup(path, text, e));
    if (!colon || colon == text || file_exists(text)) return OK;
    const double w = strtod(colon + 1, &end);
    if (end == colon + 1 || *end) return OK; /* no number: part of the name */
    if (!(w > 0 && w <= 1e9))
        return err_set(e, E_USAGE, "%s: expected a weight above 0 and up to 1e9, found %s", text,
                       colon + 1);
    (*path)[colon - text] = 0;
    *weight = w;
    return OK;
}

err_code corpus_sources_parse(corpus_sources *out, const char *const *texts, int n, err *e)
{
    double sum = 0;
    err_code rc = OK;
    *out = (corpus_sources){.n = n};
    if (n == 0) return OK;
    TRY(mem_alloc((void **)&out->paths, (size_t)n, sizeof *out->paths, "data files", e));
    if ((rc = mem_alloc((void **)&out->shares, (size_t)n, sizeof *out->shares, "data files", e)) !=
        OK)
        goto fail;
    for (int i = 0; i < n; i++) {
        if ((rc = parse_source(texts[i], &out->paths[i], &out->shares[i], e)) != OK) goto fail;
        out->weighted = out->weighted || out->shares[i] > 0;
    }
    for (int i = 0; i < n; i++) {
        if (out->shares[i] == 0) out->shares[i] = 1;
        sum += out->shares[i];
    }
    for (int i = 0; i < n; i++) out->shares[i] /= sum;
    return OK;
fail:
    corpus_sources_free(out);
    return rc;
}

void corpus_sources_free(corpus_sources *s)
{
    for (int i = 0; s->paths && i < s->n; i++) mem_free(s->paths[i]);
    mem_free(s->paths);
    mem_free(s->shares);
    *s = (corpus_sources){0};
}

/* ---- windows ---- */

/* The n-th place that is given out: every eighth place from the last of eight on, then their
 * neighbours. */
static int32_t place(int32_t n, int32_t samples)
{
    for (int32_t first = STRIDE - 1; first >= 0; first--) {
        const int32_t here = first < samples ? (samples - 1 - first) / STRIDE + 1 : 0;
        if (n < here) return first + n * STRIDE;
        n -= here;
    }
    return 0; /* n < samples: not reached */
}

void corpus_mix(int32_t *whose, int32_t *counts, const double *shares, int n, int32_t samples)
{
    memset(counts, 0, (size_t)n * sizeof *counts);
    for (int32_t i = 0; i < samples; i++) {
        int most = 0;
        double behind = -INFINITY;
        for (int s = 0; s < n; s++) { /* who is furthest behind its share */
            const double d = shares[s] * (i + 1) - counts[s];
            if (d > behind + 1e-9) {
                behind = d;
                most = s;
            }
        }
        counts[most]++;
        if (whose) whose[place(i, samples)] = most;
    }
}

typedef struct {
    const corpus_opts *o;
    const tokenizer *t;
    const chat *c;
    const job *j;
    int32_t *source; /* [samples] whose window this is */
    int32_t *counts; /* [n_paths] */
    int32_t *own;    /* windows of one source, room for all */
} mix;

static err_code windows_of(mix *m, int s, int32_t *ids, err *e)
{
    corpus_opts o = *m->o;
    const size_t size = (size_t)o.seqlen * sizeof *ids;
    int32_t at = 0;
    o.paths = &m->o->paths[s];
    o.n_paths = 1;
    o.shares = NULL;
    o.samples = m->counts[s];
    o.seed = corpus_random(m->o->seed, (uint64_t)s); /* one file twice: two draws of it */
    if (o.samples == 0) {
        job_log(m->j, LOG_WARN, "%s: its share of %.3g of %d windows gives none", o.paths[0],
                m->o->shares[s], m->o->samples);
        return OK;
    }
    TRY(corpus_windows(m->own, &o, m->t, m->c, m->j, e));
    for (int32_t i = 0; i < m->o->samples; i++)
        if (m->source[i] == s)
            memcpy(ids + (int64_t)i * o.seqlen, m->own + (int64_t)at++ * o.seqlen, size);
    return OK;
}

err_code corpus_mixed_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t, const chat *c,
                              const job *j, err *e)
{
    mix m = {.o = o, .t = t, .c = c, .j = j};
    err_code rc = mem_alloc((void **)&m.source, (size_t)o->samples, sizeof *m.source, "corpus", e);
    if (rc == OK)
        rc = mem_alloc((void **)&m.counts, (size_t)o->n_paths, sizeof *m.counts, "corpus", e);
    if (rc == OK)
        rc = mem_alloc((void **)&m.own, (size_t)o->samples * (size_t)o->seqlen, sizeof *m.own,
                       "corpus", e);
    if (rc == OK) corpus_mix(m.source, m.counts, o->shares, o->n_paths, o->samples);
    for (int s = 0; s < o->n_paths && rc == OK; s++) rc = windows_of(&m, s, ids, e);
    mem_free(m.own);
    mem_free(m.counts);
    mem_free(m.source);
    return rc;
}
