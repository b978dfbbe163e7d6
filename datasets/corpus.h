/* Texts for calibration and evaluation, from local files: plain text, jsonl, either packed with
 * zstd, gzip or xz, and tar archives of them (.tar, .tar.gz, .tar.xz, .tar.zst). Everything
 * streams: memory does not grow with the files, only with the tokens that are kept.
 *
 * How a file becomes tokens ("its stream"):
 *   text   tokenized once as it is (a UTF-8 byte order mark is dropped), one BOS at the very start
 *          where the tokenizer puts one. Special-token strings in it stay text.
 *   jsonl  by name (.jsonl, .ndjson, .json) one object a line, each a document, one after another:
 *            {"text": ...}                              BOS (as above), then the text
 *            {"messages": [{"role":, "content":}...]}   by the chat template, without the head of a
 *            {"conversations": [{"from":, "value":}...]}  next turn; BOS as the template gives it
 *   tar    its regular files in archive order, each a stream of its own; other entries are skipped,
 *          and a name that is absolute or leaves the archive refuses the archive.
 * Named data sets change how rows are joined, as their users do; rows are lines of a text
 * file or `text` of a jsonl file:
 *   wikitext2  rows, each with its line end, joined with two newlines, tokenized once
 *   ptb        rows without blanks around them joined with two newlines, tokenized once
 *   c4         each window a crop from a document with at least seqlen tokens, drawn at random
 *   pileval    documents stripped, those of 1 to 512 tokens in random order, joined; consecutive
 *              windows
 *   self, NULL the files as they are
 *
 * Randomness is counter-based: splitmix64 over seed and document or window number. Same files,
 * options and seed give the same windows everywhere. */
#ifndef TMF_DATASETS_CORPUS_H
#define TMF_DATASETS_CORPUS_H

#include "base/job.h"
#include "base/json.h"
#include "formats/chat.h"

typedef enum {
    /* Windows that begin anywhere, each place of each file as likely; c4, pileval: see above. */
    PICK_RANDOM,
    /* Consecutive windows from the start of the first file; c4: the first long documents from their
     * start; pileval: documents in file order. */
    PICK_FIRST
} corpus_pick;

typedef struct {
    const char *const *paths; /* [n_paths] */
    int n_paths;
    /* [n_paths] of the windows, adding up to 1: each file gives so many, as if it were alone,
     * spread over all of them. NULL: all files are one text, of which the longer has more. */
    const double *shares;
    const char *dataset; /* NULL: none */
    corpus_pick pick;
    uint64_t seed;
    int32_t samples, seqlen;      /* positive */
    const char *meta_instruction; /* for dialogues without a system text; NULL none */
} corpus_opts;

bool corpus_dataset_known(const char *name);

/* Windows i32 [samples, seqlen] into `ids` (caller's memory). Not enough tokens, an empty file,
 * invalid UTF-8, a corrupt or hostile archive: E_INPUT naming the file, what was expected and
 * found. E_LIMIT where a file unpacks to an unreasonable size. chat may be NULL: then dialogues
 * are E_UNSUPPORTED. */
err_code corpus_windows(int32_t *ids, const corpus_opts *o, const tokenizer *t, const chat *c,
                        const job *j, err *e);

/* Data files as users name them, "FILE" or "FILE:WEIGHT". Weights are normalised; beside others, a
 * file without one counts 1. A colon with anything but a number behind it, and a file that has the
 * whole name, are names. */
typedef struct {
    char **paths;   /* [n] */
    double *shares; /* [n], adding up to 1 */
    int n;
    bool weighted; /* some file has a weight */
} corpus_sources;
err_code corpus_sources_parse(corpus_sources *out, const char *const *texts, int n, err *e);
void corpus_sources_free(corpus_sources *s);
/* How `samples` windows are given out: counts [n], each within 1 of its share; whose [samples]
 * which file each one is of (NULL: not wanted). Nothing is drawn. */
void corpus_mix(int32_t *whose, int32_t *counts, const double *shares, int n, int32_t samples);

/* The whole stream of one file, appended to out. */
typedef struct {
    const char *dataset; /* NULL: none; c4 and pileval read documents in file order */
    const char *meta_instruction;
    bool no_bos;        /* leave out the BOS of texts (tm-run tokenize) */
    bool parse_special; /* special-token strings in texts become their ids */
    int64_t max_tokens; /* stop behind so many; 0: no limit */
} corpus_read;
err_code corpus_tokens(token_list *out, const char *path, const corpus_read *r, const tokenizer *t,
                       const chat *c, const job *j, err *e);
/* A file's bytes unpacked (first regular entry of an archive), at most `max`; NUL-terminated,
 * not checked for UTF-8. Free with mem_free. */
err_code corpus_text(char **out, size_t *n, const char *path, size_t max, const job *j, err *e);

/* Calls `each` for every line's object of a jsonl file (packed or not); o is only valid within
 * the call. */
typedef err_code (*corpus_row_fn)(void *ctx, const cJSON *o, int64_t line, err *e);
err_code corpus_rows(const char *path, corpus_row_fn each, void *ctx, const job *j, err *e);
/* messages or conversations of a row: fills *m (free with mem_free; contents borrowed from o).
 * *n is 0 and OK when the row has neither. */
err_code corpus_messages(chat_message **m, int64_t *n, const cJSON *o, err *e);

#endif
