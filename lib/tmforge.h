/* libtmforge: run a quantized language model in your own process.
 *
 *     tmf_options o;
 *     tmf_model *m;
 *     tmf_error e;
 *     tmf_options_init(&o, sizeof o);
 *     if (tmf_open(&m, "workspace", &o, &e) != TMF_OK) puts(e.message);
 *
 * A model path is a TurboMind workspace, an AWQ directory or a 16-bit Hugging Face directory. All
 * texts are UTF-8. Structs that begin with `size` may grow at their end in later versions: their
 * _init function fills them for the size that the caller was compiled with. Symbols begin with tmf_
 * and there are no others. The library prints nothing, does not exit and sets no signal handlers.
 *
 * Threads: a model may be used by many threads at once, a batch by one at a time. */
#ifndef TMFORGE_H
#define TMFORGE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define TMF_API __attribute__((visibility("default")))

/* ---- errors: every call that can fail fills *e and returns its code ---- */
typedef enum {
    TMF_OK = 0,
    TMF_E_USAGE,       /* an argument is out of range: named */
    TMF_E_INPUT,       /* a file or text is not what it should be */
    TMF_E_IO,          /* the system could not read */
    TMF_E_NOMEM,       /* out of host or device memory */
    TMF_E_SHAPE,       /* a tensor has another shape than expected */
    TMF_E_UNSUPPORTED, /* valid, but not something this build handles */
    TMF_E_DEVICE,      /* the device failed */
    TMF_E_CANCELED,    /* the model is being closed */
    TMF_E_LIMIT,       /* does not fit: longer than a session, or than the cache */
    TMF_E_CHECK,
    TMF_E_BUSY /* would fit later */
} tmf_status;
typedef struct {
    int32_t code; /* tmf_status */
    char message[512];
} tmf_error;

TMF_API const char *tmf_version(void); /* "0.1.0" */

/* ---- models ---- */
typedef struct tmf_model tmf_model;
typedef struct {
    size_t size;
    const char *device;           /* "cpu" (the default), "cuda", "cuda:1" */
    const char *chat_template;    /* a name, or a file; NULL: the model's own */
    double cache_max_entry_count; /* share of the memory free after weights for the cache; 0.8 */
    int64_t cache_bytes;          /* the cache in bytes instead; 0 */
    int32_t quant_policy;         /* keys and values: 0 (16 bit), 8, 4; 0 */
    int32_t session_len;          /* most tokens of prompt and answer; 0: the model's, up to 8192 */
    int32_t max_batch;            /* answers in work at once; 32 */
    int32_t prefill_tokens;       /* prompt tokens of one step; 512 */
    int32_t prefix_cache;         /* reuse what prompts have in common; 1 */
    int32_t threads;              /* 0: the CPUs of this process */
    int32_t deterministic;        /* CUDA: an answer never depends on what runs beside; 0 */
    int32_t log_level;            /* 0 errors, 1 warnings, 2 notes, 3 everything; 1 */
    void (*log)(void *ud, int level, const char *line); /* may be called by any thread; NULL */
    void *log_ud;
} tmf_options;
TMF_API void tmf_options_init(tmf_options *o, size_t size);

/* o may be NULL. Strings in o are not kept. */
TMF_API tmf_status tmf_open(tmf_model **out, const char *path, const tmf_options *o, tmf_error *e);
/* Every batch must have been closed. NULL, and a NULL in it, are fine. */
TMF_API void tmf_close(tmf_model **m);

typedef struct {
    size_t size;
    int32_t session_len, max_batch, vocab, kv_bits, weight_bits;
    int32_t bos_id, eos_id;                            /* -1: none */
    const char *architecture, *device, *chat_template; /* live as long as the model */
} tmf_info;
TMF_API void tmf_info_get(const tmf_model *m, tmf_info *i, size_t size);

/* ---- texts and ids: as snprintf, at most cap are written and *n says how many there are ---- */
#define TMF_ADD_BOS       1 /* tmf_encode: BOS in front where the tokenizer puts one */
#define TMF_PARSE_SPECIAL 2 /* tmf_encode: texts of special tokens become those tokens */
#define TMF_KEEP_SPECIAL  4 /* tmf_decode: special tokens as their texts */
#define TMF_NO_GENERATION 8 /* tmf_chat_*: without the head of the answer behind */
TMF_API tmf_status tmf_encode(const tmf_model *m, const char *text, size_t bytes, int flags,
                              int32_t *ids, size_t cap, size_t *n, tmf_error *e);
/* text is terminated when cap allows; *n does not count that. */
TMF_API tmf_status tmf_decode(const tmf_model *m, const int32_t *ids, size_t n_ids, int flags,
                              char *text, size_t cap, size_t *n, tmf_error *e);
/* A conversation through the model's chat template. messages: a JSON list of {"role", "content"},
 * content a text or text parts; or an object with "messages", and perhaps "tools" and
 * "chat_template_kwargs", as in OpenAI's chat completions. */
