/* calib-collect: a model and texts in, a calib file out. */
#include <malloc.h>
#include <stdio.h>
#include <string.h>

#include "base/mem.h"
#include "calib/collect.h"
#include "calib/windows.h"
#include "tools/memory_text.h"
#include "tools/tool.h"

static struct {
    cli_list data;
    corpus_sources sources; /* of data */
    char *how;              /* the windows were chosen */
    const char *dataset, *pick, *out, *chat_template, *meta;
    int64_t samples, seqlen;
} opt = {.samples = 128};

static const cli_option options[] = {
    {"data", 0, CLI_LIST, &opt.data, "FILE[:WEIGHT]",
     "text, jsonl, or either packed (.zst .gz .xz .tar.*), and its share of windows; repeatable"},
    {"dataset", 0, CLI_CHOICE, &opt.dataset, "NAME",
     "how the rows of --data are joined; self: without --data the model writes its own text",
     .choices = "wikitext2|ptb|c4|pileval|self", .alias = "calib-dataset"},
    {"samples", 0, CLI_I64, &opt.samples, "N", "windows [128]", .lo = 1, .hi = 65536,
     .alias = "calib-samples"},
    {"seqlen", 0, CLI_I64, &opt.seqlen, "N", "tokens of a window [2048, or the model's context]",
     .lo = 1, .hi = 131072, .alias = "calib-seqlen"},
    {"pick", 0, CLI_CHOICE, &opt.pick, "HOW", "windows from anywhere or from the start [random]",
     .choices = "first|random"},
    {"chat-template", 0, CLI_STR, &opt.chat_template, "NAME", "for dialogues [the model's own]"},
    {"meta-instruction", 0, CLI_STR, &opt.meta, "TEXT", "system text of dialogues without one"},
    {"output", 'o', CLI_STR, &opt.out, "CALIB", "the calib file to write", .alias = "work-dir"},
};

static err_code check_options(err *e)
{
    if (!opt.out) return err_set(e, E_USAGE, "--output: expected a file name for the statistics");
    if (!opt.data.n && strcmp(opt.dataset ? opt.dataset : "", "self") != 0)
        return err_set(e, E_USAGE, "--data: expected a text, or --dataset self for none");
    return OK;
}

static err_code window_options(windows_opts *w, const tool_ctx *t, const weight_src *src, err *e)
{
    const int32_t context = weights_desc(src)->max_tokens, seqlen = (int32_t)opt.seqlen;
    if (seqlen > context)
        return err_set(e, E_USAGE, "--seqlen: expected up to the model's context of %d, got %d",
                       (int)context, (int)seqlen);
    TRY(corpus_sources_parse(&opt.sources, opt.data.v, opt.data.n, e));
    *w = (windows_opts){
        .corpus = {.paths = (const char *const *)opt.sources.paths,
                   .n_paths = opt.sources.n,
                   .shares = opt.sources.weighted ? opt.sources.shares : NULL,
                   .dataset = opt.dataset,
                   .pick = opt.pick && strcmp(opt.pick, "first") == 0 ? PICK_FIRST : PICK_RANDOM,
                   .seed = (uint64_t)t->seed,
                   .samples = (int32_t)opt.samples,
                   .seqlen = seqlen           ? seqlen
                             : context < 2048 ? context
                                              : 2048,
                   .meta_instruction = opt.meta},
        .chat_template = opt.chat_template};
    return windows_describe(&opt.how, w, e);
}

static err_code report(const tool_ctx *t, const collect_summary *s, err *e)
{
    char text[96];
    snprintf(text, sizeof text, "%d layers, %d windows of %d tokens", (int)s->layers,
             (int)s->samples, (int)s->seqlen);
    if (s->fresh)
        job_log(&t->job, LOG_INFO, "'%s' is up to date: %s", opt.out, text);
    else
        tool_wrote(t, opt.out, text);
    if (!t->json) return OK;
    cJSON *j = cJSON_CreateObject();
    cJSON_AddNumberToObject(j, "layers", s->layers);
    cJSON_AddNumberToObject(j, "resumed_layers", s->resumed);
    cJSON_AddNumberToObject(j, "samples", s->samples);
    cJSON_AddNumberToObject(j, "seqlen", s->seqlen);
    cJSON_AddNumberToObject(j, "held_out", s->held_out);
    cJSON_AddBoolToObject(j, "up_to_date", s->fresh);
    cJSON_AddNumberToObject(j, "seconds", tool_seconds());
    const err_code rc = tool_print_json(j, e);
    cJSON_Delete(j);
    return rc;
}

static err_code collect(tool_ctx *t, device *d, weight_src *src, const windows_opts *w, err *e)
{
    hash128 tokenizer_digest;
    int32_t *ids = NULL;
    collect_summary s;
    TRY(windows_tokenizer_digest(&tokenizer_digest, weights_tokenizer_dir(src), e));
    TRY(mem_alloc((void **)&ids, (size_t)w->corpus.samples * (size_t)w->corpus.seqlen, sizeof *ids,
                  "windows", e));
    const collect_opts o = {opt.out, tokenizer_digest.hex, opt.how, 20, t->force};
    const tensor tokens = tensor_2d(ids, DT_I32, w->corpus.samples, w->corpus.seqlen);
    err_code rc = windows_make(ids, d, src, w, &t->job, e);
    malloc_trim(0); /* what the tokenizer took goes back before the layers come */
    t->resumable = true;
    if (rc == OK) rc = collect_run(&s, d, src, &tokens, &o, &t->job, e);
    if (rc == OK) rc = report(t, &s, e);
    mem_free(ids);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    windows_opts w;
    memory_plan plan;
    device *d = NULL;
    weight_src *src = NULL;
    err_code rc;
    TRY(check_options(e));
    TRY(tool_device_open(t, &d, e));
    if ((rc = weights_open(&src, t->args[0], e)) != OK) goto done;
    if ((rc = window_options(&w, t, src, e)) != OK) goto done;
    if ((rc = windows_run_memory(&plan, d, src, &w, e)) != OK) goto done;
    if (!t->dry_run) memory_plan_log(&plan, &t->job, LOG_INFO);
    rc = t->dry_run ? tool_print_memory(&plan, t->json, e) : collect(t, d, src, &w, e);
done:
    mem_free(opt.how);
    corpus_sources_free(&opt.sources);
    weights_close(&src);
    dev_close(&d);
    return rc;
}

static const tool_command command = {
    .usage = "MODEL_DIR --data FILE [--data FILE ...] -o CALIB [options]",
    .summary = "run calibration text through a model and keep the statistics of its activations",
    .examples =
        "  calib-collect internlm2 --data wiki.txt -o calib\n"
        "  calib-collect internlm2 --data pile.jsonl.zst --dataset pileval --seqlen 512 -o calib\n"
        "  calib-collect internlm2 --data wiki.txt:0.7 --data chats.jsonl:0.3 -o calib\n"
        "  calib-collect internlm2 --dataset self -o calib\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_SEED | TOOL_DRY_RUN | TOOL_FORCE | TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};

int main(int argc, char **argv)
{
    return tool_main(argc, argv, &(tool_spec){"calib-collect", command.summary, &command, 1});
}
