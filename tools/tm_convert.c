/* tm-convert: 16-bit or AWQ directory in, TurboMind workspace out. */
#include <stdio.h>
#include <string.h>

#include "formats/convert.h"
#include "tools/memory_text.h"
#include "tools/tool.h"

static struct {
    const char *out, *compare, *format, *dtype, *name, *chat;
    int64_t tp, session_len;
    bool clamp;
} opt = {.dtype = "auto", .tp = 1};

/* What the program takes beside its buffers, no pool, no BLAS: measured on three models. */
#define PROCESS_BYTES ((size_t)1300 << 10)

static const cli_option options[] = {
    {"output", 'o', CLI_STR, &opt.out, "WORKSPACE", "the directory to write", .alias = "dst-path"},
    {"tp", 0, CLI_I64, &opt.tp, "N", "split for N devices; tm-run reads 1 [1]", .lo = 1, .hi = 64},
    {"dtype", 0, CLI_CHOICE, &opt.dtype, "TYPE", "of 16-bit weights; auto keeps bfloat16 [auto]",
     .choices = "auto|float16|bfloat16"},
    {"model-format", 0, CLI_CHOICE, &opt.format, "FORMAT", "refuse a model of another format",
     .choices = "hf|awq"},
    {"model-name", 0, CLI_STR, &opt.name, "NAME", "served name [that of the chat template]"},
    {"chat-template", 0, CLI_STR, &opt.chat, "NAME", "chat template [the family's]"},
    {"session-len", 0, CLI_I64, &opt.session_len, "N", "tokens of a session [the model's context]",
     .lo = 0, .hi = 1 << 28},
    {"clamp", 0, CLI_FLAG, &opt.clamp, NULL,
     "values beyond the type become its largest instead of an error"},
    {"compare-tensor", 0, CLI_STR, &opt.compare, "NAME",
     "make one weight file of WORKSPACE again and compare its bytes"},
};

static convert_opts library_opts(void)
{
    return (convert_opts){.tp = (int32_t)opt.tp,
                          .dt = strcmp(opt.dtype, "float16") == 0    ? DT_F16
                                : strcmp(opt.dtype, "bfloat16") == 0 ? DT_BF16
                                                                     : DT_NONE,
                          .session_len = (int32_t)opt.session_len,
                          .model_name = opt.name,
                          .chat_template = opt.chat,
                          .clamp = opt.clamp};
}

static err_code check_format(const weight_src *src, err *e)
{
    const char *found = weights_kind(src) == SRC_AWQ ? "awq" : "hf";
    if (!opt.format || strcmp(opt.format, found) == 0) return OK;
    return err_set(e, E_INPUT, "'%s': expected format %s, found %s", weights_path(src), opt.format,
                   found);
}

static err_code print_json(const convert *c, bool fresh, err *e)
{
    size_t n;
    (void)convert_files(c, &n);
    cJSON *o = cJSON_CreateObject();
    const bool ok = o && cJSON_AddNumberToObject(o, "bytes", (double)convert_bytes(c)) &&
                    cJSON_AddNumberToObject(o, "files", (double)n) &&
                    cJSON_AddNumberToObject(o, "tp", convert_config(c)->tp) &&
                    cJSON_AddBoolToObject(o, "up_to_date", fresh) &&
                    cJSON_AddNumberToObject(o, "seconds", tool_seconds());
    const err_code rc = ok ? tool_print_json(o, e) : err_set(e, E_NOMEM, "out of memory");
    cJSON_Delete(o);
    return rc;
}

/* The files with their sizes, then the memory; as JSON the memory alone has the form of every tool.
 */
static err_code print_plan(const tool_ctx *t, const convert *c, err *e)
{
    memory_plan plan = {0};
    size_t n;
    const tm_file *f = convert_files(c, &n);
    memory_plan_add(&plan, "rows in conversion", convert_memory(c));
    memory_plan_add(&plan, "the program itself", PROCESS_BYTES);
    for (size_t i = 0; !t->json && i < n; i++)
        printf("%14llu  %-4s [%lld,%lld]  %s\n", (unsigned long long)f[i].bytes,
               dtype_name(f[i].dt), (long long)f[i].rows, (long long)f[i].cols, f[i].name);
    if (!t->json) printf("%14llu  bytes in %zu files\n", (unsigned long long)convert_bytes(c), n);
    return tool_print_memory(&plan, t->json, e);
}

static err_code write(const tool_ctx *t, convert *c, err *e)
{
    char text[64], size[32];
    size_t n;
    const convert_state state = convert_look(c, opt.out);
    const bool fresh = state == CONVERT_CURRENT && !t->force;

    (void)convert_files(c, &n);
    (void)snprintf(text, sizeof text, "%zu files, %s", n,
                   tool_bytes_text(size, sizeof size, convert_bytes(c)));
    if (fresh) {
        job_log(&t->job, LOG_INFO, "'%s' is up to date: %s", opt.out, text);
    } else {
        if (state == CONVERT_STALE) job_log(&t->job, LOG_INFO, "replacing the older '%s'", opt.out);
        TRY(convert_write(c, opt.out, t->force || state == CONVERT_STALE, e));
        tool_wrote(t, opt.out, text);
    }
    return t->json ? print_json(c, fresh, e) : OK;
}

static err_code run(tool_ctx *t, err *e)
{
    const convert_opts o = library_opts();
    weight_src *src = NULL;
    convert *c = NULL;
    err_code rc;

    if (!opt.out && !t->dry_run) return err_set(e, E_USAGE, "--output: expected a directory name");
    if ((rc = weights_open(&src, t->args[0], e)) != OK) goto done;
    if ((rc = check_format(src, e)) != OK) goto done;
    if ((rc = convert_open(&c, src, &o, &t->job, e)) != OK) goto done;
    if (t->dry_run) {
        rc = print_plan(t, c, e);
    } else if (opt.compare) {
        rc = convert_compare(c, opt.out, opt.compare, e);
        if (rc == OK) job_log(&t->job, LOG_INFO, "%s: same bytes", opt.compare);
    } else {
        rc = write(t, c, e);
    }
done:
    convert_close(&c);
    weights_close(&src);
    return rc;
}

static const tool_command command = {
    .usage = "MODEL_DIR|AWQ_DIR -o WORKSPACE [options]",
    .summary = "write a TurboMind workspace (LMDeploy v0.6.4 to v0.7.3)",
    .examples = "  tm-convert internlm2-w4 -o workspace\n"
                "  tm-convert internlm2 -o workspace --tp 2 --dtype float16\n"
                "  tm-convert internlm2-w4 -o workspace \\\n"
                "      --compare-tensor layers.3.attention.w_qkv.0.qweight\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DRY_RUN | TOOL_FORCE | TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};

int main(int argc, char **argv)
{
    return tool_main(argc, argv, &(tool_spec){"tm-convert", command.summary, &command, 1});
}
