/* tm-run info: what a path holds, with every digest checked, and what running it takes. */
#include <stdio.h>
#include <stdlib.h>

#include "base/mem.h"
#include "formats/info.h"
#include "tools/tm_run.h"

static struct {
    bool quick, memory;
    run_model_opts model;
} opt = {.model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"no-verify", 0, CLI_FLAG, &opt.quick, NULL, "do not read the weights to check their digests"},
    {"memory", 0, CLI_FLAG, &opt.memory, NULL,
     "of a model: the memory that one session takes on the device, too [with --device cuda]"},
    RUN_MODEL_OPTIONS(opt.model),
};

static err_code print_text(const cJSON *o, err *e)
{
    char *text;
    TRY(info_text(&text, o, e));
    (void)fputs(text, stdout);
    mem_free(text);
    return OK;
}

typedef struct {
    const char *what, *key;
    size_t bytes;
} memory_row;

static void print_row(const memory_row *r)
{
    char text[32];
    printf("%12s  %s\n", tool_bytes_text(text, sizeof text, r->bytes), r->what);
}

/* The plan of one session beside what the device has, as lines or into `o`. */
static err_code memory_of(const run_ctx *r, const tool_ctx *t, cJSON *o, err *e)
{
    const model_opts mo = {.kv = (kv_format)atoi(opt.model.quant_policy),
                           .session_len = (int32_t)opt.model.session_len,
                           .max_seqs = 1,
                           .kv_mem_bytes = opt.model.kv_mem,
                           .kv_share = opt.model.cache_share};
    size_t free_bytes, total;
    model_plan p;
    TRY(model_plan_make(&p, r->d, r->src, &mo, &t->job, e));
    TRY(dev_memory(r->d, &free_bytes, &total, e));
    const dev_footprint f = dev_footprint_of(r->d);
    const size_t here = dev_mem(r->d) == MEM_HOST ? p.mapped_bytes : 0;
    const memory_row rows[] = {
        {"weights", "weights", p.weights_bytes},
        {"weights read where the file is mapped", "mapped", p.mapped_bytes},
        {"cache of keys and values", "cache", p.kv_bytes},
        {"workspace", "workspace", p.scratch_bytes},
        {"workspace of libraries", "libraries", f.own_bytes},
        {"in all", "total", p.weights_bytes + here + p.kv_bytes + p.scratch_bytes + f.own_bytes},
        {"context of the driver, and other programs", "context", f.context_bytes},
        {"free there now", "free", free_bytes}};
    if (!o) printf("memory on %s, sessions of %d tokens:\n", dev_name(r->d), p.session_len);
    cJSON *m = o ? cJSON_AddObjectToObject(o, "memory") : NULL;
    if (m) cJSON_AddStringToObject(m, "device", dev_name(r->d));
    if (m) cJSON_AddNumberToObject(m, "session_len", p.session_len);
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        if (m)
            cJSON_AddNumberToObject(m, rows[i].key, (double)rows[i].bytes);
        else if (rows[i].bytes)
            print_row(&rows[i]);
    }
    return OK;
}

static err_code add_memory(const tool_ctx *t, cJSON *o, err *e)
{
    run_ctx r;
    err_code rc = run_open(&r, t, false, e);
    if (rc == OK) rc = memory_of(&r, t, o, e);
    run_close(&r);
    return rc;
}

static err_code run(tool_ctx *t, err *e)
{
    const bool memory = opt.memory || t->device.kind == DEV_CUDA;
    cJSON *o;
    TRY(info_read(&o, t->args[0], !opt.quick, &t->job, e));
    err_code rc = memory && t->json ? add_memory(t, o, e) : OK;
    if (rc == OK) rc = t->json ? tool_print_json(o, e) : print_text(o, e);
    if (rc == OK && memory && !t->json) rc = add_memory(t, NULL, e);
    cJSON_Delete(o);
    return rc;
}

const tool_command tm_run_info = {
    .name = "info",
    .usage = "PATH [options]",
    .summary = "says what a model directory, workspace, calib or plan file holds and verifies it",
    .examples = "  tm-run info workspace\n"
                "  tm-run info model-w4 --no-verify --json\n"
                "  tm-run info model-w4 --device cuda --quant-policy 8 --session-len 16384\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_JSON | TOOL_DEVICE,
    .min_args = 1,
    .max_args = 1,
    .run = run};
