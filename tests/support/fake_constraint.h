/* constraint.h without grammars, for tests of the engine: an answer of `length` ids out of [first,
 * first + count), then nothing. */
#ifndef TMF_TESTS_FAKE_CONSTRAINT_H
#define TMF_TESTS_FAKE_CONSTRAINT_H

#include "runtime/serve/constraint.h"

/* count 0: a dead end from the start. */
constraint *fake_constraint(int32_t first, int32_t count, int32_t length);
int fake_constraints(void); /* how many are open */

#endif
