/* Rounded weights from a plan. */
#include "awq/dev_replay.h"

#include "awq/dev_chain.h"
#include "awq/on_device_internal.h"

static err_code replay_linear(const quant_block *b, const fold *f, const plan_linear *l, err *e)
{
    dev_scratch *s = b->dev;
    const int64_t n = model_linear_n(b->m, l->role), k = model_linear_k(b->m, l->role);
    tensor scale, zero, packed = dev_2d(s, s->packed, DT_U8, n, k / 2);
    dev_factors v;
    if (!l->codes.data)
        return err_set(e, E_INPUT,
                       "layer %d: %s: expected codes in the unfinished plan, found none",
                       (int)b->layer, role_name(l->role));
    TRY(dev_factors_put(s, fold_find(f, l->role), n, k, &v, e));
    TRY(dev_params_put(s, l, &scale, &zero, e));
    TRY(dev_copy(b->d, &packed, &l->codes, e));
    const rounded_spec spec = {NULL,       &packed, &scale, &zero, dev_opt(&v.col), dev_opt(&v.row),
                               b->o->group};
    TRY(dev_chain_put(s->chain, l->role, &spec, e));
    return dev_sync(b->d, e);
}

err_code dev_replay_block(const quant_block *b, const block_plan *p, const walk_progress *progress,
                          err *e)
{
    fold f;
    err_code rc = OK;
    TRY(fold_init(&f, b->m, p, e));
    for (int i = 0; i < p->n_linears && rc == OK; i++) rc = replay_linear(b, &f, &p->linear[i], e);
    fold_free(&f);
    return rc == OK ? dev_chain_replay(b->dev->chain, progress, e) : rc;
}
