/* What the next token of an answer may be: a regular expression or a JSON schema compiled to a byte
 * automaton, and its walk through one answer. Compiled once (limits on states and memory), shared
 * by answers; a constraint is one answer's position in it. Fails closed: what cannot be expressed
 * is refused at compile time. */
#ifndef TMF_RUNTIME_SERVE_CONSTRAINT_H
#define TMF_RUNTIME_SERVE_CONSTRAINT_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "base/err.h"
#include "formats/tokenizer.h"

typedef struct grammar grammar;
/* A JSON value that validates against `schema` (its text). "{}" is any value. E_INPUT: not JSON or
 * not a schema; E_UNSUPPORTED names the keyword; E_LIMIT. */
err_code grammar_json_schema(grammar **out, const tokenizer *t, const char *schema, size_t n,
                             err *e);
/* Any JSON object. */
err_code grammar_json_object(grammar **out, const tokenizer *t, err *e);
/* Reference counted: free once the last constraint on it is closed, too. */
void grammar_close(grammar **g);

typedef struct constraint constraint;
err_code constraint_open(constraint **out, grammar *g, err *e);
void constraint_close(constraint **c); /* NULL accepted */
/* Sets bit id of allowed [(vocab + 31) / 32] for each token that may come now (special tokens only
 * where a grammar of tool calls names them). Bits of ids at or above tokenizer_vocab are 0. Returns
 * how many; 0 where none may follow, and also when memory or the work for one mask ran out. The
 * same at every call; allocates at most cache entries. */
int32_t constraint_mask(constraint *c, uint32_t *allowed);
/* The answer may end here: stop ids may come beside what the mask allows. When it may end and
 * nothing may follow, the mask is empty. */
bool constraint_may_end(const constraint *c);
/* Steps over a token; false (position unchanged) when it was not allowed. */
bool constraint_accept(constraint *c, int32_t id);

#endif
