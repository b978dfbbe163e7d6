/* Which container a path is, and the calls on it. */
#include "formats/weights.h"

#include <assert.h>
#include <errno.h>
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "formats/hf_dir.h"
#include "formats/tm_store.h"

struct weight_src {
    src_kind kind;
    model_desc m;
    char *path, *tokenizer_dir, *digest;
    const weight_ops *ops;
    void *self;
};

err_code weights_open(weight_src **out, const char *path, err *e)
{
    char probe[4096];
    *out = NULL;
    if (!file_exists(path)) return err_sys(e, E_IO, errno, "cannot open '%s'", path);
    if (!file_is_dir(path))
        return err_set(e, E_INPUT, "'%s' is a file, expected a model directory or a workspace",
                       path);
    TRY(path_join(probe, sizeof probe, path, "triton_models", e));
    if (file_is_dir(probe)) return tm_store_weights(out, path, e);
    TRY(path_join(probe, sizeof probe, path, "config.json", e));
    if (file_exists(probe)) return hf_open(out, path, e);
    return err_set(
        e, E_INPUT,
        "'%s' has neither config.json (a Hugging Face directory) nor triton_models (a workspace)",
        path);
}

err_code weights_make(weight_src **out, src_kind kind, const model_desc *m, const char *path,
                      const char *tokenizer_dir, const char *digest, const weight_ops *ops,
                      void *self, err *e)
{
    weight_src *s;
    err_code rc;
    *out = NULL;
    if (model_desc_check(m, e) != OK) return err_wrap(e, "%s", path);
    TRY(mem_alloc((void **)&s, 1, sizeof *s, path, e));
    *s = (weight_src){.kind = kind, .m = *m, .ops = ops};
    if ((rc = mem_strdup(&s->path, path, e)) != OK) goto fail;
    if ((rc = mem_strdup(&s->tokenizer_dir, tokenizer_dir ? tokenizer_dir : "", e)) != OK)
        goto fail;
    if ((rc = mem_strdup(&s->digest, digest ? digest : "", e)) != OK) goto fail;
    s->self = self; /* from here its owner */
    *out = s;
    return OK;
fail:
    weights_close(&s);
    return rc;
}

void weights_close(weight_src **s)
{
    weight_src *v = *s;
    if (!v) return;
    if (v->self) v->ops->close(v->self);
    mem_free(v->digest);
    mem_free(v->tokenizer_dir);
    mem_free(v->path);
    mem_free(v);
    *s = NULL;
}

src_kind weights_kind(const weight_src *s) { return s->kind; }
const model_desc *weights_desc(const weight_src *s) { return &s->m; }
const char *weights_path(const weight_src *s) { return s->path; }
const char *weights_tokenizer_dir(const weight_src *s) { return s->tokenizer_dir; }
const char *weights_digest(const weight_src *s) { return s->digest; }

err_code weights_tensor(weight_src *s, tensor_role r, int32_t layer, tensor *view, err *e)
{
    assert(layer >= -1 && layer < s->m.layers);
    return s->ops->tensor(s->self, r, layer, view, e);
}

err_code weights_linear(weight_src *s, tensor_role r, int32_t layer, int32_t expert,
                        linear_view *view, err *e)
{
    assert(layer >= 0 && layer < s->m.layers);
    return s->ops->linear(s->self, r, layer, expert, view, e);
}

bool weights_has(weight_src *s, tensor_role r, int32_t layer, int32_t expert)
{
    return layer < s->m.layers && s->ops->has(s->self, r, layer, expert);
}

/* Hints may be given for a layer beyond the last one: walks ask for the next. */
static void advise(weight_src *s, int32_t layer, bool need)
{
    if (s->ops->advise && layer >= -1 && layer < s->m.layers) s->ops->advise(s->self, layer, need);
}

void weights_prefetch(weight_src *s, int32_t layer) { advise(s, layer, true); }
void weights_release(weight_src *s, int32_t layer) { advise(s, layer, false); }
