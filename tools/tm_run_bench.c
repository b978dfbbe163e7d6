/* tm-run bench: speed of prefill and decode, beside what memory can give. */
#include <stdio.h>

#include "runtime/bench.h"
#include "runtime/clock.h"
#include "tools/tm_run.h"

static struct {
    int64_t prompt_tokens, new_tokens, batch, rounds, probe;
    bool deterministic;
    run_model_opts model;
} opt = {.prompt_tokens = 128,
         .new_tokens = 32,
         .batch = 1,
         .rounds = 5,
         .probe = 512 << 20,
         .model = RUN_MODEL_DEFAULTS};

static const cli_option options[] = {
    {"prompt-tokens", 0, CLI_I64, &opt.prompt_tokens, "N", "tokens of the prompt [128]", .lo = 1,
     .hi = 1 << 20},
    {"new-tokens", 0, CLI_I64, &opt.new_tokens, "N", "tokens of the answer [32]", .lo = 1,
     .hi = 1 << 20},
    {"batch", 0, CLI_I64, &opt.batch, "N", "sequences at once [1]", .lo = 1, .hi = 4096},
    {"rounds", 0, CLI_I64, &opt.rounds, "N", "timed rounds, behind one that is not [5]", .lo = 1,
     .hi = BENCH_MAX_ROUNDS},
    {"probe", 0, CLI_BYTES, &opt.probe, "BYTES",
     "memory read to measure its bandwidth, 0: not at all [512M]", .lo = 0, .hi = 0x1p40},
    {"deterministic", 0, CLI_FLAG, &opt.deterministic, NULL,
     "kernels whose answers do not depend on the batch, as serve has it"},
    RUN_MODEL_OPTIONS(opt.model),
};

/* What starting took, and what the device gave for it. */
typedef struct {
    double open_s, load_s; /* from the beginning until device and path were open, the model ready */
    size_t device_bytes;   /* taken there since it was opened; 0 on the CPU */
} startup;

static err_code device_taken(size_t *out, device *d, err *e)
{
    const dev_footprint f = dev_footprint_of(d);
    size_t free_bytes, total;
    *out = 0;
    if (!f.free_bytes) return OK;
    TRY(dev_memory(d, &free_bytes, &total, e));
    *out = f.free_bytes > free_bytes ? f.free_bytes - free_bytes : 0;
    return OK;
}

static bool add_startup(cJSON *o, const run_ctx *r, const startup *s, const bench_result *b)
{
    const dev_footprint f = dev_footprint_of(r->d);
    const model_plan *p = model_plan_of(r->m);
    bool filled = cJSON_AddNumberToObject(o, "open_seconds", s->open_s) &&
                  cJSON_AddNumberToObject(o, "load_seconds", s->load_s) &&
                  cJSON_AddNumberToObject(o, "first_token_seconds", s->load_s + b->first_s);
    if (!filled || !f.free_bytes) return filled;
    return cJSON_AddNumberToObject(o, "context_bytes", (double)f.context_bytes) &&
           cJSON_AddNumberToObject(o, "device_bytes", (double)s->device_bytes) &&
           cJSON_AddNumberToObject(
               o, "planned_bytes",
               (double)(p->weights_bytes + p->kv_bytes + p->scratch_bytes + f.own_bytes));
}

