/* The table of parameters, and reading a request by it. */
#include <math.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "runtime/serve/api_internal.h"

/* Who takes what. */
#define GENERATE (API_CHAT | API_COMPLETION | API_INTERACTIVE | API_GENERATE)
#define OPENAI   (API_CHAT | API_COMPLETION)
#define ALL      (GENERATE | API_ENCODE | API_DECODE | API_PPL | API_TEMPLATE)

typedef struct {
    api_param p;
    size_t at;    /* in api_request */
    size_t bytes; /* of an integer: 4 or 8 */
    api_reader read;
} row;

#define AT(field) offsetof(api_request, field), sizeof(((api_request *)0)->field)
#define BOOL(name, who, field, doc)                                      \
    {                                                                    \
        {name, who, API_T_BOOL, 0, 0, false, NULL, doc}, AT(field), NULL \
    }
#define INT(name, who, field, lo, hi, doc)                                \
    {                                                                     \
        {name, who, API_T_INT, lo, hi, false, NULL, doc}, AT(field), NULL \
    }
#define NUMBER(name, who, field, lo, hi, open, doc)                         \
    {                                                                       \
        {name, who, API_T_NUMBER, lo, hi, open, NULL, doc}, AT(field), NULL \
    }
#define STRING(name, who, field, doc)                                      \
    {                                                                      \
        {name, who, API_T_STRING, 0, 0, false, NULL, doc}, AT(field), NULL \
    }
#define OTHER(name, who, read, schema, doc)                            \
    {                                                                  \
        {name, who, API_T_OTHER, 0, 0, false, schema, doc}, 0, 0, read \
    }
#define IGNORED(name, who, doc)                                        \
    {                                                                  \
        {name, who, API_T_IGNORED, 0, 0, false, NULL, doc}, 0, 0, NULL \
    }
#define REFUSED(name, who, doc)                                        \
    {                                                                  \
        {name, who, API_T_REFUSED, 0, 0, false, NULL, doc}, 0, 0, NULL \
    }

#define IDS   "{\"type\":\"array\",\"items\":{\"type\":\"integer\"}}"
#define TEXTS "{\"type\":\"array\",\"items\":{\"type\":\"string\"}}"

