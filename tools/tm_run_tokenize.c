/* tm-run tokenize: ids of a text, and text of ids. */
#include <stdio.h>
#include <string.h>

#include "base/file.h"
#include "base/mem.h"
#include "tools/tm_run.h"

static struct {
    const char *data, *text, *ids;
    bool parse_special, skip_special;
} opt;

static const cli_option options[] = {
    {"data", 'd', CLI_STR, &opt.data, "FILE", "file to read as it is, - for standard input"},
    {"text", 0, CLI_STR, &opt.text, "TEXT", "or the text itself"},
    {"ids", 0, CLI_STR, &opt.ids, "1,2,3", "or ids, to be turned back into text"},
    {"parse-special", 0, CLI_FLAG, &opt.parse_special, NULL,
     "special token strings in the text are tokens"},
    {"skip-special", 0, CLI_FLAG, &opt.skip_special, NULL,
     "leave special tokens out of the text of --ids"},
};

static err_code print_ids(const tool_ctx *t, const token_list *l, err *e)
{
    if (t->json) {
        cJSON *o = cJSON_CreateObject();
        return run_json(o, o && run_add_ids(o, "ids", l->ids, l->n), e);
    }
    for (int64_t i = 0; i < l->n; i++) (void)printf("%d%c", l->ids[i], i + 1 < l->n ? ' ' : '\n');
    return OK;
}

static err_code print_text(const tool_ctx *t, const char *text, size_t n, err *e)
{
    if (t->json) {
        cJSON *o = cJSON_CreateObject();
        return run_json(o, o && cJSON_AddStringToObject(o, "text", text), e);
    }
    (void)fwrite(text, 1, n, stdout);
    return OK;
}

static err_code back(const tool_ctx *t, const tokenizer *tok, err *e)
{
    token_list l = {0};
    char *text = NULL;
    size_t n = 0;
    err_code rc = run_parse_ids(&l, opt.ids, "ids", e);
    for (int64_t i = 0; rc == OK && i < l.n; i++) {
        if (l.ids[i] >= tokenizer_vocab(tok))
            rc = err_set(e, E_INPUT, "id %d: expected 0 to %d", l.ids[i], tokenizer_vocab(tok) - 1);
    }
    if (rc == OK) rc = tokenizer_decode(tok, l.ids, l.n, opt.skip_special, &text, &n, e);
    if (rc == OK) rc = print_text(t, text, n, e);
    mem_free(text);
    token_list_free(&l);
    return rc;
}

static err_code forth(const tool_ctx *t, const tokenizer *tok, err *e)
{
    token_list l = {0};
    char *text = NULL;
    size_t n = opt.text ? strlen(opt.text) : 0;
    if (opt.data) TRY(run_read_text(&text, &n, opt.data, e));
    err_code rc = tokenizer_encode(tok, opt.data ? text : opt.text, n, opt.parse_special, &l, e);
    if (rc == OK) rc = print_ids(t, &l, e);
    mem_free(text);
    token_list_free(&l);
    return rc;
}

/* A workspace keeps its tokenizer inside; every other PATH is a directory with tokenizer files. */
static err_code tokenizer_of(tokenizer **out, const char *path, err *e)
{
    char inner[4096];
    weight_src *src;
    TRY(path_join(inner, sizeof inner, path, "triton_models", e));
    if (!file_is_dir(inner)) return tokenizer_open(out, path, e);
    TRY(weights_open(&src, path, e));
    const err_code rc = tokenizer_open(out, weights_tokenizer_dir(src), e);
    weights_close(&src);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    tokenizer *tok;
    if (!!opt.data + !!opt.text + !!opt.ids != 1)
        return err_set(e, E_USAGE, "expected one of --data, --text and --ids");
    TRY(tokenizer_of(&tok, t->args[0], e));
    const err_code rc = opt.ids ? back(t, tok, e) : forth(t, tok, e);
    tokenizer_close(&tok);
    return rc;
}

const tool_command tm_run_tokenize = {
    .name = "tokenize",
    .usage = "PATH|TOKENIZER_DIR --data FILE | --text TEXT | --ids 1,2,3 [options]",
    .summary = "turns text into ids, without BOS, or ids into text",
    .examples = "  tm-run tokenize model --data book.txt --json\n"
                "  tm-run tokenize model --text '<|im_end|>' --parse-special\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};
