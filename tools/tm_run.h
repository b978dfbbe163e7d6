/* tm-run: one command a file. What the commands share: opening what PATH names, options of model
 * and sampling, prompts. */
#ifndef TMF_TOOLS_TM_RUN_H
#define TMF_TOOLS_TM_RUN_H

#include "formats/chat.h"
#include "runtime/generate.h"
#include "runtime/model.h"
#include "runtime/sampler.h"
#include "runtime/score.h"
#include "tools/tool.h"

extern const tool_command tm_run_chat, tm_run_generate, tm_run_ppl, tm_run_bench, tm_run_tasks,
    tm_run_score, tm_run_tokenize, tm_run_info, tm_run_client, tm_run_bench_serve, tm_run_serve;

/* ---- model options ---- */
typedef struct {
    const char *quant_policy; /* "0", "8", "4" */
    double cache_share;
    int64_t kv_mem, session_len;
} run_model_opts;
#define RUN_MODEL_DEFAULTS \
    {                      \
        "0", 0.8, 0, 0     \
    }
/* Rows of an option table; o is a static run_model_opts. */
#define RUN_MODEL_OPTIONS(o)                                                                \
    {"quant-policy",    0,      CLI_CHOICE,                                                 \
     &(o).quant_policy, "BITS", "keys and values in the cache: 0 (16 bit), 8 or 4 bit [0]", \
     .choices = "0|4|8"},                                                                   \
        {"cache-max-entry-count",                                                           \
         0,                                                                                 \
         CLI_F64,                                                                           \
         &(o).cache_share,                                                                  \
         "SHARE",                                                                           \
         "share of the memory free after weights that the cache may take [0.8]",            \
         .lo = 0.001,                                                                       \
         .hi = 1},                                                                          \
        {"kv-mem",    0,           CLI_BYTES,                                               \
         &(o).kv_mem, "BYTES",     "cache memory, instead of a share (K, M, G)",            \
         .lo = 0,     .hi = 0x1p50},                                                        \
    {                                                                                       \
        "session-len", 0, CLI_I64, &(o).session_len, "N",                                   \
            "most tokens of a sequence [0: as needed; chat: 8192 or the model's context]",  \
            .lo = 0, .hi = 1 << 24                                                          \
    }

/* ---- sampling options ---- */
typedef struct {
    double temperature, top_p, min_p, repetition, presence, frequency;
    int64_t top_k, penalty_window;
    cli_list bias; /* ID=VALUE */
} run_sample_opts;
#define RUN_SAMPLE_DEFAULTS                     \
    {                                           \
        0.8, 0.8, 0, 1, 0, 0, 40, 0, { {0}, 0 } \
    }
#define RUN_SAMPLE_OPTIONS(o)                                                                      \
    {"temperature", 't', CLI_F64, &(o).temperature, "T", "0 is greedy [0.8]", .lo = 0, .hi = 100}, \
        {"top-k", 0,                                                                               \
         CLI_I64, &(o).top_k,                                                                      \
         "K",     "keep the K most probable, 0 for all [40]",                                      \
         .lo = 0, .hi = INT32_MAX},                                                                \
        {"top-p",    0,      CLI_F64, &(o).top_p, "P", "then the shortest head with sum P [0.8]",  \
         .lo = 1e-9, .hi = 1},                                                                     \
        {"min-p", 0,      CLI_F64, &(o).min_p, "P", "then those of P times the best or more [0]",  \
         .lo = 0, .hi = 1},                                                                        \
        {"repetition-penalty", 0,        CLI_F64,                                                  \
         &(o).repetition,      "R",      "weakens what prompt and answer hold already [1: off]",   \
         .lo = 1e-3,           .hi = 1e3},                                                         \
        {"presence-penalty", 0,      CLI_F64, &(o).presence, "X", "off what the answer holds [0]", \
         .lo = -2,           .hi = 2},                                                             \
        {"frequency-penalty",         0,        CLI_F64, &(o).frequency, "X",                      \
         "and off for each time [0]", .lo = -2, .hi = 2},                                          \
        {"penalty-window",                                                                         \
         0,                                                                                        \
         CLI_I64,                                                                                  \
         &(o).penalty_window,                                                                      \
         "N",                                                                                      \
         "tokens that the repetition penalty looks back on [0: all]",                              \
         .lo = 0,                                                                                  \
         .hi = INT32_MAX},                                                                         \
    {                                                                                              \
        "logit-bias", 0, CLI_LIST, &(o).bias, "ID=X", "adds X to the logit of a token; repeatable" \
    }
