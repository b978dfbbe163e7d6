/* Any bytes as a plan file: refused with a message, or a file whose views have the shapes that it
 * states. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "formats/plan_file.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n);

static void need(int holds)
{
    if (!holds) abort();
}

static void look_at_layer(const plan_file *f, int32_t layer)
{
    block_plan b;
    err e = {OK, ""};
    if (plan_layer(f, layer, &b, &e) != OK) {
        need(e.code == E_INPUT && strlen(e.msg) > 6);
        return;
    }
    need(b.n_linears > 0 && b.n_linears <= PLAN_LINEARS);
    for (int i = 0; i < b.n_linears; i++) {
        const plan_linear *l = &b.linear[i];
        need(l->scale.data && l->zero.data && tensor_count(&l->scale) == tensor_count(&l->zero));
        need(!l->codes.data ||
             tensor_count(&l->codes) * 2 == tensor_count(&l->scale) * plan_info_of(f)->group);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t n)
{
    plan_file *f = NULL;
    tensor r;
    err e = {OK, ""};
    if (plan_open_memory(&f, data, n, "fuzz", &e) != OK) {
        need(f == NULL && e.code != OK && strlen(e.msg) > 6 && !strchr(e.msg, '\n'));
        return 0;
    }
    const plan_info *i = plan_info_of(f);
    need(i->layers > 0 && i->group > 0 && i->method && i->options && i->loss && i->model &&
         i->calib);
    for (int32_t l = 0; l < i->layers && l < 64; l++) look_at_layer(f, l);
    if (plan_rotation(f, "residual", &r)) need(plan_rotation_count(f) > 0);
    plan_close(&f);
    return 0;
}
