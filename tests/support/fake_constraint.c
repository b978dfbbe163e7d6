#include "support/fake_constraint.h"

#include <stdatomic.h>
#include <stdlib.h>

struct constraint {
    int32_t first, count, length, n;
};

static atomic_int open_ones;

int fake_constraints(void) { return atomic_load(&open_ones); }

constraint *fake_constraint(int32_t first, int32_t count, int32_t length)
{
    constraint *c = calloc(1, sizeof *c);
    if (!c) abort();
    *c = (constraint){first, count, length, 0};
    atomic_fetch_add(&open_ones, 1);
    return c;
}

void constraint_close(constraint **c)
{
    if (!c || !*c) return;
    atomic_fetch_sub(&open_ones, 1);
    free(*c);
    *c = NULL;
}

int32_t constraint_mask(constraint *c, uint32_t *allowed)
{
    if (c->n == c->length) return 0;
    for (int32_t i = c->first; i < c->first + c->count; i++) allowed[i / 32] |= 1u << i % 32;
    return c->count;
}

bool constraint_may_end(const constraint *c) { return c->n == c->length; }

bool constraint_accept(constraint *c, int32_t id)
{
    if (c->n == c->length || id < c->first || id >= c->first + c->count) return false;
    c->n++;
    return true;
}