#define RUN_MAX_BIAS 64
/* bias [RUN_MAX_BIAS] is the caller's and must outlive *out. */
err_code run_sample(sample_opts *out, const run_sample_opts *o, uint64_t seed, logit_bias *bias,
                    err *e);

/* ---- chat options ---- */
typedef struct {
    const char *name, *meta; /* NULL: the model's, none */
} run_chat_opts;
#define RUN_CHAT_OPTIONS(o)                                                                      \
    {"chat-template",                                                                            \
     0,                                                                                          \
     CLI_STR,                                                                                    \
     &(o).name,                                                                                  \
     "NAME",                                                                                     \
     "name or JSON file of a chat template [told by the model's own, else its family]"},         \
    {                                                                                            \
        "meta-instruction", 0, CLI_STR, &(o).meta, "TEXT", "system text [what the template has]" \
    }

/* ---- what PATH names ---- */
typedef struct {
    device *d;
    weight_src *src;
    tokenizer *t; /* NULL when not asked for */
    model *m;     /* NULL after run_model under --dry-run */
} run_ctx;
/* Device, weights and (need_tokenizer) tokenizer; run_close frees whatever is there. */
err_code run_open(run_ctx *r, const tool_ctx *t, bool need_tokenizer, err *e);
/* The model, or under --dry-run its plan on stdout. `session` tokens are needed (0: the model's
 * context), for `seqs` sequences at once. */
err_code run_model(run_ctx *r, const tool_ctx *t, const run_model_opts *o, int64_t session,
                   int32_t seqs, err *e);
void run_close(run_ctx *r);

/* ---- ppl --compare ---- */
/* Both models over the same windows, the one at `path` with the same options; prints the result. */
err_code run_compare(run_ctx *r, const tool_ctx *t, const char *path, const run_model_opts *mo,
                     const token_list *ids, const ppl_opts *o, err *e);

/* ---- texts ---- */
/* "1,2,3" appended. E_USAGE naming `option` and the place. */
err_code run_parse_ids(token_list *out, const char *text, const char *option, err *e);
/* A whole file, or standard input for "-" (at most 64 MB of it); free with mem_free. */
err_code run_read_text(char **out, size_t *n, const char *path, err *e);
/* Ids of a text as a prompt: BOS in front where the tokenizer puts one. */
err_code run_encode(token_list *out, const tokenizer *t, const char *text, size_t n,
                    bool parse_special, err *e);
/* Ids of data files (text, jsonl through the chat template, packed or in archives), each as
 * datasets/corpus.h reads it. dataset: how rows are joined, NULL: files as they are. */
err_code run_data_ids(token_list *out, const run_ctx *r, const cli_list *files, const char *dataset,
                      const run_chat_opts *o, const tool_ctx *t, err *e);

/* ---- chat ---- */
/* The template that the options, the directory or the family name. */
err_code run_chat_open(chat **out, const run_ctx *r, const run_chat_opts *o, const tool_ctx *t,
                       err *e);
#define RUN_MAX_STOPS 64
/* What ends an answer: ids of the model's configs, EOS, and of the template when there is one. */
int run_stop_ids(int32_t out[RUN_MAX_STOPS], const run_ctx *r, const chat *c);

/* An answer as it comes: kept whole, and streamed where `stream` is set. Zero-init otherwise. */
typedef struct {
    token_list ids;
    char *text; /* NUL-terminated, NULL while empty */
    size_t n, cap;
    FILE *stream;
    err failed; /* failed.code: memory ran out in the callback */
} run_answer;
bool run_answer_add(void *answer, int32_t id, const char *text, size_t n); /* a gen_fn */
void run_answer_free(run_answer *a);

/* ---- JSON: false on lack of memory, which run_json reports ---- */
bool run_add_ids(cJSON *o, const char *key, const int32_t *ids, int64_t n);
/* Prints and frees o; `filled` false is E_NOMEM. */
err_code run_json(cJSON *o, bool filled, err *e);

#endif
