/* pack-w4: a model and its plan in, a Hugging Face AWQ directory out. */
#include <stdio.h>
#include <string.h>

#include "awq/pack.h"
#include "tools/memory_text.h"
#include "tools/tool.h"

static struct {
    const char *plan, *out, *compare;
    int64_t shard_bytes, bits;
    bool clamp;
} opt = {.bits = 4};

static const cli_option options[] = {
    {"plan", 0, CLI_STR, &opt.plan, "FILE", "what awq-search wrote for this model"},
    {"output", 'o', CLI_STR, &opt.out, "AWQ_DIR", "the directory to write", .alias = "work-dir"},
    {"compare-tensor", 0, CLI_STR, &opt.compare, "NAME",
     "make one tensor of AWQ_DIR again and compare its bytes"},
    {"max-shard-size", 0, CLI_BYTES, &opt.shard_bytes, "BYTES", "largest weight file [4 GB]"},
    {"w-bits", 0, CLI_I64, &opt.bits, "N",
     "4, or 16: a 16-bit model with the plan's factors folded in [4]", .lo = 1, .hi = 16},
    {"clamp", 0, CLI_FLAG, &opt.clamp, NULL,
     "values beyond f16 become its largest instead of an error"},
};

static err_code check_options(err *e)
{
    if (!opt.plan) return err_set(e, E_USAGE, "--plan: expected a plan file");
    if (opt.bits != 4 && opt.bits != 16)
        return err_set(e, E_USAGE, "--w-bits: expected 4 or 16, got %d", (int)opt.bits);
    if (opt.bits == 16 && opt.compare)
        return err_set(e, E_USAGE, "--compare-tensor: expected 4-bit weights, got --w-bits 16");
    if (!opt.out) return err_set(e, E_USAGE, "--output: expected a directory name");
    return OK;
}

static err_code print_json(const pack_summary *s, err *e)
{
    cJSON *j = cJSON_CreateObject();
    cJSON_AddNumberToObject(j, "bytes", (double)s->bytes);
    cJSON_AddNumberToObject(j, "tensors", (double)s->tensors);
    cJSON_AddNumberToObject(j, "group_size", s->group);
    cJSON_AddBoolToObject(j, "up_to_date", s->fresh);
    cJSON_AddNumberToObject(j, "seconds", tool_seconds());
    const err_code rc = tool_print_json(j, e);
    cJSON_Delete(j);
    return rc;
}

static err_code pack(const tool_ctx *t, device *d, const pack_opts *o, err *e)
{
    pack_summary s;
    char text[64], size[32];
    TRY(pack_run(&s, d, o, &t->job, e));
    snprintf(text, sizeof text, "%d tensors, %s, ", (int)s.tensors,
             tool_bytes_text(size, sizeof size, s.bytes));
    const size_t used = strlen(text);
    if (o->dense)
        snprintf(text + used, sizeof text - used, "16 bits");
    else
        snprintf(text + used, sizeof text - used, "group %d", (int)s.group);
    if (s.fresh)
        job_log(&t->job, LOG_INFO, "'%s' is up to date: %s", o->out_dir, text);
    else
        tool_wrote(t, o->out_dir, text);
    return t->json ? print_json(&s, e) : OK;
}

static err_code compare(const tool_ctx *t, device *d, const pack_opts *o, err *e)
{
    TRY(pack_compare(d, o, opt.compare, e));
    job_log(&t->job, LOG_INFO, "%s: same bytes", opt.compare);
    return OK;
}

static err_code run(tool_ctx *t, err *e)
{
    const pack_opts o = {t->args[0], opt.plan, opt.out,       opt.shard_bytes,
                         opt.clamp,  t->force, opt.bits == 16};
    memory_plan plan;
    device *d = NULL;
    err_code rc;
    TRY(check_options(e));
    TRY(tool_device_open(t, &d, e));
    rc = pack_memory(&plan, d, &o, e);
    if (rc == OK && t->dry_run)
        rc = tool_print_memory(&plan, t->json, e);
    else if (rc == OK)
        rc = opt.compare ? compare(t, d, &o, e) : pack(t, d, &o, e);
    dev_close(&d);
    return rc;
}

static const tool_command command = {
    .usage = "MODEL_DIR --plan PLAN -o AWQ_DIR [options]",
    .summary = "fold factors, quantize, write a Hugging Face AWQ directory",
    .examples = "  pack-w4 internlm2 --plan plan -o internlm2-w4\n"
                "  pack-w4 internlm2 --plan plan -o internlm2-w4 \\\n"
                "      --compare-tensor model.layers.3.attention.wqkv.qweight\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_DRY_RUN | TOOL_FORCE | TOOL_JSON,
    .min_args = 1,
    .max_args = 1,
    .run = run};

int main(int argc, char **argv)
{
    return tool_main(argc, argv, &(tool_spec){"pack-w4", command.summary, &command, 1});
}