static const row rows[] = {
    STRING("model", OPENAI | API_PPL | API_ENCODE | API_DECODE | API_TEMPLATE, model,
           "the model's name or an alias"),
    OTHER("messages", API_CHAT | API_TEMPLATE, api_read_messages,
          "{\"type\":\"array\",\"items\":{\"type\":\"object\"},\"minItems\":1}",
          "the conversation: role, content (text or text parts), tool_calls, tool_call_id"),
    OTHER("prompt", API_COMPLETION, api_read_prompt,
          "{\"anyOf\":[{\"type\":\"string\"}," TEXTS "," IDS ",{\"type\":\"array\",\"items\":" IDS
          "}]}",
          "text, token ids, or a list of either"),
    OTHER("prompt", API_GENERATE, api_read_prompt, "{\"type\":\"string\"}", "a text"),
    OTHER("input_ids", API_GENERATE, api_read_tokens, IDS, "or its token ids"),
    OTHER(
        "prompt", API_INTERACTIVE, api_read_prompt,
        "{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"array\",\"items\":{\"type\":\"object\"}}]}",
        "the next words of the session, or messages"),
    OTHER("input", API_ENCODE | API_PPL, api_read_prompt,
          "{\"anyOf\":[{\"type\":\"string\"}," TEXTS "," IDS ",{\"type\":\"array\",\"items\":" IDS
          "}]}",
          "a text or a list of them (/get_ppl: also token ids)"),
    OTHER("prompt", API_ENCODE, api_read_prompt, "{\"type\":\"string\"}", "as input"),
    OTHER("content", API_ENCODE, api_read_prompt, "{\"type\":\"string\"}", "as input"),
    OTHER("tokens", API_DECODE, api_read_tokens, IDS, "token ids"),
    NUMBER("temperature", GENERATE, sample.temperature, 0, 2, false, "0 is exactly greedy"),
    NUMBER("top_p", GENERATE, sample.top_p, 0, 1, true,
           "the shortest head of probabilities with this sum"),
    INT("top_k", GENERATE, sample.top_k, 0, INT32_MAX, "keep so many; 0: all"),
    NUMBER("min_p", GENERATE, sample.min_p, 0, 1, false, "keep those of this share of the largest"),
    NUMBER("repetition_penalty", GENERATE, sample.repetition_penalty, 0, 1000, true,
           "weakens what prompt and answer hold; 1: off"),
    INT("penalty_window", GENERATE, sample.penalty_window, 0, INT32_MAX,
        "tokens that repetition_penalty looks back on; 0: all"),
    NUMBER("presence_penalty", GENERATE, sample.presence_penalty, -2, 2, false,
           "off the logit of what the answer holds"),
    NUMBER("frequency_penalty", GENERATE, sample.frequency_penalty, -2, 2, false,
           "and off for each time"),
    OTHER(
        "seed", GENERATE, api_read_seed,
        "{\"type\":\"integer\",\"minimum\":-9223372036854775808,\"maximum\":18446744073709551615}",
        "the same seed gives the same answer, whatever runs beside; choice i uses seed + i"),
    INT("n", OPENAI, n, 1, INT32_MAX, "answers to one prompt"),
    OTHER("best_of", API_COMPLETION, api_read_best_of,
          "{\"type\":\"integer\",\"minimum\":1,\"maximum\":1}", "1 only"),
    INT("max_tokens", OPENAI | API_GENERATE, max_tokens, 0, INT32_MAX,
        "most tokens of the answer, cut to what the context has room for"),
    INT("max_completion_tokens", API_CHAT, max_tokens, 1, INT32_MAX, "replaces max_tokens"),
    INT("request_output_len", API_INTERACTIVE, max_tokens, 0, INT32_MAX,
        "most tokens of the answer"),
    INT("min_tokens", GENERATE, min_tokens, 0, INT32_MAX, "no stop token before so many"),
    INT("min_new_tokens", GENERATE, min_tokens, 0, INT32_MAX, "another name of min_tokens"),
    OTHER(
        "logprobs", OPENAI, api_read_logprobs,
        "{\"anyOf\":[{\"type\":\"boolean\"},{\"type\":\"integer\",\"minimum\":0,\"maximum\":20}]}",
        "chat: a boolean; completions: alternatives beside each token's"),
    INT("top_logprobs", API_CHAT, top_logprobs, 0, API_MAX_TOP,
        "alternatives beside each token's; needs logprobs"),
    BOOL("return_logprob", API_GENERATE, return_logprob,
         "the log-probability of each token, beside its id"),
    INT("prompt_logprobs", OPENAI, prompt_logprobs, 0, API_MAX_TOP,
        "the same for the prompt's tokens"),
    BOOL("echo", API_COMPLETION, echo,
         "the prompt in front of the answer, with logprobs its log-probabilities"),
    OTHER("logit_bias", GENERATE, api_read_bias,
          "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"number\",\"minimum\":-100,"
          "\"maximum\":100}}",
          "token id to what is added to its logit"),
    BOOL("stream", GENERATE, stream, "server-sent events"),
    OTHER("stream_options", OPENAI, api_read_stream_options,
          "{\"type\":\"object\",\"properties\":{\"include_usage\":{\"type\":\"boolean\"}}}",
          "include_usage"),
    OTHER("stop", GENERATE, api_read_stop,
          "{\"anyOf\":[{\"type\":\"string\"},{\"type\":\"array\",\"items\":{\"type\":\"string\"},"
          "\"maxItems\":16}]}",
          "texts that end the answer, wherever token borders fall"),
    OTHER("stop_token_ids", GENERATE, api_read_stop_ids, IDS, "tokens that end the answer"),
    BOOL("ignore_eos", GENERATE, ignore_eos, "go on behind stop tokens"),
    BOOL("skip_special_tokens", GENERATE, skip_special, "leave out the text of special tokens"),
    BOOL("include_stop_str_in_output", GENERATE, include_stop, "keep the stop text"),
    BOOL("return_token_ids", GENERATE, return_ids, "ids of prompt and answer beside the text"),
    INT("timeout_ms", GENERATE, timeout_ms, 1, 86400000, "ends the answer as length"),
    BOOL("no_prefix_cache", GENERATE, no_prefix, "neither use nor leave a cached prefix"),
    OTHER("tools", API_CHAT | API_TEMPLATE, api_read_tools,
          "{\"type\":\"array\",\"items\":{\"type\":\"object\"},\"maxItems\":128}",
          "functions that the model may call"),
    OTHER("tool_choice", API_CHAT, api_read_tool_choice,
          "{\"anyOf\":[{\"type\":\"string\",\"enum\":[\"none\",\"auto\",\"required\"]},{\"type\":"
          "\"object\"}]}",
          "none, auto, required or one function"),
    BOOL("parallel_tool_calls", API_CHAT, parallel_tools, "more than one call in an answer"),
    OTHER("response_format", OPENAI, api_read_format,
          "{\"type\":\"object\",\"properties\":{\"type\":{\"enum\":[\"text\",\"json_object\","
          "\"json_schema\",\"regex\",\"regex_schema\"]}}}",
          "what the answer must match; what cannot be kept is refused"),
    OTHER("chat_template_kwargs", API_CHAT | API_TEMPLATE, api_read_kwargs, "{\"type\":\"object\"}",
          "switches of the chat template"),
    BOOL("add_generation_prompt", API_TEMPLATE, add_generation,
         "end with the head of the assistant's turn"),
    INT("session_id", API_INTERACTIVE, session_id, -1, 9007199254740991.0,
        "whose turn it is; -1: a new one"),
    BOOL("interactive_mode", API_INTERACTIVE, interactive, "keep the session for the next request"),
    BOOL("cancel", API_INTERACTIVE, cancel, "stop what the session is answering"),
    BOOL("add_bos", API_ENCODE | API_COMPLETION | API_PPL, add_bos,
         "BOS in front where the tokenizer puts one"),
    BOOL("add_special", API_ENCODE, add_bos, "as add_bos"),
    BOOL("add_special_tokens", API_ENCODE, add_bos, "as add_bos"),
    BOOL("parse_special", API_ENCODE | API_COMPLETION | API_PPL, parse_special,
         "texts of special tokens become those tokens"),
    BOOL("skip_special_tokens", API_DECODE, skip_special, "leave out the text of special tokens"),
    IGNORED("spaces_between_special_tokens", GENERATE,
            "texts are the tokens' bytes, nothing is put between them"),
    IGNORED("do_preprocess", API_ENCODE, "has no effect"),
    IGNORED("with_pieces", API_ENCODE, "has no effect"),
    IGNORED("user", ALL, "has no effect"),
    IGNORED("metadata", OPENAI, "has no effect"),
    IGNORED("store", OPENAI, "nothing is stored"),
    IGNORED("service_tier", OPENAI, "has no effect"),
    IGNORED("safety_identifier", OPENAI, "has no effect"),
    IGNORED("prompt_cache_key", OPENAI, "prefixes are reused by themselves"),
    REFUSED("suffix", API_COMPLETION, "text behind the answer is not supported"),
    REFUSED("adapter_name", GENERATE, "adapters are not supported"),
    IGNORED("session_id", API_GENERATE, "each request stands alone"),
    REFUSED("image_data", API_GENERATE, "this model reads text only"),
    REFUSED("image_url", API_INTERACTIVE, "this model reads text only"),
    REFUSED("audio", API_CHAT, "this model writes text only"),
    REFUSED("functions", API_CHAT, "use tools"),
    REFUSED("function_call", API_CHAT, "use tool_choice"),
    REFUSED("web_search_options", API_CHAT, "there is no search"),
    REFUSED("prediction", API_CHAT, "predicted outputs are not supported"),
    REFUSED("chat_template", API_CHAT | API_TEMPLATE, "a template is never taken from a request"),
    REFUSED("use_beam_search", OPENAI, "beam search is not supported"),
};
#define N_ROWS ((int)(sizeof rows / sizeof rows[0]))

