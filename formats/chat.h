/* Chat prompts: messages to token ids. A template is the directory's own chat_template (Jinja), or
 * a row of text pieces around roles, told by the caller or by the model's family. Users' words are
 * always plain text: only the template's own pieces become special tokens. */
#ifndef TMF_FORMATS_CHAT_H
#define TMF_FORMATS_CHAT_H

#include "base/job.h"
#include "base/json.h"
#include "formats/tokenizer.h"

typedef struct {
    const char *role;    /* "system", "user", "assistant" or "tool"; Jinja takes others, too */
    const char *content; /* UTF-8; NULL only beside tool_calls */
    const char *name, *tool_call_id; /* NULL: none */
    const cJSON *tool_calls; /* of an assistant: an array as in the OpenAI API; NULL: none */
    const char *reasoning;   /* of an assistant: reasoning_content; NULL: none */
} chat_message;

typedef struct chat chat;

/* `name`: a template's name (chat_name_at), the path of a JSON file with LMDeploy's fields (system,
 * eosys, user, eoh, assistant, eoa, separator, stop_words, meta_instruction), or the path of a
 * .jinja file; unknown ones are E_USAGE. NULL: the directory's chat_template, else family_default,
 * else "base"; a chat_template that cannot be read is noted through `j`, and the next best is
 * taken. `t` is borrowed and must stay open. */
err_code chat_open(chat **out, const tokenizer *t, const char *name, const char *family_default,
                   const job *j, err *e);
void chat_close(chat **c); /* NULL accepted */
const char *chat_name(const chat *c);
bool chat_known(const char *name); /* a name that chat_open takes */
/* The i-th name into buf (64 bytes), false past the end; aliases are names too. For help and
 * completion. */
bool chat_name_at(int i, char buf[64]);

/* Appends the ids of a conversation, BOS included where the template or the tokenizer puts one.
 * meta_instruction: a system text used when messages[0] is not one; NULL: the template's own
 * default, if its known text has one (LMDeploy's defaults are not used). add_generation: ends
 * with the head of the assistant's turn. Unknown roles and orders that the template refuses:
 * E_INPUT. */
err_code chat_encode(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, token_list *out, err *e);
/* The next turns behind an answer: what follows the context's tokens when the answer ended in
 * `last` (its last generated id, also a stop id; -1 when it was cut). Closes the assistant's
 * turn, as far as `last` has not, then adds the messages and the head of the assistant's turn.
 * *drop says how many ids (0 or 1) to take off the end of the context first: a stop id that is
 * not the template's own end of a turn. */
err_code chat_encode_next(const chat *c, const chat_message *messages, int64_t n, int32_t last,
                          token_list *out, int *drop, err *e);
/* The text that chat_encode stands for, special tokens as their strings. Free with mem_free. */
err_code chat_render(const chat *c, const chat_message *messages, int64_t n,
                     const char *meta_instruction, bool add_generation, char **out, err *e);

/* Everything that a request may say. Known texts of plain conversations take a short way that gives
 * the same ids. */
typedef struct {
    const chat_message *messages;
    int64_t n;
    const char *meta_instruction; /* as above */
    const cJSON *tools; /* array as in the OpenAI API; NULL or empty: none. Where the template knows
                            nothing of tools they are told in the system message */
    const cJSON *kwargs; /* chat_template_kwargs, an object; keys other than chat_kwarg_at's are
                            E_INPUT; NULL: none */
    int64_t now;         /* the date for templates that name one, seconds since 1970, UTC; 0: always
                            the same day */
    bool add_generation;
} chat_request;
err_code chat_encode_request(const chat *c, const chat_request *r, token_list *out, err *e);
err_code chat_render_request(const chat *c, const chat_request *r, char **out, err *e);
/* The i-th key that kwargs may have; NULL past the end. */
const char *chat_kwarg_at(int i);

/* How answers write tool calls: told from the template's text, or the row's name. */
typedef enum {
    CHAT_TOOLS_NONE,      /* nothing is known */
    CHAT_TOOLS_HERMES,    /* <tool_call>{"name":..,"arguments":..}</tool_call> */
    CHAT_TOOLS_INTERNLM2, /* <|action_start|><|plugin|>{"name":..,"parameters":..}<|action_end|> */
    CHAT_TOOLS_LLAMA3,    /* {"name":..,"parameters":..}, perhaps behind <|python_tag|> */
    CHAT_TOOLS_MISTRAL,   /* [TOOL_CALLS][{"name":..,"arguments":..}] */
    CHAT_TOOLS_DEEPSEEK   /* name, a mark, {..}: between marks of its own */
} chat_tools;
chat_tools chat_tool_format(const chat *c);

/* Ids that end an answer: model_stop (of config.json and generation_config.json), the
 * tokenizer's EOS, and the template's stop words that are one token, each once. Fills out[] up
 * to cap; returns how many. */
int chat_stop_ids(const chat *c, const int32_t *model_stop, int n_model_stop, int32_t *out,
                  int cap);

#endif
