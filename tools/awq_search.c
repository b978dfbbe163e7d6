/* awq-search: a model and its calib file in, a plan out. */
#include <stdio.h>

#include "awq/report.h"
#include "tools/memory_text.h"
#include "tools/tool.h"

static struct {
    const char *calib, *method, *loss, *kv_fold, *rotate, *without, *page, *out, *cache;
    int64_t group, bits, gram_bytes;
    bool search_scale;
} opt = {.group = 128, .bits = 4, .gram_bytes = (int64_t)8 << 30};

static const cli_option options[] = {
    {"calib", 0, CLI_STR, &opt.calib, "FILE", "what calib-collect wrote for this model"},
    {"method", 0, CLI_CHOICE, &opt.method, "NAME", "how to choose factors and ranges [best]",
     .choices = "rtn|lmdeploy|awq|gptq|best"},
    {"search-scale", 0, CLI_FLAG, &opt.search_scale, NULL, "the same as --method awq"},
    {"loss", 0, CLI_CHOICE, &opt.loss, "NAME",
     "what errors count by: gram (all of H), blocks (of it), module, weights [by method]",
     .choices = "gram|blocks|module|weights"},
    {"kv-fold", 0, CLI_CHOICE, &opt.kv_fold, "HOW",
     "factors of keys and values that suit a 4-bit cache, folded into q and o [yes with best]",
     .choices = "yes|no"},
    {"rotate", 0, CLI_STR, &opt.rotate, "WHAT,..",
     "other bases that compute the same, where they pay: vo, of keys and values; residual, of the "
     "stream, for twice the time [none]"},
    {"quant-policy", 0, CLI_CHOICE, &opt.cache, "BITS",
     "cache that best's weights will run with: 0 (16 bit), 8 or 4 bit [0]", .choices = "0|4|8"},
    {"without", 0, CLI_STR, &opt.without, "STAGE,..", "stages of best to leave out: man [none]"},
    {"group-size", 0, CLI_I64, &opt.group, "N", "weights that share a scale: 32, 64 or 128 [128]",
     .lo = 32, .hi = 128, .alias = "w-group-size"},
    {"w-bits", 0, CLI_I64, &opt.bits, "N", "bits of a weight: 4 [4]", .lo = 1, .hi = 16},
    {"gram-memory", 0, CLI_BYTES, &opt.gram_bytes, "BYTES",
     "second moments of a block beyond this are gathered one at a time [8G]"},
    {"report", 0, CLI_STR, &opt.page, "HTML",
     "also a page with loss, factors and outliers of every layer"},
    {"output", 'o', CLI_STR, &opt.out, "PLAN", "the plan file to write", .alias = "work-dir"},
};

static search_opts search_options(const tool_ctx *t)
{
    return (search_opts){.model_dir = t->args[0],
                         .calib_path = opt.calib,
                         .out_path = opt.out,
                         .method = opt.search_scale ? "awq"
                                   : opt.method     ? opt.method
                                                    : "best",
                         .loss = opt.loss,
                         .rotate = opt.rotate,
                         .without = opt.without,
                         .kv_fold = !opt.kv_fold ? -1 : opt.kv_fold[0] == 'y',
                         .cache = opt.cache ? (kv_format)(opt.cache[0] - '0') : KV_16,
                         .group = (int32_t)opt.group,
                         .gram_bytes = opt.gram_bytes,
                         .save_s = 20,
                         .force = t->force};
}

static err_code check_options(err *e)
{
    if (!opt.out) return err_set(e, E_USAGE, "--output: expected a file name for the plan");
    if (opt.search_scale && opt.method && opt.method[0] != 'a')
        return err_set(e, E_USAGE, "--search-scale: expected method awq, got --method %s",
                       opt.method);
    if (opt.bits != 4) return err_set(e, E_USAGE, "--w-bits: expected 4, got %d", (int)opt.bits);
    if (opt.group != 32 && opt.group != 64 && opt.group != 128)
        return err_set(e, E_USAGE, "--group-size: expected 32, 64 or 128, got %d", (int)opt.group);
    return OK;
}

static err_code print_json(const search_opts *o, const search_summary *s, const report *r, err *e)
{
    cJSON *j = cJSON_CreateObject();
    cJSON_AddStringToObject(j, "method", o->method);
    cJSON_AddNumberToObject(j, "group_size", o->group);
    cJSON_AddNumberToObject(j, "layers", s->layers);
    cJSON_AddNumberToObject(j, "resumed_layers", s->resumed);
    cJSON_AddBoolToObject(j, "up_to_date", s->fresh);
    cJSON_AddStringToObject(j, "loss", s->loss);
    cJSON_AddNumberToObject(j, "loss_before", s->before);
    cJSON_AddNumberToObject(j, "loss_after", s->after);
    cJSON_AddNumberToObject(j, "seconds", tool_seconds());
    const err_code rc = report_add(r, j) ? tool_print_json(j, e)
                                         : err_set(e, E_NOMEM, "JSON: out of memory");
    cJSON_Delete(j);
    return rc;
}

static err_code tell_more(const tool_ctx *t, device *d, const search_opts *o,
                          const search_summary *s, err *e)
{
    report r;
    if (!t->json && !opt.page) return OK;
    TRY(report_make(&r, d, o, s, &t->job, e));
    err_code rc = opt.page ? report_html(&r, opt.page, true, e) : OK;
    if (rc == OK && t->json) rc = print_json(o, s, &r, e);
    report_free(&r);
    return rc;
}

static err_code tell(const tool_ctx *t, device *d, const search_opts *o, const search_summary *s,
                     err *e)
{
    char text[128];
    snprintf(text, sizeof text, "%s, %s loss %.6g -> %.6g (%.1f %%)", o->method, s->loss, s->before,
             s->after, s->before > 0 ? 100 * s->after / s->before : 100.);
    if (s->fresh)
        job_log(&t->job, LOG_INFO, "'%s' is up to date: %s", o->out_path, text);
    else
        tool_wrote(t, o->out_path, text);
    return tell_more(t, d, o, s, e);
}

static err_code run(tool_ctx *t, err *e)
{
    const search_opts o = search_options(t);
    search_summary s;
    memory_plan plan;
    device *d = NULL;
    TRY(check_options(e));
    TRY(tool_device_open(t, &d, e));
    err_code rc = search_memory(&plan, d, &o, e);
    if (rc == OK && t->dry_run) rc = tool_print_memory(&plan, t->json, e);
    if (rc == OK && !t->dry_run) {
        memory_plan_log(&plan, &t->job, LOG_INFO);
        t->resumable = true;
        rc = search_run(&s, d, &o, &t->job, e);
        if (rc == OK) rc = tell(t, d, &o, &s, e);
    }
    dev_close(&d);
    return rc;
}

static const tool_command command = {
    .usage = "MODEL_DIR --calib CALIB -o PLAN [options]",
    .summary = "choose channel factors and weight ranges for 4-bit weights",
    .examples = "  awq-search internlm2 --calib calib -o plan\n"
                "  awq-search internlm2 --calib calib --method lmdeploy -o plan\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_DRY_RUN | TOOL_FORCE | TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};

int main(int argc, char **argv)
{
    return tool_main(argc, argv, &(tool_spec){"awq-search", command.summary, &command, 1});
}
