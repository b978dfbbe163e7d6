/* Windows, places and checks of two streams through a block. */
#include "awq/chain_shared.h"

chain_windows chain_windows_of(layer_walk *w, const tensor *held_out)
{
    chain_windows c = {.held_out = held_out->data,
                       .n = layer_walk_windows(w),
                       .per_pass = layer_walk_windows_per_pass(w)};
    int32_t held = 0;
    c.seqlen = layer_walk_states(w).shape[0] / c.n;
    for (int32_t i = 0; i < c.n; i++) held += c.held_out[i] != 0;
    c.holds_out = held > 0 && held < c.n;
    return c;
}

int32_t chain_windows_at(const chain_windows *w, int32_t first)
{
    return w->n - first < w->per_pass ? w->n - first : w->per_pass;
}

err_code chain_variant(block *out, layer_walk *w, const model_desc *m, err *e)
{
    const block *b = layer_walk_block(w);
    if (b->n_qkv > 1 ? b->n_qkv != 3 : m->qkv == QKV_SPLIT)
        return err_set(e, E_UNSUPPORTED,
                       "layer %d: rounded inputs: expected q, k and v bound each by itself, found "
                       "them as one",
                       (int)b->layer);
    *out = *b;
    return OK;
}

bound_linear *chain_bound(block *b, tensor_role r)
{
    switch (r) {
    case ROLE_QKV:
    case ROLE_Q: return &b->qkv[0];
    case ROLE_K: return &b->qkv[1];
    case ROLE_V: return &b->qkv[2];
    case ROLE_O: return &b->o;
    case ROLE_GATE: return &b->gate_up[0];
    case ROLE_UP: return &b->gate_up[1];
    default: return &b->down;
    }
}

bool chain_adds(tensor_role tap) { return tap == ROLE_O || tap == ROLE_DOWN; }

err_code chain_seen(err *e) { return err_set(e, E_CANCELED, "seen"); }