static err_code report(const tool_ctx *t, const run_ctx *r, const bench_result *b, const startup *s,
                       double rate, err *e)
{
    const double read = (double)b->token_bytes * b->new_tps / (double)opt.batch;
    const model_plan *plan = model_plan_of(r->m);
    if (!t->json) {
        (void)printf("%s\nprompt %8.2f tokens/s (%lld tokens, median of %lld)\nanswer %8.2f "
                     "tokens/s (%lld tokens)\n",
                     dev_name(r->d), b->prompt_tps, (long long)opt.prompt_tokens,
                     (long long)opt.rounds, b->new_tps, (long long)opt.new_tokens);
        (void)printf("each new token reads %.1f MB: %.2f GB/s", (double)b->token_bytes * 1e-6,
                     read * 1e-9);
        if (rate > 0)
            (void)printf(", %.1f %% of the %.2f GB/s measured", 100 * read / rate, rate * 1e-9);
        (void)printf("\nthe first token came %.2f s after the start, %.2f s of them loading\n",
                     s->load_s + b->first_s, s->load_s);
        return OK;
    }
    cJSON *o = cJSON_CreateObject();
    bool filled = cJSON_AddNumberToObject(o, "prefill_tokens_per_second", b->prompt_tps) &&
                  cJSON_AddNumberToObject(o, "decode_tokens_per_second", b->new_tps) &&
                  cJSON_AddNumberToObject(o, "prompt_tokens", (double)opt.prompt_tokens) &&
                  cJSON_AddNumberToObject(o, "new_tokens", (double)opt.new_tokens) &&
                  cJSON_AddNumberToObject(o, "batch", (double)opt.batch) &&
                  cJSON_AddNumberToObject(o, "rounds", (double)opt.rounds) &&
                  cJSON_AddNumberToObject(o, "prefill_seconds", b->prompt_s) &&
                  cJSON_AddNumberToObject(o, "decode_seconds", b->new_s) &&
                  cJSON_AddNumberToObject(o, "prefill_best_seconds", b->prompt_best_s) &&
                  cJSON_AddNumberToObject(o, "decode_best_seconds", b->new_best_s) &&
                  cJSON_AddNumberToObject(o, "bytes_per_token", (double)b->token_bytes) &&
                  cJSON_AddNumberToObject(o, "decode_bytes_per_second", read) &&
                  cJSON_AddNumberToObject(o, "kv_bits", plan->kv == KV_16 ? 16 : (int)plan->kv) &&
                  cJSON_AddNumberToObject(o, "threads", pool_threads(dev_pool(r->d))) &&
                  cJSON_AddStringToObject(o, "device", dev_name(r->d)) &&
                  cJSON_AddNumberToObject(o, "last_id", b->last_id);
    filled = filled && add_startup(o, r, s, b);
    if (rate > 0)
        filled = filled && cJSON_AddNumberToObject(o, "memory_bytes_per_second", rate) &&
                 cJSON_AddNumberToObject(o, "bandwidth_share", read / rate);
    return run_json(o, filled, e);
}

static err_code measure(run_ctx *r, const tool_ctx *t, double begin, err *e)
{
    bench_result b;
    startup s = {.open_s = clock_s() - begin};
    double rate = 0, probe_s = clock_s();
    const bench_opts o = {(int32_t)opt.prompt_tokens, (int32_t)opt.new_tokens, (int32_t)opt.batch,
                          (int32_t)opt.rounds, (uint64_t)t->seed};
    /* Before the model is there: the block read is not on top of it. */
    if (opt.probe && !t->dry_run && dev_kind_of(r->d) == DEV_CPU)
        TRY(bench_read_rate(&rate, r->d, (size_t)opt.probe, 5, &t->job, e));
    probe_s = clock_s() - probe_s;
    TRY(run_model(r, t, &opt.model, opt.prompt_tokens + opt.new_tokens, (int32_t)opt.batch, e));
    if (!r->m) return OK;
    s.load_s = clock_s() - begin - probe_s;
    TRY(bench_run(&b, r->m, &o, &t->job, e));
    TRY(device_taken(&s.device_bytes, r->d, e));
    return report(t, r, &b, &s, rate, e);
}

static err_code run(tool_ctx *t, err *e)
{
    const double begin = clock_s();
    run_ctx r = {0};
    t->device.deterministic = opt.deterministic;
    err_code rc = run_open(&r, t, false, e);
    if (rc == OK) rc = measure(&r, t, begin, e);
    run_close(&r);
    return rc;
}

const tool_command tm_run_bench = {
    .name = "bench",
    .usage = "PATH [options]",
    .summary = "times a prompt and the tokens behind it: the step that chat runs",
    .examples = "  tm-run bench workspace --prompt-tokens 128 --new-tokens 32 --threads 2 --json\n",
    .options = options,
    .n_options = sizeof options / sizeof *options,
    .shared = TOOL_DEVICE | TOOL_SEED | TOOL_JSON | TOOL_DRY_RUN,
    .min_args = 1,
    .max_args = 1,
    .run = run};
