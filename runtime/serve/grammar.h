/* More ways to come to a grammar (constraint.h): tool calls, and a set that keeps what was compiled
 * lately. All grammars are byte automata with a stack of bounded depth; docs/serving.md says what
 * of JSON schema and of regular expressions they take. */
#ifndef TMF_RUNTIME_SERVE_GRAMMAR_H
#define TMF_RUNTIME_SERVE_GRAMMAR_H

#include "formats/chat.h"
#include "runtime/serve/constraint.h"

/* Calls of tools in the way that `format` writes them (CHAT_TOOLS_NONE: as CHAT_TOOLS_HERMES), with
 * arguments that validate against the tool's `parameters`. tools: the text of an array as in
 * "tools" of /v1/chat/completions. only: the one tool that may be called, and then exactly once;
 * NULL: any. parallel: up to eight calls, else one. Special tokens that belong to the format are
 * allowed where they stand. E_INPUT: not such an array, two tools of one name, or no tool `only`;
 * otherwise as grammar_json_schema. */
err_code grammar_tool_calls(grammar **out, const tokenizer *t, chat_tools format, const char *tools,
                            size_t n, const char *only, bool parallel, err *e);

/* A tokenizer's vocabulary in the form that masks need, made once, and the grammars asked for
 * lately (at most GRAMMAR_KEPT, with at most GRAMMAR_KEPT_BYTES of text). Any thread. t is borrowed
 * until the set and every grammar from it are closed. */
#define GRAMMAR_KEPT       64
#define GRAMMAR_KEPT_BYTES ((size_t)4 << 20)
typedef struct grammar_set grammar_set;
err_code grammar_set_open(grammar_set **out, const tokenizer *t, err *e);
void grammar_set_close(grammar_set **s); /* NULL accepted; grammars stay until they are closed */

/* The same grammars through a set; each call is a reference to close with grammar_close. */
err_code grammar_set_regex(grammar_set *s, grammar **out, const char *pattern, err *e);
err_code grammar_set_json_schema(grammar_set *s, grammar **out, const char *schema, size_t n,
                                 err *e);
err_code grammar_set_json_object(grammar_set *s, grammar **out, err *e);
err_code grammar_set_tool_calls(grammar_set *s, grammar **out, chat_tools format, const char *tools,
                                size_t n, const char *only, bool parallel, err *e);

#endif
