/* bench_engine MODEL [PROMPT NEW ROUNDS]: new tokens a second of the engine with 1, 4 and 32
 * readers, beside the same steps with nothing around them, prompts included, alternating on one
 * model. Seconds are those of the process on the CPU, all of its threads together (the model has
 * one): what else runs on the machine does not count. */
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>

#include <time.h>

#include "runtime/serve/engine.h"

#define MAX_BATCH  32
#define MAX_PROMPT 1024

static int32_t prompt_tokens = 32, new_tokens = 128;
static int rounds = 5;

static double cpu_s(void)
{
    struct timespec t;
    (void)clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void must(err_code rc, const err *e)
{
    if (rc == OK) return;
    (void)fprintf(stderr, "bench_engine: %s\n", e->msg);
    exit(1);
}

static int by_value(const void *a, const void *b)
{
    const double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double middle(double *x, int n)
{
    qsort(x, (size_t)n, sizeof *x, by_value);
    return x[n / 2];
}

static void fill(int32_t *ids, uint64_t *seed, int32_t vocab)
{
    for (int32_t i = 0; i < prompt_tokens; i++) {
        *seed = *seed * 6364136223846793005u + 1442695040888963407u;
        ids[i] = (int32_t)((*seed >> 33) % (uint64_t)vocab);
    }
}

static answer *submit(engine *g, uint64_t *seed, int32_t vocab)
{
    int32_t ids[MAX_PROMPT];
    err e;
    answer *a;
    fill(ids, seed, vocab);
    const engine_request r = {.prompt = ids,
                              .n_prompt = prompt_tokens,
                              .max_new = new_tokens + 1,
                              .sample = sample_greedy(),
                              .top_logprobs = -1,
                              .prompt_logprobs = -1};
    must(engine_submit(g, &r, &a, &e), &e);
    return a;
}

/* One thread reads all answers, as a server does: tokens a second over `batch` of them. */
static double run_engine(model *m, int32_t batch, uint64_t *seed)
{
    err e;
    engine *g;
    answer *a[MAX_BATCH];
    struct pollfd p[MAX_BATCH];
    int32_t left = batch, tokens = 0;
    must(engine_open(&g, m, &(engine_opts){.max_batch = batch}, NULL, &e), &e);
    const double begin = cpu_s();
    for (int32_t i = 0; i < batch; i++) {
        a[i] = submit(g, seed, model_desc_of(m)->vocab);
        p[i] = (struct pollfd){.fd = answer_fd(a[i]), .events = POLLIN};
    }
    while (left) {
        (void)poll(p, (nfds_t)batch, -1);
        for (int32_t i = 0; i < batch; i++) {
            answer_token t[16];
            answer_state state;
            if (!a[i] || !p[i].revents) continue;
            tokens += answer_read(a[i], t, 16, 0, &state);
            if (state < ANSWER_STOP) continue;
            answer_close(&a[i]);
            p[i].fd = -1;
            left--;
        }
    }
    const double s = cpu_s() - begin;
    engine_close(&g);
    if (tokens != batch * (new_tokens + 1)) {
        (void)fprintf(stderr, "bench_engine: %d tokens of %d\n", tokens, batch * (new_tokens + 1));
        exit(1);
    }
    return tokens / s;
}

static double run_model(model *m, int32_t batch, uint64_t *seed)
{
    static int32_t ids[MAX_BATCH][MAX_PROMPT];
    int32_t best[MAX_BATCH];
    step_seq s[MAX_BATCH];
    err e;
    for (int32_t i = 0; i < batch; i++) {
        fill(ids[i], seed, model_desc_of(m)->vocab);
        s[i] = (step_seq){
            .slot = i, .tokens = ids[i], .n_tokens = prompt_tokens, .n_out = 1, .argmax = &best[i]};
    }
    const double begin = cpu_s();
    for (int32_t k = 0; k <= new_tokens; k++) {
        must(model_step(m, s, batch, NULL, &e), &e);
        for (int32_t i = 0; i < batch; i++) {
            s[i].tokens = &best[i];
            s[i].n_tokens = 1;
        }
    }
    const double t = cpu_s() - begin;
    for (int32_t i = 0; i < batch; i++) model_seq_end(m, i);
    return batch * (new_tokens + 1) / t;
}

int main(int argc, char **argv)
{
    static const int32_t batches[] = {1, 4, 32};
    err e;
    device *d;
    weight_src *src;
    model *m;
    uint64_t seed = 1;
    double x[101], y[101];
    if (argc < 2) {
        (void)fputs("usage: bench_engine MODEL [PROMPT NEW ROUNDS]\n", stderr);
        return 2;
    }
    if (argc > 2) prompt_tokens = atoi(argv[2]);
    if (argc > 3) new_tokens = atoi(argv[3]);
    if (argc > 4) rounds = atoi(argv[4]);
    if (prompt_tokens < 1 || prompt_tokens > MAX_PROMPT || new_tokens < 1 || rounds < 1 ||
        rounds > 101)
        return 2;
    const dev_opts o = {.kind = DEV_CPU, .threads = 1, .deterministic = true};
    const model_opts mo = {.session_len = prompt_tokens + new_tokens + 2, .max_seqs = MAX_BATCH};
    must(dev_open(&d, &o, &e), &e);
    must(weights_open(&src, argv[1], &e), &e);
    must(model_open(&m, d, src, &mo, NULL, &e), &e);
    (void)printf("%s, %d + %d tokens, medians of %d\n", dev_name(d), prompt_tokens, new_tokens + 1,
                 rounds);
    for (size_t k = 0; k < sizeof batches / sizeof *batches; k++) {
        for (int i = -1; i < rounds; i++) { /* one that is not counted */
            x[i < 0 ? 0 : i] = run_engine(m, batches[k], &seed);
            y[i < 0 ? 0 : i] = run_model(m, batches[k], &seed);
        }
        const double a = middle(x, rounds), b = middle(y, rounds);
        (void)printf("%2d at once: engine %8.1f tokens/s, model alone %8.1f: %.1f %%\n", batches[k],
                     a, b, 100 * a / b);
    }
    model_close(&m);
    weights_close(&src);
    dev_close(&d);
    return 0;
}
