/* The method table. */
#include "awq/method.h"

#include <string.h>

static const quant_method *const methods[] = {&method_rtn, &method_lmdeploy, &method_awq,
                                              &method_gptq, &method_best};

const quant_method *method_at(int i)
{
    return i >= 0 && (size_t)i < sizeof methods / sizeof *methods ? methods[i] : NULL;
}

const quant_method *method_find(const char *name)
{
    for (int i = 0; method_at(i); i++)
        if (strcmp(methods[i]->name, name) == 0) return methods[i];
    return NULL;
}

const char *loss_name(loss_kind l)
{
    static const char *const names[] = {"weights", "blocks", "gram", "module"};
    return names[l];
}

err_code plan_factors(const quant_block *b, block_plan *out, tensor_role source, float **s, err *e)
{
    plan_fold *f = plan_find_fold(out, source);
    void *mem;
    if (!f)
        return err_set(e, E_UNSUPPORTED, "fold of %s: not a source of a channel group",
                       role_name(source));
    TRY(arena_get(b->mem, &mem, (size_t)f->s.shape[0] * sizeof(float), e));
    f->s.data = *s = mem;
    return OK;
}

size_t plan_factors_bytes(const model_desc *m, bool codes)
{
    block_plan p = plan_shape(m, 1);
    size_t n = 0;
    for (int i = 0; i < PLAN_FOLDS; i++)
        n += arena_need((size_t)p.fold[i].s.shape[0] * sizeof(float));
    for (int i = 0; codes && i < p.n_linears; i++)
        n += arena_need((size_t)tensor_count(&p.linear[i].codes));
    return n;
}
