/* Where calibration tokens come from. */
#include "calib/windows.h"
#include "calib/collect.h"

#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/family.h"

bool windows_self(const windows_opts *o)
{
    return o->corpus.n_paths == 0 && o->corpus.dataset && strcmp(o->corpus.dataset, "self") == 0;
}

static err_code read_windows(int32_t *ids, device *d, weight_src *src, const tokenizer *t,
                             const chat *c, const windows_opts *o, const job *j, err *e)
{
    if (windows_self(o)) return self_windows(ids, d, src, t, c, o, j, e);
    return corpus_windows(ids, &o->corpus, t, c, j, e);
}

static err_code check_ids(const int32_t *ids, const corpus_opts *o, const model_desc *m,
                          const char *dir, err *e)
{
    const int64_t n = (int64_t)o->samples * o->seqlen;
    for (int64_t i = 0; i < n; i++)
        if (ids[i] < 0 || ids[i] >= m->vocab)
            return err_set(e, E_INPUT,
                           "%s: the tokenizer gives id %d, expected ids below the vocabulary of %d",
                           dir, (int)ids[i], (int)m->vocab);
    return OK;
}

err_code windows_make(int32_t *ids, device *d, weight_src *src, const windows_opts *o, const job *j,
                      err *e)
{
    const family *f = family_by_name(weights_desc(src)->family);
    tokenizer *t = NULL;
    chat *c = NULL;
    err_code rc = tokenizer_open(&t, weights_tokenizer_dir(src), e);
    if (rc != OK) goto done;
    if ((rc = chat_open(&c, t, o->chat_template, f ? f->chat_template : NULL, NULL, e)) != OK)
        goto done;
    if ((rc = read_windows(ids, d, src, t, c, o, j, e)) != OK) goto done;
    rc = check_ids(ids, &o->corpus, weights_desc(src), weights_tokenizer_dir(src), e);
done:
    chat_close(&c);
    tokenizer_close(&t);
    return rc;
}

err_code windows_memory(memory_plan *p, device *d, weight_src *src, const windows_opts *o, err *e)
{
    if (o->corpus.shares)
        memory_plan_add(p, "windows of one source",
                        (size_t)o->corpus.samples * (size_t)o->corpus.seqlen * sizeof(int32_t));
    if (windows_self(o)) return self_memory(p, d, src, o->corpus.samples, o->corpus.seqlen, e);
    return OK;
}

/* `, "sources":[{"share":0.25,"windows":32},...]` */
static err_code describe_shares(cJSON *to, const corpus_opts *o, err *e)
{
    int32_t *counts = NULL;
    cJSON *list = cJSON_AddArrayToObject(to, "sources");
    TRY(mem_alloc((void **)&counts, (size_t)o->n_paths, sizeof *counts, "data files", e));
    corpus_mix(NULL, counts, o->shares, o->n_paths, o->samples);
    bool ok = list != NULL;
    for (int i = 0; i < o->n_paths && ok; i++) {
        cJSON *s = cJSON_CreateObject();
        char share[32];
        snprintf(share, sizeof share, "%.6g", o->shares[i]);
        ok = cJSON_AddRawToObject(s, "share", share) &&
             cJSON_AddNumberToObject(s, "windows", counts[i]) && cJSON_AddItemToArray(list, s);
        if (!ok) cJSON_Delete(s);
    }
    mem_free(counts);
    return ok ? OK : err_set(e, E_NOMEM, "data files: out of memory");
}

err_code windows_describe(char **out, const windows_opts *o, err *e)
{
    const corpus_opts *c = &o->corpus;
    cJSON *j = cJSON_CreateObject();
    char seed[24];
    snprintf(seed, sizeof seed, "%llu", (unsigned long long)c->seed);
    bool ok = cJSON_AddStringToObject(j, "dataset", c->dataset ? c->dataset : "") &&
              cJSON_AddStringToObject(j, "pick", c->pick == PICK_FIRST ? "first" : "random") &&
              cJSON_AddNumberToObject(j, "samples", c->samples) &&
              cJSON_AddRawToObject(j, "seed", seed) &&
              cJSON_AddNumberToObject(j, "seqlen", c->seqlen);
    err_code rc = ok ? OK : err_set(e, E_NOMEM, "options: out of memory");
    if (rc == OK && c->shares) rc = describe_shares(j, c, e);
    char *text = rc == OK ? cJSON_PrintUnformatted(j) : NULL;
    if (rc == OK)
        rc = text ? mem_strdup(out, text, e) : err_set(e, E_NOMEM, "options: out of memory");
    cJSON_free(text);
    cJSON_Delete(j);
    return rc;
}

err_code windows_tokenizer_digest(hash128 *out, const char *dir, err *e)
{
    static const char *const names[] = {
        "tokenizer.model", "tokenizer.json",        "vocab.json",
        "merges.txt",      "tokenizer_config.json", "added_tokens.json"};
    hash_xxh *h = NULL;
    char path[4096];
    err_code rc = OK;
    TRY(hash_xxh_open(&h, e));
    for (size_t i = 0; i < sizeof names / sizeof *names && rc == OK; i++) {
        file_map m;
        if ((rc = path_join(path, sizeof path, dir, names[i], e)) != OK || !file_exists(path))
            continue;
        if ((rc = file_map_open(&m, path, e)) != OK) continue;
        hash_xxh_add(h, names[i], strlen(names[i]) + 1);
        hash_xxh_add(h, m.data ? m.data : (const uint8_t *)"", m.size);
        file_map_close(&m);
    }
    *out = hash_xxh_end(&h);
    return rc;
}

err_code windows_run_memory(memory_plan *p, device *d, weight_src *src, const windows_opts *w,
                            err *e)
{
    *p = (memory_plan){0};
    memory_plan_add(p, "program", memory_plan_process_bytes());
    memory_plan_add(p, "windows",
                    (size_t)w->corpus.samples * (size_t)w->corpus.seqlen * sizeof(int32_t));
    TRY(windows_memory(p, d, src, w, e));
    collect_memory(p, d, src, w->corpus.samples, w->corpus.seqlen);
    return OK;
}