TMF_API tmf_status tmf_chat_encode(const tmf_model *m, const char *messages, size_t bytes,
                                   int flags, int32_t *ids, size_t cap, size_t *n, tmf_error *e);
TMF_API tmf_status tmf_chat_render(const tmf_model *m, const char *messages, size_t bytes,
                                   int flags, char *text, size_t cap, size_t *n, tmf_error *e);

/* ---- answers ---- */
typedef struct {
    size_t size;
    int32_t max_new_tokens; /* 0: what the session has room for; 512 */
    int32_t min_new_tokens; /* no stop before so many; 0 */
    double temperature;     /* 0..100, 0 is greedy; 0.8 */
    double top_p;           /* above 0, up to 1; 1 */
    double min_p;           /* 0..1; 0 */
    double repetition_penalty, presence_penalty, frequency_penalty; /* 1, 0, 0 */
    int32_t top_k;                                                  /* 0: all; 50 */
    int32_t ignore_eos; /* go on behind the model's stop tokens; 0 */
    uint64_t seed;      /* the same seed gives the same answer, whatever runs beside; 0 */
    const char *const
        *stop_texts;         /* [n_stop_texts], at most 16: end the answer, and are left out */
    const int32_t *stop_ids; /* [n_stop_ids] beside the model's own, at most 64 */
    int32_t n_stop_texts, n_stop_ids;
    int32_t keep_special;    /* special tokens as their texts; 0 */
    int32_t logprobs;        /* also the tokens' log-probabilities; 0 */
    const char *json_schema; /* the answer is JSON that validates; NULL: any. Not beside regex */
    const char *regex;       /* the answer matches; NULL: any */
} tmf_gen_options;
TMF_API void tmf_gen_options_init(tmf_gen_options *o, size_t size);

typedef struct {
    const int32_t *ids; /* [n_ids] */
    size_t n_ids;
    const tmf_gen_options *options; /* NULL: the defaults */
} tmf_prompt;

typedef enum {
    TMF_RUNNING = 0,
    TMF_STOP,    /* it came to its end, or to a stop text */
    TMF_LENGTH,  /* max_new_tokens, or the session is full */
    TMF_STOPPED, /* tmf_batch_cancel */
    TMF_FAILED   /* `error` says why; the others of the batch are not touched */
} tmf_finish;
typedef struct {
    size_t size;
    int32_t index;  /* which prompt; -1: nothing came in time, or every answer has ended */
    int32_t finish; /* tmf_finish; not TMF_RUNNING with the last piece of an answer alone */
    int32_t left;   /* answers that have not ended */
    int32_t n_ids;
    const char *text; /* [n_text] whole characters, terminated: what became certain; "" none. */
    size_t n_text;
    const int32_t *ids;    /* [n_ids] the tokens of this piece; their text may come later */
    const float *logprobs; /* [n_ids], NULL unless asked for */
    /* With the last piece: tokens of the prompt, of them from the cache, of the answer without a
     * stop token; and seconds of waiting, to the first token, and from there on. */
    int32_t n_prompt, n_cached, n_new, preemptions;
    double queue_s, prefill_s, decode_s;
    tmf_error error;
} tmf_piece; /* what it points to lives until the next call on the batch */

typedef struct tmf_batch tmf_batch;
/* Answers to n prompts, at most max_batch of them in work at a time; ids and options are copied.
 * Returns at once. TMF_E_USAGE names an option that cannot be; what is wrong with one prompt (too
 * long for a session, say) is the end of its answer alone. */
TMF_API tmf_status tmf_batch_open(tmf_batch **out, tmf_model *m, const tmf_prompt *prompts,
                                  size_t n, tmf_error *e);
/* Waits up to timeout_ms (-1: for ever) for the next piece of any answer. p->size is set by the
 * caller. */
TMF_API tmf_status tmf_batch_next(tmf_batch *b, int timeout_ms, tmf_piece *p, tmf_error *e);
TMF_API void tmf_batch_cancel(tmf_batch *b, int32_t index); /* -1: all of them */
TMF_API void tmf_batch_close(tmf_batch **b);                /* cancels what still runs */

/* All of it in one call: every piece goes to fn (NULL: nobody), which may return non-zero to cancel
 * the rest. Returns when every answer has ended. */
typedef int (*tmf_piece_fn)(void *ud, const tmf_piece *p);
TMF_API tmf_status tmf_generate(tmf_model *m, const tmf_prompt *prompts, size_t n, tmf_piece_fn fn,
                                void *ud, tmf_error *e);

/* How likely prompts are: nll[i] (of [n]) is the mean negative logarithm of the probability of the
 * i-th one's ids behind its first, whose exponential is the perplexity. Options are not looked at.
 * The first that fails ends it. */
TMF_API tmf_status tmf_score(tmf_model *m, const tmf_prompt *prompts, size_t n, double *nll,
                             tmf_error *e);

#ifdef __cplusplus
}
#endif

#endif
