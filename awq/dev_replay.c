/* Rounded weights from a plan. */
#include "awq/dev_replay.h"

#include "awq/dev_chain.h"
#include "awq/on_device_internal.h"

static err_code replay_linear(const quant_block *b, dev_chain *inputs, const fold *f,
                              const plan_linear *l, err *e)
{
    dev_scratch *s = b->dev;
    tensor w = dev_chain_weights(inputs, l->role), scale, zero,
           packed = dev_2d(s, s->packed, DT_U8, w.shape[0], w.shape[1] / 2);
    dev_factors v;
    if (!l->codes.data)
        return err_set(e, E_INPUT,
                       "layer %d: %s: expected codes in the unfinished plan, found none",
                       (int)b->layer, role_name(l->role));
    TRY(dev_factors_put(s, fold_find(f, l->role), w.shape[0], w.shape[1], &v, e));
    TRY(dev_params_put(s, l, &scale, &zero, e));
    TRY(dev_copy(b->d, &packed, &l->codes, e));
    const rounded_spec spec = {NULL,       &packed, &scale, &zero, dev_opt(&v.col), dev_opt(&v.row),
                               b->o->group};
    TRY(op_rounded(b->d, &w, &spec, e));
    dev_chain_put(inputs, l->role);
    return dev_sync(b->d, e);
}

err_code dev_replay_block(const quant_block *b, dev_chain *inputs, const block_plan *p,
                          const walk_progress *progress, err *e)
{
    fold f;
    err_code rc = OK;
    TRY(fold_init(&f, b->m, p, e));
    for (int i = 0; i < p->n_linears && rc == OK; i++)
        rc = replay_linear(b, inputs, &f, &p->linear[i], e);
    fold_free(&f);
    return rc == OK ? dev_chain_replay(inputs, progress, e) : rc;
}