const api_param *api_param_at(int i) { return i >= 0 && i < N_ROWS ? &rows[i].p : NULL; }

const char *api_json_kind(const cJSON *v)
{
    if (cJSON_IsNull(v)) return "null";
    if (cJSON_IsBool(v)) return "a boolean";
    if (cJSON_IsNumber(v)) return "a number";
    if (cJSON_IsString(v)) return "a string";
    return cJSON_IsArray(v) ? "an array" : "an object";
}

err_code api_alloc(api_reading *x, void **out, size_t n, size_t size)
{
    err e;
    return mem_alloc(out, n, size, "request", &e) == OK ? OK : api_fail_err(x->f, &e, NULL);
}

/* ---- one value by its row ---- */

static err_code read_int(api_reading *x, const row *w, const cJSON *v)
{
    const api_param *p = &w->p;
    const double d = v->valuedouble;
    if (!cJSON_IsNumber(v) || d != floor(d))
        return api_fail(x->f, API_INVALID_VALUE, p->name, "'%s': expected an integer, got %s",
                        p->name, cJSON_IsNumber(v) ? "a fraction" : api_json_kind(v));
    if (d < p->lo || d > p->hi)
        return api_fail(x->f, API_INVALID_VALUE, p->name,
                        "'%s': expected an integer from %.0f to %.0f, got %.17g", p->name, p->lo,
                        p->hi, d);
    const int64_t value = (int64_t)d;
    const int32_t narrow = (int32_t)value;
    char *to = (char *)x->r + w->at;
    if (w->bytes == sizeof narrow)
        memcpy(to, &narrow, sizeof narrow);
    else
        memcpy(to, &value, sizeof value);
    return OK;
}

