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
    if (windows_self(o)) return self_memory(p, d, src, o->corpus.samples, o->corpus.seqlen, e);
    return OK;
}

void windows_describe(char *buf, size_t cap, const windows_opts *o)
{
    snprintf(buf, cap,
             "{\"dataset\":\"%.32s\",\"pick\":\"%s\",\"samples\":%d,\"seed\":%llu,\"seqlen\":%d}",
             o->corpus.dataset ? o->corpus.dataset : "",
             o->corpus.pick == PICK_FIRST ? "first" : "random", (int)o->corpus.samples,
             (unsigned long long)o->corpus.seed, (int)o->corpus.seqlen);
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