static err_code read_number(api_reading *x, const row *w, const cJSON *v)
{
    const api_param *p = &w->p;
    const double d = v->valuedouble;
    if (!cJSON_IsNumber(v))
        return api_fail(x->f, API_INVALID_VALUE, p->name, "'%s': expected a number, got %s",
                        p->name, api_json_kind(v));
    if (!isfinite(d) || d < p->lo || d > p->hi || (p->lo_open && d <= p->lo))
        return api_fail(x->f, API_INVALID_VALUE, p->name,
                        "'%s': expected a number %s %g up to %g, got %g", p->name,
                        p->lo_open ? "above" : "from", p->lo, p->hi, d);
    memcpy((char *)x->r + w->at, &d, sizeof d);
    return OK;
}

static err_code read_refused(api_reading *x, const row *w, const cJSON *v)
{
    if (cJSON_IsFalse(v)) return OK;
    return api_fail(x->f, API_INVALID_VALUE, w->p.name, "'%s': %s", w->p.name, w->p.doc);
}

static err_code read_row(api_reading *x, const row *w, const cJSON *v)
{
    const bool yes = cJSON_IsTrue(v);
    switch (w->p.type) {
    case API_T_BOOL:
        if (!cJSON_IsBool(v)) break;
        memcpy((char *)x->r + w->at, &yes, sizeof yes);
        return OK;
    case API_T_INT: return read_int(x, w, v);
    case API_T_NUMBER: return read_number(x, w, v);
    case API_T_STRING:
        if (!cJSON_IsString(v)) break;
        *(const char **)(void *)((char *)x->r + w->at) = v->valuestring;
        return OK;
    case API_T_OTHER: return w->read(x, w->p.name, v);
    case API_T_IGNORED: return OK;
    case API_T_REFUSED: return read_refused(x, w, v);
    }
    return api_fail(x->f, API_INVALID_VALUE, w->p.name, "'%s': expected a %s, got %s", w->p.name,
                    w->p.type == API_T_BOOL ? "boolean" : "string", api_json_kind(v));
}

/* ---- the whole ---- */

static void set_defaults(api_request *r)
{
    const bool session = r->who == API_INTERACTIVE;
    r->sample = sample_greedy();
    r->sample.temperature = session ? 0.8 : 1; /* LMDeploy's and OpenAI's */
    r->sample.top_p = session ? 0.8 : 1;
    r->sample.top_k = session ? 40 : 0;
    r->max_tokens = r->who == API_COMPLETION ? 16
                    : session                ? 512
                    : r->who == API_GENERATE ? 128
                                             : -1;
    r->return_ids = r->who == API_GENERATE;
    r->n = 1;
    r->top_logprobs = r->prompt_logprobs = r->session_id = -1;
    r->skip_special = r->parallel_tools = r->add_generation = r->add_bos = true;
    r->stream = false;
}

/* A key that no row of this request has. */
static err_code read_unknown(api_reading *x, const char *key)
{
    if (!x->l->strict) return OK;
    return api_fail(x->f, API_INVALID_VALUE, key, "unknown parameter '%.80s'", key);
}

/* max_completion_tokens stands behind max_tokens in the table: read row by row, it wins. */
static err_code read_rows(api_reading *x)
{
    for (int i = 0; i < N_ROWS; i++) {
        const row *w = &rows[i];
        if (!(w->p.who & x->r->who)) continue;
        const cJSON *v = cJSON_GetObjectItemCaseSensitive(x->r->body, w->p.name);
        if (v && !cJSON_IsNull(v)) TRY(read_row(x, w, v));
    }
    for (const cJSON *v = x->r->body->child; v; v = v->next) {
        bool known = false;
        for (int i = 0; i < N_ROWS && !known; i++)
            known = (rows[i].p.who & x->r->who) && strcmp(rows[i].p.name, v->string) == 0;
        if (!known) TRY(read_unknown(x, v->string));
    }
    return OK;
}

static err_code missing(api_reading *x, const char *name)
{
    return api_fail(x->f, API_INVALID_VALUE, name, "missing parameter '%s'", name);
}

/* What could never be answered is told so, rather than to come again. */
static err_code check_answers(api_reading *x)
{
    const api_request *r = x->r;
    const char *name = r->who == API_PPL ? "input" : "prompt";
    const int64_t n = r->n_prompts * r->n;
    if (!(r->who & (API_COMPLETION | API_PPL)) || !x->l->max_answers || n <= x->l->max_answers)
        return OK;
    return api_fail(x->f, API_INVALID_VALUE, name,
                    "'%s': expected at most %d answers at once, got %lld", name, x->l->max_answers,
                    (long long)n);
}

static err_code check_whole(api_reading *x)
{
    const api_request *r = x->r;
    const bool logprobs = cJSON_IsTrue(cJSON_GetObjectItemCaseSensitive(r->body, "logprobs"));
    if ((r->who & OPENAI) && !r->model) return missing(x, "model");
    if ((r->who & (API_CHAT | API_TEMPLATE)) && !r->messages) return missing(x, "messages");
    if (r->who == API_INTERACTIVE && !r->messages && !r->cancel && r->max_tokens != 0)
        return missing(x, "prompt");
    if ((r->who & (API_COMPLETION | API_GENERATE)) && !r->prompts) return missing(x, "prompt");
    if ((r->who & (API_ENCODE | API_PPL)) && !r->prompts) return missing(x, "input");
    if (r->who == API_DECODE && !r->prompts) return missing(x, "tokens");
    if (r->n > x->l->max_n)
        return api_fail(x->f, API_INVALID_VALUE, "n",
                        "'n': expected an integer from 1 to %d, got %lld", x->l->max_n,
                        (long long)r->n);
    TRY(check_answers(x));
    if (r->who == API_CHAT && !logprobs && r->top_logprobs >= 0)
        return api_fail(x->f, API_INVALID_VALUE, "top_logprobs",
                        "'top_logprobs': needs 'logprobs' to be true");
    if (r->who == API_GENERATE && r->n_prompts > 1)
        return api_fail(x->f, API_INVALID_VALUE, "prompt", "'prompt': expected a text, got a list");
    if (r->max_tokens == 0 &&
        (r->who == API_CHAT || r->who == API_GENERATE || (r->who == API_COMPLETION && !r->echo)))
        return api_fail(x->f, API_INVALID_VALUE, "max_tokens",
                        "'max_tokens': expected an integer of 1 or more, got 0");
    if (r->who == API_CHAT && !r->tools &&
        (r->choice == API_TOOLS_REQUIRED || r->choice == API_TOOLS_NAMED))
        return api_fail(x->f, API_INVALID_VALUE, "tool_choice",
                        "'tool_choice': there are no 'tools'");
    if (r->format != API_FORMAT_TEXT &&
        (r->choice == API_TOOLS_REQUIRED || r->choice == API_TOOLS_NAMED))
        return api_fail(x->f, API_INVALID_VALUE, "response_format",
                        "'response_format': not beside a 'tool_choice' that forces a call");
    return OK;
}

err_code api_parse(api_request *r, unsigned who, const char *text, size_t n, const api_limits *l,
                   api_fault *f)
{
    err e;
    api_reading x = {r, l, text, n, f};
    memset(r, 0, sizeof *r);
    r->who = who;
    set_defaults(r);
    err_code rc = json_parse(&r->body, text, n, "body", &e);
    if (rc != OK)
        rc = api_fail_err(f, &e, NULL);
    else if (!cJSON_IsObject(r->body))
        rc = api_fail(f, API_INVALID_VALUE, NULL, "body: expected an object, got %s",
                      api_json_kind(r->body));
    if (rc == OK) rc = read_rows(&x);
    if (rc == OK) rc = check_whole(&x);
    if (rc == OK && r->return_logprob) r->top_logprobs = 0;
    if (rc != OK) api_request_free(r);
    return rc;
}

void api_request_free(api_request *r)
{
    for (int32_t i = 0; i < r->n_prompts && r->prompts; i++) mem_free(r->prompts[i].ids);
    mem_free(r->prompts);
    mem_free(r->messages);
    mem_free(r->tools_text);
    mem_free(r->schema);
    mem_free(r->bias);
    for (void *j = r->joined, *next; j; j = next) {
        memcpy(&next, j, sizeof next);
        mem_free(j);
    }
    cJSON_Delete(r->body);
    memset(r, 0, sizeof *r);
}
